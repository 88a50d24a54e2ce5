//! Opening pieces by their ids, from whatever place still has them.

use super::customer::Customer;
use super::index::{Index, PackInfo, Place};
use super::{RepositoryError, RepositoryErrorKind};
use crate::codec::{Keys, Opener};
use crate::format::pack::{self, MAX_PACK_BYTES, PackKind};
use crate::format::segment::PackRow;
use crate::model::{Id, PackName, PieceKind, Tag};
use crate::storage::{OpenObject, StorageErrorKind};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Node packs kept whole in memory, for each [`Reader`]: a walk reads many small pieces of few
/// packs.
const CACHED_NODE_BYTES: usize = 64 << 20;
/// A node pack is read whole when it is small, or once this share of it was asked for piece by
/// piece: pieces scattered over more packs than the cache holds must not read each pack whole
/// every time.
const SMALL_NODE_PACK_BYTES: u64 = 1 << 20;
const WHOLE_AFTER_SHARE: u64 = 64;
/// Copies of node packs on this host that are held open: each is checked whole when it is opened.
const OPEN_COPIES: usize = 256;

/// What one thread needs to open pieces.
pub struct ReadScratch {
    opener: Opener,
    frame: Vec<u8>,
    /// The piece last opened.
    pub plain: Vec<u8>,
}

impl ReadScratch {
    pub fn new() -> Result<Self, RepositoryError> {
        Ok(ReadScratch {
            opener: Opener::new().map_err(|error| {
                RepositoryError::new(RepositoryErrorKind::Refused, "decompressor", error)
            })?,
            frame: Vec::new(),
            plain: Vec::new(),
        })
    }
}

/// Reads pieces of one customer. Shared by threads; each brings its own [`ReadScratch`].
pub struct Reader<'a> {
    customer: &'a Customer,
    index: Mutex<Arc<Index>>,
    nodes: Mutex<NodeCache>,
    /// Held while a node pack is read whole: threads that need the same one would each hold it.
    one_whole_pack: Mutex<()>,
    failed: Mutex<BTreeSet<(PackName, Tag)>>,
    /// Whether nodes are read from this host's copies.
    from_copies: AtomicBool,
    /// Of copies, only those of what the store has.
    asks_first: bool,
}

#[derive(Default)]
struct NodeCache {
    packs: HashMap<PackName, CachedPack>,
    bytes: usize,
    open_copies: usize,
    /// Bytes asked for of packs that are not cached.
    asked: HashMap<PackName, u64>,
    /// Packs of which the medium does not give all: no piece waits for that again.
    unread: HashSet<PackName>,
    uses: u64,
}

struct CachedPack {
    pack: NodePack,
    last_use: u64,
}

#[derive(Clone)]
enum NodePack {
    Memory(Arc<Vec<u8>>),
    Copy(Arc<dyn OpenObject>),
}

impl NodePack {
    fn memory_bytes(&self) -> usize {
        match self {
            NodePack::Memory(bytes) => bytes.len(),
            NodePack::Copy(_) => 0,
        }
    }

    fn is_copy(&self) -> bool {
        matches!(self, NodePack::Copy(_))
    }

    /// Adds a part to `frame`; `false`: it ends before.
    fn part(&self, offset: usize, length: usize, frame: &mut Vec<u8>) -> bool {
        match self {
            NodePack::Memory(bytes) => {
                let part = bytes.get(offset..offset.saturating_add(length));
                part.is_some_and(|part| {
                    frame.extend_from_slice(part);
                    true
                })
            }
            NodePack::Copy(copy) => {
                frame.resize(length, 0);
                copy.read_at(offset as u64, frame).is_ok()
            }
        }
    }
}

impl NodeCache {
    fn get(&mut self, pack: &PackName) -> Option<NodePack> {
        self.uses += 1;
        let cached = self.packs.get_mut(pack)?;
        cached.last_use = self.uses;
        Some(cached.pack.clone())
    }

    fn is_worth_reading(&mut self, pack: &PackName, size_bytes: u64, piece_bytes: u64) -> bool {
        if self.unread.contains(pack) {
            return false;
        }
        let asked = self.asked.entry(*pack).or_default();
        *asked = asked.saturating_add(piece_bytes);
        size_bytes <= SMALL_NODE_PACK_BYTES || asked.saturating_mul(WHOLE_AFTER_SHARE) >= size_bytes
    }

    fn forget(&mut self, pack: &PackName) {
        if let Some(gone) = self.packs.remove(pack) {
            self.bytes = self.bytes.saturating_sub(gone.pack.memory_bytes());
            self.open_copies -= usize::from(gone.pack.is_copy());
        }
    }

    fn forget_copies(&mut self) {
        self.packs.retain(|_, cached| !cached.pack.is_copy());
        self.open_copies = 0;
    }

    fn insert(&mut self, name: PackName, pack: NodePack) {
        self.asked.remove(&name);
        self.forget(&name);
        let is_copy = pack.is_copy();
        while match is_copy {
            true => self.open_copies >= OPEN_COPIES,
            false => self.bytes + pack.memory_bytes() > CACHED_NODE_BYTES,
        } {
            let alike = self.packs.iter();
            let alike = alike.filter(|(_, cached)| cached.pack.is_copy() == is_copy);
            let oldest = alike.min_by_key(|(_, cached)| cached.last_use);
            let Some(oldest) = oldest.map(|(name, _)| *name) else {
                break;
            };
            self.forget(&oldest);
        }
        self.bytes += pack.memory_bytes();
        self.open_copies += usize::from(is_copy);
        let last_use = self.uses;
        self.packs.insert(name, CachedPack { pack, last_use });
    }
}

impl<'a> Reader<'a> {
    pub fn new(customer: &'a Customer) -> Result<Self, RepositoryError> {
        Ok(Self::with_index(customer, customer.load_index()?))
    }

    pub fn with_index(customer: &'a Customer, index: Arc<Index>) -> Self {
        Reader {
            customer,
            index: Mutex::new(index),
            nodes: Mutex::default(),
            one_whole_pack: Mutex::default(),
            failed: Mutex::default(),
            from_copies: AtomicBool::new(false),
            asks_first: false,
        }
    }

    /// Reads nodes from this host's copies where it has them, and makes copies of those that it reads. Not for
    /// whoever judges whether the store still has what points need.
    pub fn from_copies(self) -> Self {
        self.from_copies.store(true, Ordering::Relaxed);
        self
    }

    /// The same, for whoever builds upon what it reads: of a pack that the store no longer has no copy is used, so
    /// that its loss is met at once and not when somebody without the copy needs it.
    pub fn from_copies_that_stand(self) -> Self {
        let mut reader = self.from_copies();
        reader.asks_first = true;
        reader
    }

    /// Frames that were met and did not open, in packs that nobody has condemned, and that the
    /// ledger does not know as damaged yet. A caller with a
    /// role for it notes them in the ledger, so that the next backup stores their content anew.
    pub fn failed_frames(&self) -> Vec<(PackName, Tag)> {
        let failed = lock(&self.failed).clone();
        self.customer.with_state(|state| {
            let known = |frame: &&(PackName, Tag)| {
                !state.is_condemned(&frame.0) && !state.damaged.contains(frame)
            };
            failed.iter().filter(known).copied().collect()
        })
    }

    pub(super) fn keys(&self) -> &Keys {
        self.customer.keys()
    }

    pub fn index(&self) -> Arc<Index> {
        lock(&self.index).clone()
    }

    /// Opens the piece `id` into `scratch.plain`.
    ///
    /// Every place is tried. Whoever finds none reads the ledger to its end again before calling
    /// it damage: another host may have moved the piece meanwhile.
    pub fn open(
        &self,
        kind: PieceKind,
        id: &Id,
        scratch: &mut ReadScratch,
    ) -> Result<(), RepositoryError> {
        let tag = self.customer.keys().tag(id);
        let first = self.try_places(kind, id, &tag, scratch);
        let Err(error) = first else { return Ok(()) };
        if !error.is_damage() {
            return Err(error);
        }
        // What the store itself says, from here on.
        self.from_copies.store(false, Ordering::Relaxed);
        lock(&self.nodes).forget_copies();
        let fresh = self.customer.load_index()?;
        *lock(&self.index) = fresh.clone();
        // Read again from the store, not from a copy that may have been read wrongly.
        for place in fresh.places(&tag)? {
            if let Some(info) = fresh.pack(place.pack) {
                lock(&self.nodes).forget(&info.row.name);
            }
        }
        self.try_places(kind, id, &tag, scratch)
    }

    /// Opens the piece at any place that this reader's index has; the ledger is not asked again.
    pub(super) fn try_places(
        &self,
        kind: PieceKind,
        id: &Id,
        tag: &Tag,
        scratch: &mut ReadScratch,
    ) -> Result<(), RepositoryError> {
        let index = self.index();
        let mut worst: Option<RepositoryError> = None;
        for place in index.places(tag)? {
            let result = self.open_at(&index, &place, kind, id, tag, scratch);
            if let Some(info) = index.pack(place.pack) {
                let frame = (info.row.name, *tag);
                match &result {
                    // A second look may find that only the first reading was wrong.
                    Ok(()) => lock(&self.failed).remove(&frame),
                    Err(error) if error.is_damage() => lock(&self.failed).insert(frame),
                    Err(_) => false,
                };
            }
            match result {
                Ok(()) => return Ok(()),
                // A store out of reach must not be mistaken for damage, whatever comes after.
                Err(error) => match &worst {
                    Some(worst) if !worst.is_damage() => {}
                    _ => worst = Some(error),
                },
            }
        }
        Err(worst.unwrap_or_else(|| {
            RepositoryError::damaged(
                format!("{} (tag {tag})", self.customer.names().prefix()),
                "the index knows no place of this piece",
            )
        }))
    }

    /// Opens the piece at exactly this place.
    pub fn open_at(
        &self,
        index: &Index,
        place: &Place,
        kind: PieceKind,
        id: &Id,
        tag: &Tag,
        scratch: &mut ReadScratch,
    ) -> Result<(), RepositoryError> {
        let pack = index
            .pack(place.pack)
            .ok_or_else(|| RepositoryError::damaged(tag, "the index names no pack"))?;
        let mut frame = std::mem::take(&mut scratch.frame);
        let result = self
            .frame_into(pack, place, index.is_sound(tag, place), &mut frame)
            .and_then(|()| self.open_frame(&pack.row.name, &frame, kind, id, tag, scratch));
        scratch.frame = frame;
        result
    }

    /// Opens a frame that is already in memory.
    pub fn open_frame(
        &self,
        pack_name: &PackName,
        frame: &[u8],
        kind: PieceKind,
        id: &Id,
        tag: &Tag,
        scratch: &mut ReadScratch,
    ) -> Result<(), RepositoryError> {
        let damaged = |detail: String| {
            RepositoryError::damaged(
                format!("{} (tag {tag})", self.customer.names().pack(pack_name)),
                detail,
            )
        };
        let frame = pack::parse_frame(frame).map_err(|error| damaged(error.to_string()))?;
        if frame.header.tag != *tag || frame.header.kind != kind {
            return Err(damaged("another frame stands in its place".to_string()));
        }
        scratch
            .opener
            .open(
                self.customer.keys(),
                kind,
                id,
                tag,
                frame.header.compressed,
                frame.header.plain_bytes,
                frame.sealed,
                &mut scratch.plain,
            )
            .map_err(|error| damaged(error.to_string()))
    }

    fn frame_into(
        &self,
        pack: &PackInfo,
        place: &Place,
        is_sound: bool,
        frame: &mut Vec<u8>,
    ) -> Result<(), RepositoryError> {
        frame.clear();
        let length = frame_length(place)?;
        if pack.row.kind == PackKind::Node
            && let Some(nodes) = self.node_pack(pack, is_sound, length as u64)?
        {
            let name = || self.customer.names().pack(&pack.row.name);
            return match nodes.part(place.offset as usize, length, frame) {
                true => Ok(()),
                false => Err(RepositoryError::damaged(name(), "is cut short")),
            };
        }
        frame.resize(length, 0);
        self.read_range(&pack.row.name, u64::from(place.offset), frame)
    }

    /// Whether the store has the pack, by its size.
    fn stands(&self, row: &PackRow) -> Result<bool, RepositoryError> {
        let name = self.customer.names().pack(&row.name);
        match self.customer.storage().size_bytes(&name) {
            Ok(size_bytes) => Ok(size_bytes == row.size_bytes),
            Err(error) if error.kind == StorageErrorKind::NotFound => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads a range of a pack.
    pub fn read_range(
        &self,
        pack: &PackName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), RepositoryError> {
        let name = self.customer.names().pack(pack);
        Ok(self.customer.storage().read_range(&name, offset, buffer)?)
    }

    /// A node pack from the cache, or read into it. `None`: read only the piece. `is_sound`: nothing is known
    /// against the piece's place; else this host's copy would hide that the store has lost it.
    fn node_pack(
        &self,
        pack: &PackInfo,
        is_sound: bool,
        piece_bytes: u64,
    ) -> Result<Option<NodePack>, RepositoryError> {
        let row = &pack.row;
        let known = lock(&self.nodes).get(&row.name);
        if let Some(known) = known.filter(|known| is_sound || !known.is_copy()) {
            return Ok(Some(known));
        }
        let storage = self.customer.storage();
        let name = self.customer.names().pack(&row.name);
        let from_copies = self.from_copies.load(Ordering::Relaxed);
        if from_copies
            && is_sound
            && (!self.asks_first || self.stands(row)?)
            && let Some(copy) = storage.copy(&name)
        {
            let copy = NodePack::Copy(copy.into());
            lock(&self.nodes).insert(row.name, copy.clone());
            return Ok(Some(copy));
        }
        if !lock(&self.nodes).is_worth_reading(&row.name, row.size_bytes, piece_bytes) {
            return Ok(None);
        }
        let _one = lock(&self.one_whole_pack);
        if let Some(read_meanwhile) = lock(&self.nodes).get(&row.name) {
            return Ok(Some(read_meanwhile));
        }
        // A pack that is longer than the index says is damaged at most in its end: its pieces are
        // read one by one.
        match storage.read(&name, row.size_bytes.min(MAX_PACK_BYTES)) {
            Ok(bytes) => {
                // None of what is about to go: nobody would look for it here any more.
                if from_copies && !pack.condemned {
                    storage.keep_copy(&name, &bytes);
                }
                let bytes = NodePack::Memory(Arc::new(bytes));
                lock(&self.nodes).insert(row.name, bytes.clone());
                Ok(Some(bytes))
            }
            Err(error) if error.kind == StorageErrorKind::Corrupt => Ok(None),
            // One bad place takes no other piece with it.
            Err(error) if error.kind == StorageErrorKind::Unreadable => {
                lock(&self.nodes).unread.insert(row.name);
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// The length of a frame at `place`, if it can be one.
pub fn frame_length(place: &Place) -> Result<usize, RepositoryError> {
    let length = place.length_bytes as usize;
    let most = pack::FRAME_HEADER_BYTES + pack::SEAL_BYTES + crate::model::MAX_CHUNK_BYTES as usize;
    match length <= most {
        true => Ok(length),
        false => Err(RepositoryError::damaged(
            "index",
            format!("names a frame of {length} bytes"),
        )),
    }
}
