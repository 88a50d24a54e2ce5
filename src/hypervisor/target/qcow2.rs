use super::partial::Partial;
use super::{ImageTarget, SyncedTarget, check_range, check_size};
use crate::hypervisor::qemu_nbd::{Access, QemuNbd, run_tool};
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use crate::model::Extent;
use std::path::Path;

/// A new qcow2 file without backing, written through `qemu-nbd`.
pub struct Qcow2Target {
    /// Before the file: the server must have let go of it when it is removed.
    server: QemuNbd,
    partial: Partial,
    size: u64,
}

impl Qcow2Target {
    /// `runtime_dir`: where the socket may be placed, private to this agent.
    pub fn create(
        folder: &Path,
        file_name: &str,
        size: u64,
        runtime_dir: &Path,
    ) -> Result<Self, CaptureError> {
        check_size(file_name, size)?;
        if !size.is_multiple_of(512) {
            // QEMU would round it up, and the disk would not be the one that was backed up.
            return Err(CaptureError::new(
                CaptureErrorKind::Invalid,
                file_name,
                format!("a disk of {size} bytes is not of whole sectors; restore it as raw"),
            ));
        }
        let partial = Partial::create(folder, file_name)?;
        let name = partial.name();
        let arguments = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "compat=1.1,preallocation=off,lazy_refcounts=off",
            "/proc/self/fd/0",
            &size.to_string(),
        ];
        run_tool("qemu-img", &arguments, &name, partial.file())?;
        let server = QemuNbd::serve(&name, partial.file(), Access::ReadWrite, runtime_dir, &[])?;
        let served = server.client()?.size_bytes();
        if served != size {
            return Err(CaptureError::new(
                CaptureErrorKind::Tool,
                name,
                format!("qemu-img made a disk of {served} bytes instead of {size}"),
            ));
        }
        Ok(Qcow2Target {
            server,
            partial,
            size,
        })
    }
}

impl ImageTarget for Qcow2Target {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), CaptureError> {
        self.server
            .client()?
            .write_at(offset, data)
            .map_err(|error| error.into_capture(self.partial.name()))
    }

    /// Clusters that were never written read as zero, since there is no backing file.
    fn zero(&self, range: Extent) -> Result<(), CaptureError> {
        check_range(self.partial.name(), self.size, range.offset, range.length)
    }

    fn sync(self: Box<Self>) -> Result<SyncedTarget, CaptureError> {
        let target = *self;
        target
            .server
            .client()?
            .flush()
            .map_err(|error| error.into_capture(target.partial.name()))?;
        target.server.finish()?;
        target.partial.sync()?;
        Ok(SyncedTarget::file(target.partial))
    }
}
