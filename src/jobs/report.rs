//! What is promised and what holds, from the ledger alone: pure functions of its state and `now`.

use super::points::listed;
use super::prune::{earliest_deadline, facts};
use crate::format::entry::Role;
use crate::model::{DiskName, HostId, PointKind, VmName};
use crate::policy::{
    Coverage, NightState, PointFacts, coverage, last_point_warnings, next_prune_ends, night_of,
    window_of,
};
use crate::repository::{Point, State};
use jiff::{SignedDuration, Timestamp};

/// One VM, as `status` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmStatus {
    pub vm: VmName,
    pub points: usize,
    /// The newest by the order of the ledger.
    pub last: Option<(Timestamp, PointKind)>,
    pub coverage: Option<Coverage>,
    pub next_expiry: Option<Timestamp>,
    pub stored_bytes: u64,
    /// Disks whose tracking hid changes; until an audit is clean the VM gets fulls.
    pub distrusted: Vec<DiskName>,
    /// It is in the configuration; otherwise only its points are left.
    pub configured: bool,
}

/// Something that somebody must know.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Alarm {
    pub kind: AlarmKind,
    pub vm: Option<VmName>,
    pub text: String,
    /// How much there is of it: nights, pieces. More of it is news.
    pub extent: u64,
}

/// What it is about, the worst last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AlarmKind {
    NoEscrow,
    /// The ledger has entries of a later version.
    Newer,
    /// The configured policy is not the one in force.
    PolicyWaits,
    /// No host may do what must be done now and then.
    RoleMissing,
    /// The store holds a customer that is not in the configuration.
    NotConfigured,
    /// Packs that nobody has read for too long.
    VerificationOverdue,
    AlmostFull,
    /// The last point of a VM expires soon.
    LastPoint,
    /// No point for longer than a night takes.
    Stale,
    /// Over half of the time to erase something is used, or the next prune may come too late, and nobody has.
    BudgetHalfUsed,
    /// Nothing is deleted on this host's word.
    ClockNotTrusted,
    /// The last backup of a VM failed, or did not begin in its window.
    BackupFailed,
    PruneFailed,
    VerificationFailed,
    /// The store holds what the ledger does not explain; nothing is certified until that is settled.
    Unexplained,
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
    /// Nothing can be said of the customer.
    Unreachable,
    /// A run of this host ended before it had begun with anything, was cut short, or does not end.
    RunFailed,
}

/// What an alarm means to who relies on the backups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Something should be done before a promise breaks.
    Warning,
    /// What was promised may not be there.
    Suspect,
    /// A promise is broken.
    Broken,
    Damage,
}

impl AlarmKind {
    pub const ALL: [AlarmKind; 22] = [
        AlarmKind::NoEscrow,
        AlarmKind::Newer,
        AlarmKind::PolicyWaits,
        AlarmKind::RoleMissing,
        AlarmKind::NotConfigured,
        AlarmKind::VerificationOverdue,
        AlarmKind::AlmostFull,
        AlarmKind::LastPoint,
        AlarmKind::Stale,
        AlarmKind::BudgetHalfUsed,
        AlarmKind::ClockNotTrusted,
        AlarmKind::BackupFailed,
        AlarmKind::PruneFailed,
        AlarmKind::VerificationFailed,
        AlarmKind::Suspect,
        AlarmKind::Distrusted,
        AlarmKind::Hole,
        AlarmKind::OverMaximum,
        AlarmKind::Damage,
        AlarmKind::Unreachable,
        AlarmKind::RunFailed,
        AlarmKind::Unexplained,
    ];

    /// One word; it stays the same from version to version.
    pub fn word(self) -> &'static str {
        match self {
            AlarmKind::NoEscrow => "no-escrow",
            AlarmKind::Newer => "newer",
            AlarmKind::PolicyWaits => "policy-waits",
            AlarmKind::RoleMissing => "role-missing",
            AlarmKind::NotConfigured => "not-configured",
            AlarmKind::VerificationOverdue => "verification-overdue",
            AlarmKind::AlmostFull => "almost-full",
            AlarmKind::LastPoint => "last-point",
            AlarmKind::Stale => "stale",
            AlarmKind::BudgetHalfUsed => "budget-half-used",
            AlarmKind::ClockNotTrusted => "clock-not-trusted",
            AlarmKind::BackupFailed => "backup-failed",
            AlarmKind::PruneFailed => "prune-failed",
            AlarmKind::VerificationFailed => "verification-failed",
            AlarmKind::Suspect => "suspect",
            AlarmKind::Distrusted => "distrusted",
            AlarmKind::Hole => "hole",
            AlarmKind::OverMaximum => "over-maximum",
            AlarmKind::Damage => "damage",
            AlarmKind::Unreachable => "unreachable",
            AlarmKind::RunFailed => "run-failed",
            AlarmKind::Unexplained => "unexplained",
        }
    }

    pub fn severity(self) -> Severity {
        match self {
            // Who goes back to a suspect night may not find it: that was promised too.
            AlarmKind::Suspect | AlarmKind::Distrusted => Severity::Suspect,
            AlarmKind::Hole | AlarmKind::OverMaximum | AlarmKind::Unreachable => Severity::Broken,
            AlarmKind::Damage => Severity::Damage,
            _ => Severity::Warning,
        }
    }
}

impl Alarm {
    pub fn of_vm(kind: AlarmKind, vm: &VmName, text: String) -> Self {
        Alarm {
            kind,
            vm: Some(vm.clone()),
            text,
            extent: 1,
        }
    }

    pub fn of_customer(kind: AlarmKind, text: impl Into<String>) -> Self {
        Alarm {
            kind,
            vm: None,
            text: text.into(),
            extent: 1,
        }
    }

    fn of_so_many(self, extent: usize) -> Self {
        Alarm {
            extent: extent as u64,
            ..self
        }
    }
}

/// What the ledger alone does not tell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Looked {
    /// Damaged pieces that stand nowhere else, as the index says.
    pub unhealed: usize,
    /// Packs that nobody has read since [`READ_AT_LEAST`] ago.
    pub unread_packs: usize,
    /// Why this host's clock may not delete.
    pub clock_refusal: Option<String>,
}

/// Every pack is read at least so often, and then some patience: it is told a day late rather than at every
/// night that was missed.
pub const READ_AT_LEAST: SignedDuration = SignedDuration::from_hours(24 * 15);
/// After this long without a restore point, a night was missed.
const STALE_AFTER: SignedDuration = SignedDuration::from_hours(26);
/// A host that backs up each night has begun a point by then.
const CARED_FOR: SignedDuration = SignedDuration::from_hours(48);

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
                last: mine
                    .iter()
                    .max_by_key(|(_, point)| point.seq)
                    .map(|(_, point)| (point.taken_at, point.kind)),
                coverage: state
                    .policy
                    .as_ref()
                    .map(|policy| coverage(&own, policy, now, first, &state.promised)),
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

/// Everything that somebody must know, worst last.
pub fn alarms(state: &State, vms: &[VmStatus], looked: &Looked, now: Timestamp) -> Vec<Alarm> {
    let mut alarms = Vec::new();
    for vm in vms.iter().filter(|vm| vm.configured) {
        protection(vm, now, &mut alarms);
        tracking(state, vm, &mut alarms);
    }
    over_maximum(state, now, &mut alarms);
    for warning in last_point_warnings(&facts(state), now) {
        let text = format!(
            "{}: its last restore point, of {}, expires at {}",
            warning.vm, warning.taken_at, warning.expires_at
        );
        alarms.push(Alarm::of_vm(AlarmKind::LastPoint, &warning.vm, text));
    }
    if looked.unhealed > 0 {
        let pieces = match looked.unhealed {
            1 => "1 stored piece is".to_string(),
            several => format!("{several} stored pieces are"),
        };
        let text = format!(
            "{pieces} known to be damaged; a full backup of the VMs heals what it still meets: vmkeep \
             backup --full VM"
        );
        alarms.push(Alarm::of_customer(AlarmKind::Damage, text).of_so_many(looked.unhealed));
    }
    if looked.unread_packs > 0 {
        let objects = match looked.unread_packs {
            1 => "1 stored object was".to_string(),
            several => format!("{several} stored objects were"),
        };
        let text = format!(
            "{objects} not read for more than 14 days, so damage there would not be known: vmkeep \
             verify --read-data"
        );
        alarms.push(Alarm::of_customer(AlarmKind::VerificationOverdue, text));
    }
    if let Some(refusal) = &looked.clock_refusal {
        let text = format!("nothing is deleted on this host's word: {refusal}");
        alarms.push(Alarm::of_customer(AlarmKind::ClockNotTrusted, text));
    }
    if let Some((seq, what)) = &state.unknown {
        let text = format!(
            "ledger entry {seq} is of a later version ({what}): this one may only read; upgrade vmkeep"
        );
        alarms.push(Alarm::of_customer(AlarmKind::Newer, text));
    }
    if let Some(text) = missing_role(state) {
        alarms.push(Alarm::of_customer(AlarmKind::RoleMissing, text));
    }
    if state
        .keys
        .last()
        .is_some_and(|key| key.recipients.len() < 2)
    {
        let text = "no escrow recipient: the loss of this host is the loss of every backup; set \
                    escrow and run vmkeep init";
        alarms.push(Alarm::of_customer(AlarmKind::NoEscrow, text));
    }
    alarms.sort();
    alarms
}

/// What the host that is to prune a customer must know of it while the customer is not in its configuration,
/// where nothing is done for it. Of one that is empty there is nothing to know, and of one that another host, which
/// is to prune it as well, works for, that one tells.
pub fn not_configured(state: &State, host: &HostId, now: Timestamp) -> Vec<Alarm> {
    let own = state.hosts.get(host);
    if own.is_none_or(|row| !row.roles.contains(&Role::Prune)) {
        return Vec::new();
    }
    let may_prune = |other: &HostId| {
        let row = state.hosts.get(other).filter(|_| other != host);
        row.is_some_and(|row| row.roles.contains(&Role::Prune))
    };
    let mut works = state.backed_up_by();
    if works.any(|(by, at)| may_prune(by) && now.duration_since(at).abs() <= CARED_FOR) {
        return Vec::new();
    }
    let of_points = state.roots().map(|(_, point)| point.deadline);
    // The record of a session that nobody ended may be in the store.
    let of_sessions = state.open.values().filter_map(|open| open.deadline);
    let rest = earliest_deadline(state);
    let Some(nearest) = of_points.chain(of_sessions).chain(rest).min() else {
        return Vec::new();
    };
    let what = match state.roots().count() {
        0 => "what erased restore points have left".to_string(),
        1 => "1 restore point".to_string(),
        count => format!("{count} restore points"),
    };
    let text = format!(
        "in the store and not in the configuration, so that nothing of it is backed up, verified or \
         deleted: {what}, and something of that must be gone by {nearest}; put back [[customer]] id = {:?}, \
         without VMs if its contract is over, and runs delete everything in its time{}",
        state.customer_name,
        match state.hosts.keys().any(may_prune) {
            true =>
                "; or, if another host prunes it, take the role prune from this one there: vmkeep key admit",
            false => "",
        }
    );
    let mut alarms = Vec::new();
    over_maximum(state, now, &mut alarms);
    // A prune, which the others ask for, passes it by.
    alarms.retain(|alarm| alarm.kind == AlarmKind::OverMaximum);
    alarms.push(Alarm::of_customer(AlarmKind::NotConfigured, text));
    alarms.sort();
    alarms
}

/// What no host of the ledger may do. Without an administrator nobody can be given a role any more.
fn missing_role(state: &State) -> Option<&'static str> {
    let is_held = |role| state.hosts.values().any(|host| host.roles.contains(&role));
    match (is_held(Role::Admin), is_held(Role::Prune)) {
        (true, true) => None,
        (true, false) => Some(
            "no host has the role prune: nothing is ever deleted until one has it (vmkeep key admit)",
        ),
        (false, true) => Some(
            "no host has the role admin, and none can be given it: hosts, keys and policy stay as they are",
        ),
        (false, false) => Some(
            "no host has the role prune or admin, and none can be given them: nothing is ever deleted; go \
             on under another customer name, and remove this one's objects when their time is over",
        ),
    }
}

/// Nights without a point, and a VM without any.
fn protection(vm: &VmStatus, now: Timestamp, alarms: &mut Vec<Alarm>) {
    let Some((taken_at, _)) = vm.last else {
        let text = format!("{} has no restore point", vm.vm);
        let hole = Alarm::of_vm(AlarmKind::Hole, &vm.vm, text);
        // Worse than any number of nights.
        alarms.push(hole.of_so_many(usize::MAX));
        return;
    };
    if let Some(coverage) = &vm.coverage
        && coverage.missing > 0
    {
        let nights = nights(coverage, NightState::Missing);
        let text = format!("{}: no restore point for the night of {nights}", vm.vm);
        let hole = Alarm::of_vm(AlarmKind::Hole, &vm.vm, text);
        alarms.push(hole.of_so_many(coverage.missing));
    }
    let ago = now.duration_since(taken_at);
    if ago > STALE_AFTER {
        let text = format!(
            "{}: no restore point for {} hours, the last is of {taken_at}",
            vm.vm,
            ago.as_hours()
        );
        alarms.push(Alarm::of_vm(AlarmKind::Stale, &vm.vm, text));
    } else if ago < -STALE_AFTER {
        let text = format!(
            "{}: how old its last restore point is, nobody knows: a wrong clock dated it {taken_at}; \
             take another: vmkeep backup",
            vm.vm
        );
        alarms.push(Alarm::of_vm(AlarmKind::Stale, &vm.vm, text));
    }
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
fn tracking(state: &State, vm: &VmStatus, alarms: &mut Vec<Alarm>) {
    for (disk, hidden) in state.distrusted.get(&vm.vm).into_iter().flatten() {
        let text = format!(
            "tracking of {}/{disk} hid changes: {} bytes outside of what it reported, found by the \
             full of {}; fulls until an audit is clean",
            vm.vm, hidden.bytes, hidden.found_at
        );
        alarms.push(Alarm::of_vm(AlarmKind::Distrusted, &vm.vm, text));
    }
    if let Some(coverage) = &vm.coverage
        && coverage.suspect > 0
    {
        let text = format!(
            "{}: the restore point of the night of {} is suspect: it may lack changes that tracking \
             hid",
            vm.vm,
            nights(coverage, NightState::Suspect)
        );
        let suspect = Alarm::of_vm(AlarmKind::Suspect, &vm.vm, text);
        alarms.push(suspect.of_so_many(coverage.suspect));
    }
}

/// What is kept too long, or soon will be.
fn over_maximum(state: &State, now: Timestamp, alarms: &mut Vec<Alarm>) {
    let policy = state.policy.as_ref();
    let budget_days = policy.map_or(1, |policy| policy.effective().erase_budget_days);
    let budget = SignedDuration::from_hours(24 * i64::from(budget_days));
    // Once tonight's window has ended, a prune in time has left nothing for which the next may come too late.
    let too_late = policy
        .filter(|policy| now >= window_of(night_of(now, policy), policy).1)
        .map_or(now, |policy| next_prune_ends(policy, now));
    // Each has what was left between its own expiry and deadline: a longer policy changes neither.
    let own = |point: &Point| point.deadline.duration_since(point.expires_at).min(budget);
    for (id, point) in state.roots() {
        let what = format!("{} of {} (restore point {id})", point.vm, point.taken_at);
        let left = point.deadline.duration_since(now);
        if !left.is_positive() {
            let text = format!("{what} is kept over its maximum since {}", point.deadline);
            alarms.push(Alarm::of_vm(AlarmKind::OverMaximum, &point.vm, text));
        } else if left <= own(point) / 2 || point.deadline < too_late {
            let text = format!(
                "{what} must be gone by {}, and no prune has erased it: run vmkeep prune",
                point.deadline
            );
            alarms.push(Alarm::of_vm(AlarmKind::BudgetHalfUsed, &point.vm, text));
        }
    }
    if let Some(deadline) = earliest_deadline(state) {
        let left = deadline.duration_since(now);
        let points = state.points.values();
        let of_it = points.filter(|point| point.deadline == deadline);
        let budget = of_it.map(own).min().unwrap_or(budget);
        if !left.is_positive() {
            let text =
                format!("unreadable bytes are still stored, and should be gone since {deadline}");
            alarms.push(Alarm::of_customer(AlarmKind::OverMaximum, text));
        } else if left <= budget / 8 || deadline < too_late {
            // They are rewritten only when a quarter is left.
            let text = format!("unreadable bytes must be gone by {deadline}: run vmkeep prune");
            alarms.push(Alarm::of_customer(AlarmKind::BudgetHalfUsed, text));
        }
    }
}
