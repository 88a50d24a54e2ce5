//! What opening everything that is live with the key tells.

use super::super::testing::*;
use super::super::*;
use super::damage::{pack_name, packs_of};
use crate::format::pack::PackKind;
use crate::model::{FAN_OUT, PackName};
use crate::storage::{Fault, Faulty, Storage, StorageErrorKind, Verb};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

fn open_all(customer: &Customer) -> Result<Opened, RepositoryError> {
    open_live(customer, 2, &AtomicBool::new(false), &|_| {})
}

fn all_packs(world: &World) -> BTreeSet<PackName> {
    world.packs().iter().map(pack_name).collect()
}

#[test]
fn whatever_points_share_is_opened_once_and_each_pack_is_whole() {
    let mut world = World::new();
    let customer = world.open();
    // Two nodes of the lowest level and a root; then one node alone.
    let mut chunks = vec![0; FAN_OUT + 2];
    (chunks[0], chunks[1], chunks[FAN_OUT + 1]) = (1, 2, 3);
    world.backup(&customer, "web", &image(&chunks), true);
    world.backup(&customer, "db", &image(&[1, 2, 9]), true);
    let progress = AtomicU64::new(0);
    let add = |bytes| {
        progress.fetch_add(bytes, Ordering::Relaxed);
    };
    let opened = open_live(&customer, 2, &AtomicBool::new(false), &add).unwrap();
    assert_eq!(opened.frames, 4 + 4);
    let chunks = 4 * CHUNK as u64;
    assert!(opened.bytes > chunks && opened.bytes < chunks + CHUNK as u64);
    assert_eq!(progress.into_inner(), opened.bytes);
    assert_eq!(BTreeSet::from_iter(opened.whole), all_packs(&world));
    assert_eq!((opened.damaged, opened.unreadable), Default::default());
}

#[test]
fn a_pack_is_not_whole_of_which_a_frame_is_dead_or_the_directory_damaged() {
    let mut world = World::new();
    let customer = world.open();
    let dying = world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    let partly_dead = all_packs(&world);
    world.backup(&customer, "web", &image(&[1, 2, 4]), false);
    world.backup(&customer, "db", &image(&[5, 6]), true);
    world.erase(&customer, dying);
    let mut whole = &all_packs(&world) - &partly_dead;
    let told = open_all(&customer).unwrap().whole;
    assert_eq!(BTreeSet::from_iter(told), whole);
    let name = customer.names().pack(whole.first().unwrap());
    let mut bytes = world.memory.read(&name, u64::MAX).unwrap();
    // The directory is in front of the last bytes, which say where it is.
    let at = bytes.len() - crate::format::pack::TRAILER_BYTES - 8;
    bytes[at] ^= 1;
    world.memory.plant(&name, &bytes);
    whole.pop_first();
    let opened = open_all(&customer).unwrap();
    assert_eq!(BTreeSet::from_iter(opened.whole), whole);
    assert_eq!((opened.damaged, opened.unreadable), Default::default());
}

#[test]
fn what_opens_nowhere_is_told_with_its_point_and_what_opens_elsewhere_with_its_pack() {
    let mut world = World::new();
    let customer = world.open();
    let point = world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    let [data] = &packs_of(&world, PackKind::Data)[..] else {
        panic!("one pack of data")
    };
    super::damage::damage(&world, data);
    let opened = open_all(&customer).unwrap();
    assert_eq!(opened.frames, 3);
    assert_eq!(opened.damaged.len(), 1);
    let points: Vec<_> = opened.unreadable.iter().map(|found| found.point).collect();
    assert_eq!(points, [point]);
    // A full that reads the pack stores what is damaged anew.
    world.time.pass(DAY * 9);
    world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    let opened = open_all(&customer).unwrap();
    assert_eq!(opened.frames, 4);
    assert_eq!(opened.unreadable, []);
    assert!(opened.damaged.len() <= 1 && !opened.whole.contains(&pack_name(data)));
    // A record is told as well.
    let record = customer.names().point(&point);
    world.memory.plant(&record, b"damaged");
    let opened = open_all(&customer).unwrap();
    assert_eq!(opened.unreadable.len(), 1);
    assert_eq!(opened.frames, 4);
}

#[test]
fn a_record_that_is_damaged_is_told_where_all_the_rest_opens() {
    let mut world = World::new();
    let customer = world.open();
    let point = world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    world.backup(&customer, "db", &image(&[1, 2, 3]), true);
    let record = customer.names().point(&point);
    world.memory.plant(&record, b"damaged");
    let opened = open_all(&customer).unwrap();
    assert_eq!((opened.frames, opened.damaged), (4, Vec::new()));
    let points: Vec<_> = opened.unreadable.iter().map(|found| found.point).collect();
    assert_eq!(points, [point]);
}

#[test]
fn a_point_whose_erasure_is_read_while_others_are_opened_is_no_failure() {
    let mut world = World::new();
    let other = world.open_second();
    let points = ["web", "db"].map(|vm| world.backup(&other, vm, &image(&[1, 2]), true));
    // They are asked for in the order of their ids.
    let last = *points.iter().max().unwrap();
    let snapshot = world.memory.snapshot();
    world.rewind(&snapshot);
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_on(store.clone(), &world.host).unwrap();
    let before = store.operations();
    open_all(&customer).unwrap();
    let reads_record = |name: &str| {
        points
            .iter()
            .any(|id| customer.names().point(id).as_str() == name)
    };
    let log = store.log();
    let opening = log.iter().filter(|line| line.number > before);
    let first = opening
        .clone()
        .find(|line| reads_record(&line.name))
        .unwrap()
        .number;

    world.rewind(&snapshot);
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_on(store.clone(), &world.host).unwrap();
    let gate = store.freeze_before(first);
    let opened = std::thread::scope(|scope| {
        let thread = scope.spawn(|| open_all(&customer));
        assert!(gate.wait_until_reached(Duration::from_secs(10)));
        world.erase(&other, last);
        // Another thread of the same process, which shares the ledger as last read.
        customer.refresh().unwrap();
        gate.release();
        thread.join().unwrap().unwrap()
    });
    assert_eq!(opened.frames, 3);
    assert_eq!((opened.damaged, opened.unreadable), Default::default());
}

#[test]
fn what_is_below_a_node_that_a_prune_moves_meanwhile_is_opened_all_the_same() {
    let mut world = World::new();
    let customer = world.open();
    let mut chunks = vec![0; FAN_OUT + 2];
    (chunks[0], chunks[1], chunks[FAN_OUT]) = (1, 2, 3);
    let dying = world.backup(&customer, "web", &image(&chunks), true);
    // With the first point die its root and the second of its two nodes below; the first one moves, and no chunk.
    chunks[FAN_OUT + 1] = 4;
    let point = world.backup(&customer, "web", &image(&chunks), false);
    for pack in packs_of(&world, PackKind::Data) {
        super::damage::damage(&world, &pack);
    }
    let damaged = packs_of(&world, PackKind::Data).len();
    world.meanwhile(
        // One thread: so the operations are the same each time.
        |customer| open_live(customer, 1, &AtomicBool::new(false), &|_| {}).unwrap(),
        |other| {
            world.erase(other, dying);
            let done = reclaim::reclaim(other, world.now(), DAY * 4000, false).unwrap();
            assert!(done.rewritten_bytes > 0);
            other.note_reclaimed(&done).unwrap();
        },
        |opened| {
            assert_eq!(opened.damaged.len(), damaged);
            assert_eq!(opened.unreadable.len(), damaged);
            assert!(
                opened
                    .unreadable
                    .iter()
                    .all(|found| [dying, point].contains(&found.point))
            );
        },
    );
}

#[test]
fn what_opened_is_not_looked_for_again() {
    let mut world = World::new();
    let customer = world.open();
    let point = world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_on(store.clone(), &world.host).unwrap();
    let before = store.operations() as usize;
    open_all(&customer).unwrap();
    let record = customer.names().point(&point);
    let log = store.log().split_off(before);
    let reads = log.iter().filter(|line| line.name == record.as_str());
    // Whoever looks again reads each record again.
    assert_eq!(reads.count(), 1);
}

#[test]
fn opening_takes_no_refusal_of_the_store_for_damage() {
    // Whoever meets a damaged node reads the ledger again.
    for kind in [PackKind::Data, PackKind::Node] {
        let mut world = World::new();
        let customer = world.open();
        world.backup(&customer, "web", &image(&[1, 2, 3, 4, 5]), true);
        // So that something is opened whichever node is damaged.
        world.backup(&customer, "db", &image(&[6, 7]), true);
        super::damage::damage(&world, &packs_of(&world, kind)[0]);
        let snapshot = world.memory.snapshot();
        let opened = |faults| {
            world.rewind(&snapshot);
            let store = Arc::new(Faulty::with_faults(world.memory.clone(), faults));
            let customer = world.open_on(store.clone(), &world.host).unwrap();
            let before = store.operations();
            (
                open_live(&customer, 1, &AtomicBool::new(false), &|_| {}),
                before,
                store.log(),
            )
        };
        let (whole, before, log) = opened(Vec::new());
        whole.unwrap();
        assert!(log.iter().any(|line| line.verb == Verb::ReadRange));
        for at in before + 1..=log.len() as u64 {
            let kind = StorageErrorKind::Denied;
            let (refused, ..) = opened(vec![Fault::FailBefore { at, kind }]);
            let error = match refused {
                Err(error) => error,
                Ok(opened) => {
                    // What did not open was not looked for again: nobody knows that it is damage.
                    assert_eq!((opened.damaged, opened.unreadable), Default::default());
                    opened.failure.unwrap()
                }
            };
            assert_eq!(error.kind, RepositoryErrorKind::Storage(kind), "{at}");
        }
    }
}

#[test]
fn what_broke_off_says_what_had_not_opened_until_then() {
    let mut world = World::new();
    let customer = world.open();
    world.backup(&customer, "web", &image(&[1, 2, 3, 4, 5]), true);
    super::damage::damage(&world, &packs_of(&world, PackKind::Data)[0]);
    world.host.forget();
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_on(store.clone(), &world.host).unwrap();
    let failed = open_all(&customer).unwrap().damaged;
    assert_eq!(failed.len(), 1);
    let log = store.log();
    let record = customer.names().point(world.model.keys().next().unwrap());
    // Whoever looks again reads the record again.
    let again = log
        .iter()
        .rfind(|line| line.name == record.as_str())
        .unwrap();

    world.host.forget();
    let (at, kind) = (again.number, StorageErrorKind::Transient);
    let faults = vec![Fault::FailBefore { at, kind }];
    let store = Arc::new(Faulty::with_faults(world.memory.clone(), faults));
    let customer = world.open_on(store, &world.host).unwrap();
    let opened = open_all(&customer).unwrap();
    assert_eq!((opened.damaged, opened.unreadable), Default::default());
    assert_eq!(opened.unsettled, failed);
    let failure = opened.failure.unwrap();
    assert_eq!(failure.kind, RepositoryErrorKind::Storage(kind));
}

#[test]
fn who_deletes_goes_past_no_node_that_cannot_be_read() {
    let mut world = World::new();
    let customer = world.open();
    world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    let name = packs_of(&world, PackKind::Node).remove(0);
    let faults = vec![Fault::Unread { name }];
    let store = Arc::new(Faulty::with_faults(world.memory.clone(), faults));
    let customer = world.open_on(store, &world.host).unwrap();
    for force in [false, true] {
        let refused = reclaim::mark_now(&customer, force).err().unwrap();
        assert!(refused.is_unread(), "{refused}");
    }
    let mark = Mark::at_end_to_look(&customer).unwrap();
    assert_eq!(mark.damage.len(), 1);
    assert!(mark.damage[0].error.is_unread());
}

#[test]
fn whoever_is_stopped_says_of_no_pack_that_it_is_whole() {
    let mut world = World::new();
    let customer = world.open();
    world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    let opened = open_live(&customer, 2, &AtomicBool::new(true), &|_| {}).unwrap();
    assert_eq!((opened.frames, opened.whole), (0, Vec::new()));
}

#[test]
fn whoever_is_stopped_meanwhile_opens_no_further_node() {
    let mut world = World::new();
    let customer = world.open();
    world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    world.backup(&customer, "db", &image(&[4, 5]), true);
    let stop = AtomicBool::new(false);
    // At the first piece: the node that is being opened is finished with, the other one is not begun.
    let stops = |_| stop.store(true, Ordering::Relaxed);
    let opened = open_live(&customer, 1, &stop, &stops).unwrap();
    assert!([3, 4].contains(&opened.frames), "{}", opened.frames);
    assert_eq!(opened.whole, []);
}

#[test]
fn frames_that_stand_together_are_read_together() {
    let mut world = World::new();
    let customer = world.open();
    let chunks: Vec<u32> = (1..=9).collect();
    world.backup(&customer, "web", &image(&chunks), true);
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_on(store.clone(), &world.host).unwrap();
    let before = store.operations() as usize;
    assert_eq!(open_all(&customer).unwrap().frames, 10);
    let log = store.log().split_off(before);
    // Directories are read at the end.
    let opening = log.iter().take_while(|line| line.verb != Verb::SizeBytes);
    let packs = packs_of(&world, PackKind::Data);
    let is_data = |name: &str| packs.iter().any(|pack| pack.as_str() == name);
    let reads = opening.filter(|line| line.verb == Verb::ReadRange && is_data(&line.name));
    assert!(packs.len() > 1);
    assert_eq!(reads.count(), packs.len());
}
