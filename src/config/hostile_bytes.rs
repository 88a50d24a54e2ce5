//! Fuzz target of the configuration: the main file, and after a line `%%` that of a customer.

use super::read;
use std::path::{Path, PathBuf};

pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let (main, part) = text.split_once("\n%%\n").unwrap_or((text, ""));
    let parts = match part.is_empty() {
        true => Vec::new(),
        false => vec![(PathBuf::from("customers.d/x.toml"), part.to_string())],
    };
    let mut problems = Vec::new();
    let config = read(Path::new("vmkeep.toml"), main, &parts, &mut problems);
    for problem in &problems {
        assert!(!problem.to_string().is_empty());
    }
    assert!(
        config.is_some() || !problems.is_empty(),
        "refused without a reason"
    );
    if problems.is_empty() {
        assert!(config.is_some_and(|config| !config.customers.is_empty()));
    }
}
