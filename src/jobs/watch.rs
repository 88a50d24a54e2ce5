/// Who follows a job that takes time, and may hold it back. Called from several threads.
pub trait Watch: Send + Sync {
    /// A stage begins; `total_bytes` may be a guess, and comes to an end all the same.
    fn stage(&self, label: &str, total_bytes: u64);
    fn advance(&self, bytes: u64);
    /// Returns when so many bytes may be read of a disk.
    fn may_read(&self, _bytes: u64) {}
}

/// Nobody.
pub struct Quiet;

impl Watch for Quiet {
    fn stage(&self, _label: &str, _total_bytes: u64) {}
    fn advance(&self, _bytes: u64) {}
}
