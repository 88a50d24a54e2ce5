mod define;

use super::report::short;
use super::selection;
use crate::cli::answer::Answer;
use crate::cli::args::{ImageFormat, RestoreArgs, VmSelector};
use crate::cli::exit::{Exit, Failure};
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::cli::site::{OpenCustomer, Site, Watching};
use crate::hypervisor::target::{
    DeviceTarget, ImageTarget, Qcow2Target, RawTarget, SyncedTarget, create_folder, partial_files,
};
use crate::hypervisor::{CaptureErrorKind, libvirt};
use crate::jobs::{Choice, JobError, JobErrorKind, RestoreTarget, choose, good_instead, listed};
use crate::jobs::{note_restore, restore};
use crate::model::{DiskName, PointId};
use crate::repository::{Point, PointReader, RepositoryErrorKind};
use define::Definition;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::json;
use std::fmt::Write;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

pub fn run(invocation: &Invocation, args: &RestoreArgs) -> Result<Answer, Failure> {
    let site = Site::open(invocation)?;
    let now = site.host.now();
    let (open, passed_over) = owner(&site, &args.vm, now)?;
    let customer = &open.customer;
    let zone = open.zone();
    let chosen = choose_point(&open, args, &zone, now)?;
    let point = PointReader::open(customer, &chosen)?;
    let names = chosen_disks(&point, &args.disks)?;
    // Whatever stands in the way of it is told before anything is restored.
    let new_domain = Definition::plan(&site, args, &point, &names)?;
    let partial = partial_files(&args.to);
    let targets = targets(&site, args, &point, &names)?;
    let definition = write_definition(args, &point)?;
    let mut notes = passed_over;
    notes.extend(take_down(&site, &open, &point, &names, args)?);
    notes.extend(partial.iter().map(|path| {
        format!(
            "{} is part of a disk, of a restore that was killed or is still going on; remove it if \
             none is",
            path.display()
        )
    }));
    notes.extend(new_domain.iter().flat_map(Definition::notes));
    let suspect = open
        .customer
        .with_state(|state| suspicion(&listed(state, now), &chosen, args, &zone));
    notes.extend(suspect.clone());
    invocation.terminal.warn_each(&notes);

    let paths: Vec<(DiskName, PathBuf)> = targets
        .iter()
        .map(|target| (target.disk.clone(), path_of(args, &point, &target.disk)))
        .collect();
    let watching = Watching::new(invocation);
    let restored = restore(
        customer,
        &point,
        targets,
        site.config.host.threads,
        &watching,
        &invocation.stop,
    );
    drop(watching);
    let restored = restored.map_err(|error| explain(error, args))?;
    let (definition, written) = definition.unzip();
    SyncedTarget::give_names(written.into_iter().collect()).map_err(|error| {
        Failure::from(JobError::from(error))
            .hint("the disks were restored and checked; only the definition is missing")
    })?;
    let defined = new_domain.map(Definition::define).transpose()?;

    let id = chosen.to_string();
    let mut text = format!(
        "{}/{}: {} {} of {}, every byte checked\n",
        open.config.name,
        point.vm,
        point.kind,
        short(&id),
        figures::second(point.taken_at, &zone),
    );
    for (disk, path) in &paths {
        let _ = writeln!(text, "  {disk}: {}", path.display());
    }
    if let Some(path) = &definition {
        let _ = writeln!(text, "  definition: {}", path.display());
    }
    if let Some(defined) = &defined {
        text.push_str(&defined.text());
    }
    let _ = writeln!(
        text,
        "  {} of disks, {} of data",
        figures::bytes(restored.disks_bytes),
        figures::bytes(restored.data_bytes)
    );
    let document = json!({
        "customer": open.config.name.as_str(),
        "vm": point.vm.as_str(),
        "id": id,
        "kind": point.kind.to_string(),
        "taken_at": point.taken_at.to_string(),
        "disks": paths.iter().map(|(disk, path)| json!({
            "name": disk.as_str(), "path": path.to_string_lossy(),
        })).collect::<Vec<_>>(),
        "definition": definition.as_deref().map(Path::to_string_lossy),
        "domain": defined.map(|defined| defined.document()),
        "disks_bytes": restored.disks_bytes,
        "data_bytes": restored.data_bytes,
        "notes": notes,
        "suspect": suspect.is_some(),
    });
    Ok(Answer::done(text, document))
}

/// The customer whose VM is meant: one that is configured, or one that only has points left; and notes on those
/// that were not looked through for it.
fn owner<'a>(
    site: &'a Site,
    selector: &VmSelector,
    now: Timestamp,
) -> Result<(OpenCustomer<'a>, Vec<String>), Failure> {
    let is_configured = site.config.customers.iter().any(|customer| {
        let mut vms = customer.vms.iter();
        vms.any(|vm| selector.matches(&customer.name, &vm.name))
    });
    if is_configured {
        let (customer, _) = selection::configured(&site.config, selector)?;
        return Ok((site.customer(customer)?, Vec::new()));
    }
    let (mut found, mut unopened) = site.customers(|customer| selector.may_be_of(customer))?;
    found.retain(|open| {
        open.customer.with_state(|state| {
            let points = listed(state, now);
            points.iter().any(|(_, point)| point.vm == selector.vm)
        })
    });
    if found.len() > 1 {
        let names: Vec<&str> = found.iter().map(|open| open.config.name.as_str()).collect();
        return Err(selection::ambiguous(selector, &names));
    }
    match found.pop() {
        Some(open) => Ok((open, selection::passed_over(&unopened))),
        // It may be theirs.
        None if !unopened.is_empty() => Err(unopened.swap_remove(0).1),
        None => Err(Failure::new(
            Exit::Usage,
            format!("no VM {selector}, neither configured nor with restore points"),
        )
        .hint("vmkeep points lists what can be restored")),
    }
}

fn choose_point(
    open: &OpenCustomer<'_>,
    args: &RestoreArgs,
    zone: &TimeZone,
    now: Timestamp,
) -> Result<PointId, Failure> {
    let vm = &args.vm.vm;
    let bound = args
        .at
        .bound(zone)
        .map_err(|error| Failure::new(Exit::Usage, format!("--at {}: {error}", args.at)))?;
    let choice = open
        .customer
        .with_state(|state| choose(&listed(state, now), vm, bound));
    match choice {
        Choice::Point(point) => Ok(point),
        Choice::Nearest { later } => Err(Failure::new(
            Exit::Failed,
            format!(
                "{}/{vm} has no restore point as old as {}; the oldest is of {}",
                open.config.name,
                args.at,
                figures::second(later, zone)
            ),
        )
        .hint(format!(
            "the oldest: vmkeep restore {} --at {} --to {}",
            args.vm,
            later,
            args.to.display()
        ))),
        Choice::None => Err(Failure::new(
            Exit::Failed,
            format!("{}/{vm} has no restore point", open.config.name),
        )
        .hint("vmkeep points lists what can be restored")),
    }
}

/// What to know of a suspect point: its bytes are those that were stored, and may not be those of
/// the disks at that instant.
fn suspicion(
    points: &[(PointId, &Point)],
    chosen: &PointId,
    args: &RestoreArgs,
    zone: &TimeZone,
) -> Option<String> {
    let (_, point) = points
        .iter()
        .find(|(id, point)| id == chosen && point.suspect)?;
    let instead = match good_instead(points, chosen) {
        None => "there is no good one of this VM".to_string(),
        Some((_, good)) => format!(
            "{} is of {}: vmkeep restore {} --at {} --to {}",
            match good.taken_at > point.taken_at {
                true => "the next good one",
                false => "no good one is later; the newest",
            },
            figures::second(good.taken_at, zone),
            args.vm,
            good.taken_at,
            args.to.display()
        ),
    };
    Some(format!(
        "restore point {} is suspect: a later full found that the tracking of changes had hidden \
         some, and it may lack them; {instead}",
        short(&chosen.to_string())
    ))
}

fn chosen_disks(point: &PointReader, wanted: &[DiskName]) -> Result<Vec<DiskName>, Failure> {
    let there: Vec<DiskName> = point.disks.iter().map(|disk| disk.name().clone()).collect();
    if let Some(missing) = wanted.iter().find(|disk| !there.contains(disk)) {
        let names: Vec<&str> = there.iter().map(DiskName::as_str).collect();
        return Err(Failure::new(
            Exit::Usage,
            format!(
                "the restore point has no disk {missing}; it has {}",
                names.join(", ")
            ),
        ));
    }
    Ok(match wanted.is_empty() {
        true => there,
        false => there
            .into_iter()
            .filter(|disk| wanted.contains(disk))
            .collect(),
    })
}

fn is_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

fn path_of(args: &RestoreArgs, point: &PointReader, disk: &DiskName) -> PathBuf {
    match is_device(&args.to) {
        true => args.to.clone(),
        false => args.to.join(file_name(args, point, disk)),
    }
}

fn file_name(args: &RestoreArgs, point: &PointReader, disk: &DiskName) -> String {
    match format_of(args, point, disk) {
        ImageFormat::Raw => format!("{disk}.raw"),
        ImageFormat::Qcow2 => format!("{disk}.qcow2"),
    }
}

/// What a firmware stores is the content of a file, and of use as that only.
fn format_of(args: &RestoreArgs, point: &PointReader, disk: &DiskName) -> ImageFormat {
    match is_of_libvirt(point) && disk.as_str() == libvirt::NVRAM {
        true => ImageFormat::Raw,
        false => args.format,
    }
}

fn is_of_libvirt(point: &PointReader) -> bool {
    let definition = point.definition.as_ref();
    definition.is_some_and(|(name, _)| name == libvirt::DEFINITION)
}

/// All targets are made before the first byte is read: what is in the way is told at once.
fn targets(
    site: &Site,
    args: &RestoreArgs,
    point: &PointReader,
    names: &[DiskName],
) -> Result<Vec<RestoreTarget>, Failure> {
    let device = is_device(&args.to);
    if device && (names.len() != 1 || args.format == ImageFormat::Qcow2) {
        return Err(Failure::new(
            Exit::Usage,
            format!(
                "{} is a device: it takes one disk, as raw",
                args.to.display()
            ),
        )
        .hint("choose the disk with --disk NAME"));
    }
    if !device {
        refuse_mistaken_device(args)?;
        create_folder(&args.to).map_err(|error| {
            Failure::new(Exit::Failed, error.to_string())
                .hint("--to is a folder with room for the disks, or a block device")
        })?;
    }
    let runtime_dir = site.host.folder().runtime_dir();
    names
        .iter()
        .map(|name| {
            let size = point
                .disks
                .iter()
                .find(|disk| disk.name() == name)
                .map_or(0, |disk| disk.shape().size_bytes);
            let file = file_name(args, point, name);
            let target: Box<dyn ImageTarget> = match (device, format_of(args, point, name)) {
                (true, _) => Box::new(DeviceTarget::open(&args.to, size, args.force)?),
                (false, ImageFormat::Raw) => Box::new(RawTarget::create(&args.to, &file, size)?),
                (false, ImageFormat::Qcow2) => {
                    Box::new(Qcow2Target::create(&args.to, &file, size, &runtime_dir)?)
                }
            };
            Ok(RestoreTarget {
                disk: name.clone(),
                target,
            })
        })
        .collect::<Result<Vec<_>, crate::hypervisor::CaptureError>>()
        .map_err(|error| match device {
            true => Failure::from(JobError::from(error)).hint("nothing was written to it"),
            false => explain(error.into(), args),
        })
}

/// A device whose name is mistyped must not become a folder with a disk in it, in the memory of this host.
fn refuse_mistaken_device(args: &RestoreArgs) -> Result<(), Failure> {
    let (to, shm) = (&args.to, Path::new("/dev/shm"));
    let is_mistyped = to.starts_with("/dev") && !to.starts_with(shm) && !to.exists();
    match is_mistyped || args.force {
        true => Err(
            Failure::new(Exit::Usage, format!("{} is no block device", to.display()))
                .hint("--force is for block devices alone, and --to a folder makes files"),
        ),
        false => Ok(()),
    }
}

fn explain(error: JobError, args: &RestoreArgs) -> Failure {
    let device = is_device(&args.to);
    let failure = Failure::from(error);
    match (failure.exit, device) {
        (Exit::Failed, false) => {
            failure.hint("nothing was written under a final name; nothing that existed was touched")
        }
        (Exit::DamageFound, false) => failure
            .hint("no image was left behind: half a disk must not look like one")
            .hint("try another date: vmkeep points"),
        (_, true) => failure.hint("what is on the device now is not to be used"),
        _ => failure,
    }
}

/// The ledger says who restores what and why. In a disaster that cannot be written down there,
/// the restore goes on and is noted on this host.
fn take_down(
    site: &Site,
    open: &OpenCustomer<'_>,
    point: &PointReader,
    names: &[DiskName],
    args: &RestoreArgs,
) -> Result<Vec<String>, Failure> {
    let reason = args.reason.as_deref().unwrap_or("");
    let Err(error) = note_restore(&open.customer, point, names, reason) else {
        return Ok(Vec::new());
    };
    // An escrow identity reads everything and is no host of the ledger.
    let stranger = open
        .customer
        .with_state(|state| !state.hosts.contains_key(&site.host.identity().host_id()));
    let disaster = stranger
        || matches!(
            error.kind,
            JobErrorKind::Repository(
                RepositoryErrorKind::Storage(_)
                    | RepositoryErrorKind::Uncertain
                    | RepositoryErrorKind::Newer
                    // Another installation of this host writes.
                    | RepositoryErrorKind::Refused
            )
        );
    if !disaster {
        return Err(error.into());
    }
    let line = format!(
        "{} {}/{} point {} reason: {reason}",
        site.host.now(),
        open.config.name,
        point.vm,
        point.point
    );
    let mut notes = vec![format!(
        "the restore could not be written into the ledger ({error})"
    )];
    match site.host.folder().note_restore(&line) {
        Ok(()) => notes.push("it is noted in restores.log of the state folder".to_string()),
        Err(error) => notes.push(format!("nor on this host ({error})")),
    }
    Ok(notes)
}

/// The VM's own definition goes beside its disks. It is written before they are restored, as what is in its way
/// is told then, and gets its name after them.
fn write_definition(
    args: &RestoreArgs,
    point: &PointReader,
) -> Result<Option<(PathBuf, SyncedTarget)>, Failure> {
    let Some((name, content)) = &point.definition else {
        return Ok(None);
    };
    if is_device(&args.to) {
        return Ok(None);
    }
    // The name came from a hypervisor: it is used only if it is a plain file name.
    let plain = name.len() <= 128
        && !name.starts_with(['.', '-'])
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
    let path = args.to.join(match plain && !name.is_empty() {
        true => name.as_str(),
        false => "definition",
    });
    let written = SyncedTarget::beside(&path, content).map_err(|error| {
        let exit = match error.kind {
            CaptureErrorKind::Invalid => Exit::Usage,
            _ => Exit::Failed,
        };
        Failure::new(exit, error.to_string()).hint("nothing was restored")
    })?;
    Ok(Some((path, written)))
}
