use super::tally::Tally;
use crate::cli::answer::Answer;
use crate::cli::args::InitArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::cli::site::{local_host, refuse_another_repository, refuse_other_writers};
use crate::cli::store::{self, Store};
use crate::codec::age::AgeRecipient;
use crate::codec::minisign;
use crate::config::{Config, HostRole};
use crate::format::entry::ClockDeclaration;
use crate::format::repository_file::RepositoryFile;
use crate::jobs::{Admission, JobError, JobErrorKind, LocalHost, StateFolder, admit};
use crate::model::{Clock, Writers};
use crate::repository::{
    Host, RepositoryErrorKind, create_repository, new_repository, open_repository,
};
use crate::storage::Storage;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::json;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;

pub fn run(invocation: &Invocation, args: &InitArgs) -> Result<Answer, Failure> {
    let config = invocation.config()?;
    let now = invocation.clock.read().wall;
    confirm_time(invocation, args, &config, now)?;

    let folder = StateFolder::create(&config.host.state_dir)?;
    let (identity, made) = folder.ensure_identity(&now.to_string())?;
    let repository = &config.repository;
    let (store, file, created) = match config.host.role {
        HostRole::Keeper => found(&config, &folder, now)?,
        HostRole::Agent => find(&config)?,
    };
    let storage = store.storage;
    refuse_another_repository(&folder, &*storage, &file)?;
    refuse_other_writers(&config, &file)?;
    folder.remember_repository(file.repository)?;
    let host = Arc::new(local_host(invocation, &config, identity, folder));
    // The time was confirmed: what is written now starts the ledgers' clocks.
    host.vouch_for_clock();
    if args.take_over {
        host.take_over();
    }
    let mut admitted = Vec::new();
    let mut refused = Vec::new();
    for customer in &config.customers {
        let escrow = recipients(repository.escrow.iter().chain(&customer.escrow))?;
        let outcome = admit(
            &storage,
            &file,
            &customer.name,
            &host,
            &escrow,
            &customer.terms,
        );
        match outcome {
            Ok(outcome) => admitted.push((customer, outcome, escrow.len())),
            Err(error) => refused.push((&customer.name, stranger(error, &file, &host))),
        }
    }
    // A stranger is one to all of them.
    if admitted.is_empty() && !refused.is_empty() {
        return Err(refused.swap_remove(0).1);
    }

    let public_key = minisign::public_key_line(&host.identity().host_id());
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<16}{value}");
    };
    line(
        "repository",
        format!(
            "{}  ({})",
            storage.location(),
            if created { "created" } else { "was there" }
        ),
    );
    line(
        "host identity",
        format!(
            "{}  ({})",
            host.folder().identity_path().display(),
            if made { "created, 0600" } else { "was there" }
        ),
    );
    line("host id", host.identity().host_id().to_string());
    line("recipient", host.identity().recipient().to_string());
    line("certificates", format!("minisign -V -P {public_key}"));
    for (customer, outcome, _) in &admitted {
        line(
            "customer",
            format!(
                "{}  ({})",
                customer.name,
                match outcome {
                    Admission::Created => "created",
                    Admission::Rewrapped => "key wrapped for the new recipients",
                    Admission::Unchanged => "was there",
                }
            ),
        );
    }
    let outcomes = admitted.iter().map(|(customer, outcome, escrow)| {
        json!({
            "id": customer.name.as_str(),
            "outcome": match outcome {
                Admission::Created => "created",
                Admission::Rewrapped => "rewrapped",
                Admission::Unchanged => "unchanged",
            },
            "escrow_recipients": escrow,
        })
    });
    let mut tally = Tally {
        text,
        documents: outcomes.collect(),
        worst: None,
    };
    tally.all_failed(invocation, refused)?;
    tally.text.push_str(&escrow_advice(
        &config,
        &host,
        admitted.iter().any(|(.., n)| *n == 0),
    ));
    let document = |customers| {
        json!({
            "repository": file.repository.to_string(),
            "location": storage.location(),
            "created": created,
            "host": {
                "id": host.identity().host_id().to_string(),
                "recipient": host.identity().recipient().to_string(),
                "minisign_public_key": public_key,
                "identity": host.folder().identity_path(),
                "identity_created": made,
            },
            "customers": customers,
        })
    };
    Ok(tally.answer(document))
}

/// The repository, and whether it was made by this.
fn found(
    config: &Config,
    folder: &StateFolder,
    now: Timestamp,
) -> Result<(Store, RepositoryFile, bool), Failure> {
    let store = store::create(config)?;
    store.refuse_unfit(config)?;
    match open_repository(&*store.storage) {
        Ok(file) => return Ok((store, file, false)),
        Err(error) if error.kind == RepositoryErrorKind::NoRepository => {}
        Err(error) => return Err(error.into()),
    }
    let repository = &config.repository;
    let made = new_repository(now, repository.chunk_bytes, repository.writers);
    let planned = folder.planned_repository(made)?;
    let (file, created) = match create_repository(&*store.storage, planned) {
        Ok(file) => (file, true),
        // Another one at the same time, or what an earlier attempt had left under way.
        Err(error) if error.kind == RepositoryErrorKind::AlreadyExists => {
            (open_repository(&*store.storage)?, false)
        }
        Err(error) => return Err(error.into()),
    };
    folder.forget_planned_repository()?;
    Ok((store, file, created))
}

/// As `found`, for an agent, which makes none: its key is not to be able to write what all others read.
fn find(config: &Config) -> Result<(Store, RepositoryFile, bool), Failure> {
    let found = store::open(config).and_then(|store| {
        let file = open_repository(&*store.storage)?;
        Ok((store, file))
    });
    let (store, file) = found.map_err(|failure| match failure.exit {
        Exit::NoRepository => failure.hint(
            "this host is an agent, which makes no repository: vmkeep init on the keeper comes first",
        ),
        _ => failure,
    })?;
    store.refuse_unfit(config)?;
    Ok((store, file, false))
}

/// As one word of a shell.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    match word.chars().all(is_plain) {
        true => word.to_string(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}

/// A host that nobody has let in yet is told how.
fn stranger(error: JobError, file: &RepositoryFile, host: &LocalHost) -> Failure {
    if error.kind == JobErrorKind::Refused && !host.may_delete() {
        return Failure::from(error)
            .hint("vmkeep init on the keeper makes what was added to its configuration");
    }
    if error.kind != JobErrorKind::Repository(RepositoryErrorKind::WrongKey) {
        return error.into();
    }
    if file.writers() == Writers::One {
        return Failure::new(Exit::WrongKey, error.message)
            .hint("this repository is for one host alone (writers = \"one\"), which lets no other in")
            .hint("if that host is gone for good: one in its place has its identity in its state folder, and says so with vmkeep init --take-over");
    }
    let body = host.body();
    let trusted = match body.clock {
        ClockDeclaration::Trusted => " --trusted-clock",
        ClockDeclaration::Verified => "",
    };
    Failure::new(Exit::WrongKey, error.message)
        .hint("a new host beside others is let in by one of them that has the role admin:")
        .hint(format!(
            "vmkeep key admit --name {} --host-id {} --role backup --role restore{trusted} {}",
            quoted(&body.name), body.host, body.recipient
        ))
        .hint("one in the place of another takes over its identity, or an escrow identity, in its state folder")
}

/// The ledger's clock starts here, so a person says whether it is right.
fn confirm_time(
    invocation: &Invocation,
    args: &InitArgs,
    config: &Config,
    now: Timestamp,
) -> Result<(), Failure> {
    if args.yes {
        return Ok(());
    }
    let zone = TimeZone::get(&config.terms.timezone).unwrap_or(TimeZone::UTC);
    let shown = figures::second(now, &zone);
    let question = format!("This host's clock says {shown}. Is that right?");
    let answer = invocation.terminal.confirm(&question);
    if invocation.stop.load(Ordering::Relaxed) {
        return Err(Failure::new(
            Exit::Interrupted,
            "interrupted; nothing was created",
        ));
    }
    match answer {
        Some(true) => Ok(()),
        Some(false) => Err(Failure::new(
            Exit::ClockNotTrusted,
            format!("the clock says {shown}, which is not right; nothing was created"),
        )
        .hint("set the clock (NTP), then run vmkeep init again")),
        None => Err(Failure::new(
            Exit::Usage,
            format!(
                "nobody is here to say whether the clock is right, which says {shown}; nothing \
                 was created"
            ),
        )
        .hint("check the time, then: vmkeep init --yes")),
    }
}

fn recipients<'a>(texts: impl Iterator<Item = &'a String>) -> Result<Vec<AgeRecipient>, Failure> {
    let mut recipients: Vec<AgeRecipient> = Vec::new();
    for text in texts {
        let recipient = text.parse().map_err(|error| {
            Failure::new(Exit::Usage, format!("escrow recipient {text:?}: {error}"))
        })?;
        if !recipients.contains(&recipient) {
            recipients.push(recipient);
        }
    }
    Ok(recipients)
}

fn escrow_advice(config: &Config, host: &LocalHost, missing: bool) -> String {
    let identity = host.folder().identity_path();
    let mut text = String::from("\nPut in escrow, away from this host and from the store:\n");
    if missing {
        let _ = write!(
            text,
            "  No escrow recipient is set: if this host is lost, every backup is lost with it.\n\
             \x20 On another machine: age-keygen -o escrow.txt; write the age1… it prints into\n\
             \x20 escrow = [\"age1…\"] under [repository] in {}, run vmkeep init again.\n",
            config.file.display()
        );
    } else {
        text.push_str(
            "  The secret halves of the escrow recipients: with one of them and the store, the\n\
             \x20 public age tool opens every customer's key (customers/NAME/key/*.age).\n",
        );
    }
    let _ = write!(
        text,
        "  A copy of {}, so that a new host can go on in this one's name.\n\
         \x20 The minisign key above: customers check their deletion certificates with it.\n",
        identity.display()
    );
    text
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn a_name_is_one_word_of_a_shell() {
        for (name, word) in [
            ("host1.example", "host1.example"),
            ("the host", "'the host'"),
            ("o'host; rm", "'o'\\''host; rm'"),
        ] {
            assert_eq!(quoted(name), word);
        }
    }
}
