//! What the bitmaps of a disk tell about the time since the newest restore point. Pure.
//!
//! Each capture starts a bitmap of its own and stops the one before, in one transaction. Names are
//! `vmkeep-<owner>-<own>-<previous>`, where `own` is random: a name is never used twice, and an
//! image that was rolled back or cloned has another one than the point expects. While the outcome
//! of a capture is open both bitmaps stay; the mark of the newest point says later which counts:
//!
//! - the stopped one: the point was never made. What the newer one recorded is merged into it.
//! - the recording one: the point stands. The stopped one is history.

use super::machine::Node;
use crate::hypervisor::SinceMark;
use serde::{Deserialize, Serialize};

const MARK_VERSION: u32 = 1;

/// What a restore point keeps of a disk's tracking.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Mark {
    qmp: u32,
    /// The bitmap that records since the instant of the point.
    pub bitmap: String,
    pub granularity: u64,
}

impl Mark {
    pub(super) fn new(bitmap: &str, granularity: u64) -> Self {
        Mark {
            qmp: MARK_VERSION,
            bitmap: bitmap.to_string(),
            granularity,
        }
    }

    pub(super) fn text(&self) -> Option<String> {
        serde_json::to_string(self).ok()
    }
}

pub(super) fn prefix(owner: &str) -> String {
    format!("vmkeep-{owner}-")
}

/// The name of the bitmap that follows `previous`.
pub(super) fn successor(owner: &str, own: &str, previous: Option<&str>) -> String {
    let previous = previous
        .and_then(|name| own_part(owner, name))
        .unwrap_or("0");
    format!("{}{own}-{previous}", prefix(owner))
}

fn own_part<'a>(owner: &str, name: &'a str) -> Option<&'a str> {
    let (own, _) = name.strip_prefix(&prefix(owner))?.split_once('-')?;
    Some(own)
}

fn previous_part<'a>(owner: &str, name: &'a str) -> Option<&'a str> {
    let (_, previous) = name.strip_prefix(&prefix(owner))?.split_once('-')?;
    Some(previous)
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Known {
    /// What was written since the newest point is in this bitmap, once `merge` (which recorded
    /// while it was stopped) has been merged into it.
    Since {
        bitmap: String,
        granularity: u64,
        merge: Option<String>,
    },
    Nothing(String),
}

/// What is to be done with a disk's bitmaps before a capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tracking {
    pub known: Known,
    /// Ours, and needed by nobody any more.
    pub stale: Vec<String>,
}

pub(super) fn track(owner: &str, node: &Node, since: Option<&SinceMark>) -> Tracking {
    let known = known(owner, node, since);
    let stale = node
        .bitmaps
        .iter()
        .filter(|bitmap| bitmap.name.starts_with(&prefix(owner)) && !bitmap.busy)
        .map(|bitmap| bitmap.name.clone())
        .filter(|name| match &known {
            Known::Since { bitmap, merge, .. } => name != bitmap && Some(name) != merge.as_ref(),
            Known::Nothing(_) => true,
        })
        .collect();
    Tracking { known, stale }
}

fn known(owner: &str, node: &Node, since: Option<&SinceMark>) -> Known {
    let nothing = |reason: &str| Known::Nothing(reason.to_string());
    let Some(since) = since else {
        return nothing("the newest point does not have this disk");
    };
    let Some(mark) = &since.mark else {
        return nothing("nothing was tracked since the newest point");
    };
    let Ok(mark) = serde_json::from_str::<Mark>(mark) else {
        return nothing("the newest point was taken in another way");
    };
    if mark.qmp != MARK_VERSION {
        return nothing("the newest point's mark is of another version");
    }
    if since.size_bytes != node.size_bytes {
        return Known::Nothing(format!(
            "its size changed from {} to {} bytes",
            since.size_bytes, node.size_bytes
        ));
    }
    let Some(found) = node
        .bitmaps
        .iter()
        .find(|bitmap| bitmap.name == mark.bitmap)
    else {
        return nothing(match node.keeps_bitmaps {
            true => {
                "its bitmap is gone: QEMU was killed, a snapshot was taken, the image was \
                 replaced or rolled back, or tracking was released"
            }
            false => {
                "its bitmap is gone: this image cannot store one, and QEMU was restarted or the \
                 image replaced"
            }
        });
    };
    if found.inconsistent {
        return nothing("its bitmap is inconsistent: QEMU was killed or crashed");
    }
    if found.granularity != mark.granularity {
        return nothing("its bitmap is another one than the newest point recorded");
    }
    if found.busy {
        return nothing("its bitmap is in use by another program");
    }
    let since = |merge: Option<String>| Known::Since {
        bitmap: found.name.clone(),
        granularity: found.granularity,
        merge,
    };
    if found.recording {
        return since(None);
    }
    let own = own_part(owner, &found.name);
    let newer = node.bitmaps.iter().find(|bitmap| {
        own.is_some()
            && previous_part(owner, &bitmap.name) == own
            && bitmap.recording
            && !bitmap.inconsistent
            && !bitmap.busy
            && bitmap.granularity == found.granularity
    });
    match newer {
        Some(newer) => since(Some(newer.name.clone())),
        None => nothing("its bitmap was stopped, and nothing recorded since"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::machine::Bitmap;
    use super::*;
    use crate::model::DiskName;

    const OWNER: &str = "0123abcd";

    fn bitmap(name: &str, recording: bool) -> Bitmap {
        Bitmap {
            name: name.to_string(),
            recording,
            busy: false,
            inconsistent: false,
            granularity: 65536,
        }
    }

    fn node(bitmaps: Vec<Bitmap>) -> Node {
        Node {
            driver: "qcow2".to_string(),
            filename: "x".to_string(),
            size_bytes: 100,
            read_only: false,
            keeps_bitmaps: true,
            write_threshold: 0,
            bitmaps,
        }
    }

    fn since(bitmap: &str) -> SinceMark {
        SinceMark {
            disk: DiskName::new("vd0").unwrap(),
            size_bytes: 100,
            alignment_bytes: 65536,
            mark: Mark::new(bitmap, 65536).text(),
        }
    }

    fn names() -> (String, String, String) {
        let first = successor(OWNER, "aa", None);
        let second = successor(OWNER, "bb", Some(&first));
        let third = successor(OWNER, "cc", Some(&second));
        (first, second, third)
    }

    fn is_nothing(tracking: &Tracking) -> bool {
        matches!(tracking.known, Known::Nothing(_))
    }

    #[test]
    fn the_bitmap_of_the_newest_point_counts_and_older_ones_are_stale() {
        let (first, second, _) = names();
        let node = node(vec![bitmap(&first, false), bitmap(&second, true)]);
        let tracking = track(OWNER, &node, Some(&since(&second)));
        assert_eq!(
            tracking,
            Tracking {
                known: Known::Since {
                    bitmap: second,
                    granularity: 65536,
                    merge: None
                },
                stale: vec![first],
            }
        );
    }

    #[test]
    fn a_point_that_was_never_made_loses_no_change() {
        let (first, second, _) = names();
        let node = node(vec![bitmap(&first, false), bitmap(&second, true)]);
        let tracking = track(OWNER, &node, Some(&since(&first)));
        assert_eq!(
            tracking,
            Tracking {
                known: Known::Since {
                    bitmap: first,
                    granularity: 65536,
                    merge: Some(second)
                },
                stale: Vec::new(),
            }
        );
    }

    #[test]
    fn only_the_direct_successor_fills_the_gap_of_a_stopped_bitmap() {
        let (first, _, third) = names();
        let node = node(vec![bitmap(&first, false), bitmap(&third, true)]);
        let tracking = track(OWNER, &node, Some(&since(&first)));
        assert!(is_nothing(&tracking));
        assert_eq!(tracking.stale, [first, third]);
    }

    #[test]
    fn everything_doubtful_is_a_full_read() {
        let (first, second, _) = names();
        let whole = since(&first);
        let broken = |change: fn(&mut Bitmap)| {
            let mut one = bitmap(&first, true);
            change(&mut one);
            node(vec![one])
        };
        for (what, node) in [
            ("gone", node(vec![])),
            ("another", node(vec![bitmap(&second, true)])),
            ("inconsistent", broken(|bitmap| bitmap.inconsistent = true)),
            ("granularity", broken(|bitmap| bitmap.granularity = 4096)),
            ("busy", broken(|bitmap| bitmap.busy = true)),
            ("stopped", broken(|bitmap| bitmap.recording = false)),
        ] {
            assert!(is_nothing(&track(OWNER, &node, Some(&whole))), "{what}");
        }
        let good = node(vec![bitmap(&first, true)]);
        assert!(is_nothing(&track(OWNER, &good, None)));
        let mut grown = whole.clone();
        grown.size_bytes = 99;
        assert!(is_nothing(&track(OWNER, &good, Some(&grown))));
        let mut marked = whole;
        for mark in [None, Some("{}".to_string()), Some("nonsense".to_string())] {
            marked.mark = mark;
            assert!(is_nothing(&track(OWNER, &good, Some(&marked))));
        }
    }

    #[test]
    fn bitmaps_of_others_are_never_touched() {
        let foreign = ["libvirt-1", "vmkeep-ffffffff-aa-0", "vmkeep-0123abcd", ""];
        let node = node(foreign.iter().map(|name| bitmap(name, true)).collect());
        assert!(track(OWNER, &node, None).stale.is_empty());
    }
}
