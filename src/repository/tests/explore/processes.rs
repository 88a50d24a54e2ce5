//! What the processes of a scenario do. A process that dies, or loses, just ends.

use super::super::super::testing::*;
use super::super::super::*;
use super::explorer::{Told, lock};
use crate::format::entry::{Body, CondemnBody, Purpose};
use crate::model::{ObjectHash, PackName, PointId, PointState};
use std::sync::Mutex;

/// Writes and commits; says so when it was acknowledged.
fn write(customer: &Customer, told: &Mutex<Told>, vm: &str, bytes: Vec<u8>, full: bool) {
    let Ok(running) = Running::write(customer, vm, &bytes, full) else {
        return;
    };
    let point = running.point;
    lock(told).bytes.insert(point, bytes);
    if running.commit().is_ok() {
        lock(told).acknowledged.push(point);
    }
}

pub fn full_of_new(_: &World, customer: &Customer, told: &Mutex<Told>, _: PointId) {
    write(customer, told, "db", image(&[7, 8]), true);
}

pub fn full_of_the_same(_: &World, customer: &Customer, told: &Mutex<Told>, _: PointId) {
    write(customer, told, "mail", image(&[8, 7]), true);
}

pub fn full_that_shares(_: &World, customer: &Customer, told: &Mutex<Told>, _: PointId) {
    write(customer, told, "db", image(&[2, 7]), true);
}

pub fn incremental(_: &World, customer: &Customer, told: &Mutex<Told>, _: PointId) {
    write(customer, told, "web", image(&[1, 9]), false);
}

pub fn give_up(_: &World, customer: &Customer, _: &Mutex<Told>, _: PointId) {
    if let Ok(running) = Running::write(customer, "db", &image(&[7, 8, 9, 10]), true) {
        let id = running.begun.id;
        drop(running.session);
        let _aborted = customer.abort(&id, "a test");
    }
}

pub fn full_and_erase(_: &World, customer: &Customer, told: &Mutex<Told>, _: PointId) {
    let bytes = image(&[7, 8]);
    let Ok(running) = Running::write(customer, "db", &bytes, true) else {
        return;
    };
    let point = running.point;
    lock(told).bytes.insert(point, bytes);
    if running.commit().is_ok() {
        erase_one(customer, point);
    }
}

pub fn full_and_a_stray(_: &World, customer: &Customer, told: &Mutex<Told>, _: PointId) {
    let Ok(running) = Running::write(customer, "db", &image(&[7, 8]), true) else {
        return;
    };
    let (session, point) = (running.begun.id, running.point);
    lock(told).bytes.insert(point, image(&[7, 8]));
    if running.commit().is_ok() {
        let hash = ObjectHash::from_bytes([7; 32]);
        let name = customer.names().pack(&PackName { session, hash });
        let _created = customer.storage().create(&name, b"nobody names it");
    }
}

fn erase_one(customer: &Customer, point: PointId) {
    if change(customer, point, Body::Expire).is_ok() && change(customer, point, Body::Erase).is_ok()
    {
        let _gone = customer.storage().destroy(&customer.names().point(&point));
    }
}

pub fn expire(_: &World, customer: &Customer, _: &Mutex<Told>, subject: PointId) {
    let _expired = change(customer, subject, Body::Expire);
}

pub fn expire_and_erase(_: &World, customer: &Customer, _: &Mutex<Told>, subject: PointId) {
    erase_one(customer, subject);
}

/// As nobody may: the record goes before the entry stands.
pub fn record_first(_: &World, customer: &Customer, _: &Mutex<Told>, subject: PointId) {
    if change(customer, subject, Body::Expire).is_ok() {
        let _gone = customer
            .storage()
            .destroy(&customer.names().point(&subject));
        let _erased = change(customer, subject, Body::Erase);
    }
}

/// Undoes what is expired when it comes to it; otherwise it does nothing.
pub fn undo(_: &World, customer: &Customer, _: &Mutex<Told>, subject: PointId) {
    if customer.refresh().is_ok()
        && customer.with_state(|state| state.points[&subject].state == PointState::Expired)
    {
        let _back = change(customer, subject, Body::Undo);
    }
}

fn reclaim_all(world: &World, customer: &Customer) {
    let done = reclaim::reclaim(customer, world.now(), DAY * 4000, false);
    if let Ok(done) = done {
        let _noted = customer.note_reclaimed(&done);
    }
}

pub fn prune(world: &World, customer: &Customer, _: &Mutex<Told>, _: PointId) {
    reclaim_all(world, customer);
}

pub fn erase_and_reclaim(world: &World, customer: &Customer, _: &Mutex<Told>, subject: PointId) {
    erase_one(customer, subject);
    reclaim_all(world, customer);
}

pub fn reclaim_and_merge(world: &World, customer: &Customer, _: &Mutex<Told>, _: PointId) {
    reclaim_all(world, customer);
    let _merged = reclaim::merge_segments(customer);
}

pub fn sweep_only(_: &World, customer: &Customer, _: &Mutex<Told>, _: PointId) {
    let _swept = sweep(customer, false);
}

/// Takes every open session for dead.
pub fn abort_all(_: &World, customer: &Customer, _: &Mutex<Told>, _: PointId) {
    if customer.refresh().is_ok() {
        let open: Vec<_> = customer.with_state(|state| state.open.keys().copied().collect());
        for session in open {
            let _aborted = customer.abort(&session, "a test");
        }
    }
}

/// Condemns the packs of a live point as a faulty program would, without survivors.
pub fn condemn_wrongly(_: &World, customer: &Customer, _: &Mutex<Told>, subject: PointId) {
    let Ok(index) = customer.load_index() else {
        return;
    };
    let session = customer.with_state(|state| state.points[&subject].session);
    let rows = index.packs().iter().map(|info| info.row.name);
    let packs: Vec<PackName> = rows.filter(|name| name.session == session).collect();
    if let Ok(begun) = customer.begin(Purpose::Reclaim, None) {
        let body = CondemnBody {
            session: begun.id,
            packs,
            segments: Vec::new(),
        };
        let _condemned = customer.append(|_| Ok(Body::Condemn(body.clone())));
    }
}

/// A live point restores, whatever a prune does meanwhile.
pub fn read(world: &World, customer: &Customer, told: &Mutex<Told>, subject: PointId) {
    match restore(customer, &subject) {
        Ok(found) if found == world.model[&subject] => {}
        Ok(_) => lock(told).wrong.push("other bytes".to_string()),
        Err(error) => lock(told).wrong.push(format!("a reader fails: {error}")),
    }
}
