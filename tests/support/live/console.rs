use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use super::monitor::connect;
use super::wait::{LIMIT, wait_until};

/// The serial console of a guest: a socket that takes lines, and the file with all it has said.
/// Whoever starts the VM (QEMU itself or libvirt) has to provide both.
#[derive(Debug)]
pub struct Console {
    log: PathBuf,
    stream: Mutex<UnixStream>,
    start: usize,
}

/// What the guest measured of its own writes (4 KiB, each until it is safe).
#[derive(Debug, Clone, Copy)]
pub struct Latency {
    pub count: u64,
    pub p50_us: u64,
    pub p99_us: u64,
    pub max_us: u64,
}

impl Console {
    /// `start`: where in the log this run of the VM begins.
    #[track_caller]
    pub fn connect(socket: &Path, log: &Path, start: usize) -> Console {
        let stream = connect(socket);
        let mut drained = stream.try_clone().unwrap();
        // A guest whose console nobody reads would stand still sooner or later.
        thread::spawn(move || {
            let mut ignored = [0; 4096];
            while drained.read(&mut ignored).is_ok_and(|length| length > 0) {}
        });
        Console {
            log: log.to_owned(),
            stream: Mutex::new(stream),
            start,
        }
    }

    /// A place in the log, for what is to be waited for after it.
    pub fn mark(&self) -> usize {
        fs::metadata(&self.log).map_or(0, |log| log.len() as usize)
    }

    /// What has been said since a mark, in whole lines.
    pub fn said_since(&self, mark: usize) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let said = log.get(mark..).unwrap_or_default();
        let whole = said.iter().rposition(|byte| *byte == b'\n');
        let said = &said[..whole.map_or(0, |end| end + 1)];
        String::from_utf8_lossy(said).replace('\r', "")
    }

    /// The last lines of the log, for messages.
    pub fn tail(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let tail = &log[log.len().saturating_sub(1500)..];
        format!("the console's end:\n{}", String::from_utf8_lossy(tail))
    }

    /// What was sent is not echoed: only the guest's own words are in the log.
    #[track_caller]
    pub fn send(&self, line: &str) {
        let sent = self
            .stream
            .lock()
            .unwrap()
            .write_all(format!("{line}\n").as_bytes());
        sent.unwrap_or_else(|error| panic!("console, {line:?}: {error}\n{}", self.tail()));
    }

    /// The first line after the mark that begins with the words.
    #[track_caller]
    pub fn wait_line(&self, begins_with: &str, mark: usize, limit: Duration) -> String {
        wait_until(
            begins_with,
            limit,
            || {
                let said = self.said_since(mark);
                assert!(!said.contains("Kernel panic"), "{}", self.tail());
                said.lines()
                    .find(|line| line.starts_with(begins_with))
                    .map(str::to_owned)
            },
            || self.tail(),
        )
    }

    /// Runs a line in the guest's shell: its exit code and what it printed.
    #[track_caller]
    pub fn shell(&self, line: &str) -> (i32, String) {
        let mark = self.mark();
        self.send(line);
        let code = self.wait_line("RC ", mark, LIMIT);
        let code = code["RC ".len()..].trim().parse().unwrap();
        let said = self.said_since(mark);
        let own = said.lines().take_while(|line| !line.starts_with("RC "));
        // The writer speaks at the same time.
        let own: Vec<_> = own.filter(|line| !line.starts_with("SEQ ")).collect();
        (code, own.join("\n"))
    }

    /// The last record that the writer has told of in this run of the VM.
    pub fn last_told(&self) -> Option<u64> {
        self.said_since(self.start).lines().rev().find_map(|line| {
            let number = |text: &str| text.trim().parse::<u64>().ok();
            let first = || number(line.strip_prefix("WRITER from ")?)?.checked_sub(1);
            line.strip_prefix("SEQ ").and_then(number).or_else(first)
        })
    }

    /// Waits until the writer has told of so many more records than now; the last one.
    #[track_caller]
    pub fn wait_for_progress(&self, records: u64) -> u64 {
        let first = wait_until("a record", LIMIT, || self.last_told(), || self.tail());
        wait_until(
            "progress of the writer",
            LIMIT,
            || self.last_told().filter(|told| *told >= first + records),
            || format!("{first} + {records}, {}", self.tail()),
        )
    }

    /// Stops the writer; all files end with the record that is returned.
    #[track_caller]
    pub fn stop_writer(&self) -> u64 {
        let mark = self.mark();
        self.send("stopw");
        self.wait_line("STOPPED", mark, LIMIT);
        self.last_told().unwrap_or(0)
    }

    #[track_caller]
    pub fn start_writer(&self) {
        let mark = self.mark();
        self.send("startw");
        self.wait_line("STARTED", mark, LIMIT);
    }

    /// Begins to measure, and returns the mark that `latency_since` wants. The console does
    /// nothing else meanwhile.
    #[track_caller]
    pub fn begin_latency(&self, count: u64) -> usize {
        let mark = self.mark();
        self.send(&format!("latency {count}"));
        mark
    }

    #[track_caller]
    pub fn latency_since(&self, mark: usize) -> Latency {
        let line = self.wait_line("LATENCY ", mark, 2 * LIMIT);
        let value = |key: &str| {
            line.split(' ')
                .find_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
                .unwrap_or_else(|| panic!("no {key} in {line:?}"))
        };
        Latency {
            count: value("count"),
            p50_us: value("p50"),
            p99_us: value("p99"),
            max_us: value("max"),
        }
    }
}
