//! A restore point being made, and one being read.

use super::customer::{Begun, Customer, counted_from};
use super::index::{Index, Place};
use super::ledger::State;
use super::reader::{ReadScratch, Reader};
use super::rule::{Rule, stands};
use super::tree::{DiskDraft, DiskView, Row};
use super::writer::{Session, Trust, Worker};
use super::{RepositoryError, RepositoryErrorKind};
use crate::codec::{DiskRecord, PointRecord, RecordDefinition};
use crate::format::entry::{AuditBody, Body, CommitBody, DiskBody, packs_hash};
use crate::model::{DiskName, PackName, PointId, PointKind, PointState, Tag, TreeShape, VmName};
use crate::policy::expiry;
use jiff::Timestamp;
use std::collections::{BTreeSet, HashMap};

/// A disk that was written, with what its source wants to see again.
pub struct DiskResult {
    record: DiskRecord,
}

/// A point on its way to its commit.
pub struct PointDraft {
    pub point: PointId,
    pub vm: VmName,
    pub kind: PointKind,
    pub base: Option<PointId>,
    pub consistency: String,
    pub notes: Vec<String>,
    pub definition: Option<(String, Vec<u8>)>,
    /// What a full found of tracking.
    pub audit: Option<AuditBody>,
}

/// What a commit said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    pub seq: u64,
    pub point: PointId,
    pub taken_at: Timestamp,
    pub expires_at: Timestamp,
    pub deadline: Timestamp,
    pub stored_bytes: u64,
}

impl Session<'_> {
    /// The row of a disk of the base point, if that disk has the same shape there.
    pub fn finish_disk(
        &self,
        worker: &mut Worker,
        name: &DiskName,
        draft: DiskDraft,
        mark: Option<&str>,
    ) -> Result<DiskResult, RepositoryError> {
        let shape = *draft.shape();
        let root = draft.finish(self, worker)?;
        Ok(DiskResult {
            record: DiskRecord {
                name: name.clone(),
                shape,
                root,
                mark: mark.map(str::to_string),
            },
        })
    }
}

impl Customer {
    /// Writes what is left, the point record, and the commit: rule C, checked anew after each
    /// lost slot.
    ///
    /// `Superseded`: what the session stands on changed; it was not committed and may be aborted.
    /// `Uncertain`: it may stand; nothing may be removed.
    pub fn commit(
        &self,
        begun: &Begun,
        session: &Session<'_>,
        draft: PointDraft,
        disks: Vec<DiskResult>,
    ) -> Result<Committed, RepositoryError> {
        let uploaded = session.finish()?;
        // The instant of the capture: within the session, by the ledger's own times.
        let taken_at = begun.begun_at;
        let counted_from = counted_from(taken_at, begun.clock_alone, begun.witnessed_before);
        let disk_bodies: Vec<DiskBody> = disks
            .iter()
            .map(|disk| DiskBody {
                name: disk.record.name.clone(),
                size_bytes: disk.record.shape.size_bytes,
            })
            .collect();
        let record = PointRecord {
            vm: draft.vm.clone(),
            kind: draft.kind,
            taken_at,
            disks: disks.into_iter().map(|disk| disk.record).collect(),
            definition: draft
                .definition
                .map(|(file_name, content)| RecordDefinition { file_name, content }),
        };
        let (record_hash, record_bytes) = self.write_record(&draft.point, &record)?;
        let superseded = |detail: String| {
            RepositoryError::new(RepositoryErrorKind::Superseded, &draft.vm, detail)
        };
        let mut relied_on = Relied::of(session)?;
        let mut committed = None;
        let seq = loop {
            let mut lost = BTreeSet::new();
            let result = self.append(|state| {
                // (1) the session is open, (2) the base stands: checked by the ledger's own rules.
                // (3) nothing relied on has been condemned. What lies in the base's tree is asked
                // as well: it resolves again, because the base kept it alive.
                lost = relied_on.lost(state);
                if !lost.is_empty() {
                    return Err(superseded("packs it relied on were condemned".to_string()));
                }
                let policy = state
                    .policy
                    .as_ref()
                    .ok_or_else(|| superseded("the customer has no policy".to_string()))?;
                let expiry = expiry(policy, counted_from);
                committed = Some(Committed {
                    seq: 0,
                    point: draft.point,
                    taken_at,
                    expires_at: expiry.expires_at,
                    deadline: expiry.deadline,
                    stored_bytes: uploaded.stored_bytes + record_bytes,
                });
                Ok(Body::Commit(CommitBody {
                    session: begun.id,
                    vm: draft.vm.clone(),
                    point: draft.point,
                    record_hash,
                    point_kind: draft.kind,
                    base: draft.base,
                    taken_at,
                    expires_at: expiry.expires_at,
                    deadline: expiry.deadline,
                    disks: disk_bodies.clone(),
                    stored_bytes: uploaded.stored_bytes + record_bytes,
                    pack_count: uploaded.packs.len() as u32,
                    packs_hash: packs_hash(uploaded.packs.iter().copied()),
                    segments: uploaded.segments.clone(),
                    consistency: draft.consistency.clone(),
                    notes: draft.notes.clone(),
                    audit: draft.audit.clone(),
                }))
            });
            match result {
                Ok(seq) => break seq,
                Err(error) if lost.is_empty() => return Err(error),
                // The same content may stand elsewhere by now, in a pack that is born.
                Err(error) => {
                    if !relied_on.resolve_again(self, session, &lost)? {
                        return Err(error);
                    }
                }
            }
        };
        committed
            .map(|committed| Committed { seq, ..committed })
            .ok_or_else(|| superseded("the commit was not built".to_string()))
    }

    /// The base of an incremental: the VM's newest point and its record, if it can be built upon.
    pub fn base(&self, vm: &VmName) -> Option<PointId> {
        self.with_state(|state| state.base_of(vm).map(|(id, _)| id))
    }
}

/// The packs of others that a session relies on, kept up with what was condemned meanwhile.
struct Relied {
    packs: BTreeSet<PackName>,
    /// What was found again in another pack than the session's index said.
    moved: HashMap<PackName, Vec<Tag>>,
}

impl Relied {
    fn of(session: &Session<'_>) -> Result<Self, RepositoryError> {
        Ok(Relied {
            packs: session.relied_packs()?,
            moved: HashMap::new(),
        })
    }

    fn lost(&self, state: &State) -> BTreeSet<PackName> {
        let condemned =
            |pack: &PackName| state.is_condemned(pack) && stands(Rule::NothingCondemned);
        let unborn =
            |pack: &PackName| !state.born.contains_key(&pack.session) && stands(Rule::Born);
        self.packs
            .iter()
            .filter(|pack| condemned(pack) || unborn(pack))
            .copied()
            .collect()
    }

    /// Looks for what stood in `lost` packs at the ledger's end. `false`: something stands nowhere.
    fn resolve_again(
        &mut self,
        customer: &Customer,
        session: &Session<'_>,
        lost: &BTreeSet<PackName>,
    ) -> Result<bool, RepositoryError> {
        let index = customer.load_index()?;
        let first = session.relied_on_in(|pack| lost.contains(pack))?;
        let again: Vec<Tag> = lost
            .iter()
            .filter_map(|pack| self.moved.remove(pack))
            .flatten()
            .collect();
        self.packs.retain(|pack| !lost.contains(pack));
        for tag in first.into_values().flatten().chain(again) {
            let place = index
                .sound_places(&tag)?
                .into_iter()
                .find(|place| customer.may_rely_on(&index, place, &tag, session.trust()));
            let Some(info) = place.and_then(|place| index.pack(place.pack)) else {
                return Ok(false);
            };
            self.packs.insert(info.row.name);
            self.moved.entry(info.row.name).or_default().push(tag);
        }
        Ok(true)
    }
}

impl Customer {
    /// Whether a sound place will do for a session of this trust. A full wants it to have been
    /// checked of late, or checks the frame now.
    fn may_rely_on(&self, index: &Index, place: &Place, tag: &Tag, trust: Trust) -> bool {
        let Trust::CheckedSince(since) = trust else {
            return true;
        };
        let Some(info) = index.pack(place.pack) else {
            return false;
        };
        let name = &info.row.name;
        self.with_state(|state| state.verified_at(name))
            .is_some_and(|at| at >= since)
            || self.frame_is_whole(name, place, tag).unwrap_or(false)
    }
}

/// A disk of a point as a restore sees it.
pub struct RestoredDisk {
    record: DiskRecord,
}

impl RestoredDisk {
    pub fn name(&self) -> &DiskName {
        &self.record.name
    }

    pub fn shape(&self) -> &TreeShape {
        &self.record.shape
    }

    /// What the source of this disk noted when the point was taken.
    pub fn mark(&self) -> Option<&str> {
        self.record.mark.as_deref()
    }

    pub fn view<'a>(
        &self,
        reader: &'a Reader<'a>,
        scratch: &mut ReadScratch,
    ) -> Result<DiskView<'a>, RepositoryError> {
        DiskView::open(reader, &self.record, scratch)
    }

    /// The row to build the next point's disk on, if the shape is the same.
    pub fn row(
        &self,
        reader: &Reader<'_>,
        scratch: &mut ReadScratch,
        shape: &TreeShape,
    ) -> Result<Option<Row>, RepositoryError> {
        match self.record.shape == *shape {
            true => Row::load(reader, &self.record, scratch).map(Some),
            false => Ok(None),
        }
    }
}

/// A restore point, open for reading.
pub struct PointReader {
    pub point: PointId,
    pub vm: VmName,
    pub kind: PointKind,
    pub taken_at: Timestamp,
    pub disks: Vec<RestoredDisk>,
    pub definition: Option<(String, Vec<u8>)>,
}

impl PointReader {
    /// Opens a live point. An expired one is `NotFound`, whoever asks.
    pub fn open(customer: &Customer, point: &PointId) -> Result<Self, RepositoryError> {
        let live = customer.with_state(|state| {
            state
                .points
                .get(point)
                .is_some_and(|row| row.state == PointState::Live && !row.void)
        });
        if !live {
            return Err(RepositoryError::new(
                RepositoryErrorKind::NotFound,
                point,
                "no such restore point, or it has expired",
            ));
        }
        let record = customer.record(point)?;
        Ok(PointReader {
            point: *point,
            vm: record.vm,
            kind: record.kind,
            taken_at: record.taken_at,
            disks: record
                .disks
                .into_iter()
                .map(|record| RestoredDisk { record })
                .collect(),
            definition: record
                .definition
                .map(|definition| (definition.file_name, definition.content)),
        })
    }

    /// Fails when the point has expired meanwhile: long readers ask now and then.
    pub fn still_live(&self, customer: &Customer) -> Result<(), RepositoryError> {
        customer.refresh()?;
        match customer.with_state(|state| {
            state
                .points
                .get(&self.point)
                .is_some_and(|row| row.state == PointState::Live)
        }) {
            true => Ok(()),
            false => Err(RepositoryError::new(
                RepositoryErrorKind::NotFound,
                self.point,
                "the restore point has expired while it was read",
            )),
        }
    }
}

/// How much an incremental or a full may trust what the index knows.
pub fn trust_of(kind: PointKind, begun_at: Timestamp) -> Trust {
    match kind {
        PointKind::Incremental => Trust::Index,
        PointKind::Full => Trust::CheckedSince(
            begun_at
                .checked_sub(jiff::SignedDuration::from_hours(24 * super::FRESH_DAYS))
                .unwrap_or(begun_at),
        ),
    }
}
