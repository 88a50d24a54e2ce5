//! Joining index segments.

use super::super::customer::Customer;
use super::super::writer::upload;
use super::super::{RepositoryError, RepositoryErrorKind};
use crate::format::entry::{Body, MergeBody, Purpose};
use crate::format::segment::{self, MAX_SEGMENT_BYTES, PackRow, Record};
use crate::model::{ObjectHash, PackName, SegmentName};
use std::collections::{BTreeMap, BTreeSet};

const MERGE_AT_SEGMENTS: usize = 12;
/// Records of a segment that readers still accept, with room for its tables.
const MAX_RECORDS: usize = (MAX_SEGMENT_BYTES / 32) as usize;

/// Forgets the packs that are known to be deleted, and joins small index segments into one, so
/// that a lookup asks few of them. Places of packs that are only condemned stay.
///
/// A tag lets a holder of the customer key test a guess at its content, so the tags of what was
/// destroyed leave with its bytes, in the same prune, and no later merge is waited for.
///
/// `false`: there was nothing to do, or another merge was faster.
pub fn merge_segments(customer: &Customer) -> Result<bool, RepositoryError> {
    let index = customer.load_index()?;
    let mut sizes: Vec<(usize, SegmentName)> = index
        .segment_names()
        .map(|(name, len)| (len, *name))
        .collect();
    sizes.sort_unstable();
    let gone = |pack: &PackName| {
        index
            .number_of(pack)
            .and_then(|number| index.pack(number))
            .is_some_and(|info| info.deleted)
    };
    let stale: BTreeSet<SegmentName> = sizes
        .iter()
        .filter(|(_, name)| {
            index
                .segment(name)
                .is_some_and(|part| part.packs().iter().any(|row| gone(&row.name)))
        })
        .map(|(_, name)| *name)
        .collect();
    let unlisted = customer.with_state(|state| {
        state
            .condemned
            .keys()
            .any(|name| state.may_forget(name) && index.number_of(name).is_none())
    });
    let taken = choose(&sizes, &stale);
    if taken.is_empty() && !unlisted {
        return Ok(false);
    }
    let begun = customer.begin(Purpose::Merge, None)?;
    // The index may be older than the begin; what it takes for current is asked by the entry.
    let deleted: BTreeSet<PackName> = customer.with_state(|state| {
        let deleted = state.condemned.iter().filter(|(_, row)| row.deleted);
        deleted.map(|(name, _)| *name).collect()
    });
    let merged = (|| {
        let mut table = Table::default();
        let mut kept_elsewhere = BTreeSet::new();
        for (_, name) in &sizes {
            let Some(part) = index.segment(name) else {
                continue;
            };
            match taken.contains(name) {
                true => table.take(part, &deleted),
                false => kept_elsewhere.extend(part.packs().iter().map(|row| row.name)),
            }
        }
        let mut segments = Vec::new();
        if !table.rows.is_empty() {
            let bytes = segment::build(
                &begun.id,
                &crate::codec::random_bytes(),
                &table.rows,
                &mut table.records,
            );
            let name = SegmentName {
                session: begun.id,
                hash: ObjectHash::from_bytes(*blake3::hash(&bytes).as_bytes()),
            };
            let object = customer.names().segment(&name);
            upload(&**customer.storage(), &object, &bytes)?;
            segments.push(name);
        }
        customer.append(|state| {
            if !taken.iter().all(|name| state.segments.contains_key(name)) {
                return Err(RepositoryError::new(
                    RepositoryErrorKind::Superseded,
                    begun.id,
                    "another merge replaced these segments",
                ));
            }
            // A segment born meanwhile may list what this one leaves out: then nothing is
            // forgotten yet, and the next merge does it.
            let all_known = state
                .segments
                .keys()
                .all(|segment| sizes.iter().any(|(_, known)| known == segment));
            let dropped = match all_known {
                true => deleted.difference(&kept_elsewhere).copied().collect(),
                false => Vec::new(),
            };
            Ok(Body::Merge(MergeBody {
                session: begun.id,
                segments: segments.clone(),
                replaced: taken.iter().copied().collect(),
                // A rescue may have condemned it again, and a session older than its end keeps it.
                dropped: dropped
                    .into_iter()
                    .filter(|pack| state.may_forget(pack))
                    .take(MAX_DROPPED)
                    .collect(),
            }))
        })
    })();
    match merged {
        Ok(_) => {
            for name in &taken {
                customer.storage().delete(&customer.names().segment(name))?;
            }
            Ok(true)
        }
        Err(error) if error.kind == RepositoryErrorKind::Uncertain => Err(error),
        Err(error) => {
            let aborted = customer.abort(&begun.id, "the merge failed");
            match error.kind {
                RepositoryErrorKind::Superseded => aborted.or_else(not_open).map(|()| false),
                // The merge's own failure is what the caller must hear of.
                _ => Err(error),
            }
        }
    }
}

/// Names in one entry: its body stays below 1 MiB.
const MAX_DROPPED: usize = 4000;

/// The session was ended by somebody else already.
fn not_open(error: RepositoryError) -> Result<(), RepositoryError> {
    match error.kind {
        RepositoryErrorKind::Superseded => Ok(()),
        _ => Err(error),
    }
}

/// Those that list deleted packs; and when there are many segments, all small ones, and a larger one
/// only while the ones before it add up to a quarter of it: each record moves a logarithmic number
/// of times.
fn choose(sizes: &[(usize, SegmentName)], stale: &BTreeSet<SegmentName>) -> BTreeSet<SegmentName> {
    let mut taken = BTreeSet::new();
    let mut sum = 0usize;
    for (len, name) in sizes.iter().filter(|(_, name)| stale.contains(name)) {
        if sum + len > MAX_RECORDS && !taken.is_empty() {
            break;
        }
        sum += len;
        taken.insert(*name);
    }
    if sizes.len() < MERGE_AT_SEGMENTS {
        return taken;
    }
    let forgetting = !taken.is_empty();
    for (len, name) in sizes.iter().filter(|(_, name)| !stale.contains(name)) {
        let enough = taken.len() >= 2 && sum * 4 < *len;
        if enough || sum + len > MAX_RECORDS {
            break;
        }
        sum += len;
        taken.insert(*name);
    }
    match taken.len() >= 2 || forgetting {
        true => taken,
        false => BTreeSet::new(),
    }
}

/// A segment being put together.
#[derive(Default)]
struct Table {
    rows: Vec<PackRow>,
    numbers: BTreeMap<PackName, u32>,
    records: Vec<Record>,
}

impl Table {
    fn take(&mut self, part: &segment::Segment, deleted: &BTreeSet<PackName>) {
        // Packs first: one without a record is adopted all the same.
        for row in part
            .packs()
            .iter()
            .filter(|row| !deleted.contains(&row.name))
        {
            let next = self.rows.len() as u32;
            self.numbers.entry(row.name).or_insert_with(|| {
                self.rows.push(*row);
                next
            });
        }
        for at in 0..part.len() {
            let record = part.record(at);
            let row = part.packs().get(record.pack as usize);
            if let Some(pack) = row.and_then(|row| self.numbers.get(&row.name)) {
                self.records.push(Record {
                    pack: *pack,
                    ..record
                });
            }
        }
    }
}
