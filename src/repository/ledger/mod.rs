//! The ledger of one customer: reading it to its end, and taking the next slot.

mod ahead;
mod audit;
mod checkpoint;
#[cfg(any(test, fuzzing))]
pub(super) mod hostile_bytes;
mod rivals;
#[cfg(test)]
mod rules;
mod state;

pub use audit::Hidden;
pub use state::{Condemned, OpenSession, Point, State, Verified};

use super::rule::{Rule, stands};
use super::{
    Belief, BelievedSince, Head, Host, HostMemory, RepositoryError, RepositoryErrorKind, Stamp,
    Vouched,
};
use crate::codec::verify_signature;
use crate::format::entry::{Body, Entry, MAX_ENTRY_BYTES, entry_hash, follows};
use crate::format::names::{CustomerNames, ObjectRole};
use crate::format::wire::FormatError;
use crate::model::{CustomerUid, EntryHash, ObjectName, Writers};
use crate::storage::{Listed, Storage, StorageError, StorageErrorKind};
use ahead::Ahead;
use rivals::{Alone, named_as_listed, slots_of};
use std::collections::BTreeSet;
use std::sync::Arc;

/// A checkpoint of a young ledger is made again after so many entries. Until then each opening reads them
/// one by one, which in a bucket is a request each.
const CHECKPOINT_ENTRIES: u64 = match cfg!(test) {
    true => 10,
    false => 20,
};

/// A checkpoint holds the whole state, which grows with the ledger: one entry more for so many that there
/// are, or a night of a large customer would write it again and again.
const ENTRIES_PER_MORE: u64 = 128;

/// And at most so many, however long the ledger is.
const MOST_CHECKPOINT_ENTRIES: u64 = 200;

fn is_checkpoint_due(kept: u64, seq: u64) -> bool {
    let entries = CHECKPOINT_ENTRIES + seq / ENTRIES_PER_MORE;
    seq.saturating_sub(kept) >= entries.min(MOST_CHECKPOINT_ENTRIES)
}

/// What the first entry says of the one before it.
const BEFORE_THE_FIRST: EntryHash = EntryHash::from_bytes([0; 32]);

/// How often an uncertain creation is repeated before the caller is told that it is uncertain.
const FILL_ATTEMPTS: u32 = 8;

/// How often a ledger that one host writes is read before it is damaged.
const READINGS: u32 = 4;

/// A ledger read up to some entry.
pub struct Ledger {
    storage: Arc<dyn Storage>,
    names: CustomerNames,
    /// Shared with whoever decides by it: the next entry makes another one if it still is.
    state: Arc<State>,
    /// A checkpoint was believed instead of reading.
    believed: Option<BelievedSince>,
    /// The entry after which a checkpoint was last kept.
    kept: u64,
    /// Entries that were listed and read before their turn.
    ahead: Ahead,
    /// Where one host writes.
    alone: Alone,
    /// An entry that cannot be read: the state up to a later one is what this host once made of them.
    broken: Option<RepositoryError>,
    /// The hash of the first entry.
    first: Option<EntryHash>,
    /// This host remembers it.
    is_first_remembered: bool,
    /// Nothing is read of it, and nothing written.
    is_set_aside: bool,
}

impl Ledger {
    /// Reads a ledger from genesis, or from where this host's checkpoint ends, to its end, and checks
    /// chain, signatures and the end that this host saw last. `None`: there is no genesis.
    pub fn load(
        storage: Arc<dyn Storage>,
        names: CustomerNames,
        memory: &dyn HostMemory,
    ) -> Result<Option<Self>, RepositoryError> {
        let mut checkpoint = true;
        for _ in 1..READINGS {
            match Ledger::load_once(storage.clone(), names.clone(), memory, checkpoint) {
                // Where one host writes, the end can turn out to be a rival that lost while it is read.
                Err((error, Writers::One)) if error.is_damage() => checkpoint = false,
                loaded => return loaded.map_err(|(error, _)| error),
            }
        }
        Ledger::load_once(storage, names, memory, checkpoint).map_err(|(error, _)| error)
    }

    /// With the error: who writes this ledger.
    fn load_once(
        storage: Arc<dyn Storage>,
        names: CustomerNames,
        memory: &dyn HostMemory,
        checkpoint: bool,
    ) -> Result<Option<Self>, (RepositoryError, Writers)> {
        let unlisted = |error: StorageError| (error.into(), Writers::Many);
        // Listed before it is read: what is listed and lies beyond the end that is then read
        // proves a gap.
        let listed = storage.list(&names.ledger_prefix()).map_err(unlisted)?;
        let mut ledger = Ledger::empty(storage, named_as_listed(names, &listed));
        ledger.alone.listed = slots_of(&ledger.names, &listed);
        let writers = ledger.names.writers();
        match ledger.read_listed(&listed, memory, checkpoint) {
            Ok(true) => Ok(Some(ledger)),
            Ok(false) => Ok(None),
            Err(error) => Err((error, writers)),
        }
    }

    /// `false`: there is no genesis.
    fn read_listed(
        &mut self,
        listed: &[Listed],
        memory: &dyn HostMemory,
        checkpoint: bool,
    ) -> Result<bool, RepositoryError> {
        let ledger = self;
        ledger.ahead.listed = listed
            .iter()
            .filter_map(|object| ledger.number(object))
            .max()
            .unwrap_or(0);
        // What this host has seen is asked before the rest is read: other processes of it go on
        // meanwhile, and what they see later is no proof against an end that was read earlier.
        ledger.read_on(Some(1), |_, _| {})?;
        ledger.check_origin(memory)?;
        let head = ledger.state.uid.and_then(|uid| memory.head(&uid));
        if checkpoint && let Some((state, since)) = ledger.checkpoint(memory, listed) {
            ledger.believe(state, since);
        }
        let read = ledger.read_on(None, |_, _| {});
        let has_genesis = match read.and_then(|()| ledger.has_no_gap(listed)) {
            Err(error) if checkpoint && error.is_of_one_object() => {
                ledger.read_past(error, memory)?;
                ledger.has_no_gap(listed)?
            }
            read => read?,
        };
        if !has_genesis {
            return Ok(false);
        }
        if let Some(head) = head {
            ledger.check_head(&head)?;
        }
        ledger.remember(memory);
        Ok(true)
    }

    fn believe(&mut self, state: State, since: BelievedSince) {
        (self.believed, self.kept) = (Some(since), state.seq);
        self.alone.trail.clear();
        self.state = Arc::new(state);
    }

    /// Goes on behind an entry that is damaged or gone, from what this very program once made of it and all
    /// before: the next entry names the hash of the last that was read then, and so vouches for each of
    /// them. Otherwise one bad byte would keep a customer from every restore point.
    fn read_past(
        &mut self,
        damage: RepositoryError,
        memory: &dyn HostMemory,
    ) -> Result<(), RepositoryError> {
        let kept = self.state.uid.and_then(|uid| memory.checkpoint(&uid));
        let state = kept.and_then(|kept| Some((self.checkpoint_of(&kept.content)?, kept.since)));
        match state.filter(|(state, _)| state.seq > self.state.seq) {
            Some((state, since)) if self.names.writers() == Writers::Many => {
                self.believe(state, since);
                self.broken = Some(damage);
                self.read_on(None, |_, _| {})
            }
            _ => Err(damage),
        }
    }

    /// Where the first entry stands, and its hash.
    pub(super) fn first_entry(&self) -> Option<(ObjectName, EntryHash)> {
        self.first.map(|hash| (self.name_of(1, &hash), hash))
    }

    /// The entry that cannot be read and was read past.
    pub fn broken(&self) -> Option<&RepositoryError> {
        self.broken.as_ref()
    }

    /// That what was listed before reading does not go on beyond the end that was read. `false`: there is no
    /// genesis, nor anything else.
    fn has_no_gap(&self, listed: &[Listed]) -> Result<bool, RepositoryError> {
        if self.state.uid.is_none() {
            return match listed.first() {
                Some(entry) => Err(RepositoryError::damaged(
                    &entry.name,
                    "the ledger has entries, but its first one is missing",
                )),
                None => Ok(false),
            };
        }
        // Only what has the name of an entry can prove a gap; a stray file must not lock a
        // customer out of everything.
        let beyond = listed
            .iter()
            .find(|object| self.number(object).is_some_and(|seq| seq > self.state.seq));
        match beyond {
            Some(object) => Err(RepositoryError::damaged(
                &object.name,
                format!(
                    "the ledger has a gap: entry {} is missing, but this object exists",
                    self.state.seq + 1
                ),
            )),
            None => Ok(true),
        }
    }

    /// A ledger without genesis, to write one.
    pub(super) fn empty(storage: Arc<dyn Storage>, names: CustomerNames) -> Self {
        Ledger {
            storage,
            names,
            state: Arc::default(),
            believed: None,
            kept: 0,
            ahead: Ahead::default(),
            alone: Alone::default(),
            broken: None,
            first: None,
            is_first_remembered: false,
            is_set_aside: false,
        }
    }

    /// One that is not asked: what it would say is `state`, to which nobody adds.
    pub(super) fn set_aside(storage: Arc<dyn Storage>, names: CustomerNames, state: State) -> Self {
        Ledger {
            state: Arc::new(state),
            is_set_aside: true,
            ..Ledger::empty(storage, names)
        }
    }

    /// This host's checkpoint of this ledger, if the store still has every entry up to it (as far
    /// as a list tells, or byte for byte where it is older) and the last of them with the bytes it was made of.
    fn checkpoint(
        &mut self,
        memory: &dyn HostMemory,
        listed: &[Listed],
    ) -> Option<(State, BelievedSince)> {
        let uid = self.state.uid?;
        let kept = memory.checkpoint(&uid)?;
        if kept.belief == Belief::ForWantOfBetter {
            return None;
        }
        let state = self.checkpoint_of(&kept.content)?;
        let there: BTreeSet<u64> = listed
            .iter()
            .filter_map(|object| self.number(object))
            .filter(|seq| (1..=state.seq).contains(seq))
            .collect();
        if there.len() as u64 != state.seq {
            return None;
        }
        if kept.belief == Belief::IfReadAgain {
            if !self.has_still(&state) {
                return None;
            }
            memory.keep_checkpoint(&uid, &kept.content, Vouched::ReadAgain(kept.since));
        }
        Some((state, kept.since))
    }

    /// Whether the store still has, byte for byte, the entries that a state was made of: it knows the hash of the
    /// last, and each knows that of the one before. They need not be opened anew for it.
    fn has_still(&mut self, state: &State) -> bool {
        // Where one host writes, the names are not known before what stands under them.
        if self.names.writers() == Writers::One {
            return false;
        }
        let mut before = BEFORE_THE_FIRST;
        for seq in 1..=state.seq {
            self.read_ahead(seq);
            let stored = match self.ahead.entries.remove(&seq) {
                Some(stored) => Ok(stored),
                None => self.storage.read(&self.names.ledger(seq), MAX_ENTRY_BYTES),
            };
            match stored {
                Ok(stored) if follows(&stored, seq, &before) => before = entry_hash(&stored),
                // It is met again by whoever reads from genesis now.
                _ => {
                    self.ahead.entries.clear();
                    return false;
                }
            }
        }
        state.hash == Some(before)
    }

    /// What a checkpoint holds, if it is of this ledger and the store has the last entry that it was made of.
    fn checkpoint_of(&self, kept: &[u8]) -> Option<State> {
        let state = State::from_checkpoint(kept)?;
        if state.uid != self.state.uid {
            return None;
        }
        let name = self.name_of(state.seq, &state.hash?);
        // What cannot be read now is met again by whoever reads from genesis.
        let last = self.storage.read(&name, MAX_ENTRY_BYTES).ok()?;
        (state.hash == Some(entry_hash(&last))).then_some(state)
    }

    /// Reads from genesis what a checkpoint was believed for: every entry must still be there and
    /// must make the same state. A checkpoint that was wrong is replaced.
    pub fn check_believed(&mut self, memory: &dyn HostMemory) -> Result<(), RepositoryError> {
        if self.believed.is_none() {
            return Ok(());
        }
        let wanted = self.state.seq;
        let again = Ledger::state_at(self.storage.clone(), self.names.clone(), wanted)?;
        if again.seq < wanted {
            return Err(RepositoryError::damaged(
                self.names.ledger(again.seq + 1),
                "this entry is gone: this host has read it before",
            ));
        }
        if self.names.writers() == Writers::One && again.hash != self.state.hash {
            // What was the end has lost to a rival.
            return self.read_anew(memory);
        }
        if *again != *self.state {
            // The chain is whole and ends with the bytes that the checkpoint names, so the entries are
            // what they were.
            if let (Some(uid), Some(bytes)) = (again.uid, again.to_checkpoint()) {
                memory.keep_checkpoint(&uid, &bytes, Vouched::Replayed);
            }
            (self.state, self.believed) = (again, None);
            return Err(RepositoryError::damaged(
                self.names.ledger_prefix(),
                "the ledger is whole, but what this host had kept of it was wrong and is replaced: run again",
            ));
        }
        // To be kept as made anew, however lately one was kept.
        (self.believed, self.kept) = (None, 0);
        self.remember(memory);
        Ok(())
    }

    /// What the entries from genesis to that one make, or to the end if that comes before.
    pub(super) fn state_at(
        storage: Arc<dyn Storage>,
        names: CustomerNames,
        seq: u64,
    ) -> Result<Arc<State>, RepositoryError> {
        let mut ledger = Ledger::empty(storage, names);
        ledger.read_on(Some(seq), |_, _| {})?;
        Ok(ledger.state)
    }

    pub fn state(&self) -> &Arc<State> {
        &self.state
    }

    pub fn names(&self) -> &CustomerNames {
        &self.names
    }

    /// The number of an object that can be an entry of this ledger.
    fn number(&self, object: &Listed) -> Option<u64> {
        match (self.names.role(&object.name), self.names.writers()) {
            (ObjectRole::Ledger(seq), Writers::Many)
            | (ObjectRole::Rival(seq, _), Writers::One) => Some(seq),
            _ => None,
        }
    }

    fn name_of(&self, seq: u64, hash: &EntryHash) -> ObjectName {
        match self.names.writers() {
            Writers::Many => self.names.ledger(seq),
            Writers::One => self.names.rival(seq, hash),
        }
    }

    /// That of the last entry, as the next one names it.
    fn last_hash(&self) -> EntryHash {
        self.state.hash.unwrap_or(BEFORE_THE_FIRST)
    }

    /// What a later version wrote may forbid what this one would do: nothing is written, and
    /// nothing deleted.
    pub fn may_write(&self) -> Result<(), RepositoryError> {
        if self.is_set_aside {
            return Err(RepositoryError::new(
                RepositoryErrorKind::Refused,
                self.names.ledger_prefix(),
                "nothing is written into a ledger that was not asked",
            ));
        }
        match &self.state.unknown {
            None => Ok(()),
            Some((seq, what)) => Err(RepositoryError::new(
                RepositoryErrorKind::Newer,
                self.names.ledger(*seq),
                format!(
                    "was written by a later version of vmkeep ({what}); this one may only read"
                ),
            )),
        }
    }

    fn remember(&mut self, memory: &dyn HostMemory) {
        let (Some(uid), Some(hash)) = (self.state.uid, self.state.hash) else {
            return;
        };
        let seq = self.state.seq;
        // Where one host writes, an end that nobody has acknowledged may lose to a rival.
        if self.names.writers() == Writers::One && !self.is_settled_at(seq) {
            return;
        }
        memory.remember_head(&uid, Head { seq, hash });
        if !self.is_first_remembered
            && let (Some(repository), Some(first)) = (self.state.repository, self.first)
        {
            memory.remember_origin(&repository, self.names.customer(), first);
            self.is_first_remembered = true;
        }
        if is_checkpoint_due(self.kept, seq)
            && let Some(bytes) = self.state.to_checkpoint()
        {
            let vouched = self.believed.map_or(Vouched::Replayed, Vouched::AsBefore);
            memory.keep_checkpoint(&uid, &bytes, vouched);
            self.kept = seq;
        }
    }

    /// That this ledger begins as the one that this host knows under the customer's name. A store can hold
    /// a sound ledger of somebody else's making there, with keys of his.
    fn check_origin(&mut self, memory: &dyn HostMemory) -> Result<(), RepositoryError> {
        let (Some(repository), Some(first)) = (self.state.repository, self.first) else {
            return Ok(());
        };
        match memory.origin(&repository, self.names.customer()) {
            Some(known) if known != first => Err(RepositoryError::new(
                RepositoryErrorKind::Replaced,
                self.names.prefix(),
                format!(
                    "this ledger, of customer {:?}, does not begin as the one that this host knows under \
                     this name: its first entry is {first}, and was {known}",
                    self.state.customer_name
                ),
            )),
            known => {
                self.is_first_remembered = known.is_some();
                Ok(())
            }
        }
    }

    /// This host has seen `head`: it must still be there, the same.
    fn check_head(&self, head: &Head) -> Result<(), RepositoryError> {
        let name = self.name_of(head.seq, &head.hash);
        if head.seq > self.state.seq {
            return Err(RepositoryError::new(
                RepositoryErrorKind::Replaced,
                name,
                format!(
                    "the ledger was rolled back: this host has seen entry {} of customer {}, the store \
                     ends at {}",
                    head.seq,
                    self.uid_text(),
                    self.state.seq
                ),
            ));
        }
        if Some(head.hash) == self.state.hash {
            return Ok(());
        }
        if self.names.writers() == Writers::One {
            return self.check_alone(head);
        }
        let stored = self.storage.read(&name, MAX_ENTRY_BYTES)?;
        match entry_hash(&stored) == head.hash {
            true => Ok(()),
            false => Err(RepositoryError::new(
                RepositoryErrorKind::Replaced,
                name,
                format!(
                    "the ledger was forked: this entry of customer {} is not the one this host has seen",
                    self.uid_text()
                ),
            )),
        }
    }

    /// What this host's memory of the customer goes by.
    fn uid_text(&self) -> String {
        self.state
            .uid
            .map_or_else(String::new, |uid| uid.to_string())
    }

    /// Opens and chains the bytes of the next entry.
    fn open_next(&self, stored: &[u8]) -> Result<(Entry, EntryHash), RepositoryError> {
        let seq = self.state.seq + 1;
        let name = self.names.ledger(seq);
        let verify = |host: &_, message: &[u8], signature: &[u8; 64]| {
            verify_signature(host, message, signature)
        };
        let entry =
            Entry::open(stored, verify).map_err(|error| self.not_opened(&name, stored, error))?;
        self.check_place(&name, seq, &entry)?;
        if entry.prev != self.last_hash() {
            let what = "does not follow the entry before it: the chain is broken";
            return Err(RepositoryError::damaged(name, what));
        }
        Ok((entry, entry_hash(stored)))
    }

    fn not_opened(&self, name: &ObjectName, stored: &[u8], error: FormatError) -> RepositoryError {
        match is_newer(stored) {
            true => RepositoryError::new(RepositoryErrorKind::Newer, name, error),
            false => RepositoryError::damaged(name, error),
        }
    }

    /// Whether a sound entry can stand under this number of this ledger.
    fn check_place(
        &self,
        name: &ObjectName,
        seq: u64,
        entry: &Entry,
    ) -> Result<(), RepositoryError> {
        let wrong = |what: &str| Err(RepositoryError::damaged(name, what));
        if entry.seq != seq {
            return wrong("stands in the place of another entry");
        }
        if self.state.uid.is_some_and(|uid| uid != entry.customer) {
            return wrong("is an entry of another customer");
        }
        match (&entry.body, seq) {
            (Body::Genesis(body), 1) if body.writers != self.names.writers() => {
                wrong("is not named as its own words say")
            }
            (Body::Genesis(_), 1) => Ok(()),
            (_, 1) => wrong("is the first entry and not a genesis"),
            _ => Ok(()),
        }
    }

    fn next(&self) -> Result<Option<(Entry, EntryHash)>, RepositoryError> {
        if self.names.writers() == Writers::One {
            return self.next_of_rivals();
        }
        let seq = self.state.seq + 1;
        if let Some(stored) = self.ahead.entries.get(&seq) {
            return self.open_next(stored).map(Some);
        }
        match self.storage.read(&self.names.ledger(seq), MAX_ENTRY_BYTES) {
            Ok(stored) => self.open_next(&stored).map(Some),
            Err(error) if error.kind == StorageErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn take_in(&mut self, entry: &Entry, hash: EntryHash) -> Result<(), String> {
        self.ahead.entries.remove(&entry.seq);
        if self.names.writers() == Writers::One {
            self.alone.trail.insert(entry.seq, hash);
        }
        if entry.seq == 1 {
            self.first = Some(hash);
        }
        Arc::make_mut(&mut self.state).apply(entry, hash)
    }

    fn read_on(
        &mut self,
        until: Option<u64>,
        mut each: impl FnMut(&Entry, Result<(), String>),
    ) -> Result<(), RepositoryError> {
        while until.is_none_or(|until| self.state.seq < until) {
            if until.is_none() {
                self.read_ahead(self.state.seq + 1);
            }
            let Some((entry, hash)) = self.next()? else {
                break;
            };
            let verdict = self.take_in(&entry, hash);
            each(&entry, verdict);
        }
        Ok(())
    }

    /// Reads what was appended since.
    pub fn refresh(&mut self, memory: &dyn HostMemory) -> Result<(), RepositoryError> {
        if self.is_set_aside {
            return Ok(());
        }
        let before = self.state.seq;
        match self.read_on(None, |_, _| {}) {
            // What was the end here may have been a rival that lost.
            Err(error) if error.is_damage() && self.names.writers() == Writers::One => {
                self.read_anew(memory)?;
            }
            read => read?,
        }
        if self.state.seq > before {
            self.remember(memory);
        }
        Ok(())
    }

    /// All entries from genesis, with the reason of those that are void. An error after the last: one that is
    /// missing or damaged.
    pub fn replay(
        storage: Arc<dyn Storage>,
        names: CustomerNames,
        each: impl FnMut(&Entry, Result<(), String>),
    ) -> Result<Arc<State>, RepositoryError> {
        let listed = storage.list(&names.ledger_prefix())?;
        let mut ledger = Ledger::empty(storage, named_as_listed(names, &listed));
        ledger.alone.listed = slots_of(&ledger.names, &listed);
        ledger.read_on(None, each)?;
        ledger.has_no_gap(&listed)?;
        Ok(ledger.state)
    }

    /// Takes the next free slot for what `build` makes of the state before it.
    ///
    /// `build` is asked again after each lost slot, so every entry is checked against the state it
    /// follows. An uncertain creation is decided by filling the slot: the same bytes, until
    /// "created" or "exists". `Uncertain`: it was not decided; nothing may be cleaned up.
    pub fn append(
        &mut self,
        host: &dyn Host,
        uid: CustomerUid,
        mut build: impl FnMut(&State, &Stamp) -> Result<Body, RepositoryError>,
    ) -> Result<u64, RepositoryError> {
        if self.names.writers() == Writers::Many {
            return self.append_next(host, uid, false, &mut build);
        }
        self.in_turn(host, uid, |ledger| {
            ledger.append_next(host, uid, true, &mut build)
        })
    }

    /// `is_at_end`: the ledger was read to its end just now. Otherwise that is asked only of who is
    /// refused: that the next slot was free shows that there was nothing more to read.
    fn append_next(
        &mut self,
        host: &dyn Host,
        uid: CustomerUid,
        mut is_at_end: bool,
        build: &mut dyn FnMut(&State, &Stamp) -> Result<Body, RepositoryError>,
    ) -> Result<u64, RepositoryError> {
        // Stays empty: every entry is built and checked on the state that it follows.
        let mut as_before = None;
        loop {
            self.may_write()?;
            let stamp = host.stamp(self.state.clock_of(&host.id()));
            let built = match as_before.clone() {
                None => build(&self.state, &stamp).and_then(|body| {
                    let entry = self.next_entry(host, uid, &stamp, body);
                    let refused = |reason| {
                        let name = self.names.ledger(entry.seq);
                        RepositoryError::new(RepositoryErrorKind::Superseded, name, reason)
                    };
                    self.state.check(&entry).map_err(refused)?;
                    Ok(entry)
                }),
                Some(body) => Ok(self.next_entry(host, uid, &stamp, body)),
            };
            let entry = match built {
                Ok(entry) => entry,
                Err(_) if !is_at_end => {
                    self.refresh(host)?;
                    is_at_end = true;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let name = self.names.ledger(entry.seq);
            let stored = entry.seal(|message| host.sign(message)).map_err(|error| {
                RepositoryError::new(RepositoryErrorKind::Refused, &name, error)
            })?;
            // Two processes of one host may write the very same bytes in the same second. Where
            // one entry does for both, it does; but every restore must be its own entry.
            let own_each = matches!(
                entry.body,
                Body::Restore(_) | Body::Verify(_) | Body::Clock(_)
            );
            let hash = entry_hash(&stored);
            let name = self.name_of(entry.seq, &hash);
            if self.fill(&name, &stored, own_each)? {
                self.check_listed(entry.seq, &hash)?;
                // `check` passed on the very state this entry follows.
                let _valid = self.take_in(&entry, hash);
                host.noted(&stamp, &self.state.uid.unwrap_or(uid), self.state.seq);
                self.remember(host);
                return Ok(entry.seq);
            }
            if !stands(Rule::CheckAgain) {
                as_before = Some(entry.body);
            }
            let before = self.state.seq;
            self.refresh(host)?;
            is_at_end = true;
            if self.state.seq == before {
                return Err(RepositoryError::damaged(
                    name,
                    "the slot is taken, but nothing can be read from it",
                ));
            }
        }
    }

    fn next_entry(&self, host: &dyn Host, uid: CustomerUid, stamp: &Stamp, body: Body) -> Entry {
        Entry {
            seq: self.state.seq + 1,
            prev: self.last_hash(),
            // Another process may have made the genesis since.
            customer: self.state.uid.unwrap_or(uid),
            time: stamp.time,
            attestation: stamp.attestation,
            host: host.id(),
            body,
        }
    }

    /// Fills one slot: `true` if our bytes stand in it, `false` if others do.
    ///
    /// `own_each`: equal bytes that stood there before our first attempt are another process's.
    fn fill(
        &self,
        name: &ObjectName,
        stored: &[u8],
        own_each: bool,
    ) -> Result<bool, RepositoryError> {
        let mut last = None;
        for attempt in 0..FILL_ATTEMPTS {
            match self.storage.create(name, stored) {
                // Read back: a store that lets several win must not make two believe it.
                Ok(()) => return self.stands(name, stored),
                Err(error) if error.kind == StorageErrorKind::AlreadyExists => {
                    let theirs = own_each && last.is_none();
                    return Ok(self.stands(name, stored)? && !theirs);
                }
                Err(error) if error.kind == StorageErrorKind::Transient => {
                    if !stands(Rule::FillTheSlot) && self.storage.size_bytes(name).is_err() {
                        return Err(error.into());
                    }
                    pause(attempt);
                    last = Some(error);
                }
                Err(error) if last.is_none() => return Err(error.into()),
                Err(error) => {
                    last = Some(error);
                    break;
                }
            }
        }
        Err(self.uncertain(name, last))
    }

    /// Whether the slot, which is taken, holds these bytes. While that cannot be read, the entry
    /// may stand: nobody may act as if it did not.
    fn stands(&self, name: &ObjectName, stored: &[u8]) -> Result<bool, RepositoryError> {
        let mut last = None;
        for attempt in 0..FILL_ATTEMPTS {
            match self.storage.read(name, MAX_ENTRY_BYTES) {
                Ok(found) => return Ok(found == stored),
                Err(error) if error.kind == StorageErrorKind::Transient => {
                    pause(attempt);
                    last = Some(error);
                }
                Err(error) => return Err(self.uncertain(name, Some(error))),
            }
        }
        Err(self.uncertain(name, last))
    }

    fn uncertain(&self, name: &ObjectName, last: Option<StorageError>) -> RepositoryError {
        let detail = last.map_or_else(String::new, |error| error.to_string());
        RepositoryError::new(
            RepositoryErrorKind::Uncertain,
            name,
            format!("it is not known whether this entry stands ({detail})"),
        )
    }
}

/// Whether an entry that does not open says that a later version wrote it.
fn is_newer(stored: &[u8]) -> bool {
    let line = stored.split(|byte| *byte == b'\n').next();
    line.and_then(|line| serde_json::from_slice::<serde_json::Value>(line).ok())
        .and_then(|value| value.get("vmkeep")?.as_u64())
        .is_some_and(|version| version > 1)
}

fn pause(attempt: u32) {
    // A store of tests that fails does so by plan, not for a while.
    if cfg!(test) {
        return;
    }
    std::thread::sleep(std::time::Duration::from_millis(10 << attempt.min(6)));
}
