//! `vmkeep.json`: what a repository is, without secrets.

use super::text;
use super::wire::FormatError;
use crate::model::{MAX_CHUNK_BYTES, MIN_CHUNK_BYTES, RepositoryId, Writers};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub const FORMAT_VERSION: u32 = 1;
/// The feature of a repository that one host writes.
const ONE_WRITER: &str = "one-writer";
pub const MAX_REPOSITORY_FILE_BYTES: u64 = 64 << 10;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryFile {
    pub format: u32,
    #[serde(with = "text")]
    pub repository: RepositoryId,
    pub created_at: Timestamp,
    /// Default chunk size of new disks.
    pub chunk_bytes: u32,
    /// Each is a mandatory ability of whoever reads or writes: `one-writer`.
    #[serde(default)]
    pub features: Vec<String>,
}

impl RepositoryFile {
    pub fn to_bytes(&self) -> Result<Vec<u8>, FormatError> {
        let mut bytes =
            serde_json::to_vec_pretty(self).map_err(|error| FormatError::new(error.to_string()))?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    pub fn features_of(writers: Writers) -> Vec<String> {
        match writers {
            Writers::Many => Vec::new(),
            Writers::One => vec![ONE_WRITER.to_string()],
        }
    }

    pub fn writers(&self) -> Writers {
        match self.features.iter().any(|one| one == ONE_WRITER) {
            true => Writers::One,
            false => Writers::Many,
        }
    }

    /// Refuses a later format version and unknown features by name.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let file: RepositoryFile = serde_json::from_slice(bytes)
            .map_err(|error| FormatError::new(format!("is not a repository file: {error}")))?;
        if file.format != FORMAT_VERSION {
            return Err(FormatError::new(format!(
                "repository format {} is not known to this version of vmkeep, which writes {FORMAT_VERSION}",
                file.format
            )));
        }
        if !file.chunk_bytes.is_power_of_two()
            || !(MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(&file.chunk_bytes)
        {
            return Err(FormatError::new(format!(
                "repository file with an impossible chunk size of {} bytes",
                file.chunk_bytes
            )));
        }
        match file.features.iter().find(|one| *one != ONE_WRITER) {
            Some(feature) => Err(FormatError::new(format!(
                "repository needs the feature {feature:?}, which this version of vmkeep lacks"
            ))),
            None => Ok(file),
        }
    }
}
