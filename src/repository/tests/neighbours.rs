//! What stands in the store beside a customer.

use super::super::testing::*;
use super::super::*;
use crate::model::{CustomerName, ObjectName};
use crate::policy::PolicyTerms;
use crate::storage::{Faulty, MAX_PROBE_BYTES, Memory, Part};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

fn plant(memory: &Memory, name: &str, size_bytes: u64) {
    let name = ObjectName::new(name).unwrap();
    memory.plant(&name, &vec![7; size_bytes as usize]);
}

/// As `cp -a` does.
fn copy(memory: &Memory, from: &str, to: &str) {
    for object in memory.list(from).unwrap() {
        let rest = object.name.as_str().strip_prefix(from).unwrap();
        let name = ObjectName::new(&format!("{to}{rest}")).unwrap();
        memory.plant(&name, &memory.read(&object.name, u64::MAX).unwrap());
    }
}

fn make(world: &World, name: &str, repository: RepositoryId) {
    let storage: Arc<dyn Storage> = Arc::new(world.memory.clone());
    let new = NewCustomer {
        repository,
        name: &CustomerName::new(name).unwrap(),
        host: world.host.body(),
        recipients: vec![world.host.identity.recipient()],
        terms: &PolicyTerms::default(),
        writers: world.file.writers(),
    };
    Customer::create(&storage, &new, &*world.host).unwrap();
}

fn part(name: &str, is_prefix: bool) -> Part {
    let name = name.to_string();
    Part { name, is_prefix }
}

#[test]
fn a_customer_is_told_from_a_copy_and_from_one_of_another_repository_or_that_is_being_made() {
    for world in [World::new(), World::of_one_host()] {
        let memory = &world.memory;
        make(&world, "beta", world.file.repository);
        make(&world, "theirs", RepositoryId::from_bytes([9; 16]));
        copy(memory, "customers/acme", "customers/acme.bak");
        plant(memory, "customers/making/probe/ab", MAX_PROBE_BYTES);
        plant(memory, "customers/heap/probe/ab", MAX_PROBE_BYTES + 1);
        plant(memory, "customers/pile/packs/ab", 7);
        make(&world, "cut", world.file.repository);
        let first = &memory.list("customers/cut/ledger").unwrap()[0].name;
        memory.delete(first).unwrap();
        let storage: Arc<dyn Storage> = Arc::new(memory.clone());
        let (repository, writers) = (world.file.repository, world.file.writers());
        let met = |part: Part| meet(&storage, repository, writers, &part).unwrap();
        let host = world.host.identity.host_id();
        for name in ["acme", "beta"] {
            let told = met(part(name, true));
            let is_one = matches!(&told, Neighbour::Customer { made_by, .. } if *made_by == host);
            assert!(is_one, "{name}: {told:?}");
        }
        for name in ["making", "gone-meanwhile"] {
            assert_eq!(met(part(name, true)), Neighbour::Unmade, "{name}");
        }
        let told = met(part("cut", true));
        assert!(matches!(told, Neighbour::Unknown(_)), "{told:?}");
        for (stranger, what) in [
            (part("acme.bak", true), "a copy of customer \"acme\""),
            (part("theirs", true), "of another repository"),
            (part("heap", true), "objects without a ledger"),
            (part("pile", true), "objects without a ledger"),
            (part("acme.tar", false), "a file in the place of one"),
            (part("a copy", true), "no customer can have this name"),
        ] {
            let place = format!("customers/{} (", stranger.name);
            match met(stranger) {
                Neighbour::Stranger(told) => {
                    assert!(told.starts_with(&place) && told.contains(what), "{told}");
                }
                other => panic!("{place}: {other:?}"),
            }
        }
    }
}

#[test]
fn what_has_a_first_entry_that_cannot_be_read_may_be_a_customer_and_one_out_of_reach_is_not_judged()
{
    let world = World::new();
    let (repository, writers) = (world.file.repository, world.file.writers());
    let met = |storage: Arc<dyn Storage>| meet(&storage, repository, writers, &part("acme", true));
    let failing = |kind| {
        let far = Faulty::new(world.memory.clone());
        far.add(crate::storage::Fault::FailBefore { at: 1, kind });
        met(Arc::new(far))
    };
    let kind = StorageErrorKind::Transient;
    let told = failing(kind).map_err(|error| error.kind);
    assert_eq!(told, Err(RepositoryErrorKind::Storage(kind)));
    let unknown = |told: Result<Neighbour, RepositoryError>| match told {
        Ok(Neighbour::Unknown(error)) => error,
        other => panic!("{other:?}"),
    };
    for kind in [StorageErrorKind::Unreadable, StorageErrorKind::Denied] {
        let told = unknown(failing(kind));
        assert_eq!(told.kind, RepositoryErrorKind::Storage(kind));
    }
    let first = world.open().names().ledger(1);
    let sound = world.memory.read(&first, u64::MAX).unwrap();
    world.memory.plant(&first, b"damaged");
    let told = unknown(met(Arc::new(world.memory.clone())));
    assert!(
        told.is_damage() && told.to_string().contains(first.as_str()),
        "{told}"
    );
    let text = String::from_utf8(sound.to_vec()).unwrap();
    let newer = text.replacen("\"vmkeep\":1", "\"vmkeep\":2", 1);
    world.memory.plant(&first, newer.as_bytes());
    let told = unknown(met(Arc::new(world.memory.clone())));
    assert_eq!(told.kind, RepositoryErrorKind::Newer, "{told}");
    world.memory.delete(&first).unwrap();
    let told = unknown(met(Arc::new(world.memory.clone())));
    assert!(
        told.to_string().contains("first ledger entry is missing"),
        "{told}"
    );
}

#[test]
fn what_a_file_system_owns_or_nobody_here_may_read_beside_the_customers_keeps_no_certificate_back()
{
    let world = World::new();
    plant(&world.memory, "theirs/alone", 7);
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_unchecked(store.clone(), &world.host).unwrap();
    // After the listing of the root.
    let at = store.operations() + 2;
    let kind = StorageErrorKind::Denied;
    store.add(crate::storage::Fault::FailBefore { at, kind });
    assert_eq!(strangers(&customer, &mut BTreeMap::new()).unwrap(), []);
    let told =
        |name: &str| super::super::neighbours::copy_in(&customer, &part(name, true)).unwrap();
    assert_eq!(told("lost+found"), None);
    assert!(told("a copy").is_some());
}

#[test]
fn a_customer_that_is_made_while_it_is_looked_at_is_one() {
    let world = World::new();
    plant(&world.memory, "customers/late/probe/ab", 7);
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let storage: Arc<dyn Storage> = store.clone();
    let (repository, writers) = (world.file.repository, world.file.writers());
    // Its first entry was missing when it was read first.
    let gate = store.freeze_before(2);
    std::thread::scope(|scope| {
        let look = || meet(&storage, repository, writers, &part("late", true));
        let thread = scope.spawn(look);
        assert!(gate.wait_until_reached(Duration::from_secs(10)));
        make(&world, "late", repository);
        gate.release();
        let told = thread.join().unwrap().unwrap();
        assert!(matches!(told, Neighbour::Customer { .. }), "{told:?}");
    });
}

#[test]
fn beside_a_customer_nothing_may_stand_but_others_of_its_repository() {
    let world = World::new();
    make(&world, "beta", world.file.repository);
    plant(&world.memory, "customers/making/probe/ab", 7);
    let customer = world.open();
    let told = || strangers(&customer, &mut BTreeMap::new()).unwrap();
    assert_eq!(told(), []);
    // A bucket may hold more than the repository.
    plant(&world.memory, "somebody/else/is/here", 7);
    assert_eq!(told(), []);
    copy(&world.memory, "customers/acme", "customers/acme.bak");
    copy(&world.memory, "customers", "customers-before-the-move");
    copy(&world.memory, "customers", "old/customers");
    copy(&world.memory, "customers/acme", "acme.bak");
    // A customer of the same name of another repository.
    let other = World::new();
    for object in other.memory.list("customers").unwrap() {
        let bytes = other.memory.read(&object.name, u64::MAX).unwrap();
        let name = ObjectName::new(&format!("another/{}", object.name)).unwrap();
        world.memory.plant(&name, &bytes);
    }
    let found = told();
    let places = [
        "acme.bak (",
        "customers-before-the-move/acme (",
        "old/customers/acme (",
        "customers/acme.bak (",
    ];
    assert_eq!(found.len(), places.len(), "{found:?}");
    for (found, place) in found.iter().zip(places) {
        let is_there = matches!(found, Neighbour::Stranger(what) if what.starts_with(place));
        assert!(is_there, "{found:?}");
    }
}

#[test]
fn another_customer_is_read_once_and_one_that_says_that_it_is_this_one_is_told_each_time() {
    let world = World::new();
    make(&world, "beta", world.file.repository);
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_unchecked(store.clone(), &world.host).unwrap();
    let mut met = BTreeMap::new();
    let mut asked = || {
        let before = store.operations();
        let found = strangers(&customer, &mut met).unwrap();
        assert_eq!(found, []);
        store.operations() - before
    };
    // Two listings, and a first entry.
    assert_eq!([asked(), asked()], [3, 2]);
    let mut met = BTreeMap::from([("beta".to_string(), customer.uid())]);
    for _ in 0..2 {
        let found = strangers(&customer, &mut met).unwrap();
        let told = "customers/beta (says that it is customer acme)".to_string();
        assert_eq!(found, [Neighbour::Stranger(told)]);
    }
}
