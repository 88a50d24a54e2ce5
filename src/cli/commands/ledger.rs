use super::prune::worse;
use super::selection;
use super::tally::Tally;
use crate::cli::answer::Answer;
use crate::cli::args::{LedgerCommand, VoidArgs};
use crate::cli::exit::{Exit, Failure};
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::cli::site::Site;
use crate::cli::table::Table;
use crate::cli::terminal::Terminal;
use crate::format::entry::{Attestation, Body, ClockBody, ClockEvent, Entry, Purpose};
use crate::format::names::CustomerNames;
use crate::jobs::{Verified, check_certificates};
use crate::repository::Ledger;
use jiff::tz::TimeZone;
use serde_json::{Value, json};
use std::fmt::Write;

pub fn run(invocation: &Invocation, command: LedgerCommand) -> Result<Answer, Failure> {
    let site = Site::open(invocation)?;
    match command {
        LedgerCommand::Show => show(invocation, &site),
        LedgerCommand::Verify => verify(invocation, &site),
        LedgerCommand::Void(args) => void(&site, &args),
    }
}

fn void(site: &Site, args: &VoidArgs) -> Result<Answer, Failure> {
    let named = std::slice::from_ref(&args.customer);
    let config = selection::customers(&site.config, named)?;
    let config = config
        .first()
        .expect("a name that is not configured is refused");
    let open = site.customer(config)?;
    site.probe(&open.customer)?;
    let customer = &open.customer;
    let (customer_name, seq) = (&args.customer, args.seq);
    let Some(time) = customer.with_state(|state| state.witnessed_at(seq)) else {
        let message = format!("the time of entry {seq} of {customer_name} counts for nothing");
        return Err(Failure::new(Exit::Usage, message)
            .hint("vmkeep ledger show marks times that one clock alone told with ?"));
    };
    let voided_at = customer.append(|_| {
        Ok(Body::Clock(ClockBody {
            event: ClockEvent::Void,
            seq: Some(seq),
            text: args.reason.clone(),
        }))
    })?;
    let last_witnessed = customer.with_state(|state| state.last_witnessed);
    let last = last_witnessed.map_or("none".to_string(), |last| last.to_string());
    let text = format!(
        "{customer_name}: the time of entry {seq}, {time}, counts for nothing any more (entry {voided_at}); \
         the last witnessed time is {last}\n"
    );
    let document = json!({
        "customer": customer_name.as_str(),
        "void": seq,
        "time": time.to_string(),
        "seq": voided_at,
        "last_witnessed": last_witnessed.map(|last| last.to_string()),
    });
    Ok(Answer::done(text, document))
}

fn show(invocation: &Invocation, site: &Site) -> Result<Answer, Failure> {
    let mut tally = Tally::default();
    for config in &site.config.customers {
        let zone = TimeZone::get(&config.terms.timezone).unwrap_or(TimeZone::UTC);
        let mut table = Table::new()
            .right("SEQ")
            .left("TIME")
            .left("KIND")
            .cut("WHAT");
        let names = CustomerNames::new(&config.name);
        let replayed = Ledger::replay(site.store.storage.clone(), names, |entry, verdict| {
            let void = verdict.err();
            let what = match &void {
                Some(reason) => format!("VOID ({reason}): {}", summary(entry)),
                None => summary(entry),
            };
            let alone = match entry.attestation {
                Attestation::Witnessed => "",
                Attestation::Alone => "?",
            };
            table.row([
                entry.seq.to_string(),
                format!("{}{alone}", figures::minute(entry.time, &zone)),
                entry.body.kind().to_string(),
                what,
            ]);
            tally.documents.push(json!({
                "customer": config.name.as_str(),
                "seq": entry.seq,
                "time": entry.time.to_string(),
                "clock": match entry.attestation {
                    Attestation::Witnessed => "witnessed",
                    Attestation::Alone => "alone",
                },
                "host": entry.host.to_string(),
                "kind": entry.body.kind(),
                "void": void,
                "body": entry.body.document(),
            }));
        });
        let _ = writeln!(tally.text, "customer {}", config.name);
        tally.text.push_str(&table.render(Terminal::width()));
        if let Err(error) = replayed {
            tally.failed(invocation, &config.name, error.into())?;
        }
        tally.text.push('\n');
    }
    tally
        .text
        .push_str("A time with ? had no witness: one clock's word.\n");
    Ok(tally.answer(Value::from))
}

/// What an entry says, in a line.
fn summary(entry: &Entry) -> String {
    let points = |body: &crate::format::entry::PointsBody| {
        body.points
            .iter()
            .map(|row| {
                format!(
                    "{} ({})",
                    super::report::short(&row.point.to_string()),
                    row.reason
                )
            })
            .collect::<Vec<_>>()
            .join("; ")
    };
    let short = |id: &dyn std::fmt::Display| super::report::short(&id.to_string());
    match &entry.body {
        Body::Genesis(body) => {
            format!("customer {} by host {}", body.customer_name, body.host.name)
        }
        Body::Host(body) => format!("host {}", body.name),
        Body::Policy(body) => body
            .terms
            .iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect::<Vec<_>>()
            .join(", "),
        Body::Key(body) => format!(
            "key/{}.age for {}",
            body.object,
            figures::count(body.recipients.len(), "recipient", "recipients")
        ),
        Body::Begin(body) => match (&body.vm, body.purpose) {
            (Some(vm), _) => format!("backup of {vm}, session {}", short(&body.session)),
            (None, Purpose::Backup) => format!("backup, session {}", short(&body.session)),
            (None, Purpose::Reclaim) => format!("reclaim, session {}", short(&body.session)),
            (None, Purpose::Merge) => format!("index merge, session {}", short(&body.session)),
            (None, Purpose::Prove) => format!("certificate, session {}", short(&body.session)),
        },
        Body::Commit(body) => format!(
            "{} {} {}, {} stored in {}",
            body.vm,
            body.point_kind,
            short(&body.point),
            figures::bytes(body.stored_bytes),
            figures::count(body.pack_count as usize, "pack", "packs")
        ),
        Body::Abort(body) => format!("session {}: {}", short(&body.session), body.reason),
        Body::Expire(body) | Body::Undo(body) | Body::Erase(body) => points(body),
        Body::Merge(body) => format!(
            "{} segments into {}",
            body.replaced.len(),
            body.segments.len()
        ),
        Body::Condemn(body) => figures::count(body.packs.len(), "pack", "packs"),
        Body::Reclaimed(body) => {
            let mut text = format!(
                "{} deleted, {} dead left",
                figures::count(body.deleted.len(), "pack", "packs"),
                figures::bytes(body.marks.iter().map(|mark| mark.dead_bytes).sum())
            );
            if let Some(certificate) = &body.certificate {
                let _ = write!(
                    text,
                    ", certificate {} ({} destroyed)",
                    certificate.id,
                    body.destroyed.len()
                );
            }
            text
        }
        Body::Restore(body) => format!(
            "{} {}: {}",
            body.vm,
            short(&body.point),
            match body.reason.as_str() {
                "" => "no reason given",
                reason => reason,
            }
        ),
        Body::Verify(body) => format!(
            "{} read, {} damaged",
            figures::count(body.packs.len(), "pack", "packs"),
            body.damaged.len()
        ),
        Body::Seal(body) => format!("by installation {}", short(&body.installation)),
        Body::Clock(body) => match body.event {
            ClockEvent::Refused => format!("refused: {}", body.text),
            ClockEvent::Trusted => format!("trusted: {}", body.text),
            ClockEvent::Void => format!("void {}: {}", body.seq.unwrap_or_default(), body.text),
        },
        Body::Checkpoint(_) => "state of all entries before".to_string(),
        Body::Unknown { why, .. } => format!("not known to this version: {why}"),
    }
}

/// Reads every certificate that the ledger names, and its signature.
fn certificates(site: &Site, ledger: &Ledger) -> (Verified, Option<Failure>) {
    let mut checked = Verified::default();
    let (storage, names) = (&*site.store.storage, ledger.names());
    let ended = check_certificates(storage, names, ledger.state(), &|_| false, &mut checked);
    let failure = match (checked.certificates.as_slice(), ended) {
        ([], Ok(())) => checked.incomplete().map(Failure::from),
        ([], Err(error)) => Some(error.into()),
        (damage, _) => Some(Failure::new(Exit::DamageFound, damage.join("\n"))),
    };
    (checked, failure)
}

fn verify(invocation: &Invocation, site: &Site) -> Result<Answer, Failure> {
    let mut text = String::new();
    let mut documents = Vec::new();
    let mut worst: Option<Failure> = None;
    for config in &site.config.customers {
        let names = CustomerNames::new(&config.name);
        let loaded = Ledger::load(site.store.storage.clone(), names, &*site.host);
        // Evidence is what the entries say, not what this host has made of them before.
        let loaded = loaded.and_then(|found| {
            found
                .map(|mut ledger| ledger.check_believed(&*site.host).map(|()| ledger))
                .transpose()
        });
        let failure = match loaded {
            Ok(Some(ledger)) => {
                let state = ledger.state();
                let hash = state.hash.map(|hash| hash.to_string());
                let _ = writeln!(
                    text,
                    "{}: {} entries, chain and signatures hold; the end is {}",
                    config.name,
                    state.seq,
                    hash.as_deref().unwrap_or("nothing")
                );
                for (seq, reason) in &state.voids {
                    let _ = writeln!(text, "  entry {seq} is void: {reason}");
                }
                let (checked, failure) = certificates(site, &ledger);
                let _ = match (&failure, state.certificates.len()) {
                    (Some(failure), _) => writeln!(text, "  {}", failure.message),
                    (None, 0) => Ok(()),
                    (None, count) => writeln!(
                        text,
                        "  {} as the ledger names them",
                        figures::count(count, "deletion certificate", "deletion certificates")
                    ),
                };
                documents.push(json!({
                    "customer": config.name.as_str(),
                    "entries": state.seq,
                    "end": hash,
                    "sound": true,
                    "certificates": state.certificates.len(),
                    "certificates_sound": failure.is_none(),
                    "damage": checked.certificates,
                    "unread": checked.unread,
                    "void": state.voids.iter().map(|(seq, reason)| json!({
                        "seq": seq, "reason": reason,
                    })).collect::<Vec<_>>(),
                    "hosts": state.hosts.values().map(|host| json!({
                        "id": host.host.to_string(), "name": host.name,
                    })).collect::<Vec<_>>(),
                }));
                if let Some(failure) = &failure {
                    invocation.terminal.tell(failure);
                }
                worst = worse(worst, failure);
                continue;
            }
            Ok(None) => Failure::new(
                Exit::Failed,
                format!("customer {} is not in the repository yet", config.name),
            )
            .hint("vmkeep init creates customers that were added to the configuration"),
            Err(error) => Failure::from(error),
        };
        let _ = writeln!(text, "{}: {}", config.name, failure.message);
        invocation.terminal.tell(&failure);
        documents.push(json!({
            "customer": config.name.as_str(),
            "sound": false,
            "error": failure.document()["error"],
        }));
        worst = worse(worst, Some(failure));
    }
    let mut answer = Answer::done(text, documents.into());
    if let Some(failure) = worst {
        answer.exit = failure.exit;
    }
    Ok(answer)
}
