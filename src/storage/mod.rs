//! Floor 2: named objects. Knows bytes and names; never a chunk, a key or a policy.
//!
//! Objects are immutable and created only if absent. What is absent here: retries that hide an
//! outcome, caching, any idea of what an object means.

mod braked;
mod cache;
mod directory;
mod fault;
mod memory;
mod probe;
mod s3;

pub use braked::{Braked, MaySend};
pub use cache::{Cached, HashOfName, remove_copies};
pub use directory::Directory;
pub use fault::{Fault, Faulty, Frozen, Operation, Verb};
pub use memory::{Memory, Snapshot};
pub use probe::{MAX_PROBE_BYTES, Probe, probe, probe_and_time, probe_without_deleting, time_of};
pub use s3::{S3, S3Credentials, S3Lock, S3Settings};

use crate::model::ObjectName;
use bytes::Bytes;
use jiff::Timestamp;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

/// What went wrong, as far as the caller must decide by it; always with the object's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageError {
    pub kind: StorageErrorKind,
    /// The object, prefix or root concerned.
    pub name: String,
    /// What the system said.
    pub detail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StorageErrorKind {
    /// No such object. Not a proof that a creation under way will not land.
    NotFound,
    /// The name is taken; nothing was written.
    AlreadyExists,
    /// The object is shorter than asked for, or not of the form the store writes.
    Corrupt,
    /// The outcome is unknown or the fault may pass; a creation may still land.
    Transient,
    /// The medium does not give what it holds of this object, perhaps for now. It says nothing of the others.
    Unreadable,
    /// Permission, read-only file system.
    Denied,
    /// Not yet: the store lets nobody delete the object before its time.
    Locked,
    /// No space, quota.
    Full,
    /// The store cannot do what is needed (no create-if-absent, no such folder).
    Unsupported,
}

impl StorageError {
    pub fn new(kind: StorageErrorKind, name: impl fmt::Display, detail: impl fmt::Display) -> Self {
        StorageError {
            kind,
            name: name.to_string(),
            detail: detail.to_string(),
        }
    }
}

impl fmt::Display for StorageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            StorageErrorKind::NotFound => "not found",
            StorageErrorKind::AlreadyExists => "already exists",
            StorageErrorKind::Corrupt => "damaged",
            StorageErrorKind::Transient => "failed, perhaps for now",
            StorageErrorKind::Unreadable => "cannot be read, perhaps for now",
            StorageErrorKind::Denied => "permission denied",
            StorageErrorKind::Locked => "locked",
            StorageErrorKind::Full => "no space left",
            StorageErrorKind::Unsupported => "not supported by this store",
        };
        write!(f, "{}: {} ({})", self.name, what, self.detail)
    }
}

impl std::error::Error for StorageError {}

/// An object as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed {
    pub name: ObjectName,
    pub size_bytes: u64,
}

/// Something that takes up room in the store and is not an object: a temporary file, a file under
/// a name that no object can have, an unfinished upload.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Leftover {
    /// Where it is, relative to the root, printable; not an object name, and often no valid one.
    pub place: String,
    pub size_bytes: u64,
}

/// What stands right below a prefix, by the next part of the names there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Part {
    /// Printable; often no part of a name that an object can have.
    pub name: String,
    /// Whether it only leads to what stands below it; otherwise it is something by itself.
    pub is_prefix: bool,
}

impl Part {
    /// The first part of what follows a prefix and its slash.
    fn first_of(rest: &str) -> Self {
        let (name, is_prefix) = match rest.split_once('/') {
            Some((name, _)) => (name, true),
            None => (rest, false),
        };
        Part {
            name: name.to_string(),
            is_prefix,
        }
    }
}

/// Everything that takes up room below a prefix, both sorted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    pub objects: Vec<Listed>,
    pub leftovers: Vec<Leftover>,
}

/// An object that is held open: its bytes can be read although it was deleted meanwhile.
pub trait OpenObject: Send + Sync {
    fn size_bytes(&self) -> u64;

    /// Fills `buffer` from `offset`; `Corrupt` if the object ends before.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StorageError>;
}

/// An object that was read whole.
struct InMemory {
    name: ObjectName,
    bytes: Vec<u8>,
}

impl OpenObject for InMemory {
    fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StorageError> {
        copy_range(&self.name, &self.bytes, offset, buffer)
    }
}

/// A range of an object that is in memory.
fn copy_range(
    name: &ObjectName,
    bytes: &[u8],
    offset: u64,
    buffer: &mut [u8],
) -> Result<(), StorageError> {
    let part = usize::try_from(offset)
        .ok()
        .and_then(|start| bytes.get(start..)?.get(..buffer.len()));
    let Some(part) = part else {
        let end = offset.saturating_add(buffer.len() as u64);
        return Err(too_short(name, bytes.len() as u64, end));
    };
    buffer.copy_from_slice(part);
    Ok(())
}

fn too_short(name: &ObjectName, found: u64, expected: u64) -> StorageError {
    StorageError::new(
        StorageErrorKind::Corrupt,
        name,
        format!("ends after {found} bytes of {expected}"),
    )
}

fn too_large(name: &ObjectName, size_bytes: u64, max_bytes: u64) -> StorageError {
    StorageError::new(
        StorageErrorKind::Corrupt,
        name,
        format!("{size_bytes} bytes, {max_bytes} are allowed"),
    )
}

/// Until when an object may be locked at the most, if at all.
pub type Latest<'a> = dyn Fn(&ObjectName) -> Option<Timestamp> + Sync + 'a;

/// When an object that is being created will be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadAgain {
    /// In one of the next nights.
    Soon,
    /// When somebody restores it, or looks whether it is whole.
    Late,
}

/// Named immutable objects. All calls may come from several threads and several processes.
pub trait Storage: Send + Sync {
    /// Of a store in front of another, that one. What a store knows and can do is asked of it, unless said
    /// otherwise here; how it reads, writes and deletes is not, or it would be passed by.
    fn behind(&self) -> Option<&dyn Storage> {
        None
    }

    /// Creates `name` with exactly `data`, durably, if and only if the name is free.
    ///
    /// `Ok`: stands, and survives a power cut. `AlreadyExists`: the name was taken. `Transient`:
    /// unknown; only repeating the same call until one of the two answers tells. Any other error:
    /// this call created nothing (what an earlier, uncertain call did is not answered by it).
    /// Names that begin with the part `tmp` or `reserve` are the store's own: `Unsupported`.
    fn create(&self, name: &ObjectName, data: &[u8]) -> Result<(), StorageError>;

    /// The same of much: a store that needs the bytes for longer than the call has no copy of its own, and what
    /// is not read soon need not stay in the memory of this host.
    fn create_large(
        &self,
        name: &ObjectName,
        data: &Bytes,
        _read_again: ReadAgain,
    ) -> Result<(), StorageError> {
        self.create(name, data)
    }

    /// The whole object, `Corrupt` if it is larger than `max_bytes` (nothing is allocated then).
    fn read(&self, name: &ObjectName, max_bytes: u64) -> Result<Vec<u8>, StorageError>;

    /// Fills `buffer` from `offset`; `Corrupt` if the object ends before.
    fn read_range(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StorageError>;

    /// Holds the object open, to be read in pieces; `Corrupt` if it is larger than `max_bytes`. A
    /// store that cannot hold it where it is reads it whole.
    fn open(&self, name: &ObjectName, max_bytes: u64) -> Result<Box<dyn OpenObject>, StorageError> {
        let bytes = self.read(name, max_bytes)?;
        let name = name.clone();
        Ok(Box::new(InMemory { name, bytes }))
    }

    /// As `open`; if this host keeps a copy that is known to be right, that.
    fn open_copy(
        &self,
        name: &ObjectName,
        max_bytes: u64,
    ) -> Result<Box<dyn OpenObject>, StorageError> {
        self.open(name, max_bytes)
    }

    /// This host's copy, if it keeps one that is known to be right. The store is not asked: whether it still
    /// has the object is not answered by it.
    fn copy(&self, name: &ObjectName) -> Option<Box<dyn OpenObject>> {
        self.behind()?.copy(name)
    }

    /// Keeps a copy on this host, where that is done at all, of what the store was seen to have.
    fn keep_copy(&self, name: &ObjectName, bytes: &[u8]) {
        if let Some(store) = self.behind() {
            store.keep_copy(name, bytes);
        }
    }

    fn size_bytes(&self, name: &ObjectName) -> Result<u64, StorageError>;

    /// How many reads are worth having under way at once: of a far store, each waits most of its time.
    fn reads_at_once(&self) -> usize {
        self.behind().map_or(1, |store| store.reads_at_once())
    }

    /// The same of creations; each holds its object in memory.
    fn writes_at_once(&self) -> usize {
        self.behind().map_or(1, |store| store.writes_at_once())
    }

    /// When the object was created by the store's own clock, to the second; `None` where the store has none
    /// but this host's.
    fn created_at(&self, name: &ObjectName) -> Result<Option<Timestamp>, StorageError> {
        self.behind()
            .map_or(Ok(None), |store| store.created_at(name))
    }

    /// All objects below `prefix` (a whole number of parts, `""` for all), sorted by name; not one
    /// that has the prefix as its name. Complete for objects created before the call.
    fn list(&self, prefix: &str) -> Result<Vec<Listed>, StorageError>;

    /// What stands right below `prefix`, sorted, without looking at all that is deeper: objects, what no
    /// object can be, and what is hidden; but nothing of the store's own, and no folder without a file.
    fn parts(&self, prefix: &str) -> Result<Vec<Part>, StorageError> {
        let above = match prefix {
            "" => 0,
            prefix => prefix.len() + 1,
        };
        let listed = self.list(prefix)?;
        let rests = listed
            .iter()
            .filter_map(|object| object.name.as_str().get(above..));
        let parts: BTreeSet<Part> = rests.map(Part::first_of).collect();
        Ok(parts.into_iter().collect())
    }

    /// Removes the object durably, with all its versions. `Ok` if it is not there.
    fn delete(&self, name: &ObjectName) -> Result<(), StorageError>;

    /// As `delete` of each, in no order: what one name says of it is in the place of the name, and none is left
    /// for what became of another, unless the store does not answer any more. For where no order is
    /// needed between them; a crash leaves any of them.
    fn delete_all(&self, names: &[ObjectName]) -> Vec<Result<(), StorageError>> {
        names.iter().map(|name| self.delete(name)).collect()
    }

    /// As `delete`, but the bytes are first made unreadable where the medium allows it.
    fn destroy(&self, name: &ObjectName) -> Result<(), StorageError>;

    /// Until when, by its own clock, the store lets nobody delete the object; `None`: it would now.
    fn locked_until(&self, name: &ObjectName) -> Result<Option<Timestamp>, StorageError> {
        self.behind()
            .map_or(Ok(None), |store| store.locked_until(name))
    }

    /// Whether the store locks what is created.
    fn locks(&self) -> bool {
        self.behind().is_some_and(|store| store.locks())
    }

    /// Locks what is called `place` and what is below it as if it were created now, but none for longer than
    /// `latest` says; `None`: not at all. No lock becomes shorter. Returns how many were made longer.
    fn renew_locks(&self, place: &str, latest: &Latest<'_>) -> Result<u64, StorageError> {
        self.behind()
            .map_or(Ok(0), |store| store.renew_locks(place, latest))
    }

    /// Removes what dead writers left below `prefix`, or outside of any, under names that no listing
    /// shows (temporary files, unfinished uploads, what hides an object). A living
    /// writer is not disturbed but for having to repeat an upload. Returns what was removed.
    fn sweep_leftovers(&self, prefix: &str) -> Result<Vec<Leftover>, StorageError>;

    /// Everything below `prefix` that is physically there, for the proof of erasure; of a directory also
    /// what stands outside of the folder in which all prefixes are. What a writer finishes meanwhile is in
    /// one of the two, as what it was or as what it became; a hidden object is among the objects, and what
    /// hides it among the leftovers.
    fn survey(&self, prefix: &str) -> Result<Survey, StorageError>;

    /// Of a survey, what no listing shows.
    fn leftovers(&self, prefix: &str) -> Result<Vec<Leftover>, StorageError> {
        Ok(self.survey(prefix)?.leftovers)
    }

    /// Bytes that can still be written, if the store can tell.
    fn free_bytes(&self) -> Option<u64> {
        self.behind()?.free_bytes()
    }

    /// Gives back space set aside at `init`, so that a prune works on a full store. `false`: none.
    fn release_reserve(&self) -> Result<bool, StorageError> {
        self.behind()
            .map_or(Ok(false), |store| store.release_reserve())
    }

    /// Sets space aside again. Fails silently short only by returning `Ok(false)`.
    fn restore_reserve(&self) -> Result<bool, StorageError> {
        self.behind()
            .map_or(Ok(false), |store| store.restore_reserve())
    }

    /// Where this is, for messages and certificates.
    fn location(&self) -> String;
}

impl<S: Storage + ?Sized> Storage for Arc<S> {
    fn create(&self, name: &ObjectName, data: &[u8]) -> Result<(), StorageError> {
        (**self).create(name, data)
    }

    fn create_large(
        &self,
        name: &ObjectName,
        data: &Bytes,
        read_again: ReadAgain,
    ) -> Result<(), StorageError> {
        (**self).create_large(name, data, read_again)
    }

    fn read(&self, name: &ObjectName, max_bytes: u64) -> Result<Vec<u8>, StorageError> {
        (**self).read(name, max_bytes)
    }

    fn read_range(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StorageError> {
        (**self).read_range(name, offset, buffer)
    }

    fn open(&self, name: &ObjectName, max_bytes: u64) -> Result<Box<dyn OpenObject>, StorageError> {
        (**self).open(name, max_bytes)
    }

    fn open_copy(
        &self,
        name: &ObjectName,
        max_bytes: u64,
    ) -> Result<Box<dyn OpenObject>, StorageError> {
        (**self).open_copy(name, max_bytes)
    }

    fn copy(&self, name: &ObjectName) -> Option<Box<dyn OpenObject>> {
        (**self).copy(name)
    }

    fn keep_copy(&self, name: &ObjectName, bytes: &[u8]) {
        (**self).keep_copy(name, bytes);
    }

    fn size_bytes(&self, name: &ObjectName) -> Result<u64, StorageError> {
        (**self).size_bytes(name)
    }

    fn reads_at_once(&self) -> usize {
        (**self).reads_at_once()
    }

    fn writes_at_once(&self) -> usize {
        (**self).writes_at_once()
    }

    fn created_at(&self, name: &ObjectName) -> Result<Option<Timestamp>, StorageError> {
        (**self).created_at(name)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>, StorageError> {
        (**self).list(prefix)
    }

    fn parts(&self, prefix: &str) -> Result<Vec<Part>, StorageError> {
        (**self).parts(prefix)
    }

    fn delete(&self, name: &ObjectName) -> Result<(), StorageError> {
        (**self).delete(name)
    }

    fn delete_all(&self, names: &[ObjectName]) -> Vec<Result<(), StorageError>> {
        (**self).delete_all(names)
    }

    fn destroy(&self, name: &ObjectName) -> Result<(), StorageError> {
        (**self).destroy(name)
    }

    fn locked_until(&self, name: &ObjectName) -> Result<Option<Timestamp>, StorageError> {
        (**self).locked_until(name)
    }

    fn locks(&self) -> bool {
        (**self).locks()
    }

    fn renew_locks(&self, place: &str, latest: &Latest<'_>) -> Result<u64, StorageError> {
        (**self).renew_locks(place, latest)
    }

    fn sweep_leftovers(&self, prefix: &str) -> Result<Vec<Leftover>, StorageError> {
        (**self).sweep_leftovers(prefix)
    }

    fn survey(&self, prefix: &str) -> Result<Survey, StorageError> {
        (**self).survey(prefix)
    }

    fn leftovers(&self, prefix: &str) -> Result<Vec<Leftover>, StorageError> {
        (**self).leftovers(prefix)
    }

    fn free_bytes(&self) -> Option<u64> {
        (**self).free_bytes()
    }

    fn release_reserve(&self) -> Result<bool, StorageError> {
        (**self).release_reserve()
    }

    fn restore_reserve(&self) -> Result<bool, StorageError> {
        (**self).restore_reserve()
    }

    fn location(&self) -> String {
        (**self).location()
    }
}

/// After a deletion: the reason why it is not yet done, if that is a lock.
pub fn gone_or_locked(
    deleted: Result<(), StorageError>,
) -> Result<Option<StorageError>, StorageError> {
    match deleted {
        Ok(()) => Ok(None),
        Err(error) if error.kind == StorageErrorKind::Locked => Ok(Some(error)),
        Err(error) => Err(error),
    }
}

/// Refuses the names that a store keeps for itself, so that no object can pose as a temporary file.
fn refuse_own_names(name: &ObjectName) -> Result<(), StorageError> {
    match is_own_name(name.as_str()) {
        true => Err(StorageError::new(
            StorageErrorKind::Unsupported,
            name,
            "the store keeps names below `tmp` and `reserve` for itself",
        )),
        false => Ok(()),
    }
}

fn is_own_name(name: &str) -> bool {
    matches!(name.split('/').next(), Some("tmp" | "reserve"))
}

/// `None` for the empty prefix. A prefix is a whole number of parts, so it has the form of a name.
fn checked_prefix(prefix: &str) -> Result<Option<ObjectName>, StorageError> {
    if prefix.is_empty() {
        return Ok(None);
    }
    match name_from_outside(prefix) {
        Some(name) => Ok(Some(name)),
        None => Err(StorageError::new(
            StorageErrorKind::Unsupported,
            prefix.escape_debug(),
            "a prefix is a whole number of name parts",
        )),
    }
}

/// A name that some folder or server told us; `None` if no object can have it.
fn name_from_outside(name: &str) -> Option<ObjectName> {
    // Names are ASCII. Asked first, because what lies in a folder can be any text at all.
    if !name.is_ascii() {
        return None;
    }
    ObjectName::new(name).ok()
}

/// 32 hex digits nobody has used before and nobody can guess.
fn random_hex() -> Result<String, StorageError> {
    let mut bytes = [0u8; 16];
    fill_random(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn fill_random(bytes: &mut [u8]) -> Result<(), StorageError> {
    let failed = |detail: &dyn fmt::Display| {
        StorageError::new(StorageErrorKind::Unsupported, "random numbers", detail)
    };
    let mut rest = bytes;
    while !rest.is_empty() {
        let done = rustix::io::retry_on_intr(|| {
            rustix::rand::getrandom(&mut *rest, rustix::rand::GetRandomFlags::empty())
        })
        .map_err(|error| failed(&error))?;
        rest = rest
            .get_mut(done..)
            .filter(|_| done > 0)
            .ok_or_else(|| failed(&"the system gave none"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Knows and can do all that a store may.
    struct Able(Memory);

    const SOME_DAY: Timestamp = Timestamp::UNIX_EPOCH;

    impl Storage for Able {
        fn created_at(&self, _: &ObjectName) -> Result<Option<Timestamp>, StorageError> {
            Ok(Some(SOME_DAY))
        }

        fn locked_until(&self, _: &ObjectName) -> Result<Option<Timestamp>, StorageError> {
            Ok(Some(SOME_DAY))
        }

        fn locks(&self) -> bool {
            true
        }

        fn renew_locks(&self, _: &str, _: &Latest<'_>) -> Result<u64, StorageError> {
            Ok(7)
        }

        fn reads_at_once(&self) -> usize {
            3
        }

        fn writes_at_once(&self) -> usize {
            4
        }

        fn free_bytes(&self) -> Option<u64> {
            Some(5)
        }

        fn release_reserve(&self) -> Result<bool, StorageError> {
            Ok(true)
        }

        fn restore_reserve(&self) -> Result<bool, StorageError> {
            Ok(true)
        }

        fn create(&self, name: &ObjectName, data: &[u8]) -> Result<(), StorageError> {
            self.0.create(name, data)
        }

        fn read(&self, name: &ObjectName, max_bytes: u64) -> Result<Vec<u8>, StorageError> {
            self.0.read(name, max_bytes)
        }

        fn read_range(
            &self,
            name: &ObjectName,
            offset: u64,
            buffer: &mut [u8],
        ) -> Result<(), StorageError> {
            self.0.read_range(name, offset, buffer)
        }

        fn size_bytes(&self, name: &ObjectName) -> Result<u64, StorageError> {
            self.0.size_bytes(name)
        }

        fn list(&self, prefix: &str) -> Result<Vec<Listed>, StorageError> {
            self.0.list(prefix)
        }

        fn parts(&self, _: &str) -> Result<Vec<Part>, StorageError> {
            Ok(vec![Part::first_of("hidden/below")])
        }

        fn delete(&self, name: &ObjectName) -> Result<(), StorageError> {
            self.0.delete(name)
        }

        fn destroy(&self, name: &ObjectName) -> Result<(), StorageError> {
            self.0.destroy(name)
        }

        fn sweep_leftovers(&self, prefix: &str) -> Result<Vec<Leftover>, StorageError> {
            self.0.sweep_leftovers(prefix)
        }

        fn survey(&self, prefix: &str) -> Result<Survey, StorageError> {
            self.0.survey(prefix)
        }

        fn location(&self) -> String {
            self.0.location()
        }
    }

    fn what_it_can(store: &dyn Storage) -> String {
        let name = ObjectName::new("a/b").unwrap();
        format!(
            "{:?}",
            (
                (store.created_at(&name), store.locked_until(&name)),
                (store.locks(), store.renew_locks("a", &|_| None)),
                (store.reads_at_once(), store.writes_at_once()),
                (store.free_bytes(), store.location(), store.parts("a")),
                (store.release_reserve(), store.restore_reserve()),
            )
        )
    }

    #[test]
    fn a_store_in_front_of_another_knows_and_can_what_that_one_does() {
        let able: Arc<dyn Storage> = Arc::new(Able(Memory::new()));
        let folder = tempfile::tempdir().unwrap();
        let cached = Cached::new(able.clone(), folder.path().join("cache"), 1000, |_| None);
        let expected = what_it_can(&*able);
        assert_ne!(expected, what_it_can(&Memory::new()));
        for store in [
            &able as &dyn Storage,
            &cached,
            &Braked::new(able.clone(), Arc::new(|_| ())),
            &Faulty::new(able.clone()),
        ] {
            assert_eq!(what_it_can(store), expected);
        }
    }
}
