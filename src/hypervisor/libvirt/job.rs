//! The backup job of a domain: whether there is one, whose it is, and its end.

use super::domain::Domain;
use super::virsh::Virsh;
use super::{QUERY_LIMIT, folder_kind, refused};
use crate::hypervisor::runtime_folder::{Owner, owner_of};
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
    match owner_of(&socket, runtime_dir, &folder_kind(owner)) {
        Owner::Dead => end(virsh, domain, &socket),
        Owner::Alive => busy("another vmkeep is backing it up right now"),
        Owner::Foreign => busy(
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

/// Whether QEMU paused the guest because of its disks, scratch files among them.
pub(super) fn is_stopped_by_error(
    virsh: &dyn Virsh,
    domain: &Domain,
    limit: Duration,
) -> Result<bool, CaptureError> {
    let state = virsh.run(&["domstate", &domain.uuid, "--reason"], limit)?;
    Ok(state.stdout.contains("paused (I/O error)"))
}

/// A guest whose scratch file could not grow was paused by QEMU. With the job gone its write goes
/// through; if something else is wrong with its disks, it pauses again.
fn resume_after_full_scratch(virsh: &dyn Virsh, domain: &Domain) -> Result<(), CaptureError> {
    if !is_stopped_by_error(virsh, domain, QUERY_LIMIT)? {
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

#[cfg(test)]
mod tests {
    use super::super::testing::{Say, Script, domain};
    use super::*;

    const SOCKET: &str = "/run/v/lv-ab-0123456789abcdef/q/s";
    const OURS: &str = "<domainbackup mode='pull'><server transport='unix' \
                        socket='/run/v/lv-ab-0123456789abcdef/q/s'/></domainbackup>";
    const NONE: &str = "error: Domain backup job id not found: no domain backup job present";

    fn leftover(script: &Script) -> Result<(), CaptureError> {
        end_leftover(script, &domain(), Path::new("/run/v"), "ab")
    }

    #[test]
    fn a_job_of_a_dead_agent_is_ended_and_waited_for() {
        let script = Script::new(vec![
            ("backup-dumpxml", Say::Yes(OURS)),
            ("backup-dumpxml", Say::Yes(OURS)),
            ("domjobabort", Say::Yes("")),
            ("backup-dumpxml", Say::Yes(OURS)),
            ("backup-dumpxml", Say::No(NONE)),
            ("domstate", Say::Yes("running (booted)\n")),
        ]);
        leftover(&script).unwrap();
        let aborts = script.asked();
        let aborts = aborts.iter().filter(|asked| *asked == "domjobabort");
        assert_eq!(aborts.count(), 1);
    }

    #[test]
    fn without_a_job_nothing_is_ended() {
        for none in [
            NONE,
            "Requested operation is not valid: domain is not running",
        ] {
            let script = Script::new(vec![("backup-dumpxml", Say::No(none))]);
            leftover(&script).unwrap();
        }
    }

    #[test]
    fn a_job_of_somebody_else_is_never_ended() {
        for foreign in [
            "<domainbackup mode='push'/>",
            "<domainbackup mode='pull'><server transport='tcp' name='localhost'/></domainbackup>",
            "<domainbackup><server socket='/run/v/lv-abc-0123456789abcdef/q/s'/></domainbackup>",
            "<domainbackup><server socket='/run/w/lv-ab-0123456789abcdef/q/s'/></domainbackup>",
        ] {
            let script = Script::new(vec![("backup-dumpxml", Say::Yes(foreign))]);
            let error = leftover(&script).unwrap_err();
            assert_eq!(error.kind, CaptureErrorKind::Inconsistent, "{foreign}");
            assert!(error.detail.contains("virsh domjobabort"), "{error}");
        }
    }

    #[test]
    fn an_answer_that_is_none_is_not_taken_for_no_job() {
        for say in [
            Say::Yes(""),
            Say::Yes("<domain/>"),
            Say::Yes("<domainbackup>"),
            Say::No(""),
            Say::No("error: failed to connect to the hypervisor"),
            Say::Nothing,
        ] {
            let script = Script::new(vec![("backup-dumpxml", say)]);
            assert!(leftover(&script).is_err());
        }
    }

    #[test]
    fn a_job_that_took_the_place_of_ours_is_left_alone() {
        let other = "<domainbackup mode='pull'><server socket='/x'/></domainbackup>";
        let script = Script::new(vec![
            ("backup-dumpxml", Say::Yes(other)),
            ("domstate", Say::Yes("running (booted)\n")),
        ]);
        end(&script, &domain(), Path::new(SOCKET)).unwrap();
    }

    #[test]
    fn a_guest_that_a_full_scratch_file_has_paused_goes_on() {
        let script = Script::new(vec![
            ("backup-dumpxml", Say::No(NONE)),
            ("domstate", Say::Yes("paused (I/O error)\n")),
            ("resume", Say::Yes("")),
        ]);
        end(&script, &domain(), Path::new(SOCKET)).unwrap();
        assert_eq!(script.asked().last().unwrap(), "resume");
    }
}
