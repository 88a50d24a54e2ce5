//! A configured policy that differs from the one in the ledger.

use vmkeep_test_support as support;

use jiff::SignedDuration;
use serde_json::json;
use support::{Customer, Guest, Host, HostOptions, Random, time};

fn options(own: &'static str) -> HostOptions {
    HostOptions {
        customers: vec![Customer {
            name: "acme",
            own,
            vms: vec![("web01", vec!["vda"])],
        }],
        ..HostOptions::default()
    }
}

#[test]
fn a_shortening_that_would_expire_several_nights_waits_until_somebody_confirms_it() {
    let mut random = Random::new(0x9017_0001);
    let host = Host::new(&options(""));
    let mut guest = Guest::new(host.image("web01", "vda"), 1 << 20, &mut random);
    let start = time("2031-02-10T23:00:00Z");
    host.vmkeep(&["init", "--yes"], start).exits(0);
    let night = |number: i64| start + SignedDuration::from_hours(24 * number);
    for number in 0..12 {
        guest.work(3, &mut random);
        host.vmkeep(&["run"], night(number)).exits(0);
    }
    assert_eq!(host.points(night(11)).len(), 12);
    host.configure(&options("max_retention = \"7 days\""));
    let after = night(11) + SignedDuration::from_hours(1);
    host.vmkeep(&["config", "check"], after)
        .exits(0)
        .says("with it the next prune would")
        .says("web01 of 2031-02-10, 2031-02-11");
    let changes = &host.json(&["config", "check"], after)["changes"][0];
    assert_eq!(changes["customer"], "acme");
    assert_eq!(changes["needs_confirmation"], true);
    // Nobody may take what could not be looked at for nothing.
    let away = host.path("away");
    std::fs::rename(host.store(), &away).unwrap();
    let unknown = &host.json(&["config", "check"], after)["changes_unknown"];
    assert_eq!(unknown.as_array().map(Vec::len), Some(1), "{unknown}");
    std::fs::rename(&away, host.store()).unwrap();
    // Nor may a state folder that cannot be looked into be taken for a host that has no repository.
    std::fs::rename(host.state(), &away).unwrap();
    std::fs::write(host.state(), b"no folder").unwrap();
    let unknown = &host.json(&["config", "check"], after)["changes_unknown"];
    assert_eq!(unknown.as_array().map(Vec::len), Some(1), "{unknown}");
    std::fs::remove_file(host.state()).unwrap();
    std::fs::rename(&away, host.state()).unwrap();
    let foreseen = host.vmkeep(&["run", "--dry-run"], after);
    foreseen.exits(0);
    let run = host.vmkeep(&["run"], after);
    run.exits(1);
    let foreseen_document = host.json(&["run", "--dry-run"], after);
    let run_document = host.vmkeep(&["--json", "run"], after).exits(1).document();
    // A mail has what stdout has, and nothing of stderr.
    for ran in [&foreseen, &run] {
        for part in [
            "acme: the configured policy is shorter",
            "vmkeep prune --confirm --customer acme",
        ] {
            assert!(ran.stdout.contains(part), "{part:?} in\n{ran}");
        }
    }
    for document in [foreseen_document, run_document] {
        let acme = &document["customers"][0];
        assert_eq!(acme["policy"], "needs-confirmation", "{acme}");
        assert!(acme["policy_nights"]["web01"].as_u64() > Some(1), "{acme}");
        assert!(acme["policy_refused"].is_null(), "{acme}");
    }
    assert!(!run.stdout.contains("the next run applies it"), "{run}");
    host.vmkeep(&["status"], after)
        .exits(0)
        .says("until somebody confirms: vmkeep prune --confirm");
    assert_eq!(host.points(after).len(), 12, "the old policy holds");
    host.vmkeep(&["prune"], after).exits(0);
    assert_eq!(host.points(after).len(), 12);
    // By a clock that is not believed a run would delete nothing either.
    let ahead = after + SignedDuration::from_hours(24 * 2000);
    let night_ahead = &host.json(&["run", "--dry-run"], ahead)["customers"][0];
    assert_eq!(night_ahead["prune"].as_array().map(Vec::len), Some(0));
    assert!(night_ahead["prune_refusal"].is_string(), "{night_ahead}");
    assert_eq!(night_ahead["policy"], "clock-refused");
    assert!(night_ahead["policy_refused"].is_string(), "{night_ahead}");
    let foreseen = host.json(&["prune", "--confirm", "--dry-run"], after);
    let plan = foreseen["customers"][0]["points"].as_array().unwrap();
    let going = plan.iter().filter(|row| row["action"] == "erase").count();
    assert_eq!(host.points(after).len(), 12, "nothing was done yet");
    host.vmkeep(&["prune", "--confirm"], after)
        .exits(0)
        .says("in force now");
    let changes = &host.json(&["config", "check"], after)["changes"];
    assert_eq!(changes, &serde_json::json!([]));
    let left = host.points(after);
    assert!(
        (1..8).contains(&left.len()),
        "{} points are left",
        left.len()
    );
    assert_eq!(12 - left.len(), going, "{foreseen}");
    host.vmkeep(&["restore", "web01", "--at", "latest", "--to", "r"], after)
        .exits(0);
    // What the new policy leaves is restorable, and the next run has nothing to ask.
    host.vmkeep(&["run"], night(12)).exits(0);
    host.vmkeep(&["verify", "--read-data"], night(12)).exits(0);
}

#[test]
fn who_confirms_for_one_customer_erases_nothing_of_another() {
    let mut random = Random::new(0x9017_0004);
    // A point of acme leaves the list each night, and waits a day for who wants it back.
    let acme = Customer {
        name: "acme",
        own: "restore_window = \"3 days\"\nkeep_after_window = \"none\"",
        vms: vec![("db01", vec!["vda"])],
    };
    let globex = |own| Customer {
        name: "globex",
        own,
        vms: vec![("web01", vec!["vda"])],
    };
    let with = |own| HostOptions {
        customers: vec![acme.clone(), globex(own)],
        ..HostOptions::default()
    };
    let host = Host::new(&with(""));
    for vm in ["db01", "web01"] {
        Guest::new(host.image(vm, "vda"), 1 << 20, &mut random);
    }
    let start = time("2031-02-10T23:00:00Z");
    let night = |number: i64| start + SignedDuration::from_hours(24 * number);
    host.vmkeep(&["init", "--yes"], start).exits(0);
    for number in 0..12 {
        host.vmkeep(&["run"], night(number)).exits(0);
    }
    host.configure(&with("max_retention = \"7 days\""));
    let after = night(11) + SignedDuration::from_hours(1);
    let command = "vmkeep prune --confirm --customer globex";
    host.vmkeep(&["run"], after).exits(1).says(command);
    host.vmkeep(&["status"], after).says(command);

    // Customer, action, id and reason.
    let rows = |line: &[&str]| -> Vec<[String; 4]> {
        let document = host.json(line, after);
        let mut rows = Vec::new();
        for customer in document["customers"].as_array().unwrap() {
            for row in customer["points"].as_array().unwrap() {
                let values = [
                    &customer["customer"],
                    &row["action"],
                    &row["id"],
                    &row["reason"],
                ];
                rows.push(values.map(|value| value.as_str().unwrap().to_string()));
            }
        }
        rows
    };
    let of = |rows: &[[String; 4]], customer: &str, action: &str| -> Vec<String> {
        let rows = rows
            .iter()
            .filter(|row| row[0] == customer && row[1] == action);
        let mut ids: Vec<String> = rows.map(|row| row[2].clone()).collect();
        ids.sort();
        ids
    };
    let waiting = of(&rows(&["prune", "--dry-run"]), "acme", "wait");
    assert!(!waiting.is_empty());
    // Of all customers it would be both, and it says so of each point.
    let all = rows(&["prune", "--dry-run", "--confirm"]);
    assert_eq!(of(&all, "acme", "erase"), waiting);
    let going = of(&all, "globex", "erase");
    assert_eq!(going, of(&all, "globex", "expire"));
    assert!(going.len() > 1);
    for [customer, action, _, reason] in &all {
        assert!(!reason.contains("--undo"), "{customer}: {action}: {reason}");
        if customer == "acme" && action == "erase" {
            assert_eq!(reason, "confirmed: erased now, for good");
        }
    }
    let one = ["prune", "--dry-run", "--confirm", "--customer", "globex"];
    assert!(rows(&one).iter().all(|row| row[0] == "globex"));

    let pruned = rows(&["prune", "--confirm", "--customer", "globex"]);
    assert!(pruned.iter().all(|row| row[0] == "globex"));
    assert_eq!(of(&pruned, "globex", "erase"), going);
    host.vmkeep(&["prune", "--undo", &waiting[0]], after)
        .exits(0)
        .says("is back");
    host.vmkeep(&["prune", "--customer", "initech"], after)
        .exits(2)
        .one_error()
        .says("customer initech is not in the configuration");
}

#[test]
fn a_longer_policy_applies_at_once_and_gives_no_old_point_a_longer_life() {
    let mut random = Random::new(0x9017_0002);
    let host = Host::new(&options("max_retention = \"20 days\""));
    Guest::new(host.image("web01", "vda"), 1 << 20, &mut random);
    let start = time("2031-02-10T23:00:00Z");
    host.vmkeep(&["init", "--yes"], start).exits(0);
    host.vmkeep(&["run"], start).exits(0);
    let deadline = host.points(start)[0]["deadline"].clone();
    host.configure(&options(""));
    let later = start + SignedDuration::from_hours(24);
    host.vmkeep(&["run"], later).exits(0).says("in force now");
    let points = host.points(later);
    assert_eq!(points[0]["deadline"], deadline);
    assert!(points[1]["deadline"].as_str() > Some("2031-04"));
}

#[test]
fn a_chunk_size_that_comes_after_init_is_told_to_do_nothing() {
    let host = Host::new(&options(""));
    let at = time("2031-02-10T23:00:00Z");
    host.vmkeep(&["init", "--yes"], at).exits(0);
    let told = || {
        let document = host.json(&["config", "check"], at);
        let warnings = document["warnings"].as_array().unwrap().clone();
        let mut warnings = warnings.into_iter();
        warnings.find(|warning| warning["kind"] == "chunk-size")
    };
    assert_eq!(told(), None);
    let later = "[repository]\nchunk_size = \"256 KiB\"";
    host.write_config(&host.config_text().replacen("[repository]", later, 1));
    let warning = told().expect("it is told");
    let message = warning["message"].as_str().unwrap();
    assert!(message.contains("256 KiB") && message.contains("64 KiB"));
    assert!(warning["customer"].is_null(), "{warning}");
}

#[test]
fn a_customer_that_left_the_configuration_is_told_until_it_is_put_back_and_emptied() {
    let mut random = Random::new(0x9017_0003);
    let acme = || Customer {
        name: "acme",
        own: "",
        vms: vec![("web01", vec!["vda"])],
    };
    let beta = |vms| Customer {
        name: "beta",
        own: "max_retention = \"7 days\"",
        vms,
    };
    let with = |customers| HostOptions {
        customers,
        ..HostOptions::default()
    };
    let host = Host::new(&with(vec![acme(), beta(vec![("db01", vec!["vda"])])]));
    for vm in ["web01", "db01"] {
        Guest::new(host.image(vm, "vda"), 1 << 20, &mut random);
    }
    let start = time("2031-02-10T23:00:00Z");
    let night = |number: i64| start + SignedDuration::from_hours(24 * number);
    host.vmkeep(&["init", "--yes"], start).exits(0);
    assert_eq!(host.json(&["run"], start)["outside"], json!([]));
    let points = host.points(start);
    let point = points.iter().find(|point| point["customer"] == "beta");
    let deadline = point.expect("a point")["deadline"].clone();

    // Its section is lost.
    host.configure(&with(vec![acme()]));
    let told = host.json(&["run"], night(1))["outside"].clone();
    assert_eq!(told.as_array().map(Vec::len), Some(1), "{told}");
    assert_eq!(told[0]["name"], "not-configured beta", "{told}");
    let text = told[0]["text"].as_str().unwrap();
    for part in [
        "1 restore point",
        deadline.as_str().unwrap(),
        "id = \"beta\"",
    ] {
        assert!(text.contains(part), "{part:?} in {text}");
    }
    for line in [&["status"][..], &["prune"], &["run"]] {
        let ran = host.vmkeep(line, night(1));
        ran.exits(0)
            .says("beta: in the store and not in the configuration");
        // People have it in their own time.
        assert!(!ran.stdout.contains(deadline.as_str().unwrap()), "{ran}");
    }
    // Damage makes nothing of it a stranger's, which somebody may remove.
    let first = host.customer_folder("beta").join("ledger");
    let first = std::fs::read_dir(first)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let first = first.min().expect("an entry");
    let sound = std::fs::read(&first).unwrap();
    let mut damaged = sound.clone();
    damaged[sound.len() / 2] ^= 1;
    std::fs::write(&first, damaged).unwrap();
    let status = host.vmkeep(&["status"], night(1));
    status.exits(4).says("nobody can tell what is there");
    assert!(!status.stdout.contains("remove"), "{status}");
    std::fs::write(&first, sound).unwrap();
    for number in 2..=6 {
        host.vmkeep(&["run"], night(number)).exits(0);
    }
    let over = night(7) + SignedDuration::from_hours(1);
    for line in [&["run"][..], &["status"], &["prune"]] {
        host.vmkeep(line, over)
            .exits(4)
            .says("is kept over its maximum since");
    }
    host.vmkeep(&["prune"], over)
        .exits(4)
        .says("put back [[customer]] id = \"beta\"");

    // Without a VM it is emptied. Nothing has told the time in its ledger for a week.
    host.configure(&with(vec![acme(), beta(Vec::new())]));
    let pruned = host.json(&["prune", "--trust-clock"], over);
    let certificate = &pruned["customers"][1]["certificate"];
    assert_eq!(certificate["destroyed"], 1, "{pruned}");
    assert_eq!(pruned["outside"], json!([]));
    // Then nobody needs to hear of it, and the evidence is left.
    host.configure(&with(vec![acme()]));
    let run = host.json(&["run"], night(8));
    assert_eq!(run["outside"], json!([]));
    host.vmkeep(&["status"], night(8)).exits(0);
    let left = std::fs::read_dir(host.customer_folder("beta")).unwrap();
    let mut left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["certificates", "key", "ledger"]);
}
