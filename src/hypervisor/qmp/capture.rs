//! One capture of a running VM: plan, the instant, reading, and the way back.

use super::definition::definition;
use super::fleece::{self, Way};
use super::machine::{self, Machine, Peer, go_on, is_live, rows};
use super::overlay::{BrokenSnapshot, Shared, Watcher, lock};
use super::plan::Mark;
use super::planned::{PlannedDisk, capturable, plan_disks, settlement};
use super::recover::{HeldNote, KIND, clean};
use super::{QmpError, QmpSettings, QmpSource};
use crate::hypervisor::guard::{self, Guard, Order, Thawed};
use crate::hypervisor::nbd::{BASE_ALLOCATION, Endpoint, NbdClient, NbdError};
use crate::hypervisor::nbd_disk::{Explain, NbdDisk, dirty, explained};
use crate::hypervisor::runtime_folder::RuntimeFolder;
use crate::hypervisor::{
    Capture, CaptureError, CaptureErrorKind, CapturedDisk, Changes, Consistency, Freeze, Outcome,
    Reading, SinceMark,
};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};
use std::time::Instant;

pub(super) struct QmpCapture {
    settings: QmpSettings,
    connection: Shared,
    planned: Vec<PlannedDisk>,
    disks: Vec<NbdDisk>,
    /// The bitmaps were exchanged, so an outcome has to be told.
    rotated: bool,
    watcher: Option<Watcher>,
    /// A pause of ours that nobody is known to have ended, and whether the guest was frozen in it.
    held: HeldNote,
    /// Still tries to end it.
    guard: Option<Guard>,
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
    let mut planned = plan_disks(
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
    let attempt = |planned: &[PlannedDisk], way: Way, notes: Vec<String>| {
        let folder = RuntimeFolder::create(&settings.overlay_dir, KIND, peer.stranger())?;
        let mut capture = QmpCapture {
            settings: settings.clone(),
            connection: connection.clone(),
            planned: Vec::new(),
            disks: Vec::new(),
            rotated: false,
            watcher: None,
            held: HeldNote::NONE,
            guard: None,
            consistency: Consistency::Crash,
            notes,
            definition: definition.clone(),
            _folder: folder,
        };
        match capture.begin(planned, way, &peer) {
            Ok(()) => Ok(capture),
            Err(attempt) => match capture.give_up(planned) {
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
        true => attempt(&planned, Way::Jobs, notes),
        false => match attempt(&planned, Way::Filters, notes.clone()) {
            Err(Attempt::NoFilters(reason)) => {
                notes.push(format!(
                    "fleeced by backup jobs, because QEMU cannot put filters before the disks \
                     ({reason})"
                ));
                attempt(&planned, Way::Jobs, notes)
            }
            Err(Attempt::TooScattered(_)) => {
                for disk in &mut planned {
                    disk.limited = false;
                }
                attempt(&planned, Way::Filters, notes)
            }
            other => other,
        },
    };
    let mut capture = done.map_err(Attempt::into_error)?;
    capture.planned = planned;
    Ok(capture)
}

const THAWED_ITSELF: &str = "the guest thawed itself, perhaps before the instant: nothing was \
                             frozen any more when it was to be let go";

/// Why an attempt did not become a capture.
enum Attempt {
    /// The devices cannot be given filters: jobs may do.
    NoFilters(String),
    /// A disk whose changes alone can be read, and they cannot be told: all of it will be.
    TooScattered(String),
    Failed(CaptureError),
}

impl Attempt {
    fn into_error(self) -> CaptureError {
        match self {
            Attempt::NoFilters(detail) | Attempt::TooScattered(detail) => {
                CaptureError::new(CaptureErrorKind::Tool, "QEMU", detail)
            }
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
    fn begin(&mut self, planned: &[PlannedDisk], way: Way, peer: &Peer) -> Result<(), Attempt> {
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
        self.instant(planned, way)?;
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
        connection.begin_work();
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
                (Some(context), _) => dirty(&client, context).map_err(nbd)?,
                (None, reason) => Changes::Unknown(reason.clone().unwrap_or_default()),
            };
            if let (Changes::Unknown(reason), false) = (&changes, has_allocation) {
                return Err(Attempt::TooScattered(format!("{}: {reason}", disk.shown)));
            }
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
    fn instant(&mut self, planned: &[PlannedDisk], way: Way) -> Result<(), Attempt> {
        let settings = self.settings.clone();
        let status = capturable(&settings, &mut lock(&self.connection))?;
        // Jobs are set up by one transaction, on a guest that runs.
        let pauses = way == Way::Filters && is_live(&status);
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
        let mut guard = Guard::start(
            &settings.guard,
            Order {
                monitor: pauses.then(|| settings.monitor.clone()),
                agent: freezes.then(|| settings.agent.clone()).flatten(),
                limit_seconds: settings.freeze_limit.as_secs().max(1),
            },
        )?;
        let note = HeldNote {
            paused: pauses,
            frozen: freezes,
        };
        note.write(&settings)?;
        let frozen = match freezes {
            true => guard.freeze(),
            false => Ok(()),
        };
        let frozen = match (frozen, settings.freeze) {
            (Ok(()), _) => freezes,
            (Err(error), Freeze::Require) => {
                // It was not paused yet.
                HeldNote {
                    paused: false,
                    frozen: !guard.end(),
                }
                .leave(&settings);
                return Err(error.into());
            }
            (Err(error), _) => {
                self.notes
                    .push(format!("the guest was not frozen ({})", error.detail));
                false
            }
        };
        let (result, runs) = match pauses {
            true => self.paused(&mut guard, planned, way),
            false => (self.rotate(planned, way), true),
        };
        // The agent in a guest that stands still answers nobody: there the guard does both at its
        // end, in the right order.
        let thawed = match frozen && runs {
            true => guard.thaw().map(Some),
            false => Ok(None),
        };
        // Where the guard is still needed, its end is waited for here. Where it could not let the
        // guest go, a note stays, and the next `recover` tries.
        let let_go = guard.end() && thawed.is_ok();
        let held = HeldNote {
            paused: note.paused && !let_go && !runs,
            frozen: note.frozen && !let_go,
        };
        held.leave(&settings);
        if held.paused {
            self.held = held;
            self.guard = Some(guard);
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
            (Ok(Some(Thawed::Itself)), Freeze::Require) => {
                return Err(CaptureError::new(
                    CaptureErrorKind::Inconsistent,
                    settings.monitor.display(),
                    THAWED_ITSELF,
                )
                .into());
            }
            (Ok(Some(Thawed::Itself)), _) => self.notes.push(THAWED_ITSELF.to_string()),
            // Whether it was still frozen at the instant is not known.
            (Err(error), Freeze::Require) => return Err(error.into()),
            (Err(error), _) => self.notes.push(format!("while thawing: {error}")),
        }
        Ok(())
    }

    /// Rotates while the guest stands still; also, whether it certainly runs again.
    fn paused(
        &mut self,
        guard: &mut Guard,
        planned: &[PlannedDisk],
        way: Way,
    ) -> (Result<(), Attempt>, bool) {
        let shown = self.settings.monitor.display().to_string();
        let failed = |error: QmpError| Attempt::from(error.into_capture(&shown));
        if let Err(error) = guard.will_pause() {
            return (Err(error.into()), true);
        }
        // At its limit the guard kills this process, and with it the backups of other VMs: this
        // one is given up before.
        let ends = Instant::now() + self.settings.freeze_limit * 3 / 4;
        lock(&self.connection).pause_until(Some(ends));
        // Asked once more: the freeze took its time.
        let status = capturable(&self.settings, &mut lock(&self.connection));
        // Whoever stopped it meanwhile will let it go on.
        let stops = status.as_ref().is_ok_and(|status| is_live(status));
        let stopped = match stops {
            true => lock(&self.connection).run("stop", Value::Null).map(drop),
            false => Ok(()),
        };
        let result = status
            .map_err(Attempt::from)
            .and(stopped.map_err(failed))
            .and_then(|()| self.rotate(planned, way));
        let resumed = match stops {
            true => go_on(&mut lock(&self.connection)),
            false => Ok(()),
        };
        lock(&self.connection).pause_until(None);
        match resumed {
            Ok(_) => (result.and(guard.resumed().map_err(Attempt::from)), true),
            // The guard takes the monitor over once this connection, which is broken, is closed.
            Err(error) => {
                lock(&self.connection).hang_up();
                (result.and(Err(failed(error))), false)
            }
        }
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
            let status = machine::status(&mut connection);
            if status.map_err(|error| error.into_capture(&shown))? == "running" {
                return Err(CaptureError::new(
                    CaptureErrorKind::Inconsistent,
                    &shown,
                    "somebody let the guest go on in the very instant of the capture; back it up \
                     again",
                )
                .into());
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
        let settings = self.settings.clone();
        let shown = settings.monitor.display();
        let failed = |error: QmpError| error.into_capture(&shown);
        let held = self.held;
        let still = |error: QmpError| held.explain(&settings, error.into_capture(&shown));
        let shared = self.connection.clone();
        let mut connection = lock(&shared);
        // What is left in QEMU would stand in the guest's way until the next night.
        connection.restore(&settings.monitor).map_err(still)?;
        connection.begin_work();
        if held.paused {
            go_on(&mut connection).map_err(still)?;
            self.let_go();
        }
        let mut cleaned = clean(&mut connection, &settings);
        // A monitor may tell of more events of hours than are listened to; a new client is told of
        // none. One that is slow is not asked again.
        if connection.is_broken() && !matches!(cleaned, Err(QmpError::TimedOut)) {
            connection.restore(&settings.monitor).map_err(failed)?;
            cleaned = clean(&mut connection, &settings);
        }
        cleaned.map_err(failed)?;
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

    /// What is left to do for a guest that runs again.
    fn let_go(&mut self) {
        let thawed = match &self.settings.agent {
            Some(agent) if self.held.frozen => guard::thaw_at(agent).is_ok(),
            _ => true,
        };
        self.held = HeldNote {
            paused: false,
            frozen: !thawed,
        };
        self.held.leave(&self.settings);
        // One that is needed for the thaw goes on by itself.
        if let Some(guard) = self.guard.take()
            && thawed
        {
            guard.dismiss();
        }
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
        match self
            .watcher
            .as_ref()
            .and_then(|watcher| watcher.trouble.found())
        {
            Some(detail) => Err(CaptureError::new(
                CaptureErrorKind::Inconsistent,
                self.settings.monitor.display(),
                detail,
            )),
            None => Ok(()),
        }
    }

    fn close(mut self: Box<Self>, outcome: Outcome) -> Result<(), CaptureError> {
        let planned = std::mem::take(&mut self.planned);
        self.end(&planned, outcome)
    }
}
