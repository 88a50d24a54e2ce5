//! The nodes, jobs and exports that a capture puts into QEMU, and their names.

use super::connection::Connection;
use super::machine::Peer;
use super::planned::PlannedDisk;
use super::{QmpError, QmpSettings};
use crate::hypervisor::runtime_folder::{RuntimeFolder, give};
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use serde_json::{Value, json};
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

/// Seconds after which a guest's write no longer waits for its overlay.
const COPY_LIMIT_SECONDS: u64 = 15;

/// The part of a node's name that says what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Copies what the guest overwrites into the overlay.
    Filter,
    /// Shows the image of the instant.
    Access,
    Overlay,
    OverlayFile,
    Job,
    Export,
}

impl Role {
    fn text(self) -> &'static str {
        match self {
            Role::Filter => "cbw",
            Role::Access => "acc",
            Role::Overlay => "ovl",
            Role::OverlayFile => "ovf",
            Role::Job => "job",
            Role::Export => "exp",
        }
    }

    pub(super) fn prefix(self, owner: &str) -> String {
        format!("vmkeep-{}-{owner}-", self.text())
    }

    /// QEMU allows 31 characters.
    pub(super) fn name(self, owner: &str, number: usize) -> String {
        format!("{}{number}", self.prefix(owner))
    }
}

/// How the image of the instant is kept while the guest writes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Copy-before-write filters: an overlay that cannot be written breaks the snapshot.
    Filters,
    /// Backup jobs, where filters cannot be had: an overlay that cannot be written stops the
    /// guest, so it must be given up before.
    Jobs,
}

/// The name of the bitmap that a job's overlay carries.
pub(super) const JOB_BITMAP: &str = "vmkeep-since";

/// Makes the overlay file of a disk and opens it in QEMU.
pub(super) fn add_overlay(
    connection: &mut Connection,
    settings: &QmpSettings,
    folder: &RuntimeFolder,
    peer: &Peer,
    way: Way,
    disk: &PlannedDisk,
) -> Result<(), CaptureError> {
    let path = folder.path().join(format!("overlay-{}", disk.number));
    let failed = |error: io::Error| CaptureError::new(CaptureErrorKind::Io, path.display(), error);
    // A guest's data is nobody else's to read, also before the file is given away.
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)
        .map_err(failed)?;
    let output = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&path)
        .arg(disk.size_bytes.to_string())
        .env("LC_ALL", "C")
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => CaptureError::new(
                CaptureErrorKind::Tool,
                "qemu-img",
                "is not in PATH; install qemu-utils",
            ),
            _ => failed(error),
        })?;
    if !output.status.success() {
        let detail = String::from_utf8_lossy(&output.stderr).trim().to_string();
        return Err(CaptureError::new(
            CaptureErrorKind::Io,
            path.display(),
            format!("the overlay cannot be made: {detail}"),
        ));
    }
    let limit = limit_of(settings);
    if way == Way::Filters {
        // QEMU sees a file of exactly this size, and cannot write past it.
        let file = OpenOptions::new().write(true).open(&path).map_err(failed)?;
        file.set_len(limit).map_err(failed)?;
    }
    if let Some(user) = peer.stranger() {
        give(&path, user)?;
    }
    let file = json!({
        "driver": "file",
        "node-name": Role::OverlayFile.name(&settings.owner, disk.number),
        "filename": path,
        "discard": "unmap",
    });
    let mut overlay = json!({
        "driver": "qcow2",
        "node-name": Role::Overlay.name(&settings.owner, disk.number),
        "discard": "unmap",
    });
    match way {
        Way::Filters => overlay["file"] = json!({"driver": "raw", "size": limit, "file": file}),
        Way::Jobs => {
            overlay["file"] = file;
            overlay["backing"] = disk.node.clone().into();
        }
    }
    let shown = &disk.shown;
    connection
        .run("blockdev-add", overlay)
        .map_err(|error| error.into_capture(shown))?;
    if way == Way::Jobs {
        let threshold = json!({
            "node-name": Role::OverlayFile.name(&settings.owner, disk.number),
            "write-threshold": limit,
        });
        connection
            .run("block-set-write-threshold", threshold)
            .map_err(|error| error.into_capture(shown))?;
    }
    Ok(())
}

/// Whole clusters, and room for the tables of an overlay.
pub(super) fn limit_of(settings: &QmpSettings) -> u64 {
    (settings.overlay_bytes / 65536).max(16) * 65536
}

/// The transaction of the instant.
///
/// An I/O thread takes a guest's writes also between two of its actions (seen with QEMU 10.0.2),
/// until the disk's backup job is set up: from then on QEMU holds the disk still to the end of the
/// transaction. So the new bitmap, which may record too much, begins before that, and the old one,
/// which must hold everything that is in the image, ends after it.
pub(super) fn rotation(owner: &str, way: Way, disks: &[PlannedDisk]) -> Value {
    let mut actions = Vec::new();
    let mut on = |what: &str, data: Value| actions.push(json!({"type": what, "data": data}));
    for disk in disks {
        on(
            "block-dirty-bitmap-add",
            json!({
                "node": disk.bitmap_node,
                "name": disk.new,
                "persistent": disk.persistent,
                "granularity": disk.granularity,
            }),
        );
        if way == Way::Jobs {
            on(
                "blockdev-backup",
                json!({
                    "job-id": Role::Job.name(owner, disk.number),
                    "device": disk.node,
                    "target": Role::Overlay.name(owner, disk.number),
                    "sync": "none",
                }),
            );
        }
    }
    for disk in disks {
        let Some(old) = &disk.old else { continue };
        let node = &disk.bitmap_node;
        on(
            "block-dirty-bitmap-disable",
            json!({"node": node, "name": old}),
        );
        if way == Way::Jobs {
            let overlay = Role::Overlay.name(owner, disk.number);
            on(
                "block-dirty-bitmap-add",
                json!({
                    "node": overlay,
                    "name": JOB_BITMAP,
                    "granularity": disk.granularity,
                    "disabled": true,
                }),
            );
            on(
                "block-dirty-bitmap-merge",
                json!({
                    "node": overlay,
                    "target": JOB_BITMAP,
                    "bitmaps": [{"node": node, "name": old}],
                }),
            );
        }
    }
    json!({ "actions": actions })
}

/// Puts the filter between a device and its image. The guest must stand still.
pub(super) fn insert_filter(
    connection: &mut Connection,
    owner: &str,
    disk: &PlannedDisk,
) -> Result<(), QmpError> {
    let filter = Role::Filter.name(owner, disk.number);
    let mut options = json!({
        "driver": "copy-before-write",
        "node-name": filter,
        "file": disk.node,
        "target": Role::Overlay.name(owner, disk.number),
        "on-cbw-error": "break-snapshot",
        "cbw-timeout": COPY_LIMIT_SECONDS,
    });
    if disk.limited
        && let Some(old) = &disk.old
    {
        options["bitmap"] = json!({"node": disk.bitmap_node, "name": old});
    }
    connection.run("blockdev-add", options)?;
    set_drive(connection, &disk.path, &filter)
}

/// Exchanges what a device stands on. Never for what it stands on already: some versions of QEMU
/// end with a failed assertion then.
pub(super) fn set_drive(
    connection: &mut Connection,
    path: &Option<String>,
    node: &str,
) -> Result<(), QmpError> {
    let Some(path) = path else {
        return Err(QmpError::Refused {
            command: "qom-set".to_string(),
            detail: "the device has no name".to_string(),
        });
    };
    let arguments = json!({"path": path, "property": "drive", "value": node});
    connection.run("qom-set", arguments).map(drop)
}

/// The node that shows the image of the instant.
pub(super) fn add_access(
    connection: &mut Connection,
    owner: &str,
    disk: &PlannedDisk,
) -> Result<(), QmpError> {
    let options = json!({
        "driver": "snapshot-access",
        "node-name": Role::Access.name(owner, disk.number),
        "file": Role::Filter.name(owner, disk.number),
    });
    connection.run("blockdev-add", options).map(drop)
}

/// Starts QEMU's NBD server, of which it has one only.
pub(super) fn start_server(
    connection: &mut Connection,
    folder: &RuntimeFolder,
) -> Result<(), QmpError> {
    let address = json!({
        "addr": {"type": "unix", "data": {"path": folder.socket()}},
        "max-connections": 0,
    });
    match connection.run("nbd-server-start", address.clone()) {
        Err(error) if error.is_refused() => {
            // One that serves nothing was left by a capture that died, or by nobody.
            let exports = connection.run("query-block-exports", Value::Null)?;
            if !super::machine::rows(&exports)?.is_empty() {
                return Err(error);
            }
            connection.run("nbd-server-stop", Value::Null)?;
            connection.run("nbd-server-start", address).map(drop)
        }
        other => other.map(drop),
    }
}

/// Exports a disk; the metadata context of its changes, if it has them.
pub(super) fn add_export(
    connection: &mut Connection,
    owner: &str,
    way: Way,
    disk: &PlannedDisk,
) -> Result<Option<String>, QmpError> {
    let (node, bitmap) = match way {
        Way::Filters => (Role::Access, disk.old.as_deref()),
        Way::Jobs => (Role::Overlay, disk.old.as_ref().map(|_| JOB_BITMAP)),
    };
    let node = node.name(owner, disk.number);
    let mut options = json!({
        "type": "nbd",
        "id": Role::Export.name(owner, disk.number),
        "node-name": node,
        "name": disk.name.as_str(),
        "writable": false,
    });
    if let Some(bitmap) = bitmap {
        options["bitmaps"] = match way {
            Way::Filters => json!([{"node": disk.bitmap_node, "name": bitmap}]),
            Way::Jobs => json!([bitmap]),
        };
    }
    connection.run("block-export-add", options)?;
    Ok(bitmap.map(|bitmap| format!("qemu:dirty-bitmap:{bitmap}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(number: usize) -> PlannedDisk {
        PlannedDisk {
            number,
            name: "vda".parse().unwrap(),
            shown: String::new(),
            path: None,
            node: format!("d{number}"),
            bitmap_node: format!("d{number}"),
            size_bytes: 1 << 20,
            old: Some("old".to_string()),
            new: "new".to_string(),
            granularity: 65536,
            persistent: true,
            limited: false,
            reason: None,
            driver: String::new(),
            filename: String::new(),
        }
    }

    #[test]
    fn a_write_between_two_steps_of_the_instant_is_in_the_old_bitmap_or_in_the_new_one() {
        let instant = rotation("me", Way::Jobs, &[disk(0), disk(1)]);
        let actions = instant["actions"].as_array().unwrap();
        let still: Vec<usize> = positions(actions, |action| action["type"] == "blockdev-backup");
        let (first, last) = (still[0], still[still.len() - 1]);
        assert_eq!(still.len(), 2);
        let begins = positions(actions, |action| action["data"]["name"] == "new");
        assert_eq!(begins.len(), 2);
        // Each before its own disk stands still.
        assert!(begins[0] < first && begins[1] < last);
        let ends = positions(actions, |action| {
            action["type"] == "block-dirty-bitmap-disable"
                || action["type"] == "block-dirty-bitmap-merge"
        });
        assert_eq!(ends.len(), 4);
        // Each after all of them do.
        assert!(ends.iter().all(|end| *end > last));
    }

    fn positions(actions: &[Value], which: impl Fn(&Value) -> bool) -> Vec<usize> {
        let found = actions.iter().enumerate();
        found
            .filter(|(_, action)| which(action))
            .map(|(position, _)| position)
            .collect()
    }
}
