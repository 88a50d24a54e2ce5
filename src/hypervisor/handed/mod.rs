//! The source for VMs whose disks somebody else makes readable: a program in charge of the VM (the
//! backup stack of Proxmox VE, through a backup provider) takes the instant, keeps it in a fleecing
//! image, exports it over NBD, and *hands in* a job: a file that names the endpoints.
//!
//! Nothing of vmkeep's is put into the VM. What the peer promises, and what follows from it:
//!
//! - A bitmap that is *reused* shows only what changed since the capture it counts from. Everything
//!   else of the disk is an error to read, so such a disk can become an incremental on exactly that
//!   point and nothing else; whatever does not fit is refused with what to hand in instead.
//! - How a job ends decides what the bitmap counts from next, and only who hands it in knows that.
//!   So each capture has a *generation*, a name that the peer makes up; the mark of the point keeps
//!   it, and the next job says with `since` which generation its bitmap counts from. A job that
//!   failed on either side, a lost point, a second repository or a store put back from a copy: in
//!   each case the two names differ, and the disk is refused.
//! - What was read can be given back (`discard`). That destroys it in the export, so it is done only
//!   where the job says that the export is a fleecing image.

mod capture;
mod disk;
#[cfg(test)]
mod hostile;
mod job;
mod mark;

use super::{Capture, CaptureError, CaptureErrorKind, Hypervisor, Reading, SinceMark};
use std::path::PathBuf;

/// A VM whose jobs are handed in.
#[derive(Debug, Clone)]
pub struct HandedSource {
    file: PathBuf,
}

impl HandedSource {
    /// `file`: where the jobs of this VM are written.
    pub fn new(file: PathBuf) -> Self {
        HandedSource { file }
    }
}

impl Hypervisor for HandedSource {
    fn open(
        &self,
        since: &[SinceMark],
        reading: Reading,
    ) -> Result<Box<dyn Capture>, CaptureError> {
        capture::open(&self.file, since, reading)
            .map(|capture| Box::new(capture) as Box<dyn Capture>)
    }

    /// Nothing of ours outlives this process.
    fn recover(&self) -> Result<Vec<String>, CaptureError> {
        Ok(Vec::new())
    }

    fn release(&self) -> Result<Vec<String>, CaptureError> {
        Err(CaptureError::new(
            CaptureErrorKind::Invalid,
            self.file.display(),
            "the bitmaps of this VM belong to the program that hands its jobs in: release them there",
        ))
    }
}
