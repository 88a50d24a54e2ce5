//! Fuzz targets of what a QEMU monitor sends.

use super::QmpError;
use super::connection::Lines;
use super::machine::{Machine, children_of, printable};
use super::plan::{Known, Mark, prefix, track};
use super::wire::Message;
use crate::hypervisor::SinceMark;
use crate::model::{DiskName, MAX_DISK_BYTES};
use serde_json::Value;

const OWNER: &str = "0123abcd";

fn check<T>(result: Result<T, QmpError>) -> Option<T> {
    if let Err(error) = &result {
        let shown = error.to_string();
        assert!(
            !shown.chars().any(char::is_control) && shown.len() < 4000,
            "{shown:?}"
        );
    }
    result.ok()
}

/// Lines of a monitor.
pub fn qmp_lines(mut bytes: &[u8]) {
    let mut lines = Lines::default();
    loop {
        match lines.receive(&mut bytes) {
            Ok(Message::Error { detail: text, .. } | Message::Event { name: text }) => {
                assert!(!text.chars().any(char::is_control) && text.chars().count() <= 400);
            }
            Ok(Message::Greeting | Message::Return { .. }) => {}
            Err(QmpError::Closed) => return,
            error => drop(check(error)),
        }
    }
}

/// The answers to `query-status`, `query-block`, `query-named-block-nodes` and
/// `x-debug-query-block-graph`, a line each.
pub fn qmp_machine(bytes: &[u8]) {
    let answers: Vec<Value> = bytes
        .split(|byte| *byte == b'\n')
        .map(|line| serde_json::from_slice(line).unwrap_or_default())
        .collect();
    let [status, devices, nodes, graph, ..] = answers.as_slice() else {
        return;
    };
    let _ = check(children_of(graph, "file"));
    let Some(machine) = check(Machine::of(status, devices, nodes)) else {
        return;
    };
    for device in &machine.devices {
        assert_eq!(printable(&device.shown), device.shown);
        let _ = check(machine.node(&device.node));
    }
    for node in machine.nodes.values() {
        assert!(node.size_bytes <= MAX_DISK_BYTES);
        assert_eq!(printable(&node.filename), node.filename);
        for bitmap in &node.bitmaps {
            let mark = Mark::new(&bitmap.name, 65536).text();
            let since = SinceMark {
                disk: DiskName::new("vd0").expect("a name"),
                size_bytes: node.size_bytes,
                alignment_bytes: 65536,
                mark,
            };
            let tracking = track(OWNER, node, Some(&since));
            assert!(
                tracking
                    .stale
                    .iter()
                    .all(|name| name.starts_with(&prefix(OWNER)))
            );
            if let Known::Since {
                bitmap: known,
                granularity,
                merge,
            } = tracking.known
            {
                assert!(known == bitmap.name && granularity == 65536);
                assert!(!bitmap.inconsistent && !bitmap.busy);
                // What was stopped counts only with what recorded since.
                assert!(bitmap.recording || merge.is_some());
                assert!(!tracking.stale.contains(&known));
            }
        }
    }
}
