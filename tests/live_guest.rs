//! Proves the harness of `support::live` itself: that a guest runs, writes, can be stopped and
//! started, and that its images tell the instant they were taken at.

#![forbid(unsafe_code)]

use vmkeep_test_support as support;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use support::live::{
    Format, Image, Latency, Vm, VmOptions, assert_one_instant, check_image, one_instant, record,
};
use support::{path_text, tool};

const DISK: u64 = 64 << 20;

#[test]
fn a_guest_writes_on_through_copies_and_restarts_and_its_copies_show_one_instant() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let disks = [
        Image::ext4(path("a.qcow2"), DISK, Format::Qcow2),
        Image::ext4(path("b.raw"), DISK, Format::Raw),
    ];
    let mut options = VmOptions::new("guest", folder.path(), &[&disks[0], &disks[1]]);
    options.agent = true;
    options.disks[1].iothread = true;
    let mut vm = Vm::start(options);
    vm.wait_ready();
    vm.wait_for_progress(100);

    vm.stop();
    assert_eq!(vm.status(), "paused");
    let copies = [
        disks[0].raw_copy_while_stopped(&path("a.copy")),
        disks[1].raw_copy_while_stopped(&path("b.copy")),
    ];
    vm.cont();
    let told = vm.wait_for_progress(50);
    let checked = assert_one_instant(&[&copies[0], &copies[1]]);
    assert!((100..told).contains(&checked[0].max_seq), "{checked:#?}");
    assert!(checked[0].journal_replayed, "it was in use: {checked:#?}");

    let latency = vm.latency(100);
    assert_eq!(latency.count, 100);
    let Latency {
        p50_us,
        p99_us,
        max_us,
        ..
    } = latency;
    assert!(
        p50_us > 0 && p50_us <= p99_us && p99_us <= max_us,
        "{latency:?}"
    );
    assert!(max_us < 10_000_000, "{latency:?}");

    assert_eq!(vm.console().shell("echo one; false"), (1, "one".to_owned()));

    vm.quit();
    assert!(!vm.is_running());
    let left = check_image(&disks[0].path, Format::Qcow2);
    assert!(left.is_whole() && !left.journal_replayed, "{left:#?}");
    assert_eq!(left.max_seq, vm.seq());
    assert_eq!(
        check_image(&disks[1].path, Format::Raw).max_seq,
        left.max_seq
    );

    vm.restart();
    vm.wait_ready();
    assert!(vm.wait_for_progress(20) > left.max_seq);
}

#[test]
fn a_guest_survives_power_failure_and_reboot_and_its_agent_freezes_it() {
    let folder = tempfile::tempdir().unwrap();
    let disks = ["a", "b"]
        .map(|name| Image::ext4(folder.path().join(format!("{name}.raw")), DISK, Format::Raw));
    let mut options = VmOptions::new("guest", folder.path(), &[&disks[0], &disks[1]]);
    options.agent = true;
    let mut vm = Vm::start(options);
    vm.wait_ready();
    vm.wait_for_progress(50);

    let ask = |vm: &Vm, command: &str| vm.agent(command, Duration::from_secs(20)).unwrap();
    assert_eq!(ask(&vm, "guest-fsfreeze-freeze").unwrap(), 2);
    vm.stop();
    let frozen = disks.each_ref().map(|disk| {
        let copy = disk.path.with_extension("frozen");
        disk.raw_copy_while_stopped(&copy)
    });
    vm.cont();
    assert_eq!(ask(&vm, "guest-fsfreeze-thaw").unwrap(), 2);
    vm.wait_for_progress(20);
    for checked in assert_one_instant(&frozen.each_ref().map(|path| path.as_path())) {
        assert!(!checked.journal_replayed, "{checked:#?}");
    }

    let before = vm.wait_for_progress(1);
    vm.reboot();
    assert!(vm.wait_for_progress(20) > before);

    let before = vm.seq();
    vm.kill9();
    assert!(!vm.is_running());
    let left = assert_one_instant(&disks.each_ref().map(|disk| disk.path.as_path()));
    assert!(left[0].max_seq >= before && left[0].journal_replayed);
    vm.restart();
    vm.wait_ready();
    assert!(vm.wait_for_progress(20) > left[0].max_seq);
}

/// No guest needed: what the check says of images that cannot be right.
#[test]
fn images_of_different_instants_and_damaged_records_are_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let image = |name: &str| Image::ext4(folder.path().join(name), DISK, Format::Raw).path;
    let is_one_instant = |images: &[&Path]| one_instant(images).is_ok();
    let [five, four, three] = [5, 4, 3].map(|last| {
        let image = image(&format!("{last}.raw"));
        put_records(&image, last);
        image
    });
    assert!(is_one_instant(&[&five, &five, &four]));
    assert!(
        !is_one_instant(&[&four, &five]),
        "the first disk is never behind"
    );
    assert!(!is_one_instant(&[&five, &three]), "never two records");
    assert!(
        !is_one_instant(&[&five, &four, &three]),
        "only once along the disks"
    );
    assert!(!is_one_instant(&[&image("nothing.raw")]));

    let bytes = fs::read(&five).unwrap();
    let place = (0..bytes.len())
        .step_by(4096)
        .find(|place| bytes[*place..].starts_with(b"SEQREC02") && bytes[place + 8] == 3);
    let file = OpenOptions::new().write(true).open(&five).unwrap();
    file.write_all_at(&[0xee], place.unwrap() as u64 + 2000)
        .unwrap();
    let checked = check_image(&five, Format::Raw);
    assert_eq!((checked.damaged, checked.gaps.as_slice()), (1, &[3][..]));
    assert!(!checked.is_whole());
}

/// The ring of a guest that has written so many records, put into the file system from outside.
fn put_records(image: &Path, last: u64) {
    let ring: Vec<u8> = (0..=last)
        .flat_map(|number| {
            if number == 0 {
                vec![0; 4096]
            } else {
                record(number)
            }
        })
        .collect();
    let file = image.with_extension("ring");
    fs::write(&file, ring).unwrap();
    let write = format!("write {} seq.dat", path_text(&file));
    tool("debugfs", &["-w", "-R", &write, path_text(image)]);
}
