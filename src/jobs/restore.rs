//! Writing a restore point's disks into targets, each chunk checked on its way.

use super::{JobError, JobErrorKind, Watch};
use crate::format::entry::{Body, RestoreBody, VerifyMethod};
use crate::hypervisor::target::{ImageTarget, SyncedTarget};
use crate::model::{DiskName, Extent, FAN_OUT, PackName};
use crate::repository::{
    Customer, DiskView, PointReader, ReadScratch, Reader, scrub_packs, span_extent,
};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A long restore asks this often whether its point still lives.
const LIVENESS_INTERVAL: Duration = Duration::from_secs(3600);

/// Where one disk goes.
pub struct RestoreTarget {
    pub disk: DiskName,
    pub target: Box<dyn ImageTarget>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Restored {
    /// Size of the disks.
    pub disks_bytes: u64,
    /// What was read, opened, checked and written.
    pub data_bytes: u64,
}

/// Writes down who restores what and why, before a byte is read.
pub fn note_restore(
    customer: &Customer,
    point: &PointReader,
    disks: &[DiskName],
    reason: &str,
) -> Result<(), JobError> {
    customer.append(|_| {
        Ok(Body::Restore(RestoreBody {
            point: point.point,
            vm: point.vm.clone(),
            disks: disks.to_vec(),
            reason: reason.to_string(),
        }))
    })?;
    Ok(())
}

/// Writes the disks. `Ok` means that every byte of every target was checked against its id, up to
/// the root that the point record names, and is on stable storage. On an error no target has
/// its name, except a device, which is then not to be used. What was damaged stands in the ledger
/// either way, so that the next full stores it anew.
pub fn restore(
    customer: &Customer,
    point: &PointReader,
    targets: Vec<RestoreTarget>,
    threads: usize,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<Restored, JobError> {
    let reader = Reader::new(customer)?.from_copies();
    // Those that read from a far store wait most of their time.
    let threads = threads.max(customer.storage().reads_at_once());
    let written = write_disks(customer, &reader, point, &targets, threads, watch, stop);
    let restored = match (written, note_damage(customer, &reader, threads, stop)) {
        (Err(error), Err(unnoted)) => {
            return Err(error.and(format!("what is damaged is not noted: {unnoted}")));
        }
        // The bytes are right: whoever reads the same frame next finds the damage again.
        (written, _) => written?,
    };
    JobError::unless_stopped(stop)?;
    // Names are given only when all disks are whole: half a VM must not look like one.
    let synced = targets
        .into_iter()
        .map(|RestoreTarget { target, .. }| target.sync());
    SyncedTarget::give_names(synced.collect::<Result<_, _>>()?)?;
    Ok(restored)
}

fn write_disks(
    customer: &Customer,
    reader: &Reader<'_>,
    point: &PointReader,
    targets: &[RestoreTarget],
    threads: usize,
    watch: &dyn Watch,
    stop: &AtomicBool,
) -> Result<Restored, JobError> {
    let mut restored = Restored::default();
    for RestoreTarget { disk, target } in targets {
        let record = point
            .disks
            .iter()
            .find(|known| known.name() == disk)
            .ok_or_else(|| {
                JobError::new(
                    JobErrorKind::NotFound,
                    format!("{}: the restore point has no disk {disk}", point.vm),
                )
            })?;
        let view = record.view(reader, &mut ReadScratch::new()?)?;
        let writing = DiskWriting {
            customer,
            point,
            view: &view,
            target: &**target,
            next: AtomicUsize::new(0),
            data_bytes: AtomicU64::new(0),
            failed: AtomicBool::new(false),
            failure: Mutex::new(None),
            asked: Mutex::new(Instant::now()),
            watch,
            stop,
        };
        watch.stage(&format!("{} {disk}", point.vm), view.shape().size_bytes);
        restored.data_bytes += writing.write(threads)?;
        restored.disks_bytes += view.shape().size_bytes;
    }
    Ok(restored)
}

/// A full believes a pack that was written of late. What did not open must not be believed, nor the rest of its
/// pack unread: a restore ends at the first frame, where a whole pack may be lost.
fn note_damage(
    customer: &Customer,
    reader: &Reader<'_>,
    threads: usize,
    stop: &AtomicBool,
) -> Result<(), JobError> {
    let failed = reader.failed_frames();
    if failed.is_empty() {
        return Ok(());
    }
    let packs: BTreeSet<PackName> = failed.iter().map(|(pack, _)| *pack).collect();
    let packs: Vec<PackName> = packs.into_iter().collect();
    // One that cannot be read for now keeps nobody from noting what is known.
    let scrubbed = scrub_packs(customer, &packs, threads, stop, &|_| {}).unwrap_or_default();
    let mut damaged: BTreeSet<_> = failed.into_iter().collect();
    damaged.extend(scrubbed.damaged);
    let damaged: Vec<_> = damaged.into_iter().collect();
    customer.note_verification(VerifyMethod::Opened, &[], &damaged)?;
    Ok(())
}

struct DiskWriting<'a> {
    customer: &'a Customer,
    point: &'a PointReader,
    view: &'a DiskView<'a>,
    target: &'a dyn ImageTarget,
    next: AtomicUsize,
    data_bytes: AtomicU64,
    failed: AtomicBool,
    failure: Mutex<Option<JobError>>,
    asked: Mutex<Instant>,
    watch: &'a dyn Watch,
    stop: &'a AtomicBool,
}

impl DiskWriting<'_> {
    fn write(self, threads: usize) -> Result<u64, JobError> {
        let threads = threads.clamp(1, self.view.span_count().max(1));
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    if let Err(error) = self.write_spans() {
                        self.failed.store(true, Ordering::Relaxed);
                        self.failure
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .get_or_insert(error);
                    }
                });
            }
        });
        match self
            .failure
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
        {
            Some(error) => Err(error),
            None => Ok(self.data_bytes.into_inner()),
        }
    }

    /// One thread's share: the next span in disk order, until there is none.
    fn write_spans(&self) -> Result<(), JobError> {
        let mut scratch = ReadScratch::new()?;
        loop {
            let span = self.next.fetch_add(1, Ordering::Relaxed);
            if span >= self.view.span_count() || self.failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            JobError::unless_stopped(self.stop)?;
            self.ask_whether_it_lives()?;
            self.write_span(span, &mut scratch)?;
            self.watch
                .advance(span_extent(self.view.shape(), span).length);
        }
    }

    fn write_span(&self, span: usize, scratch: &mut ReadScratch) -> Result<(), JobError> {
        let extent = span_extent(self.view.shape(), span);
        if self.view.row().is_hole(span) {
            return Ok(self.target.zero(extent)?);
        }
        let chunk_bytes = u64::from(self.view.shape().chunk_bytes);
        let mut written = [false; FAN_OUT];
        self.view.read_span(span, scratch, |offset, data| {
            let child = offset.saturating_sub(extent.offset) / chunk_bytes;
            if let Some(written) = written.get_mut(child as usize) {
                *written = true;
            }
            self.data_bytes
                .fetch_add(data.len() as u64, Ordering::Relaxed);
            // Each time: a slow disk takes long for what a span holds.
            JobError::unless_stopped(self.stop)?;
            self.target.write_at(offset, data).map_err(JobError::from)
        })?;
        let chunks = extent.length.div_ceil(chunk_bytes);
        for (child, written) in written.iter().enumerate().take(chunks as usize) {
            if !written {
                let hole = Extent::new(extent.offset + child as u64 * chunk_bytes, chunk_bytes);
                if let Some(hole) = hole.intersection(&extent) {
                    self.target.zero(hole)?;
                }
            }
        }
        Ok(())
    }

    fn ask_whether_it_lives(&self) -> Result<(), JobError> {
        let due = {
            let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
            let due = asked.elapsed() >= LIVENESS_INTERVAL;
            if due {
                *asked = Instant::now();
            }
            due
        };
        match due {
            true => Ok(self.point.still_live(self.customer)?),
            false => Ok(()),
        }
    }
}
