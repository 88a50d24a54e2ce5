//! Creating an object: one conditional put, or parts.

use super::error::{taken, transient, unsupported};
use super::versions::{Extent, below};
use super::{S3, StorageError, StorageErrorKind};
use crate::model::{ObjectName, Versioning};
use aws_sdk_s3::primitives::{ByteStream, DateTime};
use aws_sdk_s3::types::{ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;
use jiff::Timestamp;

/// The server said that it created the object, and put it over another one (which is back).
const CONDITION_IGNORED: &str = "an existing object was overwritten: the condition is ignored";
/// Objects are compared in pieces of this size.
const COMPARED_BYTES: usize = 16 << 20;

impl S3 {
    /// The condition is asked with every attempt. An attempt whose outcome is unknown may have landed,
    /// so a later "exists" may be our own success: then, and only then, the bytes are compared.
    pub(super) async fn upload(&self, name: &ObjectName, data: &Bytes) -> Result<(), StorageError> {
        if !self.settings.may_delete {
            self.refuse_hidden(name).await?;
        }
        let locked_until = self.lock_of(name.as_str())?;
        self.refuse_without_lock(name, locked_until)?;
        // A single put takes five gigabytes. In parts, each part would need a checksum of its own kind.
        let in_parts = data.len() > self.settings.part_bytes && locked_until.is_none();
        let mut uncertain = false;
        let put = async || {
            if self.settings.ask_first && !uncertain {
                self.refuse_taken(name).await?;
            }
            self.upload_rate.wait(data.len() as u64).await;
            let outcome = match in_parts {
                true => self.put_in_parts(name, data).await,
                false => self.put(name, data, locked_until).await,
            };
            match outcome {
                Err(error) if error.kind == StorageErrorKind::AlreadyExists && uncertain => {
                    match self.holds(name, data).await {
                        Ok(true) => {
                            self.is_left_alone(name, data, None).await?;
                            Ok(None)
                        }
                        Ok(false) => Err(error),
                        // What cannot be compared is not decided.
                        Err(unread) => Err(transient(name, unread.detail)),
                    }
                }
                // Not the answer to what an earlier attempt did, which may still land.
                Err(error) if uncertain && error.kind != StorageErrorKind::AlreadyExists => {
                    Err(transient(name, error.detail))
                }
                Err(error) => {
                    uncertain = error.kind == StorageErrorKind::Transient;
                    Err(error)
                }
                Ok(version) => {
                    // Whatever comes of the question, this attempt may stand.
                    uncertain = true;
                    self.is_left_alone(name, data, version.as_deref()).await?;
                    Ok(version)
                }
            }
        };
        let version = self.repeated_briefly(name, put).await?;
        self.look_at_lock(name, version.as_deref(), locked_until)
            .await
    }

    /// What is put on top of a hidden object (see below) would stay for good where nothing may be deleted,
    /// and be taken for the object: so it is looked for before. Nothing else is decided by that, or a
    /// server that ignores the condition would never show.
    async fn refuse_hidden(&self, name: &ObjectName) -> Result<(), StorageError> {
        if self.known.versioning == Versioning::Never {
            return Ok(());
        }
        let key = self.key(name.as_str());
        let _permit = self.permit(name).await?;
        let versions = self.versions_of(&key, Extent::OneKey).await?;
        let is_hidden = versions.first().is_some_and(|newest| newest.is_marker)
            && versions.iter().any(|one| !one.is_marker);
        match is_hidden {
            true => Err(taken(name)),
            false => Ok(()),
        }
    }

    /// As [`Self::stands_alone`], of what was created: a right that is missing there says nothing of it.
    async fn is_left_alone(
        &self,
        name: &ObjectName,
        data: &[u8],
        version: Option<&str>,
    ) -> Result<(), StorageError> {
        match self.stands_alone(name, data, version).await {
            Err(error) if error.kind == StorageErrorKind::Denied => {
                Err(transient(name, error.detail))
            }
            told => told,
        }
    }

    /// Where versions are kept, the condition is met by a name whose object somebody has hidden below a
    /// delete marker. Such a name is not free: what hides it is removed, and so is what was just created
    /// on top of it (`version`, or the newest); the next attempt is told that the name is taken. Where nothing
    /// may be deleted, what was created over other bytes stays, and is an error.
    async fn stands_alone(
        &self,
        name: &ObjectName,
        data: &[u8],
        version: Option<&str>,
    ) -> Result<(), StorageError> {
        if self.known.versioning == Versioning::Never {
            return Ok(());
        }
        let key = self.key(name.as_str());
        let versions = self.versions_of(&key, Extent::OneKey).await?;
        let own = versions.iter().position(|one| match version {
            Some(id) => one.id == id,
            None => !one.is_marker,
        });
        let Some((own, below)) =
            own.and_then(|own| Some((versions.get(own)?, below(&versions, own))))
        else {
            return Err(transient(name, "what was just created is not listed"));
        };
        if self.settings.may_delete {
            for marker in below.markers {
                self.delete_version(marker).await?;
            }
        }
        let Some(is_hidden) = below.is_hidden else {
            return Ok(());
        };
        if !self.settings.may_delete {
            return Err(unsupported(name, CONDITION_IGNORED));
        }
        match self.delete_version(own).await {
            // It stays beside the object until its time is over, as what a sweep shows.
            Err(error) if error.kind == StorageErrorKind::Locked => {}
            deleted => deleted?,
        }
        // If nothing hid what was there before, the condition was not kept.
        match is_hidden {
            true => Err(transient(name, "an object was hidden under this name")),
            false if !self.settings.ask_first => Err(unsupported(name, CONDITION_IGNORED)),
            // As was known. There is one writer, so it was an earlier attempt of this one that landed.
            false if self.holds(name, data).await? => Ok(()),
            false => Err(taken(name)),
        }
    }

    async fn refuse_taken(&self, name: &ObjectName) -> Result<(), StorageError> {
        match self.head_once(name).await {
            Ok(_) => Err(taken(name)),
            Err(error) if error.kind == StorageErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The version that was created, where the server tells.
    async fn put(
        &self,
        name: &ObjectName,
        data: &Bytes,
        locked_until: Option<Timestamp>,
    ) -> Result<Option<String>, StorageError> {
        let put = self.client.put_object().bucket(&self.settings.bucket);
        let mut put = put.key(self.key(name.as_str())).if_none_match("*");
        if let Some(until) = locked_until {
            // AWS takes no lock without a checksum of one of its kinds.
            put = put
                .set_object_lock_mode(self.lock_mode())
                .object_lock_retain_until_date(DateTime::from_secs(until.as_second()))
                .checksum_algorithm(ChecksumAlgorithm::Crc32);
        }
        let sent = put.body(ByteStream::from(data.clone())).send();
        let put = self.answer_if_free(name, data.len() as u64, sent).await?;
        Ok(put.version_id().map(str::to_string))
    }

    /// The condition stands with the completion. Several servers ignore it there, so the name is asked
    /// for first: what is large enough for this has a name that nobody else writes.
    async fn put_in_parts(
        &self,
        name: &ObjectName,
        data: &Bytes,
    ) -> Result<Option<String>, StorageError> {
        self.refuse_taken(name).await?;
        let key = self.key(name.as_str());
        let create = self.client.create_multipart_upload();
        let sent = create.bucket(&self.settings.bucket).key(&key).send();
        let begun = self.answer(name, 0, sent).await?;
        let id = begun
            .upload_id()
            .ok_or_else(|| unsupported(name, "the server began an upload without a name"))?;
        self.own_uploads().insert(id.to_string());
        let done = self.put_parts(name, &key, id, data).await;
        if done.is_err() && self.settings.may_delete {
            // What this leaves, a sweep removes.
            let abort = self.client.abort_multipart_upload();
            let abort = abort.bucket(&self.settings.bucket).key(&key);
            let _aborted = self.answer(name, 0, abort.upload_id(id).send()).await;
        }
        self.own_uploads().remove(id);
        done
    }

    async fn put_parts(
        &self,
        name: &ObjectName,
        key: &str,
        id: &str,
        data: &Bytes,
    ) -> Result<Option<String>, StorageError> {
        let mut completed = CompletedMultipartUpload::builder();
        for (number, part) in (1..).zip(data.chunks(self.settings.part_bytes.max(1))) {
            let tag = self
                .retried(async || {
                    let upload = self.client.upload_part().bucket(&self.settings.bucket);
                    let upload = upload.key(key).upload_id(id).part_number(number);
                    let sent = upload.body(ByteStream::from(data.slice_ref(part))).send();
                    self.answer(name, part.len() as u64, sent).await
                })
                .await
                .map_err(|error| aborted(name, error))?
                .e_tag()
                .map(str::to_string);
            let part = CompletedPart::builder().part_number(number);
            completed = completed.parts(part.set_e_tag(tag).build());
        }
        let complete = self.client.complete_multipart_upload();
        let complete = complete.bucket(&self.settings.bucket).key(key);
        let complete = complete.upload_id(id).if_none_match("*");
        let sent = complete.multipart_upload(completed.build()).send();
        let completed = self.answer_if_free(name, data.len() as u64, sent).await;
        let completed = completed.map_err(|error| aborted(name, error))?;
        Ok(completed.version_id().map(str::to_string))
    }

    /// Whether the object has exactly these bytes.
    async fn holds(&self, name: &ObjectName, data: &[u8]) -> Result<bool, StorageError> {
        if self.head_once(name).await? != data.len() as u64 {
            return Ok(false);
        }
        let mut found = vec![0; data.len().min(COMPARED_BYTES)];
        let mut offset = 0u64;
        for piece in data.chunks(COMPARED_BYTES) {
            found.truncate(piece.len());
            let next = offset + piece.len() as u64;
            self.retried(async || self.fetch(name, offset, next - 1, &mut found).await)
                .await?;
            if found != piece {
                return Ok(false);
            }
            offset = next;
        }
        Ok(true)
    }
}

/// An upload that is gone was aborted by a sweep, or has been completed: beginning anew tells.
fn aborted(name: &ObjectName, error: StorageError) -> StorageError {
    match error.kind {
        StorageErrorKind::NotFound => transient(name, error.detail),
        _ => error,
    }
}
