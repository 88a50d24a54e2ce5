//! Where a secret is. It is never in the configuration itself, which more people may read.

use super::customer::check_path;
use super::problem::Problem;
use super::section::Section;
use std::path::PathBuf;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    File(PathBuf),
    /// A program and its arguments, which prints it.
    Command(Vec<String>),
    /// A file in the folder that systemd hands to the service (`LoadCredential=`).
    Credential(String),
}

/// The three keys of one secret.
pub(super) struct SecretKeys {
    pub file: &'static str,
    pub command: &'static str,
    pub credential: &'static str,
}

impl SecretKeys {
    /// For a hint.
    pub fn named(&self) -> String {
        format!("{}, {} or {}", self.file, self.command, self.credential)
    }
}

/// Every place that is given: of one secret there should be no more than one.
pub(super) fn read_sources(
    keys: &SecretKeys,
    section: &mut Section<'_>,
    problems: &mut Vec<Problem>,
) -> Vec<SecretSource> {
    let mut sources = Vec::new();
    if let Some(file) = section.text(keys.file, problems) {
        let file = PathBuf::from(file);
        check_path(section, keys.file, &file, problems);
        sources.push(SecretSource::File(file));
    }
    let command = section.texts(keys.command, problems);
    if !command.is_empty() {
        let words = command.into_iter().map(str::to_string);
        sources.push(SecretSource::Command(words.collect()));
    }
    if let Some(credential) = section.text(keys.credential, problems) {
        if !is_word(credential) {
            let message = "the name after LoadCredential=, without a path";
            problems.push(section.problem(keys.credential, message));
        }
        sources.push(SecretSource::Credential(credential.to_string()));
    }
    sources
}

/// The one place that is given, if any.
pub(super) fn read_source(
    keys: &SecretKeys,
    section: &mut Section<'_>,
    problems: &mut Vec<Problem>,
) -> Option<SecretSource> {
    let mut sources = read_sources(keys, section, problems);
    if sources.len() > 1 {
        let message = format!("one of {}", keys.named());
        problems.push(section.problem(keys.file, message));
    }
    sources.pop()
}

pub(super) fn is_word(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 64
        && !text.starts_with('.')
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}
