//! Which points a person sees, and which one a date means.

use crate::model::{PointId, PointState, VmName};
use crate::repository::{Point, State};
use jiff::Timestamp;

/// The points that are listed and restored at `now`, oldest first. Past its time a point is
/// neither, whether or not a prune has said so.
pub fn listed(state: &State, now: Timestamp) -> Vec<(PointId, &Point)> {
    let mut points: Vec<(PointId, &Point)> = state
        .points
        .iter()
        .filter(|(_, point)| {
            point.state == PointState::Live && !point.void && now < point.expires_at
        })
        .map(|(id, point)| (*id, point))
        .collect();
    points.sort_by_key(|(id, point)| (point.taken_at, *id));
    points
}

/// Of the points that are not listed at `now`, those that are for no other reason: nobody has expired them, and at the
/// ledger's own last time they were not over. A clock that is wrong hides them, and nobody may delete them by it.
pub fn hidden_by_clock(state: &State, now: Timestamp) -> Vec<&Point> {
    let Some(last) = state.last_witnessed else {
        return Vec::new();
    };
    let live = state.live().map(|(_, point)| point);
    live.filter(|point| last < point.expires_at && point.expires_at <= now)
        .collect()
}

/// The answer to "as it was at that time".
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    Point(PointId),
    /// None was taken that early; the first that was.
    Nearest {
        later: Timestamp,
    },
    /// The VM has no point at all.
    None,
}

/// The newest of a VM's points taken no later than `bound`. `None`: the newest of all, which the order of the ledger
/// tells whatever the clocks said.
pub fn choose(points: &[(PointId, &Point)], vm: &VmName, bound: Option<Timestamp>) -> Choice {
    let mine = || points.iter().filter(|(_, point)| point.vm == *vm);
    let chosen = match bound {
        None => mine().max_by_key(|(_, point)| point.seq),
        Some(bound) => mine()
            .filter(|(_, point)| point.taken_at <= bound)
            .max_by_key(|(id, point)| (point.taken_at, *id)),
    };
    if let Some((id, _)) = chosen {
        return Choice::Point(*id);
    }
    match mine().map(|(_, point)| point.taken_at).min() {
        Some(later) => Choice::Nearest { later },
        None => Choice::None,
    }
}

/// The point to take instead of a suspect one: the next that is not suspect, or, where none came
/// after it, the newest before it.
pub fn good_instead<'a>(
    points: &[(PointId, &'a Point)],
    suspect: &PointId,
) -> Option<(PointId, &'a Point)> {
    let (_, of) = points.iter().find(|(id, _)| id == suspect)?;
    let good = || {
        points
            .iter()
            .filter(|(_, point)| point.vm == of.vm && !point.suspect)
    };
    let after = good()
        .filter(|(_, point)| point.taken_at > of.taken_at)
        .min_by_key(|(id, point)| (point.taken_at, *id));
    let before = || good().max_by_key(|(id, point)| (point.taken_at, *id));
    after.or_else(before).copied()
}
