//! Freezing the guest's file systems for the instant, and thawing them on every way out.
//!
//! Three things thaw: we do, after the instant and on every error; a guard, a process of its own
//! that waits for our death or for the limit; and the next `recover`, which finds our word in the
//! folder that we left. A thaw too many is harmless.

use super::domain::Domain;
use super::refused;
use super::virsh::{Process, Reply, Virsh};
use crate::hypervisor::guard::GuardCommand;
use crate::hypervisor::runtime_folder::RuntimeFolder;
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Time for one thaw.
const THAW_LIMIT: Duration = Duration::from_secs(10);
const THAW_ATTEMPTS: u32 = 5;
/// Time between two attempts.
const THAW_PAUSE: Duration = Duration::from_millis(500);
/// Time for a guard to end after it was told that all is well.
const GUARD_LIMIT: Duration = Duration::from_secs(2);
/// What a guard is told when its work has been done.
const THAWED: &[u8] = b"thawed\n";

/// Waits until the other end of `input` is closed or `limit` has passed, and thaws the domain
/// unless it was told that this has been done.
pub fn thaw_when_orphaned(
    mut input: impl Read + Send + 'static,
    virsh_program: PathBuf,
    uri: Option<String>,
    domain: &str,
    limit: Duration,
) -> Result<(), CaptureError> {
    let virsh = Process {
        program: virsh_program,
        uri,
    };
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut said = Vec::new();
        // A broken pipe is an end as well.
        let _ = input.by_ref().take(64).read_to_end(&mut said);
        let _ = sender.send(said);
    });
    match receiver.recv_timeout(limit) {
        Ok(said) if said == THAWED => Ok(()),
        _ => thaw(&virsh, domain, domain),
    }
}

/// Thaws; tries again where the agent or libvirt is busy.
pub(super) fn thaw(virsh: &dyn Virsh, name: &str, uuid: &str) -> Result<(), CaptureError> {
    let mut last = None;
    for attempt in 0..THAW_ATTEMPTS {
        if attempt > 0 {
            std::thread::sleep(THAW_PAUSE);
        }
        match virsh.run(&["domfsthaw", uuid], THAW_LIMIT) {
            Ok(reply) if reply.success => return Ok(()),
            // A VM that has stopped is not frozen.
            Ok(reply) if reply.stderr.contains("domain is not running") => return Ok(()),
            Ok(reply) => last = Some(refused(name, "thaw its file systems", &reply)),
            Err(error) => last = Some(error),
        }
    }
    let detail = last.map_or_else(String::new, |error| error.to_string());
    Err(CaptureError::new(
        CaptureErrorKind::Tool,
        name,
        format!(
            "the guest may still be frozen, and nothing can be written in it: {detail}; \
             run `virsh domfsthaw {name}`"
        ),
    ))
}

/// A guest that is frozen. Dropping it thaws.
pub(super) struct Frozen<'a> {
    virsh: &'a dyn Virsh,
    domain: &'a Domain,
    folder: &'a RuntimeFolder,
    guard: Option<Child>,
    since: Instant,
    limit: Duration,
    thawed: bool,
}

impl<'a> Frozen<'a> {
    pub(super) fn freeze(
        virsh: &'a dyn Virsh,
        domain: &'a Domain,
        folder: &'a RuntimeFolder,
        guard: Option<&GuardCommand>,
        limit: Duration,
    ) -> Result<Self, CaptureError> {
        folder.note_frozen()?;
        let mut frozen = Frozen {
            virsh,
            domain,
            folder,
            guard: guard.map(spawn).transpose()?,
            since: Instant::now(),
            limit,
            thawed: false,
        };
        let reply = virsh.run(&["domfsfreeze", &domain.uuid], limit);
        match reply {
            Ok(reply) if reply.success => Ok(frozen),
            // No agent, so nothing was frozen and a thaw would only wait for it.
            Ok(reply) if is_without_agent(&reply) => {
                frozen.release();
                Err(refused(&domain.name, "freeze its file systems", &reply))
            }
            // Some of them may be frozen.
            Ok(reply) => {
                let why = refused(&domain.name, "freeze its file systems", &reply);
                frozen.thaw().and(Err(why))
            }
            Err(error) => frozen.thaw().and(Err(error)),
        }
    }

    /// How much longer the guest may be frozen.
    pub(super) fn left(&self) -> Duration {
        self.limit.saturating_sub(self.since.elapsed())
    }

    pub(super) fn thaw(mut self) -> Result<(), CaptureError> {
        self.thawed = true;
        let result = thaw(self.virsh, &self.domain.name, &self.domain.uuid);
        match &result {
            Ok(()) => self.release(),
            // The guard hears our end of the pipe close, and tries on its own.
            Err(_) => drop(self.guard.take().map(abandon)),
        }
        result
    }

    fn release(&mut self) {
        self.thawed = true;
        self.folder.note_thawed();
        if let Some(guard) = self.guard.take() {
            dismiss(guard);
        }
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        if self.thawed {
            return;
        }
        if thaw(self.virsh, &self.domain.name, &self.domain.uuid).is_ok() {
            self.release();
        }
    }
}

fn is_without_agent(reply: &Reply) -> bool {
    ["agent is not connected", "agent is not configured"]
        .iter()
        .any(|said| reply.stderr.contains(said))
}

fn spawn(guard: &GuardCommand) -> Result<Child, CaptureError> {
    Command::new(&guard.program)
        .args(&guard.arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // It must outlive Ctrl-C.
        .process_group(0)
        .spawn()
        .map_err(|error| {
            CaptureError::new(
                CaptureErrorKind::Tool,
                guard.program.display(),
                format!("the guard of a frozen guest: {error}"),
            )
        })
}

/// Tells the guard that all is well, and sees it end.
fn dismiss(mut guard: Child) {
    if let Some(mut input) = guard.stdin.take() {
        let _ = input.write_all(THAWED);
    }
    let deadline = Instant::now() + GUARD_LIMIT;
    while Instant::now() < deadline {
        if !matches!(guard.try_wait(), Ok(None)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let _ = guard.kill();
    let _ = guard.wait();
}

/// Leaves the guard to its work.
fn abandon(mut guard: Child) {
    drop(guard.stdin.take());
    std::thread::spawn(move || guard.wait());
}
