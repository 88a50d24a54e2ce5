//! The nightly run steps back behind whatever else the host does.

use crate::config::IoPriority;
use std::process::{Command, Stdio};

/// Of util-linux, which every Debian has. The system call has no wrapper that is safe and maintained; threads that
/// are started afterwards have what their process has.
const IONICE: &str = "ionice";

pub fn lower(priority: Option<IoPriority>) {
    let class = match priority {
        None => return,
        Some(IoPriority::Low) => ["-c", "2", "-n", "7"].as_slice(),
        Some(IoPriority::Idle) => ["-c", "3"].as_slice(),
    };
    let lowered = Command::new(IONICE)
        .args(class)
        .args(["-p", &std::process::id().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !lowered.is_ok_and(|status| status.success()) {
        tracing::warn!("io_priority could not be set: is {IONICE} (util-linux) there?");
    }
}
