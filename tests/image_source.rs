//! Stopped VMs and restore targets, with real files, real loop devices and the real tools of QEMU.

use jiff::{SignedDuration, Timestamp};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vmkeep::hypervisor::image::{ImageDisk, ImageFormat, ImageSource};
use vmkeep::hypervisor::nbd::{Endpoint, NbdClient};
use vmkeep::hypervisor::target::{DeviceTarget, ImageTarget, Qcow2Target, RawTarget, SyncedTarget};
use vmkeep::hypervisor::{
    Capture, CaptureError, CaptureErrorKind, CapturedDisk, Changes, Hypervisor, Outcome, Reading,
    SinceMark,
};
use vmkeep::model::{DiskName, Extent};

const MIB: u64 = 1 << 20;

/// Runs a tool to its end; its standard output.
fn tool(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(name).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{name} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Bytes that do not compress and differ by `seed`.
fn noise(seed: &str, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    let mut hasher = blake3::Hasher::new();
    hasher.update(seed.as_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// Waits for something that another process does, without assuming how long it takes.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "not within a minute: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

struct Lab {
    folder: TempDir,
}

impl Lab {
    fn new() -> Self {
        Lab {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn runtime(&self) -> PathBuf {
        self.path("run")
    }

    fn source_at(&self, path: &Path, format: ImageFormat, now: Timestamp) -> ImageSource {
        let disk = ImageDisk {
            name: DiskName::new("vda").unwrap(),
            path: path.to_path_buf(),
            format,
        };
        ImageSource::new(vec![disk], self.runtime(), now)
    }

    /// Long after everything that the test has written.
    fn source(&self, path: &Path, format: ImageFormat) -> ImageSource {
        let later = Timestamp::now() + SignedDuration::from_secs(60);
        self.source_at(path, format, later)
    }

    fn open(&self, path: &Path, format: ImageFormat) -> Result<Box<dyn Capture>, CaptureError> {
        self.source(path, format).open(&[], Reading::Everything)
    }

    fn refused(&self, path: &Path, format: ImageFormat) -> CaptureError {
        match self.open(path, format) {
            Ok(_) => panic!("{} was opened", path.display()),
            Err(error) => error,
        }
    }

    /// A sparse raw file: (offset, bytes) written into zeroes.
    fn raw(&self, name: &str, size: u64, parts: &[(u64, Vec<u8>)]) -> PathBuf {
        let path = self.path(name);
        let file = File::create_new(&path).unwrap();
        file.set_len(size).unwrap();
        for (offset, bytes) in parts {
            file.write_all_at(bytes, *offset).unwrap();
        }
        file.sync_all().unwrap();
        path
    }

    fn runtime_is_empty(&self) -> bool {
        fs::read_dir(self.runtime()).is_ok_and(|mut entries| entries.next().is_none())
    }
}

/// The disk as a backup sees it: allocated parts read, all else zero.
fn backed_up(disk: &dyn CapturedDisk) -> Vec<u8> {
    let mut content = vec![0; disk.size_bytes() as usize];
    let piece = 3 * MIB;
    std::thread::scope(|scope| {
        for (number, part) in content.chunks_mut(piece as usize).enumerate() {
            scope.spawn(move || {
                let start = number as u64 * piece;
                let range = Extent::new(start, part.len() as u64);
                let mut end = start;
                for extent in disk.allocated(range).unwrap() {
                    assert!(extent.length > 0 && extent.offset >= end);
                    end = extent.end();
                    assert!(end <= range.end());
                    let from = (extent.offset - start) as usize;
                    let to = (end - start) as usize;
                    disk.read_at(extent.offset, &mut part[from..to]).unwrap();
                }
            });
        }
    });
    content
}

/// The disk read from end to end, holes and all.
fn whole(disk: &dyn CapturedDisk) -> Vec<u8> {
    let mut content = vec![0xaa; disk.size_bytes() as usize];
    disk.read_at(0, &mut content).unwrap();
    content
}

fn same(left: &[u8], right: &[u8]) {
    assert_eq!(left.len(), right.len());
    let differs = left
        .iter()
        .zip(right)
        .position(|(left, right)| left != right);
    assert_eq!(differs, None, "the first byte that differs");
}

/// A `qemu-nbd` of a test, ended with it.
struct Server(Child);

impl Server {
    fn start(arguments: &[&str], socket: &Path) -> Self {
        let child = Command::new("qemu-nbd")
            .args(["--persistent", "--socket", text(socket)])
            .args(arguments)
            .spawn()
            .unwrap();
        let server = Server(child);
        // It listens before it opens the image, and greets after.
        eventually("qemu-nbd greets", || {
            let mut greeting = [0; 8];
            UnixStream::connect(socket)
                .and_then(|mut stream| stream.read_exact(&mut greeting))
                .is_ok_and(|()| &greeting == b"NBDMAGIC")
        });
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_sparse_raw_file_is_read_by_its_extents() {
    let lab = Lab::new();
    let parts = [(MIB, noise("a", MIB)), (6 * MIB, noise("b", 2 * MIB))];
    let path = lab.raw("disk.raw", 16 * MIB + 100, &parts);
    let capture = lab.open(&path, ImageFormat::Raw).unwrap();
    let disks = capture.disks();
    let disk = disks[0];
    assert_eq!(disk.size_bytes(), 16 * MIB + 100);
    let everything = Extent::new(0, disk.size_bytes());
    assert_eq!(
        disk.allocated(everything).unwrap(),
        [Extent::new(MIB, MIB), Extent::new(6 * MIB, 2 * MIB)]
    );
    let across = Extent::new(MIB + 4096, 6 * MIB);
    assert_eq!(
        disk.allocated(across).unwrap(),
        [
            Extent::new(MIB + 4096, MIB - 4096),
            Extent::new(6 * MIB, MIB + 4096)
        ]
    );
    assert_eq!(disk.allocated(Extent::new(9 * MIB, MIB)).unwrap(), []);
    assert_eq!(disk.allocated(Extent::new(1 << 40, MIB)).unwrap(), []);
    let expected = fs::read(&path).unwrap();
    same(&backed_up(disk), &expected);
    same(&whole(disk), &expected);
    assert!(disk.read_at(16 * MIB, &mut [0; 101]).is_err());
    assert!(disk.read_at(u64::MAX, &mut [0; 2]).is_err());
    capture.still_consistent().unwrap();
    capture.close(Outcome::Committed).unwrap();
}

#[test]
fn a_raw_disk_that_begins_like_a_qcow2_image_stays_raw() {
    let lab = Lab::new();
    let secret = lab.raw("secret", 4 * MIB, &[(0, noise("secret", 4 * MIB))]);
    let bait = lab.path("bait.qcow2");
    tool(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            text(&secret),
            "-F",
            "raw",
            text(&bait),
        ],
    );
    let bytes = fs::read(&bait).unwrap();
    let path = lab.raw("disk.raw", 2 * MIB, &[(0, bytes.clone())]);
    let capture = lab.open(&path, ImageFormat::Raw).unwrap();
    let content = backed_up(capture.disks()[0]);
    assert!(content.starts_with(&bytes));
    same(&content, &fs::read(&path).unwrap());
}

#[test]
fn a_symbolic_link_to_an_image_is_followed() {
    let lab = Lab::new();
    let path = lab.raw("disk.raw", MIB, &[(0, noise("a", MIB))]);
    let other = lab.raw("other.raw", MIB, &[]);
    let link = lab.path("link");
    symlink(&path, &link).unwrap();
    let capture = lab.open(&link, ImageFormat::Raw).unwrap();
    same(&whole(capture.disks()[0]), &fs::read(&path).unwrap());
    capture.still_consistent().unwrap();
    fs::remove_file(&link).unwrap();
    symlink(&other, &link).unwrap();
    let error = capture.still_consistent().unwrap_err();
    assert_eq!(error.kind, CaptureErrorKind::Inconsistent);
    assert!(error.detail.contains("another file"), "{error}");
}

/// A qcow2 image with data, zero clusters, discarded clusters and holes.
fn qcow2_of_all_kinds(lab: &Lab, options: &str) -> PathBuf {
    let parts = [
        (0, noise("front", MIB)),
        (5 * MIB + 512, noise("middle", 3 * MIB)),
        (31 * MIB, noise("end", MIB)),
    ];
    let raw = lab.raw("model.raw", 32 * MIB, &parts);
    let path = lab.path("disk, with = signs.qcow2");
    tool(
        "qemu-img",
        &[
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            options,
            text(&raw),
            text(&path),
        ],
    );
    let image = format!(
        "json:{}",
        serde_json::json!({"driver": "qcow2", "file": {"driver": "file", "filename": path}})
    );
    tool(
        "qemu-io",
        &[
            "-c",
            "write -z 6M 640k",
            "-c",
            "write -z -u 512k 64k",
            "-c",
            "discard 7M 256k",
            "-c",
            "write -P 0 12M 1M",
            "-c",
            "write -P 0x5a 20M 70000",
            &image,
        ],
    );
    path
}

fn as_raw(lab: &Lab, path: &Path) -> Vec<u8> {
    let raw = lab.path("converted.raw");
    let image = format!(
        "json:{}",
        serde_json::json!({"driver": "qcow2", "file": {"driver": "file", "filename": path}})
    );
    tool("qemu-img", &["convert", "-O", "raw", &image, text(&raw)]);
    fs::read(raw).unwrap()
}

#[test]
fn a_qcow2_image_is_read_byte_for_byte() {
    for options in [
        "compat=1.1",
        "compat=0.10",
        "cluster_size=4k",
        "compression_type=zstd",
    ] {
        let lab = Lab::new();
        let path = qcow2_of_all_kinds(&lab, options);
        let expected = as_raw(&lab, &path);
        let capture = lab.open(&path, ImageFormat::Qcow2).unwrap();
        let disks = capture.disks();
        assert_eq!(disks[0].size_bytes(), 32 * MIB);
        same(&backed_up(disks[0]), &expected);
        same(&whole(disks[0]), &expected);
        assert_eq!(disks[0].allocated(Extent::new(24 * MIB, MIB)).unwrap(), []);
        assert!(disks[0].read_at(32 * MIB - 1, &mut [0; 2]).is_err());
        capture.still_consistent().unwrap();
        capture.close(Outcome::Committed).unwrap();
        assert!(lab.runtime_is_empty());
    }
}

#[test]
fn a_dropped_capture_leaves_no_server_and_no_lock() {
    let lab = Lab::new();
    let path = qcow2_of_all_kinds(&lab, "compat=1.1");
    drop(lab.open(&path, ImageFormat::Qcow2).unwrap());
    assert!(lab.runtime_is_empty());
    // The lock of a reader that is left would refuse this.
    tool("qemu-io", &["-f", "qcow2", "-c", "write 0 4k", text(&path)]);
}

#[test]
fn a_qcow2_image_that_is_not_the_whole_disk_is_refused() {
    let lab = Lab::new();
    let base = lab.raw("base.raw", MIB, &[]);
    let backed = lab.path("backed.qcow2");
    tool(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            text(&base),
            "-F",
            "raw",
            text(&backed),
        ],
    );
    let data = lab.path("data");
    let split = lab.path("split.qcow2");
    let data_file = format!("data_file={}", text(&data));
    tool(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &data_file,
            text(&split),
            "1M",
        ],
    );
    let locked = lab.path("locked.qcow2");
    tool(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "--object",
            "secret,id=k,data=geheim",
            "-o",
            "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10",
            text(&locked),
            "1M",
        ],
    );
    for (path, reason) in [
        (&backed, "qemu-img rebase"),
        (&split, "external data file"),
        (&locked, "encrypted"),
        (&base, "not a qcow2 image"),
    ] {
        let error = lab.refused(path, ImageFormat::Qcow2);
        assert_eq!(error.kind, CaptureErrorKind::Invalid, "{error}");
        assert!(error.detail.contains(reason), "{error}");
    }
}

#[test]
fn what_is_no_image_is_refused_by_kind() {
    let lab = Lab::new();
    let pipe = lab.path("pipe");
    tool("mkfifo", &[text(&pipe)]);
    let empty = lab.raw("empty", 0, &[]);
    for path in [
        pipe.as_path(),
        Path::new("/dev/null"),
        lab.folder.path(),
        &empty,
    ] {
        let error = lab.refused(path, ImageFormat::Raw);
        assert_eq!(error.kind, CaptureErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains(text(path)), "{error}");
    }
    let error = lab.refused(&lab.path("nowhere"), ImageFormat::Raw);
    assert_eq!(error.kind, CaptureErrorKind::Missing);
}

#[test]
fn an_image_that_changes_while_it_is_read_is_not_consistent() {
    for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
        for change in ["content", "size", "gone", "replaced"] {
            let lab = Lab::new();
            let path = match format {
                ImageFormat::Raw => lab.raw("disk", 4 * MIB, &[(0, noise("a", MIB))]),
                ImageFormat::Qcow2 => qcow2_of_all_kinds(&lab, "compat=1.1"),
            };
            // Written just now, as far as the source knows: the hardest case for its times.
            let capture = lab
                .source_at(&path, format, Timestamp::now())
                .open(&[], Reading::Everything)
                .unwrap();
            capture.still_consistent().unwrap();
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            match change {
                "content" => file.write_all_at(b"x", MIB - 1).unwrap(),
                "size" => file.set_len(64 * MIB).unwrap(),
                "gone" => fs::remove_file(&path).unwrap(),
                _ => {
                    let copy = lab.path("copy");
                    fs::copy(&path, &copy).unwrap();
                    fs::rename(&copy, &path).unwrap();
                }
            }
            let error = capture.still_consistent().unwrap_err();
            let expected = match change {
                "gone" => CaptureErrorKind::Missing,
                _ => CaptureErrorKind::Inconsistent,
            };
            assert_eq!(error.kind, expected, "{format:?} {change}: {error}");
            capture.close(Outcome::Abandoned).unwrap();
        }
    }
}

#[test]
fn a_raw_file_cut_under_the_reader_fails_instead_of_reading_as_zero() {
    let lab = Lab::new();
    let path = lab.raw("disk.raw", 4 * MIB, &[(0, noise("a", 4 * MIB))]);
    let capture = lab.open(&path, ImageFormat::Raw).unwrap();
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(MIB)
        .unwrap();
    let error = capture.disks()[0]
        .read_at(MIB - 1, &mut [0; 2])
        .unwrap_err();
    assert_eq!(error.kind, CaptureErrorKind::Io);
}

fn since(disk: &dyn CapturedDisk) -> SinceMark {
    SinceMark {
        disk: disk.name().clone(),
        size_bytes: disk.size_bytes(),
        alignment_bytes: 65536,
        mark: disk.mark().map(str::to_string),
    }
}

#[test]
fn an_unchanged_image_is_recognised_and_a_changed_one_is_not() {
    for format in [ImageFormat::Raw, ImageFormat::Qcow2] {
        let lab = Lab::new();
        let path = match format {
            ImageFormat::Raw => lab.raw("disk", 4 * MIB, &[(0, noise("a", MIB))]),
            ImageFormat::Qcow2 => qcow2_of_all_kinds(&lab, "compat=1.1"),
        };
        let source = lab.source(&path, format);
        let first = source.open(&[], Reading::Everything).unwrap();
        let mark = since(first.disks()[0]);
        assert!(mark.mark.is_some());
        assert!(matches!(first.disks()[0].changes(), Changes::Unknown(_)));
        first.close(Outcome::Committed).unwrap();

        let second = source
            .open(std::slice::from_ref(&mark), Reading::Changes)
            .unwrap();
        assert_eq!(second.disks()[0].changes(), &Changes::Extents(Vec::new()));
        assert_eq!(since(second.disks()[0]), mark);
        second.close(Outcome::Committed).unwrap();

        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(b"x", 3 * MIB).unwrap();
        let third = source.open(&[mark], Reading::Changes).unwrap();
        match third.disks()[0].changes() {
            Changes::Unknown(reason) => assert!(reason.contains("mtime"), "{reason}"),
            Changes::Extents(_) => panic!("a changed image was taken for unchanged"),
        }
    }
}

#[test]
fn an_image_written_just_now_gets_no_mark() {
    let lab = Lab::new();
    let path = lab.raw("disk.raw", MIB, &[]);
    let source = lab.source_at(&path, ImageFormat::Raw, Timestamp::now());
    assert_eq!(
        source.open(&[], Reading::Everything).unwrap().disks()[0].mark(),
        None
    );
}

#[test]
fn an_image_that_qemu_has_open_for_writing_is_refused() {
    let lab = Lab::new();
    let raw = lab.raw("disk.raw", MIB, &[]);
    let qcow2 = lab.path("disk.qcow2");
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&qcow2), "1M"],
    );
    for (path, name, format) in [
        (&raw, "raw", ImageFormat::Raw),
        (&qcow2, "qcow2", ImageFormat::Qcow2),
    ] {
        // Opened first, then used by QEMU: seen at the end as well.
        let early = lab.open(&raw, ImageFormat::Raw).unwrap();
        let writer = Server::start(&["--format", name, text(path)], &lab.path("s"));
        let error = lab.refused(path, format);
        assert_eq!(error.kind, CaptureErrorKind::Inconsistent, "{error}");
        assert!(error.detail.contains("running QEMU"), "{error}");
        if name == "raw" {
            let error = early.still_consistent().unwrap_err();
            assert_eq!(error.kind, CaptureErrorKind::Inconsistent, "{error}");
        }
        drop(writer);
        fs::remove_file(lab.path("s")).unwrap();
        let reader = Server::start(
            &["--read-only", "--format", name, text(path)],
            &lab.path("s"),
        );
        lab.open(path, format)
            .unwrap()
            .close(Outcome::Abandoned)
            .unwrap();
        drop(reader);
        fs::remove_file(lab.path("s")).unwrap();
    }
}

/// A loop device over a file; loop devices are shared by everything that runs here.
struct Loop {
    device: PathBuf,
    mounted: Option<PathBuf>,
}

impl Loop {
    fn over(file: &Path) -> Self {
        let mut device = String::new();
        // Another process may take the free device first; then there is another one.
        eventually("a free loop device", || {
            let output = Command::new("losetup")
                .args(["--find", "--show", text(file)])
                .output()
                .unwrap();
            device = String::from_utf8(output.stdout).unwrap().trim().to_string();
            output.status.success()
        });
        Loop {
            device: device.into(),
            mounted: None,
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Some(path) = &self.mounted {
            let _ = Command::new("umount").arg(path).status();
        }
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

#[test]
fn a_block_device_is_read_whole_and_only_when_nobody_uses_it() {
    let lab = Lab::new();
    let file = lab.raw("device", 16 * MIB, &[(3 * MIB, noise("a", MIB))]);
    let mut device = Loop::over(&file);
    let path = device.device.clone();
    let capture = lab.open(&path, ImageFormat::Raw).unwrap();
    let disks = capture.disks();
    assert_eq!(disks[0].size_bytes(), 16 * MIB);
    let everything = Extent::new(0, 16 * MIB);
    assert_eq!(disks[0].allocated(everything).unwrap(), [everything]);
    assert_eq!(disks[0].mark(), None);
    assert_eq!(
        disks[0].changes(),
        &Changes::Unknown("a block device keeps no record of changes".to_string())
    );
    same(&whole(disks[0]), &fs::read(&file).unwrap());
    capture.still_consistent().unwrap();
    capture.close(Outcome::Committed).unwrap();

    let writer = Server::start(&["--format", "raw", text(&path)], &lab.path("s"));
    let error = lab.refused(&path, ImageFormat::Raw);
    assert!(error.detail.contains("running QEMU"), "{error}");
    let error = DeviceTarget::open(&path, MIB, true).unwrap_err();
    assert!(error.detail.contains("running QEMU"), "{error}");
    drop(writer);

    tool("mkfs.ext4", &["-q", "-F", text(&path)]);
    let folder = lab.path("mounted");
    fs::create_dir(&folder).unwrap();
    tool("mount", &[text(&path), text(&folder)]);
    device.mounted = Some(folder);
    let error = lab.refused(&path, ImageFormat::Raw);
    assert_eq!(error.kind, CaptureErrorKind::Inconsistent, "{error}");
    assert!(error.detail.contains("mounted"), "{error}");
    let error = DeviceTarget::open(&path, MIB, true).unwrap_err();
    assert_eq!(error.kind, CaptureErrorKind::Inconsistent, "{error}");
}

const DISK: u64 = 24 * MIB;

/// A disk with data at both ends and in between, as (range, content or zero) in disk order.
fn restored_parts() -> Vec<(Extent, Option<Vec<u8>>)> {
    let data = |offset, length| {
        let bytes = noise(&format!("part {offset}"), length);
        (Extent::new(offset, length), Some(bytes))
    };
    let zero = |offset, length| (Extent::new(offset, length), None);
    vec![
        data(0, MIB),
        zero(MIB, 6 * MIB),
        data(7 * MIB, 9 * MIB),
        zero(16 * MIB, 7 * MIB + 512),
        data(23 * MIB + 512, MIB - 512),
    ]
}

fn expected_disk() -> Vec<u8> {
    let mut content = vec![0; DISK as usize];
    for (range, bytes) in restored_parts() {
        if let Some(bytes) = bytes {
            content[range.offset as usize..range.end() as usize].copy_from_slice(&bytes);
        }
    }
    content
}

/// All parts at once, from threads of their own.
fn write_parts(target: &dyn ImageTarget) {
    std::thread::scope(|scope| {
        for (range, bytes) in restored_parts() {
            scope.spawn(move || match bytes {
                None => target.zero(range).unwrap(),
                Some(bytes) => {
                    for (number, piece) in bytes.chunks(256 * 1024).enumerate() {
                        let offset = range.offset + number as u64 * 256 * 1024;
                        target.write_at(offset, piece).unwrap();
                    }
                }
            });
        }
    });
}

fn finish(target: Box<dyn ImageTarget>) -> Result<(), CaptureError> {
    SyncedTarget::give_names(vec![target.sync()?])
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn raw_and_qcow2_targets_hold_the_same_disk() {
    let lab = Lab::new();
    let out = lab.path("out");
    fs::create_dir(&out).unwrap();
    let raw = Box::new(RawTarget::create(&out, "vda.raw", DISK).unwrap());
    let qcow2 = Box::new(Qcow2Target::create(&out, "vda.qcow2", DISK, &lab.runtime()).unwrap());
    write_parts(raw.as_ref());
    write_parts(qcow2.as_ref());
    assert!(names(&out).iter().all(|name| name.contains(".partial-")));
    SyncedTarget::give_names(vec![raw.sync().unwrap(), qcow2.sync().unwrap()]).unwrap();
    assert_eq!(names(&out), ["vda.qcow2", "vda.raw"]);
    assert!(lab.runtime_is_empty());
    let (raw, qcow2) = (out.join("vda.raw"), out.join("vda.qcow2"));
    same(&fs::read(&raw).unwrap(), &expected_disk());
    let compared = tool(
        "qemu-img",
        &[
            "compare",
            "-f",
            "raw",
            "-F",
            "qcow2",
            text(&raw),
            text(&qcow2),
        ],
    );
    assert!(compared.contains("identical"), "{compared}");
    tool("qemu-img", &["check", "-f", "qcow2", text(&qcow2)]);
    let capture = lab.open(&qcow2, ImageFormat::Qcow2).unwrap();
    same(&whole(capture.disks()[0]), &expected_disk());
    drop(capture);
    for path in [raw, qcow2] {
        let used = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(path).unwrap()) * 512;
        assert!(used < 13 * MIB, "{used} bytes for 11 MiB of data");
    }
}

#[test]
fn a_target_never_replaces_a_file_and_leaves_nothing_half_done() {
    let lab = Lab::new();
    let out = lab.path("out");
    fs::create_dir(&out).unwrap();
    let create = |format: &str| -> Result<Box<dyn ImageTarget>, CaptureError> {
        Ok(match format {
            "raw" => Box::new(RawTarget::create(&out, "vda", MIB)?),
            _ => Box::new(Qcow2Target::create(&out, "vda", MIB, &lab.runtime())?),
        })
    };
    for format in ["raw", "qcow2"] {
        drop(create(format).unwrap());
        assert_eq!(names(&out), [""; 0]);
        // The file appears after the target was made.
        let late = create(format).unwrap();
        fs::write(out.join("vda"), "precious").unwrap();
        let errors = [finish(late).err(), create(format).err()];
        for error in errors {
            let error = error.unwrap();
            assert_eq!(error.kind, CaptureErrorKind::Invalid);
            assert!(error.to_string().contains("already exists"), "{error}");
        }
        assert_eq!(names(&out), ["vda"]);
        assert_eq!(fs::read(out.join("vda")).unwrap(), b"precious");
        fs::remove_file(out.join("vda")).unwrap();
    }
    assert!(lab.runtime_is_empty());
    for name in ["", ".", "..", "a/b", "../vda"] {
        assert!(RawTarget::create(&out, name, MIB).is_err(), "{name:?}");
    }
    let error = Qcow2Target::create(&out, "vda", 1000, &lab.runtime())
        .err()
        .unwrap();
    assert_eq!(error.kind, CaptureErrorKind::Invalid);
}

#[test]
fn of_several_disks_all_get_their_names_or_none() {
    let lab = Lab::new();
    let out = lab.path("out");
    fs::create_dir(&out).unwrap();
    let synced = |name| {
        let target: Box<dyn ImageTarget> = Box::new(RawTarget::create(&out, name, MIB).unwrap());
        target.sync().unwrap()
    };
    let disks = ["vda", "vdb", "vdc"].map(synced);
    fs::write(out.join("vdb"), "precious").unwrap();
    let error = SyncedTarget::give_names(disks.into()).unwrap_err();
    assert!(error.to_string().contains("already exists"), "{error}");
    assert_eq!(names(&out), ["vdb"]);
    assert_eq!(fs::read(out.join("vdb")).unwrap(), b"precious");
    SyncedTarget::give_names(vec![synced("vda"), synced("vdc")]).unwrap();
    assert_eq!(names(&out), ["vda", "vdb", "vdc"]);
}

#[test]
fn a_disk_that_was_synced_while_it_was_written_is_whole() {
    let lab = Lab::new();
    let size = 300 * MIB;
    let target = RawTarget::create(lab.folder.path(), "vda", size).unwrap();
    let piece = |number: u64| noise(&format!("piece {}", number % 7), MIB);
    std::thread::scope(|scope| {
        for first in 0..4 {
            let target = &target;
            scope.spawn(move || {
                for number in (first..300).step_by(4) {
                    target.write_at(number * MIB, &piece(number)).unwrap();
                }
            });
        }
    });
    finish(Box::new(target)).unwrap();
    let file = File::open(lab.path("vda")).unwrap();
    let mut found = vec![0; MIB as usize];
    for number in 0..300 {
        file.read_exact_at(&mut found, number * MIB).unwrap();
        assert!(found == piece(number), "{number}");
    }
}

#[test]
fn a_write_outside_of_the_disk_fails() {
    let lab = Lab::new();
    let raw = RawTarget::create(lab.folder.path(), "vda.raw", MIB).unwrap();
    let qcow2 = Qcow2Target::create(lab.folder.path(), "vda.qcow2", MIB, &lab.runtime()).unwrap();
    let targets: [&dyn ImageTarget; 2] = [&raw, &qcow2];
    for target in targets {
        assert!(target.write_at(MIB - 1, &[1, 2]).is_err());
        assert!(target.write_at(u64::MAX, &[1, 2]).is_err());
        assert!(target.zero(Extent::new(MIB, 1)).is_err());
    }
}

#[test]
fn a_used_block_device_holds_exactly_the_disk_afterwards() {
    let lab = Lab::new();
    let file = lab.raw("device", DISK + MIB, &[(0, noise("old", DISK + MIB))]);
    let device = Loop::over(&file);
    let path = device.device.as_path();
    let error = DeviceTarget::open(path, DISK, false).unwrap_err();
    assert!(error.detail.contains("--force"), "{error}");
    let error = DeviceTarget::open(path, DISK + 2 * MIB, true).unwrap_err();
    assert_eq!(error.kind, CaptureErrorKind::Invalid);
    assert!(DeviceTarget::open(&file, DISK, true).is_err());
    let target = Box::new(DeviceTarget::open(path, DISK, true).unwrap());
    write_parts(target.as_ref());
    finish(target).unwrap();
    let content = fs::read(path).unwrap();
    same(&content[..DISK as usize], &expected_disk());
    let behind = &noise("old", DISK + MIB)[DISK as usize..];
    same(&content[DISK as usize..], behind);
}

#[test]
fn the_nbd_client_writes_zeroes_trims_and_reads_back() {
    let lab = Lab::new();
    let path = lab.raw("disk.raw", 8 * MIB, &[(0, noise("old", 8 * MIB))]);
    let socket = lab.path("s");
    let arguments = [
        "--shared=4",
        "--format",
        "raw",
        "--discard=unmap",
        text(&path),
    ];
    let _server = Server::start(&arguments, &socket);
    let client = NbdClient::connect(Endpoint::new(&socket, "")).unwrap();
    let new = noise("new", 300_000);
    client.write_at(MIB + 7, &new).unwrap();
    client.write_zeroes(Extent::new(3 * MIB, MIB + 13)).unwrap();
    client.trim(Extent::new(6 * MIB, MIB)).unwrap();
    client.flush().unwrap();
    let mut expected = noise("old", 8 * MIB);
    expected[MIB as usize + 7..][..new.len()].copy_from_slice(&new);
    expected[3 * MIB as usize..][..MIB as usize + 13].fill(0);
    let mut content = vec![0xaa; 8 * MIB as usize];
    client.read_at(0, &mut content).unwrap();
    same(&content[..6 * MIB as usize], &expected[..6 * MIB as usize]);
    same(&content[7 * MIB as usize..], &expected[7 * MIB as usize..]);
    same(&content, &fs::read(&path).unwrap());
    assert!(
        client
            .status("base:allocation", Extent::new(0, MIB))
            .is_err()
    );
    assert!(client.read_at(8 * MIB - 1, &mut [0; 2]).is_err());
    client.disconnect().unwrap();
    let missing = Endpoint::new(&socket, "").with_context("qemu:dirty-bitmap:none");
    assert!(NbdClient::connect(missing).is_err());
    assert!(NbdClient::connect(Endpoint::new(&socket, "another")).is_err());
}

/// Not a test of its own: the agent that the next test kills.
#[test]
fn agent_to_be_killed() {
    let Some(folder) = std::env::var_os("VMKEEP_TEST_AGENT") else {
        return;
    };
    let folder = PathBuf::from(folder);
    let disk = ImageDisk {
        name: DiskName::new("vda").unwrap(),
        path: folder.join("disk.qcow2"),
        format: ImageFormat::Qcow2,
    };
    let source = ImageSource::new(vec![disk], folder.join("run"), Timestamp::now());
    let _capture = source.open(&[], Reading::Everything).unwrap();
    println!("captured");
    // Until it is killed.
    let _ = std::io::stdin().read(&mut [0]);
}

#[test]
fn a_killed_agent_leaves_no_server_and_recover_removes_the_rest() {
    let lab = Lab::new();
    let path = lab.path("disk.qcow2");
    tool(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", text(&path), "1M"],
    );
    let mut agent = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "agent_to_be_killed", "--nocapture"])
        .env("VMKEEP_TEST_AGENT", lab.folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(agent.stdout.take().unwrap());
    assert!(
        output
            .lines()
            .any(|line| line.unwrap().contains("captured"))
    );
    let folders = names(&lab.runtime());
    assert_eq!(folders.len(), 1);
    let socket = lab.runtime().join(&folders[0]).join("q/s");
    assert!(UnixStream::connect(&socket).is_ok());

    // While the agent lives, nobody else takes its folder for a dead one.
    let source = lab.source(&path, ImageFormat::Qcow2);
    source.recover().unwrap();
    assert!(UnixStream::connect(&socket).is_ok());

    agent.kill().unwrap();
    agent.wait().unwrap();
    eventually("the server ends", || UnixStream::connect(&socket).is_err());
    source.recover().unwrap();
    source.recover().unwrap();
    assert!(lab.runtime_is_empty());
    tool("qemu-io", &["-f", "qcow2", "-c", "write 0 4k", text(&path)]);
}

#[test]
fn recover_ends_a_server_whose_agent_died_before_its_first_connection() {
    let lab = Lab::new();
    let path = lab.raw("disk.raw", MIB, &[]);
    let folder = lab.runtime().join("nbd-00112233aabbccdd");
    let socket = folder.join("q/s");
    fs::create_dir_all(folder.join("q")).unwrap();
    let mut orphan = Command::new("qemu-nbd")
        .args(["--read-only", "--format", "raw", "--shared=8", "--socket"])
        .args([&socket, &path])
        .spawn()
        .unwrap();
    eventually("qemu-nbd listens", || socket.exists());
    lab.source(&path, ImageFormat::Raw).recover().unwrap();
    assert!(lab.runtime_is_empty());
    eventually("the orphan ends", || orphan.try_wait().unwrap().is_some());
}
