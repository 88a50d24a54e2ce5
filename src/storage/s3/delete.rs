//! Deleting: one key or version, or many at once.
//!
//! Many go in few requests (`DeleteObjects`). The answer to one can be half good; so nothing is believed but
//! what it says of each line. A line of which it says nothing, or what may pass, is asked for once more by a
//! request of its own, whose answer has a status. So is everything, from then on, where the server does not take
//! such a request, or not with this key: Ceph 16 wants the right for the whole bucket, and refuses the request
//! where a policy gives it below a prefix, as it should.
//!
//! AWS wants a checksum of the request, and takes the CRC that the client adds. The MD5 that was once the only one
//! is not sent: none of the servers tried asks for it, or looks at it; all check the payload's signature.

use super::connection::SLOWEST_BYTES_PER_SECOND;
use super::error::shown;
use super::versions::{Extent, Unlisted, Version};
use super::{S3, StorageError, StorageErrorKind, refuse_own_names};
use crate::model::{ObjectName, Versioning};
use aws_sdk_s3::types::{Delete, DeletedObject, Error as ToldError, ObjectIdentifier};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::atomic::Ordering;
use std::vec;

/// Lines of one request; S3 takes no more.
const MAX_LINES: usize = 1000;
/// A server with slow disks may delete line after line: each is waited for as for so many bytes.
const LINE_AS_BYTES: u64 = SLOWEST_BYTES_PER_SECOND / 5;

/// A key, or one version of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    key: String,
    version: Option<String>,
    /// As messages call it.
    shown: String,
}

impl Line {
    pub(super) fn of_version(version: &Version) -> Self {
        Line {
            key: version.key.clone(),
            version: Some(version.id.clone()),
            shown: format!("{} (version {})", version.key, version.id),
        }
    }

    pub(super) fn key(&self) -> &str {
        &self.key
    }

    pub(super) fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

/// What an answer to a request for many says of one line.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Gone,
    /// For good. A lock is told so, too.
    Denied(String),
    /// Only a request of its own tells.
    Untold,
}

/// Judges an answer line by line. An error counts whatever else is said of the line.
fn judged(lines: &[Line], deleted: &[DeletedObject], errors: &[ToldError]) -> Vec<Verdict> {
    // Some servers name a version where none was asked for, or one that is empty.
    let told_of = |key: Option<&str>, version: Option<&str>, line: &Line| {
        key == Some(line.key.as_str())
            && (line.version.is_none() || version == line.version.as_deref())
    };
    let mut deleted_of: HashMap<&str, Vec<&DeletedObject>> = HashMap::new();
    for one in deleted {
        let key = one.key().unwrap_or_default();
        deleted_of.entry(key).or_default().push(one);
    }
    let mut errors_of: HashMap<&str, Vec<&ToldError>> = HashMap::new();
    for one in errors {
        let key = one.key().unwrap_or_default();
        errors_of.entry(key).or_default().push(one);
    }
    let judge = |line: &Line| {
        let errors = errors_of.get(line.key.as_str()).into_iter().flatten();
        let error = errors
            .copied()
            .find(|one| told_of(one.key(), one.version_id(), line));
        if let Some(error) = error {
            return verdict_of(error);
        }
        let deleted = deleted_of.get(line.key.as_str()).into_iter().flatten();
        match deleted
            .copied()
            .any(|one| told_of(one.key(), one.version_id(), line))
        {
            true => Verdict::Gone,
            false => Verdict::Untold,
        }
    };
    lines.iter().map(judge).collect()
}

/// An error of one line has a code and no status. By those that every server means alike it is decided; by
/// others, perhaps of tomorrow, it is not.
fn verdict_of(error: &ToldError) -> Verdict {
    match error.code().unwrap_or_default() {
        "NoSuchKey" | "NoSuchVersion" => Verdict::Gone,
        code @ "AccessDenied" => {
            let message = error.message().unwrap_or_default();
            Verdict::Denied(shown(&format!("the server says {code} {message}")))
        }
        _ => Verdict::Untold,
    }
}

/// A name while it is deleted.
struct Going {
    name: ObjectName,
    /// Still to be deleted.
    lines: vec::IntoIter<Line>,
    told: Result<(), StorageError>,
}

impl Going {
    /// After a lock the others go all the same.
    fn goes_on(&self) -> bool {
        match &self.told {
            Ok(()) => true,
            Err(error) => error.kind == StorageErrorKind::Locked,
        }
    }
}

/// Patience is over once for all: what comes after the first that failed so is not asked for.
#[derive(Default)]
struct Patience {
    over: Option<StorageError>,
}

impl Patience {
    fn is_left(&self, of: &dyn fmt::Display) -> Result<(), StorageError> {
        match &self.over {
            None => Ok(()),
            Some(error) => {
                let detail = format!("not asked for after {error}");
                Err(StorageError::new(error.kind, of, detail))
            }
        }
    }

    fn note<T>(&mut self, told: &Result<T, StorageError>) {
        if let Err(error) = told
            && error.kind == StorageErrorKind::Transient
        {
            self.over.get_or_insert_with(|| error.clone());
        }
    }

    /// A listing that makes no sense came at once; nothing was waited for.
    fn note_unlisted(&mut self, unlisted: &Unlisted) {
        if !unlisted.is_answered && unlisted.error.kind == StorageErrorKind::Transient {
            self.over.get_or_insert_with(|| unlisted.error.clone());
        }
    }
}

impl S3 {
    /// Each with all its versions; what is told is in the order of the names.
    pub(super) async fn delete_names(&self, names: &[ObjectName]) -> Vec<Result<(), StorageError>> {
        let mut patience = Patience::default();
        let mut told = Vec::with_capacity(names.len());
        for some in names.chunks(MAX_LINES) {
            told.extend(self.delete_some(some, &mut patience).await);
        }
        told
    }

    async fn delete_some(
        &self,
        names: &[ObjectName],
        patience: &mut Patience,
    ) -> Vec<Result<(), StorageError>> {
        let mut going: Vec<Going> = Vec::with_capacity(names.len());
        for name in names {
            going.push(Going {
                name: name.clone(),
                lines: Vec::new().into_iter(),
                told: refuse_own_names(name)
                    .and_then(|()| self.refuse_to_delete(name))
                    .and_then(|()| patience.is_left(name)),
            });
        }
        // Held to the end; there is always one in the end.
        let _permit = self.permit(&self.location).await;
        match self.known.versioning {
            Versioning::Never => {
                for one in going.iter_mut().filter(|one| one.told.is_ok()) {
                    one.lines = vec![self.line_of(&one.name)].into_iter();
                }
            }
            Versioning::Enabled | Versioning::Suspended => {
                self.find_versions(&mut going, patience).await;
            }
        }
        // Of one name one version at a time, the newest first: the lines of one request are in no order.
        loop {
            let mut asked = Vec::new();
            let mut lines = Vec::new();
            for one in &mut going {
                if one.goes_on()
                    && let Some(line) = one.lines.next()
                {
                    asked.push(one);
                    lines.push(line);
                }
            }
            if lines.is_empty() {
                return going.into_iter().map(|one| one.told).collect();
            }
            let told = self.delete_lines(&lines, patience).await;
            for (one, told) in asked.into_iter().zip(told) {
                if told.is_err() {
                    one.told = told;
                }
            }
        }
    }

    fn line_of(&self, name: &ObjectName) -> Line {
        Line {
            key: self.key(name.as_str()),
            version: None,
            shown: name.to_string(),
        }
    }

    /// Of several names in one folder it is tried to list the folder: that is one request for up to a thousand.
    async fn find_versions(&self, going: &mut [Going], patience: &mut Patience) {
        let mut folders: BTreeMap<String, usize> = BTreeMap::new();
        for one in going.iter().filter(|one| one.told.is_ok()) {
            if let Some((folder, _)) = one.name.as_str().rsplit_once('/') {
                *folders.entry(folder.to_string()).or_default() += 1;
            }
        }
        let mut listed: HashSet<String> = HashSet::new();
        let mut versions: HashMap<String, Vec<Line>> = HashMap::new();
        for (folder, names) in folders.into_iter().filter(|(_, names)| *names > 1) {
            // If it is longer, or cannot be acted on as a whole, each name is asked for.
            let extent = Extent::AllInRequests(names / 2 + 1);
            let key_prefix = self.key_prefix(&folder);
            match self.list_versions(&key_prefix, extent).await {
                Ok(found) => {
                    for version in &found {
                        let lines = versions.entry(version.key.clone()).or_default();
                        lines.push(Line::of_version(version));
                    }
                    listed.insert(folder);
                }
                Err(unlisted) => patience.note_unlisted(&unlisted),
            }
            if patience.over.is_some() {
                break;
            }
        }
        for one in going.iter_mut().filter(|one| one.told.is_ok()) {
            let key = self.key(one.name.as_str());
            let folder = one.name.as_str().rsplit_once('/');
            if folder.is_some_and(|(folder, _)| listed.contains(folder)) {
                one.lines = versions.remove(&key).unwrap_or_default().into_iter();
                continue;
            }
            one.told = patience.is_left(&one.name);
            if one.told.is_err() {
                continue;
            }
            match self.list_versions(&key, Extent::OneKey).await {
                Ok(found) => {
                    let lines: Vec<Line> = found.iter().map(Line::of_version).collect();
                    one.lines = lines.into_iter();
                }
                Err(unlisted) => {
                    patience.note_unlisted(&unlisted);
                    one.told = Err(unlisted.error);
                }
            }
        }
    }

    /// For one that holds a permit; each is told of in its place.
    pub(super) async fn delete_versions(
        &self,
        versions: &[&Version],
    ) -> Vec<Result<(), StorageError>> {
        let mut patience = Patience::default();
        let mut told = Vec::with_capacity(versions.len());
        for some in versions.chunks(MAX_LINES) {
            let lines: Vec<Line> = some.iter().copied().map(Line::of_version).collect();
            told.extend(self.delete_lines(&lines, &mut patience).await);
        }
        told
    }

    pub(super) async fn delete_version(&self, version: &Version) -> Result<(), StorageError> {
        self.delete_line(&Line::of_version(version)).await
    }

    /// Up to [`MAX_LINES`].
    async fn delete_lines(
        &self,
        lines: &[Line],
        patience: &mut Patience,
    ) -> Vec<Result<(), StorageError>> {
        let verdicts = match lines.len() > 1 && patience.over.is_none() {
            true => self.ask_for_many(lines).await,
            false => Ok(vec![Verdict::Untold; lines.len()]),
        };
        patience.note(&verdicts);
        let verdicts = verdicts.unwrap_or_else(|_| vec![Verdict::Untold; lines.len()]);
        let mut all = Vec::with_capacity(lines.len());
        for (line, verdict) in lines.iter().zip(verdicts) {
            let told = match (verdict, patience.is_left(line)) {
                (Verdict::Gone, _) => Ok(()),
                (Verdict::Denied(detail), _) => {
                    let denied = StorageError::new(StorageErrorKind::Denied, line, detail);
                    Err(self.why_denied(line, denied).await)
                }
                (Verdict::Untold, Ok(())) => self.delete_line(line).await,
                (Verdict::Untold, Err(error)) => Err(error),
            };
            patience.note(&told);
            all.push(told);
        }
        all
    }

    /// An error: patience is over. Nobody knows then what was done.
    async fn ask_for_many(&self, lines: &[Line]) -> Result<Vec<Verdict>, StorageError> {
        let untold = vec![Verdict::Untold; lines.len()];
        if self.refuses_many.load(Ordering::Relaxed) {
            return Ok(untold);
        }
        let objects = lines.iter().map(|line| {
            let object = ObjectIdentifier::builder().key(&line.key);
            object.set_version_id(line.version.clone()).build()
        });
        let Ok(objects) = objects.collect::<Result<Vec<_>, _>>() else {
            return Ok(untold);
        };
        let Ok(wanted) = Delete::builder().set_objects(Some(objects)).build() else {
            return Ok(untold);
        };
        let place = format!("{} objects of {}", lines.len(), self.location);
        let answered = self
            .retried(async || {
                let many = self.client.delete_objects().bucket(&self.settings.bucket);
                let sent = many.delete(wanted.clone()).send();
                let bytes = LINE_AS_BYTES.saturating_mul(lines.len() as u64);
                self.answer(&place, bytes, sent).await
            })
            .await;
        match answered {
            Ok(answer) => Ok(judged(lines, answer.deleted(), answer.errors())),
            Err(error) if error.kind == StorageErrorKind::Transient => Err(error),
            // Whatever the reason is, each line has it too, or not.
            Err(_) => {
                self.refuses_many.store(true, Ordering::Relaxed);
                Ok(untold)
            }
        }
    }

    async fn delete_line(&self, line: &Line) -> Result<(), StorageError> {
        let deleted = self
            .retried(async || {
                let delete = self.client.delete_object().bucket(&self.settings.bucket);
                let delete = delete.key(&line.key).set_version_id(line.version.clone());
                self.answer(line, 0, delete.send()).await
            })
            .await;
        match deleted {
            Ok(_) => Ok(()),
            Err(error) if error.kind == StorageErrorKind::NotFound => Ok(()),
            Err(error) if error.kind == StorageErrorKind::Denied => {
                Err(self.why_denied(line, error).await)
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(key: &str, version: Option<&str>) -> Line {
        Line {
            key: key.to_string(),
            version: version.map(str::to_string),
            shown: key.to_string(),
        }
    }

    fn deleted(key: &str, version: Option<&str>) -> DeletedObject {
        let version = version.map(str::to_string);
        let one = DeletedObject::builder().key(key);
        one.set_version_id(version).build()
    }

    fn error(key: &str, version: Option<&str>, code: &str) -> ToldError {
        let version = version.map(str::to_string);
        let one = ToldError::builder().key(key).code(code);
        one.set_version_id(version).build()
    }

    fn denied() -> Verdict {
        Verdict::Denied("the server says AccessDenied ".to_string())
    }

    #[test]
    fn only_what_an_answer_says_of_a_line_is_believed() {
        let lines = ["a", "b", "c", "d", "e"].map(|key| line(key, None));
        let told = judged(
            &lines,
            // As Garage and Ceph 20 answer: versions that nobody asked for.
            &[deleted("a", Some("7")), deleted("e", None)],
            &[
                error("b", Some(""), "AccessDenied"),
                error("c", None, "InternalError"),
                // Whatever else is said.
                error("e", None, "SlowDown"),
            ],
        );
        let untold = Verdict::Untold;
        assert_eq!(
            told,
            [
                Verdict::Gone,
                denied(),
                untold.clone(),
                untold.clone(),
                untold.clone()
            ]
        );
        assert_eq!(judged(&lines, &[], &[]), vec![untold; 5]);
    }

    #[test]
    fn a_version_is_gone_only_if_the_answer_names_it() {
        let lines = [
            line("a", Some("1")),
            line("a", Some("2")),
            line("a", Some("3")),
            line("b", Some("1")),
            line("a", Some("4")),
        ];
        let told = judged(
            &lines,
            &[
                deleted("a", Some("1")),
                // A delete marker was put on top, perhaps; in any case it was not this version.
                deleted("b", None),
                deleted("b", Some("2")),
                deleted("c", Some("1")),
            ],
            &[
                error("a", Some("2"), "AccessDenied"),
                error("a", Some("4"), "NoSuchVersion"),
            ],
        );
        let untold = Verdict::Untold;
        assert_eq!(
            told,
            [
                Verdict::Gone,
                denied(),
                untold.clone(),
                untold,
                Verdict::Gone
            ]
        );
    }

    #[test]
    fn an_error_is_decided_by_a_code_that_all_mean_alike_and_by_no_other() {
        for (code, verdict) in [
            ("NoSuchKey", Verdict::Gone),
            ("NoSuchVersion", Verdict::Gone),
            ("AccessDenied", denied()),
            ("InternalError", Verdict::Untold),
            ("SlowDown", Verdict::Untold),
            ("MethodNotAllowed", Verdict::Untold),
            ("", Verdict::Untold),
        ] {
            assert_eq!(verdict_of(&error("a", None, code)), verdict, "{code}");
        }
    }
}
