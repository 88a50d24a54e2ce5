//! A customer as everybody sees it who has the store and no key: ledger, index and packs. What can be
//! checked of them stands here; what must be opened is [`Customer`](super::Customer)'s.

use super::host::HostMemory;
use super::index::{Index, Place};
use super::ledger::{Ledger, State};
use super::reader::frame_length;
use super::{RepositoryError, RepositoryErrorKind};
use crate::codec::{MAX_RECORD_BYTES, age};
use crate::format::entry::KeyBody;
use crate::format::names::CustomerNames;
use crate::format::pack::parse_frame;
use crate::model::{
    CustomerName, CustomerUid, EntryHash, ObjectHash, ObjectName, PackName, PointId, PointState,
    RepositoryId, Tag,
};
use crate::storage::Storage;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How often the index is loaded anew because the ledger went on meanwhile.
pub(super) const LOAD_ATTEMPTS: usize = 4;

/// What it means that there is no ledger. `NotFound`: the customer is new. If the whole ledger is gone, nobody may
/// begin another one in silence, as if nothing had been promised.
pub(super) fn no_ledger(
    storage: &dyn Storage,
    names: &CustomerNames,
    repository: &RepositoryId,
    memory: &dyn HostMemory,
) -> RepositoryError {
    if memory.origin(repository, names.customer()).is_some() {
        return RepositoryError::new(
            RepositoryErrorKind::Replaced,
            names.ledger_prefix(),
            "the ledger of this customer is gone from the store: this host has read it before",
        );
    }
    match storage.list(&names.points_prefix()) {
        Ok(points) if points.is_empty() => RepositoryError::new(
            RepositoryErrorKind::NotFound,
            names.prefix(),
            "this customer is not in the repository yet",
        ),
        Ok(_) => RepositoryError::damaged(
            names.ledger_prefix(),
            "the ledger of this customer is gone from the store: its restore points are there",
        ),
        Err(error) => error.into(),
    }
}

/// One customer's part of a repository, open as far as that goes without its key.
pub struct SealedCustomer {
    name: CustomerName,
    uid: CustomerUid,
    names: CustomerNames,
    storage: Arc<dyn Storage>,
    memory: Arc<dyn HostMemory>,
    ledger: Mutex<Ledger>,
    index: Mutex<Option<Arc<Index>>>,
    index_threads: usize,
}

impl SealedCustomer {
    /// `NotFound` if it has no ledger yet. `index_threads` open the index.
    pub fn open(
        storage: Arc<dyn Storage>,
        name: &CustomerName,
        repository: RepositoryId,
        memory: Arc<dyn HostMemory>,
        index_threads: usize,
    ) -> Result<Self, RepositoryError> {
        let names = CustomerNames::new(name);
        let ledger = Ledger::load(storage.clone(), names.clone(), &*memory)?
            .ok_or_else(|| no_ledger(&*storage, &names, &repository, &*memory))?;
        let state = ledger.state();
        let uid = state.uid.unwrap_or(CustomerUid::from_bytes([0; 16]));
        if state.repository != Some(repository) {
            return Err(RepositoryError::damaged(
                names.prefix(),
                "these are objects of another repository",
            ));
        }
        if state.customer_name != name.as_str() {
            return Err(RepositoryError::damaged(
                names.prefix(),
                format!(
                    "these are objects of the customer {:?}",
                    state.customer_name
                ),
            ));
        }
        Ok(SealedCustomer {
            name: name.clone(),
            uid,
            names: ledger.names().clone(),
            storage,
            memory,
            ledger: Mutex::new(ledger),
            index: Mutex::new(None),
            index_threads,
        })
    }

    /// One whose ledger is not asked: `state` is what it would say, and `index` what the store holds.
    pub(super) fn without_ledger(
        storage: Arc<dyn Storage>,
        name: &CustomerName,
        memory: Arc<dyn HostMemory>,
        state: State,
        index: Index,
    ) -> Self {
        let names = CustomerNames::new(name);
        SealedCustomer {
            name: name.clone(),
            uid: state.uid.unwrap_or(CustomerUid::from_bytes([0; 16])),
            names: names.clone(),
            storage: storage.clone(),
            memory,
            ledger: Mutex::new(Ledger::set_aside(storage, names, state)),
            index: Mutex::new(Some(Arc::new(index))),
            index_threads: 1,
        }
    }

    pub fn name(&self) -> &CustomerName {
        &self.name
    }

    pub fn uid(&self) -> CustomerUid {
        self.uid
    }

    pub fn names(&self) -> &CustomerNames {
        &self.names
    }

    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the ledger to its end.
    pub fn refresh(&self) -> Result<(), RepositoryError> {
        self.ledger().refresh(&*self.memory)
    }

    /// Reads what this host's checkpoint of the ledger was believed for, from genesis.
    pub fn check_ledger(&self) -> Result<(), RepositoryError> {
        self.ledger().check_believed(&*self.memory)
    }

    /// The ledger's first entry: where it stands, and its hash.
    pub(super) fn first_entry(&self) -> Option<(ObjectName, EntryHash)> {
        self.ledger().first_entry()
    }

    /// The entry of the ledger that cannot be read, where the state is known all the same.
    pub fn broken_entry(&self) -> Option<RepositoryError> {
        self.ledger().broken().cloned()
    }

    /// Looks at the state as last read.
    pub fn with_state<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(self.ledger().state())
    }

    /// The state as last read.
    pub fn state(&self) -> Arc<State> {
        self.ledger().state().clone()
    }

    /// Whether this version understands everything that may forbid what it would do. Asked before
    /// anything is deleted; entries ask it themselves.
    pub fn may_write(&self) -> Result<(), RepositoryError> {
        self.ledger().may_write()
    }

    /// How often the ledger was read anew because its end had lost to another one.
    pub fn readings(&self) -> u64 {
        self.ledger().readings()
    }

    /// The index as of the ledger's end now.
    pub fn load_index(&self) -> Result<Arc<Index>, RepositoryError> {
        for _ in 0..LOAD_ATTEMPTS {
            self.refresh()?;
            let earlier = self.cached_index().clone();
            let seq = self.with_state(|state| state.seq);
            if let Some(index) = earlier.as_ref().filter(|index| index.seq() == seq) {
                return Ok(index.clone());
            }
            #[cfg(not(test))]
            let state = self.state();
            #[cfg(test)]
            let state = self.state_perhaps_with_unborn()?;
            match self.load_index_of(&state, earlier) {
                Ok(index) => return Ok(index),
                // A merge may have replaced the segment meanwhile: damage only at the end.
                Err(error) if error.is_damage() => {
                    self.refresh()?;
                    if self.with_state(|now| now.seq == state.seq) {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Err(self.index_changes_too_fast())
    }

    fn load_index_of(
        &self,
        state: &State,
        earlier: Option<Arc<Index>>,
    ) -> Result<Arc<Index>, RepositoryError> {
        let (storage, names) = (&*self.storage, &self.names);
        let index = Index::load(
            storage,
            names,
            state,
            earlier.as_deref(),
            self.index_threads,
        )?;
        let index = Arc::new(index);
        *self.cached_index() = Some(index.clone());
        Ok(index)
    }

    /// The index of the ledger as last read: a segment may have been replaced since.
    pub(super) fn index_as_read(&self) -> Result<Arc<Index>, RepositoryError> {
        let earlier = self.cached_index().clone();
        self.load_index_of(&self.state(), earlier)
    }

    /// Without its rule, what a listing shows counts as born.
    #[cfg(test)]
    fn state_perhaps_with_unborn(&self) -> Result<Arc<State>, RepositoryError> {
        use crate::format::names::ObjectRole;
        use jiff::Timestamp;
        let mut state = self.state();
        use crate::repository::rule::{Rule, stands};
        if !stands(Rule::Born) {
            for object in self.storage.list(self.names.prefix())? {
                if let ObjectRole::Segment(name) = self.names.role(&object.name) {
                    let state = Arc::make_mut(&mut state);
                    state.segments.insert(name, Timestamp::MIN);
                }
            }
        }
        Ok(state)
    }

    /// The index and the state of one and the same end of the ledger. Read one after the other they
    /// may differ: other threads read on meanwhile.
    pub fn index_and_state(&self) -> Result<(Arc<Index>, Arc<State>), RepositoryError> {
        for _ in 0..LOAD_ATTEMPTS {
            let index = self.load_index()?;
            let state = self.state();
            if index.seq() == state.seq {
                return Ok((index, state));
            }
        }
        Err(self.index_changes_too_fast())
    }

    pub(super) fn index_changes_too_fast(&self) -> RepositoryError {
        RepositoryError::new(
            RepositoryErrorKind::Superseded,
            self.names.prefix(),
            "the index changes faster than it can be read",
        )
    }

    fn cached_index(&self) -> MutexGuard<'_, Option<Arc<Index>>> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the frame at this place is as it was written, read now, by its checksum.
    pub(super) fn frame_is_whole(
        &self,
        pack: &PackName,
        place: &Place,
        tag: &Tag,
    ) -> Result<bool, RepositoryError> {
        let Ok(length) = frame_length(place) else {
            return Ok(false);
        };
        let mut frame = vec![0; length];
        let name = self.names().pack(pack);
        let read = self
            .storage()
            .read_range(&name, u64::from(place.offset), &mut frame);
        match read.map_err(RepositoryError::from) {
            Ok(()) => Ok(parse_frame(&frame).is_ok_and(|frame| frame.header.tag == *tag)),
            Err(error) if error.is_damage() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The stored bytes of the record of a point that is live or expired: those that the ledger
    /// names.
    pub fn sealed_record(&self, point: &PointId) -> Result<Vec<u8>, RepositoryError> {
        let name = self.names.point(point);
        let expected = self.with_state(|state| {
            state
                .points
                .get(point)
                .filter(|row| row.state != PointState::Erased)
                .map(|row| row.record_hash)
        });
        let expected = expected.ok_or_else(|| {
            RepositoryError::new(
                RepositoryErrorKind::NotFound,
                &name,
                "no such restore point",
            )
        })?;
        let stored = self.storage.read(&name, MAX_RECORD_BYTES)?;
        match hash_of(&stored) == expected {
            true => Ok(stored),
            false => Err(RepositoryError::damaged(
                name,
                "the point record is not the one the ledger names",
            )),
        }
    }

    /// The stored bytes of a key file: those that the ledger names.
    pub fn sealed_key(&self, row: &KeyBody) -> Result<Vec<u8>, RepositoryError> {
        let name = self.names.key(row.object);
        let stored = self.storage.read(&name, age::MAX_FILE_BYTES as u64)?;
        match hash_of(&stored) == row.hash {
            true => Ok(stored),
            false => Err(RepositoryError::damaged(
                name,
                "the key file is not the one the ledger names",
            )),
        }
    }
}

pub(super) fn hash_of(bytes: &[u8]) -> ObjectHash {
    ObjectHash::from_bytes(*blake3::hash(bytes).as_bytes())
}
