use super::report::{backed_up_document, backed_up_line, is_alarming, log_backed_up};
use super::selection;
use crate::cli::answer::Answer;
use crate::cli::args::BackupArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::invocation::Invocation;
use crate::cli::site::{OpenCustomer, Site, Watching};
use crate::config;
use crate::jobs::{JobErrorKind, backup_now};
use serde_json::json;

pub fn run(invocation: &Invocation, args: &BackupArgs) -> Result<Answer, Failure> {
    let mut site = Site::open(invocation)?;
    let pace = site.step_back(invocation);
    let chosen = args
        .vms
        .iter()
        .map(|selector| selection::configured(&site.config, selector))
        .collect::<Result<Vec<_>, _>>()?;
    site.store.refuse_unfit(&site.config)?;
    let mut text = String::new();
    let mut documents = Vec::new();
    let mut failures: Vec<Failure> = Vec::new();
    let mut found_lies = false;
    // Opened at its first VM, for all of them.
    let mut opened: Vec<OpenCustomer<'_>> = Vec::new();
    for (config, vm) in &chosen {
        let name = format!("{}/{}", config.name, vm.name);
        tracing::info!("{name}: begun");
        let watching = Watching::new(invocation).at_pace(&pace);
        let outcome = open_once(&site, &mut opened, config).and_then(|open| {
            let done = backup_now(
                &open.customer,
                &site.host,
                &site.task(open, vm)?,
                args.full,
                &site.backup_settings(),
                &watching,
                &invocation.stop,
            );
            match done {
                Err(error) if error.kind == JobErrorKind::Interrupted => Err(error.into()),
                other => Ok(other?),
            }
        });
        drop(watching);
        match outcome {
            Ok(done) => {
                log_backed_up(&name, &done);
                text.push_str(&backed_up_line(&name, &done));
                found_lies |= is_alarming(&done);
                documents.push(backed_up_document(&config.name, &vm.name, &done));
            }
            Err(failure) if failure.exit == Exit::Interrupted => return Err(failure),
            Err(failure) if chosen.len() == 1 => return Err(failure),
            Err(mut failure) => {
                failure.message = format!("{name}: {}", failure.message);
                invocation.terminal.tell(&failure);
                documents.push(json!({
                    "customer": config.name.as_str(),
                    "vm": vm.name.as_str(),
                    "error": failure.document()["error"],
                }));
                failures.push(failure);
            }
        }
    }
    let mut answer = Answer::done(text, json!({ "vms": documents }));
    if !failures.is_empty() {
        answer.exit = Exit::SomeFailed;
    } else if found_lies {
        // The nights before this full are suspect now.
        answer.exit = Exit::PromiseBroken;
        let found = Failure::new(answer.exit, "tracking hid changes from the nights before")
            .hint("vmkeep points marks the restore points that may lack some of them");
        invocation.terminal.tell(&found);
    }
    Ok(answer)
}

/// A customer that cannot be opened is tried again for its next VM.
fn open_once<'a, 's>(
    site: &'s Site,
    opened: &'a mut Vec<OpenCustomer<'s>>,
    config: &'s config::Customer,
) -> Result<&'a OpenCustomer<'s>, Failure> {
    let known = opened
        .iter()
        .position(|open| open.config.name == config.name);
    let at = match known {
        Some(at) => at,
        None => {
            let open = site.customer(config)?;
            site.probe(&open.customer)?;
            opened.push(open);
            opened.len() - 1
        }
    };
    opened.get(at).ok_or_else(|| {
        let message = format!("customer {} was not opened", config.name);
        Failure::new(Exit::Failed, message)
    })
}
