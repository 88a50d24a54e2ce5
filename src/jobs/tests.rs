//! Prunes of whole customers on real state folders.

use super::testing::{Lab, back_up};
use crate::format::certificate::Certificate;
use crate::format::entry::Body;
use crate::format::names::CustomerNames;
use crate::model::PointId;
use crate::policy::PolicyTerms;
use crate::repository::Ledger;
use crate::repository::testing::{DAY, change, image};
use crate::storage::{Directory, Faulty, Memory, Storage};
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
