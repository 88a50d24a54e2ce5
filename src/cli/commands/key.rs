use super::tally::Tally;
use crate::cli::answer::Answer;
use crate::cli::args::{AdmitArgs, HostRole, KeyCommand};
use crate::cli::exit::{Exit, Failure};
use crate::cli::invocation::Invocation;
use crate::cli::site::Site;
use crate::cli::table::Table;
use crate::cli::terminal::Terminal;
use crate::codec::age::AgeRecipient;
use crate::config::{HOST_NAME, is_host_name};
use crate::format::entry::{ClockDeclaration, HostBody, Role};
use crate::jobs::{Admission, admit_host};
use serde_json::{Value, json};

/// Digits of a host id that tell hosts apart in a table.
const ID_DIGITS: usize = 12;

pub fn run(invocation: &Invocation, command: &KeyCommand) -> Result<Answer, Failure> {
    let site = Site::open(invocation)?;
    match command {
        KeyCommand::List => list(invocation, &site),
        KeyCommand::Admit(args) => admit(invocation, &site, args),
    }
}

fn list(invocation: &Invocation, site: &Site) -> Result<Answer, Failure> {
    let mut table = Table::new()
        .name("CUSTOMER")
        .name("HOST")
        .left("ID")
        .left("ROLES")
        .left("CLOCK")
        .left("KEY");
    let mut tally = Tally::default();
    let (opened, unopened) = site.customers(|_| true)?;
    for open in &opened {
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
        tally.documents.push(json!({
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
    tally.text = table.render(Terminal::width());
    tally.all_failed(invocation, unopened)?;
    Ok(tally.answer(Value::from))
}

fn admit(invocation: &Invocation, site: &Site, args: &AdmitArgs) -> Result<Answer, Failure> {
    for name in &args.customers {
        if !site.config.customers.iter().any(|one| one.name == *name) {
            let message = format!("customer {name} is not in the configuration of this host");
            return Err(Failure::new(Exit::Usage, message));
        }
    }
    if !is_host_name(&args.name) {
        return Err(Failure::new(Exit::Usage, format!("--name: {HOST_NAME}")));
    }
    if let Err(error) = args.recipient.parse::<AgeRecipient>() {
        let message = format!("RECIPIENT {:?}: {error}", args.recipient);
        return Err(Failure::new(Exit::Usage, message)
            .hint("vmkeep init on the new host prints the whole command"));
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
    let mut tally = Tally::default();
    let mut is_in = false;
    for config in &site.config.customers {
        if !args.customers.is_empty() && !args.customers.contains(&config.name) {
            continue;
        }
        let outcome = site.customer(config).and_then(|open| {
            site.probe(&open.customer)?;
            Ok(admit_host(&open.customer, &site.host, &newcomer)?)
        });
        let (sentence, word) = match outcome {
            Ok(Admission::Created) => ("admitted; it had the key", "admitted"),
            Ok(Admission::Rewrapped) => ("admitted, and has the key", "admitted"),
            Ok(Admission::Unchanged) => ("was admitted before", "unchanged"),
            Err(failure) => {
                tally.failed(invocation, &config.name, failure)?;
                continue;
            }
        };
        let text = format!(
            "{}: {} {sentence} ({})\n",
            config.name,
            newcomer.name,
            roles_text(&newcomer.roles)
        );
        let document = json!({ "customer": config.name.as_str(), "outcome": word });
        tally.add(&text, document, None);
        is_in = true;
    }
    if is_in {
        let next = "now run on the new host: vmkeep init\n";
        tally.text.push_str(next);
    }
    Ok(tally.answer(Value::from))
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
