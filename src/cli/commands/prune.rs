use super::report::{
    action_word, decision_document, log_pruned, pruned_document, pruned_text, short,
};
use super::selection;
use super::tally::Tally;
use crate::cli::alarms::confirm_command;
use crate::cli::answer::Answer;
use crate::cli::args::{PointSelector, PruneArgs};
use crate::cli::exit::{Exit, Failure};
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::cli::outside::Outside;
use crate::cli::site::{OpenCustomer, Site, Watching};
use crate::cli::table::Table;
use crate::cli::terminal::Terminal;
use crate::config::HostRole;
use crate::jobs::{
    AlarmKind, JobError, Policies, PruneRequest, Pruned, apply_policy, foresee_policy,
    foresee_prune, prune, undo, why_not_delete,
};
use crate::model::{CustomerName, PointState};
use crate::policy::Decision;
use crate::repository::RepositoryError;
use serde_json::json;
use std::fmt::Write;

pub fn run(invocation: &Invocation, args: &PruneArgs) -> Result<Answer, Failure> {
    let site = Site::open(invocation)?;
    let customers = selection::customers(&site.config, &args.customers)?;
    let request = site.prune_request(args.confirm);
    if args.trust_clock {
        site.host.vouch_for_clock();
    }
    let is_meant = |name: &CustomerName| customers.iter().any(|one| one.name == *name);
    if let Some(point) = &args.undo {
        return bring_back(invocation, &site, is_meant, point);
    }
    if args.dry_run {
        return dry_run(invocation, &site, is_meant, request);
    }
    if site.config.host.role == HostRole::Agent {
        return Err(Failure::new(
            Exit::Failed,
            "this host is an agent ([host] role): it deletes nothing, so nothing was pruned",
        )
        .hint("a keeper of this repository prunes; what would be due: vmkeep prune --dry-run"));
    }
    // A prune goes on in a bucket that is unfit.
    let request = PruneRequest {
        copies_elsewhere: site.store.may_be_copied_elsewhere(),
        ..request
    };
    let mut tally = Tally::default();
    for config in customers {
        let outcome = site.customer(config).and_then(|open| {
            site.probe(&open.customer)?;
            let mut notes = policy_notes(&site, &open, args.confirm)?;
            let watching = Watching::new(invocation);
            let pruned = prune(
                &open.customer,
                &site.host,
                request,
                args.trust_clock,
                &watching,
                &invocation.stop,
            );
            drop(watching);
            match pruned {
                Ok(mut pruned) => {
                    notes.append(&mut pruned.notes);
                    pruned.notes = notes;
                    Ok((pruned, open))
                }
                Err(error) => Err(error.into()),
            }
        });
        match outcome {
            Ok((pruned, open)) => {
                log_pruned(&config.name, &pruned);
                let mut text = plan_text(&pruned.decisions, &open);
                text.push_str(&pruned_text(
                    &config.name,
                    &pruned,
                    &site.store.storage.location(),
                ));
                let document = pruned_document(&config.name, &pruned);
                let failure = verdict(&pruned);
                if failure.is_none() {
                    let over = [AlarmKind::PruneFailed, AlarmKind::Unexplained];
                    site.settle_alarms(&config.name, &over);
                }
                tally.add(&text, document, failure);
            }
            Err(failure) => tally.failed(invocation, &config.name, failure)?,
        }
    }
    let outside = Outside::of(&site, site.host.now());
    let outside = tally.tell_outside(invocation, &outside, &site.zone());
    Ok(tally.answer(|customers| json!({ "customers": customers, "outside": outside })))
}

fn policy_differs(customer: &CustomerName) -> String {
    format!(
        "the configured policy differs from the ledger's, which holds until the next run of a host with \
         the role admin applies it; there, {} applies it now",
        confirm_command(customer)
    )
}

/// A prune goes by the ledger's policy; a configured one that differs is told, or taken over if
/// that was confirmed.
fn policy_notes(
    site: &Site,
    open: &OpenCustomer<'_>,
    confirm: bool,
) -> Result<Vec<String>, Failure> {
    let terms = &open.config.terms;
    if open
        .customer
        .with_state(|state| state.terms.as_ref() == Some(terms))
    {
        return Ok(Vec::new());
    }
    if !confirm {
        return Ok(vec![policy_differs(&open.config.name)]);
    }
    match apply_policy(&open.customer, &site.host, terms, true)? {
        Policies::Applied => Ok(vec!["the configured policy is in force now".to_string()]),
        // The prune says so itself.
        Policies::ClockRefused { .. } => Ok(Vec::new()),
        Policies::NotOurs => Ok(vec![policy_differs(&open.config.name)]),
        Policies::Same | Policies::NeedsConfirmation { .. } | Policies::Overruled { .. } => {
            Ok(Vec::new())
        }
    }
}

/// The exit code that a prune deserves, if not 0.
pub fn verdict(pruned: &Pruned) -> Option<Failure> {
    if let Some(damage) = &pruned.damage {
        return Some(Failure::new(Exit::DamageFound, damage.to_string()));
    }
    if let Some(first) = pruned.unreadable.first() {
        let more = match pruned.unreadable.len() - 1 {
            0 => String::new(),
            more => format!("; {more} more of which something cannot be read"),
        };
        return Some(Failure::new(Exit::DamageFound, format!("{first}{more}")));
    }
    if !pruned.reclaimed.withheld.is_empty() {
        return Some(Failure::new(
            Exit::DamageFound,
            "a condemned pack holds what is nowhere else; it was kept",
        ));
    }
    let refused = pruned.reclaimed.refused.as_ref();
    if let Some(refused) = refused.or(pruned.swept.refused.as_ref()) {
        return Some(JobError::from(RepositoryError::from(refused.clone())).into());
    }
    if !pruned.swept.unexplained.is_empty() {
        return Some(
            Failure::new(
                Exit::Failed,
                "the store holds objects that the ledger does not explain",
            )
            .hint("vmkeep prune says of each what removes it, or that somebody must move it away"),
        );
    }
    None
}

/// How bad an exit code is, against another.
pub fn rank(exit: Exit) -> u8 {
    match exit {
        Exit::Done => 0,
        Exit::SomeFailed => 1,
        Exit::Failed => 2,
        Exit::Busy => 3,
        Exit::Usage => 4,
        Exit::NoRepository => 5,
        Exit::WrongKey => 6,
        Exit::ClockNotTrusted => 7,
        Exit::PromiseBroken => 8,
        Exit::DamageFound => 9,
        Exit::Interrupted => 10,
    }
}

pub fn worse(one: Option<Failure>, other: Option<Failure>) -> Option<Failure> {
    match (one, other) {
        (Some(one), Some(other)) if rank(other.exit) > rank(one.exit) => Some(other),
        (Some(one), _) => Some(one),
        (None, other) => other,
    }
}

/// A policy that waits is taken over first where that is confirmed.
fn dry_run(
    invocation: &Invocation,
    site: &Site,
    is_meant: impl Fn(&CustomerName) -> bool,
    request: PruneRequest,
) -> Result<Answer, Failure> {
    let now = site.host.now();
    let mut tally = Tally::default();
    let (opened, unopened) = site.customers(is_meant)?;
    for open in &opened {
        let terms = &open.config.terms;
        let (state, policy) = open.customer.with_state(|state| match request.confirm {
            true => foresee_policy(state, &site.host, terms, true),
            false => Ok((state.clone(), Policies::Same)),
        })?;
        let decisions = foresee_prune(&state, now, request);
        let mut text = plan_text(&decisions, open);
        let policy_note = match policy {
            Policies::Applied => {
                Some("by the configured policy, which would be in force first".to_string())
            }
            _ if state.terms.as_ref() != Some(terms) => Some(policy_differs(&open.config.name)),
            _ => None,
        };
        if let Some(note) = &policy_note {
            let _ = writeln!(text, "  {note}");
        }
        let clock = why_not_delete(&state, &site.host).map(|reason| reason.to_string());
        if let Some(reason) = &clock {
            let _ = writeln!(text, "  nothing would be deleted: {reason}");
            tally.meet(Some(Failure::new(Exit::ClockNotTrusted, reason)));
        }
        let document = json!({
            "customer": open.config.name.as_str(),
            "points": decisions.iter().map(decision_document).collect::<Vec<_>>(),
            "policy_note": policy_note,
            "clock_refusal": clock,
        });
        tally.add(&text, document, None);
    }
    tally.all_failed(invocation, unopened)?;
    Ok(tally.answer(|customers| json!({ "dry_run": true, "customers": customers })))
}

/// The plan: a line and a reason a point, oldest first.
fn plan_text(decisions: &[Decision], open: &OpenCustomer<'_>) -> String {
    if decisions.is_empty() {
        return String::new();
    }
    let zone = open.zone();
    let mut rows: Vec<&Decision> = decisions.iter().collect();
    rows.sort_by_key(|one| (&one.vm, one.taken_at));
    let mut table = Table::new()
        .name("VM")
        .left("TAKEN")
        .left("ID")
        .left("PLAN")
        .cut("REASON");
    for decision in rows {
        table.row([
            format!("{}/{}", open.config.name, decision.vm),
            figures::minute(decision.taken_at, &zone),
            short(&decision.point.to_string()),
            action_word(decision.action).to_string(),
            figures::local_times(&decision.reason.to_string(), &zone),
        ]);
    }
    table.render(Terminal::width())
}

fn bring_back(
    invocation: &Invocation,
    site: &Site,
    is_meant: impl Fn(&CustomerName) -> bool,
    selector: &PointSelector,
) -> Result<Answer, Failure> {
    let mut found = Vec::new();
    let (opened, mut unopened) = site.customers(is_meant)?;
    for open in &opened {
        let points = open.customer.with_state(|state| {
            state
                .points
                .iter()
                .filter(|(id, _)| selector.matches(id))
                .map(|(id, point)| (*id, point.state))
                .collect::<Vec<_>>()
        });
        for (id, state) in points {
            found.push((open, id, state));
        }
    }
    let (open, id) = match found.as_slice() {
        [(open, id, PointState::Expired)] => (*open, *id),
        [(_, id, PointState::Live)] => {
            return Err(Failure::new(
                Exit::Failed,
                format!("restore point {id} has not expired: there is nothing to bring back"),
            ));
        }
        [(_, id, PointState::Erased)] => {
            return Err(Failure::new(
                Exit::Failed,
                format!("restore point {id} is erased: nobody can bring it back"),
            ));
        }
        // It may be theirs.
        [] if !unopened.is_empty() => return Err(unopened.swap_remove(0).1),
        [] => {
            return Err(
                Failure::new(Exit::Failed, format!("no restore point {selector}"))
                    .hint("vmkeep prune --dry-run shows expired points with their ids"),
            );
        }
        _ => {
            return Err(Failure::new(
                Exit::Usage,
                format!("{selector} is the beginning of several ids"),
            )
            .hint("give more digits"));
        }
    };
    undo(&open.customer, id, "asked for on the command line")?;
    let notes = selection::passed_over(&unopened);
    invocation.terminal.warn_each(&notes);
    let text = format!(
        "{}: restore point {id} is back; thinning takes it again unless the policy keeps it\n",
        open.config.name
    );
    Ok(Answer::done(
        text,
        json!({
            "customer": open.config.name.as_str(),
            "id": id.to_string(),
            "undone": true,
            "notes": notes,
        }),
    ))
}
