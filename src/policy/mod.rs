//! Floor 1: what is owed and what must go. Pure decisions over facts that others read.
//!
//! - [`PolicyTerms`] are the strings of the configuration and of the ledger; [`Policy::parse`] turns them into
//!   numbers that hold both promises (two weeks back, never over the maximum), or refuses with the arithmetic.
//! - `schedule`: nights, what is due, which nights of the restore window are covered.
//! - `spread`: how a host's work is spread over the nights and over a night's window.
//! - `retention`: when a point expires, what a prune does with each point and why.
//! - `bucket`: whether the promises can be kept in a bucket that is set up as it is.
//! - `lock`: for how long objects can be locked there against everybody, ourselves included.
//! - `announce`: which alarms are told now, and which were told already.
//! - `clock`: whether the host's time may be written down as witnessed, and whether it may delete.
//!
//! *Absent:* any store, key, chunk, file, environment or print; any clock (`now` is an argument of each
//! function); time zone tables of the host (the bundled table decides, so all hosts decide alike); knowledge of
//! whether a decision was carried out (callers put that into [`PointFacts`] and ask again).
//!
//! All instants are UTC; nights and calendar lengths are counted in the policy's time zone. A *night* is named by
//! the local date on which its window starts and lasts until the next window starts, so each instant belongs to
//! exactly one night.

mod announce;
mod bucket;
mod clock;
mod lock;
mod night;
mod period;
mod retention;
mod schedule;
mod spread;
mod terms;

pub use announce::{Announcement, Change, Sounding, ToldAlarm, announcements, remember};
pub use bucket::{BucketRefusal, judge_bucket};
pub use clock::{
    Attestation, ClockRefusal, Deletion, HostClock, Judgement, LocalMark, goes_on, judge,
    next_mark, silence_before,
};
pub use lock::{LockTerm, lock_term};
pub use night::{IsoWeek, night_of, window_of};
pub use period::{Period, PeriodUnit};
pub use retention::{
    Action, ChangeImpact, ChosenAs, Decision, Expiry, LastPointWarning, PointFacts, Reason,
    after_policy_change, change_impact, expiry, last_point_warnings, needs_confirmation,
    next_prune_ends, plan, prune_needs_confirmation, shortening_impact,
};
pub use schedule::{
    Coverage, Due, DueReason, Night, NightState, PromisedWindows, Tracking, What, coverage, due,
    nights_since_full,
};
pub use spread::{
    FULL_AFTER_NIGHTS, FULL_WITHIN_NIGHTS, NextFull, Tonight, fulls_tonight, spread_until,
    start_times,
};
pub use terms::{
    Effective, FullDay, KeepAfterWindow, Override, Policy, PolicyError, PolicyErrors, PolicyTerms,
    expected_rewriting, parse_hours,
};

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod trajectories;
