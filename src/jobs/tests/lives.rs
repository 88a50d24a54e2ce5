//! Lives of three hosts, twenty VMs and two customers, in which everything goes wrong now and
//! then: the store fails, loses replies, runs full, hosts die in the middle of a run, are off for
//! nights or reboot, clocks are wrong by minutes or years, tracking is lost, disks grow and shrink,
//! VMs come and go, a maximum is shortened.
//!
//! `VMKEEP_LIVES=FROM..TO` runs other seeds, `VMKEEP_LIFE_NIGHTS` lives of another length;
//! `scripts/lives` runs two years of each.

use crate::codec::HostIdentity;
use crate::format::entry::Body;
use crate::jobs::fake_vm::FakeVm;
use crate::jobs::{
    BackupSettings, JobErrorKind, LocalHost, Policies, PruneRequest, Quiet, RunSettings,
    StateFolder, VerifyRequest, VmOutcome, VmTask, apply_policy, prune, run_customer, verify,
};
use crate::model::{
    Clock, ClockReading, CustomerName, PointId, PointState, RepositoryId, VmName, Writers,
};
use crate::policy::{HostClock, PolicyTerms};
use crate::repository::reclaim::{mark_now, survey};
use crate::repository::testing::{CHUNK, DAY, Dice, Time, image, restore, run_seeds, seeds_of, vm};
use crate::repository::{Customer, NewCustomer, WriteSettings, create_repository, new_repository};
use crate::storage::{Fault, Faulty, Memory, Storage, StorageErrorKind};
use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

/// Two maxima of retention, so that what was there at first has left.
const NIGHTS: u32 = 125;
const HOSTS: usize = 3;
const VMS: usize = 20;
const SETTINGS: RunSettings = RunSettings {
    backup: BackupSettings {
        chunk_bytes: CHUNK as u32,
        threads: 1,
    },
    prune: PruneRequest {
        confirm: false,
        has_reserve: false,
        copies_elsewhere: false,
    },
};
/// What nobody may lose.
const WINDOW: SignedDuration = SignedDuration::from_hours(14 * 24);

struct Wall {
    time: Time,
    wrong_by: Arc<Mutex<SignedDuration>>,
}

impl Clock for Wall {
    fn read(&self) -> ClockReading {
        ClockReading {
            wall: self.time.now() + *self.wrong_by.lock().unwrap(),
            synchronised: false,
            boot: None,
        }
    }
}

struct Machine {
    name: String,
    folder: tempfile::TempDir,
    wrong_by: Arc<Mutex<SignedDuration>>,
    wrong_nights: u64,
    down_nights: u64,
    local: Arc<LocalHost>,
    open: BTreeMap<usize, (Customer, Arc<Faulty<Memory>>)>,
}

fn boot(
    name: &str,
    folder: &tempfile::TempDir,
    time: &Time,
    wrong_by: &Arc<Mutex<SignedDuration>>,
) -> LocalHost {
    let folder = StateFolder::create(folder.path()).unwrap();
    let (identity, _) = folder.ensure_identity("a test").unwrap();
    let clock = Arc::new(Wall {
        time: time.clone(),
        wrong_by: wrong_by.clone(),
    });
    LocalHost::new(
        identity,
        name.to_string(),
        folder,
        clock,
        HostClock::Trusted,
    )
}

impl Machine {
    fn new(name: &str, time: &Time) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let wrong_by = Arc::default();
        Machine {
            name: name.to_string(),
            local: Arc::new(boot(name, &folder, time, &wrong_by)),
            folder,
            wrong_by,
            wrong_nights: 0,
            down_nights: 0,
            open: BTreeMap::new(),
        }
    }

    /// Its processes are gone; what it knows is in its state folder.
    fn reboot(&mut self, time: &Time) {
        self.open.clear();
        self.local = Arc::new(boot(&self.name, &self.folder, time, &self.wrong_by));
    }

    fn is_right(&self) -> bool {
        self.wrong_by.lock().unwrap().is_zero()
    }
}

struct Guest {
    name: VmName,
    host: usize,
    customer: usize,
    fake: FakeVm,
    chunks: Vec<u32>,
    /// Its owner ended the contract for it.
    gone: bool,
    points: BTreeMap<PointId, Taken>,
}

struct Taken {
    at: Timestamp,
    chunks: Vec<u32>,
}

struct Site {
    name: CustomerName,
    terms: PolicyTerms,
    /// The longest that a point may live; two months have at most 62 days.
    longest: SignedDuration,
    /// Looks, from outside of the hosts, at the store as it is.
    observer: Customer,
}

struct Life {
    seed: u64,
    night: u32,
    dice: Dice,
    time: Time,
    memory: Memory,
    repository: RepositoryId,
    machines: Vec<Machine>,
    sites: Vec<Site>,
    guests: Vec<Guest>,
    next_chunk: u32,
    runs: BTreeMap<&'static str, u64>,
}

fn open_on(
    storage: Arc<dyn Storage>,
    name: &CustomerName,
    repository: RepositoryId,
    host: &Arc<LocalHost>,
) -> Option<Customer> {
    let settings = WriteSettings {
        pack_bytes: 4 * CHUNK,
        compression_level: 1,
        segment_records: 24,
        threads: 2,
    };
    let identity: &HostIdentity = host.identity();
    Customer::open(storage, name, repository, identity, host.clone(), settings).ok()
}

impl Life {
    fn new(seed: u64) -> Self {
        let time = Time::new();
        let memory = Memory::new();
        let storage: Arc<dyn Storage> = Arc::new(memory.clone());
        let file = create_repository(
            &*storage,
            new_repository(time.now(), CHUNK as u32, Writers::Many),
        )
        .unwrap();
        let machines: Vec<Machine> = (0..HOSTS)
            .map(|at| Machine::new(&format!("host{at}"), &time))
            .collect();
        let watcher = Machine::new("watcher", &time);
        let recipients = || {
            let all = machines.iter().chain([&watcher]);
            all.map(|machine| machine.local.identity().recipient())
                .collect()
        };
        let first = boot("host0", &machines[0].folder, &time, &machines[0].wrong_by);
        first.vouch_for_clock();
        let terms = [
            PolicyTerms::default(),
            PolicyTerms {
                max_retention: "30 days".to_string(),
                ..PolicyTerms::default()
            },
        ];
        let sites = terms
            .into_iter()
            .zip([("acme", 62), ("beta", 30)])
            .map(|(terms, (name, days))| {
                let name = CustomerName::new(name).unwrap();
                let new = NewCustomer {
                    repository: file.repository,
                    name: &name,
                    host: first.body(),
                    recipients: recipients(),
                    terms: &terms,
                    writers: Writers::Many,
                };
                Customer::create(&storage, &new, &first).unwrap();
                let founder =
                    open_on(storage.clone(), &name, file.repository, &machines[0].local).unwrap();
                for machine in &machines[1..] {
                    let body = machine.local.body();
                    founder.append(|_| Ok(Body::Host(body.clone()))).unwrap();
                }
                let observer =
                    open_on(storage.clone(), &name, file.repository, &watcher.local).unwrap();
                Site {
                    name,
                    terms,
                    longest: DAY * days,
                    observer,
                }
            })
            .collect();
        let mut life = Life {
            seed,
            night: 0,
            dice: Dice::new(seed),
            time,
            memory,
            repository: file.repository,
            machines,
            sites,
            guests: Vec::new(),
            next_chunk: 1,
            runs: BTreeMap::new(),
        };
        for _ in 0..VMS {
            life.new_guest();
        }
        life
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.dice.below(count) == 0
    }

    fn count(&mut self, what: &'static str) {
        *self.runs.entry(what).or_default() += 1;
    }

    fn chunk(&mut self) -> u32 {
        self.next_chunk += 1;
        self.next_chunk
    }

    fn new_guest(&mut self) {
        let number = self.guests.len();
        let chunks: Vec<u32> = (0..3 + self.dice.below(5)).map(|_| self.chunk()).collect();
        self.guests.push(Guest {
            name: vm(&format!("vm{number:02}")),
            host: number % HOSTS,
            customer: number % 2,
            fake: FakeVm::new(&[("vda", image(&chunks))]),
            chunks,
            gone: false,
            points: BTreeMap::new(),
        });
    }

    /// A day in the life of a guest.
    fn change(&mut self, at: usize) {
        for _ in 0..self.dice.below(3) {
            let value = match self.dice.below(8) {
                0 => 0,
                _ => self.chunk(),
            };
            let guest = &mut self.guests[at];
            let place = self.dice.below(guest.chunks.len() as u64) as usize;
            guest.chunks[place] = value;
            let bytes = image(&[value]);
            guest.fake.write("vda", (place * CHUNK) as u64, &bytes);
        }
        if self.one_in(60) {
            self.guests[at].fake.forget_tracking();
        }
        if self.one_in(150) {
            let chunks = 1 + self.dice.below(10) as usize;
            let guest = &mut self.guests[at];
            guest.chunks.resize(chunks, 0);
            guest.fake.resize("vda", (chunks * CHUNK) as u64);
        }
        if self.one_in(1500) {
            self.guests[at].gone = true;
            self.new_guest();
        }
    }

    fn go_wrong(&mut self, at: usize) {
        let wrong = match self.dice.below(60) {
            0 => Some(SignedDuration::from_hours(24 * 365) * (1 + self.dice.below(10) as i32)),
            1 => Some(SignedDuration::from_hours(24 * 30) * -(1 + self.dice.below(20) as i32)),
            2 => Some(SignedDuration::from_mins(self.dice.below(20) as i64 - 10)),
            _ => None,
        };
        let reboots = self.one_in(50);
        let down = match self.one_in(60) {
            true => 1 + self.dice.below(3),
            false => 0,
        };
        let lasts = 1 + self.dice.below(3);
        let machine = &mut self.machines[at];
        machine.wrong_nights = machine.wrong_nights.saturating_sub(1);
        if let Some(wrong) = wrong {
            machine.wrong_nights = lasts;
            *machine.wrong_by.lock().unwrap() = wrong;
        } else if machine.wrong_nights == 0 {
            *machine.wrong_by.lock().unwrap() = SignedDuration::ZERO;
        }
        machine.down_nights = machine.down_nights.saturating_sub(1).max(down);
        if machine.down_nights > 0 || reboots {
            machine.reboot(&self.time);
        }
    }

    fn night(&mut self) {
        self.time.pass(DAY);
        let mut order: Vec<usize> = (0..HOSTS).collect();
        let by = self.dice.below(HOSTS as u64) as usize;
        order.rotate_left(by);
        for at in order {
            self.time
                .pass(SignedDuration::from_secs(self.dice.below(1200) as i64));
            self.go_wrong(at);
            if self.machines[at].down_nights > 0 {
                self.count("a host was off");
                continue;
            }
            for guest in 0..self.guests.len() {
                if self.guests[guest].host == at && !self.guests[guest].gone {
                    self.change(guest);
                }
            }
            for customer in 0..self.sites.len() {
                self.run(at, customer);
            }
        }
        // The next night begins at the same hour.
        let start: Timestamp = "2026-03-02T23:00:00Z".parse().unwrap();
        let due = start + DAY * (self.night as i32 + 1);
        self.time.pass(due.duration_since(self.time.now()));
        self.night += 1;
    }

    fn plan_fault(&mut self, faulty: &Faulty<Memory>) -> bool {
        if !self.one_in(25) {
            return false;
        }
        let at = faulty.operations() + 1 + self.dice.below(250);
        let fault = match self.dice.below(5) {
            0 => Fault::FailBefore {
                at,
                kind: StorageErrorKind::Transient,
            },
            1 => Fault::FailAfter { at },
            2 => Fault::FullFrom { at },
            applied => Fault::CrashAt {
                at,
                applied: applied == 3,
            },
        };
        faulty.add(fault);
        self.count("a fault was planned");
        true
    }

    fn run(&mut self, at: usize, customer: usize) {
        if !self.machines[at].open.contains_key(&customer) {
            let faulty = Arc::new(Faulty::new(self.memory.clone()));
            let machine = &mut self.machines[at];
            let name = &self.sites[customer].name;
            let opened = open_on(faulty.clone(), name, self.repository, &machine.local);
            let opened = opened.expect("a store without faults opens");
            machine.open.insert(customer, (opened, faulty));
        }
        let faulty = self.machines[at].open[&customer].1.clone();
        let may_fail = self.plan_fault(&faulty);
        let tasks: Vec<VmTask> = self
            .guests
            .iter()
            .filter(|guest| guest.host == at && guest.customer == customer && !guest.gone)
            .map(|guest| VmTask {
                vm: guest.name.clone(),
                source: Box::new(guest.fake.clone()),
            })
            .collect();
        let machine = &self.machines[at];
        let open = &machine.open[&customer].0;
        let terms = &self.sites[customer].terms;
        let stop = AtomicBool::new(false);
        let done = run_customer(
            open,
            &machine.local,
            terms,
            &tasks,
            &SETTINGS,
            &Quiet,
            &stop,
        );
        let crashed = faulty.crashed();
        faulty.clear_faults();
        let right = machine.is_right();
        let mut acknowledged = Vec::new();
        let mut refused = false;
        match &done {
            Ok(done) => {
                for vm in &done.vms {
                    if let VmOutcome::BackedUp(point) = &vm.outcome {
                        acknowledged.push((vm.vm.clone(), point.point));
                    }
                }
                let clock =
                    |error: &crate::jobs::JobError| matches!(error.kind, JobErrorKind::Clock(_));
                refused = done.pruned.as_ref().err().is_some_and(clock);
            }
            Err(error) => assert!(may_fail, "{}: a run failed: {error}", self.told()),
        }
        if refused && right && !crashed {
            // The operator reads the alarm, looks at the clock, and vouches for it.
            machine.local.vouch_for_clock();
            let pruned = prune(open, &machine.local, SETTINGS.prune, true, &Quiet, &stop);
            assert!(pruned.is_ok(), "{}: {:?}", self.told(), pruned.err());
            self.count("an operator vouched for the clock");
            self.machines[at].reboot(&self.time);
        }
        if crashed {
            self.count("a run died");
            self.machines[at].reboot(&self.time);
        }
        self.learn(customer, &acknowledged);
        self.count("runs");
    }

    /// What the ledger has of new points: each is what its guest held this night.
    fn learn(&mut self, customer: usize, acknowledged: &[(VmName, PointId)]) {
        let now = self.time.now();
        let site = &self.sites[customer];
        site.observer.refresh().unwrap();
        let points: Vec<(PointId, VmName)> = site.observer.with_state(|state| {
            let points = state.points.iter();
            points.map(|(id, point)| (*id, point.vm.clone())).collect()
        });
        for guest in &mut self.guests {
            if guest.customer != customer {
                continue;
            }
            for (id, _) in points.iter().filter(|(_, name)| *name == guest.name) {
                let chunks = &guest.chunks;
                guest.points.entry(*id).or_insert_with(|| Taken {
                    at: now,
                    chunks: chunks.clone(),
                });
            }
        }
        for (name, point) in acknowledged {
            let guest = self.guests.iter().find(|guest| guest.name == *name);
            let known = guest.is_some_and(|guest| guest.points.contains_key(point));
            assert!(
                known,
                "{}: {point} was acknowledged and is not there",
                self.told()
            );
        }
    }

    fn told(&self) -> String {
        format!("seed {}, night {}", self.seed, self.night)
    }

    /// The promises, as they are in the store. `all`: every point is restored, not only some.
    fn check(&mut self, all: bool) {
        let now = self.time.now();
        let told = self.told();
        for customer in 0..self.sites.len() {
            let mut restored = Vec::new();
            let site = &self.sites[customer];
            site.observer.refresh().unwrap();
            site.observer.with_state(|state| {
                for guest in self
                    .guests
                    .iter()
                    .filter(|guest| guest.customer == customer)
                {
                    for (id, taken) in &guest.points {
                        let point = state.points.get(id);
                        let age = now.duration_since(taken.at);
                        let live = point
                            .is_some_and(|point| point.state == PointState::Live && !point.void);
                        assert!(
                            live || age >= WINDOW,
                            "{told}: {} of {} was lost after {age}: {:?}",
                            guest.name,
                            taken.at,
                            point.map(|point| (point.state, point.taken_at, point.expires_at))
                        );
                        if live {
                            restored.push((*id, taken.chunks.clone(), guest.name.clone()));
                        }
                        let Some(point) = point else { continue };
                        assert!(
                            point.deadline <= taken.at + site.longest + DAY,
                            "{told}: a deadline too late"
                        );
                        assert!(
                            point.state == PointState::Erased || now < point.deadline,
                            "{told}: {} of {} is over its deadline {}",
                            guest.name,
                            taken.at,
                            point.deadline
                        );
                    }
                }
            });
            let wanted = if all { restored.len() } else { 3 };
            for _ in 0..wanted.min(restored.len()) {
                let at = match all {
                    true => restored.len() - 1,
                    false => self.dice.below(restored.len() as u64) as usize,
                };
                let (id, chunks, name) = restored.swap_remove(at);
                let bytes = restore(&site.observer, &id)
                    .unwrap_or_else(|error| panic!("{told}: {name} does not restore: {error}"));
                assert!(bytes == image(&chunks), "{told}: {name}: wrong bytes");
            }
            let mark = mark_now(&site.observer, false)
                .unwrap_or_else(|error| panic!("{told}: no complete mark: {error}"));
            for facts in survey(&site.observer, &mark, now).unwrap() {
                let late = facts.earliest_deadline.filter(|deadline| *deadline < now);
                assert!(
                    late.is_none(),
                    "{told}: dead bytes over {late:?}: {facts:?}"
                );
            }
        }
    }

    /// Whether it is in force now: a clock that is behind another's may have to wait.
    fn shorten(&mut self) -> bool {
        self.sites[1].terms.max_retention = "21 days".to_string();
        let terms = &self.sites[1].terms;
        self.machines.iter().any(|machine| {
            let site = machine.open.get(&1).filter(|_| machine.is_right());
            site.is_some_and(|(customer, _)| {
                let applied = apply_policy(customer, &machine.local, terms, true).unwrap();
                matches!(applied, Policies::Applied | Policies::Same)
            })
        })
    }

    fn live(&mut self, nights: u32) {
        let shortened_at = nights / 3 + self.dice.below(u64::from(nights / 4)) as u32;
        let mut shorten = true;
        while self.night < nights {
            self.night();
            if shorten && self.night >= shortened_at {
                shorten = !self.shorten();
            }
            if self.night.is_multiple_of(7) {
                self.check(false);
            }
        }
        assert!(!shorten, "{}: no host shortened a policy", self.told());
        self.check(true);
        let machine = &self.machines[0];
        *machine.wrong_by.lock().unwrap() = SignedDuration::ZERO;
        for site in &self.sites {
            let storage = Arc::new(self.memory.clone());
            let customer = open_on(storage, &site.name, self.repository, &machine.local).unwrap();
            let request = VerifyRequest {
                trees: true,
                read_percent: Some(100),
                unread_since: None,
                threads: 1,
            };
            let stop = AtomicBool::new(false);
            let verified = verify(&customer, request, &Quiet, &stop).unwrap();
            assert_eq!(verified.damage, Vec::<String>::new(), "{}", self.told());
        }
        println!("{}: {:?}", self.told(), self.runs);
    }
}

#[test]
fn in_a_life_of_faults_no_point_in_its_window_is_lost_and_none_outlives_its_deadline() {
    let nights = std::env::var("VMKEEP_LIFE_NIGHTS");
    let nights = nights.map_or(NIGHTS, |nights| nights.parse().expect("a number of nights"));
    run_seeds(
        seeds_of("VMKEEP_LIVES", 0..3),
        "scripts/lives N..N+1",
        |seed| Life::new(seed).live(nights),
    );
}
