use super::report::short;
use super::tally::Tally;
use crate::cli::answer::Answer;
use crate::cli::args::PointsArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::cli::site::{OpenCustomer, Site};
use crate::cli::table::Table;
use crate::cli::terminal::Terminal;
use crate::jobs::{hidden_by_clock, listed};
use crate::model::{CustomerName, PointKind, VmName};
use crate::policy::Deletion;
use jiff::Timestamp;
use serde_json::{Value, json};
use std::collections::BTreeSet;

pub fn run(invocation: &Invocation, args: &PointsArgs) -> Result<Answer, Failure> {
    let site = Site::open(invocation)?.with_ledgers(!args.without_ledger);
    let now = site.host.now();
    // What only the ledger says.
    let is_told = !args.without_ledger;
    let mut table = Table::new()
        .name("VM")
        .left("TAKEN")
        .cut("KIND")
        .right("DISKS")
        .right("STORED")
        .left("EXPIRES")
        .left("ID");
    let mut tally = Tally::default();
    let (opened, unopened) = site.customers(|customer| {
        args.vms.is_empty() || args.vms.iter().any(|one| one.may_be_of(customer))
    })?;
    let mut known: BTreeSet<(&CustomerName, VmName)> = BTreeSet::new();
    let mut doubts = Vec::new();
    let mut hides = None;
    for open in &opened {
        let customer = &open.config.name;
        doubts.extend(open.notes.iter().cloned());
        known.extend(open.config.vms.iter().map(|vm| (customer, vm.name.clone())));
        let asked_for = |vm: &VmName| {
            args.vms.is_empty() || args.vms.iter().any(|one| one.matches(customer, vm))
        };
        if let Some(hidden) = Hidden::of(&site, open, now, asked_for) {
            known.extend(hidden.vms.iter().map(|vm| (customer, vm.clone())));
            doubts.push(hidden.text.clone());
            hides = hides.or(Some(hidden));
        }
        let zone = open.zone();
        open.customer.with_state(|state| {
            for (id, point) in listed(state, now) {
                known.insert((customer, point.vm.clone()));
                if !asked_for(&point.vm) {
                    continue;
                }
                table.row([
                    format!("{customer}/{}", point.vm),
                    figures::minute(point.taken_at, &zone),
                    match (point.kind, point.suspect) {
                        (PointKind::Full, false) => "full".to_string(),
                        (PointKind::Incremental, false) => "incr".to_string(),
                        (PointKind::Full, true) => "full, suspect".to_string(),
                        (PointKind::Incremental, true) => "incr, suspect".to_string(),
                    },
                    figures::bytes(point.disks.iter().map(|disk| disk.size_bytes).sum()),
                    match is_told {
                        true => figures::bytes(point.stored_bytes),
                        false => "?".to_string(),
                    },
                    figures::day(point.expires_at, &zone),
                    short(&id.to_string()),
                ]);
                tally.documents.push(json!({
                    "id": id.to_string(),
                    "customer": customer.as_str(),
                    "vm": point.vm.as_str(),
                    "kind": point.kind.to_string(),
                    "taken_at": point.taken_at.to_string(),
                    "expires_at": point.expires_at.to_string(),
                    "deadline": point.deadline.to_string(),
                    "disks": point.disks.iter().map(|disk| json!({
                        "name": disk.name.as_str(),
                        "size_bytes": disk.size_bytes,
                    })).collect::<Vec<_>>(),
                    "stored_bytes": is_told.then_some(point.stored_bytes),
                    "consistency": is_told.then_some(&point.consistency),
                    "notes": point.notes,
                    "suspect": is_told.then_some(point.suspect),
                }));
            }
        });
    }
    for selector in &args.vms {
        let mut known = known.iter();
        let exists = known.any(|(customer, vm)| selector.matches(customer, vm));
        let mut unopened = unopened.iter();
        if !exists && !unopened.any(|(customer, _)| selector.may_be_of(customer)) {
            return Err(Failure::new(
                Exit::Usage,
                format!("no VM {selector}, neither configured nor with restore points"),
            )
            .hint("vmkeep points lists all of them"));
        }
    }
    let is_asked_in_vain = !args.vms.is_empty() && table.is_empty() && unopened.is_empty();
    if let Some(hidden) = hides.filter(|_| is_asked_in_vain) {
        return Err(hidden.refusal());
    }
    tally.text = match table.is_empty() {
        true => "no restore points\n".to_string(),
        false => table.render(Terminal::width()),
    };
    match invocation.general.json {
        // The document is a list of points.
        true => invocation.terminal.warn_each(&doubts),
        false => {
            for doubt in &doubts {
                tally.text.push_str(doubt);
                tally.text.push('\n');
            }
        }
    }
    tally.all_failed(invocation, unopened)?;
    Ok(tally.answer(Value::from))
}

/// Restore points of a customer that are not listed by the word of a clock that may not delete them.
pub struct Hidden {
    pub vms: BTreeSet<VmName>,
    /// For people.
    pub text: String,
}

impl Hidden {
    /// `None`: there are none, of these VMs.
    pub fn of(
        site: &Site,
        open: &OpenCustomer<'_>,
        now: Timestamp,
        asked_for: impl Fn(&VmName) -> bool,
    ) -> Option<Self> {
        let id = site.host.identity().host_id();
        let (points, last, clock) = open.customer.with_state(|state| {
            let hidden = hidden_by_clock(state, now).into_iter();
            let hidden = hidden.map(|point| point.vm.clone()).filter(&asked_for);
            let points: Vec<VmName> = hidden.collect();
            (points, state.last_witnessed, state.clock_of(&id))
        });
        let is_doubted = || site.host.judgement(clock).deletion != Deletion::Allowed;
        let last = last.filter(|_| !points.is_empty() && is_doubted())?;
        let zone = open.zone();
        let text = format!(
            "{}: {} over by this host's clock ({}); the ledger's last time is {}: is the clock right?",
            open.config.name,
            figures::count(points.len(), "restore point is", "restore points are"),
            figures::minute(now, &zone),
            figures::minute(last, &zone),
        );
        let vms = points.into_iter().collect();
        Some(Hidden { vms, text })
    }

    /// For whoever wants one of them.
    pub fn refusal(self) -> Failure {
        Failure::new(Exit::ClockNotTrusted, self.text)
            .hint("set this host's clock and run it again; nothing was deleted")
    }
}
