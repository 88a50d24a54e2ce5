//! Calendar lengths: "14 days", "2 months". Not durations: two months have 59 to 62 days, and which of them
//! counts depends on what is being promised.
//!
//! *Absent:* hours and minutes (a retention below a day cannot be kept by a nightly program), fractions, and the
//! 30.44-day month of general duration parsers.

use std::fmt;

use jiff::civil::{Date, date};
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, ToSpan};

/// No length is accepted above this; a typo must not become a promise for a lifetime.
const LONGEST_YEARS: u32 = 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PeriodUnit {
    Days,
    Weeks,
    Months,
    Years,
}

/// A calendar length of at least one day and at most ten years.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Period {
    count: u16,
    unit: PeriodUnit,
}

impl Period {
    /// Reads `N days|weeks|months|years` (singular too, and `Nd`, `Nw`). The error is a sentence for people.
    pub fn parse(text: &str) -> Result<Period, String> {
        const HINT: &str =
            "write a whole number and days, weeks, months or years, such as \"14 days\"";
        let text = text.trim();
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        if number.is_empty() {
            return Err(match text.starts_with('-') {
                true => format!("it is negative; {HINT}"),
                false => format!("it does not begin with a number; {HINT}"),
            });
        }
        let unit = match unit.trim_start() {
            "d" | "day" | "days" => PeriodUnit::Days,
            "w" | "week" | "weeks" => PeriodUnit::Weeks,
            "month" | "months" => PeriodUnit::Months,
            "year" | "years" => PeriodUnit::Years,
            "" => return Err(format!("the unit is missing; {HINT}")),
            "m" => return Err(format!("\"m\" could mean minutes or months; {HINT}")),
            unit => return Err(format!("{unit:?} is not a unit of retention; {HINT}")),
        };
        let count: u32 = number.parse().unwrap_or(u32::MAX);
        if count == 0 {
            return Err(format!("it is zero; {HINT}"));
        }
        let most = LONGEST_YEARS
            * match unit {
                PeriodUnit::Days => 365,
                PeriodUnit::Weeks => 52,
                PeriodUnit::Months => 12,
                PeriodUnit::Years => 1,
            };
        match u16::try_from(count) {
            Ok(count) if u32::from(count) <= most => Ok(Period { count, unit }),
            _ => Err(format!("it is longer than {LONGEST_YEARS} years")),
        }
    }

    pub fn span(&self) -> Span {
        let count = i64::from(self.count);
        match self.unit {
            PeriodUnit::Days => count.days(),
            PeriodUnit::Weeks => count.weeks(),
            PeriodUnit::Months => count.months(),
            PeriodUnit::Years => count.years(),
        }
    }

    /// The fewest days that this length can have, whatever the day it begins: 2 months are 59.
    pub fn shortest_days(&self) -> u32 {
        self.fixed_days().unwrap_or_else(|| {
            let days = starts().map(|start| self.days_from(start));
            days.min().unwrap_or(0)
        })
    }

    /// The most days that this length can have, whatever the day it begins: 2 months are 62.
    pub fn longest_days(&self) -> u32 {
        self.fixed_days().unwrap_or_else(|| {
            let days = starts().map(|start| self.days_from(start));
            days.max().unwrap_or(0)
        })
    }

    /// Whether this length ends no later than `other`, on whatever day both begin.
    /// "61 days" is not within "2 months": from 1 January, two months have 59.
    pub fn is_within(&self, other: &Period) -> bool {
        if let (Some(days), Some(most)) = (self.fixed_days(), other.fixed_days()) {
            return days <= most;
        }
        starts().all(|start| self.days_from(start) <= other.days_from(start))
    }

    /// The same local time this length after `start`; a day that the month lacks becomes its last. Saturates at
    /// the end of the calendar.
    pub fn after(&self, start: Timestamp, zone: &TimeZone) -> Timestamp {
        start
            .to_zoned(zone.clone())
            .checked_add(self.span())
            .map_or(Timestamp::MAX, |end| end.timestamp())
    }

    /// Of a length that has as many days whenever it begins. It need not be tried on every day: a policy is read
    /// with every ledger.
    fn fixed_days(&self) -> Option<u32> {
        match self.unit {
            PeriodUnit::Days => Some(self.count.into()),
            PeriodUnit::Weeks => Some(7 * u32::from(self.count)),
            PeriodUnit::Months | PeriodUnit::Years => None,
        }
    }

    fn days_from(&self, start: Date) -> u32 {
        let end = start.saturating_add(self.span());
        u32::try_from(start.duration_until(end).as_hours() / 24).unwrap_or(0)
    }
}

/// Days to begin a length on: of each month from 2088 to 2100 the first, for all that every month has, and those
/// after the 28th. 2100 has no leap day and the years from 2088 have three, so both the shortest and the longest
/// case of every length up to ten years are among them.
fn starts() -> impl Iterator<Item = Date> {
    (2088..=2100)
        .flat_map(|year| (1..=12).map(move |month| date(year, month, 1)))
        .flat_map(|first| {
            [1, 29, 30, 31]
                .into_iter()
                .filter_map(move |day| first.with().day(day).build().ok())
        })
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = match self.unit {
            PeriodUnit::Days => "day",
            PeriodUnit::Weeks => "week",
            PeriodUnit::Months => "month",
            PeriodUnit::Years => "year",
        };
        let plural = if self.count == 1 { "" } else { "s" };
        write!(f, "{} {unit}{plural}", self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn period(text: &str) -> Period {
        Period::parse(text).expect("a period")
    }

    #[test]
    fn lengths_are_read_in_all_their_spellings() {
        for (text, shown) in [
            ("14 days", "14 days"),
            ("1 day", "1 day"),
            ("14d", "14 days"),
            ("2 w", "2 weeks"),
            (" 2 months ", "2 months"),
            ("1 year", "1 year"),
            ("10years", "10 years"),
        ] {
            assert_eq!(period(text).to_string(), shown);
        }
    }

    #[test]
    fn what_is_not_a_calendar_length_is_refused_with_a_hint() {
        for (text, hint) in [
            ("", "does not begin with a number"),
            ("0 days", "zero"),
            ("-3 days", "negative"),
            ("14", "unit is missing"),
            ("2m", "minutes or months"),
            ("36 hours", "\"hours\" is not a unit"),
            ("1.5 months", "is not a unit"),
            ("11 years", "longer than 10 years"),
            ("99999999999999999999 days", "longer than 10 years"),
            ("٣ days", "does not begin"),
        ] {
            let error = Period::parse(text).expect_err(text);
            assert!(error.contains(hint), "{text:?}: {error}");
        }
    }

    #[test]
    fn months_know_their_shortest_and_longest_days() {
        for (text, shortest, longest) in [
            ("1 month", 28, 31),
            ("2 months", 59, 62),
            ("1 year", 365, 366),
            ("10 years", 3651, 3653),
            ("3 weeks", 21, 21),
            ("17 days", 17, 17),
        ] {
            assert_eq!(period(text).shortest_days(), shortest, "{text}");
            assert_eq!(period(text).longest_days(), longest, "{text}");
        }
    }

    #[test]
    fn every_day_to_begin_on_is_like_one_of_those_that_are_tried() {
        let all = || {
            date(2088, 1, 1)
                .series(1.day())
                .take_while(|start| start.year() <= 2100)
        };
        for text in [
            "5 days", "6 weeks", "1 month", "2 months", "7 months", "1 year", "3 years", "10 years",
        ] {
            let length = period(text);
            let days = |start| length.days_from(start);
            assert_eq!(
                all().map(days).min(),
                Some(length.shortest_days()),
                "{text}"
            );
            assert_eq!(all().map(days).max(), Some(length.longest_days()), "{text}");
        }
    }

    #[test]
    fn sixty_one_days_are_not_always_within_two_months() {
        assert!(period("59 days").is_within(&period("2 months")));
        assert!(!period("60 days").is_within(&period("2 months")));
        assert!(!period("61 days").is_within(&period("2 months")));
        assert!(period("2 months").is_within(&period("62 days")));
        assert!(period("12 months").is_within(&period("1 year")));
    }

    #[test]
    fn two_months_after_the_last_of_december_is_the_last_of_february() {
        let zone = TimeZone::UTC;
        for (start, end) in [
            ("2026-12-31T23:00:00Z", "2027-02-28T23:00:00Z"),
            ("2027-12-31T23:00:00Z", "2028-02-29T23:00:00Z"),
            ("2026-12-28T23:00:00Z", "2027-02-28T23:00:00Z"),
        ] {
            let start: Timestamp = start.parse().expect("a time");
            let end: Timestamp = end.parse().expect("a time");
            assert_eq!(period("2 months").after(start, &zone), end);
        }
        assert_eq!(
            period("2 months").after(Timestamp::MAX, &zone),
            Timestamp::MAX
        );
    }
}
