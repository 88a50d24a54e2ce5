use super::document::document;
use super::http::{HttpSettings, Poster, Secret};
use super::{Message, Notifier, NotifyError, NotifyErrorKind};
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use ring::hmac;
use std::fmt::Write;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const SIGNATURE: HeaderName = HeaderName::from_static("vmkeep-signature");
/// Characters of a hash: 128 bits.
const KEY_DIGITS: usize = 32;

#[derive(Clone)]
pub struct WebhookSettings {
    pub http: HttpSettings,
    /// Beside those of the request itself.
    pub headers: Vec<(String, Secret)>,
    /// Each body is signed with it, so that the receiver knows whose it is.
    pub signing_key: Option<Secret>,
}

/// A POST with one JSON document (`notify::document`).
///
/// `Idempotency-Key` is a hash of the body: the same for every attempt, so that a receiver which took
/// one whose answer was lost takes the next for what it is. With a signing key,
/// `Vmkeep-Signature: sha256=…` is the HMAC-SHA256 of the body in hexadecimal digits.
pub struct Webhook {
    poster: Poster,
    headers: HeaderMap,
    signing_key: Option<hmac::Key>,
}

impl Webhook {
    pub fn new(settings: WebhookSettings) -> Result<Self, NotifyError> {
        let name = settings.http.name.clone();
        let mut headers = HeaderMap::new();
        for (header, value) in &settings.headers {
            let wrong = |why: &str| {
                let detail = format!("the header {header:?} {why}");
                NotifyError::new(NotifyErrorKind::Misconfigured, &name, detail)
            };
            let key = HeaderName::from_bytes(header.as_bytes());
            let key = key.map_err(|_| wrong("has no valid name"))?;
            let value = HeaderValue::from_str(value);
            let mut value = value.map_err(|_| wrong("has a value that no header can have"))?;
            value.set_sensitive(true);
            headers.insert(key, value);
        }
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(Webhook {
            poster: Poster::new(settings.http)?,
            headers,
            signing_key: settings
                .signing_key
                .map(|key| hmac::Key::new(hmac::HMAC_SHA256, key.as_bytes())),
        })
    }

    fn headers_of(&self, body: &[u8]) -> HeaderMap {
        let mut headers = self.headers.clone();
        let hash = blake3::hash(body).to_hex();
        let key = hash.get(..KEY_DIGITS).unwrap_or(&hash);
        if let Ok(key) = HeaderValue::from_str(key) {
            headers.insert(IDEMPOTENCY_KEY, key);
        }
        if let Some(key) = &self.signing_key
            && let Ok(signature) = HeaderValue::from_str(&signature(key, body))
        {
            headers.insert(SIGNATURE, signature);
        }
        headers
    }
}

fn signature(key: &hmac::Key, body: &[u8]) -> String {
    let mut text = "sha256=".to_string();
    for byte in hmac::sign(key, body).as_ref() {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

impl Notifier for Webhook {
    fn name(&self) -> String {
        self.poster.settings.name.clone()
    }

    fn send(&self, messages: &[Message]) -> Result<(), NotifyError> {
        if messages.is_empty() {
            return Ok(());
        }
        let body = document(messages).to_string().into_bytes();
        let url = self.poster.settings.url.secret_text();
        self.poster.post(url, &self.headers_of(&body), &body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ReceiverUrl;
    use std::time::Duration;

    fn settings(headers: &[(&str, &str)]) -> WebhookSettings {
        let secret = |text: &str| Secret::new(text.to_string());
        WebhookSettings {
            http: HttpSettings {
                name: "webhook localhost".to_string(),
                url: ReceiverUrl::parse("http://localhost/s3cret", false).expect("an address"),
                ca_certificates: None,
                deadline: Duration::from_secs(1),
            },
            headers: headers
                .iter()
                .map(|(name, value)| (name.to_string(), secret(value)))
                .collect(),
            signing_key: Some(secret("key")),
        }
    }

    #[test]
    fn a_body_is_signed_as_others_do_and_keeps_its_key() {
        let webhook = Webhook::new(settings(&[])).expect("a webhook");
        let body = b"The quick brown fox jumps over the lazy dog";
        let headers = webhook.headers_of(body);
        // The example of RFC 2104's readers.
        assert_eq!(
            headers.get("Vmkeep-Signature").expect("signed"),
            "sha256=f7bc83f430538424b13298e6aa6fb143ef4d59a14946175997479dbc2d1a3cd8"
        );
        let key = headers.get("Idempotency-Key").expect("a key");
        assert_eq!(key.len(), KEY_DIGITS);
        assert_eq!(webhook.headers_of(body), headers);
        assert_ne!(
            webhook.headers_of(b"other").get("Idempotency-Key"),
            Some(key)
        );
    }

    #[test]
    fn a_header_that_cannot_be_sent_is_named_without_its_value() {
        for (name, value) in [
            ("Authorization", "Bearer s3cret\r\nX: y"),
            ("a b", "s3cret"),
        ] {
            let error = match Webhook::new(settings(&[(name, value)])) {
                Err(error) => error,
                Ok(_) => panic!("{name} was taken"),
            };
            assert_eq!(error.kind, NotifyErrorKind::Misconfigured);
            let told = error.to_string();
            assert!(told.contains(name) && !told.contains("s3cret"), "{told}");
        }
    }
}
