//! Fuzz targets of what an NBD server sends.

use super::handshake::negotiate;
use super::{BASE_ALLOCATION, NbdError, reply, wire};
use crate::model::{Extent, MAX_DISK_BYTES};
use std::io::{self, Read, Write};

/// A server that has said everything beforehand.
struct Said<'a>(&'a [u8]);

impl Read for Said<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Said<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn check<T>(result: Result<T, NbdError>) -> Option<T> {
    if let Err(error) = &result {
        let shown = error.to_string();
        assert!(
            !shown.chars().any(char::is_control) && shown.len() < 2000,
            "{shown:?}"
        );
    }
    result.ok()
}

pub fn nbd_handshake(bytes: &[u8]) {
    let wanted = [BASE_ALLOCATION, "qemu:dirty-bitmap:b"].map(String::from);
    if let Some(export) = check(negotiate(&mut Said(bytes), "vda", &wanted)) {
        assert!((1..=MAX_DISK_BYTES).contains(&export.size));
        assert!(export.size.is_multiple_of(u64::from(export.blocks.minimum)));
        let names: Vec<&str> = export.contexts.iter().map(|(name, _)| &**name).collect();
        assert_eq!(names, wanted);
        let [(_, first), (_, second)] = export.contexts.as_slice() else {
            panic!("two contexts");
        };
        assert_ne!(first, second);
    }
}

/// Answers to a read of 4096 bytes at 8192, whose cookie is 9; to a status of the same range in
/// context 5 (6 is another one); to a command; and payloads. Which, says the first byte.
pub fn nbd_replies(bytes: &[u8]) {
    let Some((which, bytes)) = bytes.split_first() else {
        return;
    };
    let requested = Extent::new(8192, 4096);
    match which % 5 {
        0 => {
            let read = |fill: u8| {
                let mut buffer = [fill; 4096];
                let result = reply::receive_data(&mut &*bytes, 9, requested.offset, &mut buffer);
                check(result).map(|()| buffer)
            };
            // No byte that the server did not send or call a hole.
            assert!(read(0x55) == read(0xaa));
        }
        1 => {
            let status = reply::receive_status(&mut &*bytes, 9, requested, &[5, 6], 5);
            let Some(extents) = check(status) else { return };
            let mut at = requested.offset;
            let mut flags = None;
            for status in extents {
                assert_eq!(status.extent.offset, at);
                assert!(status.extent.length > 0 && flags != Some(status.flags));
                (at, flags) = (status.extent.end(), Some(status.flags));
            }
            assert!(at > requested.offset && at <= requested.end());
        }
        2 => drop(check(reply::receive_done(&mut &*bytes, 9))),
        3 => drop(check(wire::error_chunk(bytes))),
        _ => {
            if let Some(blocks) = check(wire::block_sizes(wire::Fields::new(bytes))) {
                assert!(blocks.minimum.is_power_of_two() && blocks.maximum >= 512);
            }
        }
    }
}
