//! What must hold of a new domain, whatever it was made of.

use super::super::xml;
use super::edits::{child, children, is, value};
use super::{RestoredDisk, Wish};
use crate::hypervisor::image::ImageFormat;
use roxmltree::Node;
use std::collections::BTreeSet;

/// It has the new name and writes to restored files only, each in its format.
pub(super) fn check(text: &str, wish: &Wish<'_>) -> Result<(), String> {
    let document = xml::parse(text)?;
    let root = document.root_element();
    let names: Vec<_> = children(root, "name").map(|name| name.text()).collect();
    if names != [Some(wish.name.as_str())] {
        return Err("its name is not the new one".to_string());
    }
    if !wish.keep_identity && child(root, "uuid").is_some() {
        return Err("it still has its UUID".to_string());
    }
    let mut used = BTreeSet::new();
    let devices = children(root, "devices").flat_map(|devices| devices.children());
    for disk in devices.filter(|device| is(*device, "disk")) {
        check_disk(disk, wish.restored, &mut used)?;
    }
    for nvram in children(root, "os").flat_map(|os| children(os, "nvram")) {
        let path = nvram.text().unwrap_or_default();
        let restored = wish.restored.iter().any(|disk| disk.path == path);
        if nvram.children().any(|child| child.is_element()) || !(path.is_empty() || restored) {
            return Err("the firmware would write to a file that is not restored".to_string());
        }
    }
    Ok(())
}

fn check_disk<'w>(
    disk: Node<'_, '_>,
    restored: &'w [RestoredDisk],
    used: &mut BTreeSet<&'w str>,
) -> Result<(), String> {
    let sources: Vec<_> = children(disk, "source").collect();
    if child(disk, "backingStore").is_some() || child(disk, "mirror").is_some() {
        return Err("a disk still names further images".to_string());
    }
    match (value(disk, "device"), sources.as_slice()) {
        ("cdrom" | "floppy", []) => Ok(()),
        ("cdrom", [_]) => Ok(()),
        ("floppy", [_]) if child(disk, "readonly").is_some() => Ok(()),
        ("" | "disk", [source]) => {
            let drivers: Vec<_> = children(disk, "driver").collect();
            let found = restored
                .iter()
                .find(|one| one.path == value(*source, "file"));
            let (Some(found), [driver]) = (found, drivers.as_slice()) else {
                return Err("a disk would not be a restored one".to_string());
            };
            let format = match found.format {
                ImageFormat::Raw => "raw",
                ImageFormat::Qcow2 => "qcow2",
            };
            if value(disk, "type") != "file" || value(*driver, "type") != format {
                return Err("a disk would be read in another format".to_string());
            }
            match used.insert(&found.path) {
                true => Ok(()),
                false => Err("two disks would be the same file".to_string()),
            }
        }
        _ => Err("a disk would not be a restored one".to_string()),
    }
}
