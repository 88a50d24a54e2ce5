//! The source for domains of libvirt, through `virsh` and libvirt's own backup jobs. QEMU's
//! monitor is never spoken to behind libvirt's back.
//!
//! A running domain: one backup job in pull mode over all its writable disks, served on a socket
//! of our choosing, with a checkpoint (a bitmap a disk) made at the same instant. Each disk is told
//! since its own mark: one whose bitmap cannot be used is of unknown changes, with the reason, and
//! the others are not concerned. Bitmaps live in qcow2 images; a raw disk is read in full.
//!
//! Checkpoints are named `vmkeep-<owner>-<random>`. The one of the newest point counts; at a commit
//! the others of this owner are deleted, an abandoned capture deletes its own, and where the outcome
//! is unknown all stay until a mark tells. They do not depend on each other.
//!
//! A disk that an I/O thread serves is tracked where it can be shown that libvirt counted every
//! write of the instant (see `capture`), and read in full otherwise. Pausing the guest for the
//! instant would make that sure; but with QEMU 10.0.2 a guest on I/O threads can wait for ever for
//! a disk after it was paused (seen on a busy host, with the disks emulated).
//!
//! A domain that is shut off has no backup jobs: its images are read (see `offline`).
//!
//! The definition is the XML that defines the domain, with its secrets: without them it could not
//! be defined again as it was. It is sealed with the point. A UEFI firmware's variables come as a
//! small disk named `nvram`, see `nvram`.
//!
//! The way back: `new_domain` makes the definition of a new domain of the one in a restore point,
//! and `Domains` gives it to libvirt.

mod capture;
mod checkpoint;
mod document;
mod domain;
mod domains;
mod freeze;
#[cfg(any(test, fuzzing))]
pub(super) mod hostile_bytes;
mod job;
mod mark;
mod new_domain;
mod nvram;
mod offline;
mod plan;
mod scratch;
#[cfg(test)]
mod testing;
mod virsh;
mod xml;

pub use domains::Domains;
pub use freeze::thaw_when_orphaned;
pub use new_domain::{DomainName, NewDomain, RestoredDisk, Wish, new_domain};

use super::freeze::not_thawed;
use super::guard::GuardCommand;
use super::{
    Capture, CaptureError, CaptureErrorKind, Freeze, Hypervisor, Outcome, Reading, SinceMark,
    qemu_nbd, runtime_folder,
};
use capture::LibvirtCapture;
use checkpoint::Deletion;
use domain::Domain;
use jiff::Timestamp;
use nvram::Nvram;
use offline::OfflineCapture;
use runtime_folder::RuntimeFolder;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use virsh::{Process, Reply, Virsh};

/// Time for one question to libvirt. It waits up to 30 s for a domain that is busy.
const QUERY_LIMIT: Duration = Duration::from_secs(45);
/// How often a job is begun anew because a guest wrote just then; see `capture`.
const PROOF_ATTEMPTS: u32 = 4;
/// The name of the definition in a restore point.
pub const DEFINITION: &str = "domain.xml";
/// The name of the disk that holds the firmware's variables. It is the content of a file, whatever
/// the format of the disks is.
pub const NVRAM: &str = "nvram";

#[derive(Debug, Clone)]
pub struct LibvirtSettings {
    /// Name or UUID.
    pub domain: String,
    /// `None`: as virsh decides. Must be libvirt on this host, for its sockets are used.
    pub uri: Option<String>,
    /// Letters and digits that no other repository, customer or VM has: whose checkpoints are
    /// whose.
    pub owner: String,
    /// Where QEMU keeps what the guest overwrites meanwhile. QEMU's user must be able to pass
    /// through.
    pub scratch_dir: PathBuf,
    /// A capture is given up before less than this is free there.
    pub scratch_reserve_bytes: u64,
    /// For sockets; QEMU's user must be able to pass through.
    pub runtime_dir: PathBuf,
    pub freeze: Freeze,
    /// Longest time that the guest may be frozen.
    pub freeze_limit: Duration,
    /// What thaws the guest if this process dies meanwhile: the command that runs
    /// [`thaw_when_orphaned`] on its standard input.
    pub guard: Option<GuardCommand>,
    /// The program, by name or path.
    pub virsh: PathBuf,
    /// A time not later than `open` is called.
    pub now: Timestamp,
}

/// A domain of libvirt.
pub struct LibvirtSource {
    settings: LibvirtSettings,
    virsh: Arc<dyn Virsh>,
}

impl LibvirtSource {
    pub fn new(settings: LibvirtSettings) -> Result<Self, CaptureError> {
        let invalid =
            |detail: &str| CaptureError::new(CaptureErrorKind::Invalid, &settings.domain, detail);
        if !checkpoint::is_owner(&settings.owner) {
            return Err(invalid(
                "the owner of its checkpoints must be 1 to 32 letters and digits",
            ));
        }
        if settings.domain.is_empty() || settings.domain.starts_with('-') {
            return Err(invalid("this is not the name of a domain"));
        }
        if !is_local(settings.uri.as_deref()) {
            return Err(invalid(
                "libvirt must be on this host: a backup is read through its local socket",
            ));
        }
        let virsh = Arc::new(Process {
            program: settings.virsh.clone(),
            uri: settings.uri.clone(),
        });
        Ok(LibvirtSource { settings, virsh })
    }

    fn domain(&self) -> Result<Domain, CaptureError> {
        find(&*self.virsh, &self.settings.domain)
    }

    /// What defines the domain, secrets and all.
    fn definition(&self, domain: &Domain) -> Result<(String, Vec<u8>), CaptureError> {
        let arguments = ["dumpxml", &domain.uuid, "--inactive", "--security-info"];
        let reply = self.virsh.run(&arguments, QUERY_LIMIT)?;
        if !reply.success {
            return Err(refused(&domain.name, "give its definition", &reply));
        }
        Domain::parse(&domain.uuid, &reply.stdout)?;
        Ok((DEFINITION.to_string(), reply.stdout.into_bytes()))
    }

    /// Deletes checkpoints; the first error is told. Says whether all are gone.
    fn delete(&self, domain: &Domain, names: &[String]) -> Result<Deletion, CaptureError> {
        if names.is_empty() {
            return Ok(Deletion::Done);
        }
        let settings = &self.settings;
        let kind = folder_kind(&settings.owner);
        let folder = RuntimeFolder::create(&settings.runtime_dir, &kind, None)?;
        let describe = |xml: &str| folder.write("redefinition.xml", xml);
        let mut result = Ok(Deletion::Done);
        for name in names {
            let deletion = checkpoint::delete(&*self.virsh, domain, name, &describe);
            if result == Ok(Deletion::Done) {
                result = deletion;
            }
        }
        result
    }
}

impl Hypervisor for LibvirtSource {
    fn open(
        &self,
        since: &[SinceMark],
        reading: Reading,
    ) -> Result<Box<dyn Capture>, CaptureError> {
        let settings = &self.settings;
        let domain = self.domain()?;
        if domain.disks.is_empty() {
            let mut why = vec!["the domain has no disks to back up".to_string()];
            why.extend_from_slice(&domain.skipped);
            return Err(CaptureError::new(
                CaptureErrorKind::Invalid,
                &domain.name,
                why.join("; "),
            ));
        }
        let definition = self.definition(&domain)?;
        let mut notes = domain.skipped.clone();
        runtime_folder::create_parent(&settings.runtime_dir)?;
        if !domain.active {
            let nvram = Nvram::of(&domain, &mut notes);
            let capture = OfflineCapture::open(
                &self.virsh,
                &domain,
                definition,
                nvram,
                notes,
                settings,
                (since, reading),
            )?;
            return Ok(Box::new(capture));
        }
        // Not under the freeze: a job in the way is found before.
        job::end_leftover(
            &*self.virsh,
            &domain,
            &settings.runtime_dir,
            &settings.owner,
        )?;
        let checkpoints = checkpoint::list(&*self.virsh, &domain, &settings.owner)?;
        let mut plan = plan::plan(&domain, &checkpoints, since, &settings.owner);
        if let Err(error) = self.delete(&domain, &plan.needless) {
            notes.push(format!("a needless checkpoint stays: {error}"));
        }
        let mut attempt = 1;
        loop {
            let capture = LibvirtCapture::open(
                &self.virsh,
                domain.clone(),
                definition.clone(),
                notes.clone(),
                plan.clone(),
                settings,
                since,
            )?;
            if capture.unproved().is_empty() {
                return Ok(Box::new(capture));
            }
            if attempt >= PROOF_ATTEMPTS {
                plan.give_up_unproved(capture.unproved());
            }
            attempt += 1;
            Box::new(capture).close(Outcome::Abandoned)?;
        }
    }

    fn recover(&self) -> Result<Vec<String>, CaptureError> {
        let settings = &self.settings;
        let mut notes = Vec::new();
        let mut stay = 0;
        // Locked as long as they are held here, so nobody else takes them meanwhile.
        let kind = folder_kind(&settings.owner);
        let dead = runtime_folder::dead(&settings.runtime_dir, &kind)?;
        let domain = self.domain()?;
        if domain.active {
            if dead.iter().any(RuntimeFolder::is_frozen)
                && let Err(error) = freeze::thaw(&*self.virsh, &domain.name, &domain.uuid)
            {
                // One word is enough for the next time.
                stay = usize::from(settings.freeze != Freeze::Never);
                notes.push(not_thawed(error));
            }
            match job::running(&*self.virsh, &domain)? {
                Some(socket) if dead.iter().any(|dead| socket.starts_with(dead.path())) => {
                    job::end(&*self.virsh, &domain, &socket)?;
                }
                // Also one of ours whose folder has gone.
                _ => job::end_leftover(
                    &*self.virsh,
                    &domain,
                    &settings.runtime_dir,
                    &settings.owner,
                )?,
            }
        }
        // A VM that is shut off is not frozen.
        dead.iter()
            .filter(|dead| dead.is_frozen())
            .skip(stay)
            .for_each(RuntimeFolder::note_thawed);
        drop(dead);
        drop(runtime_folder::dead(&settings.scratch_dir, &kind)?);
        // Those of the servers for stopped domains.
        qemu_nbd::remove_dead(&settings.runtime_dir)?;
        Ok(notes)
    }

    fn release(&self) -> Result<Vec<String>, CaptureError> {
        let settings = &self.settings;
        let domain = self.domain()?;
        let names = checkpoint::list(&*self.virsh, &domain, &settings.owner)?;
        match self.delete(&domain, &names)? {
            Deletion::Done => Ok(names),
            Deletion::Later => Err(CaptureError::new(
                CaptureErrorKind::Tool,
                &domain.name,
                "libvirt deletes checkpoints of running domains only; start it first",
            )),
        }
    }
}

/// A domain as it is now, by name or UUID.
fn find(virsh: &dyn Virsh, wanted: &str) -> Result<Domain, CaptureError> {
    let reply = virsh.run(&["dumpxml", wanted], QUERY_LIMIT)?;
    if reply.success {
        return Domain::parse(wanted, &reply.stdout);
    }
    let kind = match reply.stderr.contains("failed to get domain") {
        true => CaptureErrorKind::Missing,
        false => CaptureErrorKind::Tool,
    };
    Err(CaptureError::new(kind, wanted, reply.complaint()))
}

/// The folders of the captures of one owner.
fn folder_kind(owner: &str) -> String {
    format!("lv-{owner}")
}

/// Whether the libvirt behind a URI is on this host, as far as the URI tells.
fn is_local(uri: Option<&str>) -> bool {
    match uri.and_then(|uri| uri.split_once(':')) {
        Some((scheme, _)) => !scheme.contains('+') || scheme.ends_with("+unix"),
        None => true,
    }
}

fn refused(domain: &str, what: &str, reply: &Reply) -> CaptureError {
    let hint = match reply.stderr.contains("state change lock") {
        true => "; another job holds the domain (backup, migration, snapshot)",
        false => "",
    };
    CaptureError::new(
        CaptureErrorKind::Tool,
        domain,
        format!("libvirt refused to {what}: {}{hint}", reply.complaint()),
    )
}
