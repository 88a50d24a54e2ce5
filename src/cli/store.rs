//! The concrete store that a configuration names.

use super::exit::{Exit, Failure};
use crate::config::{Bucket, BucketCredentials, Config, HostRole, Place, SecretSource};
use crate::format::names::{CustomerNames, content_hash, repository_file};
use crate::model::{CustomerName, ObjectName, Writers};
use crate::policy::{judge_bucket, lock_term};
use crate::repository::SealedCustomer;
use crate::storage::{
    Cached, Directory, S3, S3Credentials, S3Lock, S3Settings, Storage, StorageErrorKind,
};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use zeroize::Zeroizing;

/// Larger objects are uploaded in parts of this size, so that little is lost when one fails.
const PART_BYTES: usize = 64 << 20;
/// A store that does not answer for so long is down.
const PATIENCE: Duration = Duration::from_secs(5 * 60);
/// A secret key has some 40 characters.
const MAX_SECRET_BYTES: u64 = 4096;
const MAX_CA_BYTES: u64 = 1 << 20;

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

    fn tidy(&self, tidy: impl FnOnce(&Cached) -> std::io::Result<()>) {
        if let Some(cache) = &self.cache
            && let Err(error) = tidy(cache)
        {
            tracing::warn!("copies of the repository on this host could not be removed: {error}");
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
            Ok(directory) => Ok(of_directory(directory)),
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
            let directory = Directory::init(path, repository.reserve_bytes)?;
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
        Some(file) => Some(
            read_capped(file, MAX_CA_BYTES)
                .map_err(|error| unreadable("ca_file", file, &error))?
                .to_vec(),
        ),
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
            secret_access_key: secret(secret_access_key)?,
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
    if bucket.cache_bytes > 0 {
        let folder = config.host.state_dir.join("cache");
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

/// Reads a secret from where the configuration says it is.
fn secret(source: &SecretSource) -> Result<Zeroizing<String>, Failure> {
    let (what, bytes) = match source {
        SecretSource::File(file) => {
            refuse_readable_by_others(file)?;
            let bytes = read_capped(file, MAX_SECRET_BYTES)
                .map_err(|error| unreadable("secret_access_key_file", file, &error))?;
            (file.display().to_string(), bytes)
        }
        SecretSource::Credential(name) => {
            let folder = std::env::var_os("CREDENTIALS_DIRECTORY").ok_or_else(|| {
                Failure::new(
                    Exit::Usage,
                    format!(
                        "secret_access_key_credential = {name:?}: systemd handed no credentials"
                    ),
                )
                .hint(format!(
                    "in the unit: LoadCredential={name}:/path/of/the/secret"
                ))
                .hint("from a shell: systemd-run --pipe -p LoadCredential=… vmkeep …")
            })?;
            let file = Path::new(&folder).join(name);
            let bytes = read_capped(&file, MAX_SECRET_BYTES)
                .map_err(|error| unreadable("secret_access_key_credential", &file, &error))?;
            (file.display().to_string(), bytes)
        }
        SecretSource::Command(words) => {
            let program = words.first().cloned().unwrap_or_default();
            (format!("what {program} prints"), told_by(words)?)
        }
    };
    let text = std::str::from_utf8(&bytes).map_err(|_| not_a_secret(&what, "is not text"))?;
    let text = text.trim();
    match text.is_empty() || text.chars().any(char::is_control) {
        true => Err(not_a_secret(&what, "is not one line of text")),
        false => Ok(Zeroizing::new(text.to_string())),
    }
}

/// Keys that the whole machine can read are no secrets.
fn refuse_readable_by_others(file: &Path) -> Result<(), Failure> {
    let facts = file
        .metadata()
        .map_err(|error| unreadable("secret_access_key_file", file, &error))?;
    match facts.mode() & 0o007 {
        0 => Ok(()),
        _ => Err(Failure::new(
            Exit::Usage,
            format!("{}: everybody on this machine can read it", file.display()),
        )
        .hint(format!("chmod 0600 {}", file.display()))),
    }
}

fn told_by(words: &[String]) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let Some((program, arguments)) = words.split_first() else {
        let message = "secret_access_key_command names no program";
        return Err(Failure::new(Exit::Usage, message));
    };
    // Without its arguments: one of them may be the secret.
    let failed = |what: String| {
        Failure::new(
            Exit::Usage,
            format!("secret_access_key_command: {program}: {what}"),
        )
    };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let mut bytes = Zeroizing::new(Vec::new());
    if let Some(output) = child.stdout.take() {
        output
            .take(MAX_SECRET_BYTES)
            .read_to_end(&mut bytes)
            .map_err(|error| failed(error.to_string()))?;
    }
    let status = child.wait().map_err(|error| failed(error.to_string()))?;
    match status.success() {
        true => Ok(bytes),
        false => Err(failed(status.to_string())),
    }
}

fn read_capped(file: &Path, max_bytes: u64) -> std::io::Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(Vec::new());
    File::open(file)?
        .take(max_bytes.saturating_add(1))
        .read_to_end(&mut bytes)?;
    match bytes.len() as u64 > max_bytes {
        true => Err(std::io::Error::other(format!(
            "larger than {max_bytes} bytes"
        ))),
        false => Ok(bytes),
    }
}

fn unreadable(key: &str, file: &Path, error: &std::io::Error) -> Failure {
    Failure::new(
        Exit::Usage,
        format!(
            "repository.s3.{key} = {:?}: {error}",
            file.display().to_string()
        ),
    )
}

fn not_a_secret(place: &str, why: &str) -> Failure {
    Failure::new(Exit::Usage, format!("the secret key in {place} {why}"))
}
