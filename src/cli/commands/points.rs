use super::report::short;
use crate::cli::answer::Answer;
use crate::cli::args::PointsArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::cli::site::Site;
use crate::cli::table::Table;
use crate::cli::terminal::Terminal;
use crate::jobs::listed;
use crate::model::{PointKind, VmName};
use serde_json::json;
use std::collections::BTreeSet;

pub fn run(invocation: &Invocation, args: &PointsArgs) -> Result<Answer, Failure> {
    let site = Site::open(invocation)?;
    let now = site.host.now();
    let mut table = Table::new()
        .cut("VM")
        .left("TAKEN")
        .left("KIND")
        .right("DISKS")
        .right("STORED")
        .left("EXPIRES")
        .left("ID");
    let mut documents = Vec::new();
    let mut known: BTreeSet<(usize, VmName)> = BTreeSet::new();
    for (number, open) in site.customers()?.iter().enumerate() {
        let customer = &open.config.name;
        known.extend(open.config.vms.iter().map(|vm| (number, vm.name.clone())));
        let zone = open.zone();
        open.customer.with_state(|state| {
            for (id, point) in listed(state, now) {
                known.insert((number, point.vm.clone()));
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
                documents.push(json!({
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
        let exists = site
            .config
            .customers
            .iter()
            .enumerate()
            .any(|(number, customer)| {
                known
                    .iter()
                    .any(|(of, vm)| *of == number && selector.matches(&customer.name, vm))
            });
        if !exists {
            return Err(Failure::new(
                Exit::Usage,
                format!("no VM {selector}, neither configured nor with restore points"),
            )
            .hint("vmkeep points lists all of them"));
        }
    }
    let text = match table.is_empty() {
        true => "no restore points\n".to_string(),
        false => table.render(Terminal::width()),
    };
    Ok(Answer::done(text, documents.into()))
}
