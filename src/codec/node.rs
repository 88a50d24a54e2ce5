use super::CodecError;
use crate::model::Id;

const ID_BYTES: usize = 32;
/// A hole: no id is all zero (that would be a preimage of BLAKE3).
const HOLE: [u8; ID_BYTES] = [0; ID_BYTES];

/// The plaintext of a node: its children's ids in order, zeros for holes. `None` if all are
/// holes: then the node itself is the hole.
pub fn encode_node(children: &[Option<Id>]) -> Option<Vec<u8>> {
    if children.iter().all(Option::is_none) {
        return None;
    }
    let mut plain = Vec::with_capacity(children.len() * ID_BYTES);
    for child in children {
        plain.extend_from_slice(child.as_ref().map_or(&HOLE[..], |id| id.secret_bytes()));
    }
    Some(plain)
}

/// The children of a node that must have `expected` of them.
pub fn decode_node(plain: &[u8], expected: usize) -> Result<Vec<Option<Id>>, CodecError> {
    if plain.len() != expected * ID_BYTES {
        return Err(CodecError::WrongContent(
            "node with a wrong number of children",
        ));
    }
    let children: Vec<Option<Id>> = plain
        .as_chunks::<ID_BYTES>()
        .0
        .iter()
        .map(|bytes| (*bytes != HOLE).then(|| Id::from_secret_bytes(*bytes)))
        .collect();
    // Equal disks have equal roots only if a node of holes is always the hole.
    match children.iter().any(Option::is_some) {
        true => Ok(children),
        false => Err(CodecError::WrongContent("node of nothing but holes")),
    }
}
