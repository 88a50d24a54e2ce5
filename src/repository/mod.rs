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
mod writer;

pub use audit::{Difference, DiskAudit, TOLD_EXTENTS};
pub use copies::Copies;
pub use customer::{Begun, Customer, LONGEST_SESSION_DAYS, NewCustomer, WriteSettings, terms_map};
pub use error::{RepositoryError, RepositoryErrorKind};
pub use host::{Head, Host, HostMemory, Stamp, Turn};
pub use index::{Index, PackInfo};
pub use ledger::{Condemned, Hidden, Ledger, OpenSession, Point, State, Verified};
pub use mark::{Mark, Unreachable};
pub use opening::{Opened, open_live};
pub use point::{Committed, DiskResult, PointDraft, PointReader, RestoredDisk, trust_of};
pub use reader::{ReadScratch, Reader};
pub use scrub::{Scrubbed, scrub_packs};
pub use sealed::SealedCustomer;
pub use sweep::{Explained, Locked, RecordFate, Swept, explain, sweep};
pub use tree::{DiskDraft, DiskView, EndedSpan, Row, SpanDraft, span_extent};
pub use writer::{FRESH_DAYS, Session, Trust, Uploaded, Worker};

use crate::codec::random_bytes;
use crate::format::names::repository_file;
use crate::format::repository_file::{FORMAT_VERSION, MAX_REPOSITORY_FILE_BYTES, RepositoryFile};
use crate::model::{RepositoryId, Writers};
use crate::storage::{Storage, StorageErrorKind};
use jiff::Timestamp;

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
