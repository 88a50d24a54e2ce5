//! The worked example of the format specification, read out of the specification and computed.

use std::collections::BTreeMap;

use vmkeep::codec::{CustomerKey, Keys, Opener, decode_node, encode_node, open_record};
use vmkeep::format::pack::{
    FrameHeader, PackBuilder, PackKind, directory_of, frame_bytes, parse_frame,
};
use vmkeep::model::{CustomerUid, PieceKind, PointId, PointKind, SessionId, TreeShape};

/// The values of the last section, by their names.
fn example() -> BTreeMap<String, Vec<u8>> {
    let (_, section) = include_str!("../src/format/mod.rs")
        .split_once("//! # 19. Worked example")
        .expect("the specification has a section with the worked example");
    let mut values: BTreeMap<String, String> = BTreeMap::new();
    let mut last = String::new();
    for line in section.lines().skip_while(|line| !line.contains("```text")) {
        let line = line.trim_start_matches("//! ");
        if let Some((name, hex)) = line.split_once(" = ").or(line.split_once("= ")) {
            last = name.trim().to_string();
            let before = values.insert(last.clone(), hex.trim().to_string());
            assert_eq!(before, None, "{last} stands twice");
        } else if line.starts_with(' ') {
            values
                .entry(last.clone())
                .or_default()
                .push_str(line.trim());
        }
    }
    values
        .into_iter()
        .map(|(name, hex)| {
            let bytes = hex.as_bytes().chunks(2).map(|digits| {
                let digits = std::str::from_utf8(digits).unwrap();
                u8::from_str_radix(digits, 16).unwrap_or_else(|_| panic!("{name}: {digits}"))
            });
            (name.clone(), bytes.collect())
        })
        .collect()
}

/// Every field that a stored entry has is described, and every limit is the code's.
#[test]
fn the_specification_names_every_kind_and_field_of_the_golden_ledger() {
    fn fields(value: &serde_json::Value, into: &mut Vec<String>) {
        match value {
            serde_json::Value::Object(map) => {
                for (name, value) in map {
                    into.push(name.clone());
                    fields(value, into);
                }
            }
            serde_json::Value::Array(list) => list.iter().for_each(|value| fields(value, into)),
            _ => {}
        }
    }
    let text = include_str!("../src/format/mod.rs");
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let ledger = root.join("tests/golden/v1/store/customers/acme/ledger");
    for file in std::fs::read_dir(ledger).unwrap() {
        let stored = std::fs::read(file.unwrap().path()).unwrap();
        let line = stored.split(|byte| *byte == b'\n').next().unwrap();
        let entry: serde_json::Value = serde_json::from_slice(line).unwrap();
        let mut names = vec![entry["kind"].as_str().unwrap().to_string()];
        fields(&entry, &mut names);
        for name in names {
            let code = format!("`{name}`");
            assert!(
                text.contains(&code) || text.contains(&format!("\"{name}\":")),
                "{name} is not specified"
            );
        }
    }
    use vmkeep::format::{certificate, entry, pack, repository_file, segment};
    for (row, bytes, limit) in [
        ("| pack | 256 MiB", pack::MAX_PACK_BYTES, 256 << 20),
        (
            "| index segment, sections in it | 4 GiB, 32 |",
            segment::MAX_SEGMENT_BYTES,
            4 << 30,
        ),
        (
            "| point record | 16 MiB |",
            vmkeep::codec::MAX_RECORD_BYTES,
            16 << 20,
        ),
        (
            "1 MiB written, 1 MiB + 16 KiB read |",
            entry::MAX_ENTRY_BYTES,
            (1 << 20) + (16 << 10),
        ),
        (
            "| `vmkeep.json` | 64 KiB |",
            repository_file::MAX_REPOSITORY_FILE_BYTES,
            64 << 10,
        ),
        (
            "| certificate | 64 MiB |",
            certificate::MAX_CERTIFICATE_BYTES,
            64 << 20,
        ),
        ("| disk | 64 TiB |", vmkeep::model::MAX_DISK_BYTES, 64 << 40),
        (
            "| height of a tree | 6 |",
            u64::from(vmkeep::model::MAX_HEIGHT),
            6,
        ),
    ] {
        assert!(text.contains(row), "{row}");
        assert_eq!(bytes, limit, "{row}");
    }
}

struct Example {
    values: BTreeMap<String, Vec<u8>>,
    used: std::cell::RefCell<Vec<String>>,
}

impl Example {
    fn get(&self, name: &str) -> &[u8] {
        self.used.borrow_mut().push(name.to_string());
        self.values
            .get(name)
            .unwrap_or_else(|| panic!("the example lacks {name:?}"))
    }

    fn array<const N: usize>(&self, name: &str) -> [u8; N] {
        self.get(name).try_into().expect(name)
    }
}

const PLAIN_CHUNK: &[u8] = b"vmkeep example 1";

#[test]
fn the_worked_example_is_what_the_code_computes() {
    let example = Example {
        values: example(),
        used: Default::default(),
    };
    let shape = TreeShape {
        size_bytes: 65552,
        chunk_bytes: 65536,
    };
    assert_eq!((shape.chunk_count(), shape.height()), (2, 1));
    assert_eq!(shape.chunk_length(1), PLAIN_CHUNK.len());

    // Keys: the derivations, by their context strings, and what `codec` makes of them.
    let uid = CustomerUid::from_bytes(example.array("customer uid"));
    let secret: [u8; 32] = example.array("customer secret");
    for (name, context) in [
        ("chunk id key", "vmkeep v1 chunk id key"),
        ("node id key, height 1", "vmkeep v1 node id key height 1"),
        ("tag key", "vmkeep v1 tag key"),
        ("frame key", "vmkeep v1 frame key"),
        ("record key", "vmkeep v1 record key"),
    ] {
        let derived = blake3::derive_key(context, &secret);
        assert_eq!(derived, example.array(name), "{name}");
    }
    let keys = Keys::derive(&CustomerKey::from_parts(uid, 1, secret));
    let keyed =
        |key: &str, message: &[u8]| *blake3::keyed_hash(&example.array(key), message).as_bytes();

    // Chunk and node.
    let chunk = PieceKind::Chunk;
    let node = PieceKind::Node { height: 1 };
    assert_eq!(example.get("chunk 1"), PLAIN_CHUNK);
    let id = keys.id(chunk, PLAIN_CHUNK);
    assert_eq!(*id.secret_bytes(), example.array("chunk 1 id"));
    assert_eq!(keyed("chunk id key", PLAIN_CHUNK), *id.secret_bytes());
    assert_eq!(*keys.tag(&id).as_bytes(), example.array("chunk 1 tag"));
    assert_eq!(
        keyed("tag key", id.secret_bytes())[..16],
        *example.get("chunk 1 tag")
    );
    assert_eq!(
        keyed("frame key", id.secret_bytes()),
        example.array("chunk 1 frame key")
    );
    let plain_node = encode_node(&[None, Some(id)]).unwrap();
    assert_eq!(plain_node, example.get("node"));
    assert!(decode_node(&plain_node, 2) == Ok(vec![None, Some(id)]));
    let root = keys.id(node, &plain_node);
    assert_eq!(*root.secret_bytes(), example.array("node id (the root)"));
    assert_eq!(
        keyed("node id key, height 1", &plain_node),
        *root.secret_bytes()
    );
    assert_eq!(*keys.tag(&root).as_bytes(), example.array("node tag"));

    // The frame: opened by `codec`, and by the cipher alone.
    let frame = parse_frame(example.get("frame")).unwrap();
    assert_eq!(frame.header.kind, chunk);
    assert_eq!(frame.header.tag, keys.tag(&id));
    assert_eq!(
        (frame.header.compressed, frame.header.plain_bytes),
        (false, 16)
    );
    assert_eq!(frame.sealed[..12], *example.get("frame nonce"));
    let mut opened = Vec::new();
    Opener::new()
        .unwrap()
        .open(
            &keys,
            chunk,
            &id,
            &frame.header.tag,
            false,
            16,
            frame.sealed,
            &mut opened,
        )
        .unwrap();
    assert_eq!(opened, PLAIN_CHUNK);
    assert_eq!(
        aes_gcm(
            example.get("chunk 1 frame key"),
            example.get("frame associated data"),
            frame.sealed
        ),
        PLAIN_CHUNK
    );

    // The pack around it.
    let header = example.get("pack header");
    let session = SessionId::from_bytes(header[16..32].try_into().unwrap());
    let mut pack = PackBuilder::new(
        PackKind::Data,
        1,
        &session,
        header[32..48].try_into().unwrap(),
        0,
    );
    pack.append(
        &FrameHeader {
            kind: chunk,
            compressed: false,
            tag: keys.tag(&id),
            plain_bytes: 16,
            sealed_bytes: frame.sealed.len() as u32,
        },
        frame.sealed,
    );
    let pack = pack.finish();
    let written = [
        header,
        example.get("frame"),
        example.get("pack directory"),
        example.get("pack directory hash"),
        example.get("pack trailer"),
    ]
    .concat();
    assert_eq!(pack.bytes, written);
    assert_eq!(*pack.hash.as_bytes(), example.array("pack hash"));
    let entries = directory_of(&written).unwrap();
    assert_eq!(entries, pack.entries);
    assert_eq!(
        frame_bytes(&written, &entries[0]),
        Some(example.get("frame"))
    );

    // The record.
    let point = PointId::from_bytes(example.array("point id"));
    let stored = example.get("record");
    let record = open_record(&keys, &point, stored).unwrap();
    assert_eq!(record.vm.as_str(), "web01");
    assert_eq!(record.kind, PointKind::Full);
    assert_eq!(record.taken_at.to_string(), "2026-11-01T22:00:00Z");
    assert!(record.definition.is_none());
    let [disk] = record.disks.as_slice() else {
        panic!("one disk")
    };
    assert_eq!((disk.name.as_str(), disk.shape), ("vda", shape));
    assert!(disk.root == Some(root) && disk.mark.is_none());
    assert_eq!(
        keyed("record key", point.as_bytes()),
        example.array("record cipher key")
    );
    assert_eq!(stored[12..24], *example.get("record nonce"));
    assert_eq!(
        aes_gcm(
            example.get("record cipher key"),
            example.get("record associated data"),
            &stored[12..]
        ),
        example.get("record plaintext")
    );
    assert_eq!(blake3::hash(stored).as_bytes(), example.get("record hash"));

    // Nothing stands in the example that was not looked at.
    let used = example.used.borrow();
    let unused: Vec<&String> = example
        .values
        .keys()
        .filter(|name| !used.contains(*name))
        .collect();
    assert_eq!(unused, Vec::<&String>::new());
}

/// Opens nonce, ciphertext and tag, knowing of the format only what the text says.
fn aes_gcm(key: &[u8], aad: &[u8], sealed: &[u8]) -> Vec<u8> {
    use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
    let (nonce, rest) = sealed.split_at(12);
    let mut content = rest.to_vec();
    let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).unwrap());
    let nonce = Nonce::try_assume_unique_for_key(nonce).unwrap();
    key.open_in_place(nonce, Aad::from(aad), &mut content)
        .unwrap()
        .to_vec()
}
