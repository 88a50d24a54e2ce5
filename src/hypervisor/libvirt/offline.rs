//! A domain that is shut off: its images are read as they lie.
//!
//! libvirt opens no backup of an inactive domain. An image in use is refused, and when all is read
//! both the images and libvirt are asked whether the domain was started meanwhile.

use super::domain::{Disk, Domain, Source};
use super::nvram::Nvram;
use super::virsh::Virsh;
use super::{LibvirtSettings, find};
use crate::hypervisor::image::{ImageDisk, ImageFormat, ImageSource};
use crate::hypervisor::{
    Capture, CaptureError, CaptureErrorKind, CapturedDisk, Consistency, Hypervisor, Outcome,
    Reading, SinceMark,
};
use std::sync::Arc;

pub(super) const NOTE: &str = "the domain is shut off: its images were read";

pub(super) struct OfflineCapture {
    virsh: Arc<dyn Virsh>,
    uuid: String,
    images: Box<dyn Capture>,
    nvram: Option<Nvram>,
    definition: (String, Vec<u8>),
    notes: Vec<String>,
}

impl OfflineCapture {
    pub(super) fn open(
        virsh: &Arc<dyn Virsh>,
        domain: &Domain,
        definition: (String, Vec<u8>),
        nvram: Option<Nvram>,
        mut notes: Vec<String>,
        settings: &LibvirtSettings,
        (since, reading): (&[SinceMark], Reading),
    ) -> Result<Self, CaptureError> {
        let disks = domain
            .disks
            .iter()
            .map(image)
            .collect::<Result<Vec<ImageDisk>, CaptureError>>()?;
        // Marks of images tell that a VM stayed off; those of checkpoints say nothing to them.
        let images = ImageSource::new(disks, settings.runtime_dir.clone(), settings.now)
            .open(since, reading)?;
        notes.push(NOTE.to_string());
        notes.extend_from_slice(images.notes());
        Ok(OfflineCapture {
            virsh: Arc::clone(virsh),
            uuid: domain.uuid.clone(),
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
        self.images.still_consistent()?;
        let domain = find(&*self.virsh, &self.uuid)?;
        match domain.active {
            false => Ok(()),
            true => Err(CaptureError::new(
                CaptureErrorKind::Inconsistent,
                domain.name,
                "the domain was started while its images were read; the next backup reads it running",
            )),
        }
    }

    fn close(self: Box<Self>, outcome: Outcome) -> Result<(), CaptureError> {
        self.images.close(outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::super::LibvirtSource;
    use super::super::testing::{Say, Script, UUID};
    use super::*;
    use crate::hypervisor::Freeze;
    use jiff::Timestamp;
    use std::time::Duration;

    #[test]
    fn a_domain_that_was_started_while_its_images_were_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("vda.raw");
        std::fs::write(&image, [7; 65536]).unwrap();
        let xml = |id: &str| -> &'static str {
            let image = image.display();
            let xml = format!(
                "<domain{id}><name>db</name><uuid>{UUID}</uuid><devices><disk type='file'>\
                 <driver type='raw'/><source file='{image}'/><target dev='vda'/></disk>\
                 </devices></domain>"
            );
            Box::leak(xml.into_boxed_str())
        };
        let (off, running) = (xml(""), xml(" id='1'"));
        let answers = [off, off, off, running].map(|xml| ("dumpxml", Say::Yes(xml)));
        let source = LibvirtSource {
            settings: LibvirtSettings {
                domain: "db".to_string(),
                uri: None,
                owner: "o".to_string(),
                scratch_dir: folder.path().to_path_buf(),
                scratch_reserve_bytes: 0,
                runtime_dir: folder.path().join("run"),
                freeze: Freeze::Never,
                freeze_limit: Duration::from_secs(1),
                guard: None,
                virsh: "virsh".into(),
                now: Timestamp::MAX,
            },
            virsh: Arc::new(Script::new(answers.to_vec())),
        };
        let capture = source.open(&[], Reading::Everything).unwrap();
        capture.still_consistent().unwrap();
        let error = capture.still_consistent().unwrap_err();
        assert_eq!(error.kind, CaptureErrorKind::Inconsistent);
        assert!(error.detail.contains("was started"), "{error}");
    }
}
