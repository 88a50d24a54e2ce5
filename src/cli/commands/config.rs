use crate::cli::answer::Answer;
use crate::cli::args::ConfigCommand;
use crate::cli::exit::Failure;
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::config::{Config, Customer};
use crate::policy::PolicyTerms;
use serde_json::{Value, json};
use std::fmt::Write;

pub fn run(invocation: &Invocation, command: ConfigCommand) -> Result<Answer, Failure> {
    let config = invocation.config()?;
    Ok(match command {
        ConfigCommand::Check => check(&config),
        ConfigCommand::Show => show(&config),
    })
}

fn check(config: &Config) -> Answer {
    let vms: usize = config
        .customers
        .iter()
        .map(|customer| customer.vms.len())
        .sum();
    let text = format!(
        "{}: sound; {}, {}\n",
        config.file.display(),
        figures::count(config.customers.len(), "customer", "customers"),
        figures::count(vms, "VM", "VMs"),
    );
    let document = json!({
        "file": config.file,
        "sound": true,
        "customers": config.customers.len(),
        "vms": vms,
    });
    Answer::done(text, document)
}

fn show(config: &Config) -> Answer {
    let host = &config.host;
    let repository = &config.repository;
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "{name:<22}{value}");
    };
    line("configuration", &config.file.display().to_string());
    line("host", &host.name);
    line("clock", host.clock.as_str());
    line("state", &host.state_dir.display().to_string());
    line("threads", &host.threads.to_string());
    line("repository", &repository.directory.display().to_string());
    line("reserve", &figures::bytes(repository.reserve_bytes));
    line("chunk size", &figures::bytes(repository.chunk_bytes.into()));
    line("pack size", &figures::bytes(repository.pack_bytes));
    line(
        "compression level",
        &repository.compression_level.to_string(),
    );
    for recipient in &repository.escrow {
        line("escrow", recipient);
    }
    for customer in &config.customers {
        show_customer(customer, &mut text);
    }
    let document = json!({
        "file": config.file,
        "host": {
            "name": host.name,
            "clock": host.clock.as_str(),
            "state_dir": host.state_dir,
            "threads": host.threads,
        },
        "repository": {
            "directory": repository.directory,
            "reserve_bytes": repository.reserve_bytes,
            "chunk_bytes": repository.chunk_bytes,
            "pack_bytes": repository.pack_bytes,
            "compression_level": repository.compression_level,
            "escrow": repository.escrow,
        },
        "customers": config.customers.iter().map(customer_document).collect::<Vec<_>>(),
    });
    Answer::done(text, document)
}

fn show_customer(customer: &Customer, text: &mut String) {
    let terms = &customer.terms;
    let overrides = &customer.overrides;
    let _ = writeln!(
        text,
        "\ncustomer {}  ({})",
        customer.name,
        customer.file.display()
    );
    let mut line = |name: &str, value: &str, own: bool| {
        let origin = if own { "  (this customer's own)" } else { "" };
        let _ = writeln!(text, "  {name:<20}{value}{origin}");
    };
    line("time zone", &terms.timezone, false);
    line("window", &terms.window, false);
    line("full day", &terms.full_day, false);
    line(
        "restore window",
        &terms.restore_window,
        overrides.restore_window.is_some(),
    );
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
    line(
        "erase budget",
        terms.erase_budget.as_deref().unwrap_or("derived"),
        overrides.erase_budget.is_some(),
    );
    for recipient in &customer.escrow {
        line("escrow", recipient, true);
    }
    for vm in &customer.vms {
        for disk in &vm.disks {
            let _ = writeln!(
                text,
                "  {:<20}{} ({})",
                format!("{} {}", vm.name, disk.name),
                disk.path.display(),
                disk.format.as_str()
            );
        }
    }
}

fn customer_document(customer: &Customer) -> Value {
    json!({
        "id": customer.name.as_str(),
        "file": customer.file,
        "policy": terms_document(&customer.terms),
        "escrow": customer.escrow,
        "vms": customer.vms.iter().map(|vm| json!({
            "name": vm.name.as_str(),
            "disks": vm.disks.iter().map(|disk| json!({
                "name": disk.name.as_str(),
                "path": disk.path,
                "format": disk.format.as_str(),
            })).collect::<Vec<_>>(),
        })).collect::<Vec<_>>(),
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
