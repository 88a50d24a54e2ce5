//! Floor 2: how what people must know reaches them. Webhooks, mail, journald's fields, and pings to a
//! watcher that sounds when they stay away.
//!
//! A [`Notifier`] takes messages and says whether the receiver has them; what failed for now is tried
//! again within a deadline, and only that. What is absent: which messages there are and when they are
//! told again (`jobs`), the configuration, secrets' places (they come read), printing, the clock (times
//! come with a message). The traits are synchronous; this room and `storage/s3` have a runtime each.
//!
//! Addresses of webhooks and pings are secrets: who knows one can speak for us. No error, name or log
//! shows more of them than the host ([`crate::model::ReceiverUrl`]).

mod document;
mod http;
mod journal;
mod mail;
mod ping;
mod retry;
#[cfg(test)]
mod testing;
mod trust;
mod webhook;

pub use http::{HttpSettings, Secret};
pub use journal::{JOURNAL_SOCKET, Journal, JournalSettings};
pub use mail::{Mail, MailSettings, MailTls};
pub use ping::Ping;
pub use webhook::{Webhook, WebhookSettings};

use jiff::Timestamp;
use serde_json::Value;
use std::fmt;

/// What became of an alarm, or the report of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    Raised,
    /// It goes on.
    Reminder,
    Cleared,
    Report,
}

impl Event {
    pub fn as_str(self) -> &'static str {
        match self {
            Event::Raised => "raised",
            Event::Reminder => "reminder",
            Event::Cleared => "cleared",
            Event::Report => "report",
        }
    }
}

/// In ascending order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    Info,
    Warning,
    Critical,
}

impl Severity {
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Info => "info",
            Severity::Warning => "warning",
            Severity::Critical => "critical",
        }
    }
}

/// One thing to tell.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    pub event: Event,
    pub severity: Severity,
    /// The alarm's name, such as `hole acme/web01`: the same when it is raised, told again and cleared.
    /// `None` for reports.
    pub key: Option<String>,
    pub host: String,
    pub customer: Option<String>,
    pub vm: Option<String>,
    pub at: Timestamp,
    /// One line.
    pub subject: String,
    /// All of it, in several lines.
    pub text: String,
    /// Of a report: what `run --json` printed.
    pub document: Option<Value>,
}

/// Somebody who is told.
pub trait Notifier: Send + Sync {
    /// For people, without anything that is a secret. No two of one configuration are the same.
    fn name(&self) -> String;

    /// Sends them as one. `Ok`: the receiver has them. Nothing is sent if there are none.
    fn send(&self, messages: &[Message]) -> Result<(), NotifyError>;
}

/// Of a job that a watcher expects: it sounds when a job does not start, end or succeed in its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    Start,
    Success,
    Fail,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotifyErrorKind {
    /// The receiver said no, and will say so again.
    Refused,
    /// It may pass: tried until the deadline.
    Transient,
    /// What is configured cannot be used.
    Misconfigured,
    /// Some of those behind it have the messages, and the others do not.
    Partly,
}

/// Why a receiver was not told. Never shows a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotifyError {
    pub kind: NotifyErrorKind,
    /// Of the notifier or ping.
    pub name: String,
    /// A sentence.
    pub detail: String,
}

impl NotifyError {
    fn new(kind: NotifyErrorKind, name: &str, detail: impl Into<String>) -> Self {
        NotifyError {
            kind,
            name: name.to_string(),
            detail: detail.into(),
        }
    }
}

impl fmt::Display for NotifyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.detail)
    }
}

impl std::error::Error for NotifyError {}
