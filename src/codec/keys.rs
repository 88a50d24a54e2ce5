use super::random_bytes;
use crate::model::{CustomerUid, Id, PieceKind, PointId, Tag};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

const CONTEXT_CHUNK_ID: &str = "vmkeep v1 chunk id key";
const CONTEXT_NODE_ID: [&str; 6] = [
    "vmkeep v1 node id key height 1",
    "vmkeep v1 node id key height 2",
    "vmkeep v1 node id key height 3",
    "vmkeep v1 node id key height 4",
    "vmkeep v1 node id key height 5",
    "vmkeep v1 node id key height 6",
];
const CONTEXT_TAG: &str = "vmkeep v1 tag key";
const CONTEXT_FRAME: &str = "vmkeep v1 frame key";
const CONTEXT_RECORD: &str = "vmkeep v1 record key";

const KEY_FILE_TITLE: &str = "vmkeep customer key 1";

/// The secret of one customer, from which every other key follows. Stored only in `age` files.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct CustomerKey {
    #[zeroize(skip)]
    uid: CustomerUid,
    #[zeroize(skip)]
    generation: u32,
    secret: [u8; 32],
}

/// A key file that opened but is not one of this customer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyFileError(pub String);

impl CustomerKey {
    pub fn generate(uid: CustomerUid) -> Self {
        CustomerKey {
            uid,
            generation: 1,
            secret: random_bytes(),
        }
    }

    /// For fixtures and the worked example of the specification: not a way to make keys.
    pub fn from_parts(uid: CustomerUid, generation: u32, secret: [u8; 32]) -> Self {
        CustomerKey {
            uid,
            generation,
            secret,
        }
    }

    pub fn uid(&self) -> CustomerUid {
        self.uid
    }

    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// The plaintext of a key file.
    pub fn to_key_file(&self) -> Zeroizing<Vec<u8>> {
        let mut text = Zeroizing::new(String::with_capacity(256));
        text.push_str(&format!(
            "{KEY_FILE_TITLE}\ncustomer {}\ngeneration {}\nkey ",
            self.uid, self.generation
        ));
        for byte in &self.secret {
            text.push_str(&format!("{byte:02x}"));
        }
        text.push('\n');
        Zeroizing::new(text.as_bytes().to_vec())
    }

    pub fn from_key_file(bytes: &[u8]) -> Result<Self, KeyFileError> {
        let error = |text: &str| KeyFileError(text.to_string());
        let text = std::str::from_utf8(bytes).map_err(|_| error("is not text"))?;
        let mut lines = text.lines();
        if lines.next() != Some(KEY_FILE_TITLE) {
            return Err(error("is not a vmkeep customer key of version 1"));
        }
        let mut field = |name: &str| {
            lines
                .next()
                .and_then(|line| line.strip_prefix(name))
                .and_then(|line| line.strip_prefix(' '))
                .ok_or_else(|| KeyFileError(format!("lacks the line {name:?}")))
        };
        let uid = field("customer")?
            .parse()
            .map_err(|_| error("has a malformed customer uid"))?;
        let generation = field("generation")?
            .parse()
            .map_err(|_| error("has a malformed generation"))?;
        // The parser of 32-byte ids is the one strict hexadecimal parser; nothing is printed.
        let secret: crate::model::ObjectHash = field("key")?
            .parse()
            .map_err(|_| error("has a malformed key"))?;
        let key = CustomerKey {
            uid,
            generation,
            secret: *secret.as_bytes(),
        };
        // One spelling: no leading zeros, no carriage returns, nothing after the last line.
        match *key.to_key_file() == bytes && generation > 0 {
            true => Ok(key),
            false => Err(error("is not spelled as vmkeep writes it")),
        }
    }
}

/// All keys that follow from a customer key. No `Debug`, wiped when dropped.
#[derive(Zeroize, ZeroizeOnDrop)]
pub struct Keys {
    #[zeroize(skip)]
    uid: CustomerUid,
    #[zeroize(skip)]
    generation: u32,
    chunk_id: [u8; 32],
    node_id: [[u8; 32]; 6],
    tag: [u8; 32],
    frame: [u8; 32],
    record: [u8; 32],
}

impl Keys {
    pub fn derive(key: &CustomerKey) -> Self {
        let derive = |context: &str| blake3::derive_key(context, &key.secret);
        Keys {
            uid: key.uid,
            generation: key.generation,
            chunk_id: derive(CONTEXT_CHUNK_ID),
            node_id: CONTEXT_NODE_ID.map(derive),
            tag: derive(CONTEXT_TAG),
            frame: derive(CONTEXT_FRAME),
            record: derive(CONTEXT_RECORD),
        }
    }

    pub fn uid(&self) -> CustomerUid {
        self.uid
    }

    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// The id of a piece: the only thing that opens it.
    pub fn id(&self, kind: PieceKind, plain: &[u8]) -> Id {
        let key = match kind {
            PieceKind::Chunk => &self.chunk_id,
            PieceKind::Node { height } => self
                .node_id
                .get(usize::from(height).wrapping_sub(1))
                .expect("PieceKind holds heights 1 to 6"),
        };
        Id::from_secret_bytes(*blake3::keyed_hash(key, plain).as_bytes())
    }

    pub fn tag(&self, id: &Id) -> Tag {
        let hash = blake3::keyed_hash(&self.tag, id.secret_bytes());
        let mut tag = [0; 16];
        tag.copy_from_slice(hash.as_bytes().first_chunk::<16>().expect("32 ≥ 16"));
        Tag::from_bytes(tag)
    }

    pub(super) fn frame_key(&self, id: &Id) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(*blake3::keyed_hash(&self.frame, id.secret_bytes()).as_bytes())
    }

    pub(super) fn record_key(&self, point: &PointId) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(*blake3::keyed_hash(&self.record, point.as_bytes()).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_bytes_of_different_kinds_have_different_ids() {
        let keys = Keys::derive(&CustomerKey::generate(CustomerUid::from_bytes([1; 16])));
        let plain = [0x55; 64];
        let mut tags: Vec<Tag> = (0..=6)
            .filter_map(PieceKind::from_code)
            .map(|kind| keys.tag(&keys.id(kind, &plain)))
            .collect();
        tags.sort();
        tags.dedup();
        assert_eq!(tags.len(), 7);
    }

    #[test]
    fn a_key_file_comes_back_and_a_changed_one_does_not() {
        let key = CustomerKey::generate(CustomerUid::from_bytes([1; 16]));
        let file = key.to_key_file();
        let again = CustomerKey::from_key_file(&file).ok().unwrap();
        assert!(again.secret == key.secret && again.uid() == key.uid());
        assert!(CustomerKey::from_key_file(&file[1..]).is_err());
        for length in 0..file.len() {
            assert!(CustomerKey::from_key_file(&file[..length]).is_err());
        }
        let text = std::str::from_utf8(&file).unwrap();
        for other in [
            text.replace('\n', "\r\n"),
            text.replace("generation 1", "generation 01"),
            text.replace("generation 1", "generation +1"),
            text.replace("generation 1", "generation 0"),
            format!("{text}\n"),
            format!("{text}more\n"),
        ] {
            assert!(CustomerKey::from_key_file(other.as_bytes()).is_err());
        }
    }
}
