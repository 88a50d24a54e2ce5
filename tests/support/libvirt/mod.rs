//! A real libvirtd, private to one test binary, and domains in it whose guest does what its
//! console is told. `scripts/guest` makes the guest.

#![allow(dead_code, reason = "each test crate uses its own part of this module")]

mod daemon;
mod machine;

pub use daemon::Daemon;
pub use machine::Machine;

use std::time::{Duration, Instant};

/// For what takes a moment, on a machine that may be starved.
pub const LIMIT: Duration = Duration::from_secs(120);

#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
