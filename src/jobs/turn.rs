//! The turns in which the processes of a host write a ledger that one host writes.

use super::state_folder::{Lock, StateError, StateFolder};
use crate::model::InstallationId;
use crate::repository::{RepositoryError, RepositoryErrorKind, Turn};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Whoever holds a turn for so long hangs, or its store does.
const LONGEST_WAIT: Duration = Duration::from_secs(10 * 60);
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// A turn of this process. A file says which process has begun the last one. It is written, and waited
/// for, before anything is sent: so whoever finds its own word there knows that nobody has sent anything
/// since. A file that was lost, torn or brought back from a copy is nobody's word.
pub(super) struct HeldTurn {
    mark: PathBuf,
    process: String,
    installation: InstallationId,
    takes_over: bool,
    goes_on: bool,
    _lock: Lock,
}

impl HeldTurn {
    /// `process`: what no other process, and no other time of this one, was ever called.
    pub(super) fn take(
        folder: &StateFolder,
        customer: &str,
        process: &str,
        takes_over: bool,
    ) -> Result<Self, StateError> {
        let lock = wait_for(folder, &format!("turn-{customer}"))?;
        let installation = folder.installation()?;
        let mark = folder.path().join("locks").join(format!("mark-{customer}"));
        let last = fs::read_to_string(&mark).ok();
        Ok(HeldTurn {
            goes_on: last.as_deref() == Some(process),
            mark,
            process: process.to_string(),
            installation,
            takes_over,
            _lock: lock,
        })
    }
}

fn wait_for(folder: &StateFolder, name: &str) -> Result<Lock, StateError> {
    let started = Instant::now();
    loop {
        match folder.lock(name)? {
            Some(lock) => return Ok(lock),
            None if started.elapsed() > LONGEST_WAIT => {
                return Err(StateError {
                    path: folder.path().join("locks").join(name),
                    kind: std::io::ErrorKind::TimedOut,
                    detail: format!(
                        "another process of this host has been writing for {} minutes",
                        LONGEST_WAIT.as_secs() / 60
                    ),
                });
            }
            None => std::thread::sleep(BETWEEN_LOOKS),
        }
    }
}

impl Turn for HeldTurn {
    fn installation(&self) -> InstallationId {
        self.installation
    }

    fn takes_over(&self) -> bool {
        self.takes_over
    }

    fn goes_on(&self) -> bool {
        self.goes_on
    }

    fn begin(&mut self) -> Result<(), RepositoryError> {
        if self.goes_on {
            return Ok(());
        }
        self.write(&self.process)
    }

    fn leave_open(&mut self) {
        // If it fails, the ledger in memory still knows.
        let _left = self.write("");
    }
}

impl HeldTurn {
    fn write(&self, process: &str) -> Result<(), RepositoryError> {
        let written = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&self.mark)
            .and_then(|mut file| {
                file.write_all(process.as_bytes())?;
                file.sync_all()
            });
        written.map_err(|error| {
            let place = self.mark.display();
            RepositoryError::new(RepositoryErrorKind::Refused, place, error)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_goes_on_as_long_as_no_other_has_begun_a_turn() {
        let folder = tempfile::tempdir().unwrap();
        let folder = StateFolder::create(folder.path()).unwrap();
        let take = |process: &str| HeldTurn::take(&folder, "acme", process, false).unwrap();
        let mut first = take("one");
        assert!(!first.goes_on());
        let installation = first.installation();
        first.begin().unwrap();
        drop(first);
        assert!(take("one").goes_on());
        // One that looked and did not begin was never there.
        drop(take("two"));
        assert!(take("one").goes_on());
        let mut second = take("two");
        assert_eq!(second.installation(), installation);
        second.begin().unwrap();
        drop(second);
        assert!(!take("one").goes_on());
        let mut again = take("two");
        assert!(again.goes_on());
        again.leave_open();
        drop(again);
        assert!(!take("two").goes_on());
        fs::write(folder.path().join("locks/mark-acme"), "tw").unwrap();
        assert!(!take("two").goes_on());
        // Another customer's is its own.
        let mut other = HeldTurn::take(&folder, "beta", "two", false).unwrap();
        other.begin().unwrap();
        fs::write(folder.path().join("locks/mark-acme"), "one").unwrap();
        assert!(take("one").goes_on());
    }

    #[test]
    fn one_process_has_the_turn_and_another_waits() {
        let folder = tempfile::tempdir().unwrap();
        let folder = StateFolder::create(folder.path()).unwrap();
        let take = |customer: &str| HeldTurn::take(&folder, customer, "one", false).unwrap();
        let held = take("acme");
        drop(take("beta"));
        assert!(folder.lock("turn-acme").unwrap().is_none());
        let waited = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| take("acme").installation());
            drop(held);
            waiting.join().unwrap()
        });
        assert_eq!(waited, take("acme").installation());
    }
}
