//! How this host's last run went, for whoever asks between two of them.

use super::state_folder::{StateError, StateFolder, read_up_to, replace};
use jiff::Timestamp;
use std::io;

const LAST_RUN: &str = "last-run.json";
const MAX_BYTES: u64 = 64 << 10;

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LastRun {
    pub began_at: Timestamp,
    pub ended_at: Timestamp,
    pub exit_code: u8,
    /// When a run last did all that was due.
    pub succeeded_at: Option<Timestamp>,
    pub read_bytes: u64,
    pub stored_bytes: u64,
    pub backed_up: u64,
    pub failed: u64,
}

impl StateFolder {
    /// `None` if there was none, or it cannot be read.
    pub fn last_run(&self) -> Option<LastRun> {
        let text = read_up_to(&self.path().join(LAST_RUN), MAX_BYTES).ok()?;
        serde_json::from_str(&text).ok()
    }

    pub fn remember_run(&self, run: &LastRun) -> Result<(), StateError> {
        let text = serde_json::to_string_pretty(run).map_err(|error| {
            let path = self.path().join(LAST_RUN);
            StateError::new(&path, io::Error::new(io::ErrorKind::InvalidData, error))
        })?;
        replace(self.path(), LAST_RUN, text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_remembered_and_what_is_torn_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::create(folder.path()).unwrap();
        assert_eq!(state.last_run(), None);
        let run = LastRun {
            began_at: Timestamp::UNIX_EPOCH,
            ended_at: Timestamp::UNIX_EPOCH,
            exit_code: 3,
            succeeded_at: None,
            read_bytes: 1 << 40,
            stored_bytes: 5,
            backed_up: 2,
            failed: 1,
        };
        state.remember_run(&run).unwrap();
        assert_eq!(state.last_run(), Some(run));
        std::fs::write(folder.path().join(LAST_RUN), "{\"began_at\":").unwrap();
        assert_eq!(state.last_run(), None);
    }
}
