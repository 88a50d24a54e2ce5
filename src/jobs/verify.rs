//! Ledger, index, trees, and, if asked, every stored byte.

use super::{JobError, JobErrorKind, Watch};
use crate::format::certificate::MAX_CERTIFICATE_BYTES;
use crate::format::entry::VerifyMethod;
use crate::format::names::CustomerNames;
use crate::model::{ObjectHash, ObjectName, PackName, PointId, PointState, Tag};
use crate::repository::{
    Customer, Index, Mark, RepositoryError, RepositoryErrorKind, Scrubbed, SealedCustomer, State,
    Unreachable, open_live, scrub_packs,
};
use crate::storage::{Storage, StorageErrorKind};
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
    /// Of the damage, what the ledger and the index tell by themselves from then on, until it is healed.
    pub noted: Vec<String>,
    /// Deletion certificates that are lost or altered, a sentence each. No restore point needs one.
    pub certificates: Vec<String>,
    /// What could not be read now, a sentence each: it may be whole.
    pub unread: Vec<String>,
    /// What is odd and harms nothing.
    pub notes: Vec<String>,
    /// Why it broke off, or why what was found is not noted in the ledger. What was found until then is right.
    pub failure: Option<JobError>,
}

impl Verified {
    /// Why it does not vouch for everything that was to be looked at, whatever else it found.
    pub fn incomplete(&self) -> Option<JobError> {
        let unread = || {
            let message = match self.unread.as_slice() {
                [] => return None,
                [one] => one.clone(),
                [first, ..] => format!(
                    "{} things could not be read, such as {first}",
                    self.unread.len()
                ),
            };
            let kind = RepositoryErrorKind::Storage(StorageErrorKind::Unreadable);
            Some(JobError::new(JobErrorKind::Repository(kind), message))
        };
        self.failure.clone().or_else(unread)
    }

    /// What broke off is told with what was found before. Where nothing was, only that.
    fn ended(mut self, ended: Result<(), JobError>) -> Result<Self, JobError> {
        let found_nothing = self.damage.is_empty()
            && self.certificates.is_empty()
            && self.unread.is_empty()
            && self.packs_read == 0;
        match ended {
            Err(error) if found_nothing || error.kind == JobErrorKind::Interrupted => {
                return Err(error);
            }
            Err(error) => self.failure = self.failure.or(Some(error)),
            Ok(()) => {}
        }
        Ok(self)
    }

    /// Takes in why an object could not be looked at, unless that says something of others too.
    fn take_in(&mut self, error: RepositoryError) -> Result<(), JobError> {
        match (error.is_damage(), error.is_unread()) {
            (true, _) => self.damage.push(error.to_string()),
            (_, true) => self.unread.push(error.to_string()),
            _ => return Err(error.into()),
        }
        Ok(())
    }
}

/// Verifies one customer. The ledger's chain and signatures were checked when it was opened; with
/// `trees`, those entries too that a checkpoint of this host stood for.
pub fn verify(
    customer: &Customer,
    request: VerifyRequest,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<Verified, JobError> {
    let mut verified = Verified::default();
    check_ledger(customer, request.trees, &mut verified)?;
    let ended = look_through(customer, request, &mut verified, watch, stop);
    verified.ended(ended)
}

/// An entry that this host can do without, because it has read it before, is damage like any other.
fn check_ledger(
    customer: &SealedCustomer,
    from_genesis: bool,
    verified: &mut Verified,
) -> Result<(), JobError> {
    match customer.broken_entry() {
        Some(error) => verified.damage.push(format!(
            "{error}; this host goes by what it has read of it before: put the object back from a copy of \
             the store, and until then keep the state folder and this version of vmkeep, as no other can"
        )),
        None if from_genesis => {
            if let Err(error) = customer.check_ledger() {
                verified.take_in(error)?;
            }
        }
        None => {}
    }
    Ok(())
}

fn look_through(
    customer: &Customer,
    request: VerifyRequest,
    verified: &mut Verified,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<(), JobError> {
    let index = check_objects(customer, request.trees, verified)?;
    if request.trees && request.read_percent != Some(100) {
        watch.stage(&format!("{} trees", customer.name()), 0);
        check_trees(customer, verified)?;
    }
    JobError::unless_stopped(stop)?;
    match request.read_percent {
        None => Ok(()),
        // All of it: what is live is opened with the key, which finds what checksums find and more.
        Some(100) if request.trees => open_everything(customer, request, verified, watch, stop),
        Some(percent) => {
            let packs = share_of(customer, &index, percent, request.unread_since);
            let before = verified.damage.len();
            let scrubbed = read_each(
                customer,
                &packs,
                &HashSet::new(),
                request.threads,
                verified,
                watch,
                stop,
            )?;
            let (whole, damaged) = (&scrubbed.whole, &scrubbed.damaged);
            if note(customer, VerifyMethod::Checksum, whole, damaged, verified) {
                let found = verified.damage.iter().skip(before);
                verified.noted.extend(found.cloned());
            }
            JobError::unless_stopped(stop)
        }
    }
}

/// Verifies one customer without its key, and writes nothing in the store: the ledger, the index, that every
/// object stands as the ledger names it, and, if asked, the checksums of this share of the packs.
pub fn verify_sealed(
    customer: &SealedCustomer,
    read_percent: Option<u8>,
    threads: usize,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<Verified, JobError> {
    let mut verified = Verified::default();
    check_ledger(customer, true, &mut verified)?;
    let ended = look_through_sealed(customer, read_percent, threads, &mut verified, watch, stop);
    verified.ended(ended)
}

fn look_through_sealed(
    customer: &SealedCustomer,
    read_percent: Option<u8>,
    threads: usize,
    verified: &mut Verified,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<(), JobError> {
    let index = check_objects(customer, true, verified)?;
    check_records(customer, verified)?;
    if let Some(percent) = read_percent {
        let packs = share_of(customer, &index, percent, None);
        read_each(
            customer,
            &packs,
            &HashSet::new(),
            threads,
            verified,
            watch,
            stop,
        )?;
    }
    JobError::unless_stopped(stop)
}

/// What is checked with a key and without. Certificates, of which years make thousands, are read only for whoever
/// reads the whole ledger for it; every night it is seen whether they are there.
fn check_objects(
    customer: &SealedCustomer,
    reads_certificates: bool,
    verified: &mut Verified,
) -> Result<Arc<Index>, JobError> {
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
    // Of years of nights most objects are entries, of which nothing is asked here.
    let entries = format!("{}/", customer.names().ledger_prefix());
    let sizes: BTreeMap<&str, u64> = listed
        .iter()
        .map(|object| (object.name.as_str(), object.size_bytes))
        .filter(|(name, _)| !name.starts_with(&entries))
        .collect();
    check_packs(customer, &index, &sizes, verified)?;
    check_segments(customer, &state, &sizes, verified)?;
    check_key_files(customer, &state, verified)?;
    let is_seen = |name: &ObjectName| !reads_certificates && sizes.contains_key(name.as_str());
    let (storage, names) = (&**customer.storage(), customer.names());
    check_certificates(storage, names, &state, &is_seen, verified)?;
    Ok(index)
}

/// Every certificate that the ledger names must be the one that it names, and so must its signature. What `is_seen` to
/// be there is not read.
pub fn check_certificates(
    storage: &dyn Storage,
    names: &CustomerNames,
    state: &State,
    is_seen: &dyn Fn(&ObjectName) -> bool,
    verified: &mut Verified,
) -> Result<(), JobError> {
    let check = |file: String, hash: &ObjectHash| -> Result<(), RepositoryError> {
        let name = names
            .certificate(&file)
            .map_err(|error| RepositoryError::damaged(file.escape_debug(), error))?;
        if is_seen(&name) {
            return Ok(());
        }
        let stored = storage.read(&name, MAX_CERTIFICATE_BYTES)?;
        match blake3::hash(&stored).as_bytes() == hash.as_bytes() {
            true => Ok(()),
            false => Err(RepositoryError::damaged(
                name,
                "is not the one the ledger names",
            )),
        }
    };
    for row in &state.certificates {
        for (file, hash) in [
            (format!("{}.json", row.id), &row.hash),
            (format!("{}.json.minisig", row.id), &row.signature_hash),
        ] {
            match check(file, hash) {
                Ok(()) => {}
                Err(error) if error.is_damage() => verified.certificates.push(format!(
                    "{error} (a deletion certificate: put it back from a copy; nothing else can make it)"
                )),
                Err(error) => verified.take_in(error)?,
            }
        }
    }
    Ok(())
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
            Err(error) => verified.take_in(error)?,
        }
    }
    Ok(())
}

/// The record of every point that is live or expired must be the one that the ledger names.
fn check_records(customer: &SealedCustomer, verified: &mut Verified) -> Result<(), JobError> {
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
                    tell_of_points(customer, vec![Unreachable { point, error }], verified);
                }
            }
            Err(error) if error.is_unread() => {
                tell_of_points(customer, vec![Unreachable { point, error }], verified);
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
        known.tell(pack, tag, what, verified);
    }
    tell_of_points(customer, opened.unreadable, verified);
    for (pack, tag) in &opened.unsettled {
        verified.unread.push(format!(
            "{} (tag {tag}): a frame did not open, and could not be looked for again",
            customer.names().pack(pack)
        ));
    }
    if let Some(error) = opened.failure {
        return Err(error.into());
    }
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
    let (whole, damaged) = (&scrubbed.whole, &scrubbed.damaged);
    note(customer, VerifyMethod::Checksum, whole, damaged, verified);
    JobError::unless_stopped(stop)?;
    let (whole, damaged) = (&opened.whole, &opened.damaged);
    note(customer, VerifyMethod::Opened, whole, damaged, verified);
    Ok(())
}

/// Every node of every point must open, and every chunk must have a place.
fn check_trees(customer: &Customer, verified: &mut Verified) -> Result<(), JobError> {
    let mark = Mark::at_end_to_look(customer)?;
    tell_of_points(customer, mark.damage, verified);
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
    fn tell(&self, pack: &PackName, tag: &Tag, what: String, verified: &mut Verified) {
        let known = self.state.damaged.contains(&(*pack, *tag));
        // Where the index cannot tell, it is not known to be healed.
        let stands = || {
            self.index
                .sound_places(tag)
                .is_ok_and(|places| !places.is_empty())
        };
        match known && stands() {
            true => verified
                .notes
                .push(format!("{what}; known, and healed by a later backup")),
            false => verified.damage.push(what),
        }
    }
}

/// Of these packs, which are lost, those of which nothing is needed any more: each frame is known as damaged, and its
/// content stands elsewhere by now. A prune condemns such a pack one day.
fn made_up_for(
    index: &Index,
    state: &State,
    lost: &HashSet<PackName>,
) -> Result<HashSet<PackName>, RepositoryError> {
    let numbers = lost.iter().filter_map(|name| index.number_of(name));
    let mut made_up_for = lost.clone();
    for (pack, tag) in index.frames_of(&numbers.collect())? {
        let known = state.damaged.contains(&(pack, tag));
        if !known || index.sound_places(&tag)?.is_empty() {
            made_up_for.remove(&pack);
        }
    }
    Ok(made_up_for)
}

/// Tells of packs that are lost, each with what is wrong with it.
fn tell_of_lost(
    index: &Index,
    state: &State,
    lost: Vec<(PackName, String)>,
    verified: &mut Verified,
) -> Result<(), RepositoryError> {
    let names = lost.iter().map(|(name, _)| *name).collect();
    let made_up_for = made_up_for(index, state, &names)?;
    for (name, what) in lost {
        match made_up_for.contains(&name) {
            true => verified
                .notes
                .push(format!("{what}; known, and healed by a later backup")),
            false => verified.damage.push(what),
        }
    }
    Ok(())
}

/// What is damaged, and what cannot be read now.
fn tell_of_points(customer: &SealedCustomer, found: Vec<Unreachable>, verified: &mut Verified) {
    let is_unread = |one: &Unreachable| one.error.is_unread();
    let (unread, damaged): (Vec<_>, Vec<_>) = found.into_iter().partition(is_unread);
    tell_unreadable(customer, &damaged, &mut verified.damage);
    tell_unreadable(customer, &unread, &mut verified.unread);
}

/// What cannot be read, with a restore point that needs it. What points share was walked below one of them.
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
        let others = match found.error.name == customer.names().point(&found.point).as_str() {
            true => "",
            false => ", and perhaps others",
        };
        damage.push(format!(
            "restore point {} ({}){others}: {}",
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
    sizes: &BTreeMap<&str, u64>,
    verified: &mut Verified,
) -> Result<(), JobError> {
    let mut lost = Vec::new();
    for info in index.packs().iter().filter(|info| !info.condemned) {
        verified.packs += 1;
        let name = customer.names().pack(&info.row.name);
        let size = match sizes.get(name.as_str()) {
            Some(size) => Some(*size),
            None => match customer.storage().size_bytes(&name) {
                Ok(size) => Some(size),
                Err(error) if error.kind == StorageErrorKind::NotFound => None,
                Err(error) => {
                    verified.take_in(error.into())?;
                    continue;
                }
            },
        };
        match size {
            Some(size) if size == info.row.size_bytes => {}
            Some(size) => {
                let due = info.row.size_bytes;
                let what = format!("{name}: has {size} bytes instead of {due}");
                lost.push((info.row.name, what));
            }
            None => {
                // Another prune may have condemned, deleted and forgotten it since.
                if customer.load_index()?.is_current(&info.row.name) {
                    lost.push((info.row.name, format!("{name}: is missing")));
                }
            }
        }
    }
    Ok(tell_of_lost(index, &customer.state(), lost, verified)?)
}

/// Every current segment must be there: an index that is read from this host's copies does not show that the
/// store has lost one.
fn check_segments(
    customer: &SealedCustomer,
    state: &State,
    sizes: &BTreeMap<&str, u64>,
    verified: &mut Verified,
) -> Result<(), JobError> {
    for segment in state.segments.keys() {
        let name = customer.names().segment(segment);
        if sizes.contains_key(name.as_str()) {
            continue;
        }
        match customer.storage().size_bytes(&name) {
            Ok(_) => continue,
            Err(error) if error.kind == StorageErrorKind::NotFound => {}
            Err(error) => {
                verified.take_in(error.into())?;
                continue;
            }
        }
        // A merge may have replaced it since.
        customer.refresh()?;
        if customer.with_state(|state| state.segments.contains_key(segment)) {
            verified.damage.push(format!("{name}: is missing"));
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
        known.tell(pack, tag, what, verified);
    }
    let broken = scrubbed.broken.iter();
    let broken =
        broken.map(|(pack, why)| (*pack, format!("{}: {why}", customer.names().pack(pack))));
    tell_of_lost(&known.index, &known.state, broken.collect(), verified)?;
    let unread = scrubbed.unread.iter().map(|(_, reason)| reason.clone());
    verified.unread.extend(unread);
    if let Some(error) = &scrubbed.failure {
        verified.failure = Some(error.clone().into());
    }
    Ok(scrubbed)
}

/// What was read and found damaged goes into the ledger: whether it is there. Where it cannot, what was found is told
/// all the same.
fn note(
    customer: &Customer,
    method: VerifyMethod,
    whole: &[PackName],
    damaged: &[(PackName, Tag)],
    verified: &mut Verified,
) -> bool {
    // A store that does not answer any more is not waited for again.
    if (whole.is_empty() && damaged.is_empty()) || verified.failure.is_some() {
        return false;
    }
    let Err(error) = customer.note_verification(method, whole, damaged) else {
        return true;
    };
    let host = customer.host().id();
    let only_reads = customer.with_state(|state| !state.hosts.contains_key(&host));
    let message = format!("what was found could not be noted in the ledger: {error}");
    match only_reads || error.kind == RepositoryErrorKind::Superseded {
        // An escrow recipient reads everything and is no host of the ledger; the ledger refuses others by their roles.
        true if verified.notes.contains(&message) => {}
        true => verified.notes.push(message),
        false => {
            let kind = JobErrorKind::Repository(error.kind);
            verified.failure = Some(JobError::new(kind, message));
        }
    }
    false
}
