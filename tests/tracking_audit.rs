//! Tracking that really lies: a write through a mapping of a page that is dirty already leaves the
//! times of a file as they are, so its fingerprint says that nothing changed. In a file system in
//! memory such a page stays dirty.

use vmkeep_test_support as support;

use jiff::SignedDuration;
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use support::{Host, HostOptions, path_text, time};

const WRITER: &str = "
import mmap, sys
with open(sys.argv[1], 'r+b') as file, mmap.mmap(file.fileno(), 0) as mapped:
    for line in sys.stdin:
        mapped[70000:70006] = line.strip().encode()
        print('written', flush=True)
";

/// A process that writes to an image behind the back of its times.
struct Writer {
    child: Child,
    image: PathBuf,
}

impl Writer {
    /// The first write makes the page dirty, and is seen.
    fn new(image: &Path) -> Self {
        let child = Command::new("python3")
            .args(["-c", WRITER, path_text(image)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut writer = Writer {
            child,
            image: image.to_path_buf(),
        };
        writer.write("opened");
        writer
    }

    fn write(&mut self, six: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{six}").unwrap();
        let mut said = String::new();
        let stdout = self.child.stdout.as_mut().unwrap();
        BufReader::new(stdout).read_line(&mut said).unwrap();
        assert_eq!(said, "written\n");
        assert!(fs::read(&self.image).unwrap()[70000..].starts_with(six.as_bytes()));
    }

    fn hide(&mut self, six: &str) {
        let times = |path: &Path| {
            let metadata = fs::metadata(path).unwrap();
            [
                (metadata.mtime(), metadata.mtime_nsec()),
                (metadata.ctime(), metadata.ctime_nsec()),
            ]
        };
        let before = times(&self.image);
        self.write(six);
        assert_eq!(times(&self.image), before, "the kernel told of the write");
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn suspects(points: &[Value]) -> Vec<bool> {
    let of = |point: &Value| point["suspect"].as_bool().unwrap();
    points.iter().map(of).collect()
}

#[test]
fn a_lie_is_told_by_the_weekly_full_and_fulls_follow_until_an_audit_is_clean() {
    let host = Host::new(&HostOptions {
        policy: "timezone = \"UTC\"\nwindow = \"22:00-06:00\"\nfull_day = \"thursday\"",
        ..HostOptions::default()
    });
    let in_memory = tempfile::Builder::new()
        .prefix("vmkeep-test.")
        .tempdir_in("/dev/shm")
        .unwrap();
    let image = in_memory.path().join("web01.raw");
    fs::write(&image, vec![7; 300_000]).unwrap();
    let mut writer = Writer::new(&image);
    let at_first = fs::read(&image).unwrap();
    let configured = host.image("web01", "vda");
    host.write_config(
        &host
            .config_text()
            .replace(path_text(&configured), path_text(&image)),
    );
    // A Monday.
    let start = time("2031-02-10T23:00:00Z");
    let night = |number: i64| start + SignedDuration::from_hours(24 * number);
    host.vmkeep(&["init", "--yes"], start).exits(0);
    host.vmkeep(&["run"], night(0)).exits(0);
    host.vmkeep(&["run"], night(1)).exits(0);
    writer.hide("unseen");
    host.vmkeep(&["run"], night(2)).exits(0);
    assert_eq!(suspects(&host.points(night(2))), [false; 3]);

    // The weekly full.
    let ran = host.vmkeep(&["--json", "run"], night(3));
    ran.exits(4)
        .says("acme: tracking of web01/vda hid changes: 65536 bytes outside of what it reported");
    let full = &ran.document()["customers"][0]["vms"][0];
    assert_eq!(full["kind"], "full");
    assert_eq!(full["audit"]["result"], "differs");
    assert_eq!(full["audit"]["disks"][0]["differing_bytes"], 65536);
    let points = host.points(night(3));
    assert_eq!(full["audit"]["against"], points[2]["id"]);
    assert_eq!(suspects(&points), [false, true, true, false]);
    host.vmkeep(&["points"], night(3))
        .exits(0)
        .says("incr, suspect");
    host.vmkeep(&["status"], night(3))
        .exits(4)
        .says("suspect: acme: tracking of web01/vda hid changes")
        .says("the restore point of the night of 2031-02-11, 2031-02-12 is suspect");
    let status = host.vmkeep(&["--json", "status"], night(3)).document();
    assert_eq!(status["vms"][0]["nights_suspect"], 2);
    assert_eq!(status["vms"][0]["distrusted_disks"][0], "vda");
    host.vmkeep(&["run", "--dry-run"], night(4))
        .exits(0)
        .says("full: a full, because the tracking of changes hid some");

    // The suspect point lacks the change, is restored as it was stored, and says so.
    let restore = ["restore", "web01", "--at", "2031-02-12", "--to", "suspect"];
    host.vmkeep(&restore, night(3))
        .exits(0)
        .says("is suspect")
        .says("the next good one is of 2031-02-13")
        .says("--at 2031-02-13T23:00");
    let again = [
        "-q",
        "restore",
        "web01",
        "--at",
        "2031-02-12",
        "--to",
        "again",
    ];
    let quiet = host.vmkeep(&again, night(3));
    assert!(quiet.exits(0).stdout.contains("is suspect"), "{quiet}");
    let lacking = fs::read(host.path("suspect/vda.raw")).unwrap();
    assert!(lacking == at_first);
    let good = host.restore("web01", "latest", night(3));
    assert!(fs::read(good.path().join("vda.raw")).unwrap() == fs::read(&image).unwrap());

    // It goes on lying, and the nights are right all the same.
    writer.hide("hidden");
    host.vmkeep(&["run"], night(4)).exits(4);
    let good = host.restore("web01", "latest", night(4));
    assert!(fs::read(good.path().join("vda.raw")).unwrap() == fs::read(&image).unwrap());
    // Once an audit is clean, incrementals are taken again; the nights stay suspect.
    host.vmkeep(&["run"], night(5)).exits(0);
    host.vmkeep(&["run"], night(6)).exits(0);
    let points = host.points(night(6));
    let kinds: Vec<&Value> = points.iter().map(|point| &point["kind"]).collect();
    assert_eq!(
        kinds,
        [
            "full",
            "incremental",
            "incremental",
            "full",
            "full",
            "full",
            "incremental"
        ]
    );
    assert_eq!(suspects(&points)[3..], [false; 4]);
    host.vmkeep(&["status"], night(6)).exits(4);
    host.vmkeep(&["verify", "--read-data"], night(6)).exits(0);
    host.vmkeep(&["ledger", "verify"], night(6)).exits(0);
}
