//! What is needed of a domain's XML. It is another program's output: bounded, and everything that
//! is read is checked.

use super::xml::{self, shown};
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use crate::model::DiskName;
use roxmltree::Node;
use std::path::PathBuf;

/// Images of one disk, overlays and all.
const MAX_CHAIN: usize = 256;

/// Where the bytes of a disk, or of one image of its chain, lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    File(String),
    Block(String),
    /// Network, volume, vhost-user …: the type and what it was called, for messages and marks.
    Other(String),
}

impl Source {
    /// One text that tells sources apart.
    pub(super) fn identity(&self) -> String {
        match self {
            Source::File(path) => format!("file:{path}"),
            Source::Block(path) => format!("block:{path}"),
            Source::Other(what) => what.clone(),
        }
    }

    pub(super) fn path(&self) -> Option<PathBuf> {
        match self {
            Source::File(path) | Source::Block(path) => Some(PathBuf::from(path)),
            Source::Other(_) => None,
        }
    }
}

/// A disk that the guest can write to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    pub(super) name: DiskName,
    /// As `<driver type>` says; libvirt takes a disk without one for raw.
    pub(super) format: String,
    pub(super) source: Source,
    /// The images below it, as far as libvirt tells.
    pub(super) backing: Vec<Source>,
    /// A thread of its own serves it, beside QEMU's main thread.
    pub(super) has_io_thread: bool,
}

impl Disk {
    pub(super) fn chain(&self) -> impl Iterator<Item = &Source> {
        std::iter::once(&self.source).chain(&self.backing)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Domain {
    pub(super) name: String,
    pub(super) uuid: String,
    pub(super) active: bool,
    pub(super) disks: Vec<Disk>,
    /// Disks that are not captured although a guest writes to them, and why.
    pub(super) skipped: Vec<String>,
    pub(super) nvram: Option<PathBuf>,
    /// The user and group that QEMU runs as, where libvirt tells.
    pub(super) qemu_user: Option<(u32, u32)>,
}

impl Domain {
    /// Reads the output of `virsh dumpxml` for the domain that the configuration calls `wanted`.
    pub(super) fn parse(wanted: &str, content: &str) -> Result<Self, CaptureError> {
        let invalid = |detail: String| CaptureError::new(CaptureErrorKind::Invalid, wanted, detail);
        let document = xml::parse(content).map_err(invalid)?;
        let root = document.root_element();
        if !root.has_tag_name("domain") {
            return Err(invalid("its XML is not that of a domain".to_string()));
        }
        let name = text(&root, "name")
            .ok_or_else(|| invalid("its XML has no name".to_string()))?
            .to_string();
        let uuid = text(&root, "uuid")
            .filter(|uuid| is_uuid(uuid))
            .ok_or_else(|| invalid("its XML has no UUID".to_string()))?
            .to_string();
        // virsh takes a number for the id of a running domain, whatever names there are.
        if name != wanted && !uuid.eq_ignore_ascii_case(wanted) {
            return Err(invalid(format!(
                "libvirt took this for the domain {:?}; name the UUID instead",
                shown(&name)
            )));
        }
        let (mut disks, mut skipped) = (Vec::new(), Vec::new());
        let devices = child(&root, "devices");
        let devices = || devices.iter().flat_map(|devices| devices.children());
        let bus_has_io_thread = devices().any(|node| {
            node.has_tag_name("controller")
                && node.attribute("type") == Some("scsi")
                && has_io_thread(&node)
        });
        for node in devices().filter(|node| node.has_tag_name("disk")) {
            match disk(&node).map_err(invalid)? {
                Found::Disk(mut disk) => {
                    // Which of several controllers it is on is not told by all versions.
                    let is_scsi = child(&node, "target")
                        .is_some_and(|target| target.attribute("bus") == Some("scsi"));
                    disk.has_io_thread |= bus_has_io_thread && is_scsi;
                    disks.push(disk);
                }
                Found::Skipped(reason) => skipped.push(reason),
                Found::Nothing => {}
            }
        }
        let mut names: Vec<&DiskName> = disks.iter().map(|disk| &disk.name).collect();
        names.sort();
        if names.windows(2).any(|pair| pair.first() == pair.last()) {
            return Err(invalid("two of its disks have the same target".to_string()));
        }
        Ok(Domain {
            name,
            uuid,
            active: root.attribute("id").is_some(),
            disks,
            skipped,
            nvram: nvram(&root),
            qemu_user: qemu_user(&root),
        })
    }
}

fn child<'a, 'i>(node: &Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|node| node.has_tag_name(name))
}

fn text<'a>(node: &Node<'a, '_>, name: &str) -> Option<&'a str> {
    child(node, name)
        .and_then(|node| node.text())
        .map(str::trim)
        .filter(|text| !text.is_empty())
}

pub(super) fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
}

enum Found {
    Disk(Disk),
    /// A guest writes there, but it is not captured: why.
    Skipped(String),
    /// Nothing that a guest could write to and find again.
    Nothing,
}

fn disk(node: &Node<'_, '_>) -> Result<Found, String> {
    let device = node.attribute("device").unwrap_or("disk");
    if matches!(device, "cdrom" | "floppy") || child(node, "readonly").is_some() {
        return Ok(Found::Nothing);
    }
    let target = child(node, "target")
        .and_then(|target| target.attribute("dev"))
        .ok_or("a disk has no target")?;
    let name = DiskName::new(target).map_err(|error| error.to_string())?;
    let skipped = |reason: &str| Ok(Found::Skipped(format!("{name} is not backed up: {reason}")));
    if device != "disk" {
        return skipped("the host passes the device through");
    }
    if child(node, "transient").is_some() {
        return skipped("it is transient, and forgets its changes when the VM stops");
    }
    // Neither its record of changes nor its scratch file has what another VM writes.
    if child(node, "shareable").is_some() {
        return skipped(
            "other VMs may write to it as well (<shareable/>), unseen by a backup of this one; \
             remove <shareable/> if none does",
        );
    }
    let Some(source) = source(node)? else {
        return skipped("it has no source that is known here");
    };
    let format = child(node, "driver")
        .and_then(|driver| driver.attribute("type"))
        .unwrap_or("raw")
        .to_string();
    let mut backing = Vec::new();
    let mut below = child(node, "backingStore");
    while let Some(store) = below {
        if backing.len() >= MAX_CHAIN {
            return Err(format!("{name} has more than {MAX_CHAIN} images"));
        }
        if let Some(found) = source_of(&store, store.attribute("type"))? {
            backing.push(found);
        }
        below = child(&store, "backingStore");
    }
    Ok(Found::Disk(Disk {
        name,
        format,
        source,
        backing,
        has_io_thread: has_io_thread(node),
    }))
}

fn has_io_thread(node: &Node<'_, '_>) -> bool {
    child(node, "driver").is_some_and(|driver| {
        driver.has_attribute("iothread") || child(&driver, "iothreads").is_some()
    })
}

fn source(node: &Node<'_, '_>) -> Result<Option<Source>, String> {
    source_of(node, node.attribute("type"))
}

fn source_of(node: &Node<'_, '_>, kind: Option<&str>) -> Result<Option<Source>, String> {
    let (Some(kind), Some(source)) = (kind, child(node, "source")) else {
        return Ok(None);
    };
    let path = |name: &str| match source.attribute(name) {
        // Relative to what? libvirt itself wants absolute ones.
        Some(path) if path.starts_with('/') => Ok(path.to_string()),
        Some(path) => Err(format!("the image {:?} has no absolute path", shown(path))),
        None => Err("a disk's source names no image".to_string()),
    };
    Ok(Some(match kind {
        "file" => Source::File(path("file")?),
        "block" => Source::Block(path("dev")?),
        other => {
            let said: Vec<&str> = ["protocol", "pool", "name", "volume", "dev"]
                .iter()
                .filter_map(|name| source.attribute(*name))
                .collect();
            Source::Other(shown(&format!("{other}:{}", said.join("/"))))
        }
    }))
}

/// The file that holds the variables of the firmware: `<nvram>path</nvram>`, or with a source.
fn nvram(root: &Node<'_, '_>) -> Option<PathBuf> {
    let nvram = child(&child(root, "os")?, "nvram")?;
    let path = match child(&nvram, "source") {
        Some(source) => source.attribute("file")?,
        None => nvram.text()?.trim(),
    };
    path.starts_with('/').then(|| PathBuf::from(path))
}

fn qemu_user(root: &Node<'_, '_>) -> Option<(u32, u32)> {
    let label = root
        .children()
        .filter(|node| node.has_tag_name("seclabel"))
        .find(|node| node.attribute("model") == Some("dac"))?;
    user_and_group(text(&label, "label")?)
}

/// `+64055:+107`
pub(super) fn user_and_group(label: &str) -> Option<(u32, u32)> {
    let (user, group) = label.split_once(':')?;
    Some((
        user.strip_prefix('+')?.parse().ok()?,
        group.strip_prefix('+')?.parse().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "af4a5c33-756e-430d-85fe-5b2e34bbe955";

    fn xml(disks: &str) -> String {
        format!(
            "<domain type='kvm' id='7'><name>db</name><uuid>{UUID}</uuid>\
             <os><nvram template='/x'>/var/lib/nvram/db.fd</nvram></os>\
             <devices>{disks}</devices>\
             <seclabel type='dynamic' model='apparmor'><label>libvirt-x</label></seclabel>\
             <seclabel type='dynamic' model='dac'><label>+64055:+107</label></seclabel></domain>"
        )
    }

    fn detail(wanted: &str, xml: &str) -> String {
        Domain::parse(wanted, xml).unwrap_err().detail
    }

    #[test]
    fn what_is_wrong_with_an_xml_is_fit_to_be_printed() {
        let long = "x".repeat(10_000);
        for xml in [
            "<domain type=\0kvm'/>".to_string(),
            format!("<domain></{long}>"),
            format!("<domain><{long}/>"),
            format!("<domain><name>{long}\u{9b}</name><uuid>{UUID}</uuid></domain>"),
        ] {
            let error = Domain::parse("web01", &xml).unwrap_err().to_string();
            assert!(!error.chars().any(char::is_control), "{error:?}");
            assert!(error.len() < 500, "{} bytes", error.len());
        }
    }

    #[test]
    fn writable_disks_with_their_chains_are_found_and_nothing_else() {
        let domain = Domain::parse(
            "db",
            &xml(
                "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
                 <source file='/v/a &amp; b.s1'/><backingStore type='file'><format type='qcow2'/>\
                 <source file='/v/a.qcow2'/><backingStore/></backingStore>\
                 <target dev='vda'/></disk>\
                 <disk type='block' device='lun'><source dev='/dev/sdx'/>\
                 <target dev='sda'/></disk>\
                 <disk type='block' device='disk'><source dev='/dev/vg/x'/>\
                 <target dev='vdb'/></disk>\
                 <disk type='network' device='disk'><driver type='raw'/>\
                 <source protocol='rbd' name='pool/img'/><target dev='vdc'/></disk>\
                 <disk type='file' device='cdrom'><target dev='hda'/><readonly/></disk>\
                 <disk type='file' device='disk'><source file='/v/ro'/><target dev='vdd'/>\
                 <readonly/></disk>",
            ),
        )
        .unwrap();
        assert!(domain.active);
        assert_eq!(domain.uuid, UUID);
        assert_eq!(domain.qemu_user, Some((64055, 107)));
        assert_eq!(domain.nvram, Some("/var/lib/nvram/db.fd".into()));
        assert_eq!(
            domain.skipped,
            ["sda is not backed up: the host passes the device through"]
        );
        let told: Vec<String> = domain
            .disks
            .iter()
            .map(|disk| {
                let chain: Vec<String> = disk.chain().map(Source::identity).collect();
                format!("{} {} {}", disk.name, disk.format, chain.join(" < "))
            })
            .collect();
        assert_eq!(
            told,
            [
                "vda qcow2 file:/v/a & b.s1 < file:/v/a.qcow2",
                "vdb raw block:/dev/vg/x",
                "vdc raw network:rbd/pool/img",
            ]
        );
    }

    #[test]
    fn a_disk_that_other_vms_write_to_as_well_is_left_out_and_told_of() {
        let disks = "<disk type='block'><source dev='/dev/vg/x'/><target dev='vda'/></disk>\
                     <disk type='block'><source dev='/dev/vg/y'/><target dev='vdb'/><shareable/>\
                     </disk>";
        let domain = Domain::parse("db", &xml(disks)).unwrap();
        let names: Vec<&str> = domain.disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(names, ["vda"]);
        assert_eq!(domain.skipped.len(), 1);
        assert!(
            domain.skipped[0].starts_with("vdb is not backed up: other VMs"),
            "{:?}",
            domain.skipped
        );
    }

    #[test]
    fn disks_that_io_threads_serve_are_told_from_others() {
        let disk = |name: &str, bus: &str, driver: &str| {
            format!(
                "<disk type='file'><driver type='qcow2' {driver}</driver><source file='/{name}'/>\
                 <target dev='{name}' bus='{bus}'/></disk>"
            )
        };
        let disks = disk("vda", "virtio", ">")
            + &disk("vdb", "virtio", "iothread='1'>")
            + &disk(
                "vdc",
                "virtio",
                "><iothreads><iothread id='1'/></iothreads>",
            )
            + &disk("sda", "scsi", ">");
        let served = |controller: &str| -> Vec<String> {
            let domain = Domain::parse("db", &xml(&format!("{disks}{controller}"))).unwrap();
            let served = domain.disks.iter().filter(|disk| disk.has_io_thread);
            served.map(|disk| disk.name.to_string()).collect()
        };
        assert_eq!(served(""), ["vdb", "vdc"]);
        let controller = "<controller type='scsi'><driver iothread='2'/></controller>";
        assert_eq!(served(controller), ["vdb", "vdc", "sda"]);
    }

    #[test]
    fn a_number_that_libvirt_took_for_an_id_is_refused() {
        assert!(detail("7", &xml("")).contains("name the UUID"));
        assert!(Domain::parse(UUID, &xml("")).is_ok());
    }

    #[test]
    fn nonsense_is_refused_with_a_reason() {
        assert!(detail("db", "").contains("cannot be read"));
        assert!(detail("db", "error: what?").contains("cannot be read"));
        assert!(detail("db", "<volume/>").contains("not that of a domain"));
        assert!(detail("db", "<domain><name>db</name></domain>").contains("UUID"));
        let dtd = "<!DOCTYPE d [<!ENTITY a 'b'>]><domain>&a;</domain>";
        assert!(detail("db", dtd).contains("cannot be read"));
        let relative = "<disk type='file'><source file='../etc/shadow'/><target dev='vda'/></disk>";
        assert!(detail("db", &xml(relative)).contains("absolute"));
        let path = "<disk type='file'><source file='/x'/><target dev='../vda'/></disk>";
        assert!(detail("db", &xml(path)).contains("disk name"));
        let twice = "<disk type='file'><source file='/x'/><target dev='vda'/></disk>".repeat(2);
        assert!(detail("db", &xml(&twice)).contains("same target"));
    }

    #[test]
    fn huge_and_deep_xml_is_refused() {
        assert!(detail("db", &" ".repeat(xml::MAX_BYTES + 1)).contains("at most"));
        let many = xml(&"<x/>".repeat(xml::MAX_NODES as usize + 1));
        assert!(detail("db", &many).contains("cannot be read"));
        let deep = format!(
            "<disk type='file'><source file='/x'/><target dev='vda'/>{}{}</disk>",
            "<backingStore type='file'><source file='/y'/>".repeat(MAX_CHAIN + 1),
            "</backingStore>".repeat(MAX_CHAIN + 1)
        );
        assert!(detail("db", &xml(&deep)).contains("more than"));
    }
}
