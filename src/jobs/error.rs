use crate::hypervisor::CaptureError;
use crate::policy::ClockRefusal;
use crate::repository::{RepositoryError, RepositoryErrorKind};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

/// Why a job did not do what it was asked for; names the thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobError {
    pub kind: JobErrorKind,
    pub message: String,
}

/// What the caller decides by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobErrorKind {
    Repository(RepositoryErrorKind),
    /// A disk or target could not be used or read.
    Capture,
    /// Deletion was refused; nothing was deleted.
    Clock(ClockRefusal),
    /// Another process of this host is at it.
    Busy,
    /// Nothing like what was asked for exists.
    NotFound,
    /// It would break a rule.
    Refused,
    /// The host's own files.
    State,
    Interrupted,
}

impl JobError {
    pub fn new(kind: JobErrorKind, message: impl fmt::Display) -> Self {
        JobError {
            kind,
            message: message.to_string(),
        }
    }

    /// The same, and what failed besides.
    pub(super) fn and(self, besides: impl fmt::Display) -> Self {
        Self::new(self.kind, format!("{}; {besides}", self.message))
    }

    pub(super) fn interrupted() -> Self {
        Self::new(JobErrorKind::Interrupted, "interrupted")
    }

    /// Fails once somebody has asked to stop.
    pub(super) fn unless_stopped(stop: &AtomicBool) -> Result<(), Self> {
        match stop.load(Ordering::Relaxed) {
            true => Err(Self::interrupted()),
            false => Ok(()),
        }
    }

    /// Whether it is about stored bytes that are wrong or missing.
    pub fn is_damage(&self) -> bool {
        matches!(self.kind, JobErrorKind::Repository(kind) if kind.is_damage())
    }

    /// Whether it says nothing of other stored objects.
    pub(super) fn is_of_one_object(&self) -> bool {
        matches!(self.kind, JobErrorKind::Repository(kind) if kind.is_of_one_object())
    }

    /// Whether a session that met this may have been committed all the same.
    pub(super) fn is_uncertain(&self) -> bool {
        self.kind == JobErrorKind::Repository(RepositoryErrorKind::Uncertain)
    }

    /// What the work stood on has changed; it may be done anew.
    pub(super) fn is_superseded(&self) -> bool {
        self.kind == JobErrorKind::Repository(RepositoryErrorKind::Superseded)
    }
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for JobError {}

impl From<RepositoryError> for JobError {
    fn from(error: RepositoryError) -> Self {
        let kind = match error.kind {
            RepositoryErrorKind::Interrupted => JobErrorKind::Interrupted,
            kind => JobErrorKind::Repository(kind),
        };
        Self::new(kind, error)
    }
}

impl From<CaptureError> for JobError {
    fn from(error: CaptureError) -> Self {
        Self::new(JobErrorKind::Capture, error)
    }
}

impl From<crate::storage::StorageError> for JobError {
    fn from(error: crate::storage::StorageError) -> Self {
        RepositoryError::from(error).into()
    }
}
