//! `cargo bench --bench peers`: vmkeep beside the peers that are installed (it says which are not,
//! and how to get them), on the same images, alternating, in one run. Prints Markdown.
//!
//! Three VMs: `web01` (programs, logs, a table) with seven nights of changes made inside its mounted
//! file system, `web02` (the same base), `db01` (tables). Each task runs `ROUNDS` times; the
//! tables show medians. Files are in the page cache: the image, and before it is read the whole store, as some
//! tools (borg, vmkeep) leave nothing there of what they wrote. Absolute times are this machine's; the ratios
//! are what counts. Root, for the loop mounts. Environment: `VMKEEP_BENCH_DIR` (where; default the
//! temporary folder), `VMKEEP_BENCH_MIB` (files in each image; default 1024), `VMKEEP_BENCH_ROUNDS`,
//! `VMKEEP_BENCH_PEERS` (only peers whose name holds one of these words, "fixed,bupstash").
//!
//! The bounds are measured in the same run, each step alone on all cores. That of a full is read +
//! hash + compress + cipher + write; vmkeep also opens every frame again before it is sent
//! (decompress, decipher, hash), and the second bound counts that.

mod lab;
mod tools;

use lab::{DB01, Lab, NIGHTS, WEB01, WEB02};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// What a command took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cost {
    pub seconds: f64,
    /// Of the largest process; 0 where `/usr/bin/time` is not there.
    pub peak_kib: u64,
}

fn run(command: &mut Command) -> String {
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
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn measured(command: &mut Command) -> Cost {
    let report = std::env::temp_dir().join(format!("vmkeep-bench-time.{}", std::process::id()));
    let mut timed = match Path::new("/usr/bin/time").exists() {
        true => {
            let mut timed = Command::new("/usr/bin/time");
            timed.args(["-q", "-f", "%M", "-o"]).arg(&report);
            timed.arg(command.get_program());
            timed
        }
        false => Command::new(command.get_program()),
    };
    timed.args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => timed.env(key, value),
            None => timed.env_remove(key),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        timed.current_dir(folder);
    }
    let seconds = seconds(|| drop(run(&mut timed)));
    let peak = fs::read_to_string(&report).unwrap_or_default();
    let _ = fs::remove_file(&report);
    Cost {
        seconds,
        peak_kib: peak.trim().parse().unwrap_or_default(),
    }
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn size_bytes(folder: &Path) -> u64 {
    let text = run(Command::new("du").args(["-s", "-B1"]).arg(folder));
    let word = text.split_whitespace().next();
    word.and_then(|word| word.parse().ok()).unwrap_or_default()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn number(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Rows of the table, in this order.
const TASKS: [&str; 9] = [
    "first full of web01",
    "full again, unchanged, everything read",
    "unchanged, not forced",
    "night 1, changes unknown",
    "nights 2 to 7, sum",
    "web02, shares the base",
    "restore of the newest web01",
    "verify, all data read",
    "prune of the oldest points",
];

#[derive(Default)]
struct Results {
    times: BTreeMap<(usize, usize), Vec<f64>>,
    peaks: BTreeMap<(usize, usize), u64>,
    sizes: BTreeMap<usize, u64>,
}

impl Results {
    fn note(&mut self, task: usize, tool: usize, cost: Cost) {
        self.times
            .entry((task, tool))
            .or_default()
            .push(cost.seconds);
        let peak = self.peaks.entry((task, tool)).or_default();
        *peak = (*peak).max(cost.peak_kib);
    }

    fn time(&self, task: usize, tool: usize) -> Option<f64> {
        self.times.get(&(task, tool)).cloned().map(median)
    }
}

fn one_round(
    lab: &Lab,
    tool: &dyn tools::Tool,
    number: usize,
    round: usize,
    results: &mut Results,
) {
    let store = lab.folder.join(format!("store-{number}-{round}"));
    let images: Vec<(&str, PathBuf)> = [("web01", WEB01), ("web02", WEB02), ("db01", DB01)]
        .map(|(vm, file)| (vm, lab.image(file)))
        .into();
    let web01 = lab.image(WEB01);
    lab.put(0);
    // A file that changed a moment ago may change again within its time stamp: nobody trusts it.
    let settle = || std::thread::sleep(Duration::from_secs(3));
    settle();
    tool.init(&store, &images);
    results.note(0, number, tool.backup(&store, &web01, false));
    lab::warm(&web01);
    results.note(1, number, tool.backup(&store, &web01, true));
    lab::warm(&web01);
    results.note(2, number, tool.backup(&store, &web01, false));
    let mut later = Cost::default();
    for night in 1..=NIGHTS {
        lab.put(night);
        settle();
        let cost = tool.backup(&store, &web01, false);
        match night {
            1 => results.note(3, number, cost),
            _ => {
                later.seconds += cost.seconds;
                later.peak_kib = later.peak_kib.max(cost.peak_kib);
            }
        }
    }
    results.note(4, number, later);
    lab::warm(&lab.image(WEB02));
    results.note(5, number, tool.backup(&store, &lab.image(WEB02), false));
    lab::warm(&lab.image(DB01));
    tool.backup(&store, &lab.image(DB01), false);
    results
        .sizes
        .insert(number, size_bytes(&tool.stored(&store)));
    lab::warm(&tool.stored(&store));
    let to = store.join("restored");
    let (cost, restored) = tool.restore(&store, &web01, &to);
    results.note(6, number, cost);
    run(Command::new("cmp").arg(&restored).arg(&web01));
    fs::remove_dir_all(&to).unwrap();
    lab::warm(&tool.stored(&store));
    if let Some(cost) = tool.verify(&store) {
        results.note(7, number, cost);
    }
    lab::warm(&tool.stored(&store));
    if let Some(cost) = tool.prune(&store) {
        results.note(8, number, cost);
    }
    fs::remove_dir_all(&store).unwrap();
}

fn main() {
    // `cargo test --benches` and clippy only want to see it start.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let (mut tools, missing) = tools::tools();
    for how in missing {
        eprintln!("not installed: {how}");
    }
    if let Ok(wanted) = std::env::var("VMKEEP_BENCH_PEERS") {
        let is_wanted = |name: &str| wanted.split(',').any(|word| name.contains(word));
        tools.retain(|tool| tool.name().starts_with("vmkeep") || is_wanted(&tool.name()));
    }
    let rounds = number("VMKEEP_BENCH_ROUNDS", 3) as usize;
    let base = std::env::var_os("VMKEEP_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let lab = Lab::new(&base, number("VMKEEP_BENCH_MIB", 1024));
    println!(
        "{} MiB of files in each of three ext4 images of {} MiB; medians of {rounds}.\n",
        lab.data_bytes / MIB,
        lab.disk_bytes / MIB
    );
    let mut results = Results::default();
    let mut bounds = Vec::new();
    for round in 0..rounds {
        bounds.push(lab.bounds());
        for (number, tool) in tools.iter().enumerate() {
            one_round(&lab, &**tool, number, round, &mut results);
        }
    }
    let names: Vec<String> = tools.iter().map(|tool| tool.name()).collect();
    println!("| seconds | {} |", names.join(" | "));
    println!("|---|{}", "---|".repeat(names.len()));
    for (task, title) in TASKS.iter().enumerate() {
        let own = results.time(task, 0).unwrap_or(f64::NAN);
        let cells: Vec<String> = (0..tools.len())
            .map(|number| match results.time(task, number) {
                None => "–".to_string(),
                Some(value) if number == 0 => format!("{value:.2}"),
                Some(value) => format!("{value:.2} ({:.1}×)", value / own),
            })
            .collect();
        println!("| {title} | {} |", cells.join(" | "));
    }
    let cells: Vec<String> = results
        .sizes
        .values()
        .map(|size| format!("{} MiB", size / MIB))
        .collect();
    println!(
        "| stored, three VMs and all nights | {} |",
        cells.join(" | ")
    );
    for task in [0, 6] {
        let cells: Vec<String> = (0..tools.len())
            .map(|number| {
                format!(
                    "{} MiB",
                    results.peaks.get(&(task, number)).copied().unwrap_or(0) >> 10
                )
            })
            .collect();
        println!("| peak memory, {} | {} |", TASKS[task], cells.join(" | "));
    }
    let of = |step: fn(&lab::Bounds) -> f64| median(bounds.iter().map(step).collect());
    let (read, hash, compress) = (of(|b| b.read), of(|b| b.hash), of(|b| b.compress));
    let (cipher, write) = (of(|b| b.cipher), of(|b| b.write));
    let (decompress, write_plain) = (of(|b| b.decompress), of(|b| b.write_plain));
    println!(
        "\nBounds, each step alone on all cores, {} MiB of data in chunks:\n",
        bounds[0].data_bytes / MIB
    );
    println!(
        "read {read:.2}, hash {hash:.2}, compress {compress:.2}, cipher {cipher:.2}, write {write:.2}, \
         decompress {decompress:.2}, write the image sparse {write_plain:.2} s\n"
    );
    let show = |what: &str, bound: f64, task: usize| {
        let own = results.time(task, 0).unwrap_or(f64::NAN);
        println!(
            "- {what}: {bound:.2} s; vmkeep {own:.2} s, {:.0} % of the bound",
            bound / own * 100.0
        );
    };
    let full = read + hash + compress + cipher + write;
    show(
        "first full: read + hash + compress + cipher + write",
        full,
        0,
    );
    show(
        "the same and every frame opened again",
        full + decompress + hash + cipher,
        0,
    );
    show(
        "restore: read + open + decompress + write",
        read + cipher + hash + decompress + write_plain,
        6,
    );
    show("full again: read + hash", read + hash, 1);
    fs::remove_dir_all(&lab.folder).unwrap();
}
