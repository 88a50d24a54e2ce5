use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use super::super::host::{path_text, tool};
use super::image::{Format, Image};

const RECORD_BYTES: usize = 4096;
const MAGIC: &[u8] = b"SEQREC02";
/// Which of the record's numbers, of 8 bytes each, is what.
const NUMBER: usize = 1;
const CHECKSUM: usize = 2;
const SLOTS: usize = 3;

/// What an image says about the instant it was taken at.
#[derive(Debug, Clone)]
pub struct Checked {
    /// The last record.
    pub max_seq: u64,
    /// Good records.
    pub count: u64,
    /// Records that are missing among the last ones, which the ring should all have.
    pub gaps: Vec<u64>,
    /// Slots with something else than a good record.
    pub damaged: u64,
    /// That the last record lies in its slot.
    pub last_ok: bool,
    /// Exit code of the `e2fsck` that may repair: 0, or 1 after the journal was replayed.
    pub fsck_before: i32,
    /// Exit code of the one after it that may not: 0 is clean.
    pub fsck_after: i32,
    /// The file system was in use at that instant and not frozen.
    pub journal_replayed: bool,
    /// What the first `e2fsck` said.
    pub fsck_said: String,
}

impl Checked {
    /// Whether the image can be that of a disk at one instant.
    pub fn is_whole(&self) -> bool {
        self.max_seq > 0
            && self.gaps.is_empty()
            && self.damaged == 0
            && self.last_ok
            && self.fsck_before <= 1
            && self.fsck_after == 0
    }
}

/// Looks at a copy of the image, which itself stays as it is.
#[track_caller]
pub fn check_image(path: &Path, format: Format) -> Checked {
    let folder = tempfile::tempdir().unwrap();
    let image = Image {
        path: path.to_owned(),
        format,
    };
    let copy = image.raw_copy(&folder.path().join("copy"));
    let copy = path_text(&copy);
    let first = e2fsck("-fy", copy);
    let second = e2fsck("-fn", copy);
    let fsck_said = String::from_utf8_lossy(&[first.stdout, first.stderr].concat()).into_owned();

    let dumped = folder.path().join("seq.dat");
    let request = format!("dump /seq.dat {}", path_text(&dumped));
    tool("debugfs", &["-R", &request, copy]);
    let ring = fs::read(&dumped).unwrap_or_default();
    let records = Records::read(&ring);
    Checked {
        max_seq: records.last(),
        count: records.numbers.len() as u64,
        gaps: records.gaps(),
        damaged: records.damaged,
        last_ok: records.last_lies_in_its_slot(&ring),
        fsck_before: first.status.code().unwrap_or(-1),
        fsck_after: second.status.code().unwrap_or(-1),
        journal_replayed: fsck_said.contains("recovering journal"),
        fsck_said,
    }
}

/// Raw images of the disks of one guest, in its order, were all taken at the same instant.
#[track_caller]
pub fn assert_one_instant(raw_images: &[&Path]) -> Vec<Checked> {
    one_instant(raw_images).unwrap_or_else(|error| panic!("{error}"))
}

/// The guest writes a record to the next disk only when it is safe on the one before: a disk is
/// never ahead of the one before it, and all together are at most one record apart.
pub fn one_instant(raw_images: &[&Path]) -> Result<Vec<Checked>, String> {
    let mut all = Vec::new();
    for path in raw_images {
        let checked = check_image(path, Format::Raw);
        if !checked.is_whole() {
            return Err(format!("{}: {checked:#?}", path.display()));
        }
        all.push(checked);
    }
    let last: Vec<u64> = all.iter().map(|checked| checked.max_seq).collect();
    let apart = last.first().zip(last.last());
    if !last.is_sorted_by(|before, next| before >= next)
        || apart.is_some_and(|(first, end)| first - end > 1)
    {
        return Err(format!("not one instant: last records {last:?}"));
    }
    Ok(all)
}

#[track_caller]
fn e2fsck(mode: &str, image: &str) -> Output {
    Command::new("e2fsck")
        .args([mode, image])
        .output()
        .unwrap_or_else(|error| panic!("cannot run e2fsck ({error}); scripts/test installs it"))
}

/// The good records of a ring, whose layout is that of `guest/writer.c`.
#[derive(Default)]
struct Records {
    numbers: BTreeSet<u64>,
    slots: u64,
    damaged: u64,
}

impl Records {
    fn read(ring: &[u8]) -> Self {
        let mut records = Records::default();
        for bytes in ring.chunks(RECORD_BYTES) {
            if is_good(bytes) {
                records.numbers.insert(field(bytes, NUMBER));
                records.slots = field(bytes, SLOTS);
            // Slot 0 is skipped in the first round.
            } else if bytes.iter().any(|byte| *byte != 0) {
                records.damaged += 1;
            }
        }
        records
    }

    fn last(&self) -> u64 {
        self.numbers.last().copied().unwrap_or(0)
    }

    fn gaps(&self) -> Vec<u64> {
        let last = self.last();
        let first = (last + 1).saturating_sub(self.slots).max(1);
        (first..=last)
            .filter(|number| !self.numbers.contains(number))
            .collect()
    }

    fn last_lies_in_its_slot(&self, ring: &[u8]) -> bool {
        let Some(slot) = self.last().checked_rem(self.slots) else {
            return false;
        };
        ring.chunks(RECORD_BYTES)
            .nth(slot as usize)
            .is_some_and(|bytes| is_good(bytes) && field(bytes, NUMBER) == self.last())
    }
}

fn field(bytes: &[u8], place: usize) -> u64 {
    u64::from_le_bytes(bytes[place * 8..place * 8 + 8].try_into().unwrap())
}

fn is_good(bytes: &[u8]) -> bool {
    bytes.len() == RECORD_BYTES
        && bytes.starts_with(MAGIC)
        && checksum_of(bytes) == field(bytes, CHECKSUM)
}

/// FNV-1a over the record with zero in the place of the checksum.
fn checksum_of(bytes: &[u8]) -> u64 {
    let own_place = CHECKSUM * 8..CHECKSUM * 8 + 8;
    let bytes = bytes.iter().enumerate();
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash: u64, (place, byte)| {
        let byte = if own_place.contains(&place) { 0 } else { *byte };
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// A good record of a ring with 4096 slots, for tests of the check itself. (Its filling is not
/// that of the guest's.)
pub fn record(number: u64) -> Vec<u8> {
    let mut bytes = vec![number as u8; RECORD_BYTES];
    let mut put = |place: usize, value: u64| {
        bytes[place * 8..place * 8 + 8].copy_from_slice(&value.to_le_bytes());
    };
    put(NUMBER, number);
    put(SLOTS, 4096);
    bytes[..MAGIC.len()].copy_from_slice(MAGIC);
    let checksum = checksum_of(&bytes);
    bytes[CHECKSUM * 8..CHECKSUM * 8 + 8].copy_from_slice(&checksum.to_le_bytes());
    bytes
}
