//! The definition of a VM that QEMU runs, for its restore points.

use super::QmpError;
use super::connection::Connection;
use super::machine::{Peer, printable};
use super::planned::PlannedDisk;
use serde_json::{Value, json};

/// Longest command line that is kept; the kernel's own limit is some 2 MiB.
const MAX_ARGUMENT_BYTES: usize = 4 << 20;

/// What is needed to start such a VM again: how QEMU was started, and which disk is which. Of what
/// QEMU says only short texts and numbers are taken over.
pub(super) fn definition(
    connection: &mut Connection,
    peer: &Peer,
    planned: &[PlannedDisk],
) -> Result<Vec<u8>, QmpError> {
    let name = connection.run("query-name", Value::Null)?;
    let uuid = connection.run("query-uuid", Value::Null)?;
    let version = connection.run("query-version", Value::Null)?;
    // Absent where QEMU runs in another place (a container) or under another name.
    let arguments: Vec<String> = std::fs::read(format!("/proc/{}/cmdline", peer.process))
        .unwrap_or_default()
        .get(..)
        .filter(|arguments| arguments.len() <= MAX_ARGUMENT_BYTES)
        .unwrap_or_default()
        .split(|byte| *byte == 0)
        .filter(|part| !part.is_empty())
        .map(|part| String::from_utf8_lossy(part).into_owned())
        .collect();
    let disks: Vec<Value> = planned
        .iter()
        .map(|disk| {
            json!({
                "name": disk.name.as_str(),
                "size_bytes": disk.size_bytes,
                "driver": disk.driver,
                "filename": disk.filename,
                "node": disk.node,
            })
        })
        .collect();
    let short = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(printable);
    let number = |key: &str| version.pointer(key).and_then(Value::as_u64);
    let definition = json!({
        "name": short(&name, "name"),
        "uuid": short(&uuid, "UUID"),
        "qemu": {
            "package": short(&version, "package"),
            "version": [number("/qemu/major"), number("/qemu/minor"), number("/qemu/micro")],
        },
        "arguments": arguments,
        "disks": disks,
    });
    serde_json::to_vec_pretty(&definition).map_err(|error| QmpError::Protocol(error.to_string()))
}
