use super::selection;
use super::tally::Tally;
use crate::cli::answer::{Answer, quoted};
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
use crate::repository::State;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Digits of a host id that tell hosts apart in a table.
const ID_DIGITS: usize = 12;
const EARLIER: &str = "earlier: opens an older key file, but not the newest. It is the same key.\n";

/// Whom the key files of a customer's newest key are for.
struct Holders {
    newest: BTreeSet<String>,
    /// Those that the newest file leaves out.
    earlier: BTreeSet<String>,
}

impl Holders {
    fn of(state: &State) -> Self {
        let last = state.keys.last();
        let generation = last.map(|row| row.generation);
        let newest: BTreeSet<String> = last.iter().flat_map(|row| row.recipients.clone()).collect();
        let earlier = state
            .keys
            .iter()
            .filter(|row| Some(row.generation) == generation)
            .flat_map(|row| &row.recipients)
            .filter(|one| !newest.contains(*one))
            .cloned()
            .collect();
        Holders { newest, earlier }
    }

    fn all(&self) -> impl Iterator<Item = &String> {
        self.newest.iter().chain(&self.earlier)
    }

    fn has(&self, recipient: &str) -> bool {
        self.newest.contains(recipient) || self.earlier.contains(recipient)
    }

    fn word(&self, recipient: &str) -> &'static str {
        match (self.newest.contains(recipient), self.has(recipient)) {
            (true, _) => "yes",
            (false, true) => "earlier",
            (false, false) => "no",
        }
    }
}

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
    let mut is_earlier = false;
    let (opened, unopened) = site.customers(|_| true)?;
    for open in &opened {
        let (hosts, key_files, holders) = open.customer.with_state(|state| {
            let files = state.keys.len();
            (state.hosts.clone(), files, Holders::of(state))
        });
        is_earlier |= !holders.earlier.is_empty();
        for host in hosts.values() {
            let id = host.host.to_string();
            table.row([
                open.config.name.to_string(),
                host.name.clone(),
                id.chars().take(ID_DIGITS).collect(),
                roles_text(&host.roles),
                clock_text(host.clock).to_string(),
                holders.word(&host.recipient).to_string(),
            ]);
        }
        let is_escrow = |one: &&String| !hosts.values().any(|host| host.recipient == **one);
        let escrow: Vec<&String> = holders.all().filter(is_escrow).collect();
        for recipient in &escrow {
            table.row([
                open.config.name.to_string(),
                "(escrow)".to_string(),
                recipient.chars().take(ID_DIGITS).collect(),
                String::new(),
                String::new(),
                holders.word(recipient).to_string(),
            ]);
        }
        tally.documents.push(json!({
            "customer": open.config.name.as_str(),
            "hosts": hosts.values().map(|host| json!({
                "id": host.host.to_string(),
                "name": host.name,
                "roles": host.roles,
                "clock": clock_text(host.clock),
                "recipient": host.recipient,
                "has_key": holders.newest.contains(&host.recipient),
                "has_any_key": holders.has(&host.recipient),
            })).collect::<Vec<_>>(),
            "escrow_recipients": holders.newest.iter().filter(is_escrow).collect::<Vec<_>>(),
            "escrow_only_in_earlier_key_files":
                holders.earlier.iter().filter(is_escrow).collect::<Vec<_>>(),
            "key_files": key_files,
        }));
    }
    tally.text = table.render(Terminal::width());
    if is_earlier {
        tally.text.push_str(EARLIER);
    }
    tally.all_failed(invocation, unopened)?;
    Ok(tally.answer(Value::from))
}

fn admit(invocation: &Invocation, site: &Site, args: &AdmitArgs) -> Result<Answer, Failure> {
    let customers = selection::customers(&site.config, &args.customers)?;
    if !is_host_name(&args.name) {
        return Err(Failure::new(Exit::Usage, format!("--name: {HOST_NAME}")));
    }
    if let Err(error) = args.recipient.parse::<AgeRecipient>() {
        let message = format!("RECIPIENT {:?}: {error}", args.recipient);
        return Err(Failure::new(Exit::Usage, message)
            .hint("vmkeep init on the new host prints the whole command"));
    }
    let roles: BTreeSet<Role> = args
        .roles
        .iter()
        .filter_map(|role| role_of(*role))
        .collect();
    if !roles.is_empty() && args.roles.contains(&HostRole::None) {
        let message = "--role none stands alone: no other role goes with it";
        return Err(Failure::new(Exit::Usage, message));
    }
    let newcomer = HostBody {
        host: args.host_id,
        name: args.name.clone(),
        recipient: args.recipient.clone(),
        roles: roles.into_iter().collect(),
        clock: match args.trusted_clock {
            true => ClockDeclaration::Trusted,
            false => ClockDeclaration::Verified,
        },
    };
    let mut tally = Tally::default();
    let mut is_in = false;
    for config in customers {
        let outcome = site.customer(config).and_then(|open| {
            site.probe(&open.customer)?;
            Ok(admit_host(&open.customer, &site.host, &newcomer)?)
        });
        let (sentence, word) = match outcome {
            Ok(Admission::Created) if newcomer.roles.is_empty() => (
                "may do nothing; a key that it was given stays with it",
                "admitted",
            ),
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
    if is_in && !newcomer.roles.is_empty() {
        let next = "now run on the new host: vmkeep init\n";
        tally.text.push_str(next);
    }
    Ok(tally.answer(Value::from))
}

/// The command with which a host that has the role admin enters another one.
pub fn admit_command(host: &HostBody) -> String {
    let trusted = match host.clock {
        ClockDeclaration::Trusted => " --trusted-clock",
        ClockDeclaration::Verified => "",
    };
    format!(
        "vmkeep key admit --name {} --host-id {} --role {}{trusted} {}",
        quoted(&host.name),
        host.host,
        role_words(&host.roles).join(" --role "),
        host.recipient
    )
}

fn role_of(role: HostRole) -> Option<Role> {
    match role {
        HostRole::Backup => Some(Role::Backup),
        HostRole::Restore => Some(Role::Restore),
        HostRole::Prune => Some(Role::Prune),
        HostRole::Admin => Some(Role::Admin),
        HostRole::None => None,
    }
}

fn roles_text(roles: &[Role]) -> String {
    role_words(roles).join(", ")
}

/// As `--role` has them.
fn role_words(roles: &[Role]) -> Vec<&'static str> {
    let word = |role: &Role| match role {
        Role::Backup => "backup",
        Role::Restore => "restore",
        Role::Prune => "prune",
        Role::Admin => "admin",
    };
    match roles.is_empty() {
        true => vec!["none"],
        false => roles.iter().map(word).collect(),
    }
}

fn clock_text(clock: ClockDeclaration) -> &'static str {
    match clock {
        ClockDeclaration::Verified => "verified",
        ClockDeclaration::Trusted => "trusted",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::HostId;

    #[test]
    fn a_name_is_one_word_of_a_shell() {
        for (name, word) in [
            ("host1.example", "host1.example"),
            ("the host", "'the host'"),
            ("o'host; rm", "'o'\\''host; rm'"),
        ] {
            assert_eq!(quoted(name), word);
        }
    }

    #[test]
    fn the_command_that_enters_a_host_names_all_of_it() {
        let mut host = HostBody {
            host: HostId::from_bytes([0xab; 32]),
            name: "the host".to_string(),
            recipient: "age1x".to_string(),
            roles: vec![Role::Backup, Role::Restore],
            clock: ClockDeclaration::Trusted,
        };
        let id = "ab".repeat(32);
        assert_eq!(
            admit_command(&host),
            format!(
                "vmkeep key admit --name 'the host' --host-id {id} --role backup --role restore \
                 --trusted-clock age1x"
            )
        );
        host.roles.clear();
        assert!(admit_command(&host).contains(" --role none "));
    }
}
