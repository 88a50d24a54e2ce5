//! Expire, erase, reclaim, prove: what is over its time leaves, and only that.
//!
//! Every step is decided by `policy` from the ledger's state, checked again by the entry that
//! does it, and can be repeated by anybody: a prune that was killed is gone on with by the next.

use super::certificate::{Certified, certify, is_due};
use super::verify::tell_unreadable;
use super::{JobError, JobErrorKind, LocalHost, Watch, lock};
use crate::format::entry::{Body, ClockBody, ClockEvent, HostBody, PointReason, PointsBody, Role};
use crate::format::names::ObjectRole;
use crate::model::{ObjectName, PointId, PointState};
use crate::policy::{
    Action, ClockRefusal, Decision, Deletion, PointFacts, Policy, Reason, next_prune_ends, plan,
};
use crate::repository::reclaim::{Reclaimed, merge_segments, reclaim};
use crate::repository::{
    Customer, Host, Locked, Neighbour, RecordFate, RepositoryError, RepositoryErrorKind, State,
    Swept, sweep,
};
use crate::storage::{StorageError, StorageErrorKind};
use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;

/// Points named in one entry: its body stays far below 1 MiB.
const POINTS_IN_ENTRY: usize = 2000;
const MOST_MERGES: usize = 16;
pub(super) const NO_CERTIFICATE_OF_COPIES: &str = "no deletion certificate was signed: the store is copied elsewhere, \
or does not say whether it is, and copies stay there; end that, and the next prune signs it";
const NO_CERTIFICATE_OF_UNEXPLAINED: &str =
    "no deletion certificate was signed: the store holds what the ledger does not explain";

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PruneRequest {
    /// Skip the wait between expiring and erasing, go on over damage, remove foreign objects.
    pub confirm: bool,
    /// The store is to have a reserve.
    pub has_reserve: bool,
    /// Of what is deleted in the store, copies stay elsewhere, or may: nothing is certified.
    pub copies_elsewhere: bool,
}

/// What a prune decided and did.
#[derive(Debug, Clone, Default)]
pub struct Pruned {
    /// What was done, in order, then one decision for each point as of the end. An erased point is in
    /// the first part only.
    pub decisions: Vec<Decision>,
    pub expired: Vec<PointId>,
    pub erased: Vec<PointId>,
    pub aborted_sessions: usize,
    pub reclaimed: Reclaimed,
    pub swept: Swept,
    pub certificate: Option<Certified>,
    /// Objects that are locked for longer than before.
    pub locks_renewed: u64,
    /// Damage that stands in the way of reclaiming; what was expired and erased stays so.
    pub damage: Option<RepositoryError>,
    /// Restore points that cannot be read as a whole, over which a forced reclaim went on: a sentence
    /// each.
    pub unreadable: Vec<String>,
    /// What an administrator should know.
    pub notes: Vec<String>,
}

/// The next step of a prune with each point.
pub fn plan_prune(state: &State, now: Timestamp, request: PruneRequest) -> Vec<Decision> {
    match &state.policy {
        Some(policy) => plan_of(&state.facts().collect::<Vec<_>>(), policy, now, request),
        None => Vec::new(),
    }
}

fn plan_of(
    facts: &[PointFacts],
    policy: &Policy,
    now: Timestamp,
    request: PruneRequest,
) -> Vec<Decision> {
    let mut decisions = plan(facts, policy, now);
    for decision in &mut decisions {
        if request.confirm && matches!(decision.action, Action::AwaitErase { .. }) {
            decision.action = Action::Erase;
            decision.reason = Reason::Confirmed;
        }
    }
    decisions
}

/// What a prune would do now, as [`Pruned::decisions`] has it afterwards, if its entries have a witness.
pub fn foresee_prune(state: &State, now: Timestamp, request: PruneRequest) -> Vec<Decision> {
    let Some(policy) = &state.policy else {
        return Vec::new();
    };
    let mut facts: Vec<PointFacts> = state.facts().collect();
    let mut foreseen = Vec::new();
    for (action, becomes) in [
        (Action::Expire, PointState::Expired),
        (Action::Erase, PointState::Erased),
    ] {
        let mut due = plan_of(&facts, policy, now, request);
        due.retain(|decision| decision.action == action);
        let points: BTreeSet<PointId> = due.iter().map(|decision| decision.point).collect();
        for point in facts.iter_mut().filter(|one| points.contains(&one.point)) {
            point.state = becomes;
            point.expired_at = point.expired_at.or(Some(now));
        }
        foreseen.append(&mut due);
    }
    foreseen.extend(plan_of(&facts, policy, now, request));
    foreseen
}

/// Whether something is to go before another run may come.
pub fn is_prune_due(state: &State, now: Timestamp) -> bool {
    let Some(policy) = &state.policy else {
        return false;
    };
    let plan = plan_prune(state, now, PruneRequest::default());
    let budget = SignedDuration::from_hours(24 * i64::from(policy.effective().erase_budget_days));
    // They are rewritten only when a quarter is left.
    let is_near = |deadline: Timestamp| deadline.duration_since(now) <= budget / 4;
    plan.iter()
        .any(|one| matches!(one.action, Action::Expire | Action::Erase))
        || earliest_deadline(state).is_some_and(is_near)
}

/// What the promises are held against. A void point fulfils none, however long it has to stay.
pub(super) fn facts(state: &State) -> Vec<PointFacts> {
    state.facts().filter(|point| !point.void).collect()
}

/// Why this host's clock may not delete, unless nothing is there that it could.
pub fn why_not_delete(state: &State, host: &LocalHost) -> Option<ClockRefusal> {
    match deletion(state, host) {
        Deletion::Allowed => None,
        Deletion::Refused { .. } if holds_nothing(state) => None,
        Deletion::Refused { reason } => Some(reason),
    }
}

fn deletion(state: &State, host: &LocalHost) -> Deletion {
    let clock = state.clock_of(&host.identity().host_id());
    host.judgement(clock).deletion
}

/// Whether nothing of the customer can be due, whatever the time is.
fn holds_nothing(state: &State) -> bool {
    let is_left = state.condemned.values().any(|row| !row.deleted);
    state.points.is_empty() && state.open.is_empty() && state.marks.is_empty() && !is_left
}

/// The time, if the clock may delete; `None` if it may not, and need not. A refusal is written down.
fn admit_clock(
    customer: &Customer,
    host: &LocalHost,
    request: PruneRequest,
) -> Result<Option<Timestamp>, JobError> {
    customer.refresh()?;
    let (deletion, holds_nothing) =
        customer.with_state(|state| (deletion(state, host), holds_nothing(state)));
    match deletion {
        Deletion::Allowed => Ok(Some(host.now())),
        // Who confirms means what is beside it in the store.
        Deletion::Refused { .. } if holds_nothing && !request.confirm => Ok(None),
        Deletion::Refused { reason } => {
            customer.append(|_| {
                Ok(Body::Clock(ClockBody {
                    event: ClockEvent::Refused,
                    seq: None,
                    text: reason.to_string(),
                }))
            })?;
            let name = customer.name();
            let text = format!("customer {name}: nothing was deleted: {reason}");
            Err(JobError::new(JobErrorKind::Clock(reason), text))
        }
    }
}

/// Writes down that an operator vouches for the clock, which moves the ledger's clock, and from which entry
/// on the host's uptime bears it out.
fn trust_clock(customer: &Customer, host: &LocalHost) -> Result<(), JobError> {
    let seq = host.even_since(&customer.uid());
    customer.append(|_| {
        Ok(Body::Clock(ClockBody {
            event: ClockEvent::Trusted,
            seq,
            text: "an operator vouched for this host's clock (--trust-clock)".to_string(),
        }))
    })?;
    Ok(())
}

/// Why this host does not expire, erase and reclaim, if it does not.
pub fn why_not_prune(customer: &Customer, host: &LocalHost) -> Option<String> {
    let id = host.identity().host_id();
    customer.with_state(|state| {
        let has_role = |row: &&HostBody| row.roles.contains(&Role::Prune);
        let own = state.hosts.get(&id).filter(has_role).is_some();
        let others = state.hosts.values().filter(|row| row.host != id);
        reason_not_to_prune(host.may_delete(), own, others.filter(has_role).count())
    })
}

/// What the ledger allows and what the host does must both allow it; where they differ, or nobody is left
/// to do it, that is said.
fn reason_not_to_prune(may_delete: bool, has_role: bool, others: usize) -> Option<String> {
    let mut reason = match (may_delete, has_role) {
        (true, true) => return None,
        (true, false) => {
            "this host has no role for pruning; that is for a host with the role".to_string()
        }
        (false, false) => "this host is an agent, which deletes nothing".to_string(),
        (false, true) => {
            "this host is an agent, which deletes nothing, although the ledger gives it the role"
                .to_string()
        }
    };
    if others == 0 {
        reason += "; no other host has the role prune: nothing is ever deleted until one has \
                   (vmkeep key admit)";
    }
    Some(reason)
}

/// Prunes one customer. `vouched`: the operator has said that the clock is right.
pub fn prune(
    customer: &Customer,
    host: &LocalHost,
    request: PruneRequest,
    vouched: bool,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<Pruned, JobError> {
    if let Some(reason) = why_not_prune(customer, host) {
        return Err(JobError::new(
            JobErrorKind::Refused,
            format!("customer {}: nothing was pruned: {reason}", customer.name()),
        ));
    }
    watch.stage(&format!("{} prune", customer.name()), 0);
    let mut pruned = Pruned::default();
    let mut acted = Vec::new();
    let mut go =
        |pruned: &mut Pruned| pass(customer, host, request, vouched, stop, pruned, &mut acted);
    let mut result = go(&mut pruned);
    if let Err(error) = &result
        && error.kind
            == JobErrorKind::Repository(RepositoryErrorKind::Storage(StorageErrorKind::Full))
        && customer.storage().release_reserve()?
    {
        pruned
            .notes
            .push("the store was full; the reserve was used to make room".to_string());
        result = go(&mut pruned);
    }
    // As soon as there is room again; without a reserve the next full store could not be pruned.
    match customer.storage().restore_reserve() {
        Ok(false) if request.has_reserve => pruned.notes.push(
            "there is no room to set the reserve aside: once the store is full, it may not be \
             prunable"
                .to_string(),
        ),
        Ok(_) => {}
        Err(error) => pruned.notes.push(format!("the reserve: {error}")),
    }
    result.map(|()| pruned)
}

fn pass(
    customer: &Customer,
    host: &LocalHost,
    request: PruneRequest,
    vouched: bool,
    stop: &AtomicBool,
    pruned: &mut Pruned,
    acted: &mut Vec<Decision>,
) -> Result<(), JobError> {
    let go_on = || JobError::unless_stopped(stop);
    if vouched {
        trust_clock(customer, host)?;
    }
    let Some(now) = admit_clock(customer, host, request)? else {
        return Ok(());
    };
    customer.settle()?;
    destroy_erased_records(customer, &mut pruned.notes)?;
    pruned.aborted_sessions += customer.abort_dead_sessions(now)?;
    // In this order: a point at its last chance is expired and erased in the same prune.
    let expired = enter(customer, now, request, Action::Expire, Body::Expire)?;
    pruned.expired.extend(expired.iter().map(|row| row.point));
    acted.extend(expired);
    let erased = erase(customer, now, request, &mut pruned.notes)?;
    pruned.erased.extend(erased.iter().map(|row| row.point));
    acted.extend(erased);
    pruned.decisions.clone_from(acted);
    let left = customer.with_state(|state| plan_prune(state, now, request));
    pruned.decisions.extend(left);
    go_on()?;

    let (budget, force) = customer.with_state(|state| {
        let policy = state.policy.as_ref();
        let days = policy.map_or(1, |policy| policy.effective().erase_budget_days);
        // Damage stops a reclaim no longer when the next prune may end after a deadline: never over
        // the maximum.
        let next = policy.map_or(now, |policy| next_prune_ends(policy, now));
        let pressing = earliest_to_reclaim(state).is_some_and(|deadline| deadline < next);
        (
            SignedDuration::from_hours(24 * i64::from(days)),
            request.confirm || pressing,
        )
    });
    match reclaim(customer, now, budget, force) {
        Ok(reclaimed) => {
            customer.note_reclaimed(&reclaimed)?;
            tell_unreadable(customer, &reclaimed.unreadable, &mut pruned.unreadable);
            pruned.reclaimed = reclaimed;
        }
        Err(error) if error.is_damage() => pruned.damage = Some(error),
        Err(error) => return Err(error.into()),
    }
    go_on()?;
    // As long as something is forgotten or joined; each pass names a bounded number of packs.
    for _ in 0..MOST_MERGES {
        if !merge_segments(customer)? {
            break;
        }
        go_on()?;
    }
    lock::renew(customer, host, now, pruned)?;
    go_on()?;
    prove(customer, host, request, pruned)?;
    // Only then the reserve may help.
    match &pruned.reclaimed.refused {
        Some(refused) if refused.kind == StorageErrorKind::Full => {
            Err(RepositoryError::from(refused.clone()).into())
        }
        _ => Ok(()),
    }
}

/// The nearest deadline of anything that must still leave the store.
pub(super) fn earliest_deadline(state: &State) -> Option<Timestamp> {
    let to_reclaim = earliest_to_reclaim(state);
    // A condemned pack has no mark any more, and may hold bytes of every point that was erased.
    let is_left = state.condemned.values().any(|row| !row.deleted);
    let erased = state
        .points
        .values()
        .filter(|point| is_left && point.state == PointState::Erased)
        .map(|point| point.deadline);
    to_reclaim.into_iter().chain(erased).min()
}

/// The nearest deadline of what a reclaim has still to condemn: only for that it may go on over damage.
fn earliest_to_reclaim(state: &State) -> Option<Timestamp> {
    let marked = state.marks.values().map(|mark| mark.earliest_deadline);
    let unmarked = state.unmarked_erasures().into_values();
    marked.chain(unmarked).min()
}

fn reasons(decisions: &[Decision]) -> Vec<PointReason> {
    decisions
        .iter()
        .map(|decision| PointReason {
            point: decision.point,
            reason: decision.reason.to_string(),
        })
        .collect()
}

/// Writes one kind of entry for every point that the plan says, in as many entries as it takes.
/// The plan is made anew from the very state that each entry follows.
fn enter(
    customer: &Customer,
    now: Timestamp,
    request: PruneRequest,
    action: Action,
    body: impl Fn(PointsBody) -> Body,
) -> Result<Vec<Decision>, JobError> {
    let mut entered = Vec::new();
    loop {
        let mut due: Vec<Decision> = Vec::new();
        let mut build = |state: &State| {
            due = plan_prune(state, now, request);
            due.retain(|decision| decision.action == action);
            due.truncate(POINTS_IN_ENTRY);
            reasons(&due)
        };
        if customer.with_state(&mut build).is_empty() {
            return Ok(entered);
        }
        let appended = customer.append(|state| match build(state) {
            points if points.is_empty() => Err(RepositoryError::new(
                RepositoryErrorKind::Superseded,
                customer.names().prefix(),
                "another prune did it",
            )),
            points => Ok(body(PointsBody { points })),
        });
        match appended {
            Ok(_) => entered.append(&mut due),
            Err(error) if error.kind == RepositoryErrorKind::Superseded => return Ok(entered),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The entry first, then the record: once the entry stands, anybody may delete the record, at any
/// time, again if need be.
fn erase(
    customer: &Customer,
    now: Timestamp,
    request: PruneRequest,
    notes: &mut Vec<String>,
) -> Result<Vec<Decision>, JobError> {
    let erased = enter(customer, now, request, Action::Erase, Body::Erase)?;
    for decision in &erased {
        destroy(customer, &customer.names().point(&decision.point), notes)?;
    }
    Ok(erased)
}

/// One that is locked or refused is tried again by the sweep of this prune and of each later one, which tells of
/// it until it is gone.
fn destroy(
    customer: &Customer,
    record: &ObjectName,
    notes: &mut Vec<String>,
) -> Result<(), JobError> {
    if let RecordFate::OnlyDeleted(error) = customer.destroy_record(record)? {
        notes.push(note_of_only_deleted(&error));
    }
    Ok(())
}

fn note_of_only_deleted(error: &StorageError) -> String {
    format!("a record was deleted, and its bytes were perhaps not overwritten before: {error}")
}

/// Destroys the records of erased points whose eraser died, or that came back: before anything that
/// may fail for want of room or for a pack that cannot be read.
fn destroy_erased_records(customer: &Customer, notes: &mut Vec<String>) -> Result<(), JobError> {
    let listed = customer.storage().list(&customer.names().points_prefix())?;
    let erased = |point: &PointId| {
        customer.with_state(|state| {
            let row = state.points.get(point);
            row.is_some_and(|row| row.state == PointState::Erased)
        })
    };
    for object in listed {
        if let ObjectRole::Point(point) = customer.names().role(&object.name)
            && erased(&point)
        {
            destroy(customer, &object.name, notes)?;
        }
    }
    Ok(())
}

/// Removes what the ledger does not explain, and certifies what was destroyed if then everything
/// that is listed is explained.
fn prove(
    customer: &Customer,
    host: &LocalHost,
    request: PruneRequest,
    pruned: &mut Pruned,
) -> Result<(), JobError> {
    let first = sweep(customer, request.confirm)?;
    let (removed, leftovers) = (first.removed.clone(), first.leftovers_removed.clone());
    let only_deleted = first.only_deleted.iter().map(note_of_only_deleted);
    pruned.notes.extend(only_deleted);
    // What was removed must be seen to be gone.
    let swept = match removed.is_empty() {
        true => first,
        false => sweep(customer, request.confirm)?,
    };
    let clean = swept.unexplained.is_empty() && swept.removed.is_empty();
    pruned.swept = swept;
    if !removed.is_empty() {
        pruned.swept.removed.extend(removed);
        pruned.swept.leftovers_removed.extend(leftovers);
    }
    for problem in &pruned.swept.unexplained {
        pruned.notes.push(note_of_unexplained(problem));
    }
    if let Some(note) = note_of_locked(&pruned.swept.locked) {
        pruned.notes.push(note);
    }
    if !clean {
        pruned.notes.push(NO_CERTIFICATE_OF_UNEXPLAINED.to_string());
        return Ok(());
    }
    if let Some(leftover) = pruned.swept.leftovers.first() {
        if is_due(&customer.state()) {
            pruned.notes.push(format!(
                "no deletion certificate was signed: {} is in the store; a file that is being \
                 written is gone by the next prune, any other must be moved away",
                leftover.place
            ));
        }
        return Ok(());
    }
    if request.copies_elsewhere {
        if is_due(&customer.state()) {
            pruned.notes.push(NO_CERTIFICATE_OF_COPIES.to_string());
        }
        return Ok(());
    }
    // A record that is still there was not destroyed, whatever the ledger says.
    if pruned.swept.refused.is_some() {
        if is_due(&customer.state()) {
            pruned.notes.push(
                "no deletion certificate was signed: a record that must go could not be removed"
                    .to_string(),
            );
        }
        return Ok(());
    }
    let is_record = |locked: &Locked| locked.is_record;
    if pruned.swept.locked.iter().any(is_record) {
        if is_due(&customer.state()) {
            pruned.notes.push(
                "no deletion certificate was signed: the record of an erased point is locked"
                    .to_string(),
            );
        }
        return Ok(());
    }
    if customer.with_state(|state| is_due(state) && !state.unmarked_erasures().is_empty()) {
        // After damage, or when another host erased a moment ago.
        pruned.notes.push(
            "no deletion certificate was signed: what the erased points leave in the store is not \
             counted yet"
                .to_string(),
        );
        return Ok(());
    }
    // Last: it is asked of the whole store, and nothing but a certificate needs it.
    if is_due(&customer.state()) {
        for stranger in host.strangers_beside(customer)? {
            let problem = match stranger {
                Neighbour::Stranger(what) => {
                    format!("{what}: remove it or move it away, as no prune does")
                }
                Neighbour::Unknown(error) => {
                    format!("{error}: what is there, nobody can tell")
                }
                Neighbour::Customer { .. } | Neighbour::Unmade => continue,
            };
            pruned.notes.push(note_of_unexplained(&problem));
            pruned.swept.unexplained.push(problem);
        }
        if !pruned.swept.unexplained.is_empty() {
            pruned.notes.push(NO_CERTIFICATE_OF_UNEXPLAINED.to_string());
            return Ok(());
        }
    }
    pruned.certificate = certify(customer, host, &pruned.swept)?;
    Ok(())
}

fn note_of_unexplained(problem: &str) -> String {
    format!("not explained by the ledger: {problem}")
}

/// What is over and waits for its lock.
fn note_of_locked(locked: &[Locked]) -> Option<String> {
    let first = locked.first()?;
    let bytes: u64 = locked.iter().map(|one| one.object.size_bytes).sum();
    Some(format!(
        "{} objects of {bytes} bytes are over and locked, and go at the first prune after their time; \
         until then nothing is certified as destroyed to the last byte: {} ({}; {})",
        locked.len(),
        first.object.name,
        first.reason,
        first.lock
    ))
}

/// Brings an expired point back. Refused when it is erased, or its time is over.
pub fn undo(customer: &Customer, point: PointId, reason: &str) -> Result<(), JobError> {
    let entered = customer.append(|_| {
        Ok(Body::Undo(PointsBody {
            points: vec![PointReason {
                point,
                reason: reason.to_string(),
            }],
        }))
    });
    match entered {
        Ok(_) => Ok(()),
        Err(error) if error.kind == RepositoryErrorKind::Superseded => Err(JobError::new(
            JobErrorKind::Refused,
            format!("point {point} cannot be brought back: {}", error.detail),
        )),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::reason_not_to_prune;

    #[test]
    fn a_host_prunes_only_if_the_ledger_and_its_configuration_agree() {
        for others in [0, 1] {
            assert_eq!(reason_not_to_prune(true, true, others), None);
            for (may_delete, has_role, said) in [
                (true, false, "no role for pruning"),
                (false, false, "this host is an agent"),
                (false, true, "although the ledger gives it the role"),
            ] {
                let reason = reason_not_to_prune(may_delete, has_role, others).unwrap();
                assert!(reason.contains(said), "{reason}");
                let is_alone = reason.contains("no other host has the role prune");
                assert_eq!(is_alone, others == 0, "{reason}");
            }
        }
    }
}
