//! A repository that one host writes: what is under way when a process dies lands beside, never on it.

use super::super::rule::{Off, Rule};
use super::super::testing::*;
use super::super::*;
use crate::format::entry::Body;
use crate::format::names::ObjectRole;
use crate::model::{InstallationId, ObjectName};
use crate::storage::{
    Faulty, Leftover, Listed, Memory, Operation, Storage, StorageError, StorageErrorKind, Survey,
    Verb,
};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Entries of a store, with their bytes.
fn entries(memory: &Memory, customer: &Customer) -> Vec<(ObjectName, Vec<u8>)> {
    let listed = memory.list(&customer.names().ledger_prefix()).unwrap();
    listed
        .into_iter()
        .map(|object| {
            (
                object.name.clone(),
                memory.read(&object.name, u64::MAX).unwrap(),
            )
        })
        .collect()
}

fn begun(customer: &Customer) -> Begun {
    customer
        .begin(crate::format::entry::Purpose::Merge, None)
        .unwrap()
}

/// Another process goes on.
fn next_process(world: &World) {
    world.host.turns().process.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn nights_of_one_host_are_restored_pruned_and_swept() {
    let mut world = World::of_one_host();
    let customer = world.open();
    world.backup(&customer, "web", &image(&[1, 2, 3, 4]), true);
    world.time.pass(DAY);
    let newest = world.backup(&customer, "web", &image(&[1, 2, 3, 9]), false);
    let again = world.open();
    world.check(&again);
    world.erase(&again, newest);
    world.quiesce(&again);
    world.check(&customer);
    for (name, _) in entries(&world.memory, &customer) {
        let role = customer.names().role(&name);
        assert!(matches!(role, ObjectRole::Rival(..)), "{name}");
    }
    let all = Ledger::replay(
        Arc::new(world.memory.clone()),
        crate::format::names::CustomerNames::new(customer.name()),
        |_, verdict| assert_eq!(verdict, Ok(())),
    );
    customer.refresh().unwrap();
    assert_eq!(all.unwrap(), customer.state());
}

#[test]
fn a_turn_that_follows_on_one_that_ended_writes_no_seal() {
    let mut world = World::of_one_host();
    let customer = world.open();
    world.backup(&customer, "web", &image(&[1]), true);
    let count = |kind: &str| {
        let mut count = 0;
        let storage = Arc::new(world.memory.clone());
        Ledger::replay(storage, customer.names().clone(), |entry, _| {
            count += usize::from(entry.body.kind() == kind);
        })
        .unwrap();
        count
    };
    let seals = count("seal");
    begun(&customer);
    assert_eq!(count("seal"), seals);
    let before = customer.with_state(|state| state.seq);
    next_process(&world);
    customer
        .append(|state| {
            Ok(Body::Policy(crate::format::entry::PolicyBody {
                terms: terms_map(state.terms.as_ref().unwrap()),
            }))
        })
        .unwrap();
    assert_eq!(count("seal"), seals + 1);
    assert_eq!(customer.with_state(|state| state.seq), before + 2);
}

/// A process dies with its commit under way; the next one gives its session up and removes its objects;
/// then the commit lands. Says whether the commit counts.
fn late_commit_counts() -> bool {
    let world = World::of_one_host();
    let customer = world.open();
    let running = Running::write(&customer, "web", &image(&[1, 2, 3]), true).unwrap();
    let (session, point) = (running.begun.id, running.point);
    let before = world.memory.snapshot();
    let seq = customer.with_state(|state| state.seq);
    running.commit().unwrap();
    let (late, bytes) = entries(&world.memory, &customer)
        .into_iter()
        .find(|(name, _)| {
            matches!(customer.names().role(name), ObjectRole::Rival(at, _) if at == seq + 1)
        })
        .unwrap();
    world.memory.restore_snapshot(&before);
    world.host.forget();
    next_process(&world);
    let next = world.open();
    assert_eq!(next.abort_dead_sessions(world.now()).unwrap(), 1);
    let packs = next.names().session_packs(&session);
    assert_eq!(world.memory.list(&packs).unwrap(), []);
    world.memory.plant(&late, &bytes);
    // On a machine that has seen nothing.
    world.host.forget();
    let reader = world
        .open_unchecked(Arc::new(world.memory.clone()), &world.host)
        .unwrap();
    let counts = reader.with_state(|state| state.points.contains_key(&point));
    if !counts {
        assert!(reader.with_state(|state| state.aborted.contains(&session)));
        assert_eq!(next.state(), reader.state());
        assert!(sweep(&reader, false).unwrap().unexplained.is_empty());
    }
    counts
}

#[test]
fn a_commit_that_lands_beside_a_seal_does_not_count() {
    for _ in 0..16 {
        assert!(!late_commit_counts());
    }
}

#[test]
fn without_the_seal_it_counts_although_its_objects_are_gone() {
    let _off = Off::these(&[Rule::SealFirst]);
    // Which of the two comes first is left to their hashes.
    assert!((0..64).any(|_| late_commit_counts()));
}

#[test]
fn a_rival_that_lands_and_is_gone_on_from_replaces_what_was_read_as_the_end() {
    let mut world = World::of_one_host();
    let customer = world.open();
    world.backup(&customer, "web", &image(&[1]), true);
    let seq = customer.with_state(|state| state.seq);
    let before = world.memory.snapshot();
    let one = begun(&customer);
    let reader = world.open();
    let open = |id| reader.with_state(|state| state.open.contains_key(id));
    assert!(open(&one.id));
    // Another reality, in which another entry took the place and was gone on from.
    world.memory.restore_snapshot(&before);
    world.host.forget();
    next_process(&world);
    let other = world.open();
    let (two, three) = (begun(&other), begun(&other));
    reader.refresh().unwrap();
    assert_eq!(reader.state(), other.state());
    assert!(open(&two.id) && open(&three.id) && !open(&one.id));
    assert_eq!(reader.with_state(|state| state.seq), seq + 3);
    // Who was told that it stands must not go on as if it did.
    let error = customer.refresh().unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Damaged);
}

#[test]
fn another_installation_of_the_host_is_refused_until_it_takes_over() {
    let mut world = World::of_one_host();
    let customer = world.open();
    world.backup(&customer, "web", &image(&[1, 2]), true);
    let first = *lock(&world.host.turns().installation);
    *lock(&world.host.turns().installation) = InstallationId::from_bytes([9; 16]);
    let copy = world.open();
    let refused = || Running::write(&copy, "web", &image(&[1, 3]), false).map(drop);
    let error = refused().unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Refused);
    assert!(error.detail.contains("--take-over"), "{}", error.detail);
    // Reading is everybody's.
    world.check(&copy);
    *lock(&world.host.turns().takes_over) = true;
    refused().unwrap();
    *lock(&world.host.turns().takes_over) = false;
    refused().unwrap();
    *lock(&world.host.turns().installation) = first;
    let error = Running::write(&customer, "web", &image(&[1, 3]), false)
        .map(drop)
        .unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Refused);
}

#[test]
fn two_hosts_that_write_at_once_are_noticed_by_the_one_whose_entries_do_not_count() {
    let mut world = World::of_one_host();
    let customer = world.open();
    world.backup(&customer, "web", &image(&[1]), true);
    let elsewhere = Memory::from_snapshot(&world.memory.snapshot());
    let there = world
        .open_unchecked(Arc::new(elsewhere.clone()), &world.host)
        .unwrap();
    begun(&customer);
    // The copy has written more.
    begun(&there);
    begun(&there);
    for (name, bytes) in entries(&elsewhere, &customer) {
        world.memory.plant(&name, &bytes);
    }
    begun(&there);
    let longest = there.with_state(|state| state.seq);
    for (name, bytes) in entries(&elsewhere, &customer) {
        world.memory.plant(&name, &bytes);
    }
    // What this process wrote does not count any more: it must not go on as if it did.
    world.host.forget();
    let fresh = world
        .open_unchecked(Arc::new(world.memory.clone()), &world.host)
        .unwrap();
    assert_eq!(fresh.with_state(|state| state.seq), longest);
    let known = customer.with_state(|state| Head {
        seq: state.seq,
        hash: state.hash.unwrap(),
    });
    world.host.remember_head(&customer.uid(), known);
    let opened = world.open_unchecked(Arc::new(world.memory.clone()), &world.host);
    let error = opened.map(drop).unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Damaged);
    assert!(error.detail.contains("two hosts"), "{}", error.detail);
}

type Creation = (ObjectName, Vec<u8>);

/// A store whose next creation of an entry never answers, and may land at any time.
#[derive(Clone)]
struct Late {
    memory: Memory,
    is_lost: Arc<Mutex<bool>>,
    on_its_way: Arc<Mutex<Vec<Creation>>>,
}

impl Storage for Late {
    fn create(&self, name: &ObjectName, data: &[u8]) -> Result<(), StorageError> {
        if !*lock(&self.is_lost) {
            return self.memory.create(name, data);
        }
        let mut on_its_way = lock(&self.on_its_way);
        let sent = (name.clone(), data.to_vec());
        if !on_its_way.contains(&sent) {
            on_its_way.push(sent);
        }
        let kind = StorageErrorKind::Transient;
        Err(StorageError::new(kind, name, "no answer"))
    }

    fn read(&self, name: &ObjectName, max_bytes: u64) -> Result<Vec<u8>, StorageError> {
        self.memory.read(name, max_bytes)
    }

    fn read_range(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StorageError> {
        self.memory.read_range(name, offset, buffer)
    }

    fn size_bytes(&self, name: &ObjectName) -> Result<u64, StorageError> {
        self.memory.size_bytes(name)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>, StorageError> {
        self.memory.list(prefix)
    }

    fn delete(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.memory.delete(name)
    }

    fn destroy(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.memory.destroy(name)
    }

    fn sweep_leftovers(&self, prefix: &str) -> Result<Vec<Leftover>, StorageError> {
        self.memory.sweep_leftovers(prefix)
    }

    fn survey(&self, prefix: &str) -> Result<Survey, StorageError> {
        self.memory.survey(prefix)
    }

    fn location(&self) -> String {
        "late".to_string()
    }
}

/// Processes that write, die with entries on their way, and go on; entries that land whenever they will.
/// What was acknowledged counts for every reader from then on.
fn processes(seed: u64) {
    let mut dice = Dice::new(seed);
    let world = World::of_one_host();
    let store = Late {
        memory: world.memory.clone(),
        is_lost: Arc::default(),
        on_its_way: Arc::default(),
    };
    let open = || {
        world
            .open_unchecked(Arc::new(store.clone()), &world.host)
            .unwrap()
    };
    let mut living: Vec<(u64, Customer)> = vec![(0, open())];
    let mut processes = 1;
    let mut acknowledged: Vec<crate::model::SessionId> = Vec::new();
    for _ in 0..60 {
        match dice.below(8) {
            0 => {
                living.push((processes, open()));
                processes += 1;
            }
            1 | 2 => {
                let mut on_its_way = lock(&store.on_its_way);
                if !on_its_way.is_empty() {
                    let at = dice.below(on_its_way.len() as u64) as usize;
                    let (name, bytes) = on_its_way.remove(at);
                    drop(on_its_way);
                    world.memory.plant(&name, &bytes);
                }
            }
            what => {
                let at = dice.below(living.len() as u64) as usize;
                let process = living[at].0;
                world.host.turns().process.store(process, Ordering::Relaxed);
                // The first or the second entry of a turn gets lost.
                let lost = what == 3 || what == 4;
                let id = crate::model::SessionId::from_bytes(std::array::from_fn(|_| {
                    dice.below(256) as u8
                }));
                *lock(&store.is_lost) = what == 3;
                let begun = living[at].1.append(|_| {
                    *lock(&store.is_lost) = lost;
                    Ok(Body::Begin(crate::format::entry::BeginBody {
                        session: id,
                        purpose: crate::format::entry::Purpose::Merge,
                        vm: None,
                        point: None,
                        expires_at: None,
                        deadline: None,
                    }))
                });
                *lock(&store.is_lost) = false;
                match begun {
                    Ok(_) => acknowledged.push(id),
                    // It dies, or goes on although it does not know.
                    Err(error) => {
                        assert_eq!(error.kind, RepositoryErrorKind::Uncertain, "{error}");
                        if dice.below(2) == 0 {
                            living.remove(at);
                        }
                    }
                }
                if living.is_empty() {
                    living.push((processes, open()));
                    processes += 1;
                }
            }
        }
        if dice.below(4) == 0 {
            let reader = open();
            reader.with_state(|state| {
                for id in &acknowledged {
                    assert!(state.open.contains_key(id), "seed {seed}: {id} is lost");
                }
            });
        }
    }
}

#[test]
fn whatever_lands_whenever_what_was_acknowledged_counts() {
    let repeat = "VMKEEP_TURNS=N..N+1 cargo test --lib whatever_lands_whenever";
    run_seeds(seeds_of("VMKEEP_TURNS", 0..400), repeat, processes);
}

#[test]
fn without_the_seal_something_acknowledged_is_lost() {
    let _off = Off::these(&[Rule::SealFirst]);
    let is_lost = |seed| std::panic::catch_unwind(|| processes(seed)).is_err();
    assert!((0..400).any(is_lost));
}

/// A process dies with its commit under way; the next one gives the session up, and dies with both its entries
/// under way; the commit lands, a third process has seen nothing else, goes on from it, and dies. Then all lands
/// but the last entry of the third, which is returned: two chains of one length, and the one with the commit will
/// be the longer.
fn two_ends(world: &World, running: Running<'_>) -> Creation {
    let writer = running.customer;
    next_process(world);
    running.commit().unwrap();
    let commit = entries(&world.memory, writer).pop().unwrap();
    world.memory.delete(&commit.0).unwrap();
    let before = world.memory.snapshot();
    let known = entries(&world.memory, writer);
    let next_writes = |write: &dyn Fn(&Customer)| {
        world.host.forget();
        next_process(world);
        let memory = Arc::new(world.memory.clone());
        write(&world.open_unchecked(memory, &world.host).unwrap());
        let mut written = entries(&world.memory, writer);
        written.retain(|entry| !known.contains(entry) && *entry != commit);
        assert_eq!(written.len(), 2);
        world.memory.restore_snapshot(&before);
        written
    };
    let given_up = next_writes(&|next| {
        next.abort_dead_sessions(world.now()).unwrap();
    });
    world.memory.plant(&commit.0, &commit.1);
    let mut gone_on = next_writes(&|next| drop(begun(next)));
    let late = gone_on.pop().unwrap();
    for (name, bytes) in given_up.iter().chain([&commit]).chain(&gone_on) {
        world.memory.plant(name, bytes);
    }
    world.host.forget();
    next_process(world);
    late
}

/// A sweep of a ledger that gets two ends before its operation `at`, if any; the one with the commit is the longer
/// from operation `later` on, or from the end. Its operations and how much it removed, if it read the other one
/// at first, which is left to their hashes.
fn sweep_of_two_ends(at: Option<usize>, later: Option<usize>) -> Option<(Vec<Operation>, usize)> {
    let world = World::of_one_host();
    let writer = world.open();
    let bytes = image(&[1, 2, 3]);
    let running = Running::write(&writer, "web", &bytes, true).unwrap();
    let (session, point) = (running.begun.id, running.point);
    next_process(&world);
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let sweeper = world.open_unchecked(store.clone(), &world.host).unwrap();
    let read = || {
        world.host.forget();
        let memory = Arc::new(world.memory.clone());
        world.open_unchecked(memory, &world.host).unwrap()
    };
    let before = store.operations() as usize;
    let Some(at) = at else {
        let swept = sweep(&sweeper, false).unwrap();
        return Some((store.log().split_off(before), swept.removed.len()));
    };
    let gate = store.freeze_before((before + at) as u64);
    let (is_given_up, late, swept) = std::thread::scope(|scope| {
        let thread = scope.spawn(|| sweep(&sweeper, false).unwrap());
        assert!(gate.wait_until_reached(Duration::from_secs(10)));
        let late = two_ends(&world, running);
        let is_given_up = read().with_state(|state| state.aborted.contains(&session));
        let later = later.filter(|_| is_given_up);
        let second = later.map(|later| store.freeze_before((before + later) as u64));
        gate.release();
        if let Some(gate) = second {
            assert!(gate.wait_until_reached(Duration::from_secs(10)));
            world.memory.plant(&late.0, &late.1);
            gate.release();
        }
        (is_given_up, late, thread.join().unwrap())
    });
    world.memory.plant(&late.0, &late.1);
    let reader = read();
    if reader.with_state(|state| state.points.contains_key(&point)) {
        let restored = restore(&reader, &point);
        assert!(restored.is_ok_and(|found| found == bytes), "{at} {later:?}");
    }
    is_given_up.then(|| (store.log().split_off(before), swept.removed.len()))
}

#[test]
fn a_sweep_removes_nothing_on_the_word_of_an_end_that_may_still_lose() {
    let tried = |at, later| (0..64).find_map(|_| sweep_of_two_ends(at, later)).unwrap();
    let last_entry = |log: &[Operation]| {
        let at = log.iter().rposition(|line| line.verb == Verb::Create);
        at.unwrap() + 1
    };
    // What it reads first is made to count.
    assert!(tried(Some(1), None).1 > 0);
    // And so is what it finds when that is done and it reads on.
    let (log, _) = tried(None, None);
    let at = last_entry(&log) + 1;
    let (log, removed) = tried(Some(at), None);
    assert!(removed > 0);
    // Nothing is removed either on the word of what has lost by the time that the end is made to count.
    for later in at + 1..=last_entry(&log) {
        tried(Some(at), Some(later));
    }
}

#[test]
fn two_that_make_the_customer_at_once_leave_one_that_is_whole() {
    let time = Time::new();
    let (memory, host) = (Memory::new(), TestHost::new(&time));
    let storage: Arc<dyn Storage> = Arc::new(memory.clone());
    let name = customer_name();
    let terms = crate::policy::PolicyTerms::default();
    let new = NewCustomer {
        repository: crate::model::RepositoryId::from_bytes([1; 16]),
        name: &name,
        host: host.body(),
        recipients: vec![host.identity.recipient()],
        terms: &terms,
        writers: crate::model::Writers::One,
    };
    // Both have seen that there is none; then each writes its genesis.
    let names = crate::format::names::CustomerNames::new(&name);
    let names = names.written_by(crate::model::Writers::One);
    let mut late = Ledger::empty(storage.clone(), names);
    Customer::create(&storage, &new, &*host).unwrap();
    host.turns().process.fetch_add(1, Ordering::Relaxed);
    let uid = crate::model::CustomerUid::from_bytes([2; 16]);
    let error = late
        .append(&*host, uid, |state, _| {
            assert_ne!(state.seq, 0);
            Err(RepositoryError::new(
                RepositoryErrorKind::AlreadyExists,
                "",
                "",
            ))
        })
        .unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::AlreadyExists);
    Customer::create(&storage, &new, &*host).unwrap();
    let settings = WriteSettings::default();
    let repository = new.repository;
    let opened = Customer::open(
        storage,
        &name,
        repository,
        &host.identity,
        host.clone(),
        settings,
    );
    assert_eq!(opened.unwrap().state().voids, []);
}

#[test]
fn nobody_else_is_let_in_and_entries_of_the_other_kind_are_told() {
    let world = World::of_one_host();
    let customer = world.open();
    let body = world.second.body();
    let error = customer
        .append(|_| Ok(Body::Host(body.clone())))
        .unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Superseded);
    world.memory.plant(&customer.names().ledger(2), b"plain");
    let swept = sweep(&customer, false).unwrap();
    assert_eq!(swept.unexplained.len(), 1, "{:?}", swept.unexplained);
    // And the other way round.
    let world = World::new();
    let customer = world.open();
    let hash = crate::model::EntryHash::from_bytes([1; 32]);
    world
        .memory
        .plant(&customer.names().rival(2, &hash), b"hashed");
    let swept = sweep(&customer, false).unwrap();
    assert_eq!(swept.unexplained.len(), 1, "{:?}", swept.unexplained);
    // Where many write vmkeep makes no such name: asked to, it goes as anything foreign does.
    let swept = sweep(&customer, true).unwrap();
    assert_eq!((swept.removed.len(), swept.unexplained.len()), (1, 0));
    let seal = crate::format::entry::SealBody {
        installation: InstallationId::from_bytes([1; 16]),
    };
    let error = customer
        .append(|_| Ok(Body::Seal(seal.clone())))
        .unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Superseded);
}
