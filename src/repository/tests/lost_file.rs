//! A store that has lost its `vmkeep.json`.

use crate::format::names::{CustomerNames, repository_file};
use crate::format::repository_file::RepositoryFile;
use crate::model::{CustomerName, ObjectName, RepositoryId, Writers};
use crate::policy::PolicyTerms;
use crate::repository::testing::{CHUNK, World};
use crate::repository::{
    Customer, NewCustomer, RepositoryErrorKind, create_repository, new_repository, open_repository,
    recover_repository,
};
use crate::storage::{Memory, Storage};
use std::sync::Arc;

fn new(world: &World) -> RepositoryFile {
    new_repository(world.now(), 2 * CHUNK as u32, Writers::Many)
}

fn make(world: &World, storage: &Arc<dyn Storage>, name: &CustomerName, repository: RepositoryId) {
    let new = NewCustomer {
        repository,
        name,
        host: world.host.body(),
        recipients: vec![world.host.identity.recipient()],
        terms: &PolicyTerms::default(),
        writers: Writers::Many,
    };
    Customer::create(storage, &new, &*world.host).unwrap();
}

#[test]
fn a_repository_is_known_by_the_ledgers_of_its_customers() {
    for world in [World::new(), World::of_one_host()] {
        let storage: Arc<dyn Storage> = Arc::new(world.memory.clone());
        storage.delete(&repository_file()).unwrap();
        let told = recover_repository(&storage, &new(&world)).unwrap();
        let told = told.expect("the store has a customer");
        let expected = RepositoryFile {
            chunk_bytes: 2 * CHUNK as u32,
            ..world.file.clone()
        };
        assert_eq!(told, expected);
        create_repository(&*storage, told).unwrap();
        assert_eq!(open_repository(&*storage).unwrap(), expected);
        world.open();
    }
}

#[test]
fn customers_of_two_repositories_tell_of_none() {
    let world = World::new();
    let storage: Arc<dyn Storage> = Arc::new(world.memory.clone());
    let name = CustomerName::new("other").unwrap();
    make(&world, &storage, &name, RepositoryId::from_bytes([9; 16]));
    let error = recover_repository(&storage, &new(&world)).unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Damaged);
}

#[test]
fn objects_without_a_ledger_belong_to_a_repository_that_nobody_knows() {
    let world = World::new();
    let memory = Memory::new();
    let storage: Arc<dyn Storage> = Arc::new(memory.clone());
    assert_eq!(recover_repository(&storage, &new(&world)).unwrap(), None);
    let pack = ObjectName::new("customers/acme/packs/of-somebody").unwrap();
    memory.plant(&pack, b"bytes");
    let error = recover_repository(&storage, &new(&world)).unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Damaged);
}

#[test]
fn a_customer_whose_first_entry_is_damaged_keeps_nobody_from_the_others() {
    let world = World::new();
    let storage: Arc<dyn Storage> = Arc::new(world.memory.clone());
    let name = CustomerName::new("aa-first").unwrap();
    make(&world, &storage, &name, world.file.repository);
    let first = CustomerNames::new(&name).ledger(1);
    world.memory.plant(&first, b"damaged");
    // Nor does a stray name below an entry's make it another kind of ledger.
    let real = world.open().names().ledger(1);
    let stray = ObjectName::new(&format!("{real}/{}", "0".repeat(64))).unwrap();
    world.memory.plant(&stray, b"junk");
    let told = recover_repository(&storage, &new(&world)).unwrap().unwrap();
    assert_eq!(told.repository, world.file.repository);
    // Where nobody else tells, the damage is what is said.
    let alone = Memory::new();
    alone.plant(&first, b"damaged");
    let storage: Arc<dyn Storage> = Arc::new(alone);
    let error = recover_repository(&storage, &new(&world)).unwrap_err();
    assert_eq!(error.name, first.to_string());
}
