//! `url = "s3://bucket/prefix"` and `[repository.s3]`.

use super::customer::check_path;
use super::problem::Problem;
use super::secret::{SecretKeys, SecretSource, is_word, read_sources};
use super::section::Section;
use crate::model::{LockMode, ObjectName};
use std::path::PathBuf;

const DEFAULT_CONNECTIONS: usize = 8;
const MAX_CONNECTIONS: i64 = 256;
/// The index of some 2 TiB of chunks.
const DEFAULT_CACHE_BYTES: u64 = 1 << 30;
/// What servers that have no regions take for one.
const DEFAULT_REGION: &str = "us-east-1";

const SECRET_ACCESS_KEY: SecretKeys = SecretKeys {
    file: "secret_access_key_file",
    command: "secret_access_key_command",
    credential: "secret_access_key_credential",
};

/// A repository in a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    pub name: String,
    /// Beginning of all keys; `""` for the whole bucket.
    pub prefix: String,
    /// `None`: the region's endpoint of AWS.
    pub endpoint: Option<String>,
    pub region: String,
    pub path_style: bool,
    /// Trusted instead of the system's certificate authorities.
    pub ca_file: Option<PathBuf>,
    pub credentials: BucketCredentials,
    /// The bucket is in one of these, or nothing is written; empty: anywhere.
    pub allowed_regions: Vec<String>,
    /// What is created is locked in this way, so that no stolen key can delete it.
    pub lock: Option<LockMode>,
    /// Requests under way at once.
    pub connections: usize,
    pub upload_bytes_per_second: Option<u64>,
    pub download_bytes_per_second: Option<u64>,
    /// Copies of the index on this host; 0: none.
    pub cache_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BucketCredentials {
    /// Where the tools of AWS look: environment, shared files, process, instance role.
    Found { profile: Option<String> },
    Given {
        access_key_id: String,
        secret_access_key: SecretSource,
    },
}

/// Reads the url and the table `[repository.s3]`; `None` after a problem.
pub(super) fn read_bucket(
    url: &str,
    repository: &mut Section<'_>,
    problems: &mut Vec<Problem>,
) -> Option<Bucket> {
    let found = problems.len();
    let (name, prefix) = match parse_url(url) {
        Ok(parts) => parts,
        Err(message) => {
            problems.push(repository.problem("url", message));
            return None;
        }
    };
    let mut bucket = Bucket {
        name,
        prefix,
        endpoint: None,
        region: DEFAULT_REGION.to_string(),
        path_style: false,
        ca_file: None,
        credentials: BucketCredentials::Found { profile: None },
        allowed_regions: Vec::new(),
        lock: None,
        connections: DEFAULT_CONNECTIONS,
        upload_bytes_per_second: None,
        download_bytes_per_second: None,
        cache_bytes: DEFAULT_CACHE_BYTES,
    };
    match repository.table("s3", problems) {
        Some(section) => read_s3(section, &mut bucket, problems),
        None if !repository.contains("s3") => problems.push(repository.problem(
            "url",
            "a bucket needs [repository.s3] with endpoint = \"https://…\", or region = \"…\" for AWS",
        )),
        None => {}
    }
    (problems.len() == found).then_some(bucket)
}

/// Bucket and prefix of `s3://bucket/prefix`.
fn parse_url(url: &str) -> Result<(String, String), String> {
    let example = "write \"s3://bucket\" or \"s3://bucket/prefix\"";
    let Some(rest) = url.strip_prefix("s3://") else {
        return Err(format!("{url:?} is not a bucket: {example}"));
    };
    let (name, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    // https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html
    let is_edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let is_name = (3..=63).contains(&name.len())
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.' | '_'))
        && is_edge(name.chars().next())
        && is_edge(name.chars().next_back());
    if !is_name {
        return Err(format!("{name:?} is not the name of a bucket: {example}"));
    }
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    if !prefix.is_empty() && ObjectName::new(prefix).is_err() {
        return Err(format!(
            "the prefix {prefix:?} has letters, digits, '.', '-', '_', and single slashes between"
        ));
    }
    Ok((name.to_string(), prefix.to_string()))
}

fn read_s3(mut section: Section<'_>, bucket: &mut Bucket, problems: &mut Vec<Problem>) {
    let endpoint = section.text("endpoint", problems);
    let http_allowed = section.boolean("allow_http", problems).unwrap_or(false);
    if let Some(endpoint) = endpoint {
        match check_endpoint(endpoint, http_allowed) {
            Ok(()) => bucket.endpoint = Some(endpoint.trim_end_matches('/').to_string()),
            Err(message) => problems.push(section.problem("endpoint", message)),
        }
    }
    match section.text("region", problems) {
        Some(region) if is_word(region) => bucket.region = region.to_string(),
        Some(_) => problems.push(section.problem("region", "such as \"eu-central-1\"")),
        None if endpoint.is_none() => problems.push(section.problem(
            "region",
            "is missing: the bucket's region at AWS, or endpoint = \"https://…\" for another server",
        )),
        None => {}
    }
    bucket.path_style = section
        .boolean("path_style", problems)
        .unwrap_or(endpoint.is_some());
    bucket.ca_file = section.text("ca_file", problems).map(PathBuf::from);
    if let Some(ca_file) = &bucket.ca_file {
        check_path(&section, "ca_file", ca_file, problems);
    }
    let allowed = section.texts("allowed_regions", problems);
    if !allowed.iter().all(|region| is_word(region)) {
        problems.push(section.problem(
            "allowed_regions",
            "such as [\"eu-central-1\", \"eu-west-1\"]",
        ));
    }
    bucket.allowed_regions = allowed.into_iter().map(str::to_string).collect();
    let modes = [LockMode::Governance, LockMode::Compliance].map(|mode| (mode.as_str(), mode));
    bucket.lock = section.one_of("lock", modes, problems);
    match section.integer("connections", problems) {
        None => {}
        Some(connections @ 1..=MAX_CONNECTIONS) => {
            bucket.connections = usize::try_from(connections).unwrap_or(DEFAULT_CONNECTIONS);
        }
        Some(_) => {
            problems.push(section.problem("connections", format!("1 to {MAX_CONNECTIONS}")));
        }
    }
    bucket.upload_bytes_per_second = read_limit("upload_limit", &mut section, problems);
    bucket.download_bytes_per_second = read_limit("download_limit", &mut section, problems);
    if let Some(bytes) = section.bytes("cache_size", problems) {
        bucket.cache_bytes = bytes;
    }
    if let Some(credentials) = read_credentials(&mut section, problems) {
        bucket.credentials = credentials;
    }
    section.finish(
        &[
            ("url", "belongs in [repository]"),
            ("role", "belongs in [host]"),
            ("bucket", "is in the url: url = \"s3://bucket/prefix\""),
            (
                "secret_access_key",
                "a secret does not stand in the configuration: secret_access_key_file, \
                 secret_access_key_command or secret_access_key_credential",
            ),
        ],
        problems,
    );
}

/// Bytes a second.
fn read_limit(
    key: &'static str,
    section: &mut Section<'_>,
    problems: &mut Vec<Problem>,
) -> Option<u64> {
    let limit = section.bytes(key, problems)?;
    // Slower than what counts as hanging, no night would end.
    if limit < 64 << 10 {
        problems.push(section.problem(key, "at least \"64 KiB\" (a second)"));
    }
    Some(limit)
}

fn read_credentials(
    section: &mut Section<'_>,
    problems: &mut Vec<Problem>,
) -> Option<BucketCredentials> {
    let profile = section.text("profile", problems).map(str::to_string);
    let access_key_id = section.text("access_key_id", problems);
    let mut sources = read_sources(&SECRET_ACCESS_KEY, section, problems);
    match (access_key_id, sources.pop(), sources.is_empty()) {
        (None, None, _) => Some(BucketCredentials::Found { profile }),
        (Some(_), Some(_), _) if profile.is_some() => {
            problems.push(section.problem("profile", "either a profile or an access_key_id"));
            None
        }
        (Some(access_key_id), Some(secret_access_key), true) => Some(BucketCredentials::Given {
            access_key_id: access_key_id.to_string(),
            secret_access_key,
        }),
        (Some(_), None, _) => {
            problems.push(section.problem(
                "access_key_id",
                "needs secret_access_key_file, secret_access_key_command or \
                 secret_access_key_credential",
            ));
            None
        }
        (None, Some(_), _) => {
            problems.push(section.problem("access_key_id", "is missing beside its secret key"));
            None
        }
        (Some(_), Some(_), false) => {
            problems.push(section.problem(
                "access_key_id",
                "its secret key is given in more than one way",
            ));
            None
        }
    }
}

fn check_endpoint(endpoint: &str, http_allowed: bool) -> Result<(), String> {
    let rest = match (
        endpoint.strip_prefix("https://"),
        endpoint.strip_prefix("http://"),
    ) {
        (Some(rest), _) => rest,
        (None, Some(rest)) if http_allowed => rest,
        (None, Some(_)) => {
            return Err(
                "http sends everything in the clear (sealed, but signed requests can be seen); \
                 if that is meant: allow_http = true"
                    .to_string(),
            );
        }
        (None, None) => return Err("such as \"https://s3.example.net\"".to_string()),
    };
    let host = rest.trim_end_matches('/');
    let is_host = !host.is_empty()
        && host
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '[' | ']'));
    match is_host {
        true => Ok(()),
        false => Err("a host and perhaps a port, such as \"https://s3.example.net:9000\"".into()),
    }
}
