//! Disks, drives and what is in them.

use super::super::NVRAM;
use super::super::xml::escaped;
use super::edits::{child, children, value};
use super::{Making, RestoredDisk};
use crate::hypervisor::image::ImageFormat;
use roxmltree::Node;

impl Making<'_, '_> {
    pub(super) fn disk(&mut self, disk: Node<'_, '_>) {
        let name = child(disk, "target").map_or("", |target| value(target, "dev"));
        match value(disk, "device") {
            "cdrom" => self.drive(disk, name),
            "floppy" => self.drive(disk, name),
            "" | "disk" => match self.restored(name) {
                Some(restored) if name != NVRAM && !self.used.contains(&restored.name) => {
                    self.used.insert(restored.name.clone());
                    self.restored_disk(disk, restored);
                }
                _ => self.absent(disk, name),
            },
            _ => self.absent(disk, name),
        }
    }

    fn absent(&mut self, disk: Node<'_, '_>, name: &str) {
        self.edits.remove(disk);
        self.note(format!(
            "the disk {} is left out: it is not restored",
            shown(name)
        ));
    }

    /// The guest finds the disk where it was (address, serial number, bus), with other bytes below.
    fn restored_disk(&mut self, disk: Node<'_, '_>, restored: &RestoredDisk) {
        let format = match restored.format {
            ImageFormat::Raw => "raw",
            ImageFormat::Qcow2 => "qcow2",
        };
        self.edits.set_attribute(disk, "type", "file");
        // Of SCSI devices of the host.
        for attribute in ["rawio", "sgio"] {
            self.edits.remove_attribute(disk, attribute);
        }
        self.forget_source(disk);
        for other in ["readonly", "shareable", "transient"] {
            self.edits.remove_children(disk, other);
        }
        let mut drivers = children(disk, "driver");
        match drivers.next() {
            Some(driver) => {
                self.edits.set_attribute(driver, "type", format);
                if restored.format == ImageFormat::Raw {
                    self.edits.remove_attribute(driver, "discard_no_unref");
                    self.edits.remove_children(driver, "metadata_cache");
                }
            }
            None => self
                .edits
                .insert_into(disk, &format!("<driver name='qemu' type='{format}'/>")),
        }
        drivers.for_each(|further| self.edits.remove(further));
        let path = escaped(&restored.path);
        self.edits
            .insert_into(disk, &format!("<source file='{path}'/>"));
        let encrypted = child(disk, "encryption").is_some()
            || children(disk, "source").any(|source| child(source, "encryption").is_some());
        if encrypted {
            self.note(format!(
                "the image of {} was encrypted; the restored one is not",
                restored.name
            ));
        }
    }

    fn forget_source(&mut self, disk: Node<'_, '_>) {
        for old in ["source", "backingStore", "mirror", "auth", "encryption"] {
            self.edits.remove_children(disk, old);
        }
    }

    /// A medium that is only read stays, if it is there when the domain starts.
    fn drive(&mut self, disk: Node<'_, '_>, name: &str) {
        let Some(source) = child(disk, "source") else {
            return;
        };
        let is_read_only = value(disk, "device") == "cdrom" || child(disk, "readonly").is_some();
        let is_one_file = value(disk, "type") == "file"
            && !value(source, "file").is_empty()
            && children(disk, "source").count() == 1;
        if is_read_only && is_one_file {
            self.edits
                .set_attribute(source, "startupPolicy", "optional");
            self.edits.remove_children(disk, "backingStore");
            self.edits.remove_children(disk, "mirror");
            return;
        }
        self.edits.set_attribute(disk, "type", "file");
        self.forget_source(disk);
        self.note(format!("the drive {} is left empty", shown(name)));
    }
}

fn shown(name: &str) -> String {
    match name {
        "" => "without a name".to_string(),
        name => name
            .chars()
            .filter(|letter| !letter.is_control())
            .take(40)
            .collect(),
    }
}
