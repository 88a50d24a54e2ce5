//! The mark of a disk: the checkpoint whose bitmap records changes since the capture, and the
//! images that the disk consisted of.

use super::domain::{Disk, Source};
use serde::{Deserialize, Serialize};

const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Mark {
    libvirt: u32,
    pub(super) checkpoint: String,
    /// Of the domain; one that was defined anew under its name is another.
    pub(super) domain: String,
    pub(super) target: String,
    /// The image that was written to, and those below it.
    pub(super) sources: Vec<String>,
    pub(super) size_bytes: u64,
}

impl Mark {
    pub(super) fn new(checkpoint: &str, domain: &str, disk: &Disk, size_bytes: u64) -> Self {
        Mark {
            libvirt: VERSION,
            checkpoint: checkpoint.to_string(),
            domain: domain.to_string(),
            target: disk.name.as_str().to_string(),
            sources: disk.chain().map(Source::identity).collect(),
            size_bytes,
        }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        serde_json::from_str(text)
            .ok()
            .filter(|mark: &Mark| mark.libvirt == VERSION)
    }

    /// `None` cannot happen to plain texts and numbers; without a mark the next reading is full.
    pub(super) fn text(&self) -> Option<String> {
        serde_json::to_string(self).ok()
    }

    /// Whether the disk has an image in common with what was marked. A snapshot puts an image on
    /// top, a commit takes one away; a disk that was replaced has none of them. That its bitmap
    /// goes all the way through the chain is libvirt's to check.
    pub(super) fn shares_an_image_with(&self, disk: &Disk) -> bool {
        disk.chain()
            .any(|source| self.sources.contains(&source.identity()))
    }
}
