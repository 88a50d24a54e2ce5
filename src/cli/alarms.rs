//! What is wrong, as `status` and `run` see it: the ledger's alarms, and what only this host can tell.

use super::exit::Exit;
use super::figures;
use super::site::{OpenCustomer, Site};
use crate::jobs::{
    Alarm, AlarmKind, Looked, Policies, READ_AT_LEAST, Severity, VmStatus, alarms, foresee_policy,
    status, why_not_delete,
};
use crate::model::CustomerName;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use std::fmt::Display;

/// What a week adds is what a full store lacks first.
const WEEK: SignedDuration = SignedDuration::from_hours(24 * 7);

/// An alarm with whom it concerns; without a customer, all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Concern {
    pub customer: Option<CustomerName>,
    pub alarm: Alarm,
}

impl Concern {
    /// The same for as long as it goes on: `hole acme/web01`.
    pub fn name(&self) -> String {
        let word = self.alarm.kind.word();
        match (&self.customer, &self.alarm.vm) {
            (Some(customer), Some(vm)) => format!("{word} {customer}/{vm}"),
            (Some(customer), None) => format!("{word} {customer}"),
            (None, _) => word.to_string(),
        }
    }

    /// For people.
    pub fn whom(&self) -> &str {
        self.customer.as_ref().map_or("store", |name| name.as_str())
    }

    /// For people, on a line.
    pub fn line(&self) -> String {
        let severity = severity_word(self.alarm.kind.severity());
        format!("{severity}: {}: {}", self.whom(), self.alarm.text)
    }

    pub fn document(&self) -> Value {
        json!({
            "name": self.name(),
            "customer": self.customer.as_ref().map(|customer| customer.as_str()),
            "vm": self.alarm.vm.as_ref().map(|vm| vm.as_str()),
            "alarm": self.alarm.kind.word(),
            "severity": severity_word(self.alarm.kind.severity()),
            "text": self.alarm.text,
        })
    }
}

pub fn severity_word(severity: Severity) -> &'static str {
    match severity {
        Severity::Warning => "warning",
        Severity::Suspect => "suspect",
        Severity::Broken => "broken",
        Severity::Damage => "damage",
    }
}

/// How a command ends that finds it.
pub fn exit_of(severity: Severity) -> Exit {
    match severity {
        Severity::Warning => Exit::Done,
        Severity::Suspect | Severity::Broken => Exit::PromiseBroken,
        Severity::Damage => Exit::DamageFound,
    }
}

/// Why the configured policy is not in force; `None` where the next run brings it in.
pub fn why_policy_waits(policies: &Policies) -> Option<String> {
    match policies {
        Policies::Same | Policies::Applied => None,
        Policies::NotOurs => Some(
            "the configured policy is not the one in force, which only a host with the role admin \
             changes: make the configurations of both the same"
                .to_string(),
        ),
        Policies::NeedsConfirmation { nights } => {
            let lost = nights.iter().map(|(vm, nights)| format!("{vm}: {nights}"));
            Some(format!(
                "the configured policy is shorter and would expire several nights at once ({}); the \
                 old one holds until somebody confirms",
                lost.collect::<Vec<_>>().join(", ")
            ))
        }
        Policies::Overruled { by } => Some(format!(
            "host {by} has replaced the policy that is configured here, and its own holds until somebody \
             makes the configurations of both the same, or confirms this one"
        )),
        Policies::ClockRefused { reason } => Some(format!(
            "the configured policy waits, and the old one holds: {reason}"
        )),
    }
}

/// The same as an alarm, which has no hint beside it.
fn policy_waits(customer: &CustomerName, policies: &Policies) -> String {
    match (policies, why_policy_waits(policies)) {
        (Policies::NeedsConfirmation { .. } | Policies::Overruled { .. }, Some(why)) => {
            format!("{why}: {}", confirm_command(customer))
        }
        (_, Some(why)) => why,
        (_, None) => {
            "the configured policy is not in force yet: the next run applies it".to_string()
        }
    }
}

/// What somebody types who means it, of this customer and no other.
pub fn confirm_command(customer: impl Display) -> String {
    format!("vmkeep prune --confirm --customer {customer}")
}

/// The VMs of a customer and what is wrong.
pub fn look(site: &Site, open: &OpenCustomer<'_>, now: Timestamp) -> (Vec<VmStatus>, Vec<Concern>) {
    let looked = looked(site, open, now);
    let configured: Vec<_> = open.config.vms.iter().map(|vm| vm.name.clone()).collect();
    let (rows, mut found) = open.customer.with_state(|state| {
        let rows = status(state, &configured, now);
        let mut found = alarms(state, &rows, &looked, now);
        if state.terms.as_ref() != Some(&open.config.terms) {
            let foreseen = foresee_policy(state, &site.host, &open.config.terms, false);
            let policies = foreseen.map_or(Policies::Same, |(_, policies)| policies);
            let text = policy_waits(&open.config.name, &policies);
            found.push(Alarm::of_customer(AlarmKind::PolicyWaits, text));
        }
        (rows, found)
    });
    found.sort();
    let concern = |alarm| Concern {
        customer: Some(open.config.name.clone()),
        alarm,
    };
    (rows, found.into_iter().map(concern).collect())
}

fn looked(site: &Site, open: &OpenCustomer<'_>, now: Timestamp) -> Looked {
    let clock_refusal = open
        .customer
        .with_state(|state| why_not_delete(state, &site.host));
    // Without an index nothing is known to be healed, nor what there is to be read.
    let index = open.customer.load_index();
    let unhealed = match index.as_ref().map(|index| index.unhealed()) {
        Ok(Ok(unhealed)) => unhealed,
        _ => open.customer.with_state(|state| state.damaged.len()),
    };
    let oldest = now.saturating_sub(READ_AT_LEAST).unwrap_or(Timestamp::MIN);
    let unread_packs = index.map_or(0, |index| {
        open.customer.with_state(|state| {
            let packs = index.packs().iter().filter(|info| !info.condemned);
            packs
                .filter_map(|info| state.verified_at(&info.row.name))
                .filter(|read_at| *read_at < oldest)
                .count()
        })
    });
    Looked {
        unhealed,
        unread_packs,
        clock_refusal: clock_refusal.map(|refusal| refusal.to_string()),
    }
}

/// What these customers' points of the last week take in the store.
pub fn stored_in_a_week(open: &OpenCustomer<'_>, now: Timestamp) -> u64 {
    let since = now.saturating_sub(WEEK).unwrap_or(Timestamp::MIN);
    open.customer.with_state(|state| {
        let points = state
            .points
            .values()
            .filter(|point| point.taken_at >= since);
        points.map(|point| point.stored_bytes).sum()
    })
}

/// Whether the store has less room than another week takes.
pub fn almost_full(site: &Site, free_bytes: Option<u64>, stored_in_a_week: u64) -> Option<Concern> {
    // The reserve, given back on a full store so that it can be pruned, is no room for another night.
    let free = free_bytes?.saturating_sub(site.config.repository.reserve_bytes);
    (free < stored_in_a_week).then(|| Concern {
        customer: None,
        alarm: Alarm::of_customer(
            AlarmKind::AlmostFull,
            format!(
                "{} free in {}, and the last week took {}: make room, or the next nights fail",
                figures::bytes(free),
                site.store.storage.location(),
                figures::bytes(stored_in_a_week)
            ),
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::VmName;

    #[test]
    fn an_alarm_has_a_name_that_stays_and_says_whom_it_is_about() {
        let vm = VmName::new("web01").expect("a name");
        let alarm = Alarm::of_vm(AlarmKind::Hole, &vm, "web01: no point".to_string());
        let customer = CustomerName::new("acme").ok();
        let of_vm = Concern { customer, alarm };
        assert_eq!(of_vm.name(), "hole acme/web01");
        assert_eq!(of_vm.line(), "broken: acme: web01: no point");
        let of_store = Concern {
            customer: None,
            alarm: Alarm::of_customer(AlarmKind::AlmostFull, "10 GiB free"),
        };
        assert_eq!(of_store.name(), "almost-full");
        assert_eq!(of_store.line(), "warning: store: 10 GiB free");
    }

    #[test]
    fn a_policy_that_waits_for_somebody_says_so_and_names_the_command() {
        let web01 = VmName::new("web01").expect("a name");
        let acme = CustomerName::new("acme").expect("a name");
        let shorter = Policies::NeedsConfirmation {
            nights: [(web01, 8)].into(),
        };
        let text = policy_waits(&acme, &shorter);
        assert!(text.contains("(web01: 8)"), "{text}");
        let command = ": vmkeep prune --confirm --customer acme";
        assert!(text.ends_with(command), "{text}");
        assert!(!text.contains("the next run applies it"), "{text}");
        let by = "host2".to_string();
        let text = policy_waits(&acme, &Policies::Overruled { by });
        assert!(text.starts_with("host host2 "), "{text}");
        assert!(text.ends_with(command), "{text}");
        let text = policy_waits(&acme, &Policies::Applied);
        assert!(text.ends_with("the next run applies it"), "{text}");
    }

    #[test]
    fn what_breaks_a_promise_ends_with_its_code() {
        let codes = |kind: AlarmKind| exit_of(kind.severity());
        assert_eq!(codes(AlarmKind::LastPoint), Exit::Done);
        assert_eq!(codes(AlarmKind::Distrusted), Exit::PromiseBroken);
        assert_eq!(codes(AlarmKind::Unreachable), Exit::PromiseBroken);
        assert_eq!(codes(AlarmKind::Damage), Exit::DamageFound);
        let mut words: Vec<&str> = AlarmKind::ALL.iter().map(|kind| kind.word()).collect();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), AlarmKind::ALL.len());
    }
}
