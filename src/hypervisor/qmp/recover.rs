//! Taking out of QEMU what a capture put in: after each capture, and after one whose agent died.

use super::connection::Connection;
use super::fleece::{Role, set_drive};
use super::machine::{IO_ERROR, Machine, children, go_on, printable, rows, text};
use super::plan;
use super::{QmpError, QmpSettings, QmpSource};
use crate::hypervisor::freeze::{Freeze, not_thawed};
use crate::hypervisor::{CaptureError, CaptureErrorKind, guard, runtime_folder};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The folders of captures.
pub(super) const KIND: &str = "qmp";

/// A note of what a guest is held by, on disk before it is: for the next run, in case that both
/// the agent and its guard are killed while it stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HeldNote {
    pub paused: bool,
    pub frozen: bool,
}

impl HeldNote {
    pub(super) const NONE: HeldNote = HeldNote {
        paused: false,
        frozen: false,
    };

    fn path(settings: &QmpSettings) -> PathBuf {
        settings
            .runtime_dir
            .join(format!("held-{}", settings.owner))
    }

    pub(super) fn write(self, settings: &QmpSettings) -> Result<(), CaptureError> {
        let path = Self::path(settings);
        let failed =
            |error: io::Error| CaptureError::new(CaptureErrorKind::Io, path.display(), error);
        fs::create_dir_all(&settings.runtime_dir).map_err(failed)?;
        let text = serde_json::to_vec(&self).map_err(|error| failed(error.into()))?;
        fs::write(&path, text).map_err(failed)
    }

    pub(super) fn remove(settings: &QmpSettings) {
        // One that stays makes the next run look, and do nothing.
        let _ = fs::remove_file(Self::path(settings));
    }

    /// What of it is left to the next run.
    pub(super) fn leave(self, settings: &QmpSettings) {
        match self.paused || self.frozen {
            // The one before says more, and stays where this one cannot be written.
            true => drop(self.write(settings)),
            false => Self::remove(settings),
        }
    }

    /// An error, and what whoever reads it must know of the guest.
    pub(super) fn explain(self, settings: &QmpSettings, error: CaptureError) -> CaptureError {
        // Nobody listens where QEMU has ended, and its guest with it.
        if !self.paused || error.kind == CaptureErrorKind::Missing {
            return error;
        }
        let monitor = settings.monitor.display();
        let detail = format!(
            "{}; the guest may stand still since the instant of a backup. When QEMU answers \
             again, it is let go within an hour by the guard of that backup, else by the next run; \
             by hand: printf '{{\"execute\":\"qmp_capabilities\"}}{{\"execute\":\"cont\"}}' | \
             socat -t10 - UNIX-CONNECT:{monitor}",
            error.detail
        );
        CaptureError::new(error.kind, error.name, detail)
    }

    fn read(settings: &QmpSettings) -> Option<Self> {
        let text = fs::read(Self::path(settings)).ok()?;
        // A note that was cut short is one all the same.
        Some(serde_json::from_slice(&text).unwrap_or(HeldNote {
            paused: true,
            frozen: true,
        }))
    }
}

pub(super) fn recover(source: &QmpSource) -> Result<Vec<String>, CaptureError> {
    let settings = &source.settings;
    let mut notes = Vec::new();
    match source.connect() {
        Ok(mut connection) => {
            if let Some(note) = HeldNote::read(settings) {
                if note.paused {
                    go_on(&mut connection)
                        .map_err(|error| note.explain(settings, source.failed(error)))?;
                }
                let thawed = match &settings.agent {
                    Some(agent) if note.frozen => guard::thaw_at(agent).map(drop),
                    _ => Ok(()),
                };
                HeldNote {
                    paused: false,
                    frozen: thawed.is_err() && settings.freeze != Freeze::Never,
                }
                .leave(settings);
                // The restore point of this night shows the guest as it is, frozen or not.
                notes.extend(thawed.err().map(not_thawed));
            }
            clean(&mut connection, settings).map_err(|error| source.failed(error))?;
        }
        // Nobody there: nothing of ours is either.
        Err(error) if error.kind == CaptureErrorKind::Missing => HeldNote::remove(settings),
        Err(error) => {
            return Err(match HeldNote::read(settings) {
                Some(note) => note.explain(settings, error),
                None => error,
            });
        }
    }
    // Also those of VMs that are backed up no more: their QEMU does not need the names of its files.
    drop(runtime_folder::dead(&settings.overlay_dir, KIND)?);
    Ok(notes)
}

/// Removes the exports, jobs, filters and overlays of this owner. What the guest stands on
/// afterwards is its image again, and one that an overlay stopped goes on. Bitmaps are left: only the
/// newest point tells which count.
pub(super) fn clean(connection: &mut Connection, settings: &QmpSettings) -> Result<(), QmpError> {
    let owner = &settings.owner;
    remove_exports(connection, owner)?;
    end_jobs(connection, owner)?;
    let machine = Machine::look(connection)?;
    let ours = |role: Role| {
        let prefix = role.prefix(owner);
        machine
            .nodes
            .keys()
            .filter(move |name| name.starts_with(&prefix))
            .cloned()
            .collect::<Vec<_>>()
    };
    let filters = ours(Role::Filter);
    // A job's overlay that could not be written stopped the guest. With the job gone its write goes
    // through; if something else is wrong with its disks, it stops again.
    if machine.status == IO_ERROR && filters.is_empty() && !ours(Role::Overlay).is_empty() {
        connection.run("cont", Value::Null)?;
    }
    for access in ours(Role::Access) {
        remove_node(connection, &access)?;
    }
    if !filters.is_empty() {
        let below = children(connection, "file")?;
        for device in machine
            .devices
            .iter()
            .filter(|device| filters.contains(&device.node))
        {
            let image = below.get(&device.node).ok_or_else(|| {
                let shown = printable(&device.node);
                QmpError::Protocol(format!("what is below {shown} is not told"))
            })?;
            set_drive(connection, &device.path, image)?;
        }
        for filter in filters {
            remove_node(connection, &filter)?;
        }
    }
    for overlay in ours(Role::Overlay) {
        remove_node(connection, &overlay)?;
    }
    Ok(())
}

fn remove_node(connection: &mut Connection, node: &str) -> Result<(), QmpError> {
    connection
        .run("blockdev-del", json!({ "node-name": node }))
        .map(drop)
}

fn remove_exports(connection: &mut Connection, owner: &str) -> Result<(), QmpError> {
    let exports = connection.run("query-block-exports", Value::Null)?;
    let prefix = Role::Export.prefix(owner);
    let names = rows(&exports)?
        .iter()
        .map(|row| text(row, "id"))
        .collect::<Result<Vec<String>, QmpError>>()?;
    let (ours, others): (Vec<_>, Vec<_>) = names
        .into_iter()
        .partition(|name| name.starts_with(&prefix));
    match (ours.is_empty(), others.is_empty()) {
        (true, _) => Ok(()),
        (false, true) => connection.run("nbd-server-stop", Value::Null).map(drop),
        (false, false) => {
            for name in ours {
                connection.run("block-export-del", json!({"id": name, "mode": "hard"}))?;
            }
            Ok(())
        }
    }
}

fn end_jobs(connection: &mut Connection, owner: &str) -> Result<(), QmpError> {
    let prefix = Role::Job.prefix(owner);
    let deadline = Instant::now() + connection.limits().job;
    loop {
        let jobs = connection.run("query-jobs", Value::Null)?;
        let mut left = false;
        for job in rows(&jobs)? {
            let id = text(job, "id")?;
            if !id.starts_with(&prefix) {
                continue;
            }
            left = true;
            let order = match text(job, "status")?.as_str() {
                "concluded" => "job-dismiss",
                "aborting" | "null" => continue,
                _ => "job-cancel",
            };
            match connection.run(order, json!({ "id": id })) {
                // It may have ended in between.
                Err(error) if !error.is_refused() => return Err(error),
                _ => {}
            }
        }
        if !left {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(QmpError::TimedOut);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Removes everything of this owner, bitmaps too.
pub(super) fn release(source: &QmpSource) -> Result<Vec<String>, CaptureError> {
    recover(source)?;
    let mut connection = source.connect()?;
    let failed = |error: QmpError| source.failed(error);
    let machine = Machine::look(&mut connection).map_err(failed)?;
    let prefix = plan::prefix(&source.settings.owner);
    let mut released = Vec::new();
    // Bitmaps below a snapshot cannot be written, and stand in nobody's way; the capture that comes
    // after the snapshot's commit removes them.
    for (name, node) in machine.nodes.iter().filter(|(_, node)| !node.read_only) {
        for bitmap in &node.bitmaps {
            if bitmap.name.starts_with(&prefix) {
                connection
                    .run(
                        "block-dirty-bitmap-remove",
                        json!({"node": name, "name": bitmap.name}),
                    )
                    .map_err(failed)?;
                let shown = printable(&bitmap.name);
                released.push(format!("bitmap {shown} of {}", node.filename));
            }
        }
    }
    Ok(released)
}
