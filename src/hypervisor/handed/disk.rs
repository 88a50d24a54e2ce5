//! A disk that was handed in: read inside of what its bitmap shows, and given back after reading.

use crate::hypervisor::nbd::NbdError;
use crate::hypervisor::nbd_disk::{Explain, NbdDisk};
use crate::hypervisor::{CaptureError, CaptureErrorKind, CapturedDisk, Changes};
use crate::model::{DiskName, Extent};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A fleecing image is given back in whole clusters of the filter before it, however large they are
/// up to this.
const MAX_CLUSTER_BYTES: u64 = 16 << 20;

pub(super) struct HandedDisk {
    disk: NbdDisk,
    giving_back: Mutex<GivingBack>,
    /// That of the source.
    given_back: Arc<AtomicBool>,
    read: Mutex<ReadExtents>,
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
    pub(super) fn new(disk: NbdDisk, gives_back: bool, given_back: Arc<AtomicBool>) -> Self {
        HandedDisk {
            disk,
            giving_back: Mutex::new(match gives_back {
                true => GivingBack::Yes,
                false => GivingBack::No,
            }),
            given_back,
            read: Mutex::default(),
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
        let done = self
            .read
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .add(Extent::new(offset, length));
        // A cluster is given back once all of it was read: by the last of several reads.
        let around = around(&done, offset, length);
        let blocks = whole_blocks(around.offset, around.length, self.disk.client.block_bytes());
        let Some(range) = blocks else {
            return;
        };
        self.given_back.store(true, Ordering::SeqCst);
        if let Err(error) = self.disk.client.trim(range) {
            *self.giving_back() = GivingBack::Failed(error.to_string());
        }
    }

    /// Ends the reading.
    pub(super) fn close(self) -> Result<(), CaptureError> {
        let HandedDisk {
            disk, giving_back, ..
        } = self;
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

/// What was read so far: start -> end, disjoint, not touching.
#[derive(Default)]
struct ReadExtents(BTreeMap<u64, u64>);

impl ReadExtents {
    /// Takes a read in; the extent of reads that touch each other around it.
    fn add(&mut self, read: Extent) -> Extent {
        let (mut start, mut end) = (read.offset, read.end());
        while let Some((before, before_end)) = self
            .0
            .range(..=end)
            .next_back()
            .map(|(start, end)| (*start, *end))
            .filter(|(_, before_end)| *before_end >= start)
        {
            self.0.remove(&before);
            start = start.min(before);
            end = end.max(before_end);
        }
        self.0.insert(start, end);
        Extent::new(start, end - start)
    }
}

/// The part of `done` in which a cluster can lie that this read has completed.
fn around(done: &Extent, offset: u64, length: u64) -> Extent {
    let start = offset / MAX_CLUSTER_BYTES * MAX_CLUSTER_BYTES;
    let end = offset
        .saturating_add(length)
        .checked_next_multiple_of(MAX_CLUSTER_BYTES)
        .unwrap_or(u64::MAX);
    let (start, end) = (start.max(done.offset), end.min(done.end()));
    Extent::new(start, end.saturating_sub(start))
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
    fn reads_that_touch_are_one_in_whatever_order_they_come() {
        let mut read = ReadExtents::default();
        for (offset, length, done) in [
            (10, 10, (10, 10)),
            (30, 10, (30, 10)),
            (0, 5, (0, 5)),
            (20, 10, (10, 30)),
            (15, 3, (10, 30)),
            (5, 5, (0, 40)),
            (41, 1, (41, 1)),
        ] {
            let (start, length_done) = done;
            let expected = Extent::new(start, length_done);
            assert_eq!(
                read.add(Extent::new(offset, length)),
                expected,
                "{offset}+{length}"
            );
        }
        assert_eq!(read.0.len(), 2);
    }

    #[test]
    fn a_cluster_is_given_back_by_the_read_that_completes_it() {
        const MIB: u64 = 1 << 20;
        let done = Extent::new(3 * MIB, 40 * MIB);
        assert_eq!(
            around(&done, 20 * MIB, MIB),
            Extent::new(16 * MIB, 16 * MIB)
        );
        assert_eq!(around(&done, 3 * MIB, MIB), Extent::new(3 * MIB, 13 * MIB));
        assert_eq!(
            around(&done, 42 * MIB, MIB),
            Extent::new(32 * MIB, 11 * MIB)
        );
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
