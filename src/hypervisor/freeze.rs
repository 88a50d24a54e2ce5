use super::CaptureError;

/// Whether a guest's file systems are frozen by its agent for the instant of a capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freeze {
    /// No capture of a guest that cannot be frozen.
    Require,
    /// Frozen where it can be; else the capture shows what a loss of power would leave.
    Try,
    Never,
}

/// The note of a night that began with a thaw that failed.
pub(super) fn not_thawed(error: CaptureError) -> String {
    format!(
        "{error}. Each night tries again, until fsfreeze is \"never\", for a guest that does write \
         and whose agent can neither freeze nor thaw"
    )
}
