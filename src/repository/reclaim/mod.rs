//! Taking dead bytes out of the store: mark, plan, write survivors, condemn, delete.

mod condemn;
mod delete;
mod merge;
mod note;
mod plan;
#[cfg(test)]
mod simulation;

pub use merge::merge_segments;
pub use plan::{PackAction, PackDecision, PackFacts, PackReason, plan};

use super::RepositoryError;
use super::customer::Customer;
use super::directory::{Directory, directory};
use super::index::{PackNumber, count_uses, frame_bytes_of};
use super::mark::{Mark, Unreachable};
use super::sealed::LOAD_ATTEMPTS;
use crate::format::entry::{PackMark, VerifyMethod};
use crate::format::pack::{self, DirectoryEntry};
use crate::model::{PackName, PointId, Tag};
use crate::storage::StorageError;
use jiff::{SignedDuration, Timestamp};
use std::collections::{BTreeSet, HashMap};

/// How often in a row a session may come to nothing before the rest is left to the next prune.
const FRUITLESS_SESSIONS: usize = 6;
/// A session rewrites so many packs of full size at most: what it must keep in memory, and what is
/// written in vain when it dies.
const PACKS_IN_SESSION: u64 = 256;

/// What a reclaim found and did.
#[derive(Debug, Clone, Default)]
pub struct Reclaimed {
    pub marked_at: u64,
    pub removed: Vec<PackName>,
    pub rewritten_bytes: u64,
    pub freed_bytes: u64,
    /// A row for each pack with dead bytes, and one without dead bytes for each that the ledger
    /// has a row of and that has none any more. See [`Customer::note_reclaimed`].
    pub marks: Vec<PackMark>,
    /// Packs that are condemned and could not be deleted, because something live is only there.
    pub withheld: Vec<PackName>,
    /// Packs with nothing live that the store lets nobody delete yet.
    pub dead_and_locked: Vec<PackName>,
    /// Live frames that did not open; noted in the ledger. Their packs stay, unless what does not
    /// open was given up (`force`).
    pub damaged: Vec<(PackName, Tag)>,
    /// What a forced reclaim went on over: of each restore point that cannot be read as a whole, the
    /// first that is missing.
    pub unreadable: Vec<Unreachable>,
    /// Condemned packs that the store refuses to delete, the first with its reason; all others were done.
    pub refused: Option<StorageError>,
}

/// One reclaim on its way.
struct Pass<'a> {
    customer: &'a Customer,
    now: Timestamp,
    force: bool,
    result: Reclaimed,
    /// Condemned by this very pass, after their survivors were opened.
    own: BTreeSet<PackName>,
    /// Packs that hold something live that did not open, or are locked: not tried again in this pass.
    stuck: BTreeSet<PackName>,
    /// Packs that are known not to be locked.
    free: BTreeSet<PackName>,
    /// Frames that were read, did not open, and are given up.
    given_up: BTreeSet<(PackName, Tag)>,
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
    customer.refresh()?;
    customer.settle()?;
    let mut pass = Pass {
        customer,
        now,
        force,
        result: Reclaimed::default(),
        own: BTreeSet::new(),
        stuck: BTreeSet::new(),
        free: BTreeSet::new(),
        given_up: BTreeSet::new(),
    };
    let most_bytes = PACKS_IN_SESSION * customer.settings().pack_bytes as u64;
    let mut fruitless = 0;
    loop {
        let mark = pass.mark()?;
        pass.delete_condemned(&mark)?;
        let mut decisions = plan(&survey(customer, &mark, now)?, now, budget);
        decisions.extend(pass.rescues(&mark));
        pass.leave_locked(&decisions)?;
        decisions.retain(|decision| !pass.stuck.contains(&decision.facts.name));
        pass.try_one_if_refused(&mut decisions);
        let batch = plan::next_batch(&decisions, most_bytes);
        if batch.is_empty() || fruitless >= FRUITLESS_SESSIONS {
            return pass.finish(&mark, now);
        }
        match pass.condemn(mark, &batch)? {
            true => fruitless = 0,
            false => fruitless += 1,
        }
    }
}

/// A complete mark at the ledger's end, or the damage that stands in its way.
pub fn mark_now(customer: &Customer, force: bool) -> Result<Mark, RepositoryError> {
    let mark = Mark::at_end(customer)?;
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

/// The facts of every pack that is not condemned yet.
pub fn survey(
    customer: &Customer,
    mark: &Mark,
    now: Timestamp,
) -> Result<Vec<PackFacts>, RepositoryError> {
    let index = mark.index();
    let uses = count_uses(index, mark.live())?;
    Ok(customer.with_state(|state| {
        let unmarked = state.unmarked_erasures_until(mark.began_at());
        let unmarked = unmarked.values().min().copied();
        // Dead bytes nobody can date any more get the earliest deadline that is still open.
        let fallback = state
            .points
            .values()
            .filter(|point| point.erase_seq.is_some())
            .map(|point| point.deadline)
            .min()
            .unwrap_or(now);
        index
            .packs()
            .iter()
            .zip(&uses)
            .enumerate()
            .filter(|(_, (info, _))| !info.condemned)
            .map(|(number, (info, usage))| {
                let frame_bytes = frame_bytes_of(&info.row);
                let dead = frame_bytes > usage.live_bytes;
                let earlier = state.marks.get(&info.row.name);
                let earlier = earlier.map(|mark| mark.earliest_deadline);
                let session = &info.row.name.session;
                let copied = state.copied_erasures_until(session, mark.began_at());
                let copied = copied.values().min().copied();
                // Any dead byte may be one of the latest erasures, also where their sum is that of
                // the last mark: frames come back to life as well.
                let known = [earlier, unmarked, copied].into_iter().flatten().min();
                let deadline = known.unwrap_or(fallback);
                PackFacts {
                    number: number as PackNumber,
                    name: info.row.name,
                    size_bytes: info.row.size_bytes,
                    frame_bytes,
                    live_bytes: usage.live_bytes,
                    live_frames: usage.live_frames,
                    earliest_deadline: dead.then_some(deadline),
                    born_at: state.born.get(&info.row.name.session).copied(),
                    rescue: false,
                }
            })
            .collect()
    }))
}

impl Pass<'_> {
    /// Where nothing can be deleted, rewriting would only take room, night after night: after a refusal one pack is
    /// tried, the most urgent, and all others once it is gone.
    fn try_one_if_refused(&self, decisions: &mut Vec<PackDecision>) {
        let deleted_own = || {
            self.result
                .removed
                .iter()
                .any(|name| self.own.contains(name))
        };
        if self.result.refused.is_none() || deleted_own() {
            return;
        }
        let is_rewritten = |decision: &PackDecision| {
            decision.action == PackAction::Rewrite && !decision.facts.rescue
        };
        let first = decisions
            .iter()
            .filter(|decision| self.own.is_empty() && is_rewritten(decision))
            .min_by_key(|decision| {
                let deadline = decision.facts.earliest_deadline;
                (deadline.is_none(), deadline)
            })
            .map(|decision| decision.facts.name);
        decisions.retain(|decision| !is_rewritten(decision) || Some(decision.facts.name) == first);
    }

    /// What nobody can delete yet is not condemned either: it would be neither of use nor gone. Its lock ends
    /// early enough before the deadline of what is in it.
    fn leave_locked(&mut self, decisions: &[PackDecision]) -> Result<(), RepositoryError> {
        for decision in decisions {
            let name = decision.facts.name;
            let goes = decision.action != PackAction::Keep && !decision.facts.rescue;
            if !goes || self.stuck.contains(&name) || self.free.contains(&name) {
                continue;
            }
            let object = self.customer.names().pack(&name);
            if self.customer.storage().locked_until(&object)?.is_none() {
                self.free.insert(name);
                continue;
            }
            self.stuck.insert(name);
            if decision.action == PackAction::Remove {
                self.result.dead_and_locked.push(name);
            }
        }
        Ok(())
    }

    /// A complete mark; what did not open on the way leaves the index, so that the next backup
    /// that meets its content heals it.
    fn mark(&mut self) -> Result<Mark, RepositoryError> {
        let mark = self.mark_settled(true)?;
        let frames: Vec<(PackName, Tag)> = mark.damaged_frames.iter().copied().collect();
        self.note_damage(&frames)?;
        let mark = match mark.damage.is_empty() || self.force {
            true if frames.is_empty() => mark,
            // Of an index that knows them as damaged.
            _ => self.mark_settled(self.force)?,
        };
        self.result.unreadable = first_of_each_point(&mark.damage);
        Ok(mark)
    }

    /// Of an end that counts: what is condemned there is deleted on its word.
    fn mark_settled(&self, force: bool) -> Result<Mark, RepositoryError> {
        for _ in 0..LOAD_ATTEMPTS {
            let readings = self.customer.readings();
            let mark = mark_now(self.customer, force)?;
            self.customer.settle()?;
            if self.customer.readings() == readings {
                return Ok(mark);
            }
        }
        Err(self.customer.index_changes_too_fast())
    }

    fn note_damage(&mut self, frames: &[(PackName, Tag)]) -> Result<(), RepositoryError> {
        let new: Vec<(PackName, Tag)> = self.customer.with_state(|state| {
            let unknown = |frame: &&(PackName, Tag)| !state.damaged.contains(frame);
            frames.iter().filter(unknown).copied().collect()
        });
        self.result.damaged.extend(frames);
        self.result.damaged.sort_unstable();
        self.result.damaged.dedup();
        self.customer
            .note_verification(VerifyMethod::Opened, &[], &new)
    }

    fn rescues(&self, mark: &Mark) -> Vec<PackDecision> {
        let decision = |name: &PackName| {
            let number = mark.index().number_of(name)?;
            let row = mark.index().pack(number)?.row;
            let facts = PackFacts {
                number,
                name: *name,
                size_bytes: row.size_bytes,
                frame_bytes: frame_bytes_of(&row),
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
        };
        self.result.withheld.iter().filter_map(decision).collect()
    }
}

/// No more rows than there are points: all that a lost index lacks would fill the memory.
fn first_of_each_point(damage: &[Unreachable]) -> Vec<Unreachable> {
    let mut told: BTreeSet<PointId> = BTreeSet::new();
    let first = damage.iter().filter(|found| told.insert(found.point));
    first.cloned().collect()
}

/// What the index knows of these packs, as the directory of each would list it; nothing of those that it does not
/// know. One pass over the index for all: each reads every record there is.
fn entries_in_index(
    mark: &Mark,
    names: &[PackName],
) -> Result<HashMap<PackName, Vec<DirectoryEntry>>, RepositoryError> {
    let index = mark.index();
    let numbers = names.iter().filter_map(|name| index.number_of(name));
    let mut wanted: HashMap<PackNumber, Vec<DirectoryEntry>> =
        numbers.map(|number| (number, Vec::new())).collect();
    if wanted.is_empty() {
        return Ok(HashMap::new());
    }
    index.each_record(|_, tag, place| {
        let Some(entries) = wanted.get_mut(&place.pack) else {
            return;
        };
        let kind = match index.pack(place.pack).map(|info| info.row.kind) {
            Some(pack::PackKind::Node) => crate::model::PieceKind::Node { height: 1 },
            _ => crate::model::PieceKind::Chunk,
        };
        entries.push(DirectoryEntry {
            tag,
            offset: place.offset,
            length_bytes: place.length_bytes,
            kind,
        });
    })?;
    let named = wanted
        .into_iter()
        .filter_map(|(number, entries)| Some((index.pack(number)?.row.name, entries)));
    Ok(named.collect())
}
