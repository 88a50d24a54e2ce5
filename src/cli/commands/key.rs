use crate::cli::answer::Answer;
use crate::cli::args::{AdmitArgs, HostRole, KeyCommand};
use crate::cli::exit::{Exit, Failure};
use crate::cli::invocation::Invocation;
use crate::cli::site::Site;
use crate::cli::table::Table;
use crate::cli::terminal::Terminal;
use crate::config::{HOST_NAME, is_host_name};
use crate::format::entry::{ClockDeclaration, HostBody, Role};
use crate::jobs::{Admission, admit_host};
use serde_json::json;
use std::fmt::Write;

/// Digits of a host id that tell hosts apart in a table.
const ID_DIGITS: usize = 12;

pub fn run(invocation: &Invocation, command: &KeyCommand) -> Result<Answer, Failure> {
    let site = Site::open(invocation)?;
    match command {
        KeyCommand::List => list(&site),
        KeyCommand::Admit(args) => admit(&site, args),
    }
}

fn list(site: &Site) -> Result<Answer, Failure> {
    let mut table = Table::new()
        .left("CUSTOMER")
        .cut("HOST")
        .left("ID")
        .left("ROLES")
        .left("CLOCK")
        .left("KEY");
    let mut documents = Vec::new();
    for open in site.customers()? {
        let (hosts, keys) = open
            .customer
            .with_state(|state| (state.hosts.clone(), state.keys.clone()));
        let holders = keys.last().map(|row| row.recipients.clone());
        let holders = holders.unwrap_or_default();
        for host in hosts.values() {
            let id = host.host.to_string();
            table.row([
                open.config.name.to_string(),
                host.name.clone(),
                id.chars().take(ID_DIGITS).collect(),
                roles_text(&host.roles),
                clock_text(host.clock).to_string(),
                match holders.contains(&host.recipient) {
                    true => "yes".to_string(),
                    false => "no".to_string(),
                },
            ]);
        }
        let escrow: Vec<&String> = holders
            .iter()
            .filter(|one| !hosts.values().any(|host| host.recipient == **one))
            .collect();
        documents.push(json!({
            "customer": open.config.name.as_str(),
            "hosts": hosts.values().map(|host| json!({
                "id": host.host.to_string(),
                "name": host.name,
                "roles": host.roles,
                "clock": clock_text(host.clock),
                "recipient": host.recipient,
                "has_key": holders.contains(&host.recipient),
            })).collect::<Vec<_>>(),
            "escrow_recipients": escrow,
            "key_files": keys.len(),
        }));
    }
    Ok(Answer::done(
        table.render(Terminal::width()),
        json!(documents),
    ))
}

fn admit(site: &Site, args: &AdmitArgs) -> Result<Answer, Failure> {
    for name in &args.customers {
        if !site.config.customers.iter().any(|one| one.name == *name) {
            let message = format!("customer {name} is not in the configuration of this host");
            return Err(Failure::new(Exit::Usage, message));
        }
    }
    if !is_host_name(&args.name) {
        return Err(Failure::new(Exit::Usage, format!("--name: {HOST_NAME}")));
    }
    let mut roles: Vec<Role> = args.roles.iter().map(|role| role_of(*role)).collect();
    roles.sort_unstable();
    roles.dedup();
    let newcomer = HostBody {
        host: args.host_id,
        name: args.name.clone(),
        recipient: args.recipient.clone(),
        roles,
        clock: match args.trusted_clock {
            true => ClockDeclaration::Trusted,
            false => ClockDeclaration::Verified,
        },
    };
    let mut text = String::new();
    let mut documents = Vec::new();
    for config in &site.config.customers {
        if !args.customers.is_empty() && !args.customers.contains(&config.name) {
            continue;
        }
        let open = site.customer(config)?;
        site.probe(&open.customer)?;
        let outcome = admit_host(&open.customer, &site.host, &newcomer)?;
        let (sentence, word) = match outcome {
            Admission::Created => ("admitted; it had the key", "admitted"),
            Admission::Rewrapped => ("admitted, and has the key", "admitted"),
            Admission::Unchanged => ("was admitted before", "unchanged"),
        };
        let _ = writeln!(
            text,
            "{}: {} {sentence} ({})",
            config.name,
            newcomer.name,
            roles_text(&newcomer.roles)
        );
        documents.push(json!({ "customer": config.name.as_str(), "outcome": word }));
    }
    text.push_str("now run on the new host: vmkeep init\n");
    Ok(Answer::done(text, json!(documents)))
}

fn role_of(role: HostRole) -> Role {
    match role {
        HostRole::Backup => Role::Backup,
        HostRole::Restore => Role::Restore,
        HostRole::Prune => Role::Prune,
        HostRole::Admin => Role::Admin,
    }
}

fn roles_text(roles: &[Role]) -> String {
    let words: Vec<&str> = roles
        .iter()
        .map(|role| match role {
            Role::Backup => "backup",
            Role::Restore => "restore",
            Role::Prune => "prune",
            Role::Admin => "admin",
        })
        .collect();
    words.join(", ")
}

fn clock_text(clock: ClockDeclaration) -> &'static str {
    match clock {
        ClockDeclaration::Verified => "verified",
        ClockDeclaration::Trusted => "trusted",
    }
}
