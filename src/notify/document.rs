//! Messages as one JSON document for programs, and as one text for people.

use super::Message;
use serde_json::{Value, json};

/// Raised when a receiver could misread what is new.
const VERSION: u32 = 1;

/// All messages of one sending.
pub(super) fn document(messages: &[Message]) -> Value {
    json!({
        "version": VERSION,
        "host": messages.first().map(|message| message.host.as_str()),
        "messages": messages.iter().map(message_document).collect::<Vec<_>>(),
    })
}

fn message_document(message: &Message) -> Value {
    json!({
        "event": message.event.as_str(),
        "severity": message.severity.as_str(),
        "key": message.key,
        "customer": message.customer,
        "vm": message.vm,
        "at": message.at.to_string(),
        "subject": message.subject,
        "text": message.text,
        "report": message.document,
    })
}

/// `[vmkeep host1] the worst (+2 more)`, in one line.
pub(super) fn subject(messages: &[Message]) -> String {
    const MAX_CHARS: usize = 160;
    // Of equals the first.
    let worst = messages.iter().rev().max_by_key(|message| message.severity);
    let Some(worst) = worst else {
        return "[vmkeep]".to_string();
    };
    let more = match messages.len() {
        0 | 1 => String::new(),
        several => format!(" (+{} more)", several - 1),
    };
    let (host, what) = (one_line(&worst.host), one_line(&worst.subject));
    let mut what: String = what.chars().take(MAX_CHARS + 1).collect();
    if what.chars().count() > MAX_CHARS {
        what.pop();
        what.push('…');
    }
    format!("[vmkeep {host}] {what}{more}")
}

/// Every message with what it is about, the worst first.
pub(super) fn text(messages: &[Message]) -> String {
    let mut ordered: Vec<&Message> = messages.iter().collect();
    ordered.sort_by_key(|message| std::cmp::Reverse(message.severity));
    let parts: Vec<String> = ordered.into_iter().map(part).collect();
    parts.join("\n----\n\n")
}

fn part(message: &Message) -> String {
    let subject = one_line(&message.subject);
    let text = printable(message.text.trim_end());
    let mut part = format!("{subject}\n");
    // A text that begins with its subject says it once.
    let rest = text.strip_prefix(&subject).unwrap_or(&text).trim_start();
    if !rest.is_empty() {
        part.push_str(&format!("\n{rest}\n"));
    }
    let about = match (&message.customer, &message.vm) {
        (Some(customer), Some(vm)) => format!(", {customer}/{vm}"),
        (Some(customer), None) => format!(", {customer}"),
        _ => String::new(),
    };
    let (severity, event) = (message.severity.as_str(), message.event.as_str());
    let host = one_line(&message.host);
    part.push_str(&format!(
        "\n{severity}, {event} at {}, host {host}{about}\n",
        message.at
    ));
    part
}

/// Without line ends and whatever else could steer a reader.
pub(super) fn one_line(text: &str) -> String {
    let spaced = text.replace(char::is_control, " ");
    spaced.trim().to_string()
}

/// Line ends and tabs stay.
fn printable(text: &str) -> String {
    let text = text.replace("\r\n", "\n");
    text.replace(
        |c: char| c.is_control() && !matches!(c, '\n' | '\t'),
        "\u{fffd}",
    )
}

#[cfg(test)]
mod tests {
    use super::super::testing::message;
    use super::*;
    use crate::notify::{Event, Severity};

    #[test]
    fn the_document_has_every_field_of_every_message() {
        let mut report = message(Event::Report, Severity::Info, "all done");
        report.key = None;
        report.vm = None;
        report.document = Some(json!({"failed": 0}));
        let hole = message(Event::Raised, Severity::Critical, "a hole");
        assert_eq!(
            document(&[hole, report]),
            json!({
                "version": 1,
                "host": "host1",
                "messages": [
                    {
                        "event": "raised", "severity": "critical", "key": "hole acme/web01",
                        "customer": "acme", "vm": "web01", "at": "2031-02-10T23:00:00Z",
                        "subject": "a hole", "text": "a hole\nin two lines", "report": null,
                    },
                    {
                        "event": "report", "severity": "info", "key": null,
                        "customer": "acme", "vm": null, "at": "2031-02-10T23:00:00Z",
                        "subject": "all done", "text": "all done\nin two lines",
                        "report": {"failed": 0},
                    },
                ],
            })
        );
    }

    #[test]
    fn the_subject_is_the_worst_and_how_many_more() {
        let info = message(Event::Report, Severity::Info, "all done");
        let first = message(Event::Raised, Severity::Critical, "a hole in acme/web01");
        let second = message(Event::Raised, Severity::Critical, "over the maximum");
        assert_eq!(
            subject(&[info.clone(), first.clone(), second]),
            "[vmkeep host1] a hole in acme/web01 (+2 more)"
        );
        assert_eq!(subject(&[info]), "[vmkeep host1] all done");
    }

    #[test]
    fn a_subject_is_one_line_that_is_not_too_long() {
        let evil = message(
            Event::Raised,
            Severity::Warning,
            "one\r\nBcc: evil@example.com\u{1b}[2J",
        );
        assert_eq!(
            subject(&[evil]),
            "[vmkeep host1] one  Bcc: evil@example.com [2J"
        );
        let long = message(Event::Raised, Severity::Warning, &"ä".repeat(1000));
        let told = subject(&[long]);
        assert!(told.ends_with('…') && told.chars().count() < 200, "{told}");
    }

    #[test]
    fn the_text_tells_the_worst_first_and_each_subject_once() {
        let info = message(Event::Report, Severity::Info, "all done");
        let hole = message(Event::Raised, Severity::Critical, "a hole");
        assert_eq!(
            text(&[info, hole]),
            "a hole\n\nin two lines\n\n\
             critical, raised at 2031-02-10T23:00:00Z, host host1, acme/web01\n\
             \n----\n\n\
             all done\n\nin two lines\n\n\
             info, report at 2031-02-10T23:00:00Z, host host1, acme/web01\n"
        );
    }
}
