//! Bringing a customer into a repository, or its key to new recipients.

use super::{JobError, JobErrorKind, LocalHost};
use crate::codec::age::AgeRecipient;
use crate::format::entry::{Body, HostBody, Role};
use crate::format::repository_file::RepositoryFile;
use crate::model::{CustomerName, Writers};
use crate::policy::PolicyTerms;
use crate::repository::{
    Customer, Host, NewCustomer, RepositoryError, RepositoryErrorKind, State, WriteSettings,
};
use crate::storage::{Probe, Storage, probe, probe_without_deleting};
use std::collections::BTreeSet;
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

/// What became of a customer and its key, and what only a host with the role admin could do besides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted {
    pub outcome: Admission,
    /// Somebody who is none of the customer's hosts can open its key.
    pub has_escrow: bool,
    /// How this host would be entered, where the ledger has it otherwise.
    pub unentered: Option<HostBody>,
    /// Recipients that the newest key file is not for.
    pub without_key: Vec<AgeRecipient>,
}

/// Makes the customer unless it exists; brings its key to all of `escrow`, this host and its other hosts.
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
) -> Result<Admitted, JobError> {
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
    let opened = Customer::open(
        storage.clone(),
        name,
        file.repository,
        host.identity(),
        host.clone(),
        WriteSettings::default(),
    );
    match opened {
        Ok(customer) => {
            if customer.with_state(|state| state.terms.is_some()) {
                return rewrap(&customer, host, escrow);
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
    let own = host.identity().recipient();
    let recipients: BTreeSet<AgeRecipient> = escrow.iter().copied().chain([own]).collect();
    let new = NewCustomer {
        repository: file.repository,
        name,
        host: host.body(),
        recipients: recipients.into_iter().collect(),
        terms,
        writers: file.writers(),
    };
    Customer::create(storage, &new, &**host)?;
    Ok(Admitted {
        outcome: Admission::Created,
        has_escrow: new.recipients.len() > 1,
        unentered: None,
        without_key: Vec::new(),
    })
}

/// Brings a customer that is there, and its key, up to what is configured.
fn rewrap(
    customer: &Customer,
    host: &LocalHost,
    escrow: &[AgeRecipient],
) -> Result<Admitted, JobError> {
    let unentered = update_host(customer, host)?;
    let (newest, hosts) =
        customer.with_state(|state| (state.keys.last().cloned(), recipients_of_hosts(state)));
    // A key file that has rotted is nobody's: it is made anew.
    let known = match newest.map(|row| (customer.sealed_key(&row), row)) {
        Some((Ok(_), row)) => row.recipients,
        Some((Err(error), _)) if !error.is_damage() => return Err(error.into()),
        Some((Err(_), _)) | None => Vec::new(),
    };
    // Whoever the newest file leaves out has only older ones, and wraps the key for himself again.
    let own = host.identity().recipient();
    let wanted: BTreeSet<AgeRecipient> = escrow.iter().copied().chain(hosts).chain([own]).collect();
    let missing = wanted
        .iter()
        .filter(|one| !known.contains(&one.to_string()));
    let missing: Vec<AgeRecipient> = missing.copied().collect();
    let (outcome, without_key) = match (missing.is_empty(), customer.has_role(Role::Admin)) {
        (true, _) => (Admission::Unchanged, Vec::new()),
        (false, false) => (Admission::Unchanged, missing),
        (false, true) => {
            let wanted: Vec<AgeRecipient> = wanted.into_iter().collect();
            customer.wrap_key_for(host.identity(), &wanted)?;
            (Admission::Rewrapped, Vec::new())
        }
    };
    Ok(Admitted {
        outcome,
        has_escrow: customer.with_state(has_escrow),
        unentered,
        without_key,
    })
}

/// Those of hosts that may do something. One that is no recipient was never given a key.
fn recipients_of_hosts(state: &State) -> Vec<AgeRecipient> {
    let hosts = state.hosts.values().filter(|host| !host.roles.is_empty());
    hosts
        .filter_map(|host| host.recipient.parse().ok())
        .collect()
}

fn has_escrow(state: &State) -> bool {
    let is_a_hosts = |one: &String| state.hosts.values().any(|host| host.recipient == *one);
    let mut recipients = state.keys.iter().flat_map(|row| &row.recipients);
    recipients.any(|one| !is_a_hosts(one))
}

/// Lets another host in: the key, then what it may do. Can be repeated.
///
/// The key comes first: an entry that takes the role admin from this very host would let none of its key
/// entries stand after it. A crash in between leaves somebody who can read and is no host yet. A host
/// that may do nothing is given no key.
pub fn admit_host(
    customer: &Customer,
    host: &LocalHost,
    newcomer: &HostBody,
) -> Result<Admission, JobError> {
    let recipient = parsed(&newcomer.recipient)?;
    let reason = match customer.has_role(Role::Admin) {
        true => customer.with_state(|state| why_not_admit(state, host, newcomer)),
        false => Some("this host lets nobody in: that is for one with the role admin".to_string()),
    };
    if let Some(reason) = reason {
        let message = format!("customer {}: {reason}", customer.name());
        return Err(JobError::new(JobErrorKind::Refused, message));
    }
    let (is_known, newest, without_roles, hosts) = customer.with_state(|state| {
        let idle = state.hosts.values().filter(|host| host.roles.is_empty());
        (
            state.hosts.get(&newcomer.host) == Some(newcomer),
            state.keys.last().map(|row| row.recipients.clone()),
            idle.map(|host| host.recipient.clone()).collect::<Vec<_>>(),
            recipients_of_hosts(state),
        )
    });
    let newest = newest.unwrap_or_default();
    let is_wrapped = newcomer.roles.is_empty() || newest.contains(&recipient.to_string());
    if !is_wrapped {
        // One that cannot be read must not be left out in silence: it may be the escrow.
        let mut recipients = newest
            .iter()
            .filter(|one| !without_roles.contains(one))
            .map(|one| parsed(one))
            .collect::<Result<BTreeSet<AgeRecipient>, JobError>>()?;
        recipients.extend(hosts);
        recipients.insert(recipient);
        let recipients: Vec<AgeRecipient> = recipients.into_iter().collect();
        customer.wrap_key_for(host.identity(), &recipients)?;
    }
    if !is_known {
        // Asked again on the state that the entry follows: another host may have given a role away.
        customer.append(|state| match why_not_admit(state, host, newcomer) {
            None => Ok(Body::Host(newcomer.clone())),
            Some(reason) => Err(RepositoryError::new(
                RepositoryErrorKind::Refused,
                customer.names().prefix(),
                reason,
            )),
        })?;
    }
    Ok(match (is_known, is_wrapped) {
        (true, true) => Admission::Unchanged,
        (_, true) => Admission::Created,
        (_, false) => Admission::Rewrapped,
    })
}

/// What the entry of a host would spoil for good, if anything. The ledger itself lets it stand.
fn why_not_admit(state: &State, host: &LocalHost, newcomer: &HostBody) -> Option<String> {
    let own = host.body();
    if newcomer.host == own.host
        && (&newcomer.name, &newcomer.recipient) != (&own.name, &own.recipient)
    {
        return Some(
            "--host-id is that of this very host, and the name or the recipient is another's; vmkeep \
             init on the new host prints what belongs together"
                .to_string(),
        );
    }
    if state.writers == Writers::One && newcomer.host != own.host {
        return Some("one host writes this repository, and no other can be let in".to_string());
    }
    if let Some(known) = state.hosts.get(&newcomer.host)
        && known.recipient != newcomer.recipient
        && !known.roles.is_empty()
    {
        return Some(format!(
            "host {} is {} with the recipient {}, and an identity has one recipient; vmkeep init on the \
             new host prints what belongs together. If it was entered wrongly, take its roles first: \
             --role none",
            newcomer.host, known.name, known.recipient
        ));
    }
    [Role::Admin, Role::Prune].into_iter().find_map(|role| {
        let mut holders = state.hosts.values().filter(|row| row.roles.contains(&role));
        let is_last = holders.next().is_some_and(|row| row.host == newcomer.host)
            && holders.next().is_none()
            && !newcomer.roles.contains(&role);
        is_last.then(|| {
            let (word, loss) = match role {
                Role::Prune => ("prune", "nothing would ever be deleted"),
                _ => ("admin", "no host, key or policy could ever be entered"),
            };
            format!(
                "{} is the only host with the role {word}: without it {loss}; give the role to \
                 another host first",
                newcomer.name
            )
        })
    })
}

fn parsed(recipient: &str) -> Result<AgeRecipient, JobError> {
    recipient.parse().map_err(|error| {
        let message = format!("{recipient:?} is not an age recipient: {error}");
        JobError::new(JobErrorKind::Refused, message)
    })
}

/// The ledger's row of this host follows what its configuration declares. Where only another host may
/// write it: the row that it would write.
pub(super) fn update_host(
    customer: &Customer,
    host: &LocalHost,
) -> Result<Option<HostBody>, JobError> {
    let body = host.body();
    // What it may do is an administrator's decision, not its own.
    let with_roles = |state: &State| {
        let known = state.hosts.get(&body.host);
        HostBody {
            roles: known.map_or_else(Vec::new, |known| known.roles.clone()),
            ..body.clone()
        }
    };
    let (known, wanted) =
        customer.with_state(|state| (state.hosts.get(&body.host).cloned(), with_roles(state)));
    match known {
        None => Ok(None),
        // Its entry is what a seal needs, which says that this installation goes on.
        Some(known) if known == wanted && !host.takes_over() => Ok(None),
        Some(known) if !known.roles.contains(&Role::Admin) && !host.takes_over() => {
            Ok(Some(wanted))
        }
        Some(_) => {
            customer.append(|state| Ok(Body::Host(with_roles(state))))?;
            Ok(None)
        }
    }
}
