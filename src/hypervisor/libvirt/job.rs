//! The backup job of a domain: whether there is one, whose it is, and its end.

use super::domain::Domain;
use super::folder::{self, JobOwner};
use super::virsh::Virsh;
use super::{QUERY_LIMIT, refused};
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use roxmltree::Document;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Time for QEMU to let go of the scratch files.
const END_LIMIT: Duration = Duration::from_secs(60);
const ABORT_LIMIT: Duration = Duration::from_secs(60);

/// The socket of the backup job that the domain has, if any.
pub(super) fn running(virsh: &dyn Virsh, domain: &Domain) -> Result<Option<PathBuf>, CaptureError> {
    let reply = virsh.run(&["backup-dumpxml", &domain.uuid], QUERY_LIMIT)?;
    if !reply.success {
        let none = ["no domain backup job", "domain is not running"];
        return match none.iter().any(|said| reply.stderr.contains(said)) {
            true => Ok(None),
            false => Err(refused(&domain.name, "ask for its backup job", &reply)),
        };
    }
    let invalid = |detail: String| {
        CaptureError::new(
            CaptureErrorKind::Invalid,
            &domain.name,
            format!("its backup job cannot be read: {detail}"),
        )
    };
    let document = Document::parse(&reply.stdout).map_err(|error| invalid(error.to_string()))?;
    let root = document.root_element();
    if !root.has_tag_name("domainbackup") {
        return Err(invalid("it is not one".to_string()));
    }
    // A job without a socket (push mode, TCP) is nobody's here.
    let socket = root
        .children()
        .find(|node| node.has_tag_name("server"))
        .and_then(|server| server.attribute("socket"))
        .unwrap_or_default();
    Ok(Some(PathBuf::from(socket)))
}

/// Ends what a dead agent left; refuses if somebody else is at work.
pub(super) fn end_leftover(
    virsh: &dyn Virsh,
    domain: &Domain,
    runtime_dir: &Path,
    owner: &str,
) -> Result<(), CaptureError> {
    let Some(socket) = running(virsh, domain)? else {
        return Ok(());
    };
    let busy = |detail: &str| {
        Err(CaptureError::new(
            CaptureErrorKind::Inconsistent,
            &domain.name,
            detail,
        ))
    };
    match folder::owner_of(&socket, runtime_dir, owner) {
        JobOwner::Dead => end(virsh, domain, &socket),
        JobOwner::Alive => busy("another vmkeep is backing it up right now"),
        JobOwner::Foreign => busy(
            "another program has a backup job of it open; wait for its end, or end it with \
             `virsh domjobabort`",
        ),
    }
}

/// Ends our job, which is the normal end in pull mode, and waits until nothing is left of it.
pub(super) fn end(virsh: &dyn Virsh, domain: &Domain, socket: &Path) -> Result<(), CaptureError> {
    let deadline = Instant::now() + END_LIMIT;
    let mut refusal = None;
    let mut aborted = false;
    loop {
        // Looked at each time: a job that took the place of ours is not ours to end.
        if running(virsh, domain)?.as_deref() != Some(socket) {
            break;
        }
        if Instant::now() > deadline {
            return Err(refusal.unwrap_or_else(|| {
                CaptureError::new(
                    CaptureErrorKind::Tool,
                    &domain.name,
                    format!(
                        "its backup job did not end within {} s",
                        END_LIMIT.as_secs()
                    ),
                )
            }));
        }
        if !aborted {
            let reply = virsh.run(&["domjobabort", &domain.uuid], ABORT_LIMIT)?;
            aborted = reply.success;
            refusal = (!aborted).then(|| refused(&domain.name, "end its backup job", &reply));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    resume_after_full_scratch(virsh, domain)
}

/// A guest whose scratch file could not grow was paused by QEMU. With the job gone its write goes
/// through; if something else is wrong with its disks, it pauses again.
fn resume_after_full_scratch(virsh: &dyn Virsh, domain: &Domain) -> Result<(), CaptureError> {
    let state = virsh.run(&["domstate", &domain.uuid, "--reason"], QUERY_LIMIT)?;
    if !state.stdout.contains("paused (I/O error)") {
        return Ok(());
    }
    let reply = virsh.run(&["resume", &domain.uuid], QUERY_LIMIT)?;
    match reply.success {
        true => Ok(()),
        false => Err(refused(
            &domain.name,
            "resume it after an I/O error during the backup",
            &reply,
        )),
    }
}
