//! Seven nights of one running guest, to which everything happens that happens to guests; the agent
//! is killed in each of them, and what it did not do is done by the next attempt.

#![forbid(unsafe_code)]

use vmkeep_test_support as support;

use serde_json::json;
use support::live::{DISK, Format, Image, Scene, SceneOptions};
use support::{path_text, tool};

/// A snapshot that the host takes: the top of the chain is another image.
fn take_external_snapshot(scene: &Scene, size: u64) {
    let overlay = scene.folder().join("snap.qcow2");
    tool(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            path_text(&overlay),
            &size.to_string(),
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
}

/// The night after a killed attempt: exact, and it says which disks were read in full, and why.
#[track_caller]
fn assert_night(scene: &mut Scene, killed_at: &'static str, in_full: &[(&str, &str)]) {
    println!("{}: killed at {killed_at}", scene.now);
    scene.backup_killed_at(killed_at);
    scene.vm.wait_for_progress(20);
    let night = scene.backup(&[]);
    night.assert_read_in_full(in_full);
    scene.assert_exact(&night);
    scene.assert_clean();
}

#[test]
fn seven_nights_of_a_running_guest_are_exact_whatever_happens_to_it_and_to_the_agent() {
    let mut scene = Scene::new(&SceneOptions::default());

    // 1: the first, of which nothing is known. An attempt that was killed is no point.
    scene.backup_killed_at("blockdev-add");
    let full = scene.backup(&[]);
    assert_eq!(full.kind(), "full");
    scene.assert_exact(&full);
    scene.assert_clean();

    // 2: a reboot is the same QEMU, so both disks are tracked on.
    scene.next_night();
    scene.vm.reboot();
    scene.vm.wait_for_progress(20);
    scene.backup_killed_at("stop");
    let night = scene.backup(&[]);
    night.assert_tracked();
    assert!(night.read_bytes() < 2 * DISK / 4, "{}", night.document);
    scene.assert_exact(&night);
    scene.assert_clean();

    // 3: shut down and started. A raw image keeps no bitmap.
    scene.next_night();
    scene.vm.quit();
    scene.vm.restart();
    scene.vm.wait_ready();
    scene.vm.wait_for_progress(20);
    let gone = ("vd1", "this image cannot store one, and QEMU was restarted");
    assert_night(&mut scene, "transaction", &[gone]);

    // 4: killed, so nobody knows what was written last.
    scene.next_night();
    scene.vm.kill9();
    scene.vm.restart();
    scene.vm.wait_ready();
    scene.vm.wait_for_progress(20);
    let killed = ("vd0", "QEMU was killed");
    assert_night(&mut scene, "cont", &[killed, gone]);

    // 5: grown while it runs.
    scene.next_night();
    let size = DISK + (16 << 20);
    scene
        .vm
        .qmp(&json!({"execute": "block_resize", "arguments": {
            "node-name": "d0", "size": size,
        }}));
    let grown = ("vd0", "its size changed");
    assert_night(&mut scene, "nbd-server-start", &[grown]);

    // 6: a disk is added.
    scene.next_night();
    let third = Image::empty(scene.folder().join("c.raw"), DISK / 2, Format::Raw);
    scene.plug(2, &third, "vdc");
    scene.write_noise("vdc", 7);
    assert_night(&mut scene, "block-export-add", &[("vd2", "a new disk")]);

    // 7: a snapshot was taken.
    scene.next_night();
    take_external_snapshot(&scene, size);
    scene.write_noise("vdc", 9);
    let snapshot = ("vd0", "a snapshot was taken");
    assert_night(&mut scene, "block-export-add", &[snapshot]);

    // Then a quiet one, and the weekly full, which finds that all bitmaps were honest.
    for arguments in [&[][..], &["--full"]] {
        scene.next_night();
        scene.vm.wait_for_progress(20);
        let night = scene.backup(arguments);
        match arguments {
            [] => night.assert_tracked(),
            _ => {
                assert_eq!(night.document["audit"]["result"], "clean");
                let disks = night.document["audit"]["disks"].as_array();
                assert_eq!(disks.map(Vec::len), Some(3));
            }
        }
        scene.assert_exact(&night);
    }

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
    night.assert_read_in_full(&[("vd0", ""), ("vd1", ""), ("vd2", "")]);
    scene.assert_exact(&night);
    scene.assert_every_point_exact();
}
