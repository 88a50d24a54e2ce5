//! A disk as a hash tree: its row of lowest nodes, written span by span and read the same way.
//!
//! A *span* is what one lowest node covers: 256 chunks. Spans are independent, so threads take
//! them in any order; only the row (32 bytes a span) is held in memory.

use super::reader::{ReadScratch, Reader, frame_length};
use super::writer::{Session, Worker};
use super::{RepositoryError, RepositoryErrorKind};
use crate::codec::{DiskRecord, decode_node, encode_node};
use crate::format::pack::PackKind;
use crate::model::{Extent, FAN_OUT, Id, MAX_DISK_BYTES, MAX_HEIGHT, PieceKind, TreeShape};
use std::sync::{Mutex, PoisonError};

/// The lowest nodes of a disk, in disk order. Opaque: it holds ids.
#[derive(Clone)]
pub struct Row {
    nodes: Vec<Option<Id>>,
}

impl Row {
    fn of_holes(shape: &TreeShape) -> Self {
        Row {
            nodes: vec![None; shape.nodes_at(1) as usize],
        }
    }

    pub fn span_count(&self) -> usize {
        self.nodes.len()
    }

    pub(super) fn node(&self, span: usize) -> Option<Id> {
        self.nodes.get(span).copied().flatten()
    }

    pub fn is_hole(&self, span: usize) -> bool {
        self.nodes.get(span).is_none_or(Option::is_none)
    }

    /// Walks down from the root to the lowest nodes.
    pub fn load(
        reader: &Reader<'_>,
        disk: &DiskRecord,
        scratch: &mut ReadScratch,
    ) -> Result<Self, RepositoryError> {
        let shape = &disk.shape;
        let mut row = vec![disk.root];
        for height in (2..=shape.height()).rev() {
            let mut below = Vec::with_capacity(shape.nodes_at(height - 1) as usize);
            for (index, node) in row.iter().enumerate() {
                let count = shape.children_of(height, index as u64);
                match node {
                    None => below.extend(std::iter::repeat_n(None, count)),
                    Some(id) => {
                        below.extend(children(reader, height, id, count, scratch)?);
                    }
                }
            }
            row = below;
        }
        Ok(Row { nodes: row })
    }
}

pub(super) fn children(
    reader: &Reader<'_>,
    height: u8,
    id: &Id,
    count: usize,
    scratch: &mut ReadScratch,
) -> Result<Vec<Option<Id>>, RepositoryError> {
    reader.open(PieceKind::Node { height }, id, scratch)?;
    decode_node(&scratch.plain, count).map_err(|error| RepositoryError::damaged("node", error))
}

/// The bytes that span `span` of a disk covers.
pub fn span_extent(shape: &TreeShape, span: usize) -> Extent {
    let length = u64::from(shape.chunk_bytes) * FAN_OUT as u64;
    let offset = (span as u64).saturating_mul(length);
    Extent::new(offset, length.min(shape.size_bytes.saturating_sub(offset)))
}

/// A disk being written.
pub struct DiskDraft {
    shape: TreeShape,
    row: Mutex<Row>,
    base: Option<Row>,
}

/// One span being written: starts as the base's, or as a hole.
pub struct SpanDraft {
    span: usize,
    children: Vec<Option<Id>>,
}

/// A span as it was written. Opaque: it holds ids.
pub struct EndedSpan {
    pub(super) span: usize,
    pub(super) node: Option<Id>,
    pub(super) children: Vec<Option<Id>>,
}

impl DiskDraft {
    /// `base`: the row of the same disk in the point this one builds on; must be of the same shape.
    pub fn new(shape: TreeShape, base: Option<Row>) -> Result<Self, RepositoryError> {
        if shape.size_bytes > MAX_DISK_BYTES || shape.height() > MAX_HEIGHT {
            return Err(RepositoryError::new(
                RepositoryErrorKind::Refused,
                "disk",
                "is too large for a hash tree of this chunk size",
            ));
        }
        let holes = Row::of_holes(&shape);
        let base = base.filter(|base| base.nodes.len() == holes.nodes.len());
        Ok(DiskDraft {
            shape,
            row: Mutex::new(base.clone().unwrap_or(holes)),
            base,
        })
    }

    pub fn shape(&self) -> &TreeShape {
        &self.shape
    }

    pub fn has_base(&self) -> bool {
        self.base.is_some()
    }

    pub fn span_count(&self) -> usize {
        self.shape.nodes_at(1) as usize
    }

    /// Starts a span that will be rewritten in part (with a base) or whole (without).
    pub fn begin_span(
        &self,
        reader: &Reader<'_>,
        scratch: &mut ReadScratch,
        span: usize,
    ) -> Result<SpanDraft, RepositoryError> {
        let count = self.shape.children_of(1, span as u64);
        let base = self
            .base
            .as_ref()
            .and_then(|base| base.nodes.get(span).copied().flatten());
        let children = match base {
            Some(id) => children(reader, 1, &id, count, scratch)?,
            None => vec![None; count],
        };
        Ok(SpanDraft { span, children })
    }

    /// Writes the span's node and enters it in the row.
    pub fn end_span(
        &self,
        session: &Session<'_>,
        worker: &mut Worker,
        span: SpanDraft,
    ) -> Result<EndedSpan, RepositoryError> {
        let SpanDraft { span, children } = span;
        let id = put_node(session, worker, 1, &children)?;
        let mut row = self.row.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(node) = row.nodes.get_mut(span) {
            *node = id;
        }
        Ok(EndedSpan {
            span,
            node: id,
            children,
        })
    }

    /// Writes the upper nodes; the result is the disk's root (`None`: all hole).
    pub(super) fn finish(
        self,
        session: &Session<'_>,
        worker: &mut Worker,
    ) -> Result<Option<Id>, RepositoryError> {
        let mut row = self
            .row
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .nodes;
        for height in 2..=self.shape.height() {
            row = row
                .chunks(FAN_OUT)
                .map(|children| put_node(session, worker, height, children))
                .collect::<Result<_, _>>()?;
        }
        match row.as_slice() {
            [root] => Ok(*root),
            _ => Err(RepositoryError::new(
                RepositoryErrorKind::Refused,
                "disk",
                "its hash tree does not end in one root",
            )),
        }
    }
}

impl SpanDraft {
    pub fn hole(&mut self, child: usize) {
        if let Some(child) = self.children.get_mut(child) {
            *child = None;
        }
    }

    /// Stores a chunk and enters it as the `child`-th of the span. Zeros are always the hole.
    pub fn put(
        &mut self,
        session: &Session<'_>,
        worker: &mut Worker,
        child: usize,
        plain: &[u8],
    ) -> Result<(), RepositoryError> {
        let id = match is_zero(plain) {
            true => None,
            false => Some(session.put(worker, PieceKind::Chunk, plain)?),
        };
        if let Some(child) = self.children.get_mut(child) {
            *child = id;
        }
        Ok(())
    }
}

fn put_node(
    session: &Session<'_>,
    worker: &mut Worker,
    height: u8,
    children: &[Option<Id>],
) -> Result<Option<Id>, RepositoryError> {
    match encode_node(children) {
        None => Ok(None),
        Some(plain) => session
            .put(worker, PieceKind::Node { height }, &plain)
            .map(Some),
    }
}

fn is_zero(plain: &[u8]) -> bool {
    // Word by word, so that the compiler uses vectors; stops at the first block with data.
    plain
        .chunks(4096)
        .all(|block| block.iter().fold(0, |sum, byte| sum | byte) == 0)
}

/// A disk of a restore point being read.
pub struct DiskView<'a> {
    reader: &'a Reader<'a>,
    shape: TreeShape,
    row: Row,
}

/// Reads next to each other in a pack are joined up to this size.
const JOINED_READ_BYTES: u64 = 4 << 20;
/// Unwanted bytes that are read along rather than asking twice.
const READ_GAP_BYTES: u64 = 128 << 10;

impl<'a> DiskView<'a> {
    pub fn open(
        reader: &'a Reader<'a>,
        disk: &DiskRecord,
        scratch: &mut ReadScratch,
    ) -> Result<Self, RepositoryError> {
        Ok(DiskView {
            reader,
            shape: disk.shape,
            row: Row::load(reader, disk, scratch)?,
        })
    }

    pub fn shape(&self) -> &TreeShape {
        &self.shape
    }

    pub fn span_count(&self) -> usize {
        self.row.span_count()
    }

    pub fn row(&self) -> &Row {
        &self.row
    }

    fn span_children(
        &self,
        span: usize,
        scratch: &mut ReadScratch,
    ) -> Result<Vec<Option<Id>>, RepositoryError> {
        let count = self.shape.children_of(1, span as u64);
        match self.row.nodes.get(span).copied().flatten() {
            None => Ok(vec![None; count]),
            Some(id) => children(self.reader, 1, &id, count, scratch),
        }
    }

    /// Hands every chunk of the span that is not a hole to `sink`, with its offset on the disk.
    /// Each chunk's id has been checked; its parent vouches for the id, up to the root.
    pub fn read_span<E: From<RepositoryError>>(
        &self,
        span: usize,
        scratch: &mut ReadScratch,
        mut sink: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let children = self.span_children(span, scratch)?;
        let start = span_extent(&self.shape, span).offset;
        let index = self.reader.index();
        let keys = self.reader.keys();
        let mut wanted = Vec::new();
        for (at, id) in children.iter().enumerate() {
            let Some(id) = id else { continue };
            let tag = keys.tag(id);
            let place = index.places(&tag)?.first().copied();
            wanted.push((place, tag, at, *id));
        }
        // Frames of one pack that lie close together are read in one go.
        wanted.sort_by_key(|(place, _, at, _)| {
            place.map_or((u32::MAX, u32::MAX, *at), |place| {
                (place.pack, place.offset, *at)
            })
        });
        let mut joined = Vec::new();
        let mut rest = wanted.as_slice();
        while let Some(((first, ..), _)) = rest.split_first() {
            let run = first.map_or(1, |first| run_length(rest, &first));
            let (now, later) = rest.split_at(run);
            rest = later;
            let range = first.and_then(|first| {
                let pack = index.pack(first.pack)?;
                // Node packs go through the reader's cache.
                (pack.row.kind == PackKind::Data && !pack.deleted).then_some(())?;
                let end = now
                    .iter()
                    .filter_map(|(place, ..)| *place)
                    .map(|place| u64::from(place.offset) + u64::from(place.length_bytes));
                let length = end.max()?.checked_sub(u64::from(first.offset))?;
                joined.clear();
                joined.resize(usize::try_from(length).ok()?, 0);
                self.reader
                    .read_range(&pack.row.name, u64::from(first.offset), &mut joined)
                    .ok()?;
                Some((first.offset as usize, pack.row.name))
            });
            for (place, tag, at, id) in now {
                let opened = range.zip(*place).is_some_and(|((from, pack), place)| {
                    let start = (place.offset as usize).saturating_sub(from);
                    frame_length(&place)
                        .ok()
                        .and_then(|length| joined.get(start..start.checked_add(length)?))
                        .is_some_and(|frame| {
                            let chunk = PieceKind::Chunk;
                            self.reader
                                .open_frame(&pack, frame, chunk, id, tag, scratch)
                                .is_ok()
                        })
                });
                if !opened {
                    // Slowly, place by place, with a fresh look at the ledger.
                    self.reader.open(PieceKind::Chunk, id, scratch)?;
                }
                let expected = span as u64 * FAN_OUT as u64 + *at as u64;
                if scratch.plain.len() != self.shape.chunk_length(expected) {
                    return Err(RepositoryError::damaged(
                        format!("tag {tag}"),
                        "the chunk has another length than its place on the disk",
                    )
                    .into());
                }
                let offset = start + *at as u64 * u64::from(self.shape.chunk_bytes);
                sink(offset, &scratch.plain)?;
            }
        }
        Ok(())
    }

    /// The spans that hold data.
    pub fn data_spans(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.span_count()).filter(|span| !self.row.is_hole(*span))
    }

    /// The extents in which two disks of the same shape differ, to the chunk. Equal subtrees are
    /// not read.
    pub fn difference(
        &self,
        other: &DiskView<'_>,
        scratch: &mut ReadScratch,
    ) -> Result<Vec<Extent>, RepositoryError> {
        if self.shape != other.shape {
            return Ok(vec![Extent::new(
                0,
                self.shape.size_bytes.max(other.shape.size_bytes),
            )]);
        }
        let mut extents: Vec<Extent> = Vec::new();
        for span in 0..self.span_count() {
            if self.row.nodes.get(span) == other.row.nodes.get(span) {
                continue;
            }
            let (ours, theirs) = (
                self.span_children(span, scratch)?,
                other.span_children(span, scratch)?,
            );
            for (at, (our, their)) in ours.iter().zip(&theirs).enumerate() {
                if our == their {
                    continue;
                }
                let chunk = span as u64 * FAN_OUT as u64 + at as u64;
                let offset = chunk * u64::from(self.shape.chunk_bytes);
                let length = self.shape.chunk_length(chunk) as u64;
                match extents.last_mut() {
                    Some(last) if last.end() == offset => last.length += length,
                    _ => extents.push(Extent::new(offset, length)),
                }
            }
        }
        Ok(extents)
    }
}

/// How many of the sorted `rest` lie close behind `first`, in the same pack.
fn run_length(
    rest: &[(Option<super::index::Place>, crate::model::Tag, usize, Id)],
    first: &super::index::Place,
) -> usize {
    let mut end = u64::from(first.offset);
    rest.iter()
        .take_while(|(place, ..)| {
            let Some(place) = place else { return false };
            let next = u64::from(place.offset) + u64::from(place.length_bytes);
            let close = place.pack == first.pack
                && u64::from(place.offset) <= end + READ_GAP_BYTES
                && next - u64::from(first.offset) <= JOINED_READ_BYTES;
            end = end.max(next);
            close
        })
        .count()
        .max(1)
}
