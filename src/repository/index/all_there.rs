//! The index of all that a store holds, where no ledger says what of it counts. Only for reading: a piece is right
//! by its id, wherever it stands.
//!
//! Memory: as ever for what segments list; 33 bytes for each frame that none does, and 28 more while they are sorted.

use super::super::directory::{ListedPacks, directory_of, listed_packs};
use super::open_segment::{OpenSegment, Unread};
use super::{IN_MEMORY_BYTES, Index, LiveRecords, Tables, count_uses};
use crate::format::names::{CustomerNames, ObjectRole};
use crate::format::pack::{DirectoryEntry, PackKind};
use crate::format::segment::{PackRow, Record, build};
use crate::model::{PackName, SegmentName, SessionId};
use crate::repository::{RepositoryError, WriteSettings};
use crate::storage::Storage;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Of the segments that are made here.
const NO_SESSION: SessionId = SessionId::from_bytes([0; SessionId::BYTES]);

type Segments = BTreeMap<SegmentName, (Arc<OpenSegment>, Vec<PackRow>)>;

impl Index {
    /// Every segment that is whole; and the directory of each pack of which they do not list every frame, or nothing
    /// would be found where a segment is lost. What of both cannot be read goes into `passed_over`.
    pub(in super::super) fn of_all_there(
        storage: &dyn Storage,
        names: &CustomerNames,
        settings: &WriteSettings,
        seq: u64,
        passed_over: &mut Vec<RepositoryError>,
    ) -> Result<Self, RepositoryError> {
        let mut segments = whole_segments(storage, names, passed_over)?;
        let packs = listed_packs(storage, names)?;
        let index = Index::of_segments(&segments, &packs, seq);
        let uses = count_uses(&index, &LiveRecords::none_of(&index))?;
        let is_listed = |name: &PackName| {
            index.number_of(name).is_some_and(|number| {
                let known = uses.get(number as usize).map(|usage| usage.known_frames);
                let row = index.pack(number).map(|info| u64::from(info.row.frames));
                known == row
            })
        };
        let unlisted = packs.iter().filter(|(name, _)| !is_listed(name));
        let unlisted: Vec<(PackName, u64)> = unlisted.map(|(name, size)| (*name, *size)).collect();
        if unlisted.is_empty() {
            return Ok(index);
        }
        drop(index);
        let mut making = Making::default();
        let at_once = settings.threads.max(storage.reads_at_once()).max(1);
        for some in unlisted.chunks(at_once) {
            for (row, read) in some.iter().zip(read_directories(storage, names, some)) {
                match read {
                    Ok(directory) => making.add(row, &directory),
                    Err(error) if error.is_of_one_object() => passed_over.push(error),
                    Err(error) => return Err(error),
                }
            }
            if making.records.len() >= settings.segment_records {
                making.end(names, &mut segments)?;
            }
        }
        making.end(names, &mut segments)?;
        Ok(Index::of_segments(&segments, &packs, seq))
    }

    fn of_segments(segments: &Segments, packs: &ListedPacks, seq: u64) -> Self {
        let mut tables = Tables::default();
        for (name, (segment, rows)) in segments {
            tables.add(*name, segment.clone(), rows.iter().copied());
        }
        for info in &mut tables.packs {
            // A reader tries these last.
            info.deleted = !packs.contains_key(&info.row.name);
        }
        Index {
            seq,
            tables: Arc::new(tables),
        }
    }
}

fn whole_segments(
    storage: &dyn Storage,
    names: &CustomerNames,
    passed_over: &mut Vec<RepositoryError>,
) -> Result<Segments, RepositoryError> {
    let mut segments = Segments::new();
    let mut taken_bytes = 0;
    for object in storage.list(&names.segments_prefix())? {
        let ObjectRole::Segment(name) = names.role(&object.name) else {
            continue;
        };
        let room = IN_MEMORY_BYTES.saturating_sub(taken_bytes);
        let opened = Unread::open(storage, names, &name, room);
        match opened.and_then(Unread::check) {
            Ok((segment, rows)) => {
                taken_bytes += segment.memory_bytes;
                segments.insert(name, (Arc::new(segment), rows));
            }
            Err(error) if error.is_of_one_object() => passed_over.push(error),
            Err(error) => return Err(error),
        }
    }
    Ok(segments)
}

type Directory = (PackKind, Vec<DirectoryEntry>);

/// All at once, each by a thread of its own: of a far store each is waited for.
fn read_directories(
    storage: &dyn Storage,
    names: &CustomerNames,
    packs: &[(PackName, u64)],
) -> Vec<Result<Directory, RepositoryError>> {
    std::thread::scope(|scope| {
        let read = |(name, size_bytes): &(PackName, u64)| {
            let (object, size_bytes) = (names.pack(name), *size_bytes);
            scope.spawn(move || directory_of(storage, &object, size_bytes))
        };
        let reading: Vec<_> = packs.iter().map(read).collect();
        let joined = reading.into_iter().map(|thread| match thread.join() {
            Ok(directory) => directory,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        joined.collect()
    })
}

/// A segment that is filled by directories.
#[derive(Default)]
struct Making {
    packs: Vec<PackRow>,
    records: Vec<Record>,
}

impl Making {
    fn add(&mut self, (name, size_bytes): &(PackName, u64), (kind, entries): &Directory) {
        let pack = self.packs.len() as u32;
        self.packs.push(PackRow {
            name: *name,
            size_bytes: *size_bytes,
            frames: entries.len() as u32,
            kind: *kind,
        });
        self.records.extend(entries.iter().map(|entry| Record {
            tag: entry.tag,
            pack,
            offset: entry.offset,
            length_bytes: entry.length_bytes,
        }));
    }

    fn end(
        &mut self,
        names: &CustomerNames,
        segments: &mut Segments,
    ) -> Result<(), RepositoryError> {
        let Making { packs, mut records } = std::mem::take(self);
        if packs.is_empty() {
            return Ok(());
        }
        let bytes = build(&NO_SESSION, &[0; 16], &packs, &mut records);
        drop(records);
        let unread = Unread::made(names, NO_SESSION, bytes);
        let name = unread.name;
        let (segment, rows) = unread.check()?;
        segments.insert(name, (Arc::new(segment), rows));
        Ok(())
    }
}
