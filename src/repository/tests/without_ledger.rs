//! The last means: what is whole is restored where the ledger, or the index, is not.

use super::super::reclaim::merge_segments;
use super::super::testing::*;
use super::super::*;
use super::damage::{damage, packs_of};
use crate::codec::{CustomerKey, HostIdentity, age};
use crate::format::entry::Body;
use crate::format::pack::PackKind;
use crate::model::{CustomerUid, ObjectName, Writers};
use crate::policy::PolicyTerms;
use crate::storage::Storage;
use std::sync::Arc;

fn below(world: &World, folder: &str) -> Vec<ObjectName> {
    let listed = world.memory.list(&format!("customers/acme/{folder}"));
    let listed = listed.unwrap().into_iter();
    listed.map(|object| object.name).collect()
}

fn flip(world: &World, name: &ObjectName) {
    let mut bytes = world.memory.read(name, u64::MAX).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    world.memory.plant(name, &bytes);
}

fn lose_all(world: &World, folder: &str) {
    for name in below(world, folder) {
        world.memory.delete(&name).unwrap();
    }
}

fn open_as(world: &World, identity: &HostIdentity) -> Result<WithoutLedger, RepositoryError> {
    let settings = WriteSettings {
        pack_bytes: 4 * CHUNK,
        compression_level: 1,
        segment_records: 24,
        threads: 2,
    };
    WithoutLedger::open(
        Arc::new(world.memory.clone()),
        &customer_name(),
        world.file.repository,
        identity,
        world.second.clone(),
        settings,
        &PolicyTerms::default(),
    )
}

/// As a host that has seen nothing of the store yet.
fn open_anew(world: &World) -> WithoutLedger {
    world.second.forget();
    open_as(world, &world.second.identity).unwrap()
}

fn refusal(world: &World) -> RepositoryError {
    world.second.forget();
    let storage = Arc::new(world.memory.clone());
    world.open_on(storage, &world.second).err().unwrap()
}

fn all_restore(world: &World, customer: &Customer) {
    for (point, bytes) in &world.model {
        let restored = restore(customer, point).unwrap();
        assert!(restored == *bytes, "{point} restores to other bytes");
    }
}

/// Three points of two VMs, in more than one pack and segment.
fn with_points() -> World {
    let mut world = World::new();
    let customer = world.open();
    let mut chunks: Vec<u32> = (1..=40).collect();
    world.backup(&customer, "web", &image(&chunks), true);
    world.time.pass(DAY);
    chunks[7] = 99;
    world.backup(&customer, "web", &image(&chunks), false);
    world.backup(&customer, "db", &image(&[1, 2, 50]), true);
    world
}

#[test]
fn a_ledger_with_a_bad_byte_a_gap_or_nothing_left_keeps_nobody_from_the_points() {
    let world = with_points();
    let before = world.open().state();
    let intact = world.memory.snapshot();
    for loss in ["a bad byte", "a gap", "all of it", "the index too"] {
        world.memory.restore_snapshot(&intact);
        let entry = ObjectName::new("customers/acme/ledger/0000000000000005").unwrap();
        match loss {
            "a bad byte" => flip(&world, &entry),
            "a gap" => world.memory.delete(&entry).unwrap(),
            _ => lose_all(&world, "ledger"),
        }
        if loss == "the index too" {
            lose_all(&world, "index");
        }
        assert!(refusal(&world).is_damage(), "{loss}");
        let opened = open_anew(&world);
        assert!(
            opened.broken.is_some_and(|error| error.is_damage()),
            "{loss}"
        );
        assert_eq!(opened.passed_over, [], "{loss}");
        let customer = opened.customer;
        all_restore(&world, &customer);
        // What a record tells is what the ledger told.
        let state = customer.state();
        assert_eq!(state.points.len(), before.points.len());
        for (id, point) in &before.points {
            let told = &state.points[id];
            assert_eq!((&told.vm, told.kind), (&point.vm, point.kind));
            assert_eq!(told.taken_at, point.taken_at);
            assert_eq!(told.expires_at, point.expires_at);
            assert_eq!(told.disks, point.disks);
        }
        // Nothing is added to a ledger of which this is not the end.
        let body = world.second.body();
        let refused = customer.append(|_| Ok(Body::Host(body.clone())));
        assert_eq!(refused.unwrap_err().kind, RepositoryErrorKind::Refused);
        assert!(customer.may_write().is_err());
    }
}

#[test]
fn an_index_of_which_any_segment_is_lost_or_damaged_is_made_up_from_the_packs() {
    let mut world = with_points();
    let customer = world.open();
    // Segments that were merged list the same packs, each another range of tags.
    for night in 0..13 {
        world.backup(&customer, "db", &image(&[1, 2, 100 + night]), false);
    }
    assert!(merge_segments(&customer).unwrap());
    let intact = world.memory.snapshot();
    let segments = below(&world, "index");
    assert!(segments.len() > 1, "{segments:?}");
    for segment in segments {
        for lost in [true, false] {
            world.memory.restore_snapshot(&intact);
            match lost {
                true => world.memory.delete(&segment).unwrap(),
                false => flip(&world, &segment),
            }
            let opened = open_anew(&world);
            assert_eq!(opened.broken, None);
            assert_eq!(opened.passed_over.len(), usize::from(!lost), "{segment}");
            all_restore(&world, &opened.customer);
        }
    }
}

#[test]
fn a_damaged_chunk_is_not_restored_without_the_ledger_either() {
    let world = with_points();
    lose_all(&world, "ledger");
    for pack in packs_of(&world, PackKind::Data) {
        damage(&world, &pack);
    }
    let customer = open_anew(&world).customer;
    let mut failed = 0;
    for (point, bytes) in &world.model {
        match restore(&customer, point) {
            Ok(restored) => assert!(restored == *bytes),
            Err(error) => {
                assert!(error.is_damage(), "{error}");
                failed += 1;
            }
        }
    }
    assert!(failed > 0);
}

#[test]
fn a_record_that_does_not_open_is_named_and_takes_no_other_point_with_it() {
    let mut world = with_points();
    lose_all(&world, "ledger");
    let (point, _) = world.model.pop_first().unwrap();
    let name = ObjectName::new(&format!("customers/acme/points/{point}")).unwrap();
    flip(&world, &name);
    let opened = open_anew(&world);
    let named: Vec<&str> = opened
        .passed_over
        .iter()
        .map(|one| one.name.as_str())
        .collect();
    assert_eq!(named, [name.as_str()]);
    all_restore(&world, &opened.customer);
    assert!(restore(&opened.customer, &point).is_err());
}

#[test]
fn a_key_that_opens_no_key_file_is_the_wrong_one_and_a_key_file_of_nobody_is_passed_by() {
    let world = with_points();
    lose_all(&world, "ledger");
    let stranger = TestHost::new(&world.time);
    let refused = open_as(&world, &stranger.identity).err().unwrap();
    assert_eq!(refused.kind, RepositoryErrorKind::WrongKey);
    // A newer one, whose maker died before an entry named it.
    let other = CustomerKey::generate(CustomerUid::from_bytes([7; 16]));
    let recipient = world.second.identity.recipient();
    let sealed = age::encrypt(&[recipient], &other.to_key_file()).unwrap();
    let name = ObjectName::new("customers/acme/key/9.age").unwrap();
    world.memory.plant(&name, &sealed);
    all_restore(&world, &open_anew(&world).customer);
}

#[test]
fn what_a_ledger_that_can_be_read_calls_expired_is_not_restored() {
    let world = with_points();
    let customer = world.open();
    let (expired, _) = world.model.first_key_value().unwrap();
    change(&customer, *expired, Body::Expire).unwrap();
    let opened = open_anew(&world);
    assert_eq!(opened.broken, None);
    for point in world.model.keys() {
        let restored = restore(&opened.customer, point);
        assert_eq!(restored.is_err(), point == expired);
    }
}

#[test]
fn a_ledger_that_is_gone_is_begun_anew_by_nobody_as_long_as_there_are_points() {
    let world = with_points();
    lose_all(&world, "ledger");
    world.second.forget();
    let storage: Arc<dyn Storage> = Arc::new(world.memory.clone());
    let new = NewCustomer {
        repository: world.file.repository,
        name: &customer_name(),
        host: world.second.body(),
        recipients: vec![world.second.identity.recipient()],
        terms: &PolicyTerms::default(),
        writers: Writers::Many,
    };
    let refused = Customer::create(&storage, &new, &*world.second).unwrap_err();
    assert_eq!(refused.kind, RepositoryErrorKind::Damaged, "{refused}");
    lose_all(&world, "points");
    Customer::create(&storage, &new, &*world.second).unwrap();
}
