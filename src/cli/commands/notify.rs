use crate::cli::answer::Answer;
use crate::cli::args::NotifyCommand;
use crate::cli::exit::{Exit, Failure};
use crate::cli::invocation::Invocation;
use crate::cli::notify::{Receivers, receivers};
use crate::config::Config;
use crate::model::Clock;
use crate::notify::{Event, Message, Moment, NotifyError, NotifyErrorKind, Severity};
use serde_json::{Value, json};
use std::fmt::Write;
use std::sync::atomic::Ordering;

pub fn run(invocation: &Invocation, command: NotifyCommand) -> Result<Answer, Failure> {
    let config = invocation.config()?;
    match command {
        NotifyCommand::Test => test(invocation, &config),
    }
}

/// What became of one receiver.
struct Told {
    name: String,
    trouble: Option<Trouble>,
}

struct Trouble {
    kind: NotifyErrorKind,
    detail: String,
    hints: Vec<String>,
}

fn test(invocation: &Invocation, config: &Config) -> Result<Answer, Failure> {
    let receivers = receivers(&config.notify);
    if receivers.is_empty() {
        return Err(Failure::new(
            Exit::Usage,
            "nobody is told anything: no receiver is configured",
        )
        .hint("write [[notify.webhook]], [[notify.mail]] or [[notify.ping]]"));
    }
    let stopped = || match invocation.stop.load(Ordering::Relaxed) {
        true => Err(Failure::new(Exit::Interrupted, "interrupted")),
        false => Ok(()),
    };
    let message = message(config, invocation);
    let messages = [message];
    let text = messages.each_ref().map(|message| message.text.as_str());
    let mut all = Vec::new();
    for notifier in &receivers.notifiers {
        stopped()?;
        all.push(told(notifier.name(), notifier.send(&messages)));
    }
    for ping in &receivers.pings {
        stopped()?;
        // Not as a failure: that would be a false alarm.
        let both = ping
            .ping(Moment::Start, &text.join("\n"))
            .and_then(|()| ping.ping(Moment::Success, &text.join("\n")));
        all.push(told(ping.name(), both));
    }
    all.extend(unusable(receivers));
    Ok(answer(&all))
}

fn message(config: &Config, invocation: &Invocation) -> Message {
    let host = config.host.name.clone();
    let text = format!(
        "This is a test of the notifications of vmkeep on {host}, sent by: vmkeep notify test\n\
         Whoever reads this will also be told of alarms."
    );
    Message {
        event: Event::Report,
        severity: Severity::Info,
        key: None,
        host,
        customer: None,
        vm: None,
        at: invocation.clock.read().wall,
        subject: "a test of the notifications".to_string(),
        text,
        document: None,
    }
}

fn told(name: String, sent: Result<(), NotifyError>) -> Told {
    let trouble = sent.err().map(|error| Trouble {
        kind: error.kind,
        detail: error.detail,
        hints: vec![hint(error.kind).to_string()],
    });
    Told { name, trouble }
}

fn unusable(receivers: Receivers) -> impl Iterator<Item = Told> {
    let unusable = receivers.unusable.into_iter();
    unusable.map(|(name, failure)| Told {
        name,
        trouble: Some(Trouble {
            kind: NotifyErrorKind::Misconfigured,
            detail: failure.message,
            hints: failure.hints,
        }),
    })
}

fn hint(kind: NotifyErrorKind) -> &'static str {
    match kind {
        NotifyErrorKind::Refused | NotifyErrorKind::Partly => {
            "it was reached and said no: are the address, the name and the password right?"
        }
        NotifyErrorKind::Transient => {
            "it may pass; otherwise: is the address right, and may this host connect to it?"
        }
        NotifyErrorKind::Misconfigured => {
            "config/vmkeep.toml beside the README shows every key of [notify]"
        }
    }
}

fn word(kind: NotifyErrorKind) -> &'static str {
    match kind {
        NotifyErrorKind::Refused => "refused",
        NotifyErrorKind::Transient => "not reached",
        NotifyErrorKind::Misconfigured => "misconfigured",
        NotifyErrorKind::Partly => "partly refused",
    }
}

fn answer(all: &[Told]) -> Answer {
    let mut text = String::new();
    for told in all {
        match &told.trouble {
            None => {
                let _ = writeln!(text, "{}: delivered", told.name);
            }
            Some(trouble) => {
                let kind = word(trouble.kind);
                let _ = writeln!(text, "{}: {kind}: {}", told.name, trouble.detail);
                for hint in &trouble.hints {
                    let _ = writeln!(text, "  hint: {hint}");
                }
            }
        }
    }
    let failed = all.iter().filter(|told| told.trouble.is_some()).count();
    let document = json!({
        "receivers": all.iter().map(document_of).collect::<Vec<_>>(),
        "delivered": all.len() - failed,
        "failed": failed,
    });
    let mut answer = Answer::done(text, document);
    if failed > 0 {
        answer.exit = Exit::Failed;
    }
    answer
}

fn document_of(told: &Told) -> Value {
    json!({
        "name": told.name,
        "delivered": told.trouble.is_none(),
        "trouble": told.trouble.as_ref().map(|trouble| json!({
            "kind": word(trouble.kind),
            "detail": trouble.detail,
            "hints": trouble.hints,
        })),
    })
}
