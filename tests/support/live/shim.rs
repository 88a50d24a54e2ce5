use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::super::host::{path_text, tool};
use super::image::Image;
use super::vm::Vm;

/// What a VM is readable as while a job is open, as Proxmox VE's backup providers get it.
pub struct Shim {
    folder: PathBuf,
    /// The name of its bitmaps; Proxmox VE has one for each storage.
    pub bitmap: &'static str,
    pub granularity: u64,
    /// Least size of the pieces that are kept in a fleecing image, and given back.
    pub cluster_bytes: u64,
    /// What a fleecing image may hold.
    pub fleecing_bytes: u64,
    opened: Vec<Opened>,
}

/// How a bitmap is used, as `bitmap-mode` says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitmapMode {
    None,
    New,
    Reuse,
}

struct Opened {
    number: usize,
    mode: BitmapMode,
}

/// The bitmap that records while the other one is read.
const MEANWHILE: &str = "meanwhile";

impl Shim {
    pub fn new(folder: &Path) -> Shim {
        Shim {
            folder: folder.to_owned(),
            bitmap: "snapshot-access:vault",
            // That of Proxmox VE.
            granularity: 4 << 20,
            cluster_bytes: 1 << 16,
            fleecing_bytes: 1 << 30,
            opened: Vec::new(),
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.join("access.nbd")
    }

    /// Shows the disks `scsi0`, `scsi1`, … as they are at one instant: a copy-before-write filter
    /// with a fleecing image, the snapshot it keeps, and the bitmap beside it. Of that instant there
    /// are copies afterwards, made while the guest stands still.
    ///
    /// The nodes are those of Proxmox VE, put together with commands that any QEMU has. A new bitmap
    /// differs: there it is dirty all over and the snapshot limited to it, which comes to the same.
    #[track_caller]
    pub fn open(&mut self, vm: &Vm, images: &[Image], modes: &[BitmapMode]) -> Vec<PathBuf> {
        assert!(self.opened.is_empty());
        for (number, image) in images.iter().enumerate() {
            self.add_fleecing(vm, number, image);
        }
        vm.stop();
        for (number, mode) in modes.iter().enumerate() {
            if *mode != BitmapMode::Reuse && self.has_bitmap(vm, number) {
                vm.qmp(
                    &json!({"execute": "block-dirty-bitmap-remove", "arguments": {
                        "node": format!("drive-scsi{number}"), "name": self.bitmap,
                    }}),
                );
            }
        }
        let mut actions = Vec::new();
        for (number, mode) in modes.iter().enumerate() {
            let node = format!("drive-scsi{number}");
            let mut on = |what: &str, name: &str| {
                let data = match what {
                    "add" => json!({"node": node, "name": name, "granularity": self.granularity}),
                    _ => json!({"node": node, "name": name}),
                };
                actions.push(json!({"type": format!("block-dirty-bitmap-{what}"), "data": data}));
            };
            match mode {
                BitmapMode::None => {}
                BitmapMode::New => on("add", self.bitmap),
                BitmapMode::Reuse => {
                    on("disable", self.bitmap);
                    on("add", MEANWHILE);
                }
            }
        }
        vm.qmp(&json!({"execute": "transaction", "arguments": {"actions": actions}}));
        for (number, mode) in modes.iter().enumerate() {
            self.add_access(vm, number, *mode);
            let mode = *mode;
            self.opened.push(Opened { number, mode });
        }
        let copies = images
            .iter()
            .enumerate()
            .map(|(number, image)| {
                image.raw_copy_while_stopped(&self.folder.join(format!("copy-{number}.raw")))
            })
            .collect();
        vm.cont();
        self.start_server(vm, modes);
        copies
    }

    fn fleecing(&self, number: usize) -> PathBuf {
        self.folder.join(format!("fleecing-{number}.qcow2"))
    }

    fn add_fleecing(&self, vm: &Vm, number: usize, image: &Image) {
        let info = tool(
            "qemu-img",
            &[
                "info",
                "-U",
                "--output=json",
                "-f",
                image.format.name(),
                path_text(&image.path),
            ],
        );
        let info: Value = serde_json::from_str(&info).unwrap();
        let size = info["virtual-size"].as_u64().unwrap().to_string();
        let path = self.fleecing(number);
        let create = ["create", "-q", "-f", "qcow2", path_text(&path), &size];
        tool("qemu-img", &create);
        // As far as QEMU is concerned, the storage ends there.
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(self.fleecing_bytes).unwrap();
        vm.qmp(&json!({"execute": "blockdev-add", "arguments": {
            "driver": "qcow2", "node-name": format!("fleecing-{number}"), "discard": "unmap",
            "file": {
                "driver": "raw", "size": self.fleecing_bytes,
                "file": {"driver": "file", "filename": path, "discard": "unmap"},
            },
        }}));
    }

    fn add_access(&self, vm: &Vm, number: usize, mode: BitmapMode) {
        let node = format!("drive-scsi{number}");
        let mut filter = json!({
            "driver": "copy-before-write", "node-name": format!("filter-{number}"),
            "file": node, "target": format!("fleecing-{number}"),
            "on-cbw-error": "break-snapshot", "cbw-timeout": 45,
            "min-cluster-size": self.cluster_bytes,
        });
        if mode == BitmapMode::Reuse {
            filter["bitmap"] = json!({"node": node, "name": self.bitmap});
        }
        vm.qmp(&json!({"execute": "blockdev-add", "arguments": filter}));
        set_drive(vm, number, &format!("filter-{number}"));
        vm.qmp(&json!({"execute": "blockdev-add", "arguments": {
            "driver": "snapshot-access", "node-name": format!("access-{number}"),
            "discard": "unmap",
            "file": format!("filter-{number}"),
        }}));
    }

    fn start_server(&self, vm: &Vm, modes: &[BitmapMode]) {
        vm.qmp(&json!({"execute": "nbd-server-start", "arguments": {
            "addr": {"type": "unix", "data": {"path": self.socket()}},
        }}));
        for (number, mode) in modes.iter().enumerate() {
            let name = format!("drive-scsi{number}");
            let mut export = json!({
                "type": "nbd", "id": name, "name": name, "writable": true,
                "node-name": format!("access-{number}"),
            });
            if *mode == BitmapMode::Reuse {
                export["bitmaps"] = json!([{"node": name, "name": self.bitmap}]);
            }
            vm.qmp(&json!({"execute": "block-export-add", "arguments": export}));
        }
    }

    pub fn stop_server(&self, vm: &Vm) {
        vm.qmp(&json!({"execute": "nbd-server-stop"}));
    }

    /// Ends the job. What its bitmaps count from next is this instant, or what it was before.
    #[track_caller]
    pub fn close(&mut self, vm: &Vm, success: bool) {
        self.stop_server(vm);
        for Opened { number, mode } in std::mem::take(&mut self.opened) {
            let node = format!("drive-scsi{number}");
            let delete = |node: &str| {
                let arguments = json!({"node-name": node});
                vm.qmp(&json!({"execute": "blockdev-del", "arguments": arguments}));
            };
            delete(&format!("access-{number}"));
            set_drive(vm, number, &node);
            delete(&format!("filter-{number}"));
            delete(&format!("fleecing-{number}"));
            let ours = json!({"node": node, "name": self.bitmap});
            let meanwhile = json!({"node": node, "name": MEANWHILE});
            let bitmap = |what: &str, data: &Value| json!({"type": format!("block-dirty-bitmap-{what}"), "data": data});
            let mut actions = Vec::new();
            match (mode, success) {
                (BitmapMode::Reuse, _) => {
                    if success {
                        actions.push(bitmap("clear", &ours));
                    }
                    let mut merge = json!({"node": node, "target": self.bitmap});
                    merge["bitmaps"] = json!([MEANWHILE]);
                    actions.push(bitmap("merge", &merge));
                    actions.push(bitmap("enable", &ours));
                    actions.push(bitmap("remove", &meanwhile));
                }
                // It would be dirty all over, which is as good as none.
                (BitmapMode::New, false) => actions.push(bitmap("remove", &ours)),
                (BitmapMode::New, true) | (BitmapMode::None, _) => {}
            }
            vm.qmp(&json!({"execute": "transaction", "arguments": {"actions": actions}}));
        }
    }

    fn has_bitmap(&self, vm: &Vm, number: usize) -> bool {
        let nodes = vm.qmp(&json!({
            "execute": "query-named-block-nodes", "arguments": {"flat": true},
        }));
        let nodes = nodes.as_array().unwrap();
        let name = format!("drive-scsi{number}");
        let node = nodes.iter().find(|node| node["node-name"] == name.as_str());
        let bitmaps = node.unwrap()["dirty-bitmaps"].as_array();
        bitmaps.is_some_and(|rows| rows.iter().any(|row| row["name"] == self.bitmap))
    }

    fn uri(&self, number: usize) -> String {
        let socket = self.socket();
        format!(
            "nbd+unix:///drive-scsi{number}?socket={}",
            path_text(&socket)
        )
    }

    /// Where the first changes of a disk are, as its bitmap shows them.
    #[track_caller]
    pub fn first_change(&self, number: usize) -> u64 {
        let map = format!("--map=qemu:dirty-bitmap:{}", self.bitmap);
        let map = tool("nbdinfo", &["--json", &map, &self.uri(number)]);
        let map: Value = serde_json::from_str(&map).unwrap();
        let mut rows = map.as_array().unwrap().iter();
        let dirty = rows.find(|row| row["type"] == 1);
        dirty.unwrap_or_else(|| panic!("nothing has changed: {map}"))["offset"]
            .as_u64()
            .unwrap()
    }

    /// Whether the export still shows a part of a disk.
    pub fn shows(&self, number: usize, offset: u64) -> bool {
        let uri = self.uri(number);
        std::process::Command::new("qemu-io")
            .args([
                "-r",
                "-f",
                "raw",
                "-c",
                &format!("read {offset} 65536"),
                &uri,
            ])
            .output()
            .is_ok_and(|output| output.status.success())
    }
}

fn set_drive(vm: &Vm, number: usize, node: &str) {
    vm.qmp(&json!({"execute": "qom-set", "arguments": {
        "path": format!("/machine/peripheral/scsi{number}"), "property": "drive", "value": node,
    }}));
}
