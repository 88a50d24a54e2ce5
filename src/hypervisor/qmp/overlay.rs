//! Overlays that run full: how the reader learns of it, and how the guest is kept from learning.

use super::QmpSettings;
use super::connection::Connection;
use super::fleece::{self, Role};
use super::machine::{IO_ERROR, Machine};
use super::recover::clean;
use crate::hypervisor::nbd::NbdError;
use crate::hypervisor::nbd_disk::Explain;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often a job's overlay is looked at.
const WATCH_EVERY: Duration = Duration::from_millis(50);

/// The connection, shared with the watcher of an overlay.
pub(super) type Shared = Arc<Mutex<Connection>>;

pub(super) fn lock(connection: &Shared) -> MutexGuard<'_, Connection> {
    // Nothing panics while it is held; a broken stream is known to the connection itself.
    connection.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says why the image of the instant is gone: QEMU gave it up so as not to disturb the guest.
pub(super) struct BrokenSnapshot {
    pub limit: u64,
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

const GUEST_STOPPED: &str = "QEMU stopped the guest after an I/O error during the backup, which was given up so that it can \
     go on: is the file system of [host] overlay_dir full, or that of its disks?";

const MONITOR_LOST: &str = "QEMU's monitor was lost during the backup, and with it the watch on the overlay, which must \
     not run full; is QEMU still running?";

/// What the watcher of an overlay found: why the image of the instant is gone, where it is.
#[derive(Clone, Default)]
pub(super) struct Trouble(Arc<OnceLock<String>>);

impl Trouble {
    pub(super) fn found(&self) -> Option<String> {
        self.0.get().cloned()
    }
}

impl Explain for Trouble {
    fn explain(&self, _: &NbdError) -> Option<String> {
        self.found()
    }
}

/// Watches the overlays of jobs, and gives them up before QEMU stops the guest for one that is full,
/// or as soon as it has.
pub(super) struct Watcher {
    pub trouble: Trouble,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Watcher {
    pub(super) fn start(connection: Shared, settings: &QmpSettings, disks: usize) -> Self {
        let trouble = Trouble::default();
        let stop = Arc::new(AtomicBool::new(false));
        let thread = {
            let (trouble, stop, settings) = (trouble.clone(), stop.clone(), settings.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Acquire) {
                    std::thread::sleep(WATCH_EVERY);
                    let mut connection = lock(&connection);
                    connection.begin_work();
                    let found = match Machine::look(&mut connection) {
                        // Before the capture it was not.
                        Ok(machine) if machine.status == IO_ERROR => GUEST_STOPPED.to_string(),
                        Ok(machine) if is_passed(&machine, &settings.owner, disks) => {
                            overlay_full(fleece::limit_of(&settings))
                        }
                        Ok(_) => continue,
                        Err(_) => MONITOR_LOST.to_string(),
                    };
                    // Whoever ends the capture cleans up.
                    if !stop.load(Ordering::Acquire) {
                        // Nobody else sets it.
                        let _ = trouble.0.set(found);
                        if connection.restore(&settings.monitor).is_ok() {
                            let _ = clean(&mut connection, &settings);
                        }
                    }
                    break;
                }
            })
        };
        Watcher {
            trouble,
            stop,
            thread,
        }
    }

    pub(super) fn stop(self) {
        self.stop.store(true, Ordering::Release);
        // It has no result.
        let _ = self.thread.join();
    }
}

fn is_passed(machine: &Machine, owner: &str, disks: usize) -> bool {
    (0..disks).any(|number| {
        // QEMU takes the threshold away when it is passed.
        machine
            .nodes
            .get(&Role::OverlayFile.name(owner, number))
            .is_none_or(|node| node.write_threshold == 0)
    })
}
