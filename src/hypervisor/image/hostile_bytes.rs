//! Fuzz target of the header of a qcow2 image. A raw image has none, and is never probed for one.

use super::header::Header;
use crate::model::MAX_DISK_BYTES;

pub fn qcow2_header(bytes: &[u8]) {
    if let Ok(header) = Header::parse(bytes)
        && let Ok(size) = header.standalone_size()
    {
        assert!((1..=MAX_DISK_BYTES).contains(&size));
    }
}
