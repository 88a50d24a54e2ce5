/// Whether a guest's file systems are frozen by its agent for the instant of a capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freeze {
    /// No capture of a guest that cannot be frozen.
    Require,
    /// Frozen where it can be; else the capture shows what a loss of power would leave.
    Try,
    Never,
}
