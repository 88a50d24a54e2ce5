//! Restored disks of a guest that was backed up over QMP, booted.

#![forbid(unsafe_code)]

use vmkeep_test_support as support;

use std::fs;
use std::path::PathBuf;

use support::live::{Format, Image, Vm, VmOptions, assert_one_instant, check_image};
use support::{Host, HostOptions, path_text, time};

const DISK: u64 = 64 << 20;

#[test]
fn a_guest_boots_from_its_restored_disks_and_goes_on_with_its_records() {
    let host = Host::new(&HostOptions::default());
    let folder = host.path("vm");
    fs::create_dir(&folder).unwrap();
    let disks = [
        Image::ext4(folder.join("a.qcow2"), DISK, Format::Qcow2),
        Image::ext4(folder.join("b.raw"), DISK, Format::Raw),
    ];
    let vm = Vm::start(VmOptions::new("g", &folder, &[&disks[0], &disks[1]]));
    host.write_config(&format!(
        "[host]\nname = \"host1\"\nclock = \"trusted\"\nstate_dir = \"{}\"\noverlay_dir = \"{}\"\n\n\
         [repository]\nurl = \"{}\"\nreserve = \"1 MiB\"\n\n\
         [policy]\ntimezone = \"UTC\"\nwindow = \"22:00-06:00\"\n\n\
         [[customer]]\nid = \"acme\"\n\n[[customer.vm]]\nname = \"db01\"\nqmp = \"{}\"\n",
        path_text(&host.state()),
        path_text(&host.path("overlays")),
        path_text(host.store()),
        path_text(&vm.qmp_socket()),
    ));
    let (night, later) = (time("2031-02-10T23:17:00Z"), time("2031-02-11T00:17:00Z"));
    host.vmkeep(&["init", "--yes"], night).exits(0);
    vm.wait_ready();
    vm.wait_for_progress(100);
    host.vmkeep(&["backup", "db01"], night).exits(0);
    // What was backed up is gone for good.
    vm.kill9();

    for format in [Format::Raw, Format::Qcow2] {
        let name = format.name();
        let to = host.path(name);
        let restore = ["restore", "db01", "--at", "latest", "--to", path_text(&to)];
        host.vmkeep(&[&restore[..], &["--format", name]].concat(), later)
            .exits(0);
        let images = ["vd0", "vd1"].map(|disk| Image {
            path: to.join(format!("{disk}.{name}")),
            format,
        });
        let copies: Vec<PathBuf> = images
            .iter()
            .map(|image| image.raw_copy(&image.path.with_extension("copy")))
            .collect();
        let restored = assert_one_instant(&[&copies[0], &copies[1]]);

        let options = VmOptions::new(&format!("r-{name}"), &to, &[&images[0], &images[1]]);
        let vm = Vm::start(options);
        vm.wait_ready();
        let said = vm.console().said_since(0);
        for disk in ["MOUNTED vda", "MOUNTED vdb"] {
            assert!(said.contains(disk), "{said}");
        }
        // The guest finds its last good record, on both disks, and goes on after it.
        let next = restored.iter().map(|disk| disk.max_seq).min().unwrap() + 1;
        vm.wait_log(&format!("WRITER from {next}"), 0);
        let told = vm.wait_for_progress(50);
        vm.quit();
        for image in &images {
            let after = check_image(&image.path, format);
            assert!(after.is_whole() && after.max_seq >= told, "{after:#?}");
        }
    }

    // There is no domain in what QEMU tells of itself.
    let to = host.path("none");
    let define = [
        "restore",
        "db01",
        "--at",
        "latest",
        "--to",
        path_text(&to),
        "--define",
        "db02",
    ];
    host.vmkeep(&define, later)
        .exits(2)
        .one_error()
        .says("qemu.json")
        .says("virt-install");
    assert!(!to.exists());
}
