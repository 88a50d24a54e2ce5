//! `virsh` as a process of its own: works with every libvirt, and a hang of it is ended by a kill.

use crate::hypervisor::{CaptureError, CaptureErrorKind};
use crate::tool;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

/// The definition of a domain with many disks has some 100 KiB.
const MAX_OUTPUT: u64 = 4 << 20;

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
        // These say how many file systems, and only where they are not told to be quiet.
        if !matches!(what, "domfsfreeze" | "domfsthaw") {
            command.arg("-q");
        }
        command
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let output = tool::run(&mut command, limit, MAX_OUTPUT).map_err(|error| {
            failed(match error.kind() {
                io::ErrorKind::NotFound => format!(
                    "{} is not there; install libvirt-clients",
                    self.program.display()
                ),
                io::ErrorKind::TimedOut => format!("{error}; is libvirtd well?"),
                _ => error.to_string(),
            })
        })?;
        let text =
            |bytes| String::from_utf8(bytes).map_err(|_| failed("did not say text".to_string()));
        Ok(Reply {
            success: output.status.success(),
            stdout: text(output.stdout)?,
            stderr: text(output.stderr)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Instant;
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
    fn a_freeze_and_a_thaw_are_not_told_to_be_quiet_about_what_they_did() {
        let (_folder, virsh) = fake("echo \"$@\"");
        for command in ["domfsfreeze", "domfsthaw"] {
            let reply = loop {
                match virsh.run(&[command, "x"], LONG) {
                    Err(error) if error.detail.contains("busy") => {}
                    other => break other.unwrap(),
                }
            };
            assert_eq!(reply.stdout, format!("-c test:///x {command} x\n"));
        }
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
