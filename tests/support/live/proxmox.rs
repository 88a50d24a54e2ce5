use std::path::Path;

use serde_json::json;

use super::super::host::path_text;
use super::image::Image;
use super::vm::Vm;

/// How Proxmox VE gives QEMU its disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drives {
    /// Up to Proxmox VE 8: `-drive …,if=none`, on nodes without names, throttled in the device.
    Drive,
    /// Since Proxmox VE 9: `-blockdev`, a named throttle filter above each image.
    Blockdev,
}

/// Stands for the firmware that Proxmox VE brings: a program in flash memory, read only.
const FIRMWARE: &str = "/usr/share/seabios/bios-256k.bin";
/// An `efidisk0`, whose image may be larger than the flash memory.
pub const EFI_DISK_BYTES: u64 = 540_672;

/// The flash memory of a VM with UEFI: the firmware, and its variables in `efidisk0`.
pub fn proxmox_flash(drives: Drives, variables: &Path) -> Vec<String> {
    let variables = path_text(variables);
    let arguments = match drives {
        Drives::Drive => [
            "-drive".to_owned(),
            format!("if=pflash,unit=0,format=raw,readonly=on,file={FIRMWARE}"),
            "-drive".to_owned(),
            format!(
                "if=pflash,unit=1,id=drive-efidisk0,format=raw,file={variables},\
                 size={EFI_DISK_BYTES}"
            ),
        ]
        .to_vec(),
        Drives::Blockdev => {
            let firmware = json!({
                "driver": "raw", "node-name": "pflash0", "read-only": true,
                "file": {"driver": "file", "filename": FIRMWARE},
            });
            let group = json!({
                "id": "throttle-drive-efidisk0", "limits": {}, "qom-type": "throttle-group",
            });
            let disk = json!({
                "driver": "throttle", "node-name": "drive-efidisk0",
                "throttle-group": "throttle-drive-efidisk0",
                "file": {
                    "driver": "raw", "node-name": format!("f{:030x}", 100),
                    "size": EFI_DISK_BYTES,
                    "file": {
                        "driver": "file", "filename": variables,
                        "node-name": format!("e{:030x}", 100),
                    },
                },
            });
            [
                "-blockdev".to_owned(),
                firmware.to_string(),
                "-object".to_owned(),
                group.to_string(),
                "-blockdev".to_owned(),
                disk.to_string(),
                "-machine".to_owned(),
                "pflash0=pflash0,pflash1=drive-efidisk0".to_owned(),
            ]
            .to_vec()
        }
    };
    assert!(
        Path::new(FIRMWARE).exists(),
        "no {FIRMWARE}; scripts/test installs it"
    );
    arguments
}

/// What Proxmox VE adds to QEMU's arguments for SCSI disks `scsi0`, `scsi1`, …: as `qm showcmd`
/// prints it, but for the paths, the cache mode and asynchronous I/O, which depend on this machine.
pub fn proxmox_disks(drives: Drives, images: &[&Image], iothread: bool) -> Vec<String> {
    let mut arguments = Vec::new();
    let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
    for (number, image) in images.iter().enumerate() {
        let (path, format) = (path_text(&image.path), image.format.name());
        // Controller "VirtIO SCSI single": one for each disk.
        let controller = format!("virtioscsi{number}");
        let thread = format!("iothread-{controller}");
        let served_by = match iothread {
            true => format!(",iothread={thread}"),
            false => String::new(),
        };
        if iothread {
            add("-object", format!("iothread,id={thread}"));
        }
        add(
            "-device",
            format!("virtio-scsi-pci,id={controller},bus=pci.0{served_by}"),
        );
        // With limits, as `iops_rd` and `mbps` of a disk give them; too high to be felt.
        match drives {
            Drives::Drive => add(
                "-drive",
                format!(
                    "file={path},if=none,id=drive-scsi{number},throttling.iops-read=100000,\
                     throttling.bps-total=1073741824,discard=on,format={format},cache=writeback,\
                     aio=threads,detect-zeroes=unmap"
                ),
            ),
            Drives::Blockdev => {
                add(
                    "-object",
                    json!({
                        "id": format!("throttle-drive-scsi{number}"),
                        "limits": {"iops-read": 100_000, "bps-total": 1_u64 << 30},
                        "qom-type": "throttle-group",
                    })
                    .to_string(),
                );
                let options = |driver: &str| {
                    json!({
                        "cache": {"direct": false, "no-flush": false},
                        "detect-zeroes": "unmap",
                        "discard": "unmap",
                        "driver": driver,
                        "read-only": false,
                    })
                };
                let mut file = options("file");
                file["filename"] = path.into();
                file["aio"] = "threads".into();
                file["node-name"] = format!("e{number:030x}").into();
                let mut image = options(format);
                image["file"] = file;
                image["node-name"] = format!("f{number:030x}").into();
                let top = json!({
                    "detect-zeroes": "unmap",
                    "discard": "unmap",
                    "driver": "throttle",
                    "file": image,
                    "node-name": format!("drive-scsi{number}"),
                    "read-only": false,
                    "throttle-group": format!("throttle-drive-scsi{number}"),
                });
                add("-blockdev", top.to_string());
            }
        }
        let identity = match drives {
            Drives::Drive => "",
            Drives::Blockdev => ",write-cache=on",
        };
        add(
            "-device",
            format!(
                "scsi-hd,bus={controller}.0,channel=0,scsi-id=0,lun=0,drive=drive-scsi{number},\
                 id=scsi{number},device_id=drive-scsi{number}{identity}"
            ),
        );
    }
    arguments
}

/// The numbers of the disks in the order in which the guest writes to them: it finds the controllers
/// at the same time, and calls the one that is first `sda`.
#[track_caller]
pub fn order_in_guest(vm: &Vm) -> [usize; 2] {
    let mark = vm.console().mark();
    vm.send("echo \"FOUND $(readlink -f /sys/block/sda) $(readlink -f /sys/block/sdb)\"");
    let said = vm.wait_log("FOUND /sys", mark);
    let paths: Vec<&str> = said.split_whitespace().skip(1).collect();
    assert_eq!(paths.len(), 2, "{said}");
    // By the controllers' places on the bus, which they got in order.
    match paths[0] < paths[1] {
        true => [0, 1],
        false => [1, 0],
    }
}
