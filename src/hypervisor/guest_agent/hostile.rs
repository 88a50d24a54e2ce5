//! Agents inside of guests that lie, stall and answer what nobody asked: never a wait without
//! limit, and never a guest that is taken for frozen, or for thawed, on an answer that is none.

use super::*;
use std::io::{BufRead, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, channel};

const NONCE: u32 = 4711;

/// An agent that gives these answers, one to each command, and then says nothing until the client
/// has gone. Sends the commands that came.
struct FakeAgent {
    folder: tempfile::TempDir,
    commands: Receiver<String>,
}

impl FakeAgent {
    fn start(answers: &[&[u8]]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("qga")).unwrap();
        let (sender, commands) = channel();
        let answers: Vec<Vec<u8>> = answers.iter().map(|answer| answer.to_vec()).collect();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap());
            let mut answers = answers.into_iter();
            let mut line = Vec::new();
            while lines
                .read_until(b'\n', &mut line)
                .is_ok_and(|read| read > 0)
            {
                let _ = sender.send(String::from_utf8_lossy(&line).into_owned());
                line.clear();
                if let Some(answer) = answers.next() {
                    // A client that had enough hangs up.
                    let _ = stream.write_all(&answer);
                }
            }
        });
        FakeAgent { folder, commands }
    }

    fn connect(&self) -> Result<GuestAgent, AgentError> {
        GuestAgent::connect(&self.folder.path().join("qga"), NONCE)
    }
}

fn is_silent<T>(result: &Result<T, AgentError>) -> bool {
    matches!(result, Err(AgentError::Silent))
}

const SYNC: &[u8] = b"\xff{\"return\": 4711}\n";

#[test]
fn a_guest_is_frozen_and_thawed() {
    let fake = FakeAgent::start(&[SYNC, b"{\"return\": 3}\n", b"{\"return\": 3}\n"]);
    let mut agent = fake.connect().unwrap();
    assert_eq!(agent.freeze(Duration::from_secs(20)).unwrap(), 3);
    agent.thaw().unwrap();
    let commands: Vec<String> = fake.commands.iter().take(3).collect();
    for (command, name) in commands.iter().zip(["sync", "freeze", "thaw"]) {
        assert!(command.contains(name), "{command}");
    }
}

#[test]
fn late_answers_to_an_earlier_client_are_skipped() {
    let mut late = b"{\"return\": 2}\n{\"return\": 12}\nhalf an ans\xff".to_vec();
    late.extend(b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"x\"}}\n\n");
    late.extend(
        b"\xff{\"return\": 815}\n[]\nnonsense\n{\"return\": -4711}\n{\"return\": 4711.0}\n",
    );
    late.extend(SYNC);
    let fake = FakeAgent::start(&[&late, b"{\"return\": 1}\n"]);
    let mut agent = fake.connect().unwrap();
    assert_eq!(agent.freeze(Duration::from_secs(20)).unwrap(), 1);
}

#[test]
fn an_agent_that_never_greets_is_left_in_time() {
    let endless = b"{\"return\": 1}\n".repeat(1 << 20);
    let long = [b"{\"return\": \"".as_slice(), &vec![b'x'; 1 << 20]].concat();
    let other = b"\xff{\"return\": 4712}\n";
    for (what, answer) in [
        ("nothing", &b""[..]),
        ("half a line", b"\xff{\"return\": 47"),
        ("another number", other),
        ("a line without end", &long),
        ("answers without end", &endless),
        ("delimiters without end", &[0xff; 1 << 20]),
        ("line feeds without end", &[b'\n'; 1 << 20]),
    ] {
        let fake = FakeAgent::start(&[answer]);
        let started = Instant::now();
        let result = fake.connect().map(drop);
        assert!(is_silent(&result), "{what}: {result:?}");
        let took = started.elapsed();
        assert!(
            took < SYNC_LIMIT + Duration::from_secs(20),
            "{what}: {took:?}"
        );
    }
}

#[test]
fn an_agent_whose_queue_is_full_is_left_in_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qga");
    let listener = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(&path).unwrap();
    let started = Instant::now();
    let result = GuestAgent::connect(&path, NONCE).map(drop);
    assert!(is_silent(&result), "{result:?}");
    assert!(started.elapsed() < SYNC_LIMIT + Duration::from_secs(20));
}

#[test]
fn a_guest_is_not_frozen_on_an_answer_that_is_none() {
    for answer in [
        &b"{\"return\": 0}\n"[..],
        b"{\"return\": -1}\n",
        b"{\"return\": 1.5}\n",
        b"{\"return\": \"3\"}\n",
        b"{\"return\": {}}\n",
        b"{\"return\": null}\n",
        b"{\"return\": 99999999999999999999999}\n",
        b"{}\n",
        b"3\n",
        b"[]\n",
        b"nonsense\n",
        b"\"\xfe\"\n",
        b"{\"error\": {\"desc\": \"no\"}, \"return\": 3}\n",
        b"{\"error\": 7}\n",
    ] {
        let fake = FakeAgent::start(&[SYNC, answer]);
        let mut agent = fake.connect().unwrap();
        let result = agent.freeze(Duration::from_secs(20));
        let text = String::from_utf8_lossy(answer).into_owned();
        assert!(
            matches!(result, Err(AgentError::Refused(_))),
            "{text}: {result:?}"
        );
    }
}

#[test]
fn a_guest_is_not_thawed_on_an_answer_that_is_none() {
    for answer in [
        &b"{\"return\": {}}\n"[..],
        b"{}\n",
        b"nonsense\n",
        b"[7]\n",
        b"{\"return\": \"thawed\"}\n",
        b"{\"error\": {\"desc\": \"no\"}}\n",
    ] {
        let fake = FakeAgent::start(&[SYNC, answer]);
        let mut agent = fake.connect().unwrap();
        let text = String::from_utf8_lossy(answer).into_owned();
        assert!(agent.thaw().is_err(), "{text}");
    }
}

#[test]
fn a_freeze_that_is_not_answered_ends_at_its_limit() {
    for answer in [&b""[..], b"{\"return\": 3}", b"\xff\xff\n\n\xff"] {
        let fake = FakeAgent::start(&[SYNC, answer]);
        let mut agent = fake.connect().unwrap();
        let started = Instant::now();
        let result = agent.freeze(Duration::from_millis(300));
        assert!(is_silent(&result), "{result:?}");
        assert!(started.elapsed() < Duration::from_secs(20));
    }
}

#[test]
fn what_an_agent_says_is_fit_to_be_printed() {
    let text = "no\u{1b}[31m\r\n\u{9b}way".repeat(1000);
    let answer = format!("{}\n", json!({"error": {"desc": text}}));
    let fake = FakeAgent::start(&[SYNC, answer.as_bytes()]);
    let mut agent = fake.connect().unwrap();
    let shown = agent
        .freeze(Duration::from_secs(20))
        .unwrap_err()
        .to_string();
    assert!(!shown.chars().any(char::is_control), "{shown:?}");
    assert!(shown.len() < 1000 && shown.contains("no"), "{shown}");
}
