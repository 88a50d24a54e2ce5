//! For how long objects can be locked, so that a stolen key cannot destroy what the restore window needs
//! and every byte can still be deleted before its deadline.

use super::Policy;
use jiff::{SignedDuration, Timestamp};

/// Locks are renewed so often at the most: each renewal is a request an object.
const LONGEST_RENEWAL_DAYS: u32 = 7;
/// A point leaves the restore window two days late, for clocks that differ.
const TOLERANCE_DAYS: u32 = 2;
/// Between expiry and the erasure of a record: the wait, and the night in which it ends.
const DAYS_UNTIL_ERASED: u32 = 2;
/// A prune that finds a lock ended must have a second one before the deadline.
const LEAST_MARGIN_DAYS: u32 = 3;

/// The locks of one customer's objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LockTerm {
    /// Of what points need.
    pub days: u32,
    /// So often it is locked anew: what is left never falls below the restore window.
    pub renewed_every_days: u32,
    /// Of the record of a point, which nothing but itself needs: never renewed.
    pub record_days: u32,
    /// Before a deadline, nothing that must be gone by it is locked for so long.
    pub margin_days: u32,
}

impl LockTerm {
    /// The lock of what has bytes in it that must be gone by `deadline` ends by then.
    pub fn latest(&self, deadline: Timestamp) -> Timestamp {
        let margin = SignedDuration::from_hours(24 * i64::from(self.margin_days));
        deadline.saturating_sub(margin).unwrap_or(Timestamp::MIN)
    }
}

/// The locks that the policy wants and bears, or the arithmetic of why there are none.
///
/// What is locked while a point still needs it can hold bytes that only that point needs. Its record is
/// erased within two days of its expiry; the lock must end, and prunes have time to rewrite what lives,
/// before the erase budget is over.
pub fn lock_term(policy: &Policy) -> Result<LockTerm, String> {
    let effective = policy.effective();
    let (window, budget) = (effective.restore_window_days, effective.erase_budget_days);
    let margin_days = budget.div_ceil(8).max(LEAST_MARGIN_DAYS);
    let longest = i64::from(budget) - i64::from(DAYS_UNTIL_ERASED) - i64::from(margin_days);
    let room = longest - i64::from(window);
    match u32::try_from(room) {
        Ok(room @ 1..) => {
            let renewed_every_days = room.min(LONGEST_RENEWAL_DAYS);
            Ok(LockTerm {
                days: window + renewed_every_days,
                renewed_every_days,
                record_days: window + TOLERANCE_DAYS,
                margin_days,
            })
        }
        _ => Err(format!(
            "a restore window of {window} days and a renewal every night need locks of {} days; the \
             erase budget allows {}: {budget} (erase budget) − {DAYS_UNTIL_ERASED} (until the record is \
             erased) − {margin_days} (for deleting)",
            window + 1,
            longest.max(0),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::PolicyTerms;

    fn told(restore_window: &str, max_retention: &str) -> Result<LockTerm, String> {
        let terms = PolicyTerms {
            timezone: "UTC".to_string(),
            restore_window: restore_window.to_string(),
            max_retention: max_retention.to_string(),
            ..PolicyTerms::default()
        };
        lock_term(&Policy::parse(&terms).unwrap())
    }

    #[test]
    fn two_weeks_of_two_months_are_locked_for_17_days_and_anew_every_third() {
        let term = told("14 days", "2 months").unwrap();
        let expected = LockTerm {
            days: 17,
            renewed_every_days: 3,
            record_days: 16,
            margin_days: 3,
        };
        assert_eq!(term, expected);
        let of_three_months = told("14 days", "3 months").unwrap();
        assert_eq!(of_three_months.renewed_every_days, 7);
    }

    #[test]
    fn every_lock_lasts_for_the_window_after_its_renewal_and_ends_before_any_deadline() {
        for window in 1..40 {
            for maximum in 3..120 {
                let (window, maximum) = (format!("{window} days"), format!("{maximum} days"));
                let terms = PolicyTerms {
                    timezone: "UTC".to_string(),
                    restore_window: window,
                    max_retention: maximum,
                    ..PolicyTerms::default()
                };
                let policy = Policy::parse(&terms).unwrap();
                let effective = policy.effective();
                let Ok(term) = lock_term(&policy) else {
                    continue;
                };
                assert!(term.days - term.renewed_every_days >= effective.restore_window_days);
                let until_gone = DAYS_UNTIL_ERASED + term.days + term.margin_days;
                assert!(until_gone <= effective.erase_budget_days, "{term:?}");
            }
        }
    }

    #[test]
    fn where_both_cannot_be_had_the_arithmetic_is_told() {
        let why = told("14 days", "50 days").unwrap_err();
        for part in ["need locks of 15 days", "(erase budget) − 2", "− 3"] {
            assert!(why.contains(part), "{why}");
        }
    }
}
