use super::problem::Problem;
use super::section::Section;
use crate::policy::{Override, Policy, PolicyError, PolicyTerms};

/// The terms of the house. `None`: they cannot be kept or understood, and the problems say why.
pub(super) fn read_terms(
    mut section: Section<'_>,
    problems: &mut Vec<Problem>,
) -> Option<PolicyTerms> {
    let found = problems.len();
    let default = PolicyTerms::default();
    let timezone = section.required("timezone", problems);
    let mut text = |key, default: String| match section.text(key, problems) {
        Some(text) => text.to_string(),
        None => default,
    };
    let terms = PolicyTerms {
        // A zone that is missing is told once; the rest is judged as if it were there.
        timezone: timezone.map_or(default.timezone, str::to_string),
        window: text("window", default.window),
        full_day: text("full_day", default.full_day),
        restore_window: text("restore_window", default.restore_window),
        max_retention: text("max_retention", default.max_retention),
        keep_after_window: text("keep_after_window", default.keep_after_window),
        erase_budget: section.text("erase_budget", problems).map(str::to_string),
    };
    if let Err(errors) = Policy::judge(&terms) {
        problems.extend(errors.into_iter().map(|error| refused(&section, &error)));
    }
    let sound = problems.len() == found;
    section.finish(&[], problems);
    sound.then_some(terms)
}

pub(super) fn read_override(section: &mut Section<'_>, problems: &mut Vec<Problem>) -> Override {
    let mut text = |key| section.text(key, problems).map(str::to_string);
    Override {
        restore_window: text("restore_window"),
        max_retention: text("max_retention"),
        keep_after_window: text("keep_after_window"),
        erase_budget: text("erase_budget"),
    }
}

/// The terms that hold for a customer, and what they mean. Where the house's terms are refused, the customer's
/// values are only read: whether they shorten cannot be said.
pub(super) fn shorten(
    house: Option<&PolicyTerms>,
    by: &Override,
    section: &Section<'_>,
    problems: &mut Vec<Problem>,
) -> Option<(PolicyTerms, Policy)> {
    let Some(house) = house else {
        let errors = by.unreadable();
        problems.extend(errors.iter().map(|error| refused(section, error)));
        return None;
    };
    let shortened = house
        .shorten(by)
        .and_then(|terms| Ok((Policy::judge(&terms)?, terms)));
    match shortened {
        Ok((policy, terms)) => Some((terms, policy)),
        Err(errors) => {
            problems.extend(errors.into_iter().map(|error| refused(section, &error)));
            None
        }
    }
}

fn refused(section: &Section<'_>, error: &PolicyError) -> Problem {
    section.problem(error.key, format!("{:?}: {}", error.value, error.message))
}
