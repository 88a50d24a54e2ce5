//! `cargo bench --bench memory`: the memory of the largest process of each command on a disk of 1 TiB
//! with 64 GiB of data in it. Prints Markdown.
//!
//! The disk is made up by `nbdkit` (`apt-get install nbdkit`): runs of data all over, no two chunks
//! alike, which compress to little, so that the store stays small: what vmkeep has to remember depends
//! on how many chunks there are. What it holds for a while depends on their size, so there is a
//! second disk, of 2 GiB of random bytes, which goes into a bucket of the test server as well: there several packs
//! are under way at once. Wanted: a full below 300 MiB.
//!
//! Environment: `VMKEEP_BENCH_DIR` (where; default the temporary folder; 8 GB).

use vmkeep_test_support as support;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use support::s3::server;

/// Wanted of every command.
const LIMIT_MIB: f64 = 300.0;

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn main() {
    // `cargo test --benches` calls it too; it has no tests.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    measure_disk("1T", "6.25", false, None);
    measure_disk("64G", "3.125", true, None);
    let bucket = server().bucket();
    measure_disk("64G", "3.125", true, Some(bucket.config("backups")));
}

fn measure_disk(disk: &str, percent: &str, random: bool, bucket: Option<String>) {
    let parent = std::env::var_os("VMKEEP_BENCH_DIR");
    let folder = tempfile::Builder::new()
        .prefix("vmkeep-memory.")
        .tempdir_in(parent.unwrap_or_else(|| std::env::temp_dir().into()))
        .expect("a folder");
    let folder = folder.path();
    let _server = serve(folder, disk, percent, random);
    let place = if bucket.is_some() {
        "a bucket"
    } else {
        "a directory"
    };
    prepare(folder, bucket);
    let content = match random {
        true => "random bytes",
        false => "data",
    };
    println!("A disk of {disk} with {percent} % of {content}, in {place}\n");
    println!("| | seconds | MiB at most |");
    println!("|---|--:|--:|");
    let full = ["backup", "big", "--full"];
    let without_keys = ["verify", "--without-keys", "--read-data"];
    let target = folder.join("restored");
    let target = target.to_str().expect("a folder with a plain name");
    let restore = ["restore", "big", "--at", "latest", "--to", target];
    let commands: [(&str, &[&str]); 8] = [
        ("first full", &full),
        ("full again, everything read", &full),
        ("points", &["points"]),
        ("restore", &restore),
        ("prune", &["prune"]),
        ("verify, all trees", &["verify"]),
        ("verify, all data opened", &["verify", "--read-data"]),
        ("verify without keys, all data read", &without_keys),
    ];
    measure(folder, "init", &["init", "--yes"]);
    for (what, arguments) in commands {
        // 64 GiB would have to be there.
        if what == "restore" && !random {
            continue;
        }
        measure(folder, what, arguments);
    }
    println!();
}

fn serve(folder: &Path, disk: &str, percent: &str, random: bool) -> Server {
    let socket = folder.join("disk.nbd");
    let child = Command::new("nbdkit")
        .args(["--foreground", "--readonly", "--unix"])
        .arg(&socket)
        .args(["sparse-random", &format!("size={disk}")])
        .args([&format!("percent={percent}"), "seed=1"])
        .arg(format!("random-content={random}"))
        .stdin(Stdio::null())
        .spawn()
        .expect("nbdkit starts (apt-get install nbdkit)");
    let server = Server(child);
    let end = Instant::now() + Duration::from_secs(30);
    while !socket.exists() {
        assert!(Instant::now() < end, "nbdkit does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    server
}

fn prepare(folder: &Path, bucket: Option<String>) {
    let at = folder.to_str().expect("a folder with a plain name");
    let repository = bucket
        .unwrap_or_else(|| format!("[repository]\nurl = \"{at}/store\"\nreserve = \"1 MiB\"\n"));
    fs::write(
        folder.join("vmkeep.toml"),
        format!(
            "[host]\nclock = \"trusted\"\nstate_dir = \"{at}/state\"\n\
             {repository}\n[policy]\n\
             timezone = \"UTC\"\n[[customer]]\nid = \"acme\"\n[[customer.vm]]\nname = \"big\"\n\
             nbd = \"{at}/job.json\"\n"
        ),
    )
    .expect("a configuration");
    let job = serde_json::json!({ "disks": { "vda": {
        "socket": folder.join("disk.nbd"), "export": "vda", "mode": "none",
    } } });
    fs::write(folder.join("job.json"), job.to_string()).expect("a job");
}

fn measure(folder: &Path, what: &str, arguments: &[&str]) {
    let report = folder.join("report");
    let start = Instant::now();
    let output = Command::new("/usr/bin/time")
        .args(["-q", "-f", "%M", "-o"])
        .arg(&report)
        .arg(env!("CARGO_BIN_EXE_vmkeep"))
        .arg("--config")
        .arg(folder.join("vmkeep.toml"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("/usr/bin/time starts (apt-get install time)");
    let seconds = start.elapsed().as_secs_f64();
    assert!(
        output.status.success(),
        "{what}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    let peak = fs::read_to_string(&report).expect("a report");
    let peak_mib = peak.trim().parse::<f64>().expect("a number of KiB") / 1024.0;
    let verdict = match peak_mib < LIMIT_MIB {
        true => "",
        false => " (too much)",
    };
    println!("| {what} | {seconds:.1} | {peak_mib:.0}{verdict} |");
}
