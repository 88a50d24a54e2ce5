//! Reading several entries of a far store at once, those that are listed and come next.

use super::Ledger;
use crate::format::entry::MAX_ENTRY_BYTES;
use crate::model::{ObjectName, Writers};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Read in one go: with the largest entries, 64 MiB.
const MOST_AHEAD: u64 = 64;

#[derive(Default)]
pub(super) struct Ahead {
    /// The highest number that the first listing showed.
    pub(super) listed: u64,
    pub(super) entries: BTreeMap<u64, Vec<u8>>,
}

impl Ledger {
    /// From the entry `next` on, where that is worth it. What cannot be read is met again, one by one, by whoever
    /// needs it.
    pub(super) fn read_ahead(&mut self, next: u64) {
        let last = self.ahead.listed.min(next.saturating_add(MOST_AHEAD - 1));
        let threads = self.storage.reads_at_once();
        if threads < 2
            || self.names.writers() == Writers::One
            || last <= next
            // One that could not be read among those that were is read in its turn, alone.
            || self.ahead.entries.range(next..).next().is_some()
        {
            return;
        }
        let names: Vec<(u64, ObjectName)> = (next..=last)
            .map(|seq| (seq, self.names.ledger(seq)))
            .collect();
        let (taken, read) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
        std::thread::scope(|scope| {
            for _ in 0..threads.min(names.len()) {
                scope.spawn(|| {
                    while let Some((seq, name)) = names.get(taken.fetch_add(1, Ordering::Relaxed)) {
                        if let Ok(stored) = self.storage.read(name, MAX_ENTRY_BYTES) {
                            let mut read = read.lock().unwrap_or_else(PoisonError::into_inner);
                            read.insert(*seq, stored);
                        }
                    }
                });
            }
        });
        self.ahead.entries = read.into_inner().unwrap_or_else(PoisonError::into_inner);
    }
}
