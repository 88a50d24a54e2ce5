use super::terminal::printable;
use crate::config::{ConfigError, Problem};
use std::fmt::Write;

/// Exit codes, the same for every command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Exit {
    Done = 0,
    Failed = 1,
    /// Wrong usage or configuration.
    Usage = 2,
    /// Some VMs failed; the others are done.
    SomeFailed = 3,
    /// A hole in the restore window, or something kept over its maximum.
    PromiseBroken = 4,
    ClockNotTrusted = 5,
    DamageFound = 6,
    NoRepository = 10,
    Busy = 11,
    WrongKey = 12,
    Interrupted = 130,
}

impl Exit {
    pub const ALL: [Exit; 11] = [
        Exit::Done,
        Exit::Failed,
        Exit::Usage,
        Exit::SomeFailed,
        Exit::PromiseBroken,
        Exit::ClockNotTrusted,
        Exit::DamageFound,
        Exit::NoRepository,
        Exit::Busy,
        Exit::WrongKey,
        Exit::Interrupted,
    ];

    pub const fn code(self) -> u8 {
        self as u8
    }

    pub const fn meaning(self) -> &'static str {
        match self {
            Exit::Done => "done",
            Exit::Failed => "failed",
            Exit::Usage => "usage or configuration",
            Exit::SomeFailed => "some VMs failed",
            Exit::PromiseBroken => "a promise is broken (hole in the window, or over the maximum)",
            Exit::ClockNotTrusted => "clock not trusted",
            Exit::DamageFound => "damage found",
            Exit::NoRepository => "no repository",
            Exit::Busy => "busy",
            Exit::WrongKey => "wrong key",
            Exit::Interrupted => "interrupted",
        }
    }
}

/// Why a command did not do what it was asked for, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub exit: Exit,
    pub message: String,
    pub hints: Vec<String>,
}

impl Failure {
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Failure {
            exit,
            message: message.into(),
            hints: Vec::new(),
        }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// For people, on stderr.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (position, line) in printable(&self.message).lines().enumerate() {
            let start = if position == 0 {
                "vmkeep: error: "
            } else {
                "  "
            };
            let _ = writeln!(text, "{start}{line}");
        }
        for hint in &self.hints {
            let _ = writeln!(text, "  hint: {}", printable(hint));
        }
        text
    }

    /// For programs, on stdout.
    pub fn document(&self) -> serde_json::Value {
        serde_json::json!({
            "error": {
                "code": self.exit.code(),
                "message": self.message,
                "hints": self.hints,
            }
        })
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        match error.problems.as_slice() {
            [one] => Failure {
                exit: Exit::Usage,
                message: Problem {
                    hint: None,
                    ..one.clone()
                }
                .to_string(),
                hints: one.hint.iter().cloned().collect(),
            },
            several => Failure::new(
                Exit::Usage,
                format!("the configuration has {} problems\n{error}", several.len()),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_the_contract() {
        assert_eq!(
            Exit::ALL.map(Exit::code),
            [0, 1, 2, 3, 4, 5, 6, 10, 11, 12, 130]
        );
    }

    #[test]
    fn a_failure_shows_its_message_then_what_to_do() {
        let failure = Failure::new(Exit::NoRepository, "no repository in /srv/store")
            .hint("create it with: vmkeep init");
        assert_eq!(
            failure.text(),
            "vmkeep: error: no repository in /srv/store\n  hint: create it with: vmkeep init\n"
        );
        assert_eq!(
            failure.document(),
            serde_json::json!({"error": {
                "code": 10,
                "message": "no repository in /srv/store",
                "hints": ["create it with: vmkeep init"],
            }})
        );
    }

    #[test]
    fn text_from_a_hostile_store_cannot_steer_the_terminal() {
        let failure = Failure::new(Exit::Failed, "host \u{1b}[2Jevil\r");
        assert_eq!(
            failure.text(),
            "vmkeep: error: host \u{fffd}[2Jevil\u{fffd}\n"
        );
    }
}
