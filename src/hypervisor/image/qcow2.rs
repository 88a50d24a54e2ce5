//! A qcow2 image, read through `qemu-nbd`.
//!
//! While it is read, the server's lock keeps a QEMU from opening it for writing: a VM that is
//! started meanwhile is refused by its image lock until the capture is closed.

use super::ImageReader;
use super::header::Header;
use super::opened::OpenedImage;
use crate::hypervisor::nbd::{BASE_ALLOCATION, NbdError};
use crate::hypervisor::nbd_disk;
use crate::hypervisor::qemu_nbd::{Access, QemuNbd};
use crate::hypervisor::{CaptureError, CaptureErrorKind, CapturedDisk, Changes, SinceMark};
use crate::model::{DiskName, Extent};
use std::path::Path;

pub(super) struct Qcow2Disk {
    image: OpenedImage,
    server: QemuNbd,
    size_bytes: u64,
    changes: Changes,
}

impl Qcow2Disk {
    pub(super) fn new(
        image: OpenedImage,
        runtime_dir: &Path,
        since: &[SinceMark],
    ) -> Result<Self, CaptureError> {
        let header =
            Header::read(image.file()).map_err(|error| image.error(CaptureErrorKind::Io, error))?;
        let size_bytes = header
            .and_then(|header| header.standalone_size())
            .map_err(|reason| image.error(CaptureErrorKind::Invalid, reason))?;
        let server = QemuNbd::serve(
            image.name().as_str(),
            image.file(),
            Access::ReadOnly,
            runtime_dir,
            &[BASE_ALLOCATION],
        )?;
        let served = server.client()?.size_bytes();
        if served != size_bytes {
            return Err(image.error(
                CaptureErrorKind::Inconsistent,
                format!("has {size_bytes} bytes, but QEMU sees {served}"),
            ));
        }
        let changes = image.changes(size_bytes, since);
        Ok(Qcow2Disk {
            image,
            server,
            size_bytes,
            changes,
        })
    }

    fn nbd(&self, error: NbdError) -> CaptureError {
        error.into_capture(self.image.shown())
    }
}

impl CapturedDisk for Qcow2Disk {
    fn name(&self) -> &DiskName {
        self.image.name()
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn changes(&self) -> &Changes {
        &self.changes
    }

    fn mark(&self) -> Option<&str> {
        self.image.mark()
    }

    fn allocated(&self, range: Extent) -> Result<Vec<Extent>, CaptureError> {
        let disk = Extent::new(0, self.size_bytes);
        let Some(range) = range.intersection(&disk) else {
            return Ok(Vec::new());
        };
        nbd_disk::allocated(self.server.client()?, range).map_err(|error| self.nbd(error))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CaptureError> {
        self.server
            .client()?
            .read_at(offset, buffer)
            .map_err(|error| self.nbd(error))
    }
}

impl ImageReader for Qcow2Disk {
    fn image(&self) -> &OpenedImage {
        &self.image
    }

    fn as_disk(&self) -> &dyn CapturedDisk {
        self
    }

    fn close(self: Box<Self>) -> Result<(), CaptureError> {
        self.server.finish()
    }
}
