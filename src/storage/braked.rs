//! A store to which nothing is sent faster than somebody allows.

use super::{Leftover, Listed, OpenObject, Part, ReadAgain, Storage, StorageError, Survey};
use crate::model::ObjectName;
use bytes::Bytes;
use std::sync::Arc;

/// Returns when so many bytes may be sent.
pub type MaySend = dyn Fn(u64) + Send + Sync;

/// What is smaller is sent at once.
const LEAST_BYTES: usize = 64 << 10;

pub struct Braked {
    store: Arc<dyn Storage>,
    may_send: Arc<MaySend>,
}

impl Braked {
    pub fn new(store: Arc<dyn Storage>, may_send: Arc<MaySend>) -> Self {
        Braked { store, may_send }
    }

    /// An entry of the ledger does not wait behind packs: others wait for it.
    fn wait_for(&self, data: &[u8]) {
        if data.len() >= LEAST_BYTES {
            (self.may_send)(data.len() as u64);
        }
    }
}

impl Storage for Braked {
    fn behind(&self) -> Option<&dyn Storage> {
        Some(&*self.store)
    }

    fn create(&self, name: &ObjectName, data: &[u8]) -> Result<(), StorageError> {
        self.wait_for(data);
        self.store.create(name, data)
    }

    fn create_large(
        &self,
        name: &ObjectName,
        data: &Bytes,
        read_again: ReadAgain,
    ) -> Result<(), StorageError> {
        self.wait_for(data);
        self.store.create_large(name, data, read_again)
    }

    fn read(&self, name: &ObjectName, max_bytes: u64) -> Result<Vec<u8>, StorageError> {
        self.store.read(name, max_bytes)
    }

    fn read_range(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StorageError> {
        self.store.read_range(name, offset, buffer)
    }

    fn open(&self, name: &ObjectName, max_bytes: u64) -> Result<Box<dyn OpenObject>, StorageError> {
        self.store.open(name, max_bytes)
    }

    fn open_copy(
        &self,
        name: &ObjectName,
        max_bytes: u64,
    ) -> Result<Box<dyn OpenObject>, StorageError> {
        self.store.open_copy(name, max_bytes)
    }

    fn leftovers(&self, prefix: &str) -> Result<Vec<Leftover>, StorageError> {
        self.store.leftovers(prefix)
    }

    fn size_bytes(&self, name: &ObjectName) -> Result<u64, StorageError> {
        self.store.size_bytes(name)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>, StorageError> {
        self.store.list(prefix)
    }

    fn parts(&self, prefix: &str) -> Result<Vec<Part>, StorageError> {
        self.store.parts(prefix)
    }

    fn delete(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.store.delete(name)
    }

    fn destroy(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.store.destroy(name)
    }

    fn delete_all(&self, names: &[ObjectName]) -> Vec<Result<(), StorageError>> {
        self.store.delete_all(names)
    }

    fn sweep_leftovers(&self, prefix: &str) -> Result<Vec<Leftover>, StorageError> {
        self.store.sweep_leftovers(prefix)
    }

    fn survey(&self, prefix: &str) -> Result<Survey, StorageError> {
        self.store.survey(prefix)
    }

    fn location(&self) -> String {
        self.store.location()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Memory;
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn what_is_sent_is_asked_for_first_and_what_is_read_is_not() {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let told = asked.clone();
        let memory = Arc::new(Memory::new());
        let brake = move |bytes| told.lock().unwrap().push(bytes);
        let store = Braked::new(memory.clone(), Arc::new(brake));
        let name = ObjectName::new("a/b").unwrap();
        let large = vec![7; LEAST_BYTES];
        store.create(&name, &large).unwrap();
        assert_eq!(store.read(&name, 1 << 20).unwrap(), large);
        assert_eq!(store.list("").unwrap().len(), 1);
        store.delete(&name).unwrap();
        store
            .create(&ObjectName::new("a/c").unwrap(), b"small")
            .unwrap();
        assert_eq!(memory.list("").unwrap().len(), 1);
        assert_eq!(*asked.lock().unwrap(), [LEAST_BYTES as u64]);
    }
}
