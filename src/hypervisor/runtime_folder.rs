//! A folder for what one capture or one server needs while it lives: sockets, overlays, notes.
//!
//! It belongs to whoever holds the lock on it, and the kernel drops the lock with its holder: a
//! folder whose lock is free was left by an agent that died.
//!
//! The folder is ours, whoever QEMU runs as: what is read from it is what we wrote, and what we
//! write in it goes nowhere else. Others may pass through it and not look. Only the folder within,
//! where a server places its socket, is given to QEMU's user; files are given one by one.

use super::{CaptureError, CaptureErrorKind};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

const SERVER: &str = "q";
const SOCKET: &str = "s";
const LOG: &str = "log";
const FROZEN: &str = "frozen";
/// Length of `sun_path` with its final zero.
const LONGEST_SOCKET_PATH: usize = 107;
/// Others may pass through, and not look.
const PASSABLE: u32 = 0o711;

pub(super) fn random_suffix() -> io::Result<String> {
    let mut bytes = [0; 8];
    // Requests this small are answered whole.
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(format!("{:016x}", u64::from_ne_bytes(bytes)))
}

pub(super) fn is_random_suffix(text: &str) -> bool {
    text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn failed(path: &Path, error: impl Into<io::Error>) -> CaptureError {
    let error: io::Error = error.into();
    CaptureError::new(CaptureErrorKind::Io, path.display(), error)
}

/// Makes the folder of all captures, where it is not there yet. Its mode is left to whoever made it.
pub(super) fn create_parent(path: &Path) -> Result<(), CaptureError> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new()
        .recursive(true)
        .mode(PASSABLE)
        .create(path)
        // Whatever the umask is.
        .and_then(|()| fs::set_permissions(path, Permissions::from_mode(PASSABLE)))
        .map_err(|error| failed(path, error))
}

/// Removed with its content when dropped, except while a guest may be frozen.
#[derive(Debug)]
pub(super) struct RuntimeFolder {
    path: PathBuf,
    _lock: File,
}

impl RuntimeFolder {
    /// `kind`: those that the same cleaner looks after. `user`: who QEMU runs as, if not as us.
    pub(super) fn create(
        parent: &Path,
        kind: &str,
        user: Option<(u32, u32)>,
    ) -> Result<Self, CaptureError> {
        create_parent(parent)?;
        if let Some((user, group)) = user {
            check_passable(parent, user, group)?;
        }
        // A cleaner can take a new folder for a dead one before it is locked; then another is made.
        for _ in 0..16 {
            let suffix = random_suffix().map_err(|error| failed(parent, error))?;
            let path = parent.join(format!("{kind}-{suffix}"));
            DirBuilder::new()
                .mode(0o700)
                .create(&path)
                .map_err(|error| failed(&path, error))?;
            let Some(lock) = lock(&path).map_err(|error| failed(&path, error))? else {
                continue;
            };
            let folder = RuntimeFolder { path, _lock: lock };
            folder.furnish(user)?;
            return Ok(folder);
        }
        Err(failed(
            parent,
            io::Error::other("no folder could be locked"),
        ))
    }

    fn furnish(&self, user: Option<(u32, u32)>) -> Result<(), CaptureError> {
        if self.socket().as_os_str().len() > LONGEST_SOCKET_PATH {
            return Err(CaptureError::new(
                CaptureErrorKind::Invalid,
                self.path.display(),
                "the path of the runtime folder is too long for a socket in it",
            ));
        }
        fs::set_permissions(&self.path, Permissions::from_mode(PASSABLE))
            .map_err(|error| failed(&self.path, error))?;
        let server = self.path.join(SERVER);
        DirBuilder::new()
            .mode(0o700)
            .create(&server)
            .map_err(|error| failed(&server, error))?;
        match user {
            Some(user) => give(&server, user),
            None => Ok(()),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Where a server may place its socket.
    pub(super) fn socket(&self) -> PathBuf {
        socket_in(&self.path)
    }

    pub(super) fn log(&self) -> PathBuf {
        self.path.join(LOG)
    }

    /// Writes a file that only we can read; its path as text, for an argument.
    pub(super) fn write(&self, name: &str, content: &str) -> Result<String, CaptureError> {
        let path = self.path.join(name);
        fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(content.as_bytes()))
            .map_err(|error| failed(&path, error))?;
        match path.to_str() {
            Some(text) => Ok(text.to_string()),
            None => Err(failed(&path, io::Error::other("the path is no text"))),
        }
    }

    /// Leaves word for whoever finds this folder after our death.
    pub(super) fn note_frozen(&self) -> Result<(), CaptureError> {
        self.write(FROZEN, "").map(|_| ())
    }

    pub(super) fn note_thawed(&self) {
        // A word too many costs one needless thaw.
        let _ = fs::remove_file(self.path.join(FROZEN));
    }

    /// Whether a guest may be frozen still.
    pub(super) fn is_frozen(&self) -> bool {
        self.path.join(FROZEN).exists()
    }
}

impl Drop for RuntimeFolder {
    fn drop(&mut self) {
        // Whoever comes next must hear of a guest that nobody could thaw.
        if !self.is_frozen() {
            // What stays is removed by the next `recover`.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn socket_in(folder: &Path) -> PathBuf {
    folder.join(SERVER).join(SOCKET)
}

/// Gives a file or folder of ours to the user that QEMU runs as.
pub(super) fn give(path: &Path, (user, group): (u32, u32)) -> Result<(), CaptureError> {
    chown(path, Some(user), Some(group)).map_err(|error| {
        CaptureError::new(
            CaptureErrorKind::Io,
            path.display(),
            format!("giving it to QEMU's user {user}: {error}; vmkeep must run as root"),
        )
    })
}

/// Whether a user may pass through a folder and all above it. Lists of further rights are not
/// looked at.
pub(super) fn check_passable(path: &Path, user: u32, group: u32) -> Result<(), CaptureError> {
    if user == 0 {
        return Ok(());
    }
    let real = path.canonicalize().map_err(|error| failed(path, error))?;
    for folder in real.ancestors() {
        let found = fs::metadata(folder).map_err(|error| failed(folder, error))?;
        let needed = match () {
            () if found.uid() == user => 0o100,
            () if found.gid() == group => 0o010,
            () => 0o001,
        };
        if found.mode() & needed == 0 {
            return Err(CaptureError::new(
                CaptureErrorKind::Invalid,
                folder.display(),
                format!(
                    "QEMU's user {user} cannot pass through this folder; allow it (chmod o+x) or \
                     configure another one"
                ),
            ));
        }
    }
    Ok(())
}

/// The open folder with its lock, if nobody else holds it and it is still the one at `path`.
fn lock(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(folder) => File::from(folder),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let ours = folder.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(there) if there.dev() == ours.dev() && there.ino() == ours.ino() => Ok(Some(folder)),
        Ok(_) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_of(kind: &str, path: &Path) -> bool {
    path.file_name()
        .and_then(|name| name.to_str())
        .and_then(|name| name.strip_prefix(kind))
        .and_then(|rest| rest.strip_prefix('-'))
        .is_some_and(|suffix| {
            suffix.len() == 16 && suffix.bytes().all(|byte| byte.is_ascii_hexdigit())
        })
}

/// What dead agents left in `parent`. Each is locked as long as it is held here, so that nobody
/// else takes it meanwhile, and removed when dropped.
pub(super) fn dead(parent: &Path, kind: &str) -> Result<Vec<RuntimeFolder>, CaptureError> {
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(parent, error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| failed(parent, error))?.path();
        if !is_of(kind, &path) {
            continue;
        }
        if let Some(lock) = lock(&path).map_err(|error| failed(&path, error))? {
            found.push(RuntimeFolder { path, _lock: lock });
        }
    }
    Ok(found)
}

/// Whose a socket is, by its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// An agent of ours that has died.
    Dead,
    /// Another agent of ours, at work.
    Alive,
    Foreign,
}

pub(super) fn owner_of(socket: &Path, parent: &Path, kind: &str) -> Owner {
    let folder = socket.parent().and_then(Path::parent);
    match folder {
        Some(folder) if folder.parent() == Some(parent) && is_of(kind, folder) => {
            // A folder that is gone has nobody in it.
            match (folder.exists(), lock(folder)) {
                (false, _) | (true, Ok(Some(_))) => Owner::Dead,
                (true, _) => Owner::Alive,
            }
        }
        _ => Owner::Foreign,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn a_folder_in_use_is_kept_and_a_dead_one_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let alive = RuntimeFolder::create(parent.path(), "lv-ab", None).unwrap();
        let others = ["lv-abc-0123456789abcdef", "lv-ab-x", "lv-ab"];
        for name in [&others[..], &["lv-ab-0123456789abcdef"]].concat() {
            fs::create_dir(parent.path().join(name)).unwrap();
        }
        let left = parent.path().join("lv-ab-0123456789abcdef");
        fs::write(left.join(LOG), "").unwrap();

        let found = dead(parent.path(), "lv-ab").unwrap();
        assert_eq!(found.len(), 1);
        assert!(dead(parent.path(), "lv-ab").unwrap().is_empty(), "taken");
        drop(found);

        assert!(!left.exists());
        assert!(alive.path().is_dir());
        for name in others {
            assert!(parent.path().join(name).is_dir(), "{name}");
        }
        let path = alive.path().to_path_buf();
        drop(alive);
        assert!(!path.exists());
    }

    #[test]
    fn word_of_a_frozen_guest_outlives_its_folder_until_it_is_thawed() {
        let parent = tempfile::tempdir().unwrap();
        let folder = RuntimeFolder::create(parent.path(), "lv-ab", None).unwrap();
        let path = folder.path().to_path_buf();
        folder.note_frozen().unwrap();
        drop(folder);
        assert!(dead(parent.path(), "lv-ab").unwrap()[0].is_frozen());
        assert!(path.exists());
        dead(parent.path(), "lv-ab").unwrap()[0].note_thawed();
        assert!(!path.exists());
    }

    #[test]
    fn qemu_gets_the_place_of_its_socket_and_passes_through_the_rest() {
        let top = tempfile::tempdir().unwrap();
        fs::set_permissions(top.path(), Permissions::from_mode(0o711)).unwrap();
        let parent = top.path().join("run");
        // Only root can give it to somebody else.
        let us = fs::metadata(top.path()).unwrap();
        let folder = RuntimeFolder::create(&parent, "qmp", Some((us.uid(), us.gid()))).unwrap();
        assert_eq!(mode(&parent), PASSABLE);
        assert_eq!(mode(folder.path()), PASSABLE);
        let server = folder.path().join(SERVER);
        assert_eq!(mode(&server), 0o700);
        assert_eq!(folder.socket().parent(), Some(server.as_path()));
        let secret = folder.write("backup.xml", "x").unwrap();
        assert_eq!(mode(Path::new(&secret)), 0o600);
    }

    #[test]
    fn a_folder_that_qemu_cannot_pass_through_is_refused_by_name() {
        let parent = tempfile::tempdir().unwrap();
        let inner = parent.path().join("run");
        fs::set_permissions(parent.path(), Permissions::from_mode(0o700)).unwrap();
        let error = RuntimeFolder::create(&inner, "lv-ab", Some((64055, 64055))).unwrap_err();
        assert_eq!(error.kind, CaptureErrorKind::Invalid);
        assert!(
            error.name.ends_with(parent.path().to_str().unwrap()),
            "{error}"
        );
    }

    #[test]
    fn the_mode_of_a_folder_that_is_there_is_left_alone() {
        let parent = tempfile::tempdir().unwrap();
        fs::set_permissions(parent.path(), Permissions::from_mode(0o750)).unwrap();
        let _folder = RuntimeFolder::create(parent.path(), "nbd", None).unwrap();
        assert_eq!(mode(parent.path()), 0o750);
    }

    #[test]
    fn the_place_of_a_socket_tells_whose_it_is() {
        let parent = tempfile::tempdir().unwrap();
        let folder = RuntimeFolder::create(parent.path(), "lv-ab", None).unwrap();
        let socket = folder.socket();
        assert_eq!(owner_of(&socket, parent.path(), "lv-ab"), Owner::Alive);
        assert_eq!(owner_of(&socket, parent.path(), "lv-a"), Owner::Foreign);
        drop(folder);
        assert_eq!(owner_of(&socket, parent.path(), "lv-ab"), Owner::Dead);
        let other = Path::new("/var/other/lv-ab-0123456789abcdef/q/s");
        assert_eq!(owner_of(other, parent.path(), "lv-ab"), Owner::Foreign);
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_refused_by_name() {
        let parent = tempfile::tempdir().unwrap();
        let long = parent.path().join("x".repeat(100));
        let error = RuntimeFolder::create(&long, "nbd", None).unwrap_err();
        assert_eq!(error.kind, CaptureErrorKind::Invalid);
        assert_eq!(fs::read_dir(&long).unwrap().count(), 0, "nothing is left");
    }
}
