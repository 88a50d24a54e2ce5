use super::problem::Problem;
use super::section::Section;

/// The terms of a retention policy as they are written; `policy` reads and judges them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyTerms {
    pub timezone: String,
    pub window: String,
    pub full_day: String,
    pub restore_window: String,
    pub max_retention: String,
    pub keep_after_window: String,
    pub erase_budget: Option<String>,
}

/// What one customer's contract says differently; each may only shorten.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Overrides {
    pub restore_window: Option<String>,
    pub max_retention: Option<String>,
    pub keep_after_window: Option<String>,
    pub erase_budget: Option<String>,
}

impl Overrides {
    /// The terms that hold for the customer.
    pub fn applied_to(&self, base: &PolicyTerms) -> PolicyTerms {
        let or = |own: &Option<String>, base: &String| own.as_ref().unwrap_or(base).clone();
        PolicyTerms {
            restore_window: or(&self.restore_window, &base.restore_window),
            max_retention: or(&self.max_retention, &base.max_retention),
            keep_after_window: or(&self.keep_after_window, &base.keep_after_window),
            erase_budget: self.erase_budget.clone().or(base.erase_budget.clone()),
            ..base.clone()
        }
    }
}

pub(super) fn read_terms(mut section: Section<'_>, problems: &mut Vec<Problem>) -> PolicyTerms {
    let timezone = section.required("timezone", problems).unwrap_or_default();
    let mut text = |key, default: &str| section.text(key, problems).unwrap_or(default).to_string();
    let terms = PolicyTerms {
        timezone: timezone.to_string(),
        window: text("window", "22:00-06:00"),
        full_day: text("full_day", "auto"),
        restore_window: text("restore_window", "14 days"),
        max_retention: text("max_retention", "2 months"),
        keep_after_window: text("keep_after_window", "weekly"),
        erase_budget: section.text("erase_budget", problems).map(str::to_string),
    };
    section.finish(&[], problems);
    terms
}

pub(super) fn read_overrides(section: &mut Section<'_>, problems: &mut Vec<Problem>) -> Overrides {
    let mut text = |key| section.text(key, problems).map(str::to_string);
    Overrides {
        restore_window: text("restore_window"),
        max_retention: text("max_retention"),
        keep_after_window: text("keep_after_window"),
        erase_budget: text("erase_budget"),
    }
}
