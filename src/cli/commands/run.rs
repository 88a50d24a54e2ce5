use super::prune::{verdict, worse};
use super::report::{
    backed_up_document, backed_up_line, pruned_document, pruned_text, verified_document,
    verified_text,
};
use super::status::look;
use super::tally::Tally;
use crate::cli::answer::Answer;
use crate::cli::args::RunArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::cli::site::{OpenCustomer, Site, Watching};
use crate::config;
use crate::jobs::{
    Alarm, CustomerRun, Policies, RunSettings, VmOutcome, VmTask, due_now, plan_prune, run_customer,
};
use crate::policy::{Action, What};
use serde_json::{Value, json};
use std::fmt::Write;

pub fn run(invocation: &Invocation, args: &RunArgs) -> Result<Answer, Failure> {
    let site = Site::open(invocation)?;
    if args.dry_run {
        return dry_run(&site);
    }
    let Some(_lock) = site.host.folder().lock("run")? else {
        return Err(
            Failure::new(Exit::Busy, "another run of this host is under way")
                .hint("nothing is wrong: it does what is due; vmkeep status shows how far it is"),
        );
    };
    site.store.refuse_unfit(&site.config)?;
    let mut tally = Tally::default();
    for config in &site.config.customers {
        let outcome = site.customer(config).and_then(|open| {
            site.probe(&open.customer)?;
            let tasks = config
                .vms
                .iter()
                .map(|vm| site.task(&open, vm))
                .collect::<Result<Vec<VmTask>, Failure>>()?;
            let watching = Watching::new(invocation);
            let done = run_customer(
                &open.customer,
                &site.host,
                &config.terms,
                &tasks,
                &RunSettings {
                    backup: site.backup_settings(),
                    prune: site.prune_request(false),
                },
                &watching,
                &invocation.stop,
            );
            drop(watching);
            Ok((done?, open))
        });
        match outcome {
            Ok((done, open)) => {
                let (part, document, failure) = report(invocation, &site, &open, &done);
                tally.add(&part, document, failure);
            }
            Err(failure) => tally.failed(invocation, &config.name, failure)?,
        }
    }
    // Under cron (-q) a run that did everything has nothing to say.
    if invocation.general.quiet && tally.worst.is_none() {
        tally.text.clear();
    }
    Ok(tally.answer(|customers| json!({ "customers": customers })))
}

/// Every VM, the prune and the alarms of one customer, and the worst of it.
fn report(
    invocation: &Invocation,
    site: &Site,
    open: &OpenCustomer<'_>,
    done: &CustomerRun,
) -> (String, Value, Option<Failure>) {
    let customer = &open.config.name;
    let mut text = String::new();
    let mut worst = None;
    let fail = |failure: Failure, worst: &mut Option<Failure>| {
        invocation.terminal.warn(&failure.text());
        *worst = worse(worst.take(), Some(failure));
    };
    let policy = match &done.policies {
        Policies::Same => "same",
        Policies::Applied => {
            let _ = writeln!(text, "{customer}: the configured policy is in force now");
            "applied"
        }
        Policies::NeedsConfirmation { nights } => {
            let lost: Vec<String> = nights
                .iter()
                .map(|(vm, nights)| format!("{vm}: {nights}"))
                .collect();
            let failure = Failure::new(
                Exit::Failed,
                format!(
                    "{customer}: the configured policy is shorter and would expire several nights \
                     at once ({}); the old one holds until somebody confirms",
                    lost.join(", ")
                ),
            )
            .hint("if that is meant: vmkeep prune --confirm");
            fail(failure, &mut worst);
            "needs-confirmation"
        }
    };
    let vms: Vec<Value> = done
        .vms
        .iter()
        .map(|vm| {
            let name = format!("{customer}/{}", vm.vm);
            match &vm.outcome {
                VmOutcome::NotDue => {
                    let _ = writeln!(text, "{name}: nothing due, {}", vm.reason);
                    json!({"vm": vm.vm.as_str(), "outcome": "not-due", "reason": vm.reason})
                }
                VmOutcome::BackedUp(backed_up) => {
                    text.push_str(&backed_up_line(&name, backed_up));
                    let mut document = backed_up_document(customer, &vm.vm, backed_up);
                    document["outcome"] = "backed-up".into();
                    document["reason"] = vm.reason.clone().into();
                    document
                }
                VmOutcome::Failed(error) => {
                    let cause = Failure::from(error.clone());
                    let _ = writeln!(text, "{name}: FAILED: {}", cause.message);
                    let failure = Failure {
                        exit: Exit::SomeFailed,
                        message: format!("{name}: {}", cause.message),
                        hints: cause.hints.clone(),
                    };
                    fail(failure, &mut worst);
                    json!({
                        "vm": vm.vm.as_str(),
                        "outcome": "failed",
                        "reason": vm.reason,
                        "error": cause.document()["error"],
                    })
                }
            }
        })
        .collect();
    let prune = match &done.pruned {
        Ok(pruned) => {
            text.push_str(&pruned_text(
                customer,
                pruned,
                &site.store.storage.location(),
            ));
            if let Some(failure) = verdict(pruned) {
                fail(failure, &mut worst);
            }
            pruned_document(customer, pruned)
        }
        Err(error) => {
            let failure = Failure::from(error.clone());
            let _ = writeln!(text, "{customer}: prune: {}", failure.message);
            let document = json!({ "error": failure.document()["error"] });
            fail(failure, &mut worst);
            document
        }
    };
    let verification = match &done.verified {
        Ok(verified) => {
            if verified.packs_read > 0 || !verified.damage.is_empty() {
                text.push_str(&verified_text(customer, verified));
            }
            if let Some(first) = verified.damage.first() {
                let failure = Failure::new(Exit::DamageFound, first.clone())
                    .hint("vmkeep verify --read-data shows all of it");
                fail(failure, &mut worst);
            }
            verified_document(customer, verified)
        }
        Err(error) => {
            let failure = Failure::from(error.clone());
            let document = json!({ "error": failure.document()["error"] });
            fail(failure, &mut worst);
            document
        }
    };
    let (_, alarms) = look(open, site.host.now());
    for (alarm, what) in &alarms {
        let _ = writeln!(text, "{customer}: {what}");
        // A hole in the window or a suspect night stays one for two weeks: that is for `status` to
        // repeat.
        if matches!(alarm, Alarm::OverMaximum | Alarm::Distrusted) {
            let failure = Failure::new(Exit::PromiseBroken, format!("{customer}: {what}"));
            let failure = match alarm {
                Alarm::Distrusted => failure
                    .hint("vmkeep points marks the restore points that may lack some of them")
                    .hint("find out who writes to the disk behind the hypervisor's back"),
                _ => failure,
            };
            fail(failure, &mut worst);
        }
    }
    let document = json!({
        "customer": customer.as_str(),
        "policy": policy,
        "aborted_sessions": done.aborted_sessions,
        "vms": vms,
        "prune": prune,
        "verification": verification,
        "alarms": alarms.iter().map(|(_, what)| what).collect::<Vec<_>>(),
    });
    (text, document, worst)
}

fn dry_run(site: &Site) -> Result<Answer, Failure> {
    let now = site.host.now();
    let mut text = String::new();
    let mut documents = Vec::new();
    for open in site.customers()? {
        let customer: &config::Customer = open.config;
        let mut vms = Vec::new();
        let removed = open.customer.with_state(|state| {
            for vm in &customer.vms {
                let Some(due) = due_now(state, &vm.name, now) else {
                    continue;
                };
                let what = match due.what {
                    What::Nothing => "nothing",
                    What::Incremental => "incremental",
                    What::Full => "full",
                };
                let _ = writeln!(
                    text,
                    "{}/{}: {what}: {}",
                    customer.name, vm.name, due.reason
                );
                vms.push(json!({
                    "vm": vm.name.as_str(),
                    "due": what,
                    "reason": due.reason.to_string(),
                }));
            }
            plan_prune(state, now, site.prune_request(false))
                .into_iter()
                .filter(|decision| matches!(decision.action, Action::Expire | Action::Erase))
                .collect::<Vec<_>>()
        });
        let _ = writeln!(
            text,
            "{}: prune would expire or erase {}",
            customer.name,
            figures::count(removed.len(), "point", "points")
        );
        documents.push(json!({
            "customer": customer.name.as_str(),
            "vms": vms,
            "prune": removed.iter().map(super::report::decision_document).collect::<Vec<_>>(),
        }));
    }
    Ok(Answer::done(
        text,
        json!({ "dry_run": true, "customers": documents }),
    ))
}
