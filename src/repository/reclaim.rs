//! Taking dead bytes out of the store: mark, plan, write survivors, condemn, delete.

use super::customer::Customer;
use super::index::{Index, PackNumber, count_uses, frame_bytes_of};
use super::mark::Mark;
use super::reader::{ReadScratch, Reader};
use super::writer::{Trust, Uploaded};
use super::{RepositoryError, RepositoryErrorKind};
use crate::format::FormatError;
use crate::format::entry::{Body, CondemnBody, PackMark, Purpose};
use crate::format::pack::{self, DirectoryEntry, MAX_PACK_BYTES};
use crate::model::{PackName, Tag};
use crate::storage::StorageErrorKind;
use jiff::{SignedDuration, Timestamp};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

/// How often a plan is made anew before it is left to the next prune.
const PLAN_ATTEMPTS: usize = 6;
/// Only one prune a night is relied on: from the start of one night to the end of the next, in
/// which the clocks may change.
const UNTIL_NEXT_PRUNE: SignedDuration = SignedDuration::from_hours(50);
/// A condemnation names at most so many packs; a larger one is several sessions.
const MAX_CONDEMNED: usize = 4096;

/// What decides over a pack. `dead_bytes` counts frames only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackFacts {
    pub number: PackNumber,
    pub name: PackName,
    pub frame_bytes: u64,
    pub live_bytes: u64,
    pub live_frames: u64,
    pub earliest_deadline: Option<Timestamp>,
    pub born_at: Option<Timestamp>,
    /// Condemned before, and still holding something that is live nowhere else.
    pub rescue: bool,
}

impl PackFacts {
    pub fn dead_bytes(&self) -> u64 {
        self.frame_bytes.saturating_sub(self.live_bytes)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackAction {
    Keep,
    /// Nothing in it is live: it goes whole.
    Remove,
    /// Its live frames are written into new packs, then it goes.
    Rewrite,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackReason {
    NothingDead,
    NothingLive,
    HalfDead,
    DeadlineNear { deadline: Timestamp },
    CanWait { deadline: Option<Timestamp> },
    Rescue,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackDecision {
    pub facts: PackFacts,
    pub action: PackAction,
    pub reason: PackReason,
}

/// What to do with each pack. `budget`: the policy's erase budget.
///
/// A pack is rewritten when half of it is dead, or when the earliest deadline in it is nearer than
/// a quarter of the budget, or may pass before the next prune has ended; then it loses all its dead
/// frames, so each live byte moves about once a budget.
pub fn plan(packs: &[PackFacts], now: Timestamp, budget: SignedDuration) -> Vec<PackDecision> {
    let margin = (budget / 4).max(UNTIL_NEXT_PRUNE);
    packs
        .iter()
        .map(|facts| {
            let dead = facts.dead_bytes();
            let near = facts
                .earliest_deadline
                .filter(|deadline| deadline.duration_since(now) <= margin);
            let (action, reason) = match () {
                () if facts.rescue => (PackAction::Rewrite, PackReason::Rescue),
                () if facts.live_frames == 0 => (PackAction::Remove, PackReason::NothingLive),
                () if dead == 0 => (PackAction::Keep, PackReason::NothingDead),
                () if dead * 2 >= facts.frame_bytes => (PackAction::Rewrite, PackReason::HalfDead),
                () => match near {
                    Some(deadline) => (PackAction::Rewrite, PackReason::DeadlineNear { deadline }),
                    None => {
                        let deadline = facts.earliest_deadline;
                        (PackAction::Keep, PackReason::CanWait { deadline })
                    }
                },
            };
            PackDecision {
                facts: *facts,
                action,
                reason,
            }
        })
        .collect()
}

/// What a reclaim found and did.
#[derive(Debug, Clone, Default)]
pub struct Reclaimed {
    pub marked_at: u64,
    pub removed: Vec<PackName>,
    pub rewritten_bytes: u64,
    pub freed_bytes: u64,
    pub marks: Vec<PackMark>,
    /// Packs that are condemned and could not be deleted, because something live is only there.
    pub withheld: Vec<PackName>,
}

/// The facts of every pack that is not deleted yet.
pub fn survey(customer: &Customer, mark: &Mark, now: Timestamp) -> Vec<PackFacts> {
    let index = mark.index();
    let uses = count_uses(index, mark.live());
    customer.with_state(|state| {
        let unmarked = state.unmarked_erasures();
        let fresh_deadline = unmarked.values().min().copied();
        // Dead bytes nobody can date any more get the earliest deadline that is still open.
        let fallback = state
            .points
            .values()
            .filter(|point| point.erase_seq.is_some())
            .map(|point| point.deadline)
            .min()
            .or(fresh_deadline)
            .unwrap_or(now);
        index
            .packs()
            .iter()
            .zip(&uses)
            .enumerate()
            .filter(|(_, (info, _))| !info.condemned)
            .map(|(number, (info, usage))| {
                let frame_bytes = frame_bytes_of(&info.row);
                let dead_bytes = frame_bytes.saturating_sub(usage.live_bytes);
                let earlier = state.marks.get(&info.row.name);
                let earlier_deadline = earlier.map(|mark| mark.earliest_deadline);
                let newly_dead = dead_bytes > earlier.map_or(0, |mark| mark.dead_bytes);
                let fresh = newly_dead.then(|| fresh_deadline.unwrap_or(fallback));
                let earliest_deadline = match (earlier_deadline, fresh) {
                    (Some(a), Some(b)) => Some(a.min(b)),
                    (a, b) => a.or(b),
                };
                PackFacts {
                    number: number as PackNumber,
                    name: info.row.name,
                    frame_bytes,
                    live_bytes: usage.live_bytes,
                    live_frames: usage.live_frames,
                    earliest_deadline: (dead_bytes > 0).then_some(earliest_deadline).flatten(),
                    born_at: state.born.get(&info.row.name.session).copied(),
                    rescue: false,
                }
            })
            .collect()
    })
}

/// Marks at the ledger's end, removes what is due, and says what is left dead where.
///
/// `force`: go on although something of a live point cannot be read (`--confirm`, or one day
/// before a deadline); otherwise damage condemns nothing.
pub fn reclaim(
    customer: &Customer,
    now: Timestamp,
    budget: SignedDuration,
    force: bool,
) -> Result<Reclaimed, RepositoryError> {
    let mut result = Reclaimed::default();
    for _ in 0..PLAN_ATTEMPTS {
        let mark = mark_now(customer, force)?;
        delete_condemned(customer, &mark, &mut result)?;
        // A full store: what goes whole goes first, and what it frees serves the rewriting.
        let mut decisions = plan(&survey(customer, &mark, now), now, budget);
        decisions.extend(rescues(&mark, &result.withheld));
        let whole: Vec<PackDecision> = chosen(&decisions, PackAction::Remove);
        let rewrite: Vec<PackDecision> = chosen(&decisions, PackAction::Rewrite);
        let batch = match whole.is_empty() {
            false => whole,
            true => rewrite,
        };
        if batch.is_empty() {
            return finish(customer, &mark, now, result);
        }
        let batch: Vec<PackDecision> = batch.into_iter().take(MAX_CONDEMNED).collect();
        let Some(condemned_bytes) = condemn(customer, mark, &batch)? else {
            continue;
        };
        result.rewritten_bytes += condemned_bytes;
        result.withheld.clear();
    }
    // Others keep changing the ledger; the next prune goes on. What is dead is still recorded.
    let mark = mark_now(customer, force)?;
    delete_condemned(customer, &mark, &mut result)?;
    finish(customer, &mark, now, result)
}

fn chosen(decisions: &[PackDecision], action: PackAction) -> Vec<PackDecision> {
    let mut chosen: Vec<PackDecision> = decisions
        .iter()
        .filter(|decision| decision.action == action)
        .copied()
        .collect();
    // Old with old: what has lived long tends to live on, and young packs tend to die whole.
    chosen.sort_by_key(|decision| (decision.facts.born_at, decision.facts.name));
    chosen
}

fn rescues(mark: &Mark, withheld: &[PackName]) -> Vec<PackDecision> {
    withheld
        .iter()
        .filter_map(|name| {
            let number = mark.index().number_of(name)?;
            let facts = PackFacts {
                number,
                name: *name,
                frame_bytes: frame_bytes_of(&mark.index().pack(number)?.row),
                live_bytes: 0,
                live_frames: 1,
                earliest_deadline: None,
                born_at: None,
                rescue: true,
            };
            Some(PackDecision {
                facts,
                action: PackAction::Rewrite,
                reason: PackReason::Rescue,
            })
        })
        .collect()
}

/// A complete mark at the ledger's end, or the damage that stands in its way.
pub fn mark_now(customer: &Customer, force: bool) -> Result<Mark, RepositoryError> {
    let index = customer.load_index()?;
    let mut mark = Mark::new(index);
    loop {
        mark.extend(customer)?;
        customer.refresh()?;
        let complete = customer.with_state(|state| {
            state.segments.len() == mark.index().segment_names().count()
                && mark
                    .index()
                    .segment_names()
                    .all(|(name, _)| state.segments.contains_key(name))
        });
        if complete && mark.extend(customer)? == 0 {
            break;
        }
        if !complete {
            // Born meanwhile: the index must know what the new roots reach.
            mark = Mark::new(customer.load_index()?);
        }
    }
    match mark.damage.first() {
        Some(found) if !force => Err(RepositoryError::damaged(
            &found.error.name,
            format!(
                "{} (restore point {}; {} pieces in all); nothing was condemned",
                found.error.detail,
                found.point,
                mark.damage.len()
            ),
        )),
        _ => Ok(mark),
    }
}

/// The directory of a pack, from the pack itself. `None`: the pack is gone.
fn directory(
    customer: &Customer,
    name: &PackName,
) -> Result<Option<Vec<DirectoryEntry>>, RepositoryError> {
    let object = customer.names().pack(name);
    let storage = customer.storage();
    let size = match storage.size_bytes(&object) {
        Ok(size) => size,
        Err(error) if error.kind == StorageErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let damaged = |error: FormatError| RepositoryError::damaged(&object, error);
    let mut trailer = [0; pack::TRAILER_BYTES];
    let at = size.saturating_sub(pack::TRAILER_BYTES as u64);
    storage.read_range(&object, at, &mut trailer)?;
    let range = pack::directory_range(&trailer, size).map_err(damaged)?;
    let mut header = [0; pack::HEADER_BYTES];
    storage.read_range(&object, 0, &mut header)?;
    let length = usize::try_from(range.end - range.start)
        .map_err(|_| RepositoryError::damaged(&object, "impossible directory"))?;
    let mut bytes = vec![0; length];
    storage.read_range(&object, range.start, &mut bytes)?;
    pack::parse_directory(&header, &bytes, range.start)
        .map(Some)
        .map_err(damaged)
}

/// Writes the survivors of `batch` in a session and condemns the packs. `None`: what the plan
/// stood on changed; plan again. Otherwise the bytes that were written again.
fn condemn(
    customer: &Customer,
    mut mark: Mark,
    batch: &[PackDecision],
) -> Result<Option<u64>, RepositoryError> {
    // Judged by the packs' own directories: the index may know less than a pack holds.
    let mut directories = BTreeMap::new();
    for decision in batch {
        match directory(customer, &decision.facts.name) {
            Ok(Some(entries)) => {
                directories.insert(decision.facts.name, entries);
            }
            Ok(None) => {
                directories.insert(decision.facts.name, Vec::new());
            }
            // Nothing of a pack whose directory is damaged may be called dead.
            Err(error) if error.is_damage() => {}
            Err(error) => return Err(error),
        }
    }
    let survivors: HashSet<Tag> = directories
        .values()
        .flatten()
        .map(|entry| entry.tag)
        .filter(|tag| mark.is_live(tag))
        .collect();
    let begun = customer.begin(Purpose::Reclaim, None)?;
    let outcome = write_and_condemn(customer, &mut mark, &begun, &directories, &survivors);
    match outcome {
        Ok(Some(bytes)) => Ok(Some(bytes)),
        Ok(None) => {
            customer.abort(&begun.id, "what the plan stood on has changed")?;
            Ok(None)
        }
        Err(error) if error.kind == RepositoryErrorKind::Uncertain => Err(error),
        Err(error) => {
            // The session's own failure is what the caller must hear of.
            let _aborted = customer.abort(&begun.id, "the reclaim failed");
            Err(error)
        }
    }
}

fn write_and_condemn(
    customer: &Customer,
    mark: &mut Mark,
    begun: &super::customer::Begun,
    directories: &BTreeMap<PackName, Vec<DirectoryEntry>>,
    survivors: &HashSet<Tag>,
) -> Result<Option<u64>, RepositoryError> {
    let session = customer.session(begun, Trust::Nothing)?;
    let mut kept: HashSet<Tag> = HashSet::new();
    if !survivors.is_empty() {
        // A second walk finds the ids of the survivors: a frame is copied only after it opened.
        let mut ids = Mark::collecting(mark.index().clone(), survivors.clone());
        ids.extend(customer)?;
        let reader = Reader::with_index(customer, mark.index().clone());
        let mut scratch = ReadScratch::new()?;
        let mut worker = session.worker()?;
        for (name, entries) in directories {
            if !entries.iter().any(|entry| survivors.contains(&entry.tag)) {
                continue;
            }
            let object = customer.names().pack(name);
            let bytes = customer.storage().read(&object, MAX_PACK_BYTES)?;
            for entry in entries {
                if !survivors.contains(&entry.tag) || kept.contains(&entry.tag) {
                    continue;
                }
                let Some((kind, id)) = ids.id_of(&entry.tag) else {
                    continue;
                };
                let Some(frame) = pack::frame_bytes(&bytes, entry) else {
                    continue;
                };
                let opened = reader.open_frame(name, frame, kind, &id, &entry.tag, &mut scratch);
                if let (Ok(()), Ok(frame)) = (opened, pack::parse_frame(frame)) {
                    session.copy_frame(&mut worker, &frame, id)?;
                    kept.insert(entry.tag);
                }
            }
        }
        session.retire(worker);
    }
    // A pack with a live frame that did not open stays where it is: it may be all there is.
    let packs: BTreeSet<PackName> = directories
        .iter()
        .filter(|(_, entries)| {
            entries
                .iter()
                .all(|entry| !survivors.contains(&entry.tag) || kept.contains(&entry.tag))
        })
        .map(|(name, _)| *name)
        .collect();
    if packs.is_empty() {
        return Ok(None);
    }
    let uploaded = session.finish()?;
    let bytes = uploaded.stored_bytes;
    match append_condemn(customer, mark, begun, packs, &uploaded, directories, &kept)? {
        true => Ok(Some(bytes)),
        false => Ok(None),
    }
}

/// Takes a slot for the condemnation. If the ledger grew by new roots, they are added to the mark
/// and each pack must still have all its live tags among the survivors; `false` if none has.
fn append_condemn(
    customer: &Customer,
    mark: &mut Mark,
    begun: &super::customer::Begun,
    mut packs: BTreeSet<PackName>,
    uploaded: &Uploaded,
    directories: &BTreeMap<PackName, Vec<DirectoryEntry>>,
    kept: &HashSet<Tag>,
) -> Result<bool, RepositoryError> {
    // What the plan was checked against; the entry may only follow exactly this.
    let mut checked_at = None;
    for _ in 0..64 {
        let attempt = customer.append(|state| {
            if !state.open.contains_key(&begun.id) {
                return Err(RepositoryError::new(
                    RepositoryErrorKind::Superseded,
                    begun.id,
                    "the reclaim's session was aborted",
                ));
            }
            if checked_at != Some(state.seq) {
                return Err(RepositoryError::new(
                    RepositoryErrorKind::AlreadyExists,
                    begun.id,
                    "the ledger went on",
                ));
            }
            Ok(Body::Condemn(CondemnBody {
                session: begun.id,
                packs: packs.iter().copied().collect(),
                segments: uploaded.segments.clone(),
            }))
        });
        match attempt {
            Ok(_) => return Ok(true),
            Err(error) if error.kind == RepositoryErrorKind::AlreadyExists => {}
            Err(error) if error.kind == RepositoryErrorKind::Superseded => return Ok(false),
            Err(error) => return Err(error),
        }
        // New roots may reach what was dead, and may rest on packs born meanwhile: mark those with
        // an index that knows them, and look at each condemned pack again.
        let now = customer.with_state(|state| state.seq);
        let mut fresh = Mark::new(customer.load_index()?);
        fresh.extend(customer)?;
        if !fresh.damage.is_empty() && mark.damage.is_empty() {
            return Ok(false);
        }
        let lives = |mark: &Mark, tag: &Tag| mark.is_live(tag);
        packs.retain(|pack| {
            let already = customer.with_state(|state| state.is_condemned(pack));
            let rescue = mark
                .index()
                .number_of(pack)
                .and_then(|number| mark.index().pack(number))
                .is_some_and(|info| info.condemned);
            let covered = directories.get(pack).is_some_and(|entries| {
                entries
                    .iter()
                    .all(|entry| !lives(&fresh, &entry.tag) || kept.contains(&entry.tag))
            });
            covered && (!already || rescue)
        });
        if packs.is_empty() {
            return Ok(false);
        }
        *mark = fresh;
        checked_at = customer.with_state(|state| (state.seq == now).then_some(now));
    }
    Ok(false)
}

/// Deletes condemned packs, ours and those of others that died, after finding each live tag of a
/// pack in an uncondemned one. What is found nowhere else is withheld, to be rescued.
fn delete_condemned(
    customer: &Customer,
    mark: &Mark,
    result: &mut Reclaimed,
) -> Result<(), RepositoryError> {
    let waiting: Vec<PackName> = customer.with_state(|state| {
        state
            .condemned
            .iter()
            .filter(|(_, row)| !row.deleted)
            .map(|(name, _)| *name)
            .collect()
    });
    result.withheld.clear();
    for name in waiting {
        if result.removed.contains(&name) {
            continue;
        }
        let entries = match directory(customer, &name) {
            Ok(entries) => entries.unwrap_or_default(),
            // A condemned pack whose directory is damaged: what its frames were is known from the
            // index; frames the index never knew cannot be needed.
            Err(error) if error.is_damage() => entries_of(mark.index(), &name),
            Err(error) => return Err(error),
        };
        let needed = entries.iter().any(|entry| {
            mark.is_live(&entry.tag) && mark.index().sound_places(&entry.tag).next().is_none()
        });
        if needed && !mark_knows_damage(mark) {
            result.withheld.push(name);
            continue;
        }
        let object = customer.names().pack(&name);
        let freed = customer.storage().size_bytes(&object).unwrap_or_default();
        customer.storage().delete(&object)?;
        result.freed_bytes += freed;
        result.removed.push(name);
    }
    Ok(())
}

fn mark_knows_damage(mark: &Mark) -> bool {
    !mark.damage.is_empty()
}

fn entries_of(index: &Index, name: &PackName) -> Vec<DirectoryEntry> {
    let Some(number) = index.number_of(name) else {
        return Vec::new();
    };
    let mut entries = Vec::new();
    index.each_record(|_, _, tag, place| {
        if place.pack == number {
            entries.push(DirectoryEntry {
                tag,
                offset: place.offset,
                length_bytes: place.length_bytes,
                kind: crate::model::PieceKind::Chunk,
            });
        }
    });
    entries
}

/// What is dead where, after everything that was due is gone.
fn finish(
    customer: &Customer,
    mark: &Mark,
    now: Timestamp,
    mut result: Reclaimed,
) -> Result<Reclaimed, RepositoryError> {
    let facts = survey(customer, mark, now);
    result.marks = customer.with_state(|state| {
        let unmarked: Vec<u64> = state.unmarked_erasures().into_keys().collect();
        facts
            .iter()
            .filter(|facts| facts.dead_bytes() > 0)
            .map(|facts| {
                let earlier = state.marks.get(&facts.name);
                let mut erases: BTreeSet<u64> = earlier
                    .map(|mark| mark.erases.iter().copied().collect())
                    .unwrap_or_default();
                if facts.dead_bytes() > earlier.map_or(0, |mark| mark.dead_bytes) {
                    erases.extend(&unmarked);
                }
                PackMark {
                    pack: facts.name,
                    dead_bytes: facts.dead_bytes(),
                    earliest_deadline: facts.earliest_deadline.unwrap_or(now),
                    erases: erases.into_iter().collect(),
                }
            })
            .collect()
    });
    result.marked_at = customer.with_state(|state| state.seq);
    Ok(result)
}

/// Joins small index segments into one, so that a lookup asks few of them. Places of packs that
/// are known to be deleted are left out; those of packs that are only condemned stay.
pub fn merge_segments(customer: &Customer) -> Result<bool, RepositoryError> {
    use crate::format::entry::MergeBody;
    use crate::format::segment::{self, PackRow, Record};
    let index: Arc<Index> = customer.load_index()?;
    let mut sizes: Vec<_> = index
        .segment_names()
        .map(|(name, len)| (len, *name))
        .collect();
    sizes.sort_unstable();
    let stale = index.packs().iter().filter(|info| info.deleted).count();
    if sizes.len() < MERGE_AT_SEGMENTS && stale < MERGE_AT_DELETED_PACKS {
        return Ok(false);
    }
    // All small ones, and a larger one only while the ones before it add up to a quarter of it:
    // each record moves a logarithmic number of times. Deleted packs leave only with their
    // segments, so many of them merge everything.
    let mut taken = Vec::new();
    let mut sum = 0;
    for (len, name) in &sizes {
        if taken.len() >= 2 && sum * 4 < *len && stale < MERGE_AT_DELETED_PACKS {
            break;
        }
        sum += len;
        taken.push(*name);
    }
    if taken.len() < 2 && stale < MERGE_AT_DELETED_PACKS {
        return Ok(false);
    }
    let begun = customer.begin(Purpose::Merge, None)?;
    let mut rows: Vec<PackRow> = Vec::new();
    let mut numbers: BTreeMap<PackName, u32> = BTreeMap::new();
    let mut records: Vec<Record> = Vec::new();
    let deleted = customer.with_state(|state| {
        state
            .condemned
            .iter()
            .filter(|(_, row)| row.deleted)
            .map(|(name, _)| *name)
            .collect::<BTreeSet<PackName>>()
    });
    let merged = (|| {
        for name in &taken {
            let part = super::index::read_segment(&**customer.storage(), customer.names(), name)?;
            for at in 0..part.len() {
                let record = part.record(at);
                let Some(row) = part.packs().get(record.pack as usize) else {
                    continue;
                };
                if deleted.contains(&row.name) {
                    continue;
                }
                let next = rows.len() as u32;
                let pack = *numbers.entry(row.name).or_insert_with(|| {
                    rows.push(*row);
                    next
                });
                records.push(Record { pack, ..record });
            }
            // A pack without a record in the index is adopted all the same.
            for row in part.packs() {
                if !deleted.contains(&row.name) && !numbers.contains_key(&row.name) {
                    numbers.insert(row.name, rows.len() as u32);
                    rows.push(*row);
                }
            }
        }
        let bytes = segment::build(
            &begun.id,
            &crate::codec::random_bytes(),
            &rows,
            &mut records,
        );
        let name = crate::model::SegmentName {
            session: begun.id,
            hash: crate::model::ObjectHash::from_bytes(*blake3::hash(&bytes).as_bytes()),
        };
        super::writer::upload(
            &**customer.storage(),
            &customer.names().segment(&name),
            &bytes,
        )?;
        // Dropped: deleted packs that no segment lists any more once these are replaced.
        let kept_elsewhere: BTreeSet<PackName> = sizes
            .iter()
            .map(|(_, name)| name)
            .filter(|name| !taken.contains(name))
            .map(|name| super::index::read_segment(&**customer.storage(), customer.names(), name))
            .collect::<Result<Vec<_>, _>>()?
            .iter()
            .flat_map(|part| part.packs().iter().map(|row| row.name).collect::<Vec<_>>())
            .collect();
        customer.append(|state| {
            if !taken.iter().all(|name| state.segments.contains_key(name)) {
                return Err(RepositoryError::new(
                    RepositoryErrorKind::Superseded,
                    begun.id,
                    "another merge replaced these segments",
                ));
            }
            let known = |segment: &crate::model::SegmentName| {
                sizes.iter().any(|(_, known)| known == segment)
            };
            // A segment born meanwhile may list a deleted pack only if it is a merge of those we
            // know; then this merge is superseded anyway, but do not drop on its account.
            let all_known = state.segments.keys().all(known);
            Ok(Body::Merge(MergeBody {
                session: begun.id,
                segments: vec![name],
                replaced: taken.clone(),
                dropped: match all_known {
                    true => deleted.difference(&kept_elsewhere).copied().collect(),
                    false => Vec::new(),
                },
            }))
        })
    })();
    match merged {
        Ok(_) => {
            for name in &taken {
                customer.storage().delete(&customer.names().segment(name))?;
            }
            Ok(true)
        }
        Err(error) if error.kind == RepositoryErrorKind::Uncertain => Err(error),
        Err(error) => {
            let _aborted = customer.abort(&begun.id, "the merge failed");
            match error.kind {
                RepositoryErrorKind::Superseded => Ok(false),
                _ => Err(error),
            }
        }
    }
}

const MERGE_AT_SEGMENTS: usize = 12;
const MERGE_AT_DELETED_PACKS: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ObjectHash, SessionId};

    fn facts(frame_bytes: u64, live_bytes: u64, deadline_in_days: i64) -> (PackFacts, Timestamp) {
        let now: Timestamp = "2026-11-21T03:00:00Z".parse().unwrap();
        let facts = PackFacts {
            number: 0,
            name: PackName {
                session: SessionId::from_bytes([0; 16]),
                hash: ObjectHash::from_bytes([0; 32]),
            },
            frame_bytes,
            live_bytes,
            live_frames: live_bytes / 10,
            earliest_deadline: Some(now + SignedDuration::from_hours(24 * deadline_in_days)),
            born_at: None,
            rescue: false,
        };
        (facts, now)
    }

    #[test]
    fn a_pack_is_rewritten_for_half_its_bytes_or_for_its_deadline_and_else_waits() {
        let budget = SignedDuration::from_hours(24 * 20);
        let decide = |frame, live, days| {
            let (facts, now) = facts(frame, live, days);
            plan(&[facts], now, budget)[0].action
        };
        assert_eq!(decide(1000, 0, 20), PackAction::Remove);
        assert_eq!(decide(1000, 1000, 20), PackAction::Keep);
        assert_eq!(decide(1000, 500, 20), PackAction::Rewrite);
        assert_eq!(decide(1000, 990, 20), PackAction::Keep);
        assert_eq!(decide(1000, 990, 6), PackAction::Keep);
        assert_eq!(decide(1000, 990, 5), PackAction::Rewrite);
        assert_eq!(decide(1000, 990, -1), PackAction::Rewrite);
    }

    #[test]
    fn with_the_smallest_budget_nothing_waits_for_a_prune_that_comes_too_late() {
        // Tonight's prune at the start of the window, the next one at the end of its own.
        let (mut facts, now) = facts(1000, 990, 0);
        facts.earliest_deadline = Some(now + SignedDuration::from_hours(25));
        let budget = SignedDuration::from_hours(24);
        assert_eq!(plan(&[facts], now, budget)[0].action, PackAction::Rewrite);
    }
}
