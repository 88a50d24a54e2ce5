//! What stands in the store beside a customer, as far as names and first entries tell it: no key is needed.

use super::customer::Customer;
use super::ledger::Ledger;
use super::{RepositoryError, RepositoryErrorKind};
use crate::format::entry::{MAX_ENTRY_BYTES, entry_hash};
use crate::format::names::{CustomerNames, ObjectRole, customers_prefix, repository_file};
use crate::model::{CustomerName, CustomerUid, HostId, ObjectName, RepositoryId, Writers};
use crate::storage::{MAX_PROBE_BYTES, Part, Storage, StorageErrorKind, Survey};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What stands right below the folder of all customers, under one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Neighbour {
    /// A customer of this repository: its first entry is sound and says so.
    Customer { uid: CustomerUid, made_by: HostId },
    /// Nothing but probes of the store: a customer is being made, or its making was cut short.
    Unmade,
    /// No customer of this repository; where it is, and what it looks like.
    Stranger(String),
    /// Why nobody can tell whether it is a customer or a copy of one: damage and denial prove neither.
    Unknown(RepositoryError),
}

/// What a file system makes by itself at its root, of a name that no object can have.
const OF_FILE_SYSTEMS: &str = "lost+found";

/// Looks at what has this name. `part` is of a listing of [`customers_prefix`].
pub fn meet(
    storage: &Arc<dyn Storage>,
    repository: RepositoryId,
    writers: Writers,
    part: &Part,
) -> Result<Neighbour, RepositoryError> {
    let place = format!("{}/{}", customers_prefix(), part.name);
    let stranger = |what: &str| Ok(Neighbour::Stranger(format!("{place} ({what})")));
    let Ok(name) = CustomerName::new(&part.name) else {
        return stranger("no customer can have this name");
    };
    if !part.is_prefix {
        return stranger("no customer, but a file in the place of one");
    }
    let names = CustomerNames::new(&name).written_by(writers);
    let first_entry = || Ledger::state_at(storage.clone(), names.clone(), 1);
    let mut read = first_entry();
    if matches!(&read, Ok(state) if state.seq == 0) {
        // Listed before it is read again: what is more than a probe was there before any ledger.
        let survey = match storage.survey(names.prefix()) {
            Ok(survey) => survey,
            Err(error) => return unknown(error.into()),
        };
        read = first_entry();
        if matches!(&read, Ok(state) if state.seq == 0) {
            let ledger = format!("{}/", names.ledger_prefix());
            let mut objects = survey.objects.iter();
            return match holds_only_probes(&names, &survey) {
                true => Ok(Neighbour::Unmade),
                false if objects.any(|one| one.name.as_str().starts_with(&ledger)) => {
                    let what = "its first ledger entry is missing";
                    unknown(RepositoryError::damaged(&place, what))
                }
                false => stranger("objects without a ledger"),
            };
        }
    }
    let state = match read {
        Ok(state) => state,
        Err(error) => return unknown(error),
    };
    let made_by = state.hosts.keys().next().copied();
    match (state.uid, made_by) {
        (Some(_), _) if state.repository != Some(repository) => stranger("of another repository"),
        (Some(_), _) if state.customer_name != name.as_str() => {
            stranger(&format!("a copy of customer {:?}", state.customer_name))
        }
        (Some(uid), Some(made_by)) => Ok(Neighbour::Customer { uid, made_by }),
        _ => {
            let what = "its first ledger entry counts for nothing";
            let error = match &state.unknown {
                Some((_, why)) => {
                    let what = format!("{what} here, as a later version wrote it ({why})");
                    RepositoryError::new(RepositoryErrorKind::Newer, &place, what)
                }
                None => RepositoryError::damaged(&place, what),
            };
            unknown(error)
        }
    }
}

/// What may pass by itself is for the caller to try again.
fn unknown(error: RepositoryError) -> Result<Neighbour, RepositoryError> {
    match error.kind {
        RepositoryErrorKind::Storage(StorageErrorKind::Transient) => Err(error),
        _ => Ok(Neighbour::Unknown(error)),
    }
}

/// They are made before the first entry, and all else after it.
fn holds_only_probes(names: &CustomerNames, survey: &Survey) -> bool {
    let own = format!("{}/", names.prefix());
    let is_probe = |role: ObjectRole| matches!(role, ObjectRole::Probe | ObjectRole::SpentProbe);
    let mut objects = survey.objects.iter();
    let mut leftovers = survey.leftovers.iter();
    objects.all(|one| is_probe(names.role(&one.name)) && one.size_bytes <= MAX_PROBE_BYTES)
        && !leftovers.any(|one| one.place.starts_with(&own))
}

/// What is in the store and is neither of a customer of this repository nor the repository's own, strangers and
/// what may be one: nobody has judged it object by object, so that it may hold anything of the customer.
///
/// `met`: the other customers that were met before. A first entry stays what it is, and to read one for
/// each pair of customers would take longer than the prune.
pub fn strangers(
    customer: &Customer,
    met: &mut BTreeMap<String, CustomerUid>,
) -> Result<Vec<Neighbour>, RepositoryError> {
    let storage = customer.storage();
    let mut strangers = Vec::new();
    let file = repository_file();
    for part in storage.parts("")? {
        let own = match part.is_prefix {
            true => customers_prefix(),
            false => file.as_str(),
        };
        if part.name != own {
            strangers.extend(copy_in(customer, &part)?.map(Neighbour::Stranger));
        }
    }
    let mut is_shown = false;
    for part in storage.parts(customers_prefix())? {
        if part.is_prefix && part.name == customer.name().as_str() {
            is_shown = true;
            continue;
        }
        let known = met.get(&part.name).filter(|_| part.is_prefix).copied();
        let uid = match known {
            Some(uid) => uid,
            None => match meet_beside(customer, &part)? {
                Neighbour::Customer { uid, .. } => {
                    met.insert(part.name.clone(), uid);
                    uid
                }
                Neighbour::Unmade => continue,
                told => {
                    strangers.push(told);
                    continue;
                }
            },
        };
        if uid == customer.uid() {
            strangers.push(Neighbour::Stranger(format!(
                "{}/{} (says that it is customer {})",
                customers_prefix(),
                part.name,
                customer.name()
            )));
        }
    }
    if !is_shown {
        // A listing that leaves this out may leave out others.
        let what = format!("listed without customer {}, who is there", customer.name());
        let error = RepositoryError::damaged(customers_prefix(), what);
        strangers.push(Neighbour::Unknown(error));
    }
    Ok(strangers)
}

/// What lies beside the repository may be anybody's, as a bucket can hold more than this, and another repository
/// there may have a customer of the same name. A copy of the customer, of all, or of the repository has the very
/// first entry of this one at its place; where no object can have the name, nobody can look. What this host may
/// not read is as little its own.
pub(super) fn copy_in(customer: &Customer, part: &Part) -> Result<Option<String>, RepositoryError> {
    if !part.is_prefix || part.name == OF_FILE_SYSTEMS {
        return Ok(None);
    }
    let Ok(folder) = ObjectName::new(&part.name) else {
        let what = format!("{} (nothing can be read under this name)", part.name);
        return Ok(Some(what));
    };
    let name = customer.name();
    let Some((first, hash)) = customer.first_entry() else {
        return Ok(None);
    };
    let Some(below) = first.as_str().strip_prefix(customer.names().prefix()) else {
        return Ok(None);
    };
    let places = [
        folder.to_string(),
        format!("{folder}/{name}"),
        format!("{folder}/{}/{name}", customers_prefix()),
    ];
    for place in places {
        let Ok(there) = ObjectName::new(&format!("{place}{below}")) else {
            continue;
        };
        match customer.storage().read(&there, MAX_ENTRY_BYTES) {
            Ok(bytes) if entry_hash(&bytes) == hash => {
                return Ok(Some(format!("{place} (a copy of customer {name})")));
            }
            Ok(_) => {}
            Err(error)
                if matches!(
                    error.kind,
                    StorageErrorKind::NotFound | StorageErrorKind::Denied
                ) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

fn meet_beside(customer: &Customer, part: &Part) -> Result<Neighbour, RepositoryError> {
    let repository = customer.with_state(|state| state.repository);
    let repository = repository.ok_or_else(|| {
        RepositoryError::damaged(customer.names().prefix(), "its ledger names no repository")
    })?;
    let writers = customer.names().writers();
    meet(customer.storage(), repository, writers, part)
}
