//! Our checkpoints in a domain. Each is one bitmap a disk, all of them recording, none depending
//! on another: any can be deleted, and the others stay exact.

use super::domain::Domain;
use super::virsh::{Reply, Virsh};
use super::{QUERY_LIMIT, refused, xml};
use crate::hypervisor::runtime_folder::random_suffix;
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use crate::model::DiskName;
use roxmltree::Document;
use std::time::Duration;

const PREFIX: &str = "vmkeep-";
/// Deleting waits for QEMU to write to its images.
const DELETE_LIMIT: Duration = Duration::from_secs(60);
/// A list of names that is longer is not one of checkpoints.
const MAX_CHECKPOINTS: usize = 4096;

/// Whether the name can be part of checkpoint names: several owners may track one domain, and
/// none may take another's checkpoints for its own.
pub(super) fn is_owner(owner: &str) -> bool {
    (1..=32).contains(&owner.len()) && owner.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

pub(super) fn new_name(owner: &str) -> Result<String, CaptureError> {
    let suffix = random_suffix()
        .map_err(|error| CaptureError::new(CaptureErrorKind::Io, "a random name", error))?;
    Ok(format!("{PREFIX}{owner}-{suffix}"))
}

pub(super) fn is_ours(name: &str, owner: &str) -> bool {
    name.strip_prefix(PREFIX)
        .and_then(|rest| rest.strip_prefix(owner))
        .and_then(|rest| rest.strip_prefix('-'))
        .is_some_and(|suffix| {
            suffix.len() == 16 && suffix.bytes().all(|byte| byte.is_ascii_hexdigit())
        })
}

/// The names of our checkpoints, oldest first.
pub(super) fn list(
    virsh: &dyn Virsh,
    domain: &Domain,
    owner: &str,
) -> Result<Vec<String>, CaptureError> {
    let arguments = ["checkpoint-list", &domain.uuid, "--name", "--topological"];
    let reply = virsh.run(&arguments, QUERY_LIMIT)?;
    if !reply.success {
        return Err(refused(&domain.name, "list its checkpoints", &reply));
    }
    let names: Vec<String> = reply
        .stdout
        .lines()
        .map(str::trim)
        .filter(|name| is_ours(name, owner))
        .map(str::to_string)
        .collect();
    match names.len() > MAX_CHECKPOINTS {
        true => Err(CaptureError::new(
            CaptureErrorKind::Invalid,
            &domain.name,
            format!("has more than {MAX_CHECKPOINTS} checkpoints of vmkeep"),
        )),
        false => Ok(names),
    }
}

/// How much each disk was written to since a checkpoint, in whole granules of its bitmap. Nothing
/// for a disk of which it is not told.
pub(super) fn changed_bytes(
    virsh: &dyn Virsh,
    domain: &Domain,
    checkpoint: &str,
    limit: Duration,
) -> Result<Vec<(DiskName, u64)>, CaptureError> {
    let arguments = [
        "checkpoint-dumpxml",
        &domain.uuid,
        checkpoint,
        "--no-domain",
        "--size",
    ];
    let reply = virsh.run(&arguments, limit)?;
    if !reply.success {
        let what = format!("tell the size of the checkpoint {checkpoint}");
        return Err(refused(&domain.name, &what, &reply));
    }
    let document = xml::parse(&reply.stdout)
        .map_err(|detail| CaptureError::new(CaptureErrorKind::Invalid, &domain.name, detail))?;
    let told = document.descendants().filter_map(|node| {
        let name = node.has_tag_name("disk").then(|| node.attribute("name"))?;
        let name = DiskName::new(name?).ok()?;
        Some((name, node.attribute("size")?.parse().ok()?))
    });
    Ok(told.collect())
}

/// What became of a checkpoint that was to be deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Deletion {
    Done,
    /// The domain is not running, and libvirt deletes nothing then.
    Later,
}

/// Deletes a checkpoint with its bitmaps.
///
/// libvirt refuses as a whole if the bitmap of one disk is missing, as after a crash of QEMU.
/// Then the checkpoint is forgotten, and described anew for each disk alone to delete what is
/// left of it: nothing would ever find that again.
pub(super) fn delete(
    virsh: &dyn Virsh,
    domain: &Domain,
    checkpoint: &str,
    describe: &dyn Fn(&str) -> Result<String, CaptureError>,
) -> Result<Deletion, CaptureError> {
    let run = |arguments: &[&str]| virsh.run(arguments, DELETE_LIMIT);
    let plain = run(&["checkpoint-delete", &domain.uuid, checkpoint])?;
    if plain.success {
        return Ok(Deletion::Done);
    }
    if plain.stderr.contains("inactive domain") {
        return Ok(Deletion::Later);
    }
    if !is_broken(&plain) {
        return Err(refused(
            &domain.name,
            &format!("delete the checkpoint {checkpoint}"),
            &plain,
        ));
    }
    let tracked = run(&[
        "checkpoint-dumpxml",
        &domain.uuid,
        checkpoint,
        "--no-domain",
    ])?;
    let tracked = match tracked.success {
        true => tracked_disks(&tracked.stdout),
        false => Vec::new(),
    };
    forget(virsh, domain, checkpoint)?;
    for disk in tracked {
        let file = describe(&redefinition(checkpoint, &disk))?;
        let defined = run(&["checkpoint-create", &domain.uuid, &file, "--redefine"])?;
        if defined.success && !run(&["checkpoint-delete", &domain.uuid, checkpoint])?.success {
            // This disk is the one whose bitmap is missing.
            forget(virsh, domain, checkpoint)?;
        }
    }
    Ok(Deletion::Done)
}

fn forget(virsh: &dyn Virsh, domain: &Domain, checkpoint: &str) -> Result<(), CaptureError> {
    let arguments = ["checkpoint-delete", &domain.uuid, checkpoint, "--metadata"];
    let reply = virsh.run(&arguments, DELETE_LIMIT)?;
    match reply.success {
        true => Ok(()),
        false => Err(refused(
            &domain.name,
            &format!("forget the checkpoint {checkpoint}"),
            &reply,
        )),
    }
}

/// Whether libvirt refused because a bitmap is not what it should be.
pub(super) fn is_broken(reply: &Reply) -> bool {
    let said = &reply.stderr;
    said.contains("bitmap") || said.contains("checkpoint inconsistent")
}

fn tracked_disks(xml: &str) -> Vec<String> {
    let Ok(document) = Document::parse(xml) else {
        return Vec::new();
    };
    document
        .descendants()
        .filter(|node| node.has_tag_name("disk"))
        .filter(|node| node.attribute("checkpoint") == Some("bitmap"))
        .filter_map(|node| node.attribute("name"))
        .filter(|name| crate::model::DiskName::new(name).is_ok())
        .map(str::to_string)
        .collect()
}

fn redefinition(checkpoint: &str, disk: &str) -> String {
    // Both names were checked: nothing to be escaped. The time is one that nobody has seen.
    format!(
        "<domaincheckpoint><name>{checkpoint}</name><creationTime>1</creationTime><disks>\
         <disk name='{disk}' checkpoint='bitmap' bitmap='{checkpoint}'/></disks>\
         </domaincheckpoint>"
    )
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Say, Script, domain};
    use super::*;

    fn deleted(script: &Script) -> Result<Deletion, CaptureError> {
        let describe = |xml: &str| {
            roxmltree::Document::parse(xml).unwrap();
            Ok("/x.xml".to_string())
        };
        delete(script, &domain(), "ck", &describe)
    }

    #[test]
    fn what_is_left_of_a_broken_checkpoint_is_deleted_disk_by_disk() {
        let script = Script::new(vec![
            ("checkpoint-delete", Say::No("bitmap 'ck' not found in")),
            (
                "checkpoint-dumpxml",
                Say::Yes(
                    "<domaincheckpoint><disks><disk name='vda' checkpoint='bitmap'/>\
                     <disk name='vdb' checkpoint='bitmap'/></disks></domaincheckpoint>",
                ),
            ),
            ("checkpoint-delete", Say::Yes("")),
            ("checkpoint-create", Say::Yes("")),
            ("checkpoint-delete", Say::No("bitmap 'ck' not found in")),
            ("checkpoint-delete", Say::Yes("")),
            ("checkpoint-create", Say::Yes("")),
            ("checkpoint-delete", Say::Yes("")),
        ]);
        assert_eq!(deleted(&script), Ok(Deletion::Done));
        assert_eq!(
            script.asked(),
            [
                "checkpoint-delete ck",
                "checkpoint-dumpxml ck --no-domain",
                "checkpoint-delete ck --metadata",
                "checkpoint-create /x.xml --redefine",
                "checkpoint-delete ck",
                "checkpoint-delete ck --metadata",
                "checkpoint-create /x.xml --redefine",
                "checkpoint-delete ck",
            ]
        );
    }

    #[test]
    fn another_refusal_deletes_nothing_more() {
        let script = Script::new(vec![("checkpoint-delete", Say::No("error: no connection"))]);
        let error = deleted(&script).unwrap_err();
        assert!(error.detail.contains("no connection"), "{error}");
        let script = Script::new(vec![(
            "checkpoint-delete",
            Say::No("cannot delete checkpoint for inactive domain"),
        )]);
        assert_eq!(deleted(&script), Ok(Deletion::Later));
    }

    #[test]
    fn only_checkpoints_of_ours_are_listed() {
        let said = "ck1\n vmkeep-ab12-0000000000000001 \n\nvmkeep-ab-0000000000000002\n\u{7}\n";
        let script = Script::new(vec![("checkpoint-list", Say::Yes(said))]);
        let names = list(&script, &domain(), "ab12").unwrap();
        assert_eq!(names, ["vmkeep-ab12-0000000000000001"]);
        let script = Script::new(vec![("checkpoint-list", Say::No(""))]);
        let error = list(&script, &domain(), "ab12").unwrap_err();
        assert!(error.detail.contains("said nothing"), "{error}");
    }

    #[test]
    fn a_new_name_is_ours_and_nobody_elses() {
        let name = new_name("ab12").unwrap();
        assert!(is_ours(&name, "ab12"));
        for other in ["ab1", "ab123", "b12", ""] {
            assert!(!is_ours(&name, other), "{other}");
        }
        for foreign in [
            "ck1",
            "vmkeep-ab12-",
            "vmkeep-ab12-x",
            "vmkeep-ab12-0123456789abcdeg",
        ] {
            assert!(!is_ours(foreign, "ab12"), "{foreign}");
        }
    }

    #[test]
    fn an_owner_with_a_separator_is_none() {
        assert!(is_owner("ab12"));
        assert!(!is_owner("ab-12"));
        assert!(!is_owner(""));
        assert!(!is_owner("a'b"));
    }

    #[test]
    fn only_disks_with_a_bitmap_are_tracked() {
        let xml = "<domaincheckpoint><disks><disk name='vda' checkpoint='bitmap' bitmap='x'/>\
                   <disk name='vdb' checkpoint='no'/><disk name='../x' checkpoint='bitmap'/>\
                   </disks></domaincheckpoint>";
        assert_eq!(tracked_disks(xml), ["vda"]);
        assert!(tracked_disks("nonsense").is_empty());
    }
}
