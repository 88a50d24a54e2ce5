//! Where tags stand: all current segments of a customer, searched together.
//!
//! Memory: 4.5 to 5 bytes a record. The records themselves stay in the store, which is asked for one only
//! where 32 bits of its tag fit; but the first [`IN_MEMORY_BYTES`] of them are kept, so that the
//! index of most hosts needs no asking. And 150 bytes a pack.

mod noted;
mod open_segment;

pub(super) use noted::NotedRecords;
pub use noted::{LiveRecords, count_uses, frame_bytes_of};

use super::RepositoryError;
use super::ledger::State;
use crate::format::names::CustomerNames;
use crate::format::segment::{PackRow, Record};
use crate::model::{PackName, SegmentName, SessionId, Tag};
use crate::storage::Storage;
use open_segment::{OpenSegment, Unread};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Segments that fit into this together are searched in memory: 2.4 million records.
const IN_MEMORY_BYTES: u64 = match cfg!(test) {
    // So that tests meet both kinds.
    true => 3 << 10,
    false => 64 << 20,
};

/// A row of the combined pack table.
pub type PackNumber = u32;

/// One place of one tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub pack: PackNumber,
    pub offset: u32,
    pub length_bytes: u32,
}

struct Loaded {
    name: SegmentName,
    segment: Arc<OpenSegment>,
    /// The segment's pack rows as numbers of the combined table; of a run all are the same.
    numbers: Arc<[PackNumber]>,
}

/// A born pack and what the ledger says of it.
#[derive(Debug, Clone, Copy)]
pub struct PackInfo {
    pub row: PackRow,
    pub condemned: bool,
    pub deleted: bool,
}

/// The born packs and the places of their frames, as of one state of the ledger.
pub struct Index {
    /// The last entry of that state.
    seq: u64,
    segments: Vec<Loaded>,
    packs: Vec<PackInfo>,
    /// The session whose segments list each pack first: what two sessions list must not be counted
    /// twice.
    homes: Vec<SessionId>,
    numbers: HashMap<PackName, PackNumber>,
    /// Frames known to be damaged: nothing relies on them, readers try them last.
    damaged: BTreeSet<(PackName, Tag)>,
}

/// One record of an index: its segment, and its position there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RecordAt {
    segment: usize,
    at: usize,
}

/// A segment on its way into an index, with its pack rows.
type Part = (SegmentName, Arc<OpenSegment>, Vec<PackRow>);

impl Index {
    /// Loads the current segments; those that `earlier` holds are taken over.
    pub fn load(
        storage: &dyn Storage,
        names: &CustomerNames,
        state: &State,
        earlier: Option<&Index>,
    ) -> Result<Self, RepositoryError> {
        let mut parts: Vec<Part> = Vec::with_capacity(state.segments.len());
        if let Some(earlier) = earlier {
            let kept = earlier.segments.iter();
            parts.extend(
                kept.filter(|loaded| state.segments.contains_key(&loaded.name))
                    .map(|loaded| {
                        let rows = earlier.rows_of(loaded).collect();
                        (loaded.name, loaded.segment.clone(), rows)
                    }),
            );
        }
        let known: HashSet<SegmentName> = parts.iter().map(|(name, ..)| *name).collect();
        let mut taken_bytes: u64 = parts.iter().map(|(_, part, _)| part.memory_bytes).sum();
        let mut unread = Vec::new();
        for name in state.segments.keys().filter(|name| !known.contains(name)) {
            let room = IN_MEMORY_BYTES.saturating_sub(taken_bytes);
            let part = Unread::open(storage, names, name, room)?;
            taken_bytes += part.memory_bytes();
            unread.push(part);
        }
        parts.extend(check_all(unread)?);
        parts.sort_unstable_by_key(|(name, ..)| *name);
        let mut index = Index {
            seq: state.seq,
            segments: Vec::with_capacity(parts.len()),
            packs: Vec::new(),
            homes: Vec::new(),
            numbers: HashMap::new(),
            damaged: state.damaged.clone(),
        };
        for part in parts {
            index.add(part);
        }
        for info in &mut index.packs {
            if let Some(condemned) = state.condemned.get(&info.row.name) {
                info.condemned = true;
                info.deleted = condemned.deleted;
            }
        }
        Ok(index)
    }

    fn add(&mut self, (name, segment, rows): Part) {
        let same = self
            .segments
            .last()
            .filter(|last| self.rows_of(last).eq(rows.iter().copied()));
        if let Some(numbers) = same.map(|last| last.numbers.clone()) {
            self.segments.push(Loaded {
                name,
                segment,
                numbers,
            });
            return;
        }
        let numbers = rows
            .into_iter()
            .map(|row| {
                let next = self.packs.len() as PackNumber;
                let number = *self.numbers.entry(row.name).or_insert(next);
                if number == next {
                    self.packs.push(PackInfo {
                        row,
                        condemned: false,
                        deleted: false,
                    });
                    self.homes.push(name.session);
                }
                number
            })
            .collect();
        self.segments.push(Loaded {
            name,
            segment,
            numbers,
        });
    }

    fn rows_of<'a>(&'a self, loaded: &'a Loaded) -> impl Iterator<Item = PackRow> + 'a {
        let infos = loaded
            .numbers
            .iter()
            .filter_map(|number| self.pack(*number));
        infos.map(|info| info.row)
    }

    /// The last entry of the ledger that this index knows of.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    pub fn packs(&self) -> &[PackInfo] {
        &self.packs
    }

    pub fn pack(&self, number: PackNumber) -> Option<&PackInfo> {
        self.packs.get(number as usize)
    }

    pub fn number_of(&self, pack: &PackName) -> Option<PackNumber> {
        self.numbers.get(pack).copied()
    }

    pub fn records(&self) -> usize {
        self.segments
            .iter()
            .map(|loaded| loaded.segment.len())
            .sum()
    }

    pub fn segment_names(&self) -> impl Iterator<Item = (&SegmentName, usize)> {
        self.segments
            .iter()
            .map(|loaded| (&loaded.name, loaded.segment.len()))
    }

    /// The pack rows that a current segment lists.
    pub(super) fn packs_listed_by(&self, name: &SegmentName) -> impl Iterator<Item = PackRow> {
        let loaded = self.segments.iter().filter(|loaded| loaded.name == *name);
        loaded.flat_map(|loaded| self.rows_of(loaded))
    }

    /// The records of a current segment, ascending; `pack` is a number of this index.
    pub(super) fn records_of_segment(
        &self,
        name: &SegmentName,
    ) -> impl Iterator<Item = Result<Record, RepositoryError>> {
        let loaded = self.segments.iter().filter(|loaded| loaded.name == *name);
        loaded.flat_map(|loaded| {
            loaded.segment.records().filter_map(|record| match record {
                Ok(record) => loaded.place(&record).map(|place| {
                    Ok(Record {
                        pack: place.pack,
                        ..record
                    })
                }),
                Err(error) => Some(Err(error)),
            })
        })
    }

    /// Whether both have the same segments: then records and packs have the same numbers in both.
    pub(super) fn same_segments(&self, other: &Index) -> bool {
        let names = |index: &Index| -> Vec<SegmentName> {
            index.segments.iter().map(|loaded| loaded.name).collect()
        };
        names(self) == names(other)
    }

    fn records_of(&self, tag: &Tag) -> Result<Vec<(RecordAt, Place)>, RepositoryError> {
        let mut records = Vec::new();
        for (segment, loaded) in self.segments.iter().enumerate() {
            for (at, record) in loaded.segment.find(tag)? {
                let place = loaded.place(&record);
                records.extend(place.map(|place| (RecordAt { segment, at }, place)));
            }
        }
        Ok(records)
    }

    /// Places that may be relied on: born, uncondemned, not known to be damaged.
    pub fn sound_places(&self, tag: &Tag) -> Result<Vec<Place>, RepositoryError> {
        let sound = self.sound_records(tag)?.into_iter();
        Ok(sound.map(|(_, place)| place).collect())
    }

    /// The same, with the records that say so.
    pub(super) fn sound_records(
        &self,
        tag: &Tag,
    ) -> Result<Vec<(RecordAt, Place)>, RepositoryError> {
        let mut records = self.records_of(tag)?;
        records.retain(|(_, place)| self.is_sound(tag, place));
        Ok(records)
    }

    /// Damaged frames whose content stands nowhere else: what a full backup has yet to heal.
    pub fn unhealed(&self) -> Result<usize, RepositoryError> {
        let mut unhealed = 0;
        for (pack, tag) in &self.damaged {
            if self.number_of(pack).is_some() && self.sound_places(tag)?.is_empty() {
                unhealed += 1;
            }
        }
        Ok(unhealed)
    }

    fn is_sound(&self, tag: &Tag, place: &Place) -> bool {
        self.pack(place.pack)
            .is_some_and(|pack| !pack.condemned && !self.damaged.contains(&(pack.row.name, *tag)))
    }

    /// All places of a tag, the trustworthy ones first: condemned means not relied on, not gone.
    pub fn places(&self, tag: &Tag) -> Result<Vec<Place>, RepositoryError> {
        let records = self.records_of(tag)?.into_iter();
        let mut places: Vec<Place> = records.map(|(_, place)| place).collect();
        places.sort_by_key(|place| {
            let gone = self.pack(place.pack).is_none_or(|pack| pack.deleted);
            (gone, !self.is_sound(tag, place))
        });
        places.dedup();
        Ok(places)
    }

    /// Where a piece is read first, to put reads in the order of their packs. Nothing relies on it:
    /// who reads hears of an index that cannot be searched.
    pub(super) fn first_place(&self, tag: &Tag) -> Option<(PackNumber, u32)> {
        let places = self.places(tag).ok()?;
        places.first().map(|place| (place.pack, place.offset))
    }

    /// Every frame that the index knows in these packs.
    pub fn frames_of(
        &self,
        packs: &HashSet<PackNumber>,
    ) -> Result<Vec<(PackName, Tag)>, RepositoryError> {
        let mut frames = Vec::new();
        if packs.is_empty() {
            return Ok(frames);
        }
        self.each_record(|_, tag, place| {
            if packs.contains(&place.pack)
                && let Some(info) = self.pack(place.pack)
            {
                frames.push((info.row.name, tag));
            }
        })?;
        Ok(frames)
    }

    /// Every record with its tag and place, segment by segment.
    pub(super) fn each_record(
        &self,
        mut each: impl FnMut(RecordAt, Tag, Place),
    ) -> Result<(), RepositoryError> {
        for (segment, loaded) in self.segments.iter().enumerate() {
            for (at, record) in loaded.segment.records().enumerate() {
                let record = record?;
                if let Some(place) = loaded.place(&record) {
                    each(RecordAt { segment, at }, record.tag, place);
                }
            }
        }
        Ok(())
    }
}

impl Loaded {
    fn place(&self, record: &Record) -> Option<Place> {
        Some(Place {
            pack: *self.numbers.get(record.pack as usize)?,
            offset: record.offset,
            length_bytes: record.length_bytes,
        })
    }
}

/// Reads the segments with all cores: hashing a large index is most of the time that it takes to
/// open it.
fn check_all(unread: Vec<Unread>) -> Result<Vec<Part>, RepositoryError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = cores.min(unread.len());
    let waiting: Vec<Mutex<Option<Unread>>> = unread
        .into_iter()
        .map(|part| Mutex::new(Some(part)))
        .collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut checked = Vec::new();
        while let Some(part) = waiting.get(next.fetch_add(1, Ordering::Relaxed)) {
            let part = part.lock().unwrap_or_else(PoisonError::into_inner).take();
            checked.extend(part.map(|part| {
                let name = part.name;
                part.check()
                    .map(|(open, rows)| (name, Arc::new(open), rows))
            }));
        }
        checked
    };
    let checked: Vec<_> = std::thread::scope(|scope| {
        let helpers: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut checked = work();
        for helper in helpers {
            match helper.join() {
                Ok(theirs) => checked.extend(theirs),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        checked
    });
    checked.into_iter().collect()
}
