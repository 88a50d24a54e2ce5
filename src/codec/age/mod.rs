//! Key files in the age format, version 1 (<https://age-encryption.org/v1>), for X25519 keys.
//!
//! Why not the `age` crate: it brings some 150 crates, one of them a pre-release, for recipient
//! types, plugins, passphrases and streams that a key file never uses. What is needed is one
//! recipient type and one small payload, over primitives that are here anyway. The public `age`
//! opens what this writes and the other way round; `tests/public_tools.rs` holds both.
//!
//! Limits, all checked before anything is opened: a plaintext of at most 64 KiB (one payload
//! chunk; longer files are valid age files, but no key files), a header of at most 64 KiB, at most
//! 64 stanzas. Stanzas of other types are skipped: somebody may have added a hardware key.
//! ASCII armour is not read.

#![forbid(unsafe_code)]

pub(in crate::codec) mod base64;
mod file;
mod key;

pub use file::{AgeError, MAX_FILE_BYTES, MAX_PLAINTEXT_BYTES, MAX_STANZAS, decrypt, encrypt};
pub use key::{AgeIdentity, AgeRecipient, KeyTextError};
