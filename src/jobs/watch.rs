/// Who follows a job that takes time. Called from several threads.
pub trait Watch: Send + Sync {
    /// A stage begins; `total_bytes` may be a guess, and comes to an end all the same.
    fn stage(&self, label: &str, total_bytes: u64);
    fn advance(&self, bytes: u64);
}

/// Nobody.
pub struct Quiet;

impl Watch for Quiet {
    fn stage(&self, _label: &str, _total_bytes: u64) {}
    fn advance(&self, _bytes: u64) {}
}
