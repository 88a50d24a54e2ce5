//! A segment that was read once, checked, and is asked for its records from then on.

use super::super::RepositoryError;
use crate::format::FormatError;
use crate::format::names::CustomerNames;
use crate::format::segment::{MAX_SEGMENT_BYTES, PackRow, Record, Segment, SegmentBytes};
use crate::model::{ObjectHash, ObjectName, SegmentName, Tag};
use crate::storage::{OpenObject, Storage, StorageError};

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
        let held = storage.open(&object, MAX_SEGMENT_BYTES)?;
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
        found.map_err(|error| error.of(&self.object))
    }

    pub fn records(&self) -> impl Iterator<Item = Result<Record, RepositoryError>> {
        let records = self.segment.records();
        records.map(|record| record.map_err(|error| error.of(&self.object)))
    }
}
