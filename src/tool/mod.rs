//! A tool (virsh, a command that tells a secret or the state of the clock) as a process of its own, which can
//! neither hang us nor talk without end: it is ended by a kill, with what it has started.

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// Time for the pipes to close after the process has ended.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// Runs it within `limit`, past which it is [`io::ErrorKind::TimedOut`]. Of outputs that are pipes, each may
/// have up to `max_bytes`.
pub fn run(command: &mut Command, limit: Duration, max_bytes: u64) -> io::Result<Output> {
    // Ctrl-C is for us; and a kill reaches what it has itself started.
    let mut child = command.process_group(0).spawn()?;
    let stdout = child.stdout.take().map(|pipe| drain(pipe, max_bytes));
    let stderr = child.stderr.take().map(|pipe| drain(pipe, max_bytes));
    let said = ended(&child, limit).and_then(|()| {
        let stdout = collected(stdout, max_bytes)?;
        Ok((stdout, collected(stderr, max_bytes)?))
    });
    match said {
        Ok((stdout, stderr)) => Ok(Output {
            status: child.wait()?,
            stdout,
            stderr,
        }),
        Err(error) => {
            kill(&mut child);
            Err(error)
        }
    }
}

/// Leaves it to be waited for: until then its number, which is its group's, is no other's.
fn ended(child: &Child, limit: Duration) -> io::Result<()> {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(2);
    while waitid(WaitId::Pid(Pid::from_child(child)), options)?.is_none() {
        if Instant::now() >= deadline {
            let text = format!("did not end within {} s", limit.as_secs_f32());
            return Err(io::Error::new(io::ErrorKind::TimedOut, text));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
    Ok(())
}

/// Reads a pipe to its end in a thread. Once more than the most was said, the pipe is closed and
/// its writer ends.
fn drain(pipe: impl Read + Send + 'static, max_bytes: u64) -> Receiver<io::Result<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = pipe
            .take(max_bytes.saturating_add(1))
            .read_to_end(&mut bytes);
        // Nobody may wait any more.
        let _ = sender.send(read.map(|_| bytes));
    });
    receiver
}

fn collected(pipe: Option<Receiver<io::Result<Vec<u8>>>>, max_bytes: u64) -> io::Result<Vec<u8>> {
    let Some(pipe) = pipe else {
        return Ok(Vec::new());
    };
    let Ok(read) = pipe.recv_timeout(DRAIN_LIMIT) else {
        return Err(io::Error::other("something holds its output open"));
    };
    let bytes = read?;
    match bytes.len() as u64 > max_bytes {
        true => Err(io::Error::other(format!(
            "said more than {max_bytes} bytes"
        ))),
        false => Ok(bytes),
    }
}

fn kill(child: &mut Child) {
    let _ = kill_process_group(Pid::from_child(child), Signal::KILL);
    let _ = child.kill();
    let _ = child.wait();
}
