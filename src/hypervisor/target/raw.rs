use super::partial::Partial;
use super::write_behind::WriteBehind;
use super::{ImageTarget, SyncedTarget, check_range, check_size};
use crate::hypervisor::CaptureError;
use crate::model::Extent;
use std::path::Path;

/// A new sparse raw file.
pub struct RawTarget {
    partial: Partial,
    behind: WriteBehind,
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
            partial,
            behind,
            size,
        })
    }
}

impl ImageTarget for RawTarget {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), CaptureError> {
        check_range(self.partial.name(), self.size, offset, data.len() as u64)?;
        self.behind
            .write_at(offset, data)
            .map_err(|error| self.partial.io(error))
    }

    /// The file is one hole from the start.
    fn zero(&self, range: Extent) -> Result<(), CaptureError> {
        check_range(self.partial.name(), self.size, range.offset, range.length)
    }

    fn sync(self: Box<Self>) -> Result<SyncedTarget, CaptureError> {
        let RawTarget {
            partial, behind, ..
        } = *self;
        behind.sync().map_err(|error| partial.io(error))?;
        Ok(SyncedTarget::file(partial))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    #[test]
    fn a_disk_of_which_a_sync_failed_while_it_was_written_gets_no_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let partial = Partial::create(folder.path(), "vda.raw").expect("a file");
        let behind = WriteBehind::with(partial.file(), || Err(Errno::IO)).expect("a thread");
        let target = Box::new(RawTarget {
            partial,
            behind,
            size: 1 << 30,
        });
        let piece = vec![7; 1 << 20];
        let failed = (0..1 << 10).find_map(|number| target.write_at(number << 20, &piece).err());
        assert!(failed.is_some(), "a whole GiB was written to a dead disk");
        assert!(target.sync().is_err());
        let left = folder.path().read_dir().expect("the folder").count();
        assert_eq!(left, 0);
    }
}
