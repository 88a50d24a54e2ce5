//! What is owed: which VM needs a restore point now, and which nights have one.
//!
//! *Absent:* running anything, limits of load, and retries within a night (`jobs`): a night without a point is due
//! each time it is asked, until there is one or the next night begins.

use std::collections::BTreeSet;
use std::fmt;

use jiff::Timestamp;
use jiff::civil::Date;
use serde::{Deserialize, Serialize};

use crate::model::{PointKind, PointState, VmName};

use super::night::{days_after, night_of, window_of};
use super::retention::PointFacts;
use super::spread::FULL_AFTER_NIGHTS;
use super::terms::{FullDay, Policy};

/// What to do for a VM now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Nothing,
    Incremental,
    Full,
}

/// What the last audit said of the tracking of a VM's changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tracking {
    /// Nothing against it.
    Trusted,
    /// It hid changes, and no audit has been clean since.
    Distrusted,
}

/// Why; shown in the report of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DueReason {
    /// The night has its point.
    HasPoint { night: Date },
    /// A full was asked for.
    Asked,
    /// The VM has no live restore point.
    First,
    /// Inside the window, and nothing yet.
    Tonight { night: Date },
    /// The window has closed without a point.
    CatchesUp { night: Date },
    /// The night of the weekly full has come (`since`), and none was taken yet.
    FullDay { night: Date, since: Date },
    /// The full that is due (`since`) comes in a night to come: tonight others have taken what a night holds.
    PutOff { night: Date, since: Date },
    /// A point is suspect and no good full was taken after it.
    Suspect { night: Date },
    /// The full that is due later in the week comes tonight, when less is to be done.
    Early { night: Date },
    /// Tracking hid changes, so an incremental would lack what it hides next.
    Distrusted { night: Date },
    /// The newest committed point is expired or erased, so it cannot be a base.
    NoBase { night: Date },
}

impl fmt::Display for DueReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DueReason::HasPoint { night } => {
                write!(f, "the night of {night} has its restore point")
            }
            DueReason::Asked => f.write_str("a full was asked for"),
            DueReason::First => f.write_str("there is no restore point yet"),
            DueReason::Tonight { night } => write!(f, "due in the night of {night}"),
            DueReason::CatchesUp { night } => write!(f, "catches up the night of {night}"),
            DueReason::FullDay { night, since } if night == since => {
                write!(f, "the weekly full is due in the night of {night}")
            }
            DueReason::FullDay { since, .. } => {
                write!(f, "catches up the weekly full of {since}")
            }
            DueReason::PutOff { since, .. } => write!(
                f,
                "the weekly full of {since} comes in one of the next nights, because others fill this one"
            ),
            DueReason::Early { night } => write!(
                f,
                "the weekly full, in the night of {night} already, which has fewer than others"
            ),
            DueReason::Suspect { .. } => {
                f.write_str("a full repairs what a suspect restore point may lack")
            }
            DueReason::Distrusted { .. } => f.write_str(
                "a full, because the tracking of changes hid some and no audit has been clean since",
            ),
            DueReason::NoBase { .. } => f.write_str(
                "a full, because the newest restore point is expired and cannot be a base",
            ),
        }
    }
}

/// What is due for a VM, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    pub what: What,
    pub reason: DueReason,
}

/// The night for which the full of this week is due, if one is: of a given weekday, the last such night, until a
/// full was taken; else the sixth night after the last full, so that a night that fails still leaves one within the
/// week.
fn full_since(points: &[(&PointFacts, Date)], policy: &Policy, night: Date) -> Option<Date> {
    let newest = newest_full(points);
    let since = match policy.full_day() {
        FullDay::On(weekday) => days_after(night, -i64::from(weekday.until(night.weekday()))),
        FullDay::Auto => newest.map_or(night, |newest| {
            days_after(newest, i64::from(FULL_AFTER_NIGHTS))
        }),
    };
    (since <= night && newest.is_none_or(|newest| newest < since)).then_some(since)
}

/// The points of a VM with their nights. One of a night to come, or that was dated ahead, was taken by a wrong clock:
/// it promises nothing, and nothing is decided by it.
fn until_night<'a>(
    vm: &VmName,
    points: &'a [PointFacts],
    policy: &Policy,
    now: Timestamp,
) -> Vec<(&'a PointFacts, Date)> {
    let night = night_of(now, policy);
    let mine = points.iter().filter(|point| point.vm == *vm);
    mine.filter(|point| !is_dated_ahead(point, policy, now))
        .map(|point| (point, night_of(point.taken_at, policy)))
        .filter(|(_, of)| *of <= night)
        .collect()
}

/// Whether a lone clock gave the point a date that it cannot have: one that is still to come, or of a later night than
/// a time that was witnessed after it. Of which night it is, nobody knows then. A lone clock that nothing speaks
/// against may be right, for weeks.
fn is_dated_ahead(point: &PointFacts, policy: &Policy, now: Timestamp) -> bool {
    let night = night_of(point.taken_at, policy);
    let is_before = |since| night_of(since, policy) < night;
    point.clock_alone && (now < point.taken_at || point.witnessed_since.is_some_and(is_before))
}

/// The night of the last good full.
fn newest_full(points: &[(&PointFacts, Date)]) -> Option<Date> {
    points
        .iter()
        .filter(|(point, _)| point.kind == PointKind::Full && !point.suspect)
        .map(|(_, of)| *of)
        .max()
}

/// How many nights ago a VM with `full_day = "auto"` had its last good full, 0 for tonight; `None` where a weekday is
/// given. A host with several of them levels its nights ([`super::fulls_tonight`]).
pub fn nights_since_full(
    vm: &VmName,
    points: &[PointFacts],
    policy: &Policy,
    now: Timestamp,
) -> Option<u8> {
    if policy.full_day() != FullDay::Auto {
        return None;
    }
    let night = night_of(now, policy);
    let newest = newest_full(&until_night(vm, points, policy, now));
    let nights = newest.map_or(i64::MAX, |newest| {
        night.duration_since(newest).as_hours() / 24
    });
    Some(u8::try_from(nights).unwrap_or(u8::MAX))
}

/// What is due for a VM at `now`. `points` are all its committed points, in every state; those of other VMs are
/// ignored. Each night gets one point, inside the window or caught up until the next window starts; the missed full
/// of a week is caught up with the next point. Between two fulls are six nights, and what catching up takes.
///
/// While tracking is distrusted, what is due is a full.
///
/// `force_full` asks for a full now, even where the night has its point.
pub fn due(
    vm: &VmName,
    points: &[PointFacts],
    tracking: Tracking,
    policy: &Policy,
    now: Timestamp,
    force_full: bool,
) -> Due {
    let full = |reason| Due {
        what: What::Full,
        reason,
    };
    if force_full {
        return full(DueReason::Asked);
    }
    let night = night_of(now, policy);
    let mine = until_night(vm, points, policy, now);
    let has_point = mine.iter().any(|(point, of)| {
        // A suspect full counts: another one in the same night would most likely be suspect again.
        *of == night && (!point.suspect || point.kind == PointKind::Full)
    });
    let is_live = |point: &PointFacts| point.vm == *vm && point.state == PointState::Live;
    if !points.iter().any(is_live) && !has_point {
        return full(DueReason::First);
    }
    if has_point {
        return Due {
            what: What::Nothing,
            reason: DueReason::HasPoint { night },
        };
    }
    if tracking == Tracking::Distrusted {
        return full(DueReason::Distrusted { night });
    }
    if needs_repair(&mine) {
        return full(DueReason::Suspect { night });
    }
    let newest = mine.iter().max_by_key(|(point, _)| point.taken_at);
    if newest.is_some_and(|(point, _)| point.state != PointState::Live) {
        return full(DueReason::NoBase { night });
    }
    if let Some(since) = full_since(&mine, policy, night) {
        return full(DueReason::FullDay { night, since });
    }
    Due {
        what: What::Incremental,
        reason: match now < window_of(night, policy).1 {
            true => DueReason::Tonight { night },
            false => DueReason::CatchesUp { night },
        },
    }
}

/// A live point is suspect, and no good full came after it.
fn needs_repair(points: &[(&PointFacts, Date)]) -> bool {
    let live = || {
        points
            .iter()
            .map(|(point, _)| *point)
            .filter(|point| point.state == PointState::Live)
    };
    let repaired = live()
        .filter(|point| point.kind == PointKind::Full && !point.suspect)
        .map(|point| point.taken_at)
        .max();
    live().any(|point| point.suspect && Some(point.taken_at) > repaired)
}

/// Whether a night of the restore window can be gone back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NightState {
    /// A live point that is not suspect.
    Covered,
    /// Live points, all suspect.
    Suspect,
    /// Its window has ended and there is no live point.
    Missing,
    /// Its window has not ended.
    NotYet,
    /// Nothing is owed: before the first point of the VM, or it was over when a longer window was promised.
    BeforeFirst,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Night {
    pub date: Date,
    pub state: NightState,
}

/// The nights of the effective restore window, oldest first; the last is the night of `now`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Coverage {
    pub nights: Vec<Night>,
    pub covered: usize,
    /// Holes in the window: a broken promise.
    pub missing: usize,
    /// Nights that may not restore byte for byte: neither covered nor missing.
    pub suspect: usize,
}

/// The restore windows that a customer was promised, each with the time since when. A longer one brings nothing back:
/// each night is owed for as long as the shortest that was promised since. So they ascend, and one that is shorter
/// than those before it takes their place.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromisedWindows(Vec<(Timestamp, u32)>);

impl PromisedWindows {
    /// From then on so many nights can be gone back to.
    pub fn promise(&mut self, at: Timestamp, nights: u32) {
        let mut since = at;
        while let Some((earlier, _)) = self.0.pop_if(|(_, before)| *before >= nights) {
            since = earlier;
        }
        self.0.push((since, nights));
    }

    /// For how many nights the points of a night are owed. What was promised during the night holds from the next one
    /// on: its point may have been taken before. What is of a time to come a wrong clock dated, and it may have held
    /// for long.
    fn nights_owed(&self, night: Date, tonight: Date, policy: &Policy) -> Option<u32> {
        let holds = |(since, _): &&(Timestamp, u32)| {
            let since = night_of(*since, policy);
            since < night || tonight < since
        };
        let promised = self.0.iter().rev().find(holds);
        promised.or(self.0.first()).map(|(_, nights)| *nights)
    }
}

/// Which nights of the effective restore window one VM can be restored from. `points` are those of the VM;
/// `first_point` is when the first one was taken since it last had none, which may have expired long ago.
pub fn coverage(
    points: &[PointFacts],
    policy: &Policy,
    now: Timestamp,
    first_point: Option<Timestamp>,
    promised: &PromisedWindows,
) -> Coverage {
    let tonight = night_of(now, policy);
    // Where that is a night to come, a wrong clock took it: every night may have been owed.
    let first = first_point.map(|at| night_of(at, policy));
    let is_before = |date| first.is_none_or(|first| date < first && first <= tonight);
    let window_ended = now >= window_of(tonight, policy).1;
    let mut good = BTreeSet::new();
    let mut suspect = BTreeSet::new();
    for point in points {
        // Past its time a point cannot be read, whether or not a prune has said so.
        let is_listed = point.state == PointState::Live && now < point.expires_at;
        if is_listed && !is_dated_ahead(point, policy, now) {
            let of = match point.suspect {
                true => &mut suspect,
                false => &mut good,
            };
            of.insert(night_of(point.taken_at, policy));
        }
    }
    let window = i64::from(policy.effective().restore_window_days);
    let nights: Vec<Night> = (-window..=0)
        .map(|offset| {
            let date = days_after(tonight, offset);
            let owed = promised.nights_owed(date, tonight, policy);
            let is_over = owed.is_some_and(|nights| i64::from(nights) < -offset);
            let state = if good.contains(&date) {
                NightState::Covered
            } else if suspect.contains(&date) {
                NightState::Suspect
            } else if is_before(date) || is_over {
                NightState::BeforeFirst
            } else if date == tonight && !window_ended {
                NightState::NotYet
            } else {
                NightState::Missing
            };
            Night { date, state }
        })
        .collect();
    let count = |state| nights.iter().filter(|night| night.state == state).count();
    Coverage {
        covered: count(NightState::Covered),
        missing: count(NightState::Missing),
        suspect: count(NightState::Suspect),
        nights,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PointId;
    use crate::policy::{Expiry, PolicyTerms, expiry};
    use jiff::SignedDuration;
    use jiff::civil::date;

    fn policy(full_day: &str) -> Policy {
        Policy::parse(&PolicyTerms {
            timezone: "Europe/Amsterdam".into(),
            full_day: full_day.into(),
            ..PolicyTerms::default()
        })
        .expect("a policy")
    }

    fn at(text: &str) -> Timestamp {
        format!("{text}:00+01:00").parse().expect("a time")
    }

    fn vm() -> VmName {
        VmName::new("web01").expect("a name")
    }

    fn point(taken_at: &str, kind: PointKind) -> PointFacts {
        let taken_at = at(taken_at);
        let Expiry {
            expires_at,
            deadline,
        } = expiry(&policy("auto"), taken_at);
        PointFacts {
            point: PointId::from_bytes([0; 16]),
            vm: vm(),
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

    /// 2026-11-08 is a Sunday.
    fn what(points: &[PointFacts], now: &str) -> (What, String) {
        what_with(Tracking::Trusted, points, now)
    }

    fn what_with(tracking: Tracking, points: &[PointFacts], now: &str) -> (What, String) {
        let policy = policy("sunday");
        let due = due(&vm(), points, tracking, &policy, at(now), false);
        (due.what, due.reason.to_string())
    }

    #[test]
    fn a_new_vm_is_backed_up_at_once() {
        let (what, reason) = what(&[], "2026-11-10T12:00");
        assert_eq!(what, What::Full);
        assert_eq!(reason, "there is no restore point yet");
    }

    #[test]
    fn each_night_gets_one_point() {
        let mut points = vec![point("2026-11-08T23:00", PointKind::Full)];
        assert_eq!(what(&points, "2026-11-09T21:59").0, What::Nothing);
        assert_eq!(
            what(&points, "2026-11-09T22:00"),
            (
                What::Incremental,
                "due in the night of 2026-11-09".to_string()
            )
        );
        points.push(point("2026-11-09T22:10", PointKind::Incremental));
        assert_eq!(what(&points, "2026-11-10T03:00").0, What::Nothing);
    }

    #[test]
    fn a_missed_night_is_caught_up_after_its_window() {
        let mut points = vec![point("2026-11-08T23:00", PointKind::Full)];
        assert_eq!(
            what(&points, "2026-11-10T09:00"),
            (
                What::Incremental,
                "catches up the night of 2026-11-09".to_string()
            )
        );
        points.push(point("2026-11-10T09:00", PointKind::Incremental));
        assert_eq!(what(&points, "2026-11-10T21:00").0, What::Nothing);
        assert_eq!(what(&points, "2026-11-10T22:00").0, What::Incremental);
    }

    #[test]
    fn a_missed_full_is_caught_up_the_next_night() {
        let mut points = vec![
            point("2026-11-01T23:00", PointKind::Full),
            point("2026-11-07T23:00", PointKind::Incremental),
        ];
        assert_eq!(what(&points, "2026-11-08T21:00").0, What::Nothing);
        assert_eq!(
            what(&points, "2026-11-08T22:00"),
            (
                What::Full,
                "the weekly full is due in the night of 2026-11-08".to_string()
            )
        );
        assert_eq!(
            what(&points, "2026-11-10T23:00"),
            (
                What::Full,
                "catches up the weekly full of 2026-11-08".to_string()
            )
        );
        points.push(point("2026-11-10T23:00", PointKind::Full));
        assert_eq!(what(&points, "2026-11-11T23:00").0, What::Incremental);
        assert_eq!(what(&points, "2026-11-15T23:00").0, What::Full);
    }

    #[test]
    fn a_suspect_point_asks_for_one_full() {
        let mut points = vec![
            point("2026-11-08T23:00", PointKind::Full),
            point("2026-11-09T23:00", PointKind::Incremental),
        ];
        points[1].suspect = true;
        // The night itself is not covered by a suspect incremental.
        assert_eq!(what(&points, "2026-11-10T05:00").0, What::Full);
        let mut full = point("2026-11-10T05:00", PointKind::Full);
        full.suspect = true;
        points.push(full);
        assert_eq!(what(&points, "2026-11-10T05:30").0, What::Nothing);
        assert_eq!(what(&points, "2026-11-10T23:00").0, What::Full);
        points.push(point("2026-11-10T23:00", PointKind::Full));
        assert_eq!(what(&points, "2026-11-11T23:00").0, What::Incremental);
    }

    #[test]
    fn while_tracking_is_distrusted_every_night_is_a_full_and_no_night_is_two() {
        let mut points = vec![
            point("2026-11-08T23:00", PointKind::Full),
            point("2026-11-09T23:00", PointKind::Incremental),
        ];
        points[1].suspect = true;
        for night in 10..20 {
            let now = format!("2026-11-{night}T23:00");
            let (what, reason) = what_with(Tracking::Distrusted, &points, &now);
            assert_eq!(what, What::Full);
            assert!(reason.contains("no audit has been clean"), "{reason}");
            points.push(point(&now, PointKind::Full));
            let again = what_with(Tracking::Distrusted, &points, &now);
            assert_eq!(again.0, What::Nothing);
        }
        assert_eq!(what(&points, "2026-11-20T23:00").0, What::Incremental);
    }

    #[test]
    fn an_expired_base_asks_for_a_full() {
        let mut points = vec![
            point("2026-11-08T23:00", PointKind::Full),
            point("2026-11-09T23:00", PointKind::Incremental),
        ];
        points[1].state = PointState::Expired;
        assert_eq!(what(&points, "2026-11-10T23:00").0, What::Full);
        points[0].state = PointState::Erased;
        assert_eq!(
            what(&points, "2026-11-10T23:00").1,
            "there is no restore point yet"
        );
    }

    #[test]
    fn a_point_of_the_future_counts_for_no_night() {
        let points = vec![
            point("2026-11-08T23:00", PointKind::Full),
            point("2036-11-08T23:00", PointKind::Full),
        ];
        assert_eq!(what(&points, "2026-11-09T23:00").0, What::Incremental);
        assert_eq!(what(&points, "2026-11-15T23:00").0, What::Full);
    }

    #[test]
    fn a_point_of_the_future_that_is_expired_or_suspect_asks_for_no_full() {
        let mut points = vec![
            point("2026-11-08T23:00", PointKind::Full),
            point("2026-11-09T23:00", PointKind::Incremental),
            point("2036-11-08T23:00", PointKind::Full),
        ];
        points[2].state = PointState::Expired;
        assert_eq!(what(&points, "2026-11-10T23:00").0, What::Incremental);
        points[2].state = PointState::Live;
        points[2].suspect = true;
        assert_eq!(what(&points, "2026-11-10T23:00").0, What::Incremental);
    }

    #[test]
    fn a_full_that_is_asked_for_is_due_at_any_time() {
        let points = [point("2026-11-08T23:00", PointKind::Full)];
        let now = at("2026-11-08T23:30");
        let policy = policy("auto");
        let due = due(&vm(), &points, Tracking::Trusted, &policy, now, true);
        assert_eq!((due.what, due.reason), (What::Full, DueReason::Asked));
    }

    #[test]
    fn without_a_weekday_a_full_comes_six_nights_after_the_last() {
        let policy = policy("auto");
        let mut points = vec![point("2026-11-03T23:00", PointKind::Full)];
        let now = |day: &str| at(&format!("2026-11-{day}T23:00"));
        let due_at = |points: &[PointFacts], day| {
            let due = due(&vm(), points, Tracking::Trusted, &policy, now(day), false);
            (
                due.what,
                nights_since_full(&vm(), points, &policy, now(day)),
            )
        };
        assert_eq!(due_at(&points, "04"), (What::Incremental, Some(1)));
        assert_eq!(due_at(&points, "08"), (What::Incremental, Some(5)));
        assert_eq!(due_at(&points, "09"), (What::Full, Some(6)));
        assert_eq!(due_at(&points, "12"), (What::Full, Some(9)));
        points.push(point("2026-11-12T23:00", PointKind::Full));
        assert_eq!(due_at(&points, "17"), (What::Incremental, Some(5)));
        assert_eq!(due_at(&points, "18"), (What::Full, Some(6)));
        // A suspect full is none, and one of the future promises nothing.
        points[1].suspect = true;
        points.push(point("2036-11-12T23:00", PointKind::Full));
        assert_eq!(due_at(&points, "18").1, Some(15));
        assert_eq!(
            nights_since_full(&vm(), &[], &policy, now("18")),
            Some(u8::MAX)
        );
    }

    #[test]
    fn a_weekday_leaves_nothing_to_be_levelled() {
        let now = at("2026-11-04T23:00");
        assert_eq!(nights_since_full(&vm(), &[], &policy("sunday"), now), None);
    }

    #[test]
    fn a_point_that_a_lone_clock_dated_ahead_does_not_take_the_place_of_a_later_nights() {
        // The second in truth of the 9th, which is caught up in the morning, by a right clock.
        let mut points = vec![
            point("2026-11-08T22:30", PointKind::Full),
            point("2026-11-10T22:30", PointKind::Incremental),
            point("2026-11-10T06:30", PointKind::Incremental),
        ];
        points[1].clock_alone = true;
        let seen = |points: &[PointFacts]| {
            let found = covered(points, at("2026-11-11T07:00"), Some("2026-11-08T22:30"));
            (what(points, "2026-11-10T22:31").0, found.missing)
        };
        points[1].witnessed_since = Some(at("2026-11-10T06:30"));
        assert_eq!(seen(&points), (What::Incremental, 1));
        // Nothing speaks against it: weeks without a witness, or one of the same night.
        for since in [None, Some("2026-12-10T22:30"), Some("2026-11-10T22:10")] {
            points[1].witnessed_since = since.map(at);
            assert_eq!(seen(&points), (What::Nothing, 0), "{since:?}");
        }
        // It is still to come.
        assert_eq!(what(&points, "2026-11-10T22:29").0, What::Incremental);
    }

    fn covered(points: &[PointFacts], now: Timestamp, first: Option<&str>) -> Coverage {
        let promised = PromisedWindows::default();
        coverage(points, &policy("sunday"), now, first.map(at), &promised)
    }

    #[test]
    fn coverage_counts_the_holes_of_the_window() {
        let mut points: Vec<PointFacts> = (1..=20)
            .map(|day| point(&format!("2026-11-{day:02}T23:00"), PointKind::Incremental))
            .collect();
        points.remove(14); // the 15th
        points[11].suspect = true; // the 12th
        let now = at("2026-11-21T23:00");
        let found = covered(&points, now, Some("2026-11-01T23:00"));
        assert_eq!(found.nights.len(), 15);
        assert_eq!(found.nights[0].date, date(2026, 11, 7));
        assert_eq!((found.covered, found.missing, found.suspect), (12, 1, 1));
        assert_eq!(found.nights[8].state, NightState::Missing);
        assert_eq!(found.nights[14].state, NightState::NotYet);
        // After the end of the window tonight is a hole too; caught up, it is none.
        let morning = at("2026-11-22T06:00");
        let found = covered(&points, morning, Some("2026-11-01T23:00"));
        assert_eq!(found.missing, 2);
        points.push(point("2026-11-22T09:00", PointKind::Incremental));
        let later = at("2026-11-22T09:01");
        let found = covered(&points, later, Some("2026-11-01T23:00"));
        assert_eq!(found.missing, 1);
    }

    #[test]
    fn nothing_was_owed_before_the_first_point() {
        let points = [point("2026-11-20T23:00", PointKind::Full)];
        let now = at("2026-11-21T12:00");
        let found = covered(&points, now, Some("2026-11-20T23:00"));
        assert_eq!((found.covered, found.missing), (1, 0));
        assert_eq!(found.nights[0].state, NightState::BeforeFirst);
        assert_eq!(covered(&[], now, None).missing, 0);
    }

    #[test]
    fn a_longer_window_makes_no_holes_of_nights_that_were_over_and_hides_none_that_were_not() {
        let mut promised = PromisedWindows::default();
        promised.promise(at("2026-01-01T12:00"), 5);
        promised.promise(at("2026-11-15T22:05"), 14);
        let policy = policy("sunday");
        let owed = |promised: &PromisedWindows, now: &str| -> Vec<i8> {
            let first = Some(at("2026-01-01T23:00"));
            let found = coverage(&[], &policy, at(now), first, promised);
            let missing = found
                .nights
                .iter()
                .filter(|night| night.state == NightState::Missing);
            missing.map(|night| night.date.day()).collect()
        };
        // Tonight's window is over.
        assert_eq!(
            owed(&promised, "2026-11-16T12:00"),
            [10, 11, 12, 13, 14, 15]
        );
        assert_eq!(
            owed(&promised, "2026-11-19T12:00"),
            [13, 14, 15, 16, 17, 18]
        );
        assert_eq!(
            owed(&promised, "2026-11-22T12:00"),
            [16, 17, 18, 19, 20, 21]
        );
        assert_eq!(owed(&promised, "2026-11-24T12:00").len(), 8);
        assert_eq!(owed(&promised, "2026-12-05T12:00").len(), 15);
        // A shorter one in between holds for all nights before it.
        promised.promise(at("2026-11-20T22:05"), 3);
        promised.promise(at("2026-11-21T22:05"), 14);
        assert_eq!(owed(&promised, "2026-11-22T12:00"), [18, 19, 20, 21]);
        assert_eq!(owed(&promised, "2026-11-24T12:00"), [20, 21, 22, 23]);
        // The same once more changes nothing.
        let before = promised.clone();
        promised.promise(at("2026-11-23T22:05"), 14);
        assert_eq!(promised, before);
        // A clock that was years ahead hides no hole.
        promised.promise(at("2036-11-23T22:05"), 15);
        assert_eq!(owed(&promised, "2026-12-05T12:00").len(), 15);
    }

    #[test]
    fn a_first_point_of_the_future_hides_no_hole() {
        let now = at("2026-11-21T12:00");
        assert_eq!(covered(&[], now, Some("2036-11-01T23:00")).missing, 15);
    }
}
