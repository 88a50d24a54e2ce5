//! What `verify` finds is told, also where it cannot be noted, or where the store does not give all of it.

use crate::format::pack::{FRAME_HEADER_BYTES, HEADER_BYTES, PackKind};
use crate::jobs::fake_vm::FakeVm;
use crate::jobs::testing::{Lab, back_up};
use crate::jobs::{
    BackupSettings, JobError, JobErrorKind, Quiet, Verified, VerifyRequest, backup_vm, verify,
    verify_sealed,
};
use crate::model::{ObjectName, PointKind};
use crate::policy::PolicyTerms;
use crate::repository::testing::{CHUNK, TestHost, World, customer_name, image, restore, vm};
use crate::repository::{Customer, RepositoryErrorKind, SealedCustomer};
use crate::storage::{Fault, Faulty, Memory, Storage, StorageErrorKind, Verb};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

static NEVER: AtomicBool = AtomicBool::new(false);

fn look(customer: &Customer, trees: bool, read_percent: Option<u8>) -> Result<Verified, JobError> {
    let request = VerifyRequest {
        trees,
        read_percent,
        unread_since: None,
        threads: 1,
    };
    verify(customer, request, &Quiet, &NEVER)
}

fn look_without_keys(world: &World, store: Arc<dyn Storage>) -> Result<Verified, JobError> {
    let repository = world.file.repository;
    let host = world.host.clone();
    let customer = SealedCustomer::open(store, &customer_name(), repository, host, 1)?;
    verify_sealed(&customer, Some(100), 1, &Quiet, &NEVER)
}

fn packs_of(customer: &Customer, kind: PackKind) -> Vec<ObjectName> {
    let index = customer.load_index().unwrap();
    let packs = index.packs().iter();
    let packs = packs.filter(|info| info.row.kind == kind);
    packs
        .map(|info| customer.names().pack(&info.row.name))
        .collect()
}

/// The first frame does not match its checksum any more.
fn damage(memory: &Memory, name: &ObjectName) {
    let mut bytes = memory.read(name, u64::MAX).unwrap();
    bytes[HEADER_BYTES + FRAME_HEADER_BYTES + 20] ^= 1;
    memory.plant(name, &bytes);
}

fn storage(kind: StorageErrorKind) -> JobErrorKind {
    JobErrorKind::Repository(RepositoryErrorKind::Storage(kind))
}

#[test]
fn what_was_found_is_told_where_the_store_takes_no_entry() {
    for is_damaged in [true, false] {
        let memory = Memory::new();
        let lab = Lab::new(Arc::new(memory.clone()), &PolicyTerms::default());
        let customer = lab.open();
        back_up(&customer, "web", &image(&[1, 2, 3, 4, 5, 6, 7, 8, 9]), true);
        let damaged = packs_of(&customer, PackKind::Data).remove(0);
        if is_damaged {
            damage(&memory, &damaged);
        }
        for trees in [true, false] {
            let takes_none = Fault::FullFrom { at: 0 };
            let store = Faulty::with_faults(memory.clone(), vec![takes_none]);
            let customer = lab.open_on(Arc::new(store), &lab.host);
            let verified = look(&customer, trees, Some(100)).unwrap();
            let names_it = |line: &String| line.contains(damaged.as_str());
            assert_eq!(verified.damage.iter().any(names_it), is_damaged);
            assert!(verified.packs_read > 0);
            let failure = verified.incomplete().unwrap();
            assert_eq!(failure.kind, storage(StorageErrorKind::Full));
            assert!(failure.message.contains("could not be noted"), "{failure}");
        }
    }
}

#[test]
fn who_only_reads_is_told_of_damage_and_that_it_is_not_noted() {
    let mut world = World::new();
    let customer = world.open();
    world.backup(&customer, "web", &image(&[1, 2, 3, 4, 5, 6]), true);
    // As an escrow recipient: it has the key and is no host of the ledger.
    let reader = TestHost::new(&world.time);
    let recipient = reader.identity.recipient();
    customer
        .wrap_key_for(&world.host.identity, &[recipient])
        .unwrap();
    let damaged = packs_of(&customer, PackKind::Data).remove(0);
    for is_damaged in [false, true] {
        if is_damaged {
            damage(&world.memory, &damaged);
        }
        let memory = Arc::new(world.memory.clone());
        let customer = world.open_on(memory, &reader).unwrap();
        for (trees, percent) in [(true, 100), (true, 60), (false, 100)] {
            let verified = look(&customer, trees, Some(percent)).unwrap();
            if percent == 100 {
                assert_eq!(!verified.damage.is_empty(), is_damaged);
            }
            assert_eq!(verified.incomplete(), None);
            let notes = verified.notes.iter();
            let unnoted = notes.filter(|note| note.contains("could not be noted"));
            assert_eq!(unnoted.count(), 1, "{:?}", verified.notes);
        }
    }
}

#[test]
fn what_cannot_be_read_is_named_is_no_damage_and_keeps_nobody_from_the_rest() {
    for kind in [PackKind::Data, PackKind::Node] {
        let mut world = World::new();
        let customer = world.open();
        world.backup(&customer, "web", &image(&[1, 2, 3, 4, 5, 6, 7, 8, 9]), true);
        world.backup(&customer, "db", &image(&[10, 11]), true);
        let unread = packs_of(&customer, kind).pop().unwrap();
        let damaged = packs_of(&customer, PackKind::Data).remove(0);
        assert_ne!(unread, damaged);
        damage(&world.memory, &damaged);
        let store = || -> Arc<Faulty<Memory>> {
            let name = unread.clone();
            let faults = vec![Fault::Unread { name }];
            Arc::new(Faulty::with_faults(world.memory.clone(), faults))
        };
        let check = |verified: Verified| {
            let names = |lines: &[String], name: &ObjectName| {
                lines.iter().any(|line| line.contains(name.as_str()))
            };
            assert!(names(&verified.damage, &damaged), "{verified:?}");
            assert!(!names(&verified.damage, &unread), "{verified:?}");
            assert!(names(&verified.unread, &unread), "{verified:?}");
            assert_eq!(verified.failure, None);
            let incomplete = verified.incomplete().unwrap();
            assert_eq!(incomplete.kind, storage(StorageErrorKind::Unreadable));
        };
        check(look_without_keys(&world, store()).unwrap());

        let host = world.open_on(store(), &world.host).unwrap();
        let trees = look(&host, true, None).unwrap();
        assert_eq!(trees.damage, Vec::<String>::new());
        assert_eq!(!trees.unread.is_empty(), kind == PackKind::Node);

        check(look(&host, true, Some(100)).unwrap());
        // All others are noted as read.
        let packs = world.packs().len();
        assert_eq!(host.with_state(|state| state.verified.len()), packs - 2);
        assert_eq!(host.with_state(|state| state.damaged.len()), 1);
        check(look(&host, false, Some(100)).unwrap());
    }
}

#[test]
fn a_store_that_falls_silent_is_waited_for_once_and_what_was_found_is_told() {
    let mut world = World::new();
    let customer = world.open();
    world.backup(&customer, "web", &image(&[1, 2, 3, 4, 5, 6, 7, 8, 9]), true);
    let packs = world.packs().len();
    for pack in world.packs() {
        damage(&world.memory, &pack);
    }
    let snapshot = world.memory.snapshot();
    let run = |with_key: bool, faults: Vec<Fault>| {
        world.rewind(&snapshot);
        let store = Arc::new(Faulty::with_faults(world.memory.clone(), faults));
        let told = match with_key {
            true => {
                let customer = world.open_on(store.clone(), &world.host).unwrap();
                look(&customer, false, Some(100))
            }
            false => look_without_keys(&world, store.clone()),
        };
        (told.unwrap(), store)
    };
    for with_key in [true, false] {
        let (told, store) = run(with_key, Vec::new());
        assert_eq!((told.damage.len(), told.failure), (packs, None));
        let log = store.log();
        let mut reads = log.iter().filter(|line| line.verb == Verb::Read);
        let last = reads.rfind(|line| line.name.contains("/packs/")).unwrap();

        let (at, kind) = (last.number, StorageErrorKind::Transient);
        let (told, store) = run(with_key, vec![Fault::FailBefore { at, kind }]);
        let failed = told.failure.map(|error| error.kind);
        assert_eq!(
            (told.damage.len(), failed),
            (packs - 1, Some(storage(kind)))
        );
        // Nor is what was found noted there.
        assert_eq!(store.operations(), at);
    }
}

#[test]
fn a_night_whose_base_cannot_be_read_is_a_full_that_relies_on_nothing_that_cannot() {
    let memory = Memory::new();
    let lab = Lab::new(Arc::new(memory.clone()), &PolicyTerms::default());
    let bytes = image(&[1, 2, 3, 4, 5, 6, 7, 8, 9]);
    let guest = FakeVm::new(&[("vda", bytes.clone())]);
    let settings = BackupSettings {
        chunk_bytes: CHUNK as u32,
        threads: 1,
    };
    let night = |customer: &Customer| {
        let (vm, kind) = (vm("web"), PointKind::Incremental);
        backup_vm(customer, &vm, &guest, kind, &settings, &Quiet, &NEVER).unwrap()
    };
    night(&lab.open());
    guest.write("vda", 0, &image(&[21]));
    night(&lab.open());
    guest.write("vda", CHUNK as u64, &image(&[22]));
    // A bad place below each node that there is, in packs that were written just now.
    let nodes = packs_of(&lab.open(), PackKind::Node).into_iter();
    let faults = nodes.map(|name| Fault::Unread { name }).collect();
    let store = Arc::new(Faulty::with_faults(memory, faults));
    let customer = lab.open_on(store, &lab.host);
    let done = night(&customer);
    assert_eq!(done.kind, PointKind::Full);
    assert!(restore(&customer, &done.point).is_ok_and(|restored| restored == guest.bytes("vda")));
    // The next night goes on from it.
    guest.write("vda", 2 * CHUNK as u64, &image(&[23]));
    let done = night(&customer);
    assert_eq!(done.kind, PointKind::Incremental);
    assert!(restore(&customer, &done.point).is_ok());
}

#[test]
fn a_store_that_gives_nothing_any_more_is_not_waited_for_once_a_pack() {
    let memory = Memory::new();
    let lab = Lab::new(Arc::new(memory.clone()), &PolicyTerms::default());
    let customer = lab.open();
    for number in 0..20 {
        let name = format!("vm{number}");
        back_up(&customer, &name, &image(&[100 + number]), true);
    }
    let kinds = [PackKind::Data, PackKind::Node];
    let packs = kinds.map(|kind| packs_of(&customer, kind)).concat();
    let faults = packs
        .iter()
        .map(|name| Fault::Unread { name: name.clone() });
    let store = Arc::new(Faulty::with_faults(memory, faults.collect()));
    let customer = lab.open_on(store.clone(), &lab.host);
    let before = store.operations();
    let verified = look(&customer, false, Some(100)).unwrap();
    let asked = store.log().into_iter().filter(|operation| {
        operation.number > before
            && operation.verb == Verb::Read
            && packs.iter().any(|name| operation.name == name.as_str())
    });
    let asked = asked.count();
    assert!((2..packs.len()).contains(&asked), "{asked}");
    let failure = verified.incomplete().unwrap();
    assert_eq!(failure.kind, storage(StorageErrorKind::Unreadable));
}
