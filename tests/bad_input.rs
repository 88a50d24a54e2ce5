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
    // A secret that others can read is refused.
    fs::write(&identity, own).unwrap();
    fs::set_permissions(&identity, fs::Permissions::from_mode(0o644)).unwrap();
    lab.host
        .vmkeep(&["points"], minutes(2))
        .exits(1)
        .one_error()
        .says("chmod 600");
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
