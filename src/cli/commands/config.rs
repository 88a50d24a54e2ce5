mod effect;
mod told;
mod warning;

use crate::cli::answer::Answer;
use crate::cli::args::ConfigCommand;
use crate::cli::exit::Failure;
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::config::{
    Bucket, BucketCredentials, Config, Customer, Host, Hours, Limits, Place, Run, Vm, VmSource,
};
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
            let mut warnings = warnings_of(&config);
            warnings.extend(effects.warnings.iter().cloned());
            check(&config, &warnings, &effects)
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
    let overlay = figures::bytes(host.overlay_bytes);
    let overlay_dir = host.overlay_dir.display();
    line("overlays", &format!("{overlay_dir}, {overlay} a disk"));
    let freeze_limit = humantime::format_duration(host.freeze_limit);
    line("freeze limit", &freeze_limit.to_string());
    if let Some(uri) = &host.libvirt_uri {
        line("libvirt", uri);
    }
    line("repository", &repository.place.to_string());
    match &repository.place {
        Place::Directory(_) => line("reserve", &figures::bytes(repository.reserve_bytes)),
        Place::Bucket(bucket) => {
            line("endpoint", bucket.endpoint.as_deref().unwrap_or("AWS"));
            line("region", &bucket.region);
            line("connections", &bucket.connections.to_string());
            line("cache", &figures::bytes(bucket.cache_bytes));
            for (name, value) in bucket_lines(bucket) {
                line(name, &value);
            }
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
    for (name, value) in run_lines(&config.run) {
        line(&name, &value);
    }
    for (name, what) in told_lines(&config.notify) {
        line(name, &what);
    }
    for customer in &config.customers {
        text += &customer_text(customer);
    }
    let document = json!({
        "file": config.file.to_string_lossy(),
        "host": host_document(host),
        "repository": {
            "url": repository.place.to_string(),
            "directory": match &repository.place {
                Place::Directory(directory) => Some(directory),
                Place::Bucket(_) => None,
            },
            "s3": match &repository.place {
                Place::Directory(_) => None,
                Place::Bucket(bucket) => Some(bucket_document(bucket)),
            },
            "reserve_bytes": repository.reserve_bytes,
            "chunk_bytes": repository.chunk_bytes,
            "pack_bytes": repository.pack_bytes,
            "compression_level": repository.compression_level,
            "writers": repository.writers.to_string(),
            "escrow": repository.escrow,
        },
        "run": run_document(&config.run),
        "notify": told_document(&config.notify),
        "customers": config.customers.iter().map(customer_document).collect::<Vec<_>>(),
    });
    Answer::done(text, document)
}

fn host_document(host: &Host) -> Value {
    json!({
        "name": host.name,
        "clock": host.clock.as_str(),
        "role": host.role.as_str(),
        "state_dir": host.state_dir,
        "threads": host.threads,
        "overlay_dir": host.overlay_dir,
        "overlay_bytes": host.overlay_bytes,
        "freeze_limit_seconds": host.freeze_limit.as_secs_f64(),
        "libvirt_uri": host.libvirt_uri,
    })
}

/// What of a bucket was configured beyond what every bucket has.
fn bucket_lines(bucket: &Bucket) -> Vec<(&'static str, String)> {
    let mut lines = Vec::new();
    if !bucket.allowed_regions.is_empty() {
        lines.push(("allowed regions", bucket.allowed_regions.join(", ")));
    }
    if let Some(mode) = bucket.lock {
        lines.push(("lock", mode.as_str().to_string()));
    }
    let rate = |bytes: u64| format!("{} a second", figures::bytes(bytes));
    if let Some(bytes) = bucket.upload_bytes_per_second {
        lines.push(("upload limit", rate(bytes)));
    }
    if let Some(bytes) = bucket.download_bytes_per_second {
        lines.push(("download limit", rate(bytes)));
    }
    if let Some(file) = &bucket.ca_file {
        lines.push(("CA file", file.display().to_string()));
    }
    if let Some(profile) = profile_of(bucket) {
        lines.push(("profile", profile.to_string()));
    }
    lines
}

fn profile_of(bucket: &Bucket) -> Option<&str> {
    match &bucket.credentials {
        BucketCredentials::Found { profile } => profile.as_deref(),
        BucketCredentials::Given { .. } => None,
    }
}

fn bucket_document(bucket: &Bucket) -> Value {
    json!({
        "bucket": bucket.name,
        "prefix": bucket.prefix,
        "endpoint": bucket.endpoint,
        "region": bucket.region,
        "path_style": bucket.path_style,
        "connections": bucket.connections,
        "cache_bytes": bucket.cache_bytes,
        "allowed_regions": bucket.allowed_regions,
        "lock": bucket.lock.map(|mode| mode.as_str()),
        "upload_bytes_per_second": bucket.upload_bytes_per_second,
        "download_bytes_per_second": bucket.download_bytes_per_second,
        "ca_file": bucket.ca_file,
        "profile": profile_of(bucket),
    })
}

fn run_lines(run: &Run) -> Vec<(String, String)> {
    let mut lines = vec![("VMs at once".to_string(), run.vms_at_once.to_string())];
    let mut add = |name: &str, value: String| lines.push((name.to_string(), value));
    if run.spread {
        add("spread", "over the whole window".to_string());
    }
    if run.limits != Limits::default() {
        add("limits", limits_text(&run.limits));
    }
    for (hours, limits) in &run.at_hours {
        let name = format!("limits {}", hours_text(hours));
        add(&name, limits_text(limits));
    }
    if let Some(priority) = run.io_priority {
        add("I/O priority", priority.as_str().to_string());
    }
    if let Some(file) = &run.metrics_file {
        add("metrics file", file.display().to_string());
    }
    lines
}

fn limits_text(limits: &Limits) -> String {
    let rate = |bytes: Option<u64>| {
        bytes.map_or("no limit".to_string(), |bytes| {
            format!("{} a second", figures::bytes(bytes))
        })
    };
    format!("read {}, upload {}", rate(limits.read), rate(limits.upload))
}

fn hours_text(hours: &Hours) -> String {
    let (from, to) = (hours.from.strftime("%H:%M"), hours.to.strftime("%H:%M"));
    format!("{from}-{to}")
}

fn run_document(run: &Run) -> Value {
    let at_hours = run.at_hours.iter().map(|(hours, limits)| {
        json!({
            "hours": hours_text(hours),
            "read_bytes_per_second": limits.read,
            "upload_bytes_per_second": limits.upload,
        })
    });
    json!({
        "vms_at_once": run.vms_at_once,
        "spread": run.spread,
        "read_bytes_per_second": run.limits.read,
        "upload_bytes_per_second": run.limits.upload,
        "limits_at_hours": at_hours.collect::<Vec<_>>(),
        "io_priority": run.io_priority.map(|priority| priority.as_str()),
        "metrics_file": run.metrics_file,
    })
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
        text += &whole("escrow", recipient);
    }
    for vm in &customer.vms {
        for (label, value) in source_lines(&vm.source) {
            text += &whole(&format!("{} {label}", vm.name), &value);
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
            let exclude: Vec<&str> = vm.exclude.iter().map(|disk| disk.as_str()).collect();
            let without = match exclude.is_empty() {
                true => String::new(),
                false => format!(", without {}", exclude.join(", ")),
            };
            let monitor = vm.monitor.display();
            vec![(
                "qmp".to_string(),
                format!("{monitor} (fsfreeze {freeze}{without})"),
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

/// As [`named`], on one line: what is copied from it. A name may be longer than its column.
fn whole(name: &str, value: &str) -> String {
    format!("  {name:<width$} {value}\n", width = NAME_COLUMNS - 3)
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
            customer: Some("acme".into()),
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
                .map(|warning| (warning.customer.unwrap_or_default(), warning.kind))
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
    fn of_host_bucket_run_and_vms_all_that_is_configured_is_shown() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("vmkeep.toml");
        let text = r#"
[host]
name = "host1"
state_dir = "/var/lib/vmkeep"
overlay_dir = "/srv/overlays"
overlay_size = "3 GiB"
freeze_limit = "7s"
libvirt_uri = "qemu:///system"

[repository]
url = "s3://backups/vmkeep"

[repository.s3]
region = "eu-central-1"
allowed_regions = ["eu-central-1"]
upload_limit = "5 MiB"
profile = "nightly"

[policy]
timezone = "UTC"
window = "22:00-06:00"

[run]
vms_at_once = 3
spread = true
read_limit = "200 MiB"
io_priority = "idle"
metrics_file = "/srv/metrics/vmkeep.prom"

[[run.limit]]
hours = "06:00-22:00"
upload_limit = "10 MiB"

[[customer]]
id = "acme"

[[customer.vm]]
name = "application-server-01"
qmp = "/run/web01.qmp"
exclude = ["vdb", "vdc"]
"#;
        std::fs::write(&file, text).expect("written");
        let config = config::load(&file).unwrap_or_else(|error| panic!("{error}"));
        let answer = show(&config);
        for part in [
            "/srv/overlays, 3 GiB a disk\n",
            "7s\n",
            "qemu:///system\n",
            "allowed regions       eu-central-1\n",
            "upload limit          5 MiB a second\n",
            "profile               nightly\n",
            "VMs at once           3\n",
            "limits                read 200 MiB a second, upload no limit\n",
            "limits 06:00-22:00    read no limit, upload 10 MiB a second\n",
            "idle\n",
            "/srv/metrics/vmkeep.prom\n",
            "  application-server-01 qmp /run/web01.qmp (fsfreeze never, without vdb, vdc)\n",
        ] {
            assert!(answer.text.contains(part), "{part:?} in\n{}", answer.text);
        }
        let run = &answer.document["run"];
        assert_eq!(run["vms_at_once"], 3);
        assert_eq!(run["limits_at_hours"][0]["hours"], "06:00-22:00");
        assert_eq!(answer.document["host"]["freeze_limit_seconds"], 7.0);
        assert_eq!(answer.document["repository"]["s3"]["profile"], "nightly");
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
