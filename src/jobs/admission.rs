//! Bringing a customer into a repository, or its key to new recipients.

use super::{JobError, JobErrorKind, LocalHost};
use crate::codec::age::AgeRecipient;
use crate::format::entry::{Body, HostBody};
use crate::format::repository_file::RepositoryFile;
use crate::model::{CustomerName, Writers};
use crate::policy::PolicyTerms;
use crate::repository::{Customer, Host, NewCustomer, RepositoryErrorKind, WriteSettings};
use crate::storage::{Probe, Storage, probe, probe_without_deleting};
use std::sync::Arc;

/// The race of a store's capability probe (several servers let several racers win).
const PROBE_ROUNDS: u32 = 20;
const PROBE_WRITERS: u32 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    Created,
    /// It was there, and its key is now wrapped for the recipients asked for.
    Rewrapped,
    Unchanged,
}

/// Makes the customer unless it exists; brings its key to all of `escrow` and this host.
///
/// Where several hosts may write, the store is first seen to let exactly one of many racing writers win, in
/// this customer's own prefix: the order of ledger entries rests on it. A host that deletes nothing makes no
/// customer, and asks only what it asks every time: whoever made the customer has seen the race.
pub fn admit(
    storage: &Arc<dyn Storage>,
    file: &RepositoryFile,
    name: &CustomerName,
    host: &Arc<LocalHost>,
    escrow: &[AgeRecipient],
    terms: &PolicyTerms,
) -> Result<Admission, JobError> {
    let names = crate::format::names::CustomerNames::new(name);
    let probed = match (file.writers(), host.may_delete()) {
        (Writers::One, _) => Probe::Sound,
        (Writers::Many, true) => probe(&**storage, names.prefix(), PROBE_ROUNDS, PROBE_WRITERS)?,
        (Writers::Many, false) => probe_without_deleting(&**storage, names.prefix())?.0,
    };
    if let Probe::Unsound { what } = probed {
        return Err(JobError::new(
            JobErrorKind::Refused,
            format!(
                "{}: this store cannot order the entries of several writers: {what}",
                storage.location()
            ),
        ));
    }
    let own = host.identity().recipient();
    let others = escrow.iter().filter(|one| **one != own).cloned();
    let recipients: Vec<AgeRecipient> = std::iter::once(own).chain(others).collect();
    let open = || {
        Customer::open(
            storage.clone(),
            name,
            file.repository,
            host.identity(),
            host.clone(),
            WriteSettings::default(),
        )
    };
    match open() {
        Ok(customer) => {
            let wanted: Vec<String> = recipients.iter().map(ToString::to_string).collect();
            let (newest, complete) =
                customer.with_state(|state| (state.keys.last().cloned(), state.terms.is_some()));
            // A key file that has rotted is nobody's: it is made anew.
            let known = match newest.map(|row| (customer.sealed_key(&row), row)) {
                Some((Ok(_), row)) => row.recipients,
                Some((Err(error), _)) if !error.is_damage() => return Err(error.into()),
                Some((Err(_), _)) | None => Vec::new(),
            };
            if complete {
                update_host(&customer, host)?;
                if wanted.iter().all(|one| known.contains(one)) {
                    return Ok(Admission::Unchanged);
                }
                customer.wrap_key_for(host.identity(), &recipients)?;
                return Ok(Admission::Rewrapped);
            }
        }
        Err(error) if error.kind == RepositoryErrorKind::NotFound => {}
        // A key that is not named yet: its maker died in between.
        Err(error) if error.kind == RepositoryErrorKind::WrongKey => {
            let state = crate::repository::Ledger::load(storage.clone(), names, &**host)?;
            if !state.is_some_and(|ledger| ledger.state().keys.is_empty()) {
                return Err(error.into());
            }
        }
        Err(error) => return Err(error.into()),
    }
    if !host.may_delete() {
        return Err(JobError::new(
            JobErrorKind::Refused,
            format!("customer {name} is not in the repository yet, and an agent makes none"),
        ));
    }
    let new = NewCustomer {
        repository: file.repository,
        name,
        host: host.body(),
        recipients,
        terms,
        writers: file.writers(),
    };
    Customer::create(storage, &new, &**host)?;
    Ok(Admission::Created)
}

/// Lets another host in: what it may do, then the key. Can be repeated; a crash in between leaves a host
/// that is admitted and cannot open anything yet.
pub fn admit_host(
    customer: &Customer,
    host: &LocalHost,
    newcomer: &HostBody,
) -> Result<Admission, JobError> {
    let recipient = parsed(&newcomer.recipient)?;
    let (known, mut recipients) = customer.with_state(|state| {
        let newest = state.keys.last().map(|row| row.recipients.clone());
        (
            state.hosts.get(&newcomer.host).cloned(),
            newest.unwrap_or_default(),
        )
    });
    let is_known = known.as_ref() == Some(newcomer);
    let has_key = recipients.contains(&recipient.to_string());
    if !is_known {
        customer.append(|_| Ok(Body::Host(newcomer.clone())))?;
    }
    if !has_key {
        recipients.push(recipient.to_string());
        // One that cannot be read must not be left out in silence: it may be the escrow.
        let recipients = recipients
            .iter()
            .map(|text| parsed(text))
            .collect::<Result<Vec<AgeRecipient>, JobError>>()?;
        customer.wrap_key_for(host.identity(), &recipients)?;
    }
    Ok(match (is_known, has_key) {
        (true, true) => Admission::Unchanged,
        (_, true) => Admission::Created,
        (_, false) => Admission::Rewrapped,
    })
}

fn parsed(recipient: &str) -> Result<AgeRecipient, JobError> {
    recipient.parse().map_err(|error| {
        let message = format!("{recipient:?} is not an age recipient: {error}");
        JobError::new(JobErrorKind::Refused, message)
    })
}

/// The ledger's row of this host follows what its configuration declares.
pub(super) fn update_host(customer: &Customer, host: &LocalHost) -> Result<(), JobError> {
    let body = host.body();
    let known = customer.with_state(|state| state.hosts.get(&body.host).cloned());
    if let Some(known) = known
        // Its entry is what a seal needs, which says that this installation goes on.
        && (known.name != body.name || known.clock != body.clock || host.takes_over())
    {
        customer.append(|_| {
            Ok(Body::Host(HostBody {
                // What it may do is an administrator's decision, not its own.
                roles: known.roles.clone(),
                ..body.clone()
            }))
        })?;
    }
    Ok(())
}
