//! What is told of points that are not what they seem, and of what must soon be gone.

use crate::format::entry::{Attestation, Body, PolicyBody};
use crate::jobs::testing::{Lab, back_up};
use crate::jobs::{
    Alarm, AlarmKind, Choice, Looked, PruneRequest, VmStatus, alarms, choose, due_now,
    hidden_by_clock, listed, not_configured, plan_prune, status,
};
use crate::model::HostId;
use crate::policy::{Action, PolicyTerms, What};
use crate::repository::testing::{DAY, World, change, image, vm};
use crate::repository::{Customer, State, terms_map};
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
fn a_clock_that_is_ahead_hides_points_that_the_ledger_knows_not_to_be_over() {
    let lab = Lab::new(Arc::new(Memory::new()), &PolicyTerms::default());
    let customer = lab.open();
    back_up(&customer, "web", &image(&[1]), true);
    let hidden = || {
        let now = lab.time.now();
        customer.with_state(|state| (hidden_by_clock(state, now).len(), listed(state, now).len()))
    };
    assert_eq!(hidden(), (0, 1));
    lab.pass(DAY * YEARS);
    assert_eq!(hidden(), (1, 0));
    // Somebody says that this is the time: then it is over.
    lab.vouch();
    back_up(&customer, "web", &image(&[2]), true);
    assert_eq!(hidden(), (0, 1));
}

#[test]
fn a_customer_that_is_not_configured_is_told_to_who_is_to_prune_it_until_it_is_empty() {
    let lab = Lab::new(Arc::new(Memory::new()), &PolicyTerms::default());
    let customer = lab.open();
    let now = lab.time.now();
    let told = |host: HostId, now| customer.with_state(|state| not_configured(state, &host, now));
    let own = lab.host.identity().host_id();
    assert_eq!(told(own, now), []);
    let point = back_up(&customer, "web", &image(&[1]), true);
    let deadline = customer.with_state(|state| state.points[&point].deadline);
    let alarms = told(own, now);
    let [alarm] = &alarms[..] else {
        panic!("{alarms:?}")
    };
    assert_eq!(alarm.kind, AlarmKind::NotConfigured);
    for part in [
        "1 restore point",
        &deadline.to_string(),
        "[[customer]] id = \"acme\"",
    ] {
        assert!(alarm.text.contains(part), "{part:?} in {}", alarm.text);
    }
    let kinds: Vec<AlarmKind> = told(own, deadline).iter().map(|one| one.kind).collect();
    assert_eq!(kinds, [AlarmKind::NotConfigured, AlarmKind::OverMaximum]);
    assert_eq!(told(HostId::from_bytes([9; 32]), deadline), []);
    // What is erased and still there is as much of it.
    change(&customer, point, Body::Expire).unwrap();
    change(&customer, point, Body::Erase).unwrap();
    assert_eq!(told(own, deadline).len(), 2);
    lab.prune(&customer).unwrap();
    assert_eq!(told(own, deadline), []);
}

#[test]
fn a_customer_that_another_host_works_for_and_is_to_prune_is_for_that_host_to_tell() {
    let lab = Lab::new(Arc::new(Memory::new()), &PolicyTerms::default());
    let customer = lab.open();
    back_up(&customer, "web", &image(&[1]), true);
    let own = lab.host.identity().host_id();
    let told = |passed: SignedDuration| {
        let now = lab.time.now() + passed;
        customer.with_state(|state| not_configured(state, &own, now))
    };
    assert_eq!(told(SignedDuration::ZERO).len(), 1);
    // It was moved.
    let moved = lab.open_second();
    back_up(&moved, "web", &image(&[2]), true);
    customer.refresh().unwrap();
    assert_eq!(told(SignedDuration::ZERO), []);
    assert_eq!(told(SignedDuration::from_hours(47)), []);
    // Nobody works for it any more; what is to be said where another one does, is said.
    let alarms = told(SignedDuration::from_hours(49));
    let [alarm] = &alarms[..] else {
        panic!("{alarms:?}")
    };
    assert!(alarm.text.contains("vmkeep key admit"), "{}", alarm.text);
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

#[test]
fn a_maximum_that_is_lengthened_breaks_no_promise_and_hurries_nobody() {
    let week = PolicyTerms {
        max_retention: "7 days".to_string(),
        timezone: "UTC".to_string(),
        ..PolicyTerms::default()
    };
    let lab = Lab::new(Arc::new(Memory::new()), &week);
    let customer = lab.open();
    for night in 0..30 {
        if night == 10 {
            let terms = terms_map(&PolicyTerms::default());
            let body = PolicyBody { terms };
            customer.append(|_| Ok(Body::Policy(body.clone()))).unwrap();
        }
        if night > 0 {
            let (_, alarms) = told(&lab, &customer);
            for kind in [AlarmKind::BudgetHalfUsed, AlarmKind::Hole] {
                assert!(!has(&alarms, kind), "{night}: {alarms:?}");
            }
        }
        back_up(&customer, "web", &image(&[1, 100 + night]), night % 7 == 0);
        lab.prune(&customer).unwrap();
        lab.pass(DAY);
    }
    // A night that is missed is a hole, whatever was promised before.
    lab.pass(DAY);
    assert!(has(&told(&lab, &customer).1, AlarmKind::Hole));
}

#[test]
fn a_name_that_is_used_anew_owes_no_night_before() {
    let lab = Lab::new(Arc::new(Memory::new()), &PolicyTerms::default());
    let customer = lab.open();
    let before = back_up(&customer, "web", &image(&[1]), true);
    change(&customer, before, Body::Expire).unwrap();
    change(&customer, before, Body::Erase).unwrap();
    lab.pass(DAY * 90);
    lab.vouch();
    assert!(has(&told(&lab, &customer).1, AlarmKind::Hole));
    back_up(&customer, "web", &image(&[2]), true);
    lab.pass(SignedDuration::from_hours(12));
    let missing = |told: (VmStatus, Vec<Alarm>)| told.0.coverage.map(|coverage| coverage.missing);
    assert_eq!(missing(told(&lab, &customer)), Some(0));
    // From there on every night is.
    lab.pass(DAY * 2);
    assert_eq!(missing(told(&lab, &customer)), Some(2));
}

#[test]
fn a_night_whose_date_a_clock_ahead_took_is_backed_up_once_the_clock_is_right() {
    let mut world = World::new();
    let customer = world.open();
    let due = |world: &World| {
        let due = customer.with_state(|state| due_now(state, &vm("web"), world.now()));
        due.map(|due| due.what)
    };
    world.backup(&customer, "web", &image(&[1]), true);
    world.time.pass(DAY);
    world.host.set_clock(DAY, Attestation::Alone);
    world.backup(&customer, "web", &image(&[2]), false);
    world
        .host
        .set_clock(SignedDuration::ZERO, Attestation::Witnessed);
    world.time.pass(SignedDuration::from_hours(8));
    assert_eq!(due(&world), Some(What::Incremental));
    world.backup(&customer, "web", &image(&[3]), false);
    world.time.pass(SignedDuration::from_hours(16));
    assert_eq!(due(&world), Some(What::Incremental));
    world.backup(&customer, "web", &image(&[4]), false);
    assert_eq!(due(&world), Some(What::Nothing));
    world.check(&customer);
}
