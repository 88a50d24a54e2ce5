//! What each receiver of alarms was told, so that it hears of each once.

use super::state_folder::{Lock, StateError, StateFolder, read_up_to, replace};
use crate::policy::ToldAlarm;
use jiff::Timestamp;
use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

const LOCK: &str = "telling";
/// A minute: whoever takes longer waits for a receiver that hangs.
const ATTEMPTS: u32 = 600;
const PAUSE: Duration = Duration::from_millis(100);
/// That of some ten thousand alarms.
const MAX_TOLD_BYTES: u64 = 8 << 20;

impl StateFolder {
    /// For as long as receivers are told: of two processes that tell at once the second one then knows what the
    /// first has told. `None` if it cannot be had: told twice is better than not at all.
    pub fn lock_telling(&self) -> Option<Lock> {
        for _ in 0..ATTEMPTS {
            match self.lock(LOCK) {
                Ok(None) => std::thread::sleep(PAUSE),
                locked => return locked.ok().flatten(),
            }
        }
        None
    }

    /// What a receiver was told of alarms. What cannot be read was told nothing, and is told again.
    pub fn told_alarms(&self, receiver: &str) -> BTreeMap<String, ToldAlarm> {
        let Ok(text) = read_up_to(&self.path().join(told_file(receiver)), MAX_TOLD_BYTES) else {
            return BTreeMap::new();
        };
        let rows: Vec<ToldRow> = serde_json::from_str(&text).unwrap_or_default();
        rows.into_iter().map(ToldRow::into_told).collect()
    }

    pub fn remember_told_alarms(
        &self,
        receiver: &str,
        told: &BTreeMap<String, ToldAlarm>,
    ) -> Result<(), StateError> {
        let name = told_file(receiver);
        let rows: Vec<ToldRow> = told.iter().map(ToldRow::new).collect();
        let text = serde_json::to_string_pretty(&rows).map_err(|error| {
            let path = self.path().join(&name);
            StateError::new(&path, io::Error::new(io::ErrorKind::InvalidData, error))
        })?;
        replace(self.path(), &name, text.as_bytes())
    }
}

/// A receiver's name may hold anything.
fn told_file(receiver: &str) -> String {
    let hash = blake3::hash(receiver.as_bytes()).to_hex();
    format!("told-{}.json", hash.get(..16).unwrap_or_default())
}

#[derive(serde::Serialize, serde::Deserialize)]
struct ToldRow {
    alarm: String,
    since: Timestamp,
    told_at: Timestamp,
    text: String,
    extent: u64,
}

impl ToldRow {
    fn new((alarm, told): (&String, &ToldAlarm)) -> Self {
        ToldRow {
            alarm: alarm.clone(),
            since: told.since,
            told_at: told.told_at,
            text: told.text.clone(),
            extent: told.extent,
        }
    }

    fn into_told(self) -> (String, ToldAlarm) {
        let told = ToldAlarm {
            since: self.since,
            told_at: self.told_at,
            text: self.text,
            extent: self.extent,
        };
        (self.alarm, told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_tells_waits_until_another_one_has_told() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::create(folder.path()).unwrap();
        let first = state.lock_telling().expect("nobody else tells");
        std::thread::scope(|scope| {
            let second = scope.spawn(|| state.lock_telling().is_some());
            std::thread::sleep(2 * PAUSE);
            drop(first);
            assert!(second.join().unwrap());
        });
    }

    #[test]
    fn what_a_receiver_was_told_is_its_own_and_what_is_torn_is_told_again() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::create(folder.path()).unwrap();
        let told = BTreeMap::from([(
            "hole acme/web01".to_string(),
            ToldAlarm {
                since: Timestamp::UNIX_EPOCH,
                told_at: Timestamp::UNIX_EPOCH,
                text: "web01: no restore point".to_string(),
                extent: 3,
            },
        )]);
        state.remember_told_alarms("mail", &told).unwrap();
        assert_eq!(state.told_alarms("mail"), told);
        assert!(state.told_alarms("webhook").is_empty());
        let path = folder.path().join(told_file("mail"));
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() / 2]).unwrap();
        assert!(state.told_alarms("mail").is_empty());
    }
}
