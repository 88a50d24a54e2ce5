//! The terms of a customer's retention, from strings to numbers that can be kept.
//!
//! *Absent:* reading configuration files, and the choice whose terms win (`config` layers them through
//! [`PolicyTerms::shortened_by`]).

use std::fmt;

use jiff::civil::{Time, Weekday};
use jiff::tz::{TimeZone, TimeZoneDatabase};
use serde::{Deserialize, Serialize};

use super::period::Period;

/// Longest erase budget that is chosen by itself, in days.
const MOST_DEFAULT_BUDGET_DAYS: u32 = 28;
/// One day to be listed, one night of jitter of the window, one day to erase.
const LEAST_MAXIMUM_DAYS: u32 = 3;

/// A policy as people write it and as the ledger records it: one string per key, nothing computed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyTerms {
    /// IANA name, such as `Europe/Amsterdam`.
    pub timezone: String,
    /// Local start and end of the nightly window, `HH:MM-HH:MM`; may cross midnight.
    pub window: String,
    /// `auto`, or a weekday in English: the night of the weekly full.
    pub full_day: String,
    /// How far back every night stays: a calendar length.
    pub restore_window: String,
    /// Nothing is older than this: a calendar length.
    pub max_retention: String,
    /// `weekly`, `all` or `none`.
    pub keep_after_window: String,
    /// How long before the maximum a point expires; chosen by the program where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub erase_budget: Option<String>,
}

impl Default for PolicyTerms {
    fn default() -> Self {
        PolicyTerms {
            timezone: "UTC".to_string(),
            window: "22:00-06:00".to_string(),
            full_day: "auto".to_string(),
            restore_window: "14 days".to_string(),
            max_retention: "2 months".to_string(),
            keep_after_window: "weekly".to_string(),
            erase_budget: None,
        }
    }
}

/// What one customer may have different from the policy of the house: only less.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Override {
    pub max_retention: Option<String>,
    pub restore_window: Option<String>,
    pub keep_after_window: Option<String>,
    pub erase_budget: Option<String>,
}

/// A policy that cannot be kept or understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyError {
    /// The key of the configuration, such as `max_retention`.
    pub key: &'static str,
    /// Its value as it was written.
    pub value: String,
    /// Why it is refused, with the arithmetic or a hint.
    pub message: String,
}

impl PolicyError {
    fn new(key: &'static str, value: &str, message: impl Into<String>) -> Self {
        PolicyError {
            key,
            value: value.to_string(),
            message: message.into(),
        }
    }
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {:?}: {}", self.key, self.value, self.message)
    }
}

impl std::error::Error for PolicyError {}

/// Everything that is wrong with some terms: never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyErrors(Vec<PolicyError>);

impl PolicyErrors {
    fn into_first(self) -> PolicyError {
        let first = self.0.into_iter().next();
        first.unwrap_or_else(|| PolicyError::new("policy", "", "refused"))
    }
}

impl From<PolicyError> for PolicyErrors {
    fn from(error: PolicyError) -> Self {
        PolicyErrors(vec![error])
    }
}

impl IntoIterator for PolicyErrors {
    type Item = PolicyError;
    type IntoIter = std::vec::IntoIter<PolicyError>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// The night of a VM's weekly full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FullDay {
    /// Spread over the week by a hash of the VM.
    Auto,
    On(Weekday),
}

/// What stays between the restore window and expiry. Ordered from keeping least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum KeepAfterWindow {
    None,
    /// One point per ISO week and VM.
    Weekly,
    All,
}

impl fmt::Display for KeepAfterWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            KeepAfterWindow::None => "none",
            KeepAfterWindow::Weekly => "weekly",
            KeepAfterWindow::All => "all",
        })
    }
}

/// The numbers that are kept, as opposed to those that were asked for. All in days of the calendar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective {
    /// Nights that can always be gone back to:
    /// min(configured, maximum − erase budget − 1 night).
    pub restore_window_days: u32,
    /// What was asked for (at its longest, where months were written).
    pub configured_restore_window_days: u32,
    pub max_retention: Period,
    /// The maximum at its shortest: 2 months are 59 days.
    pub max_retention_days: u32,
    /// Days between expiry and deadline.
    pub erase_budget_days: u32,
    /// The maximum is too short for the configured restore window.
    pub shrunk: bool,
    /// How the numbers came about: one sentence a line, for `config check` and `status`.
    pub arithmetic: Vec<String>,
}

impl Effective {
    /// Days that a point is listed at the least: maximum − erase budget.
    pub fn listed_days(&self) -> u32 {
        self.max_retention_days
            .saturating_sub(self.erase_budget_days)
    }
}

/// Terms that were understood and can be kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    terms: PolicyTerms,
    zone: TimeZone,
    window: (Time, Time),
    full_day: FullDay,
    keep_after_window: KeepAfterWindow,
    effective: Effective,
}

impl Policy {
    /// Understands the terms, or says which key is wrong and why.
    pub fn parse(terms: &PolicyTerms) -> Result<Policy, PolicyError> {
        Policy::judge(terms).map_err(PolicyErrors::into_first)
    }

    /// Understands the terms, or says everything that is wrong with them.
    pub fn judge(terms: &PolicyTerms) -> Result<Policy, PolicyErrors> {
        let mut errors = Vec::new();
        let mut note = |error| errors.push(error);
        // The bundled table, not the host's: hosts of one customer must agree on every night.
        let zone = TimeZoneDatabase::bundled()
            .get(&terms.timezone)
            .map_err(|_| {
                note(PolicyError::new(
                    "timezone",
                    &terms.timezone,
                    "no such time zone; write a name of the IANA table, such as \"Europe/Amsterdam\" or \"UTC\"",
                ));
            });
        let window = parse_window(&terms.window).map_err(&mut note);
        let full_day = parse_full_day(&terms.full_day).map_err(&mut note);
        let keep_after_window = parse_keep(&terms.keep_after_window).map_err(&mut note);
        let lengths = [
            ("restore_window", Some(&terms.restore_window)),
            ("max_retention", Some(&terms.max_retention)),
            ("erase_budget", terms.erase_budget.as_ref()),
        ];
        let before = errors.len();
        errors.extend(unreadable_lengths(&lengths));
        let effective = match errors.len() == before {
            true => effective(terms).map_err(|error| errors.push(error)),
            false => Err(()),
        };
        match (zone, window, full_day, keep_after_window, effective) {
            (Ok(zone), Ok(window), Ok(full_day), Ok(keep_after_window), Ok(effective)) => {
                Ok(Policy {
                    terms: terms.clone(),
                    zone,
                    window,
                    full_day,
                    keep_after_window,
                    effective,
                })
            }
            _ => Err(PolicyErrors(errors)),
        }
    }

    /// What was written.
    pub fn terms(&self) -> &PolicyTerms {
        &self.terms
    }

    /// What is kept.
    pub fn effective(&self) -> &Effective {
        &self.effective
    }

    pub fn timezone(&self) -> &TimeZone {
        &self.zone
    }

    /// Local start and end of the nightly window; an end before the start is on the next day.
    pub fn window(&self) -> (Time, Time) {
        self.window
    }

    pub fn full_day(&self) -> FullDay {
        self.full_day
    }

    pub fn keep_after_window(&self) -> KeepAfterWindow {
        self.keep_after_window
    }
}

impl PolicyTerms {
    /// These terms with a customer's override, which may only keep less: a point never lives longer, is never
    /// listed longer, and no more points stay than without it.
    ///
    /// An erase budget that was set for the house and does not fit into a customer's shorter maximum is chosen
    /// anew, because refusing "7 days" for a number that the customer's entry does not hold would help nobody.
    pub fn shortened_by(&self, by: &Override) -> Result<PolicyTerms, PolicyError> {
        self.shorten(by).map_err(PolicyErrors::into_first)
    }

    /// As [`PolicyTerms::shortened_by`], with everything that is wrong with the override.
    pub fn shorten(&self, by: &Override) -> Result<PolicyTerms, PolicyErrors> {
        let base = effective(self)?;
        let allowed = parse_keep(&self.keep_after_window)?;
        let mut errors = by.unreadable();
        if !errors.is_empty() {
            return Err(PolicyErrors(errors));
        }
        let mut terms = self.clone();
        if let Some(text) = &by.max_retention {
            let maximum = parse_period("max_retention", text)?;
            if !maximum.is_within(&base.max_retention) {
                errors.push(PolicyError::new(
                    "max_retention",
                    text,
                    format!(
                        "a customer may only shorten it, and {maximum} ({} days at the longest) can end later than the {} of the policy ({} days at the shortest)",
                        maximum.longest_days(),
                        base.max_retention,
                        base.max_retention_days
                    ),
                ));
            }
            terms.max_retention.clone_from(text);
        }
        if let Some(text) = &by.restore_window {
            let days = parse_period("restore_window", text)?.longest_days();
            if days > base.configured_restore_window_days {
                errors.push(PolicyError::new(
                    "restore_window",
                    text,
                    format!(
                        "a customer may only shorten it, and {days} days are more than the {} days of the policy",
                        base.configured_restore_window_days
                    ),
                ));
            }
            terms.restore_window.clone_from(text);
        }
        if let Some(text) = &by.keep_after_window {
            let wanted = parse_keep(text)?;
            if wanted > allowed {
                errors.push(PolicyError::new(
                    "keep_after_window",
                    text,
                    format!(
                        "a customer may only keep less, and \"{wanted}\" keeps more than the \"{allowed}\" of the policy"
                    ),
                ));
            }
            terms.keep_after_window.clone_from(text);
        }
        terms.erase_budget = match &by.erase_budget {
            Some(text) => Some(text.clone()),
            None => inherited_budget(&base, &terms)?,
        };
        match effective(&terms) {
            Err(error) => errors.push(error),
            // Lengths that are already refused one by one need no second refusal of what follows from them.
            Ok(shortened) if shortened.listed_days() > base.listed_days() && errors.is_empty() => {
                errors.push(listed_longer(by, &terms, &base, &shortened));
            }
            Ok(_) => {}
        }
        match errors.is_empty() {
            true => Ok(terms),
            false => Err(PolicyErrors(errors)),
        }
    }
}

impl Override {
    /// What cannot be understood, whatever the policy of the house.
    pub fn unreadable(&self) -> Vec<PolicyError> {
        let mut errors = unreadable_lengths(&[
            ("max_retention", self.max_retention.as_ref()),
            ("restore_window", self.restore_window.as_ref()),
            ("erase_budget", self.erase_budget.as_ref()),
        ]);
        let keep = self.keep_after_window.as_deref().map(parse_keep);
        errors.extend(keep.and_then(Result::err));
        errors
    }
}

fn unreadable_lengths(lengths: &[(&'static str, Option<&String>)]) -> Vec<PolicyError> {
    lengths
        .iter()
        .filter_map(|(key, text)| parse_period(key, (*text)?).err())
        .collect()
}

fn listed_longer(
    by: &Override,
    terms: &PolicyTerms,
    base: &Effective,
    shortened: &Effective,
) -> PolicyError {
    let (key, value) = match (&by.erase_budget, &by.restore_window) {
        (Some(budget), _) => ("erase_budget", budget),
        (None, Some(window)) => ("restore_window", window),
        (None, None) => ("max_retention", &terms.max_retention),
    };
    PolicyError::new(
        key,
        value,
        format!(
            "a customer may only keep less, and points would be listed for {} days ({} − {}) instead of the {} days ({} − {}) of the policy",
            shortened.listed_days(),
            shortened.max_retention_days,
            shortened.erase_budget_days,
            base.listed_days(),
            base.max_retention_days,
            base.erase_budget_days
        ),
    )
}

/// The house's explicit budget where it leaves the customer's window whole, else one chosen anew that does not list
/// points for longer than the house does.
fn inherited_budget(base: &Effective, terms: &PolicyTerms) -> Result<Option<String>, PolicyError> {
    let Some(text) = &terms.erase_budget else {
        return Ok(None);
    };
    let budget = parse_period("erase_budget", text)?.longest_days();
    let maximum = parse_period("max_retention", &terms.max_retention)?.shortest_days();
    let window = parse_period("restore_window", &terms.restore_window)?.longest_days();
    if budget + window < maximum {
        return Ok(Some(text.clone()));
    }
    let automatic = default_budget(maximum, window);
    let needed = maximum.saturating_sub(base.listed_days());
    Ok((needed > automatic).then(|| format!("{needed} days")))
}

/// Half of what the maximum leaves beyond the restore window, at most 28 days, at least 1. All in days.
///
/// Rewriting costs about the live bytes once per budget, and the points beyond the window are a courtesy: half is
/// where the one is affordable and the other still worth having.
fn default_budget(maximum: u32, restore_window: u32) -> u32 {
    (maximum.saturating_sub(restore_window) / 2).clamp(1, MOST_DEFAULT_BUDGET_DAYS)
}

fn effective(terms: &PolicyTerms) -> Result<Effective, PolicyError> {
    let max_retention = parse_period("max_retention", &terms.max_retention)?;
    let maximum = max_retention.shortest_days();
    // A window of months is promised at its longest, the maximum counts at its shortest: so both hold.
    let window = parse_period("restore_window", &terms.restore_window)?.longest_days();
    let mut arithmetic = Vec::new();
    if max_retention.longest_days() != maximum {
        arithmetic.push(format!(
            "the maximum of {max_retention} is {maximum} days at the shortest"
        ));
    }
    if maximum < LEAST_MAXIMUM_DAYS {
        return Err(PolicyError::new(
            "max_retention",
            &terms.max_retention,
            format!(
                "the least is {LEAST_MAXIMUM_DAYS} days: 1 day of restore window + 1 night (the hour of the backup varies) + 1 day to erase = 3, and {max_retention} is {maximum}"
            ),
        ));
    }
    let budget = match &terms.erase_budget {
        Some(text) => {
            // At its longest, as it is taken off the maximum.
            let budget = parse_period("erase_budget", text)?.longest_days();
            if budget + 2 > maximum {
                return Err(PolicyError::new(
                    "erase_budget",
                    text,
                    format!(
                        "it leaves no restore window: {maximum} days (maximum) − {budget} (erase budget) − 1 night = {}, and at least 1 night must remain; the budget can be {} days at most",
                        i64::from(maximum) - i64::from(budget) - 1,
                        maximum - 2
                    ),
                ));
            }
            arithmetic.push(format!("the erase budget is set to {budget} days"));
            budget
        }
        None => {
            let budget = default_budget(maximum, window);
            arithmetic.push(format!(
                "erase budget: half of what {maximum} days leave beyond the restore window of {window} days, at least 1 and at most {MOST_DEFAULT_BUDGET_DAYS} = {}",
                days(budget)
            ));
            budget
        }
    };
    let room = maximum - budget - 1;
    let restore_window_days = window.min(room);
    arithmetic.push(format!(
        "a restore point is listed for {maximum} − {budget} = {}, then its data is erased within {}",
        days(maximum - budget),
        days(budget)
    ));
    let shrunk = restore_window_days < window;
    arithmetic.push(match shrunk {
        true => format!(
            "the restore window shrinks from {window} to {}: {maximum} (maximum) − {budget} (erase budget) − 1 night = {room}",
            days(restore_window_days)
        ),
        false => format!(
            "restore window: {}; {maximum} (maximum) − {budget} (erase budget) − 1 night = {room} would be possible",
            days(window)
        ),
    });
    Ok(Effective {
        restore_window_days,
        configured_restore_window_days: window,
        max_retention,
        max_retention_days: maximum,
        erase_budget_days: budget,
        shrunk,
        arithmetic,
    })
}

fn days(count: u32) -> String {
    format!("{count} day{}", if count == 1 { "" } else { "s" })
}

/// Bytes rewritten by reclaim per byte backed up, to be expected of this policy.
///
/// Deaths are scattered, so a pack loses its first frame early, and is rewritten when that one's deadline is near: the
/// more often, the shorter the erase budget `T` (days). What dies with one point was packed together before, which
/// keeps the rest low.
///
/// `0.65 + 13 / T` is fitted to a simulation of packs (`repository::reclaim::simulation`) for a guest that changes 2 %
/// of its disk every night (2 GiB scattered over 100 GiB), and within 20 % of it for budgets from 7 to 30 days. Guests
/// that change less of their disk pay more.
pub fn expected_rewriting(policy: &Policy) -> f64 {
    0.65 + 13.0 / f64::from(policy.effective().erase_budget_days)
}

fn parse_period(key: &'static str, text: &str) -> Result<Period, PolicyError> {
    Period::parse(text).map_err(|message| PolicyError::new(key, text, message))
}

fn parse_keep(text: &str) -> Result<KeepAfterWindow, PolicyError> {
    match text {
        "weekly" => Ok(KeepAfterWindow::Weekly),
        "all" => Ok(KeepAfterWindow::All),
        "none" => Ok(KeepAfterWindow::None),
        _ => Err(PolicyError::new(
            "keep_after_window",
            text,
            "write \"weekly\", \"all\" or \"none\"",
        )),
    }
}

fn parse_full_day(text: &str) -> Result<FullDay, PolicyError> {
    Ok(match text.to_ascii_lowercase().as_str() {
        "auto" => FullDay::Auto,
        "monday" => FullDay::On(Weekday::Monday),
        "tuesday" => FullDay::On(Weekday::Tuesday),
        "wednesday" => FullDay::On(Weekday::Wednesday),
        "thursday" => FullDay::On(Weekday::Thursday),
        "friday" => FullDay::On(Weekday::Friday),
        "saturday" => FullDay::On(Weekday::Saturday),
        "sunday" => FullDay::On(Weekday::Sunday),
        _ => {
            return Err(PolicyError::new(
                "full_day",
                text,
                "write \"auto\" or a weekday in English, such as \"sunday\"",
            ));
        }
    })
}

/// Two local times such as `22:00-06:00`.
pub fn parse_hours(text: &str) -> Option<(Time, Time)> {
    let time = |text: &str| -> Option<Time> {
        let (hour, minute) = text.trim().split_once(':')?;
        let number = |digits: &str| -> Option<i8> {
            let two = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_digit());
            two.then(|| digits.parse().ok()).flatten()
        };
        Time::new(number(hour)?, number(minute)?, 0, 0).ok()
    };
    let (start, end) = text.split_once('-')?;
    Some((time(start)?, time(end)?))
}

fn parse_window(text: &str) -> Result<(Time, Time), PolicyError> {
    match parse_hours(text) {
        None => Err(PolicyError::new(
            "window",
            text,
            "write the local start and end of the night, such as \"22:00-06:00\"",
        )),
        Some((start, end)) if start == end => Err(PolicyError::new(
            "window",
            text,
            "start and end are the same; a window has at least a minute, and at most a minute less than a day",
        )),
        Some(window) => Ok(window),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms(max_retention: &str) -> PolicyTerms {
        PolicyTerms {
            max_retention: max_retention.to_string(),
            ..PolicyTerms::default()
        }
    }

    fn numbers(terms: &PolicyTerms) -> (u32, u32, bool) {
        let policy = Policy::parse(terms).expect("a policy");
        let effective = policy.effective();
        (
            effective.restore_window_days,
            effective.erase_budget_days,
            effective.shrunk,
        )
    }

    #[test]
    fn the_default_holds_two_weeks_within_two_months() {
        assert_eq!(numbers(&PolicyTerms::default()), (14, 22, false));
        let policy = Policy::parse(&PolicyTerms::default()).expect("a policy");
        assert_eq!(policy.effective().listed_days(), 37);
        assert!(policy.effective().arithmetic[0].contains("59 days at the shortest"));
    }

    #[test]
    fn a_short_maximum_shrinks_the_window_visibly() {
        assert_eq!(numbers(&terms("61 days")), (14, 23, false));
        assert_eq!(numbers(&terms("20 days")), (14, 3, false));
        assert_eq!(numbers(&terms("16 days")), (14, 1, false));
        assert_eq!(numbers(&terms("15 days")), (13, 1, true));
        assert_eq!(numbers(&terms("14 days")), (12, 1, true));
        assert_eq!(numbers(&terms("7 days")), (5, 1, true));
        assert_eq!(numbers(&terms("3 days")), (1, 1, true));
        assert_eq!(numbers(&terms("10 years")), (14, 28, false));
        let policy = Policy::parse(&terms("7 days")).expect("a policy");
        let said = policy.effective().arithmetic.join("\n");
        assert!(
            said.contains(
                "shrinks from 14 to 5 days: 7 (maximum) − 1 (erase budget) − 1 night = 5"
            )
        );
    }

    #[test]
    fn a_maximum_under_three_days_is_refused_with_the_arithmetic() {
        for short in ["1 day", "2 days"] {
            let error = Policy::parse(&terms(short)).expect_err(short);
            assert_eq!((error.key, error.value.as_str()), ("max_retention", short));
            assert!(error.message.contains("= 3"), "{error}");
        }
    }

    #[test]
    fn an_erase_budget_that_leaves_no_night_is_refused_and_a_long_one_shrinks() {
        let with = |budget: &str| PolicyTerms {
            erase_budget: Some(budget.to_string()),
            ..terms("20 days")
        };
        assert_eq!(numbers(&with("5 days")), (14, 5, false));
        assert_eq!(numbers(&with("6 days")), (13, 6, true));
        assert_eq!(numbers(&with("18 days")), (1, 18, true));
        let error = Policy::parse(&with("19 days")).expect_err("no night is left");
        assert_eq!(error.key, "erase_budget");
        assert!(
            error
                .message
                .contains("20 days (maximum) − 19 (erase budget) − 1 night = 0")
        );
    }

    #[test]
    fn each_wrong_value_names_its_key() {
        type Spoil = fn(&mut PolicyTerms);
        let wrong: [(&str, Spoil); 8] = [
            ("timezone", |terms| terms.timezone = "Mars/Olympus".into()),
            ("window", |terms| terms.window = "22:00-22:00".into()),
            ("window", |terms| terms.window = "22-6".into()),
            ("window", |terms| terms.window = "22:00-25:00".into()),
            ("full_day", |terms| terms.full_day = "someday".into()),
            ("restore_window", |terms| {
                terms.restore_window = "0 days".into()
            }),
            ("keep_after_window", |terms| {
                terms.keep_after_window = "monthly".into()
            }),
            ("erase_budget", |terms| {
                terms.erase_budget = Some("1 hour".into())
            }),
        ];
        for (key, spoil) in wrong {
            let mut terms = PolicyTerms::default();
            spoil(&mut terms);
            assert_eq!(Policy::parse(&terms).expect_err(key).key, key);
        }
    }

    #[test]
    fn everything_that_is_wrong_is_said_at_once() {
        let keys = |errors: PolicyErrors| -> Vec<&str> {
            errors.into_iter().map(|error| error.key).collect()
        };
        let terms = PolicyTerms {
            timezone: "Mars/Olympus".into(),
            window: "22-6".into(),
            full_day: "someday".into(),
            restore_window: "soon".into(),
            max_retention: "later".into(),
            keep_after_window: "monthly".into(),
            erase_budget: Some("1 hour".into()),
        };
        assert_eq!(
            keys(Policy::judge(&terms).expect_err("all wrong")),
            [
                "timezone",
                "window",
                "full_day",
                "keep_after_window",
                "restore_window",
                "max_retention",
                "erase_budget"
            ]
        );
        let longer = Override {
            max_retention: Some("3 months".into()),
            restore_window: Some("3 weeks".into()),
            keep_after_window: Some("all".into()),
            erase_budget: None,
        };
        assert_eq!(
            keys(PolicyTerms::default().shorten(&longer).expect_err("longer")),
            ["max_retention", "restore_window", "keep_after_window"]
        );
        let unreadable = Override {
            max_retention: Some("3 moons".into()),
            restore_window: Some("".into()),
            keep_after_window: Some("some".into()),
            erase_budget: Some("-1 day".into()),
        };
        assert_eq!(
            keys(
                PolicyTerms::default()
                    .shorten(&unreadable)
                    .expect_err("no lengths")
            ),
            [
                "max_retention",
                "restore_window",
                "erase_budget",
                "keep_after_window"
            ]
        );
    }

    #[test]
    fn a_customer_may_shorten() {
        let house = PolicyTerms::default();
        let by = Override {
            max_retention: Some("7 days".into()),
            keep_after_window: Some("none".into()),
            ..Override::default()
        };
        let terms = house.shortened_by(&by).expect("shorter");
        assert_eq!(numbers(&terms), (5, 1, true));
        assert_eq!(terms.keep_after_window, "none");
        assert_eq!(terms.timezone, house.timezone);
        assert_eq!(
            house.shortened_by(&Override::default()).expect("the same"),
            house
        );
    }

    #[test]
    fn a_customer_may_not_lengthen_and_is_told_both_values() {
        let house = PolicyTerms::default();
        let cases = [
            (
                Override {
                    max_retention: Some("61 days".into()),
                    ..Override::default()
                },
                "max_retention",
                ["61 days", "2 months"],
            ),
            (
                Override {
                    restore_window: Some("3 weeks".into()),
                    ..Override::default()
                },
                "restore_window",
                ["21 days", "14 days"],
            ),
            (
                Override {
                    keep_after_window: Some("all".into()),
                    ..Override::default()
                },
                "keep_after_window",
                ["all", "weekly"],
            ),
            (
                Override {
                    erase_budget: Some("5 days".into()),
                    ..Override::default()
                },
                "erase_budget",
                ["54 days", "37 days"],
            ),
        ];
        for (by, key, both) in cases {
            let error = house.shortened_by(&by).expect_err(key);
            assert_eq!(error.key, key);
            for value in both {
                assert!(error.to_string().contains(value), "{error}");
            }
        }
    }

    #[test]
    fn an_inherited_budget_that_does_not_fit_is_chosen_anew_without_listing_longer() {
        let house = PolicyTerms {
            erase_budget: Some("44 days".into()),
            ..terms("60 days")
        };
        let shorter = |maximum: &str| {
            let by = Override {
                max_retention: Some(maximum.into()),
                ..Override::default()
            };
            numbers(&house.shortened_by(&by).expect("shorter"))
        };
        assert_eq!(shorter("59 days"), (14, 44, false));
        assert_eq!(shorter("58 days"), (14, 42, false));
        assert_eq!(shorter("7 days"), (5, 1, true));
    }

    #[test]
    fn terms_survive_the_ledger_and_unknown_keys_do_not() {
        let house = PolicyTerms::default();
        let text = serde_json::to_string(&house).expect("json");
        assert_eq!(
            serde_json::from_str::<PolicyTerms>(&text).expect("terms"),
            house
        );
        assert!(serde_json::from_str::<PolicyTerms>(r#"{"keep_tags": "x"}"#).is_err());
        assert!(serde_json::from_str::<Override>(r#"{"max_retension": "7 days"}"#).is_err());
    }
}
