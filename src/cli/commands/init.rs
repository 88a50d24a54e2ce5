use super::key::admit_command;
use super::tally::Tally;
use crate::cli::answer::Answer;
use crate::cli::args::InitArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::cli::site::{
    local_host, refuse_another_repository, refuse_other_writers, refused_identity,
    without_repository,
};
use crate::cli::store::{self, Store};
use crate::codec::age::AgeRecipient;
use crate::codec::minisign;
use crate::config::{Config, HostRole};
use crate::format::entry::{HostBody, Role};
use crate::format::repository_file::RepositoryFile;
use crate::jobs::{Admission, Admitted, JobError, JobErrorKind, LocalHost, StateFolder, admit};
use crate::model::{Clock, CustomerName, Writers};
use crate::repository::{
    Host, RepositoryErrorKind, create_repository, new_repository, open_repository,
    recover_repository,
};
use crate::storage::Storage;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::json;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What became of the repository.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Made {
    Before,
    Now,
    /// Its customers were there, and `vmkeep.json` was not.
    Anew,
}

pub fn run(invocation: &Invocation, args: &InitArgs) -> Result<Answer, Failure> {
    let config = invocation.config()?;
    let now = invocation.clock.read().wall;
    confirm_time(invocation, args, &config, now)?;

    let folder = StateFolder::create(&config.host.state_dir)?;
    let (identity, made) = folder
        .ensure_identity(&now.to_string())
        .map_err(refused_identity)?;
    let repository = &config.repository;
    let (store, file, repository_made) = match config.host.role {
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
            Ok(done) => admitted.push((customer, done, escrow.len())),
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
            match repository_made {
                Made::Before => "was there",
                Made::Now => "created",
                Made::Anew => "was there; its vmkeep.json was lost, and is made anew",
            }
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
    for (customer, done, _) in &admitted {
        let what = match done.outcome {
            Admission::Created => "created",
            Admission::Rewrapped => "key wrapped for the new recipients",
            Admission::Unchanged => "was there",
        };
        line("customer", format!("{}  ({what})", customer.name));
    }
    for (customer, done, _) in &admitted {
        text.push_str(&for_an_administrator(&customer.name, done));
    }
    let outcomes = admitted.iter().map(|(customer, done, escrow)| {
        let without_key = done.without_key.iter().map(ToString::to_string);
        json!({
            "id": customer.name.as_str(),
            "outcome": match done.outcome {
                Admission::Created => "created",
                Admission::Rewrapped => "rewrapped",
                Admission::Unchanged => "unchanged",
            },
            "escrow_recipients": escrow,
            "has_escrow": done.has_escrow,
            "without_key": without_key.collect::<Vec<_>>(),
            "host_differs": done.unentered.is_some(),
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
        admitted.iter().any(|(_, done, _)| !done.has_escrow),
    ));
    let document = |customers| {
        json!({
            "repository": file.repository.to_string(),
            "location": storage.location(),
            "created": repository_made == Made::Now,
            "recovered": repository_made == Made::Anew,
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

/// What a host without the role admin leaves to one with it.
fn for_an_administrator(customer: &CustomerName, done: &Admitted) -> String {
    let mut text = String::new();
    if let Some(host) = &done.unentered {
        let _ = write!(
            text,
            "{customer}: the ledger has this host under another name or clock. Run on a host with the role \
             admin:\n  {}\n",
            admit_command(host)
        );
    }
    if let Some(first) = done.without_key.first() {
        let more = match done.without_key.len() - 1 {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let _ = writeln!(
            text,
            "{customer}: the newest key file is not for {first}{more}: vmkeep init on a host with the role \
             admin,\n  and the same escrow, wraps the key for all"
        );
    }
    text
}

/// The repository, which is made unless there is one. A host that uses one makes no other: its store may be
/// a disk that is not mounted, into whose mount point nothing is written.
fn found(
    config: &Config,
    folder: &StateFolder,
    now: Timestamp,
) -> Result<(Store, RepositoryFile, Made), Failure> {
    let is_used = folder.repository()?.is_some();
    let mut store = match is_used {
        true => store::open(config).map_err(|failure| without_repository(failure, config, None))?,
        false => store::create(config)?,
    };
    store.refuse_unfit(config)?;
    let repository = &config.repository;
    let (file, made) = match open_repository(&*store.storage) {
        Ok(file) => (file, Made::Before),
        Err(error) if error.kind == RepositoryErrorKind::NoRepository => {
            let new = new_repository(now, repository.chunk_bytes, repository.writers);
            let lost = recover_repository(&store.storage, &new).map_err(|error| {
                Failure::from(error)
                    .hint("a copy of vmkeep.json, put back into the store, is all that is needed")
            })?;
            match lost {
                Some(file) => {
                    refuse_another_repository(folder, &*store.storage, &file)?;
                    refuse_other_writers(config, &file)?;
                    (file, Made::Anew)
                }
                None if is_used => {
                    return Err(without_repository(
                        error.into(),
                        config,
                        Some(&*store.storage),
                    ));
                }
                None => (folder.planned_repository(new)?, Made::Now),
            }
        }
        Err(error) => return Err(error.into()),
    };
    if is_used {
        // For the reserve, which may be another one by now.
        store = store::create(config)?;
    }
    if made == Made::Before {
        return Ok((store, file, made));
    }
    let (file, made) = match create_repository(&*store.storage, file) {
        Ok(file) => (file, made),
        // Another one at the same time, or what an earlier attempt had left under way.
        Err(error) if error.kind == RepositoryErrorKind::AlreadyExists => {
            (open_repository(&*store.storage)?, Made::Before)
        }
        Err(error) => return Err(error.into()),
    };
    folder.forget_planned_repository()?;
    Ok((store, file, made))
}

/// As `found`, for an agent, which makes none: its key is not to be able to write what all others read.
fn find(config: &Config) -> Result<(Store, RepositoryFile, Made), Failure> {
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
    Ok((store, file, Made::Before))
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
    let newcomer = HostBody {
        roles: vec![Role::Backup, Role::Restore],
        ..host.body()
    };
    Failure::new(Exit::WrongKey, error.message)
        .hint("a new host beside others is let in by one of them that has the role admin:")
        .hint(admit_command(&newcomer))
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
