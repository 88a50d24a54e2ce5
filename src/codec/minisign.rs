//! Signature files that the public `minisign -V` verifies, for people who trust no tool of ours.
//!
//! Four lines: an untrusted comment, the signature of the content's BLAKE2b-512 ("ED"), a trusted
//! comment, and a signature of both. Written and read in one spelling; only the untrusted comment
//! is free, as nothing protects it.

#![forbid(unsafe_code)]

use std::fmt;

use blake2::{Blake2b512, Digest};

use super::age::base64::{self, Padding};
use super::identity::{HostIdentity, verify_signature};
use crate::model::HostId;

const KEY_KIND: [u8; 2] = *b"Ed";
const HASHED_SIGNATURE_KIND: [u8; 2] = *b"ED";
const UNTRUSTED_PREFIX: &str = "untrusted comment: ";
const TRUSTED_PREFIX: &str = "trusted comment: ";
/// minisign reads comments into 1024 (untrusted) and 8192 bytes (trusted).
const MAX_COMMENT_BYTES: usize = 900;
/// Four lines, each of bounded length.
const MAX_SIGNATURE_FILE_BYTES: usize = 4096;

/// A comment that the host has signed along with the content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustedComment(String);

impl TrustedComment {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TrustedComment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MinisignError {
    /// Not a signature file as minisign writes it.
    Malformed(&'static str),
    /// Signed by another key.
    OtherKey,
    /// The content is not what was signed.
    Content,
    /// The content is what was signed, the trusted comment is not.
    Comment,
    /// Comments are one line of at most 900 printable ASCII characters, without spaces around.
    UnusableComment,
}

impl fmt::Display for MinisignError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MinisignError::Malformed(what) => write!(f, "malformed signature file: {what}"),
            MinisignError::OtherKey => f.write_str("the signature is of another key"),
            MinisignError::Content => f.write_str("the content is not what was signed"),
            MinisignError::Comment => f.write_str("the trusted comment is not what was signed"),
            MinisignError::UnusableComment => write!(
                f,
                "a trusted comment must be one line of at most {MAX_COMMENT_BYTES} printable ASCII characters without spaces around"
            ),
        }
    }
}

impl std::error::Error for MinisignError {}

/// The public key for `minisign -V -P`.
pub fn public_key_line(host: &HostId) -> String {
    let key = [&KEY_KIND[..], &key_id(host), host.as_bytes()].concat();
    base64::encode(&key, Padding::Equals)
}

/// The public key file for `minisign -V -p`.
pub fn public_key_file(host: &HostId) -> String {
    format!(
        "{UNTRUSTED_PREFIX}minisign public key {:016X}\n{}\n",
        u64::from_le_bytes(key_id(host)),
        public_key_line(host)
    )
}

/// The signature file of the content, by convention named like the content's file and `.minisig`.
pub fn sign(
    identity: &HostIdentity,
    content: &[u8],
    trusted_comment: &str,
) -> Result<String, MinisignError> {
    if !is_usable(trusted_comment) {
        return Err(MinisignError::UnusableComment);
    }
    let host = identity.host_id();
    let signature = identity.sign(&content_hash(content));
    let global = identity.sign(&[&signature[..], trusted_comment.as_bytes()].concat());
    let line = [&HASHED_SIGNATURE_KIND[..], &key_id(&host), &signature].concat();
    Ok(format!(
        "{UNTRUSTED_PREFIX}signature of vmkeep host {host}\n{}\n{TRUSTED_PREFIX}{trusted_comment}\n{}\n",
        base64::encode(&line, Padding::Equals),
        base64::encode(&global, Padding::Equals),
    ))
}

/// Whether `host` signed this content, and with which comment.
pub fn verify(
    host: &HostId,
    content: &[u8],
    signature_file: &str,
) -> Result<TrustedComment, MinisignError> {
    use MinisignError::Malformed;

    if signature_file.len() > MAX_SIGNATURE_FILE_BYTES {
        return Err(Malformed("it is too long"));
    }
    let lines: Vec<&str> = signature_file.split('\n').collect();
    let [untrusted, signature, trusted, global, ""] = lines.as_slice() else {
        return Err(Malformed("four lines expected"));
    };
    if !untrusted.starts_with(UNTRUSTED_PREFIX) {
        return Err(Malformed("the untrusted comment"));
    }
    let signature =
        base64::decode(signature.as_bytes(), Padding::Equals).ok_or(Malformed("the signature"))?;
    let (kind, signature) = signature
        .split_first_chunk::<2>()
        .ok_or(Malformed("the signature"))?;
    if *kind != HASHED_SIGNATURE_KIND {
        return Err(Malformed("a signature of another kind than hashed Ed25519"));
    }
    let (signed_with, signature) = signature
        .split_first_chunk::<8>()
        .ok_or(Malformed("the signature"))?;
    let signature: &[u8; 64] = signature
        .try_into()
        .map_err(|_| Malformed("the signature"))?;
    let comment = trusted
        .strip_prefix(TRUSTED_PREFIX)
        .filter(|comment| is_usable(comment))
        .ok_or(Malformed("the trusted comment"))?;
    let global = base64::decode(global.as_bytes(), Padding::Equals)
        .filter(|global| global.len() == 64)
        .ok_or(Malformed("the signature of the comment"))?;

    if *signed_with != key_id(host) {
        return Err(MinisignError::OtherKey);
    }
    if !verify_signature(host, &content_hash(content), signature) {
        return Err(MinisignError::Content);
    }
    if !verify_signature(
        host,
        &[&signature[..], comment.as_bytes()].concat(),
        &global,
    ) {
        return Err(MinisignError::Comment);
    }
    Ok(TrustedComment(comment.to_string()))
}

/// What a terminal shows as it is and every minisign reads back unchanged. May be empty.
fn is_usable(comment: &str) -> bool {
    comment.len() <= MAX_COMMENT_BYTES
        && comment
            .bytes()
            .all(|byte| byte == b' ' || byte.is_ascii_graphic())
        && comment.trim() == comment
}

fn content_hash(content: &[u8]) -> [u8; 64] {
    Blake2b512::digest(content).into()
}

/// minisign's keys have a random number; ours follows from the key.
fn key_id(host: &HostId) -> [u8; 8] {
    let mut id = [0; 8];
    for (byte, value) in id.iter_mut().zip(blake3::hash(host.as_bytes()).as_bytes()) {
        *byte = *value;
    }
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> HostIdentity {
        HostIdentity::generate().ok().unwrap()
    }

    #[test]
    fn what_is_signed_verifies_with_its_comment() {
        let identity = identity();
        for (content, comment) in [
            (&b""[..], ""),
            (b"content", "vmkeep proof of deletion, 2 points"),
            (&[0xff; 100_000], "~"),
        ] {
            let file = sign(&identity, content, comment).unwrap();
            let verified = verify(&identity.host_id(), content, &file).unwrap();
            assert_eq!(verified.as_str(), comment);
        }
    }

    #[test]
    fn other_content_and_another_host_are_told_apart() {
        let identity = identity();
        let file = sign(&identity, b"content", "comment").unwrap();
        assert_eq!(
            verify(&identity.host_id(), b"contend", &file),
            Err(MinisignError::Content)
        );
        assert_eq!(
            verify(&super::tests::identity().host_id(), b"content", &file),
            Err(MinisignError::OtherKey)
        );
        assert_eq!(
            verify(
                &identity.host_id(),
                b"content",
                &file.replace(": comment", ": commend")
            ),
            Err(MinisignError::Comment)
        );
    }

    #[test]
    fn every_change_after_the_untrusted_comment_is_noticed() {
        let identity = identity();
        let host = identity.host_id();
        let file = sign(&identity, b"content", "comment").unwrap();
        let protected = file.find('\n').unwrap();
        for place in protected..file.len() {
            for bit in 0..7 {
                let mut bytes = file.clone().into_bytes();
                bytes[place] ^= 1 << bit;
                let flipped = String::from_utf8(bytes).unwrap();
                assert!(verify(&host, b"content", &flipped).is_err(), "{flipped}");
            }
            for inserted in [' ', '\n', '\r', 'A', '='] {
                let mut longer = file.clone();
                longer.insert(place, inserted);
                // In front of the first line's end is still the free comment.
                if place > protected || inserted == '\n' {
                    assert!(verify(&host, b"content", &longer).is_err(), "{longer}");
                }
            }
        }
        for length in 0..file.len() {
            assert!(verify(&host, b"content", &file[..length]).is_err());
        }
        for more in ["\n", " ", "x", "\0"] {
            assert!(verify(&host, b"content", &format!("{file}{more}")).is_err());
        }
    }

    #[test]
    fn parts_of_two_signatures_do_not_make_a_third() {
        let identity = identity();
        let one = sign(&identity, b"one", "of one").unwrap();
        let two = sign(&identity, b"two", "of two").unwrap();
        let lines = |file: &str| -> Vec<String> { file.lines().map(str::to_string).collect() };
        let (one, two) = (lines(&one), lines(&two));
        let mixed = format!("{}\n{}\n{}\n{}\n", one[0], one[1], two[2], two[3]);
        assert_eq!(
            verify(&identity.host_id(), b"one", &mixed),
            Err(MinisignError::Comment)
        );
    }

    #[test]
    fn a_signature_of_the_bare_content_is_refused() {
        let identity = identity();
        let host = identity.host_id();
        let signature = identity.sign(b"content");
        let global = identity.sign(&signature);
        let line = [&b"Ed"[..], &key_id(&host), &signature].concat();
        let file = format!(
            "{UNTRUSTED_PREFIX}x\n{}\n{TRUSTED_PREFIX}\n{}\n",
            base64::encode(&line, Padding::Equals),
            base64::encode(&global, Padding::Equals)
        );
        assert!(matches!(
            verify(&host, b"content", &file),
            Err(MinisignError::Malformed(_))
        ));
    }

    #[test]
    fn a_comment_that_is_not_one_plain_line_is_not_signed() {
        let identity = identity();
        let long = "x".repeat(MAX_COMMENT_BYTES + 1);
        for comment in [
            "two\nlines",
            "\x1b[2J",
            "tab\t",
            " space",
            "space ",
            "ü",
            &long,
        ] {
            assert_eq!(
                sign(&identity, b"content", comment),
                Err(MinisignError::UnusableComment),
                "{comment:?}"
            );
        }
        assert!(sign(&identity, b"content", &"x".repeat(MAX_COMMENT_BYTES)).is_ok());
    }
}
