//! `cargo bench --bench first_table`: vmkeep beside the peers that are installed, on a real file
//! system image, in the same run. Prints Markdown.
//!
//! The image is ext4 with a copy of `/usr/lib` up to a limit; the night changes about 2 % of it in
//! 64 KiB pieces all over. Each task runs `ROUNDS` times, tools alternating; the table shows medians.
//! Absolute times are this machine's; the ratios are what counts. Environment: `VMKEEP_BENCH_DIR`
//! (where; default the temporary folder), `VMKEEP_BENCH_MIB` (data in the image; default 1024).

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

const ROUNDS: usize = 3;
const MIB: u64 = 1 << 20;
const TASKS: [&str; 6] = [
    "first full",
    "full again, forced",
    "night, 2 % changed",
    "night, nothing changed",
    "restore",
    "prune",
];

struct Lab {
    folder: PathBuf,
    image: PathBuf,
    changed: PathBuf,
    data_bytes: u64,
}

/// One tool's way to do each task in an empty folder.
trait Tool {
    fn name(&self) -> String;
    fn init(&self, lab: &Lab, store: &Path);
    fn backup(&self, lab: &Lab, store: &Path, full: bool);
    fn restore(&self, lab: &Lab, store: &Path, to: &Path) -> PathBuf;
    fn prune(&self, lab: &Lab, store: &Path);
}

fn run(command: &mut Command) {
    let output = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn version(name: &str, argument: &str) -> Option<String> {
    let output = Command::new(name).arg(argument).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().next()?.to_string();
    Some(
        line.split_whitespace()
            .take(2)
            .collect::<Vec<_>>()
            .join(" "),
    )
}

struct Vmkeep;

impl Vmkeep {
    fn command(&self, store: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmkeep"));
        command
            .arg("--config")
            .arg(store.join("vmkeep.toml"))
            .args(arguments);
        command
    }
}

impl Tool for Vmkeep {
    fn name(&self) -> String {
        format!("vmkeep {}", env!("CARGO_PKG_VERSION"))
    }

    fn init(&self, lab: &Lab, store: &Path) {
        fs::create_dir_all(store).unwrap();
        let text = format!(
            "[host]\nclock = \"trusted\"\nstate_dir = \"{0}/state\"\n[repository]\nurl = \
             \"{0}/store\"\nreserve = \"1 MiB\"\n[policy]\ntimezone = \"UTC\"\n[[customer]]\nid = \
             \"acme\"\n[[customer.vm]]\nname = \"web01\"\ndisks = {{ vda = \"{1}\" }}\n",
            store.display(),
            lab.image.display()
        );
        fs::write(store.join("vmkeep.toml"), text).unwrap();
        run(&mut self.command(store, &["init", "--yes"]));
    }

    fn backup(&self, _: &Lab, store: &Path, full: bool) {
        let mut arguments = vec!["backup", "web01"];
        if full {
            arguments.push("--full");
        }
        run(&mut self.command(store, &arguments));
    }

    fn restore(&self, _: &Lab, store: &Path, to: &Path) -> PathBuf {
        let target = to.display().to_string();
        let line = ["restore", "web01", "--at", "latest", "--to", &target];
        run(&mut self.command(store, &line));
        to.join("vda.raw")
    }

    fn prune(&self, _: &Lab, store: &Path) {
        run(&mut self.command(store, &["prune"]));
    }
}

struct Restic(String);

impl Restic {
    fn command(&self, store: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new("restic");
        command
            .env("RESTIC_PASSWORD", "bench")
            .env("RESTIC_CACHE_DIR", store.join("cache"))
            .arg("-q")
            .arg("-r")
            .arg(store.join("store"))
            .args(arguments);
        command
    }
}

impl Tool for Restic {
    fn name(&self) -> String {
        self.0.clone()
    }

    fn init(&self, _: &Lab, store: &Path) {
        fs::create_dir_all(store).unwrap();
        run(&mut self.command(store, &["init"]));
    }

    fn backup(&self, lab: &Lab, store: &Path, full: bool) {
        let image = lab.image.display().to_string();
        let mut arguments = vec!["backup", &image];
        if full {
            arguments.push("--force");
        }
        run(&mut self.command(store, &arguments));
    }

    fn restore(&self, lab: &Lab, store: &Path, to: &Path) -> PathBuf {
        let target = to.display().to_string();
        let line = ["restore", "latest", "--target", &target];
        run(&mut self.command(store, &line));
        to.join(lab.image.strip_prefix("/").unwrap())
    }

    fn prune(&self, _: &Lab, store: &Path) {
        run(&mut self.command(store, &["forget", "--keep-within", "2m", "--prune"]));
    }
}

struct Borg(String);

impl Borg {
    fn command(&self, store: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new("borg");
        command
            .env("BORG_PASSPHRASE", "bench")
            .env("BORG_REPO", store.join("store"))
            .env("BORG_BASE_DIR", store.join("base"))
            .args(arguments);
        command
    }
}

impl Tool for Borg {
    fn name(&self) -> String {
        self.0.clone()
    }

    fn init(&self, _: &Lab, store: &Path) {
        fs::create_dir_all(store).unwrap();
        run(&mut self.command(store, &["init", "-e", "repokey-blake2"]));
    }

    fn backup(&self, lab: &Lab, store: &Path, full: bool) {
        let image = lab.image.display().to_string();
        let mut arguments = vec!["create", "--compression", "zstd,1"];
        arguments.extend(["--chunker-params", "fixed,4194304"]);
        if full {
            arguments.push("--files-cache=disabled");
        }
        arguments.extend(["::{now:%Y%m%dT%H%M%S%f}", &image]);
        run(&mut self.command(store, &arguments));
    }

    fn restore(&self, lab: &Lab, store: &Path, to: &Path) -> PathBuf {
        let listed = self
            .command(store, &["list", "--last", "1", "--short"])
            .output()
            .unwrap();
        let archive = format!("::{}", String::from_utf8_lossy(&listed.stdout).trim());
        fs::create_dir_all(to).unwrap();
        let line = ["extract", "--sparse", &archive];
        run(self.command(store, &line).current_dir(to));
        to.join(lab.image.strip_prefix("/").unwrap())
    }

    fn prune(&self, _: &Lab, store: &Path) {
        run(&mut self.command(store, &["prune", "--keep-within", "2m"]));
        run(&mut self.command(store, &["compact"]));
    }
}

/// Bytes of noise without a seed of its own: reproducible.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}

/// Copies files below `from` until `limit` bytes are there.
fn fill(from: &Path, to: &Path, limit: &mut u64) {
    let mut entries: Vec<_> = fs::read_dir(from)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    entries.sort();
    for path in entries {
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            continue;
        };
        let target = to.join(path.file_name().unwrap());
        if metadata.is_dir() {
            fs::create_dir_all(&target).unwrap();
            fill(&path, &target, limit);
        } else if metadata.is_file() && metadata.len() <= *limit {
            *limit -= metadata.len();
            fs::copy(&path, &target).unwrap();
        }
    }
}

fn copy_sparse(from: &Path, to: &Path) {
    run(Command::new("cp")
        .args(["--sparse=always"])
        .arg(from)
        .arg(to));
}

impl Lab {
    fn new() -> Self {
        let base =
            std::env::var_os("VMKEEP_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let folder = base.join(format!("vmkeep-bench.{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let mib = std::env::var("VMKEEP_BENCH_MIB")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(1024);
        let tree = folder.join("tree");
        fs::create_dir_all(&tree).unwrap();
        let mut left = mib * MIB;
        fill(Path::new("/usr/lib"), &tree, &mut left);
        let (image, changed) = (folder.join("original.raw"), folder.join("changed.raw"));
        let file = File::create(&image).unwrap();
        file.set_len(4 * mib * MIB).unwrap();
        run(Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-d"])
            .arg(&tree)
            .arg(&image));
        fs::remove_dir_all(&tree).unwrap();
        copy_sparse(&image, &changed);
        // 2 % of the data, in pieces of 64 KiB all over the first half of the disk.
        let file = OpenOptions::new().write(true).open(&changed).unwrap();
        let pieces = mib * 16 / 50;
        let stride = (mib * MIB / pieces) / 4096 * 4096;
        for piece in 0..pieces {
            let offset = MIB + piece * stride;
            file.write_all_at(&noise(piece, 64 << 10), offset).unwrap();
        }
        Lab {
            image: folder.join("web01.raw"),
            data_bytes: mib * MIB - left,
            changed,
            folder,
        }
    }

    fn original(&self) -> PathBuf {
        self.folder.join("original.raw")
    }

    /// The image becomes the original or the changed one; in the page cache for all alike.
    fn put(&self, which: &Path) {
        copy_sparse(which, &self.image);
        let mut buffer = vec![0; 1 << 20];
        let mut file = File::open(&self.image).unwrap();
        while file.read(&mut buffer).unwrap() > 0 {}
    }
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn size_bytes(folder: &Path) -> u64 {
    let output = Command::new("du")
        .args(["-s", "-B1"])
        .arg(folder)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace()
        .next()
        .and_then(|word| word.parse().ok())
        .unwrap_or_default()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What this machine can do at best, on the same bytes.
fn bounds(lab: &Lab) -> Vec<(&'static str, f64)> {
    lab.put(&lab.original());
    let bytes = fs::read(&lab.image).unwrap();
    let data: Vec<&[u8]> = bytes
        .chunks(64 << 10)
        .filter(|chunk| chunk.iter().any(|byte| *byte != 0))
        .collect();
    let halves: Vec<&[&[u8]]> = data.chunks(data.len().div_ceil(2)).collect();
    let both = |work: &(dyn Fn(&[u8]) + Sync)| {
        seconds(|| {
            std::thread::scope(|scope| {
                for half in &halves {
                    scope.spawn(move || half.iter().for_each(|chunk| work(chunk)));
                }
            });
        })
    };
    let hash = both(&|chunk| {
        std::hint::black_box(blake3::hash(chunk));
    });
    let compress = both(&|chunk| {
        std::hint::black_box(zstd::bulk::compress(chunk, 1).unwrap());
    });
    let copy = seconds(|| {
        let target = lab.folder.join("copy");
        copy_sparse(&lab.image, &target);
        File::open(&target).unwrap().sync_all().unwrap();
        fs::remove_file(&target).unwrap();
    });
    vec![
        ("BLAKE3 of all data, two threads", hash),
        ("zstd 1 of all data, two threads", compress),
        ("cp --sparse and fsync", copy),
    ]
}

fn main() {
    // `cargo test --benches` and clippy only want to see it start.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let mut tools: Vec<Box<dyn Tool>> = vec![Box::new(Vmkeep)];
    if let Some(version) = version("restic", "version") {
        tools.push(Box::new(Restic(version)));
    }
    if let Some(version) = version("borg", "--version") {
        tools.push(Box::new(Borg(version)));
    }
    let lab = Lab::new();
    println!(
        "{} MiB of files in an ext4 image of {} MiB; medians of {ROUNDS}, files in the page cache.\n",
        lab.data_bytes / MIB,
        fs::metadata(lab.original()).unwrap().len() / MIB
    );
    let mut times: BTreeMap<(usize, usize), Vec<f64>> = BTreeMap::new();
    let mut sizes: BTreeMap<usize, u64> = BTreeMap::new();
    for round in 0..ROUNDS {
        for (number, tool) in tools.iter().enumerate() {
            let store = lab.folder.join(format!("store-{number}-{round}"));
            let mut note = |task: usize, took: f64| {
                times.entry((task, number)).or_default().push(took);
            };
            lab.put(&lab.original());
            tool.init(&lab, &store);
            note(0, seconds(|| tool.backup(&lab, &store, false)));
            note(1, seconds(|| tool.backup(&lab, &store, true)));
            lab.put(&lab.changed);
            // A mark is kept only of an image that has been quiet for longer than a clock tick.
            std::thread::sleep(std::time::Duration::from_secs(3));
            note(2, seconds(|| tool.backup(&lab, &store, false)));
            note(3, seconds(|| tool.backup(&lab, &store, false)));
            sizes.insert(number, size_bytes(&store.join("store")));
            let to = store.join("restored");
            let mut restored = PathBuf::new();
            note(4, seconds(|| restored = tool.restore(&lab, &store, &to)));
            run(Command::new("cmp").arg(&restored).arg(&lab.image));
            note(5, seconds(|| tool.prune(&lab, &store)));
            fs::remove_dir_all(&store).unwrap();
        }
    }
    let names: Vec<String> = tools.iter().map(|tool| tool.name()).collect();
    println!("| seconds | {} |", names.join(" | "));
    println!("|---|{}", "---|".repeat(names.len()));
    for (task, title) in TASKS.iter().enumerate() {
        let own = median(times[&(task, 0)].clone());
        let cells: Vec<String> = (0..tools.len())
            .map(|number| {
                let value = median(times[&(task, number)].clone());
                match number {
                    0 => format!("{value:.2}"),
                    _ => format!("{value:.2} ({:.1}×)", value / own),
                }
            })
            .collect();
        println!("| {title} | {} |", cells.join(" | "));
    }
    let cells: Vec<String> = sizes
        .values()
        .map(|size| format!("{} MiB", size / MIB))
        .collect();
    println!("| store after both nights | {} |", cells.join(" | "));
    println!("\nBounds on the same bytes:\n");
    for (what, took) in bounds(&lab) {
        println!("- {what}: {took:.2} s");
    }
    fs::remove_dir_all(&lab.folder).unwrap();
}
