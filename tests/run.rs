//! The nightly run as a whole: what it begins, what it leaves, and what it says of itself.

use vmkeep_test_support as support;

use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use support::{Customer, Guest, Host, HostOptions, HttpSink, Picture, Random, path_text, time};

const VMS: [&str; 3] = ["web01", "db01", "mail01"];
const MIB: u64 = 1 << 20;

struct Lab {
    host: Host,
    guests: Vec<Guest>,
    at: Timestamp,
}

fn acme() -> Customer {
    Customer {
        name: "acme",
        own: "",
        vms: VMS.map(|vm| (vm, vec!["vda"])).to_vec(),
    }
}

/// Three VMs of one customer, with this in the configuration besides.
fn lab(more: &str) -> Lab {
    let policy = format!("timezone = \"UTC\"\nwindow = \"22:00-06:00\"\n\n{more}");
    let mut random = Random::new(0x7257_0001);
    let host = Host::new(&HostOptions {
        policy: Box::leak(policy.into_boxed_str()),
        customers: vec![acme()],
        ..HostOptions::default()
    });
    let guests = VMS.map(|vm| Guest::new(host.image(vm, "vda"), 2 * MIB, &mut random));
    let at = time("2031-02-10T23:00:00Z");
    host.vmkeep(&["init", "--yes"], at).exits(0);
    Lab {
        host,
        guests: guests.into(),
        at,
    }
}

impl Lab {
    /// The others of a night that is spread have their time in two hours.
    #[track_caller]
    fn waits_for_its_first_point(&self) {
        let start = Instant::now();
        while self.host.points(self.at).is_empty() {
            assert!(
                start.elapsed() < Duration::from_secs(120),
                "no first backup"
            );
        }
    }

    #[track_caller]
    fn all_restore(&self, at: Timestamp) {
        self.all_restore_on(&self.host, at);
    }

    #[track_caller]
    fn all_restore_on(&self, host: &Host, at: Timestamp) {
        for (vm, guest) in VMS.iter().zip(&self.guests) {
            let target = host.restore(vm, "latest", at);
            let restored = Picture::of_file(&target.path().join("vda.raw"));
            assert!(restored == guest.picture(), "{vm}");
        }
    }
}

fn outcomes(document: &serde_json::Value) -> Vec<(String, String)> {
    let vms = document["customers"][0]["vms"].as_array().unwrap().iter();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_string();
    vms.map(|vm| (text(&vm["vm"]), text(&vm["outcome"])))
        .collect()
}

#[test]
fn several_vms_at_once_each_get_their_point() {
    let lab = lab("[run]\nvms_at_once = 3");
    let document = lab.host.json(&["run"], lab.at);
    let wanted = VMS.map(|vm| (vm.to_string(), "backed-up".to_string()));
    assert_eq!(outcomes(&document), wanted);
    lab.all_restore(lab.at);
    lab.host.vmkeep(&["verify", "--read-data"], lab.at).exits(0);
}

#[test]
fn what_does_not_begin_before_the_windows_end_is_left_and_caught_up() {
    // Each disk takes six seconds, and the window ends in less.
    let limit = "[run]\nread_limit = \"256 KiB\"";
    let lab = lab(limit);
    let late = time("2031-02-11T05:59:55Z");
    let ran = lab.host.vmkeep(&["--json", "run"], late);
    ran.exits(3)
        .says("left for the next run: its window has ended");
    let found = outcomes(&ran.document());
    let done = found
        .iter()
        .filter(|(_, outcome)| outcome == "backed-up")
        .count();
    let left = found
        .iter()
        .filter(|(_, outcome)| outcome == "left")
        .count();
    assert!(done >= 1 && left >= 1 && done + left == 3, "{found:?}");
    // In the day it is caught up: outside of the window nothing ends.
    let day = time("2031-02-11T09:00:00Z");
    let config = lab.host.config_text();
    lab.host.write_config(&config.replace(limit, ""));
    let document = lab.host.json(&["run"], day);
    let found = outcomes(&document);
    let caught_up = found
        .iter()
        .filter(|(_, outcome)| outcome == "backed-up")
        .count();
    assert_eq!(caught_up, left, "{found:?}");
    lab.all_restore(day);
}

#[test]
fn a_limit_of_reading_is_kept() {
    let lab = lab("[run]\nread_limit = \"2 MiB\"\nvms_at_once = 3");
    let start = Instant::now();
    lab.host.vmkeep(&["run"], lab.at).exits(0);
    // Over four MiB on three disks; the first piece goes at once.
    let least = Duration::from_millis(1800);
    assert!(start.elapsed() >= least, "{:?}", start.elapsed());
}

#[test]
fn a_backup_by_hand_keeps_to_the_limits_of_the_run() {
    let lab = lab("[run]\nread_limit = \"512 KiB\"");
    let start = Instant::now();
    lab.host.vmkeep(&["backup", "web01"], lab.at).exits(0);
    // Over a MiB; the first piece goes at once.
    let least = Duration::from_millis(1500);
    assert!(start.elapsed() >= least, "{:?}", start.elapsed());
}

#[test]
fn a_limit_of_sending_holds_at_its_hours_only() {
    let lab = lab("[run]\n[[run.limit]]\nhours = \"22:00-06:00\"\nupload_limit = \"1 MiB\"");
    let start = Instant::now();
    lab.host.vmkeep(&["run"], lab.at).exits(0);
    let limited = start.elapsed();
    // Each VM's packs, one after the other, of some 2 MiB; what is sent last is not waited for.
    assert!(limited >= Duration::from_millis(1200), "{limited:?}");
}

#[test]
fn a_dry_run_shows_the_night_in_its_order_and_does_nothing() {
    let lab = lab("[run]\nspread = true");
    let text = lab.host.vmkeep(&["run", "--dry-run"], lab.at);
    text.exits(0)
        .says(
            "acme/db01: full: there is no restore point yet, from 2031-02-10 23:00\nacme/mail01: ",
        )
        .says("from 2031-02-11 01:11\nacme/web01: ")
        .says("from 2031-02-11 03:22\n");
    assert!(lab.host.points(lab.at).is_empty());
}

#[test]
fn a_run_takes_the_fulls_that_its_plan_has_and_puts_the_others_off() {
    let lab = lab("");
    let mut fulls = Vec::new();
    for night in 0..16 {
        let at = lab.at + SignedDuration::from_hours(24 * night);
        let plan = lab.host.vmkeep(&["run", "--dry-run"], at);
        let planned = plan.exits(0).stdout.matches(": full: ").count();
        lab.host.vmkeep(&["run"], at).exits(0);
        let points = lab.host.points(at).into_iter();
        let taken = |point: &serde_json::Value| {
            let taken_at: Timestamp = point["taken_at"].as_str().unwrap().parse().unwrap();
            taken_at >= at && point["kind"] == "full"
        };
        assert_eq!(points.filter(taken).count(), planned, "night {night}");
        fulls.push(planned);
    }
    assert_eq!(fulls[0], 3);
    assert!(fulls[1..].iter().all(|fulls| *fulls <= 1), "{fulls:?}");
    assert!(fulls[1..].iter().sum::<usize>() >= 6, "{fulls:?}");
}

#[test]
fn who_waits_for_its_time_ends_at_once_when_it_is_told_to() {
    // The last is what a connection says that breaks off.
    for signal in ["-INT", "-TERM", "-HUP"] {
        let lab = lab("[run]\nspread = true");
        let running = lab.host.start(&["run"], lab.at);
        lab.waits_for_its_first_point();
        running.signal(signal);
        let ran = running.ended();
        ran.exits(130).one_error();
        assert_eq!(lab.host.points(lab.at).len(), 1);
        // In the morning the others are caught up.
        let day = time("2031-02-11T09:00:00Z");
        lab.host.vmkeep(&["run"], day).exits(0);
        lab.all_restore(day);
    }
}

#[test]
fn a_run_that_is_interrupted_tells_what_it_has_done() {
    let lab = lab("[run]\nspread = true");
    let running = lab.host.start(&["--json", "run"], lab.at);
    lab.waits_for_its_first_point();
    let status = || lab.host.vmkeep(&["status"], lab.at);
    status()
        .says("a run is under way since 2031-02-10 23:0")
        .says(" of 3 VMs done");
    running.signal("-TERM");
    let ran = running.ended();
    ran.exits(130).one_error();
    let document = ran.document();
    assert_eq!(document["error"]["code"], 130);
    let found = outcomes(&document);
    let count = |wanted: &str| found.iter().filter(|(_, one)| one == wanted).count();
    assert_eq!(
        (count("backed-up"), count("interrupted")),
        (1, 2),
        "{found:?}"
    );
    let last_run = std::fs::read(lab.host.state().join("last-run.json")).unwrap();
    let last_run: serde_json::Value = serde_json::from_slice(&last_run).unwrap();
    assert_eq!(last_run["exit_code"], 130);
    assert_eq!(
        (&last_run["backed_up"], &last_run["failed"]),
        (&1.into(), &0.into())
    );
    let after = status();
    after
        .says(", exit 130, 1 VM backed up\n")
        .says("the last run ended early: interrupted");
    assert!(!after.stdout.contains("under way"), "{after}");
}

#[test]
fn a_status_shows_what_the_last_run_met_until_it_is_made_up_for() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vmkeep.prom");
    let lab = lab(&format!("[run]\nmetrics_file = \"{}\"", path_text(&file)));
    lab.host.vmkeep(&["run"], lab.at).exits(0);
    let night = lab.at + SignedDuration::from_hours(24);
    let db01 = &lab.guests[1];
    db01.away();
    lab.host
        .vmkeep(&["run"], night)
        .exits(3)
        .says("is what it lies on mounted");
    db01.back();
    let after = night + SignedDuration::from_mins(10);
    lab.host
        .vmkeep(&["status"], after)
        .exits(3)
        .says("last run ended 2031-02-11 23:0")
        .says(", exit 3, 2 VMs backed up, 1 VM failed\n")
        .says("warning: acme: db01: the last backup failed: ")
        .says("(run of 2031-02-11 23:0");
    let status = lab.host.vmkeep(&["--json", "status"], after).document();
    assert_eq!(status["last_run"]["exit_code"], 3);
    let alarms = status["alarms"].as_array().unwrap().iter();
    let failed = alarms.filter(|alarm| alarm["alarm"] == "backup-failed");
    assert_eq!(failed.count(), 1, "{status}");
    let metrics = std::fs::read_to_string(&file).unwrap();
    let line = "vmkeep_alarms{alarm=\"backup-failed\",severity=\"warning\"} 1.0";
    assert!(metrics.contains(line), "{metrics}");
    // Another run need not come first.
    lab.host.vmkeep(&["backup", "db01"], after).exits(0);
    let later = after + SignedDuration::from_mins(10);
    let made_up_for = lab.host.vmkeep(&["status"], later);
    made_up_for.exits(0);
    assert!(
        !made_up_for.stdout.contains("last backup failed"),
        "{made_up_for}"
    );
}

#[test]
fn a_status_after_a_run_that_met_damage_is_red() {
    let lab = lab("");
    lab.host.vmkeep(&["run"], lab.at).exits(0);
    let packs = support::files_below(&lab.host.customer_folder("acme").join("packs"));
    let packs = packs.iter();
    let largest = packs.max_by_key(|path| std::fs::metadata(path).unwrap().len());
    std::fs::remove_file(largest.unwrap()).unwrap();
    let night = lab.at + SignedDuration::from_hours(24);
    lab.host.vmkeep(&["run"], night).exits(6);
    let after = night + SignedDuration::from_mins(10);
    lab.host
        .vmkeep(&["status"], after)
        .exits(6)
        .says("damage: acme: ");
    lab.host
        .vmkeep(&["status", "--check"], after)
        .exits(2)
        .says("VMKEEP CRITICAL");
}

#[test]
fn a_status_after_damage_was_healed_is_not_red_until_the_next_run() {
    let lab = lab("");
    lab.host.vmkeep(&["run"], lab.at).exits(0);
    let packs = support::files_below(&lab.host.customer_folder("acme").join("packs"));
    let size = |pack: &std::path::PathBuf| std::fs::metadata(pack).unwrap().len();
    let largest = packs.into_iter().max_by_key(size).unwrap();
    std::fs::remove_file(largest).unwrap();
    let after = |minutes: i64| lab.at + SignedDuration::from_mins(24 * 60 + minutes);
    lab.host.vmkeep(&["run"], after(0)).exits(6);
    let verify = ["verify", "--read-data"];
    lab.host.vmkeep(&verify, after(10)).exits(6);
    lab.host.vmkeep(&["status"], after(11)).exits(6);
    let full = [&["backup", "--full"][..], &VMS[..]].concat();
    lab.host.vmkeep(&full, after(20)).exits(0);
    // Of the pack that is lost nothing is needed any more.
    lab.host.vmkeep(&["prune"], after(25)).exits(0);
    lab.host.vmkeep(&verify, after(30)).exits(0);
    let status = lab.host.vmkeep(&["status"], after(31));
    status.exits(0);
    assert!(!status.stdout.contains("damage: acme"), "{status}");
}

#[test]
fn who_is_to_know_hears_of_a_state_folder_that_is_refused() {
    let hook = HttpSink::start();
    let lab = lab(&format!(
        "[notify]\njournald = false\n[[notify.webhook]]\nurl = \"{}/hook\"",
        hook.url
    ));
    let open_to_all = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(lab.host.state(), open_to_all).unwrap();
    lab.host
        .vmkeep(&["run"], lab.at)
        .exits(1)
        .says("others can write into the host's state folder");
    let heard = hook.received();
    assert_eq!(heard.len(), 1);
    let message = &heard[0].document()["messages"][0];
    assert_eq!(message["event"], "raised");
    assert_eq!(message["key"], "run-failed");
    let text = message["text"].as_str().unwrap();
    assert!(text.contains("state folder"), "{text}");
}

#[test]
fn a_run_and_a_status_have_an_alarm_in_one_shape() {
    let lab = lab("");
    let plan = lab.host.json(&["run", "--dry-run"], lab.at);
    let run = lab.host.json(&["run"], lab.at);
    let status = lab.host.json(&["status"], lab.at);
    // No escrow.
    let alarms = &run["customers"][0]["alarm_list"];
    assert_eq!(alarms[0]["alarm"], "no-escrow");
    assert_eq!(alarms, &status["alarms"]);
    for document in [plan, run] {
        let plan = &document["customers"][0]["prune_plan"];
        assert_eq!(plan, &serde_json::json!([]), "{document}");
    }
}

#[test]
fn who_asks_for_more_is_told_what_is_done_and_who_asks_again_why() {
    let lab = lab("");
    let ran = lab.host.vmkeep(&["-v", "run"], lab.at);
    ran.exits(0);
    let has = |ran: &support::Ran, line: &str| ran.stderr.lines().any(|one| one.starts_with(line));
    for line in [
        "vmkeep: acme: open",
        "vmkeep: acme/web01: begun: full",
        "vmkeep: acme/web01: full ",
        "vmkeep: acme prune",
        "vmkeep: acme: 0 points expired",
    ] {
        assert!(has(&ran, line), "{line}\n{ran}");
    }
    let why = "vmkeep: debug: acme/web01: there is no restore point yet";
    assert!(!has(&ran, why), "{ran}");
    let night = lab.at + SignedDuration::from_hours(24);
    let ran = lab.host.vmkeep(&["-vv", "run"], night);
    ran.exits(0);
    let is_why = |line: &str| {
        line.starts_with("vmkeep: debug: acme/") && line.contains("in the night of 2031-02-11")
    };
    assert!(ran.stderr.lines().any(is_why), "{ran}");
    let silent = lab.host.vmkeep(&["run"], night);
    assert!(!has(&silent, "vmkeep: acme"), "{silent}");
}

#[test]
fn a_later_host_takes_over_the_vms_of_a_dead_one_and_a_return_doubles_nothing() {
    let mut lab = lab("[run]\nread_limit = \"512 KiB\"");
    let (first, night) = (&lab.host, |days: i64| {
        lab.at + SignedDuration::from_hours(24 * days)
    });
    let standby = Host::new(&HostOptions {
        name: "host2",
        store: Some(first.store().to_path_buf()),
        policy: "timezone = \"UTC\"\nwindow = \"22:00-06:00\"",
        customers: vec![acme()],
        ..HostOptions::default()
    });
    let words = standby.admission(night(0));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    first.vmkeep(&words, night(0)).exits(0);
    standby.vmkeep(&["init", "--yes"], night(0)).exits(0);
    first.vmkeep(&["run"], night(0)).exits(0);

    // The next night it dies in the middle of a backup.
    let mut random = Random::new(0x7257_0003);
    for guest in &mut lab.guests {
        guest.work(30, &mut random);
    }
    let objects = || support::files_below(&first.customer_folder("acme")).len();
    let before = objects();
    let start = Instant::now();
    let running = first.start(&["run"], night(1));
    while objects() == before {
        assert!(start.elapsed() < Duration::from_secs(120), "it never began");
    }
    assert!(running.kill().was_killed());

    // The disks are on the other host, which is told to back them up.
    for vm in VMS {
        std::fs::copy(first.image(vm, "vda"), standby.image(vm, "vda")).unwrap();
    }
    let taken = |at| standby.vmkeep(&["--json", "run"], at).exits(0).document();
    let backed_up = |vm: &str| (vm.to_string(), "backed-up".to_string());
    let mut found = outcomes(&taken(night(2)));
    found.sort();
    let mut wanted = VMS.map(backed_up);
    wanted.sort();
    assert_eq!(found, wanted);
    let points = standby.points(night(2));
    lab.all_restore_on(&standby, night(2));

    // The dead host is switched on again, and does what its configuration says.
    first.vmkeep(&["run"], night(2)).exits(0);
    assert_eq!(standby.points(night(2)), points);
    let pruned = &first.json(&["prune"], night(4))["customers"][0];
    assert_eq!(pruned["unexplained"], serde_json::json!([]), "{pruned}");
    standby
        .vmkeep(&["verify", "--read-data"], night(4))
        .exits(0);
}

#[test]
fn a_run_steps_back_behind_what_else_uses_the_disks() {
    for (priority, wanted) in [("idle", "idle"), ("low", "best-effort: prio 7")] {
        let lab = lab(&format!(
            "[run]\nspread = true\nio_priority = \"{priority}\""
        ));
        let running = lab.host.start(&["run"], lab.at);
        lab.waits_for_its_first_point();
        let found = support::tool("ionice", &["-p", &running.id().to_string()]);
        assert_eq!(found.trim(), wanted);
        running.signal("-TERM");
        running.ended().exits(130);
    }
}

#[test]
fn a_run_that_is_killed_at_any_moment_is_gone_on_with_by_the_next() {
    // Any number by hand: VMKEEP_KILLS=200.
    let kills = std::env::var("VMKEEP_KILLS").map_or(12, |text| text.parse().unwrap());
    let mut lab = lab("[run]\nvms_at_once = 2");
    let mut random = Random::new(0x7257_0002);
    let start = Instant::now();
    lab.host.vmkeep(&["run"], lab.at).exits(0);
    let mut takes = start.elapsed();
    let mut killed = 0;
    for round in 1..=kills {
        let at = lab.at + SignedDuration::from_hours(24 * i64::from(round));
        for guest in &mut lab.guests {
            guest.work(4, &mut random);
        }
        let start = Instant::now();
        let mut running = lab.host.start(&["run"], at);
        let moment = takes * round / kills;
        while running.is_running() && start.elapsed() < moment {}
        let ran = running.kill();
        if ran.was_killed() {
            killed += 1;
        } else {
            ran.exits(0);
            takes = start.elapsed();
        }
        lab.host.vmkeep(&["run"], at).exits(0);
        lab.all_restore(at);
        let pruned = &lab.host.json(&["prune"], at)["customers"][0];
        assert_eq!(pruned["unexplained"], serde_json::json!([]), "{pruned}");
    }
    println!("{killed} of {kills} were killed");
    assert!(killed * 2 >= kills, "{killed} kills");
    let end = lab.at + SignedDuration::from_hours(24 * i64::from(kills));
    lab.host.vmkeep(&["verify", "--read-data"], end).exits(0);
    lab.host.vmkeep(&["ledger", "verify"], end).exits(0);
}

#[test]
fn a_run_beside_one_that_does_not_end_prunes_what_is_due_and_tells_of_it_once() {
    let hook = HttpSink::start();
    let notify = format!(
        "[notify]\njournald = false\n[[notify.webhook]]\nurl = \"{}/hook\"",
        hook.url
    );
    let run = "max_retention = \"7 days\"\n[run]\nspread = true";
    let lab = lab(&format!("{run}\n{notify}"));
    let night = |number: i64| lab.at + SignedDuration::from_hours(24 * number);
    for number in 0..6 {
        lab.host
            .vmkeep(&["backup", "web01"], night(number))
            .exits(0);
    }
    // Its second VM has its time in two hours, which is as good as never.
    let running = lab.host.start(&["run"], night(6));
    let start = Instant::now();
    let is_one_done = || {
        let status = lab.host.vmkeep(&["--json", "status"], night(6)).document();
        status["run_under_way"]["vms_done"] == 1
    };
    while !is_one_done() {
        assert!(start.elapsed() < Duration::from_secs(120), "no first VM");
    }
    // In its own night nothing is wrong.
    let early = night(6) + SignedDuration::from_hours(8);
    let busy = lab.host.vmkeep(&["run"], early);
    busy.exits(11).one_error().says("nothing is wrong");
    assert_eq!(hook.received().len(), 0);

    let records = || support::files_below(&lab.host.customer_folder("acme").join("points")).len();
    assert_eq!(records(), 7);
    let late = night(7) + SignedDuration::from_mins(1);
    let busy = lab.host.vmkeep(&["run"], late);
    busy.exits(11)
        .one_error()
        .says("is under way since 2031-02-16 23:0")
        .says("systemctl stop vmkeep.service");
    // Those of the first two nights.
    assert_eq!(records(), 5);
    let heard = |from: usize| -> Vec<(String, String)> {
        let requests = hook.received().into_iter().skip(from);
        let documents = requests.map(|request| request.document());
        let messages =
            documents.flat_map(|document| document["messages"].as_array().unwrap().clone());
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_string();
        messages
            .map(|message| (text(&message["event"]), text(&message["key"])))
            .collect()
    };
    let told = heard(0);
    for key in ["run-failed", "stale acme/web01", "hole acme/mail01"] {
        let raised = ("raised".to_string(), key.to_string());
        assert!(told.contains(&raised), "{key}: {told:?}");
    }
    assert!(told.iter().all(|(event, _)| event == "raised"), "{told:?}");
    lab.host
        .vmkeep(&["status"], late)
        .says("warning: store: the run that began at 2031-02-16 23:0");

    // Two more at once have nothing new to tell.
    let before = hook.received().len();
    let others = [1, 2].map(|minutes| {
        let at = late + SignedDuration::from_mins(minutes);
        lab.host.start(&["run"], at)
    });
    for other in others {
        other.ended().exits(11);
    }
    assert_eq!(heard(before), []);

    running.signal("-TERM");
    running.ended().exits(130);
    let config = lab.host.config_text();
    let spread = "spread = true";
    lab.host
        .write_config(&config.replace(spread, "spread = false"));
    let before = hook.received().len();
    let day = night(7) + SignedDuration::from_hours(10);
    lab.host.vmkeep(&["run"], day).exits(0);
    let over = ("cleared".to_string(), "run-failed".to_string());
    assert!(heard(before).contains(&over), "{:?}", heard(before));
}

#[test]
fn a_check_speaks_as_monitoring_plugins_do() {
    let lab = lab("");
    let check = |at| lab.host.vmkeep(&["status", "--check"], at);
    check(lab.at)
        .exits(2)
        .says("VMKEEP CRITICAL - 0 of 3 VMs protected: broken: acme: ");
    lab.host.vmkeep(&["run"], lab.at).exits(0);
    // No escrow: one warning.
    let well = check(lab.at);
    well.exits(1)
        .says("VMKEEP WARNING - 3 of 3 VMs protected: warning: acme: no escrow");
    assert_eq!(well.stdout.lines().count(), 1);
    std::fs::rename(lab.host.store(), lab.host.path("elsewhere")).unwrap();
    check(lab.at).exits(3).says("VMKEEP UNKNOWN - ");
}

#[test]
fn cron_starts_no_second_run_and_mails_what_fails() {
    let lab = lab("");
    std::fs::rename(lab.host.store(), lab.host.path("elsewhere")).unwrap();
    let lock = lab.host.path("cron.lock");
    let cron = concat!(env!("CARGO_MANIFEST_DIR"), "/config/vmkeep.cron");
    let cron = std::fs::read_to_string(cron).unwrap();
    let (_, line) = cron.trim_end().rsplit_once(" root ").unwrap();
    let line = line.replace("/run/vmkeep.cron.lock", path_text(&lock));
    let line = line.replace("/usr/bin/vmkeep", env!("CARGO_BIN_EXE_vmkeep"));
    let mailed = || {
        let mut cron = Command::new("/bin/sh");
        cron.args(["-c", &line]);
        cron.env("VMKEEP_CONFIG", lab.host.path("vmkeep.toml"));
        let output = cron.output().unwrap();
        String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
    };
    let mail = mailed();
    assert!(mail.contains("is the disk mounted?"), "{mail}");
    let holder = std::fs::File::open(&lock).unwrap();
    rustix::fs::flock(&holder, rustix::fs::FlockOperation::LockExclusive).unwrap();
    assert_eq!(mailed(), "");
}

#[test]
fn a_run_that_comes_to_nothing_says_so_in_the_metrics_which_everybody_can_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vmkeep.prom");
    let lab = lab(&format!("[run]\nmetrics_file = \"{}\"", path_text(&file)));
    let has = |line: &str| {
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.lines().any(|one| one == line), "{line}\n{text}");
    };
    lab.host.vmkeep(&["run"], lab.at).exits(0);
    has("vmkeep_up 1.0");
    std::fs::rename(lab.host.store(), lab.host.path("elsewhere")).unwrap();
    lab.host.vmkeep(&["run"], lab.at).exits(10);
    has("vmkeep_up 0.0");
    has("vmkeep_error_exit_code 10.0");
    // As the unit starts it.
    let mut unit = Command::new("/bin/sh");
    let script = "umask 077; exec \"$0\" run";
    unit.args(["-c", script, env!("CARGO_BIN_EXE_vmkeep")]);
    unit.env("VMKEEP_CONFIG", lab.host.path("vmkeep.toml"));
    assert_eq!(unit.output().unwrap().status.code(), Some(10));
    let mode = std::fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o644);
}

/// Prometheus's own judge, given this to read.
#[track_caller]
fn promtool(arguments: &[&str], input: &str) {
    let mut judge = Command::new("promtool")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool: scripts/test tools");
    judge
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let output = judge.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "promtool {arguments:?}: {said}");
}

/// What a scrape brings: the head and the body.
fn scrape(address: &str, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    (head.to_string(), body.to_string())
}

#[test]
fn who_serves_metrics_quietly_says_nothing() {
    let lab = lab("");
    for is_quiet in [true, false] {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = port.local_addr().unwrap().to_string();
        drop(port);
        let line = ["-q", "serve-metrics", "--listen", address.as_str()];
        let line = if is_quiet { &line[..] } else { &line[1..] };
        let mut serving = lab.host.start(line, lab.at);
        while TcpStream::connect(&address).is_err() {
            assert!(serving.is_running());
        }
        serving.signal("-TERM");
        let served = serving.ended();
        let said = served.exits(0).stderr.contains("metrics at ");
        assert_eq!(said, !is_quiet, "{served}");
    }
}

#[test]
fn metrics_are_the_same_in_the_file_and_over_http() {
    let file = tempfile::tempdir().unwrap();
    let file = file.path().join("vmkeep.prom");
    let lab = lab(&format!("[run]\nmetrics_file = \"{}\"", path_text(&file)));
    lab.host.vmkeep(&["run"], lab.at).exits(0);
    let written = std::fs::read_to_string(&file).unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = port.local_addr().unwrap().to_string();
    drop(port);
    let mut serving = lab
        .host
        .start(&["serve-metrics", "--listen", &address], lab.at);
    while TcpStream::connect(&address).is_err() {
        assert!(serving.is_running());
    }
    let (head, body) = scrape(&address, "/metrics");
    assert!(
        head.starts_with("HTTP/1.1 200 OK\r\nContent-Type: application/openmetrics-text"),
        "{head}"
    );
    let (head, _) = scrape(&address, "/");
    assert!(head.starts_with("HTTP/1.1 404"), "{head}");
    // A client that says nothing is let go, and others are served after it.
    let silent = TcpStream::connect(&address).unwrap();
    drop(silent);
    let (_, again) = scrape(&address, "/metrics");
    assert_eq!(again, body, "a scrape soon after costs nothing");
    serving.signal("-TERM");
    serving.ended().exits(0);
    let without_free = |text: &str| -> Vec<String> {
        let lines = text
            .lines()
            .filter(|line| !line.starts_with("vmkeep_store_free"));
        let mut lines: Vec<String> = lines.map(str::to_string).collect();
        lines.sort();
        lines
    };
    assert_eq!(without_free(&written), without_free(&body));
    promtool(&["check", "metrics"], &body);
    // Every metric that an alert asks for is there.
    let alerts = concat!(env!("CARGO_MANIFEST_DIR"), "/config/vmkeep-alerts.yml");
    promtool(&["check", "rules", alerts], "");
    let alerts = std::fs::read_to_string(alerts).unwrap();
    let words = alerts.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    let named: BTreeSet<&str> = words.filter(|word| word.starts_with("vmkeep_")).collect();
    assert!(named.len() > 5, "{named:?}");
    for name in named {
        let is_it = |line: &str| line.starts_with(name) && !line.starts_with('#');
        assert!(body.lines().any(is_it), "{name}");
    }
    let line = "vmkeep_vm_points{customer=\"acme\",vm=\"db01\"} 1.0";
    assert!(body.lines().any(|one| one == line), "{body}");
}
