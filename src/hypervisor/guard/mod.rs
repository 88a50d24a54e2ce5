//! The guard: a process that outlives a capture's agent for as long as it takes to let the guest
//! go on. For the moment of the instant a guest may be frozen or paused; whoever did that can be
//! killed in that very moment, and then nobody but this process knows.
//!
//! It is the shipped program again, started with a hidden command, and speaks lines on its
//! standard input and output. The end of its input means that the agent has gone: it thaws and
//! resumes what is not yet, and ends. It also does so when a limit passes, whatever the agent says;
//! an agent that neither goes on nor ends while the guest stands still is killed for that. Where
//! QEMU is stuck, it says that the guest is still held, and goes on trying for an hour.

#[cfg(test)]
pub(super) mod hostile;
mod serve;

pub use serve::serve;

use super::guest_agent::GuestAgent;
use super::{CaptureError, CaptureErrorKind};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// What it says at its end, unasked, where it goes on trying: nobody need wait for it.
const STILL_HELD: &str = "still held";

/// How the guard is started: the program and its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuardCommand {
    pub program: PathBuf,
    pub arguments: Vec<String>,
}

/// What a guard watches over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Order {
    /// QEMU's monitor, for a guest that may be paused.
    pub monitor: Option<PathBuf>,
    /// The guest agent's socket, for one that may be frozen.
    pub agent: Option<PathBuf>,
    /// Longest time a guest may be frozen or paused.
    pub limit_seconds: u64,
}

/// The agent's end of a guard.
pub(super) struct Guard {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    order: Order,
    /// It goes on trying by itself, and is waited for by nobody.
    tries_on: bool,
}

/// What became of the time in which the guest was frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Thawed {
    /// It was frozen until it was told.
    InTime,
    /// It was let go before, by the limit.
    Before,
    /// Nothing was frozen any more.
    Itself,
}

impl Guard {
    pub(super) fn start(command: &GuardCommand, order: Order) -> Result<Self, CaptureError> {
        let failed = |detail: String| CaptureError::new(CaptureErrorKind::Tool, "guard", detail);
        let mut child = Command::new(&command.program)
            .args(&command.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // What ends the agent from a terminal must not end this one.
            .process_group(0)
            .spawn()
            .map_err(|error| failed(format!("{}: {error}", command.program.display())))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed("has no standard input or output".to_string()));
        };
        let mut guard = Guard {
            child,
            input: Some(input),
            output: BufReader::new(output),
            order,
            tries_on: false,
        };
        let text = serde_json::to_string(&guard.order)
            .map_err(|error| failed(format!("its order cannot be written: {error}")))?;
        match guard.ask(&text)?.as_str() {
            "ready" => Ok(guard),
            other => Err(failed(other.to_string())),
        }
    }

    /// Sends a line; the answer.
    fn ask(&mut self, line: &str) -> Result<String, CaptureError> {
        let failed = |detail: &str| CaptureError::new(CaptureErrorKind::Tool, "guard", detail);
        let input = self.input.as_mut().ok_or_else(|| failed("has ended"))?;
        input
            .write_all(format!("{line}\n").as_bytes())
            .map_err(|_| failed("has died"))?;
        let mut answer = String::new();
        // The guard answers within its limits, and a dead one ends its output.
        match self.output.read_line(&mut answer) {
            Ok(0) | Err(_) => Err(failed("has died")),
            Ok(_) => Ok(answer.trim().to_string()),
        }
    }

    pub(super) fn freeze(&mut self) -> Result<(), CaptureError> {
        match self.ask("freeze")?.as_str() {
            "frozen" => Ok(()),
            other => Err(CaptureError::new(
                CaptureErrorKind::Tool,
                "freezing the guest",
                other,
            )),
        }
    }

    /// Said before the guest is paused.
    pub(super) fn will_pause(&mut self) -> Result<(), CaptureError> {
        self.ask("pause").map(drop)
    }

    /// Said after it runs again.
    pub(super) fn resumed(&mut self) -> Result<(), CaptureError> {
        self.ask("resumed").map(drop)
    }

    /// Thaws, also where the guard has died meanwhile.
    pub(super) fn thaw(&mut self) -> Result<Thawed, CaptureError> {
        match self.ask("thaw") {
            Ok(answer) => match answer.as_str() {
                "thawed" => Ok(Thawed::InTime),
                "before" => Ok(Thawed::Before),
                "itself" => Ok(Thawed::Itself),
                other => Err(CaptureError::new(
                    CaptureErrorKind::Tool,
                    "thawing the guest",
                    other,
                )),
            },
            Err(died) => {
                if let Some(agent) = &self.order.agent {
                    thaw_at(agent)?;
                }
                Err(died)
            }
        }
    }

    /// Orders it to put right what is not, and waits, unless it says that it goes on trying.
    /// `false`: the guest may still be held, or the guard died and cannot say.
    pub(super) fn end(&mut self) -> bool {
        // The end of its input is its order.
        drop(self.input.take());
        loop {
            let mut said = String::new();
            match self.output.read_line(&mut said) {
                Ok(0) | Err(_) => {
                    return self.child.wait().is_ok_and(|status| status.success());
                }
                Ok(_) if said.trim() == STILL_HELD => {
                    self.tries_on = true;
                    return false;
                }
                Ok(_) => {}
            }
        }
    }

    /// Somebody else has let the guest go: whoever stops it from now on means it.
    pub(super) fn dismiss(mut self) {
        let _ = self.child.kill();
        self.tries_on = false;
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if !self.tries_on {
            self.end();
        }
    }
}

/// Thaws a guest whose freezer is gone; how many file systems. Asked again while another client
/// holds the socket.
pub(super) fn thaw_at(agent: &Path) -> Result<u64, CaptureError> {
    let mut last = None;
    for attempt in 0..5 {
        match GuestAgent::connect(agent, serve::nonce()).and_then(|mut agent| agent.thaw()) {
            Ok(thawed) => return Ok(thawed),
            Err(error) => last = Some(error),
        }
        std::thread::sleep(Duration::from_millis(200 * attempt));
    }
    Err(CaptureError::new(
        CaptureErrorKind::Tool,
        agent.display(),
        format!(
            "the guest may still be frozen and could not be thawed ({}); in the guest, or by its \
             console: fsfreeze -u on its file systems",
            last.map(|error| error.to_string()).unwrap_or_default()
        ),
    ))
}
