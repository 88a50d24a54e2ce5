//! The header of a qcow2 image, read by ourselves before QEMU opens it: an image that refers to
//! other files is not the whole disk, and its references are the guest owner's, not ours to follow.

use crate::model::MAX_DISK_BYTES;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Header and extensions lie in the first cluster; the smallest ones that are written are 64 KiB.
const HEADER_BYTES: usize = 64 * 1024;
const MAGIC: u32 = 0x5146_49fb;
const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
const EXTENSION_ENCRYPTION: u32 = 0x0537_be77;

/// What of the header decides whether the image can be read on its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    size: u64,
    has_backing: bool,
    encryption: u32,
    incompatible: u64,
    extensions: Vec<u32>,
}

impl Header {
    /// The outer error is the disk's, the inner one the image's.
    pub(super) fn read(file: &File) -> io::Result<Result<Self, String>> {
        let mut bytes = vec![0; HEADER_BYTES];
        let mut filled = 0;
        while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match file.read_at(rest, filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        bytes.truncate(filled);
        Ok(Self::parse(&bytes))
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let short = || "is not a qcow2 image: its header is cut off".to_string();
        let u32_at = |at: usize| {
            bytes
                .get(at..)
                .and_then(|rest| rest.first_chunk())
                .map(|field| u32::from_be_bytes(*field))
                .ok_or_else(short)
        };
        let u64_at = |at: usize| {
            bytes
                .get(at..)
                .and_then(|rest| rest.first_chunk())
                .map(|field| u64::from_be_bytes(*field))
                .ok_or_else(short)
        };
        if u32_at(0)? != MAGIC {
            return Err("is not a qcow2 image; if it is a raw one, configure it so".to_string());
        }
        let version = u32_at(4)?;
        let (incompatible, length) = match version {
            2 => (0, 72),
            3 => (u64_at(72)?, u32_at(100)? as usize),
            _ => {
                return Err(format!(
                    "is a qcow2 image of version {version}; 2 and 3 are known"
                ));
            }
        };
        if version == 3 && !(104..=HEADER_BYTES).contains(&length) {
            return Err("has a qcow2 header of impossible length".to_string());
        }
        let cluster_bits = u32_at(20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err("has qcow2 clusters of impossible size".to_string());
        }
        let cluster = 1usize << cluster_bits;
        let mut extensions = Vec::new();
        let mut at = length;
        // A chain that does not end within the first cluster is one that QEMU refuses, too.
        while at + 8 <= cluster.min(bytes.len()) {
            let (kind, length) = (u32_at(at)?, u32_at(at + 4)? as usize);
            if kind == 0 {
                break;
            }
            extensions.push(kind);
            at += 8 + length.div_ceil(8).saturating_mul(8).min(HEADER_BYTES);
        }
        Ok(Header {
            size: u64_at(24)?,
            has_backing: u64_at(8)? != 0 || u32_at(16)? != 0,
            encryption: u32_at(32)?,
            incompatible,
            extensions,
        })
    }

    /// The size of the disk, if the image is the whole of it.
    pub(super) fn standalone_size(&self) -> Result<u64, String> {
        let refuse = |reason: &str| Err(reason.to_string());
        if self.has_backing {
            return refuse(
                "has a backing file, so it is only part of the disk; flatten it \
                 (qemu-img rebase -b \"\" IMAGE, or qemu-img convert -O qcow2 IMAGE NEW), \
                 or configure qmp or libvirt for this VM",
            );
        }
        if self.incompatible & EXTERNAL_DATA != 0 || self.extensions.contains(&EXTENSION_DATA_FILE)
        {
            return refuse(
                "has an external data file; make it one file \
                 (qemu-img convert -O qcow2 IMAGE NEW), or configure qmp or libvirt for this VM",
            );
        }
        if self.encryption != 0 || self.extensions.contains(&EXTENSION_ENCRYPTION) {
            return refuse(
                "is encrypted by QEMU and cannot be read without its key; configure qmp or \
                 libvirt for this VM, or decrypt it (qemu-img convert)",
            );
        }
        if self.incompatible & CORRUPT != 0 {
            return refuse("is marked as corrupt; run qemu-img check -r all on it");
        }
        if self.incompatible & !(DIRTY | COMPRESSION_TYPE | EXTENDED_L2) != 0 {
            return refuse("uses qcow2 features that are not known here");
        }
        match self.size {
            0 => refuse("holds a disk of no bytes"),
            size if size > MAX_DISK_BYTES => Err(format!(
                "holds a disk of {size} bytes; at most {MAX_DISK_BYTES} are possible"
            )),
            size => Ok(size),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(version: u32, change: impl Fn(&mut [u8])) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        bytes[0..4].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[4..8].copy_from_slice(&version.to_be_bytes());
        bytes[20..24].copy_from_slice(&16u32.to_be_bytes());
        bytes[24..32].copy_from_slice(&(1u64 << 30).to_be_bytes());
        bytes[100..104].copy_from_slice(&104u32.to_be_bytes());
        if version == 2 {
            bytes[72..].fill(0);
        }
        change(&mut bytes);
        bytes
    }

    fn size(bytes: &[u8]) -> Result<u64, String> {
        Header::parse(bytes).and_then(|header| header.standalone_size())
    }

    #[test]
    fn a_plain_image_is_accepted() {
        assert_eq!(size(&image(2, |_| {})), Ok(1 << 30));
        assert_eq!(size(&image(3, |_| {})), Ok(1 << 30));
        // Dirty, zstd and extended L2 are QEMU's own business.
        assert_eq!(size(&image(3, |bytes| bytes[79] = 0b11001)), Ok(1 << 30));
    }

    #[test]
    fn whatever_is_not_the_whole_disk_is_refused_with_advice() {
        type Change = fn(&mut [u8]);
        let cases: [(Change, &str); 11] = [
            (|bytes| bytes[15] = 1, "backing"),
            (|bytes| bytes[19] = 1, "backing"),
            (|bytes| bytes[79] = 4, "data file"),
            (
                |bytes| bytes[104..112].copy_from_slice(b"DATA\0\0\0\x04"),
                "data file",
            ),
            (|bytes| bytes[35] = 2, "encrypted"),
            (|bytes| bytes[79] = 2, "corrupt"),
            (|bytes| bytes[79] = 32, "features"),
            (|bytes| bytes[7] = 4, "version 4"),
            (|bytes| bytes[0] = 0, "raw"),
            (|bytes| bytes[24..32].fill(0), "no bytes"),
            (|bytes| bytes[24..32].fill(0xff), "at most"),
        ];
        for (change, reason) in cases {
            let error = size(&image(3, change)).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn an_extension_behind_a_long_one_is_seen() {
        let bytes = image(3, |bytes| {
            bytes[104..112].copy_from_slice(&[0x68, 3, 0xf8, 0x57, 0, 0, 0, 9]);
            bytes[128..136].copy_from_slice(b"DATA\0\0\0\0");
        });
        assert!(size(&bytes).unwrap_err().contains("data file"));
    }

    #[test]
    fn no_header_makes_the_parser_panic() {
        let whole = image(3, |_| {});
        for cut in 0..256 {
            let _ = size(&whole[..cut]);
        }
        for at in 0..256 {
            for byte in [0, 1, 0x7f, 0x80, 0xff] {
                let _ = size(&image(3, |bytes| bytes[at] = byte));
            }
        }
    }
}
