//! The client of a bucket: transport, trust, credentials, limits.

use super::error::{shown, unsupported};
use super::lock::{S3Lock, ServerClock};
use crate::storage::{StorageError, StorageErrorKind};
use aws_config::BehaviorVersion;
use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::provider_config::ProviderConfig;
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::interceptors::AfterDeserializationInterceptorContextRef;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    ConfigBag, Credentials, Intercept, ProvideCredentials, Region, RequestChecksumCalculation,
    ResponseChecksumValidation, RuntimeComponents, SharedHttpClient,
};
use aws_sdk_s3::error::{BoxError, DisplayErrorContext};
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::time::Instant;
use zeroize::Zeroizing;

/// Where a bucket is, and how to talk to it.
#[derive(Clone)]
pub struct S3Settings {
    pub bucket: String,
    /// Beginning of all our keys, without a slash at either end; `""` for the whole bucket.
    pub prefix: String,
    /// `None`: the region's endpoint of AWS.
    pub endpoint: Option<String>,
    pub region: String,
    /// The bucket in the path instead of in the host name.
    pub path_style: bool,
    /// Trusted instead of the system's certificate authorities: certificates in PEM.
    pub ca_certificates: Option<Vec<u8>>,
    pub credentials: S3Credentials,
    /// Requests under way at once.
    pub connections: usize,
    pub upload_bytes_per_second: Option<u64>,
    pub download_bytes_per_second: Option<u64>,
    /// Objects larger than this are uploaded in parts of this size.
    pub part_bytes: usize,
    /// A call that fails for what may pass is not repeated any more after this time.
    pub patience: Duration,
    /// Whether the server is known to ignore `If-None-Match`: it is asked first whether a name is
    /// free, and whoever opens the store sees to it that there is one writer.
    pub ask_first: bool,
    /// Whether anything is ever deleted. A key that need not delete is worth less to who steals it.
    pub may_delete: bool,
    /// Whether what is created is locked.
    pub lock: Option<S3Lock>,
}

/// Who we are to the server.
#[derive(Clone)]
pub enum S3Credentials {
    /// Environment, shared profile (a named one, or the default), process, web identity, instance role.
    Found { profile: Option<String> },
    Given {
        access_key_id: String,
        secret_access_key: Zeroizing<String>,
    },
}

impl S3Settings {
    /// As people write it, with the endpoint.
    pub fn location(&self) -> String {
        let place = match self.prefix.as_str() {
            "" => format!("s3://{}", self.bucket),
            prefix => format!("s3://{}/{prefix}", self.bucket),
        };
        match &self.endpoint {
            Some(endpoint) => format!("{place} at {endpoint}"),
            None => format!("{place} in {}", self.region),
        }
    }
}

/// A transfer that is slower than this is taken for one that hangs.
pub const SLOWEST_BYTES_PER_SECOND: u64 = 64 << 10;
const CREDENTIALS_ATTEMPTS: u32 = 3;
const CREDENTIALS_PAUSE: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// They drive sockets and sum payloads for signatures.
const RUNTIME_THREADS: usize = 2;

pub(super) fn runtime(settings: &S3Settings) -> Result<Runtime, StorageError> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(RUNTIME_THREADS)
        .thread_name("s3")
        .enable_io()
        .enable_time()
        .build()
        .map_err(|error| unsupported(settings.location(), format!("starting threads: {error}")))
}

pub(super) async fn client(
    settings: &S3Settings,
    clock: ServerClock,
) -> Result<Client, StorageError> {
    let http = transport(settings)?;
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .build();
    let mut config = aws_sdk_s3::config::Builder::new()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(settings.region.clone()))
        .force_path_style(settings.path_style)
        .http_client(http.clone())
        .interceptor(clock)
        .interceptor(WholeAnswers)
        .retry_config(RetryConfig::disabled())
        .timeout_config(timeouts)
        // The payload's signature is what every server checks; trailing checksums are what some
        // reject.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
    if let Some(endpoint) = &settings.endpoint {
        config = config.endpoint_url(endpoint);
    }
    config = match &settings.credentials {
        S3Credentials::Given {
            access_key_id,
            secret_access_key,
        } => config.credentials_provider(Credentials::new(
            access_key_id,
            secret_access_key.as_str(),
            None,
            None,
            "configuration",
        )),
        S3Credentials::Found { profile } => {
            let surroundings = ProviderConfig::default()
                .with_http_client(http)
                .with_region(Some(Region::new(settings.region.clone())));
            let mut chain = DefaultCredentialsChain::builder().configure(surroundings);
            if let Some(profile) = profile {
                chain = chain.profile_name(profile);
            }
            let chain = chain.build().await;
            refuse_without_credentials(settings, &chain).await?;
            config.credentials_provider(chain)
        }
    };
    Ok(Client::from_conf(config.build()))
}

/// Refuses answers that broke off where a proxy or server said that they were whole: the client reads
/// what is there, and takes what is missing for what does not exist.
#[derive(Debug)]
struct WholeAnswers;

impl Intercept for WholeAnswers {
    fn name(&self) -> &'static str {
        "whole answers"
    }

    fn read_after_deserialization(
        &self,
        context: &AfterDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _settings: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let response = context.response();
        // `None`: the bytes of an object, which are still on their way.
        let body = response.body().bytes().unwrap_or_default();
        match response.status().is_success() && !is_whole(body) {
            true => Err("the answer broke off".into()),
            false => Ok(()),
        }
    }
}

/// Whether the outermost element of an XML document is closed. What is no XML is not judged.
fn is_whole(body: &[u8]) -> bool {
    let body = body.trim_ascii();
    let mut rest = body;
    while rest.starts_with(b"<?") || rest.starts_with(b"<!") {
        let end = rest.iter().position(|byte| *byte == b'>');
        rest = match end.and_then(|end| rest.get(end + 1..)) {
            Some(after) => after.trim_ascii_start(),
            None => return false,
        };
    }
    let Some(inside) = rest.strip_prefix(b"<") else {
        return rest.len() == body.len();
    };
    let is_end = |byte: &u8| byte.is_ascii_whitespace() || matches!(*byte, b'>' | b'/');
    let name = inside.split(is_end).next().unwrap_or_default();
    let closed = [b"</".as_slice(), name, b">".as_slice()].concat();
    let is_empty = inside.ends_with(b"/>") && !inside.contains(&b'<');
    is_empty || inside.ends_with(&closed)
}

/// The client takes missing credentials for a fault that may pass, and would ask for them until patience
/// is over.
async fn refuse_without_credentials(
    settings: &S3Settings,
    chain: &DefaultCredentialsChain,
) -> Result<(), StorageError> {
    let mut attempt = 1;
    loop {
        let error = match chain.provide_credentials().await {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        let kind = match error {
            CredentialsError::CredentialsNotLoaded(_)
            | CredentialsError::InvalidConfiguration(_) => StorageErrorKind::Denied,
            // A role's server that does not answer for now. It was asked more than once already.
            _ if attempt < CREDENTIALS_ATTEMPTS => {
                attempt += 1;
                tokio::time::sleep(CREDENTIALS_PAUSE).await;
                continue;
            }
            _ => StorageErrorKind::Transient,
        };
        let why = DisplayErrorContext(&error);
        let detail = format!(
            "no credentials: none in [repository.s3], and environment, shared profile, process and \
             instance role give none ({why})"
        );
        return Err(StorageError::new(kind, settings.location(), shown(&detail)));
    }
}

fn transport(settings: &S3Settings) -> Result<SharedHttpClient, StorageError> {
    let trust = match &settings.ca_certificates {
        None => TrustStore::default(),
        Some(pem) => {
            check_certificates(pem)
                .map_err(|why| unsupported(settings.location(), format!("ca_file: {why}")))?;
            TrustStore::empty().with_pem_certificate(pem.as_slice())
        }
    };
    let tls = TlsContext::builder()
        .with_trust_store(trust)
        .build()
        .map_err(|error| unsupported(settings.location(), format!("TLS: {error}")))?;
    Ok(aws_smithy_http_client::Builder::new()
        .tls_provider(Provider::Rustls(CryptoMode::Ring))
        .tls_context(tls)
        .build_https())
}

/// The client panics where it is given certificates that are none.
fn check_certificates(pem: &[u8]) -> Result<(), String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|error| format!("not PEM: {error}"))?;
        roots
            .add(certificate)
            .map_err(|error| format!("not a certificate: {error}"))?;
    }
    match roots.is_empty() {
        true => Err("no certificate in PEM is in it".to_string()),
        false => Ok(()),
    }
}

/// Bytes a second, for all requests together. Whoever is about to move bytes waits until those that
/// were let through before have had their time; so the rate is kept over objects, not within one, and
/// nobody waits between a request and its answer.
pub(super) struct Rate {
    bytes_per_second: Option<u64>,
    free_from: Mutex<Option<Instant>>,
}

impl Rate {
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        Rate {
            bytes_per_second,
            free_from: Mutex::default(),
        }
    }

    /// Waits for the turn of so many bytes.
    pub(super) async fn wait(&self, bytes: u64) {
        if let Some(turn) = self.take(bytes, Instant::now()) {
            tokio::time::sleep_until(turn).await;
        }
    }

    /// For bytes whose number was not known before they came: the next ones wait for them.
    pub(super) fn moved(&self, bytes: u64) {
        self.take(bytes, Instant::now());
    }

    /// When these bytes may begin to move; those after them wait until they have.
    fn take(&self, bytes: u64, now: Instant) -> Option<Instant> {
        let bytes_per_second = self.bytes_per_second?;
        let takes = Duration::from_secs_f64(bytes as f64 / bytes_per_second.max(1) as f64);
        let mut free_from = self
            .free_from
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let turn = free_from.map_or(now, |free_from| free_from.max(now));
        *free_from = Some(turn + takes);
        Some(turn)
    }
}

impl fmt::Debug for S3Settings {
    /// Without anything that is a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.location())
    }
}

#[cfg(test)]
mod tests {
    use super::{Rate, check_certificates, is_whole};
    use std::time::Duration;
    use tokio::time::Instant;

    #[test]
    fn bytes_wait_for_those_before_them_and_not_for_themselves() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let rate = Rate::new(Some(10));
        let turns = [20, 30, 1000].map(|bytes| rate.take(bytes, at(0)));
        assert_eq!(turns, [0, 2, 5].map(|seconds| Some(at(seconds))));
        // What has had its time is not waited for, and nothing is saved up.
        assert_eq!(rate.take(10, at(500)), Some(at(500)));
        assert_eq!(rate.take(10, at(500)), Some(at(501)));
        assert_eq!(Rate::new(None).take(1000, at(0)), None);
    }

    #[test]
    fn an_answer_is_whole_if_its_outermost_element_is_closed() {
        let list = "<?xml version=\"1.0\"?>\n<List xmlns=\"x\"><Is>false</Is><Key>a</Key></List>";
        for whole in [
            list,
            "\n <List></List>\n",
            "<?xml version=\"1.0\"?><List/>",
            "<List xmlns=\"http://x/y/\" />",
            "",
            "{\"Statement\": []}",
        ] {
            assert!(is_whole(whole.as_bytes()), "{whole}");
        }
        for length in 1..list.len() {
            let cut = &list[..length];
            assert!(!is_whole(cut.as_bytes()), "{cut}");
        }
        assert!(!is_whole(b"<List><Key/>"));
        assert!(!is_whole(b"<List><List></Lis"));
    }

    #[test]
    fn what_is_no_certificate_is_refused_before_the_client_panics_over_it() {
        for (bad, said) in [
            (&b""[..], "no certificate"),
            (b"-----BEGIN CERTIFICATE-----\n", "PEM"),
            (
                b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
                "not a certificate",
            ),
        ] {
            let told = check_certificates(bad).unwrap_err();
            assert!(told.contains(said), "{told}");
        }
    }
}
