//! Nights: how instants are counted. Every other part of `policy` counts in them.
//!
//! A night is the local date on which its window starts. It owns all instants from there to the start of the next
//! night's window, so a point that is caught up at noon still belongs to the night it was owed for.

use std::fmt;

use jiff::civil::Date;
use jiff::{SignedDuration, Timestamp, ToSpan};

use super::terms::Policy;

/// The night that an instant belongs to.
pub fn night_of(at: Timestamp, policy: &Policy) -> Date {
    let mut night = at.to_zoned(policy.timezone().clone()).date();
    // The local time of day would mislead where clocks are set forward or back around the start of the window: the
    // instants decide. The date is at most two days off; the bound only keeps the ends of the calendar finite.
    for _ in 0..3 {
        if at < start_of(night, policy) {
            night = days_after(night, -1);
        } else if at >= start_of(days_after(night, 1), policy) {
            night = days_after(night, 1);
        } else {
            break;
        }
    }
    night
}

/// Start and end of a night's window. Counted right where clocks change: a window of eight hours then has seven or
/// nine. A start that does not exist is moved forward; of a start that comes twice the first counts.
pub fn window_of(night: Date, policy: &Policy) -> (Timestamp, Timestamp) {
    let (from, to) = policy.window();
    let start = start_of(night, policy);
    let last_date = match to < from {
        true => days_after(night, 1),
        false => night,
    };
    let end = instant(last_date.to_datetime(to), policy);
    if end > start {
        return (start, end);
    }
    // A window inside the hour that is skipped.
    let nominal = last_date
        .to_datetime(to)
        .duration_since(night.to_datetime(from));
    (start, later(start, nominal))
}

/// The start of a night's window: what is before belongs to the night before.
pub(super) fn start_of(night: Date, policy: &Policy) -> Timestamp {
    instant(night.to_datetime(policy.window().0), policy)
}

/// The date so many days later (or earlier); saturates at the ends of the calendar.
pub(super) fn days_after(date: Date, days: i64) -> Date {
    date.saturating_add(days.days())
}

/// The instant so much later; saturates at the ends of the calendar.
pub(super) fn later(at: Timestamp, by: SignedDuration) -> Timestamp {
    at.saturating_add(by).unwrap_or(Timestamp::MAX)
}

fn instant(local: jiff::civil::DateTime, policy: &Policy) -> Timestamp {
    local.to_zoned(policy.timezone().clone()).map_or(
        match local.year() < 0 {
            true => Timestamp::MIN,
            false => Timestamp::MAX,
        },
        |zoned| zoned.timestamp(),
    )
}

/// A week from Monday to Sunday, by ISO 8601.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IsoWeek {
    year: i16,
    week: i8,
}

impl IsoWeek {
    /// The week of a night.
    pub fn of(night: Date) -> IsoWeek {
        let date = night.iso_week_date();
        IsoWeek {
            year: date.year(),
            week: date.week(),
        }
    }
}

impl fmt::Display for IsoWeek {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-W{:02}", self.year, self.week)
    }
}

/// The last night of a night's ISO week.
pub(super) fn sunday_of(night: Date) -> Date {
    days_after(
        night,
        6 - i64::from(night.weekday().to_monday_zero_offset()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::PolicyTerms;
    use jiff::civil::date;
    use proptest::prelude::*;

    fn policy(timezone: &str, window: &str) -> Policy {
        Policy::parse(&PolicyTerms {
            timezone: timezone.into(),
            window: window.into(),
            ..PolicyTerms::default()
        })
        .expect("a policy")
    }

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    #[test]
    fn a_night_lasts_from_window_to_window() {
        let policy = policy("Europe/Amsterdam", "22:00-06:00");
        for (instant, night) in [
            ("2026-11-07T22:00:00+01:00", date(2026, 11, 7)),
            ("2026-11-08T05:59:00+01:00", date(2026, 11, 7)),
            ("2026-11-08T12:00:00+01:00", date(2026, 11, 7)),
            ("2026-11-08T21:59:59+01:00", date(2026, 11, 7)),
            ("2026-11-08T22:00:00+01:00", date(2026, 11, 8)),
        ] {
            assert_eq!(night_of(at(instant), &policy), night, "{instant}");
        }
    }

    #[test]
    fn the_window_is_an_hour_shorter_or_longer_where_clocks_change() {
        let policy = policy("Europe/Amsterdam", "22:00-06:00");
        let hours = |night| {
            let (start, end) = window_of(night, &policy);
            end.duration_since(start).as_hours()
        };
        assert_eq!(hours(date(2026, 11, 7)), 8);
        assert_eq!(hours(date(2026, 3, 28)), 7);
        assert_eq!(hours(date(2026, 10, 24)), 9);
    }

    #[test]
    fn a_window_inside_the_skipped_hour_keeps_its_length() {
        let policy = policy("Europe/Amsterdam", "02:30-03:15");
        let (start, end) = window_of(date(2026, 3, 29), &policy);
        assert_eq!(start, at("2026-03-29T01:30:00Z"));
        assert_eq!(end.duration_since(start).as_mins(), 45);
    }

    #[test]
    fn a_window_that_the_skipped_hour_makes_begin_at_its_end_keeps_its_length() {
        let policy = policy("Europe/Amsterdam", "02:30-03:30");
        let (start, end) = window_of(date(2026, 3, 29), &policy);
        assert_eq!(start, at("2026-03-29T01:30:00Z"));
        assert_eq!(end, at("2026-03-29T02:30:00Z"));
    }

    #[test]
    fn a_week_of_the_turn_of_the_year_is_one_week() {
        assert_eq!(IsoWeek::of(date(2026, 12, 31)).to_string(), "2026-W53");
        assert_eq!(IsoWeek::of(date(2027, 1, 3)).to_string(), "2026-W53");
        assert_eq!(sunday_of(date(2026, 12, 31)), date(2027, 1, 3));
        assert_eq!(sunday_of(date(2027, 1, 3)), date(2027, 1, 3));
    }

    proptest! {
        #[test]
        fn each_instant_belongs_to_exactly_one_night(
            second in 1_700_000_000_i64..1_900_000_000,
            zone in prop_oneof![
                Just("Europe/Amsterdam"), Just("America/New_York"), Just("Australia/Lord_Howe"),
                Just("Asia/Kolkata"), Just("UTC"), Just("Pacific/Kiritimati"),
            ],
            window in prop_oneof![
                Just("22:00-06:00"), Just("02:15-05:00"), Just("01:45-01:30"), Just("00:00-23:59"),
            ],
        ) {
            let policy = policy(zone, window);
            let at = Timestamp::from_second(second).expect("within the calendar");
            let night = night_of(at, &policy);
            prop_assert!(start_of(night, &policy) <= at);
            prop_assert!(at < start_of(days_after(night, 1), &policy));
            let (start, end) = window_of(night, &policy);
            prop_assert!(start < end);
            prop_assert_eq!(night_of(start, &policy), night);
        }
    }

    #[test]
    fn the_ends_of_the_calendar_have_nights_too() {
        for zone in ["Pacific/Kiritimati", "America/New_York"] {
            let policy = policy(zone, "22:00-06:00");
            for end in [Timestamp::MIN, Timestamp::MAX] {
                window_of(night_of(end, &policy), &policy);
            }
        }
        let east = policy("Pacific/Kiritimati", "00:00-06:00");
        assert_eq!(start_of(Date::MIN, &east), Timestamp::MIN);
        let west = policy("America/New_York", "23:00-06:00");
        assert_eq!(start_of(Date::MAX, &west), Timestamp::MAX);
    }
}
