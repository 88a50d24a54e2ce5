use std::fmt;

/// How a restore point was captured. Both restore on their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PointKind {
    /// Every allocated byte of every disk was read.
    Full,
    /// What is known not to have changed since the base was taken over from it.
    Incremental,
}

impl fmt::Display for PointKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            PointKind::Full => "full",
            PointKind::Incremental => "incremental",
        })
    }
}

/// Where a restore point is on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PointState {
    /// Listed and restorable.
    Live,
    /// Unlisted and unreadable to every command; still a root; can be brought back by `undo`.
    Expired,
    /// Its record is destroyed.
    Erased,
}
