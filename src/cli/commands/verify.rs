use super::report::{verified_document, verified_text};
use super::tally::Tally;
use crate::cli::answer::Answer;
use crate::cli::args::VerifyArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::invocation::Invocation;
use crate::cli::site::{Site, Watching};
use crate::jobs::{VerifyRequest, verify};
use serde_json::json;

pub fn run(invocation: &Invocation, args: &VerifyArgs) -> Result<Answer, Failure> {
    let site = Site::open(invocation)?;
    let request = VerifyRequest {
        trees: true,
        read_percent: args.read_data,
        unread_since: None,
        threads: site.config.host.threads,
    };
    let mut tally = Tally::default();
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
                let text = verified_text(&config.name, &verified);
                tally.add(&text, verified_document(&config.name, &verified), None);
            }
            Err(failure) => tally.failed(invocation, &config.name, failure)?,
        }
    }
    if damage > 0 {
        tally.text.push_str(
            "What is damaged is named above; everything else restores. A full backup of the VMs\n\
             (vmkeep backup --full VM) stores anew what their disks still hold, which heals the\n\
             restore points that need it.\n",
        );
        tally.meet(Some(Failure::new(Exit::DamageFound, "damage")));
    }
    let sound = tally.worst.is_none();
    Ok(tally.answer(|customers| json!({ "sound": sound, "customers": customers })))
}
