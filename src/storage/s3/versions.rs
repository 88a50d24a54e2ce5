//! What a bucket keeps beside its objects: older and newer versions, delete markers, unfinished
//! uploads.

use super::error::{transient, unsupported};
use super::requests::{MAX_LISTED, decoded, refuse_broken, take_parts, unescaped};
use super::{Leftover, Listed, Part, S3, StorageError, StorageErrorKind, Survey, object_of};
use crate::model::Versioning;
use aws_sdk_s3::types::EncodingType;
use std::collections::{BTreeMap, BTreeSet, HashSet};

/// One version of a key, or a delete marker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Version {
    pub(super) key: String,
    pub(super) id: String,
    size_bytes: u64,
    /// Of the bytes, as the server has summed them.
    e_tag: Option<String>,
    pub(super) is_marker: bool,
    at_nanosecond: i128,
}

impl Version {
    fn identity(&self) -> (&str, &str) {
        (&self.key, &self.id)
    }

    fn has_bytes_of(&self, other: &Version) -> bool {
        self.e_tag.is_some() && self.e_tag == other.e_tag && self.size_bytes == other.size_bytes
    }
}

/// What a listing of versions is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// The key alone; others begin like it.
    OneKey,
    AllThatBeginSo,
    /// The same, if so many requests are enough; else it is `Unsupported`.
    AllInRequests(usize),
}

/// Why versions are not known.
pub(super) struct Unlisted {
    pub(super) error: StorageError,
    /// By what the server said, and not for want of an answer: of other keys it may say better.
    pub(super) is_answered: bool,
}

impl Unlisted {
    fn answered(error: StorageError) -> Self {
        Unlisted {
            error,
            is_answered: true,
        }
    }

    fn unanswered(error: StorageError) -> Self {
        Unlisted {
            error,
            is_answered: false,
        }
    }
}

/// An upload in parts that was begun and not completed.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Unfinished {
    key: String,
    id: String,
}

impl S3 {
    async fn abort(&self, upload: &Unfinished) -> Result<(), StorageError> {
        let place = format!("{} (unfinished upload)", upload.key);
        let aborted = self
            .retried(async || {
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
        let _permit = self.permit(&key_prefix).await?;
        let mut swept = Vec::new();
        for upload in self.unfinished(&key_prefix).await? {
            if !self.own_uploads().contains(&upload.id) {
                self.abort(&upload).await?;
                swept.push(self.leftover_of_upload(&upload));
            }
        }
        if self.known.versioning != Versioning::Never {
            let versions = self
                .versions_of(&key_prefix, Extent::AllThatBeginSo)
                .await?;
            let beside = beside_the_originals(&versions);
            // Other bytes under the name of an object: which are the right ones cannot be told here.
            let removed: Vec<&Version> = beside
                .iter()
                .filter(|one| one.is_safe_to_remove)
                .map(|one| one.of)
                .filter(|version| object_of(self.place(&version.key)).is_some())
                .collect();
            let told = self.delete_versions(&removed).await;
            for (version, told) in removed.into_iter().zip(told) {
                match told {
                    Ok(()) => swept.push(self.leftover_of_version(version)),
                    // What is left is told by the survey.
                    Err(error) if error.kind == StorageErrorKind::Locked => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(swept)
    }

    /// The uploads first: one that is completed between the two listings is an object in the second.
    pub(super) async fn survey_below(&self, prefix: &str) -> Result<Survey, StorageError> {
        let key_prefix = self.key_prefix(prefix);
        let permit = self.permit(&key_prefix).await?;
        let mut leftovers: Vec<Leftover> = self
            .unfinished(&key_prefix)
            .await?
            .iter()
            .map(|upload| self.leftover_of_upload(upload))
            .collect();
        // Asked whatever was said of versions: what is there counts.
        let versions = self.versions_of(&key_prefix, Extent::AllThatBeginSo).await;
        drop(permit);
        let keys = match versions {
            Err(error)
                if error.kind == StorageErrorKind::Unsupported
                    && self.known.versioning == Versioning::Never =>
            {
                self.keys_below(prefix).await?
            }
            Err(error) => return Err(error),
            Ok(versions) => {
                let beside = beside_the_originals(&versions);
                leftovers.extend(beside.iter().map(|one| self.leftover_of_version(one.of)));
                let beside: HashSet<(&str, &str)> =
                    beside.iter().map(|one| one.of.identity()).collect();
                versions
                    .iter()
                    .filter(|version| !beside.contains(&version.identity()))
                    .map(|version| (version.key.clone(), version.size_bytes))
                    .collect()
            }
        };
        let mut objects = Vec::new();
        for (key, size_bytes) in keys {
            let place = self.place(&key);
            match object_of(place) {
                Some(name) => objects.push(Listed { name, size_bytes }),
                None => leftovers.push(Leftover {
                    place: place.escape_debug().to_string(),
                    size_bytes,
                }),
            }
        }
        Ok(Survey { objects, leftovers })
    }

    /// As [`S3::parts_below`], of all keys of which a version or a delete marker is there.
    pub(super) async fn parts_of_versions(&self, prefix: &str) -> Result<Vec<Part>, StorageError> {
        let key_prefix = self.key_prefix(prefix);
        let (mut parts, mut listed) = (BTreeSet::new(), 0);
        let mut from: (Option<String>, Option<String>) = (None, None);
        loop {
            let page = self
                .repeated(&key_prefix, async || {
                    let list = self.client.list_object_versions();
                    let list = list.bucket(&self.settings.bucket).prefix(&key_prefix);
                    let list = list.delimiter("/").encoding_type(EncodingType::Url);
                    let list = list.set_key_marker(from.0.clone());
                    let sent = list.set_version_id_marker(from.1.clone()).send();
                    let page = self.answer(&key_prefix, 0, sent).await?;
                    refuse_broken(&key_prefix, page.is_truncated(), None, 0)?;
                    Ok(page)
                })
                .await?;
            let encoding = page.encoding_type();
            let versions = page.versions().iter().map(|one| one.key());
            let markers = page.delete_markers().iter().map(|one| one.key());
            let prefixes = page.common_prefixes().iter().map(|one| one.prefix());
            let before = listed;
            let told = versions.chain(markers).chain(prefixes);
            let told = told.inspect(|_| listed += 1);
            take_parts(&key_prefix, told, encoding, &mut parts)?;
            if page.is_truncated() != Some(true) {
                return Ok(parts.into_iter().collect());
            }
            let next = (
                page.next_key_marker().map(|key| unescaped(key, encoding)),
                page.next_version_id_marker().map(str::to_string),
            );
            // A listing that goes in circles or on for ever ends here.
            let goes_on = next.0.is_some() && next != from && listed > before;
            if !goes_on || listed > MAX_LISTED {
                return Err(transient(&key_prefix, "a listing that does not go on"));
            }
            from = next;
        }
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

    /// All versions and markers of the key, or of all keys that begin so; of each key the newest first. A
    /// listing that is not in order, or tells something twice, is not acted on.
    pub(super) async fn versions_of(
        &self,
        key_prefix: &str,
        extent: Extent,
    ) -> Result<Vec<Version>, StorageError> {
        let told = self.list_versions(key_prefix, extent).await;
        told.map_err(|unlisted| unlisted.error)
    }

    /// As `versions_of`, and whether it failed for want of an answer.
    pub(super) async fn list_versions(
        &self,
        key_prefix: &str,
        extent: Extent,
    ) -> Result<Vec<Version>, Unlisted> {
        let unlisted = |detail: &str| Unlisted::answered(transient(key_prefix, detail));
        let mut versions: Vec<Version> = Vec::new();
        let mut from: (Option<String>, Option<String>) = (None, None);
        let mut requests = 0;
        loop {
            if extent == Extent::AllInRequests(requests) {
                let error = unsupported(key_prefix, "a longer listing than is worth it");
                return Err(Unlisted::answered(error));
            }
            requests += 1;
            let page = self
                .retried(async || {
                    let list = self.client.list_object_versions();
                    let list = list.bucket(&self.settings.bucket).prefix(key_prefix);
                    let list = list.encoding_type(EncodingType::Url);
                    let list = list.set_key_marker(from.0.clone());
                    let sent = list.set_version_id_marker(from.1.clone()).send();
                    let page = self.answer(&key_prefix, 0, sent).await?;
                    refuse_broken(&key_prefix, page.is_truncated(), None, 0)?;
                    Ok(page)
                })
                .await
                .map_err(Unlisted::unanswered)?;
            let encoding = page.encoding_type();
            let data = page.versions().iter().map(|one| {
                let size = one.size().and_then(|size| u64::try_from(size).ok());
                let sum = one.e_tag().map(str::to_string);
                (
                    one.key(),
                    one.version_id(),
                    one.last_modified(),
                    size,
                    sum,
                    false,
                )
            });
            let markers = page.delete_markers().iter().map(|one| {
                let (key, id) = (one.key(), one.version_id());
                (key, id, one.last_modified(), Some(0), None, true)
            });
            let before = versions.len();
            for (key, id, at, size_bytes, e_tag, is_marker) in data.chain(markers) {
                let key = decoded(key.unwrap_or_default(), encoding);
                match (id, at, size_bytes) {
                    (Some(id), Some(at), Some(size_bytes)) if key.starts_with(key_prefix) => {
                        versions.push(Version {
                            key,
                            id: id.to_string(),
                            size_bytes,
                            e_tag,
                            is_marker,
                            at_nanosecond: at.as_nanos(),
                        });
                    }
                    _ => return Err(unlisted("a listing that makes no sense")),
                }
            }
            // The key itself comes before all that begin like it.
            let is_past = |version: &Version| version.key != key_prefix;
            let is_done = page.is_truncated() != Some(true)
                || (extent == Extent::OneKey && versions.iter().skip(before).any(is_past));
            if is_done {
                if extent == Extent::OneKey {
                    versions.retain(|version| version.key == key_prefix);
                }
                return in_order(versions)
                    .ok_or_else(|| unlisted("a listing that is not in order"));
            }
            let next = (
                page.next_key_marker().map(|key| unescaped(key, encoding)),
                page.next_version_id_marker().map(str::to_string),
            );
            // A listing that goes in circles or on for ever ends here.
            let goes_on = next.0.is_some() && next != from && versions.len() > before;
            if !goes_on || versions.len() > MAX_LISTED {
                return Err(unlisted("a listing that does not go on"));
            }
            from = next;
        }
    }

    async fn unfinished(&self, key_prefix: &str) -> Result<Vec<Unfinished>, StorageError> {
        let mut unfinished = Vec::new();
        let mut from: (Option<String>, Option<String>) = (None, None);
        loop {
            let page = self
                .retried(async || {
                    let list = self.client.list_multipart_uploads();
                    let list = list.bucket(&self.settings.bucket).prefix(key_prefix);
                    let list = list.encoding_type(EncodingType::Url);
                    let list = list.set_key_marker(from.0.clone());
                    let sent = list.set_upload_id_marker(from.1.clone()).send();
                    let page = self.answer(&key_prefix, 0, sent).await?;
                    refuse_broken(&key_prefix, page.is_truncated(), None, 0)?;
                    Ok(page)
                })
                .await?;
            let encoding = page.encoding_type();
            let before = unfinished.len();
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
                page.next_key_marker().map(|key| unescaped(key, encoding)),
                page.next_upload_id_marker().map(str::to_string),
            );
            let goes_on = next.0.is_some() && next != from && unfinished.len() > before;
            if !goes_on || unfinished.len() > MAX_LISTED {
                return Err(transient(key_prefix, "a listing that does not go on"));
            }
            from = next;
        }
    }
}

/// What is told of the bytes of one key.
struct Told<'v> {
    last: &'v Version,
    is_in_order: bool,
    are_the_same: bool,
}

/// Sorts what two lists of one listing tell, the newest of each key first. `None`: something is told
/// twice, or of one key the bytes are not told from the newest to the oldest. (Ceph 16 tells two attempts of one
/// writer so if they landed together; of the same bytes, none is more the object than the others.)
fn in_order(mut versions: Vec<Version>) -> Option<Vec<Version>> {
    let mut seen = HashSet::new();
    let mut of_keys: BTreeMap<&str, Told> = BTreeMap::new();
    for version in &versions {
        if !seen.insert(version.identity()) {
            return None;
        }
        if version.is_marker {
            continue;
        }
        let told = of_keys.entry(&version.key).or_insert(Told {
            last: version,
            is_in_order: true,
            are_the_same: true,
        });
        told.is_in_order &= told.last.at_nanosecond >= version.at_nanosecond;
        told.are_the_same &= version.has_bytes_of(told.last);
        told.last = version;
        if !told.is_in_order && !told.are_the_same {
            return None;
        }
    }
    // Stable: bytes of one moment stay in the order that the server told.
    versions.sort_by(|one, other| {
        let by_key = one.key.cmp(&other.key);
        by_key.then(other.at_nanosecond.cmp(&one.at_nanosecond))
    });
    Some(versions)
}

/// What one version of a name was put over.
pub(super) struct Below<'v> {
    pub(super) markers: Vec<&'v Version>,
    /// Whether a delete marker hid the newest bytes among it; `None`: there are none.
    pub(super) is_hidden: Option<bool>,
}

/// Below the version at `own`. Most servers tell times in whole seconds, and bytes and markers in two lists
/// that have no order between them: a marker of the same second is taken for the newer one of bytes
/// below, and for older than `own`.
pub(super) fn below(versions: &[Version], own: usize) -> Below<'_> {
    let (newer, older) = versions.split_at(own.min(versions.len()));
    let at = older.first().map_or(i128::MIN, |own| own.at_nanosecond);
    let markers: Vec<&Version> = newer
        .iter()
        .filter(|one| one.at_nanosecond == at)
        .chain(older)
        .filter(|one| one.is_marker)
        .collect();
    let bytes = older.iter().skip(1).find(|one| !one.is_marker);
    let is_hidden = bytes.map(|bytes| {
        let hides = |marker: &&Version| marker.at_nanosecond >= bytes.at_nanosecond;
        markers.iter().any(hides)
    });
    Below { markers, is_hidden }
}

/// What stands beside an object under its name.
struct Beside<'v> {
    of: &'v Version,
    /// A delete marker, which hides the object, or the object's bytes once more.
    is_safe_to_remove: bool,
}

/// The oldest bytes of each key.
pub(super) fn originals(versions: &[Version]) -> BTreeMap<&str, &Version> {
    let mut originals: BTreeMap<&str, &Version> = BTreeMap::new();
    for version in versions.iter().filter(|version| !version.is_marker) {
        // The newest of each key come first, so the last is the oldest.
        originals.insert(&version.key, version);
    }
    originals
}

/// Everything but the oldest bytes of each key: names are used once, so these are the object, unless
/// somebody was there before. Other bytes above them are shown and never removed.
fn beside_the_originals(versions: &[Version]) -> Vec<Beside<'_>> {
    let originals = originals(versions);
    versions
        .iter()
        .filter_map(|version| {
            let original = originals.get(version.key.as_str()).copied();
            if original == Some(version) {
                return None;
            }
            let is_repeated = original.is_some_and(|original| version.has_bytes_of(original));
            Some(Beside {
                of: version,
                is_safe_to_remove: version.is_marker || is_repeated,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(key: &str, id: &str, at: i128, is_marker: bool) -> Version {
        Version {
            key: key.to_string(),
            id: id.to_string(),
            size_bytes: 1,
            e_tag: Some(format!("sum of {}", id.trim_end_matches('b'))),
            is_marker,
            at_nanosecond: at,
        }
    }

    #[test]
    fn the_oldest_bytes_of_a_name_are_the_object_and_other_bytes_above_are_never_removed() {
        let versions = in_order(vec![
            version("a", "3", 30, false),
            version("a", "1b", 20, false),
            version("a", "1", 10, false),
            version("b", "9", 90, false),
            version("a", "4", 40, true),
            version("c", "5", 50, true),
        ])
        .unwrap();
        let told: Vec<(&str, bool)> = beside_the_originals(&versions)
            .iter()
            .map(|one| (one.of.id.as_str(), one.is_safe_to_remove))
            .collect();
        assert_eq!(told, [("4", true), ("3", false), ("1b", true), ("5", true)]);
    }

    #[test]
    fn a_marker_of_the_second_in_which_an_object_was_created_hides_it() {
        let told = |times: [i128; 3]| {
            let [old, hidden, new] = times;
            // As they come: bytes first.
            let versions = in_order(vec![
                version("a", "3", new, false),
                version("a", "1", old, false),
                version("a", "2", hidden, true),
            ])
            .unwrap();
            let own = versions.iter().position(|one| one.id == "3").unwrap();
            let below = below(&versions, own);
            let ids: Vec<&str> = below.markers.iter().map(|one| one.id.as_str()).collect();
            (ids.join(" "), below.is_hidden)
        };
        for times in [[10, 20, 30], [10, 10, 30], [10, 30, 30], [10, 10, 10]] {
            assert_eq!(told(times), ("2".to_string(), Some(true)), "{times:?}");
        }
        assert_eq!(told([20, 10, 30]), ("2".to_string(), Some(false)));
        assert_eq!(told([20, 40, 30]), (String::new(), Some(false)));
        let alone = [version("a", "1", 10, false)];
        assert_eq!(below(&alone, 0).is_hidden, None);
    }

    #[test]
    fn a_listing_that_tells_something_twice_or_in_another_order_is_not_acted_on() {
        let (new, old) = (version("a", "2", 20, false), version("a", "1", 10, false));
        assert!(in_order(vec![new.clone(), old.clone()]).is_some());
        assert!(in_order(vec![old.clone(), new.clone()]).is_none());
        // The same bytes, which landed together.
        let again = version("a", "1b", 30, false);
        let told = in_order(vec![old.clone(), again.clone()]);
        assert_eq!(told, Some(vec![again.clone(), old.clone()]));
        assert!(in_order(vec![old.clone(), again.clone(), new.clone()]).is_none());
        assert!(in_order(vec![new.clone(), old.clone(), again]).is_none());
        assert!(in_order(vec![new.clone(), old.clone(), old]).is_none());
        assert!(in_order(vec![new.clone(), new]).is_none());
    }
}
