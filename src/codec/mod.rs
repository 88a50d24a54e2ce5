//! Floor 1: keys, sealing and opening, node and record plaintexts, key files, signatures.
//!
//! Nothing outside of this folder sees a key. What is absent: files, stores, clocks, byte offsets
//! of packs and segments (those are `format`'s); the layouts of nodes and of point records stand
//! here all the same, because they carry ids and ids are named only by `codec` and `repository`.

pub mod age;
mod frame;
#[cfg(any(test, fuzzing))]
pub mod hostile_bytes;
mod identity;
mod keys;
pub mod minisign;
mod node;
mod record;
mod seal;
#[cfg(test)]
pub mod seeded;

pub use frame::{Opener, Sealed, Sealer};
pub use identity::{HostIdentity, IdentityError, verify_signature};
pub use keys::{CustomerKey, KeyFileError, Keys};
pub use node::{decode_node, encode_node};
pub use record::{
    DiskRecord, MAX_RECORD_BYTES, PointRecord, RecordDefinition, open_record, seal_record,
};
pub use seal::random_bytes;

/// Why a sealed piece does not open. None of them says what the content was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CodecError {
    /// The key does not fit or the bytes were changed.
    NotAuthentic,
    /// It opened, but its content is not what its name says.
    WrongContent(&'static str),
    /// It opened and is not of the layout of this version.
    Malformed(String),
}

impl std::fmt::Display for CodecError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CodecError::NotAuthentic => f.write_str("does not open: changed, or another key"),
            CodecError::WrongContent(what) => write!(f, "opens to other content: {what}"),
            CodecError::Malformed(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for CodecError {}
