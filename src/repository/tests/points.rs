//! Points: written, read, expired, and what a session leaves.

use super::super::testing::*;
use super::super::*;
use crate::format::entry::{Attestation, Body, ClockBody, ClockEvent, Purpose};
use crate::model::{PointId, Writers};
use crate::policy::PolicyTerms;
use jiff::SignedDuration;
use std::collections::BTreeSet;
use std::sync::PoisonError;

#[test]
fn points_restore_to_the_bytes_they_were_taken_from_through_changes_holes_and_resizes() {
    let mut world = World::new();
    let customer = world.open();
    let mut chunks: Vec<u32> = (0..300)
        .map(|n| if n % 3 == 0 { 0 } else { n % 7 })
        .collect();
    let mut bytes = image(&chunks);
    world.backup(&customer, "web", &bytes, true);
    world.time.pass(DAY);
    chunks[5] = 900;
    chunks[290] = 0;
    bytes = image(&chunks);
    world.backup(&customer, "web", &bytes, false);
    world.time.pass(DAY);
    // Not a whole number of chunks, and of another shape.
    bytes.truncate(200 * CHUNK + 1000);
    world.backup(&customer, "web", &bytes, false);
    world.time.pass(DAY);
    world.backup(&customer, "empty", &vec![0; 3 * CHUNK], true);
    world.check(&world.open());
    world.check(&world.open_second());
}

#[test]
fn a_night_without_changes_stores_no_pack() {
    let mut world = World::new();
    let customer = world.open();
    let bytes = image(&[1, 2, 3, 0, 4]);
    world.backup(&customer, "web", &bytes, true);
    let before = world.packs();
    world.time.pass(DAY);
    world.backup(&customer, "web", &bytes, false);
    world.backup(&customer, "web", &bytes, true);
    assert_eq!(world.packs(), before);
    world.check(&customer);
}

#[test]
fn an_expired_point_does_not_restore_and_undo_brings_it_back_until_it_is_erased() {
    let mut world = World::new();
    let customer = world.open();
    let first = world.backup(&customer, "web", &image(&[1, 2]), true);
    world.time.pass(DAY);
    world.backup(&customer, "web", &image(&[1, 3]), false);
    change(&customer, first, Body::Expire).unwrap();
    assert!(restore(&customer, &first).is_err());
    world.prune(&customer).unwrap();
    change(&customer, first, Body::Undo).unwrap();
    world.check(&customer);
    world.erase(&customer, first);
    assert!(change(&customer, first, Body::Undo).is_err());
    world.check(&customer);
    world.quiesce(&customer);
}

#[test]
fn a_begin_names_the_expiry_its_point_would_have_and_the_commit_gives_it() {
    let world = World::new();
    let customer = world.open();
    let running = Running::write(&customer, "web", &image(&[1]), true).unwrap();
    let open = customer.with_state(|state| state.open.get(&running.begun.id).cloned());
    let open = open.unwrap();
    world.time.pass(SignedDuration::from_hours(2));
    let committed = running.commit().unwrap();
    assert_eq!(open.expires_at, Some(committed.expires_at));
    assert_eq!(open.deadline, Some(committed.deadline));
    assert!(committed.expires_at < committed.deadline);
}

#[test]
fn the_time_of_a_lone_clock_counts_from_the_last_time_two_sources_agreed_on() {
    let mut world = World::new();
    let customer = world.open();
    world.backup(&customer, "web", &image(&[1]), true);
    let agreed = customer.with_state(|state| state.last_witnessed).unwrap();
    // Ten years ahead, and alone.
    *world
        .host
        .attestation
        .lock()
        .unwrap_or_else(PoisonError::into_inner) = Attestation::Alone;
    *world
        .host
        .wrong_by
        .lock()
        .unwrap_or_else(PoisonError::into_inner) = DAY * 3650;
    let (_, committed) = backup(&customer, "web", &image(&[2]), false);
    let committed = committed.unwrap();
    assert!(committed.deadline < agreed + DAY * 63);
}

/// What a host whose clock fell back to 1970 took, alone, and from when it counts.
fn taken_in_1970(world: &World) -> (PointId, jiff::Timestamp) {
    let customer = world.open();
    let agreed = customer.with_state(|state| state.last_witnessed).unwrap();
    world.host.set_clock(DAY * -20_000, Attestation::Alone);
    let (point, committed) = backup(&customer, "web", &image(&[1]), true);
    assert_eq!(committed.unwrap().deadline, agreed + DAY * 60);
    world
        .host
        .set_clock(SignedDuration::ZERO, Attestation::Witnessed);
    (point, agreed)
}

fn sixty_days() -> PolicyTerms {
    PolicyTerms {
        max_retention: "60 days".to_string(),
        ..PolicyTerms::default()
    }
}

#[test]
fn a_point_of_a_clock_that_fell_back_to_1970_is_not_past_its_deadline_when_it_is_taken() {
    let world = World::with_terms(&sixty_days());
    let (point, _) = taken_in_1970(&world);
    let state = world.open().state();
    assert!(state.points[&point].expires_at > world.now() + DAY * 14);
}

#[test]
fn a_clock_that_is_set_right_during_a_backup_does_not_make_its_point_an_old_one() {
    let world = World::new();
    let customer = world.open();
    world.host.set_clock(DAY * -40, Attestation::Alone);
    let running = Running::write(&customer, "web", &image(&[1]), true).unwrap();
    let point = running.point;
    world
        .host
        .set_clock(SignedDuration::ZERO, Attestation::Witnessed);
    running.commit().unwrap();
    let state = customer.state();
    let facts: Vec<_> = state.facts().collect();
    assert_eq!((facts.len(), facts[0].point), (1, point));
    let decisions = crate::policy::plan(&facts, state.policy.as_ref().unwrap(), world.now());
    assert_eq!(decisions[0].action, crate::policy::Action::Keep);
}

/// What the ledger says of a silence after each of two points, three days apart.
fn silences(customer: &Customer, points: [PointId; 2]) -> [i64; 2] {
    let state = customer.state();
    points.map(|point| {
        let facts = state.facts().find(|facts| facts.point == point).unwrap();
        facts.silence.as_hours()
    })
}

#[test]
fn a_silence_of_the_witnesses_is_that_of_the_points_before_it_until_its_end_is_declared_void() {
    let mut world = World::new();
    let customer = world.open();
    let first = world.backup(&customer, "web", &image(&[1]), true);
    world.time.pass(DAY * 3);
    let second = world.backup(&customer, "web", &image(&[2]), false);
    assert_eq!(silences(&customer, [first, second]), [72, 0]);
    // An entry without a witness ends no silence.
    world.time.pass(DAY);
    world
        .host
        .set_clock(SignedDuration::ZERO, Attestation::Alone);
    world.backup(&customer, "db", &image(&[3]), true);
    assert_eq!(silences(&customer, [first, second]), [72, 0]);
    world.host.set_clock(DAY * 90, Attestation::Witnessed);
    let probe = customer.begin(Purpose::Merge, None).unwrap();
    let wrong = customer.with_state(|state| state.open[&probe.id].seq);
    assert_eq!(silences(&customer, [first, second]), [91 * 24; 2]);
    world
        .host
        .set_clock(SignedDuration::ZERO, Attestation::Alone);
    let body = ClockBody {
        event: ClockEvent::Void,
        seq: Some(wrong),
        text: "a test".to_string(),
    };
    customer.append(|_| Ok(Body::Clock(body.clone()))).unwrap();
    assert_eq!(silences(&customer, [first, second]), [72, 0]);
}

#[test]
fn a_lone_point_is_dated_anew_when_the_time_after_it_is_declared_void() {
    let world = World::new();
    let customer = world.open();
    world
        .host
        .set_clock(SignedDuration::ZERO, Attestation::Alone);
    let (point, committed) = backup(&customer, "web", &image(&[1]), true);
    committed.unwrap();
    let since = || customer.with_state(|state| state.points[&point].witnessed_since);
    let mut seqs = Vec::new();
    for wrong_by in [DAY * 90, DAY * 91] {
        world.host.set_clock(wrong_by, Attestation::Witnessed);
        let probe = customer.begin(Purpose::Merge, None).unwrap();
        seqs.push(customer.with_state(|state| state.open[&probe.id].seq));
    }
    assert_eq!(since(), Some(world.now() + DAY * 90));
    world
        .host
        .set_clock(SignedDuration::ZERO, Attestation::Alone);
    let dates = [Some(world.now() + DAY * 91), None];
    for (seq, date) in seqs.into_iter().zip(dates) {
        let body = ClockBody {
            event: ClockEvent::Void,
            seq: Some(seq),
            text: "a test".to_string(),
        };
        customer.append(|_| Ok(Body::Clock(body.clone()))).unwrap();
        assert_eq!(since(), date);
    }
}

#[test]
fn a_change_of_policy_does_not_date_a_point_by_the_lone_clock_that_took_it() {
    let world = World::with_terms(&sixty_days());
    let (point, agreed) = taken_in_1970(&world);
    let customer = world.open();
    let terms = terms_map(&PolicyTerms {
        max_retention: "50 days".to_string(),
        ..PolicyTerms::default()
    });
    let body = crate::format::entry::PolicyBody { terms };
    customer.append(|_| Ok(Body::Policy(body.clone()))).unwrap();
    let row = customer.state().points[&point].clone();
    assert_eq!(row.deadline, agreed + DAY * 50);
    assert!(row.expires_at > world.now() + DAY * 14);
}

#[test]
fn another_hosts_session_is_ended_when_its_point_would_have_expired_before_eight_days() {
    let world = World::with_terms(&PolicyTerms {
        max_retention: "3 days".to_string(),
        restore_window: "1 day".to_string(),
        ..PolicyTerms::default()
    });
    let (customer, other) = (world.open(), world.open_second());
    let running = Running::write(&customer, "web", &image(&[1]), true).unwrap();
    world.time.pass(DAY);
    assert_eq!(other.abort_dead_sessions(world.now()).unwrap(), 0);
    world.time.pass(DAY * 2);
    assert_eq!(other.abort_dead_sessions(world.now()).unwrap(), 1);
    let error = running.commit().unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Superseded);
    sweep(&other, false).unwrap();
    world.quiesce(&other);
    assert!(world.packs().is_empty());
}

#[test]
fn a_session_of_a_clock_that_is_years_wrong_is_neither_ended_early_nor_kept_for_ever() {
    let world = World::new();
    let (customer, other) = (world.open(), world.open_second());
    for years in [-10, 10] {
        *world
            .host
            .wrong_by
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = DAY * 365 * years;
        *world
            .host
            .attestation
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Attestation::Alone;
        let running = Running::write(&customer, "web", &image(&[1]), true).unwrap();
        // Somebody else's witnessed entry dates it.
        let probe = other.begin(Purpose::Merge, None).unwrap();
        other.abort(&probe.id, "a test").unwrap();
        world.time.pass(DAY * 7);
        assert_eq!(
            other.abort_dead_sessions(world.now()).unwrap(),
            0,
            "{years}"
        );
        world.time.pass(DAY * 2);
        assert_eq!(
            other.abort_dead_sessions(world.now()).unwrap(),
            1,
            "{years}"
        );
        drop(running);
    }
}

#[test]
fn a_dead_session_is_emptied_record_first_and_a_living_one_is_left_alone() {
    let world = World::new();
    let customer = world.open();
    let living = Running::write(&customer, "web", &image(&[1, 2, 3, 4, 5]), true).unwrap();
    let dead = Running::write(&customer, "db", &image(&[6, 7, 8, 9, 10]), true).unwrap();
    let point = customer.names().point(&dead.point);
    world
        .memory
        .plant(&point, b"a record that was written before the process died");
    drop(dead);
    assert_eq!(customer.abort_dead_sessions(world.now()).unwrap(), 1);
    assert!(world.memory.size_bytes(&point).is_err());
    sweep(&customer, false).unwrap();
    living.commit().unwrap();
    world.quiesce(&customer);
}

#[test]
fn two_makers_of_a_customer_leave_one_key_file() {
    let world = World::new();
    let keys = world.memory.list("customers/acme/key").unwrap();
    assert_eq!(keys.len(), 1);
    // A maker that died after its key file, before its entry.
    let storage: std::sync::Arc<dyn crate::storage::Storage> =
        std::sync::Arc::new(crate::storage::Memory::new());
    let name = customer_name();
    let names = crate::format::names::CustomerNames::new(&name);
    storage
        .create(&names.key(1), b"of a maker that died")
        .unwrap();
    let terms = PolicyTerms::default();
    let new = NewCustomer {
        repository: world.file.repository,
        name: &name,
        host: world.host.body(),
        recipients: vec![world.host.identity.recipient()],
        terms: &terms,
        writers: Writers::Many,
    };
    // It knows another customer of this name, in another store.
    world.host.forget();
    Customer::create(&storage, &new, &*world.host).unwrap();
    assert_eq!(storage.list("customers/acme/key").unwrap().len(), 1);
    // Not the world's own store, with whose entries a checked opening compares.
    let customer = world.open_unchecked(storage, &world.host).unwrap();
    assert_eq!(
        sweep(&customer, false).unwrap().unexplained,
        Vec::<String>::new()
    );
}

#[test]
fn a_large_run_is_cut_by_tags_and_merged_again_as_one() {
    let mut world = World::new();
    let customer = world.open();
    let sessions = |customer: &Customer| {
        customer.load_index().unwrap();
        customer.with_state(|state| {
            let segments = state.segments.keys();
            let sessions: BTreeSet<_> = segments.map(|name| name.session).collect();
            (state.segments.len(), sessions.len())
        })
    };
    for round in 0..2u32 {
        for night in 0..14u32 {
            let chunks: Vec<u32> = (0..6).map(|n| 1000 * round + 10 * night + n).collect();
            world.backup(&customer, "web", &image(&chunks), false);
            world.time.pass(SignedDuration::from_hours(1));
        }
        assert!(reclaim::merge_segments(&customer).unwrap());
        let (segments, runs) = sessions(&customer);
        assert!(
            segments > 3 && runs == 1,
            "{segments} segments, {runs} runs"
        );
        world.check(&customer);
        world.check(&world.open_second());
    }
    assert!(!reclaim::merge_segments(&customer).unwrap());
    world.quiesce(&customer);
}

#[test]
fn many_small_segments_are_merged_and_deleted_packs_leave_with_them() {
    let mut world = World::new();
    let customer = world.open();
    let mut points = Vec::new();
    for night in 0..14u32 {
        let bytes = image(&[1, 2, 100 + night, 200 + night]);
        points.push(world.backup(&customer, "web", &bytes, false));
        world.time.pass(DAY);
    }
    for point in points.iter().take(10) {
        world.erase(&customer, *point);
    }
    world.quiesce(&customer);
    assert!(reclaim::merge_segments(&customer).unwrap());
    assert!(!reclaim::merge_segments(&customer).unwrap());
    assert!(customer.with_state(|state| state.condemned.is_empty()));
    world.check(&customer);
    world.check(&world.open_second());
    world.quiesce(&customer);
}

#[test]
fn a_large_run_of_segments_stays_where_it_is_while_small_ones_are_joined() {
    let mut world = World::new();
    let customer = world.open();
    let sessions = |customer: &Customer| -> BTreeSet<_> {
        let index = customer.load_index().unwrap();
        index
            .segment_names()
            .map(|(name, _)| name.session)
            .collect()
    };
    // A record for each chunk and one for their node.
    let hundred: Vec<u8> = (1..=100)
        .flat_map(|number: u8| vec![number; CHUNK])
        .collect();
    world.backup(&customer, "db", &hundred, true);
    let large = sessions(&customer);
    for night in 1..=11 {
        world.backup(&customer, "web", &image(&[night]), false);
    }
    assert_eq!(sessions(&customer).len(), 12);
    assert!(reclaim::merge_segments(&customer).unwrap());
    let left = sessions(&customer);
    assert!(left.len() == 2 && left.is_superset(&large), "{left:?}");
    world.check(&customer);
}
