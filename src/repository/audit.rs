//! A full held against the point before it: where nothing is said to have changed, nothing may
//! differ. Only nodes are read, and nothing here has a part in what is stored.

use super::RepositoryError;
use super::reader::{ReadScratch, Reader};
use super::tree::{EndedSpan, Row, children, span_extent};
use crate::model::{Extent, FAN_OUT, TreeShape};
use std::sync::{Mutex, PoisonError};

/// As many extents of a difference are told; the bytes are counted to the end.
pub const TOLD_EXTENTS: usize = 4;

/// One disk being audited while its spans are written.
pub struct DiskAudit {
    shape: TreeShape,
    before: Row,
    changed: Vec<Extent>,
    found: Mutex<Found>,
}

#[derive(Default)]
struct Found {
    difference: Difference,
    /// Why a part could not be compared.
    failure: Option<RepositoryError>,
}

/// What differs outside of the changes, to the chunk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Difference {
    pub bytes: u64,
    /// The first few in disk order.
    pub extents: Vec<Extent>,
}

impl DiskAudit {
    /// `before`: the row of the same disk, in the same shape, in the point that `changed` counts
    /// from. `changed`: whole chunks, sorted, disjoint.
    pub fn new(shape: TreeShape, before: Row, changed: Vec<Extent>) -> Self {
        DiskAudit {
            shape,
            before,
            changed,
            found: Mutex::default(),
        }
    }

    /// Compares a span as it was written. Never fails: the full is right in any case.
    pub fn compare(&self, reader: &Reader<'_>, scratch: &mut ReadScratch, span: &EndedSpan) {
        let before = self.before.node(span.span);
        if span.node == before || self.all_may_have_changed(span.span) {
            return;
        }
        let count = span.children.len();
        let theirs = match before {
            None => Ok(vec![None; count]),
            Some(id) => children(reader, 1, &id, count, scratch),
        };
        let mut difference = Difference::default();
        let failure = theirs.map(|theirs| {
            let first = span.span as u64 * FAN_OUT as u64;
            for (chunk, (our, their)) in (first..).zip(span.children.iter().zip(&theirs)) {
                let extent = self.extent_of(chunk);
                if our != their && !self.may_have_changed(&extent) {
                    difference.add(extent);
                }
            }
        });
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.difference.join(difference);
        if let Err(error) = failure {
            found.failure.get_or_insert(error);
        }
    }

    /// What differs in all that was compared. An error: nothing was found, but a part could not
    /// be compared.
    pub fn finish(self) -> Result<Difference, RepositoryError> {
        let found = self
            .found
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        match found.failure {
            Some(error) if found.difference.bytes == 0 => Err(error),
            _ => Ok(found.difference),
        }
    }

    fn extent_of(&self, chunk: u64) -> Extent {
        Extent::new(
            chunk * u64::from(self.shape.chunk_bytes),
            self.shape.chunk_length(chunk) as u64,
        )
    }

    fn all_may_have_changed(&self, span: usize) -> bool {
        let whole = span_extent(&self.shape, span);
        let at = self
            .changed
            .partition_point(|extent| extent.end() <= whole.offset);
        self.changed
            .get(at)
            .is_some_and(|extent| extent.offset <= whole.offset && extent.end() >= whole.end())
    }

    fn may_have_changed(&self, chunk: &Extent) -> bool {
        let at = self
            .changed
            .partition_point(|extent| extent.end() <= chunk.offset);
        self.changed
            .get(at)
            .is_some_and(|extent| extent.offset < chunk.end())
    }
}

impl Difference {
    /// The next extent in disk order.
    fn add(&mut self, extent: Extent) {
        self.bytes += extent.length;
        match self.extents.last_mut() {
            Some(last) if last.end() == extent.offset => last.length += extent.length,
            _ => self.extents.push(extent),
        }
    }

    /// Spans end in any order, so the first few are chosen anew each time. An extent that reaches
    /// over several spans may be told shorter than it is; its bytes are counted all the same.
    fn join(&mut self, other: Difference) {
        self.bytes += other.bytes;
        self.extents.extend(other.extents);
        self.extents.sort_unstable();
        let mut joined: Vec<Extent> = Vec::with_capacity(self.extents.len());
        for extent in self.extents.drain(..) {
            match joined.last_mut() {
                Some(last) if last.end() == extent.offset => last.length += extent.length,
                _ => joined.push(extent),
            }
        }
        joined.truncate(TOLD_EXTENTS);
        self.extents = joined;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_told_by_its_first_extents_in_whatever_order_spans_end() {
        let extents: Vec<Extent> = (0..20).map(|at| Extent::new(at * 300, 100)).collect();
        let mut order: Vec<usize> = (0..20).collect();
        for turn in 0..20 {
            order.rotate_left(turn);
            let mut whole = Difference::default();
            for at in &order {
                let mut one = Difference::default();
                one.add(extents[*at]);
                whole.join(one);
            }
            assert_eq!(whole.bytes, 2000);
            assert_eq!(whole.extents, extents[..TOLD_EXTENTS]);
        }
    }

    #[test]
    fn chunks_that_meet_are_one_extent() {
        let mut whole = Difference::default();
        whole.add(Extent::new(100, 100));
        whole.add(Extent::new(200, 50));
        let mut left = Difference::default();
        left.add(Extent::new(0, 100));
        whole.join(left);
        assert_eq!(whole.extents, [Extent::new(0, 250)]);
        assert_eq!(whole.bytes, 250);
    }
}
