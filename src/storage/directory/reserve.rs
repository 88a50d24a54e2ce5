//! Space set aside in a file, so that a full store can still expire, erase and reclaim.
//!
//! The file keeps its length when its space is given back: the length remembers, for whichever
//! process restores it, how much there was.

use super::beneath::Root;
use crate::storage::fill_random;
use rustix::fs::{AtFlags, FallocateFlags, FileType, Mode, OFlags, Stat};
use rustix::io::{Errno, Result, retry_on_intr};
use std::os::fd::OwnedFd;

pub(super) const NAME: &str = "reserve";

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
    if let Err(error) = fill(&file, size_bytes) {
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
    if before.st_blocks == 0 {
        return Ok(false);
    }
    empty(&file, length(&before))?;
    rustix::fs::fsync(&file)?;
    Ok(rustix::fs::fstat(&file)?.st_blocks < before.st_blocks)
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
    let filled = fill(&file, size_bytes).and_then(|()| rustix::fs::fsync(&file));
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
    let stat = rustix::fs::fstat(&file)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(Some((file, stat))),
        _ => Err(Errno::LOOP),
    }
}

fn length(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

fn fill(file: &OwnedFd, size_bytes: u64) -> Result<()> {
    match retry_on_intr(|| rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size_bytes)) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => fill_by_writing(file, size_bytes),
        told => told,
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
