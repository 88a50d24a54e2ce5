//! What is told of points that are not what they seem, and of what must soon be gone.

use crate::format::entry::Body;
use crate::jobs::testing::{Lab, back_up};
use crate::jobs::{
    Alarm, AlarmKind, Choice, Looked, PruneRequest, VmStatus, alarms, choose, due_now, listed,
    plan_prune, status,
};
use crate::policy::{Action, PolicyTerms, What};
use crate::repository::testing::{DAY, change, image, vm};
use crate::repository::{Customer, State};
use crate::storage::Memory;
use jiff::SignedDuration;
use std::sync::Arc;

const YEARS: i32 = 3653;

/// What `status` knows of `web`, and all alarms.
fn told(lab: &Lab, customer: &Customer) -> (VmStatus, Vec<Alarm>) {
    customer.with_state(|state| {
        let mut vms = status(state, &[vm("web")], lab.time.now());
        let alarms = alarms(state, &vms, &Looked::default(), lab.time.now());
        (vms.remove(0), alarms)
    })
}

fn has(alarms: &[Alarm], kind: AlarmKind) -> bool {
    alarms.iter().any(|alarm| alarm.kind == kind)
}

#[test]
fn a_point_of_a_clock_that_was_years_ahead_misleads_nobody_once_it_is_right() {
    let lab = Lab::new(Arc::new(Memory::new()), &PolicyTerms::default());
    let customer = lab.open();
    lab.pass(DAY * YEARS);
    back_up(&customer, "web", &image(&[1]), true);
    lab.pass(-DAY * YEARS);
    // How old it is, nobody knows.
    let (_, alarms) = told(&lab, &customer);
    assert!(has(&alarms, AlarmKind::Stale) && has(&alarms, AlarmKind::Hole));

    let right = back_up(&customer, "web", &image(&[2]), false);
    let now = lab.time.now();
    let latest = customer.with_state(|state| choose(&listed(state, now), &vm("web"), None));
    assert_eq!(latest, Choice::Point(right));
    let (web, alarms) = told(&lab, &customer);
    assert_eq!((web.points, web.last.map(|(at, _)| at)), (2, Some(now)));
    assert!(!has(&alarms, AlarmKind::Stale) && !has(&alarms, AlarmKind::Hole));

    // The last to expire, and no sign that the VM is backed up.
    lab.pass(DAY * 30);
    let (_, alarms) = told(&lab, &customer);
    for kind in [AlarmKind::Stale, AlarmKind::Hole, AlarmKind::LastPoint] {
        assert!(has(&alarms, kind), "{kind:?}");
    }
}

#[test]
fn a_void_point_is_no_nights_restore_point_and_stays_until_its_time_is_over() {
    let lab = Lab::new(Arc::new(Memory::new()), &PolicyTerms::default());
    let customer = lab.open();
    let point = back_up(&customer, "web", &image(&[1]), true);
    let (mut state, now) = (State::clone(&customer.state()), lab.time.now());
    let seen = |state: &State| {
        let due = due_now(state, &vm("web"), now).unwrap();
        let coverage = status(state, &[vm("web")], now).remove(0).coverage;
        (due.what, coverage.unwrap().covered)
    };
    assert_eq!(seen(&state), (What::Nothing, 1));
    state.points.get_mut(&point).unwrap().void = true;
    assert_eq!(seen(&state), (What::Full, 0));
    let decisions = plan_prune(&state, now, PruneRequest::default());
    assert_eq!(decisions[0].action, Action::Keep);
    assert!(
        decisions[0]
            .reason
            .to_string()
            .starts_with("its commit broke a rule")
    );
}

#[test]
fn what_must_be_gone_is_told_before_its_deadline_by_the_first_run_after_a_night_without_a_prune() {
    let terms = PolicyTerms {
        max_retention: "7 days".to_string(),
        timezone: "UTC".to_string(),
        ..PolicyTerms::default()
    };
    let is_told = |is_erased: bool| {
        let lab = Lab::new(Arc::new(Memory::new()), &terms);
        let customer = lab.open();
        let point = back_up(&customer, "web", &image(&[1, 2]), true);
        let deadline = customer.with_state(|state| state.points[&point].deadline);
        if is_erased {
            change(&customer, point, Body::Expire).unwrap();
            change(&customer, point, Body::Erase).unwrap();
        }
        // At 23:19, while the prune of the night may still come, and at 8:04.
        [(23, 41), (14, 56)].map(|(hours, minutes)| {
            let left = SignedDuration::from_mins(hours * 60 + minutes);
            lab.pass(deadline.duration_since(lab.time.now()) - left);
            has(&told(&lab, &customer).1, AlarmKind::BudgetHalfUsed)
        })
    };
    for is_erased in [false, true] {
        assert_eq!(is_told(is_erased), [false, true]);
    }
}

#[test]
fn where_every_night_is_pruned_nothing_is_told_of_deadlines_after_its_window() {
    for maximum in ["3 days", "7 days", "14 days", "30 days"] {
        let terms = PolicyTerms {
            max_retention: maximum.to_string(),
            timezone: "UTC".to_string(),
            ..PolicyTerms::default()
        };
        let lab = Lab::new(Arc::new(Memory::new()), &terms);
        let customer = lab.open();
        for night in 0..35 {
            // At 23:00, and the last of its window.
            back_up(&customer, "web", &image(&[1, 100 + night]), night % 7 == 0);
            lab.prune(&customer).unwrap();
            lab.pass(SignedDuration::from_hours(7));
            back_up(&customer, "late", &image(&[1, 200 + night]), night % 7 == 0);
            let (_, alarms) = told(&lab, &customer);
            assert!(
                !has(&alarms, AlarmKind::BudgetHalfUsed),
                "{maximum}: {alarms:?}"
            );
            lab.pass(SignedDuration::from_hours(17));
        }
    }
}
