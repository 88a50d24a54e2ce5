use super::terminal::Terminal;
use indicatif::MultiProgress;
use std::io::{self, IsTerminal, Write};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

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
/// the time beside each line, so the line has none.
pub fn start(terminal: &Terminal, verbose: u8, quiet: bool) {
    let level = match (quiet, verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => LevelFilter::WARN,
        (false, 1) => LevelFilter::INFO,
        (false, 2) => LevelFilter::DEBUG,
        (false, _) => LevelFilter::TRACE,
    };
    let lines = Lines {
        progress: terminal.progress().clone(),
    };
    // A second start in one process (tests) keeps the first.
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(lines)
        .with_ansi(io::stderr().is_terminal())
        .with_target(verbose > 1)
        .without_time()
        .try_init();
}
