use super::seal::{open, seal};
use super::{CodecError, Keys};
use crate::model::{CustomerUid, Id, PieceKind, Tag};
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe;

/// What a frame's cipher vouches for besides its content: kind u8, flags u8, zero u16, plain length
/// u32, customer uid 16, tag 16.
pub(super) fn associated_data(
    kind: PieceKind,
    compressed: bool,
    plain_bytes: u32,
    uid: &CustomerUid,
    tag: &Tag,
) -> [u8; 40] {
    let mut aad = [0; 40];
    aad[0] = kind.code();
    aad[1] = u8::from(compressed);
    aad[4..8].copy_from_slice(&plain_bytes.to_le_bytes());
    aad[8..24].copy_from_slice(uid.as_bytes());
    aad[24..40].copy_from_slice(tag.as_bytes());
    aad
}

/// What became of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sealed {
    pub compressed: bool,
}

/// Compresses and seals pieces; one a thread.
pub struct Sealer {
    compressor: Compressor<'static>,
    scratch: Vec<u8>,
}

impl Sealer {
    /// `level`: zstd's. Fails only if the C library cannot allocate its context.
    pub fn new(level: i32) -> std::io::Result<Self> {
        Ok(Sealer {
            compressor: Compressor::new(level)?,
            scratch: Vec::new(),
        })
    }

    /// Appends the sealed piece (nonce, ciphertext, GCM tag) to `out`.
    pub fn seal(
        &mut self,
        keys: &Keys,
        kind: PieceKind,
        id: &Id,
        tag: &Tag,
        plain: &[u8],
        out: &mut Vec<u8>,
    ) -> Sealed {
        self.scratch.clear();
        // As capacity, which is written as it is: zeros for each piece would be one more write of all.
        self.scratch.reserve(zstd_safe::compress_bound(plain.len()));
        let compressed = match self.compressor.compress_to_buffer(plain, &mut self.scratch) {
            Ok(length) if length < plain.len() => true,
            // What does not shrink, or a compressor that fails, is stored as it is.
            _ => {
                self.scratch.clear();
                self.scratch.extend_from_slice(plain);
                false
            }
        };
        let aad = associated_data(kind, compressed, plain.len() as u32, &keys.uid(), tag);
        seal(&keys.frame_key(id), &aad, &mut self.scratch, out);
        Sealed { compressed }
    }
}

/// Opens pieces; one a thread.
pub struct Opener {
    decompressor: Decompressor<'static>,
    scratch: Vec<u8>,
}

impl Opener {
    pub fn new() -> std::io::Result<Self> {
        Ok(Opener {
            decompressor: Decompressor::new()?,
            scratch: Vec::new(),
        })
    }

    /// Opens a piece into `out` (replaced), whose length becomes exactly `plain_bytes`.
    ///
    /// The id is computed again from the plaintext: this commits to the key, finds a compressor's
    /// or memory's fault, and makes a frame under a wrong name worthless.
    #[expect(clippy::too_many_arguments)]
    pub fn open(
        &mut self,
        keys: &Keys,
        kind: PieceKind,
        id: &Id,
        tag: &Tag,
        compressed: bool,
        plain_bytes: u32,
        sealed: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), CodecError> {
        let length = plain_bytes as usize;
        if length == 0 || length > kind.max_plain_bytes() {
            return Err(CodecError::WrongContent("impossible length"));
        }
        let aad = associated_data(kind, compressed, plain_bytes, &keys.uid(), tag);
        let inner = open(&keys.frame_key(id), &aad, sealed, &mut self.scratch)?;
        if compressed {
            // Exactly one zstd frame that declares exactly this length, nothing after it.
            if zstd_safe::get_frame_content_size(inner).ok().flatten() != Some(length as u64)
                || zstd_safe::find_frame_compressed_size(inner) != Ok(inner.len())
            {
                return Err(CodecError::WrongContent("not one bounded zstd frame"));
            }
            // What stands in it is written over; zeros for each piece would be one more write of all.
            out.resize(length, 0);
            match self
                .decompressor
                .decompress_to_buffer(inner, out.as_mut_slice())
            {
                Ok(written) if written == length => {}
                _ => {
                    out.clear();
                    return Err(CodecError::WrongContent("does not decompress"));
                }
            }
        } else {
            if inner.len() != length {
                return Err(CodecError::WrongContent("length differs"));
            }
            out.clear();
            out.extend_from_slice(inner);
        }
        match keys.id(kind, out) == *id {
            true => Ok(()),
            false => {
                out.clear();
                Err(CodecError::WrongContent("id differs"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::CustomerKey;
    use super::*;

    fn keys(n: u8) -> Keys {
        Keys::derive(&CustomerKey::from_parts(
            CustomerUid::from_bytes([n; 16]),
            1,
            [n; 32],
        ))
    }

    fn incompressible(length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn a_piece_opens_only_with_its_key_kind_customer_and_tag() {
        let (keys, other) = (keys(1), keys(2));
        for plain in [vec![7u8; 65536], incompressible(65536), vec![1]] {
            let id = keys.id(PieceKind::Chunk, &plain);
            let tag = keys.tag(&id);
            let mut sealed = Vec::new();
            let how = Sealer::new(1).unwrap().seal(
                &keys,
                PieceKind::Chunk,
                &id,
                &tag,
                &plain,
                &mut sealed,
            );
            let mut opener = Opener::new().unwrap();
            let mut out = Vec::new();
            let length = plain.len() as u32;
            let mut open =
                |keys: &Keys, kind, id: &Id, tag: &Tag, compressed, length, sealed: &[u8]| {
                    opener.open(keys, kind, id, tag, compressed, length, sealed, &mut out)?;
                    Ok::<Vec<u8>, CodecError>(out.clone())
                };
            let chunk = PieceKind::Chunk;
            let good = open(&keys, chunk, &id, &tag, how.compressed, length, &sealed);
            assert_eq!(good, Ok(plain.clone()));
            assert!(open(&other, chunk, &id, &tag, how.compressed, length, &sealed).is_err());
            let node = PieceKind::Node { height: 1 };
            assert!(open(&keys, node, &id, &tag, how.compressed, length, &sealed).is_err());
            let wrong_tag = Tag::from_bytes([0; 16]);
            assert!(
                open(
                    &keys,
                    chunk,
                    &id,
                    &wrong_tag,
                    how.compressed,
                    length,
                    &sealed
                )
                .is_err()
            );
            assert!(open(&keys, chunk, &id, &tag, !how.compressed, length, &sealed).is_err());
            assert!(open(&keys, chunk, &id, &tag, how.compressed, length + 1, &sealed).is_err());
            let wrong_id = keys.id(PieceKind::Chunk, b"other");
            assert!(
                open(
                    &keys,
                    chunk,
                    &wrong_id,
                    &tag,
                    how.compressed,
                    length,
                    &sealed
                )
                .is_err()
            );
            for at in [0, 5, 12, sealed.len() / 2, sealed.len() - 1] {
                let mut bad = sealed.clone();
                bad[at] ^= 1;
                assert!(open(&keys, chunk, &id, &tag, how.compressed, length, &bad).is_err());
            }
        }
    }

    #[test]
    fn a_bomb_or_a_second_frame_is_refused_before_it_is_decompressed() {
        let keys = keys(1);
        let plain = vec![0x41u8; 4096];
        let id = keys.id(PieceKind::Chunk, &plain);
        let tag = keys.tag(&id);
        let zstd = |plain: &[u8]| zstd::bulk::compress(plain, 1).unwrap();
        let bomb = zstd(&vec![0x41; 64 << 20]);
        let doubled = [zstd(&plain), zstd(&plain)].concat();
        let skippable = [zstd(&plain), vec![0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 0]].concat();
        for inner in [bomb, doubled, skippable] {
            let aad = associated_data(PieceKind::Chunk, true, 4096, &keys.uid(), &tag);
            let mut sealed = Vec::new();
            seal(&keys.frame_key(&id), &aad, &mut inner.clone(), &mut sealed);
            let mut out = Vec::new();
            let result = Opener::new().unwrap().open(
                &keys,
                PieceKind::Chunk,
                &id,
                &tag,
                true,
                4096,
                &sealed,
                &mut out,
            );
            assert!(matches!(result, Err(CodecError::WrongContent(_))));
            assert!(out.capacity() <= 4096);
        }
    }
}
