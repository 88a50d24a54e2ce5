use super::prune::{rank, worse};
use crate::cli::answer::Answer;
use crate::cli::args::StatusArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::cli::site::{OpenCustomer, Site};
use crate::cli::table::Table;
use crate::cli::terminal::Terminal;
use crate::jobs::{Alarm, VmStatus, alarms, status};
use crate::policy::NightState;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Value, json};
use std::fmt::Write;

pub fn run(invocation: &Invocation, _args: &StatusArgs) -> Result<Answer, Failure> {
    let site = Site::open(invocation)?;
    let now = site.host.now();
    let mut table = Table::new()
        .cut("VM")
        .left("LAST")
        .left("KIND")
        .right("POINTS")
        .right("NIGHTS")
        .left("NEXT EXPIRY");
    let mut lines = String::new();
    let mut vms = Vec::new();
    let mut all_alarms = Vec::new();
    let mut exit = Exit::Done;
    let mut worst: Option<Failure> = None;
    for config in &site.config.customers {
        match site.customer(config) {
            Ok(open) => {
                let (rows, found) = look(&open, now);
                let zone = open.zone();
                for row in &rows {
                    table.row(cells(config.name.as_str(), row, &zone));
                    vms.push(vm_document(config.name.as_str(), row));
                }
                for (alarm, text) in found {
                    let of = match alarm {
                        Alarm::Warning => Exit::Done,
                        // Who goes back to a suspect night may not find it: that was promised too.
                        Alarm::Suspect | Alarm::Distrusted | Alarm::Hole | Alarm::OverMaximum => {
                            Exit::PromiseBroken
                        }
                        Alarm::Damage => Exit::DamageFound,
                    };
                    if rank(of) > rank(exit) {
                        exit = of;
                    }
                    let _ = writeln!(lines, "{}: {}: {text}", word(alarm), config.name);
                    all_alarms.push(json!({
                        "customer": config.name.as_str(),
                        "severity": word(alarm),
                        "text": text,
                    }));
                }
            }
            Err(failure) => {
                let _ = writeln!(lines, "broken: {}: {}", config.name, failure.message);
                all_alarms.push(json!({
                    "customer": config.name.as_str(),
                    "severity": "broken",
                    "text": failure.message,
                }));
                worst = worse(worst, Some(failure));
            }
        }
    }
    if let Some(failure) = worst
        && rank(failure.exit) > rank(exit)
    {
        exit = failure.exit;
    }
    let mut text = table.render(Terminal::width());
    if !lines.is_empty() {
        text.push('\n');
        text.push_str(&lines);
    }
    let mut answer = Answer::done(
        text,
        json!({ "at": now.to_string(), "vms": vms, "alarms": all_alarms }),
    );
    answer.exit = exit;
    Ok(answer)
}

/// The VMs of a customer and what is wrong.
pub fn look(open: &OpenCustomer<'_>, now: Timestamp) -> (Vec<VmStatus>, Vec<(Alarm, String)>) {
    // Without an index nothing is known to be healed.
    let unhealed = open.customer.load_index();
    let unhealed = match unhealed.and_then(|index| index.unhealed()) {
        Ok(unhealed) => unhealed,
        Err(_) => open.customer.with_state(|state| state.damaged.len()),
    };
    let configured: Vec<_> = open.config.vms.iter().map(|vm| vm.name.clone()).collect();
    open.customer.with_state(|state| {
        let rows = status(state, &configured, now);
        let mut found = alarms(state, &rows, unhealed, now);
        if state.terms.as_ref() != Some(&open.config.terms) {
            found.push((
                Alarm::Warning,
                "the configured policy is not in force yet: the next run applies it, or says \
                 why not"
                    .to_string(),
            ));
        }
        (rows, found)
    })
}

fn word(alarm: Alarm) -> &'static str {
    match alarm {
        Alarm::Warning => "warning",
        Alarm::Suspect | Alarm::Distrusted => "suspect",
        Alarm::Hole | Alarm::OverMaximum => "broken",
        Alarm::Damage => "damage",
    }
}

fn cells(customer: &str, row: &VmStatus, zone: &TimeZone) -> [String; 6] {
    let (last, kind) = match &row.last {
        Some((taken_at, kind)) => (
            figures::minute(*taken_at, zone),
            match kind {
                crate::model::PointKind::Full => "full",
                crate::model::PointKind::Incremental => "incr",
            },
        ),
        None => ("never".to_string(), ""),
    };
    let nights = row.coverage.as_ref().map_or(String::new(), |coverage| {
        format!(
            "{}/{}",
            coverage.covered,
            coverage.covered + coverage.missing + coverage.suspect
        )
    });
    let name = match row.configured {
        true => format!("{customer}/{}", row.vm),
        false => format!("{customer}/{} (not configured)", row.vm),
    };
    [
        name,
        last,
        kind.to_string(),
        row.points.to_string(),
        nights,
        row.next_expiry
            .map_or(String::new(), |at| figures::day(at, zone)),
    ]
}

fn vm_document(customer: &str, row: &VmStatus) -> Value {
    let nights = row.coverage.as_ref().map(|coverage| {
        coverage
            .nights
            .iter()
            .map(|night| {
                json!({
                    "date": night.date.to_string(),
                    "state": match night.state {
                        NightState::Covered => "covered",
                        NightState::Suspect => "suspect",
                        NightState::Missing => "missing",
                        NightState::NotYet => "not-yet",
                        NightState::BeforeFirst => "before-first",
                    },
                })
            })
            .collect::<Vec<_>>()
    });
    json!({
        "customer": customer,
        "vm": row.vm.as_str(),
        "configured": row.configured,
        "points": row.points,
        "last_taken_at": row.last.map(|(at, _)| at.to_string()),
        "last_kind": row.last.map(|(_, kind)| kind.to_string()),
        "nights_covered": row.coverage.as_ref().map(|coverage| coverage.covered),
        "nights_missing": row.coverage.as_ref().map(|coverage| coverage.missing),
        "nights_suspect": row.coverage.as_ref().map(|coverage| coverage.suspect),
        "nights": nights,
        "next_expiry": row.next_expiry.map(|at| at.to_string()),
        "stored_bytes": row.stored_bytes,
        "distrusted_disks": row.distrusted.iter().map(|disk| disk.as_str()).collect::<Vec<_>>(),
    })
}
