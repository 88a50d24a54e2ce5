//! A configured policy that differs from the one in the ledger.

use vmkeep_test_support as support;

use jiff::SignedDuration;
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
        for part in ["acme: the configured policy is shorter", "prune --confirm"] {
            assert!(ran.stdout.contains(part), "{part:?} in\n{ran}");
        }
    }
    for document in [foreseen_document, run_document] {
        let acme = &document["customers"][0];
        assert_eq!(acme["policy"], "needs-confirmation", "{acme}");
        assert!(acme["policy_nights"]["web01"].as_u64() > Some(1), "{acme}");
        assert!(acme["policy_refused"].is_null(), "{acme}");
    }
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
    let going = plan.iter().filter(|row| row["action"] != "keep").count();
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
