//! Ledger, index, trees, and, if asked, every stored byte.

use super::{JobError, Watch};
use crate::format::entry::VerifyMethod;
use crate::model::{PackName, PointState, Tag};
use crate::repository::reclaim::mark_now;
use crate::repository::{Customer, Index, Unreachable, open_live, scrub_packs};
use crate::storage::{Listed, StorageErrorKind};
use jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifyRequest {
    /// Walk every tree down to the tags of its chunks.
    pub trees: bool,
    /// Read this share of the packs, those longest unread first; 100 with `trees`: open every live
    /// frame with the key.
    pub read_percent: Option<u8>,
    /// Only packs that were not read since then (the nightly share).
    pub unread_since: Option<Timestamp>,
    pub threads: usize,
}

/// What was looked at and what is wrong.
#[derive(Debug, Clone, Default)]
pub struct Verified {
    pub entries: u64,
    pub points: usize,
    pub packs: usize,
    pub packs_read: usize,
    pub read_bytes: u64,
    /// Everything that is wrong, a sentence each, with the restore points concerned.
    pub damage: Vec<String>,
    /// What is odd and harms nothing.
    pub notes: Vec<String>,
}

/// Verifies one customer. The ledger's chain and signatures were checked when it was opened.
pub fn verify(
    customer: &Customer,
    request: VerifyRequest,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<Verified, JobError> {
    let mut verified = Verified::default();
    // Listed before the ledger is read: what the ledger then names and the list lacks, and is
    // still not there when asked for by name, is missing.
    let listed = customer.storage().list(customer.names().prefix())?;
    let (index, state) = customer.index_and_state()?;
    verified.entries = state.seq;
    verified.points = state.roots().count();
    for (seq, reason) in &state.voids {
        verified
            .notes
            .push(format!("ledger entry {seq} is void: {reason}"));
    }
    if let Some((seq, what)) = &state.unknown {
        verified.notes.push(format!(
            "ledger entry {seq} is of a later version of vmkeep ({what})"
        ));
    }
    verified.packs = check_packs(customer, &index, &listed, &mut verified.damage)?;

    if request.trees && request.read_percent != Some(100) {
        watch.stage(&format!("{} trees", customer.name()), 0);
        check_trees(customer, &mut verified.damage)?;
    }
    if stop.load(Ordering::Relaxed) {
        return Err(JobError::interrupted());
    }
    match request.read_percent {
        None => {}
        // All of it: what is live is opened with the key, which finds what checksums find and more.
        Some(100) if request.trees => {
            open_everything(customer, request, &mut verified, watch, stop)?;
        }
        Some(percent) => {
            read_packs(
                customer,
                &index,
                percent,
                request,
                &mut verified,
                watch,
                stop,
            )?;
        }
    }
    Ok(verified)
}

fn open_everything(
    customer: &Customer,
    request: VerifyRequest,
    verified: &mut Verified,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<(), JobError> {
    watch.stage(&format!("{} data", customer.name()), 0);
    let known = Known::of(customer)?;
    let opened = open_live(customer, request.threads, stop, &|bytes| {
        watch.advance(bytes)
    })?;
    if stop.load(Ordering::Relaxed) {
        return Err(JobError::interrupted());
    }
    verified.packs_read = opened.whole.len();
    verified.read_bytes = opened.bytes;
    let told: HashSet<(PackName, Tag)> = opened.damaged.iter().copied().collect();
    for (pack, tag) in &opened.damaged {
        let what = format!(
            "{} (tag {tag}): a frame does not open",
            customer.names().pack(pack)
        );
        known.tell(pack, tag, what, verified)?;
    }
    tell_unreadable(customer, &opened.unreadable, &mut verified.damage);
    // What nothing reaches, and what is below a node that does not open: by its checksum, or a
    // later backup would rely on it.
    let whole: HashSet<PackName> = opened.whole.iter().copied().collect();
    let rest: Vec<(PackName, u64)> = customer
        .load_index()?
        .packs()
        .iter()
        .filter(|info| !info.condemned && !whole.contains(&info.row.name))
        .map(|info| (info.row.name, info.row.size_bytes))
        .collect();
    read_each(customer, &rest, &told, request, verified, watch, stop)?;
    if !(opened.whole.is_empty() && opened.damaged.is_empty()) {
        customer.note_verification(VerifyMethod::Opened, &opened.whole, &opened.damaged)?;
    }
    Ok(())
}

/// Every node of every point must open, and every chunk must have a place.
fn check_trees(customer: &Customer, damage: &mut Vec<String>) -> Result<(), JobError> {
    let mark = mark_now(customer, true)?;
    tell_unreadable(customer, &mark.damage, damage);
    Ok(())
}

/// What was known to be damaged before this verification, and where its content stands by now.
struct Known {
    damaged: BTreeSet<(PackName, Tag)>,
    index: Arc<Index>,
}

impl Known {
    fn of(customer: &Customer) -> Result<Self, JobError> {
        let (index, state) = customer.index_and_state()?;
        Ok(Known {
            damaged: state.damaged,
            index,
        })
    }

    /// Tells of a damaged frame. One that was known before and whose content stands elsewhere by
    /// now harms nobody: its pack loses it when it is rewritten.
    fn tell(
        &self,
        pack: &PackName,
        tag: &Tag,
        what: String,
        verified: &mut Verified,
    ) -> Result<(), JobError> {
        let healed =
            self.damaged.contains(&(*pack, *tag)) && !self.index.sound_places(tag)?.is_empty();
        match healed {
            true => verified
                .notes
                .push(format!("{what}; known, and healed by a later backup")),
            false => verified.damage.push(what),
        }
        Ok(())
    }
}

/// What cannot be read, with the restore point that needs it.
fn tell_unreadable(customer: &Customer, unreadable: &[Unreachable], damage: &mut Vec<String>) {
    for found in unreadable {
        let what = customer.with_state(|state| {
            state.points.get(&found.point).map(|point| {
                let expired = match point.state {
                    PointState::Expired => " (expired)",
                    _ => "",
                };
                format!("{} of {}{expired}", point.vm, point.taken_at)
            })
        });
        damage.push(format!(
            "restore point {} ({}): {}",
            found.point,
            what.unwrap_or_default(),
            found.error
        ));
    }
}

/// Every uncondemned pack of the index must be there, in its size.
fn check_packs(
    customer: &Customer,
    index: &Index,
    listed: &[Listed],
    damage: &mut Vec<String>,
) -> Result<usize, JobError> {
    let sizes: BTreeMap<&str, u64> = listed
        .iter()
        .map(|object| (object.name.as_str(), object.size_bytes))
        .collect();
    let mut packs = 0;
    for info in index.packs().iter().filter(|info| !info.condemned) {
        packs += 1;
        let name = customer.names().pack(&info.row.name);
        let size = match sizes.get(name.as_str()) {
            Some(size) => Some(*size),
            None => match customer.storage().size_bytes(&name) {
                Ok(size) => Some(size),
                Err(error) if error.kind == StorageErrorKind::NotFound => None,
                Err(error) => return Err(error.into()),
            },
        };
        match size {
            Some(size) if size == info.row.size_bytes => {}
            Some(size) => damage.push(format!(
                "{name}: has {size} bytes instead of {}",
                info.row.size_bytes
            )),
            None => {
                // Another prune may have condemned and deleted it since.
                customer.refresh()?;
                if !customer.with_state(|state| state.is_condemned(&info.row.name)) {
                    damage.push(format!("{name}: is missing"));
                }
            }
        }
    }
    Ok(packs)
}

fn read_packs(
    customer: &Customer,
    index: &Index,
    percent: u8,
    request: VerifyRequest,
    verified: &mut Verified,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<(), JobError> {
    let mut packs: Vec<(Option<Timestamp>, PackName, u64)> = customer.with_state(|state| {
        index
            .packs()
            .iter()
            .filter(|info| !info.condemned)
            .map(|info| {
                let read_at = state.verified_at(&info.row.name);
                (read_at, info.row.name, info.row.size_bytes)
            })
            .collect()
    });
    packs.sort_unstable();
    let share = (packs.len() * usize::from(percent)).div_ceil(100);
    packs.truncate(share);
    if let Some(since) = request.unread_since {
        packs.retain(|(read_at, ..)| read_at.is_none_or(|read_at| read_at < since));
    }
    let packs: Vec<(PackName, u64)> = packs
        .into_iter()
        .map(|(_, name, size)| (name, size))
        .collect();
    read_each(
        customer,
        &packs,
        &HashSet::new(),
        request,
        verified,
        watch,
        stop,
    )
}

/// Reads packs in full and checks every frame by its checksum. `told`: frames that were found to be
/// damaged, and told of, before.
fn read_each(
    customer: &Customer,
    packs: &[(PackName, u64)],
    told: &HashSet<(PackName, Tag)>,
    request: VerifyRequest,
    verified: &mut Verified,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<(), JobError> {
    if packs.is_empty() {
        return Ok(());
    }
    let total = packs.iter().map(|(_, size)| size).sum();
    watch.stage(&format!("{} read", customer.name()), total);
    let names: Vec<PackName> = packs.iter().map(|(name, _)| *name).collect();
    let known = Known::of(customer)?;
    let scrubbed = scrub_packs(customer, &names, request.threads, stop, &|bytes| {
        watch.advance(bytes);
    })?;
    verified.packs_read += scrubbed.whole.len() + scrubbed.broken.len();
    verified.read_bytes += scrubbed.read_bytes;
    for (pack, tag) in scrubbed
        .damaged
        .iter()
        .filter(|frame| !told.contains(*frame))
    {
        let what = format!(
            "{} (tag {tag}): a frame does not match its checksum",
            customer.names().pack(pack)
        );
        known.tell(pack, tag, what, verified)?;
    }
    for (pack, reason) in &scrubbed.broken {
        verified
            .damage
            .push(format!("{}: {reason}", customer.names().pack(pack)));
    }
    if !(scrubbed.whole.is_empty() && scrubbed.damaged.is_empty()) {
        customer.note_verification(VerifyMethod::Checksum, &scrubbed.whole, &scrubbed.damaged)?;
    }
    match stop.load(Ordering::Relaxed) {
        true => Err(JobError::interrupted()),
        false => Ok(()),
    }
}
