//! The disks of one capture: which are read, how far back their bitmaps know, and what becomes of
//! the bitmaps afterwards.

use super::connection::Connection;
use super::machine::{Device, IO_ERROR, Machine, Node, children, migration, printable, status};
use super::plan::{Known, Tracking, successor, track};
use super::{QmpError, QmpSettings};
use crate::hypervisor::runtime_folder::random_suffix;
use crate::hypervisor::{CaptureError, CaptureErrorKind, Outcome, Reading, SinceMark};
use crate::model::DiskName;
use serde_json::{Value, json};

/// A disk that will be captured, and how.
pub(super) struct PlannedDisk {
    pub number: usize,
    pub name: DiskName,
    /// For messages.
    pub shown: String,
    /// Where the device's `drive` is exchanged.
    pub path: Option<String>,
    /// What the device stands on.
    pub node: String,
    /// The node that carries the bitmaps: the same, or the image below a throttle.
    pub bitmap_node: String,
    pub size_bytes: u64,
    /// The bitmap that tells the changes since the newest point.
    pub old: Option<String>,
    /// The bitmap that records from this instant on.
    pub new: String,
    pub granularity: u64,
    pub persistent: bool,
    /// Only what `old` names will be read.
    pub limited: bool,
    pub reason: Option<String>,
    pub driver: String,
    pub filename: String,
}

/// The state of the VM, if it can be captured in it.
pub(super) fn capturable(
    settings: &QmpSettings,
    connection: &mut Connection,
) -> Result<String, CaptureError> {
    let shown = settings.monitor.display();
    let failed = |error: QmpError| error.into_capture(&shown);
    let status = status(connection).map_err(failed)?;
    match status.as_str() {
        "running" | "paused" | "prelaunch" | "shutdown" | "suspended" | "watchdog" => {}
        IO_ERROR => {
            return Err(CaptureError::new(
                CaptureErrorKind::Inconsistent,
                &shown,
                "QEMU stopped the guest after an I/O error: give its disks space, then let it go on",
            ));
        }
        other => {
            return Err(CaptureError::new(
                CaptureErrorKind::Inconsistent,
                &shown,
                format!(
                    "the VM is being migrated, saved or restored ({}); try again later",
                    printable(other)
                ),
            ));
        }
    }
    // What a capture puts before the disks would make it fail in its last step.
    if let Some(status) = migration(connection).map_err(failed)? {
        return Err(CaptureError::new(
            CaptureErrorKind::Inconsistent,
            &shown,
            format!("the VM is being migrated ({status}); try again later"),
        ));
    }
    Ok(status)
}

pub(super) fn plan_disks(
    settings: &QmpSettings,
    connection: &mut Connection,
    machine: &Machine,
    since: &[SinceMark],
    reading: Reading,
    notes: &mut Vec<String>,
) -> Result<Vec<PlannedDisk>, CaptureError> {
    let shown = settings.monitor.display();
    let invalid = |detail: String| CaptureError::new(CaptureErrorKind::Invalid, &shown, detail);
    let failed = |error: QmpError| error.into_capture(&shown);
    capturable(settings, connection)?;
    let mut planned: Vec<PlannedDisk> = Vec::new();
    let mut repairs = Vec::new();
    for device in &machine.devices {
        if let Some(disk) = plan_device(
            settings,
            connection,
            machine,
            device,
            since,
            reading,
            notes,
            &mut repairs,
        )? {
            if planned.iter().any(|other| other.name == disk.name) {
                return Err(invalid(format!("two devices are named {}", disk.name)));
            }
            planned.push(PlannedDisk {
                number: planned.len(),
                ..disk
            });
        }
    }
    if planned.is_empty() {
        return Err(invalid(
            "the VM has no disk that can be written".to_string(),
        ));
    }
    if !repairs.is_empty() {
        connection
            .run("transaction", json!({ "actions": repairs }))
            .map_err(failed)?;
    }
    Ok(planned)
}

#[expect(clippy::too_many_arguments)]
fn plan_device(
    settings: &QmpSettings,
    connection: &mut Connection,
    machine: &Machine,
    device: &Device,
    since: &[SinceMark],
    reading: Reading,
    notes: &mut Vec<String>,
    repairs: &mut Vec<Value>,
) -> Result<Option<PlannedDisk>, CaptureError> {
    let failed = |error: QmpError| error.into_capture(&device.shown);
    let top = machine.node(&device.node).map_err(failed)?;
    let excluded = device
        .disk
        .as_ref()
        .is_some_and(|name| settings.excluded.contains(name));
    if excluded {
        return Ok(None);
    }
    if device.removable {
        // A medium that nobody can write to is no loss: most of them are CDs.
        if !top.read_only {
            notes.push(format!("{}: left out, it is removable", device.shown));
        }
        return Ok(None);
    }
    if top.read_only {
        notes.push(format!("{}: left out, it is read-only", device.shown));
        return Ok(None);
    }
    if let Some(why) = written_past(connection, device, top).map_err(failed)? {
        return Err(CaptureError::new(
            CaptureErrorKind::Invalid,
            &device.shown,
            format!(
                "{why}: what is written past QEMU's nodes is in no record of changes and in no \
                 overlay; leave the disk out with exclude = [\"{}\"]",
                device.shown
            ),
        ));
    }
    if top.size_bytes == 0 {
        return Err(CaptureError::new(
            CaptureErrorKind::Invalid,
            &device.shown,
            "has no bytes, says QEMU; if that is right, leave it out with exclude = [\"…\"]",
        ));
    }
    let Some(name) = device.disk.clone() else {
        return Err(CaptureError::new(
            CaptureErrorKind::Invalid,
            &device.shown,
            "this device has no name that a disk can have: give it an id in QEMU's configuration",
        ));
    };
    let (bitmap_node, image) = image_of(connection, machine, &device.node, top).map_err(failed)?;
    let mark = since.iter().find(|since| since.disk == name);
    let Tracking { known, stale } = track(&settings.owner, image, mark);
    let mut repair = |what: &str, mut data: Value| {
        data["node"] = bitmap_node.clone().into();
        repairs.push(json!({"type": format!("block-dirty-bitmap-{what}"), "data": data}));
    };
    for name in stale {
        repair("remove", json!({ "name": name }));
    }
    let (old, granularity, reason) = match known {
        Known::Since {
            bitmap,
            granularity,
            merge,
        } => {
            if let Some(newer) = merge {
                repair("enable", json!({ "name": bitmap }));
                repair("merge", json!({"target": bitmap, "bitmaps": [newer]}));
                repair("remove", json!({ "name": newer }));
            }
            (Some(bitmap), granularity, None)
        }
        Known::Nothing(reason) => (None, u64::from(settings.granularity_bytes), Some(reason)),
    };
    let own = random_suffix()
        .map_err(|error| CaptureError::new(CaptureErrorKind::Io, &device.shown, error))?;
    let fits = mark.is_some_and(|mark| {
        let alignment = u64::from(mark.alignment_bytes);
        alignment != 0 && granularity.is_multiple_of(alignment)
    });
    Ok(Some(PlannedDisk {
        number: 0,
        shown: format!("{} ({})", name, image.filename),
        path: device.path.clone(),
        node: device.node.clone(),
        size_bytes: top.size_bytes,
        new: successor(&settings.owner, &own, old.as_deref()),
        limited: reading == Reading::Changes && old.is_some() && fits,
        old,
        granularity,
        persistent: image.keeps_bitmaps,
        reason,
        driver: image.driver.clone(),
        filename: image.filename.clone(),
        bitmap_node,
        name,
    }))
}

/// Why writes to a disk go past the block nodes of this QEMU, if some do.
fn written_past(
    connection: &mut Connection,
    device: &Device,
    top: &Node,
) -> Result<Option<&'static str>, QmpError> {
    // A qcow2 image is neither passed through nor shared: QEMU lets one writer open it, and sends
    // no request as it is into a format.
    let (Some(path), false) = (&device.path, top.driver == "qcow2") else {
        return Ok(None);
    };
    let mut property = |name: &str| {
        match connection.run("qom-get", json!({"path": path, "property": name})) {
            Ok(value) => Ok(Some(value)),
            // What this device or this QEMU does not have, it does not do.
            Err(error) if error.is_refused() => Ok(None),
            Err(error) => Err(error),
        }
    };
    match property("type")? {
        Some(Value::String(kind)) if matches!(&*kind, "scsi-block" | "scsi-generic") => {
            return Ok(Some(
                "the host's device is passed through (by scsi-block or scsi-generic; scsi-hd \
                 would not)",
            ));
        }
        Some(Value::String(_)) | None => {}
        Some(_) => {
            return Err(QmpError::Protocol(
                "the type of a device is not a text".to_string(),
            ));
        }
    }
    match property("share-rw")? {
        Some(Value::Bool(true)) => Ok(Some(
            "others may write to it as well (share-rw=on; detach the share if nobody needs it)",
        )),
        Some(Value::Bool(false)) | None => Ok(None),
        Some(_) => Err(QmpError::Protocol(
            "\"share-rw\" of a device is neither on nor off".to_string(),
        )),
    }
}

/// The node that can carry a lasting bitmap: below filters that change nothing of the content.
fn image_of<'a>(
    connection: &mut Connection,
    machine: &'a Machine,
    name: &str,
    top: &'a Node,
) -> Result<(String, &'a Node), QmpError> {
    let is_filter = |node: &Node| matches!(node.driver.as_str(), "throttle" | "copy-on-read");
    let (mut name, mut node) = (name.to_string(), top);
    if !is_filter(node) {
        return Ok((name, node));
    }
    let below = children(connection, "file")?;
    for _ in 0..machine.nodes.len() {
        let next = match is_filter(node) {
            true => below.get(&name),
            false => None,
        };
        let Some(next) = next else {
            return Ok((name, node));
        };
        node = machine.node(next)?;
        name = next.clone();
    }
    Err(QmpError::Protocol(
        "its block nodes stand in a circle".to_string(),
    ))
}

/// What becomes of the bitmaps.
pub(super) fn settlement(planned: &[PlannedDisk], outcome: Outcome) -> Vec<Value> {
    let mut actions = Vec::new();
    for disk in planned {
        let mut on = |what: &str, data: Value| {
            let mut data = data;
            data["node"] = disk.bitmap_node.clone().into();
            actions.push(json!({"type": format!("block-dirty-bitmap-{what}"), "data": data}));
        };
        match (outcome, &disk.old) {
            (Outcome::Committed, Some(old)) => on("remove", json!({ "name": old })),
            (Outcome::Abandoned, Some(old)) => {
                on("enable", json!({ "name": old }));
                on("merge", json!({"target": old, "bitmaps": [disk.new]}));
                on("remove", json!({"name": disk.new}));
            }
            (Outcome::Abandoned, None) => on("remove", json!({"name": disk.new})),
            (Outcome::Committed, None) | (Outcome::Unknown, _) => {}
        }
    }
    actions
}
