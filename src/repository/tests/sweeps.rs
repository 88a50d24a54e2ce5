//! What the ledger explains, kind by kind, and what a sweep does with the rest.

use super::super::testing::*;
use super::super::*;
use crate::format::entry::{CertificateRef, KeyBody, Purpose};
use crate::format::names::ObjectRole;
use crate::model::{
    EntryHash, ObjectHash, ObjectName, PackName, PointState, SegmentName, SessionId,
};
use crate::storage::{Directory, Faulty, Leftover, MAX_PROBE_BYTES, Storage, Verb};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

const HASH: ObjectHash = ObjectHash::from_bytes([7; 32]);

fn pack(session: u8) -> PackName {
    PackName {
        session: SessionId::from_bytes([session; 16]),
        hash: HASH,
    }
}

/// A state with two points, of which the second is erased.
fn two_points() -> (State, [crate::model::PointId; 2]) {
    let mut world = World::new();
    let customer = world.open();
    let points = [1, 2].map(|night| world.backup(&customer, "web", &image(&[night]), true));
    world.erase(&customer, points[1]);
    (State::clone(&customer.state()), points)
}

fn verdict(role: &ObjectRole, state: &State) -> Explained {
    explain(role, state, &BTreeSet::from([pack(1)]))
}

fn is_explained(role: &ObjectRole, state: &State) -> bool {
    verdict(role, state) == Explained::Yes
}

/// An open session of that purpose.
fn opened(state: &mut State, session: u8, purpose: Purpose) {
    let world = World::new();
    let customer = world.open();
    let begun = customer.begin(Purpose::Merge, None).unwrap();
    let mut open = customer.state().open[&begun.id].clone();
    open.purpose = purpose;
    state
        .open
        .insert(SessionId::from_bytes([session; 16]), open);
}

#[test]
fn entries_up_to_the_end_and_the_keys_that_one_names_are_explained() {
    let (mut state, _) = two_points();
    let entries = [0, 1, state.seq, state.seq + 1];
    let explained = entries.map(|seq| is_explained(&ObjectRole::Ledger(seq), &state));
    assert_eq!(explained, [false, true, true, false]);
    // Where many write no entry stands beside another.
    let hash = EntryHash::from_bytes([1; 32]);
    assert!(!is_explained(&ObjectRole::Rival(1, hash), &state));
    let key = |object| KeyBody {
        generation: 1,
        object,
        hash: HASH,
        recipients: Vec::new(),
    };
    state.keys = vec![key(1), key(3)];
    let explained = [1, 2, 3].map(|object| is_explained(&ObjectRole::Key(object), &state));
    assert_eq!(explained, [true, false, true]);
    state.keys.clear();
    assert!(is_explained(&ObjectRole::Key(2), &state));
}

#[test]
fn a_pack_is_explained_by_its_open_session_or_as_one_that_was_born() {
    let (mut state, _) = two_points();
    opened(&mut state, 2, Purpose::Backup);
    let explained = [1, 2, 3].map(|of| is_explained(&ObjectRole::Pack(pack(of)), &state));
    assert_eq!(explained, [true, true, false]);
    let condemned = |deleted| {
        let mut state = state.clone();
        state
            .condemned
            .insert(pack(1), Condemned { seq: 1, deleted });
        verdict(&ObjectRole::Pack(pack(1)), &state)
    };
    assert_eq!(condemned(false), Explained::Condemned);
    assert!(matches!(condemned(true), Explained::No(_)));
}

#[test]
fn a_segment_is_explained_by_its_open_session_or_as_a_current_one() {
    let (mut state, _) = two_points();
    opened(&mut state, 2, Purpose::Merge);
    let segment = |session| SegmentName {
        session: SessionId::from_bytes([session; 16]),
        hash: HASH,
    };
    let born = *state.born.values().next().unwrap();
    state.segments.insert(segment(1), born);
    let explained = [1, 2, 3].map(|of| is_explained(&ObjectRole::Segment(segment(of)), &state));
    assert_eq!(explained, [true, true, false]);
}

#[test]
fn a_record_is_explained_until_its_point_is_erased_and_while_a_session_may_commit_it() {
    let (mut state, [kept, erased]) = two_points();
    let pending = crate::model::PointId::from_bytes([1; 16]);
    let explained = |state: &State| {
        [kept, erased, pending].map(|point| is_explained(&ObjectRole::Point(point), state))
    };
    assert_eq!(explained(&state), [true, false, false]);
    opened(&mut state, 2, Purpose::Backup);
    assert_eq!(explained(&state), [true, false, false]);
    state
        .open
        .values_mut()
        .for_each(|open| open.point = Some(pending));
    state.points.get_mut(&kept).unwrap().state = PointState::Expired;
    assert_eq!(explained(&state), [true, false, true]);
}

#[test]
fn a_certificate_is_explained_by_the_entry_that_names_it_or_while_one_is_written() {
    let (mut state, _) = two_points();
    state.certificates = vec![CertificateRef {
        id: "one".to_string(),
        hash: HASH,
        signature_hash: HASH,
    }];
    let explained = |state: &State| {
        ["one.json", "one.json.minisig", "two.json", "one.txt"].map(|file| {
            let role = ObjectRole::Certificate(file.to_string());
            is_explained(&role, state)
        })
    };
    assert_eq!(explained(&state), [true, true, false, false]);
    opened(&mut state, 2, Purpose::Reclaim);
    assert_eq!(explained(&state), [true, true, false, false]);
    opened(&mut state, 3, Purpose::Prove);
    assert_eq!(explained(&state), [true; 4]);
    assert!(!is_explained(&ObjectRole::Foreign, &state));
}

#[test]
fn a_record_that_came_back_is_destroyed_and_a_key_file_that_nobody_names_stays() {
    let mut world = World::new();
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_unchecked(store.clone(), &world.host).unwrap();
    let point = world.backup(&customer, "web", &image(&[1]), true);
    let record = customer.names().point(&point);
    let bytes = world.memory.read(&record, u64::MAX).unwrap();
    world.erase(&customer, point);
    world.memory.plant(&record, &bytes);
    let key = customer.names().key(99);
    world
        .memory
        .plant(&key, b"perhaps of a host that is being admitted");
    let probe = ObjectName::new("customers/acme/probe/as-large-as-can-be").unwrap();
    world
        .memory
        .plant(&probe, &vec![7; MAX_PROBE_BYTES as usize]);
    let begun = store.operations();
    let swept = sweep(&customer, true).unwrap();
    let listed = world.memory.list("customers/acme").unwrap().len();
    assert_eq!(swept.listed, listed as u64 + 1);
    assert_eq!(swept.removed.len(), 1);
    assert_eq!(swept.unexplained.len(), 1);
    assert!(world.memory.size_bytes(&key).is_ok());
    let log = store.log().into_iter().filter(|line| line.number > begun);
    let destroyed = log.filter(|line| line.verb == Verb::Destroy);
    let names: Vec<String> = destroyed.map(|line| line.name).collect();
    assert_eq!(names, [record.as_str()]);
}

#[test]
fn that_a_confirmed_prune_removes_it_is_said_of_what_it_removes_and_of_nothing_else() {
    let world = World::new();
    let customer = world.open();
    let names = customer.names();
    let beyond = customer.with_state(|state| state.seq + 5);
    let foreign = ObjectName::new("customers/acme/notes").unwrap();
    for name in [names.key(99), names.ledger(beyond), foreign] {
        world.memory.plant(&name, b"of whom?");
    }
    let told = sweep(&customer, false).unwrap().unexplained;
    assert_eq!(told.len(), 3, "{told:?}");
    assert_eq!(sweep(&customer, true).unwrap().unexplained.len(), 2);
    for problem in told {
        let name = ObjectName::new(problem.split(' ').next().unwrap()).unwrap();
        let is_left = world.memory.size_bytes(&name).is_ok();
        let command = "vmkeep prune --confirm --customer acme";
        assert_eq!(problem.contains(command), !is_left, "{problem}");
        assert_eq!(
            problem.contains("no prune removes it"),
            is_left,
            "{problem}"
        );
    }
}

#[test]
fn spent_probes_go_without_a_word_and_what_is_too_large_for_one_is_reported() {
    let world = World::new();
    let plant = |name: &str, size: u64| {
        let name = ObjectName::new(&format!("customers/acme/probe/{name}")).unwrap();
        world.memory.plant(&name, &vec![7; size as usize]);
    };
    plant("standing", MAX_PROBE_BYTES);
    plant("spent/one", MAX_PROBE_BYTES);
    plant("spent/two", 32);
    plant("spent/three", MAX_PROBE_BYTES + 1);
    let swept = sweep(&world.open(), false).unwrap();
    assert_eq!(swept.removed, []);
    assert_eq!(swept.unexplained.len(), 1, "{:?}", swept.unexplained);
    assert!(swept.unexplained[0].starts_with("customers/acme/probe/spent/three"));
    let left = world.memory.list("customers/acme/probe").unwrap();
    let names = left.iter().map(|object| object.name.as_str());
    assert_eq!(
        Vec::from_iter(names),
        [
            "customers/acme/probe/spent/three",
            "customers/acme/probe/standing"
        ]
    );
    let listed = world.memory.list("customers/acme").unwrap().len();
    assert_eq!(swept.listed, listed as u64);
}

#[test]
fn what_a_dead_writer_left_is_told_as_removed() {
    let world = World::new();
    world.memory.plant_leftover("temporary", 7);
    let swept = sweep(&world.open(), false).unwrap();
    let left = Leftover {
        place: "temporary".to_string(),
        size_bytes: 7,
    };
    assert_eq!(swept.leftovers_removed, [left]);
}

#[test]
fn a_file_without_a_name_is_the_customers_whose_folder_it_is_in_or_everybodys() {
    let world = World::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("store");
    let directory = Arc::new(Directory::init(&path, 0).unwrap());
    for object in world.memory.list("").unwrap() {
        let bytes = world.memory.read(&object.name, u64::MAX).unwrap();
        directory.create(&object.name, &bytes).unwrap();
    }
    // No object can have a name with a space.
    for place in ["customers/acme/a copy", "customers/other/a copy", "a copy"] {
        let file = path.join(place);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, "a copy").unwrap();
    }
    let customer = world.open_unchecked(directory, &world.host).unwrap();
    let swept = sweep(&customer, true).unwrap();
    assert_eq!(swept.unexplained.len(), 1, "{:?}", swept.unexplained);
    assert!(swept.unexplained[0].starts_with("customers/acme/a copy"));
    let left = swept.leftovers.iter().map(|leftover| &leftover.place);
    assert_eq!(Vec::from_iter(left), ["a copy"]);
}

#[test]
fn a_backup_at_any_moment_of_a_sweep_stays_whole() {
    let mut world = World::new();
    let first = world.open();
    world.backup(&first, "web", &image(&[1, 2]), true);
    let snapshot = world.memory.snapshot();
    world.rewind(&snapshot);
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_unchecked(store.clone(), &world.host).unwrap();
    let before = store.operations();
    sweep(&customer, true).unwrap();
    for at in before + 1..=store.operations() {
        world.rewind(&snapshot);
        let store = Arc::new(Faulty::new(world.memory.clone()));
        let customer = world.open_unchecked(store.clone(), &world.host).unwrap();
        let other = world.open_second();
        let gate = store.freeze_before(at);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| sweep(&customer, true).unwrap());
            assert!(gate.wait_until_reached(Duration::from_secs(10)));
            let bytes = image(&[7, 8]);
            let (point, result) = backup(&other, "db", &bytes, true);
            result.unwrap();
            gate.release();
            assert_eq!(thread.join().unwrap().removed, [], "before operation {at}");
            assert!(restore(&other, &point).unwrap() == bytes);
        });
    }
}
