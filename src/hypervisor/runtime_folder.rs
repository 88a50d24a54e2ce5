//! Private folders for the sockets of the servers that we start or ask for, and for overlays. A
//! folder belongs to whoever holds the lock on it, and the kernel drops the lock with its holder: a
//! folder whose lock is free was left by an agent that died.

use super::nbd::{Endpoint, NbdClient};
use super::{CaptureError, CaptureErrorKind};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

const PREFIX: &str = "nbd-";
const SOCKET: &str = "s";
const LOG: &str = "log";
const OVERLAY: &str = "overlay-";
/// Length of `sun_path` with its final zero.
const LONGEST_SOCKET_PATH: usize = 107;

pub(super) fn random_suffix() -> io::Result<String> {
    let mut bytes = [0; 8];
    // Requests this small are answered whole.
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(format!("{:016x}", u64::from_ne_bytes(bytes)))
}

/// A folder of mode 0700 with room for a socket and a log; removed when dropped.
#[derive(Debug)]
pub(super) struct RuntimeFolder {
    path: PathBuf,
    /// Holds the lock.
    _folder: File,
}

impl RuntimeFolder {
    pub(super) fn create(parent: &Path) -> Result<Self, CaptureError> {
        let failed =
            |error: io::Error| CaptureError::new(CaptureErrorKind::Io, parent.display(), error);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .map_err(failed)?;
        // A cleaner can take a new folder for a dead one before it is locked; then another is made.
        for _ in 0..16 {
            let path = parent.join(format!("{PREFIX}{}", random_suffix().map_err(failed)?));
            if path.join(SOCKET).as_os_str().len() > LONGEST_SOCKET_PATH {
                return Err(CaptureError::new(
                    CaptureErrorKind::Invalid,
                    parent.display(),
                    "the path of the runtime folder is too long for a socket in it",
                ));
            }
            DirBuilder::new()
                .mode(0o700)
                .create(&path)
                .map_err(failed)?;
            if let Some(folder) = lock(&path).map_err(failed)? {
                return Ok(RuntimeFolder {
                    path,
                    _folder: folder,
                });
            }
        }
        Err(failed(io::Error::other("no folder could be locked")))
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.path.join(SOCKET)
    }

    pub(super) fn log(&self) -> PathBuf {
        self.path.join(LOG)
    }

    /// Where the overlay of the `number`-th disk of a capture lies.
    pub(super) fn overlay(&self, number: usize) -> PathBuf {
        self.path.join(format!("{OVERLAY}{number}"))
    }

    /// Lets another user in: a QEMU that does not run as root.
    pub(super) fn give_to(&self, user: u32, group: u32) -> io::Result<()> {
        std::os::unix::fs::chown(&self.path, Some(user), Some(group))
    }
}

impl Drop for RuntimeFolder {
    fn drop(&mut self) {
        // What stays is removed by the next `recover`.
        let _ = remove(&self.path);
    }
}

/// The open folder with its lock, if nobody else holds it and it is still the one at `path`.
pub(super) fn lock(path: &Path) -> io::Result<Option<File>> {
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

fn remove(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let name = entry?.file_name();
        let ours = name.to_str().is_some_and(|name| {
            let number = name.strip_prefix(OVERLAY).unwrap_or("");
            name == SOCKET || name == LOG || number.parse::<usize>().is_ok()
        });
        if !ours {
            continue;
        }
        // A server takes its socket away by itself, maybe now.
        match fs::remove_file(path.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    fs::remove_dir(path)
}

/// Removes what dead agents left in `parent`, and ends servers that wait for a client of theirs.
pub(super) fn remove_dead(parent: &Path) -> Result<(), CaptureError> {
    let failed = |path: &Path, error: io::Error| {
        CaptureError::new(CaptureErrorKind::Io, path.display(), error)
    };
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(parent, error)),
    };
    for entry in entries {
        let entry = entry.map_err(|error| failed(parent, error))?;
        let path = entry.path();
        let ours = entry.file_name().to_str().is_some_and(|name| {
            name.strip_prefix(PREFIX).is_some_and(|suffix| {
                suffix.len() == 16 && suffix.bytes().all(|byte| byte.is_ascii_hexdigit())
            })
        });
        if !ours {
            continue;
        }
        let Some(_lock) = lock(&path).map_err(|error| failed(&path, error))? else {
            continue;
        };
        // A server whose agent died before its first connection waits for one; it ends when
        // that has been and gone.
        let mut endpoint = Endpoint::new(path.join(SOCKET), "");
        endpoint.timeout = Duration::from_secs(2);
        if let Ok(client) = NbdClient::connect(endpoint) {
            let _ = client.disconnect();
        }
        remove(&path).map_err(|error| failed(&path, error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_folder_in_use_is_kept_and_a_dead_one_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let alive = RuntimeFolder::create(parent.path()).unwrap();
        let mode = fs::metadata(&alive.path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let dead = parent.path().join("nbd-0123456789abcdef");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join(LOG), "x").unwrap();
        let foreign = parent.path().join("nbd-something-else");
        fs::create_dir(&foreign).unwrap();

        remove_dead(parent.path()).unwrap();

        assert!(alive.path.is_dir());
        assert!(!dead.exists());
        assert!(foreign.is_dir());
        let path = alive.path.clone();
        drop(alive);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_refused_by_name() {
        let parent = tempfile::tempdir().unwrap();
        let error = RuntimeFolder::create(&parent.path().join("x".repeat(100))).unwrap_err();
        assert_eq!(error.kind, CaptureErrorKind::Invalid);
    }
}
