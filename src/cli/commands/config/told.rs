use crate::cli::figures;
use crate::config::{Notify, SecretSource, UrlSource};
use serde_json::{Value, json};

/// Who is told, each with a name for its line. Of addresses no more than the host.
pub fn told_lines(notify: &Notify) -> Vec<(&'static str, String)> {
    let mut lines = Vec::new();
    for webhook in &notify.webhooks {
        lines.push(("webhook", place(&webhook.url)));
    }
    for mail in &notify.mails {
        let tls = mail.tls.as_str();
        let (server, port, to) = (&mail.server, mail.port, mail.to.join(", "));
        lines.push(("mail", format!("{to} by {server}:{port} ({tls})")));
    }
    for ping in &notify.pings {
        lines.push(("ping", place(&ping.url)));
    }
    if !lines.is_empty() {
        let every = figures::seconds(notify.remind_every.as_secs());
        lines.push(("reminders", format!("every {every}")));
        lines.push(("report of a run", notify.report.as_str().to_string()));
    }
    lines
}

pub fn told_document(notify: &Notify) -> Value {
    json!({
        "report": notify.report.as_str(),
        "remind_every_seconds": notify.remind_every.as_secs(),
        "timeout_seconds": notify.timeout.as_secs(),
        "journald": notify.journald,
        "webhooks": notify.webhooks.iter().map(|webhook| json!({
            "place": place(&webhook.url),
            "headers": webhook.headers.iter().map(|(name, _)| name).collect::<Vec<_>>(),
            "signed": webhook.signing_key.is_some(),
        })).collect::<Vec<_>>(),
        "mails": notify.mails.iter().map(|mail| json!({
            "server": mail.server,
            "port": mail.port,
            "tls": mail.tls.as_str(),
            "from": mail.from,
            "to": mail.to,
        })).collect::<Vec<_>>(),
        "pings": notify.pings.iter().map(|ping| json!({
            "place": place(&ping.url),
        })).collect::<Vec<_>>(),
    })
}

fn place(url: &UrlSource) -> String {
    match url {
        UrlSource::Given(url) => url.to_string(),
        UrlSource::Secret(SecretSource::File(file)) => format!("as {} says", file.display()),
        // Without its arguments: one of them may be a secret.
        UrlSource::Secret(SecretSource::Command(words)) => {
            let program = words.first().map_or("", String::as_str);
            format!("as {program} prints")
        }
        UrlSource::Secret(SecretSource::Credential(name)) => {
            format!("as the credential {name} says")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{NotifyPing, NotifyWebhook};
    use crate::model::ReceiverUrl;

    #[test]
    fn addresses_are_shown_by_their_host_or_place() {
        let given = ReceiverUrl::parse("https://hc.example/s3cret", false).expect("an address");
        let ping = |url| NotifyPing {
            url,
            allow_http: false,
            ca_file: None,
        };
        let words = ["pass", "s3cret"].map(str::to_string).to_vec();
        let notify = Notify {
            webhooks: vec![NotifyWebhook {
                url: UrlSource::Secret(SecretSource::File("/etc/vmkeep/hook".into())),
                allow_http: false,
                ca_file: None,
                headers: Vec::new(),
                signing_key: None,
            }],
            pings: vec![
                ping(UrlSource::Given(given)),
                ping(UrlSource::Secret(SecretSource::Command(words))),
            ],
            ..Notify::default()
        };
        let lines = told_lines(&notify);
        let lines: Vec<(&str, &str)> = lines.iter().map(|(name, what)| (*name, &**what)).collect();
        assert_eq!(
            lines,
            [
                ("webhook", "as /etc/vmkeep/hook says"),
                ("ping", "hc.example"),
                ("ping", "as pass prints"),
                ("reminders", "every 1 day"),
                ("report of a run", "failure"),
            ]
        );
        assert!(!told_document(&notify).to_string().contains("s3cret"));
        assert_eq!(told_lines(&Notify::default()), []);
    }
}
