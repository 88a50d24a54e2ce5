//! What a policy that is configured and not yet in force would do to what there is.

use super::warning::Warning;
use crate::cli::alarms::{confirm_command, why_policy_waits};
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::cli::site::Site;
use crate::config::Config;
use crate::jobs::{Policies, foresee_policy, policy_change};
use crate::model::VmName;
use crate::policy::needs_confirmation;
use jiff::Timestamp;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// One customer whose policy will change.
pub struct Effect {
    customer: String,
    /// By VM, when the points were taken that the next prune would expire and now keeps.
    lost: BTreeMap<VmName, Vec<String>>,
    /// Points that would be gone earlier than they are now.
    earlier: usize,
    waits: bool,
    /// The host that has replaced this policy.
    overruled_by: Option<String>,
    /// Only another host may bring it in.
    is_anothers: bool,
}

#[derive(Default)]
pub struct Effects {
    pub known: Vec<Effect>,
    /// Why some, or all, could not be looked at.
    pub unknown: Vec<String>,
    /// What is configured and does nothing.
    pub warnings: Vec<Warning>,
}

/// Of a host that has a repository; else nothing is there to be changed.
pub fn effects_of(invocation: &Invocation, config: &Config) -> Effects {
    let mut effects = Effects::default();
    // Looking must not make the state folder of a host that has none.
    let repository = config.host.state_dir.join("repository");
    match repository.try_exists() {
        Ok(true) => {}
        Ok(false) => return effects,
        Err(error) => {
            let unknown = format!("{}: {error}", repository.display());
            effects.unknown.push(unknown);
            return effects;
        }
    }
    let site = match Site::open(invocation) {
        Ok(site) => site,
        Err(failure) => {
            effects.unknown.push(failure.message);
            return effects;
        }
    };
    let (configured, made) = (config.repository.chunk_bytes, site.file.chunk_bytes);
    if configured != made {
        let message = format!(
            "chunk_size of [repository] is {}, but the repository was made with {}, which stays: \
             only vmkeep init decides it",
            figures::bytes(configured.into()),
            figures::bytes(made.into())
        );
        effects.warnings.push(Warning {
            kind: "chunk-size",
            customer: None,
            message,
        });
    }
    let now = site.host.now();
    for config in &site.config.customers {
        let open = match site.customer(config) {
            Ok(open) => open,
            Err(failure) => {
                effects.unknown.push(failure.message);
                continue;
            }
        };
        let zone = open.zone();
        let change = open
            .customer
            .with_state(|state| policy_change(state, &config.terms, now));
        let Some(change) = change else { continue };
        let foreseen = open
            .customer
            .with_state(|state| foresee_policy(state, &site.host, &config.terms, false));
        let (overruled_by, is_anothers) = match foreseen {
            Ok((_, Policies::Overruled { by })) => (Some(by), false),
            Ok((_, Policies::NotOurs)) => (None, true),
            _ => (None, false),
        };
        let mut lost: BTreeMap<VmName, Vec<Timestamp>> = BTreeMap::new();
        for (vm, taken_at) in change.lost {
            lost.entry(vm).or_default().push(taken_at);
        }
        let day = |at: &Timestamp| figures::day(*at, &zone);
        effects.known.push(Effect {
            customer: config.name.to_string(),
            lost: lost
                .into_iter()
                .map(|(vm, times)| (vm, times.iter().map(day).collect()))
                .collect(),
            earlier: change.earlier,
            waits: !is_anothers && needs_confirmation(&change.nights),
            overruled_by,
            is_anothers,
        });
    }
    effects
}

impl Effect {
    pub fn sentences(&self) -> Vec<String> {
        let customer = &self.customer;
        let mut sentences = Vec::new();
        match self.lost.is_empty() {
            true => {
                let when = match self.is_anothers || self.overruled_by.is_some() {
                    false => "the next run applies it, and",
                    true => "with it",
                };
                sentences.push(format!(
                    "{customer}: another policy than the one in force; {when} no restore point expires \
                     at once"
                ));
            }
            false => {
                let lost: Vec<String> = self
                    .lost
                    .iter()
                    .map(|(vm, days)| format!("{vm} of {}", days.join(", ")))
                    .collect();
                sentences.push(format!(
                    "{customer}: another policy than the one in force; with it the next prune would \
                     expire what it keeps now: {}",
                    lost.join("; ")
                ));
            }
        }
        if self.earlier > 0 {
            sentences.push(format!(
                "{customer}: {} would be gone earlier than told when they were made",
                figures::count(self.earlier, "restore point", "restore points")
            ));
        }
        if self.is_anothers
            && let Some(why) = why_policy_waits(&Policies::NotOurs)
        {
            sentences.push(format!("{customer}: {why}"));
        }
        let why_it_waits = match &self.overruled_by {
            Some(by) => Some(format!(
                "host {by} has replaced it since this host wrote it"
            )),
            None if self.waits => Some("that is more than one night of a VM at once".to_string()),
            None => None,
        };
        if let Some(why) = why_it_waits {
            sentences.push(format!(
                "{customer}: {why}, so the one in force holds until somebody confirms this one: {}",
                confirm_command(customer)
            ));
        }
        sentences
    }

    pub fn document(&self) -> Value {
        let lost = self
            .lost
            .iter()
            .map(|(vm, days)| (vm.to_string(), json!(days)));
        json!({
            "customer": self.customer,
            "expires_at_once": lost.collect::<serde_json::Map<_, _>>(),
            "expire_earlier": self.earlier,
            "needs_confirmation": self.waits || self.overruled_by.is_some(),
            "overruled_by": self.overruled_by,
            "only_by_admin": self.is_anothers,
        })
    }
}
