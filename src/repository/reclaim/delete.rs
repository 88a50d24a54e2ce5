//! Deleting what is condemned.

use super::super::RepositoryError;
use super::super::mark::Mark;
use super::super::rule::{Rule, stands};
use super::{Directory, Pass, directory, entries_in_index};
use crate::format::pack::DirectoryEntry;
use crate::model::{ObjectName, PackName, Tag};
use crate::storage::{Storage, StorageErrorKind, gone_or_locked};
use std::collections::HashSet;

/// Packs that are looked up in one pass over the index: what it knows of them is in memory meanwhile.
const LOOKED_UP_TOGETHER: usize = 4096;

/// A pack that is to be deleted.
#[derive(Clone, Copy)]
struct Due {
    name: PackName,
    /// `None`: only the store can tell.
    size_bytes: Option<u64>,
}

impl Pass<'_> {
    /// Deletes condemned packs, ours and those of others that died, after finding each live tag of
    /// a pack in an uncondemned one. What is found nowhere else is withheld, to be rescued,
    /// whatever else is damaged.
    pub(super) fn delete_condemned(&mut self, mark: &Mark) -> Result<(), RepositoryError> {
        let removed: HashSet<PackName> = self.result.removed.iter().copied().collect();
        let waiting: Vec<PackName> = self.customer.with_state(|state| {
            state
                .condemned
                .iter()
                .filter(|(_, row)| !row.deleted && row.seq <= mark.index().seq())
                .map(|(name, _)| *name)
                .filter(|name| !removed.contains(name))
                .collect()
        });
        self.result.withheld.clear();
        let (mut due, mut unlisted) = (Vec::new(), Vec::new());
        let looked_at = self.look_at(mark, waiting, &mut due, &mut unlisted);
        let looked_up = self.look_up(mark, &unlisted, &mut due);
        // Those that were looked at go, whatever became of the next one.
        self.delete(&due);
        looked_at.and(looked_up)
    }

    /// `unlisted`: packs whose own directory cannot tell what is in them.
    fn look_at(
        &mut self,
        mark: &Mark,
        waiting: Vec<PackName>,
        due: &mut Vec<Due>,
        unlisted: &mut Vec<Due>,
    ) -> Result<(), RepositoryError> {
        for name in waiting {
            let number = mark.index().number_of(&name);
            let row = number.and_then(|number| mark.index().pack(number));
            let pack = Due {
                name,
                size_bytes: row.map(|info| info.row.size_bytes),
            };
            match directory(self.customer, &name)? {
                Directory::Entries(entries) => self.judge(mark, pack, &entries, due)?,
                Directory::Damaged => unlisted.push(pack),
                // Whoever deleted it died before saying so.
                Directory::Gone => unlisted.push(Due {
                    size_bytes: Some(0),
                    ..pack
                }),
            }
        }
        Ok(())
    }

    /// Frames that the index never knew cannot be needed.
    fn look_up(
        &mut self,
        mark: &Mark,
        unlisted: &[Due],
        due: &mut Vec<Due>,
    ) -> Result<(), RepositoryError> {
        for packs in unlisted.chunks(LOOKED_UP_TOGETHER) {
            let names: Vec<PackName> = packs.iter().map(|pack| pack.name).collect();
            let known = entries_in_index(mark, &names)?;
            for pack in packs {
                let entries = known.get(&pack.name).map(Vec::as_slice);
                self.judge(mark, *pack, entries.unwrap_or_default(), due)?;
            }
        }
        Ok(())
    }

    fn judge(
        &mut self,
        mark: &Mark,
        pack: Due,
        entries: &[DirectoryEntry],
        due: &mut Vec<Due>,
    ) -> Result<(), RepositoryError> {
        let mut needed = false;
        for entry in entries {
            needed = needed || self.is_needed(mark, &pack.name, &entry.tag)?;
        }
        match needed && stands(Rule::MarkBeforeDeleting) {
            true => self.result.withheld.push(pack.name),
            false => due.push(pack),
        }
        Ok(())
    }

    fn delete(&mut self, due: &[Due]) {
        let storage = self.customer.storage();
        let names = due.iter().map(|due| self.customer.names().pack(&due.name));
        let names: Vec<ObjectName> = names.collect();
        let sizes = sizes(storage, due, &names);
        let deleted = storage.delete_all(&names);
        // What is refused is tried again with each mark; others are not to wait for it.
        self.result.refused = None;
        for ((due, freed), deleted) in due.iter().zip(sizes).zip(deleted) {
            match gone_or_locked(deleted) {
                Ok(None) => {
                    self.result.freed_bytes += freed;
                    self.result.removed.push(due.name);
                }
                Ok(Some(_locked)) => {}
                Err(error) => {
                    self.result.refused.get_or_insert(error);
                }
            }
        }
    }

    /// Whether a tag of a condemned pack is live and stands in no pack that stays. What another
    /// condemned, perhaps wrongly, is not believed: the copy that stays is read.
    fn is_needed(
        &self,
        mark: &Mark,
        condemned: &PackName,
        tag: &Tag,
    ) -> Result<bool, RepositoryError> {
        if !mark.is_live(tag)? || self.given_up.contains(&(*condemned, *tag)) {
            return Ok(false);
        }
        let own = self.own.contains(condemned);
        for place in mark.index().sound_places(tag)? {
            let Some(info) = mark.index().pack(place.pack) else {
                continue;
            };
            if own || self.customer.frame_is_whole(&info.row.name, &place, tag)? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// How much each is, as far as it is known. A store that does not answer is asked once: each answer
/// would be waited for as long as patience lasts, and all that depends on it is a sum.
fn sizes(storage: &dyn Storage, due: &[Due], names: &[ObjectName]) -> Vec<u64> {
    let mut answers = true;
    let size = |(due, name): (&Due, &ObjectName)| match due.size_bytes {
        Some(size_bytes) => size_bytes,
        None if !answers => 0,
        None => {
            let told = storage.size_bytes(name);
            answers = !matches!(&told, Err(error) if error.kind == StorageErrorKind::Transient);
            told.unwrap_or_default()
        }
    };
    due.iter().zip(names).map(size).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ObjectHash, SessionId};
    use crate::storage::{Fault, Faulty, Memory};

    fn due(sizes: &[Option<u64>]) -> (Vec<Due>, Vec<ObjectName>) {
        let pack = |(number, size_bytes): (u8, &Option<u64>)| {
            let name = PackName {
                session: SessionId::from_bytes([number; 16]),
                hash: ObjectHash::from_bytes([number; 32]),
            };
            let object = ObjectName::new(&format!("packs/{number}")).unwrap();
            let size_bytes = *size_bytes;
            (Due { name, size_bytes }, object)
        };
        (0..).zip(sizes).map(pack).unzip()
    }

    #[test]
    fn only_sizes_that_the_index_does_not_know_are_asked_for() {
        let store = Faulty::new(Memory::new());
        let (due, names) = due(&[Some(7), None, Some(0), None]);
        store.create(&names[3], b"12345").unwrap();
        let before = store.operations();
        // What is gone is no reason to ask no more.
        assert_eq!(sizes(&store, &due, &names), [7, 0, 0, 5]);
        assert_eq!(store.operations(), before + 2);
    }

    #[test]
    fn a_store_that_does_not_answer_is_asked_for_one_size() {
        let kind = StorageErrorKind::Transient;
        let faults = (1..=3).map(|at| Fault::FailBefore { at, kind });
        let store = Faulty::with_faults(Memory::new(), faults.collect());
        let (due, names) = due(&[None, Some(7), None, None]);
        assert_eq!(sizes(&store, &due, &names), [0, 7, 0, 0]);
        assert_eq!(store.operations(), 1);
    }
}
