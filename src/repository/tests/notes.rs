//! What a reclaim writes down, and what it has written down already.

use super::super::reclaim::{Reclaimed, reclaim};
use super::super::testing::*;
use super::super::*;
use crate::format::entry::{Body, PackMark, ReclaimedBody};
use crate::model::{ObjectHash, PackName, SessionId};
use crate::storage::{Fault, Faulty, StorageErrorKind};
use std::sync::Arc;

fn pack(number: u64) -> PackName {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&number.to_le_bytes());
    PackName {
        session: SessionId::from_bytes([1; 16]),
        hash: ObjectHash::from_bytes(hash),
    }
}

fn noted(marked_at: u64, marks: Vec<PackMark>, removed: Vec<PackName>) -> Reclaimed {
    Reclaimed {
        marked_at,
        marks,
        removed,
        ..Reclaimed::default()
    }
}

/// The entries that say what was reclaimed.
fn entries(world: &World, customer: &Customer) -> Vec<ReclaimedBody> {
    let mut bodies = Vec::new();
    let storage = Arc::new(world.memory.clone());
    Ledger::replay(storage, customer.names().clone(), |entry, verdict| {
        assert_eq!(verdict, Ok(()));
        if let Body::Reclaimed(body) = &entry.body {
            bodies.push(body.clone());
        }
    })
    .unwrap();
    bodies
}

#[test]
fn a_row_is_written_down_once_and_again_only_when_it_says_more() {
    let world = World::new();
    let customer = world.open();
    let news = |dead_bytes, days: i32, erases: &[u64]| {
        let row = PackMark {
            pack: pack(1),
            dead_bytes,
            earliest_deadline: world.now() + DAY * days,
            erases: erases.to_vec(),
        };
        customer.note_reclaimed(&noted(1, vec![row], Vec::new()))
    };
    assert!(!news(0, 20, &[]).unwrap());
    assert!(news(100, 20, &[2]).unwrap());
    assert!(!news(100, 20, &[2]).unwrap());
    assert!(!news(100, 21, &[2]).unwrap());
    assert!(news(100, 19, &[2]).unwrap());
    assert!(news(90, 19, &[2]).unwrap());
    assert!(news(90, 19, &[2, 3]).unwrap());
    assert!(!news(90, 19, &[2, 3]).unwrap());
    assert!(news(0, 19, &[]).unwrap());
    assert!(!news(0, 19, &[]).unwrap());
}

#[test]
fn what_the_mark_adds_to_every_row_is_not_written_into_each() {
    let mut world = World::new();
    let customer = world.open();
    let dying = world.backup(&customer, "web", &image(&[1, 2]), true);
    let row = |erases: Vec<u64>| PackMark {
        pack: pack(1),
        dead_bytes: 100,
        earliest_deadline: world.now(),
        erases,
    };
    let first = noted(1, vec![row(vec![2])], Vec::new());
    assert!(customer.note_reclaimed(&first).unwrap());
    world.erase(&customer, dying);
    let erased = customer.with_state(|state| state.seq);
    let second = noted(erased, vec![row(vec![2, erased])], Vec::new());
    assert!(customer.note_reclaimed(&second).unwrap());
    let last = entries(&world, &customer).pop().unwrap();
    assert_eq!((last.marked_at, last.marks.len()), (erased, 0));
    let erases = customer.with_state(|state| state.marks[&pack(1)].erases.clone());
    assert_eq!(erases, [2, erased]);
    assert!(!customer.note_reclaimed(&second).unwrap());
}

#[test]
fn many_rows_are_several_entries_of_which_the_last_moves_the_mark() {
    let world = World::new();
    let customer = world.open();
    // 380 bytes each: one entry takes 1316.
    let row = |number| PackMark {
        pack: pack(number),
        dead_bytes: 100,
        earliest_deadline: world.now(),
        erases: (0..20).collect(),
    };
    let rows = (0..1400).map(row).collect();
    let end = customer.with_state(|state| state.seq);
    assert!(
        customer
            .note_reclaimed(&noted(end, rows, Vec::new()))
            .unwrap()
    );
    let told = entries(&world, &customer);
    let told = told.iter().map(|body| (body.marked_at, body.marks.len()));
    assert_eq!(Vec::from_iter(told), [(0, 1316), (end, 84)]);
    assert_eq!(customer.with_state(|state| state.marks.len()), 1400);
}

#[test]
fn what_another_prune_has_said_is_not_said_again() {
    let mut world = World::new();
    let customer = world.open();
    let dying = world.backup(&customer, "web", &image(&[1, 2]), true);
    world.erase(&customer, dying);
    let end = customer.with_state(|state| state.seq);
    // Of more than one entry can name; the ledger knows of none that it waits for.
    let removed: Vec<PackName> = (0..3001).map(pack).collect();
    assert!(
        customer
            .note_reclaimed(&noted(end, Vec::new(), removed))
            .unwrap()
    );
    let told = entries(&world, &customer);
    let told = told.iter().map(|body| (body.marked_at, body.deleted.len()));
    assert_eq!(Vec::from_iter(told), [(end, 0)]);
}

#[test]
fn a_note_that_the_store_refuses_fails() {
    let world = World::new();
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_unchecked(store.clone(), &world.host).unwrap();
    let (at, kind) = (store.operations() + 1, StorageErrorKind::Denied);
    store.add(Fault::FailBefore { at, kind });
    let removed = vec![pack(1)];
    let error = customer.note_reclaimed(&noted(1, Vec::new(), removed));
    let error = error.unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Storage(kind));
}

/// Chunks of one number each: they compress, so that a pack holds many.
fn small_chunks(numbers: impl IntoIterator<Item = u8>) -> Vec<u8> {
    let chunk = |number| vec![number; CHUNK];
    numbers.into_iter().flat_map(chunk).collect()
}

#[test]
fn dead_bytes_are_written_down_anew_when_an_eighth_of_the_pack_has_changed() {
    let mut world = World::new();
    let customer = world.open();
    let mut back_up =
        |numbers: Vec<u8>, full| world.backup(&customer, "web", &small_chunks(numbers), full);
    let nights = [
        back_up((1..=20).collect(), true),
        back_up((101..=101).chain(2..=20).collect(), false),
        back_up((101..=102).chain(3..=20).collect(), false),
    ];
    back_up((101..=106).chain(7..=20).collect(), false);
    let of_the_first = customer.with_state(|state| state.points[&nights[0]].session);
    let dead = nights.map(|night| {
        world.erase(&customer, night);
        let done = reclaim(&customer, world.now(), DAY * 22, false).unwrap();
        customer.note_reclaimed(&done).unwrap();
        let of_first = |row: &&PackMark| row.pack.session == of_the_first;
        let row = done.marks.iter().find(of_first).unwrap();
        row.dead_bytes
    });
    assert!(
        dead[0] > 0 && dead[0] == dead[1] && dead[1] < dead[2],
        "{dead:?}"
    );
}

#[test]
fn a_pack_whose_dead_frames_live_again_loses_its_row() {
    let mut world = World::new();
    let customer = world.open();
    let dying = world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    world.backup(&customer, "web", &image(&[1, 2, 9]), false);
    world.erase(&customer, dying);
    let deadline = customer.with_state(|state| state.points[&dying].deadline);
    let reclaimed = || {
        let done = reclaim(&customer, world.now(), DAY * 22, false).unwrap();
        customer.note_reclaimed(&done).unwrap();
        done.marks
    };
    let [dead] = &reclaimed()[..] else {
        panic!("a pack is partly dead")
    };
    assert!(dead.dead_bytes > 0);
    assert_eq!(dead.earliest_deadline, deadline);
    let (_, again) = backup(&customer, "db", &image(&[3]), true);
    again.unwrap();
    let alive = PackMark {
        dead_bytes: 0,
        erases: Vec::new(),
        ..dead.clone()
    };
    assert_eq!(reclaimed(), [alive]);
    assert!(customer.with_state(|state| state.marks.is_empty()));
    assert_eq!(reclaimed(), []);
}
