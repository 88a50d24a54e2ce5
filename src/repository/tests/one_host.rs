//! A repository that one host writes: what is under way when a process dies lands beside, never on it.

use super::super::rule::{Off, Rule};
use super::super::testing::*;
use super::super::*;
use crate::format::names::ObjectRole;
use crate::model::{InstallationId, ObjectName};
use crate::storage::{Memory, Storage};
use std::sync::Arc;

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

/// The process that last had the turn died in it.
fn die_in_turn(world: &World) {
    *lock(&world.host.turns().is_clean) = false;
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
    assert_eq!(count("seal"), 1);
    let before = customer.with_state(|state| state.seq);
    die_in_turn(&world);
    customer
        .append(|state| {
            Ok(crate::format::entry::Body::Policy(
                crate::format::entry::PolicyBody {
                    terms: terms_map(state.terms.as_ref().unwrap()),
                },
            ))
        })
        .unwrap();
    assert_eq!(count("seal"), 2);
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
    die_in_turn(&world);
    let next = world.open();
    assert_eq!(next.abort_dead_sessions(world.now()).unwrap(), 1);
    let packs = next.names().session_packs(&session);
    assert_eq!(world.memory.list(&packs).unwrap(), []);
    world.memory.plant(&late, &bytes);
    let reader = world
        .open_unchecked(Arc::new(world.memory.clone()), &world.host)
        .unwrap();
    let counts = reader.with_state(|state| state.points.contains_key(&point));
    if !counts {
        assert!(reader.with_state(|state| state.aborted.contains(&session)));
        assert!(sweep(&reader, false).unwrap().unexplained.is_empty());
        assert_eq!(next.state(), reader.state());
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
    let begun = |customer: &Customer| {
        let purpose = crate::format::entry::Purpose::Merge;
        customer.begin(purpose, None).unwrap()
    };
    let seq = customer.with_state(|state| state.seq);
    let before = world.memory.snapshot();
    let one = begun(&customer);
    // Another reality, in which another entry took the place and was gone on from.
    world.memory.restore_snapshot(&before);
    world.host.forget();
    let other = world.open();
    let (two, three) = (begun(&other), begun(&other));
    customer.refresh().unwrap();
    assert_eq!(customer.state(), other.state());
    let open = |id| customer.with_state(|state| state.open.contains_key(id));
    assert!(open(&two.id) && open(&three.id) && !open(&one.id));
    assert_eq!(customer.with_state(|state| state.seq), seq + 2);
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
fn two_hosts_that_went_on_from_one_entry_are_damage_and_nothing_is_written() {
    let mut world = World::of_one_host();
    let customer = world.open();
    world.backup(&customer, "web", &image(&[1]), true);
    let elsewhere = Memory::from_snapshot(&world.memory.snapshot());
    let there = world
        .open_unchecked(Arc::new(elsewhere.clone()), &world.host)
        .unwrap();
    let two = |customer: &Customer| {
        for _ in 0..2 {
            let purpose = crate::format::entry::Purpose::Merge;
            customer.begin(purpose, None).unwrap();
        }
    };
    two(&customer);
    two(&there);
    for (name, bytes) in entries(&elsewhere, &customer) {
        world.memory.plant(&name, &bytes);
    }
    world.host.forget();
    let opened = world.open_unchecked(Arc::new(world.memory.clone()), &world.host);
    let error = opened.map(drop).unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Damaged);
    assert!(error.detail.contains("two hosts"), "{}", error.detail);
}

#[test]
fn nobody_else_is_let_in_and_entries_of_the_other_kind_are_told() {
    let world = World::of_one_host();
    let customer = world.open();
    let body = world.second.body();
    let error = customer
        .append(|_| Ok(crate::format::entry::Body::Host(body.clone())))
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
    let seal = crate::format::entry::SealBody {
        installation: InstallationId::from_bytes([1; 16]),
    };
    let error = customer
        .append(|_| Ok(crate::format::entry::Body::Seal(seal.clone())))
        .unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Superseded);
}
