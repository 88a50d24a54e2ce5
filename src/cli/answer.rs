use super::exit::Exit;

/// What a command found or did: the same thing for people and for programs.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// For people; ends with a line end unless empty.
    pub text: String,
    /// The one document of `--json`.
    pub document: serde_json::Value,
    pub exit: Exit,
}

impl Answer {
    pub fn done(text: impl Into<String>, document: serde_json::Value) -> Self {
        Answer {
            text: text.into(),
            document,
            exit: Exit::Done,
        }
    }
}

/// One word for a shell.
pub fn quoted(word: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+:=@%,".contains(&byte);
    match !word.is_empty() && word.bytes().all(is_plain) {
        true => word.to_string(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}
