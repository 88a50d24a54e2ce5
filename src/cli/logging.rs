use super::terminal::Terminal;
use indicatif::MultiProgress;
use std::io::{self, IsTerminal, Write};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Writes log lines to stderr between the progress bars.
#[derive(Clone)]
struct Lines {
    progress: MultiProgress,
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.progress.suspend(|| io::stderr().lock().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Lines;

    fn make_writer(&'a self) -> Lines {
        self.clone()
    }
}

/// Warnings by default; `-v` what is done, `-vv` why; `-q` errors only. The journal and cron put
/// the time beside each line, so the line has none. What libraries warn of is for `-v`: what comes of it
/// is told by whoever called them.
pub fn start(terminal: &Terminal, verbose: u8, quiet: bool) {
    let (level, of_libraries) = match (quiet, verbose) {
        (true, _) => (LevelFilter::ERROR, LevelFilter::OFF),
        (false, 0) => (LevelFilter::WARN, LevelFilter::OFF),
        (false, 1) => (LevelFilter::INFO, LevelFilter::WARN),
        (false, 2) => (LevelFilter::DEBUG, LevelFilter::INFO),
        (false, _) => (LevelFilter::TRACE, LevelFilter::TRACE),
    };
    let levels = Targets::new()
        .with_target(env!("CARGO_CRATE_NAME"), level)
        .with_default(of_libraries);
    let lines = Lines {
        progress: terminal.progress().clone(),
    };
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let to_people = tracing_subscriber::fmt::layer()
        .with_writer(lines)
        .with_ansi(io::stderr().is_terminal() && !no_color)
        .with_target(verbose > 1)
        .without_time()
        .with_filter(levels);
    // A second start in one process (tests) keeps the first.
    let _ = tracing_subscriber::registry().with(to_people).try_init();
}
