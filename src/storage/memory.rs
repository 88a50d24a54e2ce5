//! A store in memory: for tests of everything above, with the semantics of the real ones.

use super::{
    Leftover, Listed, Part, Storage, StorageError, StorageErrorKind, Survey, checked_prefix,
    copy_range, refuse_own_names, too_large,
};
use crate::model::ObjectName;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Clones share one store, as two hosts share one directory.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    content: Arc<Mutex<Content>>,
}

#[derive(Debug, Clone, Default)]
struct Content {
    objects: BTreeMap<ObjectName, Arc<[u8]>>,
    leftovers: BTreeMap<String, u64>,
}

/// The whole store at one moment; cheap, because objects are shared.
#[derive(Debug, Clone)]
pub struct Snapshot {
    content: Content,
}

impl Memory {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            content: self.content().clone(),
        }
    }

    /// Puts the store back, for everyone who shares it.
    pub fn restore_snapshot(&self, snapshot: &Snapshot) {
        *self.content() = snapshot.content.clone();
    }

    /// A store of its own that begins with what the snapshot holds.
    pub fn from_snapshot(snapshot: &Snapshot) -> Self {
        Memory {
            content: Arc::new(Mutex::new(snapshot.content.clone())),
        }
    }

    /// Puts bytes under a name behind the back of everyone, whatever stood there: planted damage.
    pub fn plant(&self, name: &ObjectName, data: &[u8]) {
        self.content().objects.insert(name.clone(), data.into());
    }

    /// Leaves what a dead writer would leave.
    pub fn plant_leftover(&self, place: &str, size_bytes: u64) {
        self.content()
            .leftovers
            .insert(place.to_string(), size_bytes);
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        // A panic of another thread leaves the map whole: every change is one insert or remove.
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn object(&self, name: &ObjectName) -> Result<Arc<[u8]>, StorageError> {
        refuse_own_names(name)?;
        self.content()
            .objects
            .get(name)
            .cloned()
            .ok_or_else(|| StorageError::new(StorageErrorKind::NotFound, name, "no such object"))
    }
}

impl Content {
    /// Sorted, from what need not be a name on.
    fn since<'a>(
        &'a self,
        from: &str,
    ) -> impl Iterator<Item = (&'a ObjectName, &'a Arc<[u8]>)> + use<'a> {
        let range = (Bound::Included(from), Bound::Unbounded);
        self.objects.range::<str, _>(range)
    }

    /// In a directory a name cannot be an object and a folder at once; tests must meet that here.
    fn clash(&self, name: &ObjectName) -> Option<&'static str> {
        let folder = format!("{name}/");
        let inside = self
            .since(name.as_str())
            .map(|(other, _)| other.as_str())
            .take_while(|other| other.starts_with(name.as_str()))
            .any(|other| other.starts_with(&folder));
        if inside {
            return Some("a folder has this name");
        }
        let below_an_object = name
            .as_str()
            .match_indices('/')
            .filter_map(|(end, _)| name.as_str().get(..end))
            .filter_map(|parent| ObjectName::new(parent).ok())
            .any(|parent| self.objects.contains_key(&parent));
        below_an_object.then_some("a part of this name is an object")
    }

    fn leftovers(&self) -> Vec<Leftover> {
        self.leftovers
            .iter()
            .map(|(place, size_bytes)| Leftover {
                place: place.clone(),
                size_bytes: *size_bytes,
            })
            .collect()
    }
}

/// What the names below a prefix begin with.
fn above(prefix: &str) -> Result<String, StorageError> {
    Ok(checked_prefix(prefix)?.map_or_else(String::new, |prefix| format!("{prefix}/")))
}

impl Storage for Memory {
    fn create(&self, name: &ObjectName, data: &[u8]) -> Result<(), StorageError> {
        refuse_own_names(name)?;
        let mut content = self.content();
        if content.objects.contains_key(name) {
            let kind = StorageErrorKind::AlreadyExists;
            return Err(StorageError::new(kind, name, "the name is taken"));
        }
        if let Some(clash) = content.clash(name) {
            let kind = StorageErrorKind::Unsupported;
            return Err(StorageError::new(kind, name, clash));
        }
        content.objects.insert(name.clone(), data.into());
        Ok(())
    }

    fn read(&self, name: &ObjectName, max_bytes: u64) -> Result<Vec<u8>, StorageError> {
        let object = self.object(name)?;
        if object.len() as u64 > max_bytes {
            return Err(too_large(name, object.len() as u64, max_bytes));
        }
        Ok(object.to_vec())
    }

    fn read_range(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StorageError> {
        let object = self.object(name)?;
        copy_range(name, &object, offset, buffer)
    }

    fn size_bytes(&self, name: &ObjectName) -> Result<u64, StorageError> {
        Ok(self.object(name)?.len() as u64)
    }

    fn list(&self, prefix: &str) -> Result<Vec<Listed>, StorageError> {
        let above = above(prefix)?;
        let content = self.content();
        let below = content
            .since(&above)
            .take_while(|(name, _)| name.as_str().starts_with(&above));
        let listed = below.map(|(name, data)| Listed {
            name: name.clone(),
            size_bytes: data.len() as u64,
        });
        Ok(listed.collect())
    }

    /// From one to the next, past what is below each: years of nights have many objects.
    fn parts(&self, prefix: &str) -> Result<Vec<Part>, StorageError> {
        let above = above(prefix)?;
        let content = self.content();
        let (mut parts, mut from) = (Vec::new(), above.clone());
        while let Some((name, _)) = content.since(&from).next()
            && let Some(rest) = name.as_str().strip_prefix(&above)
        {
            let part = Part::first_of(rest);
            // "0" comes after "/".
            let after = if part.is_prefix { '0' } else { '\0' };
            from = format!("{above}{}{after}", part.name);
            parts.push(part);
        }
        // "a-b" comes before "a/", and after "a".
        parts.sort();
        Ok(parts)
    }

    fn delete(&self, name: &ObjectName) -> Result<(), StorageError> {
        refuse_own_names(name)?;
        self.content().objects.remove(name);
        Ok(())
    }

    fn destroy(&self, name: &ObjectName) -> Result<(), StorageError> {
        self.delete(name)
    }

    fn sweep_leftovers(&self, _prefix: &str) -> Result<Vec<Leftover>, StorageError> {
        let mut content = self.content();
        let swept = content.leftovers();
        content.leftovers.clear();
        Ok(swept)
    }

    fn survey(&self, prefix: &str) -> Result<Survey, StorageError> {
        // In this order: an upload that is finished between the two is an object in the second.
        let leftovers = self.content().leftovers();
        let objects = self.list(prefix)?;
        Ok(Survey { objects, leftovers })
    }

    fn free_bytes(&self) -> Option<u64> {
        None
    }

    fn release_reserve(&self) -> Result<bool, StorageError> {
        Ok(false)
    }

    fn restore_reserve(&self) -> Result<bool, StorageError> {
        Ok(false)
    }

    fn location(&self) -> String {
        "memory".to_string()
    }
}
