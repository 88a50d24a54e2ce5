//! `cargo bench --bench live`: what backing up a running VM costs, in ratios of the same run.
//! Prints Markdown. Needs `qemu-system-x86_64`, `qemu-nbd`, `nbdcopy` and the guest of
//! `scripts/guest`.
//!
//! - *dirty*: a disk full of data, a full, then nights with 1 % of it changed in 64 KiB pieces all
//!   over. An incremental may cost at most 3 % of the full.
//! - *reading*: the same export read by the backup's client, in the backup's pattern, and by
//!   `nbdcopy`, alternating. At least 80 % of its rate.
//! - *latency*: a guest overwrites and syncs single records; its 99th percentile during a backup
//!   beside that without. At most twice. QEMU runs on one core, the backup on the other and with the
//!   priority that it has in `config/`, so that it is the disk they share, and not the processor.
//!
//! Environment: `VMKEEP_BENCH_DIR` (where; default the temporary folder), `VMKEEP_BENCH_GIB` (the
//! disk of *dirty*; default 8), `VMKEEP_BENCH_ONLY` (one of the three words).

use vmkeep_test_support as support;

use serde_json::json;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use support::live::{DiskSpec, Format, Image, Vm, VmOptions, wait_until};
use support::{path_text, tool};
use vmkeep::hypervisor::nbd::{BASE_ALLOCATION, Endpoint, NbdClient, STATUS_ZERO};
use vmkeep::jobs::READ_BYTES;
use vmkeep::model::Extent;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
const CHUNK: u64 = 65536;
const ROUNDS: usize = 3;

fn main() {
    // `cargo test --benches` calls it too; it has no tests.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let only = std::env::var("VMKEEP_BENCH_ONLY").ok();
    let wanted = |name: &str| only.as_deref().is_none_or(|only| only == name);
    let folder = tempfile::Builder::new()
        .prefix("vmkeep-live.")
        .tempdir_in(
            std::env::var_os("VMKEEP_BENCH_DIR").unwrap_or_else(|| std::env::temp_dir().into()),
        )
        .unwrap();
    if wanted("dirty") {
        dirty(folder.path());
    }
    if wanted("reading") {
        reading(folder.path());
    }
    if wanted("latency") {
        latency(folder.path());
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// Programs and libraries, no two chunks alike: what real disks hold compresses so.
fn fill(path: &Path, bytes: u64) {
    let mut source = Vec::new();
    let mut folders = vec![PathBuf::from("/usr/lib")];
    while let Some(folder) = folders.pop() {
        let mut entries: Vec<_> = fs::read_dir(&folder)
            .into_iter()
            .flatten()
            .flatten()
            .collect();
        entries.sort_by_key(|entry| entry.path());
        for entry in entries {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                Ok(kind) if kind.is_file() && (source.len() as u64) < 512 * MIB => {
                    let _ =
                        File::open(entry.path()).and_then(|mut file| file.read_to_end(&mut source));
                }
                _ => {}
            }
        }
    }
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).unwrap());
    let chunks = source.chunks_exact(CHUNK as usize).cycle();
    for (number, chunk) in (0..bytes / CHUNK).zip(chunks) {
        file.write_all(&number.to_le_bytes()).unwrap();
        file.write_all(&chunk[8..]).unwrap();
    }
    file.into_inner().unwrap().sync_all().unwrap();
}

struct Repository {
    folder: PathBuf,
}

impl Repository {
    fn new(folder: PathBuf, monitor: &Path) -> Self {
        fs::create_dir_all(&folder).unwrap();
        let text = format!(
            "[host]\nclock = \"trusted\"\nstate_dir = \"{0}/state\"\noverlay_dir = \"{0}/overlay\"\n\
             [repository]\nurl = \"{0}/store\"\nreserve = \"1 MiB\"\n[policy]\ntimezone = \
             \"UTC\"\n[[customer]]\nid = \"acme\"\n[[customer.vm]]\nname = \"db01\"\nqmp = \"{1}\"\n",
            path_text(&folder),
            path_text(monitor)
        );
        fs::create_dir_all(folder.join("overlay")).unwrap();
        fs::write(folder.join("vmkeep.toml"), text).unwrap();
        let repository = Repository { folder };
        run(&mut repository.command(&["init", "--yes"]));
        repository
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmkeep"));
        command
            .arg("--config")
            .arg(self.folder.join("vmkeep.toml"))
            .args(arguments);
        command
    }

    /// What `backup --json` says.
    fn backup(&self, arguments: &[&str]) -> serde_json::Value {
        let line = [&["--json", "backup", "db01"], arguments].concat();
        serde_json::from_str::<serde_json::Value>(&run(&mut self.command(&line))).unwrap()["vms"][0]
            .clone()
    }
}

fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// A QEMU that runs no guest: its disk is written by its own monitor.
fn idle_vm(folder: &Path, disk: &Image) -> Vm {
    fs::create_dir_all(folder).unwrap();
    let mut options = VmOptions::new("idle", folder, &[disk]);
    options.disks[0] = DiskSpec::new(0, disk);
    options.paused = true;
    Vm::start(options)
}

fn dirty(folder: &Path) {
    let gib: u64 = std::env::var("VMKEEP_BENCH_GIB")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(8);
    let raw = folder.join("big.raw");
    fill(&raw, gib * GIB);
    let image = Image {
        path: folder.join("big.qcow2"),
        format: Format::Qcow2,
    };
    tool(
        "qemu-img",
        &[
            "convert",
            "-O",
            "qcow2",
            path_text(&raw),
            path_text(&image.path),
        ],
    );
    fs::remove_file(&raw).unwrap();
    let vm = idle_vm(&folder.join("v1"), &image);
    let mut seed = 1_u64;
    let mut fulls = Vec::new();
    let mut nights = Vec::new();
    for round in 0..ROUNDS {
        let repository = Repository::new(folder.join(format!("dirty-{round}")), &vm.qmp_socket());
        fulls.push(seconds(|| {
            assert_eq!(repository.backup(&[])["kind"], "full");
        }));
        for _ in 0..2 {
            let mut written = BTreeMap::new();
            while (written.len() as u64) < gib * GIB / CHUNK / 100 {
                seed = seed
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                written.insert((seed >> 20) % (gib * GIB / CHUNK), seed >> 56 | 1);
            }
            for (chunk, pattern) in written {
                let line = format!(
                    "qemu-io -d /machine/peripheral/vd0/virtio-backend \"write -q -P {pattern} {} 4k\"",
                    chunk * CHUNK
                );
                let said = vm.qmp(&json!({"execute": "human-monitor-command",
                    "arguments": {"command-line": line}}));
                assert_eq!(said.as_str(), Some(""), "{line}");
            }
            nights.push(seconds(|| {
                let night = repository.backup(&[]);
                assert_eq!(night["kind"], "incremental", "{night}");
                let read = night["read_bytes"].as_u64().unwrap();
                assert_eq!(read, gib * GIB / CHUNK / 100 * CHUNK, "{night}");
            }));
        }
        run(&mut repository.command(&["tracking", "release", "db01"]));
        fs::remove_dir_all(&repository.folder).unwrap();
    }
    let (full, night) = (median(fulls.clone()), median(nights.clone()));
    println!("## A disk of {gib} GiB, 1 % changed in pieces of 64 KiB all over\n");
    println!("| | seconds | of the full |\n|---|---|---|");
    println!("| full | {full:.2} | |");
    println!(
        "| incremental | {night:.3} | {:.1} % (at most 3 %) |\n",
        night / full * 100.0
    );
    println!("(fulls {fulls:.2?}, incrementals {nights:.3?})\n");
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn reading(folder: &Path) {
    let raw = folder.join("read.raw");
    fill(&raw, 2 * GIB);
    let image = folder.join("read.qcow2");
    tool(
        "qemu-img",
        &["convert", "-O", "qcow2", path_text(&raw), path_text(&image)],
    );
    fs::remove_file(&raw).unwrap();
    let socket = folder.join("read.sock");
    let _server = Server(
        Command::new("qemu-nbd")
            .args(["-r", "-t", "-e", "16", "-f", "qcow2", "-k"])
            .arg(&socket)
            .arg(&image)
            .spawn()
            .unwrap(),
    );
    let there = || socket.exists().then_some(());
    wait_until("qemu-nbd", Duration::from_secs(20), there, String::new);
    let uri = format!("nbd+unix:///?socket={}", path_text(&socket));
    let mut times: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for _ in 0..5 {
        times
            .entry("vmkeep")
            .or_default()
            .push(seconds(|| read_as_backup(&socket)));
        times.entry("nbdcopy").or_default().push(seconds(|| {
            tool("nbdcopy", &[&uri, "null:"]);
        }));
    }
    let rate = |who: &str| 2048.0 / median(times[who].clone());
    println!("## Reading an export of 2 GiB\n");
    println!("| | MiB/s |\n|---|---|");
    println!("| nbdcopy to null: | {:.0} |", rate("nbdcopy"));
    println!(
        "| vmkeep | {:.0}, {:.0} % (at least 80 %) |\n",
        rate("vmkeep"),
        rate("vmkeep") / rate("nbdcopy") * 100.0
    );
}

/// As `backup` reads: as many threads as cores, spans of 16 MiB, their allocation first.
fn read_as_backup(socket: &Path) {
    let client =
        NbdClient::connect(Endpoint::new(socket, "").with_context(BASE_ALLOCATION)).unwrap();
    let span = 16 * MIB;
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().unwrap().get();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut buffer = vec![0; READ_BYTES];
                loop {
                    let start = next.fetch_add(1, Ordering::Relaxed) as u64 * span;
                    if start >= client.size_bytes() {
                        break;
                    }
                    let whole = Extent::new(start, span.min(client.size_bytes() - start));
                    for status in client.status(BASE_ALLOCATION, whole).unwrap() {
                        if status.flags & STATUS_ZERO != 0 {
                            continue;
                        }
                        let mut at = status.extent.offset;
                        while at < status.extent.end() {
                            let length = (status.extent.end() - at).min(buffer.len() as u64);
                            client.read_at(at, &mut buffer[..length as usize]).unwrap();
                            at += length;
                        }
                    }
                }
            });
        }
    });
}

fn latency(folder: &Path) {
    let folder = folder.join("v2");
    fs::create_dir_all(&folder).unwrap();
    let disks = [
        Image::ext4(folder.join("a.qcow2"), 256 * MIB, Format::Qcow2),
        Image::ext4(folder.join("b.raw"), 256 * MIB, Format::Raw),
    ];
    // A disk that takes the backup a while, and that the guest does not use.
    let bulk = folder.join("c.raw");
    fill(&bulk, 4 * GIB);
    let bulk = Image {
        path: bulk,
        format: Format::Raw,
    };
    let vm = Vm::start(VmOptions::new(
        "busy",
        &folder,
        &[&disks[0], &disks[1], &bulk],
    ));
    pin(&["-a", "-p", "-c", "0"], &vm.process_id().to_string());
    vm.wait_ready();
    vm.wait_for_progress(50);
    vm.console().stop_writer();
    let count = 3000;
    let mut quiet = Vec::new();
    let mut busy = Vec::new();
    for round in 0..ROUNDS {
        let repository = Repository::new(folder.join(format!("latency-{round}")), &vm.qmp_socket());
        quiet.push(vm.latency(count));
        let mut command = Command::new("taskset");
        let own = repository.command(&["backup", "db01", "--full"]);
        command
            .args(["-c", "1", "nice", "-n", "10"])
            .arg(own.get_program())
            .args(own.get_args());
        let start = Instant::now();
        let backup = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut backup = Server(backup);
        let measured = vm.latency(count);
        let took = start.elapsed();
        // What was measured after the backup's end is not what is asked for.
        let still = backup.0.try_wait().unwrap().is_none();
        assert!(backup.0.wait().unwrap().success());
        println!(
            "(round {round}: without {:?}; during {measured:?}, {took:.1?}, backup ended before: {})",
            quiet[round], !still
        );
        busy.push(measured);
        run(&mut repository.command(&["tracking", "release", "db01"]));
        fs::remove_dir_all(&repository.folder).unwrap();
    }
    let ms = |values: Vec<u64>| median(values.iter().map(|us| *us as f64 / 1000.0).collect());
    let (p50, p99) = (
        (
            ms(quiet.iter().map(|l| l.p50_us).collect()),
            ms(busy.iter().map(|l| l.p50_us).collect()),
        ),
        (
            ms(quiet.iter().map(|l| l.p99_us).collect()),
            ms(busy.iter().map(|l| l.p99_us).collect()),
        ),
    );
    println!("\n## A guest's overwrite with sync, milliseconds\n");
    println!("| | without | during a full | ratio |\n|---|---|---|---|");
    println!(
        "| median | {:.2} | {:.2} | {:.2} |",
        p50.0,
        p50.1,
        p50.1 / p50.0
    );
    println!(
        "| 99th percentile | {:.2} | {:.2} | {:.2} (at most 2) |\n",
        p99.0,
        p99.1,
        p99.1 / p99.0
    );
}

fn pin(arguments: &[&str], process: &str) {
    tool("taskset", &[arguments, &[process]].concat());
}
