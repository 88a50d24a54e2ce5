//! Watching over the space that a capture needs. Whatever the guest overwrites while it is read,
//! QEMU keeps in scratch files; if one of them cannot grow, QEMU pauses the guest. So the capture
//! is given up while there is still room: the backup fails, and the guest never notices.
//!
//! A scratch file that cannot be written for another reason (a quota, a broken file system) pauses
//! the guest as well. That is seen when it has happened, and the capture is given up for it too:
//! with the job ended, the guest goes on.

use super::domain::Domain;
use super::job;
use super::virsh::Virsh;
use crate::hypervisor::nbd::NbdError;
use crate::hypervisor::nbd_disk::Explain;
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

const INTERVAL: Duration = Duration::from_millis(250);
/// Looks at the space for one at the guest, which takes a process.
const LOOKS: u64 = 12;
/// Longest time for that one: meanwhile nobody looks at the space.
const STATE_LIMIT: Duration = Duration::from_secs(5);

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

/// Ends the job when space runs low or the guest was paused, until it is dropped.
pub(super) struct Watch {
    /// Why it was given up.
    trouble: Arc<OnceLock<&'static str>>,
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
        let trouble = Arc::new(OnceLock::new());
        let (stop, stopped) = mpsc::channel();
        let found = Arc::clone(&trouble);
        let thread = std::thread::spawn(move || {
            for look in 1_u64.. {
                if stopped.recv_timeout(INTERVAL) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                // A folder that cannot be looked at says nothing of its space, and a libvirt that
                // does not answer nothing of the guest.
                if free_bytes(&folder).is_ok_and(|free| free < reserve) {
                    let _ = found.set(RAN_LOW);
                } else if look.is_multiple_of(LOOKS)
                    && job::is_stopped_by_error(&*virsh, &domain, STATE_LIMIT).unwrap_or(false)
                {
                    let _ = found.set(PAUSED);
                }
                // What fails here is tried again, at last by the close.
                if found.get().is_some() && job::end(&*virsh, &domain, &socket).is_ok() {
                    return;
                }
            }
        });
        Watch {
            trouble,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    pub(super) fn explain(&self) -> Box<dyn Explain> {
        Box::new(Trouble(Arc::clone(&self.trouble)))
    }

    pub(super) fn check(&self) -> Result<(), CaptureError> {
        match self.trouble.get() {
            Some(why) => Err(CaptureError::new(CaptureErrorKind::Io, "the backup", why)),
            None => Ok(()),
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

struct Trouble(Arc<OnceLock<&'static str>>);

impl Explain for Trouble {
    fn explain(&self, _: &NbdError) -> Option<String> {
        self.0.get().map(|why| (*why).to_string())
    }
}

const RAN_LOW: &str =
    "given up: the folder of scratch files ran out of space, which would have paused the guest";

const PAUSED: &str = "given up: QEMU paused the guest after an I/O error, perhaps of a scratch \
                      file (a quota, a broken file system); with the job ended it goes on";

#[cfg(test)]
mod tests {
    use super::super::testing::{Say, Script, domain};
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_guest_that_an_error_of_a_scratch_file_paused_goes_on_and_the_point_fails() {
        let folder = tempfile::tempdir().unwrap();
        let script = Arc::new(Script::new(vec![
            ("domstate", Say::Yes("paused (I/O error)\n")),
            (
                "backup-dumpxml",
                Say::No("error: no domain backup job present"),
            ),
            ("domstate", Say::Yes("paused (I/O error)\n")),
            ("resume", Say::Yes("")),
        ]));
        let watch = Watch::start(
            Arc::clone(&script) as Arc<dyn Virsh>,
            domain(),
            PathBuf::from("/run/v/s"),
            folder.path().to_path_buf(),
            0,
        );
        watch.check().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while script.asked().last().is_none_or(|asked| asked != "resume") {
            assert!(Instant::now() < deadline, "{:?}", script.asked());
            std::thread::sleep(Duration::from_millis(20));
        }
        let error = watch.check().unwrap_err();
        assert!(error.detail.contains("paused the guest"), "{error}");
    }
}
