use super::{Event, Message, Severity};

pub(super) fn message(event: Event, severity: Severity, subject: &str) -> Message {
    Message {
        event,
        severity,
        key: Some("hole acme/web01".to_string()),
        host: "host1".to_string(),
        customer: Some("acme".to_string()),
        vm: Some("web01".to_string()),
        at: "2031-02-10T23:00:00Z".parse().expect("a time"),
        subject: subject.to_string(),
        text: format!("{subject}\nin two lines"),
        document: None,
    }
}
