//! Everything that `status` shows, `run` tells and the metrics say.

use super::alarms::{Concern, almost_full, look, stored_in_a_week};
use super::exit::Failure;
use super::site::{OpenCustomer, Site};
use crate::jobs::{Alarm, AlarmKind, Severity, VmStatus};
use crate::model::CustomerName;
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

#[derive(Default)]
pub struct Overview {
    pub rows: Vec<VmRow>,
    pub concerns: Vec<Concern>,
    /// Customers that could not be opened, and why.
    pub unreachable: Vec<(CustomerName, Failure)>,
    stored_in_a_week: u64,
    free_bytes: Option<u64>,
}

impl Overview {
    /// Of all customers of the configuration.
    pub fn of(site: &Site, now: Timestamp) -> Self {
        let mut overview = Overview::default();
        for config in &site.config.customers {
            match site.customer(config) {
                Ok(open) => overview.add(site, &open, Vec::new(), now),
                Err(failure) => overview.add_unreachable(&config.name, failure),
            }
        }
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

    /// Of customers about which nothing can be said.
    pub fn unseen(&self) -> BTreeSet<String> {
        let names = self.unreachable.iter();
        names.map(|(customer, _)| customer.to_string()).collect()
    }
}
