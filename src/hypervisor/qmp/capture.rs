//! One capture of a running VM: plan, the instant, reading, and the way back.

use super::connection::Connection;
use super::fleece::{self, Role, Way};
use super::machine::{Device, Machine, Node, Peer, children, rows};
use super::plan::{Known, Mark, Tracking, successor, track};
use super::recover::{HeldNote, clean};
use super::{QmpError, QmpSettings, QmpSource};
use crate::hypervisor::guard::{Guard, Order, Thawed};
use crate::hypervisor::nbd::{BASE_ALLOCATION, Endpoint, NbdClient, NbdError};
use crate::hypervisor::nbd_disk::{Explain, NbdDisk, dirty_extents, explained};
use crate::hypervisor::runtime_folder::{RuntimeFolder, random_suffix};
use crate::hypervisor::{
    Capture, CaptureError, CaptureErrorKind, CapturedDisk, Changes, Consistency, Freeze, Outcome,
    Reading, SinceMark,
};
use crate::model::DiskName;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often a job's overlay is looked at.
const WATCH_EVERY: Duration = Duration::from_millis(50);

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

/// The connection, shared with the watcher of an overlay.
type Shared = Arc<Mutex<Connection>>;

fn lock(connection: &Shared) -> MutexGuard<'_, Connection> {
    // Nothing panics while it is held; a broken stream is known to the connection itself.
    connection.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) struct QmpCapture {
    settings: QmpSettings,
    connection: Shared,
    planned: Vec<PlannedDisk>,
    disks: Vec<NbdDisk>,
    /// The bitmaps were exchanged, so an outcome has to be told.
    rotated: bool,
    watcher: Option<Watcher>,
    consistency: Consistency,
    notes: Vec<String>,
    definition: Vec<u8>,
    /// Dropped last: the overlays lie in it.
    _folder: RuntimeFolder,
}

pub(super) fn open(
    source: &QmpSource,
    since: &[SinceMark],
    reading: Reading,
) -> Result<QmpCapture, CaptureError> {
    let settings = &source.settings;
    let mut connection = source.connect()?;
    let failed = |error: QmpError| source.failed(error);
    let peer = connection.peer().map_err(failed)?;
    clean(&mut connection, settings).map_err(failed)?;
    let machine = Machine::look(&mut connection).map_err(failed)?;
    let mut notes = Vec::new();
    let planned = plan_disks(
        settings,
        &mut connection,
        &machine,
        since,
        reading,
        &mut notes,
    )?;
    let definition = definition(&mut connection, &peer, &planned).map_err(failed)?;
    // Exchanging the drive of a device that an I/O thread serves can lose a request of the guest,
    // which then waits for ever (seen with QEMU 10.0.2, on the way back). Jobs do not.
    let iothreads = connection
        .run("query-iothreads", Value::Null)
        .map_err(failed)?;
    let has_iothreads = !rows(&iothreads).map_err(failed)?.is_empty();
    let connection = Arc::new(Mutex::new(connection));
    let attempt = |way: Way, notes: Vec<String>| -> Result<QmpCapture, Attempt> {
        let folder = RuntimeFolder::create(&settings.overlay_dir)?;
        if peer.user != rustix::process::geteuid().as_raw() {
            folder.give_to(peer.user, peer.group).map_err(|error| {
                CaptureError::new(CaptureErrorKind::Io, settings.overlay_dir.display(), error)
            })?;
        }
        let mut capture = QmpCapture {
            settings: settings.clone(),
            connection: connection.clone(),
            planned: Vec::new(),
            disks: Vec::new(),
            rotated: false,
            watcher: None,
            consistency: Consistency::Crash,
            notes,
            definition: definition.clone(),
            _folder: folder,
        };
        match capture.begin(&planned, way, &peer, &machine.status) {
            Ok(()) => Ok(capture),
            Err(attempt) => match capture.give_up(&planned) {
                Ok(()) => Err(attempt),
                Err(second) => {
                    let first = attempt.into_error();
                    Err(Attempt::Failed(CaptureError::new(
                        first.kind,
                        first.name,
                        format!("{}; and cleaning up failed: {second}", first.detail),
                    )))
                }
            },
        }
    };
    let done = match has_iothreads {
        true => attempt(Way::Jobs, notes),
        false => match attempt(Way::Filters, notes.clone()) {
            Err(Attempt::NoFilters(reason)) => {
                notes.push(format!(
                    "fleeced by backup jobs, because QEMU cannot put filters before the disks \
                     ({reason})"
                ));
                attempt(Way::Jobs, notes)
            }
            other => other,
        },
    };
    let mut capture = done.map_err(Attempt::into_error)?;
    capture.planned = planned;
    Ok(capture)
}

/// Why an attempt did not become a capture.
enum Attempt {
    /// The devices cannot be given filters: jobs may do.
    NoFilters(String),
    Failed(CaptureError),
}

impl Attempt {
    fn into_error(self) -> CaptureError {
        match self {
            Attempt::NoFilters(detail) => CaptureError::new(CaptureErrorKind::Tool, "QEMU", detail),
            Attempt::Failed(error) => error,
        }
    }
}

impl From<CaptureError> for Attempt {
    fn from(error: CaptureError) -> Self {
        Attempt::Failed(error)
    }
}

impl QmpCapture {
    fn begin(
        &mut self,
        planned: &[PlannedDisk],
        way: Way,
        peer: &Peer,
        status: &str,
    ) -> Result<(), Attempt> {
        {
            let mut connection = lock(&self.connection);
            for disk in planned {
                fleece::add_overlay(
                    &mut connection,
                    &self.settings,
                    &self._folder,
                    peer,
                    way,
                    disk,
                )?;
            }
        }
        self.instant(planned, way, status)?;
        if way == Way::Jobs {
            self.watcher = Some(Watcher::start(
                self.connection.clone(),
                &self.settings,
                planned.len(),
            ));
        }
        let mut connection = lock(&self.connection);
        let owner = &self.settings.owner;
        let shown = self.settings.monitor.display();
        let failed = |error: QmpError| error.into_capture(&shown);
        fleece::start_server(&mut connection, &self._folder).map_err(failed)?;
        for disk in planned {
            if way == Way::Filters {
                fleece::add_access(&mut connection, owner, disk).map_err(failed)?;
            }
            let context = fleece::add_export(&mut connection, owner, way, disk).map_err(failed)?;
            let mut endpoint = Endpoint::new(self._folder.socket(), disk.name.as_str());
            let has_allocation = !(way == Way::Filters && disk.limited);
            if has_allocation {
                endpoint = endpoint.with_context(BASE_ALLOCATION);
            }
            if let Some(context) = &context {
                endpoint = endpoint.with_context(context);
            }
            let explain: Box<dyn Explain> = match &self.watcher {
                Some(watcher) => Box::new(watcher.trouble.clone()),
                None => Box::new(BrokenSnapshot {
                    limit: fleece::limit_of(&self.settings),
                }),
            };
            let nbd = |error: NbdError| explained(&*explain, error, &disk.shown);
            let client = NbdClient::connect(endpoint).map_err(nbd)?;
            if client.size_bytes() != disk.size_bytes {
                return Err(CaptureError::new(
                    CaptureErrorKind::Inconsistent,
                    &disk.shown,
                    format!(
                        "has {} bytes, but its export has {}",
                        disk.size_bytes,
                        client.size_bytes()
                    ),
                )
                .into());
            }
            let changes = match (&context, &disk.reason) {
                (Some(context), _) => {
                    Changes::Extents(dirty_extents(&client, context).map_err(nbd)?)
                }
                (None, reason) => Changes::Unknown(reason.clone().unwrap_or_default()),
            };
            self.disks.push(NbdDisk {
                name: disk.name.clone(),
                shown: disk.shown.clone(),
                client,
                changes,
                mark: Mark::new(&disk.new, disk.granularity).text(),
                has_allocation,
                explain: Some(explain),
            });
        }
        Ok(())
    }

    /// Everything between the freeze and the thaw. Whatever fails, the guest runs afterwards.
    fn instant(&mut self, planned: &[PlannedDisk], way: Way, status: &str) -> Result<(), Attempt> {
        let settings = self.settings.clone();
        // Jobs are set up by one transaction, on a guest that runs.
        let pauses = way == Way::Filters && status == "running";
        let freezes =
            settings.freeze != Freeze::Never && settings.agent.is_some() && status == "running";
        if settings.freeze == Freeze::Require && !freezes {
            return Err(CaptureError::new(
                CaptureErrorKind::Tool,
                settings.monitor.display(),
                "fsfreeze = \"require\", but the guest cannot be frozen: it is not running, or no \
                 guest_agent is configured",
            )
            .into());
        }
        if !pauses && !freezes {
            return self.rotate(planned, way);
        }
        HeldNote {
            paused: pauses,
            frozen: freezes,
        }
        .write(&settings)?;
        let mut guard = Guard::start(
            &settings.guard,
            Order {
                monitor: pauses.then(|| settings.monitor.clone()),
                agent: freezes.then(|| settings.agent.clone()).flatten(),
                limit_seconds: settings.freeze_limit.as_secs().max(1),
            },
        )?;
        let frozen = match freezes {
            true => guard.freeze(),
            false => Ok(()),
        };
        let frozen = match (frozen, settings.freeze) {
            (Ok(()), _) => freezes,
            (Err(error), Freeze::Require) => {
                HeldNote::remove(&settings);
                return Err(error.into());
            }
            (Err(error), _) => {
                self.notes
                    .push(format!("the guest was not frozen ({})", error.detail));
                false
            }
        };
        let result = match pauses {
            true => self.paused(&mut guard, planned, way),
            false => self.rotate(planned, way),
        };
        let thawed = match frozen {
            true => guard.thaw().map(Some),
            false => Ok(None),
        };
        // Where the guard is still needed, its end is waited for here. Where it could not let the
        // guest go, the note stays, and the next `recover` tries.
        if guard.end() && thawed.is_ok() {
            HeldNote::remove(&settings);
        }
        result?;
        match (thawed, settings.freeze) {
            (Ok(None), _) => {}
            (Ok(Some(Thawed::InTime)), _) => self.consistency = Consistency::Filesystem,
            (Ok(Some(Thawed::Before)), Freeze::Require) => {
                return Err(CaptureError::new(
                    CaptureErrorKind::Inconsistent,
                    settings.monitor.display(),
                    format!(
                        "the guest was frozen for {} s and had to be let go before the instant",
                        settings.freeze_limit.as_secs()
                    ),
                )
                .into());
            }
            (Ok(Some(Thawed::Before)), _) => self
                .notes
                .push("the guest was let go before the instant: it froze for too long".to_string()),
            // Whether it was still frozen at the instant is not known.
            (Err(error), Freeze::Require) => return Err(error.into()),
            (Err(error), _) => self.notes.push(format!("while thawing: {error}")),
        }
        Ok(())
    }

    fn paused(
        &mut self,
        guard: &mut Guard,
        planned: &[PlannedDisk],
        way: Way,
    ) -> Result<(), Attempt> {
        let shown = self.settings.monitor.display().to_string();
        let failed = |error: QmpError| error.into_capture(&shown);
        guard.will_pause()?;
        let stopped = lock(&self.connection).run("stop", Value::Null);
        let result = match stopped {
            Ok(_) => self.rotate(planned, way),
            Err(error) => Err(failed(error).into()),
        };
        let resumed = lock(&self.connection).run("cont", Value::Null);
        match resumed {
            Ok(_) => guard.resumed()?,
            // The guard takes the monitor over once this connection is closed, which is broken.
            Err(error) => {
                lock(&self.connection).hang_up();
                return Err(failed(error).into());
            }
        }
        result
    }

    /// The bitmaps, and the filters or jobs.
    fn rotate(&mut self, planned: &[PlannedDisk], way: Way) -> Result<(), Attempt> {
        let owner = self.settings.owner.clone();
        let shown = self.settings.monitor.display().to_string();
        let mut connection = lock(&self.connection);
        connection
            .run("transaction", fleece::rotation(&owner, way, planned))
            .map_err(|error| error.into_capture(&shown))?;
        self.rotated = true;
        if way == Way::Filters {
            for disk in planned {
                fleece::insert_filter(&mut connection, &owner, disk).map_err(
                    |error| match error.is_refused() {
                        true => Attempt::NoFilters(format!("{}: {error}", disk.shown)),
                        false => error.into_capture(&disk.shown).into(),
                    },
                )?;
            }
        }
        Ok(())
    }

    /// Undoes an attempt. Bitmaps first count again from the newest point.
    fn give_up(mut self, planned: &[PlannedDisk]) -> Result<(), CaptureError> {
        self.end(planned, Outcome::Abandoned)
    }

    fn end(&mut self, planned: &[PlannedDisk], outcome: Outcome) -> Result<(), CaptureError> {
        if let Some(watcher) = self.watcher.take() {
            watcher.stop();
        }
        for disk in self.disks.drain(..) {
            // The server is stopped next; what it says now is of no interest.
            let _ = disk.client.disconnect();
        }
        let shown = self.settings.monitor.display();
        let failed = |error: QmpError| error.into_capture(&shown);
        let mut connection = lock(&self.connection);
        clean(&mut connection, &self.settings).map_err(failed)?;
        if !self.rotated {
            return Ok(());
        }
        let actions = settlement(planned, outcome);
        if !actions.is_empty() {
            connection
                .run("transaction", json!({ "actions": actions }))
                .map_err(failed)?;
        }
        Ok(())
    }
}

/// What becomes of the bitmaps.
fn settlement(planned: &[PlannedDisk], outcome: Outcome) -> Vec<Value> {
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

fn plan_disks(
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
    match machine.status.as_str() {
        "running" | "paused" | "prelaunch" | "shutdown" | "suspended" | "watchdog" => {}
        "io-error" => {
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
                format!("the VM is being migrated, saved or restored ({other}); try again later"),
            ));
        }
    }
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
    if device.removable || excluded || top.size_bytes == 0 {
        return Ok(None);
    }
    if top.read_only {
        notes.push(format!("{}: left out, it is read-only", device.shown));
        return Ok(None);
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

/// The node that can carry a lasting bitmap: below filters that change nothing of the content.
fn image_of<'a>(
    connection: &mut Connection,
    machine: &'a Machine,
    name: &str,
    top: &'a Node,
) -> Result<(String, &'a Node), QmpError> {
    let (mut name, mut node) = (name.to_string(), top);
    // Bounded by the number of nodes: a graph with a circle would not be one.
    for _ in 0..machine.nodes.len() {
        if !matches!(node.driver.as_str(), "throttle" | "copy-on-read") {
            break;
        }
        let below = children(connection, "file")?;
        let Some(next) = below.get(&name) else { break };
        node = machine.node(next)?;
        name = next.clone();
    }
    Ok((name, node))
}

/// What is needed to start such a VM again: how QEMU was started, and which disk is which.
fn definition(
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
    let definition = json!({
        "name": name.get("name"),
        "uuid": uuid.get("UUID"),
        "qemu": version.get("package").into_iter().chain(version.get("qemu")).collect::<Vec<_>>(),
        "arguments": arguments,
        "disks": disks,
    });
    serde_json::to_vec_pretty(&definition).map_err(|error| QmpError::Protocol(error.to_string()))
}

/// Says why the image of the instant is gone: QEMU gave it up so as not to disturb the guest.
struct BrokenSnapshot {
    limit: u64,
}

impl Explain for BrokenSnapshot {
    fn explain(&self, cause: &NbdError) -> Option<String> {
        // A disk that cannot be read answers with an I/O error (5); these say that there is no
        // snapshot any more.
        match cause {
            NbdError::Server {
                errno: 1 | 13 | 22, ..
            } => Some(overlay_full(self.limit)),
            _ => None,
        }
    }
}

fn overlay_full(limit: u64) -> String {
    format!(
        "the overlay ran full, or could not be written in time: it may have {} MiB, and the guest \
         overwrote more than that during the backup. The guest was not disturbed. Raise [host] \
         overlay_size, or move overlay_dir to a faster disk",
        limit >> 20
    )
}

/// What the watcher of an overlay found.
#[derive(Clone, Default)]
struct Trouble {
    full: Arc<AtomicBool>,
    limit: u64,
}

impl Explain for Trouble {
    fn explain(&self, _: &NbdError) -> Option<String> {
        self.full
            .load(Ordering::Acquire)
            .then(|| overlay_full(self.limit))
    }
}

/// Looks whether the write threshold of a job's overlay was passed, and ends the jobs then:
/// before the overlay is full, which would stop the guest.
struct Watcher {
    trouble: Trouble,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Watcher {
    fn start(connection: Shared, settings: &QmpSettings, disks: usize) -> Self {
        let trouble = Trouble {
            full: Arc::default(),
            limit: fleece::limit_of(settings),
        };
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let (trouble, stop, settings) = (trouble.clone(), stop.clone(), settings.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Acquire) {
                    std::thread::sleep(WATCH_EVERY);
                    let mut connection = lock(&connection);
                    let passed = match Machine::look(&mut connection) {
                        Ok(machine) => (0..disks).any(|number| {
                            let name = Role::OverlayFile.name(&settings.owner, number);
                            // QEMU takes the threshold away when it is passed.
                            machine
                                .nodes
                                .get(&name)
                                .is_none_or(|node| node.write_threshold == 0)
                        }),
                        Err(_) => break,
                    };
                    if passed && !stop.load(Ordering::Acquire) {
                        trouble.full.store(true, Ordering::Release);
                        let _ = clean(&mut connection, &settings);
                        break;
                    }
                }
            })
        };
        Watcher {
            trouble,
            stop,
            thread,
        }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Release);
        // It has no result.
        let _ = self.thread.join();
    }
}

impl Capture for QmpCapture {
    fn disks(&self) -> Vec<&dyn CapturedDisk> {
        self.disks
            .iter()
            .map(|disk| disk as &dyn CapturedDisk)
            .collect()
    }

    fn definition(&self) -> Option<(&str, &[u8])> {
        Some(("qemu.json", &self.definition))
    }

    fn consistency(&self) -> Consistency {
        self.consistency
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    fn still_consistent(&self) -> Result<(), CaptureError> {
        match &self.watcher {
            Some(watcher) if watcher.trouble.full.load(Ordering::Acquire) => {
                Err(CaptureError::new(
                    CaptureErrorKind::Inconsistent,
                    self.settings.monitor.display(),
                    overlay_full(watcher.trouble.limit),
                ))
            }
            _ => Ok(()),
        }
    }

    fn close(mut self: Box<Self>, outcome: Outcome) -> Result<(), CaptureError> {
        let planned = std::mem::take(&mut self.planned);
        self.end(&planned, outcome)
    }
}
