//! Writing the survivors of a batch of packs, and condemning the packs.

use super::super::customer::{Begun, Customer};
use super::super::lifetime::Lifetime;
use super::super::mark::{Found, Ground, Mark};
use super::super::reader::{ReadScratch, Reader};
use super::super::rule::{Rule, stands};
use super::super::writer::{Session, Trust, Uploaded, Worker};
use super::super::{RepositoryError, RepositoryErrorKind};
use super::{Directory, PackDecision, Pass, directory, entries_in_index};
use crate::format::entry::{Body, CondemnBody, Purpose};
use crate::format::pack::{self, DirectoryEntry, MAX_PACK_BYTES};
use crate::model::{PackName, Tag};
use jiff::Timestamp;
use std::collections::{BTreeSet, HashSet};

/// How often a plan is checked anew because the ledger went on.
const SLOT_ATTEMPTS: usize = 64;

/// A pack of the batch, and every frame it holds.
struct Doomed {
    name: PackName,
    entries: Vec<DirectoryEntry>,
    live: HashSet<Tag>,
}

/// What became of the batch's live frames.
#[derive(Default)]
struct Survivors {
    /// Opened in this pass, and in the session's own packs.
    kept: HashSet<Tag>,
    /// Did not open, in this pack.
    damaged: BTreeSet<(PackName, Tag)>,
    /// Did not open there nor anywhere else.
    lost: BTreeSet<(PackName, Tag)>,
}

impl Pass<'_> {
    /// Writes the survivors of `batch` in a session and condemns the packs. `false`: nothing was
    /// condemned, because what the plan stood on changed or because of damage.
    pub(super) fn condemn(
        &mut self,
        mark: Mark,
        batch: &[PackDecision],
    ) -> Result<bool, RepositoryError> {
        let doomed = self.look_into(&mark, batch)?;
        if doomed.is_empty() {
            return Ok(false);
        }
        let begun = self.customer.begin(Purpose::Reclaim, None)?;
        match self.write_and_condemn(mark, &begun, &doomed) {
            Ok(true) => Ok(true),
            Ok(false) => {
                match self
                    .customer
                    .abort(&begun.id, "what the plan stood on has changed")
                {
                    // Somebody took this session for dead; then its objects are theirs to remove.
                    Err(error) if error.kind == RepositoryErrorKind::Superseded => Ok(false),
                    other => other.map(|()| false),
                }
            }
            Err(error) if error.kind == RepositoryErrorKind::Uncertain => Err(error),
            Err(error) => {
                // The session's own failure is what the caller must hear of.
                let _aborted = self.customer.abort(&begun.id, "the reclaim failed");
                Err(error)
            }
        }
    }

    /// Judges each pack by its own directory: the index may know less than a pack holds.
    fn look_into(
        &mut self,
        mark: &Mark,
        batch: &[PackDecision],
    ) -> Result<Vec<Doomed>, RepositoryError> {
        let mut read = Vec::new();
        for decision in batch {
            read.push((decision, directory(self.customer, &decision.facts.name)?));
        }
        let unlisted = read
            .iter()
            .filter(|(_, directory)| !matches!(directory, Directory::Entries(_)));
        let unlisted: Vec<PackName> = unlisted.map(|(decision, _)| decision.facts.name).collect();
        let mut in_index = entries_in_index(mark, &unlisted)?;
        let mut doomed = Vec::new();
        for (decision, directory) in read {
            let name = decision.facts.name;
            let known = in_index.remove(&name).unwrap_or_default();
            let gone = matches!(directory, Directory::Gone);
            let entries = match directory {
                Directory::Entries(entries) => entries,
                Directory::Gone => known,
                // Nothing of such a pack may be called dead, unless the index knows all of it.
                Directory::Damaged => {
                    let all = mark
                        .index()
                        .pack(decision.facts.number)
                        .is_some_and(|info| info.row.frames as usize == known.len());
                    if !all && !self.force {
                        self.stuck.insert(name);
                        continue;
                    }
                    known
                }
            };
            let live = mark.live_among(&entries)?;
            // Something live should be in it: it may come back (a folder that is not mounted, a
            // lagging replica), and what is condemned does not come back.
            if gone && !self.force && !live.is_empty() {
                let frames: Vec<(PackName, Tag)> = live.iter().map(|tag| (name, *tag)).collect();
                self.note_damage(&frames)?;
                self.stuck.insert(name);
                continue;
            }
            doomed.push(Doomed {
                name,
                entries,
                live,
            });
        }
        Ok(doomed)
    }

    fn write_and_condemn(
        &mut self,
        mark: Mark,
        begun: &Begun,
        doomed: &[Doomed],
    ) -> Result<bool, RepositoryError> {
        let session = self.customer.session(begun, Trust::Nothing)?;
        let survivors = write_survivors(self.customer, &mark, &session, doomed, self.now)?;
        let damaged: Vec<(PackName, Tag)> = survivors.damaged.iter().copied().collect();
        if !damaged.is_empty() {
            self.note_damage(&damaged)?;
        }
        if self.force {
            // Read, and opened nowhere: nothing readable is lost with it.
            self.given_up.extend(&survivors.lost);
        }
        let left = |doomed: &&Doomed| {
            doomed.live.iter().all(|tag| {
                survivors.kept.contains(tag) || self.given_up.contains(&(doomed.name, *tag))
            })
        };
        let packs: BTreeSet<PackName> = doomed
            .iter()
            .filter(left)
            .map(|doomed| doomed.name)
            .collect();
        // A pack with a live frame that did not open stays where it is: it may be all there is.
        let stay = doomed.iter().map(|doomed| doomed.name);
        self.stuck.extend(stay.filter(|name| !packs.contains(name)));
        if packs.is_empty() {
            return Ok(false);
        }
        let uploaded = session.finish()?;
        let rescued = packs
            .iter()
            .filter(|pack| self.result.withheld.contains(pack));
        let plan = Plan {
            begun,
            doomed,
            kept: &survivors.kept,
            given_up: &self.given_up,
            rescued: &rescued.copied().collect(),
            uploaded: &uploaded,
        };
        match plan.append(self.customer, packs, mark.damage.is_empty())? {
            Some(condemned) => {
                self.own.extend(condemned);
                self.result.rewritten_bytes += uploaded.stored_bytes;
                Ok(true)
            }
            None => Ok(false),
        }
    }
}

/// Copies every live frame of the batch that opens into the session, pack by pack in the order of
/// the batch, so that cold stays with cold and one old pack at a time is in memory; into new packs
/// by lifetime.
fn write_survivors(
    customer: &Customer,
    mark: &Mark,
    session: &Session<'_>,
    doomed: &[Doomed],
    now: Timestamp,
) -> Result<Survivors, RepositoryError> {
    let mut survivors = Survivors::default();
    let live = doomed.iter().flat_map(|doomed| &doomed.live);
    let wanted: HashSet<Tag> = live.copied().collect();
    if wanted.is_empty() {
        return Ok(survivors);
    }
    // A second walk finds the ids of the survivors: a frame is copied only after it opened.
    let mut ids = Mark::collecting(mark.index().clone(), wanted.clone());
    ids.extend(customer)?;
    let newest = customer.with_state(|state| state.roots().map(|(_, root)| root.expires_at).max());
    let newest = newest.unwrap_or(now);
    let reader = Reader::with_index(customer, mark.index().clone());
    let mut scratch = ReadScratch::new()?;
    let mut worker = session.worker()?;
    for pack in doomed {
        let live = |entry: &&DirectoryEntry| wanted.contains(&entry.tag);
        if pack.entries.iter().any(|entry| live(&entry)) {
            let bytes = read_pack(customer, &pack.name)?;
            for entry in pack.entries.iter().filter(live) {
                if !survivors.kept.contains(&entry.tag) {
                    let bytes = bytes.as_deref().unwrap_or_default();
                    let ids = &ids;
                    let frame = LiveFrame {
                        pack,
                        entry,
                        bytes,
                        ids,
                        newest,
                        now,
                    };
                    frame.keep(&reader, session, &mut worker, &mut scratch, &mut survivors)?;
                }
            }
        }
    }
    session.retire(worker);
    Ok(survivors)
}

/// The bytes of a pack; `None` if it is missing or damaged as an object.
fn read_pack(customer: &Customer, name: &PackName) -> Result<Option<Vec<u8>>, RepositoryError> {
    let object = customer.names().pack(name);
    match customer.storage().read(&object, MAX_PACK_BYTES) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) => match RepositoryError::from(error) {
            error if error.is_damage() => Ok(None),
            error => Err(error),
        },
    }
}

struct LiveFrame<'a> {
    pack: &'a Doomed,
    entry: &'a DirectoryEntry,
    bytes: &'a [u8],
    ids: &'a Mark,
    /// When the last point of all expires.
    newest: Timestamp,
    now: Timestamp,
}

impl LiveFrame<'_> {
    fn keep(
        &self,
        reader: &Reader<'_>,
        session: &Session<'_>,
        worker: &mut Worker,
        scratch: &mut ReadScratch,
        survivors: &mut Survivors,
    ) -> Result<(), RepositoryError> {
        let (name, tag) = (self.pack.name, self.entry.tag);
        // Its last root was erased meanwhile: the next mark knows it as dead.
        let Some(found) = self.ids.found(&tag) else {
            return Ok(());
        };
        let Found { kind, id, .. } = found;
        let lifetime = Lifetime::of(found.held_until, self.newest, self.now);
        let frame = pack::frame_bytes(self.bytes, self.entry).unwrap_or_default();
        let opened = reader.open_frame(&name, frame, kind, &id, &tag, scratch);
        if let (Ok(()), Ok(frame)) = (opened, pack::parse_frame(frame)) {
            session.copy_frame(worker, &frame, id, lifetime)?;
            survivors.kept.insert(tag);
            return Ok(());
        }
        survivors.damaged.insert((name, tag));
        match reader.open(kind, &id, scratch) {
            // Another copy is sound: its content survives in a frame of its own.
            Ok(()) => {
                session.put(worker, kind, &scratch.plain)?;
                survivors.kept.insert(tag);
                Ok(())
            }
            Err(error) if error.is_damage() => {
                survivors.lost.insert((name, tag));
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

/// A condemnation whose survivors are written.
struct Plan<'a> {
    begun: &'a Begun,
    doomed: &'a [Doomed],
    kept: &'a HashSet<Tag>,
    given_up: &'a BTreeSet<(PackName, Tag)>,
    /// Condemned before; to be condemned again, with survivors this time.
    rescued: &'a BTreeSet<PackName>,
    uploaded: &'a Uploaded,
}

impl Plan<'_> {
    /// Takes a slot for the condemnation, and says what it condemned. If the ledger grew by new
    /// roots, all is marked again, and each pack must still have all its live tags among the
    /// survivors; `None` if none has.
    fn append(
        &self,
        customer: &Customer,
        mut packs: BTreeSet<PackName>,
        marked_whole: bool,
    ) -> Result<Option<BTreeSet<PackName>>, RepositoryError> {
        // What the plan was checked against; the entry may only follow exactly this.
        let mut checked: Option<Ground> = None;
        for _ in 0..SLOT_ATTEMPTS {
            let attempt = customer.append(|state| {
                if stands(Rule::OpenSession) && !state.open.contains_key(&self.begun.id) {
                    return Err(RepositoryError::new(
                        RepositoryErrorKind::Superseded,
                        self.begun.id,
                        "the reclaim's session was aborted",
                    ));
                }
                if stands(Rule::PlanAgain) && checked.as_ref() != Some(&Ground::of(state)) {
                    return Err(RepositoryError::new(
                        RepositoryErrorKind::AlreadyExists,
                        self.begun.id,
                        "the ledger went on",
                    ));
                }
                Ok(Body::Condemn(CondemnBody {
                    session: self.begun.id,
                    packs: packs.iter().copied().collect(),
                    segments: self.uploaded.segments.clone(),
                }))
            });
            match attempt {
                Ok(_) => return Ok(Some(packs)),
                Err(error) if error.kind == RepositoryErrorKind::AlreadyExists => {}
                Err(error) if error.kind == RepositoryErrorKind::Superseded => return Ok(None),
                Err(error) => return Err(error),
            }
            // New roots may reach what was dead, and may rest on packs born meanwhile.
            let mark = Mark::at_end(customer)?;
            if !mark.damage.is_empty() && marked_whole {
                return Ok(None);
            }
            let ground = customer
                .with_state(|state| (state.seq == mark.index().seq()).then(|| Ground::of(state)));
            let mut stand = BTreeSet::new();
            for pack in packs {
                let condemned = mark
                    .index()
                    .number_of(&pack)
                    .and_then(|number| mark.index().pack(number))
                    .is_none_or(|info| info.condemned);
                if (!condemned || self.rescued.contains(&pack)) && self.is_covered(&mark, &pack)? {
                    stand.insert(pack);
                }
            }
            packs = stand;
            if packs.is_empty() {
                return Ok(None);
            }
            checked = ground;
        }
        Ok(None)
    }

    fn is_covered(&self, mark: &Mark, pack: &PackName) -> Result<bool, RepositoryError> {
        let Some(doomed) = self.doomed.iter().find(|doomed| doomed.name == *pack) else {
            return Ok(false);
        };
        let live = mark.live_among(&doomed.entries)?;
        Ok(live
            .iter()
            .all(|tag| self.kept.contains(tag) || self.given_up.contains(&(*pack, *tag))))
    }
}
