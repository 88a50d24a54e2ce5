//! Processes that take turns: each stands before its next storage operation until it is let go.

use crate::model::ObjectName;
use crate::storage::{Leftover, Listed, Memory, Storage, StorageError, StorageErrorKind, Survey};
use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// What becomes of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Works,
    /// Takes effect; nobody hears of it.
    ReplyLost,
    /// A creation that fails for its caller, and lands some time later or never.
    InFlight,
    /// The process dies before it.
    Dies,
    /// The process dies after it took effect.
    DiesAfter,
}

/// An operation that a process stands before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub text: String,
    pub writes: bool,
    pub creates: bool,
    /// What others do cannot change what it finds, nor does it change anything for them.
    pub local: bool,
}

#[derive(Debug, Default)]
struct Inner {
    /// Whose turn it is; `None`: the explorer's.
    turn: Option<usize>,
    fate: Option<Fate>,
    waiting: Vec<Option<Step>>,
    finished: Vec<bool>,
    dead: Vec<bool>,
    late: Vec<(ObjectName, Vec<u8>)>,
    created: BTreeSet<ObjectName>,
    twice: Option<ObjectName>,
}

/// One store, several processes, and who may go on.
#[derive(Debug)]
pub struct Stage {
    inner: Mutex<Inner>,
    changed: Condvar,
    pub memory: Memory,
    /// Creating again what is there replaces it.
    overwrites: bool,
    /// Reads are moments too.
    fine: bool,
}

impl Stage {
    pub fn new(memory: Memory, processes: usize, overwrites: bool, fine: bool) -> Arc<Self> {
        Arc::new(Stage {
            inner: Mutex::new(Inner {
                waiting: vec![None; processes],
                finished: vec![false; processes],
                dead: vec![false; processes],
                ..Inner::default()
            }),
            changed: Condvar::new(),
            memory,
            overwrites,
            fine,
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        let waited = self.changed.wait(inner);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// Called by a process before an operation.
    pub fn arrive(&self, process: usize, step: Step) -> Fate {
        let mut inner = self.inner();
        if inner.dead[process] {
            return Fate::Dies;
        }
        inner.waiting[process] = Some(step);
        if inner.turn == Some(process) {
            inner.turn = None;
        }
        self.changed.notify_all();
        while inner.turn != Some(process) {
            inner = self.wait(inner);
        }
        inner.waiting[process] = None;
        let fate = inner.fate.take().unwrap_or(Fate::Works);
        if matches!(fate, Fate::Dies | Fate::DiesAfter) {
            inner.dead[process] = true;
        }
        fate
    }

    pub fn finish(&self, process: usize) {
        let mut inner = self.inner();
        inner.finished[process] = true;
        if inner.turn == Some(process) {
            inner.turn = None;
        }
        self.changed.notify_all();
    }

    /// Lets a process go on; returns when it stands before its next operation or has ended.
    pub fn go(&self, process: usize, fate: Fate) {
        let mut inner = self.inner();
        inner.turn = Some(process);
        inner.fate = Some(fate);
        self.changed.notify_all();
        while inner.turn.is_some() {
            inner = self.wait(inner);
        }
    }

    /// Waits until each process stands before something or has ended.
    pub fn settle(&self) {
        let mut inner = self.inner();
        while (0..inner.waiting.len())
            .any(|process| inner.waiting[process].is_none() && !inner.finished[process])
        {
            inner = self.wait(inner);
        }
    }

    /// What each process stands before; `None`: it has ended.
    pub fn standing(&self) -> Vec<Option<Step>> {
        self.inner().waiting.clone()
    }

    pub fn late(&self) -> Vec<(ObjectName, Vec<u8>)> {
        self.inner().late.clone()
    }

    /// A name that was used for two objects.
    pub fn used_twice(&self) -> Option<ObjectName> {
        self.inner().twice.clone()
    }

    fn create(&self, name: &ObjectName, data: &[u8]) -> Result<(), StorageError> {
        if self.overwrites {
            self.memory.plant(name, data);
            return Ok(());
        }
        self.memory.create(name, data)?;
        let mut inner = self.inner();
        if !inner.created.insert(name.clone()) {
            inner.twice = Some(name.clone());
        }
        Ok(())
    }
}

/// The store as one process sees it.
pub struct Taking {
    pub stage: Arc<Stage>,
    pub process: usize,
    /// Off while the process opens what it needs.
    pub on: Arc<std::sync::atomic::AtomicBool>,
}

impl Taking {
    fn run<T>(
        &self,
        verb: &str,
        name: &str,
        how: (bool, bool, bool),
        operation: impl FnOnce() -> Result<T, StorageError>,
    ) -> Result<T, StorageError> {
        if !self.on.load(std::sync::atomic::Ordering::SeqCst) {
            return operation();
        }
        let (writes, creates, local) = how;
        let step = Step {
            text: format!(
                "{verb} {}",
                name.strip_prefix("customers/acme/").unwrap_or(name)
            ),
            writes,
            creates,
            local,
        };
        let lost = |kind| Err(StorageError::new(kind, name, "planned"));
        match self.stage.arrive(self.process, step) {
            Fate::Works => operation(),
            Fate::ReplyLost => {
                drop(operation());
                lost(StorageErrorKind::Transient)
            }
            Fate::InFlight => lost(StorageErrorKind::Transient),
            Fate::Dies => lost(StorageErrorKind::Denied),
            Fate::DiesAfter => {
                drop(operation());
                lost(StorageErrorKind::Denied)
            }
        }
    }

    fn read_is_local(&self, name: &ObjectName) -> bool {
        // What is there and never changes is found whenever one looks, unless somebody deletes it.
        let there = self.stage.memory.size_bytes(name).is_ok();
        there && (!self.stage.fine || name.as_str().contains("/ledger/"))
    }
}

impl Storage for Taking {
    fn create(&self, name: &ObjectName, data: &[u8]) -> Result<(), StorageError> {
        let step = Step {
            text: format!(
                "create {}",
                name.as_str()
                    .strip_prefix("customers/acme/")
                    .unwrap_or(name.as_str())
            ),
            writes: true,
            creates: true,
            local: false,
        };
        if !self.on.load(std::sync::atomic::Ordering::SeqCst) {
            return self.stage.create(name, data);
        }
        let lost = |kind| Err(StorageError::new(kind, name, "planned"));
        match self.stage.arrive(self.process, step) {
            Fate::Works => self.stage.create(name, data),
            Fate::ReplyLost => {
                drop(self.stage.create(name, data));
                lost(StorageErrorKind::Transient)
            }
            Fate::InFlight => {
                let late = (name.clone(), data.to_vec());
                self.stage.inner().late.push(late);
                lost(StorageErrorKind::Transient)
            }
            Fate::Dies => lost(StorageErrorKind::Denied),
            Fate::DiesAfter => {
                drop(self.stage.create(name, data));
                lost(StorageErrorKind::Denied)
            }
        }
    }

    fn read(&self, name: &ObjectName, max_bytes: u64) -> Result<Vec<u8>, StorageError> {
        let how = (false, false, self.read_is_local(name));
        self.run("read", name.as_str(), how, || {
            self.stage.memory.read(name, max_bytes)
        })
    }

    fn read_range(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StorageError> {
        let how = (false, false, self.read_is_local(name));
        self.run("read of", name.as_str(), how, || {
            self.stage.memory.read_range(name, offset, buffer)
        })
    }

    fn size_bytes(&self, name: &ObjectName) -> Result<u64, StorageError> {
        let how = (false, false, self.read_is_local(name));
        self.run("size", name.as_str(), how, || {
            self.stage.memory.size_bytes(name)
        })
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>, StorageError> {
        self.run("list", prefix, (false, false, false), || {
            self.stage.memory.list(prefix)
        })
    }

    fn delete(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.run("delete", name.as_str(), (true, false, false), || {
            self.stage.memory.delete(name)
        })
    }

    fn destroy(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.run("destroy", name.as_str(), (true, false, false), || {
            self.stage.memory.destroy(name)
        })
    }

    fn sweep_leftovers(&self, _prefix: &str) -> Result<Vec<Leftover>, StorageError> {
        Ok(Vec::new())
    }

    fn survey(&self, prefix: &str) -> Result<Survey, StorageError> {
        let objects = self.list(prefix)?;
        let leftovers = Vec::new();
        Ok(Survey { objects, leftovers })
    }

    fn location(&self) -> String {
        "a stage".to_string()
    }
}
