//! Reading packs in full, without a key: the checksums of every frame.

use super::customer::Customer;
use super::index::PackNumber;
use super::sealed::SealedCustomer;
use super::{RepositoryError, RepositoryErrorKind};
use crate::format::entry::{Body, DamagedFrame, VerifyBody, VerifyMethod};
use crate::format::pack::{self, MAX_PACK_BYTES};
use crate::model::{ObjectHash, PackName, Tag};
use crate::storage::StorageErrorKind;
use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What reading packs showed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// Every byte is as it was written.
    pub whole: Vec<PackName>,
    /// Frames that do not match their checksum, and frames of broken packs that cannot be read.
    pub damaged: Vec<(PackName, Tag)>,
    /// Packs that cannot be read as packs at all, and why.
    pub broken: Vec<(PackName, String)>,
    /// Of those, what is not there.
    pub missing: BTreeSet<PackName>,
    /// Packs that cannot be read now, and why: they may be whole.
    pub unread: Vec<(PackName, String)>,
    /// Why not all of them were read, where something was found before that.
    pub failure: Option<RepositoryError>,
    pub read_bytes: u64,
}

/// Names in one `verify` entry: its body stays far below 1 MiB.
const NAMES_IN_ENTRY: usize = 4000;

/// A disk has a bad place here and there. A store that fails over and over is lost for now, and each failure takes
/// its time.
const UNREAD_IN_A_ROW: usize = 8;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads `packs` with `threads` threads. `progress` hears of the bytes of each pack. An error: nothing was found.
pub fn scrub_packs(
    customer: &SealedCustomer,
    packs: &[PackName],
    threads: usize,
    stop: &AtomicBool,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Scrubbed, RepositoryError> {
    let next = AtomicUsize::new(0);
    let result = Mutex::new(Scrubbed::default());
    let unread_in_a_row = AtomicUsize::new(0);
    // A store that does not answer is waited for once and not once a pack.
    let goes_on = || !stop.load(Ordering::Relaxed) && lock(&result).failure.is_none();
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                while goes_on() {
                    let Some(name) = packs.get(next.fetch_add(1, Ordering::Relaxed)) else {
                        return;
                    };
                    match scrub_one(customer, name) {
                        Ok(one) => {
                            progress(one.read_bytes);
                            let row = match one.unread.first() {
                                None => {
                                    unread_in_a_row.store(0, Ordering::Relaxed);
                                    0
                                }
                                Some(_) => unread_in_a_row.fetch_add(1, Ordering::Relaxed),
                            };
                            let mut all = lock(&result);
                            if let Some((name, error)) = one.unread.first()
                                && row >= UNREAD_IN_A_ROW
                            {
                                let kind = StorageErrorKind::Unreadable;
                                let kind = RepositoryErrorKind::Storage(kind);
                                let error = RepositoryError::new(kind, name, error);
                                all.failure.get_or_insert(error);
                            }
                            all.whole.extend(one.whole);
                            all.damaged.extend(one.damaged);
                            all.broken.extend(one.broken);
                            all.missing.extend(one.missing);
                            all.unread.extend(one.unread);
                            all.read_bytes += one.read_bytes;
                        }
                        Err(error) => {
                            lock(&result).failure.get_or_insert(error);
                        }
                    }
                }
            });
        }
    });
    let mut result = result.into_inner().unwrap_or_else(PoisonError::into_inner);
    let failure = match result.failure.take() {
        None => frames_of_broken(customer, &mut result, stop).err(),
        failure => failure,
    };
    if let Some(error) = failure {
        if result == Scrubbed::default() {
            return Err(error);
        }
        result.failure = Some(error);
    }
    result.whole.sort_unstable();
    result.damaged.sort_unstable();
    result.broken.sort_unstable();
    result.unread.sort_unstable();
    result.unread.dedup_by_key(|(name, _)| *name);
    Ok(result)
}

/// What the index says of packs that are missing or not packs any more: each of its frames that is
/// not whole where the index says is damaged, or an incremental would go on relying on it. Of a missing pack
/// none is asked for. Interrupted, it leaves the others to the next one who reads.
fn frames_of_broken(
    customer: &SealedCustomer,
    result: &mut Scrubbed,
    stop: &AtomicBool,
) -> Result<(), RepositoryError> {
    if result.broken.is_empty() {
        return Ok(());
    }
    let index = customer.load_index()?;
    let broken: HashSet<PackNumber> = result
        .broken
        .iter()
        .filter_map(|(name, _)| index.number_of(name))
        .collect();
    let mut frames = Vec::new();
    index.each_record(|_, tag, place| {
        if broken.contains(&place.pack) {
            frames.push((tag, place));
        }
    })?;
    for (tag, place) in frames {
        let Some(name) = index.pack(place.pack).map(|info| info.row.name) else {
            continue;
        };
        let is_lost = result.missing.contains(&name);
        if !is_lost && stop.load(Ordering::Relaxed) {
            continue;
        }
        let is_damaged = is_lost
            || match customer.frame_is_whole(&name, &place, &tag) {
                Err(error) if error.is_unread() => {
                    result.unread.push((name, error.to_string()));
                    false
                }
                whole => !whole?,
            };
        if is_damaged {
            result.damaged.push((name, tag));
        }
    }
    Ok(())
}

fn scrub_one(customer: &SealedCustomer, name: &PackName) -> Result<Scrubbed, RepositoryError> {
    let mut one = Scrubbed::default();
    let object = customer.names().pack(name);
    let bytes = match customer.storage().read(&object, MAX_PACK_BYTES) {
        Ok(bytes) => bytes,
        Err(error)
            if matches!(
                error.kind,
                StorageErrorKind::NotFound | StorageErrorKind::Corrupt
            ) =>
        {
            // Another host may have condemned, deleted and forgotten it: only then it is no damage.
            if customer.load_index()?.is_current(name) {
                one.broken.push((*name, error.to_string()));
                if error.kind == StorageErrorKind::NotFound {
                    one.missing.insert(*name);
                }
            }
            return Ok(one);
        }
        Err(error) if error.kind == StorageErrorKind::Unreadable => {
            one.unread.push((*name, error.to_string()));
            return Ok(one);
        }
        Err(error) => return Err(error.into()),
    };
    one.read_bytes = bytes.len() as u64;
    let hash = ObjectHash::from_bytes(*blake3::hash(&bytes).as_bytes());
    match pack::scrub(&bytes) {
        Ok((_, damaged)) if damaged.is_empty() && hash == name.hash => one.whole.push(*name),
        Ok((_, damaged)) if !damaged.is_empty() => {
            one.damaged
                .extend(damaged.into_iter().map(|tag| (*name, tag)));
        }
        Ok(_) => one.broken.push((
            *name,
            "its bytes are not those of its name, though every frame is whole".to_string(),
        )),
        Err(error) => one.broken.push((*name, error.to_string())),
    }
    Ok(one)
}

impl Customer {
    /// Notes in the ledger what was verified and what was found damaged, in as many entries as it
    /// takes. Damaged frames leave the index with it; of those that are known nothing is said again.
    pub fn note_verification(
        &self,
        method: VerifyMethod,
        packs: &[PackName],
        damaged: &[(PackName, Tag)],
    ) -> Result<(), RepositoryError> {
        // What was forgotten meanwhile would stay in the ledger's list of damage for ever.
        let damaged: Vec<(PackName, Tag)> = match damaged {
            [] => Vec::new(),
            damaged => {
                let index = self.load_index()?;
                let is_there = |(pack, _): &&(PackName, Tag)| index.number_of(pack).is_some();
                let there = damaged.iter().filter(is_there);
                self.with_state(|state| {
                    let is_news = |frame: &&(PackName, Tag)| !state.damaged.contains(*frame);
                    there.filter(is_news).copied().collect()
                })
            }
        };
        let mut packs = packs.chunks(NAMES_IN_ENTRY);
        let mut damaged = damaged.chunks(NAMES_IN_ENTRY);
        loop {
            let (packs, damaged) = (packs.next(), damaged.next());
            if packs.is_none() && damaged.is_none() {
                return Ok(());
            }
            self.append(|_| {
                Ok(Body::Verify(VerifyBody {
                    method,
                    packs: packs.unwrap_or_default().to_vec(),
                    damaged: damaged
                        .unwrap_or_default()
                        .iter()
                        .map(|(pack, tag)| DamagedFrame {
                            pack: *pack,
                            tag: *tag,
                        })
                        .collect(),
                }))
            })?;
        }
    }
}
