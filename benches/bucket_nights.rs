//! What a large repository in a bucket costs, in requests and bytes: opening it, and pruning it every night.
//! `cargo bench --bench bucket_nights`. Prints Markdown.
//!
//! 56 VMs of 18,000 chunks, which are small when they are compressed, so that the store is: 1,000,000 chunks
//! and, after 24 nights at the default policy with a full a week, 1000 restore points. Written by the library as
//! `vmkeep run` does it, in memory; then copied into the bucket of the test server, on which everything is
//! measured. Requests and bytes are those that pass a proxy; times are without it.
//!
//! Wanted: opened in under 2 s by a host that has its copies.
//!
//! Environment: `VMKEEP_BENCH_VMS` (56), `VMKEEP_BENCH_CHUNKS` (of each, 18000), `VMKEEP_BENCH_NIGHTS` (24).

use vmkeep_test_support as support;

use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use support::s3::{Bucket, Passed, Proxy, server};
use support::{Host, HostOptions, time};
use vmkeep::format::names::content_hash;
use vmkeep::hypervisor::{
    Capture, CaptureError, CapturedDisk, Changes, Consistency, Hypervisor, Outcome, Reading,
    SinceMark,
};
use vmkeep::jobs::{
    BackupSettings, LocalHost, PruneRequest, Pruned, Quiet, StateFolder, VmTask, backup_now, prune,
};
use vmkeep::model::{
    Clock, ClockReading, CustomerName, DiskName, Extent, ObjectName, RepositoryId, VmName, Writers,
};
use vmkeep::policy::{HostClock, PolicyTerms};
use vmkeep::repository::{Customer, NewCustomer, WriteSettings, create_repository, new_repository};
use vmkeep::storage::{Cached, Memory, S3, Storage};

const CHUNK: u64 = 64 << 10;
/// Of each VM in a night.
const CHANGED: u64 = 20;
const PREFIX: &str = "backups";
const CACHE_BYTES: u64 = 1 << 30;

fn number_of(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |text| text.parse().expect("a number"))
}

/// A clock that is set.
struct Set(Mutex<Timestamp>);

impl Set {
    fn to(&self, at: Timestamp) {
        *self.0.lock().expect("a time") = at;
    }
}

impl Clock for Set {
    fn read(&self) -> ClockReading {
        ClockReading {
            wall: *self.0.lock().expect("a time"),
            synchronised: true,
            boot: None,
        }
    }
}

/// A VM whose disk is made up: in each chunk stands whose it is, and when it was written.
struct MadeUp {
    vm: u64,
    night: u64,
    chunks: u64,
}

struct MadeUpDisk {
    name: DiskName,
    vm: u64,
    chunks: u64,
    changes: Changes,
    step: u64,
    /// When chunks were written last, by their places in a step.
    written: BTreeMap<u64, u64>,
}

impl Hypervisor for MadeUp {
    fn open(&self, _: &[SinceMark], _: Reading) -> Result<Box<dyn Capture>, CaptureError> {
        // Scattered, as a guest's writes are.
        let step = self.chunks / CHANGED;
        let first = |night: u64| {
            let hash = blake3::hash(&[self.vm.to_le_bytes(), night.to_le_bytes()].concat());
            let [a, b, ..] = *hash.as_bytes();
            u64::from(u16::from_le_bytes([a, b])) % step
        };
        let extents = (0..CHANGED).map(|n| (first(self.night) + n * step) * CHUNK);
        let changes = match self.night {
            0 => Changes::Unknown("the first night".to_string()),
            _ => Changes::Extents(extents.map(|at| Extent::new(at, CHUNK)).collect()),
        };
        Ok(Box::new(MadeUpDisk {
            name: "vda".parse().expect("a name"),
            vm: self.vm,
            chunks: self.chunks,
            changes,
            step,
            written: (1..=self.night)
                .map(|night| (first(night), night))
                .collect(),
        }))
    }

    fn recover(&self) -> Result<Vec<String>, CaptureError> {
        Ok(Vec::new())
    }

    fn release(&self) -> Result<Vec<String>, CaptureError> {
        Ok(Vec::new())
    }
}

impl Capture for MadeUpDisk {
    fn disks(&self) -> Vec<&dyn CapturedDisk> {
        vec![self]
    }

    fn definition(&self) -> Option<(&str, &[u8])> {
        None
    }

    fn consistency(&self) -> Consistency {
        Consistency::Crash
    }

    fn notes(&self) -> &[String] {
        &[]
    }

    fn still_consistent(&self) -> Result<(), CaptureError> {
        Ok(())
    }

    fn close(self: Box<Self>, _: Outcome) -> Result<(), CaptureError> {
        Ok(())
    }
}

impl CapturedDisk for MadeUpDisk {
    fn name(&self) -> &DiskName {
        &self.name
    }

    fn size_bytes(&self) -> u64 {
        self.chunks * CHUNK
    }

    fn changes(&self) -> &Changes {
        &self.changes
    }

    fn mark(&self) -> Option<&str> {
        Some("tracked")
    }

    fn allocated(&self, range: Extent) -> Result<Vec<Extent>, CaptureError> {
        Ok(vec![range])
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), CaptureError> {
        buffer.fill(0);
        for (at, chunk) in (offset / CHUNK..).zip(buffer.chunks_mut(CHUNK as usize)) {
            let written = self.written.get(&(at % self.step)).copied();
            let content = [self.vm, at, written.unwrap_or(0)]
                .map(u64::to_le_bytes)
                .concat();
            chunk[..content.len()].copy_from_slice(&content);
        }
        Ok(())
    }
}

/// A repository with one customer, and the host that writes it.
struct Life {
    clock: Arc<Set>,
    host: Arc<LocalHost>,
    repository: RepositoryId,
    start: Timestamp,
    vms: u64,
    chunks: u64,
}

fn acme() -> CustomerName {
    "acme".parse().expect("a name")
}

impl Life {
    fn new(storage: &Arc<dyn Storage>, state: &Path, vms: u64, chunks: u64) -> Self {
        let start = time("2031-01-06T23:00:00Z");
        let clock = Arc::new(Set(Mutex::new(start)));
        let folder = StateFolder::create(state).expect("a folder");
        let (identity, _) = folder.ensure_identity("a benchmark").expect("an identity");
        let told_by = clock.clone() as Arc<dyn Clock>;
        let mode = HostClock::Trusted;
        let host = LocalHost::new(identity, "host1".to_string(), folder, told_by, mode);
        // As whoever runs `vmkeep init` does.
        host.vouch_for_clock();
        let file = new_repository(start, CHUNK as u32, Writers::Many);
        let file = create_repository(&**storage, file).expect("a repository");
        let new = NewCustomer {
            repository: file.repository,
            name: &acme(),
            host: host.body(),
            recipients: vec![host.identity().recipient()],
            terms: &PolicyTerms::default(),
            writers: Writers::Many,
        };
        Customer::create(storage, &new, &host).expect("a customer");
        Life {
            clock,
            host: Arc::new(host),
            repository: file.repository,
            start,
            vms,
            chunks,
        }
    }

    fn open(&self, storage: &Arc<dyn Storage>) -> Customer {
        let settings = WriteSettings {
            threads: 2,
            ..WriteSettings::default()
        };
        let (host, identity) = (self.host.clone(), self.host.identity());
        let storage = storage.clone();
        Customer::open(storage, &acme(), self.repository, identity, host, settings)
            .expect("the customer opens")
    }

    fn at(&self, night: u64) -> Timestamp {
        self.start + SignedDuration::from_hours(24 * night as i64)
    }

    fn back_up(&self, customer: &Customer, night: u64) {
        for vm in 0..self.vms {
            let apart = SignedDuration::from_secs(20 * vm as i64);
            self.clock.to(self.at(night) + apart);
            let source = MadeUp {
                vm,
                night,
                chunks: self.chunks,
            };
            let task = VmTask {
                vm: format!("vm{vm:02}").parse::<VmName>().expect("a name"),
                source: Box::new(source),
            };
            let settings = BackupSettings {
                chunk_bytes: CHUNK as u32,
                threads: 2,
            };
            let stop = AtomicBool::new(false);
            let full = night % 7 == vm % 7;
            let done = backup_now(customer, &self.host, &task, full, &settings, &Quiet, &stop);
            done.expect("backed up");
        }
    }

    fn prune(&self, customer: &Customer, night: u64) -> Pruned {
        self.clock
            .to(self.at(night) + SignedDuration::from_hours(2));
        let request = PruneRequest {
            confirm: false,
            has_reserve: false,
            copies_elsewhere: false,
        };
        let stop = AtomicBool::new(false);
        let pruned = prune(customer, &self.host, request, false, &Quiet, &stop);
        let pruned = pruned.expect("pruned");
        assert!(pruned.damage.is_none(), "{:?}", pruned.damage);
        pruned
    }

    fn live(&self, storage: &Arc<dyn Storage>, nights: std::ops::Range<u64>) {
        for night in nights {
            let customer = self.open(storage);
            self.back_up(&customer, night);
            self.prune(&customer, night);
        }
    }
}

fn copy_into(bucket: &S3, memory: &Memory) -> (usize, u64) {
    let objects = memory.list("").expect("a listing");
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while let Some(object) = objects.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let bytes = memory.read(&object.name, u64::MAX).expect("an object");
                    bucket.create(&object.name, &bytes).expect("created");
                }
            });
        }
    });
    let bytes = objects.iter().map(|object| object.size_bytes).sum();
    (objects.len(), bytes)
}

fn through(bucket: &Bucket, endpoint: &str) -> Arc<S3> {
    let mut settings = bucket.settings(PREFIX);
    settings.endpoint = Some(endpoint.to_string());
    Arc::new(S3::open(settings).expect("the bucket opens"))
}

fn with_copies(store: Arc<S3>, folder: &Path) -> Arc<dyn Storage> {
    let hash_of = |name: &ObjectName| content_hash(name).map(|hash| *hash.as_bytes());
    let folder = folder.to_path_buf();
    Arc::new(Cached::new(store, folder, CACHE_BYTES, hash_of))
}

/// By kind, sent and received.
#[derive(Default)]
struct Cost {
    requests: BTreeMap<String, usize>,
    sent: usize,
    received: usize,
}

impl Cost {
    fn add(&mut self, passed: &[Passed]) {
        for one in passed {
            let listing = one.method == "GET" && !one.target.contains("x-id=GetObject");
            let kind = match listing {
                true => "list or ask",
                false => one.method.as_str(),
            };
            *self.requests.entry(kind.to_string()).or_default() += 1;
            self.sent += one.body_bytes;
            self.received += one.answer_bytes;
        }
    }

    fn total(&self) -> usize {
        self.requests.values().sum()
    }

    /// For one of `count`.
    fn of_each(&self, count: usize) -> String {
        let each = |number: usize| number as f64 / count as f64;
        let kinds = self.requests.iter();
        let kinds = kinds.map(|(kind, number)| format!("{kind} {:.1}", each(*number)));
        format!(
            "{:.1} requests ({}), {:.0} KiB received, {:.0} KiB sent",
            each(self.total()),
            kinds.collect::<Vec<_>>().join(", "),
            each(self.received) / 1024.0,
            each(self.sent) / 1024.0,
        )
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// What this host has beside its identity.
fn forget(host: &Host) {
    for folder in ["cache", "checkpoints", "heads"] {
        let _none = fs::remove_dir_all(host.state().join(folder));
    }
}

fn measure_opening(host: &Host, bucket: &Bucket, proxy: &Proxy, life: &Life, at: Timestamp) {
    let direct = bucket.config(PREFIX);
    let config = host.config_text();
    let counted = config.replace(&server().endpoint, &proxy.endpoint);
    assert!(config.contains(&direct));
    // Each a minute after the one before: of a time that has not come yet a host believes nothing it kept.
    let minutes = std::cell::Cell::new(0);
    let points = || {
        minutes.set(minutes.get() + 1);
        let at = at + SignedDuration::from_mins(minutes.get());
        host.vmkeep(&["points", "-q"], at).exits(0);
    };
    println!("| opening | s (three times) | requests | KiB received |");
    println!("|---|---|--:|--:|");
    for (what, cold) in [
        ("`points`, a new host", true),
        ("`points`, the next time", false),
    ] {
        let mut seconds = Vec::new();
        for _ in 0..3 {
            if cold {
                forget(host);
            }
            let started = Instant::now();
            points();
            seconds.push(started.elapsed().as_secs_f64());
        }
        if cold {
            forget(host);
        }
        host.write_config(&counted);
        proxy.start_over([]);
        points();
        row(what, &seconds, &proxy.passed());
        host.write_config(&config);
    }
    let folder = host.state().join("cache");
    for (what, cold) in [
        ("and its index, a new host", true),
        ("the same, the next time", false),
    ] {
        let mut seconds = Vec::new();
        let open = |endpoint: &str| {
            if cold {
                forget(host);
                StateFolder::create(&host.state()).expect("a folder");
            }
            let started = Instant::now();
            let storage = with_copies(through(bucket, endpoint), &folder);
            let customer = life.open(&storage);
            let index = customer.load_index().expect("the index");
            assert!(index.records() as u64 >= life.vms * life.chunks);
            started.elapsed().as_secs_f64()
        };
        for _ in 0..3 {
            seconds.push(open(&server().endpoint));
        }
        proxy.start_over([]);
        open(&proxy.endpoint);
        row(what, &seconds, &proxy.passed());
    }
}

fn row(what: &str, seconds: &[f64], passed: &[Passed]) {
    let received: usize = passed.iter().map(|one| one.answer_bytes).sum();
    let times: Vec<String> = seconds.iter().map(|one| format!("{one:.2}")).collect();
    println!(
        "| {what} | {:.2} ({}) | {} | {} |",
        median(seconds.to_vec()),
        times.join(", "),
        passed.len(),
        received >> 10
    );
}

/// Nights that go on in the bucket, of which the prunes are counted.
fn measure_prunes(bucket: &Bucket, proxy: &Proxy, life: &Life, state: &Path, nights: &[u64]) {
    let folder = state.join("cache");
    let direct = with_copies(through(bucket, &server().endpoint), &folder);
    let counted = with_copies(through(bucket, &proxy.endpoint), &folder);
    let mut cost = Cost::default();
    let (mut erased, mut expired, mut packs, mut rewritten) = (0, 0, 0, 0);
    let mut seconds = 0.0;
    for night in nights {
        life.back_up(&life.open(&direct), *night);
        let customer = life.open(&counted);
        proxy.start_over([]);
        let started = Instant::now();
        let pruned = life.prune(&customer, *night);
        seconds += started.elapsed().as_secs_f64();
        cost.add(&proxy.passed());
        erased += pruned.erased.len();
        expired += pruned.expired.len();
        packs += pruned.reclaimed.removed.len();
        rewritten += pruned.reclaimed.rewritten_bytes;
    }
    println!(
        "{} nights' prunes: {expired} points expired, {erased} erased, {packs} packs reclaimed, {} KiB \
         rewritten, {:.1} s a night through the proxy\n",
        nights.len(),
        rewritten >> 10,
        seconds / nights.len() as f64,
    );
    println!("- a night: {}", cost.of_each(nights.len()));
    println!("- a point erased: {}\n", cost.of_each(erased.max(1)));
}

fn in_bucket(vms: u64, chunks: u64, nights: u64, and_opening: bool) {
    let bucket = server().bucket();
    let proxy = Proxy::before(&server().endpoint);
    let host = Host::new(&HostOptions {
        bucket: Some(bucket.config(PREFIX)),
        ..HostOptions::default()
    });
    let memory = Memory::new();
    let storage: Arc<dyn Storage> = Arc::new(memory.clone());
    let life = Life::new(&storage, &host.state(), vms, chunks);
    let started = Instant::now();
    life.live(&storage, 0..nights);
    let points = life.open(&storage).with_state(|state| state.live().count());
    let (objects, bytes) = copy_into(&through(&bucket, &server().endpoint), &memory);
    drop((storage, memory));
    println!(
        "\n## {vms} VMs, {} chunks, {points} restore points: {objects} objects, {} MiB ({:.0} s)\n",
        vms * chunks,
        bytes >> 20,
        started.elapsed().as_secs_f64()
    );
    if and_opening {
        let at = life.at(nights - 1) + SignedDuration::from_hours(3);
        measure_opening(&host, &bucket, &proxy, &life, at);
        println!();
    }
    let measured: Vec<u64> = (nights..nights + 7).collect();
    measure_prunes(&bucket, &proxy, &life, &host.state(), &measured);
}

fn main() {
    // `cargo test --benches` calls it too; it has no tests.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let vms = number_of("VMKEEP_BENCH_VMS", 56);
    let chunks = number_of("VMKEEP_BENCH_CHUNKS", 18_000);
    let nights = number_of("VMKEEP_BENCH_NIGHTS", 24);
    in_bucket(vms, chunks, nights, true);
    // One point a night expires, one is erased.
    in_bucket(1, chunks, nights, false);
}
