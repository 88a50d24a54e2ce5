//! A raw image file or a block device.

use super::ImageReader;
use super::opened::OpenedImage;
use crate::hypervisor::{CaptureError, CaptureErrorKind, CapturedDisk, Changes, SinceMark};
use crate::model::{DiskName, Extent};
use rustix::fs::{Advice, SeekFrom};
use rustix::io::Errno;
use std::io;
use std::os::unix::fs::FileExt;

pub(super) struct RawDisk {
    image: OpenedImage,
    changes: Changes,
}

impl RawDisk {
    pub(super) fn new(image: OpenedImage, since: &[SinceMark]) -> Result<Self, CaptureError> {
        // Only advice: more is read ahead. What it answers does not matter.
        let _ = rustix::fs::fadvise(image.file(), 0, None, Advice::Sequential);
        let changes = image.changes(image.length(), since);
        Ok(RawDisk { image, changes })
    }

    fn io(&self, error: impl std::fmt::Display) -> CaptureError {
        self.image.error(CaptureErrorKind::Io, error)
    }
}

impl CapturedDisk for RawDisk {
    fn name(&self) -> &DiskName {
        self.image.name()
    }

    fn size_bytes(&self) -> u64 {
        self.image.length()
    }

    fn changes(&self) -> &Changes {
        &self.changes
    }

    fn mark(&self) -> Option<&str> {
        self.image.mark()
    }

    fn allocated(&self, range: Extent) -> Result<Vec<Extent>, CaptureError> {
        let disk = Extent::new(0, self.size_bytes());
        let Some(range) = range.intersection(&disk) else {
            return Ok(Vec::new());
        };
        if self.image.is_device() {
            return Ok(vec![range]);
        }
        let mut found = Vec::new();
        let mut offset = range.offset;
        // These seeks name an absolute place and nobody uses the position they leave, so several
        // threads can do this on the same file.
        while offset < range.end() {
            let data = match rustix::fs::seek(self.image.file(), SeekFrom::Data(offset)) {
                Ok(data) => data,
                // Behind the last data.
                Err(Errno::NXIO) => break,
                Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(vec![range]),
                Err(error) => return Err(self.io(io::Error::from(error))),
            };
            if data >= range.end() {
                break;
            }
            let hole = match rustix::fs::seek(self.image.file(), SeekFrom::Hole(data)) {
                Ok(hole) => hole.min(range.end()),
                // The file became shorter; reading will tell.
                Err(Errno::NXIO) => range.end(),
                Err(error) => return Err(self.io(io::Error::from(error))),
            };
            if data < offset || hole <= data {
                return Err(self.io("the file system reports impossible holes"));
            }
            found.push(Extent::new(data, hole - data));
            offset = hole;
        }
        Ok(found)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CaptureError> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.size_bytes()) {
            return Err(self
                .image
                .error(CaptureErrorKind::Invalid, "a read outside of the disk"));
        }
        match self.image.file().read_exact_at(buffer, offset) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(self.io(format!(
                "ends before byte {}: it was cut while it was read",
                offset.saturating_add(buffer.len() as u64)
            ))),
            Err(error) => Err(self.io(format!("reading at {offset}: {error}"))),
        }
    }
}

impl ImageReader for RawDisk {
    fn image(&self) -> &OpenedImage {
        &self.image
    }

    fn as_disk(&self) -> &dyn CapturedDisk {
        self
    }

    fn close(self: Box<Self>) -> Result<(), CaptureError> {
        Ok(())
    }
}
