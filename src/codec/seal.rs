use super::CodecError;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};

pub const NONCE_BYTES: usize = 12;

/// Random bytes of the operating system.
pub fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    #[cfg(test)]
    if super::seeded::fill(&mut bytes) {
        return bytes;
    }
    SystemRandom::new()
        .fill(&mut bytes)
        .expect("the kernel's random generator answers on every supported system");
    bytes
}

fn cipher(key: &[u8; 32]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("AES-256 takes 32 bytes"))
}

/// Seals `plain` in place: the result is nonce, ciphertext, GCM tag.
pub fn seal(key: &[u8; 32], aad: &[u8], plain: &mut Vec<u8>, out: &mut Vec<u8>) {
    let nonce: [u8; NONCE_BYTES] = random_bytes();
    let tag = cipher(key)
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(aad),
            plain.as_mut_slice(),
        )
        .expect("a piece is far below the limit of GCM");
    out.extend_from_slice(&nonce);
    out.extend_from_slice(plain);
    out.extend_from_slice(tag.as_ref());
}

/// Opens what `seal` made; `scratch` is overwritten and holds the plaintext returned.
pub fn open<'a>(
    key: &[u8; 32],
    aad: &[u8],
    sealed: &[u8],
    scratch: &'a mut Vec<u8>,
) -> Result<&'a mut [u8], CodecError> {
    let (nonce, rest) = sealed
        .split_first_chunk::<NONCE_BYTES>()
        .ok_or(CodecError::NotAuthentic)?;
    scratch.clear();
    scratch.extend_from_slice(rest);
    cipher(key)
        .open_in_place(
            Nonce::assume_unique_for_key(*nonce),
            Aad::from(aad),
            scratch.as_mut_slice(),
        )
        .map_err(|_| CodecError::NotAuthentic)
}
