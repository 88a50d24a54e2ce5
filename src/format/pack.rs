//! Packs: many sealed frames in one object. See the module documentation of `format`.

use super::wire::{Fields, FormatError};
use crate::model::{ObjectHash, PieceKind, SessionId, Tag};

const MAGIC: &[u8; 8] = b"VMKPACK1";
const END_MAGIC: &[u8; 8] = b"VMKPEND1";
/// magic 8, key generation u32, kind of pack u32, session 16, random 16.
pub const HEADER_BYTES: usize = 48;
/// The checked fields and their checksum; the sealed piece follows.
pub const FRAME_HEADER_BYTES: usize = 44;
/// kind u8, flags u8, zero u16, tag 16, plain length u32, sealed length u32.
const CHECKED_HEADER_BYTES: usize = 28;
/// The first bytes of BLAKE3 over the checked fields and the sealed piece.
const CHECKSUM_BYTES: usize = 16;
/// As many bytes as BLAKE3 takes at once with the widest instructions.
const CHECKSUM_FIRST_BYTES: usize = 16 << 10;
/// tag 16, offset u32, length u32, kind u8, zeros 7.
const DIRECTORY_ENTRY_BYTES: usize = 32;
/// BLAKE3 over the pack's header and the directory.
const DIRECTORY_HASH_BYTES: usize = 32;
/// directory offset u32, frames u32, end magic 8.
pub const TRAILER_BYTES: usize = 16;
const FLAG_COMPRESSED: u8 = 1;
/// No reader accepts a larger pack; offsets fit u32 with room to spare.
pub const MAX_PACK_BYTES: u64 = 256 << 20;
/// A writer closes its pack in time for one more frame and the directory to fit.
pub const MAX_PACK_TARGET_BYTES: u64 = MAX_PACK_BYTES - (16 << 20);
/// nonce 12, GCM tag 16.
pub const SEAL_BYTES: usize = 28;

/// Data packs hold chunks, node packs hold nodes; never both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PackKind {
    Data,
    Node,
}

impl PackKind {
    pub const fn of(kind: PieceKind) -> Self {
        match kind {
            PieceKind::Chunk => PackKind::Data,
            PieceKind::Node { .. } => PackKind::Node,
        }
    }

    pub(super) const fn code(self) -> u32 {
        match self {
            PackKind::Data => 0,
            PackKind::Node => 1,
        }
    }

    pub(super) const fn from_code(code: u32) -> Option<Self> {
        match code {
            0 => Some(PackKind::Data),
            1 => Some(PackKind::Node),
            _ => None,
        }
    }
}

/// What stands before a sealed piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    pub kind: PieceKind,
    pub compressed: bool,
    pub tag: Tag,
    pub plain_bytes: u32,
    pub sealed_bytes: u32,
}

impl FrameHeader {
    fn checked_fields(&self) -> [u8; CHECKED_HEADER_BYTES] {
        let mut bytes = [0; CHECKED_HEADER_BYTES];
        bytes[0] = self.kind.code();
        bytes[1] = if self.compressed { FLAG_COMPRESSED } else { 0 };
        bytes[4..20].copy_from_slice(self.tag.as_bytes());
        bytes[20..24].copy_from_slice(&self.plain_bytes.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.sealed_bytes.to_le_bytes());
        bytes
    }

    pub(super) fn parse(fields: &mut Fields<'_>) -> Result<Self, FormatError> {
        let kind = PieceKind::from_code(fields.u8("frame kind")?)
            .ok_or_else(|| FormatError::new("frame of an unknown kind"))?;
        let flags = fields.u8("frame flags")?;
        let reserved = fields.u16("frame reserved field")?;
        if flags & !FLAG_COMPRESSED != 0 || reserved != 0 {
            return Err(FormatError::new("frame with unknown flags"));
        }
        let tag = Tag::from_bytes(fields.array("frame tag")?);
        let plain_bytes = fields.u32("frame plain length")?;
        let sealed_bytes = fields.u32("frame sealed length")?;
        let plain = plain_bytes as usize;
        let whole_ids = kind == PieceKind::Chunk || plain.is_multiple_of(32);
        if plain == 0 || plain > kind.max_plain_bytes() || !whole_ids {
            return Err(FormatError::new("frame with an impossible plain length"));
        }
        // What does not shrink is stored as it is: the length says which it is.
        let compressed = flags == FLAG_COMPRESSED;
        let stored = (sealed_bytes as usize).saturating_sub(SEAL_BYTES);
        let fits = match compressed {
            true => stored > 0 && stored < plain,
            false => stored == plain,
        };
        if !fits {
            return Err(FormatError::new("frame with an impossible sealed length"));
        }
        Ok(FrameHeader {
            kind,
            compressed,
            tag,
            plain_bytes,
            sealed_bytes,
        })
    }
}

fn checksum(checked: &[u8], sealed: &[u8]) -> [u8; CHECKSUM_BYTES] {
    // BLAKE3 takes many of its 1 KiB chunks at once only where it is given a power of two of them from
    // such a boundary on: fed with 28 bytes first it takes twice the time.
    let mut first = [0; CHECKSUM_FIRST_BYTES];
    let (now, later) = sealed.split_at(sealed.len().min(first.len() - checked.len()));
    let length = checked.len() + now.len();
    first[..checked.len()].copy_from_slice(checked);
    first[checked.len()..length].copy_from_slice(now);
    let mut hasher = blake3::Hasher::new();
    hasher.update(&first[..length]);
    hasher.update(later);
    let mut sum = [0; CHECKSUM_BYTES];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..CHECKSUM_BYTES]);
    sum
}

/// A frame taken apart, its checksum verified.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    pub header: FrameHeader,
    pub sealed: &'a [u8],
}

/// Takes exactly one frame from `bytes` and checks its checksum.
pub fn parse_frame(bytes: &[u8]) -> Result<Frame<'_>, FormatError> {
    let mut fields = Fields::new(bytes);
    let header = FrameHeader::parse(&mut fields)?;
    let sum: [u8; CHECKSUM_BYTES] = fields.array("frame checksum")?;
    let sealed = fields.bytes(header.sealed_bytes as usize, "sealed piece")?;
    fields.end("frame")?;
    let checked = bytes.get(..CHECKED_HEADER_BYTES).unwrap_or_default();
    match checksum(checked, sealed) == sum {
        true => Ok(Frame { header, sealed }),
        false => Err(FormatError::new("frame checksum does not match")),
    }
}

/// One frame as the pack's directory lists it. `length_bytes` includes the frame header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectoryEntry {
    pub tag: Tag,
    pub offset: u32,
    pub length_bytes: u32,
    pub kind: PieceKind,
}

/// A pack being filled in memory.
pub struct PackBuilder {
    bytes: Vec<u8>,
    entries: Vec<DirectoryEntry>,
}

/// A finished pack: its bytes and what they are called.
pub struct FinishedPack {
    pub bytes: Vec<u8>,
    pub hash: ObjectHash,
    pub entries: Vec<DirectoryEntry>,
}

impl PackBuilder {
    /// `random` makes the name unique even if the same frames were packed twice.
    pub fn new(
        kind: PackKind,
        generation: u32,
        session: &SessionId,
        random: &[u8; 16],
        capacity_bytes: usize,
    ) -> Self {
        let mut bytes = Vec::with_capacity(capacity_bytes);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&generation.to_le_bytes());
        bytes.extend_from_slice(&kind.code().to_le_bytes());
        bytes.extend_from_slice(session.as_bytes());
        bytes.extend_from_slice(random);
        PackBuilder {
            bytes,
            entries: Vec::new(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn entries(&self) -> &[DirectoryEntry] {
        &self.entries
    }

    /// Size if it were finished now.
    pub fn size_bytes(&self) -> usize {
        self.bytes.len()
            + self.entries.len() * DIRECTORY_ENTRY_BYTES
            + DIRECTORY_HASH_BYTES
            + TRAILER_BYTES
    }

    /// Appends a frame; the caller keeps the pack below [`MAX_PACK_BYTES`].
    ///
    /// Panics if the header says another length: the pack would be unreadable from there on.
    pub fn append(&mut self, header: &FrameHeader, sealed: &[u8]) {
        assert_eq!(header.sealed_bytes as usize, sealed.len());
        let checked = header.checked_fields();
        let offset = self.bytes.len() as u32;
        self.bytes.extend_from_slice(&checked);
        self.bytes.extend_from_slice(&checksum(&checked, sealed));
        self.bytes.extend_from_slice(sealed);
        self.entries.push(DirectoryEntry {
            tag: header.tag,
            offset,
            length_bytes: self.bytes.len() as u32 - offset,
            kind: header.kind,
        });
    }

    pub fn finish(mut self) -> FinishedPack {
        let directory_offset = self.bytes.len();
        for entry in &self.entries {
            self.bytes.extend_from_slice(entry.tag.as_bytes());
            self.bytes.extend_from_slice(&entry.offset.to_le_bytes());
            self.bytes
                .extend_from_slice(&entry.length_bytes.to_le_bytes());
            self.bytes.extend_from_slice(&[entry.kind.code(), 0, 0, 0]);
            self.bytes.extend_from_slice(&[0; 4]);
        }
        let hash = directory_hash(
            self.bytes.get(..HEADER_BYTES).unwrap_or_default(),
            self.bytes.get(directory_offset..).unwrap_or_default(),
        );
        self.bytes.extend_from_slice(&hash);
        self.bytes
            .extend_from_slice(&(directory_offset as u32).to_le_bytes());
        self.bytes
            .extend_from_slice(&(self.entries.len() as u32).to_le_bytes());
        self.bytes.extend_from_slice(END_MAGIC);
        FinishedPack {
            hash: ObjectHash::from_bytes(*blake3::hash(&self.bytes).as_bytes()),
            bytes: self.bytes,
            entries: self.entries,
        }
    }
}

fn directory_hash(header: &[u8], directory: &[u8]) -> [u8; DIRECTORY_HASH_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(header);
    hasher.update(directory);
    *hasher.finalize().as_bytes()
}

/// What the first bytes of a pack say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackHeader {
    pub kind: PackKind,
    pub generation: u32,
    pub session: SessionId,
}

pub fn parse_header(bytes: &[u8]) -> Result<PackHeader, FormatError> {
    let mut fields = Fields::new(bytes);
    fields.magic(MAGIC, "pack")?;
    let generation = fields.u32("key generation")?;
    let kind = PackKind::from_code(fields.u32("pack kind")?)
        .ok_or_else(|| FormatError::new("pack of an unknown kind"))?;
    let session = SessionId::from_bytes(fields.array("pack session")?);
    fields.bytes(16, "pack random")?;
    Ok(PackHeader {
        kind,
        generation,
        session,
    })
}

/// Where the directory stands: from the last [`TRAILER_BYTES`] bytes of a pack of `pack_bytes`.
/// Returns the range of directory and its hash, without the trailer.
pub fn directory_range(
    trailer: &[u8],
    pack_bytes: u64,
) -> Result<std::ops::Range<u64>, FormatError> {
    let mut fields = Fields::new(trailer);
    let offset = u64::from(fields.u32("directory offset")?);
    let count = u64::from(fields.u32("directory count")?);
    fields.magic(END_MAGIC, "pack trailer")?;
    fields.end("pack trailer")?;
    let end = offset + count * DIRECTORY_ENTRY_BYTES as u64 + DIRECTORY_HASH_BYTES as u64;
    if pack_bytes > MAX_PACK_BYTES
        || offset < HEADER_BYTES as u64
        || end + TRAILER_BYTES as u64 != pack_bytes
    {
        return Err(FormatError::new("pack trailer does not fit the pack"));
    }
    Ok(offset..end)
}

/// The directory from the pack's first [`HEADER_BYTES`] bytes and the range that
/// [`directory_range`] gave, which starts at `directory_offset`. Frames must fill the pack
/// without gap or overlap.
pub fn parse_directory(
    header: &[u8],
    directory_and_hash: &[u8],
    directory_offset: u64,
) -> Result<Vec<DirectoryEntry>, FormatError> {
    let pack = parse_header(header)?;
    let (directory, hash) = directory_and_hash
        .len()
        .checked_sub(DIRECTORY_HASH_BYTES)
        .and_then(|at| directory_and_hash.split_at_checked(at))
        .ok_or_else(|| FormatError::new("pack directory cut short"))?;
    if directory_hash(header, directory) != *hash {
        return Err(FormatError::new("pack directory hash does not match"));
    }
    let mut fields = Fields::new(directory);
    let mut entries = Vec::with_capacity(directory.len() / DIRECTORY_ENTRY_BYTES);
    let mut next = HEADER_BYTES as u64;
    while fields.remaining() > 0 {
        let tag = Tag::from_bytes(fields.array("directory tag")?);
        let offset = fields.u32("directory frame offset")?;
        let length_bytes = fields.u32("directory frame length")?;
        let kind = PieceKind::from_code(fields.u8("directory frame kind")?)
            .ok_or_else(|| FormatError::new("directory lists an unknown kind"))?;
        if fields.array::<7>("directory reserved field")? != [0; 7] {
            return Err(FormatError::new("directory with unknown flags"));
        }
        if PackKind::of(kind) != pack.kind {
            return Err(FormatError::new("pack mixes data and nodes"));
        }
        let stored = (length_bytes as usize).saturating_sub(FRAME_HEADER_BYTES + SEAL_BYTES);
        if u64::from(offset) != next || stored == 0 || stored > kind.max_plain_bytes() {
            return Err(FormatError::new("directory does not fit the frames"));
        }
        next += u64::from(length_bytes);
        entries.push(DirectoryEntry {
            tag,
            offset,
            length_bytes,
            kind,
        });
    }
    match next == directory_offset {
        true => Ok(entries),
        false => Err(FormatError::new("directory does not fit the frames")),
    }
}

/// The directory of a pack that is whole in memory.
pub fn directory_of(pack: &[u8]) -> Result<Vec<DirectoryEntry>, FormatError> {
    let trailer_at = pack.len().saturating_sub(TRAILER_BYTES);
    let range = directory_range(
        pack.get(trailer_at..).unwrap_or_default(),
        pack.len() as u64,
    )?;
    parse_directory(
        pack.get(..HEADER_BYTES).unwrap_or_default(),
        pack.get(range.start as usize..range.end as usize)
            .unwrap_or_default(),
        range.start,
    )
}

/// Checks every frame of a pack that is whole in memory, without a key. Returns its directory
/// and the tags of the frames that are damaged.
pub fn scrub(pack: &[u8]) -> Result<(Vec<DirectoryEntry>, Vec<Tag>), FormatError> {
    let entries = directory_of(pack)?;
    let damaged = entries
        .iter()
        .filter(|entry| !frame_matches(pack, entry))
        .map(|entry| entry.tag)
        .collect();
    Ok((entries, damaged))
}

/// The bytes of one frame of a pack that is whole in memory.
pub fn frame_bytes<'a>(pack: &'a [u8], entry: &DirectoryEntry) -> Option<&'a [u8]> {
    let start = entry.offset as usize;
    pack.get(start..start.checked_add(entry.length_bytes as usize)?)
}

fn frame_matches(pack: &[u8], entry: &DirectoryEntry) -> bool {
    frame_bytes(pack, entry)
        .and_then(|bytes| parse_frame(bytes).ok())
        .is_some_and(|frame| frame.header.tag == entry.tag && frame.header.kind == entry.kind)
}

/// Gives a pack whose trailer fits the hashes that nobody can guess, for the fuzz targets.
#[cfg(any(test, fuzzing))]
pub(super) fn put_hashes_right(pack: &mut [u8]) -> Option<()> {
    let trailer_at = pack.len().checked_sub(TRAILER_BYTES)?;
    let range = directory_range(pack.get(trailer_at..)?, pack.len() as u64).ok()?;
    let (start, end) = (
        range.start as usize,
        range.end as usize - DIRECTORY_HASH_BYTES,
    );
    let mut at = HEADER_BYTES;
    while at < start {
        let header = FrameHeader::parse(&mut Fields::new(pack.get(at..start)?)).ok()?;
        let next = at + FRAME_HEADER_BYTES + header.sealed_bytes as usize;
        let (checked, rest) = pack
            .get_mut(at..next)?
            .split_at_mut_checked(CHECKED_HEADER_BYTES)?;
        let (sum, sealed) = rest.split_at_mut_checked(CHECKSUM_BYTES)?;
        sum.copy_from_slice(&checksum(checked, sealed));
        at = next;
    }
    let hash = directory_hash(pack.get(..HEADER_BYTES)?, pack.get(start..end)?);
    pack.get_mut(end..end + DIRECTORY_HASH_BYTES)?
        .copy_from_slice(&hash);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small_pack() -> FinishedPack {
        let session = SessionId::from_bytes([7; 16]);
        let mut builder = PackBuilder::new(PackKind::Data, 1, &session, &[9; 16], 0);
        for n in 0..3u8 {
            let sealed = vec![n; if n == 1 { 41 } else { 64 + SEAL_BYTES }];
            let header = FrameHeader {
                kind: PieceKind::Chunk,
                compressed: n == 1,
                tag: Tag::from_bytes([n; 16]),
                plain_bytes: 64,
                sealed_bytes: sealed.len() as u32,
            };
            builder.append(&header, &sealed);
        }
        builder.finish()
    }

    #[test]
    fn a_directory_read_from_the_end_lists_every_frame() {
        let pack = small_pack();
        let (entries, damaged) = scrub(&pack.bytes).unwrap();
        assert_eq!(entries, pack.entries);
        assert!(damaged.is_empty());
        let frame = parse_frame(frame_bytes(&pack.bytes, &entries[1]).unwrap()).unwrap();
        assert!(frame.header.compressed);
        assert_eq!(frame.sealed, vec![1; 41]);
    }

    #[test]
    fn every_flipped_byte_and_every_truncation_is_noticed_without_a_key() {
        let pack = small_pack();
        for at in 0..pack.bytes.len() {
            let mut bad = pack.bytes.clone();
            bad[at] ^= 0x10;
            let noticed = match scrub(&bad) {
                Ok((_, damaged)) => !damaged.is_empty(),
                Err(_) => true,
            };
            assert!(noticed, "byte {at}");
        }
        for length in 0..pack.bytes.len() {
            assert!(directory_of(&pack.bytes[..length]).is_err(), "{length}");
        }
    }
}
