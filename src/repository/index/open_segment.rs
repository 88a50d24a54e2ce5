//! A segment that was read once, checked, and is asked for its records from then on.

use super::super::RepositoryError;
use crate::format::FormatError;
use crate::format::names::CustomerNames;
use crate::format::segment::{MAX_SEGMENT_BYTES, PackRow, Record, Segment, SegmentBytes};
use crate::model::{ObjectHash, ObjectName, SegmentName, SessionId, Tag};
use crate::storage::{OpenObject, Storage, StorageError, StorageErrorKind};

pub(super) struct OpenSegment {
    object: ObjectName,
    segment: Segment<Held>,
    /// Of the segment itself; 0: it stays in the store.
    pub memory_bytes: u64,
}

/// A segment that is held open and was not looked at yet.
pub(super) struct Unread {
    pub name: SegmentName,
    object: ObjectName,
    bytes: Held,
}

enum Held {
    Memory(Vec<u8>),
    Store(Box<dyn OpenObject>),
}

enum Failed {
    Format(FormatError),
    Storage(StorageError),
}

impl From<FormatError> for Failed {
    fn from(error: FormatError) -> Self {
        Failed::Format(error)
    }
}

impl Failed {
    fn of(self, object: &ObjectName) -> RepositoryError {
        match self {
            Failed::Format(error) => RepositoryError::damaged(object, error),
            Failed::Storage(error) => error.into(),
        }
    }
}

impl Held {
    fn memory_bytes(&self) -> u64 {
        match self {
            Held::Memory(bytes) => bytes.len() as u64,
            Held::Store(_) => 0,
        }
    }
}

impl SegmentBytes for Held {
    type Error = Failed;

    fn size_bytes(&self) -> u64 {
        match self {
            Held::Memory(bytes) => bytes.len() as u64,
            Held::Store(object) => object.size_bytes(),
        }
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Failed> {
        match self {
            Held::Memory(bytes) => Ok(bytes.read_at(offset, buffer)?),
            Held::Store(object) => object.read_at(offset, buffer).map_err(Failed::Storage),
        }
    }
}

impl Unread {
    /// `room_bytes`: a segment that is not larger is taken into memory.
    pub fn open(
        storage: &dyn Storage,
        names: &CustomerNames,
        name: &SegmentName,
        room_bytes: u64,
    ) -> Result<Self, RepositoryError> {
        let object = names.segment(name);
        let held = storage.open_copy(&object, MAX_SEGMENT_BYTES)?;
        let bytes = match held.size_bytes() <= room_bytes {
            true => {
                let mut bytes = vec![0; held.size_bytes() as usize];
                held.read_at(0, &mut bytes)?;
                Held::Memory(bytes)
            }
            false => Held::Store(held),
        };
        Ok(Unread {
            name: *name,
            object,
            bytes,
        })
    }

    /// One that no store has, under the name that it would have there.
    pub fn made(names: &CustomerNames, session: SessionId, bytes: Vec<u8>) -> Self {
        let hash = ObjectHash::from_bytes(*blake3::hash(&bytes).as_bytes());
        let name = SegmentName { session, hash };
        Unread {
            name,
            object: names.segment(&name),
            bytes: Held::Memory(bytes),
        }
    }

    pub fn memory_bytes(&self) -> u64 {
        self.bytes.memory_bytes()
    }

    /// Reads and checks all of it: its bytes must hash to its name. Returns its pack table too,
    /// which is kept nowhere else.
    pub fn check(self) -> Result<(OpenSegment, Vec<PackRow>), RepositoryError> {
        let object = self.object;
        let memory_bytes = self.bytes.memory_bytes();
        let mut hasher = blake3::Hasher::new();
        let opened = Segment::open(self.bytes, |bytes| {
            hasher.update(bytes);
        });
        let mut segment = opened.map_err(|error| error.of(&object))?;
        let hash = ObjectHash::from_bytes(*hasher.finalize().as_bytes());
        if hash != self.name.hash {
            let wrong = "the index segment is not the one the ledger names";
            return Err(RepositoryError::damaged(object, wrong));
        }
        if segment.session() != self.name.session {
            let wrong = "the index segment is of another session";
            return Err(RepositoryError::damaged(object, wrong));
        }
        let rows = segment.take_packs();
        let open = OpenSegment {
            object,
            segment,
            memory_bytes,
        };
        Ok((open, rows))
    }
}

impl OpenSegment {
    pub fn len(&self) -> usize {
        self.segment.len()
    }

    pub fn find(&self, tag: &Tag) -> Result<Vec<(usize, Record)>, RepositoryError> {
        let found = self.segment.find(tag);
        found.map_err(|error| self.not_read(error))
    }

    pub fn records(&self) -> impl Iterator<Item = Result<Record, RepositoryError>> {
        let records = self.segment.records();
        records.map(|record| record.map_err(|error| self.not_read(error)))
    }

    /// It was whole when it was opened. That it cannot be read now tells nothing of the pieces that
    /// it lists: were it damage, a mark under force would go on and take them for dead.
    fn not_read(&self, error: Failed) -> RepositoryError {
        let why = match error {
            Failed::Format(error) => error.to_string(),
            Failed::Storage(error) => error.detail,
        };
        StorageError::new(
            StorageErrorKind::Transient,
            &self.object,
            format!("{why}; nothing was decided by it, run the command again"),
        )
        .into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::random_bytes;
    use crate::format::pack::PackKind;
    use crate::format::segment::build;
    use crate::model::{CustomerName, PackName, SessionId};
    use std::sync::{Arc, Mutex};

    /// An object whose file somebody changes or cuts while it is open.
    struct Changing(Arc<Mutex<Vec<u8>>>);

    impl OpenObject for Changing {
        fn size_bytes(&self) -> u64 {
            self.0.lock().unwrap().len() as u64
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StorageError> {
            let read = self.0.lock().unwrap().read_at(offset, buffer);
            read.map_err(|error| StorageError::new(StorageErrorKind::Corrupt, "segment", error))
        }
    }

    #[test]
    fn a_segment_that_changes_while_it_is_open_is_no_damage_of_what_it_lists() {
        let session = SessionId::from_bytes([1; 16]);
        let row = PackRow {
            name: PackName {
                session,
                hash: ObjectHash::from_bytes([2; 32]),
            },
            size_bytes: 1 << 20,
            frames: 3,
            kind: PackKind::Data,
        };
        let tag = |n: u8| Tag::from_bytes([n; 16]);
        let mut records: Vec<Record> = [10, 20, 30]
            .map(|n| Record {
                tag: tag(n),
                pack: 0,
                offset: 48 + u32::from(n) * 100,
                length_bytes: 100,
            })
            .into();
        let bytes = build(&session, &random_bytes(), &[row], &mut records);
        let name = SegmentName {
            session,
            hash: ObjectHash::from_bytes(*blake3::hash(&bytes).as_bytes()),
        };
        let customer = CustomerName::new("acme").unwrap();
        let shared = Arc::new(Mutex::new(bytes.clone()));
        let unread = Unread {
            name,
            object: CustomerNames::new(&customer).segment(&name),
            bytes: Held::Store(Box::new(Changing(shared.clone()))),
        };
        let (open, rows) = unread.check().unwrap();
        assert_eq!(rows, [row]);
        assert_eq!(open.find(&tag(20)).unwrap(), [(1, records[1])]);
        let last = bytes.len() - 1;
        for (changed_or_cut, wrong) in [
            (bytes[..last - 30].to_vec(), tag(30)),
            ([&bytes[..last - 27], &[0xee; 28]].concat(), tag(30)),
        ] {
            *shared.lock().unwrap() = changed_or_cut;
            let error = open.find(&wrong).unwrap_err();
            assert!(!error.is_damage(), "{error}");
            assert!(error.to_string().contains(name.hash.to_string().as_str()));
            let walked: Result<Vec<_>, _> = open.records().collect();
            assert!(!walked.unwrap_err().is_damage());
        }
    }
}
