//! What a host keeps outside of the store: its identity, locks, and what it has seen.
//!
//! Nothing in it is needed to restore with an escrow key. Its loss costs the host's access, the
//! memory against a rolled back store, and one witness of the clock.

use crate::codec::{HostIdentity, random_bytes};
use crate::format::repository_file::RepositoryFile;
use crate::model::{CustomerName, CustomerUid, EntryHash, InstallationId, RepositoryId, SessionId};
use crate::policy::LocalMark;
use crate::repository::{BelievedSince, Head, HostMemory, KeptState, Vouched};
use jiff::Timestamp;
use rustix::fs::FlockOperation;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

const IDENTITY: &str = "identity";
const REPOSITORY: &str = "repository";
const CLOCK: &str = "clock";
const CLOCK_ALONE: &str = "clock-alone";
const PLANNED: &str = "planned.json";
const INSTALLATION: &str = "installation";
const RESTORES: &str = "restores.log";
/// That of some hundred thousand restore points.
const MAX_CHECKPOINT_BYTES: u64 = 256 << 20;
/// Everything else here is small; more is not ours.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// A file of the state folder that cannot be used; says which.
#[derive(Debug)]
pub struct StateError {
    pub path: PathBuf,
    pub kind: io::ErrorKind,
    pub detail: String,
}

impl StateError {
    pub(super) fn new(path: &Path, error: io::Error) -> Self {
        StateError {
            path: path.to_path_buf(),
            kind: error.kind(),
            detail: error.to_string(),
        }
    }
}

impl fmt::Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.detail)
    }
}

impl std::error::Error for StateError {}

impl From<StateError> for super::JobError {
    fn from(error: StateError) -> Self {
        super::JobError::new(super::JobErrorKind::State, error)
    }
}

/// A lock on a file of the folder; the kernel drops it with its holder, however that ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// A state of a ledger as bytes.
pub(super) struct Checkpoint {
    /// The hash of the program that made it.
    pub program: String,
    pub since: BelievedSince,
    pub content: Vec<u8>,
}

/// Since when the host's clock, which nothing else confirms, is even: it went on as the uptime did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AloneSince {
    pub mark: LocalMark,
    /// The first entry of each customer's ledger that it dated.
    pub first: BTreeMap<CustomerUid, u64>,
}

#[derive(Debug, Clone)]
pub struct StateFolder {
    path: PathBuf,
}

impl StateFolder {
    /// Makes what is missing, of mode 0700, and refuses what others could have filled or can change.
    pub fn create(path: &Path) -> Result<Self, StateError> {
        for folder in [
            path.to_path_buf(),
            path.join("sessions"),
            path.join("heads"),
            path.join("origins"),
            path.join("checkpoints"),
            path.join("locks"),
            path.join("run"),
        ] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&folder)
                .map_err(|error| StateError::new(&folder, error))?;
        }
        let facts = fs::metadata(path).map_err(|error| StateError::new(path, error))?;
        refuse_a_strangers(path, &facts)?;
        if facts.mode() & 0o022 != 0 {
            let detail = format!(
                "others can write into the host's state folder (mode {:o}); look what is in it, then \
                 chmod 700 it",
                facts.mode() & 0o7777
            );
            return Err(StateError {
                path: path.to_path_buf(),
                kind: io::ErrorKind::InvalidData,
                detail,
            });
        }
        Ok(StateFolder {
            path: path.to_path_buf(),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where sockets of captures may be.
    pub fn runtime_dir(&self) -> PathBuf {
        self.path.join("run")
    }

    pub fn identity_path(&self) -> PathBuf {
        self.path.join(IDENTITY)
    }

    /// The identity, which nobody else may be able to read. `NotFound` if there is none, `InvalidInput` if what
    /// is there is none.
    pub fn identity(&self) -> Result<HostIdentity, StateError> {
        let path = self.identity_path();
        let failed = |error| StateError::new(&path, error);
        let file = File::open(&path).map_err(failed)?;
        // Of the file that is read: another one may have its name by now.
        let facts = file.metadata().map_err(failed)?;
        refuse_a_strangers(&path, &facts)?;
        if facts.mode() & 0o077 != 0 {
            return Err(StateError {
                detail: format!(
                    "others can read the host's secret (mode {:o}); chmod 600 it, and make a new \
                     identity if somebody may have read it",
                    facts.mode() & 0o777
                ),
                kind: io::ErrorKind::InvalidData,
                path,
            });
        }
        let no_identity = |detail: String| StateError {
            path: path.clone(),
            kind: io::ErrorKind::InvalidInput,
            detail,
        };
        let mut text = Zeroizing::new(String::new());
        let read = io::Read::read_to_string(&mut io::Read::take(file, MAX_FILE_BYTES), &mut text);
        match read {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                return Err(no_identity(format!("not a host identity: {error}")));
            }
            read => read.map_err(failed)?,
        };
        HostIdentity::from_file_text(&text).map_err(|error| no_identity(error.to_string()))
    }

    /// Makes an identity, of mode 0600, unless there is one. Says whether it was made.
    pub fn ensure_identity(&self, created: &str) -> Result<(HostIdentity, bool), StateError> {
        match self.identity() {
            Err(error) if error.kind == io::ErrorKind::NotFound => {}
            other => return other.map(|identity| (identity, false)),
        }
        let path = self.identity_path();
        let identity = HostIdentity::generate().map_err(|error| StateError {
            path: path.clone(),
            kind: io::ErrorKind::Other,
            detail: error.to_string(),
        })?;
        match write_new(
            &self.path,
            IDENTITY,
            identity.to_file_text(created).as_bytes(),
        ) {
            Ok(()) => Ok((identity, true)),
            // Another process was first.
            Err(error) if error.kind == io::ErrorKind::AlreadyExists => {
                self.identity().map(|identity| (identity, false))
            }
            Err(error) => Err(error),
        }
    }

    /// The repository this host uses; `None` before the first.
    pub fn repository(&self) -> Result<Option<RepositoryId>, StateError> {
        let path = self.path.join(REPOSITORY);
        match read_small(&path) {
            Ok(text) => text.trim().parse().map(Some).map_err(|error| StateError {
                path,
                kind: io::ErrorKind::InvalidData,
                detail: format!("{error}"),
            }),
            Err(error) if error.kind == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub fn remember_repository(&self, id: RepositoryId) -> Result<(), StateError> {
        replace(&self.path, REPOSITORY, format!("{id}\n").as_bytes())
    }

    /// What tells this folder from another one with a copy of the identity. Made when first asked for.
    pub(super) fn installation(&self) -> Result<InstallationId, StateError> {
        let path = self.path.join(INSTALLATION);
        let text = match read_small(&path) {
            Err(error) if error.kind == io::ErrorKind::NotFound => {
                let made = InstallationId::from_bytes(random_bytes());
                match write_new(&self.path, INSTALLATION, format!("{made}\n").as_bytes()) {
                    Err(error) if error.kind != io::ErrorKind::AlreadyExists => return Err(error),
                    _ => read_small(&path)?,
                }
            }
            read => read?,
        };
        text.trim().parse().map_err(|error| StateError {
            path,
            kind: io::ErrorKind::InvalidData,
            detail: format!("{error}"),
        })
    }

    /// The repository that an earlier attempt meant to make and may have left under way, or the one that
    /// was just made up; kept before it is used.
    pub fn planned_repository(&self, made: RepositoryFile) -> Result<RepositoryFile, StateError> {
        let path = self.path.join(PLANNED);
        let invalid = |detail: String| StateError {
            path: path.clone(),
            kind: io::ErrorKind::InvalidData,
            detail,
        };
        let kept = match read_small(&path) {
            Ok(text) => RepositoryFile::parse(text.as_bytes())
                .map_err(|error| invalid(error.to_string()))?,
            Err(error) if error.kind == io::ErrorKind::NotFound => {
                let bytes = made
                    .to_bytes()
                    .map_err(|error| invalid(error.to_string()))?;
                write_new(&self.path, PLANNED, &bytes)?;
                return Ok(made);
            }
            Err(error) => return Err(error),
        };
        // The configuration may have changed since.
        match (kept.chunk_bytes, kept.writers()) == (made.chunk_bytes, made.writers()) {
            true => Ok(kept),
            false => Err(invalid(
                "says that a repository was to be made with another chunk_size or other writers; remove \
                 it if nothing of that attempt can be on its way any more"
                    .to_string(),
            )),
        }
    }

    /// It is made.
    pub fn forget_planned_repository(&self) -> Result<(), StateError> {
        let path = self.path.join(PLANNED);
        match fs::remove_file(&path) {
            // Two of this host made it at once.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(|error| StateError::new(&path, error)),
        }
    }

    /// `None` if somebody holds it.
    pub fn lock(&self, name: &str) -> Result<Option<Lock>, StateError> {
        take_lock(&self.path.join("locks").join(name))
    }

    /// Whether somebody holds it. Who takes it at this very moment finds it taken.
    pub(super) fn is_locked(&self, name: &str) -> bool {
        let Ok(file) = File::open(self.path.join("locks").join(name)) else {
            return false;
        };
        let tried = rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared);
        tried == Err(rustix::io::Errno::WOULDBLOCK)
    }

    pub(super) fn hold_session(&self, session: &SessionId) -> Result<Lock, StateError> {
        let path = self.session_path(session);
        let lock = take_lock(&path)?.ok_or_else(|| StateError {
            path,
            kind: io::ErrorKind::AlreadyExists,
            detail: "is held by another process".to_string(),
        })?;
        // Before its `begin`: after a power cut the session must still be known as one of this folder's.
        let folder = self.path.join("sessions");
        File::open(&folder)
            .and_then(|opened| opened.sync_all())
            .map_err(|error| StateError::new(&folder, error))?;
        Ok(lock)
    }

    /// Whether the session was begun from this folder and no living process holds it. Without a file it may
    /// be one of a copy of this folder: only who began it makes the file, and it stays until the session is
    /// over.
    pub(super) fn session_is_free(&self, session: &SessionId) -> bool {
        let opened = OpenOptions::new()
            .read(true)
            .open(self.session_path(session));
        opened.is_ok_and(|file| {
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
        })
    }

    /// A crash before this leaves an empty file that nobody asks for again.
    pub(super) fn forget_session(&self, session: &SessionId) {
        let _gone = fs::remove_file(self.session_path(session));
    }

    fn session_path(&self, session: &SessionId) -> PathBuf {
        self.path.join("sessions").join(session.to_string())
    }

    /// What was made of a ledger, by which program, and when. What a crash tore, and what anybody changed, is
    /// none.
    pub(super) fn read_checkpoint(&self, customer: &CustomerUid) -> Option<Checkpoint> {
        let file = File::open(self.checkpoint_path(customer)).ok()?;
        let mut bytes = Vec::new();
        let mut file = io::Read::take(file, MAX_CHECKPOINT_BYTES);
        io::Read::read_to_end(&mut file, &mut bytes).ok()?;
        let end = bytes.iter().position(|byte| *byte == b'\n')?;
        let content = bytes.split_off(end + 1);
        let mut fields = std::str::from_utf8(bytes.get(..end)?).ok()?.split(' ');
        let checkpoint = Checkpoint {
            program: fields.next()?.to_string(),
            since: BelievedSince {
                replayed_at: fields.next()?.parse().ok()?,
                read_at: fields.next()?.parse().ok()?,
            },
            content,
        };
        let hash = blake3::hash(&checkpoint.content).to_hex();
        (fields.next()? == hash.as_str()).then_some(checkpoint)
    }

    pub(super) fn write_checkpoint(&self, customer: &CustomerUid, checkpoint: &Checkpoint) {
        let head = format!(
            "{} {} {} {}\n",
            checkpoint.program,
            checkpoint.since.replayed_at,
            checkpoint.since.read_at,
            blake3::hash(&checkpoint.content).to_hex()
        );
        let bytes = [head.as_bytes(), &checkpoint.content].concat();
        if bytes.len() as u64 <= MAX_CHECKPOINT_BYTES {
            let folder = self.path.join("checkpoints");
            // Without one the ledger is read from genesis.
            let _kept = replace(&folder, &customer.to_string(), &bytes);
        }
    }

    fn checkpoint_path(&self, customer: &CustomerUid) -> PathBuf {
        self.path.join("checkpoints").join(customer.to_string())
    }

    fn head_path(&self, customer: &CustomerUid) -> PathBuf {
        self.path.join("heads").join(customer.to_string())
    }

    fn origin_path(&self, repository: &RepositoryId, customer: &CustomerName) -> PathBuf {
        self.path.join("origins").join(origin(repository, customer))
    }

    pub(super) fn locks_renewed_at(&self, customer: &CustomerUid) -> Option<Timestamp> {
        let text = read_small(&self.path.join(renewed(customer))).ok()?;
        text.trim().parse().ok()
    }

    pub(super) fn remember_locks_renewed(&self, customer: &CustomerUid, at: Timestamp) {
        // Without it they are renewed once more.
        let _kept = replace(&self.path, &renewed(customer), format!("{at}\n").as_bytes());
    }

    pub(super) fn clock_mark(&self) -> Option<LocalMark> {
        parse_mark(&read_small(&self.path.join(CLOCK)).ok()?)
    }

    pub(super) fn remember_clock_mark(&self, mark: &LocalMark) {
        let _kept = replace(&self.path, CLOCK, mark_text(mark).as_bytes());
    }

    pub(super) fn alone_since(&self) -> Option<AloneSince> {
        let text = read_small(&self.path.join(CLOCK_ALONE)).ok()?;
        // What was read in part ends in a number that may be another one.
        let text = text.ends_with('\n').then_some(text)?;
        let (mark, rows) = text.split_once('\n')?;
        let row = |row: &str| {
            let (customer, seq) = row.split_once(' ')?;
            Some((customer.parse().ok()?, seq.parse().ok()?))
        };
        Some(AloneSince {
            mark: parse_mark(mark)?,
            first: rows.lines().map(row).collect::<Option<_>>()?,
        })
    }

    pub(super) fn remember_alone_since(&self, alone: &AloneSince) {
        let rows = alone.first.iter();
        let rows: String = rows.map(|(uid, seq)| format!("{uid} {seq}\n")).collect();
        let text = mark_text(&alone.mark) + &rows;
        // Without it the times meanwhile stay nobody's word but this clock's.
        let _kept = replace(&self.path, CLOCK_ALONE, text.as_bytes());
    }

    /// For a restore that the ledger could not take down.
    pub fn note_restore(&self, line: &str) -> Result<(), StateError> {
        let path = self.path.join(RESTORES);
        let failed = |error| StateError::new(&path, error);
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        writeln!(file, "{}", line.replace(['\n', '\r'], " ")).map_err(failed)?;
        file.sync_all().map_err(failed)
    }
}

impl HostMemory for StateFolder {
    fn head(&self, customer: &CustomerUid) -> Option<Head> {
        let text = read_small(&self.head_path(customer)).ok()?;
        let (seq, hash) = text.trim().split_once(' ')?;
        Some(Head {
            seq: seq.parse().ok()?,
            hash: hash.parse().ok()?,
        })
    }

    /// Never goes back: of several processes the one that saw most is remembered.
    fn remember_head(&self, customer: &CustomerUid, head: Head) {
        let known = self.head(customer).map_or(0, |known| known.seq);
        if known < head.seq {
            let text = format!("{} {}\n", head.seq, head.hash);
            let folder = self.path.join("heads");
            // A memory that cannot be kept is no reason to stop a backup.
            let _kept = replace(&folder, &customer.to_string(), text.as_bytes());
        }
    }

    fn origin(&self, repository: &RepositoryId, customer: &CustomerName) -> Option<EntryHash> {
        let text = read_small(&self.origin_path(repository, customer)).ok()?;
        text.trim().parse().ok()
    }

    /// Of several processes the first is believed; which is as well as any, as they read the same.
    fn remember_origin(
        &self,
        repository: &RepositoryId,
        customer: &CustomerName,
        first: EntryHash,
    ) {
        let (folder, name) = (self.path.join("origins"), origin(repository, customer));
        // A memory that cannot be kept is no reason to stop a backup.
        let _kept = write_new(&folder, &name, format!("{first}\n").as_bytes());
    }

    /// Whoever has no clock cannot tell how old one is.
    fn checkpoint(&self, _: &CustomerUid) -> Option<KeptState> {
        None
    }

    fn keep_checkpoint(&self, _: &CustomerUid, _: &[u8], _: Vouched) {}
}

fn mark_text(mark: &LocalMark) -> String {
    let (boot, uptime) = (&mark.boot_id, mark.since_boot_seconds);
    format!("{boot} {uptime} {}\n", mark.wall)
}

fn parse_mark(text: &str) -> Option<LocalMark> {
    let mut fields = text.trim().split(' ');
    Some(LocalMark {
        boot_id: fields.next()?.to_string(),
        since_boot_seconds: fields.next()?.parse().ok()?,
        wall: fields.next()?.parse().ok()?,
    })
}

/// The name of the file that keeps the first entry of a customer's ledger.
fn origin(repository: &RepositoryId, customer: &CustomerName) -> String {
    format!("{repository}-{customer}")
}

fn read_small(path: &Path) -> Result<String, StateError> {
    read_up_to(path, MAX_FILE_BYTES)
}

pub(super) fn read_up_to(path: &Path, max_bytes: u64) -> Result<String, StateError> {
    let failed = |error| StateError::new(path, error);
    let file = File::open(path).map_err(failed)?;
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(file, max_bytes), &mut text).map_err(failed)?;
    Ok(text)
}

/// What somebody else owns, he can change or read whatever its mode says. Root looks into the folder of the user
/// that vmkeep runs as: to give that folder to root would lock this user out.
fn is_a_strangers(owner: u32, own: u32) -> bool {
    own != 0 && owner != own && owner != 0
}

fn refuse_a_strangers(path: &Path, facts: &fs::Metadata) -> Result<(), StateError> {
    let own = rustix::process::geteuid().as_raw();
    match is_a_strangers(facts.uid(), own) {
        false => Ok(()),
        true => Err(StateError {
            path: path.to_path_buf(),
            kind: io::ErrorKind::InvalidData,
            detail: format!(
                "belongs to another user (uid {}, and vmkeep runs as {own}); chown it if its content is yours",
                facts.uid()
            ),
        }),
    }
}

fn take_lock(path: &Path) -> Result<Option<Lock>, StateError> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|error| StateError::new(path, error))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(Lock { _file: file })),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(StateError::new(path, error.into())),
    }
}

fn renewed(customer: &CustomerUid) -> String {
    format!("renewed-{customer}")
}

/// Writes a file beside its name first, so that a crash leaves the old one or the new one.
pub(super) fn replace(folder: &Path, name: &str, content: &[u8]) -> Result<(), StateError> {
    let path = folder.join(name);
    let failed = |error| StateError::new(&path, error);
    let temporary = folder.join(format!(".{name}.{}", std::process::id()));
    let written = write_file(&temporary, content)
        .and_then(|()| fs::rename(&temporary, &path))
        .map_err(failed);
    if written.is_err() {
        let _gone = fs::remove_file(&temporary);
    }
    written
}

fn write_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(content)
}

/// Creates a file that must not exist, whole and durable, or not at all.
fn write_new(folder: &Path, name: &str, content: &[u8]) -> Result<(), StateError> {
    let path = folder.join(name);
    let failed = |error| StateError::new(&path, error);
    let temporary = folder.join(format!(".{name}.{}", std::process::id()));
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::hard_link(&temporary, &path)?;
        File::open(folder)?.sync_all()
    })();
    let _gone = fs::remove_file(&temporary);
    written.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_made_once_and_is_its_owners_alone() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::create(&folder.path().join("state")).unwrap();
        assert!(
            state
                .identity()
                .is_err_and(|e| e.kind == io::ErrorKind::NotFound)
        );
        let (first, made) = state.ensure_identity("now").unwrap();
        let (second, again) = state.ensure_identity("later").unwrap();
        assert!(made && !again && first.host_id() == second.host_id());
        let mode = fs::metadata(state.identity_path()).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::set_permissions(
            state.identity_path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o640),
        )
        .unwrap();
        assert!(state.identity().is_err());
    }

    #[test]
    fn a_session_is_free_from_the_end_of_its_holder_until_it_is_over() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::create(folder.path()).unwrap();
        let session = SessionId::from_bytes([7; 16]);
        // Of one that a copy of this folder began, nothing is known.
        assert!(!state.session_is_free(&session));
        let held = state.hold_session(&session).unwrap();
        assert!(!state.session_is_free(&session));
        drop(held);
        // However often that is asked: giving it up may fail.
        assert!(state.session_is_free(&session));
        assert!(state.session_is_free(&session));
        state.forget_session(&session);
        assert!(!state.session_is_free(&session));
    }

    #[test]
    fn a_state_folder_into_which_others_can_write_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        fs::create_dir(&path).unwrap();
        for (mode, is_fit) in [
            (0o700, true),
            (0o755, true),
            (0o770, false),
            (0o703, false),
            (0o1777, false),
        ] {
            let permissions: fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
            fs::set_permissions(&path, permissions).unwrap();
            let created = StateFolder::create(&path);
            assert_eq!(created.is_ok(), is_fit, "{mode:o}");
        }
    }

    #[test]
    fn what_another_user_owns_is_no_state_of_this_host_but_for_root() {
        for (owner, own, is_refused) in [
            (4711, 4711, false),
            (0, 4711, false),
            (4712, 4711, true),
            (4711, 0, false),
            (0, 0, false),
        ] {
            assert_eq!(is_a_strangers(owner, own), is_refused, "{owner} {own}");
        }
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::create(folder.path()).unwrap();
        state.ensure_identity("now").unwrap();
        if !rustix::process::geteuid().is_root() {
            // Only root can give files away.
            return;
        }
        let give_to = |path: &Path, uid| std::os::unix::fs::chown(path, Some(uid), None).unwrap();
        give_to(&state.identity_path(), 4711);
        give_to(folder.path(), 4711);
        assert!(StateFolder::create(folder.path()).is_ok());
        assert!(state.identity().is_ok());
        // The admin trusts its owner, and nobody else.
        let open: fs::Permissions = std::os::unix::fs::PermissionsExt::from_mode(0o770);
        fs::set_permissions(folder.path(), open).unwrap();
        assert!(StateFolder::create(folder.path()).is_err());
    }

    #[test]
    fn a_repository_is_planned_once_and_forgotten_by_whoever_comes_first() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::create(folder.path()).unwrap();
        let with = |id: u8, chunk_bytes| RepositoryFile {
            format: 1,
            repository: RepositoryId::from_bytes([id; 16]),
            created_at: "2025-03-02T01:00:00Z".parse().unwrap(),
            chunk_bytes,
            features: Vec::new(),
        };
        let first = with(1, 65536);
        assert_eq!(state.planned_repository(first.clone()).unwrap(), first);
        assert_eq!(state.planned_repository(with(2, 65536)).unwrap(), first);
        let other = state.planned_repository(with(3, 131_072)).unwrap_err();
        assert!(other.detail.contains("another chunk_size"), "{other}");
        state.forget_planned_repository().unwrap();
        state.forget_planned_repository().unwrap();
        assert_eq!(
            state.planned_repository(with(4, 65536)).unwrap(),
            with(4, 65536)
        );
    }

    #[test]
    fn what_was_seen_of_a_ledger_never_goes_back() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::create(folder.path()).unwrap();
        let customer = CustomerUid::from_bytes([1; 16]);
        let head = |seq| Head {
            seq,
            hash: crate::model::EntryHash::from_bytes([seq as u8; 32]),
        };
        state.remember_head(&customer, head(5));
        state.remember_head(&customer, head(4));
        assert_eq!(state.head(&customer), Some(head(5)));
    }

    #[test]
    fn a_checkpoint_that_was_torn_or_changed_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::create(folder.path()).unwrap();
        let customer = CustomerUid::from_bytes([1; 16]);
        let kept = Checkpoint {
            program: "a-program".to_string(),
            since: BelievedSince {
                replayed_at: "2025-03-02T01:00:00Z".parse().unwrap(),
                read_at: "2025-03-09T01:00:00Z".parse().unwrap(),
            },
            content: b"{\"a state\":\n1}".to_vec(),
        };
        assert!(state.read_checkpoint(&customer).is_none());
        state.write_checkpoint(&customer, &kept);
        let read = state.read_checkpoint(&customer).unwrap();
        assert_eq!(read.program, kept.program);
        assert_eq!(read.since, kept.since);
        assert_eq!(read.content, kept.content);

        let path = state.checkpoint_path(&customer);
        let whole = fs::read(&path).unwrap();
        for length in 0..whole.len() {
            fs::write(&path, &whole[..length]).unwrap();
            assert!(
                state.read_checkpoint(&customer).is_none(),
                "cut to {length}"
            );
        }
        let line = whole.iter().position(|byte| *byte == b'\n').unwrap();
        for at in line - 64..whole.len() {
            let mut bad = whole.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert!(state.read_checkpoint(&customer).is_none(), "byte {at}");
        }
    }
}
