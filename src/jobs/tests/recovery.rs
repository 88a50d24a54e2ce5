//! What a source could not put right before the night.

use crate::jobs::fake_vm::FakeVm;
use crate::jobs::{BackedUp, BackupSettings, JobError, Quiet, backup_vm};
use crate::model::PointKind;
use crate::repository::testing::{CHUNK, World, vm};
use std::sync::atomic::AtomicBool;

fn backup(world: &World, fake: &FakeVm, stop: bool) -> Result<BackedUp, JobError> {
    let settings = BackupSettings {
        chunk_bytes: CHUNK as u32,
        threads: 1,
    };
    backup_vm(
        &world.open(),
        &vm("web01"),
        fake,
        PointKind::Full,
        &settings,
        &Quiet,
        &AtomicBool::new(stop),
    )
}

#[test]
fn what_a_source_could_not_put_right_is_told_whether_the_night_fails_or_not() {
    let world = World::new();
    let fake = FakeVm::new(&[("root", vec![7; CHUNK])]);
    fake.leaves("the guest may still be frozen");
    let done = backup(&world, &fake, false).unwrap();
    assert_eq!(done.notes, ["the guest may still be frozen"]);
    let error = backup(&world, &fake, true).unwrap_err();
    assert!(error.message.contains("may still be frozen"), "{error}");
}
