//! Index segments: where each tag stands. See the module documentation of `format`.

use super::pack::{HEADER_BYTES as PACK_HEADER_BYTES, MAX_PACK_BYTES, PackKind};
use super::wire::{Fields, FormatError};
use crate::model::{ObjectHash, PackName, SessionId, Tag};

const MAGIC: &[u8; 8] = b"VMKINDX1";
/// magic 8, session 16, random 16, records u64, packs u32, sections u32, first tag 16, last tag 16.
const HEADER_BYTES: usize = 88;
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

/// Lays out a segment. `records` are sorted here; `packs` keep their order (records refer to it).
pub fn build(
    session: &SessionId,
    random: &[u8; 16],
    packs: &[PackRow],
    records: &mut Vec<Record>,
) -> Vec<u8> {
    records.sort_unstable();
    records.dedup();
    let bits = if records.len() > 1 << 18 { 16 } else { 8 };
    let fan_out_bytes = 4usize << bits;
    let packs_at = HEADER_BYTES + 3 * SECTION_BYTES;
    let fan_out_at = packs_at + packs.len() * PACK_BYTES;
    let records_at = fan_out_at + fan_out_bytes;
    let mut out = Vec::with_capacity(records_at + records.len() * RECORD_BYTES);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(session.as_bytes());
    out.extend_from_slice(random);
    out.extend_from_slice(&(records.len() as u64).to_le_bytes());
    out.extend_from_slice(&(packs.len() as u32).to_le_bytes());
    out.extend_from_slice(&3u32.to_le_bytes());
    out.extend_from_slice(&[0; 16]);
    out.extend_from_slice(&[0xff; 16]);
    let sections = [
        (SECTION_PACKS, packs_at, packs.len() * PACK_BYTES),
        (SECTION_FAN_OUT, fan_out_at, fan_out_bytes),
        (SECTION_RECORDS, records_at, records.len() * RECORD_BYTES),
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
    let mut before = 0usize;
    for slot in 0..1usize << bits {
        before += records
            .get(before..)
            .unwrap_or_default()
            .partition_point(|record| slot_of(&record.tag, bits) <= slot);
        out.extend_from_slice(&(before as u32).to_le_bytes());
    }
    for record in records.iter() {
        out.extend_from_slice(record.tag.as_bytes());
        out.extend_from_slice(&record.pack.to_le_bytes());
        out.extend_from_slice(&record.offset.to_le_bytes());
        out.extend_from_slice(&record.length_bytes.to_le_bytes());
    }
    out
}

fn slot_of(tag: &Tag, bits: u32) -> usize {
    let [a, b, ..] = *tag.as_bytes();
    usize::from(u16::from_be_bytes([a, b])) >> (16 - bits)
}

/// A checked segment, searched in place.
pub struct Segment {
    bytes: Vec<u8>,
    packs: Vec<PackRow>,
    fan_out_at: usize,
    bits: u32,
    records_at: usize,
    record_count: usize,
}

impl Segment {
    /// Takes a segment apart and checks its order, so that a search can be trusted.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, FormatError> {
        let mut fields = Fields::new(&bytes);
        fields.magic(MAGIC, "index segment")?;
        fields.bytes(32, "segment session")?;
        let record_count = fields.u64("record count")?;
        let pack_count = fields.u32("pack count")?;
        let section_count = fields.u32("section count")?;
        let tags = (
            Tag::from_bytes(fields.array("first tag")?),
            Tag::from_bytes(fields.array("last tag")?),
        );
        if section_count > MAX_SECTIONS {
            return Err(FormatError::new("segment with too many sections"));
        }
        let (mut packs_at, mut fan_out, mut records_at) = (None, None, None);
        // Sections follow the table and each other without a gap, up to the segment's end.
        let mut next = (HEADER_BYTES + SECTION_BYTES * section_count as usize) as u64;
        for _ in 0..section_count {
            let kind = fields.u32("section kind")?;
            let reserved = fields.u32("section reserved field")?;
            let offset = fields.u64("section offset")?;
            let length = fields.u64("section length")?;
            let end = offset
                .checked_add(length)
                .filter(|end| *end <= bytes.len() as u64)
                .ok_or_else(|| FormatError::new("section outside of the segment"))?;
            if reserved != 0 || offset != next {
                return Err(FormatError::new("segment with a gap between its sections"));
            }
            next = end;
            let range = offset as usize..end as usize;
            let (place, expected) = match kind {
                SECTION_PACKS => (&mut packs_at, u64::from(pack_count) * PACK_BYTES as u64),
                SECTION_FAN_OUT => (&mut fan_out, length),
                SECTION_RECORDS => (
                    &mut records_at,
                    record_count.saturating_mul(RECORD_BYTES as u64),
                ),
                kind if kind >= SECTION_OPTIONAL => continue,
                _ => return Err(FormatError::new("segment with an unknown section")),
            };
            if expected != length || place.replace(range).is_some() {
                return Err(FormatError::new("section of a wrong length, or twice"));
            }
        }
        if next != bytes.len() as u64 {
            return Err(FormatError::new("bytes after the end of the index segment"));
        }
        let missing = || FormatError::new("segment lacks a section");
        let packs_range = packs_at.ok_or_else(missing)?;
        let fan_out_range = fan_out.ok_or_else(missing)?;
        let records_range = records_at.ok_or_else(missing)?;
        let bits = match fan_out_range.len() {
            1024 => 8,
            262_144 => 16,
            _ => return Err(FormatError::new("fan-out table of a wrong length")),
        };
        let packs = parse_packs(bytes.get(packs_range).unwrap_or_default())?;
        let segment = Segment {
            packs,
            fan_out_at: fan_out_range.start,
            bits,
            records_at: records_range.start,
            record_count: record_count as usize,
            bytes,
        };
        segment.check_order(&tags)?;
        Ok(segment)
    }

    fn check_order(&self, (first, last_tag): &(Tag, Tag)) -> Result<(), FormatError> {
        let mut last: Option<Record> = None;
        let mut slot = 0usize;
        for at in 0..self.record_count {
            let record = self.record(at);
            if last.is_some_and(|last| last >= record) {
                return Err(FormatError::new("segment is not sorted"));
            }
            let Some(pack) = self.packs.get(record.pack as usize) else {
                return Err(FormatError::new("segment names a pack it does not list"));
            };
            let end = u64::from(record.offset) + u64::from(record.length_bytes);
            if (record.offset as usize) < PACK_HEADER_BYTES || end > pack.size_bytes {
                return Err(FormatError::new(
                    "segment names a frame outside of its pack",
                ));
            }
            if record.tag < *first || record.tag > *last_tag {
                return Err(FormatError::new("segment holds a tag outside of its range"));
            }
            while slot < slot_of(&record.tag, self.bits) {
                if self.fan_out(slot) != at {
                    return Err(FormatError::new("fan-out table does not fit the records"));
                }
                slot += 1;
            }
            last = Some(record);
        }
        while slot < 1 << self.bits {
            if self.fan_out(slot) != self.record_count {
                return Err(FormatError::new("fan-out table does not fit the records"));
            }
            slot += 1;
        }
        Ok(())
    }

    fn fan_out(&self, slot: usize) -> usize {
        let at = self.fan_out_at + 4 * slot;
        Fields::new(self.bytes.get(at..).unwrap_or_default())
            .u32("fan-out")
            .unwrap_or_default() as usize
    }

    pub fn packs(&self) -> &[PackRow] {
        &self.packs
    }

    pub fn len(&self) -> usize {
        self.record_count
    }

    pub fn is_empty(&self) -> bool {
        self.record_count == 0
    }

    fn raw(&self, at: usize) -> &[u8; RECORD_BYTES] {
        let start = self.records_at + at * RECORD_BYTES;
        self.bytes
            .get(start..)
            .and_then(|rest| rest.first_chunk())
            .expect("parse checked that record_count records lie inside the bytes")
    }

    /// The `at`-th record, `at < len()`.
    pub fn record(&self, at: usize) -> Record {
        let raw = self.raw(at);
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

    fn tag_at(&self, at: usize) -> &[u8; 16] {
        self.raw(at).first_chunk().expect("a record has 28 bytes")
    }

    /// The positions of all records of `tag`.
    pub fn find(&self, tag: &Tag) -> std::ops::Range<usize> {
        let slot = slot_of(tag, self.bits);
        let mut low = match slot {
            0 => 0,
            slot => self.fan_out(slot - 1),
        };
        let high = self.fan_out(slot);
        let mut upper = high;
        while low < upper {
            let middle = low + (upper - low) / 2;
            if self.tag_at(middle) < tag.as_bytes() {
                low = middle + 1;
            } else {
                upper = middle;
            }
        }
        let mut end = low;
        while end < high && self.tag_at(end) == tag.as_bytes() {
            end += 1;
        }
        low..end
    }
}

fn parse_packs(section: &[u8]) -> Result<Vec<PackRow>, FormatError> {
    let mut fields = Fields::new(section);
    let mut packs = Vec::with_capacity(section.len() / PACK_BYTES);
    while fields.remaining() > 0 {
        let session = SessionId::from_bytes(fields.array("pack session")?);
        let hash = ObjectHash::from_bytes(fields.array("pack hash")?);
        let size_bytes = fields.u64("pack size")?;
        if size_bytes > MAX_PACK_BYTES {
            return Err(FormatError::new("pack table lists an impossible size"));
        }
        let frames = fields.u32("pack frame count")?;
        let kind = PackKind::from_code(fields.u32("pack kind")?)
            .ok_or_else(|| FormatError::new("pack table lists an unknown kind"))?;
        packs.push(PackRow {
            name: PackName { session, hash },
            size_bytes,
            frames,
            kind,
        });
    }
    Ok(packs)
}

/// Reads only the session in the header.
pub fn session_of(bytes: &[u8]) -> Result<SessionId, FormatError> {
    let mut fields = Fields::new(bytes);
    fields.magic(MAGIC, "index segment")?;
    Ok(SessionId::from_bytes(fields.array("segment session")?))
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
                let found: Vec<Record> = segment
                    .find(&record.tag)
                    .map(|at| segment.record(at))
                    .collect();
                let expected: Vec<Record> = records
                    .iter()
                    .filter(|other| other.tag == record.tag)
                    .copied()
                    .collect();
                assert_eq!(found, expected);
            }
            assert!(segment.find(&Tag::from_bytes([0xee; 16])).is_empty());
            assert!(segment.find(&Tag::from_bytes([0; 16])).is_empty());
            assert!(segment.find(&Tag::from_bytes([0xff; 16])).is_empty());
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
        for bad in [gap, more, reserved, twice] {
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

    #[test]
    fn an_unsorted_segment_is_refused() {
        let (_, _, mut bytes) = sample(20);
        let end = bytes.len();
        let last = bytes[end - RECORD_BYTES..].to_vec();
        bytes[end - 2 * RECORD_BYTES..end - RECORD_BYTES].copy_from_slice(&last);
        assert!(Segment::parse(bytes).is_err());
    }
}
