//! The deletion certificate: what was destroyed, signed so that outsiders can check it.

use super::prune::earliest_deadline;
use super::{JobError, JobErrorKind, LocalHost};
use crate::codec::minisign;
use crate::codec::random_bytes;
use crate::format::certificate::{Certificate, CertifiedPoint};
use crate::format::entry::{Body, CertificateRef, Purpose, ReclaimedBody};
use crate::model::{ObjectHash, ObjectName, PointId, PointState};
use crate::repository::{Begun, Customer, RepositoryError, RepositoryErrorKind, State, Swept};
use jiff::Timestamp;

/// A certificate that the ledger names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certified {
    pub id: String,
    pub object: ObjectName,
    pub signature: ObjectName,
    /// The key of `minisign -V -P`.
    pub public_key: String,
    pub erased: usize,
    pub destroyed: usize,
}

const STATEMENT: &str = "The records of the restore points under \"erased\" were destroyed: what \
only they reached has been unreadable since, because its keys existed nowhere else. Of those under \
\"destroyed\" no byte, not even as ciphertext, is left in the stores named here. They were listed: of this \
customer they hold nothing that its ledger does not explain, and beside it nothing but other customers of \
the repository.";

/// Signs a certificate for what was erased and destroyed since the last one; `None`: nothing was.
/// The caller has listed the store (`swept`) and found all of it explained. Where something is over and
/// locked, nothing is said of last bytes.
///
/// The files come before the entry that names them, inside of a session that explains them: a
/// crash between leaves files that the next prune removes.
pub(super) fn certify(
    customer: &Customer,
    host: &LocalHost,
    swept: &Swept,
) -> Result<Option<Certified>, JobError> {
    let state = customer.state();
    let destroyed = destroyed(&state, swept);
    let erased = newly_erased(&state);
    if destroyed.is_empty() && erased.is_empty() {
        return Ok(None);
    }
    let begun = customer.begin(Purpose::Prove, None)?;
    let written = write(customer, host, swept, &state, &erased, &destroyed, &begun);
    match written {
        Ok(certified) => Ok(certified),
        Err(error) if error.is_uncertain() => Err(error),
        Err(error) => {
            // The next prune does it if this fails as well; what failed first is told.
            let _aborted = customer.abort(&begun.id, "the certificate was not written");
            match error.is_superseded() {
                true => Ok(None),
                false => Err(error),
            }
        }
    }
}

/// Whether there is anything that no certificate says yet.
pub(super) fn is_due(state: &State) -> bool {
    !(state.destroyed().is_empty() && newly_erased(state).is_empty())
}

fn destroyed(state: &State, swept: &Swept) -> Vec<PointId> {
    match swept.locked.is_empty() {
        true => state.destroyed(),
        false => Vec::new(),
    }
}

fn newly_erased(state: &State) -> Vec<PointId> {
    state
        .points
        .iter()
        .filter(|(_, point)| point.state == PointState::Erased)
        .filter(|(_, point)| point.erase_seq.is_some_and(|seq| seq > state.certified_at))
        .map(|(id, _)| *id)
        .collect()
}

/// When the certificate is issued: its session began after the last listing. It comes after all that it names, also
/// where the clock of the host that did it is ahead of this one's.
fn issued_at<'p>(
    state: &State,
    begun: &Begun,
    points: impl Iterator<Item = &'p PointId>,
) -> Timestamp {
    let erasures = points.filter_map(|id| state.points.get(id)?.erased_at);
    erasures
        .chain(state.last_witnessed)
        .fold(begun.begun_at, Ord::max)
}

fn write(
    customer: &Customer,
    host: &LocalHost,
    swept: &Swept,
    state: &State,
    erased: &[PointId],
    destroyed: &[PointId],
    begun: &Begun,
) -> Result<Option<Certified>, JobError> {
    let refused = |detail: String| JobError::new(JobErrorKind::Refused, detail);
    let issued_at = issued_at(state, begun, erased.iter().chain(destroyed));
    let dead_bytes: u64 = state.marks.values().map(|mark| mark.dead_bytes).sum();
    let locked_bytes: u64 = swept.locked.iter().map(|one| one.object.size_bytes).sum();
    let random: [u8; 8] = random_bytes();
    let id = format!(
        "{}-{:016x}",
        issued_at.strftime("%Y%m%dT%H%M%SZ"),
        u64::from_be_bytes(random)
    );
    let certificate = Certificate {
        vmkeep_deletion_certificate: 1,
        id: id.clone(),
        repository: state
            .repository
            .ok_or_else(|| refused("the ledger names no repository".to_string()))?,
        customer: customer.name().to_string(),
        customer_uid: customer.uid(),
        issued_at,
        issued_by: host.identity().host_id(),
        stores: vec![customer.storage().location()],
        statement: STATEMENT.to_string(),
        erased: certified_points(state, erased),
        destroyed: certified_points(state, destroyed),
        packs_deleted: state.uncertified_packs.clone(),
        unreadable_bytes_left: dead_bytes + locked_bytes,
        // Of what is locked nobody can promise when it goes.
        unreadable_bytes_deadline: match swept.locked.is_empty() {
            true => last_deadline(state),
            false => None,
        },
        ledger_seq: state.seq,
        ledger_hash: state
            .hash
            .ok_or_else(|| refused("the ledger is empty".to_string()))?,
        objects_listed: swept.listed,
    };
    let bytes = certificate
        .to_bytes()
        .map_err(|error| refused(error.to_string()))?;
    let comment = format!("vmkeep deletion certificate {id} of {}", customer.name());
    let signature = host
        .sign_certificate(&bytes, &comment)
        .map_err(|error| refused(error.to_string()))?;
    let name = |file: String| {
        customer
            .names()
            .certificate(&file)
            .map_err(|error| refused(error.to_string()))
    };
    let object = name(format!("{id}.json"))?;
    let signature_object = name(format!("{id}.json.minisig"))?;
    customer.storage().create(&object, &bytes)?;
    customer
        .storage()
        .create(&signature_object, signature.as_bytes())?;
    let reference = CertificateRef {
        id: id.clone(),
        hash: hash_of(&bytes),
        signature_hash: hash_of(signature.as_bytes()),
    };
    customer.append(|end| {
        // What another prune erased, deleted or certified meanwhile is not in this certificate, and
        // would be in no later one: the next counts from this entry.
        let same = end.certified_at == state.certified_at
            && end.marked_at == state.marked_at
            && end.uncertified_packs == state.uncertified_packs
            && newly_erased(end) == erased
            && self::destroyed(end, swept) == destroyed;
        if !same {
            return Err(RepositoryError::new(
                RepositoryErrorKind::Superseded,
                customer.names().prefix(),
                "another prune went on meanwhile",
            ));
        }
        Ok(Body::Reclaimed(ReclaimedBody {
            session: Some(begun.id),
            marked_at: end.marked_at,
            deleted: Vec::new(),
            // None: the rows of the ledger stay as they are until a later mark says otherwise.
            marks: Vec::new(),
            certificate: Some(reference.clone()),
            destroyed: destroyed.to_vec(),
        }))
    })?;
    Ok(Some(Certified {
        id,
        object,
        signature: signature_object,
        public_key: minisign::public_key_line(&host.identity().host_id()),
        erased: erased.len(),
        destroyed: destroyed.len(),
    }))
}

/// When the last of the dead bytes must be gone.
fn last_deadline(state: &State) -> Option<Timestamp> {
    match state.marks.is_empty() {
        true => None,
        false => state
            .points
            .values()
            .filter(|point| point.state == PointState::Erased)
            .map(|point| point.deadline)
            .max()
            .or_else(|| earliest_deadline(state)),
    }
}

fn certified_points(state: &State, points: &[PointId]) -> Vec<CertifiedPoint> {
    points
        .iter()
        .filter_map(|id| {
            let point = state.points.get(id)?;
            Some(CertifiedPoint {
                point: *id,
                vm: point.vm.to_string(),
                taken_at: point.taken_at,
                deadline: point.deadline,
                erase_entry: point.erase_seq?,
                erased_at: point.erased_at,
            })
        })
        .collect()
}

fn hash_of(bytes: &[u8]) -> ObjectHash {
    ObjectHash::from_bytes(*blake3::hash(bytes).as_bytes())
}
