use std::fmt;

/// The secret identity of a chunk or node: knowing it is being able to read it.
///
/// Deliberately without `Debug`, `Display` and serde, and named only by `codec` and `repository`
/// (a test holds this): an id in a log, a cache or a core dump would outlive its erasure.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Id([u8; 32]);

impl Id {
    pub const fn from_secret_bytes(bytes: [u8; 32]) -> Self {
        Id(bytes)
    }

    pub const fn secret_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// A hexadecimal name that is not one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HexError {
    pub what: &'static str,
    pub expected_digits: usize,
}

impl fmt::Display for HexError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "not a {}: {} lower-case hexadecimal digits expected",
            self.what, self.expected_digits
        )
    }
}

impl std::error::Error for HexError {}

fn parse_hex<const N: usize>(what: &'static str, text: &str) -> Result<[u8; N], HexError> {
    let error = HexError {
        what,
        expected_digits: 2 * N,
    };
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return Err(error);
    }
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        match pair {
            [high, low] => match (value(*high), value(*low)) {
                (Some(high), Some(low)) => *byte = high << 4 | low,
                _ => return Err(error),
            },
            _ => return Err(error),
        }
    }
    Ok(bytes)
}

/// Writes bytes as hexadecimal digits; ids are written by the hundred thousand (names, checkpoints), so
/// that all of one goes to the formatter at once.
fn write_hex(bytes: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    const DIGITS: [u8; 16] = *b"0123456789abcdef";
    let digit = |number: u8| DIGITS[usize::from(number & 15)];
    let mut text = [0; 64];
    bytes.chunks(text.len() / 2).try_for_each(|part| {
        for (pair, byte) in text.chunks_exact_mut(2).zip(part) {
            pair.copy_from_slice(&[digit(byte >> 4), digit(*byte)]);
        }
        let written = text.get(..2 * part.len()).unwrap_or_default();
        f.write_str(std::str::from_utf8(written).map_err(|_| fmt::Error)?)
    })
}

macro_rules! public_id {
    ($(#[$doc:meta])* $name:ident, $bytes:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; $bytes]);

        impl $name {
            pub const BYTES: usize = $bytes;

            pub const fn from_bytes(bytes: [u8; $bytes]) -> Self {
                $name(bytes)
            }

            pub const fn as_bytes(&self) -> &[u8; $bytes] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write_hex(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{self}")
            }
        }

        impl std::str::FromStr for $name {
            type Err = HexError;

            fn from_str(text: &str) -> Result<Self, HexError> {
                parse_hex($what, text).map($name)
            }
        }
    };
}

public_id!(
    /// The lookup name of a chunk or node in packs and index; reveals nothing without the tag key.
    Tag, 16, "tag"
);

impl Tag {
    pub const FIRST: Tag = Tag([0; 16]);
    pub const LAST: Tag = Tag([0xff; 16]);
}

public_id!(
    /// One writer's run: the folder of its packs and segments.
    SessionId, 16, "session id"
);
public_id!(
    /// A restore point; random, never derived from content.
    PointId, 16, "point id"
);
public_id!(
    /// A customer, fixed at creation; the name may change.
    CustomerUid, 16, "customer uid"
);
public_id!(RepositoryId, 16, "repository id");
public_id!(
    /// A host's Ed25519 public key.
    HostId, 32, "host id"
);
public_id!(
    /// One state folder of a host; a copy of the host's identity elsewhere has another.
    InstallationId, 16, "installation id"
);
public_id!(
    /// BLAKE3 of a whole stored object.
    ObjectHash, 32, "object hash"
);
public_id!(
    /// BLAKE3 of a whole ledger entry: the link of the chain.
    EntryHash, 32, "entry hash"
);

/// A pack: the session that wrote it and the hash of its bytes. Never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackName {
    pub session: SessionId,
    pub hash: ObjectHash,
}

/// An index segment: the session that wrote it and the hash of its bytes. Never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    pub session: SessionId,
    pub hash: ObjectHash,
}

macro_rules! session_object {
    ($name:ident, $what:literal) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}/{}", self.session, self.hash)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{self}")
            }
        }

        impl std::str::FromStr for $name {
            type Err = HexError;

            fn from_str(text: &str) -> Result<Self, HexError> {
                let (session, hash) = text.split_once('/').ok_or(HexError {
                    what: $what,
                    expected_digits: 96,
                })?;
                Ok($name {
                    session: session.parse()?,
                    hash: hash.parse()?,
                })
            }
        }
    };
}

session_object!(PackName, "pack name (session/hash)");
session_object!(SegmentName, "segment name (session/hash)");
