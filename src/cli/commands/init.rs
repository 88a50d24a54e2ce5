use crate::cli::answer::Answer;
use crate::cli::args::InitArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::invocation::Invocation;

pub fn run(invocation: &Invocation, _args: &InitArgs) -> Result<Answer, Failure> {
    invocation.config()?;
    Err(Failure::new(Exit::Failed, "this build has no `init` yet"))
}
