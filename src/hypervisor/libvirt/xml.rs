//! Reading libvirt's XML within bounds, and putting text into it.

use roxmltree::{Document, ParsingOptions};

pub(super) const MAX_BYTES: usize = 4 << 20;
pub(super) const MAX_NODES: u32 = 200_000;

/// Without entities of its own, which could grow without bounds.
pub(super) fn parse(text: &str) -> Result<Document<'_>, String> {
    if text.len() > MAX_BYTES {
        return Err(format!(
            "its XML has {} bytes; at most {MAX_BYTES} are read",
            text.len()
        ));
    }
    let options = ParsingOptions {
        allow_dtd: false,
        nodes_limit: MAX_NODES,
        ..ParsingOptions::default()
    };
    Document::parse_with_options(text, options)
        .map_err(|error| format!("its XML cannot be read: {}", shown(&error.to_string())))
}

/// Fit to be printed.
pub(super) fn shown(text: &str) -> String {
    text.chars()
        .filter(|letter| !letter.is_control())
        .take(80)
        .collect()
}

/// As text of an element or in an attribute, whatever its quotes.
pub(super) fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for letter in text.chars() {
        match letter {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&apos;"),
            '"' => escaped.push_str("&quot;"),
            // Readers make spaces of these in attributes.
            '\n' => escaped.push_str("&#10;"),
            '\r' => escaped.push_str("&#13;"),
            '\t' => escaped.push_str("&#9;"),
            other => escaped.push(other),
        }
    }
    escaped
}
