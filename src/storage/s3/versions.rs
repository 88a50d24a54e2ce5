//! What a bucket keeps beside its objects: older and newer versions, delete markers, unfinished
//! uploads.

use super::error::transient;
use super::requests::decoded;
use super::{Leftover, S3, StorageError, StorageErrorKind, object_of};
use crate::model::{ObjectName, Versioning};
use aws_sdk_s3::types::EncodingType;

/// One version of a key, or a delete marker.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Version {
    key: String,
    id: String,
    size_bytes: u64,
    is_marker: bool,
}

/// An upload in parts that was begun and not completed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Unfinished {
    key: String,
    id: String,
}

impl S3 {
    pub(super) async fn delete_all_versions(&self, name: &ObjectName) -> Result<(), StorageError> {
        let key = self.key(name.as_str());
        // Other keys begin like this one: they are listed with it and left alone.
        for version in self.versions_of(&key).await? {
            if version.key == key {
                self.delete_version(&version).await?;
            }
        }
        Ok(())
    }

    async fn delete_version(&self, version: &Version) -> Result<(), StorageError> {
        let place = format!("{} (version {})", version.key, version.id);
        let deleted = self
            .repeated(&place, async || {
                let delete = self.client.delete_object().bucket(&self.settings.bucket);
                let delete = delete.key(&version.key).version_id(&version.id);
                self.answer(&place, 0, delete.send()).await
            })
            .await;
        match deleted {
            Ok(_) => Ok(()),
            Err(error) if error.kind == StorageErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn abort(&self, upload: &Unfinished) -> Result<(), StorageError> {
        let place = format!("{} (unfinished upload)", upload.key);
        let aborted = self
            .repeated(&place, async || {
                let abort = self.client.abort_multipart_upload();
                let abort = abort.bucket(&self.settings.bucket).key(&upload.key);
                self.answer(&place, 0, abort.upload_id(&upload.id).send())
                    .await
            })
            .await;
        match aborted {
            Ok(_) => Ok(()),
            // Completed or aborted meanwhile.
            Err(error) if error.kind == StorageErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn sweep_below(&self, prefix: &str) -> Result<Vec<Leftover>, StorageError> {
        let key_prefix = self.key_prefix(prefix);
        let mut swept = Vec::new();
        for upload in self.unfinished(&key_prefix).await? {
            if !self.own_uploads().contains(&upload.id) {
                self.abort(&upload).await?;
                swept.push(self.leftover_of_upload(&upload));
            }
        }
        if self.known.versioning != Versioning::Never {
            let versions = self.versions_of(&key_prefix).await?;
            for version in beside_the_originals(&versions) {
                if object_of(self.place(&version.key)).is_some() {
                    self.delete_version(version).await?;
                    swept.push(self.leftover_of_version(version));
                }
            }
        }
        Ok(swept)
    }

    pub(super) async fn leftovers_below(
        &self,
        prefix: &str,
    ) -> Result<Vec<Leftover>, StorageError> {
        let key_prefix = self.key_prefix(prefix);
        let mut leftovers: Vec<Leftover> = self
            .unfinished(&key_prefix)
            .await?
            .iter()
            .map(|upload| self.leftover_of_upload(upload))
            .collect();
        let keys = if self.known.versioning == Versioning::Never {
            self.keys_below(prefix).await?
        } else {
            let versions = self.versions_of(&key_prefix).await?;
            let beside = beside_the_originals(&versions);
            leftovers.extend(beside.iter().map(|one| self.leftover_of_version(one)));
            versions
                .iter()
                .filter(|version| !beside.contains(version))
                .map(|version| (version.key.clone(), version.size_bytes))
                .collect()
        };
        for (key, size_bytes) in keys {
            let place = self.place(&key);
            if object_of(place).is_none() {
                leftovers.push(Leftover {
                    place: place.escape_debug().to_string(),
                    size_bytes,
                });
            }
        }
        Ok(leftovers)
    }

    fn leftover_of_upload(&self, upload: &Unfinished) -> Leftover {
        let place = self.place(&upload.key).escape_debug();
        Leftover {
            place: format!("{place} (unfinished upload)"),
            // No listing tells.
            size_bytes: 0,
        }
    }

    fn leftover_of_version(&self, version: &Version) -> Leftover {
        let place = self.place(&version.key).escape_debug();
        let what = match version.is_marker {
            true => "delete marker",
            false => "version",
        };
        Leftover {
            place: format!("{place} ({what} {})", version.id.escape_debug()),
            size_bytes: version.size_bytes,
        }
    }

    /// All versions and markers of keys that begin so; of each key the newest first.
    async fn versions_of(&self, key_prefix: &str) -> Result<Vec<Version>, StorageError> {
        let mut versions = Vec::new();
        let mut from: (Option<String>, Option<String>) = (None, None);
        loop {
            let page = self
                .repeated(&key_prefix, async || {
                    let list = self.client.list_object_versions();
                    let list = list.bucket(&self.settings.bucket).prefix(key_prefix);
                    let list = list.encoding_type(EncodingType::Url);
                    let list = list.set_key_marker(from.0.clone());
                    let sent = list.set_version_id_marker(from.1.clone()).send();
                    self.answer(&key_prefix, 0, sent).await
                })
                .await?;
            let encoding = page.encoding_type();
            let data = page.versions().iter().map(|version| {
                let size = version.size().and_then(|size| u64::try_from(size).ok());
                (version.key(), version.version_id(), size, false)
            });
            let markers = page
                .delete_markers()
                .iter()
                .map(|marker| (marker.key(), marker.version_id(), Some(0), true));
            for (key, id, size_bytes, is_marker) in data.chain(markers) {
                let key = decoded(key.unwrap_or_default(), encoding);
                match (id, size_bytes) {
                    (Some(id), Some(size_bytes)) if key.starts_with(key_prefix) => {
                        versions.push(Version {
                            key,
                            id: id.to_string(),
                            size_bytes,
                            is_marker,
                        });
                    }
                    _ => return Err(transient(key_prefix, "a listing that makes no sense")),
                }
            }
            if page.is_truncated() != Some(true) {
                return Ok(versions);
            }
            let next = (
                page.next_key_marker().map(|key| decoded(key, encoding)),
                page.next_version_id_marker().map(str::to_string),
            );
            if next.0.is_none() || next == from {
                return Err(transient(key_prefix, "a listing that does not go on"));
            }
            from = next;
        }
    }

    async fn unfinished(&self, key_prefix: &str) -> Result<Vec<Unfinished>, StorageError> {
        let mut unfinished = Vec::new();
        let mut from: (Option<String>, Option<String>) = (None, None);
        loop {
            let page = self
                .repeated(&key_prefix, async || {
                    let list = self.client.list_multipart_uploads();
                    let list = list.bucket(&self.settings.bucket).prefix(key_prefix);
                    let list = list.encoding_type(EncodingType::Url);
                    let list = list.set_key_marker(from.0.clone());
                    let sent = list.set_upload_id_marker(from.1.clone()).send();
                    self.answer(&key_prefix, 0, sent).await
                })
                .await?;
            let encoding = page.encoding_type();
            for upload in page.uploads() {
                let key = decoded(upload.key().unwrap_or_default(), encoding);
                match upload.upload_id() {
                    Some(id) if key.starts_with(key_prefix) => unfinished.push(Unfinished {
                        key,
                        id: id.to_string(),
                    }),
                    _ => return Err(transient(key_prefix, "a listing that makes no sense")),
                }
            }
            if page.is_truncated() != Some(true) {
                return Ok(unfinished);
            }
            let next = (
                page.next_key_marker().map(|key| decoded(key, encoding)),
                page.next_upload_id_marker().map(str::to_string),
            );
            if next.0.is_none() || next == from {
                return Err(transient(key_prefix, "a listing that does not go on"));
            }
            from = next;
        }
    }
}

/// Everything but the oldest bytes of each key: names are used once, so these are the object. What
/// was put over them is a repeated upload of the same bytes, or somebody's attack.
fn beside_the_originals(versions: &[Version]) -> Vec<&Version> {
    let mut beside = Vec::new();
    let mut later: std::collections::BTreeMap<&str, &Version> = Default::default();
    for version in versions {
        match version.is_marker {
            true => beside.push(version),
            // Newest first: the one before is not the oldest.
            false => beside.extend(later.insert(&version.key, version)),
        }
    }
    beside
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(key: &str, id: &str, is_marker: bool) -> Version {
        Version {
            key: key.to_string(),
            id: id.to_string(),
            size_bytes: 1,
            is_marker,
        }
    }

    #[test]
    fn the_oldest_bytes_of_a_name_are_the_object_and_all_else_is_beside_it() {
        let versions = [
            version("a", "3", false),
            version("a", "1", false),
            version("b", "9", false),
            version("a", "4", true),
            version("c", "5", true),
        ];
        let ids: Vec<&str> = beside_the_originals(&versions)
            .iter()
            .map(|version| version.id.as_str())
            .collect();
        assert_eq!(ids, ["3", "4", "5"]);
    }
}
