//! One file a command: arguments in, [`Answer`] or [`Failure`] out.

mod backup;
mod completions;
mod config;
mod course;
mod guard;
mod init;
mod key;
mod ledger;
mod man;
mod notify;
mod points;
mod prune;
mod report;
mod restore;
mod run;
mod selection;
mod serve_metrics;
mod status;
mod tally;
mod tracking;
mod verify;

use super::answer::Answer;
use super::args::Command;
use super::exit::Failure;
use super::invocation::Invocation;

pub fn run(invocation: &Invocation, command: Command) -> Result<Answer, Failure> {
    match command {
        Command::Init(args) => init::run(invocation, &args),
        Command::Config(command) => config::run(invocation, command),
        Command::Run(args) => run::run(invocation, &args),
        Command::Backup(args) => backup::run(invocation, &args),
        Command::Points(args) => points::run(invocation, &args),
        Command::Restore(args) => restore::run(invocation, &args),
        Command::Prune(args) => prune::run(invocation, &args),
        Command::Verify(args) => verify::run(invocation, &args),
        Command::Status(args) => status::run(invocation, &args),
        Command::ServeMetrics(args) => serve_metrics::run(invocation, &args),
        Command::Key(command) => key::run(invocation, &command),
        Command::Ledger(command) => ledger::run(invocation, command),
        Command::Tracking(command) => tracking::run(invocation, &command),
        Command::Notify(command) => notify::run(invocation, command),
        Command::Guard(args) => guard::run(&args),
        Command::Completions(args) => completions::run(args),
        Command::Man(args) => man::run(&args),
    }
}
