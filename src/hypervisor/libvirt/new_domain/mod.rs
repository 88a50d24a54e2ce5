//! The definition of a new domain, made from the one in a restore point: a pure function.
//!
//! The new domain can run beside the one that was backed up. It has a name of its own, the restored
//! disks, and nothing on the host that it would share with the other one: what is not known to be
//! harmless to share is taken out, and each such thing is told. With its identity kept it takes the
//! other one's place instead, and only what the restore itself changes is changed.
//!
//! The result is read again and checked before it is given away: it writes to restored files only.

mod check;
mod device;
mod disk;
mod edits;
#[cfg(test)]
mod tests;

use super::xml::{self, escaped};
use crate::hypervisor::image::ImageFormat;
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use crate::model::DiskName;
use edits::{Edits, child, children, is, value};
use roxmltree::Node;
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

const QEMU_NAMESPACE: &str = "http://libvirt.org/schemas/domain/qemu/1.0";

/// A name that a new domain may get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainName(String);

impl FromStr for DomainName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = |why: &str| Err(format!("{why}, as the name of a domain"));
        match text {
            "" => refused("this is empty"),
            _ if text.len() > 200 => refused("this is longer than 200 bytes"),
            // virsh takes these for options and for ids of running domains.
            _ if text.starts_with('-') => refused("this begins with a dash"),
            _ if text.bytes().all(|byte| byte.is_ascii_digit()) => refused("this is a number"),
            _ if super::domain::is_uuid(text) => refused("this looks like a UUID"),
            _ if text.starts_with('.') => refused("this begins with a dot"),
            _ if text
                .chars()
                .any(|letter| letter == '/' || letter.is_control()) =>
            {
                refused("this has a slash or a control character")
            }
            _ if text.trim() != text => refused("this begins or ends with a space"),
            _ => Ok(DomainName(text.to_string())),
        }
    }
}

impl DomainName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a disk of the restore point will be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoredDisk {
    pub name: DiskName,
    /// Absolute, and without control characters.
    pub path: String,
    pub format: ImageFormat,
}

/// What the new domain shall be.
#[derive(Debug, Clone)]
pub struct Wish<'w> {
    pub name: &'w DomainName,
    /// It takes the place of the one that was backed up: UUID, MAC addresses, and all that it has
    /// on the host.
    pub keep_identity: bool,
    /// Everything that is restored, also the firmware's variables.
    pub restored: &'w [RestoredDisk],
}

/// A domain that can be defined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewDomain {
    pub name: DomainName,
    pub xml: String,
    /// What the new domain has not, or has otherwise.
    pub notes: Vec<String>,
    /// The UUID that it keeps.
    pub kept_uuid: Option<String>,
}

/// Makes a new domain of the definition in a restore point.
pub fn new_domain(definition: &[u8], wish: &Wish<'_>) -> Result<NewDomain, CaptureError> {
    let invalid = |detail: String| {
        CaptureError::new(
            CaptureErrorKind::Invalid,
            "the domain in the restore point",
            detail,
        )
    };
    let text =
        std::str::from_utf8(definition).map_err(|_| invalid("its XML is no text".to_string()))?;
    let document = xml::parse(text).map_err(invalid)?;
    let root = document.root_element();
    if !is(root, "domain") {
        return Err(invalid("its XML is not that of a domain".to_string()));
    }
    let mut making = Making {
        wish,
        edits: Edits::of(text),
        notes: Vec::new(),
        used: BTreeSet::new(),
    };
    making.root(root);
    if !wish.restored.iter().any(|restored| {
        making.used.contains(&restored.name) && restored.name.as_str() != super::NVRAM
    }) {
        return Err(invalid(
            "none of the restored disks belongs to it".to_string(),
        ));
    }
    for restored in wish.restored {
        if !making.used.contains(&restored.name) {
            making.notes.push(format!(
                "{} is restored, but the definition has no such disk: it is not part of the new \
                 domain",
                restored.name
            ));
        }
    }
    let Making { edits, notes, .. } = making;
    let confused = |detail: &str| {
        invalid(format!(
            "it cannot be adapted: {detail}; restore without --define and adapt it by hand"
        ))
    };
    let xml = edits
        .apply()
        .ok_or_else(|| confused("two changes are about the same place"))?;
    check::check(&xml, wish).map_err(|detail| confused(&detail))?;
    let kept_uuid = child(root, "uuid")
        .and_then(|uuid| uuid.text())
        .filter(|_| wish.keep_identity)
        .map(|uuid| uuid.trim().to_string());
    Ok(NewDomain {
        name: wish.name.clone(),
        xml,
        notes,
        kept_uuid,
    })
}

struct Making<'w, 't> {
    wish: &'w Wish<'w>,
    edits: Edits<'t>,
    notes: Vec<String>,
    /// The restored disks that the domain has.
    used: BTreeSet<DiskName>,
}

impl<'w> Making<'w, '_> {
    fn restored(&self, name: &str) -> Option<&'w RestoredDisk> {
        let mut all = self.wish.restored.iter();
        all.find(|restored| restored.name.as_str() == name)
    }

    fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    /// Removes something of the host that cannot be shared.
    fn take_out(&mut self, node: Node<'_, '_>, what: &str) {
        self.edits.remove(node);
        self.note(format!(
            "{what} is left out: the domain that was backed up may use it (with --keep-identity it \
             stays)"
        ));
    }

    fn root(&mut self, root: Node<'_, '_>) {
        let keep = self.wish.keep_identity;
        self.edits.remove_attribute(root, "id");
        self.edits.remove_children(root, "name");
        let name = escaped(self.wish.name.as_str());
        self.edits
            .insert_into(root, &format!("<name>{name}</name>"));
        for genid in children(root, "genid") {
            // It tells the guest that it was taken back in time, which it is in any case.
            self.edits.replace(genid, "<genid/>");
        }
        for (number, os) in children(root, "os").enumerate() {
            self.firmware(os, number == 0);
        }
        if !keep {
            self.edits.remove_children(root, "uuid");
            self.edits.remove_children(root, "hwuuid");
            for system in children(root, "sysinfo").flat_map(|info| children(info, "system")) {
                for entry in
                    children(system, "entry").filter(|entry| value(*entry, "name") == "uuid")
                {
                    self.edits.remove(entry);
                }
            }
        }
        let command_lines = root.children().filter(|node| {
            node.tag_name().name() == "commandline"
                && node.tag_name().namespace() == Some(QEMU_NAMESPACE)
        });
        for command_line in command_lines {
            match keep {
                false => self.take_out(command_line, "what it adds to QEMU's command line"),
                true => self.note(
                    "what it adds to QEMU's command line stays as it was; see that it names no \
                     disk",
                ),
            }
        }
        for devices in children(root, "devices") {
            for device in devices.children().filter(Node::is_element) {
                match is(device, "disk") {
                    true => self.disk(device),
                    false => self.device(device),
                }
            }
        }
    }

    /// The firmware's variables, which belong to the first `os`.
    fn firmware(&mut self, os: Node<'_, '_>, first: bool) {
        let writable = children(os, "loader")
            .any(|loader| value(loader, "type") == "pflash" && value(loader, "readonly") == "no");
        if writable {
            self.note("the image of its firmware is writable and not restored: it is shared");
        }
        let restored = self.restored(super::NVRAM).filter(|_| first);
        let mut found = children(os, "nvram");
        let nvram = found.next();
        found.for_each(|further| self.edits.remove(further));
        if let Some(restored) = restored {
            self.used.insert(restored.name.clone());
        }
        match (nvram, restored) {
            (Some(nvram), Some(restored)) => {
                let how = ["template", "templateFormat", "format"];
                let attributes = self.edits.attributes_of(nvram, &how);
                let path = escaped(&restored.path);
                self.edits
                    .replace(nvram, format!("<nvram{attributes}>{path}</nvram>"));
            }
            // libvirt had chosen the file by itself.
            (None, Some(restored)) => {
                let path = escaped(&restored.path);
                self.edits
                    .insert_into(os, &format!("<nvram>{path}</nvram>"));
            }
            (Some(nvram), None) => {
                let attributes = self
                    .edits
                    .attributes_of(nvram, &["template", "templateFormat"]);
                let with = match attributes.is_empty() {
                    true => String::new(),
                    false => format!("<nvram{attributes}/>"),
                };
                self.edits.replace(nvram, with);
                self.note("the firmware's variables are not restored: it starts with fresh ones");
            }
            (None, None) => {}
        }
    }
}
