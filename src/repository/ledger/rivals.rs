//! The ledger of a repository that one host writes, in a store that overwrites what is there: several
//! entries with one number, of which one counts. See section 14.1 of the format.

use super::{Ledger, entry_hash};
use crate::codec::verify_signature;
use crate::format::entry::{Body, Entry, MAX_ENTRY_BYTES, SealBody};
use crate::format::names::{CustomerNames, ObjectRole};
use crate::model::{CustomerUid, EntryHash, Writers};
use crate::repository::rule::{Rule, stands};
use crate::repository::{Host, RepositoryError, RepositoryErrorKind, Turn};
use crate::storage::Listed;
use std::collections::{BTreeMap, BTreeSet};

/// More entries with one number are not believed: each took a process that died.
const MOST_RIVALS: usize = 64;

/// The entries of each number, as a listing shows them.
pub(super) type Slots = BTreeMap<u64, BTreeSet<EntryHash>>;

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
                Err(error) if error.is_damage() => strange = Some(error),
                Err(error) => return Err(error),
            }
        }
        if following.len() > 1 {
            following = self.followed(seq, following)?;
        }
        match (following.into_iter().next(), strange) {
            (Some(next), _) => Ok(Some(next)),
            (None, Some(error)) => Err(error),
            (None, None) => Ok(None),
        }
    }

    /// Of several with one number those that count: the one that another entry follows; if none is
    /// followed, all.
    fn followed(
        &self,
        seq: u64,
        rivals: Vec<(Entry, EntryHash)>,
    ) -> Result<Vec<(Entry, EntryHash)>, RepositoryError> {
        let mut followed = BTreeSet::new();
        for hash in self.rivals(seq + 1)? {
            match self.rival(seq + 1, &hash) {
                Ok(entry) => drop(followed.insert(entry.prev)),
                Err(error) if error.is_damage() => {}
                Err(error) => return Err(error),
            }
        }
        let counts = |hash: &EntryHash| followed.contains(hash);
        match rivals.iter().filter(|(_, hash)| counts(hash)).count() {
            0 => Ok(rivals),
            1 => Ok(rivals
                .into_iter()
                .filter(|(_, hash)| counts(hash))
                .collect()),
            _ => Err(self.forked(seq)),
        }
    }

    fn forked(&self, seq: u64) -> RepositoryError {
        RepositoryError::damaged(
            self.names.slot(seq),
            "two hosts have written this ledger, which is for one: each has gone on from here",
        )
    }

    /// The names of a slot: as first listed where that shows the next slot too, for then it is over.
    fn rivals(&self, seq: u64) -> Result<BTreeSet<EntryHash>, RepositoryError> {
        if self.listed.contains_key(&(seq + 1))
            && let Some(rivals) = self.listed.get(&seq)
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

    /// The first half of what makes a turn safe whose forerunner may have left something under way:
    /// that can only be an entry for the slot which this one takes. The entry that is then written on
    /// it is the other half. Returns the number of the seal.
    ///
    /// A crash after it leaves the turn unclean, so the next one seals again.
    pub(super) fn seal(
        &mut self,
        host: &dyn Host,
        uid: CustomerUid,
        turn: &dyn Turn,
    ) -> Result<Option<u64>, RepositoryError> {
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
        let is_safe = turn.is_clean() && known == Some(installation);
        if self.state.seq == 0 || is_safe || !stands(Rule::SealFirst) {
            return Ok(None);
        }
        let body = Body::Seal(SealBody { installation });
        self.append_next(host, uid, true, &mut |_, _| Ok(body.clone()))
            .map(Some)
    }

    /// Whether the entry on a seal is the only one there: another host would have its own.
    pub(super) fn check_alone(&self, seal: u64) -> Result<(), RepositoryError> {
        match self.rivals(seal + 1)?.len() {
            1 => Ok(()),
            _ => Err(self.forked(seal)),
        }
    }
}
