//! What is known of each disk's changes before anything is done. Pure: marks, the domain and its
//! checkpoints in, decisions with reasons out.

use super::checkpoint;
use super::domain::{Disk, Domain};
use super::mark::Mark;
use crate::hypervisor::SinceMark;
use crate::model::DiskName;

/// How a disk's changes are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Tracking {
    /// Changes since this checkpoint.
    Since(String),
    /// Nothing is known, for this reason.
    Unknown(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DiskPlan {
    pub(super) disk: Disk,
    pub(super) tracking: Tracking,
    /// Whether a bitmap records changes from now on.
    pub(super) bitmap: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) disks: Vec<DiskPlan>,
    /// Our checkpoints that no point can need any more.
    pub(super) needless: Vec<String>,
}

/// `checkpoints`: ours. Without any `since`, nothing is known of what points there are, so all
/// checkpoints stay.
pub(super) fn plan(
    domain: &Domain,
    checkpoints: &[String],
    since: &[SinceMark],
    owner: &str,
) -> Plan {
    let disks = domain
        .disks
        .iter()
        .map(|disk| DiskPlan {
            tracking: match tracking(domain, disk, checkpoints, since, owner) {
                Ok(checkpoint) => Tracking::Since(checkpoint),
                Err(reason) => Tracking::Unknown(reason),
            },
            bitmap: is_trackable(disk),
            disk: disk.clone(),
        })
        .collect();
    let marked: Vec<String> = since
        .iter()
        .filter_map(|since| Mark::parse(since.mark.as_deref()?))
        .map(|mark| mark.checkpoint)
        .collect();
    let needless = match since.is_empty() {
        true => Vec::new(),
        false => checkpoints
            .iter()
            .filter(|name| !marked.contains(name))
            .cloned()
            .collect(),
    };
    Plan { disks, needless }
}

/// libvirt stores the bitmaps of checkpoints in qcow2 images only.
fn is_trackable(disk: &Disk) -> bool {
    disk.format == "qcow2"
}

fn tracking(
    domain: &Domain,
    disk: &Disk,
    checkpoints: &[String],
    since: &[SinceMark],
    owner: &str,
) -> Result<String, String> {
    if !is_trackable(disk) {
        return Err(format!(
            "libvirt keeps no record of changes in a {} image",
            disk.format
        ));
    }
    let since = since
        .iter()
        .find(|since| since.disk == disk.name)
        .ok_or("the newest point does not have this disk")?;
    let mark = since.mark.as_deref().ok_or("no mark in the newest point")?;
    let mark =
        Mark::parse(mark).ok_or("the newest point's mark is not one of a libvirt checkpoint")?;
    if !checkpoint::is_ours(&mark.checkpoint, owner) {
        return Err("the newest point's checkpoint is not of this repository".to_string());
    }
    if mark.domain != domain.uuid {
        return Err("the domain is another one than the newest point's".to_string());
    }
    if mark.target != disk.name.as_str() || mark.size_bytes != since.size_bytes {
        return Err("the newest point's mark is of another disk".to_string());
    }
    if !mark.shares_an_image_with(disk) {
        return Err("its image is another one than the newest point's".to_string());
    }
    if !checkpoints.contains(&mark.checkpoint) {
        return Err(format!(
            "the checkpoint {} is no longer there",
            mark.checkpoint
        ));
    }
    Ok(mark.checkpoint)
}

impl Plan {
    /// The checkpoints that tell changes of disks which an I/O thread serves.
    pub(super) fn to_be_proved(&self) -> Vec<String> {
        let mut checkpoints: Vec<String> = Vec::new();
        for plan in self.disks.iter().filter(|plan| plan.disk.has_io_thread) {
            if let Tracking::Since(checkpoint) = &plan.tracking
                && !checkpoints.contains(checkpoint)
            {
                checkpoints.push(checkpoint.clone());
            }
        }
        checkpoints
    }

    /// Whether the changes of this disk are told since this checkpoint.
    pub(super) fn is_since(&self, disk: &DiskName, checkpoint: &str) -> bool {
        self.disks.iter().any(|plan| {
            plan.disk.name == *disk
                && matches!(&plan.tracking, Tracking::Since(since) if since == checkpoint)
        })
    }

    /// Gives up tracking where it could not be shown that no write of the instant is missing.
    pub(super) fn give_up_unproved(&mut self, unproved: &[DiskName]) {
        for plan in &mut self.disks {
            if unproved.contains(&plan.disk.name) {
                plan.tracking = Tracking::Unknown(
                    "an I/O thread serves it, and the guest wrote too much to tell whether libvirt \
                     counted all of it; with the guest agent and fsfreeze it can be told"
                        .to_string(),
                );
            }
        }
    }

    /// Gives up tracking where libvirt found it broken: the disk that its complaint names, else
    /// all. False if there was nothing to give up.
    pub(super) fn give_up(&mut self, complaint: &str) -> bool {
        let named = |disk: &Disk| complaint.contains(&format!("disk '{}'", disk.name));
        let one = self
            .disks
            .iter()
            .any(|plan| named(&plan.disk) && matches!(plan.tracking, Tracking::Since(_)));
        let mut gave_up = false;
        for plan in &mut self.disks {
            if let Tracking::Since(checkpoint) = &plan.tracking
                && (named(&plan.disk) || !one)
            {
                plan.tracking = Tracking::Unknown(format!(
                    "the bitmap of the checkpoint {checkpoint} is missing or broken, as after a \
                     crash of QEMU"
                ));
                gave_up = true;
            }
        }
        gave_up
    }
}

#[cfg(test)]
mod tests {
    use super::super::domain::Source;
    use super::*;

    #[test]
    fn what_cannot_be_proved_is_read_in_full_for_a_reason() {
        let mut plan = Plan {
            disks: ["vda", "vdb", "vdc"]
                .map(|target| DiskPlan {
                    disk: Disk {
                        has_io_thread: target != "vda",
                        ..disk(target, "qcow2", &["/x"])
                    },
                    tracking: Tracking::Since(name(1)),
                    bitmap: true,
                })
                .to_vec(),
            needless: Vec::new(),
        };
        plan.disks[2].tracking = Tracking::Unknown("new".to_string());
        assert_eq!(plan.to_be_proved(), [name(1)]);
        let vdb = DiskName::new("vdb").unwrap();
        assert!(plan.is_since(&vdb, &name(1)) && !plan.is_since(&vdb, &name(2)));
        plan.give_up_unproved(&[DiskName::new("vdb").unwrap()]);
        assert!(plan.to_be_proved().is_empty());
        assert_eq!(plan.disks[0].tracking, Tracking::Since(name(1)));
        let Tracking::Unknown(reason) = &plan.disks[1].tracking else {
            panic!("{:?}", plan.disks[1]);
        };
        assert!(reason.contains("I/O thread"), "{reason}");
    }

    const OWNER: &str = "ab12";
    const UUID: &str = "af4a5c33-756e-430d-85fe-5b2e34bbe955";

    fn name(number: u64) -> String {
        format!("vmkeep-{OWNER}-{number:016x}")
    }

    fn disk(target: &str, format: &str, images: &[&str]) -> Disk {
        let mut sources = images.iter().map(|path| Source::File(path.to_string()));
        Disk {
            name: DiskName::new(target).unwrap(),
            format: format.to_string(),
            source: sources.next().unwrap(),
            backing: sources.collect(),
            has_io_thread: false,
        }
    }

    fn domain(disks: Vec<Disk>) -> Domain {
        Domain {
            name: "db".to_string(),
            uuid: UUID.to_string(),
            active: true,
            disks,
            skipped: Vec::new(),
            nvram: None,
            qemu_user: None,
        }
    }

    fn since(disk: &Disk, checkpoint: &str) -> SinceMark {
        SinceMark {
            disk: disk.name.clone(),
            size_bytes: 4096,
            alignment_bytes: 4096,
            mark: Mark::new(checkpoint, UUID, disk, 4096).text(),
        }
    }

    fn reason(disk: Disk, checkpoints: &[String], since: &[SinceMark]) -> String {
        match &plan(&domain(vec![disk]), checkpoints, since, OWNER).disks[0].tracking {
            Tracking::Unknown(reason) => reason.clone(),
            Tracking::Since(checkpoint) => panic!("tracked since {checkpoint}"),
        }
    }

    #[test]
    fn a_disk_is_tracked_since_its_mark_and_other_checkpoints_of_ours_are_needless() {
        let vda = disk("vda", "qcow2", &["/a"]);
        let marks = [since(&vda, &name(2))];
        let plan = plan(
            &domain(vec![vda]),
            &[name(1), name(2), name(3)],
            &marks,
            OWNER,
        );
        assert_eq!(plan.disks[0].tracking, Tracking::Since(name(2)));
        assert!(plan.disks[0].bitmap);
        assert_eq!(plan.needless, [name(1), name(3)]);
    }

    #[test]
    fn each_disk_has_a_decision_of_its_own() {
        let vda = disk("vda", "qcow2", &["/a"]);
        let vdb = disk("vdb", "qcow2", &["/b"]);
        let marks = [since(&vda, &name(1))];
        let plan = plan(&domain(vec![vda, vdb]), &[name(1)], &marks, OWNER);
        assert_eq!(plan.disks[0].tracking, Tracking::Since(name(1)));
        assert!(matches!(&plan.disks[1].tracking, Tracking::Unknown(r) if r.contains("not have")));
    }

    #[test]
    fn nothing_is_needless_when_no_point_was_named() {
        let vda = disk("vda", "qcow2", &["/a"]);
        let plan = plan(&domain(vec![vda]), &[name(1)], &[], OWNER);
        assert!(plan.needless.is_empty());
    }

    #[test]
    fn a_snapshot_on_top_and_a_commit_keep_the_tracking() {
        let base = disk("vda", "qcow2", &["/a"]);
        let overlay = disk("vda", "qcow2", &["/a.s1", "/a"]);
        for (before, now) in [(&base, &overlay), (&overlay, &base)] {
            let marks = [since(before, &name(1))];
            let plan = plan(&domain(vec![now.clone()]), &[name(1)], &marks, OWNER);
            assert_eq!(plan.disks[0].tracking, Tracking::Since(name(1)));
        }
    }

    #[test]
    fn whatever_does_not_fit_has_a_reason() {
        let vda = disk("vda", "qcow2", &["/a"]);
        let here = [name(1)];
        let good = since(&vda, &name(1));
        let marks = std::slice::from_ref(&good);
        assert!(reason(vda.clone(), &[], marks).contains("no longer there"));
        assert!(reason(disk("vda", "raw", &["/a"]), &here, marks).contains("raw image"));
        let other = disk("vda", "qcow2", &["/z"]);
        assert!(reason(other, &here, marks).contains("image is another"));
        let foreign = since(&vda, "vmkeep-ff-0000000000000001");
        assert!(reason(vda.clone(), &here, &[foreign]).contains("not of this repository"));
        for (mark, why) in [
            (None, "no mark"),
            (Some("{\"image\":1}".to_string()), "not one of a libvirt"),
            (Some("]".repeat(9999)), "not one of a libvirt"),
            (
                good.mark.as_ref().map(|mark| mark.replace(UUID, "0")),
                "another one",
            ),
            (
                good.mark.as_ref().map(|mark| mark.replace("4096", "8192")),
                "another disk",
            ),
            (
                good.mark
                    .as_ref()
                    .map(|mark| mark.replace('}', ",\"x\":1}")),
                "not one of a libvirt",
            ),
        ] {
            let marks = [SinceMark {
                mark,
                ..good.clone()
            }];
            let told = reason(vda.clone(), &here, &marks);
            assert!(told.contains(why), "{told}");
        }
    }

    #[test]
    fn tracking_is_given_up_for_the_disk_that_libvirt_names_else_for_all() {
        let vda = disk("vda", "qcow2", &["/a"]);
        let vdb = disk("vdb", "qcow2", &["/b"]);
        let marks = [since(&vda, &name(1)), since(&vdb, &name(1))];
        let plan = plan(&domain(vec![vda, vdb]), &[name(1)], &marks, OWNER);
        let known = |plan: &Plan| {
            plan.disks
                .iter()
                .filter(|plan| matches!(plan.tracking, Tracking::Since(_)))
                .map(|plan| plan.disk.name.to_string())
                .collect::<Vec<_>>()
        };
        let mut one = plan.clone();
        assert!(one.give_up("missing or broken bitmap 'x' for disk 'vda'"));
        assert_eq!(known(&one), ["vdb"]);
        assert!(one.give_up("missing or broken bitmap"));
        assert!(known(&one).is_empty());
        assert!(!one.give_up("missing or broken bitmap"));
    }
}
