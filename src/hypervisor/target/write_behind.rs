//! Brings what a restore writes to stable storage while it goes on writing.
//!
//! Left to itself the kernel begins when a tenth of the memory is dirty, and the sync at the end waits for all
//! of that. What is there gives its page cache back at once: a host has its memory for its guests.

use rustix::fs::Advice;
use rustix::io::{Errno, retry_on_intr};
use std::fs::File;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

/// What is written between two syncs.
const STEP_BYTES: u64 = 32 << 20;
/// Who writes waits while more than this has not begun to be synced; as much again may be under way.
const UNSYNCED_BYTES: u64 = 4 * STEP_BYTES;

#[derive(Debug)]
pub(super) struct WriteBehind {
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
    pub(super) fn new(file: &File) -> io::Result<Self> {
        let file = file.try_clone()?;
        Self::with(move || {
            retry_on_intr(|| rustix::fs::fdatasync(&file))?;
            // Advice: what it does not do costs memory only.
            let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
            Ok(())
        })
    }

    fn with(sync: impl Fn() -> rustix::io::Result<()> + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let thread = Builder::new().name("write behind".to_string()).spawn({
            let shared = shared.clone();
            move || shared.sync_until_over(sync)
        })?;
        Ok(WriteBehind {
            shared,
            thread: Some(thread),
        })
    }

    /// After so much was written. An error is that of an earlier write.
    pub(super) fn wrote(&self, length_bytes: u64) -> rustix::io::Result<()> {
        let mut progress = self.shared.lock();
        progress.unsynced_bytes = progress.unsynced_bytes.saturating_add(length_bytes);
        if progress.unsynced_bytes >= STEP_BYTES {
            self.shared.changed.notify_all();
        }
        while progress.failure.is_none() && progress.unsynced_bytes > UNSYNCED_BYTES {
            progress = self.shared.wait(progress);
        }
        progress.failure.map_or(Ok(()), Err)
    }

    /// Nothing is written any more. What was written last is not synced by this.
    pub(super) fn finish(mut self) -> rustix::io::Result<()> {
        self.end();
        self.shared.lock().failure.map_or(Ok(()), Err)
    }

    fn end(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            self.shared.lock().failure = Some(Errno::IO);
        }
    }
}

impl Drop for WriteBehind {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, progress: MutexGuard<'a, Progress>) -> MutexGuard<'a, Progress> {
        let woken = self.changed.wait(progress);
        woken.unwrap_or_else(PoisonError::into_inner)
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
    use std::sync::mpsc;

    #[test]
    fn a_sync_that_failed_behind_is_told_by_the_next_write_and_at_the_end() {
        let behind = WriteBehind::with(|| Err(Errno::IO)).expect("a thread");
        assert_eq!(behind.wrote(STEP_BYTES - 1), Ok(()));
        // One of them begins the sync, and the last waits until that has failed.
        let told: Vec<_> = (0..12).map(|_| behind.wrote(STEP_BYTES)).collect();
        assert_eq!(told.last(), Some(&Err(Errno::IO)));
        assert_eq!(behind.finish(), Err(Errno::IO));
    }

    #[test]
    fn who_writes_faster_than_the_disk_waits_for_it() {
        let (disk, turn) = mpsc::channel();
        let (told, begun) = mpsc::channel();
        let behind = WriteBehind::with(move || {
            let _ = told.send(());
            turn.recv().map_err(|_| Errno::IO)
        });
        let behind = behind.expect("a thread");
        let unsynced = || behind.shared.lock().unsynced_bytes;
        std::thread::scope(|scope| {
            // Without it the sync fails, which ends who waits, should this end early.
            let disk = disk;
            let writer = scope.spawn(|| (0..1000).try_for_each(|_| behind.wrote(STEP_BYTES)));
            begun.recv().expect("a sync");
            // None ends until the disk has its turn, so that it gets here.
            while unsynced() <= UNSYNCED_BYTES {
                std::thread::yield_now();
            }
            for _ in 0..1000 {
                assert_eq!(unsynced(), UNSYNCED_BYTES + STEP_BYTES);
                std::thread::yield_now();
            }
            while !writer.is_finished() {
                let _ = disk.send(());
                assert!(unsynced() <= UNSYNCED_BYTES + STEP_BYTES);
            }
            assert_eq!(writer.join().expect("no panic"), Ok(()));
        });
    }

    #[test]
    fn little_is_left_to_the_end() {
        let behind = WriteBehind::with(|| Err(Errno::IO)).expect("a thread");
        assert_eq!(behind.wrote(STEP_BYTES - 1), Ok(()));
        assert_eq!(behind.finish(), Ok(()));
    }
}
