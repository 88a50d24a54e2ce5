use super::*;
use crate::model::LockMode;

const POLICY: &str = "[repository]\nurl = \"/srv/store\"\n[policy]\ntimezone = \"UTC\"\n";

fn read_text(text: &str) -> Result<Config, Vec<String>> {
    read_files(text, &[])
}

fn read_files(text: &str, parts: &[(&str, &str)]) -> Result<Config, Vec<String>> {
    let mut problems = Vec::new();
    let parts: Vec<(PathBuf, String)> = parts
        .iter()
        .map(|(file, text)| (PathBuf::from(file), text.to_string()))
        .collect();
    let config = read(Path::new("vmkeep.toml"), text, &parts, &mut problems);
    match (config, problems.is_empty()) {
        (Some(config), true) => Ok(config),
        _ => Err(problems.iter().map(Problem::to_string).collect()),
    }
}

/// The problems of a file that has the general part and then `customer`.
fn problems_of(customer: &str) -> Vec<String> {
    read_text(&format!("{POLICY}{customer}")).expect_err(customer)
}

fn images(vm: &Vm) -> &[Disk] {
    match &vm.source {
        VmSource::Images(disks) => disks,
        other => panic!("{other:?}"),
    }
}

fn assert_one(problems: &[String], parts: &[&str]) {
    assert_eq!(problems.len(), 1, "{problems:#?}");
    for part in parts {
        assert!(problems[0].contains(part), "{part:?} in {:?}", problems[0]);
    }
}

const WEB01: &str = "[[customer]]\nid = \"acme\"\n[[customer.vm]]\nname = \"web01\"\n";

#[test]
fn every_example_is_a_valid_configuration() {
    let full = load(Path::new("config/vmkeep.toml")).expect("config/vmkeep.toml");
    assert_eq!(full.customers.len(), 2);
    assert_eq!(full.customers[1].terms.max_retention, "7 days");
    assert_eq!(full.customers[1].terms.restore_window, "14 days");
    assert_eq!(
        images(&full.customers[0].vms[1])[0].format,
        DiskFormat::Qcow2
    );
    assert_eq!(images(&full.customers[0].vms[1])[1].format, DiskFormat::Raw);
    load(Path::new("config/minimal.toml")).expect("config/minimal.toml");
    load(Path::new("config/bucket.toml")).expect("config/bucket.toml");
}

#[test]
fn a_host_is_a_keeper_unless_it_says_that_it_is_an_agent() {
    let with = |role: &str| {
        read_text(&format!(
            "[host]\n{role}\n{POLICY}{WEB01}disks = {{ vda = \"/a.raw\" }}\n"
        ))
    };
    for (line, role) in [
        ("", HostRole::Keeper),
        ("role = \"keeper\"", HostRole::Keeper),
        ("role = \"agent\"", HostRole::Agent),
    ] {
        assert_eq!(with(line).expect(line).host.role, role);
    }
    assert_one(
        &with("role = \"agnet\"").expect_err("a slip"),
        &[
            "vmkeep.toml:2: host.role: \"agnet\" is not \"agent\" or \"keeper\"",
            "did you mean \"agent\"?",
        ],
    );
    // Whatever it was meant to be, it is not guessed.
    assert_one(
        &with("role = \"admin\"").expect_err("another word"),
        &["host.role: \"admin\" is not"],
    );
}

#[test]
fn the_example_of_a_bucket_shows_every_key_and_its_defaults() {
    let text = std::fs::read_to_string("config/bucket.toml").expect("config/bucket.toml");
    let shown = load(Path::new("config/bucket.toml")).expect("config/bucket.toml");
    // Each of the others is another way to say what the example says already.
    let others = [
        "profile",
        "secret_access_key_command",
        "secret_access_key_credential",
    ];
    let limits = [
        "allowed_regions",
        "lock",
        "upload_limit",
        "download_limit",
        "ca_file",
        "escrow",
    ];
    let uncommented: String = text
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(rest)
                if rest.contains(" = ")
                    && !others
                        .iter()
                        .chain(&limits)
                        .any(|key| rest.starts_with(key)) =>
            {
                format!("{rest}\n")
            }
            _ => format!("{line}\n"),
        })
        .collect();
    assert_ne!(uncommented, text);
    let spelled_out = read_text(&uncommented).expect("the example with its defaults");
    assert_eq!(spelled_out.repository, shown.repository);
    for key in others.iter().chain(&limits) {
        assert!(text.contains(&format!("# {key} = ")), "{key}");
    }
}

#[test]
fn the_defaults_shown_in_the_full_example_are_those_of_the_minimal_one() {
    let text = std::fs::read_to_string("config/vmkeep.toml").expect("config/vmkeep.toml");
    let uncommented: String = text
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(rest)
                if [
                    "reserve",
                    "chunk_size",
                    "pack_size",
                    "compression_level",
                    "writers",
                ]
                .iter()
                .any(|key| rest.starts_with(&format!("{key} = "))) =>
            {
                format!("{rest}\n")
            }
            _ => format!("{line}\n"),
        })
        .collect();
    let full = read_text(&uncommented).expect("the full example");
    let minimal = load(Path::new("config/minimal.toml")).expect("config/minimal.toml");
    assert_eq!(
        full.repository.reserve_bytes,
        minimal.repository.reserve_bytes
    );
    assert_eq!(full.repository.chunk_bytes, minimal.repository.chunk_bytes);
    assert_eq!(full.repository.pack_bytes, minimal.repository.pack_bytes);
    assert_eq!(
        full.repository.compression_level,
        minimal.repository.compression_level
    );
    assert_eq!(full.repository.writers, minimal.repository.writers);
    assert_eq!(full.terms, minimal.terms);
    assert_eq!(full.host, minimal.host);
}

#[test]
fn a_size_without_a_unit_is_a_number_as_toml_has_them() {
    let with_reserve = |number: &str| {
        let general = POLICY.replace("[policy]", &format!("reserve = {number}\n[policy]"));
        read_text(&format!("{general}{WEB01}disks = {{ vda = \"/i/a\" }}\n"))
    };
    for number in [
        "2097152",
        "2_097_152",
        "0x200000",
        "0b1000000000000000000000",
    ] {
        let config = with_reserve(number).expect(number);
        assert_eq!(config.repository.reserve_bytes, 2 << 20, "{number}");
    }
    let problems = with_reserve("-1").expect_err("less than nothing");
    assert_one(&problems, &["repository.reserve", "is not a size"]);
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_what_was_meant() {
    let problems = problems_of(&format!(
        "{WEB01}disks = {{ vda = \"/i/a\" }}\nbogus = 1\n[[customer]]\nid = \"b\"\nmax_retnetion = \"7 days\"\n"
    ));
    assert_eq!(
        problems,
        [
            "vmkeep.toml:10: customer.acme.vm.web01.bogus: unknown key (known here: name, disks, qmp, libvirt, nbd)",
            "vmkeep.toml:13: customer.b.max_retnetion: unknown key (did you mean \"max_retention\"?)",
        ]
    );
}

#[test]
fn a_key_in_the_wrong_table_is_told_where_it_belongs() {
    assert_one(
        &problems_of("[[customer]]\nid = \"acme\"\ntimezone = \"UTC\"\n"),
        &["customer.acme.timezone", "in [policy]"],
    );
    let problems = read_files(
        POLICY,
        &[("customers.d/acme.toml", "[[customer]]\nid = \"acme\"\n")],
    )
    .expect_err("nested");
    assert_eq!(problems.len(), 2, "{problems:#?}");
    assert!(problems[1].contains("without [[customer]]"));
}

#[test]
fn several_problems_are_reported_at_once() {
    let problems = read_text(
        "[host]\nclock = \"sometimes\"\nthreads = 0\n[repository]\nurl = \"relative\"\nchunk_size = \"96 KiB\"\npack_size = \"1 GiB\"\ncompression_level = 22\nwriters = \"two\"\n",
    )
    .expect_err("all of it is wrong");
    for expected in [
        "vmkeep.toml:2: host.clock: \"sometimes\" is not",
        "vmkeep.toml:3: host.threads: 1 to 1024",
        "vmkeep.toml:5: repository.url: relative is not an absolute path",
        "vmkeep.toml:6: repository.chunk_size: 64 KiB",
        "vmkeep.toml:7: repository.pack_size: 1 MiB to 256 MiB",
        "vmkeep.toml:8: repository.compression_level: 1 (fast)",
        "vmkeep.toml:9: repository.writers: is neither",
        "policy: is missing",
    ] {
        assert!(
            problems.iter().any(|problem| problem.contains(expected)),
            "{expected} in {problems:#?}"
        );
    }
}

/// A configuration whose repository is `url` and has `s3` below `[repository.s3]`.
fn in_bucket(url: &str, s3: &str) -> Result<Bucket, Vec<String>> {
    let text = format!(
        "[policy]\ntimezone = \"UTC\"\n[[customer]]\nid = \"acme\"\n[[customer.vm]]\nname = \"web01\"\n\
         disks = {{ vda = \"/a.raw\" }}\n[repository]\nurl = \"{url}\"\n[repository.s3]\n{s3}\n"
    );
    match read_text(&text)?.repository.place {
        Place::Bucket(bucket) => Ok(*bucket),
        Place::Directory(directory) => panic!("{} is a directory", directory.display()),
    }
}

#[test]
fn a_lock_is_one_of_two_words() {
    let with = |lock: &str| in_bucket("s3://backups", &format!("region = \"eu\"\nlock = {lock}"));
    for mode in [LockMode::Governance, LockMode::Compliance] {
        let bucket = with(&format!("{:?}", mode.as_str())).unwrap();
        assert_eq!(bucket.lock, Some(mode));
    }
    let told = format!("{:?}", with("\"complaince\"").expect_err("a slip"));
    assert!(
        told.contains("is not") && told.contains("compliance"),
        "{told}"
    );
    with("true").expect_err("not a word");
}

#[test]
fn a_bucket_has_an_endpoint_or_a_region_and_sensible_defaults() {
    let given = in_bucket(
        "s3://backups/vmkeep/eu/",
        "endpoint = \"https://s3.example.net:9000/\"\naccess_key_id = \"AK\"\nsecret_access_key_file = \"/etc/vmkeep/s3\"\nupload_limit = \"20 MiB\"",
    );
    let expected = Bucket {
        name: "backups".to_string(),
        prefix: "vmkeep/eu".to_string(),
        endpoint: Some("https://s3.example.net:9000".to_string()),
        region: "us-east-1".to_string(),
        path_style: true,
        ca_file: None,
        credentials: BucketCredentials::Given {
            access_key_id: "AK".to_string(),
            secret_access_key: SecretSource::File("/etc/vmkeep/s3".into()),
        },
        allowed_regions: Vec::new(),
        lock: None,
        connections: 8,
        upload_bytes_per_second: Some(20 << 20),
        download_bytes_per_second: None,
        cache_bytes: 1 << 30,
    };
    assert_eq!(given, Ok(expected));
    let at_aws = in_bucket(
        "s3://backups",
        "region = \"eu-central-1\"\nprofile = \"backup\"",
    )
    .unwrap();
    assert_eq!((at_aws.endpoint, at_aws.path_style), (None, false));
    assert_eq!(at_aws.prefix, "");
    let profile = Some("backup".to_string());
    assert_eq!(at_aws.credentials, BucketCredentials::Found { profile });
}

#[test]
fn what_is_wrong_with_a_bucket_is_said_with_what_to_do() {
    let fine = "region = \"eu-central-1\"\n";
    for (url, s3, expected) in [
        ("s3:/x", fine, "write \"s3://bucket\""),
        ("s3://UPPER", fine, "is not the name of a bucket"),
        ("s3://ab", fine, "is not the name of a bucket"),
        ("s3://-ab", fine, "is not the name of a bucket"),
        ("s3://backups//x", fine, "the prefix"),
        ("s3://backups/../x", fine, "the prefix"),
        ("s3://backups", "", "region: is missing"),
        (
            "s3://backups",
            "endpoint = \"http://s3.example.net\"",
            "allow_http = true",
        ),
        (
            "s3://backups",
            "endpoint = \"s3.example.net\"",
            "such as \"https://",
        ),
        (
            "s3://backups",
            "endpoint = \"https://a/b\"",
            "a host and perhaps a port",
        ),
        ("s3://backups", "region = \"eu central\"", "region: such as"),
        (
            "s3://backups",
            "region = \"x\"\nconnections = 0",
            "1 to 256",
        ),
        (
            "s3://backups",
            "region = \"x\"\nupload_limit = \"1 KiB\"",
            "at least \"64 KiB\"",
        ),
        (
            "s3://backups",
            "region = \"x\"\naccess_key_id = \"AK\"",
            "needs secret_access_key_file",
        ),
        (
            "s3://backups",
            "region = \"x\"\nsecret_access_key_file = \"/a\"",
            "access_key_id: is missing",
        ),
        (
            "s3://backups",
            "region = \"x\"\naccess_key_id = \"AK\"\nsecret_access_key_file = \"/a\"\nsecret_access_key_credential = \"s3\"",
            "in more than one way",
        ),
        (
            "s3://backups",
            "region = \"x\"\naccess_key_id = \"AK\"\nsecret_access_key_file = \"/a\"\nprofile = \"b\"",
            "either a profile or an access_key_id",
        ),
        (
            "s3://backups",
            "region = \"x\"\nsecret_access_key = \"SK\"",
            "a secret does not stand in the configuration",
        ),
        (
            "s3://backups",
            "region = \"x\"\nsecret_access_key_credential = \"../s3\"",
            "without a path",
        ),
        (
            "s3://backups",
            "region = \"x\"\npath_stile = true",
            "did you mean \"path_style\"",
        ),
    ] {
        let problems = in_bucket(url, s3).expect_err(expected);
        assert!(
            problems.iter().any(|problem| problem.contains(expected)),
            "{expected} in {problems:#?}"
        );
    }
    let without = "[repository]\nurl = \"s3://backups\"\n[policy]\ntimezone = \"UTC\"\n";
    assert_one(
        &read_text(without).expect_err("no table"),
        &[
            "vmkeep.toml:2: repository.url",
            "a bucket needs [repository.s3]",
        ],
    );
}

#[test]
fn a_running_vm_names_its_monitor_or_its_domain() {
    let source_of = |own: &str| {
        let text = format!("{WEB01}{own}\n");
        let config = read_text(&format!("{POLICY}{text}")).expect("right");
        config.customers[0].vms[0].source.clone()
    };
    assert_eq!(
        source_of("qmp = \"/run/a.qmp\"\nguest_agent = \"/run/a.qga\"\nexclude = [\"vdb\"]"),
        VmSource::Qmp(QmpVm {
            monitor: "/run/a.qmp".into(),
            guest_agent: Some("/run/a.qga".into()),
            fsfreeze: FsFreeze::Try,
            exclude: vec![crate::model::DiskName::new("vdb").unwrap()],
        })
    );
    assert_eq!(
        source_of("libvirt = \"mail01\"\nfsfreeze = \"never\""),
        VmSource::Libvirt(LibvirtVm {
            domain: "mail01".to_string(),
            fsfreeze: FsFreeze::Never,
        })
    );
    assert_eq!(
        source_of("nbd = \"/run/vmkeep/101.json\""),
        VmSource::Nbd("/run/vmkeep/101.json".into())
    );
    for (own, said) in [
        ("nbd = \"101.json\"", "absolute"),
        (
            "nbd = \"/a\"\nfsfreeze = \"try\"",
            "whoever hands the job in freezes",
        ),
        ("nbd = \"/a\"\nqmp = \"/b\"", "found qmp and nbd"),
        ("qmp = \"a.qmp\"", "absolute"),
        ("qmp = \"/a\"\nfsfreeze = \"require\"", "needs guest_agent"),
        (
            "qmp = \"/a\"\nfsfreeze = \"maybe\"",
            "\"require\", \"try\" or \"never\"",
        ),
        ("libvirt = \"--all\"", "not the name of a domain"),
        (
            "libvirt = \"a\"\nguest_agent = \"/a\"",
            "goes with qmp only",
        ),
        (
            "disks = { vda = \"/i/a\" }\nfsfreeze = \"try\"",
            "goes with qmp and libvirt",
        ),
    ] {
        assert_one(&problems_of(&format!("{WEB01}{own}\n")), &[said]);
    }
}

#[test]
fn a_vm_has_exactly_one_source() {
    assert_one(&problems_of(WEB01), &["vm.web01.disks: is missing"]);
    let both = problems_of(&format!(
        "{WEB01}disks = {{ vda = \"/i/a\" }}\nlibvirt = \"web01\"\n"
    ));
    assert!(both[0].contains("found disks and libvirt"), "{both:#?}");
    assert_one(
        &problems_of(&format!("{WEB01}disks = {{}}\n")),
        &["at least one disk"],
    );
}

#[test]
fn names_that_are_paths_are_refused() {
    for text in [
        "[[customer]]\nid = \"../acme\"\n".to_string(),
        "[[customer]]\nid = \"acme\"\n[[customer.vm]]\nname = \"a/b\"\ndisks = { vda = \"/a\" }\n"
            .to_string(),
        format!("{WEB01}disks = {{ \"../vda\" = \"/a\" }}\n"),
    ] {
        assert_one(&problems_of(&text), &["path separator"]);
    }
}

#[test]
fn names_and_disks_are_used_once() {
    assert_one(
        &problems_of("[[customer]]\nid = \"a\"\n[[customer]]\nid = \"a\"\n"),
        &["vmkeep.toml:8: customer.id", "already in vmkeep.toml:6"],
    );
    let twice = "[[customer.vm]]\nname = \"v\"\ndisks = { vda = \"/i/a\" }\n[[customer.vm]]\nname = \"v\"\ndisks = { vda = \"/i/b\" }\n";
    assert_one(
        &problems_of(&format!("[[customer]]\nid = \"a\"\n{twice}")),
        &["VM \"v\" is already in vmkeep.toml:8"],
    );
    let part = "id = \"b\"\n[[vm]]\nname = \"w\"\ndisks = { vda = \"/i//a/\" }\n";
    let problems = read_files(
        &format!("{POLICY}{WEB01}disks = {{ vda = \"/i/a\" }}\n"),
        &[("customers.d/b.toml", part)],
    )
    .expect_err("the same disk");
    assert_one(
        &problems,
        &[
            "customers.d/b.toml:4: customer.b.vm.w.disks.vda",
            "already a disk in vmkeep.toml:9",
        ],
    );
}

#[test]
fn paths_are_absolute_and_go_down_only() {
    assert_one(
        &problems_of(&format!("{WEB01}disks = {{ vda = \"images/a\" }}\n")),
        &["not an absolute path"],
    );
    assert_one(
        &problems_of(&format!("{WEB01}disks = {{ vda = \"/i/../a\" }}\n")),
        &["\"..\""],
    );
}

#[test]
fn nothing_that_must_last_lies_where_copies_come_and_go() {
    let with = |state_dir: &str, overlay_dir: &str| {
        let host = format!("state_dir = \"{state_dir}\"\noverlay_dir = \"{overlay_dir}\"\n");
        read_text(&format!(
            "[host]\n{host}{POLICY}{WEB01}disks = {{ vda = \"/a.raw\" }}\n"
        ))
    };
    for state_dir in ["/var/lib/vmkeep", "/srv/store", "/srv"] {
        with(state_dir, "/var/cache/vmkeep").expect(state_dir);
    }
    let problems = with("/v", "/v/cache/overlays").unwrap_err();
    assert_one(
        &problems,
        &["vmkeep.toml:1: host", "overlay_dir", "below /v/cache"],
    );
    let store = POLICY.replace("/srv/store", "/v/cache");
    let text =
        format!("[host]\nstate_dir = \"/v\"\n{store}{WEB01}disks = {{ vda = \"/a.raw\" }}\n");
    let problems = read_text(&text).unwrap_err();
    assert_one(&problems, &["vmkeep.toml:3: repository", "url is /v/cache"]);
}

#[test]
fn a_customer_file_has_the_keys_of_one_customer() {
    let part = "id = \"b\"\nmax_retention = \"20 days\"\n[[vm]]\nname = \"w\"\ndisks = { vda = { path = \"/dev/vg/w\", format = \"raw\" } }\n";
    let config = read_files(POLICY, &[("customers.d/b.toml", part)]).expect("one customer");
    let customer = &config.customers[0];
    assert_eq!(customer.name.as_str(), "b");
    assert_eq!(customer.file, Path::new("customers.d/b.toml"));
    assert_eq!(customer.terms.max_retention, "20 days");
    assert_eq!(customer.terms.timezone, "UTC");
    assert_eq!(images(&customer.vms[0])[0].path, Path::new("/dev/vg/w"));
}

#[test]
fn a_format_is_said_or_follows_the_name_and_nothing_else() {
    let disks = "disks = { a = \"/i/a.qcow2\", b = \"/i/b.img\", c = { path = \"/i/c.qcow2\", format = \"raw\" } }\n";
    let config = read_text(&format!("{POLICY}{WEB01}{disks}")).expect("three disks");
    let formats: Vec<DiskFormat> = images(&config.customers[0].vms[0])
        .iter()
        .map(|disk| disk.format)
        .collect();
    assert_eq!(
        formats,
        [DiskFormat::Qcow2, DiskFormat::Raw, DiskFormat::Raw]
    );
    assert_one(
        &problems_of(&format!(
            "{WEB01}disks = {{ a = {{ path = \"/a\", format = \"vmdk\" }} }}\n"
        )),
        &["disks.a.format", "\"vmdk\""],
    );
}

#[test]
fn an_escrow_recipient_is_a_public_key_with_a_right_checksum() {
    for (text, expected) in [
        (
            "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8q",
            "not an age recipient",
        ),
        ("ssh-ed25519 AAAA", "not an age recipient"),
        ("AGE-SECRET-KEY-1XYZ", "secret key"),
    ] {
        assert_one(
            &problems_of(&format!(
                "[[customer]]\nid = \"a\"\nescrow = [\"{text}\"]\n"
            )),
            &["customer.a.escrow", expected],
        );
    }
}

#[test]
fn what_is_not_toml_is_said_with_its_line() {
    let problems = read_text("[host]\nclock = verified\n").expect_err("no quotes");
    assert_one(&problems, &["vmkeep.toml:2: not TOML"]);
}

#[test]
fn a_wrong_type_is_said() {
    assert_one(
        &problems_of("[[customer]]\nid = 7\n"),
        &["customer.id: expected a string in quotes, found integer"],
    );
    assert_one(
        &problems_of("[customer]\nid = \"a\"\n"),
        &["customer: expected tables written as [[customer]], found table"],
    );
}

#[test]
fn a_missing_file_is_one_clear_problem() {
    let error = load(Path::new("/nonexistent/vmkeep.toml")).expect_err("missing");
    assert_eq!(error.problems.len(), 1);
    assert!(error.to_string().contains("--config FILE"), "{error}");
}

#[test]
fn a_configuration_without_customers_protects_nothing_and_is_refused() {
    assert_one(
        &read_text(POLICY).expect_err("no customers"),
        &["no customer"],
    );
}

#[test]
fn an_override_that_keeps_more_is_refused_with_line_and_arithmetic() {
    assert_one(
        &problems_of("[[customer]]\nid = \"a\"\nmax_retention = \"3 months\"\n"),
        &[
            "vmkeep.toml:7: customer.a.max_retention: \"3 months\": a customer may only shorten it",
            "92 days at the longest",
            "59 days at the shortest",
        ],
    );
    assert_one(
        &problems_of("[[customer]]\nid = \"a\"\nerase_budget = \"5 days\"\n"),
        &[
            "vmkeep.toml:7: customer.a.erase_budget",
            "54 days (59 − 5)",
            "37 days (59 − 22)",
        ],
    );
}

#[test]
fn a_maximum_too_short_for_one_night_is_refused_with_the_arithmetic() {
    assert_one(
        &problems_of("[[customer]]\nid = \"a\"\nmax_retention = \"2 days\"\n"),
        &[
            "vmkeep.toml:7: customer.a.max_retention",
            "= 3, and 2 days is 2",
        ],
    );
    let house = "[repository]\nurl = \"/s\"\n[policy]\ntimezone = \"UTC\"\nmax_retention = \"20 days\"\nerase_budget = \"19 days\"\n[[customer]]\nid = \"a\"\n";
    assert_one(
        &read_text(house).expect_err("no night is left"),
        &[
            "vmkeep.toml:6: policy.erase_budget",
            "20 days (maximum) − 19 (erase budget) − 1 night = 0",
        ],
    );
}

#[test]
fn the_problems_of_all_policies_are_reported_at_once() {
    let house = "[repository]\nurl = \"/s\"\n[policy]\ntimezone = \"Mars/Olympus\"\nwindow = \"22\"\nmax_retention = \"two months\"\n";
    let customers = "[[customer]]\nid = \"a\"\nmax_retention = \"7 moons\"\nkeep_after_window = \"some\"\n[[customer]]\nid = \"b\"\nmax_retention = \"7 days\"\n";
    let problems = read_text(&format!("{house}{customers}")).expect_err("five problems");
    let places: Vec<&str> = problems
        .iter()
        .filter_map(|problem| problem.split(": ").next())
        .collect();
    assert_eq!(
        places,
        [4, 5, 6, 9, 10].map(|line| format!("vmkeep.toml:{line}")),
        "{problems:#?}"
    );
    let longer = "[[customer]]\nid = \"a\"\nmax_retention = \"1 year\"\nrestore_window = \"1 month\"\nkeep_after_window = \"all\"\n[[customer]]\nid = \"b\"\nmax_retention = \"1 day\"\n";
    let problems = problems_of(longer);
    assert_eq!(problems.len(), 4, "{problems:#?}");
}

#[test]
fn a_customer_has_the_terms_that_hold_and_what_they_mean() {
    let config = read_text(&format!(
        "{POLICY}[[customer]]\nid = \"a\"\n[[customer]]\nid = \"b\"\nmax_retention = \"7 days\"\n"
    ))
    .expect("two customers");
    let (a, b) = (&config.customers[0], &config.customers[1]);
    assert_eq!(a.terms, config.terms);
    assert_eq!(a.policy.effective().restore_window_days, 14);
    assert_eq!(b.overrides.max_retention.as_deref(), Some("7 days"));
    assert_eq!(b.policy.terms(), &b.terms);
    assert_eq!(b.policy.effective().restore_window_days, 5);
    assert!(b.policy.effective().shrunk);
}

/// The problems of a `[notify]` beside a configuration that is sound.
fn notified(notify: &str) -> Result<Notify, Vec<String>> {
    read_text(&format!(
        "{POLICY}{WEB01}disks = {{ vda = \"/a.raw\" }}\n[notify]\n{notify}\n"
    ))
    .map(|config| config.notify)
}

#[test]
fn the_example_shows_every_key_of_the_notifications_and_its_default() {
    let text = std::fs::read_to_string("config/vmkeep.toml").expect("config/vmkeep.toml");
    let (_, rest) = text.split_once("[notify]\n").expect("[notify]");
    let (shown, _) = rest.split_once("\n[policy]").expect("[policy]");
    let line = |line: &str| match line.strip_prefix("# ") {
        Some(rest) if rest.contains(" = ") || rest.starts_with("[[") => rest.to_string(),
        _ => line.to_string(),
    };
    let uncommented: Vec<String> = shown.lines().map(line).collect();
    let all = notified(&uncommented.join("\n")).expect("every key");
    let defaults = notified("").expect("no key");
    assert_eq!(defaults, Notify::default());
    let general = Notify {
        journald: None,
        webhooks: Vec::new(),
        mails: Vec::new(),
        pings: Vec::new(),
        ..all.clone()
    };
    assert_eq!(general, defaults);
    assert_eq!(all.journald, Some(true));
    let [webhook] = all.webhooks.as_slice() else {
        panic!("one webhook: {all:?}");
    };
    assert_eq!(webhook.headers.len(), 2);
    assert_eq!(webhook.ca_file, Some("/etc/vmkeep/ca.pem".into()));
    let mail = NotifyMail {
        server: "smtp.example.com".to_string(),
        port: 587,
        tls: MailEncryption::Starttls,
        from: "vmkeep <vmkeep@example.com>".to_string(),
        to: vec!["admin@example.com".into(), "noc@example.com".into()],
        credentials: Some((
            "vmkeep".to_string(),
            SecretSource::File("/etc/vmkeep/smtp-password".into()),
        )),
        ca_file: None,
    };
    assert_eq!(all.mails, [mail]);
    let ping = NotifyPing {
        url: UrlSource::Secret(SecretSource::File("/etc/vmkeep/healthchecks-url".into())),
        allow_http: false,
        ca_file: None,
    };
    assert_eq!(all.pings, [ping]);
    // The other ways to say where a secret is.
    for (old, new) in [
        ("url = \"https://hooks.example.com/vmkeep\"", "url_"),
        ("password_file = \"/etc/vmkeep/smtp-password\"", "password_"),
    ] {
        let others = shown.lines().filter_map(|line| line.strip_prefix("## "));
        for other in others.filter(|line| line.starts_with(new)) {
            let text = uncommented.join("\n");
            assert!(text.contains(old), "{old}");
            notified(&text.replace(old, other)).expect(other);
        }
    }
}

#[test]
fn ports_follow_from_how_mail_is_encrypted() {
    let mail = |lines: &str| {
        let text = format!(
            "[[notify.mail]]\nserver = \"localhost\"\nfrom = \"a@b.example\"\n\
             to = [\"c@d.example\"]\n{lines}"
        );
        let notify = notified(&text).expect(lines);
        notify.mails.first().map(|mail| mail.port)
    };
    assert_eq!(mail(""), Some(587));
    assert_eq!(mail("tls = \"tls\""), Some(465));
    assert_eq!(mail("tls = \"none\""), Some(25));
    assert_eq!(mail("tls = \"tls\"\nport = 2525"), Some(2525));
}

#[test]
fn what_is_wrong_with_a_receiver_is_said_with_its_line_and_what_to_do() {
    let mail = "[[notify.mail]]\nserver = \"smtp.example.com\"\nfrom = \"a@b.example\"\n\
                to = [\"c@d.example\"]\n";
    let in_mail = |line: &str| format!("{mail}{line}");
    let in_webhook =
        |line: &str| format!("[[notify.webhook]]\nurl = \"https://hooks.example.com/x\"\n{line}");
    for (text, expected) in [
        (
            "report = \"sometimes\"".to_string(),
            "notify.report: \"sometimes\" is not",
        ),
        ("report = \"alway\"".to_string(), "did you mean \"always\"?"),
        ("remind_every = \"1s\"".to_string(), "1 minute to 1 year"),
        ("timeout = \"1h\"".to_string(), "1s to 10m"),
        ("journald = \"yes\"".to_string(), "true or false"),
        (
            "url = \"https://a/b\"".to_string(),
            "belongs in [[notify.webhook]]",
        ),
        ("[notify.mail]".to_string(), "written as [[notify.mail]]"),
        ("[[notify.webhok]]".to_string(), "did you mean \"webhook\"?"),
        (
            "[[notify.webhook]]".to_string(),
            "url: is missing: url, url_file, url_command",
        ),
        (
            "[[notify.ping]]\nurl = \"hc/x\"".to_string(),
            "such as \"https://",
        ),
        (
            "[[notify.ping]]\nurl_file = \"x\"".to_string(),
            "not an absolute path",
        ),
        (
            "[[notify.ping]]\nurl = \"http://hc.example/s3cret\"".to_string(),
            "allow_http = true",
        ),
        (in_webhook("url_file = \"/x\""), "in more than one way"),
        (in_webhook("timeout = \"1s\""), "belongs in [notify]"),
        (in_webhook("signing_key = \"s3cret\""), "signing_key_file"),
        (
            in_webhook("headers = { Authorization = \"Bearer s3cret\" }"),
            "Authorization: a secret does not stand in the configuration",
        ),
        (
            in_webhook("headers = { Host = \"x\" }"),
            "the request's own",
        ),
        (
            in_webhook("headers = { \"a b\" = \"x\" }"),
            "letters, digits",
        ),
        (
            in_webhook("headers = { X-A = \"a\\nb\" }"),
            "one line of ASCII",
        ),
        (
            in_webhook("headers = { X-A = 7 }"),
            "a text, or a table with file",
        ),
        (
            in_webhook("headers = { X-A = { fiel = \"/x\" } }"),
            "did you mean \"file\"?",
        ),
        (in_mail("password = \"s3cret\""), "password_file"),
        (in_mail("username = \"x\""), "needs password_file"),
        (in_mail("password_file = \"/x\""), "username: is missing"),
        (
            in_mail("username = \"x\"\npassword_file = \"/x\"\npassword_credential = \"y\""),
            "one of password_file, password_command or password_credential",
        ),
        (in_mail("tls = \"none\""), "allow_plain = true"),
        (in_mail("tls = \"ssl\""), "tls: \"ssl\" is not \"starttls\""),
        (in_mail("port = 0"), "1 to 65535"),
        (
            mail.replace("smtp.example.com", "smtp.example.com:25"),
            "a key of its own",
        ),
        (
            mail.replace("c@d.example", "admin"),
            "notify.mail.to: \"admin\" is not an address",
        ),
        (
            mail.replace("a@b.example", "a@b\\r\\nBcc: c@d"),
            "is not an address",
        ),
        (
            mail.replace("to = [\"c@d.example\"]\n", ""),
            "to: is missing",
        ),
    ] {
        let problems = notified(&text).expect_err(&text);
        let told = problems.join("\n");
        assert!(told.contains(expected), "{expected:?} in {told}");
        assert!(told.contains("vmkeep.toml:"), "{told}");
        assert!(!told.contains("s3cret"), "{told}");
    }
    let allowed = "[[notify.ping]]\nurl = \"http://hc.example/x\"\nallow_http = true";
    assert_eq!(notified(allowed).expect("allowed").pings.len(), 1);
    notified(&in_mail("tls = \"none\"\nallow_plain = true")).expect("allowed");
}

#[test]
fn a_configuration_shows_of_an_address_no_more_than_its_host() {
    let notify = notified("[[notify.ping]]\nurl = \"https://hc.example/s3cret\"").expect("sound");
    let shown = format!("{notify:?}");
    assert!(
        shown.contains("hc.example") && !shown.contains("s3cret"),
        "{shown}"
    );
}
