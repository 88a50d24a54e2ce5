use super::terminal::Terminal;
use indicatif::MultiProgress;
use std::fmt;
use std::io::{self, IsTerminal, Write};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

const OWN: &str = env!("CARGO_CRATE_NAME");

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

/// Lines that begin like those of failures. The journal and cron put the time beside each.
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = *event.metadata().level();
        let (word, colour) = match level {
            Level::ERROR => ("error", 31),
            Level::WARN => ("warning", 33),
            Level::INFO => ("", 0),
            Level::DEBUG => ("debug", 34),
            Level::TRACE => ("trace", 35),
        };
        writer.write_str("vmkeep: ")?;
        match (word, writer.has_ansi_escapes()) {
            ("", _) => {}
            (_, true) => write!(writer, "\u{1b}[{colour}m{word}\u{1b}[0m: ")?,
            (_, false) => write!(writer, "{word}: ")?,
        }
        let target = event.metadata().target();
        if target.split("::").next() != Some(OWN) {
            write!(writer, "{target}: ")?;
        }
        context.format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

/// Warnings by default; `-v` what is done, `-vv` why; `-q` errors only. What libraries warn of is for `-v`: what
/// comes of it is told by whoever called them.
pub fn start(terminal: &Terminal, verbose: u8, quiet: bool) {
    let (level, of_libraries) = match (quiet, verbose) {
        (true, _) => (LevelFilter::ERROR, LevelFilter::OFF),
        (false, 0) => (LevelFilter::WARN, LevelFilter::OFF),
        (false, 1) => (LevelFilter::INFO, LevelFilter::WARN),
        (false, 2) => (LevelFilter::DEBUG, LevelFilter::INFO),
        (false, _) => (LevelFilter::TRACE, LevelFilter::TRACE),
    };
    let levels = Targets::new()
        .with_target(OWN, level)
        .with_default(of_libraries);
    let lines = Lines {
        progress: terminal.progress().clone(),
    };
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let to_people = tracing_subscriber::fmt::layer()
        .with_writer(lines)
        .with_ansi(io::stderr().is_terminal() && !no_color)
        .event_format(Line)
        .with_filter(levels);
    // A second start in one process (tests) keeps the first.
    let _ = tracing_subscriber::registry().with(to_people).try_init();
}
