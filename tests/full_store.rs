//! A store that has no room: every amount of free space from none to enough.

use vmkeep_test_support as support;

use jiff::{SignedDuration, Timestamp};
use std::path::{Path, PathBuf};
use support::{Guest, Host, HostOptions, Picture, Random, path_text, time, tool};
use tempfile::TempDir;

const STEP_BYTES: u64 = 16 << 10;
const CHANGED_BYTES: u64 = 1 << 20;

/// A file system of a size that can be changed, gone with this value.
struct Small {
    folder: TempDir,
}

impl Small {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = path_text(folder.path());
        tool(
            "mount",
            &["-t", "tmpfs", "-o", "size=64m", "vmkeep-test", path],
        );
        Small { folder }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn used_bytes(&self) -> u64 {
        let found = rustix::fs::statvfs(self.path()).unwrap();
        (found.f_blocks - found.f_bfree) * found.f_frsize
    }

    fn leave(&self, free_bytes: u64) {
        let size = format!("remount,size={}", self.used_bytes() + free_bytes);
        tool("mount", &["-o", &size, path_text(self.path())]);
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Lazily: a failed test may still hold files open.
        tool("umount", &["-l", path_text(self.folder.path())]);
    }
}

struct Scene {
    host: Host,
    disk: Small,
    guest: Guest,
    random: Random,
    at: Timestamp,
    /// The newest point's content.
    kept: Picture,
}

impl Scene {
    fn new() -> Self {
        let disk = Small::new();
        let store: PathBuf = disk.path().join("store");
        let host = Host::new(&HostOptions {
            policy: "timezone = \"UTC\"\nwindow = \"22:00-06:00\"\nmax_retention = \"7 days\"",
            store: Some(store),
            ..HostOptions::default()
        });
        let mut random = Random::new(0xf0_11);
        // All of it changes: what a night wrote dies whole, and needs no rewriting.
        let guest = Guest::new(host.image("web01", "vda"), CHANGED_BYTES, &mut random);
        let at = time("2031-02-10T23:00:00Z");
        host.vmkeep(&["init", "--yes"], at).exits(0);
        host.vmkeep(&["backup", "web01"], at).exits(0);
        let kept = guest.picture();
        Scene {
            host,
            disk,
            guest,
            random,
            at,
            kept,
        }
    }

    /// The newest point is whole, whatever else was tried.
    fn is_whole(&self) {
        let restored = self.host.restore("web01", "latest", self.at);
        let found = Picture::of_file(&restored.path().join("vda.raw"));
        assert!(found == self.kept);
    }

    fn change(&mut self) {
        let noise = self.random.noise(CHANGED_BYTES as usize);
        self.guest.write(0, &noise);
        self.at += SignedDuration::from_mins(10);
    }
}

#[test]
fn a_backup_that_finds_no_room_fails_and_leaves_the_older_points_whole_at_every_size() {
    let mut scene = Scene::new();
    scene.change();
    let mut failed = 0;
    for step in 0.. {
        scene.at += SignedDuration::from_secs(10);
        scene.disk.leave(step * STEP_BYTES);
        let ran = scene.host.vmkeep(&["backup", "web01"], scene.at);
        if ran.code() == Some(0) {
            break;
        }
        ran.exits_with_one_of(&[1, 3]).says("no space").one_error();
        failed += 1;
        if step % 8 == 0 {
            scene.is_whole();
        }
        // What it left is found and removed although there is no room.
        if step % 4 == 0 {
            scene.disk.leave(0);
            scene.host.vmkeep(&["prune"], scene.at).exits(0);
        }
        assert!(step * STEP_BYTES < 8 * CHANGED_BYTES, "it must fit by now");
    }
    println!("{failed} sizes were too small");
    assert!(failed as u64 > CHANGED_BYTES / STEP_BYTES);
    scene.kept = scene.guest.picture();
    scene.is_whole();
    scene
        .host
        .vmkeep(&["verify", "--read-data"], scene.at)
        .exits(0);
    scene.host.vmkeep(&["ledger", "verify"], scene.at).exits(0);
}

#[test]
fn a_prune_makes_room_on_a_store_that_has_none() {
    let mut scene = Scene::new();
    for _ in 0..5 {
        scene.change();
        scene.at += SignedDuration::from_hours(24);
        scene.host.vmkeep(&["backup", "web01"], scene.at).exits(0);
    }
    scene.kept = scene.guest.picture();
    let before = scene.disk.used_bytes();
    // The first points are past their maximum, and each byte of the disk is taken.
    scene.disk.leave(0);
    for _ in 0..2 {
        scene.at += SignedDuration::from_hours(30);
        scene.host.vmkeep(&["prune"], scene.at).exits(0);
    }
    let after = scene.disk.used_bytes();
    assert!(
        after + CHANGED_BYTES < before,
        "{before} bytes before, {after} after"
    );
    scene.is_whole();
    scene.disk.leave(8 << 20);
    scene.change();
    scene.host.vmkeep(&["backup", "web01"], scene.at).exits(0);
    scene.kept = scene.guest.picture();
    scene.is_whole();
}

#[test]
fn a_run_backs_up_what_it_made_room_for_itself() {
    let mut scene = Scene::new();
    for _ in 0..5 {
        scene.change();
        scene.at += SignedDuration::from_hours(24);
        scene.host.vmkeep(&["backup", "web01"], scene.at).exits(0);
    }
    // The first point is over, with a megabyte that no other has; the next one finds no room beside it.
    scene.change();
    scene.at += SignedDuration::from_hours(30);
    scene.disk.leave(CHANGED_BYTES / 2);
    scene
        .host
        .vmkeep(&["-v", "run"], scene.at)
        .exits(0)
        .says("acme/web01: not backed up: ")
        .says("no space");
    scene.kept = scene.guest.picture();
    scene.is_whole();
}
