use super::terminal::Terminal;
use indicatif::{ProgressBar, ProgressStyle};
use std::time::Duration;

/// Bytes done of a total, with rate and time left; shown only where a person is watching.
pub struct Progress {
    bar: ProgressBar,
}

const TEMPLATE: &str = "{prefix}  {wide_bar} {binary_bytes} of {binary_total_bytes}  \
                        {binary_bytes_per_sec}  {eta} left";

impl Progress {
    pub fn start(terminal: &Terminal, label: &str, total_bytes: u64) -> Self {
        let bar = terminal.progress().add(ProgressBar::new(total_bytes));
        if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(super::terminal::printable(label));
        bar.enable_steady_tick(Duration::from_millis(250));
        Progress { bar }
    }

    pub fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
