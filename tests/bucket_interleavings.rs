//! Two hosts at one bucket, each a process of its own: one stands still at a request, the other does all it has to
//! do, and the first goes on. These are the interleavings that have cost others their backups.
//!
//! Here some of the requests, evenly, before the server acts and after it in turn; `VMKEEP_HOLDS=40` tries so many of
//! each, as `scripts/servers` has it, and `VMKEEP_HOLDS=all` all of them. Where one host alone may write, the other
//! process is of the same host, and they take turns.

use vmkeep_test_support as support;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use support::s3::{Bucket, Passed, Proxy, Replay, Standstill, server};
use support::{Customer, Guest, Host, HostOptions, Picture, Ran, Random, time};
use vmkeep::model::Writers;

/// Tried of each interleaving here.
const HOLDS: usize = 4;
const NIGHTS: i64 = 10;
const DAY: SignedDuration = SignedDuration::from_hours(24);

/// Two VMs of one customer, one on each host, some nights old.
struct Stage {
    bucket: Bucket,
    /// Before the first host only.
    proxy: Proxy,
    first: Host,
    /// None where the first is the only one that may write.
    second: Option<Host>,
    guests: [Guest; 2],
    random: Random,
    at: Timestamp,
    /// The VM, when each point was taken, and what the disk held, by its id.
    pictures: BTreeMap<String, (String, String, Picture)>,
    replay: Replay,
}

/// A command at a time.
#[derive(Clone, Copy)]
struct Step<'a> {
    words: &'a [&'a str],
    at: Timestamp,
    /// How it may end.
    codes: &'a [i32],
}

fn text(value: &Value) -> String {
    value.as_str().expect("a string").to_string()
}

fn vms() -> Vec<Customer> {
    vec![Customer {
        name: "acme",
        own: "",
        vms: vec![("web01", vec!["vda"]), ("db01", vec!["vda"])],
    }]
}

impl Stage {
    fn new() -> Self {
        let bucket = server().bucket();
        let proxy = Proxy::before(&server().endpoint);
        let mut random = Random::new(0x1e4f_0001);
        let config = bucket.config(Replay::FIRST_PREFIX);
        let host = |name, config| {
            Host::new(&HostOptions {
                name,
                policy: "timezone = \"UTC\"\nwindow = \"22:00-06:00\"\nmax_retention = \"7 days\"",
                customers: vms(),
                bucket: Some(config),
                ..HostOptions::default()
            })
        };
        let held = config.replace(&bucket.server.endpoint, &proxy.endpoint);
        let first = host("host1", held);
        let second = (server().kind.writers() == Writers::Many).then(|| host("host2", config));
        let guests = ["web01", "db01"].map(|vm| {
            let host = match vm {
                "db01" => second.as_ref().unwrap_or(&first),
                _ => &first,
            };
            Guest::new(host.image(vm, "vda"), 2 << 20, &mut random)
        });
        let mut stage = Stage {
            bucket,
            proxy,
            first,
            second,
            guests,
            random,
            at: time("2025-03-03T23:00:00Z"),
            pictures: BTreeMap::new(),
            replay: Replay::default(),
        };
        stage.first.vmkeep(&["init", "--yes"], stage.at).exits(0);
        if let Some(second) = &stage.second {
            let words = second.admission(stage.at);
            let roles = ["backup", "restore", "prune"].map(|role| ["--role", role]);
            let words = words.iter().map(String::as_str);
            let words: Vec<&str> = words.chain(roles.into_iter().flatten()).collect();
            stage.first.vmkeep(&words, stage.at).exits(0);
            second.vmkeep(&["init", "--yes"], stage.at).exits(0);
        }
        for night in 0..NIGHTS {
            stage.work();
            stage.first.vmkeep(&["backup", "web01"], stage.at).exits(0);
            stage.other().vmkeep(&["backup", "db01"], stage.at).exits(0);
            stage.list(stage.at);
            if night + 2 < NIGHTS {
                stage.other().vmkeep(&["prune"], stage.at).exits(0);
            }
            stage.at += DAY;
        }
        stage.work();
        stage
    }

    fn other(&self) -> &Host {
        self.second.as_ref().unwrap_or(&self.first)
    }

    /// Each guest writes something of its own, and both the same.
    fn work(&mut self) {
        let same = self.random.noise(3 << 16);
        for guest in &mut self.guests {
            guest.work(5, &mut self.random);
            guest.write(1 << 20, &same);
        }
    }

    /// Every listed point, and when it expires; those that are new hold what their disk holds now.
    fn list(&mut self, at: Timestamp) -> BTreeMap<String, Timestamp> {
        let listed = self.first.points(at);
        for row in &listed {
            let vm = text(&row["vm"]);
            let guest = &self.guests[usize::from(vm == "db01")];
            self.pictures
                .entry(text(&row["id"]))
                .or_insert_with(|| (vm, text(&row["taken_at"]), guest.picture()));
        }
        let expiry = |row: &Value| text(&row["expires_at"]).parse().expect("a time");
        listed
            .iter()
            .map(|row| (text(&row["id"]), expiry(row)))
            .collect()
    }

    fn hosts(&self) -> Vec<&Host> {
        [Some(&self.first), self.second.as_ref()]
            .into_iter()
            .flatten()
            .collect()
    }

    fn keep(&mut self) {
        let hosts = [Some(&self.first), self.second.as_ref()];
        let hosts: Vec<&Host> = hosts.into_iter().flatten().collect();
        self.replay.keep(&self.bucket, &hosts);
    }

    fn rewind(&mut self) {
        let hosts = [Some(&self.first), self.second.as_ref()];
        let hosts: Vec<&Host> = hosts.into_iter().flatten().collect();
        self.replay.rewind(&self.bucket, &hosts);
    }

    #[track_caller]
    fn restores(&self, id: &str, at: Timestamp, what: &str) {
        let (vm, taken_at, picture) = &self.pictures[id];
        let target = self.other().restore(vm, taken_at, at);
        let restored = Picture::of_file(&target.path().join("vda.raw"));
        assert!(restored == *picture, "{what}: {vm} of {taken_at} differs");
    }

    /// A step of the first host undisturbed, and what it asks and sends; then the other's.
    fn undisturbed(&mut self, held: Step, others: &[Step]) -> (Ran, Vec<Passed>) {
        self.rewind();
        self.proxy.start_over([]);
        let ran = self.first.vmkeep(held.words, held.at);
        ran.exits(0);
        let passed = self.proxy.passed();
        for step in others {
            let ran = self.other().vmkeep(step.words, step.at);
            ran.exits_with_one_of(step.codes);
        }
        (ran, passed)
    }

    /// The first host stands still there while the other does its steps, then goes on; how it ended, and whether it
    /// had not before.
    fn hold(&mut self, standstill: Standstill, held: Step, others: &[Step]) -> (Ran, bool) {
        self.proxy.start_over_until(standstill);
        let mut running = self.first.start(held.words, held.at);
        while running.is_running() && !self.proxy.stands_still() {}
        let is_held = self.proxy.stands_still();
        for step in others {
            let other = self.other().start(step.words, step.at);
            if self.second.is_none() {
                // It waits for its turn.
                self.proxy.go_on();
            }
            other.ended().exits_with_one_of(step.codes);
        }
        self.proxy.go_on();
        let ran = running.ended();
        ran.exits_with_one_of(held.codes);
        if ran.code() != Some(0) {
            ran.one_error();
        }
        self.proxy.start_over([]);
        (ran, is_held)
    }

    /// What was acknowledged and has not expired restores, the next nights succeed, and everything is explained.
    fn is_whole(&mut self, acknowledged: &BTreeSet<String>, at: Timestamp, what: &str) {
        let listed = self.list(at);
        let lost: Vec<&String> = acknowledged
            .iter()
            .filter(|id| !listed.contains_key(*id))
            .collect();
        assert!(lost.is_empty(), "{what}: {lost:?} are not listed");
        let of = |vm: &str| {
            let mut ids: Vec<&String> = listed.keys().collect();
            ids.retain(|id| self.pictures[*id].0 == vm);
            ids.sort_by_key(|id| &self.pictures[*id].1);
            let in_turn = ids.get(self.replay.copies() % ids.len().max(1));
            [ids.last(), in_turn].map(|id| id.map(|id| id.to_string()))
        };
        for id in ["web01", "db01"].iter().flat_map(|vm| of(vm)).flatten() {
            self.restores(&id, at, what);
        }
        let later = at + SignedDuration::from_hours(1);
        self.first.vmkeep(&["backup", "web01"], later).exits(0);
        self.other().vmkeep(&["backup", "db01"], later).exits(0);
        self.other().vmkeep(&["prune"], later).exits(0);
        let later = later + SignedDuration::from_hours(1);
        let pruned = &self.first.json(&["prune"], later)["customers"][0];
        let none = serde_json::json!([]);
        assert_eq!(pruned["unexplained"], none, "{what}: {pruned}");
        for host in self.hosts() {
            host.vmkeep(&["verify", "--read-data"], later).exits(0);
        }
        self.first.vmkeep(&["ledger", "verify"], later).exits(0);
        assert_eq!(self.bucket.uploads(), [] as [String; 0], "{what}");
    }

    /// Holds a step at its requests in turn while the others happen; `after` looks at how it ended.
    fn hold_everywhere(&mut self, held: Step, others: &[Step], after: impl Fn(&Stage, &Ran, &str)) {
        self.keep();
        let before: BTreeSet<String> = self.list(held.at).into_keys().collect();
        let (ran, requests) = self.undisturbed(held, others);
        after(self, &ran, "undisturbed");
        let left: BTreeSet<String> = self.list(held.at).into_keys().collect();
        let acknowledged: BTreeSet<String> = before.intersection(&left).cloned().collect();
        let all: Vec<Standstill> = (0..requests.len())
            .flat_map(|at| [false, true].map(|applied| Standstill { at, applied }))
            .collect();
        let wanted = match std::env::var("VMKEEP_HOLDS").as_deref() {
            Ok("all") => all.len(),
            Ok(number) => number.parse().expect("VMKEEP_HOLDS=NUMBER or all"),
            Err(_) => HOLDS,
        };
        let stride = (all.len() / wanted) | 1;
        let last = others.iter().map(|step| step.at).max();
        let at = last.map_or(held.at, |last| last.max(held.at));
        let mut codes = BTreeMap::new();
        let (mut tried, mut held_at) = (0, 0);
        for standstill in all.iter().step_by(stride) {
            let what = format!("{:?}, {standstill:?}", held.words);
            self.rewind();
            let (ran, is_held) = self.hold(*standstill, held, others);
            tried += 1;
            held_at += usize::from(is_held);
            println!("{what}: {:?}", ran.code());
            *codes.entry(ran.code()).or_insert(0) += 1;
            after(self, &ran, &what);
            self.is_whole(&acknowledged, at, &what);
        }
        println!(
            "{:?} at its {} requests, each before and after: {} of {} tried; exits {codes:?}",
            held.words,
            requests.len(),
            tried,
            all.len()
        );
        // How many requests there are can differ by a few, so the last may not come.
        assert!(held_at + 1 >= tried, "{held_at} of {tried} held");
    }
}

fn step<'a>(words: &'a [&'a str], at: Timestamp, codes: &'a [i32]) -> Step<'a> {
    Step { words, at, codes }
}

fn nothing(_: &Stage, _: &Ran, _: &str) {}

#[test]
fn a_backup_at_any_moment_of_a_prune_is_a_point_that_restores() {
    let mut stage = Stage::new();
    let at = stage.at;
    let held = step(&["prune"], at, &[0]);
    let others = [step(&["backup", "db01"], at, &[0])];
    stage.hold_everywhere(held, &others, nothing);
}

#[test]
fn a_writer_that_stood_still_while_others_pruned_commits_what_restores() {
    let mut stage = Stage::new();
    let at = stage.at;
    let held = step(&["backup", "web01"], at, &[0]);
    let others = [step(&["prune"], at, &[0])];
    stage.hold_everywhere(held, &others, nothing);
}

#[test]
fn a_writer_whose_base_was_erased_meanwhile_does_not_build_on_it() {
    let mut stage = Stage::new();
    let at = stage.at;
    // A week later everything of today is expired; two days after that its bytes are gone.
    let words = ["prune", "--confirm", "--trust-clock"];
    let held = step(&["backup", "web01"], at, &[0, 1, 11]);
    let others = [
        step(&words, at + DAY * 8, &[0, 4]),
        step(&words, at + DAY * 10, &[0, 4]),
    ];
    if stage.second.is_some() {
        let before: BTreeSet<String> = stage.list(at).into_keys().collect();
        stage.hold_everywhere(held, &others, |stage, _, what| {
            for row in stage.first.points(at) {
                assert!(!before.contains(&text(&row["id"])), "{what}: {row}");
                assert_eq!(row["kind"], "full", "{what}: {row}");
            }
        });
    }
}

#[test]
fn a_restore_at_any_moment_of_a_prune_writes_the_right_bytes() {
    let mut stage = Stage::new();
    let at = stage.at;
    let mut newest: Vec<_> = stage.pictures.values().cloned().collect();
    newest.retain(|(vm, _, _)| vm == "web01");
    newest.sort_by(|one, other| one.1.cmp(&other.1));
    let (_, taken_at, picture) = newest.pop().expect("a point");
    let target = stage.first.path("restored");
    let to = target.to_str().unwrap().to_string();
    let words = ["restore", "web01", "--at", &taken_at, "--to", &to];
    let held = step(&words, at, &[0]);
    let others = [step(&["prune"], at, &[0])];
    stage.hold_everywhere(held, &others, |_, _, what| {
        let restored = Picture::of_file(&target.join("vda.raw"));
        assert!(restored == picture, "{what}: other bytes");
        fs::remove_dir_all(&target).unwrap();
    });
}

#[test]
fn two_prunes_at_once_with_two_copies_of_a_chunk_never_drop_both() {
    let mut stage = Stage::new();
    let at = stage.at;
    // Both upload what is new before either commits.
    stage.keep();
    let backup = step(&["backup", "web01"], at, &[0]);
    let others = [step(&["backup", "db01"], at, &[0])];
    let (_, requests) = stage.undisturbed(backup, &others);
    let commit = commit_of(&requests);
    stage.rewind();
    assert!(stage.hold(commit, backup, &others).1);
    stage.list(at);
    stage.at += DAY;
    stage.work();
    let held = step(&["prune"], stage.at, &[0]);
    let others = [step(&["prune"], stage.at, &[0])];
    stage.hold_everywhere(held, &others, nothing);
}

fn commit_of(requests: &[Passed]) -> Standstill {
    let is_entry = |passed: &Passed| passed.method == "PUT" && passed.target.contains("/ledger/");
    let at = requests.iter().rposition(is_entry).expect("a commit");
    Standstill { at, applied: false }
}

#[test]
fn nobody_relies_on_the_packs_of_a_writer_that_died_before_its_commit() {
    let mut stage = Stage::new();
    let at = stage.at;
    stage.keep();
    let (_, requests) = stage.undisturbed(step(&["backup", "web01"], at, &[0]), &[]);
    stage.rewind();
    stage.proxy.start_over_until(commit_of(&requests));
    let mut running = stage.first.start(&["backup", "web01"], at);
    while running.is_running() && !stage.proxy.stands_still() {}
    // All its packs stand, and what the other writes is in them.
    if stage.second.is_some() {
        stage.other().vmkeep(&["backup", "db01"], at).exits(0);
    }
    assert!(running.kill().was_killed());
    stage.proxy.start_over([]);
    stage.first.vmkeep(&["prune"], at).exits(0);
    let acknowledged = stage.list(at).into_keys().collect();
    stage.is_whole(&acknowledged, at, "a dead writer");
}

#[test]
fn a_clock_ten_years_ahead_on_one_host_deletes_nothing_while_another_works() {
    let mut stage = Stage::new();
    let at = stage.at;
    let held = step(&["backup", "web01"], at, &[0]);
    let others = [step(&["prune"], at + DAY * 3653, &[5])];
    stage.keep();
    let before = stage.list(at);
    let commit = {
        let (_, requests) = stage.undisturbed(held, &[]);
        commit_of(&requests)
    };
    stage.rewind();
    assert!(stage.hold(commit, held, &others).1);
    let acknowledged = before.into_keys().collect();
    stage.is_whole(&acknowledged, at, "a clock ahead");
}
