//! Deleting what is condemned.

use super::super::RepositoryError;
use super::super::mark::Mark;
use super::super::rule::{Rule, stands};
use super::{Directory, Pass, directory, entries_in_index};
use crate::model::{ObjectName, PackName, Tag};
use crate::storage::gone_or_locked;

impl Pass<'_> {
    /// Deletes condemned packs, ours and those of others that died, after finding each live tag of
    /// a pack in an uncondemned one. What is found nowhere else is withheld, to be rescued,
    /// whatever else is damaged.
    pub(super) fn delete_condemned(&mut self, mark: &Mark) -> Result<(), RepositoryError> {
        let waiting: Vec<PackName> = self.customer.with_state(|state| {
            state
                .condemned
                .iter()
                .filter(|(_, row)| !row.deleted && row.seq <= mark.index().seq())
                .map(|(name, _)| *name)
                .collect()
        });
        self.result.withheld.clear();
        let mut due = Vec::new();
        let looked_at = self.look_at(mark, waiting, &mut due);
        // Those that were looked at go, whatever became of the next one.
        self.delete(&due);
        looked_at
    }

    fn look_at(
        &mut self,
        mark: &Mark,
        waiting: Vec<PackName>,
        due: &mut Vec<PackName>,
    ) -> Result<(), RepositoryError> {
        for name in waiting {
            if self.result.removed.contains(&name) {
                continue;
            }
            let entries = match directory(self.customer, &name)? {
                Directory::Entries(entries) => entries,
                // Gone: whoever deleted it died before saying so. Damaged: frames that the index
                // never knew cannot be needed.
                Directory::Gone | Directory::Damaged => entries_in_index(mark, &name)?,
            };
            let mut needed = false;
            for entry in &entries {
                needed = needed || self.is_needed(mark, &name, &entry.tag)?;
            }
            if needed && stands(Rule::MarkBeforeDeleting) {
                self.result.withheld.push(name);
                continue;
            }
            due.push(name);
        }
        Ok(())
    }

    fn delete(&mut self, due: &[PackName]) {
        let storage = self.customer.storage();
        let names = due.iter().map(|name| self.customer.names().pack(name));
        let names: Vec<ObjectName> = names.collect();
        let sizes: Vec<u64> = names
            .iter()
            .map(|name| storage.size_bytes(name).unwrap_or_default())
            .collect();
        let deleted = storage.delete_all(&names);
        // What is refused is tried again with each mark; others are not to wait for it.
        self.result.refused = None;
        for ((name, freed), deleted) in due.iter().zip(sizes).zip(deleted) {
            match gone_or_locked(deleted) {
                Ok(None) => {
                    self.result.freed_bytes += freed;
                    self.result.removed.push(*name);
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
