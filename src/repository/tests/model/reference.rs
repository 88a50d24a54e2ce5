//! What must be true, kept beside the repository and without its code.

use crate::model::{PointId, PointState};
use crate::repository::{Point, State};
use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeMap;

pub const DAY: SignedDuration = SignedDuration::from_hours(24);

/// The lengths of a policy, in days: months and zones have their own tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    pub window: i32,
    pub maximum: i32,
    pub budget: i32,
}

/// One night of a VM.
#[derive(Debug, Clone)]
pub struct Night {
    pub vm: &'static str,
    pub bytes: Vec<u8>,
    pub fate: PointState,
    /// When it was really taken, whatever its host's clock said.
    pub taken_at: Timestamp,
    pub deadline: Timestamp,
    /// Nothing was damaged that it may rest on: it must restore.
    pub sound: bool,
    /// From when its time counts: when it was taken, or, for a lone clock, the last time before it
    /// that two sources agreed on.
    pub counted_from: Timestamp,
}

#[derive(Debug, Default)]
pub struct Reference {
    pub nights: BTreeMap<PointId, Night>,
}

impl Reference {
    /// A point was acknowledged, or its commit is found to stand.
    pub fn committed(&mut self, point: PointId, night: Night, row: &Point, lengths: Lengths) {
        assert_eq!(row.vm.as_str(), night.vm);
        assert!(row.expires_at <= row.deadline);
        let deadline = night.counted_from + DAY * lengths.maximum;
        assert_eq!(row.deadline, deadline, "{point}");
        let before = self.nights.insert(point, Night { deadline, ..night });
        assert!(before.is_none(), "{point} was committed twice");
    }

    /// Deadlines only come nearer, and leave a whole budget from the change on.
    pub fn policy_changed(&mut self, now: Timestamp, lengths: Lengths) {
        for night in self.nights.values_mut() {
            let fresh = night.counted_from + DAY * lengths.maximum;
            let deadline = fresh.max(now + DAY * lengths.budget);
            night.deadline = night.deadline.min(deadline);
        }
    }

    /// The ledger knows of no other point, and of each what is known here.
    pub fn agrees_with(&self, state: &State) {
        for (point, row) in &state.points {
            let night = self.nights.get(point);
            let night = night.unwrap_or_else(|| panic!("{point} was never committed"));
            assert_eq!(row.state, night.fate, "{point}");
            assert_eq!(row.deadline, night.deadline, "{point}");
        }
        for (point, night) in &self.nights {
            let gone = !state.points.contains_key(point);
            assert!(
                !gone || night.fate == PointState::Erased,
                "{point} vanished from the ledger"
            );
        }
    }
}
