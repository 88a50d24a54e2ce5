//! Sessions whose process is gone, and who may say so.

use crate::format::entry::{Body, Purpose, Role};
use crate::jobs::testing::Lab;
use crate::policy::PolicyTerms;
use crate::repository::Customer;
use crate::repository::testing::{DAY, Running, image};
use crate::storage::{Fault, Faulty, Memory, StorageErrorKind};
use std::sync::Arc;

fn lab() -> Lab {
    Lab::new(Arc::new(Memory::new()), &PolicyTerms::default())
}

/// How many sessions the first host knows as begun by it.
fn known(lab: &Lab) -> usize {
    let folder = lab.host.folder().path().join("sessions");
    std::fs::read_dir(folder).unwrap().count()
}

#[test]
fn a_copy_of_a_host_does_not_take_its_running_backup_for_dead() {
    let lab = lab();
    let (copy, _folder) = lab.copy_of_host();
    let original = lab.open();
    let elsewhere = lab.open_on(lab.storage.clone(), &copy);
    let aborts = |customer: &Customer| customer.abort_dead_sessions(lab.time.now()).unwrap();
    let running = Running::write(&original, "web", &image(&[1, 2, 3]), true).unwrap();
    assert_eq!(aborts(&elsewhere), 0);
    running.commit().unwrap();

    // Nor one of whose process it knows nothing; whoever began it does.
    let begin = || drop(Running::write(&original, "db", &image(&[4]), true).unwrap());
    begin();
    assert_eq!((aborts(&elsewhere), known(&lab)), (0, 1));
    assert_eq!((aborts(&original), known(&lab)), (1, 0));
    // Until no session may be as old.
    begin();
    lab.pass(DAY * 9);
    assert_eq!(aborts(&elsewhere), 1);
}

#[test]
fn a_dead_session_whose_abort_fails_is_aborted_by_the_next_run() {
    let mut failed = 0;
    for step in 1..=6 {
        let lab = lab();
        let store = Arc::new(Faulty::new(lab.storage.clone()));
        let customer = lab.open_on(store.clone(), &lab.host);
        drop(Running::write(&customer, "web", &image(&[1]), true).unwrap());
        store.add(Fault::FailBefore {
            at: store.operations() + step,
            kind: StorageErrorKind::Denied,
        });
        failed += usize::from(customer.abort_dead_sessions(lab.time.now()).is_err());
        customer.abort_dead_sessions(lab.time.now()).unwrap();
        assert!(customer.state().open.is_empty(), "{step}");
    }
    assert!(failed > 1, "{failed}");
}

#[test]
fn a_session_whose_begin_may_stand_is_kept_in_mind_and_one_that_was_refused_is_not() {
    let lab = lab();
    let store = Arc::new(Faulty::new(lab.storage.clone()));
    let customer = lab.open_on(store.clone(), &lab.host);
    customer.refresh().unwrap();
    store.add(Fault::FailBefore {
        at: store.operations() + 1,
        kind: StorageErrorKind::Denied,
    });
    assert!(customer.begin(Purpose::Merge, None).is_err());
    assert_eq!(known(&lab), 1);
    let mut without_prune = lab.host.body();
    without_prune.roles.retain(|role| *role != Role::Prune);
    customer
        .append(|_| Ok(Body::Host(without_prune.clone())))
        .unwrap();
    assert!(customer.begin(Purpose::Merge, None).is_err());
    assert_eq!(known(&lab), 1);
}
