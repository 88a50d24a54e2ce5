//! What a restore that is interrupted still does, and what it leaves.

use crate::hypervisor::CaptureError;
use crate::hypervisor::target::{ImageTarget, RawTarget, SyncedTarget};
use crate::jobs::testing::{Lab, back_up};
use crate::jobs::{JobErrorKind, Quiet, RestoreTarget, restore};
use crate::model::Extent;
use crate::policy::PolicyTerms;
use crate::repository::PointReader;
use crate::repository::testing::image;
use crate::storage::Memory;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Interrupts its restore while a certain chunk is written.
struct Interrupting {
    file: RawTarget,
    at: usize,
    written: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
}

impl ImageTarget for Interrupting {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), CaptureError> {
        if self.written.fetch_add(1, Ordering::Relaxed) + 1 == self.at {
            self.stop.store(true, Ordering::Relaxed);
        }
        self.file.write_at(offset, data)
    }

    fn zero(&self, range: Extent) -> Result<(), CaptureError> {
        self.file.zero(range)
    }

    fn sync(self: Box<Self>) -> Result<SyncedTarget, CaptureError> {
        Box::new(self.file).sync()
    }
}

#[test]
fn a_restore_that_is_interrupted_writes_no_further_chunk_and_leaves_no_file() {
    let lab = Lab::new(Arc::new(Memory::new()), &PolicyTerms::default());
    let customer = lab.open();
    // In one span.
    let bytes = image(&[1, 2, 3, 4, 5]);
    let id = back_up(&customer, "web", &bytes, true);
    let point = PointReader::open(&customer, &id).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let restored_until = |at| {
        let (written, stop) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let target = RestoreTarget {
            disk: point.disks[0].name().clone(),
            target: Box::new(Interrupting {
                file: RawTarget::create(folder.path(), "vda.raw", bytes.len() as u64).unwrap(),
                at,
                written: Arc::clone(&written),
                stop: stop.clone(),
            }),
        };
        let told = restore(&customer, &point, vec![target], 1, &Quiet, &stop);
        (told, written.load(Ordering::Relaxed))
    };
    for at in 1..=5 {
        let (told, written) = restored_until(at);
        assert_eq!(told.unwrap_err().kind, JobErrorKind::Interrupted);
        assert_eq!(written, at);
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);
    }
    let (told, written) = restored_until(6);
    assert!(told.is_ok());
    assert_eq!(written, 5);
    assert_eq!(std::fs::read(folder.path().join("vda.raw")).unwrap(), bytes);
}
