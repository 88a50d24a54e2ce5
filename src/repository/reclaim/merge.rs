//! Joining index segments.

use super::super::customer::Customer;
use super::super::index::{Index, PackNumber};
use super::super::new_segments::NewSegments;
use super::super::{RepositoryError, RepositoryErrorKind};
use crate::format::entry::{Body, MergeBody, Purpose};
use crate::format::segment::{PackRow, Record};
use crate::model::{PackName, SegmentName, SessionId, Tag};
use crate::storage::gone_or_locked;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};
use std::iter::Peekable;

/// A lookup may have to ask one segment of each run.
const MERGE_AT_RUNS: usize = 12;

/// The segments that one session wrote, each of another range of tags.
#[derive(Default)]
struct Run {
    records: usize,
    segments: Vec<SegmentName>,
    /// It lists a pack that is deleted.
    stale: bool,
}

/// Forgets the packs that are known to be deleted, and joins small runs of index segments into one,
/// so that a lookup asks few of them. Places of packs that are only condemned stay.
///
/// A tag lets a holder of the customer key test a guess at its content, so the tags of what was
/// destroyed leave with its bytes, in the same prune, and no later merge is waited for.
///
/// Memory: one new segment, and some hundred kilobytes for each old one.
///
/// `false`: there was nothing to do, or another merge was faster.
pub fn merge_segments(customer: &Customer) -> Result<bool, RepositoryError> {
    let index = customer.load_index()?;
    let runs = runs_of(&index);
    let known: BTreeSet<SegmentName> = index.segment_names().map(|(name, _)| *name).collect();
    let unlisted = customer.with_state(|state| {
        state
            .condemned
            .keys()
            .any(|name| state.may_forget(name) && index.number_of(name).is_none())
    });
    let chosen = choose(&runs);
    if chosen.is_empty() && !unlisted {
        return Ok(false);
    }
    let taken: BTreeSet<SegmentName> = chosen
        .iter()
        .flat_map(|run| &run.segments)
        .copied()
        .collect();
    let begun = customer.begin(Purpose::Merge, None)?;
    // The index may be older than the begin; what it takes for current is asked by the entry.
    let deleted: BTreeSet<PackName> = customer.with_state(|state| {
        let deleted = state.condemned.iter().filter(|(_, row)| row.deleted);
        deleted.map(|(name, _)| *name).collect()
    });
    let merged = (|| {
        let kept_elsewhere: BTreeSet<PackName> = known
            .difference(&taken)
            .flat_map(|name| index.packs_listed_by(name))
            .map(|(_, info)| info.row.name)
            .collect();
        let segments = join(customer, &index, begun.id, &chosen, &deleted)?;
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
            let all_known = state.segments.keys().all(|segment| known.contains(segment));
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
            let names = taken.iter().map(|name| customer.names().segment(name));
            for deleted in customer.storage().delete_all(&names.collect::<Vec<_>>()) {
                gone_or_locked(deleted)?;
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

/// The smallest first.
fn runs_of(index: &Index) -> Vec<Run> {
    let mut runs: BTreeMap<SessionId, Run> = BTreeMap::new();
    for (name, records) in index.segment_names() {
        let run = runs.entry(name.session).or_default();
        run.records += records;
        run.stale = run.stale || index.packs_listed_by(name).any(|(_, info)| info.deleted);
        run.segments.push(*name);
    }
    let mut runs: Vec<Run> = runs.into_values().collect();
    runs.sort_by_key(|run| run.records);
    runs
}

/// Those that list deleted packs; and when there are many runs, all small ones, and a larger one
/// only while the ones before it add up to a quarter of it: each record moves a logarithmic number
/// of times.
fn choose(runs: &[Run]) -> Vec<&Run> {
    let (stale, fresh): (Vec<&Run>, Vec<&Run>) = runs.iter().partition(|run| run.stale);
    let mut chosen = stale;
    if runs.len() < MERGE_AT_RUNS {
        return chosen;
    }
    let mut sum: usize = chosen.iter().map(|run| run.records).sum();
    for run in fresh {
        if chosen.len() >= 2 && sum * 4 < run.records {
            break;
        }
        sum += run.records;
        chosen.push(run);
    }
    chosen
}

/// Writes the records of several runs as one, without those of deleted packs.
fn join(
    customer: &Customer,
    index: &Index,
    session: SessionId,
    runs: &[&Run],
    deleted: &BTreeSet<PackName>,
) -> Result<Vec<SegmentName>, RepositoryError> {
    // One without a record is adopted all the same.
    let mut rows: Vec<PackRow> = Vec::new();
    let mut numbers: HashMap<PackNumber, u32> = HashMap::new();
    for (number, info) in runs
        .iter()
        .flat_map(|run| &run.segments)
        .flat_map(|name| index.packs_listed_by(name))
        .filter(|(_, info)| !deleted.contains(&info.row.name))
    {
        numbers.entry(number).or_insert_with(|| {
            rows.push(info.row);
            rows.len() as u32 - 1
        });
    }
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let most = runs.iter().map(|run| run.records).sum();
    let mut new = NewSegments::new(customer, session, &rows, most);
    let mut sources: Vec<_> = runs
        .iter()
        .flat_map(|run| &run.segments)
        .map(|name| index.records_of_segment(name).peekable())
        .collect();
    // The next tag of each segment. Records of one tag are put in order when all of them are there:
    // the packs have other numbers now.
    let mut next = BinaryHeap::new();
    for (source, records) in sources.iter_mut().enumerate() {
        next.extend(next_tag(records)?.map(|tag| Reverse((tag, source))));
    }
    let mut same: Vec<Record> = Vec::new();
    while let Some(Reverse((tag, source))) = next.pop() {
        if same.first().is_some_and(|first| first.tag != tag) {
            push_all(&mut new, &mut same)?;
        }
        let Some(records) = sources.get_mut(source) else {
            continue;
        };
        while next_tag(records)? == Some(tag) {
            if let Some((number, record)) = records.next().transpose()?
                && let Some(pack) = numbers.get(&number)
            {
                same.push(Record {
                    pack: *pack,
                    ..record
                });
            }
        }
        next.extend(next_tag(records)?.map(|tag| Reverse((tag, source))));
    }
    push_all(&mut new, &mut same)?;
    let (segments, _) = new.finish()?;
    Ok(segments)
}

fn push_all(new: &mut NewSegments<'_>, same: &mut Vec<Record>) -> Result<(), RepositoryError> {
    same.sort_unstable();
    same.dedup();
    same.drain(..).try_for_each(|record| new.push(record))
}

fn next_tag<I>(records: &mut Peekable<I>) -> Result<Option<Tag>, RepositoryError>
where
    I: Iterator<Item = Result<(PackNumber, Record), RepositoryError>>,
{
    match records.peek() {
        None => Ok(None),
        Some(Ok((_, record))) => Ok(Some(record.tag)),
        Some(Err(error)) => Err(error.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many records each chosen run has, of so many fresh runs and stale ones.
    fn chosen(fresh: &[usize], stale: &[usize]) -> Vec<usize> {
        let run = |stale| {
            move |records: &usize| Run {
                records: *records,
                stale,
                segments: Vec::new(),
            }
        };
        let fresh = fresh.iter().map(run(false));
        let runs: Vec<Run> = fresh.chain(stale.iter().map(run(true))).collect();
        choose(&runs).iter().map(|run| run.records).collect()
    }

    #[test]
    fn runs_that_list_what_is_deleted_are_joined_at_once_and_others_when_there_are_many() {
        assert!(chosen(&[1; 11], &[]).is_empty());
        assert_eq!(chosen(&[1; 12], &[]), [1; 12]);
        assert_eq!(chosen(&[1; 10], &[7]), [7]);
        assert_eq!(chosen(&[1; 11], &[7])[..2], [7, 1]);
    }

    #[test]
    fn a_run_is_joined_by_a_larger_one_while_it_is_a_quarter_of_it() {
        let mut fresh = [1000; 12];
        fresh[..4].copy_from_slice(&[1, 1, 8, 41]);
        assert_eq!(chosen(&fresh, &[]), [1, 1, 8]);
        fresh[3] = 40;
        assert_eq!(chosen(&fresh, &[]), [1, 1, 8, 40]);
        // Two are always joined, however different they are.
        assert_eq!(chosen(&[1000; 11], &[1]).len(), 12);
    }
}
