//! Least rights in a bucket: an agent whose key cannot delete and a keeper whose key can, each with just
//! what `config/bucket-policy.json` gives, on a real server.

use vmkeep_test_support as support;

use aws_sdk_s3::types::BucketVersioningStatus;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use std::fs;
use support::s3::{AGENT, Bucket, KEEPER, Mishap, Proxy, server};
use support::{Guest, Host, HostOptions, Random, time};
use vmkeep::model::ObjectName;
use vmkeep::storage::{S3, Storage, StorageErrorKind};

const PREFIX: &str = "backups/vmkeep";

fn start() -> Timestamp {
    time("2025-03-03T23:00:00Z")
}

fn night(count: i64) -> Timestamp {
    start() + SignedDuration::from_hours(24 * count)
}

/// The policy as it is shipped, for this bucket and these users.
fn policy(bucket: &Bucket) -> String {
    fs::read_to_string("config/bucket-policy.json")
        .expect("config/bucket-policy.json")
        .replace("BUCKET", &bucket.name)
        .replace("PREFIX", PREFIX)
        .replace("\"AGENT\"", &format!("\"{}\"", AGENT.principal()))
        .replace("\"KEEPER\"", &format!("\"{}\"", KEEPER.principal()))
}

/// A bucket with the policy, a keeper that has made the repository, and an agent that was let in.
struct Scene {
    bucket: Bucket,
    agent: Host,
    keeper: Host,
    guest: Guest,
    random: Random,
}

fn agent_of(repository: String) -> Host {
    let host = Host::new(&HostOptions {
        name: "agent",
        bucket: Some(repository),
        ..HostOptions::default()
    });
    let text = host.config_text();
    host.write_config(&text.replacen("[host]", "[host]\nrole = \"agent\"", 1));
    host
}

impl Scene {
    fn new() -> Self {
        let bucket = server().bucket();
        let repository = bucket.config_of(&AGENT, PREFIX);
        Scene::with(bucket, repository)
    }

    /// With the agent's `[repository]`.
    fn with(bucket: Bucket, repository: String) -> Self {
        bucket.apply_policy(&policy(&bucket));
        let keeper = Host::new(&HostOptions {
            name: "keeper",
            bucket: Some(bucket.config_of(&KEEPER, PREFIX)),
            ..HostOptions::default()
        });
        keeper.vmkeep(&["init", "--yes"], start()).exits(0);
        let agent = agent_of(repository);
        let told = agent.vmkeep(&["init", "--yes"], start());
        told.exits(12).one_error();
        let admission = told.stderr.lines().find_map(|line| {
            let (_, words) = line.split_once("vmkeep key admit ")?;
            Some(["key", "admit"].into_iter().chain(words.split(' ')))
        });
        let admission: Vec<&str> = admission.expect("the command is printed").collect();
        keeper.vmkeep(&admission, start()).exits(0);
        agent.vmkeep(&["init", "--yes"], start()).exits(0);
        let mut random = Random::new(0xa9e7);
        let guest = Guest::new(agent.image("web01", "vda"), 6 << 20, &mut random);
        Scene {
            bucket,
            agent,
            keeper,
            guest,
            random,
        }
    }

    fn work(&mut self) {
        self.guest.work(4, &mut self.random);
    }

    #[track_caller]
    fn newest_restores(&self, host: &Host, at: Timestamp) {
        let target = host.restore("web01", "latest", at);
        let restored = fs::read(target.path().join("vda.raw")).unwrap();
        assert!(restored == self.guest.content(), "other bytes came back");
    }

    /// Keys of the customer in one of its folders.
    fn keys(&self, folder: &str) -> Vec<String> {
        let prefix = format!("{PREFIX}/customers/acme/{folder}/");
        let versions = self.bucket.versions().into_iter();
        versions
            .map(|version| version.key)
            .filter(|key| key.starts_with(&prefix))
            .collect()
    }

    /// The keeper prunes, and then nothing is in the bucket that the ledger does not explain.
    #[track_caller]
    fn keeper_prunes(&self, at: Timestamp) -> Value {
        let pruned = self.keeper.json(&["prune"], at);
        let again = self.keeper.json(&["prune"], at);
        let told = &again["customers"][0];
        for rest in ["removed", "unexplained", "leftovers", "notes"] {
            assert_eq!(told[rest], json!([]), "{again}");
        }
        assert_eq!(self.bucket.uploads(), Vec::<String>::new());
        pruned
    }
}

#[test]
fn an_agent_backs_up_and_restores_with_a_key_that_cannot_delete() {
    let bucket = server().bucket();
    let proxy = Proxy::before(&server().endpoint);
    let repository = bucket.config_of(&AGENT, PREFIX);
    let through_proxy = repository.replace(&server().endpoint, &proxy.endpoint);
    let mut scene = Scene::with(bucket, through_proxy);
    for count in 0..3 {
        scene.work();
        let ran = scene.agent.vmkeep(&["run"], night(count));
        ran.exits(0).says("this host is an agent");
        assert_eq!(scene.agent.points(night(count)).len() as i64, count + 1);
        scene.newest_restores(&scene.agent, night(count));
    }
    let at = night(2);
    for command in [
        &["verify", "--read-data"][..],
        &["verify", "--without-keys", "--read-data"],
        &["ledger", "verify"],
        &["key", "list"],
        &["status"],
    ] {
        scene.agent.vmkeep(command, at).exits(0);
    }
    for passed in proxy.passed() {
        assert!(
            matches!(passed.method.as_str(), "GET" | "HEAD" | "PUT"),
            "{passed:?}"
        );
    }
    // One that stands, and one for each opening: two of `init`, three of `run`.
    assert_eq!(scene.keys("probe").len(), 1 + 5);
    scene.keeper_prunes(at);
    let standing = format!("{PREFIX}/customers/acme/probe/standing");
    assert_eq!(scene.keys("probe"), [standing]);
    scene.newest_restores(&scene.keeper, at);
    scene.agent.vmkeep(&["run"], night(3)).exits(0);
}

#[test]
fn with_the_agents_key_nothing_can_be_deleted_and_no_rule_changed() {
    let scene = Scene::new();
    scene.agent.vmkeep(&["run"], start()).exits(0);
    scene.keeper_prunes(start());
    let keeper = scene.bucket.visited_by(&KEEPER);
    let upload_key = format!("{PREFIX}/customers/acme/packs/under-way");
    let upload = keeper.leaves_an_upload(&upload_key);
    let before = scene.bucket.versions();
    let policy = policy(&scene.bucket);
    let agent = scene.bucket.visited_by(&AGENT);
    let denied = Err("AccessDenied".to_string());
    for version in &before {
        assert_eq!(agent.deletes(&version.key), denied, "{version:?}");
        let by_id = agent.deletes_version(&version.key, &version.id);
        assert_eq!(by_id, denied, "{version:?}");
    }
    let point = scene.keys("points").remove(0);
    assert_eq!(agent.deletes_many(&[&point]), denied);
    assert_eq!(agent.aborts(&upload_key, &upload), denied);
    assert_eq!(agent.removes_the_bucket(), denied);
    // Nor can it let the server do it.
    assert_eq!(agent.expires_everything(), denied);
    assert_eq!(agent.tags(&point), denied);
    // Whoever may delete changes no rule either.
    for visit in [&agent, &keeper] {
        for status in [
            BucketVersioningStatus::Enabled,
            BucketVersioningStatus::Suspended,
        ] {
            assert_eq!(visit.keeps_versions(status), denied);
        }
        assert_eq!(visit.expires_everything(), denied);
        assert_eq!(visit.removes_the_rules(), denied);
        assert_eq!(visit.puts_policy(&policy), denied);
        assert_eq!(visit.removes_the_policy(), denied);
        assert_eq!(visit.opens_the_bucket_to_all(), denied);
        assert_eq!(visit.opens_to_all(&point), denied);
        assert_eq!(visit.puts("elsewhere", b"of somebody else"), denied);
    }
    assert_eq!(scene.bucket.versions(), before);
    scene
        .agent
        .vmkeep(&["verify", "--read-data"], start())
        .exits(0);
    scene.newest_restores(&scene.agent, start());
}

/// This server does not know the condition that would deny it, and keeps no versions in a bucket where it
/// orders writers: so this is what a stolen key of an agent can do, and what comes of it.
#[test]
fn what_the_agents_key_can_overwrite_is_found_and_keys_are_out_of_its_reach() {
    let scene = Scene::new();
    scene.agent.vmkeep(&["run"], start()).exits(0);
    let agent = scene.bucket.visited_by(&AGENT);
    let denied = Err("AccessDenied".to_string());
    let key = scene.keys("key").remove(0);
    let customer = format!("{PREFIX}/customers/acme");
    for key in [
        format!("{PREFIX}/vmkeep.json"),
        key,
        format!("{customer}/certificates/1.json"),
        format!("{customer}/other"),
        format!("{PREFIX}/customers/acme"),
    ] {
        assert_eq!(agent.puts(&key, b"other bytes"), denied, "{key}");
        assert_eq!(agent.copies(&scene.keys("packs")[0], &key), denied, "{key}");
    }
    for pack in scene.keys("packs") {
        assert_eq!(agent.puts(&pack, b"other bytes"), Ok(()));
    }
    scene
        .keeper
        .vmkeep(&["verify", "--read-data"], start())
        .exits(6);
    let to = scene.keeper.path("restored");
    let to = support::path_text(&to);
    let restore = ["restore", "web01", "--at", "latest", "--to", to];
    scene.keeper.vmkeep(&restore, start()).exits(6);
    // The next full heals what is still on the host's disks.
    let full = ["backup", "web01", "--full"];
    scene.agent.vmkeep(&full, night(1)).exits(0);
    scene.newest_restores(&scene.agent, night(1));
}

#[test]
fn what_a_stolen_key_of_an_agent_adds_loses_nothing() {
    let scene = Scene::new();
    scene.agent.vmkeep(&["run"], start()).exits(0);
    let agent = scene.bucket.visited_by(&AGENT);
    let customer = format!("{PREFIX}/customers/acme");
    let next = scene.keys("ledger").len() + 1;
    let slot = format!("{customer}/ledger/{next:016}");
    for key in [
        slot.clone(),
        format!("{customer}/packs/junk"),
        format!("{customer}/points/{}", "ab".repeat(16)),
    ] {
        assert_eq!(agent.puts(&key, b"junk"), Ok(()), "{key}");
    }
    // Junk where the ledger goes on stops everybody, loudly, until somebody removes it who may.
    for (host, command) in [(&scene.agent, "run"), (&scene.keeper, "prune")] {
        let told = host.vmkeep(&[command], night(1));
        told.exits(6).one_error().says("is not two lines");
    }
    let keeper = scene.bucket.visited_by(&KEEPER);
    assert_eq!(keeper.deletes(&slot), Ok(()));
    // What nobody of ours can have written is not removed unasked.
    let told = scene.keeper.vmkeep(&["prune"], night(1));
    told.exits(1).says("(not an object of vmkeep)");
    scene
        .keeper
        .vmkeep(&["prune", "--confirm"], night(1))
        .exits(0);
    scene.keeper_prunes(night(1));
    scene.newest_restores(&scene.agent, night(1));
    scene.agent.vmkeep(&["run"], night(1)).exits(0);
}

#[test]
fn where_versions_are_kept_the_first_bytes_stay_and_the_agents_key_cannot_remove_them() {
    let scene = Scene::new();
    scene.agent.vmkeep(&["run"], start()).exits(0);
    scene.bucket.keep_versions(BucketVersioningStatus::Enabled);
    let agent = scene.bucket.visited_by(&AGENT);
    let keeper = scene.bucket.visited_by(&KEEPER);
    let pack = scene.keys("packs").remove(0);
    let bytes = agent.reads(&pack);
    assert_eq!(agent.puts(&pack, b"other bytes"), Ok(()));
    let versions = scene.bucket.versions().into_iter();
    let of_pack: Vec<_> = versions.filter(|version| version.key == pack).collect();
    assert_eq!(of_pack.len(), 2);
    let denied = Err("AccessDenied".to_string());
    assert_eq!(agent.deletes(&pack), denied);
    for version in &of_pack {
        assert_eq!(agent.deletes_version(&pack, &version.id), denied);
    }
    // The newest is listed first.
    assert_eq!(keeper.deletes_version(&pack, &of_pack[0].id), Ok(()));
    assert!(keeper.reads(&pack) == bytes);
    // This server ignores the condition where it keeps versions: an agent finds that out too.
    let before = scene.keys("packs");
    scene
        .agent
        .vmkeep(&["run"], night(1))
        .exits(1)
        .says("cannot order the entries of several writers");
    assert_eq!(scene.keys("packs"), before);
}

#[test]
fn what_an_agent_aborted_is_removed_by_the_keeper() {
    let mut scene = Scene::new();
    scene.agent.vmkeep(&["run"], start()).exits(0);
    let whole = scene.keys("packs");
    scene.work();
    // Everything goes up, and then the record of the point does not.
    let points = format!(
        "arn:aws:s3:::{}/{PREFIX}/customers/*/points/*",
        scene.bucket.name
    );
    let mut without = serde_json::from_str::<Value>(&policy(&scene.bucket)).unwrap();
    for statement in without["Statement"].as_array_mut().unwrap() {
        if let Some(resources) = statement["Resource"].as_array_mut() {
            resources.retain(|resource| *resource != points);
        }
    }
    scene.bucket.apply_policy(&without.to_string());
    let backup = scene.agent.vmkeep(&["backup", "web01"], night(1));
    backup.exits(1).one_error().says("permission denied");
    scene.bucket.apply_policy(&policy(&scene.bucket));
    let agent = scene.bucket.visited_by(&AGENT);
    agent.leaves_an_upload(&format!("{PREFIX}/customers/acme/packs/left/behind"));
    let left: Vec<String> = scene
        .keys("packs")
        .into_iter()
        .filter(|key| !whole.contains(key))
        .collect();
    assert!(!left.is_empty());
    scene.agent.vmkeep(&["run"], night(1)).exits(0);
    assert!(left.iter().all(|key| scene.keys("packs").contains(key)));
    scene.keeper_prunes(night(1));
    assert!(!left.iter().any(|key| scene.keys("packs").contains(key)));
    scene.newest_restores(&scene.agent, night(1));
    scene
        .agent
        .vmkeep(&["verify", "--read-data"], night(1))
        .exits(0);
}

#[test]
fn after_an_agent_was_killed_its_next_run_and_a_prune_of_the_keeper_leave_nothing_unexplained() {
    let mut scene = Scene::new();
    let config = scene.agent.config_text();
    // Slow enough to be met half-way.
    let slow = config
        .replacen("[repository]", "[repository]\npack_size = \"1 MiB\"", 1)
        .replacen(
            "[repository.s3]",
            "[repository.s3]\nupload_limit = \"512 KiB\"",
            1,
        );
    for (count, packs) in [1, 3].into_iter().enumerate() {
        let at = night(count as i64);
        let bytes = scene.random.noise(5 << 20);
        scene.guest.write(0, &bytes);
        let before = scene.keys("packs");
        let uploaded = |scene: &Scene| {
            let mut keys = scene.keys("packs");
            keys.retain(|key| !before.contains(key));
            keys
        };
        scene.agent.write_config(&slow);
        let mut running = scene.agent.start(&["backup", "web01"], at);
        while uploaded(&scene).len() < packs {
            assert!(running.is_running(), "{}", running.ended());
        }
        assert!(running.kill().was_killed());
        let left = uploaded(&scene);
        scene.agent.write_config(&config);
        let ran = scene.agent.json(&["run"], at);
        assert_eq!(ran["customers"][0]["aborted_sessions"], 1, "{ran}");
        assert!(left.iter().all(|key| scene.keys("packs").contains(key)));
        scene.keeper_prunes(at);
        assert!(!left.iter().any(|key| scene.keys("packs").contains(key)));
        scene.newest_restores(&scene.agent, at);
        scene.agent.vmkeep(&["verify", "--read-data"], at).exits(0);
        scene.agent.vmkeep(&["ledger", "verify"], at).exits(0);
    }
}

#[test]
fn an_agent_does_not_prune_and_says_so() {
    let scene = Scene::new();
    scene
        .agent
        .vmkeep(&["run"], start())
        .exits(0)
        .says("nothing was pruned: this host is an agent, which deletes nothing");
    let before = scene.bucket.versions();
    for command in [&["prune"][..], &["prune", "--confirm"]] {
        scene
            .agent
            .vmkeep(command, start())
            .exits(1)
            .one_error()
            .says("this host is an agent ([host] role): it deletes nothing, so nothing was pruned");
    }
    scene
        .agent
        .vmkeep(&["prune", "--dry-run"], start())
        .exits(0);
    assert_eq!(scene.bucket.versions(), before);
    // Nor is it done because nobody said that this key cannot delete.
    let config = scene.agent.config_text();
    let keeper = config.replacen("role = \"agent\"", "role = \"keeper\"", 1);
    scene.agent.write_config(&keeper);
    scene
        .agent
        .vmkeep(&["run"], start())
        .exits(1)
        .says("permission denied")
        .says("and delete unless [host] role = \"agent\"");
    scene.agent.write_config(&config);
    let shown = scene.agent.json(&["config", "show"], start());
    assert_eq!(shown["host"]["role"], "agent");
    assert_eq!(
        scene.keeper.json(&["config", "show"], start())["host"]["role"],
        "keeper"
    );
}

#[test]
fn an_agent_makes_neither_a_repository_nor_a_customer() {
    let bucket = server().bucket();
    bucket.apply_policy(&policy(&bucket));
    let alone = agent_of(bucket.config_of(&AGENT, PREFIX));
    alone
        .vmkeep(&["init", "--yes"], start())
        .exits(10)
        .one_error()
        .says("vmkeep init on the keeper comes first");
    assert_eq!(bucket.versions(), []);
    let scene = Scene::new();
    let text = scene.agent.config_text();
    scene
        .agent
        .write_config(&format!("{text}\n[[customer]]\nid = \"globex\"\n"));
    scene
        .agent
        .vmkeep(&["init", "--yes"], start())
        .exits(1)
        .one_error()
        .says("customer globex is not in the repository yet, and an agent makes none");
    let globex = format!("{PREFIX}/customers/globex/");
    let probes = format!("{globex}probe/");
    for version in scene.bucket.versions() {
        let key = version.key;
        assert!(
            !key.starts_with(&globex) || key.starts_with(&probes),
            "{key}"
        );
    }
}

#[test]
fn large_objects_go_up_in_parts_with_the_agents_key_and_what_fails_is_not_aborted() {
    let bucket = server().bucket();
    bucket.apply_policy(&policy(&bucket));
    let proxy = Proxy::before(&server().endpoint);
    let mut settings = bucket.settings_of(&AGENT, PREFIX);
    settings.endpoint = Some(proxy.endpoint.clone());
    settings.may_delete = false;
    let store = S3::open(settings).unwrap();
    let name = ObjectName::new("customers/acme/packs/s/large").unwrap();
    let large = Random::new(1).noise(20 << 20);
    store.create(&name, &large).unwrap();
    assert!(store.read(&name, 20 << 20).unwrap() == large);
    let taken = store.create(&name, &large).unwrap_err();
    assert_eq!(taken.kind, StorageErrorKind::AlreadyExists);
    // Not even asked.
    let swept = store.sweep_leftovers("customers/acme").map(drop);
    for refused in [store.delete(&name), store.destroy(&name), swept] {
        assert_eq!(refused.unwrap_err().detail, "this host deletes nothing");
    }
    // The second part of another fails.
    let name = ObjectName::new("customers/acme/packs/s/other").unwrap();
    proxy.start_over([(3, Mishap::Status(403))]);
    let failed = store.create(&name, &large).unwrap_err();
    assert_eq!(failed.kind, StorageErrorKind::Denied, "{failed}");
    let methods: Vec<String> = proxy.passed().into_iter().map(|one| one.method).collect();
    assert_eq!(methods, ["HEAD", "POST", "PUT", "PUT"]);
    assert_eq!(bucket.uploads().len(), 1);
}

/// Ceph 16 asks for the right to the whole bucket, and denies the request; others deny the line.
#[test]
fn of_many_that_are_deleted_together_those_that_are_denied_stay_and_are_told_so() {
    let bucket = server().bucket();
    let mut less = serde_json::from_str::<Value>(&policy(&bucket)).unwrap();
    let statements = less["Statement"].as_array_mut().unwrap();
    statements.push(json!({
        "Effect": "Deny",
        "Principal": { "AWS": [KEEPER.principal()] },
        "Action": ["s3:DeleteObject", "s3:DeleteObjectVersion"],
        "Resource": format!("arn:aws:s3:::{}/{PREFIX}/customers/acme/packs/s/2", bucket.name),
    }));
    bucket.apply_policy(&less.to_string());
    let proxy = Proxy::before(&server().endpoint);
    let mut settings = bucket.settings_of(&KEEPER, PREFIX);
    settings.endpoint = Some(proxy.endpoint.clone());
    let keeper = S3::open(settings).unwrap();
    let names = (1..=4).map(|n| ObjectName::new(&format!("customers/acme/packs/s/{n}")).unwrap());
    let names: Vec<ObjectName> = names.collect();
    for name in &names {
        keeper.create(name, b"sealed").unwrap();
    }
    // An agent does not even ask, and would be denied.
    let mut settings = bucket.settings_of(&AGENT, PREFIX);
    let with_right = S3::open(settings.clone()).unwrap();
    settings.may_delete = false;
    let agent = S3::open(settings).unwrap();
    for (store, said) in [
        (&agent, "this host deletes nothing"),
        (&with_right, "AccessDenied"),
    ] {
        for told in store.delete_all(&names) {
            let denied = told.unwrap_err();
            assert_eq!(denied.kind, StorageErrorKind::Denied);
            assert!(denied.detail.contains(said), "{denied}");
        }
    }
    proxy.start_over([]);
    let told = keeper.delete_all(&names);
    for (number, told) in (1..).zip(told) {
        match number {
            2 => assert_eq!(told.unwrap_err().kind, StorageErrorKind::Denied),
            _ => assert_eq!(told, Ok(())),
        }
    }
    let singly = proxy.passed();
    let singly = singly.iter().filter(|one| one.method == "DELETE").count();
    let expected = match server().kind.asks_for_the_right_to_each() {
        true => 0,
        false => names.len(),
    };
    assert_eq!(singly, expected);
    assert_eq!(keeper.list("").unwrap().len(), 1);
}

/// As far as this server goes, which ignores the condition where it keeps versions.
#[test]
fn where_versions_are_kept_an_agent_puts_nothing_over_what_is_hidden_and_removes_nothing() {
    let bucket = server().bucket();
    bucket.apply_policy(&policy(&bucket));
    bucket.keep_versions(BucketVersioningStatus::Enabled);
    let mut settings = bucket.settings_of(&AGENT, PREFIX);
    settings.may_delete = false;
    let store = S3::open(settings).unwrap();
    let name = ObjectName::new("customers/acme/ledger/0000000000000001").unwrap();
    store.create(&name, b"the first").unwrap();
    let ignored = store.create(&name, b"another").unwrap_err();
    assert_eq!(ignored.kind, StorageErrorKind::Unsupported, "{ignored}");
    bucket.delete(&format!("{PREFIX}/{name}"));
    let before = bucket.versions();
    assert_eq!(before.len(), 3);
    let taken = store.create(&name, b"a third").unwrap_err();
    assert_eq!(taken.kind, StorageErrorKind::AlreadyExists);
    assert_eq!(bucket.versions(), before);
    // A name that is free after all.
    let free = ObjectName::new("customers/acme/ledger/0000000000000002").unwrap();
    store.create(&free, b"the second").unwrap();
}

/// Each right for itself: what remains of the policy without it.
fn without_one_right(policy: &str, sids: &[&str]) -> Vec<(String, String)> {
    let whole: Value = serde_json::from_str(policy).unwrap();
    let mut weaker = Vec::new();
    for (at, statement) in whole["Statement"].as_array().unwrap().iter().enumerate() {
        let sid = statement["Sid"].as_str().unwrap();
        if !sids.contains(&sid) {
            continue;
        }
        assert_eq!(statement["Effect"], "Allow");
        let list = ["Action", "Resource"]
            .into_iter()
            .find(|part| statement[part].is_array());
        let count = list.map_or(1, |list| statement[list].as_array().unwrap().len());
        for number in 0..count {
            let mut policy = whole.clone();
            let removed = match list {
                Some(list) => policy["Statement"][at][list]
                    .as_array_mut()
                    .unwrap()
                    .remove(number),
                None => policy["Statement"].as_array_mut().unwrap().remove(at)["Action"].take(),
            };
            weaker.push((format!("{sid} {removed}"), policy.to_string()));
        }
    }
    weaker
}

#[test]
fn no_right_in_the_policy_is_needless() {
    let mut scene = Scene::new();
    let whole = policy(&scene.bucket);
    scene.agent.vmkeep(&["run"], start()).exits(0);
    // What is for buckets that keep versions, in which this server orders nobody.
    let of_versions = |right: &str| right.contains("s3:DeleteObjectVersion");
    let agents = ["BothAskHowTheBucketIsSetUp", "BothRead", "AgentAdds"];
    let mut tried = 0;
    for (right, weaker) in without_one_right(&whole, &agents) {
        if right.contains("s3:ListBucketVersions") {
            continue;
        }
        scene.work();
        scene.bucket.apply_policy(&weaker);
        let ran = scene.agent.vmkeep(&["backup", "web01", "--full"], night(1));
        assert!(ran.code() == Some(1), "without {right}\n{ran}");
        tried += 1;
    }
    assert_eq!(tried, 6 + 1 + 5);
    let keepers = [
        "KeeperAddsAndDeletes",
        "KeeperSeesUnfinishedUploads",
        "BothAskHowTheBucketIsSetUp",
    ];
    let upload = format!("{PREFIX}/customers/acme/packs/left/behind");
    for (right, weaker) in without_one_right(&whole, &keepers) {
        // `init` and `run` ask how the bucket is set up.
        let is_asked = right.starts_with("Both")
            && !right.contains("s3:ListBucket")
            && !right.contains("Versioning");
        if of_versions(&right) || is_asked {
            continue;
        }
        scene.bucket.apply_policy(&whole);
        let agent = scene.bucket.visited_by(&AGENT);
        agent.leaves_an_upload(&upload);
        scene.bucket.apply_policy(&weaker);
        let ran = scene.keeper.vmkeep(&["prune"], night(1));
        assert!(ran.code() == Some(1), "without {right}\n{ran}");
        tried += 1;
    }
    assert_eq!(tried, 12 + 4 + 3);
    scene.bucket.apply_policy(&whole);
    scene
        .agent
        .vmkeep(&["backup", "web01", "--full"], night(1))
        .exits(0);
    scene.keeper_prunes(night(1));
    scene.newest_restores(&scene.agent, night(1));
}
