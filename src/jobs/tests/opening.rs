//! `verify --read-data`: how it reads, and what it says of one frame among many.

use super::damage::verify_all;
use crate::jobs::testing::{Lab, back_up};
use crate::jobs::{Quiet, VerifyRequest, verify, verify_sealed};
use crate::model::ObjectName;
use crate::policy::PolicyTerms;
use crate::repository::testing::{World, image};
use crate::storage::{Fault, Faulty, Memory, Storage, Verb};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

#[test]
fn what_stands_together_is_read_together_and_a_frame_that_does_not_open_is_told_alone() {
    let lab = Lab::new(Arc::new(Memory::new()), &PolicyTerms::default());
    let chunks: Vec<u32> = (1..=200).collect();
    back_up(&lab.open(), "web", &image(&chunks), true);
    let store = Arc::new(Faulty::new(lab.storage.clone()));
    let customer = lab.open_on(store.clone(), &lab.host);
    let before = store.log().len();
    assert_eq!(verify_all(&customer).unwrap(), Vec::<String>::new());
    let log = store.log().split_off(before);
    // Four frames in a pack; their directories come afterwards.
    let opening = log.iter().take_while(|line| line.verb != Verb::SizeBytes);
    let reads: Vec<&str> = opening
        .filter(|line| line.verb == Verb::ReadRange)
        .map(|line| line.name.as_str())
        .collect();
    assert!((50..60).contains(&reads.len()), "{} reads", reads.len());

    let most_read = reads
        .iter()
        .max_by_key(|name| lab.storage.size_bytes(&object(name)).unwrap());
    let name = object(most_read.unwrap());
    let offset = lab.storage.size_bytes(&name).unwrap() / 2;
    store.add(Fault::FlipOnRead {
        name,
        offset,
        mask: 1,
    });
    let told = verify_all(&customer).unwrap();
    let frames = told
        .iter()
        .filter(|line| line.contains("a frame does not open"));
    assert_eq!(frames.count(), 1, "{told:?}");
}

#[test]
fn what_a_prune_of_another_host_takes_away_during_a_verification_is_no_damage() {
    let never = AtomicBool::new(false);
    let request = |read_percent| VerifyRequest {
        trees: true,
        read_percent,
        unread_since: None,
        threads: 1,
    };
    for with_keys in [Some(None), Some(Some(60)), Some(Some(100)), None] {
        let mut world = World::new();
        let customer = world.open();
        let [one, other] = [("web", [1, 2, 3]), ("db", [3, 4, 5])]
            .map(|(vm, chunks)| world.backup(&customer, vm, &image(&chunks), true));
        world.backup(&customer, "mail", &image(&[5, 6]), true);
        world.meanwhile(
            |customer| match with_keys {
                Some(percent) => verify(customer, request(percent), &Quiet, &never),
                None => verify_sealed(customer, Some(100), 1, &Quiet, &never),
            },
            |pruner| {
                world.erase_all(pruner, &[one, other]);
                world.prune(pruner).unwrap();
            },
            |verified| assert_eq!(verified.unwrap().damage, Vec::<String>::new()),
        );
    }
}

fn object(name: &str) -> ObjectName {
    ObjectName::new(name).unwrap()
}
