//! How a bucket is set up, as the server tells it.

use super::{S3, StorageError, StorageErrorKind};
use crate::model::{BucketFacts, LifecycleRule, Versioning};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::types::{
    BucketVersioningStatus, DefaultRetention, ExpirationStatus, MfaDeleteStatus,
    ReplicationRuleStatus, TransitionStorageClass,
};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use std::error::Error;

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
        facts.default_lock_days = lock
            .as_ref()
            .and_then(|told| {
                told.object_lock_configuration()?
                    .rule()?
                    .default_retention()
            })
            .map_or(0, lock_days);
        let replication = self
            .asked("whether the bucket is replicated", async || {
                let ask = self.client.get_bucket_replication();
                ask.bucket(bucket).send().await
            })
            .await?;
        facts.is_replicated = replication
            .as_ref()
            .and_then(|told| told.replication_configuration())
            .is_some_and(|told| {
                let off = Some(&ReplicationRuleStatus::Disabled);
                told.rules().iter().any(|rule| Some(rule.status()) != off)
            });
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

    /// `None`: the server does not know such a thing, or the bucket has none.
    async fn asked<T, E>(
        &self,
        what: &str,
        mut ask: impl AsyncFnMut() -> Result<T, SdkError<E, HttpResponse>>,
    ) -> Result<Option<T>, StorageError>
    where
        E: ProvideErrorMetadata + Error + 'static,
    {
        let name = self.location.as_str();
        let told = self
            .repeated(&name, async || self.answer(&name, 0, ask()).await)
            .await;
        match told {
            Ok(told) => Ok(Some(told)),
            Err(error) if error.detail.contains("NoSuchBucket") => Err(error),
            Err(error)
                if matches!(
                    error.kind,
                    StorageErrorKind::NotFound | StorageErrorKind::Unsupported
                ) =>
            {
                Ok(None)
            }
            Err(mut error) => {
                error.detail = format!("asking {what}: {}", error.detail);
                Err(error)
            }
        }
    }
}

fn lock_days(default: &DefaultRetention) -> u32 {
    let of = |number: Option<i32>| number.and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
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
    let expires_after_days = rule.expiration().and_then(|expiration| {
        let days = expiration.days().and_then(|days| u32::try_from(days).ok());
        days.or(expiration.date().map(|_| 0))
    });
    let archived_in = rule
        .transitions()
        .iter()
        .filter_map(|transition| transition.storage_class())
        .find(|class| {
            matches!(
                class,
                TransitionStorageClass::Glacier | TransitionStorageClass::DeepArchive
            )
        })
        .map(|class| class.as_str().to_string());
    Some(LifecycleRule {
        name: rule.id().unwrap_or_default().to_string(),
        key_prefix: key_prefix.to_string(),
        expires_after_days,
        archived_in,
    })
}
