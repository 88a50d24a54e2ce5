use crate::model::{BootMark, Clock, ClockReading};
use crate::tool;
use jiff::Timestamp;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The clock of this host.
///
/// Whether the kernel calls its clock synchronised is asked of the programs that may ask it:
/// `adjtimex` has no wrapper that is safe, maintained and can read. The answer holds a minute.
#[derive(Default)]
pub struct SystemClock {
    synchronised: Mutex<Option<(Instant, bool)>>,
}

const ANSWER_HOLDS: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(3);
const MAX_SAID_BYTES: u64 = 4096;
/// systemd-timesyncd touches this file whenever it has set the clock, every 34 minutes at least.
const TIMESYNCD_MARK: &str = "/run/systemd/timesync/synchronized";
const TIMESYNCD_MARK_HOLDS: Duration = Duration::from_secs(4 * 3600);

impl Clock for SystemClock {
    fn read(&self) -> ClockReading {
        ClockReading {
            wall: wall(),
            synchronised: self.synchronised(),
            boot: boot(),
        }
    }
}

impl SystemClock {
    /// The wall clock alone, for what happens by the time of day.
    pub fn wall() -> Timestamp {
        wall()
    }

    fn synchronised(&self) -> bool {
        let mut answer = match self.synchronised.lock() {
            Ok(answer) => answer,
            Err(poisoned) => poisoned.into_inner(),
        };
        match *answer {
            Some((asked, synchronised)) if asked.elapsed() < ANSWER_HOLDS => synchronised,
            _ => {
                let synchronised = ask_kernel();
                *answer = Some((Instant::now(), synchronised));
                synchronised
            }
        }
    }
}

fn wall() -> Timestamp {
    let seconds = match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_secs()).map_or(i64::MIN, |s| -s),
    };
    Timestamp::from_second(seconds).unwrap_or(match seconds < 0 {
        true => Timestamp::MIN,
        false => Timestamp::MAX,
    })
}

/// The kernel's own words, which a faked wall clock does not touch.
fn boot() -> Option<BootMark> {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    Some(BootMark {
        boot_id: boot_id.trim().to_string(),
        since_boot_seconds: parse_uptime(&uptime)?,
    })
}

fn parse_uptime(text: &str) -> Option<u64> {
    let (seconds, _) = text.split_once('.')?;
    seconds.trim().parse().ok()
}

/// Any one that says yes is enough; they all repeat what the kernel or its NTP daemon knows.
fn ask_kernel() -> bool {
    timesyncd_mark_is_fresh()
        || output_of(
            "/usr/bin/timedatectl",
            &["show", "--property=NTPSynchronized", "--value"],
        )
        .is_some_and(|text| text.trim() == "yes")
        || output_of("/usr/bin/chronyc", &["-c", "-n", "tracking"])
            .is_some_and(|text| chrony_is_synchronised(&text))
}

fn timesyncd_mark_is_fresh() -> bool {
    Path::new(TIMESYNCD_MARK)
        .metadata()
        .and_then(|metadata| metadata.modified())
        .ok()
        .and_then(|touched| SystemTime::now().duration_since(touched).ok())
        .is_some_and(|age| age < TIMESYNCD_MARK_HOLDS)
}

/// The last field of `chronyc -c tracking` is the leap status.
fn chrony_is_synchronised(text: &str) -> bool {
    matches!(
        text.trim().rsplit(',').next(),
        Some("Normal" | "Insert second" | "Delete second")
    )
}

/// What a program prints, if it ends well and in time. One that hangs (no D-Bus, for one) is no answer.
fn output_of(program: &str, arguments: &[&str]) -> Option<String> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let output = tool::run(&mut command, PATIENCE, MAX_SAID_BYTES).ok()?;
    match output.status.success() {
        true => String::from_utf8(output.stdout).ok(),
        false => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_has_whole_seconds_and_knows_this_boot() {
        let clock = SystemClock::default();
        let reading = clock.read();
        assert_eq!(reading.wall.subsec_nanosecond(), 0);
        let boot = reading.boot.expect("a boot mark on Linux");
        assert_eq!(boot.boot_id.len(), 36);
        assert!(boot.since_boot_seconds > 0);
    }

    #[test]
    fn uptime_is_read_up_to_its_dot() {
        assert_eq!(parse_uptime("350735.47 234388.90\n"), Some(350735));
        assert_eq!(parse_uptime("nothing"), None);
    }

    #[test]
    fn chrony_is_believed_only_when_it_is_synchronised() {
        let synchronised = "A29FC87B,162.159.200.123,4,1795297364.1,0.0,0.0,0.0,-8.2,0.0,0.1,0.01,0.001,64.2,Normal\n";
        let lost = "7F7F0101,,0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,1.0,1.0,0.0,Not synchronised\n";
        assert!(chrony_is_synchronised(synchronised));
        assert!(!chrony_is_synchronised(lost));
        assert!(!chrony_is_synchronised(""));
    }

    #[test]
    fn a_program_that_is_missing_or_fails_is_no_answer() {
        assert_eq!(output_of("/nonexistent", &[]), None);
        assert_eq!(output_of("/bin/false", &[]), None);
        assert_eq!(output_of("/bin/echo", &["yes"]).as_deref(), Some("yes\n"));
    }
}
