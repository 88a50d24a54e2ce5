//! Damaged, missing and wrongly sealed frames: found, healed, and never spread.

use super::super::testing::*;
use super::super::*;
use crate::format::entry::{Body, CondemnBody, MergeBody, Purpose, VerifyMethod};
use crate::format::pack::{self, PackBuilder, PackKind};
use crate::format::segment::{PackRow, Record};
use crate::model::{FAN_OUT, ObjectName, PackName, PieceKind, PointId, TreeShape};
use crate::repository::index::PASSES;
use crate::repository::new_segments::NewSegments;
use crate::storage::{Fault, Faulty, StorageErrorKind};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

pub(super) fn packs_of(world: &World, kind: PackKind) -> Vec<ObjectName> {
    let holds = |name: &ObjectName| {
        let bytes = world.memory.read(name, u64::MAX).unwrap();
        pack::parse_header(&bytes[..pack::HEADER_BYTES])
            .unwrap()
            .kind
            == kind
    };
    world.packs().into_iter().filter(holds).collect()
}

pub(super) fn pack_name(name: &ObjectName) -> PackName {
    let rest = name.as_str().strip_prefix("customers/acme/packs/").unwrap();
    rest.parse().unwrap()
}

/// Changes a byte of the sealed content of the first frame.
pub(super) fn damage(world: &World, name: &ObjectName) {
    let mut bytes = world.memory.read(name, u64::MAX).unwrap();
    bytes[pack::HEADER_BYTES + pack::FRAME_HEADER_BYTES + 20] ^= 1;
    world.memory.plant(name, &bytes);
}

/// Changes what is sealed in each frame, with checksums that are right.
fn seal_wrongly(world: &World, name: &ObjectName) {
    let bytes = world.memory.read(name, u64::MAX).unwrap();
    let kind = pack::parse_header(&bytes[..pack::HEADER_BYTES])
        .unwrap()
        .kind;
    let session = pack_name(name).session;
    let mut builder = PackBuilder::new(kind, 1, &session, &[0; 16], 0);
    for entry in pack::directory_of(&bytes).unwrap() {
        let frame = pack::parse_frame(pack::frame_bytes(&bytes, &entry).unwrap()).unwrap();
        let mut sealed = frame.sealed.to_vec();
        sealed[30] ^= 1;
        builder.append(&frame.header, &sealed);
    }
    world.memory.plant(name, &builder.finish().bytes);
}

fn scrub_and_note(customer: &Customer) -> Scrubbed {
    let index = customer.load_index().unwrap();
    let packs: Vec<PackName> = index
        .packs()
        .iter()
        .filter(|info| !info.condemned)
        .map(|info| info.row.name)
        .collect();
    let found = scrub_packs(customer, &packs, 2, &AtomicBool::new(false), &|_| {}).unwrap();
    customer
        .note_verification(VerifyMethod::Checksum, &found.whole, &found.damaged)
        .unwrap();
    found
}

/// Damage is planted, somebody looks, and a backup of the same content makes all points whole.
fn heals(plant: impl Fn(&World, &ObjectName), look: impl Fn(&Customer, &PointId), full: bool) {
    let mut world = World::new();
    let customer = world.open();
    let bytes = image(&[1, 2, 3, 4, 5]);
    let point = world.backup(&customer, "web", &bytes, true);
    for name in packs_of(&world, PackKind::Data) {
        plant(&world, &name);
    }
    assert!(restore(&customer, &point).is_err());
    look(&customer, &point);
    world.time.pass(DAY);
    match full {
        true => world.backup(&customer, "web", &bytes, true),
        // Another VM's incremental meets the same content.
        false => {
            world.backup(&customer, "db", &image(&[0; 5]), true);
            world.backup(&customer, "db", &bytes, false)
        }
    };
    world.check(&customer);
    world.check(&world.open_second());
}

fn scrubbed(customer: &Customer, _: &PointId) {
    let found = scrub_and_note(customer);
    assert!(!found.damaged.is_empty());
}

/// Opens everything, as `verify --read-data` does: a checksum does not show this.
fn opened(customer: &Customer, _: &PointId) {
    assert!(scrub_and_note(customer).damaged.is_empty());
    let found = open_live(customer, 2, &AtomicBool::new(false), &|_| {}).unwrap();
    assert!(!found.damaged.is_empty() && !found.unreadable.is_empty());
    customer
        .note_verification(VerifyMethod::Opened, &found.whole, &found.damaged)
        .unwrap();
}

#[test]
fn a_damaged_frame_is_healed_by_the_next_full_and_by_the_next_incremental_that_meets_it() {
    for full in [true, false] {
        heals(damage, scrubbed, full);
    }
}

#[test]
fn a_missing_pack_and_one_that_is_cut_short_are_healed() {
    use crate::storage::Storage;
    for full in [true, false] {
        heals(
            |world, name| world.memory.delete(name).unwrap(),
            scrubbed,
            full,
        );
        let cut = |world: &World, name: &ObjectName| {
            let bytes = world.memory.read(name, u64::MAX).unwrap();
            world.memory.plant(name, &bytes[..bytes.len() / 2]);
        };
        heals(cut, scrubbed, full);
    }
}

#[test]
fn a_frame_whose_checksum_is_right_and_whose_seal_is_wrong_is_healed_once_it_was_met() {
    for full in [true, false] {
        heals(seal_wrongly, opened, full);
    }
}

#[test]
fn a_full_does_not_believe_a_pack_that_nobody_read_for_eight_days() {
    let mut world = World::new();
    let customer = world.open();
    let bytes = image(&[1, 2, 3, 4, 5]);
    world.backup(&customer, "web", &bytes, true);
    for name in packs_of(&world, PackKind::Data) {
        damage(&world, &name);
    }
    world.time.pass(DAY * 9);
    world.backup(&customer, "web", &bytes, true);
    world.check(&customer);
}

#[test]
fn a_full_does_not_believe_a_pack_of_last_night_that_is_gone_or_cut_short() {
    for kind in [PackKind::Data, PackKind::Node] {
        for is_cut in [false, true] {
            let mut world = World::new();
            let customer = world.open();
            let bytes = image(&[1, 2, 3, 4, 5]);
            world.backup(&customer, "web", &bytes, true);
            for name in packs_of(&world, kind) {
                let whole = world.memory.read(&name, u64::MAX).unwrap();
                world.memory.delete(&name).unwrap();
                if is_cut {
                    world.memory.plant(&name, &whole[..whole.len() - 1]);
                }
            }
            world.time.pass(DAY);
            world.backup(&customer, "web", &bytes, true);
            world.check(&customer);
            world.check(&world.open_second());
        }
    }
}

#[test]
fn what_a_full_finds_gone_is_damage_only_if_no_prune_has_condemned_it_meanwhile() {
    for is_condemned in [false, true] {
        let mut world = World::new();
        let customer = world.open();
        let bytes = image(&[1, 2, 3]);
        world.backup(&customer, "web", &bytes, true);
        let packs = packs_of(&world, PackKind::Data);
        for name in &packs {
            world.memory.delete(name).unwrap();
        }
        let running = Running::write(&customer, "web", &bytes, true).unwrap();
        if is_condemned {
            condemn_wrongly(&world.open_second(), packs.iter().map(pack_name).collect());
        }
        let (whole, damaged) = running.session.checked_packs().unwrap();
        assert_eq!(whole, []);
        assert_eq!(damaged.is_empty(), is_condemned, "{damaged:?}");
    }
}

#[test]
fn a_damaged_node_stops_a_reclaim_and_is_healed_by_the_next_full() {
    let mut world = World::new();
    let customer = world.open();
    let dying = world.backup(&customer, "db", &image(&[7, 8]), true);
    let bytes = image(&[1, 2, 3]);
    world.backup(&customer, "web", &bytes, true);
    let state = customer.state();
    let newest = state
        .points
        .values()
        .max_by_key(|row| row.seq)
        .unwrap()
        .session;
    for name in packs_of(&world, PackKind::Node) {
        if pack_name(&name).session == newest {
            damage(&world, &name);
        }
    }
    world.erase(&customer, dying);
    let packs = world.packs();
    let error = reclaim::reclaim(&customer, world.now(), DAY * 4000, false).unwrap_err();
    assert!(error.is_damage());
    assert_eq!(
        world.packs(),
        packs,
        "something was deleted although a tree is not known"
    );
    // The reclaim noted it; the full stores the node anew.
    world.backup(&customer, "web", &bytes, true);
    world.check(&customer);
    let done = reclaim::reclaim(&customer, world.now(), DAY * 4000, false).unwrap();
    customer.note_reclaimed(&done).unwrap();
    world.check(&customer);
}

#[test]
fn a_rewrite_that_meets_a_damaged_live_frame_keeps_its_pack_until_forced() {
    let mut world = World::new();
    let customer = world.open();
    let dying = world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    let kept = image(&[1, 9]);
    let point = world.backup(&customer, "web", &kept, false);
    world.erase(&customer, dying);
    let with_one = |name: &&ObjectName| {
        let bytes = world.memory.read(name, u64::MAX).unwrap();
        pack::directory_of(&bytes).unwrap().len() >= 3
    };
    let name = packs_of(&world, PackKind::Data)
        .iter()
        .find(with_one)
        .cloned()
        .unwrap();
    // Chunk 1 is the first frame.
    damage(&world, &name);
    let done = reclaim::reclaim(&customer, world.now(), DAY * 4000, false).unwrap();
    customer.note_reclaimed(&done).unwrap();
    assert_eq!(done.damaged.len(), 1);
    assert!(world.packs().contains(&name));
    // One day before the deadline: what can be read by nobody does not keep dead bytes.
    let done = reclaim::reclaim(&customer, world.now(), DAY * 4000, true).unwrap();
    customer.note_reclaimed(&done).unwrap();
    assert!(!world.packs().contains(&name));
    assert!(restore(&customer, &point).is_err());
    world.backup(&customer, "web", &kept, true);
    world.check(&customer);
}

/// Condemns a pack as a faulty program would: with something live in it, and no survivors.
pub(super) fn condemn_wrongly(customer: &Customer, packs: Vec<PackName>) {
    let begun = customer.begin(Purpose::Reclaim, None).unwrap();
    customer
        .append(|_| {
            Ok(Body::Condemn(CondemnBody {
                session: begun.id,
                packs: packs.clone(),
                segments: Vec::new(),
            }))
        })
        .unwrap();
}

#[test]
fn a_wrongly_condemned_pack_is_read_rescued_and_only_then_deleted_whatever_else_is_damaged() {
    for (force, other_damage) in [(false, false), (true, false), (true, true)] {
        let mut world = World::new();
        let customer = world.open();
        if other_damage {
            let (_, result) = backup(&customer, "db", &image(&[20, 21]), true);
            result.unwrap();
            for name in packs_of(&world, PackKind::Node) {
                damage(&world, &name);
            }
        }
        let before = world.packs();
        world.backup(&customer, "web", &image(&[1, 2, 3, 4, 5]), true);
        let packs: Vec<ObjectName> = world
            .packs()
            .into_iter()
            .filter(|name| !before.contains(name))
            .collect();
        condemn_wrongly(&customer, packs.iter().map(pack_name).collect());
        world.check(&customer);
        let done = reclaim::reclaim(&customer, world.now(), DAY * 22, force).unwrap();
        assert_eq!(done.withheld, []);
        customer.note_reclaimed(&done).unwrap();
        assert!(packs.iter().all(|name| !world.packs().contains(name)));
        world.check(&customer);
        world.check(&world.open_second());
    }
}

#[test]
fn a_node_that_only_looks_whole_lets_no_condemned_copy_of_it_go() {
    let mut world = World::new();
    let customer = world.open();
    let bytes = image(&[1, 2, 3]);
    world.backup(&customer, "web", &bytes, true);
    let first = packs_of(&world, PackKind::Node).remove(0);
    let whole = world.memory.read(&first, u64::MAX).unwrap();
    // A full that cannot read the node stores it anew.
    world.memory.delete(&first).unwrap();
    world.time.pass(DAY * 9);
    world.backup(&customer, "web", &bytes, true);
    let copies = packs_of(&world, PackKind::Node);
    world.memory.plant(&first, &whole);
    seal_wrongly(&world, &first);
    condemn_wrongly(&customer, copies.iter().map(pack_name).collect());
    let done = reclaim::reclaim(&customer, world.now(), DAY * 22, false).unwrap();
    assert_eq!(done.damaged.len(), 1);
    assert_eq!(done.removed, Vec::from_iter(copies.iter().map(pack_name)));
    world.check(&customer);
}

#[test]
fn a_pack_that_is_missing_for_now_is_not_condemned_for_it() {
    use crate::storage::Storage;
    let mut world = World::new();
    let customer = world.open();
    let dying = world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    let point = world.backup(&customer, "web", &image(&[1]), true);
    world.erase(&customer, dying);
    let names = packs_of(&world, PackKind::Data);
    let name = names.first().unwrap();
    let bytes = world.memory.read(name, u64::MAX).unwrap();
    world.memory.delete(name).unwrap();
    let done = reclaim::reclaim(&customer, world.now(), DAY * 4000, false).unwrap();
    assert!(!customer.with_state(|state| state.is_condemned(&pack_name(name))));
    assert!(!done.damaged.is_empty());
    world.memory.plant(name, &bytes);
    assert!(restore(&customer, &point).is_ok());
}

#[test]
fn one_rotten_key_file_does_not_stand_in_the_way_of_another() {
    let world = World::new();
    let customer = world.open();
    let (object, row) = customer.with_state(|state| {
        let row = state.keys.first().cloned().unwrap();
        (customer.names().key(2), row)
    });
    customer
        .append(|_| {
            Ok(Body::Key(crate::format::entry::KeyBody {
                object: 2,
                ..row.clone()
            }))
        })
        .unwrap();
    world.memory.plant(&object, b"rot");
    world.open();
}

/// A disk of a root and three nodes, the last of them short, with a chunk below each.
fn two_levels(first: u32) -> Vec<u8> {
    let mut chunks = vec![0; 2 * FAN_OUT + 3];
    (chunks[0], chunks[FAN_OUT], chunks[2 * FAN_OUT + 2]) = (first, 2, 3);
    image(&chunks)
}

#[test]
fn a_reclaim_moves_the_nodes_of_a_tree_of_two_levels() {
    let mut world = World::new();
    let customer = world.open();
    let dying = world.backup(&customer, "web", &two_levels(1), true);
    world.backup(&customer, "web", &two_levels(9), false);
    world.erase(&customer, dying);
    let done = reclaim::reclaim(&customer, world.now(), DAY * 4000, false).unwrap();
    assert!(done.rewritten_bytes > 0);
    assert_eq!(done.damaged, []);
    world.check(&customer);
    world.quiesce(&customer);
    world.check(&customer);
}

#[test]
fn a_disk_of_more_than_four_gib_is_marked_and_opened_to_its_end() {
    let world = World::new();
    let customer = world.open();
    // Three levels; the last node of the lowest is a short one.
    let shape = TreeShape {
        size_bytes: ((FAN_OUT * FAN_OUT + 3) * CHUNK) as u64,
        chunk_bytes: CHUNK as u32,
    };
    let last = image(&[1]);
    let running = Running::write_end(&customer, "web", shape, &last).unwrap();
    running.commit().unwrap();
    let mark = reclaim::mark_now(&customer, false).unwrap();
    let keys = customer.keys();
    let tag = keys.tag(&keys.id(PieceKind::Chunk, &last));
    assert!(mark.is_live(&tag).unwrap());
    let opened = open_live(&customer, 2, &AtomicBool::new(false), &|_| {}).unwrap();
    assert_eq!((opened.frames, opened.unreadable), (4, Vec::new()));
}

#[test]
fn a_node_that_does_not_open_hides_only_what_is_below_it() {
    let mut world = World::new();
    let customer = world.open();
    world.backup(&customer, "web", &two_levels(1), true);
    let chunks = packs_of(&world, PackKind::Data);
    let entries_of = |name: &ObjectName| {
        let bytes = world.memory.read(name, u64::MAX).unwrap();
        crate::format::pack::directory_of(&bytes).unwrap()
    };
    let chunks: Vec<_> = chunks.iter().flat_map(entries_of).collect();
    assert_eq!(chunks.len(), 3);
    let mut reached = Vec::new();
    for name in packs_of(&world, PackKind::Node) {
        let whole = world.memory.read(&name, u64::MAX).unwrap();
        for node in entries_of(&name) {
            let mut bad = whole.clone();
            bad[(node.offset + node.length_bytes / 2) as usize] ^= 1;
            world.memory.plant(&name, &bad);
            let mark = reclaim::mark_now(&world.open(), true).unwrap();
            assert!(!mark.damage.is_empty());
            let live = chunks
                .iter()
                .filter(|entry| mark.is_live(&entry.tag).unwrap());
            reached.push(live.count());
        }
        world.memory.plant(&name, &whole);
    }
    reached.sort_unstable();
    assert_eq!(reached, [0, 2, 2, 2]);
}

#[test]
fn a_pack_without_live_frames_may_be_missing_or_cut_short_and_goes_all_the_same() {
    for missing in [true, false] {
        let mut world = World::new();
        let customer = world.open();
        let dying = world.backup(&customer, "web", &image(&[1, 2]), true);
        let [pack] = &packs_of(&world, PackKind::Data)[..] else {
            panic!("one pack of two chunks")
        };
        world.backup(&customer, "db", &image(&[3, 4]), true);
        world.erase(&customer, dying);
        match missing {
            true => world.memory.delete(pack).unwrap(),
            false => world.memory.plant(pack, b"cut"),
        }
        let done = reclaim::reclaim(&customer, world.now(), DAY * 22, false).unwrap();
        assert_eq!(done.damaged, []);
        assert!(done.removed.contains(&pack_name(pack)), "{missing}");
        customer.note_reclaimed(&done).unwrap();
        world.check(&customer);
        world.quiesce(&customer);
    }
}

/// Replaces the index by one that does not know a frame of this pack, as a faulty program would.
fn forget_a_frame(customer: &Customer, pack: &PackName) {
    let index = customer.load_index().unwrap();
    let rows: Vec<PackRow> = index.packs().iter().map(|info| info.row).collect();
    let mut records = Vec::new();
    index
        .each_record(|_, tag, place| {
            records.push(Record {
                tag,
                pack: place.pack,
                offset: place.offset,
                length_bytes: place.length_bytes,
            });
        })
        .unwrap();
    let number = index.number_of(pack).unwrap();
    let first = records.iter().position(|record| record.pack == number);
    records.remove(first.unwrap());
    records.sort_unstable();
    let session = customer.begin(Purpose::Merge, None).unwrap().id;
    let mut segments = NewSegments::new(customer, session, &rows, records.len());
    for record in records {
        segments.push(record).unwrap();
    }
    let (segments, _) = segments.finish().unwrap();
    let replaced: Vec<_> = index.segment_names().map(|(name, _)| *name).collect();
    customer
        .append(|_| {
            Ok(Body::Merge(MergeBody {
                session,
                segments: segments.clone(),
                replaced: replaced.clone(),
                dropped: Vec::new(),
            }))
        })
        .unwrap();
}

#[test]
fn a_pack_of_which_neither_directory_nor_index_knows_all_goes_only_by_force() {
    for force in [false, true] {
        let mut world = World::new();
        let customer = world.open();
        let dying = world.backup(&customer, "web", &image(&[1, 2]), true);
        let pack = packs_of(&world, PackKind::Data).remove(0);
        world.backup(&customer, "db", &image(&[3, 4]), true);
        world.erase(&customer, dying);
        forget_a_frame(&customer, &pack_name(&pack));
        world.memory.plant(&pack, b"cut");
        let done = reclaim::reclaim(&customer, world.now(), DAY * 22, force).unwrap();
        assert_eq!(done.removed.contains(&pack_name(&pack)), force);
        world.check(&customer);
    }
}

#[test]
fn another_copy_that_is_out_of_reach_is_not_taken_for_lost() {
    for force in [false, true] {
        let mut world = World::new();
        let customer = world.open();
        let dying = world.backup(&customer, "web", &image(&[1, 2, 3]), true);
        let pack = packs_of(&world, PackKind::Data).remove(0);
        // The first chunk; a full that meets it stores it anew.
        damage(&world, &pack);
        world.time.pass(DAY * 9);
        world.backup(&customer, "db", &image(&[1, 2]), true);
        let mut copies = packs_of(&world, PackKind::Data);
        copies.retain(|name| *name != pack);
        let [copy] = &copies[..] else {
            panic!("one pack of one chunk")
        };
        world.erase(&customer, dying);
        let snapshot = world.memory.snapshot();
        let reclaimed = |faults| {
            world.rewind(&snapshot);
            let store = Arc::new(Faulty::with_faults(world.memory.clone(), faults));
            let customer = world.open_on(store.clone(), &world.host).unwrap();
            let done = reclaim::reclaim(&customer, world.now(), DAY * 4000, force);
            (done, store.log())
        };
        let (done, log) = reclaimed(Vec::new());
        done.unwrap();
        let asked = log.iter().find(|line| line.name == copy.as_str());
        let (at, kind) = (asked.unwrap().number, StorageErrorKind::Transient);
        let (done, _) = reclaimed(vec![Fault::FailBefore { at, kind }]);
        let error = done.unwrap_err();
        assert_eq!(error.kind, RepositoryErrorKind::Storage(kind));
        assert_eq!(error.name, copy.as_str());
        assert!(world.packs().contains(&pack));
        world.check(&world.open());
    }
}

#[test]
fn the_damage_of_the_only_point_is_told() {
    let mut world = World::new();
    let customer = world.open();
    let point = world.backup(&customer, "web", &image(&[1]), true);
    world
        .memory
        .plant(&customer.names().point(&point), b"damaged");
    let error = reclaim::mark_now(&customer, false).err().unwrap();
    assert_eq!(error.kind, RepositoryErrorKind::Damaged);
}

/// A world whose only data pack of three live and dead chunks is the first returned.
fn partly_dead() -> (World, ObjectName) {
    let mut world = World::new();
    let customer = world.open();
    let dying = world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    let pack = packs_of(&world, PackKind::Data).remove(0);
    world.backup(&customer, "web", &image(&[1, 2, 9]), false);
    world.erase(&customer, dying);
    (world, pack)
}

#[test]
fn a_missing_pack_of_which_something_is_live_goes_only_by_force() {
    for force in [false, true] {
        let (world, pack) = partly_dead();
        let customer = world.open();
        world.memory.delete(&pack).unwrap();
        let done = reclaim::reclaim(&customer, world.now(), DAY * 4000, force).unwrap();
        assert_eq!(done.removed.contains(&pack_name(&pack)), force);
        assert!(!done.damaged.is_empty());
    }
}

#[test]
fn a_pack_that_cannot_be_rewritten_is_tried_once_a_prune() {
    let (world, pack) = partly_dead();
    let customer = world.open();
    damage(&world, &pack);
    let begun = customer.with_state(|state| state.seq);
    let done = reclaim::reclaim(&customer, world.now(), DAY * 4000, false).unwrap();
    assert!(!done.removed.contains(&pack_name(&pack)));
    let mut sessions = 0;
    let storage = std::sync::Arc::new(world.memory.clone());
    Ledger::replay(storage, customer.names().clone(), |entry, _| {
        sessions += usize::from(entry.seq > begun && matches!(entry.body, Body::Begin(_)));
    })
    .unwrap();
    // One for the dead nodes, one for this pack.
    assert_eq!(sessions, 2);
}

#[test]
fn condemned_packs_that_are_gone_are_looked_up_in_one_pass_over_the_index() {
    let passes_of = |vms: u32| {
        let mut world = World::new();
        let customer = world.open();
        for number in 0..vms {
            let chunks = [3 * number + 1, 3 * number + 2, 3 * number + 3];
            let point = world.backup(&customer, &format!("vm{number}"), &image(&chunks), true);
            world.erase(&customer, point);
        }
        // It dies before it says what it has deleted.
        let died = reclaim::reclaim(&customer, world.now(), DAY * 4000, false).unwrap();
        let before = PASSES.get();
        let done = reclaim::reclaim(&customer, world.now(), DAY * 4000, false).unwrap();
        assert_eq!(done.removed, died.removed);
        assert_eq!(done.removed.len(), 2 * vms as usize);
        PASSES.get() - before
    };
    assert_eq!(passes_of(2), passes_of(6));
}

#[test]
fn a_missing_pack_is_asked_for_once_however_many_frames_it_had() {
    let mut world = World::new();
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_on(store.clone(), &world.host).unwrap();
    world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    let missing = packs_of(&world, PackKind::Data).remove(0);
    world.memory.delete(&missing).unwrap();
    let begun = store.operations();
    let packs = [pack_name(&missing)];
    let found = scrub_packs(&customer, &packs, 1, &AtomicBool::new(false), &|_| {}).unwrap();
    assert!(found.damaged.len() > 1, "{:?}", found.damaged);
    assert_eq!(found.broken.len(), 1);
    let log = store.log().into_iter().filter(|line| line.number > begun);
    let asked = log.filter(|line| line.name == missing.as_str());
    assert_eq!(asked.count(), 1);
}

#[test]
fn of_a_pack_that_is_none_no_frame_is_looked_for_once_somebody_asks_to_stop() {
    let mut world = World::new();
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_on(store.clone(), &world.host).unwrap();
    world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    let broken = packs_of(&world, PackKind::Data).remove(0);
    let mut bytes = world.memory.read(&broken, u64::MAX).unwrap();
    bytes.truncate(bytes.len() - 1);
    world.memory.plant(&broken, &bytes);
    let packs = [pack_name(&broken)];
    let begun = store.operations();
    let stop = AtomicBool::new(false);
    // Somebody asks while the pack is read.
    let stop_now = |_: u64| stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let found = scrub_packs(&customer, &packs, 1, &stop, &stop_now).unwrap();
    assert_eq!((found.broken.len(), found.damaged.len()), (1, 0));
    let log = store.log().into_iter().filter(|line| line.number > begun);
    let asked = log.filter(|line| line.name == broken.as_str());
    assert_eq!(asked.count(), 1);
}
