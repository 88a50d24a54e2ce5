//! Everything that `status` shows, `run` tells and the metrics say.

use super::alarms::{Concern, almost_full, look, stored_in_a_week};
use super::exit::Failure;
use super::outside::Outside;
use super::site::{OpenCustomer, Site};
use crate::jobs::{Alarm, AlarmKind, LastRun, Severity, UnderWay, VmStatus};
use crate::model::{CustomerName, PointState};
use crate::policy::{Night, NightState, Policy};
use crate::repository::State;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use std::collections::BTreeSet;

/// One VM of a customer.
pub struct VmRow {
    pub customer: CustomerName,
    pub status: VmStatus,
    pub zone: TimeZone,
    /// The worst that is wrong with it.
    pub severity: Option<Severity>,
}

impl VmRow {
    /// The nights that are owed: of a VM that is gone, none after its last restore point.
    pub fn nights(&self) -> Option<&[Night]> {
        let nights = &self.status.coverage.as_ref()?.nights;
        let has_point =
            |night: &Night| matches!(night.state, NightState::Covered | NightState::Suspect);
        let owed = match self.status.configured {
            true => nights.len(),
            false => nights
                .iter()
                .rposition(has_point)
                .map_or(0, |last| last + 1),
        };
        nights.get(..owed)
    }
}

#[derive(Default)]
pub struct Overview {
    pub rows: Vec<VmRow>,
    pub concerns: Vec<Concern>,
    /// Customers that could not be opened, and why.
    pub unreachable: Vec<(CustomerName, Failure)>,
    outside: Outside,
    stored_in_a_week: u64,
    free_bytes: Option<u64>,
}

impl Overview {
    /// Of all customers of the configuration, with what the last run met.
    pub fn of(site: &Site, now: Timestamp) -> Self {
        let mut overview = Overview::default();
        let last_run = site.host.folder().last_run();
        for config in &site.config.customers {
            match site.customer(config) {
                Ok(open) => {
                    let met = met_by_run(&open, last_run.as_ref());
                    overview.add(site, &open, met, now);
                }
                Err(failure) => overview.add_unreachable(&config.name, failure),
            }
        }
        let of_itself = last_run.map_or_else(Vec::new, |run| run.standing(None, |_, _| false));
        let of_itself = of_itself.into_iter().map(|(at, alarm)| Concern {
            customer: None,
            alarm: dated(at, alarm),
        });
        overview.concerns.extend(of_itself);
        overview.concerns.extend(late(site, now));
        overview.end(site);
        overview
    }

    /// With what only a run knows of the customer.
    pub fn add(&mut self, site: &Site, open: &OpenCustomer<'_>, more: Vec<Alarm>, now: Timestamp) {
        let customer = &open.config.name;
        let (vms, mut found) = look(site, open, now);
        found.extend(more.into_iter().map(|alarm| Concern {
            customer: Some(customer.clone()),
            alarm,
        }));
        let zone = open.zone();
        self.stored_in_a_week += stored_in_a_week(open, now);
        self.rows.extend(vms.into_iter().map(|status| {
            VmRow {
                severity: found
                    .iter()
                    .filter(|concern| concern.alarm.vm.as_ref() == Some(&status.vm))
                    .map(|concern| concern.alarm.kind.severity())
                    .max(),
                customer: customer.clone(),
                status,
                zone: zone.clone(),
            }
        }));
        self.concerns.extend(found);
    }

    pub fn add_unreachable(&mut self, customer: &CustomerName, failure: Failure) {
        self.concerns.push(Concern {
            customer: Some(customer.clone()),
            alarm: Alarm::of_customer(AlarmKind::Unreachable, &*failure.message),
        });
        self.unreachable.push((customer.clone(), failure));
    }

    /// After the last customer: the store itself, and red first; among equals as in the configuration.
    pub fn end(&mut self, site: &Site) {
        self.outside = Outside::of(site, site.host.now());
        let outside = self.outside.concerns.iter().cloned();
        self.concerns.extend(outside);
        self.free_bytes = site.store.storage.free_bytes();
        self.concerns
            .extend(almost_full(site, self.free_bytes, self.stored_in_a_week));
        self.rows.sort_by_key(|row| std::cmp::Reverse(row.severity));
        self.concerns
            .sort_by_key(|concern| std::cmp::Reverse(concern.alarm.kind.severity()));
    }

    pub fn free_bytes(&self) -> Option<u64> {
        self.free_bytes
    }

    /// Beside the customers of the configuration.
    pub fn outside(&self) -> &Outside {
        &self.outside
    }

    /// Of customers about which nothing can be said.
    pub fn unseen(&self) -> BTreeSet<String> {
        let names = self.unreachable.iter();
        names.map(|(customer, _)| customer.to_string()).collect()
    }
}

/// A run of this host that goes on for longer than a night takes: until it ends, nothing else is backed up.
pub fn late_run(site: &Site, now: Timestamp) -> Option<UnderWay> {
    let policy = Policy::parse(&site.config.terms).ok();
    let run = site.host.folder().under_way()?;
    run.is_late(policy.as_ref(), now).then_some(run)
}

fn late(site: &Site, now: Timestamp) -> Option<Concern> {
    let run = late_run(site, now)?;
    let text = format!(
        "the run that began at {} has not ended, and until it does no other one backs up: it is at {}",
        run.began_at, run.at
    );
    Some(Concern {
        customer: None,
        alarm: Alarm::of_customer(AlarmKind::RunFailed, text),
    })
}

/// What the last run met of a customer and nothing tells since, unless it is over.
fn met_by_run(open: &OpenCustomer<'_>, last_run: Option<&LastRun>) -> Vec<Alarm> {
    let Some(run) = last_run else {
        return Vec::new();
    };
    let met = run.standing(Some(&open.config.name), |alarm, at| {
        is_over(open, alarm, at)
    });
    met.into_iter()
        .map(|(at, alarm)| dated(at, alarm))
        .collect()
}

fn dated(at: Timestamp, alarm: Alarm) -> Alarm {
    Alarm {
        text: format!("{} (run of {at})", alarm.text),
        ..alarm
    }
}

/// Whether what a run met is visibly made up for since that run began.
fn is_over(open: &OpenCustomer<'_>, alarm: &Alarm, began_at: Timestamp) -> bool {
    let (AlarmKind::BackupFailed, Some(vm)) = (alarm.kind, &alarm.vm) else {
        // What was damaged, or could not be pruned, the next run looks at again.
        return false;
    };
    let is_gone = open.config.vms.iter().all(|one| one.name != *vm);
    let has_point = |state: &State| {
        let mut points = state.points.values().filter(|point| point.vm == *vm);
        points.any(|point| {
            point.state == PointState::Live && !point.void && point.taken_at >= began_at
        })
    };
    is_gone || open.customer.with_state(has_point)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::VmName;
    use crate::policy::Coverage;
    use jiff::civil::date;

    #[test]
    fn a_vm_that_is_gone_owes_no_night_after_its_last_point() {
        let states = [
            NightState::Missing,
            NightState::Covered,
            NightState::Missing,
            NightState::Suspect,
            NightState::Missing,
            NightState::NotYet,
        ];
        let row = |configured| VmRow {
            customer: CustomerName::new("globex").expect("a name"),
            status: VmStatus {
                vm: VmName::new("web01").expect("a name"),
                points: 2,
                last: None,
                coverage: Some(Coverage {
                    nights: states
                        .iter()
                        .map(|state| Night {
                            date: date(2026, 11, 8),
                            state: *state,
                        })
                        .collect(),
                    covered: 1,
                    missing: 3,
                    suspect: 1,
                }),
                next_expiry: None,
                stored_bytes: 0,
                distrusted: Vec::new(),
                configured,
            },
            zone: TimeZone::UTC,
            severity: None,
        };
        assert_eq!(row(true).nights().map(<[Night]>::len), Some(6));
        assert_eq!(row(false).nights().map(<[Night]>::len), Some(4));
    }
}
