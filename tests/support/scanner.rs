//! What somebody finds who has the store and a key, and does not ask the program: every byte of
//! every file is looked at, whatever its name; index and ledger are not believed, not even read.

use super::guest::Picture;
use super::host::files_below;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use vmkeep::codec::{
    CustomerKey, HostIdentity, Keys, Opener, PointRecord, decode_node, open_record,
};
use vmkeep::format::pack::{self, FRAME_HEADER_BYTES, FrameHeader, SEAL_BYTES};
use vmkeep::model::{Id, PieceKind, PointId, Tag, TreeShape};

const RECORD_MAGIC: &[u8] = b"VMKPOIN1";

/// A store and the identity that opens its keys. Remembers what it opened, so that a later scan
/// of the same ciphertext is cheap.
pub struct Scanner {
    store: PathBuf,
    identity: HostIdentity,
    opener: Opener,
    opened: HashMap<(Tag, blake3::Hash), Opened>,
}

#[derive(Clone)]
enum Opened {
    Chunk { hash: blake3::Hash },
    Node { children: Vec<Option<Id>> },
    Not(String),
}

/// Where in the store a sealed frame lies.
#[derive(Debug, Clone)]
struct Place {
    file: usize,
    sealed: std::ops::Range<usize>,
    header: FrameHeader,
    hash: blake3::Hash,
}

/// Everything that one look at the store found.
pub struct Scan {
    store: PathBuf,
    files: Vec<(PathBuf, Vec<u8>)>,
    frames: HashMap<Tag, Vec<Place>>,
    /// What looks like a frame whose end is missing or changed.
    broken: Vec<(usize, Tag)>,
    pub points: BTreeMap<PointId, WalkedPoint>,
    /// Records that no customer key opens; where.
    pub unopened_records: Vec<String>,
}

/// A restore point as its record and the frames in the store tell it.
pub struct WalkedPoint {
    pub customer: String,
    pub place: String,
    pub record: PointRecord,
    pub disks: Vec<WalkedDisk>,
    /// Chunks and nodes below its roots.
    pub tags: HashSet<Tag>,
    /// Ids of the pieces, by tag: what must never lie about in any file.
    pub ids: HashMap<Tag, Id>,
    /// Pieces that are missing or do not open.
    pub damage: Vec<String>,
}

pub struct WalkedDisk {
    pub name: String,
    pub size: u64,
    pub chunks: Vec<blake3::Hash>,
    pub chunk_tags: Vec<Option<Tag>>,
}

impl WalkedDisk {
    pub fn is(&self, picture: &Picture) -> bool {
        self.size == picture.size && self.chunks == picture.chunks
    }
}

impl Scanner {
    pub fn new(store: &Path, identity_file: &Path) -> Self {
        let text = fs::read_to_string(identity_file).unwrap();
        Scanner {
            store: store.to_path_buf(),
            identity: HostIdentity::from_file_text(&text).unwrap_or_else(|error| panic!("{error}")),
            opener: Opener::new().unwrap(),
            opened: HashMap::new(),
        }
    }

    pub fn identity(&self) -> &HostIdentity {
        &self.identity
    }

    /// The keys that the identity opens, wherever a key file lies below a customer's folder.
    fn keys(&self, files: &[(PathBuf, Vec<u8>)]) -> Vec<(String, Keys)> {
        let mut keys = Vec::new();
        for (path, bytes) in files {
            if path.extension().is_none_or(|extension| extension != "age") {
                continue;
            }
            let Ok(plain) = self.identity.decrypt(bytes) else {
                continue;
            };
            let key = CustomerKey::from_key_file(&plain)
                .unwrap_or_else(|error| panic!("{}: {}", path.display(), error.0));
            let customer = path
                .iter()
                .skip_while(|part| *part != "customers")
                .nth(1)
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default();
            keys.push((customer, Keys::derive(&key)));
        }
        keys
    }

    pub fn scan(&mut self) -> Scan {
        let files: Vec<(PathBuf, Vec<u8>)> = files_below(&self.store)
            .into_iter()
            .map(|path| {
                let bytes =
                    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                (path, bytes)
            })
            .collect();
        let keys = self.keys(&files);
        let mut scan = Scan {
            store: self.store.clone(),
            frames: HashMap::new(),
            broken: Vec::new(),
            points: BTreeMap::new(),
            unopened_records: Vec::new(),
            files,
        };
        let mut records: Vec<(usize, usize)> = Vec::new();
        for (number, (_, bytes)) in scan.files.iter().enumerate() {
            find_frames(number, bytes, &mut scan.frames, &mut scan.broken);
            find_all(bytes, RECORD_MAGIC, |at| records.push((number, at)));
        }
        // A record opens under its point's id only; the name of a file may be one.
        let ids: BTreeSet<PointId> = scan
            .files
            .iter()
            .filter_map(|(path, _)| path.file_name()?.to_str()?.parse().ok())
            .collect();
        for (number, at) in records {
            let (path, bytes) = &scan.files[number];
            let stored = &bytes[at..];
            let place = shown(&self.store, path);
            let found = keys.iter().find_map(|(customer, keys)| {
                ids.iter()
                    .find_map(|id| Some((id, open_record(keys, id, stored).ok()?)))
                    .map(|(id, record)| (customer.clone(), keys, *id, record))
            });
            let Some((customer, keys, id, record)) = found else {
                scan.unopened_records.push(place);
                continue;
            };
            let point = self.walk(&scan, customer, place, keys, record);
            scan.points.insert(id, point);
        }
        scan
    }

    fn walk(
        &mut self,
        scan: &Scan,
        customer: String,
        place: String,
        keys: &Keys,
        record: PointRecord,
    ) -> WalkedPoint {
        let mut point = WalkedPoint {
            customer,
            place,
            record,
            disks: Vec::new(),
            tags: HashSet::new(),
            ids: HashMap::new(),
            damage: Vec::new(),
        };
        for disk in point.record.disks.clone() {
            let shape = disk.shape;
            let holes = |index| blake3::hash(&vec![0; shape.chunk_length(index)]);
            let full_hole = blake3::hash(&vec![0; shape.chunk_bytes as usize]);
            let count = shape.chunk_count();
            let mut walked = WalkedDisk {
                name: disk.name.to_string(),
                size: shape.size_bytes,
                chunks: vec![full_hole; count as usize],
                chunk_tags: vec![None; count as usize],
            };
            if let Some(last) = walked.chunks.last_mut() {
                *last = holes(count - 1);
            }
            if let Some(root) = disk.root {
                let from = (shape.height(), 0);
                self.walk_node(scan, keys, &shape, from, &root, &mut point, &mut walked);
            }
            point.disks.push(walked);
        }
        point
    }

    #[expect(clippy::too_many_arguments)]
    fn walk_node(
        &mut self,
        scan: &Scan,
        keys: &Keys,
        shape: &TreeShape,
        (height, index): (u8, u64),
        id: &Id,
        point: &mut WalkedPoint,
        disk: &mut WalkedDisk,
    ) {
        let kind = PieceKind::Node { height };
        let expected = shape.children_of(height, index);
        let children = match self.piece(scan, keys, kind, expected, id, point) {
            Some(Opened::Node { children }) => children,
            _ => return,
        };
        for (number, child) in children.iter().enumerate() {
            let Some(child) = child else { continue };
            let below = index * 256 + number as u64;
            if height > 1 {
                self.walk_node(scan, keys, shape, (height - 1, below), child, point, disk);
                continue;
            }
            let length = shape.chunk_length(below);
            if let Some(Opened::Chunk { hash }) =
                self.piece(scan, keys, PieceKind::Chunk, length, child, point)
            {
                disk.chunks[below as usize] = hash;
                disk.chunk_tags[below as usize] = Some(keys.tag(child));
            }
        }
    }

    /// Opens a piece from whatever copy of it opens. `expected`: bytes of a chunk, children of a
    /// node.
    fn piece(
        &mut self,
        scan: &Scan,
        keys: &Keys,
        kind: PieceKind,
        expected: usize,
        id: &Id,
        point: &mut WalkedPoint,
    ) -> Option<Opened> {
        let tag = keys.tag(id);
        point.tags.insert(tag);
        point.ids.insert(tag, *id);
        let places = scan.frames.get(&tag).map_or(&[][..], Vec::as_slice);
        let mut refusals = Vec::new();
        for place in places {
            let opened = match self.opened.get(&(tag, place.hash)) {
                Some(opened) => opened.clone(),
                None => {
                    let opened = self.open(scan, keys, kind, expected, id, &tag, place);
                    self.opened.insert((tag, place.hash), opened.clone());
                    opened
                }
            };
            match opened {
                Opened::Not(why) => refusals.push(format!("{} ({why})", scan.place(place))),
                opened => return Some(opened),
            }
        }
        point.damage.push(match places.is_empty() {
            true => format!("{kind:?} with tag {tag} is nowhere in the store"),
            false => format!("{kind:?} with tag {tag}: {}", refusals.join(", ")),
        });
        None
    }

    #[expect(clippy::too_many_arguments)]
    fn open(
        &mut self,
        scan: &Scan,
        keys: &Keys,
        kind: PieceKind,
        expected: usize,
        id: &Id,
        tag: &Tag,
        place: &Place,
    ) -> Opened {
        let header = &place.header;
        if header.kind != kind {
            return Opened::Not(format!("it is a {:?}", header.kind));
        }
        let sealed = scan.bytes(place);
        let mut plain = Vec::new();
        let opened = self.opener.open(
            keys,
            kind,
            id,
            tag,
            header.compressed,
            header.plain_bytes,
            sealed,
            &mut plain,
        );
        if let Err(error) = opened {
            return Opened::Not(error.to_string());
        }
        match kind {
            PieceKind::Chunk if plain.len() == expected => Opened::Chunk {
                hash: blake3::hash(&plain),
            },
            PieceKind::Chunk => Opened::Not(format!("it has {} bytes", plain.len())),
            PieceKind::Node { .. } => match decode_node(&plain, expected) {
                Ok(children) => Opened::Node { children },
                Err(error) => Opened::Not(error.to_string()),
            },
        }
    }

    /// The plaintext of every chunk that a record in the store still leads to, point by point.
    pub fn reachable_chunks(&mut self, scan: &Scan, mut each: impl FnMut(&PointId, &[u8])) {
        let keys = self.keys(&scan.files);
        let mut plain = Vec::new();
        for (id, point) in &scan.points {
            for disk in &point.disks {
                for tag in disk.chunk_tags.iter().flatten() {
                    let opens = scan.frames.get(tag).into_iter().flatten().any(|place| {
                        keys.iter().any(|(_, keys)| {
                            self.opener
                                .open(
                                    keys,
                                    PieceKind::Chunk,
                                    &point.ids[tag],
                                    tag,
                                    place.header.compressed,
                                    place.header.plain_bytes,
                                    scan.bytes(place),
                                    &mut plain,
                                )
                                .is_ok()
                        })
                    });
                    assert!(opens, "it opened a moment ago");
                    each(id, &plain);
                }
            }
        }
    }
}

impl Scan {
    fn bytes(&self, place: &Place) -> &[u8] {
        &self.files[place.file].1[place.sealed.clone()]
    }

    fn place(&self, place: &Place) -> String {
        shown(&self.store, &self.files[place.file].0)
    }

    /// All bytes in the store's files, without the reserve.
    pub fn size_bytes(&self) -> u64 {
        self.files
            .iter()
            .filter(|(path, _)| *path != self.store.join("reserve"))
            .map(|(_, bytes)| bytes.len() as u64)
            .sum()
    }

    /// Bytes of sealed frames, copies included.
    pub fn frame_bytes(&self) -> u64 {
        let frames = self.frames.values().flatten();
        frames.map(|place| place.sealed.len() as u64).sum()
    }

    pub fn tags(&self) -> impl Iterator<Item = &Tag> {
        self.frames.keys()
    }

    /// Where copies of this frame lie.
    pub fn places_of(&self, tag: &Tag) -> Vec<String> {
        self.frames
            .get(tag)
            .into_iter()
            .flatten()
            .map(|place| self.place(place))
            .collect()
    }

    /// Sealed bytes of the frames of these tags, all copies.
    pub fn sealed<'a>(&self, tags: impl IntoIterator<Item = &'a Tag>) -> Vec<Vec<u8>> {
        tags.into_iter()
            .filter_map(|tag| self.frames.get(tag))
            .flatten()
            .map(|place| self.bytes(place).to_vec())
            .collect()
    }

    /// Files that hold what looks like a piece of a frame of one of these tags.
    pub fn broken_frames(&self, tags: impl Fn(&Tag) -> bool) -> Vec<String> {
        self.broken
            .iter()
            .filter(|(_, tag)| tags(tag))
            .map(|(file, tag)| format!("{} (tag {tag})", shown(&self.store, &self.files[*file].0)))
            .collect()
    }

    pub fn reachable_tags(&self) -> HashSet<Tag> {
        let points = self.points.values();
        points
            .flat_map(|point| point.tags.iter().copied())
            .collect()
    }

    /// Files below the store, relative to it.
    pub fn file_names(&self) -> Vec<String> {
        self.files
            .iter()
            .map(|(path, _)| shown(&self.store, path))
            .collect()
    }

    /// Files that contain these bytes as they are.
    pub fn files_with(&self, needle: &[u8]) -> Vec<String> {
        files_with(&self.store, &self.files, needle)
    }

    /// Files that contain a fragment of the recorded ciphertext.
    pub fn files_with_fragments(&self, fragments: &Fragments) -> Vec<String> {
        self.files
            .iter()
            .filter(|(_, bytes)| fragments.are_in(bytes))
            .map(|(path, _)| shown(&self.store, path))
            .collect()
    }

    /// What is wrong with the points that have a record.
    pub fn damage(&self) -> Vec<String> {
        self.points
            .iter()
            .flat_map(|(id, point)| point.damage.iter().map(move |what| format!("{id}: {what}")))
            .collect()
    }
}

fn files_with(root: &Path, files: &[(PathBuf, Vec<u8>)], needle: &[u8]) -> Vec<String> {
    files
        .iter()
        .filter(|(_, bytes)| {
            let mut found = false;
            find_all(bytes, needle, |_| found = true);
            found
        })
        .map(|(path, _)| shown(root, path))
        .collect()
}

/// Pieces of 32 bytes of ciphertext that was in the store once. Whatever is left of it in one
/// stretch of 63 bytes is found.
pub struct Fragments {
    pieces: HashMap<u64, Vec<[u8; 24]>>,
    maybe: Vec<u64>,
    pub count: usize,
}

const PIECE: usize = 32;
const FILTER_BITS: u32 = 22;

fn filter_bit(head: u64) -> (usize, u64) {
    let bit = head.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - FILTER_BITS);
    ((bit / 64) as usize, 1 << (bit % 64))
}

impl Fragments {
    pub fn of(sealed: &[Vec<u8>]) -> Self {
        let mut fragments = Fragments {
            pieces: HashMap::new(),
            maybe: vec![0; 1 << (FILTER_BITS - 6)],
            count: sealed.len(),
        };
        for piece in sealed.iter().flat_map(|frame| frame.chunks_exact(PIECE)) {
            let (head, rest) = piece.split_first_chunk::<8>().unwrap();
            let head = u64::from_le_bytes(*head);
            let (word, bit) = filter_bit(head);
            fragments.maybe[word] |= bit;
            fragments
                .pieces
                .entry(head)
                .or_default()
                .push(rest.try_into().unwrap());
        }
        fragments
    }

    pub fn are_in(&self, bytes: &[u8]) -> bool {
        bytes.windows(PIECE).any(|window| {
            let (head, rest) = window.split_first_chunk::<8>().unwrap();
            let head = u64::from_le_bytes(*head);
            let (word, bit) = filter_bit(head);
            self.maybe[word] & bit != 0
                && self
                    .pieces
                    .get(&head)
                    .is_some_and(|known| known.iter().any(|piece| piece == rest))
        })
    }
}

fn shown(root: &Path, path: &Path) -> String {
    path.strip_prefix(root)
        .unwrap_or(path)
        .display()
        .to_string()
}

fn find_all(bytes: &[u8], needle: &[u8], mut found: impl FnMut(usize)) {
    let Some(first) = needle.first() else { return };
    for (at, byte) in bytes.iter().enumerate() {
        if byte == first && bytes[at..].starts_with(needle) {
            found(at);
        }
    }
}

/// Frames at any offset of any file: nothing is known of packs and their directories.
fn find_frames(
    file: usize,
    bytes: &[u8],
    frames: &mut HashMap<Tag, Vec<Place>>,
    broken: &mut Vec<(usize, Tag)>,
) {
    // The lines of a pack's directory look like frame headers, and hold no ciphertext.
    let trailer = bytes.len().saturating_sub(pack::TRAILER_BYTES);
    let directory = match pack::directory_of(bytes) {
        Ok(_) => pack::directory_range(&bytes[trailer..], bytes.len() as u64).unwrap(),
        Err(_) => 0..0,
    };
    let mut at = 0;
    while let Some(head) = bytes.get(at..at + FRAME_HEADER_BYTES) {
        let Some((tag, length)) = plausible(head) else {
            at += 1;
            continue;
        };
        let end = at + FRAME_HEADER_BYTES + length;
        match bytes.get(at..end).map(pack::parse_frame) {
            Some(Ok(frame)) => {
                frames.entry(tag).or_default().push(Place {
                    file,
                    sealed: at + FRAME_HEADER_BYTES..end,
                    header: frame.header,
                    hash: blake3::hash(frame.sealed),
                });
                at = end;
            }
            _ => {
                if !directory.contains(&(at as u64)) {
                    broken.push((file, tag));
                }
                at += 1;
            }
        }
    }
}

/// Tag and sealed length of what may be the header of a frame.
fn plausible(head: &[u8]) -> Option<(Tag, usize)> {
    if head[0] > 6 || head[1] > 1 || head[2] != 0 || head[3] != 0 {
        return None;
    }
    let number = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap()) as usize;
    let (plain, sealed) = (number(20), number(24));
    let most = PieceKind::from_code(head[0])?.max_plain_bytes();
    if plain == 0 || plain > most || sealed <= SEAL_BYTES || sealed > plain + SEAL_BYTES {
        return None;
    }
    Some((Tag::from_bytes(head[4..20].try_into().unwrap()), sealed))
}
