//! Where tags stand: all current segments of a customer, searched together.

use super::RepositoryError;
use super::ledger::State;
use crate::format::names::CustomerNames;
use crate::format::segment::{self, MAX_SEGMENT_BYTES, PackRow, Segment};
use crate::model::{ObjectHash, PackName, SegmentName, Tag};
use crate::storage::Storage;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A row of the combined pack table.
pub type PackNumber = u32;

/// One place of a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub pack: PackNumber,
    pub offset: u32,
    pub length_bytes: u32,
}

struct Loaded {
    name: SegmentName,
    segment: Arc<Segment>,
    /// The segment's pack rows as numbers of the combined table.
    numbers: Vec<PackNumber>,
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
    /// The segment that lists each pack first: a pack that two list must not be counted twice.
    homes: Vec<usize>,
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

impl Index {
    /// Loads the current segments; those that `earlier` holds are taken over.
    pub fn load(
        storage: &dyn Storage,
        names: &CustomerNames,
        state: &State,
        earlier: Option<&Index>,
    ) -> Result<Self, RepositoryError> {
        let mut index = Index {
            seq: state.seq,
            segments: Vec::with_capacity(state.segments.len()),
            packs: Vec::new(),
            homes: Vec::new(),
            numbers: HashMap::new(),
            damaged: state.damaged.clone(),
        };
        for name in state.segments.keys() {
            let known = earlier.and_then(|earlier| {
                earlier
                    .segments
                    .iter()
                    .find(|loaded| loaded.name == *name)
                    .map(|loaded| loaded.segment.clone())
            });
            let segment = match known {
                Some(segment) => segment,
                None => Arc::new(read_segment(storage, names, name)?),
            };
            index.add(*name, segment);
        }
        for info in &mut index.packs {
            if let Some(condemned) = state.condemned.get(&info.row.name) {
                info.condemned = true;
                info.deleted = condemned.deleted;
            }
        }
        Ok(index)
    }

    fn add(&mut self, name: SegmentName, segment: Arc<Segment>) {
        let home = self.segments.len();
        let numbers = segment
            .packs()
            .iter()
            .map(|row| {
                let next = self.packs.len() as PackNumber;
                let number = *self.numbers.entry(row.name).or_insert(next);
                if number == next {
                    self.packs.push(PackInfo {
                        row: *row,
                        condemned: false,
                        deleted: false,
                    });
                    self.homes.push(home);
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

    pub(super) fn segment(&self, name: &SegmentName) -> Option<&Segment> {
        let loaded = self.segments.iter().find(|loaded| loaded.name == *name)?;
        Some(&loaded.segment)
    }

    /// Whether both have the same segments: then records and packs have the same numbers in both.
    pub(super) fn same_segments(&self, other: &Index) -> bool {
        let names = |index: &Index| -> Vec<SegmentName> {
            index.segments.iter().map(|loaded| loaded.name).collect()
        };
        names(self) == names(other)
    }

    fn places_raw(&self, tag: &Tag) -> impl Iterator<Item = (usize, usize, Place)> {
        self.segments
            .iter()
            .enumerate()
            .flat_map(move |(number, loaded)| {
                loaded.segment.find(tag).filter_map(move |at| {
                    let record = loaded.segment.record(at);
                    let pack = *loaded.numbers.get(record.pack as usize)?;
                    let place = Place {
                        pack,
                        offset: record.offset,
                        length_bytes: record.length_bytes,
                    };
                    Some((number, at, place))
                })
            })
    }

    /// A place that may be relied on: born, uncondemned, not known to be damaged.
    pub fn sound_places(&self, tag: &Tag) -> impl Iterator<Item = Place> {
        self.places_raw(tag)
            .map(|(_, _, place)| place)
            .filter(move |place| self.is_sound(tag, place))
    }

    /// The same, with the record that says so.
    pub(super) fn sound_records(&self, tag: &Tag) -> impl Iterator<Item = (RecordAt, Place)> {
        self.places_raw(tag)
            .filter(move |(_, _, place)| self.is_sound(tag, place))
            .map(|(segment, at, place)| (RecordAt { segment, at }, place))
    }

    /// Damaged frames whose content stands nowhere else: what a full backup has yet to heal.
    pub fn unhealed(&self) -> usize {
        let lost = |frame: &&(PackName, Tag)| {
            self.number_of(&frame.0).is_some() && self.sound_places(&frame.1).next().is_none()
        };
        self.damaged.iter().filter(lost).count()
    }

    fn is_sound(&self, tag: &Tag, place: &Place) -> bool {
        self.pack(place.pack)
            .is_some_and(|pack| !pack.condemned && !self.damaged.contains(&(pack.row.name, *tag)))
    }

    /// All places of a tag, the trustworthy ones first: condemned means not relied on, not gone.
    pub fn places(&self, tag: &Tag) -> Vec<Place> {
        let mut places: Vec<Place> = self.places_raw(tag).map(|(_, _, place)| place).collect();
        places.sort_by_key(|place| {
            let gone = self.pack(place.pack).is_none_or(|pack| pack.deleted);
            (gone, !self.is_sound(tag, place))
        });
        places.dedup();
        places
    }

    /// Every frame that the index knows in these packs.
    pub fn frames_of(&self, packs: &HashSet<PackNumber>) -> Vec<(PackName, Tag)> {
        let mut frames = Vec::new();
        if packs.is_empty() {
            return frames;
        }
        self.each_record(|_, _, tag, place| {
            if packs.contains(&place.pack)
                && let Some(info) = self.pack(place.pack)
            {
                frames.push((info.row.name, tag));
            }
        });
        frames
    }

    /// Every record with its place: (segment, position, tag, place).
    pub fn each_record(&self, mut each: impl FnMut(usize, usize, Tag, Place)) {
        for (number, loaded) in self.segments.iter().enumerate() {
            for at in 0..loaded.segment.len() {
                let record = loaded.segment.record(at);
                if let Some(pack) = loaded.numbers.get(record.pack as usize) {
                    let place = Place {
                        pack: *pack,
                        offset: record.offset,
                        length_bytes: record.length_bytes,
                    };
                    each(number, at, record.tag, place);
                }
            }
        }
    }
}

/// Records that threads note together, one bit each: what a session relies on would be gigabytes
/// as a list.
pub(super) struct NotedRecords {
    bits: Vec<Vec<AtomicU64>>,
}

impl NotedRecords {
    pub(super) fn none_of(index: &Index) -> Self {
        let words = |loaded: &Loaded| loaded.segment.len().div_ceil(64);
        NotedRecords {
            bits: index
                .segments
                .iter()
                .map(|loaded| (0..words(loaded)).map(|_| AtomicU64::new(0)).collect())
                .collect(),
        }
    }

    fn word(&self, record: RecordAt) -> Option<&AtomicU64> {
        self.bits.get(record.segment)?.get(record.at / 64)
    }

    pub(super) fn note(&self, record: RecordAt) {
        if let Some(word) = self.word(record) {
            word.fetch_or(1 << (record.at % 64), Ordering::Relaxed);
        }
    }

    fn has(&self, record: RecordAt) -> bool {
        self.word(record)
            .is_some_and(|word| word.load(Ordering::Relaxed) & 1 << (record.at % 64) != 0)
    }

    /// The packs that hold a noted record.
    pub(super) fn packs(&self, index: &Index) -> BTreeSet<PackName> {
        let mut noted = vec![false; index.packs.len()];
        index.each_record(|segment, at, _, place| {
            if self.has(RecordAt { segment, at })
                && let Some(pack) = noted.get_mut(place.pack as usize)
            {
                *pack = true;
            }
        });
        let named = noted.iter().zip(&index.packs).filter(|(noted, _)| **noted);
        named.map(|(_, info)| info.row.name).collect()
    }

    /// The tags of the noted records, by pack.
    pub(super) fn by_pack(
        &self,
        index: &Index,
        wanted: impl Fn(&PackName) -> bool,
    ) -> HashMap<PackName, Vec<Tag>> {
        let mut tags: HashMap<PackName, Vec<Tag>> = HashMap::new();
        index.each_record(|segment, at, tag, place| {
            if !self.has(RecordAt { segment, at }) {
                return;
            }
            if let Some(info) = index.pack(place.pack)
                && wanted(&info.row.name)
            {
                tags.entry(info.row.name).or_default().push(tag);
            }
        });
        tags
    }
}

/// Reads a segment whose bytes must hash to its name.
pub fn read_segment(
    storage: &dyn Storage,
    names: &CustomerNames,
    name: &SegmentName,
) -> Result<Segment, RepositoryError> {
    let object = names.segment(name);
    let bytes = storage.read(&object, MAX_SEGMENT_BYTES)?;
    if ObjectHash::from_bytes(*blake3::hash(&bytes).as_bytes()) != name.hash {
        return Err(RepositoryError::damaged(
            object,
            "the index segment is not the one the ledger names",
        ));
    }
    if segment::session_of(&bytes).ok() != Some(name.session) {
        return Err(RepositoryError::damaged(
            object,
            "the index segment is of another session",
        ));
    }
    Segment::parse(bytes).map_err(|error| RepositoryError::damaged(object, error))
}

/// One bit for each record of an index.
#[derive(Clone)]
pub struct LiveRecords {
    bits: Vec<Vec<u64>>,
}

impl LiveRecords {
    pub fn none_of(index: &Index) -> Self {
        LiveRecords {
            bits: index
                .segments
                .iter()
                .map(|loaded| vec![0; loaded.segment.len().div_ceil(64)])
                .collect(),
        }
    }

    /// Marks every place of `tag`. `false`: the index does not know it.
    pub fn mark(&mut self, index: &Index, tag: &Tag) -> bool {
        let mut found = false;
        for (segment, at, _) in index.places_raw(tag) {
            if let Some(word) = self
                .bits
                .get_mut(segment)
                .and_then(|words| words.get_mut(at / 64))
            {
                *word |= 1 << (at % 64);
                found = true;
            }
        }
        found
    }

    pub fn contains(&self, segment: usize, at: usize) -> bool {
        self.bits
            .get(segment)
            .and_then(|words| words.get(at / 64))
            .is_some_and(|word| word & 1 << (at % 64) != 0)
    }

    /// Whether `tag` is marked in any segment.
    pub fn has(&self, index: &Index, tag: &Tag) -> bool {
        index
            .places_raw(tag)
            .any(|(segment, at, _)| self.contains(segment, at))
    }
}

/// What a pack holds that is reached, and that is not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PackUse {
    pub live_frames: u64,
    pub live_bytes: u64,
    pub known_frames: u64,
}

/// Counts the live frames of every pack of the index.
pub fn count_uses(index: &Index, live: &LiveRecords) -> Vec<PackUse> {
    let mut uses = vec![PackUse::default(); index.packs.len()];
    index.each_record(|segment, at, _, place| {
        if index.homes.get(place.pack as usize) != Some(&segment) {
            return;
        }
        if let Some(usage) = uses.get_mut(place.pack as usize) {
            usage.known_frames += 1;
            if live.contains(segment, at) {
                usage.live_frames += 1;
                usage.live_bytes += u64::from(place.length_bytes);
            }
        }
    });
    uses
}

/// Bytes of a pack that are not frames: header, directory, trailer. Not counted as dead.
pub fn frame_bytes_of(row: &PackRow) -> u64 {
    let overhead = crate::format::pack::HEADER_BYTES as u64
        + crate::format::pack::TRAILER_BYTES as u64
        + 32
        + 32 * u64::from(row.frames);
    row.size_bytes.saturating_sub(overhead)
}
