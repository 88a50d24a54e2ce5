//! Domains of a real libvirt, backed up and restored by the shipped program: nights in which much
//! happens to a running guest, and new domains that are made of its points.

#![forbid(unsafe_code)]

use vmkeep_test_support as support;

use jiff::{Span, Timestamp};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use support::libvirt::{Machine, Terminal, eventually, last_record};
use support::live::{Format, assert_one_instant, check_image};
use support::{Host, HostOptions, path_text, time, tool};

/// A host that backs up one domain. Its virsh stops the guest for the instant of a capture, copies
/// the images meanwhile, and kills vmkeep where it is told to.
struct Scene {
    host: Host,
    machine: Machine,
    now: Timestamp,
    /// Each night, and the copies of its instant.
    nights: Vec<(Timestamp, PathBuf)>,
}

impl Scene {
    fn new(machine: Machine) -> Scene {
        let host = Host::new(&HostOptions::default());
        fs::create_dir(host.path("tools")).unwrap();
        let text = format!(
            "[host]\nname = \"host1\"\nclock = \"trusted\"\nstate_dir = \"{}\"\n\
             overlay_dir = \"{}\"\nlibvirt_uri = \"{}\"\n\n\
             [repository]\nurl = \"{}\"\nreserve = \"1 MiB\"\n\n\
             [policy]\ntimezone = \"UTC\"\nwindow = \"22:00-06:00\"\n\n\
             [[customer]]\nid = \"acme\"\n\n[[customer.vm]]\nname = \"web01\"\n\
             libvirt = \"{}\"\nfsfreeze = \"never\"\n",
            path_text(&host.state()),
            machine.text("overlays"),
            machine.daemon.uri(),
            path_text(host.store()),
            machine.name,
        );
        host.write_config(&text);
        let now = time("2031-02-10T23:17:00Z");
        host.vmkeep(&["init", "--yes"], now).exits(0);
        let scene = Scene {
            host,
            machine,
            now,
            nights: Vec::new(),
        };
        scene.put_virsh();
        scene
    }

    fn tool_file(&self, name: &str) -> PathBuf {
        self.host.path("tools").join(name)
    }

    fn put_virsh(&self) {
        let script = format!(
            r#"#!/bin/bash
# Not in the clock of the program under test.
unset LD_PRELOAD
cd "{tools}" || exit 1
real() {{ {real} "$@"; }}
ours() {{ real -q -c '{uri}' "$@" > /dev/null; }}
what=${{4-}}
echo "$what" >> asked
if [ "$what" = backup-begin ] && [ -e copies ]; then
    ours suspend '{name}'
    real -q -c '{uri}' domblklist '{name}' --details | while read -r _ device disk image; do
        [ "$device" = disk ] || continue
        format=qcow2
        [ "${{image%.raw}}" = "$image" ] || format=raw
        qemu-img convert -U -f $format -O raw "$image" "$(cat copies)/$disk.raw" || touch failed
    done
    real "$@"
    code=$?
    ours resume '{name}'
else
    real "$@"
    code=$?
fi
# Asking again how it stands is the same step; how often that is done depends on the machine.
if [ -e victim ] && [ "$(uniq asked | wc -l)" -ge "$(cat victim)" ]; then
    echo "$what" > killed
    rm victim
    kill -9 $PPID
fi
exit $code
"#,
            tools = path_text(&self.host.path("tools")),
            real = tool("which", &["virsh"]).trim(),
            uri = self.machine.daemon.uri(),
            name = self.machine.name,
        );
        let path = self.tool_file("virsh");
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn next_night(&mut self) {
        self.now += Span::new().hours(24);
        self.machine.wait_for_progress(20);
    }

    /// A backup, with copies of the images at its instant.
    #[track_caller]
    fn backup(&mut self, arguments: &[&str]) -> Value {
        let copies = self.host.path(&format!("copies-{}", self.nights.len()));
        fs::create_dir(&copies).unwrap();
        fs::write(self.tool_file("copies"), path_text(&copies)).unwrap();
        let arguments = [&["backup", "web01"], arguments].concat();
        let night = self.host.json(&arguments, self.now)["vms"][0].take();
        fs::remove_file(self.tool_file("copies")).unwrap();
        assert!(!self.tool_file("failed").exists(), "a copy failed");
        self.nights.push((self.now, copies));
        assert_eq!(self.checkpoints(), 1, "{night}");
        night
    }

    fn checkpoints(&self) -> usize {
        let all = self.machine.checkpoints();
        all.iter().filter(|name| !name.is_empty()).count()
    }

    /// Kills vmkeep once its virsh has done the `step`-th kind of command in a row; which one that
    /// was, if there are so many.
    fn killed_backup(&mut self, step: usize) -> Option<String> {
        fs::remove_file(self.tool_file("asked")).unwrap();
        fs::write(self.tool_file("victim"), step.to_string()).unwrap();
        let ran = self.host.vmkeep(&["backup", "web01"], self.now);
        match fs::read_to_string(self.tool_file("killed")) {
            Ok(command) => {
                assert!(ran.was_killed(), "{command}: {ran}");
                fs::remove_file(self.tool_file("killed")).unwrap();
                Some(command.trim().to_string())
            }
            Err(_) => {
                ran.exits(0);
                fs::remove_file(self.tool_file("victim")).unwrap();
                None
            }
        }
    }

    /// Every point is what the images were at its instant, and the newest one's records agree.
    fn assert_all_exact(&self) {
        let at = self.now + Span::new().hours(1);
        for (night, copies) in &self.nights {
            let when = (*night + Span::new().minutes(5)).to_string();
            let restored = self.host.restore("web01", &when, at);
            let disks: Vec<PathBuf> = fs::read_dir(copies)
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .collect();
            assert!(disks.len() >= 2, "{disks:?}");
            for copy in &disks {
                let image = restored.path().join(copy.file_name().unwrap());
                tool("cmp", &[path_text(copy), path_text(&image)]);
            }
            // The copies were made while the guest stood still.
            if *night == self.now {
                let image = |name: &str| restored.path().join(name);
                assert_one_instant(&[&image("vda.raw"), &image("vdb.raw")]);
            }
        }
    }
}

#[track_caller]
fn assert_tracked(night: &Value) {
    assert_eq!(night["kind"], "incremental");
    let notes = night["notes"].to_string();
    assert!(!notes.contains("read in full"), "{notes}");
}

#[track_caller]
fn assert_says(night: &Value, said: &[&str], unsaid: &[&str]) {
    let notes = night["notes"].to_string();
    for part in said {
        assert!(notes.contains(part), "{part:?} is not in {notes}");
    }
    for part in unsaid {
        assert!(!notes.contains(part), "{part:?} is in {notes}");
    }
}

#[test]
fn nights_of_a_running_domain_are_exact_whatever_happens_to_it() {
    let machine = Machine::define_writing("nights", "");
    machine.start();
    machine.wait_for_progress(50);
    let mut scene = Scene::new(machine);
    let virsh = |scene: &Scene, arguments: &[&str]| scene.machine.daemon.virsh(arguments);

    let full = scene.backup(&[]);
    assert_eq!(full["kind"], "full");
    scene.next_night();
    assert_tracked(&scene.backup(&[]));

    // The same QEMU goes on.
    scene.machine.reboot();
    scene.next_night();
    assert_tracked(&scene.backup(&[]));

    // A clean end keeps the bitmaps in the images.
    scene.machine.power_off();
    scene.machine.start();
    scene.next_night();
    assert_tracked(&scene.backup(&[]));

    // Nobody knows what was written last.
    scene.machine.crash();
    scene.machine.start();
    scene.next_night();
    let night = scene.backup(&[]);
    let lost = "missing or broken, as after a crash of QEMU";
    let said = ["vda", "vdb"].map(|disk| format!("{disk}: read in full (the bitmap of"));
    assert_says(&night, &[&said[0], &said[1], lost], &[]);

    scene.next_night();
    let image = scene.machine.text("vda.qcow2");
    virsh(&scene, &["blockresize", "nights", &image, "32M"]);
    let night = scene.backup(&[]);
    assert_says(&night, &["vda: read in full (the size"], &["vdb: read"]);

    scene.next_night();
    let added = scene.machine.text("vdc.raw");
    fs::write(&added, vec![0x5a; 3 << 20]).unwrap();
    virsh(
        &scene,
        &[
            "attach-disk",
            "nights",
            &added,
            "vdc",
            "--driver",
            "qemu",
            "--subdriver",
            "raw",
            "--persistent",
        ],
    );
    let night = scene.backup(&[]);
    let new = "vdc: read in full (a new disk)";
    assert_says(&night, &[new], &["vda: read", "vdb: read"]);

    // libvirt follows the bitmaps through the chain.
    scene.next_night();
    let overlay = format!("vda,file={}", scene.machine.text("snap.qcow2"));
    virsh(
        &scene,
        &[
            "snapshot-create-as",
            "nights",
            "s1",
            "--disk-only",
            "--no-metadata",
            "--diskspec",
            &overlay,
            "--diskspec",
            "vdb,snapshot=no",
            "--diskspec",
            "vdc,snapshot=no",
        ],
    );
    scene.machine.wait_for_progress(20);
    let night = scene.backup(&[]);
    let untracked = "vdc: read in full (libvirt keeps no record of changes in a raw image";
    assert_says(&night, &[untracked], &["vda: read", "vdb: read"]);

    // The weekly full is held against the bitmaps.
    scene.next_night();
    let full = scene.backup(&["--full"]);
    assert_eq!(full["kind"], "full");
    assert_eq!(full["audit"]["result"], "clean", "{full}");

    scene.assert_all_exact();
    let kinds: Vec<String> = scene
        .host
        .points(scene.now)
        .iter()
        .map(|point| point["kind"].as_str().unwrap().to_string())
        .collect();
    assert_eq!(kinds.len(), 9);
    assert_eq!(kinds.iter().filter(|kind| *kind == "full").count(), 2);
}

#[test]
fn an_agent_killed_at_any_command_leaves_a_domain_that_runs_on_and_an_exact_next_night() {
    let machine = Machine::define_writing("killed", "");
    machine.start();
    machine.wait_for_progress(20);
    let mut scene = Scene::new(machine);
    scene.backup(&[]);
    let (mut step, mut at) = (1, Vec::new());
    loop {
        scene.next_night();
        let Some(command) = scene.killed_backup(step) else {
            break;
        };
        step += 1;
        // Later than the killed one, which may have committed its point.
        scene.now += Span::new().minutes(30);
        scene.machine.wait_for_progress(5);
        let night = scene.backup(&[]);
        assert_tracked(&night);
        at.push(command);
    }
    println!("killed after {at:?}");
    for command in [
        "dumpxml",
        "backup-begin",
        "domjobabort",
        "checkpoint-delete",
    ] {
        assert!(at.iter().any(|known| known == command), "{command}: {at:?}");
    }
    let left = fs::read_dir(scene.machine.folder.join("overlays")).unwrap();
    assert_eq!(left.count(), 0);
    scene.assert_all_exact();
}

/// Starts a domain that is not a `Machine`, with somebody who listens from its first word.
fn start(machine: &Machine, name: &str) -> Terminal {
    machine.daemon.virsh(&["start", name, "--paused"]);
    let path = machine.daemon.virsh(&["ttyconsole", name]);
    let terminal = Terminal::open(Path::new(&path));
    machine.daemon.virsh(&["resume", name]);
    terminal
}

fn is_shut_off(machine: &Machine, name: &str) -> bool {
    machine.daemon.virsh(&["domstate", name]) == "shut off"
}

#[test]
fn a_domain_made_of_a_point_runs_beside_the_other_one_with_its_records() {
    let channel = "<channel type='unix'><source mode='bind' path='/run/libvirt/made.agent'/>\
                   <target type='virtio' name='org.qemu.guest_agent.0'/></channel>\
                   <interface type='user'><mac address='52:54:00:aa:bb:cc'/>\
                   <model type='virtio'/></interface>\
                   <graphics type='vnc' port='5999' autoport='no' listen='127.0.0.1'/>";
    let machine = Machine::define_writing("made", channel);
    machine.start();
    machine.wait_for_progress(50);
    let mut scene = Scene::new(machine);
    scene.backup(&[]);
    let at = scene.now + Span::new().minutes(5);
    let restore = |to: &Path, more: &[&str]| {
        let to = path_text(to).to_string();
        let plain = ["--json", "restore", "web01", "--at", "latest", "--to", &to];
        scene.host.vmkeep(&[&plain, more].concat(), at)
    };

    let folder = scene.machine.folder.join("new");
    let ran = restore(&folder, &["--define", "made-test", "--format", "qcow2"]);
    let told = ran.exits(0).document();
    assert_eq!(told["domain"]["name"], "made-test");
    let notes = told["notes"].to_string();
    for note in [
        "guest_agent.0 gets a new socket",
        "vnc server gets another port",
        "serial led",
    ] {
        assert!(notes.contains(note), "{note}: {notes}");
    }
    let xml = scene.machine.daemon.virsh(&["dumpxml", "made-test"]);
    let uuid = scene.machine.daemon.virsh(&["domuuid", "made-test"]);
    assert_eq!(told["domain"]["uuid"], uuid.as_str());
    assert_ne!(scene.machine.daemon.virsh(&["domuuid", "made"]), uuid);
    for old in ["52:54:00:aa:bb:cc", "5999", "made.agent", "/made/vd"] {
        assert!(!xml.contains(old), "{old}: {xml}");
    }

    // Beside the other one, which writes on.
    let before: Vec<u64> = ["vda", "vdb"]
        .map(|disk| folder.join(format!("{disk}.qcow2")))
        .iter()
        .map(|image| check_image(image, Format::Qcow2))
        .map(|checked| {
            assert!(checked.is_whole(), "{checked:#?}");
            checked.max_seq
        })
        .collect();
    assert!(before[0] >= 50, "{before:?}");
    let terminal = start(&scene.machine, "made-test");
    terminal.wait_for("READY");
    eventually("the restored guest writes on", || {
        last_record(&terminal.said()).is_some_and(|last| last > before[0] + 50)
    });
    scene.machine.wait_for_progress(10);
    terminal.send("quit");
    eventually("it is off", || is_shut_off(&scene.machine, "made-test"));
    for disk in ["vda", "vdb"] {
        let after = check_image(&folder.join(format!("{disk}.qcow2")), Format::Qcow2);
        assert!(
            after.is_whole() && after.max_seq > before[0] + 50,
            "{after:#?}"
        );
    }

    // What is in the way is told before anything is restored.
    let other = scene.machine.folder.join("other");
    let taken = restore(&other, &["--define", "made-test"]);
    taken.exits(1).says("of this name already");
    let known = restore(&other, &["--define", "made-again", "--keep-identity"]);
    known.exits(1).says("the domain made has the UUID");
    assert!(!other.exists());
    let again = restore(&folder, &["--define", "made-more"]);
    again.exits(2).says("already exists");
    let definition = Path::new(told["definition"].as_str().unwrap());
    let third = scene.machine.folder.join("third");
    fs::create_dir(&third).unwrap();
    fs::write(third.join(definition.file_name().unwrap()), "precious").unwrap();
    let taken = restore(&third, &[]);
    taken
        .exits(2)
        .says("already exists")
        .says("nothing was restored");
    assert_eq!(fs::read_dir(&third).unwrap().count(), 1);

    // The host is lost, and the domain comes back as it was.
    let old = scene.machine.daemon.virsh(&["domuuid", "made"]);
    scene.machine.daemon.virsh(&["destroy", "made"]);
    scene
        .machine
        .daemon
        .virsh(&["undefine", "made", "--checkpoints-metadata"]);
    restore(&other, &["--define", "made", "--keep-identity"]).exits(0);
    assert_eq!(scene.machine.daemon.virsh(&["domuuid", "made"]), old);
    let xml = scene.machine.daemon.virsh(&["dumpxml", "made"]);
    for kept in ["52:54:00:aa:bb:cc", "5999", "made.agent", "/other/vda.raw"] {
        assert!(xml.contains(kept), "{kept}: {xml}");
    }
    for name in ["made", "made-test"] {
        scene.machine.daemon.virsh(&["undefine", name]);
    }
}

#[test]
fn a_domain_with_everything_that_cannot_be_shared_is_defined_without_it() {
    let devices = "<hostdev mode='subsystem' type='pci' managed='yes'><source>\
         <address domain='0x0000' bus='0x00' slot='0x1f' function='0x0'/></source></hostdev>\
         <filesystem type='mount'><source dir='/srv'/><target dir='share'/></filesystem>\
         <interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br9'/>\
         <target dev='tap-rich'/><virtualport type='openvswitch'>\
         <parameters interfaceid='09b11c53-8b5c-4eeb-8f00-d84eaa0aaa4f'/></virtualport>\
         </interface>\
         <disk type='file' device='cdrom'><source file='/iso/none.iso'/>\
         <target dev='hdb' bus='ide'/><readonly/></disk>\
         <disk type='file' device='disk'><driver name='qemu' type='raw'/>\
         <source file='/v/read-only.raw'/><target dev='vde' bus='virtio'/><readonly/></disk>\
         <parallel type='file'><source path='/log/rich'/></parallel>\
         <vsock><cid auto='no' address='77'/></vsock>\
         <shmem name='rich'><model type='ivshmem-plain'/><size unit='M'>4</size></shmem>\
         <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>\
         <graphics type='vnc' port='5998' autoport='no'/>";
    let machine = Machine::define_writing("rich", devices);
    let nvram = machine.text("rich_VARS.fd");
    let xml = fs::read_to_string(machine.text("domain.xml")).unwrap();
    // It is never started.
    let firmware = format!(
        "<loader readonly='yes' type='pflash'>/fw/CODE.fd</loader>\
         <nvram template='/fw/VARS.fd'>{nvram}</nvram></os>"
    );
    let more = "<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>\
         <qemu:arg value='-fw_cfg'/><qemu:arg value='name=opt/x,file=/v/ign'/>\
         </qemu:commandline></domain>";
    let uuid = "5c1b5e3c-4f5b-4d3b-9a53-3f2d0d1c7a10";
    let identity = format!(
        "<uuid>{uuid}</uuid><genid>{uuid}</genid><sysinfo type='smbios'><system>\
         <entry name='serial'>S</entry><entry name='uuid'>{uuid}</entry></system></sysinfo><os>"
    );
    let xml = xml
        .replace("<os>", &identity)
        .replace("</os>", &firmware)
        .replace("</domain>", more);
    machine.daemon.virsh(&["undefine", "rich"]);
    fs::write(machine.text("domain.xml"), xml).unwrap();
    machine
        .daemon
        .virsh(&["define", "--validate", &machine.text("domain.xml")]);
    let content: Vec<u8> = (0..540_672_u32).map(|at| (at % 251) as u8).collect();
    fs::write(&nvram, content).unwrap();
    let scene = Scene::new(machine);
    let backup = scene.host.json(&["backup", "web01"], scene.now);
    assert!(backup.to_string().contains("shut off"), "{backup}");
    let at = scene.now + Span::new().minutes(5);
    let folder = scene.machine.folder.join("a folder & <more>");
    let to = path_text(&folder);
    let base = ["restore", "web01", "--at", "latest", "--to", to];
    let flags = ["--format", "qcow2", "--define", "rich copy"];
    let ran = scene.host.vmkeep(&[&base[..], &flags[..]].concat(), at);
    ran.exits(0)
        .says("a device of the host is left out")
        .says("a folder of the host is left out")
        .says("shared memory is left out")
        .says("command line is left out")
        .says("the disk vde is left out")
        .says("virsh -c")
        .says("start 'rich copy'");
    tool("cmp", &[&nvram, path_text(&folder.join("nvram.raw"))]);
    let xml = scene
        .machine
        .daemon
        .virsh(&["dumpxml", "--security-info", "rich copy"]);
    for old in [
        "5c1b5e3c",
        "52:54:00:00:00:01",
        "tap-rich",
        "09b11c53",
        "<hostdev",
        "<filesystem",
        "/v/",
        "/log/",
        "'77'",
        "<shmem",
        "5998",
        "_VARS.fd",
    ] {
        assert!(!xml.contains(old), "{old}: {xml}");
    }
    for new in [
        "/a folder &amp; &lt;more&gt;/vda.qcow2",
        "template='/fw/VARS.fd'",
        "nvram.raw</nvram>",
        "/iso/none.iso",
        "startupPolicy='optional'",
        "bridge='br9'",
        "<genid>",
    ] {
        assert!(xml.contains(new), "{new}: {xml}");
    }
    // Nothing of the new domain is where the other one writes.
    let images = scene
        .machine
        .daemon
        .virsh(&["domblklist", "rich copy", "--details"]);
    let writable = images.lines().filter(|line| line.contains(" disk "));
    assert!(
        writable.clone().count() == 2 && writable.clone().all(|line| line.contains("/a folder &")),
        "{images}"
    );
    for name in ["rich copy", "rich"] {
        scene
            .machine
            .daemon
            .virsh(&["undefine", name, "--keep-nvram"]);
    }
}
