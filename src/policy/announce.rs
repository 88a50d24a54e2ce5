//! What is told of alarms, so that each is heard once, again after a while, and when it is over.
//!
//! *Absent:* what an alarm is about, and how it is told.

use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeMap;

/// Runs do not end at the same second of each night.
const SLACK: SignedDuration = SignedDuration::from_mins(30);

/// What is remembered of an alarm that was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToldAlarm {
    pub since: Timestamp,
    pub told_at: Timestamp,
    /// What it said last.
    pub text: String,
    /// How much there was of it: nights, points, pieces.
    pub extent: u64,
}

/// An alarm that sounds now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sounding {
    pub text: String,
    pub extent: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Change {
    /// It is new, or there is more of it than was told.
    Raised,
    /// It goes on.
    Reminder,
    Cleared,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    pub key: String,
    pub change: Change,
    pub text: String,
    pub extent: u64,
    pub since: Timestamp,
}

/// What is to be told now. `told` is what was told before, `current` what holds now, both by the alarm's name.
/// `asked`: alarms of other names may go on unseen, because nobody could look.
pub fn announcements(
    told: &BTreeMap<String, ToldAlarm>,
    current: &BTreeMap<String, Sounding>,
    asked: impl Fn(&str) -> bool,
    now: Timestamp,
    remind_every: SignedDuration,
) -> Vec<Announcement> {
    // A run that is quicker than the one before is not to put it off by a night.
    let patience = remind_every - SLACK.min(remind_every / 2);
    let mut announcements = Vec::new();
    for (key, sounding) in current {
        let (change, since) = match told.get(key) {
            None => (Change::Raised, now),
            Some(before) if before.extent < sounding.extent => {
                (Change::Raised, before.since.min(now))
            }
            // A clock that was set back would silence it.
            Some(before) if before.told_at > now => (Change::Reminder, before.since.min(now)),
            Some(before) if now.duration_since(before.told_at) >= patience => {
                (Change::Reminder, before.since)
            }
            Some(_) => continue,
        };
        announcements.push(Announcement {
            key: key.clone(),
            change,
            text: sounding.text.clone(),
            extent: sounding.extent,
            since,
        });
    }
    for (key, before) in told {
        if !current.contains_key(key) && asked(key) {
            announcements.push(Announcement {
                key: key.clone(),
                change: Change::Cleared,
                text: before.text.clone(),
                extent: 0,
                since: before.since,
            });
        }
    }
    announcements
}

/// What is remembered once these have been told.
pub fn remember(
    told: &mut BTreeMap<String, ToldAlarm>,
    announcements: &[Announcement],
    now: Timestamp,
) {
    for one in announcements {
        match one.change {
            Change::Cleared => {
                told.remove(&one.key);
            }
            Change::Raised | Change::Reminder => {
                told.insert(
                    one.key.clone(),
                    ToldAlarm {
                        since: one.since,
                        told_at: now,
                        text: one.text.clone(),
                        extent: one.extent,
                    },
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: SignedDuration = SignedDuration::from_hours(24);

    fn at(hours: i64) -> Timestamp {
        Timestamp::UNIX_EPOCH + SignedDuration::from_hours(hours)
    }

    fn sounding(text: &str, extent: u64) -> Sounding {
        Sounding {
            text: text.to_string(),
            extent,
        }
    }

    #[test]
    fn what_grows_is_told_again_and_what_shrinks_is_not() {
        let mut told = BTreeMap::new();
        let mut changes = Vec::new();
        for (hour, extent) in [(0, 1), (1, 2), (2, 1), (3, 2), (4, 9)] {
            let current = BTreeMap::from([("hole".to_string(), sounding("a hole", extent))]);
            let found = announcements(&told, &current, |_| true, at(hour), DAY);
            remember(&mut told, &found, at(hour));
            changes.extend(
                found
                    .iter()
                    .map(|one| (hour, one.change, one.since == at(0))),
            );
        }
        let raised = |hour| (hour, Change::Raised, true);
        assert_eq!(changes, [raised(0), raised(1), raised(4)]);
    }

    /// What is told at each hour of what holds then.
    fn story(hours: &[(i64, &[&str])]) -> Vec<(i64, Change, String)> {
        let mut told = BTreeMap::new();
        let mut story = Vec::new();
        for (hour, holds) in hours {
            let current = holds
                .iter()
                .map(|key| (key.to_string(), sounding(&format!("{key} at {hour}"), 1)))
                .collect();
            let found = announcements(&told, &current, |_| true, at(*hour), DAY);
            remember(&mut told, &found, at(*hour));
            story.extend(found.into_iter().map(|one| (*hour, one.change, one.text)));
        }
        story
    }

    #[test]
    fn an_alarm_is_told_once_again_after_a_day_and_when_it_is_over() {
        let hole: &[&str] = &["hole"];
        let told = story(&[
            (0, hole),
            (1, hole),
            (23, hole),
            (24, hole),
            (30, hole),
            (31, &[]),
        ]);
        let wanted = [
            (0, Change::Raised, "hole at 0"),
            (24, Change::Reminder, "hole at 24"),
            (31, Change::Cleared, "hole at 24"),
        ];
        assert_eq!(
            told,
            wanted.map(|(hour, change, text)| (hour, change, text.to_string()))
        );
    }

    #[test]
    fn a_quicker_night_does_not_put_a_reminder_off() {
        let (mut told, current) = (
            BTreeMap::new(),
            BTreeMap::from([("hole".to_string(), sounding("a hole", 1))]),
        );
        let first = announcements(&told, &current, |_| true, at(0), DAY);
        remember(&mut told, &first, at(0));
        let sooner = at(24) - SignedDuration::from_secs(40);
        let second = announcements(&told, &current, |_| true, sooner, DAY);
        assert_eq!(second.first().map(|one| one.change), Some(Change::Reminder));
    }

    #[test]
    fn what_is_told_again_within_an_hour_may_be_told_after_half_of_its_time_and_not_before() {
        let (every, mut told) = (SignedDuration::from_mins(30), BTreeMap::new());
        let current = BTreeMap::from([("hole".to_string(), sounding("a hole", 1))]);
        let raised = announcements(&told, &current, |_| true, at(0), every);
        remember(&mut told, &raised, at(0));
        for (minutes, is_told) in [(0, false), (14, false), (15, true)] {
            let now = at(0) + SignedDuration::from_mins(minutes);
            let found = announcements(&told, &current, |_| true, now, every);
            assert_eq!(found.len(), usize::from(is_told), "{minutes} min");
        }
    }

    #[test]
    fn what_comes_back_is_told_anew() {
        let told = story(&[(0, &["full"]), (1, &[]), (2, &["full"])]);
        let changes: Vec<Change> = told.into_iter().map(|(_, change, _)| change).collect();
        assert_eq!(changes, [Change::Raised, Change::Cleared, Change::Raised]);
    }

    #[test]
    fn what_nobody_could_look_at_is_not_over() {
        let mut told = BTreeMap::new();
        let current = BTreeMap::from([("hole acme".to_string(), sounding("a hole", 1))]);
        let raised = announcements(&told, &current, |_| true, at(0), DAY);
        remember(&mut told, &raised, at(0));
        let none = announcements(
            &told,
            &BTreeMap::new(),
            |key| !key.ends_with("acme"),
            at(1),
            DAY,
        );
        assert_eq!(none, []);
        assert_eq!(told.len(), 1);
    }

    #[test]
    fn a_clock_that_was_set_back_silences_nothing() {
        let told = story(&[(1000, &["hole"]), (0, &["hole"]), (1, &["hole"])]);
        let changes: Vec<(i64, Change)> = told.iter().map(|one| (one.0, one.1)).collect();
        assert_eq!(changes, [(1000, Change::Raised), (0, Change::Reminder)]);
    }
}
