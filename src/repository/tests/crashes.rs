//! A crash or a lost reply at every storage operation of a backup and of a prune.

use super::super::testing::*;
use super::super::*;
use crate::model::PointId;
use crate::storage::{Fault, Faulty, Snapshot, StorageErrorKind, Verb};
use std::sync::Arc;

/// Two VMs, some nights, an erased point with scattered dead frames.
pub(super) fn small_repository() -> (World, Snapshot) {
    let mut world = World::new();
    let customer = world.open();
    let dying = world.backup(&customer, "web", &image(&[1, 2, 3, 4, 5, 6, 7, 8]), true);
    world.backup(&customer, "db", &image(&[20, 21, 22]), true);
    world.time.pass(DAY);
    world.backup(&customer, "web", &image(&[1, 9, 3, 10, 5, 6, 7, 8]), false);
    world.time.pass(DAY);
    world.backup(&customer, "web", &image(&[1, 9, 3, 11, 5, 12, 7, 8]), false);
    world.erase(&customer, dying);
    let snapshot = world.memory.snapshot();
    (world, snapshot)
}

pub(super) type Step = fn(&World, &Customer) -> Result<(), RepositoryError>;

pub(super) fn one_backup(_: &World, customer: &Customer) -> Result<(), RepositoryError> {
    backup(
        customer,
        "web",
        &image(&[1, 30, 31, 32, 33, 34, 35, 36]),
        false,
    )
    .1?;
    Ok(())
}

pub(super) fn one_prune(world: &World, customer: &Customer) -> Result<(), RepositoryError> {
    customer.abort_dead_sessions(world.now())?;
    let done = reclaim::reclaim(customer, world.now(), DAY * 4000, false)?;
    customer.note_reclaimed(&done)?;
    sweep(customer, false)?;
    Ok(())
}

pub(super) fn operations(
    world: &World,
    snapshot: &Snapshot,
    step: Step,
) -> (u64, Vec<crate::storage::Operation>) {
    world.rewind(snapshot);
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_on(store.clone(), &world.host).unwrap();
    let before = store.operations();
    step(world, &customer).unwrap();
    (before, store.log())
}

/// Whatever happened, the next run is clean and everything committed restores.
pub(super) fn recovers(world: &World, step: Step) {
    let customer = world.open();
    world.check(&customer);
    customer.abort_dead_sessions(world.now()).unwrap();
    step(world, &customer).unwrap();
    world.check(&customer);
    no_false_certificate(world, &customer);
    world.quiesce(&customer);
    world.check(&world.open_second());
}

fn crash_everywhere(step: Step) {
    let (world, snapshot) = small_repository();
    let (before, log) = operations(&world, &snapshot, step);
    for at in before + 1..=log.len() as u64 {
        for applied in [false, true] {
            world.rewind(&snapshot);
            let fault = Fault::CrashAt { at, applied };
            let store = Arc::new(Faulty::with_faults(world.memory.clone(), vec![fault]));
            let customer = world.open_on(store.clone(), &world.host).unwrap();
            let result = step(&world, &customer);
            assert!(result.is_err() || !store.crashed(), "operation {at}");
            drop(customer);
            recovers(&world, step);
        }
    }
}

#[test]
fn a_crash_at_any_operation_of_a_backup_leaves_what_the_next_run_cleans() {
    crash_everywhere(one_backup);
}

#[test]
fn a_crash_at_any_operation_of_a_prune_leaves_what_the_next_run_cleans() {
    crash_everywhere(one_prune);
}

/// The index is merged: the prune before it left segments that list what is gone.
fn one_merge(world: &World, customer: &Customer) -> Result<(), RepositoryError> {
    let done = reclaim::reclaim(customer, world.now(), DAY * 4000, false)?;
    customer.note_reclaimed(&done)?;
    reclaim::merge_segments(customer)?;
    Ok(())
}

fn one_abort(_: &World, customer: &Customer) -> Result<(), RepositoryError> {
    let running = Running::write(customer, "db", &image(&[40, 41, 42, 43, 44]), true)?;
    let session = running.begun.id;
    drop(running.session);
    customer.abort(&session, "a test")
}

#[test]
fn a_crash_at_any_operation_of_a_merge_leaves_what_the_next_run_cleans() {
    crash_everywhere(one_merge);
}

#[test]
fn a_crash_at_any_operation_of_an_abort_leaves_what_the_next_run_cleans() {
    crash_everywhere(one_abort);
}

/// Every operation of a recovery that meets what a dead session left, after every crash whose
/// number is `first` or a stride further.
fn crash_again(step: Step, first: u64) {
    const STRIDE: u64 = 4;
    let (world, snapshot) = small_repository();
    let (before, log) = operations(&world, &snapshot, step);
    let mut runs = 0;
    for at in (before + 1 + first..=log.len() as u64).step_by(STRIDE as usize) {
        world.rewind(&snapshot);
        let crash = |at| Fault::CrashAt {
            at,
            applied: at % 2 == 0,
        };
        let store = Arc::new(Faulty::with_faults(world.memory.clone(), vec![crash(at)]));
        let customer = world.open_on(store, &world.host).unwrap();
        let _died = step(&world, &customer);
        drop(customer);
        let left = world.memory.snapshot();
        let (opened, recovery) = operations(&world, &left, one_prune);
        for again in opened + 1..=recovery.len() as u64 {
            world.rewind(&left);
            let store = Arc::new(Faulty::with_faults(
                world.memory.clone(),
                vec![crash(again)],
            ));
            let customer = world.open_on(store, &world.host).unwrap();
            let _died = one_prune(&world, &customer);
            drop(customer);
            recovers(&world, one_prune);
            runs += 1;
        }
    }
    println!("{runs} crashes of a recovery");
}

#[test]
fn a_crash_while_the_crash_of_a_backup_is_recovered_from_loses_nothing() {
    (0..4).for_each(|first| crash_again(one_backup, first));
}

#[test]
fn a_crash_while_the_crash_of_a_prune_is_recovered_from_loses_nothing() {
    // Every fourth crash of the prune; the recovery is crashed at each of its operations.
    crash_again(one_prune, 0);
}

#[test]
fn a_crash_while_the_crash_of_a_merge_is_recovered_from_loses_nothing() {
    crash_again(one_merge, 1);
}

#[test]
fn a_crash_while_the_crash_of_an_abort_is_recovered_from_loses_nothing() {
    (0..2).for_each(|first| crash_again(one_abort, first));
}

/// The same in a real directory: what a crash leaves there is read back, and recovered from.
fn crash_in_a_directory(step: Step) {
    use crate::storage::{Directory, Memory, Storage};
    let (world, snapshot) = small_repository();
    let (before, log) = operations(&world, &snapshot, step);
    let empty = Memory::new().snapshot();
    for at in before + 1..=log.len() as u64 {
        world.rewind(&snapshot);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("store");
        let directory = Arc::new(Directory::init(&path, 0).unwrap());
        for object in world.memory.list("").unwrap() {
            let bytes = world.memory.read(&object.name, u64::MAX).unwrap();
            directory.create(&object.name, &bytes).unwrap();
        }
        let fault = Fault::CrashAt {
            at,
            applied: at % 2 == 0,
        };
        let store = Arc::new(Faulty::with_faults(directory, vec![fault]));
        let customer = world.open_on(store, &world.host).unwrap();
        let _died = step(&world, &customer);
        drop(customer);
        let directory = Directory::open(&path).unwrap();
        directory.sweep_leftovers("").unwrap();
        assert_eq!(directory.leftovers("").unwrap(), []);
        world.memory.restore_snapshot(&empty);
        for object in directory.list("").unwrap() {
            let bytes = directory.read(&object.name, u64::MAX).unwrap();
            world.memory.plant(&object.name, &bytes);
        }
        recovers(&world, step);
    }
}

#[test]
fn a_crash_at_any_operation_of_a_backup_in_a_directory_leaves_what_the_next_run_cleans() {
    crash_in_a_directory(one_backup);
}

#[test]
fn a_crash_at_any_operation_of_a_prune_in_a_directory_leaves_what_the_next_run_cleans() {
    crash_in_a_directory(one_prune);
}

fn lose_every_reply(step: Step) {
    let (world, snapshot) = small_repository();
    let (before, log) = operations(&world, &snapshot, step);
    for line in log.iter().skip(before as usize) {
        world.rewind(&snapshot);
        let fault = Fault::FailAfter { at: line.number };
        let store = Arc::new(Faulty::with_faults(world.memory.clone(), vec![fault]));
        let customer = world.open_on(store, &world.host).unwrap();
        let points = customer.with_state(|state| state.points.len());
        let result = step(&world, &customer);
        if line.verb == Verb::Create {
            // A creation whose reply was lost is repeated until the answer is known.
            result.unwrap();
            if step as usize == one_backup as Step as usize {
                assert_eq!(customer.with_state(|state| state.points.len()), points + 1);
            }
        }
        drop(customer);
        recovers(&world, step);
    }
}

#[test]
fn a_lost_reply_at_any_operation_of_a_backup_commits_once_or_fails_cleanly() {
    lose_every_reply(one_backup);
}

#[test]
fn a_lost_reply_at_any_operation_of_a_prune_loses_nothing() {
    lose_every_reply(one_prune);
}

#[test]
fn a_store_out_of_reach_is_never_taken_for_damage_even_under_force() {
    let (world, snapshot) = small_repository();
    let (before, log) = operations(&world, &snapshot, one_prune);
    for at in before + 1..=log.len() as u64 {
        world.rewind(&snapshot);
        let kind = StorageErrorKind::Transient;
        let fault = Fault::FailBefore { at, kind };
        let store = Arc::new(Faulty::with_faults(world.memory.clone(), vec![fault]));
        let customer = world.open_on(store, &world.host).unwrap();
        let result = reclaim::reclaim(&customer, world.now(), DAY * 4000, true);
        if let Err(error) = result {
            assert!(!error.is_damage(), "operation {at}: {error}");
        }
        drop(customer);
        recovers(&world, one_prune);
    }
}

#[test]
fn a_store_that_fills_up_fails_a_backup_and_stops_no_other_thread_for_ever() {
    let (world, snapshot) = small_repository();
    let (before, log) = operations(&world, &snapshot, one_backup);
    for at in before + 1..=log.len() as u64 {
        world.rewind(&snapshot);
        let store = Arc::new(Faulty::new(world.memory.clone()));
        let customer = world.open_on(store.clone(), &world.host).unwrap();
        store.add(Fault::FullFrom { at });
        // Many workers, and packs that wait: none may hang, and all say why.
        let Ok(begun) = customer.begin(
            crate::format::entry::Purpose::Backup,
            Some((&vm("big"), PointId::from_bytes([9; 16]))),
        ) else {
            continue;
        };
        let session = customer.session(&begun, Trust::Index).unwrap();
        let errors: Vec<RepositoryError> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4u32)
                .map(|thread| {
                    let session = &session;
                    scope.spawn(move || {
                        let mut worker = session.worker()?;
                        for n in 0..24 {
                            let plain = image(&[10_000 + thread * 100 + n]);
                            session.put(&mut worker, crate::model::PieceKind::Chunk, &plain)?;
                        }
                        session.retire(worker);
                        Ok::<(), RepositoryError>(())
                    })
                })
                .collect();
            let results = threads.into_iter().map(|thread| thread.join().unwrap());
            results.filter_map(Result::err).collect()
        });
        let full = RepositoryErrorKind::Storage(StorageErrorKind::Full);
        assert!(errors.iter().all(|error| error.kind == full), "{errors:?}");
        assert_eq!(session.finish().err().map(|error| error.kind), Some(full));
        drop(session);
        drop(begun);
        drop(customer);
        recovers(&world, one_prune);
        if at > before + 12 {
            break;
        }
    }
}
