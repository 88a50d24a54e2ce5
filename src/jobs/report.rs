//! What is promised and what holds, from the ledger alone: pure functions of its state and `now`.

use super::points::listed;
use super::prune::{earliest_deadline, facts};
use crate::model::{DiskName, PointKind, PointState, VmName};
use crate::policy::{Coverage, NightState, PointFacts, coverage, last_point_warnings};
use crate::repository::State;
use jiff::{SignedDuration, Timestamp};

/// One VM, as `status` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmStatus {
    pub vm: VmName,
    pub points: usize,
    pub last: Option<(Timestamp, PointKind)>,
    pub coverage: Option<Coverage>,
    pub next_expiry: Option<Timestamp>,
    pub stored_bytes: u64,
    /// Disks whose tracking hid changes; until an audit is clean the VM gets fulls.
    pub distrusted: Vec<DiskName>,
    /// It is in the configuration; otherwise only its points are left.
    pub configured: bool,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Alarm {
    /// Something should be done before it breaks.
    Warning,
    /// A night of the restore window has only points that may lack what tracking hid. It stays so
    /// until the window has passed.
    Suspect,
    /// Tracking hid changes, and no audit has been clean since.
    Distrusted,
    /// A night of the restore window has no point. It stays so until the window has passed.
    Hole,
    /// Something is kept longer than promised.
    OverMaximum,
    /// Stored bytes are damaged.
    Damage,
}

/// Each VM that is configured or has points, by name.
pub fn status(state: &State, configured: &[VmName], now: Timestamp) -> Vec<VmStatus> {
    let all = facts(state);
    let points = listed(state, now);
    let mut names: Vec<VmName> = configured.to_vec();
    names.extend(points.iter().map(|(_, point)| point.vm.clone()));
    names.sort();
    names.dedup();
    names
        .into_iter()
        .map(|vm| {
            let mine: Vec<_> = points.iter().filter(|(_, point)| point.vm == vm).collect();
            let own: Vec<PointFacts> = all.iter().filter(|one| one.vm == vm).cloned().collect();
            let first = state.first_taken.get(&vm).copied();
            VmStatus {
                points: mine.len(),
                last: mine.last().map(|(_, point)| (point.taken_at, point.kind)),
                coverage: state
                    .policy
                    .as_ref()
                    .map(|policy| coverage(&own, policy, now, first)),
                next_expiry: mine.iter().map(|(_, point)| point.expires_at).min(),
                stored_bytes: mine.iter().map(|(_, point)| point.stored_bytes).sum(),
                distrusted: state
                    .distrusted
                    .get(&vm)
                    .map(|disks| disks.keys().cloned().collect())
                    .unwrap_or_default(),
                configured: configured.contains(&vm),
                vm,
            }
        })
        .collect()
}

/// Everything that somebody must know, worst last. `unhealed`: damaged pieces that stand nowhere
/// else, as the index says.
pub fn alarms(
    state: &State,
    vms: &[VmStatus],
    unhealed: usize,
    now: Timestamp,
) -> Vec<(Alarm, String)> {
    let mut alarms = Vec::new();
    for vm in vms.iter().filter(|vm| vm.configured) {
        if vm.points == 0 {
            alarms.push((Alarm::Hole, format!("{} has no restore point", vm.vm)));
        } else if let Some(coverage) = &vm.coverage
            && coverage.missing > 0
        {
            alarms.push((
                Alarm::Hole,
                format!(
                    "{}: no restore point for the night of {}",
                    vm.vm,
                    nights(coverage, NightState::Missing)
                ),
            ));
        }
        tracking(state, vm, &mut alarms);
    }
    over_maximum(state, now, &mut alarms);
    for warning in last_point_warnings(&facts(state), now) {
        alarms.push((
            Alarm::Warning,
            format!(
                "{}: its last restore point, of {}, expires at {}",
                warning.vm, warning.taken_at, warning.expires_at
            ),
        ));
    }
    if unhealed > 0 {
        alarms.push((
            Alarm::Damage,
            format!(
                "{} stored pieces are known to be damaged; a full backup of the VMs heals what it \
                 still meets: vmkeep backup --full VM",
                unhealed
            ),
        ));
    }
    if let Some((seq, what)) = &state.unknown {
        alarms.push((
            Alarm::Warning,
            format!(
                "ledger entry {seq} is of a later version ({what}): this one may only read; \
                 upgrade vmkeep"
            ),
        ));
    }
    if state
        .keys
        .last()
        .is_some_and(|key| key.recipients.len() < 2)
    {
        alarms.push((
            Alarm::Warning,
            "no escrow recipient: the loss of this host is the loss of every backup; set escrow \
             and run vmkeep init"
                .to_string(),
        ));
    }
    alarms.sort();
    alarms
}

/// The nights of the window in this state.
fn nights(coverage: &Coverage, state: NightState) -> String {
    let dates: Vec<String> = coverage
        .nights
        .iter()
        .filter(|night| night.state == state)
        .map(|night| night.date.to_string())
        .collect();
    dates.join(", ")
}

/// What audits found of a VM: what hid changes, and which nights may lack some.
fn tracking(state: &State, vm: &VmStatus, alarms: &mut Vec<(Alarm, String)>) {
    for (disk, hidden) in state.distrusted.get(&vm.vm).into_iter().flatten() {
        alarms.push((
            Alarm::Distrusted,
            format!(
                "tracking of {}/{disk} hid changes: {} bytes outside of what it reported, found by \
                 the full of {}; fulls until an audit is clean",
                vm.vm, hidden.bytes, hidden.found_at
            ),
        ));
    }
    if let Some(coverage) = &vm.coverage
        && coverage.suspect > 0
    {
        alarms.push((
            Alarm::Suspect,
            format!(
                "{}: the restore point of the night of {} is suspect: it may lack changes that \
                 tracking hid",
                vm.vm,
                nights(coverage, NightState::Suspect)
            ),
        ));
    }
}

/// What is kept too long, or soon will be.
fn over_maximum(state: &State, now: Timestamp, alarms: &mut Vec<(Alarm, String)>) {
    let budget_days = state
        .policy
        .as_ref()
        .map_or(1, |policy| policy.effective().erase_budget_days);
    let eighth = SignedDuration::from_hours(24 * i64::from(budget_days) / 8);
    for (id, point) in state.roots() {
        let what = format!("{} of {} (restore point {id})", point.vm, point.taken_at);
        let left = point.deadline.duration_since(now);
        if !left.is_positive() {
            alarms.push((
                Alarm::OverMaximum,
                format!("{what} is kept over its maximum since {}", point.deadline),
            ));
        } else if left <= eighth && point.state == PointState::Live {
            alarms.push((
                Alarm::Warning,
                format!(
                    "{what} must be gone by {} and no prune has expired it: run vmkeep prune",
                    point.deadline
                ),
            ));
        }
    }
    if let Some(deadline) = earliest_deadline(state) {
        let left = deadline.duration_since(now);
        if !left.is_positive() {
            alarms.push((
                Alarm::OverMaximum,
                format!("unreadable bytes are still stored, and should be gone since {deadline}"),
            ));
        } else if left <= eighth {
            alarms.push((
                Alarm::Warning,
                format!("unreadable bytes must be gone by {deadline}: run vmkeep prune"),
            ));
        }
    }
}
