//! The concrete store that a configuration names.

use super::exit::{Exit, Failure};
use super::secret;
use crate::config::{Bucket, BucketCredentials, Config, HostRole, Place};
use crate::format::names::{CustomerNames, content_hash, repository_file};
use crate::model::{CustomerName, ObjectName, Writers};
use crate::policy::{judge_bucket, lock_term};
use crate::repository::SealedCustomer;
use crate::storage::{
    Cached, Directory, S3, S3Credentials, S3Lock, S3Settings, Storage, StorageErrorKind,
    remove_copies,
};
use std::sync::Arc;
use std::time::Duration;

/// Larger objects are uploaded in parts of this size, so that little is lost when one fails.
const PART_BYTES: usize = 64 << 20;
/// A store that does not answer for so long is down.
const PATIENCE: Duration = Duration::from_secs(5 * 60);

/// A store that is open.
pub struct Store {
    pub storage: Arc<dyn Storage>,
    /// The same, if it is a bucket.
    bucket: Option<Arc<S3>>,
    /// What is between the two.
    cache: Option<Arc<Cached>>,
}

impl Store {
    /// From here on everything is read from the bucket itself.
    pub fn read_no_copies(&mut self) {
        if let Some(s3) = &self.bucket {
            self.storage = s3.clone();
        }
    }

    /// Removes this host's copies of what is no longer of the repository: what is erased must be gone here
    /// too.
    pub fn keep_copies_of(&self, customer: &SealedCustomer) {
        let names = customer.names();
        self.tidy(|cache| {
            let note = names.looked_through();
            let there = cache.names_below(names.prefix())?;
            let before = cache.noted(&note);
            let (copies, unknown) = customer.copies(&there, before.as_deref());
            if let Some(error) = unknown {
                tracing::warn!("no copies of node packs are kept on this host: {error}");
            }
            let may_stay = |name: &ObjectName| *name == note || copies.may_stay(name);
            cache.keep_only(names.prefix(), may_stay)?;
            // After that: whoever dies before it does it again.
            match before.as_deref() == Some(copies.segments()) {
                true => Ok(()),
                false => cache.note(&note, copies.segments()),
            }
        });
    }

    /// Removes this host's copies of a customer that cannot be opened: nobody can tell what of it may stay.
    pub fn forget_copies_of(&self, customer: &CustomerName) {
        let prefix = prefix_of(customer);
        self.tidy(|cache| cache.keep_only(&prefix, |_| false));
    }

    fn tidy(&self, tidy: impl FnOnce(&Cached) -> std::io::Result<()>) {
        if let Some(cache) = &self.cache
            && let Err(error) = tidy(cache)
        {
            tracing::warn!("copies of the repository on this host: {error}");
        }
    }

    pub fn keeps_versions(&self) -> bool {
        self.bucket.as_ref().is_some_and(|s3| s3.keeps_versions())
    }

    /// Whether copies may be kept elsewhere of what is deleted here: then nothing can be certified. A
    /// bucket that does not tell may be copied.
    pub fn may_be_copied_elsewhere(&self) -> bool {
        let bucket = self.bucket.as_ref();
        bucket.is_some_and(|s3| s3.is_replicated().unwrap_or(true))
    }

    /// Refuses a bucket that is set up so that what is promised cannot be kept: for whatever would put
    /// more into it. Restoring, and erasing what is due, is always tried.
    pub fn refuse_unfit(&self, config: &Config) -> Result<(), Failure> {
        let (Some(s3), Place::Bucket(bucket)) = (&self.bucket, &config.repository.place) else {
            return Ok(());
        };
        let policies: Vec<_> = config
            .customers
            .iter()
            .map(|customer| (&customer.name, &customer.policy))
            .collect();
        let facts = s3.facts()?;
        let key_prefix = s3.key_prefix("");
        let (regions, locks) = (&bucket.allowed_regions, bucket.lock.is_some());
        let refusals = judge_bucket(&facts, &key_prefix, regions, locks, &policies);
        let Some(first) = refusals.first() else {
            return Ok(());
        };
        let reasons: Vec<&str> = refusals.iter().map(|one| one.reason.as_str()).collect();
        let location = self.storage.location();
        let message = format!("{location}: {}; nothing was written", reasons.join("; "));
        Err(Failure::new(Exit::Usage, message)
            .hint(first.remedy.clone())
            .hint("vmkeep prune and vmkeep restore go on working meanwhile"))
    }
}

fn prefix_of(customer: &CustomerName) -> String {
    CustomerNames::new(customer).prefix().to_string()
}

/// Opens what is there. The exit code says whether there is no repository at all.
pub fn open(config: &Config) -> Result<Store, Failure> {
    match &config.repository.place {
        Place::Directory(path) => match Directory::open(path) {
            Ok(directory) => {
                forget_copies(config);
                Ok(of_directory(directory))
            }
            Err(error) if error.kind == StorageErrorKind::NotFound => {
                Err(Failure::new(Exit::NoRepository, error.to_string())
                    .hint("is the disk mounted? a new repository is made by: vmkeep init"))
            }
            Err(error) => Err(error.into()),
        },
        Place::Bucket(bucket) => open_bucket(bucket, config),
    }
}

/// Makes a directory unless it is there; a bucket is made by whoever pays for it.
pub fn create(config: &Config) -> Result<Store, Failure> {
    let repository = &config.repository;
    match &repository.place {
        Place::Directory(path) => {
            let reserve_bytes = repository.reserve_bytes;
            let directory =
                Directory::init(path, reserve_bytes).map_err(|error| match error.kind {
                    StorageErrorKind::Full => Failure::new(Exit::Failed, error.to_string())
                        .hint("init sets [repository] reserve aside: configure a smaller one")
                        .hint("or give the store more space"),
                    _ => error.into(),
                })?;
            Ok(of_directory(directory))
        }
        Place::Bucket(bucket) => open_bucket(bucket, config),
    }
}

fn of_directory(directory: Directory) -> Store {
    Store {
        storage: Arc::new(directory),
        bucket: None,
        cache: None,
    }
}

fn open_bucket(bucket: &Bucket, config: &Config) -> Result<Store, Failure> {
    let ca_certificates = match &bucket.ca_file {
        None => None,
        Some(file) => Some(secret::read_certificates("repository.s3.ca_file", file)?),
    };
    let credentials = match &bucket.credentials {
        BucketCredentials::Found { profile } => S3Credentials::Found {
            profile: profile.clone(),
        },
        BucketCredentials::Given {
            access_key_id,
            secret_access_key,
        } => S3Credentials::Given {
            access_key_id: access_key_id.clone(),
            secret_access_key: secret::read("repository.s3.secret_access_key_", secret_access_key)?,
        },
    };
    let s3 = S3::open(S3Settings {
        bucket: bucket.name.clone(),
        prefix: bucket.prefix.clone(),
        endpoint: bucket.endpoint.clone(),
        region: bucket.region.clone(),
        path_style: bucket.path_style,
        ca_certificates,
        credentials,
        connections: bucket.connections,
        upload_bytes_per_second: bucket.upload_bytes_per_second,
        download_bytes_per_second: bucket.download_bytes_per_second,
        part_bytes: PART_BYTES,
        patience: PATIENCE,
        ask_first: config.repository.writers == Writers::One,
        may_delete: config.host.role == HostRole::Keeper,
        lock: bucket.lock.map(|mode| S3Lock {
            mode,
            days_below: lock_days(config),
        }),
    })?;
    let s3 = Arc::new(s3);
    let mut store = Store {
        storage: s3.clone(),
        bucket: Some(s3),
        cache: None,
    };
    if bucket.cache_bytes == 0 {
        forget_copies(config);
    } else {
        let folder = config.host.copies_dir();
        let hash_of = |name: &ObjectName| content_hash(name).map(|hash| *hash.as_bytes());
        let far = store.storage.clone();
        let cache = Arc::new(Cached::new(far, folder, bucket.cache_bytes, hash_of));
        store.storage = cache.clone();
        store.cache = Some(cache);
        let prefixes = config.customers.iter();
        let prefixes = prefixes.map(|customer| prefix_of(&customer.name));
        store.tidy(|cache| cache.keep_only_below(&prefixes.collect()));
    }
    Ok(store)
}

/// Of a host that keeps no copies any more: what it kept would outlive what it is of.
fn forget_copies(config: &Config) {
    let folder = config.host.copies_dir();
    if let Err(error) = remove_copies(&folder) {
        tracing::warn!("{}: copies could not be removed: {error}", folder.display());
    }
}

/// How long what is created is locked. A customer whose policy bears no lock is refused before it gets more
/// ([`Store::refuse_unfit`]); what a prune writes for it is not locked.
fn lock_days(config: &Config) -> Vec<(String, u32)> {
    let mut days_below = Vec::new();
    let mut longest = 0;
    for customer in &config.customers {
        let Ok(term) = lock_term(&customer.policy) else {
            continue;
        };
        let names = CustomerNames::new(&customer.name);
        days_below.push((names.probes_prefix(), 0));
        days_below.push((names.points_prefix(), term.record_days));
        days_below.push((names.prefix().to_string(), term.days));
        longest = longest.max(term.days);
    }
    days_below.push((repository_file().to_string(), longest));
    days_below
}
