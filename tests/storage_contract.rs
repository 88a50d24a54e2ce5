//! One contract for all stores, and what only a directory can get wrong.
//!
//! The tests of full and read-only stores mount small file systems and need to be root.

use vmkeep_test_support as support;

use bytes::Bytes;
use rustix::fs::{FlockOperation, flock};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread::{self, ThreadId};
use std::time::Duration;
use support::s3::server;
use tempfile::TempDir;
use vmkeep::model::{ObjectName, Writers};
use vmkeep::storage::{
    Directory, Fault, Faulty, Leftover, Listed, Memory, Part, Probe, ReadAgain, S3, Storage,
    StorageError, StorageErrorKind, Survey, Verb, probe, probe_without_deleting,
};

const PLENTY: u64 = 1 << 30;
/// For what must happen at once; only a broken program waits so long.
const SOON: Duration = Duration::from_secs(60);

fn name(name: &str) -> ObjectName {
    ObjectName::new(name).expect("a valid name")
}

#[track_caller]
fn kind_of<T: std::fmt::Debug>(told: Result<T, StorageError>) -> StorageErrorKind {
    told.expect_err("a failure was expected").kind
}

fn names(listed: &[Listed]) -> Vec<&str> {
    listed.iter().map(|object| object.name.as_str()).collect()
}

fn places(leftovers: &[Leftover]) -> Vec<&str> {
    leftovers.iter().map(|one| one.place.as_str()).collect()
}

// ---------------------------------------------------------------- the contract

fn what_is_created_is_read_back(store: &dyn Storage) {
    let large: Vec<u8> = (0..5_000_000u32).flat_map(u32::to_le_bytes).collect();
    for (object, data) in [("empty", &[][..]), ("a/b/small", b"x"), ("large", &large)] {
        let object = name(object);
        assert_eq!(store.create(&object, data), Ok(()));
        assert!(store.read(&object, data.len() as u64) == Ok(data.to_vec()));
        assert_eq!(store.size_bytes(&object), Ok(data.len() as u64));
    }
    for read_again in [ReadAgain::Soon, ReadAgain::Late] {
        let object = name(&format!("much/{read_again:?}").to_lowercase());
        let told = store.create_large(&object, &Bytes::from(large.clone()), read_again);
        assert_eq!(told, Ok(()));
        assert!(store.read(&object, PLENTY) == Ok(large.clone()));
    }
    let mut part = vec![0; 1_000_000];
    let told = store.read_range(&name("large"), 12_345_678, &mut part);
    assert_eq!(told, Ok(()));
    assert!(Some(part.as_slice()) == large.get(12_345_678..13_345_678));
}

fn a_taken_name_keeps_its_bytes(store: &dyn Storage) {
    let object = name("customers/c/ledger/1");
    assert_eq!(store.create(&object, b"first"), Ok(()));
    for data in [&b"second"[..], b"first", b""] {
        let told = store.create(&object, data);
        assert_eq!(kind_of(told), StorageErrorKind::AlreadyExists);
        assert_eq!(store.read(&object, 100), Ok(b"first".to_vec()));
    }
    for read_again in [ReadAgain::Soon, ReadAgain::Late] {
        let told = store.create_large(&object, &Bytes::from_static(b"much"), read_again);
        assert_eq!(kind_of(told), StorageErrorKind::AlreadyExists);
        assert_eq!(store.read(&object, 100), Ok(b"first".to_vec()));
    }
}

fn an_absent_object_is_not_found_and_deleting_it_succeeds(store: &dyn Storage) {
    store.create(&name("a/b"), b"x").expect("created");
    // Nothing there; a folder there; an object where a folder would have to be.
    for absent in ["nothing", "no/such/folder", "a", "a/b/c"] {
        let absent = name(absent);
        let told = store.read(&absent, PLENTY);
        assert_eq!(kind_of(told), StorageErrorKind::NotFound, "{absent}");
        let told = store.read_range(&absent, 0, &mut [0]);
        assert_eq!(kind_of(told), StorageErrorKind::NotFound, "{absent}");
        let told = store.size_bytes(&absent);
        assert_eq!(kind_of(told), StorageErrorKind::NotFound, "{absent}");
        assert_eq!(store.delete(&absent), Ok(()), "{absent}");
        assert_eq!(store.destroy(&absent), Ok(()), "{absent}");
    }
    assert_eq!(store.read(&name("a/b"), 1), Ok(b"x".to_vec()));
}

fn an_object_larger_than_allowed_is_damaged(store: &dyn Storage) {
    let object = name("object");
    store.create(&object, b"12345").expect("created");
    let told = store.read(&object, 4);
    assert_eq!(kind_of(told), StorageErrorKind::Corrupt);
    assert_eq!(store.read(&object, 5), Ok(b"12345".to_vec()));
}

fn a_range_beyond_the_end_is_damaged(store: &dyn Storage) {
    let object = name("object");
    store.create(&object, b"12345").expect("created");
    for (offset, length) in [
        (0, 6),
        (5, 1),
        (4, 2),
        (99, 1),
        (u64::MAX, 1),
        (u64::MAX, 9),
    ] {
        let told = store.read_range(&object, offset, &mut vec![0; length]);
        assert_eq!(
            kind_of(told),
            StorageErrorKind::Corrupt,
            "{offset}+{length}"
        );
    }
    let mut part = [0; 2];
    assert_eq!(store.read_range(&object, 3, &mut part), Ok(()));
    assert_eq!(&part, b"45");
    assert_eq!(store.read_range(&object, 5, &mut []), Ok(()));
}

fn an_object_held_open_is_read_after_it_was_deleted(store: &dyn Storage) {
    let object = name("object");
    store.create(&object, b"12345").expect("created");
    let too_large = store.open(&object, 4).map(|_| ());
    assert_eq!(kind_of(too_large), StorageErrorKind::Corrupt);
    let missing = store.open(&name("missing"), 4).map(|_| ());
    assert_eq!(kind_of(missing), StorageErrorKind::NotFound);
    let open = store.open(&object, 5).expect("opened");
    store.delete(&object).expect("deleted");
    store.create(&name("other"), b"abcde").expect("created");
    assert_eq!(open.size_bytes(), 5);
    let mut part = [0; 3];
    assert_eq!(open.read_at(1, &mut part), Ok(()));
    assert_eq!(&part, b"234");
    assert_eq!(open.read_at(5, &mut []), Ok(()));
    for (offset, length) in [(0, 6), (5, 1), (u64::MAX, 1)] {
        let told = open.read_at(offset, &mut vec![0; length]);
        assert_eq!(
            kind_of(told),
            StorageErrorKind::Corrupt,
            "{offset}+{length}"
        );
    }
}

fn a_listing_is_sorted_by_name_and_keeps_to_whole_parts(store: &dyn Storage) {
    // In the order of names, `-` and `.` come before `/`: not the order of a walk through folders.
    let objects = [
        "packs-1",
        "packs.1",
        "packs/ab",
        "packs/abc/1",
        "packs/abc/2",
        "packs/b/1",
        "q",
    ];
    for (index, object) in objects.iter().enumerate().rev() {
        let data = vec![0; index];
        store.create(&name(object), &data).expect("created");
    }
    let all = store.list("").expect("a listing");
    assert_eq!(names(&all), objects);
    let sizes: Vec<u64> = all.iter().map(|object| object.size_bytes).collect();
    assert_eq!(sizes, [0, 1, 2, 3, 4, 5, 6]);
    for (prefix, expected) in [
        ("packs", &objects[2..6]),
        ("packs/ab", &[]),
        ("packs/abc", &objects[3..5]),
        ("packs/abc/2", &[]),
        ("packs/a", &[]),
        ("pack", &[]),
        ("none/at/all", &[]),
        ("q/below", &[]),
        ("tmp", &[]),
        ("reserve", &[]),
    ] {
        let listed = store.list(prefix).expect("a listing");
        assert_eq!(names(&listed), expected, "{prefix}");
    }
    for prefix in ["packs/", "/", "/packs", "..", "packs/../q", "packs//b", "é"] {
        let told = store.list(prefix);
        assert_eq!(kind_of(told), StorageErrorKind::Unsupported, "{prefix}");
    }
}

fn what_stands_right_below_a_prefix_is_told_once_and_nothing_deeper(store: &dyn Storage) {
    for object in ["a/b-1", "a/b/1", "a/b/2/x", "a/c", "a/d/e/f", "ab/c", "g"] {
        store.create(&name(object), b"data").expect("created");
    }
    let told = |prefix: &str| {
        let parts = store.parts(prefix).expect("parts").into_iter();
        let spelled = |part: Part| match part.is_prefix {
            true => format!("{}/", part.name),
            false => part.name,
        };
        parts.map(spelled).collect::<Vec<String>>()
    };
    assert_eq!(told(""), ["a/", "ab/", "g"]);
    assert_eq!(told("a"), ["b/", "b-1", "c", "d/"]);
    assert_eq!(told("a/d"), ["e/"]);
    for nothing in ["a/c", "a/d/e/f", "none", "g/below", "tmp", "reserve"] {
        assert!(told(nothing).is_empty(), "{nothing}");
    }
    for gone in ["a/b/1", "a/b/2/x", "a/d/e/f"] {
        store.delete(&name(gone)).expect("deleted");
    }
    assert_eq!(told("a"), ["b-1", "c"]);
    for prefix in ["a/", "/", "..", "a//b", "é"] {
        let told = store.parts(prefix);
        assert_eq!(kind_of(told), StorageErrorKind::Unsupported, "{prefix}");
    }
}

fn what_is_deleted_or_destroyed_is_gone_and_nothing_else(store: &dyn Storage) {
    for object in ["a/1", "a/2", "a/3", "b"] {
        store.create(&name(object), b"data").expect("created");
    }
    assert_eq!(store.delete(&name("a/1")), Ok(()));
    assert_eq!(store.destroy(&name("a/2")), Ok(()));
    assert_eq!(names(&store.list("").expect("a listing")), ["a/3", "b"]);
    let told = store.read(&name("a/2"), PLENTY);
    assert_eq!(kind_of(told), StorageErrorKind::NotFound);
    assert_eq!(store.create(&name("a/1"), b"anew"), Ok(()));
    assert_eq!(store.read(&name("a/1"), PLENTY), Ok(b"anew".to_vec()));
}

fn what_is_deleted_together_is_told_of_each_for_itself(store: &dyn Storage) {
    for object in ["a/1", "a/2", "a/3", "b/c/4", "b/c/40", "5"] {
        store.create(&name(object), b"data").expect("created");
    }
    let wanted = [
        "a/1",
        "b/c/4",
        "tmp/x",
        "a/absent",
        "5",
        "no/folder",
        "a/1",
        "a/3",
    ];
    let told = store.delete_all(&wanted.map(name));
    assert_eq!(told.len(), wanted.len());
    for (wanted, told) in wanted.iter().zip(told) {
        match *wanted {
            "tmp/x" => assert_eq!(kind_of(told), StorageErrorKind::Unsupported),
            _ => assert_eq!(told, Ok(()), "{wanted}"),
        }
    }
    let left = store.list("").expect("a listing");
    assert_eq!(names(&left), ["a/2", "b/c/40"]);
    assert_eq!(store.delete_all(&[]), []);
    assert_eq!(store.delete_all(&[name("a/2")]), [Ok(())]);
    assert_eq!(store.create(&name("a/1"), b"anew"), Ok(()));
    assert_eq!(store.read(&name("a/1"), PLENTY), Ok(b"anew".to_vec()));
}

fn names_that_the_store_keeps_for_itself_are_refused(store: &dyn Storage) {
    for own in ["tmp", "tmp/x", "reserve", "reserve/x"] {
        let own = name(own);
        let told = store.create(&own, b"x");
        assert_eq!(kind_of(told), StorageErrorKind::Unsupported, "{own}");
        let told = store.read(&own, PLENTY);
        assert_eq!(kind_of(told), StorageErrorKind::Unsupported, "{own}");
        let told = store.delete(&own);
        assert_eq!(kind_of(told), StorageErrorKind::Unsupported, "{own}");
        let told = store.destroy(&own);
        assert_eq!(kind_of(told), StorageErrorKind::Unsupported, "{own}");
    }
    assert_eq!(store.create(&name("a/tmp"), b"x"), Ok(()));
    assert_eq!(store.create(&name("tmp1"), b"x"), Ok(()));
}

fn an_object_and_a_folder_cannot_share_a_name(store: &dyn Storage) {
    store.create(&name("a/b"), b"x").expect("created");
    for clash in ["a", "a/b/c", "a/b/c/d"] {
        let told = store.create(&name(clash), b"y");
        assert_eq!(kind_of(told), StorageErrorKind::Unsupported, "{clash}");
    }
    assert_eq!(names(&store.list("").expect("a listing")), ["a/b"]);
    assert_eq!(store.leftovers(""), Ok(Vec::new()));
}

/// Those that were told that they created it.
fn winners_of_eight(store: &dyn Storage, object: &ObjectName) -> Vec<u8> {
    let start = Barrier::new(8);
    thread::scope(|scope| {
        let writers: Vec<_> = (0..8u8)
            .map(|writer| {
                let start = &start;
                scope.spawn(move || {
                    let data = vec![writer; 10_000];
                    start.wait();
                    match store.create(object, &data) {
                        Ok(()) => Some(writer),
                        Err(error) => {
                            assert_eq!(error.kind, StorageErrorKind::AlreadyExists);
                            None
                        }
                    }
                })
            })
            .collect();
        writers
            .into_iter()
            .filter_map(|writer| writer.join().expect("a writer"))
            .collect()
    })
}

fn of_eight_racing_writers_exactly_one_wins(store: &dyn Storage) {
    for round in 0..20 {
        let object = name(&format!("race/{round}/slot"));
        let winners = winners_of_eight(store, &object);
        let [winner] = winners.as_slice() else {
            panic!("round {round} was won by {winners:?}");
        };
        let stands = store.read(&object, PLENTY).expect("the object");
        assert_eq!(stands, vec![*winner; 10_000]);
    }
    assert_eq!(store.leftovers(""), Ok(Vec::new()));
}

fn of_eight_racing_writers_one_stands_as_a_whole(store: &dyn Storage) {
    let mut most = 0;
    for round in 0..20 {
        let object = name(&format!("race/{round}/slot"));
        let winners = winners_of_eight(store, &object);
        let stands = store.read(&object, PLENTY).expect("the object");
        let is_whole = |winner: &u8| stands == vec![*winner; 10_000];
        assert!(winners.iter().any(is_whole), "round {round}: {winners:?}");
        most = most.max(winners.len());
    }
    assert!(most > 1, "the condition was kept after all");
}

fn the_probe_finds_it_sound_and_cleans_up(store: &dyn Storage) {
    assert_eq!(probe(store, "customers/c", 20, 8), Ok(Probe::Sound));
    assert_eq!(probe(store, "", 0, 8), Ok(Probe::Sound));
    assert_eq!(store.list(""), Ok(Vec::new()));
    assert_eq!(store.leftovers(""), Ok(Vec::new()));
}

fn creating_and_deleting_in_one_folder_never_fails(store: &dyn Storage) {
    thread::scope(|scope| {
        for writer in 0..4 {
            scope.spawn(move || {
                for round in 0..500 {
                    let object = name(&format!("c/packs/session/{writer}-{round}"));
                    assert_eq!(store.create(&object, b"data"), Ok(()));
                    assert_eq!(store.read(&object, 4), Ok(b"data".to_vec()));
                    assert_eq!(store.delete(&object), Ok(()));
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..500 {
                // Complete for what stands throughout: here nothing, so only failure is an error.
                store.list("c").expect("a listing");
            }
        });
    });
    assert_eq!(store.list(""), Ok(Vec::new()));
}

macro_rules! contract {
    ($($module:ident: $make:expr;)*) => {
        $(mod $module {
            use super::*;
            contract!(@cases $make;
                what_is_created_is_read_back,
                a_taken_name_keeps_its_bytes,
                an_absent_object_is_not_found_and_deleting_it_succeeds,
                an_object_larger_than_allowed_is_damaged,
                a_range_beyond_the_end_is_damaged,
                an_object_held_open_is_read_after_it_was_deleted,
                a_listing_is_sorted_by_name_and_keeps_to_whole_parts,
                what_stands_right_below_a_prefix_is_told_once_and_nothing_deeper,
                what_is_deleted_or_destroyed_is_gone_and_nothing_else,
                what_is_deleted_together_is_told_of_each_for_itself,
                names_that_the_store_keeps_for_itself_are_refused,
                creating_and_deleting_in_one_folder_never_fails,
            );
        })*
    };
    (@cases $make:expr; $($case:ident,)*) => {
        $(#[test]
        fn $case() {
            let (_keep, store) = $make;
            super::$case(&store);
        })*
    };
}

/// What only holds where the store orders several writers: of a bucket, the server decides.
macro_rules! contract_of_many_writers {
    ($($module:ident: $make:expr;)*) => {
        mod many_writers {
            use super::*;
            $(mod $module {
                use super::*;
                #[test]
                fn of_eight_racing_writers_exactly_one_wins() {
                    let (_keep, store) = $make;
                    super::super::of_eight_racing_writers_exactly_one_wins(&store);
                }

                #[test]
                fn the_probe_finds_it_sound_and_cleans_up() {
                    let (_keep, store) = $make;
                    super::super::the_probe_finds_it_sound_and_cleans_up(&store);
                }
            })*
        }
    };
}

/// What only holds where a prefix is a folder: a bucket has none.
macro_rules! contract_of_folders {
    ($($module:ident: $make:expr;)*) => {
        mod folders {
            use super::*;
            $(#[test]
            fn $module() {
                let (_keep, store) = $make;
                an_object_and_a_folder_cannot_share_a_name(&store);
            })*
        }
    };
}

contract! {
    memory: ((), Memory::new());
    directory_on_disk: on_disk();
    directory_in_shared_memory: in_shared_memory();
    faulty_without_faults: ((), Faulty::new(Memory::new()));
    several_handles_of_one_directory: several_handles();
    bucket_of_a_server: in_a_bucket();
}

contract_of_many_writers! {
    memory: ((), Memory::new());
    directory_on_disk: on_disk();
    directory_in_shared_memory: in_shared_memory();
    faulty_without_faults: ((), Faulty::new(Memory::new()));
    several_handles_of_one_directory: several_handles();
}

mod writers_of_a_bucket_of_a_server {
    use super::*;

    #[test]
    fn of_eight_that_race_one_wins_or_where_the_condition_is_ignored_the_last() {
        let ((), store) = in_a_bucket();
        match server().kind.writers() {
            Writers::Many => of_eight_racing_writers_exactly_one_wins(&store),
            Writers::One => of_eight_racing_writers_one_stands_as_a_whole(&store),
        }
    }

    #[test]
    fn the_probe_finds_it_sound_or_where_the_condition_is_ignored_says_so_and_cleans_up() {
        let ((), store) = in_a_bucket();
        if server().kind.writers() == Writers::Many {
            return the_probe_finds_it_sound_and_cleans_up(&store);
        }
        // To ask first helps one writer, and only one.
        assert_eq!(probe(&store, "", 0, 1), Ok(Probe::Sound));
        match probe(&store, "customers/c", 20, 8) {
            Ok(Probe::Unsound { what }) => assert!(what.contains("racing writers"), "{what}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(store.list(""), Ok(Vec::new()));
        assert_eq!(store.leftovers(""), Ok(Vec::new()));
    }
}

contract_of_folders! {
    memory: ((), Memory::new());
    directory_on_disk: on_disk();
    directory_in_shared_memory: in_shared_memory();
    faulty_without_faults: ((), Faulty::new(Memory::new()));
    several_handles_of_one_directory: several_handles();
}

fn in_a_bucket() -> ((), S3) {
    ((), server().bucket().open())
}

fn on_disk() -> (TempDir, Directory) {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Directory::init(&folder.path().join("store"), 0).expect("a store");
    (folder, store)
}

fn in_shared_memory() -> (TempDir, Directory) {
    let folder = tempfile::tempdir_in("/dev/shm").expect("/dev/shm must be there and writable");
    let store = Directory::init(folder.path(), 100_000).expect("a store");
    (folder, store)
}

fn several_handles() -> (TempDir, Several) {
    let folder = tempfile::tempdir_in("/dev/shm").expect("/dev/shm must be there and writable");
    let handles = (0..3)
        .map(|_| Directory::init(folder.path(), 0).expect("a store"))
        .collect();
    let several = Several {
        handles,
        next: Mutex::default(),
    };
    (folder, several)
}

/// Sends each call through another handle, as if each came from another process.
struct Several {
    handles: Vec<Directory>,
    next: Mutex<usize>,
}

impl Several {
    fn one(&self) -> &Directory {
        let mut next = self.next.lock().expect("a counter");
        *next += 1;
        &self.handles[*next % self.handles.len()]
    }
}

/// Forwards all but `create` to another store.
macro_rules! forward_all_but_create {
    ($self:ident => $inner:expr) => {
        fn read(&$self, name: &ObjectName, max_bytes: u64) -> Result<Vec<u8>, StorageError> {
            $inner.read(name, max_bytes)
        }
        fn read_range(
            &$self,
            name: &ObjectName,
            offset: u64,
            buffer: &mut [u8],
        ) -> Result<(), StorageError> {
            $inner.read_range(name, offset, buffer)
        }
        fn size_bytes(&$self, name: &ObjectName) -> Result<u64, StorageError> {
            $inner.size_bytes(name)
        }
        fn list(&$self, prefix: &str) -> Result<Vec<Listed>, StorageError> {
            $inner.list(prefix)
        }
        fn delete(&$self, name: &ObjectName) -> Result<(), StorageError> {
            $inner.delete(name)
        }
        fn destroy(&$self, name: &ObjectName) -> Result<(), StorageError> {
            $inner.destroy(name)
        }
        fn sweep_leftovers(&$self, prefix: &str) -> Result<Vec<Leftover>, StorageError> {
            $inner.sweep_leftovers(prefix)
        }
        fn survey(&$self, prefix: &str) -> Result<Survey, StorageError> {
            $inner.survey(prefix)
        }
        fn free_bytes(&$self) -> Option<u64> {
            $inner.free_bytes()
        }
        fn release_reserve(&$self) -> Result<bool, StorageError> {
            $inner.release_reserve()
        }
        fn restore_reserve(&$self) -> Result<bool, StorageError> {
            $inner.restore_reserve()
        }
        fn location(&$self) -> String {
            $inner.location()
        }
    };
}

impl Storage for Several {
    fn create(&self, name: &ObjectName, data: &[u8]) -> Result<(), StorageError> {
        self.one().create(name, data)
    }

    forward_all_but_create!(self => self.one());
}

// ---------------------------------------------------------------- the probe

/// How a store can lie about "create if absent".
#[derive(Debug, Clone, Copy)]
enum Lie {
    /// The condition is accepted and ignored.
    Overwrites,
    /// True one after the other; several racers win.
    SeveralRacersWin,
    /// The loser is told so, and its bytes stand.
    TheRefusedStand,
}

struct Lying {
    inner: Memory,
    lie: Lie,
    first: Mutex<Option<(ObjectName, ThreadId)>>,
}

impl Storage for Lying {
    fn create(&self, name: &ObjectName, data: &[u8]) -> Result<(), StorageError> {
        let mut first = self.first.lock().expect("the first writer");
        let told = self.inner.create(name, data);
        if told.is_ok() {
            *first = Some((name.clone(), thread::current().id()));
            return told;
        }
        match self.lie {
            Lie::Overwrites => {
                self.inner.plant(name, data);
                Ok(())
            }
            Lie::SeveralRacersWin if *first != Some((name.clone(), thread::current().id())) => {
                Ok(())
            }
            Lie::SeveralRacersWin => told,
            Lie::TheRefusedStand => {
                self.inner.plant(name, data);
                told
            }
        }
    }

    forward_all_but_create!(self => self.inner);
}

#[test]
fn the_probe_finds_each_lie_and_cleans_up() {
    for lie in [Lie::Overwrites, Lie::SeveralRacersWin, Lie::TheRefusedStand] {
        let store = Lying {
            inner: Memory::new(),
            lie,
            first: Mutex::default(),
        };
        let told = probe(&store, "customers/c", 20, 8);
        assert!(
            matches!(told, Ok(Probe::Unsound { .. })),
            "{lie:?}: {told:?}"
        );
        assert_eq!(store.list(""), Ok(Vec::new()), "{lie:?}");
    }
}

#[test]
fn a_sequential_probe_alone_does_not_find_a_store_where_racers_win() {
    let store = Lying {
        inner: Memory::new(),
        lie: Lie::SeveralRacersWin,
        first: Mutex::default(),
    };
    assert_eq!(probe(&store, "c", 0, 8), Ok(Probe::Sound));
}

#[test]
fn a_lost_reply_does_not_make_a_sound_store_look_unsound() {
    let store = Faulty::new(Memory::new());
    assert_eq!(probe(&store, "c", 2, 4), Ok(Probe::Sound));
    let operations = store.log();
    let creations = operations.iter().filter(|one| one.verb == Verb::Create);
    for creation in creations {
        let at = creation.number;
        let store = Faulty::with_faults(Memory::new(), vec![Fault::FailAfter { at }]);
        assert_eq!(probe(&store, "c", 2, 4), Ok(Probe::Sound), "{at}");
        assert_eq!(store.inner().list(""), Ok(Vec::new()), "{at}");
    }
}

#[test]
fn a_host_that_deletes_nothing_finds_a_store_that_ignores_the_condition() {
    for lie in [Lie::Overwrites, Lie::TheRefusedStand] {
        let store = Lying {
            inner: Memory::new(),
            lie,
            first: Mutex::default(),
        };
        // Whether the object that stands for this is there yet or not.
        for time in ["first", "second"] {
            let told = probe_without_deleting(&store, "customers/c");
            let lies = matches!(told, Ok((Probe::Unsound { .. }, _)));
            assert!(lies, "{lie:?}, {time}: {told:?}");
        }
    }
}

#[test]
fn a_probe_that_deletes_nothing_leaves_one_object_however_often_and_by_whomever() {
    let memory = Memory::new();
    for _ in 0..3 {
        let store = Faulty::new(memory.clone());
        let told = probe_without_deleting(&store, "customers/c");
        assert_eq!(told, Ok((Probe::Sound, None)));
        let only_adds = store
            .log()
            .iter()
            .all(|line| line.verb == Verb::Create || !line.verb.writes());
        assert!(only_adds, "{:?}", store.log());
    }
    let left = memory.list("").expect("a listing");
    let names: Vec<&str> = left.iter().map(|object| object.name.as_str()).collect();
    assert_eq!(names, ["customers/c/probe/standing"]);
}

#[test]
fn a_lost_reply_does_not_mislead_a_probe_that_deletes_nothing() {
    let store = Faulty::new(Memory::new());
    probe_without_deleting(&store, "c").expect("probed");
    for at in 1..=store.operations() {
        for (fault, is_sound) in [
            (Fault::FailAfter { at }, true),
            (
                Fault::FailBefore {
                    at,
                    kind: StorageErrorKind::Denied,
                },
                false,
            ),
        ] {
            let store = Faulty::with_faults(Memory::new(), vec![fault.clone()]);
            let was_create = |verb: Verb| verb == Verb::Create;
            let told = probe_without_deleting(&store, "c");
            let verb = store.log()[at as usize - 1].verb;
            match is_sound && was_create(verb) {
                true => assert_eq!(told, Ok((Probe::Sound, None)), "{fault:?}"),
                // Never a verdict about the store where it was not asked.
                false => assert!(!matches!(told, Ok((Probe::Unsound { .. }, _))), "{fault:?}"),
            }
        }
    }
}

// ---------------------------------------------------------------- memory

#[test]
fn a_snapshot_brings_back_what_was_there_and_nothing_else() {
    let store = Memory::new();
    let shared = store.clone();
    store.create(&name("a"), b"1").expect("created");
    let snapshot = store.snapshot();
    shared.delete(&name("a")).expect("deleted");
    shared.create(&name("b"), b"2").expect("created");
    assert_eq!(names(&store.list("").expect("a listing")), ["b"]);
    let apart = Memory::from_snapshot(&snapshot);
    assert_eq!(names(&apart.list("").expect("a listing")), ["a"]);
    store.restore_snapshot(&snapshot);
    assert_eq!(names(&shared.list("").expect("a listing")), ["a"]);
    store.delete(&name("a")).expect("deleted");
    assert_eq!(names(&apart.list("").expect("a listing")), ["a"]);
}

#[test]
fn planted_leftovers_are_shown_and_swept() {
    let store = Memory::new();
    store.plant_leftover("upload-1", 7);
    let expected = vec![Leftover {
        place: "upload-1".to_string(),
        size_bytes: 7,
    }];
    assert_eq!(store.leftovers(""), Ok(expected.clone()));
    assert_eq!(store.sweep_leftovers(""), Ok(expected));
    assert_eq!(store.leftovers(""), Ok(Vec::new()));
}

// ---------------------------------------------------------------- planned faults

/// Six operations, of which four change the store.
fn a_small_night(store: &dyn Storage) -> Result<(), StorageError> {
    store.create(&name("a"), b"1")?;
    store.read(&name("a"), 10)?;
    store.create(&name("b"), b"2")?;
    store.list("")?;
    store.delete(&name("a"))?;
    store.create(&name("c"), b"3")
}

#[test]
fn a_crash_at_each_operation_leaves_exactly_what_was_done_before() {
    let states: [&[&str]; 7] = [
        &[],
        &["a"],
        &["a"],
        &["a", "b"],
        &["a", "b"],
        &["b"],
        &["b", "c"],
    ];
    let mut seen = BTreeSet::new();
    for at in 1..=6u64 {
        for applied in [false, true] {
            let memory = Memory::new();
            let store = Faulty::with_faults(memory.clone(), vec![Fault::CrashAt { at, applied }]);
            let told = a_small_night(&store);
            assert_eq!(kind_of(told), StorageErrorKind::Denied);
            assert!(store.crashed());
            let done = usize::try_from(at).expect("small") - usize::from(!applied);
            let listed = memory.list("").expect("a listing");
            assert_eq!(names(&listed), states[done], "{at} {applied}");
            seen.insert(names(&listed).join(","));
            // The dead do nothing more.
            let told = store.create(&name("late"), b"x");
            assert_eq!(kind_of(told), StorageErrorKind::Denied);
            assert_eq!(memory.list("").expect("a listing"), listed);
        }
    }
    assert_eq!(seen.len(), 5);
    let store = Faulty::with_faults(
        Memory::new(),
        vec![Fault::CrashAt {
            at: 7,
            applied: true,
        }],
    );
    assert_eq!(a_small_night(&store), Ok(()));
    assert!(!store.crashed());
}

#[test]
fn a_failure_before_has_no_effect_and_a_lost_reply_has_one() {
    let memory = Memory::new();
    let faults = vec![
        Fault::FailBefore {
            at: 1,
            kind: StorageErrorKind::Full,
        },
        Fault::FailAfter { at: 2 },
    ];
    let store = Faulty::with_faults(memory.clone(), faults);
    let object = name("a");
    assert_eq!(kind_of(store.create(&object, b"1")), StorageErrorKind::Full);
    assert_eq!(memory.list(""), Ok(Vec::new()));
    let told = store.create(&object, b"2");
    assert_eq!(kind_of(told), StorageErrorKind::Transient);
    assert_eq!(memory.read(&object, 10), Ok(b"2".to_vec()));
    let told = store.create(&object, b"2");
    assert_eq!(kind_of(told), StorageErrorKind::AlreadyExists);
    let told: Vec<_> = store.log().into_iter().map(|one| one.told).collect();
    let expected = [
        StorageErrorKind::Full,
        StorageErrorKind::Transient,
        StorageErrorKind::AlreadyExists,
    ];
    assert_eq!(told, expected.map(|kind| Some(Err(kind))));
    assert_eq!(store.operations(), 3);
}

#[test]
fn a_full_store_still_reads_and_deletes() {
    let store = Faulty::with_faults(Memory::new(), vec![Fault::FullFrom { at: 2 }]);
    store.create(&name("a"), b"1").expect("created");
    let told = store.create(&name("b"), b"2");
    assert_eq!(kind_of(told), StorageErrorKind::Full);
    assert_eq!(store.read(&name("a"), 1), Ok(b"1".to_vec()));
    assert_eq!(store.delete(&name("a")), Ok(()));
    store.clear_faults();
    assert_eq!(store.create(&name("b"), b"2"), Ok(()));
}

#[test]
fn a_flipped_byte_shows_in_every_read_that_covers_it_and_in_no_other() {
    let store = Faulty::new(Memory::new());
    store.create(&name("a"), &[0; 10]).expect("created");
    store.create(&name("b"), &[0; 10]).expect("created");
    store.add(Fault::FlipOnRead {
        name: name("a"),
        offset: 4,
        mask: 0x81,
    });
    let mut expected = vec![0; 10];
    expected[4] = 0x81;
    assert_eq!(store.read(&name("a"), 10), Ok(expected));
    assert_eq!(store.read(&name("b"), 10), Ok(vec![0; 10]));
    for (offset, expected) in [(0, [0, 0]), (3, [0, 0x81]), (4, [0x81, 0]), (5, [0, 0])] {
        let mut part = [9, 9];
        let told = store.read_range(&name("a"), offset, &mut part);
        assert_eq!((told, part), (Ok(()), expected), "{offset}");
    }
}

#[test]
fn a_frozen_operation_waits_before_or_after_its_effect_while_others_go_on() {
    let memory = Memory::new();
    let frozen_host = Faulty::new(memory.clone());
    let before = frozen_host.freeze_before(1);
    let after = frozen_host.freeze_after(2);
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let first = frozen_host.create(&name("a"), b"frozen");
            (first, frozen_host.create(&name("b"), b"frozen"))
        });
        assert!(before.wait_until_reached(SOON));
        assert_eq!(memory.list(""), Ok(Vec::new()));
        assert_eq!(memory.create(&name("a"), b"quick"), Ok(()));
        before.release();
        assert!(after.wait_until_reached(SOON));
        assert_eq!(memory.read(&name("b"), 10), Ok(b"frozen".to_vec()));
        assert_eq!(
            frozen_host.log().last().map(|one| one.told.is_none()),
            Some(true)
        );
        after.release();
        let (first, second) = writer.join().expect("the writer");
        assert_eq!(kind_of(first), StorageErrorKind::AlreadyExists);
        assert_eq!(second, Ok(()));
    });
    assert_eq!(memory.read(&name("a"), 10), Ok(b"quick".to_vec()));
}

#[test]
fn nobody_reaching_a_freeze_is_reported_and_not_waited_for_without_end() {
    let store = Faulty::new(Memory::new());
    let frozen = store.freeze_before(3);
    store.create(&name("a"), b"").expect("created");
    assert!(!frozen.wait_until_reached(Duration::from_millis(1)));
}

// ---------------------------------------------------------------- directories

#[test]
fn a_directory_is_shared_between_threads() {
    fn shareable<T: Storage + Send + Sync + 'static>(_: Arc<T>) {}
    let (_folder, store) = on_disk();
    shareable(Arc::new(store));
}

#[test]
fn a_missing_root_is_not_found_and_says_what_to_look_at() {
    let folder = tempfile::tempdir().expect("a folder");
    let error = Directory::open(&folder.path().join("none")).expect_err("no root");
    assert_eq!(error.kind, StorageErrorKind::NotFound);
    assert!(error.detail.contains("mounted"), "{error}");
    let error = Directory::init(&folder.path().join("none/store"), 0).expect_err("no parent");
    assert_eq!(error.kind, StorageErrorKind::NotFound);
    assert!(!folder.path().join("none").exists());
    fs::write(folder.path().join("file"), "").expect("a file");
    for told in [
        Directory::open(&folder.path().join("file")),
        Directory::init(&folder.path().join("file"), 0),
    ] {
        assert_eq!(kind_of(told), StorageErrorKind::Unsupported);
    }
}

#[test]
fn initialising_again_keeps_what_is_there() {
    let (folder, store) = on_disk();
    store.create(&name("a/b"), b"x").expect("created");
    let root = folder.path().join("store");
    let again = Directory::init(&root, 50_000).expect("a store");
    assert_eq!(again.read(&name("a/b"), 1), Ok(b"x".to_vec()));
    let reserve = fs::metadata(root.join("reserve")).expect("the reserve");
    assert_eq!(reserve.len(), 50_000);
    assert!(reserve.blocks() * 512 >= 50_000);
    assert_eq!(
        again.location(),
        fs::canonicalize(&root)
            .expect("a path")
            .display()
            .to_string()
    );
    assert!(again.free_bytes().is_some_and(|free| free > 0));
    Directory::init(&root, 0).expect("a store");
    assert!(!root.join("reserve").exists());
}

#[test]
fn only_the_owner_may_look_into_a_store() {
    let (folder, store) = on_disk();
    store.create(&name("a/b/c"), b"x").expect("created");
    let root = folder.path().join("store");
    for (path, mode) in [
        ("", 0o700),
        ("a", 0o700),
        ("a/b", 0o700),
        ("tmp", 0o700),
        ("a/b/c", 0o600),
    ] {
        let found = fs::metadata(root.join(path))
            .expect("metadata")
            .permissions();
        assert_eq!(found.mode() & 0o777, mode, "{path}");
    }
}

#[test]
fn empty_folders_go_with_their_last_object_except_the_first_level() {
    let (folder, store) = on_disk();
    let root = folder.path().join("store");
    for object in [
        "customers/c/packs/s/1",
        "customers/c/packs/s/2",
        "customers/c/key",
    ] {
        store.create(&name(object), b"x").expect("created");
    }
    store
        .delete(&name("customers/c/packs/s/1"))
        .expect("deleted");
    assert!(root.join("customers/c/packs/s").exists());
    store
        .destroy(&name("customers/c/packs/s/2"))
        .expect("destroyed");
    assert!(!root.join("customers/c/packs").exists());
    store.delete(&name("customers/c/key")).expect("deleted");
    assert!(!root.join("customers/c").exists());
    assert!(root.join("customers").exists());
    assert!(root.join("tmp").exists());
}

#[test]
fn destroyed_bytes_are_overwritten_for_those_who_still_hold_the_file() {
    let (folder, store) = on_disk();
    let data = vec![0x55; 200_000];
    for (object, survives) in [("deleted", true), ("destroyed", false)] {
        store.create(&name(object), &data).expect("created");
        let mut held = File::open(folder.path().join("store").join(object)).expect("the file");
        match survives {
            true => store.delete(&name(object)).expect("deleted"),
            false => store.destroy(&name(object)).expect("destroyed"),
        }
        let mut bytes = Vec::new();
        held.read_to_end(&mut bytes).expect("read");
        assert_eq!(bytes.len(), data.len());
        let long_run = bytes.windows(16).any(|window| window == [0x55; 16]);
        assert_eq!(long_run, survives, "{object}");
    }
}

#[test]
fn a_symbolic_link_in_the_store_is_never_followed() {
    let (folder, store) = on_disk();
    let root = folder.path().join("store");
    let outside = folder.path().join("outside");
    fs::create_dir(&outside).expect("a folder");
    fs::write(outside.join("secret"), "secret").expect("a file");
    symlink("../outside/secret", root.join("link")).expect("a link");
    symlink(&outside, root.join("folder")).expect("a link");
    for object in ["link", "folder/secret"] {
        let object = name(object);
        assert_eq!(
            kind_of(store.read(&object, PLENTY)),
            StorageErrorKind::Corrupt
        );
        assert_eq!(
            kind_of(store.size_bytes(&object)),
            StorageErrorKind::Corrupt
        );
        assert_eq!(kind_of(store.destroy(&object)), StorageErrorKind::Corrupt);
    }
    assert_eq!(
        kind_of(store.create(&name("folder/new"), b"x")),
        StorageErrorKind::Corrupt
    );
    assert_eq!(
        kind_of(store.delete(&name("folder/secret"))),
        StorageErrorKind::Corrupt
    );
    assert_eq!(
        kind_of(store.create(&name("link"), b"x")),
        StorageErrorKind::AlreadyExists
    );
    assert_eq!(store.list(""), Ok(Vec::new()));
    assert_eq!(kind_of(store.list("folder")), StorageErrorKind::Corrupt);
    assert_eq!(
        places(&store.leftovers("").expect("leftovers")),
        ["folder", "link"]
    );
    // The link itself can be removed.
    assert_eq!(store.delete(&name("link")), Ok(()));
    assert_eq!(
        fs::read(outside.join("secret")).expect("the file"),
        b"secret"
    );
    assert_eq!(fs::read_dir(&outside).expect("the folder").count(), 1);
    // Nor is a link in the place of the folder for temporary files.
    fs::remove_dir(root.join("tmp")).expect("removed");
    symlink(&outside, root.join("tmp")).expect("a link");
    assert_eq!(
        kind_of(store.create(&name("a"), b"x")),
        StorageErrorKind::Corrupt
    );
    assert_eq!(
        kind_of(store.sweep_leftovers("")),
        StorageErrorKind::Corrupt
    );
    assert_eq!(fs::read_dir(&outside).expect("the folder").count(), 1);
}

#[test]
fn a_pipe_under_an_objects_name_is_damage_and_nobody_waits_for_it() {
    let (folder, store) = on_disk();
    let pipe = folder.path().join("store/pipe");
    let made = Command::new("mkfifo").arg(&pipe).status().expect("mkfifo");
    assert!(made.success());
    assert_eq!(
        kind_of(store.read(&name("pipe"), 1)),
        StorageErrorKind::Corrupt
    );
    assert_eq!(
        kind_of(store.size_bytes(&name("pipe"))),
        StorageErrorKind::Corrupt
    );
    assert_eq!(
        kind_of(store.destroy(&name("pipe"))),
        StorageErrorKind::Corrupt
    );
    assert_eq!(store.list(""), Ok(Vec::new()));
    assert_eq!(places(&store.leftovers("").expect("leftovers")), ["pipe"]);
}

#[test]
fn files_that_no_object_can_be_are_shown_as_leftovers_and_only_there() {
    let (folder, store) = in_shared_memory();
    let root = folder.path();
    store.create(&name("a/object"), b"x").expect("created");
    fs::create_dir_all(root.join(".git/deep")).expect("a folder");
    fs::create_dir_all(root.join("lost+found")).expect("a folder");
    fs::create_dir_all(root.join("tmp/folder")).expect("a folder");
    let long = format!("a{}", "é".repeat(60));
    let long_shown = format!("a/a{}", "\\xc3\\xa9".repeat(60));
    fs::write(root.join(".git/deep/object"), "12").expect("a file");
    fs::write(root.join("a/.hidden"), "123").expect("a file");
    fs::write(root.join("a").join(&long), "1234").expect("a file");
    fs::write(root.join("tmp/folder/file"), "12345").expect("a file");
    let hostile = Path::new(std::ffi::OsStr::from_bytes(b"\x1b[2J\xff"));
    fs::write(root.join(hostile), "").expect("a file");

    let leftovers = store.leftovers("").expect("leftovers");
    let shown: Vec<_> = leftovers
        .iter()
        .map(|one| (one.place.as_str(), one.size_bytes))
        .collect();
    let expected = [
        (".git/deep/object", 2),
        ("\\x1b[2J\\xff", 0),
        ("a/.hidden", 3),
        (&long_shown, 4),
        ("tmp/folder/file", 5),
    ];
    assert_eq!(shown, expected);
    assert_eq!(names(&store.list("").expect("a listing")), ["a/object"]);
    // None of them is the store's to remove.
    assert_eq!(store.sweep_leftovers(""), Ok(Vec::new()));
    assert_eq!(store.leftovers(""), Ok(leftovers));
}

#[test]
fn of_what_stands_in_a_folder_the_stores_own_and_empty_folders_are_no_parts() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = Directory::init(folder.path(), 100_000).expect("a store");
    store.create(&name("a/b"), b"x").expect("created");
    fs::write(folder.path().join("tmp/left"), "x").expect("a file");
    fs::create_dir_all(folder.path().join("empty/below")).expect("folders");
    fs::create_dir_all(folder.path().join("a copy/of/it")).expect("folders");
    fs::write(folder.path().join("a copy/of/it/b"), "x").expect("a file");
    fs::write(folder.path().join("a.tar"), "x").expect("a file");
    symlink("a", folder.path().join("link")).expect("a link");
    let parts = store.parts("").expect("parts").into_iter();
    let told: Vec<_> = parts.map(|part| (part.name, part.is_prefix)).collect();
    let expected = [
        ("a", true),
        ("a copy", true),
        ("a.tar", false),
        ("link", false),
    ];
    let expected = expected.map(|(name, is_prefix)| (name.to_string(), is_prefix));
    assert_eq!(told, expected);
}

#[test]
fn a_sweep_removes_what_a_killed_writer_left_and_nothing_that_a_living_one_holds() {
    let (folder, store) = on_disk();
    let tmp = folder.path().join("store/tmp");
    let (held, dead) = (tmp.join("0".repeat(32)), tmp.join("1".repeat(32)));
    fs::write(&held, "precious").expect("a file");
    fs::write(&dead, "dead").expect("a file");
    // Another process with the lock; its echo proves that it holds it.
    let mut writer = Command::new("flock")
        .arg("--no-fork")
        .arg(&held)
        .arg("cat")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("flock of util-linux must be installed");
    let mut input = writer.stdin.take().expect("a pipe");
    input.write_all(b"alive\n").expect("written");
    let mut output = BufReader::new(writer.stdout.take().expect("a pipe"));
    let mut echo = String::new();
    output.read_line(&mut echo).expect("an echo");
    assert_eq!(echo, "alive\n");

    let mut dead_bytes = File::open(&dead).expect("the file");
    let swept = store.sweep_leftovers("").expect("swept");
    assert_eq!(places(&swept), [format!("tmp/{}", "1".repeat(32))]);
    assert_eq!(swept.first().map(|one| one.size_bytes), Some(4));
    assert!(!dead.exists());
    let mut bytes = Vec::new();
    dead_bytes.read_to_end(&mut bytes).expect("read");
    assert_ne!(bytes, b"dead", "its bytes are overwritten");
    assert_eq!(fs::read(&held).expect("the file"), b"precious");
    let left = store.leftovers("").expect("leftovers");
    assert_eq!(places(&left), [format!("tmp/{}", "0".repeat(32))]);

    writer.kill().expect("killed");
    writer.wait().expect("gone");
    assert_eq!(places(&store.sweep_leftovers("").expect("swept")).len(), 1);
    assert_eq!(store.leftovers(""), Ok(Vec::new()));
}

#[test]
fn a_sweep_does_not_overwrite_an_object_that_has_a_second_name_among_temporary_files() {
    let (folder, store) = on_disk();
    let root = folder.path().join("store");
    store
        .create(&name("a/object"), b"precious")
        .expect("created");
    // As a crash between link and unlink leaves it.
    fs::hard_link(root.join("a/object"), root.join("tmp/0123")).expect("a link");
    // Another test of this process may start a program: until that has replaced itself, it holds
    // the writer's lock as well, and the sweep rightly leaves the file for later.
    let swept = std::iter::repeat_with(|| {
        thread::yield_now();
        store.sweep_leftovers("").expect("swept")
    })
    .take(100_000)
    .find(|swept| !swept.is_empty());
    assert_eq!(places(&swept.unwrap_or_default()), ["tmp/0123"]);
    assert_eq!(store.read(&name("a/object"), 100), Ok(b"precious".to_vec()));
    assert_eq!(store.leftovers(""), Ok(Vec::new()));
}

#[test]
fn sweeping_all_the_time_disturbs_no_writer() {
    let (folder, store) = in_shared_memory();
    let sweeper = Directory::open(folder.path()).expect("a store");
    let done = AtomicBool::new(false);
    let data = vec![0x55; 20_000];
    thread::scope(|scope| {
        let sweeping = scope.spawn(|| {
            let mut sweeps = 0u32;
            while !done.load(Ordering::Acquire) {
                // It may meet a file between its creation and its lock; its writer takes another.
                sweeper.sweep_leftovers("").expect("swept");
                sweeps += 1;
            }
            sweeps
        });
        let writers: Vec<_> = (0..3)
            .map(|writer| {
                let (store, data) = (&store, &data);
                scope.spawn(move || {
                    for round in 0..1000 {
                        let object = name(&format!("a/{writer}-{round}"));
                        assert_eq!(store.create(&object, data), Ok(()));
                    }
                })
            })
            .collect();
        let ended: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        done.store(true, Ordering::Release);
        assert!(ended.iter().all(Result::is_ok));
        assert!(sweeping.join().expect("the sweeper") > 100);
    });
    let objects = store.list("a").expect("a listing");
    assert_eq!(objects.len(), 3000);
    for object in objects {
        assert!(
            store.read(&object.name, PLENTY) == Ok(data.clone()),
            "{}",
            object.name
        );
    }
    assert_eq!(store.leftovers(""), Ok(Vec::new()));
}

#[test]
fn a_file_that_shrank_is_damaged() {
    let (folder, store) = on_disk();
    store.create(&name("a"), &[1; 100]).expect("created");
    let file = File::options()
        .write(true)
        .open(folder.path().join("store/a"))
        .expect("the file");
    file.set_len(50).expect("cut");
    let told = store.read_range(&name("a"), 40, &mut [0; 20]);
    assert_eq!(kind_of(told), StorageErrorKind::Corrupt);
    assert_eq!(store.size_bytes(&name("a")), Ok(50));
}

#[test]
fn a_locked_object_file_changes_nothing() {
    // Only temporary files are judged by locks.
    let (folder, store) = on_disk();
    store.create(&name("a"), b"x").expect("created");
    let file = File::open(folder.path().join("store/a")).expect("the file");
    flock(&file, FlockOperation::LockExclusive).expect("locked");
    assert_eq!(store.destroy(&name("a")), Ok(()));
}

// ---------------------------------------------------------------- small file systems

/// A file system of its own, gone with this value.
struct Mounted {
    folder: TempDir,
}

impl Mounted {
    fn tmpfs(size: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let told = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "vmkeep-test"])
            .arg(folder.path())
            .output()
            .expect("mount must be installed");
        assert!(
            told.status.success(),
            "this test mounts a small file system and must run as root: {}",
            String::from_utf8_lossy(&told.stderr)
        );
        Mounted { folder }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn make_read_only(&self) {
        let told = Command::new("mount")
            .args(["-o", "remount,ro"])
            .arg(self.path())
            .status()
            .expect("mount");
        assert!(told.success());
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a failed test may still hold files open.
        let told = Command::new("umount").arg("-l").arg(self.path()).status();
        if !told.is_ok_and(|status| status.success()) && !thread::panicking() {
            panic!("{} is still mounted", self.path().display());
        }
    }
}

#[test]
fn on_a_full_disk_nothing_half_written_stays_and_the_reserve_lets_work_go_on() {
    let disk = Mounted::tmpfs("1M");
    let store = Directory::init(disk.path(), 256 * 1024).expect("a store");
    let pack = vec![7; 64 * 1024];
    let mut created = 0;
    let full = loop {
        match store.create(&name(&format!("packs/s/{created}")), &pack) {
            Ok(()) => created += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(full.kind, StorageErrorKind::Full);
    assert!((9..=12).contains(&created), "{created}");
    let told = store.create(&name("packs/t/u/too-much"), &pack);
    assert_eq!(kind_of(told), StorageErrorKind::Full);
    assert_eq!(store.leftovers(""), Ok(Vec::new()));
    assert_eq!(store.list("").expect("a listing").len(), created);
    assert!(!disk.path().join("packs/t").exists());
    // A repeated creation is answered though nothing more can be written.
    let told = store.create(&name("packs/s/0"), &pack);
    assert_eq!(kind_of(told), StorageErrorKind::AlreadyExists);

    assert_eq!(store.release_reserve(), Ok(true));
    assert_eq!(store.release_reserve(), Ok(false));
    for entry in 0..3 {
        let entry = name(&format!("ledger/{entry}"));
        assert_eq!(store.create(&entry, &pack), Ok(()));
    }
    assert_eq!(store.restore_reserve(), Ok(false));
    // What could not be restored does not keep the rest from being used.
    assert_eq!(store.create(&name("ledger/3"), &pack), Ok(()));
    for pack in 0..created {
        let pack = name(&format!("packs/s/{pack}"));
        assert_eq!(store.destroy(&pack), Ok(()));
    }
    let again = Directory::open(disk.path()).expect("a store");
    assert_eq!(again.restore_reserve(), Ok(true));
    assert!(
        again
            .free_bytes()
            .is_some_and(|free| free < 1024 * 1024 - 256 * 1024)
    );
    assert_eq!(again.release_reserve(), Ok(true));
}

#[test]
fn a_full_disk_without_any_free_byte_still_deletes() {
    let disk = Mounted::tmpfs("1M");
    let store = Directory::init(disk.path(), 0).expect("a store");
    store.create(&name("a"), &[1; 100_000]).expect("created");
    let mut ballast = File::create(disk.path().join("ballast")).expect("a file");
    while ballast.write(&[0; 4096]).is_ok() {}
    assert_eq!(store.free_bytes(), Some(0));
    assert_eq!(
        kind_of(store.create(&name("b"), b"x")),
        StorageErrorKind::Full
    );
    assert_eq!(store.release_reserve(), Ok(false));
    assert_eq!(store.destroy(&name("a")), Ok(()));
    // A child that another test has just forked holds what was open here until it is another program.
    let has_room = || {
        std::thread::yield_now();
        store.create(&name("b"), b"x").is_ok()
    };
    assert!((0..100_000).any(|_| has_room()));
}

#[test]
fn a_reserve_larger_than_the_disk_is_refused_and_takes_nothing() {
    let disk = Mounted::tmpfs("1M");
    let told = Directory::init(disk.path(), 4 << 20);
    assert_eq!(kind_of(told), StorageErrorKind::Full);
    let store = Directory::open(disk.path()).expect("a store");
    assert_eq!(store.create(&name("a"), &vec![1; 900_000]), Ok(()));
}

#[test]
fn a_read_only_store_is_read_and_every_change_is_denied() {
    let disk = Mounted::tmpfs("1M");
    let store = Directory::init(disk.path(), 4096).expect("a store");
    store.create(&name("a/b"), b"x").expect("created");
    drop(store);
    fs::write(disk.path().join("tmp/dead"), "x").expect("a file");
    disk.make_read_only();
    let store = Directory::open(disk.path()).expect("a store");
    assert_eq!(store.read(&name("a/b"), 1), Ok(b"x".to_vec()));
    assert_eq!(names(&store.list("").expect("a listing")), ["a/b"]);
    assert_eq!(
        kind_of(store.create(&name("a/c"), b"x")),
        StorageErrorKind::Denied
    );
    assert_eq!(
        kind_of(store.create(&name("new/c"), b"x")),
        StorageErrorKind::Denied
    );
    assert_eq!(
        kind_of(store.create(&name("a/b"), b"x")),
        StorageErrorKind::AlreadyExists
    );
    assert_eq!(
        kind_of(store.delete(&name("a/b"))),
        StorageErrorKind::Denied
    );
    assert_eq!(
        kind_of(store.destroy(&name("a/b"))),
        StorageErrorKind::Denied
    );
    assert_eq!(kind_of(store.sweep_leftovers("")), StorageErrorKind::Denied);
    assert_eq!(kind_of(store.release_reserve()), StorageErrorKind::Denied);
    assert_eq!(
        places(&store.leftovers("").expect("leftovers")),
        ["tmp/dead"]
    );
}

#[test]
fn a_disk_mounted_inside_the_store_is_unsupported_and_not_written_to_without_a_rename() {
    let disk = Mounted::tmpfs("1M");
    let store = Directory::init(disk.path(), 0).expect("a store");
    store.create(&name("a/b"), b"x").expect("created");
    fs::create_dir(disk.path().join("other")).expect("a folder");
    let told = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k", "vmkeep-test"])
        .arg(disk.path().join("other"))
        .status()
        .expect("mount");
    assert!(told.success());
    let told = store.create(&name("other/c"), b"x");
    let unmounted = Command::new("umount")
        .arg("-l")
        .arg(disk.path().join("other"))
        .status()
        .expect("umount");
    assert!(unmounted.success());
    assert_eq!(kind_of(told), StorageErrorKind::Unsupported);
    assert_eq!(store.leftovers(""), Ok(Vec::new()));
}
