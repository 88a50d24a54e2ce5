//! A disk behind an NBD export: where every source of running VMs ends.

use super::nbd::{BASE_ALLOCATION, NbdClient, NbdError, STATUS_DIRTY, STATUS_ZERO, StatusExtent};
use super::{CaptureError, CapturedDisk, Changes};
use crate::model::{DiskName, Extent};

/// What a source knows of why reading fails, beside what the server says.
pub(super) trait Explain: Send + Sync {
    fn explain(&self, cause: &NbdError) -> Option<String>;
}

pub(super) struct NbdDisk {
    pub name: DiskName,
    /// For messages.
    pub shown: String,
    pub client: NbdClient,
    pub changes: Changes,
    pub mark: Option<String>,
    /// Whether `base:allocation` can be asked; else everything asked for counts as allocated.
    pub has_allocation: bool,
    pub explain: Option<Box<dyn Explain>>,
}

impl NbdDisk {
    fn failed(&self, error: NbdError) -> CaptureError {
        match &self.explain {
            Some(explain) => explained(&**explain, error, &self.shown),
            None => error.into_capture(&self.shown),
        }
    }
}

/// An error with what its source knows of it.
pub(super) fn explained(explain: &dyn Explain, error: NbdError, shown: &str) -> CaptureError {
    let known = explain.explain(&error);
    let mut error = error.into_capture(shown);
    if let Some(known) = known {
        error.detail = format!("{known} ({})", error.detail);
    }
    error
}

/// The extents of an export whose bitmap says that they were written to.
pub(super) fn dirty(client: &NbdClient, context: &str) -> Result<Changes, NbdError> {
    match client.status(context, Extent::new(0, client.size_bytes())) {
        Err(NbdError::TooManyPieces) => Ok(Changes::Unknown(
            "its changes are too many and too scattered to be kept in memory".to_string(),
        )),
        status => Ok(Changes::Extents(joined(status?, |flags| {
            flags & STATUS_DIRTY != 0
        }))),
    }
}

/// The wanted extents, joined where they meet.
fn joined(status: Vec<StatusExtent>, wanted: impl Fn(u32) -> bool) -> Vec<Extent> {
    let mut found: Vec<Extent> = Vec::new();
    for status in status {
        if !wanted(status.flags) {
            continue;
        }
        match found
            .last_mut()
            .filter(|last| last.end() == status.extent.offset)
        {
            Some(last) => last.length += status.extent.length,
            None => found.push(status.extent),
        }
    }
    found
}

/// The parts of an export that may hold data. Only ZERO speaks of content; a HOLE without it can
/// read as anything.
pub(super) fn allocated(client: &NbdClient, range: Extent) -> Result<Vec<Extent>, NbdError> {
    let status = client.status(BASE_ALLOCATION, range)?;
    Ok(joined(status, |flags| flags & STATUS_ZERO == 0))
}

impl CapturedDisk for NbdDisk {
    fn name(&self) -> &DiskName {
        &self.name
    }

    fn size_bytes(&self) -> u64 {
        self.client.size_bytes()
    }

    fn changes(&self) -> &Changes {
        &self.changes
    }

    fn mark(&self) -> Option<&str> {
        self.mark.as_deref()
    }

    fn allocated(&self, range: Extent) -> Result<Vec<Extent>, CaptureError> {
        let disk = Extent::new(0, self.client.size_bytes());
        let Some(range) = range.intersection(&disk) else {
            return Ok(Vec::new());
        };
        match self.has_allocation {
            true => allocated(&self.client, range).map_err(|error| self.failed(error)),
            false => Ok(vec![range]),
        }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CaptureError> {
        self.client
            .read_at(offset, buffer)
            .map_err(|error| self.failed(error))
    }
}
