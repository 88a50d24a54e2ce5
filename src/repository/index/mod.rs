//! Where tags stand: all current segments of a customer, searched together.
//!
//! Memory: 4.5 to 5 bytes a record. The records themselves stay in the store, which is asked for one
//! only where 32 bits of its tag fit; but the first [`IN_MEMORY_BYTES`] of them are kept, so that the
//! index of most hosts needs no asking. And 150 bytes a pack.

mod all_there;
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
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
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
    tables: Arc<Tables>,
}

/// What most entries leave as it is.
#[derive(Default)]
struct Tables {
    /// In the order of their names.
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

impl Tables {
    fn load(
        storage: &dyn Storage,
        names: &CustomerNames,
        state: &State,
        earlier: Option<&Tables>,
        threads: usize,
    ) -> Result<Self, RepositoryError> {
        let kept = |name: &SegmentName| {
            let earlier = earlier?;
            Some((earlier, earlier.loaded(name)?))
        };
        let current = || state.segments.keys();
        let mut taken_bytes: u64 = current()
            .filter_map(kept)
            .map(|(_, loaded)| loaded.segment.memory_bytes)
            .sum();
        let mut unread = Vec::new();
        for name in current().filter(|name| kept(name).is_none()) {
            let room = IN_MEMORY_BYTES.saturating_sub(taken_bytes);
            let part = Unread::open(storage, names, name, room)?;
            taken_bytes += part.memory_bytes();
            unread.push(part);
        }
        let mut checked = check_all(unread, threads)?;
        let mut tables = Tables {
            segments: Vec::with_capacity(state.segments.len()),
            packs: Vec::new(),
            homes: Vec::new(),
            numbers: HashMap::new(),
            damaged: state.damaged.clone(),
        };
        for name in current() {
            if let Some((earlier, loaded)) = kept(name) {
                let rows = earlier.listed_by(loaded).map(|(_, info)| info.row);
                tables.add(*name, loaded.segment.clone(), rows);
            } else if let Some((segment, rows)) = checked.remove(name) {
                tables.add(*name, Arc::new(segment), rows.iter().copied());
            }
        }
        for info in &mut tables.packs {
            (info.condemned, info.deleted) = condemned_and_deleted(state, &info.row.name);
        }
        Ok(tables)
    }

    /// Whether loading them for this state would make the same.
    fn are_of(&self, state: &State) -> bool {
        self.names().eq(state.segments.keys())
            && self.damaged == state.damaged
            && self.packs.iter().all(|info| {
                (info.condemned, info.deleted) == condemned_and_deleted(state, &info.row.name)
            })
    }

    fn add(
        &mut self,
        name: SegmentName,
        segment: Arc<OpenSegment>,
        rows: impl Iterator<Item = PackRow> + Clone,
    ) {
        let before = self.segments.last().filter(|before| {
            let listed = self.listed_by(before).map(|(_, info)| info.row);
            listed.eq(rows.clone())
        });
        let numbers = match before {
            Some(before) => before.numbers.clone(),
            None => rows.map(|row| self.number(row, name.session)).collect(),
        };
        self.segments.push(Loaded {
            name,
            segment,
            numbers,
        });
    }

    /// The number of a pack, which it gets here if it has none.
    fn number(&mut self, row: PackRow, session: SessionId) -> PackNumber {
        let next = self.packs.len() as PackNumber;
        let number = *self.numbers.entry(row.name).or_insert(next);
        if number == next {
            self.packs.push(PackInfo {
                row,
                condemned: false,
                deleted: false,
            });
            self.homes.push(session);
        }
        number
    }

    fn names(&self) -> impl Iterator<Item = &SegmentName> {
        self.segments.iter().map(|loaded| &loaded.name)
    }

    fn loaded(&self, name: &SegmentName) -> Option<&Loaded> {
        let at = self
            .segments
            .binary_search_by_key(name, |loaded| loaded.name);
        self.segments.get(at.ok()?)
    }

    fn listed_by(&self, loaded: &Loaded) -> impl Iterator<Item = (PackNumber, &PackInfo)> + Clone {
        let numbers = loaded.numbers.iter().copied();
        numbers.filter_map(|number| Some((number, self.pack(number)?)))
    }

    fn pack(&self, number: PackNumber) -> Option<&PackInfo> {
        self.packs.get(number as usize)
    }
}

fn condemned_and_deleted(state: &State, pack: &PackName) -> (bool, bool) {
    let condemned = state.condemned.get(pack);
    (
        condemned.is_some(),
        condemned.is_some_and(|condemned| condemned.deleted),
    )
}

impl Index {
    /// Loads the current segments with so many threads; those that `earlier` holds are taken over.
    pub fn load(
        storage: &dyn Storage,
        names: &CustomerNames,
        state: &State,
        earlier: Option<&Index>,
        threads: usize,
    ) -> Result<Self, RepositoryError> {
        let earlier = earlier.map(|index| &index.tables);
        let tables = match earlier.filter(|tables| tables.are_of(state)) {
            Some(tables) => tables.clone(),
            None => {
                let earlier = earlier.map(|tables| &**tables);
                Arc::new(Tables::load(storage, names, state, earlier, threads)?)
            }
        };
        Ok(Index {
            seq: state.seq,
            tables,
        })
    }

    /// The last entry of the ledger that this index knows of.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    pub fn packs(&self) -> &[PackInfo] {
        &self.tables.packs
    }

    pub fn pack(&self, number: PackNumber) -> Option<&PackInfo> {
        self.tables.pack(number)
    }

    pub fn number_of(&self, pack: &PackName) -> Option<PackNumber> {
        self.tables.numbers.get(pack).copied()
    }

    pub fn records(&self) -> usize {
        self.tables
            .segments
            .iter()
            .map(|loaded| loaded.segment.len())
            .sum()
    }

    pub fn segment_names(&self) -> impl Iterator<Item = (&SegmentName, usize)> {
        self.tables
            .segments
            .iter()
            .map(|loaded| (&loaded.name, loaded.segment.len()))
    }

    /// The packs that a current segment lists.
    pub(super) fn packs_listed_by(
        &self,
        name: &SegmentName,
    ) -> impl Iterator<Item = (PackNumber, &PackInfo)> {
        let loaded = self.tables.loaded(name).into_iter();
        loaded.flat_map(|loaded| self.tables.listed_by(loaded))
    }

    /// The records of a current segment, ascending, with the numbers of their packs in this index.
    pub(super) fn records_of_segment(
        &self,
        name: &SegmentName,
    ) -> impl Iterator<Item = Result<(PackNumber, Record), RepositoryError>> {
        let loaded = self.tables.loaded(name).into_iter();
        loaded.flat_map(|loaded| {
            let records = loaded.segment.records();
            records.filter_map(|record| match record {
                Ok(record) => Some(Ok((loaded.place(&record)?.pack, record))),
                Err(error) => Some(Err(error)),
            })
        })
    }

    /// Whether both have the same segments: then records and packs have the same numbers in both.
    pub(super) fn same_segments(&self, other: &Index) -> bool {
        self.tables.names().eq(other.tables.names())
    }

    fn records_of(&self, tag: &Tag) -> Result<Vec<(RecordAt, Place)>, RepositoryError> {
        let mut records = Vec::new();
        for (segment, loaded) in self.tables.segments.iter().enumerate() {
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
        for (pack, tag) in &self.tables.damaged {
            if self.number_of(pack).is_some() && self.sound_places(tag)?.is_empty() {
                unhealed += 1;
            }
        }
        Ok(unhealed)
    }

    /// Whether the pack is one that this index relies on: a prune condemns it, and forgets it once it is deleted.
    pub fn is_current(&self, name: &PackName) -> bool {
        self.number_of(name)
            .and_then(|number| self.pack(number))
            .is_some_and(|info| !info.condemned)
    }

    /// Whether nothing is known against it.
    pub(super) fn is_sound(&self, tag: &Tag, place: &Place) -> bool {
        self.pack(place.pack).is_some_and(|pack| {
            !pack.condemned && !self.tables.damaged.contains(&(pack.row.name, *tag))
        })
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
        #[cfg(test)]
        PASSES.set(PASSES.get() + 1);
        for (segment, loaded) in self.tables.segments.iter().enumerate() {
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

#[cfg(test)]
thread_local! {
    /// How often this thread went through all records of an index.
    pub(super) static PASSES: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
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

type Checked = BTreeMap<SegmentName, (OpenSegment, Vec<PackRow>)>;

/// Several threads: hashing a large index is most of the time that it takes to open it.
fn check_all(unread: Vec<Unread>, threads: usize) -> Result<Checked, RepositoryError> {
    let helpers = threads.clamp(1, unread.len().max(1)) - 1;
    let waiting = Mutex::new(unread);
    let work = || {
        let mut checked = Vec::new();
        loop {
            let part = waiting.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(part) = part else { return checked };
            let name = part.name;
            checked.push(part.check().map(|open| (name, open)));
        }
    };
    let checked: Vec<_> = std::thread::scope(|scope| {
        let helpers: Vec<_> = (0..helpers).map(|_| scope.spawn(work)).collect();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::entry::VerifyMethod;
    use crate::repository::Customer;
    use crate::repository::reclaim::{merge_segments, reclaim};
    use crate::repository::testing::*;

    fn told(index: &Index) -> String {
        let names: Vec<&SegmentName> = index.tables.names().collect();
        let damaged = &index.tables.damaged;
        format!("{names:?} {:?} {damaged:?}", index.packs())
    }

    #[test]
    fn an_index_that_goes_on_from_an_earlier_one_is_what_loading_makes_anew() {
        let mut world = World::new();
        let customer = world.open();
        let first = world.backup(&customer, "web", &image(&[1, 2, 3, 4]), true);
        let mut before = customer.load_index().unwrap();
        let mut goes_on = |customer: &Customer| {
            let index = customer.load_index().unwrap();
            let (storage, names) = (&**customer.storage(), customer.names());
            let anew = Index::load(storage, names, &customer.state(), None, 1).unwrap();
            assert_eq!(told(&index), told(&anew));
            assert!(index.seq() == anew.seq() && index.seq() > before.seq());
            let same = Arc::ptr_eq(&index.tables, &before.tables);
            before = index;
            same
        };
        let pack = customer.load_index().unwrap().packs()[0].row.name;
        let read = |damaged: &[(PackName, Tag)]| {
            let whole = if damaged.is_empty() { &[pack][..] } else { &[] };
            customer
                .note_verification(VerifyMethod::Checksum, whole, damaged)
                .unwrap();
        };
        read(&[]);
        assert!(goes_on(&customer));
        read(&[(pack, Tag::from_bytes([7; 16]))]);
        assert!(!goes_on(&customer));
        world.backup(&customer, "web", &image(&[5, 6, 7, 8]), true);
        assert!(!goes_on(&customer));
        world.erase(&customer, first);
        assert!(goes_on(&customer));
        let done = reclaim(&customer, world.now(), DAY * 4000, false).unwrap();
        assert!(!goes_on(&customer));
        customer.note_reclaimed(&done).unwrap();
        assert!(!goes_on(&customer));
        assert!(merge_segments(&customer).unwrap());
        assert!(!goes_on(&customer));
        world.check(&customer);
    }
}
