//! What only a bucket can get wrong, against a real server.

use vmkeep_test_support as support;

use aws_sdk_s3::types::BucketVersioningStatus;
use std::collections::BTreeSet;
use std::sync::Barrier;
use std::time::Duration;
use support::s3::{ACCESS_KEY_ID, Bucket, Condition, Kind, Mishap, Passed, Proxy, server};
use vmkeep::model::{ObjectName, Versioning};
use vmkeep::storage::{
    Leftover, Probe, S3, S3Credentials, Storage, StorageError, StorageErrorKind, probe,
};

const PLENTY: u64 = 1 << 30;

fn name(name: &str) -> ObjectName {
    ObjectName::new(name).expect("a valid name")
}

#[track_caller]
fn kind_of<T: std::fmt::Debug>(told: Result<T, StorageError>) -> StorageErrorKind {
    told.expect_err("a failure was expected").kind
}

fn places(leftovers: &[Leftover]) -> Vec<&str> {
    leftovers.iter().map(|one| one.place.as_str()).collect()
}

/// A bucket that keeps versions, or did; `None` where the server says that it can keep none.
fn versioned(status: BucketVersioningStatus) -> Option<Bucket> {
    let bucket = server().bucket();
    if !server().kind.has_versions() {
        bucket.keeps_no_versions();
        let facts = bucket.open().facts().expect("facts");
        assert_eq!(facts.versioning, Versioning::Never);
        return None;
    }
    bucket.keep_versions(BucketVersioningStatus::Enabled);
    bucket.keep_versions(status);
    Some(bucket)
}

#[test]
fn keys_stand_below_the_prefix_and_nothing_beside_it_is_seen_or_touched() {
    let bucket = server().bucket();
    let store = bucket.open();
    for beside in ["customers/c/a", "root/of/vmkeep2/a", "root/of/vmkee"] {
        bucket.put(beside, b"another program's");
    }
    store
        .create(&name("customers/c/a"), b"ours")
        .expect("created");
    let listed = store.list("").expect("a listing");
    assert_eq!(listed.len(), 1);
    assert_eq!(store.sweep_leftovers(""), Ok(Vec::new()));
    assert_eq!(store.leftovers(""), Ok(Vec::new()));
    store.delete(&name("customers/c/a")).expect("deleted");
    let keys: Vec<String> = bucket.versions().into_iter().map(|one| one.key).collect();
    assert_eq!(
        keys,
        ["customers/c/a", "root/of/vmkee", "root/of/vmkeep2/a"]
    );
    let whole = S3::open(bucket.settings("")).expect("the whole bucket");
    assert_eq!(whole.list("customers").expect("a listing").len(), 1);
    assert_eq!(whole.list("").expect("a listing").len(), 3);
}

#[test]
fn the_server_says_when_an_object_was_created_by_its_own_clock() {
    let bucket = server().bucket();
    let store = bucket.open();
    store.create(&name("a"), b"x").expect("created");
    let told = store.created_at(&name("a")).expect("told").expect("a time");
    let now = jiff::Timestamp::now();
    assert!(now.duration_since(told).abs() < jiff::SignedDuration::from_mins(5));
    assert_eq!(
        kind_of(store.created_at(&name("b"))),
        StorageErrorKind::NotFound
    );
}

#[test]
fn a_listing_of_several_pages_is_whole() {
    let bucket = server().bucket();
    let store = bucket.open();
    std::thread::scope(|scope| {
        for part in 0..8 {
            let store = &store;
            scope.spawn(move || {
                for number in 0..150 {
                    let object = name(&format!("many/{part}/{number:04}"));
                    store.create(&object, b"x").expect("created");
                }
            });
        }
    });
    let listed = store.list("many").expect("a listing");
    assert_eq!(listed.len(), 1200);
    assert!(listed.is_sorted());
    assert_eq!(store.leftovers("many"), Ok(Vec::new()));
    // A page that ends with a key that no object can have.
    for number in 0..1100 {
        bucket.put(&format!("root/of/vmkeep/odd/\u{fc} {number}"), b"x");
    }
    assert_eq!(store.list("odd"), Ok(Vec::new()));
    assert_eq!(store.leftovers("odd").expect("leftovers").len(), 1100);
    // Nor are more deleted at once than a request can hold.
    let listed: Vec<ObjectName> = listed.into_iter().map(|one| one.name).collect();
    assert_eq!(store.delete_all(&listed), vec![Ok(()); 1200]);
    assert_eq!(store.list("many"), Ok(Vec::new()));
    assert_eq!(store.leftovers("odd").expect("leftovers").len(), 1100);
}

#[test]
fn a_large_object_goes_in_parts_and_is_created_once() {
    let bucket = server().bucket();
    let store = bucket.open();
    let data: Vec<u8> = (0..20u32 << 20)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    store.create(&name("large"), &data).expect("created");
    assert!(store.read(&name("large"), PLENTY).expect("read") == data);
    let mut tail = vec![0; 1000];
    let offset = data.len() as u64 - 1000;
    store
        .read_range(&name("large"), offset, &mut tail)
        .expect("read");
    assert!(data.ends_with(&tail));
    let other = vec![7; data.len()];
    let told = store.create(&name("large"), &other);
    assert_eq!(kind_of(told), StorageErrorKind::AlreadyExists);
    assert!(store.read(&name("large"), PLENTY).expect("read") == data);
    assert_eq!(bucket.uploads(), [] as [String; 0]);
}

#[test]
fn an_unfinished_upload_is_shown_and_swept_below_its_prefix_only() {
    let bucket = server().bucket();
    let store = bucket.open();
    for key in [
        "root/of/vmkeep/customers/a/packs/1",
        "root/of/vmkeep/customers/b/packs/1",
        "another/program",
    ] {
        bucket.begin_upload(key);
    }
    let shown = store.leftovers("").expect("leftovers");
    assert_eq!(
        places(&shown),
        [
            "customers/a/packs/1 (unfinished upload)",
            "customers/b/packs/1 (unfinished upload)"
        ]
    );
    let swept = store.sweep_leftovers("customers/a").expect("swept");
    assert_eq!(places(&swept), ["customers/a/packs/1 (unfinished upload)"]);
    assert_eq!(store.leftovers("customers/a"), Ok(Vec::new()));
    assert_eq!(
        bucket.uploads(),
        ["another/program", "root/of/vmkeep/customers/b/packs/1"]
    );
}

#[test]
fn keys_that_no_object_can_have_are_leftovers_and_no_objects() {
    let bucket = server().bucket();
    let store = bucket.open();
    let strange = ["a//b", "a/ü", "tmp/x", "a b", "a/../b", "folder/"];
    for key in strange {
        bucket.put(&format!("root/of/vmkeep/{key}"), b"x");
    }
    store.create(&name("a/b"), b"x").expect("created");
    assert_eq!(store.list("").expect("a listing").len(), 1);
    assert_eq!(store.sweep_leftovers(""), Ok(Vec::new()));
    let left = store.leftovers("").expect("leftovers");
    // As the server spells them: only the slash is read.
    assert_eq!(
        places(&left),
        ["a%20b", "a/%C3%BC", "a/../b", "a//b", "folder/", "tmp/x"]
    );
}

#[test]
fn where_versions_are_kept_deleting_leaves_no_version_and_no_marker() {
    for status in [
        BucketVersioningStatus::Enabled,
        BucketVersioningStatus::Suspended,
    ] {
        let Some(bucket) = versioned(status.clone()) else {
            return;
        };
        let store = bucket.open();
        let facts = store.facts().expect("facts");
        assert_ne!(facts.versioning, Versioning::Never);
        let key = "root/of/vmkeep/customers/c/points/1";
        store
            .create(&name("customers/c/points/1"), b"first")
            .expect("created");
        store
            .create(&name("customers/c/points/10"), b"another")
            .expect("created");
        bucket.put(key, b"put over it");
        bucket.delete(key);
        assert!(bucket.versions().len() > 1);
        store
            .destroy(&name("customers/c/points/1"))
            .expect("destroyed");
        let left: Vec<String> = bucket.versions().into_iter().map(|one| one.key).collect();
        assert_eq!(left, ["root/of/vmkeep/customers/c/points/10"], "{status:?}");
    }
}

#[test]
fn what_hides_an_object_is_swept_and_what_was_put_over_it_is_shown_and_left() {
    let Some(bucket) = versioned(BucketVersioningStatus::Enabled) else {
        return;
    };
    let store = bucket.open();
    let (overwritten, hidden) = (name("customers/c/packs/1"), name("customers/c/packs/2"));
    store.create(&overwritten, b"the pack").expect("created");
    store.create(&hidden, b"a pack").expect("created");
    bucket.put("root/of/vmkeep/customers/c/packs/1", b"an attacker's");
    bucket.put("root/of/vmkeep/customers/c/packs/2", b"a pack");
    bucket.delete("root/of/vmkeep/customers/c/packs/2");
    bucket.delete("root/of/vmkeep/customers/c/packs/3");
    assert_eq!(store.leftovers("customers").expect("leftovers").len(), 4);
    // Also where nothing is to be seen but markers, and in the bytes below them.
    bucket.put("root/of/vmkeep/customers/copy/packs/1", b"a copy");
    bucket.delete("root/of/vmkeep/customers/copy/packs/1");
    let parts = store.parts("customers").expect("parts").into_iter();
    let parts: Vec<String> = parts.map(|part| part.name).collect();
    assert_eq!(parts, ["c", "copy"]);
    store
        .delete(&name("customers/copy/packs/1"))
        .expect("deleted");
    let told = store.read(&hidden, PLENTY);
    assert_eq!(kind_of(told), StorageErrorKind::NotFound);
    // Two markers, and the same bytes once more.
    assert_eq!(store.sweep_leftovers("customers").expect("swept").len(), 3);
    assert_eq!(store.read(&hidden, PLENTY), Ok(b"a pack".to_vec()));
    let left = store.leftovers("customers").expect("leftovers");
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(left[0].place.starts_with("customers/c/packs/1 (version "));
    assert_eq!(bucket.versions().len(), 3);
}

#[test]
fn a_name_whose_object_somebody_has_hidden_is_not_free() {
    let Some(bucket) = versioned(BucketVersioningStatus::Enabled) else {
        return;
    };
    let store = bucket.open();
    let entry = name("customers/c/ledger/1");
    store.create(&entry, b"first").expect("created");
    bucket.delete("root/of/vmkeep/customers/c/ledger/1");
    assert_eq!(kind_of(store.read(&entry, 100)), StorageErrorKind::NotFound);
    let told = kind_of(store.create(&entry, b"second"));
    match server().kind.condition_with_versions() {
        // That is said; nobody opens such a bucket.
        Some(Condition::Ignored) => assert_eq!(told, StorageErrorKind::Unsupported),
        _ => assert_eq!(told, StorageErrorKind::AlreadyExists),
    }
    assert_eq!(store.read(&entry, 100), Ok(b"first".to_vec()));
    let keys: Vec<String> = bucket.versions().into_iter().map(|one| one.key).collect();
    assert_eq!(keys, ["root/of/vmkeep/customers/c/ledger/1"]);
}

#[test]
fn the_probe_tells_what_the_server_makes_of_the_condition() {
    let kind = server().kind;
    let with_versions = versioned(BucketVersioningStatus::Enabled);
    let with_versions = with_versions.map(|bucket| (bucket, kind.condition_with_versions()));
    let without = (server().bucket(), Some(kind.condition()));
    for (bucket, condition) in [Some(without), with_versions].into_iter().flatten() {
        let mut settings = bucket.settings("root/of/vmkeep");
        settings.ask_first = false;
        let store = S3::open(settings).expect("open");
        let alone = probe(&store, "customers/c", 0, 1).expect("probed");
        let racing = probe(&store, "customers/c", 20, 8).expect("probed");
        let is_unsound = |probed: &Probe| match probed {
            Probe::Sound => false,
            Probe::Unsound { what } => {
                assert!(what.contains("overwritten"), "{what}");
                true
            }
        };
        let told = [is_unsound(&alone), is_unsound(&racing)];
        let expected = match condition {
            Some(Condition::Kept) | None => [false, false],
            Some(Condition::LostInRaces) => [false, true],
            Some(Condition::Ignored) => [true, true],
        };
        assert_eq!(told, expected, "{condition:?}");
        assert_eq!(store.leftovers(""), Ok(Vec::new()));
    }
}

#[test]
fn who_asks_first_does_not_overwrite_where_the_condition_is_ignored() {
    let bucket = versioned(BucketVersioningStatus::Enabled);
    let bucket = bucket.unwrap_or_else(|| server().bucket());
    let mut settings = bucket.settings("root");
    settings.ask_first = true;
    let store = S3::open(settings).expect("open");
    let object = name("customers/c/1");
    store.create(&object, b"first").expect("created");
    let told = store.create(&object, b"second");
    assert_eq!(kind_of(told), StorageErrorKind::AlreadyExists);
    assert_eq!(store.read(&object, PLENTY), Ok(b"first".to_vec()));
    assert_eq!(bucket.versions().len(), 1);
}

/// The last line of defence: nobody opens a bucket of which the probe has told.
#[test]
fn no_two_racing_writers_are_told_that_they_won_even_where_the_condition_is_not_kept() {
    let Some(bucket) = versioned(BucketVersioningStatus::Enabled) else {
        return;
    };
    let mut settings = bucket.settings("root");
    settings.endpoint = Some(server().bare_endpoint.clone());
    settings.patience = Duration::from_secs(2);
    let store = S3::open(settings).expect("open");
    for round in 0..10 {
        let object = name(&format!("race/{round}"));
        let start = Barrier::new(8);
        let winners = std::thread::scope(|scope| {
            let writers: Vec<_> = (0..8u8)
                .map(|writer| {
                    let (store, object, start) = (&store, &object, &start);
                    scope.spawn(move || {
                        start.wait();
                        store.create(object, &[writer; 10_000]).is_ok()
                    })
                })
                .collect();
            let told = writers.into_iter().map(|writer| writer.join().unwrap());
            told.filter(|has_won| *has_won).count()
        });
        assert!(winners <= 1, "round {round} was won by {winners}");
    }
}

#[test]
fn what_cannot_be_opened_says_why() {
    let bucket = server().bucket();
    let refused = |change: fn(&mut vmkeep::storage::S3Settings)| {
        let mut settings = bucket.settings("root");
        settings.patience = Duration::from_millis(1);
        change(&mut settings);
        match S3::open(settings) {
            Ok(_) => panic!("it opened"),
            Err(error) => error,
        }
    };
    let no_bucket = refused(|settings| settings.bucket = "no-such-bucket".to_string());
    assert_eq!(no_bucket.kind, StorageErrorKind::Unsupported, "{no_bucket}");
    assert!(
        no_bucket.detail.contains("make the bucket first"),
        "{no_bucket}"
    );
    let wrong_key = refused(|settings| {
        settings.credentials = S3Credentials::Given {
            access_key_id: ACCESS_KEY_ID.to_string(),
            secret_access_key: "wrong".to_string().into(),
        }
    });
    assert_eq!(wrong_key.kind, StorageErrorKind::Denied, "{wrong_key}");
    let reason = match server().kind {
        // Which does not tell a wrong key from a missing right by a code of its own.
        Kind::Garage => "Invalid signature",
        _ => "is the secret key",
    };
    assert!(wrong_key.detail.contains(reason), "{wrong_key}");
    let nobody_there =
        refused(|settings| settings.endpoint = Some("http://127.0.0.1:1".to_string()));
    assert_eq!(
        nobody_there.kind,
        StorageErrorKind::Transient,
        "{nobody_there}"
    );
    let no_certificate = refused(|settings| settings.ca_certificates = Some(b"no".to_vec()));
    assert_eq!(no_certificate.kind, StorageErrorKind::Unsupported);
    assert!(
        no_certificate.detail.contains("ca_file"),
        "{no_certificate}"
    );
}

// ---------------------------------------------------------------- a server that goes wrong

/// Each operation, with each mishap at each of its requests.
#[test]
fn one_mishap_in_any_request_of_any_operation_is_outlived() {
    let bucket = server().bucket();
    let proxy = Proxy::before(&server().endpoint);
    let mut settings = bucket.settings("root");
    settings.endpoint = Some(proxy.endpoint.clone());
    settings.part_bytes = 5 << 20;
    let store = S3::open(settings).expect("open");
    let large = vec![5; 6 << 20];
    let mut number = 0;
    let mut next = || {
        number += 1;
        format!("customers/c/{number:05}")
    };
    let mishaps = [
        Mishap::Status(500),
        Mishap::Status(503),
        Mishap::Status(409),
        Mishap::LostBefore,
        Mishap::LostAfter,
        Mishap::Truncated,
        Mishap::CutShort,
        Mishap::HalfTold,
        Mishap::Undone,
    ];
    for mishap in mishaps {
        // More requests than any of the operations has: the plan ends before it comes to pass.
        for at in 0..7 {
            let outlived = |what: &str, operation: &mut dyn FnMut()| {
                proxy.start_over([(at, mishap)]);
                operation();
                let passed = proxy.passed().len();
                assert!(
                    passed <= at || proxy.happened().len() == 1,
                    "{what}: {mishap:?} at {at} did not come to pass"
                );
                proxy.start_over([]);
            };
            let small = name(&next());
            outlived("create", &mut || {
                assert_eq!(store.create(&small, b"12345"), Ok(()));
            });
            assert_eq!(store.read(&small, PLENTY), Ok(b"12345".to_vec()));
            let in_parts = name(&next());
            outlived("create in parts", &mut || {
                assert_eq!(store.create(&in_parts, &large), Ok(()));
            });
            assert!(store.read(&in_parts, PLENTY).expect("read") == large);
            outlived("read", &mut || {
                assert_eq!(store.read(&small, PLENTY), Ok(b"12345".to_vec()));
            });
            outlived("read_range", &mut || {
                let mut part = [0; 3];
                assert_eq!(store.read_range(&small, 1, &mut part), Ok(()));
                assert_eq!(&part, b"234");
            });
            outlived("size_bytes", &mut || {
                assert_eq!(store.size_bytes(&small), Ok(5));
            });
            outlived("list", &mut || {
                assert_eq!(store.list("customers/c").expect("listed").len(), 2);
            });
            outlived("parts", &mut || {
                assert!(!store.parts("customers/c").expect("told").is_empty());
            });
            outlived("create what is there", &mut || {
                let told = store.create(&small, b"other");
                assert_eq!(kind_of(told), StorageErrorKind::AlreadyExists);
            });
            assert_eq!(store.read(&small, PLENTY), Ok(b"12345".to_vec()));
            bucket.begin_upload("root/customers/c/unfinished");
            outlived("leftovers", &mut || {
                // Beside it, perhaps, the one whose beginning was not answered.
                assert!(!store.leftovers("customers/c").expect("told").is_empty());
            });
            outlived("sweep", &mut || {
                store.sweep_leftovers("customers/c").expect("swept");
            });
            assert_eq!(store.leftovers("customers/c"), Ok(Vec::new()));
            for object in [&small, &in_parts] {
                outlived("delete", &mut || {
                    assert_eq!(store.delete(object), Ok(()));
                });
            }
            assert_eq!(store.list(""), Ok(Vec::new()));
            let many: Vec<ObjectName> = (0..5).map(|_| name(&next())).collect();
            for object in &many {
                store.create(object, b"12345").expect("created");
            }
            outlived("delete many", &mut || {
                assert_eq!(store.delete_all(&many), vec![Ok(()); 5]);
            });
            assert_eq!(store.list(""), Ok(Vec::new()));
        }
    }
}

#[test]
fn a_listing_that_breaks_off_without_saying_so_is_asked_for_again() {
    let bucket = server().bucket();
    let store = bucket.open();
    for object in ["a/1", "a/2", "a/3"] {
        store.create(&name(object), b"x").expect("created");
    }
    bucket.begin_upload("root/of/vmkeep/a/4");
    bucket.begin_upload("root/of/vmkeep/a/5");
    let proxy = Proxy::before(&server().endpoint);
    let mut settings = bucket.settings("root/of/vmkeep");
    settings.endpoint = Some(proxy.endpoint.clone());
    let store = S3::open(settings).expect("open");
    proxy.start_over([(0, Mishap::CutShort)]);
    assert_eq!(store.list("a").expect("a listing").len(), 3);
    assert_eq!(proxy.passed().len(), 2);
    // First the uploads, then the versions or keys.
    for at in 0..3 {
        proxy.start_over([(at, Mishap::CutShort)]);
        let survey = store.survey("a").expect("a survey");
        assert_eq!((survey.objects.len(), survey.leftovers.len()), (3, 2));
    }
}

#[test]
fn a_clock_that_is_set_in_mid_run_costs_each_call_one_request_and_no_call_more() {
    let bucket = server().bucket();
    let object = name("a");
    bucket.open().create(&object, b"x").expect("created");
    let proxy = Proxy::before(&server().endpoint);
    let mut settings = bucket.settings("root/of/vmkeep");
    settings.endpoint = Some(proxy.endpoint.clone());
    let store = S3::open(settings).expect("open");
    for _ in 0..2 {
        proxy.start_over([(0, Mishap::Skewed)]);
        assert_eq!(store.read(&object, PLENTY), Ok(b"x".to_vec()));
        assert_eq!(proxy.passed().len(), 2);
    }
    proxy.start_over([(0, Mishap::Skewed), (1, Mishap::Skewed)]);
    let told = store.read(&object, PLENTY).expect_err("refused");
    assert_eq!(told.kind, StorageErrorKind::Denied);
    assert!(told.detail.contains("NTP"), "{told}");
    assert_eq!(proxy.passed().len(), 2);
}

#[test]
fn a_server_that_does_not_answer_is_waited_for_once_however_many_are_deleted() {
    let Some(bucket) = versioned(BucketVersioningStatus::Enabled) else {
        return;
    };
    let proxy = Proxy::before(&server().endpoint);
    let mut settings = bucket.settings("root");
    settings.endpoint = Some(proxy.endpoint.clone());
    settings.patience = Duration::from_secs(1);
    let store = S3::open(settings).expect("open");
    let names = ["a/1", "a/2", "b/1", "b/2", "c/1", "c/2"].map(name);
    proxy.start_over((0..1000).map(|at| (at, Mishap::Status(503))));
    for told in store.delete_all(&names) {
        assert_eq!(kind_of(told), StorageErrorKind::Transient);
    }
    let asked: BTreeSet<String> = proxy.passed().into_iter().map(|one| one.target).collect();
    assert_eq!(asked.len(), 1, "{asked:?}");
}

/// Two versions and a marker of each, which are deleted one by one, in requests for all of them.
#[test]
fn one_mishap_in_any_request_that_deletes_many_leaves_no_version_and_no_marker() {
    let Some(bucket) = versioned(BucketVersioningStatus::Enabled) else {
        return;
    };
    let proxy = Proxy::before(&server().bare_endpoint);
    let mut settings = bucket.settings("root");
    settings.endpoint = Some(proxy.endpoint.clone());
    let store = S3::open(settings).expect("open");
    let many: Vec<ObjectName> = (0..4).map(|n| name(&format!("customers/c/{n}"))).collect();
    let all_but_one = many.get(1..).expect("names");
    let mishaps = [
        Mishap::Status(500),
        Mishap::Status(503),
        Mishap::LostBefore,
        Mishap::LostAfter,
        Mishap::Truncated,
        Mishap::CutShort,
        Mishap::HalfTold,
        Mishap::Undone,
    ];
    for mishap in mishaps {
        // The listing, and three requests.
        for at in 0..4 {
            for object in &many {
                let key = format!("root/{object}");
                bucket.put(&key, b"first");
                bucket.put(&key, b"put over it");
                bucket.delete(&key);
            }
            proxy.start_over([(at, mishap)]);
            assert_eq!(store.delete_all(all_but_one), vec![Ok(()); 3]);
            assert_eq!(proxy.happened(), [(at, mishap)]);
            let left = bucket.versions();
            let of_other = |one: &support::s3::Version| one.key == "root/customers/c/0";
            assert!(left.iter().all(of_other), "{mishap:?} at {at}: {left:?}");
            assert_eq!(left.len(), 3);
            proxy.start_over([]);
            assert_eq!(store.delete_all(&many), vec![Ok(()); 4]);
            assert_eq!(bucket.versions(), []);
        }
    }
}

#[test]
fn versions_of_many_are_found_by_listing_their_folder_and_of_few_in_a_large_one_by_their_names() {
    let Some(bucket) = versioned(BucketVersioningStatus::Enabled) else {
        return;
    };
    let proxy = Proxy::before(&server().endpoint);
    let mut settings = bucket.settings("root");
    settings.endpoint = Some(proxy.endpoint.clone());
    let store = S3::open(settings).expect("open");
    let all: Vec<ObjectName> = (0..2_100)
        .map(|n| name(&format!("packs/s/{n:04}")))
        .collect();
    std::thread::scope(|scope| {
        for some in all.chunks(300) {
            let bucket = &bucket;
            scope.spawn(move || {
                for object in some {
                    bucket.put(&format!("root/{object}"), b"x");
                }
            });
        }
    });
    let (two, rest) = all.split_at(2);
    let deleted = |names: &[ObjectName]| {
        proxy.start_over([]);
        assert_eq!(store.delete_all(names), vec![Ok(()); names.len()]);
        let passed = proxy.passed();
        let lists = passed.iter().filter(|one| one.method == "GET").count();
        let deletes = passed.iter().filter(|one| one.deletes_many()).count();
        assert_eq!(lists + deletes, passed.len());
        (lists, deletes)
    };
    // Two of three pages, and then each of them.
    assert_eq!(deleted(two), (2 + 2, 1));
    assert_eq!(bucket.versions().len(), 2_098);
    // What is left of them is three pages, two, and one.
    assert_eq!(deleted(rest), (3 + 2 + 1, 3));
    assert_eq!(bucket.versions(), []);
}

#[test]
fn many_are_deleted_in_few_requests_and_each_for_itself_where_the_server_takes_none_for_many() {
    let bucket = server().bucket();
    let proxy = Proxy::before(&server().endpoint);
    let mut settings = bucket.settings("root");
    settings.endpoint = Some(proxy.endpoint.clone());
    for refusal in [None, Some(501), Some(405), Some(403), Some(400)] {
        let store = S3::open(settings.clone()).expect("open");
        let lists = usize::from(store.keeps_versions());
        let many: Vec<ObjectName> = (0..30).map(|n| name(&format!("customers/c/{n}"))).collect();
        for object in &many {
            store.create(object, b"12345").expect("created");
        }
        proxy.start_over(refusal.map(|status| (lists, Mishap::Status(status))));
        assert_eq!(store.delete_all(&many), vec![Ok(()); 30]);
        let passed = proxy.passed();
        let singly = passed.iter().filter(|one| one.method == "DELETE").count();
        assert_eq!(passed.iter().filter(|one| one.deletes_many()).count(), 1);
        assert_eq!(singly, if refusal.is_some() { 30 } else { 0 });
        assert_eq!(passed.len(), lists + 1 + singly);
        assert_eq!(bucket.versions(), []);
        // A refusal is remembered.
        proxy.start_over([]);
        assert_eq!(store.delete_all(&many[..2]), [Ok(()), Ok(())]);
        let is_tried = proxy.passed().iter().any(Passed::deletes_many);
        assert_eq!(is_tried, refusal.is_none() && lists == 0, "{refusal:?}");
    }
}

#[test]
fn a_name_that_is_wrongly_said_to_be_taken_is_not_there() {
    let bucket = server().bucket();
    let proxy = Proxy::before(&server().endpoint);
    let mut settings = bucket.settings("root");
    settings.endpoint = Some(proxy.endpoint.clone());
    settings.ask_first = false;
    let store = S3::open(settings).expect("open");
    proxy.start_over([(0, Mishap::Status(412))]);
    let object = name("customers/c/1");
    let told = store.create(&object, b"x");
    assert_eq!(kind_of(told), StorageErrorKind::AlreadyExists);
    assert_eq!(kind_of(store.read(&object, 1)), StorageErrorKind::NotFound);
    // To what sets no condition, the answer makes no sense, and is asked for again.
    proxy.start_over([(0, Mishap::Status(412))]);
    assert_eq!(store.list(""), Ok(Vec::new()));
    assert_eq!(store.create(&object, b"x"), Ok(()));
}

/// Where the condition is ignored, both attempts land; what becomes of that must not be in the way of what comes
/// after.
#[test]
fn an_attempt_that_lands_together_with_its_repetition_leaves_one_object_that_can_be_deleted() {
    let bucket = versioned(BucketVersioningStatus::Enabled);
    let bucket = bucket.unwrap_or_else(|| server().bucket());
    let proxy = Proxy::before(&server().bare_endpoint);
    let mut settings = bucket.settings("root");
    settings.endpoint = Some(proxy.endpoint.clone());
    settings.ask_first = true;
    let store = S3::open(settings).expect("open");
    let mut landed_twice = 0;
    for number in 0..40 {
        let object = name(&format!("customers/c/{number:04}"));
        // The question first, then the attempt.
        proxy.start_over([(1, Mishap::Late)]);
        assert_eq!(store.create(&object, b"12345"), Ok(()), "{number}");
        assert_eq!(proxy.happened(), [(1, Mishap::Late)]);
        let deletes = |passed: &Passed| passed.method == "DELETE";
        landed_twice += usize::from(proxy.passed().iter().any(deletes));
        proxy.start_over([]);
        assert_eq!(store.read(&object, PLENTY), Ok(b"12345".to_vec()));
    }
    println!("{landed_twice} landed twice");
    store.sweep_leftovers("").expect("swept");
    assert_eq!(store.leftovers(""), Ok(Vec::new()));
    for object in store.list("").expect("listed") {
        store.destroy(&object.name).expect("destroyed");
    }
    assert_eq!(bucket.versions(), []);
}
