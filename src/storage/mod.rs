//! Floor 2: named objects. Knows bytes and names; never a chunk, a key or a policy.
//!
//! Objects are immutable and created only if absent. What is absent here: retries that hide an
//! outcome, caching, any idea of what an object means.

use crate::model::ObjectName;
use std::fmt;

/// What went wrong, as far as the caller must decide by it; always with the object's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageError {
    pub kind: StorageErrorKind,
    /// The object, prefix or root concerned.
    pub name: String,
    /// What the system said.
    pub detail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StorageErrorKind {
    /// No such object. Not a proof that a creation under way will not land.
    NotFound,
    /// The name is taken; nothing was written.
    AlreadyExists,
    /// The object is shorter than asked for, or not of the form the store writes.
    Corrupt,
    /// The outcome is unknown or the fault may pass; a creation may still land.
    Transient,
    /// Permission, read-only file system.
    Denied,
    /// No space, quota.
    Full,
    /// The store cannot do what is needed (no create-if-absent, no such folder).
    Unsupported,
}

impl StorageError {
    pub fn new(kind: StorageErrorKind, name: impl fmt::Display, detail: impl fmt::Display) -> Self {
        StorageError {
            kind,
            name: name.to_string(),
            detail: detail.to_string(),
        }
    }
}

impl fmt::Display for StorageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            StorageErrorKind::NotFound => "not found",
            StorageErrorKind::AlreadyExists => "already exists",
            StorageErrorKind::Corrupt => "damaged",
            StorageErrorKind::Transient => "failed, perhaps for now",
            StorageErrorKind::Denied => "permission denied",
            StorageErrorKind::Full => "no space left",
            StorageErrorKind::Unsupported => "not supported by this store",
        };
        write!(f, "{}: {} ({})", self.name, what, self.detail)
    }
}

impl std::error::Error for StorageError {}

/// An object as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed {
    pub name: ObjectName,
    pub size_bytes: u64,
}

/// Named immutable objects. All calls may come from several threads and several processes.
pub trait Storage: Send + Sync {
    /// Creates `name` with exactly `data`, durably, if and only if the name is free.
    ///
    /// `Ok`: stands, and survives a power cut. `AlreadyExists`: the name was taken. `Transient`:
    /// unknown; only repeating the same call until one of the two answers tells. Any other error:
    /// nothing was created.
    fn create(&self, name: &ObjectName, data: &[u8]) -> Result<(), StorageError>;

    /// The whole object, `Corrupt` if it is larger than `max_bytes` (nothing is allocated then).
    fn read(&self, name: &ObjectName, max_bytes: u64) -> Result<Vec<u8>, StorageError>;

    /// Fills `buffer` from `offset`; `Corrupt` if the object ends before.
    fn read_range(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StorageError>;

    fn size_bytes(&self, name: &ObjectName) -> Result<u64, StorageError>;

    /// All objects whose name starts with `prefix` (a whole number of parts, `""` for all),
    /// sorted by name. Complete for objects created before the call.
    fn list(&self, prefix: &str) -> Result<Vec<Listed>, StorageError>;

    /// Removes the object durably, with all its versions. `Ok` if it is not there.
    fn delete(&self, name: &ObjectName) -> Result<(), StorageError>;

    /// As `delete`, but the bytes are first made unreadable where the medium allows it.
    fn destroy(&self, name: &ObjectName) -> Result<(), StorageError>;

    /// Removes what dead writers left under names that no listing shows (temporary files,
    /// unfinished uploads). Never touches what a living writer holds. Returns what was removed.
    fn sweep_leftovers(&self) -> Result<Vec<Listed>, StorageError>;

    /// Everything that is physically there and no listing shows, for the proof of erasure.
    fn leftovers(&self) -> Result<Vec<Listed>, StorageError>;

    /// Bytes that can still be written, if the store can tell.
    fn free_bytes(&self) -> Option<u64>;

    /// Gives back space set aside at `init`, so that a prune works on a full store. `false`: none.
    fn release_reserve(&self) -> Result<bool, StorageError>;

    /// Sets space aside again. Fails silently short only by returning `Ok(false)`.
    fn restore_reserve(&self) -> Result<bool, StorageError>;

    /// Where this is, for messages and certificates.
    fn location(&self) -> String;
}
