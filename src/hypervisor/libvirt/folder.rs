//! The folders of one capture. The outer ones are ours: what virsh reads from them is what we
//! wrote. QEMU, which may run as another user, owns the one that its socket is placed in, and may
//! pass through the others.

use crate::hypervisor::runtime_folder::{lock, random_suffix};
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

const PREFIX: &str = "lv-";
const QEMU: &str = "q";
const SOCKET: &str = "s";
const FROZEN: &str = "frozen";
/// Length of `sun_path` with its final zero.
const LONGEST_SOCKET_PATH: usize = 107;
/// Others may pass through, and not look.
const PASSABLE: u32 = 0o711;

fn failed(path: &Path, error: impl Into<io::Error>) -> CaptureError {
    let error: io::Error = error.into();
    CaptureError::new(CaptureErrorKind::Io, path.display(), error)
}

/// Makes the folder of all captures, where it is not there yet.
pub(super) fn create_parent(path: &Path) -> Result<(), CaptureError> {
    DirBuilder::new()
        .recursive(true)
        .mode(PASSABLE)
        .create(path)
        .map_err(|error| failed(path, error))
}

/// A folder that is ours as long as we hold its lock; removed with its content when dropped,
/// except while the guest may be frozen.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    _lock: File,
}

impl Folder {
    /// `user`: who QEMU runs as.
    pub(super) fn create(
        parent: &Path,
        owner: &str,
        user: Option<(u32, u32)>,
    ) -> Result<Self, CaptureError> {
        create_parent(parent)?;
        if let Some((user, group)) = user {
            check_passable(parent, user, group)?;
        }
        // A cleaner can take a new folder for a dead one before it is locked; then another is made.
        for _ in 0..16 {
            let suffix = random_suffix().map_err(|error| failed(parent, error))?;
            let path = parent.join(format!("{PREFIX}{owner}-{suffix}"));
            DirBuilder::new()
                .mode(0o700)
                .create(&path)
                .map_err(|error| failed(&path, error))?;
            let Some(lock) = lock(&path).map_err(|error| failed(&path, error))? else {
                continue;
            };
            // Whatever the umask is.
            lock.set_permissions(fs::Permissions::from_mode(PASSABLE))
                .map_err(|error| failed(&path, error))?;
            return Ok(Folder { path, _lock: lock });
        }
        Err(failed(
            parent,
            io::Error::other("no folder could be locked"),
        ))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes room for QEMU's socket, and says where it will be.
    pub(super) fn socket_for(&self, user: Option<(u32, u32)>) -> Result<PathBuf, CaptureError> {
        let inner = self.path.join(QEMU);
        let socket = inner.join(SOCKET);
        if socket.as_os_str().len() > LONGEST_SOCKET_PATH {
            return Err(CaptureError::new(
                CaptureErrorKind::Invalid,
                self.path.display(),
                "the path of the runtime folder is too long for a socket in it",
            ));
        }
        DirBuilder::new()
            .mode(0o700)
            .create(&inner)
            .map_err(|error| failed(&inner, error))?;
        if let Some((user, group)) = user {
            std::os::unix::fs::chown(&inner, Some(user), Some(group)).map_err(|error| {
                CaptureError::new(
                    CaptureErrorKind::Io,
                    inner.display(),
                    format!("giving it to QEMU's user {user}: {error}; vmkeep must run as root"),
                )
            })?;
        }
        Ok(socket)
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
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Whoever comes next must hear of a guest that nobody could thaw.
        if !self.path.join(FROZEN).exists() {
            // What stays is removed by the next `recover`.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
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

/// A folder that a dead agent left.
#[derive(Debug)]
pub(super) struct Dead {
    folder: Folder,
}

impl Dead {
    pub(super) fn path(&self) -> &Path {
        &self.folder.path
    }

    /// Whether the guest may be frozen still.
    pub(super) fn is_frozen(&self) -> bool {
        self.folder.path.join(FROZEN).exists()
    }

    pub(super) fn note_thawed(&self) {
        self.folder.note_thawed();
    }
}

/// The folders of dead agents in `parent`. Dropping them removes them.
pub(super) fn dead(parent: &Path, owner: &str) -> Result<Vec<Dead>, CaptureError> {
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(parent, error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| failed(parent, error))?;
        let path = entry.path();
        if !entry
            .file_name()
            .to_str()
            .is_some_and(|name| is_ours(name, owner))
        {
            continue;
        }
        if let Some(lock) = lock(&path).map_err(|error| failed(&path, error))? {
            found.push(Dead {
                folder: Folder { path, _lock: lock },
            });
        }
    }
    Ok(found)
}

fn is_ours(name: &str, owner: &str) -> bool {
    name.strip_prefix(PREFIX)
        .and_then(|rest| rest.strip_prefix(owner))
        .and_then(|rest| rest.strip_prefix('-'))
        .is_some_and(|suffix| {
            suffix.len() == 16 && suffix.bytes().all(|byte| byte.is_ascii_hexdigit())
        })
}

/// Whose a backup job is, by the place of its socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum JobOwner {
    /// An agent of ours that has died.
    Dead,
    /// Another agent of ours, at work.
    Alive,
    Foreign,
}

pub(super) fn owner_of(socket: &Path, parent: &Path, owner: &str) -> JobOwner {
    let folder = socket.parent().and_then(Path::parent);
    let ours = folder.is_some_and(|folder| {
        let name = folder.file_name().and_then(|name| name.to_str());
        folder.parent() == Some(parent) && name.is_some_and(|name| is_ours(name, owner))
    });
    match folder {
        // A folder that is gone has nobody in it.
        Some(folder) if ours => match (folder.exists(), lock(folder)) {
            (false, _) | (true, Ok(Some(_))) => JobOwner::Dead,
            (true, _) => JobOwner::Alive,
        },
        _ => JobOwner::Foreign,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_in_use_is_kept_and_a_dead_one_is_found_with_its_word() {
        let parent = tempfile::tempdir().unwrap();
        let alive = Folder::create(parent.path(), "ab", None).unwrap();
        for name in [
            "lv-ab-0123456789abcdef",
            "lv-abc-0123456789abcdef",
            "lv-ab-x",
        ] {
            fs::create_dir(parent.path().join(name)).unwrap();
        }
        let left = parent.path().join("lv-ab-0123456789abcdef");
        fs::write(left.join(FROZEN), "").unwrap();

        let found = dead(parent.path(), "ab").unwrap();
        assert_eq!(found.len(), 1);
        assert!(found[0].is_frozen());
        assert_eq!(found[0].path(), left);
        drop(found);
        assert!(left.exists(), "the word of a frozen guest is kept");
        let found = dead(parent.path(), "ab").unwrap();
        found[0].note_thawed();
        drop(found);

        assert!(!left.exists());
        assert!(alive.path().is_dir());
        assert!(parent.path().join("lv-abc-0123456789abcdef").is_dir());
        let path = alive.path().to_path_buf();
        drop(alive);
        assert!(!path.exists());
    }

    #[test]
    fn the_place_of_a_socket_tells_whose_a_job_is() {
        let parent = tempfile::tempdir().unwrap();
        let folder = Folder::create(parent.path(), "ab", None).unwrap();
        let socket = folder.socket_for(None).unwrap();
        assert_eq!(owner_of(&socket, parent.path(), "ab"), JobOwner::Alive);
        assert_eq!(owner_of(&socket, parent.path(), "a"), JobOwner::Foreign);
        drop(folder);
        assert_eq!(owner_of(&socket, parent.path(), "ab"), JobOwner::Dead);
        let other = Path::new("/var/other/lv-ab-0123456789abcdef/q/s");
        assert_eq!(owner_of(other, parent.path(), "ab"), JobOwner::Foreign);
    }

    #[test]
    fn a_folder_that_qemu_cannot_pass_through_is_refused_by_name() {
        let parent = tempfile::tempdir().unwrap();
        let inner = parent.path().join("run");
        fs::set_permissions(parent.path(), fs::Permissions::from_mode(0o700)).unwrap();
        let error = Folder::create(&inner, "ab", Some((64055, 64055))).unwrap_err();
        assert_eq!(error.kind, CaptureErrorKind::Invalid);
        assert!(
            error.name.ends_with(parent.path().to_str().unwrap()),
            "{error}"
        );
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_refused() {
        let parent = tempfile::tempdir().unwrap();
        let folder = Folder::create(&parent.path().join("x".repeat(90)), "ab", None).unwrap();
        assert!(folder.socket_for(None).is_err());
    }
}
