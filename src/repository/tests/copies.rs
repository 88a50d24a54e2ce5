//! A host's copies: who reads them, who must not, and when they go.

use crate::format::entry::{AbortBody, Body};
use crate::format::names::{ObjectRole, content_hash};
use crate::model::ObjectName;
use crate::repository::reclaim::{merge_segments, reclaim};
use crate::repository::testing::{
    Running, World, image, restore, restore_from_copies, restore_with,
};
use crate::repository::{Customer, Mark, PointReader, Reader, open_live};
use crate::storage::{Cached, Storage};
use jiff::SignedDuration;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tempfile::TempDir;

const DAY: SignedDuration = SignedDuration::from_hours(24);

struct Lab {
    world: World,
    folder: TempDir,
    cached: Arc<Cached>,
    customer: Customer,
}

impl Lab {
    fn new() -> Self {
        let world = World::new();
        let folder = tempfile::tempdir().unwrap();
        let hash_of = |name: &ObjectName| content_hash(name).map(|hash| *hash.as_bytes());
        let store: Arc<dyn Storage> = Arc::new(world.memory.clone());
        let path = folder.path().to_path_buf();
        let cached = Arc::new(Cached::new(store, path, 1 << 30, hash_of));
        let customer = world.open_on(cached.clone(), &world.host).unwrap();
        Lab {
            world,
            folder,
            cached,
            customer,
        }
    }

    fn backup(&mut self, chunks: &[u32], full: bool) -> crate::model::PointId {
        let bytes = image(chunks);
        self.world.backup(&self.customer, "web", &bytes, full)
    }

    fn copies(&self) -> Vec<ObjectName> {
        self.cached.names_below("customers/acme").unwrap()
    }

    /// Copies of packs.
    fn packs(&self) -> BTreeSet<ObjectName> {
        let is_pack = |name: &ObjectName| {
            let role = self.customer.names().role(name);
            matches!(role, ObjectRole::Pack(_))
        };
        self.copies().into_iter().filter(is_pack).collect()
    }

    fn path(&self, name: &ObjectName) -> PathBuf {
        self.folder.path().join(name.as_str())
    }

    fn in_store(&self, name: &ObjectName) -> bool {
        self.world.memory.size_bytes(name).is_ok()
    }
}

#[test]
fn nodes_are_read_from_copies_and_judged_in_the_store() {
    let mut lab = Lab::new();
    let point = lab.backup(&[1, 2, 3, 4, 5], true);
    let nodes = lab.packs();
    assert!(!nodes.is_empty());
    let data = lab.world.packs().len() - nodes.len();
    assert!(data > 0, "only what holds nodes is copied");
    for name in &nodes {
        lab.world.memory.delete(name).unwrap();
    }
    let bytes = image(&[1, 2, 3, 4, 5]);
    assert!(restore_from_copies(&lab.customer, &point).unwrap() == bytes);

    // Who builds upon what it reads asks the store whether it has it.
    let point_reader = PointReader::open(&lab.customer, &point).unwrap();
    let reader = Reader::new(&lab.customer).unwrap();
    let built_upon = restore_with(&reader.from_copies_that_stand(), &point_reader);
    assert!(built_upon.unwrap_err().is_damage());

    // What the store has lost, the store is asked for.
    let lost = restore(&lab.customer, &point).unwrap_err();
    assert!(lost.is_damage(), "{lost}");
    let mark = Mark::at_end(&lab.customer).unwrap();
    assert_eq!(mark.damage.len(), 1);
    let opened = open_live(&lab.customer, 1, &AtomicBool::new(false), &|_| ()).unwrap();
    assert_eq!(opened.unreadable.len(), 1);
    let refused = reclaim(&lab.customer, lab.world.now(), DAY * 22, false).unwrap_err();
    assert!(refused.is_damage(), "{refused}");
    // Once the ledger says so, no copy hides it from anybody.
    assert!(!lab.customer.with_state(|state| state.damaged.is_empty()));
    let lost = restore_from_copies(&lab.customer, &point).unwrap_err();
    assert!(lost.is_damage(), "{lost}");
}

#[test]
fn a_copy_that_has_rotted_is_none() {
    let mut lab = Lab::new();
    let point = lab.backup(&[1, 2, 3, 4, 5], true);
    let nodes = lab.packs();
    assert!(!nodes.is_empty());
    for name in &nodes {
        lab.world.memory.delete(name).unwrap();
        let mut bytes = std::fs::read(lab.path(name)).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(lab.path(name), bytes).unwrap();
    }
    let lost = restore_from_copies(&lab.customer, &point).unwrap_err();
    assert!(lost.is_damage(), "{lost}");
    assert_eq!(lab.packs(), BTreeSet::new());
}

#[test]
fn copies_that_were_lost_are_made_again_by_whoever_walks() {
    let mut lab = Lab::new();
    let point = lab.backup(&[1, 2, 3], true);
    let before = lab.packs();
    for name in lab.copies() {
        std::fs::remove_file(lab.path(&name)).unwrap();
    }
    restore(&lab.customer, &point).unwrap();
    assert_eq!(lab.packs(), BTreeSet::new());
    restore_from_copies(&lab.customer, &point).unwrap();
    assert_eq!(lab.packs(), before);
}

#[test]
fn copies_of_what_is_condemned_go_from_then_on_however_long_the_host_was_off() {
    let mut lab = Lab::new();
    let dying = lab.backup(&[1, 2, 3, 4, 5], true);
    let living = lab.backup(&[1, 2, 3, 4, 6], false);
    let before = lab.packs();
    let looked_through = |lab: &Lab| {
        lab.customer
            .copies(&lab.copies(), None)
            .0
            .segments()
            .to_vec()
    };
    let at_first = looked_through(&lab);
    // Another host prunes: nothing of it passes through here.
    let pruner = lab.world.open_second();
    lab.world.erase(&pruner, dying);
    let judge = |lab: &Lab, looked_through: Option<&[u8]>| -> BTreeSet<ObjectName> {
        lab.customer.refresh().unwrap();
        let (copies, unknown) = lab.customer.copies(&lab.copies(), looked_through);
        assert!(unknown.is_none(), "{unknown:?}");
        let may_stay = |name: &&ObjectName| copies.may_stay(name);
        lab.packs().iter().filter(may_stay).cloned().collect()
    };
    assert_eq!(judge(&lab, Some(&at_first)), before);
    let done = reclaim(&pruner, lab.world.now(), DAY * 4000, false).unwrap();
    let left: BTreeSet<ObjectName> = before
        .iter()
        .filter(|name| lab.in_store(name))
        .cloned()
        .collect();
    assert!(left.len() < before.len());
    for stage in ["condemned", "known to be deleted", "forgotten"] {
        match stage {
            "condemned" => {}
            "known to be deleted" => pruner.note_reclaimed(&done).map(drop).unwrap(),
            _ => assert!(merge_segments(&pruner).unwrap()),
        }
        for looked in [None, Some(at_first.clone()), Some(looked_through(&lab))] {
            if stage == "forgotten" && looked.as_ref() == Some(&looked_through(&lab)) {
                // It would have been looked through under these; then they are gone.
                continue;
            }
            assert_eq!(judge(&lab, looked.as_deref()), left, "{stage}");
        }
    }
    let condemned = lab.customer.with_state(|state| state.condemned.len());
    assert_eq!(condemned, 0, "the ledger alone does not know them any more");
    let restored = restore_from_copies(&lab.customer, &living).unwrap();
    assert!(restored == image(&[1, 2, 3, 4, 6]));
}

#[test]
fn copies_of_a_session_stay_while_it_is_open_and_go_when_it_is_aborted() {
    let mut lab = Lab::new();
    lab.backup(&[1, 2, 3], true);
    let before = lab.packs();
    let written = Running::write(&lab.customer, "web", &image(&[1, 2, 4]), false).unwrap();
    // A pack is sent at the latest when the session is finished.
    let session = written.begun.id;
    written.session.finish().unwrap();
    let of_session: Vec<_> = lab.packs().difference(&before).cloned().collect();
    assert!(!of_session.is_empty());
    let stay = |lab: &Lab| {
        let (copies, _) = lab.customer.copies(&lab.copies(), None);
        of_session
            .iter()
            .filter(|name| copies.may_stay(name))
            .count()
    };
    assert_eq!(stay(&lab), of_session.len());
    drop(written);
    let reason = "a host that may delete nothing".to_string();
    let abort = Body::Abort(AbortBody { session, reason });
    lab.customer.append(|_| Ok(abort.clone())).unwrap();
    assert_eq!(stay(&lab), 0);
}

#[test]
fn no_copy_of_a_pack_stays_if_the_index_cannot_be_read() {
    let mut lab = Lab::new();
    lab.backup(&[1, 2, 3], true);
    let packs = lab.packs();
    for name in lab.copies().iter().filter(|name| !packs.contains(*name)) {
        std::fs::remove_file(lab.path(name)).unwrap();
        lab.world.memory.delete(name).unwrap();
    }
    let (store, host) = (lab.cached.clone(), &lab.world.host);
    let blind = lab.world.open_on(store, host).unwrap();
    let (copies, unknown) = blind.copies(&lab.copies(), None);
    assert!(unknown.is_some());
    assert!(!packs.iter().any(|name| copies.may_stay(name)));
}
