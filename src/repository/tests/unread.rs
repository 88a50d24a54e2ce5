//! Packs that the medium does not give: they may be whole, and are neither relied on nor given up.

use super::super::reclaim::{Reclaimed, reclaim};
use super::super::testing::*;
use super::super::*;
use super::damage::{condemn_wrongly, pack_name, packs_of};
use crate::format::pack::PackKind;
use crate::model::{ObjectName, PackName};
use crate::storage::{Fault, Faulty, Memory};
use std::collections::BTreeSet;
use std::sync::Arc;

fn opened(world: &World, faults: Vec<Fault>) -> Customer {
    let storage: Arc<Faulty<Memory>> = Arc::new(Faulty::with_faults(world.memory.clone(), faults));
    world.open_on(storage, &world.host).unwrap()
}

fn unread(names: &[ObjectName]) -> Vec<Fault> {
    let fault = |name: &ObjectName| Fault::Unread { name: name.clone() };
    names.iter().map(fault).collect()
}

/// Rewrites whatever has a dead byte.
fn reclaimed(world: &World, customer: &Customer, force: bool) -> Reclaimed {
    let done = reclaim(customer, world.now(), DAY * 4000, force).unwrap();
    customer.note_reclaimed(&done).unwrap();
    done
}

#[test]
fn a_pack_that_the_medium_does_not_give_stays_and_keeps_no_other_from_going() {
    for force in [false, true] {
        let mut world = World::new();
        let customer = world.open();
        let mut dying = Vec::new();
        let mut packs: Vec<ObjectName> = Vec::new();
        for (name, chunk) in [("web", 10), ("db", 20), ("mail", 30)] {
            let before = packs_of(&world, PackKind::Data);
            let first = image(&[chunk, chunk + 1, chunk + 2]);
            dying.push(world.backup(&customer, name, &first, true));
            let mut new = packs_of(&world, PackKind::Data);
            new.retain(|name| !before.contains(name));
            packs.append(&mut new);
            world.backup(
                &customer,
                name,
                &image(&[chunk, chunk + 1, chunk + 3]),
                false,
            );
        }
        world.erase_all(&customer, &dying);
        let gone = |name: &ObjectName| !world.packs().contains(name);

        let customer = opened(&world, unread(&packs[1..2]));
        let done = reclaimed(&world, &customer, force);
        assert_eq!(done.unread.unwrap().name, packs[1].as_str());
        assert_eq!(
            packs.iter().map(gone).collect::<Vec<_>>(),
            [true, false, true]
        );
        // It is not taken for damaged, and what is dead in it is not forgotten.
        let state = customer.state();
        assert!(state.damaged.is_empty());
        assert!(state.marks[&pack_name(&packs[1])].dead_bytes > 0);
        world.check(&world.open());

        let customer = world.open();
        let done = reclaimed(&world, &customer, force);
        assert_eq!(done.unread, None);
        assert!(gone(&packs[1]));
        world.check(&customer);
        world.quiesce(&customer);
    }
}

#[test]
fn a_condemned_pack_that_the_medium_does_not_give_goes_if_nothing_in_it_is_needed() {
    let mut world = World::new();
    let customer = world.open();
    world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    let needed = packs_of(&world, PackKind::Data);
    let dead = world.backup(&customer, "db", &image(&[4, 5]), true);
    let mut dying = world.packs();
    dying.retain(|name| !needed.contains(name));
    let before: BTreeSet<PackName> = needed.iter().map(pack_name).collect();
    world.erase(&customer, dead);
    // Condemned, and not deleted yet.
    let keep = |name: &ObjectName| Fault::Keep { name: name.clone() };
    let customer = opened(&world, dying.iter().map(keep).collect());
    assert!(reclaimed(&world, &customer, false).refused.is_some());
    dying.retain(|name| customer.with_state(|state| state.is_condemned(&pack_name(name))));
    assert!(!dying.is_empty());
    // And what is needed, condemned by whoever was wrong.
    condemn_wrongly(&customer, before.iter().copied().collect());

    let all: Vec<ObjectName> = dying.iter().chain(&needed).cloned().collect();
    let customer = opened(&world, unread(&all));
    let done = reclaimed(&world, &customer, false);
    assert_eq!(BTreeSet::from_iter(done.withheld), before);
    assert_eq!(done.unread.unwrap().name, needed[0].as_str());
    let left = world.packs();
    assert!(dying.iter().all(|name| !left.contains(name)));
    assert!(needed.iter().all(|name| left.contains(name)));
    // Once it is given again it is rescued, and goes.
    let customer = world.open();
    assert_eq!(reclaimed(&world, &customer, false).withheld, []);
    assert!(needed.iter().all(|name| !world.packs().contains(name)));
    world.check(&customer);
}
