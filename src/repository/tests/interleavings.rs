//! Named interleavings: two hosts, cut where it hurts.

use super::super::testing::*;
use super::super::*;
use super::damage::packs_of;
use crate::format::entry::Body;
use crate::format::pack::{self, PackKind};
use crate::model::PointId;
use crate::model::{ObjectName, PieceKind};
use crate::storage::{Fault, Faulty, Memory, Operation, Snapshot, Verb};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

#[test]
fn an_incremental_whose_base_is_erased_and_pruned_meanwhile_does_not_commit() {
    let mut world = World::new();
    let (writer, pruner) = (world.open(), world.open_second());
    let base = world.backup(&writer, "web", &image(&[1, 2, 3, 4, 5, 6]), true);
    world.time.pass(DAY);
    let running = Running::write(&writer, "web", &image(&[1, 2, 3, 4, 5, 9]), false).unwrap();
    world.erase(&pruner, base);
    world.quiesce_others(&pruner);
    let error = running.commit().unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Superseded);
    world.check(&writer);
    world.quiesce(&pruner);
    assert!(world.packs().is_empty());
}

#[test]
fn a_full_that_relied_on_a_pack_that_was_condemned_whole_does_not_commit() {
    let mut world = World::new();
    let (writer, pruner) = (world.open(), world.open_second());
    let dying = world.backup(&writer, "web", &image(&[1, 2, 3, 4]), true);
    let running = Running::write(&writer, "db", &image(&[1, 2, 3, 4, 5]), true).unwrap();
    world.erase(&pruner, dying);
    world.quiesce_others(&pruner);
    let error = running.commit().unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Superseded);
    world.quiesce(&pruner);
}

#[test]
fn what_a_writer_relied_on_resolves_again_when_it_was_only_moved() {
    let mut world = World::new();
    let (writer, pruner) = (world.open(), world.open_second());
    let dying = world.backup(&writer, "web", &image(&[1, 2, 3, 4]), true);
    // Keeps chunks 1 and 2 alive.
    world.backup(&writer, "mail", &image(&[1, 2]), true);
    let bytes = image(&[2, 1, 9]);
    let running = Running::write(&writer, "db", &bytes, true).unwrap();
    let before = world.packs();
    world.erase(&pruner, dying);
    world.quiesce_others(&pruner);
    assert!(before.iter().any(|pack| !world.packs().contains(pack)));
    let point = running.point;
    running.commit().unwrap();
    world.model.insert(point, bytes);
    world.check(&writer);
    world.quiesce(&pruner);
    world.check(&pruner);
}

#[test]
fn a_writer_frozen_for_nine_days_fails_cleanly() {
    let mut world = World::new();
    let (writer, pruner) = (world.open(), world.open_second());
    world.backup(&writer, "web", &image(&[1, 2, 3, 4]), true);
    let running = Running::write(&writer, "web", &image(&[1, 2, 3, 7]), false).unwrap();
    world.time.pass(DAY * 9);
    world.prune(&pruner).unwrap();
    let error = running.commit().unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Superseded);
    world.check(&writer);
    // What it uploaded after it was given up.
    world.quiesce(&pruner);
}

#[test]
fn nobody_deduplicates_against_the_packs_of_a_session_that_did_not_commit() {
    let mut world = World::new();
    let (writer, other) = (world.open(), world.open_second());
    let dead = Running::write(&writer, "web", &image(&[1, 2, 3, 4, 5]), true).unwrap();
    let bytes = image(&[1, 2, 3, 4, 5]);
    let running = Running::write(&other, "db", &bytes, true).unwrap();
    drop(dead);
    writer.abort_dead_sessions(world.now()).unwrap();
    sweep(&writer, false).unwrap();
    let point = running.point;
    running.commit().unwrap();
    world.model.insert(point, bytes);
    world.check(&writer);
    world.quiesce(&writer);
}

#[test]
fn late_writes_of_an_aborted_session_and_a_resurrected_record_are_removed_at_every_sweep() {
    let mut world = World::new();
    let customer = world.open();
    let kept = world.backup(&customer, "web", &image(&[1, 2]), true);
    let gone = world.backup(&customer, "web", &image(&[1, 3]), false);
    let record = world
        .memory
        .read(&customer.names().point(&gone), u64::MAX)
        .unwrap();
    let dead = Running::write(&customer, "db", &image(&[4, 5, 6, 7, 8]), true).unwrap();
    let (session, point) = (dead.begun.id, dead.point);
    drop(dead);
    customer.abort_dead_sessions(world.now()).unwrap();
    world.erase(&customer, gone);
    world.quiesce(&customer);
    for _ in 0..2 {
        let hash = crate::model::ObjectHash::from_bytes([7; 32]);
        let late = [
            customer
                .names()
                .pack(&crate::model::PackName { session, hash }),
            customer
                .names()
                .segment(&crate::model::SegmentName { session, hash }),
            customer.names().point(&point),
        ];
        for name in &late {
            world.memory.plant(name, b"late");
        }
        world.memory.plant(&customer.names().point(&gone), &record);
        assert_eq!(sweep(&customer, false).unwrap().removed.len(), 4);
    }
    let foreign = ObjectName::new("customers/acme/key/01.age").unwrap();
    world.memory.plant(&foreign, b"not a key of ours");
    assert_eq!(sweep(&customer, false).unwrap().unexplained.len(), 1);
    assert!(sweep(&customer, true).unwrap().unexplained.is_empty());
    assert!(restore(&customer, &kept).is_ok());
    world.quiesce(&customer);
}

#[test]
fn a_reader_with_the_index_from_before_a_prune_finds_everything_that_lives() {
    let mut world = World::new();
    let (customer, pruner) = (world.open(), world.open_second());
    let dying = world.backup(&customer, "web", &image(&[1, 2, 3, 4, 5, 6]), true);
    let bytes = image(&[1, 9, 3, 9, 5, 9]);
    let point = world.backup(&customer, "web", &bytes, false);
    let old = customer.load_index().unwrap();
    world.erase(&pruner, dying);
    world.quiesce(&pruner);
    let reader = Reader::with_index(&customer, old);
    let opened = PointReader::open(&customer, &point).unwrap();
    let mut scratch = ReadScratch::new().unwrap();
    let view = opened.disks[0].view(&reader, &mut scratch).unwrap();
    let mut found = vec![0; bytes.len()];
    view.read_span(0, &mut scratch, |offset, plain| {
        found[offset as usize..offset as usize + plain.len()].copy_from_slice(plain);
        Ok::<(), RepositoryError>(())
    })
    .unwrap();
    assert!(found == bytes);
}

#[test]
fn a_sweep_that_listed_before_a_commit_removes_nothing_of_it() {
    let mut world = World::new();
    let (writer, sweeper) = (world.open(), world.open_second());
    let bytes = image(&[1, 2, 3, 4, 5]);
    // The index that the sweeper has is older than the session it meets.
    sweeper.load_index().unwrap();
    let running = Running::write(&writer, "web", &bytes, true).unwrap();
    assert_eq!(sweep(&sweeper, true).unwrap().removed, []);
    let point = running.point;
    running.commit().unwrap();
    assert_eq!(sweep(&sweeper, true).unwrap().removed, []);
    world.model.insert(point, bytes);
    world.check(&sweeper);
}

#[test]
fn a_sweep_whose_ledger_went_on_under_it_still_accounts_for_every_pack() {
    let mut world = World::new();
    let other = world.open_second();
    world.backup(&other, "web", &image(&[1, 2, 3, 4, 5]), true);
    let pack = crate::model::PackName {
        session: crate::model::SessionId::from_bytes([8; 16]),
        hash: crate::model::ObjectHash::from_bytes([7; 32]),
    };
    world
        .memory
        .plant(&other.names().pack(&pack), b"of no session");
    let snapshot = world.memory.snapshot();
    let read_of_segment = |store: &Faulty<Memory>| {
        let log = store.log();
        let found = log.iter().find(|line| line.name.contains("/index/"));
        found.map(|line| line.number).unwrap()
    };
    world.rewind(&snapshot);
    let store = Arc::new(Faulty::new(world.memory.clone()));
    sweep(&world.open_on(store.clone(), &world.host).unwrap(), false).unwrap();
    let at = read_of_segment(&store);

    world.rewind(&snapshot);
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_on(store.clone(), &world.host).unwrap();
    let gate = store.freeze_before(at);
    let swept = std::thread::scope(|scope| {
        let thread = scope.spawn(|| sweep(&customer, false).unwrap());
        assert!(gate.wait_until_reached(Duration::from_secs(10)));
        world.backup(&other, "db", &image(&[6, 7]), true);
        // Another thread of the same process, which shares the ledger as last read.
        customer.refresh().unwrap();
        gate.release();
        thread.join().unwrap()
    });
    let removed: Vec<_> = swept
        .removed
        .iter()
        .map(|(object, _)| &object.name)
        .collect();
    assert_eq!(removed, [&other.names().pack(&pack)]);
    world.check(&other);
}

#[test]
fn what_is_too_large_for_a_probe_is_not_taken_for_one() {
    let world = World::new();
    let customer = world.open();
    let probe = |name: &str, size: usize| {
        let name = ObjectName::new(&format!("customers/acme/probe/{name}")).unwrap();
        world.memory.plant(&name, &vec![7; size]);
    };
    probe("of-a-process-that-died", 32);
    assert!(sweep(&customer, false).unwrap().unexplained.is_empty());
    probe("copy-of-a-pack", 5000);
    assert_eq!(sweep(&customer, false).unwrap().unexplained.len(), 1);
}

#[test]
fn a_sweep_at_any_moment_of_wrapping_the_key_anew_takes_no_key_file() {
    let stranger = crate::codec::HostIdentity::generate().unwrap_or_else(|_| panic!("an identity"));
    let recipients = [stranger.recipient()];
    for step in 1..=8 {
        let world = World::new();
        let store = Arc::new(Faulty::new(world.memory.clone()));
        let customer = world.open_on(store.clone(), &world.host).unwrap();
        let sweeper = world.open_second();
        let gate = store.freeze_before(store.operations() + step);
        std::thread::scope(|scope| {
            let wrap = || customer.wrap_key_for(&world.host.identity, &recipients);
            let thread = scope.spawn(wrap);
            let _reached = gate.wait_until_reached(Duration::from_millis(200));
            sweep(&sweeper, true).unwrap();
            gate.release();
            thread.join().unwrap().unwrap();
        });
        for row in &customer.state().keys {
            let name = customer.names().key(row.object);
            let stored = world.memory.read(&name, u64::MAX);
            assert!(stored.is_ok(), "{name} is gone, before step {step}");
        }
    }
}

/// A store with two live copies of a chunk, dead frames beside each, and a point to be erased.
fn two_copies() -> (World, PointId, Snapshot) {
    let mut world = World::new();
    let customer = world.open();
    let (one, two) = (image(&[1, 2, 3, 4, 5]), image(&[1, 6, 7, 8, 9]));
    let first = Running::write(&customer, "web", &one, true).unwrap();
    let second = Running::write(&customer, "db", &two, true).unwrap();
    let dying = [first.point, second.point];
    first.commit().unwrap();
    second.commit().unwrap();
    world.model.insert(dying[0], one);
    world.model.insert(dying[1], two);
    // Chunk 1 and one of each stay.
    world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    world.backup(&customer, "db", &image(&[1, 6]), true);
    world.erase(&customer, dying[0]);
    let snapshot = world.memory.snapshot();
    (world, dying[1], snapshot)
}

/// Stops `frozen` before each of its storage operations in turn, lets `meanwhile` happen, lets it
/// go on; then everything that is live restores, and a prune leaves nothing behind.
fn at_every_operation(
    world: &mut World,
    snapshot: &Snapshot,
    frozen: impl Fn(&World, &Customer) + Sync,
    meanwhile: impl Fn(&World, &Customer),
) {
    let count = |world: &World| {
        let store = Arc::new(Faulty::new(world.memory.clone()));
        let customer = world.open_on(store.clone(), &world.host).unwrap();
        let before = store.operations();
        frozen(world, &customer);
        (before, store.operations())
    };
    world.rewind(snapshot);
    let (before, total) = count(world);
    for at in before + 1..=total {
        world.rewind(snapshot);
        let store: Arc<Faulty<Memory>> = Arc::new(Faulty::new(world.memory.clone()));
        let customer = world.open_on(store.clone(), &world.host).unwrap();
        let other = world.open_second();
        let gate = store.freeze_before(at);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| frozen(world, &customer));
            // Not reached: this time it took fewer operations, which is one more interleaving.
            let _reached = gate.wait_until_reached(Duration::from_millis(200));
            meanwhile(world, &other);
            gate.release();
            thread.join().unwrap();
        });
        world.check(&other);
        no_false_certificate(world, &other);
        world.quiesce(&other);
        world.check(&world.open());
    }
}

#[test]
fn two_reclaimers_with_two_copies_of_a_chunk_never_drop_both() {
    let (mut world, dying, snapshot) = two_copies();
    let reclaim_all = |world: &World, customer: &Customer| {
        let done = reclaim::reclaim(customer, world.now(), DAY * 4000, false);
        match done {
            Ok(done) => {
                customer.note_reclaimed(&done).unwrap();
            }
            Err(error) => assert_eq!(error.kind, RepositoryErrorKind::Superseded, "{error}"),
        }
    };
    at_every_operation(&mut world, &snapshot, reclaim_all, |world, other| {
        world.erase(other, dying);
        reclaim_all(world, other);
    });
}

#[test]
fn an_erasure_at_any_moment_of_a_reclaim_is_never_certified_before_its_bytes_are_gone() {
    let (mut world, dying, snapshot) = two_copies();
    let reclaim_some = |world: &World, customer: &Customer| {
        // No deadline is near: packs that are mostly alive stay, with their dead frames.
        let done = reclaim::reclaim(customer, world.now(), DAY * 20, false).unwrap();
        customer.note_reclaimed(&done).unwrap();
    };
    at_every_operation(&mut world, &snapshot, reclaim_some, |world, other| {
        world.erase(other, dying);
    });
}

/// One pack that holds three chunks that stay, a small one that is dead, and one that only the
/// returned point needs.
fn mostly_alive() -> (World, PointId, Snapshot) {
    let mut world = World::new();
    let customer = world.open();
    let with =
        |small: u8, last: u32| [image(&[1, 2, 5]), vec![small; CHUNK], image(&[last])].concat();
    let dead = world.backup(&customer, "web", &with(7, 3), true);
    let dying = world.backup(&customer, "web", &with(0, 3), false);
    world.backup(&customer, "web", &with(0, 4), false);
    world.erase(&customer, dead);
    let snapshot = world.memory.snapshot();
    (world, dying, snapshot)
}

fn reclaim_within(world: &World, customer: &Customer, budget: jiff::SignedDuration) {
    match reclaim::reclaim(customer, world.now(), budget, false) {
        Ok(done) => {
            customer.note_reclaimed(&done).unwrap();
        }
        Err(error) => assert_eq!(error.kind, RepositoryErrorKind::Superseded, "{error}"),
    }
}

#[test]
fn what_a_frozen_reclaim_copied_is_not_certified_as_gone_while_its_session_is_open() {
    let (mut world, dying, snapshot) = mostly_alive();
    let all = |world: &World, customer: &Customer| reclaim_within(world, customer, DAY * 4000);
    at_every_operation(&mut world, &snapshot, all, |world, other| {
        world.erase(other, dying);
        all(world, other);
        no_false_certificate(world, other);
    });
}

#[test]
fn what_a_reclaim_copied_of_a_point_that_was_erased_meanwhile_is_not_certified_as_gone() {
    let (world, dying, snapshot) = mostly_alive();
    let on = |store: &Arc<Faulty<Memory>>| world.open_on(store.clone(), &world.host).unwrap();
    world.rewind(&snapshot);
    let store = Arc::new(Faulty::new(world.memory.clone()));
    reclaim_within(&world, &on(&store), DAY * 4000);
    let log = store.log();
    let deletion = log.iter().rposition(|line| line.verb == Verb::Delete);
    let condemnation = log[..deletion.unwrap()]
        .iter()
        .rfind(|line| line.verb == Verb::Create && line.name.contains("/ledger/"));
    let condemnation = condemnation.unwrap().number;
    for crash in condemnation + 1..condemnation + 80 {
        world.rewind(&snapshot);
        let store = Arc::new(Faulty::new(world.memory.clone()));
        let (customer, other) = (on(&store), world.open_second());
        // Its clock is ahead: it rewrites for a deadline that is not near for the other.
        let gate = store.freeze_before(condemnation);
        std::thread::scope(|scope| {
            let ahead = || reclaim::reclaim(&customer, world.now(), DAY * 4000, false);
            let thread = scope.spawn(ahead);
            assert!(gate.wait_until_reached(Duration::from_secs(10)));
            world.erase(&other, dying);
            reclaim_within(&world, &other, DAY * 20);
            store.add(Fault::CrashAt {
                at: crash,
                applied: false,
            });
            gate.release();
            let _died = thread.join().unwrap();
        });
        no_false_certificate(&world, &other);
        reclaim_within(&world, &other, DAY * 20);
        no_false_certificate(&world, &other);
        other.abort_dead_sessions(world.now()).unwrap();
        world.open().abort_dead_sessions(world.now()).unwrap();
        world.check(&other);
        world.quiesce(&other);
    }
}

#[test]
fn a_prune_at_any_moment_of_a_backup_leaves_a_point_that_restores_or_none() {
    let (mut world, dying, snapshot) = two_copies();
    let write = |_: &World, customer: &Customer| {
        let (_, _result) = backup(customer, "web", &image(&[1, 2, 8, 9, 30, 31, 32]), false);
    };
    at_every_operation(&mut world, &snapshot, write, |world, other| {
        world.erase(other, dying);
        let done = reclaim::reclaim(other, world.now(), DAY * 4000, false).unwrap();
        other.note_reclaimed(&done).unwrap();
        sweep(other, false).unwrap();
    });
}

#[test]
fn a_merge_at_any_moment_of_a_reclaim_or_a_commit_loses_no_place() {
    let mut world = World::new();
    let customer = world.open();
    let mut points = Vec::new();
    for night in 0..13u32 {
        let bytes = image(&[1, 2, 100 + night]);
        points.push(world.backup(&customer, "web", &bytes, false));
    }
    for point in points.iter().take(4) {
        world.erase(&customer, *point);
    }
    let snapshot = world.memory.snapshot();
    let merge = |_: &World, customer: &Customer| {
        reclaim::merge_segments(customer).unwrap();
    };
    at_every_operation(&mut world, &snapshot, merge, |world, other| {
        let (_, result) = backup(other, "db", &image(&[1, 2, 200]), true);
        result.unwrap();
        let done = reclaim::reclaim(other, world.now(), DAY * 4000, false).unwrap();
        other.note_reclaimed(&done).unwrap();
        reclaim::merge_segments(other).unwrap();
    });
}

#[test]
fn a_mark_knows_the_root_of_a_commit_without_packs_that_overtook_it() {
    let mut world = World::new();
    let customer = world.open();
    let bytes = image(&[1, 2]);
    let dying = world.backup(&customer, "web", &bytes, true);
    world.erase(&customer, dying);
    let snapshot = world.memory.snapshot();
    let tag = customer.keys().tag(
        &customer
            .keys()
            .id(crate::model::PieceKind::Chunk, &bytes[..CHUNK]),
    );
    let marks = |customer: &Customer| {
        let mark = reclaim::mark_now(customer, false).unwrap();
        let known = customer.with_state(|state| state.roots().count() == 1);
        assert_eq!(mark.is_live(&tag).unwrap(), known);
        known
    };
    let open = |world: &World| {
        world.rewind(&snapshot);
        let store = Arc::new(Faulty::new(world.memory.clone()));
        let customer = world.open_on(store.clone(), &world.host).unwrap();
        (store.operations(), store, customer)
    };
    let (before, store, customer) = open(&world);
    assert!(!marks(&customer));
    let mut overtaken = 0;
    for at in before + 1..=store.operations() {
        let (_, store, customer) = open(&world);
        let other = world.open_second();
        let gate = store.freeze_before(at);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| marks(&customer));
            assert!(gate.wait_until_reached(Duration::from_secs(10)));
            backup(&other, "web", &bytes, true).1.unwrap();
            gate.release();
            overtaken += usize::from(thread.join().unwrap());
        });
    }
    assert!(overtaken > 0);
}

#[test]
fn what_is_erased_while_a_mark_looks_for_it_is_no_damage() {
    let mut world = World::new();
    let customer = world.open();
    // The damaged one is looked for first.
    let second = world.backup(&customer, "db", &image(&[3, 4]), true);
    world.time.pass(DAY);
    let dying = world.backup(&customer, "web", &image(&[1, 2]), true);
    world
        .memory
        .plant(&customer.names().point(&dying), b"damaged");
    let is_damage = |customer: &Customer| {
        let damaged = reclaim::mark_now(customer, false).is_err();
        let there = customer.with_state(|state| state.roots().any(|(id, _)| *id == dying));
        assert_eq!(damaged, there);
        damaged
    };
    assert!(is_damage(&world.open()));
    world.meanwhile(
        is_damage,
        |other| {
            world.erase(other, dying);
            world.erase(other, second);
        },
        drop,
    );
}

fn open_all(customer: &Customer) -> Opened {
    open_live(customer, 1, &AtomicBool::new(false), &|_| {}).unwrap()
}

#[test]
fn damage_that_is_met_under_a_point_that_is_erased_meanwhile_is_told_of_the_others() {
    for kind in [PackKind::Data, PackKind::Node] {
        for dying in [0, 1] {
            let mut world = World::new();
            let customer = world.open();
            // The very same tree: whichever point is walked first meets all of it.
            let bytes = image(&[1, 2, 3, 4]);
            let points = ["web", "db"].map(|vm| world.backup(&customer, vm, &bytes, true));
            world.memory.delete(&packs_of(&world, kind)[0]).unwrap();
            let all = open_all(&customer).unreadable.len();
            assert!(all > 0);
            world.meanwhile(
                open_all,
                |other| world.erase(other, points[dying]),
                |opened| {
                    assert!(!opened.damaged.is_empty());
                    assert_eq!(opened.unreadable.len(), all);
                },
            );
        }
    }
}

/// Two points that share half, the shared half stored twice; and one more.
fn points_with_a_piece_twice(world: &mut World) -> [PointId; 3] {
    let (host, other) = (world.open(), world.open_second());
    let one = Running::write(&host, "web", &image(&[1, 2, 3, 4, 5]), true).unwrap();
    let two = Running::write(&other, "db", &image(&[3, 4, 5, 6]), true).unwrap();
    let points = [one.point, two.point];
    one.commit().unwrap();
    two.commit().unwrap();
    let [one, two] = points;
    [one, two, world.backup(&host, "mail", &image(&[6, 7]), true)]
}

#[test]
fn nothing_is_called_damage_that_a_prune_takes_away_while_it_is_verified() {
    for dying in [&[0][..], &[1], &[0, 1], &[0, 2]] {
        for later in [&[][..], &[1, 2, 5, 8]] {
            let mut world = World::new();
            let points = points_with_a_piece_twice(&mut world);
            world.meanwhile(
                |customer| {
                    let opened = open_all(customer);
                    let packs: Vec<_> = customer.load_index().unwrap().packs().to_vec();
                    let names: Vec<_> = packs.iter().map(|info| info.row.name).collect();
                    let stop = AtomicBool::new(false);
                    (
                        opened,
                        scrub_packs(customer, &names, 1, &stop, &|_| {}).unwrap(),
                    )
                },
                |other| {
                    world.erase_all(
                        other,
                        &dying.iter().map(|at| points[*at]).collect::<Vec<_>>(),
                    );
                    world.prune(other).unwrap();
                    if !later.is_empty() {
                        backup(other, "late", &image(later), true).1.unwrap();
                    }
                },
                |(opened, scrubbed)| {
                    assert_eq!(opened.damaged, []);
                    assert_eq!(opened.unreadable, []);
                    assert_eq!(scrubbed.damaged, []);
                    assert!(scrubbed.broken.is_empty());
                },
            );
        }
    }
}

#[test]
fn what_moves_again_while_it_is_looked_for_again_is_no_damage() {
    let mut world = World::new();
    let customer = world.open();
    // The second and the third rest on the pack of the first, which loses a frame with each that dies.
    let dying = [("web", [1, 2, 3]), ("db", [1, 2, 9])]
        .map(|(vm, chunks)| world.backup(&customer, vm, &image(&chunks), true));
    world.backup(&customer, "mail", &image(&[1, 8, 7]), true);
    let place = |tag_of: u32| {
        let keys = customer.keys();
        let tag = keys.tag(&keys.id(PieceKind::Chunk, &image(&[tag_of])));
        let index = customer.load_index().unwrap();
        let place = index.places(&tag).unwrap()[0];
        customer
            .names()
            .pack(&index.pack(place.pack).unwrap().row.name)
    };
    let moved = place(1);
    let snapshot = world.memory.snapshot();
    // At its first reading of that pack both die, the second after a reclaim; before operation `at` is another one.
    let run = |at: Option<u64>| {
        world.rewind(&snapshot);
        let store = Arc::new(Faulty::new(world.memory.clone()));
        let customer = world.open_on(store.clone(), &world.host).unwrap();
        let other = world.open_second();
        let before = store.operations();
        open_all(&customer);
        let reads = |line: &&Operation| line.number > before && line.name == moved.as_str();
        let first = store.log().iter().find(reads).unwrap().number;
        world.rewind(&snapshot);
        let store = Arc::new(Faulty::new(world.memory.clone()));
        let customer = world.open_on(store.clone(), &world.host).unwrap();
        let moments: Vec<u64> = [Some(first), at].into_iter().flatten().collect();
        let gates: Vec<_> = moments.iter().map(|at| store.freeze_before(*at)).collect();
        let opened = std::thread::scope(|scope| {
            let thread = scope.spawn(|| open_all(&customer));
            for (gate, is_first) in gates.into_iter().zip([true, false]) {
                assert!(gate.wait_until_reached(Duration::from_secs(10)));
                if is_first {
                    world.erase(&other, dying[0]);
                }
                let done = reclaim::reclaim(&other, world.now(), DAY * 4000, false).unwrap();
                other.note_reclaimed(&done).unwrap();
                if is_first {
                    world.erase(&other, dying[1]);
                }
                gate.release();
            }
            thread.join().unwrap()
        });
        assert_eq!(opened.unreadable, [], "{moments:?}");
        assert_eq!(opened.damaged, [], "{moments:?}");
        (first, store.operations())
    };
    let (first, last) = run(None);
    for at in first + 1..=last {
        run(Some(at));
    }
}

#[test]
fn a_pack_whose_directory_lists_other_tags_is_not_called_whole() {
    let mut world = World::new();
    let customer = world.open();
    world.backup(&customer, "web", &image(&[1, 2, 3, 4]), true);
    let all = open_all(&customer).whole.len();
    let name = packs_of(&world, PackKind::Data)[0].clone();
    let mut bytes = world.memory.read(&name, u64::MAX).unwrap();
    let end = bytes.len() - pack::TRAILER_BYTES;
    let range = pack::directory_range(&bytes[end..], bytes.len() as u64).unwrap();
    let (start, end) = (range.start as usize, range.end as usize);
    bytes[start] ^= 1;
    let mut hash = blake3::Hasher::new();
    hash.update(&bytes[..pack::HEADER_BYTES]);
    hash.update(&bytes[start..end - 32]);
    bytes[end - 32..end].copy_from_slice(hash.finalize().as_bytes());
    world.memory.plant(&name, &bytes);
    assert!(pack::directory_of(&bytes).is_ok());
    assert_eq!(open_all(&customer).whole.len(), all - 1);
}

#[test]
fn a_full_of_what_is_dead_at_any_moment_of_a_reclaim_restores_or_does_not_commit() {
    let mut world = World::new();
    let customer = world.open();
    let dying = world.backup(&customer, "web", &image(&[1, 2, 3, 4]), true);
    world.backup(&customer, "mail", &image(&[4, 5]), true);
    world.erase(&customer, dying);
    let snapshot = world.memory.snapshot();
    let open = |world: &World| {
        world.rewind(&snapshot);
        let store = Arc::new(Faulty::new(world.memory.clone()));
        let customer = world.open_on(store.clone(), &world.host).unwrap();
        (store.operations(), store, customer)
    };
    let reclaims = |world: &World, customer: &Customer| {
        reclaim::reclaim(customer, world.now(), DAY * 4000, false).unwrap()
    };
    let (before, store, customer) = open(&world);
    reclaims(&world, &customer);
    let mut committed = 0;
    for at in before + 1..=store.operations() {
        let (_, store, customer) = open(&world);
        let other = world.open_second();
        let gate = store.freeze_before(at);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| reclaims(&world, &customer));
            assert!(gate.wait_until_reached(Duration::from_secs(10)));
            let bytes = image(&[1, 2]);
            let (point, result) = backup(&other, "db", &bytes, true);
            gate.release();
            thread.join().unwrap();
            if result.is_ok() {
                committed += 1;
                assert!(restore(&other, &point).unwrap() == bytes, "operation {at}");
            }
        });
        world.check(&world.open());
        // What was condemned although it was needed is rescued, and condemned again.
        let mut condemned = std::collections::BTreeSet::new();
        let storage = Arc::new(world.memory.clone());
        Ledger::replay(storage, customer.names().clone(), |entry, _| {
            if let Body::Condemn(body) = &entry.body {
                let once = body.packs.iter().all(|pack| condemned.insert(*pack));
                assert!(once, "operation {at}");
            }
        })
        .unwrap();
    }
    assert!(committed > 5);
}

#[test]
fn a_stream_of_begins_and_audit_entries_does_not_make_a_reclaim_plan_again() {
    let (world, _, _) = two_copies();
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_on(store.clone(), &world.host).unwrap();
    let other = world.open_second();
    let before = customer.with_state(|state| state.condemned.len());
    // Every entry of the reclaim loses its slot once, to an audit entry.
    let first = store.operations() + 1;
    let gates: Vec<_> = (first..first + 40)
        .map(|at| store.freeze_before(at))
        .collect();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| reclaim::reclaim(&customer, world.now(), DAY * 4000, false));
        for gate in gates {
            let _reached = gate.wait_until_reached(Duration::from_millis(200));
            change_nothing(&other);
            gate.release();
        }
        thread.join().unwrap().unwrap();
    });
    assert!(customer.with_state(|state| state.condemned.len()) > before);
    let aborted = customer.with_state(|state| state.aborted.len());
    assert_eq!(aborted, 0, "a session was given up for an audit entry");
}

fn change_nothing(customer: &Customer) {
    customer
        .append(|_| {
            Ok(Body::Clock(crate::format::entry::ClockBody {
                event: crate::format::entry::ClockEvent::Refused,
                seq: None,
                text: "a test".to_string(),
            }))
        })
        .unwrap();
}

#[test]
fn a_pack_that_a_running_session_relied_on_is_not_forgotten_and_never_committed_upon() {
    let mut world = World::new();
    let (customer, pruner) = (world.open(), world.open_second());
    // Only this point holds the content that the other VM's full will meet.
    let dying = world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    let running = Running::write(&customer, "db", &image(&[1, 2, 3, 4]), true).unwrap();
    world.erase(&pruner, dying);
    let done = reclaim::reclaim(&pruner, world.now(), DAY * 22, false).unwrap();
    assert!(!done.removed.is_empty());
    pruner.note_reclaimed(&done).unwrap();
    while reclaim::merge_segments(&pruner).unwrap() {}
    sweep(&pruner, false).unwrap();
    let error = running.commit().unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Superseded, "{error}");
    world.check(&world.open());
    world.quiesce(&pruner);
    // With the session gone the ledger's state forgets the packs as well.
    while reclaim::merge_segments(&pruner).unwrap() {}
    pruner.refresh().unwrap();
    assert!(pruner.with_state(|state| state.condemned.is_empty()));
}
