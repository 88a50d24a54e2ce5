//! A marker that was in a guest's disk for one night only: found by a scanner with all keys before
//! its point is erased, and by nothing afterwards; first by key, then by bytes.

use vmkeep_test_support as support;

use jiff::{SignedDuration, Timestamp};
use std::collections::HashSet;
use support::s3::{Bucket, server};
use support::{
    Customer, Fragments, Guest, Host, HostOptions, Random, Scan, Scanner, path_text, time, tool,
};
use vmkeep::model::{PointId, Tag};

const MARKER: &[u8] = b"the marker of one night: account 4711, PIN 0815";

fn options() -> HostOptions {
    HostOptions {
        // Two months: a point of the middle of a week is thinned after its week has left the window.
        policy: "timezone = \"UTC\"\nwindow = \"22:00-06:00\"\nfull_day = \"monday\"",
        ..HostOptions::default()
    }
}

fn days(count: i64) -> SignedDuration {
    SignedDuration::from_hours(24 * count)
}

/// The points from which the marker can be read with all keys.
fn readable(scanner: &mut Scanner, scan: &Scan) -> HashSet<PointId> {
    let mut found = HashSet::new();
    scanner.reachable_chunks(scan, |point, plain| {
        if plain.windows(MARKER.len()).any(|window| window == MARKER) {
            found.insert(*point);
        }
    });
    found
}

const PREFIX: &str = "vmkeep";

struct Lab {
    /// Where the store is, if not in the folder.
    bucket: Option<Bucket>,
    host: Host,
    guest: Guest,
    random: Random,
    scanner: Scanner,
}

impl Lab {
    fn new(seed: u64, start: Timestamp) -> Self {
        Lab::at(None, seed, start)
    }

    fn at(bucket: Option<Bucket>, seed: u64, start: Timestamp) -> Self {
        let mut random = Random::new(seed);
        let host = Host::new(&HostOptions {
            bucket: bucket.as_ref().map(|bucket| bucket.config(PREFIX)),
            ..options()
        });
        let guest = Guest::new(host.image("web01", "vda"), 6 << 20, &mut random);
        host.vmkeep(&["init", "--yes"], start).exits(0);
        if let Some(bucket) = &bucket {
            bucket.mirror(PREFIX, host.store());
        }
        let scanner = Scanner::new(host.store(), &host.identity_file());
        Lab {
            bucket,
            host,
            guest,
            random,
            scanner,
        }
    }

    /// Everything in the store; of a bucket, every version.
    fn scan(&mut self) -> Scan {
        if let Some(bucket) = &self.bucket {
            bucket.mirror(PREFIX, self.host.store());
        }
        self.scanner.scan()
    }
}

#[test]
fn a_marker_of_one_night_is_gone_by_key_at_once_and_by_bytes_by_its_deadline() {
    marker_is_gone(None);
}

#[test]
fn a_marker_of_one_night_is_gone_from_a_bucket_as_well() {
    let bucket = server().bucket();
    marker_is_gone(Some(bucket));
}

fn marker_is_gone(bucket: Option<Bucket>) {
    // Dates of the past: no mark of an image can be trusted, every night reads everything.
    let start = time("2025-03-03T23:00:00Z");
    let mut lab = Lab::at(bucket, 0xe7a5_0001, start);
    let place = 40 * 4096;
    let before = lab.guest.content()[place..place + 64 * 1024].to_vec();
    let mut deadline = None;
    let mut marked: Option<(PointId, Vec<Vec<u8>>)> = None;
    let mut unreadable_since = None;
    let mut bytes_gone_since = None;
    for night in 0..62 {
        let at = start + days(night);
        match night {
            // One night with it; the next day its place holds what it held before.
            2 => {
                let noise = lab.random.noise(4096);
                lab.guest.write(place, &noise);
                lab.guest.write(place + 100, MARKER);
                let lasting = lab.random.noise(2 << 20);
                lab.guest.write(2 << 20, &lasting);
            }
            3 => lab.guest.write(place, &before),
            // Only the end of the disk changes: what else was written in the marked night stays, so
            // its pack is mostly alive, and waits for the deadline of what is dead in it.
            _ => {
                let noise = lab.random.noise(4096);
                let block = lab.random.below(64) as usize;
                lab.guest.write((5 << 20) + block * 4096, &noise);
            }
        }
        lab.host.vmkeep(&["run"], at).exits(0);
        let scan = lab.scan();
        assert!(scan.damage().is_empty(), "{:?}", scan.damage());
        let points = readable(&mut lab.scanner, &scan);
        if night == 2 {
            assert_eq!(points.len(), 1, "the scanner finds it while it lives");
            let id = *points.iter().next().unwrap();
            let row = lab.host.points(at + SignedDuration::from_mins(1));
            let row = row
                .iter()
                .find(|row| row["id"] == id.to_string())
                .expect("its point is listed");
            deadline = Some(time(row["deadline"].as_str().unwrap()));
            marked = Some((id, Vec::new()));
        }
        if let (3, Some((id, sealed))) = (night, &mut marked) {
            // What only this point reaches, now that the disk holds what it held before: the chunk
            // and the nodes above it.
            let others: HashSet<Tag> = scan
                .points
                .iter()
                .filter(|(other, _)| *other != id)
                .flat_map(|(_, walked)| walked.tags.iter().copied())
                .collect();
            let own: Vec<Tag> = scan.points[id]
                .tags
                .iter()
                .filter(|tag| !others.contains(tag))
                .copied()
                .collect();
            assert!(own.len() >= 2);
            *sealed = scan.sealed(&own);
            let found = scan.files_with_fragments(&Fragments::of(sealed));
            assert!(!found.is_empty(), "the scanner finds its ciphertext");
        }
        let (3.., Some((id, sealed))) = (night, &marked) else {
            continue;
        };
        let fragments = Fragments::of(sealed);
        let files = scan.files_with_fragments(&fragments);
        let record = scan.points.contains_key(id);
        match record {
            true => assert!(points.contains(id), "readable as long as its record stands"),
            false => {
                assert!(
                    points.is_empty(),
                    "night {night}: found by key after its erasure"
                );
                unreadable_since.get_or_insert(at);
            }
        }
        if files.is_empty() {
            bytes_gone_since.get_or_insert(at);
        } else {
            assert!(bytes_gone_since.is_none(), "night {night}: it came back");
        }
    }
    let deadline = deadline.expect("the marked point was listed");
    let unreadable = unreadable_since.expect("it was erased");
    let gone = bytes_gone_since.expect("its bytes were reclaimed");
    println!("deadline {deadline}, unreadable {unreadable}, bytes gone {gone}");
    assert!(unreadable < gone && gone < deadline);
    // Nor in any other form: not in the state of the host, not in a cache.
    for file in support::files_below(&lab.host.state()) {
        let bytes = std::fs::read(&file).unwrap();
        assert!(!bytes.windows(MARKER.len()).any(|window| window == MARKER));
    }
    let scan = lab.scan();
    if let (Some(bucket), Some(python), Some((id, _))) = (&lab.bucket, boto3(), marked) {
        // What another client lists is what the scanner has seen, once each, and nothing of the point.
        let names = scan.file_names();
        let listing = || bucket.independent_listing(&python, PREFIX, &names, &[id.to_string()]);
        println!("{}", listing().expect("nothing else is there"));
        // It does see what is hidden, and what is not finished.
        let one = format!("{PREFIX}/{}", names.first().expect("an object"));
        bucket.delete(&one);
        let hidden = listing().expect_err("an object was hidden");
        assert!(hidden.contains(&format!("missing: {one}")), "{hidden}");
        bucket.begin_upload(&format!("{PREFIX}/customers/acme/points/{id}"));
        let begun = listing().expect_err("an upload was begun");
        assert!(
            begun.contains("unfinished upload") && begun.contains("not gone"),
            "{begun}"
        );
    }
}

/// A python with boto3, if `scripts/servers` runs this.
fn boto3() -> Option<std::path::PathBuf> {
    std::env::var_os("VMKEEP_BOTO3").map(Into::into)
}

#[test]
fn an_expired_point_comes_back_with_undo_until_it_is_erased() {
    let start = time("2025-03-03T23:00:00Z");
    let mut lab = Lab::new(0xe7a5_0002, start);
    let ids = |lab: &Lab, at: Timestamp| -> HashSet<String> {
        let rows = lab.host.points(at);
        rows.iter()
            .map(|row| row["id"].as_str().unwrap().to_string())
            .collect()
    };
    for night in 0..30 {
        let at = start + days(night);
        lab.guest.work(4, &mut lab.random);
        let run = lab.host.json(&["run"], at);
        let expired = &run["customers"][0]["prune"]["expired"];
        let Some(id) = expired[0].as_str() else {
            continue;
        };
        let later = at + SignedDuration::from_mins(1);
        assert!(
            !ids(&lab, later).contains(id),
            "an expired point is not listed"
        );
        // A customer that init has not made yet is not in the way.
        let config = lab.host.config_text();
        let newco = format!("{config}\n[[customer]]\nid = \"newco\"\n");
        lab.host.write_config(&newco);
        lab.host
            .vmkeep(&["prune", "--undo", &id[..12]], later)
            .exits(0)
            .says("warning: newco was not looked through: ");
        lab.host
            .vmkeep(&["prune", "--undo", "000000000000"], later)
            .exits(1)
            .says("newco is not in the repository yet");
        lab.host.write_config(&config);
        assert!(ids(&lab, later).contains(id), "it is back");
        // The next prune thins it again; a day later its record is destroyed, and that is that.
        for day in 1..4 {
            lab.host.vmkeep(&["prune"], at + days(day)).exits(0);
        }
        let end = at + days(3) + SignedDuration::from_mins(1);
        lab.host
            .vmkeep(&["prune", "--undo", &id[..12]], end)
            .exits(1)
            .one_error()
            .says("erased");
        return;
    }
    panic!("nothing expired in a month");
}

#[test]
fn no_certificate_is_signed_while_a_copy_of_the_customer_lies_in_the_store() {
    let mut random = Random::new(0xe7a5_0004);
    let host = Host::new(&HostOptions {
        customers: vec![Customer {
            name: "acme",
            own: "max_retention = \"7 days\"",
            vms: vec![("web01", vec!["vda"])],
        }],
        ..HostOptions::default()
    });
    let mut guest = Guest::new(host.image("web01", "vda"), 1 << 20, &mut random);
    let start = time("2025-03-03T23:00:00Z");
    host.vmkeep(&["init", "--yes"], start).exits(0);
    let mut night = |number: i64| {
        guest.work(4, &mut random);
        host.vmkeep(&["--json", "run"], start + days(number))
    };
    for number in 0..3 {
        night(number).exits(0);
    }
    let copy = host.customer_folder("acme.bak");
    let acme = host.customer_folder("acme");
    tool("cp", &["-a", path_text(&acme), path_text(&copy)]);
    let mut erased = 0;
    for number in 3..9 {
        let ran = night(number);
        ran.exits(1)
            .says("customers/acme.bak (a copy of customer \"acme\")");
        let prune = &ran.document()["customers"][0]["prune"];
        assert!(prune["certificate"].is_null(), "{prune}");
        erased += prune["erased"].as_array().unwrap().len();
    }
    assert!(erased > 0, "a maximum of a week is over");
    host.vmkeep(&["status"], start + days(8))
        .says("customers/acme.bak (a copy of customer \"acme\")");
    // Nobody but who made it knows what it is for.
    assert!(copy.join("ledger").exists());
    std::fs::remove_dir_all(copy).unwrap();
    let later = start + days(8) + SignedDuration::from_hours(1);
    let document = host.json(&["prune"], later);
    let prune = &document["customers"][0];
    erased += prune["erased"].as_array().unwrap().len();
    assert_eq!(prune["certificate"]["erased"], erased, "{prune}");
    // No run need come first.
    let status = host.vmkeep(&["status"], later);
    assert!(!status.stdout.contains("acme.bak"), "{status}");
    night(9).exits(0);
}

#[test]
fn a_jump_of_the_clock_deletes_nothing_until_somebody_vouches_for_it() {
    let start = time("2025-03-03T23:00:00Z");
    let mut lab = Lab::new(0xe7a5_0003, start);
    for night in 0..3 {
        lab.guest.work(4, &mut lab.random);
        lab.host.vmkeep(&["run"], start + days(night)).exits(0);
    }
    let files = |lab: &mut Lab| -> Vec<String> {
        let names = lab.scan().file_names();
        names
            .into_iter()
            .filter(|name| !name.contains("/ledger/"))
            .collect()
    };
    let before = files(&mut lab);
    let jumped = start + days(70);
    lab.host
        .vmkeep(&["prune"], jumped)
        .exits(5)
        .one_error()
        .says("--trust-clock");
    lab.host.vmkeep(&["prune", "--confirm"], jumped).exits(5);
    assert_eq!(files(&mut lab), before, "nothing was deleted");
    // Nor on the word of a clock that went back.
    lab.host.vmkeep(&["prune"], start - days(400)).exits(5);
    assert_eq!(files(&mut lab), before);
    lab.host
        .vmkeep(&["prune", "--trust-clock", "--confirm"], jumped)
        .exits(0);
    let scan = lab.scan();
    assert!(scan.points.is_empty());
    assert_eq!(scan.frame_bytes(), 0, "nothing is left, not even sealed");
    // Backups go on whatever the clock says.
    let gone_back = start - days(400);
    lab.host.vmkeep(&["backup", "web01"], gone_back).exits(0);
}
