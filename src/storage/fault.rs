//! A store that fails on purpose: for tests and drills, never for production data.
//!
//! Everything happens by plan and by number: operations are counted from 1 in the order in which
//! they begin, so that a test can walk through "crash at operation n" for every n.

use super::{Leftover, Listed, Part, Storage, StorageError, StorageErrorKind, Survey};
use crate::model::ObjectName;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One thing that goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Operation `at` fails with `kind` and has no effect.
    FailBefore { at: u64, kind: StorageErrorKind },
    /// Operation `at` takes effect and its reply is lost: `Transient`.
    FailAfter { at: u64 },
    /// The process dies in operation `at`, which was `applied` or not; from then on all its
    /// operations fail as `Denied` without effect. (A dead process learns nothing; the kind is one
    /// that nobody repeats.)
    CrashAt { at: u64, applied: bool },
    /// From operation `at` on nothing can be created (`Full`); deleting and reading work.
    FullFrom { at: u64 },
    /// Nobody may delete `name`.
    Keep { name: ObjectName },
    /// The medium does not give `name` (`Unreadable`); it is listed, in its size.
    Unread { name: ObjectName },
    /// Each read of `name` that covers `offset` returns that byte changed by `mask`.
    FlipOnRead {
        name: ObjectName,
        offset: u64,
        mask: u8,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verb {
    Create,
    Read,
    ReadRange,
    SizeBytes,
    List,
    Delete,
    Destroy,
    SweepLeftovers,
    Survey,
    ReleaseReserve,
    RestoreReserve,
}

impl Verb {
    /// Whether the operation can change the store.
    pub fn writes(self) -> bool {
        match self {
            Verb::Create
            | Verb::Delete
            | Verb::Destroy
            | Verb::SweepLeftovers
            | Verb::ReleaseReserve
            | Verb::RestoreReserve => true,
            Verb::Read | Verb::ReadRange | Verb::SizeBytes | Verb::List | Verb::Survey => false,
        }
    }
}

/// A line of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// Counted from 1.
    pub number: u64,
    pub verb: Verb,
    /// The object or prefix; empty for operations on the whole store.
    pub name: String,
    /// What the caller was told; `None` while the operation is under way.
    pub told: Option<Result<(), StorageErrorKind>>,
}

/// Wraps a store as one process sees it. Two processes on one store are two of these around clones
/// of one `Memory` or one `Arc<Directory>`.
#[derive(Debug)]
pub struct Faulty<S> {
    inner: S,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    plan: Mutex<Plan>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Plan {
    faults: Vec<Fault>,
    freezes: Vec<Freeze>,
    log: Vec<Operation>,
    dead: bool,
    /// 0: as the store below says.
    reads_at_once: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Freeze {
    at: u64,
    side: Side,
    reached: bool,
    released: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Before,
    After,
}

/// A place where an operation waits. Dropped, it lets the operation go on, so that a test that
/// fails does not hang.
#[derive(Debug)]
pub struct Frozen {
    state: Arc<State>,
    at: u64,
    side: Side,
}

impl Frozen {
    /// Waits until an operation stands here. `false`: none came in time.
    #[must_use]
    pub fn wait_until_reached(&self, at_most: Duration) -> bool {
        let deadline = Instant::now() + at_most;
        let mut plan = self.state.plan();
        loop {
            let reached = |freeze: &Freeze| self.is(freeze) && freeze.reached;
            if plan.freezes.iter().any(reached) {
                return true;
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return false;
            };
            plan = self
                .state
                .changed
                .wait_timeout(plan, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Lets the operation go on, now or when it comes.
    pub fn release(self) {
        drop(self);
    }

    fn is(&self, freeze: &Freeze) -> bool {
        freeze.at == self.at && freeze.side == self.side
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let mut plan = self.state.plan();
        for freeze in plan.freezes.iter_mut().filter(|freeze| self.is(freeze)) {
            freeze.released = true;
        }
        drop(plan);
        self.state.changed.notify_all();
    }
}

impl State {
    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while_frozen(&self, number: u64, side: Side) {
        let mut plan = self.plan();
        let here = |freeze: &&mut Freeze| freeze.at == number && freeze.side == side;
        for freeze in plan.freezes.iter_mut().filter(here) {
            freeze.reached = true;
            self.changed.notify_all();
        }
        while plan
            .freezes
            .iter()
            .any(|freeze| freeze.at == number && freeze.side == side && !freeze.released)
        {
            plan = self
                .changed
                .wait(plan)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What the plan has in store for one operation.
#[derive(Debug)]
enum Fate {
    Works,
    FailsBefore(StorageErrorKind, &'static str),
    FailsAfter(StorageErrorKind, &'static str),
}

impl Plan {
    fn fate(&mut self, number: u64, verb: Verb, object: &str) -> Fate {
        const DEAD: &str = "the process is dead (planned)";
        if self.dead {
            return Fate::FailsBefore(StorageErrorKind::Denied, DEAD);
        }
        for fault in &self.faults {
            match fault {
                Fault::FailBefore { at, kind } if *at == number => {
                    return Fate::FailsBefore(*kind, "planned");
                }
                Fault::FailAfter { at } if *at == number => {
                    return Fate::FailsAfter(StorageErrorKind::Transient, "reply lost (planned)");
                }
                Fault::CrashAt { at, applied } if *at <= number => {
                    self.dead = true;
                    return match *applied && *at == number {
                        true => Fate::FailsAfter(StorageErrorKind::Denied, DEAD),
                        false => Fate::FailsBefore(StorageErrorKind::Denied, DEAD),
                    };
                }
                Fault::Keep { name } if verb == Verb::Delete && name.as_str() == object => {
                    return Fate::FailsBefore(StorageErrorKind::Denied, "planned");
                }
                Fault::Unread { name }
                    if matches!(verb, Verb::Read | Verb::ReadRange) && name.as_str() == object =>
                {
                    return Fate::FailsBefore(StorageErrorKind::Unreadable, "planned");
                }
                Fault::FullFrom { at }
                    if *at <= number && matches!(verb, Verb::Create | Verb::RestoreReserve) =>
                {
                    return Fate::FailsBefore(StorageErrorKind::Full, "planned");
                }
                _ => {}
            }
        }
        Fate::Works
    }
}

impl<S: Storage> Faulty<S> {
    pub fn new(inner: S) -> Self {
        Self::with_faults(inner, Vec::new())
    }

    pub fn with_faults(inner: S, faults: Vec<Fault>) -> Self {
        let faulty = Faulty {
            inner,
            state: Arc::default(),
        };
        faulty.state.plan().faults = faults;
        faulty
    }

    /// As a store that is far away says it.
    pub fn read_at_once(&self, reads: usize) {
        self.state.plan().reads_at_once = reads;
    }

    pub fn add(&self, fault: Fault) {
        self.state.plan().faults.push(fault);
    }

    /// Forgets the faults; a dead process stays dead, what is frozen stays frozen.
    pub fn clear_faults(&self) {
        self.state.plan().faults.clear();
    }

    /// Operation `at` will wait before it has any effect.
    #[must_use = "what is dropped lets the operation go on"]
    pub fn freeze_before(&self, at: u64) -> Frozen {
        self.freeze(at, Side::Before)
    }

    /// Operation `at` will take effect and wait before its caller learns of it.
    #[must_use = "what is dropped lets the operation go on"]
    pub fn freeze_after(&self, at: u64) -> Frozen {
        self.freeze(at, Side::After)
    }

    fn freeze(&self, at: u64, side: Side) -> Frozen {
        self.state.plan().freezes.push(Freeze {
            at,
            side,
            reached: false,
            released: false,
        });
        Frozen {
            state: Arc::clone(&self.state),
            at,
            side,
        }
    }

    /// Operations begun so far; the next one is this plus 1.
    pub fn operations(&self) -> u64 {
        self.state.plan().log.len() as u64
    }

    pub fn log(&self) -> Vec<Operation> {
        self.state.plan().log.clone()
    }

    /// Whether the planned crash has happened.
    pub fn crashed(&self) -> bool {
        self.state.plan().dead
    }

    pub fn inner(&self) -> &S {
        &self.inner
    }

    fn run<T>(
        &self,
        verb: Verb,
        name: &str,
        operation: impl FnOnce() -> Result<T, StorageError>,
    ) -> Result<T, StorageError> {
        let number = {
            let mut plan = self.state.plan();
            let number = plan.log.len() as u64 + 1;
            plan.log.push(Operation {
                number,
                verb,
                name: name.to_string(),
                told: None,
            });
            number
        };
        self.state.wait_while_frozen(number, Side::Before);
        // Decided after the wait: whoever was frozen while its process died is dead too.
        let fate = self.state.plan().fate(number, verb, name);
        let told = match fate {
            Fate::Works => operation(),
            Fate::FailsBefore(kind, detail) => Err(StorageError::new(kind, name, detail)),
            Fate::FailsAfter(kind, detail) => {
                // Whatever the store answered, nobody hears it.
                drop(operation());
                Err(StorageError::new(kind, name, detail))
            }
        };
        self.state.wait_while_frozen(number, Side::After);
        let mut plan = self.state.plan();
        let index = usize::try_from(number - 1).unwrap_or(usize::MAX);
        if let Some(line) = plan.log.get_mut(index) {
            line.told = Some(told.as_ref().map(|_| ()).map_err(|error| error.kind));
        }
        told
    }

    fn flip(&self, name: &ObjectName, start: u64, bytes: &mut [u8]) {
        for fault in &self.state.plan().faults {
            if let Fault::FlipOnRead {
                name: damaged,
                offset,
                mask,
            } = fault
                && damaged == name
                && let Some(index) = offset.checked_sub(start)
                && let Ok(index) = usize::try_from(index)
                && let Some(byte) = bytes.get_mut(index)
            {
                *byte ^= mask;
            }
        }
    }
}

impl<S: Storage> Storage for Faulty<S> {
    fn behind(&self) -> Option<&dyn Storage> {
        Some(&self.inner)
    }

    fn create(&self, name: &ObjectName, data: &[u8]) -> Result<(), StorageError> {
        self.run(Verb::Create, name.as_str(), || {
            self.inner.create(name, data)
        })
    }

    fn read(&self, name: &ObjectName, max_bytes: u64) -> Result<Vec<u8>, StorageError> {
        self.run(Verb::Read, name.as_str(), || {
            let mut data = self.inner.read(name, max_bytes)?;
            self.flip(name, 0, &mut data);
            Ok(data)
        })
    }

    fn read_range(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StorageError> {
        self.run(Verb::ReadRange, name.as_str(), || {
            self.inner.read_range(name, offset, buffer)?;
            self.flip(name, offset, buffer);
            Ok(())
        })
    }

    fn reads_at_once(&self) -> usize {
        match self.state.plan().reads_at_once {
            0 => self.inner.reads_at_once(),
            given => given,
        }
    }

    fn size_bytes(&self, name: &ObjectName) -> Result<u64, StorageError> {
        self.run(Verb::SizeBytes, name.as_str(), || {
            self.inner.size_bytes(name)
        })
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>, StorageError> {
        self.run(Verb::List, prefix, || self.inner.list(prefix))
    }

    fn parts(&self, prefix: &str) -> Result<Vec<Part>, StorageError> {
        self.run(Verb::List, prefix, || self.inner.parts(prefix))
    }

    fn delete(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.run(Verb::Delete, name.as_str(), || self.inner.delete(name))
    }

    fn destroy(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.run(Verb::Destroy, name.as_str(), || self.inner.destroy(name))
    }

    fn sweep_leftovers(&self, prefix: &str) -> Result<Vec<Leftover>, StorageError> {
        self.run(Verb::SweepLeftovers, prefix, || {
            self.inner.sweep_leftovers(prefix)
        })
    }

    fn survey(&self, prefix: &str) -> Result<Survey, StorageError> {
        self.run(Verb::Survey, prefix, || self.inner.survey(prefix))
    }

    fn release_reserve(&self) -> Result<bool, StorageError> {
        self.run(Verb::ReleaseReserve, "", || self.inner.release_reserve())
    }

    fn restore_reserve(&self) -> Result<bool, StorageError> {
        self.run(Verb::RestoreReserve, "", || self.inner.restore_reserve())
    }

    fn location(&self) -> String {
        self.inner.location()
    }
}
