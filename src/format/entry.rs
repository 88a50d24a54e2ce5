//! Ledger entries: one line of JSON and one line of signature. See the module documentation of
//! `format`.

use super::text;
use super::wire::FormatError;
use crate::model::{
    CustomerUid, DiskName, EntryHash, HostId, InstallationId, ObjectHash, PackName, PointId,
    PointKind, RepositoryId, SegmentName, SessionId, Tag, VmName, Writers,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Largest body that is written; a larger condemnation is several sessions.
pub const MAX_BODY_BYTES: usize = 1 << 20;
/// Largest entry that is read: body, envelope, signature.
pub const MAX_ENTRY_BYTES: u64 = (1 << 20) + (16 << 10);
const SIGNED_CONTEXT: &[u8] = b"vmkeep v1 ledger entry\n";
const VERSION: u32 = 1;

/// Who may do what; an entry of a kind its signer has no role for is void.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Backup,
    Restore,
    Prune,
    Admin,
}

/// What a host declares of its clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClockDeclaration {
    Verified,
    Trusted,
}

/// Whether two sources agreed on an entry's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Attestation {
    Witnessed,
    Alone,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostBody {
    #[serde(with = "text")]
    pub host: HostId,
    pub name: String,
    /// The host's age recipient, for keys that are wrapped for it.
    pub recipient: String,
    pub roles: Vec<Role>,
    pub clock: ClockDeclaration,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenesisBody {
    pub format: u32,
    #[serde(with = "text")]
    pub repository: RepositoryId,
    pub customer_name: String,
    pub host: HostBody,
    /// Left out where many may write.
    #[serde(with = "text", default, skip_serializing_if = "is_many")]
    pub writers: Writers,
}

fn is_many(writers: &Writers) -> bool {
    *writers == Writers::Many
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyBody {
    pub terms: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyBody {
    pub generation: u32,
    /// Number of the key object.
    pub object: u32,
    #[serde(with = "text")]
    pub hash: ObjectHash,
    pub recipients: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    Backup,
    Reclaim,
    Merge,
    /// Lists the store and writes a certificate; closed by the `reclaimed` entry that names it.
    Prove,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BeginBody {
    #[serde(with = "text")]
    pub session: SessionId,
    pub purpose: Purpose,
    #[serde(
        with = "text::option",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub vm: Option<VmName>,
    /// The point this session may commit; its record belongs to the session.
    #[serde(
        with = "text::option",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub point: Option<PointId>,
    #[serde(
        with = "text::time_option",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub expires_at: Option<Timestamp>,
    #[serde(
        with = "text::time_option",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub deadline: Option<Timestamp>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskBody {
    #[serde(with = "text")]
    pub name: DiskName,
    pub size_bytes: u64,
}

/// What a full found where it held what it read against what tracking said had not changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditBody {
    /// The VM's newest point, on which an incremental would have been built.
    #[serde(with = "text")]
    pub against: PointId,
    /// The disks that could be compared.
    pub disks: Vec<AuditedDisk>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditedDisk {
    #[serde(with = "text")]
    pub name: DiskName,
    /// To the chunk; 0: the audit of this disk is clean.
    pub differing_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommitBody {
    #[serde(with = "text")]
    pub session: SessionId,
    #[serde(with = "text")]
    pub vm: VmName,
    #[serde(with = "text")]
    pub point: PointId,
    /// BLAKE3 of the sealed point record.
    #[serde(with = "text")]
    pub record_hash: ObjectHash,
    #[serde(with = "kind_text")]
    pub point_kind: PointKind,
    #[serde(
        with = "text::option",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub base: Option<PointId>,
    #[serde(with = "text::time")]
    pub taken_at: Timestamp,
    #[serde(with = "text::time")]
    pub expires_at: Timestamp,
    #[serde(with = "text::time")]
    pub deadline: Timestamp,
    pub disks: Vec<DiskBody>,
    pub stored_bytes: u64,
    /// How many packs the session wrote, and BLAKE3 of their sorted names, a line each.
    pub pack_count: u32,
    #[serde(with = "text")]
    pub packs_hash: ObjectHash,
    #[serde(with = "text::list")]
    pub segments: Vec<SegmentName>,
    /// What the capture guarantees ("image": a stopped disk image that did not change).
    pub consistency: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Of a full, where at least one disk could be compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<AuditBody>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AbortBody {
    #[serde(with = "text")]
    pub session: SessionId,
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointReason {
    #[serde(with = "text")]
    pub point: PointId,
    pub reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PointsBody {
    pub points: Vec<PointReason>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergeBody {
    #[serde(with = "text")]
    pub session: SessionId,
    #[serde(with = "text::list")]
    pub segments: Vec<SegmentName>,
    #[serde(with = "text::list")]
    pub replaced: Vec<SegmentName>,
    /// Deleted packs that no current segment lists any more.
    #[serde(with = "text::list")]
    pub dropped: Vec<PackName>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CondemnBody {
    #[serde(with = "text")]
    pub session: SessionId,
    #[serde(with = "text::list")]
    pub packs: Vec<PackName>,
    /// Segments of the survivors; their pack tables are the session's packs.
    #[serde(with = "text::list")]
    pub segments: Vec<SegmentName>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackMark {
    #[serde(with = "text")]
    pub pack: PackName,
    pub dead_bytes: u64,
    #[serde(with = "text::time")]
    pub earliest_deadline: Timestamp,
    /// The `erase` entries whose points may have left these bytes.
    pub erases: Vec<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateRef {
    pub id: String,
    #[serde(with = "text")]
    pub hash: ObjectHash,
    #[serde(with = "text")]
    pub signature_hash: ObjectHash,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReclaimedBody {
    /// The `prove` session that wrote the certificate; this entry closes it.
    #[serde(
        with = "text::option",
        default,
        skip_serializing_if = "Option::is_none"
    )]
    pub session: Option<SessionId>,
    /// The mark saw the ledger up to this entry.
    pub marked_at: u64,
    #[serde(with = "text::list")]
    pub deleted: Vec<PackName>,
    /// Packs that hold dead bytes; a row without dead bytes takes an earlier one back.
    pub marks: Vec<PackMark>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<CertificateRef>,
    /// Erased points of which no byte is left.
    #[serde(with = "text::list", default)]
    pub destroyed: Vec<PointId>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreBody {
    #[serde(with = "text")]
    pub point: PointId,
    #[serde(with = "text")]
    pub vm: VmName,
    #[serde(with = "text::list")]
    pub disks: Vec<DiskName>,
    pub reason: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VerifyMethod {
    /// Every frame's checksum, without a key.
    Checksum,
    /// Every frame of a live point opened with the key and its id computed again.
    Opened,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DamagedFrame {
    #[serde(with = "text")]
    pub pack: PackName,
    #[serde(with = "text")]
    pub tag: Tag,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifyBody {
    pub method: VerifyMethod,
    #[serde(with = "text::list")]
    pub packs: Vec<PackName>,
    pub damaged: Vec<DamagedFrame>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClockEvent {
    /// Deletion was refused.
    Refused,
    /// An operator vouched for the time (`--trust-clock`).
    Trusted,
    /// An admin declares the time of the entry `seq` wrong.
    Void,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockBody {
    pub event: ClockEvent,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
    pub text: String,
}

/// Where one host writes: what was under way before this entry may land beside it, and does not count
/// once another entry follows this one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SealBody {
    #[serde(with = "text")]
    pub installation: InstallationId,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointBody {
    /// BLAKE3 of the canonical state after the entry before this one.
    #[serde(with = "text")]
    pub state_hash: ObjectHash,
}

/// What an entry says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    Genesis(GenesisBody),
    Host(HostBody),
    Policy(PolicyBody),
    Key(KeyBody),
    Begin(BeginBody),
    Commit(CommitBody),
    Abort(AbortBody),
    Expire(PointsBody),
    Undo(PointsBody),
    Erase(PointsBody),
    Merge(MergeBody),
    Condemn(CondemnBody),
    Reclaimed(ReclaimedBody),
    Restore(RestoreBody),
    Verify(VerifyBody),
    Clock(ClockBody),
    Seal(SealBody),
    Checkpoint(CheckpointBody),
    /// A kind or a mandatory field of a later version: this program may read, never write.
    Unknown {
        kind: String,
        why: String,
    },
}

impl Body {
    pub fn kind(&self) -> &str {
        match self {
            Body::Genesis(_) => "genesis",
            Body::Host(_) => "host",
            Body::Policy(_) => "policy",
            Body::Key(_) => "key",
            Body::Begin(_) => "begin",
            Body::Commit(_) => "commit",
            Body::Abort(_) => "abort",
            Body::Expire(_) => "expire",
            Body::Undo(_) => "undo",
            Body::Erase(_) => "erase",
            Body::Merge(_) => "merge",
            Body::Condemn(_) => "condemn",
            Body::Reclaimed(_) => "reclaimed",
            Body::Restore(_) => "restore",
            Body::Verify(_) => "verify",
            Body::Clock(_) => "clock",
            Body::Seal(_) => "seal",
            Body::Checkpoint(_) => "checkpoint",
            Body::Unknown { kind, .. } => kind,
        }
    }

    /// The body's fields, for people and programs that read evidence.
    pub fn document(&self) -> serde_json::Value {
        self.to_value().unwrap_or_default()
    }

    fn to_value(&self) -> serde_json::Result<serde_json::Value> {
        use serde_json::to_value;
        match self {
            Body::Genesis(body) => to_value(body),
            Body::Host(body) => to_value(body),
            Body::Policy(body) => to_value(body),
            Body::Key(body) => to_value(body),
            Body::Begin(body) => to_value(body),
            Body::Commit(body) => to_value(body),
            Body::Abort(body) => to_value(body),
            Body::Expire(body) | Body::Undo(body) | Body::Erase(body) => to_value(body),
            Body::Merge(body) => to_value(body),
            Body::Condemn(body) => to_value(body),
            Body::Reclaimed(body) => to_value(body),
            Body::Restore(body) => to_value(body),
            Body::Verify(body) => to_value(body),
            Body::Clock(body) => to_value(body),
            Body::Seal(body) => to_value(body),
            Body::Checkpoint(body) => to_value(body),
            Body::Unknown { .. } => Ok(serde_json::Value::Null),
        }
    }

    fn from_value(kind: &str, mut value: serde_json::Value) -> Self {
        fn from_value<T: serde::de::DeserializeOwned>(
            value: &serde_json::Value,
        ) -> serde_json::Result<T> {
            T::deserialize(value)
        }
        if let Some(fields) = value.as_object_mut() {
            // Fields that begin with "x-" are optional by agreement: an older reader skips them.
            fields.retain(|name, _| !name.starts_with("x-"));
        }
        let body = match kind {
            "genesis" => from_value(&value).map(Body::Genesis),
            "host" => from_value(&value).map(Body::Host),
            "policy" => from_value(&value).map(Body::Policy),
            "key" => from_value(&value).map(Body::Key),
            "begin" => from_value(&value).map(Body::Begin),
            "commit" => from_value(&value).map(Body::Commit),
            "abort" => from_value(&value).map(Body::Abort),
            "expire" => from_value(&value).map(Body::Expire),
            "undo" => from_value(&value).map(Body::Undo),
            "erase" => from_value(&value).map(Body::Erase),
            "merge" => from_value(&value).map(Body::Merge),
            "condemn" => from_value(&value).map(Body::Condemn),
            "reclaimed" => from_value(&value).map(Body::Reclaimed),
            "restore" => from_value(&value).map(Body::Restore),
            "verify" => from_value(&value).map(Body::Verify),
            "clock" => from_value(&value).map(Body::Clock),
            "seal" => from_value(&value).map(Body::Seal),
            "checkpoint" => from_value(&value).map(Body::Checkpoint),
            _ => {
                return Body::Unknown {
                    kind: kind.to_string(),
                    why: "the kind is not known to this version".to_string(),
                };
            }
        };
        let unknown = |why: String| Body::Unknown {
            kind: kind.to_string(),
            why,
        };
        match body.and_then(|body| Ok((body.to_value()?, body))) {
            Ok((again, body)) if again == value => body,
            // Such as a null, which this version never writes.
            Ok(_) => unknown("a field is not spelled as this version writes it".to_string()),
            Err(error) => unknown(error.to_string()),
        }
    }
}

/// A ledger entry without its signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub seq: u64,
    pub prev: EntryHash,
    pub customer: CustomerUid,
    pub time: Timestamp,
    pub attestation: Attestation,
    pub host: HostId,
    pub body: Body,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope {
    vmkeep: u32,
    seq: u64,
    #[serde(with = "text")]
    prev: EntryHash,
    #[serde(with = "text")]
    customer: CustomerUid,
    #[serde(with = "text::time")]
    time: Timestamp,
    clock: Attestation,
    #[serde(with = "text")]
    host: HostId,
    kind: String,
    body: serde_json::Value,
}

/// The bytes that are signed for a line.
fn signed_message(line: &[u8]) -> Vec<u8> {
    let mut message = SIGNED_CONTEXT.to_vec();
    message.extend_from_slice(line);
    message
}

impl Entry {
    /// The stored form; `sign` makes the Ed25519 signature of the message it is given.
    pub fn seal(&self, sign: impl FnOnce(&[u8]) -> [u8; 64]) -> Result<Vec<u8>, FormatError> {
        let malformed = |error: serde_json::Error| FormatError::new(error.to_string());
        let body = self.body.to_value().map_err(malformed)?;
        let envelope = Envelope {
            vmkeep: VERSION,
            seq: self.seq,
            prev: self.prev,
            customer: self.customer,
            time: self.time,
            clock: self.attestation,
            host: self.host,
            kind: self.body.kind().to_string(),
            body,
        };
        let mut bytes = serde_json::to_vec(&envelope).map_err(malformed)?;
        if bytes.len() > MAX_BODY_BYTES {
            return Err(FormatError::new(format!(
                "a {} entry of {} bytes is over the limit of 1 MiB",
                self.body.kind(),
                bytes.len()
            )));
        }
        let signature = sign(&signed_message(&bytes));
        bytes.push(b'\n');
        bytes.extend(
            signature
                .iter()
                .flat_map(|byte| format!("{byte:02x}").into_bytes()),
        );
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Takes the stored form apart. `verify` checks a signature of a message by a host.
    pub fn open(
        bytes: &[u8],
        verify: impl FnOnce(&HostId, &[u8], &[u8; 64]) -> bool,
    ) -> Result<Self, FormatError> {
        let mut lines = bytes.split(|byte| *byte == b'\n');
        let (Some(line), Some(signature), Some([]), None) =
            (lines.next(), lines.next(), lines.next(), lines.next())
        else {
            return Err(FormatError::new("is not two lines, entry and signature"));
        };
        // The version is looked at first: a later one may have an envelope we cannot read.
        #[derive(Deserialize)]
        struct Version {
            vmkeep: u32,
        }
        let version: Version = serde_json::from_slice(line)
            .map_err(|error| FormatError::new(format!("is not a ledger entry: {error}")))?;
        if version.vmkeep != VERSION {
            return Err(FormatError::new(format!(
                "has format version {}, this program knows {VERSION}",
                version.vmkeep
            )));
        }
        let envelope: Envelope = serde_json::from_slice(line)
            .map_err(|error| FormatError::new(format!("is not a ledger entry: {error}")))?;
        let signature = std::str::from_utf8(signature)
            .ok()
            .and_then(parse_signature)
            .ok_or_else(|| FormatError::new("signature line is not 128 hexadecimal digits"))?;
        if !verify(&envelope.host, &signed_message(line), &signature) {
            return Err(FormatError::new("signature does not match"));
        }
        // One spelling, so that no two readers see different entries in the same signed bytes: a
        // field that stands twice, a space, another order or another escape is refused.
        if serde_json::to_vec(&envelope).ok().as_deref() != Some(line) {
            return Err(FormatError::new("is not in the one spelling of an entry"));
        }
        Ok(Entry {
            seq: envelope.seq,
            prev: envelope.prev,
            customer: envelope.customer,
            time: envelope.time,
            attestation: envelope.clock,
            host: envelope.host,
            body: Body::from_value(&envelope.kind, envelope.body),
        })
    }
}

fn parse_signature(text: &str) -> Option<[u8; 64]> {
    // Two 32-byte halves reuse the one strict hexadecimal parser.
    let (high, low) = text.split_at_checked(64)?;
    let high: ObjectHash = high.parse().ok()?;
    let low: ObjectHash = low.parse().ok()?;
    let mut signature = [0; 64];
    signature[..32].copy_from_slice(high.as_bytes());
    signature[32..].copy_from_slice(low.as_bytes());
    Some(signature)
}

/// The link to this stored entry.
pub fn entry_hash(stored: &[u8]) -> EntryHash {
    EntryHash::from_bytes(*blake3::hash(stored).as_bytes())
}

/// Whether stored bytes begin as the entry `seq` does if `prev` is the hash of the one before it. What else they
/// hold is not looked at.
pub fn follows(stored: &[u8], seq: u64, prev: &EntryHash) -> bool {
    let begin = format!("{{\"vmkeep\":{VERSION},\"seq\":{seq},\"prev\":\"{prev}\",");
    stored.starts_with(begin.as_bytes())
}

/// BLAKE3 of the sorted pack names, each followed by a newline.
pub fn packs_hash(packs: impl IntoIterator<Item = PackName>) -> ObjectHash {
    let mut names: Vec<PackName> = packs.into_iter().collect();
    names.sort_unstable();
    let mut hasher = blake3::Hasher::new();
    for name in names {
        hasher.update(format!("{name}\n").as_bytes());
    }
    ObjectHash::from_bytes(*hasher.finalize().as_bytes())
}

mod kind_text {
    use crate::model::PointKind;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(kind: &PointKind, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(kind)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<PointKind, D::Error> {
        match String::deserialize(from)?.as_str() {
            "full" => Ok(PointKind::Full),
            "incremental" => Ok(PointKind::Incremental),
            other => Err(D::Error::custom(format!("unknown point kind {other:?}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Entry {
        Entry {
            seq: 7,
            prev: EntryHash::from_bytes([1; 32]),
            customer: CustomerUid::from_bytes([2; 16]),
            time: "2026-11-21T22:00:00Z".parse().unwrap(),
            attestation: Attestation::Witnessed,
            host: HostId::from_bytes([3; 32]),
            body: Body::Begin(BeginBody {
                session: SessionId::from_bytes([4; 16]),
                purpose: Purpose::Backup,
                vm: Some(VmName::new("web01").unwrap()),
                point: Some(PointId::from_bytes([5; 16])),
                expires_at: None,
                deadline: None,
            }),
        }
    }

    #[test]
    fn an_entry_comes_back_as_it_was_written() {
        let stored = sample().seal(|_| [9; 64]).unwrap();
        let opened = Entry::open(&stored, |_, _, signature| *signature == [9; 64]).unwrap();
        assert_eq!(opened, sample());
    }

    #[test]
    fn an_entry_follows_the_one_that_it_names_and_no_other() {
        let stored = sample().seal(|_| [9; 64]).unwrap();
        let prev = EntryHash::from_bytes([1; 32]);
        assert!(follows(&stored, 7, &prev));
        assert!(!follows(&stored, 8, &prev));
        assert!(!follows(&stored, 7, &EntryHash::from_bytes([2; 32])));
        assert!(!follows(&stored[..90], 7, &prev));
    }

    #[test]
    fn a_bad_signature_and_every_truncation_are_refused() {
        let stored = sample().seal(|_| [9; 64]).unwrap();
        assert!(Entry::open(&stored, |_, _, _| false).is_err());
        for length in 0..stored.len() {
            assert!(Entry::open(&stored[..length], |_, _, _| true).is_err());
        }
    }

    #[test]
    fn an_entry_has_one_spelling() {
        let stored = String::from_utf8(sample().seal(|_| [9; 64]).unwrap()).unwrap();
        let (line, signature) = stored.split_once('\n').unwrap();
        let refused = |from: &str, to: &str| {
            assert!(line.contains(from), "{from}");
            let other = format!("{}\n{signature}", line.replacen(from, to, 1));
            assert!(
                Entry::open(other.as_bytes(), |_, _, _| true).is_err(),
                "{other}"
            );
        };
        refused("\"seq\":7", "\"seq\": 7");
        refused("\"seq\":7", "\"seq\":7,\"seq\":7");
        refused("\"seq\":7", "\"seq\":7.0");
        refused("\"vm\":\"web01\"", "\"vm\":\"web02\",\"vm\":\"web01\"");
        refused("web01", "web\\u0030\\u0031");
        refused("\"kind\":\"begin\",", "");
        refused("22:00:00Z", "22:00:00.5Z");
        refused("22:00:00Z", "22:00:00+00:00");
        refused("\"vmkeep\":1", "\"vmkeep\":2");
        refused("\"vmkeep\":1", "\"vmkeep\":0");
        refused("{", " {");
        let mut unsorted: Vec<&str> = line.split("\"body\":").collect();
        let body = unsorted.pop().unwrap();
        let last = body.rfind(',').unwrap();
        let swapped = format!(
            "{{{},{}}}}}",
            &body[last + 1..body.len() - 2],
            &body[1..last]
        );
        refused(body, &swapped);
    }

    #[test]
    fn a_null_or_a_fraction_of_a_second_in_a_body_is_unknown() {
        let stored = String::from_utf8(sample().seal(|_| [9; 64]).unwrap()).unwrap();
        for (from, to) in [
            ("{\"point\"", "{\"deadline\":null,\"point\""),
            (
                "{\"point\"",
                "{\"deadline\":\"2026-11-21T22:00:00.5Z\",\"point\"",
            ),
        ] {
            let other = stored.replacen(from, to, 1);
            assert_ne!(other, stored);
            let body = Entry::open(other.as_bytes(), |_, _, _| true).unwrap().body;
            assert!(matches!(body, Body::Unknown { .. }), "{body:?}");
        }
    }

    #[test]
    fn a_fraction_of_a_second_is_not_written() {
        let mut entry = sample();
        entry.time = "2026-11-21T22:00:00.25Z".parse().unwrap();
        assert!(entry.seal(|_| [9; 64]).is_err());
    }

    #[test]
    fn the_audit_of_a_full_has_one_shape_and_is_left_out_where_there_was_none() {
        let mut entry = sample();
        let at = entry.time;
        let mut commit = CommitBody {
            session: SessionId::from_bytes([4; 16]),
            vm: VmName::new("web01").unwrap(),
            point: PointId::from_bytes([5; 16]),
            record_hash: ObjectHash::from_bytes([6; 32]),
            point_kind: PointKind::Full,
            base: None,
            taken_at: at,
            expires_at: at,
            deadline: at,
            disks: Vec::new(),
            stored_bytes: 0,
            pack_count: 0,
            packs_hash: packs_hash([]),
            segments: Vec::new(),
            consistency: "image".to_string(),
            notes: Vec::new(),
            audit: None,
        };
        let mut spelled = |commit: &CommitBody| {
            entry.body = Body::Commit(commit.clone());
            let stored = entry.seal(|_| [9; 64]).unwrap();
            let opened = Entry::open(&stored, |_, _, _| true).unwrap();
            assert_eq!(opened, entry);
            String::from_utf8(stored).unwrap()
        };
        assert!(!spelled(&commit).contains("audit"));
        commit.audit = Some(AuditBody {
            against: PointId::from_bytes([7; 16]),
            disks: vec![AuditedDisk {
                name: DiskName::new("vda").unwrap(),
                differing_bytes: 65536,
            }],
        });
        let stored = spelled(&commit);
        assert!(
            stored.contains(
                "\"audit\":{\"against\":\"07070707070707070707070707070707\",\
                 \"disks\":[{\"differing_bytes\":65536,\"name\":\"vda\"}]},"
            ),
            "{stored}"
        );
        for (from, to) in [
            ("\"differing_bytes\":65536,", ""),
            ("\"differing_bytes\":65536,", "\"differing_bytes\":-1,"),
            ("\"against\"", "\"a\":1,\"against\""),
        ] {
            let other = stored.replacen(from, to, 1);
            assert_ne!(other, stored);
            let body = Entry::open(other.as_bytes(), |_, _, _| true).unwrap().body;
            assert!(matches!(body, Body::Unknown { .. }), "{body:?}");
        }
    }

    #[test]
    fn what_a_later_version_added_is_unknown_unless_marked_optional() {
        let stored = String::from_utf8(sample().seal(|_| [9; 64]).unwrap()).unwrap();
        let read = |text: &str| Entry::open(text.as_bytes(), |_, _, _| true).unwrap().body;
        let optional = stored.replace("\"vm\":\"web01\"", "\"vm\":\"web01\",\"x-new\":1");
        assert_eq!(read(&optional), sample().body);
        let mandatory = stored.replace("\"point\"", "\"new\":1,\"point\"");
        assert!(matches!(read(&mandatory), Body::Unknown { .. }));
        let kind = stored.replace("\"kind\":\"begin\"", "\"kind\":\"grant\"");
        assert!(matches!(read(&kind), Body::Unknown { .. }));
    }
}
