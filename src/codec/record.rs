//! The point record: the only place where the roots of a restore point stand.

use super::seal::{open, seal};
use super::{CodecError, Keys};
use crate::format::wire::{Fields, FormatError, put_text};
use crate::model::{
    DiskName, Id, MAX_CHUNK_BYTES, MAX_DISK_BYTES, MIN_CHUNK_BYTES, PointId, PointKind, TreeShape,
    VmName,
};
use jiff::Timestamp;

const MAGIC: &[u8; 8] = b"VMKPOIN1";
/// magic 8, key generation u32; nonce, ciphertext and GCM tag follow.
const HEADER_BYTES: usize = 12;
/// No reader accepts a larger record. It bounds every field too: a record that was accepted when
/// it was written is accepted when it is read.
pub const MAX_RECORD_BYTES: u64 = 16 << 20;
const MAX_TEXT_BYTES: usize = MAX_RECORD_BYTES as usize;

/// One disk of a restore point. No `Debug`: it holds a root.
#[derive(Clone, PartialEq, Eq)]
pub struct DiskRecord {
    pub name: DiskName,
    pub shape: TreeShape,
    /// `None`: the whole disk is a hole.
    pub root: Option<Id>,
    /// What the source wants to see again at the next capture.
    pub mark: Option<String>,
}

/// The VM's own definition, kept as the hypervisor gave it.
#[derive(Clone, PartialEq, Eq)]
pub struct RecordDefinition {
    pub file_name: String,
    pub content: Vec<u8>,
}

/// The plaintext of a point record.
#[derive(Clone, PartialEq, Eq)]
pub struct PointRecord {
    pub vm: VmName,
    pub kind: PointKind,
    pub taken_at: Timestamp,
    pub disks: Vec<DiskRecord>,
    pub definition: Option<RecordDefinition>,
}

impl PointRecord {
    /// VM name text, kind u8, time i64, disks u16; per disk: name text, size u64, chunk size u32,
    /// root 32, mark text; definition flag u8, then its file name text, length u32, content.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_text(&mut out, self.vm.as_str());
        out.push(match self.kind {
            PointKind::Full => 0,
            PointKind::Incremental => 1,
        });
        out.extend_from_slice(&self.taken_at.as_second().to_le_bytes());
        out.extend_from_slice(&(self.disks.len() as u16).to_le_bytes());
        for disk in &self.disks {
            put_text(&mut out, disk.name.as_str());
            out.extend_from_slice(&disk.shape.size_bytes.to_le_bytes());
            out.extend_from_slice(&disk.shape.chunk_bytes.to_le_bytes());
            out.extend_from_slice(
                disk.root
                    .as_ref()
                    .map_or(&[0; 32][..], |id| id.secret_bytes()),
            );
            put_text(&mut out, disk.mark.as_deref().unwrap_or(""));
        }
        match &self.definition {
            None => out.push(0),
            Some(definition) => {
                out.push(1);
                put_text(&mut out, &definition.file_name);
                out.extend_from_slice(&(definition.content.len() as u32).to_le_bytes());
                out.extend_from_slice(&definition.content);
            }
        }
        out
    }

    pub(super) fn decode(plain: &[u8]) -> Result<Self, FormatError> {
        let mut fields = Fields::new(plain);
        let name_error = |error: crate::model::NameError| FormatError::new(error.to_string());
        let vm = VmName::new(fields.text(MAX_TEXT_BYTES, "VM name")?).map_err(name_error)?;
        let kind = match fields.u8("point kind")? {
            0 => PointKind::Full,
            1 => PointKind::Incremental,
            _ => return Err(FormatError::new("unknown point kind")),
        };
        let taken_at = Timestamp::from_second(fields.i64("time")?)
            .map_err(|_| FormatError::new("time out of range"))?;
        let disk_count = fields.u16("disk count")?;
        let mut disks = Vec::new();
        let mut names = std::collections::BTreeSet::new();
        for _ in 0..disk_count {
            let name =
                DiskName::new(fields.text(MAX_TEXT_BYTES, "disk name")?).map_err(name_error)?;
            if !names.insert(name.clone()) {
                return Err(FormatError::new("two disks of one name"));
            }
            let size_bytes = fields.u64("disk size")?;
            let chunk_bytes = fields.u32("chunk size")?;
            if size_bytes == 0
                || size_bytes > MAX_DISK_BYTES
                || !(MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(&chunk_bytes)
                || !chunk_bytes.is_power_of_two()
            {
                return Err(FormatError::new("impossible disk or chunk size"));
            }
            let root: [u8; 32] = fields.array("root")?;
            let mark = fields.text(MAX_TEXT_BYTES, "mark")?;
            disks.push(DiskRecord {
                name,
                shape: TreeShape {
                    size_bytes,
                    chunk_bytes,
                },
                root: (root != [0; 32]).then(|| Id::from_secret_bytes(root)),
                mark: (!mark.is_empty()).then(|| mark.to_string()),
            });
        }
        let definition = match fields.u8("definition flag")? {
            0 => None,
            1 => {
                let file_name = fields.text(MAX_TEXT_BYTES, "definition name")?.to_string();
                let length = fields.u32("definition length")? as usize;
                let content = fields.bytes(length, "definition")?.to_vec();
                Some(RecordDefinition { file_name, content })
            }
            _ => return Err(FormatError::new("unknown definition flag")),
        };
        fields.end("point record")?;
        Ok(PointRecord {
            vm,
            kind,
            taken_at,
            disks,
            definition,
        })
    }
}

fn associated_data(keys: &Keys, point: &PointId, header: &[u8; HEADER_BYTES]) -> Vec<u8> {
    [
        header.as_slice(),
        keys.uid().as_bytes().as_slice(),
        point.as_bytes().as_slice(),
    ]
    .concat()
}

fn header(generation: u32) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8..].copy_from_slice(&generation.to_le_bytes());
    header
}

/// The stored form of a point record.
pub fn seal_record(keys: &Keys, point: &PointId, record: &PointRecord) -> Vec<u8> {
    let header = header(keys.generation());
    let mut out = header.to_vec();
    let aad = associated_data(keys, point, &header);
    seal(
        &keys.record_key(point),
        &aad,
        &mut record.encode(),
        &mut out,
    );
    out
}

/// Opens the record of `point`.
pub fn open_record(keys: &Keys, point: &PointId, stored: &[u8]) -> Result<PointRecord, CodecError> {
    let mut fields = Fields::new(stored);
    fields
        .magic(MAGIC, "point record")
        .and_then(|()| fields.u32("key generation"))
        .map_err(|error| CodecError::Malformed(error.to_string()))
        .and_then(|generation| match generation == keys.generation() {
            true => Ok(()),
            false => Err(CodecError::Malformed(format!(
                "is sealed under key generation {generation}, this is {}",
                keys.generation()
            ))),
        })?;
    let aad = associated_data(keys, point, &header(keys.generation()));
    let mut scratch = Vec::new();
    let plain = open(
        &keys.record_key(point),
        &aad,
        stored.get(HEADER_BYTES..).unwrap_or_default(),
        &mut scratch,
    )?;
    PointRecord::decode(plain).map_err(|error| CodecError::Malformed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::super::CustomerKey;
    use super::*;
    use crate::model::CustomerUid;

    #[test]
    fn a_record_opens_only_under_its_own_point_id() {
        let keys = Keys::derive(&CustomerKey::from_parts(
            CustomerUid::from_bytes([1; 16]),
            1,
            [1; 32],
        ));
        let record = PointRecord {
            vm: VmName::new("web01").unwrap(),
            kind: PointKind::Incremental,
            taken_at: "2026-11-21T23:00:00Z".parse().unwrap(),
            disks: vec![DiskRecord {
                name: DiskName::new("vda").unwrap(),
                shape: TreeShape {
                    size_bytes: 100_000,
                    chunk_bytes: 65536,
                },
                root: Some(Id::from_secret_bytes([3; 32])),
                mark: Some("{}".to_string()),
            }],
            definition: None,
        };
        let point = PointId::from_bytes([4; 16]);
        let stored = seal_record(&keys, &point, &record);
        assert!(open_record(&keys, &point, &stored) == Ok(record));
        assert!(open_record(&keys, &PointId::from_bytes([5; 16]), &stored).is_err());
        for at in 0..stored.len() {
            let mut bad = stored.clone();
            bad[at] ^= 1;
            assert!(open_record(&keys, &point, &bad).is_err(), "byte {at}");
            assert!(open_record(&keys, &point, &stored[..at]).is_err());
        }
    }
}
