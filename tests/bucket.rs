//! The program with its repository in a bucket of a real server.

use vmkeep_test_support as support;

use jiff::{SignedDuration, Timestamp};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use support::s3::{Bucket, Kind, Mishap, Passed, Proxy, server};
use support::{Customer, Guest, Host, HostOptions, Random, files_below, path_text, time};
use vmkeep::model::Writers;

const PREFIX: &str = "backups/vmkeep";

fn days(count: i64) -> SignedDuration {
    SignedDuration::from_hours(24 * count)
}

fn start() -> Timestamp {
    time("2025-03-03T23:00:00Z")
}

struct Lab {
    host: Host,
    guest: Guest,
    random: Random,
}

impl Lab {
    /// A host that is configured and has done nothing yet.
    fn new(repository: String) -> Self {
        Lab::named("host1", repository)
    }

    fn named(name: &'static str, repository: String) -> Self {
        let mut random = Random::new(0xb0c4_e700);
        let host = Host::new(&HostOptions {
            name,
            bucket: Some(repository),
            ..HostOptions::default()
        });
        let guest = Guest::new(host.image("web01", "vda"), 6 << 20, &mut random);
        Lab {
            host,
            guest,
            random,
        }
    }

    fn in_bucket(bucket: &Bucket) -> Self {
        Lab::new(bucket.config(PREFIX))
    }

    #[track_caller]
    fn newest_restores(&self, at: Timestamp) {
        let target = self.host.restore("web01", "latest", at);
        let restored = fs::read(target.path().join("vda.raw")).unwrap();
        assert!(restored == self.guest.content(), "other bytes came back");
    }
}

#[test]
fn nights_in_a_bucket_are_listed_and_restored_byte_for_byte() {
    let bucket = server().bucket();
    let mut lab = Lab::in_bucket(&bucket);
    lab.host.vmkeep(&["points"], start()).exits(10);
    lab.host
        .vmkeep(&["init", "--yes"], start())
        .exits(0)
        .says(&format!("s3://{}/{PREFIX}", bucket.name));
    for night in 0..3 {
        let at = start() + days(night);
        lab.guest.work(4, &mut lab.random);
        lab.host.vmkeep(&["run"], at).exits(0);
        assert_eq!(lab.host.points(at).len() as i64, night + 1);
        lab.newest_restores(at);
    }
    let at = start() + days(2);
    lab.host.vmkeep(&["verify", "--read-data"], at).exits(0);
    let without = ["verify", "--without-keys", "--read-data"];
    lab.host.vmkeep(&without, at).exits(0);
    for version in bucket.versions() {
        assert!(version.key.starts_with(PREFIX), "{version:?}");
    }
}

#[test]
fn a_bucket_in_which_the_maximum_cannot_be_kept_is_refused_before_the_first_byte() {
    let bucket = server().bucket();
    let lab = Lab::in_bucket(&bucket);
    bucket.expire_after("everything", "", 30);
    lab.host
        .vmkeep(&["init", "--yes"], start())
        .exits(2)
        .one_error()
        .says("the lifecycle rule \"everything\" removes objects of customer acme after 30 days");
    assert_eq!(bucket.versions(), []);
    let points = format!("{PREFIX}/customers/acme/points/");
    bucket.expire_after("backstop", &points, 62);
    lab.host.vmkeep(&["init", "--yes"], start()).exits(0);
    // What was right once is looked at again.
    bucket.expire_after("backstop", &points, 61);
    let before = bucket.versions().len();
    lab.host
        .vmkeep(&["run"], start())
        .exits(2)
        .says("up to 62 days");
    assert_eq!(bucket.versions().len(), before);
    lab.host.vmkeep(&["prune"], start()).exits(0);
}

#[test]
fn a_bucket_that_locks_longer_than_erasing_may_take_is_refused_with_the_arithmetic() {
    if !server().kind.has_lock() {
        return server().bucket().takes_no_lock();
    }
    let bucket = server().bucket_with_lock(14);
    Lab::in_bucket(&bucket)
        .host
        .vmkeep(&["init", "--yes"], start())
        .exits(2)
        .one_error()
        .says("locked for 14 days")
        .says("at most half, 11 days");
    assert_eq!(bucket.versions(), []);
}

#[test]
fn a_bucket_in_another_region_than_allowed_is_refused_before_the_first_byte() {
    let bucket = server().bucket();
    let elsewhere = format!(
        "{}allowed_regions = [\"eu-central-1\"]\n",
        bucket.config(PREFIX)
    );
    let lab = Lab::new(elsewhere);
    lab.host
        .vmkeep(&["init", "--yes"], start())
        .exits(2)
        .one_error()
        .says("only these regions are allowed: eu-central-1");
    assert_eq!(bucket.versions(), []);
}

#[test]
fn a_server_that_ignores_the_condition_is_refused_with_the_reason() {
    // All do so, some only where they keep versions, and the newest only in races.
    let bucket = server().bucket();
    if server().kind.has_versions() {
        bucket.keep_versions(aws_sdk_s3::types::BucketVersioningStatus::Enabled);
    }
    let bare = bucket
        .config_for(Writers::Many, PREFIX)
        .replace(&server().endpoint, &server().bare_endpoint);
    Lab::new(bare)
        .host
        .vmkeep(&["init", "--yes"], start())
        .exits(1)
        .one_error()
        .says("cannot order the entries of several writers");
}

#[test]
fn where_the_condition_is_ignored_one_host_alone_keeps_its_nights() {
    let bucket = server().bucket();
    if server().kind.has_versions() {
        bucket.keep_versions(aws_sdk_s3::types::BucketVersioningStatus::Enabled);
    }
    let config = bucket.config_for(Writers::One, PREFIX);
    let mut lab = Lab::new(config.clone());
    lab.host.vmkeep(&["init", "--yes"], start()).exits(0);
    for night in 0..3 {
        let at = start() + days(night);
        lab.guest.work(4, &mut lab.random);
        lab.host.vmkeep(&["run"], at).exits(0);
        lab.newest_restores(at);
    }
    let at = start() + days(3);
    lab.host.vmkeep(&["prune"], at).exits(0);
    lab.host.vmkeep(&["verify", "--read-data"], at).exits(0);
    lab.host.vmkeep(&["ledger", "verify"], at).exits(0);
    assert_eq!(lab.host.points(at).len(), 3);

    // It is this host's alone, and stays what it was made for.
    let other = Lab::named("host2", config);
    let refused = other.host.vmkeep(&["init", "--yes"], at);
    refused.exits(12).one_error().says("for one host alone");
    // What the first would refuse is not advised.
    assert!(!refused.stderr.contains("key admit"), "{refused}");
    let many = Lab::named("host3", bucket.config_for(Writers::Many, PREFIX));
    many.host
        .vmkeep(&["init", "--yes"], at)
        .exits(2)
        .one_error()
        .says("was made with \"one\"");

    // The machine is lost; another one goes on in its name, once somebody has said so.
    let folder = lab.host.state();
    for file in ["installation", "locks/mark-acme"] {
        fs::remove_file(folder.join(file)).unwrap();
    }
    lab.host
        .vmkeep(&["run"], at)
        .exits_with_one_of(&[1, 3])
        .says("--take-over");
    lab.newest_restores(at);
    lab.host
        .vmkeep(&["init", "--yes", "--take-over"], at)
        .exits(0);
    lab.host.vmkeep(&["run"], at).exits(0);
    assert_eq!(lab.host.points(at).len(), 4);
    lab.newest_restores(at);
}

#[test]
fn secrets_come_from_places_that_keep_them() {
    let bucket = server().bucket();
    let lab = Lab::in_bucket(&bucket);
    let secret = lab.host.path("secret");
    fs::write(&secret, format!("{}\n", support::s3::SECRET_ACCESS_KEY)).unwrap();
    let config = lab.host.config_text();
    let with = |line: &str| {
        let lines = config.lines().map(|old| match old {
            old if old.starts_with("secret_access_key_command") => line,
            old => old,
        });
        lab.host.write_config(&lines.collect::<Vec<_>>().join("\n"));
    };
    with(&format!(
        "secret_access_key_file = \"{}\"",
        path_text(&secret)
    ));
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o644)).unwrap();
    lab.host
        .vmkeep(&["init", "--yes"], start())
        .exits(2)
        .one_error()
        .says("chmod 0600");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    lab.host.vmkeep(&["init", "--yes"], start()).exits(0);
    with("secret_access_key_credential = \"s3\"");
    lab.host
        .vmkeep(&["points"], start())
        .exits(2)
        .one_error()
        .says("LoadCredential=s3");
    with("secret_access_key_command = [\"false\"]");
    lab.host
        .vmkeep(&["points"], start())
        .exits(2)
        .one_error()
        .says("exit status: 1");
    with("secret_access_key_command = [\"echo\", \"wrong\"]");
    lab.host
        .vmkeep(&["points"], start())
        .exits(1)
        .one_error()
        .says(match server().kind {
            Kind::Garage => "Invalid signature",
            _ => "SignatureDoesNotMatch",
        });
}

#[test]
fn credentials_that_are_nowhere_are_missed_at_once() {
    let bucket = server().bucket();
    let config = bucket.config(PREFIX);
    let without: Vec<&str> = config
        .lines()
        .filter(|line| !line.contains("access_key"))
        .collect();
    let lab = Lab::new(format!("{}\n", without.join("\n")));
    lab.host
        .vmkeep(&["init", "--yes"], start())
        .exits(1)
        .one_error()
        .says("no credentials")
        .says("environment");
}

#[test]
fn hosts_share_a_bucket_each_with_its_roles_and_a_vm_moves_between_them() {
    let bucket = server().bucket();
    let mut first = Lab::in_bucket(&bucket);
    first.host.vmkeep(&["init", "--yes"], start()).exits(0);
    first.host.vmkeep(&["run"], start()).exits(0);
    let second = Lab::named("host2", bucket.config(PREFIX));
    if server().kind.writers() == Writers::One {
        second
            .host
            .vmkeep(&["init", "--yes"], start())
            .exits(12)
            .one_error()
            .says("for one host alone");
        return;
    }
    let keeper = Lab::named("keeper", bucket.config(PREFIX));
    let admit = |words: Vec<String>, roles: &[&str]| {
        let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
        words.extend(roles.iter().flat_map(|role| ["--role", role]));
        first.host.vmkeep(&words, start()).exits(0);
    };
    admit(second.host.admission(start()), &[]);
    admit(keeper.host.admission(start()), &["prune"]);
    for lab in [&second, &keeper] {
        lab.host.vmkeep(&["init", "--yes"], start()).exits(0);
    }
    let listed = first.host.json(&["key", "list"], start());
    let hosts = listed[0]["hosts"].as_array().unwrap();
    assert_eq!(hosts.len(), 3);
    assert!(hosts.iter().all(|host| host["has_key"] == true), "{listed}");

    // The VM moves: its disk is on the second host from now on.
    let at = start() + days(1);
    first.guest.work(8, &mut first.random);
    fs::copy(
        first.host.image("web01", "vda"),
        second.host.image("web01", "vda"),
    )
    .unwrap();
    second.host.vmkeep(&["backup", "web01"], at).exits(0);
    let points = second.host.points(at);
    assert_eq!(points.len(), 2);
    assert_eq!(points, first.host.points(at));
    for lab in [&first, &second] {
        let target = lab.host.restore("web01", "latest", at);
        let restored = fs::read(target.path().join("vda.raw")).unwrap();
        assert!(restored == first.guest.content());
    }
    // And back.
    first.guest.work(8, &mut first.random);
    let at = start() + days(2);
    first.host.vmkeep(&["backup", "web01"], at).exits(0);
    first.newest_restores(at);

    // Each does what its roles say, and no more.
    second
        .host
        .vmkeep(&["prune"], at)
        .exits(1)
        .one_error()
        .says("this host has no role for pruning");
    second
        .host
        .vmkeep(&["run"], at)
        .exits(0)
        .says("for a host with the role");
    keeper.host.vmkeep(&["prune"], at).exits(0);

    // All at once: two that back up, one that prunes.
    let at = start() + days(3);
    let running = [
        first.host.start(&["backup", "web01"], at),
        second.host.start(&["backup", "web01"], at),
        keeper.host.start(&["prune"], at),
    ];
    for running in running {
        let ran = running.ended();
        // Of two backups of one VM at a time, one may find the other's in its way.
        ran.exits_with_one_of(&[0, 1, 11]);
    }
    first.host.vmkeep(&["verify", "--read-data"], at).exits(0);
    first.host.vmkeep(&["ledger", "verify"], at).exits(0);
    assert!(first.host.points(at).len() >= 4);
}

/// What a host that has the ledger and the index of yesterday asks and sends for one VM that did not change. One
/// host alone looks for rivals of each entry as well, before and after, and seals what was there.
#[test]
fn an_unchanged_incremental_costs_nine_requests_beside_the_opening() {
    let bucket = server().bucket();
    let proxy = Proxy::before(&server().endpoint);
    let config = bucket
        .config(PREFIX)
        .replace(&server().endpoint, &proxy.endpoint);
    let lab = Lab::new(config);
    lab.host.vmkeep(&["init", "--yes"], start()).exits(0);
    lab.host.vmkeep(&["backup", "web01"], start()).exits(0);
    proxy.start_over([]);
    let at = start() + days(1);
    lab.host.vmkeep(&["backup", "web01"], at).exits(0);
    let passed = proxy.passed();
    let is_probe = |passed: &Passed| passed.target.contains("/probe/");
    let opened = passed.iter().rposition(is_probe).unwrap() + 1;
    let (opening, own) = passed.split_at(opened);
    for passed in &passed {
        println!("{} {}", passed.method, passed.target);
    }
    let (most, most_to_open) = match (server().kind, server().kind.writers()) {
        // Where versions are kept, each of the three objects that are created is looked at, and the condition is
        // tried by writers that race.
        (Kind::Ceph20Versions, _) => (9 + 3, 45),
        (_, Writers::Many) => (9, 15),
        (_, Writers::One) => (20, 15),
    };
    assert!(own.len() <= most, "{} requests", own.len());
    // Beside the entries of the ledger, of which there are at most twenty since the last checkpoint.
    let of_ledger = |passed: &&Passed| passed.target.contains("/ledger/0");
    let entries = opening.iter().filter(of_ledger).count();
    let to_open = opening.len() - entries;
    assert!(to_open <= most_to_open, "{to_open} to open");
    lab.newest_restores(at);
}

#[test]
fn a_customer_is_opened_once_for_all_vms_that_are_backed_up() {
    let bucket = server().bucket();
    let proxy = Proxy::before(&server().endpoint);
    let config = bucket
        .config(PREFIX)
        .replace(&server().endpoint, &proxy.endpoint);
    let disks = |vm| (vm, vec!["vda"]);
    let host = Host::new(&HostOptions {
        customers: vec![Customer {
            name: "acme",
            own: "",
            vms: vec![disks("web01"), disks("db01")],
        }],
        bucket: Some(config),
        ..HostOptions::default()
    });
    let mut random = Random::new(0xb0c4_e702);
    for vm in ["web01", "db01"] {
        Guest::new(host.image(vm, "vda"), 1 << 20, &mut random);
    }
    host.vmkeep(&["init", "--yes"], start()).exits(0);
    proxy.start_over([]);
    host.vmkeep(&["backup", "web01", "db01"], start()).exits(0);
    let keys_read = |passed: &&Passed| passed.target.contains("/key/");
    assert_eq!(proxy.passed().iter().filter(keys_read).count(), 1);
    assert_eq!(host.points(start()).len(), 2);
}

#[test]
fn the_index_is_read_on_this_host_and_copies_go_with_what_they_are_of() {
    let bucket = server().bucket();
    let proxy = Proxy::before(&server().endpoint);
    let config = bucket
        .config(PREFIX)
        .replace(&server().endpoint, &proxy.endpoint);
    let mut lab = Lab::new(config.clone());
    lab.host.vmkeep(&["init", "--yes"], start()).exits(0);
    let segments_read = |lab: &Lab, command: &[&str], at| {
        proxy.start_over([]);
        lab.host.vmkeep(command, at).exits(0);
        let of_index = |passed: &Passed| {
            let target = &passed.target;
            passed.method == "GET" && target.contains("/index/") && target.contains("GetObject")
        };
        proxy.passed().iter().filter(|one| of_index(one)).count()
    };
    let copies = |lab: &Lab| {
        let folder = lab.host.state().join("cache/customers/acme/index");
        let files = |session: fs::DirEntry| fs::read_dir(session.path()).unwrap().count();
        let sessions = fs::read_dir(folder).unwrap();
        sessions
            .map(|session| files(session.unwrap()))
            .sum::<usize>()
    };
    lab.host.vmkeep(&["backup", "web01"], start()).exits(0);
    // What this host wrote it has.
    assert_eq!(copies(&lab), 1);
    for night in 1..3 {
        lab.guest.work(4, &mut lab.random);
        let at = start() + days(night);
        assert_eq!(segments_read(&lab, &["backup", "web01"], at), 0);
    }
    let at = start() + days(2);
    lab.newest_restores(at);
    assert_eq!(copies(&lab), 3);
    assert_eq!(segments_read(&lab, &["verify"], at), 3);
    fs::remove_dir_all(lab.host.state().join("cache")).unwrap();
    assert_eq!(segments_read(&lab, &["backup", "web01"], at), 3);
    // What is not of the repository any more, and a customer who is not of this host.
    let stray = lab.host.state().join("cache/customers/acme/index/00/stray");
    let gone = lab.host.state().join("cache/customers/gone/index/00/00");
    for file in [&stray, &gone] {
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, "a copy").unwrap();
    }
    lab.host.vmkeep(&["points"], at).exits(0);
    assert!(!stray.exists() && !gone.exists());
    lab.host.write_config(&lab.host.config_text().replace(
        "allow_http = true\n",
        "allow_http = true\ncache_size = \"0\"\n",
    ));
    assert_eq!(segments_read(&lab, &["backup", "web01"], at), 3);
}

/// The names of what this host has copies of, below its repository.
fn copies_in(host: &Host, folder: &str) -> BTreeSet<String> {
    let cache = host.state().join("cache");
    let below = cache.join("customers/acme").join(folder);
    let name = |path: &PathBuf| path_text(path.strip_prefix(&cache).unwrap()).to_string();
    files_below(&below).iter().map(name).collect()
}

#[test]
fn nodes_are_walked_on_this_host_and_judged_in_the_bucket() {
    let bucket = server().bucket();
    let proxy = Proxy::before(&server().endpoint);
    let config = bucket
        .config(PREFIX)
        .replace(&server().endpoint, &proxy.endpoint);
    let mut lab = Lab::new(config);
    let nodes = |lab: &Lab| copies_in(&lab.host, "packs");
    let mut known = BTreeSet::new();
    let mut packs_read = |lab: &Lab, command: &[&str], at| {
        known.append(&mut nodes(lab));
        proxy.start_over([]);
        lab.host.vmkeep(command, at).exits(0);
        let of_nodes = |passed: &&Passed| {
            let target = &passed.target;
            let known = known.iter().any(|name| target.contains(name.as_str()));
            passed.method == "GET" && known
        };
        proxy.passed().iter().filter(of_nodes).count()
    };
    lab.host.vmkeep(&["init", "--yes"], start()).exits(0);
    lab.host.vmkeep(&["backup", "web01"], start()).exits(0);
    assert_eq!(nodes(&lab).len(), 1);
    let night = |number| start() + days(number);
    let backup = ["backup", "web01"];
    lab.guest.work(4, &mut lab.random);
    assert_eq!(packs_read(&lab, &backup, night(1)), 0);
    assert_eq!(nodes(&lab).len(), 2);
    let target = lab.host.path("restored");
    let restore = ["restore", "web01", "--at", "latest", "--to"];
    let restore = [&restore[..], &[path_text(&target)]].concat();
    assert_eq!(packs_read(&lab, &restore, night(1)), 0);
    assert!(fs::read(target.join("vda.raw")).unwrap() == lab.guest.content());

    // Rotten copies are none, and are made anew.
    for name in nodes(&lab) {
        let path = lab.host.state().join("cache").join(name);
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, bytes).unwrap();
    }
    let restored = || fs::read(target.join("vda.raw")).unwrap() == lab.guest.content();
    fs::remove_dir_all(&target).unwrap();
    assert_eq!(packs_read(&lab, &restore, night(1)), 1);
    assert!(restored());
    // So are lost ones; and then they are there.
    fs::remove_dir_all(lab.host.state().join("cache")).unwrap();
    for read in [1, 0] {
        fs::remove_dir_all(&target).unwrap();
        assert_eq!(packs_read(&lab, &restore, night(1)), read);
        assert!(restored());
    }
    assert_eq!(packs_read(&lab, &["verify"], night(1)), 2);
    assert_eq!(packs_read(&lab, &["prune"], night(1)), 2);

    // What the bucket has lost is walked here, and missed by whoever judges; a full heals it.
    let before = nodes(&lab);
    lab.guest.work(4, &mut lab.random);
    lab.host.vmkeep(&backup, night(2)).exits(0);
    let after = nodes(&lab);
    let lost = after.difference(&before).next().unwrap();
    bucket.delete(&format!("{PREFIX}/{lost}"));
    lab.host.vmkeep(&backup, night(3)).exits(0);
    lab.newest_restores(night(3));
    lab.host.vmkeep(&["verify"], night(3)).exits(6).says(lost);
    lab.host.vmkeep(&["prune"], night(3)).exits(6);
    let full = ["backup", "web01", "--full"];
    lab.host.vmkeep(&full, night(4)).exits(0);
    fs::remove_dir_all(lab.host.state().join("cache")).unwrap();
    for when in ["2025-03-05", "latest"] {
        let restored = lab.host.restore("web01", when, night(4));
        let restored = fs::read(restored.path().join("vda.raw")).unwrap();
        assert!(restored == lab.guest.content(), "{when}");
    }
}

#[test]
fn copies_go_with_what_the_bucket_loses_even_if_this_host_was_off() {
    let bucket = server().bucket();
    let mut random = Random::new(0xb0c4_e701);
    let host = Host::new(&HostOptions {
        policy: "timezone = \"UTC\"\nwindow = \"22:00-06:00\"\nmax_retention = \"7 days\"",
        bucket: Some(bucket.config(PREFIX)),
        ..HostOptions::default()
    });
    let mut guest = Guest::new(host.image("web01", "vda"), 6 << 20, &mut random);
    host.vmkeep(&["init", "--yes"], start()).exits(0);
    let in_bucket = || -> BTreeSet<String> {
        let versions = bucket.versions().into_iter();
        let name = |key: &str| key.strip_prefix(PREFIX).unwrap()[1..].to_string();
        versions.map(|version| name(&version.key)).collect()
    };
    let cache = host.state().join("cache");
    let mut of_then: Vec<(PathBuf, Vec<u8>)> = Vec::new();
    for night in 0..12 {
        let at = start() + days(night);
        guest.work(4, &mut random);
        host.vmkeep(&["run"], at).exits(0);
        let copies = copies_in(&host, "packs");
        assert!(!copies.is_empty());
        assert!(copies.is_subset(&in_bucket()), "night {night}");
        if night == 3 {
            let files = files_below(&cache).into_iter();
            of_then = files
                .map(|path| (path.clone(), fs::read(&path).unwrap()))
                .collect();
        }
    }
    // As a host finds them that was off since the fourth night.
    let at = start() + days(11);
    fs::remove_dir_all(&cache).unwrap();
    for (path, bytes) in &of_then {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
    assert!(!copies_in(&host, "packs").is_subset(&in_bucket()));
    host.vmkeep(&["points"], at).exits(0);
    for folder in ["packs", "index"] {
        assert!(copies_in(&host, folder).is_subset(&in_bucket()));
    }
    host.vmkeep(&["verify", "--read-data"], at).exits(0);
}

/// Nights in each of which one request or two go wrong, at places that a seed chooses. `VMKEEP_MISHAPS=0..5000`
/// tries more.
#[test]
fn whatever_goes_wrong_between_vmkeep_and_its_bucket_no_point_is_lost_and_none_restores_wrongly() {
    let range = std::env::var("VMKEEP_MISHAPS").unwrap_or_else(|_| "0..40".to_string());
    let (first, end) = range.split_once("..").expect("VMKEEP_MISHAPS=FIRST..END");
    let (first, end): (u64, u64) = (first.parse().unwrap(), end.parse().unwrap());
    let bucket = server().bucket();
    let proxy = Proxy::before(&server().endpoint);
    let config = bucket
        .config(PREFIX)
        .replace(&server().endpoint, &proxy.endpoint);
    let mut lab = Lab::new(config);
    lab.host.vmkeep(&["init", "--yes"], start()).exits(0);
    lab.host.vmkeep(&["run"], start()).exits(0);
    let mut happened = 0;
    // What each point must restore to.
    let mut contents: BTreeMap<String, u64> = BTreeMap::new();
    let fingerprint = |bytes: &[u8]| {
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        hasher.finish()
    };
    let taken_at = |point: &serde_json::Value| point["taken_at"].as_str().unwrap().to_string();
    // Of one night all have the same: the guest works between the nights.
    let note = |lab: &Lab, at, contents: &mut BTreeMap<String, u64>| {
        let content = fingerprint(lab.guest.content());
        for point in lab.host.points(at) {
            contents.entry(taken_at(&point)).or_insert(content);
        }
    };
    note(&lab, start(), &mut contents);
    for (night, seed) in (first..end).enumerate() {
        let at = start() + days(night as i64 + 1);
        let mut random = Random::new(seed);
        let mishaps = [
            Mishap::Status(500),
            Mishap::Status(503),
            Mishap::Status(409),
            Mishap::Status(412),
            Mishap::LostBefore,
            Mishap::LostAfter,
            Mishap::Truncated,
            Mishap::Flipped,
            Mishap::Stale,
            Mishap::HalfTold,
            Mishap::Undone,
        ];
        let plan: Vec<(usize, Mishap)> = (0..1 + random.below(2))
            .map(|_| {
                let mishap = *random.pick(&mishaps).unwrap();
                (random.below(60) as usize, mishap)
            })
            .collect();
        lab.guest.work(4, &mut lab.random);
        proxy.start_over(plan.clone());
        let ran = lab.host.vmkeep(&["run"], at);
        happened += proxy.happened().len();
        proxy.start_over([]);
        assert!(
            !ran.stderr.contains("panicked"),
            "seed {seed} {plan:?}\n{ran}"
        );
        if ran.code() != Some(0) {
            // Nothing is left that the next run does not clean up, and nothing is lost.
            lab.host.vmkeep(&["backup", "web01"], at).exits(0);
        }
        lab.newest_restores(at);
        note(&lab, at, &mut contents);
        if night % 10 == 9 {
            // What the one before met stands in the status until another one looks.
            lab.host.vmkeep(&["run"], at).exits(0);
            lab.host.vmkeep(&["prune"], at).exits(0);
            lab.host.vmkeep(&["verify", "--read-data"], at).exits(0);
            lab.host.vmkeep(&["status"], at).exits(0);
            for point in lab.host.points(at) {
                let taken = taken_at(&point);
                let target = lab.host.restore("web01", &taken, at);
                let restored = fs::read(target.path().join("vda.raw")).unwrap();
                let content = contents.get(&taken);
                assert_eq!(content, Some(&fingerprint(&restored)), "{taken}");
            }
        }
    }
    assert!(happened as u64 >= (end - first) / 2, "{happened} mishaps");
}
