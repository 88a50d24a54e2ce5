use super::problem::Problem;
use super::section::Section;
use super::terms::{read_override, shorten};
use crate::model::{CustomerName, DiskName, VmName};
use crate::policy::{Override, Policy, PolicyTerms};
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use toml::de::DeValue;

/// One customer: a prefix, a key and a policy of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Customer {
    pub name: CustomerName,
    pub overrides: Override,
    /// The terms that hold for this customer: those of the house, shortened by `overrides`.
    pub terms: PolicyTerms,
    /// What `terms` mean.
    pub policy: Policy,
    /// `age1…` recipients that can open this customer's key, besides the repository's.
    pub escrow: Vec<String>,
    pub vms: Vec<Vm>,
    /// Where the customer is configured, for messages.
    pub file: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vm {
    pub name: VmName,
    pub source: VmSource,
}

/// Where a VM's disks are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmSource {
    /// Stopped: its images. Sorted by name; at least one.
    Images(Vec<Disk>),
    /// Running: QEMU's monitor.
    Qmp(QmpVm),
    /// Running or stopped: a domain of libvirt.
    Libvirt(LibvirtVm),
    /// Made readable by somebody else, who writes a job to this file.
    Nbd(PathBuf),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QmpVm {
    pub monitor: PathBuf,
    pub guest_agent: Option<PathBuf>,
    pub fsfreeze: FsFreeze,
    /// Disks that are left out.
    pub exclude: Vec<DiskName>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibvirtVm {
    pub domain: String,
    pub fsfreeze: FsFreeze,
}

/// Whether the guest's file systems are frozen for the instant of the backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FsFreeze {
    Require,
    Try,
    Never,
}

impl FsFreeze {
    pub fn as_str(self) -> &'static str {
        match self {
            FsFreeze::Require => "require",
            FsFreeze::Try => "try",
            FsFreeze::Never => "never",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub name: DiskName,
    pub path: PathBuf,
    pub format: DiskFormat,
}

/// Always said, never probed: a raw disk whose content starts like a qcow2 is a raw disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFormat {
    /// A raw image or a block device.
    Raw,
    Qcow2,
}

impl DiskFormat {
    pub fn as_str(self) -> &'static str {
        match self {
            DiskFormat::Raw => "raw",
            DiskFormat::Qcow2 => "qcow2",
        }
    }
}

const GENERAL_ONLY: &[(&str, &str)] = &[
    ("timezone", "one for all customers, in [policy]"),
    ("window", "one for all customers, in [policy]"),
    ("full_day", "one for all customers, in [policy]"),
    (
        "customer",
        "this file is one customer: write id = \"…\" and [[vm]] without [[customer]]",
    ),
    (
        "policy",
        "only in the main file; a customer's overrides stand beside its id",
    ),
    ("host", "only in the main file"),
    ("repository", "only in the main file"),
];

/// Names and paths seen in all files, with the problem-ready description of where.
#[derive(Default)]
pub(super) struct Seen {
    customers: BTreeMap<String, String>,
    disks: BTreeMap<PathBuf, String>,
}

fn place(problem: &Problem) -> String {
    match problem.line {
        Some(line) => format!("{}:{line}", problem.file.display()),
        None => problem.file.display().to_string(),
    }
}

pub(super) fn read_customer(
    mut section: Section<'_>,
    house: Option<&PolicyTerms>,
    file: &Path,
    seen: &mut Seen,
    problems: &mut Vec<Problem>,
) -> Option<Customer> {
    let name = section.required("id", problems).and_then(|id| {
        let here = section.problem("id", "");
        let name = CustomerName::new(id)
            .map_err(|error| problems.push(section.problem("id", error.to_string())))
            .ok()?;
        if let Some(first) = seen.customers.get(id) {
            problems.push(section.problem("id", format!("customer {id:?} is already in {first}")));
            return None;
        }
        seen.customers.insert(id.to_string(), place(&here));
        Some(name)
    });
    if let Some(name) = &name {
        section.rename(format!("customer.{name}"));
    }
    let overrides = read_override(&mut section, problems);
    let shortened = shorten(house, &overrides, &section, problems);
    let escrow = read_recipients(&mut section, problems);
    let mut vm_names = BTreeMap::new();
    let mut vms = Vec::new();
    for vm in section.tables("vm", problems) {
        vms.extend(read_vm(vm, &mut vm_names, seen, problems));
    }
    section.finish(GENERAL_ONLY, problems);
    let (terms, policy) = shortened?;
    Some(Customer {
        name: name?,
        overrides,
        terms,
        policy,
        escrow,
        vms,
        file: file.to_path_buf(),
    })
}

fn read_vm(
    mut section: Section<'_>,
    vm_names: &mut BTreeMap<String, String>,
    seen: &mut Seen,
    problems: &mut Vec<Problem>,
) -> Option<Vm> {
    let name = section.required("name", problems).and_then(|text| {
        let here = section.problem("name", "");
        let name = VmName::new(text)
            .map_err(|error| problems.push(section.problem("name", error.to_string())))
            .ok()?;
        if let Some(first) = vm_names.get(text) {
            let message = format!("VM {text:?} is already in {first}");
            problems.push(section.problem("name", message));
            return None;
        }
        vm_names.insert(text.to_string(), place(&here));
        Some(name)
    });
    if let Some(name) = &name {
        let here = section.path_of(name.as_str());
        section.rename(here);
    }
    let sources: Vec<&str> = ["disks", "qmp", "libvirt", "nbd"]
        .into_iter()
        .filter(|key| section.contains(key))
        .collect();
    match sources.as_slice() {
        [_] => {}
        [] => problems.push(section.problem(
            "disks",
            "is missing: a VM has disks = { vda = \"/path/to/image\" }",
        )),
        several => problems.push(section.problem(
            "disks",
            format!(
                "exactly one of disks, qmp, libvirt, nbd; found {}",
                several.join(" and ")
            ),
        )),
    }
    let source = match sources.as_slice() {
        ["qmp"] => read_qmp(&mut section, problems).map(VmSource::Qmp),
        ["libvirt"] => read_libvirt(&mut section, problems).map(VmSource::Libvirt),
        ["nbd"] => read_nbd(&mut section, problems).map(VmSource::Nbd),
        ["disks"] => section
            .table("disks", problems)
            .map(|disks| VmSource::Images(read_disks(disks, seen, problems))),
        _ => None,
    };
    let elsewhere: &[(&str, &str)] = match sources.as_slice() {
        ["libvirt"] => &[
            ("guest_agent", "goes with qmp only; libvirt has its own"),
            ("exclude", "goes with qmp only"),
        ],
        ["nbd"] => &[
            ("guest_agent", "goes with qmp only"),
            (
                "fsfreeze",
                "goes with qmp and libvirt; here whoever hands the job in freezes",
            ),
            (
                "exclude",
                "goes with qmp only; here whoever hands the job in leaves disks out",
            ),
        ],
        _ => &[
            ("guest_agent", "goes with qmp only"),
            ("fsfreeze", "goes with qmp and libvirt"),
            ("exclude", "goes with qmp only"),
        ],
    };
    section.finish(elsewhere, problems);
    Some(Vm {
        name: name?,
        source: source?,
    })
}

fn read_qmp(section: &mut Section<'_>, problems: &mut Vec<Problem>) -> Option<QmpVm> {
    let monitor = PathBuf::from(section.text("qmp", problems)?);
    let guest_agent = section.text("guest_agent", problems).map(PathBuf::from);
    let mut good = check_path(section, "qmp", &monitor, problems);
    if let Some(agent) = &guest_agent {
        good &= check_path(section, "guest_agent", agent, problems);
    }
    let fsfreeze = read_fsfreeze(section, problems);
    if fsfreeze == FsFreeze::Require && guest_agent.is_none() {
        problems.push(section.problem("fsfreeze", "\"require\" needs guest_agent = \"…\""));
        good = false;
    }
    let exclude = section
        .texts("exclude", problems)
        .into_iter()
        .filter_map(|text| {
            DiskName::new(text)
                .map_err(|error| problems.push(section.problem("exclude", error.to_string())))
                .ok()
        })
        .collect();
    good.then_some(QmpVm {
        monitor,
        guest_agent,
        fsfreeze,
        exclude,
    })
}

fn read_libvirt(section: &mut Section<'_>, problems: &mut Vec<Problem>) -> Option<LibvirtVm> {
    let domain = section.text("libvirt", problems)?.to_string();
    let fsfreeze = read_fsfreeze(section, problems);
    // It becomes an argument of virsh.
    if domain.is_empty() || domain.starts_with('-') || domain.chars().any(char::is_control) {
        problems.push(section.problem("libvirt", "is not the name of a domain"));
        return None;
    }
    Some(LibvirtVm { domain, fsfreeze })
}

fn read_nbd(section: &mut Section<'_>, problems: &mut Vec<Problem>) -> Option<PathBuf> {
    let file = PathBuf::from(section.text("nbd", problems)?);
    check_path(section, "nbd", &file, problems).then_some(file)
}

fn read_fsfreeze(section: &mut Section<'_>, problems: &mut Vec<Problem>) -> FsFreeze {
    match section.text("fsfreeze", problems) {
        None | Some("try") => FsFreeze::Try,
        Some("require") => FsFreeze::Require,
        Some("never") => FsFreeze::Never,
        Some(other) => {
            let message = format!("{other:?} is not \"require\", \"try\" or \"never\"");
            problems.push(section.problem("fsfreeze", message));
            FsFreeze::Try
        }
    }
}

fn read_disks(section: Section<'_>, seen: &mut Seen, problems: &mut Vec<Problem>) -> Vec<Disk> {
    let mut disks = Vec::new();
    for (key, value) in section.entries() {
        let name = DiskName::new(key)
            .map_err(|error| problems.push(section.problem(key, error.to_string())))
            .ok();
        let (path, format) = match value.get_ref() {
            DeValue::String(path) => (Some(path.as_ref()), None),
            DeValue::Table(_) => match section.entry_table(key, value) {
                Some(mut table) => {
                    let path = table.required("path", problems);
                    let format = table.text("format", problems).and_then(|text| match text {
                        "raw" => Some(DiskFormat::Raw),
                        "qcow2" => Some(DiskFormat::Qcow2),
                        other => {
                            let message = format!("{other:?} is not \"raw\" or \"qcow2\"");
                            problems.push(table.problem("format", message));
                            None
                        }
                    });
                    table.finish(&[], problems);
                    (path, format)
                }
                None => (None, None),
            },
            other => {
                let message = format!(
                    "expected a path or {{ path = …, format = … }}, found {}",
                    other.type_str()
                );
                problems.push(section.problem(key, message));
                (None, None)
            }
        };
        let Some(path) = path.map(PathBuf::from) else {
            continue;
        };
        if !check_path(&section, key, &path, problems) {
            continue;
        }
        let plain: PathBuf = path.components().collect();
        let here = section.problem(key, "");
        if let Some(first) = seen.disks.get(&plain) {
            let message = format!("{} is already a disk in {first}", path.display());
            problems.push(section.problem(key, message));
            continue;
        }
        seen.disks.insert(plain, place(&here));
        let format = format.unwrap_or_else(|| {
            match path
                .extension()
                .is_some_and(|extension| extension == "qcow2")
            {
                true => DiskFormat::Qcow2,
                false => DiskFormat::Raw,
            }
        });
        disks.extend(name.map(|name| Disk { name, path, format }));
    }
    if section.entries().next().is_none() {
        problems.push(section.problem("", "a VM needs at least one disk"));
    }
    disks
}

/// Paths are absolute and without `..`, so that they mean the same from cron and from a shell.
pub(super) fn check_path(
    section: &Section<'_>,
    key: &str,
    path: &Path,
    problems: &mut Vec<Problem>,
) -> bool {
    let message = if !path.is_absolute() {
        format!("{} is not an absolute path", path.display())
    } else if path.components().any(|part| part == Component::ParentDir) {
        format!("{} contains \"..\"", path.display())
    } else {
        return true;
    };
    problems.push(section.problem(key, message));
    false
}

/// `escrow = ["age1…"]`.
pub(super) fn read_recipients(
    section: &mut Section<'_>,
    problems: &mut Vec<Problem>,
) -> Vec<String> {
    let mut recipients = Vec::new();
    for text in section.texts("escrow", problems) {
        if text.starts_with("AGE-SECRET-KEY-") {
            problems.push(section.problem(
                "escrow",
                "this is a secret key: keep it away from this host, and write its public \"age1…\" recipient here (age-keygen -y)",
            ));
        } else if !is_recipient(text) {
            problems.push(section.problem(
                "escrow",
                format!("{text:?} is not an age recipient (\"age1…\", as age-keygen prints it)"),
            ));
        } else {
            recipients.push(text.to_string());
        }
    }
    recipients
}

fn is_recipient(text: &str) -> bool {
    bech32::primitives::decode::CheckedHrpstring::new::<bech32::Bech32>(text)
        .is_ok_and(|checked| checked.hrp().as_str() == "age" && checked.byte_iter().count() == 32)
}
