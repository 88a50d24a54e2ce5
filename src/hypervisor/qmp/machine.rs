//! What a QEMU says of its devices, block nodes and bitmaps, as far as it can be trusted: every
//! field is checked, and what is not understood is an error rather than a guess.

use super::QmpError;
use super::connection::Connection;
use crate::model::{DiskName, MAX_DISK_BYTES};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// More devices or nodes than any VM has.
const MAX_ROWS: usize = 4096;

/// The state of a guest that QEMU stopped because one of its writes failed.
pub(super) const IO_ERROR: &str = "io-error";

/// The process behind a monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Peer {
    pub process: i32,
    pub user: u32,
    pub group: u32,
}

impl Peer {
    /// The user and group, if they are not ours.
    pub(super) fn stranger(&self) -> Option<(u32, u32)> {
        let is_ours = self.user == rustix::process::geteuid().as_raw();
        (!is_ours).then_some((self.user, self.group))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bitmap {
    pub name: String,
    pub recording: bool,
    pub busy: bool,
    /// QEMU ended without storing it; it can only be removed.
    pub inconsistent: bool,
    pub granularity: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    pub driver: String,
    pub filename: String,
    pub size_bytes: u64,
    pub read_only: bool,
    /// Whether bitmaps can be stored in the image and outlive QEMU.
    pub keeps_bitmaps: bool,
    /// Bytes after which a write is announced; 0 where none is set, or it was passed.
    pub write_threshold: u64,
    pub bitmaps: Vec<Bitmap>,
}

/// A device of the guest with something in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Device {
    /// Its name as QEMU has it, for messages.
    pub shown: String,
    /// The name as a disk of a restore point; `None` where QEMU's name is none.
    pub disk: Option<DiskName>,
    /// Where its `drive` can be exchanged.
    pub path: Option<String>,
    pub node: String,
    pub removable: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Machine {
    pub status: String,
    pub devices: Vec<Device>,
    pub nodes: BTreeMap<String, Node>,
}

impl Machine {
    pub(super) fn look(connection: &mut Connection) -> Result<Self, QmpError> {
        let status = connection.run("query-status", Value::Null)?;
        let devices = connection.run("query-block", Value::Null)?;
        let nodes = connection.run("query-named-block-nodes", json!({ "flat": true }))?;
        Self::of(&status, &devices, &nodes)
    }

    /// From the answers to these three questions.
    pub(super) fn of(status: &Value, devices: &Value, nodes: &Value) -> Result<Self, QmpError> {
        let mut described = BTreeMap::new();
        for row in rows(nodes)? {
            let name = text(row, "node-name")?;
            let shown = printable(&name);
            if described.insert(name, node(row)?).is_some() {
                return Err(QmpError::Protocol(format!(
                    "the block node {shown:?} is described twice"
                )));
            }
        }
        Ok(Machine {
            status: text(status, "status")?,
            devices: rows(devices)?
                .iter()
                .filter_map(|row| device(row).transpose())
                .collect::<Result<_, _>>()?,
            nodes: described,
        })
    }

    pub(super) fn node(&self, name: &str) -> Result<&Node, QmpError> {
        self.nodes.get(name).ok_or_else(|| {
            let shown = printable(name);
            QmpError::Protocol(format!("the block node {shown:?} is not described"))
        })
    }
}

pub(super) fn status(connection: &mut Connection) -> Result<String, QmpError> {
    text(&connection.run("query-status", Value::Null)?, "status")
}

/// Whether a guest in this state runs, or wakes up by itself.
pub(super) fn is_live(status: &str) -> bool {
    matches!(status, "running" | "suspended")
}

/// Lets a paused guest go on. In another state it is not ours any more: one that was migrated away
/// would run in two places.
pub(super) fn go_on(connection: &mut Connection) -> Result<(), QmpError> {
    match status(connection)?.as_str() {
        "paused" => connection.run("cont", Value::Null).map(drop),
        _ => Ok(()),
    }
}

/// The status of a migration that is under way.
pub(super) fn migration(connection: &mut Connection) -> Result<Option<String>, QmpError> {
    let found = connection.run("query-migrate", Value::Null)?;
    Ok(under_way(&found).map(printable))
}

fn under_way(found: &Value) -> Option<&str> {
    let status = found.get("status").and_then(Value::as_str)?;
    (!matches!(status, "none" | "completed" | "failed" | "cancelled")).then_some(status)
}

/// The node below each node that has exactly one named `child`: what a filter stands on.
pub(super) fn children(
    connection: &mut Connection,
    child: &str,
) -> Result<BTreeMap<String, String>, QmpError> {
    let graph = connection.run("x-debug-query-block-graph", Value::Null)?;
    children_of(&graph, child)
}

/// From the answer to that question.
pub(super) fn children_of(
    graph: &Value,
    child: &str,
) -> Result<BTreeMap<String, String>, QmpError> {
    let mut names = BTreeMap::new();
    for row in rows(field(graph, "nodes")?)? {
        names.insert(number(row, "id")?, text(row, "name")?);
    }
    let mut found = BTreeMap::new();
    for row in rows(field(graph, "edges")?)? {
        if text(row, "name")? != child {
            continue;
        }
        let above = names.get(&number(row, "parent")?);
        let below = names.get(&number(row, "child")?);
        if let (Some(above), Some(below)) = (above, below) {
            found.insert(above.clone(), below.clone());
        }
    }
    Ok(found)
}

fn device(row: &Value) -> Result<Option<Device>, QmpError> {
    let Some(inserted) = row.get("inserted") else {
        return Ok(None);
    };
    let backend = row
        .get("device")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let qdev = row.get("qdev").and_then(Value::as_str);
    // `/machine/peripheral/vd0/virtio-backend`, `scsi0`, `/machine/unattached/device[7]`.
    let id = qdev.and_then(|qdev| {
        let path = qdev.strip_suffix("/virtio-backend").unwrap_or(qdev);
        match path.strip_prefix("/machine/peripheral/") {
            Some(id) => Some(id),
            None if !path.starts_with('/') => Some(path),
            None => None,
        }
    });
    let shown = match id {
        Some(id) => id,
        None if !backend.is_empty() => backend,
        // What the board brings along, with a block node of its own: `/machine/system.flash1`.
        None => qdev
            .and_then(|qdev| qdev.strip_prefix("/machine/"))
            .filter(|own| !own.contains('/'))
            .or(qdev)
            .unwrap_or("a device without a name"),
    };
    Ok(Some(Device {
        disk: DiskName::new(shown).ok(),
        shown: printable(shown),
        path: qdev.map(|qdev| match qdev.starts_with('/') {
            true => qdev.to_string(),
            false => format!("/machine/peripheral/{qdev}"),
        }),
        node: text(inserted, "node-name")?,
        removable: row
            .get("removable")
            .and_then(Value::as_bool)
            .unwrap_or(false),
    }))
}

fn node(row: &Value) -> Result<Node, QmpError> {
    let image = field(row, "image")?;
    let size_bytes = number(image, "virtual-size")?;
    if size_bytes > MAX_DISK_BYTES {
        return Err(QmpError::Protocol(format!("a disk of {size_bytes} bytes")));
    }
    let driver = text(row, "drv")?;
    // The first version of qcow2 cannot store bitmaps.
    let compat = row
        .pointer("/image/format-specific/data/compat")
        .and_then(Value::as_str);
    let bitmaps: Vec<Bitmap> = match row.get("dirty-bitmaps") {
        None => Vec::new(),
        // Those without a name belong to QEMU's own jobs.
        Some(bitmaps) => rows(bitmaps)?
            .iter()
            .filter(|row| row.get("name").is_some())
            .map(bitmap)
            .collect::<Result<_, _>>()?,
    };
    let names: BTreeSet<&str> = bitmaps.iter().map(|bitmap| &*bitmap.name).collect();
    if names.len() != bitmaps.len() {
        return Err(QmpError::Protocol(
            "two bitmaps of one disk have the same name".to_string(),
        ));
    }
    Ok(Node {
        keeps_bitmaps: driver == "qcow2" && compat == Some("1.1"),
        filename: row
            .get("file")
            .and_then(Value::as_str)
            .map(printable)
            .unwrap_or_default(),
        driver,
        size_bytes,
        read_only: row.get("ro").and_then(Value::as_bool).unwrap_or(false),
        write_threshold: row
            .get("write_threshold")
            .and_then(Value::as_u64)
            .unwrap_or(0),
        bitmaps,
    })
}

fn bitmap(row: &Value) -> Result<Bitmap, QmpError> {
    let flag = |key: &str| row.get(key).and_then(Value::as_bool);
    Ok(Bitmap {
        name: text(row, "name")?,
        // Fields whose absence could hide a change are needed.
        recording: flag("recording")
            .ok_or_else(|| QmpError::Protocol("a bitmap without \"recording\"".to_string()))?,
        busy: flag("busy").unwrap_or(false),
        inconsistent: flag("inconsistent").unwrap_or(false),
        granularity: number(row, "granularity")?,
    })
}

pub(super) fn rows(value: &Value) -> Result<&[Value], QmpError> {
    match value.as_array() {
        Some(rows) if rows.len() <= MAX_ROWS => Ok(rows),
        _ => Err(QmpError::Protocol(
            "a list that is none, or has no end".to_string(),
        )),
    }
}

fn field<'a>(value: &'a Value, key: &str) -> Result<&'a Value, QmpError> {
    value
        .get(key)
        .ok_or_else(|| QmpError::Protocol(format!("an answer lacks {key:?}")))
}

pub(super) fn text(value: &Value, key: &str) -> Result<String, QmpError> {
    field(value, key)?
        .as_str()
        .map(str::to_string)
        .ok_or_else(|| QmpError::Protocol(format!("{key:?} is not a text")))
}

fn number(value: &Value, key: &str) -> Result<u64, QmpError> {
    field(value, key)?
        .as_u64()
        .ok_or_else(|| QmpError::Protocol(format!("{key:?} is not a number")))
}

/// A text of the peer, fit to be printed.
pub(super) fn printable(text: &str) -> String {
    text.chars()
        .filter(|letter| !letter.is_control())
        .take(200)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(qdev: &str, backend: &str) -> Device {
        device(&json!({
            "device": backend, "qdev": qdev, "removable": false,
            "inserted": { "node-name": "n" },
        }))
        .unwrap()
        .unwrap()
    }

    #[test]
    fn a_disk_is_named_as_the_device_is_in_qemus_configuration() {
        let cases = [
            ("/machine/peripheral/vd0/virtio-backend", "", Some("vd0")),
            ("scsi0", "drive-scsi0", Some("scsi0")),
            (
                "/machine/unattached/device[7]",
                "ide0-hd0",
                Some("ide0-hd0"),
            ),
            ("/machine/system.flash1", "pflash1", Some("pflash1")),
            ("/machine/system.flash1", "", Some("system.flash1")),
            ("/machine/unattached/device[7]", "", None),
        ];
        for (qdev, backend, name) in cases {
            let device = named(qdev, backend);
            assert_eq!(device.disk.as_ref().map(DiskName::as_str), name, "{qdev}");
        }
        assert_eq!(
            named("scsi0", "").path.as_deref(),
            Some("/machine/peripheral/scsi0")
        );
    }

    #[test]
    fn a_migration_is_under_way_until_it_has_ended() {
        for (found, expected) in [
            (json!({}), None),
            (json!({"status": "completed"}), None),
            (json!({"status": "failed", "error-desc": "x"}), None),
            (json!({"status": "active"}), Some("active")),
            (json!({"status": "pre-switchover"}), Some("pre-switchover")),
        ] {
            assert_eq!(under_way(&found), expected, "{found}");
        }
    }

    #[test]
    fn a_bitmap_that_does_not_say_whether_it_records_is_not_believed() {
        assert!(bitmap(&json!({"name": "x", "granularity": 65536})).is_err());
    }
}
