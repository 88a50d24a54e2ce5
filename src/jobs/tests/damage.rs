//! Every byte of a small repository changed, every object cut at every length, removed, swapped
//! with another and replaced by an older one: a restore gives the right bytes or none, and `verify`
//! finds what would not restore, with keys and without.

use super::super::{JobError, Quiet, VerifyRequest, verify, verify_in_run, verify_sealed};
use crate::format::names::{ObjectRole, content_hash};
use crate::format::pack::{FRAME_HEADER_BYTES, HEADER_BYTES};
use crate::jobs::testing::{Lab, back_up};
use crate::model::{ObjectName, PackName, PointId};
use crate::policy::PolicyTerms;
use crate::repository::testing::{CHUNK, DAY, World, customer_name, panic_text, restore};
use crate::repository::{Customer, RepositoryError};
use crate::storage::{Cached, Memory, Storage};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Compresses well, so that there are few bytes to change.
fn image(chunks: &[u8]) -> Vec<u8> {
    let chunk = |number: &u8| vec![*number; CHUNK];
    chunks.iter().flat_map(chunk).collect()
}

/// One of so many is tried in each run of the tests; `scripts/damage` tries all.
fn share() -> usize {
    match std::env::var_os("VMKEEP_EVERY_BYTE") {
        Some(_) => 1,
        None => 19,
    }
}

/// The ends of an object always.
fn is_tried(at: usize, length: usize) -> bool {
    at < 8 || at + 8 >= length || at.is_multiple_of(share())
}

struct Scene {
    world: World,
    /// The objects as they were written.
    objects: BTreeMap<ObjectName, Vec<u8>>,
    tried: usize,
    unnoticed: Vec<String>,
}

/// How a damaged repository did.
struct Found {
    /// All points gave their bytes.
    restored: bool,
    /// `verify` has nothing to say.
    clean: bool,
    /// Nor has the one that has no keys.
    clean_without_keys: bool,
}

impl Scene {
    /// Two VMs, three nights, a prune.
    fn new() -> Self {
        let mut world = World::new();
        let customer = world.open();
        let first = world.backup(&customer, "web", &image(&[1, 2, 3]), true);
        world.backup(&customer, "db", &image(&[7, 7, 0]), true);
        world.time.pass(DAY);
        world.backup(&customer, "web", &image(&[1, 4, 3]), false);
        world.time.pass(DAY);
        world.backup(&customer, "web", &image(&[5, 4, 3]), false);
        world.erase(&customer, first);
        world.model.remove(&first);
        world.prune(&customer).unwrap();
        let objects = world.memory.list("").unwrap();
        let objects = objects
            .into_iter()
            .map(|listed| {
                let bytes = world.memory.read(&listed.name, u64::MAX).unwrap();
                (listed.name, bytes)
            })
            .collect();
        Scene {
            world,
            objects,
            tried: 0,
            unnoticed: Vec::new(),
        }
    }

    fn look(&self) -> Result<Found, RepositoryError> {
        let memory = Arc::new(self.world.memory.clone());
        // First: it writes nothing.
        let clean_without_keys =
            verify_all_sealed(&self.world).is_ok_and(|damage| damage.is_empty());
        let customer = self.world.open_on(memory, &self.world.host)?;
        let mut restored = true;
        for (point, bytes) in &self.world.model {
            match restore(&customer, point) {
                Ok(found) => assert!(found == *bytes, "{point} restores to other bytes"),
                Err(_) => restored = false,
            }
        }
        let clean = verify_all(&customer).is_ok_and(|damage| damage.is_empty());
        Ok(Found {
            restored,
            clean,
            clean_without_keys,
        })
    }

    /// Puts these bytes (or nothing) in an object's place, looks, and puts things right.
    fn try_with(&mut self, name: &ObjectName, bytes: Option<&[u8]>, what: &str) {
        let right = self.objects.get(name).cloned().unwrap();
        if bytes == Some(&*right) {
            return;
        }
        match bytes {
            Some(bytes) => self.world.memory.plant(name, bytes),
            None => self.world.memory.delete(name).unwrap(),
        }
        let found = catch_unwind(AssertUnwindSafe(|| self.look()));
        self.world.memory.plant(name, &right);
        self.tried += 1;
        match found {
            Err(panic) => panic!("{name} {what}: {}", panic_text(&*panic)),
            // Refused as a whole, with the object's name.
            Ok(Err(_)) => {}
            Ok(Ok(found)) => {
                assert!(
                    found.restored || !(found.clean || found.clean_without_keys),
                    "{name} {what}: lost, and nobody says so"
                );
                if is_content(name) {
                    if found.clean {
                        self.unnoticed.push(format!("{name} {what}"));
                    }
                    if found.clean_without_keys {
                        self.unnoticed.push(format!("{name} {what}, without keys"));
                    }
                }
            }
        }
    }
}

/// All but `vmkeep.json`, which holds a time that nothing proves.
fn is_content(name: &ObjectName) -> bool {
    let names = crate::format::names::CustomerNames::new(&customer_name());
    matches!(
        names.role(name),
        ObjectRole::Ledger(_)
            | ObjectRole::Pack(_)
            | ObjectRole::Segment(_)
            | ObjectRole::Point(_)
            | ObjectRole::Key(_)
    )
}

fn is_same_kind(name: &ObjectName, other: &ObjectName) -> bool {
    let names = crate::format::names::CustomerNames::new(&customer_name());
    let kind = |name| std::mem::discriminant(&names.role(name));
    kind(name) == kind(other)
}

/// What is wrong, with all data opened.
pub(super) fn verify_all(customer: &Customer) -> Result<Vec<String>, JobError> {
    let request = VerifyRequest {
        trees: true,
        read_percent: Some(100),
        unread_since: None,
        threads: 1,
    };
    let never = AtomicBool::new(false);
    let verified = verify(customer, request, &Quiet, &never)?;
    Ok([verified.damage, verified.certificates].concat())
}

fn verify_all_sealed(world: &World) -> Result<Vec<String>, JobError> {
    let never = AtomicBool::new(false);
    let customer = world.open_sealed()?;
    let verified = verify_sealed(&customer, Some(100), 1, &Quiet, &never)?;
    Ok([verified.damage, verified.certificates].concat())
}

#[test]
fn no_changed_byte_is_restored_or_overlooked() {
    let mut scene = Scene::new();
    let found = scene.look().unwrap();
    assert!(found.restored && found.clean && found.clean_without_keys);
    for (name, bytes) in scene.objects.clone() {
        for at in (0..bytes.len()).filter(|at| is_tried(*at, bytes.len())) {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << (at % 8);
            scene.try_with(&name, Some(&changed), &format!("byte {at}"));
        }
    }
    println!("{} bytes changed", scene.tried);
    assert!(scene.tried > 400);
    assert_eq!(scene.unnoticed, Vec::<String>::new());
}

#[test]
fn no_object_that_is_cut_missing_or_another_one_is_restored_from_or_overlooked() {
    let mut scene = Scene::new();
    for (name, bytes) in scene.objects.clone() {
        scene.try_with(&name, None, "missing");
        for length in (0..bytes.len()).filter(|at| is_tried(*at, bytes.len())) {
            scene.try_with(&name, bytes.get(..length), &format!("cut to {length}"));
        }
        let longer = [&bytes[..], &[0]].concat();
        scene.try_with(&name, Some(&longer), "with a byte more");
        // Every other one of the same kind, older ones among them, and a share of the others.
        for (at, (other, content)) in scene.objects.clone().into_iter().enumerate() {
            if is_same_kind(&name, &other) || at.is_multiple_of(share()) {
                scene.try_with(&name, Some(&content), &format!("replaced by {other}"));
            }
        }
    }
    println!("{} objects damaged", scene.tried);
    assert_eq!(scene.unnoticed, Vec::<String>::new());
}

#[test]
fn the_next_full_heals_what_the_source_still_has() {
    let scene = Scene::new();
    let packs: Vec<ObjectName> = scene.world.packs();
    for name in &packs {
        for cut in [true, false] {
            let mut scene = Scene::new();
            let customer = scene.world.open();
            // The same pack of a world that was made the same way.
            let at = packs.iter().position(|pack| pack == name).unwrap();
            let name = scene.world.packs()[at].clone();
            let mut bytes = scene.objects[&name].clone();
            match cut {
                true => bytes.truncate(bytes.len() / 2),
                false => bytes[crate::format::pack::HEADER_BYTES + 60] ^= 1,
            }
            scene.world.memory.plant(&name, &bytes);
            scene.world.time.pass(DAY * 9);
            for (vm, image) in [("web", image(&[5, 4, 3])), ("db", image(&[7, 7, 0]))] {
                let point: PointId = scene.world.backup(&customer, vm, &image, true);
                assert!(restore(&customer, &point).unwrap() == image, "{name}");
            }
        }
    }
}

#[test]
fn a_broken_key_file_is_damage_until_init_has_made_another_one() {
    let world = World::new();
    let customer = world.open();
    let recipients = [
        world.host.identity.recipient(),
        world.second.identity.recipient(),
    ];
    let name = world.key_files().remove(0);
    let mut bytes = world.memory.read(&name, u64::MAX).unwrap();
    bytes[40] ^= 1;
    // Wrapped anew while the file still opens, as a host does that has the key.
    customer
        .wrap_key_for(&world.host.identity, &recipients)
        .unwrap();
    let later = world.key_files().pop().unwrap();
    world.memory.plant(&name, &bytes);
    assert_eq!(verify_all(&customer).unwrap(), Vec::<String>::new());
    assert_eq!(verify_all_sealed(&world).unwrap(), Vec::<String>::new());
    world.memory.plant(&later, &bytes);
    for damage in [
        verify_all(&customer).unwrap(),
        verify_all_sealed(&world).unwrap(),
    ] {
        assert_eq!(damage.len(), 2, "{damage:?}");
        assert!(damage[0].contains("vmkeep init"), "{damage:?}");
    }
}

#[test]
fn of_the_points_that_need_what_is_damaged_one_is_named_and_others_are_not_ruled_out() {
    let mut world = World::new();
    let customer = world.open();
    let points = ["web", "db"].map(|vm| world.backup(&customer, vm, &image(&[1, 2, 3]), true));
    let told = |world: &World| -> Vec<String> {
        let damage = verify_all(&world.open()).unwrap().into_iter();
        damage
            .filter(|line| line.starts_with("restore point"))
            .collect()
    };
    let snapshot = world.memory.snapshot();
    for pack in world.packs() {
        let mut bytes = world.memory.read(&pack, u64::MAX).unwrap();
        bytes[HEADER_BYTES + FRAME_HEADER_BYTES + 20] ^= 1;
        world.memory.plant(&pack, &bytes);
    }
    let shared = told(&world);
    assert!(!shared.is_empty());
    let leaves_room = |line: &String| line.contains("), and perhaps others: ");
    assert!(shared.iter().all(leaves_room), "{shared:?}");
    // A record is of one point.
    world.rewind(&snapshot);
    let record = customer.names().point(&points[0]);
    world.memory.plant(&record, b"damaged");
    let own = told(&world);
    assert_eq!(own.len(), 1, "{own:?}");
    assert!(
        own[0].contains(&points[0].to_string()) && !leaves_room(&own[0]),
        "{own:?}"
    );
}

#[test]
fn a_certificate_that_is_lost_or_altered_is_told_of() {
    let memory = Memory::new();
    let terms = PolicyTerms {
        max_retention: "7 days".to_string(),
        timezone: "UTC".to_string(),
        ..PolicyTerms::default()
    };
    let lab = Lab::new(Arc::new(memory.clone()), &terms);
    let customer = lab.open();
    for night in 0..10 {
        let chunks = crate::repository::testing::image(&[1, 2, 100 + night]);
        back_up(&customer, "web", &chunks, night % 7 == 0);
        lab.prune(&customer).unwrap();
        lab.pass(DAY);
    }
    let never = AtomicBool::new(false);
    let by_night = || {
        let verified = verify_in_run(&customer, &lab.host, 1, &Quiet, &never);
        let verified = verified.unwrap();
        // No restore point needs one.
        assert_eq!(verified.damage, Vec::<String>::new());
        verified.certificates
    };
    assert_eq!(verify_all(&customer).unwrap(), Vec::<String>::new());
    let id = customer.with_state(|state| state.certificates.last().unwrap().id.clone());
    for file in [format!("{id}.json"), format!("{id}.json.minisig")] {
        let name = customer.names().certificate(&file).unwrap();
        let right = memory.read(&name, u64::MAX).unwrap();
        let names_it = |damage: &[String]| {
            damage.len() == 1 && damage.iter().all(|line| line.contains(name.as_str()))
        };
        let mut altered = right.clone();
        altered[right.len() / 2] ^= 1;
        memory.plant(&name, &altered);
        assert!(names_it(&verify_all(&customer).unwrap()));
        // A night does not read them.
        assert_eq!(by_night(), Vec::<String>::new());
        memory.delete(&name).unwrap();
        assert!(names_it(&verify_all(&customer).unwrap()));
        assert!(names_it(&by_night()));
        memory.plant(&name, &right);
    }
    assert_eq!(verify_all(&customer).unwrap(), Vec::<String>::new());
}

#[test]
fn a_segment_that_the_store_has_lost_is_found_by_a_host_that_has_a_copy() {
    let mut world = World::new();
    let folder = tempfile::tempdir().unwrap();
    let hash_of = |name: &ObjectName| content_hash(name).map(|hash| *hash.as_bytes());
    let store: Arc<dyn Storage> = Arc::new(world.memory.clone());
    let path = folder.path().to_path_buf();
    let cached = Arc::new(Cached::new(store, path, 1 << 30, hash_of));
    let customer = world.open_on(cached, &world.host).unwrap();
    world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    let request = VerifyRequest {
        trees: false,
        read_percent: None,
        unread_since: None,
        threads: 1,
    };
    let never = AtomicBool::new(false);
    let damage = || verify(&customer, request, &Quiet, &never).unwrap().damage;
    assert_eq!(damage(), Vec::<String>::new());
    let lost = customer.with_state(|state| state.segments.keys().next().copied());
    let lost = customer.names().segment(&lost.unwrap());
    world.memory.delete(&lost).unwrap();
    assert_eq!(damage(), [format!("{lost}: is missing")]);
}

#[test]
fn what_is_known_as_damaged_is_noted_once_and_takes_no_other_packs_turn() {
    let memory = Memory::new();
    let lab = Lab::new(Arc::new(memory.clone()), &PolicyTerms::default());
    let customer = lab.open();
    let chunks = crate::repository::testing::image(&[1, 2, 3, 4, 5, 6, 7, 8, 9]);
    back_up(&customer, "web", &chunks, true);
    let index = customer.load_index().unwrap();
    let packs: BTreeSet<PackName> = index.packs().iter().map(|info| info.row.name).collect();
    // A night's share is one.
    assert!((3..=10).contains(&packs.len()), "{} packs", packs.len());
    for pack in &packs {
        let name = customer.names().pack(pack);
        let mut bytes = memory.read(&name, u64::MAX).unwrap();
        bytes[HEADER_BYTES + FRAME_HEADER_BYTES + 20] ^= 1;
        memory.plant(&name, &bytes);
    }
    lab.pass(DAY * 12);
    let never = AtomicBool::new(false);
    let damage = || {
        let verified = verify_in_run(&customer, &lab.host, 1, &Quiet, &never);
        let verified = verified.unwrap();
        assert_eq!(verified.noted, verified.damage);
        verified.damage
    };
    let noted = || -> BTreeSet<PackName> {
        customer.with_state(|state| state.damaged.iter().map(|(pack, _)| *pack).collect())
    };
    for night in 1..=packs.len() {
        assert!(!damage().is_empty());
        assert_eq!(noted().len(), night);
    }
    assert_eq!(noted(), packs);
    // It is told for as long as it is read, and stands in the ledger.
    let end = customer.state().seq;
    assert!(!damage().is_empty());
    customer.refresh().unwrap();
    assert_eq!(customer.state().seq, end);
}
