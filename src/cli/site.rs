//! The concrete things behind a command: the store, this host, the customers of the configuration.

use super::exit::{Exit, Failure};
use super::figures;
use super::invocation::Invocation;
use super::pace::Pace;
use super::priority;
use super::progress::Progress;
use super::store::{self, Store};
use crate::codec::HostIdentity;
use crate::config::{self, Config, DiskFormat, FsFreeze, HostRole, VmSource};
use crate::format::names::CustomerNames;
use crate::format::repository_file::RepositoryFile;
use crate::hypervisor::guard::GuardCommand;
use crate::hypervisor::handed::HandedSource;
use crate::hypervisor::image::{ImageDisk, ImageFormat, ImageSource};
use crate::hypervisor::libvirt::{LibvirtSettings, LibvirtSource};
use crate::hypervisor::qmp::{QmpSettings, QmpSource};
use crate::hypervisor::{CaptureError, Freeze, Hypervisor};
use crate::jobs::{
    AlarmKind, BackupSettings, JobError, JobErrorKind, LocalHost, PruneRequest, StateError,
    StateFolder, VmTask,
};
use crate::model::{Clock, CustomerName, RepositoryId, VmName, Writers};
use crate::policy::HostClock;
use crate::repository::{
    Customer, RepositoryError, RepositoryErrorKind, SealedCustomer, WithoutLedger, WriteSettings,
    open_repository,
};
use crate::storage::{
    Braked, Probe, Storage, StorageError, StorageErrorKind, probe_and_time, probe_without_deleting,
    time_of,
};
use jiff::tz::TimeZone;
use std::io;
use std::sync::Arc;

/// Of two writers, before each change in a bucket that keeps versions.
const RACES: u32 = 3;
/// A domain's backup is given up before less than this is free for its scratch files.
const SCRATCH_RESERVE_BYTES: u64 = 256 << 20;
pub const VIRSH: &str = "virsh";

/// A repository, as far as it is open without this host's identity.
pub struct Ground {
    pub config: Config,
    pub store: Store,
    file: RepositoryFile,
    folder: StateFolder,
}

impl Ground {
    pub fn open(invocation: &Invocation) -> Result<Self, Failure> {
        let config = invocation.config()?;
        let store =
            store::open(&config).map_err(|failure| without_repository(failure, &config, None))?;
        let file = open_repository(&*store.storage)
            .map_err(|error| without_repository(error.into(), &config, Some(&*store.storage)))?;
        let folder = StateFolder::create(&config.host.state_dir)?;
        refuse_another_repository(&folder, &*store.storage, &file)?;
        refuse_other_writers(&config, &file)?;
        Ok(Ground {
            config,
            store,
            file,
            folder,
        })
    }

    /// A customer without its key.
    pub fn sealed(&self, name: &CustomerName) -> Result<SealedCustomer, Failure> {
        SealedCustomer::open(
            self.store.storage.clone(),
            name,
            self.file.repository,
            Arc::new(self.folder.clone()),
            self.config.host.threads,
        )
        .map_err(|error| refused_customer(name, error))
    }
}

fn refused_customer(name: &CustomerName, error: RepositoryError) -> Failure {
    match error.kind {
        RepositoryErrorKind::NotFound => Failure::new(
            Exit::Failed,
            format!("customer {name} is not in the repository yet"),
        )
        .hint("vmkeep init creates customers that were added to the configuration"),
        _ if error.is_damage() => Failure::from(error).hint(
            "as the last means, what is whole can be restored without it: vmkeep points --without-ledger, then \
             vmkeep restore VM --at ID --to DIR --without-ledger",
        ),
        _ => error.into(),
    }
}

/// A repository that is open on this host.
pub struct Site {
    pub config: Config,
    pub store: Store,
    pub file: RepositoryFile,
    pub host: Arc<LocalHost>,
    /// Customers are opened by their ledgers.
    asks_ledgers: bool,
}

/// A customer of the configuration, open.
pub struct OpenCustomer<'a> {
    pub config: &'a config::Customer,
    pub customer: Customer,
    /// Without its ledger, what to know of that: the first note is the one that nobody may miss.
    pub notes: Vec<String>,
}

/// One that cannot be opened, and why.
pub type Unopened<'a> = (&'a CustomerName, Failure);

impl OpenCustomer<'_> {
    /// The zone in which this customer's nights are counted.
    pub fn zone(&self) -> TimeZone {
        self.customer.with_state(|state| {
            state
                .policy
                .as_ref()
                .map_or(TimeZone::UTC, |policy| policy.timezone().clone())
        })
    }
}

impl Site {
    pub fn open(invocation: &Invocation) -> Result<Self, Failure> {
        let Ground {
            config,
            store,
            file,
            folder,
        } = Ground::open(invocation)?;
        let identity = folder.identity().map_err(refused_identity)?;
        tracing::info!(
            "repository {} in {}",
            file.repository,
            store.storage.location()
        );
        let host = local_host(invocation, &config, identity, folder);
        Ok(Site {
            config,
            store,
            file,
            host: Arc::new(host),
            asks_ledgers: true,
        })
    }

    /// `false`: customers are opened for restoring alone, without their ledgers.
    pub fn with_ledgers(self, asks_ledgers: bool) -> Self {
        Site {
            asks_ledgers,
            ..self
        }
    }

    /// For commands that write: the store must order its writers, unless there is one.
    pub fn probe(&self, customer: &Customer) -> Result<(), Failure> {
        let prefix = customer.names().prefix();
        let storage = &*self.store.storage;
        let probed = match (self.file.writers(), self.config.host.role) {
            (Writers::One, _) => time_of(storage, prefix).map(|time| (Probe::Sound, time)),
            (Writers::Many, HostRole::Keeper) => {
                // Ceph 20 keeps the condition there, but not in races; versions can be switched on later.
                let rounds = if self.store.keeps_versions() {
                    RACES
                } else {
                    0
                };
                probe_and_time(storage, prefix, rounds, 2)
            }
            (Writers::Many, HostRole::Agent) => probe_without_deleting(storage, prefix),
        };
        match probed {
            // A store that is full to the last byte must be pruned all the same; whoever writes
            // more than a prune does finds out soon enough.
            Err(error) if error.kind == StorageErrorKind::Full => Ok(()),
            Err(error) => Err(error.into()),
            Ok((Probe::Sound, store_time)) => {
                if let Some(store_time) = store_time {
                    self.host.note_store_time(store_time);
                }
                Ok(())
            }
            Ok((Probe::Unsound { what }, _)) => Err(Failure::new(
                Exit::Failed,
                format!(
                    "{}: this store cannot order the entries of several writers: {what}",
                    storage.location()
                ),
            )
            .hint("network file systems and servers without create-if-absent cannot hold a repository of several hosts; Ceph has it only in buckets that never kept versions")
            .hint("one host alone can use it: [repository] writers = \"one\", set before vmkeep init")),
        }
    }

    pub fn customer<'a>(&self, config: &'a config::Customer) -> Result<OpenCustomer<'a>, Failure> {
        let repository = &self.config.repository;
        let settings = WriteSettings {
            pack_bytes: usize::try_from(repository.pack_bytes).unwrap_or(usize::MAX),
            compression_level: repository.compression_level,
            threads: self.config.host.threads,
            ..WriteSettings::default()
        };
        if !self.asks_ledgers {
            return self.without_ledger(config, settings);
        }
        let customer = Customer::open(
            self.store.storage.clone(),
            &config.name,
            self.file.repository,
            self.host.identity(),
            self.host.clone(),
            settings,
        )
        .map_err(|error| {
            // What is only out of reach for now comes back.
            if error.kind != RepositoryErrorKind::Storage(StorageErrorKind::Transient) {
                self.store.forget_copies_of(&config.name);
            }
            refused_customer(&config.name, error)
        })?;
        self.store.keep_copies_of(&customer);
        tracing::info!("{}: open", config.name);
        let (entries, points) = customer.with_state(|state| (state.seq, state.points.len()));
        tracing::debug!(
            "{}: the ledger ends at entry {entries}, with {points} points not gone",
            config.name
        );
        Ok(OpenCustomer {
            config,
            customer,
            notes: Vec::new(),
        })
    }

    /// Whatever copies this host has stay as they are: nobody can tell what of them may.
    fn without_ledger<'a>(
        &self,
        config: &'a config::Customer,
        settings: WriteSettings,
    ) -> Result<OpenCustomer<'a>, Failure> {
        let name = &config.name;
        let opened = WithoutLedger::open(
            self.store.storage.clone(),
            name,
            self.file.repository,
            self.host.identity(),
            self.host.clone(),
            settings,
            &config.terms,
        );
        let opened = opened.map_err(|error| match error.kind {
            RepositoryErrorKind::NotFound => refused_customer(name, error),
            _ => error.into(),
        })?;
        let mut notes = vec![match &opened.broken {
            Some(error) => format!(
                "the ledger of {name} was set aside ({error}): whether a restore point was expired, erased or \
                 replaced, whether it is suspect and who made it is not known; when it expires is reckoned by \
                 this configuration"
            ),
            None => format!(
                "the ledger of {name} can be read, and was asked for what is live, but not for what is suspect \
                 or damaged: without --without-ledger it is"
            ),
        }];
        let now = self.host.now();
        let over = opened.customer.with_state(|state| {
            let over = state.live().filter(|(_, point)| point.expires_at <= now);
            over.count()
        });
        if over > 0 {
            notes.push(format!(
                "{name}: {} over by max_retention as it is configured and by this host's clock ({}), and not \
                 restored",
                figures::count(over, "restore point is", "restore points are"),
                figures::minute(now, &self.zone())
            ));
        }
        let passed_over = opened.passed_over.iter();
        notes.extend(passed_over.map(|error| format!("{name}: passed over: {error}")));
        Ok(OpenCustomer {
            config,
            customer: opened.customer,
            notes,
        })
    }

    /// The wanted customers of the configuration. One that cannot be opened keeps nobody from the others.
    pub fn customers(
        &self,
        wanted: impl Fn(&CustomerName) -> bool,
    ) -> Result<(Vec<OpenCustomer<'_>>, Vec<Unopened<'_>>), Failure> {
        let (mut opened, mut unopened) = (Vec::new(), Vec::new());
        let customers = self.config.customers.iter();
        for config in customers.filter(|config| wanted(&config.name)) {
            match self.customer(config) {
                Ok(open) => opened.push(open),
                Err(failure) => unopened.push((&config.name, failure)),
            }
        }
        // A stranger is one to all of them.
        if opened.is_empty() && !unopened.is_empty() {
            return Err(unopened.swap_remove(0).1);
        }
        Ok((opened, unopened))
    }

    /// The zone of the general policy: what is not a customer's is told in it.
    pub fn zone(&self) -> TimeZone {
        TimeZone::get(&self.config.terms.timezone).unwrap_or(TimeZone::UTC)
    }

    /// Who has just seen that what the last run met is over says so to whoever asks before the next one.
    pub fn settle_alarms(&self, customer: &CustomerName, kinds: &[AlarmKind]) {
        if let Err(error) = self.host.folder().settle_alarms(customer, kinds) {
            tracing::warn!("what the last run met is told until the next one: {error}");
        }
    }

    /// What backs up steps back behind whatever else the host does, as `[run]` says. Before customers are opened.
    pub fn step_back(&mut self, invocation: &Invocation) -> Arc<Pace> {
        let settings = &self.config.run;
        priority::lower(settings.io_priority);
        // Limits by the time of day are the host's.
        let pace = Pace::new(settings, self.zone(), invocation.stop.clone());
        let pace = Arc::new(pace);
        self.brake_uploads(&pace);
        pace
    }

    /// From here on nothing is sent to the store faster than this allows.
    fn brake_uploads(&mut self, pace: &Arc<Pace>) {
        if pace.limits_uploads() {
            let pace = pace.clone();
            let may_send = move |bytes| pace.may_send(bytes);
            let braked = Braked::new(self.store.storage.clone(), Arc::new(may_send));
            self.store.storage = Arc::new(braked);
        }
    }

    pub fn backup_settings(&self) -> BackupSettings {
        BackupSettings {
            chunk_bytes: self.file.chunk_bytes,
            threads: self.config.host.threads,
        }
    }

    /// Of a store of which no copies are kept elsewhere, which whoever writes to it makes sure of.
    pub fn prune_request(&self, confirm: bool) -> PruneRequest {
        PruneRequest {
            confirm,
            has_reserve: self.config.repository.reserve_bytes > 0,
            copies_elsewhere: false,
        }
    }

    /// The way to the disks of a VM.
    pub fn task(
        &self,
        customer: &OpenCustomer<'_>,
        vm: &config::Vm,
    ) -> Result<VmTask, CaptureError> {
        let runtime_dir = self.host.folder().runtime_dir();
        let host = &self.config.host;
        let source: Box<dyn Hypervisor> = match &vm.source {
            VmSource::Images(disks) => {
                let disks = disks.iter().map(image_disk).collect();
                Box::new(ImageSource::new(disks, runtime_dir, self.host.now()))
            }
            VmSource::Qmp(qmp) => Box::new(QmpSource::new(QmpSettings {
                monitor: qmp.monitor.clone(),
                agent: qmp.guest_agent.clone(),
                freeze: freeze(qmp.fsfreeze),
                freeze_limit: host.freeze_limit,
                owner: self.owner(&customer.customer, &vm.name),
                excluded: qmp.exclude.clone(),
                overlay_dir: host.overlay_dir.clone(),
                overlay_bytes: host.overlay_bytes,
                runtime_dir,
                granularity_bytes: self.file.chunk_bytes,
                guard: guard_command(Vec::new()),
            })),
            VmSource::Libvirt(libvirt) => Box::new(LibvirtSource::new(LibvirtSettings {
                domain: libvirt.domain.clone(),
                uri: host.libvirt_uri.clone(),
                owner: self.owner(&customer.customer, &vm.name),
                scratch_dir: host.overlay_dir.clone(),
                scratch_reserve_bytes: SCRATCH_RESERVE_BYTES,
                runtime_dir: host.overlay_dir.clone(),
                freeze: freeze(libvirt.fsfreeze),
                freeze_limit: host.freeze_limit,
                guard: Some(guard_command(guarded_domain(libvirt, host))),
                virsh: VIRSH.into(),
                now: self.host.now(),
            })?),
            VmSource::Nbd(file) => Box::new(HandedSource::new(file.clone())),
        };
        Ok(VmTask {
            vm: vm.name.clone(),
            source,
        })
    }

    /// What marks things of this backup in a hypervisor: another repository or customer that
    /// backs up the same VM has another one.
    fn owner(&self, customer: &Customer, vm: &VmName) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.file.repository.to_string().as_bytes());
        hasher.update(customer.uid().as_bytes());
        hasher.update(vm.as_str().as_bytes());
        let hash = hasher.finalize().to_hex();
        hash.chars().take(8).collect()
    }
}

fn image_disk(disk: &config::Disk) -> ImageDisk {
    ImageDisk {
        name: disk.name.clone(),
        path: disk.path.clone(),
        format: match disk.format {
            DiskFormat::Raw => ImageFormat::Raw,
            DiskFormat::Qcow2 => ImageFormat::Qcow2,
        },
    }
}

fn freeze(fsfreeze: FsFreeze) -> Freeze {
    match fsfreeze {
        FsFreeze::Require => Freeze::Require,
        FsFreeze::Try => Freeze::Try,
        FsFreeze::Never => Freeze::Never,
    }
}

/// This very program, also when its file was replaced by an upgrade meanwhile.
fn guard_command(arguments: Vec<String>) -> GuardCommand {
    GuardCommand {
        program: "/proc/self/exe".into(),
        arguments: [vec!["guard".to_string()], arguments].concat(),
    }
}

/// What the guard of a domain needs to know.
fn guarded_domain(vm: &config::LibvirtVm, host: &config::Host) -> Vec<String> {
    let mut arguments = vec!["--domain".to_string(), vm.domain.clone()];
    if let Some(uri) = &host.libvirt_uri {
        arguments.extend(["--uri".to_string(), uri.clone()]);
    }
    let seconds = host.freeze_limit.as_secs().to_string();
    arguments.extend(["--limit-seconds".to_string(), seconds]);
    arguments
}

/// Of an identity that is missing, is none, or is not this host's alone.
pub fn refused_identity(error: StateError) -> Failure {
    let wrong_key = |message: String| {
        Failure::new(Exit::WrongKey, message)
            .hint("put the host's identity back, or an escrow identity (0600) in its place")
            .hint("what needs no key can be checked without one: vmkeep verify --without-keys")
    };
    match error.kind {
        io::ErrorKind::NotFound => wrong_key(format!(
            "this host has no identity ({} is missing)",
            error.path.display()
        ))
        .hint("on a new host, with an empty store: vmkeep init"),
        io::ErrorKind::InvalidInput => wrong_key(error.to_string()),
        // Its text says what to do.
        io::ErrorKind::InvalidData => Failure::new(Exit::Failed, error.to_string()),
        _ => error.into(),
    }
}

/// Tells what to do where there is no repository: a new one would hide what is there, or take the place of
/// one that is away.
pub fn without_repository(
    failure: Failure,
    config: &Config,
    storage: Option<&dyn Storage>,
) -> Failure {
    if failure.exit != Exit::NoRepository {
        return failure;
    }
    let failure = Failure {
        hints: Vec::new(),
        ..failure
    };
    if storage.is_some_and(|storage| holds_customers(config, storage)) {
        return failure.hint(
            "customers are there, and only vmkeep.json is missing: vmkeep init, which no agent does, makes \
             it anew and changes nothing else",
        );
    }
    match used_repository(config) {
        Some(used) => failure
            .hint(format!(
                "is the disk mounted? is [repository] url right? this host uses the repository {used}"
            ))
            .hint(format!(
                "if that one is lost for good and another is to take its place: remove {}, then vmkeep init",
                config.host.state_dir.join("repository").display()
            )),
        None => failure.hint(
            "is the disk mounted? is [repository] url right? a new repository is made by: vmkeep init",
        ),
    }
}

/// By their key files: a customer has few.
fn holds_customers(config: &Config, storage: &dyn Storage) -> bool {
    config.customers.iter().any(|customer| {
        let keys = CustomerNames::new(&customer.name).keys_prefix();
        storage.list(&keys).is_ok_and(|listed| !listed.is_empty())
    })
}

fn used_repository(config: &Config) -> Option<RepositoryId> {
    let folder = &config.host.state_dir;
    // Where nothing is found nothing is made either.
    if !folder.is_dir() {
        return None;
    }
    StateFolder::create(folder).ok()?.repository().ok()?
}

/// A host uses one repository: another one in its place is a disk that is not mounted, or a mistake.
pub fn refuse_another_repository(
    folder: &StateFolder,
    storage: &dyn Storage,
    file: &RepositoryFile,
) -> Result<(), Failure> {
    match folder.repository()? {
        Some(known) if known != file.repository => Err(Failure::new(
            Exit::Failed,
            format!(
                "{} holds another repository ({}) than the one this host uses ({known})",
                storage.location(),
                file.repository
            ),
        )
        .hint("is the right disk mounted, and is [repository] url right?")
        .hint(format!(
            "if this host is to move to it for good: remove {}",
            folder.path().join("repository").display()
        ))),
        _ => Ok(()),
    }
}

/// A repository stays what it was made for: how its entries are named depends on it.
pub fn refuse_other_writers(config: &Config, file: &RepositoryFile) -> Result<(), Failure> {
    let (said, made) = (config.repository.writers, file.writers());
    match said == made {
        true => Ok(()),
        false => Err(Failure::new(
            Exit::Usage,
            format!(
                "{}: [repository] writers = \"{said}\", but the repository was made with \"{made}\"",
                config.file.display()
            ),
        )
        .hint(format!("writers = \"{made}\" opens it"))),
    }
}

/// This host, as its configuration describes it.
pub fn local_host(
    invocation: &Invocation,
    config: &Config,
    identity: HostIdentity,
    folder: StateFolder,
) -> LocalHost {
    let clock = match config.host.clock {
        config::ClockTrust::Verified => HostClock::Verified,
        config::ClockTrust::Trusted => HostClock::Trusted,
    };
    let name = config.host.name.clone();
    let told_by = invocation.clock.clone() as Arc<dyn Clock>;
    let host = LocalHost::new(identity, name, folder, told_by, clock);
    match config.host.role {
        HostRole::Agent => host.as_agent(),
        HostRole::Keeper => host,
    }
}

/// Shows the stages of a job as a bar each, and in the log.
pub struct Watching<'a> {
    terminal: &'a super::terminal::Terminal,
    pace: Option<&'a Pace>,
    bar: std::sync::Mutex<Option<Progress>>,
}

impl<'a> Watching<'a> {
    pub fn new(invocation: &'a Invocation) -> Self {
        Watching {
            terminal: &invocation.terminal,
            pace: None,
            bar: std::sync::Mutex::new(None),
        }
    }
}

impl<'a> Watching<'a> {
    /// Reads no faster than this allows.
    pub fn at_pace(self, pace: &'a Pace) -> Self {
        Watching {
            pace: Some(pace),
            ..self
        }
    }
}

impl crate::jobs::Watch for Watching<'_> {
    fn may_read(&self, bytes: u64) {
        if let Some(pace) = self.pace {
            pace.may_read(bytes);
        }
    }

    fn stage(&self, label: &str, total_bytes: u64) {
        match total_bytes {
            0 => tracing::info!("{label}"),
            total => tracing::info!("{label}: {} to go through", figures::bytes(total)),
        }
        let mut bar = match self.bar.lock() {
            Ok(bar) => bar,
            Err(poisoned) => poisoned.into_inner(),
        };
        *bar = None;
        *bar = Some(Progress::start(self.terminal, label, total_bytes));
    }

    fn advance(&self, bytes: u64) {
        if let Ok(bar) = self.bar.lock()
            && let Some(bar) = &*bar
        {
            bar.advance(bytes);
        }
    }
}

impl From<RepositoryError> for Failure {
    fn from(error: RepositoryError) -> Self {
        let message = error.to_string();
        failure_of(error.kind, message)
    }
}

fn failure_of(kind: RepositoryErrorKind, message: String) -> Failure {
    match kind {
        RepositoryErrorKind::NoRepository => Failure::new(Exit::NoRepository, message).hint(
            "is the disk mounted, is the url right? a new repository is made by: vmkeep init",
        ),
        RepositoryErrorKind::WrongKey => Failure::new(Exit::WrongKey, message).hint(
            "put the identity that made the repository, or an escrow identity, in the state \
             folder (0600)",
        ),
        RepositoryErrorKind::Damaged => Failure::new(Exit::DamageFound, message)
            .hint("nothing was changed by this; vmkeep verify --read-data shows what is concerned"),
        RepositoryErrorKind::Replaced => Failure::new(Exit::DamageFound, message)
            .hint("nothing was changed; if nobody put the store back from a copy, somebody has tampered with it")
            .hint(
                "if it was put back on purpose, what the copy lacks is lost; to go on with what it holds, remove \
                 this customer's files in heads/ (named as its uid) and origins/ of the state folder",
            ),
        RepositoryErrorKind::Newer => Failure::new(Exit::Failed, message)
            .hint("upgrade vmkeep on this host; nothing was written"),
        RepositoryErrorKind::Uncertain => Failure::new(Exit::Failed, message)
            .hint("nothing is lost: the next run finds out whether it stands, and goes on"),
        RepositoryErrorKind::Superseded => {
            Failure::new(Exit::Failed, message)
                .hint("nothing of the attempt is left; run it again")
                .hint(
                    "where this host lacks a role, a host with the role admin gives it: vmkeep key list, \
                     vmkeep key admit",
                )
        }
        RepositoryErrorKind::Interrupted => {
            Failure::new(Exit::Interrupted, message).hint("the state is clean; run it again")
        }
        // Only what the ledger names is asked for by name.
        RepositoryErrorKind::Storage(StorageErrorKind::NotFound) => {
            Failure::new(Exit::DamageFound, message)
                .hint("is all of the store there? then vmkeep verify --read-data shows what is concerned")
                .hint("vmkeep backup --full VM stores anew what the VM still has of it")
        }
        RepositoryErrorKind::Storage(kind) => storage_failure(kind, message),
        RepositoryErrorKind::NotFound
        | RepositoryErrorKind::AlreadyExists
        | RepositoryErrorKind::Refused => Failure::new(Exit::Failed, message),
    }
}

fn storage_failure(kind: StorageErrorKind, message: String) -> Failure {
    match kind {
        StorageErrorKind::Corrupt => {
            Failure::new(Exit::DamageFound, message)
                .hint("vmkeep verify --read-data shows what is concerned")
        }
        StorageErrorKind::Full => Failure::new(Exit::Failed, message)
            .hint("restore points made earlier are safe; vmkeep prune makes room of what is over")
            .hint("then give the store more space: what is kept by contract cannot be thinned"),
        StorageErrorKind::Denied => Failure::new(Exit::Failed, message)
            .hint("a directory: vmkeep runs as root, or as its owner; is it mounted read-only?")
            .hint("a bucket: may this key read, write and list there, and delete unless [host] role = \"agent\"?"),
        StorageErrorKind::Locked => Failure::new(Exit::Failed, message)
            .hint("nobody can delete it before; a prune after that time does"),
        StorageErrorKind::Transient => Failure::new(Exit::Failed, message).hint(
            "look at the disk and its cables, or at the way to the server, then run it again",
        ),
        StorageErrorKind::Unreadable => Failure::new(Exit::Failed, message)
            .hint("look at the disk and its cables, then run it again: it may be whole")
            .hint("vmkeep verify --read-data names all that cannot be read, and what to do about it"),
        StorageErrorKind::NotFound
        | StorageErrorKind::AlreadyExists
        | StorageErrorKind::Unsupported => Failure::new(Exit::Failed, message),
    }
}

impl From<StorageError> for Failure {
    fn from(error: StorageError) -> Self {
        storage_failure(error.kind, error.to_string())
    }
}

impl From<StateError> for Failure {
    fn from(error: StateError) -> Self {
        let failure = Failure::new(Exit::Failed, error.to_string());
        match error.kind {
            io::ErrorKind::PermissionDenied => {
                failure.hint("the state folder belongs to root: run vmkeep as root")
            }
            _ => failure.hint("[host] state_dir says where this host keeps its identity and locks"),
        }
    }
}

impl From<CaptureError> for Failure {
    fn from(error: CaptureError) -> Self {
        Failure::new(Exit::Failed, error.to_string())
    }
}

impl From<JobError> for Failure {
    fn from(error: JobError) -> Self {
        match error.kind {
            JobErrorKind::Repository(kind) => failure_of(kind, error.message),
            JobErrorKind::Capture => Failure::new(Exit::Failed, error.message),
            // Its text says what to do.
            JobErrorKind::Clock(_) => Failure::new(Exit::ClockNotTrusted, error.message),
            JobErrorKind::Busy => Failure::new(Exit::Busy, error.message)
                .hint("nothing is wrong: wait for the other one to end"),
            JobErrorKind::NotFound | JobErrorKind::Refused | JobErrorKind::State => {
                Failure::new(Exit::Failed, error.message)
            }
            JobErrorKind::Interrupted => Failure::new(Exit::Interrupted, error.message)
                .hint("the state is clean; run it again"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_that_the_ledger_names_and_the_store_lacks_is_damage_with_what_to_do_about_it() {
        let missing = StorageError::new(StorageErrorKind::NotFound, "customers/acme/packs/1", "");
        let error = RepositoryError::from(missing.clone());
        for failure in [Failure::from(JobError::from(error.clone())), error.into()] {
            assert_eq!(failure.exit, Exit::DamageFound);
            let hints = failure.hints.join(" ");
            assert!(hints.contains("vmkeep verify --read-data"), "{hints}");
            assert!(hints.contains("vmkeep backup --full VM"), "{hints}");
        }
        // A try of the store that it did not keep is none.
        assert_eq!(Failure::from(missing).exit, Exit::Failed);
    }
}
