//! The backup of a running domain, from its begin to its end.

use super::checkpoint;
use super::document::{self, EXPORT_BITMAP};
use super::domain::Domain;
use super::freeze::Frozen;
use super::job;
use super::mark::Mark;
use super::nvram::Nvram;
use super::plan::{DiskPlan, Plan, Tracking};
use super::scratch::{self, Watch};
use super::virsh::Virsh;
use super::{LibvirtSettings, QUERY_LIMIT, folder_kind, refused};
use crate::hypervisor::nbd::{BASE_ALLOCATION, Endpoint, NbdClient};
use crate::hypervisor::nbd_disk::{self, NbdDisk};
use crate::hypervisor::runtime_folder::RuntimeFolder;
use crate::hypervisor::{
    Capture, CaptureError, CaptureErrorKind, CapturedDisk, Changes, Consistency, Freeze, Outcome,
    SinceMark,
};
use crate::model::DiskName;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Time for libvirt to begin a backup; it waits 30 s by itself for others to let go.
const BEGIN_LIMIT: Duration = Duration::from_secs(90);

/// A backup job that we began, with its folders. Ended when dropped, with all checkpoints kept:
/// nobody said what became of it.
struct Job {
    virsh: Arc<dyn Virsh>,
    domain: Domain,
    owner: String,
    runtime: RuntimeFolder,
    /// Only held: libvirt removes the scratch files, and this their folder.
    _scratch: RuntimeFolder,
    socket: PathBuf,
    /// What it made; none if no disk can be tracked.
    checkpoint: Option<String>,
    ended: bool,
}

impl Job {
    fn end(&mut self) -> Result<(), CaptureError> {
        job::end(&*self.virsh, &self.domain, &self.socket)?;
        self.ended = true;
        Ok(())
    }

    /// What cannot be deleted because the domain has stopped meanwhile, the next `open` does.
    fn delete(&self, checkpoint: &str) -> Result<(), CaptureError> {
        let describe = |xml: &str| self.runtime.write("redefinition.xml", xml);
        checkpoint::delete(&*self.virsh, &self.domain, checkpoint, &describe).map(drop)
    }

    /// Deletes our checkpoints, all or all but the new one.
    fn delete_where(&self, wanted: impl Fn(&str) -> bool) -> Result<(), CaptureError> {
        let mut result = Ok(());
        for name in checkpoint::list(&*self.virsh, &self.domain, &self.owner)? {
            if wanted(&name) {
                result = result.and(self.delete(&name));
            }
        }
        result
    }

    fn close(&mut self, outcome: Outcome) -> Result<(), CaptureError> {
        self.end()?;
        let made = self.checkpoint.as_deref();
        match outcome {
            Outcome::Committed => self.delete_where(|name| Some(name) != made),
            Outcome::Abandoned => self.delete_where(|name| Some(name) == made),
            Outcome::Unknown => Ok(()),
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.end();
        }
    }
}

pub(super) struct LibvirtCapture {
    /// Disks whose changes may not be all.
    unproved: Vec<DiskName>,
    disks: Vec<NbdDisk>,
    nvram: Option<Nvram>,
    definition: (String, Vec<u8>),
    consistency: Consistency,
    notes: Vec<String>,
    // After the disks: their connections are closed before the job is ended.
    watch: Watch,
    job: Job,
}

impl LibvirtCapture {
    pub(super) fn open(
        virsh: &Arc<dyn Virsh>,
        domain: Domain,
        definition: (String, Vec<u8>),
        mut notes: Vec<String>,
        mut plan: Plan,
        settings: &LibvirtSettings,
        since: &[SinceMark],
    ) -> Result<Self, CaptureError> {
        let user = domain.qemu_user;
        let kind = folder_kind(&settings.owner);
        let runtime = RuntimeFolder::create(&settings.runtime_dir, &kind, user)?;
        let socket = runtime.socket();
        let scratch = RuntimeFolder::create(&settings.scratch_dir, &kind, user)?;
        scratch::check(scratch.path(), settings.scratch_reserve_bytes)?;
        let name = checkpoint::new_name(&settings.owner)?;
        let checkpoint = document::checkpoint(&plan, &name)
            .map(|xml| runtime.write("checkpoint.xml", &xml))
            .transpose()?;
        let served: Vec<DiskName> = plan
            .disks
            .iter()
            .filter(|plan| plan.disk.has_io_thread)
            .map(|plan| plan.disk.name.clone())
            .collect();
        let scratch_path = scratch.path().to_path_buf();
        let mut job = Job {
            virsh: Arc::clone(virsh),
            domain,
            owner: settings.owner.clone(),
            runtime,
            _scratch: scratch,
            socket: socket.clone(),
            checkpoint: checkpoint.is_some().then_some(name),
            ended: false,
        };
        let result = (|| {
            let instant = begin(
                &mut job,
                &mut plan,
                &scratch_path,
                checkpoint.as_deref(),
                settings,
                &mut notes,
            )?;
            let watch = Watch::start(
                Arc::clone(virsh),
                job.domain.clone(),
                socket,
                scratch_path.clone(),
                settings.scratch_reserve_bytes,
            );
            let nvram = Nvram::of(&job.domain, &mut notes);
            let disks = plan
                .disks
                .into_iter()
                .map(|plan| open_disk(&job, plan, since, &watch))
                .collect::<Result<Vec<NbdDisk>, CaptureError>>()?;
            Ok((instant, watch, nvram, disks))
        })();
        match result {
            Ok((instant, watch, nvram, disks)) => Ok(LibvirtCapture {
                unproved: disks
                    .iter()
                    .filter(|disk| served.contains(&disk.name) && !instant.proves(disk))
                    .map(|disk| disk.name.clone())
                    .collect(),
                disks,
                nvram,
                definition,
                consistency: instant.consistency,
                notes,
                watch,
                job,
            }),
            Err(error) => {
                // What failed first is what the caller must hear; `recover` tries again.
                let _ = job.close(Outcome::Abandoned);
                Err(error)
            }
        }
    }
}

/// How the guest was at the instant.
struct Instant {
    consistency: Consistency,
    /// How much some disks had been written to, soon after it.
    changed_bytes: Vec<(DiskName, u64)>,
}

impl Instant {
    /// Whether the changes of a disk are told to the last.
    ///
    /// In the one transaction that begins a job, libvirt copies the bitmap of a disk's changes
    /// before it sets up the disk's own job, and an I/O thread takes a guest's writes in between:
    /// they are in the image, and in no bitmap that anybody will read. The bitmap that was copied
    /// records on. Where it has grown by nothing since, there was no such write.
    fn proves(&self, disk: &NbdDisk) -> bool {
        let Changes::Extents(extents) = &disk.changes else {
            return true;
        };
        let copied: u64 = extents.iter().map(|extent| extent.length).sum();
        self.changed_bytes.contains(&(disk.name.clone(), copied))
    }
}

/// The instant: freeze, begin, thaw.
fn begin(
    job: &mut Job,
    plan: &mut Plan,
    scratch: &std::path::Path,
    checkpoint: Option<&str>,
    settings: &LibvirtSettings,
    notes: &mut Vec<String>,
) -> Result<Instant, CaptureError> {
    let virsh = Arc::clone(&job.virsh);
    let frozen = match settings.freeze {
        Freeze::Never => None,
        wish => {
            let frozen = Frozen::freeze(
                &*virsh,
                &job.domain,
                &job.runtime,
                settings.guard.as_ref(),
                settings.freeze_limit,
            );
            match (frozen, wish) {
                (Ok(frozen), _) => Some(frozen),
                (Err(error), Freeze::Try) => {
                    notes.push(format!("not frozen for the instant: {error}"));
                    None
                }
                (Err(error), _) => return Err(error),
            }
        }
    };
    let domain = &job.domain;
    let result = loop {
        let xml = document::backup(plan, &job.socket, scratch).ok_or_else(|| {
            CaptureError::new(
                CaptureErrorKind::Invalid,
                scratch.display(),
                "the paths of the runtime and scratch folders must be text",
            )
        })?;
        let backup = job.runtime.write("backup.xml", &xml)?;
        let mut arguments = vec!["backup-begin", &domain.uuid, &backup];
        arguments.extend(checkpoint);
        let limit = frozen.as_ref().map_or(BEGIN_LIMIT, Frozen::left);
        let reply = match virsh.run(&arguments, limit) {
            Ok(reply) => reply,
            Err(error) => break Err(error),
        };
        if reply.success {
            break Ok(());
        }
        // The disk's plan is given up, so this ends after as many rounds as there are disks.
        if !checkpoint::is_broken(&reply) || !plan.give_up(&reply.stderr) {
            break Err(refused(&domain.name, "begin a backup", &reply));
        }
    };
    // As soon as may be, for the guest writes on; where it is frozen, before it does.
    let mut changed_bytes = Vec::new();
    if result.is_ok() {
        for checkpoint in plan.to_be_proved() {
            let limit = frozen.as_ref().map_or(QUERY_LIMIT, Frozen::left);
            // Where it is not told, nothing is proved.
            let told = checkpoint::changed_bytes(&*virsh, domain, &checkpoint, limit);
            let told = told.unwrap_or_default().into_iter();
            changed_bytes.extend(told.filter(|(disk, _)| plan.is_since(disk, &checkpoint)));
        }
    }
    let instant = |consistency| Instant {
        consistency,
        changed_bytes,
    };
    // A guard lets go at the limit; what was frozen longer may not have been frozen to the end.
    let in_time = frozen
        .as_ref()
        .is_some_and(|frozen| !frozen.left().is_zero());
    if let Some(frozen) = frozen {
        let was_frozen = match frozen.thaw() {
            Err(error) if settings.freeze == Freeze::Try && result.is_ok() => {
                notes.push(error.to_string());
                true
            }
            thawed => {
                let was_frozen = thawed?;
                result?;
                was_frozen
            }
        };
        let late = match (in_time, was_frozen) {
            (true, true) => return Ok(instant(Consistency::Filesystem)),
            (false, _) => "the guest was frozen, but the backup began after the limit",
            (true, false) => {
                "the guest was frozen, but thawed itself, perhaps before the backup began"
            }
        };
        if settings.freeze == Freeze::Require {
            return Err(CaptureError::new(
                CaptureErrorKind::Tool,
                &domain.name,
                late,
            ));
        }
        notes.push(late.to_string());
        return Ok(instant(Consistency::Crash));
    }
    result.map(|()| instant(Consistency::Crash))
}

fn open_disk(
    job: &Job,
    plan: DiskPlan,
    since: &[SinceMark],
    watch: &Watch,
) -> Result<NbdDisk, CaptureError> {
    let name = plan.disk.name.clone();
    let shown = format!("{name} of {}", job.domain.name);
    let context = format!("qemu:dirty-bitmap:{EXPORT_BITMAP}");
    let mut endpoint = Endpoint::new(&job.socket, name.as_str()).with_context(BASE_ALLOCATION);
    if matches!(plan.tracking, Tracking::Since(_)) {
        endpoint = endpoint.with_context(context.as_str());
    }
    let client = NbdClient::connect(endpoint).map_err(|error| error.into_capture(&shown))?;
    let size = client.size_bytes();
    let known = since.iter().find(|since| since.disk == name);
    let changes = match (plan.tracking, known) {
        (Tracking::Unknown(reason), _) => Changes::Unknown(reason),
        (Tracking::Since(_), Some(since)) if since.size_bytes == size => {
            nbd_disk::dirty(&client, &context).map_err(|error| error.into_capture(&shown))?
        }
        // A bitmap says nothing of what was added at the end.
        (Tracking::Since(_), since) => Changes::Unknown(format!(
            "the size of the disk changed from {} to {size}",
            since.map_or(0, |since| since.size_bytes)
        )),
    };
    let mark = match (&job.checkpoint, plan.bitmap) {
        (Some(checkpoint), true) => {
            Mark::new(checkpoint, &job.domain.uuid, &plan.disk, size).text()
        }
        _ => None,
    };
    Ok(NbdDisk {
        name,
        shown,
        client,
        changes,
        mark,
        has_allocation: true,
        explain: Some(watch.explain()),
    })
}

impl LibvirtCapture {
    pub(super) fn unproved(&self) -> &[DiskName] {
        &self.unproved
    }
}

impl Capture for LibvirtCapture {
    fn disks(&self) -> Vec<&dyn CapturedDisk> {
        let disks = self.disks.iter().map(|disk| disk as &dyn CapturedDisk);
        let nvram = self.nvram.iter().map(|nvram| nvram as &dyn CapturedDisk);
        disks.chain(nvram).collect()
    }

    fn definition(&self) -> Option<(&str, &[u8])> {
        Some((&self.definition.0, &self.definition.1))
    }

    fn consistency(&self) -> Consistency {
        self.consistency
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What was read is of the instant as long as its job lives.
    fn still_consistent(&self) -> Result<(), CaptureError> {
        self.watch.check()?;
        let running = job::running(&*self.job.virsh, &self.job.domain)?;
        match running.as_ref() == Some(&self.job.socket) {
            true => Ok(()),
            false => Err(CaptureError::new(
                CaptureErrorKind::Inconsistent,
                &self.job.domain.name,
                "its backup job ended before everything was read; was the VM shut down?",
            )),
        }
    }

    fn close(self: Box<Self>, outcome: Outcome) -> Result<(), CaptureError> {
        let LibvirtCapture {
            disks,
            watch,
            mut job,
            ..
        } = *self;
        for disk in disks {
            // The server takes a connection that just ends as well.
            let _ = disk.client.disconnect();
        }
        drop(watch);
        job.close(outcome)
    }
}
