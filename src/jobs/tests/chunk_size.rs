//! Chunks of every size that a configuration may ask for.

use crate::jobs::fake_vm::FakeVm;
use crate::jobs::{BackupSettings, Quiet, backup_vm};
use crate::model::{MAX_CHUNK_BYTES, MIN_CHUNK_BYTES, PointKind};
use crate::repository::testing::{World, vm};
use crate::repository::{PointReader, ReadScratch, Reader, RepositoryError};
use std::sync::atomic::AtomicBool;

#[test]
fn chunks_smaller_and_larger_than_one_read_restore_exactly() {
    let bytes: Vec<u8> = (0..5 * MAX_CHUNK_BYTES / 2 + 513)
        .map(|at| (at ^ (at >> 9)) as u8 | 1)
        .collect();
    let mut chunk_bytes = MIN_CHUNK_BYTES;
    while chunk_bytes <= MAX_CHUNK_BYTES {
        let world = World::new();
        let customer = world.open();
        let settings = BackupSettings {
            chunk_bytes,
            threads: 2,
        };
        let done = backup_vm(
            &customer,
            &vm("web01"),
            &FakeVm::new(&[("root", bytes.clone())]),
            PointKind::Full,
            &settings,
            &Quiet,
            &AtomicBool::new(false),
        )
        .unwrap();
        let point = PointReader::open(&customer, &done.point).unwrap();
        let reader = Reader::new(&customer).unwrap();
        let mut scratch = ReadScratch::new().unwrap();
        let disk = &point.disks[0];
        assert_eq!(disk.shape().chunk_bytes, chunk_bytes);
        let mut restored = vec![0; disk.shape().size_bytes as usize];
        let view = disk.view(&reader, &mut scratch).unwrap();
        for span in view.data_spans() {
            view.read_span(span, &mut scratch, |offset, plain| {
                restored[offset as usize..][..plain.len()].copy_from_slice(plain);
                Ok::<(), RepositoryError>(())
            })
            .unwrap();
        }
        assert!(restored[..bytes.len()] == bytes, "chunks of {chunk_bytes}");
        chunk_bytes *= 2;
    }
}
