//! When a restore point goes, and what a prune does with each point, with the reason.
//!
//! The order of what beats what:
//!
//! 1. *Never over the maximum.* Past `expires_at` a point expires, the last one of a VM too; it is erased before its
//!    deadline whatever else asks to wait.
//! 2. *Two weeks back.* In the effective restore window, and for two more days of clock tolerance, all points stay;
//!    longer by the silence of the witnesses after them ([`PointFacts::silence`]).
//! 3. *Then one per ISO week and VM*, by night: the full, else the newest one that is not suspect. The choice is made
//!    once for the whole week, when its last night has left the window, and holds from then on: the others are gone.
//!
//! **Only one prune a night is relied on.** A point whose deadline may pass before the next night's prune has
//! ended (its window's end and two hours) is expired, and erased, now: the *last chance*. With a budget of a day this
//! can be some hours before its `expires_at`, but never while its night is in the effective restore window (the
//! window leaves one night for that). With a budget of two or more days it only cuts the waiting between expiring
//! and erasing.
//!
//! [`plan`] gives one step a point. After the steps are carried out a run plans again with the new facts, so that a
//! point at its last chance goes through both.
//!
//! *Absent:* carrying anything out; reclaiming bytes; which entries are valid; whether `now` is believed (`clock`). Where `now` is
//! a lone clock's, the caller still passes it: the tolerance above is made for it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use jiff::civil::Date;
use jiff::{SignedDuration, Timestamp, ToSpan};

use crate::model::{PointId, PointKind, PointState, VmName};

use super::night::{IsoWeek, days_after, later, night_of, start_of, sunday_of, window_of};
use super::period::Period;
use super::terms::{KeepAfterWindow, Policy};

/// Thinning waits this much longer than the restore window: as far ahead as a lone clock may be.
const CLOCK_TOLERANCE: SignedDuration = SignedDuration::from_hours(48);
/// Between expiring and erasing, for second thoughts; a quarter of the budget where that is less.
const LONGEST_ERASE_WAIT_HOURS: i64 = 24;
/// From one witnessed time to the next: nights may be that far apart. What is longer is a silence, in which a machine
/// may have stood still with all its clocks; a lag of no more is covered by [`CLOCK_TOLERANCE`].
const NO_SILENCE: SignedDuration = SignedDuration::from_hours(36);
/// A point of a lone clock is not erased before so much witnessed time.
const LONE_CLOCK_WAIT: SignedDuration = SignedDuration::from_hours(14 * 24);
/// What a prune may take after the end of its window.
const PRUNE_TIME: SignedDuration = SignedDuration::from_hours(2);
/// The last point of a VM is announced this long before it goes.
const LAST_POINT_NOTICE: SignedDuration = SignedDuration::from_hours(14 * 24);
/// A VM whose newest point is no older than this is still being backed up.
const STILL_BACKED_UP: SignedDuration = SignedDuration::from_hours(48);

/// When a point leaves the list, and when nothing of it may be left. Fixed at commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expiry {
    pub expires_at: Timestamp,
    pub deadline: Timestamp,
}

/// What the ledger says of one point, as far as it matters here. All points of a call belong to one customer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PointFacts {
    pub point: PointId,
    pub vm: VmName,
    pub kind: PointKind,
    pub taken_at: Timestamp,
    pub expires_at: Timestamp,
    pub deadline: Timestamp,
    pub state: PointState,
    /// Witnessed time of the latest expire entry; `None` until one is known.
    pub expired_at: Option<Timestamp>,
    /// Its session's clock was alone: `taken_at` may be wrong by anything.
    pub clock_alone: bool,
    /// The first witnessed time of the ledger after its commit; `None` until there is one. Read only for
    /// `clock_alone`.
    pub witnessed_since: Option<Timestamp>,
    /// The longest time between two witnessed times of the ledger since its commit. Two sources of one machine that
    /// stood still lag together, and show it when the next machine is right: by so much the date of this point, or
    /// `witnessed_since`, may be too early.
    pub silence: SignedDuration,
    /// It may not restore byte for byte.
    pub suspect: bool,
    /// Its commit broke a rule: it stays until its time is over, and is no night's restore point. Only [`plan`] is
    /// told of such ones.
    pub void: bool,
    /// A hold stands: neither thinned nor expired early.
    pub held: bool,
}

/// What a prune does with a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Keep,
    Expire,
    /// Expired, and waiting; `until` is the earliest time at which it is erased.
    AwaitErase {
        until: Timestamp,
    },
    Erase,
}

/// How a week's point was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChosenAs {
    Full,
    /// The newest that is not suspect, for want of a full.
    NewestGood,
    /// All points of the week are suspect.
    LeastBad,
}

/// Why. Dates are local to the policy's zone, instants are UTC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    InsideRestoreWindow {
        until: Date,
    },
    /// Its time may be wrong; thinning waits until enough witnessed time has passed since.
    ClockWasAlone,
    /// The time after it may have been longer than witnessed; thinning waits that much longer.
    SilenceSince {
        silence: SignedDuration,
    },
    /// `keep_after_window = "all"`.
    KeptUntilExpiry {
        expires_at: Timestamp,
    },
    /// Its week still has nights in the restore window.
    WeekUndecided {
        week: IsoWeek,
        until: Date,
    },
    /// The time of one of its week's points is not sure; thinning waits for that one.
    WeekWaits {
        week: IsoWeek,
    },
    KeptForWeek {
        week: IsoWeek,
        chosen: ChosenAs,
    },
    Held {
        expires_at: Timestamp,
    },
    /// Its commit broke a rule.
    Void {
        expires_at: Timestamp,
    },
    ThinnedForWeek {
        week: IsoWeek,
        kept: PointId,
    },
    /// `keep_after_window = "none"`.
    LeftRestoreWindow {
        since: Date,
    },
    PastExpiry {
        expires_at: Timestamp,
        maximum: Period,
    },
    /// The next night may be too late.
    LastChance {
        deadline: Timestamp,
    },
    WaitsForUndo {
        expired_at: Timestamp,
        until: Timestamp,
    },
    /// No witnessed time is known since it expired.
    WaitsForWitness,
    WaitsForLoneClock,
    WaitsForHold {
        until: Timestamp,
    },
    /// Somebody has said that it is not to wait. No plan has it by itself.
    Confirmed,
    /// Expired, and all waiting is over.
    ExpiredAt {
        expired_at: Timestamp,
        maximum: Period,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::InsideRestoreWindow { until } => {
                write!(f, "inside the restore window until {until}")
            }
            Reason::ClockWasAlone => f.write_str(
                "its host's clock was alone; not thinned before the restore window has passed in witnessed time",
            ),
            Reason::SilenceSince { silence } => write!(
                f,
                "after it no time was witnessed for {} hours; not thinned for that much longer",
                silence.as_hours()
            ),
            Reason::KeptUntilExpiry { expires_at } => {
                write!(f, "all points are kept until they expire, this one at {expires_at}")
            }
            Reason::WeekUndecided { week, until } => write!(
                f,
                "ISO week {week} is inside the restore window until {until}; then one of its points stays"
            ),
            Reason::WeekWaits { week } => write!(
                f,
                "ISO week {week} has a point whose time is not sure yet; until it is, all of them stay"
            ),
            Reason::KeptForWeek { week, chosen } => write!(
                f,
                "kept for ISO week {week} ({})",
                match chosen {
                    ChosenAs::Full => "the full",
                    ChosenAs::NewestGood => "the newest good one",
                    ChosenAs::LeastBad => "all its points are suspect",
                }
            ),
            Reason::Held { expires_at } => {
                write!(f, "held; expires at {expires_at} all the same")
            }
            Reason::Void { expires_at } => write!(
                f,
                "its commit broke a rule of the ledger, so it is not restored; expires at {expires_at}"
            ),
            Reason::ThinnedForWeek { week, kept } => {
                write!(f, "thinned: ISO week {week} keeps {kept}")
            }
            Reason::LeftRestoreWindow { since } => write!(
                f,
                "left the restore window on {since}, and nothing is kept after it"
            ),
            Reason::PastExpiry { expires_at, maximum } => {
                write!(f, "its time ended at {expires_at}, maximum {maximum}")
            }
            Reason::LastChance { deadline } => write!(
                f,
                "must be gone by {deadline}, and the next night's prune may be too late"
            ),
            Reason::WaitsForUndo { expired_at, until } => write!(
                f,
                "expired at {expired_at}; waits until {until} so that --undo stays possible"
            ),
            Reason::WaitsForWitness => {
                f.write_str("expired, and waits for a witnessed time to count from")
            }
            Reason::WaitsForLoneClock => f.write_str(
                "expired; its host's clock was alone, so it waits for 14 days of witnessed time or its deadline",
            ),
            Reason::WaitsForHold { until } => {
                write!(f, "expired early, but held; waits until {until}")
            }
            Reason::Confirmed => f.write_str("confirmed: erased now, for good"),
            Reason::ExpiredAt { expired_at, maximum } => {
                write!(f, "expired at {expired_at}, maximum {maximum}")
            }
        }
    }
}

/// What happens to one point, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    pub point: PointId,
    pub vm: VmName,
    pub taken_at: Timestamp,
    pub action: Action,
    pub reason: Reason,
}

/// Expiry and deadline of a point taken at `taken_at`. For a session whose clock was alone the caller passes the last
/// witnessed time before its `begin`.
///
/// `deadline = taken_at + maximum` by the calendar of the policy's zone; `expires_at = deadline − erase budget`, but
/// not while the point's night is in the effective restore window (an hour at most, where clocks change in
/// between), and never within a day of `taken_at`.
pub fn expiry(policy: &Policy, taken_at: Timestamp) -> Expiry {
    let zone = policy.timezone();
    let effective = policy.effective();
    let deadline = effective.max_retention.after(taken_at, zone);
    let budget = i64::from(effective.erase_budget_days);
    let expires_at = deadline
        .to_zoned(zone.clone())
        .checked_sub(budget.days())
        .map_or(deadline, |zoned| zoned.timestamp())
        .max(later(taken_at, SignedDuration::from_hours(24)))
        .max(out_of_window(night_of(taken_at, policy), policy));
    Expiry {
        expires_at: expires_at.min(deadline),
        deadline,
    }
}

/// Expiry and deadline of an existing point after a `policy` entry of time `entry_time`: only ever earlier, and with
/// a whole erase budget left from the entry on.
pub fn after_policy_change(point: &PointFacts, new: &Policy, entry_time: Timestamp) -> Expiry {
    let fresh = expiry(new, point.taken_at);
    let budget = SignedDuration::from_hours(24 * i64::from(new.effective().erase_budget_days));
    Expiry {
        expires_at: point.expires_at.min(fresh.expires_at),
        deadline: point
            .deadline
            .min(fresh.deadline.max(later(entry_time, budget))),
    }
}

/// Decides about each point that is not erased, in the order given. Pure: the same facts, policy and time give the
/// same decisions, and once those are carried out (twice, where a point is at its last chance) the same time decides
/// nothing new.
pub fn plan(points: &[PointFacts], policy: &Policy, now: Timestamp) -> Vec<Decision> {
    let planner = Planner::new(points, policy, now);
    points
        .iter()
        .filter_map(|point| {
            let (action, reason) = match point.state {
                PointState::Live => planner.live(point),
                PointState::Expired => planner.expired(point),
                PointState::Erased => return None,
            };
            Some(Decision {
                point: point.point,
                vm: point.vm.clone(),
                taken_at: point.taken_at,
                action,
                reason,
            })
        })
        .collect()
}

/// By when the next night's prune has surely ended: what must be done earlier is done now.
pub fn next_prune_ends(policy: &Policy, now: Timestamp) -> Timestamp {
    let tonight = night_of(now, policy);
    let next = days_after(tonight, 1);
    // Not beyond the start of the night after: for a window of nearly a day this keeps the last chance of a
    // night's points out of their restore window.
    later(window_of(next, policy).1, PRUNE_TIME).min(start_of(days_after(next, 1), policy))
}

struct Planner<'a> {
    policy: &'a Policy,
    now: Timestamp,
    /// By when the next night's prune has surely ended.
    next_prune: Timestamp,
    weeks: BTreeMap<(&'a VmName, IsoWeek), Week<'a>>,
}

/// The points of one VM and ISO week that are live and stay for now.
struct Week<'a> {
    /// When the last night, and each point, has left the window.
    decided_at: Timestamp,
    best: &'a PointFacts,
}

impl<'a> Planner<'a> {
    fn new(points: &'a [PointFacts], policy: &'a Policy, now: Timestamp) -> Self {
        let mut planner = Planner {
            policy,
            now,
            next_prune: next_prune_ends(policy, now),
            weeks: BTreeMap::new(),
        };
        if policy.keep_after_window() == KeepAfterWindow::Weekly {
            for point in points {
                if point.state == PointState::Live && !point.void && !planner.time_is_over(point) {
                    planner.join_week(point);
                }
            }
        }
        planner
    }

    fn join_week(&mut self, point: &'a PointFacts) {
        let night = night_of(point.taken_at, self.policy);
        let decided_at = self
            .thinned_from(sunday_of(night))
            .max(self.protected_until(point));
        self.weeks
            .entry((&point.vm, IsoWeek::of(night)))
            .and_modify(|week| {
                week.decided_at = week.decided_at.max(decided_at);
                if worth(point) > worth(week.best) {
                    week.best = point;
                }
            })
            .or_insert(Week {
                decided_at,
                best: point,
            });
    }

    fn live(&self, point: &PointFacts) -> (Action, Reason) {
        let maximum = self.policy.effective().max_retention;
        let expires_at = point.expires_at;
        if self.now >= expires_at {
            return (
                Action::Expire,
                Reason::PastExpiry {
                    expires_at,
                    maximum,
                },
            );
        }
        if self.last_chance(point) {
            return (
                Action::Expire,
                Reason::LastChance {
                    deadline: point.deadline,
                },
            );
        }
        if point.void {
            return (Action::Keep, Reason::Void { expires_at });
        }
        let night = night_of(point.taken_at, self.policy);
        let until = self.protected_until(point);
        if self.now < until {
            let leaves = self.thinned_from(night);
            let reason = match point.clock_alone {
                _ if self.now < leaves => Reason::InsideRestoreWindow {
                    until: self.local(leaves.min(expires_at)),
                },
                true => Reason::ClockWasAlone,
                false => Reason::SilenceSince {
                    silence: point.silence,
                },
            };
            return (Action::Keep, reason);
        }
        let thin = |reason| match point.held {
            true => (Action::Keep, Reason::Held { expires_at }),
            false => (Action::Expire, reason),
        };
        match self.policy.keep_after_window() {
            KeepAfterWindow::All => (Action::Keep, Reason::KeptUntilExpiry { expires_at }),
            KeepAfterWindow::None => thin(Reason::LeftRestoreWindow {
                since: self.local(until),
            }),
            KeepAfterWindow::Weekly => {
                let name = IsoWeek::of(night);
                match self.weeks.get(&(&point.vm, name)) {
                    Some(week) if self.now < week.decided_at => {
                        let leaves = self.thinned_from(sunday_of(night));
                        let reason = match self.now < leaves {
                            true => Reason::WeekUndecided {
                                week: name,
                                until: self.local(leaves.min(expires_at)),
                            },
                            false => Reason::WeekWaits { week: name },
                        };
                        (Action::Keep, reason)
                    }
                    Some(week) if week.best.point != point.point => thin(Reason::ThinnedForWeek {
                        week: name,
                        kept: week.best.point,
                    }),
                    _ => (
                        Action::Keep,
                        Reason::KeptForWeek {
                            week: name,
                            chosen: match (point.suspect, point.kind) {
                                (true, _) => ChosenAs::LeastBad,
                                (false, PointKind::Full) => ChosenAs::Full,
                                (false, PointKind::Incremental) => ChosenAs::NewestGood,
                            },
                        },
                    ),
                }
            }
        }
    }

    fn expired(&self, point: &PointFacts) -> (Action, Reason) {
        if self.last_chance(point) {
            return (
                Action::Erase,
                Reason::LastChance {
                    deadline: point.deadline,
                },
            );
        }
        let Some(expired_at) = point.expired_at else {
            return (
                Action::AwaitErase {
                    until: later(self.now, self.erase_wait()),
                },
                Reason::WaitsForWitness,
            );
        };
        let undo = later(expired_at, self.erase_wait());
        let hold = match point.held {
            true => point.expires_at,
            false => Timestamp::MIN,
        };
        let lone = match (point.clock_alone, point.witnessed_since) {
            (false, _) => Timestamp::MIN,
            (true, Some(since)) => later(since, LONE_CLOCK_WAIT),
            (true, None) => later(self.now, LONE_CLOCK_WAIT),
        };
        let until = undo.max(hold).max(lone);
        if self.now >= until {
            let maximum = self.policy.effective().max_retention;
            return (
                Action::Erase,
                Reason::ExpiredAt {
                    expired_at,
                    maximum,
                },
            );
        }
        let reason = match until {
            _ if until == lone => Reason::WaitsForLoneClock,
            _ if until == hold => Reason::WaitsForHold { until },
            _ => Reason::WaitsForUndo { expired_at, until },
        };
        (Action::AwaitErase { until }, reason)
    }

    /// It leaves the list now, whatever else holds.
    fn time_is_over(&self, point: &PointFacts) -> bool {
        self.now >= point.expires_at || self.last_chance(point)
    }

    fn last_chance(&self, point: &PointFacts) -> bool {
        point.deadline < self.next_prune
    }

    /// From when on points of this night may be thinned.
    fn thinned_from(&self, night: Date) -> Timestamp {
        later(out_of_window(night, self.policy), CLOCK_TOLERANCE)
    }

    /// The same for one point; a lone clock's word for its night is not enough, so the window is also counted from
    /// the first witnessed time after it. Both may lag by a silence.
    fn protected_until(&self, point: &PointFacts) -> Timestamp {
        let lag = match point.silence > NO_SILENCE {
            true => point.silence,
            false => SignedDuration::ZERO,
        };
        let counted_from = |at| self.thinned_from(night_of(later(at, lag), self.policy));
        let by_date = counted_from(point.taken_at);
        match (point.clock_alone, point.witnessed_since) {
            (false, _) => by_date,
            (true, Some(since)) => by_date.max(counted_from(since)),
            (true, None) => Timestamp::MAX,
        }
    }

    fn erase_wait(&self) -> SignedDuration {
        let quarter = 24 * i64::from(self.policy.effective().erase_budget_days) / 4;
        SignedDuration::from_hours(quarter.min(LONGEST_ERASE_WAIT_HOURS))
    }

    fn local(&self, at: Timestamp) -> Date {
        at.to_zoned(self.policy.timezone().clone()).date()
    }
}

/// Which point of a week stays: not suspect before suspect, then the full, then the newest. The id makes it total.
fn worth(point: &PointFacts) -> (bool, bool, Timestamp, PointId) {
    (
        !point.suspect,
        point.kind == PointKind::Full,
        point.taken_at,
        point.point,
    )
}

/// When a night is no longer among those that can always be gone back to: its point was needed while a later night of
/// the window ran, and one more.
fn out_of_window(night: Date, policy: &Policy) -> Timestamp {
    let window = i64::from(policy.effective().restore_window_days);
    start_of(days_after(night, window + 1), policy)
}

/// What a new policy changes for the points there are, if its entry were written now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChangeImpact {
    /// Nights of each VM that are expired at once and that the old policy keeps. VMs that lose nothing are absent.
    pub nights: BTreeMap<VmName, u32>,
    /// The points of those nights: whose they are, and when they were taken; in that order.
    pub lost: Vec<(VmName, Timestamp)>,
    /// Points that are not lost at once, and expire earlier than before.
    pub earlier: usize,
}

pub fn change_impact(
    points: &[PointFacts],
    old: &Policy,
    new: &Policy,
    now: Timestamp,
) -> ChangeImpact {
    let changed: Vec<PointFacts> = points
        .iter()
        .map(|point| {
            let Expiry {
                expires_at,
                deadline,
            } = after_policy_change(point, new, now);
            PointFacts {
                expires_at,
                deadline,
                ..point.clone()
            }
        })
        .collect();
    let expiring = |points: &[PointFacts], policy: &Policy| -> BTreeSet<PointId> {
        plan(points, policy, now)
            .into_iter()
            .filter(|decision| decision.action == Action::Expire)
            .map(|decision| decision.point)
            .collect()
    };
    let foretold = expiring(points, old);
    let expired = expiring(&changed, new);
    let is_lost =
        |point: &PointFacts| expired.contains(&point.point) && !foretold.contains(&point.point);
    let nights: BTreeSet<(&VmName, Date)> = points
        .iter()
        .filter(|point| is_lost(point))
        .map(|point| (&point.vm, night_of(point.taken_at, old)))
        .collect();
    let mut impact = ChangeImpact::default();
    for (vm, _) in nights {
        *impact.nights.entry(vm.clone()).or_insert(0) += 1;
    }
    for (point, after) in points.iter().zip(&changed) {
        if is_lost(point) {
            impact.lost.push((point.vm.clone(), point.taken_at));
        } else if point.state == PointState::Live && after.expires_at < point.expires_at {
            impact.earlier += 1;
        }
    }
    impact.lost.sort();
    impact
}

/// [`ChangeImpact::nights`] alone.
pub fn shortening_impact(
    points: &[PointFacts],
    old: &Policy,
    new: &Policy,
    now: Timestamp,
) -> BTreeMap<VmName, u32> {
    change_impact(points, old, new, now).nights
}

/// Whether a policy entry with this impact asks first: it does where a VM would lose more than one night at once.
pub fn needs_confirmation(impact: &BTreeMap<VmName, u32>) -> bool {
    impact.values().any(|nights| *nights > 1)
}

/// The points that `wanted` would expire or erase and that the ledger has not foretold: these are asked for. What the
/// plan by the ledger's own policy (`foretold`) removes too is done unattended.
pub fn prune_needs_confirmation(wanted: &[Decision], foretold: &[Decision]) -> Vec<PointId> {
    let removes = |action: &Action| matches!(action, Action::Expire | Action::Erase);
    let known: BTreeSet<PointId> = foretold
        .iter()
        .filter(|decision| removes(&decision.action))
        .map(|decision| decision.point)
        .collect();
    wanted
        .iter()
        .filter(|decision| removes(&decision.action) && !known.contains(&decision.point))
        .map(|decision| decision.point)
        .collect()
}

/// A VM that soon has no restore point any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastPointWarning {
    pub vm: VmName,
    /// The last one to go.
    pub point: PointId,
    pub taken_at: Timestamp,
    pub expires_at: Timestamp,
}

/// VMs whose last live point expires within 14 days, in the order of their names. A VM with a point of the last 48
/// hours is not among them: under a maximum of a week every point is within 14 days of its end, and each night brings
/// another.
pub fn last_point_warnings(points: &[PointFacts], now: Timestamp) -> Vec<LastPointWarning> {
    let mut last: BTreeMap<&VmName, &PointFacts> = BTreeMap::new();
    let mut fresh: BTreeSet<&VmName> = BTreeSet::new();
    for point in points
        .iter()
        .filter(|point| point.state == PointState::Live)
    {
        // Not one of a time to come, which a wrong clock took.
        if point.taken_at.duration_since(now).abs() <= STILL_BACKED_UP {
            fresh.insert(&point.vm);
        }
        let entry = last.entry(&point.vm).or_insert(point);
        if point.expires_at > entry.expires_at {
            *entry = point;
        }
    }
    last.into_iter()
        .filter(|(vm, point)| {
            !fresh.contains(vm) && point.expires_at <= later(now, LAST_POINT_NOTICE)
        })
        .map(|(vm, point)| LastPointWarning {
            vm: vm.clone(),
            point: point.point,
            taken_at: point.taken_at,
            expires_at: point.expires_at,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::PolicyTerms;

    fn policy(change: impl FnOnce(&mut PolicyTerms)) -> Policy {
        let mut terms = PolicyTerms::default();
        change(&mut terms);
        Policy::parse(&terms).expect("a policy")
    }

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    fn hours(count: i64) -> SignedDuration {
        SignedDuration::from_hours(count)
    }

    /// A point with the given number as its id.
    fn point(number: u8, taken_at: &str, kind: PointKind, policy: &Policy) -> PointFacts {
        let taken_at = at(taken_at);
        let Expiry {
            expires_at,
            deadline,
        } = expiry(policy, taken_at);
        PointFacts {
            point: PointId::from_bytes([number; 16]),
            vm: VmName::new("web01").expect("a name"),
            kind,
            taken_at,
            expires_at,
            deadline,
            state: PointState::Live,
            expired_at: None,
            clock_alone: false,
            witnessed_since: None,
            silence: SignedDuration::ZERO,
            suspect: false,
            void: false,
            held: false,
        }
    }

    /// Monday to Sunday of ISO week 2026-W45 at 23:00, the full on Wednesday.
    fn week(policy: &Policy) -> Vec<PointFacts> {
        (2..=8)
            .map(|day| {
                let kind = match day {
                    4 => PointKind::Full,
                    _ => PointKind::Incremental,
                };
                point(day, &format!("2026-11-{day:02}T23:00:00Z"), kind, policy)
            })
            .collect()
    }

    fn kept(points: &[PointFacts], policy: &Policy, now: &str) -> Vec<u8> {
        plan(points, policy, at(now))
            .iter()
            .filter(|decision| decision.action == Action::Keep)
            .map(|decision| decision.point.as_bytes()[0])
            .collect()
    }

    fn only(points: &[PointFacts], policy: &Policy, now: Timestamp) -> (Action, String) {
        let decisions = plan(points, policy, now);
        assert_eq!(decisions.len(), 1);
        (decisions[0].action, decisions[0].reason.to_string())
    }

    #[test]
    fn two_months_after_new_years_eve_is_the_last_of_february() {
        let policy = policy(|terms| terms.timezone = "Europe/Amsterdam".into());
        let taken = at("2026-12-31T23:30:00+01:00");
        assert_eq!(
            expiry(&policy, taken),
            Expiry {
                expires_at: at("2027-02-06T23:30:00+01:00"),
                deadline: at("2027-02-28T23:30:00+01:00"),
            }
        );
        // Across the change of clocks the local hour stays.
        let taken = at("2026-02-10T23:30:00+01:00");
        assert_eq!(
            expiry(&policy, taken).deadline,
            at("2026-04-10T23:30:00+02:00")
        );
    }

    #[test]
    fn an_absurd_time_still_has_an_expiry() {
        let policy = policy(|_| ());
        for taken in [Timestamp::MIN, Timestamp::MAX] {
            let expiry = expiry(&policy, taken);
            assert!(expiry.expires_at <= expiry.deadline);
        }
    }

    #[test]
    fn a_week_is_decided_as_a_whole_two_days_after_it_left_the_window() {
        let policy = policy(|_| ());
        let points = week(&policy);
        let all = vec![2, 3, 4, 5, 6, 7, 8];
        // Sunday's night is 8 November; out of 14 nights at the start of the 15th after, and 48 hours.
        assert_eq!(kept(&points, &policy, "2026-11-25T21:59:00Z"), all);
        assert_eq!(kept(&points, &policy, "2026-11-25T22:00:00Z"), [4]);
        let decisions = plan(&points, &policy, at("2026-11-25T21:59:00Z"));
        assert_eq!(
            decisions[0].reason.to_string(),
            "ISO week 2026-W45 is inside the restore window until 2026-11-25; then one of its points stays"
        );
        assert_eq!(
            decisions[6].reason.to_string(),
            "inside the restore window until 2026-11-25"
        );
        let decisions = plan(&points, &policy, at("2026-11-25T22:00:00Z"));
        assert_eq!(
            decisions[2].reason.to_string(),
            "kept for ISO week 2026-W45 (the full)"
        );
        assert_eq!(
            decisions[0].reason.to_string(),
            format!("thinned: ISO week 2026-W45 keeps {}", "04".repeat(16))
        );
    }

    #[test]
    fn a_void_full_stays_until_its_time_is_over_and_is_no_weeks_point() {
        let policy = policy(|_| ());
        let mut points = week(&policy);
        points[2].void = true;
        assert_eq!(kept(&points, &policy, "2026-11-26T22:00:00Z"), [4, 8]);
        let (void, over) = (points[2].clone(), points[2].expires_at);
        let reason = "its commit broke a rule of the ledger, so it is not restored; expires at 2026-12-13T23:00:00Z";
        let wanted = (Action::Keep, reason.to_string());
        assert_eq!(
            only(std::slice::from_ref(&void), &policy, later(over, hours(-1))),
            wanted
        );
        assert_eq!(only(&[void], &policy, over).0, Action::Expire);
    }

    #[test]
    fn without_a_good_full_the_newest_good_point_of_the_week_stays() {
        let policy = policy(|_| ());
        let mut points = week(&policy);
        points[2].suspect = true;
        points[6].suspect = true;
        assert_eq!(kept(&points, &policy, "2026-11-26T22:00:00Z"), [7]);
        points.iter_mut().for_each(|point| point.suspect = true);
        assert_eq!(kept(&points, &policy, "2026-11-26T22:00:00Z"), [4]);
    }

    #[test]
    fn after_the_window_all_or_none_stay_if_so_configured() {
        let all = policy(|terms| terms.keep_after_window = "all".into());
        assert_eq!(
            kept(&week(&all), &all, "2026-12-05T22:00:00Z"),
            [2, 3, 4, 5, 6, 7, 8]
        );
        let none = policy(|terms| terms.keep_after_window = "none".into());
        assert_eq!(kept(&week(&none), &none, "2026-11-22T22:00:00Z"), [6, 7, 8]);
    }

    #[test]
    fn a_hold_stops_thinning_but_not_expiry() {
        let policy = policy(|_| ());
        let mut points = week(&policy);
        points[0].held = true;
        assert_eq!(kept(&points, &policy, "2026-11-26T22:00:00Z"), [2, 4]);
        let last = points[6].expires_at;
        assert!(
            plan(&points, &policy, last)
                .iter()
                .all(|decision| decision.action == Action::Expire)
        );
    }

    #[test]
    fn the_last_point_of_a_vm_expires_too_with_a_warning_before() {
        let policy = policy(|_| ());
        let points = [point(1, "2026-11-04T23:00:00Z", PointKind::Full, &policy)];
        let end = points[0].expires_at;
        assert_eq!(end, at("2026-12-13T23:00:00Z"));
        let (action, reason) = only(&points, &policy, end);
        assert_eq!(action, Action::Expire);
        assert_eq!(
            reason,
            "its time ended at 2026-12-13T23:00:00Z, maximum 2 months"
        );
        assert!(last_point_warnings(&points, later(end, hours(-15 * 24))).is_empty());
        let warnings = last_point_warnings(&points, later(end, hours(-14 * 24)));
        assert_eq!(warnings.len(), 1);
        assert_eq!(warnings[0].expires_at, end);
        // The last one to go counts, in whatever order they come.
        let mut points = [
            point(2, "2026-11-05T23:00:00Z", PointKind::Full, &policy),
            points[0].clone(),
        ];
        for _ in 0..2 {
            points.reverse();
            assert!(last_point_warnings(&points, later(end, hours(-14 * 24))).is_empty());
            let warnings = last_point_warnings(&points, later(end, hours(-13 * 24)));
            assert_eq!(warnings.len(), 1);
            assert_eq!(warnings[0].point.as_bytes()[0], 2);
        }
    }

    #[test]
    fn a_vm_that_is_backed_up_every_night_warns_of_nothing_under_a_short_maximum() {
        let policy = policy(|terms| terms.max_retention = "7 days".into());
        let points = week(&policy);
        assert!(last_point_warnings(&points, at("2026-11-09T22:00:00Z")).is_empty());
        assert_eq!(
            last_point_warnings(&points, at("2026-11-11T22:00:00Z")).len(),
            1
        );
    }

    #[test]
    fn an_expired_point_waits_a_day_before_it_is_erased() {
        let policy = policy(|_| ());
        let mut points = [point(1, "2026-11-04T23:00:00Z", PointKind::Full, &policy)];
        let expired = at("2026-12-14T01:00:00Z");
        points[0].state = PointState::Expired;
        let (action, reason) = only(&points, &policy, expired);
        assert!(matches!(action, Action::AwaitErase { .. }));
        assert_eq!(
            reason,
            "expired, and waits for a witnessed time to count from"
        );
        points[0].expired_at = Some(expired);
        let until = later(expired, hours(24));
        let (action, reason) = only(&points, &policy, later(until, hours(-1)));
        assert_eq!(action, Action::AwaitErase { until });
        assert_eq!(
            reason,
            "expired at 2026-12-14T01:00:00Z; waits until 2026-12-15T01:00:00Z so that --undo stays possible"
        );
        let (action, reason) = only(&points, &policy, until);
        assert_eq!(action, Action::Erase);
        assert_eq!(reason, "expired at 2026-12-14T01:00:00Z, maximum 2 months");
        points[0].state = PointState::Erased;
        assert!(plan(&points, &policy, until).is_empty());
    }

    #[test]
    fn the_waiting_is_a_quarter_of_a_short_budget_and_never_passes_the_deadline() {
        let policy = policy(|terms| terms.max_retention = "18 days".into());
        assert_eq!(policy.effective().erase_budget_days, 2);
        let mut points = [point(1, "2026-11-04T23:00:00Z", PointKind::Full, &policy)];
        points[0].state = PointState::Expired;
        points[0].expired_at = Some(points[0].expires_at);
        let (action, _) = only(&points, &policy, later(points[0].expires_at, hours(11)));
        assert!(matches!(action, Action::AwaitErase { .. }));
        let (action, _) = only(&points, &policy, later(points[0].expires_at, hours(12)));
        assert_eq!(action, Action::Erase);
        // Expired only on the last night: no time to wait.
        points[0].expired_at = Some(later(points[0].deadline, hours(-25)));
        let (action, reason) = only(&points, &policy, later(points[0].deadline, hours(-24)));
        assert_eq!(action, Action::Erase);
        assert!(reason.starts_with("must be gone by 2026-11-22T23:00:00Z"));
    }

    #[test]
    fn a_point_of_a_lone_clock_is_erased_after_14_witnessed_days_or_for_its_deadline() {
        let policy = policy(|_| ());
        let mut points = [point(1, "1970-01-05T00:00:00Z", PointKind::Full, &policy)];
        let truth = at("2026-11-04T23:00:00Z");
        // Counted from the last witnessed time before its session, 30 days earlier.
        let base = expiry(&policy, later(truth, hours(-30 * 24)));
        points[0].expires_at = base.expires_at;
        points[0].deadline = base.deadline;
        points[0].clock_alone = true;
        let (action, reason) = only(&points, &policy, truth);
        assert_eq!(action, Action::Keep);
        assert!(reason.contains("alone"));
        points[0].state = PointState::Expired;
        points[0].expired_at = Some(base.expires_at);
        let late = later(base.expires_at, hours(10 * 24));
        let (action, _) = only(&points, &policy, late);
        assert!(matches!(action, Action::AwaitErase { .. }));
        let since = later(base.expires_at, hours(5 * 24));
        points[0].witnessed_since = Some(since);
        let (action, reason) = only(&points, &policy, late);
        assert_eq!(
            action,
            Action::AwaitErase {
                until: later(since, LONE_CLOCK_WAIT)
            }
        );
        assert!(reason.contains("14 days of witnessed time"));
        let (action, _) = only(&points, &policy, later(since, LONE_CLOCK_WAIT));
        assert_eq!(action, Action::Erase);
        points[0].witnessed_since = None;
        let (action, _) = only(&points, &policy, later(base.deadline, hours(-24)));
        assert_eq!(action, Action::Erase);
    }

    #[test]
    fn a_silence_of_the_witnesses_protects_what_was_taken_before_it_for_as_much_longer() {
        let policy = policy(|terms| terms.keep_after_window = "none".into());
        let mut points = [point(1, "2026-11-04T23:00:00Z", PointKind::Full, &policy)];
        let leaves = at("2026-11-21T22:00:00Z");
        for (silence, longer) in [(0, 0), (36, 0), (37, 24), (71, 72)] {
            points[0].silence = hours(silence);
            let until = later(leaves, hours(longer));
            let (action, reason) = only(&points, &policy, later(until, hours(-1)));
            assert_eq!(action, Action::Keep, "{silence}");
            match longer > 0 {
                true => assert_eq!(
                    reason,
                    format!(
                        "after it no time was witnessed for {silence} hours; not thinned for that much longer"
                    )
                ),
                false => assert!(reason.starts_with("inside the restore window"), "{reason}"),
            }
            assert_eq!(only(&points, &policy, until).0, Action::Expire, "{silence}");
        }
        let (_, reason) = only(&points, &policy, leaves);
        assert!(
            reason.starts_with("after it no time was witnessed"),
            "{reason}"
        );
        // Its maximum is its maximum.
        points[0].silence = hours(10_000);
        let end = points[0].expires_at;
        assert_eq!(only(&points, &policy, end).0, Action::Expire);
    }

    #[test]
    fn a_held_point_that_expired_early_is_not_erased_before_its_own_time() {
        let policy = policy(|_| ());
        let mut points = [point(1, "2026-11-04T23:00:00Z", PointKind::Full, &policy)];
        points[0].state = PointState::Expired;
        points[0].expired_at = Some(at("2026-11-10T00:00:00Z"));
        points[0].held = true;
        let until = points[0].expires_at;
        let (action, reason) = only(&points, &policy, at("2026-11-20T00:00:00Z"));
        assert_eq!(action, Action::AwaitErase { until });
        assert!(reason.contains("held"), "{reason}");
        assert_eq!(only(&points, &policy, until).0, Action::Erase);
    }

    #[test]
    fn a_shortening_leaves_a_budget_from_its_entry_on_and_asks() {
        let long = policy(|_| ());
        let short = policy(|terms| terms.max_retention = "7 days".into());
        let points = week(&long);
        let entry = at("2026-11-09T12:00:00Z");
        let old = after_policy_change(&points[0], &short, entry);
        assert_eq!(old.expires_at, at("2026-11-08T23:00:00Z"));
        assert_eq!(old.deadline, later(entry, hours(24)));
        let new = after_policy_change(&points[6], &short, entry);
        assert_eq!(new, expiry(&short, points[6].taken_at));
        // Monday's is past its new expiry; Tuesday's has its last chance only tomorrow.
        let impact = shortening_impact(&points, &long, &short, entry);
        assert_eq!(impact.values().copied().collect::<Vec<_>>(), [1]);
        assert!(!needs_confirmation(&impact));
        // In the evening Tuesday's would be too late tomorrow.
        let impact = shortening_impact(&points, &long, &short, at("2026-11-09T22:30:00Z"));
        assert_eq!(impact.values().copied().collect::<Vec<_>>(), [2]);
        let impact = shortening_impact(&points, &long, &short, later(entry, hours(48)));
        assert_eq!(impact.values().copied().collect::<Vec<_>>(), [3]);
        assert!(needs_confirmation(&impact));
        // A budget of two days is left whole.
        let less = policy(|terms| terms.max_retention = "18 days".into());
        let late = at("2026-11-30T12:00:00Z");
        let old = after_policy_change(&points[0], &less, late);
        assert_eq!(old.deadline, later(late, hours(48)));
        // Lengthening changes nothing.
        let same = after_policy_change(&points[0], &long, entry);
        assert_eq!(same.deadline, points[0].deadline);
        assert!(shortening_impact(&points, &long, &long, entry).is_empty());
    }

    #[test]
    fn only_what_the_ledger_foretold_is_pruned_unattended() {
        let ledger = policy(|_| ());
        let configured = policy(|terms| terms.keep_after_window = "none".into());
        let points = week(&ledger);
        let now = at("2026-11-26T22:00:00Z");
        let foretold = plan(&points, &ledger, now);
        let asked = prune_needs_confirmation(&plan(&points, &configured, now), &foretold);
        assert_eq!(asked, [PointId::from_bytes([4; 16])]);
        assert!(prune_needs_confirmation(&foretold, &foretold).is_empty());
    }

    #[test]
    fn a_week_without_its_sunday_waits_for_sunday_all_the_same() {
        let policy = policy(|_| ());
        let mut points = week(&policy);
        points.pop();
        assert_eq!(kept(&points, &policy, "2026-11-25T21:59:00Z").len(), 6);
        assert_eq!(kept(&points, &policy, "2026-11-25T22:00:00Z"), [4]);
    }

    #[test]
    fn a_week_waits_for_its_point_of_a_lone_clock() {
        let policy = policy(|_| ());
        let mut points = week(&policy);
        points[4].clock_alone = true;
        assert_eq!(kept(&points, &policy, "2026-11-30T22:00:00Z").len(), 7);
        let reasons = |now: &str| -> Vec<String> {
            let decisions = plan(&points, &policy, at(now));
            let reason = |number: usize| decisions[number].reason.to_string();
            [0, 4].map(reason).into()
        };
        // None is said to be in the window for as long as nobody knows.
        assert_eq!(
            reasons("2026-11-22T21:59:00Z"),
            [
                "ISO week 2026-W45 is inside the restore window until 2026-11-25; then one of its points stays",
                "inside the restore window until 2026-11-23",
            ]
        );
        assert_eq!(
            reasons("2026-11-30T22:00:00Z"),
            [
                "ISO week 2026-W45 has a point whose time is not sure yet; until it is, all of them stay",
                "its host's clock was alone; not thinned before the restore window has passed in witnessed time",
            ]
        );
        points[4].witnessed_since = Some(at("2026-11-12T22:00:00Z"));
        assert_eq!(kept(&points, &policy, "2026-11-29T21:59:00Z").len(), 7);
        assert_eq!(kept(&points, &policy, "2026-11-29T22:00:00Z"), [4]);
    }

    #[test]
    fn a_point_whose_time_is_over_does_not_stand_for_its_week() {
        let policy = policy(|terms| terms.max_retention = "20 days".into());
        let mut points = week(&policy);
        points[5].kind = PointKind::Full;
        // Nobody pruned for two days: the fulls are past their time, Sunday's incremental is not.
        let now = "2026-11-25T22:30:00Z";
        assert_eq!(kept(&points, &policy, now), [8]);
    }

    #[test]
    fn a_night_of_the_doubled_hour_stays_in_the_window_to_its_end() {
        let policy = policy(|terms| {
            terms.timezone = "America/New_York".into();
            terms.window = "01:30-05:00".into();
            terms.max_retention = "7 days".into();
        });
        // The second 01:10 of 1 November is after the first 01:30: the night of the 1st. By the calendar alone it
        // would expire at 01:10 on the 7th, when the night of the 6th still needs it.
        let taken = at("2026-11-01T01:10:00-05:00");
        assert_eq!(
            expiry(&policy, taken).expires_at,
            at("2026-11-07T01:30:00-05:00")
        );
    }

    #[test]
    fn a_window_of_nearly_a_day_takes_no_night_of_the_restore_window() {
        let policy = policy(|terms| {
            terms.window = "00:00-23:59".into();
            terms.max_retention = "7 days".into();
        });
        let points = [point(1, "2026-11-01T00:00:00Z", PointKind::Full, &policy)];
        assert_eq!(kept(&points, &policy, "2026-11-06T23:59:00Z"), [1]);
        assert!(kept(&points, &policy, "2026-11-07T00:00:00Z").is_empty());
    }

    #[test]
    fn under_the_shortest_maximum_one_prune_a_night_is_enough() {
        let policy = policy(|terms| terms.max_retention = "3 days".into());
        let mut points = [point(1, "2026-11-01T23:00:00Z", PointKind::Full, &policy)];
        assert_eq!(points[0].deadline, at("2026-11-04T23:00:00Z"));
        assert_eq!(kept(&points, &policy, "2026-11-02T23:00:00Z"), [1]);
        // Before its own time, at 23:00, but out of the window; the next prune may be at 06:00 on the 5th.
        let now = at("2026-11-03T22:05:00Z");
        let (action, reason) = only(&points, &policy, now);
        assert_eq!(action, Action::Expire);
        assert_eq!(
            reason,
            "must be gone by 2026-11-04T23:00:00Z, and the next night's prune may be too late"
        );
        points[0].state = PointState::Expired;
        points[0].expired_at = Some(now);
        assert_eq!(only(&points, &policy, now).0, Action::Erase);
    }
}
