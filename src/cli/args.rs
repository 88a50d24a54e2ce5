use super::when::When;
use crate::config;
use crate::hypervisor::libvirt::DomainName;
use crate::model::{CustomerName, DiskName, HostId, NameError, PointId, VmName};
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum, ValueHint};
use clap_complete::Shell;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

const EXIT_CODES: &str = "\
Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 some VMs failed, 4 a promise is broken, \
5 clock not trusted, 6 damage found, 10 no repository, 11 busy, 12 wrong key, 130 interrupted.

First steps:
  vmkeep config check      is the configuration sound, and what does each policy mean?
  vmkeep init              creates the repository and this host's keys
  vmkeep run               all that is due tonight; what cron or the timer starts
  vmkeep restore web01 --at latest --to /srv/restored";

/// Backs up VMs every night, keeps two weeks, never over the maximum, and proves it.
#[derive(Debug, Parser)]
#[command(name = "vmkeep", version, after_help = EXIT_CODES, max_term_width = 100)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Arguments {
    #[command(flatten)]
    pub general: General,
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "General options")]
pub struct General {
    /// The configuration; customers.d is looked for beside it
    #[arg(long, global = true, value_name = "FILE", env = "VMKEEP_CONFIG")]
    #[arg(default_value = config::DEFAULT_FILE, value_hint = ValueHint::FilePath)]
    pub config: PathBuf,
    /// One JSON document on stdout instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// Say more on stderr (-v what is done, -vv why)
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// No progress and no warnings, errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Init(InitArgs),
    /// Checks or shows the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    Run(RunArgs),
    Backup(BackupArgs),
    Points(PointsArgs),
    Restore(RestoreArgs),
    Prune(PruneArgs),
    Verify(VerifyArgs),
    Status(StatusArgs),
    ServeMetrics(ServeMetricsArgs),
    /// Shows or verifies the signed, hash-chained record of everything that was done
    #[command(subcommand)]
    Ledger(LedgerCommand),
    /// Shows who may do what and who has the keys, and lets other hosts in
    #[command(subcommand)]
    Key(KeyCommand),
    /// Gives up the tracking of changes in running VMs
    #[command(subcommand)]
    Tracking(TrackingCommand),
    /// Tries the receivers of alarms
    #[command(subcommand)]
    Notify(NotifyCommand),
    Completions(CompletionsArgs),
    Man(ManArgs),
    /// Lets a guest go on whose backup was killed (started by vmkeep itself)
    #[command(hide = true)]
    Guard(GuardArgs),
}

#[derive(Debug, Clone, Args)]
pub struct GuardArgs {
    /// A domain of libvirt to be thawed; without one, an order is read from standard input
    #[arg(long)]
    pub domain: Option<String>,
    #[arg(long, requires = "domain")]
    pub uri: Option<String>,
    #[arg(long, default_value_t = 10)]
    pub limit_seconds: u64,
}

#[derive(Debug, Clone, Subcommand)]
pub enum TrackingCommand {
    /// Removes vmkeep's bitmaps from running VMs, so that nothing of it stands in their way
    #[command(after_help = "\
QEMU refuses to revert a VM to an internal snapshot (loadvm) while a disk carries a bitmap. \
Nothing is lost: the next night reads the disks in full, and tracking starts anew.

Example:
  vmkeep tracking release db01")]
    Release(ReleaseArgs),
}

#[derive(Debug, Clone, Args)]
pub struct ReleaseArgs {
    /// VMs: NAME, or CUSTOMER/NAME where the name is not unique
    #[arg(required = true, value_name = "VM")]
    pub vms: Vec<VmSelector>,
}

/// Creates the repository and this host's keys, and says what to put in escrow
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
The ledger's clock starts with the time shown; init asks whether it is right. \
What exists already is left as it is: run init again after adding a customer. Only the reserve \
of a directory is given the size that is configured now.

Example:
  vmkeep init
  vmkeep init --yes        in a script, after checking that the clock is right")]
pub struct InitArgs {
    /// Accept the time shown without being asked
    #[arg(short, long)]
    pub yes: bool,
    /// The installation that wrote this repository (writers = "one") is gone for good
    #[arg(long)]
    pub take_over: bool,
}

#[derive(Debug, Clone, Copy, Subcommand)]
pub enum ConfigCommand {
    /// Checks the configuration and shows the arithmetic of every policy
    #[command(after_help = "Example:\n  vmkeep --config ./vmkeep.toml config check")]
    Check,
    /// Shows the values in force for every customer, with the file each comes from
    #[command(after_help = "Example:\n  vmkeep --json config show | jq '.customers[].policy'")]
    Show,
}

/// Does all that is due: backups, prune, verification
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
What is due is decided from the ledger, so starting it twice does no harm and a missed night is \
caught up. One VM's failure never stops another's (exit 3). Beside another run of this host it does \
nothing (exit 11), unless that one is late: then it prunes what is due and tells who is to know.

Example:
  vmkeep run --dry-run
  vmkeep run")]
pub struct RunArgs {
    /// Say what is due and why, and do nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,
}

/// Backs up these VMs now
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
The limits and the I/O priority of [run] hold here, too.

Example:
  vmkeep backup web01
  vmkeep backup --full acme/web01 acme/db01")]
pub struct BackupArgs {
    /// VMs to back up: NAME, or CUSTOMER/NAME where the name is not unique
    #[arg(required = true, value_name = "VM")]
    pub vms: Vec<VmSelector>,
    /// Read every allocated byte and repair what is damaged in the repository
    #[arg(long)]
    pub full: bool,
}

/// Lists restore points
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Example:
  vmkeep points
  vmkeep points acme/web01
  vmkeep --json points | jq -r '.[] | [.vm, .taken_at, .expires_at] | @tsv'
  vmkeep points --without-ledger")]
pub struct PointsArgs {
    /// Only these VMs: NAME or CUSTOMER/NAME
    #[arg(value_name = "VM")]
    pub vms: Vec<VmSelector>,
    /// The last means, where the ledger is damaged or gone: what `restore --without-ledger` can restore
    #[arg(long)]
    pub without_ledger: bool,
}

/// Writes a VM's disks as they were at a time
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
WHEN is \"latest\"; a date, meaning the end of that day; a date and time; both in the policy's time \
zone; or RFC 3339. The newest restore point taken no later than that is restored. Or WHEN is the ID \
of a restore point as `vmkeep points` shows it, or the beginning of one. \
Exit 0 means that every byte was checked. Each restore is written into the ledger.

Example:
  vmkeep restore web01 --at latest --to /srv/restored
  vmkeep restore acme/db01 --at 2026-11-07 --to /srv/restored --disk vda --format qcow2 \\
      --reason 'ticket 4711'
  vmkeep restore web01 --at 5f426a07 --to /srv/restored
  vmkeep restore mail01 --at latest --to /srv/mail01-test --define mail01-test

--define makes a libvirt domain of the restored disks, beside the one that was backed up: under a new \
name, with a UUID and MAC addresses of its own, and without what it would share with the other one on \
this host (host devices, shared folders, sockets, fixed ports). It is not started.

--without-ledger is the last means, where the ledger or the index of a customer is damaged or gone: every \
key file, restore point, index segment and pack that is whole is used, whoever wrote it. The bytes are \
checked as ever, but nobody vouches for the restore point: whether it was expired or is suspect is not \
known. `vmkeep points --without-ledger` lists what there is.")]
pub struct RestoreArgs {
    /// The VM: NAME or CUSTOMER/NAME
    #[arg(value_name = "VM")]
    pub vm: VmSelector,
    /// Newest restore point taken no later than this; or the ID of one, or its beginning
    #[arg(long, value_name = "WHEN")]
    pub at: At,
    /// Folder to write to: <disk>.raw or <disk>.qcow2, and the VM definition; or a block device
    #[arg(long, value_name = "DIR", value_hint = ValueHint::AnyPath)]
    pub to: PathBuf,
    /// Only this disk; can be given several times
    #[arg(long = "disk", value_name = "DISK")]
    pub disks: Vec<DiskName>,
    /// Format of the images written
    #[arg(long, value_enum, default_value_t = ImageFormat::Raw)]
    pub format: ImageFormat,
    /// Then define a libvirt domain under this new name, which has the restored disks
    #[arg(long, value_name = "NAME")]
    pub define: Option<DomainName>,
    /// The new domain takes the place of the other one: with its UUID, MAC addresses, host devices
    #[arg(long, requires = "define")]
    pub keep_identity: bool,
    /// Why, for the ledger
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// Write onto a block device and destroy what is on it; files are never replaced
    #[arg(long)]
    pub force: bool,
    /// The last means, where the ledger is damaged or gone: use what is whole, for which nobody vouches
    #[arg(long)]
    pub without_ledger: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ImageFormat {
    Raw,
    Qcow2,
}

/// Expires, erases and reclaims what the policy says, and proves it
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
A restore point first expires (it leaves the list; --undo can bring it back), at least a day later \
its record is erased (what only it held is unreadable from then on), then its bytes are reclaimed.

Example:
  vmkeep prune --dry-run
  vmkeep prune
  vmkeep prune --confirm --customer acme
  vmkeep prune --undo 3f9a")]
pub struct PruneArgs {
    /// Show the plan with a reason for every restore point, and do nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// Believe this host's clock once, after a jump; the ledger records it
    #[arg(long)]
    pub trust_clock: bool,
    /// Go on where prune asks: shortened policies, damage, foreign objects; and erase all that has expired at
    /// once, which no --undo brings back
    #[arg(long)]
    pub confirm: bool,
    /// Only for these customers; default: all of this configuration
    #[arg(long = "customer", value_name = "CUSTOMER")]
    pub customers: Vec<CustomerName>,
    /// Bring back an expired restore point that is not erased yet
    #[arg(long, value_name = "POINT", conflicts_with_all = ["dry_run", "confirm"])]
    pub undo: Option<PointSelector>,
}

/// Verifies ledger, index, trees and, if asked, the data itself
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Without keys, the checksums of the stored objects are verified; with keys, their content.

Example:
  vmkeep verify
  vmkeep verify --read-data
  vmkeep verify --read-data=10
  vmkeep verify --without-keys --read-data")]
pub struct VerifyArgs {
    /// Read the stored data too: all of it, or this share of it
    #[arg(long, value_name = "PERCENT", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "100", value_parser = parse_percent)]
    pub read_data: Option<u8>,
    /// Check what can be checked without any key: ledger, index, records and checksums. Nothing is
    /// written in the store; this machine needs no identity
    #[arg(long)]
    pub without_keys: bool,
}

/// Shows for each VM the last success, the nights covered, the next expiry, and alarms
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
How the last run ended stands below the table, and how far one is that is under way. Exits with 3 when \
a VM's backup failed in the last run, 4 when a promise is broken, 6 when something is damaged: a monitoring check.

Example:
  vmkeep status
  vmkeep status --check
  vmkeep --json status | jq '.alarms'")]
pub struct StatusArgs {
    /// One line for Nagios and its like, with their exit codes: 0 well, 1 warning, 2 critical, 3 unknown
    #[arg(long)]
    pub check: bool,
}

/// Serves metrics for Prometheus over HTTP until it is stopped
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
What it serves at /metrics is at most 30 seconds old. Where the node exporter runs, [run] metrics_file does \
without another service.

Example:
  vmkeep serve-metrics
  vmkeep serve-metrics --listen 192.0.2.7:9639")]
pub struct ServeMetricsArgs {
    /// Where to listen
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:9639")]
    pub listen: std::net::SocketAddr,
}

#[derive(Debug, Clone, Subcommand)]
pub enum KeyCommand {
    /// Shows each customer's hosts with their roles, and whether each can open the key
    #[command(
        after_help = "Example:\n  vmkeep key list\n  vmkeep --json key list | jq '.[].hosts'"
    )]
    List,
    /// Lets another host in: what it may do, and the key to what it does it with
    #[command(after_help = "\
Run `vmkeep init` on the new host first: it prints this command with everything filled in. \
Afterwards run `vmkeep init` there again. Repeating it with other roles changes the roles; --role none \
takes them all away. A key that was given cannot be taken back.

Example:
  vmkeep key admit --name host2 --host-id 3b6a… --role backup --role restore age1…")]
    Admit(AdmitArgs),
}

#[derive(Debug, Clone, Args)]
pub struct AdmitArgs {
    /// The new host's recipient, to which the keys are wrapped
    #[arg(value_name = "RECIPIENT")]
    pub recipient: String,
    /// The new host's id, with which its entries are signed
    #[arg(long, value_name = "ID")]
    pub host_id: HostId,
    /// How the ledger names it: [host] name in its configuration
    #[arg(long)]
    pub name: String,
    /// What it may do
    #[arg(long = "role", value_enum, value_name = "ROLE", default_values = ["backup", "restore"])]
    pub roles: Vec<HostRole>,
    /// Its clock is disciplined by something vmkeep cannot see: [host] clock = "trusted" there
    #[arg(long)]
    pub trusted_clock: bool,
    /// Only for these customers; default: all of this configuration
    #[arg(long = "customer", value_name = "CUSTOMER")]
    pub customers: Vec<CustomerName>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HostRole {
    Backup,
    Restore,
    /// Expire, erase, reclaim
    Prune,
    /// Change the policy, let hosts in
    Admin,
    /// Nothing at all
    None,
}

#[derive(Debug, Clone, Copy, Subcommand)]
pub enum NotifyCommand {
    /// Sends a test to every webhook, mail and ping of [notify], and says what became of each
    #[command(after_help = "\
A ping is told of a start and a success. Exits with 0 only if every receiver has it.

Example:
  vmkeep notify test")]
    Test,
}

#[derive(Debug, Clone, Subcommand)]
pub enum LedgerCommand {
    /// Shows the entries
    #[command(
        after_help = "Example:\n  vmkeep ledger show\n  vmkeep --json ledger show | jq '.[] | select(.kind == \"erase\")'"
    )]
    Show,
    /// Verifies numbering, hash chain, signatures and the rules of every entry, and the certificates
    #[command(after_help = "Example:\n  vmkeep ledger verify")]
    Verify,
    /// Takes the time of an entry out of the reckoning: its host's clock was wrong
    #[command(after_help = "\
Nothing may be deleted before the latest time that two clocks agreed on, and restore points that one \
clock alone dated count from it. Where two were wrong together, this says so; the entry stays, and \
the ledger records who said it. ledger show has the numbers.

Example:
  vmkeep ledger void acme 1207 --reason 'the hardware clock was a year ahead'")]
    Void(VoidArgs),
}

#[derive(Debug, Clone, Args)]
pub struct VoidArgs {
    /// The customer in whose ledger it is
    #[arg(value_name = "CUSTOMER")]
    pub customer: CustomerName,
    /// The number of the entry
    #[arg(value_name = "SEQ")]
    pub seq: u64,
    /// Why, for the ledger
    #[arg(long, value_name = "TEXT")]
    pub reason: String,
}

/// Prints the completion script of a shell
#[derive(Debug, Clone, Copy, Args)]
#[command(after_help = "\
Example:
  vmkeep completions bash > /etc/bash_completion.d/vmkeep
  vmkeep completions zsh > /usr/local/share/zsh/site-functions/_vmkeep
  vmkeep completions fish > ~/.config/fish/completions/vmkeep.fish")]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum, value_name = "SHELL")]
    pub shell: Shell,
}

/// Prints the manual page, or writes those of all commands into a folder
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Example:
  vmkeep man | man -l -
  vmkeep man /usr/local/share/man/man1")]
pub struct ManArgs {
    /// Folder for vmkeep.1, vmkeep-run.1 …
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub folder: Option<PathBuf>,
}

/// A VM as it is named on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSelector {
    pub customer: Option<CustomerName>,
    pub vm: VmName,
}

impl FromStr for VmSelector {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Ok(match text.split_once('/') {
            Some((customer, vm)) => VmSelector {
                customer: Some(CustomerName::new(customer)?),
                vm: VmName::new(vm)?,
            },
            None => VmSelector {
                customer: None,
                vm: VmName::new(text)?,
            },
        })
    }
}

impl fmt::Display for VmSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.customer {
            Some(customer) => write!(f, "{customer}/{}", self.vm),
            None => write!(f, "{}", self.vm),
        }
    }
}

impl VmSelector {
    pub fn matches(&self, customer: &CustomerName, vm: &VmName) -> bool {
        self.vm == *vm && self.may_be_of(customer)
    }

    pub fn may_be_of(&self, customer: &CustomerName) -> bool {
        self.customer.as_ref().is_none_or(|own| own == customer)
    }
}

/// The beginning of a restore point's id, long enough to be unique.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PointSelector(String);

impl FromStr for PointSelector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        match digits && (4..=2 * PointId::BYTES).contains(&text.len()) {
            true => Ok(PointSelector(text.to_string())),
            false => Err(format!(
                "a restore point is named by 4 to {} hexadecimal digits, as `vmkeep points` shows them",
                2 * PointId::BYTES
            )),
        }
    }
}

impl fmt::Display for PointSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl PointSelector {
    pub fn matches(&self, id: &PointId) -> bool {
        id.to_string().starts_with(&self.0)
    }
}

/// Which restore point is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum At {
    /// The newest taken no later.
    Time(When),
    Point(PointSelector),
}

impl FromStr for At {
    type Err = String;

    /// No time is written in hexadecimal digits alone.
    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(point) = text.parse::<PointSelector>() {
            return Ok(At::Point(point));
        }
        text.parse::<When>().map(At::Time).map_err(|error| {
            format!(
                "{error}; or 4 to {} digits of an ID, as `vmkeep points` shows it",
                2 * PointId::BYTES
            )
        })
    }
}

fn parse_percent(text: &str) -> Result<u8, String> {
    match text.trim_end_matches('%').parse() {
        Ok(percent @ 1..=100) => Ok(percent),
        _ => Err("a percentage from 1 to 100".to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_definition_of_the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_command_has_an_example_in_its_help() {
        fn check(command: &clap::Command) {
            // Hidden ones are not for people.
            for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
                if sub.has_subcommands() {
                    check(sub);
                } else {
                    let help = sub.get_after_help().map(|text| text.to_string());
                    assert!(
                        help.is_some_and(|text| text.contains("Example:")),
                        "{} has no example",
                        sub.get_name()
                    );
                    assert!(sub.get_about().is_some(), "{}", sub.get_name());
                }
            }
        }
        check(&Arguments::command());
    }

    #[test]
    fn a_paragraph_of_a_help_is_wrapped_by_the_terminal_alone() {
        fn check(command: &clap::Command) {
            let help = command.get_after_help().map(|text| text.to_string());
            let help = help.unwrap_or_default();
            let is_text = |line: &str| !line.is_empty() && !line.starts_with(' ');
            let lines: Vec<&str> = help.lines().collect();
            for pair in lines.windows(2) {
                let name = command.get_name();
                assert!(!pair.iter().all(|line| is_text(line)), "{name}: {pair:?}");
            }
            command.get_subcommands().for_each(check);
        }
        check(&Arguments::command());
    }

    #[test]
    fn the_commands_of_the_contract_parse() {
        for line in [
            "vmkeep init",
            "vmkeep init --yes",
            "vmkeep config check",
            "vmkeep config show --json",
            "vmkeep run --dry-run",
            "vmkeep -q run",
            "vmkeep backup web01 acme/db01 --full",
            "vmkeep points",
            "vmkeep points web01 --json",
            "vmkeep restore web01 --at latest --to /r",
            "vmkeep restore acme/web01 --at 2026-11-07 --to /r --disk vda --disk vdb --format qcow2 --reason x",
            "vmkeep restore web01 --at 5f426a07 --to /r",
            "vmkeep restore web01 --at latest --to /r --without-ledger",
            "vmkeep points --without-ledger",
            "vmkeep restore web01 --at latest --to /r --define web01-test",
            "vmkeep restore web01 --at latest --to /r --define web01 --keep-identity",
            "vmkeep prune --dry-run --trust-clock",
            "vmkeep prune --confirm",
            "vmkeep prune --confirm --customer acme --customer globex",
            "vmkeep prune --undo 3f9a",
            "vmkeep verify",
            "vmkeep verify --read-data",
            "vmkeep verify --read-data=10",
            "vmkeep verify --without-keys --read-data",
            "vmkeep status",
            "vmkeep ledger show",
            "vmkeep ledger verify",
            "vmkeep notify test",
            "vmkeep completions zsh",
            "vmkeep man",
            "vmkeep man /tmp/man",
            "vmkeep --config /x.toml -vv status",
        ] {
            assert!(parse(line).is_ok(), "{line}");
        }
    }

    #[test]
    fn wrong_usage_is_refused() {
        for line in [
            "vmkeep",
            "vmkeep backup",
            "vmkeep backup ../web01",
            "vmkeep backup a/b/c",
            "vmkeep restore web01 --to /r",
            "vmkeep restore web01 --at yesterday --to /r",
            "vmkeep restore web01 --at 5f4 --to /r",
            "vmkeep restore web01 --at latest --to /r --format vmdk",
            "vmkeep restore web01 --at latest --to /r --define a/b",
            "vmkeep restore web01 --at latest --to /r --define 7",
            "vmkeep restore web01 --at latest --to /r --keep-identity",
            "vmkeep prune --undo zz",
            "vmkeep prune --undo 3f9a --dry-run",
            "vmkeep verify --read-data=0",
            "vmkeep verify --read-data=101",
            "vmkeep -q -v status",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_restore_point_is_asked_for_by_a_time_or_by_the_beginning_of_its_id() {
        let at = |text: &str| text.parse::<At>();
        let point = |text: &str| At::Point(text.parse().expect(text));
        let whole = "0123456789abcdef".repeat(2);
        let longer = format!("{whole}0");
        for text in ["5f42", "5f426a07", "20261107", "2026110703", whole.as_str()] {
            assert_eq!(at(text), Ok(point(text)));
        }
        for text in [
            "latest",
            "2026-11-07",
            "2026-11-07T03:00",
            "2026-11-07T03:00Z",
        ] {
            assert!(matches!(at(text), Ok(At::Time(_))), "{text}");
        }
        for text in [
            "5f4",
            "5F426A07",
            "yesterday",
            "2026-13-01",
            longer.as_str(),
        ] {
            let refused = at(text).expect_err(text);
            assert!(
                refused.contains("2026-11-07") && refused.contains("of an ID"),
                "{refused}"
            );
        }
    }

    #[test]
    fn read_data_alone_means_all_of_it() {
        let percent = |line| match parse(line).map(|arguments| arguments.command) {
            Ok(Command::Verify(verify)) => verify.read_data,
            other => panic!("{other:?}"),
        };
        assert_eq!(percent("vmkeep verify"), None);
        assert_eq!(percent("vmkeep verify --read-data"), Some(100));
        assert_eq!(percent("vmkeep verify --read-data=10%"), Some(10));
    }

    #[test]
    fn a_vm_is_selected_by_name_alone_or_with_its_customer() {
        let customer = CustomerName::new("acme").expect("a name");
        let vm = VmName::new("web01").expect("a name");
        let matches = |text: &str| {
            text.parse::<VmSelector>()
                .expect(text)
                .matches(&customer, &vm)
        };
        assert!(matches("web01"));
        assert!(matches("acme/web01"));
        assert!(!matches("globex/web01"));
        assert!(!matches("web02"));
    }
}
