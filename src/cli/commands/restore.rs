mod define;

use super::points::Hidden;
use super::report::short;
use super::selection;
use crate::cli::answer::{Answer, quoted};
use crate::cli::args::{At, ImageFormat, PointSelector, RestoreArgs, VmSelector};
use crate::cli::exit::{Exit, Failure};
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::cli::site::{OpenCustomer, Site, Watching};
use crate::config::{Config, Place};
use crate::hypervisor::target::{
    DeviceTarget, ImageTarget, Qcow2Target, RawTarget, SyncedTarget, create_folder, partial_files,
};
use crate::hypervisor::{CaptureErrorKind, libvirt};
use crate::jobs::{Choice, JobError, JobErrorKind, RestoreTarget, choose, good_instead, listed};
use crate::jobs::{note_restore, restore};
use crate::model::{CustomerName, DiskName, PointId, PointState, VmName};
use crate::repository::{Point, PointReader, RepositoryErrorKind, State};
use define::Definition;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::json;
use std::fmt::Write;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{self, Component, Path, PathBuf};

pub fn run(invocation: &Invocation, args: &RestoreArgs) -> Result<Answer, Failure> {
    let site = Site::open(invocation)?.with_ledgers(!args.without_ledger);
    let now = site.host.now();
    let (open, passed_over) = owner(&site, &args.vm, now)?;
    let customer = &open.customer;
    let zone = open.zone();
    let chosen = choose_point(&open, args, &zone, now).map_err(|failure| {
        let hidden = Hidden::of(&site, &open, now, |vm| *vm == args.vm.vm);
        match (failure.exit, hidden) {
            (Exit::Failed, Some(hidden)) => hidden.refusal(),
            _ => open.notes.iter().fold(failure, Failure::hint),
        }
    })?;
    let point = PointReader::open(customer, &chosen)?;
    let names = chosen_disks(&point, &args.disks)?;
    // Whatever stands in the way of it is told before anything is restored.
    let new_domain = Definition::plan(&site, args, &point, &names)?;
    let partial = partial_files(&args.to);
    let targets = targets(&site, args, &point, &names)?;
    let definition = write_definition(args, &point)?;
    let (mut notes, consistency) = told_when_taken(&open, &chosen);
    let consistency = consistency.filter(|_| !args.without_ledger);
    notes.extend(open.notes.iter().cloned());
    notes.extend(passed_over);
    notes.extend(take_down(&site, &open, &point, &names, args)?);
    notes.extend(definition_left_out(args, &point));
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
    let healed = (!args.without_ledger).then_some(&args.vm);
    let restored = restored.map_err(|error| explain(error, healed, is_device(&args.to)))?;
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
    // Here as well: who wants quiet sees the answer alone.
    for known in open.notes.first().into_iter().chain(&suspect) {
        let _ = writeln!(text, "  {known}");
    }
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
        "consistency": consistency,
        "notes": notes,
        "suspect": (!args.without_ledger).then_some(suspect.is_some()),
        "without_ledger": args.without_ledger,
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
    let hidden = |open: &OpenCustomer<'_>| Hidden::of(site, open, now, |vm| *vm == selector.vm);
    let hidden = found.iter().find_map(hidden);
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
    match (found.pop(), hidden) {
        (Some(open), _) => Ok((open, selection::passed_over(&unopened))),
        (None, Some(hidden)) => Err(hidden.refusal()),
        // It may be theirs.
        (None, None) if !unopened.is_empty() => Err(unopened.swap_remove(0).1),
        (None, None) => Err(Failure::new(
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
    let time = match &args.at {
        At::Time(time) => time,
        At::Point(selector) => {
            let (customer, state) = (&open.config.name, open.customer.state());
            return choose_by_id(&state, customer, vm, selector, zone, now);
        }
    };
    let bound = time
        .bound(zone)
        .map_err(|error| Failure::new(Exit::Usage, format!("--at {time}: {error}")))?;
    let choice = open
        .customer
        .with_state(|state| choose(&listed(state, now), vm, bound));
    match choice {
        Choice::Point(point) => Ok(point),
        Choice::Nearest { later } => Err(Failure::new(
            Exit::Failed,
            format!(
                "{}/{vm} has no restore point as old as {time}; the oldest is of {}",
                open.config.name,
                figures::second(later, zone)
            ),
        )
        .hint(format!("the oldest: {}", command(args, later)))),
        Choice::None => Err(Failure::new(
            Exit::Failed,
            format!("{}/{vm} has no restore point", open.config.name),
        )
        .hint("vmkeep points lists what can be restored")),
    }
}

/// The one listed restore point of the VM whose id begins so.
fn choose_by_id(
    state: &State,
    customer: &CustomerName,
    vm: &VmName,
    selector: &PointSelector,
    zone: &TimeZone,
    now: Timestamp,
) -> Result<PointId, Failure> {
    let mut mine = listed(state, now);
    mine.retain(|(id, point)| point.vm == *vm && selector.matches(id));
    match mine.as_slice() {
        [(id, _)] => return Ok(*id),
        [] => {}
        several => {
            let each = |(id, point): &(PointId, &Point)| {
                format!("{id} of {}", figures::second(point.taken_at, zone))
            };
            let several: Vec<String> = several.iter().map(each).collect();
            return Err(Failure::new(
                Exit::Usage,
                format!(
                    "{selector} is the beginning of several ids of {customer}/{vm}: {}",
                    several.join(", ")
                ),
            )
            .hint("give more digits"));
        }
    }
    let named = state.points.iter();
    let named = named.filter(|(id, point)| selector.matches(id) && !point.void);
    match named.max_by_key(|(_, point)| point.vm == *vm) {
        Some((id, point)) if point.vm != *vm => Err(Failure::new(
            Exit::Usage,
            format!(
                "restore point {} is of {customer}/{}, not of {customer}/{vm}",
                short(&id.to_string()),
                point.vm
            ),
        )
        .hint(format!(
            "vmkeep points {customer}/{vm} lists those of this VM"
        ))),
        Some((id, point)) => {
            let id = id.to_string();
            let expired = Failure::new(
                Exit::Failed,
                format!(
                    "restore point {} of {customer}/{vm} has expired: nobody can restore it",
                    short(&id)
                ),
            );
            Err(
                match point.state == PointState::Expired && now < point.expires_at {
                    true => expired.hint(format!(
                        "its time is not over: vmkeep prune --undo {id} brings it back"
                    )),
                    false => expired.hint("vmkeep points lists what can be restored"),
                },
            )
        }
        None => {
            let missing = Failure::new(
                Exit::Failed,
                format!("{customer}/{vm} has no restore point {selector}"),
            )
            .hint("vmkeep points lists what can be restored");
            let is_number = |digit: char| digit.is_ascii_digit();
            Err(match selector.to_string().chars().all(is_number) {
                true => missing.hint("if a date is meant: it is written as 2026-11-07"),
                false => missing,
            })
        }
    }
}

/// This restore of the point of another time, as it is typed.
fn command(args: &RestoreArgs, at: Timestamp) -> String {
    let to = quoted(&args.to.to_string_lossy());
    let mut line = format!("vmkeep restore {} --at {at} --to {to}", args.vm);
    let mut add = |option: &str, value: &str| {
        let _ = write!(line, " {option} {}", quoted(value));
    };
    for disk in &args.disks {
        add("--disk", disk.as_str());
    }
    if args.format == ImageFormat::Qcow2 {
        add("--format", "qcow2");
    }
    if let Some(name) = &args.define {
        add("--define", &name.to_string());
    }
    if let Some(reason) = &args.reason {
        add("--reason", reason);
    }
    for (said, option) in [
        (args.keep_identity, " --keep-identity"),
        (args.force, " --force"),
        (args.without_ledger, " --without-ledger"),
    ] {
        if said {
            line.push_str(option);
        }
    }
    line
}

/// What was noted of the point when it was taken, and its consistency.
fn told_when_taken(open: &OpenCustomer<'_>, chosen: &PointId) -> (Vec<String>, Option<String>) {
    open.customer.with_state(|state| {
        let Some(point) = state.points.get(chosen) else {
            return (Vec::new(), None);
        };
        let notes = point.notes.iter();
        let notes = notes.map(|note| format!("noted when it was taken: {note}"));
        (notes.collect(), Some(point.consistency.clone()))
    })
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
            "{} is of {}: {}",
            match good.taken_at > point.taken_at {
                true => "the next good one",
                false => "no good one is later; the newest",
            },
            figures::second(good.taken_at, zone),
            command(args, good.taken_at)
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
    if device && !args.force {
        return Err(Failure::new(
            Exit::Usage,
            format!(
                "{}: everything on the device would be destroyed; --force confirms that",
                args.to.display()
            ),
        )
        .hint("nothing was written to it"));
    }
    if !device {
        refuse_unfit_folder(&site.config, args)?;
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
            false => explain(error.into(), Some(&args.vm), false),
        })
}

/// Disks do not last below /dev, which is memory of this host, nor in the store, and have no place beside secrets.
fn refuse_unfit_folder(config: &Config, args: &RestoreArgs) -> Result<(), Failure> {
    let shown = args.to.display();
    let to = where_it_leads(&args.to);
    let refused = |message: String| Failure::new(Exit::Usage, message);
    if args.force {
        return Err(refused(format!("{shown} is no block device"))
            .hint("--force is for block devices alone, and --to a folder makes files"));
    }
    if to.starts_with("/dev") && !to.starts_with("/dev/shm") {
        return Err(refused(format!("{shown} is no block device")).hint(
            "a folder below /dev is memory of this host: name the whole device, or a folder elsewhere",
        ));
    }
    let store = match &config.repository.place {
        Place::Directory(folder) => Some(folder),
        Place::Bucket(_) => None,
    };
    let own = [
        (
            "the store",
            store,
            "where vmkeep removes what it does not know",
        ),
        (
            "the state folder",
            Some(&config.host.state_dir),
            "which is for the identity and the memory of this host alone",
        ),
    ];
    for (what, folder, why) in own {
        if let Some(folder) = folder.filter(|folder| to.starts_with(where_it_leads(folder))) {
            return Err(
                refused(format!("{shown} is in {what}, {}, {why}", folder.display()))
                    .hint("choose a folder outside of it"),
            );
        }
    }
    Ok(())
}

/// The absolute path without links, also of what is not there yet.
fn where_it_leads(path: &Path) -> PathBuf {
    let absolute = path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let mut leads = PathBuf::new();
    for component in absolute.components() {
        match component {
            Component::ParentDir => {
                leads.pop();
            }
            component => {
                leads.push(component);
                leads = leads.canonicalize().unwrap_or(leads);
            }
        }
    }
    leads
}

/// `healed`: the VM whose next full may store anew what is lost. `device`: the target is one.
fn explain(error: JobError, healed: Option<&VmSelector>, device: bool) -> Failure {
    // Of a store that is another one, the failure says what to do.
    let replaced = JobErrorKind::Repository(RepositoryErrorKind::Replaced);
    let is_lost = error.is_damage() && error.kind != replaced;
    let failure = Failure::from(error);
    let left = match (device, is_lost) {
        (true, _) => "what is on the device now is not to be used",
        (false, true) => "no image was left behind: half a disk must not look like one",
        (false, false) => {
            "nothing was written under a final name; nothing that existed was touched"
        }
    };
    if is_lost {
        let mut failure = Failure::new(Exit::DamageFound, failure.message).hint(left);
        if let Some(vm) = healed {
            failure = failure.hint(format!(
                "as long as the VM has what is lost, this stores it anew, for all its restore points: \
                 vmkeep backup --full {vm}"
            ))
            .hint("if it is of the index: --without-ledger looks into the packs themselves");
        }
        return failure
            .hint("another date may need the same bytes, or not: vmkeep points")
            .hint("vmkeep verify --read-data shows all that is damaged");
    }
    match (failure.exit, device) {
        (Exit::Interrupted, true) => {
            Failure::new(Exit::Interrupted, failure.message).hint(format!("{left}; run it again"))
        }
        (Exit::Failed, _) | (_, true) => failure.hint(left),
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

/// A device has no place for the VM's definition.
fn definition_left_out(args: &RestoreArgs, point: &PointReader) -> Option<String> {
    let (name, _) = point.definition.as_ref().filter(|_| is_device(&args.to))?;
    let disks = point.disks.iter();
    let smallest = disks.min_by_key(|disk| disk.shape().size_bytes)?;
    Some(format!(
        "the definition of the VM ({name}) is written into folders only, beside a disk; the smallest: \
         vmkeep restore {} --at {} --disk {} --to DIR",
        args.vm,
        point.taken_at,
        quoted(smallest.name().as_str())
    ))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Arguments, Command};
    use crate::repository::testing::{World, customer_name, image, vm};
    use crate::storage::StorageErrorKind;
    use clap::Parser;

    #[test]
    fn a_point_is_chosen_by_its_id_and_one_that_is_not_meant_is_told_from_none() {
        let mut world = World::new();
        let customer = world.open();
        let web = world.backup(&customer, "web", &image(&[1]), true);
        let db = world.backup(&customer, "db", &image(&[2]), true);
        let mut state = (*customer.state()).clone();
        let now = world.now();
        let choose = |state: &State, digits: &str| {
            let selector = digits.parse().expect("digits of an id");
            let (customer, zone) = (customer_name(), TimeZone::UTC);
            choose_by_id(state, &customer, &vm("web"), &selector, &zone, now)
        };
        let refused = |state: &State, digits: &str| choose(state, digits).expect_err("no point");
        let (id, of_db) = (web.to_string(), db.to_string());
        let first = id.get(..8).expect("digits");
        assert_eq!(choose(&state, first), Ok(web));
        let other = refused(&state, &of_db);
        assert_eq!(other.exit, Exit::Usage);
        assert!(
            other.message.contains("is of acme/db, not of acme/web"),
            "{other:?}"
        );

        let mut bytes = *web.as_bytes();
        bytes[15] ^= 1;
        let alike = PointId::from_bytes(bytes);
        let point = state.points.get(&web).expect("a point").clone();
        state.points.insert(alike, point);
        let both = refused(&state, first);
        assert_eq!(both.exit, Exit::Usage);
        assert!(both.message.contains(&id), "{both:?}");
        assert!(both.message.contains(&alike.to_string()), "{both:?}");
        assert_eq!(choose(&state, &id), Ok(web));

        for point in state.points.values_mut() {
            point.state = PointState::Expired;
        }
        let gone = refused(&state, &id);
        assert!(gone.message.contains("has expired"), "{gone:?}");
        assert!(
            gone.hints.join("").contains(&format!("prune --undo {id}")),
            "{gone:?}"
        );
        state.points.clear();
        let none = refused(&state, "20261107");
        assert!(
            none.message.contains("no restore point 20261107"),
            "{none:?}"
        );
        assert!(none.hints.join("").contains("2026-11-07"), "{none:?}");
    }

    #[test]
    fn what_is_to_be_typed_instead_has_all_options_as_a_shell_takes_them() {
        let line = [
            "vmkeep",
            "restore",
            "acme/web01",
            "--at",
            "2026-11-07",
            "--to",
            "/srv/it's here",
            "--disk",
            "vda",
            "--format",
            "qcow2",
            "--reason",
            "ticket 4711",
            "--force",
            "--without-ledger",
        ];
        let args = match Arguments::try_parse_from(line).map(|arguments| arguments.command) {
            Ok(Command::Restore(args)) => args,
            other => panic!("{other:?}"),
        };
        let at = "2026-11-08T01:00:00Z".parse().expect("a time");
        assert_eq!(
            command(&args, at),
            "vmkeep restore acme/web01 --at 2026-11-08T01:00:00Z --to '/srv/it'\\''s here' \
             --disk vda --format qcow2 --reason 'ticket 4711' --force --without-ledger"
        );
    }

    #[test]
    fn a_failed_restore_says_what_to_do_and_nothing_against_it() {
        let vm: VmSelector = "acme/web01".parse().expect("a VM");
        let failure = |kind, device| explain(JobError::new(kind, "why"), Some(&vm), device);
        let hints = |failure: &Failure| failure.hints.join("; ");
        let interrupted = failure(JobErrorKind::Interrupted, false);
        assert!(hints(&interrupted).contains("the state is clean"));
        let interrupted = failure(JobErrorKind::Interrupted, true);
        assert_eq!(
            hints(&interrupted),
            "what is on the device now is not to be used; run it again"
        );
        for kind in [
            RepositoryErrorKind::Damaged,
            RepositoryErrorKind::Storage(StorageErrorKind::NotFound),
        ] {
            for device in [false, true] {
                let lost = failure(JobErrorKind::Repository(kind), device);
                assert_eq!(lost.exit, Exit::DamageFound);
                for hint in [
                    "vmkeep backup --full acme/web01",
                    "another date may need the same bytes",
                ] {
                    assert!(hints(&lost).contains(hint), "{lost:?}");
                }
                assert_eq!(hints(&lost).contains("not to be used"), device, "{lost:?}");
            }
        }
    }
}
