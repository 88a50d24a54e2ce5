/// A range of a disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Extent {
    pub offset: u64,
    pub length: u64,
}

impl Extent {
    pub const fn new(offset: u64, length: u64) -> Self {
        Extent { offset, length }
    }

    /// One past the last byte; saturates, so a hostile extent cannot wrap around.
    pub const fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    /// The part of `self` inside `other`, if any.
    pub fn intersection(&self, other: &Extent) -> Option<Extent> {
        let offset = self.offset.max(other.offset);
        let end = self.end().min(other.end());
        (offset < end).then(|| Extent::new(offset, end - offset))
    }
}
