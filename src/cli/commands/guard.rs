use crate::cli::answer::Answer;
use crate::cli::exit::{Exit, Failure};
use crate::hypervisor::guard;
use serde_json::json;
use std::io;

/// The guard of a capture: it speaks with the agent that started it, and with nobody else.
pub fn run() -> Result<Answer, Failure> {
    // Its parent may die at once; then it is another process, which is never killed.
    let parent = rustix::process::getppid().filter(|parent| !parent.is_init());
    guard::serve(io::stdin(), io::stdout(), parent)
        .map_err(|detail| Failure::new(Exit::Failed, detail))?;
    Ok(Answer::done(String::new(), json!({})))
}
