//! The identity of a host: one secret in one age identity file, two keys.
//!
//! The X25519 secret opens key files that are sealed for this host. The Ed25519 key that signs is
//! derived from it, so there is one file to keep, and `age -d -i` opens key files with it.

#![forbid(unsafe_code)]

use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use zeroize::Zeroizing;

use super::age::{self, AgeError, AgeIdentity, AgeRecipient, KeyTextError};
use crate::model::HostId;

const SIGNING_CONTEXT: &str = "vmkeep v1 host signing seed";

/// Without `Debug`, `Display` and `Clone`. The age secret is wiped when dropped; `ring` does not
/// wipe the signing key, which is of no use for reading anything.
pub struct HostIdentity {
    age: AgeIdentity,
    signing: Ed25519KeyPair,
    host: HostId,
}

impl HostIdentity {
    pub fn generate() -> Result<Self, AgeError> {
        AgeIdentity::generate()?.try_into()
    }

    /// Any identity file of the age tools with exactly one X25519 identity. Comments mean nothing.
    pub fn from_file_text(text: &str) -> Result<Self, IdentityError> {
        let age = AgeIdentity::from_file_text(text).map_err(IdentityError::Text)?;
        age.try_into().map_err(IdentityError::Key)
    }

    /// An identity file for this program and the age tools. `created` is a time or another note
    /// for people.
    pub fn to_file_text(&self, created: &str) -> Zeroizing<String> {
        self.age.to_file_text(&[
            "vmkeep host identity. Keep it secret, and keep a copy away from this host:",
            "who has it can open the host's key files and sign in the host's name.",
            "With the public tools: age -d -i THIS_FILE KEY_FILE",
            &format!("created: {created}"),
            &format!("host id: {}", self.host),
        ])
    }

    pub fn host_id(&self) -> HostId {
        self.host
    }

    pub fn recipient(&self) -> AgeRecipient {
        self.age.recipient()
    }

    /// Opens a file that was sealed for this host.
    pub fn decrypt(&self, file: &[u8]) -> Result<Zeroizing<Vec<u8>>, AgeError> {
        age::decrypt(&self.age, file)
    }

    /// Signs with Ed25519. Every message must begin with a context of its kind: the same key signs
    /// in minisign's format, whose messages are a bare hash, and a bare signature with a comment.
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        let mut signature = [0; 64];
        for (byte, value) in signature
            .iter_mut()
            .zip(self.signing.sign(message).as_ref())
        {
            *byte = *value;
        }
        signature
    }
}

impl TryFrom<AgeIdentity> for HostIdentity {
    type Error = AgeError;

    fn try_from(age: AgeIdentity) -> Result<Self, AgeError> {
        let seed = Zeroizing::new(blake3::derive_key(SIGNING_CONTEXT, age.secret_bytes()));
        let signing =
            Ed25519KeyPair::from_seed_unchecked(seed.as_slice()).map_err(|_| AgeError::Refused)?;
        let public = signing.public_key().as_ref();
        let host = HostId::from_bytes(public.try_into().map_err(|_| AgeError::Refused)?);
        Ok(HostIdentity { age, signing, host })
    }
}

/// Whether `host` signed exactly this message.
pub fn verify_signature(host: &HostId, message: &[u8], signature: &[u8]) -> bool {
    #[cfg(test)]
    if remembered::knows(host, message, signature) {
        return true;
    }
    let verified = verify(host, message, signature);
    #[cfg(test)]
    if verified {
        remembered::note(host, message, signature);
    }
    verified
}

fn verify(host: &HostId, message: &[u8], signature: &[u8]) -> bool {
    UnparsedPublicKey::new(&ED25519, host.as_bytes())
        .verify(message, signature)
        .is_ok()
}

/// What a thread of a test has verified: a million random sequences read the same entries again and
/// again.
#[cfg(test)]
mod remembered {
    use crate::model::HostId;
    use std::cell::RefCell;
    use std::collections::HashSet;

    const MOST: usize = 100_000;

    thread_local! {
        static VERIFIED: RefCell<HashSet<[u8; 32]>> = RefCell::default();
    }

    fn digest(host: &HostId, message: &[u8], signature: &[u8]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(host.as_bytes());
        // All but the message have one length.
        hasher.update(blake3::hash(message).as_bytes());
        hasher.update(signature);
        *hasher.finalize().as_bytes()
    }

    pub fn knows(host: &HostId, message: &[u8], signature: &[u8]) -> bool {
        VERIFIED.with_borrow(|known| known.contains(&digest(host, message, signature)))
    }

    pub fn note(host: &HostId, message: &[u8], signature: &[u8]) {
        VERIFIED.with_borrow_mut(|known| {
            if known.len() >= MOST {
                known.clear();
            }
            known.insert(digest(host, message, signature));
        });
    }
}

/// Why an identity file gives no host identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdentityError {
    Text(KeyTextError),
    Key(AgeError),
}

impl std::fmt::Display for IdentityError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            IdentityError::Text(error) => write!(f, "not a host identity: {error}"),
            IdentityError::Key(error) => write!(f, "no key from the host identity: {error}"),
        }
    }
}

impl std::error::Error for IdentityError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            IdentityError::Text(error) => Some(error),
            IdentityError::Key(error) => Some(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str =
        "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX";

    #[test]
    fn the_keys_of_a_known_secret_never_change() {
        let identity = HostIdentity::from_file_text(SECRET).ok().unwrap();
        assert_eq!(
            identity.recipient().to_string(),
            "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj"
        );
        assert_eq!(
            identity.host_id().to_string(),
            "4acaddf07d3beced828deba7403652ff885263de16683e0397d2385ccd3a6b6a"
        );
    }

    #[test]
    fn an_identity_survives_being_written_and_read() {
        let identity = HostIdentity::generate().ok().unwrap();
        let text = identity.to_file_text("2026-01-01T00:00:00Z\nAGE-SECRET-KEY-1 injected");
        let again = HostIdentity::from_file_text(&text).ok().unwrap();
        assert_eq!(again.host_id(), identity.host_id());
        assert_eq!(again.recipient(), identity.recipient());
        assert_eq!(again.sign(b"message"), identity.sign(b"message"));
        assert!(text.contains(&format!("# host id: {}\n", identity.host_id())));
        assert!(text.contains(&format!("# public key: {}\n", identity.recipient())));
        assert_eq!(
            text.lines().filter(|line| !line.starts_with('#')).count(),
            1
        );
    }

    #[test]
    fn a_file_sealed_for_the_host_opens() {
        let identity = HostIdentity::generate().ok().unwrap();
        let file = age::encrypt(&[identity.recipient()], b"key").unwrap();
        assert_eq!(identity.decrypt(&file).ok().unwrap().as_slice(), b"key");
    }

    #[test]
    fn a_signature_holds_for_its_host_and_message_only() {
        let [one, two] = [(); 2].map(|()| HostIdentity::generate().ok().unwrap());
        let signature = one.sign(b"message");
        assert!(verify_signature(&one.host_id(), b"message", &signature));
        assert!(!verify_signature(&two.host_id(), b"message", &signature));
        assert!(!verify_signature(&one.host_id(), b"massage", &signature));
        assert!(!verify_signature(&one.host_id(), b"", &signature));
        assert!(!verify_signature(&one.host_id(), b"message", b""));
        assert!(!verify_signature(
            &one.host_id(),
            b"message",
            &signature[..63]
        ));
        let longer = [&signature[..], &[0]].concat();
        assert!(!verify_signature(&one.host_id(), b"message", &longer));
        for place in 0..signature.len() {
            let mut flipped = signature;
            flipped[place] ^= 1;
            assert!(!verify_signature(&one.host_id(), b"message", &flipped));
        }
    }

    #[test]
    fn a_text_without_an_identity_is_refused() {
        assert_eq!(
            HostIdentity::from_file_text("# nothing").err(),
            Some(IdentityError::Text(KeyTextError::NoIdentity))
        );
    }
}
