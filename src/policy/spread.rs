//! How the work of one host is spread: the weekly fulls over the nights, the VMs of a night over its window.
//!
//! *Absent:* which VM is due (`schedule`), and doing it. Weights are whatever the caller estimates, the same for all.

use jiff::{SignedDuration, Timestamp};
use std::cmp::Reverse;

/// Nights from one full to the next.
pub const FULL_EVERY_NIGHTS: u8 = 7;

/// The next full of a VM whose full day is "auto".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NextFull {
    /// 0: it is due tonight, in any case.
    pub in_nights: u8,
    /// What it costs, in the unit of all others.
    pub weight: u64,
    /// It can be taken tonight.
    pub may_move: bool,
}

/// Which fulls are taken tonight although their time comes later, by their place in `fulls`: those that a heavier
/// night of the coming week can spare, until tonight has its share. Each move makes the sum of the squares of the
/// nights' loads smaller, so after some weeks, mostly two, nothing moves any more, and every full comes seven nights
/// after the last. What moves has to gain a quarter of its own weight, so that sizes that change a little move nothing.
pub fn early_fulls(fulls: &[NextFull]) -> Vec<usize> {
    let mut load = [0_u128; FULL_EVERY_NIGHTS as usize];
    let nights = load.len() as u128;
    for full in fulls {
        if let Some(night) = load.get_mut(usize::from(full.in_nights)) {
            *night += u128::from(full.weight);
        }
    }
    let total: u128 = load.iter().sum();
    let [mut tonight, ..] = load;
    let mut early = Vec::new();
    loop {
        let heaviest = load.iter().skip(1).max().copied().unwrap_or(0);
        // A night that has gathered what others missed is taken apart at once, each of the nights before it taking a
        // little more than its share: the one before it may be missed as well.
        let share = match heaviest * nights * 4 > total * 5 {
            true => total * 9 / 8,
            false => total,
        };
        if tonight * nights >= share {
            break;
        }
        let candidates = fulls.iter().enumerate().filter_map(|(at, full)| {
            let night = usize::from(full.in_nights);
            let (load, weight) = (*load.get(night)?, u128::from(full.weight));
            let gains = tonight + weight + weight.div_ceil(4) <= load;
            let may_move =
                full.may_move && night > 0 && weight > 0 && gains && !early.contains(&at);
            // What fits into tonight's share comes first, the largest of it; else what exceeds it least.
            let fits = (tonight + weight) * nights <= share;
            let suits = if fits { weight } else { u128::MAX - weight };
            let has_room = fits || tonight * nights < total;
            (may_move && has_room).then_some((fits, load, suits, Reverse(at), weight, night))
        });
        let Some((_, _, _, Reverse(at), weight, night)) = candidates.max() else {
            break;
        };
        tonight += weight;
        if let Some(load) = load.get_mut(night) {
            *load -= weight;
        }
        early.push(at);
    }
    early.sort_unstable();
    early
}

/// The last eighth of a window is left free, for what takes longer than was thought.
pub fn spread_until(from: Timestamp, to: Timestamp) -> Timestamp {
    let whole = to.duration_since(from);
    from.saturating_add(whole / 8 * 7).unwrap_or(to)
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

    /// So many weeks of nights; what each of the last week's nights had, and how many fulls came early in it.
    fn weeks(weights: &[u64], weeks: usize) -> (Vec<u64>, usize) {
        let mut fulls: Vec<NextFull> = weights
            .iter()
            .map(|weight| NextFull {
                in_nights: 0,
                weight: *weight,
                may_move: true,
            })
            .collect();
        let mut nights = Vec::new();
        let mut early = Vec::new();
        for _ in 0..weeks * 7 {
            let moved = early_fulls(&fulls);
            let mut load = 0;
            for (at, full) in fulls.iter_mut().enumerate() {
                let taken = full.in_nights == 0 || moved.contains(&at);
                load += if taken { full.weight } else { 0 };
                full.in_nights = if taken { 6 } else { full.in_nights - 1 };
            }
            nights.push(load);
            early.push(moved.len());
        }
        let last = nights.len() - 7;
        (nights.split_off(last), early[last..].iter().sum())
    }

    #[test]
    fn fifty_vms_that_began_in_one_night_are_level_after_two_weeks_and_stay_so() {
        let (nights, early) = weeks(&[1; 50], 3);
        assert_eq!(nights.iter().sum::<u64>(), 50);
        assert!(
            nights.iter().all(|load| (7..=8).contains(load)),
            "{nights:?}"
        );
        assert_eq!(early, 0);
    }

    /// Of thousands of hosts the one that moved longest.
    #[test]
    fn a_host_that_moves_for_six_weeks_stands_still_then() {
        let weights = [
            382, 484, 105, 513, 5, 396, 418, 671, 339, 999, 570, 784, 923, 647, 614, 958, 299, 411,
            88, 114, 954, 972, 94, 931, 406, 976, 513, 438, 211, 265, 968, 511, 79, 32, 317, 10,
            616, 429, 684, 12, 916, 182, 88, 273, 37, 295, 788, 962, 749, 750, 593,
        ];
        assert!(weeks(&weights, 6).1 > 0);
        assert_eq!(weeks(&weights, 7).1, 0);
    }

    #[test]
    fn two_vms_take_their_fulls_in_different_nights() {
        let (nights, _) = weeks(&[5, 5], 3);
        assert_eq!(nights.iter().max(), Some(&5), "{nights:?}");
    }

    #[test]
    fn one_vm_never_comes_early() {
        assert_eq!(
            early_fulls(&[NextFull {
                in_nights: 6,
                weight: 9,
                may_move: true
            }]),
            [] as [usize; 0]
        );
        assert_eq!(weeks(&[9], 2).1, 0);
    }

    #[test]
    fn what_fits_into_tonights_share_comes_first_and_then_what_exceeds_it_least() {
        let full = |in_nights, weight| NextFull {
            in_nights,
            weight,
            may_move: true,
        };
        let fulls = [full(3, 4), full(5, 10), full(5, 6), full(5, 2)];
        // A seventh is 3: the 2 fits, and of the 16 that are left of the fifth night the 6 may come.
        assert_eq!(early_fulls(&fulls), [2, 3]);
    }

    #[test]
    fn a_night_begins_with_its_first_and_leaves_the_end_free() {
        let at = |text: &str| text.parse::<Timestamp>().expect("a time");
        let window = (at("2026-11-08T22:00:00Z"), at("2026-11-09T06:00:00Z"));
        let starts = start_times(window, &[4, 2, 1]);
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
        fn moving_ends_and_never_makes_the_heaviest_night_heavier(
            weights in prop::collection::vec(1_u64..1000, 1..60),
        ) {
            let (first, _) = weeks(&weights, 1);
            let (nights, early) = weeks(&weights, 12);
            prop_assert_eq!(early, 0);
            prop_assert_eq!(nights.iter().sum::<u64>(), weights.iter().sum::<u64>());
            prop_assert!(nights.iter().max() <= first.iter().max());
            // Nothing that would gain by it is left where it is.
            let mean = weights.iter().sum::<u64>() as f64 / 7.0;
            let heaviest = *weights.iter().max().expect("one") as f64;
            let most = *nights.iter().max().expect("seven") as f64;
            prop_assert!(most <= mean + heaviest * 1.25 + 1.0, "{:?}", nights);
        }

        #[test]
        fn work_begins_in_its_window_in_order(weights in prop::collection::vec(0_u64..u64::MAX, 0..40)) {
            let from: Timestamp = "2026-11-08T22:00:00Z".parse().expect("a time");
            let to = from + SignedDuration::from_hours(8);
            let starts = start_times((from, to), &weights);
            prop_assert_eq!(starts.len(), weights.len());
            prop_assert!(starts.is_sorted());
            prop_assert!(starts.iter().all(|at| (from..=from + SignedDuration::from_hours(7)).contains(at)));
        }
    }
}
