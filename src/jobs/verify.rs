//! Ledger, index, trees, and, if asked, every stored byte.

use super::{JobError, Watch};
use crate::format::entry::VerifyMethod;
use crate::model::{PackName, PointId, PointState, Tag};
use crate::repository::reclaim::mark_now;
use crate::repository::{
    Customer, Index, RepositoryErrorKind, Scrubbed, SealedCustomer, State, Unreachable, open_live,
    scrub_packs,
};
use crate::storage::{Listed, StorageErrorKind};
use jiff::Timestamp;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

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

/// Verifies one customer. The ledger's chain and signatures were checked when it was opened; with
/// `trees`, those entries too that a checkpoint of this host stood for.
pub fn verify(
    customer: &Customer,
    request: VerifyRequest,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<Verified, JobError> {
    if request.trees {
        customer.check_ledger()?;
    }
    let (mut verified, index) = check_objects(customer)?;
    if request.trees && request.read_percent != Some(100) {
        watch.stage(&format!("{} trees", customer.name()), 0);
        check_trees(customer, &mut verified.damage)?;
    }
    JobError::unless_stopped(stop)?;
    match request.read_percent {
        None => {}
        // All of it: what is live is opened with the key, which finds what checksums find and more.
        Some(100) if request.trees => {
            open_everything(customer, request, &mut verified, watch, stop)?;
        }
        Some(percent) => {
            let packs = share_of(customer, &index, percent, request.unread_since);
            let scrubbed = read_each(
                customer,
                &packs,
                &HashSet::new(),
                request.threads,
                &mut verified,
                watch,
                stop,
            )?;
            note(customer, &scrubbed)?;
            JobError::unless_stopped(stop)?;
        }
    }
    Ok(verified)
}

/// Verifies one customer without its key, and writes nothing: the ledger, the index, that every
/// object stands as the ledger names it, and, if asked, the checksums of this share of the packs.
pub fn verify_sealed(
    customer: &SealedCustomer,
    read_percent: Option<u8>,
    threads: usize,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<Verified, JobError> {
    customer.check_ledger()?;
    let (mut verified, index) = check_objects(customer)?;
    check_records(customer, &mut verified.damage)?;
    if let Some(percent) = read_percent {
        let packs = share_of(customer, &index, percent, None);
        read_each(
            customer,
            &packs,
            &HashSet::new(),
            threads,
            &mut verified,
            watch,
            stop,
        )?;
    }
    JobError::unless_stopped(stop)?;
    Ok(verified)
}

/// What is checked with a key and without.
fn check_objects(customer: &SealedCustomer) -> Result<(Verified, Arc<Index>), JobError> {
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
    check_segments(customer, &state, &listed, &mut verified.damage)?;
    check_key_files(customer, &state, &mut verified)?;
    Ok((verified, index))
}

/// Every key file that the ledger names must be there, or a later one for the same recipients:
/// somebody may have no other way in.
fn check_key_files(
    customer: &SealedCustomer,
    state: &State,
    verified: &mut Verified,
) -> Result<(), JobError> {
    let mut served: HashSet<&str> = HashSet::new();
    for row in state.keys.iter().rev() {
        match customer.sealed_key(row) {
            Ok(_) => served.extend(row.recipients.iter().map(String::as_str)),
            Err(error) if error.is_damage() => {
                let lost = row.recipients.iter();
                match lost.filter(|one| !served.contains(one.as_str())).count() {
                    0 => verified
                        .notes
                        .push(format!("{error}; a later one serves the same recipients")),
                    lost => verified.damage.push(format!(
                        "{error}: {lost} of its recipients have no other one \
                         (vmkeep init makes one for those of the configuration)"
                    )),
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The record of every point that is live or expired must be the one that the ledger names.
fn check_records(customer: &SealedCustomer, damage: &mut Vec<String>) -> Result<(), JobError> {
    let points: Vec<PointId> =
        customer.with_state(|state| state.roots().map(|(id, _)| *id).collect());
    for point in points {
        match customer.sealed_record(&point) {
            Ok(_) => {}
            // Erased, as the ledger says by now.
            Err(error) if error.kind == RepositoryErrorKind::NotFound => {}
            Err(error) if error.is_damage() => {
                // Erased meanwhile, or damage.
                customer.refresh()?;
                if customer.with_state(|state| state.roots().any(|(id, _)| *id == point)) {
                    tell_unreadable(customer, &[Unreachable { point, error }], damage);
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
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
    JobError::unless_stopped(stop)?;
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
    let scrubbed = read_each(
        customer,
        &rest,
        &told,
        request.threads,
        verified,
        watch,
        stop,
    )?;
    note(customer, &scrubbed)?;
    JobError::unless_stopped(stop)?;
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
    index: Arc<Index>,
    state: Arc<State>,
}

impl Known {
    fn of(customer: &SealedCustomer) -> Result<Self, JobError> {
        let (index, state) = customer.index_and_state()?;
        Ok(Known { index, state })
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
        let known = self.state.damaged.contains(&(*pack, *tag));
        let healed = known && !self.index.sound_places(tag)?.is_empty();
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
pub(super) fn tell_unreadable(
    customer: &SealedCustomer,
    unreadable: &[Unreachable],
    damage: &mut Vec<String>,
) {
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
    customer: &SealedCustomer,
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
                // Another prune may have condemned, deleted and forgotten it since.
                if customer.load_index()?.is_current(&info.row.name) {
                    damage.push(format!("{name}: is missing"));
                }
            }
        }
    }
    Ok(packs)
}

/// Every current segment must be there: an index that is read from this host's copies does not show that the
/// store has lost one.
fn check_segments(
    customer: &SealedCustomer,
    state: &State,
    listed: &[Listed],
    damage: &mut Vec<String>,
) -> Result<(), JobError> {
    let names: HashSet<&str> = listed.iter().map(|object| object.name.as_str()).collect();
    for segment in state.segments.keys() {
        let name = customer.names().segment(segment);
        if names.contains(name.as_str()) {
            continue;
        }
        match customer.storage().size_bytes(&name) {
            Ok(_) => continue,
            Err(error) if error.kind == StorageErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        // A merge may have replaced it since.
        customer.refresh()?;
        if customer.with_state(|state| state.segments.contains_key(segment)) {
            damage.push(format!("{name}: is missing"));
        }
    }
    Ok(())
}

/// A share of the packs, those longest unread first, with their sizes. What is known as damaged is never whole
/// again, and so never the one last read: in a night's share it comes after all others, or it would take their
/// place every night. Somebody who asks for a share is told of it.
fn share_of(
    customer: &SealedCustomer,
    index: &Index,
    percent: u8,
    unread_since: Option<Timestamp>,
) -> Vec<(PackName, u64)> {
    let mut packs: Vec<(bool, Option<Timestamp>, PackName, u64)> = customer.with_state(|state| {
        let damaged: HashSet<PackName> = state.damaged.iter().map(|(pack, _)| *pack).collect();
        index
            .packs()
            .iter()
            .filter(|info| !info.condemned)
            .map(|info| {
                let read_at = state.verified_at(&info.row.name);
                let is_damaged = unread_since.is_some() && damaged.contains(&info.row.name);
                (is_damaged, read_at, info.row.name, info.row.size_bytes)
            })
            .collect()
    });
    packs.sort_unstable();
    let share = (packs.len() * usize::from(percent)).div_ceil(100);
    // First: where few are due, those that are damaged have their turn.
    if let Some(since) = unread_since {
        packs.retain(|(_, read_at, ..)| read_at.is_none_or(|read_at| read_at < since));
    }
    packs.truncate(share);
    packs
        .into_iter()
        .map(|(_, _, name, size)| (name, size))
        .collect()
}

/// Reads packs in full and checks every frame by its checksum. `told`: frames that were found to be
/// damaged, and told of, before. Interrupted, it returns what it has.
fn read_each(
    customer: &SealedCustomer,
    packs: &[(PackName, u64)],
    told: &HashSet<(PackName, Tag)>,
    threads: usize,
    verified: &mut Verified,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<Scrubbed, JobError> {
    if packs.is_empty() {
        return Ok(Scrubbed::default());
    }
    let total = packs.iter().map(|(_, size)| size).sum();
    watch.stage(&format!("{} read", customer.name()), total);
    let names: Vec<PackName> = packs.iter().map(|(name, _)| *name).collect();
    let known = Known::of(customer)?;
    let scrubbed = scrub_packs(customer, &names, threads, stop, &|bytes| {
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
    Ok(scrubbed)
}

/// What was read and found damaged goes into the ledger.
fn note(customer: &Customer, scrubbed: &Scrubbed) -> Result<(), JobError> {
    if !(scrubbed.whole.is_empty() && scrubbed.damaged.is_empty()) {
        customer.note_verification(VerifyMethod::Checksum, &scrubbed.whole, &scrubbed.damaged)?;
    }
    Ok(())
}
