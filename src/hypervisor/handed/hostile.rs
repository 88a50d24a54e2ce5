//! Jobs as nobody should hand them in.

use super::job::{Job, Tracking, parse, read};
use crate::hypervisor::{CaptureErrorKind, Consistency};
use serde_json::{Value, json};
use std::fs;

fn whole() -> Value {
    json!({
        "disks": {
            "drive-scsi1": {
                "socket": "/run/a.nbd", "export": "drive-scsi1", "mode": "none",
            },
            "drive-scsi0": {
                "socket": "/run/a.nbd", "export": "drive-scsi0", "mode": "reuse",
                "bitmap": "snapshot-access:vault", "since": "g1", "generation": "g2",
                "discard": true,
            },
        },
        "definition": {"name": "101.conf", "text": "cores: 2\n"},
        "consistency": "filesystem",
    })
}

fn parsed(value: &Value) -> Result<Job, String> {
    parse(value.to_string().as_bytes())
}

/// The complaint about a job in which the value at a place was exchanged.
#[track_caller]
fn complaint(at: &str, value: Value) -> String {
    let mut job = whole();
    match job.pointer_mut(at) {
        Some(place) => *place = value,
        None => {
            let (parent, key) = at.rsplit_once('/').unwrap();
            job.pointer_mut(parent).unwrap()[key] = value;
        }
    }
    parsed(&job).unwrap_err()
}

#[test]
fn a_job_is_read_as_it_was_meant() {
    let job = parsed(&whole()).unwrap();
    let names: Vec<&str> = job.disks.iter().map(|disk| disk.name.as_str()).collect();
    assert_eq!(names, ["drive-scsi0", "drive-scsi1"]);
    let (first, second) = (&job.disks[0], &job.disks[1]);
    assert_eq!(
        first.tracking,
        Tracking::Reuse {
            bitmap: "snapshot-access:vault".to_string(),
            since: "g1".to_string(),
            generation: Some("g2".to_string()),
        }
    );
    assert!(first.discard && !second.discard);
    assert_eq!(second.tracking, Tracking::Nothing);
    assert_eq!(
        job.definition,
        Some(("101.conf".to_string(), b"cores: 2\n".to_vec()))
    );
    assert_eq!(job.consistency, Consistency::Filesystem);
}

#[test]
fn the_example_of_the_readme_is_a_job() {
    let readme = include_str!("../../../README.md");
    let (_, rest) = readme.split_once("```json\n").expect("an example");
    let (example, _) = rest.split_once("```").expect("its end");
    let job = parse(example.as_bytes()).unwrap();
    assert!(matches!(job.disks[0].tracking, Tracking::Reuse { .. }));
}

#[test]
fn a_key_that_nobody_knows_is_named() {
    for (at, key) in [
        ("/bogus", "bogus"),
        ("/disks/drive-scsi0/trim", "trim"),
        ("/definition/mode", "mode"),
    ] {
        let said = complaint(at, json!(true));
        assert!(said.contains(&format!("unknown field `{key}`")), "{said}");
    }
    let said = complaint("/disks/drive-scsi0/trim", json!(true));
    assert!(said.contains("drive-scsi0"), "{said}");
}

#[test]
fn every_value_that_could_mislead_is_refused() {
    let long = "x".repeat(1024);
    for (at, value, said) in [
        ("/disks", json!({}), "no disks"),
        ("/disks", json!([]), "disks by name"),
        (
            "/disks/..",
            json!({"socket": "/a", "export": "e", "mode": "none"}),
            "not a disk name",
        ),
        (
            "/disks/drive-scsi0/socket",
            json!("run/a.nbd"),
            "not an absolute path",
        ),
        (
            "/disks/drive-scsi0/socket",
            json!("/run/../a.nbd"),
            "not an absolute path",
        ),
        (
            "/disks/drive-scsi0/socket",
            json!(format!("/{long}")),
            "at most 107",
        ),
        (
            "/disks/drive-scsi0/socket",
            json!("/run/a\0b"),
            "no path of a socket",
        ),
        ("/disks/drive-scsi0/socket", json!(7), "string"),
        ("/disks/drive-scsi0/export", json!(""), "export is empty"),
        (
            "/disks/drive-scsi0/export",
            json!("a\nb"),
            "control characters",
        ),
        (
            "/disks/drive-scsi0/export",
            json!("drive-scsi1"),
            "the same export",
        ),
        (
            "/disks/drive-scsi0/bitmap",
            json!(long),
            "bitmap has more than 1023",
        ),
        (
            "/disks/drive-scsi0/bitmap",
            Value::Null,
            "bitmap is missing",
        ),
        ("/disks/drive-scsi0/since", Value::Null, "needs since"),
        (
            "/disks/drive-scsi0/since",
            json!("\u{1b}[2J"),
            "control characters",
        ),
        (
            "/disks/drive-scsi0/since",
            json!("g2"),
            "must differ from since",
        ),
        (
            "/disks/drive-scsi0/generation",
            json!("x".repeat(129)),
            "more than 128",
        ),
        (
            "/disks/drive-scsi0/mode",
            json!("all"),
            "unknown variant `all`",
        ),
        (
            "/disks/drive-scsi0/mode",
            json!("new"),
            "since goes with mode \"reuse\"",
        ),
        (
            "/disks/drive-scsi0/mode",
            json!("none"),
            "goes without bitmap",
        ),
        ("/disks/drive-scsi0/discard", json!("yes"), "boolean"),
        (
            "/disks/drive-scsi1/generation",
            json!("g"),
            "goes without bitmap",
        ),
        (
            "/definition/name",
            json!("../../etc/passwd"),
            "not a plain file name",
        ),
        ("/definition/name", json!(".conf"), "not a plain file name"),
        ("/consistency", json!("sound"), "unknown variant `sound`"),
    ] {
        let complaint = complaint(at, value);
        assert!(complaint.contains(said), "{at}: {complaint}");
    }
}

#[test]
fn a_disk_or_a_key_that_is_there_twice_is_refused() {
    let disk = r#"{"socket": "/a", "export": "e", "mode": "none"}"#;
    let twice = format!(r#"{{"disks": {{"vda": {disk}, "vda": {disk}}}}}"#);
    assert!(
        parse(twice.as_bytes())
            .unwrap_err()
            .contains("\"vda\" is there twice")
    );
    let twice =
        r#"{"disks": {"vda": {"socket": "/a", "socket": "/b", "export": "e", "mode": "none"}}}"#;
    assert!(
        parse(twice.as_bytes())
            .unwrap_err()
            .contains("duplicate field `socket`")
    );
}

#[test]
fn what_is_half_written_says_how_to_write_it() {
    let text = whole().to_string();
    for length in 0..text.len() {
        let said = parse(&text.as_bytes()[..length]).unwrap_err();
        assert!(said.contains("then rename it"), "{length}: {said}");
    }
}

#[test]
fn bytes_without_end_or_sense_are_refused_in_a_bounded_message() {
    let deep = [b"{\"disks\":".as_slice(), &b"[".repeat(100_000)].concat();
    let many: serde_json::Map<String, Value> = (0..300)
        .map(|n| {
            let disk = json!({"socket": "/a", "export": n.to_string(), "mode": "none"});
            (format!("d{n}"), disk)
        })
        .collect();
    let many = json!({ "disks": many }).to_string().into_bytes();
    let loud = format!("{{\"{}\u{1b}[31m\": 1}}", "k".repeat(10_000)).into_bytes();
    let hostile = [
        deep,
        many,
        loud,
        vec![0xff; 100],
        vec![b' '; (1 << 20) + 1],
        Vec::new(),
    ];
    for bytes in hostile {
        let said = parse(&bytes).unwrap_err();
        assert!(said.chars().count() < 500, "{said}");
        assert!(!said.chars().any(char::is_control), "{said}");
    }
}

#[test]
fn without_a_job_the_message_says_who_writes_it() {
    let folder = tempfile::tempdir().unwrap();
    for file in [
        folder.path().join("101.json"),
        folder.path().join("gone/101.json"),
    ] {
        let error = read(&file).unwrap_err();
        assert_eq!(error.kind, CaptureErrorKind::Missing);
        assert!(error.to_string().contains("no job is handed in"), "{error}");
        assert!(error.to_string().contains("101.json"), "{error}");
    }
}

#[test]
fn what_is_no_file_is_not_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    for path in [pipe.as_path(), folder.path()] {
        let error = read(path).unwrap_err();
        assert!(error.to_string().contains("is not a file"), "{error}");
    }
    let file = folder.path().join("job");
    fs::write(&file, whole().to_string()).unwrap();
    assert!(read(&file).is_ok());
}
