//! The guard between an agent that may die and peers that may lie: what it holds it lets go, in
//! time, or it says that it could not.

use super::serve::{Patience, serve_within};
use super::*;
use crate::hypervisor::qmp::testing::{Act, FakeQemu};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Instant;

/// Answers a freeze with this, and everything else as it should.
fn agent(freezes: &'static str) -> (tempfile::TempDir, Receiver<String>) {
    agent_that(move |command| match command {
        "guest-fsfreeze-freeze" => freezes.to_string(),
        _ => "{\"return\": 1}\n".to_string(),
    })
}

/// Answers one client after the other.
pub(in crate::hypervisor) fn agent_that(
    answers: impl Fn(&str) -> String + Send + 'static,
) -> (tempfile::TempDir, Receiver<String>) {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("qga")).unwrap();
    let (sender, commands) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut lines = BufReader::new(stream.try_clone().unwrap());
            let mut line = Vec::new();
            while lines
                .read_until(b'\n', &mut line)
                .is_ok_and(|read| read > 0)
            {
                let start = line.iter().position(|byte| *byte == b'{').unwrap();
                let message: serde_json::Value = serde_json::from_slice(&line[start..]).unwrap();
                line.clear();
                let command = message["execute"].as_str().unwrap().to_string();
                let answer = match &*command {
                    "guest-sync-delimited" => {
                        format!("{{\"return\": {}}}\n", message["arguments"]["id"])
                    }
                    command => answers(command),
                };
                if sender.send(command).is_err() || stream.write_all(answer.as_bytes()).is_err() {
                    break;
                }
            }
        }
    });
    (folder, commands)
}

struct Served {
    input: Option<UnixStream>,
    output: BufReader<UnixStream>,
    thread: JoinHandle<Result<(), String>>,
}

impl Served {
    fn start(order: &Order) -> Self {
        Self::start_with(order, Duration::from_millis(300))
    }

    /// `last`: how long it tries on when nobody waits for it any more.
    fn start_with(order: &Order, last: Duration) -> Self {
        let (input, theirs) = UnixStream::pair().unwrap();
        let (output, said) = UnixStream::pair().unwrap();
        let patience = Patience {
            first: Duration::from_millis(300),
            last,
        };
        let thread = std::thread::spawn(move || serve_within(theirs, said, None, patience));
        let mut served = Served {
            input: Some(input),
            output: BufReader::new(output),
            thread,
        };
        let order = serde_json::to_string(order).unwrap();
        assert_eq!(served.ask(&order), "ready");
        served
    }

    fn ask(&mut self, line: &str) -> String {
        writeln!(self.input.as_ref().unwrap(), "{line}").unwrap();
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        answer.trim_end_matches('\n').to_string()
    }

    /// As if the agent had died.
    fn end(mut self) -> Result<(), String> {
        drop(self.input.take());
        self.thread.join().unwrap()
    }
}

fn order(folder: &tempfile::TempDir) -> Order {
    Order {
        monitor: Some(folder.path().join("nobody")),
        agent: Some(folder.path().join("qga")),
        limit_seconds: 1,
    }
}

/// The commands so far, syncs apart; waits for the last of them.
fn seen(commands: &Receiver<String>, last: &str) -> Vec<String> {
    let mut seen = Vec::new();
    while let Ok(command) = commands.recv_timeout(Duration::from_secs(30)) {
        let is_last = command.ends_with(last);
        if !command.contains("sync") {
            seen.push(command);
        }
        if is_last {
            return seen;
        }
    }
    panic!("{last} never came after {seen:?}");
}

#[test]
fn a_frozen_guest_is_thawed_when_its_agent_dies() {
    let (folder, commands) = agent("{\"return\": 2}\n");
    let mut served = Served::start(&order(&folder));
    assert_eq!(served.ask("freeze"), "frozen");
    served.end().unwrap();
    assert_eq!(seen(&commands, "thaw").len(), 2);
}

#[test]
fn a_frozen_guest_is_thawed_at_the_limit_and_that_is_said() {
    let (folder, commands) = agent("{\"return\": 2}\n");
    let mut served = Served::start(&order(&folder));
    assert_eq!(served.ask("freeze"), "frozen");
    seen(&commands, "thaw");
    assert_eq!(served.ask("thaw"), "before");
    served.end().unwrap();
}

#[test]
fn a_guest_that_may_be_frozen_in_part_is_thawed() {
    for answer in [
        "{\"error\": {\"desc\": \"failed\\n\\u001b[31m\"}}\n",
        "{\"return\": 0}\n",
        "nonsense\n",
        "",
    ] {
        let (folder, commands) = agent(answer);
        let mut served = Served::start(&order(&folder));
        let started = Instant::now();
        let said = served.ask("freeze");
        assert!(said.contains("guest agent"), "{answer}: {said}");
        assert!(!said.chars().any(char::is_control), "{said:?}");
        assert!(started.elapsed() < Duration::from_secs(30));
        seen(&commands, "thaw");
        served.end().unwrap();
    }
}

#[test]
fn an_agent_that_can_neither_freeze_nor_thaw_does_not_end_the_guard_before_its_time() {
    let (folder, commands) = agent_that(|command| match command {
        "guest-fsfreeze-freeze" | "guest-fsfreeze-thaw" => {
            "{\"error\": {\"desc\": \"disabled\"}}\n".to_string()
        }
        _ => "{\"return\": 1}\n".to_string(),
    });
    let qemu = FakeQemu::start();
    let mut served = Served::start(&Order {
        monitor: Some(qemu.monitor()),
        ..order(&folder)
    });
    let said = served.ask("freeze");
    assert!(said.contains("may still be frozen"), "{said}");
    // The limit has passed long ago. It passes again, and the guard has tried again.
    commands.try_iter().for_each(drop);
    seen(&commands, "thaw");
    assert_eq!(served.ask("pause"), "ok");
    let error = served.end().unwrap_err();
    assert!(error.contains("may still be frozen"), "{error}");
}

#[test]
fn a_frozen_guest_is_thawed_also_where_its_monitor_is_gone() {
    let (folder, commands) = agent("{\"return\": 2}\n");
    let mut served = Served::start(&order(&folder));
    assert_eq!(served.ask("freeze"), "frozen");
    assert_eq!(served.ask("pause"), "ok");
    // Both limits pass. There is nobody who could let the guest run, and that is said; the freeze
    // is undone all the same.
    seen(&commands, "thaw");
    let error = served.thread.join().unwrap().unwrap_err();
    assert!(error.contains("monitor"), "{error}");
}

#[test]
fn a_paused_guest_is_resumed_before_it_is_thawed_whatever_limit_passes_first() {
    let qemu = Arc::new(FakeQemu::start());
    let guest = qemu.clone();
    let (folder, commands) = agent_that(move |command| match command {
        "guest-fsfreeze-freeze" => "{\"return\": 2}\n".to_string(),
        // In a guest that stands still nobody answers.
        _ if guest.state().status == "paused" => String::new(),
        _ => "{\"return\": 2}\n".to_string(),
    });
    let started = Instant::now();
    let mut served = Served::start(&Order {
        monitor: Some(qemu.monitor()),
        ..order(&folder)
    });
    assert_eq!(served.ask("freeze"), "frozen");
    // Some of the limit is gone when the guest is paused.
    std::thread::sleep(Duration::from_millis(300));
    qemu.state().status = "paused".to_string();
    assert_eq!(served.ask("pause"), "ok");
    assert_eq!(seen(&commands, "thaw").len(), 2);
    assert_eq!(qemu.state().status, "running");
    assert!(
        started.elapsed() < Duration::from_secs(8),
        "it waited for a paused guest"
    );
    // It was frozen at the instant.
    assert_eq!(served.ask("thaw"), "thawed");
    served.end().unwrap();
}

#[test]
fn a_guest_whose_qemu_is_stuck_for_longer_than_anybody_waits_is_let_go_when_it_comes_back() {
    let qemu = FakeQemu::start();
    let mut served = Served::start_with(
        &Order {
            monitor: Some(qemu.monitor()),
            agent: None,
            limit_seconds: 60,
        },
        Duration::from_secs(60),
    );
    assert_eq!(served.ask("pause"), "ok");
    qemu.state().status = "paused".to_string();
    qemu.does(|_| Act::HangUp);
    drop(served.input.take());
    let mut said = String::new();
    served.output.read_line(&mut said).unwrap();
    assert_eq!(said.trim(), STILL_HELD);
    assert_eq!(qemu.state().status, "paused");
    qemu.obeys();
    served.thread.join().unwrap().unwrap();
    assert_eq!(qemu.state().status, "running");
}

#[test]
fn a_guard_whose_qemu_has_gone_does_not_wait_for_the_next_one() {
    let folder = tempfile::tempdir().unwrap();
    let mut served = Served::start_with(&order(&folder), Duration::from_secs(600));
    assert_eq!(served.ask("pause"), "ok");
    let started = Instant::now();
    assert!(served.end().unwrap_err().contains("monitor"));
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[test]
fn a_guest_that_had_thawed_itself_is_not_taken_for_one_that_was_frozen_to_the_end() {
    let nothing = "{\"return\": 0}\n";
    let refusal = "{\"error\": {\"desc\": \"couldn't hold writes\"}}\n";
    // Windows says once that it could not wait.
    for first in [nothing, refusal] {
        let thaws = std::sync::atomic::AtomicUsize::new(0);
        let (folder, _commands) = agent_that(move |command| match command {
            "guest-fsfreeze-freeze" => "{\"return\": 2}\n".to_string(),
            _ => match thaws.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
                0 => first.to_string(),
                _ => nothing.to_string(),
            },
        });
        let mut served = Served::start(&Order {
            limit_seconds: 60,
            ..order(&folder)
        });
        assert_eq!(served.ask("freeze"), "frozen");
        assert_eq!(served.ask("thaw"), "itself", "{first}");
        served.end().unwrap();
    }
}

#[test]
fn an_order_that_is_none_ends_the_guard() {
    for line in ["", "freeze", "{}", "{\"limit_seconds\": -1}", "\u{0}"] {
        let result = serve_within(
            std::io::Cursor::new(format!("{line}\n").into_bytes()),
            Vec::new(),
            None,
            Patience {
                first: Duration::ZERO,
                last: Duration::ZERO,
            },
        );
        assert!(result.is_err(), "{line}");
    }
}
