//! Trying again what may pass, until a deadline. One receiver's deadline is all the time it gets:
//! connecting, waiting between the attempts, and a reply that never comes.

use super::{NotifyError, NotifyErrorKind};
use rustix::rand::{GetRandomFlags, getrandom};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout_at};

const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// Why an attempt failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Trouble {
    pub kind: NotifyErrorKind,
    pub detail: String,
    /// How long the receiver asked us to wait.
    pub wait: Option<Duration>,
}

impl Trouble {
    pub fn new(kind: NotifyErrorKind, detail: impl Into<String>) -> Self {
        Trouble {
            kind,
            detail: detail.into(),
            wait: None,
        }
    }
}

/// Attempts until one succeeds, fails for good, or the deadline is over.
pub(super) fn until_deadline(
    name: &str,
    deadline: Duration,
    mut attempt: impl AsyncFnMut() -> Result<(), Trouble>,
) -> Result<(), NotifyError> {
    let failed = |kind, detail: String| Err(NotifyError::new(kind, name, detail));
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            let detail = format!("starting its runtime: {error}");
            return failed(NotifyErrorKind::Transient, detail);
        }
    };
    let ended = runtime.block_on(async {
        let until = Instant::now() + deadline;
        let mut last: Option<Trouble> = None;
        let mut attempts = 0;
        loop {
            let trouble = match timeout_at(until, attempt()).await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(trouble)) => trouble,
                Err(_) => {
                    let silence = format!("no answer within {}", shown(deadline));
                    return Err(match last {
                        Some(last) => Trouble {
                            detail: format!("{silence}; before that: {}", last.detail),
                            ..last
                        },
                        None => Trouble::new(NotifyErrorKind::Transient, silence),
                    });
                }
            };
            attempts += 1;
            if trouble.kind != NotifyErrorKind::Transient {
                return Err(trouble);
            }
            let again = Instant::now() + pause_after(attempts, trouble.wait, random_share());
            if again >= until {
                let times = match attempts {
                    1 => "tried once".to_string(),
                    _ => format!("tried {attempts} times"),
                };
                return Err(Trouble {
                    detail: format!("{} ({times} within {})", trouble.detail, shown(deadline)),
                    ..trouble
                });
            }
            last = Some(trouble);
            sleep(again - Instant::now()).await;
        }
    });
    // A name that is looked up by a system call that hangs is not waited for.
    runtime.shutdown_background();
    ended.or_else(|trouble| failed(trouble.kind, trouble.detail))
}

/// The pause doubles with each attempt. Between half of it and all of it is waited, so that hosts that
/// failed together do not come back together; never less than what the receiver asked for.
fn pause_after(attempts: u32, asked: Option<Duration>, share: f64) -> Duration {
    let doubled = 2_u32.saturating_pow(attempts.saturating_sub(1));
    let whole = FIRST_PAUSE.saturating_mul(doubled).min(LONGEST_PAUSE);
    let own = whole.mul_f64(0.5 + share / 2.0);
    own.max(asked.unwrap_or_default())
}

/// From 0 to 1.
fn random_share() -> f64 {
    let mut byte = [0_u8];
    // Without randomness hosts are no more spread than by their clocks, which is no reason to fail.
    let _ = getrandom(&mut byte, GetRandomFlags::empty());
    let [byte] = byte;
    f64::from(byte) / 255.0
}

fn shown(time: Duration) -> String {
    humantime::format_duration(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn pauses_double_up_to_a_limit_and_are_spread_over_their_second_half() {
        let milliseconds = |attempts, share| pause_after(attempts, None, share).as_millis();
        assert_eq!([0.0, 1.0].map(|share| milliseconds(1, share)), [250, 500]);
        assert_eq!([0.0, 1.0].map(|share| milliseconds(3, share)), [1000, 2000]);
        assert_eq!(milliseconds(6, 1.0), 10_000);
        assert_eq!(milliseconds(u32::MAX, 1.0), 10_000);
    }

    #[test]
    fn a_receiver_that_asks_for_more_time_gets_it() {
        let asked = Some(Duration::from_secs(60));
        assert_eq!(pause_after(1, asked, 0.0), Duration::from_secs(60));
        let asked = Some(Duration::from_millis(1));
        assert_eq!(pause_after(1, asked, 0.0), Duration::from_millis(250));
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        for (kind, expected) in [
            (NotifyErrorKind::Transient, Ok(())),
            (NotifyErrorKind::Refused, Err(NotifyErrorKind::Refused)),
            (
                NotifyErrorKind::Misconfigured,
                Err(NotifyErrorKind::Misconfigured),
            ),
        ] {
            let attempts = Cell::new(0);
            let ended = until_deadline("x", Duration::from_secs(20), async || {
                attempts.set(attempts.get() + 1);
                match attempts.get() {
                    1 => Err(Trouble::new(kind, "no")),
                    _ => Ok(()),
                }
            });
            assert_eq!(ended.map_err(|error| error.kind), expected);
            assert_eq!(attempts.get(), 1 + u32::from(expected.is_ok()));
        }
    }

    #[test]
    fn who_would_be_late_is_not_waited_for() {
        let asks = || Trouble {
            wait: Some(Duration::from_secs(3600)),
            ..Trouble::new(NotifyErrorKind::Transient, "answered 503")
        };
        let ended = until_deadline("x", Duration::from_secs(30), async || Err(asks()));
        assert_eq!(
            ended.unwrap_err().to_string(),
            "x: answered 503 (tried once within 30s)"
        );
    }

    #[test]
    fn silence_ends_with_the_deadline_and_what_was_said_before_is_told() {
        let silent = async || std::future::pending().await;
        let ended = until_deadline("x", Duration::from_millis(10), silent);
        assert_eq!(ended.unwrap_err().to_string(), "x: no answer within 10ms");
        let attempts = Cell::new(0);
        let ended = until_deadline("x", Duration::from_millis(900), async || {
            attempts.set(attempts.get() + 1);
            match attempts.get() {
                1 => Err(Trouble::new(NotifyErrorKind::Transient, "answered 500")),
                _ => std::future::pending().await,
            }
        });
        assert_eq!(
            ended.unwrap_err().to_string(),
            "x: no answer within 900ms; before that: answered 500"
        );
    }
}
