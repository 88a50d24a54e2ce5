//! Where tags stand: all current segments of a customer, searched together.

use super::RepositoryError;
use super::ledger::State;
use crate::format::names::CustomerNames;
use crate::format::pack::PackKind;
use crate::format::segment::{self, MAX_SEGMENT_BYTES, PackRow, Segment};
use crate::model::{ObjectHash, PackName, SegmentName, Tag};
use crate::storage::Storage;
use std::collections::HashMap;
use std::sync::Arc;

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
    segments: Vec<Loaded>,
    packs: Vec<PackInfo>,
    numbers: HashMap<PackName, PackNumber>,
    /// Frames known to be damaged: nothing relies on them, readers try them last.
    damaged: std::collections::BTreeSet<(PackName, Tag)>,
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
            segments: Vec::with_capacity(state.segments.len()),
            packs: Vec::new(),
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
    // A place that stands in two segments (a merge under way) counts once.
    let mut seen = std::collections::HashSet::new();
    let several = index.segments.len() > 1;
    index.each_record(|segment, at, _, place| {
        if several && !seen.insert((place.pack, place.offset)) {
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
