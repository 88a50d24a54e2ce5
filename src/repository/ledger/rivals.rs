//! The ledger of a repository that one host writes, in a store that overwrites what is there: several
//! entries with one number, of which one counts. See section 14.1 of the format.

use super::{Ledger, READINGS, entry_hash};
use crate::codec::verify_signature;
use crate::format::entry::{Body, Entry, MAX_ENTRY_BYTES, SealBody};
use crate::format::names::{CustomerNames, ObjectRole};
use crate::model::{CustomerUid, EntryHash, Writers};
use crate::repository::rule::{Rule, stands};
use crate::repository::{Head, Host, HostMemory, RepositoryError, RepositoryErrorKind, Turn};
use crate::storage::Listed;
use std::collections::{BTreeMap, BTreeSet};

/// More entries with one number are not believed: each took a process that died.
const MOST_RIVALS: usize = 1024;

/// The entries of each number, as a listing shows them.
pub(super) type Slots = BTreeMap<u64, BTreeSet<EntryHash>>;

/// What a ledger that one host writes needs besides its state.
#[derive(Default)]
pub(super) struct Alone {
    /// What the first listing showed.
    pub(super) listed: Slots,
    /// The entries that were read, and thought to count.
    pub(super) trail: BTreeMap<u64, EntryHash>,
    /// The last entry that this process wrote on a seal, or on one of its own that stood so: it counts,
    /// and so does all before it, whatever lands.
    acknowledged: Option<Head>,
    /// How often it was read anew.
    readings: u64,
}

pub(super) fn slots_of(names: &CustomerNames, listed: &[Listed]) -> Slots {
    let mut slots = Slots::new();
    for object in listed {
        if let ObjectRole::Rival(seq, hash) = names.role(&object.name) {
            slots.entry(seq).or_default().insert(hash);
        }
    }
    slots
}

/// How the entries that are listed are named; `names` decides where there are none.
pub(super) fn named_as_listed(names: CustomerNames, listed: &[Listed]) -> CustomerNames {
    let first = listed
        .iter()
        .find_map(|object| match names.role(&object.name) {
            ObjectRole::Ledger(1) => Some(Writers::Many),
            ObjectRole::Rival(1, _) => Some(Writers::One),
            _ => None,
        });
    match first {
        Some(writers) => names.written_by(writers),
        None => names,
    }
}

impl Ledger {
    /// The next entry; `None` at the end.
    pub(super) fn next_of_rivals(&self) -> Result<Option<(Entry, EntryHash)>, RepositoryError> {
        let seq = self.state.seq + 1;
        let mut following = Vec::new();
        let mut strange = None;
        for hash in self.rivals(seq)? {
            match self.rival(seq, &hash) {
                Ok(entry) if entry.prev == self.last_hash() => following.push((entry, hash)),
                Ok(_) => {
                    let name = self.names.rival(seq, &hash);
                    let what = "does not follow the entry before it: the chain is broken";
                    strange = Some(RepositoryError::damaged(name, what));
                }
                Err(error) if is_strange(&error) => strange = Some(error),
                Err(error) => return Err(error),
            }
        }
        if following.len() > 1 {
            following = vec![self.longest(seq, following)?];
        }
        match (following.into_iter().next(), strange) {
            (Some(next), _) => Ok(Some(next)),
            (None, Some(error)) => Err(error),
            (None, None) => Ok(None),
        }
    }

    /// Of several entries the one on which the longest chain stands; of equally long ones, the first by
    /// name.
    ///
    /// Why the longest: whoever writes has read all that had landed, and what dead processes have left
    /// under way is at most one longer than the longest of that. A seal and an entry on it are two longer.
    fn longest(
        &self,
        seq: u64,
        rivals: Vec<(Entry, EntryHash)>,
    ) -> Result<(Entry, EntryHash), RepositoryError> {
        // The end of each chain, and with which rival it begins.
        let mut ends: BTreeMap<EntryHash, usize> = (0..)
            .zip(&rivals)
            .map(|(n, (_, hash))| (*hash, n))
            .collect();
        let mut at = seq;
        let chosen = loop {
            let first = ends.values().copied().min().unwrap_or(0);
            if ends.values().all(|begun| *begun == first) {
                break first;
            }
            at += 1;
            let mut longer = BTreeMap::new();
            for hash in self.rivals(at)? {
                match self.rival(at, &hash) {
                    Ok(entry) => {
                        if let Some(begun) = ends.get(&entry.prev) {
                            longer.insert(hash, *begun);
                        }
                    }
                    Err(error) if is_strange(&error) => {}
                    Err(error) => return Err(error),
                }
            }
            if longer.is_empty() {
                break first;
            }
            ends = longer;
        };
        let chosen = rivals.into_iter().nth(chosen);
        chosen.ok_or_else(|| RepositoryError::damaged(self.names.slot(seq), "is empty"))
    }

    fn two_hosts(&self, seq: u64) -> RepositoryError {
        RepositoryError::damaged(
            self.names.slot(seq),
            "two hosts have written this ledger, which is for one: what this one wrote here does not count",
        )
    }

    /// The names of a slot: as first listed where that shows the next slot too, for then it is over.
    fn rivals(&self, seq: u64) -> Result<BTreeSet<EntryHash>, RepositoryError> {
        if self.alone.listed.contains_key(&(seq + 1))
            && let Some(rivals) = self.alone.listed.get(&seq)
        {
            return Ok(rivals.clone());
        }
        let slot = self.names.slot(seq);
        let listed = self.storage.list(&slot)?;
        let rivals = slots_of(&self.names, &listed).remove(&seq);
        let rivals = rivals.unwrap_or_default();
        match rivals.len() > MOST_RIVALS {
            true => Err(RepositoryError::damaged(slot, "holds too many entries")),
            false => Ok(rivals),
        }
    }

    /// An entry by itself: sound, and what its name says.
    fn rival(&self, seq: u64, hash: &EntryHash) -> Result<Entry, RepositoryError> {
        let name = self.names.rival(seq, hash);
        let stored = self.storage.read(&name, MAX_ENTRY_BYTES)?;
        if entry_hash(&stored) != *hash {
            let what = "the bytes are not those that its name says";
            return Err(RepositoryError::damaged(name, what));
        }
        let entry = Entry::open(&stored, |host, message, signature| {
            verify_signature(host, message, signature)
        })
        .map_err(|error| self.not_opened(&name, &stored, error))?;
        self.check_place(&name, seq, &entry)?;
        Ok(entry)
    }

    /// Reads again from genesis, with another listing. What this host was told that it stands must be in it.
    pub(super) fn read_anew(&mut self, memory: &dyn HostMemory) -> Result<(), RepositoryError> {
        let mut read = Err(self.two_hosts(self.state.seq));
        for _ in 0..READINGS {
            let listed = self.storage.list(&self.names.ledger_prefix())?;
            let mut again = Ledger::empty(self.storage.clone(), self.names.clone());
            again.alone.listed = slots_of(&self.names, &listed);
            again.alone.acknowledged = self.alone.acknowledged;
            again.alone.readings = self.alone.readings + 1;
            read = again.read_on(None, |_, _| {});
            match &read {
                Ok(()) => {
                    let remembered = self.state.uid.and_then(|uid| memory.head(&uid));
                    for head in [self.alone.acknowledged, remembered].into_iter().flatten() {
                        if again.alone.trail.get(&head.seq) != Some(&head.hash) {
                            return Err(self.two_hosts(head.seq));
                        }
                    }
                    *self = again;
                    break;
                }
                Err(error) if error.is_damage() => {}
                Err(_) => break,
            }
        }
        read
    }

    /// Whether an entry that this host once saw to count is among those that do.
    pub(super) fn check_alone(&self, head: &Head) -> Result<(), RepositoryError> {
        match self.alone.trail.get(&head.seq) {
            Some(hash) if *hash != head.hash => Err(self.two_hosts(head.seq)),
            // Read, or before what a checkpoint of entries that count was believed for.
            _ => Ok(()),
        }
    }

    /// Whether the entries up to this one count whatever lands. Deleting needs it.
    pub(super) fn is_settled_at(&self, seq: u64) -> bool {
        let settled = self.alone.acknowledged;
        self.names.writers() == Writers::Many || settled.is_some_and(|head| seq <= head.seq)
    }

    pub(in crate::repository) fn readings(&self) -> u64 {
        self.alone.readings
    }

    /// Sees to it that the end counts.
    pub(in crate::repository) fn settle(
        &mut self,
        host: &dyn Host,
        uid: CustomerUid,
    ) -> Result<(), RepositoryError> {
        if self.is_settled_at(self.state.seq) {
            return Ok(());
        }
        let mut turn = host.take_turn(self.names.prefix())?;
        self.refresh(host)?;
        if self.is_settled_at(self.state.seq) {
            return Ok(());
        }
        let installation = turn.installation();
        let body = Body::Seal(SealBody { installation });
        self.write_in(&mut *turn, host, uid, |ledger| {
            ledger.append_next(host, uid, true, &mut |_, _| Ok(body.clone()))
        })?;
        Ok(())
    }

    /// Waits for the turn and writes in it.
    pub(super) fn in_turn(
        &mut self,
        host: &dyn Host,
        uid: CustomerUid,
        write: impl FnOnce(&mut Self) -> Result<u64, RepositoryError>,
    ) -> Result<u64, RepositoryError> {
        let mut turn = host.take_turn(self.names.prefix())?;
        self.refresh(host)?;
        self.write_in(&mut *turn, host, uid, write)
    }

    /// Writes in a turn, after the ledger was read to its end in it. Unless this process goes on from an
    /// entry of its own, a seal comes first: what others left under way can only be for its slot, so that
    /// with the entry on it the chain is longer than any that can still come to be. A crash between the
    /// two leaves a seal more.
    fn write_in(
        &mut self,
        turn: &mut dyn Turn,
        host: &dyn Host,
        uid: CustomerUid,
        write: impl FnOnce(&mut Self) -> Result<u64, RepositoryError>,
    ) -> Result<u64, RepositoryError> {
        self.may_write()?;
        let installation = turn.installation();
        let known = self.state.installation;
        if known.is_some_and(|known| known != installation) && !turn.takes_over() {
            return Err(RepositoryError::new(
                RepositoryErrorKind::Refused,
                self.names.ledger_prefix(),
                "another installation of this host wrote here last, and this repository is for one: \
                 if the other is gone for good, say so with vmkeep init --take-over",
            ));
        }
        let goes_on = turn.goes_on() && self.is_settled_at(self.state.seq);
        let is_genesis = self.state.seq == 0;
        turn.begin()?;
        let written = match goes_on || is_genesis || !stands(Rule::SealFirst) {
            true => write(self),
            false => {
                self.alone.acknowledged = None;
                let body = Body::Seal(SealBody { installation });
                self.append_next(host, uid, true, &mut |_, _| Ok(body.clone()))
                    .and_then(|_| write(self))
            }
        };
        match &written {
            // A genesis stands on nothing.
            Ok(_) if is_genesis => {}
            Ok(seq) => {
                let hash = self.last_hash();
                self.alone.acknowledged = Some(Head { seq: *seq, hash });
                self.remember(host);
            }
            Err(error) if error.kind == RepositoryErrorKind::Uncertain => {
                self.alone.acknowledged = None;
                turn.leave_open();
            }
            // Whoever went on from an entry of its own and was refused has sent nothing.
            Err(_) if goes_on => {}
            Err(_) => turn.leave_open(),
        }
        written
    }

    /// A store that does not list what it holds would hide entries from the next turn.
    pub(super) fn check_listed(&self, seq: u64, hash: &EntryHash) -> Result<(), RepositoryError> {
        if self.names.writers() == Writers::Many {
            return Ok(());
        }
        // It stands: nothing that goes wrong from here on may be taken for its failure.
        let detail = match self.rivals(seq) {
            Ok(rivals) if rivals.contains(hash) => return Ok(()),
            Ok(_) => "the store holds this entry and does not list it: it is no store to rely on"
                .to_string(),
            Err(error) => format!("it is not known whether the store lists this entry ({error})"),
        };
        let name = self.names.rival(seq, hash);
        Err(RepositoryError::new(
            RepositoryErrorKind::Uncertain,
            name,
            detail,
        ))
    }
}

/// What is there and is no entry that this version can read; a sound one beside it counts.
fn is_strange(error: &RepositoryError) -> bool {
    error.is_damage() || error.kind == RepositoryErrorKind::Newer
}
