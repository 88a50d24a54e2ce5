//! Packs and the like that the store lets nobody delete: not yet, because they are locked, or not at all.

use super::super::reclaim::{Reclaimed, reclaim};
use super::super::testing::*;
use super::super::*;
use super::damage::{condemn_wrongly, pack_name, packs_of};
use crate::format::pack::PackKind;
use crate::model::{ObjectHash, ObjectName, PackName, SessionId};
use crate::storage::{Leftover, Listed, Memory, Storage, StorageError, StorageErrorKind, Survey};
use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

#[derive(Clone)]
struct Keeping {
    memory: Memory,
    locked: Arc<Mutex<BTreeSet<ObjectName>>>,
    refused: Arc<Mutex<BTreeSet<ObjectName>>>,
    /// Whose lock was asked for.
    asked: Arc<Mutex<Vec<ObjectName>>>,
}

impl Keeping {
    fn of(world: &World) -> Self {
        Keeping {
            memory: world.memory.clone(),
            locked: Arc::default(),
            refused: Arc::default(),
            asked: Arc::default(),
        }
    }

    fn lock(&self, names: &[&ObjectName]) {
        *lock(&self.locked) = names.iter().map(|name| (*name).clone()).collect();
    }

    fn refuse(&self, names: &[ObjectName]) {
        *lock(&self.refused) = names.iter().cloned().collect();
    }

    fn may_go(&self, name: &ObjectName) -> Result<(), StorageError> {
        let kind = match () {
            () if lock(&self.locked).contains(name) => StorageErrorKind::Locked,
            () if lock(&self.refused).contains(name) => StorageErrorKind::Denied,
            () => return Ok(()),
        };
        Err(StorageError::new(kind, name, "a test"))
    }

    fn open(&self, world: &World) -> Customer {
        world.open_on(Arc::new(self.clone()), &world.host).unwrap()
    }
}

impl Storage for Keeping {
    fn behind(&self) -> Option<&dyn Storage> {
        Some(&self.memory)
    }

    fn create(&self, name: &ObjectName, data: &[u8]) -> Result<(), StorageError> {
        self.memory.create(name, data)
    }

    fn read(&self, name: &ObjectName, max_bytes: u64) -> Result<Vec<u8>, StorageError> {
        self.memory.read(name, max_bytes)
    }

    fn read_range(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StorageError> {
        self.memory.read_range(name, offset, buffer)
    }

    fn size_bytes(&self, name: &ObjectName) -> Result<u64, StorageError> {
        self.memory.size_bytes(name)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>, StorageError> {
        self.memory.list(prefix)
    }

    fn delete(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.may_go(name)?;
        self.memory.delete(name)
    }

    fn destroy(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.may_go(name)?;
        self.memory.destroy(name)
    }

    fn locked_until(&self, name: &ObjectName) -> Result<Option<Timestamp>, StorageError> {
        lock(&self.asked).push(name.clone());
        let locked = lock(&self.locked).contains(name);
        Ok(locked.then_some(Timestamp::MAX))
    }

    fn sweep_leftovers(&self, prefix: &str) -> Result<Vec<Leftover>, StorageError> {
        self.memory.sweep_leftovers(prefix)
    }

    fn survey(&self, prefix: &str) -> Result<Survey, StorageError> {
        self.memory.survey(prefix)
    }

    fn location(&self) -> String {
        "keeping".to_string()
    }
}

fn reclaimed(world: &World, customer: &Customer, budget: SignedDuration) -> Reclaimed {
    let done = reclaim(customer, world.now(), budget, false).unwrap();
    customer.note_reclaimed(&done).unwrap();
    done
}

fn condemned(customer: &Customer) -> BTreeSet<PackName> {
    customer.with_state(|state| state.condemned.keys().copied().collect())
}

#[test]
fn what_is_locked_is_not_condemned_and_goes_once_its_lock_has_ended() {
    let mut world = World::new();
    let customer = world.open();
    let dead = world.backup(&customer, "web", &image(&[1, 2]), true);
    let all_dead = packs_of(&world, PackKind::Data).remove(0);
    let dying = world.backup(&customer, "db", &image(&[3, 4, 5]), true);
    let mut partly_dead = packs_of(&world, PackKind::Data);
    partly_dead.retain(|name| *name != all_dead);
    let partly_dead = partly_dead.remove(0);
    let go = world.packs();
    world.backup(&customer, "db", &image(&[3, 4, 6]), false);
    world.erase(&customer, dead);
    world.erase(&customer, dying);
    let store = Keeping::of(&world);
    store.lock(&[&all_dead, &partly_dead]);
    let customer = store.open(&world);
    let done = reclaimed(&world, &customer, DAY * 4000);
    assert_eq!(done.dead_and_locked, [pack_name(&all_dead)]);
    assert_eq!((done.removed.len(), done.rewritten_bytes), (2, 0));
    for name in [&all_dead, &partly_dead] {
        assert!(!condemned(&customer).contains(&pack_name(name)));
    }
    // One request each: of what stays nothing is asked.
    let mut asked = std::mem::take(&mut *lock(&store.asked));
    asked.sort_unstable();
    assert_eq!(asked, go);
    store.lock(&[]);
    let done = reclaimed(&world, &customer, DAY * 4000);
    assert_eq!(done.dead_and_locked, []);
    let removed = BTreeSet::from_iter(done.removed);
    assert_eq!(removed, [&all_dead, &partly_dead].map(pack_name).into());
    world.check(&customer);
    world.quiesce(&customer);
}

#[test]
fn what_was_condemned_wrongly_is_rescued_whatever_is_locked_or_refused() {
    for is_locked in [true, false] {
        let mut world = World::new();
        let customer = world.open();
        world.backup(&customer, "web", &image(&[1, 2, 3]), true);
        let packs = world.packs();
        condemn_wrongly(&customer, packs.iter().map(pack_name).collect());
        // Dead, and condemned rightly.
        let dead = world.backup(&customer, "db", &image(&[4, 5]), true);
        world.erase(&customer, dead);
        let store = Keeping::of(&world);
        match is_locked {
            true => store.lock(&Vec::from_iter(&packs)),
            false => store.refuse(&world.packs()),
        }
        let customer = store.open(&world);
        let done = reclaimed(&world, &customer, DAY * 4000);
        assert_eq!(done.withheld, []);
        for name in &packs {
            assert!(world.packs().contains(name));
            world.memory.delete(name).unwrap();
        }
        world.check(&customer);
    }
}

/// Three VMs, of each of which a pack is partly dead, the first at the earliest deadline, in a store
/// that refuses to delete what is dead whole; and these packs.
fn three_partly_dead() -> (World, Keeping, Customer, Vec<PackName>) {
    let mut world = World::new();
    let store = Keeping::of(&world);
    let customer = store.open(&world);
    let mut dying = Vec::new();
    let mut packs: Vec<ObjectName> = Vec::new();
    for (name, chunk) in [("web", 10), ("db", 20), ("mail", 30)] {
        let before = packs_of(&world, PackKind::Data);
        let first = image(&[chunk, chunk + 1, chunk + 2]);
        dying.push(world.backup(&customer, name, &first, true));
        let mut new = packs_of(&world, PackKind::Data);
        new.retain(|name| !before.contains(name));
        packs.append(&mut new);
        let second = image(&[chunk, chunk + 1, chunk + 3]);
        world.backup(&customer, name, &second, false);
        world.time.pass(DAY);
    }
    store.refuse(&world.packs());
    for point in dying {
        world.erase(&customer, point);
        let done = reclaimed(&world, &customer, DAY);
        assert!(done.refused.is_some());
    }
    // The node of each is dead; nothing had to be rewritten.
    assert_eq!(condemned(&customer).len(), 3);
    let packs = packs.iter().map(pack_name).collect();
    (world, store, customer, packs)
}

#[test]
fn where_nothing_can_be_deleted_the_most_urgent_pack_alone_is_rewritten() {
    let (world, store, customer, packs) = three_partly_dead();
    for urgent in packs {
        let before = condemned(&customer);
        let done = reclaimed(&world, &customer, DAY * 4000);
        assert!(done.refused.is_some());
        let after = condemned(&customer);
        assert_eq!(Vec::from_iter(after.difference(&before)), [&urgent]);
    }
    store.refuse(&[]);
    reclaimed(&world, &customer, DAY * 4000);
    world.check(&customer);
    world.quiesce(&customer);
}

#[test]
fn after_a_refusal_all_is_rewritten_as_soon_as_one_pack_that_was_is_gone() {
    let (world, store, customer, packs) = three_partly_dead();
    let names: Vec<ObjectName> = condemned(&customer)
        .iter()
        .map(|pack| customer.names().pack(pack))
        .collect();
    store.refuse(&names);
    let done = reclaimed(&world, &customer, DAY * 4000);
    assert!(done.refused.is_some());
    assert_eq!(
        BTreeSet::from_iter(done.removed),
        packs.into_iter().collect()
    );
    world.check(&customer);
}

/// What a sweep has to remove, and the store it is in: a pack of no session, the record of an erased point, a
/// spent probe.
fn three_that_go() -> (World, Keeping, Customer, [ObjectName; 3]) {
    let mut world = World::new();
    let store = Keeping::of(&world);
    let customer = store.open(&world);
    let point = world.backup(&customer, "web", &image(&[1]), true);
    let record = customer.names().point(&point);
    let bytes = world.memory.read(&record, u64::MAX).unwrap();
    world.erase(&customer, point);
    let stray = PackName {
        session: SessionId::from_bytes([8; 16]),
        hash: ObjectHash::from_bytes([7; 32]),
    };
    let stray = customer.names().pack(&stray);
    let spent = ObjectName::new("customers/acme/probe/spent/one").unwrap();
    for name in [&stray, &record, &spent] {
        world.memory.plant(name, &bytes);
    }
    (world, store, customer, [stray, record, spent])
}

#[test]
fn a_sweep_leaves_what_is_locked_and_tells_it_by_name_but_for_spent_probes() {
    let (world, store, customer, go) = three_that_go();
    let [stray, record, spent] = &go;
    store.lock(&[stray, record, spent]);
    let swept = sweep(&customer, false).unwrap();
    assert_eq!((swept.removed, swept.unexplained), Default::default());
    let told = |locked: &Locked| (locked.object.name.clone(), locked.is_record);
    let told = BTreeSet::from_iter(swept.locked.iter().map(told));
    assert_eq!(
        told,
        [(stray.clone(), false), (record.clone(), true)].into()
    );
    assert!(go.iter().all(|name| world.memory.size_bytes(name).is_ok()));
    store.lock(&[]);
    let swept = sweep(&customer, false).unwrap();
    assert_eq!((swept.removed.len(), swept.locked.len()), (2, 0));
    assert!(go.iter().all(|name| world.memory.size_bytes(name).is_err()));
}

#[test]
fn a_sweep_fails_for_whatever_it_may_not_delete_but_for_a_record_which_it_tells_of() {
    for at in 0..3 {
        let (world, store, customer, go) = three_that_go();
        store.refuse(&go[at..=at]);
        if at == 1 {
            let swept = sweep(&customer, false).unwrap();
            assert_eq!(swept.refused.unwrap().name, go[at].as_str());
            let left = go.map(|name| world.memory.size_bytes(&name).is_ok());
            assert_eq!(left, [false, true, false]);
            continue;
        }
        let error = sweep(&customer, false).unwrap_err();
        let denied = RepositoryErrorKind::Storage(StorageErrorKind::Denied);
        assert_eq!(error.kind, denied, "{}", go[at]);
        store.refuse(&[]);
        sweep(&customer, false).unwrap();
    }
}

#[test]
fn what_is_condemned_and_stays_is_unexplained_unless_it_is_locked() {
    let mut world = World::new();
    let store = Keeping::of(&world);
    let customer = store.open(&world);
    let dead = world.backup(&customer, "web", &image(&[1]), true);
    let packs = world.packs();
    world.erase(&customer, dead);
    store.refuse(&packs);
    reclaimed(&world, &customer, DAY * 4000);
    assert_eq!(condemned(&customer).len(), packs.len());
    let swept = sweep(&customer, false).unwrap();
    assert_eq!(
        (swept.unexplained.len(), swept.locked.len()),
        (packs.len(), 0)
    );
    // Locked since it was condemned.
    store.lock(&Vec::from_iter(&packs));
    let swept = sweep(&customer, false).unwrap();
    assert_eq!(swept.unexplained, Vec::<String>::new());
    let told = |locked: &Locked| (locked.object.name.clone(), locked.is_record);
    let told = Vec::from_iter(swept.locked.iter().map(told));
    assert_eq!(
        told,
        Vec::from_iter(packs.iter().map(|name| (name.clone(), false)))
    );
}
