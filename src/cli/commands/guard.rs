use crate::cli::answer::Answer;
use crate::cli::args::GuardArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::site::VIRSH;
use crate::hypervisor::{guard, libvirt};
use serde_json::json;
use std::io;
use std::time::Duration;

/// The guard of a capture: it speaks with the agent that started it, and with nobody else.
pub fn run(args: &GuardArgs) -> Result<Answer, Failure> {
    match &args.domain {
        Some(domain) => libvirt::thaw_when_orphaned(
            io::stdin(),
            VIRSH.into(),
            args.uri.clone(),
            domain,
            Duration::from_secs(args.limit_seconds),
        )?,
        None => {
            // Its parent may die at once; then it is another process, which is never killed.
            let parent = rustix::process::getppid().filter(|parent| !parent.is_init());
            guard::serve(io::stdin(), io::stdout(), parent)
                .map_err(|detail| Failure::new(Exit::Failed, detail))?;
        }
    }
    Ok(Answer::done(String::new(), json!({})))
}
