//! What the store holds beside the customers of the configuration: nothing is done for it.

use super::alarms::{Concern, exit_of};
use super::exit::{Exit, Failure};
use super::site::Site;
use crate::config::HostRole;
use crate::format::entry::Role;
use crate::format::names::customers_prefix;
use crate::jobs::{Alarm, AlarmKind, not_configured};
use crate::model::CustomerName;
use crate::repository::{HostMemory, Neighbour, RepositoryError, SealedCustomer, State, meet};
use crate::storage::{Part, Storage};
use jiff::Timestamp;
use std::sync::Arc;

#[derive(Default)]
pub struct Outside {
    pub concerns: Vec<Concern>,
    /// Whether all of it could be looked at: otherwise what was told of it before may go on.
    pub is_complete: bool,
}

impl Outside {
    /// Looked at by names and first entries, and by the ledgers of customers that this host knows.
    pub fn of(site: &Site, now: Timestamp) -> Self {
        let mut outside = Outside {
            concerns: Vec::new(),
            is_complete: true,
        };
        // Nothing of it is for an agent to delete.
        if site.config.host.role == HostRole::Agent {
            return outside;
        }
        let parts = site.store.storage.parts(customers_prefix());
        let looked = parts.map_err(RepositoryError::from).and_then(|parts| {
            for part in parts {
                let mut configured = site.config.customers.iter();
                if !(part.is_prefix && configured.any(|one| one.name.as_str() == part.name)) {
                    outside.look_at(site, &part, now)?;
                }
            }
            Ok(())
        });
        if let Err(error) = looked {
            outside.is_complete = false;
            let text = format!(
                "what is in the store and not in the configuration cannot be looked at: {error}"
            );
            outside.concerns.push(Concern {
                customer: None,
                alarm: Alarm::of_customer(AlarmKind::Unreachable, text),
            });
        }
        outside
    }

    fn look_at(&mut self, site: &Site, part: &Part, now: Timestamp) -> Result<(), RepositoryError> {
        let repository = site.file.repository;
        let met = meet(&site.store.storage, repository, site.file.writers(), part)?;
        let host = site.host.identity().host_id();
        let name = CustomerName::new(&part.name).ok();
        // What this host once opened under this name was a customer, whatever is there now.
        let was_opened = |name: &CustomerName| site.host.origin(&repository, name).is_some();
        let is_known = name.as_ref().is_some_and(was_opened);
        let doubt = match met {
            Neighbour::Unmade => return Ok(()),
            // One that another host made, and this one never opened, is in the configuration of others.
            Neighbour::Customer { made_by, .. } if made_by != host && !is_known => return Ok(()),
            Neighbour::Customer { .. } => None,
            Neighbour::Stranger(what) if is_known => Some(what),
            Neighbour::Unknown(error) if is_known => Some(error.to_string()),
            Neighbour::Stranger(what) => {
                let text = format!(
                    "{what} is in the store; nothing is certified until somebody removes it or moves it \
                     away, as no prune does"
                );
                if prunes(site) {
                    self.add(None, Alarm::of_customer(AlarmKind::Unexplained, text));
                }
                return Ok(());
            }
            Neighbour::Unknown(error) => {
                self.is_complete = false;
                if prunes(site) {
                    self.add(name.as_ref(), in_doubt(&error.to_string()));
                }
                return Ok(());
            }
        };
        let Some(name) = name else {
            return Ok(());
        };
        match open(site, &name) {
            Ok(customer) => {
                let alarms = customer.with_state(|state| not_configured(state, &host, now));
                for alarm in alarms {
                    self.add(Some(&name), alarm);
                }
                if let Some(doubt) = doubt {
                    self.add(Some(&name), in_doubt(&doubt));
                }
            }
            Err(error) => {
                self.is_complete = false;
                let alarm = match doubt {
                    Some(doubt) => in_doubt(&doubt),
                    None => {
                        let text =
                            format!("not in the configuration, and cannot be looked at: {error}");
                        Alarm::of_customer(AlarmKind::Unreachable, text)
                    }
                };
                self.add(Some(&name), alarm);
            }
        }
        Ok(())
    }

    fn add(&mut self, customer: Option<&CustomerName>, alarm: Alarm) {
        self.concerns.push(Concern {
            customer: customer.cloned(),
            alarm,
        });
    }
}

fn in_doubt(why: &str) -> Alarm {
    let text = format!(
        "not in the configuration, and nobody can tell what is there, so that nothing is certified: {why}"
    );
    Alarm::of_customer(AlarmKind::Unreachable, text)
}

fn open(site: &Site, name: &CustomerName) -> Result<SealedCustomer, RepositoryError> {
    let memory: Arc<dyn HostMemory> = site.host.clone();
    let (storage, threads) = (site.store.storage.clone(), site.config.host.threads);
    SealedCustomer::open(storage, name, site.file.repository, memory, threads)
}

/// Whether this host prunes, and certifies, any customer of its configuration: without it, what keeps a
/// certificate from being signed is for the others. One that cannot be read may be such a customer.
fn prunes(site: &Site) -> bool {
    let host = site.host.identity().host_id();
    let may_prune = |state: &State| {
        let row = state.hosts.get(&host);
        row.is_some_and(|row| row.roles.contains(&Role::Prune))
    };
    let mut customers = site.config.customers.iter();
    customers.any(|customer| match open(site, &customer.name) {
        Ok(customer) => customer.with_state(may_prune),
        Err(_) => true,
    })
}

/// What a command makes of a concern that it can do nothing about; `None`: it is not yet a failure.
pub fn failure_of(concern: &Concern) -> Option<Failure> {
    let exit = match concern.alarm.kind {
        // What cannot be looked at has broken no promise that anybody knows of.
        AlarmKind::Unexplained | AlarmKind::Unreachable => Exit::Failed,
        kind => exit_of(kind.severity()),
    };
    let whom = concern.whom();
    let failure = Failure::new(exit, format!("{whom}: {}", concern.alarm.text));
    match concern.alarm.kind {
        _ if exit == Exit::Done => None,
        AlarmKind::OverMaximum => Some(failure.hint(format!(
            "put back [[customer]] id = \"{whom}\" into the configuration, then: vmkeep prune"
        ))),
        _ => Some(failure),
    }
}
