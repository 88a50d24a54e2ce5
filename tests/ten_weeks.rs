//! Ten weeks of a small company, night after night, through the program itself.
//!
//! The dates lie far ahead of the real time: to vmkeep the images are then old enough for their
//! marks to be kept, so that a disk nobody wrote to is not read again. (`erasure.rs` uses dates
//! of the past, where no mark can be trusted and everything is read.)
//!
//! In a directory; with `VMKEEP_TEN_WEEKS=bucket`, as `scripts/servers` has it, in a bucket, which takes minutes.

use vmkeep_test_support as support;

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, ToSpan};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use support::s3::{Bucket, server};
use support::{
    Books, Customer, Guest, Host, HostOptions, Known, Picture, Random, Scan, Scanner, path_text,
    tool,
};
use vmkeep::codec::minisign::public_key_line;
use vmkeep::format::certificate::Certificate;
use vmkeep::model::{PointId, Tag};

const NIGHTS: usize = 70;
/// The host is off from the evening to the next one.
const MISSED: usize = 17;
/// One disk of db01 is not there in the night, and is in the morning.
const NO_IMAGE: usize = 24;
const RESTORE_WINDOW: usize = 14;
/// Of globex: 7 days, less a day to erase and a night of jitter.
const SHORT_WINDOW: usize = 5;
/// Every point that is listed is restored through the program in these nights.
const RESTORE_ALL: [usize; 3] = [16, 45, 69];

type Guests = BTreeMap<(&'static str, &'static str), Guest>;

const PREFIX: &str = "vmkeep";

struct Company {
    /// Where the store is, if not in the folder.
    bucket: Option<Bucket>,
    host: Host,
    zone: TimeZone,
    random: Random,
    guests: Guests,
    books: Books,
    scanner: Scanner,
    /// When the run of each night starts.
    runs: Vec<Timestamp>,
    /// Nights that got a point, by `customer/vm`.
    covered: BTreeMap<String, BTreeMap<usize, PointId>>,
    tags: HashMap<PointId, HashSet<Tag>>,
    certificates: BTreeSet<String>,
    destroyed: BTreeSet<PointId>,
}

/// Which of the two this is, is said.
fn place() -> Option<Bucket> {
    match std::env::var("VMKEEP_TEN_WEEKS").as_deref() {
        Err(_) | Ok("directory") => {
            println!("in a directory");
            None
        }
        Ok("bucket") => {
            println!("in a bucket of {:?}", server().kind);
            Some(server().bucket())
        }
        Ok(other) => panic!("VMKEEP_TEN_WEEKS={other}: directory or bucket"),
    }
}

fn options(bucket: Option<&Bucket>) -> HostOptions {
    HostOptions {
        bucket: bucket.map(|bucket| bucket.config(PREFIX)),
        policy: "timezone = \"Europe/Amsterdam\"\n\
                 window = \"22:00-06:00\"\n\
                 restore_window = \"14 days\"\n\
                 max_retention = \"2 months\"",
        customers: vec![
            Customer {
                name: "acme",
                own: "",
                vms: vec![("web01", vec!["vda"]), ("db01", vec!["vda", "vdb"])],
            },
            Customer {
                name: "globex",
                own: "max_retention = \"7 days\"",
                vms: vec![("shop", vec!["vda"])],
            },
        ],
        ..HostOptions::default()
    }
}

impl Company {
    fn new(bucket: Option<Bucket>) -> Self {
        let zone = TimeZone::get("Europe/Amsterdam").unwrap();
        let mut random = Random::new(0x7e17_4ee6);
        let host = Host::new(&options(bucket.as_ref()));
        let first_night: Date = "2031-02-10".parse().unwrap();
        let runs: Vec<Timestamp> = (0..NIGHTS)
            .map(|night| {
                let window = (first_night + (night as i64).days())
                    .at(22, 0, 0, 0)
                    .to_zoned(zone.clone())
                    .unwrap()
                    .timestamp();
                window + SignedDuration::from_mins(random.below(7 * 60 + 50) as i64)
            })
            .collect();
        let mut guests = Guests::new();
        for (vm, disk, size) in [
            ("web01", "vda", 8 << 20),
            ("db01", "vda", 4 << 20),
            ("db01", "vdb", 6 << 20),
            // Neither chunks nor MiB: the last chunk is short.
            ("shop", "vda", (5 << 20) + 12 * 4096),
        ] {
            let guest = Guest::new(host.image(vm, disk), size, &mut random);
            guests.insert((vm, disk), guest);
        }
        // All three VMs have the same installation: shared within acme, never with globex.
        let installation = random.prose(1 << 20);
        for guest in guests.values_mut() {
            guest.write(1 << 20, &installation);
        }
        let start = runs[0] - SignedDuration::from_hours(36);
        host.vmkeep(&["config", "check"], start).exits(0);
        host.vmkeep(&["init", "--yes"], start).exits(0);
        let scanner = Scanner::new(host.store(), &host.identity_file());
        Company {
            bucket,
            host,
            zone,
            random,
            guests,
            books: Books::default(),
            scanner,
            runs,
            covered: BTreeMap::new(),
            tags: HashMap::new(),
            certificates: BTreeSet::new(),
            destroyed: BTreeSet::new(),
        }
    }

    fn pictures(&self, vm: &str) -> BTreeMap<String, Picture> {
        let vm = vm.split_once('/').map_or(vm, |(_, vm)| vm);
        self.guests
            .iter()
            .filter(|((of, _), _)| *of == vm)
            .map(|((_, disk), guest)| (disk.to_string(), guest.picture()))
            .collect()
    }

    /// What the guests do during the day before a night.
    fn day(&mut self, night: usize) {
        for ((vm, disk), guest) in &mut self.guests {
            if self.random.chance(70) {
                guest.work(10, &mut self.random);
            }
            let grown = guest.content().len() as u64 + (1 << 20) + 4096;
            match (*vm, *disk, night) {
                ("web01", "vda", 20) | ("db01", "vdb", 33) | ("shop", "vda", 41) => {
                    guest.resize(grown);
                    let end = grown as usize - 4096;
                    guest.write(end, &self.random.noise(4096));
                }
                _ => {}
            }
        }
    }

    fn list(&mut self, at: Timestamp, night: usize) {
        let listed = self.host.points(at);
        let pictures: BTreeMap<String, _> = ["acme/web01", "acme/db01", "globex/shop"]
            .map(|vm| (vm.to_string(), self.pictures(vm)))
            .into();
        let new = self.books.list(&listed, |vm| pictures[vm].clone());
        for id in new {
            let known = &self.books.points[&id];
            let nights = self
                .covered
                .entry(format!("{}/{}", known.customer, known.vm))
                .or_default();
            let before = nights.insert(night, id);
            assert_eq!(before, None, "two points of {} in night {night}", known.vm);
        }
        for id in &self.books.listed {
            let known = &self.books.points[id];
            assert!(known.expires_at > at, "{id} is listed after it expired");
            assert!(known.expires_at <= known.deadline);
            let maximum = match known.customer.as_str() {
                "acme" => 2.months(),
                _ => 7.days(),
            };
            let latest = known.taken_at.to_zoned(self.zone.clone()) + maximum;
            assert!(known.deadline <= latest.timestamp(), "{id}: {known:?}");
        }
    }

    /// Two weeks back: every night of the window that was owed has its point.
    fn every_night_is_there(&self, night: usize) {
        for (vm, nights) in &self.covered {
            let window = match vm.starts_with("acme") {
                true => RESTORE_WINDOW,
                false => SHORT_WINDOW,
            };
            for back in 0..=window.min(night) {
                let then = night - back;
                if then == MISSED {
                    continue;
                }
                let point = nights
                    .get(&then)
                    .unwrap_or_else(|| panic!("{vm} has no point of night {then}"));
                assert!(
                    self.books.listed.contains(point),
                    "{vm}: the point of night {then} is not listed in night {night}"
                );
            }
        }
    }

    /// By hash, for all points; by the tools, for the certificates; and nothing that is overdue
    /// before the next run comes.
    fn scan(&mut self, night: usize, next_run: Timestamp) -> Scan {
        if let Some(bucket) = &self.bucket {
            bucket.mirror(PREFIX, self.host.store());
        }
        let scan = self.scanner.scan();
        self.books.compare(&scan);
        for (id, walked) in &scan.points {
            self.tags.insert(*id, walked.tags.clone());
        }
        let overdue = self.books.overdue(&scan, next_run);
        assert!(
            overdue.is_empty(),
            "night {night} ({}), next run {next_run}: {} overdue: {:#?}",
            self.runs[night],
            overdue.len(),
            overdue.iter().take(5).collect::<Vec<_>>()
        );
        self.customers_share_nothing(&scan);
        scan
    }

    fn customers_share_nothing(&self, scan: &Scan) {
        let tags_of = |customer: &str| -> HashSet<Tag> {
            scan.points
                .values()
                .filter(|point| point.customer == customer)
                .flat_map(|point| point.tags.iter().copied())
                .collect()
        };
        assert!(tags_of("acme").is_disjoint(&tags_of("globex")));
    }

    fn restore(&self, id: &PointId, at: Timestamp) {
        let Known {
            customer,
            vm,
            taken_at,
            disks,
            ..
        } = &self.books.points[id];
        let target = self
            .host
            .restore(&format!("{customer}/{vm}"), &taken_at.to_string(), at);
        for (disk, picture) in disks {
            let restored = Picture::of_file(&target.path().join(format!("{disk}.raw")));
            assert!(restored == *picture, "{vm} {disk} of {taken_at} differs");
        }
    }

    fn restore_some(&mut self, night: usize, at: Timestamp) {
        let listed: Vec<PointId> = self.books.listed.iter().copied().collect();
        if RESTORE_ALL.contains(&night) {
            for id in &listed {
                self.restore(id, at);
            }
            return;
        }
        let by_age = |id: &&PointId| self.books.points[*id].taken_at;
        let mut chosen = vec![*listed.iter().min_by_key(by_age).unwrap()];
        chosen.extend(self.random.pick(&listed));
        for id in chosen {
            self.restore(&id, at);
        }
    }

    /// A date from before everything that is left is refused, and the answer names what is there.
    fn too_old_is_refused(&self, at: Timestamp) {
        let oldest = |vm: &str| {
            let listed = self.books.listed.iter();
            let mine = listed.map(|id| &self.books.points[id]);
            mine.filter(|known| known.vm == vm)
                .map(|known| known.taken_at)
                .min()
                .unwrap()
        };
        for vm in ["web01", "shop"] {
            let oldest = oldest(vm);
            let before = oldest - SignedDuration::from_secs(1);
            let to = self.host.path("refused");
            let line = [
                "restore",
                vm,
                "--at",
                &before.to_string(),
                "--to",
                path_text(&to),
            ];
            let day = oldest.to_zoned(self.zone.clone()).date().to_string();
            let refused = self.host.vmkeep(&line, at);
            refused.exits(1).one_error();
            assert!(
                [&day, &oldest.strftime("%Y-%m-%d").to_string()]
                    .iter()
                    .any(|day| refused.stderr.contains(*day)),
                "the nearest point ({oldest}) is not named\n{refused}"
            );
            assert!(!to.join("vda.raw").exists());
        }
    }

    /// Certificates are verified with the public tool, and what they call destroyed is.
    fn certificates(&mut self, scan: &Scan) {
        let key = public_key_line(&self.scanner.identity().host_id());
        for customer in ["acme", "globex"] {
            let folder = self.host.customer_folder(customer).join("certificates");
            let Ok(entries) = fs::read_dir(&folder) else {
                continue;
            };
            for path in entries.map(|entry| entry.unwrap().path()) {
                let name = path.display().to_string();
                if path.extension().is_none_or(|extension| extension != "json")
                    || !self.certificates.insert(name)
                {
                    continue;
                }
                let said = tool("minisign", &["-Vm", path_text(&path), "-P", &key]);
                assert!(
                    said.contains("Signature and comment signature verified"),
                    "{said}"
                );
                let certificate = Certificate::parse(&fs::read(&path).unwrap()).unwrap();
                assert_eq!(certificate.customer, customer);
                for point in certificate.erased.iter().chain(&certificate.destroyed) {
                    assert!(!scan.points.contains_key(&point.point), "{}", point.point);
                    assert_eq!(self.books.points[&point.point].deadline, point.deadline);
                }
                let destroyed = certificate.destroyed.iter().map(|point| point.point);
                self.destroyed.extend(destroyed);
            }
        }
        // What only a destroyed point reached is not there, not even sealed.
        let live = scan.reachable_tags();
        let present: HashSet<&Tag> = scan.tags().filter(|tag| !live.contains(tag)).collect();
        for id in &self.destroyed {
            let left: Vec<&Tag> = self.tags[id]
                .iter()
                .filter(|tag| present.contains(tag))
                .filter(|tag| {
                    // Reached again later, by a point whose time is not over.
                    let others = self.tags.iter().filter(|(other, _)| *other != id);
                    !others
                        .filter(|(other, _)| !self.destroyed.contains(*other))
                        .any(|(_, tags)| tags.contains(*tag))
                })
                .collect();
            assert!(left.is_empty(), "{id} is certified as destroyed: {left:?}");
        }
    }
}

/// Old points are one a week.
fn thinned(company: &Company, at: Timestamp) {
    let mut weeks: BTreeMap<(String, i16, i8), usize> = BTreeMap::new();
    for id in &company.books.listed {
        let known = &company.books.points[id];
        let age = at.duration_since(known.taken_at);
        if age > SignedDuration::from_hours(24 * (14 + 2 + 7 + 1)) {
            // A night belongs to the day on which its window begins.
            let night = known.taken_at.to_zoned(company.zone.clone()) - 12.hours();
            let week = night.date().iso_week_date();
            let key = (known.vm.clone(), week.year(), week.week());
            *weeks.entry(key).or_default() += 1;
        }
    }
    for (week, count) in weeks {
        assert_eq!(count, 1, "{week:?}");
    }
}

#[test]
fn ten_weeks_keep_every_promise() {
    let mut company = Company::new(place());
    println!("night  run                   points  store KiB  live KiB  dead frames");
    let mut largest = 0;
    for night in 0..NIGHTS {
        company.day(night);
        if night == MISSED {
            continue;
        }
        let run = company.runs[night];
        let mut at = run;
        match night {
            NO_IMAGE => {
                company.guests[&("db01", "vdb")].away();
                let ran = company.host.vmkeep(&["run"], run);
                ran.exits(3).says("db01");
                let listed = company.host.points(run);
                let tonight = |point: &&Value| {
                    let taken_at: Timestamp = point["taken_at"].as_str().unwrap().parse().unwrap();
                    taken_at >= run
                };
                let mut done: Vec<&str> = listed
                    .iter()
                    .filter(tonight)
                    .map(|point| point["vm"].as_str().unwrap())
                    .collect();
                done.sort_unstable();
                assert_eq!(done, ["shop", "web01"], "the other VMs are done");
                company.guests[&("db01", "vdb")].back();
                at = run + SignedDuration::from_mins(9 * 60);
                company.host.vmkeep(&["run"], at).exits(0);
            }
            _ => {
                company.host.vmkeep(&["run"], run).exits(0);
            }
        }
        at += SignedDuration::from_mins(3);
        company.list(at, night);
        company.every_night_is_there(night);
        // The promise holds at every moment until the next run, unless that one is missed.
        let next_run = match company.runs.get(night + 1) {
            Some(next) if night + 1 != MISSED => *next,
            _ => at,
        };
        let scan = company.scan(night, next_run);
        let live = scan.reachable_tags();
        let live_bytes: usize = scan.sealed(&live).iter().map(Vec::len).sum();
        let (dead, _) = company.books.dead(&scan);
        println!(
            "{night:>5}  {run}  {:>6}  {:>9}  {:>8}  {dead:>6}",
            company.books.listed.len(),
            scan.size_bytes() >> 10,
            live_bytes >> 10,
        );
        largest = largest.max(scan.size_bytes());
        // Sealed data may be dead for as long as half of a pack lives; then there are ledger,
        // index, and the certificates.
        let bound = 2 * live_bytes as u64 + (6 << 20);
        assert!(scan.size_bytes() <= bound, "night {night}: the store grows");
        at += SignedDuration::from_mins(3);
        company.restore_some(night, at);
        if night % 9 == 8 {
            company.too_old_is_refused(at);
            company.certificates(&scan);
        }
        thinned(&company, at);
        // A hole in the window stays loud until it has left the window.
        let hole = night > MISSED && night <= MISSED + RESTORE_WINDOW;
        let status = company.host.vmkeep(&["status"], at);
        match hole {
            true => status.exits(4),
            false => status.exits_with_one_of(&[0, 4]),
        };
        if !hole && !(MISSED..=MISSED + RESTORE_WINDOW + 2).contains(&night) {
            status.exits(0);
        }
    }
    let last = company.runs[NIGHTS - 1] + SignedDuration::from_hours(1);
    let scan = company.scan(NIGHTS - 1, last);
    company.certificates(&scan);
    assert!(
        company.certificates.len() >= 10,
        "{:?}",
        company.certificates
    );
    assert!(!company.destroyed.is_empty());
    let first = &company.covered["acme/web01"][&0];
    assert!(
        company.books.points[first].deadline < last,
        "the maximum was reached"
    );
    assert!(
        company.destroyed.contains(first),
        "and the first night is gone for good"
    );
    println!(
        "largest: {} KiB, {} certificates",
        largest >> 10,
        company.certificates.len()
    );
    company.host.vmkeep(&["ledger", "verify"], last).exits(0);
    let verified = company.host.vmkeep(&["verify", "--read-data"], last);
    verified.exits(0);
    // A certificate whose content was changed does not pass.
    let certificate = company.certificates.first().unwrap().clone();
    let changed = fs::read_to_string(&certificate)
        .unwrap()
        .replace("acme", "acne");
    let copy = company.host.path("changed.json");
    fs::write(&copy, changed).unwrap();
    fs::copy(
        format!("{certificate}.minisig"),
        company.host.path("changed.json.minisig"),
    )
    .unwrap();
    let key = public_key_line(&company.scanner.identity().host_id());
    let refused = std::process::Command::new("minisign")
        .args(["-Vm", path_text(&copy), "-P", &key])
        .output()
        .unwrap();
    assert!(!refused.status.success());
}
