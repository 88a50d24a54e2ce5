//! `kill -9` of the program at every request of a backup, of a prune, and of what cleans up after a dead backup,
//! before the server does it and after.
//!
//! Here some of these moments, evenly; `VMKEEP_CRASHES=60` tries so many of each step, and `VMKEEP_CRASHES=all`
//! all of them, as `scripts/servers` has it.

use vmkeep_test_support as support;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use support::s3::{Bucket, Passed, Proxy, Replay, Standstill, server};
use support::{Guest, Host, HostOptions, Picture, Random, time};

/// Tried of each step here.
const CRASHES: usize = 8;
const NIGHTS: usize = 10;

/// A repository some nights old, as it is before each crash: one host with what it remembers, and what is in
/// its bucket.
struct Scene {
    bucket: Bucket,
    proxy: Proxy,
    host: Host,
    guest: Guest,
    random: Random,
    at: Timestamp,
    /// When each point was taken, and what the disk held, by its id.
    pictures: BTreeMap<String, (String, Picture)>,
    replay: Replay,
}

fn config(bucket: &Bucket, proxy: &Proxy, prefix: &str) -> String {
    let config = bucket.config(prefix);
    config.replace(&bucket.server.endpoint, &proxy.endpoint)
}

impl Scene {
    /// Ten nights, of which the first are over: the next prune rewrites and deletes packs.
    fn new() -> Self {
        let bucket = server().bucket();
        let proxy = Proxy::before(&server().endpoint);
        let mut random = Random::new(0xc4a5_4e50);
        let host = Host::new(&HostOptions {
            policy: "timezone = \"UTC\"\nwindow = \"22:00-06:00\"\nmax_retention = \"7 days\"",
            bucket: Some(config(&bucket, &proxy, Replay::FIRST_PREFIX)),
            ..HostOptions::default()
        });
        let guest = Guest::new(host.image("web01", "vda"), 2 << 20, &mut random);
        let at = time("2025-03-03T23:00:00Z");
        let mut scene = Scene {
            bucket,
            proxy,
            host,
            guest,
            random,
            at,
            pictures: BTreeMap::new(),
            replay: Replay::default(),
        };
        scene.host.vmkeep(&["init", "--yes"], at).exits(0);
        for night in 0..NIGHTS {
            scene.guest.work(6, &mut scene.random);
            scene.host.vmkeep(&["backup", "web01"], scene.at).exits(0);
            scene.list();
            if night + 1 < NIGHTS {
                scene.host.vmkeep(&["prune"], scene.at).exits(0);
            }
            scene.at += SignedDuration::from_hours(24);
        }
        // What the step backs up.
        scene.guest.work(6, &mut scene.random);
        scene
    }

    /// Every listed point; those that are new hold what the disk holds now.
    fn list(&mut self) -> BTreeSet<String> {
        let listed = self.host.points(self.at);
        let text = |value: &Value| value.as_str().unwrap().to_string();
        for row in &listed {
            let known = || (text(&row["taken_at"]), self.guest.picture());
            self.pictures.entry(text(&row["id"])).or_insert_with(known);
        }
        listed.iter().map(|row| text(&row["id"])).collect()
    }

    /// From here on, every copy is what there is now.
    fn keep(&mut self) {
        self.replay.keep(&self.bucket, &[&self.host]);
    }

    fn rewind(&mut self) {
        self.replay.rewind(&self.bucket, &[&self.host]);
    }

    /// What a step asks and sends undisturbed.
    fn requests_of(&mut self, step: &[&str]) -> Vec<Passed> {
        self.rewind();
        self.proxy.start_over([]);
        self.host.vmkeep(step, self.at).exits(0);
        self.proxy.passed()
    }

    /// Kills a step there; whether it did not end before.
    fn is_killed_at(&self, standstill: Standstill, step: &[&str]) -> bool {
        self.proxy.start_over_until(standstill);
        let mut running = self.host.start(step, self.at);
        while running.is_running() && !self.proxy.stands_still() {}
        let ran = running.kill();
        self.proxy.start_over([]);
        if !ran.was_killed() {
            ran.exits(0);
        }
        ran.was_killed()
    }

    #[track_caller]
    fn restore(&self, id: &str, what: &str) {
        let (taken_at, picture) = &self.pictures[id];
        let target = self.host.restore("web01", taken_at, self.at);
        let restored = Picture::of_file(&target.path().join("vda.raw"));
        assert!(restored == *picture, "{what}: {id} differs");
    }

    /// Whatever happened: what was acknowledged restores, the next run and prune succeed, and then everything in
    /// the bucket is explained.
    fn recovers(&mut self, acknowledged: &BTreeSet<String>, what: &str) {
        let before = self.at;
        let listed = self.list();
        let lost: Vec<&String> = acknowledged.difference(&listed).collect();
        assert!(lost.is_empty(), "{what}: {lost:?} are not listed");
        // One in turn, and the newest; all are read below.
        let in_turn = listed
            .iter()
            .nth(self.replay.copies() % listed.len())
            .unwrap();
        let newest = listed.iter().max_by_key(|id| &self.pictures[*id].0);
        self.restore(in_turn, what);
        self.restore(newest.unwrap(), what);
        self.host.vmkeep(&["backup", "web01"], self.at).exits(0);
        self.host.vmkeep(&["prune"], self.at).exits(0);
        self.at += SignedDuration::from_hours(1);
        let pruned = &self.host.json(&["prune"], self.at)["customers"][0];
        let none = serde_json::json!([]);
        assert_eq!(pruned["unexplained"], none, "{what}: {pruned}");
        let arguments = ["verify", "--read-data"];
        self.host.vmkeep(&arguments, self.at).exits(0);
        self.host.vmkeep(&["ledger", "verify"], self.at).exits(0);
        assert_eq!(self.bucket.uploads(), [] as [String; 0], "{what}");
        self.at = before;
    }

    fn crash_everywhere(&mut self, step: &[&str]) {
        let before = self.list();
        let requests = self.requests_of(step);
        let after = self.list();
        let acknowledged: BTreeSet<String> = before.intersection(&after).cloned().collect();
        // Before the first change a crash leaves nothing.
        let changes = |passed: &Passed| !matches!(passed.method.as_str(), "GET" | "HEAD");
        let first = requests.iter().position(changes).expect("a change");
        let all: Vec<Standstill> = (first..requests.len())
            .flat_map(|at| [false, true].map(|applied| Standstill { at, applied }))
            .collect();
        let wanted = match std::env::var("VMKEEP_CRASHES").as_deref() {
            Ok("all") => all.len(),
            Ok(number) => number.parse().expect("VMKEEP_CRASHES=NUMBER or all"),
            Err(_) => CRASHES,
        };
        // Odd, so that it is before the server acts and after it in turn.
        let stride = (all.len() / wanted) | 1;
        let mut killed = 0;
        let mut tried = 0;
        for standstill in all.iter().step_by(stride) {
            tried += 1;
            self.rewind();
            let is_killed = self.is_killed_at(*standstill, step);
            println!("{step:?}, {standstill:?}, killed {is_killed}");
            killed += usize::from(is_killed);
            self.recovers(&acknowledged, &format!("{step:?}, {standstill:?}"));
        }
        println!(
            "{step:?}: requests {first} to {}, each before and after: {tried} of {} tried, {killed} killed",
            requests.len() - 1,
            all.len()
        );
        // How many requests there are can differ by a few, so the last may not come.
        assert!(killed * 10 >= tried * 9, "{killed} kills");
    }
}

#[test]
fn a_backup_killed_at_any_request_leaves_what_the_next_run_cleans() {
    let mut scene = Scene::new();
    scene.keep();
    scene.crash_everywhere(&["backup", "web01"]);
}

#[test]
fn a_prune_killed_at_any_request_is_gone_on_with_by_the_next() {
    let mut scene = Scene::new();
    scene.keep();
    let requests = scene.requests_of(&["prune"]);
    let has = |method: &str, place: &str| {
        let mut requests = requests.iter();
        requests.any(|passed| passed.method == method && passed.target.contains(place))
    };
    let removes_many = requests.iter().any(Passed::deletes_many);
    assert!(has("PUT", "/packs/"), "it rewrites");
    assert!(removes_many || has("DELETE", "/packs/"), "and reclaims");
    assert!(has("PUT", "/certificates/"), "and says so");
    scene.crash_everywhere(&["prune"]);
}

#[test]
fn what_cleans_up_after_a_dead_backup_can_be_killed_at_any_request_as_well() {
    let mut scene = Scene::new();
    scene.host.vmkeep(&["prune"], scene.at).exits(0);
    scene.keep();
    // Dead just before its commit.
    let requests = scene.requests_of(&["backup", "web01"]);
    let is_entry = |passed: &Passed| passed.method == "PUT" && passed.target.contains("/ledger/");
    let at = requests.iter().rposition(is_entry).expect("a commit");
    scene.rewind();
    let standstill = Standstill { at, applied: false };
    assert!(scene.is_killed_at(standstill, &["backup", "web01"]));
    scene.keep();
    scene.crash_everywhere(&["prune"]);
}
