//! Deletion certificates: what was destroyed, in words that outsiders can check.

use super::text;
use super::wire::FormatError;
use crate::model::{CustomerUid, EntryHash, HostId, PackName, PointId, RepositoryId};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub const MAX_CERTIFICATE_BYTES: u64 = 64 << 20;
/// The value of the field `vmkeep_deletion_certificate`.
pub const CERTIFICATE_VERSION: u32 = 1;

/// A restore point as a certificate names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertifiedPoint {
    #[serde(with = "text")]
    pub point: PointId,
    pub vm: String,
    pub taken_at: Timestamp,
    pub deadline: Timestamp,
    pub erase_entry: u64,
    /// The time of that entry; earlier versions did not tell it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub erased_at: Option<Timestamp>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    pub vmkeep_deletion_certificate: u32,
    pub id: String,
    #[serde(with = "text")]
    pub repository: RepositoryId,
    pub customer: String,
    #[serde(with = "text")]
    pub customer_uid: CustomerUid,
    /// After the stores were listed, and not before anything that is named here.
    pub issued_at: Timestamp,
    #[serde(with = "text")]
    pub issued_by: HostId,
    /// The stores that were listed; other copies are not covered.
    pub stores: Vec<String>,
    pub statement: String,
    /// Records destroyed since the last certificate: unreadable from then on.
    pub erased: Vec<CertifiedPoint>,
    /// Erased points of which no byte, not even as ciphertext, is left in the stores.
    pub destroyed: Vec<CertifiedPoint>,
    /// Packs removed since the last certificate.
    #[serde(with = "text::list")]
    pub packs_deleted: Vec<PackName>,
    /// Ciphertext without a key that is still there, and when the last of it must be gone; `None`: nothing
    /// is left, or some of it is locked by the store.
    pub unreadable_bytes_left: u64,
    pub unreadable_bytes_deadline: Option<Timestamp>,
    /// The ledger's end when the stores had been listed.
    pub ledger_seq: u64,
    #[serde(with = "text")]
    pub ledger_hash: EntryHash,
    pub objects_listed: u64,
}

impl Certificate {
    pub fn to_bytes(&self) -> Result<Vec<u8>, FormatError> {
        let mut bytes =
            serde_json::to_vec_pretty(self).map_err(|error| FormatError::new(error.to_string()))?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let certificate: Certificate = serde_json::from_slice(bytes)
            .map_err(|error| FormatError::new(format!("is not a certificate: {error}")))?;
        match certificate.vmkeep_deletion_certificate {
            CERTIFICATE_VERSION => Ok(certificate),
            other => Err(FormatError::new(format!(
                "is a certificate of version {other}, this program knows {CERTIFICATE_VERSION}"
            ))),
        }
    }
}
