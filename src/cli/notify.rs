//! The receivers that a configuration names.

use super::exit::{Exit, Failure};
use super::secret;
use crate::config::{
    self, HeaderSource, MailEncryption, NotifyMail, NotifyPing, NotifyWebhook, UrlSource,
};
use crate::model::ReceiverUrl;
use crate::notify::{
    HttpSettings, JOURNAL_SOCKET, Journal, JournalSettings, Mail, MailSettings, MailTls, Notifier,
    NotifyError, Ping, Secret, Webhook, WebhookSettings,
};
use rustix::fs::fstat;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Everybody who is to be told. One that cannot be used keeps the news from no other.
pub struct Receivers {
    pub notifiers: Vec<Box<dyn Notifier>>,
    pub pings: Vec<Ping>,
    /// By name; why, and what to do.
    pub unusable: Vec<(String, Failure)>,
}

/// Reads what secrets they need.
pub fn receivers(notify: &config::Notify) -> Receivers {
    let mut receivers = Receivers {
        notifiers: Vec::new(),
        pings: Vec::new(),
        unusable: Vec::new(),
    };
    for (position, settings) in notify.webhooks.iter().enumerate() {
        match webhook(settings, notify.timeout, position) {
            Ok(webhook) => receivers.notifiers.push(Box::new(webhook)),
            Err(failure) => receivers.give_up("webhook", position, failure),
        }
    }
    for (position, settings) in notify.mails.iter().enumerate() {
        match mail(settings, notify.timeout, position) {
            Ok(mail) => receivers.notifiers.push(Box::new(mail)),
            Err(failure) => receivers.give_up("mail", position, failure),
        }
    }
    let journal = Journal::new(JournalSettings {
        socket: PathBuf::from(JOURNAL_SOCKET),
    });
    // Where nobody asked for it, it may be absent.
    if notify
        .journald
        .unwrap_or_else(|| speaks_to_journald() && journal.is_there())
    {
        receivers.notifiers.push(Box::new(journal));
    }
    for (position, settings) in notify.pings.iter().enumerate() {
        match ping(settings, notify.timeout, position) {
            Ok(ping) => receivers.pings.push(ping),
            Err(failure) => receivers.give_up("ping", position, failure),
        }
    }
    receivers
}

impl Receivers {
    pub fn is_empty(&self) -> bool {
        self.notifiers.is_empty() && self.pings.is_empty() && self.unusable.is_empty()
    }

    /// Its address may be what could not be read: it is named by its place in the configuration.
    fn give_up(&mut self, what: &str, position: usize, failure: Failure) {
        let name = format!("{what} {} of the configuration", position + 1);
        self.unusable.push((name, failure));
    }
}

/// Whether systemd started this program so: what it prints goes into the journal. The variable alone may
/// have come down from a program above, such as a terminal.
fn speaks_to_journald() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    [fstat(io::stdout()), fstat(io::stderr())]
        .into_iter()
        .flatten()
        .any(|facts| stream == format!("{}:{}", facts.st_dev, facts.st_ino))
}

/// No two receivers have the same name, and none has that of another one that cannot be used for now: what each
/// was told is kept by it.
fn unique(name: String, position: usize) -> String {
    match position {
        0 => name,
        _ => format!("{name} ({})", position + 1),
    }
}

fn webhook(
    settings: &NotifyWebhook,
    timeout: Duration,
    position: usize,
) -> Result<Webhook, Failure> {
    let http = http(
        "webhook",
        &settings.url,
        settings.allow_http,
        settings.ca_file.as_ref(),
        timeout,
        position,
    )?;
    let mut headers = Vec::new();
    for (name, source) in &settings.headers {
        let value = match source {
            HeaderSource::Given(text) => Secret::new(text.clone()),
            HeaderSource::Secret(source) => {
                secret::read(&format!("notify.webhook.headers.{name}."), source)?
            }
        };
        headers.push((name.clone(), value));
    }
    let signing_key = settings.signing_key.as_ref();
    let signing_key = signing_key.map(|source| secret::read("notify.webhook.signing_key_", source));
    Ok(Webhook::new(WebhookSettings {
        http,
        headers,
        signing_key: signing_key.transpose()?,
    })?)
}

fn ping(settings: &NotifyPing, timeout: Duration, position: usize) -> Result<Ping, Failure> {
    Ok(Ping::new(http(
        "ping",
        &settings.url,
        settings.allow_http,
        settings.ca_file.as_ref(),
        timeout,
        position,
    )?)?)
}

fn http(
    what: &str,
    url: &UrlSource,
    allow_http: bool,
    ca_file: Option<&PathBuf>,
    deadline: Duration,
    position: usize,
) -> Result<HttpSettings, Failure> {
    let url = match url {
        UrlSource::Given(url) => url.clone(),
        UrlSource::Secret(source) => {
            let text = secret::read(&format!("notify.{what}.url_"), source)?;
            ReceiverUrl::parse(&text, allow_http)
                .map_err(|why| Failure::new(Exit::Usage, format!("notify.{what}.url: {why}")))?
        }
    };
    Ok(HttpSettings {
        name: unique(format!("{what} {url}"), position),
        url,
        ca_certificates: certificates(what, ca_file)?,
        deadline,
    })
}

fn mail(settings: &NotifyMail, timeout: Duration, position: usize) -> Result<Mail, Failure> {
    let credentials = settings.credentials.as_ref().map(|(username, source)| {
        let password = secret::read("notify.mail.password_", source)?;
        Ok::<_, Failure>((username.clone(), password))
    });
    Ok(Mail::new(MailSettings {
        name: unique(format!("mail {}", settings.server), position),
        server: settings.server.clone(),
        port: settings.port,
        tls: match settings.tls {
            MailEncryption::Starttls => MailTls::Starttls,
            MailEncryption::Tls => MailTls::Wrapped,
            MailEncryption::None => MailTls::None,
        },
        from: settings.from.clone(),
        to: settings.to.clone(),
        credentials: credentials.transpose()?,
        ca_certificates: certificates("mail", settings.ca_file.as_ref())?,
        deadline: timeout,
    })?)
}

fn certificates(what: &str, file: Option<&PathBuf>) -> Result<Option<Vec<u8>>, Failure> {
    file.map(|file| secret::read_certificates(&format!("notify.{what}.ca_file"), file))
        .transpose()
}

impl From<NotifyError> for Failure {
    fn from(error: NotifyError) -> Self {
        Failure::new(Exit::Usage, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Notify, SecretSource};

    fn given(url: &str) -> UrlSource {
        UrlSource::Given(ReceiverUrl::parse(url, false).expect(url))
    }

    fn ping_to(url: UrlSource) -> NotifyPing {
        NotifyPing {
            url,
            allow_http: false,
            ca_file: None,
        }
    }

    #[test]
    fn every_receiver_has_a_name_of_its_own_that_stays_and_none_stands_in_the_way_of_another() {
        let notify = Notify {
            journald: Some(false),
            pings: vec![
                ping_to(given("http://localhost/one")),
                ping_to(given("http://localhost/two")),
                ping_to(UrlSource::Secret(SecretSource::File(
                    "/nonexistent/url".into(),
                ))),
                ping_to(given("http://localhost/four")),
            ],
            ..Notify::default()
        };
        let receivers = receivers(&notify);
        let names: Vec<String> = receivers.pings.iter().map(Ping::name).collect();
        assert_eq!(
            names,
            [
                "ping localhost",
                "ping localhost (2)",
                // Of the fourth, whether the third can be used or not.
                "ping localhost (4)"
            ]
        );
        let [(name, failure)] = receivers.unusable.as_slice() else {
            panic!("one cannot be used");
        };
        assert_eq!(name, "ping 3 of the configuration");
        assert!(failure.message.contains("notify.ping.url_file"));
        assert!(!receivers.is_empty());
        assert!(
            self::receivers(&Notify {
                journald: Some(false),
                ..Notify::default()
            })
            .is_empty()
        );
    }
}
