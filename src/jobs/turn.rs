//! The turns in which the processes of a host write a ledger that one host writes.

use super::state_folder::{Lock, StateError, StateFolder};
use crate::model::InstallationId;
use crate::repository::{RepositoryError, RepositoryErrorKind, Turn};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// Said of a turn after which nothing is under way, with the boot in which that was known.
const CLEAN: &str = "clean";

/// A turn of this process. What it keeps: a file that says "clean" and which boot it was, or anything
/// else. A crash in between leaves anything else; so does a loss of power after [`Turn::begin`], which
/// waits for the disk. A state folder that was lost or brought back says nothing of this boot.
pub(super) struct HeldTurn {
    mark: PathBuf,
    installation: InstallationId,
    takes_over: bool,
    is_clean: bool,
    boot_id: Option<String>,
    _lock: Lock,
}

impl HeldTurn {
    /// Waits for the lock.
    pub(super) fn take(
        folder: &StateFolder,
        customer: &str,
        boot_id: Option<String>,
        takes_over: bool,
    ) -> Result<Self, StateError> {
        let installation = folder.installation()?;
        let lock = folder.wait_for_lock(&format!("turn-{customer}"))?;
        let mark = folder.path().join("locks").join(format!("mark-{customer}"));
        let clean = boot_id.as_deref().map(clean_in);
        let kept = fs::read_to_string(&mark).ok();
        Ok(HeldTurn {
            is_clean: clean.is_some() && kept == clean,
            mark,
            installation,
            takes_over,
            boot_id,
            _lock: lock,
        })
    }
}

fn clean_in(boot_id: &str) -> String {
    format!("{CLEAN} {boot_id}\n")
}

fn write(mark: &PathBuf, text: &str) -> std::io::Result<File> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(mark)?;
    file.write_all(text.as_bytes())?;
    Ok(file)
}

impl Turn for HeldTurn {
    fn installation(&self) -> InstallationId {
        self.installation
    }

    fn takes_over(&self) -> bool {
        self.takes_over
    }

    fn is_clean(&self) -> bool {
        self.is_clean
    }

    fn begin(&mut self) -> Result<(), RepositoryError> {
        if !self.is_clean {
            return Ok(());
        }
        write(&self.mark, "under way\n")
            .and_then(|file| file.sync_all())
            .map_err(|error| {
                let place = self.mark.display();
                RepositoryError::new(RepositoryErrorKind::Refused, place, error)
            })?;
        self.is_clean = false;
        Ok(())
    }

    fn end(&mut self) {
        // Without the mark the next turn does more than it must.
        if let Some(boot_id) = &self.boot_id {
            self.is_clean = write(&self.mark, &clean_in(boot_id)).is_ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_is_clean_after_one_that_ended_in_the_same_boot_and_never_otherwise() {
        let folder = tempfile::tempdir().unwrap();
        let folder = StateFolder::create(folder.path()).unwrap();
        let take = |boot: Option<&str>| {
            HeldTurn::take(&folder, "acme", boot.map(str::to_string), false).unwrap()
        };
        let mut first = take(Some("a"));
        assert!(!first.is_clean());
        let installation = first.installation();
        first.begin().unwrap();
        first.end();
        drop(first);
        assert!(take(Some("a")).is_clean());
        assert!(!take(Some("b")).is_clean());
        assert!(!take(None).is_clean());
        let mut second = take(Some("a"));
        assert_eq!(second.installation(), installation);
        second.begin().unwrap();
        // It dies.
        drop(second);
        assert!(!take(Some("a")).is_clean());
        fs::remove_file(folder.path().join("locks/mark-acme")).unwrap();
        assert!(!take(Some("a")).is_clean());
    }

    #[test]
    fn one_process_has_the_turn_and_another_waits() {
        let folder = tempfile::tempdir().unwrap();
        let folder = StateFolder::create(folder.path()).unwrap();
        let take = |customer: &str| HeldTurn::take(&folder, customer, None, false).unwrap();
        let held = take("acme");
        // Another customer's is its own.
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
