//! Object Lock: before its time, nobody deletes an object, whatever key they have.
//!
//! A lock is dated by the server's clock, which also ends it: a host whose clock is wrong locks nothing for
//! decades, and nothing for no time. Some servers take a lock and do nothing: the first object that is
//! locked is looked at again.

use super::delete::Line;
use super::error::{transient, unsupported};
use super::versions::{Extent, Version, originals};
use super::{S3, StorageError, StorageErrorKind, object_of};
use crate::model::{LockMode, ObjectName, Versioning};
use crate::storage::Latest;
use aws_sdk_s3::config::interceptors::BeforeDeserializationInterceptorContextRef;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use aws_sdk_s3::primitives::{DateTime, DateTimeFormat};
use aws_sdk_s3::types::{
    ObjectLockMode, ObjectLockRetention, ObjectLockRetentionMode as RetentionMode,
};
use jiff::{SignedDuration, Timestamp};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

/// The server's answer may come after the second that it was dated in.
const TOLERANCE: SignedDuration = SignedDuration::from_secs(60);

const SHOWS_NO_LOCK: &str = "the server took a lock and shows none (or this key may not see it: \
                             s3:GetObjectRetention, s3:GetObjectVersion)";

/// How what is created is locked.
#[derive(Debug, Clone)]
pub struct S3Lock {
    pub mode: LockMode,
    /// For how many days, by the place in the store: what is called so, or is below it. The first that fits
    /// counts; 0, and what fits nowhere: not at all.
    pub days_below: Vec<(String, u32)>,
}

impl S3Lock {
    fn days(&self, name: &str) -> u32 {
        let is_of = |place: &str| {
            name.strip_prefix(place)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let fits = self.days_below.iter().find(|(place, _)| is_of(place));
        fits.map_or(0, |(_, days)| *days)
    }
}

/// The server's time, as its last answer told it.
#[derive(Debug, Clone, Default)]
pub(super) struct ServerClock {
    last: Arc<Mutex<Option<(Instant, Timestamp)>>>,
}

impl ServerClock {
    fn now(&self) -> Option<Timestamp> {
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let (seen, told) = last?;
        let since = SignedDuration::try_from(seen.elapsed()).ok()?;
        told.checked_add(since).ok()
    }
}

impl Intercept for ServerClock {
    fn name(&self) -> &'static str {
        "server clock"
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _settings: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = context.response().headers().get("date");
        let told = date
            .and_then(|date| DateTime::from_str(date, DateTimeFormat::HttpDate).ok())
            .and_then(|date| timestamp(&date));
        if let Some(told) = told {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            *last = Some((Instant::now(), told));
        }
        Ok(())
    }
}

fn timestamp(time: &DateTime) -> Option<Timestamp> {
    Timestamp::from_second(time.secs()).ok()
}

impl S3 {
    fn server_time(&self) -> Result<Timestamp, StorageError> {
        let told = self.clock.now();
        told.ok_or_else(|| {
            let why = "the server does not tell its time, so that no lock can be dated";
            unsupported(&self.location, why)
        })
    }

    /// Until when an object is locked that is created now.
    pub(super) fn lock_of(&self, name: &str) -> Result<Option<Timestamp>, StorageError> {
        let days = self
            .settings
            .lock
            .as_ref()
            .map_or(0, |lock| lock.days(name));
        if days == 0 {
            return Ok(None);
        }
        let locked_for = SignedDuration::from_hours(24 * i64::from(days));
        let until = self.server_time()?.checked_add(locked_for);
        until
            .map(Some)
            .map_err(|_| unsupported(name, "the server's time is beyond the calendar"))
    }

    /// For the headers of a put.
    pub(super) fn lock_mode(&self) -> Option<ObjectLockMode> {
        self.settings.lock.as_ref().map(|lock| match lock.mode {
            LockMode::Governance => ObjectLockMode::Governance,
            LockMode::Compliance => ObjectLockMode::Compliance,
        })
    }

    /// Once a server has shown no lock, nothing more is created that was to have one.
    pub(super) fn refuse_without_lock(
        &self,
        name: &ObjectName,
        until: Option<Timestamp>,
    ) -> Result<(), StorageError> {
        match (until, self.first_lock.get()) {
            (Some(_), Some(Err(why))) => Err(unsupported(name, why)),
            _ => Ok(()),
        }
    }

    /// Looks at the first object that was to be locked, because there are servers that take a lock and do
    /// nothing. The object stands, whatever is seen; so it is not told as one that was not created, but as one of
    /// which nobody knows. Whoever repeats it, and whatever is created after it, is refused.
    pub(super) async fn look_at_lock(
        &self,
        name: &ObjectName,
        version: Option<&str>,
        until: Option<Timestamp>,
    ) -> Result<(), StorageError> {
        let Some(until) = until.filter(|_| self.first_lock.get().is_none()) else {
            return Ok(());
        };
        let _permit = self.permit(name).await?;
        let key = self.key(name.as_str());
        let seen = match self.retention_of(&key, version).await {
            Ok((mode, found)) => {
                let tolerated = |found: Timestamp| found.saturating_add(TOLERANCE).unwrap_or(found);
                match mode == self.lock_mode()
                    && found.is_some_and(|found| tolerated(found) >= until)
                {
                    true => Ok(()),
                    false => Err(SHOWS_NO_LOCK.to_string()),
                }
            }
            Err(error) if error.kind == StorageErrorKind::Denied => {
                Err(format!("{SHOWS_NO_LOCK}: {}", error.detail))
            }
            // Nothing was seen; the next object is looked at.
            Err(error) => return Err(transient(name, error.detail)),
        };
        let told = match &seen {
            Ok(()) => Ok(()),
            Err(why) => Err(transient(name, format!("it stands, but {why}"))),
        };
        // Of several that look at once, the first counts for those that come after.
        let _first = self.first_lock.set(seen);
        told
    }

    async fn retention_of(
        &self,
        key: &str,
        version: Option<&str>,
    ) -> Result<(Option<ObjectLockMode>, Option<Timestamp>), StorageError> {
        let object = self
            .retried(async || {
                let head = self.client.head_object().bucket(&self.settings.bucket);
                let head = head.key(key).set_version_id(version.map(str::to_string));
                self.answer(&key, 0, head.send()).await
            })
            .await?;
        let until = object.object_lock_retain_until_date().and_then(timestamp);
        Ok((object.object_lock_mode().cloned(), until))
    }

    /// Until when a version is locked, of the newest one without `version`; `None` if it is not any more.
    pub(super) async fn still_locked(
        &self,
        key: &str,
        version: Option<&str>,
    ) -> Result<Option<Timestamp>, StorageError> {
        if self.known.versioning == Versioning::Never {
            return Ok(None);
        }
        match self.retention_of(key, version).await {
            Ok((_, until)) => {
                let now = self.server_time()?;
                Ok(until.filter(|until| *until > now))
            }
            Err(error) if error.kind == StorageErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What it means that a deletion was denied.
    pub(super) async fn why_denied(&self, line: &Line, denied: StorageError) -> StorageError {
        match self.still_locked(line.key(), line.version()).await {
            Ok(Some(until)) => StorageError::new(
                StorageErrorKind::Locked,
                denied.name,
                format!("until {until}"),
            ),
            _ => denied,
        }
    }

    /// The objects are the oldest versions of their keys: what somebody put above them is not locked.
    pub(super) fn renew_below(
        &self,
        place: &str,
        latest: &Latest<'_>,
    ) -> Result<u64, StorageError> {
        let (own, below) = (self.key(place), self.key_prefix(place));
        let versions = self.runtime.block_on(async {
            let _permit = self.permit(&place).await?;
            let mut versions = self.versions_of(&own, Extent::OneKey).await?;
            versions.extend(self.versions_of(&below, Extent::AllThatBeginSo).await?);
            Ok(versions)
        })?;
        let mut renewals = Vec::new();
        for version in originals(&versions).into_values() {
            let Some(name) = object_of(self.place(&version.key)) else {
                continue;
            };
            let Some(latest) = latest(&name) else {
                continue;
            };
            if let Some(until) = self.lock_of(name.as_str())? {
                renewals.push((version, until.min(latest)));
            }
        }
        // One thread for each request that may be under way.
        let next = AtomicUsize::new(0);
        let renewed = AtomicUsize::new(0);
        let renew = || {
            while let Some((version, until)) = renewals.get(next.fetch_add(1, Ordering::Relaxed)) {
                if self.runtime.block_on(self.renew(version, *until))? {
                    renewed.fetch_add(1, Ordering::Relaxed);
                }
            }
            Ok(())
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (1..self.settings.connections.min(renewals.len()))
                .filter_map(|_| thread::Builder::new().spawn_scoped(scope, renew).ok())
                .collect();
            let own = renew();
            let joined = threads.into_iter().map(|thread| {
                let died = |_| Err(unsupported(place, "a thread that renews locks died"));
                thread.join().unwrap_or_else(died)
            });
            // All of them, so that none is left behind.
            joined
                .collect::<Vec<_>>()
                .into_iter()
                .fold(own, Result::and)
        })?;
        Ok(renewed.load(Ordering::Relaxed) as u64)
    }

    /// `false`: it is locked for as long, or the time to lock it for is over.
    async fn renew(&self, version: &Version, until: Timestamp) -> Result<bool, StorageError> {
        if until <= self.server_time()? {
            return Ok(false);
        }
        let mode = match self.lock_mode() {
            Some(ObjectLockMode::Compliance) => RetentionMode::Compliance,
            _ => RetentionMode::Governance,
        };
        let retention = ObjectLockRetention::builder()
            .mode(mode)
            .retain_until_date(DateTime::from_secs(until.as_second()))
            .build();
        let renewed = self
            .repeated(&version.key, async || {
                let put = self.client.put_object_retention();
                let put = put.bucket(&self.settings.bucket).key(&version.key);
                let put = put.version_id(&version.id).retention(retention.clone());
                self.answer(&version.key, 0, put.send()).await
            })
            .await;
        match renewed {
            Ok(_) => Ok(true),
            // Deleted since it was listed.
            Err(error) if error.kind == StorageErrorKind::NotFound => Ok(false),
            // A lock cannot be made shorter; nor need it be.
            Err(error) if error.kind == StorageErrorKind::Denied => {
                let _permit = self.permit(&version.key).await?;
                match self.still_locked(&version.key, Some(&version.id)).await? {
                    Some(found) if found >= until => Ok(false),
                    _ => Err(error),
                }
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_place_that_an_object_is_in_says_how_long_it_is_locked() {
        let days = [
            ("customers/acme/probe", 0),
            ("customers/acme/points", 16),
            ("customers/acme", 17),
            ("vmkeep.json", 17),
        ];
        let lock = S3Lock {
            mode: LockMode::Governance,
            days_below: days.map(|(place, days)| (place.to_string(), days)).to_vec(),
        };
        for (name, days) in [
            ("customers/acme/probe/spent/1", 0),
            ("customers/acme/points/1", 16),
            ("customers/acme/packs/1/2", 17),
            ("customers/acme2/packs/1/2", 0),
            ("vmkeep.json", 17),
            ("vmkeep.json2", 0),
        ] {
            assert_eq!(lock.days(name), days, "{name}");
        }
    }
}
