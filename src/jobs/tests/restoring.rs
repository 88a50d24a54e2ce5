//! What a restore that is interrupted still does, and what it leaves; and what it does about damage.

use crate::format::pack::{FRAME_HEADER_BYTES, HEADER_BYTES, PackKind};
use crate::hypervisor::CaptureError;
use crate::hypervisor::target::{ImageTarget, RawTarget, SyncedTarget};
use crate::jobs::testing::{Lab, back_up};
use crate::jobs::{JobErrorKind, Quiet, RestoreTarget, restore};
use crate::model::{Extent, ObjectName};
use crate::policy::PolicyTerms;
use crate::repository::testing::{self, DAY, image};
use crate::repository::{PackInfo, PointReader};
use crate::storage::{Memory, Storage};
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

fn flip_a_bit(memory: &Memory, name: &ObjectName) {
    let mut bytes = memory.read(name, u64::MAX).unwrap();
    bytes[HEADER_BYTES + FRAME_HEADER_BYTES + 20] ^= 1;
    memory.plant(name, &bytes);
}

fn lose(memory: &Memory, name: &ObjectName) {
    memory.delete(name).unwrap();
}

#[test]
fn what_a_restore_finds_damaged_in_a_fresh_pack_is_stored_anew_by_the_next_full() {
    let ways: [fn(&Memory, &ObjectName); 2] = [flip_a_bit, lose];
    for damage in ways {
        let memory = Memory::new();
        let lab = Lab::new(Arc::new(memory.clone()), &PolicyTerms::default());
        let customer = lab.open();
        let bytes = image(&[1, 2, 3, 4, 5]);
        let id = back_up(&customer, "web", &bytes, true);
        let index = customer.load_index().unwrap();
        let is_data = |info: &&PackInfo| info.row.kind == PackKind::Data;
        let pack = index.packs().iter().find(is_data).unwrap();
        damage(&memory, &customer.names().pack(&pack.row.name));

        let point = PointReader::open(&customer, &id).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let target = RawTarget::create(folder.path(), "vda.raw", bytes.len() as u64).unwrap();
        let target = RestoreTarget {
            disk: point.disks[0].name().clone(),
            target: Box::new(target),
        };
        let never = AtomicBool::new(false);
        let told = restore(&customer, &point, vec![target], 1, &Quiet, &never);
        assert!(told.unwrap_err().is_damage());
        assert_eq!(folder.path().read_dir().unwrap().count(), 0);

        lab.pass(DAY);
        let full = back_up(&customer, "web", &bytes, true);
        for point in [id, full] {
            assert!(testing::restore(&customer, &point).unwrap() == bytes);
        }
    }
}
