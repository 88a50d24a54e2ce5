//! Where a restore writes a disk: a new raw or qcow2 file, or an existing block device.
//!
//! A new file appears under its name only when it and all that are restored with it are complete and on stable
//! storage; until then it is a hidden partial file, removed when whoever holds it is dropped. It never replaces
//! anything.

mod device;
mod folder;
mod partial;
mod qcow2;
mod raw;
mod write_behind;

pub use device::DeviceTarget;
pub use folder::{create_folder, partial_files};
pub use qcow2::Qcow2Target;
pub use raw::RawTarget;

use super::{CaptureError, CaptureErrorKind};
use crate::model::{Extent, MAX_DISK_BYTES};
use partial::Partial;
use std::ffi::OsStr;
use std::fmt;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A disk that is being restored. The caller writes or zeroes every byte exactly once, in any
/// order and from several threads; then `sync` makes it last.
pub trait ImageTarget: Send + Sync {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), CaptureError>;
    /// Makes the range read as zero. Costs nothing where it does so from the start.
    fn zero(&self, range: Extent) -> Result<(), CaptureError>;
    /// Brings everything to stable storage.
    fn sync(self: Box<Self>) -> Result<SyncedTarget, CaptureError>;
}

/// A restored disk on stable storage. A file still lacks its name, and goes if it is not given one.
pub struct SyncedTarget {
    file: Option<Partial>,
}

impl SyncedTarget {
    fn device() -> Self {
        SyncedTarget { file: None }
    }

    /// The caller has synced it.
    fn file(partial: Partial) -> Self {
        SyncedTarget {
            file: Some(partial),
        }
    }

    /// A small file that goes with the disks, like the definition of their VM.
    pub fn beside(path: &Path, content: &[u8]) -> Result<Self, CaptureError> {
        let folder = path.parent().unwrap_or(Path::new("."));
        let file_name = path.file_name().and_then(OsStr::to_str);
        let partial = Partial::create(folder, file_name.unwrap_or_default())?;
        let written = partial.file().write_all_at(content, 0);
        written.map_err(|error| partial.io(error))?;
        partial.sync()?;
        Ok(Self::file(partial))
    }

    /// Gives all of them their names, durably, or none: half a VM must not look like one.
    /// A crash meanwhile can leave some.
    pub fn give_names(targets: Vec<SyncedTarget>) -> Result<(), CaptureError> {
        let mut files: Vec<_> = targets
            .into_iter()
            .filter_map(|target| target.file)
            .collect();
        for file in &mut files {
            file.give_name()?;
        }
        for file in &files {
            file.sync_folder()?;
        }
        for file in files {
            file.keep();
        }
        Ok(())
    }
}

fn check_size(name: impl fmt::Display, size: u64) -> Result<(), CaptureError> {
    match size {
        1..=MAX_DISK_BYTES => Ok(()),
        _ => Err(CaptureError::new(
            CaptureErrorKind::Invalid,
            name,
            format!("a disk of {size} bytes (1 to {MAX_DISK_BYTES} are possible)"),
        )),
    }
}

fn check_range(
    name: impl fmt::Display,
    size: u64,
    offset: u64,
    length: u64,
) -> Result<(), CaptureError> {
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(()),
        _ => Err(CaptureError::new(
            CaptureErrorKind::Invalid,
            name,
            "a write outside of the disk",
        )),
    }
}
