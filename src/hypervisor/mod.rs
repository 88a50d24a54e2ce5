//! Floor 2: running and stopped VMs, and the images a restore writes. One door: a *capture*
//! opened for all disks of a VM at one instant, read, and closed with its outcome.
//!
//! What is absent: chunks, keys, stores, the ledger. A source never decides whether a point is
//! full or incremental; it only says what it knows to have changed.

mod freeze;
pub mod guard;
mod guest_agent;
pub mod handed;
#[cfg(any(test, fuzzing))]
pub mod hostile_bytes {
    //! The fuzz targets of peers and images.
    pub use super::guest_agent::hostile_bytes::guest_agent;
    pub use super::image::hostile_bytes::qcow2_header;
    pub use super::libvirt::hostile_bytes::domain_xml;
    pub use super::nbd::hostile_bytes::{nbd_handshake, nbd_replies};
    pub use super::qmp::hostile_bytes::{qmp_lines, qmp_machine};
}
pub mod image;
pub mod libvirt;
pub mod nbd;
mod nbd_disk;
mod qemu_lock;
mod qemu_nbd;
pub mod qmp;
mod runtime_folder;
pub mod target;
mod timed_stream;
mod writer;

pub use freeze::Freeze;

use crate::model::{DiskName, Extent};
use std::fmt;

/// Why a source or a target could not be used; the text names the disk and what was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureError {
    pub kind: CaptureErrorKind,
    /// Disk, image path or VM concerned.
    pub name: String,
    pub detail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CaptureErrorKind {
    /// The image or device is not there.
    Missing,
    /// It is in use by somebody else, or was changed while it was read: not consistent.
    Inconsistent,
    /// Reading or writing failed.
    Io,
    /// It is not what the configuration says (format, backing file, size).
    Invalid,
    /// A tool that is needed (qemu-storage-daemon …) is not there or failed.
    Tool,
}

impl CaptureError {
    pub fn new(kind: CaptureErrorKind, name: impl fmt::Display, detail: impl fmt::Display) -> Self {
        CaptureError {
            kind,
            name: name.to_string(),
            detail: detail.to_string(),
        }
    }
}

impl fmt::Display for CaptureError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.detail)
    }
}

impl std::error::Error for CaptureError {}

/// What is known about the changes of a disk since the point whose mark was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Changes {
    /// Nothing is known, for this reason: read every allocated byte.
    Unknown(String),
    /// Exactly these extents may have changed (empty: none did). Sorted, disjoint.
    Extents(Vec<Extent>),
}

/// What state of the guest the instant of a capture shows; kept in the restore point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// The VM was stopped, and nobody wrote.
    Image,
    /// A running guest, as after a loss of power: its journals replay.
    Crash,
    /// A running guest whose agent had frozen its file systems.
    Filesystem,
}

impl Consistency {
    pub fn as_str(self) -> &'static str {
        match self {
            Consistency::Image => "image",
            Consistency::Crash => "crash",
            Consistency::Filesystem => "filesystem",
        }
    }
}

/// One disk of a capture. Reads come from several threads at once.
pub trait CapturedDisk: Send + Sync {
    fn name(&self) -> &DiskName;
    fn size_bytes(&self) -> u64;
    /// Changes since the mark that `Hypervisor::open` was given for this disk.
    fn changes(&self) -> &Changes;
    /// What the next capture needs to tell changes since this one; kept in the restore point.
    fn mark(&self) -> Option<&str>;
    /// The parts of `range` that may hold data, sorted, disjoint; the rest reads as zero.
    fn allocated(&self, range: Extent) -> Result<Vec<Extent>, CaptureError>;
    /// Fills `buffer` from `offset`. Fails rather than returning anything but the disk's bytes.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CaptureError>;
}

/// How a capture ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The point stands: from now on, changes count from this capture.
    Committed,
    /// There is no such point: changes count from the one before, as if nothing had been.
    Abandoned,
    /// Nobody can say yet. What either answer needs is kept; the next `open` is told by the mark
    /// of the newest point.
    Unknown,
}

/// All disks of one VM at one instant.
pub trait Capture: Send + Sync {
    fn disks(&self) -> Vec<&dyn CapturedDisk>;
    /// The VM's definition, if this source knows one: (file name, content).
    fn definition(&self) -> Option<(&str, &[u8])>;
    fn consistency(&self) -> Consistency;
    /// What an administrator should know of how it was taken.
    fn notes(&self) -> &[String];
    /// Whether what was read is still one instant. Called after the last read, before the commit.
    fn still_consistent(&self) -> Result<(), CaptureError>;
    fn close(self: Box<Self>, outcome: Outcome) -> Result<(), CaptureError>;
}

/// The mark of a disk in the newest restore point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SinceMark {
    pub disk: DiskName,
    pub size_bytes: u64,
    /// Reads begin and end at multiples of this (or at the disk's end).
    pub alignment_bytes: u32,
    pub mark: Option<String>,
}

/// What will be read of a capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// Every allocated byte of every disk, whatever is known of changes.
    Everything,
    /// Of disks whose changes are known, only these; a source may refuse reads elsewhere.
    Changes,
}

/// The way to one VM.
pub trait Hypervisor: Send + Sync {
    /// Opens all disks at one instant. `since`: what the newest point recorded, if there is one.
    fn open(&self, since: &[SinceMark], reading: Reading)
    -> Result<Box<dyn Capture>, CaptureError>;
    /// Cleans up after a capture whose agent died. Idempotent. Returns what an administrator should
    /// know: what could not be put right, and is tried again by the next one.
    fn recover(&self) -> Result<Vec<String>, CaptureError>;
    /// Gives up the tracking of changes: nothing of ours stays in the VM or its images, and the
    /// next capture knows of no changes. Says what was released, one item each.
    fn release(&self) -> Result<Vec<String>, CaptureError>;
}
