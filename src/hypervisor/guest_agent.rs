//! The QEMU guest agent over its unix socket: freeze and thaw of the guest's file systems.
//!
//! Whoever answers is inside the guest, and is believed in nothing but whether it froze. A guest
//! that says so and did not can only spoil the consistency of its own file systems: the point shows
//! one instant of its disks all the same.

use super::timed_stream::TimedStream;
use serde_json::{Value, json};
use std::fmt;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// Time for the agent to say that it is there at all.
const SYNC_LIMIT: Duration = Duration::from_secs(3);
const THAW_LIMIT: Duration = Duration::from_secs(10);
const MAX_ANSWER_BYTES: usize = 64 << 10;
/// Begins an answer after `guest-sync-delimited`: no JSON text contains it.
const DELIMITER: u8 = 0xff;

#[cfg(test)]
mod hostile;
#[cfg(any(test, fuzzing))]
pub(super) mod hostile_bytes;

#[derive(Debug)]
pub(super) enum AgentError {
    Io(io::Error),
    /// Nobody answered in time: no agent in the guest, or it hangs.
    Silent,
    Refused(String),
}

impl fmt::Display for AgentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AgentError::Io(error) => write!(f, "the guest agent's socket: {error}"),
            AgentError::Silent => f.write_str("the guest agent does not answer"),
            AgentError::Refused(detail) => write!(f, "the guest agent refused: {detail}"),
        }
    }
}

impl From<io::Error> for AgentError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => AgentError::Silent,
            _ => AgentError::Io(error),
        }
    }
}

pub(super) struct GuestAgent {
    stream: TimedStream,
}

impl GuestAgent {
    /// `nonce`: a number that no earlier client used, so that a late answer to it is not ours.
    pub(super) fn connect(socket: &Path, nonce: u32) -> Result<Self, AgentError> {
        let mut agent = GuestAgent {
            stream: TimedStream::connect(socket, SYNC_LIMIT)?,
        };
        agent.stream.until(Instant::now() + SYNC_LIMIT);
        // The delimiter ends whatever half a command an earlier client left with the agent.
        agent.stream.write_all(&[DELIMITER])?;
        agent.send("guest-sync-delimited", json!({ "id": nonce }))?;
        loop {
            match receive(&mut agent.stream) {
                Ok(Value::Number(number)) if number.as_u64() == Some(u64::from(nonce)) => {
                    return Ok(agent);
                }
                // Late answers to an earlier client, and what the agent thinks of the delimiter.
                Ok(_) | Err(AgentError::Refused(_)) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Freezes all file systems; how many.
    pub(super) fn freeze(&mut self, limit: Duration) -> Result<u64, AgentError> {
        self.stream.until(Instant::now() + limit);
        self.send("guest-fsfreeze-freeze", Value::Null)?;
        match receive(&mut self.stream)?.as_u64() {
            Some(0) => Err(AgentError::Refused("it froze no file system".to_string())),
            Some(count) => Ok(count),
            None => Err(AgentError::Refused(
                "it did not say how much is frozen".to_string(),
            )),
        }
    }

    /// Thaws what is frozen; how many file systems were. Harmless where nothing is.
    pub(super) fn thaw(&mut self) -> Result<u64, AgentError> {
        self.stream.until(Instant::now() + THAW_LIMIT);
        self.send("guest-fsfreeze-thaw", Value::Null)?;
        receive(&mut self.stream)?
            .as_u64()
            .ok_or_else(|| AgentError::Refused("it did not say how much is thawed".to_string()))
    }

    fn send(&mut self, command: &str, arguments: Value) -> Result<(), AgentError> {
        let mut message = json!({ "execute": command });
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        self.stream.write_all(format!("{message}\n").as_bytes())?;
        Ok(())
    }
}

/// What the next line returns; `Null` for remains of an earlier conversation, and for what is no
/// answer at all.
fn receive(stream: &mut impl Read) -> Result<Value, AgentError> {
    let mut line = Vec::new();
    loop {
        if line.len() > MAX_ANSWER_BYTES {
            return Err(AgentError::Silent);
        }
        // Byte by byte: answers are short, and nothing behind a line may be swallowed.
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => {
                return Err(AgentError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        }
        match byte {
            [DELIMITER] => line.clear(),
            [b'\n'] if line.is_empty() => {}
            [b'\n'] => break,
            [byte] => line.push(byte),
        }
    }
    let answer: Value = serde_json::from_slice(&line).unwrap_or_default();
    match answer.get("error") {
        Some(error) => {
            let detail = error.get("desc").and_then(Value::as_str).unwrap_or("?");
            let detail: String = detail
                .chars()
                .filter(|c| !c.is_control())
                .take(200)
                .collect();
            Err(AgentError::Refused(detail))
        }
        None => Ok(answer.get("return").cloned().unwrap_or_default()),
    }
}
