//! Reading one TOML table key by key, remembering what was asked for, so that everything else is
//! an unknown key. A problem does not stop the reading: an administrator sees all of them at once.

use super::problem::{Problem, Source};
use super::{size, spelling};
use std::ops::Range;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// One table of one file.
pub(super) struct Section<'t> {
    source: &'t Source<'t>,
    table: &'t DeTable<'t>,
    span: Range<usize>,
    /// Dotted path for messages; empty at the top of a file.
    path: String,
    asked: Vec<&'static str>,
}

impl<'t> Section<'t> {
    pub fn new(
        source: &'t Source<'t>,
        table: &'t DeTable<'t>,
        span: Range<usize>,
        path: String,
    ) -> Self {
        Section {
            source,
            table,
            span,
            path,
            asked: Vec::new(),
        }
    }

    pub fn path_of(&self, key: &str) -> String {
        match self.path.as_str() {
            "" => key.to_string(),
            path => format!("{path}.{key}"),
        }
    }

    /// Replaces the path, once the table's own name is known.
    pub fn rename(&mut self, path: String) {
        self.path = path;
    }

    pub fn problem(&self, key: &str, message: impl Into<String>) -> Problem {
        let at = self
            .table
            .get(key)
            .map_or(self.span.start, |value| value.span().start);
        Problem {
            file: self.source.file.to_path_buf(),
            line: Some(self.source.line_of(at)),
            key: self.path_of(key),
            message: message.into(),
            hint: None,
        }
    }

    fn get(&mut self, key: &'static str) -> Option<&'t Spanned<DeValue<'t>>> {
        if !self.asked.contains(&key) {
            self.asked.push(key);
        }
        self.table.get(key)
    }

    fn mistyped(&self, key: &str, expected: &str, found: &DeValue<'_>) -> Problem {
        self.problem(
            key,
            format!("expected {expected}, found {}", found.type_str()),
        )
    }

    pub fn text(&mut self, key: &'static str, problems: &mut Vec<Problem>) -> Option<&'t str> {
        match self.get(key)?.get_ref() {
            DeValue::String(text) => Some(text.as_ref()),
            other => {
                problems.push(self.mistyped(key, "a string in quotes", other));
                None
            }
        }
    }

    /// One of a few words; `None` also after a problem.
    pub fn one_of<T: Copy, const N: usize>(
        &mut self,
        key: &'static str,
        words: [(&'static str, T); N],
        problems: &mut Vec<Problem>,
    ) -> Option<T> {
        let text = self.text(key, problems)?;
        let found = words.iter().find(|(word, _)| *word == text);
        if found.is_none() {
            let known = words.map(|(word, _)| word);
            let message = format!(
                "{text:?} is not {}",
                known.map(|word| format!("{word:?}")).join(" or ")
            );
            let meant = spelling::nearest(text, &known);
            problems.push(Problem {
                hint: meant.map(|meant| format!("did you mean {meant:?}?")),
                ..self.problem(key, message)
            });
        }
        found.map(|(_, meaning)| *meaning)
    }

    /// A text that must be there.
    pub fn required(&mut self, key: &'static str, problems: &mut Vec<Problem>) -> Option<&'t str> {
        if !self.table.contains_key(key) {
            self.asked.push(key);
            problems.push(self.problem(key, "is missing"));
            return None;
        }
        self.text(key, problems)
    }

    pub fn integer(&mut self, key: &'static str, problems: &mut Vec<Problem>) -> Option<i64> {
        match self.get(key)?.get_ref() {
            DeValue::Integer(number) => {
                let value = i64::from_str_radix(number.as_str(), number.radix()).ok();
                if value.is_none() {
                    problems.push(self.problem(key, "the number is too large"));
                }
                value
            }
            other => {
                problems.push(self.mistyped(key, "a whole number", other));
                None
            }
        }
    }

    pub fn boolean(&mut self, key: &'static str, problems: &mut Vec<Problem>) -> Option<bool> {
        match self.get(key)?.get_ref() {
            DeValue::Boolean(value) => Some(*value),
            other => {
                problems.push(self.mistyped(key, "true or false", other));
                None
            }
        }
    }

    pub fn bytes(&mut self, key: &'static str, problems: &mut Vec<Problem>) -> Option<u64> {
        let read = match self.get(key)?.get_ref() {
            DeValue::String(text) => size::parse_bytes(text),
            DeValue::Integer(number) => u64::from_str_radix(number.as_str(), number.radix())
                .map_err(|_| "is not a size such as \"64 MiB\"".to_string()),
            other => {
                problems.push(self.mistyped(key, "a size such as \"64 MiB\"", other));
                return None;
            }
        };
        read.map_err(|message| problems.push(self.problem(key, message)))
            .ok()
    }

    pub fn texts(&mut self, key: &'static str, problems: &mut Vec<Problem>) -> Vec<&'t str> {
        let Some(value) = self.get(key) else {
            return Vec::new();
        };
        let DeValue::Array(array) = value.get_ref() else {
            problems.push(self.mistyped(key, "a list of strings", value.get_ref()));
            return Vec::new();
        };
        let mut texts = Vec::new();
        for item in array.iter() {
            match item.get_ref() {
                DeValue::String(text) => texts.push(text.as_ref()),
                other => problems.push(self.mistyped(key, "a list of strings", other)),
            }
        }
        texts
    }

    pub fn table(&mut self, key: &'static str, problems: &mut Vec<Problem>) -> Option<Section<'t>> {
        let value = self.get(key)?;
        match value.get_ref() {
            DeValue::Table(table) => Some(Section::new(
                self.source,
                table,
                value.span(),
                self.path_of(key),
            )),
            other => {
                problems.push(self.mistyped(key, "a table", other));
                None
            }
        }
    }

    /// The tables of `[[key]]`.
    pub fn tables(&mut self, key: &'static str, problems: &mut Vec<Problem>) -> Vec<Section<'t>> {
        let Some(value) = self.get(key) else {
            return Vec::new();
        };
        let expected = format!("tables written as [[{}]]", self.path_of(key));
        let DeValue::Array(array) = value.get_ref() else {
            problems.push(self.mistyped(key, &expected, value.get_ref()));
            return Vec::new();
        };
        let mut sections = Vec::new();
        for item in array.iter() {
            match item.get_ref() {
                DeValue::Table(table) => sections.push(Section::new(
                    self.source,
                    table,
                    item.span(),
                    self.path_of(key),
                )),
                other => problems.push(self.mistyped(key, &expected, other)),
            }
        }
        sections
    }

    /// Every entry of a table whose keys are names chosen by the administrator.
    pub fn entries(&self) -> impl Iterator<Item = (&'t str, &'t Spanned<DeValue<'t>>)> + use<'t> {
        self.table
            .iter()
            .map(|(key, value)| (key.get_ref().as_ref(), value))
    }

    /// A table that is the value of one of `entries`.
    pub fn entry_table(&self, key: &str, value: &'t Spanned<DeValue<'t>>) -> Option<Section<'t>> {
        match value.get_ref() {
            DeValue::Table(table) => Some(Section::new(
                self.source,
                table,
                value.span(),
                self.path_of(key),
            )),
            _ => None,
        }
    }

    /// Whether the key is there. Asked for a key that is one here, whatever becomes of its value.
    pub fn contains(&mut self, key: &'static str) -> bool {
        self.get(key).is_some()
    }

    /// Ends the reading: whatever nobody asked for is unknown. `elsewhere` says where a key that
    /// is right in another table belongs.
    pub fn finish(self, elsewhere: &[(&str, &str)], problems: &mut Vec<Problem>) {
        for (key, _) in self.table.iter() {
            let name = key.get_ref().as_ref();
            if self.asked.contains(&name) {
                continue;
            }
            let hint = match elsewhere.iter().find(|(known, _)| *known == name) {
                Some((_, place)) => (*place).to_string(),
                None => match spelling::nearest(name, &self.asked) {
                    Some(meant) => format!("did you mean {meant:?}?"),
                    None => format!("known here: {}", self.asked.join(", ")),
                },
            };
            problems.push(Problem {
                file: self.source.file.to_path_buf(),
                line: Some(self.source.line_of(key.span().start)),
                key: self.path_of(name),
                message: "unknown key".to_string(),
                hint: Some(hint),
            });
        }
    }
}
