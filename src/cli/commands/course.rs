//! How far a run is, for whoever asks `status` meanwhile.

use crate::jobs::{StateFolder, UnderWay};
use jiff::Timestamp;
use std::sync::{Mutex, PoisonError};

/// Of the one run that is under way.
pub struct Course<'a> {
    folder: &'a StateFolder,
    far: Mutex<UnderWay>,
}

impl<'a> Course<'a> {
    pub fn new(folder: &'a StateFolder, began_at: Timestamp) -> Self {
        Course {
            folder,
            far: Mutex::new(UnderWay {
                began_at,
                vms: 0,
                vms_done: 0,
                at: String::new(),
            }),
        }
    }

    /// So many VMs are due.
    pub fn are_due(&self, vms: usize) {
        self.tell(|far| far.vms = vms as u64);
    }

    pub fn begins(&self, what: impl Into<String>) {
        self.tell(|far| far.at = what.into());
    }

    pub fn vm_done(&self) {
        self.tell(|far| far.vms_done += 1);
    }

    fn tell(&self, change: impl FnOnce(&mut UnderWay)) {
        let mut far = self.far.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut far);
        // While it is locked: two threads would write it beside its name under the same other name.
        if let Err(error) = self.folder.tell_under_way(&far) {
            tracing::debug!("how far the run is was not kept: {error}");
        }
    }
}
