//! Who may write to an image or block device, and whether a device was written to.
//!
//! A device has many nodes: libvirt gives each QEMU a `/dev` of its own, and a lock on a node
//! there is on another inode than that of this host's node. What all nodes share is the number of
//! the device: by it the kernel counts what is written, and tells what every process has open.
//! A disk and its partitions have a number each, and QEMU claims none of them: who has one open
//! writes to the others.
//!
//! What has gone meanwhile says nothing. What a process does not let us see is told: whether it
//! writes is not known.

use super::qemu_lock;
use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, major, minor, statx};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

/// Tools look at devices for less than this, and what they write is counted.
const MOMENT: Duration = Duration::from_millis(300);
/// A link for each device, by its number.
const DEVICES: &str = "/sys/dev/block";

/// Major and minor number of a block device.
type Number = (u32, u32);

/// Who else may write, as far as it can be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Writers {
    Nobody,
    /// For messages.
    Somebody(String),
    /// Nobody is known, but some processes do not let us see what they have open.
    Untold,
}

pub(super) fn of(file: &File) -> io::Result<Writers> {
    if qemu_lock::held_by_writer(file) {
        return Ok(Writers::Somebody("a running QEMU (write lock)".to_string()));
    }
    let device = device_of(file)?;
    Ok(device.map_or(Writers::Nobody, |device| {
        process_that_writes(&with_the_same_bytes(device, Path::new(DEVICES)))
    }))
}

fn device_of(file: &File) -> io::Result<Option<Number>> {
    let metadata = file.metadata()?;
    let is_device = FileType::from_raw_mode(metadata.mode()) == FileType::BlockDevice;
    Ok(is_device.then(|| (major(metadata.rdev()), minor(metadata.rdev()))))
}

/// The device itself, the disk of which it is a partition, and its own partitions, as far as the kernel
/// tells in `devices`.
fn with_the_same_bytes(device: Number, devices: &Path) -> Vec<Number> {
    let number_of = |folder: &Path| -> Option<Number> {
        let text = fs::read_to_string(folder.join("dev")).ok()?;
        let (major, minor) = text.trim().split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    };
    let is_partition = |folder: &Path| folder.join("partition").exists();
    let mut numbers = vec![device];
    // The folder of a partition is in that of its disk, and the link in neither.
    if let Ok(folder) = devices
        .join(format!("{}:{}", device.0, device.1))
        .canonicalize()
    {
        if is_partition(&folder) {
            numbers.extend(folder.parent().and_then(number_of));
        }
        let inside = folder.read_dir().into_iter().flatten().flatten();
        let inside = inside.map(|entry| entry.path());
        numbers.extend(
            inside
                .filter(|path| is_partition(path))
                .filter_map(|path| number_of(&path)),
        );
    }
    numbers
}

/// Another process that has one of the devices open for writing, and keeps it open.
fn process_that_writes(devices: &[Number]) -> Writers {
    let (mut found, is_all) = processes_that_write(devices);
    if !found.is_empty() {
        std::thread::sleep(MOMENT);
        let (still, _) = processes_that_write(devices);
        found.retain(|process| still.contains(process));
    }
    let Some(id) = found.first() else {
        return match is_all {
            true => Writers::Nobody,
            false => Writers::Untold,
        };
    };
    let name = fs::read(format!("/proc/{id}/comm")).unwrap_or_default();
    let name: String = String::from_utf8_lossy(&name)
        .chars()
        .filter(|letter| !letter.is_control())
        .collect();
    let what = match devices {
        [_] => "it",
        _ => "it, its disk or a partition of it",
    };
    Writers::Somebody(format!(
        "{name} (process {id}), which has {what} open for writing"
    ))
}

/// The ids of the other processes that have one of the devices open for writing, through whatever
/// node; and whether all processes could be looked at.
fn processes_that_write(devices: &[Number]) -> (Vec<u32>, bool) {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = processes.filter_map(|process| process.file_name().to_str()?.parse::<u32>().ok());
    let (mut found, mut is_all) = (Vec::new(), true);
    for id in ids.filter(|id| *id != std::process::id()) {
        match writes_to(id, devices) {
            Ok(true) => found.push(id),
            Ok(false) => {}
            // One that ends meanwhile, or closes what was being looked at, writes no more.
            Err(error) => is_all &= error.kind() != io::ErrorKind::PermissionDenied,
        }
    }
    (found, is_all)
}

/// Whether a process has one of the devices open for writing. A file that it does not let us see is
/// an error, unless another one is such a device.
fn writes_to(process: u32, devices: &[Number]) -> io::Result<bool> {
    let mut result = Ok(false);
    for file in fs::read_dir(format!("/proc/{process}/fd"))?.flatten() {
        match is_device_to_write(&file.path(), devices) {
            Ok(true) => return Ok(true),
            Ok(false) => {}
            // The kernel says so too of a process that has just ended.
            Err(error)
                if error.kind() == io::ErrorKind::PermissionDenied
                    && fs::symlink_metadata(file.path()).is_ok() =>
            {
                result = Err(error);
            }
            Err(_) => {}
        }
    }
    result
}

/// Whether an entry of `/proc/<process>/fd` is one of these devices, opened for writing.
fn is_device_to_write(file: &Path, devices: &[Number]) -> io::Result<bool> {
    // The permissions of such a link are how the file was opened.
    if fs::symlink_metadata(file)?.permissions().mode() & 0o200 == 0 {
        return Ok(false);
    }
    // Nobody is asked: the server of another process's file may never answer.
    let found = statx(CWD, file, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE)?;
    Ok(
        FileType::from_raw_mode(found.stx_mode.into()) == FileType::BlockDevice
            && devices.contains(&(found.stx_rdev_major, found.stx_rdev_minor)),
    )
}

/// Whether the kernel refuses every write to a device, which it lets be opened for writing all the same.
pub(super) fn is_read_only(device: &File) -> io::Result<bool> {
    let Some((major, minor)) = device_of(device)? else {
        return Ok(false);
    };
    let told = fs::read_to_string(format!("{DEVICES}/{major}:{minor}/ro"));
    Ok(told.is_ok_and(|told| told.trim() == "1"))
}

/// How much was written to a device and discarded on it so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Written {
    sectors: u64,
    discarded_sectors: u64,
}

impl Written {
    /// `None` where the kernel does not tell.
    pub(super) fn to(device: &File) -> io::Result<Option<Self>> {
        // What is in the page cache is counted when it is written; of this program nothing is.
        device.sync_data()?;
        let Some((major, minor)) = device_of(device)? else {
            return Ok(None);
        };
        let counts = fs::read_to_string(format!("{DEVICES}/{major}:{minor}/stat"));
        Ok(counts.ok().and_then(|counts| Self::parse(&counts)))
    }

    /// Requests are not compared: some devices count the flush that comes with a sync as one.
    fn parse(counts: &str) -> Option<Self> {
        let mut counts = counts.split_ascii_whitespace().map(str::parse);
        Some(Written {
            sectors: counts.nth(6)?.ok()?,
            // Older kernels do not count discards.
            discarded_sectors: counts.nth(6).and_then(Result::ok).unwrap_or(0),
        })
    }
}

#[cfg(test)]
pub(super) mod testing {
    //! A block device, and a process that has it open for writing through a node of its own.

    use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
    use std::fs;
    use std::io::{BufRead, BufReader};
    use std::os::unix::fs::MetadataExt;
    use std::path::{Path, PathBuf};
    use std::process::{Child, Command, Stdio};

    pub(in crate::hypervisor) const DEVICE_BYTES: u64 = 1 << 20;

    /// A loop device.
    pub(in crate::hypervisor) struct Device {
        folder: tempfile::TempDir,
        pub path: PathBuf,
    }

    impl Device {
        pub(in crate::hypervisor) fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("content");
            fs::write(&file, vec![7; DEVICE_BYTES as usize]).unwrap();
            // Others take free ones as well.
            let path = (0..50).find_map(|_| {
                let mut losetup = Command::new("losetup");
                let output = losetup.args(["--find", "--show"]).arg(&file).output();
                let output = output.unwrap();
                let said = String::from_utf8(output.stdout).unwrap();
                output.status.success().then(|| said.trim().into())
            });
            Device {
                folder,
                path: path.expect("root and a free loop device"),
            }
        }

        /// Where its bytes are.
        pub(in crate::hypervisor) fn file(&self) -> PathBuf {
            self.folder.path().join("content")
        }

        /// Another node of it, as in the `/dev` of a QEMU that libvirt started.
        pub(in crate::hypervisor) fn other_node(&self) -> PathBuf {
            self.node("node", fs::metadata(&self.path).unwrap().rdev())
        }

        /// A node of its first partition.
        pub(in crate::hypervisor) fn partition(&self) -> PathBuf {
            let name = self.path.file_name().unwrap().to_str().unwrap();
            let mut add = Command::new("addpart");
            let added = add.arg(&self.path).args(["1", "8", "1024"]).status();
            assert!(added.unwrap().success());
            let number = format!("/sys/block/{name}/{name}p1/dev");
            let number = fs::read_to_string(number).unwrap();
            let (major, minor) = number.trim().split_once(':').unwrap();
            let number = makedev(major.parse().unwrap(), minor.parse().unwrap());
            self.node("partition", number)
        }

        fn node(&self, name: &str, number: u64) -> PathBuf {
            let node = self.folder.path().join(name);
            if !node.exists() {
                let mode = Mode::RUSR | Mode::WUSR;
                mknodat(CWD, &node, FileType::BlockDevice, mode, number).unwrap();
            }
            node
        }
    }

    impl Drop for Device {
        fn drop(&mut self) {
            // One that is left would be there for whoever has the device next.
            if self.folder.path().join("partition").exists() {
                let _ = Command::new("delpart").arg(&self.path).arg("1").status();
            }
            let _ = Command::new("losetup").arg("-d").arg(&self.path).status();
        }
    }

    pub(in crate::hypervisor) struct Writer(Child);

    impl Writer {
        /// Returns when it has opened the node.
        pub(in crate::hypervisor) fn start(node: &Path) -> Self {
            let mut writer = Command::new("sh")
                .args(["-c", "exec 3<>\"$0\"; echo open; read -r _"])
                .arg(node)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut said = String::new();
            let mut output = BufReader::new(writer.stdout.take().unwrap());
            output.read_line(&mut said).unwrap();
            assert_eq!(said, "open\n");
            Writer(writer)
        }
    }

    impl Drop for Writer {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{Device, Writer};
    use super::*;
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    use std::os::unix::fs::symlink;

    #[test]
    fn a_process_that_does_not_let_us_see_its_files_is_not_taken_for_one_that_does_not_write() {
        let device = Device::new();
        let _writer = Writer::start(&device.other_node());
        let file = File::open(&device.path).unwrap();
        assert!(matches!(of(&file).unwrap(), Writers::Somebody(_)));
        // As under a unit that does not grant it. Capabilities are those of a thread.
        let seen = std::thread::spawn(move || {
            let mut sets = capabilities(None).unwrap();
            sets.effective = CapabilitySet::empty();
            set_capabilities(None, sets).unwrap();
            of(&file).unwrap()
        });
        assert_eq!(seen.join().unwrap(), Writers::Untold);
    }

    #[test]
    fn who_writes_to_a_partition_writes_to_its_disk_and_the_reverse() {
        let device = Device::new();
        let partition = device.partition();
        let writers_of = |node: &Path| of(&File::open(node).unwrap()).unwrap();
        assert!(!matches!(writers_of(&partition), Writers::Somebody(_)));
        for (written, asked) in [(&partition, &device.path), (&device.path, &partition)] {
            let _writer = Writer::start(written);
            let found = writers_of(asked);
            assert!(matches!(found, Writers::Somebody(_)), "{found:?}");
        }
    }

    #[test]
    fn of_a_partition_its_disk_has_the_same_bytes_and_no_other_partition() {
        let lab = tempfile::tempdir().unwrap();
        let (disk, links) = (lab.path().join("devices/sda"), lab.path().join("block"));
        fs::create_dir_all(&links).unwrap();
        fs::create_dir_all(disk.join("queue")).unwrap();
        fs::write(disk.join("dev"), "8:0\n").unwrap();
        symlink("../devices/sda", links.join("8:0")).unwrap();
        for (name, number) in [("sda1", "8:1"), ("sda2", "259:7")] {
            let partition = disk.join(name);
            fs::create_dir(&partition).unwrap();
            fs::write(partition.join("dev"), format!("{number}\n")).unwrap();
            fs::write(partition.join("partition"), "1\n").unwrap();
            symlink(format!("../devices/sda/{name}"), links.join(number)).unwrap();
        }
        let numbers = |device| {
            let mut numbers = with_the_same_bytes(device, &links);
            numbers.sort_unstable();
            numbers
        };
        assert_eq!(numbers((8, 0)), [(8, 0), (8, 1), (259, 7)]);
        assert_eq!(numbers((259, 7)), [(8, 0), (259, 7)]);
        assert_eq!(numbers((8, 1)), [(8, 0), (8, 1)]);
        // Of which the kernel tells nothing.
        assert_eq!(numbers((8, 16)), [(8, 16)]);
    }

    #[test]
    fn sectors_that_were_written_and_discarded_are_found_in_the_kernels_counts() {
        let old = "  10  1  80  5  20  2  160  7  0  9  12";
        let of_old = Written {
            sectors: 160,
            discarded_sectors: 0,
        };
        assert_eq!(Written::parse(old), Some(of_old));
        let discarded_sectors = 4096;
        let new = format!("{old}  3  0  {discarded_sectors}  1  6  2\n");
        let of_new = Written {
            discarded_sectors,
            ..of_old
        };
        assert_eq!(Written::parse(&new), Some(of_new));
        for unknown in ["", "1 2 3", "1 2 3 4 5 6 x"] {
            assert_eq!(Written::parse(unknown), None, "{unknown}");
        }
    }
}
