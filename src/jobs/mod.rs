//! Floor 4: what is done for a customer, each job as plan → act → report.
//!
//! - [`backup_vm`]: capture, read, write, commit.
//! - [`restore`]: a point's disks into targets.
//! - [`prune`]: expire, erase, reclaim, prove.
//! - [`verify`]: ledger, index, trees, frames.
//! - [`look_ahead`], [`arrange`], [`carry_out`]: the night of a host. [`run_customer`]: all that is due for one customer. [`status`] and [`alarms`]: what is promised and what holds.
//! - [`LocalHost`]: this host's identity, clock and memory outside of the store.
//!
//! What is absent: the choice of a store, a hypervisor or a target (they come as trait objects),
//! printing, exit codes, the configuration, and the clock itself (it comes as a [`Clock`]).
//!
//! [`Clock`]: crate::model::Clock

mod admission;
mod backup;
mod certificate;
mod error;
#[cfg(test)]
mod fake_vm;
mod host;
mod last_run;
mod lock;
mod night;
mod points;
mod prune;
mod report;
mod restore;
mod run;
mod state_folder;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod told;
mod turn;
mod verify;
mod watch;

pub use admission::{Admission, Admitted, admit, admit_host};
pub use backup::{BackedUp, BackupSettings, READ_BYTES, backup_vm};
pub use certificate::Certified;
pub use error::{JobError, JobErrorKind};
pub use host::LocalHost;
pub use last_run::{LastRun, RunAlarm, UnderWay};
pub use night::{Sizes, SpreadRate, Work, arrange, carry_out, look_ahead, spread_rate};
pub use points::{Choice, choose, good_instead, hidden_by_clock, listed};
pub use prune::{
    PruneRequest, Pruned, foresee_prune, is_prune_due, plan_prune, prune, undo, why_not_delete,
    why_not_prune,
};
pub use report::{
    Alarm, AlarmKind, Looked, READ_AT_LEAST, Severity, VmStatus, alarms, not_configured, status,
};
pub use restore::{RestoreTarget, Restored, note_restore, restore};
pub use run::{
    BegunRun, CustomerRun, Policies, RunSettings, VmOutcome, VmRun, VmTask, apply_policy,
    backup_now, begin_run, due_now, foresee_policy, policy_change, prune_in_run, release_tracking,
    run_customer, run_vm, verify_in_run,
};
pub use state_folder::{Lock, StateError, StateFolder};
pub use verify::{Verified, VerifyRequest, check_certificates, verify, verify_sealed};
pub use watch::{Quiet, Watch};
