//! Prunes of whole customers on real state folders.

use crate::format::certificate::Certificate;
use crate::format::entry::Body;
use crate::format::names::CustomerNames;
use crate::jobs::testing::{Lab, back_up};
use crate::model::PointId;
use crate::policy::PolicyTerms;
use crate::repository::testing::{DAY, change, image, restore, vm};
use crate::repository::{Customer, Ledger};
use crate::storage::{Directory, Fault, Faulty, Memory, Storage, StorageErrorKind};
use jiff::SignedDuration;
use std::collections::BTreeSet;
use std::sync::Arc;
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
