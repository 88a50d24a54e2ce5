//! What the audits of fulls say of points and of tracking. Derived from valid commits alone, and
//! without a part in what is valid.

use super::state::{Point, State};
use crate::format::entry::{AuditBody, CommitBody};
use crate::model::{DiskName, PointKind, VmName};
use jiff::Timestamp;

/// Changes that the tracking of a disk hid, as the last audit found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hidden {
    pub bytes: u64,
    /// When the full was taken that found it.
    pub found_at: Timestamp,
}

impl State {
    /// Whether the last audit of the VM differed: what tracking says is not enough for an
    /// incremental.
    pub fn is_distrusted(&self, vm: &VmName) -> bool {
        self.distrusted.contains_key(vm)
    }

    /// The entry of the full that a point of this commit, of entry `seq`, stands on.
    pub(super) fn full_below(&self, body: &CommitBody, seq: u64) -> u64 {
        let base = body.base.or_else(|| self.newest.get(&body.vm).copied());
        match (
            body.point_kind,
            base.and_then(|base| self.points.get(&base)),
        ) {
            (PointKind::Incremental, Some(base)) => base.full_seq,
            _ => seq,
        }
    }

    /// Takes in what a full says of tracking. Called before its point becomes the VM's newest.
    pub(super) fn take_in_audit(&mut self, body: &CommitBody) {
        if body.point_kind != PointKind::Full {
            return;
        }
        let mut disks = self.distrusted.remove(&body.vm).unwrap_or_default();
        if let Some(audit) = &body.audit {
            // Of the nights between an older point and the newest one a clean audit says nothing.
            let counts = self.newest.get(&body.vm) == Some(&audit.against);
            for disk in &audit.disks {
                match disk.differing_bytes {
                    0 if counts => {
                        disks.remove(&disk.name);
                    }
                    0 => {}
                    bytes => {
                        let found_at = body.taken_at;
                        disks.insert(disk.name.clone(), Hidden { bytes, found_at });
                    }
                }
            }
            self.suspect_week(&body.vm, audit);
        }
        let there = |name: &DiskName| body.disks.iter().any(|disk| disk.name == *name);
        disks.retain(|name, _| there(name));
        if !disks.is_empty() {
            self.distrusted.insert(body.vm.clone(), disks);
        }
    }

    /// What differs was hidden after the full that `against` stands on, which holds what was read:
    /// any incremental on that full may lack it, and no other point.
    fn suspect_week(&mut self, vm: &VmName, audit: &AuditBody) {
        if audit.disks.iter().all(|disk| disk.differing_bytes == 0) {
            return;
        }
        let Some(full_seq) = self.points.get(&audit.against).map(|point| point.full_seq) else {
            return;
        };
        let lacks = |point: &Point| {
            point.vm == *vm
                && point.kind == PointKind::Incremental
                && point.full_seq == full_seq
                && !point.void
        };
        for point in self.points.values_mut().filter(|point| lacks(point)) {
            point.suspect = true;
        }
    }
}
