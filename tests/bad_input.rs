//! Bad input: one clear error that names the thing, the right exit code, nothing half-visible, and
//! everything else still restorable.

use vmkeep_test_support as support;

use jiff::{SignedDuration, Timestamp};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use support::tool;
use support::{Customer, Guest, Host, HostOptions, Picture, Random, files_below, path_text, time};

fn start() -> Timestamp {
    time("2031-02-10T23:00:00Z")
}

fn minutes(count: i64) -> Timestamp {
    start() + SignedDuration::from_mins(count)
}

fn nights(count: i64) -> Timestamp {
    start() + SignedDuration::from_hours(24 * count)
}

fn options() -> HostOptions {
    HostOptions {
        customers: vec![
            Customer {
                name: "acme",
                own: "",
                vms: vec![("web01", vec!["vda"]), ("db01", vec!["vda"])],
            },
            Customer {
                name: "globex",
                own: "",
                vms: vec![("shop", vec!["vda"])],
            },
        ],
        ..HostOptions::default()
    }
}

struct Lab {
    host: Host,
    web: Guest,
    db: Guest,
    random: Random,
}

impl Lab {
    /// Three VMs of two customers with a full each.
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let host = Host::new(&options());
        let web = Guest::new(host.image("web01", "vda"), 2 << 20, &mut random);
        let db = Guest::new(host.image("db01", "vda"), 1 << 20, &mut random);
        Guest::new(host.image("shop", "vda"), 1 << 20, &mut random);
        host.vmkeep(&["init", "--yes"], start()).exits(0);
        host.vmkeep(&["run"], start()).exits(0);
        Lab {
            host,
            web,
            db,
            random,
        }
    }

    /// The first night of a VM restores to what its disk held then.
    fn restores(&self, vm: &str, picture: &Picture, at: Timestamp) {
        let first = start().to_string();
        let target = self.host.restore(vm, &first, at);
        let restored = Picture::of_file(&target.path().join("vda.raw"));
        assert!(restored == *picture, "{vm} of the first night differs");
    }

    fn count(&self, at: Timestamp) -> usize {
        self.host.points(at).len()
    }

    fn ledger(&self, seq: u64) -> PathBuf {
        self.host
            .customer_folder("acme")
            .join(format!("ledger/{seq:016}"))
    }
}

fn copy_folder(from: &Path, to: &Path) {
    for file in files_below(from) {
        let target = to.join(file.strip_prefix(from).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        if !target.exists() {
            fs::copy(file, target).unwrap();
        }
    }
}

#[test]
fn a_wrong_configuration_is_refused_with_its_place_before_anything_happens() {
    let host = Host::new(&options());
    let good = host.config_text();
    for (from, to, says) in [
        ("[policy]", "[policy]\nretention_days = 3", "retention_days"),
        ("clock = \"trusted\"", "clok = \"trusted\"", "clock"),
        (
            "timezone = \"UTC\"",
            "timezone = \"Mars/Olympus\"",
            "Mars/Olympus",
        ),
        (
            "window = \"22:00-06:00\"",
            "window = \"22:00-06:00\"\nmax_retention = \"2 days\"",
            "the least is 3 days",
        ),
        (
            "id = \"globex\"",
            "id = \"globex\"\nmax_retention = \"3 months\"",
            "may only shorten",
        ),
        ("name = \"db01\"", "name = \"../db01\"", "../db01"),
        ("name = \"db01\"", "name = \"web01\"", "web01"),
        ("id = \"globex\"", "id = \"acme\"", "acme"),
        (
            "disks = { ",
            "libvirt = \"x\"\ndisks = { ",
            "exactly one of",
        ),
    ] {
        assert!(good.contains(from), "{from}");
        host.write_config(&good.replacen(from, to, 1));
        for command in [&["config", "check"][..], &["init", "--yes"], &["run"]] {
            host.vmkeep(command, start())
                .exits(2)
                .one_error()
                .says(says);
        }
        assert!(!host.store().exists() && !host.state().exists());
    }
    let missing = host.path("nowhere.toml");
    host.vmkeep(&["--config", path_text(&missing), "run"], start())
        .exits(2)
        .one_error()
        .says("nowhere.toml");
    // A path is no VM.
    host.write_config(&good);
    host.vmkeep(&["backup", "../web01"], start()).exits(2);
    host.vmkeep(&["backup", "nobody"], start()).exits(10);
}

#[test]
fn without_a_repository_every_command_says_so() {
    let host = Host::new(&options());
    for command in [
        &["run"][..],
        &["points"],
        &["status"],
        &["prune"],
        &["verify"],
        &["ledger", "show"],
        &["restore", "web01", "--at", "latest", "--to", "r"],
    ] {
        host.vmkeep(command, start()).exits(10).one_error();
    }
    assert!(!host.path("r").exists());
}

#[test]
fn a_missing_disk_fails_its_vm_alone_and_a_later_night_catches_up() {
    let mut lab = Lab::new(0xbad_0001);
    let picture = lab.db.picture();
    lab.web.away();
    lab.host
        .vmkeep(&["run"], nights(1))
        .exits(3)
        .says("web01-vda.raw");
    assert_eq!(lab.count(nights(1)), 5, "the two others have their point");
    lab.host
        .vmkeep(&["backup", "web01"], nights(1))
        .exits(1)
        .one_error()
        .says("web01-vda.raw");
    lab.web.back();
    lab.db.work(5, &mut lab.random);
    let later = nights(1) + SignedDuration::from_hours(3);
    lab.host.vmkeep(&["run"], later).exits(0);
    assert_eq!(lab.count(later), 6);
    lab.restores("db01", &picture, later);
}

#[test]
fn a_disk_that_shrinks_or_grows_between_nights_is_read_anew() {
    let mut lab = Lab::new(0xbad_0002);
    for (night, size) in [(1, (3 << 20) + 4096), (2, 1 << 20), (3, 5 << 20)] {
        lab.web.resize(size);
        lab.web.write(4096, &lab.random.noise(4096));
        let at = nights(night);
        lab.host.vmkeep(&["run"], at).exits(0);
        let target = lab.host.restore("web01", "latest", at);
        let restored = Picture::of_file(&target.path().join("vda.raw"));
        assert!(restored == lab.web.picture(), "{size} bytes");
    }
    // An empty disk is none.
    lab.web.resize(0);
    lab.host
        .vmkeep(&["run"], nights(4))
        .exits(3)
        .says("web01-vda.raw");
}

#[test]
fn a_wrong_key_opens_nothing_and_says_what_to_do() {
    let lab = Lab::new(0xbad_0003);
    let picture = lab.web.picture();
    let identity = lab.host.identity_file();
    let own = fs::read(&identity).unwrap();
    fs::remove_file(&identity).unwrap();
    lab.host
        .vmkeep(&["points"], minutes(1))
        .exits(12)
        .one_error();
    // Somebody else's key.
    let other = lab.host.path("other.txt");
    tool("age-keygen", &["-o", path_text(&other)]);
    fs::copy(&other, &identity).unwrap();
    fs::set_permissions(&identity, fs::Permissions::from_mode(0o600)).unwrap();
    for command in [
        &["points"][..],
        &["backup", "web01"],
        &["restore", "web01", "--at", "latest", "--to", "r"],
    ] {
        lab.host
            .vmkeep(command, minutes(1))
            .exits(12)
            .one_error()
            .says("hint");
    }
    assert!(!lab.host.path("r").exists());
    // What is no key at all.
    for content in [&b""[..], b"\xff\xfe"] {
        fs::write(&identity, content).unwrap();
        for command in [&["points"][..], &["init", "--yes"]] {
            lab.host
                .vmkeep(command, minutes(1))
                .exits(12)
                .one_error()
                .says("put the host's identity back");
        }
    }
    // A secret that others can read is refused.
    fs::write(&identity, own).unwrap();
    fs::set_permissions(&identity, fs::Permissions::from_mode(0o644)).unwrap();
    for command in [&["points"][..], &["init", "--yes"]] {
        let refused = lab.host.vmkeep(command, minutes(2));
        refused.exits(1).one_error().says("chmod 600");
        // Where it is was asked by nobody.
        assert!(!refused.stderr.contains("state_dir"), "{refused}");
    }
    fs::set_permissions(&identity, fs::Permissions::from_mode(0o600)).unwrap();
    lab.restores("web01", &picture, minutes(3));
}

#[test]
fn verify_without_keys_needs_no_identity_writes_nothing_and_names_what_is_damaged() {
    let lab = Lab::new(0xbad_0014);
    // On the machine that holds the store, which was never a host of it.
    fs::remove_dir_all(lab.host.state()).unwrap();
    let folder = lab.host.customer_folder("acme");
    let before = files_below(&folder);
    let command = ["--json", "verify", "--without-keys", "--read-data"];
    lab.host
        .vmkeep(&["verify"], minutes(1))
        .exits(12)
        .says("vmkeep verify --without-keys");
    let told = lab.host.vmkeep(&command, minutes(1)).exits(0).document();
    assert_eq!(told["sound"], true, "{told}");
    assert_eq!(told["customers"][0]["points"], 2, "{told}");
    assert!(
        told["customers"][0]["packs_read"].as_u64() >= Some(4),
        "{told}"
    );
    assert_eq!(files_below(&folder), before);

    for part in ["packs", "index", "points", "key"] {
        let file = files_below(&folder.join(part)).pop().unwrap();
        let good = fs::read(&file).unwrap();
        let mut bad = good.clone();
        bad[good.len() / 2] ^= 1;
        fs::write(&file, bad).unwrap();
        lab.host
            .vmkeep(&command, minutes(2))
            .exits(6)
            .says(file.file_stem().unwrap().to_str().unwrap());
        fs::write(&file, good).unwrap();
    }
    lab.host.vmkeep(&command, minutes(3)).exits(0);
}

#[test]
fn an_escrow_key_alone_restores_everything() {
    let lab = Lab::new(0xbad_0004);
    let picture = lab.web.picture();
    let escrow = lab.host.path("escrow.txt");
    tool("age-keygen", &["-o", path_text(&escrow)]);
    let public = tool("age-keygen", &["-y", path_text(&escrow)]);
    let text = lab.host.config_text().replace(
        "[policy]",
        &format!("escrow = [\"{}\"]\n\n[policy]", public.trim()),
    );
    lab.host.write_config(&text);
    lab.host.vmkeep(&["init", "--yes"], minutes(1)).exits(0);
    // The public tool opens a key file.
    let key = lab.host.customer_folder("acme").join("key/2.age");
    let opened = tool("age", &["-d", "-i", path_text(&escrow), path_text(&key)]);
    assert!(opened.starts_with("vmkeep customer key 1\n"), "{opened}");
    // The host is lost, with all its state.
    fs::remove_dir_all(lab.host.state()).unwrap();
    fs::create_dir(lab.host.state()).unwrap();
    let identity = lab.host.state().join("identity");
    fs::copy(&escrow, &identity).unwrap();
    fs::set_permissions(&identity, fs::Permissions::from_mode(0o600)).unwrap();
    lab.restores("web01", &picture, minutes(2));
    let noted = fs::read_to_string(lab.host.state().join("restores.log")).unwrap();
    assert!(noted.contains("acme/web01"), "{noted}");
    // It is no host of the ledger: what it finds it tells, and notes nothing.
    let read = ["--json", "verify", "--read-data"];
    let told = lab.host.vmkeep(&read, minutes(3)).exits(0).document();
    assert_eq!(told["sound"], true, "{told}");
    let pack = files_below(&lab.host.customer_folder("acme").join("packs")).remove(0);
    let mut bytes = fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&pack, bytes).unwrap();
    let name = pack.file_name().unwrap().to_str().unwrap();
    for read in ["--read-data", "--read-data=99"] {
        let ran = lab.host.vmkeep(&["verify", read], minutes(4));
        ran.exits(6).says(name).says("could not be noted");
    }
    let told = lab.host.vmkeep(&read, minutes(5)).exits(6).document();
    assert_eq!(told["sound"], false, "{told}");
    let damage = told["customers"][0]["damage"].to_string();
    assert!(damage.contains(name), "{told}");
}

#[test]
fn two_restore_points_of_one_minute_are_told_apart_by_their_ids() {
    let mut lab = Lab::new(0xbad_0030);
    let first = lab.web.picture();
    let noise = lab.random.noise(4096);
    lab.web.write(0, &noise);
    let soon = start() + SignedDuration::from_secs(40);
    lab.host
        .vmkeep(&["backup", "--full", "web01"], soon)
        .exits(0);
    let points = lab.host.points(minutes(2));
    let ids = |vm: &str| -> Vec<String> {
        let of_vm = points.iter().filter(|point| point["vm"] == vm);
        let id = |point: &serde_json::Value| point["id"].as_str().unwrap().to_string();
        of_vm.map(id).collect()
    };
    let web = ids("web01");
    assert_eq!(web.len(), 2, "{points:?}");
    for (id, picture) in web.iter().zip([first, lab.web.picture()]) {
        for id in [&id[..8], id.as_str()] {
            let target = lab.host.restore("web01", id, minutes(2));
            let restored = Picture::of_file(&target.path().join("vda.raw"));
            assert!(restored == picture, "{id}");
        }
    }
    let to = lab.host.path("nowhere");
    let ask = |id: &str| {
        let line = ["restore", "web01", "--at", id, "--to", path_text(&to)];
        lab.host.vmkeep(&line, minutes(2))
    };
    ask(&ids("db01")[0])
        .exits(2)
        .one_error()
        .says("is of acme/db01, not of acme/web01");
    // Of another customer, or of nobody.
    ask(&ids("shop")[0])
        .exits(1)
        .one_error()
        .says("acme/web01 has no restore point");
    ask("20310210")
        .exits(1)
        .one_error()
        .says("written as 2026-11-07");
    ask("5f4").exits(2).says("digits of an ID");
    assert!(!to.exists());
}

#[test]
fn without_its_ledger_a_customer_is_restored_from_what_is_whole_and_told_that_nobody_vouches() {
    let lab = Lab::new(0xbad_0031);
    let picture = lab.web.picture();
    // A new host with the identity of the old one, and with nothing that it remembered.
    let identity = lab.host.state().join("identity");
    let kept = fs::read(&identity).unwrap();
    fs::remove_dir_all(lab.host.state()).unwrap();
    fs::create_dir(lab.host.state()).unwrap();
    let identify = |bytes: &[u8]| {
        fs::write(&identity, bytes).unwrap();
        fs::set_permissions(&identity, fs::Permissions::from_mode(0o600)).unwrap();
    };
    identify(&kept);
    let acme = lab.host.customer_folder("acme");
    let at = minutes(2);
    let losses = ["a bad byte", "a gap", "all of it", "the index too"];
    for (number, loss) in losses.into_iter().enumerate() {
        match loss {
            "a bad byte" => {
                let mut entry = fs::read(lab.ledger(5)).unwrap();
                entry[40] ^= 1;
                fs::write(lab.ledger(5), entry).unwrap();
            }
            "a gap" => fs::remove_file(lab.ledger(5)).unwrap(),
            "all of it" => fs::remove_dir_all(acme.join("ledger")).unwrap(),
            _ => fs::remove_dir_all(acme.join("index")).unwrap(),
        }
        let to = lab.host.path(&format!("restored-{number}"));
        let plain = ["restore", "web01", "--at", "latest", "--to", path_text(&to)];
        lab.host
            .vmkeep(&plain, at)
            .exits(6)
            .one_error()
            .says("vmkeep points --without-ledger");
        assert!(!to.join("vda.raw").exists(), "{loss}");
        let points = ["--json", "points", "--without-ledger", "acme/web01"];
        let points = lab.host.vmkeep(&points, at).exits(0).document();
        assert_eq!(points.as_array().map(Vec::len), Some(1), "{points}");
        assert!(points[0]["suspect"].is_null(), "{points}");
        let id = points[0]["id"].as_str().unwrap();
        let line = [
            "--json",
            "restore",
            "acme/web01",
            "--without-ledger",
            "--at",
            id,
            "--to",
        ];
        let line = [&line[..], &[path_text(&to)]].concat();
        let told = lab.host.vmkeep(&line, at).exits(0).document();
        let restored = Picture::of_file(&to.join("vda.raw"));
        assert!(restored == picture, "{loss}");
        assert_eq!(told["without_ledger"], true, "{told}");
        let notes = told["notes"].to_string();
        assert!(notes.contains("was set aside"), "{told}");
        assert!(notes.contains("restores.log"), "{told}");
    }
    let noted = fs::read_to_string(lab.host.state().join("restores.log")).unwrap();
    assert_eq!(noted.matches("acme/web01").count(), 4, "{noted}");
    // For people, and for who wants quiet.
    let to = lab.host.path("quietly");
    let line = [
        "-q",
        "restore",
        "web01",
        "--without-ledger",
        "--at",
        "latest",
        "--to",
    ];
    let line = [&line[..], &[path_text(&to)]].concat();
    let quiet = lab.host.vmkeep(&line, at);
    assert!(quiet.exits(0).stdout.contains("was set aside"), "{quiet}");
    assert_eq!(quiet.stderr, "", "{quiet}");
    // What is over by the contract is not read by this either.
    let late = nights(80);
    lab.host
        .vmkeep(&line, late)
        .exits(1)
        .one_error()
        .says("2 restore points are over by max_retention");
    // The other customer has its ledger, and is new to nobody.
    lab.host.vmkeep(&["points", "globex/shop"], at).exits(0);

    // Who has no key has none here, and wrong bytes are wrong bytes.
    let other = lab.host.path("other.txt");
    tool("age-keygen", &["-o", path_text(&other)]);
    identify(&fs::read(&other).unwrap());
    let points = ["points", "--without-ledger", "acme/web01"];
    lab.host.vmkeep(&points, at).exits(12).one_error();
    identify(&kept);
    for pack in files_below(&acme.join("packs")) {
        let mut bytes = fs::read(&pack).unwrap();
        bytes[120] ^= 1;
        fs::write(&pack, bytes).unwrap();
    }
    let to = lab.host.path("damaged");
    let line = [
        "restore",
        "web01",
        "--without-ledger",
        "--at",
        "latest",
        "--to",
    ];
    let line = [&line[..], &[path_text(&to)]].concat();
    lab.host.vmkeep(&line, at).exits(6).one_error();
    assert!(!to.join("vda.raw").exists());
}

#[test]
fn a_clock_that_hides_restore_points_is_named_and_not_believed() {
    let lab = Lab::new(0xbad_0017);
    let ahead = nights(3650);
    let doubt = "restore points are over by this host's clock (2041-";
    let points = lab.host.vmkeep(&["points"], ahead);
    points.exits(0).says("acme: 2 ").says(doubt);
    points.says("the ledger's last time is 2031-02-10 23:");
    // A document stays one, and the doubt is told beside it.
    let document = lab.host.vmkeep(&["--json", "points"], ahead);
    assert_eq!(document.exits(0).document(), serde_json::json!([]));
    document.says(doubt);
    let restore = |vm: &str| {
        let line = ["restore", vm, "--at", "latest", "--to", "r"];
        lab.host.vmkeep(&line, ahead)
    };
    let one = "1 restore point is over by this host's clock (2041-";
    restore("web01").exits(5).one_error().says(one);
    // Nor is a VM unknown that is not configured any more.
    let config = lab.host.config_text();
    lab.host
        .write_config(&config.replace("\"db01\"", "\"db02\""));
    restore("db01").exits(5).one_error().says(one);
    for line in [
        &["points", "acme/db01"][..],
        &["--json", "-q", "points", "acme/db01"],
    ] {
        lab.host.vmkeep(line, ahead).exits(5).says(one);
    }
    lab.host.vmkeep(&["points", "acme/db03"], ahead).exits(2);
    // By a clock that is right everything is there.
    assert_eq!(lab.count(minutes(1)), 3);
}

#[test]
fn the_evidence_is_not_verified_without_its_certificates() {
    let host = Host::new(&HostOptions {
        customers: vec![Customer {
            name: "acme",
            own: "max_retention = \"7 days\"",
            vms: vec![("web01", vec!["vda"])],
        }],
        ..HostOptions::default()
    });
    let mut random = Random::new(0xbad_0018);
    Guest::new(host.image("web01", "vda"), 1 << 20, &mut random);
    host.vmkeep(&["init", "--yes"], start()).exits(0);
    host.vmkeep(&["run"], start()).exits(0);
    let over = nights(8);
    host.vmkeep(&["prune", "--trust-clock", "--confirm"], over)
        .exits(0)
        .says("certificate");
    let checks = [
        &["verify"][..],
        &["verify", "--without-keys"],
        &["ledger", "verify"],
    ];
    for check in checks {
        host.vmkeep(check, over).exits(0);
    }
    let folder = host.customer_folder("acme").join("certificates");
    let files = files_below(&folder);
    assert_eq!(files.len(), 2);
    for file in files {
        let right = fs::read(&file).unwrap();
        let name = file.file_name().unwrap().to_str().unwrap();
        let mut altered = right.clone();
        altered[right.len() / 2] ^= 1;
        fs::write(&file, altered).unwrap();
        for check in checks {
            host.vmkeep(check, over).exits(6).says(name);
        }
        fs::remove_file(&file).unwrap();
        for check in checks {
            host.vmkeep(check, over).exits(6).says(name);
        }
        fs::write(&file, right).unwrap();
    }
    host.vmkeep(&["ledger", "verify"], over)
        .exits(0)
        .says("1 deletion certificate");
    // A run notes what is lost, and is not red for it every night.
    let lost = &files_below(&folder)[0];
    fs::remove_file(lost).unwrap();
    let checked = host.vmkeep(&["--json", "ledger", "verify"], over);
    let checked = checked.exits(6).document();
    assert_eq!(checked[0]["sound"], true, "{checked}");
    assert_eq!(checked[0]["certificates_sound"], false, "{checked}");
    let verify = host.vmkeep(&["verify"], over);
    verify.exits(6).says("put it back from a copy");
    assert!(!verify.stdout.contains("A full backup"), "{verify}");
    host.vmkeep(&["run"], over)
        .exits_with_one_of(&[0, 5])
        .says(lost.file_name().unwrap().to_str().unwrap());
}

#[test]
fn another_customers_objects_under_this_prefix_are_no_use_and_no_harm() {
    let lab = Lab::new(0xbad_0005);
    let picture = lab.web.picture();
    let (acme, globex) = (
        lab.host.customer_folder("acme"),
        lab.host.customer_folder("globex"),
    );
    // Packs, segments and records of another: unexplained, so they go.
    for folder in ["packs", "index", "points"] {
        copy_folder(&globex.join(folder), &acme.join(folder));
    }
    let before = files_below(&acme).len();
    assert_eq!(lab.count(minutes(1)), 3);
    lab.host
        .vmkeep(&["prune"], minutes(1))
        .exits(0)
        .says("removed");
    assert!(files_below(&acme).len() < before);
    lab.restores("web01", &picture, minutes(2));
    lab.host
        .vmkeep(&["verify", "--read-data"], minutes(2))
        .exits(0);
    // What vmkeep cannot have written is reported, and removed only when that is confirmed.
    fs::write(acme.join("points/copy.bak"), b"a copy of something").unwrap();
    lab.host
        .vmkeep(&["prune"], minutes(3))
        .exits(1)
        .says("copy.bak");
    assert!(acme.join("points/copy.bak").exists());
    lab.host
        .vmkeep(&["prune", "--confirm"], minutes(4))
        .exits(0);
    assert!(!acme.join("points/copy.bak").exists());
    // A whole prefix of another customer under this name.
    fs::rename(&acme, lab.host.path("acme.saved")).unwrap();
    copy_folder(&globex, &acme);
    lab.host
        .vmkeep(&["backup", "acme/web01"], minutes(5))
        .exits(6)
        .one_error()
        .says("globex");
    fs::remove_dir_all(&acme).unwrap();
    fs::rename(lab.host.path("acme.saved"), &acme).unwrap();
    lab.restores("web01", &picture, minutes(6));
}

#[test]
fn a_ledger_with_a_gap_a_fork_or_a_bad_signature_is_damage_and_stays_untouched() {
    let lab = Lab::new(0xbad_0006);
    let picture = lab.web.picture();
    let shop = Picture::of_file(&lab.host.image("shop", "vda"));
    let entry = fs::read(lab.ledger(5)).unwrap();
    let refused = |says: &str| {
        for command in [
            &["ledger", "verify"][..],
            &["ledger", "show"],
            &["backup", "acme/web01"],
            &["prune"],
        ] {
            lab.host.vmkeep(command, minutes(1)).exits(6).says(says);
        }
        // The other customer does not care.
        lab.restores("shop", &shop, minutes(1));
    };
    fs::remove_file(lab.ledger(5)).unwrap();
    refused("entry 5 is missing");
    // Another entry's bytes in its place.
    fs::copy(lab.ledger(4), lab.ledger(5)).unwrap();
    refused("0000000000000005");
    // One digit of the signature.
    let mut forged = entry.clone();
    let at = forged.len() - 10;
    forged[at] = if forged[at] == b'0' { b'1' } else { b'0' };
    fs::write(lab.ledger(5), &forged).unwrap();
    refused("signature");
    // One letter of what it says.
    let mut forged = entry.clone();
    let at = forged.windows(8).position(|w| w == b"\"kind\":\"").unwrap() + 8;
    forged[at] ^= 1;
    fs::write(lab.ledger(5), &forged).unwrap();
    refused("0000000000000005");
    fs::write(lab.ledger(5), entry).unwrap();
    lab.host.vmkeep(&["ledger", "verify"], minutes(2)).exits(0);
    lab.restores("web01", &picture, minutes(2));
    // The store is rolled back to an earlier night: this host remembers.
    lab.host.vmkeep(&["ledger", "verify"], minutes(3)).exits(0);
    let last = files_below(&lab.host.customer_folder("acme").join("ledger"))
        .pop()
        .unwrap();
    fs::remove_file(last).unwrap();
    lab.host
        .vmkeep(&["ledger", "verify"], minutes(3))
        .exits(6)
        .says("rolled back");
}

#[test]
fn a_customer_that_cannot_be_opened_takes_nothing_from_the_others() {
    let lab = Lab::new(0xbad_0015);
    let config = lab.host.config_text();
    let newco = "\n[[customer]]\nid = \"newco\"\n";
    lab.host.write_config(&format!("{config}{newco}"));
    let says = "newco is not in the repository yet";
    let ask = |line: &[&str]| lab.host.vmkeep(line, minutes(1));
    let asked = ask(&["points", "acme/web01"]);
    asked.exits(0).says("acme/web01");
    assert!(!asked.stderr.contains("newco"), "{asked}");
    ask(&["points", "newco/web01"])
        .exits(1)
        .one_error()
        .says(says);
    // Who asks for all of them gets all there is.
    for line in [
        &["points"][..],
        &["run", "--dry-run"],
        &["prune", "--dry-run"],
        &["key", "list"],
    ] {
        ask(line).exits(1).one_error().says(says).says("globex");
    }
    let rows = ask(&["--json", "points"]).document();
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 4, "{rows:?}");
    assert_eq!(rows[3]["customer"], "newco");
    assert_eq!(rows[3]["error"]["code"], 1);
    // A VM of which only restore points are left may be anybody's.
    let gone = config.replace("name = \"db01\"", "name = \"db02\"");
    lab.host.write_config(&format!("{gone}{newco}"));
    let to = lab.host.path("gone");
    let restore = |vm| ["restore", vm, "--at", "latest", "--to", path_text(&to)];
    ask(&restore("db01"))
        .exits(0)
        .says("warning: newco was not looked through: ");
    // Who wants quiet hears of errors alone, and of those in full.
    let quietly = lab.host.path("quietly");
    let to = path_text(&quietly);
    let quiet = ask(&["-q", "restore", "db01", "--at", "latest", "--to", to]);
    assert_eq!(quiet.exits(0).stderr, "", "{quiet}");
    ask(&["-q", "points"]).exits(1).one_error().says(says);
    ask(&restore("db09")).exits(1).one_error().says(says);
    lab.host.write_config(&format!("{config}{newco}"));

    // One that is damaged does not keep another one from being made.
    let missing = lab.ledger(5);
    let entry = fs::read(&missing).unwrap();
    fs::remove_file(&missing).unwrap();
    ask(&["init", "--yes"])
        .exits(6)
        .one_error()
        .says("entry 5 is missing")
        .says("newco  (created)");
    ask(&["points", "newco/web01"]).exits(2);
    // Another entry's bytes in its place.
    fs::copy(lab.ledger(4), &missing).unwrap();
    ask(&["ledger", "show"])
        .exits(6)
        .says("0000000000000005")
        .says("customer newco");
    fs::write(&missing, entry).unwrap();
    ask(&["points"]).exits(0);
}

#[test]
fn a_host_is_not_let_in_by_a_recipient_that_is_none() {
    let host = Host::new(&options());
    host.vmkeep(&["init", "--yes"], start()).exits(0);
    let id = "ab".repeat(32);
    let line = ["key", "admit", "--name", "host2", "--host-id", id.as_str()];
    let refused = host.vmkeep(&[&line[..], &["age1x"]].concat(), start());
    refused.exits(2).one_error().says("\"age1x\"");
    assert_eq!(refused.stdout, "", "{refused}");
    let words = "not an age recipient";
    assert_eq!(refused.stderr.matches(words).count(), 1, "{refused}");
}

/// Two hosts at one store; the second was let in by the command that its `init` printed.
fn two_hosts(random: &mut Random) -> [Host; 2] {
    let first = Host::new(&HostOptions::default());
    let second = Host::new(&HostOptions {
        name: "host2",
        store: Some(first.store().to_path_buf()),
        ..HostOptions::default()
    });
    for host in [&first, &second] {
        Guest::new(host.image("web01", "vda"), 1 << 20, random);
    }
    first.vmkeep(&["init", "--yes"], start()).exits(0);
    let words = second.admission(start());
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    first.vmkeep(&words, start()).exits(0);
    second.vmkeep(&["init", "--yes"], start()).exits(0);
    [first, second]
}

#[test]
fn a_host_goes_on_by_the_ledger_where_its_own_configuration_is_not_its_to_enter() {
    let [first, second] = two_hosts(&mut Random::new(0xbad_0031));
    second.configure(&HostOptions {
        name: "renamed",
        policy: "timezone = \"UTC\"\nwindow = \"22:00-06:00\"\nmax_retention = \"30 days\"",
        store: Some(first.store().to_path_buf()),
        ..HostOptions::default()
    });
    let ran = second.vmkeep(&["run"], start());
    ran.exits(0)
        .says("acme: the configured policy is not the one in force")
        .says("vmkeep key admit --name renamed --host-id ");
    assert_eq!(second.points(minutes(1)).len(), 1);
    let status = second.json(&["status"], minutes(1));
    let alarms = status["alarms"].to_string();
    assert!(alarms.contains("policy-waits"), "{alarms}");
    let check = second.vmkeep(&["config", "check"], minutes(1));
    check.exits(0);
    // Its lines are filled.
    let words: Vec<&str> = check.stdout.split_whitespace().collect();
    let said = words.join(" ");
    assert!(said.contains("only a host with the role admin"), "{check}");
    assert!(!said.contains("the next run applies it"), "{check}");
    // The command that is printed is all that it takes.
    let words = ran.stdout.lines();
    let words = words.filter_map(|line| line.split_once("vmkeep key admit "));
    let words: Vec<&str> = words.flat_map(|(_, words)| words.split(' ')).collect();
    let words = [&["key", "admit"][..], &words[..]].concat();
    first.vmkeep(&words, minutes(2)).exits(0);
    let listed = first.json(&["key", "list"], minutes(2)).to_string();
    assert!(listed.contains("\"renamed\""), "{listed}");
    let ran = second.vmkeep(&["run"], minutes(3));
    ran.exits(0);
    assert!(!ran.stdout.contains("key admit"), "{ran}");
}

#[test]
fn what_keeps_a_certificate_back_is_told_by_a_host_that_prunes_alone() {
    let [first, second] = two_hosts(&mut Random::new(0xbad_0035));
    let listed = first.json(&["key", "list"], minutes(1));
    let hosts = listed[0]["hosts"].as_array().unwrap();
    let newcomer = hosts.iter().find(|host| host["name"] == "host2").unwrap();
    let [id, recipient] = ["id", "recipient"].map(|word| newcomer[word].as_str().unwrap());
    let line = ["key", "admit", "--name", "host2", "--host-id", id];
    let roles = ["--role", "backup", "--role", "restore", recipient];
    let line = [&line[..], &roles].concat();
    first.vmkeep(&line, minutes(2)).exits(0);
    fs::write(first.store().join("customers/old.tar"), "what it holds").unwrap();
    let words = "nothing is certified until";
    first.vmkeep(&["status"], minutes(3)).says(words);
    let status = second.vmkeep(&["status"], minutes(3));
    assert!(!status.stdout.contains(words), "{status}");
    second.vmkeep(&["run"], minutes(3)).exits(0);
}

#[test]
fn a_host_that_is_let_in_by_the_id_of_another_takes_no_role_from_it() {
    let [first, second] = two_hosts(&mut Random::new(0xbad_0032));
    let listed = first.json(&["key", "list"], minutes(1));
    let hosts = listed[0]["hosts"].as_array().unwrap();
    let named = |name: &str| hosts.iter().find(|host| host["name"] == name).unwrap();
    let word = |name: &str, key: &str| named(name)[key].as_str().unwrap().to_string();
    let own = word("host1", "id");
    let recipient = word("host2", "recipient");
    let admit = |host: &Host, name: &str, id: &str, roles: &[&str]| {
        let mut line = vec!["key", "admit", "--name", name, "--host-id", id];
        line.extend(roles.iter().flat_map(|role| ["--role", role]));
        line.push(&recipient);
        host.vmkeep(&line, minutes(2))
    };
    admit(&first, "host2", &own, &["backup", "restore"])
        .exits(1)
        .one_error()
        .says("that of this very host");
    let id = word("host2", "id");
    admit(&first, "host2", &id, &["none", "backup"]).exits(2);
    admit(&first, "host2", &id, &["none"])
        .exits(0)
        .says("may do nothing");
    assert_eq!(first.json(&["key", "list"], minutes(3))[0]["key_files"], 2);
    second
        .vmkeep(&["backup", "web01"], minutes(3))
        .exits_with_one_of(&[1, 3]);
    first.vmkeep(&["run"], minutes(4)).exits(0);
}

#[test]
fn key_list_tells_of_everybody_who_can_open_the_key() {
    let host = Host::new(&HostOptions::default());
    let config = host.config_text();
    let escrow = |name: &str| {
        let file = host.path(name);
        tool("age-keygen", &["-o", path_text(&file)]);
        let recipient = tool("age-keygen", &["-y", path_text(&file)]);
        let recipient = recipient.trim().to_string();
        let line = format!("escrow = [\"{recipient}\"]\n\n[policy]");
        host.write_config(&config.replace("[policy]", &line));
        host.vmkeep(&["init", "--yes"], start()).exits(0);
        recipient
    };
    // The first is left out of what is wrapped later, and opens the same key all the same.
    let (first, second) = (escrow("first.txt"), escrow("second.txt"));
    let listed = host.json(&["key", "list"], minutes(1));
    let earlier = &listed[0]["escrow_only_in_earlier_key_files"];
    assert_eq!(earlier, &serde_json::json!([first]));
    let newest = &listed[0]["escrow_recipients"];
    assert_eq!(newest, &serde_json::json!([second]));
    let own = &listed[0]["hosts"][0];
    assert_eq!(
        (&own["has_key"], &own["has_any_key"]),
        (&true.into(), &true.into())
    );
    host.vmkeep(&["key", "list"], minutes(1))
        .exits(0)
        .says("(escrow)")
        .says("earlier: opens an older key file");
}

#[test]
fn a_lost_vmkeep_json_is_made_anew_and_no_other_repository_on_top_of_it() {
    let lab = Lab::new(0xbad_0033);
    let picture = lab.web.picture();
    let file = lab.host.store().join("vmkeep.json");
    let facts = || {
        let text = fs::read_to_string(&file).unwrap();
        let mut facts: serde_json::Value = serde_json::from_str(&text).unwrap();
        facts["created_at"].take();
        facts
    };
    let before = facts();
    // Also on a host that knows nothing of it any more.
    for forgets in [false, true] {
        fs::remove_file(&file).unwrap();
        lab.host
            .vmkeep(&["status"], minutes(1))
            .exits(10)
            .one_error()
            .says("only vmkeep.json is missing");
        if forgets {
            fs::remove_file(lab.host.state().join("repository")).unwrap();
        }
        lab.host
            .vmkeep(&["init", "--yes"], minutes(1))
            .exits(0)
            .says("its vmkeep.json was lost");
        assert_eq!(facts(), before);
    }
    lab.restores("web01", &picture, minutes(2));
    lab.host.vmkeep(&["run"], nights(1)).exits(0);
}

#[test]
fn the_mount_point_of_a_disk_that_is_away_gets_no_repository() {
    let lab = Lab::new(0xbad_0034);
    let away = lab.host.path("away");
    fs::rename(lab.host.store(), &away).unwrap();
    for exists in [false, true] {
        if exists {
            fs::create_dir(lab.host.store()).unwrap();
        }
        for line in [&["init", "--yes"][..], &["run"]] {
            lab.host
                .vmkeep(line, nights(1))
                .exits(10)
                .one_error()
                .says("is the disk mounted?")
                .says("this host uses the repository");
        }
        assert_eq!(files_below(lab.host.store()), Vec::<PathBuf>::new());
    }
    fs::remove_dir(lab.host.store()).unwrap();
    fs::rename(&away, lab.host.store()).unwrap();
    lab.host.vmkeep(&["init", "--yes"], nights(1)).exits(0);
    lab.host.vmkeep(&["run"], nights(1)).exits(0);
}

#[test]
fn nobody_is_sent_to_a_new_host_that_no_customer_let_in() {
    let lab = Lab::new(0xbad_0020);
    let listed = lab.host.json(&["key", "list"], minutes(1));
    let recipient = listed[0]["hosts"][0]["recipient"].as_str().unwrap();
    let id = "ab".repeat(32);
    let newco = "\n[[customer]]\nid = \"newco\"\n";
    let config = lab.host.config_text();
    lab.host.write_config(&format!("{config}{newco}"));
    let line = ["key", "admit", "--name", "host2", "--host-id", id.as_str()];
    let line = [&line[..], &["--customer", "newco", recipient]].concat();
    let refused = lab.host.vmkeep(&line, minutes(1));
    refused.exits(1).one_error();
    let sent = refused.stdout.contains("now run on the new host");
    assert!(!sent, "{refused}");
}

#[test]
fn a_repository_of_a_later_format_is_left_alone() {
    let lab = Lab::new(0xbad_0007);
    let file = lab.host.store().join("vmkeep.json");
    let text = fs::read_to_string(&file).unwrap();
    let before = files_below(lab.host.store()).len();
    fs::write(&file, text.replace("\"format\": 1", "\"format\": 2")).unwrap();
    lab.host
        .vmkeep(&["run"], nights(1))
        .exits(1)
        .one_error()
        .says("format 2");
    fs::write(&file, text.replace("[]", "[\"sparse-index\"]")).unwrap();
    lab.host
        .vmkeep(&["run"], nights(1))
        .exits_with_one_of(&[1, 6])
        .one_error()
        .says("sparse-index");
    assert_eq!(files_below(lab.host.store()).len(), before);
    // Another repository in the same place.
    let id = text.find("\"repository\": \"").unwrap() + 15;
    let mut other = text.clone();
    other.replace_range(id..id + 4, "0000");
    fs::write(&file, other).unwrap();
    lab.host
        .vmkeep(&["run"], nights(1))
        .exits(1)
        .one_error()
        .says("another repository");
}

#[test]
fn a_second_run_of_the_host_is_busy_and_harms_nothing() {
    let lab = Lab::new(0xbad_0008);
    let lock = lab.host.state().join("locks/run");
    let holder = fs::File::open(&lock).unwrap();
    rustix::fs::flock(&holder, rustix::fs::FlockOperation::LockExclusive).unwrap();
    lab.host
        .vmkeep(&["run"], nights(1))
        .exits(11)
        .one_error()
        .says("another run");
    drop(holder);
    lab.host.vmkeep(&["run"], nights(1)).exits(0);
}

#[test]
fn damaged_bytes_are_never_restored_with_exit_code_0_and_the_next_full_heals_them() {
    let lab = Lab::new(0xbad_0009);
    let picture = lab.web.picture();
    let acme = lab.host.customer_folder("acme");
    for pack in files_below(&acme.join("packs")) {
        let mut bytes = fs::read(&pack).unwrap();
        let middle = bytes.len() / 3;
        bytes[middle] ^= 0x10;
        let permissions = fs::metadata(&pack).unwrap().permissions();
        fs::remove_file(&pack).unwrap();
        fs::write(&pack, bytes).unwrap();
        fs::set_permissions(&pack, permissions).unwrap();
    }
    let to = lab.host.path("damaged");
    let line = ["restore", "web01", "--at", "latest", "--to", path_text(&to)];
    lab.host.vmkeep(&line, minutes(1)).exits(6).one_error();
    assert!(files_below(&to).is_empty(), "no half image is left");
    lab.host
        .vmkeep(&["verify", "--read-data"], minutes(2))
        .exits(6)
        .says("damage");
    lab.host
        .vmkeep(&["backup", "--full", "acme/web01", "acme/db01"], minutes(3))
        .exits(0);
    lab.restores("web01", &picture, minutes(4));
    // What is damaged and healed is told, and alarms nobody any more.
    lab.host
        .vmkeep(&["verify", "--read-data"], minutes(5))
        .exits(0)
        .says("healed");
    lab.host.vmkeep(&["status"], minutes(5)).exits(0);
}

#[test]
fn lost_packs_are_damage_and_the_next_full_stores_anew_what_was_in_them() {
    let lab = Lab::new(0xbad_0077);
    let picture = lab.web.picture();
    let lose_all = || {
        let acme = lab.host.customer_folder("acme");
        for pack in files_below(&acme.join("packs")) {
            fs::remove_file(pack).unwrap();
        }
    };
    lose_all();
    lab.host
        .vmkeep(&["backup", "--full", "acme/web01", "acme/db01"], minutes(1))
        .exits(0);
    lab.restores("web01", &picture, minutes(2));
    lose_all();
    let to = lab.host.path("lost");
    let line = ["restore", "web01", "--at", "latest", "--to", path_text(&to)];
    lab.host
        .vmkeep(&line, minutes(3))
        .exits(6)
        .one_error()
        .says("vmkeep backup --full web01");
}

#[test]
fn what_a_killed_restore_left_is_told_by_the_next_one_and_stays() {
    let lab = Lab::new(0xbad_0010);
    let to = lab.host.path("restored");
    fs::create_dir(&to).unwrap();
    let part = to.join(".vda.raw.partial-0123456789abcdef");
    fs::write(&part, "part of a disk").unwrap();
    let line = ["restore", "web01", "--at", "latest", "--to", path_text(&to)];
    lab.host
        .vmkeep(&line, minutes(1))
        .exits(0)
        .says(path_text(&part))
        .says("remove it if none is");
    // It may belong to a restore that is still going on.
    assert!(part.exists());
    assert!(to.join("vda.raw").exists());
}

#[test]
fn what_is_meant_for_a_device_becomes_no_folder() {
    let lab = Lab::new(0xbad_0011);
    let folder = lab.host.path("folder");
    let mistyped = std::path::Path::new("/dev/no-such-group/web01");
    let restore = [
        "restore", "web01", "--at", "latest", "--disk", "vda", "--to",
    ];
    for (to, more) in [
        (mistyped, None),
        (mistyped, Some("--force")),
        (&folder, Some("--force")),
    ] {
        let line: Vec<&str> = restore
            .into_iter()
            .chain([path_text(to)])
            .chain(more)
            .collect();
        lab.host
            .vmkeep(&line, minutes(1))
            .exits(2)
            .one_error()
            .says("no block device");
        assert!(!to.exists());
    }
}

#[test]
fn a_folder_below_dev_or_among_what_vmkeep_keeps_is_no_target() {
    let lab = Lab::new(0xbad_0031);
    let overlays = lab.host.path("overlays");
    let host = format!("[host]\noverlay_dir = \"{}\"\n", path_text(&overlays));
    let config = lab.host.config_text().replacen("[host]\n", &host, 1);
    lab.host.write_config(&config);
    let below_dev = tempfile::tempdir_in("/dev").unwrap();
    let link = lab.host.path("link");
    std::os::unix::fs::symlink(lab.host.store(), &link).unwrap();
    for (to, says) in [
        (below_dev.path().to_path_buf(), "no block device"),
        (below_dev.path().join("web01"), "no block device"),
        (lab.host.customer_folder("acme").join("out"), "in the store"),
        (link.join("new/../out"), "in the store"),
        (lab.host.state(), "which is for the identity"),
    ] {
        let line = ["restore", "web01", "--at", "latest", "--to", path_text(&to)];
        lab.host
            .vmkeep(&line, minutes(1))
            .exits(2)
            .one_error()
            .says(says);
        assert!(!to.join("vda.raw").exists());
    }
    assert!(files_below(below_dev.path()).is_empty());
    // Overlays may be anywhere, and vmkeep removes its own folders there alone.
    let to = overlays.join("out");
    let line = ["restore", "web01", "--at", "latest", "--to", path_text(&to)];
    lab.host.vmkeep(&line, minutes(1)).exits(0);
}

#[test]
fn a_device_is_overwritten_with_force_alone() {
    let lab = Lab::new(0xbad_0032);
    let old = vec![7; 3 << 20];
    let device = BrokenDevice::new(&lab.host.path("backing"), &old, old.len() as u64);
    let to = ["--disk", "vda", "--to", &device.device];
    let line = [&["restore", "web01", "--at", "latest"][..], &to].concat();
    let refused = lab.host.vmkeep(&line, minutes(1));
    refused.exits(2).one_error().says("--force confirms that");
    assert!(fs::read(&device.device).unwrap() == old);
    let line = [&line[..], &["--force"]].concat();
    lab.host.vmkeep(&line, minutes(2)).exits(0);
    let disk = fs::read(lab.host.image("web01", "vda")).unwrap();
    let found = fs::read(&device.device).unwrap();
    assert!(found[..disk.len()] == disk && found[disk.len()..] == old[disk.len()..]);
}

#[test]
fn what_was_noted_of_a_point_is_told_when_it_is_restored() {
    let mut lab = Lab::new(0xbad_0033);
    lab.web.resize(3 << 20);
    let night = lab.host.json(&["backup", "acme/web01"], nights(1));
    let note = night["vms"][0]["notes"][0].as_str().unwrap();
    assert!(note.contains("read in full"), "{note}");
    let to = lab.host.path("noted");
    let line = ["restore", "web01", "--at", "latest", "--to", path_text(&to)];
    let told = lab.host.json(&line, nights(1));
    let first = told["notes"][0].as_str().unwrap();
    assert!(first.ends_with(note), "{first}");
    assert_eq!(told["consistency"], "image");
}

#[test]
fn a_date_before_the_first_point_is_answered_with_a_command_that_can_be_typed() {
    let lab = Lab::new(0xbad_0034);
    let line = ["restore", "web01", "--at", "2031-01-01", "--to", "a folder"];
    let line = [&line[..], &["--format", "qcow2"]].concat();
    lab.host
        .vmkeep(&line, minutes(1))
        .exits(1)
        .one_error()
        .says("--to 'a folder' --format qcow2");
}

#[test]
fn a_restore_whose_answer_is_lost_says_that_it_is_done() {
    let lab = Lab::new(0xbad_0035);
    let to = lab.host.path("restored");
    let line = ["restore", "web01", "--at", "latest", "--to", path_text(&to)];
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let mut command = lab.host.command(&line, minutes(1));
    let output = command.stdout(full).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("the command itself is done"), "{said}");
    assert!(to.join("vda.raw").exists());
}

#[test]
fn a_folder_whose_name_is_no_text_is_restored_into_and_shown_as_far_as_it_is_text() {
    let lab = Lab::new(0xbad_0016);
    let to = lab.host.path("").join(OsStr::from_bytes(b"r\xe4um"));
    let line = ["--json", "restore", "web01", "--at", "latest", "--to"];
    let mut command = lab.host.command(&line, minutes(1));
    let output = command.arg(&to).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let path = document["disks"][0]["path"].as_str().unwrap();
    assert!(path.ends_with("r\u{fffd}um/vda.raw"), "{path}");
    assert!(to.join("vda.raw").exists());
}

/// A store of this size, unmounted with the test.
struct SmallStore {
    folder: tempfile::TempDir,
}

impl SmallStore {
    fn new(size: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        tool(
            "mount",
            &[
                "-t",
                "tmpfs",
                "-o",
                &options,
                "tmpfs",
                path_text(folder.path()),
            ],
        );
        SmallStore { folder }
    }
}

impl Drop for SmallStore {
    fn drop(&mut self) {
        let _unmounted = std::process::Command::new("umount")
            .arg(self.folder.path())
            .status();
    }
}

#[test]
fn a_full_store_fails_the_backup_keeps_every_point_and_can_still_be_pruned() {
    let small = SmallStore::new("12m");
    let mut random = Random::new(0xbad_000a);
    let host = Host::new(&HostOptions {
        store: Some(small.folder.path().join("store")),
        policy: "timezone = \"UTC\"\nwindow = \"22:00-06:00\"\nmax_retention = \"7 days\"",
        ..HostOptions::default()
    });
    let size = 4 << 20;
    let noise = random.noise(size);
    let mut guest = Guest::with_content(host.image("web01", "vda"), &noise);
    host.vmkeep(&["init", "--yes"], start()).exits(0);
    host.vmkeep(&["backup", "web01"], start()).exits(0);
    let picture = guest.picture();
    // The second one fits, the third does not.
    let second = random.noise(size);
    guest.write(0, &second);
    host.vmkeep(&["backup", "web01"], nights(1)).exits(0);
    let third = random.noise(size);
    guest.write(0, &third);
    host.vmkeep(&["backup", "web01"], nights(2))
        .exits(1)
        .one_error()
        .says("no space left");
    assert_eq!(host.points(nights(2)).len(), 2);
    let target = host.restore("web01", &start().to_string(), nights(2));
    assert!(Picture::of_file(&target.path().join("vda.raw")) == picture);
    // Filled to the last byte by somebody else.
    let filler = small.folder.path().join("filler");
    let mut file = fs::File::create(&filler).unwrap();
    while std::io::Write::write_all(&mut file, &[0x55; 4096]).is_ok() {}
    drop(file);
    // The first night's time is over: it goes all the same.
    let over = nights(7);
    host.vmkeep(&["prune", "--trust-clock"], over).exits(0);
    assert!(host.points(over).len() < 2, "what is over is gone");
    fs::remove_file(&filler).unwrap();
    host.vmkeep(&["prune"], over).exits(0);
    host.vmkeep(&["backup", "web01"], over).exits(0);
    let target = host.restore("web01", "latest", over);
    assert!(Picture::of_file(&target.path().join("vda.raw")) == guest.picture());
}

#[test]
fn what_is_no_disk_fails_its_vm_and_commits_nothing() {
    let lab = Lab::new(0xbad_000b);
    let picture = lab.db.picture();
    // A link to something that is a file by its kind and no image by its size.
    let image = lab.host.image("web01", "vda");
    fs::remove_file(&image).unwrap();
    std::os::unix::fs::symlink("/proc/self/mem", &image).unwrap();
    lab.host.vmkeep(&["run"], nights(1)).exits(3).says("web01");
    assert_eq!(lab.count(nights(1)), 5);
    lab.restores("db01", &picture, nights(1));
}

/// A loop device whose backing file was cut short behind its back: reads behind the cut fail.
struct BrokenDevice {
    device: String,
}

impl BrokenDevice {
    fn new(backing: &Path, content: &[u8], good_bytes: u64) -> Self {
        fs::write(backing, content).unwrap();
        let device = tool("losetup", &["--find", "--show", path_text(backing)]);
        let file = fs::OpenOptions::new().write(true).open(backing).unwrap();
        file.set_len(good_bytes).unwrap();
        BrokenDevice {
            device: device.trim().to_string(),
        }
    }
}

impl Drop for BrokenDevice {
    fn drop(&mut self) {
        let _detached = std::process::Command::new("losetup")
            .args(["--detach", &self.device])
            .status();
    }
}

#[test]
fn a_read_error_in_the_middle_of_a_disk_fails_its_vm_and_commits_nothing() {
    let mut lab = Lab::new(0xbad_000c);
    let picture = lab.db.picture();
    let image = lab.host.image("web01", "vda");
    let noise = lab.random.noise(4 << 20);
    let broken = BrokenDevice::new(&lab.host.path("backing"), &noise, 2 << 20);
    fs::remove_file(&image).unwrap();
    std::os::unix::fs::symlink(&broken.device, &image).unwrap();
    lab.host
        .vmkeep(&["backup", "acme/web01", "--full"], nights(1))
        .exits(1)
        .one_error()
        .says("web01-vda");
    lab.host.vmkeep(&["run"], nights(1)).exits(3).says("web01");
    assert_eq!(lab.count(nights(1)), 5, "nothing of it is listed");
    lab.restores("db01", &picture, nights(1));
    // Its session was ended: the next prune finds nothing of it.
    lab.host.vmkeep(&["prune"], nights(1)).exits(0);
    lab.host
        .vmkeep(&["verify", "--read-data"], nights(1))
        .exits(0);
}
