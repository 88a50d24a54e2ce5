//! Opening pieces by their ids, from whatever place still has them.

use super::customer::Customer;
use super::index::{Index, Place};
use super::{RepositoryError, RepositoryErrorKind};
use crate::codec::{Keys, Opener};
use crate::format::pack::{self, MAX_PACK_BYTES, PackKind};
use crate::model::{Id, PackName, PieceKind, Tag};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Node packs kept whole in memory: a walk reads many small pieces of few packs.
const CACHED_NODE_BYTES: usize = 64 << 20;

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
}

#[derive(Default)]
struct NodeCache {
    packs: HashMap<PackName, Arc<Vec<u8>>>,
    bytes: usize,
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
        }
    }

    pub(super) fn keys(&self) -> &Keys {
        self.customer.keys()
    }

    pub fn index(&self) -> Arc<Index> {
        self.index
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
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
        *self.index.lock().unwrap_or_else(PoisonError::into_inner) = fresh;
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
        for place in index.places(tag) {
            match self.open_at(&index, &place, kind, id, tag, scratch) {
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
        if kind == PackKind::Node {
            let bytes = self.node_pack(pack, size_bytes)?;
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

    fn node_pack(&self, pack: PackName, size_bytes: u64) -> Result<Arc<Vec<u8>>, RepositoryError> {
        let cached = |nodes: &NodeCache| nodes.packs.get(&pack).cloned();
        if let Some(bytes) = cached(&self.nodes.lock().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(bytes);
        }
        let name = self.customer.names().pack(&pack);
        let limit = size_bytes.min(MAX_PACK_BYTES);
        let bytes = Arc::new(self.customer.storage().read(&name, limit)?);
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        if nodes.bytes + bytes.len() > CACHED_NODE_BYTES {
            nodes.packs.clear();
            nodes.bytes = 0;
        }
        nodes.bytes += bytes.len();
        nodes.packs.insert(pack, bytes.clone());
        Ok(bytes)
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
