//! The source for libvirt against a real libvirtd, real QEMUs and a real guest.

use vmkeep_test_support as support;

use jiff::Timestamp;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use support::libvirt::{Daemon, Machine, Store, eventually, reason};
use vmkeep::hypervisor::guard::GuardCommand;
use vmkeep::hypervisor::libvirt::{LibvirtSettings, LibvirtSource, thaw_when_orphaned};
use vmkeep::hypervisor::{
    Capture, CaptureError, CaptureErrorKind, Consistency, Freeze, Hypervisor, Outcome, Reading,
    SinceMark,
};
use vmkeep::model::DiskName;

const OWNER: &str = "ab12cd34";
/// What tells a child process that it is the agent that gets killed, and of what.
const CHILD: &str = "VMKEEP_TEST_LIBVIRT_CHILD";

fn settings(uri: String, domain: &str, folder: &Path, freeze: Freeze) -> LibvirtSettings {
    LibvirtSettings {
        domain: domain.to_string(),
        uri: Some(uri),
        owner: OWNER.to_string(),
        scratch_dir: folder.join("scratch"),
        scratch_reserve_bytes: 1 << 20,
        runtime_dir: folder.join("run"),
        freeze,
        freeze_limit: Duration::from_secs(10),
        guard: None,
        virsh: "virsh".into(),
        now: Timestamp::now(),
    }
}

fn source(machine: &Machine) -> LibvirtSource {
    let uri = machine.daemon.uri();
    let settings = settings(uri, &machine.name, &machine.folder, Freeze::Never);
    LibvirtSource::new(settings).unwrap()
}

fn error(result: Result<Box<dyn Capture>, CaptureError>) -> CaptureError {
    match result {
        Err(error) => error,
        Ok(_) => panic!("the capture was opened"),
    }
}

const BLOCK: u64 = 65536;

#[test]
fn seven_nights_with_an_abandoned_one_and_one_of_unknown_outcome() {
    let machine = Machine::define("nights", false);
    machine.start();
    let source = source(&machine);
    let mut store = Store::default();
    machine.write("vda", 3, 20);
    machine.write("vdc", 0, 2);
    let (before_vda, before_vdc) = (machine.sha256("vda"), machine.sha256("vdc"));

    // Night 1: nothing to build upon. What is written after the instant is not in it.
    let capture = source.open(&[], Reading::Everything).unwrap();
    assert_eq!(capture.consistency(), Consistency::Crash);
    machine.write("vda", 5, 4);
    machine.write("vdc", 1, 3);
    let (first, told) = store.next(&*capture);
    capture.still_consistent().unwrap();
    let (name, definition) = capture.definition().unwrap();
    assert_eq!(name, "domain.xml");
    let definition = String::from_utf8(definition.to_vec()).unwrap();
    assert!(definition.contains("<name>nights</name>"), "{definition}");
    capture.close(Outcome::Committed).unwrap();
    store = first;
    assert!(reason(&told, "vda").contains("does not have this disk"));
    assert_eq!(store.sha256("vda", &machine.folder), before_vda);
    assert_eq!(store.sha256("vdc", &machine.folder), before_vdc);
    assert_eq!(machine.checkpoints().len(), 1);

    // Night 2: what was written since the instant of night 1, not since its end.
    let told = store.night(&source, Outcome::Committed);
    assert_eq!(told["vda"], Ok(4 * BLOCK));
    assert_eq!(told["vdb"], Ok(0));
    assert!(reason(&told, "vdc").contains("raw image"));

    // Night 3 is abandoned, and loses nothing for night 4.
    machine.write("vda", 100, 2);
    let told = store.night(&source, Outcome::Abandoned);
    assert_eq!(told["vda"], Ok(2 * BLOCK));
    assert_eq!(machine.checkpoints().len(), 1);
    machine.write("vda", 200, 1);
    let told = store.night(&source, Outcome::Committed);
    assert_eq!(told["vda"], Ok(3 * BLOCK));

    // Nobody knows of night 5, and there was no point; then there was one.
    machine.write("vda", 300, 2);
    store.night(&source, Outcome::Unknown);
    assert_eq!(machine.checkpoints().len(), 2);
    machine.write("vda", 310, 1);
    let capture = source.open(&store.since(), Reading::Changes).unwrap();
    let (sixth, told) = store.next(&*capture);
    assert_eq!(told["vda"], Ok(3 * BLOCK));
    capture.close(Outcome::Unknown).unwrap();
    store = sixth;
    machine.write("vda", 320, 1);

    // Night 7 reads everything, and still knows what changed.
    let capture = source.open(&store.since(), Reading::Everything).unwrap();
    let (seventh, told) = store.next(&*capture);
    assert_eq!(told["vda"], Ok(BLOCK));
    capture.close(Outcome::Committed).unwrap();
    store = seventh;
    assert_eq!(store.sha256("vda", &machine.folder), machine.sha256("vda"));

    // Nothing stays of any night but one checkpoint, and of that nothing after the release.
    assert_eq!(machine.checkpoints().len(), 1);
    for folder in ["run", "scratch"] {
        let left = std::fs::read_dir(machine.folder.join(folder))
            .unwrap()
            .count();
        assert_eq!(left, 0, "{folder}");
    }
    assert_eq!(source.release().unwrap().len(), 1);
    assert!(machine.checkpoints().is_empty());
    machine.power_off();
    assert_eq!(machine.bitmaps("vda.qcow2"), 0);
}

/// Not a test of its own: the agent that gets killed, and the guard of its guest.
#[test]
fn child_process() {
    let Ok(order) = std::env::var(CHILD) else {
        return;
    };
    let mut order = order.split('|');
    let mut next = || order.next().unwrap().to_string();
    let (what, uri, domain, folder) = (next(), next(), next(), next());
    let mark = next();
    match what.as_str() {
        "guard" => {
            let limit = Duration::from_secs(30);
            thaw_when_orphaned(std::io::stdin(), "virsh".into(), Some(uri), &domain, limit)
                .unwrap();
        }
        "agent" => {
            let settings = settings(uri, &domain, Path::new(&folder), Freeze::Never);
            let source = LibvirtSource::new(settings).unwrap();
            let since: Vec<SinceMark> = match mark.is_empty() {
                true => Vec::new(),
                false => vec![SinceMark {
                    disk: DiskName::new("vda").unwrap(),
                    size_bytes: 32 << 20,
                    alignment_bytes: 65536,
                    mark: Some(mark),
                }],
            };
            let _capture = source.open(&since, Reading::Changes).unwrap();
            std::fs::write(Path::new(&folder).join("opened"), "").unwrap();
            std::thread::sleep(Duration::from_secs(600));
        }
        "freezer" => {
            // Its virsh hangs in backup-begin: it dies in the middle of the freeze.
            let mut settings = settings(uri, &domain, Path::new(&folder), Freeze::Require);
            settings.virsh = Path::new(&folder).join("virsh");
            settings.guard = (mark == "guarded").then(|| guard(&settings));
            let source = LibvirtSource::new(settings).unwrap();
            let _ = source.open(&[], Reading::Everything);
        }
        other => panic!("{other}"),
    }
}

fn order(what: &str, settings: &LibvirtSettings, folder: &Path, mark: &str) -> String {
    let uri = settings.uri.as_deref().unwrap();
    format!(
        "{what}|{uri}|{}|{}|{mark}",
        settings.domain,
        folder.display()
    )
}

/// This test program as a child; see `child_process`.
fn guard(settings: &LibvirtSettings) -> GuardCommand {
    let program = std::env::current_exe().unwrap();
    let order = order("guard", settings, Path::new("/"), "");
    GuardCommand {
        program: "env".into(),
        arguments: [
            format!("{CHILD}={order}"),
            program.to_str().unwrap().to_string(),
            "--exact".to_string(),
            "child_process".to_string(),
        ]
        .to_vec(),
    }
}

fn put_program(path: &Path, script: &str) {
    std::fs::write(path, script).unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(path, executable).unwrap();
}

fn child(order: String) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_process", "--nocapture"])
        .env(CHILD, order)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn neither_a_killed_agent_nor_a_killed_qemu_loses_a_change() {
    let machine = Machine::define("killed", false);
    machine.start();
    let source = source(&machine);
    let mut store = Store::default();
    machine.write("vda", 0, 8);
    store.night(&source, Outcome::Committed);

    // An agent that dies in the middle.
    machine.write("vda", 20, 1);
    let mark = store.disks["vda"].1.clone().unwrap();
    let settings = settings(
        machine.daemon.uri(),
        &machine.name,
        &machine.folder,
        Freeze::Never,
    );
    let mut agent = child(order("agent", &settings, &machine.folder, &mark));
    eventually("the agent has opened", || {
        machine.folder.join("opened").exists()
    });
    machine.write("vda", 30, 2);
    let busy = source.recover().unwrap_err();
    assert_eq!(busy.kind, CaptureErrorKind::Inconsistent);
    assert!(busy.detail.contains("another vmkeep"), "{busy}");
    agent.kill().unwrap();
    agent.wait().unwrap();
    let told = store.night(&source, Outcome::Committed);
    assert_eq!(told["vda"], Ok(3 * BLOCK));
    assert_eq!(machine.checkpoints().len(), 1);

    // A QEMU that dies takes its bitmaps along.
    machine.write("vda", 40, 1);
    machine.crash();
    machine.start();
    machine.write("vda", 50, 1);
    let told = store.night(&source, Outcome::Committed);
    for disk in ["vda", "vdb"] {
        assert!(
            reason(&told, disk).contains("missing or broken"),
            "{told:?}"
        );
    }
    assert_eq!(machine.checkpoints().len(), 1);
    machine.write("vda", 60, 2);
    let told = store.night(&source, Outcome::Committed);
    assert_eq!((&told["vda"], &told["vdb"]), (&Ok(2 * BLOCK), &Ok(0)));

    // Space for what the guest overwrites runs low: given up, and the guest goes on.
    let scratch = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .tempdir_in("/dev/shm")
        .unwrap();
    let space = rustix::fs::statvfs(scratch.path()).unwrap();
    let narrow = LibvirtSource::new(LibvirtSettings {
        scratch_dir: scratch.path().to_path_buf(),
        scratch_reserve_bytes: space.f_bavail * space.f_frsize - (6 << 20),
        ..settings
    })
    .unwrap();
    machine.write("vda", 0, 400);
    let capture = narrow.open(&store.since(), Reading::Changes).unwrap();
    machine.write("vda", 0, 400);
    eventually("it is given up", || capture.still_consistent().is_err());
    // Reading goes on until the job has ended.
    let read = || capture.disks()[0].read_at(0, &mut [0; 4096]);
    eventually("nothing more is read", || read().is_err());
    let told = read().unwrap_err();
    assert!(told.detail.contains("ran out of space"), "{told}");
    machine.write("vda", 0, 400);
    capture.close(Outcome::Abandoned).unwrap();
    let told = store.night(&source, Outcome::Committed);
    assert_eq!(told["vda"], Ok(400 * BLOCK));

    // And one that dies while it is read: no point, no error beside the one that says so.
    let capture = source.open(&store.since(), Reading::Changes).unwrap();
    machine.crash();
    assert!(capture.still_consistent().is_err());
    let mut buffer = vec![0; 4096];
    assert!(capture.disks()[0].read_at(0, &mut buffer).is_err());
    capture.close(Outcome::Abandoned).unwrap();
}

#[test]
fn snapshots_keep_the_tracking_and_a_domain_that_is_off_is_read_as_images() {
    let machine = Machine::define("snapshots", false);
    machine.start();
    let source = source(&machine);
    let mut store = Store::default();
    machine.write("vda", 0, 8);
    store.night(&source, Outcome::Committed);

    // Changes below and in an overlay; then the overlay is committed.
    machine.write("vda", 10, 1);
    let overlay = format!("vda,file={}", machine.text("overlay.qcow2"));
    machine.daemon.virsh(&[
        "snapshot-create-as",
        &machine.name,
        "s1",
        "--disk-only",
        "--no-metadata",
        "--diskspec",
        &overlay,
        "--diskspec",
        "vdb,snapshot=no",
        "--diskspec",
        "vdc,snapshot=no",
    ]);
    machine.write("vda", 20, 2);
    let told = store.night(&source, Outcome::Committed);
    assert_eq!(told["vda"], Ok(3 * BLOCK));
    machine.write("vda", 30, 1);
    machine.daemon.virsh(&[
        "blockcommit",
        &machine.name,
        "vda",
        "--active",
        "--pivot",
        "--wait",
    ]);
    machine.write("vda", 40, 1);
    let told = store.night(&source, Outcome::Committed);
    assert_eq!(told["vda"], Ok(2 * BLOCK));
    assert_eq!(machine.checkpoints().len(), 1);

    // A clean end keeps the bitmaps.
    machine.write("vda", 50, 1);
    machine.power_off();
    machine.start();
    machine.write("vda", 60, 1);
    let told = store.night(&source, Outcome::Committed);
    assert_eq!(told["vda"], Ok(2 * BLOCK));

    // Off: the images, and their marks while it stays off.
    machine.write("vda", 70, 1);
    let online = machine.sha256("vda");
    machine.power_off();
    let capture = source.open(&store.since(), Reading::Changes).unwrap();
    assert_eq!(capture.consistency(), Consistency::Image);
    assert!(capture.notes().iter().any(|note| note.contains("shut off")));
    let (offline, told) = store.next(&*capture);
    assert!(reason(&told, "vda").contains("not one of an image"));
    capture.still_consistent().unwrap();
    let refused = machine.daemon.ask(&["start", &machine.name]).unwrap_err();
    assert!(refused.contains("lock"), "{refused}");
    // libvirt has touched the image for that: whoever reads on must know.
    assert!(capture.still_consistent().is_err());
    capture.close(Outcome::Committed).unwrap();
    store = offline;
    assert_eq!(store.sha256("vda", &machine.folder), online);
    let hint = source.release().unwrap_err();
    assert!(hint.detail.contains("start it first"), "{hint}");

    // On again: read in full with a reason, then tracked; what is needless has gone.
    machine.start();
    let told = store.night(&source, Outcome::Committed);
    // An image that was written to just before has no mark at all.
    assert!(reason(&told, "vda").contains("newest point"), "{told:?}");
    assert_eq!(machine.checkpoints().len(), 1);
    machine.write("vda", 80, 1);
    let told = store.night(&source, Outcome::Committed);
    assert_eq!(told["vda"], Ok(BLOCK));
}

#[test]
fn a_guest_is_frozen_for_the_instant_and_thawed_on_every_way_out() {
    let machine = Machine::define("freeze", true);
    machine.start();
    let uri = machine.daemon.uri();
    let settings = settings(uri.clone(), &machine.name, &machine.folder, Freeze::Require);
    let guarded = LibvirtSettings {
        guard: Some(guard(&settings)),
        ..settings.clone()
    };
    eventually("the agent answers", || {
        let ping = "{\"execute\":\"guest-ping\"}";
        let ask = ["qemu-agent-command", machine.name.as_str(), ping];
        machine.daemon.ask(&ask).is_ok()
    });
    let writes = || {
        let number = machine.tell("dd if=/dev/urandom of=/mnt/vdb/f bs=4k count=4 conv=fsync");
        eventually("the guest can write", || machine.has_done(number));
    };

    // The journal is empty at the instant: nothing to be replayed.
    writes();
    let source = LibvirtSource::new(guarded).unwrap();
    let capture = source.open(&[], Reading::Everything).unwrap();
    assert_eq!(capture.consistency(), Consistency::Filesystem);
    assert!(capture.notes().is_empty(), "{:?}", capture.notes());
    writes();
    let (mut store, _) = Store::default().next(&*capture);
    capture.close(Outcome::Abandoned).unwrap();
    let image = machine.folder.join("vdb.captured");
    std::fs::write(&image, &store.disks["vdb"].0).unwrap();
    let check = Command::new("e2fsck")
        .arg("-fy")
        .arg(&image)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&check.stdout);
    assert!(
        check.status.success() && !said.contains("recovering"),
        "{said}"
    );

    // An I/O thread serves vdb. A frozen guest writes nothing that could be missing.
    store.night(&source, Outcome::Committed);
    machine.run(
        "touch /tmp/on; { (while test -e /tmp/on; do \
         dd if=/dev/urandom of=/mnt/vdb/g bs=64k count=9 conv=fsync; done) 2> /dev/null & }",
    );
    let told = store.night(&source, Outcome::Committed);
    assert!(told["vdb"].is_ok(), "{told:?}");
    machine.run("rm /tmp/on");
    // Where it cannot be shown, that disk is read in full.
    let fake = machine.folder.join("virsh");
    let script = "#!/bin/sh\ncase \"$*\" in\n*--size*) virsh \"$@\" | \
                  sed \"s/ size='[0-9]*'/ size='65536000'/\";;\n*) exec virsh \"$@\";;\nesac\n";
    put_program(&fake, script);
    let silent = LibvirtSource::new(LibvirtSettings {
        virsh: fake.clone(),
        ..settings.clone()
    })
    .unwrap();
    let told = store.night(&silent, Outcome::Committed);
    assert!(told["vda"].is_ok(), "{told:?}");
    assert!(reason(&told, "vdb").contains("I/O thread"), "{told:?}");
    assert_eq!(source.release().unwrap().len(), 1);

    // An agent of ours that dies while the guest is frozen: with a guard and without.
    let script = format!(
        "#!/bin/sh\nfor word in \"$@\"; do\n[ \"$word\" = backup-begin ] && \
         {{ touch {0}; exec sleep 5; }}\ndone\nexec virsh \"$@\"\n",
        machine.text("frozen")
    );
    put_program(&fake, &script);
    for with in ["guarded", "alone"] {
        let mut agent = child(order("freezer", &settings, &machine.folder, with));
        eventually("it is frozen", || machine.folder.join("frozen").exists());
        agent.kill().unwrap();
        agent.wait().unwrap();
        std::fs::remove_file(machine.folder.join("frozen")).unwrap();
        if with == "alone" {
            let number = machine.tell("dd if=/dev/zero of=/mnt/vdb/f bs=4k count=4 conv=fsync");
            std::thread::sleep(Duration::from_millis(500));
            assert!(!machine.has_done(number), "it was not frozen");
            source.recover().unwrap();
            eventually("the guest has written", || machine.has_done(number));
        }
        writes();
        source.recover().unwrap();
    }

    // Without an agent there is no backup, or one that says so.
    machine.run("killall -9 qemu-ga");
    let refused = error(
        LibvirtSource::new(settings.clone())
            .unwrap()
            .open(&[], Reading::Changes),
    );
    assert!(refused.detail.contains("freeze"), "{refused}");
    let tried = LibvirtSettings {
        freeze: Freeze::Try,
        ..settings
    };
    let capture = LibvirtSource::new(tried)
        .unwrap()
        .open(&[], Reading::Changes)
        .unwrap();
    assert_eq!(capture.consistency(), Consistency::Crash);
    assert!(
        capture
            .notes()
            .iter()
            .any(|note| note.contains("not frozen"))
    );
    // Someone else's job is left alone.
    let stranger = LibvirtSource::new(LibvirtSettings {
        owner: "ffff".to_string(),
        ..self::settings(uri, &machine.name, &machine.folder, Freeze::Never)
    })
    .unwrap();
    let busy = error(stranger.open(&[], Reading::Changes));
    assert!(busy.detail.contains("another program"), "{busy}");
    assert!(stranger.recover().is_err());
    capture.still_consistent().unwrap();
    capture.close(Outcome::Abandoned).unwrap();
    assert!(machine.checkpoints().iter().all(String::is_empty));
}

#[test]
fn a_domain_that_is_not_there_is_missing() {
    let daemon = Daemon::shared();
    let folder = daemon.folder("missing");
    let settings = settings(daemon.uri(), "nobody", &folder, Freeze::Never);
    let source = LibvirtSource::new(settings).unwrap();
    assert_eq!(
        error(source.open(&[], Reading::Changes)).kind,
        CaptureErrorKind::Missing
    );
}
