//! Reading packs in full, without a key: the checksums of every frame.

use super::RepositoryError;
use super::customer::Customer;
use super::index::PackNumber;
use super::sealed::SealedCustomer;
use crate::format::entry::{Body, DamagedFrame, VerifyBody, VerifyMethod};
use crate::format::pack::{self, MAX_PACK_BYTES};
use crate::model::{ObjectHash, PackName, Tag};
use crate::storage::StorageErrorKind;
use std::collections::{BTreeSet, HashSet};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

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
    pub read_bytes: u64,
}

/// Names in one `verify` entry: its body stays far below 1 MiB.
const NAMES_IN_ENTRY: usize = 4000;

/// Reads `packs` with `threads` threads. `progress` hears of the bytes of each pack.
pub fn scrub_packs(
    customer: &SealedCustomer,
    packs: &[PackName],
    threads: usize,
    stop: &AtomicBool,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Scrubbed, RepositoryError> {
    let next = AtomicUsize::new(0);
    let result = Mutex::new(Scrubbed::default());
    let failed: Mutex<Option<RepositoryError>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let Some(name) = packs.get(next.fetch_add(1, Ordering::Relaxed)) else {
                        return;
                    };
                    match scrub_one(customer, name) {
                        Ok(one) => {
                            progress(one.read_bytes);
                            let mut all = result.lock().unwrap_or_else(PoisonError::into_inner);
                            all.whole.extend(one.whole);
                            all.damaged.extend(one.damaged);
                            all.broken.extend(one.broken);
                            all.missing.extend(one.missing);
                            all.read_bytes += one.read_bytes;
                        }
                        Err(error) => {
                            *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                            return;
                        }
                    }
                }
            });
        }
    });
    if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let mut result = result.into_inner().unwrap_or_else(PoisonError::into_inner);
    frames_of_broken(customer, &mut result, stop)?;
    result.whole.sort_unstable();
    result.damaged.sort_unstable();
    result.broken.sort_unstable();
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
        if is_lost || !customer.frame_is_whole(&name, &place, &tag)? {
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
