//! Requests, repeated where that can help: reading, listing.

use super::connection::SLOWEST_BYTES_PER_SECOND;
use super::error::{is_condition_not_met, is_skewed, taken, told, transient, unsupported};
use super::{S3, StorageError, StorageErrorKind, WRITES_AT_ONCE, too_large, too_short};
use crate::model::ObjectName;
use crate::storage::{Part, fill_random};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::EncodingType;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use jiff::Timestamp;
use std::collections::BTreeSet;
use std::error::Error;
use std::fmt;
use std::time::Duration;
use tokio::time::Instant;

/// One answer may take this long, beside the time that its bytes need.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Longer listings are not believed: a customer of 100 TiB has some millions of objects.
pub(super) const MAX_LISTED: usize = 20_000_000;
/// A server refuses what is signed with a time too far from its own. A host whose clock is wrong must
/// not go without backups for that, nor may one whose clock was set meanwhile; what it may delete is
/// another question. So the details begin of what is asked once more.
const SKEWED: &str = "signed with a time that is not the server's";
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// On a slow line those under way at once get their parts of it, so that one of them takes as long
/// as all.
fn time_for(bytes: u64, at_once: usize) -> Duration {
    let all = bytes.saturating_mul(at_once.clamp(1, WRITES_AT_ONCE) as u64);
    ANSWER_TIMEOUT + Duration::from_secs(all / SLOWEST_BYTES_PER_SECOND)
}

fn no_answer(name: &impl fmt::Display, time: Duration) -> StorageError {
    let seconds = time.as_secs();
    transient(name, format!("no answer after {seconds} s"))
}

/// Pauses that double, each of a random length up to that (*full jitter*: clients that failed
/// together must not come back together).
struct Pauses {
    next: Duration,
}

impl Pauses {
    fn new() -> Self {
        Pauses { next: FIRST_PAUSE }
    }

    fn next(&mut self) -> Duration {
        let longest = self.next;
        self.next = (longest * 2).min(LONGEST_PAUSE);
        let mut random = [0; 1];
        // Without random numbers it is the longest.
        let part = match fill_random(&mut random) {
            Ok(()) => u32::from(random[0]) + 1,
            Err(_) => 256,
        };
        longest * part / 256
    }
}

impl S3 {
    /// Waits for an answer, but not for ever.
    pub(super) async fn answer<T, E>(
        &self,
        name: &impl fmt::Display,
        bytes: u64,
        request: impl Future<Output = Result<T, SdkError<E, HttpResponse>>>,
    ) -> Result<T, StorageError>
    where
        E: ProvideErrorMetadata + Error + 'static,
    {
        let time = self.time_for(bytes);
        match tokio::time::timeout(time, request).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) if is_skewed(&error) => {
                let detail = told(name, &error).detail;
                Err(transient(name, format!("{SKEWED}: {detail}")))
            }
            Ok(Err(error)) => Err(told(name, &error)),
            Err(_) => Err(no_answer(name, time)),
        }
    }

    fn time_for(&self, bytes: u64) -> Duration {
        time_for(bytes, self.settings.connections)
    }

    /// As `answer`, for a request that sets the condition that the name is free.
    pub(super) async fn answer_if_free<T, E>(
        &self,
        name: &ObjectName,
        bytes: u64,
        request: impl Future<Output = Result<T, SdkError<E, HttpResponse>>>,
    ) -> Result<T, StorageError>
    where
        E: ProvideErrorMetadata + Error + 'static,
    {
        let mut is_taken = false;
        let noted = async {
            let told = request.await;
            is_taken = told.as_ref().is_err_and(is_condition_not_met);
            told
        };
        match self.answer(name, bytes, noted).await {
            Err(_) if is_taken => Err(taken(name)),
            answered => answered,
        }
    }

    /// Runs a request that can be repeated, until it is answered for good or patience is over.
    pub(super) async fn repeated<T>(
        &self,
        name: &impl fmt::Display,
        request: impl AsyncFnMut() -> Result<T, StorageError>,
    ) -> Result<T, StorageError> {
        // Held over the pauses as well: a server that wants us to slow down gets fewer of us.
        let _permit = self.permit(name).await?;
        self.retried(request).await
    }

    /// As `repeated`, for a creation: whoever needs its outcome repeats the call itself, up to eight
    /// times, so that each call has an eighth of the patience.
    pub(super) async fn repeated_briefly<T>(
        &self,
        name: &impl fmt::Display,
        request: impl AsyncFnMut() -> Result<T, StorageError>,
    ) -> Result<T, StorageError> {
        let _permit = self.permit(name).await?;
        self.retried_for(self.settings.patience / 8, request).await
    }

    /// As `repeated`, for one that holds a permit.
    pub(super) async fn retried<T>(
        &self,
        request: impl AsyncFnMut() -> Result<T, StorageError>,
    ) -> Result<T, StorageError> {
        self.retried_for(self.settings.patience, request).await
    }

    async fn retried_for<T>(
        &self,
        patience: Duration,
        mut request: impl AsyncFnMut() -> Result<T, StorageError>,
    ) -> Result<T, StorageError> {
        let started = Instant::now();
        let mut pauses = Pauses::new();
        let mut was_skewed = false;
        loop {
            match request().await {
                // The client learns the difference from the refusal, and signs with the server's time
                // from then on: in one call a second refusal has another cause.
                Err(error) if was_skewed && error.detail.starts_with(SKEWED) => {
                    let kind = StorageErrorKind::Denied;
                    return Err(StorageError { kind, ..error });
                }
                Err(error) if error.kind == StorageErrorKind::Transient => {
                    was_skewed |= error.detail.starts_with(SKEWED);
                    let pause = pauses.next();
                    if started.elapsed() + pause > patience {
                        return Err(error);
                    }
                    tokio::time::sleep(pause).await;
                }
                answered => return answered,
            }
        }
    }

    pub(super) async fn permit(
        &self,
        name: &impl fmt::Display,
    ) -> Result<tokio::sync::SemaphorePermit<'_>, StorageError> {
        // Never closed.
        self.permits
            .acquire()
            .await
            .map_err(|error| unsupported(name, error))
    }

    pub(super) async fn download(
        &self,
        name: &ObjectName,
        max_bytes: u64,
    ) -> Result<Vec<u8>, StorageError> {
        self.repeated(name, async || {
            self.download_rate.wait(0).await;
            let get = self.client.get_object().bucket(&self.settings.bucket);
            let sent = get.key(self.key(name.as_str())).send();
            let object = self.answer(name, 0, sent).await?;
            let size_bytes = length(name, object.content_length())?;
            if size_bytes > max_bytes {
                return Err(too_large(name, size_bytes, max_bytes));
            }
            let mut data = Vec::new();
            usize::try_from(size_bytes)
                .ok()
                .and_then(|bytes| data.try_reserve_exact(bytes).ok())
                .ok_or_else(|| unsupported(name, format!("no memory for {size_bytes} bytes")))?;
            self.download_rate.moved(size_bytes);
            let time = self.time_for(size_bytes);
            receive(name, size_bytes, time, object.body, |part| {
                data.extend_from_slice(part);
            })
            .await?;
            Ok(data)
        })
        .await
    }

    pub(super) async fn download_range(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StorageError> {
        let wanted = buffer.len() as u64;
        let last = match wanted.checked_sub(1).and_then(|n| offset.checked_add(n)) {
            Some(last) if last < u64::MAX => last,
            // Nothing is asked for, or what no object can have.
            _ => {
                let end = offset.saturating_add(wanted);
                let size_bytes = self.head(name).await?;
                return match end > size_bytes {
                    true => Err(too_short(name, size_bytes, end)),
                    false => Ok(()),
                };
            }
        };
        self.repeated(name, async || self.fetch(name, offset, last, buffer).await)
            .await
    }

    /// The bytes from `offset` to `last`, once.
    pub(super) async fn fetch(
        &self,
        name: &ObjectName,
        offset: u64,
        last: u64,
        buffer: &mut [u8],
    ) -> Result<(), StorageError> {
        let wanted = buffer.len() as u64;
        self.download_rate.wait(wanted).await;
        let get = self.client.get_object().bucket(&self.settings.bucket);
        let get = get.range(format!("bytes={offset}-{last}"));
        let sent = get.key(self.key(name.as_str())).send();
        let object = self.answer(name, 0, sent).await?;
        let range = object.content_range().unwrap_or_default();
        let Some((first, total)) = parse_content_range(range) else {
            let detail = format!("asked for a part, and was given {range:?}");
            return Err(unsupported(name, detail));
        };
        if first != offset {
            return Err(transient(
                name,
                "the server gave another part than asked for",
            ));
        }
        if total <= last {
            return Err(too_short(name, total, last + 1));
        }
        let given = length(name, object.content_length())?;
        if given != wanted {
            let detail = format!("{given} bytes came of the {wanted} asked for");
            return Err(transient(name, detail));
        }
        let mut filled = 0;
        let time = self.time_for(wanted);
        receive(name, wanted, time, object.body, |part| {
            // `receive` hands over no more than was asked for.
            if let Some(place) = buffer.get_mut(filled..filled + part.len()) {
                place.copy_from_slice(part);
            }
            filled += part.len();
        })
        .await
    }

    pub(super) async fn head(&self, name: &ObjectName) -> Result<u64, StorageError> {
        self.repeated(name, async || self.head_once(name).await)
            .await
    }

    pub(super) async fn head_once(&self, name: &ObjectName) -> Result<u64, StorageError> {
        let head = self.client.head_object().bucket(&self.settings.bucket);
        let sent = head.key(self.key(name.as_str())).send();
        let object = self.answer(name, 0, sent).await?;
        length(name, object.content_length())
    }

    pub(super) async fn last_modified(&self, name: &ObjectName) -> Result<Timestamp, StorageError> {
        self.repeated(name, async || {
            let head = self.client.head_object().bucket(&self.settings.bucket);
            let sent = head.key(self.key(name.as_str())).send();
            let object = self.answer(name, 0, sent).await?;
            object
                .last_modified()
                .and_then(|time| Timestamp::from_second(time.secs()).ok())
                .ok_or_else(|| transient(name, "the answer does not say when it was created"))
        })
        .await
    }

    /// Keys and sizes below a prefix, as the server tells them.
    pub(super) async fn keys_below(
        &self,
        prefix: &str,
    ) -> Result<Vec<(String, u64)>, StorageError> {
        let key_prefix = self.key_prefix(prefix);
        let mut keys = Vec::new();
        let mut last_plain = String::new();
        let mut token: Option<String> = None;
        loop {
            let page = self
                .repeated(&key_prefix, async || {
                    let list = self.client.list_objects_v2();
                    let list = list.bucket(&self.settings.bucket).prefix(&key_prefix);
                    let list = list.encoding_type(EncodingType::Url);
                    let sent = list.set_continuation_token(token.clone()).send();
                    let page = self.answer(&key_prefix, 0, sent).await?;
                    let found = page.contents().len() + page.common_prefixes().len();
                    let is_truncated = page.is_truncated();
                    refuse_broken(&key_prefix, is_truncated, page.key_count(), found)?;
                    Ok(page)
                })
                .await?;
            let before = keys.len();
            for object in page.contents() {
                let key = decoded(object.key().unwrap_or_default(), page.encoding_type());
                let size_bytes = object.size().and_then(|size| u64::try_from(size).ok());
                // Encoded, keys stand in another order; no object has such a key.
                let is_plain = !key.contains(['%', '+']);
                let follows = !is_plain || last_plain < key;
                if is_plain {
                    last_plain.clone_from(&key);
                }
                match size_bytes {
                    Some(size_bytes) if follows && key.starts_with(&key_prefix) => {
                        keys.push((key, size_bytes));
                    }
                    _ => return Err(transient(&key_prefix, "a listing that makes no sense")),
                }
            }
            if page.is_truncated() != Some(true) {
                return Ok(keys);
            }
            token = page.next_continuation_token().map(str::to_string);
            // A listing that goes in circles or on for ever ends here.
            if token.is_none() || keys.len() == before || keys.len() > MAX_LISTED {
                return Err(transient(&key_prefix, "a listing that does not go on"));
            }
        }
    }
}

impl S3 {
    /// What stands right below a prefix. The server cuts the keys short, so that it tells each part once.
    pub(super) async fn parts_below(&self, prefix: &str) -> Result<Vec<Part>, StorageError> {
        let key_prefix = self.key_prefix(prefix);
        let mut parts = BTreeSet::new();
        let mut token: Option<String> = None;
        loop {
            let page = self
                .repeated(&key_prefix, async || {
                    let list = self.client.list_objects_v2();
                    let list = list.bucket(&self.settings.bucket).prefix(&key_prefix);
                    let list = list.delimiter("/").encoding_type(EncodingType::Url);
                    let sent = list.set_continuation_token(token.clone()).send();
                    let page = self.answer(&key_prefix, 0, sent).await?;
                    let found = page.contents().len() + page.common_prefixes().len();
                    let is_truncated = page.is_truncated();
                    refuse_broken(&key_prefix, is_truncated, page.key_count(), found)?;
                    Ok(page)
                })
                .await?;
            let before = parts.len();
            let keys = page.contents().iter().map(|one| one.key());
            let prefixes = page.common_prefixes().iter().map(|one| one.prefix());
            let told = keys.chain(prefixes);
            take_parts(&key_prefix, told, page.encoding_type(), &mut parts)?;
            if page.is_truncated() != Some(true) {
                return Ok(parts.into_iter().collect());
            }
            token = page.next_continuation_token().map(str::to_string);
            if token.is_none() || parts.len() == before || parts.len() > MAX_LISTED {
                return Err(transient(&key_prefix, "a listing that does not go on"));
            }
        }
    }
}

/// Adds the next part of each of these keys, which a listing of what is below `key_prefix` told.
pub(super) fn take_parts<'k>(
    key_prefix: &str,
    keys: impl Iterator<Item = Option<&'k str>>,
    encoding: Option<&EncodingType>,
    parts: &mut BTreeSet<Part>,
) -> Result<(), StorageError> {
    for key in keys {
        let key = decoded(key.unwrap_or_default(), encoding);
        let Some(rest) = key.strip_prefix(key_prefix) else {
            return Err(transient(key_prefix, "a listing that makes no sense"));
        };
        // A key that is the prefix is what some programs make of a folder; nothing stands below it.
        if !rest.is_empty() {
            let Part { name, is_prefix } = Part::first_of(rest);
            let name = name.escape_debug().to_string();
            parts.insert(Part { name, is_prefix });
        }
    }
    Ok(())
}

/// A page of a listing that does not say whether another one follows, or has fewer lines than it
/// counts, broke off on its way: what it lacks is not gone.
pub(super) fn refuse_broken(
    place: &impl fmt::Display,
    is_truncated: Option<bool>,
    counted: Option<i32>,
    found: usize,
) -> Result<(), StorageError> {
    let counted = counted.and_then(|counted| usize::try_from(counted).ok());
    match is_truncated.is_none() || counted.is_some_and(|counted| found < counted) {
        true => Err(transient(place, "a listing that broke off")),
        false => Ok(()),
    }
}

/// Hands over exactly `expected` bytes of a body.
async fn receive(
    name: &ObjectName,
    expected: u64,
    time: Duration,
    mut body: ByteStream,
    mut each: impl FnMut(&[u8]),
) -> Result<(), StorageError> {
    let received = async {
        let mut left = expected;
        while let Some(part) = body
            .try_next()
            .await
            .map_err(|error| transient(name, format!("the answer broke off: {error}")))?
        {
            left = left
                .checked_sub(part.len() as u64)
                .ok_or_else(|| transient(name, "more bytes came than were announced"))?;
            each(&part);
        }
        match left {
            0 => Ok(()),
            _ => {
                let detail = format!("the answer ended {left} bytes early");
                Err(transient(name, detail))
            }
        }
    };
    match tokio::time::timeout(time, received).await {
        Ok(received) => received,
        Err(_) => Err(no_answer(name, time)),
    }
}

fn length(name: &ObjectName, told: Option<i64>) -> Result<u64, StorageError> {
    told.and_then(|length| u64::try_from(length).ok())
        .ok_or_else(|| transient(name, "the answer does not say how long it is"))
}

/// First byte and total of `bytes 5-9/100` (RFC 9110, section 14.4).
fn parse_content_range(range: &str) -> Option<(u64, u64)> {
    let (part, total) = range.strip_prefix("bytes ")?.split_once('/')?;
    let (first, _) = part.split_once('-')?;
    Some((first.parse().ok()?, total.parse().ok()?))
}

/// Keys can hold what XML cannot; so they are asked for percent-encoded. Of the encoded only the slash
/// is read: no name of an object has another character that needs it, and what has one stays as it is,
/// which no object can be called. (Read whole, two keys could be taken for one.)
pub(super) fn decoded(key: &str, encoding: Option<&EncodingType>) -> String {
    match encoding {
        Some(EncodingType::Url) => key.replace("%2F", "/").replace("%2f", "/"),
        _ => key.to_string(),
    }
}

/// The key itself, of one that a listing gave to go on from.
pub(super) fn unescaped(key: &str, encoding: Option<&EncodingType>) -> String {
    if encoding != Some(&EncodingType::Url) {
        return key.to_string();
    }
    let mut bytes = Vec::with_capacity(key.len());
    let mut rest = key.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let escaped = after
            .get(..2)
            .filter(|_| *first == b'%')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        rest = match escaped {
            Some(_) => after.get(2..).unwrap_or_default(),
            None => after,
        };
        bytes.push(match (escaped, first) {
            (Some(byte), _) => byte,
            (None, b'+') => b' ',
            (None, byte) => *byte,
        });
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_and_nonsense_is_not() {
        assert_eq!(parse_content_range("bytes 5-9/100"), Some((5, 100)));
        for bad in [
            "",
            "bytes 5-9",
            "bytes */100",
            "bytes 5/100",
            "items 1-2/3",
            "bytes -9/1",
        ] {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }

    #[test]
    fn keys_are_decoded_only_if_the_server_says_that_it_encoded_them() {
        let url = Some(&EncodingType::Url);
        assert_eq!(decoded("a%2Fb%2fc+d%01%31", url), "a/b/c+d%01%31");
        assert_eq!(decoded("a%2Fb+c", None), "a%2Fb+c");
        assert_eq!(unescaped("a%2Fb+c%C3%BC%zz%", url), "a/b c\u{fc}%zz%");
        assert_eq!(unescaped("a%2Fb+c", None), "a%2Fb+c");
    }

    #[test]
    fn of_keys_below_a_prefix_each_next_part_is_told_once_and_what_is_not_below_is_nonsense() {
        let url = Some(&EncodingType::Url);
        let taken = |keys: &[&'static str]| {
            let mut parts = BTreeSet::new();
            let keys = keys.iter().map(|key| Some(*key));
            let told = take_parts("a/b/", keys, url, &mut parts);
            let parts = parts.into_iter().map(|part| (part.name, part.is_prefix));
            told.map(|()| parts.collect::<Vec<_>>())
                .map_err(|error| error.kind)
        };
        let keys = ["a/b/", "a/b/c%2F", "a/b/c/d", "a/b/c", "a%2Fb%2F%C3%BC"];
        let part = |name: &str, is_prefix| (name.to_string(), is_prefix);
        let parts = [part("%C3%BC", false), part("c", false), part("c", true)];
        assert_eq!(taken(&keys), Ok(parts.to_vec()));
        assert_eq!(taken(&[]), Ok(Vec::new()));
        for strange in ["", "a/b", "a/bc"] {
            let told = taken(&["a/b/c", strange]);
            assert_eq!(told, Err(StorageErrorKind::Transient), "{strange}");
        }
    }

    #[test]
    fn packs_that_share_a_slow_line_are_all_waited_for_and_no_longer_than_that() {
        let pack = 16 << 20;
        let megabit = 1_000_000 / 8;
        for (connections, at_once) in [(1, 1), (4, 4), (64, WRITES_AT_ONCE)] {
            let together = Duration::from_secs(at_once as u64 * pack / megabit);
            assert!(time_for(pack, connections) > together, "{connections}");
        }
        assert_eq!(time_for(pack, 1_000_000), time_for(pack, WRITES_AT_ONCE));
        assert_eq!(time_for(0, 0), ANSWER_TIMEOUT);
        assert!(time_for(u64::MAX, usize::MAX) > ANSWER_TIMEOUT);
    }

    #[test]
    fn a_page_that_does_not_say_how_it_goes_on_or_lacks_lines_broke_off() {
        let is_whole = |is_truncated, counted, found| {
            let told = refuse_broken(&"place", is_truncated, counted, found);
            let kind = told.as_ref().map_err(|error| error.kind);
            assert!(matches!(kind, Ok(()) | Err(StorageErrorKind::Transient)));
            told.is_ok()
        };
        for is_truncated in [Some(true), Some(false)] {
            assert!(is_whole(is_truncated, Some(2), 2));
            assert!(is_whole(is_truncated, None, 2));
            assert!(is_whole(is_truncated, Some(0), 0));
            assert!(!is_whole(is_truncated, Some(3), 2));
        }
        assert!(!is_whole(None, Some(2), 2));
        assert!(!is_whole(None, None, 0));
    }

    #[test]
    fn pauses_grow_and_stay_bounded() {
        let mut pauses = Pauses::new();
        let first = pauses.next();
        assert!(first <= FIRST_PAUSE && !first.is_zero());
        for _ in 0..100 {
            assert!(pauses.next() <= LONGEST_PAUSE);
        }
        assert_eq!(pauses.next, LONGEST_PAUSE);
    }
}
