//! A server that is killed and comes back while vmkeep works.

use vmkeep_test_support as support;

use jiff::{SignedDuration, Timestamp};
use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};
use support::s3::{Proxy, Server, server};
use support::{Guest, Host, HostOptions, Random, Running, time};

/// Kills the gateway as soon as so many requests have passed, again and again, until the command ends.
fn killed_while(server: &Server, proxy: &Proxy, mut running: Running, each: usize) -> u32 {
    let kills = AtomicU32::new(0);
    proxy.start_over([]);
    let mut next = each;
    while running.is_running() {
        if proxy.passed().len() >= next && kills.load(Ordering::Relaxed) < 3 {
            server.kill_gateway();
            kills.fetch_add(1, Ordering::Relaxed);
            next = proxy.passed().len() + each;
        }
        std::thread::yield_now();
    }
    running.ended().exits(0);
    kills.into_inner()
}

#[test]
fn a_server_that_is_killed_and_comes_back_costs_time_and_nothing_else() {
    let server = server();
    let bucket = server.bucket();
    let proxy = Proxy::before(&server.endpoint);
    let mut random = Random::new(0x6b11_5e7e);
    let host = Host::new(&HostOptions {
        policy: "timezone = \"UTC\"\nwindow = \"22:00-06:00\"\nmax_retention = \"7 days\"",
        bucket: Some(
            bucket
                .config("vmkeep")
                .replace(&server.endpoint, &proxy.endpoint),
        ),
        ..HostOptions::default()
    });
    let mut guest = Guest::new(host.image("web01", "vda"), 24 << 20, &mut random);
    let start: Timestamp = time("2025-03-03T23:00:00Z");
    host.vmkeep(&["init", "--yes"], start).exits(0);
    let mut kills = [0; 3];
    for night in 0..12 {
        let at = start + SignedDuration::from_hours(24 * night);
        guest.work(200, &mut random);
        let backup = host.start(&["backup", "web01"], at);
        kills[0] += killed_while(server, &proxy, backup, 9);
        let prune = host.start(&["prune"], at);
        kills[1] += killed_while(server, &proxy, prune, 9);
        let target = host.path("restored");
        let to = target.to_str().unwrap();
        let arguments = ["restore", "web01", "--at", "latest", "--to", to];
        let restore = host.start(&arguments, at);
        kills[2] += killed_while(server, &proxy, restore, 9);
        let restored = fs::read(target.join("vda.raw")).unwrap();
        assert!(
            restored == guest.content(),
            "night {night}: other bytes came back"
        );
        fs::remove_dir_all(&target).unwrap();
    }
    println!("{kills:?} kills during backups, prunes and restores");
    assert!(kills.iter().all(|kills| *kills >= 12), "{kills:?}");
    let at = start + SignedDuration::from_hours(24 * 11);
    host.vmkeep(&["verify", "--read-data"], at).exits(0);
    host.vmkeep(&["status"], at).exits(0);
    let later = at + SignedDuration::from_hours(24);
    let pruned = &host.json(&["prune"], later)["customers"][0];
    assert_eq!(pruned["unexplained"], serde_json::json!([]), "{pruned}");
    assert!(pruned["certificate"]["id"].is_string(), "{pruned}");
    assert_eq!(bucket.uploads(), [] as [String; 0]);
}
