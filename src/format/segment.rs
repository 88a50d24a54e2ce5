//! Index segments: where each tag stands. See the module documentation of `format`.

use super::pack::{HEADER_BYTES as PACK_HEADER_BYTES, MAX_PACK_BYTES, PackKind};
use super::wire::{Fields, FormatError};
use crate::model::{ObjectHash, PackName, SessionId, Tag};
use std::ops::RangeInclusive;

const MAGIC: &[u8; 8] = b"VMKINDX1";
/// magic 8, session 16, random 16, records u64, packs u32, sections u32, first tag 16, last tag 16.
const HEADER_BYTES: usize = 88;
const RECORD_COUNT_AT: usize = 40;
const TAGS_AT: usize = 56;
/// A row of the section table: kind u32, zero u32, offset u64, length u64.
const SECTION_BYTES: usize = 24;
const SECTION_PACKS: u32 = 1;
/// 2^8 or 2^16 numbers u32: records whose tag begins with at most this slot's bits.
const SECTION_FAN_OUT: u32 = 2;
const SECTION_RECORDS: u32 = 3;
/// Sections from here on may be skipped by a reader that does not know them.
const SECTION_OPTIONAL: u32 = 0x8000_0000;
const MAX_SECTIONS: u32 = 32;
/// session 16, hash 32, size u64, frames u32, kind u32.
const PACK_BYTES: usize = 64;
/// tag 16, pack u32, offset u32, length u32.
const RECORD_BYTES: usize = 28;
/// No reader accepts a larger segment: 2^27 records.
pub const MAX_SEGMENT_BYTES: u64 = 4 << 30;

/// A pack as a segment's pack table lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PackRow {
    pub name: PackName,
    pub size_bytes: u64,
    pub frames: u32,
    pub kind: PackKind,
}

/// One place of one tag; `pack` is a row of the same segment's pack table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Record {
    pub tag: Tag,
    pub pack: u32,
    pub offset: u32,
    pub length_bytes: u32,
}

/// Lays out a segment that covers all tags. `records` are sorted here; `packs` keep their order
/// (records refer to it).
pub fn build(
    session: &SessionId,
    random: &[u8; 16],
    packs: &[PackRow],
    records: &mut Vec<Record>,
) -> Vec<u8> {
    records.sort_unstable();
    records.dedup();
    let mut segment = SegmentBuilder::new(session, random, packs, records.len());
    for record in records {
        segment.push(*record);
    }
    segment.finish((Tag::FIRST, Tag::LAST))
}

/// A segment that is laid out record by record.
pub struct SegmentBuilder {
    out: Vec<u8>,
    fan_out: Vec<u8>,
    fan_out_at: usize,
    fan_out_bits: u32,
    record_count: u64,
    last: Option<Record>,
}

impl SegmentBuilder {
    /// `expected_records` are how many will come, about.
    pub fn new(
        session: &SessionId,
        random: &[u8; 16],
        packs: &[PackRow],
        expected_records: usize,
    ) -> Self {
        let fan_out_bits = if expected_records > 1 << 18 { 16 } else { 8 };
        let fan_out_bytes = 4usize << fan_out_bits;
        let packs_at = HEADER_BYTES + 3 * SECTION_BYTES;
        let fan_out_at = packs_at + packs.len() * PACK_BYTES;
        let records_at = fan_out_at + fan_out_bytes;
        let mut out = Vec::with_capacity(records_at + expected_records * RECORD_BYTES);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(session.as_bytes());
        out.extend_from_slice(random);
        // The number of records, and the range of tags, when they are known.
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(&(packs.len() as u32).to_le_bytes());
        out.extend_from_slice(&3u32.to_le_bytes());
        out.extend_from_slice(&[0; 32]);
        let sections = [
            (SECTION_PACKS, packs_at, packs.len() * PACK_BYTES),
            (SECTION_FAN_OUT, fan_out_at, fan_out_bytes),
            (SECTION_RECORDS, records_at, 0),
        ];
        for (kind, offset, length) in sections {
            out.extend_from_slice(&kind.to_le_bytes());
            out.extend_from_slice(&0u32.to_le_bytes());
            out.extend_from_slice(&(offset as u64).to_le_bytes());
            out.extend_from_slice(&(length as u64).to_le_bytes());
        }
        for pack in packs {
            out.extend_from_slice(pack.name.session.as_bytes());
            out.extend_from_slice(pack.name.hash.as_bytes());
            out.extend_from_slice(&pack.size_bytes.to_le_bytes());
            out.extend_from_slice(&pack.frames.to_le_bytes());
            out.extend_from_slice(&pack.kind.code().to_le_bytes());
        }
        out.resize(records_at, 0);
        SegmentBuilder {
            out,
            fan_out: Vec::with_capacity(fan_out_bytes),
            fan_out_at,
            fan_out_bits,
            record_count: 0,
            last: None,
        }
    }

    /// Records so far.
    pub fn len(&self) -> usize {
        self.record_count as usize
    }

    pub fn is_empty(&self) -> bool {
        self.record_count == 0
    }

    /// The next record, greater than all before.
    pub fn push(&mut self, record: Record) {
        assert!(
            self.last.is_none_or(|last| last < record),
            "records are pushed in ascending order: no reader takes a segment without"
        );
        self.fill_fan_out(slot_of(&record.tag, self.fan_out_bits));
        self.out.extend_from_slice(record.tag.as_bytes());
        self.out.extend_from_slice(&record.pack.to_le_bytes());
        self.out.extend_from_slice(&record.offset.to_le_bytes());
        self.out
            .extend_from_slice(&record.length_bytes.to_le_bytes());
        self.record_count += 1;
        self.last = Some(record);
    }

    /// Slots before `slot` hold no record that is still to come.
    fn fill_fan_out(&mut self, slot: usize) {
        while self.fan_out.len() < 4 * slot {
            let before = self.record_count as u32;
            self.fan_out.extend_from_slice(&before.to_le_bytes());
        }
    }

    /// `tags`: the first and the last that the segment covers.
    pub fn finish(mut self, (first, last): (Tag, Tag)) -> Vec<u8> {
        self.fill_fan_out(1 << self.fan_out_bits);
        let mut put = |at: usize, bytes: &[u8]| {
            self.out
                .get_mut(at..at + bytes.len())
                .expect("`new` laid out what comes before the records")
                .copy_from_slice(bytes);
        };
        put(RECORD_COUNT_AT, &self.record_count.to_le_bytes());
        put(TAGS_AT, first.as_bytes());
        put(TAGS_AT + Tag::BYTES, last.as_bytes());
        let records_bytes = self.record_count * RECORD_BYTES as u64;
        let row = HEADER_BYTES + 2 * SECTION_BYTES;
        put(row + 16, &records_bytes.to_le_bytes());
        put(self.fan_out_at, &self.fan_out);
        self.out
    }
}

/// The first `bits` bits of the tag, `bits <= 32`.
fn slot_of(tag: &Tag, bits: u32) -> usize {
    let [a, b, c, d, ..] = *tag.as_bytes();
    (u64::from(u32::from_be_bytes([a, b, c, d])) >> (32 - bits)) as usize
}

/// Where the bytes of a segment stand: in memory, or in an object that is held open.
pub trait SegmentBytes {
    type Error: From<FormatError>;

    fn size_bytes(&self) -> u64;

    /// Fills `buffer` from `offset`; an error if the segment ends before.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Self::Error>;
}

impl SegmentBytes for Vec<u8> {
    type Error = FormatError;

    fn size_bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), FormatError> {
        let part = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..)?.get(..buffer.len()))
            .ok_or_else(ends_too_early)?;
        buffer.copy_from_slice(part);
        Ok(())
    }
}

/// A segment that was read once from end to end and checked. Its records stay where they are; what
/// is held of each is 32 bits of its tag, so that a tag the segment does not know costs no reading.
///
/// Memory: 4.5 to 5 bytes a record, and the pack table until it is taken.
pub struct Segment<B> {
    bytes: B,
    session: SessionId,
    packs: Vec<PackRow>,
    tags: RangeInclusive<u128>,
    /// For every value of a tag's first bits the number of its first record; then the end.
    slots: Vec<u32>,
    slot_bits: u32,
    prints: Vec<u32>,
    records_at: u64,
}

/// At least so many records a slot, on average, and less than twice as many: their prints are on one
/// cache line.
const RECORDS_IN_SLOT: usize = 4;
const BLOCK_RECORDS: usize = 1 << 15;

impl Segment<Vec<u8>> {
    /// A segment in memory.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, FormatError> {
        Self::open(bytes, |_| {})
    }
}

impl<B: SegmentBytes> Segment<B> {
    /// Takes a segment apart and checks its order, so that a search can be trusted. `seen` gets
    /// every byte of it once, in order.
    pub fn open(bytes: B, seen: impl FnMut(&[u8])) -> Result<Self, B::Error> {
        let mut walk = Walk {
            bytes: &bytes,
            at: 0,
            seen,
        };
        let head = walk.head()?;
        let packs = parse_packs(&walk.whole(head.packs_bytes)?)?;
        let fan_out = walk.whole(head.fan_out_bytes)?;
        let records_at = walk.at;
        let (slots, slot_bits, prints) = walk.records(&head, &packs, &fan_out)?;
        walk.skip_to_end()?;
        Ok(Segment {
            session: head.session,
            tags: head.tags,
            packs,
            slots,
            slot_bits,
            prints,
            records_at,
            bytes,
        })
    }

    pub fn session(&self) -> SessionId {
        self.session
    }

    pub fn packs(&self) -> &[PackRow] {
        &self.packs
    }

    /// The pack table, which is not kept here any longer.
    pub fn take_packs(&mut self) -> Vec<PackRow> {
        std::mem::take(&mut self.packs)
    }

    pub fn len(&self) -> usize {
        self.prints.len()
    }

    pub fn is_empty(&self) -> bool {
        self.prints.is_empty()
    }

    /// The `at`-th record, `at < len()`.
    pub fn record(&self, at: usize) -> Result<Record, B::Error> {
        let mut raw = [0; RECORD_BYTES];
        self.bytes
            .read_at(self.records_at + (at * RECORD_BYTES) as u64, &mut raw)?;
        let record = Record::parse(&raw);
        match self.prints.get(at) == Some(&print_of(&record.tag)) {
            true => Ok(record),
            false => Err(changed().into()),
        }
    }

    /// The records of `tag` and their positions.
    pub fn find(&self, tag: &Tag) -> Result<Vec<(usize, Record)>, B::Error> {
        let mut found = Vec::new();
        if !self.tags.contains(&number_of(tag)) {
            return Ok(found);
        }
        let slot = slot_of(tag, self.slot_bits);
        let bound = |slot: usize| self.slots.get(slot).map(|at| *at as usize);
        let (Some(start), Some(end)) = (bound(slot), bound(slot + 1)) else {
            return Ok(found);
        };
        let print = print_of(tag);
        let prints = self.prints.get(start..end).unwrap_or_default();
        // All of them are compared at once, and without a branch: nearly always none fits.
        let fits = |any, other: &u32| any | (*other == print);
        if !prints.iter().fold(false, fits) {
            return Ok(found);
        }
        for (at, _) in prints.iter().enumerate().filter(|(_, it)| **it == print) {
            let record = self.record(start + at)?;
            if record.tag == *tag {
                found.push((start + at, record));
            }
        }
        Ok(found)
    }

    /// Every record, in order, read in large blocks.
    pub fn records(&self) -> Records<'_, B> {
        Records {
            segment: self,
            block: Vec::new(),
            block_from: 0,
            at: 0,
        }
    }
}

/// The records of a segment, one after the other. Nothing may be asked after an error.
pub struct Records<'a, B> {
    segment: &'a Segment<B>,
    block: Vec<u8>,
    block_from: usize,
    at: usize,
}

impl<B: SegmentBytes> Iterator for Records<'_, B> {
    type Item = Result<Record, B::Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let print = *self.segment.prints.get(self.at)?;
        if self.at - self.block_from == self.block.len() / RECORD_BYTES {
            let count = (self.segment.len() - self.at).min(BLOCK_RECORDS);
            self.block.resize(count * RECORD_BYTES, 0);
            self.block_from = self.at;
            let offset = self.segment.records_at + (self.at * RECORD_BYTES) as u64;
            if let Err(error) = self.segment.bytes.read_at(offset, &mut self.block) {
                return Some(Err(error));
            }
        }
        let raw = self.block.as_chunks().0.get(self.at - self.block_from)?;
        let record = Record::parse(raw);
        self.at += 1;
        match print_of(&record.tag) == print {
            true => Some(Ok(record)),
            false => Some(Err(changed().into())),
        }
    }
}

fn changed() -> FormatError {
    FormatError::new("index segment that changed after it was checked")
}

/// Tags as numbers are in the order of tags, and compared faster.
fn number_of(tag: &Tag) -> u128 {
    u128::from_be_bytes(*tag.as_bytes())
}

/// 32 bits of the tag behind those that choose its slot.
fn print_of(tag: &Tag) -> u32 {
    let [_, _, _, _, a, b, c, d, ..] = *tag.as_bytes();
    u32::from_be_bytes([a, b, c, d])
}

impl Record {
    fn parse(raw: &[u8; RECORD_BYTES]) -> Self {
        let (tag, rest) = raw
            .split_first_chunk::<16>()
            .expect("a record has 28 bytes");
        let number = |from: usize| {
            rest.get(from..)
                .and_then(|rest| rest.first_chunk::<4>())
                .map(|bytes| u32::from_le_bytes(*bytes))
                .expect("a record has 28 bytes")
        };
        Record {
            tag: Tag::from_bytes(*tag),
            pack: number(0),
            offset: number(4),
            length_bytes: number(8),
        }
    }
}

/// What a segment's header and section table say.
struct Head {
    session: SessionId,
    tags: RangeInclusive<u128>,
    record_count: usize,
    packs_bytes: u64,
    fan_out_bytes: u64,
    fan_out_bits: u32,
}

/// Reads a segment from its first byte to its last, each once.
struct Walk<'a, B, F> {
    bytes: &'a B,
    at: u64,
    seen: F,
}

impl<B: SegmentBytes, F: FnMut(&[u8])> Walk<'_, B, F> {
    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), B::Error> {
        self.bytes.read_at(self.at, buffer)?;
        (self.seen)(buffer);
        self.at += buffer.len() as u64;
        Ok(())
    }

    /// The next `length_bytes`, which the section table proved to lie inside the segment.
    fn whole(&mut self, length_bytes: u64) -> Result<Vec<u8>, B::Error> {
        let mut part = vec![0; usize::try_from(length_bytes).map_err(|_| ends_too_early())?];
        self.fill(&mut part)?;
        Ok(part)
    }

    fn skip_to_end(&mut self) -> Result<(), B::Error> {
        while self.at < self.bytes.size_bytes() {
            let left = self.bytes.size_bytes() - self.at;
            self.whole(left.min(1 << 20))?;
        }
        Ok(())
    }

    fn head(&mut self) -> Result<Head, B::Error> {
        let size_bytes = self.bytes.size_bytes();
        let mut header = [0; HEADER_BYTES];
        self.fill(&mut header)?;
        let mut fields = Fields::new(&header);
        fields.magic(MAGIC, "index segment")?;
        let session = SessionId::from_bytes(fields.array("segment session")?);
        fields.bytes(16, "segment random bytes")?;
        let record_count = fields.u64("record count")?;
        let pack_count = fields.u32("pack count")?;
        let section_count = fields.u32("section count")?;
        let first = u128::from_be_bytes(fields.array("first tag")?);
        let last = u128::from_be_bytes(fields.array("last tag")?);
        if section_count > MAX_SECTIONS {
            return Err(FormatError::new("segment with too many sections").into());
        }
        let table = self.whole(SECTION_BYTES as u64 * u64::from(section_count))?;
        let mut fields = Fields::new(&table);
        let (mut packs, mut fan_out, mut records) = (None, None, None);
        // Sections follow the table and each other without a gap, up to the segment's end, and in
        // the order of their kinds: what explains the records stands before them.
        let (mut next, mut kind_before) = (self.at, 0);
        for _ in 0..section_count {
            let kind = fields.u32("section kind")?;
            let reserved = fields.u32("section reserved field")?;
            let offset = fields.u64("section offset")?;
            let length = fields.u64("section length")?;
            let end = offset
                .checked_add(length)
                .filter(|end| *end <= size_bytes)
                .ok_or_else(|| FormatError::new("section outside of the segment"))?;
            if reserved != 0 || offset != next {
                return Err(FormatError::new("segment with a gap between its sections").into());
            }
            if kind <= kind_before {
                return Err(FormatError::new("section twice, or out of its order").into());
            }
            (next, kind_before) = (end, kind);
            let (place, expected) = match kind {
                SECTION_PACKS => (&mut packs, u64::from(pack_count) * PACK_BYTES as u64),
                SECTION_FAN_OUT => (&mut fan_out, length),
                SECTION_RECORDS => (
                    &mut records,
                    record_count.saturating_mul(RECORD_BYTES as u64),
                ),
                kind if kind >= SECTION_OPTIONAL => continue,
                _ => return Err(FormatError::new("segment with an unknown section").into()),
            };
            if expected != length {
                return Err(FormatError::new("section of a wrong length").into());
            }
            *place = Some(length);
        }
        if next != size_bytes {
            return Err(FormatError::new("bytes after the end of the index segment").into());
        }
        let (Some(packs_bytes), Some(fan_out_bytes), Some(_)) = (packs, fan_out, records) else {
            return Err(FormatError::new("segment lacks a section").into());
        };
        let fan_out_bits = match fan_out_bytes {
            1024 => 8,
            262_144 => 16,
            _ => return Err(FormatError::new("fan-out table of a wrong length").into()),
        };
        if record_count > u64::from(u32::MAX) {
            return Err(FormatError::new("segment with too many records").into());
        }
        Ok(Head {
            session,
            tags: first..=last,
            record_count: record_count as usize,
            packs_bytes,
            fan_out_bytes,
            fan_out_bits,
        })
    }

    /// Checks every record and the fan-out table, and notes slots, slot bits and prints.
    fn records(
        &mut self,
        head: &Head,
        packs: &[PackRow],
        fan_out: &[u8],
    ) -> Result<(Vec<u32>, u32, Vec<u32>), B::Error> {
        // By far smaller than the pack table, so that it stays near the processor.
        let ends: Vec<u32> = packs.iter().map(|row| row.size_bytes as u32).collect();
        let mut fan_out = fan_out
            .as_chunks()
            .0
            .iter()
            .map(|raw| u32::from_le_bytes(*raw));
        let count = head.record_count;
        let slot_bits = (count / RECORDS_IN_SLOT).max(1).ilog2().min(28);
        let mut slots: Vec<u32> = Vec::with_capacity((1 << slot_bits) + 1);
        let mut prints = Vec::with_capacity(count);
        let (mut fan_out_slot, mut last) = (0usize, None);
        let mut block = Vec::new();
        while prints.len() < count {
            block.resize((count - prints.len()).min(BLOCK_RECORDS) * RECORD_BYTES, 0);
            self.fill(&mut block)?;
            for raw in block.as_chunks().0 {
                let record = Record::parse(raw);
                let at = prints.len() as u32;
                let tag = number_of(&record.tag);
                let order = Some((tag, record.pack, record.offset, record.length_bytes));
                if last >= order {
                    return Err(FormatError::new("segment is not sorted").into());
                }
                let Some(pack_end) = ends.get(record.pack as usize) else {
                    return Err(FormatError::new("segment names a pack it does not list").into());
                };
                let end = u64::from(record.offset) + u64::from(record.length_bytes);
                if (record.offset as usize) < PACK_HEADER_BYTES || end > u64::from(*pack_end) {
                    return Err(
                        FormatError::new("segment names a frame outside of its pack").into(),
                    );
                }
                if !head.tags.contains(&tag) {
                    return Err(FormatError::new("segment holds a tag outside of its range").into());
                }
                while fan_out_slot < slot_of(&record.tag, head.fan_out_bits) {
                    if fan_out.next() != Some(at) {
                        return Err(wrong_fan_out().into());
                    }
                    fan_out_slot += 1;
                }
                let slot = slot_of(&record.tag, slot_bits);
                while slots.len() <= slot {
                    slots.push(at);
                }
                prints.push(print_of(&record.tag));
                last = order;
            }
        }
        if fan_out.any(|at| at as usize != count) {
            return Err(wrong_fan_out().into());
        }
        slots.resize((1 << slot_bits) + 1, count as u32);
        Ok((slots, slot_bits, prints))
    }
}

fn ends_too_early() -> FormatError {
    FormatError::new("index segment that ends too early")
}

fn wrong_fan_out() -> FormatError {
    FormatError::new("fan-out table does not fit the records")
}

fn parse_packs(section: &[u8]) -> Result<Vec<PackRow>, FormatError> {
    let (rows, _) = section.as_chunks::<PACK_BYTES>();
    rows.iter().map(parse_pack).collect()
}

fn parse_pack(row: &[u8; PACK_BYTES]) -> Result<PackRow, FormatError> {
    let mut fields = Fields::new(row);
    let session = SessionId::from_bytes(fields.array("pack session")?);
    let hash = ObjectHash::from_bytes(fields.array("pack hash")?);
    let size_bytes = fields.u64("pack size")?;
    if size_bytes > MAX_PACK_BYTES {
        return Err(FormatError::new("pack table lists an impossible size"));
    }
    let frames = fields.u32("pack frame count")?;
    let kind = PackKind::from_code(fields.u32("pack kind")?)
        .ok_or_else(|| FormatError::new("pack table lists an unknown kind"))?;
    Ok(PackRow {
        name: PackName { session, hash },
        size_bytes,
        frames,
        kind,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(count: u32) -> (Vec<PackRow>, Vec<Record>, Vec<u8>) {
        let session = SessionId::from_bytes([1; 16]);
        let packs: Vec<PackRow> = (0..3u8)
            .map(|n| PackRow {
                name: PackName {
                    session,
                    hash: ObjectHash::from_bytes([n; 32]),
                },
                size_bytes: (1 << 20) + u64::from(n),
                frames: 5,
                kind: PackKind::Data,
            })
            .collect();
        let mut records: Vec<Record> = (0..count)
            .map(|n| {
                let hash = blake3::hash(&(n / 2).to_le_bytes());
                let mut tag = [0; 16];
                tag.copy_from_slice(&hash.as_bytes()[..16]);
                Record {
                    tag: Tag::from_bytes(tag),
                    pack: n % 3,
                    offset: n + 48,
                    length_bytes: 80,
                }
            })
            .collect();
        let bytes = build(&session, &[2; 16], &packs, &mut records);
        (packs, records, bytes)
    }

    #[test]
    fn every_place_of_every_tag_is_found_and_no_other() {
        for count in [0, 1, 2, 500, 300_000] {
            let (packs, records, bytes) = sample(count);
            let segment = Segment::parse(bytes).unwrap();
            assert_eq!(segment.packs(), packs);
            assert_eq!(segment.len(), records.len());
            for record in records.iter().step_by(1 + count as usize / 300) {
                let found = segment.find(&record.tag).unwrap();
                assert!(
                    found
                        .iter()
                        .all(|(at, one)| segment.record(*at) == Ok(*one))
                );
                let found: Vec<Record> = found.into_iter().map(|(_, one)| one).collect();
                let expected: Vec<Record> = records
                    .iter()
                    .filter(|other| other.tag == record.tag)
                    .copied()
                    .collect();
                assert_eq!(found, expected);
            }
            for unknown in [0, 0xee, 0xff] {
                let found = segment.find(&Tag::from_bytes([unknown; 16]));
                assert_eq!(found, Ok(Vec::new()));
            }
            assert!(segment.records().eq(records.into_iter().map(Ok)));
        }
    }

    #[test]
    fn a_truncated_segment_is_refused() {
        let (_, _, bytes) = sample(20);
        for length in 0..bytes.len() {
            assert!(
                Segment::parse(bytes[..length].to_vec()).is_err(),
                "{length}"
            );
        }
    }

    #[test]
    fn sections_leave_no_room_for_bytes_that_nobody_reads() {
        let (_, _, bytes) = sample(20);
        let table = |row: usize, field: usize| HEADER_BYTES + SECTION_BYTES * row + field;
        let put = |bytes: &mut Vec<u8>, at: usize, value: u64, size: usize| {
            bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        };
        let records_at = bytes.len() - 20 * RECORD_BYTES;
        // A gap before the records, which their row in the table knows of.
        let mut gap = bytes.clone();
        gap.splice(records_at..records_at, [0; 8]);
        put(&mut gap, table(2, 8), records_at as u64 + 8, 8);
        // Something behind the last section, and an unread number in the table.
        let mut more = bytes.clone();
        more.push(0);
        let mut reserved = bytes.clone();
        put(&mut reserved, table(1, 4), 1, 4);
        // The same section twice: which of them counts?
        let mut twice = bytes.clone();
        put(&mut twice, table(1, 0), u64::from(SECTION_RECORDS), 4);
        // The packs after what names them.
        let mut turned = bytes.clone();
        put(&mut turned, table(0, 0), u64::from(SECTION_FAN_OUT), 4);
        put(&mut turned, table(1, 0), u64::from(SECTION_PACKS), 4);
        for bad in [gap, more, reserved, twice, turned] {
            assert!(Segment::parse(bad).is_err());
        }
        // A section that may be skipped is skipped, in its place.
        let mut optional = bytes.clone();
        optional.splice(table(3, 0)..table(3, 0), [0; SECTION_BYTES]);
        for row in 0..3 {
            let at = table(row, 8);
            let offset = u64::from_le_bytes(optional[at..at + 8].try_into().unwrap());
            put(&mut optional, at, offset + SECTION_BYTES as u64, 8);
        }
        let end = optional.len() as u64;
        put(&mut optional, 52, 4, 4);
        put(&mut optional, table(3, 0), u64::from(SECTION_OPTIONAL), 4);
        put(&mut optional, table(3, 8), end, 8);
        put(&mut optional, table(3, 16), 5, 8);
        optional.extend([0; 5]);
        assert_eq!(Segment::parse(optional.clone()).unwrap().len(), 20);
        put(&mut optional, table(3, 0), 4, 4);
        assert!(Segment::parse(optional).is_err());
    }

    /// Bytes that change behind a reader's back.
    struct Changing(std::cell::RefCell<Vec<u8>>);

    impl SegmentBytes for &Changing {
        type Error = FormatError;

        fn size_bytes(&self) -> u64 {
            self.0.borrow().size_bytes()
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), FormatError> {
            self.0.borrow().read_at(offset, buffer)
        }
    }

    #[test]
    fn a_record_that_changed_after_the_check_is_not_believed() {
        let (_, records, bytes) = sample(500);
        let changing = Changing(std::cell::RefCell::new(bytes.clone()));
        let mut seen = Vec::new();
        let segment = Segment::open(&changing, |part| seen.extend_from_slice(part)).unwrap();
        assert_eq!(seen, bytes, "every byte is seen once, in order");
        let records_at = bytes.len() - 500 * RECORD_BYTES;
        changing.0.borrow_mut()[records_at + 7 * RECORD_BYTES + 5] ^= 1;
        assert!(segment.record(7).is_err());
        assert!(segment.find(&records[7].tag).is_err());
        assert!(segment.records().any(|record| record.is_err()));
        assert_eq!(segment.record(8), Ok(records[8]));
        // Cut short, even: an error, not a panic.
        changing.0.borrow_mut().truncate(records_at);
        assert!(segment.find(&records[9].tag).is_err());
        assert!(segment.records().next().is_some_and(|first| first.is_err()));
    }

    #[test]
    fn a_segment_is_searched_only_within_its_range() {
        let (packs, records, _) = sample(40);
        let mut part = SegmentBuilder::new(&SessionId::from_bytes([1; 16]), &[2; 16], &packs, 20);
        let (first, last) = (records[10].tag, records[29].tag);
        for record in records
            .iter()
            .filter(|one| (first..=last).contains(&one.tag))
        {
            part.push(*record);
        }
        let bytes = part.finish((first, last));
        let segment = Segment::parse(bytes.clone()).unwrap();
        for record in &records {
            let found = segment.find(&record.tag).unwrap();
            assert_eq!(!found.is_empty(), (first..=last).contains(&record.tag));
        }
        // A tag outside of what the header says.
        let mut narrow = bytes;
        narrow[72..88].copy_from_slice(first.as_bytes());
        assert!(Segment::parse(narrow).is_err());
    }

    #[test]
    fn an_unsorted_segment_is_refused() {
        let (_, _, mut bytes) = sample(20);
        let end = bytes.len();
        let last = bytes[end - RECORD_BYTES..].to_vec();
        bytes[end - 2 * RECORD_BYTES..end - RECORD_BYTES].copy_from_slice(&last);
        assert!(Segment::parse(bytes).is_err());
    }
}
