//! A virsh that answers from a script, for tests of what is done with its answers.

use super::domain::Domain;
use super::virsh::{Reply, Virsh};
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// What a command gets for an answer.
#[derive(Debug, Clone)]
pub(super) enum Say {
    Yes(&'static str),
    No(&'static str),
    /// It hangs until it is killed.
    Nothing,
}

/// Answers by the first word of a command, in order; a command without an answer left is a
/// failure of the test.
pub(super) struct Script {
    answers: Mutex<Vec<(&'static str, Say)>>,
    asked: Mutex<Vec<String>>,
}

impl Script {
    pub(super) fn new(answers: Vec<(&'static str, Say)>) -> Self {
        Script {
            answers: Mutex::new(answers),
            asked: Mutex::default(),
        }
    }

    /// Every command so far, without the domain.
    pub(super) fn asked(&self) -> Vec<String> {
        self.asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Virsh for Script {
    fn run(&self, arguments: &[&str], _: Duration) -> Result<Reply, CaptureError> {
        let words: Vec<&str> = arguments
            .iter()
            .copied()
            .filter(|word| *word != UUID)
            .collect();
        self.asked
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(words.join(" "));
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let at = answers
            .iter()
            .position(|(command, _)| *command == words[0])
            .unwrap_or_else(|| panic!("nothing to say to {words:?}"));
        let reply = |success, stdout: &str, stderr: &str| {
            Ok(Reply {
                success,
                stdout: stdout.to_string(),
                stderr: stderr.to_string(),
            })
        };
        match answers.remove(at).1 {
            Say::Yes(text) => reply(true, text, ""),
            Say::No(text) => reply(false, "", text),
            Say::Nothing => Err(CaptureError::new(CaptureErrorKind::Tool, "virsh", "hangs")),
        }
    }
}

pub(super) const UUID: &str = "af4a5c33-756e-430d-85fe-5b2e34bbe955";

pub(super) const XML: &str = "<domain id='1'><name>db</name>\
    <uuid>af4a5c33-756e-430d-85fe-5b2e34bbe955</uuid><devices>\
    <disk type='file'><driver type='qcow2'/><source file='/a'/><target dev='vda'/></disk>\
    </devices></domain>";

pub(super) fn domain() -> Domain {
    Domain::parse("db", XML).unwrap()
}
