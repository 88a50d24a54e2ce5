//! A session that uploads: pieces are looked up, sealed, packed, opened again, and sent.

use super::customer::{Customer, WriteSettings};
use super::directory::listed_packs;
use super::index::{Index, NotedRecords, PackNumber};
use super::lifetime::Lifetime;
use super::new_segments::NewSegments;
use super::rule::{Rule, stands};
use super::{RepositoryError, RepositoryErrorKind};
use crate::codec::{Opener, Sealer, random_bytes};
use crate::format::names::CustomerNames;
use crate::format::pack::{
    self, FinishedPack, FrameHeader, MAX_PACK_BYTES, MAX_PACK_TARGET_BYTES, PackBuilder, PackKind,
};
use crate::format::segment::{PackRow, Record};
use crate::model::{Id, ObjectHash, ObjectName, PackName, PieceKind, SegmentName, SessionId, Tag};
use crate::storage::{ReadAgain, Storage, StorageError, StorageErrorKind};
use bytes::Bytes;
use jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

/// A full counts a chunk as present only if its pack was read and checked this recently, and stands in its size.
pub const FRESH_DAYS: i64 = 8;
/// Finished packs that wait for the store; more would only hold memory.
const WAITING_PACKS: usize = 2;
const SHARDS: usize = 64;
/// How often an upload with an unknown outcome is repeated.
const UPLOAD_ATTEMPTS: u32 = 6;

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What one thread needs to write pieces.
pub struct Worker {
    sealer: Sealer,
    opener: Opener,
    sealed: Vec<u8>,
    plain: Vec<u8>,
}

struct Filling {
    builder: PackBuilder,
    /// The id of each frame, to open it again before the pack is sent.
    ids: Vec<Id>,
}

#[derive(Default)]
struct Written {
    packs: Vec<PackRow>,
    records: Vec<Record>,
}

/// Packs found whole, and damaged frames.
pub type CheckedPacks = (Vec<PackName>, Vec<(PackName, Tag)>);

/// What a session adopts by its `commit` or `condemn`.
pub struct Uploaded {
    pub segments: Vec<SegmentName>,
    pub packs: Vec<PackName>,
    pub stored_bytes: u64,
}

/// How a piece that the index knows already is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// Any sound place will do (incremental).
    Index,
    /// Only a pack checked within [`FRESH_DAYS`] before this time that is listed in its size; others are
    /// read and checked now (full: the repair).
    CheckedSince(Timestamp),
    /// Nothing: every piece is written anew (survivors of a reclaim).
    Nothing,
}

/// An open session of one customer. Threads share it; each brings its own [`Worker`].
pub struct Session<'a> {
    customer: &'a Customer,
    id: SessionId,
    index: Arc<Index>,
    trust: Trust,
    settings: WriteSettings,
    claimed: Vec<Mutex<HashSet<Tag>>>,
    /// One of each kind and lifetime.
    filling: Mutex<BTreeMap<(PackKind, Lifetime), Filling>>,
    written: Mutex<Written>,
    uploads: Mutex<Option<Uploads>>,
    /// Why the store did not take a pack: every thread that fails for it says the same.
    failure: Arc<OnceLock<RepositoryError>>,
    /// The session is given up: what still waits is not sent.
    given_up: Arc<AtomicBool>,
    /// What was deduplicated against.
    relied_on: NotedRecords,
    checked: HashMap<PackNumber, OnceLock<CheckedPack>>,
    stored_bytes: AtomicU64,
}

/// What reading a pack showed.
enum CheckedPack {
    /// The tags whose frames are as they were written, sorted; and those of the others.
    Read { sound: Vec<Tag>, damaged: Vec<Tag> },
    /// It is not there, or not a pack.
    Broken,
    /// It could not be read now: nothing is known of it.
    OutOfReach,
}

struct Uploads {
    to_store: SyncSender<Outgoing>,
    threads: Vec<JoinHandle<()>>,
}

impl Uploads {
    /// As many at once as is worth it. Each thread ends with the channel, or after the first that failed, so
    /// that nobody waits for a store that takes no more.
    fn start(
        storage: &Arc<dyn Storage>,
        failure: &Arc<OnceLock<RepositoryError>>,
        given_up: &Arc<AtomicBool>,
    ) -> Self {
        let at_once = storage.writes_at_once().max(1);
        // Where several are under way, another need not wait: one of these is soon done.
        let waiting = if at_once == 1 { WAITING_PACKS } else { 0 };
        let (to_store, packs) = sync_channel::<Outgoing>(waiting);
        let packs = Arc::new(Mutex::new(packs));
        let start = |_| {
            let (storage, packs) = (storage.clone(), packs.clone());
            let (failure, given_up) = (failure.clone(), given_up.clone());
            std::thread::spawn(move || {
                loop {
                    let next = lock(&packs).recv();
                    let Ok(pack) = next else { return };
                    if given_up.load(Ordering::Relaxed) || failure.get().is_some() {
                        return;
                    }
                    if let Err(error) = pack.send(&*storage) {
                        let _first = failure.set(error);
                        return;
                    }
                }
            })
        };
        let threads = (0..at_once).map(start).collect();
        Uploads { to_store, threads }
    }

    /// Waits for all that was sent. `false`: a thread died.
    fn finish(self) -> bool {
        drop(self.to_store);
        let mut well = true;
        for thread in self.threads {
            well &= thread.join().is_ok();
        }
        well
    }
}

/// A finished pack.
struct Outgoing {
    object: ObjectName,
    bytes: Bytes,
    kind: PackKind,
}

impl Outgoing {
    fn send(&self, storage: &dyn Storage) -> Result<(), RepositoryError> {
        // The next night walks nodes; data is read when it is restored.
        let read_again = match self.kind {
            PackKind::Node => ReadAgain::Soon,
            PackKind::Data => ReadAgain::Late,
        };
        let create = || storage.create_large(&self.object, &self.bytes, read_again);
        upload_by(storage, &self.object, &self.bytes, create)?;
        if self.kind == PackKind::Node {
            storage.keep_copy(&self.object, &self.bytes);
        }
        Ok(())
    }
}

impl<'a> Session<'a> {
    pub(super) fn new(
        customer: &'a Customer,
        id: SessionId,
        index: Arc<Index>,
        trust: Trust,
    ) -> Result<Self, RepositoryError> {
        let unsure = match trust {
            Trust::CheckedSince(since) => {
                let mut unsure = customer.packs_not_checked_since(&index, since);
                unsure.extend(not_as_listed(customer, &index)?);
                unsure
            }
            Trust::Index | Trust::Nothing => Vec::new(),
        };
        let failure: Arc<OnceLock<RepositoryError>> = Arc::default();
        let given_up: Arc<AtomicBool> = Arc::default();
        let uploads = Uploads::start(customer.storage(), &failure, &given_up);
        let mut settings = customer.settings().clone();
        // One more frame and the directory must fit below what readers accept.
        settings.pack_bytes = settings.pack_bytes.min(MAX_PACK_TARGET_BYTES as usize);
        Ok(Session {
            customer,
            id,
            relied_on: NotedRecords::none_of(&index),
            index,
            trust,
            settings,
            claimed: (0..SHARDS).map(|_| Mutex::default()).collect(),
            filling: Mutex::default(),
            written: Mutex::default(),
            uploads: Mutex::new(Some(uploads)),
            failure,
            given_up,
            checked: unsure
                .into_iter()
                .map(|pack| (pack, OnceLock::new()))
                .collect(),
            stored_bytes: AtomicU64::new(0),
        })
    }

    pub fn id(&self) -> SessionId {
        self.id
    }

    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    pub fn customer(&self) -> &'a Customer {
        self.customer
    }

    /// Bytes sent to the store so far.
    pub fn stored_bytes(&self) -> u64 {
        self.stored_bytes.load(Ordering::Relaxed)
    }

    pub fn worker(&self) -> Result<Worker, RepositoryError> {
        let failed = |error: std::io::Error| {
            RepositoryError::new(RepositoryErrorKind::Refused, "compressor", error)
        };
        Ok(Worker {
            sealer: Sealer::new(self.settings.compression_level).map_err(failed)?,
            opener: Opener::new().map_err(failed)?,
            sealed: Vec::new(),
            plain: Vec::new(),
        })
    }

    /// Makes sure that the piece is in the store when this session is adopted.
    pub fn put(
        &self,
        worker: &mut Worker,
        kind: PieceKind,
        plain: &[u8],
    ) -> Result<Id, RepositoryError> {
        let keys = self.customer.keys();
        let id = keys.id(kind, plain);
        let tag = keys.tag(&id);
        if self.trust != Trust::Nothing && self.rely_on_index(&tag)? {
            return Ok(id);
        }
        if !self.claim(&tag) {
            // Another thread of this session writes it; the session is adopted whole or not.
            return Ok(id);
        }
        worker.sealed.clear();
        let how = worker
            .sealer
            .seal(keys, kind, &id, &tag, plain, &mut worker.sealed);
        let header = FrameHeader {
            kind,
            compressed: how.compressed,
            tag,
            plain_bytes: plain.len() as u32,
            sealed_bytes: worker.sealed.len() as u32,
        };
        let sealed = std::mem::take(&mut worker.sealed);
        let result = self.append(worker, &header, &sealed, id, Lifetime::Open);
        worker.sealed = sealed;
        result.map(|()| id)
    }

    /// Takes over a frame that was just opened under `id`, as it is.
    pub(super) fn copy_frame(
        &self,
        worker: &mut Worker,
        frame: &pack::Frame<'_>,
        id: Id,
        lifetime: Lifetime,
    ) -> Result<(), RepositoryError> {
        match self.claim(&frame.header.tag) {
            true => self.append(worker, &frame.header, frame.sealed, id, lifetime),
            false => Ok(()),
        }
    }

    fn claim(&self, tag: &Tag) -> bool {
        let shard = usize::from(tag.as_bytes().last().copied().unwrap_or_default()) % SHARDS;
        self.claimed
            .get(shard)
            .is_none_or(|shard| lock(shard).insert(*tag))
    }

    /// Whether a place that the index knows will do; then it is noted, for the commit to check.
    fn rely_on_index(&self, tag: &Tag) -> Result<bool, RepositoryError> {
        let found = self
            .index
            .sound_records(tag)?
            .into_iter()
            .find(|(_, place)| self.is_whole(place.pack, tag));
        if let Some((record, _)) = found {
            self.relied_on.note(record);
        }
        Ok(found.is_some())
    }

    /// The packs of others that this session relies on.
    pub(super) fn relied_packs(&self) -> Result<BTreeSet<PackName>, RepositoryError> {
        self.relied_on.packs(&self.index)
    }

    /// What was relied on in packs that `wanted` names: the tags by pack.
    pub(super) fn relied_on_in(
        &self,
        wanted: impl Fn(&PackName) -> bool,
    ) -> Result<HashMap<PackName, Vec<Tag>>, RepositoryError> {
        self.relied_on.by_pack(&self.index, wanted)
    }

    pub(super) fn trust(&self) -> Trust {
        self.trust
    }

    /// Whether a pack's frame may count as present for this session. A pack that was not checked
    /// for too long, or is not listed in its size, is read and checked here, once, by the first thread
    /// that asks.
    fn is_whole(&self, number: PackNumber, tag: &Tag) -> bool {
        let Some(cell) = self.checked.get(&number) else {
            return true;
        };
        match cell.get_or_init(|| self.check_pack(number)) {
            CheckedPack::Read { sound, .. } => sound.binary_search(tag).is_ok(),
            CheckedPack::Broken | CheckedPack::OutOfReach => false,
        }
    }

    fn check_pack(&self, number: PackNumber) -> CheckedPack {
        let Some(info) = self.index.pack(number) else {
            return CheckedPack::OutOfReach;
        };
        let name = self.customer.names().pack(&info.row.name);
        let bytes = match self.customer.storage().read(&name, MAX_PACK_BYTES) {
            Ok(bytes) => bytes,
            Err(error) if RepositoryError::from(error.clone()).is_damage() => {
                return CheckedPack::Broken;
            }
            Err(_) => return CheckedPack::OutOfReach,
        };
        let hash = ObjectHash::from_bytes(*blake3::hash(&bytes).as_bytes());
        match pack::scrub(&bytes) {
            // Whole frames, but not those that were written here.
            Ok((_, damaged)) if damaged.is_empty() && hash != info.row.name.hash => {
                CheckedPack::Broken
            }
            Ok((entries, damaged)) => {
                let mut sound: Vec<Tag> = entries
                    .iter()
                    .map(|entry| entry.tag)
                    .filter(|tag| !damaged.contains(tag))
                    .collect();
                sound.sort_unstable();
                CheckedPack::Read { sound, damaged }
            }
            Err(_) => CheckedPack::Broken,
        }
    }

    /// What this session checked on the way: whole packs, and damaged frames. Of a pack that is
    /// missing or not a pack any more, that is every frame.
    pub fn checked_packs(&self) -> Result<CheckedPacks, RepositoryError> {
        let mut whole = Vec::new();
        let mut damaged = Vec::new();
        let mut broken = HashSet::new();
        for (number, cell) in &self.checked {
            let (Some(checked), Some(info)) = (cell.get(), self.index.pack(*number)) else {
                continue;
            };
            let name = info.row.name;
            match checked {
                CheckedPack::Read { damaged: none, .. } if none.is_empty() => whole.push(name),
                CheckedPack::Read { damaged: tags, .. } => {
                    damaged.extend(tags.iter().map(|tag| (name, *tag)));
                }
                CheckedPack::Broken => {
                    broken.insert(*number);
                }
                CheckedPack::OutOfReach => {}
            }
        }
        damaged.extend(self.index.frames_of(&broken)?);
        // What is condemned leaves anyway, and may be gone by now for that reason.
        if !damaged.is_empty() {
            self.customer.refresh()?;
        }
        self.customer.with_state(|state| {
            whole.retain(|pack| !state.is_condemned(pack));
            damaged.retain(|(pack, _)| !state.is_condemned(pack));
        });
        whole.sort_unstable();
        damaged.sort_unstable();
        damaged.dedup();
        Ok((whole, damaged))
    }

    fn append(
        &self,
        worker: &mut Worker,
        header: &FrameHeader,
        sealed: &[u8],
        id: Id,
        lifetime: Lifetime,
    ) -> Result<(), RepositoryError> {
        let kind = PackKind::of(header.kind);
        let full = {
            let mut packs = lock(&self.filling);
            let filling = packs.entry((kind, lifetime)).or_insert_with(|| Filling {
                builder: PackBuilder::new(
                    kind,
                    self.customer.keys().generation(),
                    &self.id,
                    &random_bytes(),
                    self.settings.pack_bytes + (self.settings.pack_bytes >> 6),
                ),
                ids: Vec::new(),
            });
            filling.builder.append(header, sealed);
            filling.ids.push(id);
            match filling.builder.size_bytes() >= self.settings.pack_bytes {
                true => packs.remove(&(kind, lifetime)),
                false => None,
            }
        };
        // Outside of the lock: other threads fill the next pack meanwhile.
        match full {
            Some(filling) => self.send(worker, filling),
            None => Ok(()),
        }
    }

    /// Opens every frame of a finished pack again from the very bytes that are sent, then sends
    /// them: a compressor's or memory's fault must not become a backup.
    fn send(&self, worker: &mut Worker, filling: Filling) -> Result<(), RepositoryError> {
        let ids = filling.ids;
        let pack = filling.builder.finish();
        self.check_before_sending(worker, &pack, &ids)?;
        let name = PackName {
            session: self.id,
            hash: pack.hash,
        };
        let row = PackRow {
            name,
            size_bytes: pack.bytes.len() as u64,
            frames: pack.entries.len() as u32,
            kind: pack
                .entries
                .first()
                .map_or(PackKind::Data, |entry| PackKind::of(entry.kind)),
        };
        {
            let mut written = lock(&self.written);
            let number = written.packs.len() as u32;
            written.packs.push(row);
            written
                .records
                .extend(pack.entries.iter().map(|entry| Record {
                    tag: entry.tag,
                    pack: number,
                    offset: entry.offset,
                    length_bytes: entry.length_bytes,
                }));
        }
        self.stored_bytes
            .fetch_add(row.size_bytes, Ordering::Relaxed);
        let outgoing = Outgoing {
            object: self.customer.names().pack(&name),
            bytes: pack.bytes.into(),
            kind: row.kind,
        };
        #[cfg(test)]
        if crate::codec::seeded::is_on() {
            return self.send_at_once(&outgoing);
        }
        let to_store = lock(&self.uploads)
            .as_ref()
            .map(|uploads| uploads.to_store.clone());
        let sent = to_store.is_some_and(|channel| channel.send(outgoing).is_ok());
        match sent {
            true => Ok(()),
            // The uploading threads have ended; the error of the first is the cause.
            false => Err(self.upload_error()),
        }
    }

    /// What can be repeated exactly has one thread only.
    #[cfg(test)]
    fn send_at_once(&self, pack: &Outgoing) -> Result<(), RepositoryError> {
        if self.failure.get().is_none()
            && let Err(error) = pack.send(&**self.customer.storage())
        {
            let _first = self.failure.set(error);
        }
        match self.failure.get() {
            None => Ok(()),
            Some(error) => Err(error.clone()),
        }
    }

    fn check_before_sending(
        &self,
        worker: &mut Worker,
        pack: &FinishedPack,
        ids: &[Id],
    ) -> Result<(), RepositoryError> {
        for (entry, id) in pack.entries.iter().zip(ids) {
            let opened = pack::frame_bytes(&pack.bytes, entry)
                .and_then(|bytes| pack::parse_frame(bytes).ok())
                .is_some_and(|frame| {
                    worker
                        .opener
                        .open(
                            self.customer.keys(),
                            frame.header.kind,
                            id,
                            &frame.header.tag,
                            frame.header.compressed,
                            frame.header.plain_bytes,
                            frame.sealed,
                            &mut worker.plain,
                        )
                        .is_ok()
                });
            if !opened {
                return Err(RepositoryError::damaged(
                    "pack about to be written",
                    "a frame did not open again: this machine's memory, processor or compressor \
                     is at fault; nothing was written",
                ));
            }
        }
        Ok(())
    }

    fn upload_error(&self) -> RepositoryError {
        // The thread that sends notes its error before its end of the channel goes away.
        self.failure.get().cloned().unwrap_or_else(|| {
            RepositoryError::new(
                RepositoryErrorKind::Refused,
                self.id,
                "the session was finished or given up before its last piece came",
            )
        })
    }

    /// A worker is done. (What it relied on is noted as it goes.)
    pub fn retire(&self, worker: Worker) {
        drop(worker);
    }

    /// Sends what is left, waits until the store has acknowledged everything, then writes the
    /// index segments. Only after this may the session be adopted.
    pub fn finish(&self) -> Result<Uploaded, RepositoryError> {
        let mut worker = self.worker()?;
        let left = std::mem::take(&mut *lock(&self.filling));
        for filling in left.into_values() {
            self.send(&mut worker, filling)?;
        }
        let uploads = lock(&self.uploads).take();
        if uploads.is_some_and(|uploads| !uploads.finish()) {
            let died = "a thread died";
            return Err(RepositoryError::new(
                RepositoryErrorKind::Refused,
                "upload",
                died,
            ));
        }
        if let Some(error) = self.failure.get() {
            return Err(error.clone());
        }
        let mut written = std::mem::take(&mut *lock(&self.written));
        let mut segments = Vec::new();
        if !written.packs.is_empty() {
            written.records.sort_unstable();
            written.records.dedup();
            let count = written.records.len();
            let mut new = NewSegments::new(self.customer, self.id, &written.packs, count);
            for record in &written.records {
                new.push(*record)?;
            }
            let (names, stored_bytes) = new.finish()?;
            self.stored_bytes.fetch_add(stored_bytes, Ordering::Relaxed);
            segments = names;
        }
        Ok(Uploaded {
            segments,
            packs: written.packs.iter().map(|row| row.name).collect(),
            stored_bytes: self.stored_bytes(),
        })
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        // The uploading threads must not write on after their session was given up.
        self.given_up.store(true, Ordering::Relaxed);
        let uploads = lock(&self.uploads).take();
        if let Some(uploads) = uploads {
            let _outcome = uploads.finish();
        }
    }
}

/// Packs that no listing shows in their size, however lately they were checked: a full that relied on one that is
/// lost would be no repair. One that is missing for a moment only costs a reading of it.
fn not_as_listed(customer: &Customer, index: &Index) -> Result<Vec<PackNumber>, RepositoryError> {
    if index.packs().is_empty() {
        return Ok(Vec::new());
    }
    let listed = listed_packs(&**customer.storage(), customer.names())?;
    let numbered = (0..).zip(index.packs());
    Ok(numbered
        .filter(|(_, info)| listed.get(&info.row.name) != Some(&info.row.size_bytes))
        .map(|(number, _)| number)
        .collect())
}

/// Creates an object of this session, repeating an unknown outcome. Its name is used once, so
/// "exists" means that an earlier attempt of ours landed; as a server can say so wrongly, the object is
/// looked at before anything relies on it.
pub(super) fn upload(
    storage: &dyn Storage,
    name: &ObjectName,
    bytes: &[u8],
) -> Result<(), RepositoryError> {
    upload_by(storage, name, bytes, || storage.create(name, bytes))
}

fn upload_by(
    storage: &dyn Storage,
    name: &ObjectName,
    bytes: &[u8],
    create: impl Fn() -> Result<(), StorageError>,
) -> Result<(), RepositoryError> {
    let mut attempt = 0;
    loop {
        let uncertain = match create() {
            Ok(()) => return Ok(()),
            Err(error) if error.kind == StorageErrorKind::AlreadyExists => {
                match storage.read(name, bytes.len() as u64) {
                    Ok(found) if found == bytes => return Ok(()),
                    Ok(_) => {
                        let detail = "was uploaded, and holds other bytes";
                        return Err(RepositoryError::damaged(name, detail));
                    }
                    Err(missing) if missing.kind == StorageErrorKind::NotFound => error,
                    Err(other) => other,
                }
            }
            Err(error) if error.kind == StorageErrorKind::Transient => {
                if !stands(Rule::Acknowledged) {
                    return Ok(());
                }
                error
            }
            Err(error) => return Err(error.into()),
        };
        let passes = matches!(
            uncertain.kind,
            StorageErrorKind::Transient | StorageErrorKind::AlreadyExists
        );
        if !passes || attempt == UPLOAD_ATTEMPTS {
            return Err(uncertain.into());
        }
        if cfg!(not(test)) {
            std::thread::sleep(std::time::Duration::from_millis(20 << attempt));
        }
        attempt += 1;
    }
}

/// The names of everything a session may have written.
pub(super) fn session_objects(
    storage: &dyn Storage,
    names: &CustomerNames,
    session: &SessionId,
) -> Result<Vec<ObjectName>, RepositoryError> {
    let mut objects = Vec::new();
    for prefix in [
        names.session_segments(session),
        names.session_packs(session),
    ] {
        objects.extend(storage.list(&prefix)?.into_iter().map(|object| object.name));
    }
    Ok(objects)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::RepositoryErrorKind;
    use crate::storage::{Fault, Faulty, Memory};

    #[test]
    fn a_server_that_says_exists_is_believed_only_for_what_is_there() {
        let name = ObjectName::new("customers/acme/packs/s/1").unwrap();
        let memory = Memory::new();
        let wrongly = Fault::FailBefore {
            at: 1,
            kind: StorageErrorKind::AlreadyExists,
        };
        let faulty = Faulty::with_faults(memory.clone(), vec![wrongly]);
        upload(&faulty, &name, b"a pack").unwrap();
        assert_eq!(memory.read(&name, 100).unwrap(), b"a pack");
        // An attempt of ours that landed.
        upload(&memory, &name, b"a pack").unwrap();
        for others in [&b"another"[..], b"b pack"] {
            let told = upload(&memory, &name, others).unwrap_err();
            assert_eq!(told.kind, RepositoryErrorKind::Damaged);
        }
    }
}
