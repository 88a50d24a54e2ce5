//! The parts of the nightly run for one customer: what is due, then prune, then a share of the verification.

use super::backup::{BackedUp, BackupSettings, backup_vm};
use super::prune::{PruneRequest, Pruned, facts, prune, why_not_prune};
use super::verify::{Verified, VerifyRequest, verify};
use super::{JobError, JobErrorKind, LocalHost, Watch};
use crate::format::entry::{Body, HostBody, PolicyBody, Role};
use crate::hypervisor::Hypervisor;
use crate::model::{PointKind, VmName};
use crate::policy::{
    ChangeImpact, ClockRefusal, Deletion, Due, DueReason, Policy, PolicyTerms, Tracking, What,
    change_impact, due, needs_confirmation, shortening_impact,
};
use crate::repository::{Customer, RepositoryError, RepositoryErrorKind, State, terms_map};
use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

/// A pack that nobody has read for this long is read; a full reads what it relies on more often. With the share
/// below, every pack is read at least every fourteen days, also after two nights without a run.
const READ_AGAIN: SignedDuration = SignedDuration::from_hours(24 * 11);
/// At most this share of the packs a night.
const NIGHTLY_READ_PERCENT: u8 = 10;

/// A VM and the way to its disks.
pub struct VmTask {
    pub vm: VmName,
    pub source: Box<dyn Hypervisor>,
}

/// What became of one VM.
#[derive(Debug, Clone)]
pub struct VmRun {
    pub vm: VmName,
    /// Why it was due, or not.
    pub reason: String,
    pub outcome: VmOutcome,
}

#[derive(Debug, Clone)]
pub enum VmOutcome {
    NotDue,
    BackedUp(Box<BackedUp>),
    Failed(JobError),
    /// The window ended before its turn.
    Left,
}

/// The configured policy against the one in the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Policies {
    Same,
    Applied,
    /// Only a host with the role admin changes the one in the ledger, by which this one works.
    NotOurs,
    /// It would expire more than one night of these VMs at once: somebody must say so.
    NeedsConfirmation {
        nights: BTreeMap<VmName, u32>,
    },
    /// Another host, of this name, has replaced it since this one wrote it: which of the two is meant, somebody must
    /// say. Else each would undo the other's night after night, and what the shorter one takes is gone.
    Overruled {
        by: String,
    },
    /// By a clock that may not delete it is neither known what it would expire, nor from when on the erase budget
    /// that it leaves is to be counted.
    ClockRefused {
        reason: ClockRefusal,
    },
}

/// How a run works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunSettings {
    pub backup: BackupSettings,
    pub prune: PruneRequest,
}

/// What the beginning of a run found for one customer.
pub struct BegunRun {
    pub policies: Policies,
    /// How this host would be entered, where the ledger has it otherwise and only another one may enter it.
    pub unentered: Option<HostBody>,
    pub aborted_sessions: usize,
}

/// What a run did for one customer.
pub struct CustomerRun {
    pub begun: BegunRun,
    pub vms: Vec<VmRun>,
    pub pruned: Result<Pruned, JobError>,
    pub verified: Result<Verified, JobError>,
}

/// What is due for a VM now, by the ledger's policy.
pub fn due_now(state: &State, vm: &VmName, now: Timestamp) -> Option<Due> {
    let policy = state.policy.as_ref()?;
    let tracking = tracking_of(state, vm);
    Some(due(vm, &facts(state), tracking, policy, now, false))
}

pub(super) fn tracking_of(state: &State, vm: &VmName) -> Tracking {
    match state.is_distrusted(vm) {
        true => Tracking::Distrusted,
        false => Tracking::Trusted,
    }
}

/// Brings the configured policy into the ledger, if this host may. A shortening that would expire more than one
/// night of a VM at once waits for `confirm`, and so does one that another host has replaced; any change waits for a
/// clock that may delete.
pub fn apply_policy(
    customer: &Customer,
    host: &LocalHost,
    terms: &PolicyTerms,
    confirm: bool,
) -> Result<Policies, JobError> {
    let new = parse(terms)?;
    customer.refresh()?;
    let mut decided = customer.with_state(|state| decide_policy(state, host, &new, confirm));
    if decided != Policies::Applied {
        return Ok(decided);
    }
    let entered = customer.append(|state| {
        decided = decide_policy(state, host, &new, confirm);
        match decided {
            Policies::Applied => Ok(Body::Policy(PolicyBody {
                terms: terms_map(terms),
            })),
            _ => Err(RepositoryError::new(
                RepositoryErrorKind::Superseded,
                customer.names().prefix(),
                "no policy entry is to be written",
            )),
        }
    });
    match entered {
        Err(error) if decided == Policies::Applied => Err(error.into()),
        Err(error) if error.kind != RepositoryErrorKind::Superseded => Err(error.into()),
        _ => Ok(decided),
    }
}

/// The ledger's state once the configured policy was brought in as far as [`apply_policy`] would. Changes nothing.
pub fn foresee_policy(
    state: &State,
    host: &LocalHost,
    terms: &PolicyTerms,
    confirm: bool,
) -> Result<(State, Policies), JobError> {
    let new = parse(terms)?;
    let decided = decide_policy(state, host, &new, confirm);
    let mut foreseen = state.clone();
    if decided == Policies::Applied {
        foreseen.set_policy(terms.clone(), new, host.now());
    }
    Ok((foreseen, decided))
}

fn decide_policy(state: &State, host: &LocalHost, new: &Policy, confirm: bool) -> Policies {
    if state.terms.as_ref() == Some(new.terms()) {
        return Policies::Same;
    }
    let id = host.identity().host_id();
    let own = state.hosts.get(&id);
    if own.is_none_or(|row| !row.roles.contains(&Role::Admin)) {
        return Policies::NotOurs;
    }
    if !confirm && let Some(by) = state.overruled_by(&id, new.terms()) {
        let by = state.hosts.get(&by).map(|row| row.name.clone());
        return Policies::Overruled {
            by: by.unwrap_or_default(),
        };
    }
    if let Deletion::Refused { reason } = host.judgement(state.clock_of(&id)).deletion {
        return Policies::ClockRefused { reason };
    }
    let nights = state.policy.as_ref().map_or_else(BTreeMap::new, |old| {
        shortening_impact(&facts(state), old, new, host.now())
    });
    match !confirm && needs_confirmation(&nights) {
        true => Policies::NeedsConfirmation { nights },
        false => Policies::Applied,
    }
}

fn parse(terms: &PolicyTerms) -> Result<Policy, JobError> {
    Policy::parse(terms).map_err(|error| JobError::new(JobErrorKind::Refused, error.to_string()))
}

/// What these terms would change for the points there are; `None` if they are in force.
pub fn policy_change(state: &State, terms: &PolicyTerms, now: Timestamp) -> Option<ChangeImpact> {
    let old = state.policy.as_ref()?;
    let new = Policy::parse(terms).ok()?;
    (state.terms.as_ref() != Some(terms)).then(|| change_impact(&facts(state), old, &new, now))
}

/// Before a customer's first backup of a run.
pub fn begin_run(
    customer: &Customer,
    host: &LocalHost,
    terms: &PolicyTerms,
) -> Result<BegunRun, JobError> {
    let unentered = super::admission::update_host(customer, host)?;
    // Only those of this host, whose death the kernel tells: at a time before all others no session
    // is too old, and what a clock says is first judged by the prune.
    let aborted_sessions = customer.abort_dead_sessions(Timestamp::UNIX_EPOCH)?;
    let policies = apply_policy(customer, host, terms, false)?;
    Ok(BegunRun {
        policies,
        unentered,
        aborted_sessions,
    })
}

/// The prune of a run, by a host that prunes.
pub fn prune_in_run(
    customer: &Customer,
    host: &LocalHost,
    request: PruneRequest,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<Pruned, JobError> {
    match why_not_prune(customer, host) {
        None => prune(customer, host, request, false, watch, stop),
        Some(reason) => Ok(Pruned {
            notes: vec![format!("nothing was pruned: {reason}")],
            ..Pruned::default()
        }),
    }
}

/// The share of the verification that is a night's.
pub fn verify_in_run(
    customer: &Customer,
    host: &LocalHost,
    threads: usize,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<Verified, JobError> {
    let request = VerifyRequest {
        trees: false,
        read_percent: Some(NIGHTLY_READ_PERCENT),
        unread_since: host.now().checked_sub(READ_AGAIN).ok(),
        threads,
    };
    verify(customer, request, watch, stop)
}

/// Does all that is due for one customer, one VM after the other. One VM's failure never stops another's,
/// nor the prune.
pub fn run_customer(
    customer: &Customer,
    host: &LocalHost,
    terms: &PolicyTerms,
    tasks: &[VmTask],
    settings: &RunSettings,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<CustomerRun, JobError> {
    let begun = begin_run(customer, host, terms)?;
    let mut vms = Vec::new();
    for task in tasks {
        JobError::unless_stopped(stop)?;
        customer.refresh()?;
        let due = customer.with_state(|state| due_now(state, &task.vm, host.now()));
        let Some(due) = due else {
            return Err(no_policy(customer));
        };
        vms.push(run_vm(
            customer,
            host,
            task,
            due,
            &settings.backup,
            watch,
            stop,
        )?);
    }
    let pruned = prune_in_run(customer, host, settings.prune, watch, stop);
    let verified = verify_in_run(customer, host, settings.backup.threads, watch, stop);
    for result in [pruned.as_ref().err(), verified.as_ref().err()] {
        if result.is_some_and(|error| error.kind == JobErrorKind::Interrupted) {
            return Err(JobError::interrupted());
        }
    }
    Ok(CustomerRun {
        begun,
        vms,
        pruned,
        verified,
    })
}

fn no_policy(customer: &Customer) -> JobError {
    JobError::new(
        JobErrorKind::Refused,
        format!("customer {} has no policy in the ledger", customer.name()),
    )
}

/// Whether the plan of the whole night goes before what is due for the VM by itself.
fn is_levelled(due: Due, planned: Due) -> bool {
    match (due.reason, planned.reason) {
        // Of another night than that of the plan it is late.
        (DueReason::FullDay { night, .. }, DueReason::PutOff { night: planned, .. }) => {
            night == planned
        }
        _ => due.what == What::Incremental && planned.what == What::Full,
    }
}

/// Gives a VM what was planned for it, or what is due by now: another host may have been there meanwhile.
pub fn run_vm(
    customer: &Customer,
    host: &LocalHost,
    task: &VmTask,
    planned: Due,
    settings: &BackupSettings,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<VmRun, JobError> {
    let vm = &task.vm;
    customer.refresh()?;
    let due = customer.with_state(|state| due_now(state, vm, host.now()));
    let Some(mut due) = due else {
        return Err(no_policy(customer));
    };
    if is_levelled(due, planned) {
        due = planned;
    }
    let kind = match due.what {
        What::Nothing => None,
        What::Incremental => Some(PointKind::Incremental),
        What::Full => Some(PointKind::Full),
    };
    let outcome = match kind {
        None => VmOutcome::NotDue,
        Some(kind) => match locked_backup(customer, host, task, kind, settings, watch, stop) {
            Ok(done) => VmOutcome::BackedUp(Box::new(done)),
            Err(error) if error.kind == JobErrorKind::Interrupted => return Err(error),
            Err(error) => VmOutcome::Failed(error),
        },
    };
    Ok(VmRun {
        vm: vm.clone(),
        reason: due.reason.to_string(),
        outcome,
    })
}

/// Backs a VM up unless another process of this host is at it: for the sake of the work, not of
/// the ledger, which would let only one of them build on the newest point anyway.
pub(super) fn locked_backup(
    customer: &Customer,
    host: &LocalHost,
    task: &VmTask,
    kind: PointKind,
    settings: &BackupSettings,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<BackedUp, JobError> {
    let _lock = lock_vm(customer, host, task)?;
    backup_vm(
        customer,
        &task.vm,
        &*task.source,
        kind,
        settings,
        watch,
        stop,
    )
}

/// Nobody else of this host works on the VM while this is held.
fn lock_vm(customer: &Customer, host: &LocalHost, task: &VmTask) -> Result<super::Lock, JobError> {
    let name = format!("{}-{}", customer.uid(), task.vm);
    host.folder().lock(&name)?.ok_or_else(|| {
        JobError::new(
            JobErrorKind::Busy,
            format!(
                "{}/{}: another process of this host is backing it up",
                customer.name(),
                task.vm
            ),
        )
    })
}

/// Gives up the tracking of a VM's changes; what was released.
pub fn release_tracking(
    customer: &Customer,
    host: &LocalHost,
    task: &VmTask,
) -> Result<Vec<String>, JobError> {
    let _lock = lock_vm(customer, host, task)?;
    Ok(task.source.release()?)
}

/// Backs a VM up now: an incremental where that is possible, unless a full is asked for.
pub fn backup_now(
    customer: &Customer,
    host: &LocalHost,
    task: &VmTask,
    full: bool,
    settings: &BackupSettings,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<BackedUp, JobError> {
    customer.refresh()?;
    let kind = match full || customer.base(&task.vm).is_none() {
        true => PointKind::Full,
        false => PointKind::Incremental,
    };
    locked_backup(customer, host, task, kind, settings, watch, stop)
}
