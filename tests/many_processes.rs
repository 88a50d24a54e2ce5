//! Six processes at once on one repository: backups of different VMs, prunes, and restores between.

use vmkeep_test_support as support;

use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeMap;
use support::{Books, Customer, Guest, Host, HostOptions, Picture, Random, Scanner, time};

const ROUNDS: i64 = 20;
const VMS: [&str; 4] = ["web01", "web02", "db01", "mail01"];

fn options() -> HostOptions {
    HostOptions {
        // Seven days: points expire, are erased, and their packs reclaimed within the rounds.
        policy: "timezone = \"UTC\"\nwindow = \"22:00-06:00\"\nmax_retention = \"7 days\"",
        customers: vec![Customer {
            name: "acme",
            own: "",
            vms: VMS.map(|vm| (vm, vec!["vda"])).to_vec(),
        }],
        ..HostOptions::default()
    }
}

struct Rounds {
    host: Host,
    guests: BTreeMap<&'static str, Guest>,
    books: Books,
    random: Random,
}

impl Rounds {
    fn new() -> Self {
        let mut random = Random::new(0x51c5_0ace);
        let host = Host::new(&options());
        let shared = random.noise(1 << 20);
        let mut guests = BTreeMap::new();
        for vm in VMS {
            let mut guest = Guest::new(host.image(vm, "vda"), 4 << 20, &mut random);
            // The same installation in all: they race for the same chunks.
            guest.write(2 << 20, &shared);
            guests.insert(vm, guest);
        }
        Rounds {
            host,
            guests,
            books: Books::default(),
            random,
        }
    }

    fn picture(&self, vm: &str) -> BTreeMap<String, Picture> {
        let vm = vm.strip_prefix("acme/").unwrap_or(vm);
        [("vda".to_string(), self.guests[vm].picture())].into()
    }

    /// Four backups and two prunes at the same moment, and a restore as soon as they are started.
    fn round(&mut self, number: i64, at: Timestamp) {
        for guest in self.guests.values_mut() {
            guest.work(12, &mut self.random);
        }
        // What only one VM has tonight and another tomorrow: its frames die and are born again.
        let travelling = self.random.noise(64 << 10);
        let traveller = VMS[number as usize % VMS.len()];
        let guest = self.guests.get_mut(traveller).unwrap();
        guest.write(3 << 20, &travelling);

        let full = number % 5 == 0;
        let mut running = Vec::new();
        for vm in VMS {
            let mut line = vec!["backup", vm];
            if full {
                line.push("--full");
            }
            running.push(self.host.start(&line, at));
        }
        running.push(self.host.start(&["prune"], at));
        running.push(self.host.start(&["prune"], at));
        if number > 0 {
            let old = self.random.pick(&VMS).copied().unwrap();
            // Last night's: no prune may take it.
            let known = self
                .books
                .listed
                .iter()
                .map(|id| &self.books.points[id])
                .filter(|known| known.vm == old)
                .max_by_key(|known| known.taken_at)
                .unwrap();
            let target = self.host.restore(old, &known.taken_at.to_string(), at);
            let restored = Picture::of_file(&target.path().join("vda.raw"));
            assert!(
                restored == known.disks["vda"],
                "{old} of {}",
                known.taken_at
            );
        }
        for ran in running.into_iter().map(support::Running::ended) {
            ran.exits(0);
        }
        let after = at + SignedDuration::from_mins(5);
        let listed = self.host.points(after);
        let pictures: BTreeMap<String, _> = VMS
            .map(|vm| (format!("acme/{vm}"), self.picture(vm)))
            .into();
        let new = self.books.list(&listed, |vm| pictures[vm].clone());
        assert_eq!(new.len(), VMS.len(), "one point of each VM a round");
    }
}

#[test]
fn six_processes_at_once_lose_nothing_and_get_nothing_wrong() {
    let mut rounds = Rounds::new();
    let start = time("2031-02-10T12:00:00Z");
    rounds.host.vmkeep(&["init", "--yes"], start).exits(0);
    let mut scanner = Scanner::new(rounds.host.store(), &rounds.host.identity_file());
    let mut at = start;
    for number in 0..ROUNDS {
        at = time("2031-02-10T23:00:00Z") + SignedDuration::from_hours(24 * number);
        rounds.round(number, at);
        // The scanner walks every record in the store and compares with what the disks held.
        let scan = scanner.scan();
        rounds.books.compare(&scan);
    }
    let end = at + SignedDuration::from_hours(1);
    rounds.host.vmkeep(&["prune"], end).exits(0);
    let scan = scanner.scan();
    rounds.books.compare(&scan);
    let overdue = rounds.books.overdue(&scan, end);
    assert!(overdue.is_empty(), "{overdue:#?}");
    for id in rounds.books.listed.clone() {
        let known = &rounds.books.points[&id];
        let target = rounds
            .host
            .restore(&known.vm, &known.taken_at.to_string(), end);
        let restored = Picture::of_file(&target.path().join("vda.raw"));
        assert!(
            restored == known.disks["vda"],
            "{} {}",
            known.vm,
            known.taken_at
        );
    }
    rounds.host.vmkeep(&["verify", "--read-data"], end).exits(0);
    rounds.host.vmkeep(&["ledger", "verify"], end).exits(0);
    // Points really came and went meanwhile.
    assert!(rounds.books.points.len() == ROUNDS as usize * VMS.len());
    assert!(rounds.books.listed.len() < rounds.books.points.len());
}
