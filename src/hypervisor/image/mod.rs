//! The source for stopped VMs: images and block devices as they lie on this host.
//!
//! A raw file or device is read directly and its content is never looked at: whatever a guest
//! writes to its first sector, raw stays raw. A qcow2 image is read through `qemu-nbd`; it must
//! stand alone, without backing file, external data file or encryption.
//!
//! One instant, because nobody writes: an image that a QEMU has open for writing and a device
//! that the kernel has in use are refused, and `still_consistent` looks again before the commit.
//! A file's size and times tell that it was not changed meanwhile; of a block device it is what the
//! kernel counts as written to it, and which processes have it open for writing.
//!
//! The mark of a disk is the fingerprint of its file. Equal fingerprints mean an unchanged file,
//! so a VM that stays off costs nothing until the host is started anew. Times of the file system
//! are trusted for that only where they can tell two writes apart; see `fingerprint`.

mod fingerprint;
mod header;
#[cfg(any(test, fuzzing))]
pub(super) mod hostile_bytes;
mod opened;
mod qcow2;
mod raw;

use super::qemu_nbd;
use super::{
    Capture, CaptureError, CaptureErrorKind, CapturedDisk, Consistency, Hypervisor, Outcome,
    Reading, SinceMark,
};
use crate::model::DiskName;
use jiff::Timestamp;
use opened::OpenedImage;
use qcow2::Qcow2Disk;
use raw::RawDisk;
use std::path::PathBuf;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFormat {
    /// The bytes of the file or block device are the bytes of the disk.
    Raw,
    Qcow2,
}

impl ImageFormat {
    fn as_str(self) -> &'static str {
        match self {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
        }
    }
}

/// A disk as the configuration names it. The format is never guessed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageDisk {
    pub name: DiskName,
    pub path: PathBuf,
    pub format: ImageFormat,
}

/// The images of one stopped VM.
#[derive(Debug, Clone)]
pub struct ImageSource {
    disks: Vec<ImageDisk>,
    runtime_dir: PathBuf,
    now: Timestamp,
}

impl ImageSource {
    /// `runtime_dir`: where sockets may be placed, private to this agent. `now`: a time not later
    /// than `open` is called; an earlier one only makes fewer marks.
    pub fn new(disks: Vec<ImageDisk>, runtime_dir: PathBuf, now: Timestamp) -> Self {
        ImageSource {
            disks,
            runtime_dir,
            now,
        }
    }
}

impl Hypervisor for ImageSource {
    /// Images are read wherever they are asked to be.
    fn open(&self, since: &[SinceMark], _: Reading) -> Result<Box<dyn Capture>, CaptureError> {
        let Some(first) = self.disks.first() else {
            return Err(CaptureError::new(
                CaptureErrorKind::Invalid,
                "disks",
                "the VM has no disks",
            ));
        };
        let mut names: Vec<&DiskName> = self.disks.iter().map(|disk| &disk.name).collect();
        names.sort();
        names.dedup();
        if names.len() != self.disks.len() {
            return Err(CaptureError::new(
                CaptureErrorKind::Invalid,
                &first.name,
                "two disks of the VM have the same name",
            ));
        }
        // All files are looked at before the first server starts: one that is missing or in use
        // costs nothing, and the instant is as short as it can be.
        let opened = self
            .disks
            .iter()
            .map(|disk| OpenedImage::open(disk, self.now))
            .collect::<Result<Vec<OpenedImage>, CaptureError>>()?;
        let notes = opened.iter().filter_map(OpenedImage::note).collect();
        let disks = opened
            .into_iter()
            .map(|image| match image.format() {
                ImageFormat::Raw => {
                    RawDisk::new(image, since).map(|disk| Box::new(disk) as Box<dyn ImageReader>)
                }
                ImageFormat::Qcow2 => Qcow2Disk::new(image, &self.runtime_dir, since)
                    .map(|disk| Box::new(disk) as Box<dyn ImageReader>),
            })
            .collect::<Result<Vec<_>, CaptureError>>()?;
        Ok(Box::new(ImageCapture { disks, notes }))
    }

    fn recover(&self) -> Result<Vec<String>, CaptureError> {
        qemu_nbd::remove_dead(&self.runtime_dir).map(|()| Vec::new())
    }

    /// The marks of images are kept in restore points only.
    fn release(&self) -> Result<Vec<String>, CaptureError> {
        Ok(Vec::new())
    }
}

/// A captured disk of this source.
trait ImageReader: CapturedDisk {
    fn image(&self) -> &OpenedImage;
    fn as_disk(&self) -> &dyn CapturedDisk;
    fn close(self: Box<Self>) -> Result<(), CaptureError>;
}

struct ImageCapture {
    disks: Vec<Box<dyn ImageReader>>,
    notes: Vec<String>,
}

impl Capture for ImageCapture {
    fn disks(&self) -> Vec<&dyn CapturedDisk> {
        self.disks.iter().map(|disk| disk.as_disk()).collect()
    }

    /// Images do not know of what VM they are part.
    fn definition(&self) -> Option<(&str, &[u8])> {
        None
    }

    fn consistency(&self) -> Consistency {
        Consistency::Image
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    fn still_consistent(&self) -> Result<(), CaptureError> {
        self.disks
            .iter()
            .try_for_each(|disk| disk.image().still_unchanged())
    }

    /// Nothing was changed by reading, so all outcomes end alike.
    fn close(self: Box<Self>, _: Outcome) -> Result<(), CaptureError> {
        // Every server is ended, and the first error is told.
        let mut result = Ok(());
        for disk in self.disks {
            result = result.and(disk.close());
        }
        result
    }
}
