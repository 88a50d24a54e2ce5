//! A host that backs up a real guest over QMP, with all that can be put between the two.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::{Span, Timestamp};
use serde_json::{Value, json};

use super::super::host::{Host, HostOptions, Running, path_text, time, tool};
use super::agent_proxy::AgentProxy;
use super::check::assert_one_instant;
use super::image::{Format, Image};
use super::monitor::Qmp;
use super::nbd_proxy::NbdProxy;
use super::proxy::Proxy;
use super::qemu::VmOptions;
use super::vm::Vm;
use super::wait::{LIMIT, wait_until};

pub const DISK: u64 = 64 << 20;

#[derive(Debug, Clone, Default)]
pub struct SceneOptions<'a> {
    /// Lines of the VM's configuration, where AGENT is the guest agent's socket.
    pub own: &'a str,
    /// Lines of the host's.
    pub host_keys: &'a str,
    pub agent: bool,
    /// The second disk is served by an I/O thread.
    pub iothread: bool,
    /// A third disk, raw and without a file system: nobody writes to it but the test.
    pub bare_disk: bool,
    /// Something stands between vmkeep and the exports.
    pub between_exports: bool,
    pub store: Option<PathBuf>,
    /// What `guest/init` understands.
    pub guest: &'a str,
}

/// A host, a guest with a qcow2 disk and a raw one, and what stands between them.
pub struct Scene {
    pub host: Host,
    pub vm: Vm,
    pub proxy: Proxy,
    /// Between vmkeep and QEMU's exports, where that was wanted.
    pub exports: Option<NbdProxy>,
    /// Between vmkeep and the guest agent, where there is one.
    pub agent: Option<AgentProxy>,
    /// A third monitor, for what is done while the guest stands still.
    third: PathBuf,
    pub now: Timestamp,
    copies: Arc<Mutex<Vec<(String, PathBuf)>>>,
    /// What every point must hold: when it is the newest, and the hash of each disk.
    told: Vec<(Timestamp, Vec<(String, blake3::Hash)>)>,
}

/// What `backup` said, and how the guest was at that instant.
pub struct Night {
    pub document: Value,
    pub copies: Vec<(String, PathBuf)>,
}

impl Night {
    pub fn kind(&self) -> &str {
        self.document["kind"].as_str().unwrap()
    }

    pub fn notes(&self) -> String {
        self.document["notes"].to_string()
    }

    /// Only changed blocks of every disk were read.
    #[track_caller]
    pub fn assert_tracked(&self) {
        assert_eq!((self.kind(), self.notes().as_str()), ("incremental", "[]"));
    }

    /// Just these disks were read in full, each for a reason that holds these words.
    #[track_caller]
    pub fn assert_read_in_full(&self, disks: &[(&str, &str)]) {
        let notes: Vec<&str> = self.document["notes"]
            .as_array()
            .unwrap()
            .iter()
            .map(|note| note.as_str().unwrap())
            .filter(|note| note.contains(": read in full"))
            .collect();
        assert_eq!(self.kind(), "incremental", "{}", self.document);
        assert_eq!(notes.len(), disks.len(), "{notes:?}");
        for (disk, reason) in disks {
            let begin = format!("{disk}: read in full (");
            let told = notes
                .iter()
                .any(|note| note.starts_with(&begin) && note.contains(reason));
            assert!(told, "{disk}, {reason}: {notes:?}");
        }
    }

    pub fn read_bytes(&self) -> u64 {
        self.document["read_bytes"].as_u64().unwrap()
    }
}

impl Scene {
    #[track_caller]
    pub fn new(options: &SceneOptions<'_>) -> Self {
        let host = Host::new(&HostOptions {
            store: options.store.clone(),
            ..HostOptions::default()
        });
        let folder = host.path("vm");
        fs::create_dir(&folder).unwrap();
        let mut disks = vec![
            Image::ext4(folder.join("a.qcow2"), DISK, Format::Qcow2),
            Image::ext4(folder.join("b.raw"), DISK, Format::Raw),
        ];
        if options.bare_disk {
            disks.push(Image::empty(folder.join("c.raw"), DISK, Format::Raw));
        }
        let disks: Vec<&Image> = disks.iter().collect();
        let mut vm_options = VmOptions::new("g", &folder, &disks);
        vm_options.agent = options.agent;
        vm_options.guest = options.guest.to_owned();
        vm_options.disks[1].iothread = options.iothread;
        let third = add_monitor(&mut vm_options);
        let vm = Vm::start(vm_options);
        let proxy = Proxy::start(folder.join("p.qmp"), &vm.qmp_socket());
        let agent = options
            .agent
            .then(|| AgentProxy::start(folder.join("p.agent"), &vm.agent_socket()));
        let text = format!(
            "[host]\nname = \"host1\"\nclock = \"trusted\"\nstate_dir = \"{}\"\noverlay_dir = \"{}\"\n{}\n\
             [repository]\nurl = \"{}\"\nreserve = \"1 MiB\"\n\n\
             [policy]\ntimezone = \"UTC\"\nwindow = \"22:00-06:00\"\n\n\
             [[customer]]\nid = \"acme\"\n\n[[customer.vm]]\nname = \"db01\"\nqmp = \"{}\"\n{}\n",
            path_text(&host.state()),
            path_text(&host.path("overlays")),
            options.host_keys,
            path_text(host.store()),
            path_text(&proxy.socket),
            options.own,
        );
        let agent_socket = agent.as_ref().map(|agent| path_text(&agent.socket));
        host.write_config(&text.replace("AGENT", agent_socket.unwrap_or("AGENT")));
        let now = time("2031-02-10T23:17:00Z");
        host.vmkeep(&["init", "--yes"], now).exits(0);
        vm.wait_ready();
        vm.wait_for_progress(50);
        Scene {
            host,
            vm,
            proxy,
            exports: options.between_exports.then(NbdProxy::new),
            agent,
            third,
            now,
            copies: Arc::default(),
            told: Vec::new(),
        }
    }

    /// Another QEMU has the guest from now on.
    pub fn moved_to(&mut self, vm: Vm, third: PathBuf) {
        self.proxy.point_at(&vm.qmp_socket());
        self.vm = vm;
        self.third = third;
    }

    pub fn folder(&self) -> PathBuf {
        self.host.path("vm")
    }

    /// Runs a line in the guest, which must be able to.
    #[track_caller]
    pub fn shell(&self, line: &str) -> String {
        let (code, said) = self.vm.console().shell(line);
        assert_eq!(code, 0, "{line}: {said}");
        said
    }

    /// Gives the running guest another disk, which it sees when this returns.
    pub fn plug(&self, number: usize, image: &Image, seen_as: &str) {
        let node = format!("d{number}");
        self.vm
            .qmp(&json!({"execute": "blockdev-add", "arguments": {
                "driver": image.format.name(), "node-name": node,
                "file": {"driver": "file", "filename": image.path},
            }}));
        self.vm.qmp(&json!({"execute": "device_add", "arguments": {
            "driver": "virtio-blk-pci", "drive": node, "id": format!("vd{number}"),
        }}));
        until(seen_as, LIMIT, || {
            let (code, _) = self.vm.console().shell(&format!("test -b /dev/{seen_as}"));
            (code == 0).then_some(())
        });
    }

    /// Three granules of noise on a disk without a file system.
    pub fn write_noise(&self, disk: &str, first: u64) {
        self.shell(&format!(
            "dd if=/dev/urandom of=/dev/{disk} bs=64k seek={first} count=3 \
             conv=notrunc,fsync 2>/dev/null"
        ));
    }

    /// A backup whose agent is killed at the first command of this name, before QEMU has it.
    #[track_caller]
    pub fn backup_killed_at(&mut self, name: &'static str) {
        let victim: Arc<Mutex<Option<u32>>> = Arc::default();
        let known = victim.clone();
        let mut done = false;
        self.watch(move |command| {
            if command["execute"] == name && !done {
                done = true;
                let agent = until("the agent", LIMIT, || *known.lock().unwrap());
                tool("kill", &["-9", &agent.to_string()]);
            }
            command
        });
        let running = self.start_backup(&[]);
        *victim.lock().unwrap() = Some(running.id());
        let ran = running.ended();
        assert!(ran.was_killed(), "{name}: {}", ran.stderr);
        // The guard's commands come this way too.
        until("the guest to run", LIMIT, || {
            (self.vm.status() == "running").then_some(())
        });
        self.proxy.pass();
    }

    pub fn next_night(&mut self) {
        self.now += Span::new().hours(24);
    }

    /// While the guest stands still for the next capture, QEMU copies each of its disks for us.
    /// `hook` sees each command before that.
    fn copy_independently(&mut self, mut hook: impl FnMut(&Value) + Send + 'static) {
        let number = self.now.as_second();
        let folder = self.host.path("vm");
        let third = self.third.clone();
        let copies = self.copies.clone();
        let mut is_instant = false;
        self.watch(move |mut command| {
            hook(&command);
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

    /// Sees every command of vmkeep's, after the way to the exports was laid.
    pub fn watch(&self, mut hook: impl FnMut(Value) -> Value + Send + 'static) {
        let exports = self.exports.clone();
        self.proxy.set(move |command| {
            let command = match &exports {
                Some(exports) => exports.redirect(command),
                None => command,
            };
            hook(command)
        });
    }

    #[track_caller]
    pub fn backup(&mut self, arguments: &[&str]) -> Night {
        self.backup_that_exits(0, arguments)
    }

    #[track_caller]
    pub fn backup_that_exits(&mut self, code: i32, arguments: &[&str]) -> Night {
        let running = self.start_night(arguments, |_| {});
        self.end_night(running, code)
    }

    /// A backup during which the test does something; `hook` sees each command of it.
    pub fn start_night(
        &mut self,
        arguments: &[&str],
        hook: impl FnMut(&Value) + Send + 'static,
    ) -> Running {
        // Later than an attempt of the same night, so that it is the newest in any case.
        self.now += Span::new().minutes(10);
        self.copy_independently(hook);
        let arguments = [&["--json", "backup", "db01"], arguments].concat();
        self.host.start(&arguments, self.now)
    }

    #[track_caller]
    pub fn end_night(&mut self, running: Running, code: i32) -> Night {
        let ran = running.ended();
        let copies = self.independent_copies();
        let document = ran.exits(code).document()["vms"][0].take();
        self.expect_copies(&copies);
        Night { document, copies }
    }

    /// The copies of a night that did not become a point.
    pub fn forget_copies(&mut self) {
        for (_, copy) in self.independent_copies() {
            fs::remove_file(copy).unwrap();
        }
    }

    /// What `assert_every_point_exact` will ask of the newest point.
    fn expect_copies(&mut self, copies: &[(String, PathBuf)]) {
        let hashes = copies
            .iter()
            .map(|(id, copy)| (id.clone(), hash_of(copy)))
            .collect();
        self.told.push((self.now, hashes));
    }

    /// The newest point was not compared with anything when it was made.
    pub fn expect_no_copies(&mut self) {
        self.told.push((self.now, Vec::new()));
    }

    /// A backup that the test drives itself while it runs.
    pub fn start_backup(&mut self, arguments: &[&str]) -> Running {
        self.now += Span::new().minutes(10);
        let arguments = [&["--json", "backup", "db01"], arguments].concat();
        self.host.start(&arguments, self.now)
    }

    /// Restores the newest point and compares it with the copies of the same instant.
    #[track_caller]
    pub fn assert_exact(&self, night: &Night) {
        let at = self.now + Span::new().minutes(5);
        let restored = self.host.restore("db01", "latest", at);
        let mut images = Vec::new();
        for (id, copy) in &night.copies {
            let image = restored.path().join(format!("{id}.raw"));
            assert_same(&image, copy);
            images.push(image);
        }
        assert!(images.len() >= 2);
        let images: Vec<&Path> = images.iter().take(2).map(PathBuf::as_path).collect();
        assert_one_instant(&images);
        for (_, copy) in &night.copies {
            fs::remove_file(copy).unwrap();
        }
    }

    /// Restores each point that `backup` has made, and none has another disk or another byte.
    #[track_caller]
    pub fn assert_every_point_exact(&self) {
        assert_eq!(self.host.points(self.now).len(), self.told.len());
        for (taken, disks) in &self.told {
            let when = (*taken + Span::new().minutes(5)).strftime("%Y-%m-%dT%H:%M:%S");
            let restored = self.host.restore("db01", &when.to_string(), self.now);
            for (id, hash) in disks {
                let image = restored.path().join(format!("{id}.raw"));
                assert_eq!(hash_of(&image), *hash, "{id} of {taken}");
            }
            let found = fs::read_dir(restored.path()).unwrap();
            let raw = found.filter(|entry| {
                let path = entry.as_ref().unwrap().path();
                path.extension().is_some_and(|ending| ending == "raw")
            });
            assert!(
                disks.is_empty() || raw.count() == disks.len(),
                "disks of {taken}"
            );
        }
    }

    /// Nothing of a capture is left in QEMU but one bitmap a disk.
    #[track_caller]
    pub fn assert_clean(&self) {
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

fn hash_of(image: &Path) -> blake3::Hash {
    blake3::hash(&fs::read(image).unwrap())
}

/// A monitor beside those that every VM has.
pub fn add_monitor(options: &mut VmOptions) -> PathBuf {
    let path = options.folder.join(format!("{}.third", options.name));
    options.extra = vec![
        "-chardev".to_string(),
        format!(
            "socket,id=third,path={},server=on,wait=off",
            path_text(&path)
        ),
        "-mon".to_string(),
        "chardev=third,mode=control".to_string(),
    ];
    path
}

#[track_caller]
pub fn until<T>(what: &str, limit: Duration, answer: impl FnMut() -> Option<T>) -> T {
    wait_until(what, limit, answer, String::new)
}
