//! What a job may be used for. Pure.

use super::job::Tracking;
use crate::hypervisor::{Reading, SinceMark};
use serde::{Deserialize, Serialize};

const VERSION: u32 = 1;

/// What a restore point keeps of a disk: which capture of the peer it is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mark {
    handed: u32,
    bitmap: String,
    generation: String,
}

/// The mark of a disk that was handed in so; `None` where no later job can build on it.
pub(super) fn mark_of(tracking: &Tracking) -> Option<String> {
    match tracking {
        Tracking::Nothing => None,
        Tracking::New { bitmap, generation }
        | Tracking::Reuse {
            bitmap, generation, ..
        } => {
            let mark = Mark {
                handed: VERSION,
                bitmap: bitmap.clone(),
                generation: generation.clone()?,
            };
            serde_json::to_string(&mark).ok()
        }
    }
}

pub(super) fn context_of(bitmap: &str) -> String {
    format!("qemu:dirty-bitmap:{bitmap}")
}

/// How a disk is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Use {
    /// All of it; why, where a changed part would have done.
    Whole(&'static str),
    /// What its bitmap shows, in this metadata context; pieces of whole multiples of the alignment.
    Changed {
        context: String,
        alignment_bytes: u32,
    },
}

/// How a disk of this size may be read, or why not.
pub(super) fn judge(
    tracking: &Tracking,
    size_bytes: u64,
    since: Option<&SinceMark>,
    reading: Reading,
) -> Result<Use, String> {
    let Tracking::Reuse {
        bitmap,
        since: counts_from,
        ..
    } = tracking
    else {
        return Ok(Use::Whole(match tracking {
            Tracking::New { .. } => "it was handed in with a new bitmap",
            _ => "it was handed in without a bitmap",
        }));
    };
    if reading == Reading::Everything {
        return Err("a full backup is due, which reads everything".to_string());
    }
    let Some(since) = since else {
        return Err("the newest restore point does not have this disk".to_string());
    };
    let Some(text) = &since.mark else {
        return Err("the newest restore point was taken without a generation".to_string());
    };
    let mark = serde_json::from_str::<Mark>(text)
        .ok()
        .filter(|mark| mark.handed == VERSION);
    let Some(mark) = mark else {
        return Err("the newest restore point was taken in another way".to_string());
    };
    if mark.bitmap != *bitmap {
        return Err(format!(
            "the newest restore point was taken with the bitmap {:?}, not {bitmap:?}",
            mark.bitmap
        ));
    }
    if mark.generation != *counts_from {
        return Err(format!(
            "its bitmap counts from {counts_from:?}, but the newest restore point is of {:?}",
            mark.generation
        ));
    }
    if since.size_bytes != size_bytes {
        return Err(format!(
            "its size changed from {} to {size_bytes} bytes",
            since.size_bytes
        ));
    }
    Ok(Use::Changed {
        context: context_of(bitmap),
        alignment_bytes: since.alignment_bytes,
    })
}

/// What is to be done about a disk that was handed in for reuse, and cannot be.
pub(super) fn refusal(reason: &str) -> String {
    format!(
        "handed in with mode \"reuse\", which shows only what changed; but {reason}. Hand it in with \
         mode \"new\" (vmkeep run --dry-run tells beforehand whether a full is due)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::DiskName;

    fn reuse(bitmap: &str, since: &str) -> Tracking {
        Tracking::Reuse {
            bitmap: bitmap.to_string(),
            since: since.to_string(),
            generation: Some("g3".to_string()),
        }
    }

    fn new(generation: Option<&str>) -> Tracking {
        Tracking::New {
            bitmap: "b".to_string(),
            generation: generation.map(str::to_string),
        }
    }

    fn since() -> SinceMark {
        SinceMark {
            disk: DiskName::new("scsi0").unwrap(),
            size_bytes: 100,
            alignment_bytes: 65536,
            mark: mark_of(&new(Some("g2"))),
        }
    }

    #[test]
    fn a_reused_bitmap_that_counts_from_the_newest_point_gives_the_changes_since() {
        let since = since();
        assert_eq!(
            judge(&reuse("b", "g2"), 100, Some(&since), Reading::Changes),
            Ok(Use::Changed {
                context: "qemu:dirty-bitmap:b".to_string(),
                alignment_bytes: 65536,
            })
        );
    }

    #[test]
    fn a_reused_bitmap_that_fits_in_any_other_way_is_refused() {
        let fits = since();
        let changed = |change: fn(&mut SinceMark)| {
            let mut since = fits.clone();
            change(&mut since);
            Some(since)
        };
        let same = Some(fits.clone());
        for (tracking, size, since, reading, said) in [
            (
                reuse("b", "g2"),
                100,
                same.clone(),
                Reading::Everything,
                "a full backup is due",
            ),
            (
                reuse("b", "g2"),
                100,
                None,
                Reading::Changes,
                "does not have this disk",
            ),
            (
                reuse("b", "g1"),
                100,
                same.clone(),
                Reading::Changes,
                "counts from \"g1\"",
            ),
            (
                reuse("c", "g2"),
                100,
                same.clone(),
                Reading::Changes,
                "not \"c\"",
            ),
            (
                reuse("b", "g2"),
                101,
                same,
                Reading::Changes,
                "size changed from 100 to 101",
            ),
            (
                reuse("b", "g2"),
                100,
                changed(|s| s.mark = None),
                Reading::Changes,
                "without a generation",
            ),
            (
                reuse("b", "g2"),
                100,
                changed(|s| s.mark = Some("{}".into())),
                Reading::Changes,
                "in another way",
            ),
            (
                reuse("b", "g2"),
                100,
                changed(|s| s.mark = Some(r#"{"handed":2,"bitmap":"b","generation":"g2"}"#.into())),
                Reading::Changes,
                "in another way",
            ),
        ] {
            let error = judge(&tracking, size, since.as_ref(), reading).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn without_a_bitmap_of_the_past_a_disk_is_read_whole_whatever_is_known() {
        let since = since();
        for tracking in [Tracking::Nothing, new(None), new(Some("g9"))] {
            for reading in [Reading::Everything, Reading::Changes] {
                let judged = judge(&tracking, 1, Some(&since), reading);
                assert!(matches!(judged, Ok(Use::Whole(_))), "{judged:?}");
            }
        }
    }

    #[test]
    fn nobody_builds_on_a_capture_without_a_generation() {
        assert_eq!(mark_of(&Tracking::Nothing), None);
        assert_eq!(mark_of(&new(None)), None);
        assert!(mark_of(&new(Some("g"))).is_some());
    }
}
