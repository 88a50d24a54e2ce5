//! Running guests in real QEMU, backed up over QMP by the shipped program. Each point is compared
//! with independent copies that QEMU makes at the very instant, while the guest stands still.

#![forbid(unsafe_code)]

use vmkeep_test_support as support;

use serde_json::json;
use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::live::{LIMIT, Scene, SceneOptions, until};
use support::tool;

#[test]
fn an_agent_killed_at_any_command_leaves_a_guest_that_writes_on_and_an_exact_next_night() {
    let mut scene = Scene::new(&SceneOptions::default());
    let full = scene.backup(&[]);
    scene.assert_exact(&full);
    let mut step = 0;
    loop {
        scene.next_night();
        let (seen, count) = (Arc::new(Mutex::new(None)), Arc::new(Mutex::new(0)));
        let (sink, counter) = (seen.clone(), count.clone());
        let killed: Arc<Mutex<Option<u32>>> = Arc::default();
        let victim = killed.clone();
        scene.proxy.set(move |command| {
            let mut count = counter.lock().unwrap();
            if *count == step {
                let agent = until("the agent", Duration::from_secs(10), || {
                    *victim.lock().unwrap()
                });
                tool("kill", &["-9", &agent.to_string()]);
                *sink.lock().unwrap() = Some(command["execute"].clone());
            }
            *count += 1;
            command
        });
        let running = scene.host.start(&["backup", "db01"], scene.now);
        *killed.lock().unwrap() = Some(running.id());
        let ran = running.ended();
        scene.proxy.pass();
        let Some(at) = seen.lock().unwrap().take() else {
            ran.exits(0);
            break;
        };
        assert!(ran.was_killed(), "{at}: {}", ran.stderr);
        println!("killed at command {step}, {at}");
        // The guard lets it go on.
        until("the guest to run", Duration::from_secs(40), || {
            (scene.vm.status() == "running").then_some(())
        });
        scene.vm.wait_for_progress(10);
        // Not after each: the nights between are the same for the guest.
        step += 2;
        let night = scene.backup(&[]);
        assert_eq!(
            (night.kind(), night.notes().as_str()),
            ("incremental", "[]"),
            "killed at {at}"
        );
        scene.assert_exact(&night);
        scene.assert_clean();
    }
    assert!(step > 20, "only {step} commands");
}

#[test]
fn a_full_overlay_fails_the_backup_and_never_the_guest() {
    let mut scene = Scene::new(&SceneOptions {
        host_keys: "overlay_size = \"1 MiB\"",
        ..SceneOptions::default()
    });
    let write = |scene: &Scene, how: &str| {
        let line = format!("dd if=/dev/urandom of=/mnt/vda/big bs=1M count=6 {how} 2>/dev/null");
        let (code, _) = scene.vm.console().shell(&line);
        assert_eq!(code, 0, "the guest can write");
    };
    write(&scene, "conv=fsync");
    let full = scene.backup(&[]);
    scene.assert_exact(&full);
    scene.next_night();
    scene.vm.wait_for_progress(10);
    // The agent stands still after the instant, until the guest has overwritten enough.
    let before = scene.vm.seq();
    let progress = scene.host.path("vm/full");
    let marker = progress.clone();
    scene.proxy.set(move |command| {
        if command["execute"] == "nbd-server-start" {
            fs::write(&marker, "x").unwrap();
            until("the test", Duration::from_secs(120), || {
                (!marker.exists()).then_some(())
            });
        }
        command
    });
    let running = scene.host.start(&["backup", "--full", "db01"], scene.now);
    until("the instant", Duration::from_secs(60), || {
        progress.exists().then_some(())
    });
    write(&scene, "conv=notrunc,fsync");
    fs::remove_file(&progress).unwrap();
    let ran = running.ended();
    ran.exits(1).says("the overlay ran full");
    scene.proxy.pass();
    assert_eq!(scene.vm.status(), "running");
    assert!(scene.vm.wait_for_progress(10) > before);
    let night = scene.backup(&[]);
    night.assert_tracked();
    scene.assert_exact(&night);
    scene.assert_clean();
}

#[test]
fn a_guest_on_io_threads_is_fleeced_by_jobs_and_a_full_overlay_is_given_up_in_time() {
    let mut scene = Scene::new(&SceneOptions {
        host_keys: "overlay_size = \"4 MiB\"",
        iothread: true,
        between_exports: true,
        ..SceneOptions::default()
    });
    let write = |scene: &Scene, how: &str| {
        let line = format!("dd if=/dev/urandom of=/mnt/vdb/big bs=1M count=8 {how} 2>/dev/null");
        let (code, _) = scene.vm.console().shell(&line);
        assert_eq!(code, 0, "the guest can write");
    };
    write(&scene, "conv=fsync");
    let full = scene.backup(&[]);
    scene.assert_exact(&full);
    scene.assert_clean();
    for _ in 0..2 {
        scene.next_night();
        scene.vm.wait_for_progress(20);
        let night = scene.backup(&[]);
        night.assert_tracked();
        scene.assert_exact(&night);
        scene.assert_clean();
    }

    // The overlay runs full before anything is read.
    scene.next_night();
    let exports = scene.exports.clone().unwrap();
    exports.hold();
    scene.watch(|command| command);
    let running = scene.start_backup(&["--full"]);
    until("a read", LIMIT, || exports.is_waited_for().then_some(()));
    write(&scene, "conv=notrunc,fsync");
    until("the jobs to be given up", LIMIT, || {
        let jobs = scene.vm.qmp(&json!({"execute": "query-jobs"}));
        (jobs == json!([])).then_some(())
    });
    exports.let_go();
    running.ended().exits(1).says("the overlay ran full");
    scene.proxy.pass();
    assert_eq!(scene.vm.status(), "running");
    scene.vm.wait_for_progress(10);
    let night = scene.backup(&[]);
    night.assert_tracked();
    scene.assert_exact(&night);
    scene.assert_clean();
}

#[test]
fn a_frozen_guest_is_thawed_whoever_dies_and_the_point_says_how_it_was() {
    let mut scene = Scene::new(&SceneOptions {
        own: "guest_agent = \"AGENT\"\nfsfreeze = \"require\"",
        agent: true,
        ..SceneOptions::default()
    });
    let full = scene.backup(&[]);
    scene.assert_exact(&full);
    let points = scene.host.points(scene.now);
    assert_eq!(points[0]["consistency"], "filesystem");

    // Both the agent and its guard are killed while the guest is frozen and paused.
    scene.next_night();
    let agent: Arc<Mutex<Option<u32>>> = Arc::default();
    let victim = agent.clone();
    let mut done = false;
    scene.proxy.set(move |command| {
        if command["execute"] == "cont" && !done {
            done = true;
            let agent = until("the agent", Duration::from_secs(10), || {
                *victim.lock().unwrap()
            });
            let children = tool("pgrep", &["-P", &agent.to_string()]);
            for process in children
                .split_whitespace()
                .chain([agent.to_string().as_str()])
            {
                tool("kill", &["-9", process]);
            }
            return json!({"execute": "query-status", "id": 0});
        }
        command
    });
    let running = scene.host.start(&["backup", "db01"], scene.now);
    *agent.lock().unwrap() = Some(running.id());
    assert!(running.ended().was_killed());
    scene.proxy.pass();
    assert_eq!(scene.vm.status(), "paused");
    let night = scene.backup(&[]);
    night.assert_tracked();
    scene.assert_exact(&night);
    scene.vm.wait_for_progress(10);

    // Only the agent: the guard thaws, without any next run.
    scene.next_night();
    let agent: Arc<Mutex<Option<u32>>> = Arc::default();
    let victim = agent.clone();
    scene.proxy.set(move |command| {
        if command["execute"] == "stop" {
            let agent = until("the agent", Duration::from_secs(10), || {
                *victim.lock().unwrap()
            });
            tool("kill", &["-9", &agent.to_string()]);
        }
        command
    });
    let running = scene.host.start(&["backup", "db01"], scene.now);
    *agent.lock().unwrap() = Some(running.id());
    assert!(running.ended().was_killed());
    scene.proxy.pass();
    until("the guest to run", Duration::from_secs(40), || {
        (scene.vm.status() == "running").then_some(())
    });
    scene.vm.wait_for_progress(10);
    let night = scene.backup(&[]);
    night.assert_tracked();
    scene.assert_exact(&night);
}
