use crate::cli::answer::Answer;
use crate::cli::args::{Arguments, CompletionsArgs};
use crate::cli::exit::Failure;
use clap::CommandFactory;
use serde_json::json;

pub fn run(args: CompletionsArgs) -> Result<Answer, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Arguments::command(), "vmkeep", &mut script);
    let script = String::from_utf8_lossy(&script).into_owned();
    let document = json!({"shell": args.shell.to_string(), "script": script});
    Ok(Answer::done(script, document))
}
