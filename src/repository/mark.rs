//! What is reached from the roots: every record of the index that a live or expired point needs.

use super::customer::Customer;
use super::index::{Index, LiveRecords};
use super::ledger::State;
use super::reader::{ReadScratch, Reader};
use super::tree::children;
use super::{RepositoryError, RepositoryErrorKind};
use crate::codec::DiskRecord;
use crate::format::pack::DirectoryEntry;
use crate::model::{FAN_OUT, Id, PackName, PieceKind, PointId, SegmentName, Tag};
use jiff::Timestamp;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// A piece of a live point that could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreachable {
    pub point: PointId,
    pub error: RepositoryError,
}

/// A piece that was asked for.
#[derive(Clone, Copy)]
pub(super) struct Found {
    pub kind: PieceKind,
    pub id: Id,
    /// The last point to hold it, and when that expires.
    pub point: PointId,
    pub held_until: Timestamp,
}

/// The tags asked for, and what was found of them.
type Wanted = (HashSet<Tag>, HashMap<Tag, Found>);

/// A mark of one index; grows by further roots, never shrinks.
pub struct Mark {
    index: Arc<Index>,
    live: LiveRecords,
    visited: HashSet<Tag>,
    roots: BTreeSet<PointId>,
    /// The ledger's end before the first root was looked for: what was erased later may still be
    /// marked as live.
    began_at: u64,
    /// Pieces without any place in the index, and nodes or records that do not open. Of whoever only looks, also
    /// those that cannot be read now.
    pub damage: Vec<Unreachable>,
    /// Frames that did not open on the way.
    pub damaged_frames: BTreeSet<(PackName, Tag)>,
    /// Ids of the pieces asked for, to open their frames. Dropped with the mark.
    wanted: Option<Wanted>,
    /// When the point that is walked expires.
    walked_until: Timestamp,
    /// Goes on where something cannot be read. Never where anything is deleted by it: what is below such a node
    /// would pass for dead.
    only_looks: bool,
}

/// What a mark, and a plan made from it, rests on. Entries that leave it as it is (a `begin`, an
/// audit entry, an `expire`) leave the plan standing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ground {
    roots: BTreeSet<PointId>,
    segments: BTreeSet<SegmentName>,
    condemned: BTreeSet<PackName>,
    damaged: usize,
}

impl Ground {
    pub(super) fn of(state: &State) -> Self {
        Ground {
            roots: state.roots().map(|(id, _)| *id).collect(),
            segments: state.segments.keys().copied().collect(),
            condemned: state.condemned.keys().copied().collect(),
            damaged: state.damaged.len(),
        }
    }
}

impl Mark {
    pub fn new(index: Arc<Index>) -> Self {
        Mark {
            live: LiveRecords::none_of(&index),
            began_at: index.seq(),
            index,
            visited: HashSet::new(),
            roots: BTreeSet::new(),
            damage: Vec::new(),
            damaged_frames: BTreeSet::new(),
            wanted: None,
            walked_until: Timestamp::MAX,
            only_looks: false,
        }
    }

    /// A walk that also keeps the ids of `tags`.
    pub fn collecting(index: Arc<Index>, tags: HashSet<Tag>) -> Self {
        Mark {
            wanted: Some((tags, HashMap::new())),
            ..Self::new(index)
        }
    }

    /// A complete mark: its roots are those of the ledger's end, its index is that end's, and
    /// whatever is missing was asked for after the ledger had been read again.
    pub fn at_end(customer: &Customer) -> Result<Self, RepositoryError> {
        Self::complete(customer, Mark::new)
    }

    /// The same for whoever only looks.
    pub fn at_end_to_look(customer: &Customer) -> Result<Self, RepositoryError> {
        Self::complete(customer, |index| Mark {
            only_looks: true,
            ..Mark::new(index)
        })
    }

    /// The same, with the ids of `tags`. What is found is needed by a root that is there at the end.
    pub(super) fn at_end_collecting(
        customer: &Customer,
        tags: &HashSet<Tag>,
    ) -> Result<Self, RepositoryError> {
        Self::complete(customer, |index| Mark {
            only_looks: true,
            ..Mark::collecting(index, tags.clone())
        })
    }

    fn complete(
        customer: &Customer,
        new: impl Fn(Arc<Index>) -> Mark,
    ) -> Result<Self, RepositoryError> {
        let mut mark = new(customer.load_index()?);
        loop {
            mark.extend(customer)?;
            let index = customer.load_index()?;
            if !mark.index.same_segments(&index) {
                // Born meanwhile: the index must know what the new roots reach.
                mark = new(index);
                continue;
            }
            // Condemnations without survivors change no segment, but what may be relied on.
            mark.index = index;
            let (at_end, vanished) = customer.with_state(|state| {
                let knows_all = state.roots().all(|(id, _)| mark.roots.contains(id));
                let at_end = state.seq == mark.index.seq() && knows_all;
                (at_end, !mark.stands_in(state))
            });
            if vanished && (!mark.damage.is_empty() || mark.wanted.is_some()) {
                // What was missing may have been missing because its point was erased, and what was found may have
                // been found below it.
                mark = new(mark.index);
            } else if at_end {
                return Ok(mark);
            }
        }
    }

    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// Whether none of its roots was erased since, as far as the ledger was read.
    pub(super) fn stands(&self, customer: &Customer) -> bool {
        customer.with_state(|state| self.stands_in(state))
    }

    fn stands_in(&self, state: &State) -> bool {
        let now: BTreeSet<PointId> = state.roots().map(|(id, _)| *id).collect();
        self.roots.is_subset(&now)
    }

    /// Whether the walk goes on without what could not be had for this reason.
    fn goes_past(&self, error: &RepositoryError) -> bool {
        error.is_damage() || (self.only_looks && error.is_unread())
    }

    pub fn live(&self) -> &LiveRecords {
        &self.live
    }

    /// Erasures up to this entry are reflected in the mark.
    pub fn began_at(&self) -> u64 {
        self.began_at
    }

    pub fn is_live(&self, tag: &Tag) -> Result<bool, RepositoryError> {
        self.live.has(&self.index, tag)
    }

    /// Which of a pack's frames are live.
    pub(super) fn live_among(
        &self,
        entries: &[DirectoryEntry],
    ) -> Result<HashSet<Tag>, RepositoryError> {
        let mut live = HashSet::new();
        for entry in entries {
            if self.is_live(&entry.tag)? {
                live.insert(entry.tag);
            }
        }
        Ok(live)
    }

    pub(super) fn found(&self, tag: &Tag) -> Option<Found> {
        self.wanted
            .as_ref()
            .and_then(|(_, found)| found.get(tag))
            .copied()
    }

    /// Adds every root of the ledger as last read that is not in the mark yet.
    ///
    /// A record that vanished because its point was erased meanwhile is no damage: the ledger is
    /// read again before anything is called so.
    pub fn extend(&mut self, customer: &Customer) -> Result<(), RepositoryError> {
        let reader = Reader::with_index(customer, self.index.clone());
        let mut scratch = ReadScratch::new()?;
        let mut points: Vec<(Timestamp, PointId)> = customer.with_state(|state| {
            let roots = state.roots();
            roots.map(|(id, point)| (point.expires_at, *id)).collect()
        });
        // What reaches a piece first is then the last point to hold it.
        points.sort_unstable_by(|one, other| other.cmp(one));
        for (expires_at, point) in points {
            if self.roots.contains(&point) {
                continue;
            }
            self.walked_until = expires_at;
            match self.add_root(customer, &reader, &point, &mut scratch) {
                Ok(()) => {}
                Err(error) if self.goes_past(&error) => {
                    customer.refresh()?;
                    let still_there =
                        customer.with_state(|state| state.roots().any(|(id, _)| *id == point));
                    if !still_there {
                        continue;
                    }
                    self.damage.push(Unreachable { point, error });
                }
                Err(error) if error.kind == RepositoryErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            }
            self.roots.insert(point);
        }
        self.damaged_frames.extend(reader.failed_frames());
        Ok(())
    }

    fn add_root(
        &mut self,
        customer: &Customer,
        reader: &Reader<'_>,
        point: &PointId,
        scratch: &mut ReadScratch,
    ) -> Result<(), RepositoryError> {
        let record = customer.record(point)?;
        for disk in &record.disks {
            self.add_disk(customer, reader, point, disk, scratch)?;
        }
        Ok(())
    }

    /// Level by level, each in the order in which its nodes stand in their packs: a walk in disk
    /// order would read a pack again for every few nodes.
    fn add_disk(
        &mut self,
        customer: &Customer,
        reader: &Reader<'_>,
        point: &PointId,
        disk: &DiskRecord,
        scratch: &mut ReadScratch,
    ) -> Result<(), RepositoryError> {
        let shape = disk.shape;
        let mut level: Vec<(u64, Id)> = Vec::new();
        if let Some(root) = disk.root {
            let height = shape.height();
            if self.visit(customer, point, PieceKind::Node { height }, &root)? {
                level.push((0, root));
            }
        }
        for height in (1..=shape.height()).rev() {
            level.sort_by_cached_key(|(_, id)| self.index.first_place(&customer.keys().tag(id)));
            let mut below = Vec::new();
            for (at, id) in level {
                let count = shape.children_of(height, at);
                let children = match children(reader, height, &id, count, scratch) {
                    Ok(children) => children,
                    Err(error) if self.goes_past(&error) => {
                        let point = *point;
                        self.damage.push(Unreachable { point, error });
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                for (child, id) in children.into_iter().enumerate() {
                    let Some(id) = id else { continue };
                    if height == 1 {
                        self.reach(customer, point, PieceKind::Chunk, &id)?;
                    } else if self.visit(
                        customer,
                        point,
                        PieceKind::Node { height: height - 1 },
                        &id,
                    )? {
                        below.push((at * FAN_OUT as u64 + child as u64, id));
                    }
                }
            }
            level = below;
        }
        Ok(())
    }

    /// Reaches a node; `false`: it was reached before, with all below it.
    fn visit(
        &mut self,
        customer: &Customer,
        point: &PointId,
        kind: PieceKind,
        id: &Id,
    ) -> Result<bool, RepositoryError> {
        let new = self.visited.insert(customer.keys().tag(id));
        if new {
            self.reach(customer, point, kind, id)?;
        }
        Ok(new)
    }

    fn reach(
        &mut self,
        customer: &Customer,
        point: &PointId,
        kind: PieceKind,
        id: &Id,
    ) -> Result<(), RepositoryError> {
        let tag = customer.keys().tag(id);
        if !self.live.mark(&self.index, &tag)? {
            self.damage.push(Unreachable {
                point: *point,
                error: RepositoryError::damaged(
                    format!("{} (tag {tag})", customer.names().prefix()),
                    "a piece of a restore point has no place in the index",
                ),
            });
        }
        if let Some((wanted, found)) = &mut self.wanted
            && wanted.contains(&tag)
        {
            found.entry(tag).or_insert(Found {
                kind,
                id: *id,
                point: *point,
                held_until: self.walked_until,
            });
        }
        Ok(())
    }
}
