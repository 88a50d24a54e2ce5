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
//!   where the job says that the export is a fleecing image, and nothing is read of this VM again
//!   after it: no second attempt could tell what the guest wrote from what was destroyed.

mod capture;
mod disk;
#[cfg(test)]
mod hostile;
mod job;
mod mark;

use super::{Capture, CaptureError, CaptureErrorKind, Hypervisor, Reading, SinceMark};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A VM whose jobs are handed in, for one run.
#[derive(Debug, Clone)]
pub struct HandedSource {
    file: PathBuf,
    /// Something of what was read has been given back.
    given_back: Arc<AtomicBool>,
}

impl HandedSource {
    /// `file`: where the jobs of this VM are written.
    pub fn new(file: PathBuf) -> Self {
        HandedSource {
            file,
            given_back: Arc::default(),
        }
    }
}

impl Hypervisor for HandedSource {
    fn open(
        &self,
        since: &[SinceMark],
        reading: Reading,
    ) -> Result<Box<dyn Capture>, CaptureError> {
        if self.given_back.load(Ordering::SeqCst) {
            return Err(CaptureError::new(
                CaptureErrorKind::Inconsistent,
                self.file.display(),
                "the first attempt of this backup has given back what it read (discard), so there \
                 can be no second one: hand the job in anew",
            ));
        }
        capture::open(&self.file, since, reading, &self.given_back)
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
