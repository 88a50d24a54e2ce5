use crate::storage::{StorageError, StorageErrorKind};
use std::fmt;

/// What went wrong, as far as the caller must decide by it; names the object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepositoryError {
    pub kind: RepositoryErrorKind,
    pub name: String,
    pub detail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepositoryErrorKind {
    /// There is no repository at this place.
    NoRepository,
    /// No such customer or point.
    NotFound,
    /// It exists already.
    AlreadyExists,
    /// The host's identity opens none of the customer's key files.
    WrongKey,
    /// Bytes are not what they must be: a frame, record, segment, entry, or the chain of entries.
    Damaged,
    /// The ledger is sound, and is not the one that this host has seen, or no longer holds all of it.
    Replaced,
    /// Written by a later version; may be read, not written.
    Newer,
    /// The ledger says no: what this session stands on changed. Nothing of it stays; the caller
    /// may start anew.
    Superseded,
    /// An entry may or may not stand. Nothing may be cleaned up; the next run decides.
    Uncertain,
    /// The host has no role for this, or the entry would break a rule.
    Refused,
    /// The store failed.
    Storage(StorageErrorKind),
    /// Asked to stop.
    Interrupted,
}

impl RepositoryError {
    pub fn new(
        kind: RepositoryErrorKind,
        name: impl fmt::Display,
        detail: impl fmt::Display,
    ) -> Self {
        RepositoryError {
            kind,
            name: name.to_string(),
            detail: detail.to_string(),
        }
    }

    pub fn damaged(name: impl fmt::Display, detail: impl fmt::Display) -> Self {
        Self::new(RepositoryErrorKind::Damaged, name, detail)
    }

    pub fn is_damage(&self) -> bool {
        self.kind.is_damage()
    }

    pub fn is_unread(&self) -> bool {
        self.kind.is_unread()
    }

    /// Whether it says nothing of other objects: who looks through many goes on.
    pub fn is_of_one_object(&self) -> bool {
        self.kind.is_of_one_object()
    }
}

impl RepositoryErrorKind {
    /// Whether it is about bytes that are wrong or missing, not about a store out of reach.
    pub fn is_damage(self) -> bool {
        matches!(
            self,
            RepositoryErrorKind::Damaged
                | RepositoryErrorKind::Replaced
                | RepositoryErrorKind::Storage(
                    StorageErrorKind::NotFound | StorageErrorKind::Corrupt
                )
        )
    }

    /// Whether an object could not be read that may be whole.
    pub fn is_unread(self) -> bool {
        self == RepositoryErrorKind::Storage(StorageErrorKind::Unreadable)
    }

    pub fn is_of_one_object(self) -> bool {
        self.is_damage() || self.is_unread()
    }
}

impl From<StorageError> for RepositoryError {
    fn from(error: StorageError) -> Self {
        RepositoryError {
            kind: RepositoryErrorKind::Storage(error.kind),
            detail: error.to_string(),
            name: error.name,
        }
    }
}

impl fmt::Display for RepositoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            // A storage error's text names the object already.
            RepositoryErrorKind::Storage(_) => f.write_str(&self.detail),
            _ => write!(f, "{}: {}", self.name, self.detail),
        }
    }
}

impl std::error::Error for RepositoryError {}
