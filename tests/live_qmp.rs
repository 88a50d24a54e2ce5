//! Running guests in real QEMU, backed up over QMP by the shipped program. Each point is compared
//! with independent copies that QEMU makes at the very instant, while the guest stands still.

#![forbid(unsafe_code)]

mod support;

use jiff::{Span, Timestamp};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::live::{Format, Image, Proxy, Qmp, Vm, VmOptions, assert_one_instant, wait_until};
use support::{Host, HostOptions, path_text, time, tool};

const DISK: u64 = 64 << 20;

/// A host, a guest with a qcow2 disk and a raw one, and what stands between them.
struct Scene {
    host: Host,
    vm: Vm,
    proxy: Proxy,
    /// A third monitor, for what is done while the guest stands still.
    third: PathBuf,
    now: Timestamp,
    copies: Arc<Mutex<Vec<(String, PathBuf)>>>,
}

/// What `backup` said, and how the guest was at that instant.
struct Night {
    document: Value,
    copies: Vec<(String, PathBuf)>,
}

impl Night {
    fn kind(&self) -> &str {
        self.document["kind"].as_str().unwrap()
    }

    fn notes(&self) -> String {
        self.document["notes"].to_string()
    }

    /// Only changed blocks of every disk were read.
    #[track_caller]
    fn assert_tracked(&self) {
        assert_eq!((self.kind(), self.notes().as_str()), ("incremental", "[]"));
    }

    fn read_bytes(&self) -> u64 {
        self.document["read_bytes"].as_u64().unwrap()
    }
}

impl Scene {
    fn new(own: &str, agent: bool) -> Self {
        Self::with(own, agent, "")
    }

    fn with(own: &str, agent: bool, host_keys: &str) -> Self {
        Self::build(own, agent, host_keys, false)
    }

    fn build(own: &str, agent: bool, host_keys: &str, iothread: bool) -> Self {
        let host = Host::new(&HostOptions::default());
        let folder = host.path("vm");
        fs::create_dir(&folder).unwrap();
        let disks = [
            Image::ext4(folder.join("a.qcow2"), DISK, Format::Qcow2),
            Image::ext4(folder.join("b.raw"), DISK, Format::Raw),
        ];
        let mut options = VmOptions::new("g", &folder, &[&disks[0], &disks[1]]);
        options.agent = agent;
        options.disks[1].iothread = iothread;
        let third = folder.join("third.qmp");
        options.extra = vec![
            "-chardev".to_string(),
            format!(
                "socket,id=third,path={},server=on,wait=off",
                path_text(&third)
            ),
            "-mon".to_string(),
            "chardev=third,mode=control".to_string(),
        ];
        let vm = Vm::start(options);
        let proxy = Proxy::start(folder.join("p.qmp"), &vm.qmp_socket());
        let text = format!(
            "[host]\nname = \"host1\"\nclock = \"trusted\"\nstate_dir = \"{}\"\n{host_keys}\n\
             [repository]\nurl = \"{}\"\nreserve = \"1 MiB\"\n\n\
             [policy]\ntimezone = \"UTC\"\nwindow = \"22:00-06:00\"\n\n\
             [[customer]]\nid = \"acme\"\n\n[[customer.vm]]\nname = \"db01\"\nqmp = \"{}\"\n{own}\n",
            path_text(&host.state()),
            path_text(host.store()),
            path_text(&proxy.socket),
        );
        let agent_socket = vm.agent_socket();
        host.write_config(&text.replace("AGENT", path_text(&agent_socket)));
        let now = time("2031-02-10T23:17:00Z");
        host.vmkeep(&["init", "--yes"], now).exits(0);
        vm.wait_ready();
        vm.wait_for_progress(50);
        Scene {
            host,
            vm,
            proxy,
            third,
            now,
            copies: Arc::default(),
        }
    }

    fn next_night(&mut self) {
        self.now += Span::new().hours(24);
    }

    /// While the guest stands still for the next capture, QEMU copies each of its disks for us.
    fn copy_independently(&mut self) {
        let number = self.now.as_second();
        let folder = self.host.path("vm");
        let third = self.third.clone();
        let copies = self.copies.clone();
        let mut is_instant = false;
        self.proxy.set(move |mut command| {
            if command["execute"] == "transaction"
                && command.to_string().contains("blockdev-backup")
            {
                let mut qmp = Qmp::connect(&third);
                let (made, jobs) = prepare_copies(&mut qmp, &folder, number);
                let actions = command["arguments"]["actions"].as_array_mut().unwrap();
                actions.extend(
                    jobs.into_iter()
                        .map(|job| json!({"type": "blockdev-backup", "data": job})),
                );
                *copies.lock().unwrap() = made;
                return command;
            }
            // Not the `cont` that lets a guest go on which a dead agent had paused.
            is_instant |= command.to_string().contains("block-dirty-bitmap-add");
            if is_instant && command["execute"] == "cont" && copies.lock().unwrap().is_empty() {
                let mut qmp = Qmp::connect(&third);
                let made = copy_all(&mut qmp, &folder, number);
                *copies.lock().unwrap() = made;
            }
            command
        });
    }

    fn independent_copies(&mut self) -> Vec<(String, PathBuf)> {
        self.proxy.pass();
        let copies = std::mem::take(&mut *self.copies.lock().unwrap());
        end_copies(&mut Qmp::connect(&self.third), &copies);
        copies
    }

    #[track_caller]
    fn backup(&mut self, arguments: &[&str]) -> Night {
        // Later than an attempt of the same night, so that it is the newest in any case.
        self.now += Span::new().minutes(10);
        self.copy_independently();
        let arguments = [&["backup", "db01"], arguments].concat();
        let document = self.host.json(&arguments, self.now)["vms"][0].take();
        let copies = self.independent_copies();
        Night { document, copies }
    }

    /// Restores the newest point and compares it with the copies of the same instant.
    #[track_caller]
    fn assert_exact(&self, night: &Night) {
        let at = self.now + Span::new().minutes(5);
        let restored = self.host.restore("db01", "latest", at);
        let mut images = Vec::new();
        for (id, copy) in &night.copies {
            let image = restored.path().join(format!("{id}.raw"));
            assert_same(&image, copy);
            images.push(image);
        }
        let images: Vec<&Path> = images.iter().take(2).map(PathBuf::as_path).collect();
        assert_one_instant(&images);
        for (_, copy) in &night.copies {
            fs::remove_file(copy).unwrap();
        }
    }

    /// Nothing of a capture is left in QEMU but one bitmap a disk.
    #[track_caller]
    fn assert_clean(&self) {
        let nodes = self.vm.qmp(&json!({
            "execute": "query-named-block-nodes", "arguments": {"flat": true},
        }));
        let mut bitmaps = 0;
        for node in nodes.as_array().unwrap() {
            let name = node["node-name"].as_str().unwrap();
            assert!(!name.starts_with("vmkeep-"), "{name} is left");
            let found = node["dirty-bitmaps"].as_array().map_or(0, Vec::len);
            assert!(found <= 1, "{node}");
            bitmaps += found;
        }
        assert!(bitmaps > 0);
        let exports = self.vm.qmp(&json!({"execute": "query-block-exports"}));
        assert_eq!(exports, json!([]));
        assert_eq!(self.vm.status(), "running");
    }
}

/// Full copies of all disks by jobs of QEMU.
fn copy_all(qmp: &mut Qmp, folder: &Path, number: i64) -> Vec<(String, PathBuf)> {
    let (copies, jobs) = prepare_copies(qmp, folder, number);
    for job in jobs {
        qmp.execute(&json!({"execute": "blockdev-backup", "arguments": job}))
            .unwrap();
    }
    end_copies(qmp, &copies);
    copies
}

/// The copies, and the jobs that make them.
fn prepare_copies(
    qmp: &mut Qmp,
    folder: &Path,
    number: i64,
) -> (Vec<(String, PathBuf)>, Vec<Value>) {
    let (mut copies, mut jobs) = (Vec::new(), Vec::new());
    let devices = qmp.execute(&json!({"execute": "query-block"})).unwrap();
    for device in devices.as_array().unwrap() {
        let Some(inserted) = device.get("inserted") else {
            continue;
        };
        let qdev = device["qdev"].as_str().unwrap();
        let id = qdev
            .split('/')
            .rfind(|part| part.starts_with("vd"))
            .unwrap();
        let path = folder.join(format!("copy-{number}-{id}.raw"));
        let size = inserted["image"]["virtual-size"].as_u64().unwrap();
        fs::File::create(&path).unwrap().set_len(size).unwrap();
        let name = format!("copy-{id}");
        qmp.execute(&json!({"execute": "blockdev-add", "arguments": {
            "driver": "raw", "node-name": name,
            "file": {"driver": "file", "filename": path},
        }}))
        .unwrap();
        jobs.push(json!({
            "job-id": name, "device": inserted["node-name"], "target": name,
            "sync": "full", "auto-dismiss": false,
        }));
        copies.push((id.to_string(), path));
    }
    (copies, jobs)
}

/// Waits for copies, where they have not been waited for.
fn end_copies(qmp: &mut Qmp, copies: &[(String, PathBuf)]) {
    for (id, _) in copies {
        let name = format!("copy-{id}");
        let mut there = false;
        until("a copy of QEMU", Duration::from_secs(60), || {
            let jobs = qmp.execute(&json!({"execute": "query-jobs"})).unwrap();
            let found = jobs
                .as_array()
                .unwrap()
                .iter()
                .find(|one| one["id"] == name.as_str());
            let Some(found) = found else { return Some(()) };
            there = true;
            assert!(found.get("error").is_none(), "{found}");
            (found["status"] == "concluded").then_some(())
        });
        if there {
            qmp.execute(&json!({"execute": "job-dismiss", "arguments": {"id": name}}))
                .unwrap();
            qmp.execute(&json!({"execute": "blockdev-del", "arguments": {"node-name": name}}))
                .unwrap();
        }
    }
}

#[track_caller]
fn assert_same(one: &Path, other: &Path) {
    tool("cmp", &[path_text(one), path_text(other)]);
}

#[test]
fn nights_of_a_running_guest_are_exact_whatever_happens_to_it() {
    let mut scene = Scene::new("", false);

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
    let mut scene = Scene::new("", false);
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
    let mut scene = Scene::with("", false, "overlay_size = \"1 MiB\"");
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
    let mut scene = Scene::build("", false, "overlay_size = \"4 MiB\"", true);
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
    let mut scene = Scene::new("guest_agent = \"AGENT\"\nfsfreeze = \"require\"", true);
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

#[track_caller]
fn until<T>(what: &str, limit: Duration, answer: impl FnMut() -> Option<T>) -> T {
    wait_until(what, limit, answer, String::new)
}
