//! One customer's part of a repository, open: keys, ledger, index, and the sessions on them.

use super::index::{Index, PackNumber};
use super::ledger::{Ledger, OpenSession, State};
use super::rule::{Rule, stands};
use super::sealed::{SealedCustomer, hash_of, no_ledger};
use super::writer::{Session, Trust, session_objects, upload};
use super::{Host, HostMemory, RepositoryError, RepositoryErrorKind, Stamp};
use crate::codec::age::{self, AgeRecipient};
use crate::codec::{
    CustomerKey, HostIdentity, Keys, MAX_RECORD_BYTES, PointRecord, open_record, random_bytes,
};
use crate::format::entry::{
    AbortBody, Attestation, BeginBody, Body, GenesisBody, HostBody, KeyBody, PolicyBody, Purpose,
    Role,
};
use crate::format::names::CustomerNames;
use crate::format::repository_file::FORMAT_VERSION;
use crate::model::{
    CustomerName, CustomerUid, ObjectHash, ObjectName, PointId, RepositoryId, SessionId, VmName,
    Writers,
};
use crate::policy::{PolicyTerms, expiry};
use crate::storage::{Storage, gone_or_locked};
use jiff::Timestamp;
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How packs and index segments are written, and with how much of the machine the index is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriteSettings {
    /// A pack is closed when it reaches this size.
    pub pack_bytes: usize,
    /// zstd level.
    pub compression_level: i32,
    /// An index segment is closed when it has so many records: what is written of it is in memory
    /// until then, 28 bytes a record.
    pub segment_records: usize,
    /// Threads that open the index; each reads and hashes a segment.
    pub threads: usize,
}

impl Default for WriteSettings {
    fn default() -> Self {
        WriteSettings {
            pack_bytes: 16 << 20,
            compression_level: 1,
            // 224 MiB in memory, and half a terabyte of chunks.
            segment_records: 8 << 20,
            threads: 1,
        }
    }
}

/// A session that stands in the ledger, and the guard that shows it alive.
pub struct Begun {
    pub id: SessionId,
    pub begun_at: Timestamp,
    /// The ledger's clock before it began.
    pub witnessed_before: Option<Timestamp>,
    pub clock_alone: bool,
    _alive: Box<dyn Send + Sync>,
}

/// One customer, open for reading and, as far as the host's roles go, for writing.
pub struct Customer {
    sealed: SealedCustomer,
    keys: Keys,
    host: Arc<dyn Host>,
    settings: WriteSettings,
    /// See [`Customer::doubt_all_packs`].
    doubts_all_packs: AtomicBool,
}

/// Whoever has the key sees what everybody sees, too.
impl Deref for Customer {
    type Target = SealedCustomer;

    fn deref(&self) -> &SealedCustomer {
        &self.sealed
    }
}

/// What a new customer begins with.
pub struct NewCustomer<'a> {
    pub repository: RepositoryId,
    pub name: &'a CustomerName,
    pub host: HostBody,
    /// Everyone who can open the customer's key: this host and the escrow recipients.
    pub recipients: Vec<AgeRecipient>,
    pub terms: &'a PolicyTerms,
    pub writers: Writers,
}

impl Customer {
    /// Opens an existing customer. `NotFound` if it has no ledger yet.
    pub fn open(
        storage: Arc<dyn Storage>,
        name: &CustomerName,
        repository: RepositoryId,
        identity: &HostIdentity,
        host: Arc<dyn Host>,
        settings: WriteSettings,
    ) -> Result<Self, RepositoryError> {
        let memory: Arc<dyn HostMemory> = host.clone();
        let sealed = SealedCustomer::open(storage, name, repository, memory, settings.threads)?;
        let key = read_key(&sealed, identity)?;
        Ok(Customer {
            sealed,
            keys: Keys::derive(&key),
            host,
            settings,
            doubts_all_packs: AtomicBool::new(false),
        })
    }

    pub(super) fn of(
        sealed: SealedCustomer,
        keys: Keys,
        host: Arc<dyn Host>,
        settings: WriteSettings,
    ) -> Self {
        Customer {
            sealed,
            keys,
            host,
            settings,
            doubts_all_packs: AtomicBool::new(false),
        }
    }

    /// Makes a customer: genesis, key, policy. Of several hosts at once one makes the genesis;
    /// whoever finds a genesis without a key (its maker died) completes it.
    pub fn create(
        storage: &Arc<dyn Storage>,
        new: &NewCustomer<'_>,
        host: &dyn Host,
    ) -> Result<(), RepositoryError> {
        let names = CustomerNames::new(new.name).written_by(new.writers);
        let mut ledger = match Ledger::load(storage.clone(), names.clone(), host)? {
            Some(ledger) => ledger,
            None => {
                let why = no_ledger(&**storage, &names, &new.repository, host);
                if why.kind != RepositoryErrorKind::NotFound {
                    return Err(why);
                }
                let uid = CustomerUid::from_bytes(random_bytes());
                let mut ledger = Ledger::empty(storage.clone(), names.clone());
                let genesis = |state: &State, _: &_| match state.seq {
                    0 => Ok(Body::Genesis(GenesisBody {
                        format: FORMAT_VERSION,
                        repository: new.repository,
                        customer_name: new.name.to_string(),
                        host: new.host.clone(),
                        writers: new.writers,
                    })),
                    _ => Err(RepositoryError::new(
                        RepositoryErrorKind::AlreadyExists,
                        names.prefix(),
                        "another process made this customer at the same time",
                    )),
                };
                match ledger.append(host, uid, genesis) {
                    Ok(_) => {}
                    Err(error) if error.kind == RepositoryErrorKind::AlreadyExists => {}
                    Err(error) => return Err(error),
                }
                ledger
            }
        };
        let uid = ledger
            .state()
            .uid
            .unwrap_or(CustomerUid::from_bytes([0; 16]));
        if ledger.state().keys.is_empty() {
            // Key files of makers that died or lost: none of them can be named any more once a
            // `key` entry stands, and keys that are added later are not in this list.
            let earlier = storage.list(&names.keys_prefix())?;
            let key = CustomerKey::generate(uid);
            let (object, hash) = write_key(&**storage, &names, &key, &new.recipients)?;
            // The key is of this uid: where one host writes, another genesis may turn out to count.
            let is_due = |state: &State| state.keys.is_empty() && state.uid == Some(uid);
            let outcome = ledger.append(host, uid, |state, _| match is_due(state) {
                true => Ok(Body::Key(KeyBody {
                    generation: key.generation(),
                    object,
                    hash,
                    recipients: new.recipients.iter().map(ToString::to_string).collect(),
                })),
                false => Err(RepositoryError::new(
                    RepositoryErrorKind::AlreadyExists,
                    names.prefix(),
                    "another process made this customer's key at the same time",
                )),
            });
            match outcome {
                Ok(_) => {
                    for object in earlier {
                        gone_or_locked(storage.destroy(&object.name))?;
                    }
                }
                Err(error) if error.kind == RepositoryErrorKind::Uncertain => return Err(error),
                Err(error) => {
                    gone_or_locked(storage.destroy(&names.key(object)))?;
                    if error.kind != RepositoryErrorKind::AlreadyExists {
                        return Err(error);
                    }
                }
            }
        }
        if ledger.state().terms.is_none() {
            ledger.append(host, uid, |_, _| {
                Ok(Body::Policy(PolicyBody {
                    terms: terms_map(new.terms),
                }))
            })?;
        }
        Ok(())
    }

    /// Wraps the key for `recipients` as well: a new key file, named by a `key` entry. Earlier
    /// key files stay: what was handed out once cannot be taken back.
    pub fn wrap_key_for(
        &self,
        identity: &HostIdentity,
        recipients: &[AgeRecipient],
    ) -> Result<(), RepositoryError> {
        // Asked before the file is written: one that no entry names is nobody's.
        if !self.has_role(Role::Admin) {
            return Err(RepositoryError::new(
                RepositoryErrorKind::Refused,
                self.names().keys_prefix(),
                "this host has no role to wrap the key for others: that is for one with the role admin",
            ));
        }
        let key = read_key(&self.sealed, identity)?;
        let (object, hash) = write_key(&**self.storage(), self.names(), &key, recipients)?;
        let named = self.append(|_| {
            Ok(Body::Key(KeyBody {
                generation: key.generation(),
                object,
                hash,
                recipients: recipients.iter().map(ToString::to_string).collect(),
            }))
        });
        match named {
            Ok(_) => Ok(()),
            // The entry may stand, and name it.
            Err(error) if error.kind == RepositoryErrorKind::Uncertain => Err(error),
            Err(error) => {
                if self.host.may_delete() {
                    gone_or_locked(self.storage().destroy(&self.names().key(object)))?;
                }
                Err(error)
            }
        }
    }

    /// What the ledger, as last read, lets this host do.
    pub fn has_role(&self, role: Role) -> bool {
        let id = self.host.id();
        self.with_state(|state| {
            let own = state.hosts.get(&id);
            own.is_some_and(|row| row.roles.contains(&role))
        })
    }

    pub fn settings(&self) -> &WriteSettings {
        &self.settings
    }

    pub fn host(&self) -> &dyn Host {
        &*self.host
    }

    pub(super) fn keys(&self) -> &Keys {
        &self.keys
    }

    /// Asked before anything is deleted on the word of the ledger's end: whether this version understands
    /// all of it, and whether it counts whatever lands late.
    ///
    /// What was read before still holds if [`SealedCustomer::readings`] is the same afterwards.
    pub fn settle(&self) -> Result<(), RepositoryError> {
        self.may_write()?;
        self.ledger().settle(&*self.host, self.uid())
    }

    /// Takes the next slot; see [`Ledger::append`].
    pub fn append(
        &self,
        mut build: impl FnMut(&State) -> Result<Body, RepositoryError>,
    ) -> Result<u64, RepositoryError> {
        self.append_stamped(|state, _| build(state))
    }

    /// As [`Customer::append`], for entries that hold a time: `build` gets the entry's own.
    pub fn append_stamped(
        &self,
        mut build: impl FnMut(&State, &Stamp) -> Result<Body, RepositoryError>,
    ) -> Result<u64, RepositoryError> {
        let mut closed = None;
        let seq = self
            .ledger()
            .append(&*self.host, self.uid(), |state, stamp| {
                let body = build(state, stamp)?;
                closed = closed_by(&body);
                Ok(body)
            })?;
        // Only once the entry stands: a session that stays open must still be known as this host's.
        if let Some(session) = closed {
            self.host.session_is_over(&session);
        }
        Ok(seq)
    }

    /// Something could not be read that passed for whole: from now on a full reads each pack that it is to rely on.
    pub fn doubt_all_packs(&self) {
        self.doubts_all_packs.store(true, Ordering::Relaxed);
    }

    pub(super) fn packs_not_checked_since(
        &self,
        index: &Index,
        since: Timestamp,
    ) -> Vec<PackNumber> {
        if self.doubts_all_packs.load(Ordering::Relaxed) {
            return (0..).zip(index.packs()).map(|(number, _)| number).collect();
        }
        self.with_state(|state| {
            index
                .packs()
                .iter()
                .enumerate()
                .filter(|(_, info)| {
                    state
                        .verified_at(&info.row.name)
                        .is_none_or(|checked| checked < since)
                })
                .map(|(number, _)| number as PackNumber)
                .collect()
        })
    }

    /// Writes `begin`. Nothing may be uploaded before this returns.
    pub fn begin(
        &self,
        purpose: Purpose,
        backup_of: Option<(&VmName, PointId)>,
    ) -> Result<Begun, RepositoryError> {
        let id = SessionId::from_bytes(random_bytes());
        // The guard first: a `begin` without a living guard would look like a dead session.
        let alive = self.host.hold_session(&id)?;
        let mut witnessed_before = None;
        let appended = self.append_stamped(|state, stamp| {
            witnessed_before = state.last_witnessed;
            // Its record may be written before the outcome is known: from the begin on the ledger
            // says when it must be gone.
            let counted_from = counted_from(
                stamp.time,
                stamp.attestation == Attestation::Alone,
                state.last_witnessed,
            );
            let expiry = backup_of
                .and(state.policy.as_ref())
                .map(|policy| expiry(policy, counted_from));
            Ok(Body::Begin(BeginBody {
                session: id,
                purpose,
                vm: backup_of.map(|(vm, _)| vm.clone()),
                point: backup_of.map(|(_, point)| point),
                expires_at: expiry.map(|expiry| expiry.expires_at),
                deadline: expiry.map(|expiry| expiry.deadline),
            }))
        });
        let seq = appended.inspect_err(|error| {
            // Whatever else went wrong, the entry may stand, and the session must still be known as this host's.
            if matches!(
                error.kind,
                RepositoryErrorKind::Superseded | RepositoryErrorKind::Refused
            ) {
                self.host.session_is_over(&id);
            }
        })?;
        let open = self.with_state(|state| state.open.get(&id).cloned());
        let open = open.ok_or_else(|| {
            RepositoryError::damaged(
                self.names().ledger(seq),
                "the session just begun does not stand",
            )
        })?;
        Ok(Begun {
            id,
            begun_at: open.begun_at,
            witnessed_before,
            clock_alone: open.attestation == Attestation::Alone,
            _alive: alive,
        })
    }

    /// The writing end of a session that has begun.
    pub fn session(&self, begun: &Begun, trust: Trust) -> Result<Session<'_>, RepositoryError> {
        Session::new(self, begun.id, self.load_index()?, trust)
    }

    /// Gives a session up: first in the ledger, then its objects go, the point record first.
    /// If the entry's outcome is unknown nothing is removed; a later prune does it. So it does with what
    /// a host leaves that deletes nothing: no session that stands explains it any more.
    pub fn abort(&self, session: &SessionId, reason: &str) -> Result<(), RepositoryError> {
        let mut point = None;
        if !stands(Rule::AbortFirst) {
            point = self.with_state(|state| state.open.get(session).and_then(|open| open.point));
            return self.empty(session, point);
        }
        self.append(|state| {
            // Looked at anew after each lost slot: the session may have been committed by it.
            let open = state.open.get(session).ok_or_else(|| {
                RepositoryError::new(
                    RepositoryErrorKind::Superseded,
                    session,
                    "the session is not open any more",
                )
            })?;
            point = open.point;
            Ok(Body::Abort(AbortBody {
                session: *session,
                reason: reason.to_string(),
            }))
        })?;
        self.empty(session, point)
    }

    fn empty(&self, session: &SessionId, point: Option<PointId>) -> Result<(), RepositoryError> {
        if !self.host.may_delete() {
            return Ok(());
        }
        if let Some(point) = point {
            // One that is refused is left to the sweep of every prune, which tells of it.
            self.destroy_record(&self.names().point(&point))?;
        }
        let rest = session_objects(&**self.storage(), self.names(), session)?;
        for deleted in self.storage().delete_all(&rest) {
            gone_or_locked(deleted)?;
        }
        Ok(())
    }

    /// Aborts this host's sessions whose process is gone, and sessions that are older than any may
    /// be or whose point would have expired already: its record may stand in the store. Returns
    /// how many.
    pub fn abort_dead_sessions(&self, now: Timestamp) -> Result<usize, RepositoryError> {
        self.refresh()?;
        let open: Vec<(SessionId, OpenSession, Timestamp)> = self.with_state(|state| {
            let since = |open: &OpenSession| state.running_since(open);
            state
                .open
                .iter()
                .map(|(id, open)| (*id, open.clone(), since(open)))
                .collect()
        });
        let mut aborted = 0;
        for (id, session, since) in open {
            let own = session.host == self.host.id();
            let over_age = now.duration_since(since)
                > jiff::SignedDuration::from_hours(24 * LONGEST_SESSION_DAYS);
            // Counted from when it really began, as far as anybody knows: the clock that dated its
            // `begin` may be years off.
            let expired = session
                .expires_at
                .and_then(|at| {
                    since
                        .checked_add(at.duration_since(session.counted_from()))
                        .ok()
                })
                .is_some_and(|at| at <= now);
            let reason = match () {
                () if own && self.host.session_is_dead(&id) => "its process is gone",
                () if over_age => "it is older than any session may be",
                () if expired => "its restore point would have expired already",
                () => continue,
            };
            match self.abort(&id, reason) {
                Ok(()) => aborted += 1,
                // It was committed or aborted meanwhile: all the better.
                Err(error) if error.kind == RepositoryErrorKind::Superseded => {}
                Err(error) => return Err(error),
            }
        }
        Ok(aborted)
    }

    /// The record of a point that is live or expired.
    pub fn record(&self, point: &PointId) -> Result<PointRecord, RepositoryError> {
        let stored = self.sealed_record(point)?;
        open_record(&self.keys, point, &stored)
            .map_err(|error| RepositoryError::damaged(self.names().point(point), error))
    }

    /// Seals and writes the record of a point of an open session.
    pub(super) fn write_record(
        &self,
        point: &PointId,
        record: &PointRecord,
    ) -> Result<(ObjectHash, u64), RepositoryError> {
        let stored = crate::codec::seal_record(&self.keys, point, record);
        if stored.len() as u64 > MAX_RECORD_BYTES {
            return Err(RepositoryError::new(
                RepositoryErrorKind::Refused,
                self.names().point(point),
                "the VM definition is too large for a point record",
            ));
        }
        upload(&**self.storage(), &self.names().point(point), &stored)?;
        Ok((hash_of(&stored), stored.len() as u64))
    }
}

/// The session that is over once this entry stands.
fn closed_by(body: &Body) -> Option<SessionId> {
    match body {
        Body::Commit(body) => Some(body.session),
        Body::Merge(body) => Some(body.session),
        Body::Condemn(body) => Some(body.session),
        Body::Abort(body) => Some(body.session),
        Body::Reclaimed(body) => body.session,
        _ => None,
    }
}

/// From when a restore point's time counts. A lone clock's word is enough neither to keep anything
/// longer nor to erase it earlier: it may be years ahead, or back in 1970. Then it is the last time
/// before it that two sources agreed on, which is never later than the true one.
pub(super) fn counted_from(
    begun_at: Timestamp,
    clock_alone: bool,
    witnessed_before: Option<Timestamp>,
) -> Timestamp {
    match (clock_alone, witnessed_before) {
        (true, Some(before)) => before,
        _ => begun_at,
    }
}

/// No session may take longer; other hosts' sessions are aborted after it.
pub const LONGEST_SESSION_DAYS: i64 = 8;

/// The strings of a policy entry.
pub fn terms_map(terms: &PolicyTerms) -> BTreeMap<String, String> {
    let mut map: BTreeMap<String, String> = [
        ("timezone", &terms.timezone),
        ("window", &terms.window),
        ("full_day", &terms.full_day),
        ("restore_window", &terms.restore_window),
        ("max_retention", &terms.max_retention),
        ("keep_after_window", &terms.keep_after_window),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_string(), value.clone()))
    .collect();
    if let Some(budget) = &terms.erase_budget {
        map.insert("erase_budget".to_string(), budget.clone());
    }
    map
}

fn write_key(
    storage: &dyn Storage,
    names: &CustomerNames,
    key: &CustomerKey,
    recipients: &[AgeRecipient],
) -> Result<(u32, ObjectHash), RepositoryError> {
    let sealed = age::encrypt(recipients, &key.to_key_file()).map_err(|error| {
        RepositoryError::new(RepositoryErrorKind::Refused, "customer key", error)
    })?;
    for number in 1..1000 {
        // Where one host writes, what another process left under way must not land on it.
        let number = match names.writers() {
            Writers::Many => number,
            Writers::One => u32::from_ne_bytes(random_bytes()).max(1),
        };
        match storage.create(&names.key(number), &sealed) {
            Ok(()) => return Ok((number, hash_of(&sealed))),
            Err(error) if error.kind == crate::storage::StorageErrorKind::AlreadyExists => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(RepositoryError::damaged(
        names.keys_prefix(),
        "holds too many key files",
    ))
}

/// Opens the newest key file that the ledger names and this host can open.
fn read_key(
    sealed: &SealedCustomer,
    identity: &HostIdentity,
) -> Result<CustomerKey, RepositoryError> {
    let mut refusal = RepositoryError::new(
        RepositoryErrorKind::WrongKey,
        sealed.names().keys_prefix(),
        "the ledger names no key file yet; run `vmkeep run` again to complete this customer",
    );
    let files = sealed.with_state(|state| state.keys.clone());
    for row in files.iter().rev() {
        match open_key(sealed, row, identity) {
            Ok(key) => return Ok(key),
            // One rotten key file must not stand in the way of an older one that opens; if none
            // does, damage is the answer, not "wrong key".
            Err(error) if error.is_damage() || error.kind == RepositoryErrorKind::WrongKey => {
                if !refusal.is_damage() {
                    refusal = error;
                }
            }
            Err(error) => return Err(error),
        }
    }
    Err(refusal)
}

fn open_key(
    sealed: &SealedCustomer,
    row: &KeyBody,
    identity: &HostIdentity,
) -> Result<CustomerKey, RepositoryError> {
    let stored = sealed.sealed_key(row)?;
    let name = sealed.names().key(row.object);
    let key = key_in(&name, &stored, identity)?;
    match key.uid() == sealed.uid() {
        true => Ok(key),
        false => Err(RepositoryError::damaged(
            name,
            "the key file holds the key of another customer",
        )),
    }
}

/// The key in the stored bytes of a key file.
pub(super) fn key_in(
    name: &ObjectName,
    stored: &[u8],
    identity: &HostIdentity,
) -> Result<CustomerKey, RepositoryError> {
    match identity.decrypt(stored) {
        Ok(plain) => CustomerKey::from_key_file(&plain)
            .map_err(|error| RepositoryError::damaged(name, error.0)),
        Err(age::AgeError::WrongKey) => Err(RepositoryError::new(
            RepositoryErrorKind::WrongKey,
            name,
            "the identity of this host does not open it",
        )),
        Err(error) => Err(RepositoryError::damaged(name, error)),
    }
}
