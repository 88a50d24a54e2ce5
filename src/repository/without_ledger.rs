//! A customer whose ledger cannot be read, opened for restoring alone: the last means.
//!
//! A record has the roots of a restore point and opens with the customer's key; every piece below is bound to its id.
//! So bytes are as right as ever. What only the ledger says is not known: who made a point, whether it was expired or
//! is suspect, and that key file, record and all below were not put there by who can write into the store.

use super::customer::{Customer, WriteSettings, key_in, terms_map};
use super::index::Index;
use super::ledger::{Ledger, State};
use super::sealed::{SealedCustomer, hash_of, no_ledger};
use super::{Host, HostMemory, RepositoryError, RepositoryErrorKind};
use crate::codec::age::MAX_FILE_BYTES;
use crate::codec::{CustomerKey, HostIdentity, Keys, MAX_RECORD_BYTES, open_record};
use crate::format::entry::{
    Attestation, BeginBody, Body, ClockDeclaration, CommitBody, DiskBody, Entry, GenesisBody,
    HostBody, PolicyBody, Purpose, Role, packs_hash,
};
use crate::format::names::{CustomerNames, ObjectRole};
use crate::format::repository_file::FORMAT_VERSION;
use crate::model::{
    CustomerName, CustomerUid, EntryHash, HostId, PointId, RepositoryId, SessionId, Writers,
};
use crate::policy::{Policy, PolicyTerms, expiry};
use crate::storage::{Storage, StorageErrorKind};
use jiff::Timestamp;
use std::sync::Arc;

/// A customer that is open without its ledger.
pub struct WithoutLedger {
    pub customer: Customer,
    /// Why the ledger cannot be read. `None`: it can, and only points that are live by it are here.
    pub broken: Option<RepositoryError>,
    /// What is there and cannot be read either.
    pub passed_over: Vec<RepositoryError>,
}

impl WithoutLedger {
    /// Each point is taken to expire by `terms`: a record does not say when.
    pub fn open(
        storage: Arc<dyn Storage>,
        name: &CustomerName,
        repository: RepositoryId,
        identity: &HostIdentity,
        host: Arc<dyn Host>,
        settings: WriteSettings,
        terms: &PolicyTerms,
    ) -> Result<Self, RepositoryError> {
        let memory: Arc<dyn HostMemory> = host.clone();
        let names = CustomerNames::new(name);
        // What is expired stays so for as long as anybody can tell.
        let open = || SealedCustomer::open(storage.clone(), name, repository, memory.clone(), 1);
        let (sealed, broken) = match Ledger::load(storage.clone(), names.clone(), &*memory) {
            // Its own words on whose it is are no damage to be passed over.
            Ok(Some(_)) => (Some(open()?), None),
            Ok(None) => match no_ledger(&*storage, &names, &repository, &*memory) {
                new if new.kind == RepositoryErrorKind::NotFound => return Err(new),
                gone => (None, Some(gone)),
            },
            Err(error) if error.is_of_one_object() => (None, Some(error)),
            Err(error) => return Err(error),
        };
        let mut points = points_there(&*storage, &names)?;
        if let Some(sealed) = sealed {
            let state = sealed.state();
            points.retain(|id| state.live().any(|(live, _)| live == id));
        }
        let mut passed_over = Vec::new();
        let keys = keys_there(&*storage, &names, identity, &mut passed_over)?;
        let policy = Policy::parse(terms).map_err(|error| {
            RepositoryError::new(RepositoryErrorKind::Refused, names.prefix(), error)
        })?;
        let (uid, keys, read) = read_points(&*storage, &names, &points, &policy, keys)?;
        passed_over.extend(read.passed_over);
        let state = state_of(&names, repository, uid, terms, read.commits)?;
        let index = Index::of_all_there(&*storage, &names, &settings, state.seq, &mut passed_over)?;
        let sealed = SealedCustomer::without_ledger(storage, name, memory, state, index);
        Ok(WithoutLedger {
            customer: Customer::of(sealed, keys, host, settings),
            broken,
            passed_over,
        })
    }
}

fn points_there(
    storage: &dyn Storage,
    names: &CustomerNames,
) -> Result<Vec<PointId>, RepositoryError> {
    let listed = storage.list(&names.points_prefix())?;
    let points = listed
        .iter()
        .filter_map(|object| match names.role(&object.name) {
            ObjectRole::Point(id) => Some(id),
            _ => None,
        });
    Ok(points.collect())
}

/// The different keys that this host can open, those of the newest files first; at least one.
fn keys_there(
    storage: &dyn Storage,
    names: &CustomerNames,
    identity: &HostIdentity,
    passed_over: &mut Vec<RepositoryError>,
) -> Result<Vec<CustomerKey>, RepositoryError> {
    let listed = storage.list(&names.keys_prefix())?;
    let numbers = listed
        .iter()
        .filter_map(|object| match names.role(&object.name) {
            ObjectRole::Key(number) => Some(number),
            _ => None,
        });
    let mut numbers: Vec<u32> = numbers.collect();
    numbers.sort_unstable();
    let mut refusal = RepositoryError::damaged(names.keys_prefix(), "no key file is there");
    let mut keys: Vec<CustomerKey> = Vec::new();
    for number in numbers.into_iter().rev() {
        let object = names.key(number);
        let stored = storage.read(&object, MAX_FILE_BYTES as u64);
        let opened = stored
            .map_err(RepositoryError::from)
            .and_then(|stored| key_in(&object, &stored, identity));
        match opened {
            Ok(key) => {
                let plain = key.to_key_file();
                if !keys.iter().any(|known| *known.to_key_file() == *plain) {
                    keys.push(key);
                }
            }
            Err(error) if error.kind == RepositoryErrorKind::WrongKey => refusal = error,
            Err(error) if error.is_of_one_object() => passed_over.push(error),
            Err(error) => return Err(error),
        }
    }
    match keys.is_empty() {
        false => Ok(keys),
        // Where one is damaged, it may be this host's.
        true => Err(passed_over.pop().unwrap_or(refusal)),
    }
}

/// What the records of points say that open.
#[derive(Default)]
struct Read {
    commits: Vec<CommitBody>,
    passed_over: Vec<RepositoryError>,
}

/// By the first of the keys that opens any record: a key file may be one that no entry ever named.
fn read_points(
    storage: &dyn Storage,
    names: &CustomerNames,
    points: &[PointId],
    policy: &Policy,
    keys: Vec<CustomerKey>,
) -> Result<(CustomerUid, Keys, Read), RepositoryError> {
    let mut last = None;
    for key in keys {
        let derived = Keys::derive(&key);
        let mut read = Read::default();
        for point in points {
            match read_point(storage, names, point, policy, &derived) {
                Ok(commit) => read.commits.push(commit),
                // A prune of another host was quicker.
                Err(error)
                    if error.kind == RepositoryErrorKind::Storage(StorageErrorKind::NotFound) => {}
                Err(error) if error.is_of_one_object() => read.passed_over.push(error),
                Err(error) => return Err(error),
            }
        }
        let found = !read.commits.is_empty();
        last = Some((key.uid(), derived, read));
        if found {
            break;
        }
    }
    last.ok_or_else(|| RepositoryError::damaged(names.keys_prefix(), "no key file is there"))
}

/// What its commit would say, as far as the record tells.
fn read_point(
    storage: &dyn Storage,
    names: &CustomerNames,
    point: &PointId,
    policy: &Policy,
    keys: &Keys,
) -> Result<CommitBody, RepositoryError> {
    let name = names.point(point);
    let stored = storage.read(&name, MAX_RECORD_BYTES)?;
    let record = open_record(keys, point, &stored)
        .map_err(|error| RepositoryError::damaged(&name, error))?;
    let expiry = expiry(policy, record.taken_at);
    let disks = record.disks.iter().map(|disk| DiskBody {
        name: disk.name.clone(),
        size_bytes: disk.shape.size_bytes,
    });
    Ok(CommitBody {
        session: SessionId::from_bytes(*point.as_bytes()),
        disks: disks.collect(),
        vm: record.vm,
        point: *point,
        record_hash: hash_of(&stored),
        point_kind: record.kind,
        base: None,
        taken_at: record.taken_at,
        expires_at: expiry.expires_at,
        deadline: expiry.deadline,
        stored_bytes: 0,
        pack_count: 0,
        packs_hash: packs_hash([]),
        segments: Vec::new(),
        consistency: String::new(),
        notes: Vec::new(),
        audit: None,
    })
}

/// The state of a ledger that had nothing but these points, in the order of their times.
fn state_of(
    names: &CustomerNames,
    repository: RepositoryId,
    uid: CustomerUid,
    terms: &PolicyTerms,
    mut commits: Vec<CommitBody>,
) -> Result<State, RepositoryError> {
    commits.sort_by_key(|commit| (commit.taken_at, commit.point));
    let first = commits
        .first()
        .map_or(Timestamp::UNIX_EPOCH, |commit| commit.taken_at);
    let nobody = HostId::from_bytes([0; HostId::BYTES]);
    let genesis = GenesisBody {
        format: FORMAT_VERSION,
        repository,
        customer_name: names.customer().to_string(),
        host: HostBody {
            host: nobody,
            name: String::new(),
            recipient: String::new(),
            roles: vec![Role::Backup, Role::Admin],
            clock: ClockDeclaration::Verified,
        },
        writers: Writers::Many,
    };
    let terms = terms_map(terms);
    let mut bodies = vec![
        (first, Body::Genesis(genesis)),
        (first, Body::Policy(PolicyBody { terms })),
    ];
    for commit in commits {
        let begin = BeginBody {
            session: commit.session,
            purpose: Purpose::Backup,
            vm: Some(commit.vm.clone()),
            point: Some(commit.point),
            expires_at: Some(commit.expires_at),
            deadline: Some(commit.deadline),
        };
        bodies.push((commit.taken_at, Body::Begin(begin)));
        bodies.push((commit.taken_at, Body::Commit(commit)));
    }
    let none = EntryHash::from_bytes([0; EntryHash::BYTES]);
    let mut state = State::default();
    for (time, body) in bodies {
        let entry = Entry {
            seq: state.seq + 1,
            prev: none,
            customer: uid,
            time,
            // No clock of this host is judged by them.
            attestation: Attestation::Alone,
            host: nobody,
            body,
        };
        state.apply(&entry, none).map_err(|reason| {
            RepositoryError::new(RepositoryErrorKind::Refused, names.ledger_prefix(), reason)
        })?;
    }
    // Nobody has a role here.
    state.hosts.clear();
    Ok(state)
}
