//! The file of an object, held open.

use super::super::{OpenObject, StorageError, too_short};
use super::unread;
use crate::model::ObjectName;
use rustix::fs::Stat;
use rustix::io::retry_on_intr;
use std::os::fd::OwnedFd;

/// Its name may be gone from the folder: the bytes stay until this is dropped.
pub(super) struct OpenFile {
    name: ObjectName,
    file: OwnedFd,
    size_bytes: u64,
}

impl OpenFile {
    pub fn new(name: &ObjectName, (file, stat): (OwnedFd, Stat)) -> Self {
        OpenFile {
            name: name.clone(),
            file,
            size_bytes: u64::try_from(stat.st_size).unwrap_or(0),
        }
    }
}

impl OpenObject for OpenFile {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StorageError> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.size_bytes) {
            let end = end.unwrap_or(u64::MAX);
            return Err(too_short(&self.name, self.size_bytes, end));
        }
        let mut at = offset;
        let mut rest = buffer;
        while !rest.is_empty() {
            let done = retry_on_intr(|| rustix::io::pread(&self.file, &mut *rest, at))
                .map_err(|error| unread(&self.name, "reading", error))?;
            rest = rest
                .get_mut(done..)
                .filter(|_| done > 0)
                .ok_or_else(|| too_short(&self.name, at, self.size_bytes))?;
            at += done as u64;
        }
        Ok(())
    }
}
