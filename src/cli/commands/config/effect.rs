//! What a policy that is configured and not yet in force would do to what there is.

use super::warning::Warning;
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::cli::site::Site;
use crate::config::Config;
use crate::jobs::policy_change;
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
            waits: needs_confirmation(&change.nights),
        });
    }
    effects
}

impl Effect {
    pub fn sentences(&self) -> Vec<String> {
        let customer = &self.customer;
        let mut sentences = Vec::new();
        match self.lost.is_empty() {
            true => sentences.push(format!(
                "{customer}: another policy than the one in force; the next run applies it, and no \
                 restore point expires at once"
            )),
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
        if self.waits {
            sentences.push(format!(
                "{customer}: that is more than one night of a VM at once, so the old policy holds \
                 until somebody confirms it: vmkeep prune --confirm"
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
            "needs_confirmation": self.waits,
        })
    }
}
