//! An image file or block device, opened for reading and known to be in nobody's use.

use super::fingerprint::{self, Fingerprint};
use super::{ImageDisk, ImageFormat};
use crate::hypervisor::writer::{self, Writers, Written};
use crate::hypervisor::{CaptureError, CaptureErrorKind, Changes, SinceMark};
use crate::model::{DiskName, MAX_DISK_BYTES};
use jiff::Timestamp;
use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

/// What tells whether the image is still the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Identity {
    File(Fingerprint),
    Device {
        number: u64,
        length: u64,
        written: Option<Written>,
    },
}

pub(super) struct OpenedImage {
    disk: ImageDisk,
    file: File,
    identity: Identity,
    /// Length of the file or device.
    length: u64,
    mark: Option<String>,
    /// Whether somebody writes to it could not be told.
    has_untold_writers: bool,
}

impl OpenedImage {
    pub(super) fn open(disk: &ImageDisk, now: Timestamp) -> Result<Self, CaptureError> {
        let image = Self::open_once(disk, now)?;
        // A file that was written to just now: a write after our look at it could hide in the same
        // tick of the file system's clock. Wait until ticks have passed, and look again.
        if let Identity::File(print) = image.identity
            && !print.is_quiet(now)
        {
            std::thread::sleep(match print.is_of_a_coarse_clock() {
                true => Duration::from_millis(2100),
                false => Duration::from_millis(50),
            });
            image.still_unchanged()?;
        }
        Ok(image)
    }

    fn open_once(disk: &ImageDisk, now: Timestamp) -> Result<Self, CaptureError> {
        let failed = |error: io::Error| io_error(disk, error);
        // Looked at before it is opened: opening a pipe waits for its writer, and a tape rewinds.
        let found = fs::metadata(&disk.path).map_err(failed)?;
        let kind = FileType::from_raw_mode(found.mode());
        let exclusive = match (kind, disk.format) {
            (FileType::RegularFile, _) => OFlags::empty(),
            (FileType::BlockDevice, ImageFormat::Raw) => OFlags::EXCL,
            (FileType::BlockDevice, ImageFormat::Qcow2) => {
                return Err(invalid(
                    disk,
                    "a qcow2 image on a block device cannot be read",
                ));
            }
            (other, _) => {
                return Err(invalid(
                    disk,
                    format!("is {}, not a file or block device", kind_name(other)),
                ));
            }
        };
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | exclusive;
        let file = match rustix::fs::open(&disk.path, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::BUSY) => {
                return Err(inconsistent(
                    disk,
                    "the device is mounted or otherwise in use by this host",
                ));
            }
            Err(error) => return Err(failed(error.into())),
        };
        let metadata = file.metadata().map_err(failed)?;
        if (metadata.dev(), metadata.ino(), metadata.mode())
            != (found.dev(), found.ino(), found.mode())
        {
            return Err(inconsistent(disk, "was replaced while it was opened"));
        }
        let writers = writer::of(&file).map_err(failed)?;
        if let Writers::Somebody(writer) = &writers {
            return Err(inconsistent(disk, in_use(writer)));
        }
        let length = length_of(&file, kind).map_err(failed)?;
        if length == 0 {
            return Err(invalid(disk, "is empty"));
        }
        if length > MAX_DISK_BYTES {
            return Err(invalid(
                disk,
                format!("has {length} bytes; at most {MAX_DISK_BYTES} are possible"),
            ));
        }
        let (identity, mark) = match kind {
            FileType::BlockDevice => {
                let device = Identity::Device {
                    number: metadata.rdev(),
                    length,
                    written: Written::to(&file).map_err(failed)?,
                };
                (device, None)
            }
            _ => {
                let print = Fingerprint::of(&metadata);
                let lasting = print.is_quiet(now) && fingerprint::is_on_this_host(&file);
                let boot = fingerprint::boot().filter(|_| lasting);
                let mark = boot.and_then(|boot| print.mark(disk.format, &boot));
                (Identity::File(print), mark)
            }
        };
        Ok(OpenedImage {
            disk: disk.clone(),
            file,
            identity,
            length,
            mark,
            has_untold_writers: writers == Writers::Untold,
        })
    }

    pub(super) fn name(&self) -> &DiskName {
        &self.disk.name
    }

    pub(super) fn format(&self) -> ImageFormat {
        self.disk.format
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn length(&self) -> u64 {
        self.length
    }

    pub(super) fn is_device(&self) -> bool {
        matches!(self.identity, Identity::Device { .. })
    }

    pub(super) fn mark(&self) -> Option<&str> {
        self.mark.as_deref()
    }

    /// What a reader of the point must know.
    pub(super) fn note(&self) -> Option<String> {
        self.has_untold_writers.then(|| {
            format!(
                "{}: whether another process writes to this device cannot be told, for some do not \
                 let vmkeep see what they have open (it needs CAP_SYS_PTRACE)",
                self.shown()
            )
        })
    }

    /// Changes of the disk, which has `size_bytes`, since the newest point.
    pub(super) fn changes(&self, size_bytes: u64, since: &[SinceMark]) -> Changes {
        let since = since.iter().find(|since| since.disk == self.disk.name);
        match self.identity {
            Identity::File(print) => {
                let boot = fingerprint::boot();
                print.changes(self.disk.format, size_bytes, since, boot.as_deref())
            }
            Identity::Device { .. } => {
                Changes::Unknown("a block device keeps no record of changes".to_string())
            }
        }
    }

    /// Whether nobody changed or replaced it since it was opened.
    pub(super) fn still_unchanged(&self) -> Result<(), CaptureError> {
        let failed = |error: io::Error| io_error(&self.disk, error);
        let changed = |detail: &str| {
            Err(inconsistent(
                &self.disk,
                format!("changed while it was read: {detail}"),
            ))
        };
        // One that has ended has left its traces in the times, or in what the kernel counts.
        if let Writers::Somebody(writer) = writer::of(&self.file).map_err(failed)? {
            return changed(&in_use(&writer));
        }
        let ours = self.file.metadata().map_err(failed)?;
        let there = fs::metadata(&self.disk.path).map_err(failed)?;
        match self.identity {
            Identity::File(earlier) => {
                for now in [Fingerprint::of(&ours), Fingerprint::of(&there)] {
                    if let Some(difference) = now.difference(&earlier) {
                        return changed(&difference);
                    }
                }
            }
            Identity::Device {
                number,
                length,
                written,
            } => {
                let is_device = FileType::from_raw_mode(there.mode()) == FileType::BlockDevice;
                if !is_device || there.rdev() != number {
                    return changed("the path leads to another device");
                }
                if length_of(&self.file, FileType::BlockDevice).map_err(failed)? != length {
                    return changed("the device has another size");
                }
                if Written::to(&self.file).map_err(failed)? != written {
                    return changed("something was written to the device");
                }
            }
        }
        Ok(())
    }

    /// For messages: the disk and its path.
    pub(super) fn shown(&self) -> String {
        shown(&self.disk)
    }

    pub(super) fn error(
        &self,
        kind: CaptureErrorKind,
        detail: impl std::fmt::Display,
    ) -> CaptureError {
        CaptureError::new(kind, self.shown(), detail)
    }
}

fn in_use(writer: &str) -> String {
    format!("in use by {writer}; shut the VM down or configure qmp or libvirt for it")
}

/// For messages.
fn kind_name(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "a regular file",
        FileType::Directory => "a directory",
        FileType::BlockDevice => "a block device",
        FileType::CharacterDevice => "a character device",
        FileType::Fifo => "a named pipe",
        FileType::Socket => "a socket",
        _ => "neither a file nor a block device",
    }
}

fn length_of(file: &File, kind: FileType) -> io::Result<u64> {
    match kind {
        // The position is used by nobody: all reads name their offset.
        FileType::BlockDevice => Ok(rustix::fs::seek(file, SeekFrom::End(0))?),
        _ => Ok(file.metadata()?.size()),
    }
}

fn shown(disk: &ImageDisk) -> String {
    format!("{} ({})", disk.name, disk.path.display())
}

fn io_error(disk: &ImageDisk, error: io::Error) -> CaptureError {
    match error.kind() {
        io::ErrorKind::NotFound => CaptureError::new(
            CaptureErrorKind::Missing,
            shown(disk),
            "is not there: is what it lies on mounted, and its path right in the configuration?",
        ),
        _ => CaptureError::new(CaptureErrorKind::Io, shown(disk), error),
    }
}

fn invalid(disk: &ImageDisk, detail: impl std::fmt::Display) -> CaptureError {
    CaptureError::new(CaptureErrorKind::Invalid, shown(disk), detail)
}

fn inconsistent(disk: &ImageDisk, detail: impl std::fmt::Display) -> CaptureError {
    CaptureError::new(CaptureErrorKind::Inconsistent, shown(disk), detail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::writer::testing::{Device, Writer};
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    fn open(device: &Device) -> Result<OpenedImage, CaptureError> {
        let disk = ImageDisk {
            name: "vda".parse().unwrap(),
            path: device.path.clone(),
            format: ImageFormat::Raw,
        };
        OpenedImage::open(&disk, Timestamp::MAX)
    }

    #[test]
    fn a_device_that_another_process_has_open_for_writing_through_another_node_is_refused() {
        let device = Device::new();
        let writer = Writer::start(&device.other_node());
        let error = open(&device).err().expect("a writer has it open");
        assert_eq!(error.kind, CaptureErrorKind::Inconsistent);
        assert!(error.detail.contains("open for writing"), "{error}");
        drop(writer);
        let image = open(&device).unwrap();
        image.still_unchanged().unwrap();
        let _writer = Writer::start(&device.other_node());
        let error = image.still_unchanged().unwrap_err();
        assert!(error.detail.contains("open for writing"), "{error}");
    }

    #[test]
    fn what_was_written_to_a_device_meanwhile_is_seen_when_its_writer_has_gone() {
        let device = Device::new();
        let image = open(&device).unwrap();
        image.file().read_exact_at(&mut [0; 65536], 0).unwrap();
        image.still_unchanged().unwrap();
        let mut node = File::options()
            .write(true)
            .open(device.other_node())
            .unwrap();
        node.write_all(&[8; 4096]).unwrap();
        drop(node);
        let error = image.still_unchanged().unwrap_err();
        assert!(error.detail.contains("written"), "{error}");
    }
}
