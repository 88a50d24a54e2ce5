//! A crash or a lost reply at every storage operation of a backup and of a prune.

use super::super::testing::*;
use super::super::*;
use crate::model::PointId;
use crate::storage::{Fault, Faulty, Snapshot, StorageErrorKind, Verb};
use std::sync::{Arc, PoisonError};

/// Two VMs, some nights, an erased point with scattered dead frames.
fn small_repository() -> (World, Snapshot) {
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

fn rewind(world: &World, snapshot: &Snapshot) {
    world.memory.restore_snapshot(snapshot);
    for host in [&world.host, &world.second] {
        host.heads
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}

type Step = fn(&World, &Customer) -> Result<(), RepositoryError>;

fn one_backup(_: &World, customer: &Customer) -> Result<(), RepositoryError> {
    backup(
        customer,
        "web",
        &image(&[1, 30, 31, 32, 33, 34, 35, 36]),
        false,
    )
    .1?;
    Ok(())
}

fn one_prune(world: &World, customer: &Customer) -> Result<(), RepositoryError> {
    customer.abort_dead_sessions(world.now())?;
    let done = reclaim::reclaim(customer, world.now(), DAY * 4000, false)?;
    customer.note_reclaimed(&done)?;
    sweep(customer, false)?;
    Ok(())
}

fn operations(
    world: &World,
    snapshot: &Snapshot,
    step: Step,
) -> (u64, Vec<crate::storage::Operation>) {
    rewind(world, snapshot);
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_on(store.clone(), &world.host).unwrap();
    let before = store.operations();
    step(world, &customer).unwrap();
    (before, store.log())
}

/// Whatever happened, the next run is clean and everything committed restores.
fn recovers(world: &World, step: Step) {
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
            rewind(&world, &snapshot);
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

fn lose_every_reply(step: Step) {
    let (world, snapshot) = small_repository();
    let (before, log) = operations(&world, &snapshot, step);
    for line in log.iter().skip(before as usize) {
        rewind(&world, &snapshot);
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
        rewind(&world, &snapshot);
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
        rewind(&world, &snapshot);
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
