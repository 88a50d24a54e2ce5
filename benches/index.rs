//! `cargo bench --bench index`: the index of a repository of 5 TB. Prints Markdown.
//!
//! Writes 80 million made-up records into a folder as a merge would leave them, then, in a process
//! of its own that has read none of it before, opens them as every command does (each byte hashed,
//! each record checked), and looks tags up on one core: half of them known, which reads one record
//! from the store each, half unknown.
//!
//! Wanted: opened in under 2 s, 1 million lookups a second, under 1 GiB of memory. The folder's pages
//! are in the system's cache; the first opening after a start of the machine waits for the disk.
//!
//! Environment: `VMKEEP_BENCH_DIR` (where; default the temporary folder; 2.5 GB),
//! `VMKEEP_BENCH_RECORDS` (default 80000000).

use jiff::Timestamp;
use std::path::Path;
use std::process::Command;
use std::time::Instant;
use vmkeep::format::names::{CustomerNames, ObjectRole};
use vmkeep::format::pack::PackKind;
use vmkeep::format::segment::{PackRow, Record, SegmentBuilder};
use vmkeep::model::{ObjectHash, PackName, SegmentName, SessionId, Tag};
use vmkeep::repository::{Index, State, WriteSettings};
use vmkeep::storage::{Directory, Storage};

const OPEN: &str = "VMKEEP_BENCH_INDEX_TO_OPEN";
const PACK_BYTES: u64 = 16 << 20;
const FRAME_BYTES: u32 = 60_000;
const LOOKUPS: u64 = 4_000_000;

fn main() {
    // `cargo test --benches` calls it too; it has no tests.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let records = std::env::var("VMKEEP_BENCH_RECORDS").map_or(80_000_000, |text| {
        text.parse().expect("a number of records")
    });
    if let Some(folder) = std::env::var_os(OPEN) {
        return open(Path::new(&folder), records);
    }
    let folder = tempfile::Builder::new()
        .prefix("vmkeep-index.")
        .tempdir_in(
            std::env::var_os("VMKEEP_BENCH_DIR").unwrap_or_else(|| std::env::temp_dir().into()),
        )
        .expect("a folder");
    write(folder.path(), records);
    println!(
        "| records | segments | opened | lookups a second | index in memory | bytes a record |"
    );
    println!("|--:|--:|--:|--:|--:|--:|");
    for _ in 0..3 {
        let program = std::env::current_exe().expect("this program");
        let status = Command::new(program)
            .arg("--bench")
            .env(OPEN, folder.path())
            .status();
        assert!(status.expect("this program runs").success());
    }
}

/// The `at`-th of all tags in ascending order: evenly spread with some noise, as hashes are.
fn tag(at: u64, records: u64) -> Tag {
    let noise = blake3::hash(&at.to_le_bytes());
    let step = u64::MAX / records;
    let mut bytes = [0; 16];
    let (high, low) = bytes.split_at_mut(8);
    let (first, rest) = noise.as_bytes().split_at(8);
    let jitter = u64::from_le_bytes(first.try_into().expect("8 bytes")) % step;
    high.copy_from_slice(&(at * step + jitter).to_be_bytes());
    low.copy_from_slice(&rest[..8]);
    Tag::from_bytes(bytes)
}

fn names() -> CustomerNames {
    CustomerNames::new(&"acme".parse().expect("a customer name"))
}

fn write(folder: &Path, records: u64) {
    let storage = Directory::init(folder, 0).expect("a store");
    let session = SessionId::from_bytes([7; 16]);
    let in_pack = PACK_BYTES / u64::from(FRAME_BYTES);
    let packs: Vec<PackRow> = (0..records.div_ceil(in_pack))
        .map(|number| PackRow {
            name: PackName {
                session,
                hash: ObjectHash::from_bytes(*blake3::hash(&number.to_le_bytes()).as_bytes()),
            },
            size_bytes: PACK_BYTES,
            frames: in_pack as u32,
            kind: PackKind::Data,
        })
        .collect();
    let mut from = 0;
    while from < records {
        let to = records.min(from + WriteSettings::default().segment_records as u64);
        let mut segment = SegmentBuilder::new(&session, &[0; 16], &packs, (to - from) as usize);
        for at in from..to {
            // The order of tags has nothing to do with that of the packs.
            let frame = at.wrapping_mul(0x9e37_79b9_7f4a_7c15) % records;
            segment.push(Record {
                tag: tag(at, records),
                pack: (frame / in_pack) as u32,
                offset: 48 + (frame % in_pack) as u32 * FRAME_BYTES,
                length_bytes: FRAME_BYTES,
            });
        }
        let bytes = segment.finish((tag(from, records), tag(to - 1, records)));
        let name = SegmentName {
            session,
            hash: ObjectHash::from_bytes(*blake3::hash(&bytes).as_bytes()),
        };
        let created = storage.create(&names().segment(&name), &bytes);
        created.expect("the segment is written");
        from = to;
    }
}

fn open(folder: &Path, records: u64) {
    let storage = Directory::open(folder).expect("the store");
    let mut state = State::default();
    for object in storage.list("").expect("a listing") {
        if let ObjectRole::Segment(name) = names().role(&object.name) {
            state.segments.insert(name, Timestamp::UNIX_EPOCH);
        }
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let before = resident_bytes();
    let start = Instant::now();
    let index = Index::load(&storage, &names(), &state, None, threads).expect("the index opens");
    let opened = start.elapsed().as_secs_f64();
    let memory = resident_bytes() - before;
    assert_eq!(index.records() as u64, records);
    let wanted: Vec<Tag> = (0..LOOKUPS)
        .map(|n| {
            let at = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % records;
            match n % 2 {
                0 => tag(at, records),
                _ => {
                    let unknown = blake3::hash(&(records + at).to_le_bytes());
                    Tag::from_bytes(unknown.as_bytes()[..16].try_into().expect("16 bytes"))
                }
            }
        })
        .collect();
    let start = Instant::now();
    let mut found = 0;
    for tag in &wanted {
        found += index.places(tag).expect("the index is read").len() as u64;
    }
    let rate = LOOKUPS as f64 / start.elapsed().as_secs_f64();
    assert_eq!(found, LOOKUPS / 2);
    println!(
        "| {records} | {} | {opened:.2} s | {:.2} million | {} MiB | {:.1} |",
        state.segments.len(),
        rate / 1e6,
        memory >> 20,
        memory as f64 / records as f64
    );
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("the process's state");
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.expect("the most memory it had") << 10
}
