//! A year of nights on one host, with what goes wrong in a year, and everybody who is told of it: the messages, the
//! table, the metrics and the ledger are what a careful administrator expects, who has written it down before.

use vmkeep_test_support as support;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, ToSpan};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use support::{Guest, Host, HttpSink, MailSink, Picture, Random, path_text, tool};
use tempfile::TempDir;

const NIGHTS: i64 = 365;
const REMIND_EVERY: SignedDuration = SignedDuration::from_hours(72);

/// From this evening on the host is off, and on again in the third morning after.
const OFF: i64 = 20;
/// The store is full; room is made in the morning.
const FULL: i64 = 60;
/// Europe/Amsterdam has no 02:30 in the first of these nights, and two in the second.
const SPRING: i64 = 82;
const AUTUMN: i64 = 292;
/// From this night on, seven nights long, the disk of db01 is not there.
const AWAY: i64 = 100;
/// globex wants nothing kept over 20 days.
const SHORTER: i64 = 150;
/// old01 is taken out of the configuration.
const REMOVED: i64 = 200;

/// When a run starts. Every night has one, and some mornings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    Night(i64),
    Morning(i64),
}
use Moment::{Morning, Night};

/// An alarm, when it is first told, and when its end is.
struct Expected {
    name: &'static str,
    from: Moment,
    /// Until then there is more of it each night, which is told.
    grows_to: Moment,
    to: Moment,
}

const fn alarm(name: &'static str, from: Moment, to: Moment) -> Expected {
    let grows_to = from;
    Expected {
        name,
        from,
        grows_to,
        to,
    }
}

const fn growing(name: &'static str, from: Moment, grows_to: Moment, to: Moment) -> Expected {
    Expected {
        name,
        from,
        grows_to,
        to,
    }
}

/// What the administrator expects to be told in this year; between the two of each, every 72 hours.
const EXPECTED: &[Expected] = &[
    // Three evenings without the host. The last of them is caught up in the morning; the other two are holes until
    // they are more than fourteen nights ago.
    alarm("hole acme/web01", Morning(OFF + 3), Night(OFF + 16)),
    alarm("hole acme/db01", Morning(OFF + 3), Night(OFF + 16)),
    alarm("hole acme/old01", Morning(OFF + 3), Night(OFF + 16)),
    alarm("hole globex/shop", Morning(OFF + 3), Night(OFF + 16)),
    // After more than two days nobody but the host itself says what time it is: nothing is deleted until somebody has
    // looked at its clock, which the administrator does that morning.
    alarm("clock-not-trusted acme", Morning(OFF + 3), Night(OFF + 3)),
    alarm("clock-not-trusted globex", Morning(OFF + 3), Night(OFF + 3)),
    // A full store: that night fails, and is caught up in the morning, so that there is no hole. Only who comes after
    // a prune, which makes room with the help of the reserve, gets through (see `got_through`).
    alarm("almost-full", Night(FULL), Morning(FULL + 1)),
    alarm("backup-failed acme/web01", Night(FULL), Morning(FULL + 1)),
    alarm("backup-failed acme/db01", Night(FULL), Morning(FULL + 1)),
    alarm("backup-failed acme/old01", Night(FULL), Morning(FULL + 1)),
    alarm("backup-failed globex/shop", Night(FULL), Morning(FULL + 1)),
    // A disk that is not there: at once; then, a night later, the VM has had no point for two days, and a hole, which
    // is one night larger each night.
    alarm("backup-failed acme/db01", Night(AWAY), Night(AWAY + 7)),
    alarm("stale acme/db01", Night(AWAY + 1), Night(AWAY + 7)),
    growing(
        "hole acme/db01",
        Night(AWAY + 1),
        Night(AWAY + 7),
        Night(AWAY + 21),
    ),
    // A shorter maximum would expire several nights at once: it waits for somebody to say that this is meant.
    alarm("policy-waits globex", Night(SHORTER), Night(SHORTER + 1)),
    // What is left of a VM that is gone: of its last week the full stays, which is its last point, of the night before.
    // It expires two months less 22 days after it was taken, in the evening of 2 September. That is told 14 days
    // before, and no more once it has expired.
    alarm(
        "last-point acme/old01",
        Night(REMOVED + 25),
        Night(REMOVED + 39),
    ),
];

struct Year {
    host: Host,
    store: TempDir,
    guests: BTreeMap<&'static str, Guest>,
    random: Random,
    zone: TimeZone,
    webhook: HttpSink,
    ping: HttpSink,
    mail: MailSink,
    /// All runs, with how they ended.
    runs: Vec<(Moment, Timestamp, i32)>,
    /// Names of alarms that are not to be heard, of VMs that had a point in the night of the full store: a customer is
    /// pruned when the last of its own VMs is done, perhaps before another customer's begins.
    got_through: Vec<String>,
    heard: Vec<(Moment, String, String)>,
    listened: usize,
}

impl Drop for Year {
    fn drop(&mut self) {
        // Lazily: a failed test may still hold files open.
        tool("umount", &["-l", path_text(self.store.path())]);
    }
}

impl Year {
    fn new() -> Self {
        let store = tempfile::tempdir().unwrap();
        let path = path_text(store.path());
        tool(
            "mount",
            &["-t", "tmpfs", "-o", "size=96m", "vmkeep-test", path],
        );
        let mut random = Random::new(0x0365_0001);
        let host = Host::new(&support::HostOptions::default());
        let mut guests = BTreeMap::new();
        for vm in ["web01", "db01", "old01", "shop"] {
            let guest = Guest::new(host.image(vm, "vda"), 1 << 20, &mut random);
            guests.insert(vm, guest);
        }
        Year {
            store,
            guests,
            random,
            zone: TimeZone::get("Europe/Amsterdam").unwrap(),
            webhook: HttpSink::start(),
            ping: HttpSink::start(),
            mail: MailSink::start(),
            runs: Vec::new(),
            got_through: Vec::new(),
            heard: Vec::new(),
            listened: 0,
            host,
        }
    }

    fn configure(&self, acme: &[&str], globex: &str) {
        let folder = path_text(self.store.path()).to_string();
        let state = self.host.state();
        let mut text = format!(
            "[host]\nname = \"host1\"\nclock = \"trusted\"\nstate_dir = \"{}\"\n\n\
             [repository]\nurl = \"{folder}/store\"\nreserve = \"1 MiB\"\n\
             escrow = [\"age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p\"]\n\n\
             [policy]\ntimezone = \"Europe/Amsterdam\"\nwindow = \"22:00-06:00\"\n\n\
             [run]\nvms_at_once = 2\nmetrics_file = \"{}\"\n\n\
             [notify]\nreport = \"never\"\nremind_every = \"72h\"\njournald = false\n\
             [[notify.webhook]]\nurl = \"{}/hook\"\n\
             [[notify.mail]]\nserver = \"127.0.0.1\"\nport = {}\ntls = \"none\"\n\
             from = \"vmkeep@example.com\"\nto = [\"admin@example.com\"]\n\
             [[notify.ping]]\nurl = \"{}/ping\"\n",
            path_text(&state),
            path_text(&self.metrics_file()),
            self.webhook.url,
            self.mail.port,
            self.ping.url,
        );
        let disk = |vm: &str| path_text(&self.host.image(vm, "vda")).to_string();
        text.push_str("\n[[customer]]\nid = \"acme\"\n");
        for vm in acme {
            let disk = disk(vm);
            text.push_str(&format!(
                "[[customer.vm]]\nname = \"{vm}\"\ndisks = {{ vda = \"{disk}\" }}\n"
            ));
        }
        let disk = disk("shop");
        text.push_str(&format!(
            "\n[[customer]]\nid = \"globex\"\n{globex}\n\
             [[customer.vm]]\nname = \"shop\"\ndisks = {{ vda = \"{disk}\" }}\n"
        ));
        self.host.write_config(&text);
    }

    fn metrics_file(&self) -> std::path::PathBuf {
        self.host.path("vmkeep.prom")
    }

    fn time(&self, moment: Moment) -> Timestamp {
        let first: Date = "2031-01-06".parse().unwrap();
        let local = match moment {
            Night(SPRING) => first + (SPRING + 1).days(),
            Night(AUTUMN) => first + (AUTUMN + 1).days(),
            Night(night) => first + night.days(),
            Morning(day) => first + day.days(),
        };
        let (hour, minute) = match moment {
            // Right after the clock went from 02:00 to 03:00.
            Night(SPRING) => (3, 10),
            Night(AUTUMN) => (2, 30),
            Night(_) => (22, 30),
            Morning(_) => (9, 0),
        };
        let local = local
            .at(hour, minute, 0, 0)
            .to_zoned(self.zone.clone())
            .unwrap();
        let of = local.timestamp();
        match moment {
            // The second 02:30 of that night.
            Night(AUTUMN) => of + SignedDuration::from_hours(1),
            _ => of,
        }
    }

    /// One run, and what everybody hears of it.
    fn run(&mut self, moment: Moment, code: i32) {
        let is_away = (Night(AWAY)..Night(AWAY + 7)).contains(&moment);
        for (vm, guest) in &mut self.guests {
            if !(is_away && *vm == "db01") {
                guest.work(2, &mut self.random);
            }
        }
        let at = self.time(moment);
        self.host.vmkeep(&["run"], at).exits(code);
        self.runs.push((moment, at, code));
        let requests = self.webhook.received();
        for request in requests.get(self.listened..).unwrap_or_default() {
            for message in request.document()["messages"].as_array().unwrap() {
                let text = |key: &str| message[key].as_str().unwrap_or_default().to_string();
                self.heard.push((moment, text("event"), text("key")));
            }
        }
        self.listened = requests.len();
    }

    /// What is to be heard in this year, from the table above.
    fn expected(&self) -> Vec<(Moment, String, String)> {
        let mut expected = Vec::new();
        for alarm in EXPECTED {
            if alarm.from == Night(FULL) && self.got_through.iter().any(|name| name == alarm.name) {
                continue;
            }
            let mut told_at = None;
            for (moment, at, _) in &self.runs {
                let event = if (alarm.from..=alarm.grows_to).contains(moment) {
                    "raised"
                } else if *moment == alarm.to {
                    "cleared"
                } else {
                    let due = told_at.is_some_and(|told| at.duration_since(told) >= REMIND_EVERY);
                    if !due {
                        continue;
                    }
                    "reminder"
                };
                told_at = (event != "cleared").then_some(*at);
                expected.push((*moment, event.to_string(), alarm.name.to_string()));
            }
        }
        expected
    }

    fn metric(&self, name: &str) -> Option<f64> {
        let text = fs::read_to_string(self.metrics_file()).unwrap();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(&format!("{name} ")));
        line.map(|value| value.parse().expect("a number"))
    }

    fn status(&self, at: Timestamp) -> (Option<i32>, Value) {
        let ran = self.host.vmkeep(&["--json", "status"], at);
        (ran.code(), ran.document())
    }
}

fn hours(count: i64) -> SignedDuration {
    SignedDuration::from_hours(count)
}

#[test]
fn a_year_of_nights_is_told_as_a_careful_administrator_expects() {
    let mut year = Year::new();
    let acme = ["web01", "db01", "old01"];
    year.configure(&acme, "");
    let start = year.time(Night(0)) - hours(1);
    year.host.vmkeep(&["init", "--yes"], start).exits(0);
    for night in 0..NIGHTS {
        match night {
            OFF => {}
            night if night == OFF + 1 || night == OFF + 2 => {}
            FULL => {
                let filler = year.store.path().join("filler");
                // Whatever room there is.
                let filled = std::process::Command::new("dd")
                    .args([
                        "if=/dev/zero",
                        &format!("of={}", path_text(&filler)),
                        "bs=4k",
                    ])
                    .stderr(std::process::Stdio::null())
                    .status()
                    .unwrap();
                assert!(!filled.success(), "the store is full");
                year.run(Night(FULL), 3);
                let begin = year.time(Night(FULL));
                for point in year.host.points(begin + hours(1)) {
                    let text = |key: &str| point[key].as_str().unwrap().to_string();
                    if text("taken_at").parse::<Timestamp>().unwrap() >= begin {
                        let name = format!("backup-failed {}/{}", text("customer"), text("vm"));
                        year.got_through.push(name);
                    }
                }
                fs::remove_file(&filler).unwrap();
                year.run(Morning(FULL + 1), 0);
            }
            _ => {
                match night {
                    AWAY => year.guests["db01"].away(),
                    night if night == AWAY + 7 => year.guests["db01"].back(),
                    SHORTER => year.configure(&acme, "max_retention = \"20 days\""),
                    REMOVED => year.configure(&acme[..2], "max_retention = \"20 days\""),
                    _ => {}
                }
                let code = match night {
                    night if (AWAY..AWAY + 7).contains(&night) => 3,
                    // The shorter policy waits.
                    SHORTER => 1,
                    _ => 0,
                };
                year.run(Night(night), code);
            }
        }
        let evening = year.time(Night(night)) + hours(1);
        match night {
            night if night == OFF + 2 => {
                year.run(Morning(OFF + 3), 5);
                let looked = year.time(Morning(OFF + 3)) + hours(1);
                year.host
                    .vmkeep(&["prune", "--trust-clock"], looked)
                    .exits(0);
            }
            night if night == AWAY + 3 => {
                let (code, status) = year.status(evening);
                assert_eq!(code, Some(4));
                let first = &status["vms"][0];
                assert_eq!(
                    (&first["vm"], &first["nights_missing"]),
                    (&"db01".into(), &3.into())
                );
                let check = year.host.vmkeep(&["status", "--check"], evening);
                check
                    .exits(2)
                    .says("VMKEEP CRITICAL - 3 of 4 VMs protected: broken: acme: db01");
                let alarms = |kind: &str, severity: &str| {
                    let labels = format!("alarm=\"{kind}\",severity=\"{severity}\"");
                    year.metric(&format!("vmkeep_alarms{{{labels}}}"))
                };
                assert_eq!(alarms("backup-failed", "warning"), Some(1.0));
                assert_eq!(alarms("hole", "broken"), Some(1.0));
                assert_eq!(alarms("damage", "damage"), Some(0.0));
                assert_eq!(year.metric("vmkeep_run_last_exit_code"), Some(3.0));
                assert_eq!(year.metric("vmkeep_promises_broken"), Some(1.0));
                let labels = "{customer=\"acme\",vm=\"db01\",state=\"missing\"}";
                assert_eq!(year.metric(&format!("vmkeep_vm_nights{labels}")), Some(3.0));
            }
            SHORTER => {
                let morning = year.time(Morning(SHORTER + 1));
                year.host.vmkeep(&["prune", "--confirm"], morning).exits(0);
            }
            night if night == SHORTER + 1 => {
                let points = year.host.points(evening);
                let oldest = points.iter().filter(|point| point["customer"] == "globex");
                let oldest = oldest.map(|point| point["taken_at"].as_str().unwrap().to_string());
                let oldest: Timestamp = oldest.min().unwrap().parse().unwrap();
                assert!(
                    evening.duration_since(oldest) <= hours(17 * 24 + 1),
                    "{oldest}"
                );
            }
            SPRING | AUTUMN => {
                // The night has its point, and no night before it lacks one.
                let (code, status) = year.status(evening);
                assert_eq!(code, Some(0), "{status}");
                let nights = status["vms"][0]["nights"].as_array().unwrap();
                assert_eq!(nights.last().unwrap()["state"], "covered");
            }
            night if night == REMOVED + 20 => {
                let text = year.host.vmkeep(&["status"], evening);
                text.exits(0).says("acme/old01 (gone)");
                let mut points = year.host.points(evening).into_iter();
                let last = points.rfind(|point| point["vm"] == "old01");
                let last = last.expect("one is left");
                assert_eq!(last["kind"], "full");
                let taken_at: Timestamp = last["taken_at"].as_str().unwrap().parse().unwrap();
                let night = year.time(Night(REMOVED - 1));
                assert!(
                    taken_at.duration_since(night).abs() < hours(1),
                    "{taken_at}, not {night}"
                );
            }
            _ => {}
        }
    }
    let mut expected = year.expected();
    expected.sort();
    let mut heard = year.heard.clone();
    heard.sort();
    let missing: Vec<_> = expected.iter().filter(|one| !heard.contains(one)).collect();
    let surplus: Vec<_> = heard.iter().filter(|one| !expected.contains(one)).collect();
    assert!(
        missing.is_empty() && surplus.is_empty(),
        "not told: {missing:#?}\ntold and not expected: {surplus:#?}"
    );
    assert_eq!(heard.len(), expected.len(), "each once");

    // The mails say the same: one for each run that has something to tell.
    let mails = year.mail.received();
    let mut told: Vec<Moment> = heard.iter().map(|(moment, _, _)| *moment).collect();
    told.dedup();
    assert_eq!(mails.len(), told.len());
    let first = &mails[0];
    assert_eq!(first.to, ["admin@example.com"]);
    assert!(
        first
            .header("Subject")
            .contains("no restore point for the night of 2031-01-26")
    );
    assert!(first.body().contains("2031-01-27"), "{}", first.body());

    // Whoever waits for the pings heard each run begin and end.
    let pings: Vec<String> = year
        .ping
        .received()
        .iter()
        .map(|one| one.path.clone())
        .collect();
    let expected: Vec<&str> = year
        .runs
        .iter()
        .flat_map(|(_, _, code)| {
            [
                "/ping/start",
                if *code == 0 { "/ping" } else { "/ping/fail" },
            ]
        })
        .collect();
    assert_eq!(pings, expected);

    let end = year.time(Night(NIGHTS)) - hours(12);
    let (code, status) = year.status(end);
    assert_eq!(code, Some(0), "{status}");
    let of = |status: &Value| -> Vec<String> {
        let rows = status["vms"].as_array().unwrap().iter();
        rows.map(|row| format!("{}/{}", row["customer"], row["vm"]).replace('"', ""))
            .collect()
    };
    assert_eq!(of(&status), ["acme/db01", "acme/web01", "globex/shop"]);
    assert_eq!(status["alarms"], serde_json::json!([]));
    year.host
        .vmkeep(&["status", "--check"], end)
        .exits(0)
        .says("VMKEEP OK - 3 of 3 VMs protected");
    assert_eq!(year.metric("vmkeep_promises_broken"), Some(0.0));
    for vm in ["web01", "db01", "shop"] {
        let target = year.host.restore(vm, "latest", end);
        let restored = Picture::of_file(&target.path().join("vda.raw"));
        assert!(restored == year.guests[vm].picture(), "{vm}");
    }
    year.host.vmkeep(&["ledger", "verify"], end).exits(0);
    year.host.vmkeep(&["verify", "--read-data"], end).exits(0);
}
