//! Fulls against tracking that lies, and against tracking that does not.

use crate::hypervisor::Reading;
use crate::jobs::fake_vm::FakeVm;
use crate::jobs::{
    Alarm, AlarmKind, BackedUp, BackupSettings, Choice, JobErrorKind, Looked, Quiet, alarms,
    backup_vm, choose, due_now, good_instead, listed, status,
};
use crate::model::{PointId, PointKind, VmName};
use crate::policy::{DueReason, What};
use crate::repository::testing::{CHUNK, DAY, Dice, World, vm as vm_name};
use crate::repository::{Customer, PointReader, ReadScratch, Reader, RepositoryError};
use crate::storage::Storage;
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

const SETTINGS: BackupSettings = BackupSettings {
    chunk_bytes: CHUNK as u32,
    threads: 2,
};

fn web01() -> VmName {
    vm_name("web01")
}

/// A customer and a VM, night after night.
struct Nights {
    world: World,
    customer: Customer,
    vm: FakeVm,
}

impl Nights {
    fn new(disks: &[(&str, Vec<u8>)]) -> Self {
        let world = World::new();
        Nights {
            customer: world.open(),
            vm: FakeVm::new(disks),
            world,
        }
    }

    fn backup(&self, kind: PointKind) -> BackedUp {
        self.backup_with(kind, SETTINGS)
    }

    fn backup_with(&self, kind: PointKind, settings: BackupSettings) -> BackedUp {
        self.world.time.pass(DAY);
        let go_on = AtomicBool::new(false);
        let done = backup_vm(
            &self.customer,
            &web01(),
            &self.vm,
            kind,
            &settings,
            &Quiet,
            &go_on,
        );
        done.unwrap()
    }

    fn due_tomorrow(&self) -> (What, DueReason) {
        let now = self.world.now().checked_add(DAY).unwrap();
        let due = self
            .customer
            .with_state(|state| due_now(state, &web01(), now))
            .unwrap();
        (due.what, due.reason)
    }

    fn suspects(&self) -> Vec<PointId> {
        self.customer.with_state(|state| {
            listed(state, self.world.now())
                .iter()
                .filter(|(_, point)| point.suspect)
                .map(|(id, _)| *id)
                .collect()
        })
    }

    fn alarms(&self) -> Vec<Alarm> {
        let now = self.world.now();
        self.customer.with_state(|state| {
            let vms = status(state, &[web01()], now);
            alarms(state, &vms, &Looked::default(), now)
        })
    }

    fn restored(&self, point: &PointId) -> BTreeMap<String, Vec<u8>> {
        let point = PointReader::open(&self.customer, point).unwrap();
        let reader = Reader::new(&self.customer).unwrap();
        let mut scratch = ReadScratch::new().unwrap();
        let mut disks = BTreeMap::new();
        for disk in &point.disks {
            let mut bytes = vec![0; disk.shape().size_bytes as usize];
            let view = disk.view(&reader, &mut scratch).unwrap();
            for span in view.data_spans() {
                view.read_span(span, &mut scratch, |offset, plain| {
                    bytes[offset as usize..][..plain.len()].copy_from_slice(plain);
                    Ok::<(), RepositoryError>(())
                })
                .unwrap();
            }
            disks.insert(disk.name().to_string(), bytes);
        }
        disks
    }

    fn is_right(&self, point: &PointId) {
        for (name, bytes) in self.restored(point) {
            assert!(bytes == self.vm.bytes(&name), "{name} restores to others");
        }
    }
}

fn differing(done: &BackedUp) -> BTreeMap<String, u64> {
    done.audit
        .iter()
        .flat_map(|audit| &audit.disks)
        .map(|disk| (disk.name.to_string(), disk.differing_bytes))
        .collect()
}

/// Bytes of a disk: data, holes and zeros that a guest wrote.
fn content(dice: &mut Dice, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    for part in bytes.chunks_mut(CHUNK / 2) {
        if dice.below(3) > 0 {
            noise(dice, part);
        }
    }
    bytes
}

fn noise(dice: &mut Dice, bytes: &mut [u8]) {
    let step = dice.below(u64::MAX);
    let mut value = dice.below(u64::MAX);
    for part in bytes.chunks_mut(8) {
        value = value.wrapping_add(step | 1).rotate_left(7);
        part.copy_from_slice(&value.to_le_bytes()[..part.len()]);
    }
}

/// A day of the guest: writes and discards of any length at any place but in one chunk.
fn day(dice: &mut Dice, vm: &FakeVm, name: &str, spared: Option<usize>) {
    let size = vm.bytes(name).len();
    for _ in 0..dice.below(5) {
        let offset = dice.below(size as u64) as usize;
        let length = 1 + dice.below((size - offset).min(3 * CHUNK) as u64) as usize;
        let length = length.min(size - offset);
        let touched = offset / CHUNK..=(offset + length - 1) / CHUNK;
        if spared.is_some_and(|spared| touched.contains(&spared)) {
            continue;
        }
        let mut data = vec![0; length];
        if dice.below(4) > 0 {
            noise(dice, &mut data);
        }
        vm.write(name, offset as u64, &data);
    }
}

/// Changes something within one chunk behind tracking's back.
fn hide_in(dice: &mut Dice, vm: &FakeVm, name: &str, chunk: usize) {
    let bytes = vm.bytes(name);
    let end = bytes.len().min((chunk + 1) * CHUNK);
    let whole = &bytes[chunk * CHUNK..end];
    let zeroed = dice.below(3) == 0 && whole.iter().any(|byte| *byte != 0);
    match zeroed {
        true => vm.hide(name, (chunk * CHUNK) as u64, &vec![0; whole.len()]),
        false => {
            let from = dice.below(whole.len() as u64) as usize;
            let length = 1 + dice.below((whole.len() - from) as u64) as usize;
            let length = length.min(whole.len() - from);
            let other: Vec<u8> = whole[from..from + length]
                .iter()
                .map(|byte| !byte)
                .collect();
            vm.hide(name, (chunk * CHUNK + from) as u64, &other);
        }
    }
}

#[test]
fn every_hidden_change_is_reported_by_the_next_full() {
    for seed in 0..120 {
        let mut dice = Dice::new(seed);
        let size = 1 + dice.below(24 * CHUNK as u64) as usize;
        let (vda, vdb) = (content(&mut dice, size), content(&mut dice, CHUNK + 7));
        let nights = Nights::new(&[("vda", vda), ("vdb", vdb)]);
        let first = nights.backup(PointKind::Full);
        assert_eq!(first.audit, None, "seed {seed}");
        let count = dice.below(4);
        let hidden_before = dice.below(count + 1);
        let chunk = dice.below(size.div_ceil(CHUNK) as u64) as usize;
        let mut spared = None;
        let mut week = Vec::new();
        for night in 0..=count {
            if night > 0 {
                day(&mut dice, &nights.vm, "vda", spared);
                day(&mut dice, &nights.vm, "vdb", None);
                week.push(nights.backup(PointKind::Incremental).point);
            }
            // After this night's point, of which tracking still told the truth.
            if night == hidden_before {
                hide_in(&mut dice, &nights.vm, "vda", chunk);
                spared = Some(chunk);
            }
        }
        day(&mut dice, &nights.vm, "vda", spared);

        let full = nights.backup(PointKind::Full);
        let chunk_length = (size - chunk * CHUNK).min(CHUNK) as u64;
        let expected = [("vda".to_string(), chunk_length), ("vdb".to_string(), 0)];
        assert_eq!(differing(&full), expected.into(), "seed {seed}");
        assert!(
            full.notes.iter().any(|note| note.contains(&format!(
                "vda: tracking hid changes: {chunk_length} bytes differ outside of what it \
                 reported (offset+length: {}+{chunk_length})",
                chunk * CHUNK
            ))),
            "seed {seed}: {:?}",
            full.notes
        );
        nights.is_right(&full.point);
        assert_eq!(nights.suspects(), week, "seed {seed}");
        let reason = nights.due_tomorrow();
        assert!(
            matches!(reason, (What::Full, DueReason::Distrusted { .. })),
            "seed {seed}: {reason:?}"
        );

        // Whoever asks for an incremental gets a full, and it is clean: it stands on a full.
        day(&mut dice, &nights.vm, "vda", None);
        let clean = nights.backup(PointKind::Incremental);
        assert_eq!(clean.kind, PointKind::Full, "seed {seed}");
        let expected = [("vda".to_string(), 0), ("vdb".to_string(), 0)];
        assert_eq!(differing(&clean), expected.into(), "seed {seed}");
        nights.is_right(&clean.point);
        assert_eq!(nights.suspects(), week, "seed {seed}");
        let (_, reason) = nights.due_tomorrow();
        assert!(
            !matches!(
                reason,
                DueReason::Distrusted { .. } | DueReason::Suspect { .. }
            ),
            "seed {seed}"
        );
        day(&mut dice, &nights.vm, "vda", None);
        let next = nights.backup(PointKind::Incremental);
        assert_eq!(next.kind, PointKind::Incremental, "seed {seed}");
        nights.is_right(&next.point);
        assert_eq!(nights.suspects(), week, "seed {seed}");
    }
}

#[test]
fn honest_tracking_is_never_accused() {
    let (mut audits, mut left_out) = (0, 0);
    for seed in 0..120 {
        let mut dice = Dice::new(1000 + seed);
        let mut size = 1 + dice.below(20 * CHUNK as u64) as usize;
        let (vda, vdb) = (content(&mut dice, size), content(&mut dice, 3 * CHUNK));
        let nights = Nights::new(&[("vda", vda), ("vdb", vdb)]);
        nights.backup(PointKind::Full);
        for _ in 0..6 {
            day(&mut dice, &nights.vm, "vda", None);
            day(&mut dice, &nights.vm, "vdb", None);
            match dice.below(8) {
                0 => {
                    size += dice.below(3 * CHUNK as u64) as usize;
                    nights.vm.resize("vda", size as u64);
                }
                1 => {
                    size = size.div_ceil(2);
                    nights.vm.resize("vda", size as u64);
                }
                2 => nights.vm.forget_tracking(),
                3 => give_up_a_capture(&nights),
                4 => {
                    nights.vm.detach("vdb");
                    nights.vm.attach("vdb", content(&mut dice, CHUNK));
                }
                _ => {}
            }
            let kind = match dice.below(2) {
                0 => PointKind::Full,
                _ => PointKind::Incremental,
            };
            let settings = BackupSettings {
                chunk_bytes: match dice.below(6) {
                    0 => 2 * CHUNK as u32,
                    _ => CHUNK as u32,
                },
                ..SETTINGS
            };
            let done = nights.backup_with(kind, settings);
            assert_eq!(done.kind, kind);
            assert!(
                differing(&done).values().all(|bytes| *bytes == 0),
                "seed {seed}: {done:?}"
            );
            audits += differing(&done).len();
            left_out += done
                .notes
                .iter()
                .filter(|note| note.contains("not audited"))
                .count();
            nights.is_right(&done.point);
            assert_eq!(nights.suspects(), [], "seed {seed}");
        }
        let readings = nights.vm.readings();
        assert!(readings.contains(&Reading::Everything));
    }
    assert!(audits > 300 && left_out > 50, "{audits}, {left_out}");
}

fn give_up_a_capture(nights: &Nights) {
    let stop = AtomicBool::new(true);
    let given_up = backup_vm(
        &nights.customer,
        &web01(),
        &nights.vm,
        PointKind::Full,
        &SETTINGS,
        &Quiet,
        &stop,
    );
    assert_eq!(given_up.unwrap_err().kind, JobErrorKind::Interrupted);
}

#[test]
fn a_disk_of_several_spans_is_compared_to_its_end_and_told_by_its_first_extents() {
    let chunks = 2 * 256 + 9;
    let mut bytes = vec![0; chunks * CHUNK + 100];
    for chunk in (0..chunks).step_by(7) {
        bytes[chunk * CHUNK] = 1;
    }
    let nights = Nights::new(&[("vda", bytes)]);
    nights.backup(PointKind::Full);
    nights.vm.write("vda", 5, b"seen");
    let incremental = nights.backup(PointKind::Incremental);
    for chunk in [3, 4, 255, 256, 300, 302, 304, 511, chunks] {
        nights.vm.hide("vda", (chunk * CHUNK) as u64 + 9, b"unseen");
    }
    // What is hidden in a chunk that also changed openly is read by an incremental as well.
    nights.vm.write("vda", 400 * CHUNK as u64, b"seen");
    nights.vm.hide("vda", 400 * CHUNK as u64 + 50, b"unseen");
    let full = nights.backup(PointKind::Full);
    let hidden = 8 * CHUNK + 100;
    assert_eq!(differing(&full)["vda"], hidden as u64);
    let places = [(3, 2), (255, 2), (300, 1), (302, 1)]
        .map(|(chunk, count)| format!("{}+{}", chunk * CHUNK, count * CHUNK));
    let note = format!("offset+length: {}, …)", places.join(", "));
    assert!(full.notes[0].ends_with(&note), "{:?}", full.notes);
    nights.is_right(&full.point);
    assert_eq!(nights.suspects(), [incremental.point]);
}

#[test]
fn a_full_never_fails_for_want_of_an_audit() {
    type Harm = fn(&Nights, &PointId);
    let harms: [(Harm, &str); 3] = [
        (
            |nights, point| {
                let record = nights.customer.names().point(point);
                nights.world.memory.destroy(&record).unwrap();
            },
            "the newest restore point cannot be opened",
        ),
        // Of a small disk the root, which is read to plan; of a large one what a span compares.
        (
            |nights, _| {
                for pack in nights.world.packs() {
                    nights.world.memory.delete(&pack).unwrap();
                }
                // The full must not rely on what was whole a week ago.
                nights.world.time.pass(DAY * 9);
            },
            "vda: tracking not audited",
        ),
        (|nights, _| nights.vm.forget_tracking(), "no tracking since"),
    ];
    for (harm, reason) in harms {
        for chunks in [3, 300] {
            let mut bytes = vec![0; chunks * CHUNK];
            bytes[0] = 1;
            let nights = Nights::new(&[("vda", bytes)]);
            nights.backup(PointKind::Full);
            nights.vm.write("vda", CHUNK as u64, b"seen");
            let point = nights.backup(PointKind::Incremental).point;
            nights.vm.hide("vda", 0, b"unseen");
            harm(&nights, &point);
            let full = nights.backup(PointKind::Full);
            assert_eq!(full.audit, None, "{reason}");
            assert!(
                full.notes.iter().any(|note| note.contains(reason)),
                "{:?}",
                full.notes
            );
            nights.is_right(&full.point);
            assert_eq!(nights.suspects(), []);
        }
    }
}

#[test]
fn where_a_part_cannot_be_compared_only_what_was_found_elsewhere_counts() {
    for (chunk, found) in [(299, None), (0, Some(CHUNK as u64))] {
        let mut bytes = vec![0; 300 * CHUNK];
        bytes[0] = 1;
        bytes[299 * CHUNK] = 1;
        let nights = Nights::new(&[("vda", bytes)]);
        nights.backup(PointKind::Full);
        let packs_of_the_full = nights.world.packs();
        nights.vm.write("vda", CHUNK as u64, b"seen");
        nights.backup(PointKind::Incremental);
        // The node of the second span stands in them alone; it is needed where that span differs.
        for pack in &packs_of_the_full {
            nights.world.memory.delete(pack).unwrap();
        }
        nights.world.time.pass(DAY * 9);
        nights.vm.write("vda", 298 * CHUNK as u64, b"seen");
        nights.vm.hide("vda", (chunk * CHUNK) as u64, b"unseen");
        let full = nights.backup(PointKind::Full);
        assert_eq!(differing(&full).get("vda").copied(), found);
        let said = full.notes.iter().any(|note| note.contains("not audited"));
        assert_eq!(said, found.is_none(), "{:?}", full.notes);
        nights.is_right(&full.point);
    }
}

#[test]
fn a_difference_is_told_once_and_heard_until_an_audit_is_clean() {
    let mut dice = Dice::new(7);
    let nights = Nights::new(&[("vda", content(&mut dice, 9 * CHUNK))]);
    nights.backup(PointKind::Full);
    let good = nights.backup(PointKind::Incremental);
    nights.backup(PointKind::Full);
    nights.vm.hide("vda", 70_000, b"unseen");
    let suspect = nights.backup(PointKind::Incremental);
    assert!(suspect.kind == PointKind::Incremental && nights.suspects().is_empty());
    let found = nights.backup(PointKind::Full);
    assert_eq!(nights.suspects(), [suspect.point]);
    let told = |kind: AlarmKind| -> Vec<String> {
        nights
            .alarms()
            .into_iter()
            .filter(|alarm| alarm.kind == kind)
            .map(|alarm| alarm.text)
            .collect()
    };
    let distrusted = told(AlarmKind::Distrusted);
    assert_eq!(distrusted.len(), 1);
    assert!(
        distrusted[0].starts_with(
            "tracking of web01/vda hid changes: 65536 bytes outside of what it reported"
        ) && distrusted[0].ends_with("fulls until an audit is clean"),
        "{distrusted:?}"
    );
    assert_eq!(told(AlarmKind::Suspect).len(), 1);

    // It lies again, and again is found out; the fulls are right.
    for _ in 0..3 {
        nights.vm.hide("vda", 0, &[dice.below(250) as u8 + 1; 40]);
        let again = nights.backup(PointKind::Incremental);
        assert_eq!(again.kind, PointKind::Full);
        assert_eq!(differing(&again)["vda"], CHUNK as u64);
        nights.is_right(&again.point);
        assert_eq!(nights.suspects(), [suspect.point]);
        assert_eq!(told(AlarmKind::Distrusted).len(), 1);
    }
    // An audit that cannot be done is not a clean one.
    nights.vm.forget_tracking();
    nights.backup(PointKind::Full);
    assert_eq!(told(AlarmKind::Distrusted).len(), 1);
    assert_eq!(nights.due_tomorrow().0, What::Full);
    nights.backup(PointKind::Full);
    assert_eq!(told(AlarmKind::Distrusted).len(), 0);
    // The night stays one that may not restore.
    assert_eq!(told(AlarmKind::Suspect).len(), 1);

    nights.customer.with_state(|state| {
        let points = listed(state, nights.world.now());
        let (instead, _) = good_instead(&points, &suspect.point).unwrap();
        assert_eq!(instead, found.point);
        // With nothing later, the newest before.
        let early: Vec<_> = points
            .iter()
            .copied()
            .filter(|(_, point)| point.taken_at <= suspect.taken_at)
            .collect();
        let (instead, point) = good_instead(&early, &suspect.point).unwrap();
        assert!(point.taken_at > good.taken_at && instead != suspect.point);
        // A date still means what it says; whoever restores is told.
        let bound = Some(suspect.taken_at);
        assert_eq!(
            choose(&points, &web01(), bound),
            Choice::Point(suspect.point)
        );
    });
}
