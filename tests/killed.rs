//! `kill -9` at random moments of a backup and of a prune, and a stop while another process works.
//! `scripts/kills` runs the same with other seeds.

use vmkeep_test_support as support;

use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use support::{
    Books, Customer, Guest, Host, HostOptions, Picture, Ran, Random, Scan, Scanner, time,
};

const KILLS: u64 = 50;
const STOPS: u64 = 10;

/// What differs from run to run where the script asks for it.
fn seed(own: u64) -> u64 {
    let given = std::env::var("VMKEEP_SEED").ok();
    let given = given.map_or(0, |text| text.parse().expect("VMKEEP_SEED is a number"));
    println!("seed {given}");
    own + given
}

fn options() -> HostOptions {
    HostOptions {
        policy: "timezone = \"UTC\"\nwindow = \"22:00-06:00\"\nmax_retention = \"7 days\"",
        customers: vec![Customer {
            name: "acme",
            own: "",
            vms: vec![("web01", vec!["vda", "vdb"])],
        }],
        ..HostOptions::default()
    }
}

struct Host1 {
    host: Host,
    disks: BTreeMap<&'static str, Guest>,
    books: Books,
    scanner: Scanner,
    random: Random,
    at: Timestamp,
    killed: usize,
}

impl Host1 {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let host = Host::new(&options());
        let disks = [("vda", 6 << 20), ("vdb", 3 << 20)]
            .map(|(disk, size)| {
                let guest = Guest::new(host.image("web01", disk), size, &mut random);
                (disk, guest)
            })
            .into();
        let at = time("2031-02-10T23:00:00Z");
        host.vmkeep(&["init", "--yes"], at).exits(0);
        let scanner = Scanner::new(host.store(), &host.identity_file());
        Host1 {
            host,
            disks,
            books: Books::default(),
            scanner,
            random,
            at,
            killed: 0,
        }
    }

    /// Runs to the end; how long it took.
    fn timed(&self, line: &[&str]) -> Duration {
        let start = Instant::now();
        self.host.vmkeep(line, self.at).exits(0);
        start.elapsed()
    }

    /// Starts, and kills after a random share of the time that it takes undisturbed. Being at a
    /// random moment is the point here, so this waits by the clock.
    ///
    /// One that had ended by then takes less: the machine is not as busy as it was.
    fn killed_somewhere(&mut self, line: &[&str], takes: &mut Duration) {
        let delay = takes.mul_f64(self.random.share());
        let running = self.host.start(line, self.at);
        std::thread::sleep(delay);
        let ran = running.kill();
        if ran.was_killed() {
            self.killed += 1;
        } else {
            ran.exits(0);
            *takes = delay;
        }
    }

    /// Everything that is listed is right, and the ledger holds, whatever a killed process left.
    fn look(&mut self) -> Scan {
        let listed = self.host.points(self.at);
        let pictures: BTreeMap<String, Picture> = self
            .disks
            .iter()
            .map(|(disk, guest)| (disk.to_string(), guest.picture()))
            .collect();
        self.books.list(&listed, |_| pictures.clone());
        let scan = self.scanner.scan();
        for id in &self.books.listed {
            let known = &self.books.points[id];
            let walked = &scan.points[id];
            assert_eq!(walked.disks.len(), known.disks.len());
            for disk in &walked.disks {
                let picture = &known.disks[&disk.name];
                assert!(
                    disk.is(picture),
                    "{id}: {} of {}",
                    disk.name,
                    known.taken_at
                );
            }
        }
        self.host.vmkeep(&["ledger", "verify"], self.at).exits(0);
        scan
    }

    /// And after a prune nothing lies about: neither record nor frame that no point explains.
    fn examine(&mut self) {
        let scan = self.look();
        self.books.compare(&scan);
        let overdue = self.books.overdue(&scan, self.at);
        assert!(overdue.is_empty(), "{overdue:#?}");
    }

    fn restore_all(&self) {
        for id in &self.books.listed {
            let known = &self.books.points[id];
            let taken_at = known.taken_at.to_string();
            let target = self.host.restore("web01", &taken_at, self.at);
            for (disk, picture) in &known.disks {
                let restored = Picture::of_file(&target.path().join(format!("{disk}.raw")));
                assert!(restored == *picture, "{disk} of {taken_at}");
            }
        }
    }

    fn work(&mut self) {
        for guest in self.disks.values_mut() {
            guest.work(20, &mut self.random);
        }
    }

    fn hours(&mut self, hours: i64) {
        self.at += SignedDuration::from_hours(hours);
    }
}

/// After a prune nothing is left that the ledger does not explain.
fn nothing_unexplained(pruned: &Ran) {
    let document = pruned.exits(0).document();
    for customer in document["customers"].as_array().unwrap() {
        assert_eq!(customer["unexplained"], serde_json::json!([]), "{customer}");
    }
}

#[test]
fn a_backup_killed_at_any_moment_leaves_a_state_that_the_next_run_cleans() {
    let mut one = Host1::new(seed(0x6b11_0001));
    let mut takes = one.timed(&["backup", "web01", "--full"]);
    one.examine();
    for number in 0..KILLS {
        one.work();
        one.hours(2);
        let line: &[&str] = match number % 3 {
            0 => &["backup", "web01", "--full"],
            _ => &["backup", "web01"],
        };
        one.killed_somewhere(line, &mut takes);
        // It was killed before its commit or after it: both are clean.
        one.look();
        if number % 5 == 4 {
            one.hours(1);
            nothing_unexplained(&one.host.vmkeep(&["--json", "prune"], one.at));
            one.examine();
            one.host.vmkeep(&["backup", "web01"], one.at).exits(0);
            one.examine();
        }
    }
    println!("{} of {KILLS} were killed under way", one.killed);
    assert!(one.killed as u64 > KILLS / 2);
    one.hours(1);
    nothing_unexplained(&one.host.vmkeep(&["--json", "prune"], one.at));
    one.examine();
    one.restore_all();
    one.host.vmkeep(&["verify", "--read-data"], one.at).exits(0);
}

#[test]
fn a_prune_killed_at_any_moment_is_gone_on_with_by_the_next() {
    let mut one = Host1::new(seed(0x6b12_0000));
    // A week of nights, so that every later prune expires, erases and rewrites something.
    for night in 0..7 {
        one.work();
        one.host
            .vmkeep(
                match night {
                    0 => &["backup", "web01", "--full"][..],
                    _ => &["backup", "web01"],
                },
                one.at,
            )
            .exits(0);
        one.examine();
        one.hours(24);
    }
    let mut takes = one.timed(&["prune"]).mul_f64(1.2);
    for number in 0..KILLS {
        one.work();
        let line: &[&str] = match number % 7 {
            0 => &["backup", "web01", "--full"],
            _ => &["backup", "web01"],
        };
        one.host.vmkeep(line, one.at).exits(0);
        one.look();
        one.killed_somewhere(&["prune"], &mut takes);
        one.look();
        if number % 2 == 1 {
            // Gone on with by the next one.
            let start = Instant::now();
            nothing_unexplained(&one.host.vmkeep(&["--json", "prune"], one.at));
            takes = takes.max(start.elapsed().mul_f64(1.2));
            one.examine();
        }
        one.hours(12);
    }
    println!("{} of {KILLS} were killed under way", one.killed);
    assert!(one.killed as u64 > KILLS / 2);
    nothing_unexplained(&one.host.vmkeep(&["--json", "prune"], one.at));
    one.examine();
    one.restore_all();
    one.host.vmkeep(&["verify", "--read-data"], one.at).exits(0);
}

/// The writer holds its session all that time: nobody takes it for dead, and the ledger decides what
/// its commit is still worth.
#[test]
fn a_writer_that_is_stopped_while_others_work_commits_soundly_or_not_at_all() {
    let mut one = Host1::new(seed(0x6b13_0000));
    let mut takes = one.timed(&["backup", "web01", "--full"]);
    one.examine();
    let (mut stopped, mut refused) = (0, 0);
    for number in 0..STOPS {
        one.work();
        one.hours(20);
        let line: &[&str] = match number % 3 {
            0 => &["backup", "web01", "--full"],
            _ => &["backup", "web01"],
        };
        let delay = takes.mul_f64(one.random.share());
        let running = one.host.start(line, one.at);
        std::thread::sleep(delay);
        running.signal("-STOP");
        // Its own clock stands still meanwhile.
        one.hours(2 + 20 * (number as i64 % 2));
        nothing_unexplained(&one.host.vmkeep(&["--json", "prune"], one.at));
        if number % 4 == 3 {
            // What the writer builds on is not the newest any more.
            let other = one.host.vmkeep(&["backup", "web01"], one.at);
            other.exits_with_one_of(&[0, 11]);
        }
        running.signal("-CONT");
        let ran = running.ended();
        match ran.code() {
            Some(0) => stopped += 1,
            _ => {
                ran.exits(1).one_error();
                refused += 1;
            }
        }
        one.look();
        one.hours(1);
        nothing_unexplained(&one.host.vmkeep(&["--json", "prune"], one.at));
        one.examine();
        takes = one.timed(&["backup", "web01"]).max(takes / 2);
        one.examine();
    }
    println!("{stopped} committed, {refused} gave up");
    one.restore_all();
    one.host.vmkeep(&["verify", "--read-data"], one.at).exits(0);
}
