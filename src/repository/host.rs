use super::RepositoryError;
use crate::format::entry::Attestation;
use crate::model::{CustomerUid, EntryHash, HostId, InstallationId, SessionId};
use jiff::Timestamp;

/// The time of a new entry, and whether two sources agreed on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    pub time: Timestamp,
    pub attestation: Attestation,
}

/// The end of a ledger as this host last saw it: what a rolled back or forked store betrays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub seq: u64,
    pub hash: EntryHash,
}

/// A memory outside of the store: what a reader needs of the machine it runs on.
pub trait HostMemory: Send + Sync {
    fn head(&self, customer: &CustomerUid) -> Option<Head>;
    fn remember_head(&self, customer: &CustomerUid, head: Head);
    /// What this very program once made of a ledger, read from genesis not long ago. Another
    /// program, or another version of it, may make something else of the same entries.
    fn checkpoint(&self, customer: &CustomerUid) -> Option<Vec<u8>>;
    /// `replayed`: it was made of a ledger that was read from genesis, not of the checkpoint before.
    fn keep_checkpoint(&self, customer: &CustomerUid, checkpoint: &[u8], replayed: bool);
}

/// What a writer needs of the machine it runs on: a signature and a time, besides the memory.
pub trait Host: HostMemory {
    fn id(&self) -> HostId;
    fn sign(&self, message: &[u8]) -> [u8; 64];
    /// The time of an entry about to be written; `last_witnessed` is the ledger's clock.
    fn stamp(&self, last_witnessed: Option<Timestamp>) -> Stamp;
    /// An entry with this stamp stands.
    fn noted(&self, stamp: &Stamp);
    /// Marks a session of this host as alive for as long as the returned guard lives, also to
    /// other processes, and ends with the process however it dies.
    fn hold_session(&self, session: &SessionId) -> Result<Box<dyn Send + Sync>, RepositoryError>;
    /// Whether a session of this host is known to have no living process.
    fn session_is_dead(&self, session: &SessionId) -> bool;
    /// Whether this host deletes in the store at all. What one that does not leaves there, the sweep of
    /// one that does removes: it goes by the ledger, and needs no word from whoever left it.
    fn may_delete(&self) -> bool {
        true
    }
    /// Waits, but not for ever, until no other process of this host writes this customer's ledger
    /// (`prefix`). For repositories that one host writes.
    fn take_turn(&self, prefix: &str) -> Result<Box<dyn Turn>, RepositoryError>;
}

/// The turn to write a ledger that one host writes; over when it is dropped.
pub trait Turn: Send {
    /// This state folder; a copy of the host's identity elsewhere has another.
    fn installation(&self) -> InstallationId;
    /// An operator has said that this installation takes the place of the one before.
    fn takes_over(&self) -> bool;
    /// Whether no other process has had a turn since this one last had it.
    fn goes_on(&self) -> bool;
    /// From now on something of this process may be under way, whatever becomes of it: kept durably.
    fn begin(&mut self) -> Result<(), RepositoryError>;
    /// What was sent may still land: nobody goes on from here.
    fn leave_open(&mut self);
}
