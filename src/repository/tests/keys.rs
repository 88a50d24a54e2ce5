//! Key files: none is left that no entry names.

use crate::format::entry::{Body, HostBody, Role};
use crate::repository::RepositoryErrorKind;
use crate::repository::testing::World;
use crate::storage::{Fault, Faulty, Storage, StorageErrorKind};
use std::sync::Arc;

#[test]
fn a_host_without_the_role_writes_no_key_file() {
    let world = World::new();
    let body = HostBody {
        roles: vec![Role::Backup, Role::Restore],
        ..world.second.body()
    };
    let enter = || world.open().append(|_| Ok(Body::Host(body.clone())));
    enter().unwrap();
    let customer = world.open_second();
    let (before, seq) = (world.key_files(), customer.state().seq);
    let identity = &world.second.identity;
    let refused = customer.wrap_key_for(identity, &[identity.recipient()]);
    assert_eq!(refused.unwrap_err().kind, RepositoryErrorKind::Refused);
    assert_eq!((world.key_files(), customer.state().seq), (before, seq));
}

#[test]
fn a_key_file_whose_entry_is_refused_does_not_stay() {
    let mut refused = 0;
    for step in 1..=8 {
        let world = World::new();
        let store = Arc::new(Faulty::new(world.memory.clone()));
        let customer = world.open_unchecked(store.clone(), &world.host).unwrap();
        let before = world.key_files();
        store.add(Fault::FailBefore {
            at: store.operations() + step,
            kind: StorageErrorKind::Denied,
        });
        let identity = &world.host.identity;
        match customer.wrap_key_for(identity, &[identity.recipient()]) {
            Err(error) if error.kind != RepositoryErrorKind::Uncertain => {
                refused += 1;
                assert_eq!(world.key_files(), before, "{step}");
            }
            Err(_) | Ok(()) => {}
        }
        store.clear_faults();
        customer.refresh().unwrap();
        for row in &customer.state().keys {
            let name = customer.names().key(row.object);
            assert!(world.memory.size_bytes(&name).is_ok(), "{step}: {name}");
        }
    }
    assert!(refused > 2, "{refused}");
}
