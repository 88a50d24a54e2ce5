//! Opening everything that is live with the key: what a checksum cannot tell, this does.
//!
//! Memory: a bit a record of the index, some hundred bytes for each node (of 16 MiB of a disk; one that points share
//! counts once), 4 MiB for each thread, and what a [`Reader`] holds.

use super::RepositoryError;
use super::customer::Customer;
use super::directory::read_directory;
use super::index::{Index, LiveRecords, PackNumber, Place, count_uses};
use super::mark::{Mark, Unreachable};
use super::reader::{ReadScratch, Reader, frame_length};
use super::tree::children;
use crate::codec::{DiskRecord, decode_node};
use crate::model::{Id, PackName, PieceKind, PointId, Tag};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What opening showed.
#[derive(Debug, Clone, Default)]
pub struct Opened {
    pub frames: u64,
    pub bytes: u64,
    /// Packs of which every frame was opened, and the directory read.
    pub whole: Vec<PackName>,
    /// Places whose frame does not open; another place may have the piece.
    pub damaged: Vec<(PackName, Tag)>,
    /// Pieces that open nowhere, with a restore point that needs them.
    pub unreadable: Vec<Unreachable>,
}

const CHUNK: PieceKind = PieceKind::Chunk;
/// Read at once by each thread, or one frame.
const RUN_BYTES: usize = 4 << 20;

/// A chunk that is to be opened, and where it is sought first.
struct Placed {
    place: Option<Place>,
    id: Id,
    tag: Tag,
}

/// How many of these, at least one, stand one after the other in a pack.
fn length_of_run(placed: &[Placed]) -> usize {
    let mut bytes = 0;
    let mut before: Option<Place> = None;
    let joins = |one: &&Placed| {
        let Some(place) = one.place else {
            return false;
        };
        let follows = before.is_none_or(|before| {
            let end = u64::from(before.offset) + u64::from(before.length_bytes);
            before.pack == place.pack && end == u64::from(place.offset)
        });
        bytes += place.length_bytes as usize;
        before = Some(place);
        follows && bytes <= RUN_BYTES
    };
    placed.iter().take_while(joins).count().max(1)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens every node and chunk that a live or expired point reaches, each once. `progress` hears of
/// plain bytes.
pub fn open_live(
    customer: &Customer,
    threads: usize,
    stop: &AtomicBool,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Opened, RepositoryError> {
    let index = customer.load_index()?;
    let reader = Reader::with_index(customer, index.clone());
    let points: Vec<PointId> =
        customer.with_state(|state| state.roots().map(|(id, _)| *id).collect());
    let opening = Opening {
        customer,
        index: &index,
        reader: &reader,
        claimed: LiveRecords::none_of(&index),
        opened: Mutex::default(),
        progress,
    };
    let mut nodes = Nodes::default();
    for point in points {
        let record = match customer.record(&point) {
            Ok(record) => record,
            Err(error) if error.is_damage() => {
                // Erased meanwhile, or damage.
                customer.refresh()?;
                if customer.with_state(|state| state.roots().any(|(id, _)| *id == point)) {
                    lock(&opening.opened)
                        .result
                        .unreadable
                        .push(Unreachable { point, error });
                }
                continue;
            }
            Err(error) => return Err(error),
        };
        for disk in &record.disks {
            opening.walk(&point, disk, &mut nodes)?;
        }
    }
    // All of them together: of a night's tree there is too little to keep the threads busy.
    on_threads(threads, &nodes.lowest, stop, |node, scratch| {
        opening.open_below(node, scratch)
    })?;
    let uses = count_uses(&index, &opening.claimed)?;
    let Tally {
        mut result,
        by_pack,
        in_doubt,
    } = opening
        .opened
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    // A frame that nothing reaches was not opened: such a pack has not been seen whole. Nor has one
    // whose directory is damaged, which no frame tells.
    let opened: Vec<PackName> = index
        .packs()
        .iter()
        .zip(&uses)
        .enumerate()
        .filter(|(number, (_, usage))| {
            by_pack.get(&(*number as PackNumber)).copied() == Some(usage.known_frames)
        })
        .map(|(_, (info, _))| info.row.name)
        .collect();
    let whole = Mutex::new(Vec::new());
    on_threads(threads, &opened, stop, |name, _| {
        match read_directory(customer, name) {
            Ok(_) => lock(&whole).push(*name),
            Err(error) if error.is_damage() => {}
            Err(error) => return Err(error),
        }
        Ok(())
    })?;
    result.whole = whole.into_inner().unwrap_or_else(PoisonError::into_inner);
    result.whole.sort_unstable();
    still_needed(customer, in_doubt, &mut result)?;
    result.damaged.sort_unstable();
    result.damaged.dedup();
    Ok(result)
}

/// Pieces are opened for the first point that has them. When that one was erased meanwhile, what did not open may have
/// gone with it, unless another point has it too.
fn still_needed(
    customer: &Customer,
    in_doubt: HashMap<Tag, Vec<(PackName, Tag)>>,
    result: &mut Opened,
) -> Result<(), RepositoryError> {
    if in_doubt.is_empty() {
        return Ok(());
    }
    let tags = in_doubt.keys().copied().collect();
    let mut mark = Mark::collecting(customer.load_index()?, tags);
    mark.extend(customer)?;
    for (tag, failed) in in_doubt {
        if let Some(found) = mark.found(&tag) {
            result.damaged.extend(failed);
            result.unreadable.push(Unreachable {
                point: found.point,
                error: RepositoryError::damaged(
                    format!("{} (tag {tag})", customer.names().prefix()),
                    "a piece of a restore point opens nowhere",
                ),
            });
        }
    }
    // What is below a node that does not open was not found.
    result.unreadable.extend(mark.damage);
    Ok(())
}

#[derive(Default)]
struct Tally {
    result: Opened,
    by_pack: HashMap<PackNumber, u64>,
    /// What did not open for a point that is not there any more, with the places that failed.
    in_doubt: HashMap<Tag, Vec<(PackName, Tag)>>,
}

/// Does the work for each of these, until one fails or it is stopped.
fn on_threads<T: Sync>(
    threads: usize,
    all: &[T],
    stop: &AtomicBool,
    work: impl Fn(&T, &mut ReadScratch) -> Result<(), RepositoryError> + Sync,
) -> Result<(), RepositoryError> {
    let next = AtomicUsize::new(0);
    let failure: Mutex<Option<RepositoryError>> = Mutex::new(None);
    let take_turns = || -> Result<(), RepositoryError> {
        let mut scratch = ReadScratch::new()?;
        while let Some(one) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            if stop.load(Ordering::Relaxed) || lock(&failure).is_some() {
                return Ok(());
            }
            work(one, &mut scratch)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, all.len().max(1)) {
            scope.spawn(|| {
                if let Err(error) = take_turns() {
                    lock(&failure).get_or_insert(error);
                }
            });
        }
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// The nodes of all points.
#[derive(Default)]
struct Nodes {
    /// What points share is walked once.
    met: HashSet<Tag>,
    /// Those above the chunks, not opened yet, point by point in disk order, which is much the order of the packs.
    lowest: Vec<LowestNode>,
}

struct LowestNode {
    /// One that needs it.
    point: PointId,
    id: Id,
    tag: Tag,
    children: usize,
}

struct Opening<'a> {
    customer: &'a Customer,
    index: &'a Index,
    reader: &'a Reader<'a>,
    claimed: LiveRecords,
    opened: Mutex<Tally>,
    progress: &'a (dyn Fn(u64) + Sync),
}

impl Opening<'_> {
    /// Opens the upper nodes of a disk that were not met yet, and notes the lowest ones.
    fn walk(
        &self,
        point: &PointId,
        disk: &DiskRecord,
        nodes: &mut Nodes,
    ) -> Result<(), RepositoryError> {
        let Some(root) = disk.root else {
            return Ok(());
        };
        let shape = disk.shape;
        let mut scratch = ReadScratch::new()?;
        let mut waiting = vec![(shape.height(), 0u64, root)];
        while let Some((height, at, id)) = waiting.pop() {
            let tag = self.customer.keys().tag(&id);
            if !nodes.met.insert(tag) {
                continue;
            }
            let count = shape.children_of(height, at);
            if height == 1 {
                nodes.lowest.push(LowestNode {
                    point: *point,
                    id,
                    tag,
                    children: count,
                });
                continue;
            }
            let kind = PieceKind::Node { height };
            if !self.open_piece(point, kind, &id, &tag, &mut scratch)? {
                continue;
            }
            let below = children(self.reader, height, &id, count, &mut scratch)?;
            for (child, id) in below.iter().enumerate().rev() {
                if let Some(id) = id {
                    let index = at * crate::model::FAN_OUT as u64 + child as u64;
                    waiting.push((height - 1, index, *id));
                }
            }
        }
        Ok(())
    }

    /// Opens a lowest node, and the chunks below it that nobody has opened.
    fn open_below(
        &self,
        node: &LowestNode,
        scratch: &mut ReadScratch,
    ) -> Result<(), RepositoryError> {
        let LowestNode {
            point,
            id,
            tag,
            children,
        } = node;
        if !self.open_piece(point, PieceKind::Node { height: 1 }, id, tag, scratch)? {
            return Ok(());
        }
        let below = decode_node(&scratch.plain, *children)
            .map_err(|error| RepositoryError::damaged("node", error))?;
        let mut placed = Vec::new();
        for id in below.into_iter().flatten() {
            let tag = self.customer.keys().tag(&id);
            if self.claimed.claim(self.index, &tag)? {
                let place = self.index.places(&tag)?.into_iter().next();
                // What cannot be a frame is no place to read together with others.
                let place = place.filter(|place| frame_length(place).is_ok());
                placed.push(Placed { place, id, tag });
            }
        }
        placed.sort_by_key(|one| one.place.map(|place| (place.pack, place.offset)));
        let mut buffer = Vec::new();
        let mut left = placed.as_slice();
        while !left.is_empty() {
            let (run, rest) = left.split_at(length_of_run(left));
            self.open_run(point, run, &mut buffer, scratch)?;
            left = rest;
        }
        Ok(())
    }

    /// Frames that stand one after the other are read together: each request to a far store takes its time. What
    /// does not open is looked for again by itself, wherever else it is.
    fn open_run(
        &self,
        point: &PointId,
        run: &[Placed],
        buffer: &mut Vec<u8>,
        scratch: &mut ReadScratch,
    ) -> Result<(), RepositoryError> {
        let is_read = self.read_run(run, buffer)?;
        let mut at = 0;
        for Placed { place, id, tag } in run {
            let end = at + place.map_or(0, |place| place.length_bytes as usize);
            let frame = buffer.get(at..end).filter(|_| is_read);
            at = end;
            if let (Some(place), Some(frame)) = (place, frame)
                && let Some(pack) = self.index.pack(place.pack)
            {
                let name = &pack.row.name;
                let opened = (self.reader).open_frame(name, frame, CHUNK, id, tag, scratch);
                match opened {
                    Ok(()) => {
                        self.tally(place, scratch.plain.len() as u64, Vec::new());
                        continue;
                    }
                    Err(error) if error.is_damage() => {}
                    Err(error) => return Err(error),
                }
            }
            self.open_piece(point, CHUNK, id, tag, scratch)?;
        }
        Ok(())
    }

    /// `false`: not as a whole.
    fn read_run(&self, run: &[Placed], buffer: &mut Vec<u8>) -> Result<bool, RepositoryError> {
        let places = || run.iter().filter_map(|one| one.place);
        let Some(first) = places().next() else {
            return Ok(false);
        };
        let Some(pack) = self.index.pack(first.pack) else {
            return Ok(false);
        };
        buffer.resize(places().map(|place| place.length_bytes as usize).sum(), 0);
        match (self.reader).read_range(&pack.row.name, u64::from(first.offset), buffer) {
            Ok(()) => Ok(true),
            Err(error) if error.is_damage() => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn tally(&self, place: &Place, bytes: u64, failed: Vec<(PackName, Tag)>) {
        (self.progress)(bytes);
        let mut tally = lock(&self.opened);
        tally.result.frames += 1;
        tally.result.bytes += bytes;
        *tally.by_pack.entry(place.pack).or_default() += 1;
        tally.result.damaged.extend(failed);
    }

    /// Opens a piece at the first place that has it; places that fail on the way are noted.
    fn open_piece(
        &self,
        point: &PointId,
        kind: PieceKind,
        id: &Id,
        tag: &Tag,
        scratch: &mut ReadScratch,
    ) -> Result<bool, RepositoryError> {
        if kind != PieceKind::Chunk {
            self.claimed.mark(self.index, tag)?;
        }
        let mut failed = Vec::new();
        for place in self.index.places(tag)? {
            match self
                .reader
                .open_at(self.index, &place, kind, id, tag, scratch)
            {
                Ok(()) => {
                    self.tally(&place, scratch.plain.len() as u64, failed);
                    return Ok(true);
                }
                Err(error) if error.is_damage() => {
                    failed.extend(
                        self.index
                            .pack(place.pack)
                            .map(|pack| (pack.row.name, *tag)),
                    );
                }
                Err(error) => return Err(error),
            }
        }
        // Moved by another prune meanwhile, or damage: the ledger is read again before it is said.
        match self.reader.open(kind, id, scratch) {
            Ok(()) => Ok(true),
            Err(error) if error.is_damage() => {
                self.customer.refresh()?;
                let needed = self
                    .customer
                    .with_state(|state| state.roots().any(|(id, _)| id == point));
                let mut tally = lock(&self.opened);
                if !needed {
                    tally.in_doubt.insert(*tag, failed);
                } else {
                    tally.result.damaged.extend(failed);
                    tally.result.unreadable.push(Unreachable {
                        point: *point,
                        error,
                    });
                }
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}
