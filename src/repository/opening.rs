//! Opening everything that is live with the key: what a checksum cannot tell, this does.
//!
//! Memory: a bit a record of the index, some hundred bytes for each node (of 16 MiB of a disk; one that points share
//! counts once), 4 MiB for each thread, and what a [`Reader`] holds.

use super::customer::Customer;
use super::directory::read_directory;
use super::index::{Index, LiveRecords, PackNumber, Place, count_uses};
use super::mark::{Mark, Unreachable};
use super::reader::{ReadScratch, Reader, frame_length};
use super::sealed::LOAD_ATTEMPTS;
use super::{RepositoryError, RepositoryErrorKind};
use crate::codec::{DiskRecord, decode_node};
use crate::format::segment::PackRow;
use crate::model::{Id, PackName, PieceKind, PointId, Tag};
use std::collections::{BTreeSet, HashMap, HashSet};
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
    /// Pieces that open nowhere, or cannot be read now, with one of the restore points that need them.
    pub unreadable: Vec<Unreachable>,
    /// Why it broke off, where something was found before that.
    pub failure: Option<RepositoryError>,
    /// Places whose frame did not open before that. Nobody looked again: whether it is damage, is not known.
    pub unsettled: Vec<(PackName, Tag)>,
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
/// plain bytes. What it found is not complete if it was stopped, or has a failure. An error: nothing was found.
pub fn open_live(
    customer: &Customer,
    threads: usize,
    stop: &AtomicBool,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Opened, RepositoryError> {
    let index = customer.load_index()?;
    let reader = Reader::with_index(customer, index.clone());
    let opening = Opening {
        customer,
        index: &index,
        reader: &reader,
        claimed: LiveRecords::none_of(&index),
        opened: Mutex::default(),
        progress,
    };
    let opened = opening.open_all(threads, stop);
    let mut tally = std::mem::take(&mut *lock(&opening.opened));
    tally.failed.sort_unstable();
    tally.failed.dedup();
    let mut result = Opened {
        frames: tally.frames,
        bytes: tally.bytes,
        ..Opened::default()
    };
    let settled = opened.and_then(|()| opening.settle(threads, stop, &tally, &mut result));
    match settled {
        Err(error) if tally.frames == 0 && tally.failed.is_empty() => return Err(error),
        Err(error) => {
            result.failure = Some(error);
            result.unsettled = tally.failed;
        }
        Ok(()) => {}
    }
    Ok(result)
}

/// Whether a pack's own directory names the frames that the index knows, each where it is.
fn lists_what_it_holds(
    customer: &Customer,
    index: &Index,
    number: PackNumber,
    row: &PackRow,
) -> Result<bool, RepositoryError> {
    let entries = match read_directory(customer, &row.name) {
        Ok(entries) => entries,
        Err(error) if error.is_of_one_object() => return Ok(false),
        Err(error) => return Err(error),
    };
    for entry in &entries {
        let is_it = |place: &Place| {
            (place.pack, place.offset, place.length_bytes)
                == (number, entry.offset, entry.length_bytes)
        };
        if !index.places(&entry.tag)?.iter().any(is_it) {
            return Ok(false);
        }
    }
    Ok(entries.len() == row.frames as usize)
}

/// What did not open is asked again at the ledger's end, which took hours to come: points were erased, and what only
/// they had went with them; packs were rewritten; and what is needed may stand elsewhere by now.
fn look_again(
    customer: &Customer,
    threads: usize,
    stop: &AtomicBool,
    tally: &Tally,
    result: &mut Opened,
) -> Result<(), RepositoryError> {
    let lost: Vec<Tag> = tally.lost.iter().copied().collect();
    for _ in 0..LOAD_ATTEMPTS {
        let mark = Mark::at_end_collecting(customer, &tally.lost)?;
        let index = mark.index();
        let reader = Reader::with_index(customer, index.clone());
        let unreadable = Mutex::new(Vec::new());
        on_threads(threads, &lost, stop, |tag, scratch| {
            // The mark itself tells of nodes, and of what has no place.
            let found = mark.found(tag).filter(|found| found.kind == CHUNK);
            let Some(found) = found.filter(|_| index.first_place(tag).is_some()) else {
                return Ok(());
            };
            match reader.try_places(CHUNK, &found.id, tag, scratch) {
                Err(error) if error.is_of_one_object() => {
                    let point = found.point;
                    lock(&unreadable).push((*tag, Unreachable { point, error }));
                    Ok(())
                }
                opened => opened,
            }
        })?;
        let unreadable = unreadable
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        let now = customer.load_index()?;
        let mut stands = mark.stands(customer);
        for (tag, _) in &unreadable {
            stands = stands && named_places(index, tag)? == named_places(&now, tag)?;
        }
        if stands || stop.load(Ordering::Relaxed) {
            let failed = tally.failed.iter().chain(&mark.damaged_frames).copied();
            let current: BTreeSet<(PackName, Tag)> =
                failed.filter(|(pack, _)| index.is_current(pack)).collect();
            result.damaged = current.into_iter().collect();
            result.unreadable = unreadable.into_iter().map(|(_, found)| found).collect();
            result.unreadable.extend(mark.damage);
            return Ok(());
        }
    }
    Err(customer.index_changes_too_fast())
}

/// The places of a tag as every index names them.
fn named_places(
    index: &Index,
    tag: &Tag,
) -> Result<BTreeSet<(Option<PackName>, u32)>, RepositoryError> {
    let name = |place: &Place| index.pack(place.pack).map(|info| info.row.name);
    let places = index.places(tag)?;
    Ok(places
        .iter()
        .map(|place| (name(place), place.offset))
        .collect())
}

#[derive(Default)]
struct Tally {
    frames: u64,
    bytes: u64,
    by_pack: HashMap<PackNumber, u64>,
    /// Places whose frame did not open.
    failed: Vec<(PackName, Tag)>,
    /// Pieces that opened nowhere.
    lost: HashSet<Tag>,
    /// A record did not open.
    records_lost: bool,
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
    fn open_all(&self, threads: usize, stop: &AtomicBool) -> Result<(), RepositoryError> {
        let customer = self.customer;
        let points: Vec<PointId> =
            customer.with_state(|state| state.roots().map(|(id, _)| *id).collect());
        let mut nodes = Nodes::default();
        for point in points {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            match customer.record(&point) {
                Ok(record) => {
                    for disk in &record.disks {
                        self.walk(disk, &mut nodes)?;
                    }
                }
                // Erased, as the ledger says by now.
                Err(error) if error.kind == RepositoryErrorKind::NotFound => {}
                Err(error) if error.is_of_one_object() => lock(&self.opened).records_lost = true,
                Err(error) => return Err(error),
            }
        }
        // All of them together: of a night's tree there is too little to keep the threads busy.
        on_threads(threads, &nodes.lowest, stop, |node, scratch| {
            self.open_below(node, scratch)
        })
    }

    /// Which packs are whole, and what of all that did not open is damage.
    fn settle(
        &self,
        threads: usize,
        stop: &AtomicBool,
        tally: &Tally,
        result: &mut Opened,
    ) -> Result<(), RepositoryError> {
        let (customer, index) = (self.customer, self.index);
        let uses = count_uses(index, &self.claimed)?;
        // A frame that nothing reaches was not opened: such a pack has not been seen whole. Nor has one
        // whose directory is damaged, which no frame tells.
        let all_opened: Vec<PackNumber> = (0..)
            .zip(&uses)
            .filter(|(number, usage)| tally.by_pack.get(number) == Some(&usage.known_frames))
            .map(|(number, _)| number)
            .collect();
        let whole = Mutex::new(Vec::new());
        on_threads(threads, &all_opened, stop, |number, _| {
            if let Some(info) = index.pack(*number)
                && lists_what_it_holds(customer, index, *number, &info.row)?
            {
                lock(&whole).push(info.row.name);
            }
            Ok(())
        })?;
        result.whole = whole.into_inner().unwrap_or_else(PoisonError::into_inner);
        result.whole.sort_unstable();
        let is_sound = tally.failed.is_empty() && tally.lost.is_empty() && !tally.records_lost;
        if !is_sound && !stop.load(Ordering::Relaxed) {
            look_again(customer, threads, stop, tally, result)?;
        }
        Ok(())
    }

    /// Opens the upper nodes of a disk that were not met yet, and notes the lowest ones.
    fn walk(&self, disk: &DiskRecord, nodes: &mut Nodes) -> Result<(), RepositoryError> {
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
                    id,
                    tag,
                    children: count,
                });
                continue;
            }
            let below = self.children(height, &id, &tag, count, &mut scratch)?;
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
        let below = self.children(1, &node.id, &node.tag, node.children, scratch)?;
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
            self.open_run(run, &mut buffer, scratch)?;
            left = rest;
        }
        Ok(())
    }

    /// Frames that stand one after the other are read together: each request to a far store takes its time. What
    /// does not open is looked for again by itself, wherever else it is.
    fn open_run(
        &self,
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
            if !self.open_piece(CHUNK, id, tag, scratch)? {
                lock(&self.opened).lost.insert(*tag);
            }
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
            Err(error) if error.is_of_one_object() => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn tally(&self, place: &Place, bytes: u64, failed: Vec<(PackName, Tag)>) {
        (self.progress)(bytes);
        let mut tally = lock(&self.opened);
        tally.frames += 1;
        tally.bytes += bytes;
        *tally.by_pack.entry(place.pack).or_default() += 1;
        tally.failed.extend(failed);
    }

    /// Opens a node. One that does not open has no children, and is asked for again at the end.
    fn children(
        &self,
        height: u8,
        id: &Id,
        tag: &Tag,
        count: usize,
        scratch: &mut ReadScratch,
    ) -> Result<Vec<Option<Id>>, RepositoryError> {
        let kind = PieceKind::Node { height };
        self.claimed.mark(self.index, tag)?;
        let mut is_open = self.open_piece(kind, id, tag, scratch)?;
        if !is_open {
            // Moved by a prune meanwhile: what is below it must be opened all the same.
            is_open = match self.reader.open(kind, id, scratch) {
                Ok(()) => true,
                Err(error) if error.is_of_one_object() => false,
                Err(error) => return Err(error),
            };
        }
        let children = is_open.then(|| decode_node(&scratch.plain, count));
        match children {
            Some(Ok(children)) => Ok(children),
            Some(Err(_)) | None => {
                lock(&self.opened).lost.insert(*tag);
                Ok(Vec::new())
            }
        }
    }

    /// Opens a piece at the first place that has it; places that fail on the way are noted.
    fn open_piece(
        &self,
        kind: PieceKind,
        id: &Id,
        tag: &Tag,
        scratch: &mut ReadScratch,
    ) -> Result<bool, RepositoryError> {
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
                // It may be whole: the pack is no whole one, and whoever reads it as such tells of it.
                Err(error) if error.is_unread() => {}
                Err(error) => return Err(error),
            }
        }
        lock(&self.opened).failed.extend(failed);
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(places: &[(PackNumber, u32, u32)]) -> usize {
        let placed = |(pack, offset, length_bytes): &(PackNumber, u32, u32)| Placed {
            place: Some(Place {
                pack: *pack,
                offset: *offset,
                length_bytes: *length_bytes,
            }),
            id: Id::from_secret_bytes([0; 32]),
            tag: Tag::FIRST,
        };
        length_of_run(&Vec::from_iter(places.iter().map(placed)))
    }

    #[test]
    fn what_follows_in_the_same_pack_is_one_run_of_four_mib_at_most_or_of_one_frame() {
        assert_eq!(run(&[(0, 100, 10), (0, 110, 20), (0, 130, 5)]), 3);
        assert_eq!(run(&[(0, 100, 10), (0, 110, 20), (0, 131, 5)]), 2);
        assert_eq!(run(&[(0, 100, 10), (1, 110, 20), (1, 130, 5)]), 1);
        let mib = 1 << 20;
        assert_eq!(run(&[(0, 0, mib), (0, mib, 3 * mib), (0, 4 * mib, 1)]), 2);
        assert_eq!(run(&[(0, 0, 5 * mib), (0, 5 * mib, 1)]), 1);
    }
}
