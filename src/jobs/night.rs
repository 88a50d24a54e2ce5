//! One night of a host: which VM gets what, in which order, and when each begins.
//!
//! Planned over all customers at once, because they share the host's disks, its way to the store and its window.

use super::prune::facts;
use super::run::tracking_of;
use crate::model::{PointKind, PointState, VmName};
use crate::policy::{
    Due, DueReason, NextFull, PointFacts, Policy, Tonight, Tracking, What, due, fulls_tonight,
    night_of, nights_since_full, spread_until, start_times, window_of,
};
use crate::repository::State;
use jiff::Timestamp;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// An incremental reads somewhat more than it stores, and never nothing.
const READ_PER_STORED: u64 = 2;
const LEAST_WORK_BYTES: u64 = 64 << 20;
/// How soon whoever waits for its time notices that it is to stop.
const NOTICE: Duration = Duration::from_millis(200);

/// Slower than this nothing is read: a guest is held up by what is open for long, too.
const LEAST_RATE: u64 = 16 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpreadRate {
    pub bytes_per_second: u64,
    pub until: Timestamp,
}

/// One VM in a night.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Work {
    /// Its customer, by its place among those of the run.
    pub customer: usize,
    pub vm: VmName,
    pub due: Due,
    /// Not before; `None`: at once.
    pub starts_at: Option<Timestamp>,
    /// Not from then on: the window's end, where the run is in it.
    pub until: Option<Timestamp>,
    window: (Timestamp, Timestamp),
    last_taken: Option<Timestamp>,
    nights_since_full: Option<u8>,
    full_bytes: u64,
    incremental_bytes: u64,
}

/// What is known of a VM's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Of all disks, as the VM sees them.
    pub disks_bytes: u64,
    /// What its newest incremental added to the store.
    pub stored_bytes: u64,
}

impl Work {
    /// What is due for a VM now. `points` are its own.
    pub fn new(
        customer: usize,
        vm: &VmName,
        policy: &Policy,
        points: &[PointFacts],
        tracking: Tracking,
        sizes: Sizes,
        now: Timestamp,
    ) -> Self {
        let window = window_of(night_of(now, policy), policy);
        let is_inside = (window.0..window.1).contains(&now);
        let read_bytes = sizes.stored_bytes.saturating_mul(READ_PER_STORED);
        Work {
            customer,
            vm: vm.clone(),
            due: due(vm, points, tracking, policy, now, false),
            starts_at: None,
            until: is_inside.then_some(window.1),
            window,
            last_taken: points
                .iter()
                // One of a time to come was taken by a wrong clock.
                .filter(|point| point.state != PointState::Erased && point.taken_at <= now)
                .map(|point| point.taken_at)
                .max(),
            nights_since_full: nights_since_full(vm, points, policy, now),
            full_bytes: sizes.disks_bytes.max(LEAST_WORK_BYTES),
            incremental_bytes: read_bytes.max(LEAST_WORK_BYTES),
        }
    }

    pub fn is_due(&self) -> bool {
        self.due.what != What::Nothing
    }

    /// What it is thought to read, so that one can be held against another.
    fn weight(&self) -> u64 {
        match self.due.what {
            What::Nothing => 0,
            What::Incremental => self.incremental_bytes,
            What::Full => self.full_bytes,
        }
    }
}

/// What is due for these VMs of a customer now, by its ledger. Nothing without a policy.
pub fn look_ahead(customer: usize, state: &State, vms: &[VmName], now: Timestamp) -> Vec<Work> {
    let Some(policy) = &state.policy else {
        return Vec::new();
    };
    let all = facts(state);
    vms.iter()
        .map(|vm| {
            let of_vm = || state.points.values().filter(|point| point.vm == *vm);
            let newest = of_vm()
                .filter(|point| point.state != PointState::Erased)
                .max_by_key(|point| point.seq);
            let incremental = of_vm()
                .filter(|point| point.kind == PointKind::Incremental)
                .max_by_key(|point| point.seq);
            let sizes = Sizes {
                disks_bytes: newest.map_or(0, |point| {
                    point.disks.iter().map(|disk| disk.size_bytes).sum()
                }),
                stored_bytes: incremental.map_or(0, |point| point.stored_bytes),
            };
            let mine: Vec<_> = all.iter().filter(|one| one.vm == *vm).cloned().collect();
            Work::new(
                customer,
                vm,
                policy,
                &mine,
                tracking_of(state, vm),
                sizes,
                now,
            )
        })
        .collect()
}

/// Levels the fulls over the nights, and puts what is due into the order in which it is done: whose newest point is
/// the oldest comes first, so that what one night leaves is the next one's beginning; of equals the larger. With
/// `spread`, what is due inside its window begins over all that is left of it.
pub fn arrange(works: &mut [Work], now: Timestamp, spread: bool) {
    level_fulls(works, now);
    works.sort_by(|one, other| {
        let key = |work: &Work| (work.last_taken, std::cmp::Reverse(work.weight()));
        key(one)
            .cmp(&key(other))
            .then_with(|| (one.customer, &one.vm).cmp(&(other.customer, &other.vm)))
    });
    if !spread {
        return;
    }
    let mut by_window: BTreeMap<(Timestamp, Timestamp), Vec<&mut Work>> = BTreeMap::new();
    for work in works.iter_mut().filter(|work| work.is_due()) {
        if work.until.is_some() {
            by_window.entry(work.window).or_default().push(work);
        }
    }
    for ((from, to), mut works) in by_window {
        let weights: Vec<u64> = works.iter().map(|work| work.weight()).collect();
        let starts = start_times((from.max(now), to), &weights);
        for (work, start) in works.iter_mut().zip(starts) {
            work.starts_at = Some(start);
        }
    }
    works.sort_by_key(|work| work.starts_at);
}

/// How fast a spread night has to be read so that each VM ends when the next begins, and until when: the last of its
/// window is for what took longer. `None` where nothing is spread.
pub fn spread_rate(works: &[Work]) -> Option<SpreadRate> {
    let spread = || {
        works
            .iter()
            .filter(|work| work.is_due() && work.starts_at.is_some())
    };
    let begins = spread().filter_map(|work| work.starts_at).min()?;
    let until = spread()
        .map(|work| spread_until(begins, work.window.1))
        .min()?;
    let bytes = spread().map(|work| u128::from(work.weight())).sum::<u128>();
    let seconds = u128::try_from(until.duration_since(begins).as_secs()).ok()?;
    let rate = bytes.checked_div(seconds)?;
    Some(SpreadRate {
        bytes_per_second: u64::try_from(rate).unwrap_or(u64::MAX).max(LEAST_RATE),
        until,
    })
}

/// Which of those without a weekday of their own are full tonight.
fn level_fulls(works: &mut [Work], now: Timestamp) {
    let mut levelled: Vec<(NextFull, &mut Work)> = works
        .iter_mut()
        .filter_map(|work| Some((next_full(work)?, work)))
        .collect();
    let fulls: Vec<NextFull> = levelled.iter().map(|(full, _)| *full).collect();
    let days = now.as_second() / (24 * 60 * 60);
    let taken = fulls_tonight(&fulls, usize::try_from(days).unwrap_or(0));
    for (at, (full, work)) in levelled.iter_mut().enumerate() {
        if full.tonight != Tonight::Open {
            continue;
        }
        let (what, reason) = match (work.due.reason, taken.contains(&at)) {
            (DueReason::Tonight { night }, true) => (What::Full, DueReason::Early { night }),
            (DueReason::FullDay { night, since }, false) => {
                (What::Incremental, DueReason::PutOff { night, since })
            }
            _ => continue,
        };
        work.due = Due { what, reason };
    }
}

/// `None` where the weekday is given.
fn next_full(work: &Work) -> Option<NextFull> {
    let age_nights = work.nights_since_full?;
    let tonight = match (work.due.what, work.due.reason) {
        (_, DueReason::Tonight { .. } | DueReason::FullDay { .. }) => Tonight::Open,
        (What::Full, _) => Tonight::Full,
        // One that was taken tonight is part of tonight's load.
        (What::Nothing, _) if age_nights == 0 => Tonight::Full,
        (What::Nothing | What::Incremental, _) => Tonight::Closed,
    };
    Some(NextFull {
        age_nights,
        weight: work.full_bytes,
        tonight,
    })
}

/// Does the works in their order, so many at once, each not before its time. What is due and did not begin before its
/// window's end, and what did not before everything was to stop, is `None`; whatever went so wrong with one that it
/// never ended well is what `lost` makes of it, and stops no other.
pub fn carry_out<T: Send>(
    works: &[Work],
    at_once: usize,
    now: &(dyn Fn() -> Timestamp + Sync),
    stop: &AtomicBool,
    run: impl Fn(&Work) -> T + Sync,
    lost: impl Fn(&Work) -> T + Sync,
) -> Vec<Option<T>> {
    let planned_at = now();
    let next = AtomicUsize::new(0);
    let done: Vec<Mutex<Option<T>>> = works.iter().map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        for _ in 0..at_once.clamp(1, works.len().max(1)) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let (Some(work), Some(place)) = (works.get(at), done.get(at)) else {
                        return;
                    };
                    if !its_time_comes(work, planned_at, now, stop) {
                        continue;
                    }
                    // Nothing of it is used again: sessions and captures are closed as it unwinds.
                    let ended = catch_unwind(AssertUnwindSafe(|| run(work)));
                    let ended = ended.unwrap_or_else(|_| lost(work));
                    *place.lock().unwrap_or_else(PoisonError::into_inner) = Some(ended);
                }
            });
        }
    });
    done.into_iter()
        .map(|place| place.into_inner().unwrap_or_else(PoisonError::into_inner))
        .collect()
}

/// Waits for it; `false` if it is not to begin any more.
fn its_time_comes(
    work: &Work,
    planned_at: Timestamp,
    now: &(dyn Fn() -> Timestamp + Sync),
    stop: &AtomicBool,
) -> bool {
    loop {
        let now = now();
        // Of what is not due nothing is left, however late it is.
        let is_too_late = work.is_due() && work.until.is_some_and(|until| now >= until);
        if stop.load(Ordering::Relaxed) || is_too_late {
            return false;
        }
        // By a clock that was set back its time would not come for as long.
        let is_set_back = now < planned_at;
        if is_set_back || work.starts_at.is_none_or(|starts_at| now >= starts_at) {
            return true;
        }
        std::thread::sleep(NOTICE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::SignedDuration;
    use jiff::civil::date;

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    const HOUR: SignedDuration = SignedDuration::from_hours(1);

    fn work(name: &str, nights_since_full: u8, last_taken: &str) -> Work {
        let night = date(2026, 11, 8);
        let due = match nights_since_full {
            6.. => Due {
                what: What::Full,
                reason: DueReason::FullDay {
                    night,
                    since: night,
                },
            },
            _ => Due {
                what: What::Incremental,
                reason: DueReason::Tonight { night },
            },
        };
        let window = (at("2026-11-08T22:00:00Z"), at("2026-11-09T06:00:00Z"));
        Work {
            customer: 0,
            vm: VmName::new(name).expect("a name"),
            due,
            starts_at: None,
            until: Some(window.1),
            window,
            last_taken: Some(at(last_taken)),
            nights_since_full: Some(nights_since_full),
            full_bytes: 10 << 30,
            incremental_bytes: 1 << 30,
        }
    }

    fn names(works: &[Work]) -> Vec<&str> {
        works.iter().map(|work| work.vm.as_str()).collect()
    }

    const YESTERDAY: &str = "2026-11-07T22:10:00Z";

    #[test]
    fn a_heavy_night_to_come_gives_some_of_its_fulls_to_tonight() {
        let mut works: Vec<Work> = (0..7)
            .map(|number| work(&format!("vm{number}"), 3, YESTERDAY))
            .collect();
        arrange(&mut works, at("2026-11-08T22:00:00Z"), false);
        let early: Vec<_> = works
            .iter()
            .filter(|work| work.due.what == What::Full)
            .map(|work| work.due.reason)
            .collect();
        let night = date(2026, 11, 8);
        assert_eq!(early, [DueReason::Early { night }]);
    }

    #[test]
    fn what_a_night_cannot_hold_is_put_off_to_the_next_but_no_further() {
        let mut works = vec![work("one", 6, YESTERDAY), work("two", 6, YESTERDAY)];
        arrange(&mut works, at("2026-11-08T22:00:00Z"), false);
        let night = date(2026, 11, 8);
        let since = night;
        assert_eq!(works[0].due.what, What::Full);
        assert_eq!(works[1].due.reason, DueReason::PutOff { night, since });
        assert_eq!(works[1].due.what, What::Incremental);
        let mut works = vec![work("one", 7, YESTERDAY), work("two", 7, YESTERDAY)];
        arrange(&mut works, at("2026-11-08T22:00:00Z"), false);
        assert!(works.iter().all(|work| work.due.what == What::Full));
    }

    #[test]
    fn a_vm_that_has_its_point_is_not_asked_to_be_full() {
        let mut works: Vec<Work> = (0..7)
            .map(|number| work(&format!("vm{number}"), 3, YESTERDAY))
            .collect();
        for work in &mut works {
            work.due = Due {
                what: What::Nothing,
                reason: DueReason::HasPoint {
                    night: date(2026, 11, 8),
                },
            };
        }
        arrange(&mut works, at("2026-11-08T23:00:00Z"), false);
        assert!(works.iter().all(|work| !work.is_due()));
    }

    #[test]
    fn whose_newest_point_is_the_oldest_comes_first_then_the_largest() {
        let mut works = vec![
            work("small", 3, YESTERDAY),
            work("full", 6, YESTERDAY),
            work("left-over", 3, "2026-11-06T22:10:00Z"),
            work("new", 3, YESTERDAY),
        ];
        works[3].last_taken = None;
        arrange(&mut works, at("2026-11-08T22:00:00Z"), false);
        assert_eq!(names(&works), ["new", "left-over", "full", "small"]);
        assert!(works.iter().all(|work| work.starts_at.is_none()));
    }

    #[test]
    fn spread_work_begins_over_what_is_left_of_the_window() {
        let mut works = vec![work("one", 3, YESTERDAY), work("two", 4, YESTERDAY)];
        arrange(&mut works, at("2026-11-09T02:00:00Z"), true);
        let starts: Vec<_> = works.iter().map(|work| work.starts_at).collect();
        let wanted = ["2026-11-09T02:00:00Z", "2026-11-09T03:52:30Z"];
        assert_eq!(starts, wanted.map(|text| Some(at(text))));
        // Two gigabytes in fifteen sixteenths of what is left.
        assert_eq!(
            spread_rate(&works),
            Some(SpreadRate {
                bytes_per_second: LEAST_RATE,
                until: at("2026-11-09T05:45:00Z"),
            })
        );
        for work in &mut works {
            work.incremental_bytes *= 1000;
        }
        let rate = spread_rate(&works).expect("it is spread").bytes_per_second;
        assert_eq!(rate, (2000_u64 << 30) / (15 * 900));
        // Outside of the window everything that was missed is done at once.
        for work in &mut works {
            work.until = None;
            work.starts_at = None;
        }
        arrange(&mut works, at("2026-11-09T09:00:00Z"), true);
        assert!(works.iter().all(|work| work.starts_at.is_none()));
        assert_eq!(spread_rate(&works), None);
    }

    #[test]
    fn nothing_due_begins_after_the_windows_end_and_only_that_is_left() {
        let mut works: Vec<Work> = (0..5)
            .map(|number| work(&format!("vm{number}"), 3, YESTERDAY))
            .collect();
        works[4].due.what = What::Nothing;
        let clock = Mutex::new(at("2026-11-09T03:00:00Z"));
        let now = || *clock.lock().expect("not poisoned");
        let stop = AtomicBool::new(false);
        // Each takes two hours.
        let done = carry_out(
            &works,
            1,
            &now,
            &stop,
            |work| {
                *clock.lock().expect("not poisoned") += HOUR * 2;
                work.vm.clone()
            },
            |work| work.vm.clone(),
        );
        let done: Vec<bool> = done.iter().map(Option::is_some).collect();
        assert_eq!(done, [true, true, false, false, true]);
    }

    #[test]
    fn a_stop_lets_nothing_begin_any_more() {
        let mut works = vec![work("one", 3, YESTERDAY), work("two", 3, YESTERDAY)];
        works[1].starts_at = Some(at("2026-11-09T05:00:00Z"));
        let stop = AtomicBool::new(false);
        let now = || at("2026-11-08T23:00:00Z");
        let stopping = |_: &Work| stop.store(true, Ordering::Relaxed);
        let done = carry_out(&works, 1, &now, &stop, stopping, |_| ());
        assert_eq!(done, [Some(()), None]);
    }

    #[test]
    fn so_many_work_at_once_and_no_more() {
        let works: Vec<Work> = (0..9)
            .map(|number| work(&format!("vm{number}"), 3, YESTERDAY))
            .collect();
        let stop = AtomicBool::new(false);
        let now = || at("2026-11-08T23:00:00Z");
        let (running, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let together = std::sync::Barrier::new(3);
        carry_out(
            &works,
            3,
            &now,
            &stop,
            |_| {
                let so_many = running.fetch_add(1, Ordering::SeqCst) + 1;
                most.fetch_max(so_many, Ordering::SeqCst);
                // Hangs if fewer ever ran at once.
                together.wait();
                running.fetch_sub(1, Ordering::SeqCst);
            },
            |_| (),
        );
        assert_eq!(most.into_inner(), 3);
    }

    #[test]
    fn one_that_breaks_down_stops_no_other() {
        let works: Vec<Work> = (0..3)
            .map(|number| work(&format!("vm{number}"), 3, YESTERDAY))
            .collect();
        let stop = AtomicBool::new(false);
        let now = || at("2026-11-08T23:00:00Z");
        let run = |work: &Work| match work.vm.as_str() {
            "vm1" => panic!("on purpose"),
            _ => "done",
        };
        let done = carry_out(&works, 1, &now, &stop, run, |_| "lost");
        assert_eq!(done, [Some("done"), Some("lost"), Some("done")]);
    }

    #[test]
    fn a_clock_that_is_set_back_holds_nothing_up() {
        let mut works = vec![work("one", 3, YESTERDAY)];
        works[0].starts_at = Some(at("2026-11-11T23:00:00Z"));
        let readings = Mutex::new(vec![at("2026-11-08T22:00:00Z"), at("2026-11-11T22:30:00Z")]);
        let now = || {
            let mut readings = readings.lock().expect("not poisoned");
            readings.pop().unwrap_or(at("2026-11-08T22:00:00Z"))
        };
        let stop = AtomicBool::new(false);
        works[0].until = None;
        let done = carry_out(&works, 1, &now, &stop, |_| (), |_| ());
        assert_eq!(done, [Some(())]);
    }
}
