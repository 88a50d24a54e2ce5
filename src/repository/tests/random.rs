//! Random sequences against a model: VM, night, bytes.

use super::super::testing::*;
use super::super::*;
use crate::format::entry::Body;
use crate::model::PointId;
use crate::model::PointState;
use crate::storage::{Fault, Faulty, StorageErrorKind};
use std::sync::Arc;

const VMS: [&str; 2] = ["web", "db"];

struct Sequence {
    world: World,
    dice: Dice,
    disks: [Vec<u32>; 2],
}

impl Sequence {
    fn new(seed: u64) -> Self {
        Sequence {
            world: World::new(),
            dice: Dice::new(seed),
            disks: [vec![1, 2, 3, 4, 5, 6, 7], vec![1, 2, 3, 0, 0]],
        }
    }

    fn pick(&mut self, limit: usize) -> usize {
        self.dice.below(limit as u64) as usize
    }

    /// Few different chunks, so that content comes back, also from the dead.
    fn write(&mut self) {
        let vm = self.pick(2);
        for _ in 0..=self.pick(4) {
            let chunk = self.pick(40) as u32;
            let at = self.pick(self.disks[vm].len());
            self.disks[vm][at] = chunk;
        }
        match self.pick(6) {
            0 => self.disks[vm].push(7),
            1 if self.disks[vm].len() > 2 => {
                self.disks[vm].pop();
            }
            _ => {}
        }
    }

    /// Perhaps a store that crashes or loses a reply somewhere.
    fn store(&mut self) -> Arc<Faulty<crate::storage::Memory>> {
        let store = Arc::new(Faulty::new(self.world.memory.clone()));
        // Opening takes as many reads as the ledger is long.
        let base = self
            .world
            .memory
            .list("customers/acme/ledger")
            .map_or(0, |list| list.len());
        let at = base as u64 + 4 + self.dice.below(70);
        match self.pick(4) {
            0 => store.add(Fault::CrashAt {
                at,
                applied: self.dice.below(2) == 0,
            }),
            1 => store.add(Fault::FailAfter { at }),
            _ => {}
        }
        store
    }

    fn customer(&mut self) -> Option<Customer> {
        let store = self.store();
        let host = match self.pick(2) {
            0 => self.world.host.clone(),
            _ => self.world.second.clone(),
        };
        self.world.open_on(store, &host).ok()
    }

    fn backup(&mut self, interrupted: bool) {
        let at = self.pick(2);
        let (name, bytes) = (VMS[at], image(&self.disks[at]));
        let full = self.pick(3) == 0;
        let Some(customer) = self.customer() else {
            return;
        };
        let Ok(running) = Running::write(&customer, name, &bytes, full) else {
            return;
        };
        let point = running.point;
        if interrupted {
            // Somebody else does something while this one is frozen.
            match self.pick(3) {
                0 => self.prune(),
                1 => self.backup(false),
                _ => self.age(),
            }
        }
        let result = running.commit();
        let seen = self.world.open();
        let stands = seen.with_state(|state| state.points.contains_key(&point));
        match result {
            Ok(_) => assert!(stands),
            // `Denied` is what a crashed process is told, and nobody hears it.
            Err(error) if stands => assert!(matches!(
                error.kind,
                RepositoryErrorKind::Uncertain
                    | RepositoryErrorKind::Storage(StorageErrorKind::Denied)
            )),
            Err(_) => {}
        }
        if stands {
            self.world.model.insert(point, bytes);
        }
    }

    /// Expires, erases or brings back a point.
    fn age(&mut self) {
        let customer = self.world.open();
        let points: Vec<(PointId, PointState)> = customer.with_state(|state| {
            let row = |(id, row): (&PointId, &Point)| (*id, row.state);
            state.points.iter().map(row).collect()
        });
        if points.is_empty() {
            return;
        }
        let at = self.pick(points.len());
        let (point, state) = points[at];
        match (state, self.pick(3)) {
            (PointState::Live, _) => {
                change(&customer, point, Body::Expire).unwrap();
            }
            (PointState::Expired, 0) => {
                change(&customer, point, Body::Undo).unwrap();
            }
            (PointState::Expired, _) => {
                change(&customer, point, Body::Erase).unwrap();
                // Not always is there time to delete the record.
                if self.pick(2) == 0 {
                    let name = customer.names().point(&point);
                    customer.storage().destroy(&name).unwrap();
                }
            }
            (PointState::Erased, _) => {}
        }
    }

    fn prune(&mut self) {
        let budget = DAY * [4000, 22][self.pick(2)];
        let Some(customer) = self.customer() else {
            return;
        };
        let now = self.world.now();
        let _outcome = customer
            .abort_dead_sessions(now)
            .and_then(|_| reclaim::reclaim(&customer, now, budget, false))
            .and_then(|done| customer.note_reclaimed(&done))
            .and_then(|_| reclaim::merge_segments(&customer))
            .and_then(|_| sweep(&customer, false));
    }

    fn step(&mut self) {
        match self.pick(8) {
            0..=2 => {
                self.write();
                self.backup(false);
            }
            3 => {
                self.write();
                self.backup(true);
            }
            4 | 5 => self.age(),
            6 => self.prune(),
            _ => self.world.time.pass(DAY),
        }
        let customer = self.world.open();
        self.world.check(&customer);
        no_false_certificate(&self.world, &customer);
    }
}

fn run(seed: u64, steps: usize) {
    println!("seed {seed}");
    let mut sequence = Sequence::new(seed);
    for _ in 0..steps {
        sequence.step();
    }
    let world = &sequence.world;
    // Whose process is gone is known to each host itself.
    world.open().abort_dead_sessions(world.now()).unwrap();
    let customer = world.open_second();
    world.quiesce(&customer);
    world.check(&customer);
    world.check(&world.open());
}

#[test]
fn random_nights_crashes_and_prunes_of_two_hosts_keep_every_live_point_and_no_dead_byte() {
    for seed in 0..40 {
        run(seed, 24);
    }
}
