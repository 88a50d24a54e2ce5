//! Floor 3: the chunk store. Writer, reader, index, tree, ledger, points, reclaim.
//!
//! What is absent: disks and hypervisors, configuration, printing, the clock (times come with
//! [`Host`]), and any choice of a store.

mod audit;
mod copies;
mod customer;
mod directory;
mod error;
mod host;
#[cfg(any(test, fuzzing))]
pub mod hostile_bytes {
    //! The fuzz target of a host's checkpoint.
    pub use super::ledger::hostile_bytes::checkpoint;
}
mod index;
mod ledger;
mod lifetime;
mod mark;
mod neighbours;
mod new_segments;
mod opening;
mod point;
mod reader;
pub mod reclaim;
mod rule;
mod scrub;
mod sealed;
mod sweep;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod tree;
mod without_ledger;
mod writer;

pub use audit::{Difference, DiskAudit, TOLD_EXTENTS};
pub use copies::Copies;
pub use customer::{Begun, Customer, LONGEST_SESSION_DAYS, NewCustomer, WriteSettings, terms_map};
pub use error::{RepositoryError, RepositoryErrorKind};
pub use host::{
    Belief, BelievedSince, Head, Host, HostMemory, KeptState, LedgerClock, Stamp, Turn, Vouched,
};
pub use index::{Index, PackInfo};
pub use ledger::{Condemned, Hidden, Ledger, OpenSession, Point, State, Verified};
pub use mark::{Mark, Unreachable};
pub use neighbours::{Neighbour, meet, strangers};
pub use opening::{Opened, open_live};
pub use point::{Committed, DiskResult, PointDraft, PointReader, RestoredDisk, trust_of};
pub use reader::{ReadScratch, Reader};
pub use scrub::{Scrubbed, scrub_packs};
pub use sealed::SealedCustomer;
pub use sweep::{Explained, Locked, RecordFate, Swept, explain, sweep};
pub use tree::{DiskDraft, DiskView, EndedSpan, Row, SpanDraft, span_extent};
pub use without_ledger::WithoutLedger;
pub use writer::{FRESH_DAYS, Session, Trust, Uploaded, Worker};

use crate::codec::random_bytes;
use crate::format::names::{
    CustomerNames, ObjectRole, customer_of, customers_prefix, repository_file,
};
use crate::format::repository_file::{FORMAT_VERSION, MAX_REPOSITORY_FILE_BYTES, RepositoryFile};
use crate::model::{RepositoryId, Writers};
use crate::storage::{Storage, StorageErrorKind};
use jiff::Timestamp;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A repository that is not in any store yet.
pub fn new_repository(created_at: Timestamp, chunk_bytes: u32, writers: Writers) -> RepositoryFile {
    RepositoryFile {
        format: FORMAT_VERSION,
        repository: RepositoryId::from_bytes(random_bytes()),
        created_at,
        chunk_bytes,
        features: RepositoryFile::features_of(writers),
    }
}

/// Writes `vmkeep.json`. `AlreadyExists` if the place holds a repository. Whoever does not learn whether
/// it was written repeats it with the same file: in a store that overwrites, another one that was left
/// under way would land on it.
pub fn create_repository(
    storage: &dyn Storage,
    file: RepositoryFile,
) -> Result<RepositoryFile, RepositoryError> {
    let bytes = file.to_bytes().map_err(|error| {
        RepositoryError::new(RepositoryErrorKind::Refused, repository_file(), error)
    })?;
    let there = || {
        RepositoryError::new(
            RepositoryErrorKind::AlreadyExists,
            storage.location(),
            "there is a repository already",
        )
    };
    // Asked before: the store has not been seen yet to leave alone what is there.
    match storage.size_bytes(&repository_file()) {
        Ok(_) => return Err(there()),
        Err(error) if error.kind == StorageErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    match storage.create(&repository_file(), &bytes) {
        Ok(()) => Ok(file),
        Err(error) if error.kind == StorageErrorKind::AlreadyExists => Err(there()),
        Err(error) => Err(error.into()),
    }
}

/// `vmkeep.json` of a store that has lost it: the first entry of each customer's ledger names the repository
/// and says who writes it, and none is of another format. `None`: the store holds nothing of a customer.
///
/// The chunk size is that of `new`: it is for new disks, and the record of each disk that is there has its own.
pub fn recover_repository(
    storage: &Arc<dyn Storage>,
    new: &RepositoryFile,
) -> Result<Option<RepositoryFile>, RepositoryError> {
    let listed = storage.list(customers_prefix())?;
    if listed.is_empty() {
        return Ok(None);
    }
    let mut ledgers = BTreeMap::new();
    for object in &listed {
        if let Some(customer) = customer_of(&object.name) {
            let names = CustomerNames::new(&customer);
            match names.role(&object.name) {
                // As whoever reads it decides: by what is listed first.
                ObjectRole::Ledger(1) => ledgers.entry(customer).or_insert(names),
                ObjectRole::Rival(1, _) => {
                    let names = names.written_by(Writers::One);
                    ledgers.entry(customer).or_insert(names)
                }
                _ => continue,
            };
        }
    }
    let mut told: Option<RepositoryFile> = None;
    let mut passed_over = None;
    for names in ledgers.into_values() {
        let state = match Ledger::state_at(storage.clone(), names.clone(), 1) {
            Ok(state) => state,
            // It keeps nobody from the others.
            Err(error) if error.is_of_one_object() => {
                passed_over.get_or_insert(error);
                continue;
            }
            Err(error) => return Err(error),
        };
        if let Some((_, what)) = &state.unknown {
            let what = format!("was written by a later version of vmkeep ({what})");
            return Err(RepositoryError::new(
                RepositoryErrorKind::Newer,
                names.ledger_prefix(),
                what,
            ));
        }
        let first = state.repository.map(|repository| RepositoryFile {
            repository,
            features: RepositoryFile::features_of(state.writers),
            created_at: state.last_witnessed.unwrap_or(new.created_at),
            ..new.clone()
        });
        let Some(first) = first else {
            let what = "does not say of which repository it is";
            return Err(RepositoryError::damaged(names.ledger_prefix(), what));
        };
        told = match told {
            Some(other)
                if (other.repository, &other.features) != (first.repository, &first.features) =>
            {
                return Err(RepositoryError::damaged(
                    names.ledger_prefix(),
                    format!(
                        "is of the repository {}, and another customer here is of {}",
                        first.repository, other.repository
                    ),
                ));
            }
            Some(other) if other.created_at <= first.created_at => Some(other),
            _ => Some(first),
        };
    }
    told.map(Some).ok_or_else(|| {
        passed_over.unwrap_or_else(|| {
            RepositoryError::damaged(
                storage.location(),
                "vmkeep.json is missing, and of what is there no ledger says of which repository it is",
            )
        })
    })
}

/// Reads `vmkeep.json`.
pub fn open_repository(storage: &dyn Storage) -> Result<RepositoryFile, RepositoryError> {
    let name = repository_file();
    let bytes = match storage.read(&name, MAX_REPOSITORY_FILE_BYTES) {
        Ok(bytes) => bytes,
        Err(error) if error.kind == StorageErrorKind::NotFound => {
            return Err(RepositoryError::new(
                RepositoryErrorKind::NoRepository,
                storage.location(),
                "there is no repository here (vmkeep.json is missing)",
            ));
        }
        Err(error) => return Err(error.into()),
    };
    RepositoryFile::parse(&bytes).map_err(|error| {
        let newer = serde_json::from_slice::<serde_json::Value>(&bytes)
            .ok()
            .and_then(|value| value.get("format")?.as_u64())
            .is_some_and(|format| format > u64::from(FORMAT_VERSION));
        let kind = match newer {
            true => RepositoryErrorKind::Newer,
            false => RepositoryErrorKind::Damaged,
        };
        RepositoryError::new(kind, name, error)
    })
}
