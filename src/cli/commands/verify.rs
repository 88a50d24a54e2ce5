use super::prune::worse;
use super::report::{verified_document, verified_text};
use crate::cli::answer::Answer;
use crate::cli::args::VerifyArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::invocation::Invocation;
use crate::cli::site::{Site, Watching};
use crate::jobs::{VerifyRequest, verify};
use serde_json::json;
use std::fmt::Write;

pub fn run(invocation: &Invocation, args: &VerifyArgs) -> Result<Answer, Failure> {
    let site = Site::open(invocation)?;
    let request = VerifyRequest {
        trees: true,
        read_percent: args.read_data,
        unread_since: None,
        threads: site.config.host.threads,
    };
    let mut text = String::new();
    let mut documents = Vec::new();
    let mut worst: Option<Failure> = None;
    let mut damage = 0;
    for config in &site.config.customers {
        let outcome = site.customer(config).and_then(|open| {
            let watching = Watching::new(invocation);
            Ok(verify(
                &open.customer,
                request,
                &watching,
                &invocation.stop,
            )?)
        });
        match outcome {
            Ok(verified) => {
                damage += verified.damage.len();
                text.push_str(&verified_text(&config.name, &verified));
                documents.push(verified_document(&config.name, &verified));
            }
            Err(failure) if failure.exit == Exit::Interrupted => return Err(failure),
            Err(failure) => {
                let _ = writeln!(text, "{}: {}", config.name, failure.message);
                invocation.terminal.warn(&failure.text());
                documents.push(json!({
                    "customer": config.name.as_str(),
                    "error": failure.document()["error"],
                }));
                worst = worse(worst, Some(failure));
            }
        }
    }
    if damage > 0 {
        text.push_str(
            "What is damaged is named above; everything else restores. A full backup of the VMs\n\
             (vmkeep backup --full VM) stores anew what their disks still hold, which heals the\n\
             restore points that need it.\n",
        );
        worst = worse(worst, Some(Failure::new(Exit::DamageFound, "damage")));
    }
    let mut answer = Answer::done(
        text,
        json!({ "sound": worst.is_none(), "customers": documents }),
    );
    if let Some(failure) = worst {
        answer.exit = failure.exit;
    }
    Ok(answer)
}
