use super::report::short;
use super::tally::Tally;
use crate::cli::answer::Answer;
use crate::cli::args::PointsArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::cli::site::Site;
use crate::cli::table::Table;
use crate::cli::terminal::Terminal;
use crate::jobs::listed;
use crate::model::{CustomerName, PointKind, VmName};
use serde_json::{Value, json};
use std::collections::BTreeSet;

pub fn run(invocation: &Invocation, args: &PointsArgs) -> Result<Answer, Failure> {
    let site = Site::open(invocation)?;
    let now = site.host.now();
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
    for open in &opened {
        let customer = &open.config.name;
        known.extend(open.config.vms.iter().map(|vm| (customer, vm.name.clone())));
        let zone = open.zone();
        open.customer.with_state(|state| {
            for (id, point) in listed(state, now) {
                known.insert((customer, point.vm.clone()));
                let wanted = args.vms.is_empty()
                    || args
                        .vms
                        .iter()
                        .any(|selector| selector.matches(customer, &point.vm));
                if !wanted {
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
                    figures::bytes(point.stored_bytes),
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
                    "stored_bytes": point.stored_bytes,
                    "consistency": point.consistency,
                    "notes": point.notes,
                    "suspect": point.suspect,
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
    tally.text = match table.is_empty() {
        true => "no restore points\n".to_string(),
        false => table.render(Terminal::width()),
    };
    tally.all_failed(invocation, unopened)?;
    Ok(tally.answer(Value::from))
}
