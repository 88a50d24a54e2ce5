mod effect;
mod told;
mod warning;

use crate::cli::answer::Answer;
use crate::cli::args::ConfigCommand;
use crate::cli::exit::Failure;
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::config::{Config, Customer, Place, Vm, VmSource};
use crate::policy::{Policy, PolicyTerms, expected_rewriting};
use effect::{Effect, Effects, effects_of};
use serde_json::{Value, json};
use std::fmt::Write;
use told::{told_document, told_lines};
use warning::{Warning, warnings_of};

/// Text is wrapped here; a path that is longer stays whole.
const COLUMNS: usize = 80;
/// Names of values, with the indent before them.
const NAME_COLUMNS: usize = 22;

pub fn run(invocation: &Invocation, command: ConfigCommand) -> Result<Answer, Failure> {
    let config = invocation.config()?;
    Ok(match command {
        ConfigCommand::Check => {
            let effects = effects_of(invocation, &config);
            check(&config, &warnings_of(&config), &effects)
        }
        ConfigCommand::Show => show(&config),
    })
}

/// Customers with the same terms, in the order of the configuration.
struct Group<'a> {
    policy: &'a Policy,
    customers: Vec<&'a Customer>,
}

fn groups_of(config: &Config) -> Vec<Group<'_>> {
    let mut groups: Vec<Group<'_>> = Vec::new();
    for customer in &config.customers {
        let same = groups
            .iter_mut()
            .find(|group| *group.policy == customer.policy);
        match same {
            Some(group) => group.customers.push(customer),
            None => groups.push(Group {
                policy: &customer.policy,
                customers: vec![customer],
            }),
        }
    }
    groups
}

fn check(config: &Config, warnings: &[Warning], effects: &Effects) -> Answer {
    let vms: usize = config
        .customers
        .iter()
        .map(|customer| customer.vms.len())
        .sum();
    let mut text = format!(
        "{}: sound; {}, {}\n",
        config.file.display(),
        figures::count(config.customers.len(), "customer", "customers"),
        figures::count(vms, "VM", "VMs"),
    );
    let groups = groups_of(config);
    for group in &groups {
        let names: Vec<&str> = group
            .customers
            .iter()
            .map(|customer| customer.name.as_str())
            .collect();
        text.push('\n');
        text += &wrapped("policy of ", 10, &names.join(", "));
        text += &policy_text(group.policy);
    }
    if !warnings.is_empty() {
        text.push_str("\nwarnings\n");
    }
    for warning in warnings {
        text += &wrapped("  ! ", 4, &warning.message);
    }
    let untold = |why: &String| format!("what it changes cannot be told: {why}");
    let known = effects.known.iter().flat_map(Effect::sentences);
    let sentences: Vec<String> = known.chain(effects.unknown.iter().map(untold)).collect();
    if !sentences.is_empty() {
        text.push_str("\nwhat it changes\n");
    }
    for sentence in &sentences {
        text += &wrapped("  - ", 4, sentence);
    }
    let document = json!({
        "file": config.file.to_string_lossy(),
        "sound": true,
        "customers": config.customers.len(),
        "vms": vms,
        "policies": groups.iter().map(|group| json!({
            "customers": group.customers.iter().map(|customer| customer.name.as_str()).collect::<Vec<_>>(),
            "terms": terms_document(group.policy.terms()),
            "effective": effective_document(group.policy),
        })).collect::<Vec<_>>(),
        "warnings": warnings.iter().map(Warning::document).collect::<Vec<_>>(),
        "changes": effects.known.iter().map(Effect::document).collect::<Vec<_>>(),
        "changes_unknown": effects.unknown,
    });
    Answer::done(text, document)
}

/// What the policy comes to, and how.
fn policy_text(policy: &Policy) -> String {
    let (terms, effective) = (policy.terms(), policy.effective());
    let mut text = String::new();
    let mut line = |name: &str, value: &str| text += &named(name, value);
    line("nights", &format!("{} {}", terms.window, terms.timezone));
    line("full", &full_day(terms));
    line("restore window", &days(effective.restore_window_days));
    line("listed", &days(effective.listed_days()));
    line("erase budget", &days(effective.erase_budget_days));
    line("maximum retention", &terms.max_retention);
    line(
        "between the two",
        match terms.keep_after_window.as_str() {
            "weekly" => "one restore point a week",
            "all" => "every restore point",
            _ => "no restore point",
        },
    );
    line(
        "expected rewriting",
        &format!(
            "{:.1} bytes a night for each byte backed up, where a guest changes 2 % of its disk a night",
            expected_rewriting(policy)
        ),
    );
    text.push_str("  arithmetic\n");
    for sentence in &effective.arithmetic {
        text += &wrapped("  - ", 4, sentence);
    }
    text
}

fn full_day(terms: &PolicyTerms) -> String {
    match terms.full_day.as_str() {
        "auto" => {
            "every six nights, seven at most, the VMs of a host spread over them (auto)".to_string()
        }
        day => format!("weekly, {day}"),
    }
}

fn show(config: &Config) -> Answer {
    let host = &config.host;
    let repository = &config.repository;
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "{name:<NAME_COLUMNS$}{value}");
    };
    line("configuration", &config.file.display().to_string());
    line("host", &host.name);
    line("clock", host.clock.as_str());
    line("role", host.role.as_str());
    line("state", &host.state_dir.display().to_string());
    line("threads", &host.threads.to_string());
    line("repository", &repository.place.to_string());
    match &repository.place {
        Place::Directory(_) => line("reserve", &figures::bytes(repository.reserve_bytes)),
        Place::Bucket(bucket) => {
            line("endpoint", bucket.endpoint.as_deref().unwrap_or("AWS"));
            line("region", &bucket.region);
            line("connections", &bucket.connections.to_string());
            line("cache", &figures::bytes(bucket.cache_bytes));
        }
    }
    line("chunk size", &figures::bytes(repository.chunk_bytes.into()));
    line("pack size", &figures::bytes(repository.pack_bytes));
    line(
        "compression level",
        &repository.compression_level.to_string(),
    );
    line("writers", &repository.writers.to_string());
    for recipient in &repository.escrow {
        line("escrow", recipient);
    }
    for (name, what) in told_lines(&config.notify) {
        line(name, &what);
    }
    for customer in &config.customers {
        text += &customer_text(customer);
    }
    let document = json!({
        "file": config.file.to_string_lossy(),
        "host": {
            "name": host.name,
            "clock": host.clock.as_str(),
            "role": host.role.as_str(),
            "state_dir": host.state_dir,
            "threads": host.threads,
        },
        "repository": {
            "url": repository.place.to_string(),
            "directory": match &repository.place {
                Place::Directory(directory) => Some(directory),
                Place::Bucket(_) => None,
            },
            "s3": match &repository.place {
                Place::Directory(_) => None,
                Place::Bucket(bucket) => Some(json!({
                    "bucket": bucket.name,
                    "prefix": bucket.prefix,
                    "endpoint": bucket.endpoint,
                    "region": bucket.region,
                    "path_style": bucket.path_style,
                    "connections": bucket.connections,
                    "cache_bytes": bucket.cache_bytes,
                })),
            },
            "reserve_bytes": repository.reserve_bytes,
            "chunk_bytes": repository.chunk_bytes,
            "pack_bytes": repository.pack_bytes,
            "compression_level": repository.compression_level,
            "writers": repository.writers.to_string(),
            "escrow": repository.escrow,
        },
        "notify": told_document(&config.notify),
        "customers": config.customers.iter().map(customer_document).collect::<Vec<_>>(),
    });
    Answer::done(text, document)
}

fn customer_text(customer: &Customer) -> String {
    let (terms, overrides) = (&customer.terms, &customer.overrides);
    let effective = customer.policy.effective();
    let mut text = format!(
        "\ncustomer {}  ({})\n",
        customer.name,
        customer.file.display()
    );
    let mut line = |name: &str, value: &str, own: bool| {
        let origin = if own { " (this customer's own)" } else { "" };
        text += &named(name, &format!("{value}{origin}"));
    };
    line("time zone", &terms.timezone, false);
    line("window", &terms.window, false);
    line("full day", &terms.full_day, false);
    let window = match effective.shrunk {
        true => format!(
            "{}, shrunk from {}",
            days(effective.restore_window_days),
            terms.restore_window
        ),
        false => terms.restore_window.clone(),
    };
    line(
        "restore window",
        &window,
        overrides.restore_window.is_some(),
    );
    line("listed", &days(effective.listed_days()), false);
    let budget = match &terms.erase_budget {
        Some(_) => days(effective.erase_budget_days),
        None => format!("{} (derived)", days(effective.erase_budget_days)),
    };
    line("erase budget", &budget, overrides.erase_budget.is_some());
    line(
        "maximum retention",
        &terms.max_retention,
        overrides.max_retention.is_some(),
    );
    line(
        "kept after window",
        &terms.keep_after_window,
        overrides.keep_after_window.is_some(),
    );
    for recipient in &customer.escrow {
        let _ = writeln!(text, "  {:<20}{recipient}", "escrow");
    }
    for vm in &customer.vms {
        for (label, value) in source_lines(&vm.source) {
            let _ = writeln!(text, "  {:<20}{value}", format!("{} {label}", vm.name));
        }
    }
    text
}

/// What a VM is read by, a line each.
fn source_lines(source: &VmSource) -> Vec<(String, String)> {
    match source {
        VmSource::Images(disks) => disks
            .iter()
            .map(|disk| {
                let value = format!("{} ({})", disk.path.display(), disk.format.as_str());
                (disk.name.to_string(), value)
            })
            .collect(),
        VmSource::Qmp(vm) => {
            let freeze = match vm.guest_agent {
                Some(_) => vm.fsfreeze.as_str(),
                None => "never",
            };
            vec![(
                "qmp".to_string(),
                format!("{} (fsfreeze {freeze})", vm.monitor.display()),
            )]
        }
        VmSource::Libvirt(vm) => vec![(
            "libvirt".to_string(),
            format!("{} (fsfreeze {})", vm.domain, vm.fsfreeze.as_str()),
        )],
        VmSource::Nbd(file) => vec![("nbd".to_string(), file.display().to_string())],
    }
}

fn vm_document(vm: &Vm) -> Value {
    let mut document = json!({ "name": vm.name.as_str() });
    match &vm.source {
        VmSource::Images(disks) => {
            document["disks"] = disks
                .iter()
                .map(|disk| {
                    json!({
                        "name": disk.name.as_str(),
                        "path": disk.path,
                        "format": disk.format.as_str(),
                    })
                })
                .collect();
        }
        VmSource::Qmp(vm) => {
            document["qmp"] = json!(vm.monitor);
            document["guest_agent"] = json!(vm.guest_agent);
            document["fsfreeze"] = vm.fsfreeze.as_str().into();
            document["exclude"] = vm.exclude.iter().map(|disk| disk.as_str()).collect();
        }
        VmSource::Libvirt(vm) => {
            document["libvirt"] = vm.domain.clone().into();
            document["fsfreeze"] = vm.fsfreeze.as_str().into();
        }
        VmSource::Nbd(file) => document["nbd"] = json!(file),
    }
    document
}

fn customer_document(customer: &Customer) -> Value {
    json!({
        "id": customer.name.as_str(),
        "file": customer.file,
        "policy": terms_document(&customer.terms),
        "effective": effective_document(&customer.policy),
        "escrow": customer.escrow,
        "vms": customer.vms.iter().map(vm_document).collect::<Vec<_>>(),
    })
}

fn terms_document(terms: &PolicyTerms) -> Value {
    json!({
        "timezone": terms.timezone,
        "window": terms.window,
        "full_day": terms.full_day,
        "restore_window": terms.restore_window,
        "max_retention": terms.max_retention,
        "keep_after_window": terms.keep_after_window,
        "erase_budget": terms.erase_budget,
    })
}

fn effective_document(policy: &Policy) -> Value {
    let effective = policy.effective();
    json!({
        "restore_window_days": effective.restore_window_days,
        "configured_restore_window_days": effective.configured_restore_window_days,
        "shrunk": effective.shrunk,
        "listed_days": effective.listed_days(),
        "erase_budget_days": effective.erase_budget_days,
        "max_retention_days": effective.max_retention_days,
        "expected_rewriting": (expected_rewriting(policy) * 100.0).round() / 100.0,
        "arithmetic": effective.arithmetic,
    })
}

/// "1 day", "14 days".
fn days(count: u32) -> String {
    format!("{count} day{}", if count == 1 { "" } else { "s" })
}

/// One value with its name, in the columns of all the others.
fn named(name: &str, value: &str) -> String {
    let start = format!("  {name:<width$}", width = NAME_COLUMNS - 2);
    wrapped(&start, NAME_COLUMNS, value)
}

/// Words on as many lines as they need, the later ones indented.
fn wrapped(start: &str, indent: usize, words: &str) -> String {
    let mut text = start.to_string();
    let mut column = start.chars().count();
    let mut first = true;
    for word in words.split(' ').filter(|word| !word.is_empty()) {
        let length = word.chars().count();
        if !first && column + 1 + length > COLUMNS {
            text.push('\n');
            text += &" ".repeat(indent);
            column = indent;
        } else if !first {
            text.push(' ');
            column += 1;
        }
        text += word;
        column += length;
        first = false;
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use std::path::Path;

    /// The full example of the repository with `customer` added to it.
    fn example(customer: &str) -> Config {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("vmkeep.toml");
        let text = std::fs::read_to_string("config/vmkeep.toml").expect("the example");
        std::fs::write(&file, format!("{text}\n{customer}")).expect("written");
        config::load(&file).expect("a configuration")
    }

    /// The text without its line breaks, which fall where the numbers happen to be long.
    fn unwrapped(text: &str) -> String {
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn each_distinct_policy_is_shown_once_with_its_arithmetic() {
        let config = example("[[customer]]\nid = \"umbrella\"\n");
        let answer = check(&config, &[], &Effects::default());
        assert_eq!(answer.text.matches("policy of").count(), 2);
        for part in [
            "policy of acme, umbrella\n",
            "policy of globex\n",
            "  restore window      14 days\n",
            "  listed              37 days\n",
            "  erase budget        22 days\n",
            "  restore window      5 days\n",
            "  expected rewriting  1.2 bytes",
        ] {
            assert!(answer.text.contains(part), "{part:?} in\n{}", answer.text);
        }
        let words = unwrapped(&answer.text);
        assert!(
            words.contains("7 (maximum) − 1 (erase budget) − 1 night"),
            "{}",
            answer.text
        );
        let policies = answer.document["policies"].as_array().expect("a list");
        assert_eq!(policies.len(), 2);
        assert_eq!(policies[0]["customers"], json!(["acme", "umbrella"]));
        assert_eq!(policies[0]["effective"]["restore_window_days"], 14);
        assert_eq!(policies[1]["effective"]["shrunk"], true);
    }

    #[test]
    fn no_line_is_longer_than_a_terminal() {
        let config = example("[[customer]]\nid = \"umbrella\"\n");
        let warning = Warning {
            kind: "escrow",
            customer: "acme".into(),
            message: "many words ".repeat(30),
        };
        let text = check(&config, &[warning], &Effects::default()).text;
        for line in text.lines().skip(1) {
            assert!(line.chars().count() <= COLUMNS, "{line}");
        }
        assert!(text.ends_with("words\n"));
    }

    #[test]
    fn warnings_tell_what_is_probably_not_meant() {
        let config = example("[[customer]]\nid = \"empty\"\nmax_retention = \"14 days\"\n");
        let kinds = |config: &Config| -> Vec<(String, &'static str)> {
            warnings_of(config)
                .into_iter()
                .filter(|warning| warning.kind != "disk")
                .map(|warning| (warning.customer, warning.kind))
                .collect()
        };
        let expected = |list: &[(&str, &'static str)]| -> Vec<(String, &'static str)> {
            list.iter()
                .map(|(customer, kind)| (customer.to_string(), *kind))
                .collect()
        };
        assert_eq!(
            kinds(&config),
            expected(&[("globex", "window"), ("empty", "window"), ("empty", "vms")])
        );
        let minimal = config::load(Path::new("config/minimal.toml")).expect("the least");
        assert_eq!(kinds(&minimal), expected(&[("acme", "escrow")]));
        let text = check(&minimal, &warnings_of(&minimal), &Effects::default()).text;
        let words = unwrapped(&text);
        assert!(
            words.contains("the loss of this host is the loss of every backup"),
            "{text}"
        );
    }

    #[test]
    fn what_is_shown_is_what_holds() {
        let config = example("");
        let answer = show(&config);
        for part in [
            "  restore window      5 days, shrunk from 14 days\n",
            "  erase budget        1 day (derived)\n",
            "  maximum retention   7 days (this customer's own)\n",
        ] {
            assert!(answer.text.contains(part), "{part:?} in\n{}", answer.text);
        }
        assert_eq!(
            answer.document["customers"][1]["policy"]["max_retention"],
            "7 days"
        );
        assert_eq!(
            answer.document["customers"][1]["effective"]["restore_window_days"],
            5
        );
    }
}
