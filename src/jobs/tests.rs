//! Prunes of whole customers on real state folders.

use super::testing::{Lab, back_up};
use crate::policy::PolicyTerms;
use crate::repository::testing::{DAY, image};
use crate::storage::{Directory, Memory};
use std::sync::Arc;

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
