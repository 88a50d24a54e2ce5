//! Locks are renewed for as long as a point of the restore window may need what they hold.

use super::prune::Pruned;
use super::{JobError, LocalHost};
use crate::format::names::{ObjectRole, repository_file};
use crate::model::{ObjectName, PackName, PointState};
use crate::policy::{LockTerm, lock_term};
use crate::repository::{Customer, State};
use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeSet;

/// Renews what is due. What was pruned stays so if that fails, and the next prune tries again.
pub(super) fn renew(
    customer: &Customer,
    host: &LocalHost,
    now: Timestamp,
    pruned: &mut Pruned,
) -> Result<(), JobError> {
    if !customer.storage().locks() {
        return Ok(());
    }
    let state = customer.state();
    let Some(Ok(term)) = state.policy.as_ref().map(lock_term) else {
        // Said by whatever refuses to put more into the store.
        return Ok(());
    };
    let folder = host.folder();
    if !is_due(folder.locks_renewed_at(&customer.uid()), now, term) {
        return Ok(());
    }
    let dead: BTreeSet<PackName> = pruned.reclaimed.dead_and_locked.iter().copied().collect();
    let names = customer.names();
    let latest = |name: &ObjectName| latest(&names.role(name), &state, &dead, term);
    let always = |_: &ObjectName| Some(Timestamp::MAX);
    let renewed = customer
        .storage()
        .renew_locks(names.prefix(), &latest)
        .and_then(|count| {
            let root = customer
                .storage()
                .renew_locks(repository_file().as_str(), &always)?;
            Ok(count + root)
        });
    match renewed {
        Ok(count) => {
            pruned.locks_renewed = count;
            folder.remember_locks_renewed(&customer.uid(), now);
        }
        Err(error) => pruned.notes.push(format!(
            "locks were not renewed: {error}; those that are left end at the latest {} days after \
             they were renewed last",
            term.days
        )),
    }
    Ok(())
}

/// Whether it would be too late in the next night.
fn is_due(renewed_at: Option<Timestamp>, now: Timestamp, term: LockTerm) -> bool {
    let nights = i64::from(term.renewed_every_days) - 1;
    renewed_at.is_none_or(|at| {
        now < at || now.duration_since(at) > SignedDuration::from_hours(24 * nights)
    })
}

/// Until when the object may be locked at the most; `None`: it needs no lock any more.
fn latest(
    role: &ObjectRole,
    state: &State,
    dead: &BTreeSet<PackName>,
    term: LockTerm,
) -> Option<Timestamp> {
    match role {
        ObjectRole::Ledger(_) | ObjectRole::Rival(..) | ObjectRole::Key(_) => Some(Timestamp::MAX),
        ObjectRole::Segment(segment) => state
            .segments
            .contains_key(segment)
            .then_some(Timestamp::MAX),
        ObjectRole::Pack(pack) => {
            let stays = state.born.contains_key(&pack.session)
                && !state.condemned.contains_key(pack)
                && !dead.contains(pack);
            stays.then(|| latest_of_pack(pack, state, term))
        }
        // A record is locked until its point has left the window, and nobody needs a probe.
        ObjectRole::Point(_)
        | ObjectRole::Certificate(_)
        | ObjectRole::Probe
        | ObjectRole::SpentProbe
        | ObjectRole::Foreign => None,
    }
}

/// Any pack can hold bytes of the next point whose time is over, of what was erased since the last mark,
/// and of what its own mark says.
fn latest_of_pack(pack: &PackName, state: &State, term: LockTerm) -> Timestamp {
    let next = state
        .points
        .values()
        .filter(|point| point.state != PointState::Erased)
        .map(|point| point.deadline)
        .min();
    let unmarked = state.unmarked_erasures().into_values().min();
    let marked = state.marks.get(pack).map(|mark| mark.earliest_deadline);
    let deadline = [next, unmarked, marked].into_iter().flatten().min();
    deadline.map_or(Timestamp::MAX, |deadline| term.latest(deadline))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_renewed_in_the_last_night_in_which_it_is_not_too_late() {
        let term = LockTerm {
            days: 17,
            renewed_every_days: 3,
            record_days: 16,
            margin_days: 3,
        };
        let at: Timestamp = "2026-03-01T02:00:00Z".parse().unwrap();
        let after = |hours| {
            let now = at + SignedDuration::from_hours(hours);
            is_due(Some(at), now, term)
        };
        assert!(is_due(None, at, term));
        let told = [0, 24, 48, 49, 72, -1].map(after);
        assert_eq!(told, [false, false, false, true, true, true]);
        let nightly = LockTerm {
            renewed_every_days: 1,
            ..term
        };
        assert!(is_due(
            Some(at),
            at + SignedDuration::from_hours(23),
            nightly
        ));
    }
}
