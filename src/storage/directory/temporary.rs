//! Files under construction. Their writer holds a lock on them for as long as it lives, which is
//! how a sweep tells what a dead writer left from what a living one is about to finish.

use super::beneath::Root;
use super::overwrite;
use crate::storage::{Leftover, StorageError, random_hex};
use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags, Stat, StatxFlags};
use rustix::io::{Errno, retry_on_intr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

pub(super) const FOLDER: &str = "tmp";

/// A locked, unfinished file. Dropped before it has landed, it is removed; a crash leaves it to
/// `sweep`.
#[derive(Debug)]
pub(super) struct Temporary {
    folder: OwnedFd,
    name: String,
    file: OwnedFd,
    named: bool,
}

/// A system call failed, or something that has put its failure into words already.
#[derive(Debug)]
pub(super) enum Failed {
    Call(Errno),
    Told(StorageError),
}

impl From<Errno> for Failed {
    fn from(error: Errno) -> Self {
        Failed::Call(error)
    }
}

impl From<StorageError> for Failed {
    fn from(error: StorageError) -> Self {
        Failed::Told(error)
    }
}

/// How this store makes a file durable, with what follows from a failure.
pub(super) type Sync<'a> = &'a dyn Fn(BorrowedFd<'_>) -> Result<(), StorageError>;

impl Temporary {
    pub fn create(root: &Root) -> Result<Self, Failed> {
        loop {
            let folder = root.open_or_make_folder(Path::new(FOLDER))?;
            let name = random_hex()?;
            let flags =
                OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mode = Mode::RUSR | Mode::WUSR;
            let file = match retry_on_intr(|| rustix::fs::openat(&folder, &name, flags, mode)) {
                Err(Errno::EXIST) => continue,
                opened => opened?,
            };
            let temporary = Temporary {
                folder,
                name,
                file,
                named: true,
            };
            // A sweep may have met the file before its lock; then it is the sweep's to remove, and
            // this writer takes another. Without locks a sweep could never be told from a writer,
            // so a file system without them is refused.
            match rustix::fs::flock(&temporary.file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if rustix::fs::fstat(&temporary.file)?.st_nlink > 0 => return Ok(temporary),
                Ok(()) | Err(Errno::WOULDBLOCK) => {}
                Err(Errno::NOLCK | Errno::NOSYS) => return Err(Errno::OPNOTSUPP.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether somebody removed the file under its writer, or took its name to do so.
    pub fn is_gone(&self) -> bool {
        match self.is_named(self.folder.as_fd(), &self.name) {
            Ok(is_named) => !is_named,
            // What a server says of a file, or of the folder, that another host removed.
            Err(error) => error == Errno::STALE,
        }
    }

    /// Gives the file its name if that is free: the step at which the object begins to exist.
    /// `ENOENT`: the folder was removed meanwhile, or the file is gone.
    pub fn land(&mut self, folder: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
        let flags = RenameFlags::NOREPLACE;
        match rustix::fs::renameat_with(&self.folder, &self.name, folder, name, flags) {
            Ok(()) => {
                self.named = false;
                Ok(())
            }
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => self.land_by_link(folder, name),
            Err(error) => Err(error),
        }
    }

    /// For file systems that cannot rename without replacing (NFS). A crash between link and
    /// unlink leaves the object with a second name among the temporary files; a sweep must then
    /// not overwrite it.
    fn land_by_link(&mut self, folder: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
        match rustix::fs::linkat(&self.folder, &self.name, folder, name, AtFlags::empty()) {
            Ok(()) => {}
            // A network file system repeats a call whose reply was lost, and then finds its own link.
            Err(Errno::EXIST) if self.is_named(folder, name)? => {}
            Err(Errno::PERM) => return Err(Errno::OPNOTSUPP),
            Err(error) => return Err(error),
        }
        self.give_up_own_name(folder, name)
    }

    /// The second step of landing by link. A sweep whose host does not see this lock takes the own
    /// name before it overwrites; NFS makes the link all the same, as it knows a file by its handle.
    /// So whoever finds the own name gone has not landed, and takes back what may be noise.
    fn give_up_own_name(&mut self, folder: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
        match rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty()) {
            Ok(()) => self.named = false,
            Err(Errno::NOENT) => {
                self.named = false;
                rustix::fs::unlinkat(folder, name, AtFlags::empty())?;
                return Err(Errno::NOENT);
            }
            // What cannot be removed now has no lock soon, and a sweep finds it.
            Err(_) => {}
        }
        Ok(())
    }

    fn is_named(&self, folder: BorrowedFd<'_>, name: &str) -> Result<bool, Errno> {
        let own = rustix::fs::fstat(&self.file)?;
        is_entry(folder, name.as_bytes(), &own)
    }

    fn remove(&mut self) {
        if self.named {
            // What cannot be removed now has no lock soon, and a sweep finds it.
            self.named = rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty()).is_err();
        }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Removes one entry of the temporary folder if no living writer holds it. `None`: it stays, or it
/// was gone.
pub(super) fn sweep(
    folder: BorrowedFd<'_>,
    name: &[u8],
    sync: Sync<'_>,
) -> Result<Option<Leftover>, Failed> {
    let seen = match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(None),
        seen => seen?,
    };
    match FileType::from_raw_mode(seen.st_mode) {
        FileType::RegularFile => {}
        // No writer makes folders here, and a folder's content is not ours to judge.
        FileType::Directory => return Ok(None),
        _ => return Ok(unlink(folder, name)?.then(|| leftover(name, &seen))),
    }
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match retry_on_intr(|| rustix::fs::openat(folder, name, flags, Mode::empty())) {
        Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => Ok(None),
        opened => remove_if_dead(folder, name, opened?, sync),
    }
}

fn remove_if_dead(
    folder: BorrowedFd<'_>,
    name: &[u8],
    file: OwnedFd,
    sync: Sync<'_>,
) -> Result<Option<Leftover>, Failed> {
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    // The lock is also free once the writer has *finished*: what was opened here as a temporary
    // file may be an object by now. Only what still has this name, under the lock, is a leftover.
    let own = rustix::fs::fstat(&file)?;
    if !is_entry(folder, name, &own)? {
        return Ok(None);
    }
    // Each host may have locks of its own (NFS with `local_lock`, virtiofs, sshfs), so that the
    // writer may live elsewhere. Once its name is gone it cannot land any more. What a crash leaves
    // under the new name, the next sweep finds like any other.
    let taken = random_hex()?;
    match rustix::fs::renameat(folder, name, folder, &taken) {
        Ok(()) => {}
        Err(Errno::NOENT) => return Ok(None),
        // To remove a name may need no room where another one does (btrfs, ZFS), and gives some back.
        Err(Errno::NOSPC | Errno::DQUOT) => {
            return Ok(unlink(folder, name)?.then(|| leftover(name, &own)));
        }
        Err(error) => return Err(error.into()),
    }
    if !is_entry(folder, taken.as_bytes(), &own)? {
        return Ok(None);
    }
    // A second name is an object that landed by link: this name goes, the bytes stay. So they do where
    // names are not counted (sshfs).
    if has_one_name(file.as_fd())? && counts_names(folder, &taken, file.as_fd())? {
        overwrite(file.as_fd(), &own)?;
        // Without it the noise would be forgotten with the name and never reach the medium.
        sync(file.as_fd())?;
    }
    Ok(unlink(folder, taken.as_bytes())?.then(|| leftover(name, &own)))
}

/// Whether the name stands for that very file.
fn is_entry(folder: BorrowedFd<'_>, name: &[u8], file: &Stat) -> Result<bool, Errno> {
    match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(now) => Ok(same_file(file, &now)),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Asked of the server: what a network file system remembers may be older than another host's link.
fn has_one_name(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
    match rustix::fs::statx(file, c"", flags, StatxFlags::NLINK) {
        Ok(told) => Ok(told.stx_nlink == 1),
        // Not every sandbox lets it through.
        Err(Errno::NOSYS) => Ok(rustix::fs::fstat(file)?.st_nlink == 1),
        Err(error) => Err(error),
    }
}

/// Whether a second name of the file would be counted. Where there can be none, no object has it.
fn counts_names(folder: BorrowedFd<'_>, name: &str, file: BorrowedFd<'_>) -> Result<bool, Failed> {
    let second = random_hex()?;
    if rustix::fs::linkat(folder, name, folder, &second, AtFlags::empty()).is_err() {
        return Ok(true);
    }
    let is_uncounted = has_one_name(file);
    unlink(folder, second.as_bytes())?;
    Ok(!is_uncounted?)
}

fn leftover(name: &[u8], stat: &Stat) -> Leftover {
    Leftover {
        place: format!("{FOLDER}/{}", name.escape_ascii()),
        size_bytes: u64::try_from(stat.st_size).unwrap_or(0),
    }
}

fn unlink(folder: BorrowedFd<'_>, name: &[u8]) -> Result<bool, Errno> {
    match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn same_file(one: &Stat, other: &Stat) -> bool {
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn landing_by_link_never_replaces_and_leaves_no_second_name() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = Root::open(folder.path()).expect("the root");
        let mut first = Temporary::create(&root).expect("a temporary file");
        let mut second = Temporary::create(&root).expect("a temporary file");
        rustix::io::write(first.file(), b"first").expect("written");
        rustix::io::write(second.file(), b"second").expect("written");

        assert_eq!(first.land_by_link(root.as_fd(), "object"), Ok(()));
        let refused = second.land_by_link(root.as_fd(), "object");
        assert_eq!(refused, Err(Errno::EXIST));
        drop((first, second));

        let object = fs::read(folder.path().join("object")).expect("the object");
        assert_eq!(object, b"first");
        let left = fs::read_dir(folder.path().join(FOLDER)).expect("the folder");
        assert_eq!(left.count(), 0);
    }

    #[test]
    fn a_link_that_the_server_made_before_its_reply_was_lost_counts_as_ours() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = Root::open(folder.path()).expect("the root");
        let mut file = Temporary::create(&root).expect("a temporary file");
        let temporary = folder.path().join(FOLDER).join(&file.name);
        fs::hard_link(temporary, folder.path().join("object")).expect("the server's link");
        assert_eq!(file.land_by_link(root.as_fd(), "object"), Ok(()));
    }

    #[test]
    fn a_link_to_a_file_whose_own_name_a_sweep_took_is_no_object() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = Root::open(folder.path()).expect("the root");
        let mut writer = Temporary::create(&root).expect("a temporary file");
        let below = folder.path().join(FOLDER);
        let object = folder.path().join("object");
        fs::rename(below.join(&writer.name), below.join("taken")).expect("taken");
        // As NFS does it by the file's handle.
        fs::hard_link(below.join("taken"), &object).expect("the server's link");
        let told = writer.give_up_own_name(root.as_fd(), "object");
        assert_eq!(told, Err(Errno::NOENT));
        assert!(writer.is_gone());
        assert!(!object.exists());
    }

    #[test]
    fn a_file_that_became_an_object_after_the_sweep_opened_it_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = Root::open(folder.path()).expect("the root");
        let mut writer = Temporary::create(&root).expect("a temporary file");
        rustix::io::write(writer.file(), b"precious").expect("written");
        let opened_by_the_sweep = fs::OpenOptions::new()
            .write(true)
            .open(folder.path().join(FOLDER).join(&writer.name))
            .expect("the file");
        let temporaries = root.open_folder(Path::new(FOLDER)).expect("the folder");
        let name = writer.name.clone().into_bytes();
        writer.land(root.as_fd(), "object").expect("landed");
        drop(writer);

        let swept = remove_if_dead(
            temporaries.as_fd(),
            &name,
            opened_by_the_sweep.into(),
            &|_| Ok(()),
        );
        assert!(matches!(swept, Ok(None)), "{swept:?}");
        let object = fs::read(folder.path().join("object")).expect("the object");
        assert_eq!(object, b"precious");
    }

    /// Two hosts whose locks do not meet: the writer holds none that this sweep could see.
    #[test]
    fn a_sweep_that_sees_no_lock_never_turns_an_object_into_noise() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = Root::open(folder.path()).expect("the root");
        let temporaries = root
            .open_or_make_folder(Path::new(FOLDER))
            .expect("the folder");
        let temporary = folder.path().join(FOLDER).join("0123");
        let object = folder.path().join("object");
        fs::write(&temporary, "precious").expect("a file");
        let swept = sweep(temporaries.as_fd(), b"0123", &|_| {
            // The writer lands in the midst of it.
            let _landed = fs::rename(&temporary, &object);
            Ok(())
        });
        assert!(matches!(swept, Ok(Some(_))), "{swept:?}");
        assert!(!object.exists(), "{:?}", fs::read(&object));
        let left = fs::read_dir(folder.path().join(FOLDER)).expect("the folder");
        assert_eq!(left.count(), 0);
    }

    #[test]
    fn a_writer_whose_name_was_taken_cannot_land_and_knows_why() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = Root::open(folder.path()).expect("the root");
        let mut writer = Temporary::create(&root).expect("a temporary file");
        assert!(!writer.is_gone());
        let below = folder.path().join(FOLDER);
        fs::rename(below.join(&writer.name), below.join("taken")).expect("taken");
        assert_eq!(writer.land(root.as_fd(), "object"), Err(Errno::NOENT));
        let told = writer.land_by_link(root.as_fd(), "object");
        assert_eq!(told, Err(Errno::NOENT));
        assert!(writer.is_gone());
        drop(writer);

        // As a sweep that died there left it.
        let temporaries = root.open_folder(Path::new(FOLDER)).expect("the folder");
        // A child that another test has just forked holds the lock until it is another program.
        let swept = std::iter::repeat_with(|| {
            std::thread::yield_now();
            sweep(temporaries.as_fd(), b"taken", &|_| Ok(())).expect("swept")
        });
        assert!(swept.take(100_000).any(|swept| swept.is_some()));
        assert!(!below.join("taken").exists());
    }
}
