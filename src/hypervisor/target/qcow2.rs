use super::partial::Partial;
use super::write_behind::WriteBehind;
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
    /// Syncs what the server has written: the page cache of a file is one, whoever writes.
    behind: WriteBehind,
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
        let behind = WriteBehind::new(partial.file()).map_err(|error| partial.io(error))?;
        Ok(Qcow2Target {
            server,
            partial,
            behind,
            size,
        })
    }
}

impl ImageTarget for Qcow2Target {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), CaptureError> {
        self.server
            .client()?
            .write_at(offset, data)
            .map_err(|error| error.into_capture(self.partial.name()))?;
        self.behind
            .wrote(data.len() as u64)
            .map_err(|error| self.partial.io(error))
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
        let partial = target.partial;
        target.behind.sync().map_err(|error| partial.io(error))?;
        Ok(SyncedTarget::file(partial))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    #[test]
    fn a_disk_of_which_a_sync_failed_while_it_was_written_gets_no_name() {
        let lab = tempfile::tempdir().expect("a folder");
        let (out, run) = (lab.path().join("out"), lab.path().join("run"));
        std::fs::create_dir(&out).expect("a folder");
        let mut target = Qcow2Target::create(&out, "vda.qcow2", 1 << 30, &run).expect("a target");
        let behind = WriteBehind::with(target.partial.file(), || Err(Errno::IO));
        target.behind = behind.expect("a thread");
        let piece = vec![7; 8 << 20];
        let failed = (0..1 << 7).find_map(|_| target.write_at(0, &piece).err());
        assert!(failed.is_some(), "a whole GiB was written to a dead disk");
        assert!(Box::new(target).sync().is_err());
        assert_eq!(out.read_dir().expect("the folder").count(), 0);
    }
}
