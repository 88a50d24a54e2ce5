//! A small repository for tests: hosts with a set clock on a shared store in memory, VMs as byte
//! vectors, and a model of what must restore.

use super::reclaim::{Reclaimed, merge_segments, reclaim};
use super::*;
use crate::codec::HostIdentity;
use crate::format::entry::{
    Attestation, Body, ClockDeclaration, HostBody, PointReason, PointsBody, Purpose, Role,
};
use crate::model::{
    CustomerName, CustomerUid, DiskName, EntryHash, FAN_OUT, HostId, InstallationId, ObjectName,
    PointId, PointKind, PointState, RepositoryId, SessionId, TreeShape, VmName, Writers,
};
use crate::policy::PolicyTerms;
use crate::storage::{Faulty, Memory, Snapshot, Storage};
use jiff::{SignedDuration, Timestamp};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub const CHUNK: usize = 64 << 10;
pub const DAY: SignedDuration = SignedDuration::from_hours(24);

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A world clock that only tests move.
#[derive(Clone)]
pub struct Time(Arc<Mutex<Timestamp>>);

impl Time {
    pub fn new() -> Self {
        let start = "2026-03-02T23:00:00Z".parse().expect("a time");
        Time(Arc::new(Mutex::new(start)))
    }

    pub fn now(&self) -> Timestamp {
        *lock(&self.0)
    }

    pub fn pass(&self, time: SignedDuration) {
        let mut now = lock(&self.0);
        *now = now.checked_add(time).expect("in range");
    }
}

/// No test host asks when its checkpoints were made.
pub const SINCE: BelievedSince = BelievedSince {
    replayed_at: Timestamp::UNIX_EPOCH,
    read_at: Timestamp::UNIX_EPOCH,
};

/// A machine: identity, clock, memory of heads, living sessions.
pub struct TestHost {
    pub identity: HostIdentity,
    pub time: Time,
    pub attestation: Mutex<Attestation>,
    /// Added to the world's time: this machine's clock is wrong by so much.
    pub wrong_by: Mutex<SignedDuration>,
    heads: Mutex<BTreeMap<CustomerUid, Head>>,
    origins: Mutex<BTreeMap<(RepositoryId, CustomerName), EntryHash>>,
    checkpoints: Mutex<BTreeMap<CustomerUid, (Vec<u8>, Vouched)>>,
    /// After the time that went by since they were made.
    pub belief: Mutex<Belief>,
    held: Arc<Mutex<BTreeSet<SessionId>>>,
    turns: Turns,
}

/// Where one host writes: what its state folder would tell, and which process it is.
pub struct Turns {
    pub installation: Mutex<InstallationId>,
    pub process: AtomicU64,
    pub last: Arc<Mutex<Option<u64>>>,
    pub takes_over: Mutex<bool>,
}

impl TestHost {
    pub fn new(time: &Time) -> Arc<Self> {
        Arc::new(TestHost {
            identity: HostIdentity::generate().unwrap_or_else(|_| panic!("an identity")),
            time: time.clone(),
            attestation: Mutex::new(Attestation::Witnessed),
            wrong_by: Mutex::new(SignedDuration::ZERO),
            heads: Mutex::default(),
            origins: Mutex::default(),
            checkpoints: Mutex::default(),
            belief: Mutex::new(Belief::AsItIs),
            held: Arc::default(),
            turns: Turns {
                installation: Mutex::new(InstallationId::from_bytes(random_bytes())),
                process: AtomicU64::new(0),
                last: Arc::default(),
                takes_over: Mutex::default(),
            },
        })
    }

    pub fn turns(&self) -> &Turns {
        &self.turns
    }

    pub fn set_clock(&self, wrong_by: SignedDuration, attestation: Attestation) {
        *lock(&self.wrong_by) = wrong_by;
        *lock(&self.attestation) = attestation;
    }

    /// What vouches for its last checkpoint.
    pub fn vouched(&self, customer: &CustomerUid) -> Option<Vouched> {
        let kept = lock(&self.checkpoints);
        kept.get(customer).map(|(_, vouched)| *vouched)
    }

    pub fn clock_is_right(&self) -> bool {
        lock(&self.wrong_by).is_zero() && *lock(&self.attestation) == Attestation::Witnessed
    }

    /// As a machine that has seen nothing of the store yet.
    pub fn forget(&self) {
        lock(&self.heads).clear();
        lock(&self.origins).clear();
        lock(&self.checkpoints).clear();
    }

    pub fn body(&self) -> HostBody {
        HostBody {
            host: self.identity.host_id(),
            name: "host".to_string(),
            recipient: self.identity.recipient().to_string(),
            roles: vec![Role::Backup, Role::Restore, Role::Prune, Role::Admin],
            clock: ClockDeclaration::Trusted,
        }
    }
}

struct Held(Arc<Mutex<BTreeSet<SessionId>>>, SessionId);

impl Drop for Held {
    fn drop(&mut self) {
        lock(&self.0).remove(&self.1);
    }
}

impl HostMemory for TestHost {
    fn head(&self, customer: &CustomerUid) -> Option<Head> {
        lock(&self.heads).get(customer).copied()
    }

    fn remember_head(&self, customer: &CustomerUid, head: Head) {
        lock(&self.heads).insert(*customer, head);
    }

    fn origin(&self, repository: &RepositoryId, customer: &CustomerName) -> Option<EntryHash> {
        let origins = lock(&self.origins);
        origins.get(&(*repository, customer.clone())).copied()
    }

    fn remember_origin(
        &self,
        repository: &RepositoryId,
        customer: &CustomerName,
        first: EntryHash,
    ) {
        lock(&self.origins).insert((*repository, customer.clone()), first);
    }

    fn checkpoint(&self, customer: &CustomerUid) -> Option<KeptState> {
        let kept = lock(&self.checkpoints);
        let (content, _) = kept.get(customer)?;
        Some(KeptState {
            content: content.clone(),
            belief: *lock(&self.belief),
            since: SINCE,
        })
    }

    fn keep_checkpoint(&self, customer: &CustomerUid, checkpoint: &[u8], vouched: Vouched) {
        lock(&self.checkpoints).insert(*customer, (checkpoint.to_vec(), vouched));
    }
}

impl Host for TestHost {
    fn id(&self) -> HostId {
        self.identity.host_id()
    }

    fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.identity.sign(message)
    }

    fn stamp(&self, _: LedgerClock) -> Stamp {
        Stamp {
            time: self.time.now() + *lock(&self.wrong_by),
            attestation: *lock(&self.attestation),
        }
    }

    fn noted(&self, _: &Stamp, _: &CustomerUid, _: u64) {}

    fn hold_session(&self, session: &SessionId) -> Result<Box<dyn Send + Sync>, RepositoryError> {
        lock(&self.held).insert(*session);
        Ok(Box::new(Held(self.held.clone(), *session)))
    }

    fn session_is_dead(&self, session: &SessionId) -> bool {
        !lock(&self.held).contains(session)
    }

    fn take_turn(&self, _: &str) -> Result<Box<dyn Turn>, RepositoryError> {
        Ok(Box::new(TestTurn {
            installation: *lock(&self.turns.installation),
            takes_over: *lock(&self.turns.takes_over),
            process: self.turns.process.load(Ordering::Relaxed),
            last: self.turns.last.clone(),
        }))
    }
}

struct TestTurn {
    installation: InstallationId,
    takes_over: bool,
    process: u64,
    last: Arc<Mutex<Option<u64>>>,
}

impl Turn for TestTurn {
    fn installation(&self) -> InstallationId {
        self.installation
    }

    fn takes_over(&self) -> bool {
        self.takes_over
    }

    fn goes_on(&self) -> bool {
        *lock(&self.last) == Some(self.process)
    }

    fn begin(&mut self) -> Result<(), RepositoryError> {
        *lock(&self.last) = Some(self.process);
        Ok(())
    }

    fn leave_open(&mut self) {
        *lock(&self.last) = None;
    }
}

/// A store with one customer, and what must be true of it.
pub struct World {
    pub memory: Memory,
    pub time: Time,
    pub host: Arc<TestHost>,
    pub second: Arc<TestHost>,
    pub file: crate::format::repository_file::RepositoryFile,
    /// What each committed point must restore to.
    pub model: BTreeMap<PointId, Vec<u8>>,
}

pub fn customer_name() -> CustomerName {
    CustomerName::new("acme").expect("a name")
}

pub fn vm(name: &str) -> VmName {
    VmName::new(name).expect("a name")
}

fn disk() -> DiskName {
    DiskName::new("vda").expect("a name")
}

impl World {
    pub fn new() -> Self {
        Self::with_terms(&PolicyTerms::default())
    }

    /// As one host alone writes it.
    pub fn of_one_host() -> Self {
        Self::written_by(Writers::One, &PolicyTerms::default())
    }

    pub fn with_terms(terms: &PolicyTerms) -> Self {
        Self::written_by(Writers::Many, terms)
    }

    fn written_by(writers: Writers, terms: &PolicyTerms) -> Self {
        let memory = Memory::new();
        let time = Time::new();
        let (host, second) = (TestHost::new(&time), TestHost::new(&time));
        let storage: Arc<dyn Storage> = Arc::new(memory.clone());
        let file = create_repository(&*storage, new_repository(time.now(), CHUNK as u32, writers))
            .unwrap();
        let new = NewCustomer {
            repository: file.repository,
            name: &customer_name(),
            host: host.body(),
            recipients: vec![host.identity.recipient(), second.identity.recipient()],
            terms,
            writers,
        };
        Customer::create(&storage, &new, &*host).unwrap();
        let world = World {
            memory,
            time,
            host,
            second,
            file,
            model: BTreeMap::new(),
        };
        if writers == Writers::Many {
            let body = world.second.body();
            world
                .open()
                .append(|_| Ok(Body::Host(body.clone())))
                .unwrap();
        }
        world
    }

    pub fn open(&self) -> Customer {
        self.open_on(Arc::new(self.memory.clone()), &self.host)
            .unwrap()
    }

    pub fn open_second(&self) -> Customer {
        self.open_on(Arc::new(self.memory.clone()), &self.second)
            .unwrap()
    }

    pub fn open_on(
        &self,
        storage: Arc<dyn Storage>,
        host: &Arc<TestHost>,
    ) -> Result<Customer, RepositoryError> {
        let customer = self.open_unchecked(storage, host)?;
        self.checkpoint_is_right(&customer);
        Ok(customer)
    }

    /// As [`open_on`](Self::open_on), with no operation of the store but those of the opening.
    pub fn open_unchecked(
        &self,
        storage: Arc<dyn Storage>,
        host: &Arc<TestHost>,
    ) -> Result<Customer, RepositoryError> {
        let settings = WriteSettings {
            // Small, so that small disks fill several packs, and several segments when they are
            // joined.
            pack_bytes: 4 * CHUNK,
            compression_level: 1,
            segment_records: 24,
            threads: 2,
        };
        Customer::open(
            storage,
            &customer_name(),
            self.file.repository,
            &host.identity,
            host.clone(),
            settings,
        )
    }

    /// What was made of a checkpoint is what the entries make, unless somebody damaged them. One in
    /// eight is looked at: a replay costs more than most sequences that it would check.
    fn checkpoint_is_right(&self, customer: &Customer) {
        let chosen = |hash: &EntryHash| hash.as_bytes()[0].is_multiple_of(8);
        if customer.with_state(|state| state.hash.as_ref().is_some_and(chosen)) {
            let read = customer.state();
            let storage = Arc::new(self.memory.clone());
            match Ledger::state_at(storage, customer.names().clone(), read.seq) {
                Ok(replayed) if replayed.seq == read.seq => assert_eq!(replayed, read),
                Ok(_) | Err(_) => (),
            }
        }
    }

    pub fn now(&self) -> Timestamp {
        self.time.now()
    }

    /// Backs up and enters the result in the model.
    pub fn backup(&mut self, customer: &Customer, name: &str, bytes: &[u8], full: bool) -> PointId {
        let (point, result) = backup(customer, name, bytes, full);
        result.unwrap();
        self.model.insert(point, bytes.to_vec());
        point
    }

    /// Every live point restores exactly; every point that is not live is not readable.
    pub fn check(&self, customer: &Customer) {
        customer.refresh().unwrap();
        let state = customer.state();
        assert!(state.voids.is_empty(), "{:?}", state.voids);
        for (point, bytes) in &self.model {
            let live = state
                .points
                .get(point)
                .is_some_and(|row| row.state == PointState::Live);
            match restore(customer, point) {
                Ok(found) => {
                    assert!(live, "{point} is not live and restores");
                    assert!(found == *bytes, "{point} restores to other bytes");
                }
                Err(error) => assert!(!live, "{point} is live and does not restore: {error}"),
            }
        }
    }

    /// Expires and erases a point, with the day between.
    pub fn erase(&self, customer: &Customer, point: PointId) {
        self.erase_all(customer, &[point]);
    }

    /// All by one entry each.
    pub fn erase_all(&self, customer: &Customer, points: &[PointId]) {
        change_all(customer, points, Body::Expire).unwrap();
        change_all(customer, points, Body::Erase).unwrap();
        for point in points {
            let name = customer.names().point(point);
            customer.storage().destroy(&name).unwrap();
        }
    }

    /// What a nightly prune does below the policy: dead sessions, reclaim, merge, sweep.
    pub fn prune(&self, customer: &Customer) -> Result<Reclaimed, RepositoryError> {
        let now = self.now();
        customer.abort_dead_sessions(now)?;
        let done = reclaim(customer, now, DAY * 22, false)?;
        customer.note_reclaimed(&done)?;
        merge_segments(customer)?;
        sweep(customer, false)?;
        Ok(done)
    }

    /// Prunes until nothing is left to do, at a time when every deadline is near.
    pub fn quiesce(&self, customer: &Customer) {
        let now = self.now();
        customer.abort_dead_sessions(now).unwrap();
        for _ in 0..4 {
            // Every budget is over: whatever is dead goes.
            let done = reclaim(customer, now, DAY * 4000, false).unwrap();
            assert_eq!(done.withheld, [], "condemned, and still needed");
            assert_eq!(done.damaged, []);
            customer.note_reclaimed(&done).unwrap();
            sweep(customer, false).unwrap();
        }
        let swept = sweep(customer, false).unwrap();
        assert_eq!(swept.unexplained, Vec::<String>::new());
        assert_eq!(swept.removed, []);
        self.nothing_dead_is_left(customer);
    }

    /// The same while a writer's session is open: its objects stay.
    pub fn quiesce_others(&self, customer: &Customer) {
        for _ in 0..3 {
            let done = reclaim(customer, self.now(), DAY * 4000, false).unwrap();
            customer.note_reclaimed(&done).unwrap();
            sweep(customer, false).unwrap();
        }
    }

    /// Nothing in the store but what a live or expired point needs: not even a dead frame.
    pub fn nothing_dead_is_left(&self, customer: &Customer) {
        let mark = reclaim::mark_now(customer, false).unwrap();
        let packs = self
            .memory
            .list(&format!("{}/packs", customer.names().prefix()));
        for object in packs.unwrap() {
            let bytes = self.memory.read(&object.name, u64::MAX).unwrap();
            for entry in crate::format::pack::directory_of(&bytes).unwrap() {
                assert!(
                    mark.is_live(&entry.tag).unwrap(),
                    "{} holds a dead frame",
                    object.name
                );
            }
        }
        let state = customer.state();
        assert!(state.open.is_empty());
        for row in state.condemned.values() {
            assert!(row.deleted);
        }
    }

    /// As somebody sees it who has no key.
    pub fn open_sealed(&self) -> Result<SealedCustomer, RepositoryError> {
        let memory = Arc::new(self.memory.clone());
        let repository = self.file.repository;
        SealedCustomer::open(memory, &customer_name(), repository, self.host.clone(), 2)
    }

    pub fn key_files(&self) -> Vec<ObjectName> {
        let names = crate::format::names::CustomerNames::new(&customer_name());
        let listed = self.memory.list(&names.keys_prefix()).unwrap();
        listed.into_iter().map(|object| object.name).collect()
    }

    /// Sets the store back; what its hosts remember of it is gone.
    pub fn rewind(&self, snapshot: &Snapshot) {
        self.memory.restore_snapshot(snapshot);
        for host in [&self.host, &self.second] {
            host.forget();
        }
    }

    /// Does the reading again and again from what the store holds now, another host doing something before each of
    /// its operations in turn.
    pub fn meanwhile<T: Send>(
        &self,
        read: impl Fn(&Customer) -> T + Sync,
        other_does: impl Fn(&Customer),
        look: impl Fn(T),
    ) {
        let snapshot = self.memory.snapshot();
        let open = || {
            self.rewind(&snapshot);
            let store = Arc::new(Faulty::new(self.memory.clone()));
            let customer = self.open_on(store.clone(), &self.host).unwrap();
            (store.operations(), store, customer)
        };
        let (before, store, customer) = open();
        look(read(&customer));
        for at in before + 1..=store.operations() {
            let (_, store, customer) = open();
            let other = self.open_second();
            let gate = store.freeze_before(at);
            let result = std::thread::scope(|scope| {
                let thread = scope.spawn(|| read(&customer));
                assert!(gate.wait_until_reached(Duration::from_secs(10)));
                other_does(&other);
                gate.release();
                thread.join().unwrap()
            });
            look(result);
        }
    }

    pub fn packs(&self) -> Vec<ObjectName> {
        let listed = self.memory.list("customers/acme/packs").unwrap();
        listed.into_iter().map(|object| object.name).collect()
    }
}

/// Erased points of which the ledger says that no byte is left: none is.
pub fn no_false_certificate(world: &World, customer: &Customer) {
    customer.refresh().unwrap();
    let state = customer.state();
    let certain: BTreeSet<PointId> = state.without_bytes().into_iter().collect();
    if certain.is_empty() {
        return;
    }
    let mark = reclaim::mark_now(customer, false).unwrap();
    let mut stored = BTreeSet::new();
    for name in world.packs() {
        // What a dead session uploaded anew is not what the point left; a sweep removes it, and no
        // certificate is signed before. What a reclaim copied is.
        let counts = match customer.names().role(&name) {
            crate::format::names::ObjectRole::Pack(pack) => {
                let open = state.open.get(&pack.session);
                state.born.contains_key(&pack.session)
                    || open.is_some_and(|open| open.purpose == Purpose::Reclaim)
            }
            _ => false,
        };
        if !counts {
            continue;
        }
        let bytes = world.memory.read(&name, u64::MAX).unwrap();
        let entries = crate::format::pack::directory_of(&bytes).unwrap();
        stored.extend(entries.into_iter().map(|entry| entry.tag));
    }
    let tags_of = |point: &PointId| -> BTreeSet<crate::model::Tag> {
        let bytes = world.model.get(point).map(Vec::as_slice).unwrap_or(&[]);
        let keys = customer.keys();
        bytes
            .chunks(CHUNK)
            .map(|plain| keys.tag(&keys.id(crate::model::PieceKind::Chunk, plain)))
            .collect()
    };
    // What another dead point needed as well is that one's, until it counts as destroyed too.
    let others: BTreeSet<crate::model::Tag> = state
        .points
        .iter()
        .filter(|(point, _)| !certain.contains(*point))
        .flat_map(|(point, _)| tags_of(point))
        .collect();
    for point in &certain {
        for tag in tags_of(point) {
            assert!(
                mark.is_live(&tag).unwrap() || others.contains(&tag) || !stored.contains(&tag),
                "{point} counts as destroyed, and a chunk that only it needed is in the store"
            );
        }
    }
}

/// Writes one kind of entry about a point.
pub fn change(
    customer: &Customer,
    point: PointId,
    body: impl Fn(PointsBody) -> Body,
) -> Result<u64, RepositoryError> {
    change_all(customer, &[point], body)
}

/// All by one entry.
pub fn change_all(
    customer: &Customer,
    points: &[PointId],
    body: impl Fn(PointsBody) -> Body,
) -> Result<u64, RepositoryError> {
    let reason = |point: &PointId| PointReason {
        point: *point,
        reason: "a test".to_string(),
    };
    customer.append(|_| {
        let points = points.iter().map(reason).collect();
        Ok(body(PointsBody { points }))
    })
}

/// A backup cut in steps, so that other things can happen between them.
pub struct Running<'a> {
    pub customer: &'a Customer,
    pub begun: Begun,
    pub session: Session<'a>,
    pub point: PointId,
    draft: PointDraft,
    disks: Vec<DiskResult>,
}

impl<'a> Running<'a> {
    /// Begins and uploads, all but what is left for the commit.
    pub fn write(
        customer: &'a Customer,
        name: &str,
        bytes: &[u8],
        full: bool,
    ) -> Result<Self, RepositoryError> {
        Self::write_by(customer, name, full, |begun, kind, base| {
            Self::upload(customer, begun, kind, base, bytes)
        })
    }

    /// A full of a disk that is hole but for its last chunk: however large, it takes no room.
    pub fn write_end(
        customer: &'a Customer,
        name: &str,
        shape: TreeShape,
        last: &[u8],
    ) -> Result<Self, RepositoryError> {
        Self::write_by(customer, name, true, |begun, kind, _| {
            let session = customer.session(begun, trust_of(kind, begun.begun_at))?;
            let reader = Reader::with_index(customer, session.index().clone());
            let mut worker = session.worker()?;
            let draft = DiskDraft::new(shape, None)?;
            let span = draft.span_count() - 1;
            let child = shape.children_of(1, span as u64) - 1;
            let mut writing = draft.begin_span(&reader, &mut ReadScratch::new()?, span)?;
            writing.put(&session, &mut worker, child, last)?;
            draft.end_span(&session, &mut worker, writing)?;
            let disk = session.finish_disk(&mut worker, &disk(), draft, None)?;
            session.retire(worker);
            Ok((session, vec![disk]))
        })
    }

    fn write_by(
        customer: &'a Customer,
        name: &str,
        full: bool,
        upload: impl FnOnce(
            &Begun,
            PointKind,
            Option<PointId>,
        ) -> Result<(Session<'a>, Vec<DiskResult>), RepositoryError>,
    ) -> Result<Self, RepositoryError> {
        customer.refresh()?;
        let vm = vm(name);
        let point = PointId::from_bytes(random_bytes());
        let base = match full {
            true => None,
            false => customer.base(&vm),
        };
        let kind = match base {
            None => PointKind::Full,
            Some(_) => PointKind::Incremental,
        };
        let begun = customer.begin(Purpose::Backup, Some((&vm, point)))?;
        let (session, disks) = match upload(&begun, kind, base) {
            Ok(written) => written,
            Err(error) => return Err(give_up(customer, &begun, error)),
        };
        Ok(Running {
            customer,
            begun,
            session,
            point,
            draft: PointDraft {
                point,
                vm,
                kind,
                base,
                consistency: "test".to_string(),
                notes: Vec::new(),
                definition: None,
                audit: None,
            },
            disks,
        })
    }

    fn upload(
        customer: &'a Customer,
        begun: &Begun,
        kind: PointKind,
        base: Option<PointId>,
        bytes: &[u8],
    ) -> Result<(Session<'a>, Vec<DiskResult>), RepositoryError> {
        let session = customer.session(begun, trust_of(kind, begun.begun_at))?;
        let reader = Reader::with_index(customer, session.index().clone());
        let mut scratch = ReadScratch::new()?;
        let shape = TreeShape {
            size_bytes: bytes.len() as u64,
            chunk_bytes: CHUNK as u32,
        };
        let mut before = Vec::new();
        let row = match base {
            None => None,
            Some(base) => {
                let base = PointReader::open(customer, &base)?;
                before = restore_with(&reader, &base)?;
                base.disks
                    .first()
                    .and_then(|disk| disk.row(&reader, &mut scratch, &shape).transpose())
                    .transpose()?
            }
        };
        let built_on = row.is_some();
        let draft = DiskDraft::new(shape, row)?;
        let mut worker = session.worker()?;
        for span in 0..draft.span_count() {
            let extent = span_extent(&shape, span);
            let (start, end) = (extent.offset as usize, extent.end() as usize);
            if built_on && before.get(start..end) == Some(&bytes[start..end]) {
                continue;
            }
            let mut writing = draft.begin_span(&reader, &mut scratch, span)?;
            for (child, plain) in bytes[start..end].chunks(CHUNK).enumerate() {
                let at = start + child * CHUNK;
                if built_on && before.get(at..at + plain.len()) == Some(plain) {
                    continue;
                }
                writing.put(&session, &mut worker, child % FAN_OUT, plain)?;
            }
            draft.end_span(&session, &mut worker, writing)?;
        }
        let disk = session.finish_disk(&mut worker, &disk(), draft, None)?;
        session.retire(worker);
        Ok((session, vec![disk]))
    }

    pub fn base(&self) -> Option<PointId> {
        self.draft.base
    }

    /// Commits, or gives the session up as a real run would.
    pub fn commit(self) -> Result<Committed, RepositoryError> {
        let (begun, session) = (self.begun, self.session);
        let result = self
            .customer
            .commit(&begun, &session, self.draft, self.disks);
        drop(session);
        result.map_err(|error| give_up(self.customer, &begun, error))
    }
}

/// Aborts unless the outcome is unknown. Returns what failed first.
fn give_up(customer: &Customer, begun: &Begun, error: RepositoryError) -> RepositoryError {
    if error.kind != RepositoryErrorKind::Uncertain {
        let _second = customer.abort(&begun.id, "a test");
    }
    error
}

pub fn backup(
    customer: &Customer,
    name: &str,
    bytes: &[u8],
    full: bool,
) -> (PointId, Result<Committed, RepositoryError>) {
    match Running::write(customer, name, bytes, full) {
        Ok(running) => (running.point, running.commit()),
        Err(error) => (PointId::from_bytes([0; 16]), Err(error)),
    }
}

pub fn restore_with(reader: &Reader<'_>, point: &PointReader) -> Result<Vec<u8>, RepositoryError> {
    let mut scratch = ReadScratch::new()?;
    let mut bytes = Vec::new();
    for disk in &point.disks {
        bytes = vec![0; disk.shape().size_bytes as usize];
        let view = disk.view(reader, &mut scratch)?;
        for span in view.data_spans() {
            view.read_span(span, &mut scratch, |offset, plain| {
                let at = offset as usize;
                bytes[at..at + plain.len()].copy_from_slice(plain);
                Ok::<(), RepositoryError>(())
            })?;
        }
    }
    Ok(bytes)
}

pub fn restore(customer: &Customer, point: &PointId) -> Result<Vec<u8>, RepositoryError> {
    let point = PointReader::open(customer, point)?;
    restore_with(&Reader::new(customer)?, &point)
}

/// As a host does it that keeps copies.
pub fn restore_from_copies(
    customer: &Customer,
    point: &PointId,
) -> Result<Vec<u8>, RepositoryError> {
    let point = PointReader::open(customer, point)?;
    restore_with(&Reader::new(customer)?.from_copies(), &point)
}

/// What a test said when it failed.
pub fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
        .unwrap_or_else(|| "it panicked".to_string())
}

/// `FROM..TO` in the environment.
pub fn seeds_of(variable: &str, otherwise: Range<u64>) -> Range<u64> {
    let Ok(seeds) = std::env::var(variable) else {
        return otherwise;
    };
    let (from, to) = seeds.split_once("..").expect("FROM..TO");
    let number = |text: &str| text.trim().parse().expect("a seed is a number");
    number(from)..number(to)
}

/// More would only be the same failure.
const FAILURES_TOLD: usize = 5;

/// Runs each seed, on all cores; says which failed, and how to `repeat` one.
pub fn run_seeds(seeds: Range<u64>, repeat: &str, run: impl Fn(u64) + Sync) {
    let (next, started) = (AtomicU64::new(seeds.start), Instant::now());
    let failed: Mutex<Vec<u64>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(seed))) {
                        eprintln!("seed {seed}: {}", panic_text(panic.as_ref()));
                        let mut failed = failed.lock().expect("no panic while locked");
                        failed.push(seed);
                        if failed.len() >= FAILURES_TOLD {
                            next.store(seeds.end, Ordering::Relaxed);
                        }
                    }
                    if seed % 10_000 == 9_999 {
                        eprintln!("seeds up to {seed}, {} s", started.elapsed().as_secs());
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().expect("no panic while locked");
    println!(
        "seeds {}..{}: {} failed, {:.1} s",
        seeds.start,
        seeds.end,
        failed.len(),
        started.elapsed().as_secs_f64()
    );
    assert!(failed.is_empty(), "repeat with {repeat}: {failed:?}");
}

/// A disk whose chunks are told apart by one number each; 0 is a hole.
pub fn image(chunks: &[u32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(chunks.len() * CHUNK);
    for chunk in chunks {
        let at = bytes.len();
        bytes.resize(at + CHUNK, 0);
        if *chunk != 0 {
            // Does not compress: the sizes of packs follow from the number of chunks.
            let mut hasher = blake3::Hasher::new();
            hasher.update(&chunk.to_le_bytes());
            hasher.finalize_xof().fill(&mut bytes[at..]);
        }
    }
    bytes
}

/// A stream of numbers from a seed that a failing test prints.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Dice(seed)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit.max(1)
    }
}
