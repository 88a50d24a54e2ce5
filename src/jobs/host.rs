use super::state_folder::{AloneSince, Checkpoint, StateFolder};
use super::turn::HeldTurn;
use crate::codec::minisign::{self, MinisignError};
use crate::codec::{HostIdentity, random_bytes};
use crate::format::entry::{Attestation, ClockDeclaration, HostBody, Role};
use crate::model::{
    Clock, ClockReading, CustomerName, CustomerUid, EntryHash, HostId, InstallationId,
    RepositoryId, SessionId,
};
use crate::policy::{self, HostClock, Judgement, LocalMark, judge, next_mark};
use crate::repository::{
    Belief, BelievedSince, Customer, Head, Host, HostMemory, KeptState, LedgerClock, Neighbour,
    RepositoryError, RepositoryErrorKind, Stamp, Turn, Vouched, strangers,
};
use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// A mark of the clock is written down again after this much time: entries come in bursts.
const MARK_INTERVAL_SECONDS: i64 = 60;
/// A clock that is set back by no more than this is corrected, not wrong.
const CORRECTION_SECONDS: i64 = 5 * 60;

/// The entries that a checkpoint was made of are read again after this long.
const LONGEST_UNREAD: SignedDuration = SignedDuration::from_hours(7 * 24);

/// And after this long it is made of them anew: nothing but this host's memory and disk vouch for it meanwhile.
const LONGEST_BELIEF: SignedDuration = SignedDuration::from_hours(4 * 7 * 24);

/// The hash of this program.
fn program() -> Option<&'static str> {
    static PROGRAM: OnceLock<Option<String>> = OnceLock::new();
    let hash = || {
        let mut hasher = blake3::Hasher::new();
        hasher
            .update_reader(File::open("/proc/self/exe").ok()?)
            .ok()?;
        Some(hasher.finalize().to_hex().to_string())
    };
    PROGRAM.get_or_init(hash).as_deref()
}

/// This host: what signs, what tells the time, and what remembers outside of the store.
pub struct LocalHost {
    identity: HostIdentity,
    name: String,
    folder: StateFolder,
    clock: Arc<dyn Clock>,
    mode: HostClock,
    may_delete: bool,
    /// An operator vouches for the clock, for this process only.
    vouched: AtomicBool,
    /// An operator says that the installation before this one is gone.
    takes_over: AtomicBool,
    /// Tells this process from every other, also from a copy of it that goes on elsewhere.
    process: String,
    memory: Mutex<Memory>,
    /// The customers whose first entry this process has read, by name.
    met: Mutex<BTreeMap<String, CustomerUid>>,
}

#[derive(Default)]
struct Memory {
    mark: Option<LocalMark>,
    alone: Option<AloneSince>,
    judged: Option<(ClockReading, Judgement)>,
    /// The latest time this process has given an entry.
    latest: Option<Timestamp>,
    /// What the store's own clock said, and what this host's did at that moment.
    store: Option<(Timestamp, ClockReading)>,
}

impl LocalHost {
    pub fn new(
        identity: HostIdentity,
        name: String,
        folder: StateFolder,
        clock: Arc<dyn Clock>,
        mode: HostClock,
    ) -> Self {
        let memory = Memory {
            mark: folder.clock_mark(),
            alone: folder.alone_since(),
            ..Memory::default()
        };
        LocalHost {
            identity,
            name,
            folder,
            clock,
            mode,
            may_delete: true,
            vouched: AtomicBool::new(false),
            takes_over: AtomicBool::new(false),
            process: InstallationId::from_bytes(random_bytes()).to_string(),
            memory: Mutex::new(memory),
            met: Mutex::default(),
        }
    }

    /// One that deletes nothing in the store, whatever the ledger would let it do.
    pub fn as_agent(self) -> Self {
        LocalHost {
            may_delete: false,
            ..self
        }
    }

    pub fn identity(&self) -> &HostIdentity {
        &self.identity
    }

    pub fn folder(&self) -> &StateFolder {
        &self.folder
    }

    pub fn now(&self) -> Timestamp {
        self.clock.read().wall
    }

    /// An operator has said that the clock is right.
    pub fn vouch_for_clock(&self) {
        self.vouched.store(true, Ordering::Relaxed);
    }

    /// An operator has said that the installation which wrote last, in a repository that one host
    /// writes, is gone for good.
    pub fn take_over(&self) {
        self.takes_over.store(true, Ordering::Relaxed);
    }

    pub(super) fn takes_over(&self) -> bool {
        self.takes_over.load(Ordering::Relaxed)
    }

    /// What the store's own clock says just now.
    pub fn note_store_time(&self, store_time: Timestamp) {
        let reading = self.clock.read();
        self.memory().store = Some((store_time, reading));
    }

    /// The store's time at a reading: as noted, and the time since by this host's uptime, which goes on
    /// whatever is done to its clock.
    fn store_time(&self, reading: &ClockReading) -> Option<Timestamp> {
        let memory = self.memory();
        let (noted, then) = memory.store.as_ref()?;
        let (before, now) = (then.boot.as_ref()?, reading.boot.as_ref()?);
        if before.boot_id != now.boot_id {
            return None;
        }
        let elapsed = now
            .since_boot_seconds
            .checked_sub(before.since_boot_seconds)?;
        let elapsed = SignedDuration::from_secs(i64::try_from(elapsed).ok()?);
        noted.checked_add(elapsed).ok()
    }

    /// What is thought of the clock now.
    pub fn judgement(&self, ledger: LedgerClock) -> Judgement {
        self.judge(&self.clock.read(), ledger)
    }

    /// The entry of this customer's ledger from which on this host's clock, however alone, went on as its
    /// uptime did until now.
    pub(super) fn even_since(&self, customer: &CustomerUid) -> Option<u64> {
        let reading = self.clock.read();
        let memory = self.memory();
        let alone = memory.alone.as_ref()?;
        let seq = alone.first.get(customer).copied()?;
        policy::goes_on(&reading, &alone.mark).then_some(seq)
    }

    /// Notes from which entry on the clock is even, so that an operator who vouches for it one day
    /// vouches for all that it said meanwhile.
    fn note_alone(&self, reading: &ClockReading, customer: &CustomerUid, seq: u64) {
        let Some(boot) = &reading.boot else {
            return;
        };
        let mut memory = self.memory();
        let known = memory.alone.take();
        let mut alone = known
            .filter(|known| policy::goes_on(reading, &known.mark))
            .unwrap_or_else(|| AloneSince {
                mark: LocalMark {
                    boot_id: boot.boot_id.clone(),
                    since_boot_seconds: boot.since_boot_seconds,
                    wall: reading.wall,
                },
                first: BTreeMap::new(),
            });
        if !alone.first.contains_key(customer) {
            alone.first.insert(*customer, seq);
            self.folder.remember_alone_since(&alone);
        }
        memory.alone = Some(alone);
    }

    /// How the ledger names this host.
    pub fn body(&self) -> HostBody {
        HostBody {
            host: self.identity.host_id(),
            name: self.name.clone(),
            recipient: self.identity.recipient().to_string(),
            roles: vec![Role::Backup, Role::Restore, Role::Prune, Role::Admin],
            clock: match self.mode {
                HostClock::Verified => ClockDeclaration::Verified,
                HostClock::Trusted => ClockDeclaration::Trusted,
            },
        }
    }

    pub(super) fn sign_certificate(
        &self,
        content: &[u8],
        comment: &str,
    ) -> Result<String, MinisignError> {
        minisign::sign(&self.identity, content, comment)
    }

    /// What is in the store beside this customer and is none of the repository.
    pub(super) fn strangers_beside(
        &self,
        customer: &Customer,
    ) -> Result<Vec<Neighbour>, RepositoryError> {
        let met = || self.met.lock().unwrap_or_else(PoisonError::into_inner);
        // Others need not wait for what is read here.
        let mut known = met().clone();
        let strangers = strangers(customer, &mut known)?;
        met().extend(known);
        Ok(strangers)
    }

    fn judge(&self, reading: &ClockReading, ledger: LedgerClock) -> Judgement {
        let store_time = self.store_time(reading);
        let mode = match ledger.declared {
            Some(ClockDeclaration::Verified) => HostClock::Verified,
            Some(ClockDeclaration::Trusted) | None => self.mode,
        };
        judge(
            reading,
            self.memory().mark.as_ref(),
            store_time,
            mode,
            ledger.last_witnessed,
            self.vouched.load(Ordering::Relaxed),
        )
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept_by_this_program(&self, customer: &CustomerUid) -> Option<Checkpoint> {
        let kept = self.folder.read_checkpoint(customer)?;
        (kept.program == program()?).then_some(kept)
    }
}

impl HostMemory for LocalHost {
    fn head(&self, customer: &CustomerUid) -> Option<Head> {
        self.folder.head(customer)
    }

    fn remember_head(&self, customer: &CustomerUid, head: Head) {
        self.folder.remember_head(customer, head);
    }

    fn origin(&self, repository: &RepositoryId, customer: &CustomerName) -> Option<EntryHash> {
        self.folder.origin(repository, customer)
    }

    fn remember_origin(
        &self,
        repository: &RepositoryId,
        customer: &CustomerName,
        first: EntryHash,
    ) {
        self.folder.remember_origin(repository, customer, first);
    }

    fn checkpoint(&self, customer: &CustomerUid) -> Option<KeptState> {
        let Checkpoint { since, content, .. } = self.kept_by_this_program(customer)?;
        let now = self.now();
        // A clock that was set back cannot tell.
        let within = |since: Timestamp, longest: SignedDuration| {
            (SignedDuration::ZERO..=longest).contains(&now.duration_since(since))
        };
        let belief = match within(since.replayed_at, LONGEST_BELIEF) {
            true if within(since.read_at, LONGEST_UNREAD) => Belief::AsItIs,
            true => Belief::IfReadAgain,
            false => Belief::ForWantOfBetter,
        };
        Some(KeptState {
            content,
            belief,
            since,
        })
    }

    fn keep_checkpoint(&self, customer: &CustomerUid, checkpoint: &[u8], vouched: Vouched) {
        let now = self.now();
        let since = match vouched {
            Vouched::Replayed => BelievedSince {
                replayed_at: now,
                read_at: now,
            },
            Vouched::ReadAgain(since) => BelievedSince {
                read_at: now,
                ..since
            },
            Vouched::AsBefore(since) => since,
        };
        // Perhaps because this one is wrong.
        let is_made_anew = vouched != Vouched::Replayed
            && self.kept_by_this_program(customer).is_some_and(|kept| {
                kept.since.replayed_at > since.replayed_at && kept.since.replayed_at <= now
            });
        if let Some(program) = program()
            && !is_made_anew
        {
            let kept = Checkpoint {
                program: program.to_string(),
                since,
                content: checkpoint.to_vec(),
            };
            self.folder.write_checkpoint(customer, &kept);
        }
    }
}

impl Host for LocalHost {
    fn id(&self) -> HostId {
        self.identity.host_id()
    }

    fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.identity.sign(message)
    }

    fn stamp(&self, ledger: LedgerClock) -> Stamp {
        let mut reading = self.clock.read();
        let mut memory = self.memory();
        if let Some(latest) = memory.latest {
            let back = latest.as_second().saturating_sub(reading.wall.as_second());
            if (1..=CORRECTION_SECONDS).contains(&back) {
                // A session must not end before it began because the clock was corrected.
                reading.wall = latest;
            }
        }
        memory.latest = Some(reading.wall);
        drop(memory);
        let judgement = self.judge(&reading, ledger);
        let stamp = Stamp {
            time: reading.wall,
            attestation: match judgement.attestation {
                policy::Attestation::Witnessed => Attestation::Witnessed,
                policy::Attestation::Alone => Attestation::Alone,
            },
        };
        self.memory().judged = Some((reading, judgement));
        stamp
    }

    fn noted(&self, stamp: &Stamp, customer: &CustomerUid, seq: u64) {
        if stamp.attestation == Attestation::Alone {
            let judged = self.memory().judged.clone();
            if let Some((reading, _)) = judged {
                self.note_alone(&reading, customer, seq);
            }
            return;
        }
        let mut memory = self.memory();
        let Some(mark) = memory
            .judged
            .as_ref()
            .and_then(|(reading, judgement)| next_mark(reading, judgement))
        else {
            return;
        };
        let due = memory.mark.as_ref().is_none_or(|known| {
            known.boot_id != mark.boot_id
                || known.wall.as_second().abs_diff(mark.wall.as_second())
                    >= MARK_INTERVAL_SECONDS.unsigned_abs()
        });
        if due {
            self.folder.remember_clock_mark(&mark);
            memory.mark = Some(mark);
        }
    }

    fn hold_session(&self, session: &SessionId) -> Result<Box<dyn Send + Sync>, RepositoryError> {
        match self.folder.hold_session(session) {
            Ok(lock) => Ok(Box::new(lock)),
            Err(error) => Err(RepositoryError::new(
                RepositoryErrorKind::Refused,
                "session lock",
                error,
            )),
        }
    }

    fn session_is_dead(&self, session: &SessionId) -> bool {
        self.folder.session_is_free(session)
    }

    fn session_is_over(&self, session: &SessionId) {
        self.folder.forget_session(session);
    }

    fn take_turn(&self, prefix: &str) -> Result<Box<dyn Turn>, RepositoryError> {
        let customer = prefix.rsplit('/').next().unwrap_or(prefix);
        match HeldTurn::take(&self.folder, customer, &self.process, self.takes_over()) {
            Ok(turn) => Ok(Box::new(turn)),
            Err(error) => Err(RepositoryError::new(
                RepositoryErrorKind::Refused,
                "the turn to write",
                error,
            )),
        }
    }

    fn may_delete(&self) -> bool {
        self.may_delete
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Hands(Mutex<Timestamp>);

    impl Clock for Hands {
        fn read(&self) -> ClockReading {
            ClockReading {
                wall: *self.0.lock().unwrap(),
                synchronised: true,
                boot: None,
            }
        }
    }

    struct Watch(Mutex<ClockReading>);

    impl Clock for Watch {
        fn read(&self) -> ClockReading {
            self.0.lock().unwrap().clone()
        }
    }

    #[test]
    fn the_stores_clock_is_a_witness_that_goes_on_with_the_uptime_of_this_host() {
        let folder = tempfile::tempdir().unwrap();
        let folder = StateFolder::create(folder.path()).unwrap();
        let (identity, _) = folder.ensure_identity("a test").unwrap();
        let start: Timestamp = "2025-03-02T01:00:00Z".parse().unwrap();
        let reading = |wall: Timestamp, since_boot_seconds| ClockReading {
            wall,
            synchronised: true,
            boot: Some(crate::model::BootMark {
                boot_id: "a boot".to_string(),
                since_boot_seconds,
            }),
        };
        let clock = Arc::new(Watch(Mutex::new(reading(start, 1000))));
        let host = LocalHost::new(
            identity,
            "a host".to_string(),
            folder,
            clock.clone(),
            HostClock::Verified,
        );
        let hour = SignedDuration::from_hours(1);
        let ledger = LedgerClock {
            last_witnessed: Some(start),
            declared: None,
        };
        let sources = |wall: Timestamp, since_boot_seconds| {
            *clock.0.lock().unwrap() = reading(wall, since_boot_seconds);
            host.judgement(ledger).sources
        };
        assert_eq!(sources(start, 1000), ["kernel"]);
        host.note_store_time(start);
        assert_eq!(sources(start, 1000), ["kernel", "store"]);
        assert_eq!(sources(start + hour, 4600), ["kernel", "store"]);
        // The clock was set ahead: an hour by the clock, a second by the uptime.
        assert_eq!(sources(start + hour, 1001), ["kernel"]);
        // A store whose clock is another one.
        *clock.0.lock().unwrap() = reading(start, 1000);
        host.note_store_time(start + hour);
        assert_eq!(sources(start, 1000), ["kernel"]);
    }

    #[test]
    fn a_checkpoint_is_read_again_after_seven_days_made_anew_after_four_weeks_and_of_this_program_only()
     {
        let folder = tempfile::tempdir().unwrap();
        let folder = StateFolder::create(folder.path()).unwrap();
        let (identity, _) = folder.ensure_identity("a test").unwrap();
        let start: Timestamp = "2025-03-02T01:00:00Z".parse().unwrap();
        let clock = Arc::new(Hands(Mutex::new(start)));
        let host = LocalHost::new(
            identity,
            "a host".to_string(),
            folder.clone(),
            clock.clone(),
            HostClock::Trusted,
        );
        let customer = CustomerUid::from_bytes([1; 16]);
        let believed = |hours: i64| {
            *clock.0.lock().unwrap() = start + SignedDuration::from_hours(hours);
            let kept = host.checkpoint(&customer)?;
            Some((String::from_utf8(kept.content).unwrap(), kept.belief))
        };
        let since = || host.checkpoint(&customer).unwrap().since;
        let is = |text: &str, belief: Belief| Some((text.to_string(), belief));
        assert_eq!(believed(0), None);
        host.keep_checkpoint(&customer, b"one", Vouched::Replayed);
        assert_eq!(believed(100), is("one", Belief::AsItIs));
        // What was made of it is no younger than it.
        host.keep_checkpoint(&customer, b"two", Vouched::AsBefore(since()));
        assert_eq!(believed(168), is("two", Belief::AsItIs));
        assert_eq!(believed(169), is("two", Belief::IfReadAgain));
        host.keep_checkpoint(&customer, b"two", Vouched::ReadAgain(since()));
        assert_eq!(believed(169 + 168), is("two", Belief::AsItIs));
        assert_eq!(believed(169 + 169), is("two", Belief::IfReadAgain));
        host.keep_checkpoint(&customer, b"three", Vouched::AsBefore(since()));
        assert_eq!(believed(4 * 168), is("three", Belief::IfReadAgain));
        assert_eq!(believed(4 * 168 + 1), is("three", Belief::ForWantOfBetter));
        // To read what it was made of again is not to make it again.
        let first = since();
        host.keep_checkpoint(&customer, b"three", Vouched::ReadAgain(first));
        assert_eq!(believed(4 * 168 + 1), is("three", Belief::ForWantOfBetter));
        // A clock that was set back cannot tell.
        assert_eq!(believed(168), is("three", Belief::IfReadAgain));
        assert_eq!(believed(-1), is("three", Belief::ForWantOfBetter));

        // Whoever began with an older one does not put it back.
        assert!(believed(4 * 168 + 1).is_some());
        host.keep_checkpoint(&customer, b"anew", Vouched::Replayed);
        for late in [Vouched::AsBefore(first), Vouched::ReadAgain(first)] {
            host.keep_checkpoint(&customer, b"wrong", late);
            assert_eq!(believed(4 * 168 + 2), is("anew", Belief::AsItIs));
        }
        // Unless it is dated by a clock that was ahead.
        assert!(believed(1).is_some());
        host.keep_checkpoint(&customer, b"of now", Vouched::Replayed);
        assert_eq!(believed(1), is("of now", Belief::AsItIs));

        let mut kept = folder.read_checkpoint(&customer).unwrap();
        kept.program = "f".repeat(64);
        folder.write_checkpoint(&customer, &kept);
        assert_eq!(believed(1), None);
    }
}
