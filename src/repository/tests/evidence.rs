//! The ledger as evidence: gap, fork, rollback, foreign hands, later versions, two of one host.

use super::super::testing::*;
use super::super::*;
use crate::format::entry::{Attestation, Body, Entry, PackMark, ReclaimedBody, RestoreBody};
use crate::model::{ObjectHash, ObjectName, PackName, SessionId};
use crate::storage::{Fault, Faulty, Storage, StorageErrorKind, Verb};
use std::sync::Arc;
use std::time::Duration;

fn entry_name(seq: u64) -> ObjectName {
    ObjectName::new(&format!("customers/acme/ledger/{seq:016}")).unwrap()
}

fn refusal(world: &World) -> RepositoryError {
    let storage = Arc::new(world.memory.clone());
    world.open_on(storage, &world.host).err().unwrap()
}

fn with_points() -> World {
    let mut world = World::new();
    let customer = world.open();
    world.backup(&customer, "web", &image(&[1, 2]), true);
    world.backup(&customer, "web", &image(&[1, 3]), false);
    world
}

#[test]
fn a_missing_entry_before_others_is_a_gap() {
    let world = with_points();
    world.memory.delete(&entry_name(6)).unwrap();
    assert_eq!(refusal(&world).kind, RepositoryErrorKind::Damaged);
    world.memory.delete(&entry_name(1)).unwrap();
    assert_eq!(refusal(&world).kind, RepositoryErrorKind::Damaged);
}

#[test]
fn a_stray_file_among_the_entries_is_reported_and_locks_nobody_out() {
    let world = with_points();
    let stray = ObjectName::new("customers/acme/ledger/notes.txt").unwrap();
    world.memory.plant(&stray, b"a note");
    let customer = world.open();
    world.check(&customer);
    assert_eq!(sweep(&customer, false).unwrap().unexplained.len(), 1);
}

#[test]
fn an_end_that_this_host_has_seen_and_that_is_gone_is_a_rollback() {
    let world = with_points();
    let end = world.open().with_state(|state| state.seq);
    world.memory.delete(&entry_name(end)).unwrap();
    assert_eq!(refusal(&world).kind, RepositoryErrorKind::Replaced);
}

#[test]
fn an_end_other_than_the_one_this_host_has_seen_is_a_fork() {
    let world = with_points();
    let snapshot = world.memory.snapshot();
    change_nothing(&world.open());
    world.memory.restore_snapshot(&snapshot);
    world.time.pass(DAY);
    // Another host, to whom the store was shown as it was before.
    change_nothing(&world.open_second());
    let error = refusal(&world);
    assert_eq!(error.kind, RepositoryErrorKind::Replaced);
    assert!(error.detail.contains("forked"), "{error}");
}

fn change_nothing(customer: &Customer) {
    try_to_change_nothing(customer).unwrap();
}

fn try_to_change_nothing(customer: &Customer) -> Result<u64, RepositoryError> {
    let body = crate::format::entry::ClockBody {
        event: crate::format::entry::ClockEvent::Refused,
        seq: None,
        text: "a test".to_string(),
    };
    customer.append(|_| Ok(Body::Clock(body.clone())))
}

#[test]
fn an_entry_whose_reply_is_lost_stands_once_and_one_that_the_store_refuses_does_not() {
    let world = World::new();
    let storage = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_unchecked(storage.clone(), &world.host).unwrap();
    let begun = storage.operations();
    change_nothing(&customer);
    let log = storage.log();
    let created = log
        .iter()
        .find(|operation| operation.number > begun && operation.verb == Verb::Create);
    let creation = created.unwrap().number - begun;
    let seq = || customer.with_state(|state| state.seq);
    for lost in [true, false] {
        let (before, at) = (seq(), storage.operations() + creation);
        storage.add(match lost {
            true => Fault::FailAfter { at },
            false => Fault::FailBefore {
                at,
                kind: StorageErrorKind::Transient,
            },
        });
        change_nothing(&customer);
        assert_eq!(seq(), before + 1);
    }
    let before = seq();
    let at = storage.operations() + 1;
    storage.add(Fault::FullFrom { at });
    let error = try_to_change_nothing(&customer).unwrap_err();
    let full = RepositoryErrorKind::Storage(StorageErrorKind::Full);
    assert_eq!(error.kind, full);
    customer.refresh().unwrap();
    assert_eq!(seq(), before);
}

#[test]
fn every_changed_byte_of_an_entry_is_noticed() {
    let world = with_points();
    let name = entry_name(7);
    let whole = world.memory.read(&name, u64::MAX).unwrap();
    for at in (0..whole.len()).step_by(7) {
        let mut bad = whole.clone();
        bad[at] ^= 2;
        world.memory.plant(&name, &bad);
        refusal(&world);
    }
    world.memory.plant(&name, &whole);
    world.check(&world.open());
}

/// An entry that follows the end, as `host` would sign it.
fn plant_next(world: &World, customer: &Customer, host: &TestHost, body: Body) -> u64 {
    customer.refresh().unwrap();
    let state = customer.state();
    let entry = Entry {
        seq: state.seq + 1,
        prev: state.hash.unwrap(),
        customer: customer.uid(),
        time: world.now(),
        attestation: Attestation::Witnessed,
        host: host.id(),
        body,
    };
    let stored = entry.seal(|message| host.sign(message)).unwrap();
    world.memory.plant(&entry_name(entry.seq), &stored);
    entry.seq
}

#[test]
fn an_entry_of_another_customer_is_refused() {
    let (world, other) = (with_points(), World::new());
    let foreign = other.memory.read(&entry_name(1), u64::MAX).unwrap();
    world.memory.plant(&entry_name(1), &foreign);
    refusal(&world);
}

#[test]
fn an_entry_of_a_host_that_was_never_admitted_is_void() {
    let world = with_points();
    let customer = world.open();
    let stranger = TestHost::new(&world.time);
    let point = customer.with_state(|state| *state.points.keys().next().unwrap());
    let body = crate::format::entry::PointsBody {
        points: vec![crate::format::entry::PointReason {
            point,
            reason: "a stranger".to_string(),
        }],
    };
    let seq = plant_next(&world, &customer, &stranger, Body::Expire(body));
    customer.refresh().unwrap();
    assert!(restore(&customer, &point).is_ok());
    assert_eq!(
        customer.with_state(|state| state.voids.first().map(|void| void.0)),
        Some(seq)
    );
}

#[test]
fn a_replay_tells_every_entry_and_which_is_void() {
    let world = with_points();
    let customer = world.open();
    let stranger = TestHost::new(&world.time);
    let begin = crate::format::entry::BeginBody {
        session: SessionId::from_bytes([1; 16]),
        purpose: crate::format::entry::Purpose::Merge,
        vm: None,
        point: None,
        expires_at: None,
        deadline: None,
    };
    let void = plant_next(&world, &customer, &stranger, Body::Begin(begin));
    let (mut seen, mut voids) = (0, Vec::new());
    let storage = Arc::new(world.memory.clone());
    let state = Ledger::replay(storage, customer.names().clone(), |entry, verdict| {
        seen += 1;
        assert_eq!(entry.seq, seen);
        voids.extend(verdict.err().map(|_| entry.seq));
    });
    customer.refresh().unwrap();
    assert_eq!(state.unwrap(), customer.state());
    assert_eq!((seen, voids), (void, vec![void]));
}

#[test]
fn a_replay_that_meets_a_gap_says_so_after_what_it_could_tell() {
    let world = with_points();
    let customer = world.open();
    world.memory.delete(&entry_name(6)).unwrap();
    let mut seen = 0;
    let storage = Arc::new(world.memory.clone());
    let state = Ledger::replay(storage, customer.names().clone(), |entry, _| {
        seen = entry.seq
    });
    assert_eq!(state.unwrap_err().kind, RepositoryErrorKind::Damaged);
    assert_eq!(seen, 5);
}

#[test]
fn what_a_later_version_wrote_makes_this_one_read_and_never_write_or_delete() {
    let mut world = with_points();
    let customer = world.open();
    let dying = world.backup(&customer, "db", &image(&[7, 8]), true);
    world.erase(&customer, dying);
    let host = world.host.clone();
    let later = Body::Unknown {
        kind: "hold".to_string(),
        why: String::new(),
    };
    plant_next(&world, &customer, &host, later);
    let stray = customer.names().pack(&PackName {
        session: SessionId::from_bytes([1; 16]),
        hash: ObjectHash::from_bytes([1; 32]),
    });
    world
        .memory
        .plant(&stray, b"perhaps explained by the entry we do not know");
    let packs = world.packs();
    let customer = world.open();
    world.check(&customer);
    let newer = |kind| assert_eq!(kind, Some(RepositoryErrorKind::Newer));
    newer(sweep(&customer, true).err().map(|error| error.kind));
    let reclaimed = reclaim::reclaim(&customer, world.now(), DAY * 4000, true);
    newer(reclaimed.err().map(|error| error.kind));
    newer(
        backup(&customer, "web", &image(&[1]), true)
            .1
            .err()
            .map(|error| error.kind),
    );
    assert_eq!(world.packs(), packs);
}

#[test]
fn an_entry_that_does_not_open_is_of_a_later_version_if_it_says_so_and_else_damaged() {
    let world = with_points();
    let end = world.open().with_state(|state| state.seq);
    for (entry, kind) in [
        (
            "{\"vmkeep\":2}\nsigned in a new way",
            RepositoryErrorKind::Newer,
        ),
        (
            "{\"vmkeep\":1}\nsigned in a new way",
            RepositoryErrorKind::Damaged,
        ),
        ("no json\n{\"vmkeep\":2}", RepositoryErrorKind::Damaged),
    ] {
        world.memory.plant(&entry_name(end + 1), entry.as_bytes());
        assert_eq!(refusal(&world).kind, kind, "{entry}");
    }
}

#[test]
fn two_processes_of_one_host_that_restore_in_the_same_second_leave_two_entries() {
    let world = with_points();
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let one = world.open_on(store.clone(), &world.host).unwrap();
    let two = world.open();
    let point = one.with_state(|state| *state.points.keys().next().unwrap());
    let note = |customer: &Customer| {
        customer.append(|_| {
            Ok(Body::Restore(RestoreBody {
                point,
                vm: vm("web"),
                disks: Vec::new(),
                reason: "the same".to_string(),
            }))
        })
    };
    // The first is stopped before it creates its slot.
    let gate = store.freeze_before(store.operations() + 1);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| note(&one));
        assert!(gate.wait_until_reached(Duration::from_secs(5)));
        let second = note(&two).unwrap();
        gate.release();
        assert_eq!(thread.join().unwrap().unwrap(), second + 1);
    });
}

#[test]
fn the_rows_of_a_slower_reclaim_do_not_take_back_what_a_later_one_found() {
    let mut world = World::new();
    let customer = world.open();
    let dying = world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    let pack = PackName {
        session: SessionId::from_bytes([1; 16]),
        hash: ObjectHash::from_bytes([1; 32]),
    };
    let row = |dead_bytes, days: i32, erases: &[u64]| PackMark {
        pack,
        dead_bytes,
        earliest_deadline: world.now() + DAY * days,
        erases: erases.to_vec(),
    };
    let note = |marked_at, marks: Vec<PackMark>| {
        customer
            .append(|_| {
                Ok(Body::Reclaimed(ReclaimedBody {
                    session: None,
                    marked_at,
                    deleted: Vec::new(),
                    marks: marks.clone(),
                    certificate: None,
                    destroyed: Vec::new(),
                }))
            })
            .unwrap();
        customer.with_state(|state| state.marks.get(&pack).cloned())
    };
    note(5, vec![row(100, 10, &[3])]);
    // It had begun before, and knows less.
    let after = note(4, vec![row(50, 20, &[2])]).unwrap();
    assert_eq!((after.dead_bytes, after.erases), (100, vec![2, 3]));
    assert_eq!(after.earliest_deadline, world.now() + DAY * 10);
    let after = note(4, vec![row(0, 20, &[])]);
    assert!(after.is_some());
    // Erased since: any dead byte may be one of its bytes, whatever their sum is.
    world.erase(&customer, dying);
    let (seq, deadline) = customer.with_state(|state| {
        let row = &state.points[&dying];
        (row.erase_seq.unwrap(), row.deadline)
    });
    let after = note(seq, Vec::new()).unwrap();
    assert!(after.erases.contains(&seq));
    assert!(after.earliest_deadline <= deadline);
    assert_eq!(note(seq, vec![row(0, 0, &[])]), None);
}

#[test]
fn a_slot_that_was_taken_and_cannot_be_read_back_is_uncertain_not_failed() {
    let mut met = 0;
    for operation in 0..20 {
        let world = with_points();
        let store = Arc::new(Faulty::new(world.memory.clone()));
        let customer = world.open_on(store.clone(), &world.host).unwrap();
        let running = Running::write(&customer, "web", &image(&[1, 4]), false).unwrap();
        let point = running.point;
        let commit_slot = entry_name(customer.with_state(|state| state.seq) + 1);
        // From some operation of the commit on the store is out of reach.
        store.add(crate::storage::Fault::CrashAt {
            at: store.operations() + operation,
            applied: false,
        });
        let outcome = running.commit();
        let created = store.log().iter().any(|line| {
            line.name == commit_slot.as_str()
                && line.verb == crate::storage::Verb::Create
                && line.told == Some(Ok(()))
        });
        if let (true, Err(error)) = (created, outcome) {
            met += 1;
            assert_eq!(error.kind, RepositoryErrorKind::Uncertain, "{error}");
            assert!(restore(&world.open(), &point).is_ok());
        }
    }
    assert!(
        met > 0,
        "no operation came between the creation and its reading back"
    );
}

/// What comes of an entry whose operations, from its creation on, meet these failures one by one.
fn outcome_of_failures(failures: &[Option<StorageErrorKind>]) -> Result<u64, RepositoryError> {
    let world = World::new();
    let store = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_unchecked(store.clone(), &world.host).unwrap();
    let before = store.operations();
    for (failure, at) in failures.iter().zip(before + 1..) {
        if let Some(kind) = *failure {
            store.add(Fault::FailBefore { at, kind });
        }
    }
    let outcome = try_to_change_nothing(&customer);
    let log = store.log();
    assert_eq!(log[before as usize].verb, Verb::Create);
    outcome
}

#[test]
fn a_refusal_after_an_attempt_whose_reply_was_lost_is_uncertain_and_before_it_is_not() {
    let (lost, denied) = (StorageErrorKind::Transient, StorageErrorKind::Denied);
    let error = outcome_of_failures(&[Some(lost), Some(denied)]).unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Uncertain);
    let error = outcome_of_failures(&[Some(denied)]).unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Storage(denied));
}

#[test]
fn reading_an_entry_back_is_repeated_while_the_store_is_out_of_reach_and_not_when_it_refuses() {
    let (lost, denied) = (StorageErrorKind::Transient, StorageErrorKind::Denied);
    outcome_of_failures(&[None, Some(lost), Some(lost)]).unwrap();
    let error = outcome_of_failures(&[None, Some(denied)]).unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Uncertain);
}

/// Restore points enough for a checkpoint, and how many entries there are.
fn with_a_checkpoint() -> (World, u64) {
    let mut world = World::new();
    let customer = world.open();
    for night in 0..6 {
        world.backup(&customer, "web", &image(&[1, night]), night == 0);
    }
    let entries = customer.with_state(|state| state.seq);
    assert!(entries > 12, "{entries} entries");
    world.open();
    (world, entries)
}

fn entries_read_at_open(world: &World) -> usize {
    let storage = Arc::new(Faulty::new(world.memory.clone()));
    let opened = world.open_unchecked(storage.clone(), &world.host);
    opened.unwrap();
    let is_entry = |name: &str| name.contains("/ledger/");
    let reads = storage.log().into_iter();
    reads
        .filter(|operation| operation.verb == Verb::Read && is_entry(&operation.name))
        .count()
}

#[test]
fn a_checkpoint_saves_reading_what_came_before_it() {
    let (world, entries) = with_a_checkpoint();
    let saved = entries_read_at_open(&world);
    world.host.forget();
    let whole = entries_read_at_open(&world);
    assert!(
        whole as u64 >= entries && saved + 6 < whole,
        "{saved}, {whole}"
    );
}

#[test]
fn a_checkpoint_is_made_anew_after_some_entries_and_lends_no_belief_to_the_next() {
    let (world, _) = with_a_checkpoint();
    let uid = world.open().uid();
    assert_eq!(world.host.vouched(&uid), Some(Vouched::Replayed));
    let first = world.host.checkpoint(&uid);
    change_nothing(&world.open());
    world.open();
    assert_eq!(world.host.checkpoint(&uid), first);
    let customer = world.open();
    for _ in 0..10 {
        change_nothing(&customer);
    }
    assert_ne!(world.host.checkpoint(&uid), first);
    assert_eq!(world.host.vouched(&uid), Some(Vouched::AsBefore(SINCE)));
    customer.check_ledger().unwrap();
    for _ in 0..10 {
        change_nothing(&customer);
    }
    assert_eq!(world.host.vouched(&uid), Some(Vouched::Replayed));
}

#[test]
fn a_far_ledger_is_read_many_entries_at_once_and_says_the_same() {
    let (world, entries) = with_a_checkpoint();
    let near = world.open().state();
    let far = |fault: Option<u64>| {
        world.host.forget();
        let storage = Arc::new(Faulty::new(world.memory.clone()));
        storage.read_at_once(4);
        if let Some(at) = fault {
            let kind = StorageErrorKind::Transient;
            storage.add(Fault::FailBefore { at, kind });
        }
        let opened = world.open_unchecked(storage.clone(), &world.host);
        (opened.map(|customer| customer.state()), storage.log())
    };
    let (state, log) = far(None);
    assert_eq!(state.unwrap(), near);
    // Each once, and the slot that is free.
    let is_entry = |line: &&crate::storage::Operation| line.name.contains("/ledger/");
    let reads = log
        .iter()
        .filter(is_entry)
        .filter(|line| line.verb == Verb::Read);
    assert_eq!(reads.count() as u64, entries + 1);
    // One that fails on the way is read again in its turn.
    for at in 3..2 + entries {
        assert_eq!(far(Some(at)).0.unwrap(), near, "operation {at}");
    }
    // And one that is damaged is damaged.
    let name = entry_name(entries - 2);
    let mut stored = world.memory.read(&name, u64::MAX).unwrap();
    stored[40] ^= 1;
    world.memory.plant(&name, &stored);
    let error = far(None).0.unwrap_err();
    assert!(error.is_damage() && error.name == name.as_str(), "{error}");
}

#[test]
fn a_store_that_fails_where_an_entry_is_read_is_not_the_end_of_the_ledger() {
    let world = with_points();
    let storage = Arc::new(Faulty::new(world.memory.clone()));
    let customer = world.open_unchecked(storage.clone(), &world.host).unwrap();
    change_nothing(&world.open_second());
    storage.add(Fault::FailBefore {
        at: storage.operations() + 1,
        kind: StorageErrorKind::Transient,
    });
    let error = customer.refresh().unwrap_err();
    let failed = RepositoryErrorKind::Storage(StorageErrorKind::Transient);
    assert_eq!(error.kind, failed);
    customer.refresh().unwrap();
    let head = world.host.head(&customer.uid()).unwrap();
    assert_eq!(head.seq, customer.with_state(|state| state.seq));
}

#[test]
fn an_older_checkpoint_is_believed_if_all_that_it_was_made_of_is_there_byte_for_byte() {
    let (world, entries) = with_a_checkpoint();
    let uid = world.open().uid();
    let fresh = world.open().state();
    *world.host.belief.lock().unwrap() = Belief::IfReadAgain;
    // Each entry is read, by several at once where the store is far, and none is opened for it.
    for at_once in [1, 4] {
        let storage = Arc::new(Faulty::new(world.memory.clone()));
        storage.read_at_once(at_once);
        let customer = world.open_unchecked(storage.clone(), &world.host).unwrap();
        assert_eq!(customer.state(), fresh);
        assert_eq!(world.host.vouched(&uid), Some(Vouched::ReadAgain(SINCE)));
        let log = storage.log();
        let reads = |seq: u64| {
            let name = entry_name(seq);
            let of_it = log.iter().filter(|line| line.name == name.as_str());
            of_it.filter(|line| line.verb == Verb::Read).count()
        };
        assert!((1..entries - 10).all(|seq| reads(seq) > 0), "{at_once}");
    }
    // One that fails once among those that are read at once is read alone.
    let storage = Arc::new(Faulty::new(world.memory.clone()));
    storage.read_at_once(4);
    world.open_unchecked(storage.clone(), &world.host).unwrap();
    let entry = entry_name(entries - 4);
    let log = storage.log();
    let line = log.iter().find(|line| line.name == entry.as_str()).unwrap();
    let storage = Arc::new(Faulty::new(world.memory.clone()));
    storage.read_at_once(4);
    let kind = StorageErrorKind::Transient;
    storage.add(Fault::FailBefore {
        at: line.number,
        kind,
    });
    let customer = world.open_unchecked(storage.clone(), &world.host).unwrap();
    assert_eq!(customer.state(), fresh);
    assert_eq!(storage.log().len(), log.len() + 1);
    // A byte of any, in its words or in its signature, and another entry of the same host in its place.
    let kept = world.host.checkpoint(&uid).unwrap().content;
    let broken = |name: &ObjectName, bytes: &[u8]| {
        let whole = world.memory.read(name, u64::MAX).unwrap();
        world.host.keep_checkpoint(&uid, &kept, Vouched::Replayed);
        world.memory.plant(name, bytes);
        let storage = Arc::new(world.memory.clone());
        let customer = world.open_unchecked(storage, &world.host).unwrap();
        let error = customer.broken_entry().unwrap();
        assert_eq!(error.name, name.as_str());
        assert_ne!(world.host.vouched(&uid), Some(Vouched::ReadAgain(SINCE)));
        world.memory.plant(name, &whole);
    };
    for seq in [2, 3, 4, 9] {
        let name = entry_name(seq);
        let whole = world.memory.read(&name, u64::MAX).unwrap();
        for at in [120, 300, whole.len() - 20] {
            let mut bad = whole.clone();
            bad[at] ^= 1;
            broken(&name, &bad);
        }
        broken(
            &name,
            &world.memory.read(&entry_name(seq - 1), u64::MAX).unwrap(),
        );
    }
}

#[test]
fn a_checkpoint_does_not_hide_an_entry_that_is_gone() {
    let (world, _) = with_a_checkpoint();
    world.memory.delete(&entry_name(4)).unwrap();
    let customer = world.open();
    let broken = customer.broken_entry().unwrap();
    assert_eq!(broken.kind, RepositoryErrorKind::Damaged);
    assert!(customer.check_ledger().unwrap_err().is_damage());
    world.host.forget();
    assert_eq!(refusal(&world).kind, RepositoryErrorKind::Damaged);
}

#[test]
fn a_checkpoint_of_another_ledger_is_not_believed() {
    let (world, _) = with_a_checkpoint();
    let kept = world.host.checkpoint(&world.open().uid()).unwrap().content;
    let other = World::new();
    let uid = other.open().uid();
    other.host.keep_checkpoint(&uid, &kept, Vouched::Replayed);
    assert!(other.open().state().points.is_empty());
}

#[test]
fn an_entry_changed_below_a_checkpoint_is_found_when_the_ledger_is_checked() {
    let (world, _) = with_a_checkpoint();
    let name = entry_name(4);
    let mut bytes = world.memory.read(&name, u64::MAX).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 2;
    world.memory.plant(&name, &bytes);
    let customer = world.open();
    let error = customer.check_ledger().err().unwrap();
    assert_eq!(error.kind, RepositoryErrorKind::Damaged);
    assert_eq!(error.name, name.as_str());
}

#[test]
fn an_entry_that_goes_after_the_opening_is_named_when_the_ledger_is_checked() {
    let (world, _) = with_a_checkpoint();
    let customer = world.open();
    world.memory.delete(&entry_name(4)).unwrap();
    let error = customer.check_ledger().err().unwrap();
    assert_eq!(error.kind, RepositoryErrorKind::Damaged);
    assert_eq!(error.name, entry_name(4).as_str());
}

#[test]
fn a_checkpoint_that_was_wrong_is_found_when_the_ledger_is_checked_and_replaced() {
    let (world, _) = with_a_checkpoint();
    let open = || {
        let storage = Arc::new(world.memory.clone());
        world.open_unchecked(storage, &world.host).unwrap()
    };
    let uid = open().uid();
    let kept = String::from_utf8(world.host.checkpoint(&uid).unwrap().content).unwrap();
    let wrong = kept.replace("\"suspect\":false", "\"suspect\":true");
    assert_ne!(kept, wrong);
    world
        .host
        .keep_checkpoint(&uid, wrong.as_bytes(), Vouched::Replayed);
    let error = open().check_ledger().err().unwrap();
    assert_eq!(error.kind, RepositoryErrorKind::Damaged);
    assert!(error.detail.contains("run again"), "{error}");
    open().check_ledger().unwrap();
    assert!(open().state().points.values().all(|point| !point.suspect));
}

/// A store in which somebody else has made a customer of the same name, for the same hosts.
fn replaced(world: &World) {
    let storage: Arc<dyn Storage> = Arc::new(world.memory.clone());
    for object in storage.list("customers").unwrap() {
        world.memory.delete(&object.name).unwrap();
    }
    let stranger = TestHost::new(&world.time);
    let new = NewCustomer {
        repository: world.file.repository,
        name: &customer_name(),
        host: stranger.body(),
        recipients: vec![
            stranger.identity.recipient(),
            world.host.identity.recipient(),
        ],
        terms: &Default::default(),
        writers: crate::model::Writers::Many,
    };
    Customer::create(&storage, &new, &*stranger).unwrap();
    let theirs = world.open_on(storage, &stranger).unwrap();
    let admitted = world.host.body();
    theirs.append(|_| Ok(Body::Host(admitted.clone()))).unwrap();
}

#[test]
fn a_sound_ledger_of_somebody_else_under_a_known_name_is_refused() {
    let world = with_points();
    replaced(&world);
    let error = refusal(&world);
    assert_eq!(error.kind, RepositoryErrorKind::Replaced, "{error}");
    assert!(error.detail.contains("does not begin as"), "{error}");
    // Who has never seen the customer has nothing to compare it with.
    world.host.forget();
    world.open();
}

#[test]
fn a_ledger_that_is_gone_is_not_begun_anew_by_who_has_read_it() {
    let world = with_points();
    let storage: Arc<dyn Storage> = Arc::new(world.memory.clone());
    for object in storage.list("customers").unwrap() {
        world.memory.delete(&object.name).unwrap();
    }
    assert_eq!(refusal(&world).kind, RepositoryErrorKind::Replaced);
    let new = NewCustomer {
        repository: world.file.repository,
        name: &customer_name(),
        host: world.host.body(),
        recipients: vec![world.host.identity.recipient()],
        terms: &Default::default(),
        writers: crate::model::Writers::Many,
    };
    let error = Customer::create(&storage, &new, &*world.host).unwrap_err();
    assert_eq!(error.kind, RepositoryErrorKind::Replaced, "{error}");
    world.host.forget();
    assert_eq!(refusal(&world).kind, RepositoryErrorKind::NotFound);
    Customer::create(&storage, &new, &*world.host).unwrap();
}

#[test]
fn a_damaged_entry_below_a_checkpoint_is_told_and_keeps_nobody_from_the_points() {
    let mut world = with_points();
    let customer = world.open();
    for _ in 0..12 {
        change_nothing(&customer);
    }
    for damage in ["a bad byte", "nothing left"] {
        let snapshot = world.memory.snapshot();
        match damage {
            "a bad byte" => {
                let mut entry = world.memory.read(&entry_name(5), 1 << 20).unwrap();
                entry[40] ^= 1;
                world.memory.plant(&entry_name(5), &entry);
            }
            _ => world.memory.delete(&entry_name(5)).unwrap(),
        }
        *world.host.belief.lock().unwrap() = Belief::ForWantOfBetter;
        let customer = world.open();
        assert!(
            customer
                .broken_entry()
                .is_some_and(|error| error.is_damage())
        );
        world.check(&customer);
        assert!(customer.check_ledger().unwrap_err().is_damage(), "{damage}");
        // Without a memory of what the entries made nobody can go by those behind.
        world.host.forget();
        assert!(refusal(&world).is_damage(), "{damage}");
        world.memory.restore_snapshot(&snapshot);
        *world.host.belief.lock().unwrap() = Belief::AsItIs;
        let customer = world.open();
        assert_eq!(customer.broken_entry(), None);
        world.backup(&customer, "web", &image(&[1, 4]), false);
        for _ in 0..12 {
            change_nothing(&customer);
        }
    }
}
