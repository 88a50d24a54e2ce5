//! How a bucket is set up, as the server tells it.

use super::{S3, StorageError};
use crate::model::{BucketFacts, LifecycleRule, Versioning};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::types::{
    BucketVersioningStatus, DefaultRetention, ExpirationStatus, MfaDeleteStatus, ObjectLockEnabled,
    ReplicationRuleStatus,
};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use std::cell::Cell;
use std::error::Error;

/// What servers say of what a bucket does not have, or they do not know.
const HAS_NONE: [&str; 5] = [
    "NotImplemented",
    "ObjectLockConfigurationNotFoundError",
    "ReplicationConfigurationNotFoundError",
    "NoSuchReplicationConfiguration",
    "NoSuchLifecycleConfiguration",
];

/// Classes of storage that answer like the first.
const READABLE_AT_ONCE: [&str; 4] = ["STANDARD", "STANDARD_IA", "ONEZONE_IA", "GLACIER_IR"];

/// A year of Object Lock, at its longest.
const DAYS_OF_A_YEAR: u32 = 366;

impl S3 {
    /// What a deletion leaves: needed by every deletion, so asked at every opening.
    pub(super) async fn versioning_facts(&self) -> Result<BucketFacts, StorageError> {
        let told = self
            .asked("how the bucket keeps versions", async || {
                let ask = self.client.get_bucket_versioning();
                ask.bucket(&self.settings.bucket).send().await
            })
            .await?;
        let Some(told) = told else {
            return Ok(BucketFacts::default());
        };
        Ok(BucketFacts {
            versioning: match told.status() {
                None => Versioning::Never,
                Some(BucketVersioningStatus::Enabled) => Versioning::Enabled,
                // A word that is not known yet means at least that versions may be there.
                Some(_) => Versioning::Suspended,
            },
            needs_code_to_delete: told.mfa_delete() == Some(&MfaDeleteStatus::Enabled),
            ..BucketFacts::default()
        })
    }

    /// The rest of the facts.
    pub(super) async fn all_facts(&self) -> Result<BucketFacts, StorageError> {
        let bucket = self.settings.bucket.as_str();
        let mut facts = self.known.clone();
        let lock = self
            .asked("how the bucket locks objects", async || {
                let ask = self.client.get_object_lock_configuration();
                ask.bucket(bucket).send().await
            })
            .await?;
        let lock = lock
            .as_ref()
            .and_then(|told| told.object_lock_configuration());
        facts.can_lock = lock
            .is_some_and(|lock| lock.object_lock_enabled() == Some(&ObjectLockEnabled::Enabled));
        facts.default_lock_days = lock
            .and_then(|lock| lock.rule()?.default_retention())
            .map_or(0, lock_days);
        facts.is_replicated = self.replication_fact().await?;
        let lifecycle = self
            .asked("what the bucket does with objects that age", async || {
                let ask = self.client.get_bucket_lifecycle_configuration();
                ask.bucket(bucket).send().await
            })
            .await?;
        let rules = lifecycle.as_ref().map_or(&[][..], |told| told.rules());
        facts.rules = rules.iter().filter_map(lifecycle_rule).collect();
        let place = self
            .asked("where the bucket is", async || {
                let ask = self.client.get_bucket_location();
                ask.bucket(bucket).send().await
            })
            .await?;
        facts.region = place.map(|told| match told.location_constraint() {
            // AWS's first region has no name here.
            None => "us-east-1".to_string(),
            Some(region) if region.as_str().is_empty() => "us-east-1".to_string(),
            Some(region) if region.as_str() == "EU" => "eu-west-1".to_string(),
            Some(region) => region.as_str().to_string(),
        });
        Ok(facts)
    }

    pub(super) async fn replication_fact(&self) -> Result<bool, StorageError> {
        let told = self
            .asked("whether the bucket is replicated", async || {
                let ask = self.client.get_bucket_replication();
                ask.bucket(&self.settings.bucket).send().await
            })
            .await?;
        let configuration = told
            .as_ref()
            .and_then(|told| told.replication_configuration());
        Ok(configuration.is_some_and(|told| {
            let off = Some(&ReplicationRuleStatus::Disabled);
            told.rules().iter().any(|rule| Some(rule.status()) != off)
        }))
    }

    /// `None`: the server says in so many words that the bucket has none, or that it does not know such
    /// a thing. Any other refusal must not pass for that: a proxy's error page would hide what the bucket
    /// does.
    async fn asked<T, E>(
        &self,
        what: &str,
        mut ask: impl AsyncFnMut() -> Result<T, SdkError<E, HttpResponse>>,
    ) -> Result<Option<T>, StorageError>
    where
        E: ProvideErrorMetadata + Error + 'static,
    {
        let name = self.location.as_str();
        let has_none = Cell::new(false);
        let told = self
            .repeated(&name, async || {
                let noted = async {
                    let told = ask().await;
                    let code = told.as_ref().err().and_then(|error| error.code());
                    has_none.set(code.is_some_and(|code| HAS_NONE.contains(&code)));
                    told
                };
                self.answer(&name, 0, noted).await
            })
            .await;
        match told {
            Ok(told) => Ok(Some(told)),
            Err(_) if has_none.get() => Ok(None),
            Err(mut error) => {
                error.detail = format!("asking {what}: {}", error.detail);
                Err(error)
            }
        }
    }
}

fn lock_days(default: &DefaultRetention) -> u32 {
    // What makes no sense is taken for the worst.
    let of = |number: Option<i32>| number.map_or(0, |n| u32::try_from(n).unwrap_or(u32::MAX));
    of(default.days()).saturating_add(of(default.years()).saturating_mul(DAYS_OF_A_YEAR))
}

/// `None`: switched off, or only for objects with tags, which ours do not have.
fn lifecycle_rule(rule: &aws_sdk_s3::types::LifecycleRule) -> Option<LifecycleRule> {
    if rule.status() == &ExpirationStatus::Disabled {
        return None;
    }
    let filter = rule.filter();
    let both = filter.and_then(|filter| filter.and());
    let has_tag = filter.is_some_and(|filter| filter.tag().is_some())
        || both.is_some_and(|both| !both.tags().is_empty());
    if has_tag {
        return None;
    }
    #[expect(deprecated, reason = "older servers still answer so")]
    let old = rule.prefix();
    let key_prefix = filter
        .and_then(|filter| filter.prefix())
        .or_else(|| both.and_then(|both| both.prefix()))
        .or(old)
        .unwrap_or_default();
    // What makes no sense is taken for the worst.
    let of = |days: Option<i32>| days.map(|days| u32::try_from(days).unwrap_or(0));
    let expires_after_days = rule
        .expiration()
        .and_then(|expiration| of(expiration.days()).or(expiration.date().map(|_| 0)));
    let older_versions = rule.noncurrent_version_expiration();
    let older_versions_after_days =
        older_versions.and_then(|expiration| of(expiration.noncurrent_days()));
    let archived_in = rule
        .transitions()
        .iter()
        .filter_map(|transition| transition.storage_class())
        .find(|class| !READABLE_AT_ONCE.contains(&class.as_str()))
        .map(|class| class.as_str().to_string());
    Some(LifecycleRule {
        name: rule.id().unwrap_or_default().to_string(),
        key_prefix: key_prefix.to_string(),
        expires_after_days,
        older_versions_after_days,
        archived_in,
    })
}
