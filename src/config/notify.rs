//! `[notify]`: who is told, and how.

use super::customer::check_path;
use super::problem::Problem;
use super::secret::{SecretKeys, SecretSource, read_source};
use super::section::Section;
use crate::model::{ReceiverUrl, is_loopback};
use std::path::PathBuf;
use std::time::Duration;
use toml::de::DeValue;

const DEFAULT_REMIND_EVERY: Duration = Duration::from_secs(24 * 3600);
const MIN_REMIND_EVERY: Duration = Duration::from_secs(60);
const MAX_REMIND_EVERY: Duration = Duration::from_secs(366 * 24 * 3600);
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
const TIMEOUT_SECONDS: std::ops::RangeInclusive<u64> = 1..=600;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notify {
    /// Whether the report of a run is sent, beside the alarms.
    pub report: ReportWhen,
    /// An alarm that goes on is told again after this time.
    pub remind_every: Duration,
    /// All the time that one receiver gets for one sending.
    pub timeout: Duration,
    /// `None`: where systemd started the program.
    pub journald: Option<bool>,
    pub webhooks: Vec<NotifyWebhook>,
    pub mails: Vec<NotifyMail>,
    pub pings: Vec<NotifyPing>,
}

impl Default for Notify {
    fn default() -> Self {
        Notify {
            report: ReportWhen::Failure,
            remind_every: DEFAULT_REMIND_EVERY,
            timeout: DEFAULT_TIMEOUT,
            journald: None,
            webhooks: Vec::new(),
            mails: Vec::new(),
            pings: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReportWhen {
    Failure,
    Always,
    Never,
}

impl ReportWhen {
    pub fn as_str(self) -> &'static str {
        match self {
            ReportWhen::Failure => "failure",
            ReportWhen::Always => "always",
            ReportWhen::Never => "never",
        }
    }
}

/// An address, or where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UrlSource {
    Given(ReceiverUrl),
    Secret(SecretSource),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotifyWebhook {
    pub url: UrlSource,
    pub allow_http: bool,
    /// Trusted instead of the system's certificate authorities.
    pub ca_file: Option<PathBuf>,
    pub headers: Vec<(String, HeaderSource)>,
    /// Signs each body.
    pub signing_key: Option<SecretSource>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderSource {
    Given(String),
    Secret(SecretSource),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotifyMail {
    pub server: String,
    pub port: u16,
    pub tls: MailEncryption,
    pub from: String,
    pub to: Vec<String>,
    /// User name, and where the password is.
    pub credentials: Option<(String, SecretSource)>,
    /// Trusted instead of the system's certificate authorities.
    pub ca_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MailEncryption {
    Starttls,
    Tls,
    None,
}

impl MailEncryption {
    pub fn as_str(self) -> &'static str {
        match self {
            MailEncryption::Starttls => "starttls",
            MailEncryption::Tls => "tls",
            MailEncryption::None => "none",
        }
    }

    fn default_port(self) -> u16 {
        match self {
            MailEncryption::Starttls => 587,
            MailEncryption::Tls => 465,
            MailEncryption::None => 25,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotifyPing {
    pub url: UrlSource,
    pub allow_http: bool,
    /// Trusted instead of the system's certificate authorities.
    pub ca_file: Option<PathBuf>,
}

const URL: SecretKeys = SecretKeys {
    file: "url_file",
    command: "url_command",
    credential: "url_credential",
};
const SIGNING_KEY: SecretKeys = SecretKeys {
    file: "signing_key_file",
    command: "signing_key_command",
    credential: "signing_key_credential",
};
const PASSWORD: SecretKeys = SecretKeys {
    file: "password_file",
    command: "password_command",
    credential: "password_credential",
};
/// In the table that is a header's value.
const HEADER: SecretKeys = SecretKeys {
    file: "file",
    command: "command",
    credential: "credential",
};

/// Those that the request itself decides.
const OWN_HEADERS: [&str; 8] = [
    "host",
    "connection",
    "content-length",
    "content-type",
    "transfer-encoding",
    "idempotency-key",
    "user-agent",
    "vmkeep-signature",
];
const SECRET_HEADERS: [&str; 3] = ["authorization", "cookie", "x-api-key"];

pub(super) fn read_notify(mut section: Section<'_>, problems: &mut Vec<Problem>) -> Notify {
    let mut notify = Notify::default();
    let words = [ReportWhen::Failure, ReportWhen::Always, ReportWhen::Never];
    let words = words.map(|report| (report.as_str(), report));
    if let Some(report) = section.one_of("report", words, problems) {
        notify.report = report;
    }
    if let Some(text) = section.text("remind_every", problems) {
        match humantime::parse_duration(text) {
            Ok(every) if (MIN_REMIND_EVERY..=MAX_REMIND_EVERY).contains(&every) => {
                notify.remind_every = every;
            }
            _ => {
                let message = "1 minute to 1 year, such as \"24h\"";
                problems.push(section.problem("remind_every", message));
            }
        }
    }
    if let Some(text) = section.text("timeout", problems) {
        match humantime::parse_duration(text) {
            Ok(timeout) if TIMEOUT_SECONDS.contains(&timeout.as_secs()) => {
                notify.timeout = timeout;
            }
            _ => problems.push(section.problem("timeout", "1s to 10m, such as \"30s\"")),
        }
    }
    notify.journald = section.boolean("journald", problems);
    for table in section.tables("webhook", problems) {
        notify.webhooks.extend(read_webhook(table, problems));
    }
    for table in section.tables("mail", problems) {
        notify.mails.extend(read_mail(table, problems));
    }
    for table in section.tables("ping", problems) {
        notify.pings.extend(read_ping(table, problems));
    }
    section.finish(
        &[
            ("url", "belongs in [[notify.webhook]] or [[notify.ping]]"),
            ("server", "belongs in [[notify.mail]]"),
            ("from", "belongs in [[notify.mail]]"),
            ("to", "belongs in [[notify.mail]]"),
        ],
        problems,
    );
    notify
}

fn read_webhook(mut section: Section<'_>, problems: &mut Vec<Problem>) -> Option<NotifyWebhook> {
    let (url, allow_http) = read_url(&mut section, problems);
    let ca_file = read_ca_file(&mut section, problems);
    let mut headers = Vec::new();
    if let Some(table) = section.table("headers", problems) {
        for (name, value) in table.entries() {
            let source = match value.get_ref() {
                DeValue::String(text) => read_plain_header(&table, name, text, problems),
                _ => read_secret_header(&table, name, table.entry_table(name, value), problems),
            };
            headers.extend(source.map(|source| (name.to_string(), source)));
        }
    }
    let signing_key = read_source(&SIGNING_KEY, &mut section, problems);
    section.finish(
        &[
            (
                "signing_key",
                "a secret does not stand in the configuration: signing_key_file, \
                 signing_key_command or signing_key_credential",
            ),
            ("timeout", "belongs in [notify]"),
        ],
        problems,
    );
    Some(NotifyWebhook {
        url: url?,
        allow_http,
        ca_file,
        headers,
        signing_key,
    })
}

fn read_plain_header(
    table: &Section<'_>,
    name: &str,
    text: &str,
    problems: &mut Vec<Problem>,
) -> Option<HeaderSource> {
    let lower = name.to_ascii_lowercase();
    if SECRET_HEADERS.contains(&lower.as_str()) {
        let message = format!(
            "a secret does not stand in the configuration: {name} = {{ file = \"/path\" }}, \
             or command, or credential"
        );
        problems.push(table.problem(name, message));
        return None;
    }
    if !text.chars().all(|c| c == ' ' || c.is_ascii_graphic()) {
        problems.push(table.problem(name, "one line of ASCII characters"));
    }
    is_header(table, name, problems).then(|| HeaderSource::Given(text.to_string()))
}

fn read_secret_header(
    table: &Section<'_>,
    name: &str,
    place: Option<Section<'_>>,
    problems: &mut Vec<Problem>,
) -> Option<HeaderSource> {
    let source = match place {
        None => None,
        Some(mut place) => {
            let source = read_source(&HEADER, &mut place, problems);
            place.finish(&[], problems);
            source
        }
    };
    if source.is_none() {
        let message = "a text, or a table with file, command or credential";
        problems.push(table.problem(name, message));
    }
    let is_header = is_header(table, name, problems);
    source.filter(|_| is_header).map(HeaderSource::Secret)
}

fn is_header(table: &Section<'_>, name: &str, problems: &mut Vec<Problem>) -> bool {
    let is_name = !name.is_empty()
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
    let own = OWN_HEADERS.contains(&name.to_ascii_lowercase().as_str());
    let message = match (is_name, own) {
        (false, _) => "the name of a header has letters, digits, '-' and '_'",
        (true, true) => "this header is the request's own",
        (true, false) => return true,
    };
    problems.push(table.problem(name, message));
    false
}

fn read_mail(mut section: Section<'_>, problems: &mut Vec<Problem>) -> Option<NotifyMail> {
    let found = problems.len();
    let server = section.required("server", problems).unwrap_or_default();
    let is_name = server
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-'));
    if problems.len() == found && (server.is_empty() || !is_name) {
        let message = "a host name such as \"smtp.example.com\"; its port is a key of its own";
        problems.push(section.problem("server", message));
    }
    let words = [
        MailEncryption::Starttls,
        MailEncryption::Tls,
        MailEncryption::None,
    ];
    let words = words.map(|tls| (tls.as_str(), tls));
    let tls = section.one_of("tls", words, problems);
    let tls = tls.unwrap_or(MailEncryption::Starttls);
    let plain_allowed = section.boolean("allow_plain", problems).unwrap_or(false);
    if tls == MailEncryption::None && !plain_allowed && !is_loopback(server) {
        problems.push(section.problem(
            "tls",
            "without TLS everything is sent in the clear; if that is meant: allow_plain = true",
        ));
    }
    let port = match section.integer("port", problems).map(u16::try_from) {
        None => tls.default_port(),
        Some(Ok(port)) if port > 0 => port,
        Some(_) => {
            problems.push(section.problem("port", "1 to 65535"));
            tls.default_port()
        }
    };
    let from = section.required("from", problems).unwrap_or_default();
    if section.contains("from") {
        check_mailbox("from", from, &section, problems);
    }
    let to = section.texts("to", problems);
    if to.is_empty() {
        problems.push(section.problem("to", "is missing: to = [\"admin@example.com\"]"));
    }
    for recipient in &to {
        check_mailbox("to", recipient, &section, problems);
    }
    let username = section.text("username", problems);
    let password = read_source(&PASSWORD, &mut section, problems);
    let credentials = match (username, password) {
        (None, None) => None,
        (Some(username), Some(password)) => Some((username.to_string(), password)),
        (Some(_), None) => {
            let message = format!("needs {}", PASSWORD.named());
            problems.push(section.problem("username", message));
            None
        }
        (None, Some(_)) => {
            problems.push(section.problem("username", "is missing beside its password"));
            None
        }
    };
    let ca_file = read_ca_file(&mut section, problems);
    section.finish(
        &[
            (
                "password",
                "a secret does not stand in the configuration: password_file, password_command \
                 or password_credential",
            ),
            ("timeout", "belongs in [notify]"),
        ],
        problems,
    );
    (problems.len() == found).then(|| NotifyMail {
        server: server.to_string(),
        port,
        tls,
        from: from.to_string(),
        to: to.into_iter().map(str::to_string).collect(),
        credentials,
        ca_file,
    })
}

/// As it is parsed again when mail is sent.
fn check_mailbox(
    key: &'static str,
    text: &str,
    section: &Section<'_>,
    problems: &mut Vec<Problem>,
) {
    let parsed = text.parse::<lettre::message::Mailbox>();
    let is_plain = !text.contains(char::is_control);
    if !is_plain || !parsed.is_ok_and(|one| one.email.to_string().is_ascii()) {
        let message = format!("{text:?} is not an address such as \"admin@example.com\"");
        problems.push(section.problem(key, message));
    }
}

fn read_ping(mut section: Section<'_>, problems: &mut Vec<Problem>) -> Option<NotifyPing> {
    let (url, allow_http) = read_url(&mut section, problems);
    let ca_file = read_ca_file(&mut section, problems);
    section.finish(&[("timeout", "belongs in [notify]")], problems);
    Some(NotifyPing {
        url: url?,
        allow_http,
        ca_file,
    })
}

fn read_ca_file(section: &mut Section<'_>, problems: &mut Vec<Problem>) -> Option<PathBuf> {
    let file = PathBuf::from(section.text("ca_file", problems)?);
    check_path(section, "ca_file", &file, problems);
    Some(file)
}

/// The address, and whether it may be of plain http.
fn read_url(section: &mut Section<'_>, problems: &mut Vec<Problem>) -> (Option<UrlSource>, bool) {
    let allow_http = section.boolean("allow_http", problems).unwrap_or(false);
    let text = section.text("url", problems);
    let secret = read_source(&URL, section, problems);
    let source = match (text, secret) {
        (Some(text), None) => match ReceiverUrl::parse(text, allow_http) {
            Ok(url) => Some(UrlSource::Given(url)),
            Err(why) => {
                problems.push(section.problem("url", why));
                None
            }
        },
        (None, Some(secret)) => Some(UrlSource::Secret(secret)),
        (Some(_), Some(_)) => {
            problems.push(section.problem("url", "the address is given in more than one way"));
            None
        }
        (None, None) => {
            if !section.contains("url") {
                let message = format!("is missing: url, {}", URL.named());
                problems.push(section.problem("url", message));
            }
            None
        }
    };
    (source, allow_http)
}
