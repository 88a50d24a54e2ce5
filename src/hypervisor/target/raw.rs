use super::partial::Partial;
use super::write_behind::WriteBehind;
use super::{ImageTarget, check_range, check_size};
use crate::hypervisor::CaptureError;
use crate::model::Extent;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A new sparse raw file.
pub struct RawTarget {
    // Before the file, which goes when its thread has ended.
    behind: WriteBehind,
    partial: Partial,
    size: u64,
}

impl RawTarget {
    pub fn create(folder: &Path, file_name: &str, size: u64) -> Result<Self, CaptureError> {
        check_size(file_name, size)?;
        let partial = Partial::create(folder, file_name)?;
        partial
            .file()
            .set_len(size)
            .map_err(|error| partial.io(error))?;
        let behind = WriteBehind::new(partial.file()).map_err(|error| partial.io(error))?;
        Ok(RawTarget {
            behind,
            partial,
            size,
        })
    }
}

impl ImageTarget for RawTarget {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), CaptureError> {
        check_range(self.partial.name(), self.size, offset, data.len() as u64)?;
        self.partial
            .file()
            .write_all_at(data, offset)
            .and_then(|()| Ok(self.behind.wrote(data.len() as u64)?))
            .map_err(|error| self.partial.io(error))
    }

    /// The file is one hole from the start.
    fn zero(&self, range: Extent) -> Result<(), CaptureError> {
        check_range(self.partial.name(), self.size, range.offset, range.length)
    }

    fn finish(self: Box<Self>) -> Result<(), CaptureError> {
        let RawTarget {
            behind, partial, ..
        } = *self;
        behind.finish().map_err(|error| partial.io(error.into()))?;
        partial.finish()
    }
}
