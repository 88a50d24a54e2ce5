use super::answer::Answer;
use super::exit::{Exit, Failure};
use indicatif::{MultiProgress, ProgressDrawTarget};
use rustix::event::{PollFd, PollFlags};
use std::io::{self, BufRead, IsTerminal, Write};

/// Control characters, which could steer a terminal, are replaced; line ends and tabs stay.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' | '\t' => c,
            c if c.is_control() => char::REPLACEMENT_CHARACTER,
            c => c,
        })
        .collect()
}

/// Where answers, failures, questions and progress go.
pub struct Terminal {
    json: bool,
    quiet: bool,
    progress: MultiProgress,
}

impl Terminal {
    pub fn new(json: bool, quiet: bool) -> Self {
        let shown = !json && !quiet && io::stderr().is_terminal();
        let target = match shown {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        Terminal {
            json,
            quiet,
            progress: MultiProgress::with_draw_target(target),
        }
    }

    pub fn progress(&self) -> &MultiProgress {
        &self.progress
    }

    /// Columns of stdout; `None` where it is not a terminal: nothing is cut short in a pipe.
    pub fn width() -> Option<usize> {
        let stdout = io::stdout();
        if !stdout.is_terminal() {
            return None;
        }
        let told = rustix::termios::tcgetwinsize(&stdout).map_or(0, |size| size.ws_col);
        Some(columns(told))
    }

    /// Prints the answer and returns the exit code of the process.
    pub fn answer(&self, answer: &Answer) -> Exit {
        let written = match self.json {
            true => write_document(&answer.document),
            false => write_text(&answer.text),
        };
        match written {
            Ok(()) => answer.exit,
            // The reader has seen enough (`vmkeep points | head`): what was done is done.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => answer.exit,
            Err(error) => {
                let mut failure = Failure::new(Exit::Failed, format!("writing to stdout: {error}"));
                if answer.exit == Exit::Done {
                    failure = failure.hint("the command itself is done; its answer alone is lost");
                }
                self.say(&failure.text());
                answer.exit.max(Exit::Failed)
            }
        }
    }

    /// Prints the failure: for people on stderr, and with `--json` for programs on stdout.
    pub fn fail(&self, failure: &Failure) -> Exit {
        self.say(&failure.text());
        if self.json {
            // Nothing is left to tell it to if stdout is gone; the exit code still says it.
            let _ = write_document(&failure.document());
        }
        failure.exit
    }

    /// A failure of a part, on stderr, while the others go on: an error even for who wants quiet.
    pub fn tell(&self, failure: &Failure) {
        self.say(&failure.text());
    }

    /// Something to know beside the answer, on stderr; not for who wants quiet.
    pub fn notice(&self, text: &str) {
        if !self.quiet {
            self.say(&printable(text));
        }
    }

    pub fn warn_each(&self, notes: &[String]) {
        for note in notes {
            self.notice(&format!("vmkeep: warning: {note}\n"));
        }
    }

    /// A line for the person watching, on stderr.
    fn say(&self, text: &str) {
        self.progress.suspend(|| {
            let _ = io::stderr().lock().write_all(text.as_bytes());
        });
    }

    /// Asks a yes-or-no question; `None` where nobody is there to ask, or a signal came first.
    pub fn confirm(&self, question: &str) -> Option<bool> {
        if self.json || !io::stdin().is_terminal() || !io::stderr().is_terminal() {
            return None;
        }
        self.say(&format!("{} [y/N] ", printable(question)));
        // A read goes on after a signal; this does not.
        let stdin = io::stdin();
        rustix::event::poll(&mut [PollFd::new(&stdin, PollFlags::IN)], None).ok()?;
        let mut line = String::new();
        stdin.lock().read_line(&mut line).ok()?;
        Some(matches!(
            line.trim().to_ascii_lowercase().as_str(),
            "y" | "yes"
        ))
    }
}

/// A terminal that does not know its width says 0.
fn columns(told: u16) -> usize {
    match told {
        0 => 80,
        told => usize::from(told).max(40),
    }
}

fn write_text(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(printable(text).as_bytes())?;
    stdout.flush()
}

fn write_document(document: &serde_json::Value) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{document:#}")?;
    stdout.flush()
}

#[cfg(test)]
mod tests {
    use super::columns;

    #[test]
    fn a_terminal_that_does_not_know_its_width_has_80_columns() {
        assert_eq!([0, 20, 132].map(columns), [80, 40, 132]);
    }
}
