//! Running guests in real QEMU, backed up over QMP by the shipped program. Each point is compared
//! with independent copies that QEMU makes at the very instant, while the guest stands still.

#![forbid(unsafe_code)]

mod support;

use serde_json::json;
use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::live::{DISK, Scene, SceneOptions, until};
use support::{path_text, tool};

#[test]
fn nights_of_a_running_guest_are_exact_whatever_happens_to_it() {
    let mut scene = Scene::new(&SceneOptions::default());

    let full = scene.backup(&[]);
    assert_eq!(full.kind(), "full");
    scene.assert_exact(&full);
    scene.assert_clean();

    scene.next_night();
    scene.vm.wait_for_progress(50);
    let night = scene.backup(&[]);
    assert_eq!(night.kind(), "incremental");
    assert_eq!(night.notes(), "[]");
    assert!(night.read_bytes() < 2 * DISK / 4, "{}", night.document);
    scene.assert_exact(&night);
    scene.assert_clean();

    // Reboot: the same QEMU, so both disks are tracked on.
    scene.next_night();
    scene.vm.reboot();
    scene.vm.wait_for_progress(20);
    let night = scene.backup(&[]);
    night.assert_tracked();
    scene.assert_exact(&night);

    // Shut down and started: a raw image keeps no bitmap.
    scene.next_night();
    scene.vm.quit();
    scene.vm.restart();
    scene.vm.wait_ready();
    scene.vm.wait_for_progress(20);
    let night = scene.backup(&[]);
    assert_eq!(night.kind(), "incremental");
    assert!(
        night.notes().contains("vd1: read in full"),
        "{}",
        night.notes()
    );
    assert!(!night.notes().contains("vd0: read"), "{}", night.notes());
    scene.assert_exact(&night);

    // Killed: nobody knows what was written last.
    scene.next_night();
    scene.vm.wait_for_progress(20);
    scene.vm.kill9();
    scene.vm.restart();
    scene.vm.wait_ready();
    scene.vm.wait_for_progress(20);
    let night = scene.backup(&[]);
    assert!(
        night.notes().contains("vd0: read in full"),
        "{}",
        night.notes()
    );
    assert!(
        night.notes().contains("vd1: read in full"),
        "{}",
        night.notes()
    );
    scene.assert_exact(&night);

    // Grown while it runs.
    scene.next_night();
    scene
        .vm
        .qmp(&json!({"execute": "block_resize", "arguments": {
            "node-name": "d0", "size": DISK + (16 << 20),
        }}));
    let night = scene.backup(&[]);
    assert!(
        night
            .notes()
            .contains("vd0: read in full (its size changed"),
        "{}",
        night.notes()
    );
    assert!(!night.notes().contains("vd1"), "{}", night.notes());
    scene.assert_exact(&night);

    // A snapshot: the top of the chain is another image.
    scene.next_night();
    let overlay = scene.host.path("vm/snap.qcow2");
    tool(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            path_text(&overlay),
            &(DISK + (16 << 20)).to_string(),
        ],
    );
    scene
        .vm
        .qmp(&json!({"execute": "blockdev-add", "arguments": {
            "driver": "qcow2", "node-name": "snap", "backing": null,
            "file": {"driver": "file", "filename": overlay},
        }}));
    scene
        .vm
        .qmp(&json!({"execute": "blockdev-snapshot", "arguments": {
            "node": "d0", "overlay": "snap",
        }}));
    scene.vm.wait_for_progress(20);
    let night = scene.backup(&[]);
    assert!(
        night
            .notes()
            .contains("vd0: read in full (its bitmap is gone"),
        "{}",
        night.notes()
    );
    scene.assert_exact(&night);

    scene.next_night();
    scene.vm.wait_for_progress(20);
    let night = scene.backup(&[]);
    night.assert_tracked();
    scene.assert_exact(&night);

    // A weekly full is held against the bitmaps, and they were honest.
    scene.next_night();
    scene.vm.wait_for_progress(20);
    let full = scene.backup(&["--full"]);
    assert_eq!(full.kind(), "full");
    assert_eq!(
        full.document["audit"]["disks"].as_array().map(Vec::len),
        Some(2)
    );
    assert_eq!(full.document["audit"]["result"], "clean");
    scene.assert_exact(&full);

    // Tracking given up: nothing of ours is left, and the next night is a full read.
    let released = scene
        .host
        .vmkeep(&["tracking", "release", "db01"], scene.now);
    released.exits(0).says("released bitmap");
    let nodes = scene.vm.qmp(&json!({"execute": "query-named-block-nodes"}));
    for node in nodes.as_array().unwrap() {
        let is_free = !node["dirty-bitmaps"].to_string().contains("vmkeep-");
        assert!(is_free || node["ro"] == true, "{node}");
    }
    scene.next_night();
    let night = scene.backup(&[]);
    assert!(
        night.notes().contains("vd0: read in full"),
        "{}",
        night.notes()
    );
    scene.assert_exact(&night);
}

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

    // The overlay runs full while the agent stands still before it reads.
    scene.next_night();
    let marker = scene.host.path("vm/full");
    let seen = marker.clone();
    scene.proxy.set(move |command| {
        if command["execute"] == "nbd-server-start" {
            fs::write(&seen, "x").unwrap();
        }
        command
    });
    let running = scene.host.start(&["backup", "--full", "db01"], scene.now);
    until("the instant", Duration::from_secs(60), || {
        marker.exists().then_some(())
    });
    tool("kill", &["-STOP", &running.id().to_string()]);
    write(&scene, "conv=notrunc,fsync");
    tool("kill", &["-CONT", &running.id().to_string()]);
    let ran = running.ended();
    // It may have read everything before it was stopped.
    if ran.code() != Some(0) {
        ran.exits(1).says("the overlay ran full");
    }
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
