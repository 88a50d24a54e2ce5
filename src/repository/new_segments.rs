//! The index segments that a session writes, one after the other, so that one of them at a time is
//! in memory. Each covers a range of tags, and no two the same: a lookup asks one of them.

use super::RepositoryError;
use super::customer::Customer;
use super::writer::upload;
use crate::codec::random_bytes;
use crate::format::segment::{PackRow, Record, SegmentBuilder};
use crate::model::{ObjectHash, SegmentName, SessionId, Tag};

pub(super) struct NewSegments<'a> {
    customer: &'a Customer,
    session: SessionId,
    /// The pack table of each.
    packs: &'a [PackRow],
    /// Records that are still to come, at most.
    left: usize,
    filling: Option<SegmentBuilder>,
    /// Where the range of the one being filled begins.
    from: Tag,
    last: Tag,
    names: Vec<SegmentName>,
    stored_bytes: u64,
}

impl<'a> NewSegments<'a> {
    pub fn new(
        customer: &'a Customer,
        session: SessionId,
        packs: &'a [PackRow],
        most_records: usize,
    ) -> Self {
        NewSegments {
            customer,
            session,
            packs,
            left: most_records,
            filling: None,
            from: Tag::FIRST,
            last: Tag::FIRST,
            names: Vec::new(),
            stored_bytes: 0,
        }
    }

    /// The one being filled, or the next.
    fn take_filling(&mut self) -> SegmentBuilder {
        let expected = self.left.min(self.customer.settings().segment_records);
        self.filling.take().unwrap_or_else(|| {
            SegmentBuilder::new(&self.session, &random_bytes(), self.packs, expected)
        })
    }

    /// The next record, in ascending order. All records of a tag are in one segment.
    pub fn push(&mut self, record: Record) -> Result<(), RepositoryError> {
        let mut filling = self.take_filling();
        if filling.len() >= self.customer.settings().segment_records && record.tag != self.last {
            self.send(filling.finish((self.from, self.last)))?;
            self.from = record.tag;
            filling = self.take_filling();
        }
        filling.push(record);
        self.filling = Some(filling);
        self.left = self.left.saturating_sub(1);
        self.last = record.tag;
        Ok(())
    }

    /// The names of all, and what they take. Packs without a record are listed as well.
    pub fn finish(mut self) -> Result<(Vec<SegmentName>, u64), RepositoryError> {
        let last = self.take_filling();
        self.send(last.finish((self.from, Tag::LAST)))?;
        Ok((self.names, self.stored_bytes))
    }

    fn send(&mut self, bytes: Vec<u8>) -> Result<(), RepositoryError> {
        let name = SegmentName {
            session: self.session,
            hash: ObjectHash::from_bytes(*blake3::hash(&bytes).as_bytes()),
        };
        let object = self.customer.names().segment(&name);
        upload(&**self.customer.storage(), &object, &bytes)?;
        // The next night reads it.
        self.customer.storage().keep_copy(&object, &bytes);
        self.stored_bytes += bytes.len() as u64;
        self.names.push(name);
        Ok(())
    }
}
