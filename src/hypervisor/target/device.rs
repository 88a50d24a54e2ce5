use super::write_behind::WriteBehind;
use super::{ImageTarget, SyncedTarget, check_range, check_size};
use crate::hypervisor::writer::{self, Writers};
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use crate::model::Extent;
use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

static ZEROES: [u8; 256 * 1024] = [0; 256 * 1024];

/// An existing block device, overwritten in place. What lies behind the restored disk on a
/// larger device stays as it is.
#[derive(Debug)]
pub struct DeviceTarget {
    name: String,
    behind: WriteBehind,
    size: u64,
}

impl DeviceTarget {
    /// `force`: somebody has said that what is on the device may be destroyed.
    pub fn open(path: &Path, size: u64, force: bool) -> Result<Self, CaptureError> {
        check_size(path.display(), size)?;
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => {
                CaptureError::new(CaptureErrorKind::Missing, path.display(), "is not there")
            }
            _ => CaptureError::new(CaptureErrorKind::Io, path.display(), error),
        };
        let invalid =
            |detail: String| CaptureError::new(CaptureErrorKind::Invalid, path.display(), detail);
        let is_device = |mode| FileType::from_raw_mode(mode) == FileType::BlockDevice;
        if !is_device(fs::metadata(path).map_err(failed)?.mode()) {
            return Err(invalid("is not a block device".to_string()));
        }
        if !force {
            return Err(invalid(
                "everything on the device would be destroyed; --force confirms that".to_string(),
            ));
        }
        // O_EXCL on a block device: refused while it is mounted or part of another device.
        let flags = OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::BUSY) => {
                return Err(CaptureError::new(
                    CaptureErrorKind::Inconsistent,
                    path.display(),
                    "the device is mounted or otherwise in use by this host",
                ));
            }
            Err(error) => return Err(failed(error.into())),
        };
        if !is_device(file.metadata().map_err(failed)?.mode()) {
            return Err(invalid("was replaced while it was opened".to_string()));
        }
        // Where it cannot be told, O_EXCL and the word of whoever said --force must do.
        if let Writers::Somebody(writer) = writer::of(&file).map_err(failed)? {
            return Err(CaptureError::new(
                CaptureErrorKind::Inconsistent,
                path.display(),
                format!("in use by {writer}; shut the VM down"),
            ));
        }
        let length =
            rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|error| failed(error.into()))?;
        if length < size {
            return Err(invalid(format!(
                "the device has {length} bytes, the disk needs {size}"
            )));
        }
        Ok(DeviceTarget {
            name: path.display().to_string(),
            behind: WriteBehind::new(&Arc::new(file)).map_err(failed)?,
            size,
        })
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), CaptureError> {
        self.behind
            .write_at(offset, data)
            .map_err(|error| self.io(error))
    }

    fn io(&self, error: io::Error) -> CaptureError {
        CaptureError::new(CaptureErrorKind::Io, &self.name, error)
    }
}

impl ImageTarget for DeviceTarget {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), CaptureError> {
        check_range(&self.name, self.size, offset, data.len() as u64)?;
        self.write(offset, data)
    }

    /// Writes zeroes: a device may forget a discard, or read as anything after it.
    fn zero(&self, range: Extent) -> Result<(), CaptureError> {
        check_range(&self.name, self.size, range.offset, range.length)?;
        let mut offset = range.offset;
        while offset < range.end() {
            let length = (range.end() - offset).min(ZEROES.len() as u64);
            // `length` is at most the length of ZEROES, so nothing is cut here.
            let zeroes = ZEROES.get(..length as usize).unwrap_or(&ZEROES);
            self.write(offset, zeroes)?;
            offset += length;
        }
        Ok(())
    }

    fn sync(self: Box<Self>) -> Result<SyncedTarget, CaptureError> {
        let DeviceTarget { name, behind, .. } = *self;
        behind
            .sync()
            .map_err(|error| CaptureError::new(CaptureErrorKind::Io, name, error))?;
        Ok(SyncedTarget::device())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::writer::testing::{DEVICE_BYTES, Device, Writer};

    #[test]
    fn nothing_is_restored_onto_a_device_that_another_process_writes_to_through_another_node() {
        let device = Device::new();
        let writer = Writer::start(&device.other_node());
        let open = || DeviceTarget::open(&device.path, DEVICE_BYTES, true);
        let error = open().unwrap_err();
        assert_eq!(error.kind, CaptureErrorKind::Inconsistent);
        assert!(error.detail.contains("open for writing"), "{error}");
        drop(writer);
        open().unwrap();
    }
}
