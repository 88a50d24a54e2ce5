//! How long a frame will be needed, as far as that is known today.

use jiff::{SignedDuration, Timestamp};

/// Points that expire so close to the last one are the newest of their VMs, which are backed up in
/// one night at different times.
const NEWEST_WITHIN: SignedDuration = SignedDuration::from_hours(36);

/// Survivors of a reclaim are packed with their like: what dies together needs no rewriting in
/// between. A guest that overwrites 2 % of its disk every night has a third less rewritten for it
/// (`reclaim::simulation` counts it).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Lifetime {
    /// The newest points hold it: nobody knows how long they will.
    Open,
    /// The guest has overwritten it: it dies with the last point that holds it.
    Long,
    Short,
}

impl Lifetime {
    /// `held_until`: when the last point that holds the frame expires; `newest`: when the last point
    /// of all does.
    pub(super) fn of(held_until: Timestamp, newest: Timestamp, now: Timestamp) -> Self {
        let left = held_until.duration_since(now);
        let longest = newest.duration_since(now);
        match () {
            () if longest.saturating_sub(left) <= NEWEST_WITHIN => Lifetime::Open,
            () if left >= longest / 2 => Lifetime::Long,
            () => Lifetime::Short,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_point_that_holds_a_frame_tells_its_lifetime() {
        let now: Timestamp = "2031-02-10T23:00:00Z".parse().unwrap();
        let hours = |hours| now + SignedDuration::from_hours(hours);
        let of = |left| Lifetime::of(hours(left), hours(38 * 24), now);
        assert_eq!(of(38 * 24), Lifetime::Open);
        assert_eq!(of(37 * 24), Lifetime::Open);
        assert_eq!(of(36 * 24), Lifetime::Long);
        assert_eq!(of(19 * 24), Lifetime::Long);
        assert_eq!(of(18 * 24), Lifetime::Short);
        assert_eq!(of(-24), Lifetime::Short);
        // Nobody backs up any more, and all of it is over.
        assert_eq!(Lifetime::of(hours(-24), hours(-24), now), Lifetime::Open);
    }
}
