//! Copies of a far store's objects on this host: those that are read again and again and are named by the
//! hash of what they hold, so that a copy that has rotted is seen to be none.
//!
//! A copy is not the object: whoever wants to know whether the store still has it asks the store
//! ([`Storage::read`], [`Storage::open`]); only [`Storage::open_copy`] and [`Storage::copy`] are answered
//! from here. Copies are as sealed as the objects. They go when whoever knows says so
//! ([`Cached::keep_only`]), which has to be in time: what is erased must be gone here too. What is deleted
//! through here goes at once. A host that is off cannot do it; its copies are then bytes without keys, as
//! those went with the point's record, and they go when it comes back.

use super::{Leftover, Listed, OpenObject, Part, ReadAgain, Storage, StorageError, Survey};
use crate::model::ObjectName;
use bytes::Bytes;
use rustix::fs::{Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

/// Read at a time while a copy is checked.
const PIECE_BYTES: usize = 1 << 20;

/// What makes a folder one of copies: in one without it, nothing is ours to read, to add or to remove. As in
/// the Cache Directory Tagging Specification (bford.info/cachedir), so that backups of the host leave it out.
const MARK: &str = "CACHEDIR.TAG";
const MARK_TEXT: &str = "Signature: 8a477f597d28d172789f06886806bc55\n\
    # Copies of a vmkeep repository, which may be removed at any time.\n";

/// With a number behind it, a mark that is being written.
const BEGUN: &str = ".CACHEDIR.TAG.";

/// The BLAKE3 hash that is the last part of an object's name.
pub type HashOfName = fn(&ObjectName) -> Option<[u8; 32]>;

pub struct Cached {
    store: Arc<dyn Storage>,
    folder: PathBuf,
    max_bytes: u64,
    hash_of: HashOfName,
    /// Bytes that may be added before the folder is looked through again: never all that are left, as other
    /// processes of this host add to it too.
    room: Mutex<u64>,
}

struct Copy {
    path: PathBuf,
    size_bytes: u64,
    used: SystemTime,
}

struct OpenCopy {
    name: ObjectName,
    file: File,
    size_bytes: u64,
}

impl OpenObject for OpenCopy {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), StorageError> {
        self.file.read_exact_at(buffer, offset).map_err(|error| {
            let kind = super::StorageErrorKind::Transient;
            StorageError::new(kind, &self.name, format!("its copy on this host: {error}"))
        })
    }
}

impl Cached {
    /// `folder` is made when the first copy is. Nothing that goes wrong in it is told: then there is no copy.
    pub fn new(
        store: Arc<dyn Storage>,
        folder: PathBuf,
        max_bytes: u64,
        hash_of: HashOfName,
    ) -> Self {
        Cached {
            store,
            folder,
            max_bytes,
            hash_of,
            room: Mutex::new(0),
        }
    }

    /// Removes what is below a prefix and may not stay.
    pub fn keep_only(
        &self,
        prefix: &str,
        may_stay: impl Fn(&ObjectName) -> bool,
    ) -> io::Result<()> {
        for copy in self.copies_below(prefix)? {
            if !self.name_of(&copy).is_some_and(|name| may_stay(&name)) {
                remove(&copy.path)?;
            }
        }
        Ok(())
    }

    /// The names of what is below a prefix.
    pub fn names_below(&self, prefix: &str) -> io::Result<Vec<ObjectName>> {
        let copies = self.copies_below(prefix)?;
        Ok(copies
            .iter()
            .filter_map(|copy| self.name_of(copy))
            .collect())
    }

    fn name_of(&self, copy: &Copy) -> Option<ObjectName> {
        let name = copy.path.strip_prefix(&self.folder).ok()?;
        ObjectName::new(name.to_str()?).ok()
    }

    /// All copies whose path begins with `prefix`; "": all. An error: the folder is somebody else's.
    fn copies_below(&self, prefix: &str) -> io::Result<Vec<Copy>> {
        refuse_foreign(&self.folder)?;
        let mut copies = files_below(&self.folder.join(prefix))?;
        copies.retain(|copy| copy.path != self.folder.join(MARK));
        Ok(copies)
    }

    /// Makes the folder if it is not there.
    fn claim(&self) -> io::Result<()> {
        if is_marked(&self.folder) {
            return Ok(());
        }
        make_folder(&self.folder)?;
        refuse_foreign(&self.folder)?;
        write_mark(&self.folder)
    }

    fn forget(&self, name: &ObjectName) {
        if is_marked(&self.folder) {
            let _gone = remove(&self.folder.join(name.as_str()));
        }
    }

    /// What was noted under a name that no object has; gone whenever copies may be.
    pub fn noted(&self, name: &ObjectName) -> Option<Vec<u8>> {
        is_marked(&self.folder).then(|| fs::read(self.folder.join(name.as_str())).ok())?
    }

    pub fn note(&self, name: &ObjectName, bytes: &[u8]) -> io::Result<()> {
        self.keep(name, bytes)
    }

    /// Removes all that is not below one of these prefixes.
    pub fn keep_only_below(&self, prefixes: &BTreeSet<String>) -> io::Result<()> {
        for copy in self.copies_below("")? {
            let is_below = |prefix: &String| copy.path.starts_with(self.folder.join(prefix));
            if !prefixes.iter().any(is_below) {
                remove(&copy.path)?;
            }
        }
        Ok(())
    }

    fn copy_of(&self, name: &ObjectName, hash: &[u8; 32], max_bytes: u64) -> io::Result<OpenCopy> {
        if !is_marked(&self.folder) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let path = self.folder.join(name.as_str());
        let mut file = File::open(&path)?;
        let size_bytes = file.metadata()?.len();
        let mut hasher = blake3::Hasher::new();
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            match file.read(&mut piece)? {
                0 => break,
                read => hasher.update(piece.get(..read).unwrap_or_default()),
            };
        }
        if hasher.finalize() != blake3::Hash::from_bytes(*hash) || size_bytes > max_bytes {
            remove(&path)?;
            return Err(io::ErrorKind::InvalidData.into());
        }
        // What is used stays. Without that, it goes earlier than others.
        let _told = rustix::fs::futimens(&file, &used_now());
        let name = name.clone();
        Ok(OpenCopy {
            name,
            file,
            size_bytes,
        })
    }

    fn keep(&self, name: &ObjectName, bytes: &[u8]) -> io::Result<()> {
        let size_bytes = bytes.len() as u64;
        if size_bytes > self.max_bytes {
            return Ok(());
        }
        {
            let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
            // One thread at a time: all would write the mark under the same name first.
            self.claim()?;
            if *room < size_bytes {
                *room = self.make_room(size_bytes)?;
            }
            *room = room.saturating_sub(size_bytes);
        }
        let path = self.folder.join(name.as_str());
        let above = path.parent().unwrap_or(&self.folder);
        make_folder(above)?;
        // Beside its name first; what a crash leaves is removed as no name of an object.
        let leaf = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = above.join(format!(".{leaf}.{}", std::process::id()));
        let written = (|| {
            let mut file = new_file(&temporary)?;
            file.write_all(bytes)?;
            fs::rename(&temporary, &path)
        })();
        if written.is_err() {
            let _gone = fs::remove_file(&temporary);
        }
        written
    }

    /// Those that were not used for longest go first, and a few more than must, so that not every copy asks
    /// for this. Returns how much may be added.
    fn make_room(&self, bytes: u64) -> io::Result<u64> {
        let mut copies = self.copies_below("")?;
        let mut total: u64 = copies.iter().map(|copy| copy.size_bytes).sum();
        if total.saturating_add(bytes) > self.max_bytes {
            copies.sort_by_key(|copy| copy.used);
            let most = self.max_bytes - self.max_bytes / 16;
            for copy in copies {
                if total.saturating_add(bytes) <= most {
                    break;
                }
                remove(&copy.path)?;
                total = total.saturating_sub(copy.size_bytes);
            }
        }
        Ok(bytes.max(self.max_bytes.saturating_sub(total) / 2))
    }
}

fn used_now() -> Timestamps {
    let time = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
    Timestamps {
        last_access: time(UTIME_OMIT),
        last_modification: time(UTIME_NOW),
    }
}

/// Removes a folder of copies, the mark last: what a crash leaves is still known for copies.
pub fn remove_copies(folder: &Path) -> io::Result<()> {
    if !is_marked(folder) {
        return Ok(());
    }
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => fs::remove_dir_all(entry.path())?,
            false if entry.file_name() == MARK => {}
            false => remove(&entry.path())?,
        }
    }
    remove(&folder.join(MARK))?;
    fs::remove_dir(folder).or_else(|error| {
        // Another process has just put a copy there.
        write_mark(folder)?;
        Err(error)
    })
}

/// Whole, and on the disk before the first copy is: copies without it would be nobody's for ever.
fn write_mark(folder: &Path) -> io::Result<()> {
    let temporary = folder.join(format!("{BEGUN}{}", std::process::id()));
    let mut mark = new_file(&temporary)?;
    mark.write_all(MARK_TEXT.as_bytes())?;
    mark.sync_all()?;
    fs::rename(&temporary, folder.join(MARK))?;
    File::open(folder)?.sync_all()
}

fn is_marked(folder: &Path) -> bool {
    fs::read(folder.join(MARK)).is_ok_and(|mark| mark == MARK_TEXT.as_bytes())
}

/// A folder without our mark that is not empty is somebody else's.
fn refuse_foreign(folder: &Path) -> io::Result<()> {
    if is_marked(folder) {
        return Ok(());
    }
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        let leaf = path.file_name().unwrap_or_default().as_encoded_bytes();
        if !leaf.starts_with(BEGUN.as_bytes()) {
            return Err(io::Error::other(format!(
                "{} holds what vmkeep did not put there, such as {}: nothing in it is touched, and no \
                 copies are kept; move that away",
                folder.display(),
                path.display()
            )));
        }
    }
    Ok(())
}

fn make_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn new_file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(path)
}

fn files_below(folder: &Path) -> io::Result<Vec<Copy>> {
    let mut copies = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let facts = match entry.metadata() {
                // Another process removed it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                facts => facts?,
            };
            match facts.is_dir() {
                true => folders.push(entry.path()),
                false => copies.push(Copy {
                    path: entry.path(),
                    size_bytes: facts.len(),
                    used: facts.modified()?,
                }),
            }
        }
    }
    Ok(copies)
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

impl Storage for Cached {
    fn behind(&self) -> Option<&dyn Storage> {
        Some(&*self.store)
    }

    fn create(&self, name: &ObjectName, data: &[u8]) -> Result<(), StorageError> {
        self.store.create(name, data)
    }

    fn create_large(
        &self,
        name: &ObjectName,
        data: &Bytes,
        read_again: ReadAgain,
    ) -> Result<(), StorageError> {
        self.store.create_large(name, data, read_again)
    }

    fn read(&self, name: &ObjectName, max_bytes: u64) -> Result<Vec<u8>, StorageError> {
        self.store.read(name, max_bytes)
    }

    fn read_range(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StorageError> {
        self.store.read_range(name, offset, buffer)
    }

    fn open(&self, name: &ObjectName, max_bytes: u64) -> Result<Box<dyn OpenObject>, StorageError> {
        self.store.open(name, max_bytes)
    }

    fn open_copy(
        &self,
        name: &ObjectName,
        max_bytes: u64,
    ) -> Result<Box<dyn OpenObject>, StorageError> {
        let Some(hash) = (self.hash_of)(name) else {
            return self.store.open(name, max_bytes);
        };
        if let Ok(copy) = self.copy_of(name, &hash, max_bytes) {
            return Ok(Box::new(copy));
        }
        let bytes = self.store.read(name, max_bytes)?;
        // What is not what its name says is for the caller to judge, and no copy is made of it.
        if blake3::hash(&bytes) == blake3::Hash::from_bytes(hash) && self.keep(name, &bytes).is_ok()
        {
            // From the file, so that it need not stay in memory.
            if let Ok(copy) = self.copy_of(name, &hash, max_bytes) {
                return Ok(Box::new(copy));
            }
        }
        let name = name.clone();
        Ok(Box::new(super::InMemory { name, bytes }))
    }

    fn copy(&self, name: &ObjectName) -> Option<Box<dyn OpenObject>> {
        let hash = (self.hash_of)(name)?;
        let copy = self.copy_of(name, &hash, u64::MAX).ok()?;
        Some(Box::new(copy))
    }

    fn keep_copy(&self, name: &ObjectName, bytes: &[u8]) {
        let hash = (self.hash_of)(name);
        if hash.is_some_and(|hash| blake3::hash(bytes) == blake3::Hash::from_bytes(hash)) {
            // Nothing relies on there being one.
            let _kept = self.keep(name, bytes);
        }
    }

    fn size_bytes(&self, name: &ObjectName) -> Result<u64, StorageError> {
        self.store.size_bytes(name)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>, StorageError> {
        self.store.list(prefix)
    }

    fn parts(&self, prefix: &str) -> Result<Vec<Part>, StorageError> {
        self.store.parts(prefix)
    }

    fn delete(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.forget(name);
        self.store.delete(name)
    }

    fn delete_all(&self, names: &[ObjectName]) -> Vec<Result<(), StorageError>> {
        for name in names {
            self.forget(name);
        }
        self.store.delete_all(names)
    }

    fn destroy(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.forget(name);
        self.store.destroy(name)
    }

    fn sweep_leftovers(&self, prefix: &str) -> Result<Vec<Leftover>, StorageError> {
        self.store.sweep_leftovers(prefix)
    }

    fn survey(&self, prefix: &str) -> Result<Survey, StorageError> {
        self.store.survey(prefix)
    }

    fn location(&self) -> String {
        self.store.location()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Faulty, Memory, Verb};
    use super::*;

    fn hash_of(name: &ObjectName) -> Option<[u8; 32]> {
        let (_, last) = name.as_str().rsplit_once('/')?;
        blake3::Hash::from_hex(last)
            .ok()
            .map(|hash| *hash.as_bytes())
    }

    fn named(prefix: &str, bytes: &[u8]) -> ObjectName {
        ObjectName::new(&format!("{prefix}/{}", blake3::hash(bytes))).unwrap()
    }

    struct Lab {
        folder: tempfile::TempDir,
        store: Arc<Faulty<Memory>>,
        cached: Cached,
    }

    impl Lab {
        fn new(max_bytes: u64) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let store = Arc::new(Faulty::new(Memory::new()));
            let path = folder.path().join("cache");
            let cached = Cached::new(store.clone(), path, max_bytes, hash_of);
            Lab {
                folder,
                store,
                cached,
            }
        }

        fn read(&self, name: &ObjectName) -> Result<Vec<u8>, StorageError> {
            let object = self.cached.open_copy(name, 1 << 20)?;
            let mut bytes = vec![0; object.size_bytes() as usize];
            object.read_at(0, &mut bytes)?;
            Ok(bytes)
        }

        fn asked(&self) -> usize {
            let reads = |verb: &Verb| matches!(verb, Verb::Read);
            self.store
                .log()
                .iter()
                .filter(|line| reads(&line.verb))
                .count()
        }

        fn path(&self, name: &ObjectName) -> PathBuf {
            self.folder.path().join("cache").join(name.as_str())
        }
    }

    #[test]
    fn a_copy_is_read_from_the_store_once_and_again_when_it_was_lost_or_has_rotted() {
        let lab = Lab::new(1 << 20);
        let name = named("customers/acme/index/1", b"a segment");
        lab.cached.create(&name, b"a segment").unwrap();
        for asked in [1, 1, 1] {
            assert_eq!(lab.read(&name).unwrap(), b"a segment");
            assert_eq!(lab.asked(), asked);
        }
        fs::write(lab.path(&name), b"a segmenT").unwrap();
        assert_eq!(lab.read(&name).unwrap(), b"a segment");
        assert_eq!(lab.asked(), 2);
        fs::remove_dir_all(lab.folder.path().join("cache")).unwrap();
        assert_eq!(lab.read(&name).unwrap(), b"a segment");
        assert_eq!(lab.asked(), 3);
        // Who asks for the object itself is answered by the store.
        assert_eq!(lab.cached.read(&name, 100).unwrap(), b"a segment");
        lab.cached.open(&name, 100).unwrap();
        assert_eq!(lab.asked(), 5);
        lab.cached.delete(&name).unwrap();
        assert!(!lab.path(&name).exists());
        assert!(lab.read(&name).is_err());
    }

    #[test]
    fn no_copy_is_made_of_what_is_not_what_its_name_says() {
        let lab = Lab::new(1 << 20);
        let name = named("index/1", b"a segment");
        lab.store.create(&name, b"another").unwrap();
        let odd = ObjectName::new("index/odd").unwrap();
        lab.store.create(&odd, b"odd").unwrap();
        for _ in 0..2 {
            assert_eq!(lab.read(&name).unwrap(), b"another");
            assert_eq!(lab.read(&odd).unwrap(), b"odd");
        }
        assert!(!lab.path(&name).exists() && !lab.path(&odd).exists());
    }

    #[test]
    fn copies_longest_unused_make_room_and_what_is_too_large_is_not_kept() {
        let lab = Lab::new(10);
        let contents = [&b"1234"[..], b"5678", b"9abc", b"larger than all"];
        let names = contents.map(|content| named("index/1", content));
        for (name, content) in names.iter().zip(contents) {
            lab.store.create(name, content).unwrap();
            assert_eq!(lab.read(name).unwrap(), content);
            // Times of files can be as coarse as a tick.
            let old = SystemTime::now() - std::time::Duration::from_secs(3600);
            if let Ok(file) = File::open(lab.path(&names[0])) {
                file.set_modified(old).unwrap();
            }
        }
        let there = names.each_ref().map(|name| lab.path(name).exists());
        assert_eq!(there, [false, true, true, false]);
        // The second is used again, and the third goes instead.
        let old = SystemTime::now() - std::time::Duration::from_secs(3600);
        for name in &names[1..3] {
            let file = File::open(lab.path(name)).unwrap();
            file.set_modified(old).unwrap();
        }
        assert!(lab.cached.copy(&names[1]).is_some());
        let next = named("index/1", b"next");
        lab.cached.keep_copy(&next, b"next");
        let there = [&names[1], &names[2], &next].map(|name| lab.path(name).exists());
        assert_eq!(there, [true, false, true]);
    }

    #[test]
    fn however_many_copies_are_kept_they_take_no_more_than_is_allowed() {
        let lab = Lab::new(10_000);
        let folder = lab.folder.path().join("cache");
        // Two processes of this host.
        let path = folder.clone();
        let other = Cached::new(lab.store.clone(), path, 10_000, hash_of);
        for number in 0..200u32 {
            let bytes = [number.to_le_bytes(); 30].concat();
            let name = named("customers/a/packs/1", &bytes);
            [&lab.cached, &other][number as usize % 2].keep_copy(&name, &bytes);
            let copies = lab.cached.copies_below("").unwrap();
            let total: u64 = copies.iter().map(|copy| copy.size_bytes).sum();
            assert!(total <= 10_000, "{total}");
        }
    }

    #[test]
    fn a_copy_that_has_rotted_is_none_and_one_is_kept_only_of_what_the_name_says() {
        let lab = Lab::new(1 << 20);
        let name = named("customers/acme/packs/1", b"a pack");
        assert!(lab.cached.copy(&name).is_none());
        lab.cached.keep_copy(&name, b"another");
        assert!(lab.cached.copy(&name).is_none());
        lab.cached.keep_copy(&name, b"a pack");
        let mut bytes = [0; 4];
        let copy = lab.cached.copy(&name).unwrap();
        copy.read_at(2, &mut bytes).unwrap();
        assert_eq!((&bytes, copy.size_bytes()), (b"pack", 6));
        fs::write(lab.path(&name), b"a pacK").unwrap();
        assert!(lab.cached.copy(&name).is_none());
        assert!(!lab.path(&name).exists());
        // The store was not asked, and has nothing.
        assert_eq!(lab.asked(), 0);
        assert!(lab.cached.read(&name, 100).is_err());
    }

    #[test]
    fn copies_go_that_nobody_names_and_those_of_others_stay() {
        let lab = Lab::new(1 << 20);
        let content = |prefix: &str| prefix.as_bytes().to_vec();
        let names: Vec<ObjectName> = [
            "customers/a/index/1",
            "customers/a/index/2",
            "customers/b/index/1",
        ]
        .iter()
        .map(|prefix| {
            let name = named(prefix, &content(prefix));
            lab.store.create(&name, &content(prefix)).unwrap();
            lab.read(&name).unwrap();
            name
        })
        .collect();
        // What a killed process left.
        fs::write(
            lab.folder.path().join("cache/customers/a/index/1/.77"),
            "torn",
        )
        .unwrap();
        let kept = BTreeSet::from([names[1].clone()]);
        let may_stay = |name: &ObjectName| kept.contains(name);
        lab.cached.keep_only("customers/a", may_stay).unwrap();
        let there = |name: &ObjectName| lab.path(name).exists();
        assert_eq!(
            [&names[0], &names[1], &names[2]].map(there),
            [false, true, true]
        );
        assert!(
            !lab.folder
                .path()
                .join("cache/customers/a/index/1/.77")
                .exists()
        );
        let prefixes = BTreeSet::from(["customers/b".to_string()]);
        lab.cached.keep_only_below(&prefixes).unwrap();
        assert_eq!([&names[1], &names[2]].map(there), [false, true]);
    }

    #[test]
    fn nothing_is_touched_in_a_folder_that_others_filled() {
        let lab = Lab::new(1 << 20);
        let folder = lab.folder.path().join("cache");
        let theirs = folder.join("customers/acme/index/theirs");
        fs::create_dir_all(theirs.parent().unwrap()).unwrap();
        fs::write(&theirs, "theirs").unwrap();
        // Under a name that vmkeep would use.
        let rotted = named("customers/acme/index/2", b"another");
        fs::create_dir_all(lab.path(&rotted).parent().unwrap()).unwrap();
        fs::write(lab.path(&rotted), "theirs as well").unwrap();
        assert!(lab.cached.copy(&rotted).is_none());
        assert!(lab.cached.noted(&rotted).is_none());
        let name = named("customers/acme/index/1", b"a segment");
        lab.store.create(&name, b"a segment").unwrap();
        assert_eq!(lab.read(&name).unwrap(), b"a segment");
        assert!(!lab.path(&name).exists());
        let error = lab.cached.keep_only("customers", |_| false).unwrap_err();
        assert!(error.to_string().contains("move that away"), "{error}");
        assert!(lab.cached.keep_only_below(&BTreeSet::new()).is_err());
        let named_so = ObjectName::new("customers/acme/index/theirs").unwrap();
        let _not_in_the_store = lab.cached.delete(&named_so);
        remove_copies(&folder).unwrap();
        assert_eq!(fs::read(&theirs).unwrap(), b"theirs");
        assert_eq!(fs::read(lab.path(&rotted)).unwrap(), b"theirs as well");
        // Once it is moved away, copies are made, and go with all that lies beside them.
        fs::remove_dir_all(folder.join("customers")).unwrap();
        fs::write(folder.join(format!("{BEGUN}77")), &MARK_TEXT[..20]).unwrap();
        assert_eq!(lab.read(&name).unwrap(), b"a segment");
        assert!(lab.path(&name).exists());
        remove_copies(&folder).unwrap();
        assert!(!folder.exists());
        remove_copies(&folder).unwrap();
    }
}
