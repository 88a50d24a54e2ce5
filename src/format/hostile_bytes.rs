//! Fuzz targets of the layouts without keys: whatever lies in a store is refused, or says one thing
//! and can be written again.

use super::certificate::Certificate;
use super::entry::{Body, Entry};
use super::pack::{self, FrameHeader, PackBuilder};
use super::repository_file::RepositoryFile;
use super::segment::{Segment, build};
use super::wire::Fields;

/// As it is, and with the hashes put right that nobody could guess, so that what stands behind them
/// is reached.
pub fn pack(bytes: &[u8]) {
    let _ = pack::scrub(bytes);
    let mut bytes = bytes.to_vec();
    if pack::put_hashes_right(&mut bytes).is_none() {
        return;
    }
    let Ok((entries, damaged)) = pack::scrub(&bytes) else {
        return;
    };
    let header = pack::parse_header(&bytes).expect("scrub read it");
    let random = bytes[32..48].try_into().expect("16 bytes");
    let mut again = PackBuilder::new(header.kind, header.generation, &header.session, random, 0);
    for entry in &entries {
        let frame = pack::frame_bytes(&bytes, entry).expect("the directory fits the frames");
        let Ok(frame) = pack::parse_frame(frame) else {
            assert!(damaged.contains(&entry.tag));
            continue;
        };
        again.append(&frame.header, frame.sealed);
    }
    if damaged.is_empty() {
        assert!(again.finish().bytes == bytes, "another pack says the same");
    }
}

/// The header of a frame, and a frame.
pub fn frame(bytes: &[u8]) {
    let mut fields = Fields::new(bytes);
    if let Ok(header) = FrameHeader::parse(&mut fields) {
        assert!(header.plain_bytes as usize <= header.kind.max_plain_bytes());
        assert!(header.sealed_bytes as usize <= header.plain_bytes as usize + pack::SEAL_BYTES);
    }
    if let Ok(frame) = pack::parse_frame(bytes) {
        assert_eq!(frame.sealed.len(), frame.header.sealed_bytes as usize);
    }
}

pub fn segment(bytes: &[u8]) {
    let Ok(segment) = Segment::parse(bytes.to_vec()) else {
        return;
    };
    let records: Result<Vec<_>, _> = segment.records().collect();
    let mut records = records.expect("memory is read");
    for (at, record) in records.iter().enumerate() {
        let found = segment.find(&record.tag).expect("memory is read");
        assert!(found.contains(&(at, *record)), "a record is lost");
        assert_eq!(segment.record(at), Ok(*record));
    }
    let built = build(&segment.session(), &[0; 16], segment.packs(), &mut records);
    let again = Segment::parse(built).expect("what is built is read");
    assert_eq!(again.packs(), segment.packs());
    let same = (0..segment.len()).all(|at| again.record(at) == segment.record(at));
    assert!(again.len() == segment.len() && same);
}

/// Under a signature that always fits: only then is more than its line read.
pub fn entry(bytes: &[u8]) {
    let mut signature = [0; 64];
    let opened = Entry::open(bytes, |_, _, theirs| {
        signature = *theirs;
        true
    });
    let Ok(entry) = opened else { return };
    let _ = entry.body.document();
    assert!(Entry::open(bytes, |_, _, _| false).is_err());
    if matches!(entry.body, Body::Unknown { .. }) {
        return;
    }
    if let Ok(sealed) = entry.seal(|_| signature) {
        let again = Entry::open(&sealed, |_, _, _| true).expect("what is sealed is opened");
        assert_eq!(again, entry);
    }
}

pub fn repository_file(bytes: &[u8]) {
    let Ok(file) = RepositoryFile::parse(bytes) else {
        return;
    };
    let again = file.to_bytes().expect("what is read is written");
    assert_eq!(RepositoryFile::parse(&again), Ok(file));
}

pub fn certificate(bytes: &[u8]) {
    let Ok(certificate) = Certificate::parse(bytes) else {
        return;
    };
    let again = certificate.to_bytes().expect("what is read is written");
    assert_eq!(Certificate::parse(&again), Ok(certificate));
}
