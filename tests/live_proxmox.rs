//! A guest in a QEMU that is set up as Proxmox VE sets it up, backed up over a monitor socket of
//! vmkeep's own, as the `args` line of a VM gives it. No Proxmox VE runs here.

#![forbid(unsafe_code)]

use vmkeep_test_support as support;

use jiff::{Span, Timestamp};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use support::live::{
    Drives, EFI_DISK_BYTES, Format, Image, LIMIT, Proxy, Qmp, Vm, VmOptions, assert_one_instant,
    order_in_guest, proxmox_disks, proxmox_flash, wait_until,
};
use support::{Host, HostOptions, path_text, time, tool};

const DISK: u64 = 128 << 20;

struct Scene {
    host: Host,
    vm: Vm,
    proxy: Proxy,
    /// The disks of the guest, and the variables of its firmware.
    images: Vec<Image>,
    /// What vmkeep calls them.
    names: [&'static str; 3],
    now: Timestamp,
    /// A copy of each disk that is independent of vmkeep, of the instant of the last capture.
    copies: Arc<Mutex<Vec<PathBuf>>>,
}

impl Scene {
    fn new(drives: Drives, iothread: bool) -> Self {
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
        options.extra = proxmox_disks(drives, &on_it, iothread);
        let variables = folder.join("vm-101-disk-2.raw");
        let content: Vec<u8> = (0..EFI_DISK_BYTES).map(|n| (n % 251) as u8).collect();
        fs::write(&variables, content).unwrap();
        options.extra.extend(proxmox_flash(drives, &variables));
        let mut images = images;
        images.push(Image {
            path: variables,
            format: Format::Raw,
        });
        // What stands after `args:` in the VM's configuration.
        let monitor = folder.join("vmkeep.qmp");
        options.extra.extend([
            "-chardev".to_owned(),
            format!(
                "socket,id=vmkeep,path={},server=on,wait=off",
                path_text(&monitor)
            ),
            "-mon".to_owned(),
            "chardev=vmkeep,mode=control".to_owned(),
        ]);
        let vm = Vm::start(options);
        let proxy = Proxy::start(folder.join("p.qmp"), &monitor);
        host.write_config(&format!(
            "[host]\nname = \"pve1\"\nclock = \"trusted\"\nstate_dir = \"{}\"\noverlay_dir = \"{}\"\n\n\
             [repository]\nurl = \"{}\"\nreserve = \"1 MiB\"\n\n\
             [policy]\ntimezone = \"UTC\"\nwindow = \"22:00-06:00\"\n\n\
             [[customer]]\nid = \"acme\"\n\n[[customer.vm]]\nname = \"101\"\nqmp = \"{}\"\n",
            path_text(&host.state()),
            path_text(&host.path("overlays")),
            path_text(host.store()),
            path_text(&proxy.socket),
        ));
        let now = time("2031-02-10T23:17:00Z");
        host.vmkeep(&["init", "--yes"], now).exits(0);
        vm.wait_ready();
        vm.wait_for_progress(50);
        Scene {
            host,
            vm,
            proxy,
            images,
            names: match drives {
                Drives::Drive => ["scsi0", "scsi1", "drive-efidisk0"],
                Drives::Blockdev => ["scsi0", "scsi1", "system.flash1"],
            },
            now,
            copies: Arc::default(),
        }
    }

    fn copy_path(&self, number: usize) -> PathBuf {
        self.host.path("vm").join(format!("copy-{number}.raw"))
    }

    /// Filters: the guest stands still, and its images can be copied before it goes on.
    fn copy_while_paused(&self) {
        let paths: Vec<PathBuf> = (0..self.images.len()).map(|n| self.copy_path(n)).collect();
        let (images, copies) = (self.images.clone(), self.copies.clone());
        self.proxy.set(move |command| {
            if command["execute"] == "cont" {
                let made = images
                    .iter()
                    .zip(&paths)
                    .map(|(image, path)| image.raw_copy_while_stopped(path));
                *copies.lock().unwrap() = made.collect();
            }
            command
        });
    }

    /// Jobs: the guest runs on, and QEMU copies the disks from the same transaction on.
    fn copy_in_the_transaction(&self) {
        let paths: Vec<PathBuf> = (0..self.images.len()).map(|n| self.copy_path(n)).collect();
        let (copies, monitor) = (self.copies.clone(), self.vm.qmp_socket());
        self.proxy.set(move |mut command| {
            if command["execute"] == "transaction"
                && command.to_string().contains("blockdev-backup")
            {
                let mut qmp = Qmp::connect(&monitor);
                let jobs: Vec<Value> = (0..paths.len())
                    .map(|number| prepare_copy(&mut qmp, number, &paths[number]))
                    .collect();
                let actions = command["arguments"]["actions"].as_array_mut().unwrap();
                let jobs = jobs
                    .into_iter()
                    .map(|job| json!({"type": "blockdev-backup", "data": job}));
                actions.extend(jobs);
                *copies.lock().unwrap() = paths.clone();
            }
            command
        });
    }

    fn end_copies(&self) {
        for number in 0..self.images.len() {
            let id = format!("copy-{number}");
            let is_done = || {
                let jobs = self.vm.qmp(&json!({"execute": "query-jobs"}));
                let job = jobs
                    .as_array()
                    .unwrap()
                    .iter()
                    .find(|job| job["id"] == id.as_str())?;
                assert!(job.get("error").is_none(), "{job}");
                (job["status"] == "concluded").then_some(())
            };
            wait_until("a copy of QEMU", LIMIT, is_done, String::new);
            self.vm
                .qmp(&json!({"execute": "job-dismiss", "arguments": {"id": id}}));
            self.vm
                .qmp(&json!({"execute": "blockdev-del", "arguments": {"node-name": id}}));
        }
    }

    #[track_caller]
    fn backup(&mut self, arguments: &[&str]) -> Value {
        let arguments = [&["backup", "101"], arguments].concat();
        let document = self.host.json(&arguments, self.now)["vms"][0].take();
        self.proxy.pass();
        document
    }

    /// Restores the newest point and compares it with what the disks were at that instant.
    #[track_caller]
    fn assert_exact(&mut self) {
        self.now += Span::new().minutes(5);
        let restored = self.host.restore("101", "latest", self.now);
        let copies = std::mem::take(&mut *self.copies.lock().unwrap());
        assert_eq!(copies.len(), 3, "copies were made while it was captured");
        let images = self
            .names
            .map(|name| restored.path().join(format!("{name}.raw")));
        for (image, copy) in images.iter().zip(&copies) {
            tool("cmp", &[path_text(image), path_text(copy)]);
        }
        let images = order_in_guest(&self.vm).map(|number| images[number].as_path());
        assert_one_instant(&images);
        self.now += Span::new().hours(23).minutes(55);
    }

    /// The guest stands on what it stood on before, and nothing is left but a bitmap a disk.
    #[track_caller]
    fn assert_clean(&self, before: &Value) {
        let nodes = self.named_nodes();
        assert!(!nodes.to_string().contains("vmkeep-cbw"), "{nodes}");
        assert_eq!(&self.stands_on(), before);
        let bitmaps: usize = nodes
            .as_array()
            .unwrap()
            .iter()
            .map(|node| node["dirty-bitmaps"].as_array().map_or(0, Vec::len))
            .sum();
        assert_eq!(bitmaps, 3, "{nodes}");
        assert_eq!(
            self.vm.qmp(&json!({"execute": "query-block-exports"})),
            json!([])
        );
        assert_eq!(self.vm.status(), "running");
        self.vm.wait_for_progress(10);
    }

    fn named_nodes(&self) -> Value {
        let arguments = json!({"flat": true});
        self.vm
            .qmp(&json!({"execute": "query-named-block-nodes", "arguments": arguments}))
    }

    /// The node of each device.
    fn stands_on(&self) -> Value {
        let devices = self.vm.qmp(&json!({"execute": "query-block"}));
        let devices = devices.as_array().unwrap().iter();
        devices
            .map(|device| json!([device["qdev"], device["inserted"]["node-name"]]))
            .collect()
    }
}

fn prepare_copy(qmp: &mut Qmp, number: usize, path: &Path) -> Value {
    let devices = qmp.execute(&json!({"execute": "query-block"})).unwrap();
    let qdev = match number {
        2 => "/machine/system.flash1".to_owned(),
        _ => format!("scsi{number}"),
    };
    let device = devices
        .as_array()
        .unwrap()
        .iter()
        .find(|device| device["qdev"] == qdev.as_str())
        .unwrap_or_else(|| panic!("{qdev} is not in {devices}"));
    let inserted = &device["inserted"];
    let size = inserted["image"]["virtual-size"].as_u64().unwrap();
    fs::File::create(path).unwrap().set_len(size).unwrap();
    let name = format!("copy-{number}");
    qmp.execute(&json!({"execute": "blockdev-add", "arguments": {
        "driver": "raw", "node-name": name, "file": {"driver": "file", "filename": path},
    }}))
    .unwrap();
    json!({
        "job-id": name, "device": inserted["node-name"], "target": name,
        "sync": "full", "auto-dismiss": false,
    })
}

/// A full and two incrementals: the second counts from a point that was itself an incremental.
fn nights_are_exact(drives: Drives, iothread: bool) {
    let mut scene = Scene::new(drives, iothread);
    let before = scene.stands_on();
    for night in ["full", "incremental", "incremental"] {
        match iothread {
            true => scene.copy_in_the_transaction(),
            false => scene.copy_while_paused(),
        }
        let document = scene.backup(&[]);
        if iothread {
            scene.end_copies();
        }
        assert_eq!(document["kind"], night, "{document}");
        let note = document["notes"].to_string();
        assert!(note.contains("left out, it is read-only"), "{document}");
        assert_eq!(
            document["notes"].as_array().map(Vec::len),
            Some(1),
            "{document}"
        );
        let read = document["read_bytes"].as_u64().unwrap();
        if night == "incremental" {
            assert!(read > 0 && read < DISK / 4, "{document}");
        }
        scene.assert_clean(&before);
        scene.assert_exact();
    }
    let full = scene.backup(&["--full"]);
    assert_eq!(full["audit"]["result"], "clean", "{full}");
    assert_eq!(
        full["audit"]["disks"].as_array().map(Vec::len),
        Some(3),
        "{full}"
    );
}

#[test]
fn a_guest_on_drives_without_node_names_is_captured_exactly() {
    nights_are_exact(Drives::Drive, false);
}

#[test]
fn a_guest_on_drives_with_io_threads_is_captured_exactly() {
    nights_are_exact(Drives::Drive, true);
}

#[test]
fn a_guest_on_throttled_block_nodes_is_captured_exactly() {
    nights_are_exact(Drives::Blockdev, false);
}

#[test]
fn a_guest_on_throttled_block_nodes_with_io_threads_is_captured_exactly() {
    nights_are_exact(Drives::Blockdev, true);
}
