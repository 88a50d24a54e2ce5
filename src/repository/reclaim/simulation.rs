//! Months of nights of one VM, with the real retention and the real plan over packs that are only
//! counted: what reclaim rewrites for each byte that is backed up, and that no dead byte outlives
//! its deadline.
//!
//! The VM has 100 GiB, of which 2 GiB change every night, scattered: here a sixteenth of it, with
//! packs of the same number of frames.

use super::super::lifetime::Lifetime;
use super::plan::{PackAction, PackFacts, plan};
use crate::model::{ObjectHash, PackName, PointId, PointKind, PointState, SessionId, VmName};
use crate::policy::{
    self, Action, Expiry, PointFacts, Policy, PolicyTerms, expected_rewriting, expiry,
};
use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeMap;

const CHUNKS: usize = 102_400;
const CHANGED_A_NIGHT: usize = 2048;
const FRAMES_IN_PACK: usize = 256;
const FRAME_BYTES: u64 = 65536;
const DAY: SignedDuration = SignedDuration::from_hours(24);
/// Until as much goes as comes.
const SETTLING_NIGHTS: usize = 120;
const NIGHTS: usize = 240;

/// One content of one chunk: the nights of the points that hold it.
#[derive(Clone, Copy)]
struct Version {
    from: usize,
    /// The first night that holds another content.
    until: usize,
    dead: bool,
}

struct Pack {
    versions: Vec<usize>,
    born_at: Timestamp,
    earliest_deadline: Option<Timestamp>,
}

struct Simulation {
    policy: Policy,
    random: u64,
    versions: Vec<Version>,
    /// The version that each chunk of the disk is now.
    current: Vec<usize>,
    packs: BTreeMap<u32, Pack>,
    made_packs: u32,
    /// By night.
    points: BTreeMap<usize, PointFacts>,
    backed_up_frames: u64,
    rewritten_frames: u64,
}

impl Simulation {
    fn new(policy: Policy) -> Self {
        Simulation {
            policy,
            random: 0x2545_f491_4f6c_dd1d,
            versions: Vec::new(),
            current: Vec::new(),
            packs: BTreeMap::new(),
            made_packs: 0,
            points: BTreeMap::new(),
            backed_up_frames: 0,
            rewritten_frames: 0,
        }
    }

    fn below(&mut self, bound: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as usize % bound
    }

    fn pack(&mut self, versions: &[usize], now: Timestamp) {
        for part in versions.chunks(FRAMES_IN_PACK) {
            self.made_packs += 1;
            let pack = Pack {
                versions: part.to_vec(),
                born_at: now,
                earliest_deadline: None,
            };
            self.packs.insert(self.made_packs, pack);
        }
    }

    fn back_up(&mut self, night: usize, now: Timestamp) {
        let mut fresh = Vec::new();
        let mut write = |simulation: &mut Self, chunk: usize| {
            let version = simulation.versions.len();
            simulation.versions.push(Version {
                from: night,
                until: usize::MAX,
                dead: false,
            });
            if let Some(before) = simulation.current.get(chunk).copied() {
                simulation.versions[before].until = night;
                simulation.current[chunk] = version;
            } else {
                simulation.current.push(version);
            }
            fresh.push(version);
        };
        match night {
            0 => (0..CHUNKS).for_each(|chunk| write(self, chunk)),
            _ => {
                for _ in 0..CHANGED_A_NIGHT {
                    let chunk = self.below(CHUNKS);
                    // Twice in a night is once for a backup.
                    if self.versions[self.current[chunk]].from != night {
                        write(self, chunk);
                    }
                }
            }
        }
        self.backed_up_frames += fresh.len() as u64;
        self.pack(&fresh, now);
        let Expiry {
            expires_at,
            deadline,
        } = expiry(&self.policy, now);
        let facts = PointFacts {
            point: PointId::from_bytes((night as u128).to_be_bytes()),
            vm: VmName::new("db01").unwrap(),
            kind: match night % 7 {
                0 => PointKind::Full,
                _ => PointKind::Incremental,
            },
            taken_at: now,
            expires_at,
            deadline,
            state: PointState::Live,
            expired_at: None,
            clock_alone: false,
            witnessed_since: None,
            silence: SignedDuration::ZERO,
            suspect: false,
            void: false,
            held: false,
        };
        self.points.insert(night, facts);
    }

    fn prune(&mut self, now: Timestamp) {
        for _ in 0..2 {
            let facts: Vec<PointFacts> = self.points.values().cloned().collect();
            let decisions = policy::plan(&facts, &self.policy, now);
            for (decision, point) in decisions.iter().zip(self.points.values_mut()) {
                match decision.action {
                    Action::Keep | Action::AwaitErase { .. } => {}
                    Action::Expire => {
                        point.state = PointState::Expired;
                        point.expired_at = Some(now);
                    }
                    Action::Erase => point.state = PointState::Erased,
                }
            }
        }
        let erased: Vec<(usize, Timestamp)> = self
            .points
            .iter()
            .filter(|(_, point)| point.state == PointState::Erased)
            .map(|(night, point)| (*night, point.deadline))
            .collect();
        self.points
            .retain(|_, point| point.state != PointState::Erased);
        for pack in self.packs.values_mut() {
            for version in &pack.versions {
                let version = &mut self.versions[*version];
                let nights = version.from..version.until;
                if version.dead || self.points.range(nights.clone()).next().is_some() {
                    continue;
                }
                version.dead = true;
                let last = erased.iter().filter(|(night, _)| nights.contains(night));
                let deadline = last.map(|(_, deadline)| *deadline).max();
                pack.earliest_deadline = [pack.earliest_deadline, deadline]
                    .into_iter()
                    .flatten()
                    .min();
            }
        }
        self.reclaim(now);
    }

    fn reclaim(&mut self, now: Timestamp) {
        let facts: Vec<PackFacts> = self
            .packs
            .iter()
            .map(|(number, pack)| {
                let live = pack.versions.iter();
                let live = live.filter(|version| !self.versions[**version].dead);
                let live = live.count() as u64;
                let bytes = pack.versions.len() as u64 * FRAME_BYTES;
                PackFacts {
                    number: *number,
                    name: PackName {
                        session: SessionId::from_bytes([0; 16]),
                        hash: ObjectHash::from_bytes([0; 32]),
                    },
                    size_bytes: bytes,
                    frame_bytes: bytes,
                    live_bytes: live * FRAME_BYTES,
                    live_frames: live,
                    earliest_deadline: pack.earliest_deadline,
                    born_at: Some(pack.born_at),
                    rescue: false,
                }
            })
            .collect();
        let budget = DAY * self.policy.effective().erase_budget_days as i32;
        let mut decisions = plan(&facts, now, budget);
        // As batches are taken: old with old.
        decisions.sort_by_key(|decision| (decision.facts.born_at, decision.facts.number));
        let mut survivors = Vec::new();
        for decision in &decisions {
            if decision.action == PackAction::Keep {
                continue;
            }
            let pack = self.packs.remove(&decision.facts.number).unwrap();
            let live = pack.versions.into_iter();
            survivors.extend(live.filter(|version| !self.versions[*version].dead));
        }
        let held_until = |version: &usize| {
            let Version { from, until, .. } = self.versions[*version];
            let holders = self.points.range(from..until);
            holders.map(|(_, point)| point.expires_at).max().unwrap()
        };
        let newest = self.points.values().map(|point| point.expires_at).max();
        let newest = newest.unwrap();
        survivors.sort_by_key(|version| Lifetime::of(held_until(version), newest, now));
        self.rewritten_frames += survivors.len() as u64;
        self.pack(&survivors, now);
        for pack in self.packs.values() {
            // The next prune is a day away.
            assert!(
                pack.earliest_deadline
                    .is_none_or(|deadline| deadline > now.saturating_add(DAY).unwrap()),
                "a dead byte past its deadline"
            );
        }
    }
}

/// Bytes rewritten for each byte backed up, once as much goes as comes.
fn rewriting(policy: &Policy) -> f64 {
    let mut simulation = Simulation::new(policy.clone());
    let mut now: Timestamp = "2026-01-04T23:00:00Z".parse().unwrap();
    for night in 0..NIGHTS {
        if night == SETTLING_NIGHTS {
            simulation.backed_up_frames = 0;
            simulation.rewritten_frames = 0;
        }
        simulation.back_up(night, now);
        simulation.prune(now.saturating_add(SignedDuration::from_hours(1)).unwrap());
        now = now.saturating_add(DAY).unwrap();
    }
    simulation.rewritten_frames as f64 / simulation.backed_up_frames as f64
}

#[test]
fn reclaim_rewrites_little_and_config_check_tells_it_beforehand() {
    for (maximum, window, budget) in [
        ("2 months", "14 days", None),
        ("2 months", "14 days", Some("7 days")),
        ("2 months", "14 days", Some("14 days")),
        ("2 months", "14 days", Some("30 days")),
        ("1 month", "14 days", None),
        ("30 days", "7 days", None),
    ] {
        let terms = PolicyTerms {
            timezone: "UTC".to_string(),
            restore_window: window.to_string(),
            max_retention: maximum.to_string(),
            erase_budget: budget.map(str::to_string),
            ..PolicyTerms::default()
        };
        let policy = Policy::parse(&terms).unwrap();
        let (found, told) = (rewriting(&policy), expected_rewriting(&policy));
        let budget = policy.effective().erase_budget_days;
        println!("{maximum}, {window}, budget {budget}: {found:.2} bytes a byte, {told:.2} told");
        assert!((told / found - 1.0).abs() <= 0.2);
        assert!(budget < 22 || found <= 1.6, "at the default policy");
    }
}
