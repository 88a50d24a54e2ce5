//! Prunes of whole customers on real state folders.

use crate::format::certificate::Certificate;
use crate::format::entry::{Body, ClockEvent, CondemnBody, Purpose, ReclaimedBody};
use crate::format::names::CustomerNames;
use crate::jobs::prune::NO_CERTIFICATE_OF_COPIES;
use crate::jobs::testing::{Lab, back_up, prune_with};
use crate::jobs::{
    AlarmKind, JobErrorKind, Looked, Policies, PruneRequest, Quiet, alarms, apply_policy,
    foresee_prune, is_prune_due, plan_prune, prune, undo, why_not_delete,
};
use crate::model::{ObjectHash, ObjectName, PackName, PointId, PointState, SessionId};
use crate::policy::{Action, PolicyTerms, Reason, next_prune_ends};
use crate::repository::testing::{DAY, Running, change, image, restore, vm};
use crate::repository::{Customer, Ledger, RepositoryErrorKind, State};
use crate::storage::{
    Directory, Fault, Faulty, Leftover, Listed, Memory, Storage, StorageError, StorageErrorKind,
    Survey, Verb,
};
use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// A maximum of a week: five nights are kept, and the next prune takes what is older.
fn a_week() -> PolicyTerms {
    PolicyTerms {
        max_retention: "7 days".to_string(),
        timezone: "UTC".to_string(),
        ..PolicyTerms::default()
    }
}

/// Backs up nightly, with a prune after each, until a point was erased; then stops before the prune.
fn nights(lab: &Lab, nights: u32) {
    let customer = lab.open();
    for night in 0..nights {
        back_up(
            &customer,
            "web",
            &image(&[1, 2, 100 + night]),
            night % 7 == 0,
        );
        lab.prune(&customer).unwrap();
        lab.pass(DAY);
    }
}

#[test]
fn what_is_erased_is_certified_once_its_bytes_are_gone() {
    let lab = Lab::new(Arc::new(Memory::new()), &a_week());
    nights(&lab, 8);
    let customer = lab.open();
    back_up(&customer, "web", &image(&[1, 2, 300]), false);
    let pruned = lab.prune(&customer).unwrap();
    assert_eq!(pruned.notes, Vec::<String>::new());
    let certificate = pruned.certificate.unwrap();
    assert!(certificate.erased > 0);
}

#[test]
fn a_prune_after_which_there_is_nothing_new_to_say_signs_nothing() {
    let lab = Lab::new(Arc::new(Memory::new()), &a_week());
    nights(&lab, 1);
    let customer = lab.open();
    assert_eq!(lab.prune(&customer).unwrap().certificate, None);
    nights(&lab, 7);
    assert!(lab.prune(&customer).unwrap().certificate.is_some());
    assert_eq!(lab.prune(&customer).unwrap().certificate, None);
}

#[test]
fn no_certificate_is_signed_over_a_file_that_no_listing_shows() {
    let folder = tempfile::tempdir().unwrap();
    let storage = Arc::new(Directory::init(folder.path(), 0).unwrap());
    let lab = Lab::new(storage, &a_week());
    nights(&lab, 8);
    let customer = lab.open();
    back_up(&customer, "web", &image(&[1, 2, 300]), false);
    // A copy by hand, under a name that no object can have.
    let copy = folder.path().join("customers/acme/points/before the move");
    std::fs::write(&copy, "what a record held").unwrap();
    let pruned = lab.prune(&customer).unwrap();
    assert_eq!(pruned.certificate, None);
    assert!(
        pruned
            .swept
            .unexplained
            .iter()
            .any(|place| place.contains("before the move")),
        "{:?}",
        pruned.swept.unexplained
    );
    std::fs::remove_file(copy).unwrap();
    assert!(lab.prune(&customer).unwrap().certificate.is_some());
}

/// As `cp -a` does.
fn copy(storage: &dyn Storage, from: &str, to: &str) -> Vec<ObjectName> {
    let listed = storage.list(from).unwrap().into_iter();
    let copied = listed.map(|object| {
        let rest = object.name.as_str().strip_prefix(from).unwrap();
        let name = ObjectName::new(&format!("{to}{rest}")).unwrap();
        let bytes = storage.read(&object.name, u64::MAX).unwrap();
        storage.create(&name, &bytes).unwrap();
        name
    });
    copied.collect()
}

#[test]
fn no_certificate_is_signed_while_a_copy_of_the_customer_is_in_the_store() {
    for place in ["customers/acme.bak", "customers-before-the-move/acme"] {
        let lab = Lab::new(Arc::new(Memory::new()), &a_week());
        nights(&lab, 5);
        let copies = copy(&*lab.storage, "customers/acme", place);
        let customer = lab.open();
        let confirm = PruneRequest {
            confirm: true,
            ..PruneRequest::default()
        };
        let mut told = Vec::new();
        for night in 0..3 {
            back_up(&customer, "web", &image(&[1, 2, 300 + night]), false);
            let pruned = prune_with(&customer, &lab.host, confirm).unwrap();
            assert_eq!(pruned.certificate, None);
            told = pruned.swept.unexplained;
            lab.pass(DAY);
        }
        let [told] = &told[..] else {
            panic!("{told:?}")
        };
        assert!(place.starts_with(told.split(' ').next().unwrap()), "{told}");
        assert!(told.contains("no prune does"), "{told}");
        // Nobody knows what it is for: it is left alone.
        for copy in copies {
            assert!(lab.storage.size_bytes(&copy).is_ok());
            lab.storage.delete(&copy).unwrap();
        }
        assert!(lab.prune(&customer).unwrap().certificate.is_some());
        let (erased, certified) = erased_and_certified(&lab);
        assert_eq!(erased, certified);
    }
}

#[test]
fn nobody_is_told_to_remove_what_may_be_a_customer_although_nothing_is_certified_beside_it() {
    let lab = Lab::new(Arc::new(Memory::new()), &a_week());
    nights(&lab, 8);
    let first = ObjectName::new("customers/beta/ledger/0000000000000001").unwrap();
    lab.storage.create(&first, b"damaged").unwrap();
    let customer = lab.open();
    back_up(&customer, "web", &image(&[1, 2, 300]), false);
    let pruned = lab.prune(&customer).unwrap();
    assert_eq!(pruned.certificate, None);
    let [told] = &pruned.swept.unexplained[..] else {
        panic!("{:?}", pruned.swept.unexplained)
    };
    assert!(
        told.contains(first.as_str()) && !told.contains("remove"),
        "{told}"
    );
    lab.storage.delete(&first).unwrap();
    assert!(lab.prune(&customer).unwrap().certificate.is_some());
}

#[test]
fn a_certificate_is_dated_after_the_listing_that_it_rests_on_and_says_when_each_point_was_erased() {
    let ready = || {
        let lab = Lab::new(Arc::new(Memory::new()), &a_week());
        nights(&lab, 7);
        lab
    };
    let lab = ready();
    let store = Arc::new(Faulty::new(lab.storage.clone()));
    lab.prune(&lab.open_on(store.clone(), &lab.host)).unwrap();
    let mut log = store.log().into_iter();
    let last_listing = log.rfind(|line| line.verb == Verb::Survey).unwrap();

    let lab = ready();
    let began = lab.time.now();
    let store = Arc::new(Faulty::new(lab.storage.clone()));
    let customer = lab.open_on(store.clone(), &lab.host);
    let gate = store.freeze_before(last_listing.number);
    let hours = SignedDuration::from_hours(5);
    let told = std::thread::scope(|scope| {
        let thread = scope.spawn(|| lab.prune(&customer).unwrap().certificate);
        assert!(gate.wait_until_reached(Duration::from_secs(10)));
        lab.pass(hours);
        gate.release();
        thread.join().unwrap().unwrap()
    });
    let bytes = lab.storage.read(&told.object, u64::MAX).unwrap();
    let certificate = Certificate::parse(&bytes).unwrap();
    assert_eq!(certificate.issued_at, began + hours);
    assert!(!certificate.erased.is_empty());
    for point in &certificate.erased {
        assert_eq!(point.erased_at, Some(began));
    }
    let date = certificate.issued_at.strftime("%Y%m%dT%H%M%SZ").to_string();
    assert!(told.id.starts_with(&date), "{}", told.id);
}

#[test]
fn a_certificate_is_not_dated_before_what_another_host_did_whose_clock_is_ahead() {
    let lab = Lab::new(Arc::new(Memory::new()), &a_week());
    nights(&lab, 1);
    let point = back_up(&lab.open(), "db", &image(&[7, 8]), true);
    let ahead = SignedDuration::from_mins(3);
    lab.pass(ahead);
    let erased_at = lab.time.now();
    let other = lab.open_second();
    change(&other, point, Body::Expire).unwrap();
    change(&other, point, Body::Erase).unwrap();
    lab.pass(-ahead);
    let told = lab.prune(&lab.open()).unwrap().certificate.unwrap();
    let bytes = lab.storage.read(&told.object, u64::MAX).unwrap();
    let certificate = Certificate::parse(&bytes).unwrap();
    assert_eq!(certificate.erased[0].erased_at, Some(erased_at));
    assert_eq!(certificate.issued_at, erased_at);
}

#[test]
fn what_is_over_and_locked_counts_among_the_bytes_that_a_certificate_says_are_left() {
    let memory = Memory::new();
    let lab = Lab::new(Arc::new(memory.clone()), &a_week());
    nights(&lab, 7);
    let pack = lab.open().names().pack(&PackName {
        session: SessionId::from_bytes([9; 16]),
        hash: ObjectHash::from_bytes([9; 32]),
    });
    memory.create(&pack, b"of an aborted session").unwrap();
    let store = Arc::new(Refusing {
        memory: memory.clone(),
        records: vec![pack],
        is_deleted: false,
        kind: StorageErrorKind::Locked,
    });
    let customer = lab.open_on(store, &lab.host);
    let pruned = lab.prune(&customer).unwrap();
    assert_eq!(pruned.swept.locked.len(), 1);
    let told = pruned.certificate.unwrap();
    let bytes = memory.read(&told.object, u64::MAX).unwrap();
    let certificate = Certificate::parse(&bytes).unwrap();
    let marked: u64 = customer.with_state(|state| {
        let marks = state.marks.values();
        marks.map(|mark| mark.dead_bytes).sum()
    });
    let locked = b"of an aborted session".len() as u64;
    assert_eq!(certificate.unreadable_bytes_left, marked + locked);
    assert_eq!(certificate.unreadable_bytes_deadline, None);
    assert_eq!(certificate.destroyed, []);
}

#[test]
fn of_a_store_that_is_copied_elsewhere_nothing_is_certified_until_it_is_not() {
    let lab = Lab::new(Arc::new(Memory::new()), &a_week());
    nights(&lab, 8);
    let customer = lab.open();
    back_up(&customer, "web", &image(&[1, 2, 300]), false);
    let copied = PruneRequest {
        copies_elsewhere: true,
        ..PruneRequest::default()
    };
    let pruned = prune_with(&customer, &lab.host, copied).unwrap();
    assert_eq!(pruned.certificate, None);
    assert!(!pruned.erased.is_empty());
    assert_eq!(pruned.notes, [NO_CERTIFICATE_OF_COPIES]);
    let certificate = lab.prune(&customer).unwrap().certificate.unwrap();
    assert_eq!(certificate.erased, pruned.erased.len());
    // Nothing is left to certify, and nothing to be said.
    let pruned = prune_with(&customer, &lab.host, copied).unwrap();
    assert_eq!(pruned.notes, Vec::<String>::new());
}

#[test]
fn a_shortened_policy_waits_for_whoever_confirms_it_and_for_a_clock_that_may_delete() {
    for wrong_by in [DAY * -2000, DAY * 3650] {
        let lab = Lab::new(Arc::new(Memory::new()), &PolicyTerms::default());
        nights(&lab, 12);
        let customer = lab.open();
        let apply = |confirm| apply_policy(&customer, &lab.host, &a_week(), confirm).unwrap();
        assert!(matches!(apply(false), Policies::NeedsConfirmation { .. }));
        lab.pass(wrong_by);
        for confirm in [false, true] {
            assert!(matches!(apply(confirm), Policies::ClockRefused { .. }));
        }
        lab.pass(-wrong_by);
        assert!(matches!(apply(false), Policies::NeedsConfirmation { .. }));
        assert_eq!(apply(true), Policies::Applied);
    }
}

#[test]
fn what_erased_points_leave_goes_by_a_shortened_deadline_as_they_do() {
    let two_months = PolicyTerms {
        keep_after_window: "none".to_string(),
        ..PolicyTerms::default()
    };
    let lab = Lab::new(Arc::new(Memory::new()), &two_months);
    nights(&lab, 24);
    let customer = lab.open();
    assert!(!customer.state().marks.is_empty());
    let shorter = PolicyTerms {
        max_retention: "40 days".to_string(),
        ..two_months
    };
    let before = customer.state();
    assert_eq!(
        apply_policy(&customer, &lab.host, &shorter, true).unwrap(),
        Policies::Applied
    );
    let state = customer.state();
    let erased = |state: &State| {
        let erased = state
            .points
            .values()
            .filter(|point| point.state == PointState::Erased);
        erased.map(|point| point.deadline).min().unwrap()
    };
    assert!(erased(&state) < erased(&before));
    for (pack, mark) in &state.marks {
        assert!(mark.earliest_deadline < before.marks[pack].earliest_deadline);
        assert!(mark.earliest_deadline >= erased(&state));
    }
}

/// Every point that the ledger erased, and those that its certificates name as erased.
fn erased_and_certified(lab: &Lab) -> (BTreeSet<PointId>, BTreeSet<PointId>) {
    let customer = lab.open();
    let (mut erased, mut certified) = (BTreeSet::new(), BTreeSet::new());
    let names = CustomerNames::new(customer.name());
    Ledger::replay(lab.storage.clone(), names, |entry, verdict| {
        assert_eq!(verdict, Ok(()));
        if let Body::Erase(body) = &entry.body {
            erased.extend(body.points.iter().map(|row| row.point));
        }
    })
    .unwrap();
    for row in &customer.state().certificates {
        let object = customer.names().certificate(&format!("{}.json", row.id));
        let bytes = lab.storage.read(&object.unwrap(), u64::MAX).unwrap();
        let certificate = Certificate::parse(&bytes).unwrap();
        certified.extend(certificate.erased.iter().map(|row| row.point));
    }
    (erased, certified)
}

#[test]
fn an_erasure_at_any_moment_of_another_hosts_certificate_gets_into_one() {
    // The certificate is the last thing that a prune does.
    let operations = |lab: &Lab| {
        let store = Arc::new(Faulty::new(lab.storage.clone()));
        let customer = lab.open_on(store.clone(), &lab.host);
        assert!(lab.prune(&customer).unwrap().certificate.is_some());
        store.operations()
    };
    let ready = || {
        let lab = Lab::new(Arc::new(Memory::new()), &a_week());
        nights(&lab, 7);
        let point = back_up(&lab.open(), "db", &image(&[7, 8]), true);
        (lab, point)
    };
    let total = operations(&ready().0);
    for at in total - 14..=total {
        let (lab, point) = ready();
        let store = Arc::new(Faulty::new(lab.storage.clone()));
        let (customer, other) = (lab.open_on(store.clone(), &lab.host), lab.open_second());
        let gate = store.freeze_before(at);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| lab.prune(&customer).unwrap());
            let _reached = gate.wait_until_reached(Duration::from_millis(500));
            change(&other, point, Body::Expire).unwrap();
            change(&other, point, Body::Erase).unwrap();
            let record = other.names().point(&point);
            lab.storage.destroy(&record).unwrap();
            gate.release();
            thread.join().unwrap();
        });
        lab.prune(&other).unwrap();
        let (erased, certified) = erased_and_certified(&lab);
        assert!(erased.contains(&point));
        assert_eq!(erased, certified, "before operation {at} of {total}");
    }
}

#[test]
fn a_record_whose_erasure_was_cut_short_goes_at_once_even_if_nothing_can_be_reclaimed() {
    // Somebody died between the entry and the record.
    let ready = || {
        let lab = Lab::new(Arc::new(Memory::new()), &a_week());
        nights(&lab, 3);
        let customer = lab.open();
        let point = customer.base(&vm("web")).unwrap();
        change(&customer, point, Body::Expire).unwrap();
        change(&customer, point, Body::Erase).unwrap();
        (lab, customer.names().point(&point))
    };
    let (lab, _) = ready();
    let store = Arc::new(Faulty::new(lab.storage.clone()));
    lab.prune(&lab.open_on(store.clone(), &lab.host)).unwrap();
    let log = store.log();
    let first_pack = log.iter().find(|line| line.name.contains("/packs/"));
    let at = first_pack.unwrap().number;

    let (lab, record) = ready();
    let kind = StorageErrorKind::Denied;
    let fault = Fault::FailBefore { at, kind };
    let store = Arc::new(Faulty::with_faults(lab.storage.clone(), vec![fault]));
    let result = lab.prune(&lab.open_on(store, &lab.host));
    assert!(result.is_err());
    let left = lab.storage.size_bytes(&record).map_err(|error| error.kind);
    assert_eq!(left, Err(StorageErrorKind::NotFound));
}

fn packs(lab: &Lab) -> BTreeSet<ObjectName> {
    let listed = lab.storage.list("customers").unwrap().into_iter();
    listed
        .map(|object| object.name)
        .filter(|name| name.as_str().contains("/packs/"))
        .collect()
}

/// Two VMs without a restore point that is left.
fn two_that_are_erased() -> Lab {
    let lab = Lab::new(Arc::new(Memory::new()), &a_week());
    nights(&lab, 1);
    let customer = lab.open();
    back_up(&customer, "db", &image(&[7, 8]), true);
    for name in ["web", "db"] {
        let point = customer.base(&vm(name)).unwrap();
        change(&customer, point, Body::Expire).unwrap();
        change(&customer, point, Body::Erase).unwrap();
    }
    lab
}

#[test]
fn a_pack_that_cannot_be_deleted_keeps_no_other_from_going_and_is_told() {
    let lab = two_that_are_erased();
    let all = packs(&lab).len();
    assert!(all > 2);
    for at in 0..all {
        let lab = two_that_are_erased();
        let kept = packs(&lab).into_iter().nth(at).unwrap();
        let store = Arc::new(Faulty::new(lab.storage.clone()));
        let name = kept.clone();
        store.add(Fault::Keep { name });
        let customer = lab.open_on(store, &lab.host);
        // What is new goes, too, while it stays.
        for _ in 0..2 {
            let refused = lab.prune(&customer).unwrap().reclaimed.refused.unwrap();
            assert_eq!(refused.kind, StorageErrorKind::Denied);
            assert_eq!(refused.name, kept.as_str());
            // Bytes are left, so that nothing can be certified as destroyed.
            assert!(customer.state().without_bytes().is_empty());
            assert_eq!(packs(&lab), BTreeSet::from([kept.clone()]));
            back_up(&customer, "web", &image(&[1, 2]), true);
            let point = customer.base(&vm("web")).unwrap();
            change(&customer, point, Body::Expire).unwrap();
            change(&customer, point, Body::Erase).unwrap();
        }
        let pruned = lab.prune(&lab.open()).unwrap();
        assert!(pruned.certificate.is_some());
        assert_eq!(packs(&lab), BTreeSet::new());
    }
}

#[test]
fn where_nothing_can_be_deleted_one_pack_at_most_is_rewritten() {
    let lab = Lab::new(Arc::new(Memory::new()), &a_week());
    nights(&lab, 7);
    let store = Arc::new(Faulty::new(lab.storage.clone()));
    let before = packs(&lab);
    for name in &before {
        let name = name.clone();
        store.add(Fault::Keep { name });
    }
    let customer = lab.open_on(store, &lab.host);
    let refused = lab.prune(&customer).unwrap().reclaimed.refused;
    assert!(refused.is_some());
    let after = packs(&lab);
    assert!(after.is_superset(&before));
    assert!(after.len() <= before.len() + 1, "{} packs", after.len());
}

/// A VM that was erased in part, with a node of what is left that does not open.
fn damaged(lab: &Lab) -> Customer {
    nights(lab, 1);
    let customer = lab.open();
    let first = customer.base(&vm("web")).unwrap();
    back_up(&customer, "web", &image(&[1, 2, 200]), false);
    back_up(&customer, "db", &image(&[7, 8]), true);
    change(&customer, first, Body::Expire).unwrap();
    change(&customer, first, Body::Erase).unwrap();
    let record = customer.base(&vm("db")).unwrap();
    let record = customer.names().point(&record);
    lab.storage.delete(&record).unwrap();
    lab.storage.create(&record, b"damaged").unwrap();
    customer
}

#[test]
fn damage_holds_a_reclaim_back_until_the_next_prune_may_come_too_late() {
    // Both are at ten in the evening; the next night's window ends at six, its prune at eight.
    for (hours, held_back) in [(25, false), (49, true)] {
        let lab = Lab::new(Arc::new(Memory::new()), &a_week());
        let customer = damaged(&lab);
        let deadline = customer.with_state(|state| {
            let erased = state
                .points
                .values()
                .find(|point| point.erase_seq.is_some());
            erased.map(|point| point.deadline)
        });
        let left = deadline.unwrap().duration_since(lab.time.now());
        lab.pass(left - SignedDuration::from_hours(hours));
        lab.vouch();
        let pruned = lab.prune(&customer).unwrap();
        assert_eq!(pruned.damage.is_some(), held_back, "{hours} h");
        // Gone on over, it is told all the same.
        assert_eq!(pruned.unreadable.is_empty(), held_back, "{hours} h");
        assert_eq!(pruned.reclaimed.removed.is_empty(), held_back, "{hours} h");
    }
}

#[test]
fn what_cannot_be_read_is_told_by_every_prune_that_goes_on_over_it() {
    let lab = Lab::new(Arc::new(Memory::new()), &a_week());
    nights(&lab, 8);
    let customer = lab.open();
    let point = back_up(&customer, "db", &image(&[7, 8]), true);
    let record = customer.names().point(&point);
    lab.storage.delete(&record).unwrap();
    lab.storage.create(&record, b"damaged").unwrap();
    for night in 0..3 {
        back_up(&customer, "web", &image(&[1, 2, 300 + night]), false);
        let pruned = lab.prune(&customer).unwrap();
        // What was erased this night must be gone before the next prune has ended.
        assert_eq!(pruned.damage, None, "night {night}");
        let [told] = &pruned.unreadable[..] else {
            panic!("night {night}: {:?}", pruned.unreadable)
        };
        assert!(told.contains(&point.to_string()), "{told}");
        assert!(told.contains("db of "), "{told}");
        lab.pass(DAY);
    }
}

/// A store that refuses to remove these records, or only to overwrite them.
struct Refusing {
    memory: Memory,
    records: Vec<ObjectName>,
    is_deleted: bool,
    kind: StorageErrorKind,
}

impl Refusing {
    fn refuse(&self, name: &ObjectName) -> Result<(), StorageError> {
        match self.records.contains(name) {
            true => Err(StorageError::new(self.kind, name, "a test")),
            false => Ok(()),
        }
    }
}

impl Storage for Refusing {
    fn behind(&self) -> Option<&dyn Storage> {
        Some(&self.memory)
    }

    fn create(&self, name: &ObjectName, data: &[u8]) -> Result<(), StorageError> {
        self.memory.create(name, data)
    }

    fn read(&self, name: &ObjectName, max_bytes: u64) -> Result<Vec<u8>, StorageError> {
        self.memory.read(name, max_bytes)
    }

    fn read_range(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StorageError> {
        self.memory.read_range(name, offset, buffer)
    }

    fn size_bytes(&self, name: &ObjectName) -> Result<u64, StorageError> {
        self.memory.size_bytes(name)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>, StorageError> {
        self.memory.list(prefix)
    }

    fn delete(&self, name: &ObjectName) -> Result<(), StorageError> {
        if !self.is_deleted {
            self.refuse(name)?;
        }
        self.memory.delete(name)
    }

    fn destroy(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.refuse(name)?;
        self.memory.destroy(name)
    }

    fn sweep_leftovers(&self, prefix: &str) -> Result<Vec<Leftover>, StorageError> {
        self.memory.sweep_leftovers(prefix)
    }

    fn survey(&self, prefix: &str) -> Result<Survey, StorageError> {
        self.memory.survey(prefix)
    }

    fn location(&self) -> String {
        "refusing".to_string()
    }
}

/// Two erased points whose records are still there, and a third that is at its last chance.
fn two_records_and_a_point_that_are_due() -> (Lab, Memory, Vec<ObjectName>, PointId) {
    let memory = Memory::new();
    let lab = Lab::new(Arc::new(memory.clone()), &a_week());
    let customer = lab.open();
    let due = back_up(&customer, "mail", &image(&[5]), true);
    let mut records = Vec::new();
    for (name, chunk) in [("web", 1), ("db", 7)] {
        let point = back_up(&customer, name, &image(&[chunk]), true);
        change(&customer, point, Body::Expire).unwrap();
        change(&customer, point, Body::Erase).unwrap();
        records.push(customer.names().point(&point));
    }
    let deadline = customer.with_state(|state| state.points[&due].deadline);
    let left = deadline.duration_since(lab.time.now());
    lab.pass(left - SignedDuration::from_hours(25));
    lab.vouch();
    (lab, memory, records, due)
}

#[test]
fn a_record_that_cannot_be_removed_keeps_nothing_else_from_going_and_is_told() {
    for at in 0..2 {
        let (lab, memory, records, due) = two_records_and_a_point_that_are_due();
        let kept = &records[at];
        let store = Arc::new(Refusing {
            memory: memory.clone(),
            records: vec![kept.clone()],
            is_deleted: false,
            kind: StorageErrorKind::Denied,
        });
        let customer = lab.open_on(store, &lab.host);
        let pruned = lab.prune(&customer).unwrap();
        assert_eq!((pruned.expired, pruned.erased), (vec![due], vec![due]));
        let left = memory.list(&customer.names().points_prefix()).unwrap();
        let left: Vec<_> = left.into_iter().map(|object| object.name).collect();
        assert_eq!(left, std::slice::from_ref(kept));
        let refused = pruned.swept.refused.unwrap();
        assert_eq!(refused.kind, StorageErrorKind::Denied);
        assert_eq!(refused.name, kept.as_str());
        assert!(pruned.reclaimed.freed_bytes > 0);
        assert_eq!(pruned.certificate, None);
        let pruned = lab.prune(&lab.open()).unwrap();
        assert_eq!(pruned.swept.refused, None);
        assert_eq!(pruned.certificate.unwrap().erased, 3);
    }
}

#[test]
fn a_record_that_cannot_be_overwritten_is_deleted_and_that_is_told() {
    let (lab, memory, records, _) = two_records_and_a_point_that_are_due();
    let store = Arc::new(Refusing {
        memory: memory.clone(),
        records: records.clone(),
        is_deleted: true,
        kind: StorageErrorKind::Denied,
    });
    let customer = lab.open_on(store, &lab.host);
    let pruned = lab.prune(&customer).unwrap();
    assert_eq!(memory.list(&customer.names().points_prefix()), Ok(vec![]));
    assert_eq!(pruned.swept.refused, None);
    for record in &records {
        let says =
            |note: &&String| note.contains("not overwritten") && note.contains(record.as_str());
        assert_eq!(
            pruned.notes.iter().filter(says).count(),
            1,
            "{:?}",
            pruned.notes
        );
    }
    assert!(pruned.certificate.is_some());
}

#[test]
fn a_store_that_is_out_of_reach_ends_a_prune_at_the_first_record() {
    let (lab, _, _, _) = two_records_and_a_point_that_are_due();
    let store = Arc::new(Faulty::new(lab.storage.clone()));
    lab.prune(&lab.open_on(store.clone(), &lab.host)).unwrap();
    let is_destroy = |line: &&crate::storage::Operation| line.verb == Verb::Destroy;
    let at = store.log().iter().find(is_destroy).unwrap().number;

    let (lab, _, _, due) = two_records_and_a_point_that_are_due();
    let kind = StorageErrorKind::Transient;
    let faults = (at..at + 50).map(|at| Fault::FailBefore { at, kind });
    let store = Arc::new(Faulty::with_faults(lab.storage.clone(), faults.collect()));
    lab.prune(&lab.open_on(store.clone(), &lab.host))
        .unwrap_err();
    let log = store.log();
    let destroyed = log.iter().filter(|line| line.verb == Verb::Destroy);
    assert_eq!(destroyed.count(), 1);
    let state = lab.open().with_state(|state| state.points[&due].state);
    assert_eq!(state, PointState::Live);
}

#[test]
fn bytes_that_the_store_does_not_delete_are_over_the_maximum_after_their_deadline() {
    let lab = two_that_are_erased();
    let store = Arc::new(Faulty::new(lab.storage.clone()));
    let name = packs(&lab).into_iter().next().unwrap();
    store.add(Fault::Keep { name });
    let customer = lab.open_on(store, &lab.host);
    assert!(lab.prune(&customer).unwrap().reclaimed.refused.is_some());
    let deadline = customer.with_state(|state| {
        let points = state.points.values();
        points.map(|point| point.deadline).min().unwrap()
    });
    let is_over = |customer: &Customer, now: Timestamp| {
        let alarms = customer.with_state(|state| alarms(state, &[], &Looked::default(), now));
        alarms.iter().any(|one| one.kind == AlarmKind::OverMaximum)
    };
    let second = SignedDuration::from_secs(1);
    assert!(!is_over(&customer, deadline - second));
    assert!(is_over(&customer, deadline));
    // Once it is gone, nothing is.
    let customer = lab.open();
    lab.prune(&customer).unwrap();
    assert!(!is_over(&customer, deadline));
}

#[test]
fn a_prune_gives_a_reason_for_each_point_that_it_expires_and_erases() {
    let lab = Lab::new(Arc::new(Memory::new()), &a_week());
    nights(&lab, 5);
    let customer = lab.open();
    let (mut expired, mut erased) = (0, 0);
    for night in 0..4 {
        back_up(&customer, "web", &image(&[1, 2, 400 + night]), false);
        let pruned = lab.prune(&customer).unwrap();
        let done = |action: Action| -> Vec<PointId> {
            let rows = pruned.decisions.iter().filter(|row| row.action == action);
            rows.map(|row| row.point).collect()
        };
        assert_eq!(done(Action::Expire), pruned.expired);
        assert_eq!(done(Action::Erase), pruned.erased);
        expired += pruned.expired.len();
        erased += pruned.erased.len();
        // What stays has its row as well.
        for (point, _) in customer.state().roots() {
            assert!(pruned.decisions.iter().any(|row| row.point == *point));
        }
        lab.pass(DAY);
    }
    assert!(
        expired > 0 && erased > 0,
        "{expired} expired, {erased} erased"
    );
}

#[test]
fn what_damage_keeps_from_being_counted_is_not_certified() {
    let lab = Lab::new(Arc::new(Memory::new()), &PolicyTerms::default());
    let pruned = lab.prune(&damaged(&lab)).unwrap();
    assert!(pruned.damage.is_some());
    assert_eq!(pruned.certificate, None);
    let says = |note: &String| note.contains("not counted yet");
    assert!(pruned.notes.iter().any(says), "{:?}", pruned.notes);
}

#[test]
fn damage_holds_back_what_is_due_when_the_next_prune_has_surely_ended() {
    let lab = Lab::new(Arc::new(Memory::new()), &a_week());
    // Points of eight in the morning, when the next prune has ended as well.
    lab.pass(SignedDuration::from_hours(9));
    let customer = damaged(&lab);
    let due = customer.with_state(|state| state.unmarked_erasures().into_values().min());
    let due = due.unwrap();
    let left = due.duration_since(lab.time.now());
    lab.pass(left - SignedDuration::from_hours(34));
    lab.vouch();
    let next = customer
        .with_state(|state| next_prune_ends(state.policy.as_ref().unwrap(), lab.time.now()));
    assert_eq!(next, due);
    assert!(lab.prune(&customer).unwrap().damage.is_some());
}

#[test]
fn dead_bytes_leave_a_quarter_of_the_budget_before_their_deadline() {
    for (hours, leave) in [(200, false), (80, true)] {
        let lab = Lab::new(Arc::new(Memory::new()), &PolicyTerms::default());
        let customer = lab.open();
        let first = back_up(&customer, "web", &image(&[1, 2, 100]), true);
        back_up(&customer, "web", &image(&[1, 2, 200]), false);
        change(&customer, first, Body::Expire).unwrap();
        change(&customer, first, Body::Erase).unwrap();
        let due = customer.with_state(|state| state.points[&first].deadline);
        let left = due.duration_since(lab.time.now());
        lab.pass(left - SignedDuration::from_hours(hours));
        lab.vouch();
        // Holds two chunks of the first point's pack, which is not half dead.
        back_up(&customer, "web", &image(&[1, 2, 300]), false);
        let pruned = lab.prune(&customer).unwrap();
        assert_eq!(pruned.reclaimed.rewritten_bytes > 0, leave, "{hours} h");
    }
}

#[test]
fn a_prune_that_dies_at_any_operation_is_gone_on_with_by_the_next() {
    let ready = || {
        let lab = Lab::new(Arc::new(Memory::new()), &a_week());
        nights(&lab, 7);
        lab
    };
    let lab = ready();
    let store = Arc::new(Faulty::new(lab.storage.clone()));
    let customer = lab.open_on(store.clone(), &lab.host);
    let before = store.operations();
    lab.prune(&customer).unwrap();
    let total = store.operations();
    for (at, applied) in (before + 1..=total)
        .step_by(3)
        .zip([true, false].into_iter().cycle())
    {
        let lab = ready();
        let fault = Fault::CrashAt { at, applied };
        let store = Arc::new(Faulty::with_faults(lab.storage.clone(), vec![fault]));
        let _died = lab.prune(&lab.open_on(store, &lab.host));
        let customer = lab.open();
        let pruned = lab.prune(&customer).unwrap();
        let place = format!("operation {at} of {total}, applied: {applied}");
        assert_eq!(pruned.swept.unexplained, Vec::<String>::new(), "{place}");
        assert!(pruned.damage.is_none(), "{place}");
        let (erased, certified) = erased_and_certified(&lab);
        assert_eq!(erased, certified, "{place}");
        assert!(!erased.is_empty(), "{place}");
        let records = lab.storage.list(&customer.names().points_prefix()).unwrap();
        let state = customer.state();
        assert_eq!(records.len(), state.roots().count(), "{place}");
        for (point, _) in state.live() {
            assert!(restore(&customer, point).is_ok(), "{place}");
        }
        assert!(state.open.is_empty(), "{place}");
    }
}

#[test]
fn an_undo_brings_back_what_is_expired_and_nothing_else() {
    let lab = Lab::new(Arc::new(Memory::new()), &a_week());
    nights(&lab, 1);
    let store = Arc::new(Faulty::new(lab.storage.clone()));
    let customer = lab.open_on(store.clone(), &lab.host);
    let point = customer.base(&vm("web")).unwrap();
    let undo = || undo(&customer, point, "asked for").map_err(|error| error.kind);
    assert_eq!(undo(), Err(JobErrorKind::Refused));
    change(&customer, point, Body::Expire).unwrap();
    let (at, kind) = (store.operations() + 1, StorageErrorKind::Denied);
    store.add(Fault::FailBefore { at, kind });
    let denied = RepositoryErrorKind::Storage(kind);
    assert_eq!(undo(), Err(JobErrorKind::Repository(denied)));
    assert_eq!(undo(), Ok(()));
    assert!(restore(&customer, &point).is_ok());
    change(&customer, point, Body::Expire).unwrap();
    change(&customer, point, Body::Erase).unwrap();
    assert_eq!(undo(), Err(JobErrorKind::Refused));
}

#[test]
fn a_prune_counts_the_dead_sessions_that_it_ends() {
    let lab = Lab::new(Arc::new(Memory::new()), &a_week());
    let customer = lab.open();
    drop(Running::write(&customer, "web", &image(&[1, 2]), true).unwrap());
    drop(Running::write(&customer, "db", &image(&[3]), true).unwrap());
    assert_eq!(lab.prune(&customer).unwrap().aborted_sessions, 2);
    assert_eq!(lab.prune(&customer).unwrap().aborted_sessions, 0);
}

#[test]
fn what_an_operator_vouches_for_is_written_down() {
    let lab = Lab::new(Arc::new(Memory::new()), &a_week());
    let customer = lab.open();
    let trusted = || {
        let names = CustomerNames::new(customer.name());
        let mut trusted = 0;
        Ledger::replay(lab.storage.clone(), names, |entry, _| {
            if let Body::Clock(body) = &entry.body {
                trusted += usize::from(body.event == ClockEvent::Trusted);
            }
        })
        .unwrap();
        trusted
    };
    for vouched in [false, true] {
        let (request, stop) = (PruneRequest::default(), AtomicBool::new(false));
        prune(&customer, &lab.host, request, vouched, &Quiet, &stop).unwrap();
        assert_eq!(trusted(), usize::from(vouched));
    }
}

#[test]
fn a_point_at_its_last_chance_is_expired_and_erased_in_one_prune() {
    let lab = Lab::new(Arc::new(Memory::new()), &a_week());
    let customer = lab.open();
    let point = back_up(&customer, "web", &image(&[1]), true);
    let due = customer.with_state(|state| state.points[&point].deadline);
    let left = due.duration_since(lab.time.now());
    lab.pass(left - SignedDuration::from_hours(25));
    lab.vouch();
    let pruned = lab.prune(&customer).unwrap();
    assert_eq!((pruned.expired, pruned.erased), (vec![point], vec![point]));
}

#[test]
fn a_prune_forgets_more_deleted_packs_than_one_entry_names() {
    let lab = Lab::new(Arc::new(Memory::new()), &a_week());
    let customer = lab.open();
    let packs: Vec<PackName> = (0..4100_u32)
        .map(|number| PackName {
            session: SessionId::from_bytes([1; 16]),
            hash: ObjectHash::from_bytes(*blake3::hash(&number.to_le_bytes()).as_bytes()),
        })
        .collect();
    let begun = customer.begin(Purpose::Reclaim, None).unwrap();
    let condemned = CondemnBody {
        session: begun.id,
        packs: packs.clone(),
        segments: Vec::new(),
    };
    let deleted = ReclaimedBody {
        session: None,
        marked_at: 0,
        deleted: packs,
        marks: Vec::new(),
        certificate: None,
        destroyed: Vec::new(),
    };
    for body in [Body::Condemn(condemned), Body::Reclaimed(deleted)] {
        customer.append(|_| Ok(body.clone())).unwrap();
    }
    assert_eq!(customer.with_state(|state| state.condemned.len()), 4100);
    lab.prune(&customer).unwrap();
    assert!(customer.with_state(|state| state.condemned.is_empty()));
}

#[test]
fn what_a_prune_removes_is_told_once() {
    let memory = Memory::new();
    let lab = Lab::new(Arc::new(memory.clone()), &a_week());
    let customer = lab.open();
    for (late, leftover) in [(false, true), (true, false), (true, true)] {
        if late {
            let pack = customer.names().pack(&PackName {
                session: SessionId::from_bytes([9; 16]),
                hash: ObjectHash::from_bytes([9; 32]),
            });
            lab.storage.create(&pack, b"of no session").unwrap();
        }
        if leftover {
            memory.plant_leftover("temporary", 7);
        }
        let swept = lab.prune(&customer).unwrap().swept;
        let told = (swept.removed.len(), swept.leftovers_removed.len());
        assert_eq!(told, (usize::from(late), usize::from(leftover)));
    }
}

#[test]
fn a_confirmed_prune_erases_without_the_wait() {
    let lab = Lab::new(Arc::new(Memory::new()), &PolicyTerms::default());
    nights(&lab, 2);
    let customer = lab.open();
    let point = customer.base(&vm("web")).unwrap();
    change(&customer, point, Body::Expire).unwrap();
    let pruned = lab.prune(&customer).unwrap();
    let waits = |action: &Action| matches!(action, Action::AwaitErase { .. });
    assert!(
        pruned
            .decisions
            .iter()
            .any(|row| row.point == point && waits(&row.action))
    );
    assert_eq!(pruned.erased, []);
    let confirm = PruneRequest {
        confirm: true,
        ..PruneRequest::default()
    };
    let planned = customer.with_state(|state| plan_prune(state, lab.time.now(), confirm));
    let row = planned.iter().find(|row| row.point == point).unwrap();
    // Nothing is said of a wait that is over, nor of an undo that there is not.
    assert_eq!(
        (row.action, &row.reason),
        (Action::Erase, &Reason::Confirmed)
    );
    let pruned = prune_with(&customer, &lab.host, confirm).unwrap();
    assert_eq!(pruned.erased, [point]);
    let state = customer.with_state(|state| state.points.get(&point).map(|row| row.state));
    assert_ne!(state, Some(PointState::Expired));
}

#[test]
fn a_prune_that_is_foreseen_is_the_one_that_is_done() {
    for confirm in [false, true] {
        let lab = Lab::new(Arc::new(Memory::new()), &a_week());
        nights(&lab, 6);
        let customer = lab.open();
        let newest = customer.base(&vm("web")).unwrap();
        change(&customer, newest, Body::Expire).unwrap();
        let request = PruneRequest {
            confirm,
            ..PruneRequest::default()
        };
        let now = lab.time.now();
        let foreseen = customer.with_state(|state| foresee_prune(state, now, request));
        let pruned = prune_with(&customer, &lab.host, request).unwrap();
        assert_eq!(foreseen, pruned.decisions);
        assert!(!pruned.expired.is_empty());
        // What it expires itself a confirmed one erases as well.
        let erased = |point: &PointId| pruned.erased.contains(point);
        assert_eq!(erased(&newest), confirm);
        assert!(!confirm || pruned.expired.iter().all(erased));
    }
}

#[test]
fn a_prune_is_due_for_what_is_to_go_and_for_nothing_else() {
    let lab = Lab::new(Arc::new(Memory::new()), &a_week());
    let customer = lab.open();
    let is_due = || customer.with_state(|state| is_prune_due(state, lab.time.now()));
    assert!(!is_due());
    back_up(&customer, "web", &image(&[1]), true);
    assert!(!is_due());
    lab.pass(DAY * 6);
    assert!(is_due());
    lab.vouch();
    lab.prune(&customer).unwrap();
    assert!(!is_due());
}

#[test]
fn a_clock_is_asked_only_where_something_could_be_deleted() {
    let lab = Lab::new(Arc::new(Memory::new()), &a_week());
    let customer = lab.open();
    lab.pass(DAY * 2000);
    let refused = || customer.with_state(|state| why_not_delete(state, &lab.host).is_some());
    let before = customer.state();
    lab.prune(&customer).unwrap();
    assert!(!refused());
    assert_eq!(customer.state(), before);
    // What nobody has explained is no business of a clock that is not believed.
    let confirm = PruneRequest {
        confirm: true,
        ..PruneRequest::default()
    };
    let clock = |request| {
        let error = prune_with(&customer, &lab.host, request).unwrap_err();
        assert!(matches!(error.kind, JobErrorKind::Clock(_)), "{error}");
        error.message
    };
    clock(confirm);
    back_up(&customer, "web", &image(&[1]), true);
    assert!(refused());
    let message = clock(PruneRequest::default());
    let start = "customer acme: nothing was deleted: ";
    assert!(message.starts_with(start), "{message}");
}

/// A prune whose first operation fails like that: what it noted, and whether it used the reserve.
fn noted_after(
    failure: Option<StorageErrorKind>,
    storage: Arc<dyn Storage>,
    has_reserve: bool,
) -> (Option<Vec<String>>, bool) {
    let lab = Lab::new(storage, &a_week());
    let store = Arc::new(Faulty::new(lab.storage.clone()));
    let customer = lab.open_on(store.clone(), &lab.host);
    let at = store.operations() + 1;
    if let Some(kind) = failure {
        store.add(Fault::FailBefore { at, kind });
    }
    let request = PruneRequest {
        has_reserve,
        ..PruneRequest::default()
    };
    let pruned = prune_with(&customer, &lab.host, request);
    let released = |verb| verb == Verb::ReleaseReserve;
    let log = store.log();
    (
        pruned.ok().map(|pruned| pruned.notes),
        log.iter().any(|line| released(line.verb)),
    )
}

#[test]
fn only_a_full_store_costs_the_reserve_and_a_missing_one_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let with_reserve = |name: &str| -> Arc<dyn Storage> {
        Arc::new(Directory::init(&folder.path().join(name), 4096).unwrap())
    };
    let (full, denied) = (StorageErrorKind::Full, StorageErrorKind::Denied);
    let quiet = (Some(Vec::new()), false);
    assert_eq!(noted_after(None, with_reserve("one"), true), quiet);
    let (notes, released) = noted_after(Some(full), with_reserve("two"), true);
    let notes = notes.unwrap();
    assert!(released && notes.len() == 1, "{notes:?}");
    assert!(notes[0].contains("was full"), "{notes:?}");
    let outcome = noted_after(Some(denied), with_reserve("three"), true);
    assert_eq!(outcome, (None, false));

    let without = || Arc::new(Memory::new());
    assert_eq!(noted_after(None, without(), false), quiet);
    let (notes, _) = noted_after(None, without(), true);
    assert!(notes.unwrap()[0].contains("no room"));
    assert_eq!(noted_after(Some(full), without(), false), (None, true));
}

/// Numbers of the operations by which a prune of this lab enters something.
fn entries_of_a_prune(lab: &Lab) -> Vec<u64> {
    let store = Arc::new(Faulty::new(lab.storage.clone()));
    let customer = lab.open_on(store.clone(), &lab.host);
    lab.prune(&customer).unwrap();
    let log = store.log().into_iter();
    log.filter(|line| line.verb == Verb::Create && line.name.contains("/ledger/"))
        .map(|line| line.number)
        .collect()
}

#[test]
fn another_prune_at_any_entry_of_a_prune_leaves_no_entry_without_a_point() {
    let ready = || {
        let lab = Lab::new(Arc::new(Memory::new()), &a_week());
        nights(&lab, 7);
        lab
    };
    let entries = entries_of_a_prune(&ready());
    assert!(entries.len() > 3, "{entries:?}");
    for at in entries {
        let lab = ready();
        let store = Arc::new(Faulty::new(lab.storage.clone()));
        let (customer, other) = (lab.open_on(store.clone(), &lab.host), lab.open_second());
        let gate = store.freeze_before(at);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| lab.prune(&customer).unwrap());
            assert!(gate.wait_until_reached(Duration::from_secs(10)));
            lab.prune(&other).unwrap();
            gate.release();
            thread.join().unwrap();
        });
        let names = CustomerNames::new(customer.name());
        Ledger::replay(lab.storage.clone(), names, |entry, verdict| {
            assert_eq!(verdict, Ok(()));
            if let Body::Expire(body) | Body::Erase(body) = &entry.body {
                assert_ne!(body.points, [], "before operation {at}");
            }
        })
        .unwrap();
    }
}

#[test]
fn a_prune_whose_entry_the_store_refuses_fails_with_that() {
    let ready = || {
        let lab = Lab::new(Arc::new(Memory::new()), &a_week());
        nights(&lab, 7);
        lab
    };
    for at in entries_of_a_prune(&ready()) {
        let lab = ready();
        let kind = StorageErrorKind::Denied;
        let store = Arc::new(Faulty::new(lab.storage.clone()));
        store.add(Fault::FailBefore { at, kind });
        let error = lab.prune(&lab.open_on(store, &lab.host)).unwrap_err();
        let denied = RepositoryErrorKind::Storage(kind);
        assert_eq!(
            error.kind,
            JobErrorKind::Repository(denied),
            "operation {at}"
        );
    }
}

/// A lab whose next prune signs a certificate, and by which operation it creates that entry.
fn before_a_certificate() -> (Lab, u64) {
    let ready = || {
        let lab = Lab::new(Arc::new(Memory::new()), &a_week());
        nights(&lab, 7);
        lab
    };
    let entries = entries_of_a_prune(&ready());
    (ready(), *entries.last().unwrap())
}

#[test]
fn a_mark_that_moves_during_a_certificate_leaves_it_to_the_next_prune() {
    let (lab, at) = before_a_certificate();
    let store = Arc::new(Faulty::new(lab.storage.clone()));
    let (customer, other) = (lab.open_on(store.clone(), &lab.host), lab.open_second());
    let gate = store.freeze_before(at);
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| lab.prune(&customer).unwrap());
        assert!(gate.wait_until_reached(Duration::from_secs(10)));
        let marked = |marked_at| ReclaimedBody {
            session: None,
            marked_at,
            deleted: Vec::new(),
            marks: Vec::new(),
            certificate: None,
            destroyed: Vec::new(),
        };
        other
            .append(|state| Ok(Body::Reclaimed(marked(state.seq))))
            .unwrap();
        gate.release();
        assert_eq!(thread.join().unwrap().certificate, None);
    });
    assert!(customer.state().open.is_empty());
    assert!(lab.prune(&customer).unwrap().certificate.is_some());
}

#[test]
fn a_certificate_of_which_nobody_knows_whether_it_stands_is_not_given_up() {
    let (lab, at) = before_a_certificate();
    let store = Arc::new(Faulty::new(lab.storage.clone()));
    for (at, kind) in [
        (at, StorageErrorKind::Transient),
        (at + 1, StorageErrorKind::Denied),
    ] {
        store.add(Fault::FailBefore { at, kind });
    }
    let customer = lab.open_on(store, &lab.host);
    let error = lab.prune(&customer).unwrap_err();
    let uncertain = JobErrorKind::Repository(RepositoryErrorKind::Uncertain);
    assert_eq!(error.kind, uncertain);
    let state = lab.open_second().state();
    let proving = |purpose| purpose == Purpose::Prove;
    assert!(state.open.values().any(|open| proving(open.purpose)));
    assert!(lab.prune(&lab.open()).unwrap().certificate.is_some());
}

#[test]
fn a_certificate_that_the_store_refuses_is_given_up() {
    let (lab, at) = before_a_certificate();
    let kind = StorageErrorKind::Denied;
    let fault = Fault::FailBefore { at, kind };
    let store = Arc::new(Faulty::with_faults(lab.storage.clone(), vec![fault]));
    lab.prune(&lab.open_on(store, &lab.host)).unwrap_err();
    assert!(lab.open_second().state().open.is_empty());
}

#[test]
fn a_certificate_says_what_was_erased_and_what_is_left_until_when() {
    let lab = Lab::new(Arc::new(Memory::new()), &a_week());
    nights(&lab, 1);
    let customer = lab.open();
    let first = customer.base(&vm("web")).unwrap();
    back_up(&customer, "web", &image(&[1, 2, 300]), false);
    let row = customer.with_state(|state| state.points[&first].clone());
    change(&customer, first, Body::Expire).unwrap();
    let erase_entry = change(&customer, first, Body::Erase).unwrap();
    let pruned = lab.prune(&customer).unwrap();
    let told = pruned.certificate.unwrap();
    let bytes = lab.storage.read(&told.object, u64::MAX).unwrap();
    let certificate = Certificate::parse(&bytes).unwrap();
    let [erased] = &certificate.erased[..] else {
        panic!("{:?}", certificate.erased)
    };
    assert_eq!((erased.point, erased.vm.as_str()), (first, "web"));
    assert_eq!(
        (erased.taken_at, erased.deadline),
        (row.taken_at, row.deadline)
    );
    assert_eq!(erased.erase_entry, erase_entry);
    // One chunk of three is dead, and waits for more.
    assert!(certificate.unreadable_bytes_left > 0);
    assert_eq!(certificate.unreadable_bytes_deadline, Some(row.deadline));
    assert_eq!((told.erased, told.destroyed), (1, 0));
    let state = customer.state();
    let reference = state.certificates.last().unwrap();
    let hash = |bytes: &[u8]| ObjectHash::from_bytes(*blake3::hash(bytes).as_bytes());
    let signature = lab.storage.read(&told.signature, u64::MAX).unwrap();
    assert_eq!(reference.hash, hash(&bytes));
    assert_eq!(reference.signature_hash, hash(&signature));
}
