//! Monitors that lie, stall and hang up: each must end in an error that names the VM, in time, and
//! what was left in QEMU by then is cleaned by the next `recover`.

use super::connection::Limits;
use super::testing::{Act, Asked, DISK_BYTES, FakeQemu};
use super::{QmpSettings, QmpSource};
use crate::hypervisor::guard::GuardCommand;
use crate::hypervisor::guard::hostile::agent_that;
use crate::hypervisor::nbd::testing::{Dirty, content};
use crate::hypervisor::{
    Capture, CaptureError, CaptureErrorKind, Changes, Freeze, Hypervisor, Outcome, Reading,
    SinceMark,
};
use crate::model::Extent;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Says yes to everything, and lets go of nothing.
const GUARD: &str = "read -r order; echo ready; while read -r line; do echo ok; done";

const PATIENT: Limits = Limits {
    greeting: Duration::from_secs(20),
    command: Duration::from_secs(20),
    job: Duration::from_secs(20),
    work: Duration::from_secs(100),
};

/// So short that a test need not wait, and long enough for honest answers on a busy machine.
const HASTY: Limits = Limits {
    greeting: Duration::from_millis(300),
    command: Duration::from_millis(300),
    job: Duration::from_millis(300),
    work: Duration::from_secs(20),
};

fn source_at(monitor: &Path, folder: &Path, limits: Limits) -> QmpSource {
    let mut source = QmpSource::new(QmpSettings {
        monitor: monitor.to_path_buf(),
        agent: None,
        freeze: Freeze::Never,
        freeze_limit: Duration::from_secs(10),
        owner: "0123abcd".to_string(),
        excluded: Vec::new(),
        overlay_dir: folder.join("o"),
        overlay_bytes: 1 << 20,
        runtime_dir: folder.join("r"),
        granularity_bytes: 65536,
        guard: GuardCommand {
            program: "/bin/sh".into(),
            arguments: vec!["-c".to_string(), GUARD.to_string()],
        },
    });
    source.limits = limits;
    source
}

fn source(qemu: &FakeQemu, limits: Limits) -> QmpSource {
    source_at(&qemu.monitor(), &qemu.folder(), limits)
}

fn marks(capture: &dyn Capture) -> Vec<SinceMark> {
    capture
        .disks()
        .into_iter()
        .map(|disk| SinceMark {
            disk: disk.name().clone(),
            size_bytes: disk.size_bytes(),
            alignment_bytes: 65536,
            mark: disk.mark().map(str::to_string),
        })
        .collect()
}

/// A first night, committed.
fn first_night(qemu: &FakeQemu) -> Vec<SinceMark> {
    let capture = source(qemu, PATIENT)
        .open(&[], Reading::Everything)
        .unwrap();
    let marks = marks(&*capture);
    capture.close(Outcome::Committed).unwrap();
    marks
}

/// The error of opening, checked for what every error must be.
fn refused(source: &QmpSource, since: &[SinceMark], what: &str) -> CaptureError {
    let started = Instant::now();
    let Err(error) = source.open(since, Reading::Changes) else {
        panic!("{what}: was believed");
    };
    assert!(started.elapsed() < Duration::from_secs(60), "{what}: late");
    let shown = error.to_string();
    assert!(!shown.chars().any(char::is_control), "{what}: {shown:?}");
    assert!(shown.len() < 2000, "{what}: {} bytes", shown.len());
    assert!(
        shown.contains("qmp") || shown.contains("vd"),
        "{what}: {shown}"
    );
    error
}

/// What a recovery must leave: nothing but the VM as it was.
fn is_as_it_was(qemu: &FakeQemu, what: &str) {
    let state = qemu.state();
    assert_eq!(state.leftovers(), [] as [&str; 0], "{what}");
    let devices: Vec<_> = state.devices.iter().map(|(_, node)| &**node).collect();
    assert_eq!(devices, ["d0", "d1"], "{what}");
    drop(state);
    let overlays = std::fs::read_dir(qemu.folder().join("o"));
    assert_eq!(overlays.map_or(0, |entries| entries.count()), 0, "{what}");
}

fn reads_right(capture: &dyn Capture) {
    for disk in capture.disks() {
        assert_eq!(disk.size_bytes(), DISK_BYTES);
        let mut bytes = vec![0; 4096];
        disk.read_at(65536, &mut bytes).unwrap();
        assert_eq!(bytes, content(65536, 4096));
        let all = Extent::new(0, DISK_BYTES);
        assert_eq!(disk.allocated(all).unwrap(), [all]);
    }
}

fn is_tracked(capture: &dyn Capture) -> bool {
    let tracked =
        |disk: &&dyn crate::hypervisor::CapturedDisk| matches!(disk.changes(), Changes::Extents(_));
    capture.disks().iter().all(tracked)
}

#[test]
fn an_honest_peer_is_captured_night_after_night() {
    for iothreads in [false, true] {
        let qemu = FakeQemu::start();
        qemu.state().iothreads = iothreads;
        let since = first_night(&qemu);
        let capture = source(&qemu, PATIENT)
            .open(&since, Reading::Everything)
            .unwrap();
        assert!(is_tracked(&*capture));
        reads_right(&*capture);
        capture.close(Outcome::Committed).unwrap();
        is_as_it_was(&qemu, "after two nights");
        assert_eq!(qemu.state().all_bitmaps(), 2);
    }
}

/// A peer that says this first, and then stays silent or hangs up.
fn greets_with(bytes: Vec<u8>, pause: Duration, limits: Limits) -> (CaptureError, Duration) {
    let folder = tempfile::tempdir().unwrap();
    let monitor = folder.path().join("qmp");
    let listener = UnixListener::bind(&monitor).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let parts = match pause.is_zero() {
            true => bytes.len().max(1),
            false => 1,
        };
        for part in bytes.chunks(parts) {
            if stream.write_all(part).is_err() {
                return;
            }
            std::thread::sleep(pause);
        }
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let started = Instant::now();
    let error = refused(&source_at(&monitor, folder.path(), limits), &[], "greeting");
    let took = started.elapsed();
    thread.join().unwrap();
    (error, took)
}

#[test]
fn a_greeting_that_is_none_is_refused_in_time() {
    let greeting = "{\"QMP\": {}}\n".to_string();
    let event = "{\"event\": \"STOP\"}\n";
    for (what, text, expected) in [
        ("never", String::new(), "does not greet"),
        ("half", greeting[..6].to_string(), "does not greet"),
        ("not JSON", "220 mail ESMTP\n".to_string(), "protocol"),
        ("an array", "[]\n".to_string(), "protocol"),
        ("too deep", format!("{}\n", "[".repeat(1 << 20)), "protocol"),
        (
            "too many values",
            format!("[{}0]\n", "0,".repeat(1 << 21)),
            "protocol",
        ),
        ("without end", "x".repeat(9 << 20), "protocol"),
        ("a flood", event.repeat(10_001), "protocol"),
        (
            "other answers",
            "{\"return\": {}}\n".repeat(10_001),
            "protocol",
        ),
    ] {
        let (error, _) = greets_with(text.into_bytes(), Duration::ZERO, HASTY);
        assert!(error.to_string().contains(expected), "{what}: {error}");
    }
}

#[test]
fn a_greeting_byte_by_byte_does_not_stretch_the_limit() {
    let text = format!("{{\"QMP\": {{\"x\": \"{}\"}}}}\n", "x".repeat(1000));
    let (error, took) = greets_with(text.into_bytes(), Duration::from_millis(50), HASTY);
    assert!(error.to_string().contains("does not greet"), "{error}");
    assert!(took < Duration::from_secs(30), "{took:?}");
}

#[test]
fn a_monitor_whose_queue_is_full_is_left_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let monitor = folder.path().join("qmp");
    let listener = UnixListener::bind(&monitor).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let mut waiting = Vec::new();
    loop {
        let (sender, connected) = std::sync::mpsc::channel();
        let path = monitor.clone();
        std::thread::spawn(move || {
            let stream = std::os::unix::net::UnixStream::connect(path);
            let _ = sender.send(());
            // Held until the test ends.
            drop(stream.map(|mut stream| stream.read(&mut [0])));
        });
        match connected.recv_timeout(Duration::from_millis(300)) {
            Ok(()) => waiting.push(()),
            Err(_) => break,
        }
    }
    let error = refused(&source_at(&monitor, folder.path(), HASTY), &[], "queue");
    assert!(error.to_string().contains("does not greet"), "{error}");
}

#[test]
fn events_between_and_before_answers_disturb_nothing() {
    let qemu = FakeQemu::start();
    qemu.does(|asked| {
        let event = "{\"event\": \"BLOCK_JOB_READY\", \"data\": {}}\r\n".repeat(7);
        let answer = format!("{event}{{\"id\": ID, \"return\": {}}}\n", asked.honest);
        Act::Say(answer.into_bytes())
    });
    let capture = source(&qemu, PATIENT)
        .open(&[], Reading::Everything)
        .unwrap();
    reads_right(&*capture);
    capture.close(Outcome::Committed).unwrap();
}

/// Answers to `query-status` that are none.
fn bad_answers() -> Vec<(&'static str, String)> {
    let honest = "{\"return\": {\"status\": \"running\"}, \"id\": ID}\n";
    let text = "no\u{1b}[31m\r\n\u{9b}way".repeat(100_000);
    let error = json!({"class": "GenericError", "desc": text});
    vec![
        ("another id", honest.replace("ID", "77")),
        ("a negative id", honest.replace("ID", "-1")),
        ("a text as id", honest.replace("ID", "\"1\"")),
        (
            "no id",
            "{\"return\": {\"status\": \"running\"}}\n".to_string(),
        ),
        ("twice", honest.repeat(2)),
        ("another answer first", honest.replace("ID", "77") + honest),
        ("a greeting", "{\"QMP\": {}}\n".to_string()),
        ("not JSON", "running\n".to_string()),
        (
            "not UTF-8",
            "{\"return\": \"\u{0}\", \"id\": ID}\n".to_string(),
        ),
        ("two lines", honest.replace(", ", ",\n")),
        ("an empty line", format!("\n{honest}")),
        (
            "events without end",
            "{\"event\": \"X\"}\n".repeat(10_001) + honest,
        ),
        (
            "another type",
            "{\"return\": [1, 2], \"id\": ID}\n".to_string(),
        ),
        ("nothing", "{\"return\": {}, \"id\": ID}\n".to_string()),
        (
            "a number",
            "{\"return\": {\"status\": 1}, \"id\": ID}\n".to_string(),
        ),
        (
            "deep",
            format!("{{\"id\": ID, \"return\": {}\n", "[".repeat(100_000)),
        ),
        ("an error", format!("{{\"error\": {error}, \"id\": ID}}\n")),
        (
            "an error that is a text",
            "{\"error\": \"no\", \"id\": ID}\n".to_string(),
        ),
        (
            "a status with control characters",
            format!(
                "{{\"return\": {{\"status\": {}}}, \"id\": ID}}\n",
                json!(text)
            ),
        ),
    ]
}

#[test]
fn an_answer_that_is_none_fails_the_capture_and_nothing_stays() {
    for (what, text) in bad_answers() {
        let qemu = FakeQemu::start();
        let since = first_night(&qemu);
        qemu.does(move |asked| match asked.name {
            "query-status" => Act::Say(text.clone().into_bytes()),
            _ => Act::Obey,
        });
        refused(&source(&qemu, PATIENT), &since, what);
        qemu.obeys();
        source(&qemu, PATIENT).recover().unwrap();
        is_as_it_was(&qemu, what);
    }
}

type Change = fn(&mut Value);

/// Lies in `query-named-block-nodes`; row 0 is `d0`.
fn lies_about_nodes() -> Vec<(&'static str, Change)> {
    fn size(rows: &mut Value, size: Value) {
        rows[0]["image"]["virtual-size"] = size;
    }
    fn bitmap(rows: &mut Value, key: &str, value: Value) {
        rows[0]["dirty-bitmaps"][0][key] = value;
    }
    vec![
        ("a negative size", |rows| size(rows, json!(-512))),
        ("size 0", |rows| size(rows, json!(0))),
        ("a size over i64", |rows| size(rows, json!(u64::MAX))),
        ("a size over everything", |rows| size(rows, json!(1e300))),
        ("a size as text", |rows| size(rows, json!("1048576"))),
        ("no size", |rows| size(rows, Value::Null)),
        ("half a size", |rows| size(rows, json!(0.5))),
        ("a negative granularity", |rows| {
            bitmap(rows, "granularity", json!(-1))
        }),
        ("a granularity of text", |rows| {
            bitmap(rows, "granularity", json!("x"))
        }),
        ("a bitmap that does not say that it records", |rows| {
            bitmap(rows, "recording", Value::Null);
        }),
        ("a bitmap without text for a name", |rows| {
            bitmap(rows, "name", json!(7))
        }),
        ("two bitmaps of one name", |rows| {
            let mut second = rows[0]["dirty-bitmaps"][0].clone();
            second["granularity"] = json!(512);
            rows[0]["dirty-bitmaps"]
                .as_array_mut()
                .unwrap()
                .push(second);
        }),
        ("too many bitmaps", |rows| {
            let bitmap = json!({"name": "x", "recording": true, "granularity": 65536});
            rows[0]["dirty-bitmaps"] = Value::Array(vec![bitmap; 5000]);
        }),
        ("bitmaps that are none", |rows| {
            rows[0]["dirty-bitmaps"] = json!({})
        }),
        ("two nodes of one name", |rows| {
            let mut second = rows[0].clone();
            second["image"]["virtual-size"] = json!(512);
            rows.as_array_mut().unwrap().push(second);
        }),
        ("a node that is not described", |rows| {
            drop(rows.as_array_mut().unwrap().remove(0))
        }),
        ("a node without a driver", |rows| {
            rows[0]["drv"] = json!(null)
        }),
        ("too many nodes", |rows| {
            let row = rows[0].clone();
            *rows = Value::Array(vec![row; 5000]);
        }),
        ("nodes that are none", |rows| *rows = json!({"d0": {}})),
    ]
}

#[test]
fn lies_about_sizes_bitmaps_and_nodes_are_refused() {
    for (what, change) in lies_about_nodes() {
        let qemu = FakeQemu::start();
        let since = first_night(&qemu);
        qemu.does(move |asked| match asked.name {
            "query-named-block-nodes" => {
                let mut rows = asked.honest.clone();
                change(&mut rows);
                Act::Return(rows)
            }
            _ => Act::Obey,
        });
        refused(&source(&qemu, PATIENT), &since, what);
        qemu.obeys();
        source(&qemu, PATIENT).recover().unwrap();
        is_as_it_was(&qemu, what);
        let capture = source(&qemu, PATIENT)
            .open(&since, Reading::Changes)
            .unwrap();
        assert!(is_tracked(&*capture), "{what}: tracking was given up");
        capture.close(Outcome::Abandoned).unwrap();
    }
}

#[test]
fn a_bitmap_of_another_granularity_is_not_believed_and_the_image_is_whole() {
    for granularity in [0, 3, 512, 1 << 40, u64::MAX] {
        let qemu = FakeQemu::start();
        let since = first_night(&qemu);
        qemu.does(move |asked| match asked.name {
            "query-named-block-nodes" => {
                let mut rows = asked.honest.clone();
                for row in rows.as_array_mut().unwrap() {
                    for bitmap in row["dirty-bitmaps"].as_array_mut().unwrap() {
                        bitmap["granularity"] = json!(granularity);
                    }
                }
                Act::Return(rows)
            }
            _ => Act::Obey,
        });
        let capture = source(&qemu, PATIENT)
            .open(&since, Reading::Changes)
            .unwrap();
        assert!(!is_tracked(&*capture), "{granularity}");
        reads_right(&*capture);
        capture.close(Outcome::Abandoned).unwrap();
    }
}

#[test]
fn changes_too_scattered_to_be_told_are_read_in_full_and_the_next_night_is_tracked() {
    for iothreads in [false, true] {
        let qemu = FakeQemu::start();
        qemu.state().iothreads = iothreads;
        let since = first_night(&qemu);
        qemu.state().dirty = Dirty::EveryOtherSector;
        let source = source(&qemu, PATIENT);
        let capture = source.open(&since, Reading::Changes).unwrap();
        for disk in capture.disks() {
            match disk.changes() {
                Changes::Unknown(reason) => assert!(reason.contains("scattered"), "{reason}"),
                Changes::Extents(_) => panic!("{} is tracked", disk.name()),
            }
        }
        reads_right(&*capture);
        let since = marks(&*capture);
        capture.close(Outcome::Committed).unwrap();
        is_as_it_was(&qemu, "after a scattered night");
        qemu.state().dirty = Dirty::Nothing;
        assert!(night(&source, &since).unwrap().0);
    }
}

#[test]
fn devices_that_cannot_be_told_apart_are_refused() {
    let device = |id: &str, node: &str| {
        json!({
            "device": "", "removable": false, "inserted": {"node-name": node},
            "qdev": format!("/machine/peripheral/{id}/virtio-backend"),
        })
    };
    for (what, devices) in [
        (
            "two of one name",
            json!([device("vd0", "d0"), device("vd0", "d1")]),
        ),
        ("on no node", json!([device("vd0", "d7")])),
        (
            "a name that none can have",
            json!([device("vd\u{1b}[31m", "d0")]),
        ),
        (
            "a node of control characters",
            json!([device("vd0", "d\u{1b}[31m\r\n")]),
        ),
        (
            "no text",
            json!([{"qdev": "vd0", "inserted": {"node-name": 7}}]),
        ),
        (
            "nothing inserted",
            json!([{"qdev": "vd0", "inserted": null}]),
        ),
        ("none", json!([])),
        ("too many", Value::Array(vec![device("vd0", "d0"); 5000])),
        ("no list", json!("vd0")),
    ] {
        let qemu = FakeQemu::start();
        let answer = devices.clone();
        qemu.does(move |asked| match asked.name {
            "query-block" => Act::Return(answer.clone()),
            _ => Act::Obey,
        });
        refused(&source(&qemu, PATIENT), &[], what);
        qemu.obeys();
        source(&qemu, PATIENT).recover().unwrap();
        is_as_it_was(&qemu, what);
    }
}

#[test]
fn a_disk_that_is_written_past_qemus_nodes_is_refused_until_it_is_left_out() {
    for (property, value, remedy) in [
        ("type", json!("scsi-block"), "scsi-hd"),
        ("type", json!("scsi-generic"), "scsi-hd"),
        ("share-rw", json!(true), "detach the share"),
    ] {
        let qemu = FakeQemu::start();
        qemu.state().nodes.get_mut("d0").unwrap().driver = "raw".to_string();
        first_night(&qemu);
        let answer = value.clone();
        qemu.does(move |asked| {
            match asked.name == "qom-get" && asked.arguments["property"] == property {
                true => Act::Return(answer.clone()),
                false => Act::Obey,
            }
        });
        let mut source = source(&qemu, PATIENT);
        let error = refused(&source, &[], property);
        assert_eq!(error.kind, CaptureErrorKind::Invalid);
        assert!(error.detail.contains(remedy), "{error}");
        assert!(error.detail.contains("exclude = [\"vd0\"]"), "{error}");
        source.settings.excluded = vec!["vd0".parse().unwrap()];
        let capture = source.open(&[], Reading::Everything).unwrap();
        assert_eq!(capture.disks().len(), 1);
        capture.close(Outcome::Abandoned).unwrap();
        is_as_it_was(&qemu, property);
    }
}

#[test]
fn a_device_without_such_properties_is_captured_and_nonsense_about_them_is_not_believed() {
    let raw = || {
        let qemu = FakeQemu::start();
        qemu.state().nodes.get_mut("d0").unwrap().driver = "raw".to_string();
        qemu
    };
    let qemu = raw();
    qemu.does(|asked| match asked.name {
        "qom-get" => Act::Refuse("Property 'x.share-rw' not found"),
        _ => Act::Obey,
    });
    first_night(&qemu);
    for property in ["type", "share-rw"] {
        let qemu = raw();
        qemu.does(move |asked| {
            match asked.name == "qom-get" && asked.arguments["property"] == property {
                true => Act::Return(json!(7)),
                false => Act::Obey,
            }
        });
        refused(&source(&qemu, PATIENT), &[], property);
    }
}

#[test]
fn a_removable_disk_that_can_be_written_is_left_out_and_told_of() {
    for (read_only, told) in [(false, 1), (true, 0)] {
        let qemu = FakeQemu::start();
        qemu.does(move |asked| {
            let mut rows = asked.honest.clone();
            match asked.name {
                "query-block" => rows[1]["removable"] = json!(true),
                "query-named-block-nodes" => {
                    for row in rows.as_array_mut().unwrap() {
                        let is_read_only = read_only && row["node-name"] == "d1";
                        row["ro"] = json!(is_read_only);
                    }
                }
                _ => return Act::Obey,
            }
            Act::Return(rows)
        });
        let capture = source(&qemu, PATIENT)
            .open(&[], Reading::Everything)
            .unwrap();
        assert_eq!(capture.disks().len(), 1);
        let notes = capture.notes();
        assert_eq!(notes.len(), told, "{notes:?}");
        for note in notes {
            assert!(note.contains("vd1") && note.contains("removable"), "{note}");
        }
        capture.close(Outcome::Abandoned).unwrap();
    }
}

#[test]
fn a_graph_with_a_circle_is_walked_once() {
    let qemu = FakeQemu::start();
    {
        let mut state = qemu.state();
        for number in 0..200 {
            let mut node = state.nodes["d0"].clone();
            node.driver = "throttle".to_string();
            node.child = Some(format!("t{}", (number + 1) % 200));
            state.nodes.insert(format!("t{number}"), node);
        }
        state.devices[0].1 = "t0".to_string();
    }
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    qemu.does(move |asked| {
        if asked.name == "x-debug-query-block-graph" {
            count.fetch_add(1, Ordering::Relaxed);
        }
        Act::Obey
    });
    let error = refused(&source(&qemu, PATIENT), &[], "a circle");
    assert!(error.to_string().contains("vd0"), "{error}");
    assert!(asked.load(Ordering::Relaxed) < 10);
}

#[test]
fn a_definition_of_millions_of_bytes_is_not_taken_over() {
    let qemu = FakeQemu::start();
    qemu.does(|asked| match asked.name {
        "query-name" => Act::Return(json!({"name": "x".repeat(4 << 20)})),
        "query-uuid" => Act::Return(json!({"UUID": vec![[[0]]; 20_000]})),
        "query-version" => Act::Return(json!({"qemu": "\u{1b}".repeat(1 << 20)})),
        _ => Act::Obey,
    });
    let capture = source(&qemu, PATIENT)
        .open(&[], Reading::Everything)
        .unwrap();
    let (_, definition) = capture.definition().unwrap();
    assert!(definition.len() < 1 << 20, "{}", definition.len());
    capture.close(Outcome::Abandoned).unwrap();
}

/// A whole night, from recovery to close; what was known of changes, and the marks of the point.
fn night(source: &QmpSource, since: &[SinceMark]) -> Result<(bool, Vec<SinceMark>), CaptureError> {
    source.recover()?;
    let capture = source.open(since, Reading::Changes)?;
    let night = (is_tracked(&*capture), marks(&*capture));
    // The point stands in the store; what QEMU says after that cannot undo it.
    let _ = capture.close(Outcome::Committed);
    Ok(night)
}

/// A guest whose agent refuses to freeze and to thaw, and a guard that could not let it go.
fn source_without_thaw(qemu: &FakeQemu, freeze: Freeze, agent: &Path) -> QmpSource {
    let mut source = source(qemu, PATIENT);
    source.settings.agent = Some(agent.join("qga"));
    source.settings.freeze = freeze;
    source.settings.guard.arguments = vec!["-c".to_string(), format!("{GUARD}; exit 1")];
    source
}

fn refuses(_: &str) -> String {
    "{\"error\": {\"desc\": \"disabled\"}}\n".to_string()
}

#[test]
fn a_guest_whose_agent_can_neither_freeze_nor_thaw_is_captured_night_after_night() {
    let (agent, _commands) = agent_that(refuses);
    let qemu = FakeQemu::start();
    let mut source = source_without_thaw(&qemu, Freeze::Try, agent.path());
    let (_, since) = night(&source, &[]).unwrap();
    let (is_tracked, _) = night(&source, &since).unwrap();
    assert!(is_tracked);
    is_as_it_was(&qemu, "after two nights");

    // Somebody's pause is not ours to end: only the thaw is left to be done.
    qemu.state().status = "paused".to_string();
    source.settings.freeze = Freeze::Never;
    let told = source.recover().unwrap();
    assert_eq!(told.len(), 1);
    assert!(told[0].contains("may still be frozen"), "{told:?}");
    assert_eq!(qemu.state().status, "paused");
    // It was the last try.
    assert_eq!(source.recover().unwrap().len(), 0);
}

#[test]
fn a_guest_that_may_still_be_frozen_is_told_of_only_where_it_was_asked_to_freeze() {
    let (agent, _commands) = agent_that(refuses);
    let qemu = FakeQemu::start();
    let source = source_without_thaw(&qemu, Freeze::Require, agent.path());
    assert!(source.open(&[], Reading::Everything).is_err());
    assert_eq!(source.recover().unwrap().len(), 1);

    let qemu = FakeQemu::start();
    let mut source = source_without_thaw(&qemu, Freeze::Try, agent.path());
    source.settings.guard.program = "/nonexistent/qmp-guard".into();
    refused(&source, &[], "no guard");
    assert_eq!(source.recover().unwrap().len(), 0);
}

#[test]
fn a_pause_of_somebody_else_is_not_ended_because_a_freeze_failed() {
    let (agent, _commands) = agent_that(refuses);
    let qemu = FakeQemu::start();
    let source = source_without_thaw(&qemu, Freeze::Require, agent.path());
    assert!(source.open(&[], Reading::Everything).is_err());
    qemu.state().status = "paused".to_string();
    source.recover().unwrap();
    assert_eq!(qemu.state().status, "paused");
}

/// Does the mischief at each command of a night in turn. Then the next night recovers, finds all
/// changes since the newest point, and leaves the VM as it was.
fn at_each_command_of_a_night(iothreads: bool, limits: Limits, mischief: fn() -> Act) {
    let mut at = 0;
    loop {
        let qemu = FakeQemu::start();
        qemu.state().iothreads = iothreads;
        let since = first_night(&qemu);
        let first = qemu.state().commands.len() + at;
        let reached = Arc::new(AtomicBool::new(false));
        let flag = reached.clone();
        qemu.does(move |asked| match asked.number == first {
            true => {
                flag.store(true, Ordering::Relaxed);
                mischief()
            }
            false => Act::Obey,
        });
        let newest = match night(&source(&qemu, limits), &since) {
            Ok((_, marks)) => marks,
            Err(error) => {
                assert!(error.to_string().contains("qmp") || error.to_string().contains("vd"));
                since
            }
        };
        let command = qemu.state().commands.get(first).cloned();
        qemu.obeys();
        // What the guard could not do while the monitor was gone, it does once the agent is gone.
        qemu.state().status = "running".to_string();
        if !reached.load(Ordering::Relaxed) {
            break;
        }
        let what = format!("{at}: {command:?}");
        let (is_tracked, _) = night(&source(&qemu, PATIENT), &newest).unwrap();
        assert!(is_tracked, "{what}: changes were lost");
        is_as_it_was(&qemu, &what);
        assert_eq!(qemu.state().all_bitmaps(), 2, "{what}");
        at += 1;
    }
    assert!(at > 30, "only {at} commands");
}

#[test]
fn a_peer_that_hangs_up_before_any_command_loses_no_change_and_leaves_nothing() {
    at_each_command_of_a_night(false, PATIENT, || Act::HangUp);
}

#[test]
fn a_peer_that_hangs_up_after_any_command_loses_no_change_and_leaves_nothing() {
    at_each_command_of_a_night(false, PATIENT, || Act::ObeyAndHangUp);
}

#[test]
fn a_peer_that_hangs_up_at_any_command_of_the_jobs_way_leaves_nothing() {
    at_each_command_of_a_night(true, PATIENT, || Act::HangUp);
}

#[test]
fn a_peer_that_refuses_any_command_loses_no_change_and_leaves_nothing() {
    at_each_command_of_a_night(false, PATIENT, || Act::Refuse("not today"));
}

#[test]
fn a_peer_that_falls_silent_at_any_command_is_left_in_time() {
    at_each_command_of_a_night(false, HASTY, || Act::Silence);
}

/// Mischief at one command of a night without a first one.
fn trouble_at(command: &'static str, limits: Limits, act: fn() -> Act) -> (CaptureError, Duration) {
    let qemu = FakeQemu::start();
    qemu.does(move |asked: &Asked| match asked.name == command {
        true => act(),
        false => Act::Obey,
    });
    let started = Instant::now();
    let error = refused(&source(&qemu, limits), &[], command);
    let took = started.elapsed();
    qemu.obeys();
    source(&qemu, PATIENT).recover().unwrap();
    is_as_it_was(&qemu, command);
    (error, took)
}

#[test]
fn an_answer_byte_by_byte_does_not_stretch_the_limit() {
    let limits = Limits {
        command: Duration::from_millis(500),
        ..PATIENT
    };
    let trickle = || Act::Trickle(Duration::from_millis(20));
    let (error, took) = trouble_at("query-named-block-nodes", limits, trickle);
    assert!(error.to_string().contains("in time"), "{error}");
    assert!(took < Duration::from_secs(20), "{took:?}");
}

#[test]
fn many_late_answers_together_do_not_stretch_the_limit_of_a_capture() {
    let limits = Limits {
        work: Duration::from_millis(600),
        ..PATIENT
    };
    let qemu = FakeQemu::start();
    qemu.does(|_| Act::Late(Duration::from_millis(100)));
    let error = refused(&source(&qemu, limits), &[], "late");
    assert!(error.to_string().contains("in time"), "{error}");
    let asked = qemu.state().commands.len();
    assert!(asked < 20, "{asked} commands");
}

#[test]
fn a_job_that_never_ends_fails_the_capture_in_time() {
    let qemu = FakeQemu::start();
    let job =
        |status: &str| Act::Return(json!([{"id": "vmkeep-job-0123abcd-0", "status": status}]));
    for status in ["running", "aborting", "concluded", "\u{1b}", "waiting"] {
        qemu.does(move |asked| match asked.name {
            "query-jobs" => job(status),
            _ => Act::Obey,
        });
        let error = refused(&source(&qemu, HASTY), &[], status);
        assert!(error.to_string().contains("in time"), "{error}");
    }
}

/// Why a capture is none any more, once that is noticed.
fn given_up(capture: &dyn Capture) -> CaptureError {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match capture.still_consistent() {
            Err(error) => return error,
            Ok(()) => assert!(Instant::now() < deadline, "nobody noticed"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_monitor_that_is_lost_while_jobs_fleece_fails_the_point() {
    let qemu = FakeQemu::start();
    qemu.state().iothreads = true;
    let capture = source(&qemu, PATIENT)
        .open(&[], Reading::Everything)
        .unwrap();
    capture.still_consistent().unwrap();
    qemu.does(|_| Act::HangUp);
    // The overlay is watched no more: it could fill, and stop the guest.
    given_up(&*capture);
    qemu.obeys();
    capture.close(Outcome::Abandoned).unwrap();
    is_as_it_was(&qemu, "a lost monitor");
}

#[test]
fn a_guest_that_an_overlay_stopped_goes_on_and_the_point_fails() {
    let qemu = FakeQemu::start();
    qemu.state().iothreads = true;
    let capture = source(&qemu, PATIENT)
        .open(&[], Reading::Everything)
        .unwrap();
    qemu.state().status = "io-error".to_string();
    let error = given_up(&*capture);
    assert!(error.detail.contains("overlay_dir"), "{error}");
    capture.close(Outcome::Abandoned).unwrap();
    assert_eq!(qemu.state().status, "running");
    is_as_it_was(&qemu, "a stopped guest");

    // Also where whoever captured it died.
    let capture = source(&qemu, PATIENT)
        .open(&[], Reading::Everything)
        .unwrap();
    qemu.does(|_| Act::HangUp);
    given_up(&*capture);
    drop(capture);
    qemu.state().status = "io-error".to_string();
    qemu.obeys();
    source(&qemu, PATIENT).recover().unwrap();
    assert_eq!(qemu.state().status, "running");
    is_as_it_was(&qemu, "a stopped guest of a dead agent");
}

/// The guest comes into a state when something is asked of QEMU, once the overlays are there.
fn becomes(qemu: &Arc<FakeQemu>, when_asked: &'static str, status: &'static str) {
    let (guest, mut is_due) = (qemu.clone(), None);
    qemu.does(move |asked| {
        if is_due == Some(true) && asked.name == when_asked {
            guest.state().status = status.to_string();
            is_due = Some(false);
        }
        if asked.name == "blockdev-add" {
            is_due.get_or_insert(true);
        }
        Act::Obey
    });
}

#[test]
fn a_guest_that_began_to_run_after_the_look_is_paused_for_the_instant() {
    let qemu = FakeQemu::start();
    let mut looked = false;
    qemu.does(move |asked| {
        looked |= asked.name == "blockdev-add";
        match asked.name {
            "query-status" if !looked => Act::Return(json!({"status": "prelaunch"})),
            _ => Act::Obey,
        }
    });
    let capture = source(&qemu, PATIENT)
        .open(&[], Reading::Everything)
        .unwrap();
    let commands = qemu.state().commands.clone();
    let at = |name: &str| commands.iter().position(|command| command == name).unwrap();
    assert!(at("stop") < at("transaction") && at("transaction") < at("cont"));
    assert_eq!(qemu.state().status, "running");
    capture.close(Outcome::Abandoned).unwrap();
}

#[test]
fn a_guest_that_somebody_else_stopped_is_not_let_go() {
    for (when_asked, status) in [
        ("blockdev-add", "paused"),
        // In the time of the freeze.
        ("query-status", "paused"),
        ("transaction", "postmigrate"),
    ] {
        let qemu = Arc::new(FakeQemu::start());
        becomes(&qemu, when_asked, status);
        let capture = source(&qemu, PATIENT)
            .open(&[], Reading::Everything)
            .unwrap();
        capture.close(Outcome::Abandoned).unwrap();
        assert_eq!(qemu.state().status, status, "{when_asked}");
        let commands = qemu.state().commands.clone();
        assert!(!commands.iter().any(|command| command == "cont"));
        is_as_it_was(&qemu, when_asked);
        qemu.obeys();
    }
}

#[test]
fn a_guest_that_somebody_lets_go_in_the_instant_gets_no_point() {
    let qemu = Arc::new(FakeQemu::start());
    qemu.state().status = "paused".to_string();
    becomes(&qemu, "transaction", "running");
    let error = refused(&source(&qemu, PATIENT), &[], "let go");
    assert_eq!(error.kind, CaptureErrorKind::Inconsistent);
    assert_eq!(qemu.state().status, "running");
    is_as_it_was(&qemu, "let go");
    qemu.obeys();
}

#[test]
fn a_guest_that_stands_still_is_given_up_before_the_guard_kills_the_agent() {
    let qemu = FakeQemu::start();
    let mut source = source(&qemu, PATIENT);
    source.settings.freeze_limit = Duration::from_secs(2);
    qemu.does(|asked| match asked.name {
        "transaction" => Act::Silence,
        _ => Act::Obey,
    });
    let started = Instant::now();
    let error = refused(&source, &[], "stalled");
    assert!(error.to_string().contains("in time"), "{error}");
    // The guard's limit is two seconds; with it, not only this VM's backup would end.
    let stopped = started.elapsed();
    assert!(stopped < Duration::from_secs(10), "{stopped:?}");
    assert_eq!(error.kind, CaptureErrorKind::Io);
}

/// A QEMU that hangs in the instant, with the guest paused, until its client has gone.
fn hangs_in_the_instant(guard: &str) -> (FakeQemu, QmpSource) {
    let qemu = FakeQemu::start();
    let mut source = source(&qemu, PATIENT);
    source.settings.freeze_limit = Duration::from_secs(2);
    source.settings.guard.arguments = vec!["-c".to_string(), format!("{GUARD}; {guard}")];
    qemu.does(|asked| match asked.name {
        "transaction" => Act::Silence,
        _ => Act::Obey,
    });
    (qemu, source)
}

fn held_note(qemu: &FakeQemu) -> std::path::PathBuf {
    qemu.folder().join("r").join("held-0123abcd")
}

#[test]
fn a_guest_that_its_guard_could_not_let_go_is_let_go_by_the_clean_up() {
    // One that gave up, and one that still tries and is not waited for.
    for guard in ["exit 1", "echo still held; exec sleep 50"] {
        let (qemu, source) = hangs_in_the_instant(guard);
        let started = Instant::now();
        refused(&source, &[], guard);
        assert!(started.elapsed() < Duration::from_secs(30), "{guard}");
        assert_eq!(qemu.state().status, "running", "{guard}");
        assert!(!held_note(&qemu).exists(), "{guard}");
        is_as_it_was(&qemu, guard);
    }
}

#[test]
fn a_guest_that_may_stand_still_for_longer_is_told_of_with_what_lets_it_go() {
    let (qemu, source) = hangs_in_the_instant("exit 1");
    let mut hangs = false;
    qemu.does(move |asked| {
        hangs |= asked.name == "transaction";
        match (hangs, asked.name) {
            (true, "transaction") => Act::Silence,
            (true, _) => Act::HangUp,
            (false, _) => Act::Obey,
        }
    });
    let error = refused(&source, &[], "for longer");
    assert!(error.detail.contains("may stand still"), "{error}");
    assert!(error.detail.contains("\"cont\""), "{error}");
    assert_eq!(qemu.state().status, "paused");
    assert!(held_note(&qemu).exists());
    let error = source.recover().unwrap_err();
    assert!(error.detail.contains("\"cont\""), "{error}");
    qemu.obeys();
    source.recover().unwrap();
    assert_eq!(qemu.state().status, "running");
    is_as_it_was(&qemu, "after a long hang");
}

#[test]
fn events_of_a_whole_night_before_an_answer_of_the_close_leave_nothing_in_qemu() {
    let qemu = FakeQemu::start();
    let capture = source(&qemu, PATIENT)
        .open(&[], Reading::Everything)
        .unwrap();
    let mut is_first = true;
    qemu.does(move |asked| match std::mem::take(&mut is_first) {
        true => {
            let events = "{\"event\": \"X\"}\n".repeat(10_001);
            let answer = format!("{events}{{\"id\": ID, \"return\": {}}}\n", asked.honest);
            Act::Say(answer.into_bytes())
        }
        false => Act::Obey,
    });
    capture.close(Outcome::Committed).unwrap();
    is_as_it_was(&qemu, "after a night of events");
}

#[test]
fn what_is_printed_of_a_release_is_fit_to_be_printed() {
    let qemu = FakeQemu::start();
    qemu.state()
        .nodes
        .get_mut("d0")
        .unwrap()
        .bitmaps
        .push(super::testing::Bitmap {
            name: "vmkeep-0123abcd-\u{1b}[31m\n-0".to_string(),
            recording: true,
            granularity: 65536,
        });
    let released = source(&qemu, PATIENT).release().unwrap();
    assert_eq!(released.len(), 1);
    assert!(!released[0].chars().any(char::is_control), "{released:?}");
    assert_eq!(qemu.state().all_bitmaps(), 0);
}
