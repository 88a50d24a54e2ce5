//! A store that loses power: what was acknowledged as created stands, deletions come back in any
//! combination, and what was being written is torn, under its own name or among temporary files.
//! (Worse than a directory, which syncs its deletions.)

use super::super::testing::*;
use super::super::*;
use super::crashes::{one_backup, one_prune, operations, recovers, small_repository};
use crate::model::ObjectName;
use crate::storage::{Fault, Faulty, Leftover, Listed, Memory, Storage, StorageError, Survey};
use std::sync::{Arc, Mutex, PoisonError};

struct Unsynced {
    faulty: Faulty<Memory>,
    memory: Memory,
    deleted: Mutex<Vec<(ObjectName, Vec<u8>)>>,
    torn: Mutex<Option<(ObjectName, Vec<u8>)>>,
}

impl Unsynced {
    fn note_deletion(
        &self,
        name: &ObjectName,
        delete: impl FnOnce() -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        let before = self.memory.read(name, u64::MAX);
        delete()?;
        if let Ok(bytes) = before {
            let mut deleted = self.deleted.lock().unwrap_or_else(PoisonError::into_inner);
            deleted.push((name.clone(), bytes));
        }
        Ok(())
    }

    /// Power is back.
    fn cut(&self, dice: &mut Dice) {
        let deleted = self.deleted.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, bytes) in deleted.iter() {
            if dice.below(2) == 0 {
                self.memory.plant(name, bytes);
            }
        }
        let torn = self.torn.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((name, bytes)) = torn.as_ref() {
            let length = dice.below(bytes.len() as u64) as usize;
            self.memory.plant_leftover("tmp/torn", length as u64);
            // An entry gets its name only when it is whole: so says the contract of a store.
            let entry = name.as_str().contains("/ledger/");
            if !entry && dice.below(2) == 0 {
                self.memory.plant(name, &bytes[..length]);
            }
        }
    }
}

impl Storage for Unsynced {
    fn behind(&self) -> Option<&dyn Storage> {
        Some(&self.faulty)
    }

    fn create(&self, name: &ObjectName, data: &[u8]) -> Result<(), StorageError> {
        let alive = !self.faulty.crashed();
        let result = self.faulty.create(name, data);
        if alive && self.faulty.crashed() && self.memory.size_bytes(name).is_err() {
            let mut torn = self.torn.lock().unwrap_or_else(PoisonError::into_inner);
            torn.get_or_insert_with(|| (name.clone(), data.to_vec()));
        }
        result
    }

    fn read(&self, name: &ObjectName, max_bytes: u64) -> Result<Vec<u8>, StorageError> {
        self.faulty.read(name, max_bytes)
    }

    fn read_range(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StorageError> {
        self.faulty.read_range(name, offset, buffer)
    }

    fn size_bytes(&self, name: &ObjectName) -> Result<u64, StorageError> {
        self.faulty.size_bytes(name)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>, StorageError> {
        self.faulty.list(prefix)
    }

    fn delete(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.note_deletion(name, || self.faulty.delete(name))
    }

    fn destroy(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.note_deletion(name, || self.faulty.destroy(name))
    }

    fn sweep_leftovers(&self, prefix: &str) -> Result<Vec<Leftover>, StorageError> {
        self.faulty.sweep_leftovers(prefix)
    }

    fn survey(&self, prefix: &str) -> Result<Survey, StorageError> {
        self.faulty.survey(prefix)
    }

    fn location(&self) -> String {
        self.faulty.location()
    }
}

type Step = fn(&World, &Customer) -> Result<(), RepositoryError>;

fn cut_everywhere(step: Step) {
    let (world, snapshot) = small_repository();
    let (before, log) = operations(&world, &snapshot, step);
    for at in before + 1..=log.len() as u64 {
        for seed in 0..3 {
            world.rewind(&snapshot);
            let fault = Fault::CrashAt { at, applied: false };
            let store = Arc::new(Unsynced {
                faulty: Faulty::with_faults(world.memory.clone(), vec![fault]),
                memory: world.memory.clone(),
                deleted: Mutex::default(),
                torn: Mutex::default(),
            });
            let customer = world.open_on(store.clone(), &world.host).unwrap();
            let _died = step(&world, &customer);
            drop(customer);
            store.cut(&mut Dice::new(at * 100 + seed));
            recovers(&world, one_prune);
        }
    }
}

#[test]
fn power_lost_at_any_operation_of_a_backup_loses_nothing_that_was_acknowledged() {
    cut_everywhere(one_backup);
}

#[test]
fn power_lost_at_any_operation_of_a_prune_brings_back_nothing_that_stays() {
    cut_everywhere(one_prune);
}
