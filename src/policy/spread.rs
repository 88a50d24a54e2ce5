//! How the work of one host is spread: the weekly fulls over the nights, the VMs of a night over its window.
//!
//! *Absent:* which VM is due (`schedule`), and doing it. Weights are whatever the caller estimates, the same for all.

use jiff::{SignedDuration, Timestamp};
use std::cmp::Reverse;

/// A full is taken so many nights after the last, so that a night that fails breaks no promise.
pub const FULL_AFTER_NIGHTS: u8 = 6;
/// A full is promised so many nights after the last.
pub const FULL_WITHIN_NIGHTS: u8 = 7;
/// What is late by then waits for no other.
const OVERDUE_NIGHTS: u8 = 14;

/// The next full of a VM without a given weekday.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextFull {
    /// Nights from the last good full to tonight; 0: tonight has it.
    pub age_nights: u8,
    /// What it costs, in the unit of all others.
    pub weight: u64,
    pub tonight: Tonight,
}

/// What can be said of a full and this night before its load is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tonight {
    /// It has been taken, or is taken in any case.
    Full,
    /// There will be a point, full or incremental.
    Open,
    /// There is a point already, and it is no full.
    Closed,
}

/// Which fulls that are open are taken tonight, by their place in `fulls`.
///
/// A night has its share, a sixth of all, and holds a fifth more. What can only be in time tonight is always taken. Then
/// comes what is late, the oldest first, as far as the night holds it: nights that failed in a row are made up for in
/// several, so that none of these is too short for all its VMs. Then what is six nights old, as far as there is room;
/// what is left comes tomorrow. At last what must come early because the nights until its time cannot hold all that is
/// due in them, which is how fulls that began in one night find nights of their own.
///
/// `turn` is a number that grows by one each night.
pub fn fulls_tonight(fulls: &[NextFull], turn: usize) -> Vec<usize> {
    Night::new(fulls).taken(turn)
}

struct Night<'a> {
    fulls: &'a [NextFull],
    share: u128,
    /// Six fifths of a share.
    holds: u128,
    heaviest: u128,
    load: u128,
    is_taken: Vec<bool>,
}

impl<'a> Night<'a> {
    fn new(fulls: &'a [NextFull]) -> Self {
        let weights = || fulls.iter().map(|full| u128::from(full.weight));
        let share = weights()
            .sum::<u128>()
            .div_ceil(u128::from(FULL_AFTER_NIGHTS));
        let certain = fulls.iter().filter(|full| full.tonight == Tonight::Full);
        Night {
            fulls,
            share,
            holds: share * 6 / 5,
            heaviest: weights().max().unwrap_or(0),
            load: certain.map(|full| u128::from(full.weight)).sum(),
            is_taken: vec![false; fulls.len()],
        }
    }

    fn taken(mut self, turn: usize) -> Vec<usize> {
        self.take_overdue(turn);
        for at in self.open(|age| age == FULL_WITHIN_NIGHTS) {
            self.take(at);
        }
        let late = self.open(|age| (FULL_WITHIN_NIGHTS + 1..OVERDUE_NIGHTS).contains(&age));
        self.fill(late, self.holds.max(self.heaviest));
        let is_planned = |age| age == FULL_AFTER_NIGHTS;
        self.fill(self.open(is_planned), self.holds);
        // What is left exceeds that, the smallest by the least. A third of a share unused would be worse: what is
        // put off is late if the next night fails.
        for at in self.open(is_planned).into_iter().rev() {
            if self.load * 3 < self.share * 2 {
                self.take(at);
            }
        }
        for nights in 1..FULL_WITHIN_NIGHTS {
            self.make_room_until(nights);
        }
        let taken = self.is_taken.iter().enumerate();
        taken
            .filter(|(_, is_taken)| **is_taken)
            .map(|(at, _)| at)
            .collect()
    }

    /// Perhaps they fail each night: they wait for no other, and no other for them. Where there are more of them than
    /// a night holds, the host was away, and the small ones come first; but each has its turn to be the first of all,
    /// or those that fail each night would keep a larger one off for ever.
    fn take_overdue(&mut self, turn: usize) {
        let before = std::mem::take(&mut self.load);
        let mut overdue = self.open(|age| age >= OVERDUE_NIGHTS);
        overdue.sort_by_key(|at| self.weight(*at));
        if let Some(turn) = turn.checked_rem(overdue.len()) {
            let first = overdue.remove(turn);
            overdue.insert(0, first);
        }
        self.fill(overdue, self.holds);
        self.load = before;
    }

    fn is_taken(&self, at: usize) -> bool {
        self.is_taken.get(at).copied().unwrap_or(false)
    }

    fn weight(&self, at: usize) -> u128 {
        self.fulls.get(at).map_or(0, |full| u128::from(full.weight))
    }

    /// The oldest first, of equals the largest.
    fn open(&self, is_asked: impl Fn(u8) -> bool) -> Vec<usize> {
        let mut open: Vec<_> = (self.fulls.iter().enumerate())
            .filter(|(at, full)| {
                full.tonight == Tonight::Open && is_asked(full.age_nights) && !self.is_taken(*at)
            })
            .map(|(at, full)| (Reverse(full.age_nights), Reverse(full.weight), at))
            .collect();
        open.sort_unstable();
        open.into_iter().map(|(.., at)| at).collect()
    }

    /// A night that has none takes one, however large.
    fn fill(&mut self, open: Vec<usize>, up_to: u128) {
        for at in open {
            if self.load == 0 || self.load + self.weight(at) <= up_to {
                self.take(at);
            }
        }
    }

    fn take(&mut self, at: usize) {
        self.load += self.weight(at);
        if let Some(is_taken) = self.is_taken.get_mut(at) {
            *is_taken = true;
        }
    }

    /// Takes early what so many nights from now on cannot hold.
    fn make_room_until(&mut self, nights: u8) {
        let holds = self.holds.max(self.heaviest);
        loop {
            let is_due =
                |age: u8| age < OVERDUE_NIGHTS && FULL_WITHIN_NIGHTS.saturating_sub(age) <= nights;
            let due: u128 = (self.fulls.iter().enumerate())
                .filter(|(at, full)| {
                    full.tonight != Tonight::Full && is_due(full.age_nights) && !self.is_taken(*at)
                })
                .map(|(_, full)| u128::from(full.weight))
                .sum();
            let Some(excess) = due.checked_sub(holds * u128::from(nights) + 1) else {
                return;
            };
            // The smallest that is enough, else the largest.
            let candidates = self.open(is_due).into_iter();
            let best = candidates
                .filter(|at| self.load + self.weight(*at) <= holds && self.weight(*at) > 0)
                .min_by_key(|at| {
                    let weight = self.weight(*at);
                    match weight > excess {
                        true => (0, weight),
                        false => (1, u128::MAX - weight),
                    }
                });
            let Some(at) = best else {
                return;
            };
            self.take(at);
        }
    }
}

/// The last sixteenth of a window is left free, for what takes longer than was thought.
pub fn spread_until(from: Timestamp, to: Timestamp) -> Timestamp {
    let whole = to.duration_since(from);
    from.saturating_add(whole / 16 * 15).unwrap_or(to)
}

/// When the work of a night begins, one by one in the order given: each after a share of the window as large as the
/// share of what comes before it, up to [`spread_until`].
pub fn start_times((from, to): (Timestamp, Timestamp), weights: &[u64]) -> Vec<Timestamp> {
    let span = spread_until(from, to).duration_since(from);
    let span_seconds = i128::from(span.as_secs().max(0));
    let total = weights
        .iter()
        .map(|weight| i128::from(*weight))
        .sum::<i128>();
    let mut before = 0_i128;
    weights
        .iter()
        .map(|weight| {
            let offset = match total {
                0 => 0,
                total => span_seconds * before / total,
            };
            before += i128::from(*weight);
            let offset = SignedDuration::from_secs(i64::try_from(offset).unwrap_or(0));
            from.saturating_add(offset).unwrap_or(from)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A host's nights, of which some are lost.
    struct Year {
        /// What each night had.
        loads: Vec<u64>,
        /// How many came before they were six nights old.
        early: Vec<usize>,
        /// The oldest of each night that was taken in it.
        oldest: Vec<u8>,
    }

    fn year(weights: &[u64], nights: usize, is_lost: impl Fn(usize) -> bool) -> Year {
        // All began in one night, the last.
        let mut ages = vec![1_u8; weights.len()];
        let mut year = Year {
            loads: Vec::new(),
            early: Vec::new(),
            oldest: Vec::new(),
        };
        for night in 0..nights {
            let fulls: Vec<NextFull> = (weights.iter().zip(&ages))
                .map(|(weight, age_nights)| full(*age_nights, *weight))
                .collect();
            let taken = match is_lost(night) {
                true => Vec::new(),
                false => fulls_tonight(&fulls),
            };
            let before = || taken.iter().map(|at| ages[*at]);
            year.loads.push(taken.iter().map(|at| weights[*at]).sum());
            year.early
                .push(before().filter(|age| *age < FULL_AFTER_NIGHTS).count());
            year.oldest.push(before().max().unwrap_or(0));
            for (at, age) in ages.iter_mut().enumerate() {
                *age = if taken.contains(&at) { 1 } else { *age + 1 };
            }
        }
        year
    }

    /// Without a turn the smallest is the first.
    fn fulls_tonight(fulls: &[NextFull]) -> Vec<usize> {
        super::fulls_tonight(fulls, 0)
    }

    fn full(age_nights: u8, weight: u64) -> NextFull {
        NextFull {
            age_nights,
            weight,
            tonight: Tonight::Open,
        }
    }

    #[test]
    fn fifty_vms_that_began_in_one_night_are_level_after_two_weeks_and_never_over_a_week_old() {
        let year = year(&[1; 50], 60, |_| false);
        assert!(year.oldest.iter().all(|age| *age <= FULL_WITHIN_NIGHTS));
        let settled = &year.loads[14..];
        assert!(settled.iter().all(|load| *load <= 10), "{settled:?}");
        assert_eq!(year.early[14..].iter().sum::<usize>(), 0);
    }

    #[test]
    fn a_night_that_fails_makes_no_full_late_and_no_other_night_heavy() {
        let year = year(&[1; 50], 200, |night| night > 20 && night % 25 == 0);
        assert!(year.oldest.iter().all(|age| *age <= FULL_WITHIN_NIGHTS));
        assert!(
            year.loads[14..].iter().all(|load| *load <= 10),
            "{:?}",
            year.loads
        );
    }

    #[test]
    fn two_nights_that_fail_are_made_up_for_in_several() {
        let year = year(&[1; 50], 60, |night| [30, 31].contains(&night));
        let after = &year.loads[32..];
        assert!(after.iter().all(|load| *load <= 10), "{after:?}");
        assert!(year.oldest.iter().all(|age| *age <= OVERDUE_NIGHTS));
        let settled = &year.oldest[45..];
        assert!(settled.iter().all(|age| *age <= FULL_WITHIN_NIGHTS));
    }

    #[test]
    fn one_that_fails_every_night_makes_no_other_late() {
        let mut ages = [6_u8; 50];
        // The first is as large as all others together.
        let weight = |at: usize| if at == 0 { 50 } else { 1 };
        for night in 0..60 {
            let fulls: Vec<NextFull> = (ages.iter().enumerate())
                .map(|(at, age)| full(*age, weight(at)))
                .collect();
            let taken = fulls_tonight(&fulls);
            assert!(night < 8 || taken.contains(&0));
            for (at, age) in ages.iter_mut().enumerate() {
                let is_done = taken.contains(&at) && at != 0;
                assert!(!is_done || *age <= FULL_WITHIN_NIGHTS, "night {night}");
                *age = if is_done { 1 } else { *age + 1 };
            }
        }
    }

    #[test]
    fn a_host_that_was_away_for_weeks_spreads_what_it_owes() {
        let mut ages = [30_u8; 50];
        for _ in 0..8 {
            let fulls: Vec<NextFull> = ages.iter().map(|age| full(*age, 1)).collect();
            let taken = fulls_tonight(&fulls);
            assert!(taken.len() <= 10, "{}", taken.len());
            for (at, age) in ages.iter_mut().enumerate() {
                *age = if taken.contains(&at) { 1 } else { *age + 1 };
            }
        }
        assert!(
            ages.iter().all(|age| *age <= FULL_AFTER_NIGHTS + 2),
            "{ages:?}"
        );
    }

    #[test]
    fn two_vms_take_their_fulls_in_different_nights() {
        let year = year(&[5, 5], 30, |_| false);
        assert_eq!(year.loads.iter().max(), Some(&5), "{:?}", year.loads);
    }

    #[test]
    fn one_vm_has_its_full_every_six_nights() {
        let year = year(&[9], 60, |_| false);
        assert_eq!(year.loads.iter().filter(|load| **load > 0).count(), 10);
        assert_eq!(year.early.iter().sum::<usize>(), 0);
    }

    #[test]
    fn what_has_its_point_already_is_left_and_what_was_taken_fills_the_night() {
        let closed = NextFull {
            tonight: Tonight::Closed,
            ..full(7, 5)
        };
        let done = NextFull {
            tonight: Tonight::Full,
            ..full(0, 5)
        };
        assert_eq!(fulls_tonight(&[closed, full(6, 1)]), [1]);
        assert_eq!(fulls_tonight(&[done, full(6, 5)]), [] as [usize; 0]);
        // It is promised for tonight.
        assert_eq!(fulls_tonight(&[done, full(7, 5)]), [1]);
    }

    #[test]
    fn what_is_in_time_only_tonight_comes_before_what_is_late() {
        let weights = [8, 7, 6, 5].map(|age| full(age, 10));
        assert_eq!(fulls_tonight(&weights), [1]);
        let weights = [8, 10, 6, 5].map(|age| full(age, 10));
        assert_eq!(fulls_tonight(&weights), [1]);
    }

    #[test]
    fn what_is_six_nights_old_has_the_room_of_a_night_and_what_is_late_that_of_the_largest() {
        let fulls = |age| [full(1, 100), full(age, 20), full(age, 20)];
        assert_eq!(fulls_tonight(&fulls(6)), [1]);
        assert_eq!(fulls_tonight(&fulls(8)), [1, 2]);
    }

    #[test]
    fn what_exceeds_a_night_is_taken_where_more_than_a_third_of_a_share_would_be_left() {
        // A share is 45.
        for (has, taken) in [(29, vec![1]), (30, vec![])] {
            let done = NextFull {
                tonight: Tonight::Full,
                ..full(0, has)
            };
            let mut fulls = vec![done, full(6, 60)];
            fulls.extend([full(1, 18); 10]);
            assert_eq!(fulls_tonight(&fulls), taken);
        }
    }

    /// What is taken tonight of so many that are five nights old, where a night holds 60: for these and the next
    /// there are two nights.
    fn early(weights: &[u64]) -> Vec<usize> {
        let mut fulls: Vec<NextFull> = weights.iter().map(|weight| full(5, *weight)).collect();
        let rest = 300 - weights.iter().sum::<u64>();
        fulls.extend((0..rest).map(|_| full(1, 1)));
        fulls_tonight(&fulls)
    }

    #[test]
    fn early_comes_what_the_nights_cannot_hold_and_no_more() {
        assert_eq!(early(&[30, 30, 30, 30]), [] as [usize; 0]);
        assert_eq!(early(&[30, 30, 30, 30, 1]), [4]);
        // The smallest that is enough, else the largest.
        assert_eq!(early(&[41, 30, 50, 19]), [1]);
        assert_eq!(early(&[10, 25, 25, 25, 25, 25, 25]), [1, 2]);
    }

    #[test]
    fn nothing_comes_early_that_makes_no_room() {
        let done = NextFull {
            tonight: Tonight::Full,
            ..full(0, 60)
        };
        let mut fulls = vec![done, full(5, 0)];
        fulls.extend([full(5, 30); 5]);
        fulls.extend([full(1, 10); 9]);
        assert_eq!(fulls_tonight(&fulls), [] as [usize; 0]);
    }

    #[test]
    fn of_what_is_overdue_a_night_takes_as_much_as_it_holds() {
        let mut fulls = vec![full(OVERDUE_NIGHTS, 50); 3];
        fulls.extend([full(1, 10); 15]);
        assert_eq!(fulls_tonight(&fulls), [0]);
    }

    #[test]
    fn an_overdue_full_that_fails_every_night_starves_no_other_whatever_their_sizes() {
        for weights in [[1, 10], [10, 1], [3, 2], [5, 5]] {
            let mut fulls = weights.map(|weight| full(u8::MAX, weight)).to_vec();
            fulls.extend([full(1, 1); 9]);
            for at in 0..2 {
                let is_taken = |turn| super::fulls_tonight(&fulls, turn).contains(&at);
                assert!(is_taken(7) || is_taken(8), "{at} of {weights:?}");
            }
        }
    }

    #[test]
    fn a_night_begins_with_its_first_and_leaves_the_end_free() {
        let at = |text: &str| text.parse::<Timestamp>().expect("a time");
        let window = (at("2026-11-08T22:00:00Z"), at("2026-11-09T06:00:00Z"));
        let starts = start_times(window, &[8, 4, 3]);
        let wanted = [
            "2026-11-08T22:00:00Z",
            "2026-11-09T02:00:00Z",
            "2026-11-09T04:00:00Z",
        ];
        assert_eq!(starts, wanted.map(at));
        assert_eq!(start_times(window, &[0, 0]), [window.0; 2]);
        assert_eq!(start_times((window.1, window.0), &[1, 1]), [window.1; 2]);
    }

    proptest! {
        #[test]
        fn nights_become_level_and_no_full_is_ever_late(
            weights in prop::collection::vec(1_u64..1000, 1..60),
        ) {
            let year = year(&weights, 90, |_| false);
            prop_assert!(year.oldest.iter().all(|age| *age <= FULL_WITHIN_NIGHTS));
            let share = weights.iter().sum::<u64>().div_ceil(u64::from(FULL_AFTER_NIGHTS));
            let heaviest = *weights.iter().max().expect("one");
            let most = *year.loads[28..].iter().max().expect("nights");
            prop_assert!(most <= (share * 6 / 5).max(share + heaviest), "{:?}", year.loads);
            prop_assert_eq!(year.early[28..].iter().sum::<usize>(), 0, "{:?}", year.early);
        }

        #[test]
        fn no_night_that_fails_alone_makes_a_full_late(
            weights in prop::collection::vec(300_u64..1000, 30..60),
            first in 21_usize..42,
            apart in 21_usize..60,
        ) {
            let year = year(&weights, 120, |night| night >= first && (night - first) % apart == 0);
            prop_assert!(year.oldest.iter().all(|age| *age <= FULL_WITHIN_NIGHTS), "{:?}", year.oldest);
        }

        #[test]
        fn work_begins_in_its_window_in_order(weights in prop::collection::vec(0_u64..u64::MAX, 0..40)) {
            let from: Timestamp = "2026-11-08T22:00:00Z".parse().expect("a time");
            let to = from + SignedDuration::from_hours(8);
            let starts = start_times((from, to), &weights);
            prop_assert_eq!(starts.len(), weights.len());
            prop_assert!(starts.is_sorted());
            prop_assert!(starts.iter().all(|at| (from..=from + SignedDuration::from_mins(450)).contains(at)));
        }
    }
}
