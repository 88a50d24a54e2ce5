//! A disk that was handed in: read inside of what its bitmap shows, and given back after reading.

use crate::hypervisor::nbd::NbdError;
use crate::hypervisor::nbd_disk::{Explain, NbdDisk};
use crate::hypervisor::{CaptureError, CaptureErrorKind, CapturedDisk, Changes};
use crate::model::{DiskName, Extent};
use std::sync::{Mutex, PoisonError};

pub(super) struct HandedDisk {
    disk: NbdDisk,
    giving_back: Mutex<GivingBack>,
}

/// Whether what was read is discarded in the export.
#[derive(Debug, Clone, PartialEq, Eq)]
enum GivingBack {
    No,
    Yes,
    /// It was tried. What was read is right all the same, so this ends only the trying.
    Failed(String),
}

impl HandedDisk {
    /// `gives_back`: the export is a fleecing image, and can discard.
    pub(super) fn new(disk: NbdDisk, gives_back: bool) -> Self {
        HandedDisk {
            disk,
            giving_back: Mutex::new(match gives_back {
                true => GivingBack::Yes,
                false => GivingBack::No,
            }),
        }
    }

    fn giving_back(&self) -> std::sync::MutexGuard<'_, GivingBack> {
        // Its content is valid after every statement.
        self.giving_back
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn give_back(&self, offset: u64, length: u64) {
        if *self.giving_back() != GivingBack::Yes {
            return;
        }
        let Some(range) = whole_blocks(offset, length, self.disk.client.block_bytes()) else {
            return;
        };
        if let Err(error) = self.disk.client.trim(range) {
            *self.giving_back() = GivingBack::Failed(error.to_string());
        }
    }

    /// Ends the reading.
    pub(super) fn close(self) -> Result<(), CaptureError> {
        let HandedDisk { disk, giving_back } = self;
        // A server takes a connection that just ends as well.
        let _ = disk.client.disconnect();
        match giving_back
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
        {
            GivingBack::Failed(why) => Err(CaptureError::new(
                CaptureErrorKind::Io,
                &disk.shown,
                format!("what was read could not be given back to the fleecing image: {why}"),
            )),
            GivingBack::No | GivingBack::Yes => Ok(()),
        }
    }
}

impl CapturedDisk for HandedDisk {
    fn name(&self) -> &DiskName {
        self.disk.name()
    }

    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn changes(&self) -> &Changes {
        self.disk.changes()
    }

    fn mark(&self) -> Option<&str> {
        self.disk.mark()
    }

    fn allocated(&self, range: Extent) -> Result<Vec<Extent>, CaptureError> {
        self.disk.allocated(range)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CaptureError> {
        let length = buffer.len() as u64;
        if let Changes::Extents(extents) = &self.disk.changes
            && !lies_inside(offset, length, extents)
        {
            return Err(CaptureError::new(
                CaptureErrorKind::Invalid,
                &self.disk.shown,
                format!("{length} bytes at {offset} are not part of what its bitmap shows"),
            ));
        }
        self.disk.read_at(offset, buffer)?;
        self.give_back(offset, length);
        Ok(())
    }
}

/// Whether all of it lies in one of the extents, which are sorted and do not touch.
fn lies_inside(offset: u64, length: u64, extents: &[Extent]) -> bool {
    let after = extents.partition_point(|extent| extent.offset <= offset);
    let found = after.checked_sub(1).and_then(|at| extents.get(at));
    found.is_some_and(|extent| {
        offset
            .checked_add(length)
            .is_some_and(|end| end <= extent.end())
    })
}

/// The whole blocks inside of a range: what lies beside it was not read, and must stay.
fn whole_blocks(offset: u64, length: u64, block_bytes: u32) -> Option<Extent> {
    let block = u64::from(block_bytes.max(1));
    let start = offset.checked_next_multiple_of(block)?;
    let end = offset.checked_add(length)? / block * block;
    (start < end).then(|| Extent::new(start, end - start))
}

/// What a peer's refusal to read means here.
pub(super) struct GoneFromExport;

impl Explain for GoneFromExport {
    fn explain(&self, cause: &NbdError) -> Option<String> {
        match cause {
            NbdError::Server {
                errno: 1 | 13 | 22, ..
            } => Some(
                "this part of the export cannot be read: the fleecing image ran full, the job was \
                 ended, or an earlier attempt has read and discarded it. Start the backup anew \
                 where it is handed in"
                    .to_string(),
            ),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_one_dirty_extent_holds_may_be_read() {
        let extents = [Extent::new(0, 10), Extent::new(20, 10)];
        for (offset, length) in [(0, 10), (3, 4), (20, 10), (29, 1)] {
            assert!(lies_inside(offset, length, &extents), "{offset}+{length}");
        }
        for (offset, length) in [(0, 11), (9, 2), (10, 1), (15, 10), (30, 1), (25, u64::MAX)] {
            assert!(!lies_inside(offset, length, &extents), "{offset}+{length}");
        }
        assert!(!lies_inside(0, 1, &[]));
    }

    #[test]
    fn no_block_is_discarded_that_was_read_in_part() {
        assert_eq!(whole_blocks(0, 4096, 512), Some(Extent::new(0, 4096)));
        assert_eq!(whole_blocks(1, 4096, 512), Some(Extent::new(512, 3584)));
        assert_eq!(whole_blocks(1, 1000, 512), None);
        assert_eq!(whole_blocks(512, 511, 512), None);
        assert_eq!(whole_blocks(u64::MAX - 3, 3, 512), None);
        assert_eq!(whole_blocks(7, 5, 0), Some(Extent::new(7, 5)));
    }
}
