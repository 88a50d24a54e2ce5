//! One connection to a QEMU monitor, one command in flight.
//!
//! A monitor serves one client at a time: a second one waits for the greeting until the first has
//! gone. So the connection is also the lock that keeps two captures of one VM apart.

use super::wire::{self, MAX_LINE_BYTES, Message};
use super::{QmpError, machine::Peer};
use crate::hypervisor::timed_stream::TimedStream;
use rustix::net::sockopt::socket_peercred;
use serde_json::{Value, json};
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// A peer that sends events without end keeps us busy for ever.
const MAX_EVENTS: usize = 10_000;

/// How long a monitor may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// For the greeting: longer than any other tool should hold a monitor for a question.
    pub greeting: Duration,
    /// For one command. QEMU answers in milliseconds; a `stop` drains requests in flight first.
    pub command: Duration,
    /// For a job to end after it was told to.
    pub job: Duration,
    /// For everything that one capture asks before it stands, and again for its end: a peer that
    /// takes its time with each of many commands takes it once.
    pub work: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            greeting: Duration::from_secs(10),
            command: Duration::from_secs(30),
            job: Duration::from_secs(30),
            work: Duration::from_secs(300),
        }
    }
}

pub(super) struct Connection {
    stream: TimedStream,
    lines: Lines,
    next_id: u64,
    limits: Limits,
    /// By when the commands of the present work must be answered, whatever each may take.
    work_ends: Instant,
    /// While a guest stands still for us, sooner.
    pause_ends: Option<Instant>,
    /// After a broken message or a lost reply nothing can be believed any more.
    broken: bool,
}

impl Connection {
    pub(super) fn open(socket: &Path, limits: Limits) -> Result<Self, QmpError> {
        let deadline = Instant::now() + limits.greeting;
        let busy = |error: QmpError| match error {
            QmpError::TimedOut => QmpError::Busy,
            other => other,
        };
        let mut stream = TimedStream::connect(socket, limits.greeting)
            .map_err(|error| busy(QmpError::from(error)))?;
        stream.until(deadline);
        let mut connection = Connection {
            stream,
            lines: Lines::default(),
            next_id: 1,
            limits,
            work_ends: Instant::now() + limits.work,
            pause_ends: None,
            broken: false,
        };
        // What QEMU could not tell a client that died comes first.
        for _ in 0..MAX_EVENTS {
            if connection.receive(deadline).map_err(busy)? == Message::Greeting {
                connection.run("qmp_capabilities", json!(null))?;
                return Ok(connection);
            }
        }
        Err(QmpError::Protocol("no greeting".to_string()))
    }

    /// The process at the other end.
    pub(super) fn peer(&self) -> Result<Peer, QmpError> {
        let credentials = socket_peercred(self.stream.stream()).map_err(io::Error::from)?;
        Ok(Peer {
            process: credentials.pid.as_raw_nonzero().get(),
            user: credentials.uid.as_raw(),
            group: credentials.gid.as_raw(),
        })
    }

    pub(super) fn limits(&self) -> Limits {
        self.limits
    }

    /// From now on counts what all commands together may take.
    pub(super) fn begin_work(&mut self) {
        self.work_ends = Instant::now() + self.limits.work;
    }

    /// The guest stands still: commands must be answered by then. `None`: it runs again.
    pub(super) fn pause_until(&mut self, ends: Option<Instant>) {
        self.pause_ends = ends;
    }

    /// Lets another client have the monitor. Nothing can be run on this connection any more.
    pub(super) fn hang_up(&mut self) {
        self.broken = true;
        let _ = self.stream.stream().shutdown(std::net::Shutdown::Both);
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    /// A connection that was lost is opened anew.
    pub(super) fn restore(&mut self, socket: &Path) -> Result<(), QmpError> {
        if self.broken {
            // Only then is the monitor free for another client, which we are now.
            self.hang_up();
            *self = Self::open(socket, self.limits)?;
        }
        Ok(())
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
        let ends = self
            .pause_ends
            .unwrap_or(self.work_ends)
            .min(self.work_ends);
        let deadline = ends.min(Instant::now() + self.limits.command);
        self.stream.until(deadline);
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
        // What is in the buffer already must not stretch the limit either.
        if Instant::now() >= deadline {
            return Err(QmpError::TimedOut);
        }
        self.lines.receive(&mut self.stream)
    }
}

/// Cuts a stream into lines.
#[derive(Default)]
pub(super) struct Lines {
    /// What was read and belongs to no complete line yet.
    buffer: Vec<u8>,
    /// So many bytes of it hold no line feed.
    searched: usize,
}

impl Lines {
    pub(super) fn receive(&mut self, stream: &mut impl Read) -> Result<Message, QmpError> {
        loop {
            let new = self.buffer.get(self.searched..).unwrap_or_default();
            if let Some(end) = new.iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(self.searched + end + 1);
                let line = std::mem::replace(&mut self.buffer, rest);
                self.searched = 0;
                return wire::parse(&line);
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > MAX_LINE_BYTES {
                return Err(QmpError::Protocol("a line without end".to_string()));
            }
            let mut part = [0; 64 << 10];
            match stream.read(&mut part) {
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
