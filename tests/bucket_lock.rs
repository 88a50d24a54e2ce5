//! Object Lock: what a stolen key cannot do, and what a prune does meanwhile, on a real server.

mod support;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use std::fs;
use support::s3::{Bucket, OWNER, Version, server};
use support::{Guest, Host, HostOptions, Random, time};
use vmkeep::model::{LockMode, ObjectName, Writers};
use vmkeep::storage::{S3, S3Lock, Storage, StorageErrorKind};

const PREFIX: &str = "backups/vmkeep";
const DAY_SECONDS: i64 = 24 * 60 * 60;

fn days(count: i64) -> SignedDuration {
    SignedDuration::from_hours(24 * count)
}

fn start() -> Timestamp {
    time("2025-03-03T23:00:00Z")
}

/// `[repository]` of one host, with locks.
fn repository(bucket: &Bucket, mode: &str) -> String {
    let config = bucket.config_for(Writers::One, PREFIX);
    format!("{config}lock = \"{mode}\"\n")
}

struct Lab {
    bucket: Bucket,
    host: Host,
    guest: Guest,
    random: Random,
}

impl Lab {
    fn new(bucket: Bucket, mode: &str) -> Self {
        let host = Host::new(&HostOptions {
            name: "host1",
            bucket: Some(repository(&bucket, mode)),
            ..HostOptions::default()
        });
        let mut random = Random::new(0x10c4);
        let guest = Guest::new(host.image("web01", "vda"), 6 << 20, &mut random);
        Lab {
            bucket,
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
        let locks: Vec<i64> = self
            .versions()
            .iter()
            .filter(|version| version.key.contains(part))
            .map(|version| self.bucket.locked_until(version).expect("a lock") - now)
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
    // Longer locks than before show which ones are new.
    lab.with_policy("max_retention = \"3 months\"");
    lab.host.vmkeep(&["run"], start).exits(0);
    lab.host.vmkeep(&["prune"], start).exits(0);
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
    let open = |days: u32| {
        let mut settings = bucket.settings("root");
        settings.lock = Some(S3Lock {
            mode: LockMode::Governance,
            days_below: vec![("none".to_string(), 0), ("some".to_string(), days)],
        });
        S3::open(settings).unwrap()
    };
    let name = |name: &str| ObjectName::new(name).unwrap();
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
