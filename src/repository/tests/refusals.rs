//! A reclaim and a merge whose own entry fails, or whose session somebody else ends.

use super::super::testing::*;
use super::super::*;
use super::crashes::{Step, operations, small_repository};
use crate::format::entry::Body;
use crate::storage::{Fault, Faulty, Snapshot, StorageErrorKind, Verb};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

#[derive(Clone, Copy)]
enum Work {
    Reclaim,
    Merge,
}

impl Work {
    fn step(self) -> Step {
        match self {
            Work::Reclaim => |world, customer| {
                reclaim::reclaim(customer, world.now(), DAY * 4000, false).map(|_| ())
            },
            Work::Merge => |_, customer| reclaim::merge_segments(customer).map(|_| ()),
        }
    }

    /// Dead frames for a reclaim; and for a merge a pack that is deleted and not forgotten.
    fn ready(self) -> (World, Snapshot) {
        let (world, snapshot) = small_repository();
        match self {
            Work::Reclaim => (world, snapshot),
            Work::Merge => {
                let customer = world.open();
                let done = reclaim::reclaim(&customer, world.now(), DAY * 4000, false).unwrap();
                customer.note_reclaimed(&done).unwrap();
                let snapshot = world.memory.snapshot();
                (world, snapshot)
            }
        }
    }
}

/// The operation that creates the entry for which the first session of this work was begun.
fn own_entry(world: &World, snapshot: &Snapshot, work: Work) -> u64 {
    let (before, log) = operations(world, snapshot, work.step());
    let entries = log.iter().filter(|line| {
        line.number > before && line.verb == Verb::Create && line.name.contains("/ledger/")
    });
    // The first begins the session.
    entries.map(|line| line.number).nth(1).unwrap()
}

/// How the work ends with these failures, and how many sessions are open then.
fn ends(work: Work, failures: &[StorageErrorKind]) -> (RepositoryErrorKind, usize) {
    let (world, snapshot) = work.ready();
    let at = own_entry(&world, &snapshot, work);
    world.rewind(&snapshot);
    let store = Arc::new(Faulty::new(world.memory.clone()));
    for (kind, at) in failures.iter().zip(at..) {
        store.add(Fault::FailBefore { at, kind: *kind });
    }
    let customer = world.open_on(store, &world.host).unwrap();
    let error = work.step()(&world, &customer).unwrap_err();
    let open = world.open_second().with_state(|state| state.open.len());
    (error.kind, open)
}

#[test]
fn a_session_is_given_up_when_its_entry_is_refused_and_not_when_it_may_stand() {
    let (lost, denied) = (StorageErrorKind::Transient, StorageErrorKind::Denied);
    let refused = RepositoryErrorKind::Storage(denied);
    for work in [Work::Reclaim, Work::Merge] {
        assert_eq!(ends(work, &[denied]), (refused, 0));
        let uncertain = RepositoryErrorKind::Uncertain;
        assert_eq!(ends(work, &[lost, denied]), (uncertain, 1));
    }
}

/// How the work ends when another host ends its session before its entry, and from then on
/// operation `refused` is refused, counted from that entry.
fn ends_when_aborted<T: Send>(
    work: Work,
    run: impl Fn(&World, &Customer) -> T + Sync,
    refused: Option<u64>,
) -> (T, World) {
    let (world, snapshot) = work.ready();
    let at = own_entry(&world, &snapshot, work);
    world.rewind(&snapshot);
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_on(store.clone(), &world.host).unwrap();
    let other = world.open_second();
    let gate = store.freeze_before(at);
    if let Some(after) = refused {
        let kind = StorageErrorKind::Denied;
        store.add(Fault::FailBefore {
            at: at + after,
            kind,
        });
    }
    let result = std::thread::scope(|scope| {
        let thread = scope.spawn(|| run(&world, &customer));
        assert!(gate.wait_until_reached(Duration::from_secs(10)));
        other.refresh().unwrap();
        let open = other.with_state(|state| *state.open.keys().next().unwrap());
        other.abort(&open, "taken for dead").unwrap();
        gate.release();
        thread.join().unwrap()
    });
    (result, world)
}

#[test]
fn a_reclaim_whose_session_is_ended_by_another_begins_anew() {
    let (result, world) = ends_when_aborted(Work::Reclaim, Work::Reclaim.step(), None);
    result.unwrap();
    world.quiesce(&world.open());
    world.check(&world.open());
}

#[test]
fn a_reclaim_whose_sessions_all_end_leaves_the_rest_to_the_next_prune() {
    let (world, snapshot) = small_repository();
    // By which operations it enters what another has ended; each run finds the next one.
    let mut ended: Vec<u64> = Vec::new();
    for _ in 0..8 {
        world.rewind(&snapshot);
        let store = Arc::new(Faulty::new(world.memory.clone()));
        let customer = world.open_on(store.clone(), &world.host).unwrap();
        let other = world.open_second();
        let last = ended.last().copied().unwrap_or(store.operations());
        let gates: Vec<_> = ended.iter().map(|at| store.freeze_before(*at)).collect();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| Work::Reclaim.step()(&world, &customer));
            for gate in gates {
                assert!(gate.wait_until_reached(Duration::from_secs(10)));
                other.refresh().unwrap();
                let open = other.with_state(|state| *state.open.keys().next().unwrap());
                other.abort(&open, "taken for dead").unwrap();
                gate.release();
            }
            thread.join().unwrap().unwrap();
        });
        let log = store.log();
        let mut entries = log.iter().filter(|line| {
            line.number > last && line.verb == Verb::Create && line.name.contains("/ledger/")
        });
        match entries.nth(1) {
            Some(entry) => ended.push(entry.number),
            None => break,
        }
    }
    assert_eq!(ended.len(), 6);
}

#[test]
fn a_merge_whose_session_is_ended_by_another_merges_nothing() {
    let merge = |_: &World, customer: &Customer| reclaim::merge_segments(customer);
    let (merged, world) = ends_when_aborted(Work::Merge, merge, None);
    assert!(!merged.unwrap());
    assert!(reclaim::merge_segments(&world.open()).unwrap());
    world.check(&world.open());
}

#[test]
fn a_store_that_refuses_while_a_session_is_given_up_is_told() {
    for work in [Work::Reclaim, Work::Merge] {
        // Reading back the slot, reading on twice, and reading on once more to abort.
        for refused in 1..=4 {
            let (result, _) = ends_when_aborted(work, work.step(), Some(refused));
            assert!(result.is_err(), "operation {refused} after the entry");
        }
    }
}

#[test]
fn a_merge_that_another_forestalls_gives_its_session_up() {
    let (world, snapshot) = Work::Merge.ready();
    let at = own_entry(&world, &snapshot, Work::Merge);
    world.rewind(&snapshot);
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_on(store.clone(), &world.host).unwrap();
    let other = world.open_second();
    let gate = store.freeze_before(at);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| reclaim::merge_segments(&customer));
        assert!(gate.wait_until_reached(Duration::from_secs(10)));
        assert!(reclaim::merge_segments(&other).unwrap());
        gate.release();
        assert!(!thread.join().unwrap().unwrap());
    });
    assert!(customer.with_state(|state| state.open.is_empty()));
    world.check(&other);
}

#[test]
fn a_reclaim_that_another_forestalls_condemns_nothing_again() {
    let (world, snapshot) = Work::Reclaim.ready();
    let at = own_entry(&world, &snapshot, Work::Reclaim);
    world.rewind(&snapshot);
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_on(store.clone(), &world.host).unwrap();
    let other = world.open_second();
    let gate = store.freeze_before(at);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| Work::Reclaim.step()(&world, &customer));
        assert!(gate.wait_until_reached(Duration::from_secs(10)));
        Work::Reclaim.step()(&world, &other).unwrap();
        gate.release();
        thread.join().unwrap().unwrap();
    });
    let mut condemned = Vec::new();
    let storage = Arc::new(world.memory.clone());
    Ledger::replay(storage, customer.names().clone(), |entry, _| {
        if let Body::Condemn(body) = &entry.body {
            condemned.extend(body.packs.iter().copied());
        }
    })
    .unwrap();
    let once = BTreeSet::from_iter(&condemned).len();
    assert!(once > 1 && once == condemned.len(), "{condemned:?}");
    world.check(&other);
}

#[test]
fn what_is_rewritten_is_condemned_in_one_entry_and_its_bytes_are_told() {
    let mut world = World::new();
    let customer = world.open();
    // Two packs, of which half dies.
    let dying = world.backup(&customer, "web", &image(&[1, 2, 3, 4, 5, 6, 7, 8]), true);
    world.backup(&customer, "db", &image(&[1, 2, 5, 6]), true);
    world.erase(&customer, dying);
    let size = |world: &World| -> u64 {
        let packs = world.memory.list("customers/acme/packs").unwrap();
        packs.iter().map(|object| object.size_bytes).sum()
    };
    let before = size(&world);
    let done = reclaim::reclaim(&customer, world.now(), DAY * 22, false).unwrap();
    let frames = 4 * CHUNK as u64;
    assert!(done.rewritten_bytes >= frames && done.rewritten_bytes < frames + 4096);
    let freed = before + done.rewritten_bytes - size(&world);
    assert!(done.freed_bytes.abs_diff(freed) < 4096, "{done:?}, {freed}");
    let mut condemned = Vec::new();
    let storage = Arc::new(world.memory.clone());
    Ledger::replay(storage, customer.names().clone(), |entry, _| {
        if let Body::Condemn(body) = &entry.body
            && !body.segments.is_empty()
        {
            condemned.push(body.packs.len());
        }
    })
    .unwrap();
    assert_eq!(condemned, [2]);
    let mark = reclaim::mark_now(&customer, false).unwrap();
    let facts = reclaim::survey(&customer, &mark, world.now()).unwrap();
    assert!(facts.iter().all(|pack| pack.earliest_deadline.is_none()));
}

#[test]
fn a_mark_takes_no_refusal_of_the_store_for_damage() {
    let (world, snapshot) = small_repository();
    let mark: Step = |_, customer| reclaim::mark_now(customer, true).map(|_| ());
    let (before, log) = operations(&world, &snapshot, mark);
    for at in before + 1..=log.len() as u64 {
        world.rewind(&snapshot);
        let kind = StorageErrorKind::Denied;
        let fault = Fault::FailBefore { at, kind };
        let store = Arc::new(Faulty::with_faults(world.memory.clone(), vec![fault]));
        let customer = world.open_on(store, &world.host).unwrap();
        let error = mark(&world, &customer).unwrap_err();
        assert_eq!(error.kind, RepositoryErrorKind::Storage(kind), "{at}");
    }
}

#[test]
fn a_reclaim_says_up_to_where_its_mark_has_seen_the_ledger() {
    let (world, _) = small_repository();
    let customer = world.open();
    let erased = customer.with_state(|state| state.seq);
    let done = reclaim::reclaim(&customer, world.now(), DAY * 22, false).unwrap();
    let end = customer.with_state(|state| state.seq);
    assert!(
        (erased..=end).contains(&done.marked_at),
        "{}",
        done.marked_at
    );
}

#[test]
fn a_forced_reclaim_takes_no_refusal_of_the_store_for_damage() {
    let (world, snapshot) = small_repository();
    let forced = |customer: &Customer| reclaim::reclaim(customer, world.now(), DAY * 4000, true);
    let forced_step: Step =
        |world, customer| reclaim::reclaim(customer, world.now(), DAY * 4000, true).map(|_| ());
    let (before, log) = operations(&world, &snapshot, forced_step);
    let mut refused = 0;
    for at in before + 1..=log.len() as u64 {
        world.rewind(&snapshot);
        let kind = StorageErrorKind::Denied;
        let fault = Fault::FailBefore { at, kind };
        let store = Arc::new(Faulty::with_faults(world.memory.clone(), vec![fault]));
        let customer = world.open_on(store, &world.host).unwrap();
        match forced(&customer) {
            // What is only told, such as the size of what goes, need not be readable.
            Ok(done) => assert_eq!(done.damaged, [], "operation {at}"),
            Err(_) => refused += 1,
        }
        world.check(&world.open_second());
    }
    assert!(refused > 10);
}

#[test]
fn what_is_deleted_and_not_yet_forgotten_is_not_deleted_again() {
    let (world, _) = small_repository();
    let customer = world.open();
    let reclaimed = || {
        let done = reclaim::reclaim(&customer, world.now(), DAY * 4000, false).unwrap();
        customer.note_reclaimed(&done).unwrap();
        done.removed.len()
    };
    assert!(reclaimed() > 0);
    assert_eq!(reclaimed(), 0);
}
