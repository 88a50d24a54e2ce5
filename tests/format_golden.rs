//! Format version 1 as it stands in stores: a small complete repository, written once and kept.
//!
//! `tests/golden/v1/store` is a whole store, `identities` opens it (made for these tests, of no
//! other use), `expected.json` says what must come out of it, `objects` holds single objects. A
//! program that changes the format breaks these tests; a new version gets a folder of its own.
//!
//! The generator runs only when it is asked to, and never overwrites:
//! `VMKEEP_WRITE_GOLDEN=DIR cargo test --test format_golden `

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use vmkeep::codec::age::AgeRecipient;
use vmkeep::codec::{
    CustomerKey, HostIdentity, Keys, Opener, minisign, open_record, random_bytes, verify_signature,
};
use vmkeep::format::certificate::{CERTIFICATE_VERSION, Certificate, CertifiedPoint};
use vmkeep::format::entry::{
    Attestation, BeginBody, Body, CertificateRef, ClockBody, ClockDeclaration, ClockEvent, Entry,
    HostBody, MergeBody, PointReason, PointsBody, Purpose, ReclaimedBody, RestoreBody, Role,
    VerifyMethod, entry_hash,
};
use vmkeep::format::names::{CustomerNames, ObjectRole};
use vmkeep::format::pack::{
    FrameHeader, PackBuilder, PackKind, SEAL_BYTES, directory_of, frame_bytes, parse_frame, scrub,
};
use vmkeep::format::segment::{PackRow, Record, Segment, build};
use vmkeep::model::{
    CustomerName, CustomerUid, DiskName, EntryHash, HostId, ObjectHash, ObjectName, PackName,
    PieceKind, PointId, PointKind, RepositoryId, SegmentName, SessionId, Tag, TreeShape, VmName,
    Writers,
};
use vmkeep::policy::PolicyTerms;
use vmkeep::repository::{
    Customer, DiskDraft, Head, Host, HostMemory, KeptState, Ledger, LedgerClock, NewCustomer,
    PointDraft, PointReader, ReadScratch, Reader, RepositoryError, Stamp, Trust, Turn, Vouched,
    WriteSettings, create_repository, new_repository, open_repository, reclaim, scrub_packs,
};
use vmkeep::storage::{Memory, Storage};

const LAST_ENTRY: u64 = 25;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1")
}

fn file(name: &str) -> Vec<u8> {
    let path = golden().join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn identity(name: &str) -> HostIdentity {
    let text = String::from_utf8(file(&format!("identities/{name}.txt"))).unwrap();
    HostIdentity::from_file_text(&text).ok().unwrap()
}

fn acme() -> CustomerName {
    CustomerName::new("acme").unwrap()
}

fn hash(bytes: &[u8]) -> ObjectHash {
    ObjectHash::from_bytes(*blake3::hash(bytes).as_bytes())
}

/// A host whose clock moves a minute an entry.
struct TestHost {
    identity: HostIdentity,
    now: AtomicI64,
    /// The end of the ledger that this host has seen before.
    head: Option<Head>,
}

impl TestHost {
    fn new(identity: HostIdentity) -> Self {
        let start: Timestamp = "2026-11-01T21:00:00Z".parse().unwrap();
        TestHost {
            identity,
            now: AtomicI64::new(start.as_second()),
            head: None,
        }
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_second(self.now.load(Ordering::Relaxed)).unwrap()
    }

    fn sleep_hours(&self, hours: i64) {
        self.now.fetch_add(3600 * hours, Ordering::Relaxed);
    }
}

impl HostMemory for TestHost {
    fn head(&self, _customer: &CustomerUid) -> Option<Head> {
        self.head
    }

    fn remember_head(&self, _customer: &CustomerUid, _head: Head) {}

    fn origin(&self, _repository: &RepositoryId, _customer: &CustomerName) -> Option<EntryHash> {
        None
    }

    fn remember_origin(
        &self,
        _repository: &RepositoryId,
        _customer: &CustomerName,
        _first: EntryHash,
    ) {
    }

    fn checkpoint(&self, _customer: &CustomerUid) -> Option<KeptState> {
        None
    }

    fn keep_checkpoint(&self, _customer: &CustomerUid, _checkpoint: &[u8], _vouched: Vouched) {}
}

impl Host for TestHost {
    fn id(&self) -> HostId {
        self.identity.host_id()
    }

    fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.identity.sign(message)
    }

    fn stamp(&self, _ledger: LedgerClock) -> Stamp {
        self.now.fetch_add(60, Ordering::Relaxed);
        Stamp {
            time: self.now(),
            attestation: Attestation::Witnessed,
        }
    }

    fn noted(&self, _stamp: &Stamp, _customer: &CustomerUid, _seq: u64) {}

    fn hold_session(&self, _session: &SessionId) -> Result<Box<dyn Send + Sync>, RepositoryError> {
        Ok(Box::new(()))
    }

    fn session_is_dead(&self, _session: &SessionId) -> bool {
        false
    }

    fn take_turn(&self, _prefix: &str) -> Result<Box<dyn Turn>, RepositoryError> {
        unreachable!("several hosts may write this repository")
    }
}

/// All objects of the golden store, by name.
fn objects() -> BTreeMap<ObjectName, Vec<u8>> {
    fn walk(root: &Path, folder: &Path, into: &mut BTreeMap<ObjectName, Vec<u8>>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => walk(root, &path, into),
                false => {
                    let name = path.strip_prefix(root).unwrap().to_str().unwrap();
                    let bytes = std::fs::read(&path).unwrap();
                    into.insert(ObjectName::new(name).unwrap(), bytes);
                }
            }
        }
    }
    let root = golden().join("store");
    let mut objects = BTreeMap::new();
    walk(&root, &root, &mut objects);
    objects
}

fn store(objects: &BTreeMap<ObjectName, Vec<u8>>) -> Memory {
    let memory = Memory::new();
    for (name, bytes) in objects {
        memory.create(name, bytes).unwrap();
    }
    memory
}

fn open_customer(memory: &Memory, identity_file: &str) -> Result<Customer, RepositoryError> {
    let repository = open_repository(memory)?;
    let storage: Arc<dyn Storage> = Arc::new(memory.clone());
    Customer::open(
        storage,
        &acme(),
        repository.repository,
        &identity(identity_file),
        Arc::new(TestHost {
            head: (identity_file == "host").then(|| Head {
                seq: LAST_ENTRY,
                hash: entry_hash(&file(&format!(
                    "store/customers/acme/ledger/{LAST_ENTRY:016}"
                ))),
            }),
            ..TestHost::new(identity(identity_file))
        }),
        WriteSettings::default(),
    )
}

/// What a point gives back, as `expected.json` has it.
fn restore(customer: &Customer, point: &PointId) -> Result<Value, RepositoryError> {
    let opened = PointReader::open(customer, point)?;
    let reader = Reader::new(customer)?;
    let mut scratch = ReadScratch::new()?;
    let mut disks = Vec::new();
    for disk in &opened.disks {
        let mut content = vec![0u8; disk.shape().size_bytes as usize];
        let view = disk.view(&reader, &mut scratch)?;
        for span in view.data_spans().collect::<Vec<_>>() {
            view.read_span::<RepositoryError>(span, &mut scratch, |offset, bytes| {
                content[offset as usize..][..bytes.len()].copy_from_slice(bytes);
                Ok(())
            })?;
        }
        disks.push(json!({
            "name": disk.name().to_string(),
            "size_bytes": disk.shape().size_bytes,
            "chunk_bytes": disk.shape().chunk_bytes,
            "mark": disk.mark(),
            "blake3": hash(&content).to_string(),
        }));
    }
    let definition = opened.definition.as_ref().map(
        |(name, content)| json!({ "file_name": name, "content": String::from_utf8_lossy(content) }),
    );
    Ok(json!({
        "point": point.to_string(),
        "vm": opened.vm.to_string(),
        "kind": opened.kind.to_string(),
        "taken_at": opened.taken_at.to_string(),
        "disks": disks,
        "definition": definition,
    }))
}

fn restore_all(customer: &Customer) -> Result<Vec<Value>, RepositoryError> {
    let points: Vec<PointId> =
        customer.with_state(|state| state.live().map(|(id, _)| *id).collect());
    points.iter().map(|id| restore(customer, id)).collect()
}

fn expected() -> Value {
    serde_json::from_slice(&file("expected.json")).unwrap()
}

/// Everything a careful operator can do with a store: restore all, read all packs, check all
/// certificates.
fn examine(memory: &Memory) -> Result<Vec<Value>, String> {
    let say = |error: &dyn std::fmt::Display| error.to_string();
    let customer = open_customer(memory, "host").map_err(|error| say(&error))?;
    let restored = restore_all(&customer).map_err(|error| say(&error))?;
    let index = customer.load_index().map_err(|error| say(&error))?;
    let packs: Vec<PackName> = index
        .packs()
        .iter()
        .filter(|info| !info.deleted)
        .map(|info| info.row.name)
        .collect();
    let scrubbed = scrub_packs(&customer, &packs, 1, &AtomicBool::new(false), &|_| {})
        .map_err(|error| say(&error))?;
    if scrubbed.whole != {
        let mut packs = packs.clone();
        packs.sort_unstable();
        packs
    } {
        return Err(format!("{:?} {:?}", scrubbed.damaged, scrubbed.broken));
    }
    for row in customer.with_state(|state| state.certificates.clone()) {
        let read = |file: String| {
            let name = customer.names().certificate(&file).map_err(|e| say(&e))?;
            memory.read(&name, 1 << 20).map_err(|error| say(&error))
        };
        let content = read(format!("{}.json", row.id))?;
        let signature = read(format!("{}.json.minisig", row.id))?;
        if hash(&content) != row.hash || hash(&signature) != row.signature_hash {
            return Err("certificate is not the one the ledger names".to_string());
        }
        let certificate = Certificate::parse(&content).map_err(|error| say(&error))?;
        let text = std::str::from_utf8(&signature).map_err(|error| say(&error))?;
        minisign::verify(&certificate.issued_by, &content, text).map_err(|error| say(&error))?;
    }
    Ok(restored)
}

#[test]
fn every_point_of_the_golden_repository_restores_for_host_and_escrow() {
    let memory = store(&objects());
    for identity in ["host", "escrow"] {
        let customer = open_customer(&memory, identity).unwrap();
        let restored = restore_all(&customer).unwrap();
        assert_eq!(restored.len(), 2);
        assert_eq!(Value::from(restored), expected()["points"]);
        let erased: PointId = expected()["erased"].as_str().unwrap().parse().unwrap();
        assert!(restore(&customer, &erased).is_err());
    }
    assert_eq!(Value::from(examine(&memory).unwrap()), expected()["points"]);
}

#[test]
fn nobody_else_opens_the_golden_repository() {
    let memory = store(&objects());
    let repository = open_repository(&memory).unwrap();
    let stranger = HostIdentity::generate().ok().unwrap();
    let opened = Customer::open(
        Arc::new(memory),
        &acme(),
        repository.repository,
        &stranger,
        Arc::new(TestHost::new(HostIdentity::generate().ok().unwrap())),
        WriteSettings::default(),
    );
    assert!(opened.is_err());
}

#[test]
fn every_entry_of_the_golden_ledger_is_valid_and_of_a_known_kind() {
    let storage: Arc<dyn Storage> = Arc::new(store(&objects()));
    let mut kinds: BTreeMap<String, u32> = BTreeMap::new();
    let state = Ledger::replay(storage, CustomerNames::new(&acme()), |entry, verdict| {
        assert_eq!(verdict, Ok(()), "entry {}", entry.seq);
        *kinds.entry(entry.body.kind().to_string()).or_default() += 1;
    })
    .unwrap();
    assert!(state.unknown.is_none() && state.open.is_empty());
    let kinds: Vec<&str> = kinds.keys().map(String::as_str).collect();
    assert_eq!(
        kinds,
        [
            "abort",
            "begin",
            "clock",
            "commit",
            "condemn",
            "erase",
            "expire",
            "genesis",
            "host",
            "key",
            "merge",
            "policy",
            "reclaimed",
            "restore",
            "undo",
            "verify"
        ]
    );
    let points: Vec<Value> = state
        .points
        .iter()
        .map(|(id, point)| {
            json!({
                "point": id.to_string(),
                "expires_at": point.expires_at.to_string(),
                "deadline": point.deadline.to_string(),
            })
        })
        .collect();
    assert_eq!(Value::from(points), expected()["ledger_points"]);
}

#[test]
fn a_flipped_byte_anywhere_in_the_golden_store_is_loud() {
    let objects = objects();
    let good = expected()["points"].clone();
    let memory = store(&objects);
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut flips = 0;
    for (name, bytes) in &objects {
        let mut places = vec![0, bytes.len() / 2, bytes.len() - 1];
        for _ in 0..12 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
            places.push((seed >> 33) as usize % bytes.len());
        }
        for place in places {
            let mut bad = bytes.clone();
            bad[place] ^= 1 << (seed >> 61);
            memory.plant(name, &bad);
            flips += 1;
            match examine(&memory) {
                Err(_) => {}
                // Only what says nothing about content may change without being noticed: the
                // repository file's time, and where a key file is as good as another.
                Ok(restored) => {
                    assert_eq!(Value::from(restored), good, "{name} byte {place}");
                    assert_eq!(name.as_str(), "vmkeep.json", "byte {place}");
                }
            }
        }
        memory.plant(name, bytes);
    }
    assert!(flips > 500, "{flips}");
}

#[test]
fn a_missing_or_swapped_object_of_the_golden_store_is_loud() {
    let objects = objects();
    let memory = store(&objects);
    let names: Vec<&ObjectName> = objects.keys().collect();
    for pair in names.windows(2) {
        let [one, two] = pair else { continue };
        memory.delete(one).unwrap();
        assert!(examine(&memory).is_err(), "{one} is missing");
        memory.plant(one, &objects[*two]);
        assert!(examine(&memory).is_err(), "{one} is {two}");
        memory.plant(one, &objects[*one]);
    }
}

#[test]
fn each_object_of_the_golden_store_is_what_its_name_says() {
    let names = CustomerNames::new(&acme());
    let mut seen = BTreeMap::new();
    for (name, bytes) in objects() {
        let what = match names.role(&name) {
            ObjectRole::Key(_) => "key",
            ObjectRole::Rival(..) => panic!("{name}: many may write"),
            ObjectRole::Ledger(seq) => {
                let entry = Entry::open(&bytes, |host, message, signature| {
                    verify_signature(host, message, signature)
                })
                .unwrap();
                assert_eq!(entry.seq, seq);
                "ledger"
            }
            ObjectRole::Pack(pack) => {
                let (entries, damaged) = scrub(&bytes).unwrap();
                assert!(!entries.is_empty() && damaged.is_empty());
                assert_eq!(hash(&bytes), pack.hash);
                "pack"
            }
            ObjectRole::Segment(segment) => {
                assert_eq!(hash(&bytes), segment.hash);
                let parsed = Segment::parse(bytes).unwrap();
                assert_eq!(parsed.session(), segment.session);
                assert!(!parsed.is_empty());
                "segment"
            }
            ObjectRole::Point(_) => "point",
            ObjectRole::Certificate(_) => "certificate",
            ObjectRole::Probe | ObjectRole::SpentProbe => panic!("{name}"),
            ObjectRole::Foreign => {
                assert_eq!(name.as_str(), "vmkeep.json");
                "repository"
            }
        };
        *seen.entry(what).or_insert(0) += 1;
    }
    assert_eq!(seen["repository"], 1);
    assert_eq!(seen["key"], 1);
    assert_eq!(seen["point"], 2);
    assert_eq!(seen["certificate"], 2);
    assert!(seen["pack"] >= 4 && seen["segment"] >= 1 && seen["ledger"] > 20);
}

// Single objects, made from fixed values. Where no random number is in them, writing them again
// must give the same bytes.

fn fixed_keys() -> Keys {
    Keys::derive(&CustomerKey::from_parts(
        CustomerUid::from_bytes([0x11; 16]),
        1,
        [0x22; 32],
    ))
}

fn fixed_pack() -> vmkeep::format::pack::FinishedPack {
    let session = SessionId::from_bytes([0x33; 16]);
    let mut pack = PackBuilder::new(PackKind::Data, 1, &session, &[0x44; 16], 0);
    for (compressed, plain_bytes, n) in [(false, 40, 1u8), (true, 65536, 2)] {
        let sealed = vec![n; 40 + SEAL_BYTES];
        let header = FrameHeader {
            kind: PieceKind::Chunk,
            compressed,
            tag: Tag::from_bytes([n; 16]),
            plain_bytes,
            sealed_bytes: sealed.len() as u32,
        };
        pack.append(&header, &sealed);
    }
    pack.finish()
}

fn fixed_segment() -> Vec<u8> {
    let pack = fixed_pack();
    let session = SessionId::from_bytes([0x33; 16]);
    let row = PackRow {
        name: PackName {
            session,
            hash: pack.hash,
        },
        size_bytes: pack.bytes.len() as u64,
        frames: 2,
        kind: PackKind::Data,
    };
    let mut records: Vec<Record> = pack
        .entries
        .iter()
        .rev()
        .map(|entry| Record {
            tag: entry.tag,
            pack: 0,
            offset: entry.offset,
            length_bytes: entry.length_bytes,
        })
        .collect();
    build(&session, &[0x55; 16], &[row], &mut records)
}

fn fixed_entry(host: HostId) -> Entry {
    Entry {
        seq: 2,
        prev: EntryHash::from_bytes([0x66; 32]),
        customer: CustomerUid::from_bytes([0x11; 16]),
        time: "2026-11-01T22:00:00Z".parse().unwrap(),
        attestation: Attestation::Alone,
        host,
        body: Body::Begin(BeginBody {
            session: SessionId::from_bytes([0x33; 16]),
            purpose: Purpose::Backup,
            vm: Some(VmName::new("web01").unwrap()),
            point: Some(PointId::from_bytes([0x77; 16])),
            expires_at: None,
            deadline: None,
        }),
    }
}

#[test]
fn the_golden_pack_is_read_and_written_again() {
    let bytes = file("objects/pack");
    assert_eq!(bytes, fixed_pack().bytes);
    assert_eq!(directory_of(&bytes).unwrap(), fixed_pack().entries);
    for entry in fixed_pack().entries {
        let frame = parse_frame(frame_bytes(&bytes, &entry).unwrap()).unwrap();
        assert_eq!(frame.header.tag, entry.tag);
    }
}

#[test]
fn the_golden_segment_is_read_and_written_again() {
    let bytes = file("objects/segment");
    assert_eq!(bytes, fixed_segment());
    let segment = Segment::parse(bytes).unwrap();
    let found = segment.find(&Tag::from_bytes([2; 16])).unwrap();
    assert_eq!(found, [(1, segment.record(1).unwrap())]);
    assert_eq!(segment.record(1).unwrap().offset, 48 + 44 + 68);
}

#[test]
fn the_golden_entry_is_read_and_written_again() {
    let bytes = file("objects/entry");
    let host = identity("host");
    assert_eq!(
        bytes,
        fixed_entry(host.host_id())
            .seal(|message| host.sign(message))
            .unwrap()
    );
    let entry = Entry::open(&bytes, |host, message, signature| {
        verify_signature(host, message, signature)
    });
    assert_eq!(entry.unwrap(), fixed_entry(host.host_id()));
}

#[test]
fn the_golden_record_is_read() {
    let point = PointId::from_bytes([0x77; 16]);
    let record = open_record(&fixed_keys(), &point, &file("objects/record")).unwrap();
    assert_eq!(record.vm.as_str(), "web01");
    assert_eq!(record.kind, PointKind::Full);
    assert_eq!(record.taken_at.to_string(), "2026-11-01T22:00:00Z");
    let [disk] = record.disks.as_slice() else {
        panic!("one disk")
    };
    assert_eq!(disk.name.as_str(), "vda");
    assert_eq!(disk.shape.size_bytes, 100_000);
    assert!(disk.root.is_none() && disk.mark.as_deref() == Some("mark"));
    let definition = record.definition.as_ref().unwrap();
    assert_eq!(definition.file_name, "domain.xml");
    assert_eq!(definition.content, b"<domain/>");
}

#[test]
fn the_golden_key_file_is_read() {
    for name in ["host", "escrow"] {
        let plain = identity(name)
            .decrypt(&file("objects/key.age"))
            .ok()
            .unwrap();
        let key = CustomerKey::from_key_file(&plain).ok().unwrap();
        assert_eq!(key.uid(), CustomerUid::from_bytes([0x11; 16]));
        assert_eq!(key.generation(), 1);
        let id = Keys::derive(&key).id(PieceKind::Chunk, b"chunk");
        assert!(id == fixed_keys().id(PieceKind::Chunk, b"chunk"));
    }
}

#[test]
fn a_frame_of_the_golden_pack_needs_its_id() {
    let bytes = file("objects/pack");
    let entries = directory_of(&bytes).unwrap();
    let frame = parse_frame(frame_bytes(&bytes, &entries[0]).unwrap()).unwrap();
    let keys = fixed_keys();
    let id = keys.id(PieceKind::Chunk, &[0; 40]);
    let opened = Opener::new().unwrap().open(
        &keys,
        PieceKind::Chunk,
        &id,
        &frame.header.tag,
        false,
        40,
        frame.sealed,
        &mut Vec::new(),
    );
    assert!(opened.is_err());
}

// The generator.

/// A disk's content: what stands in its chunks, the rest is zero.
#[derive(Clone)]
struct Content {
    shape: TreeShape,
    chunks: BTreeMap<u64, Vec<u8>>,
}

impl Content {
    fn new(size_bytes: u64, chunk_bytes: u32) -> Self {
        Content {
            shape: TreeShape {
                size_bytes,
                chunk_bytes,
            },
            chunks: BTreeMap::new(),
        }
    }

    fn text(mut self, chunk: u64, text: &str) -> Self {
        let length = self.shape.chunk_length(chunk);
        let bytes = text.bytes().cycle().take(length).collect();
        self.chunks.insert(chunk, bytes);
        self
    }

    fn noise(mut self, chunk: u64, seed: &str) -> Self {
        let mut bytes = vec![0; self.shape.chunk_length(chunk)];
        let mut hasher = blake3::Hasher::new();
        hasher.update(seed.as_bytes());
        hasher.finalize_xof().fill(&mut bytes);
        self.chunks.insert(chunk, bytes);
        self
    }

    fn zero(mut self, chunk: u64) -> Self {
        self.chunks.remove(&chunk);
        self
    }

    fn hash(&self) -> ObjectHash {
        let mut bytes = vec![0; self.shape.size_bytes as usize];
        for (chunk, content) in &self.chunks {
            let at = (*chunk * u64::from(self.shape.chunk_bytes)) as usize;
            bytes[at..][..content.len()].copy_from_slice(content);
        }
        hash(&bytes)
    }
}

struct Generator {
    customer: Customer,
    host: Arc<TestHost>,
    memory: Memory,
}

impl Generator {
    fn backup(&self, disks: &[(&str, &Content)], base: Option<PointId>) -> PointId {
        let vm = VmName::new("web01").unwrap();
        let point = PointId::from_bytes(random_bytes());
        let begun = self
            .customer
            .begin(Purpose::Backup, Some((&vm, point)))
            .unwrap();
        let trust = match base {
            Some(_) => Trust::Index,
            None => Trust::CheckedSince(begun.begun_at - SignedDuration::from_hours(24 * 8)),
        };
        let session = self.customer.session(&begun, trust).unwrap();
        let reader = Reader::new(&self.customer).unwrap();
        let mut scratch = ReadScratch::new().unwrap();
        let mut worker = session.worker().unwrap();
        let mut results = Vec::new();
        let below = base.map(|base| PointReader::open(&self.customer, &base).unwrap());
        for (name, content) in disks {
            let name = DiskName::new(name).unwrap();
            let row = below.as_ref().and_then(|point| {
                let disk = point.disks.iter().find(|disk| *disk.name() == name)?;
                disk.row(&reader, &mut scratch, &content.shape).unwrap()
            });
            let draft = DiskDraft::new(content.shape, row).unwrap();
            for at in 0..draft.span_count() {
                let mut span = draft.begin_span(&reader, &mut scratch, at).unwrap();
                for child in 0..content.shape.children_of(1, at as u64) {
                    match content.chunks.get(&(at as u64 * 256 + child as u64)) {
                        None => span.hole(child),
                        Some(plain) => span.put(&session, &mut worker, child, plain).unwrap(),
                    }
                }
                draft.end_span(&session, &mut worker, span).unwrap();
            }
            let mark = format!("{{\"generation\":{}}}", results.len());
            let result = session.finish_disk(&mut worker, &name, draft, Some(&mark));
            results.push(result.unwrap());
        }
        session.retire(worker);
        let draft = PointDraft {
            point,
            vm,
            kind: base.map_or(PointKind::Full, |_| PointKind::Incremental),
            base,
            consistency: "image".to_string(),
            notes: vec!["a note, \"quoted\": ünïcödé".to_string()],
            definition: Some(("domain.xml".to_string(), b"<domain>web01</domain>".to_vec())),
            audit: None,
        };
        self.customer
            .commit(&begun, &session, draft, results)
            .unwrap();
        self.host.sleep_hours(24);
        point
    }

    fn points(&self, point: PointId, reason: &str) -> PointsBody {
        let _ = self;
        PointsBody {
            points: vec![PointReason {
                point,
                reason: reason.to_string(),
            }],
        }
    }

    fn append(&self, body: Body) -> u64 {
        self.customer.append(|_| Ok(body.clone())).unwrap()
    }

    /// Joins all current segments, as a merge does once there are many.
    fn merge(&self) {
        let begun = self.customer.begin(Purpose::Merge, None).unwrap();
        let state = self.customer.state();
        let (mut rows, mut records) = (Vec::new(), Vec::new());
        for name in state.segments.keys() {
            let bytes = self
                .memory
                .read(&self.customer.names().segment(name), 1 << 20);
            let segment = Segment::parse(bytes.unwrap()).unwrap();
            let numbers: Vec<Option<u32>> = segment
                .packs()
                .iter()
                .map(|row| {
                    let gone = state.condemned.contains_key(&row.name);
                    (!gone).then(|| {
                        rows.push(*row);
                        rows.len() as u32 - 1
                    })
                })
                .collect();
            records.extend(segment.records().filter_map(|record| {
                let record = record.unwrap();
                let pack = numbers[record.pack as usize]?;
                Some(Record { pack, ..record })
            }));
        }
        let bytes = build(&begun.id, &random_bytes(), &rows, &mut records);
        let segment = SegmentName {
            session: begun.id,
            hash: hash(&bytes),
        };
        let names = self.customer.names();
        self.memory
            .create(&names.segment(&segment), &bytes)
            .unwrap();
        let replaced: Vec<SegmentName> = state.segments.keys().copied().collect();
        self.append(Body::Merge(MergeBody {
            session: begun.id,
            segments: vec![segment],
            replaced: replaced.clone(),
            dropped: state.condemned.keys().copied().collect(),
        }));
        for name in replaced {
            self.memory.delete(&names.segment(&name)).unwrap();
        }
    }

    fn prove(&self, erased: CertifiedPoint, reclaimed: &reclaim::Reclaimed) {
        let begun = self.customer.begin(Purpose::Prove, None).unwrap();
        let listed = self.memory.list(self.customer.names().prefix()).unwrap();
        self.customer.refresh().unwrap();
        let state = self.customer.state();
        let id = begun.id.to_string();
        let point = erased.point;
        let certificate = Certificate {
            vmkeep_deletion_certificate: CERTIFICATE_VERSION,
            id: id.clone(),
            repository: state.repository.unwrap(),
            customer: state.customer_name.clone(),
            customer_uid: state.uid.unwrap(),
            issued_at: self.host.now(),
            issued_by: self.host.id(),
            stores: vec!["memory".to_string()],
            statement: "Made for tests.".to_string(),
            erased: vec![erased.clone()],
            destroyed: vec![erased],
            packs_deleted: reclaimed.removed.clone(),
            unreadable_bytes_left: 0,
            unreadable_bytes_deadline: None,
            ledger_seq: state.seq,
            ledger_hash: state.hash.unwrap(),
            objects_listed: listed.len() as u64,
        };
        let content = certificate.to_bytes().unwrap();
        let signature = minisign::sign(&self.host.identity, &content, "a deletion certificate");
        let signature = signature.unwrap().into_bytes();
        for (suffix, bytes) in [("json", &content), ("json.minisig", &signature)] {
            let names = self.customer.names();
            let name = names.certificate(&format!("{id}.{suffix}")).unwrap();
            self.memory.create(&name, bytes).unwrap();
        }
        self.append(Body::Reclaimed(ReclaimedBody {
            session: Some(begun.id),
            marked_at: reclaimed.marked_at,
            deleted: reclaimed.removed.clone(),
            marks: reclaimed.marks.clone(),
            certificate: Some(CertificateRef {
                id,
                hash: hash(&content),
                signature_hash: hash(&signature),
            }),
            destroyed: vec![point],
        }));
    }
}

#[test]
fn what_made_the_golden_repository_still_makes_one_that_restores() {
    // A new one is kept only where that is asked for.
    let temporary = tempfile::tempdir().unwrap();
    let folder = std::env::var_os("VMKEEP_WRITE_GOLDEN")
        .map_or_else(|| temporary.path().to_path_buf(), PathBuf::from);
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        assert!(!path.exists(), "{} is never overwritten", path.display());
        std::fs::write(path, bytes).unwrap();
    };
    let identities: Vec<HostIdentity> = ["host", "escrow"]
        .into_iter()
        .map(|name| {
            let made = HostIdentity::generate().ok().unwrap();
            let text = format!(
                "# For the tests of vmkeep only: this secret is published with its source.\n{}",
                *made.to_file_text("2026-11-01")
            );
            write(&format!("identities/{name}.txt"), text.as_bytes());
            made
        })
        .collect();
    let recipients: Vec<AgeRecipient> = identities.iter().map(HostIdentity::recipient).collect();
    let mut identities = identities.into_iter();
    let host = Arc::new(TestHost::new(identities.next().unwrap()));
    let escrow = identities.next().unwrap();

    let memory = Memory::new();
    let storage: Arc<dyn Storage> = Arc::new(memory.clone());
    let repository =
        create_repository(&memory, new_repository(host.now(), 65536, Writers::Many)).unwrap();
    let body = |identity: &HostIdentity, name: &str, roles: Vec<Role>| HostBody {
        host: identity.host_id(),
        name: name.to_string(),
        recipient: identity.recipient().to_string(),
        roles,
        clock: ClockDeclaration::Trusted,
    };
    let all = vec![Role::Backup, Role::Restore, Role::Prune, Role::Admin];
    let terms = PolicyTerms::default();
    let new = NewCustomer {
        repository: repository.repository,
        name: &acme(),
        host: body(&host.identity, "golden", all),
        recipients: recipients.clone(),
        terms: &terms,
        writers: Writers::Many,
    };
    Customer::create(&storage, &new, &*host).unwrap();
    let customer = Customer::open(
        storage,
        &acme(),
        repository.repository,
        &host.identity,
        host.clone(),
        WriteSettings {
            pack_bytes: 100 << 10,
            compression_level: 3,
            ..WriteSettings::default()
        },
    )
    .unwrap();
    let made = Generator {
        customer,
        host: host.clone(),
        memory: memory.clone(),
    };
    made.append(Body::Host(body(&escrow, "reader", vec![Role::Restore])));

    // Two disks: one of a low tree, whose last chunk is short; one of two levels, mostly holes.
    let vda = Content::new(5 * 65536 + 1000, 65536)
        .text(0, "boot sector of web01. ")
        .noise(2, "kept")
        .noise(3, "only in the first point")
        .noise(5, "the short last chunk");
    let vdb = Content::new(300 * 131072 + 512, 131072)
        .text(0, "superblock ")
        .text(7, "only in the first point, compressible ")
        .text(299, "far behind a hole ")
        .text(300, "the very end ");
    let first = made.backup(&[("vda", &vda), ("vdb", &vdb)], None);
    let vda = vda.zero(3).text(1, "new in the second point ");
    let vdb = vdb.zero(7).text(8, "new in the second point too ");
    let full = made.backup(&[("vda", &vda), ("vdb", &vdb)], None);
    let full_hashes = [vda.hash(), vdb.hash()];
    let vda = vda.text(4, "an incremental change ").zero(0);
    let vdb = vdb.text(299, "another change ");
    let incremental = made.backup(&[("vda", &vda), ("vdb", &vdb)], Some(full));

    // A session that died, a restore, a clock that was refused, a verification.
    let vm = VmName::new("web01").unwrap();
    let dead = made
        .customer
        .begin(Purpose::Backup, Some((&vm, PointId::from_bytes([9; 16]))))
        .unwrap();
    made.customer.abort(&dead.id, "made for tests").unwrap();
    made.append(Body::Restore(RestoreBody {
        point: full,
        vm,
        disks: vec![DiskName::new("vda").unwrap()],
        reason: "drill".to_string(),
    }));
    made.append(Body::Clock(ClockBody {
        event: ClockEvent::Refused,
        seq: None,
        text: "made for tests".to_string(),
    }));

    // The first point goes, down to the last byte; another one is expired by mistake.
    made.append(Body::Expire(made.points(full, "by mistake")));
    made.append(Body::Undo(made.points(full, "it was a mistake")));
    made.append(Body::Expire(made.points(first, "made for tests")));
    let erase_entry = made.append(Body::Erase(made.points(first, "made for tests")));
    memory
        .destroy(&made.customer.names().point(&first))
        .unwrap();
    let erased = made.customer.with_state(|state| {
        let point = &state.points[&first];
        CertifiedPoint {
            point: first,
            vm: point.vm.to_string(),
            taken_at: point.taken_at,
            deadline: point.deadline,
            erase_entry,
            erased_at: point.erased_at,
        }
    });
    let budget = SignedDuration::from_hours(24 * 365);
    let reclaimed = reclaim::reclaim(&made.customer, host.now(), budget, false).unwrap();
    assert!(!reclaimed.removed.is_empty() && reclaimed.rewritten_bytes > 0);
    assert_eq!(reclaimed.marks, vec![]);
    made.prove(erased, &reclaimed);
    made.merge();
    let index = made.customer.load_index().unwrap();
    let packs: Vec<PackName> = index.packs().iter().map(|info| info.row.name).collect();
    made.customer
        .note_verification(VerifyMethod::Checksum, &packs, &[])
        .unwrap();

    for object in memory.list("").unwrap() {
        let bytes = memory.read(&object.name, 1 << 30).unwrap();
        write(&format!("store/{}", object.name), &bytes);
    }
    let points = restore_all(&made.customer).unwrap();
    let by_id = |id: PointId| {
        points
            .iter()
            .find(|point| point["point"] == id.to_string())
            .unwrap()
    };
    for (id, hashes) in [(full, full_hashes), (incremental, [vda.hash(), vdb.hash()])] {
        for (disk, hash) in hashes.iter().enumerate() {
            assert_eq!(by_id(id)["disks"][disk]["blake3"], hash.to_string());
        }
    }
    let ledger_points: Vec<Value> = made.customer.with_state(|state| {
        let row = |(id, point): (&PointId, &vmkeep::repository::Point)| {
            json!({
                "point": id.to_string(),
                "expires_at": point.expires_at.to_string(),
                "deadline": point.deadline.to_string(),
            })
        };
        state.points.iter().map(row).collect()
    });
    let expected = json!({
        "customer": "acme",
        "points": points,
        "ledger_points": ledger_points,
        "erased": first.to_string(),
    });
    let text = serde_json::to_string_pretty(&expected).unwrap() + "\n";
    write("expected.json", text.as_bytes());

    write("objects/pack", &fixed_pack().bytes);
    write("objects/segment", &fixed_segment());
    let entry = fixed_entry(host.id());
    write("objects/entry", &entry.seal(|m| host.sign(m)).unwrap());
    let record = vmkeep::codec::PointRecord {
        vm: VmName::new("web01").unwrap(),
        kind: PointKind::Full,
        taken_at: "2026-11-01T22:00:00Z".parse().unwrap(),
        disks: vec![vmkeep::codec::DiskRecord {
            name: DiskName::new("vda").unwrap(),
            shape: TreeShape {
                size_bytes: 100_000,
                chunk_bytes: 65536,
            },
            root: None,
            mark: Some("mark".to_string()),
        }],
        definition: Some(vmkeep::codec::RecordDefinition {
            file_name: "domain.xml".to_string(),
            content: b"<domain/>".to_vec(),
        }),
    };
    let point = PointId::from_bytes([0x77; 16]);
    let sealed = vmkeep::codec::seal_record(&fixed_keys(), &point, &record);
    write("objects/record", &sealed);
    let key = CustomerKey::from_parts(CustomerUid::from_bytes([0x11; 16]), 1, [0x22; 32]);
    let sealed = vmkeep::codec::age::encrypt(&recipients, &key.to_key_file()).unwrap();
    write("objects/key.age", &sealed);
}
