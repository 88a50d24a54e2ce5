//! What lies in a store is whatever somebody put there: no parser panics, none takes memory that
//! the length of its input or a limit of the format does not allow.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use vmkeep::codec::age;
use vmkeep::codec::{
    CustomerKey, DiskRecord, HostIdentity, Keys, Opener, PointRecord, RecordDefinition, Sealer,
    decode_node, minisign, open_record, seal_record,
};
use vmkeep::format::certificate::Certificate;
use vmkeep::format::entry::{Body, Entry};
use vmkeep::format::names::{CustomerNames, ObjectRole};
use vmkeep::format::pack::{
    self, FrameHeader, HEADER_BYTES, PackBuilder, PackKind, SEAL_BYTES, TRAILER_BYTES,
};
use vmkeep::format::repository_file::RepositoryFile;
use vmkeep::format::segment::{PackRow, Record, Segment, build};
use vmkeep::model::{
    CustomerName, CustomerUid, DiskName, Id, MAX_CHUNK_BYTES, ObjectName, PackName, PieceKind,
    PointId, PointKind, SessionId, Tag, TreeShape, VmName,
};

/// The system's allocator, which notes the largest piece that each thread asked for.
struct Noting;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn note(bytes: usize) {
    // While a thread ends its cell is gone; nothing is measured then.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(bytes)));
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Noting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        note(bytes);
        unsafe { System.realloc(pointer, layout, bytes) }
    }
}

#[global_allocator]
static ALLOCATOR: Noting = Noting;

/// Seeded: every run does the same.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// Changed copies of `good`: every truncation, every byte flipped, every aligned number turned
/// into a lie, and some with several changes, insertions and repetitions.
fn mutations(good: &[u8]) -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = Vec::new();
    let step = (good.len() / 400).max(1);
    for at in (0..good.len()).step_by(step) {
        all.push(good[..at].to_vec());
        for flip in [0x01, 0x80, 0xff] {
            let mut bad = good.to_vec();
            bad[at] ^= flip;
            all.push(bad);
        }
        for lie in [0u32, 1, 0x7fff_ffff, 0xffff_ffff, good.len() as u32] {
            let mut bad = good.to_vec();
            for (byte, value) in bad[at..].iter_mut().zip(lie.to_le_bytes()) {
                *byte = value;
            }
            all.push(bad);
        }
        let mut bad = good.to_vec();
        bad[at..].iter_mut().take(8).for_each(|byte| *byte = 0xff);
        all.push(bad);
    }
    let mut random = Random(0x5eed_0123_4567_89ab);
    for _ in 0..2000 {
        let mut bad = good.to_vec();
        for _ in 0..1 + random.below(6) {
            let at = random.below(bad.len());
            match random.below(4) {
                0 if !bad.is_empty() => bad[at] = random.next() as u8,
                1 => bad.insert(at, random.next() as u8),
                2 => bad.truncate(at),
                _ => {
                    let part = bad[at..(at + random.below(64)).min(bad.len())].to_vec();
                    bad.extend(part);
                }
            }
        }
        all.push(bad);
    }
    for length in 0..64 {
        all.push((0..length).map(|_| random.next() as u8).collect());
    }
    all
}

/// Gives every mutation to `parse`. None may make it take more than `factor` times its length and
/// `extra` in one piece. Returns how many were refused (`false`) and how many there were.
fn attack(
    good: &[u8],
    factor: usize,
    extra: usize,
    mut parse: impl FnMut(&[u8]) -> bool,
) -> (usize, usize) {
    assert!(parse(good), "the good one is refused");
    let (mut refused, mut all) = (0, 0);
    for bad in mutations(good) {
        LARGEST.set(0);
        let accepted = parse(&bad);
        let largest = LARGEST.get();
        assert!(
            largest <= factor * bad.len() + extra,
            "{largest} bytes in one piece for an input of {}",
            bad.len()
        );
        all += 1;
        refused += usize::from(!accepted);
    }
    (refused, all)
}

const SMALL: usize = 4096;

fn golden(name: &str) -> Vec<u8> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1");
    std::fs::read(root.join(name)).unwrap()
}

fn identity() -> HostIdentity {
    let text = String::from_utf8(golden("identities/host.txt")).unwrap();
    HostIdentity::from_file_text(&text).ok().unwrap()
}

fn secret() -> [u8; 32] {
    [7; 32]
}

fn keys() -> Keys {
    let uid = CustomerUid::from_bytes([8; 16]);
    Keys::derive(&CustomerKey::from_parts(uid, 1, secret()))
}

/// A data pack of three frames that open, the ids of which are returned.
fn good_pack() -> (pack::FinishedPack, Vec<Id>) {
    let session = SessionId::from_bytes([1; 16]);
    let mut builder = PackBuilder::new(PackKind::Data, 1, &session, &[2; 16], 0);
    let mut ids = Vec::new();
    for plain in [&b"short"[..], &[b'a'; 3000], b"a little longer than short"] {
        let keys = keys();
        let id = keys.id(PieceKind::Chunk, plain);
        let tag = keys.tag(&id);
        let mut sealed = Vec::new();
        let how =
            Sealer::new(1)
                .unwrap()
                .seal(&keys, PieceKind::Chunk, &id, &tag, plain, &mut sealed);
        let header = FrameHeader {
            kind: PieceKind::Chunk,
            compressed: how.compressed,
            tag,
            plain_bytes: plain.len() as u32,
            sealed_bytes: sealed.len() as u32,
        };
        builder.append(&header, &sealed);
        ids.push(id);
    }
    (builder.finish(), ids)
}

/// Makes a frame's checksum right again, so that a lie in its header gets past it.
fn with_checksum(frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    if frame.len() >= 44 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&frame[..28]).update(&frame[44..]);
        frame[28..44].copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    }
    frame
}

#[test]
fn no_frame_makes_the_parser_or_the_opener_panic_or_take_more_than_a_chunk() {
    let (pack, ids) = good_pack();
    let keys = keys();
    for (entry, id) in pack.entries.iter().zip(&ids) {
        let good = pack::frame_bytes(&pack.bytes, entry).unwrap();
        let (refused, all) = attack(good, 2, SMALL, |bytes| pack::parse_frame(bytes).is_ok());
        assert_eq!(refused, all - unchanged(good), "a changed frame passed");
        // Past the checksum only the cipher is left, and it lets nothing through.
        let open = |bytes: &[u8]| {
            let bytes = with_checksum(bytes);
            let Ok(frame) = pack::parse_frame(&bytes) else {
                return false;
            };
            let mut out = Vec::new();
            let opened = Opener::new().unwrap().open(
                &keys,
                frame.header.kind,
                id,
                &frame.header.tag,
                frame.header.compressed,
                frame.header.plain_bytes,
                frame.sealed,
                &mut out,
            );
            opened.is_ok()
        };
        let (refused, all) = attack(good, 2, MAX_CHUNK_BYTES as usize, open);
        let only_checksum = mutations(good)
            .iter()
            .filter(|bad| bad.len() == good.len())
            .filter(|bad| bad[..28] == good[..28] && bad[44..] == good[44..])
            .count();
        assert_eq!(refused, all - only_checksum, "a changed frame opened");
    }
}

/// How many mutations came out as the good one (a byte replaced by itself).
fn unchanged(good: &[u8]) -> usize {
    mutations(good).iter().filter(|bad| *bad == good).count()
}

#[test]
fn no_pack_makes_the_scrub_panic_or_pass_for_whole() {
    let (pack, _) = good_pack();
    let good = &pack.bytes;
    let whole = |bytes: &[u8]| pack::scrub(bytes).is_ok_and(|(_, damaged)| damaged.is_empty());
    let (refused, all) = attack(good, 4, SMALL, whole);
    assert_eq!(refused, all - unchanged(good));
    attack(good, 2, SMALL, |bytes| pack::parse_header(bytes).is_ok());
    for bad in mutations(&good[good.len() - TRAILER_BYTES..]) {
        for pack_bytes in [0, 1, good.len() as u64, pack::MAX_PACK_BYTES, u64::MAX] {
            if let Ok(range) = pack::directory_range(&bad, pack_bytes) {
                assert!(range.end <= pack_bytes && range.start <= range.end);
            }
        }
    }
}

#[test]
fn no_directory_makes_the_parser_panic_even_if_its_hash_is_right() {
    let (pack, _) = good_pack();
    let at = pack.bytes.len() - TRAILER_BYTES - 32 - 32 * pack.entries.len();
    let header = &pack.bytes[..HEADER_BYTES];
    let rows = &pack.bytes[at..at + 32 * pack.entries.len()];
    let (refused, all) = attack(rows, 8, SMALL, |rows| {
        let mut hasher = blake3::Hasher::new();
        hasher.update(header).update(rows);
        let directory = [rows, hasher.finalize().as_bytes()].concat();
        match pack::parse_directory(header, &directory, at as u64) {
            Ok(entries) => {
                // What is accepted fills the pack without gap or overlap.
                let mut next = HEADER_BYTES as u32;
                for entry in &entries {
                    assert_eq!(entry.offset, next);
                    next += entry.length_bytes;
                }
                next as usize == at
            }
            Err(_) => false,
        }
    });
    // A tag is anything; whether it is the frame's is for the scrub to say.
    assert!(refused * 3 > all, "{refused} of {all}");
}

#[test]
fn no_segment_makes_the_parser_or_a_search_panic_or_take_more_than_its_length() {
    let session = SessionId::from_bytes([1; 16]);
    let packs: Vec<PackRow> = (0..2u8)
        .map(|n| PackRow {
            name: PackName {
                session,
                hash: vmkeep::model::ObjectHash::from_bytes([n; 32]),
            },
            size_bytes: 1 << 20,
            frames: 10,
            kind: PackKind::Data,
        })
        .collect();
    let mut records: Vec<Record> = (0..20u32)
        .map(|n| Record {
            tag: Tag::from_bytes([(n * 12) as u8; 16]),
            pack: n % 2,
            offset: 48 + n * 100,
            length_bytes: 100,
        })
        .collect();
    let good = build(&session, &[3; 16], &packs, &mut records);
    let use_it = |bytes: &[u8]| {
        let Ok(segment) = Segment::parse(bytes.to_vec()) else {
            return false;
        };
        for n in 0..=255u8 {
            for (_, record) in segment.find(&Tag::from_bytes([n; 16])).unwrap() {
                let pack = &segment.packs()[record.pack as usize];
                let end = u64::from(record.offset) + u64::from(record.length_bytes);
                assert!(end <= pack.size_bytes);
            }
        }
        for (at, record) in segment.records().enumerate() {
            let record = record.unwrap();
            let found = segment.find(&record.tag).unwrap();
            assert!(
                found.contains(&(at, record)),
                "a record that no search finds"
            );
        }
        true
    };
    let (refused, all) = attack(&good, 2, SMALL, use_it);
    assert!(refused * 2 > all, "{refused} of {all}");
}

#[test]
fn no_entry_makes_the_parser_panic_or_has_two_spellings() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/v1/store/customers/acme/ledger");
    for file in std::fs::read_dir(root).unwrap() {
        let good = std::fs::read(file.unwrap().path()).unwrap();
        attack(&good, 8, 1 << 16, |bytes| {
            let Ok(entry) = Entry::open(bytes, |_, _, _| true) else {
                return false;
            };
            // What is understood is written again byte for byte, but for the signature; what is
            // not understood, or has optional fields, is not written at all.
            let known = !matches!(entry.body, Body::Unknown { .. });
            if known && !bytes.windows(3).any(|part| part == b"\"x-") {
                let line =
                    |bytes: &[u8]| bytes.split(|byte| *byte == b'\n').next().unwrap().to_vec();
                let again = entry.seal(|_| [0; 64]).unwrap();
                assert_eq!(line(&again), line(bytes));
            }
            true
        });
    }
}

#[test]
fn no_text_file_makes_a_parser_panic() {
    attack(&golden("store/vmkeep.json"), 8, SMALL, |bytes| {
        RepositoryFile::parse(bytes).is_ok()
    });
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/v1/store/customers/acme/certificates");
    let files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    let json = files
        .iter()
        .find(|path| path.extension().unwrap() == "json");
    let content = std::fs::read(json.unwrap()).unwrap();
    attack(&content, 8, SMALL, |bytes| {
        Certificate::parse(bytes).is_ok()
    });
    let minisig = files
        .iter()
        .find(|path| path.extension().unwrap() == "minisig");
    let signature = std::fs::read(minisig.unwrap()).unwrap();
    let host = identity().host_id();
    attack(&signature, 8, SMALL, |bytes| {
        std::str::from_utf8(bytes).is_ok_and(|text| minisign::verify(&host, &content, text).is_ok())
    });
    let uid = CustomerUid::from_bytes([8; 16]);
    let key = CustomerKey::from_parts(uid, 1, secret());
    attack(&key.to_key_file(), 8, SMALL, |bytes| {
        CustomerKey::from_key_file(bytes).is_ok()
    });
    attack(&golden("identities/host.txt"), 8, 1 << 16, |bytes| {
        std::str::from_utf8(bytes).is_ok_and(|text| HostIdentity::from_file_text(text).is_ok())
    });
}

#[test]
fn no_key_file_makes_the_opener_panic_or_opens_changed() {
    let identity = identity();
    let good = golden("objects/key.age");
    let limit = age::MAX_FILE_BYTES;
    let (refused, all) = attack(&good, 2, limit, |bytes| identity.decrypt(bytes).is_ok());
    // Another recipient's stanza is covered by the MAC: nothing at all may change.
    assert_eq!(refused, all - unchanged(&good));
}

#[test]
fn no_point_record_makes_the_parser_panic_even_if_it_is_sealed_with_the_right_key() {
    let keys = keys();
    let point = PointId::from_bytes([9; 16]);
    let disk = |name: &str, root| DiskRecord {
        name: DiskName::new(name).unwrap(),
        shape: TreeShape {
            size_bytes: 100_000,
            chunk_bytes: 65536,
        },
        root,
        mark: Some("mark".to_string()),
    };
    let record = PointRecord {
        vm: VmName::new("web01").unwrap(),
        kind: PointKind::Incremental,
        taken_at: "2026-11-21T23:00:00Z".parse().unwrap(),
        disks: vec![
            disk("vda", Some(Id::from_secret_bytes([3; 32]))),
            disk("vdb", None),
        ],
        definition: Some(RecordDefinition {
            file_name: "domain.xml".to_string(),
            content: b"<domain/>".to_vec(),
        }),
    };
    let good = seal_record(&keys, &point, &record);
    let (refused, all) = attack(&good, 2, SMALL, |bytes| {
        open_record(&keys, &point, bytes).is_ok()
    });
    assert_eq!(refused, all - unchanged(&good));

    // As the specification has it, with the ciphers alone.
    let record_key = blake3::derive_key("vmkeep v1 record key", &secret());
    let cipher_key = *blake3::keyed_hash(&record_key, point.as_bytes()).as_bytes();
    let header = [&b"VMKPOIN1"[..], &1u32.to_le_bytes()].concat();
    let aad = [&header[..], &[8; 16], point.as_bytes()].concat();
    let plain = gcm_open(&cipher_key, &aad, &good[12..]);
    let (refused, all) = attack(&plain, 4, SMALL, |plain| {
        let stored = [header.clone(), gcm_seal(&cipher_key, &aad, plain)].concat();
        open_record(&keys, &point, &stored).is_ok_and(|record| {
            assert!(record.disks.iter().all(|disk| disk.shape.size_bytes > 0));
            true
        })
    });
    assert!(refused * 3 > all, "{refused} of {all}");
}

fn cipher(key: &[u8; 32]) -> ring::aead::LessSafeKey {
    let key = ring::aead::UnboundKey::new(&ring::aead::AES_256_GCM, key).unwrap();
    ring::aead::LessSafeKey::new(key)
}

fn gcm_open(key: &[u8; 32], aad: &[u8], sealed: &[u8]) -> Vec<u8> {
    let (nonce, rest) = sealed.split_at(12);
    let mut content = rest.to_vec();
    let nonce = ring::aead::Nonce::try_assume_unique_for_key(nonce).unwrap();
    cipher(key)
        .open_in_place(nonce, ring::aead::Aad::from(aad), &mut content)
        .unwrap()
        .to_vec()
}

fn gcm_seal(key: &[u8; 32], aad: &[u8], plain: &[u8]) -> Vec<u8> {
    let mut content = plain.to_vec();
    cipher(key)
        .seal_in_place_append_tag(
            ring::aead::Nonce::assume_unique_for_key([0; 12]),
            ring::aead::Aad::from(aad),
            &mut content,
        )
        .unwrap();
    [&[0; 12][..], &content].concat()
}

#[test]
fn no_content_of_a_frame_makes_the_opener_panic_even_if_it_is_sealed_with_the_right_key() {
    let keys = keys();
    let plain = vec![0x41; 4096];
    let id = keys.id(PieceKind::Chunk, &plain);
    let tag = keys.tag(&id);
    let frame_key = blake3::derive_key("vmkeep v1 frame key", &secret());
    let cipher_key = *blake3::keyed_hash(&frame_key, id.secret_bytes()).as_bytes();
    let mut aad = vec![0, 1, 0, 0];
    aad.extend_from_slice(&4096u32.to_le_bytes());
    aad.extend_from_slice(&[8; 16]);
    aad.extend_from_slice(tag.as_bytes());
    let good = zstd::bulk::compress(&plain, 3).unwrap();
    let mut opener = Opener::new().unwrap();
    let mut out = Vec::new();
    let (refused, all) = attack(&good, 4, 8192, |content| {
        let sealed = gcm_seal(&cipher_key, &aad, content);
        let opened = opener.open(
            &keys,
            PieceKind::Chunk,
            &id,
            &tag,
            true,
            4096,
            &sealed,
            &mut out,
        );
        // Several spellings of the same content may exist; another content may not.
        assert!(opened.is_err() || out == plain);
        opened.is_ok()
    });
    assert!(refused * 2 > all, "{refused} of {all}");
}

#[test]
fn no_node_makes_the_decoder_panic() {
    for length in [0usize, 1, 31, 32, 33, 64, 8192, 8224] {
        for expected in [0usize, 1, 2, 256, 257] {
            let plain = vec![1; length];
            let decoded = decode_node(&plain, expected);
            assert_eq!(decoded.is_ok(), length == 32 * expected && expected > 0);
            assert!(decode_node(&vec![0; length], expected).is_err());
        }
    }
}

#[test]
fn no_object_name_has_two_meanings() {
    let names = CustomerNames::new(&CustomerName::new("acme").unwrap());
    let session = SessionId::from_bytes([0xab; 16]);
    let hash = vmkeep::model::ObjectHash::from_bytes([0xcd; 32]);
    let pack = PackName { session, hash };
    for good in [
        names.key(12),
        names.ledger(42),
        names.pack(&pack),
        names.point(&PointId::from_bytes([1; 16])),
    ] {
        attack(good.as_str().as_bytes(), 4, SMALL, |bytes| {
            let Some(name) = std::str::from_utf8(bytes)
                .ok()
                .and_then(|text| ObjectName::new(text).ok())
            else {
                return false;
            };
            let again = match names.role(&name) {
                ObjectRole::Key(number) => names.key(number),
                ObjectRole::Ledger(seq) => names.ledger(seq),
                ObjectRole::Rival(seq, hash) => names.rival(seq, &hash),
                ObjectRole::Pack(pack) => names.pack(&pack),
                ObjectRole::Segment(segment) => names.segment(&segment),
                ObjectRole::Point(point) => names.point(&point),
                ObjectRole::Certificate(file) => names.certificate(&file).unwrap(),
                ObjectRole::Probe | ObjectRole::SpentProbe | ObjectRole::Foreign => return false,
            };
            assert_eq!(again, name);
            true
        });
    }
    assert_eq!(SEAL_BYTES, 12 + 16);
}
