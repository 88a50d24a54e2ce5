//! One job, opened for reading.

use super::disk::{GoneFromExport, HandedDisk};
use super::job::{self, Job, JobDisk, Tracking};
use super::mark::{Use, context_of, judge, mark_of, refusal};
use crate::hypervisor::nbd::{BASE_ALLOCATION, Endpoint, NbdClient, NbdError};
use crate::hypervisor::nbd_disk::{NbdDisk, dirty, explained};
use crate::hypervisor::{
    Capture, CaptureError, CaptureErrorKind, CapturedDisk, Changes, Consistency, Outcome, Reading,
    SinceMark,
};
use crate::model::Extent;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

pub(super) struct HandedCapture {
    disks: Vec<HandedDisk>,
    definition: Option<(String, Vec<u8>)>,
    consistency: Consistency,
    notes: Vec<String>,
}

pub(super) fn open(
    file: &Path,
    since: &[SinceMark],
    reading: Reading,
    given_back: &Arc<AtomicBool>,
) -> Result<HandedCapture, CaptureError> {
    let Job {
        disks,
        definition,
        consistency,
    } = job::read(file)?;
    let mut notes = Vec::new();
    let disks = disks
        .into_iter()
        .map(|disk| open_disk(disk, since, reading, &mut notes, given_back))
        .collect::<Result<Vec<HandedDisk>, CaptureError>>()?;
    Ok(HandedCapture {
        disks,
        definition,
        consistency,
        notes,
    })
}

fn open_disk(
    disk: JobDisk,
    since: &[SinceMark],
    reading: Reading,
    notes: &mut Vec<String>,
    given_back: &Arc<AtomicBool>,
) -> Result<HandedDisk, CaptureError> {
    let JobDisk {
        name,
        socket,
        export,
        tracking,
        discard,
    } = disk;
    let shown = format!("{name} ({})", socket.display());
    let invalid = |detail: String| CaptureError::new(CaptureErrorKind::Invalid, &shown, detail);
    // Where only changes can be read, nothing else can be asked for: a status reply carries all
    // contexts, and the one of the whole disk is an error there.
    let (context, has_allocation) = match &tracking {
        Tracking::Reuse { bitmap, .. } => (context_of(bitmap), false),
        Tracking::New { .. } | Tracking::Nothing => (BASE_ALLOCATION.to_string(), true),
    };
    let endpoint = Endpoint::new(&socket, &export).with_context(context);
    let client = NbdClient::connect(endpoint).map_err(|error| unreachable_peer(error, &shown))?;
    let before = since.iter().find(|since| since.disk == name);
    let judged = judge(&tracking, client.size_bytes(), before, reading)
        .map_err(|reason| invalid(refusal(&reason)))?;
    let changes = match judged {
        Use::Changed {
            context,
            alignment_bytes,
        } => {
            let changes = dirty(&client, &context)
                .map_err(|error| explained(&GoneFromExport, error, &shown))?;
            let extents = match changes {
                Changes::Extents(extents) => extents,
                Changes::Unknown(reason) => return Err(invalid(refusal(&reason))),
            };
            if !is_aligned(&extents, client.size_bytes(), alignment_bytes) {
                return Err(invalid(refusal(&format!(
                    "its bitmap is finer than the chunks of its restore points ({} KiB), which are \
                     read whole: make bitmaps with that granularity or a coarser one",
                    alignment_bytes >> 10
                ))));
            }
            Changes::Extents(extents)
        }
        Use::Whole(reason) => Changes::Unknown(reason.to_string()),
    };
    if discard && !client.can_trim() {
        notes.push(format!(
            "{name}: the export cannot discard, so its fleecing image keeps what was read"
        ));
    }
    let gives_back = discard && client.can_trim();
    let disk = NbdDisk {
        name,
        shown,
        client,
        changes,
        mark: mark_of(&tracking),
        has_allocation,
        explain: Some(Box::new(GoneFromExport)),
    };
    Ok(HandedDisk::new(disk, gives_back, Arc::clone(given_back)))
}

fn unreachable_peer(error: NbdError, shown: &str) -> CaptureError {
    match &error {
        NbdError::Io(cause)
            if matches!(
                cause.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            CaptureError::new(
                CaptureErrorKind::Missing,
                shown,
                format!(
                    "nobody serves it ({cause}): the job has ended, or its file is left of one"
                ),
            )
        }
        _ => error.into_capture(shown),
    }
}

/// Whether extents begin and end at multiples of the alignment, or at the disk's end.
fn is_aligned(extents: &[Extent], size_bytes: u64, alignment_bytes: u32) -> bool {
    let alignment = u64::from(alignment_bytes);
    extents.iter().all(|extent| {
        extent.offset.is_multiple_of(alignment)
            && (extent.end().is_multiple_of(alignment) || extent.end() == size_bytes)
    })
}

impl Capture for HandedCapture {
    fn disks(&self) -> Vec<&dyn CapturedDisk> {
        self.disks
            .iter()
            .map(|disk| disk as &dyn CapturedDisk)
            .collect()
    }

    fn definition(&self) -> Option<(&str, &[u8])> {
        self.definition
            .as_ref()
            .map(|(name, content)| (name.as_str(), content.as_slice()))
    }

    fn consistency(&self) -> Consistency {
        self.consistency
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    /// A snapshot that was lost answers every read with an error, so what was read is of it.
    fn still_consistent(&self) -> Result<(), CaptureError> {
        Ok(())
    }

    /// The outcome is told by the exit code of vmkeep: whoever handed the job in ends it.
    fn close(self: Box<Self>, _: Outcome) -> Result<(), CaptureError> {
        self.disks
            .into_iter()
            .map(HandedDisk::close)
            .fold(Ok(()), Result::and)
    }
}

#[cfg(test)]
mod tests {
    use super::super::HandedSource;
    use super::*;
    use crate::hypervisor::Hypervisor;
    use crate::hypervisor::nbd::testing::{Dirty, TestServer};
    use serde_json::{Value, json};
    use std::fs;
    use std::os::unix::net::UnixListener;

    /// A source whose job has this disk beside its socket, and the server of it.
    fn handed_in(folder: &Path, mut disk: Value, dirty: Dirty) -> (HandedSource, TestServer) {
        let (socket, file) = (folder.join("s"), folder.join("101.json"));
        let listener = UnixListener::bind(&socket).unwrap();
        disk["socket"] = json!(socket);
        fs::write(&file, json!({"disks": {"scsi0": disk}}).to_string()).unwrap();
        let server = TestServer::start(listener, Arc::new(|_| Some(1 << 20)), dirty);
        (HandedSource::new(file), server)
    }

    #[test]
    fn after_something_was_given_back_there_is_no_second_attempt() {
        let folder = tempfile::tempdir().unwrap();
        let disk = json!({"export": "scsi0", "mode": "none", "discard": true});
        let (source, _server) = handed_in(folder.path(), disk, Dirty::Nothing);
        let open = || source.open(&[], Reading::Everything);
        // Nothing was read by this one.
        open().unwrap().close(Outcome::Abandoned).unwrap();
        let capture = open().unwrap();
        capture.disks()[0].read_at(0, &mut [0; 65536]).unwrap();
        capture.close(Outcome::Abandoned).unwrap();
        let error = open().err().expect("what was destroyed is not read");
        assert!(error.detail.contains("hand the job in anew"), "{error}");
    }

    #[test]
    fn a_reused_bitmap_too_scattered_to_be_told_asks_for_a_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let disk = json!({
            "export": "scsi0", "mode": "reuse", "bitmap": "b", "since": "g1", "generation": "g2",
        });
        let (source, _server) = handed_in(folder.path(), disk, Dirty::EveryOtherSector);
        let before = Tracking::New {
            bitmap: "b".to_string(),
            generation: Some("g1".to_string()),
        };
        let since = SinceMark {
            disk: "scsi0".parse().unwrap(),
            size_bytes: 1 << 20,
            alignment_bytes: 512,
            mark: mark_of(&before),
        };
        let opened = source.open(&[since], Reading::Changes);
        let error = opened.err().expect("nothing else can be read");
        assert!(error.detail.contains("scattered"), "{error}");
        assert!(error.detail.contains("\"new\""), "{error}");
    }

    #[test]
    fn changes_must_be_whole_chunks_but_at_the_end_of_the_disk() {
        let size = 3 * 65536 + 512;
        let aligned = |extents: &[Extent]| is_aligned(extents, size, 65536);
        assert!(aligned(&[]));
        assert!(aligned(&[
            Extent::new(0, 65536),
            Extent::new(2 * 65536, 65536 + 512)
        ]));
        assert!(!aligned(&[Extent::new(0, 4096)]));
        assert!(!aligned(&[Extent::new(4096, 61440)]));
        assert!(!aligned(&[Extent::new(0, 2 * 65536 + 512)]));
    }
}
