//! `virsh` as a process of its own: works with every libvirt, and a hang of it is ended by a kill.

use crate::hypervisor::{CaptureError, CaptureErrorKind};
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// The definition of a domain with many disks has some 100 KiB.
const MAX_OUTPUT: u64 = 4 << 20;
/// Time for the pipes to close after the process has ended.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// What `virsh` said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reply {
    pub(super) success: bool,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

impl Reply {
    /// Its complaint on one line, without what could play tricks on a terminal.
    pub(super) fn complaint(&self) -> String {
        let text: String = self
            .stderr
            .split_whitespace()
            .collect::<Vec<&str>>()
            .join(" ")
            .chars()
            .filter(|letter| !letter.is_control())
            .take(400)
            .collect();
        match text.is_empty() {
            true => "virsh failed and said nothing".to_string(),
            false => text,
        }
    }
}

pub(super) trait Virsh: Send + Sync {
    /// Runs one command within `limit`. A refusal is a reply; an error means that nothing is
    /// known of what was done.
    fn run(&self, arguments: &[&str], limit: Duration) -> Result<Reply, CaptureError>;
}

/// The real one.
#[derive(Debug, Clone)]
pub(super) struct Process {
    pub(super) program: PathBuf,
    pub(super) uri: Option<String>,
}

impl Virsh for Process {
    fn run(&self, arguments: &[&str], limit: Duration) -> Result<Reply, CaptureError> {
        let what = arguments.first().copied().unwrap_or_default();
        let failed = |detail: String| {
            CaptureError::new(CaptureErrorKind::Tool, format!("virsh {what}"), detail)
        };
        let mut command = Command::new(&self.program);
        if let Some(uri) = &self.uri {
            command.arg("-c").arg(uri);
        }
        let mut child = command
            .arg("-q")
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C is for us; and a kill reaches what virsh itself has started.
            .process_group(0)
            .spawn()
            .map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => failed(format!(
                    "{} is not there; install libvirt-clients",
                    self.program.display()
                )),
                _ => failed(error.to_string()),
            })?;
        let stdout = child.stdout.take().map(drain);
        let stderr = child.stderr.take().map(drain);
        let deadline = Instant::now() + limit;
        let mut pause = Duration::from_millis(2);
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < deadline => std::thread::sleep(pause),
                Ok(None) => {
                    kill(&mut child);
                    return Err(failed(format!(
                        "did not end within {} s; is libvirtd well?",
                        limit.as_secs_f32()
                    )));
                }
                Err(error) => {
                    kill(&mut child);
                    return Err(failed(error.to_string()));
                }
            }
            pause = (pause * 2).min(Duration::from_millis(20));
        };
        let text = |pipe: Option<Receiver<io::Result<Vec<u8>>>>| {
            let received = pipe.map(|pipe| pipe.recv_timeout(DRAIN_LIMIT));
            match received {
                Some(Ok(Ok(bytes))) => match bytes.len() as u64 > MAX_OUTPUT {
                    true => Err(failed(format!("said more than {MAX_OUTPUT} bytes"))),
                    false => {
                        String::from_utf8(bytes).map_err(|_| failed("did not say text".to_string()))
                    }
                },
                Some(Ok(Err(error))) => Err(failed(error.to_string())),
                _ => Err(failed("something holds its output open".to_string())),
            }
        };
        Ok(Reply {
            success: status.success(),
            stdout: text(stdout)?,
            stderr: text(stderr)?,
        })
    }
}

/// Reads a pipe to its end in a thread. Once more than the most was said, the pipe is closed and
/// its writer ends.
fn drain(pipe: impl Read + Send + 'static) -> Receiver<io::Result<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let read = pipe.take(MAX_OUTPUT + 1).read_to_end(&mut bytes);
        // Nobody may wait any more.
        let _ = sender.send(read.map(|_| bytes));
    });
    receiver
}

fn kill(child: &mut Child) {
    // Its group first: after the wait, its number could be another's.
    let group = i32::try_from(child.id())
        .ok()
        .and_then(rustix::process::Pid::from_raw);
    if let Some(group) = group {
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
    let _ = child.kill();
    let _ = child.wait();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use tempfile::TempDir;

    fn fake(script: &str) -> (TempDir, Process) {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("virsh");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let uri = Some("test:///x".to_string());
        (folder, Process { program, uri })
    }

    /// A script that another thread's fork still holds open for writing is busy for a moment.
    fn run(virsh: &Process, limit: Duration) -> Result<Reply, CaptureError> {
        loop {
            match virsh.run(&["list", "--all"], limit) {
                Err(error) if error.detail.contains("busy") => {}
                other => return other,
            }
        }
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn both_outputs_and_the_exit_are_told_apart() {
        let (_folder, virsh) = fake("echo \"$@\"; echo \"$LC_ALL\" >&2; exit 1");
        let reply = run(&virsh, LONG).unwrap();
        assert!(!reply.success);
        assert_eq!(reply.stdout, "-c test:///x -q list --all\n");
        assert_eq!(reply.complaint(), "C");
    }

    #[test]
    fn an_empty_complaint_is_said_to_be_empty() {
        let (_folder, virsh) = fake("exit 3");
        assert_eq!(
            run(&virsh, LONG).unwrap().complaint(),
            "virsh failed and said nothing"
        );
    }

    #[test]
    fn a_hanging_virsh_and_its_children_are_killed_in_time() {
        let (_folder, virsh) = fake("sleep 1000 & sleep 1000");
        let started = Instant::now();
        let error = run(&virsh, Duration::from_millis(200)).unwrap_err();
        assert_eq!(error.kind, CaptureErrorKind::Tool);
        assert!(error.detail.contains("did not end"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn output_without_end_is_cut_and_refused() {
        let (_folder, virsh) = fake("exec cat /dev/zero");
        let error = run(&virsh, LONG).unwrap_err();
        assert!(error.detail.contains("more than"), "{error}");
    }

    #[test]
    fn output_held_open_by_a_stray_child_does_not_hold_us() {
        let (_folder, virsh) = fake("setsid sleep 30 & exit 0");
        let started = Instant::now();
        let error = run(&virsh, LONG).unwrap_err();
        assert!(error.detail.contains("holds its output"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(15));
    }

    #[test]
    fn output_that_is_no_text_is_refused() {
        let (_folder, virsh) = fake("printf '\\377\\376'");
        assert!(run(&virsh, LONG).unwrap_err().detail.contains("text"));
    }

    #[test]
    fn a_missing_virsh_is_named_with_its_package() {
        let virsh = Process {
            program: "/nonexistent/virsh".into(),
            uri: None,
        };
        let error = run(&virsh, LONG).unwrap_err();
        assert!(error.detail.contains("libvirt-clients"), "{error}");
    }
}
