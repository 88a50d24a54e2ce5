//! The variables of a UEFI firmware, as a small disk of their own.
//!
//! A restore point has room for one definition, and the domain's XML is that. What the firmware
//! stores (boot entries, keys of Secure Boot) is content of the VM like any other, so it is kept
//! like a disk: named `nvram`, in memory, read in full each time.

use super::NVRAM;
use super::domain::Domain;
use crate::hypervisor::{CaptureError, CaptureErrorKind, CapturedDisk, Changes};
use crate::model::{DiskName, Extent};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// The largest known ones have 64 MiB.
const MAX_BYTES: u64 = 64 << 20;

pub(super) struct Nvram {
    name: DiskName,
    content: Vec<u8>,
    changes: Changes,
}

impl Nvram {
    /// That of a domain, if it has any; a note where it cannot be had.
    pub(super) fn of(domain: &Domain, notes: &mut Vec<String>) -> Option<Self> {
        match Self::read(domain.nvram.as_deref()?) {
            Ok(nvram) => Some(nvram),
            Err(reason) => {
                notes.push(format!("the nvram is not backed up: {reason}"));
                None
            }
        }
    }

    fn read(path: &Path) -> Result<Self, String> {
        let failed = |error: io::Error| format!("{}: {error}", path.display());
        let name = DiskName::new(NVRAM).map_err(|error| error.to_string())?;
        // Not waiting: a pipe in its place would hold us.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::open(path, flags, Mode::empty())
            .map(File::from)
            .map_err(|error| failed(error.into()))?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(format!("{}: not a regular file", path.display()));
        }
        let mut content = Vec::new();
        file.take(MAX_BYTES + 1)
            .read_to_end(&mut content)
            .map_err(failed)?;
        if content.is_empty() || content.len() as u64 > MAX_BYTES {
            return Err(format!(
                "{}: has {} bytes; 1 to {MAX_BYTES} are possible",
                path.display(),
                metadata.len()
            ));
        }
        Ok(Nvram {
            name,
            content,
            changes: Changes::Unknown("the nvram is always read".to_string()),
        })
    }
}

impl CapturedDisk for Nvram {
    fn name(&self) -> &DiskName {
        &self.name
    }

    fn size_bytes(&self) -> u64 {
        self.content.len() as u64
    }

    fn changes(&self) -> &Changes {
        &self.changes
    }

    fn mark(&self) -> Option<&str> {
        None
    }

    fn allocated(&self, range: Extent) -> Result<Vec<Extent>, CaptureError> {
        let disk = Extent::new(0, self.size_bytes());
        Ok(range.intersection(&disk).into_iter().collect())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CaptureError> {
        let inside = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.content.get(offset..))
            .and_then(|rest| rest.get(..buffer.len()));
        match inside {
            Some(bytes) => {
                buffer.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(CaptureError::new(
                CaptureErrorKind::Invalid,
                NVRAM,
                "a read outside of the disk",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_variables_are_a_disk_in_memory() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vars.fd");
        fs::write(&path, [7; 1000]).unwrap();
        let nvram = Nvram::read(&path).unwrap();
        fs::write(&path, [8; 10]).unwrap();
        assert_eq!(nvram.size_bytes(), 1000);
        let mut buffer = [0; 10];
        nvram.read_at(990, &mut buffer).unwrap();
        assert_eq!(buffer, [7; 10]);
        assert!(nvram.read_at(991, &mut buffer).is_err());
        assert!(nvram.read_at(u64::MAX, &mut buffer).is_err());
    }

    #[test]
    fn what_is_no_small_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Nvram::read(folder.path()).is_err());
        assert!(Nvram::read(&folder.path().join("none")).is_err());
        let path = folder.path().join("empty");
        fs::write(&path, []).unwrap();
        assert!(Nvram::read(&path).is_err());
    }
}
