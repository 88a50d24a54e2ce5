use super::RepositoryError;
use crate::format::entry::{Attestation, ClockDeclaration};
use crate::model::{
    CustomerName, CustomerUid, EntryHash, HostId, InstallationId, RepositoryId, SessionId,
};
use jiff::Timestamp;

/// The time of a new entry, and whether two sources agreed on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    pub time: Timestamp,
    pub attestation: Attestation,
}

/// What a ledger says of time to a host that is about to write in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LedgerClock {
    pub last_witnessed: Option<Timestamp>,
    /// What an administrator has let stand there of the host's clock. What its own configuration says goes
    /// for nothing beyond that.
    pub declared: Option<ClockDeclaration>,
}

/// The end of a ledger as this host last saw it: what a rolled back or forked store betrays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub seq: u64,
    pub hash: EntryHash,
}

/// How far what a host kept of a ledger is believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Belief {
    AsItIs,
    /// Once every entry that it was made of has been read again.
    IfReadAgain,
    /// Where an entry that it was made of cannot be read any more.
    ForWantOfBetter,
}

/// Since when, by the host's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BelievedSince {
    /// It was made of the entries from genesis on.
    pub replayed_at: Timestamp,
    /// They were last read.
    pub read_at: Timestamp,
}

/// What vouches for what a host is to keep of a ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vouched {
    /// It was made of a ledger that was read from genesis.
    Replayed,
    /// It was kept since then, and every entry that it was made of was read again.
    ReadAgain(BelievedSince),
    /// It was made of what was kept since then.
    AsBefore(BelievedSince),
}

/// What a host kept of a ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptState {
    pub content: Vec<u8>,
    pub belief: Belief,
    pub since: BelievedSince,
}

/// A memory outside of the store: what a reader needs of the machine it runs on.
pub trait HostMemory: Send + Sync {
    fn head(&self, customer: &CustomerUid) -> Option<Head>;
    fn remember_head(&self, customer: &CustomerUid, head: Head);
    /// The first entry of the customer that this host knows under this name in this repository.
    fn origin(&self, repository: &RepositoryId, customer: &CustomerName) -> Option<EntryHash>;
    /// Kept for good: whoever swaps a ledger for another one under the same name also picks its uid, so
    /// that no [`HostMemory::head`] would speak against it.
    fn remember_origin(&self, repository: &RepositoryId, customer: &CustomerName, first: EntryHash);
    /// What this very program once made of a ledger. Another program, or another version of it, may make
    /// something else of the same entries.
    fn checkpoint(&self, customer: &CustomerUid) -> Option<KeptState>;
    /// Unless another process has made it anew meanwhile.
    fn keep_checkpoint(&self, customer: &CustomerUid, checkpoint: &[u8], vouched: Vouched);
}

/// What a writer needs of the machine it runs on: a signature and a time, besides the memory.
pub trait Host: HostMemory {
    fn id(&self) -> HostId;
    fn sign(&self, message: &[u8]) -> [u8; 64];
    /// The time of an entry about to be written.
    fn stamp(&self, ledger: LedgerClock) -> Stamp;
    /// The entry `seq` of this customer's ledger, with this stamp, stands.
    fn noted(&self, stamp: &Stamp, customer: &CustomerUid, seq: u64);
    /// Marks a session of this host as alive for as long as the returned guard lives, also to
    /// other processes, and ends with the process however it dies. That it was begun here is kept,
    /// durably, until [`Host::session_is_over`].
    fn hold_session(&self, session: &SessionId) -> Result<Box<dyn Send + Sync>, RepositoryError>;
    /// Whether a session was begun here and has no living process any more. Of one that was not,
    /// nothing is known: a copy of this host's identity may be at it elsewhere.
    fn session_is_dead(&self, session: &SessionId) -> bool;
    /// Nobody will ask after it any more: the ledger has closed it, or it never began.
    fn session_is_over(&self, _session: &SessionId) {}
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
