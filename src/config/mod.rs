//! Floor 5: the configuration file, read and checked as far as that needs neither store nor disk.
//!
//! `/etc/vmkeep/vmkeep.toml` and the files of `customers.d` beside it, one customer a file. Every
//! problem is reported with file, line and key, and all of them at once. `policy` judges
//! the retention of each customer; its refusals become problems like any other. What is absent: any
//! look at images or at the repository.

mod bucket;
mod customer;
#[cfg(any(test, fuzzing))]
pub mod hostile_bytes;
mod notify;
mod problem;
mod run;
mod secret;
mod section;
mod size;
mod spelling;
mod terms;

#[cfg(test)]
mod tests;

pub use bucket::{Bucket, BucketCredentials};
pub use customer::{Customer, Disk, DiskFormat, FsFreeze, LibvirtVm, QmpVm, Vm, VmSource};
pub use notify::{
    HeaderSource, MailEncryption, Notify, NotifyMail, NotifyPing, NotifyWebhook, ReportWhen,
    UrlSource,
};
pub use problem::{ConfigError, Problem};
pub use run::{Hours, IoPriority, Limits, Run};
pub use secret::SecretSource;

use crate::model::{DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES, MIN_CHUNK_BYTES, Writers};
use crate::policy::PolicyTerms;
use bucket::read_bucket;
use customer::{Seen, check_path, read_customer, read_recipients};
use notify::read_notify;
use problem::Source;
use section::Section;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::de::DeTable;

/// Where the configuration is, unless said otherwise.
pub const DEFAULT_FILE: &str = "/etc/vmkeep/vmkeep.toml";
/// The folder beside the main file with one file a customer.
pub const CUSTOMERS_FOLDER: &str = "customers.d";

const MIB: u64 = 1 << 20;
const DEFAULT_STATE_DIR: &str = "/var/lib/vmkeep";
/// Not below the state folder, which nobody else may pass through: a QEMU that does not run as root
/// opens its overlays itself.
const DEFAULT_OVERLAY_DIR: &str = "/var/cache/vmkeep";
const DEFAULT_OVERLAY_BYTES: u64 = 10 << 30;
const MIN_OVERLAY_BYTES: u64 = 1 << 20;
const DEFAULT_FREEZE_LIMIT: Duration = Duration::from_secs(10);
const DEFAULT_RESERVE_BYTES: u64 = 64 * MIB;
const DEFAULT_PACK_BYTES: u64 = 16 * MIB;
const MAX_PACK_BYTES: u64 = 256 * MIB;
const DEFAULT_COMPRESSION_LEVEL: i32 = 1;
const MAX_COMPRESSION_LEVEL: i64 = 19;
const MAX_THREADS: i64 = 1024;

/// A configuration in which every name, path and number is sound and every policy can be kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub file: PathBuf,
    pub host: Host,
    pub repository: Repository,
    pub terms: PolicyTerms,
    pub run: Run,
    /// Who is told.
    pub notify: Notify,
    /// In the order of the files and of their tables.
    pub customers: Vec<Customer>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// How the ledger names this host.
    pub name: String,
    pub clock: ClockTrust,
    pub role: HostRole,
    /// Identity, caches, locks.
    pub state_dir: PathBuf,
    pub threads: usize,
    /// Where the overlays of running VMs may be placed while they are backed up.
    pub overlay_dir: PathBuf,
    /// Largest overlay of one disk.
    pub overlay_bytes: u64,
    /// Longest time a guest may be frozen or paused.
    pub freeze_limit: Duration,
    pub libvirt_uri: Option<String>,
}

impl Host {
    /// Where copies of a bucket's objects are kept. What lies there may be removed at any time.
    pub fn copies_dir(&self) -> PathBuf {
        self.state_dir.join("cache")
    }
}

/// Whether this host's clock needs a witness before anything is deleted on its word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockTrust {
    Verified,
    /// Disciplined by something that vmkeep cannot see; declared in the ledger.
    Trusted,
}

impl ClockTrust {
    pub fn as_str(self) -> &'static str {
        match self {
            ClockTrust::Verified => "verified",
            ClockTrust::Trusted => "trusted",
        }
    }
}

/// Whether this host ever deletes in the store. What it may do beside that is said in the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostRole {
    /// Adds to the store and reads it; its key need not be able to delete.
    Agent,
    /// Also deletes what is over its time, and what others have left.
    Keeper,
}

impl HostRole {
    pub fn as_str(self) -> &'static str {
        match self {
            HostRole::Agent => "agent",
            HostRole::Keeper => "keeper",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repository {
    pub place: Place,
    /// Set aside so that a prune works on a full store; a bucket has no such thing.
    pub reserve_bytes: u64,
    pub chunk_bytes: u32,
    pub pack_bytes: u64,
    pub compression_level: i32,
    /// Who may write it; as it was made.
    pub writers: Writers,
    /// `age1…` recipients that can open every customer's key.
    pub escrow: Vec<String>,
}

/// Where a repository is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Directory(PathBuf),
    Bucket(Box<Bucket>),
}

impl fmt::Display for Place {
    /// As in `url`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Directory(directory) => write!(f, "{}", directory.display()),
            Place::Bucket(bucket) => match bucket.prefix.as_str() {
                "" => write!(f, "s3://{}", bucket.name),
                prefix => write!(f, "s3://{}/{prefix}", bucket.name),
            },
        }
    }
}

/// Reads the main file and the customer files beside it.
pub fn load(file: &Path) -> Result<Config, ConfigError> {
    let unreadable = |file: &Path, error: io::Error| Problem {
        file: file.to_path_buf(),
        line: None,
        key: String::new(),
        message: format!("cannot be read: {error}"),
        hint: (error.kind() == io::ErrorKind::NotFound)
            .then(|| "say where it is with --config FILE or VMKEEP_CONFIG".to_string()),
    };
    let text = fs::read_to_string(file).map_err(|error| ConfigError {
        problems: vec![unreadable(file, error)],
    })?;
    let mut problems = Vec::new();
    let folder = file
        .parent()
        .unwrap_or(Path::new(""))
        .join(CUSTOMERS_FOLDER);
    let mut parts = Vec::new();
    match customer_files(&folder) {
        Ok(files) => {
            for path in files {
                match fs::read_to_string(&path) {
                    Ok(text) => parts.push((path, text)),
                    Err(error) => problems.push(Problem {
                        hint: None,
                        ..unreadable(&path, error)
                    }),
                }
            }
        }
        Err(error) => problems.push(unreadable(&folder, error)),
    }
    let config = read(file, &text, &parts, &mut problems);
    match config {
        Some(config) if problems.is_empty() => Ok(config),
        _ => Err(ConfigError { problems }),
    }
}

fn customer_files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let hidden = path
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden
            && path
                .extension()
                .is_some_and(|extension| extension == "toml")
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Everything after the files are read; pure but for the host's defaults.
fn read(
    file: &Path,
    text: &str,
    parts: &[(PathBuf, String)],
    problems: &mut Vec<Problem>,
) -> Option<Config> {
    let source = Source { file, text };
    let parsed = parse(&source, problems)?;
    let mut top = Section::new(&source, parsed.get_ref(), 0..0, String::new());

    let host = read_host(top.table("host", problems), problems);
    let repository = match top.table("repository", problems) {
        Some(section) => read_repository(section, problems),
        None => {
            if !top.contains("repository") {
                problems
                    .push(top.problem("repository", "is missing: [repository] url = \"/path\""));
            }
            None
        }
    };
    if let (Some(host), Some(repository)) = (&host, &repository) {
        refuse_among_copies(&top, host, repository, problems);
    }
    let terms = match top.table("policy", problems) {
        Some(section) => terms::read_terms(section, problems),
        None => {
            if !top.contains("policy") {
                problems.push(top.problem(
                    "policy",
                    "is missing: [policy] timezone = \"Europe/Amsterdam\"",
                ));
            }
            None
        }
    };
    let run = match top.table("run", problems) {
        Some(section) => run::read_run(section, problems),
        None => Some(Run::default()),
    };
    let notify = match top.table("notify", problems) {
        Some(section) => read_notify(section, problems),
        None => Notify::default(),
    };
    // Customers are checked even without a policy, so that their problems are shown as well.
    let base = terms.as_ref();
    let mut seen = Seen::default();
    let mut customers = Vec::new();
    for section in top.tables("customer", problems) {
        customers.extend(read_customer(section, base, file, &mut seen, problems));
    }
    top.finish(
        &[
            (
                "vm",
                "a VM belongs to a customer: [[customer.vm]] after its [[customer]]",
            ),
            ("timezone", "belongs in [policy]"),
            ("max_retention", "belongs in [policy] or in a [[customer]]"),
            ("url", "belongs in [repository]"),
            ("webhook", "is written as [[notify.webhook]]"),
            ("mail", "is written as [[notify.mail]]"),
            ("ping", "is written as [[notify.ping]]"),
        ],
        problems,
    );
    for (part_file, part_text) in parts {
        let source = Source {
            file: part_file,
            text: part_text,
        };
        let Some(parsed) = parse(&source, problems) else {
            continue;
        };
        let section = Section::new(&source, parsed.get_ref(), 0..0, String::new());
        customers.extend(read_customer(section, base, part_file, &mut seen, problems));
    }
    if customers.is_empty() && problems.is_empty() {
        problems.push(Problem {
            file: file.to_path_buf(),
            line: None,
            key: "customer".to_string(),
            message: format!("no customer in this file nor in {CUSTOMERS_FOLDER}"),
            hint: Some("write [[customer]] id = \"…\" and [[customer.vm]]".to_string()),
        });
    }
    Some(Config {
        file: file.to_path_buf(),
        host: host?,
        repository: repository?,
        terms: terms?,
        run: run?,
        notify,
        customers,
    })
}

/// Nothing that must last may lie where copies come and go.
fn refuse_among_copies(
    top: &Section<'_>,
    host: &Host,
    repository: &Repository,
    problems: &mut Vec<Problem>,
) {
    let copies = host.copies_dir();
    let mut refuse = |table: &str, key: &str, path: &Path| {
        if path.starts_with(&copies) {
            let message = format!(
                "{key} is {}, but below {} this host keeps copies of a bucket's objects: choose another \
                 folder",
                path.display(),
                copies.display()
            );
            problems.push(top.problem(table, message));
        }
    };
    refuse("host", "overlay_dir", &host.overlay_dir);
    if let Place::Directory(path) = &repository.place {
        refuse("repository", "url", path);
    }
}

fn parse<'a>(
    source: &Source<'a>,
    problems: &mut Vec<Problem>,
) -> Option<toml::Spanned<DeTable<'a>>> {
    DeTable::parse(source.text)
        .map_err(|error| {
            problems.push(Problem {
                file: source.file.to_path_buf(),
                line: error.span().map(|span| source.line_of(span.start)),
                key: String::new(),
                message: format!("not TOML: {}", error.message()),
                hint: None,
            });
        })
        .ok()
}

fn read_host(section: Option<Section<'_>>, problems: &mut Vec<Problem>) -> Option<Host> {
    let hostname = || {
        rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned()
    };
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let Some(mut section) = section else {
        return Some(Host {
            name: hostname(),
            clock: ClockTrust::Verified,
            role: HostRole::Keeper,
            state_dir: PathBuf::from(DEFAULT_STATE_DIR),
            threads: cores(),
            overlay_dir: PathBuf::from(DEFAULT_OVERLAY_DIR),
            overlay_bytes: DEFAULT_OVERLAY_BYTES,
            freeze_limit: DEFAULT_FREEZE_LIMIT,
            libvirt_uri: None,
        });
    };
    let found = problems.len();
    let name = section
        .text("name", problems)
        .map_or_else(hostname, str::to_string);
    if !is_host_name(&name) {
        problems.push(section.problem("name", HOST_NAME));
    }
    let clocks = [ClockTrust::Verified, ClockTrust::Trusted].map(|clock| (clock.as_str(), clock));
    let clock = section.one_of("clock", clocks, problems);
    let roles = [HostRole::Agent, HostRole::Keeper].map(|role| (role.as_str(), role));
    let role = section.one_of("role", roles, problems);
    let state_dir = PathBuf::from(
        section
            .text("state_dir", problems)
            .unwrap_or(DEFAULT_STATE_DIR),
    );
    check_path(&section, "state_dir", &state_dir, problems);
    let threads = match section.integer("threads", problems) {
        None => cores(),
        Some(threads @ 1..=MAX_THREADS) => usize::try_from(threads).unwrap_or(1),
        Some(_) => {
            problems.push(section.problem("threads", format!("1 to {MAX_THREADS}")));
            1
        }
    };
    let overlay_dir = PathBuf::from(
        section
            .text("overlay_dir", problems)
            .unwrap_or(DEFAULT_OVERLAY_DIR),
    );
    check_path(&section, "overlay_dir", &overlay_dir, problems);
    let overlay_bytes = section
        .bytes("overlay_size", problems)
        .unwrap_or(DEFAULT_OVERLAY_BYTES);
    if overlay_bytes < MIN_OVERLAY_BYTES {
        problems.push(section.problem("overlay_size", "at least 1 MiB"));
    }
    let freeze_limit = match section.text("freeze_limit", problems) {
        None => DEFAULT_FREEZE_LIMIT,
        Some(text) => match humantime::parse_duration(text) {
            Ok(limit) if (1..=60).contains(&limit.as_secs()) => limit,
            _ => {
                problems.push(section.problem("freeze_limit", "1s to 60s, such as \"10s\""));
                DEFAULT_FREEZE_LIMIT
            }
        },
    };
    let libvirt_uri = section.text("libvirt_uri", problems).map(str::to_string);
    section.finish(&[], problems);
    (problems.len() == found).then_some(Host {
        name,
        clock: clock.unwrap_or(ClockTrust::Verified),
        role: role.unwrap_or(HostRole::Keeper),
        state_dir,
        threads,
        overlay_dir,
        overlay_bytes,
        freeze_limit,
        libvirt_uri,
    })
}

/// What a host name is.
pub const HOST_NAME: &str = "a host name has 1 to 255 printable characters";

pub fn is_host_name(name: &str) -> bool {
    (1..=255).contains(&name.len()) && !name.chars().any(char::is_control)
}

fn read_repository(mut section: Section<'_>, problems: &mut Vec<Problem>) -> Option<Repository> {
    let found = problems.len();
    let url = section.required("url", problems).unwrap_or("/");
    let place = match url.starts_with("s3:") {
        true => {
            read_bucket(url, &mut section, problems).map(|bucket| Place::Bucket(Box::new(bucket)))
        }
        false => {
            let directory = PathBuf::from(url.strip_prefix("file://").unwrap_or(url));
            check_path(&section, "url", &directory, problems);
            Some(Place::Directory(directory))
        }
    };
    let in_bucket = matches!(place, Some(Place::Bucket(_)));
    let reserve = section.bytes("reserve", problems);
    if in_bucket && reserve.is_some_and(|bytes| bytes > 0) {
        problems.push(section.problem("reserve", "a bucket has no reserve: leave it out"));
    }
    let reserve_bytes = match in_bucket {
        true => 0,
        false => reserve.unwrap_or(DEFAULT_RESERVE_BYTES),
    };
    let chunk = section
        .bytes("chunk_size", problems)
        .unwrap_or(u64::from(DEFAULT_CHUNK_BYTES));
    let chunk_bytes = match u32::try_from(chunk) {
        Ok(bytes)
            if bytes.is_power_of_two() && (MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(&bytes) =>
        {
            bytes
        }
        _ => {
            problems
                .push(section.problem("chunk_size", "64 KiB, 128 KiB, 256 KiB, 512 KiB or 1 MiB"));
            DEFAULT_CHUNK_BYTES
        }
    };
    let pack_bytes = section
        .bytes("pack_size", problems)
        .unwrap_or(DEFAULT_PACK_BYTES);
    if !(MIB..=MAX_PACK_BYTES).contains(&pack_bytes) {
        problems.push(section.problem("pack_size", "1 MiB to 256 MiB"));
    }
    let compression_level = match section.integer("compression_level", problems) {
        None => DEFAULT_COMPRESSION_LEVEL,
        Some(level @ 1..=MAX_COMPRESSION_LEVEL) => i32::try_from(level).unwrap_or(1),
        Some(_) => {
            let message = format!("1 (fast) to {MAX_COMPRESSION_LEVEL} (small)");
            problems.push(section.problem("compression_level", message));
            DEFAULT_COMPRESSION_LEVEL
        }
    };
    let writers = match section.text("writers", problems).map(str::parse) {
        None => Writers::Many,
        Some(Ok(writers)) => writers,
        Some(Err(why)) => {
            problems.push(section.problem("writers", why));
            Writers::Many
        }
    };
    let escrow = read_recipients(&mut section, problems);
    section.finish(
        &[
            ("s3", "is for a bucket: url = \"s3://bucket/prefix\""),
            (
                "path",
                "the directory is the url: url = \"/var/backups/vmkeep\"",
            ),
        ],
        problems,
    );
    (problems.len() == found).then_some(Repository {
        place: place?,
        reserve_bytes,
        chunk_bytes,
        pack_bytes,
        compression_level,
        writers,
        escrow,
    })
}
