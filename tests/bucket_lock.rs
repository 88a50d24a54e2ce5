//! Object Lock: what a stolen key cannot do, and what a prune does meanwhile, on a real server.

use vmkeep_test_support as support;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use std::fs;
use support::s3::{AGENT, Bucket, Condition, KEEPER, OWNER, Passed, Proxy, User, Version, server};
use support::{Guest, Host, HostOptions, Random, time};
use vmkeep::model::{LockMode, ObjectName, Writers};
use vmkeep::storage::{S3, S3Lock, S3Settings, Storage, StorageErrorKind};

const PREFIX: &str = "backups/vmkeep";
const DAY_SECONDS: i64 = 24 * 60 * 60;

fn days(count: i64) -> SignedDuration {
    SignedDuration::from_hours(24 * count)
}

fn start() -> Timestamp {
    time("2025-03-03T23:00:00Z")
}

/// A bucket with locks keeps versions, where not every server orders several writers.
fn writers() -> Writers {
    match server().kind.condition_with_versions() {
        Some(Condition::Kept) => Writers::Many,
        _ => Writers::One,
    }
}

/// `[repository]`, with locks.
fn repository(bucket: &Bucket, mode: &str) -> String {
    let config = bucket.config_for(writers(), PREFIX);
    format!("{config}lock = \"{mode}\"\n")
}

/// The policy for keys that lock as it is shipped, for this bucket and its users.
fn policy(bucket: &Bucket) -> String {
    fs::read_to_string("config/bucket-policy-locks.json")
        .expect("config/bucket-policy-locks.json")
        .replace("BUCKET", &bucket.name)
        .replace("PREFIX", PREFIX)
        .replace("DAYS", "22")
        .replace("\"AGENT\"", &format!("\"{}\"", AGENT.principal()))
        .replace("\"KEEPER\"", &format!("\"{}\"", KEEPER.principal()))
}

fn name(name: &str) -> ObjectName {
    ObjectName::new(name).unwrap()
}

/// What is below `some` is locked for so many days, and nothing else.
fn with_locks(settings: S3Settings, days: u32) -> S3Settings {
    let lock = S3Lock {
        mode: LockMode::Governance,
        days_below: vec![("none".to_string(), 0), ("some".to_string(), days)],
    };
    S3Settings {
        lock: Some(lock),
        ..settings
    }
}

struct Lab {
    bucket: Bucket,
    /// Whose objects these are: on some servers the owner of the bucket may not look at them.
    user: User,
    host: Host,
    guest: Guest,
    random: Random,
}

impl Lab {
    fn new(bucket: Bucket, mode: &str) -> Self {
        let repository = repository(&bucket, mode);
        Lab::with(bucket, OWNER, repository)
    }

    fn with(bucket: Bucket, user: User, repository: String) -> Self {
        let host = Host::new(&HostOptions {
            name: "host1",
            bucket: Some(repository),
            ..HostOptions::default()
        });
        let mut random = Random::new(0x10c4);
        let guest = Guest::new(host.image("web01", "vda"), 6 << 20, &mut random);
        Lab {
            bucket,
            user,
            host,
            guest,
            random,
        }
    }

    fn with_policy(&self, lines: &str) {
        let text = self.host.config_text();
        self.host
            .write_config(&text.replacen("[policy]\n", &format!("[policy]\n{lines}\n"), 1));
    }

    fn night(&mut self, at: Timestamp) {
        self.guest.work(4, &mut self.random);
        self.host.vmkeep(&["run"], at).exits(0);
    }

    #[track_caller]
    fn newest_restores(&self, at: Timestamp) {
        let target = self.host.restore("web01", "latest", at);
        let restored = fs::read(target.path().join("vda.raw")).unwrap();
        assert!(restored == self.guest.content(), "other bytes came back");
    }

    /// What a thief wants to destroy: all that is there but what probes have left.
    fn versions(&self) -> Vec<Version> {
        let versions = self.bucket.versions().into_iter();
        versions
            .filter(|version| !version.key.contains("/probe/") && !version.is_marker)
            .collect()
    }

    /// Days from now until the locks of what has `part` in its key end, the earliest and the latest.
    #[track_caller]
    fn locked_for(&self, part: &str) -> (i64, i64) {
        let now = Timestamp::now().as_second();
        let visit = self.bucket.visited_by(&self.user);
        let locks: Vec<i64> = self
            .versions()
            .iter()
            .filter(|version| version.key.contains(part))
            .map(|version| visit.locked_until(version).expect("a lock") - now)
            .collect();
        let rounded = |seconds: Option<&i64>| (seconds.unwrap() + DAY_SECONDS / 2) / DAY_SECONDS;
        (rounded(locks.iter().min()), rounded(locks.iter().max()))
    }
}

#[test]
fn with_a_lock_nobody_can_delete_the_last_two_weeks() {
    for mode in ["governance", "compliance"] {
        let mut lab = Lab::new(server().lockable_bucket(), mode);
        lab.host.vmkeep(&["init", "--yes"], start()).exits(0);
        for night in 0..3 {
            lab.night(start() + days(night));
        }
        assert_eq!(lab.locked_for("/points/"), (16, 16));
        for of_all in ["/packs/", "/index/", "/ledger/", "/key/", "/vmkeep.json"] {
            assert_eq!(lab.locked_for(of_all), (17, 17), "{of_all}");
        }
        // Whoever has the host's key, and be it the owner's.
        let thief = lab.bucket.visited_by(&OWNER);
        for version in lab.versions() {
            let told = thief.deletes_version(&version.key, &version.id);
            assert_eq!(told, Err("AccessDenied".to_string()), "{version:?}");
            assert_eq!(thief.deletes(&version.key), Ok(()));
        }
        // That has hidden everything; what hides it is not locked.
        let at = start() + days(3);
        lab.host.vmkeep(&["points"], at).exits(10);
        for version in lab.bucket.versions() {
            if version.is_marker {
                assert_eq!(thief.deletes_version(&version.key, &version.id), Ok(()));
            }
        }
        lab.host.vmkeep(&["verify", "--read-data"], at).exits(0);
        lab.newest_restores(at);
        assert_eq!(lab.host.points(at).len(), 3);
    }
}

#[test]
fn what_a_point_needs_is_locked_anew_before_its_lock_falls_below_the_window() {
    // The server's days are the host's.
    let start = Timestamp::now();
    let mut lab = Lab::new(server().lockable_bucket(), "governance");
    lab.host.vmkeep(&["init", "--yes"], start).exits(0);
    let night = |lab: &mut Lab, count| {
        lab.guest.work(4, &mut lab.random);
        let at = start + days(count);
        lab.host.vmkeep(&["backup", "web01"], at).exits(0);
        lab.host.vmkeep(&["prune"], at).exits(0);
    };
    night(&mut lab, 0);
    assert_eq!(lab.locked_for("/packs/"), (17, 17));
    // Longer locks than before show which ones are new. A clock that went back, by a second even, would have all of
    // them renewed.
    lab.with_policy("max_retention = \"3 months\"");
    let later = |minutes| start + SignedDuration::from_mins(minutes);
    lab.host.vmkeep(&["run"], later(10)).exits(0);
    lab.host.vmkeep(&["prune"], later(20)).exits(0);
    assert_eq!(lab.locked_for("/vmkeep.json"), (17, 17));
    night(&mut lab, 1);
    assert_eq!(lab.locked_for("/vmkeep.json").0, 17, "not every night");
    let mut at = 1;
    while lab.locked_for("/vmkeep.json").0 == 17 {
        at += 1;
        assert!(at <= 7, "too late");
        night(&mut lab, at);
    }
    for renewed in ["/packs/", "/ledger/", "/key/", "/vmkeep.json"] {
        assert_eq!(lab.locked_for(renewed), (21, 21), "{renewed}");
    }
    assert_eq!(lab.locked_for("/points/"), (16, 16));
    lab.newest_restores(start + days(at));
}

/// The note of a prune about what is locked.
fn locked_note(pruned: &Value) -> Option<String> {
    let notes = pruned["customers"][0]["notes"].as_array().unwrap();
    let notes = notes.iter().filter_map(Value::as_str);
    notes
        .map(str::to_string)
        .find(|note| note.contains("locked"))
}

#[test]
fn a_prune_leaves_what_is_locked_for_later_and_says_so() {
    let mut lab = Lab::new(server().lockable_bucket(), "governance");
    lab.with_policy("keep_after_window = \"none\"\nrestore_window = \"7 days\"");
    lab.host.vmkeep(&["init", "--yes"], start()).exits(0);
    // For the server it is still the first day.
    for night in 0..12 {
        lab.night(start() + days(night));
    }
    let at = start() + days(12);
    let pruned = lab.host.json(&["prune"], at);
    let listed = lab.host.points(at).len();
    assert!(listed < 12, "some are over");
    let note = locked_note(&pruned).expect("said so");
    assert!(note.contains("until 20"), "{note}");
    assert_eq!(
        pruned["customers"][0]["certificate"],
        Value::Null,
        "{pruned}"
    );
    lab.host.vmkeep(&["verify", "--read-data"], at).exits(0);
    lab.newest_restores(at);

    // It is what a lock ends by that is waited for: a time.
    let ends = lab.versions().into_iter();
    let ends = ends.map(|version| lab.bucket.ends_lock(&version)).max();
    while Timestamp::now().as_second() <= ends.unwrap() {
        std::thread::yield_now();
    }
    let pruned = lab.host.json(&["prune"], at);
    assert_eq!(locked_note(&pruned), None, "{pruned}");
    assert_ne!(
        pruned["customers"][0]["certificate"],
        Value::Null,
        "{pruned}"
    );
    assert_eq!(lab.host.points(at).len(), listed);
    lab.host.vmkeep(&["verify", "--read-data"], at).exits(0);
    lab.newest_restores(at);
}

#[test]
fn a_lock_longer_than_the_erase_budget_allows_is_refused_with_the_arithmetic() {
    let lab = Lab::new(server().lockable_bucket(), "compliance");
    lab.with_policy("max_retention = \"1 month\"");
    lab.host
        .vmkeep(&["init", "--yes"], start())
        .exits(2)
        .one_error()
        .says("the objects of customer acme cannot be locked")
        .says("a restore window of 14 days")
        .says("need locks of 15 days; the erase budget allows")
        .says("(erase budget) − 2 (until the record is erased)");
    assert_eq!(lab.bucket.versions(), []);
}

#[test]
fn a_server_that_does_not_lock_is_refused() {
    let lab = Lab::new(server().bucket(), "governance");
    lab.host
        .vmkeep(&["init", "--yes"], start())
        .exits(2)
        .one_error()
        .says("does not say that it has Object Lock");
    assert_eq!(lab.bucket.versions(), []);
}

#[test]
fn an_object_is_locked_for_the_days_of_its_place_and_then_longer_but_never_shorter() {
    let bucket = server().lockable_bucket();
    let open = |days: u32| S3::open(with_locks(bucket.settings("root"), days)).unwrap();
    let (some, other) = (name("some/a"), name("some/b"));
    let store = open(2);
    store.create(&name("none/a"), b"gone").unwrap();
    assert_eq!(store.locked_until(&name("none/a")).unwrap(), None);
    store.delete(&name("none/a")).unwrap();
    for name in [&some, &other] {
        store.create(name, b"locked").unwrap();
        let refused = store.delete(name).unwrap_err();
        assert_eq!(refused.kind, StorageErrorKind::Locked, "{refused}");
        assert!(refused.detail.contains("until 20"), "{refused}");
    }
    let until = |name| store.locked_until(name).unwrap().unwrap();
    let before = until(&some);
    let longer = open(9);
    let latest = |name: &ObjectName| (*name == some).then_some(Timestamp::MAX);
    assert_eq!(longer.renew_locks("some", &latest).unwrap(), 1);
    let after = until(&some);
    let gained = after.duration_since(before);
    assert!(gained >= days(7) && gained < days(8), "{gained}");
    assert!(until(&other).duration_since(before) < days(1));
    // No longer than it may be, and never shorter.
    let day_before = |_: &ObjectName| after.checked_sub(days(1)).ok();
    assert_eq!(longer.renew_locks("some/a", &day_before).unwrap(), 0);
    assert_eq!(until(&some), after);
    assert_eq!(longer.renew_locks("some/b", &day_before).unwrap(), 1);
    assert!(until(&other) < after);
    let long_over = |_: &ObjectName| Some(start());
    assert_eq!(longer.renew_locks("some", &long_over).unwrap(), 0);
    assert_eq!(store.read(&some, 100).unwrap(), b"locked");
}

#[test]
fn of_many_that_are_deleted_together_those_that_are_locked_stay_and_are_told_so() {
    let bucket = server().lockable_bucket();
    let proxy = Proxy::before(&server().endpoint);
    let mut settings = with_locks(bucket.settings("root"), 2);
    settings.endpoint = Some(proxy.endpoint.clone());
    let store = S3::open(settings).unwrap();
    let names = ["some/1", "none/1", "some/2", "none/2", "none/3"].map(name);
    for name in &names {
        store.create(name, b"bytes").unwrap();
    }
    // Put over a locked one: that goes.
    bucket.put("root/some/1", b"other bytes");
    proxy.start_over([]);
    let told = store.delete_all(&names);
    for (name, told) in names.iter().zip(&told) {
        match name.as_str().starts_with("some/") {
            true => {
                let locked = told.as_ref().unwrap_err();
                assert_eq!(locked.kind, StorageErrorKind::Locked, "{locked}");
                assert!(locked.detail.contains("until 20"), "{locked}");
            }
            false => assert_eq!(told, &Ok(())),
        }
    }
    let passed = proxy.passed();
    assert_eq!(passed.iter().filter(|one| one.deletes_many()).count(), 1);
    let left = bucket.versions().into_iter().map(|version| version.key);
    let left: Vec<String> = left.collect();
    assert_eq!(left, ["root/some/1", "root/some/2"]);
    assert_eq!(store.read(&names[0], 100).unwrap(), b"bytes");
}

#[test]
fn a_server_that_shows_no_lock_is_refused_and_what_stands_already_is_not_told_as_failed() {
    let bucket = server().lockable_bucket();
    let proxy = Proxy::hiding_locks(&server().endpoint);
    let mut settings = with_locks(bucket.settings("root"), 2);
    settings.endpoint = Some(proxy.endpoint.clone());
    let store = S3::open(settings).unwrap();
    let (first, second) = (name("some/1"), name("some/2"));
    let told = store.create(&first, b"first").unwrap_err();
    assert_eq!(told.kind, StorageErrorKind::Transient);
    assert!(
        told.detail
            .contains("it stands, but the server took a lock"),
        "{told}"
    );
    assert_eq!(store.read(&first, 100).unwrap(), b"first");
    // From then on nothing is created, this one or another.
    proxy.start_over([]);
    for refused in [&first, &second] {
        let told = store.create(refused, b"first").unwrap_err();
        assert_eq!(told.kind, StorageErrorKind::Unsupported);
        assert!(told.detail.contains("shows none"), "{told}");
    }
    assert_eq!(proxy.passed(), [] as [Passed; 0]);
    assert_eq!(bucket.versions().len(), 1);
    store.create(&name("none/1"), b"not to be locked").unwrap();

    // A whole run: its first entry stands, and the next run knows what to make of it.
    let mut lab = Lab::new(server().lockable_bucket(), "governance");
    lab.host.vmkeep(&["init", "--yes"], start()).exits(0);
    lab.night(start());
    let before = lab.versions().len();
    let config = lab.host.config_text();
    let through = config.replace(&server().endpoint, &proxy.endpoint);
    assert_ne!(through, config);
    lab.host.write_config(&through);
    lab.host
        .vmkeep(&["backup", "web01"], start() + days(1))
        .exits(1)
        .says("it is not known whether this entry stands")
        .says("took a lock and shows none");
    assert_eq!(lab.versions().len(), before + 1);
    lab.host.write_config(&config);
    lab.night(start() + days(1));
    lab.host
        .vmkeep(&["ledger", "verify"], start() + days(1))
        .exits(0);
    lab.newest_restores(start() + days(1));
    assert_eq!(lab.host.points(start() + days(1)).len(), 2);
}

#[test]
fn the_policy_for_keys_that_lock_is_enough_for_a_keeper_and_ends_no_lock() {
    let bucket = server().lockable_bucket();
    bucket.apply_policy(&policy(&bucket));
    let config = bucket.config_of(&KEEPER, PREFIX).replacen(
        "writers = \"many\"",
        &format!("writers = \"{}\"", writers()),
        1,
    );
    let mut lab = Lab::with(bucket, KEEPER, format!("{config}lock = \"governance\"\n"));
    lab.host.vmkeep(&["init", "--yes"], start()).exits(0);
    for night in 0..2 {
        lab.night(start() + days(night));
    }
    assert_eq!(lab.locked_for("/points/"), (16, 16));
    assert_eq!(lab.locked_for("/packs/"), (17, 17));
    // All of it anew, as after some nights.
    let mut settings = lab.bucket.settings_of(&KEEPER, PREFIX);
    settings.lock = Some(S3Lock {
        mode: LockMode::Governance,
        days_below: vec![("customers".to_string(), 20)],
    });
    let keeper = S3::open(settings).unwrap();
    let latest = |_: &ObjectName| Some(Timestamp::MAX);
    assert!(keeper.renew_locks("customers", &latest).unwrap() > 0);
    assert_eq!(lab.locked_for("/customers/acme/packs/"), (20, 20));
    let at = start() + days(2);
    lab.host.vmkeep(&["prune"], at).exits(0);
    lab.host.vmkeep(&["verify", "--read-data"], at).exits(0);
    lab.newest_restores(at);
    // With neither key is a lock ended, or made shorter, or a rule changed.
    let denied = Err("AccessDenied".to_string());
    let before = lab.bucket.versions();
    for user in [&AGENT, &KEEPER] {
        let thief = lab.bucket.visited_by(user);
        for version in lab.versions() {
            let (key, id) = (&version.key, &version.id);
            assert_eq!(thief.deletes_version(key, id), denied, "{version:?}");
            for bypasses in [false, true] {
                let told = thief.locks_version(key, id, 60, bypasses);
                assert_eq!(told, denied, "{version:?}");
            }
            assert_eq!(thief.holds_version(key, id), denied, "{version:?}");
        }
        assert_eq!(thief.changes_the_default_lock(), denied);
        assert_eq!(thief.puts_policy(&policy(&lab.bucket)), denied);
        assert_eq!(thief.removes_the_policy(), denied);
    }
    assert_eq!(lab.bucket.versions(), before);
}

#[test]
fn the_policy_for_keys_that_lock_lets_an_agent_lock_what_it_adds_and_a_keeper_lock_it_anew() {
    let bucket = server().lockable_bucket();
    let open = |user: &User, days: u32| {
        let mut settings = bucket.settings_of(user, PREFIX);
        settings.may_delete = *user == KEEPER;
        settings.lock = Some(S3Lock {
            mode: LockMode::Governance,
            days_below: vec![("customers/acme".to_string(), days)],
        });
        S3::open(settings).unwrap()
    };
    let whole = policy(&bucket);
    bucket.apply_policy(&whole);
    let agent = open(&AGENT, 17);
    let pack = name("customers/acme/packs/s/1");
    agent.create(&pack, b"sealed").unwrap();
    assert!(agent.locked_until(&pack).unwrap().is_some());
    let refused = agent.create(&name("customers/acme/key/1"), b"a key");
    assert_eq!(refused.unwrap_err().kind, StorageErrorKind::Denied);

    let latest = |_: &ObjectName| Some(Timestamp::MAX);
    // What belongs to whom wrote it needs a right for everybody else.
    for (right, days) in [("s3:PutObjectRetention", 18), ("s3:GetObjectVersion", 19)] {
        bucket.apply_policy(&whole.replace(&format!("\"{right}\""), "\"s3:GetObject\""));
        let keeper = open(&KEEPER, days);
        let renewed = keeper.renew_locks("customers/acme", &latest);
        let locked = keeper.delete(&pack).map_err(|error| error.kind);
        match right {
            "s3:PutObjectRetention" => {
                assert_eq!(renewed.unwrap_err().kind, StorageErrorKind::Denied);
                assert_eq!(locked, Err(StorageErrorKind::Locked));
            }
            // It cannot see why.
            _ => {
                assert_eq!(renewed, Ok(1));
                assert_eq!(locked, Err(StorageErrorKind::Denied));
            }
        }
    }
    bucket.apply_policy(&whole);
    let keeper = open(&KEEPER, 20);
    assert_eq!(keeper.renew_locks("customers/acme", &latest), Ok(1));
    assert_eq!(
        keeper.delete(&pack).unwrap_err().kind,
        StorageErrorKind::Locked
    );

    // One that is not locked, and one that a keeper wrote.
    keeper
        .create(&name("customers/acme/key/1"), b"a key")
        .unwrap();
    let other = format!("{PREFIX}/customers/acme/packs/s/2");
    bucket.put(&other, b"sealed");
    let before = bucket.versions();
    assert_eq!(before.len(), 3);
    let visit = bucket.visited_by(&AGENT);
    let denied = Err("AccessDenied".to_string());
    for version in &before {
        let (key, id) = (&version.key, &version.id);
        assert_eq!(visit.deletes_version(key, id), denied, "{key}");
        assert_eq!(visit.deletes(key), denied, "{key}");
        assert_eq!(visit.deletes_many(&[key, &other]), denied, "{key}");
        if key.contains("/key/") {
            let longer = 40 * DAY_SECONDS;
            assert_eq!(visit.locks_version(key, id, longer, false), denied);
        }
    }
    assert_eq!(bucket.versions(), before);
}
