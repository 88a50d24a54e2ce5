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
fn opening_takes_no_refusal_of_the_store_for_damage() {
    let mut world = World::new();
    let customer = world.open();
    world.backup(&customer, "web", &image(&[1, 2, 3, 4, 5]), true);
    super::damage::damage(&world, &packs_of(&world, PackKind::Data)[0]);
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
        let error = refused.unwrap_err();
        assert_eq!(error.kind, RepositoryErrorKind::Storage(kind), "{at}");
    }
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
