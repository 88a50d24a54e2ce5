//! Space set aside in a file, so that a full store can still expire, erase and reclaim.
//!
//! The file keeps its length when its space is given back: the length remembers, for whichever
//! process restores it, how much there was.

use super::beneath::Root;
use crate::storage::fill_random;
use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::{Errno, Result, retry_on_intr};
use std::os::fd::OwnedFd;

pub(super) const NAME: &str = "reserve";
/// The unit of `st_blocks`, whatever the file system's own is.
const BLOCK_BYTES: u64 = 512;
/// An emptied file may go on holding so much, which describes it.
const EMPTY_BYTES: u64 = 64 << 10;

/// Sets the size for good. A crash here leaves a reserve of the old or the new size, perhaps
/// without its space, which `restore` mends.
pub(super) fn set(root: &Root, size_bytes: u64) -> Result<()> {
    if size_bytes == 0 {
        return match rustix::fs::unlinkat(root.as_fd(), NAME, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error),
        };
    }
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    let file = retry_on_intr(|| rustix::fs::openat(root.as_fd(), NAME, flags, mode))?;
    rustix::fs::ftruncate(&file, size_bytes)?;
    if let Err(error) = fill(&file, size_bytes, allocate) {
        // The store does not hold the reserve; then it must not hold half of it either.
        empty(&file, size_bytes)?;
        return Err(error);
    }
    rustix::fs::fsync(&file)
}

/// Whether space was given back.
pub(super) fn release(root: &Root) -> Result<bool> {
    let Some((file, before)) = open(root)? else {
        return Ok(false);
    };
    if held_bytes(&before) <= EMPTY_BYTES.min(length(&before) / 2) {
        return Ok(false);
    }
    empty(&file, length(&before))?;
    // What it holds is not asked again: some file systems tell only later (ZFS).
    rustix::fs::fsync(&file)?;
    Ok(true)
}

/// Whether the whole space is set aside again.
pub(super) fn restore(root: &Root) -> Result<bool> {
    let Some((file, stat)) = open(root)? else {
        return Ok(false);
    };
    let size_bytes = length(&stat);
    if size_bytes == 0 {
        return Ok(false);
    }
    let filled = fill(&file, size_bytes, allocate).and_then(|()| rustix::fs::fsync(&file));
    match filled {
        Ok(()) => Ok(true),
        Err(Errno::NOSPC | Errno::DQUOT) => {
            // Half a reserve would only take the space from those who still need it.
            empty(&file, size_bytes)?;
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn open(root: &Root) -> Result<Option<(OwnedFd, Stat)>> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match retry_on_intr(|| rustix::fs::openat(root.as_fd(), NAME, flags, Mode::empty()))
    {
        Err(Errno::NOENT) => return Ok(None),
        opened => opened?,
    };
    let stat = settled(&file)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(Some((file, stat))),
        _ => Err(Errno::LOOP),
    }
}

fn length(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

fn held_bytes(stat: &Stat) -> u64 {
    u64::try_from(stat.st_blocks)
        .unwrap_or(0)
        .saturating_mul(BLOCK_BYTES)
}

/// What a file is and holds. ZFS tells of its blocks only after they are written out, which the
/// question where its data begins brings about; elsewhere that question changes nothing.
fn settled(file: &OwnedFd) -> Result<Stat> {
    let _ = rustix::fs::seek(file, SeekFrom::Data(0));
    rustix::fs::fstat(file)
}

fn allocate(file: &OwnedFd, size_bytes: u64) -> Result<()> {
    retry_on_intr(|| rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size_bytes))
}

fn fill(
    file: &OwnedFd,
    size_bytes: u64,
    allocate: impl Fn(&OwnedFd, u64) -> Result<()>,
) -> Result<()> {
    match allocate(file, size_bytes) {
        Ok(()) if held_bytes(&settled(file)?) >= size_bytes => Ok(()),
        // Some say that they set space aside and only note the length (ZFS).
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => fill_by_writing(file, size_bytes),
        Err(error) => Err(error),
    }
}

/// Random bytes, because a file system that compresses would set nothing aside for zeros.
fn fill_by_writing(file: &OwnedFd, size_bytes: u64) -> Result<()> {
    let mut block = vec![0u8; 1 << 20];
    let mut at = 0;
    while at < size_bytes {
        fill_random(&mut block).map_err(|_| Errno::NOSYS)?;
        let wanted = usize::try_from(size_bytes - at).map_or(block.len(), |n| n.min(block.len()));
        let bytes = block.get(..wanted).unwrap_or(&block);
        match retry_on_intr(|| rustix::io::pwrite(file, bytes, at))? {
            0 => return Err(Errno::NOSPC),
            written => at += written as u64,
        }
    }
    rustix::fs::fsync(file)
}

fn empty(file: &OwnedFd, size_bytes: u64) -> Result<()> {
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    if retry_on_intr(|| rustix::fs::fallocate(file, punch, 0, size_bytes)).is_ok() {
        return Ok(());
    }
    // A crash between the two forgets the size; `restore` then says that there is no reserve.
    rustix::fs::ftruncate(file, 0)?;
    rustix::fs::ftruncate(file, size_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(folder: &tempfile::TempDir) -> OwnedFd {
        let path = folder.path().join(NAME);
        std::fs::File::create(path).expect("a file").into()
    }

    #[test]
    fn a_file_system_that_only_notes_the_length_is_made_to_hold_the_space() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = file(&folder);
        let size_bytes = (1 << 20) + 5;
        let notes_the_length = |file: &OwnedFd, size| rustix::fs::ftruncate(file, size);
        assert_eq!(fill(&file, size_bytes, notes_the_length), Ok(()));
        let stat = rustix::fs::fstat(&file).expect("told");
        assert_eq!(length(&stat), size_bytes);
        assert!(held_bytes(&stat) >= size_bytes, "{}", held_bytes(&stat));
    }

    #[test]
    fn space_that_is_held_already_is_not_written_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = file(&folder);
        fill(&file, 1 << 20, allocate).expect("filled");
        rustix::io::pwrite(&file, b"mark", 0).expect("written");
        fill(&file, 1 << 20, |_, _| Ok(())).expect("filled");
        let kept = std::fs::read(folder.path().join(NAME)).expect("the reserve");
        assert!(kept.starts_with(b"mark"));
    }

    #[test]
    fn a_reserve_is_given_back_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = Root::open(folder.path()).expect("the root");
        set(&root, 1 << 20).expect("set aside");
        assert_eq!(release(&root), Ok(true));
        assert_eq!(release(&root), Ok(false));
        assert_eq!(restore(&root), Ok(true));
        assert_eq!(release(&root), Ok(true));
    }
}
