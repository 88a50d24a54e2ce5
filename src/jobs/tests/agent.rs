//! A host that deletes nothing in the store, beside one that does.

use crate::jobs::testing::{Lab, back_up, prune_with};
use crate::jobs::{JobErrorKind, PruneRequest};
use crate::model::{PointId, PointState};
use crate::policy::PolicyTerms;
use crate::repository::testing::{DAY, Running, backup, image, restore};
use crate::storage::{Fault, Faulty, Memory, Storage, StorageErrorKind, Verb};
use std::sync::Arc;

fn lab() -> Lab {
    Lab::new(Arc::new(Memory::new()), &PolicyTerms::default()).with_an_agent()
}

fn deletes(store: &Faulty<Arc<dyn Storage>>) -> bool {
    store
        .log()
        .iter()
        .any(|line| line.verb.writes() && line.verb != Verb::Create)
}

#[test]
fn wherever_an_agents_backup_fails_it_deletes_nothing_and_the_keeper_leaves_nothing_of_it() {
    let trial = lab();
    let store = Arc::new(Faulty::new(trial.storage.clone()));
    let customer = trial.open_on(store.clone(), &trial.second);
    let begun = store.operations();
    back_up(&customer, "web", &image(&[1, 2, 3]), true);
    let last = store.operations();
    let mut aborted = 0;
    for at in begun + 1..=last {
        let lab = lab();
        let kind = StorageErrorKind::Denied;
        let fault = Fault::FailBefore { at, kind };
        let store = Arc::new(Faulty::with_faults(lab.storage.clone(), vec![fault]));
        let agent = lab.open_on(store.clone(), &lab.second);
        let (_, result) = backup(&agent, "web", &image(&[1, 2, 3]), true);
        aborted += usize::from(result.is_err());
        drop(agent);
        // The next process of the agent ends what this one could not.
        let agent = lab.open_on(store.clone(), &lab.second);
        agent.abort_dead_sessions(lab.time.now()).unwrap();
        let kept = back_up(&agent, "web", &image(&[1, 2, 4]), true);
        assert!(!deletes(&store), "{at}: {:?}", store.log());

        let keeper = lab.open();
        let pruned = lab.prune(&keeper).unwrap();
        assert_eq!(pruned.swept.unexplained, Vec::<String>::new(), "{at}");
        let again = lab.prune(&keeper).unwrap();
        assert_eq!(again.swept.removed, [], "{at}");
        assert!(restore(&keeper, &kept).unwrap() == image(&[1, 2, 4]));
    }
    assert!(aborted > 3, "{aborted}");
}

#[test]
fn what_an_agent_left_of_a_session_stays_until_a_keeper_prunes() {
    let lab = lab();
    let agent = lab.open_second();
    let running = Running::write(&agent, "web", &image(&[1, 2, 3]), true).unwrap();
    let session = running.begun.id;
    let packs = agent.names().session_packs(&session);
    running.session.finish().unwrap();
    drop(running);
    agent.abort(&session, "a test").unwrap();
    assert_ne!(lab.storage.list(&packs).unwrap(), []);
    let pruned = lab.prune(&lab.open()).unwrap();
    assert!(!pruned.swept.removed.is_empty());
    assert_eq!(lab.storage.list(&packs).unwrap(), []);
}

#[test]
fn an_agent_does_not_prune_even_if_the_ledger_would_let_it() {
    let lab = lab();
    let store = Arc::new(Faulty::new(lab.storage.clone()));
    let agent = lab.open_on(store.clone(), &lab.second);
    let point = back_up(&agent, "web", &image(&[1]), true);
    for _ in 0..70 {
        lab.pass(DAY);
        // The ledger's clock goes on.
        back_up(&agent, "db", &image(&[2]), true);
    }
    let request = PruneRequest {
        confirm: true,
        ..PruneRequest::default()
    };
    let refused = prune_with(&agent, &lab.second, request).unwrap_err();
    assert_eq!(refused.kind, JobErrorKind::Refused);
    assert!(refused.message.contains("an agent, which deletes nothing"));
    let state_of = |point: &PointId| agent.state().points[point].state;
    assert_eq!(state_of(&point), PointState::Live);
    assert!(!deletes(&store));
}
