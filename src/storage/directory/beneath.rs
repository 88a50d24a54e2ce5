//! Opening what lies below the root, and nothing else: no `..`, no absolute part, no symbolic link,
//! whoever put it there.

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::{Errno, Result, retry_on_intr};
use std::ffi::OsStr;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path};

pub(super) const FOLDER_MODE: Mode = Mode::RWXU;

#[derive(Debug)]
pub(super) struct Root {
    fd: OwnedFd,
}

impl Root {
    /// The way to the root is the administrator's and may contain symbolic links.
    pub fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty()))?;
        Ok(Root { fd })
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Opens an existing file or folder; the empty path is the root. `ELOOP` for a symbolic link
    /// in any part.
    pub fn open_beneath(&self, path: &Path, flags: OFlags) -> Result<OwnedFd> {
        let parts = parts(path)?;
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        if parts.is_empty() {
            return retry_on_intr(|| rustix::fs::openat(&self.fd, ".", flags, Mode::empty()));
        }
        match self.open_in_one_step(path, flags) {
            // Old kernels, and system call filters that know only older calls. "Not a directory"
            // may hide a symbolic link, which the slow way tells apart.
            Err(
                Errno::NOSYS
                | Errno::PERM
                | Errno::INVAL
                | Errno::TOOBIG
                | Errno::AGAIN
                | Errno::NOTDIR,
            ) => self.open_part_by_part(&parts, flags),
            answered => answered,
        }
    }

    pub fn open_folder(&self, path: &Path) -> Result<OwnedFd> {
        self.open_beneath(path, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// Opens the folder `path` and makes what is missing of it. `ENOENT`: somebody removed a part
    /// that was just there; ask again. A crash here leaves empty folders, which hold no data.
    pub fn open_or_make_folder(&self, path: &Path) -> Result<OwnedFd> {
        let mut folder = self.open_folder(Path::new(""))?;
        for part in parts(path)? {
            let next = match open_part(folder.as_fd(), part, OFlags::RDONLY | OFlags::DIRECTORY) {
                Err(Errno::NOENT) => {
                    match rustix::fs::mkdirat(&folder, part, FOLDER_MODE) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(error) => return Err(error),
                    }
                    open_part(folder.as_fd(), part, OFlags::RDONLY | OFlags::DIRECTORY)?
                }
                opened => opened?,
            };
            folder = next;
        }
        Ok(folder)
    }

    fn open_in_one_step(&self, path: &Path, flags: OFlags) -> Result<OwnedFd> {
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        retry_on_intr(|| rustix::fs::openat2(&self.fd, path, flags, Mode::empty(), resolve))
    }

    fn open_part_by_part(&self, parts: &[&OsStr], flags: OFlags) -> Result<OwnedFd> {
        let (last, before) = parts.split_last().ok_or(Errno::INVAL)?;
        let mut folder: Option<OwnedFd> = None;
        for part in before {
            let from = folder.as_ref().map_or(self.fd.as_fd(), AsFd::as_fd);
            folder = Some(open_part(from, part, OFlags::PATH | OFlags::DIRECTORY)?);
        }
        let from = folder.as_ref().map_or(self.fd.as_fd(), AsFd::as_fd);
        open_part(from, last, flags)
    }
}

fn open_part(folder: BorrowedFd<'_>, part: &OsStr, flags: OFlags) -> Result<OwnedFd> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = retry_on_intr(|| rustix::fs::openat(folder, part, flags, Mode::empty()));
    // Asked for a folder, the kernel calls a symbolic link "not a directory".
    if let Err(Errno::NOTDIR) = opened
        && let Ok(stat) = rustix::fs::statat(folder, part, AtFlags::SYMLINK_NOFOLLOW)
        && FileType::from_raw_mode(stat.st_mode) == FileType::Symlink
    {
        return Err(Errno::LOOP);
    }
    opened
}

fn parts(path: &Path) -> Result<Vec<&OsStr>> {
    path.components()
        .map(|component| match component {
            Component::Normal(part) => Ok(part),
            _ => Err(Errno::INVAL),
        })
        .collect()
}

/// The absolute path of the root, for people.
pub(super) fn absolute(path: &Path) -> String {
    fs::canonicalize(path)
        .or_else(|_| std::path::absolute(path))
        .unwrap_or_else(|_| path.to_path_buf())
        .display()
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    type Outcome = std::result::Result<(u64, u64), Errno>;

    fn which(opened: Result<OwnedFd>) -> Outcome {
        let stat = rustix::fs::fstat(opened?)?;
        Ok((stat.st_dev, stat.st_ino))
    }

    #[test]
    fn both_ways_of_opening_agree_and_neither_leaves_the_root() {
        let outside = tempfile::tempdir().expect("a folder");
        fs::write(outside.path().join("secret"), "x").expect("a file");
        let inside = outside.path().join("root");
        fs::create_dir_all(inside.join("a/b")).expect("folders");
        fs::write(inside.join("a/b/file"), "x").expect("a file");
        symlink("../secret", inside.join("link")).expect("a link");
        symlink(outside.path(), inside.join("a/out")).expect("a link");
        symlink("b", inside.join("a/within")).expect("a link");
        let root = Root::open(&inside).expect("the root");

        let expected = [
            ("a", Ok(())),
            ("a/b", Ok(())),
            ("a/b/file", Ok(())),
            ("a/missing", Err(Errno::NOENT)),
            ("a/b/file/below", Err(Errno::NOTDIR)),
            ("link", Err(Errno::LOOP)),
            ("a/out/secret", Err(Errno::LOOP)),
            ("a/within/file", Err(Errno::LOOP)),
        ];
        for (path, outcome) in expected {
            let path = Path::new(path);
            let parts = parts(path).expect("plain parts");
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let one_step = which(root.open_in_one_step(path, flags));
            let part_by_part = which(root.open_part_by_part(&parts, flags));
            assert_eq!(one_step, part_by_part, "{path:?}");
            assert_eq!(one_step.map(|_| ()), outcome, "{path:?}");
            assert_eq!(which(root.open_beneath(path, flags)), part_by_part);
        }
        let as_a_folder = which(root.open_folder(Path::new("a/out")));
        assert_eq!(as_a_folder, Err(Errno::LOOP));
        for path in ["..", "../secret", "a/../../secret", "/etc"] {
            let opened = which(root.open_beneath(Path::new(path), OFlags::RDONLY));
            assert_eq!(opened, Err(Errno::INVAL), "{path:?}");
            let made = which(root.open_or_make_folder(Path::new(path)));
            assert_eq!(made, Err(Errno::INVAL), "{path:?}");
        }
        let made = which(root.open_or_make_folder(Path::new("a/out/new")));
        assert_eq!(made, Err(Errno::LOOP));
        assert!(!outside.path().join("new").exists());
    }
}
