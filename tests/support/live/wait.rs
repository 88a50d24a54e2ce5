use std::thread;
use std::time::{Duration, Instant};

/// For what takes a moment, on a machine that may be starved.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A boot without hardware virtualisation takes 3 seconds, and on a starved machine 15 times that.
pub const READY_LIMIT: Duration = Duration::from_secs(180);

const POLL: Duration = Duration::from_millis(10);

/// Asks again and again until there is an answer; panics with what `told` says after the limit.
#[track_caller]
pub fn wait_until<T>(
    what: &str,
    limit: Duration,
    mut answer: impl FnMut() -> Option<T>,
    told: impl FnOnce() -> String,
) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = answer() {
            return answer;
        }
        assert!(
            start.elapsed() < limit,
            "{what}: not within {limit:?}\n{}",
            told()
        );
        thread::sleep(POLL);
    }
}
