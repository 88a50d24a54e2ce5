use super::document::{one_line, subject, text};
use super::http::Secret;
use super::retry::{Trouble, until_deadline};
use super::trust::{authorities, distrust, root_cause};
use super::{Message, Notifier, NotifyError, NotifyErrorKind};
use lettre::Message as Letter;
use lettre::message::header::{ContentType, Header, HeaderName, HeaderValue};
use lettre::message::{Mailbox, MessageBuilder};
use lettre::transport::smtp::authentication::{Credentials, Mechanism};
use lettre::transport::smtp::client::{
    AsyncSmtpConnection, Certificate, CertificateStore, TlsParameters,
};
use lettre::transport::smtp::commands::{Data, Mail as MailFrom, Rcpt};
use lettre::transport::smtp::extension::ClientId;
use std::time::{Duration, SystemTime};
use tokio::time::timeout;

/// The mail is delivered by then: politeness takes no longer.
const QUIT_PATIENCE: Duration = Duration::from_secs(1);
const MAX_REPLY_CHARS: usize = 200;
/// Digits of a hash that names a mail.
const ID_DIGITS: usize = 32;

/// How a connection is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MailTls {
    /// Begun in the clear, and refused where the server does not offer to encrypt it.
    Starttls,
    /// From the first byte.
    Wrapped,
    None,
}

#[derive(Clone)]
pub struct MailSettings {
    /// For people.
    pub name: String,
    pub server: String,
    pub port: u16,
    pub tls: MailTls,
    /// `name@example.com` or `Name <name@example.com>`.
    pub from: String,
    pub to: Vec<String>,
    pub credentials: Option<(String, Secret)>,
    /// Trusted instead of the system's certificate authorities: certificates in PEM.
    pub ca_certificates: Option<Vec<u8>>,
    /// All the time that one mail may take, attempts and pauses together.
    pub deadline: Duration,
}

/// A mail in plain text for each sending.
///
/// Its `Message-ID` is a hash of what it says: the same for every attempt, so that mail programs show
/// one whose confirmation was lost only once. It is `Auto-Submitted`: no absence note answers it.
pub struct Mail {
    settings: MailSettings,
    from: Mailbox,
    to: Vec<Mailbox>,
    tls: Option<TlsParameters>,
}

impl Mail {
    pub fn new(settings: MailSettings) -> Result<Self, NotifyError> {
        let wrong = |detail: String| {
            NotifyError::new(NotifyErrorKind::Misconfigured, &settings.name, detail)
        };
        let from = parse_mailbox(&settings.from).map_err(wrong)?;
        let to = settings.to.iter().map(|one| parse_mailbox(one));
        let to = to.collect::<Result<Vec<_>, _>>().map_err(wrong)?;
        if to.is_empty() {
            return Err(wrong("no recipient".to_string()));
        }
        let tls = match settings.tls {
            MailTls::None => None,
            MailTls::Starttls | MailTls::Wrapped => Some(tls_of(&settings).map_err(wrong)?),
        };
        Ok(Mail {
            from,
            to,
            tls,
            settings,
        })
    }

    /// Takes those who have it out of `left`.
    async fn deliver<'a>(
        &'a self,
        letter: &[u8],
        hello: &ClientId,
        left: &mut Vec<&'a Mailbox>,
    ) -> Result<(), Trouble> {
        let settings = &self.settings;
        let mut connection = AsyncSmtpConnection::connect_tokio1(
            (settings.server.as_str(), settings.port),
            None,
            hello,
            self.tls
                .clone()
                .filter(|_| settings.tls == MailTls::Wrapped),
            None,
        )
        .await
        .map_err(|error| self.trouble_of("connecting", &error))?;
        if let (MailTls::Starttls, Some(tls)) = (settings.tls, &self.tls) {
            if !connection.can_starttls() {
                return Err(Trouble::new(
                    NotifyErrorKind::Refused,
                    "the server offers no STARTTLS, and nothing is sent in the clear; perhaps it \
                     has tls = \"tls\" on port 465",
                ));
            }
            connection
                .starttls(tls.clone(), hello)
                .await
                .map_err(|error| self.trouble_of("STARTTLS", &error))?;
        }
        if let Some((username, password)) = &settings.credentials {
            let credentials = Credentials::new(username.clone(), password.to_string());
            connection
                .auth(&[Mechanism::Plain, Mechanism::Login], &credentials)
                .await
                .map_err(|error| self.trouble_of("signing in", &error))?;
        }
        let transferred = self.transfer(&mut connection, letter, left).await;
        let _ = timeout(QUIT_PATIENCE, connection.quit()).await;
        transferred
    }

    /// One recipient that the server does not take keeps it from no other.
    async fn transfer<'a>(
        &'a self,
        connection: &mut AsyncSmtpConnection,
        letter: &[u8],
        left: &mut Vec<&'a Mailbox>,
    ) -> Result<(), Trouble> {
        let from = Some(self.from.email.clone());
        let told = connection.command(MailFrom::new(from, Vec::new())).await;
        told.map_err(|error| self.trouble_of("the sender", &error))?;
        let mut refused = Vec::new();
        let mut troubles = Vec::new();
        for recipient in left.iter() {
            let rcpt = Rcpt::new(recipient.email.clone(), Vec::new());
            if let Err(error) = connection.command(rcpt).await {
                let trouble = self.trouble_of(recipient.email.as_ref(), &error);
                if error.status().is_none() {
                    return Err(trouble);
                }
                refused.push(*recipient);
                troubles.push(trouble);
            }
        }
        if refused.len() < left.len() {
            let data = connection.command(Data).await;
            data.map_err(|error| self.trouble_of("the mail", &error))?;
            let taken = connection.message(letter).await;
            taken.map_err(|error| self.trouble_of("the mail", &error))?;
        }
        *left = refused;
        if left.is_empty() {
            return Ok(());
        }
        // One who is only put off is asked again, and with it those who are not, who say no again.
        let may_pass = |one: &Trouble| one.kind == NotifyErrorKind::Transient;
        let kind = match troubles.iter().any(may_pass) {
            true => NotifyErrorKind::Transient,
            false => NotifyErrorKind::Refused,
        };
        let details: Vec<String> = troubles.into_iter().map(|one| one.detail).collect();
        Err(Trouble::new(kind, details.join("; ")))
    }

    fn trouble_of(&self, step: &str, error: &lettre::transport::smtp::Error) -> Trouble {
        if let Some(why) = distrust(error) {
            return Trouble::new(NotifyErrorKind::Misconfigured, why);
        }
        let kind = match error.is_permanent() || error.is_client() {
            true => NotifyErrorKind::Refused,
            false => NotifyErrorKind::Transient,
        };
        let said = self.harmless(&root_cause(error));
        Trouble::new(
            kind,
            match error.status() {
                Some(code) => format!("{step}: the server answered {code} {said}"),
                None => format!("{step}: {said}"),
            },
        )
    }

    /// What a server says is shown in one line, unless it repeats our password.
    fn harmless(&self, said: &str) -> String {
        let password = self.settings.credentials.as_ref();
        if password.is_some_and(|(_, password)| said.contains(password.as_str())) {
            return "(what it said repeats the password)".to_string();
        }
        one_line(said).chars().take(MAX_REPLY_CHARS).collect()
    }

    fn letter(&self, messages: &[Message]) -> Result<Letter, NotifyError> {
        let wrong = |detail: String| {
            NotifyError::new(NotifyErrorKind::Misconfigured, &self.settings.name, detail)
        };
        let subject = subject(messages);
        let text = text(messages);
        let date = messages.iter().map(|message| message.at).max();
        let date = date.map(SystemTime::from).unwrap_or(SystemTime::UNIX_EPOCH);
        let mut hash = blake3::Hasher::new();
        for part in [&subject, &text] {
            hash.update(part.as_bytes()).update(&[0]);
        }
        let id: String = hash.finalize().to_hex().chars().take(ID_DIGITS).collect();
        let id = format!("<{id}@{}>", self.from.email.domain());
        let mut builder: MessageBuilder = Letter::builder()
            .from(self.from.clone())
            .subject(subject)
            .date(date)
            .message_id(Some(id))
            .header(AutoSubmitted)
            .header(ContentType::TEXT_PLAIN);
        for recipient in &self.to {
            builder = builder.to(recipient.clone());
        }
        let letter = builder.body(text);
        letter.map_err(|error| wrong(format!("no mail can be made of it: {error}")))
    }
}

impl Notifier for Mail {
    fn name(&self) -> String {
        self.settings.name.clone()
    }

    fn send(&self, messages: &[Message]) -> Result<(), NotifyError> {
        let Some(first) = messages.first() else {
            return Ok(());
        };
        let letter = self.letter(messages)?.formatted();
        let hello = hello_of(&first.host);
        let (name, deadline) = (&self.settings.name, self.settings.deadline);
        let mut left: Vec<&Mailbox> = self.to.iter().collect();
        let sent = until_deadline(name, deadline, async || {
            self.deliver(&letter, &hello, &mut left).await
        });
        match sent {
            Err(error) if !left.is_empty() && left.len() < self.to.len() => {
                let detail = format!("the other recipients have it, but not: {}", error.detail);
                Err(NotifyError::new(NotifyErrorKind::Partly, name, detail))
            }
            // Also if the farewell was not answered in time.
            _ if left.is_empty() => Ok(()),
            sent => sent,
        }
    }
}

/// A host that has no name on the Internet introduces itself by an address.
fn hello_of(host: &str) -> ClientId {
    let is_domain = host.contains('.')
        && host
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-'));
    match is_domain {
        true => ClientId::Domain(host.to_string()),
        false => ClientId::default(),
    }
}

fn parse_mailbox(text: &str) -> Result<Mailbox, String> {
    let wrong = |error: lettre::address::AddressError| format!("{text:?} is no address: {error}");
    let mailbox: Mailbox = text.parse().map_err(wrong)?;
    match text.contains(char::is_control) || !mailbox.email.to_string().is_ascii() {
        true => Err(format!("{text:?} is no address that every server takes")),
        false => Ok(mailbox),
    }
}

fn tls_of(settings: &MailSettings) -> Result<TlsParameters, String> {
    let mut builder =
        TlsParameters::builder(settings.server.clone()).certificate_store(CertificateStore::None);
    for authority in authorities(settings.ca_certificates.as_deref())? {
        let certificate = Certificate::from_der(authority.to_vec());
        let certificate = certificate.map_err(|error| format!("TLS: {error}"))?;
        builder = builder.add_root_certificate(certificate);
    }
    builder.build().map_err(|error| format!("TLS: {error}"))
}

/// RFC 3834.
#[derive(Clone)]
struct AutoSubmitted;

impl Header for AutoSubmitted {
    fn name() -> HeaderName {
        HeaderName::new_from_ascii_str("Auto-Submitted")
    }

    fn parse(_: &str) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        Ok(AutoSubmitted)
    }

    fn display(&self) -> HeaderValue {
        HeaderValue::new(Self::name(), "auto-generated".to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::message;
    use super::*;
    use crate::notify::{Event, Severity};

    fn mail(to: &[&str]) -> Result<Mail, NotifyError> {
        Mail::new(MailSettings {
            name: "mail localhost".to_string(),
            server: "localhost".to_string(),
            port: 25,
            tls: MailTls::None,
            from: "vmkeep <vmkeep@example.com>".to_string(),
            to: to.iter().map(|one| one.to_string()).collect(),
            credentials: Some(("vmkeep".to_string(), Secret::new("s3cret".to_string()))),
            ca_certificates: None,
            deadline: Duration::from_secs(1),
        })
    }

    fn letter(subject: &str, text: &str) -> String {
        let mail = mail(&["admin@example.com", "Second <second@example.com>"]).expect("a mail");
        let mut message = message(Event::Raised, Severity::Critical, subject);
        message.text = text.to_string();
        let letter = mail.letter(&[message]).expect("a letter").formatted();
        String::from_utf8(letter).expect("ASCII")
    }

    #[test]
    fn a_letter_has_all_headers_that_it_needs() {
        let letter = letter("a hole in acme/web01", "in two\nlines");
        let (head, body) = letter.split_once("\r\n\r\n").expect("head and body");
        for line in [
            "From: vmkeep <vmkeep@example.com>",
            "To: admin@example.com, Second <second@example.com>",
            "Subject: [vmkeep host1] a hole in acme/web01",
            "Date: Mon, 10 Feb 2031 23:00:00 +0000",
            "Auto-Submitted: auto-generated",
            "Content-Type: text/plain; charset=utf-8",
        ] {
            assert!(head.split("\r\n").any(|one| one == line), "{line}\n{head}");
        }
        assert_eq!(head.matches("Message-ID: <").count(), 1, "{head}");
        assert!(body.contains("in two\r\nlines\r\n"), "{body}");
        assert!(!letter.replace("\r\n", "").contains('\n'));
    }

    #[test]
    fn the_same_messages_are_the_same_mail() {
        let id = |letter: String| {
            let mut lines = letter.lines();
            let line = lines.find(|line| line.starts_with("Message-ID: "));
            line.expect("an id").to_string()
        };
        assert_eq!(id(letter("a", "b")), id(letter("a", "b")));
        assert_ne!(id(letter("a", "b")), id(letter("a", "c")));
        assert!(id(letter("a", "b")).ends_with("@example.com>"));
    }

    #[test]
    fn no_message_adds_a_header() {
        for evil in [
            "a\r\nBcc: evil@example.com",
            "a\nBcc: evil@example.com",
            "a\rBcc: evil@example.com",
            "ä\u{2028}\r\n\r\nBcc: evil@example.com",
            &format!("{}\r\nBcc: evil@example.com", "long ".repeat(40)),
        ] {
            let letter = letter(evil, "x\r\n.\r\nBcc: evil@example.com");
            let (head, _) = letter.split_once("\r\n\r\n").expect("head and body");
            for line in head.split("\r\n") {
                assert!(!line.starts_with("Bcc"), "{head}");
                assert!(!line.contains(['\r', '\n']), "{head}");
            }
            assert_eq!(head.matches("Subject:").count(), 1);
        }
    }

    #[test]
    fn an_address_that_is_none_is_named() {
        for bad in ["admin", "a@b\r\nBcc: c@d", "admin@exämple.com", ""] {
            let error = mail(&[bad]).err().expect(bad);
            assert_eq!(error.kind, NotifyErrorKind::Misconfigured);
        }
        assert!(mail(&[]).is_err());
    }

    #[test]
    fn a_server_that_repeats_the_password_is_not_repeated() {
        let mail = mail(&["admin@example.com"]).expect("a mail");
        assert!(!mail.harmless("5.7.8 no s3cret here").contains("s3cret"));
        assert_eq!(mail.harmless("5.7.8\r\n no\u{1b}"), "5.7.8   no");
    }

    #[test]
    fn a_host_without_a_domain_introduces_itself_by_an_address() {
        assert_eq!(
            hello_of("host1.example.com"),
            ClientId::Domain("host1.example.com".to_string())
        );
        for other in ["host1", "host 1.example", "a.b\r\nMAIL"] {
            assert_eq!(hello_of(other), ClientId::default());
        }
    }
}
