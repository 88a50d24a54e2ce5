//! Fuzz targets of what is sealed: a cipher keeps out who has no key, and the targets go behind it,
//! for what a faulty or malicious writer with the key could have sealed.

use super::frame::associated_data;
use super::seal::seal;
use super::{
    CustomerKey, HostIdentity, Keys, Opener, PointRecord, decode_node, encode_node, minisign,
    open_record, seal_record,
};
use crate::model::{CustomerUid, PieceKind, PointId};
use std::sync::LazyLock;

/// Made for tests, of no other use. The corpus has what is sealed for it, and what it signed.
const IDENTITY: &str = include_str!("../../tests/golden/v1/identities/host.txt");
const SIGNED: &[u8] = include_bytes!(
    "../../tests/golden/v1/store/customers/acme/certificates/6226837d4fe6272ea8c1b460d2c70eb5.json"
);

static KEYS: LazyLock<Keys> = LazyLock::new(|| {
    Keys::derive(&CustomerKey::from_parts(
        CustomerUid::from_bytes([7; 16]),
        1,
        [7; 32],
    ))
});

static HOST: LazyLock<HostIdentity> =
    LazyLock::new(|| match HostIdentity::from_file_text(IDENTITY) {
        Ok(host) => host,
        Err(_) => panic!("the identity of the fuzz targets is none"),
    });

/// Kind, compression, plain length, then what is under the seal.
pub fn sealed_piece(bytes: &[u8]) {
    let Some(([code, compressed, a, b, c, d], inner)) = bytes.split_first_chunk() else {
        return;
    };
    let Some(kind) = PieceKind::from_code(*code % 8) else {
        return;
    };
    let compressed = compressed & 1 == 1;
    let plain_bytes = u32::from_le_bytes([*a, *b, *c, *d]) % (kind.max_plain_bytes() as u32 + 2);
    // Whoever has the key knows the id of what he sealed.
    let plain = match compressed {
        true => zstd::bulk::decompress(inner, kind.max_plain_bytes()).unwrap_or_default(),
        false => inner.to_vec(),
    };
    let id = KEYS.id(kind, &plain);
    let tag = KEYS.tag(&id);
    let aad = associated_data(kind, compressed, plain_bytes, &KEYS.uid(), &tag);
    let mut sealed = Vec::new();
    seal(&KEYS.frame_key(&id), &aad, &mut inner.to_vec(), &mut sealed);
    let mut opener = Opener::new().expect("a decompressor");
    let mut out = Vec::new();
    let mut open = |id, sealed: &[u8], out: &mut Vec<u8>| {
        let opened = opener.open(&KEYS, kind, id, &tag, compressed, plain_bytes, sealed, out);
        opened.is_ok()
    };
    let opened = open(&id, &sealed, &mut out);
    if opened {
        assert!(out == plain && out.len() == plain_bytes as usize);
    }
    if !compressed && inner.len() == plain_bytes as usize && !inner.is_empty() {
        assert!(opened || inner.len() > kind.max_plain_bytes());
    }
    // Under another id, or changed, nothing opens.
    let other = KEYS.id(kind, b"another piece");
    assert!(plain == b"another piece" || !open(&other, &sealed, &mut out));
    assert!(!open(&id, inner, &mut out));
    if let Some(last) = sealed.last_mut() {
        *last ^= 1;
    }
    assert!(!open(&id, &sealed, &mut out));
}

/// Children of a node: their number, then their ids.
pub fn node(bytes: &[u8]) {
    let Some((expected, plain)) = bytes.split_first() else {
        return;
    };
    let expected = usize::from(*expected) + 1;
    let Ok(children) = decode_node(plain, expected) else {
        return;
    };
    assert_eq!(children.len(), expected);
    assert!(
        encode_node(&children).as_deref() == Some(plain),
        "another node says the same"
    );
}

/// The plaintext of a point record, and the bytes as a stored one.
pub fn record(bytes: &[u8]) {
    let point = PointId::from_bytes([9; 16]);
    assert!(open_record(&KEYS, &point, bytes).is_err());
    let Ok(record) = PointRecord::decode(bytes) else {
        return;
    };
    assert!(record.encode() == bytes, "another record says the same");
    let stored = seal_record(&KEYS, &point, &record);
    assert!(open_record(&KEYS, &point, &stored) == Ok(record));
    assert!(open_record(&KEYS, &PointId::from_bytes([8; 16]), &stored).is_err());
}

/// What is in a key file, once it is opened.
pub fn customer_key(bytes: &[u8]) {
    if let Ok(key) = CustomerKey::from_key_file(bytes) {
        assert!(
            *key.to_key_file() == bytes,
            "another key file says the same"
        );
    }
}

/// A key file in the age format, and the text of an identity.
pub fn key_file(bytes: &[u8]) {
    if let Ok(plain) = HOST.decrypt(bytes) {
        customer_key(&plain);
    }
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(identity) = HostIdentity::from_file_text(text)
    {
        let again = identity.to_file_text("now");
        let again = HostIdentity::from_file_text(&again);
        assert!(again.is_ok_and(|again| again.host_id() == identity.host_id()));
    }
}

/// A signature file of a certificate.
pub fn signature(bytes: &[u8]) {
    let host = HOST.host_id();
    if let Ok(text) = std::str::from_utf8(bytes) {
        if let Ok(comment) = minisign::verify(&host, SIGNED, text) {
            assert!(!comment.as_str().chars().any(char::is_control));
        }
        assert!(minisign::verify(&host, b"other content", text).is_err());
    }
}
