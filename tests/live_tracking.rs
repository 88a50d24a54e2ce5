//! Tracking of changes that lies, and disks that come, go and move while a real guest runs: every
//! night is exact or alarmed, and says which disks were read in full, and why.

#![forbid(unsafe_code)]

use vmkeep_test_support as support;

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use support::live::{DISK, Format, Image, LIMIT, Scene, SceneOptions, Vm, add_monitor, until};
use support::{Random, path_text};

/// What a bitmap tells apart.
const GRANULE: u64 = 65536;

/// Writes noise to the disk that has no file system.
fn write_bare(scene: &Scene, first: u64, granules: u64) {
    scene.shell(&format!(
        "dd if=/dev/urandom of=/dev/vdc bs={GRANULE} seek={first} count={granules} \
         conv=notrunc,fsync 2>/dev/null"
    ));
}

/// Where two images of the same size differ: the granules.
fn differing(one: &Path, other: &Path) -> Vec<u64> {
    let (one, other) = (std::fs::read(one).unwrap(), std::fs::read(other).unwrap());
    assert_eq!(one.len(), other.len());
    let pairs = one
        .chunks(GRANULE as usize)
        .zip(other.chunks(GRANULE as usize));
    (0..)
        .zip(pairs)
        .filter(|(_, (one, other))| one != other)
        .map(|(at, _)| at)
        .collect()
}

fn suspects(scene: &Scene) -> Vec<(String, bool)> {
    let points = scene.host.points(scene.now);
    let of = |point: &Value| {
        let kind = point["kind"].as_str().unwrap().to_owned();
        (kind, point["suspect"].as_bool().unwrap())
    };
    points.iter().map(of).collect()
}

#[test]
fn a_bitmap_that_hides_a_change_is_told_at_the_next_full_on_every_seed() {
    let mut scene = Scene::new(&SceneOptions {
        bare_disk: true,
        between_exports: true,
        guest: "pause_us=5000",
        ..SceneOptions::default()
    });
    let first = scene.backup(&["--full"]);
    scene.assert_exact(&first);
    // The control: what stands in between changes nothing, and nothing is alarmed.
    for full in [false, false, true] {
        scene.next_night();
        write_bare(&scene, 3, 5);
        scene.vm.wait_for_progress(5);
        let night = scene.backup(if full { &["--full"] } else { &[] });
        match full {
            false => night.assert_tracked(),
            true => assert_eq!(night.document["audit"]["result"], "clean"),
        }
        scene.assert_exact(&night);
    }
    let exports = scene.exports.clone().unwrap();
    assert!(exports.connections() >= 4 * 3);
    assert!(suspects(&scene).iter().all(|(_, suspect)| !suspect));
    scene.host.vmkeep(&["status"], scene.now).exits(0);

    for seed in 1..=5 {
        let mut random = Random::new(seed);
        // In one of two nights some of what was written is hidden, and stays as it is then.
        let nights = 1 + random.below(2);
        let lying = random.below(nights);
        let written = 1 + random.below(6);
        let start = random.below(DISK / GRANULE - written);
        let hidden = 1 + random.below(written);
        let hidden_start = start + random.below(written - hidden + 1);
        for number in 0..nights {
            scene.next_night();
            scene.vm.wait_for_progress(5);
            if number == lying {
                write_bare(&scene, start, written);
                exports.hide("vd2", hidden_start * GRANULE, hidden * GRANULE);
            }
            let night = scene.backup(&[]);
            night.assert_tracked();
            let restored = scene.host.restore("db01", "latest", scene.now);
            for (id, copy) in &night.copies {
                let found = differing(&restored.path().join(format!("{id}.raw")), copy);
                let expected: Vec<u64> = match id.as_str() {
                    "vd2" if number >= lying => (hidden_start..hidden_start + hidden).collect(),
                    _ => Vec::new(),
                };
                assert_eq!(found, expected, "{id}, seed {seed}, night {number}");
            }
            if number == lying {
                assert_eq!(exports.be_honest(), hidden * GRANULE, "seed {seed}");
            }
        }

        scene.next_night();
        let full = scene.backup_that_exits(4, &["--full"]);
        assert_eq!(full.document["audit"]["result"], "differs", "seed {seed}");
        assert_eq!(
            full.document["audit"]["disks"],
            json!([
                {"name": "vd0", "differing_bytes": 0},
                {"name": "vd1", "differing_bytes": 0},
                {"name": "vd2", "differing_bytes": hidden * GRANULE},
            ]),
            "seed {seed}"
        );
        scene.assert_exact(&full);
        let points = suspects(&scene);
        let (last, week) = points.split_last().unwrap();
        assert_eq!(*last, ("full".to_owned(), false), "seed {seed}");
        let (week, before) = (
            &week[week.len() - nights as usize..],
            &week[week.len() - nights as usize - 1],
        );
        assert!(
            week.iter()
                .all(|point| *point == ("incremental".to_owned(), true)),
            "seed {seed}: {points:?}"
        );
        assert!(!before.1, "the point the week stands on, seed {seed}");
        scene
            .host
            .vmkeep(&["status"], scene.now)
            .exits(4)
            .says("tracking of db01/vd2 hid changes");

        // Not asked for, but a full: only a clean audit brings incrementals back.
        scene.next_night();
        scene.vm.wait_for_progress(5);
        let forced = scene.backup(&[]);
        assert_eq!(forced.kind(), "full", "seed {seed}");
        assert!(
            forced.notes().contains("tracking of changes hid some"),
            "{}",
            forced.notes()
        );
        assert_eq!(forced.document["audit"]["result"], "clean", "seed {seed}");
        scene.assert_exact(&forced);
    }
    scene.next_night();
    scene.vm.wait_for_progress(5);
    let night = scene.backup(&[]);
    night.assert_tracked();
    scene.assert_exact(&night);
}

fn unplug(scene: &Scene, number: usize) {
    let device = format!("vd{number}");
    scene
        .vm
        .qmp(&json!({"execute": "device_del", "arguments": {"id": device}}));
    until("the guest to let go of a disk", LIMIT, || {
        let event = scene.vm.wait_event("DEVICE_DELETED");
        (event["data"]["device"] == device.as_str()).then_some(())
    });
    // Where its device has gone, the node follows in a moment.
    until("the node to be free", LIMIT, || {
        scene
            .vm
            .try_qmp(&json!({"execute": "blockdev-del", "arguments": {
                "node-name": format!("d{number}"),
            }}))
            .ok()
    });
}

#[test]
fn a_disk_that_comes_or_is_exchanged_is_read_in_full_alone_and_one_that_goes_is_told() {
    let mut scene = Scene::new(&SceneOptions {
        guest: "pause_us=5000",
        ..SceneOptions::default()
    });
    let night = scene.backup(&[]);
    scene.assert_exact(&night);

    // One comes: its device and its node are new.
    scene.next_night();
    let third = Image::empty(scene.folder().join("c.raw"), DISK / 2, Format::Raw);
    scene.plug(2, &third, "vdc");
    scene.write_noise("vdc", 7);
    let night = scene.backup(&[]);
    night.assert_read_in_full(&[("vd2", "a new disk")]);
    scene.assert_exact(&night);
    scene.assert_clean();

    scene.next_night();
    scene.write_noise("vdc", 9);
    let night = scene.backup(&[]);
    night.assert_tracked();
    scene.assert_exact(&night);

    // One goes, and another one comes under another name.
    scene.next_night();
    unplug(&scene, 2);
    let fourth = Image::empty(scene.folder().join("d.qcow2"), DISK / 2, Format::Qcow2);
    scene.plug(3, &fourth, "vdc");
    scene.write_noise("vdc", 1);
    let night = scene.backup(&[]);
    night.assert_read_in_full(&[("vd3", "a new disk")]);
    assert!(
        night.notes().contains("vd2: not in this point"),
        "{}",
        night.notes()
    );
    scene.assert_exact(&night);

    // Exchanged by a raw image of the same size, under the same names.
    scene.next_night();
    unplug(&scene, 3);
    let fifth = Image::empty(scene.folder().join("e.raw"), DISK / 2, Format::Raw);
    scene.plug(3, &fifth, "vdc");
    scene.write_noise("vdc", 2);
    let night = scene.backup(&[]);
    night.assert_read_in_full(&[("vd3", "its bitmap is gone")]);
    scene.assert_exact(&night);

    // Back to the image before, which still has the bitmap of a night that is not the newest.
    scene.next_night();
    unplug(&scene, 3);
    scene.plug(3, &fourth, "vdc");
    scene.write_noise("vdc", 4);
    let night = scene.backup(&[]);
    night.assert_read_in_full(&[("vd3", "its bitmap is gone")]);
    scene.assert_exact(&night);
    scene.assert_clean();

    // A copy of the image is kept, and the VM goes on with the original: nothing has changed for it.
    scene.next_night();
    unplug(&scene, 3);
    let kept = scene.folder().join("kept.qcow2");
    std::fs::copy(&fourth.path, &kept).unwrap();
    scene.plug(3, &fourth, "vdc");
    scene.write_noise("vdc", 5);
    let night = scene.backup(&[]);
    night.assert_tracked();
    scene.assert_exact(&night);

    // Rolled back to that copy: its bitmap is of the night before the newest one.
    scene.next_night();
    unplug(&scene, 3);
    let kept = Image {
        path: kept,
        format: Format::Qcow2,
    };
    scene.plug(3, &kept, "vdc");
    scene.write_noise("vdc", 6);
    let night = scene.backup(&[]);
    night.assert_read_in_full(&[("vd3", "its bitmap is gone")]);
    scene.assert_exact(&night);

    scene.next_night();
    scene.write_noise("vdc", 8);
    let night = scene.backup(&[]);
    night.assert_tracked();
    scene.assert_exact(&night);
    scene.assert_every_point_exact();
}

/// How a guest gets to another QEMU on the same images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Migration {
    Live,
    LiveWithBitmaps,
    /// Stopped, saved to a file, and started from it.
    ThroughAFile,
}

/// A QEMU that the guest can go to, and its third monitor.
fn target_of(scene: &Scene, name: &str) -> (Vm, PathBuf) {
    let mut options = scene.vm.options.clone();
    options.name = name.to_owned();
    options.incoming = Some("defer".to_owned());
    let third = add_monitor(&mut options);
    (Vm::start(options), third)
}

/// `migrate` and `migrate-incoming`.
fn order(what: &str, uri: &str) -> Value {
    json!({"execute": what, "arguments": {"uri": uri}})
}

/// Waits until the migration is what it should be, and nothing that it never leaves again.
#[track_caller]
fn wait_for_migration(vm: &Vm, wanted: &str) {
    until("the migration", LIMIT, || {
        let found = vm.qmp(&json!({"execute": "query-migrate"}));
        let status = found["status"].as_str().unwrap_or("none");
        let is_last = ["failed", "completed"].contains(&status);
        assert!(!is_last || status == wanted, "{found}");
        (status == wanted).then_some(())
    });
}

fn migrate(scene: &mut Scene, name: &str, how: Migration) {
    let (target, third) = target_of(scene, name);
    let way = path_text(&scene.folder().join(format!("{name}.m"))).to_owned();
    let uri = match how {
        Migration::ThroughAFile => format!("file:{way}"),
        _ => format!("unix:{way}"),
    };
    for vm in [&scene.vm, &target] {
        let with_bitmaps = how == Migration::LiveWithBitmaps;
        vm.qmp(
            &json!({"execute": "migrate-set-capabilities", "arguments": {
                "capabilities": [{"capability": "dirty-bitmaps", "state": with_bitmaps}],
            }}),
        );
    }
    if how != Migration::ThroughAFile {
        target.qmp(&order("migrate-incoming", &uri));
    }
    scene.vm.qmp(&order("migrate", &uri));
    wait_for_migration(&scene.vm, "completed");
    if how == Migration::ThroughAFile {
        target.qmp(&order("migrate-incoming", &uri));
    }
    go_on_at(scene, target, third);
}

fn go_on_at(scene: &mut Scene, target: Vm, third: PathBuf) {
    until("the guest to run", LIMIT, || {
        (target.status() == "running").then_some(())
    });
    scene.moved_to(target, third);
    scene.vm.wait_for_progress(20);
}

fn limit_migration(vm: &Vm, bytes_a_second: u64) {
    vm.qmp(&json!({"execute": "migrate-set-parameters", "arguments": {
        "max-bandwidth": bytes_a_second,
    }}));
}

#[test]
fn nights_before_and_after_a_migration_are_exact_whether_bitmaps_come_along_or_not() {
    let mut scene = Scene::new(&SceneOptions {
        between_exports: true,
        ..SceneOptions::default()
    });
    let night = scene.backup(&[]);
    scene.assert_exact(&night);

    // A bitmap in the image moves with the image; a raw one has none.
    scene.next_night();
    migrate(&mut scene, "h", Migration::Live);
    let night = scene.backup(&[]);
    night.assert_read_in_full(&[("vd1", "its bitmap is gone")]);
    scene.assert_exact(&night);
    scene.assert_clean();

    scene.next_night();
    migrate(&mut scene, "i", Migration::LiveWithBitmaps);
    let night = scene.backup(&[]);
    night.assert_tracked();
    scene.assert_exact(&night);

    scene.next_night();
    migrate(&mut scene, "j", Migration::ThroughAFile);
    let night = scene.backup(&[]);
    night.assert_read_in_full(&[("vd1", "its bitmap is gone")]);
    scene.assert_exact(&night);

    // A backup would make a migration fail that is under way, so it is not begun.
    scene.next_night();
    let (target, third) = target_of(&scene, "k");
    let uri = format!("unix:{}", path_text(&scene.folder().join("k.m")));
    target.qmp(&order("migrate-incoming", &uri));
    limit_migration(&scene.vm, 100_000);
    scene.vm.qmp(&order("migrate", &uri));
    wait_for_migration(&scene.vm, "active");
    let ran = scene.start_backup(&[]).ended();
    ran.exits(1).says("the VM is being migrated");
    limit_migration(&scene.vm, 1 << 30);
    wait_for_migration(&scene.vm, "completed");
    go_on_at(&mut scene, target, third);
    let night = scene.backup(&[]);
    night.assert_read_in_full(&[("vd1", "its bitmap is gone")]);
    scene.assert_exact(&night);
    scene.assert_clean();

    // One that is begun during a backup fails, and the guest stays, and so does the backup.
    scene.next_night();
    let (target, _) = target_of(&scene, "l");
    let uri = format!("unix:{}", path_text(&scene.folder().join("l.m")));
    target.qmp(&order("migrate-incoming", &uri));
    let exports = scene.exports.clone().unwrap();
    exports.hold();
    scene.watch(|command| command);
    let running = scene.start_backup(&[]);
    until("a read", LIMIT, || exports.is_waited_for().then_some(()));
    scene.vm.qmp(&order("migrate", &uri));
    wait_for_migration(&scene.vm, "failed");
    scene.vm.wait_for_progress(20);
    exports.let_go();
    running.ended().exits(0);
    scene.expect_no_copies();
    scene.assert_clean();

    scene.next_night();
    scene.vm.wait_for_progress(20);
    let night = scene.backup(&[]);
    night.assert_tracked();
    scene.assert_exact(&night);
    scene.assert_every_point_exact();
}
