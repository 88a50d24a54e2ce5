//! The source for running VMs whose QEMU offers a monitor socket to vmkeep alone.
//!
//! # The instant
//!
//! All writable disks at once. The guest is paused for a few milliseconds (`stop`), and while it
//! stands still a *copy-before-write* filter is put between each device and its image, and each
//! bitmap is exchanged for a new one, in one transaction. From then on, whatever the guest
//! overwrites is first copied into an overlay, so the image of the instant stays readable over NBD
//! while the guest writes on. The guest waits for the overlay on this host, never for the store.
//! An overlay that cannot be written breaks the snapshot (`break-snapshot`): the backup fails, and
//! the guest does not notice.
//!
//! Where a device cannot be given such a filter, or is served by an I/O thread, QEMU's backup job
//! fleeces instead: one transaction, on a guest that runs. There an overlay that cannot be written
//! would stop the guest, so the overlay has a write threshold that is watched, and the capture is
//! given up when it is passed. So it is when the guest was stopped all the same, by a full file
//! system; without the jobs it goes on.
//!
//! A limit on the overlay: it lies in a file of a fixed (sparse) size.
//!
//! # What stays in QEMU when this process dies
//!
//! Filters, overlays, exports and bitmaps, all under names that begin with `vmkeep-` and the
//! owner; `recover` finds and removes them. The guest goes on meanwhile. A guest that stands still
//! in that moment is let go by the [guard](super::guard), which tries for an hour where QEMU is
//! stuck, and, where the guard died as well, by the next `recover`, which finds the note that was
//! written before.

mod capture;
mod connection;
mod definition;
mod fleece;
#[cfg(test)]
mod hostile;
#[cfg(any(test, fuzzing))]
pub(super) mod hostile_bytes;
mod machine;
mod overlay;
mod plan;
mod planned;
mod recover;
#[cfg(test)]
pub(super) mod testing;
mod wire;

use super::guard::GuardCommand;
use super::{Capture, CaptureError, CaptureErrorKind, Freeze, Hypervisor, Reading, SinceMark};
use crate::model::DiskName;
use connection::{Connection, Limits};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(Debug)]
pub(super) enum QmpError {
    Io(io::Error),
    /// Another client holds the monitor.
    Busy,
    TimedOut,
    Closed,
    Protocol(String),
    /// QEMU understood and did not.
    Refused {
        command: String,
        detail: String,
    },
}

impl From<io::Error> for QmpError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => QmpError::TimedOut,
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::UnexpectedEof => QmpError::Closed,
            _ => QmpError::Io(error),
        }
    }
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            QmpError::Io(error) => write!(f, "QEMU's monitor: {error}"),
            QmpError::Busy => f.write_str(
                "QEMU's monitor does not greet: another program holds it; give vmkeep a monitor \
                 socket of its own",
            ),
            QmpError::TimedOut => f.write_str(
                "QEMU's monitor did not answer in time; is QEMU stuck, perhaps on the storage of \
                 a disk?",
            ),
            QmpError::Closed => {
                f.write_str("QEMU's monitor closed the connection; does QEMU still run?")
            }
            QmpError::Protocol(detail) => write!(
                f,
                "QEMU's monitor broke the protocol: {detail}; is its socket a QMP monitor of QEMU \
                 (-qmp unix:…), and nothing between them?"
            ),
            QmpError::Refused { command, detail } => write!(f, "QEMU refused {command}: {detail}"),
        }
    }
}

impl QmpError {
    pub(super) fn into_capture(self, name: impl fmt::Display) -> CaptureError {
        let kind = match &self {
            _ if self.is_missing() => {
                let detail = "no QEMU listens on this monitor socket: is the VM running? \
                              (a stopped VM is backed up by disks = { … })";
                return CaptureError::new(CaptureErrorKind::Missing, name, detail);
            }
            QmpError::Io(_) | QmpError::TimedOut | QmpError::Closed => CaptureErrorKind::Io,
            QmpError::Busy | QmpError::Protocol(_) | QmpError::Refused { .. } => {
                CaptureErrorKind::Tool
            }
        };
        CaptureError::new(kind, name, self)
    }

    /// Nobody listens.
    pub(super) fn is_missing(&self) -> bool {
        matches!(
            self,
            QmpError::Io(error) if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            )
        )
    }

    fn is_refused(&self) -> bool {
        matches!(self, QmpError::Refused { .. })
    }
}

/// Lets a paused guest run; for a guard whose agent died.
pub(super) fn resume(monitor: &Path) -> Result<(), QmpError> {
    let mut connection = Connection::open(monitor, Limits::default())?;
    machine::go_on(&mut connection)
}

#[derive(Debug, Clone)]
pub struct QmpSettings {
    /// The monitor's unix socket.
    pub monitor: PathBuf,
    /// The guest agent's unix socket.
    pub agent: Option<PathBuf>,
    pub freeze: Freeze,
    /// Longest time the guest may be frozen.
    pub freeze_limit: Duration,
    /// Eight hexadecimal digits that no other backup of the same VM has.
    pub owner: String,
    /// Disks that are left out.
    pub excluded: Vec<DiskName>,
    /// Where overlays and the socket of the export may be placed.
    pub overlay_dir: PathBuf,
    /// Largest size of the overlay of one disk.
    pub overlay_bytes: u64,
    /// Private to this agent: notes of what a guest is held by.
    pub runtime_dir: PathBuf,
    /// Of new bitmaps; a power of two.
    pub granularity_bytes: u32,
    pub guard: GuardCommand,
}

/// One running VM.
#[derive(Debug, Clone)]
pub struct QmpSource {
    settings: QmpSettings,
    limits: Limits,
}

impl QmpSource {
    pub fn new(settings: QmpSettings) -> Self {
        QmpSource {
            settings,
            limits: Limits::default(),
        }
    }

    fn connect(&self) -> Result<Connection, CaptureError> {
        Connection::open(&self.settings.monitor, self.limits).map_err(|error| self.failed(error))
    }

    fn failed(&self, error: QmpError) -> CaptureError {
        error.into_capture(self.settings.monitor.display())
    }
}

impl Hypervisor for QmpSource {
    fn open(
        &self,
        since: &[SinceMark],
        reading: Reading,
    ) -> Result<Box<dyn Capture>, CaptureError> {
        capture::open(self, since, reading).map(|capture| Box::new(capture) as Box<dyn Capture>)
    }

    fn recover(&self) -> Result<Vec<String>, CaptureError> {
        recover::recover(self)
    }

    fn release(&self) -> Result<Vec<String>, CaptureError> {
        recover::release(self)
    }
}
