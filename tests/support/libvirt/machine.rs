use super::super::live::{Format, GuestFiles, Image};
use super::{Daemon, eventually};
use std::cell::RefCell;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::thread;

const MIB: u64 = 1 << 20;

/// A domain of libvirt whose guest does what its console is told.
pub struct Machine {
    pub daemon: &'static Daemon,
    pub name: String,
    pub folder: PathBuf,
    console: RefCell<Option<UnixStream>>,
    commands: RefCell<u32>,
}

fn tool(name: &str, arguments: &[&str]) {
    let output = Command::new(name).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {arguments:?}: {said}");
}

fn qemu_user() -> (u32, u32) {
    let output = Command::new("id").args(["-u", "libvirt-qemu"]).output();
    let number = String::from_utf8(output.unwrap().stdout).unwrap();
    let user = number.trim().parse().expect("the user libvirt-qemu");
    (user, user)
}

impl Machine {
    /// With three disks: `vda` (qcow2, bare), `vdb` (qcow2, with ext4 in it) and `vdc` (raw, bare).
    /// In one with an agent, an I/O thread serves `vdb`.
    pub fn define(name: &str, agent: bool) -> Machine {
        let machine = Machine::new(name);
        let path = |name: &str| machine.text(name);
        let (vda, vdb, vdc) = (path("vda.qcow2"), path("vdb.qcow2"), path("vdc.raw"));
        tool("qemu-img", &["create", "-q", "-f", "qcow2", &vda, "32M"]);
        Image::ext4(&vdb, 16 * MIB, Format::Qcow2);
        fs::File::create(&vdc).unwrap().set_len(8 * MIB).unwrap();
        machine.register("writer=0", agent, agent, "", &["qcow2", "qcow2", "raw"]);
        machine
    }

    /// With two disks that its guest writes records to: `vda` (qcow2) and `vdb` (qcow2).
    pub fn define_writing(name: &str, devices: &str) -> Machine {
        let machine = Machine::new(name);
        for disk in ["vda", "vdb"] {
            let path = machine.folder.join(format!("{disk}.qcow2"));
            Image::ext4(path, 24 * MIB, Format::Qcow2);
        }
        machine.register(
            "pause_us=1000 slots=1024",
            false,
            false,
            devices,
            &["qcow2", "qcow2"],
        );
        machine
    }

    fn new(name: &str) -> Machine {
        let daemon = Daemon::shared();
        let folder = daemon.folder(name);
        let (user, _) = qemu_user();
        chown(&folder, Some(user), None).unwrap();
        Machine {
            daemon,
            name: name.to_string(),
            folder,
            console: RefCell::new(None),
            commands: RefCell::new(0),
        }
    }

    fn register(&self, own: &str, agent: bool, io_thread: bool, devices: &str, formats: &[&str]) {
        let path = |name: &str| self.text(name);
        let guest = GuestFiles::made();
        // QEMU's user must be able to read them, wherever the project lies.
        fs::copy(&guest.kernel, path("kernel")).unwrap();
        fs::copy(&guest.initramfs, path("initramfs")).unwrap();
        let channel = match agent {
            true => {
                "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/>\
                 </channel>"
            }
            false => "",
        };
        let disks: String = ('a'..)
            .zip(formats)
            .map(|(letter, format)| {
                let served_by = match io_thread && letter == 'b' {
                    true => "iothread='1'",
                    false => "",
                };
                format!(
                    "<disk type='file' device='disk'>
                     <driver name='qemu' type='{format}' {served_by}/>
                     <source file='{}'/><target dev='vd{letter}' bus='virtio'/></disk>",
                    path(&format!("vd{letter}.{format}"))
                )
            })
            .collect();
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>160</memory><vcpu>1</vcpu>
             <iothreads>{threads}</iothreads>
             <os><type arch='x86_64' machine='pc'>hvm</type><kernel>{kernel}</kernel>
             <initrd>{initramfs}</initrd><cmdline>{command_line}</cmdline></os>
             <features><acpi/></features><on_poweroff>destroy</on_poweroff><devices>
             {disks}
             <disk type='file' device='cdrom'><target dev='hda' bus='ide'/><readonly/></disk>
             {channel}{devices}<serial type='unix'><source mode='bind' path='{console}'/>
             <log file='{log}' append='off'/><target port='0'/></serial>
             <memballoon model='none'/></devices></domain>",
            threads = u8::from(io_thread),
            kernel = path("kernel"),
            initramfs = path("initramfs"),
            command_line = GuestFiles::command_line(&format!("{own} agent={}", u8::from(agent))),
            name = self.name,
            console = path("console"),
            log = path("log"),
        );
        fs::write(path("domain.xml"), xml).unwrap();
        self.daemon.virsh(&["define", &path("domain.xml")]);
    }

    pub fn text(&self, name: &str) -> String {
        self.folder.join(name).to_str().unwrap().to_string()
    }

    pub fn start(&self) {
        self.daemon.virsh(&["start", &self.name]);
        *self.console.borrow_mut() = None;
        eventually("the guest is ready", || self.log().contains("READY"));
        let console = UnixStream::connect(self.folder.join("console")).unwrap();
        // The guest stands still once nobody reads what it says; the log has it as well.
        let mut said = console.try_clone().unwrap();
        thread::spawn(move || io::copy(&mut said, &mut io::sink()));
        *self.console.borrow_mut() = Some(console);
    }

    /// The guest leaves its disks and boots again; QEMU lives on.
    pub fn reboot(&self) {
        let boots = || self.log().matches("READY").count();
        let before = boots();
        let mut console = self.console.borrow_mut();
        console.as_mut().unwrap().write_all(b"reboot\n").unwrap();
        eventually("the guest is ready again", || boots() > before);
    }

    /// Waits until the guest has told of so many more records than now.
    #[track_caller]
    pub fn wait_for_progress(&self, records: u64) {
        let told = || last_record(&self.log()).unwrap_or(0);
        let first = told();
        eventually("the guest writes", || told() >= first + records);
    }

    fn log(&self) -> String {
        let bytes = fs::read(self.folder.join("log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Tells the guest's shell, without waiting. The number that `said` waits for.
    pub fn tell(&self, command: &str) -> u32 {
        let number = *self.commands.borrow() + 1;
        *self.commands.borrow_mut() = number;
        let mut console = self.console.borrow_mut();
        let line = format!("{command}; echo \"DID {number} <$?>\"\n");
        let console = console.as_mut().expect("a started guest");
        console.write_all(line.as_bytes()).unwrap();
        number
    }

    pub fn has_done(&self, number: u32) -> bool {
        let log = self.log();
        log.split_once(&format!("DID {number} <"))
            .is_some_and(|(_, rest)| rest.contains('>'))
    }

    /// Runs a command in the guest; what the console showed meanwhile.
    #[track_caller]
    pub fn run(&self, command: &str) -> String {
        let before = self.log().len();
        let number = self.tell(command);
        eventually(command, || self.has_done(number));
        let log = self.log();
        assert!(
            log.contains(&format!("DID {number} <0>")),
            "{command}: {log}"
        );
        log.get(before..).unwrap_or_default().to_string()
    }

    /// Writes `count` random blocks of 64 KiB from block `at`.
    #[track_caller]
    pub fn write(&self, disk: &str, at: u64, count: u64) {
        self.run(&format!(
            "dd if=/dev/urandom of=/dev/{disk} bs=64k seek={at} count={count} conv=fsync,notrunc \
             2>/dev/null"
        ));
    }

    /// The SHA-256 of a disk, as the guest sees it.
    #[track_caller]
    pub fn sha256(&self, disk: &str) -> String {
        let said = self.run(&format!("sha256sum /dev/{disk}"));
        let found = said
            .split_whitespace()
            .find(|word| word.len() == 64 && word.bytes().all(|byte| byte.is_ascii_hexdigit()));
        found.expect("a checksum").to_string()
    }

    pub fn is_shut_off(&self) -> bool {
        self.daemon.virsh(&["domstate", &self.name]) == "shut off"
    }

    #[track_caller]
    pub fn power_off(&self) {
        let mut console = self.console.borrow_mut();
        console.as_mut().unwrap().write_all(b"quit\n").unwrap();
        eventually("the guest is off", || self.is_shut_off());
    }

    /// `kill -9` of its QEMU.
    #[track_caller]
    pub fn crash(&self) {
        let wanted = format!("guest={},", self.name);
        let process = fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().into_string().ok())
            .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
            .find(|number| {
                let line = fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
                let line = String::from_utf8_lossy(&line).into_owned();
                line.contains("qemu-system") && line.contains(&wanted)
            })
            .expect("its QEMU");
        tool("kill", &["-9", &process]);
        eventually("libvirt has noticed", || self.is_shut_off());
    }

    pub fn checkpoints(&self) -> Vec<String> {
        let said = self
            .daemon
            .virsh(&["checkpoint-list", &self.name, "--name"]);
        said.lines().map(|line| line.trim().to_string()).collect()
    }

    /// The bitmaps in an image that no VM uses.
    pub fn bitmaps(&self, image: &str) -> usize {
        let output = Command::new("qemu-img")
            .args(["info", "--output=json", &self.text(image)])
            .output()
            .unwrap();
        let info: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        info["format-specific"]["data"]["bitmaps"]
            .as_array()
            .map_or(0, Vec::len)
    }
}

/// The last record that a guest has told of.
pub fn last_record(said: &str) -> Option<u64> {
    let lines = said.rsplit_once('\n')?.0.lines();
    lines
        .rev()
        .find_map(|line| line.trim_end().strip_prefix("SEQ ")?.parse().ok())
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.daemon.ask(&["destroy", &self.name]);
        // What a failed test leaves is looked at.
        if !thread::panicking() {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}
