use super::prune::rank;
use crate::cli::alarms::{Concern, exit_of};
use crate::cli::answer::Answer;
use crate::cli::args::StatusArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::cli::overview::{Overview, VmRow};
use crate::cli::site::Site;
use crate::cli::table::Table;
use crate::cli::terminal::Terminal;
use crate::jobs::{AlarmKind, LastRun, Severity, UnderWay};
use crate::policy::{Night, NightState};
use jiff::tz::TimeZone;
use serde_json::{Value, json};
use std::fmt::Write;

/// What the marks of the nights mean.
const LEGEND: &str = "nights, oldest first: # a restore point  ? suspect  X none  . not over yet\n";

// The exit codes of such plugins, 0 to 3, by the names that these have elsewhere.
const OK: Exit = Exit::Done;
const WARNING: Exit = Exit::Failed;
const CRITICAL: Exit = Exit::Usage;
const UNKNOWN: Exit = Exit::SomeFailed;

pub fn run(invocation: &Invocation, args: &StatusArgs) -> Result<Answer, Failure> {
    let site = match Site::open(invocation) {
        Err(failure) if args.check => return Ok(unknown(&failure)),
        opened => opened?,
    };
    let now = site.host.now();
    let overview = Overview::of(&site, now);
    let mut exit = Exit::Done;
    for concern in &overview.concerns {
        let of = match concern.alarm.kind {
            AlarmKind::BackupFailed => Exit::SomeFailed,
            kind => exit_of(kind.severity()),
        };
        if rank(of) > rank(exit) {
            exit = of;
        }
    }
    for (_, failure) in &overview.unreachable {
        if rank(failure.exit) > rank(exit) {
            exit = failure.exit;
        }
    }
    if args.check {
        return Ok(check(&overview));
    }
    let folder = site.host.folder();
    let (last_run, under_way) = (folder.last_run(), folder.under_way());
    let zone = site.zone();
    let runs = [
        last_run.as_ref().map(|run| last_run_line(run, &zone)),
        under_way.as_ref().map(|run| under_way_line(run, &zone)),
    ];
    let runs: String = runs.into_iter().flatten().collect();
    let mut answer = Answer::done(
        text(&overview, &runs, &zone),
        json!({
            "at": now.to_string(),
            "last_run": last_run.as_ref().map(last_run_document),
            "run_under_way": under_way.as_ref().map(under_way_document),
            "vms": overview.rows.iter().map(vm_document).collect::<Vec<_>>(),
            "alarms": overview.concerns.iter().map(Concern::document).collect::<Vec<_>>(),
        }),
    );
    answer.exit = exit;
    Ok(answer)
}

/// `runs`: lines below the table. `zone`: of what is of no customer.
fn text(overview: &Overview, runs: &str, zone: &TimeZone) -> String {
    let mut table = Table::new()
        .left("")
        .name("VM")
        .left("LAST")
        .left("KIND")
        .right("POINTS")
        .latest("NIGHTS")
        .left("EXPIRY");
    for row in &overview.rows {
        table.row(cells(row));
    }
    let mut text = table.render(Terminal::width());
    if !overview.rows.is_empty() {
        text.push_str(LEGEND);
    }
    text.push_str(runs);
    if !overview.concerns.is_empty() {
        text.push('\n');
    }
    for concern in &overview.concerns {
        let mut rows = overview.rows.iter();
        let row = rows.find(|row| Some(&row.customer) == concern.customer.as_ref());
        let zone = row.map_or(zone, |row| &row.zone);
        let line = figures::local_times(&concern.line(), zone);
        let _ = writeln!(text, "{line}");
    }
    text
}

fn last_run_line(run: &LastRun, zone: &TimeZone) -> String {
    let ended = figures::minute(run.ended_at, zone);
    let mut line = format!("last run ended {ended}, exit {}", run.exit_code);
    for (vms, what) in [(run.backed_up, "backed up"), (run.failed, "failed")] {
        if vms > 0 {
            let _ = write!(line, ", {} {what}", count_vms(vms));
        }
    }
    line + "\n"
}

fn last_run_document(run: &LastRun) -> Value {
    json!({
        "began_at": run.began_at.to_string(),
        "ended_at": run.ended_at.to_string(),
        "exit_code": run.exit_code,
        "succeeded_at": run.succeeded_at.map(|at| at.to_string()),
        "backed_up": run.backed_up,
        "failed": run.failed,
        "read_bytes": run.read_bytes,
        "stored_bytes": run.stored_bytes,
    })
}

fn under_way_line(run: &UnderWay, zone: &TimeZone) -> String {
    format!(
        "a run is under way since {}, {} of {} done: {}\n",
        figures::minute(run.began_at, zone),
        run.vms_done,
        count_vms(run.vms),
        run.at
    )
}

fn under_way_document(run: &UnderWay) -> Value {
    json!({
        "began_at": run.began_at.to_string(),
        "vms": run.vms,
        "vms_done": run.vms_done,
        "at": run.at,
    })
}

fn count_vms(vms: u64) -> String {
    figures::count(usize::try_from(vms).unwrap_or(usize::MAX), "VM", "VMs")
}

/// For plugins of Nagios and its like: whoever cannot look knows nothing.
fn unknown(failure: &Failure) -> Answer {
    let line = format!("VMKEEP UNKNOWN - {}", failure.message.replace('\n', " "));
    let mut answer = Answer::done(
        format!("{line}\n"),
        json!({ "state": "UNKNOWN", "line": line }),
    );
    answer.exit = UNKNOWN;
    answer
}

/// One line and an exit code as those plugins have them.
fn check(overview: &Overview) -> Answer {
    let severities = || {
        overview
            .concerns
            .iter()
            .map(|one| one.alarm.kind.severity())
    };
    let broken = severities().filter(|one| *one > Severity::Warning).count();
    let warnings = severities().filter(|one| *one == Severity::Warning).count();
    let (word, exit) = match (broken, warnings) {
        (0, 0) => ("OK", OK),
        (0, _) => ("WARNING", WARNING),
        _ => ("CRITICAL", CRITICAL),
    };
    let mut vms = overview.rows.iter().filter(|row| row.status.configured);
    let all = vms.clone().count();
    let well = vms
        .by_ref()
        .filter(|row| row.severity.is_none_or(|one| one == Severity::Warning))
        .count();
    let worst = overview.concerns.first();
    let what = worst.map_or(String::new(), |worst| format!(": {}", worst.line()));
    let more = overview.concerns.len().saturating_sub(1);
    let more = match more {
        0 => String::new(),
        more => format!(" (+{more} more)"),
    };
    let line = format!(
        "VMKEEP {word} - {well} of {all} VMs protected{what}{more} | \
         vms={all} unprotected={} broken={broken} warnings={warnings}",
        all - well
    );
    let line = line.replace('\n', " ");
    let mut answer = Answer::done(
        format!("{line}\n"),
        json!({ "state": word, "line": line, "vms": all, "protected": well }),
    );
    answer.exit = exit;
    answer
}

fn cells(row: &VmRow) -> [String; 7] {
    let status = &row.status;
    let mark = match row.severity {
        None => "",
        Some(Severity::Warning) => "!",
        Some(_) => "X",
    };
    let (last, kind) = match &status.last {
        Some((taken_at, kind)) => (
            figures::minute(*taken_at, &row.zone),
            match kind {
                crate::model::PointKind::Full => "full",
                crate::model::PointKind::Incremental => "incr",
            },
        ),
        None => ("never".to_string(), ""),
    };
    let nights = row.nights().map_or(String::new(), |nights| {
        let all = status.coverage.as_ref().map_or(0, |all| all.nights.len());
        // Those that are not owed are blank, so that each night has its column.
        strip(nights) + &" ".repeat(all.saturating_sub(nights.len()))
    });
    let name = match status.configured {
        true => format!("{}/{}", row.customer, status.vm),
        false => format!("{}/{} (gone)", row.customer, status.vm),
    };
    [
        mark.to_string(),
        name,
        last,
        kind.to_string(),
        status.points.to_string(),
        nights,
        status
            .next_expiry
            .map_or(String::new(), |at| figures::day(at, &row.zone)),
    ]
}

/// The nights as marks, oldest first.
fn strip(nights: &[Night]) -> String {
    let mark = |night: &Night| match night.state {
        NightState::Covered => '#',
        NightState::Suspect => '?',
        NightState::Missing => 'X',
        NightState::NotYet => '.',
        NightState::BeforeFirst => ' ',
    };
    nights.iter().map(mark).collect()
}

fn vm_document(row: &VmRow) -> Value {
    let owed = row.nights();
    let VmRow {
        customer,
        status: row,
        ..
    } = row;
    let missing = owed.map(|nights| {
        let missing = nights
            .iter()
            .filter(|night| night.state == NightState::Missing);
        missing.count()
    });
    let nights = owed.map(|nights| {
        nights
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
        "customer": customer.as_str(),
        "vm": row.vm.as_str(),
        "configured": row.configured,
        "points": row.points,
        "last_taken_at": row.last.map(|(at, _)| at.to_string()),
        "last_kind": row.last.map(|(_, kind)| kind.to_string()),
        "nights_covered": row.coverage.as_ref().map(|coverage| coverage.covered),
        "nights_missing": missing,
        "nights_suspect": row.coverage.as_ref().map(|coverage| coverage.suspect),
        "nights": nights,
        "next_expiry": row.next_expiry.map(|at| at.to_string()),
        "stored_bytes": row.stored_bytes,
        "distrusted_disks": row.distrusted.iter().map(|disk| disk.as_str()).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::civil::date;

    #[test]
    fn nights_are_a_strip_of_marks() {
        let states = [
            NightState::BeforeFirst,
            NightState::Covered,
            NightState::Missing,
            NightState::Suspect,
            NightState::NotYet,
        ];
        let nights = states.map(|state| Night {
            date: date(2026, 11, 8),
            state,
        });
        assert_eq!(strip(&nights), " #X?.");
    }
}
