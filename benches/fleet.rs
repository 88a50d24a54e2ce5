//! A fleet: how long a host with many VMs takes to decide, and a year of 200 hosts with 50 VMs each.
//!
//! `cargo bench --bench fleet`. The first part runs the program on a directory with 2 000 VMs of 300 customers; the
//! second asks the very functions that the program asks, night after night, for hosts whose backups, nights and
//! stores fail now and then, and counts bytes read per host and hour. Nothing in it is measured but the decisions.

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, ToSpan};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::Command;
use std::time::Instant;
use vmkeep::jobs::{Sizes, Work, arrange, spread_rate};
use vmkeep::model::{PointId, PointKind, PointState, VmName};
use vmkeep::policy::{
    Action, Expiry, PointFacts, Policy, PolicyTerms, Tracking, What, expiry, plan,
};

fn main() {
    // `cargo test` runs benches too, to see that they start.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    decide();
    year();
}

/// The middle of several runs.
fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn decide() {
    const CUSTOMERS: usize = 300;
    const VMS: usize = 2000;
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name);
    let mut config = format!(
        "[host]\nname = \"host1\"\nclock = \"trusted\"\nstate_dir = \"{}\"\n\
         [repository]\nurl = \"{}\"\nreserve = \"1 MiB\"\n\
         [policy]\ntimezone = \"Europe/Amsterdam\"\nwindow = \"00:00-23:59\"\n",
        at("state").display(),
        at("store").display()
    );
    for customer in 0..CUSTOMERS {
        let _ = write!(config, "[[customer]]\nid = \"customer{customer}\"\n");
        for vm in (customer..VMS).step_by(CUSTOMERS) {
            let image = at(&format!("vm{vm}.raw"));
            std::fs::write(&image, format!("{vm:04096}")).expect("an image");
            let _ = write!(
                config,
                "[[customer.vm]]\nname = \"vm{vm}\"\ndisks = {{ vda = \"{}\" }}\n",
                image.display()
            );
        }
    }
    std::fs::write(at("vmkeep.toml"), config).expect("a configuration");
    let vmkeep = |arguments: &[&str]| {
        let start = Instant::now();
        let output = Command::new(env!("CARGO_BIN_EXE_vmkeep"))
            .args(arguments)
            .env("VMKEEP_CONFIG", at("vmkeep.toml"))
            .output()
            .expect("vmkeep");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "vmkeep {arguments:?}: {text}");
        start.elapsed().as_secs_f64()
    };
    vmkeep(&["init", "--yes"]);
    let night = vmkeep(&["run"]);
    let decided = median((0..5).map(|_| vmkeep(&["run", "--dry-run"])).collect());
    let status = median((0..3).map(|_| vmkeep(&["status"])).collect());
    println!("{VMS} VMs of {CUSTOMERS} customers in a directory, each with a restore point:");
    println!("  the first night                {night:8.2} s");
    println!("  run --dry-run, median of 5     {decided:8.2} s   (asked: under 1)");
    println!("  status, median of 3            {status:8.2} s");
}

const HOSTS: usize = 200;
const VMS_OF_HOST: usize = 50;
const NIGHTS: i64 = 365;
const GIB: u64 = 1 << 30;
/// How fast one VM is read, a second.
const READ_BYTES_PER_SECOND: f64 = 300.0 * 1024.0 * 1024.0;
const VMS_AT_ONCE: usize = 2;
/// In a window from 22:00 to 06:00.
const HOURS: usize = 8;

struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }

    fn one_in(&mut self, many: u64) -> bool {
        self.below(many) == 0
    }
}

struct Guest {
    vm: VmName,
    points: Vec<PointFacts>,
    /// The night of its last full, and those in which it had no point since.
    full: Option<i64>,
    lost: usize,
    sizes: Sizes,
}

/// What a year showed.
#[derive(Default)]
struct Seen {
    /// Of all hours of all nights in which the night before had been done in full, against the host's mean.
    level: Vec<f64>,
    /// Of nights that had to catch up.
    catching_up: Vec<f64>,
    /// VMs that did not begin before the end of their window.
    left: u64,
    backups: u64,
    failed_nights: u64,
    over_maximum: u64,
    /// Nights from one full to the next, counted.
    full_ages: BTreeMap<u64, u64>,
    /// Of those over a week, the nights on which the host could do nothing, counted.
    lost_before_late: BTreeMap<usize, u64>,
}

fn year() {
    let policy = Policy::parse(&PolicyTerms {
        timezone: "Europe/Amsterdam".into(),
        ..PolicyTerms::default()
    })
    .expect("a policy");
    let zone = TimeZone::get("Europe/Amsterdam").expect("a zone");
    let start = Instant::now();
    let mut seen = Seen::default();
    for host in 0..HOSTS {
        live(host, &policy, &zone, &mut seen);
    }
    let share = |values: &mut Vec<f64>, of: f64| {
        values.sort_by(f64::total_cmp);
        let at = ((values.len() as f64 - 1.0) * of) as usize;
        values.get(at).copied().unwrap_or(0.0)
    };
    println!(
        "\n{HOSTS} hosts with {VMS_OF_HOST} VMs each, {NIGHTS} nights ({:.0} s):",
        start.elapsed().as_secs_f64()
    );
    println!(
        "  backups {}, left at the window's end {}",
        seen.backups, seen.left
    );
    println!(
        "  nights of VMs without a point because something failed: {}",
        seen.failed_nights
    );
    println!("  points over their maximum: {}", seen.over_maximum);
    println!("  nights from one full to the next: {:?}", seen.full_ages);
    println!(
        "  fulls over a week after the last, by the nights in which that VM had no backup: {:?}",
        seen.lost_before_late
    );
    println!("  bytes read in an hour of a host against its mean (asked: at most 1.5):");
    for (what, values) in [
        ("after a whole night", &mut seen.level),
        ("after one that failed", &mut seen.catching_up),
    ] {
        println!(
            "    {what:22} median {:.2}, 99 % {:.2}, largest {:.2} of {} hours",
            share(values, 0.5),
            share(values, 0.99),
            share(values, 1.0),
            values.len()
        );
    }
}

fn live(host: usize, policy: &Policy, zone: &TimeZone, seen: &mut Seen) {
    let mut dice =
        Dice(0x9e37_79b9_7f4a_7c15 ^ (host as u64 + 1).wrapping_mul(0x2545_f491_4f6c_dd1d));
    let mut guests: Vec<Guest> = (0..VMS_OF_HOST)
        .map(|number| {
            // Most are small, some are not: 20 to 400 GiB.
            let size = 20 + dice.below(60) + dice.below(8) / 7 * dice.below(320);
            Guest {
                vm: VmName::new(&format!("vm{number}")).expect("a name"),
                points: Vec::new(),
                full: None,
                lost: 0,
                sizes: Sizes {
                    disks_bytes: size * GIB,
                    stored_bytes: size * GIB / 100,
                },
            }
        })
        .collect();
    let first: Date = "2031-01-06".parse().expect("a date");
    let mut hours_of_nights: Vec<(bool, [u64; HOURS])> = Vec::new();
    let mut was_whole = false;
    for night in 0..NIGHTS {
        let opens = (first + night.days())
            .at(22, 0, 0, 0)
            .to_zoned(zone.clone())
            .expect("a time");
        let opens = opens.timestamp();
        // The host is off in one night of two hundred, the store in one of three hundred.
        if dice.one_in(200) || dice.one_in(300) {
            seen.failed_nights += VMS_OF_HOST as u64;
            guests.iter_mut().for_each(|guest| guest.lost += 1);
            was_whole = false;
            continue;
        }
        let now = opens + SignedDuration::from_secs(dice.below(1200) as i64);
        let mut works: Vec<Work> = guests
            .iter()
            .map(|guest| {
                Work::new(
                    0,
                    &guest.vm,
                    policy,
                    &guest.points,
                    Tracking::Trusted,
                    guest.sizes,
                    now,
                )
            })
            .collect();
        arrange(&mut works, now, true);
        let rate = spread_rate(&works);
        let mut hours = [0_u64; HOURS];
        let mut free_at = [now; VMS_AT_ONCE];
        let mut whole = true;
        for work in works.iter().filter(|work| work.is_due()) {
            let worker = (0..VMS_AT_ONCE).min_by_key(|at| free_at[*at]).expect("one");
            let begins = free_at[worker].max(work.starts_at.unwrap_or(now));
            if work.until.is_some_and(|until| begins >= until) {
                seen.left += 1;
                whole = false;
                continue;
            }
            let guest = guests
                .iter_mut()
                .find(|guest| guest.vm == work.vm)
                .expect("it is there");
            let (kind, bytes) = match work.due.what {
                What::Full => (PointKind::Full, guest.sizes.disks_bytes),
                _ => (PointKind::Incremental, guest.sizes.stored_bytes * 2),
            };
            // Each of those at once has its share of the night's rate, as long as that holds.
            let rate = rate.filter(|rate| begins < rate.until);
            let rate = rate.map_or(f64::MAX, |rate| rate.bytes_per_second as f64);
            let seconds = bytes as f64 / READ_BYTES_PER_SECOND.min(rate);
            let ends = begins + SignedDuration::from_secs_f64(seconds);
            read_in(&mut hours, opens, begins, seconds, bytes);
            free_at[worker] = ends;
            seen.backups += 1;
            if dice.one_in(300) {
                seen.failed_nights += 1;
                guest.lost += 1;
                whole = false;
                continue;
            }
            if kind == PointKind::Full {
                if let Some(last) = guest.full.replace(night) {
                    let age = u64::try_from(night - last).expect("later");
                    *seen.full_ages.entry(age).or_default() += 1;
                    if age > 7 {
                        *seen.lost_before_late.entry(guest.lost).or_default() += 1;
                    }
                }
                guest.lost = 0;
            }
            let Expiry {
                expires_at,
                deadline,
            } = expiry(policy, begins);
            let mut id = [0; 16];
            id[..8].copy_from_slice(&dice.below(u64::MAX).to_be_bytes());
            id[8..].copy_from_slice(&seen.backups.to_be_bytes());
            guest.points.push(PointFacts {
                point: PointId::from_bytes(id),
                vm: guest.vm.clone(),
                kind,
                taken_at: begins,
                expires_at,
                deadline,
                state: PointState::Live,
                expired_at: None,
                clock_alone: false,
                witnessed_since: Some(begins),
                silence: SignedDuration::ZERO,
                suspect: false,
                void: false,
                held: false,
            });
        }
        let ends = opens + SignedDuration::from_hours(8);
        for guest in &mut guests {
            prune(guest, policy, ends);
            seen.over_maximum += guest
                .points
                .iter()
                .filter(|point| point.deadline <= ends)
                .count() as u64;
        }
        // What takes a week to settle is not looked at.
        if night >= 21 {
            hours_of_nights.push((was_whole && whole, hours));
        }
        was_whole = whole;
    }
    let hours: Vec<u64> = hours_of_nights
        .iter()
        .flat_map(|(_, hours)| *hours)
        .collect();
    let mean = hours.iter().sum::<u64>() as f64 / hours.len() as f64;
    for (was_whole, hours) in hours_of_nights {
        let values = match was_whole {
            true => &mut seen.level,
            false => &mut seen.catching_up,
        };
        values.extend(hours.map(|bytes| bytes as f64 / mean));
    }
}

/// Spreads what was read over the hours in which it was.
fn read_in(
    hours: &mut [u64; HOURS],
    opens: Timestamp,
    begins: Timestamp,
    seconds: f64,
    bytes: u64,
) {
    let from = begins.duration_since(opens).as_secs_f64() / 3600.0;
    let to = from + seconds / 3600.0;
    for (at, hour) in hours.iter_mut().enumerate() {
        let inside = (to.min(at as f64 + 1.0) - from.max(at as f64)).max(0.0);
        *hour += (bytes as f64 * inside / (to - from)) as u64;
    }
}

fn prune(guest: &mut Guest, policy: &Policy, now: Timestamp) {
    for decision in plan(&guest.points, policy, now) {
        let point = guest
            .points
            .iter_mut()
            .find(|point| point.point == decision.point);
        let point = point.expect("it is there");
        match decision.action {
            Action::Expire => {
                point.state = PointState::Expired;
                point.expired_at = Some(now);
            }
            Action::Erase => point.state = PointState::Erased,
            _ => {}
        }
    }
    guest
        .points
        .retain(|point| point.state != PointState::Erased);
}
