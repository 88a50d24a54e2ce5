//! The deletion certificate: what was destroyed, signed so that outsiders can check it.

use super::prune::earliest_deadline;
use super::{JobError, JobErrorKind, LocalHost};
use crate::codec::minisign;
use crate::codec::random_bytes;
use crate::format::certificate::{Certificate, CertifiedPoint};
use crate::format::entry::{Body, CertificateRef, Purpose, ReclaimedBody};
use crate::model::{ObjectHash, ObjectName, PointId, PointState, SessionId};
use crate::repository::{Customer, RepositoryError, RepositoryErrorKind, State};
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
\"destroyed\" no byte, not even as ciphertext, is left in the stores named here, which were listed \
and found to hold nothing that the ledger does not explain.";

/// Signs a certificate for what was erased and destroyed since the last one; `None`: nothing was.
/// The caller has listed the store (`objects_listed`) and found all of it explained.
///
/// `is_something_left`: what is over and locked is listed; then nothing is said of last bytes.
///
/// The files come before the entry that names them, inside of a session that explains them: a
/// crash between leaves files that the next prune removes.
pub(super) fn certify(
    customer: &Customer,
    host: &LocalHost,
    now: Timestamp,
    objects_listed: u64,
    is_something_left: bool,
) -> Result<Option<Certified>, JobError> {
    let state = customer.state();
    let destroyed = destroyed(&state, is_something_left);
    let erased = newly_erased(&state);
    if destroyed.is_empty() && erased.is_empty() {
        return Ok(None);
    }
    let begun = customer.begin(Purpose::Prove, None)?;
    let written = write(
        customer,
        host,
        now,
        objects_listed,
        &state,
        &erased,
        &destroyed,
        is_something_left,
        begun.id,
    );
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

fn destroyed(state: &State, is_something_left: bool) -> Vec<PointId> {
    match is_something_left {
        true => Vec::new(),
        false => state.destroyed(),
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

#[expect(clippy::too_many_arguments)]
fn write(
    customer: &Customer,
    host: &LocalHost,
    now: Timestamp,
    objects_listed: u64,
    state: &State,
    erased: &[PointId],
    destroyed: &[PointId],
    is_something_left: bool,
    session: SessionId,
) -> Result<Option<Certified>, JobError> {
    let refused = |detail: String| JobError::new(JobErrorKind::Refused, detail);
    let random: [u8; 8] = random_bytes();
    let id = format!(
        "{}-{:016x}",
        now.strftime("%Y%m%dT%H%M%SZ"),
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
        issued_at: now,
        issued_by: host.identity().host_id(),
        stores: vec![customer.storage().location()],
        statement: STATEMENT.to_string(),
        erased: certified_points(state, erased),
        destroyed: certified_points(state, destroyed),
        packs_deleted: state.uncertified_packs.clone(),
        unreadable_bytes_left: state.marks.values().map(|mark| mark.dead_bytes).sum(),
        unreadable_bytes_deadline: last_deadline(state),
        ledger_seq: state.seq,
        ledger_hash: state
            .hash
            .ok_or_else(|| refused("the ledger is empty".to_string()))?,
        objects_listed,
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
            && self::destroyed(end, is_something_left) == destroyed;
        if !same {
            return Err(RepositoryError::new(
                RepositoryErrorKind::Superseded,
                customer.names().prefix(),
                "another prune went on meanwhile",
            ));
        }
        Ok(Body::Reclaimed(ReclaimedBody {
            session: Some(session),
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
            })
        })
        .collect()
}

fn hash_of(bytes: &[u8]) -> ObjectHash {
    ObjectHash::from_bytes(*blake3::hash(bytes).as_bytes())
}
