//! A store in a local directory.
//!
//! Objects are files at `<root>/<name>`, `<root>/tmp` holds what is being written, `<root>/reserve`
//! sets space aside. The order that makes an object durable before anyone relies on it: write the
//! temporary file, fsync it, rename it without replacing, fsync its folder; the folders above were
//! fsynced before the rename. Everything resolves from one open descriptor of the root.

mod beneath;
mod open_file;
mod reserve;
mod temporary;

use super::{
    Leftover, Listed, OpenObject, Part, ReadAgain, Storage, StorageError, StorageErrorKind, Survey,
    checked_prefix, fill_random, is_own_name, name_from_outside, refuse_own_names, too_large,
    too_short,
};
use crate::model::ObjectName;
use beneath::{FOLDER_MODE, Root};
use bytes::Bytes;
use open_file::OpenFile;
use rustix::buffer::spare_capacity;
use rustix::fs::{Advice, AtFlags, Dir, DirEntry, FileType, OFlags, Stat};
use rustix::io::{Errno, retry_on_intr};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use temporary::{Failed, Temporary};

/// One open store; share it in an `Arc`. Several handles and several processes may use the same
/// directory at once.
///
/// After a failed fsync nothing this handle wrote can be trusted any more, and a repeated fsync
/// would lie: every later change through it fails.
#[derive(Debug)]
pub struct Directory {
    root: Root,
    location: String,
    /// Folders whose way up to the root is known to survive a power cut. The open descriptor keeps
    /// the inode number from being given to another folder, so equal numbers mean the same folder.
    durable: Mutex<HashMap<PathBuf, OwnedFd>>,
    dead: AtomicBool,
    sync: fn(BorrowedFd<'_>) -> rustix::io::Result<()>,
}

/// Each is one open descriptor.
const DURABLE_FOLDERS: usize = 64;
/// A folder can vanish between being opened and being used only if somebody deletes its last
/// object just then; this many times in a row it is no coincidence.
const FOLDER_ATTEMPTS: u32 = 10_000;

impl Directory {
    /// Makes the root (its parent must exist) unless it is there, and sets `reserve_bytes` aside.
    /// Can be repeated; a crash leaves what a repetition completes.
    pub fn init(path: &Path, reserve_bytes: u64) -> Result<Self, StorageError> {
        let made = match rustix::fs::mkdir(path, FOLDER_MODE) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(Errno::NOENT) => {
                return Err(StorageError::new(
                    StorageErrorKind::NotFound,
                    path.display(),
                    "the folder above does not exist; is the disk mounted?",
                ));
            }
            Err(error) => return Err(told(path.display(), "making the root", error)),
        };
        let directory = Self::open(path)?;
        if made {
            let above = match path.parent() {
                Some(parent) if parent != Path::new("") => parent,
                _ => Path::new("."),
            };
            Root::open(above)
                .and_then(|above| (directory.sync)(above.as_fd()))
                .map_err(|error| told(path.display(), "keeping the root", error))?;
        }
        let root = &directory.root;
        root.open_or_make_folder(Path::new(temporary::FOLDER))
            .and_then(|folder| (directory.sync)(folder.as_fd()))
            .map_err(|error| told(path.display(), "making the folder `tmp`", error))?;
        reserve::set(root, reserve_bytes)
            .map_err(|error| told(path.display(), "setting the reserve aside", error))?;
        (directory.sync)(root.as_fd())
            .map_err(|error| told(path.display(), "keeping the root", error))?;
        Ok(directory)
    }

    pub fn open(path: &Path) -> Result<Self, StorageError> {
        let root = Root::open(path).map_err(|error| match error {
            Errno::NOENT => StorageError::new(
                StorageErrorKind::NotFound,
                path.display(),
                "no such folder; is the disk mounted, and was the store initialised?",
            ),
            Errno::NOTDIR => StorageError::new(
                StorageErrorKind::Unsupported,
                path.display(),
                "the root of a store must be a folder",
            ),
            error => told(path.display(), "opening the root", error),
        })?;
        Ok(Directory {
            root,
            location: beneath::absolute(path),
            durable: Mutex::default(),
            dead: AtomicBool::new(false),
            sync: |file| retry_on_intr(|| rustix::fs::fsync(file)),
        })
    }

    /// Opens the file of an object; anything else under its name is not one.
    fn open_object(
        &self,
        name: &ObjectName,
        flags: OFlags,
    ) -> Result<(OwnedFd, Stat), StorageError> {
        refuse_own_names(name)?;
        // A FIFO planted under the name must not make us wait; looking without opening never does.
        let flags = match flags.contains(OFlags::PATH) {
            true => flags,
            false => flags | OFlags::NONBLOCK,
        };
        let file = self
            .root
            .open_beneath(Path::new(name.as_str()), flags)
            .map_err(|error| match error {
                Errno::NOTDIR | Errno::ISDIR => told(name, "opening", Errno::NOENT),
                // What the kernel says of a FIFO or socket.
                Errno::NXIO => not_a_file(name),
                error => unread(name, "opening", error),
            })?;
        let stat = rustix::fs::fstat(&file).map_err(|error| unread(name, "examining", error))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok((file, stat)),
            FileType::Directory => Err(told(name, "opening", Errno::NOENT)),
            _ => Err(not_a_file(name)),
        }
    }

    fn refuse_if_dead(&self, name: &dyn fmt::Display) -> Result<(), StorageError> {
        match self.dead.load(Ordering::Acquire) {
            true => Err(StorageError::new(
                StorageErrorKind::Transient,
                name,
                "an fsync failed earlier, so this process can no longer write here safely; \
                 check the disk and start anew",
            )),
            false => Ok(()),
        }
    }

    /// The way to durability here: a failure ends all writing through this handle, and so does
    /// one that another thread met meanwhile, because the system reports it only once.
    fn sync(&self, file: BorrowedFd<'_>, name: &dyn fmt::Display) -> Result<(), StorageError> {
        match (self.sync)(file) {
            Ok(()) => self.refuse_if_dead(name),
            Err(error) => Err(self.die(name, error)),
        }
    }

    /// As `sync`, of noise over what nobody wants any more. A file system that finds no room for the
    /// noise would not have overwritten the bytes anyway, and nothing else is in doubt.
    fn sync_noise(
        &self,
        file: BorrowedFd<'_>,
        name: &dyn fmt::Display,
    ) -> Result<(), StorageError> {
        match (self.sync)(file) {
            Ok(()) | Err(Errno::NOSPC | Errno::DQUOT) => self.refuse_if_dead(name),
            Err(error) => Err(self.die(name, error)),
        }
    }

    fn die(&self, name: &dyn fmt::Display, error: Errno) -> StorageError {
        self.dead.store(true, Ordering::Release);
        StorageError::new(
            StorageErrorKind::Transient,
            name,
            format!("fsync: {error}; nothing this process wrote here is certain any more"),
        )
    }

    fn durable(&self) -> MutexGuard<'_, HashMap<PathBuf, OwnedFd>> {
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fsyncs the folders above `folder` (not itself) unless that was done for this very folder. It
    /// is not enough to do so for folders made here: another process may have made one and died
    /// before its fsync.
    fn make_way_durable(
        &self,
        path: &Path,
        folder: &OwnedFd,
        name: &ObjectName,
    ) -> Result<(), Step> {
        let identity = rustix::fs::fstat(folder).map(|stat| (stat.st_dev, stat.st_ino))?;
        if let Some(known) = self.durable().get(path)
            && rustix::fs::fstat(known).map(|stat| (stat.st_dev, stat.st_ino)) == Ok(identity)
        {
            return Ok(());
        }
        for above in path.ancestors().skip(1) {
            let above = self.root.open_folder(above)?;
            self.sync(above.as_fd(), name)?;
        }
        if path != Path::new("") {
            let kept = folder.try_clone().map_err(|_| Errno::MFILE)?;
            let mut durable = self.durable();
            if durable.len() >= DURABLE_FOLDERS {
                durable.clear();
            }
            durable.insert(path.to_path_buf(), kept);
        }
        Ok(())
    }

    /// `AlreadyExists` if the name is taken. Whoever hears that will rely on the object, so it is
    /// made durable first: its writer may have died before its last fsync.
    fn refuse_if_taken(&self, place: &Place<'_>) -> Result<(), Step> {
        let folder = match self.root.open_folder(place.folder) {
            Err(Errno::NOENT) => return Ok(()),
            opened => opened?,
        };
        match rustix::fs::statat(&folder, place.leaf, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(()),
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => {
                return Err(Step::Failed(StorageError::new(
                    StorageErrorKind::Unsupported,
                    place.name,
                    "a folder has this name",
                )));
            }
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        self.make_way_durable(place.folder, &folder, place.name)?;
        self.sync(folder.as_fd(), place.name)?;
        Err(Step::Failed(StorageError::new(
            StorageErrorKind::AlreadyExists,
            place.name,
            "the name is taken",
        )))
    }

    /// One attempt to give a finished file its name. `Step::Again`: its folder was removed.
    fn land(&self, place: &Place<'_>, temporary: &mut Temporary) -> Result<(), Step> {
        let folder = self.root.open_or_make_folder(place.folder)?;
        self.make_way_durable(place.folder, &folder, place.name)?;
        match temporary.land(folder.as_fd(), place.leaf) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                self.refuse_if_taken(place)?;
                // Taken a moment ago and free now: deleted in between.
                return Err(Step::Again);
            }
            Err(error) => return Err(error.into()),
        }
        // A crash or failure here leaves an object that stands or does not: `Transient`.
        self.sync(folder.as_fd(), place.name)?;
        Ok(())
    }

    /// Repeats what races with others making and removing folders.
    fn repeat(
        &self,
        name: &ObjectName,
        mut attempt: impl FnMut() -> Result<(), Step>,
    ) -> Result<(), StorageError> {
        for _ in 0..FOLDER_ATTEMPTS {
            match attempt() {
                Ok(()) => return Ok(()),
                Err(Step::Again) => {}
                Err(Step::Failed(error)) => return Err(error),
                Err(Step::Call(error)) => return Err(told(name, "naming the file", error)),
            }
        }
        Err(StorageError::new(
            StorageErrorKind::Transient,
            name,
            "its folder was removed again and again",
        ))
    }

    fn remove(&self, name: &ObjectName) -> Result<(), StorageError> {
        let place = Place::of(name);
        let folder = match self.root.open_folder(place.folder) {
            Ok(folder) => folder,
            Err(Errno::NOENT | Errno::NOTDIR) => return self.make_absence_durable(&place),
            Err(error) => return Err(told(name, "opening its folder", error)),
        };
        match rustix::fs::unlinkat(&folder, place.leaf, AtFlags::empty()) {
            // Already gone may mean that somebody unlinked it and died before the fsync.
            Ok(()) | Err(Errno::NOENT | Errno::ISDIR) => {}
            Err(error) => return Err(told(name, "removing", error)),
        }
        self.sync(folder.as_fd(), name)?;
        self.remove_empty_folders(place.folder);
        Ok(())
    }

    /// Fsyncs the nearest folder that is still there, whose entry for the next one is gone.
    fn make_absence_durable(&self, place: &Place<'_>) -> Result<(), StorageError> {
        for above in place.folder.ancestors() {
            match self.root.open_folder(above) {
                Ok(folder) => return self.sync(folder.as_fd(), place.name),
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                Err(error) => return Err(told(place.name, "opening its folder", error)),
            }
        }
        Ok(())
    }

    /// Best effort, and never the first level. Empty folders hold no data; whoever is about to
    /// create an object there makes the folder again.
    fn remove_empty_folders(&self, path: &Path) {
        for folder in path.ancestors() {
            let (Some(above), Some(leaf)) = (folder.parent(), folder.file_name()) else {
                return;
            };
            if above == Path::new("") {
                return;
            }
            let removed = self
                .root
                .open_folder(above)
                .and_then(|above| rustix::fs::unlinkat(&above, leaf, AtFlags::REMOVEDIR));
            if removed.is_err() {
                return;
            }
            self.durable().remove(folder);
        }
    }

    /// Walks everything below `start`. With `Wanted::Objects` only folders that can hold objects
    /// are entered; with `Wanted::All` all of them.
    fn walk(&self, start: &Path, wanted: Wanted<'_>) -> Result<Survey, StorageError> {
        let mut survey = Survey::default();
        let mut folders = vec![start.to_path_buf()];
        while let Some(path) = folders.pop() {
            let entries = match self.root.open_folder(&path).and_then(Dir::new) {
                Ok(entries) => entries,
                // Others delete while we list.
                Err(Errno::NOENT | Errno::NOTDIR) => continue,
                Err(Errno::ACCESS) if !can_hold_objects(&path) => {
                    // What nobody may look into is not proven to be empty.
                    survey.leftovers.push(Leftover {
                        place: format!("{} (cannot be read)", shown(&path)),
                        size_bytes: 0,
                    });
                    continue;
                }
                Err(error) => return Err(told(shown(&path), "listing", error)),
            };
            self.walk_folder(&path, entries, wanted, &mut folders, &mut survey)?;
        }
        survey.objects.sort_unstable();
        survey.leftovers.sort_unstable();
        Ok(survey)
    }

    fn walk_folder(
        &self,
        path: &Path,
        mut entries: Dir,
        wanted: Wanted<'_>,
        folders: &mut Vec<PathBuf>,
        survey: &mut Survey,
    ) -> Result<(), StorageError> {
        let listing = |error| told(shown(path), "listing", error);
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(listing)?;
            let leaf = entry.file_name();
            if matches!(leaf.to_bytes(), b"." | b"..") {
                continue;
            }
            let below = path.join(OsStr::from_bytes(leaf.to_bytes()));
            // Not every file system tells the kind in a listing.
            let kind = match entry.file_type() {
                FileType::Unknown => None,
                kind => Some(kind),
            };
            if kind == Some(FileType::Directory) {
                if wanted.enters(&below) {
                    folders.push(below);
                }
                continue;
            }
            let folder = entries.fd().map_err(listing)?;
            let stat = match rustix::fs::statat(folder, leaf, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => continue,
                stat => stat.map_err(listing)?,
            };
            let size_bytes = u64::try_from(stat.st_size).unwrap_or(0);
            let regular = match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => {
                    if wanted.enters(&below) {
                        folders.push(below);
                    }
                    continue;
                }
                kind => kind == FileType::RegularFile,
            };
            match object_name(&below) {
                Some(name) if regular => survey.objects.push(Listed { name, size_bytes }),
                _ if regular && below == Path::new(reserve::NAME) => {}
                _ => survey.leftovers.push(Leftover {
                    place: shown(&below),
                    size_bytes,
                }),
            }
        }
        Ok(())
    }
}

impl Directory {
    /// What stands right in a folder.
    fn parts_in(&self, path: &Path) -> Result<Vec<Part>, StorageError> {
        let listing = |error| told(shown(path), "listing", error);
        let entries = match self.root.open_folder(path).and_then(Dir::new) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(Vec::new()),
            entries => entries.map_err(listing)?,
        };
        let mut parts = Vec::new();
        for entry in entries {
            let entry = entry.map_err(listing)?;
            let leaf = entry.file_name().to_bytes();
            if matches!(leaf, b"." | b"..") {
                continue;
            }
            let below = path.join(OsStr::from_bytes(leaf));
            if below.to_str().is_some_and(is_own_name) {
                continue;
            }
            let is_prefix = self.is_folder(&entry, &below);
            if !is_prefix || self.holds_a_file(&below)? {
                parts.push(Part {
                    name: leaf.escape_ascii().to_string(),
                    is_prefix,
                });
            }
        }
        parts.sort_unstable();
        Ok(parts)
    }

    /// Looks no further than the first. What nobody may look into is not proven to hold none.
    fn holds_a_file(&self, start: &Path) -> Result<bool, StorageError> {
        let mut folders = vec![start.to_path_buf()];
        while let Some(path) = folders.pop() {
            let listing = |error| told(shown(&path), "listing", error);
            let entries = match self.root.open_folder(&path).and_then(Dir::new) {
                Err(Errno::NOENT | Errno::NOTDIR) => continue,
                Err(Errno::ACCESS) => return Ok(true),
                entries => entries.map_err(listing)?,
            };
            for entry in entries {
                let entry = entry.map_err(listing)?;
                let leaf = entry.file_name().to_bytes();
                if matches!(leaf, b"." | b"..") {
                    continue;
                }
                let below = path.join(OsStr::from_bytes(leaf));
                if !self.is_folder(&entry, &below) {
                    return Ok(true);
                }
                folders.push(below);
            }
        }
        Ok(false)
    }

    /// Not every file system tells the kind in a listing.
    fn is_folder(&self, entry: &DirEntry, path: &Path) -> bool {
        match entry.file_type() {
            FileType::Unknown => self.root.open_folder(path).is_ok(),
            kind => kind == FileType::Directory,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted<'p> {
    Objects,
    All,
    /// What stands outside of the folder in which a prefix and others like it are.
    Beside(&'p ObjectName),
}

impl Wanted<'_> {
    fn enters(self, folder: &Path) -> bool {
        match self {
            Wanted::Objects => can_hold_objects(folder),
            Wanted::All => true,
            Wanted::Beside(prefix) => {
                let first = prefix.as_str().split('/').next().unwrap_or_default();
                folder != Path::new(first)
            }
        }
    }
}

/// Why an attempt to reach into a folder did not succeed.
#[derive(Debug)]
enum Step {
    /// The folder was removed meanwhile.
    Again,
    Call(Errno),
    Failed(StorageError),
}

impl From<Errno> for Step {
    fn from(error: Errno) -> Self {
        match error {
            Errno::NOENT | Errno::STALE => Step::Again,
            error => Step::Call(error),
        }
    }
}

impl From<StorageError> for Step {
    fn from(error: StorageError) -> Self {
        Step::Failed(error)
    }
}

/// An object's name, split into folder and file.
#[derive(Debug)]
struct Place<'a> {
    name: &'a ObjectName,
    folder: &'a Path,
    leaf: &'a str,
}

impl<'a> Place<'a> {
    fn of(name: &'a ObjectName) -> Self {
        let (folder, leaf) = name
            .as_str()
            .rsplit_once('/')
            .unwrap_or(("", name.as_str()));
        Place {
            name,
            folder: Path::new(folder),
            leaf,
        }
    }
}

impl Directory {
    fn make(
        &self,
        name: &ObjectName,
        data: &[u8],
        read_again: ReadAgain,
    ) -> Result<(), StorageError> {
        refuse_own_names(name)?;
        self.refuse_if_dead(name)?;
        let place = Place::of(name);
        // Asked before anything is written, so that a repeated creation is answered on a full or
        // read-only store too.
        match self.refuse_if_taken(&place) {
            Ok(()) | Err(Step::Again) => {}
            Err(Step::Failed(error)) => return Err(error),
            Err(Step::Call(error)) => return Err(told(name, "looking for the name", error)),
        }
        let mut temporary = Temporary::create(&self.root).map_err(|failed| match failed {
            Failed::Call(error) => told(name, "making a temporary file", error),
            Failed::Told(error) => error,
        })?;
        write_all(temporary.file(), data).map_err(|error| told(name, "writing", error))?;
        match (self.sync)(temporary.file()) {
            Ok(()) => {}
            // Some file systems find out only now. The file is dropped, nothing else is in doubt.
            Err(error @ (Errno::NOSPC | Errno::DQUOT)) => {
                return Err(told(name, "fsync", error));
            }
            // Another host removed it: no more than this file is lost.
            Err(Errno::STALE) if temporary.is_gone() => return Err(removed_by_others(name)),
            Err(error) => return Err(self.die(name, error)),
        }
        if read_again == ReadAgain::Late {
            // Its pages serve the next object, instead of others that are taken from the guests of this host.
            // After the fsync, as dirty ones stay. Advice: what it does not do costs memory only.
            let _ = rustix::fs::fadvise(temporary.file(), 0, None, Advice::DontNeed);
        }
        let landed = self.repeat(name, || match self.land(&place, &mut temporary) {
            Err(Step::Again) if temporary.is_gone() => Err(Step::Failed(removed_by_others(name))),
            told => told,
        });
        if landed.is_err() {
            self.remove_empty_folders(place.folder);
        }
        landed
    }
}

impl Storage for Directory {
    fn create(&self, name: &ObjectName, data: &[u8]) -> Result<(), StorageError> {
        self.make(name, data, ReadAgain::Soon)
    }

    fn create_large(
        &self,
        name: &ObjectName,
        data: &Bytes,
        read_again: ReadAgain,
    ) -> Result<(), StorageError> {
        self.make(name, data, read_again)
    }

    fn read(&self, name: &ObjectName, max_bytes: u64) -> Result<Vec<u8>, StorageError> {
        let (file, stat) = self.open_object(name, OFlags::RDONLY)?;
        let size_bytes = u64::try_from(stat.st_size).unwrap_or(0);
        if size_bytes > max_bytes {
            return Err(too_large(name, size_bytes, max_bytes));
        }
        let no_memory = |_| told(name, "reading", Errno::NOMEM);
        let length =
            usize::try_from(size_bytes).map_err(|_| told(name, "reading", Errno::NOMEM))?;
        let mut data = Vec::new();
        data.try_reserve_exact(length).map_err(no_memory)?;
        while data.len() < length {
            let at = data.len() as u64;
            match retry_on_intr(|| rustix::io::pread(&file, spare_capacity(&mut data), at)) {
                Ok(0) => return Err(too_short(name, at, size_bytes)),
                Ok(_) => {}
                Err(error) => return Err(unread(name, "reading", error)),
            }
        }
        // The allocator may give more room than asked for, and a file may grow while it is read.
        data.truncate(length);
        Ok(data)
    }

    fn read_range(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StorageError> {
        OpenFile::new(name, self.open_object(name, OFlags::RDONLY)?).read_at(offset, buffer)
    }

    fn open(&self, name: &ObjectName, max_bytes: u64) -> Result<Box<dyn OpenObject>, StorageError> {
        let file = OpenFile::new(name, self.open_object(name, OFlags::RDONLY)?);
        match file.size_bytes() > max_bytes {
            true => Err(too_large(name, file.size_bytes(), max_bytes)),
            false => Ok(Box::new(file)),
        }
    }

    fn size_bytes(&self, name: &ObjectName) -> Result<u64, StorageError> {
        let (_, stat) = self.open_object(name, OFlags::PATH)?;
        Ok(u64::try_from(stat.st_size).unwrap_or(0))
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>, StorageError> {
        let prefix = checked_prefix(prefix)?;
        let prefix = prefix.as_ref().map_or("", ObjectName::as_str);
        if is_own_name(prefix) {
            return Ok(Vec::new());
        }
        Ok(self.walk(Path::new(prefix), Wanted::Objects)?.objects)
    }

    fn parts(&self, prefix: &str) -> Result<Vec<Part>, StorageError> {
        let prefix = checked_prefix(prefix)?;
        self.parts_in(Path::new(prefix.as_ref().map_or("", ObjectName::as_str)))
    }

    fn delete(&self, name: &ObjectName) -> Result<(), StorageError> {
        refuse_own_names(name)?;
        self.refuse_if_dead(name)?;
        self.remove(name)
    }

    /// If the overwriting fails for want of space (copy-on-write media), the object is still
    /// removed; if the disk fails, it stays, and the caller decides whether to `delete` instead.
    /// A crash in between leaves noise under the name, and the call can be repeated.
    fn destroy(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.refuse_if_dead(name)?;
        let (file, stat) = match self.open_object(name, OFlags::WRONLY) {
            Ok(opened) => opened,
            Err(error) if error.kind == StorageErrorKind::NotFound => return self.remove(name),
            Err(error) => return Err(error),
        };
        overwrite(file.as_fd(), &stat).map_err(|failed| match failed {
            Failed::Call(error) => told(name, "overwriting", error),
            Failed::Told(error) => error,
        })?;
        match (self.sync)(file.as_fd()) {
            Ok(()) | Err(Errno::NOSPC | Errno::DQUOT) => self.remove(name),
            Err(error) => Err(self.die(name, error)),
        }
    }

    /// Temporary files stand outside of any prefix: whose they are is not known.
    fn sweep_leftovers(&self, _prefix: &str) -> Result<Vec<Leftover>, StorageError> {
        let place = temporary::FOLDER;
        self.refuse_if_dead(&place)?;
        let listing = |error| told(place, "listing", error);
        let folder = match self.root.open_folder(Path::new(place)) {
            Err(Errno::NOENT) => return Ok(Vec::new()),
            opened => opened.map_err(listing)?,
        };
        let mut swept = Vec::new();
        let mut first_failure = None;
        // Listed before any of them is renamed: a listing under way may tell of the new names too.
        let mut leaves = Vec::new();
        for entry in Dir::read_from(&folder).map_err(listing)? {
            leaves.push(entry.map_err(listing)?.file_name().to_owned());
        }
        for leaf in &leaves {
            let leaf = leaf.to_bytes();
            if matches!(leaf, b"." | b"..") {
                continue;
            }
            let sync = |file: BorrowedFd<'_>| self.sync_noise(file, &place);
            match temporary::sweep(folder.as_fd(), leaf, &sync) {
                Ok(removed) => swept.extend(removed),
                // One that resists does not shield the others.
                Err(failed) => {
                    first_failure.get_or_insert(match failed {
                        Failed::Call(error) => told(
                            format!("{place}/{}", leaf.escape_ascii()),
                            "removing",
                            error,
                        ),
                        Failed::Told(error) => error,
                    });
                }
            }
        }
        if !swept.is_empty() {
            self.sync(folder.as_fd(), &place)?;
        }
        swept.sort_unstable();
        match first_failure {
            Some(error) => Err(error),
            None => Ok(swept),
        }
    }

    fn survey(&self, prefix: &str) -> Result<Survey, StorageError> {
        let Some(prefix) = checked_prefix(prefix)? else {
            return self.walk(Path::new(""), Wanted::All);
        };
        // In this order: a temporary file that lands between the two is an object in the second.
        let beside = self.walk(Path::new(""), Wanted::Beside(&prefix))?;
        let mut survey = self.walk(Path::new(prefix.as_str()), Wanted::All)?;
        survey.leftovers.extend(beside.leftovers);
        Ok(survey)
    }

    fn free_bytes(&self) -> Option<u64> {
        let stat = rustix::fs::fstatvfs(self.root.as_fd()).ok()?;
        stat.f_bavail.checked_mul(stat.f_frsize)
    }

    fn release_reserve(&self) -> Result<bool, StorageError> {
        reserve::release(&self.root)
            .map_err(|error| told(reserve::NAME, "giving its space back", error))
    }

    fn restore_reserve(&self) -> Result<bool, StorageError> {
        reserve::restore(&self.root)
            .map_err(|error| told(reserve::NAME, "setting its space aside", error))
    }

    fn location(&self) -> String {
        self.location.clone()
    }
}

fn write_all(file: BorrowedFd<'_>, data: &[u8]) -> Result<(), Errno> {
    let mut rest = data;
    while !rest.is_empty() {
        let done = retry_on_intr(|| rustix::io::write(file, rest))?;
        rest = rest.get(done..).filter(|_| done > 0).ok_or(Errno::IO)?;
    }
    Ok(())
}

/// Writes noise over the whole file, in place where the file system writes in place. Noise and not
/// zeros, because storage below may keep zeros by merely forgetting where they were. No room to do
/// so is no failure: such a file system would not have overwritten the bytes anyway.
fn overwrite(file: BorrowedFd<'_>, stat: &Stat) -> Result<(), Failed> {
    let size_bytes = u64::try_from(stat.st_size).unwrap_or(0);
    let mut noise = [0u8; 64 * 1024];
    fill_random(&mut noise)?;
    let mut at = 0;
    while at < size_bytes {
        let wanted = usize::try_from(size_bytes - at).map_or(noise.len(), |n| n.min(noise.len()));
        let bytes = noise.get(..wanted).unwrap_or(&noise);
        match retry_on_intr(|| rustix::io::pwrite(file, bytes, at)) {
            Ok(0) => return Err(Errno::IO.into()),
            Ok(done) => at += done as u64,
            Err(Errno::NOSPC | Errno::DQUOT) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn object_name(path: &Path) -> Option<ObjectName> {
    path.to_str()
        .filter(|name| !is_own_name(name))
        .and_then(name_from_outside)
}

fn can_hold_objects(folder: &Path) -> bool {
    folder == Path::new("") || object_name(folder).is_some()
}

/// Names come from whoever can write to the disk and end on terminals and in certificates.
fn shown(path: &Path) -> String {
    path.as_os_str().as_bytes().escape_ascii().to_string()
}

fn not_a_file(name: &ObjectName) -> StorageError {
    StorageError::new(
        StorageErrorKind::Corrupt,
        name,
        "what has this name is not a regular file",
    )
}

fn removed_by_others(name: &ObjectName) -> StorageError {
    StorageError::new(
        StorageErrorKind::Transient,
        name,
        "somebody removed its temporary file",
    )
}

/// As [`told`], of reading an object: that the medium does not give its bytes, or that the file system refuses them by a
/// checksum of its own, says nothing of the other objects.
fn unread(name: impl fmt::Display, doing: &str, error: Errno) -> StorageError {
    match error {
        Errno::IO | Errno::UCLEAN | Errno::BADMSG => StorageError::new(
            StorageErrorKind::Unreadable,
            name,
            format!("{doing}: {error}"),
        ),
        error => told(name, doing, error),
    }
}

/// What a failed system call means for the caller's decision.
fn told(name: impl fmt::Display, doing: &str, error: Errno) -> StorageError {
    let kind = match error {
        Errno::NOENT => StorageErrorKind::NotFound,
        Errno::NOSPC | Errno::DQUOT => StorageErrorKind::Full,
        Errno::ROFS | Errno::ACCESS | Errno::PERM => StorageErrorKind::Denied,
        // A symbolic link: the store makes none.
        Errno::LOOP => StorageErrorKind::Corrupt,
        Errno::NOTDIR
        | Errno::NAMETOOLONG
        | Errno::XDEV
        | Errno::INVAL
        | Errno::NOSYS
        | Errno::OPNOTSUPP
        | Errno::NOTTY
        | Errno::FBIG => StorageErrorKind::Unsupported,
        // The rest may pass or has an unknown outcome: a failing disk or network, no memory, no
        // descriptors.
        _ => StorageErrorKind::Transient,
    };
    StorageError::new(kind, name, format!("{doing}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::ReadWriteFlags;
    use std::fs;
    use std::io::IoSliceMut;
    use std::os::fd::AsRawFd;
    use std::sync::atomic::AtomicU32;

    fn name(name: &str) -> ObjectName {
        ObjectName::new(name).expect("a valid name")
    }

    fn store() -> (tempfile::TempDir, Directory) {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Directory::init(folder.path(), 0).expect("a store");
        (folder, store)
    }

    fn is_folder(file: BorrowedFd<'_>) -> bool {
        rustix::fs::fstat(file)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
    }

    fn kind_of<T: fmt::Debug>(told: Result<T, StorageError>) -> StorageErrorKind {
        told.expect_err("a failure").kind
    }

    #[test]
    fn after_a_failed_fsync_of_the_file_nothing_is_created_and_nothing_more_is_written() {
        let (folder, mut store) = store();
        store.create(&name("old"), b"old").expect("created");
        store.sync = |file| match is_folder(file) {
            true => Ok(()),
            false => Err(Errno::IO),
        };
        let told = store.create(&name("a/b"), b"data");
        assert_eq!(kind_of(told), StorageErrorKind::Transient);
        // The next fsync would succeed, as the kernel's does after it reported an error once.
        store.sync = |_| Ok(());
        let told = store.create(&name("a/c"), b"data");
        assert_eq!(kind_of(told), StorageErrorKind::Transient);
        let told = store.delete(&name("old"));
        assert_eq!(kind_of(told), StorageErrorKind::Transient);
        let told = store.destroy(&name("old"));
        assert_eq!(kind_of(told), StorageErrorKind::Transient);

        let after = Directory::open(folder.path()).expect("a store");
        let names: Vec<_> = after.list("").expect("a listing");
        assert_eq!(names.len(), 1);
        assert_eq!(after.read(&name("old"), 10).expect("old"), b"old");
        assert_eq!(after.leftovers(""), Ok(Vec::new()));
    }

    #[test]
    fn after_a_failed_fsync_of_the_folder_the_outcome_is_unknown_and_a_retry_elsewhere_tells() {
        let (folder, mut store) = store();
        store.sync = |file| match is_folder(file) {
            true => Err(Errno::IO),
            false => Ok(()),
        };
        let told = store.create(&name("entry"), b"data");
        assert_eq!(kind_of(told), StorageErrorKind::Transient);

        let again = Directory::open(folder.path()).expect("a store");
        let told = again.create(&name("entry"), b"data");
        assert_eq!(kind_of(told), StorageErrorKind::AlreadyExists);
        assert_eq!(again.read(&name("entry"), 10).expect("the entry"), b"data");
    }

    #[test]
    fn a_file_system_that_finds_itself_full_only_at_fsync_says_full_and_keeps_nothing() {
        let (_folder, mut store) = store();
        store.sync = |file| match is_folder(file) {
            true => Ok(()),
            false => Err(Errno::NOSPC),
        };
        let told = store.create(&name("a/b"), b"data");
        assert_eq!(kind_of(told), StorageErrorKind::Full);
        assert_eq!(store.leftovers(""), Ok(Vec::new()));
        store.sync = |_| Ok(());
        assert_eq!(store.create(&name("a/b"), b"data"), Ok(()));
    }

    #[test]
    fn a_sweep_that_finds_no_room_for_noise_removes_the_file_and_ends_nothing() {
        let no_room: [fn(BorrowedFd<'_>) -> rustix::io::Result<()>; 2] = [
            |file| match is_folder(file) {
                true => Ok(()),
                false => Err(Errno::NOSPC),
            },
            |file| match is_folder(file) {
                true => Ok(()),
                false => Err(Errno::DQUOT),
            },
        ];
        for sync in no_room {
            let (folder, mut store) = store();
            let dead = folder.path().join("tmp/dead");
            fs::write(&dead, "bytes").expect("a file");
            store.sync = sync;
            let swept = store.sweep_leftovers("").expect("swept");
            let places: Vec<&str> = swept.iter().map(|one| one.place.as_str()).collect();
            assert_eq!(places, ["tmp/dead"]);
            assert!(!dead.exists());
            store.sync = |_| Ok(());
            assert_eq!(store.create(&name("a"), b"data"), Ok(()));
        }
    }

    #[test]
    fn a_temporary_file_that_another_host_removed_fails_one_creation_and_nothing_more() {
        let (folder, mut store) = store();
        store.sync = |file| match is_folder(file) {
            true => Ok(()),
            false => {
                // As the client of a network file system reports it.
                let place = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
                fs::remove_file(place.expect("its name")).expect("removed");
                Err(Errno::STALE)
            }
        };
        let told = store.create(&name("a/b"), b"data");
        assert_eq!(kind_of(told), StorageErrorKind::Transient);
        assert!(!folder.path().join("a/b").exists());
        store.sync = |_| Ok(());
        assert_eq!(store.create(&name("a/b"), b"data"), Ok(()));
    }

    #[test]
    fn an_object_that_cannot_be_overwritten_for_an_ailing_disk_stays() {
        let (folder, mut store) = store();
        store.create(&name("a"), b"data").expect("created");
        store.sync = |_| Err(Errno::IO);
        let told = store.destroy(&name("a"));
        assert_eq!(kind_of(told), StorageErrorKind::Transient);
        assert!(folder.path().join("a").exists());
    }

    #[test]
    fn what_is_read_late_leaves_the_page_cache_and_all_else_stays_in_it() {
        // A folder in memory has nothing else to give back.
        let below = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tmp");
        fs::create_dir_all(&below).expect("a folder");
        let folder = tempfile::tempdir_in(below).expect("a folder");
        let store = Directory::init(folder.path(), 0).expect("a store");
        let is_cached = |name: &ObjectName| {
            let file = fs::File::open(folder.path().join(name.as_str())).expect("the file");
            let mut buffer = [0; 512];
            let into = &mut [IoSliceMut::new(&mut buffer)];
            match rustix::io::preadv2(&file, into, 0, ReadWriteFlags::NOWAIT) {
                Ok(length) => length == 512,
                Err(error) => {
                    assert_eq!(error, Errno::AGAIN, "does this file system know NOWAIT?");
                    false
                }
            }
        };
        let data = Bytes::from(vec![7; 1 << 20]);
        let cached = |read_again| {
            // Asking makes the kernel read ahead, which may be done at once; not each time.
            let name = |number| name(&format!("{read_again:?}/{number}").to_lowercase());
            let count = |number: &u32| {
                let name = name(*number);
                store.create_large(&name, &data, read_again).expect("made");
                is_cached(&name)
            };
            (0..8).filter(count).count()
        };
        assert_eq!(cached(ReadAgain::Soon), 8);
        assert!(cached(ReadAgain::Late) < 8);
        store.create(&name("a"), &data).expect("created");
        assert!(is_cached(&name("a")));
        assert_eq!(
            store.read(&name("late/0"), 1 << 20).expect("an object"),
            data
        );
    }

    #[test]
    fn each_kind_of_durability_has_its_fsync() {
        static FILES: AtomicU32 = AtomicU32::new(0);
        static FOLDERS: AtomicU32 = AtomicU32::new(0);
        let (folder, mut store) = store();
        store.sync = |file| {
            let count = match is_folder(file) {
                true => &FOLDERS,
                false => &FILES,
            };
            count.fetch_add(1, Ordering::SeqCst);
            rustix::fs::fsync(file)
        };
        let counted = |what: &dyn Fn()| {
            FILES.store(0, Ordering::SeqCst);
            FOLDERS.store(0, Ordering::SeqCst);
            what();
            (FILES.load(Ordering::SeqCst), FOLDERS.load(Ordering::SeqCst))
        };
        let (first, second) = (name("a/b/first"), name("a/b/second"));
        // The file, its folder, and once for this folder all that is above: `a` and the root.
        let told = counted(&|| store.create(&first, b"1").expect("created"));
        assert_eq!(told, (1, 3));
        let told = counted(&|| store.create(&second, b"2").expect("created"));
        assert_eq!(told, (1, 1));
        // Whoever is told "taken" relies on it.
        let told = counted(&|| drop(store.create(&second, b"3").expect_err("taken")));
        assert_eq!(told, (0, 1));
        let told = counted(&|| store.delete(&second).expect("deleted"));
        assert_eq!(told, (0, 1));
        // Absence may be another's unfinished deletion.
        let told = counted(&|| store.delete(&second).expect("absent"));
        assert_eq!(told, (0, 1));
        let told = counted(&|| store.destroy(&first).expect("destroyed"));
        assert_eq!(told, (1, 1));
        let told = counted(&|| store.delete(&first).expect("absent, and its folder too"));
        assert_eq!(told, (0, 1));
        fs::write(folder.path().join("tmp/dead"), "bytes").expect("a file");
        let told = counted(&|| drop(store.sweep_leftovers("").expect("swept")));
        assert_eq!(told, (1, 1));
        // The folder is another one now, though its name is the same.
        let told = counted(&|| store.create(&first, b"1").expect("created"));
        assert_eq!(told, (1, 3));
    }

    #[test]
    fn a_folder_made_by_another_process_is_made_durable_by_whoever_relies_on_it() {
        static FOLDERS: AtomicU32 = AtomicU32::new(0);
        let (folder, mut store) = store();
        fs::create_dir_all(folder.path().join("a/b")).expect("made by another");
        store.sync = |file| {
            FOLDERS.fetch_add(u32::from(is_folder(file)), Ordering::SeqCst);
            Ok(())
        };
        store.create(&name("a/b/c"), b"").expect("created");
        assert_eq!(FOLDERS.load(Ordering::SeqCst), 3);
    }

    #[test]
    fn a_living_writers_file_is_shown_and_not_swept_and_then_lands_whole() {
        let (folder, store) = store();
        let mut writer = Temporary::create(&store.root).expect("a temporary file");
        write_all(writer.file(), b"precious").expect("written");
        assert_eq!(store.sweep_leftovers(""), Ok(Vec::new()));
        assert_eq!(store.leftovers("").expect("leftovers").len(), 1);
        writer.land(store.root.as_fd(), "object").expect("landed");
        drop(writer);
        assert_eq!(store.sweep_leftovers(""), Ok(Vec::new()));
        let object = fs::read(folder.path().join("object")).expect("the object");
        assert_eq!(object, b"precious");
    }

    #[test]
    fn what_the_system_says_becomes_what_the_caller_decides_by() {
        for (error, kind) in [
            (Errno::NOSPC, StorageErrorKind::Full),
            (Errno::DQUOT, StorageErrorKind::Full),
            (Errno::ROFS, StorageErrorKind::Denied),
            (Errno::ACCESS, StorageErrorKind::Denied),
            (Errno::PERM, StorageErrorKind::Denied),
            (Errno::IO, StorageErrorKind::Transient),
            (Errno::STALE, StorageErrorKind::Transient),
            (Errno::MFILE, StorageErrorKind::Transient),
            (Errno::NOENT, StorageErrorKind::NotFound),
            (Errno::LOOP, StorageErrorKind::Corrupt),
            (Errno::XDEV, StorageErrorKind::Unsupported),
        ] {
            let told = told("name", "doing", error);
            assert_eq!(told.kind, kind, "{error}");
            assert!(told.detail.starts_with("doing: "), "{told}");
        }
    }

    #[test]
    fn what_the_medium_does_not_give_of_one_object_is_no_store_out_of_reach() {
        for (error, kind) in [
            (Errno::IO, StorageErrorKind::Unreadable),
            (Errno::UCLEAN, StorageErrorKind::Unreadable),
            (Errno::BADMSG, StorageErrorKind::Unreadable),
            (Errno::STALE, StorageErrorKind::Transient),
            (Errno::NOENT, StorageErrorKind::NotFound),
        ] {
            let told = unread("name", "reading", error);
            assert_eq!(told.kind, kind, "{error}");
            assert!(told.detail.starts_with("reading: "), "{told}");
        }
    }
}
