//! Opening pieces by their ids, from whatever place still has them.

use super::customer::Customer;
use super::index::{Index, Place};
use super::{RepositoryError, RepositoryErrorKind};
use crate::codec::{Keys, Opener};
use crate::format::pack::{self, MAX_PACK_BYTES, PackKind};
use crate::model::{Id, PackName, PieceKind, Tag};
use crate::storage::StorageErrorKind;
use std::collections::{BTreeSet, HashMap};
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
    failed: Mutex<BTreeSet<(PackName, Tag)>>,
}

#[derive(Default)]
struct NodeCache {
    packs: HashMap<PackName, CachedPack>,
    bytes: usize,
    /// Bytes asked for of packs that are not cached.
    asked: HashMap<PackName, u64>,
    uses: u64,
}

struct CachedPack {
    bytes: Arc<Vec<u8>>,
    last_use: u64,
}

impl NodeCache {
    fn get(&mut self, pack: &PackName) -> Option<Arc<Vec<u8>>> {
        self.uses += 1;
        let cached = self.packs.get_mut(pack)?;
        cached.last_use = self.uses;
        Some(cached.bytes.clone())
    }

    fn is_worth_reading(&mut self, pack: &PackName, size_bytes: u64, piece_bytes: u64) -> bool {
        let asked = self.asked.entry(*pack).or_default();
        *asked = asked.saturating_add(piece_bytes);
        size_bytes <= SMALL_NODE_PACK_BYTES || asked.saturating_mul(WHOLE_AFTER_SHARE) >= size_bytes
    }

    fn forget(&mut self, pack: &PackName) {
        if let Some(gone) = self.packs.remove(pack) {
            self.bytes = self.bytes.saturating_sub(gone.bytes.len());
        }
    }

    fn insert(&mut self, pack: PackName, bytes: Arc<Vec<u8>>) {
        self.asked.remove(&pack);
        while self.bytes + bytes.len() > CACHED_NODE_BYTES {
            let oldest = self.packs.iter().min_by_key(|(_, cached)| cached.last_use);
            let Some(oldest) = oldest.map(|(name, _)| *name) else {
                break;
            };
            self.forget(&oldest);
        }
        self.bytes += bytes.len();
        let last_use = self.uses;
        if let Some(before) = self.packs.insert(pack, CachedPack { bytes, last_use }) {
            self.bytes = self.bytes.saturating_sub(before.bytes.len());
        }
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
            failed: Mutex::default(),
        }
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

    fn try_places(
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
            .frame_into(
                pack.row.name,
                pack.row.kind,
                pack.row.size_bytes,
                place,
                &mut frame,
            )
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
        pack: PackName,
        kind: PackKind,
        size_bytes: u64,
        place: &Place,
        frame: &mut Vec<u8>,
    ) -> Result<(), RepositoryError> {
        frame.clear();
        if kind == PackKind::Node
            && let Some(bytes) = self.node_pack(pack, size_bytes, u64::from(place.length_bytes))?
        {
            let start = place.offset as usize;
            let part = bytes
                .get(start..start.saturating_add(place.length_bytes as usize))
                .ok_or_else(|| {
                    RepositoryError::damaged(self.customer.names().pack(&pack), "is cut short")
                })?;
            frame.extend_from_slice(part);
            return Ok(());
        }
        frame.resize(frame_length(place)?, 0);
        self.read_range(&pack, u64::from(place.offset), frame)
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

    /// A node pack from the cache, or read into it. `None`: read only the piece.
    fn node_pack(
        &self,
        pack: PackName,
        size_bytes: u64,
        piece_bytes: u64,
    ) -> Result<Option<Arc<Vec<u8>>>, RepositoryError> {
        {
            let mut nodes = lock(&self.nodes);
            if let Some(bytes) = nodes.get(&pack) {
                return Ok(Some(bytes));
            }
            if !nodes.is_worth_reading(&pack, size_bytes, piece_bytes) {
                return Ok(None);
            }
        }
        let name = self.customer.names().pack(&pack);
        // A pack that is longer than the index says is damaged at most in its end: its pieces are
        // read one by one.
        match self
            .customer
            .storage()
            .read(&name, size_bytes.min(MAX_PACK_BYTES))
        {
            Ok(bytes) => {
                let bytes = Arc::new(bytes);
                lock(&self.nodes).insert(pack, bytes.clone());
                Ok(Some(bytes))
            }
            Err(error) if error.kind == StorageErrorKind::Corrupt => Ok(None),
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
