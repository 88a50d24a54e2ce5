//! A real libvirtd, private to one test binary, and domains in it whose guest does what its
//! console is told. `scripts/guest` makes the guest.

mod daemon;
mod machine;
mod store;
mod terminal;

pub use daemon::Daemon;
pub use machine::{Machine, last_record};
pub use store::{Store, Told, reason};
pub use terminal::Terminal;

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
