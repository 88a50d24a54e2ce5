//! Years of nights against the promises: random policies, zones, missed and late backups, suspect and held points,
//! and a prune once a night at any time of its window. What is checked is what is signed, not how it is decided.

use std::collections::{BTreeMap, BTreeSet};

use jiff::civil::{Date, date};
use jiff::{SignedDuration, Timestamp};
use proptest::prelude::*;

use crate::model::{PointId, PointKind, PointState, VmName};

use super::night::{days_after, start_of};
use super::*;

/// What may go wrong in a run of the simulation.
#[derive(Debug, Clone, Copy)]
struct Troubles {
    /// A prune may see a time of up to 48 hours ahead.
    clock_jumps: bool,
    /// A night in twenty the host does not prune.
    skipped_prunes: bool,
}

struct Simulation {
    policy: Policy,
    troubles: Troubles,
    random: u64,
    points: Vec<PointFacts>,
    next_point: u64,
    /// The truth: which nights of which VM were backed up, and the first.
    backed_up: BTreeSet<(VmName, Date)>,
    first: BTreeMap<VmName, Timestamp>,
    chosen: BTreeMap<(VmName, IsoWeek), PointFacts>,
    /// What became of the points, so that a test can see that it tested something.
    thinned: usize,
    erased: usize,
}

impl Simulation {
    fn new(terms: &PolicyTerms, troubles: Troubles, seed: u64) -> Self {
        Simulation {
            policy: Policy::parse(terms).expect("a policy"),
            troubles,
            random: seed | 1,
            points: Vec::new(),
            next_point: 0,
            backed_up: BTreeSet::new(),
            first: BTreeMap::new(),
            chosen: BTreeMap::new(),
            thinned: 0,
            erased: 0,
        }
    }

    /// xorshift: a number below `bound`.
    fn below(&mut self, bound: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % bound
    }

    fn between(&mut self, from: Timestamp, to: Timestamp) -> Timestamp {
        let span = to.as_second().abs_diff(from.as_second()).max(1);
        let offset = i64::try_from(self.below(span)).expect("less than a day");
        Timestamp::from_second(from.as_second() + offset).expect("within the calendar")
    }

    fn night(&mut self, night: Date, vms: &[VmName]) {
        let (start, end) = window_of(night, &self.policy);
        let next = start_of(days_after(night, 1), &self.policy);
        let mut late = Vec::new();
        let mut backups = Vec::new();
        for vm in vms {
            match self.below(100) {
                0..4 => {}
                4..8 if end < next => late.push((self.between(end, next), vm)),
                _ => backups.push((self.between(start, end), vm)),
            }
        }
        let prune = self.between(start, end);
        let (before, after): (Vec<_>, Vec<_>) =
            backups.into_iter().partition(|(at, _)| *at < prune);
        before
            .into_iter()
            .for_each(|(at, vm)| self.back_up(vm, night, at));
        let skipped = self.troubles.skipped_prunes && self.below(20) == 0;
        if !skipped {
            self.prune(prune);
            self.check_window(vms, night, prune);
        }
        after
            .into_iter()
            .for_each(|(at, vm)| self.back_up(vm, night, at));
        late.into_iter()
            .for_each(|(at, vm)| self.back_up(vm, night, at));
        let last = next
            .saturating_sub(SignedDuration::from_secs(1))
            .expect("within the calendar");
        self.check_window(vms, night, last);
        for point in &self.points {
            assert!(point.deadline > last, "over the maximum: {point:?}");
        }
    }

    fn back_up(&mut self, vm: &VmName, night: Date, at: Timestamp) {
        let due = due(vm, &self.points, Tracking::Trusted, &self.policy, at, false);
        let kind = match due.what {
            What::Nothing => panic!("{vm} owes the night of {night}: {due:?}"),
            What::Full => PointKind::Full,
            What::Incremental => PointKind::Incremental,
        };
        let week = days_after(night, -6)..=night;
        let recent_full = self.points.iter().any(|point| {
            point.vm == *vm
                && point.kind == PointKind::Full
                && !point.suspect
                && week.contains(&night_of(point.taken_at, &self.policy))
        });
        assert!(
            kind == PointKind::Full || recent_full,
            "over a week without a full"
        );
        self.next_point += 1;
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.below(u64::MAX).to_be_bytes());
        id[8..].copy_from_slice(&self.next_point.to_be_bytes());
        let Expiry {
            expires_at,
            deadline,
        } = expiry(&self.policy, at);
        let (suspect, held) = (self.below(40) == 0, self.below(80) == 0);
        self.points.push(PointFacts {
            point: PointId::from_bytes(id),
            vm: vm.clone(),
            kind,
            taken_at: at,
            expires_at,
            deadline,
            state: PointState::Live,
            expired_at: None,
            clock_alone: false,
            witnessed_since: None,
            silence: SignedDuration::ZERO,
            suspect,
            void: false,
            held,
        });
        self.backed_up.insert((vm.clone(), night));
        self.first.entry(vm.clone()).or_insert(at);
    }

    fn prune(&mut self, at: Timestamp) {
        let ahead = match self.troubles.clock_jumps && self.below(5) == 0 {
            true => self.below(48 * 3600 + 1),
            false => 0,
        };
        let ahead = SignedDuration::from_secs(i64::try_from(ahead).expect("two days"));
        let now = at.saturating_add(ahead).expect("within the calendar");
        // A point may be expired and then erased in the same run; then nothing is left to do.
        for round in 0..3 {
            let decisions = plan(&self.points, &self.policy, now);
            assert_eq!(decisions, plan(&self.points, &self.policy, now));
            let changed = self.carry_out(&decisions, now);
            assert!(!changed || round < 2, "the plan does not come to rest");
            if !changed {
                self.check_weeks(&decisions, now);
                break;
            }
        }
        for point in &self.points {
            assert!(point.state != PointState::Live || point.expires_at > now);
        }
    }

    fn carry_out(&mut self, decisions: &[Decision], now: Timestamp) -> bool {
        let actions: BTreeMap<PointId, &Decision> = decisions
            .iter()
            .map(|decision| (decision.point, decision))
            .collect();
        let mut changed = false;
        for point in &mut self.points {
            let decision = actions[&point.point];
            match decision.action {
                Action::Keep | Action::AwaitErase { .. } => {}
                Action::Expire => {
                    assert_eq!(point.state, PointState::Live);
                    let thinned = matches!(
                        decision.reason,
                        Reason::ThinnedForWeek { .. } | Reason::LeftRestoreWindow { .. }
                    );
                    assert!(!(thinned && point.held));
                    self.thinned += usize::from(thinned);
                    point.state = PointState::Expired;
                    point.expired_at = Some(now);
                    changed = true;
                }
                Action::Erase => {
                    assert_eq!(point.state, PointState::Expired);
                    point.state = PointState::Erased;
                    self.erased += 1;
                    changed = true;
                }
            }
        }
        self.points
            .retain(|point| point.state != PointState::Erased);
        changed
    }

    /// One point a week, always the same one, until its time is over.
    fn check_weeks(&mut self, decisions: &[Decision], now: Timestamp) {
        if self.policy.keep_after_window() != KeepAfterWindow::Weekly {
            return;
        }
        let facts: BTreeMap<PointId, &PointFacts> = self
            .points
            .iter()
            .map(|point| (point.point, point))
            .collect();
        let mut seen = BTreeSet::new();
        for decision in decisions {
            if let Reason::KeptForWeek { week, .. } = decision.reason {
                let key = (decision.vm.clone(), week);
                assert!(seen.insert(key.clone()), "two points for {week}");
                let before = self
                    .chosen
                    .entry(key)
                    .or_insert_with(|| facts[&decision.point].clone());
                // Held points outlive the chosen one of their week only when its time is over.
                assert!(
                    before.point == decision.point
                        || before.expires_at <= now
                        || facts[&decision.point].held,
                    "the choice for {week} moved"
                );
            }
        }
        for chosen in self.chosen.values() {
            let live = facts
                .get(&chosen.point)
                .is_some_and(|point| point.state == PointState::Live);
            let slack = SignedDuration::from_hours(24);
            let over = now.saturating_add(slack).expect("within the calendar") >= chosen.expires_at
                || self.troubles.clock_jumps;
            assert!(live || over, "the point of a week is gone before its time");
        }
        let recent = now
            .saturating_sub(SignedDuration::from_hours(1000))
            .expect("within the calendar");
        self.chosen.retain(|_, chosen| chosen.expires_at > recent);
    }

    /// Each night of the restore window that was backed up can be restored, at `at`.
    fn check_window(&self, vms: &[VmName], night: Date, at: Timestamp) {
        for vm in vms {
            let mine: Vec<PointFacts> = self
                .points
                .iter()
                .filter(|point| point.vm == *vm)
                .cloned()
                .collect();
            let first = self.first.get(vm).copied();
            let promised = PromisedWindows::default();
            let found = coverage(&mine, &self.policy, at, first, &promised);
            let window =
                usize::try_from(self.policy.effective().restore_window_days).expect("small");
            assert_eq!(found.nights.len(), window + 1);
            for Night { date, state } in found.nights {
                let backed_up = self.backed_up.contains(&(vm.clone(), date));
                match state {
                    NightState::Covered | NightState::Suspect => assert!(backed_up),
                    NightState::Missing | NightState::NotYet | NightState::BeforeFirst => assert!(
                        !backed_up,
                        "{vm}: the night of {date} was backed up and is {state:?} in the night of {night}"
                    ),
                }
            }
        }
    }

    fn run(mut self, from: Date, nights: i64) {
        let vms = ["web01", "db01"].map(|name| VmName::new(name).expect("a name"));
        for offset in 0..nights {
            self.night(days_after(from, offset), &vms);
        }
        assert!(self.erased > 0);
        // Nobody backs up any more: all of it goes. What a clock that was ahead has taken early stays gone.
        let live: BTreeSet<PointId> = self
            .points
            .iter()
            .filter(|point| point.state == PointState::Live)
            .map(|point| point.point)
            .collect();
        self.chosen.retain(|_, chosen| live.contains(&chosen.point));
        self.troubles.clock_jumps = false;
        self.troubles.skipped_prunes = false;
        let rest = i64::from(self.policy.effective().max_retention_days) + 5;
        for offset in nights..nights + rest {
            let (start, end) = window_of(days_after(from, offset), &self.policy);
            let at = self.between(start, end);
            self.prune(at);
            for point in &self.points {
                assert!(point.deadline > end, "over the maximum: {point:?}");
            }
        }
        assert!(self.points.is_empty());
        if self.policy.keep_after_window() != KeepAfterWindow::All
            && self.policy.effective().listed_days() > 30
        {
            assert!(self.thinned > 0);
        }
    }
}

fn zones() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        Just("Europe/Amsterdam"),
        Just("America/New_York"),
        Just("Australia/Lord_Howe"),
        Just("Asia/Kolkata"),
        Just("UTC"),
    ]
}

fn windows() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        3 => Just("22:00-06:00"),
        // Around the hours that are skipped or come twice.
        1 => Just("01:45-05:00"),
        1 => Just("02:30-02:50"),
        1 => Just("20:00-08:00"),
        1 => Just("00:30-00:00"),
    ]
}

fn full_days() -> impl Strategy<Value = &'static str> {
    prop_oneof![
        Just("auto"),
        Just("sunday"),
        Just("monday"),
        Just("thursday")
    ]
}

fn terms(
    max_retention: &'static str,
    erase_budget: Option<&'static str>,
) -> impl Strategy<Value = PolicyTerms> {
    let keep = prop_oneof![3 => Just("weekly"), 1 => Just("all"), 1 => Just("none")];
    (zones(), windows(), full_days(), keep).prop_map(move |(zone, window, full_day, keep)| {
        PolicyTerms {
            timezone: zone.to_string(),
            window: window.to_string(),
            full_day: full_day.to_string(),
            restore_window: "14 days".to_string(),
            max_retention: max_retention.to_string(),
            keep_after_window: keep.to_string(),
            erase_budget: erase_budget.map(str::to_string),
        }
    })
}

fn start() -> impl Strategy<Value = Date> {
    (0..1500_i64).prop_map(|offset| days_after(date(2025, 1, 1), offset))
}

const NIGHTS: i64 = 740;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn two_years_of_nights_keep_both_promises(
        terms in prop_oneof![
            terms("3 days", None),
            terms("4 days", None),
            terms("7 days", None),
            terms("14 days", None),
            terms("16 days", None),
            terms("20 days", None),
            terms("1 month", None),
            terms("2 months", None),
            terms("2 months", Some("1 day")),
            terms("61 days", None),
            terms("61 days", Some("2 days")),
        ],
        from in start(),
        seed in any::<u64>(),
    ) {
        let troubles = Troubles { clock_jumps: false, skipped_prunes: false };
        Simulation::new(&terms, troubles, seed).run(from, NIGHTS);
    }

    /// Three more days than the window needs are in these policies: thinning and expiry both bear a lone clock.
    #[test]
    fn clocks_up_to_48_hours_ahead_and_skipped_prunes_break_no_promise(
        terms in prop_oneof![
            terms("2 months", None),
            terms("61 days", None),
            terms("30 days", None),
            terms("3 months", Some("2 months")),
        ],
        from in start(),
        seed in any::<u64>(),
    ) {
        let troubles = Troubles { clock_jumps: true, skipped_prunes: true };
        Simulation::new(&terms, troubles, seed).run(from, NIGHTS);
    }
}

/// Found by chance: the last nights of this one begin a day after a prune by a clock that was ahead.
#[test]
fn what_a_clock_that_was_ahead_took_early_is_not_missed_by_a_right_one() {
    let terms = PolicyTerms {
        timezone: "Europe/Amsterdam".to_string(),
        window: "00:30-00:00".to_string(),
        ..PolicyTerms::default()
    };
    let troubles = Troubles {
        clock_jumps: true,
        skipped_prunes: true,
    };
    Simulation::new(&terms, troubles, 17_341_129_269_782_250_010).run(date(2029, 1, 26), NIGHTS);
}

#[test]
fn each_agreed_maximum_is_kept_in_each_zone() {
    for zone in [
        "Europe/Amsterdam",
        "America/New_York",
        "Australia/Lord_Howe",
        "Asia/Kolkata",
    ] {
        for maximum in [
            "3 days", "7 days", "14 days", "20 days", "2 months", "61 days",
        ] {
            let terms = PolicyTerms {
                timezone: zone.to_string(),
                max_retention: maximum.to_string(),
                ..PolicyTerms::default()
            };
            let troubles = Troubles {
                clock_jumps: false,
                skipped_prunes: false,
            };
            Simulation::new(&terms, troubles, 42).run(date(2026, 1, 1), NIGHTS);
        }
    }
}
