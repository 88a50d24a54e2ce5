//! What webhooks and pings share: one POST, tried again until its deadline.

use super::retry::{Trouble, until_deadline};
use super::trust::{authorities, client_config, distrust, root_cause};
use super::{NotifyError, NotifyErrorKind};
use crate::model::ReceiverUrl;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::redirect::{Action, Attempt, Policy};
use reqwest::{Client, StatusCode};
use rustls::ClientConfig;
use std::time::Duration;
use zeroize::Zeroizing;

/// Text that is never shown.
pub type Secret = Zeroizing<String>;

const USER_AGENT: &str = concat!("vmkeep/", env!("CARGO_PKG_VERSION"));
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_REDIRECTS: usize = 3;

#[derive(Debug, Clone)]
pub struct HttpSettings {
    /// For people.
    pub name: String,
    pub url: ReceiverUrl,
    /// Trusted instead of the system's certificate authorities: certificates in PEM.
    pub ca_certificates: Option<Vec<u8>>,
    /// All the time that one sending may take, attempts and pauses together.
    pub deadline: Duration,
}

pub(super) struct Poster {
    pub settings: HttpSettings,
    tls: ClientConfig,
}

impl Poster {
    pub fn new(settings: HttpSettings) -> Result<Self, NotifyError> {
        let authorities = match settings.url.is_encrypted() {
            true => authorities(settings.ca_certificates.as_deref()),
            // Nobody is believed there, and nobody asked; but the client panics without any TLS.
            false => Ok(Vec::new()),
        };
        let tls = authorities
            .and_then(client_config)
            .map_err(|why| NotifyError::new(NotifyErrorKind::Misconfigured, &settings.name, why))?;
        Ok(Poster { settings, tls })
    }

    /// `Ok`: it was answered that it was taken. Of the answer no more is read than its head.
    pub fn post(&self, url: &str, headers: &HeaderMap, body: &[u8]) -> Result<(), NotifyError> {
        let settings = &self.settings;
        until_deadline(&settings.name, settings.deadline, async || {
            // A connection belongs to the runtime it was made in.
            let client = self.client()?;
            let request = client.post(url).headers(headers.clone());
            let response = request.body(body.to_vec()).send().await;
            let response = response.map_err(|error| trouble_of(&error))?;
            let wait = response.headers().get(RETRY_AFTER);
            let wait = wait.and_then(|value| parse_retry_after(value.to_str().ok()?));
            judge(response.status(), wait)
        })
    }

    fn client(&self) -> Result<Client, Trouble> {
        let builder = Client::builder()
            .user_agent(USER_AGENT)
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(Policy::custom(follow))
            .tls_backend_preconfigured(self.tls.clone());
        let builder = match self.settings.url.is_encrypted() {
            true => builder,
            // What is not encrypted goes straight to where it is to go.
            false => builder.no_proxy(),
        };
        builder
            .build()
            .map_err(|error| Trouble::new(NotifyErrorKind::Misconfigured, root_cause(&error)))
    }
}

/// To the same host, and only as the same request: others turn a POST into a GET without its body.
fn follow(attempt: Attempt<'_>) -> Action {
    let keeps_method = matches!(attempt.status().as_u16(), 307 | 308);
    let same_place = attempt.previous().first().is_some_and(|first| {
        let url = attempt.url();
        (
            first.scheme(),
            first.host_str(),
            first.port_or_known_default(),
        ) == (url.scheme(), url.host_str(), url.port_or_known_default())
    });
    match keeps_method && same_place && attempt.previous().len() <= MAX_REDIRECTS {
        true => attempt.follow(),
        false => attempt.stop(),
    }
}

fn trouble_of(error: &reqwest::Error) -> Trouble {
    if let Some(why) = distrust(error) {
        return Trouble::new(NotifyErrorKind::Misconfigured, why);
    }
    let kind = match error.is_builder() {
        true => NotifyErrorKind::Misconfigured,
        false => NotifyErrorKind::Transient,
    };
    Trouble::new(kind, format!("cannot be reached: {}", root_cause(error)))
}

fn judge(status: StatusCode, wait: Option<Duration>) -> Result<(), Trouble> {
    let answered = format!("answered {status}");
    if status.is_success() {
        return Ok(());
    }
    if status.is_redirection() {
        let detail = format!("{answered}: another address is not followed, write that one");
        return Err(Trouble::new(NotifyErrorKind::Refused, detail));
    }
    let may_pass = status.is_server_error()
        || matches!(
            status,
            StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS
        );
    Err(match may_pass {
        true => Trouble {
            wait,
            ..Trouble::new(NotifyErrorKind::Transient, answered)
        },
        false => Trouble::new(NotifyErrorKind::Refused, answered),
    })
}

/// In seconds. The other form is a date, which needs two clocks that agree: then our own pause holds.
fn parse_retry_after(text: &str) -> Option<Duration> {
    let seconds: u64 = text.trim().parse().ok()?;
    Some(Duration::from_secs(seconds.min(24 * 3600)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_pass_is_taken_for_it() {
        let kind = |code: u16| {
            let status = StatusCode::from_u16(code).expect("a status");
            judge(status, None).err().map(|trouble| trouble.kind)
        };
        for taken in [200, 201, 202, 204] {
            assert_eq!(kind(taken), None, "{taken}");
        }
        for passing in [408, 425, 429, 500, 502, 503, 504] {
            assert_eq!(kind(passing), Some(NotifyErrorKind::Transient), "{passing}");
        }
        for refusal in [301, 302, 307, 308, 400, 401, 403, 404, 410, 413, 422] {
            assert_eq!(kind(refusal), Some(NotifyErrorKind::Refused), "{refusal}");
        }
    }

    #[test]
    fn the_receiver_says_how_long_to_wait() {
        assert_eq!(parse_retry_after("7"), Some(Duration::from_secs(7)));
        assert_eq!(parse_retry_after(" 0 "), Some(Duration::ZERO));
        for other in ["", "-1", "Wed, 21 Oct 2015 07:28:00 GMT", "1.5"] {
            assert_eq!(parse_retry_after(other), None, "{other}");
        }
        let wait = Some(Duration::from_secs(7));
        let told = judge(StatusCode::SERVICE_UNAVAILABLE, wait).unwrap_err();
        assert_eq!(told.wait, wait);
    }
}
