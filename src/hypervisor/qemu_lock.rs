//! Whether a QEMU has an image or device open for writing.
//!
//! QEMU holds a byte lock for each permission it uses on an image (open file description locks,
//! shared): byte 100 + n for permission n, and n is 1 for writing, 3 for resizing. The kernel
//! lists all locks in `/proc/locks` by device and inode. `F_OFD_GETLK` would ask for one byte,
//! but no safe wrapper that we have can return its answer: the holder's process id is -1.
//!
//! This is a net under the checks of size and times, and gives the better message. What cannot
//! be read says nothing.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

const WRITE_BYTE: u64 = 101;
const RESIZE_BYTE: u64 = 103;
/// The kernel's list is read page by page; locks that come and go meanwhile can hide another.
const LOOKS: usize = 3;

pub(super) fn held_by_writer(file: &File) -> bool {
    let Some(inode) = KernelInode::of(file) else {
        return false;
    };
    (0..LOOKS).any(|_| {
        fs::read_to_string("/proc/locks")
            .is_ok_and(|locks| locks.lines().any(|line| is_writers_lock(line, &inode)))
    })
}

/// An inode as `/proc/locks` names it. The device is that of the file system, which differs from
/// what `stat` says on btrfs and overlayfs.
#[derive(Debug, PartialEq, Eq)]
struct KernelInode {
    major: u32,
    minor: u32,
    inode: u64,
}

impl KernelInode {
    fn of(file: &File) -> Option<Self> {
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd())).ok();
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok();
        let metadata = file.metadata().ok()?;
        let listed = info.zip(mounts).and_then(|(info, mounts)| {
            let mount = field(&info, "mnt_id:")?;
            let device = mounts.lines().find_map(|line| {
                let mut words = line.split_ascii_whitespace();
                (words.next()? == mount).then(|| words.nth(1))?
            })?;
            let (major, minor) = device.split_once(':')?;
            Some(KernelInode {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                // Kernels before 5.14 do not say.
                inode: field(&info, "ino:")
                    .and_then(|inode| inode.parse().ok())
                    .unwrap_or(metadata.ino()),
            })
        });
        // A mount that this process cannot see: what `stat` says is right on most file systems.
        Some(listed.unwrap_or(KernelInode {
            major: rustix::fs::major(metadata.dev()),
            minor: rustix::fs::minor(metadata.dev()),
            inode: metadata.ino(),
        }))
    }
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .map(str::trim)
}

/// `1: OFDLCK ADVISORY  READ -1 fe:00:21 101 101`; the device in hexadecimal.
fn is_writers_lock(line: &str, inode: &KernelInode) -> bool {
    let mut words = line.split_ascii_whitespace().skip(1);
    // `->` marks a request that waits for the lock of the line before it.
    let is_lock = matches!(words.next(), Some("OFDLCK" | "POSIX"));
    let mut words = words.skip(3);
    let parsed = (|| {
        let mut place = words.next()?.split(':');
        let major = u32::from_str_radix(place.next()?, 16).ok()?;
        let minor = u32::from_str_radix(place.next()?, 16).ok()?;
        let number = place.next()?.parse().ok()?;
        let first: u64 = words.next()?.parse().ok()?;
        let last: u64 = match words.next()? {
            "EOF" => u64::MAX,
            last => last.parse().ok()?,
        };
        let place = KernelInode {
            major,
            minor,
            inode: number,
        };
        Some((place, first..=last))
    })();
    is_lock
        && parsed.is_some_and(|(place, bytes)| {
            place == *inode && (bytes.contains(&WRITE_BYTE) || bytes.contains(&RESIZE_BYTE))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGE: KernelInode = KernelInode {
        major: 0xfe,
        minor: 0,
        inode: 21,
    };

    #[test]
    fn a_writers_lock_is_found_and_a_readers_is_not() {
        for (line, writer) in [
            ("1: OFDLCK ADVISORY  READ -1 fe:00:21 101 101", true),
            ("1: OFDLCK ADVISORY  READ -1 fe:00:21 103 103", true),
            ("1: OFDLCK ADVISORY  READ -1 fe:00:21 100 101", true),
            ("7: POSIX  ADVISORY  WRITE 4711 fe:00:21 0 EOF", true),
            ("1: OFDLCK ADVISORY  READ -1 fe:00:21 100 100", false),
            ("1: OFDLCK ADVISORY  READ -1 fe:00:21 201 203", false),
            ("1: OFDLCK ADVISORY  READ -1 fe:00:22 101 101", false),
            ("1: OFDLCK ADVISORY  READ -1 fd:00:21 101 101", false),
            ("1: -> OFDLCK ADVISORY  READ -1 fe:00:21 101 101", false),
            ("1: FLOCK  ADVISORY  WRITE 99 fe:00:21 0 EOF", false),
            ("1: OFDLCK ADVISORY  READ -1 fe:00", false),
            ("", false),
        ] {
            assert_eq!(is_writers_lock(line, &IMAGE), writer, "{line}");
        }
    }
}
