//! A domain that is shut off: its images are read as they lie.
//!
//! libvirt opens no backup of an inactive domain. The locks of the images decide a race with its
//! start: while we read, QEMU cannot open them for writing, and an image in use is refused.

use super::domain::{Disk, Domain, Source};
use super::nvram::Nvram;
use crate::hypervisor::image::{ImageDisk, ImageFormat, ImageSource};
use crate::hypervisor::{
    Capture, CaptureError, CaptureErrorKind, CapturedDisk, Consistency, Hypervisor, Outcome,
    Reading, SinceMark,
};
use jiff::Timestamp;
use std::path::PathBuf;

pub(super) const NOTE: &str = "the domain is shut off: its images were read";

pub(super) struct OfflineCapture {
    images: Box<dyn Capture>,
    nvram: Option<Nvram>,
    definition: (String, Vec<u8>),
    notes: Vec<String>,
}

impl OfflineCapture {
    pub(super) fn open(
        domain: &Domain,
        definition: (String, Vec<u8>),
        nvram: Option<Nvram>,
        mut notes: Vec<String>,
        runtime_dir: PathBuf,
        now: Timestamp,
        (since, reading): (&[SinceMark], Reading),
    ) -> Result<Self, CaptureError> {
        let disks = domain
            .disks
            .iter()
            .map(image)
            .collect::<Result<Vec<ImageDisk>, CaptureError>>()?;
        // Marks of images tell that a VM stayed off; those of checkpoints say nothing to them.
        let images = ImageSource::new(disks, runtime_dir, now).open(since, reading)?;
        notes.push(NOTE.to_string());
        notes.extend_from_slice(images.notes());
        Ok(OfflineCapture {
            images,
            nvram,
            definition,
            notes,
        })
    }
}

fn image(disk: &Disk) -> Result<ImageDisk, CaptureError> {
    let invalid = |detail: String| CaptureError::new(CaptureErrorKind::Invalid, &disk.name, detail);
    let format = match disk.format.as_str() {
        "raw" => ImageFormat::Raw,
        "qcow2" => ImageFormat::Qcow2,
        other => {
            return Err(invalid(format!(
                "the domain is shut off, and an image of type {other} cannot be read without it; \
                 back it up while it runs"
            )));
        }
    };
    match disk.source.path() {
        Some(path) => Ok(ImageDisk {
            name: disk.name.clone(),
            path,
            format,
        }),
        None => Err(invalid(format!(
            "the domain is shut off, and its source ({}) is no file or block device of this \
             host; back it up while it runs",
            Source::identity(&disk.source)
        ))),
    }
}

impl Capture for OfflineCapture {
    fn disks(&self) -> Vec<&dyn CapturedDisk> {
        let mut disks = self.images.disks();
        disks.extend(self.nvram.as_ref().map(|nvram| nvram as &dyn CapturedDisk));
        disks
    }

    fn definition(&self) -> Option<(&str, &[u8])> {
        Some((&self.definition.0, &self.definition.1))
    }

    fn consistency(&self) -> Consistency {
        Consistency::Image
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    fn still_consistent(&self) -> Result<(), CaptureError> {
        self.images.still_consistent()
    }

    fn close(self: Box<Self>, outcome: Outcome) -> Result<(), CaptureError> {
        self.images.close(outcome)
    }
}
