//! The steps of a random sequence.

use super::super::super::testing::*;
use super::super::super::*;
use super::reference::{DAY, Lengths, Night, Reference};
use crate::codec::seeded::Seeded;
use crate::format::entry::{Attestation, Body, PointReason, PointsBody, PolicyBody, VerifyMethod};
use crate::format::pack;
use crate::model::{PackName, PointId, PointState};
use crate::policy::{Action, PolicyTerms, plan};
use crate::storage::{Fault, Faulty, Memory, Storage, StorageErrorKind};
use jiff::{SignedDuration, Timestamp};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

const VMS: [&str; 2] = ["web", "db"];
const HOUR: SignedDuration = SignedDuration::from_hours(1);
const POLICIES: [Lengths; 4] = [
    Lengths {
        window: 14,
        maximum: 60,
        budget: 22,
    },
    Lengths {
        window: 3,
        maximum: 7,
        budget: 2,
    },
    Lengths {
        window: 1,
        maximum: 3,
        budget: 1,
    },
    Lengths {
        window: 10,
        maximum: 30,
        budget: 9,
    },
];

fn terms(lengths: Lengths, keep: u64) -> PolicyTerms {
    PolicyTerms {
        restore_window: format!("{} days", lengths.window),
        max_retention: format!("{} days", lengths.maximum),
        erase_budget: Some(format!("{} days", lengths.budget)),
        keep_after_window: ["weekly", "all", "none"][keep as usize].to_string(),
        ..PolicyTerms::default()
    }
}

pub struct Sequence {
    pub(super) world: World,
    pub(super) reference: Reference,
    pub(super) lengths: Lengths,
    dice: Dice,
    disks: [Vec<u32>; 2],
    /// Something may be planted in this sequence; the others must show no damage at all.
    may_damage: bool,
    /// Something was planted that nobody has looked for since.
    pub(super) unseen_damage: bool,
    pub(super) damaged: bool,
    /// Writers that are frozen just now.
    frozen: u32,
    told: Vec<String>,
    tell: bool,
}

impl Sequence {
    /// Runs a seed; returns the number of its steps.
    pub fn run(seed: u64, tell: bool) -> u64 {
        let _random = Seeded::with(seed, 0);
        let mut sequence = Sequence::new(seed, tell);
        let steps = 4 + sequence.dice.below(9);
        for _ in 0..steps {
            sequence.step();
        }
        sequence.end();
        steps
    }

    /// What a seed did, with everything random in it.
    pub fn trace(seed: u64) -> Vec<String> {
        let _random = Seeded::with(seed, 0);
        let mut sequence = Sequence::new(seed, false);
        for _ in 0..12 {
            sequence.step();
        }
        let objects = sequence.world.memory.list("customers").unwrap();
        let names = objects.iter().map(|object| object.name.to_string());
        // Key files are sealed by another source of randomness; their names and sizes are not.
        sequence.told.into_iter().chain(names).collect()
    }

    fn new(seed: u64, tell: bool) -> Self {
        let mut dice = Dice::new(seed);
        let lengths = POLICIES[dice.below(POLICIES.len() as u64) as usize];
        let keep = dice.below(3);
        Sequence {
            world: World::with_terms(&terms(lengths, keep)),
            reference: Reference::default(),
            lengths,
            disks: [vec![1, 2, 3, 4, 5], vec![1, 2, 0, 3]],
            may_damage: dice.below(5) == 0,
            unseen_damage: false,
            damaged: false,
            frozen: 0,
            told: Vec::new(),
            tell,
            dice,
        }
    }

    pub(super) fn pick(&mut self, limit: usize) -> usize {
        self.dice.below(limit as u64) as usize
    }

    fn one_in(&mut self, chances: u64) -> bool {
        self.dice.below(chances) == 0
    }

    fn note(&mut self, text: String) {
        if self.tell {
            println!("{}", text);
        }
        self.told.push(text);
    }

    fn step(&mut self) {
        match self.pick(20) {
            0..=5 => {
                self.write();
                self.backup(0);
            }
            6..=8 => {
                self.write();
                let meanwhile = 1 + self.pick(3);
                self.backup(meanwhile);
            }
            9 | 10 => self.change_a_point(),
            11..=14 => self.prune(),
            15 | 16 => self.pass(),
            17 => self.change_policy(),
            18 => self.change_clock(),
            _ if self.may_damage => self.damage(),
            _ => self.pass(),
        }
        self.check();
    }

    /// Few different chunks, so that content comes back, also from the dead.
    fn write(&mut self) {
        let vm = self.pick(2);
        for _ in 0..=self.pick(3) {
            let chunk = self.pick(20) as u32;
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

    /// Perhaps a store that crashes, loses a reply, fails for now or fills up somewhere.
    fn store(&mut self) -> (Arc<Faulty<Memory>>, bool) {
        let store = Arc::new(Faulty::new(self.world.memory.clone()));
        // Opening takes as many reads as the ledger is long.
        let base = self.world.memory.list("customers/acme/ledger");
        let base = base.map_or(0, |list| list.len()) as u64;
        let at = base + 4 + self.dice.below(70);
        let fault = match self.pick(8) {
            0 | 1 => Fault::CrashAt {
                at,
                applied: self.one_in(2),
            },
            2 | 3 => Fault::FailAfter { at },
            4 => Fault::FailBefore {
                at,
                kind: StorageErrorKind::Transient,
            },
            5 if self.one_in(2) => Fault::FullFrom { at },
            _ => return (store, false),
        };
        store.add(fault);
        (store, true)
    }

    /// One of the hosts on a store that may fail, and whether its clock is right and it may fail.
    fn customer(&mut self) -> Option<(Customer, bool, bool)> {
        let (store, faulty) = self.store();
        let host = match self.pick(2) {
            0 => self.world.host.clone(),
            _ => self.world.second.clone(),
        };
        let honest = host.clock_is_right();
        let customer = self.world.open_on(store, &host).ok()?;
        Some((customer, honest, faulty))
    }

    fn backup(&mut self, meanwhile: usize) {
        let at = self.pick(2);
        let (vm, bytes) = (VMS[at], image(&self.disks[at]));
        let full = self.one_in(3);
        let Some((customer, honest, _)) = self.customer() else {
            return;
        };
        let taken_at = self.world.now();
        let counted_from = match honest {
            true => taken_at,
            false => customer.with_state(|state| state.last_witnessed).unwrap(),
        };
        let unseen = self.unseen_damage;
        let Ok(running) = Running::write(&customer, vm, &bytes, full) else {
            self.note(format!("backup of {vm} fails"));
            return;
        };
        let (point, base) = (running.point, running.base());
        self.note(format!("backup {point} of {vm}, full: {}", base.is_none()));
        if self.frozen < 2 {
            self.frozen += 1;
            for _ in 0..meanwhile {
                self.step();
            }
            self.frozen -= 1;
        }
        let result = running.commit();
        drop(customer);
        let seen = self.world.open();
        let row = seen.with_state(|state| state.points.get(&point).cloned());
        self.note(format!("{point} stands: {}", row.is_some()));
        match result {
            Ok(_) => assert!(row.is_some(), "{point} was acknowledged and does not stand"),
            // `Denied` is what a crashed process is told, and nobody hears it.
            Err(error) if row.is_some() => assert!(
                matches!(
                    error.kind,
                    RepositoryErrorKind::Uncertain
                        | RepositoryErrorKind::Storage(StorageErrorKind::Denied)
                ),
                "{point} failed and stands: {error}"
            ),
            Err(_) => {}
        }
        let Some(row) = row else {
            return;
        };
        let rests_on_sound = base.is_none_or(|base| self.reference.nights[&base].sound);
        let night = Night {
            vm,
            bytes,
            fate: PointState::Live,
            taken_at,
            deadline: taken_at,
            sound: !unseen && !self.unseen_damage && rests_on_sound,
            counted_from,
        };
        self.reference.committed(point, night, &row, self.lengths);
    }

    /// An operator expires, erases or brings back a point; not always is there time for the record.
    fn change_a_point(&mut self) {
        let customer = self.world.open();
        let points: Vec<PointId> = self.reference.nights.keys().copied().collect();
        if points.is_empty() || !self.world.host.clock_is_right() {
            return;
        }
        let point = points[self.pick(points.len())];
        let (state, undo) = (self.reference.nights[&point].fate, self.one_in(2));
        let fate = match state {
            PointState::Live => {
                change(&customer, point, Body::Expire).unwrap();
                PointState::Expired
            }
            PointState::Expired if undo => match change(&customer, point, Body::Undo) {
                Ok(_) => PointState::Live,
                Err(error) => {
                    assert_eq!(error.kind, RepositoryErrorKind::Superseded);
                    PointState::Expired
                }
            },
            PointState::Expired => {
                change(&customer, point, Body::Erase).unwrap();
                if self.one_in(2) {
                    let name = customer.names().point(&point);
                    customer.storage().destroy(&name).unwrap();
                }
                PointState::Erased
            }
            PointState::Erased => return,
        };
        self.note(format!("{point} becomes {fate:?}"));
        self.reference.nights.get_mut(&point).unwrap().fate = fate;
    }

    fn prune(&mut self) {
        let Some((customer, honest, faulty)) = self.customer() else {
            return;
        };
        // A clock that is wrong may not delete; `jobs` and `policy::judge` see to it.
        if !honest {
            return;
        }
        self.note(format!("prune, may fail: {faulty}"));
        let now = self.world.now();
        let done = prune_by_policy(&customer, now);
        drop(customer);
        self.learn_what_a_prune_did(now);
        match done {
            Ok(done) => {
                assert!(faulty || done.refused.is_none(), "{:?}", done.refused);
                let is_done = done.damaged.is_empty() && done.refused.is_none();
                if is_done && !self.damaged && self.frozen == 0 {
                    self.nothing_is_over_its_time(now);
                }
            }
            Err(error) => {
                assert!(
                    faulty || self.damaged || self.frozen > 0,
                    "a prune failed: {error}"
                );
                assert!(!error.is_damage() || self.damaged, "false damage: {error}");
            }
        }
    }

    fn pass(&mut self) {
        let hours = match self.pick(8) {
            0 => 24 * 70,
            1 => 24 * 16,
            2 => 24 * 8,
            _ => 1 + self.pick(40) as i64,
        };
        self.note(format!("{hours} hours pass"));
        self.world.time.pass(HOUR * hours as i32);
    }

    fn change_policy(&mut self) {
        if !self.world.host.clock_is_right() {
            return;
        }
        self.lengths = POLICIES[self.pick(POLICIES.len())];
        let keep = self.dice.below(3);
        let terms = terms_map(&terms(self.lengths, keep));
        let body = PolicyBody { terms };
        let customer = self.world.open();
        customer.append(|_| Ok(Body::Policy(body.clone()))).unwrap();
        self.note(format!("policy: {:?}", self.lengths));
        self.reference
            .policy_changed(self.world.now(), self.lengths);
    }

    /// The clock of one host goes wrong by minutes to decades, or is right again.
    fn change_clock(&mut self) {
        let host = match self.pick(2) {
            0 => self.world.host.clone(),
            _ => self.world.second.clone(),
        };
        let wrong_by = match (host.clock_is_right(), self.pick(5)) {
            (false, _) => SignedDuration::ZERO,
            (true, 0) => DAY * 3650,
            (true, 1) => DAY * -20_000,
            (true, 2) => DAY * -40,
            (true, 3) => DAY * 40,
            (true, _) => HOUR,
        };
        self.note(format!("a clock is wrong by {wrong_by}"));
        host.set_clock(
            wrong_by,
            match wrong_by.is_zero() {
                true => Attestation::Witnessed,
                false => Attestation::Alone,
            },
        );
    }

    /// A pack loses a bit, its end, or all of it. Sometimes somebody looks, and says so.
    fn damage(&mut self) {
        if self.unseen_damage && self.one_in(2) {
            return self.verify();
        }
        let packs = self.world.packs();
        if packs.is_empty() {
            return;
        }
        let name = packs[self.pick(packs.len())].clone();
        let mut bytes = self.world.memory.read(&name, u64::MAX).unwrap();
        let at = self.pick(bytes.len());
        match self.pick(4) {
            0 => self.world.memory.delete(&name).unwrap(),
            1 => self.world.memory.plant(&name, &bytes[..at]),
            _ => {
                let at = at.max(pack::HEADER_BYTES).min(bytes.len() - 1);
                bytes[at] ^= 1 << self.pick(8);
                self.world.memory.plant(&name, &bytes);
            }
        }
        self.note(format!("damage to {name}"));
        (self.damaged, self.unseen_damage) = (true, true);
        for night in self.reference.nights.values_mut() {
            night.sound = false;
        }
    }

    pub(super) fn verify(&mut self) {
        let customer = self.world.open();
        let index = customer.load_index().unwrap();
        let packs: Vec<PackName> = index
            .packs()
            .iter()
            .filter(|info| !info.condemned)
            .map(|info| info.row.name)
            .collect();
        let found = scrub_packs(&customer, &packs, 1, &AtomicBool::new(false), &|_| {}).unwrap();
        customer
            .note_verification(VerifyMethod::Checksum, &found.whole, &found.damaged)
            .unwrap();
        self.note(format!(
            "verified: {} frames are damaged",
            found.damaged.len()
        ));
        // What a writer under way relied on is not looked at again.
        self.unseen_damage = self.frozen > 0;
    }

    /// A full of each VM as it is now, on a store that works.
    pub(super) fn full_of_each(&mut self) {
        let customer = self.world.open();
        for (vm, disk) in VMS.into_iter().zip(self.disks.clone()) {
            let bytes = image(&disk);
            let taken_at = self.world.now();
            let (point, result) = backup(&customer, vm, &bytes, true);
            result.unwrap();
            let row = customer.with_state(|state| state.points[&point].clone());
            let night = Night {
                vm,
                bytes,
                fate: PointState::Live,
                taken_at,
                deadline: taken_at,
                sound: true,
                counted_from: taken_at,
            };
            self.reference.committed(point, night, &row, self.lengths);
        }
    }
}

/// What the nightly prune does, without its machine: see `jobs::prune`.
pub(super) fn prune_by_policy(
    customer: &Customer,
    now: Timestamp,
) -> Result<reclaim::Reclaimed, RepositoryError> {
    customer.abort_dead_sessions(now)?;
    let decided = |state: &State, wanted: Action| {
        let facts: Vec<_> = state.facts().collect();
        let policy = state.policy.as_ref().expect("a policy");
        let decisions = plan(&facts, policy, now);
        let chosen = decisions.into_iter().filter(|row| row.action == wanted);
        let reason = |row: crate::policy::Decision| PointReason {
            point: row.point,
            reason: row.reason.to_string(),
        };
        chosen.map(reason).collect::<Vec<_>>()
    };
    for _ in 0..2 {
        for (action, body) in [
            (Action::Expire, Body::Expire as fn(PointsBody) -> Body),
            (Action::Erase, Body::Erase),
        ] {
            customer.refresh()?;
            let points = customer.with_state(|state| decided(state, action));
            if points.is_empty() {
                continue;
            }
            customer.append(|state| {
                Ok(body(PointsBody {
                    points: decided(state, action),
                }))
            })?;
            if action == Action::Erase {
                for row in &points {
                    customer
                        .storage()
                        .destroy(&customer.names().point(&row.point))?;
                }
            }
        }
    }
    let budget = customer.with_state(|state| {
        let policy = state.policy.as_ref().expect("a policy");
        DAY * policy.effective().erase_budget_days as i32
    });
    let done = reclaim::reclaim(customer, now, budget, false)?;
    customer.note_reclaimed(&done)?;
    for _ in 0..4 {
        if !reclaim::merge_segments(customer)? {
            break;
        }
    }
    sweep(customer, false)?;
    Ok(done)
}
