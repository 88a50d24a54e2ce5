//! Who is told what after a run: each receiver every alarm once, again after a while, and when it is over.

use super::alarms::Concern;
use super::answer::Answer;
use super::exit::{Exit, Failure};
use super::figures;
use super::notify::Receivers;
use super::overview::Overview;
use super::site::Site;
use crate::config::{Config, ReportWhen};
use crate::jobs::{Alarm, AlarmKind, Severity, StateFolder};
use crate::notify::{Event, Message, Moment, Notifier, NotifyErrorKind, Severity as Weight};
use crate::policy::{Announcement, Change, Sounding, announcements, remember};
use jiff::{SignedDuration, Timestamp};
use std::collections::{BTreeMap, BTreeSet};

/// Tells everybody what they have not heard. Who cannot be reached keeps the news from nobody else.
pub fn tell_all(receivers: &Receivers, site: &Site, overview: &Overview, answer: &Answer) {
    let at = site.host.now();
    let settings = &site.config.notify;
    let is_reported = match settings.report {
        ReportWhen::Always => true,
        ReportWhen::Failure => answer.exit != Exit::Done,
        ReportWhen::Never => false,
    };
    let host = &site.config.host.name;
    let findings = Findings {
        host,
        at,
        concerns: &overview.concerns,
        unseen: &overview.unseen(),
        is_complete: overview.outside().is_complete,
        configured: &configured(site),
        report: is_reported.then(|| report(host, at, answer)),
    };
    tell_each(receivers, site.host.folder(), &site.config, &findings);
}

/// The alarms alone, of who looked beside a run that is under way: what that one will have met is not known, and
/// nothing is known to be over.
pub fn tell_alarms(receivers: &Receivers, site: &Site, overview: &Overview) {
    let findings = Findings {
        host: &site.config.host.name,
        at: site.host.now(),
        concerns: &overview.concerns,
        unseen: &all_of(&site.config),
        is_complete: false,
        configured: &configured(site),
        report: None,
    };
    tell_each(receivers, site.host.folder(), &site.config, &findings);
}

/// Every customer, and the store.
fn all_of(config: &Config) -> BTreeSet<String> {
    let customers = config.customers.iter();
    let customers = customers.map(|customer| customer.name.to_string());
    customers.chain([STORE.to_string()]).collect()
}

fn tell_each(
    receivers: &Receivers,
    folder: &StateFolder,
    config: &Config,
    findings: &Findings<'_>,
) {
    for (name, failure) in &receivers.unusable {
        tracing::error!("{name}: {}", failure.message);
    }
    let remind_every = config.notify.remind_every;
    let remind_every = SignedDuration::try_from(remind_every).unwrap_or(SignedDuration::MAX);
    let _lock = folder.lock_telling();
    for receiver in &receivers.notifiers {
        if let Err(error) = tell(&**receiver, folder, findings, remind_every) {
            tracing::error!("not everything was told: {error}");
        }
    }
}

fn configured(site: &Site) -> BTreeSet<String> {
    let customers = site.config.customers.iter();
    let names = customers.flat_map(|customer| {
        let vms = customer.vms.iter();
        let vms = vms.map(|vm| format!("{}/{}", customer.name, vm.name));
        std::iter::once(customer.name.to_string()).chain(vms)
    });
    names.collect()
}

/// A run that came to nothing is told, too, to whoever can be: nothing of any customer is known to be over.
pub fn tell_failure(
    receivers: &Receivers,
    folder: &StateFolder,
    config: &Config,
    at: Timestamp,
    failure: &Failure,
) {
    let alarm = Alarm::of_customer(AlarmKind::RunFailed, &*failure.message);
    let concerns = [Concern {
        customer: None,
        alarm,
    }];
    let findings = Findings {
        host: &config.host.name,
        at,
        concerns: &concerns,
        unseen: &all_of(config),
        is_complete: false,
        configured: &BTreeSet::new(),
        report: None,
    };
    tell_each(receivers, folder, config, &findings);
}

fn report(host: &str, at: Timestamp, answer: &Answer) -> Message {
    let (severity, what) = match answer.exit {
        Exit::Done => (Weight::Info, "the run did all that was due".to_string()),
        exit => (
            Weight::Warning,
            format!("the run ended with: {}", exit.meaning()),
        ),
    };
    Message {
        event: Event::Report,
        severity,
        key: None,
        host: host.to_string(),
        customer: None,
        vm: None,
        at,
        subject: what,
        text: answer.text.clone(),
        document: Some(answer.document.clone()),
    }
}

/// A ping that does not arrive is what its watcher listens for.
pub fn ping(receivers: &Receivers, moment: Moment, text: &str) {
    for ping in &receivers.pings {
        if let Err(error) = ping.ping(moment, text) {
            tracing::error!("{error}");
        }
    }
}

/// The customer in the name of an alarm that is about none.
const STORE: &str = "";

/// What a run found.
pub struct Findings<'a> {
    pub host: &'a str,
    pub at: Timestamp,
    pub concerns: &'a [Concern],
    /// Customers, and [`STORE`], that could not be looked at: what was told of them may go on.
    pub unseen: &'a BTreeSet<String>,
    /// Whether all customers outside of the configuration were looked at as well.
    pub is_complete: bool,
    /// Customers, and VMs as `customer/vm`, of the configuration.
    pub configured: &'a BTreeSet<String>,
    /// Told to everybody as well.
    pub report: Option<Message>,
}

impl Findings<'_> {
    /// Whether an alarm that does not sound any more is over, and not only about what nobody looks at any more. What
    /// is left of a VM that is gone is looked at for as long as it is there.
    fn is_looked_at(&self, name: &str) -> bool {
        let kinds = [
            AlarmKind::LastPoint,
            AlarmKind::OverMaximum,
            AlarmKind::BudgetHalfUsed,
            AlarmKind::NotConfigured,
        ];
        let (kind, whom) = name.split_once(' ').unwrap_or((name, ""));
        whom.is_empty()
            || self.configured.contains(whom)
            || kinds.iter().any(|of| of.word() == kind)
    }
}

/// Tells one receiver what it has not heard. What it did not take is told again after the next run.
pub fn tell(
    receiver: &dyn Notifier,
    folder: &StateFolder,
    findings: &Findings<'_>,
    remind_every: SignedDuration,
) -> Result<(), String> {
    let mut told = folder.told_alarms(&receiver.name());
    let mut by_name: BTreeMap<String, &Concern> = BTreeMap::new();
    let mut current: BTreeMap<String, Sounding> = BTreeMap::new();
    for concern in findings.concerns {
        by_name.insert(concern.name(), concern);
        let (line, extent) = (concern.line(), concern.alarm.extent);
        // Of several points of a VM that are kept too long, all are told.
        let sounding = current.entry(concern.name()).or_insert_with(|| Sounding {
            text: String::new(),
            extent: 0,
        });
        if !sounding.text.is_empty() {
            sounding.text.push('\n');
        }
        sounding.text.push_str(&line);
        sounding.extent = sounding.extent.saturating_add(extent);
    }
    let seen = |name: &str| {
        let customer = customer_in(name);
        let is_outside = customer != STORE && !findings.configured.contains(customer);
        // Of all that is beside the customers there is one alarm.
        let is_beside = is_outside || name == AlarmKind::Unexplained.word();
        !findings.unseen.contains(customer) && (findings.is_complete || !is_beside)
    };
    let changes = announcements(&told, &current, seen, findings.at, remind_every);
    let mut messages: Vec<Message> = changes
        .iter()
        .map(|change| message(change, by_name.get(&change.key).copied(), findings))
        .collect();
    // The worst first: a mail's subject is that of the first.
    messages.sort_by_key(|message| std::cmp::Reverse(message.severity));
    if !messages.is_empty() {
        send(receiver, &messages)?;
        remember(&mut told, &changes, findings.at);
        folder
            .remember_told_alarms(&receiver.name(), &told)
            .map_err(|error| error.to_string())?;
    }
    // By itself: who does not take a report, for its size, has the alarms.
    if let Some(report) = &findings.report {
        send(receiver, std::slice::from_ref(report))?;
    }
    Ok(())
}

/// What some of a receiver's people have is told: nobody hears it again because of the others.
fn send(receiver: &dyn Notifier, messages: &[Message]) -> Result<(), String> {
    match receiver.send(messages) {
        Err(error) if error.kind == NotifyErrorKind::Partly => {
            tracing::error!("{error}");
            Ok(())
        }
        sent => sent.map_err(|error| error.to_string()),
    }
}

fn message(change: &Announcement, concern: Option<&Concern>, findings: &Findings<'_>) -> Message {
    let lasted = findings.at.duration_since(change.since).as_secs();
    let lasted = figures::seconds(u64::try_from(lasted).unwrap_or(0));
    let first = change.text.lines().next().unwrap_or_default();
    let more = change.text.lines().count().saturating_sub(1);
    let line = match more {
        0 => first.to_string(),
        more => format!("{first} (+{more} more)"),
    };
    let (event, subject, text) = match change.change {
        Change::Raised => (Event::Raised, line, change.text.clone()),
        Change::Reminder => (
            Event::Reminder,
            format!("still {line}"),
            format!("{}\nsince {} ({lasted})", change.text, change.since),
        ),
        Change::Cleared => {
            let end = match findings.is_looked_at(&change.key) {
                true => "over",
                false => "no longer in the configuration",
            };
            (
                Event::Cleared,
                format!("{end}: {line}"),
                format!(
                    "{end}: {}\nit lasted from {} ({lasted})",
                    change.text, change.since
                ),
            )
        }
    };
    let severity = match (change.change, concern) {
        (Change::Cleared, _) | (_, None) => Weight::Info,
        (_, Some(concern)) => match concern.alarm.kind.severity() {
            Severity::Warning => Weight::Warning,
            Severity::Suspect | Severity::Broken | Severity::Damage => Weight::Critical,
        },
    };
    let (customer, vm) = whom(&change.key);
    Message {
        event,
        severity,
        key: Some(change.key.clone()),
        host: findings.host.to_string(),
        customer: customer.map(str::to_string),
        vm: vm.map(str::to_string),
        at: findings.at,
        subject,
        text,
        document: None,
    }
}

/// The customer and the VM in an alarm's name.
fn whom(name: &str) -> (Option<&str>, Option<&str>) {
    match name.split_once(' ').map(|(_, whom)| whom) {
        None => (None, None),
        Some(whom) => match whom.split_once('/') {
            Some((customer, vm)) => (Some(customer), Some(vm)),
            None => (Some(whom), None),
        },
    }
}

fn customer_in(name: &str) -> &str {
    whom(name).0.unwrap_or(STORE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{CustomerName, VmName};
    use crate::notify::NotifyError;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Ear {
        heard: Mutex<Vec<Vec<Message>>>,
        deaf: bool,
    }

    impl Notifier for Ear {
        fn name(&self) -> String {
            "ear".to_string()
        }

        fn send(&self, messages: &[Message]) -> Result<(), NotifyError> {
            if self.deaf {
                return Err(NotifyError {
                    kind: NotifyErrorKind::Transient,
                    name: self.name(),
                    detail: "does not listen".to_string(),
                });
            }
            self.heard.lock().unwrap().push(messages.to_vec());
            Ok(())
        }
    }

    fn concern(kind: AlarmKind, customer: &str) -> Concern {
        let vm = VmName::new("web01").unwrap();
        Concern {
            customer: CustomerName::new(customer).ok(),
            alarm: Alarm::of_vm(kind, &vm, format!("web01: {}", kind.word())),
        }
    }

    /// What is heard of what holds at an hour.
    fn hear(
        ear: &Ear,
        folder: &StateFolder,
        hour: i64,
        concerns: &[Concern],
        unseen: &[&str],
    ) -> Result<Vec<(Event, String)>, String> {
        let unseen = unseen.iter().map(|name| name.to_string()).collect();
        let findings = Findings {
            host: "host1",
            at: Timestamp::UNIX_EPOCH + SignedDuration::from_hours(hour),
            concerns,
            unseen: &unseen,
            is_complete: true,
            configured: &BTreeSet::from(["acme/web01".to_string()]),
            report: None,
        };
        ear.heard.lock().unwrap().clear();
        tell(ear, folder, &findings, SignedDuration::from_hours(24))?;
        let heard = ear.heard.lock().unwrap().concat();
        let heard = heard.into_iter();
        Ok(heard.map(|one| (one.event, one.subject)).collect())
    }

    #[test]
    fn a_receiver_hears_of_an_alarm_once_the_worst_first_and_when_it_is_over() {
        let folder = tempfile::tempdir().unwrap();
        let folder = StateFolder::create(folder.path()).unwrap();
        let ear = Ear::default();
        let holds = [
            concern(AlarmKind::Stale, "acme"),
            concern(AlarmKind::Hole, "acme"),
        ];
        let told = |text: &str, event| (event, text.to_string());
        assert_eq!(
            hear(&ear, &folder, 0, &holds, &[]).unwrap(),
            [
                told("broken: acme: web01: hole", Event::Raised),
                told("warning: acme: web01: stale", Event::Raised)
            ]
        );
        assert_eq!(hear(&ear, &folder, 1, &holds, &[]).unwrap(), []);
        // More of the same is news.
        let mut worse = holds.clone();
        worse[1].alarm.extent = 2;
        assert_eq!(
            hear(&ear, &folder, 1, &worse, &[]).unwrap(),
            [told("broken: acme: web01: hole", Event::Raised)]
        );
        // Nobody could look at acme: nothing is over.
        assert_eq!(hear(&ear, &folder, 2, &[], &["acme"]).unwrap(), []);
        assert_eq!(
            hear(&ear, &folder, 25, &holds[1..], &[]).unwrap(),
            [
                told("still broken: acme: web01: hole", Event::Reminder),
                told("over: warning: acme: web01: stale", Event::Cleared)
            ]
        );
    }

    #[test]
    fn a_run_that_saw_nothing_calls_nothing_of_the_store_over() {
        let folder = tempfile::tempdir().unwrap();
        let folder = StateFolder::create(folder.path()).unwrap();
        let ear = Ear::default();
        let of_store = |kind| Concern {
            customer: None,
            alarm: Alarm::of_customer(kind, "10 GiB free"),
        };
        let full = [of_store(AlarmKind::AlmostFull)];
        hear(&ear, &folder, 0, &full, &[]).unwrap();
        let failed = [of_store(AlarmKind::RunFailed)];
        let heard = hear(&ear, &folder, 1, &failed, &["acme", STORE]).unwrap();
        assert_eq!(heard.len(), 1, "{heard:?}");
        assert_eq!(heard[0].0, Event::Raised);
        // The next run sees that both are over.
        let heard = hear(&ear, &folder, 2, &[], &[]).unwrap();
        assert!(heard.iter().all(|(event, _)| *event == Event::Cleared));
        assert_eq!(heard.len(), 2);
    }

    #[test]
    fn of_what_left_the_configuration_nothing_is_called_over() {
        let folder = tempfile::tempdir().unwrap();
        let folder = StateFolder::create(folder.path()).unwrap();
        let ear = Ear::default();
        let holds = [concern(AlarmKind::Hole, "globex")];
        hear(&ear, &folder, 0, &holds, &[]).unwrap();
        let heard = hear(&ear, &folder, 1, &[], &[]).unwrap();
        let gone = "no longer in the configuration: broken: globex: web01: hole";
        assert_eq!(heard, [(Event::Cleared, gone.to_string())]);
    }

    #[test]
    fn what_was_told_of_what_is_not_configured_goes_on_while_nobody_could_look() {
        let folder = tempfile::tempdir().unwrap();
        let folder = StateFolder::create(folder.path()).unwrap();
        let ear = Ear::default();
        let stranger = Concern {
            customer: None,
            alarm: Alarm::of_customer(AlarmKind::Unexplained, "a copy"),
        };
        let holds = [concern(AlarmKind::NotConfigured, "beta"), stranger];
        hear(&ear, &folder, 0, &holds, &[]).unwrap();
        let none = BTreeSet::new();
        let look = |is_complete| {
            let findings = Findings {
                host: "host1",
                at: Timestamp::UNIX_EPOCH + SignedDuration::from_hours(1),
                concerns: &[],
                unseen: &none,
                is_complete,
                configured: &none,
                report: None,
            };
            ear.heard.lock().unwrap().clear();
            tell(&ear, &folder, &findings, SignedDuration::from_hours(24)).unwrap();
            let heard = ear.heard.lock().unwrap().concat().into_iter();
            heard.map(|one| one.subject).collect::<Vec<_>>()
        };
        assert_eq!(look(false), Vec::<String>::new());
        let mut over = look(true);
        over.sort();
        let expected = [
            "over: warning: beta: web01: not-configured",
            "over: warning: store: a copy",
        ];
        assert_eq!(over, expected);
    }

    #[test]
    fn who_did_not_take_it_hears_it_after_the_next_run() {
        let folder = tempfile::tempdir().unwrap();
        let folder = StateFolder::create(folder.path()).unwrap();
        let mut ear = Ear {
            deaf: true,
            ..Ear::default()
        };
        let holds = [concern(AlarmKind::Hole, "acme")];
        let refused = hear(&ear, &folder, 0, &holds, &[]).unwrap_err();
        assert_eq!(refused, "ear: does not listen");
        ear.deaf = false;
        assert_eq!(hear(&ear, &folder, 1, &holds, &[]).unwrap().len(), 1);
    }

    #[test]
    fn an_alarms_name_says_whom_it_is_about() {
        assert_eq!(whom("hole acme/web01"), (Some("acme"), Some("web01")));
        assert_eq!(whom("damage acme"), (Some("acme"), None));
        assert_eq!(whom("almost-full"), (None, None));
    }
}
