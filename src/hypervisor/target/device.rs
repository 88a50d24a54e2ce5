use super::write_behind::WriteBehind;
use super::{ImageTarget, SyncedTarget, check_range, check_size};
use crate::hypervisor::writer::{self, Writers};
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use crate::model::Extent;
use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, SeekFrom};
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
    file: Arc<File>,
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
        if writer::is_read_only(&file).map_err(failed)? {
            return Err(invalid("the device is read-only".to_string()));
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
        let file = Arc::new(file);
        Ok(DeviceTarget {
            name: path.display().to_string(),
            behind: WriteBehind::new(&file).map_err(failed)?,
            file,
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

    /// Never a mere discard, which a device may forget, or read as anything after. Of a block device this call is
    /// granted only where zeroes are certain, whether they take room or not; else they are written.
    fn zero(&self, range: Extent) -> Result<(), CaptureError> {
        check_range(&self.name, self.size, range.offset, range.length)?;
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if rustix::fs::fallocate(&self.file, hole, range.offset, range.length).is_ok() {
            return Ok(());
        }
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
    use std::process::Command;

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

    #[test]
    fn nothing_is_restored_onto_a_disk_while_a_process_writes_to_a_partition_of_it() {
        let device = Device::new();
        let writer = Writer::start(&device.partition());
        let error = DeviceTarget::open(&device.path, DEVICE_BYTES, true).unwrap_err();
        assert_eq!(error.kind, CaptureErrorKind::Inconsistent);
        drop(writer);
        DeviceTarget::open(&device.path, DEVICE_BYTES, true).unwrap();
    }

    #[test]
    fn a_read_only_device_is_told_before_anything_is_written() {
        let device = Device::new();
        let set = |what: &str| {
            let mut command = Command::new("blockdev");
            let status = command.arg(what).arg(&device.path).status();
            assert!(status.unwrap().success());
        };
        set("--setro");
        let error = DeviceTarget::open(&device.path, DEVICE_BYTES, true).unwrap_err();
        set("--setrw");
        assert_eq!(error.kind, CaptureErrorKind::Invalid);
        assert!(error.detail.contains("read-only"), "{error}");
    }

    #[test]
    fn a_hole_takes_no_room_where_the_device_gives_it_back_and_reads_as_zero_everywhere() {
        let device = Device::new();
        let target = Box::new(DeviceTarget::open(&device.path, DEVICE_BYTES, true).unwrap());
        // No device is asked for less than whole sectors: the second is written.
        let holes = [
            Extent::new(0, 512 << 10),
            Extent::new((768 << 10) + 10, 1000),
        ];
        for hole in holes {
            target.zero(hole).unwrap();
        }
        target.write_at(512 << 10, &[3; 4096]).unwrap();
        target.sync().unwrap();
        let mut expected = vec![7_u8; DEVICE_BYTES as usize];
        for hole in holes {
            expected[hole.offset as usize..hole.end() as usize].fill(0);
        }
        expected[512 << 10..(512 << 10) + 4096].fill(3);
        assert!(fs::read(&device.path).unwrap() == expected);
        let used = fs::metadata(device.file()).unwrap().blocks() * 512;
        assert!(used <= 600 << 10, "{used} bytes");
    }
}
