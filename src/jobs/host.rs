use super::state_folder::StateFolder;
use crate::codec::HostIdentity;
use crate::codec::minisign::{self, MinisignError};
use crate::format::entry::{Attestation, ClockDeclaration, HostBody, Role};
use crate::model::{Clock, ClockReading, CustomerUid, HostId, SessionId};
use crate::policy::{self, HostClock, Judgement, LocalMark, judge, next_mark};
use crate::repository::{Head, Heads, Host, RepositoryError, RepositoryErrorKind, Stamp};
use jiff::Timestamp;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A mark of the clock is written down again after this much time: entries come in bursts.
const MARK_INTERVAL_SECONDS: i64 = 60;
/// A clock that is set back by no more than this is corrected, not wrong.
const CORRECTION_SECONDS: i64 = 5 * 60;

/// This host: what signs, what tells the time, and what remembers outside of the store.
pub struct LocalHost {
    identity: HostIdentity,
    name: String,
    folder: StateFolder,
    clock: Arc<dyn Clock>,
    mode: HostClock,
    /// An operator vouches for the clock, for this process only.
    vouched: AtomicBool,
    memory: Mutex<Memory>,
}

#[derive(Default)]
struct Memory {
    mark: Option<LocalMark>,
    judged: Option<(ClockReading, Judgement)>,
    /// The latest time this process has given an entry.
    latest: Option<Timestamp>,
}

impl LocalHost {
    pub fn new(
        identity: HostIdentity,
        name: String,
        folder: StateFolder,
        clock: Arc<dyn Clock>,
        mode: HostClock,
    ) -> Self {
        let memory = Memory {
            mark: folder.clock_mark(),
            ..Memory::default()
        };
        LocalHost {
            identity,
            name,
            folder,
            clock,
            mode,
            vouched: AtomicBool::new(false),
            memory: Mutex::new(memory),
        }
    }

    pub fn identity(&self) -> &HostIdentity {
        &self.identity
    }

    pub fn folder(&self) -> &StateFolder {
        &self.folder
    }

    pub fn now(&self) -> Timestamp {
        self.clock.read().wall
    }

    /// An operator has said that the clock is right.
    pub fn vouch_for_clock(&self) {
        self.vouched.store(true, Ordering::Relaxed);
    }

    /// What is thought of the clock now.
    pub fn judgement(&self, last_witnessed: Option<Timestamp>) -> Judgement {
        self.judge(&self.clock.read(), last_witnessed)
    }

    /// How the ledger names this host.
    pub fn body(&self) -> HostBody {
        HostBody {
            host: self.identity.host_id(),
            name: self.name.clone(),
            recipient: self.identity.recipient().to_string(),
            roles: vec![Role::Backup, Role::Restore, Role::Prune, Role::Admin],
            clock: match self.mode {
                HostClock::Verified => ClockDeclaration::Verified,
                HostClock::Trusted => ClockDeclaration::Trusted,
            },
        }
    }

    pub(super) fn sign_certificate(
        &self,
        content: &[u8],
        comment: &str,
    ) -> Result<String, MinisignError> {
        minisign::sign(&self.identity, content, comment)
    }

    fn judge(&self, reading: &ClockReading, last_witnessed: Option<Timestamp>) -> Judgement {
        judge(
            reading,
            self.memory().mark.as_ref(),
            // A directory has no clock of its own.
            None,
            self.mode,
            last_witnessed,
            self.vouched.load(Ordering::Relaxed),
        )
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Heads for LocalHost {
    fn head(&self, customer: &CustomerUid) -> Option<Head> {
        self.folder.head(customer)
    }

    fn remember_head(&self, customer: &CustomerUid, head: Head) {
        self.folder.remember_head(customer, head);
    }
}

impl Host for LocalHost {
    fn id(&self) -> HostId {
        self.identity.host_id()
    }

    fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.identity.sign(message)
    }

    fn stamp(&self, last_witnessed: Option<Timestamp>) -> Stamp {
        let mut reading = self.clock.read();
        let mut memory = self.memory();
        if let Some(latest) = memory.latest {
            let back = latest.as_second().saturating_sub(reading.wall.as_second());
            if (1..=CORRECTION_SECONDS).contains(&back) {
                // A session must not end before it began because the clock was corrected.
                reading.wall = latest;
            }
        }
        memory.latest = Some(reading.wall);
        drop(memory);
        let judgement = self.judge(&reading, last_witnessed);
        let stamp = Stamp {
            time: reading.wall,
            attestation: match judgement.attestation {
                policy::Attestation::Witnessed => Attestation::Witnessed,
                policy::Attestation::Alone => Attestation::Alone,
            },
        };
        self.memory().judged = Some((reading, judgement));
        stamp
    }

    fn noted(&self, _: &Stamp) {
        let mut memory = self.memory();
        let Some(mark) = memory
            .judged
            .as_ref()
            .and_then(|(reading, judgement)| next_mark(reading, judgement))
        else {
            return;
        };
        let due = memory.mark.as_ref().is_none_or(|known| {
            known.boot_id != mark.boot_id
                || known.wall.as_second().abs_diff(mark.wall.as_second())
                    >= MARK_INTERVAL_SECONDS.unsigned_abs()
        });
        if due {
            self.folder.remember_clock_mark(&mark);
            memory.mark = Some(mark);
        }
    }

    fn hold_session(&self, session: &SessionId) -> Result<Box<dyn Send + Sync>, RepositoryError> {
        match self.folder.hold_session(session) {
            Ok(lock) => Ok(Box::new(lock)),
            Err(error) => Err(RepositoryError::new(
                RepositoryErrorKind::Refused,
                "session lock",
                error,
            )),
        }
    }

    fn session_is_dead(&self, session: &SessionId) -> bool {
        self.folder.session_is_free(session)
    }
}
