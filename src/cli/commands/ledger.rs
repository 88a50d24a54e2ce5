use crate::cli::answer::Answer;
use crate::cli::args::LedgerCommand;
use crate::cli::exit::{Exit, Failure};
use crate::cli::invocation::Invocation;

pub fn run(invocation: &Invocation, command: LedgerCommand) -> Result<Answer, Failure> {
    invocation.config()?;
    let name = match command {
        LedgerCommand::Show => "show",
        LedgerCommand::Verify => "verify",
    };
    Err(Failure::new(
        Exit::Failed,
        format!("this build has no `ledger {name}` yet"),
    ))
}
