//! A `qemu-nbd` that serves one qcow2 image to us alone.
//!
//! Why `qemu-nbd` and not `qemu-storage-daemon`: without `--persistent` it ends when its last
//! client has gone, and the kernel closes our connections when we are killed, so nothing of ours
//! keeps the image locked for ever. (Tying it to its parent needs `unsafe` code.)
//!
//! The image is handed over as the server's standard input and named `/proc/self/fd/0`: it opens
//! the very file that was checked here, whatever has happened to the path since, and no path has
//! to be quoted for QEMU. Drivers are named explicitly, so nothing is probed.

use super::nbd::{Endpoint, NbdClient, NbdError};
use super::runtime_folder::{self, RuntimeFolder};
use super::{CaptureError, CaptureErrorKind};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Time for the server to open its image and listen.
const START_LIMIT: Duration = Duration::from_secs(30);
/// Time for a server that only reads to end after its last client has gone.
const END_LIMIT: Duration = Duration::from_secs(60);
/// Time for one that writes to flush, and to end: the disk may be slow and have other work. One that dies meanwhile
/// hangs up at once.
const FLUSH_LIMIT: Duration = Duration::from_secs(60 * 60);
const CONNECTIONS: usize = 8;
/// The folders of servers.
const KIND: &str = "nbd";
const TOOL_MISSING: &str = "is not in PATH; install qemu-utils";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    ReadOnly,
    ReadWrite,
}

pub(super) struct QemuNbd {
    /// For messages: the disk or target.
    name: String,
    /// Dropped before the child is waited for, so that the child ends by itself.
    client: Option<NbdClient>,
    child: Child,
    folder: RuntimeFolder,
    end_limit: Duration,
}

impl QemuNbd {
    /// Serves the qcow2 image behind `image`, which must be open for what `access` says.
    pub(super) fn serve(
        name: &str,
        image: &File,
        access: Access,
        runtime_dir: &Path,
        contexts: &[&str],
    ) -> Result<Self, CaptureError> {
        let failed = |error: io::Error| CaptureError::new(CaptureErrorKind::Io, name, error);
        let folder = RuntimeFolder::create(runtime_dir, KIND, None)?;
        let log = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(folder.log())
            .map_err(failed)?;
        let mut command = Command::new("qemu-nbd");
        command
            .arg(format!("--shared={CONNECTIONS}"))
            .arg("--socket")
            .arg(folder.socket())
            .args((access == Access::ReadOnly).then_some("--read-only"))
            .arg(format!("json:{}", drivers(access)))
            .env("LC_ALL", "C")
            .stdin(Stdio::from(image.try_clone().map_err(failed)?))
            .stdout(Stdio::null())
            .stderr(Stdio::from(log))
            // Ctrl-C is for us; we then end the server in good order.
            .process_group(0);
        let child = command
            .spawn()
            .map_err(|error| tool_error("qemu-nbd", error))?;
        let mut server = QemuNbd {
            name: name.to_string(),
            client: None,
            child,
            folder,
            end_limit: match access {
                Access::ReadOnly => END_LIMIT,
                Access::ReadWrite => FLUSH_LIMIT,
            },
        };
        server.client = Some(server.first_client(contexts)?);
        Ok(server)
    }

    fn first_client(&mut self, contexts: &[&str]) -> Result<NbdClient, CaptureError> {
        let mut endpoint = Endpoint::new(self.folder.socket(), "");
        endpoint.contexts = contexts.iter().map(|name| name.to_string()).collect();
        endpoint.connections = CONNECTIONS;
        endpoint.flush_timeout = FLUSH_LIMIT;
        let deadline = Instant::now() + START_LIMIT;
        loop {
            if let Some(status) = self.ended()? {
                return Err(self.tool(format!(
                    "qemu-nbd ended with {status}: {}",
                    self.complaint()
                )));
            }
            match NbdClient::connect(endpoint.clone()) {
                Ok(client) => return Ok(client),
                Err(NbdError::Io(error))
                    if matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                    ) && Instant::now() < deadline => {}
                Err(NbdError::Io(_)) => {
                    return Err(self.tool(format!(
                        "qemu-nbd did not listen within {} s: {}",
                        START_LIMIT.as_secs(),
                        self.complaint()
                    )));
                }
                Err(error) => return Err(error.into_capture(&self.name)),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub(super) fn client(&self) -> Result<&NbdClient, CaptureError> {
        self.client
            .as_ref()
            .ok_or_else(|| self.tool("qemu-nbd has no connection".to_string()))
    }

    /// Says goodbye and waits until the server has closed its image and ended without error.
    pub(super) fn finish(mut self) -> Result<(), CaptureError> {
        if let Some(client) = self.client.take() {
            client
                .disconnect()
                .map_err(|error| error.into_capture(&self.name))?;
        }
        let deadline = Instant::now() + self.end_limit;
        loop {
            match self.ended()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => {
                    let detail = format!("qemu-nbd ended with {status}: {}", self.complaint());
                    return Err(self.tool(detail));
                }
                None if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                None => {
                    return Err(self.tool(format!(
                        "qemu-nbd did not end within {} s",
                        self.end_limit.as_secs()
                    )));
                }
            }
        }
    }

    fn ended(&mut self) -> Result<Option<ExitStatus>, CaptureError> {
        self.child
            .try_wait()
            .map_err(|error| self.tool(format!("qemu-nbd: {error}")))
    }

    fn tool(&self, detail: String) -> CaptureError {
        CaptureError::new(CaptureErrorKind::Tool, &self.name, detail)
    }

    /// What the server wrote to its standard error.
    fn complaint(&self) -> String {
        let mut bytes = Vec::new();
        let read =
            File::open(self.folder.log()).and_then(|log| log.take(4096).read_to_end(&mut bytes));
        match read {
            Ok(0) | Err(_) => "it said nothing".to_string(),
            Ok(_) => one_line(&bytes),
        }
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        // Also reached after `finish`, where both are no-ops on a child that was waited for.
        drop(self.client.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Removes what dead agents left in `runtime_dir`, and ends servers that wait for a client of
/// theirs.
pub(super) fn remove_dead(runtime_dir: &Path) -> Result<(), CaptureError> {
    for folder in runtime_folder::dead(runtime_dir, KIND)? {
        // A server whose agent died before its first connection waits for one; it ends when
        // that has been and gone.
        let mut endpoint = Endpoint::new(folder.socket(), "");
        endpoint.timeout = Duration::from_secs(2);
        if let Ok(client) = NbdClient::connect(endpoint) {
            let _ = client.disconnect();
        }
    }
    Ok(())
}

/// The block nodes: qcow2 over file, nothing below. `backing` is null because an image that has
/// a backing file was refused before; a second look by QEMU would read another file than ours.
fn drivers(access: Access) -> serde_json::Value {
    let read_only = access == Access::ReadOnly;
    serde_json::json!({
        "driver": "qcow2",
        "read-only": read_only,
        "backing": null,
        "discard": "unmap",
        "detect-zeroes": "off",
        "file": {
            "driver": "file",
            "filename": "/proc/self/fd/0",
            "read-only": read_only,
            "discard": "unmap",
        },
    })
}

/// Runs a tool of QEMU on the file behind `image`, reachable for it as `/proc/self/fd/0`.
pub(super) fn run_tool(
    tool: &str,
    arguments: &[&str],
    name: &str,
    image: &File,
) -> Result<(), CaptureError> {
    let stdin = image
        .try_clone()
        .map_err(|error| CaptureError::new(CaptureErrorKind::Io, name, error))?;
    let output = Command::new(tool)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::from(stdin))
        .output()
        .map_err(|error| tool_error(tool, error))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(CaptureError::new(
            CaptureErrorKind::Tool,
            name,
            format!(
                "{tool} ended with {}: {}",
                output.status,
                one_line(&output.stderr)
            ),
        )),
    }
}

fn tool_error(tool: &str, error: io::Error) -> CaptureError {
    match error.kind() {
        io::ErrorKind::NotFound => CaptureError::new(CaptureErrorKind::Tool, tool, TOOL_MISSING),
        _ => CaptureError::new(CaptureErrorKind::Tool, tool, error),
    }
}

fn one_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let words: Vec<&str> = text.split_whitespace().collect();
    words
        .join(" ")
        .chars()
        .filter(|letter| !letter.is_control())
        .take(400)
        .collect()
}
