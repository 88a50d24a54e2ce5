//! How this host's last run went, for whoever asks between two of them, and how far one is that is under way.

use super::report::{Alarm, AlarmKind};
use super::state_folder::{Lock, StateError, StateFolder, read_up_to, replace};
use crate::model::{CustomerName, VmName};
use crate::policy::{Policy, night_of, window_of};
use jiff::{SignedDuration, Timestamp};
use std::cmp::Reverse;
use std::fs;
use std::io;
use std::time::Duration;

const LAST_RUN: &str = "last-run.json";
const UNDER_WAY: &str = "under-way.json";
const LOCK: &str = "run";
/// Above what the two below make of it, whatever is in the texts.
const MAX_BYTES: u64 = 8 << 20;
const MOST_ALARMS: usize = 2000;
const MOST_CHARACTERS: usize = 500;
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(20);
/// Of a night that takes no longer nobody need hear.
const LONGEST_RUN: SignedDuration = SignedDuration::from_hours(12);

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LastRun {
    pub began_at: Timestamp,
    pub ended_at: Timestamp,
    pub exit_code: u8,
    /// When a run last did all that was due.
    pub succeeded_at: Option<Timestamp>,
    pub read_bytes: u64,
    pub stored_bytes: u64,
    pub backed_up: u64,
    pub failed: u64,
    /// What only a run can meet, which the ledger does not tell afterwards. Of customers that this run did
    /// not see to its end, it is what the run before met.
    #[serde(default)]
    pub alarms: Vec<RunAlarm>,
}

/// An alarm of a run, in words: one that another version has written is no reason to read none.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RunAlarm {
    /// When the run began that met it.
    pub at: Timestamp,
    /// `None`: it is about the run itself.
    pub customer: Option<String>,
    pub vm: Option<String>,
    pub alarm: String,
    pub text: String,
}

/// How far a run is.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct UnderWay {
    pub began_at: Timestamp,
    /// VMs that were due when it began.
    pub vms: u64,
    pub vms_done: u64,
    /// What it began last.
    pub at: String,
}

impl UnderWay {
    /// Whether it goes on for longer than a night takes: after the window of the night in which it began.
    pub fn is_late(&self, policy: Option<&Policy>, now: Timestamp) -> bool {
        let window_ended = policy.is_none_or(|policy| {
            let (_, end) = window_of(night_of(self.began_at, policy), policy);
            now >= end
        });
        now.duration_since(self.began_at) >= LONGEST_RUN && window_ended
    }
}

impl RunAlarm {
    pub fn new(at: Timestamp, customer: Option<&CustomerName>, alarm: &Alarm) -> Self {
        RunAlarm {
            at,
            customer: customer.map(ToString::to_string),
            vm: alarm.vm.as_ref().map(ToString::to_string),
            alarm: alarm.kind.word().to_string(),
            text: alarm.text.chars().take(MOST_CHARACTERS).collect(),
        }
    }

    fn kind(&self) -> Option<AlarmKind> {
        let mut kinds = AlarmKind::ALL.into_iter();
        kinds.find(|kind| kind.word() == self.alarm)
    }

    fn alarm(&self) -> Option<Alarm> {
        let kind = self.kind()?;
        match &self.vm {
            Some(vm) => {
                let vm = VmName::new(vm).ok()?;
                Some(Alarm::of_vm(kind, &vm, self.text.clone()))
            }
            None => Some(Alarm::of_customer(kind, &*self.text)),
        }
    }

    fn is_one_of(&self, customer: &CustomerName, kinds: &[AlarmKind]) -> bool {
        self.is_of(Some(customer)) && self.kind().is_some_and(|kind| kinds.contains(&kind))
    }

    fn is_of(&self, customer: Option<&CustomerName>) -> bool {
        self.customer.as_deref() == customer.map(|name| name.as_str())
    }

    /// Whether it is the same alarm, met again.
    pub fn is_again(&self, other: &RunAlarm) -> bool {
        (&self.customer, &self.vm, &self.alarm) == (&other.customer, &other.vm, &other.alarm)
    }
}

impl LastRun {
    /// The alarms of a customer (`None`: of the run itself) that are not over by now, each with when the run began
    /// that met it.
    pub fn standing(
        &self,
        customer: Option<&CustomerName>,
        is_over: impl Fn(&Alarm, Timestamp) -> bool,
    ) -> Vec<(Timestamp, Alarm)> {
        let alarms = self.alarms.iter().filter(|row| row.is_of(customer));
        alarms
            .filter_map(|row| Some((row.at, row.alarm()?)))
            .filter(|(at, alarm)| !is_over(alarm, *at))
            .collect()
    }
}

impl StateFolder {
    /// `None` if there was none, or it cannot be read.
    pub fn last_run(&self) -> Option<LastRun> {
        let text = read_up_to(&self.path().join(LAST_RUN), MAX_BYTES).ok()?;
        serde_json::from_str(&text).ok()
    }

    /// Of very many alarms the worst.
    pub fn remember_run(&self, mut run: LastRun) -> Result<(), StateError> {
        if run.alarms.len() > MOST_ALARMS {
            run.alarms.sort_by_key(|row| Reverse(row.kind()));
            run.alarms.truncate(MOST_ALARMS);
        }
        self.write(LAST_RUN, &run)
    }

    /// Drops such alarms of a customer, which are over. A run that is under way tells by itself what it met.
    pub fn settle_alarms(
        &self,
        customer: &CustomerName,
        kinds: &[AlarmKind],
    ) -> Result<(), StateError> {
        let is_over = |row: &RunAlarm| row.is_one_of(customer, kinds);
        if !self
            .last_run()
            .is_some_and(|run| run.alarms.iter().any(is_over))
        {
            return Ok(());
        }
        // Under the lock it is read again: a run may have ended since.
        let Some(_lock) = self.lock_run()? else {
            return Ok(());
        };
        let Some(mut run) = self.last_run() else {
            return Ok(());
        };
        run.alarms.retain(|row| !is_over(row));
        self.remember_run(run)
    }

    /// For as long as a run is under way; `None` if another one is.
    pub fn lock_run(&self) -> Result<Option<Lock>, StateError> {
        let mut attempts = 1;
        loop {
            let lock = self.lock(LOCK)?;
            if lock.is_some() {
                // How far the run before this one was is nothing of this one.
                let _gone = fs::remove_file(self.path().join(UNDER_WAY));
            }
            if lock.is_some() || attempts == ATTEMPTS {
                return Ok(lock);
            }
            // Somebody who asks whether a run is under way may hold it for an instant.
            std::thread::sleep(PAUSE);
            attempts += 1;
        }
    }

    /// Said by the run that holds the lock.
    pub fn tell_under_way(&self, run: &UnderWay) -> Result<(), StateError> {
        self.write(UNDER_WAY, run)
    }

    /// How far the run is that is under way. What one left that was killed is of none.
    pub fn under_way(&self) -> Option<UnderWay> {
        if !self.is_locked(LOCK) {
            return None;
        }
        let text = read_up_to(&self.path().join(UNDER_WAY), MAX_BYTES).ok()?;
        serde_json::from_str(&text).ok()
    }

    fn write(&self, name: &str, content: &impl serde::Serialize) -> Result<(), StateError> {
        let text = serde_json::to_string_pretty(content).map_err(|error| {
            let path = self.path().join(name);
            StateError::new(&path, io::Error::new(io::ErrorKind::InvalidData, error))
        })?;
        replace(self.path(), name, text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::PolicyTerms;

    fn run(alarms: Vec<RunAlarm>) -> LastRun {
        LastRun {
            began_at: Timestamp::UNIX_EPOCH,
            ended_at: Timestamp::UNIX_EPOCH,
            exit_code: 3,
            succeeded_at: None,
            read_bytes: 1 << 40,
            stored_bytes: 5,
            backed_up: 2,
            failed: 1,
            alarms,
        }
    }

    fn failed(vm: &str) -> Alarm {
        let vm = VmName::new(vm).unwrap();
        Alarm::of_vm(AlarmKind::BackupFailed, &vm, format!("{vm}: failed"))
    }

    fn acme() -> CustomerName {
        CustomerName::new("acme").unwrap()
    }

    #[test]
    fn a_run_is_remembered_and_what_is_torn_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::create(folder.path()).unwrap();
        assert_eq!(state.last_run(), None);
        let run = run(vec![RunAlarm::new(
            Timestamp::UNIX_EPOCH,
            Some(&acme()),
            &failed("web01"),
        )]);
        state.remember_run(run.clone()).unwrap();
        assert_eq!(state.last_run(), Some(run));
        std::fs::write(folder.path().join(LAST_RUN), "{\"began_at\":").unwrap();
        assert_eq!(state.last_run(), None);
    }

    #[test]
    fn a_run_of_before_alarms_were_remembered_still_reads() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::create(folder.path()).unwrap();
        state.remember_run(run(Vec::new())).unwrap();
        let path = folder.path().join(LAST_RUN);
        let text = std::fs::read_to_string(&path).unwrap();
        let mut document: serde_json::Value = serde_json::from_str(&text).unwrap();
        document.as_object_mut().unwrap().remove("alarms").unwrap();
        std::fs::write(&path, document.to_string()).unwrap();
        assert_eq!(state.last_run(), Some(run(Vec::new())));
    }

    #[test]
    fn an_alarm_of_a_run_stands_until_it_is_over_and_is_its_customers_alone() {
        let at = Timestamp::UNIX_EPOCH;
        let early = Alarm::of_customer(AlarmKind::RunFailed, "no repository");
        let mut rows = vec![
            RunAlarm::new(at, Some(&acme()), &failed("web01")),
            RunAlarm::new(at, Some(&acme()), &failed("db01")),
            RunAlarm::new(at, None, &early),
        ];
        // A later version may know other alarms.
        rows.push(RunAlarm {
            alarm: "something-new".to_string(),
            ..rows[0].clone()
        });
        let run = run(rows);
        let is_over = |alarm: &Alarm, _| alarm.vm.as_ref().is_some_and(|vm| vm.as_str() == "web01");
        assert_eq!(run.standing(Some(&acme()), is_over), [(at, failed("db01"))]);
        assert_eq!(run.standing(None, is_over), [(at, early)]);
        let globex = CustomerName::new("globex").unwrap();
        assert_eq!(run.standing(Some(&globex), is_over), []);
    }

    #[test]
    fn what_is_over_is_dropped_of_its_customer_alone_and_not_beside_a_run() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::create(folder.path()).unwrap();
        let at = Timestamp::UNIX_EPOCH;
        let globex = CustomerName::new("globex").unwrap();
        let pruned = Alarm::of_customer(AlarmKind::PruneFailed, "refused");
        let rows = vec![
            RunAlarm::new(at, Some(&acme()), &pruned),
            RunAlarm::new(at, Some(&acme()), &failed("web01")),
            RunAlarm::new(at, Some(&globex), &pruned),
        ];
        state.remember_run(run(rows.clone())).unwrap();
        let kinds = [AlarmKind::PruneFailed, AlarmKind::Unexplained];
        let lock = state.lock_run().unwrap().expect("nobody else's");
        state.settle_alarms(&acme(), &kinds).unwrap();
        assert_eq!(state.last_run(), Some(run(rows.clone())));
        drop(lock);
        state.settle_alarms(&acme(), &kinds).unwrap();
        assert_eq!(state.last_run(), Some(run(rows[1..].to_vec())));
    }

    #[test]
    fn of_more_alarms_than_anybody_reads_the_worst_are_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::create(folder.path()).unwrap();
        let at = Timestamp::UNIX_EPOCH;
        let mut long = failed("web01");
        // Each of it takes six characters in the file.
        long.text = "\u{1}".repeat(10_000);
        let mut rows = vec![RunAlarm::new(at, Some(&acme()), &long); 3 * MOST_ALARMS];
        let damage = Alarm::of_customer(AlarmKind::Damage, "a pack is missing");
        rows.push(RunAlarm::new(at, Some(&acme()), &damage));
        state.remember_run(run(rows)).unwrap();
        let read = state.last_run().expect("it reads");
        assert_eq!(read.alarms.len(), MOST_ALARMS);
        assert_eq!(read.standing(Some(&acme()), |_, _| false)[0].1, damage);
    }

    #[test]
    fn a_run_is_late_once_its_night_is_over_and_half_a_day_has_passed() {
        let policy = |window: &str| {
            let terms = PolicyTerms {
                timezone: "UTC".to_string(),
                window: window.to_string(),
                ..PolicyTerms::default()
            };
            Policy::parse(&terms).unwrap()
        };
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let run = UnderWay {
            began_at: at("2031-02-10T22:30:00Z"),
            vms: 12,
            vms_done: 3,
            at: "acme/web01".to_string(),
        };
        let night = policy("22:00-06:00");
        assert!(!run.is_late(Some(&night), at("2031-02-11T10:29:00Z")));
        assert!(run.is_late(Some(&night), at("2031-02-11T10:30:00Z")));
        // One that is spread over the day as well.
        let long = policy("22:00-20:00");
        assert!(!run.is_late(Some(&long), at("2031-02-11T19:59:00Z")));
        assert!(run.is_late(Some(&long), at("2031-02-11T20:00:00Z")));
        // A clock that was set back says nothing.
        assert!(!run.is_late(Some(&night), at("2031-02-09T22:30:00Z")));
        assert!(run.is_late(None, at("2031-02-11T10:30:00Z")));
    }

    #[test]
    fn how_far_a_run_is_is_known_for_as_long_as_it_is_under_way() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::create(folder.path()).unwrap();
        let far = UnderWay {
            began_at: Timestamp::UNIX_EPOCH,
            vms: 12,
            vms_done: 3,
            at: "acme/web01".to_string(),
        };
        assert_eq!(state.under_way(), None);
        let lock = state.lock_run().unwrap().expect("nobody else's");
        state.tell_under_way(&far).unwrap();
        assert_eq!(state.under_way(), Some(far));
        assert!(state.lock_run().unwrap().is_none(), "one at a time");
        drop(lock);
        assert_eq!(state.under_way(), None);
        // The next one has not said how far it is.
        let _next = state.lock_run().unwrap().expect("nobody else's");
        assert_eq!(state.under_way(), None);
    }
}
