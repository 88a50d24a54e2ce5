//! Who may write to an image or block device, and whether a device was written to.
//!
//! A device has many nodes: libvirt gives each QEMU a `/dev` of its own, and a lock on a node
//! there is on another inode than that of this host's node. What all nodes share is the number of
//! the device: by it the kernel counts what is written, and tells what every process has open.
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
    Ok(device_of(file)?.map_or(Writers::Nobody, process_that_writes))
}

/// The number of a block device.
fn device_of(file: &File) -> io::Result<Option<u64>> {
    let metadata = file.metadata()?;
    let is_device = FileType::from_raw_mode(metadata.mode()) == FileType::BlockDevice;
    Ok(is_device.then(|| metadata.rdev()))
}

/// Another process that has the device open for writing, and keeps it open.
fn process_that_writes(device: u64) -> Writers {
    let (mut found, is_all) = processes_that_write(device);
    if !found.is_empty() {
        std::thread::sleep(MOMENT);
        let (still, _) = processes_that_write(device);
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
    Writers::Somebody(format!(
        "{name} (process {id}), which has it open for writing"
    ))
}

/// The ids of the other processes that have the device open for writing, through whatever node; and
/// whether all processes could be looked at.
fn processes_that_write(device: u64) -> (Vec<u32>, bool) {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = processes.filter_map(|process| process.file_name().to_str()?.parse::<u32>().ok());
    let (mut found, mut is_all) = (Vec::new(), true);
    for id in ids.filter(|id| *id != std::process::id()) {
        match writes_to(id, device) {
            Ok(true) => found.push(id),
            Ok(false) => {}
            // One that ends meanwhile, or closes what was being looked at, writes no more.
            Err(error) => is_all &= error.kind() != io::ErrorKind::PermissionDenied,
        }
    }
    (found, is_all)
}

/// Whether a process has the device open for writing. A file that it does not let us see is an
/// error, unless another one is the device.
fn writes_to(process: u32, device: u64) -> io::Result<bool> {
    let mut result = Ok(false);
    for file in fs::read_dir(format!("/proc/{process}/fd"))?.flatten() {
        match is_device_to_write(&file.path(), device) {
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

/// Whether an entry of `/proc/<process>/fd` is this device, opened for writing.
fn is_device_to_write(file: &Path, device: u64) -> io::Result<bool> {
    // The permissions of such a link are how the file was opened.
    if fs::symlink_metadata(file)?.permissions().mode() & 0o200 == 0 {
        return Ok(false);
    }
    // Nobody is asked: the server of another process's file may never answer.
    let found = statx(CWD, file, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE)?;
    Ok(
        FileType::from_raw_mode(found.stx_mode.into()) == FileType::BlockDevice
            && (found.stx_rdev_major, found.stx_rdev_minor) == (major(device), minor(device)),
    )
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
        let Some(number) = device_of(device)? else {
            return Ok(None);
        };
        let (major, minor) = (major(number), minor(number));
        let counts = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat"));
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

    use rustix::fs::{CWD, FileType, Mode, mknodat};
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

        /// Another node of it, as in the `/dev` of a QEMU that libvirt started.
        pub(in crate::hypervisor) fn other_node(&self) -> PathBuf {
            let node = self.folder.path().join("node");
            if !node.exists() {
                let number = fs::metadata(&self.path).unwrap().rdev();
                let mode = Mode::RUSR | Mode::WUSR;
                mknodat(CWD, &node, FileType::BlockDevice, mode, number).unwrap();
            }
            node
        }
    }

    impl Drop for Device {
        fn drop(&mut self) {
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
