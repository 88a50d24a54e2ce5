//! A store in an S3-compatible bucket.
//!
//! Objects are keys below `<prefix>/`. *Created if absent* is a conditional put (`If-None-Match: *`),
//! which several servers accept and ignore: [`super::probe`] asks before anybody relies on it. Where
//! versions are kept, deleting means deleting every version and every delete marker by its id; the
//! oldest version of a name is the object, because names are used once. Many are deleted in one request, whose
//! answer is believed line by line.
//!
//! Payloads are signed: of the checks on uploads that S3 knows, the only one that every server tried
//! enforces. What comes down is checked for its length here and by its hash or seal above.
//!
//! A store that is opened so that nothing may be deleted ([`S3Settings::may_delete`]) asks for nothing
//! that needs the right to: deletions are refused here, an upload that failed is not aborted, and what was
//! put over another version stays there and is an error. A store that may delete sweeps it.
//!
//! What is created can be locked ([`S3Settings::lock`]): then a deletion before its time is `Locked`.
//!
//! Requests are repeated only after errors that may pass, within a deadline, with a pause that grows
//! and is random. The client's own repetitions are off: it would hide that an earlier attempt may have
//! landed, and report our own success as somebody else's.

mod bucket;
mod connection;
mod delete;
mod error;
mod lock;
mod requests;
mod upload;
mod versions;

pub use connection::{S3Credentials, S3Settings};
pub use lock::S3Lock;

use super::{
    Latest, Leftover, Listed, Part, ReadAgain, Storage, StorageError, StorageErrorKind, Survey,
};
use super::{checked_prefix, is_own_name, name_from_outside, refuse_own_names};
use super::{too_large, too_short};
use crate::model::{BucketFacts, ObjectName, Versioning};
use aws_sdk_s3::Client;
use bytes::Bytes;
use connection::Rate;
use jiff::Timestamp;
use lock::ServerClock;
use std::collections::HashSet;
use std::fmt;
use std::slice;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;

/// Packs under way at once: enough to fill the way to a server far off, at some 16 MiB of memory each.
const WRITES_AT_ONCE: usize = 4;

/// One open bucket; share it in an `Arc`. Calls from many threads go out at once, up to
/// [`S3Settings::connections`]; each holds one copy of the bytes that it moves.
pub struct S3 {
    client: Client,
    runtime: Runtime,
    settings: S3Settings,
    location: String,
    /// What a deletion leaves, as read when it was opened; the rest is asked for when it is wanted.
    known: BucketFacts,
    clock: ServerClock,
    /// Whether the server was seen to lock what it was told to; else why not.
    first_lock: OnceLock<Result<(), String>>,
    /// Whether the server has refused a request to delete many.
    refuses_many: AtomicBool,
    permits: Semaphore,
    upload_rate: Rate,
    download_rate: Rate,
    /// Multipart uploads of this process, which a sweep leaves alone.
    uploads: Mutex<HashSet<String>>,
}

impl S3 {
    /// Connects and reads whether the bucket keeps versions. Nothing is written.
    pub fn open(settings: S3Settings) -> Result<Self, StorageError> {
        let runtime = connection::runtime(&settings)?;
        let clock = ServerClock::default();
        let client = runtime.block_on(connection::client(&settings, clock.clone()))?;
        let mut s3 = S3 {
            client,
            runtime,
            location: settings.location(),
            known: BucketFacts::default(),
            clock,
            first_lock: OnceLock::new(),
            refuses_many: AtomicBool::new(false),
            permits: Semaphore::new(settings.connections),
            upload_rate: Rate::new(settings.upload_bytes_per_second),
            download_rate: Rate::new(settings.download_bytes_per_second),
            uploads: Mutex::default(),
            settings,
        };
        s3.known = s3.runtime.block_on(s3.versioning_facts())?;
        Ok(s3)
    }

    /// How the bucket is set up: what it does with versions as it was when it was opened.
    pub fn facts(&self) -> Result<BucketFacts, StorageError> {
        self.runtime.block_on(self.all_facts())
    }

    /// Whether deleting leaves versions, as read when it was opened.
    pub fn keeps_versions(&self) -> bool {
        self.known.versioning != Versioning::Never
    }

    /// Whether copies of the bucket are kept elsewhere.
    pub fn is_replicated(&self) -> Result<bool, StorageError> {
        self.runtime.block_on(self.replication_fact())
    }

    /// The key of an object or of a prefix.
    fn key(&self, name: &str) -> String {
        match self.settings.prefix.as_str() {
            "" => name.to_string(),
            prefix => format!("{prefix}/{name}"),
        }
    }

    /// Beginning of all keys below a prefix, `""` for all.
    pub fn key_prefix(&self, prefix: &str) -> String {
        match (self.settings.prefix.as_str(), prefix) {
            ("", "") => String::new(),
            ("", prefix) => format!("{prefix}/"),
            (root, "") => format!("{root}/"),
            (root, prefix) => format!("{root}/{prefix}/"),
        }
    }

    /// What stands below our own prefix, relative to it.
    fn place<'k>(&self, key: &'k str) -> &'k str {
        let root = self.key_prefix("");
        key.strip_prefix(root.as_str()).unwrap_or(key)
    }

    fn refuse_to_delete(&self, name: &dyn fmt::Display) -> Result<(), StorageError> {
        match self.settings.may_delete {
            true => Ok(()),
            false => Err(StorageError::new(
                StorageErrorKind::Denied,
                name,
                "this host deletes nothing",
            )),
        }
    }

    fn own_uploads(&self) -> MutexGuard<'_, HashSet<String>> {
        // A panic of another thread leaves the set whole: every change is one insert or remove.
        self.uploads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The object that a key is, if its name can be one.
fn object_of(place: &str) -> Option<ObjectName> {
    name_from_outside(place).filter(|name| !is_own_name(name.as_str()))
}

impl Storage for S3 {
    fn create(&self, name: &ObjectName, data: &[u8]) -> Result<(), StorageError> {
        self.create_large(name, &Bytes::copy_from_slice(data), ReadAgain::Soon)
    }

    fn create_large(
        &self,
        name: &ObjectName,
        data: &Bytes,
        _: ReadAgain,
    ) -> Result<(), StorageError> {
        refuse_own_names(name)?;
        self.runtime.block_on(self.upload(name, data))
    }

    fn read(&self, name: &ObjectName, max_bytes: u64) -> Result<Vec<u8>, StorageError> {
        refuse_own_names(name)?;
        self.runtime.block_on(self.download(name, max_bytes))
    }

    fn read_range(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StorageError> {
        refuse_own_names(name)?;
        self.runtime
            .block_on(self.download_range(name, offset, buffer))
    }

    fn size_bytes(&self, name: &ObjectName) -> Result<u64, StorageError> {
        refuse_own_names(name)?;
        self.runtime.block_on(self.head(name))
    }

    fn reads_at_once(&self) -> usize {
        self.settings.connections
    }

    fn writes_at_once(&self) -> usize {
        self.settings.connections.min(WRITES_AT_ONCE)
    }

    fn created_at(&self, name: &ObjectName) -> Result<Option<Timestamp>, StorageError> {
        refuse_own_names(name)?;
        self.runtime.block_on(self.last_modified(name)).map(Some)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>, StorageError> {
        let prefix = checked_prefix(prefix)?;
        let prefix = prefix.as_ref().map_or("", ObjectName::as_str);
        if is_own_name(prefix) {
            return Ok(Vec::new());
        }
        let mut objects: Vec<Listed> = self
            .runtime
            .block_on(self.keys_below(prefix))?
            .into_iter()
            .filter_map(|(key, size_bytes)| {
                let name = object_of(self.place(&key))?;
                Some(Listed { name, size_bytes })
            })
            .collect();
        objects.sort_unstable();
        Ok(objects)
    }

    fn parts(&self, prefix: &str) -> Result<Vec<Part>, StorageError> {
        let prefix = checked_prefix(prefix)?;
        let prefix = prefix.as_ref().map_or("", ObjectName::as_str);
        self.runtime.block_on(async {
            match self.known.versioning {
                Versioning::Never => self.parts_below(prefix).await,
                _ => self.parts_of_versions(prefix).await,
            }
        })
    }

    fn delete(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.delete_all(slice::from_ref(name)).into_iter().collect()
    }

    /// In as few requests as the server allows.
    fn delete_all(&self, names: &[ObjectName]) -> Vec<Result<(), StorageError>> {
        self.runtime.block_on(self.delete_names(names))
    }

    /// As `delete`: what a server does with the bytes of a deleted object is out of reach. They are
    /// sealed, and the key to them was in the point record.
    fn destroy(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.delete(name)
    }

    fn locked_until(&self, name: &ObjectName) -> Result<Option<Timestamp>, StorageError> {
        refuse_own_names(name)?;
        self.runtime.block_on(async {
            let _permit = self.permit(name).await?;
            self.still_locked(&self.key(name.as_str()), None).await
        })
    }

    fn locks(&self) -> bool {
        self.settings.lock.is_some()
    }

    fn renew_locks(&self, place: &str, latest: &Latest<'_>) -> Result<u64, StorageError> {
        let place = checked_prefix(place)?;
        let place = place.as_ref().map_or("", ObjectName::as_str);
        self.renew_below(place, latest)
    }

    /// Aborts unfinished uploads that are not of this process. A living writer elsewhere whose upload
    /// is aborted begins it anew: nothing rests on how old an upload is. Removes delete markers, which hide
    /// an object, and repetitions of an object's bytes; never other bytes under its name.
    fn sweep_leftovers(&self, prefix: &str) -> Result<Vec<Leftover>, StorageError> {
        let prefix = checked_prefix(prefix)?;
        let prefix = prefix.as_ref().map_or("", ObjectName::as_str);
        self.refuse_to_delete(&prefix)?;
        let mut swept = self.runtime.block_on(self.sweep_below(prefix))?;
        swept.sort_unstable();
        Ok(swept)
    }

    fn survey(&self, prefix: &str) -> Result<Survey, StorageError> {
        let prefix = checked_prefix(prefix)?;
        let prefix = prefix.as_ref().map_or("", ObjectName::as_str);
        let mut survey = self.runtime.block_on(self.survey_below(prefix))?;
        survey.objects.sort_unstable();
        survey.leftovers.sort_unstable();
        Ok(survey)
    }

    fn location(&self) -> String {
        self.location.clone()
    }
}
