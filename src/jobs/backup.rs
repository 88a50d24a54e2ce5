//! Backing up one VM: begin, capture, read what is to be read, commit.
//!
//! Memory: a buffer of [`READ_BYTES`] and the compressor's a thread, two packs being filled, and
//! the packs that wait for the store.

use super::{JobError, Watch};
use crate::format::entry::{AuditBody, AuditedDisk, Purpose, VerifyMethod};
use crate::hypervisor::{Capture, CapturedDisk, Changes, Hypervisor, Outcome, Reading, SinceMark};
use crate::model::{DiskName, Extent, PointId, PointKind, TreeShape, VmName};
use crate::repository::{
    Begun, Committed, Customer, Difference, DiskAudit, DiskDraft, PointDraft, PointReader,
    ReadScratch, Reader, RepositoryError, Session, SpanDraft, Worker, span_extent, trust_of,
};
use jiff::Timestamp;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Chunks are read together up to this size; a larger chunk alone. A power of two, as chunks are.
///
/// QEMU answers reads of a running VM in the loop that also serves the guest's own requests: what
/// is asked for at once, the guest waits for. With 1 MiB the 99th percentile of its writes more than
/// doubled.
pub const READ_BYTES: usize = 256 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackupSettings {
    /// For disks that are seen for the first time.
    pub chunk_bytes: u32,
    pub threads: usize,
}

/// A restore point that stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackedUp {
    pub point: PointId,
    pub kind: PointKind,
    pub taken_at: Timestamp,
    pub expires_at: Timestamp,
    pub deadline: Timestamp,
    pub read_bytes: u64,
    pub stored_bytes: u64,
    pub disks_bytes: u64,
    pub seconds: u64,
    /// What an administrator should know: why a disk was read in full, and the like.
    pub notes: Vec<String>,
    /// What a full found of the tracking of changes, where it could be compared.
    pub audit: Option<AuditBody>,
}

/// Backs up a VM. An incremental whose base has gone meanwhile, or cannot be read, becomes a full;
/// so does one of a VM whose tracking is distrusted.
///
/// On any error nothing of the attempt is listed, and its session is aborted in the ledger unless
/// its outcome is not known; then the next run decides.
pub fn backup_vm(
    customer: &Customer,
    vm: &VmName,
    source: &dyn Hypervisor,
    kind: PointKind,
    settings: &BackupSettings,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<BackedUp, JobError> {
    let left = source.recover()?;
    backup_recovered(customer, vm, source, kind, settings, watch, stop, &left)
        // Also in a night that fails.
        .map_err(|error| left.iter().fold(error, JobError::and))
}

#[expect(clippy::too_many_arguments)]
fn backup_recovered(
    customer: &Customer,
    vm: &VmName,
    source: &dyn Hypervisor,
    kind: PointKind,
    settings: &BackupSettings,
    watch: &dyn Watch,
    stop: &AtomicBool,
    left: &[String],
) -> Result<BackedUp, JobError> {
    customer.refresh()?;
    let mut notes = left.to_vec();
    if kind == PointKind::Incremental {
        let distrusted = customer.with_state(|state| state.is_distrusted(vm));
        match base(customer, vm) {
            Ok(Some(_)) if distrusted => notes.push(
                "taken as a full: the tracking of changes hid some, and no audit has been clean \
                 since"
                    .to_string(),
            ),
            Ok(Some(base)) => {
                let attempt = attempt(
                    customer,
                    vm,
                    source,
                    Before::Base(&base),
                    &notes,
                    settings,
                    watch,
                    stop,
                );
                match attempt {
                    Err(error) if error.is_superseded() => notes.push(format!(
                        "taken as a full: what the incremental stood on changed ({error})"
                    )),
                    Err(error) if error.is_of_one_object() => {
                        customer.doubt_all_packs();
                        notes.push(cannot_be_built_upon(&error));
                    }
                    other => return other,
                }
            }
            Ok(None) => notes.push("taken as a full: there is no point to build upon".to_string()),
            Err(error) if error.is_of_one_object() => {
                customer.doubt_all_packs();
                notes.push(cannot_be_built_upon(&error));
            }
            Err(error) => return Err(error.into()),
        }
    }
    let full = || {
        let mut notes = notes.clone();
        let audited = audited(customer, vm, &mut notes);
        let before = audited.as_ref().map_or(Before::Nothing, Before::Audited);
        attempt(customer, vm, source, before, &notes, settings, watch, stop)
    };
    match full() {
        // Packs it deduplicated against were condemned meanwhile: once more, against what is left.
        Err(error) if error.is_superseded() => full(),
        other => other,
    }
}

/// The VM's newest point, as far as it matters to the next one.
#[derive(Clone, Copy)]
enum Before<'a> {
    Nothing,
    /// An incremental is built on it.
    Base(&'a PointReader),
    /// A full is held against it, to see whether an incremental would have been right.
    Audited(&'a PointReader),
}

impl<'a> Before<'a> {
    fn base(self) -> Option<&'a PointReader> {
        match self {
            Before::Base(base) => Some(base),
            Before::Nothing | Before::Audited(_) => None,
        }
    }

    /// Disks of the newest point that are not captured.
    fn disks_without(self, captured: &[&dyn CapturedDisk]) -> Vec<&'a DiskName> {
        let (Before::Base(point) | Before::Audited(point)) = self else {
            return Vec::new();
        };
        point
            .disks
            .iter()
            .map(|known| known.name())
            .filter(|name| captured.iter().all(|disk| disk.name() != *name))
            .collect()
    }

    /// What the source is told of it. A full reads in chunks of its own, whatever was before.
    fn since(self, full_chunk_bytes: u32) -> Vec<SinceMark> {
        let (point, alignment_bytes) = match self {
            Before::Nothing => return Vec::new(),
            Before::Base(base) => (base, None),
            Before::Audited(point) => (point, Some(full_chunk_bytes)),
        };
        point
            .disks
            .iter()
            .map(|disk| SinceMark {
                disk: disk.name().clone(),
                size_bytes: disk.shape().size_bytes,
                alignment_bytes: alignment_bytes.unwrap_or(disk.shape().chunk_bytes),
                mark: disk.mark().map(str::to_string),
            })
            .collect()
    }
}

/// The point that a full is held against, if changes were tracked since. A full never fails for
/// want of it.
fn audited(customer: &Customer, vm: &VmName, notes: &mut Vec<String>) -> Option<PointReader> {
    match base(customer, vm) {
        Ok(point) => point.filter(|point| point.disks.iter().any(|disk| disk.mark().is_some())),
        Err(error) => {
            notes.push(format!(
                "tracking not audited: the newest restore point cannot be opened ({error})"
            ));
            None
        }
    }
}

fn cannot_be_built_upon(error: &dyn std::fmt::Display) -> String {
    format!("taken as a full: the newest restore point cannot be built upon ({error})")
}

fn base(customer: &Customer, vm: &VmName) -> Result<Option<PointReader>, RepositoryError> {
    customer
        .base(vm)
        .map(|point| PointReader::open(customer, &point))
        .transpose()
}

#[expect(clippy::too_many_arguments)]
fn attempt(
    customer: &Customer,
    vm: &VmName,
    source: &dyn Hypervisor,
    before: Before<'_>,
    notes: &[String],
    settings: &BackupSettings,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<BackedUp, JobError> {
    let started = Instant::now();
    let point = PointId::from_bytes(crate::codec::random_bytes());
    let since = before.since(settings.chunk_bytes);
    let reading = match before {
        Before::Base(_) => Reading::Changes,
        Before::Nothing | Before::Audited(_) => Reading::Everything,
    };
    let begun = customer.begin(Purpose::Backup, Some((vm, point)))?;
    // The capture after the `begin`: the instant lies inside of the session.
    let result = source
        .open(&since, reading)
        .map_err(JobError::from)
        .and_then(|capture| {
            let pass = Pass {
                customer,
                begun: &begun,
                capture: &*capture,
                before,
                settings,
                watch,
                stop,
                started,
            };
            let result = pass.write(vm, point, notes);
            let outcome = match &result {
                Ok(_) => Outcome::Committed,
                // It may stand: what either outcome needs of the tracking is kept.
                Err(error) if error.is_uncertain() => Outcome::Unknown,
                Err(_) => Outcome::Abandoned,
            };
            match (result, capture.close(outcome)) {
                (Ok(mut done), Err(error)) => {
                    done.notes.push(format!("after the commit: {error}"));
                    Ok(done)
                }
                (Err(error), Err(second)) => Err(error.and(format_args!(
                    "cleaning up after it failed as well: {second}"
                ))),
                (result, Ok(())) => result,
            }
        });
    match result {
        Err(error) if error.is_uncertain() => Err(error),
        Err(error) => match customer.abort(&begun.id, &error.to_string()) {
            Ok(()) => Err(error),
            // What failed first is what the caller must hear; the next run ends the session.
            Err(second) => {
                Err(error.and(format_args!("ending its session failed as well: {second}")))
            }
        },
        done => done,
    }
}

/// One reading of all disks in one session.
struct Pass<'a> {
    customer: &'a Customer,
    begun: &'a Begun,
    capture: &'a dyn Capture,
    before: Before<'a>,
    settings: &'a BackupSettings,
    watch: &'a dyn Watch,
    stop: &'a AtomicBool,
    started: Instant,
}

/// A disk on its way into the store.
struct DiskWork<'a> {
    disk: &'a dyn CapturedDisk,
    draft: DiskDraft,
    /// `None`: everything. Rounded to whole chunks, sorted, disjoint.
    changed: Option<Vec<Extent>>,
    /// Of a full, if what tracking implies is known.
    audit: Option<DiskAudit>,
}

impl Pass<'_> {
    fn write(&self, vm: &VmName, point: PointId, notes: &[String]) -> Result<BackedUp, JobError> {
        let kind = match self.before.base() {
            Some(_) => PointKind::Incremental,
            None => PointKind::Full,
        };
        let session = self
            .customer
            .session(self.begun, trust_of(kind, self.begun.begun_at))?;
        let reader =
            Reader::with_index(self.customer, session.index().clone()).from_copies_that_stand();
        let mut notes = notes.to_vec();
        notes.extend_from_slice(self.capture.notes());
        let mut scratch = ReadScratch::new()?;
        let captured = self.capture.disks();
        let mut works = captured
            .iter()
            .map(|disk| self.plan_disk(*disk, &reader, &mut scratch, &mut notes))
            .collect::<Result<Vec<DiskWork<'_>>, JobError>>()?;
        for gone in self.before.disks_without(&captured) {
            notes.push(format!("{gone}: not in this point, because the VM does not have it any more, or it is excluded"));
        }
        let read_bytes = self.write_spans(vm, &session, &reader, &works)?;
        self.capture.still_consistent()?;
        let audit = self.finish_audits(&mut works, &mut notes);

        let mut worker = session.worker()?;
        let disks_bytes = works.iter().map(|work| work.disk.size_bytes()).sum();
        let disks = works
            .into_iter()
            .map(|work| {
                session.finish_disk(&mut worker, work.disk.name(), work.draft, work.disk.mark())
            })
            .collect::<Result<Vec<_>, RepositoryError>>()?;
        session.retire(worker);
        let (whole, damaged) = session.checked_packs()?;
        if !damaged.is_empty() {
            notes.push(format!(
                "{} damaged pieces found in the store; what this VM has of them was stored anew",
                damaged.len()
            ));
        }
        let draft = PointDraft {
            point,
            vm: vm.clone(),
            kind,
            base: self.before.base().map(|base| base.point),
            consistency: self.capture.consistency().as_str().to_string(),
            notes: notes.clone(),
            definition: self
                .capture
                .definition()
                .map(|(name, content)| (name.to_string(), content.to_vec())),
            audit: audit.clone(),
        };
        let committed: Committed = self.customer.commit(self.begun, &session, draft, disks)?;
        if !(whole.is_empty() && damaged.is_empty())
            && let Err(error) =
                self.customer
                    .note_verification(VerifyMethod::Checksum, &whole, &damaged)
        {
            notes.push(format!(
                "what was verified on the way is not noted: {error}"
            ));
        }
        Ok(BackedUp {
            point,
            kind,
            taken_at: committed.taken_at,
            expires_at: committed.expires_at,
            deadline: committed.deadline,
            read_bytes,
            stored_bytes: committed.stored_bytes,
            disks_bytes,
            seconds: self.started.elapsed().as_secs(),
            notes,
            audit,
        })
    }

    /// What of a disk is read, and on what it builds.
    fn plan_disk<'d>(
        &self,
        disk: &'d dyn CapturedDisk,
        reader: &Reader<'_>,
        scratch: &mut ReadScratch,
        notes: &mut Vec<String>,
    ) -> Result<DiskWork<'d>, JobError> {
        let base = self.before.base();
        let before =
            base.and_then(|base| base.disks.iter().find(|known| known.name() == disk.name()));
        let shape = TreeShape {
            size_bytes: disk.size_bytes(),
            chunk_bytes: before
                .map_or(self.settings.chunk_bytes, |known| known.shape().chunk_bytes),
        };
        let full = |reason: Option<String>, notes: &mut Vec<String>| {
            if let Some(reason) = reason {
                notes.push(format!("{}: read in full ({reason})", disk.name()));
            }
            Ok(DiskWork {
                disk,
                draft: DiskDraft::new(shape, None)?,
                changed: None,
                audit: None,
            })
        };
        if base.is_none() {
            let audit = self.plan_audit(disk, &shape, reader, scratch, notes);
            return full(None, notes).map(|work| DiskWork { audit, ..work });
        }
        let Some(before) = before else {
            return full(Some("a new disk".to_string()), notes);
        };
        match disk.changes() {
            Changes::Unknown(reason) => full(Some(reason.clone()), notes),
            Changes::Extents(extents) => match before.row(reader, scratch, &shape)? {
                None => full(Some("its size changed".to_string()), notes),
                Some(row) => Ok(DiskWork {
                    disk,
                    draft: DiskDraft::new(shape, Some(row))?,
                    changed: Some(whole_chunks(extents, &shape)),
                    audit: None,
                }),
            },
        }
    }

    /// What a disk of a full is held against: what the newest point and the changes since imply.
    fn plan_audit(
        &self,
        disk: &dyn CapturedDisk,
        shape: &TreeShape,
        reader: &Reader<'_>,
        scratch: &mut ReadScratch,
        notes: &mut Vec<String>,
    ) -> Option<DiskAudit> {
        let Before::Audited(point) = self.before else {
            return None;
        };
        let known = point
            .disks
            .iter()
            .find(|known| known.name() == disk.name() && known.mark().is_some())?;
        let reason = match disk.changes() {
            Changes::Unknown(reason) => reason.clone(),
            Changes::Extents(extents) => match known.row(reader, scratch, shape) {
                Ok(Some(row)) => {
                    let changed = whole_chunks(extents, shape);
                    return Some(DiskAudit::new(*shape, row, changed));
                }
                Ok(None) => "its size or chunk size changed".to_string(),
                Err(error) => error.to_string(),
            },
        };
        notes.push(format!("{}: tracking not audited ({reason})", disk.name()));
        None
    }

    /// What the audits of all disks found; `None` where none could be done.
    fn finish_audits(
        &self,
        works: &mut [DiskWork<'_>],
        notes: &mut Vec<String>,
    ) -> Option<AuditBody> {
        let Before::Audited(point) = self.before else {
            return None;
        };
        let mut disks = Vec::new();
        for work in works {
            let Some(audit) = work.audit.take() else {
                continue;
            };
            let name = work.disk.name();
            match audit.finish() {
                Ok(difference) => {
                    if difference.bytes > 0 {
                        notes.push(format!("{name}: {}", hidden(&difference)));
                    }
                    disks.push(AuditedDisk {
                        name: name.clone(),
                        differing_bytes: difference.bytes,
                    });
                }
                Err(error) => notes.push(format!("{name}: tracking not audited ({error})")),
            }
        }
        (!disks.is_empty()).then_some(AuditBody {
            against: point.point,
            disks,
        })
    }

    /// Threads take spans of all disks in order. Returns how many bytes were read.
    fn write_spans(
        &self,
        vm: &VmName,
        session: &Session<'_>,
        reader: &Reader<'_>,
        works: &[DiskWork<'_>],
    ) -> Result<u64, JobError> {
        let spans: Vec<(usize, usize)> = works
            .iter()
            .enumerate()
            .flat_map(|(at, work)| work.spans().map(move |span| (at, span)))
            .collect();
        let total = spans
            .iter()
            .filter_map(|(at, span)| Some(span_extent(works.get(*at)?.draft.shape(), *span).length))
            .sum();
        self.watch.stage(vm.as_str(), total);
        let next = AtomicUsize::new(0);
        let read_bytes = AtomicU64::new(0);
        let failure: Mutex<Option<JobError>> = Mutex::new(None);
        let failed = AtomicBool::new(false);
        let fail = |error: JobError| {
            failed.store(true, Ordering::Relaxed);
            failure
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(error);
        };
        let threads = self.settings.threads.clamp(1, spans.len().max(1));
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let writer = SpanWriter::new(session, reader, self.watch);
                    let mut writer = match writer {
                        Ok(writer) => writer,
                        Err(error) => return fail(error),
                    };
                    while let Some((at, span)) = spans.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if failed.load(Ordering::Relaxed) {
                            break;
                        }
                        if self.stop.load(Ordering::Relaxed) {
                            return fail(JobError::interrupted());
                        }
                        let Some(work) = works.get(*at) else { break };
                        match writer.write(work, *span) {
                            Ok(read) => {
                                read_bytes.fetch_add(read, Ordering::Relaxed);
                                let extent = span_extent(work.draft.shape(), *span);
                                self.watch.advance(extent.length);
                            }
                            Err(error) => return fail(error),
                        }
                    }
                    session.retire(writer.worker);
                });
            }
        });
        match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(read_bytes.into_inner()),
        }
    }
}

impl DiskWork<'_> {
    /// The spans to be written, in disk order.
    fn spans(&self) -> Box<dyn Iterator<Item = usize> + '_> {
        let Some(changed) = &self.changed else {
            return Box::new(0..self.draft.span_count());
        };
        let span_bytes = span_extent(self.draft.shape(), 0).length.max(1);
        let mut last = None;
        Box::new(
            changed
                .iter()
                .flat_map(move |extent| {
                    let first = extent.offset / span_bytes;
                    let end = extent.end().div_ceil(span_bytes);
                    first..end
                })
                .filter(move |span| last.replace(*span) != Some(*span))
                .map(|span| span as usize),
        )
    }
}

/// What one thread writes spans with.
struct SpanWriter<'a> {
    watch: &'a dyn Watch,
    session: &'a Session<'a>,
    reader: &'a Reader<'a>,
    worker: Worker,
    scratch: ReadScratch,
    buffer: Vec<u8>,
}

impl<'a> SpanWriter<'a> {
    fn new(
        session: &'a Session<'a>,
        reader: &'a Reader<'a>,
        watch: &'a dyn Watch,
    ) -> Result<Self, JobError> {
        Ok(SpanWriter {
            watch,
            session,
            reader,
            worker: session.worker()?,
            scratch: ReadScratch::new()?,
            buffer: Vec::new(),
        })
    }

    /// Returns how many bytes were read.
    fn write(&mut self, work: &DiskWork<'_>, span: usize) -> Result<u64, JobError> {
        let shape = work.draft.shape();
        let whole = span_extent(shape, span);
        let changed: Vec<Extent> = match &work.changed {
            None => vec![whole],
            Some(changed) => {
                let first = changed.partition_point(|extent| extent.end() <= whole.offset);
                changed
                    .iter()
                    .skip(first)
                    .map_while(|extent| extent.intersection(&whole))
                    .collect()
            }
        };
        let mut draft = work
            .draft
            .begin_span(self.reader, &mut self.scratch, span)?;
        let mut read = 0;
        for extent in changed {
            let runs = whole_chunks(&work.disk.allocated(extent)?, shape);
            // Where nothing is allocated there are zeros, whatever the base had there.
            for chunk in chunks_of(&extent, shape) {
                draft.hole(child_of(chunk));
            }
            for run in runs.iter().filter_map(|run| run.intersection(&extent)) {
                read += self.write_run(work.disk, shape, &run, &mut draft)?;
            }
        }
        let ended = work.draft.end_span(self.session, &mut self.worker, draft)?;
        if let Some(audit) = &work.audit {
            audit.compare(self.reader, &mut self.scratch, &ended);
        }
        Ok(read)
    }

    /// Reads a run of whole chunks and stores them.
    fn write_run(
        &mut self,
        disk: &dyn CapturedDisk,
        shape: &TreeShape,
        run: &Extent,
        draft: &mut SpanDraft,
    ) -> Result<u64, JobError> {
        let chunk_bytes = u64::from(shape.chunk_bytes);
        let read_bytes = READ_BYTES.max(shape.chunk_bytes as usize);
        self.buffer.resize(read_bytes, 0);
        let mut offset = run.offset;
        while offset < run.end() {
            let length = (run.end() - offset).min(read_bytes as u64);
            let part = self
                .buffer
                .get_mut(..length as usize)
                .expect("at most the length of the buffer");
            self.watch.may_read(length);
            disk.read_at(offset, part)?;
            for (at, plain) in part.chunks(shape.chunk_bytes as usize).enumerate() {
                let chunk = offset / chunk_bytes + at as u64;
                draft.put(self.session, &mut self.worker, child_of(chunk), plain)?;
            }
            offset += length;
        }
        Ok(run.length)
    }
}

/// Says what an audit found, with the first places of it.
fn hidden(difference: &Difference) -> String {
    let told: u64 = difference.extents.iter().map(|extent| extent.length).sum();
    let mut places: Vec<String> = difference
        .extents
        .iter()
        .map(|extent| format!("{}+{}", extent.offset, extent.length))
        .collect();
    if told < difference.bytes {
        places.push("…".to_string());
    }
    format!(
        "tracking hid changes: {} bytes differ outside of what it reported (offset+length: {})",
        difference.bytes,
        places.join(", ")
    )
}

/// The place of a chunk among the children of its lowest node.
fn child_of(chunk: u64) -> usize {
    (chunk % crate::model::FAN_OUT as u64) as usize
}

fn chunks_of(extent: &Extent, shape: &TreeShape) -> std::ops::Range<u64> {
    let chunk_bytes = u64::from(shape.chunk_bytes);
    extent.offset / chunk_bytes..extent.end().div_ceil(chunk_bytes)
}

/// Extents rounded out to whole chunks of the disk, joined where they meet. Sorted input.
fn whole_chunks(extents: &[Extent], shape: &TreeShape) -> Vec<Extent> {
    let chunk_bytes = u64::from(shape.chunk_bytes);
    let mut rounded: Vec<Extent> = Vec::with_capacity(extents.len());
    for extent in extents {
        let start = (extent.offset / chunk_bytes).saturating_mul(chunk_bytes);
        let end = extent
            .end()
            .div_ceil(chunk_bytes)
            .saturating_mul(chunk_bytes)
            .min(shape.size_bytes);
        if extent.length == 0 || start >= end {
            continue;
        }
        match rounded.last_mut() {
            Some(last) if last.end() >= start => last.length = end.max(last.end()) - last.offset,
            _ => rounded.push(Extent::new(start, end - start)),
        }
    }
    rounded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_rounded_out_to_chunks_and_never_past_the_disk() {
        let shape = TreeShape {
            size_bytes: 5 * 65536 + 100,
            chunk_bytes: 65536,
        };
        let rounded = whole_chunks(
            &[
                Extent::new(10, 20),
                Extent::new(65535, 2),
                Extent::new(3 * 65536, 65536),
                Extent::new(5 * 65536 + 50, 1000),
                Extent::new(u64::MAX - 3, 3),
            ],
            &shape,
        );
        assert_eq!(
            rounded,
            [
                Extent::new(0, 2 * 65536),
                Extent::new(3 * 65536, 65536),
                Extent::new(5 * 65536, 100),
            ]
        );
        assert!(whole_chunks(&[Extent::new(7, 0)], &shape).is_empty());
    }
}
