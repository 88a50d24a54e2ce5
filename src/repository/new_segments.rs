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
    filling: SegmentBuilder,
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
        let in_first = most_records.min(customer.settings().segment_records);
        NewSegments {
            customer,
            session,
            packs,
            left: most_records,
            filling: SegmentBuilder::new(&session, &random_bytes(), packs, in_first),
            from: Tag::FIRST,
            last: Tag::FIRST,
            names: Vec::new(),
            stored_bytes: 0,
        }
    }

    /// The next record, in ascending order. All records of a tag are in one segment.
    pub fn push(&mut self, record: Record) -> Result<(), RepositoryError> {
        let most = self.customer.settings().segment_records;
        if self.filling.len() >= most && record.tag != self.last {
            let expected = self.left.min(most);
            let next = SegmentBuilder::new(&self.session, &random_bytes(), self.packs, expected);
            let full = std::mem::replace(&mut self.filling, next);
            self.send(full.finish((self.from, self.last)))?;
            self.from = record.tag;
        }
        self.left = self.left.saturating_sub(1);
        self.last = record.tag;
        self.filling.push(record);
        Ok(())
    }

    /// The names of all, and what they take. Packs without a record are listed as well.
    pub fn finish(mut self) -> Result<(Vec<SegmentName>, u64), RepositoryError> {
        let nothing = SegmentBuilder::new(&self.session, &[0; 16], &[], 0);
        let last = std::mem::replace(&mut self.filling, nothing);
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
        self.stored_bytes += bytes.len() as u64;
        self.names.push(name);
        Ok(())
    }
}
