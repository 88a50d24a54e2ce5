//! One connection to a QEMU monitor, one command in flight.
//!
//! A monitor serves one client at a time: a second one waits for the greeting until the first has
//! gone. So the connection is also the lock that keeps two captures of one VM apart.

use super::wire::{self, MAX_LINE_BYTES, Message};
use super::{QmpError, machine::Peer};
use rustix::net::sockopt::socket_peercred;
use serde_json::{Value, json};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Time for the greeting: longer than any other tool should hold a monitor for a question.
const GREETING_LIMIT: Duration = Duration::from_secs(10);
/// Time for one command. QEMU answers in milliseconds; a `stop` drains requests in flight first.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);
/// A peer that sends events without end keeps us busy for ever.
const MAX_EVENTS: usize = 10_000;

pub(super) struct Connection {
    stream: UnixStream,
    /// What was read and belongs to no complete line yet.
    buffer: Vec<u8>,
    next_id: u64,
    /// After a broken message or a lost reply nothing can be believed any more.
    broken: bool,
}

impl Connection {
    pub(super) fn open(socket: &Path) -> Result<Self, QmpError> {
        let stream = UnixStream::connect(socket)?;
        Self::over(stream, GREETING_LIMIT)
    }

    pub(super) fn over(stream: UnixStream, greeting_limit: Duration) -> Result<Self, QmpError> {
        let mut connection = Connection {
            stream,
            buffer: Vec::new(),
            next_id: 1,
            broken: false,
        };
        let deadline = Instant::now() + greeting_limit;
        // What QEMU could not tell a client that died comes first.
        for _ in 0..MAX_EVENTS {
            match connection.receive(deadline) {
                Ok(Message::Greeting) => {
                    connection.run("qmp_capabilities", json!(null))?;
                    return Ok(connection);
                }
                Ok(_) => {}
                Err(QmpError::TimedOut) => return Err(QmpError::Busy),
                Err(error) => return Err(error),
            }
        }
        Err(QmpError::Protocol(
            "the peer is not a QEMU monitor (no greeting)".to_string(),
        ))
    }

    /// The process at the other end.
    pub(super) fn peer(&self) -> Result<Peer, QmpError> {
        let credentials = socket_peercred(&self.stream).map_err(io::Error::from)?;
        Ok(Peer {
            process: credentials.pid.as_raw_nonzero().get(),
            user: credentials.uid.as_raw(),
            group: credentials.gid.as_raw(),
        })
    }

    /// Lets another client have the monitor. Nothing can be run on this connection any more.
    pub(super) fn hang_up(&mut self) {
        self.broken = true;
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    /// Runs a command; its answer.
    pub(super) fn run(&mut self, name: &str, arguments: Value) -> Result<Value, QmpError> {
        if self.broken {
            return Err(QmpError::Closed);
        }
        let result = self.exchange(name, &arguments);
        // A command that failed was understood; everything else leaves the stream unknown.
        if !matches!(result, Ok(_) | Err(QmpError::Refused { .. })) {
            self.broken = true;
        }
        result
    }

    fn exchange(&mut self, name: &str, arguments: &Value) -> Result<Value, QmpError> {
        let id = self.next_id;
        self.next_id += 1;
        let deadline = Instant::now() + COMMAND_LIMIT;
        self.stream.set_write_timeout(Some(COMMAND_LIMIT))?;
        self.stream
            .write_all(wire::command(name, id, arguments).as_bytes())?;
        for _ in 0..MAX_EVENTS {
            match self.receive(deadline)? {
                Message::Event { .. } => {}
                Message::Return {
                    id: Some(theirs),
                    value,
                } if theirs == id => return Ok(value),
                Message::Error {
                    id: Some(theirs),
                    detail,
                } if theirs == id => {
                    return Err(QmpError::Refused {
                        command: name.to_string(),
                        detail,
                    });
                }
                _ => {
                    return Err(QmpError::Protocol(format!(
                        "an answer that does not belong to {name}"
                    )));
                }
            }
        }
        Err(QmpError::Protocol("too many events".to_string()))
    }

    fn receive(&mut self, deadline: Instant) -> Result<Message, QmpError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(end + 1);
                let line = std::mem::replace(&mut self.buffer, rest);
                return wire::parse(&line);
            }
            if self.buffer.len() > MAX_LINE_BYTES {
                return Err(QmpError::Protocol("a line without end".to_string()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(QmpError::TimedOut);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut part = [0; 64 << 10];
            match self.stream.read(&mut part) {
                Ok(0) => return Err(QmpError::Closed),
                Ok(read) => self
                    .buffer
                    .extend_from_slice(part.get(..read).unwrap_or(&[])),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
