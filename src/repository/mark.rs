//! What is reached from the roots: every record of the index that a live or expired point needs.

use super::customer::Customer;
use super::index::{Index, LiveRecords};
use super::reader::{ReadScratch, Reader};
use super::tree::children;
use super::{RepositoryError, RepositoryErrorKind};
use crate::codec::DiskRecord;
use crate::model::{Id, PieceKind, PointId, Tag, TreeShape};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

/// A piece of a live point that could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreachable {
    pub point: PointId,
    pub error: RepositoryError,
}

/// A mark of one index; grows by further roots, never shrinks.
pub struct Mark {
    index: Arc<Index>,
    live: LiveRecords,
    visited: HashSet<Tag>,
    roots: BTreeSet<PointId>,
    /// Pieces without any place in the index, and nodes or records that do not open.
    pub damage: Vec<Unreachable>,
    /// Ids of the pieces asked for, to open their frames. Dropped with the mark.
    wanted: Option<(HashSet<Tag>, HashMap<Tag, (PieceKind, Id)>)>,
}

impl Mark {
    pub fn new(index: Arc<Index>) -> Self {
        Mark {
            live: LiveRecords::none_of(&index),
            index,
            visited: HashSet::new(),
            roots: BTreeSet::new(),
            damage: Vec::new(),
            wanted: None,
        }
    }

    /// A walk that also keeps the ids of `tags`.
    pub fn collecting(index: Arc<Index>, tags: HashSet<Tag>) -> Self {
        Mark {
            wanted: Some((tags, HashMap::new())),
            ..Self::new(index)
        }
    }

    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    pub fn live(&self) -> &LiveRecords {
        &self.live
    }

    pub fn is_live(&self, tag: &Tag) -> bool {
        self.live.has(&self.index, tag)
    }

    pub(super) fn id_of(&self, tag: &Tag) -> Option<(PieceKind, Id)> {
        self.wanted
            .as_ref()
            .and_then(|(_, ids)| ids.get(tag))
            .copied()
    }

    /// Adds every root of the ledger's end that is not in the mark yet. Returns how many.
    ///
    /// A record that vanished because its point was erased meanwhile is no damage: the ledger is
    /// read again before anything is called so.
    pub fn extend(&mut self, customer: &Customer) -> Result<usize, RepositoryError> {
        let reader = Reader::with_index(customer, self.index.clone());
        let mut scratch = ReadScratch::new()?;
        let mut added = 0;
        let points: Vec<PointId> =
            customer.with_state(|state| state.roots().map(|(id, _)| *id).collect());
        for point in points {
            if self.roots.contains(&point) {
                continue;
            }
            match self.add_root(customer, &reader, &point, &mut scratch) {
                Ok(()) => {}
                Err(error) if error.is_damage() => {
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
            added += 1;
        }
        Ok(added)
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

    fn add_disk(
        &mut self,
        customer: &Customer,
        reader: &Reader<'_>,
        point: &PointId,
        disk: &DiskRecord,
        scratch: &mut ReadScratch,
    ) -> Result<(), RepositoryError> {
        let Some(root) = disk.root else { return Ok(()) };
        let shape = disk.shape;
        // (height, index at that height, id); depth first, so it stays short.
        let mut waiting = vec![(shape.height(), 0u64, root)];
        while let Some((height, at, id)) = waiting.pop() {
            let tag = customer.keys().tag(&id);
            if !self.visited.insert(tag) {
                continue;
            }
            self.reach(customer, point, PieceKind::Node { height }, &id, &tag);
            let count = shape.children_of(height, at);
            let below = match children(reader, height, &id, count, scratch) {
                Ok(below) => below,
                Err(error) if error.is_damage() => {
                    self.damage.push(Unreachable {
                        point: *point,
                        error,
                    });
                    continue;
                }
                Err(error) => return Err(error),
            };
            self.add_children(customer, point, &shape, height, at, &below, &mut waiting);
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments)]
    fn add_children(
        &mut self,
        customer: &Customer,
        point: &PointId,
        _shape: &TreeShape,
        height: u8,
        at: u64,
        below: &[Option<Id>],
        waiting: &mut Vec<(u8, u64, Id)>,
    ) {
        for (child, id) in below.iter().enumerate() {
            let Some(id) = id else { continue };
            if height > 1 {
                let index = at * crate::model::FAN_OUT as u64 + child as u64;
                waiting.push((height - 1, index, *id));
            } else {
                let tag = customer.keys().tag(id);
                self.reach(customer, point, PieceKind::Chunk, id, &tag);
            }
        }
    }

    fn reach(&mut self, customer: &Customer, point: &PointId, kind: PieceKind, id: &Id, tag: &Tag) {
        if !self.live.mark(&self.index, tag) {
            self.damage.push(Unreachable {
                point: *point,
                error: RepositoryError::damaged(
                    format!("{} (tag {tag})", customer.names().prefix()),
                    "a piece of a restore point has no place in the index",
                ),
            });
        }
        if let Some((wanted, ids)) = &mut self.wanted
            && wanted.contains(tag)
        {
            ids.insert(*tag, (kind, *id));
        }
    }
}
