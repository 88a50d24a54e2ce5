//! Writing down what a reclaim did and left.

use super::super::customer::Customer;
use super::super::ledger::State;
use super::super::mark::Mark;
use super::super::{RepositoryError, RepositoryErrorKind};
use super::{Pass, Reclaimed, survey};
use crate::format::entry::{Body, PackMark, ReclaimedBody};
use crate::model::PackName;
use jiff::Timestamp;
use std::collections::BTreeSet;

/// Names of deleted packs in one entry.
const DELETED_IN_ENTRY: usize = 3000;
/// Rows in one entry, by what their text takes: its body stays below 1 MiB.
const ROW_BYTES_IN_ENTRY: usize = 500_000;
/// A pack whose dead bytes changed by less than this share is not written down again: in a large
/// store nearly every pack loses a little every night.
const SAME_SHARE: u64 = 8;

impl Pass<'_> {
    /// What is dead where, after everything that was due is gone.
    pub(super) fn finish(
        mut self,
        mark: &Mark,
        now: Timestamp,
    ) -> Result<Reclaimed, RepositoryError> {
        let facts = survey(self.customer, mark, now)?;
        self.result.marked_at = mark.began_at();
        self.result.marks = self.customer.with_state(|state| {
            let unmarked = state.unmarked_erasures_until(mark.began_at());
            let mut rows = Vec::new();
            for facts in &facts {
                let earlier = state.marks.get(&facts.name);
                match (facts.dead_bytes(), earlier) {
                    (0, None) => {}
                    (0, Some(earlier)) => rows.push(PackMark {
                        dead_bytes: 0,
                        erases: Vec::new(),
                        ..earlier.clone()
                    }),
                    (dead_bytes, earlier) => {
                        let before = earlier.map(|mark| mark.erases.iter());
                        let session = &facts.name.session;
                        let copied = state.copied_erasures_until(session, mark.began_at());
                        let erases: BTreeSet<u64> = before
                            .into_iter()
                            .flatten()
                            .chain(unmarked.keys())
                            .chain(copied.keys())
                            .copied()
                            .collect();
                        rows.push(PackMark {
                            pack: facts.name,
                            dead_bytes: match earlier {
                                Some(row) if is_same(row, dead_bytes, facts.frame_bytes) => {
                                    row.dead_bytes
                                }
                                _ => dead_bytes,
                            },
                            earliest_deadline: facts.earliest_deadline.unwrap_or(now),
                            erases: erases.into_iter().collect(),
                        });
                    }
                }
            }
            rows
        });
        Ok(self.result)
    }
}

fn is_same(row: &PackMark, dead_bytes: u64, frame_bytes: u64) -> bool {
    row.dead_bytes.abs_diff(dead_bytes) * SAME_SHARE < frame_bytes
}

/// Whether the ledger would say the same of this pack without the row.
fn is_known(state: &State, row: &PackMark, marked_at: u64) -> bool {
    let Some(known) = state.marks.get(&row.pack) else {
        return row.dead_bytes == 0;
    };
    // What was erased since the last mark is added to every row when the mark is taken in.
    let since = state.unmarked_erasures_until(marked_at);
    let deadline = since
        .values()
        .copied()
        .chain([known.earliest_deadline])
        .min();
    known.dead_bytes == row.dead_bytes
        && deadline.is_some_and(|deadline| deadline <= row.earliest_deadline)
        && row
            .erases
            .iter()
            .all(|seq| known.erases.contains(seq) || since.contains_key(seq))
}

impl Customer {
    /// Writes down what a reclaim deleted and what it left dead where, as far as that is news, in
    /// as many entries as it takes. Only the last one moves the mark: what a crash leaves unsaid
    /// is found again by the next mark. Returns whether there was any news.
    pub fn note_reclaimed(&self, reclaimed: &Reclaimed) -> Result<bool, RepositoryError> {
        let marked_at = reclaimed.marked_at;
        let rows: Vec<PackMark> = self.with_state(|state| {
            let news = |row: &&PackMark| !is_known(state, row, marked_at);
            reclaimed.marks.iter().filter(news).cloned().collect()
        });
        let mut parts: Vec<(Vec<PackName>, Vec<PackMark>)> = reclaimed
            .removed
            .chunks(DELETED_IN_ENTRY)
            .map(|deleted| (deleted.to_vec(), Vec::new()))
            .collect();
        let mut part = Vec::new();
        let mut bytes = 0;
        for row in rows {
            bytes += 220 + 8 * row.erases.len();
            part.push(row);
            if bytes >= ROW_BYTES_IN_ENTRY {
                parts.push((Vec::new(), std::mem::take(&mut part)));
                bytes = 0;
            }
        }
        let unmarked = self.with_state(|state| {
            !state.unmarked_erasures_until(marked_at).is_empty()
                || state.has_unmarked_copies(marked_at)
        });
        if !part.is_empty() || (parts.is_empty() && unmarked) {
            parts.push((Vec::new(), part));
        }
        let last = parts.len().saturating_sub(1);
        let news = !parts.is_empty();
        for (at, (deleted, rows)) in parts.into_iter().enumerate() {
            let result = self.append(|state| {
                // Another prune may have said the same, or forgotten the pack by now.
                let waits =
                    |pack: &&PackName| state.condemned.get(*pack).is_some_and(|row| !row.deleted);
                let deleted: Vec<PackName> = deleted.iter().filter(waits).copied().collect();
                let final_part = at == last;
                if deleted.is_empty() && rows.is_empty() && !final_part {
                    return Err(RepositoryError::new(
                        RepositoryErrorKind::AlreadyExists,
                        self.names().prefix(),
                        "another prune said so already",
                    ));
                }
                Ok(Body::Reclaimed(ReclaimedBody {
                    session: None,
                    marked_at: match final_part {
                        true => marked_at,
                        false => marked_at.min(state.marked_at),
                    },
                    deleted,
                    marks: rows.clone(),
                    certificate: None,
                    destroyed: Vec::new(),
                }))
            });
            match result {
                Err(error) if error.kind == RepositoryErrorKind::AlreadyExists => {}
                other => {
                    other?;
                }
            }
        }
        Ok(news)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ObjectHash, SessionId};

    #[test]
    fn an_eighth_of_a_pack_is_a_change_and_less_is_none() {
        let row = PackMark {
            pack: PackName {
                session: SessionId::from_bytes([0; 16]),
                hash: ObjectHash::from_bytes([0; 32]),
            },
            dead_bytes: 500,
            earliest_deadline: Timestamp::UNIX_EPOCH,
            erases: Vec::new(),
        };
        for (dead_bytes, same) in [(400, false), (401, true), (599, true), (600, false)] {
            assert_eq!(is_same(&row, dead_bytes, 800), same, "{dead_bytes}");
        }
    }
}
