//! What becomes of restore points that one clock alone has dated: after a reboot nobody but NTP speaks for it.

use crate::format::entry::{Body, ClockBody, ClockEvent};
use crate::jobs::testing::back_up;
use crate::jobs::{LocalHost, PruneRequest, Quiet, StateFolder, prune};
use crate::model::{BootMark, Clock, ClockReading, PointId, PointState, Writers};
use crate::policy::{HostClock, PolicyTerms};
use crate::repository::testing::{CHUNK, DAY, Time, customer_name, image};
use crate::repository::{
    Customer, Host, NewCustomer, WriteSettings, create_repository, new_repository,
};
use crate::storage::{Memory, Storage};
use jiff::{SignedDuration, Timestamp};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

const HOUR: SignedDuration = SignedDuration::from_hours(1);

/// A machine with a clock that may be wrong and an uptime that is right.
struct Machine {
    time: Time,
    booted: Mutex<(String, Timestamp)>,
    wrong_by: Mutex<SignedDuration>,
}

impl Clock for Machine {
    fn read(&self) -> ClockReading {
        let (boot_id, since) = self.booted.lock().unwrap().clone();
        let up = self.time.now().duration_since(since).as_secs();
        ClockReading {
            wall: self.time.now() + *self.wrong_by.lock().unwrap(),
            synchronised: true,
            boot: Some(BootMark {
                boot_id,
                since_boot_seconds: up.unsigned_abs(),
            }),
        }
    }
}

struct Lab {
    storage: Arc<dyn Storage>,
    repository: crate::model::RepositoryId,
    machine: Arc<Machine>,
    folder: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        let storage: Arc<dyn Storage> = Arc::new(Memory::new());
        let time = Time::new();
        let made = new_repository(time.now(), CHUNK as u32, Writers::Many);
        let file = create_repository(&*storage, made).unwrap();
        let machine = Machine {
            booted: Mutex::new(("first".to_string(), time.now())),
            time,
            wrong_by: Mutex::default(),
        };
        machine.time.pass(HOUR);
        let lab = Lab {
            storage,
            repository: file.repository,
            machine: Arc::new(machine),
            folder: tempfile::tempdir().unwrap(),
        };
        // The operator confirms the time at `init`.
        let init = lab.host(HostClock::Verified);
        init.vouch_for_clock();
        let new = NewCustomer {
            repository: lab.repository,
            name: &customer_name(),
            host: init.body(),
            recipients: vec![init.identity().recipient()],
            terms: &PolicyTerms {
                timezone: "UTC".to_string(),
                ..PolicyTerms::default()
            },
            writers: Writers::Many,
        };
        Customer::create(&lab.storage, &new, &init).unwrap();
        lab
    }

    /// Another process each time, as a run is.
    fn host(&self, mode: HostClock) -> LocalHost {
        let folder = StateFolder::create(self.folder.path()).unwrap();
        let (identity, _) = folder.ensure_identity("a test").unwrap();
        let clock = self.machine.clone();
        LocalHost::new(identity, "a host".to_string(), folder, clock, mode)
    }

    fn open(&self, host: &Arc<LocalHost>) -> Customer {
        let settings = WriteSettings {
            pack_bytes: 4 * CHUNK,
            compression_level: 1,
            segment_records: 24,
            threads: 1,
        };
        let (name, identity) = (customer_name(), host.identity());
        let host: Arc<dyn Host> = host.clone();
        let storage = self.storage.clone();
        Customer::open(storage, &name, self.repository, identity, host, settings).unwrap()
    }

    fn reboot(&self, id: &str) {
        self.machine.time.pass(HOUR);
        *self.machine.booted.lock().unwrap() = (id.to_string(), self.machine.time.now());
    }

    fn be_wrong_by(&self, wrong_by: SignedDuration) {
        *self.machine.wrong_by.lock().unwrap() = wrong_by;
    }

    /// A backup, then a day goes by.
    fn night(&self) -> PointId {
        let host = Arc::new(self.host(HostClock::Verified));
        let point = back_up(&self.open(&host), "web", &image(&[1]), true);
        self.machine.time.pass(DAY);
        point
    }

    /// As `prune --trust-clock`.
    fn vouch(&self) -> Customer {
        let host = Arc::new(self.host(HostClock::Verified));
        host.vouch_for_clock();
        let customer = self.open(&host);
        let (request, stop) = (PruneRequest::default(), AtomicBool::new(false));
        prune(&customer, &host, request, true, &Quiet, &stop).unwrap();
        customer
    }
}

fn deadline(customer: &Customer, point: &PointId) -> Timestamp {
    customer.with_state(|state| state.points[point].deadline)
}

#[test]
fn points_since_a_reboot_are_kept_their_time_once_an_operator_vouches_for_the_clock() {
    let lab = Lab::new();
    lab.night();
    lab.reboot("second");
    let nights: Vec<PointId> = (0..50).map(|_| lab.night()).collect();
    let host = Arc::new(lab.host(HostClock::Verified));
    let before = lab.open(&host);
    let first = nights.first().unwrap();
    // All count from the last time that two clocks agreed on.
    let last = nights.last().unwrap();
    assert_eq!(deadline(&before, last), deadline(&before, first));
    let customer = lab.vouch();
    customer.with_state(|state| {
        let taken = |point: &PointId| state.points[point].taken_at;
        let two_months = 59 * 24;
        for point in &nights {
            let kept = state.points[point].deadline.duration_since(taken(point));
            assert!(kept.as_hours() >= two_months, "{kept}");
            let in_window = lab.machine.time.now().duration_since(taken(point)) < DAY * 14;
            let live = state.points[point].state == PointState::Live;
            assert!(live || !in_window, "a point of the last two weeks expired");
        }
    });
}

#[test]
fn nobody_vouches_for_a_clock_that_was_set_since() {
    let lab = Lab::new();
    lab.night();
    lab.reboot("second");
    lab.be_wrong_by(DAY * 20);
    let ahead = lab.night();
    lab.be_wrong_by(SignedDuration::ZERO);
    for _ in 0..25 {
        lab.night();
    }
    let right = lab.night();
    let before = deadline(&lab.open(&Arc::new(lab.host(HostClock::Verified))), &ahead);
    let customer = lab.vouch();
    assert_eq!(deadline(&customer, &ahead), before);
    assert!(deadline(&customer, &right) > before);
}

#[test]
fn what_a_wrong_word_kept_longer_goes_once_its_time_is_void() {
    let lab = Lab::new();
    lab.night();
    lab.reboot("second");
    let year = DAY * 365;
    lab.be_wrong_by(year);
    let alone = lab.night();
    let customer = lab.vouch();
    let far = lab.machine.time.now() + year;
    assert!(deadline(&customer, &alone) > far);
    // Two clocks agree from now on: this one, and the uptime since somebody vouched for it.
    let witnessed = lab.night();
    lab.be_wrong_by(SignedDuration::ZERO);
    let customer = lab.open(&Arc::new(lab.host(HostClock::Verified)));
    assert!(deadline(&customer, &witnessed) > far);
    let ahead = customer.with_state(|state| {
        let is_ahead = |seq: &u64| {
            let at = state.witnessed_at(*seq);
            at.is_some_and(|at| at > lab.machine.time.now())
        };
        (1..=state.seq).filter(is_ahead).collect::<Vec<_>>()
    });
    for seq in ahead {
        let body = ClockBody {
            event: ClockEvent::Void,
            seq: Some(seq),
            text: "a test".to_string(),
        };
        customer.append(|_| Ok(Body::Clock(body.clone()))).unwrap();
    }
    for point in [alone, witnessed] {
        let deadline = deadline(&customer, &point);
        assert!(deadline < lab.machine.time.now() + DAY * 63, "{deadline}");
    }
}

#[test]
fn an_uptime_of_an_earlier_boot_speaks_for_nothing() {
    let lab = Lab::new();
    lab.night();
    lab.reboot("second");
    let earlier = lab.night();
    lab.reboot("third");
    let later = lab.night();
    let host = Arc::new(lab.host(HostClock::Verified));
    let before = deadline(&lab.open(&host), &earlier);
    let customer = lab.vouch();
    assert_eq!(deadline(&customer, &earlier), before);
    assert!(deadline(&customer, &later) > before);
}

#[test]
fn a_clock_is_trusted_only_where_the_ledger_says_so() {
    let lab = Lab::new();
    lab.reboot("second");
    let point = |mode| {
        let host = Arc::new(lab.host(mode));
        let customer = lab.open(&host);
        let point = back_up(&customer, "web", &image(&[1]), true);
        customer.with_state(|state| state.points[&point].clock_alone)
    };
    assert!(point(HostClock::Trusted), "by its own configuration alone");
    let host = lab.host(HostClock::Trusted);
    let customer = lab.open(&Arc::new(lab.host(HostClock::Verified)));
    customer.append(|_| Ok(Body::Host(host.body()))).unwrap();
    assert!(!point(HostClock::Trusted));
}

#[test]
fn a_void_time_keeps_no_point_longer() {
    let lab = Lab::new();
    lab.night();
    // Two clocks agreed, and both were a year ahead.
    let year = DAY * 365;
    lab.be_wrong_by(year);
    let wrong = lab.vouch();
    let seq = wrong.with_state(|state| {
        let seqs = (1..=state.seq).rev();
        let ahead = |seq: &u64| {
            state
                .witnessed_at(*seq)
                .is_some_and(|at| at > lab.machine.time.now())
        };
        seqs.filter(ahead).collect::<Vec<_>>()
    });
    lab.be_wrong_by(SignedDuration::ZERO);
    lab.reboot("second");
    let point = lab.night();
    let host = Arc::new(lab.host(HostClock::Verified));
    let customer = lab.open(&host);
    let far = lab.machine.time.now() + year;
    assert!(deadline(&customer, &point) > far);
    for seq in seq {
        let body = ClockBody {
            event: ClockEvent::Void,
            seq: Some(seq),
            text: "a test".to_string(),
        };
        customer.append(|_| Ok(Body::Clock(body.clone()))).unwrap();
    }
    assert!(deadline(&customer, &point) < lab.machine.time.now() + DAY * 63);
}
