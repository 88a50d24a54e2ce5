use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::json;

use super::super::host::path_text;
use super::guest_files::GuestFiles;
use super::image::{Format, Image};
use super::spawn::{command_that_dies_with_us, spawn};

/// A disk of a VM: the image, the device's id and the name of the block node.
#[derive(Debug, Clone)]
pub struct DiskSpec {
    pub path: PathBuf,
    pub format: Format,
    pub id: String,
    pub node: String,
    pub iothread: bool,
}

impl DiskSpec {
    /// `vd0` on node `d0` and so on.
    pub fn new(number: usize, image: &Image) -> Self {
        DiskSpec {
            path: image.path.clone(),
            format: image.format,
            id: format!("vd{number}"),
            node: format!("d{number}"),
            iothread: false,
        }
    }
}

#[derive(Debug, Clone)]
pub struct VmOptions {
    pub name: String,
    /// For sockets and logs. The path must be short: a socket's may have 107 bytes.
    pub folder: PathBuf,
    pub disks: Vec<DiskSpec>,
    pub agent: bool,
    pub memory_mib: u32,
    /// Waits for a migration there instead of booting.
    pub incoming: Option<String>,
    /// Does not run before `cont`.
    pub paused: bool,
    /// What `guest/init` understands, for instance `pause_us=0`.
    pub guest: String,
    pub extra: Vec<String>,
}

impl VmOptions {
    /// With the disks `vd0`, `vd1`, … in this order.
    pub fn new(name: &str, folder: &Path, disks: &[&Image]) -> Self {
        let disks = disks.iter().enumerate();
        VmOptions {
            name: name.to_owned(),
            folder: folder.to_owned(),
            disks: disks.map(|(n, image)| DiskSpec::new(n, image)).collect(),
            agent: false,
            memory_mib: 128,
            incoming: None,
            paused: false,
            guest: String::new(),
            extra: Vec::new(),
        }
    }
}

/// Where the sockets and logs of a VM are.
pub(super) struct Paths<'a>(pub &'a VmOptions);

impl Paths<'_> {
    pub fn with(&self, ending: &str) -> PathBuf {
        let VmOptions { name, folder, .. } = self.0;
        folder.join(format!("{name}.{ending}"))
    }

    pub fn errors(&self) -> String {
        let errors = fs::read_to_string(self.with("errors")).unwrap_or_default();
        format!("QEMU's errors:\n{errors}")
    }

    fn socket(&self, ending: &str) -> String {
        let path = self.with(ending);
        assert!(path_text(&path).len() < 108, "{path:?} is no socket's path");
        // What a killed QEMU left behind would be taken for a new one's.
        let _ = fs::remove_file(&path);
        format!("path={},server=on,wait=off", path_text(&path))
    }
}

pub(super) fn start_qemu(options: &VmOptions) -> Child {
    let paths = Paths(options);
    // Never "KVM if it is there": where /dev/kvm opens but only runs kernels of its own kind, the
    // guest would hang.
    let accel = std::env::var("VMKEEP_TEST_ACCEL").unwrap_or_else(|_| "tcg".to_owned());
    let guest = GuestFiles::made();
    let agent = u8::from(options.agent);
    let serial = format!(
        "socket,id=serial,{},logfile={},logappend=on",
        paths.socket("serial"),
        path_text(&paths.with("console"))
    );
    let mut command = command_that_dies_with_us("qemu-system-x86_64");
    command
        .args(["-name", &options.name, "-M", "pc", "-accel", &accel])
        .args(["-m", &options.memory_mib.to_string()])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-kernel", path_text(&guest.kernel)])
        .args(["-initrd", path_text(&guest.initramfs), "-append"])
        .arg(GuestFiles::command_line(&format!(
            "agent={agent} {}",
            options.guest
        )))
        .args(["-chardev", &serial, "-serial", "chardev:serial"]);
    // In this order: whoever finds the last socket finds all of them.
    if options.agent {
        let socket = format!("socket,id=agent,{}", paths.socket("agent"));
        let port = "virtserialport,chardev=agent,name=org.qemu.guest_agent.0";
        command
            .args(["-device", "virtio-serial-pci"])
            .args(["-chardev", &socket, "-device", port]);
    }
    for ending in ["qmp", "mon"] {
        command
            .arg("-chardev")
            .arg(format!("socket,id={ending},{}", paths.socket(ending)))
            .arg("-mon")
            .arg(format!("chardev={ending},mode=control"));
    }
    for disk in &options.disks {
        add_disk(&mut command, disk);
    }
    if let Some(from) = &options.incoming {
        command.args(["-incoming", from]);
    }
    if options.paused {
        command.arg("-S");
    }
    let errors = OpenOptions::new()
        .create(true)
        .append(true)
        .open(paths.with("errors"))
        .unwrap();
    command
        .args(&options.extra)
        .stdin(Stdio::null())
        .stdout(errors.try_clone().unwrap())
        .stderr(errors);
    spawn(command)
        .unwrap_or_else(|error| panic!("cannot run setpriv ({error}); scripts/test tools"))
}

fn add_disk(command: &mut Command, disk: &DiskSpec) {
    let DiskSpec {
        path,
        format,
        id,
        node,
        iothread,
    } = disk;
    let is_device = fs::metadata(path).is_ok_and(|file| file.file_type().is_block_device());
    let protocol = if is_device { "host_device" } else { "file" };
    let blockdev = json!({
        "driver": format.name(),
        "node-name": node,
        "discard": "unmap",
        "file": { "driver": protocol, "filename": path_text(path), "discard": "unmap" },
    });
    let mut device = format!("virtio-blk-pci,drive={node},id={id}");
    if *iothread {
        command.args(["-object", &format!("iothread,id=io-{id}")]);
        device.push_str(&format!(",iothread=io-{id}"));
    }
    command
        .args(["-blockdev", &blockdev.to_string()])
        .args(["-device", &device]);
}
