//! The guard's own process.

use super::{Order, STILL_HELD, thaw_at};
use crate::hypervisor::guest_agent::GuestAgent;
use crate::hypervisor::qmp;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How long a guard tries to let a paused guest run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// As long as somebody waits for it.
    pub first: Duration,
    /// After that. Storage that stalls keeps QEMU stuck for minutes, and else nobody looks after
    /// the guest before the next run.
    pub last: Duration,
}

const PATIENCE: Patience = Patience {
    first: Duration::from_secs(30),
    last: Duration::from_secs(3600),
};
/// Longest time between two tries.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_secs(5);

/// What the guest is held by.
struct Held {
    order: Order,
    agent: Option<GuestAgent>,
    /// It may be frozen; by then it is thawed, or that is tried again.
    frozen_until: Option<Instant>,
    paused_until: Option<Instant>,
    /// It was paused while it was frozen: whatever limit passes later, the instant was frozen.
    paused_frozen: bool,
    /// The limit passed while it was frozen, before it was paused.
    thawed_before: bool,
    /// When it was to be thawed, nothing was frozen any more.
    thawed_itself: bool,
    patience: Patience,
}

/// Serves one agent until its input ends. `parent`: the agent's process.
///
/// Returns an error only where the guest could not be let go.
pub fn serve(
    input: impl Read + Send + 'static,
    output: impl Write,
    parent: Option<rustix::process::Pid>,
) -> Result<(), String> {
    serve_within(input, output, parent, PATIENCE)
}

pub(super) fn serve_within(
    input: impl Read + Send + 'static,
    mut output: impl Write,
    parent: Option<rustix::process::Pid>,
    patience: Patience,
) -> Result<(), String> {
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(input).lines() {
            let Ok(line) = line else { break };
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    let order = lines
        .recv_timeout(Duration::from_secs(10))
        .map_err(|_| "no order came".to_string())?;
    let order: Order = serde_json::from_str(&order).map_err(|error| error.to_string())?;
    let mut held = Held {
        order,
        agent: None,
        frozen_until: None,
        paused_until: None,
        paused_frozen: false,
        thawed_before: false,
        thawed_itself: false,
        patience,
    };
    let mut say = |text: &str| {
        // An agent that has died does not read; the end of its input follows.
        let _ = writeln!(output, "{text}").and_then(|()| output.flush());
    };
    say("ready");
    loop {
        let now = Instant::now();
        // The agent in a paused guest answers nobody, and its guest does not feel that it is frozen:
        // while it is paused only that limit counts.
        let until = held.paused_until.or(held.frozen_until);
        let wait = until.map_or(Duration::from_secs(3600), |until| {
            until.saturating_duration_since(now)
        });
        match lines.recv_timeout(wait) {
            Ok(line) => match line.as_str() {
                "freeze" => match held.freeze() {
                    Ok(()) => say("frozen"),
                    Err(detail) => say(&detail.replace('\n', " ")),
                },
                "thaw" => match held.thaw() {
                    Ok(()) if held.thawed_before => say("before"),
                    Ok(()) if held.thawed_itself => say("itself"),
                    Ok(()) => say("thawed"),
                    Err(detail) => say(&detail.replace('\n', " ")),
                },
                "pause" => {
                    held.paused_until = Some(Instant::now() + held.limit());
                    held.paused_frozen = held.frozen_until.is_some();
                    say("ok");
                }
                "resumed" => {
                    held.paused_until = None;
                    say("ok");
                }
                _ => say("unknown"),
            },
            Err(RecvTimeoutError::Timeout) => {
                let now = Instant::now();
                if held.paused_until.is_some_and(|until| until <= now) {
                    // Its connection is what keeps us from the monitor.
                    if let Some(parent) = parent {
                        let _ =
                            rustix::process::kill_process(parent, rustix::process::Signal::KILL);
                    }
                }
                // A guest that cannot be resumed is thawed all the same: it may run by now.
                let resumed = match held.paused_until.is_some_and(|until| until <= now) {
                    true => held.resume(),
                    false => Ok(()),
                };
                if held.frozen_until.is_some_and(|until| until <= now) {
                    held.thawed_before |= !held.paused_frozen;
                    // What fails is tried again, and told at the end: the instant of a guest that
                    // cannot be thawed may be taken all the same.
                    let _ = held.thaw();
                }
                if resumed.is_err() {
                    return held.go_on_trying();
                }
            }
            // The agent has gone.
            Err(RecvTimeoutError::Disconnected) => {
                // In this order: the agent in a paused guest answers nobody.
                let resumed = held.resume();
                let thawed = held.thaw();
                if resumed.is_ok() {
                    return thawed;
                }
                say(STILL_HELD);
                return held.go_on_trying();
            }
        }
    }
}

impl Held {
    fn limit(&self) -> Duration {
        Duration::from_secs(self.order.limit_seconds)
    }

    fn freeze(&mut self) -> Result<(), String> {
        let socket = self
            .order
            .agent
            .as_deref()
            .ok_or("no guest agent is configured")?;
        let mut agent = GuestAgent::connect(socket, nonce()).map_err(|error| error.to_string())?;
        // From here on it may be frozen, whatever is answered.
        self.frozen_until = Some(Instant::now() + self.limit());
        match agent.freeze(self.limit()) {
            Ok(_) => {
                self.agent = Some(agent);
                Ok(())
            }
            Err(error) => {
                drop(agent);
                let detail = error.to_string();
                // Part of it may be frozen. An agent that does not answer cannot thaw either.
                match self.thaw() {
                    Ok(()) => Err(detail),
                    Err(second) => Err(format!("{detail}; {second}")),
                }
            }
        }
    }

    fn thaw(&mut self) -> Result<(), String> {
        if self.frozen_until.is_none() {
            return Ok(());
        }
        let first = self.agent.take().and_then(|mut agent| agent.thaw().ok());
        let thawed = match first {
            Some(thawed) => thawed,
            None => {
                let socket: &Path = self.order.agent.as_deref().unwrap_or(Path::new(""));
                match thaw_at(socket) {
                    Ok(thawed) => thawed,
                    Err(error) => {
                        self.frozen_until = Some(Instant::now() + self.limit());
                        return Err(error.to_string());
                    }
                }
            }
        };
        // Something was frozen, for a freeze of nothing is refused. Since when it is not, nobody
        // knows. So it is too where an earlier thaw failed: Windows lets go after ten seconds, and
        // says so once.
        self.thawed_itself |= thawed == 0;
        self.frozen_until = None;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), String> {
        self.resume_within(self.patience.first, FIRST_PAUSE)
    }

    /// Nobody waits any more, and the guest may still stand still.
    fn go_on_trying(&mut self) -> Result<(), String> {
        let resumed = self.resume_within(self.patience.last, LAST_PAUSE);
        let thawed = self.thaw();
        resumed.and(thawed)
    }

    /// Tries it at intervals that grow to `longest`.
    fn resume_within(&mut self, limit: Duration, longest: Duration) -> Result<(), String> {
        if self.paused_until.is_none() {
            return Ok(());
        }
        let monitor = self
            .order
            .monitor
            .as_deref()
            .ok_or("no monitor is configured")?;
        let deadline = Instant::now() + limit;
        let mut pause = FIRST_PAUSE;
        loop {
            match qmp::resume(monitor) {
                Ok(()) => break,
                // A QEMU that has gone holds no guest, and the next one's is not ours to let go.
                Err(error) if error.is_missing() || Instant::now() >= deadline => {
                    return Err(error.to_string());
                }
                Err(_) => std::thread::sleep(pause),
            }
            pause = (pause * 2).min(longest);
        }
        self.paused_until = None;
        Ok(())
    }
}

pub(super) fn nonce() -> u32 {
    let mut bytes = [0; 4];
    // Where there is no randomness yet, the delimiter alone keeps answers apart.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u32::from_ne_bytes(bytes)
}
