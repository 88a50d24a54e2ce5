use jiff::Timestamp;

/// The host's uptime, to compare two readings of the same boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootMark {
    /// The kernel's random id of this boot.
    pub boot_id: String,
    pub since_boot_seconds: u64,
}

/// What the host says of the time at one moment. Whether it is believed is a decision of `policy`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClockReading {
    /// Wall clock, cut to whole seconds.
    pub wall: Timestamp,
    /// The kernel says that its clock is synchronised (NTP, PTP).
    pub synchronised: bool,
    pub boot: Option<BootMark>,
}

/// The one way to the clock; implemented at the top and by tests.
pub trait Clock: Send + Sync {
    fn read(&self) -> ClockReading;
}
