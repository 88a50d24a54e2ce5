//! Watching over the space that a capture needs. Whatever the guest overwrites while it is read,
//! QEMU keeps in scratch files; if one of them cannot grow, QEMU pauses the guest. So the capture
//! is given up while there is still room: the backup fails, and the guest never notices.

use super::domain::Domain;
use super::job;
use super::virsh::Virsh;
use crate::hypervisor::nbd::NbdError;
use crate::hypervisor::nbd_disk::Explain;
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

const INTERVAL: Duration = Duration::from_millis(250);

pub(super) fn free_bytes(folder: &Path) -> Result<u64, CaptureError> {
    let found = rustix::fs::statvfs(folder).map_err(|error| {
        CaptureError::new(
            CaptureErrorKind::Io,
            folder.display(),
            io::Error::from(error),
        )
    })?;
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// Refuses to begin where there is not even the reserve.
pub(super) fn check(folder: &Path, reserve: u64) -> Result<(), CaptureError> {
    match free_bytes(folder)? {
        free if free < reserve => Err(CaptureError::new(
            CaptureErrorKind::Io,
            folder.display(),
            format!("has {free} bytes free for scratch files; {reserve} must be"),
        )),
        _ => Ok(()),
    }
}

/// Ends the job when space runs low, until it is dropped.
pub(super) struct Watch {
    ran_low: Arc<AtomicBool>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    pub(super) fn start(
        virsh: Arc<dyn Virsh>,
        domain: Domain,
        socket: PathBuf,
        folder: PathBuf,
        reserve: u64,
    ) -> Self {
        let ran_low = Arc::new(AtomicBool::new(false));
        let (stop, stopped) = mpsc::channel();
        let flag = Arc::clone(&ran_low);
        let thread = std::thread::spawn(move || {
            while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                // A folder that cannot be looked at says nothing of its space.
                if free_bytes(&folder).is_ok_and(|free| free < reserve) {
                    flag.store(true, Ordering::SeqCst);
                    // What fails here is tried again by the close.
                    if job::end(&*virsh, &domain, &socket).is_ok() {
                        return;
                    }
                }
            }
        });
        Watch {
            ran_low,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    pub(super) fn explain(&self) -> Box<dyn Explain> {
        Box::new(RanLow(Arc::clone(&self.ran_low)))
    }

    pub(super) fn check(&self) -> Result<(), CaptureError> {
        match self.ran_low.load(Ordering::SeqCst) {
            true => Err(ran_low("the backup")),
            false => Ok(()),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct RanLow(Arc<AtomicBool>);

impl Explain for RanLow {
    fn explain(&self, _: &NbdError) -> Option<String> {
        self.0.load(Ordering::SeqCst).then(|| RAN_LOW.to_string())
    }
}

const RAN_LOW: &str =
    "given up: the folder of scratch files ran out of space, which would have paused the guest";

fn ran_low(name: &str) -> CaptureError {
    CaptureError::new(CaptureErrorKind::Io, name, RAN_LOW)
}
