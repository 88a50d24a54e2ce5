//! What tells whether a file is still what it was: device, inode, size and times.
//!
//! The racy-timestamp problem, as git has it: a write within the same tick of the file system's
//! clock as the one before leaves the times as they are. So a fingerprint is kept as a mark only
//! if the file had been quiet for longer than any tick when it was taken, and only on file
//! systems of this host: over a network the times are those of another clock, seen through a
//! cache. The change time cannot be set by a program, so it catches what resets the other one.
//!
//! File systems write times later than bytes, some by hours: after a crash of the host a file can
//! have new content and old times. So a mark counts only in the boot in which it was made.

use super::ImageFormat;
use crate::hypervisor::{Changes, SinceMark};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, Metadata};
use std::os::unix::fs::MetadataExt;

/// The coarsest clock of a file system has ticks of 2 seconds (FAT).
const QUIET_SECONDS: i64 = 2;
const MARK_VERSION: u32 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Fingerprint {
    dev: u64,
    inode: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mark {
    image: u32,
    /// The same file read as another format is another disk.
    format: String,
    boot: String,
    fingerprint: Fingerprint,
}

impl Fingerprint {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Fingerprint {
            dev: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            ctime: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Whether both times lie so far before `now` that a later write gets other ones.
    pub(super) fn is_quiet(&self, now: Timestamp) -> bool {
        let now = (now.as_second(), i64::from(now.subsec_nanosecond()));
        [self.mtime, self.ctime]
            .iter()
            .all(|(second, nanosecond)| (second.saturating_add(QUIET_SECONDS), *nanosecond) < now)
    }

    /// Whether the times may be of a clock of whole seconds.
    pub(super) fn is_of_a_coarse_clock(&self) -> bool {
        self.mtime.1 == 0 || self.ctime.1 == 0
    }

    /// What differs from an earlier one.
    pub(super) fn difference(&self, earlier: &Fingerprint) -> Option<String> {
        if (self.dev, self.inode) != (earlier.dev, earlier.inode) {
            return Some("the image is another file (inode)".to_string());
        }
        if self.size != earlier.size {
            return Some(format!(
                "the size of the image changed from {} to {}",
                earlier.size, self.size
            ));
        }
        if self.mtime != earlier.mtime {
            return Some("the image was modified since (mtime)".to_string());
        }
        if self.ctime != earlier.ctime {
            return Some("the image was modified since (ctime)".to_string());
        }
        None
    }

    pub(super) fn mark(&self, format: ImageFormat, boot: &str) -> Option<String> {
        serde_json::to_string(&Mark {
            image: MARK_VERSION,
            format: format.as_str().to_string(),
            boot: boot.to_string(),
            fingerprint: *self,
        })
        .ok()
    }

    /// What changed since the newest point's mark: nothing, or it is not known.
    pub(super) fn changes(
        &self,
        format: ImageFormat,
        size_bytes: u64,
        since: Option<&SinceMark>,
        boot: Option<&str>,
    ) -> Changes {
        let unknown = |reason: &str| Changes::Unknown(reason.to_string());
        let Some(since) = since else {
            return unknown("the newest point does not have this disk");
        };
        let Some(mark) = &since.mark else {
            return unknown("no mark in the newest point");
        };
        let mark: Mark = match serde_json::from_str(mark) {
            Ok(mark) => mark,
            Err(_) => return unknown("the newest point's mark is not one of an image"),
        };
        if mark.image != MARK_VERSION || mark.format != format.as_str() {
            return unknown("the newest point's mark is of another format");
        }
        if let Some(difference) = self.difference(&mark.fingerprint) {
            return Changes::Unknown(difference);
        }
        if boot != Some(mark.boot.as_str()) {
            return unknown(
                "the host was started anew since: after a crash the times of the image may be older \
                 than its content",
            );
        }
        if since.size_bytes != size_bytes {
            return Changes::Unknown(format!(
                "the size of the disk changed from {} to {size_bytes}",
                since.size_bytes
            ));
        }
        Changes::Extents(Vec::new())
    }
}

/// Names the time from one start of the host to the next.
pub(super) fn boot() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_string())
}

/// Whether the file's times are of this host's clock.
pub(super) fn is_on_this_host(file: &File) -> bool {
    /// NFS, SMB (three of them), FUSE, 9p, Ceph, AFS, OCFS2, GFS2, Lustre.
    const SHARED: [u32; 11] = [
        0x6969,
        0x517b,
        0xfe53_4d42,
        0xff53_4d42,
        0x6573_5546,
        0x0102_1997,
        0x00c3_6400,
        0x5346_414f,
        0x7461_636f,
        0x0116_1970,
        0x0bd0_0bd0,
    ];
    // The kernel's number has 32 bits; libc's field is wider and may carry a sign.
    rustix::fs::fstatfs(file).is_ok_and(|found| !SHARED.contains(&(found.f_type as u32)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::DiskName;

    const PRINT: Fingerprint = Fingerprint {
        dev: 1,
        inode: 2,
        size: 3,
        mtime: (1_000, 500),
        ctime: (1_001, 0),
    };

    const BOOT: &str = "0b3e7c5a";

    fn since(mark: Option<String>) -> SinceMark {
        SinceMark {
            disk: DiskName::new("vda").unwrap(),
            size_bytes: 3,
            alignment_bytes: 65536,
            mark,
        }
    }

    #[test]
    fn a_file_is_quiet_when_both_times_are_more_than_two_seconds_old() {
        for (second, nanosecond, quiet) in [
            (1_004, 0, true),
            (1_003, 1, true),
            (1_003, 0, false),
            (1_000, 0, false),
            (0, 0, false),
        ] {
            let now = Timestamp::new(second, nanosecond).unwrap();
            assert_eq!(PRINT.is_quiet(now), quiet, "{second}.{nanosecond}");
        }
    }

    #[test]
    fn an_equal_fingerprint_means_unchanged() {
        let mark = since(PRINT.mark(ImageFormat::Raw, BOOT));
        let changes = PRINT.changes(ImageFormat::Raw, 3, Some(&mark), Some(BOOT));
        assert_eq!(changes, Changes::Extents(Vec::new()));
    }

    #[test]
    fn in_another_boot_an_equal_fingerprint_says_nothing() {
        let mark = since(PRINT.mark(ImageFormat::Raw, BOOT));
        for boot in [Some("another"), None] {
            match PRINT.changes(ImageFormat::Raw, 3, Some(&mark), boot) {
                Changes::Unknown(text) => assert!(text.contains("was started"), "{text}"),
                Changes::Extents(_) => panic!("{boot:?}"),
            }
        }
    }

    #[test]
    fn whatever_differs_is_named() {
        let later = |change: fn(&mut Fingerprint)| {
            let mut print = PRINT;
            change(&mut print);
            print
        };
        let cases = [
            (later(|print| print.dev = 9), "another file"),
            (later(|print| print.inode = 9), "another file"),
            (later(|print| print.size = 9), "changed from 3 to 9"),
            (later(|print| print.mtime.1 = 9), "mtime"),
            (later(|print| print.ctime.0 = 9), "ctime"),
        ];
        let mark = since(PRINT.mark(ImageFormat::Raw, BOOT));
        for (print, reason) in cases {
            match print.changes(ImageFormat::Raw, 3, Some(&mark), Some(BOOT)) {
                Changes::Unknown(text) => assert!(text.contains(reason), "{text}"),
                Changes::Extents(_) => panic!("{print:?} was taken for unchanged"),
            }
        }
    }

    #[test]
    fn a_mark_of_another_format_size_or_source_says_nothing() {
        let raw = since(PRINT.mark(ImageFormat::Raw, BOOT));
        let boot = format!("\"boot\":\"{BOOT}\",");
        let without_boot = raw.mark.as_ref().unwrap().replace(&boot, "");
        assert_ne!(Some(&without_boot), raw.mark.as_ref());
        let mut resized = raw.clone();
        resized.size_bytes = 4;
        let cases = [
            (ImageFormat::Qcow2, Some(raw)),
            (ImageFormat::Raw, Some(resized)),
            (ImageFormat::Raw, Some(since(None))),
            (ImageFormat::Raw, Some(since(Some("bk-c1-1".to_string())))),
            (ImageFormat::Raw, Some(since(Some("{}".to_string())))),
            (ImageFormat::Raw, Some(since(Some(without_boot)))),
            (ImageFormat::Raw, None),
        ];
        for (format, mark) in cases {
            let changes = PRINT.changes(format, 3, mark.as_ref(), Some(BOOT));
            assert!(matches!(changes, Changes::Unknown(_)), "{mark:?}");
        }
    }
}
