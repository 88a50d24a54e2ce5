use super::partial::Partial;
use super::{ImageTarget, check_range, check_size};
use crate::hypervisor::CaptureError;
use crate::model::Extent;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A new sparse raw file.
pub struct RawTarget {
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
        Ok(RawTarget { partial, size })
    }
}

impl ImageTarget for RawTarget {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), CaptureError> {
        check_range(self.partial.name(), self.size, offset, data.len() as u64)?;
        self.partial
            .file()
            .write_all_at(data, offset)
            .map_err(|error| self.partial.io(error))
    }

    /// The file is one hole from the start.
    fn zero(&self, range: Extent) -> Result<(), CaptureError> {
        check_range(self.partial.name(), self.size, range.offset, range.length)
    }

    fn finish(self: Box<Self>) -> Result<(), CaptureError> {
        self.partial.finish()
    }
}
