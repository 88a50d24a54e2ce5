//! Whether the promises can be kept in a bucket that is set up as it is.

use super::{Policy, lock_term};
use crate::model::{BucketFacts, CustomerName, LifecycleRule, Versioning};
use std::fmt;

/// Why a bucket cannot hold the repository, with the arithmetic, and what to change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BucketRefusal {
    pub reason: String,
    pub remedy: String,
}

impl fmt::Display for BucketRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

/// Everything that stands against the bucket. `key_prefix` is the beginning of all keys of the
/// repository (`""`, or one that ends with a slash); `allowed_regions` is empty where any will do;
/// `locks`: what is created shall be locked.
pub fn judge_bucket(
    facts: &BucketFacts,
    key_prefix: &str,
    allowed_regions: &[String],
    locks: bool,
    policies: &[(&CustomerName, &Policy)],
) -> Vec<BucketRefusal> {
    let mut refusals = Vec::new();
    let mut refuse = |reason: String, remedy: &str| {
        refusals.push(BucketRefusal {
            reason,
            remedy: remedy.to_string(),
        });
    };
    if let Some(reason) = wrong_place(facts.region.as_deref(), allowed_regions) {
        refuse(
            reason,
            "use a bucket in one of the regions, or correct allowed_regions",
        );
    }
    if facts.needs_code_to_delete && facts.versioning != Versioning::Never {
        refuse(
            "no version can be deleted without a person's code (MFA delete): nothing could be erased"
                .to_string(),
            "switch MFA delete off for this bucket",
        );
    }
    if facts.is_replicated {
        refuse(
            "the bucket is replicated: copies stay elsewhere when vmkeep deletes, past every deadline"
                .to_string(),
            "remove the replication of this bucket; a second store is a second repository",
        );
    }
    if locks && !facts.can_lock {
        refuse(
            "objects shall be locked, and the bucket does not say that it has Object Lock"
                .to_string(),
            "make a bucket with Object Lock (it cannot be had later everywhere), or remove lock",
        );
    }
    for (customer, policy) in policies {
        let effective = policy.effective();
        if locks && let Err(why) = lock_term(policy) {
            refuse(
                format!("the objects of customer {customer} cannot be locked: {why}"),
                "a longer max_retention gives a longer erase budget (28 days at most); or shorten \
                 restore_window, or remove lock",
            );
        }
        // What is written at some time can hold pieces of a point whose erasure is under way; they
        // must be deletable again before the deadline, with time for the deleting.
        let longest = effective.erase_budget_days / 2;
        if facts.default_lock_days > longest {
            refuse(
                format!(
                    "every new object is locked for {} days by the bucket's default retention; \
                     customer {customer} has an erase budget of {} days, of which at most half, \
                     {longest} days, can be waited for a lock",
                    facts.default_lock_days, effective.erase_budget_days
                ),
                "remove the default retention of the bucket, or shorten it",
            );
        }
        for rule in &facts.rules {
            if let Some((reason, remedy)) = harm_of(rule, key_prefix, customer, policy) {
                refuse(reason, remedy);
            }
        }
    }
    for rule in &facts.rules {
        if let Some((reason, remedy)) = harm_to_all(rule, facts.versioning, key_prefix) {
            refuse(reason, remedy);
        }
    }
    refusals.dedup();
    refusals
}

fn wrong_place(region: Option<&str>, allowed: &[String]) -> Option<String> {
    if allowed.is_empty() {
        return None;
    }
    let list = allowed.join(", ");
    match region {
        None | Some("") => Some(format!(
            "where the bucket is cannot be told, and only these regions are allowed: {list}"
        )),
        Some(region) if allowed.iter().any(|one| one == region) => None,
        Some(region) => Some(format!(
            "the bucket is in {region}, and only these regions are allowed: {list}"
        )),
    }
}

/// An object that somebody hid or wrote over is brought back by a prune; the server must not remove
/// what is below before one had the time.
const LEAST_DAYS_OF_OLDER_VERSIONS: u32 = 14;

/// What a rule of the server would do to what all customers need.
fn harm_to_all(
    rule: &LifecycleRule,
    versioning: Versioning,
    key_prefix: &str,
) -> Option<(String, &'static str)> {
    let name = &rule.name;
    let root = format!("{key_prefix}vmkeep.json");
    let removes = rule.expires_after_days.is_some() || rule.archived_in.is_some();
    if removes && root.starts_with(&rule.key_prefix) {
        return Some((
            format!(
                "the lifecycle rule {name:?} would remove or archive vmkeep.json, without which nothing is found"
            ),
            "restrict the rule to keys that are not of the repository",
        ));
    }
    let own = format!("{key_prefix}customers/");
    let concerned = rule.key_prefix.starts_with(&own) || own.starts_with(&rule.key_prefix);
    // Records of points are there for so long at the most, and are what a backstop is for.
    let for_points = rule.key_prefix.ends_with("/points/");
    match rule.older_versions_after_days {
        Some(days)
            if concerned
                && !for_points
                && versioning != Versioning::Never
                && days < LEAST_DAYS_OF_OLDER_VERSIONS =>
        {
            Some((
                format!(
                    "the lifecycle rule {name:?} removes older versions after {days} days: what \
                     somebody wrote over could not be brought back for \
                     {LEAST_DAYS_OF_OLDER_VERSIONS} days"
                ),
                "let the rule wait longer; vmkeep deletes all versions of what is over by itself",
            ))
        }
        _ => None,
    }
}

/// What a rule of the server would do to a customer's objects.
fn harm_of(
    rule: &LifecycleRule,
    key_prefix: &str,
    customer: &CustomerName,
    policy: &Policy,
) -> Option<(String, &'static str)> {
    let own = format!("{key_prefix}customers/{customer}/");
    let points = format!("{own}points/");
    // A rule that is for something inside of the customer, and one that is for more.
    let concerned = rule.key_prefix.starts_with(&own) || own.starts_with(&rule.key_prefix);
    if !concerned {
        return None;
    }
    let name = &rule.name;
    if let Some(class) = &rule.archived_in {
        return Some((
            format!(
                "the lifecycle rule {name:?} moves objects of customer {customer} to {class}, from \
                 where nothing can be restored at once"
            ),
            "restrict the rule to keys that are not of the repository",
        ));
    }
    let days = rule.expires_after_days?;
    let longest = policy.effective().max_retention.longest_days();
    // Point records alone may be removed by the server, as the last means when no host is left; but
    // not before their time.
    if rule.key_prefix.starts_with(&points) {
        return (days < longest).then(|| {
            (
                format!(
                    "the lifecycle rule {name:?} removes restore points of customer {customer} \
                     after {days} days; the maximum is {} (up to {longest} days)",
                    policy.terms().max_retention
                ),
                "let the rule wait for the maximum retention at its longest",
            )
        });
    }
    let when = match days {
        0 => "on a fixed date".to_string(),
        days => format!("after {days} days"),
    };
    Some((
        format!(
            "the lifecycle rule {name:?} removes objects of customer {customer} {when}: restore \
             points that are younger can need them"
        ),
        "restrict the rule to keys that are not of the repository, or to its points/",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::PolicyTerms;

    fn policy(max_retention: &str) -> Policy {
        let terms = PolicyTerms {
            timezone: "UTC".to_string(),
            max_retention: max_retention.to_string(),
            ..PolicyTerms::default()
        };
        Policy::parse(&terms).unwrap()
    }

    fn judged(facts: &BucketFacts, allowed: &[&str]) -> Vec<String> {
        let policy = policy("2 months");
        assert_eq!(policy.effective().erase_budget_days, 22);
        let allowed: Vec<String> = allowed.iter().map(ToString::to_string).collect();
        judged_by(&policy, facts, &allowed, false)
    }

    fn judged_by(
        policy: &Policy,
        facts: &BucketFacts,
        allowed: &[String],
        locks: bool,
    ) -> Vec<String> {
        let acme = CustomerName::new("acme").unwrap();
        judge_bucket(facts, "vmkeep/", allowed, locks, &[(&acme, policy)])
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    fn with_rule(key_prefix: &str, expires_after_days: Option<u32>) -> BucketFacts {
        BucketFacts {
            rules: vec![LifecycleRule {
                name: "tidy".to_string(),
                key_prefix: key_prefix.to_string(),
                expires_after_days,
                ..LifecycleRule::default()
            }],
            ..BucketFacts::default()
        }
    }

    #[track_caller]
    fn one(refusals: &[String], part: &str) {
        assert!(
            matches!(refusals, [only] if only.contains(part)),
            "{part:?} alone expected: {refusals:?}"
        );
    }

    #[test]
    fn a_plain_bucket_and_one_that_keeps_versions_are_taken() {
        for versioning in [
            Versioning::Never,
            Versioning::Enabled,
            Versioning::Suspended,
        ] {
            let facts = BucketFacts {
                versioning,
                ..BucketFacts::default()
            };
            assert_eq!(judged(&facts, &[]), [] as [&str; 0]);
        }
    }

    #[test]
    fn a_lock_may_last_for_half_of_the_erase_budget_and_no_day_longer() {
        let with_lock = |default_lock_days| BucketFacts {
            default_lock_days,
            ..BucketFacts::default()
        };
        assert_eq!(judged(&with_lock(11), &[]), [] as [&str; 0]);
        one(&judged(&with_lock(12), &[]), "at most half, 11 days");
    }

    #[test]
    fn objects_are_locked_where_the_bucket_can_and_every_erase_budget_bears_it() {
        let mut facts = BucketFacts::default();
        let two_months = policy("2 months");
        one(
            &judged_by(&two_months, &facts, &[], true),
            "does not say that it has Object Lock",
        );
        facts.can_lock = true;
        assert_eq!(judged_by(&two_months, &facts, &[], true), [] as [&str; 0]);
        let month = policy("1 month");
        one(&judged_by(&month, &facts, &[], true), "(erase budget) − 2");
        assert_eq!(judged_by(&month, &facts, &[], false), [] as [&str; 0]);
    }

    #[test]
    fn what_keeps_deleted_bytes_elsewhere_or_for_a_person_is_refused() {
        let replicated = BucketFacts {
            is_replicated: true,
            ..BucketFacts::default()
        };
        one(&judged(&replicated, &[]), "replicated");
        let mut with_code = BucketFacts {
            needs_code_to_delete: true,
            versioning: Versioning::Enabled,
            ..BucketFacts::default()
        };
        one(&judged(&with_code, &[]), "MFA delete");
        with_code.versioning = Versioning::Never;
        assert_eq!(judged(&with_code, &[]), [] as [&str; 0]);
    }

    #[test]
    fn rules_of_the_server_must_leave_the_repository_alone() {
        for elsewhere in [
            "other/",
            "vmkeep/customers/acme2/",
            "vmkeep2",
            "vmkeep/customers/acme/x",
        ] {
            let told = judged(&with_rule(elsewhere, Some(1)), &[]);
            let ours = elsewhere.starts_with("vmkeep/customers/acme/");
            assert_eq!(told.len(), usize::from(ours), "{elsewhere}: {told:?}");
        }
        for ours in [
            "",
            "vmkeep",
            "vmkeep/",
            "vmkeep/customers/acme/packs/",
            "vmkeep/customers/a",
        ] {
            let told = judged(&with_rule(ours, Some(9999)), &[]);
            assert!(told[0].contains("removes objects"), "{told:?}");
            // Uploads only.
            assert_eq!(judged(&with_rule(ours, None), &[]), [] as [&str; 0]);
        }
        for root in ["vmkeep/v", "vmkeep/vmkeep.json"] {
            one(&judged(&with_rule(root, Some(9999)), &[]), "vmkeep.json");
        }
        let told = judged(&with_rule("", Some(0)), &[]);
        assert!(told[0].contains("on a fixed date"), "{told:?}");
        let mut archive = with_rule("vmkeep/", None);
        archive.rules[0].archived_in = Some("GLACIER".to_string());
        assert!(judged(&archive, &[])[0].contains("GLACIER"));
    }

    #[test]
    fn older_versions_stay_for_long_enough_to_be_brought_back() {
        let after = |days, key_prefix: &str| {
            let mut facts = with_rule(key_prefix, None);
            facts.versioning = Versioning::Enabled;
            facts.rules[0].older_versions_after_days = Some(days);
            facts
        };
        one(&judged(&after(13, ""), &[]), "could not be brought back");
        assert_eq!(judged(&after(14, ""), &[]), [] as [&str; 0]);
        let points = "vmkeep/customers/acme/points/";
        assert_eq!(judged(&after(1, points), &[]), [] as [&str; 0]);
        let mut without = after(1, "");
        without.versioning = Versioning::Never;
        assert_eq!(judged(&without, &[]), [] as [&str; 0]);
    }

    #[test]
    fn a_rule_for_point_records_is_a_backstop_if_it_waits_for_the_maximum() {
        let points = "vmkeep/customers/acme/points/";
        assert_eq!(judged(&with_rule(points, Some(62)), &[]), [] as [&str; 0]);
        one(&judged(&with_rule(points, Some(61)), &[]), "up to 62 days");
    }

    #[test]
    fn the_place_is_one_that_is_allowed_or_nothing_is_written() {
        let at = |region: Option<&str>| BucketFacts {
            region: region.map(str::to_string),
            ..BucketFacts::default()
        };
        assert_eq!(
            judged(&at(Some("eu-west-1")), &["eu-central-1", "eu-west-1"]),
            [] as [&str; 0]
        );
        one(
            &judged(&at(Some("us-east-1")), &["eu-west-1"]),
            "is in us-east-1",
        );
        one(&judged(&at(None), &["eu-west-1"]), "cannot be told");
        one(&judged(&at(Some("")), &["eu-west-1"]), "cannot be told");
        assert_eq!(judged(&at(None), &[]), [] as [&str; 0]);
    }
}
