//! Bits for the records of an index.

use super::super::RepositoryError;
use super::{Index, Loaded, RecordAt};
use crate::format::segment::PackRow;
use crate::model::{PackName, Tag};
use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};

/// Records that threads note together, one bit each: what a session relies on would be gigabytes
/// as a list.
pub(in super::super) struct NotedRecords {
    bits: Vec<Vec<AtomicU64>>,
}

impl NotedRecords {
    pub(in super::super) fn none_of(index: &Index) -> Self {
        let words = |loaded: &Loaded| loaded.segment.len().div_ceil(64);
        NotedRecords {
            bits: index
                .tables
                .segments
                .iter()
                .map(|loaded| (0..words(loaded)).map(|_| AtomicU64::new(0)).collect())
                .collect(),
        }
    }

    fn word(&self, record: RecordAt) -> Option<&AtomicU64> {
        self.bits.get(record.segment)?.get(record.at / 64)
    }

    /// Whether it was not noted before; of threads that note it together one hears so.
    pub(in super::super) fn note(&self, record: RecordAt) -> bool {
        let bit = 1 << (record.at % 64);
        self.word(record)
            .is_some_and(|word| word.fetch_or(bit, Ordering::Relaxed) & bit == 0)
    }

    fn has(&self, record: RecordAt) -> bool {
        self.word(record)
            .is_some_and(|word| word.load(Ordering::Relaxed) & 1 << (record.at % 64) != 0)
    }

    /// The packs that hold a noted record.
    pub(in super::super) fn packs(
        &self,
        index: &Index,
    ) -> Result<BTreeSet<PackName>, RepositoryError> {
        let mut noted = vec![false; index.packs().len()];
        index.each_record(|record, _, place| {
            if self.has(record)
                && let Some(pack) = noted.get_mut(place.pack as usize)
            {
                *pack = true;
            }
        })?;
        let named = noted.iter().zip(index.packs()).filter(|(noted, _)| **noted);
        Ok(named.map(|(_, info)| info.row.name).collect())
    }

    /// The tags of the noted records, by pack.
    pub(in super::super) fn by_pack(
        &self,
        index: &Index,
        wanted: impl Fn(&PackName) -> bool,
    ) -> Result<HashMap<PackName, Vec<Tag>>, RepositoryError> {
        let mut tags: HashMap<PackName, Vec<Tag>> = HashMap::new();
        index.each_record(|record, tag, place| {
            if !self.has(record) {
                return;
            }
            if let Some(info) = index.pack(place.pack)
                && wanted(&info.row.name)
            {
                tags.entry(info.row.name).or_default().push(tag);
            }
        })?;
        Ok(tags)
    }
}

/// The records of all that is reached.
pub struct LiveRecords(NotedRecords);

impl LiveRecords {
    pub fn none_of(index: &Index) -> Self {
        LiveRecords(NotedRecords::none_of(index))
    }

    /// Marks every place of `tag`. `false`: the index does not know it.
    pub fn mark(&self, index: &Index, tag: &Tag) -> Result<bool, RepositoryError> {
        let records = index.records_of(tag)?;
        for (record, _) in &records {
            self.0.note(*record);
        }
        Ok(!records.is_empty())
    }

    /// Marks every place of `tag`, and says whether that is news: of threads that claim a tag together one gets it.
    /// What the index does not know, each of them gets.
    pub fn claim(&self, index: &Index, tag: &Tag) -> Result<bool, RepositoryError> {
        let mut first = None;
        for (record, _) in index.records_of(tag)? {
            let is_news = self.0.note(record);
            // All come by the same record first.
            first.get_or_insert(is_news);
        }
        Ok(first.unwrap_or(true))
    }

    /// Whether `tag` is marked in any segment.
    pub fn has(&self, index: &Index, tag: &Tag) -> Result<bool, RepositoryError> {
        let records = index.records_of(tag)?;
        Ok(records.iter().any(|(record, _)| self.0.has(*record)))
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
pub fn count_uses(index: &Index, live: &LiveRecords) -> Result<Vec<PackUse>, RepositoryError> {
    let mut uses = vec![PackUse::default(); index.packs().len()];
    let session = |record: RecordAt| {
        index
            .tables
            .segments
            .get(record.segment)
            .map(|part| part.name.session)
    };
    index.each_record(|record, _, place| {
        if index.tables.homes.get(place.pack as usize).copied() != session(record) {
            return;
        }
        if let Some(usage) = uses.get_mut(place.pack as usize) {
            usage.known_frames += 1;
            if live.0.has(record) {
                usage.live_frames += 1;
                usage.live_bytes += u64::from(place.length_bytes);
            }
        }
    })?;
    Ok(uses)
}

/// Bytes of a pack that are not frames: header, directory, trailer. Not counted as dead.
pub fn frame_bytes_of(row: &PackRow) -> u64 {
    let overhead = crate::format::pack::HEADER_BYTES as u64
        + crate::format::pack::TRAILER_BYTES as u64
        + 32
        + 32 * u64::from(row.frames);
    row.size_bytes.saturating_sub(overhead)
}
