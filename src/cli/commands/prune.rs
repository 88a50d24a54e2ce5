use super::report::{action_word, decision_document, pruned_document, pruned_text, short};
use super::tally::Tally;
use crate::cli::answer::Answer;
use crate::cli::args::{PointSelector, PruneArgs};
use crate::cli::exit::{Exit, Failure};
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::cli::site::{OpenCustomer, Site, Watching};
use crate::cli::table::Table;
use crate::cli::terminal::Terminal;
use crate::config::HostRole;
use crate::jobs::{
    JobError, Policies, PruneRequest, Pruned, apply_policy, foresee_policy, plan_prune, prune, undo,
};
use crate::model::PointState;
use crate::policy::{Decision, Deletion};
use crate::repository::RepositoryError;
use jiff::Timestamp;
use serde_json::json;
use std::fmt::Write;

pub fn run(invocation: &Invocation, args: &PruneArgs) -> Result<Answer, Failure> {
    let site = Site::open(invocation)?;
    let request = site.prune_request(args.confirm);
    if args.trust_clock {
        site.host.vouch_for_clock();
    }
    if let Some(point) = &args.undo {
        return bring_back(&site, point);
    }
    if args.dry_run {
        return dry_run(&site, request, args.confirm);
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
    for config in &site.config.customers {
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
                let mut text = plan_text(&pruned.decisions, &open);
                text.push_str(&pruned_text(
                    &config.name,
                    &pruned,
                    &site.store.storage.location(),
                ));
                let document = pruned_document(&config.name, &pruned);
                tally.add(&text, document, verdict(&pruned));
            }
            Err(failure) => tally.failed(invocation, &config.name, failure)?,
        }
    }
    Ok(tally.answer(|customers| json!({ "customers": customers })))
}

const POLICY_DIFFERS: &str = "the configured policy differs from the ledger's, which holds until \
the next run applies it; prune --confirm applies it now";

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
        return Ok(vec![POLICY_DIFFERS.to_string()]);
    }
    match apply_policy(&open.customer, &site.host, terms, true)? {
        Policies::Applied => Ok(vec!["the configured policy is in force now".to_string()]),
        // The prune says so itself.
        Policies::ClockRefused { .. } => Ok(Vec::new()),
        Policies::Same | Policies::NeedsConfirmation { .. } => Ok(Vec::new()),
    }
}

/// The exit code that a prune deserves, if not 0.
pub fn verdict(pruned: &Pruned) -> Option<Failure> {
    if let Some(damage) = &pruned.damage {
        return Some(Failure::new(Exit::DamageFound, damage.to_string()));
    }
    if !pruned.reclaimed.withheld.is_empty() {
        return Some(Failure::new(
            Exit::DamageFound,
            "a condemned pack holds what is nowhere else; it was kept",
        ));
    }
    if let Some(refused) = &pruned.reclaimed.refused {
        return Some(JobError::from(RepositoryError::from(refused.clone())).into());
    }
    if !pruned.swept.unexplained.is_empty() {
        return Some(
            Failure::new(
                Exit::Failed,
                "the store holds objects that the ledger does not explain",
            )
            .hint("move them away, or let prune --confirm remove them"),
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

/// `confirm`: a waiting policy is taken over first.
fn dry_run(site: &Site, request: PruneRequest, confirm: bool) -> Result<Answer, Failure> {
    let now = site.host.now();
    let mut text = String::new();
    let mut documents = Vec::new();
    let mut exit = Exit::Done;
    for open in site.customers()? {
        let terms = &open.config.terms;
        let (state, policy) = open.customer.with_state(|state| match confirm {
            true => foresee_policy(state, &site.host, terms, true),
            false => Ok((state.clone(), Policies::Same)),
        })?;
        let decisions = plan_prune(&state, now, request);
        text.push_str(&plan_text(&decisions, &open));
        let policy_note = match policy {
            Policies::Applied => Some("by the configured policy, which would be in force first"),
            _ if state.terms.as_ref() != Some(terms) => Some(POLICY_DIFFERS),
            _ => None,
        };
        if let Some(note) = policy_note {
            let _ = writeln!(text, "  {note}");
        }
        let clock = match site.host.judgement(state.last_witnessed).deletion {
            Deletion::Allowed => None,
            Deletion::Refused { reason } => {
                exit = Exit::ClockNotTrusted;
                Some(reason.to_string())
            }
        };
        if let Some(reason) = &clock {
            let _ = writeln!(text, "  nothing would be deleted: {reason}");
        }
        documents.push(json!({
            "customer": open.config.name.as_str(),
            "points": decisions.iter().map(decision_document).collect::<Vec<_>>(),
            "policy_note": policy_note,
            "clock_refusal": clock,
        }));
    }
    let mut answer = Answer::done(text, json!({ "dry_run": true, "customers": documents }));
    answer.exit = exit;
    Ok(answer)
}

/// The plan: a line and a reason a point, oldest first.
fn plan_text(decisions: &[Decision], open: &OpenCustomer<'_>) -> String {
    if decisions.is_empty() {
        return String::new();
    }
    let zone = open.zone();
    let mut rows: Vec<(Timestamp, &Decision)> = open.customer.with_state(|state| {
        let taken = |point| state.points.get(point).map(|row| row.taken_at);
        decisions
            .iter()
            .map(|decision| (taken(&decision.point).unwrap_or(Timestamp::MIN), decision))
            .collect()
    });
    rows.sort_by(|one, other| (&one.1.vm, one.0).cmp(&(&other.1.vm, other.0)));
    let mut table = Table::new()
        .left("VM")
        .left("TAKEN")
        .left("ID")
        .left("PLAN")
        .cut("REASON");
    for (taken_at, decision) in rows {
        table.row([
            format!("{}/{}", open.config.name, decision.vm),
            figures::minute(taken_at, &zone),
            short(&decision.point.to_string()),
            action_word(decision.action).to_string(),
            decision.reason.to_string(),
        ]);
    }
    table.render(Terminal::width())
}

fn bring_back(site: &Site, selector: &PointSelector) -> Result<Answer, Failure> {
    let mut found = Vec::new();
    for open in site.customers()? {
        let points = open.customer.with_state(|state| {
            state
                .points
                .iter()
                .filter(|(id, _)| selector.matches(id))
                .map(|(id, point)| (*id, point.state))
                .collect::<Vec<_>>()
        });
        for (id, state) in points {
            found.push((open.config, id, state));
        }
    }
    let (config, id) = match found.as_slice() {
        [(config, id, PointState::Expired)] => (*config, *id),
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
    let open = site.customer(config)?;
    undo(&open.customer, id, "asked for on the command line")?;
    let text = format!(
        "{}: restore point {id} is back; thinning takes it again unless the policy keeps it\n",
        config.name
    );
    Ok(Answer::done(
        text,
        json!({ "customer": config.name.as_str(), "id": id.to_string(), "undone": true }),
    ))
}
