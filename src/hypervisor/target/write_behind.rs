//! Brings what a restore writes to a file or device to stable storage while it goes on writing.
//!
//! Left to itself the kernel begins when a tenth of the memory is dirty (`dirty_background_ratio`), and the sync at
//! the end waits for all of that. What is there gives its page cache back: a host has its memory for its guests.

use rustix::fs::Advice;
use rustix::io::{Errno, retry_on_intr};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

/// What is written between two syncs.
const STEP_BYTES: u64 = 64 << 20;
/// Who writes waits while more than this has not begun to be synced; as much again may be under way.
const MAX_UNSYNCED_BYTES: u64 = 2 * STEP_BYTES;

#[derive(Debug)]
pub(super) struct WriteBehind {
    /// One descriptor for all: closing a second one would hear of a failed write, and keep it to itself.
    file: Arc<File>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    progress: Mutex<Progress>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Progress {
    unsynced_bytes: u64,
    is_over: bool,
    /// The kernel tells a failed write once. Kept, as the sync at the end would hear nothing of it.
    failure: Option<Errno>,
}

impl WriteBehind {
    pub(super) fn new(file: &Arc<File>) -> io::Result<Self> {
        Self::with(file, {
            let file = file.clone();
            move || {
                retry_on_intr(|| rustix::fs::fdatasync(&file))?;
                drop_pages(&file);
                Ok(())
            }
        })
    }

    pub(super) fn with(
        file: &Arc<File>,
        sync: impl Fn() -> rustix::io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let thread = Builder::new().name("write behind".to_string()).spawn({
            let shared = shared.clone();
            move || shared.sync_until_over(sync)
        })?;
        Ok(WriteBehind {
            file: file.clone(),
            shared,
            thread: Some(thread),
        })
    }

    /// An error may be that of an earlier write.
    pub(super) fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)?;
        self.wrote(data.len() as u64)
    }

    /// For whoever has written to the file himself, through another process too.
    pub(super) fn wrote(&self, length_bytes: u64) -> io::Result<()> {
        Ok(self.shared.wrote(length_bytes)?)
    }

    /// Brings all that was written to stable storage.
    pub(super) fn sync(mut self) -> io::Result<()> {
        self.shared.end();
        let ended = self.thread.take().map_or(Ok(()), JoinHandle::join);
        if let Some(error) = self.shared.lock().failure {
            return Err(error.into());
        }
        ended.map_err(|_| io::Error::other("a thread ended early"))?;
        self.file.sync_all()?;
        drop_pages(&self.file);
        Ok(())
    }
}

/// Waits for nothing: whoever gives up has no use for a sync that is under way.
impl Drop for WriteBehind {
    fn drop(&mut self) {
        self.shared.end();
    }
}

/// Advice: what it does not do costs memory only.
fn drop_pages(file: &File) {
    let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, progress: MutexGuard<'a, Progress>) -> MutexGuard<'a, Progress> {
        let woken = self.changed.wait(progress);
        woken.unwrap_or_else(PoisonError::into_inner)
    }

    fn wrote(&self, length_bytes: u64) -> rustix::io::Result<()> {
        let mut progress = self.lock();
        progress.unsynced_bytes = progress.unsynced_bytes.saturating_add(length_bytes);
        if progress.unsynced_bytes >= STEP_BYTES {
            self.changed.notify_all();
        }
        while progress.failure.is_none() && progress.unsynced_bytes > MAX_UNSYNCED_BYTES {
            progress = self.wait(progress);
        }
        progress.failure.map_or(Ok(()), Err)
    }

    fn end(&self) {
        self.lock().is_over = true;
        self.changed.notify_all();
    }

    fn sync_until_over(&self, sync: impl Fn() -> rustix::io::Result<()>) {
        loop {
            let mut progress = self.lock();
            while progress.unsynced_bytes < STEP_BYTES && !progress.is_over {
                progress = self.wait(progress);
            }
            if progress.is_over {
                return;
            }
            progress.unsynced_bytes = 0;
            drop(progress);
            self.changed.notify_all();
            if let Err(error) = sync() {
                self.lock().failure = Some(error);
                return self.changed.notify_all();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{self, Receiver, Sender};

    fn behind(sync: impl Fn() -> rustix::io::Result<()> + Send + 'static) -> WriteBehind {
        let file = Arc::new(tempfile::tempfile().expect("a file"));
        WriteBehind::with(&file, sync).expect("a thread")
    }

    /// With what tells that a sync has begun, and what gives the disk its turn to end one.
    fn on_a_slow_disk() -> (WriteBehind, Receiver<()>, Sender<()>) {
        let (disk, turn) = mpsc::channel();
        let (told, begun) = mpsc::channel();
        let sync = move || {
            let _ = told.send(());
            turn.recv().map_err(|_| Errno::IO)
        };
        (behind(sync), begun, disk)
    }

    fn errno_of(told: io::Result<()>) -> Option<i32> {
        told.expect_err("a failure").raw_os_error()
    }

    #[test]
    fn a_sync_that_failed_behind_is_told_by_the_next_write_and_at_the_end() {
        let behind = behind(|| Err(Errno::IO));
        // One of them begins the sync, and the last waits until that has failed.
        let told: Vec<_> = (0..12).map(|_| behind.shared.wrote(STEP_BYTES)).collect();
        assert_eq!(told.last(), Some(&Err(Errno::IO)));
        assert_eq!(
            errno_of(behind.write_at(0, b"more")),
            Some(Errno::IO.raw_os_error())
        );
        // That of the file itself would succeed.
        assert_eq!(errno_of(behind.sync()), Some(Errno::IO.raw_os_error()));
    }

    #[test]
    fn who_writes_faster_than_the_disk_waits_for_it() {
        let (behind, begun, disk) = on_a_slow_disk();
        let unsynced = || behind.shared.lock().unsynced_bytes;
        std::thread::scope(|scope| {
            // Without it the sync fails, which ends who waits, should this end early.
            let disk = disk;
            let writer =
                scope.spawn(|| (0..1000).try_for_each(|_| behind.shared.wrote(STEP_BYTES)));
            begun.recv().expect("a sync");
            // None ends until the disk has its turn, so that it gets here.
            while unsynced() <= MAX_UNSYNCED_BYTES {
                std::thread::yield_now();
            }
            for _ in 0..1000 {
                assert_eq!(unsynced(), MAX_UNSYNCED_BYTES + STEP_BYTES);
                std::thread::yield_now();
            }
            while !writer.is_finished() {
                let _ = disk.send(());
                assert!(unsynced() <= MAX_UNSYNCED_BYTES + STEP_BYTES);
            }
            assert_eq!(writer.join().expect("no panic"), Ok(()));
        });
    }

    #[test]
    fn whoever_gives_up_does_not_wait_for_a_sync() {
        let (behind, begun, disk) = on_a_slow_disk();
        assert_eq!(behind.shared.wrote(STEP_BYTES), Ok(()));
        begun.recv().expect("a sync");
        drop(behind);
        // Only now the disk has its turn.
        disk.send(()).expect("the thread waits for it");
    }

    #[test]
    fn little_is_left_to_the_end() {
        let behind = behind(|| Err(Errno::IO));
        assert_eq!(behind.shared.wrote(STEP_BYTES - 1), Ok(()));
        behind.sync().expect("nothing was synced behind");
    }
}
