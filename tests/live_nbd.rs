//! A guest whose jobs are handed in by somebody else, as the backup stack of Proxmox VE does it: a
//! snapshot in a fleecing image, exported over NBD with a bitmap. The test is the program in charge
//! of the VM; vmkeep reads what it is shown.

#![forbid(unsafe_code)]

use vmkeep_test_support as support;

use jiff::{Span, Timestamp};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::PathBuf;
use support::live::{
    BitmapMode, Drives, Format, Image, Shim, Vm, VmOptions, assert_one_instant, order_in_guest,
    proxmox_disks,
};
use support::{Host, HostOptions, Ran, path_text, time, tool};

const DISK: u64 = 256 << 20;

struct Scene {
    host: Host,
    vm: Vm,
    shim: Shim,
    images: Vec<Image>,
    now: Timestamp,
}

impl Scene {
    fn new() -> Self {
        let host = Host::new(&HostOptions::default());
        let folder = host.path("vm");
        fs::create_dir(&folder).unwrap();
        let images = vec![
            Image::ext4(folder.join("vm-101-disk-0.qcow2"), DISK, Format::Qcow2),
            Image::ext4(folder.join("vm-101-disk-1.raw"), DISK, Format::Raw),
        ];
        let mut options = VmOptions::new("101", &folder, &[]);
        options.guest = "scsi=1 slots=256".to_owned();
        let on_it: Vec<&Image> = images.iter().collect();
        options.extra = proxmox_disks(Drives::Blockdev, &on_it, false);
        let vm = Vm::start(options);
        host.write_config(&format!(
            "[host]\nname = \"pve1\"\nclock = \"trusted\"\nstate_dir = \"{}\"\n\n\
             [repository]\nurl = \"{}\"\nreserve = \"1 MiB\"\n\n\
             [policy]\ntimezone = \"UTC\"\nwindow = \"22:00-06:00\"\nfull_day = \"friday\"\n\n\
             [[customer]]\nid = \"acme\"\n\n[[customer.vm]]\nname = \"101\"\nnbd = \"{}\"\n",
            path_text(&host.state()),
            path_text(host.store()),
            path_text(&host.path("101.json")),
        ));
        // A Monday.
        let now = time("2031-02-10T23:17:00Z");
        host.vmkeep(&["init", "--yes"], now).exits(0);
        vm.wait_ready();
        vm.wait_for_progress(50);
        let shim = Shim::new(&folder);
        Scene {
            host,
            vm,
            shim,
            images,
            now,
        }
    }

    fn next_night(&mut self) {
        self.now += Span::new().hours(24);
        self.vm.wait_for_progress(20);
    }

    /// Both disks, as one job has them.
    fn disks(&self, own: &Value) -> Value {
        let disk = |number: usize| {
            let mut disk = json!({
                "socket": self.shim.socket(), "export": format!("drive-scsi{number}"),
                "discard": true,
            });
            for (key, value) in own.as_object().unwrap() {
                disk[key] = value.clone();
            }
            disk
        };
        json!({"drive-scsi0": disk(0), "drive-scsi1": disk(1)})
    }

    fn new_disks(&self, generation: &str) -> Value {
        let bitmap = self.shim.bitmap;
        self.disks(&json!({"mode": "new", "bitmap": bitmap, "generation": generation}))
    }

    fn reused_disks(&self, since: &str, generation: &str) -> Value {
        self.disks(&json!({
            "mode": "reuse", "bitmap": self.shim.bitmap, "since": since, "generation": generation,
        }))
    }

    /// One job: the disks are made readable, handed in, and taken away again.
    fn job(&mut self, modes: [BitmapMode; 2], disks: &Value, arguments: &[&str]) -> Job {
        let copies = self.shim.open(&self.vm, &self.images, &modes);
        self.hand_in(disks);
        self.now += Span::new().minutes(10);
        let ran = self
            .host
            .vmkeep(&[&["--json"], arguments].concat(), self.now);
        Job { ran, copies }
    }

    fn hand_in(&self, disks: &Value) {
        let job = json!({
            "disks": disks,
            "definition": {"name": "101.conf", "text": "cores: 1\nscsi0: local:101/vm-101-disk-0.qcow2\n"},
            "consistency": "crash",
        });
        let file = self.host.path("101.json");
        let beside = file.with_extension("new");
        fs::write(&beside, job.to_string()).unwrap();
        fs::rename(&beside, &file).unwrap();
    }

    fn end(&mut self, success: bool) {
        fs::remove_file(self.host.path("101.json")).unwrap();
        self.shim.close(&self.vm, success);
    }

    /// A job that becomes a point, which is held against independent copies of its instant.
    #[track_caller]
    fn assert_exact(&mut self, modes: [BitmapMode; 2], disks: &Value, arguments: &[&str]) -> Value {
        let job = self.job(modes, disks, arguments);
        job.ran.exits(0);
        self.end(true);
        let restored = self
            .host
            .restore("101", "latest", self.now + Span::new().minutes(5));
        let images =
            ["drive-scsi0", "drive-scsi1"].map(|name| restored.path().join(format!("{name}.raw")));
        for (image, copy) in images.iter().zip(&job.copies) {
            tool("cmp", &[path_text(image), path_text(copy)]);
        }
        let definition = fs::read_to_string(restored.path().join("101.conf")).unwrap();
        assert!(definition.contains("vm-101-disk-0"), "{definition}");
        let images = order_in_guest(&self.vm).map(|number| images[number].as_path());
        assert_one_instant(&images);
        let mut document = job.ran.document();
        match document.get("customers") {
            Some(_) => document["customers"][0]["vms"][0].take(),
            None => document["vms"][0].take(),
        }
    }

    /// A job that must become nothing: nothing is listed, and the peer hears of it.
    #[track_caller]
    fn assert_refused(
        &mut self,
        modes: [BitmapMode; 2],
        disks: &Value,
        arguments: &[&str],
        said: &[&str],
    ) {
        let before = self.host.points(self.now).len();
        let job = self.job(modes, disks, arguments);
        let code = match arguments[0] {
            "run" => 3,
            _ => 1,
        };
        job.ran.exits(code);
        for said in said {
            job.ran.says(said);
        }
        self.end(false);
        assert_eq!(self.host.points(self.now).len(), before);
    }
}

struct Job {
    ran: Ran,
    /// Of the instant of the job.
    copies: Vec<PathBuf>,
}

const BACKUP: &[&str] = &["backup", "101"];
const NEW: [BitmapMode; 2] = [BitmapMode::New; 2];
const REUSE: [BitmapMode; 2] = [BitmapMode::Reuse; 2];

#[test]
fn jobs_that_are_handed_in_become_exact_points_and_those_that_do_not_fit_become_none() {
    let mut scene = Scene::new();
    let missing = scene.host.vmkeep(BACKUP, scene.now);
    missing
        .exits(1)
        .says("no job is handed in")
        .says("101.json")
        .one_error();

    // A file that is left of a job.
    let disks = scene.new_disks("g0");
    scene.hand_in(&disks);
    let left = scene.host.vmkeep(BACKUP, scene.now);
    left.exits(1).says("nobody serves it").one_error();

    let disks = scene.new_disks("g1");
    let full = scene.assert_exact(NEW, &disks, BACKUP);
    assert_eq!(
        (&full["kind"], &full["notes"]),
        (&json!("full"), &json!([]))
    );

    // A device takes a disk, and has no place for the definition.
    let file = scene.host.path("device");
    File::create(&file).unwrap().set_len(DISK).unwrap();
    let device = tool("losetup", &["--find", "--show", path_text(&file)]);
    let onto = ["--force", "--disk", "drive-scsi1", "--to", device.trim()];
    let onto = [&["restore", "101", "--at", "latest"][..], &onto].concat();
    let ran = scene.host.vmkeep(&onto, scene.now + Span::new().minutes(6));
    tool("losetup", &["--detach", device.trim()]);
    ran.exits(0)
        .says("(101.conf) is written into folders only")
        .says("--to DIR");

    scene.next_night();
    let disks = scene.reused_disks("g1", "g2");
    let night = scene.assert_exact(REUSE, &disks, BACKUP);
    assert_eq!(
        (&night["kind"], &night["notes"]),
        (&json!("incremental"), &json!([]))
    );
    let read = night["read_bytes"].as_u64().unwrap();
    assert!(read > 0 && read < DISK / 2, "{night}");
    assert_eq!(read % scene.shim.granularity, 0, "{night}");

    // The peer and the repository disagree about what came before: in either way.
    scene.next_night();
    for since in ["g1", "g3"] {
        let disks = scene.reused_disks(since, "g4");
        let said = [&format!("counts from \\\"{since}\\\""), "mode \\\"new\\\""];
        scene.assert_refused(REUSE, &disks, BACKUP, &said);
    }
    // The failed jobs lost no change.
    let disks = scene.reused_disks("g2", "g5");
    let night = scene.assert_exact(REUSE, &disks, BACKUP);
    assert_eq!(night["kind"], "incremental");

    // One disk was replaced on the peer's side, and is read whole in the same night.
    scene.next_night();
    let mut disks = scene.reused_disks("g5", "g6");
    disks["drive-scsi1"] = scene.new_disks("g6")["drive-scsi1"].take();
    let night = scene.assert_exact([BitmapMode::Reuse, BitmapMode::New], &disks, BACKUP);
    assert_eq!(night["kind"], "incremental");
    assert_eq!(
        night["notes"],
        json!(["drive-scsi1: read in full (it was handed in with a new bitmap)"])
    );

    // A full cannot be read of what shows only changes. What is due can be asked beforehand.
    scene.next_night();
    let disks = scene.reused_disks("g6", "g7");
    scene.assert_refused(
        REUSE,
        &disks,
        &["backup", "101", "--full"],
        &["a full backup is due"],
    );
    let plan = scene.host.json(&["run", "--dry-run"], scene.now);
    assert_eq!(plan["customers"][0]["vms"][0]["due"], "full");
    let disks = scene.reused_disks("g6", "g7");
    scene.assert_refused(
        REUSE,
        &disks,
        &["run"],
        &["a full backup is due", "mode \\\"new\\\""],
    );
    let disks = scene.new_disks("g8");
    let full = scene.assert_exact(NEW, &disks, &["run"]);
    assert_eq!(
        (&full["outcome"], &full["kind"]),
        (&json!("backed-up"), &json!("full"))
    );

    // Nobody can build on what has no bitmap.
    scene.next_night();
    let disks = scene.disks(&json!({"mode": "none"}));
    let night = scene.assert_exact([BitmapMode::None; 2], &disks, BACKUP);
    assert_eq!(night["kind"], "incremental");
    assert!(
        night["notes"].to_string().contains("without a bitmap"),
        "{night}"
    );

    // Giving up the bitmaps is the peer's.
    let release = scene
        .host
        .vmkeep(&["tracking", "release", "101"], scene.now);
    release
        .exits(1)
        .says("belong to the program that hands its jobs in");
}

#[test]
fn what_was_read_is_given_back_only_where_the_job_allows_it() {
    let mut scene = Scene::new();
    for allowed in [false, true] {
        let mut disks = scene.new_disks("g1");
        for disk in ["drive-scsi0", "drive-scsi1"] {
            disks[disk]["discard"] = allowed.into();
        }
        // Where the file systems have their superblocks.
        let job = scene.job(NEW, &disks, BACKUP);
        job.ran.exits(0);
        let shown = [0, 1].map(|number| scene.shim.shows(number, 0));
        assert_eq!(shown, [!allowed; 2], "discard: {allowed}\n{}", job.ran);
        scene.end(true);
        scene.next_night();
    }

    // Pieces that take several reads.
    scene.shim.cluster_bytes = 4 << 20;
    let copies = scene.shim.open(&scene.vm, &scene.images, &REUSE);
    assert_eq!(copies.len(), 2);
    let changed = [0, 1].map(|number| scene.shim.first_change(number));
    let shown = || [0, 1].map(|number| scene.shim.shows(number, changed[number]));
    assert_eq!(shown(), [true; 2]);
    scene.hand_in(&scene.reused_disks("g1", "g2"));
    scene.host.vmkeep(BACKUP, scene.now).exits(0);
    assert_eq!(shown(), [false; 2]);
    scene.end(true);
}

#[test]
fn a_bitmap_that_is_finer_than_chunks_is_refused() {
    let mut scene = Scene::new();
    scene.shim.granularity = 4096;
    let disks = scene.new_disks("g1");
    scene.assert_exact(NEW, &disks, BACKUP);
    scene.next_night();
    let disks = scene.reused_disks("g1", "g2");
    scene.assert_refused(REUSE, &disks, BACKUP, &["finer than the chunks", "64 KiB"]);
}

#[test]
fn a_fleecing_image_that_runs_full_ends_the_backup_and_not_the_guest() {
    let mut scene = Scene::new();
    // Room for the tables of qcow2 alone.
    scene.shim.fleecing_bytes = 5 << 16;
    let copies = scene.shim.open(&scene.vm, &scene.images, &NEW);
    assert_eq!(copies.len(), 2);
    support::live::wait_until(
        "a full fleecing image",
        support::live::LIMIT,
        || (!scene.shim.shows(0, 0)).then_some(()),
        String::new,
    );
    let disks = scene.new_disks("g1");
    scene.hand_in(&disks);
    let ran = scene.host.vmkeep(BACKUP, scene.now);
    ran.exits(1).says("the fleecing image ran full").one_error();
    scene.end(false);
    assert_eq!(scene.vm.status(), "running");
    scene.vm.wait_for_progress(20);
    assert_eq!(scene.host.points(scene.now), Vec::<Value>::new());
}
