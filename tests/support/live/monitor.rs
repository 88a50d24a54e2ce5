use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::wait::{LIMIT, wait_until};

/// A connection to a QMP monitor, which serves one client at a time.
#[derive(Debug)]
pub struct Qmp {
    lines: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Waits until QEMU has made the socket, for it may just have been started.
    #[track_caller]
    pub fn connect(socket: &Path) -> Qmp {
        let stream = connect(socket);
        let mut qmp = Qmp {
            lines: BufReader::new(stream),
            events: VecDeque::new(),
        };
        let greeting = qmp.read(LIMIT);
        assert!(greeting.get("QMP").is_some(), "no greeting: {greeting}");
        qmp.execute(&json!({ "execute": "qmp_capabilities" }))
            .unwrap();
        qmp
    }

    /// The `return` of a command, or what QEMU has against it.
    #[track_caller]
    pub fn execute(&mut self, command: &Value) -> Result<Value, String> {
        let line = format!("{command}\n");
        self.lines
            .get_mut()
            .write_all(line.as_bytes())
            .unwrap_or_else(|error| panic!("{command}: {error}"));
        loop {
            let mut said = self.read(LIMIT);
            if said.get("event").is_some() {
                self.events.push_back(said);
            } else if let Some(error) = said.get("error") {
                return Err(error["desc"].as_str().unwrap_or_default().to_owned());
            } else {
                return Ok(said["return"].take());
            }
        }
    }

    /// The next event of that name that has not been taken yet.
    #[track_caller]
    pub fn wait_event(&mut self, name: &str, limit: Duration) -> Value {
        let start = Instant::now();
        let mut looked_at = 0;
        loop {
            while looked_at < self.events.len() {
                if self.events[looked_at]["event"] == name {
                    return self.events.remove(looked_at).unwrap();
                }
                looked_at += 1;
            }
            let left = limit.saturating_sub(start.elapsed());
            assert!(!left.is_zero(), "no event {name}, only {:?}", self.events);
            let event = self.read(left);
            self.events.push_back(event);
        }
    }

    #[track_caller]
    fn read(&mut self, limit: Duration) -> Value {
        self.lines.get_ref().set_read_timeout(Some(limit)).unwrap();
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) => panic!("QEMU has closed the monitor"),
            Ok(_) => serde_json::from_str(&line).unwrap(),
            Err(error) => panic!("the monitor says nothing for {limit:?}: {error}"),
        }
    }
}

/// One command to the guest agent, with a connection of its own. None: no answer within the limit.
pub fn ask_agent(socket: &Path, command: &Value, limit: Duration) -> Option<Result<Value, String>> {
    let stream = connect(socket);
    stream.set_read_timeout(Some(limit)).unwrap();
    let mut lines = BufReader::new(stream);
    // Answers to commands of earlier connections may still come: they end at the byte 0xff.
    let id = u64::from(std::process::id());
    let sync = json!({ "execute": "guest-sync-delimited", "arguments": { "id": id } });
    let line = [b"\xff", sync.to_string().as_bytes(), b"\n"].concat();
    lines.get_mut().write_all(&line).ok()?;
    loop {
        let mut rest = Vec::new();
        if lines.read_until(0xff, &mut rest).ok()? == 0 {
            return None;
        }
        let mut line = String::new();
        lines.read_line(&mut line).ok()?;
        if serde_json::from_str::<Value>(&line).is_ok_and(|answer| answer["return"] == id) {
            break;
        }
    }
    lines
        .get_mut()
        .write_all(format!("{command}\n").as_bytes())
        .ok()?;
    let mut line = String::new();
    if lines.read_line(&mut line).ok()? == 0 {
        return None;
    }
    let mut answer: Value = serde_json::from_str(&line).unwrap();
    Some(match answer.get("error") {
        Some(error) => Err(error["desc"].as_str().unwrap_or_default().to_owned()),
        None => Ok(answer["return"].take()),
    })
}

#[track_caller]
pub(super) fn connect(socket: &Path) -> UnixStream {
    wait_until(
        "a connection",
        LIMIT,
        || UnixStream::connect(socket).ok(),
        || socket.display().to_string(),
    )
}
