//! The XML that libvirt is given. Names were checked before; paths are escaped here.

use super::plan::{DiskPlan, Plan, Tracking};
use super::xml::escaped;
use std::path::Path;

/// The bitmap of changes, as it is exported with a disk.
pub(super) const EXPORT_BITMAP: &str = "vmkeep";

pub(super) fn backup(plan: &Plan, socket: &Path, scratch: &Path) -> Option<String> {
    let socket = escaped(socket.to_str()?);
    let disks = plan
        .disks
        .iter()
        .map(|plan| backup_disk(plan, scratch))
        .collect::<Option<String>>()?;
    // The schema wants it explicit: a disk that is not named takes no part.
    Some(format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{socket}'/>\
         <disks>{disks}</disks></domainbackup>\n"
    ))
}

fn backup_disk(plan: &DiskPlan, scratch: &Path) -> Option<String> {
    let name = &plan.disk.name;
    let file = scratch.join(name.as_str());
    let mode = match &plan.tracking {
        Tracking::Since(checkpoint) => format!(
            "backupmode='incremental' incremental='{checkpoint}' exportbitmap='{EXPORT_BITMAP}'"
        ),
        Tracking::Unknown(_) => "backupmode='full'".to_string(),
    };
    Some(format!(
        "<disk name='{name}' backup='yes' type='file' {mode} exportname='{name}'>\
         <scratch file='{}'/></disk>",
        escaped(file.to_str()?)
    ))
}

/// `None`: no disk can be tracked, so there is no checkpoint to be made.
pub(super) fn checkpoint(plan: &Plan, name: &str) -> Option<String> {
    if !plan.disks.iter().any(|plan| plan.bitmap) {
        return None;
    }
    let disks: String = plan
        .disks
        .iter()
        .map(|plan| match plan.bitmap {
            true => format!(
                "<disk name='{}' checkpoint='bitmap' bitmap='{name}'/>",
                plan.disk.name
            ),
            false => format!("<disk name='{}' checkpoint='no'/>", plan.disk.name),
        })
        .collect();
    Some(format!(
        "<domaincheckpoint><name>{name}</name><disks>{disks}</disks></domaincheckpoint>\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::super::domain::{Disk, Source};
    use super::*;
    use crate::model::DiskName;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    fn plan() -> Plan {
        let disk = |name: &str, tracking: Tracking, bitmap| DiskPlan {
            disk: Disk {
                name: DiskName::new(name).unwrap(),
                format: "qcow2".to_string(),
                source: Source::File("/x".to_string()),
                backing: Vec::new(),
                has_io_thread: false,
            },
            tracking,
            bitmap,
        };
        Plan {
            disks: vec![
                disk("vda", Tracking::Since("ck1".to_string()), true),
                disk("vdb", Tracking::Unknown("raw".to_string()), false),
            ],
            needless: Vec::new(),
        }
    }

    #[test]
    fn each_disk_says_its_own_mode() {
        let xml = backup(&plan(), Path::new("/run/a&'b/s"), Path::new("/var/s")).unwrap();
        assert_eq!(
            xml,
            "<domainbackup mode='pull'><server transport='unix' \
             socket='/run/a&amp;&apos;b/s'/><disks>\
             <disk name='vda' backup='yes' type='file' backupmode='incremental' \
             incremental='ck1' exportbitmap='vmkeep' exportname='vda'>\
             <scratch file='/var/s/vda'/></disk>\
             <disk name='vdb' backup='yes' type='file' backupmode='full' exportname='vdb'>\
             <scratch file='/var/s/vdb'/></disk></disks></domainbackup>\n"
        );
        roxmltree::Document::parse(&xml).unwrap();
        assert_eq!(
            checkpoint(&plan(), "ck2").unwrap(),
            "<domaincheckpoint><name>ck2</name><disks>\
             <disk name='vda' checkpoint='bitmap' bitmap='ck2'/>\
             <disk name='vdb' checkpoint='no'/></disks></domaincheckpoint>\n"
        );
    }

    #[test]
    fn without_a_disk_to_track_there_is_no_checkpoint() {
        let mut plan = plan();
        plan.disks[0].bitmap = false;
        assert_eq!(checkpoint(&plan, "ck2"), None);
    }

    #[test]
    fn a_path_that_is_no_text_is_refused() {
        let path = Path::new(OsStr::from_bytes(b"/\xff"));
        assert_eq!(backup(&plan(), path, Path::new("/x")), None);
    }
}
