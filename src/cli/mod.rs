//! Floor 5: the command line. The only place that prints, exits, reads the clock and picks a
//! concrete store and hypervisor.
//!
//! A command returns an [`Answer`] (text for people and one JSON document for programs) or a
//! [`Failure`] (exit code, message, what to do); `main` alone prints them. What is absent: any
//! decision about what is kept, erased or due (`policy`), and any step of doing it (`jobs`).

mod alarms;
mod answer;
mod args;
mod clock;
mod commands;
mod exit;
mod figures;
mod interrupt;
mod invocation;
mod logging;
mod metrics;
mod notify;
mod outside;
mod overview;
mod pace;
mod priority;
mod progress;
mod secrecy;
mod secret;
mod site;
mod store;
mod table;
mod telling;
mod terminal;
mod when;

pub use answer::Answer;
pub use clock::SystemClock;
pub use exit::{Exit, Failure};
pub use when::{When, WhenError};

use args::Arguments;
use clap::Parser;
use invocation::Invocation;
use std::ffi::OsStr;
use std::process::ExitCode;
use std::sync::Arc;
use terminal::Terminal;

/// The whole program.
pub fn main() -> ExitCode {
    let unprotected = secrecy::keep_memory_private();
    let exit = match Arguments::try_parse() {
        Ok(arguments) => run(arguments, &unprotected),
        Err(error) => refuse(&error),
    };
    ExitCode::from(exit.code())
}

fn run(arguments: Arguments, unprotected: &[String]) -> Exit {
    let general = arguments.general;
    let terminal = Terminal::new(general.json, general.quiet);
    logging::start(&terminal, general.verbose, general.quiet);
    for problem in unprotected {
        tracing::warn!("{problem}");
    }
    let stop = match interrupt::stop_flag() {
        Ok(stop) => stop,
        Err(error) => {
            let message = format!("signals cannot be handled: {error}");
            return terminal.fail(&Failure::new(Exit::Failed, message));
        }
    };
    let invocation = Invocation {
        general,
        terminal,
        clock: Arc::new(SystemClock::default()),
        stop,
    };
    match commands::run(&invocation, arguments.command) {
        Ok(answer) => invocation.terminal.answer(&answer),
        Err(failure) => invocation.terminal.fail(&failure),
    }
}

/// Help and version are answers; everything else that clap says is wrong usage.
fn refuse(error: &clap::Error) -> Exit {
    if !error.use_stderr() {
        // A closed pipe (`vmkeep --help | head`) is no failure.
        let _ = error.print();
        return Exit::Done;
    }
    if std::env::args_os().any(|argument| argument == OsStr::new("--json")) {
        let text = error.render().to_string();
        let message = text.trim().trim_start_matches("error: ");
        return Terminal::new(true, true).fail(&Failure::new(Exit::Usage, message));
    }
    let _ = error.print();
    Exit::Usage
}
