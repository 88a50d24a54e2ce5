use jiff::civil::{Date, DateTime};
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp};
use std::fmt;
use std::str::FromStr;

/// Which restore point `--at` asks for: the newest taken no later than this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    Latest,
    /// The end of that day, in the policy's zone.
    Day(Date),
    /// That time of day, in the policy's zone.
    Local(DateTime),
    Instant(Timestamp),
}

/// A `--at` that is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WhenError {
    text: String,
}

impl fmt::Display for WhenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is not a time: write latest, 2026-11-07 (the end of that day), \
             2026-11-07T03:00 (in the policy's zone) or 2026-11-07T03:00:00+01:00",
            self.text
        )
    }
}

impl std::error::Error for WhenError {}

impl FromStr for When {
    type Err = WhenError;

    fn from_str(text: &str) -> Result<Self, WhenError> {
        let error = || WhenError {
            text: text.to_string(),
        };
        if text == "latest" {
            return Ok(When::Latest);
        }
        if text.len() == "2026-11-07".len() {
            return text.parse().map(When::Day).map_err(|_| error());
        }
        if let Ok(time) = text.parse::<Timestamp>() {
            return Ok(When::Instant(time));
        }
        // A bracketed zone without an offset would be dropped in silence.
        if !text.contains(['T', 't', ' ']) || text.contains('[') {
            return Err(error());
        }
        text.parse().map(When::Local).map_err(|_| error())
    }
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            When::Latest => f.write_str("latest"),
            When::Day(date) => write!(f, "{date}"),
            When::Local(time) => write!(f, "{time}"),
            When::Instant(time) => write!(f, "{time}"),
        }
    }
}

impl When {
    /// The latest whole second that is meant; `None` is no bound. A time that a change of the
    /// clocks makes ambiguous means its later reading: no point of that hour is left out.
    pub fn bound(&self, zone: &TimeZone) -> Result<Option<Timestamp>, jiff::Error> {
        let later = |time: DateTime| zone.to_ambiguous_timestamp(time).later();
        Ok(Some(match self {
            When::Latest => return Ok(None),
            When::Day(date) => {
                let next_day = date.tomorrow()?.to_zoned(zone.clone())?.timestamp();
                next_day.checked_sub(Span::new().seconds(1))?
            }
            When::Local(time) => later(*time)?,
            When::Instant(time) => *time,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bound(text: &str) -> Option<String> {
        let zone = TimeZone::get("Europe/Amsterdam").expect("a bundled zone");
        let when: When = text.parse().expect(text);
        when.bound(&zone).expect(text).map(|time| time.to_string())
    }

    #[test]
    fn a_date_means_the_end_of_that_day_in_the_zone_of_the_policy() {
        assert_eq!(bound("2026-11-07").as_deref(), Some("2026-11-07T22:59:59Z"));
        assert_eq!(bound("2026-07-07").as_deref(), Some("2026-07-07T21:59:59Z"));
    }

    #[test]
    fn the_days_on_which_the_clocks_change_end_at_midnight_too() {
        assert_eq!(bound("2026-03-29").as_deref(), Some("2026-03-29T21:59:59Z"));
        assert_eq!(bound("2026-10-25").as_deref(), Some("2026-10-25T22:59:59Z"));
    }

    #[test]
    fn a_local_time_is_read_in_the_zone_of_the_policy() {
        for text in [
            "2026-11-07T03:00",
            "2026-11-07 03:00",
            "2026-11-07T03:00:00",
        ] {
            assert_eq!(
                bound(text).as_deref(),
                Some("2026-11-07T02:00:00Z"),
                "{text}"
            );
        }
    }

    #[test]
    fn an_hour_that_comes_twice_means_its_second_coming() {
        assert_eq!(
            bound("2026-10-25T02:30").as_deref(),
            Some("2026-10-25T01:30:00Z")
        );
    }

    #[test]
    fn an_offset_is_exact_and_latest_has_no_bound() {
        assert_eq!(
            bound("2026-11-07T03:00:00+02:00").as_deref(),
            Some("2026-11-07T01:00:00Z")
        );
        assert_eq!(
            bound("2026-11-07T03:00Z").as_deref(),
            Some("2026-11-07T03:00:00Z")
        );
        assert_eq!(bound("latest"), None);
    }

    #[test]
    fn what_is_not_a_time_is_refused() {
        for text in [
            "",
            "yesterday",
            "2026-13-01",
            "2026-02-30",
            "07-11-2026",
            "03:00",
            "2026-11-07T25:00",
            "2026-11-07T03:00[Europe/Amsterdam]",
            "20261107",
        ] {
            assert!(text.parse::<When>().is_err(), "{text:?}");
        }
    }
}
