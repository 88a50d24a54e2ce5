use super::course::Course;
use super::key::admit_command;
use super::prune::{verdict, worse};
use super::report::{
    backed_up_document, backed_up_line, log_backed_up, log_pruned, plan_documents, pruned_document,
    pruned_text, verified_document, verified_text,
};
use super::tally::Tally;
use crate::cli::alarms::{Concern, confirm_command, why_policy_waits};
use crate::cli::answer::Answer;
use crate::cli::args::RunArgs;
use crate::cli::clock::SystemClock;
use crate::cli::exit::{Exit, Failure};
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::cli::metrics;
use crate::cli::notify::{Receivers, receivers};
use crate::cli::overview::{Overview, late_run};
use crate::cli::pace::Pace;
use crate::cli::site::{OpenCustomer, Site, Watching};
use crate::cli::telling;
use crate::config::{self, Config};
use crate::jobs::{
    Alarm, AlarmKind, BegunRun, CustomerRun, JobError, JobErrorKind, LastRun, Policies,
    PruneRequest, Pruned, RunAlarm, StateFolder, Verified, VmOutcome, VmRun, Work, arrange,
    begin_run, carry_out, foresee_policy, foresee_prune, is_prune_due, look_ahead, prune_in_run,
    run_vm, spread_rate, verify_in_run, why_not_delete, why_not_prune,
};
use crate::model::{CustomerName, VmName, Writers};
use crate::notify::{Event, Message, Moment, Severity};
use crate::policy::{Action, What};
use crate::repository::RepositoryErrorKind;
use crate::storage::StorageErrorKind;
use jiff::Timestamp;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

/// A run that goes on for so long is late, if its night is over.
const BETWEEN_OTHERS: Duration = Duration::from_secs((12 * 60 + 1) * 60);

/// A customer of this run, and what was done for it so far.
struct Turn<'a> {
    open: OpenCustomer<'a>,
    begun: BegunRun,
    vms: BTreeMap<VmName, VmRun>,
}

pub fn run(invocation: &Invocation, args: &RunArgs) -> Result<Answer, Failure> {
    if args.dry_run {
        return dry_run(invocation, &Site::open(invocation)?);
    }
    let config = invocation.config()?;
    let receivers = receivers(&config.notify);
    let began_at = SystemClock::wall();
    let ended = std::thread::scope(|scope| {
        let (_until_it_ends, is_over) = mpsc::channel();
        scope.spawn(move || start_others(BETWEEN_OTHERS, || another_run(invocation), &is_over));
        night(invocation, &receivers, began_at)
    });
    let (moment, text) = match &ended {
        Ok(answer) if answer.exit == Exit::Done => (Moment::Success, answer.text.clone()),
        Ok(answer) => (Moment::Fail, answer.text.clone()),
        // The other run tells how it ends, and this one has told that it does not.
        Err(failure) if failure.exit == Exit::Busy => return ended,
        Err(failure) => {
            come_to_nothing(&config, &receivers, began_at, failure);
            (Moment::Fail, failure.text())
        }
    };
    telling::ping(&receivers, moment, &text);
    ended
}

/// A run that ended before it had looked at everything.
fn come_to_nothing(config: &Config, receivers: &Receivers, began_at: Timestamp, failure: &Failure) {
    let now = SystemClock::wall();
    match StateFolder::create(&config.host.state_dir) {
        Ok(folder) => {
            telling::tell_failure(receivers, &folder, config, now, failure);
            let mut alarms = vec![run_failed(began_at, failure)];
            carry_over(&mut alarms, &folder, config, &BTreeSet::new());
            let sums = Sums::default();
            remember(&folder, began_at, now, &sums, failure.exit, alarms);
        }
        Err(_) => tell_without_memory(receivers, config, now, failure),
    }
    // Where it was stopped, nothing is known to be wrong with the repository.
    if failure.exit != Exit::Interrupted {
        publish(config, &metrics::text_of_failure(failure));
    }
}

/// Without the state folder nobody knows what was told before: better again each time than not at all.
fn tell_without_memory(receivers: &Receivers, config: &Config, at: Timestamp, failure: &Failure) {
    let concern = Concern {
        customer: None,
        alarm: Alarm::of_customer(AlarmKind::RunFailed, &*failure.message),
    };
    let message = Message {
        event: Event::Raised,
        severity: Severity::Warning,
        key: Some(concern.name()),
        host: config.host.name.clone(),
        customer: None,
        vm: None,
        at,
        subject: concern.line(),
        text: concern.line(),
        document: None,
    };
    for (name, failure) in &receivers.unusable {
        tracing::error!("{name}: {}", failure.message);
    }
    for receiver in &receivers.notifiers {
        if let Err(error) = receiver.send(std::slice::from_ref(&message)) {
            tracing::error!("not everything was told: {error}");
        }
    }
}

fn night(
    invocation: &Invocation,
    receivers: &Receivers,
    began_at: Timestamp,
) -> Result<Answer, Failure> {
    let mut site = Site::open(invocation)?;
    let host = site.host.clone();
    let folder = host.folder();
    let Some(_lock) = folder.lock_run()? else {
        return Err(beside_another(invocation, receivers, &mut site));
    };
    let course = Course::new(folder, began_at);
    course.begins("opening the customers");
    telling::ping(receivers, Moment::Start, "");
    site.store.refuse_unfit(&site.config)?;
    let pace = site.step_back(invocation);

    let mut tally = Tally::default();
    let mut overview = Overview::default();
    let mut sums = Sums::default();
    let mut alarms = Vec::new();
    // Customers that this run sees to its end.
    let mut settled = BTreeSet::new();
    let mut was_cut_short = false;
    let mut turns = Vec::new();
    for config in &site.config.customers {
        let begun = site.customer(config).and_then(|open| {
            site.probe(&open.customer)?;
            let begun = begin_run(&open.customer, &site.host, &config.terms)?;
            Ok(Turn {
                open,
                begun,
                vms: BTreeMap::new(),
            })
        });
        match begun {
            Ok(turn) => turns.push(turn),
            Err(failure) => {
                overview.add_unreachable(&config.name, failure.clone());
                let what_to_do = remedies(&failure);
                tally.failed(invocation, &config.name, failure)?;
                tally.text.push_str(&what_to_do);
            }
        }
    }
    let pruned: Vec<OnceLock<_>> = turns.iter().map(|_| OnceLock::new()).collect();
    let done = back_up(invocation, &site, &pace, &course, &turns, &pruned);
    for (customer, done) in done {
        if let Some(turn) = turns.get_mut(customer) {
            turn.vms.insert(done.vm.clone(), done);
        }
    }
    // Prunes before any verification: what must go by contract comes first.
    let pruned: Vec<_> = turns
        .iter()
        .zip(pruned)
        .map(|(turn, pruned)| {
            let pruned = pruned.into_inner();
            let pruned = pruned.unwrap_or_else(|| prune_of(invocation, &site, &course, &turn.open));
            // What went just now goes here as well.
            site.store.keep_copies_of(&turn.open.customer);
            pruned
        })
        .collect();
    for (turn, pruned) in turns.into_iter().zip(pruned) {
        let verified = verify_of(invocation, &site, &pace, &course, &turn.open);
        let mut vms = turn.vms;
        let done = CustomerRun {
            begun: turn.begun,
            // As in the configuration.
            vms: turn
                .open
                .config
                .vms
                .iter()
                .filter_map(|vm| vms.remove(&vm.name))
                .collect(),
            pruned,
            verified,
        };
        let before = overview.concerns.len();
        let of_run = alarms_of(&done);
        let after = of_run.len();
        let name = &turn.open.config.name;
        let to_remember = of_run.iter().filter(|alarm| !is_noted(alarm, &done));
        alarms.extend(to_remember.map(|alarm| RunAlarm::new(began_at, Some(name), alarm)));
        match is_cut_short(&done) {
            // It is to end soon: what else is to be seen, `status` looks for.
            true => was_cut_short = true,
            false => {
                settled.insert(name.clone());
                overview.add(&site, &turn.open, of_run, site.host.now());
            }
        }
        let all = overview.concerns.get(before..).unwrap_or_default();
        // What the run itself met is reported where it was met.
        let concerns = all
            .get(..all.len().saturating_sub(after))
            .unwrap_or_default();
        let (part, mut document, failure) = report(invocation, &site, &turn.open, &done, concerns);
        document["alarm_list"] = all.iter().map(Concern::document).collect();
        tally.add(&part, document, failure);
        sums.add(&done);
    }
    carry_over(&mut alarms, folder, &site.config, &settled);
    if was_cut_short {
        let failure = interrupted();
        invocation.terminal.tell(&failure);
        let _ = writeln!(tally.text, "{}", failure.message);
        tally.text.push_str(&remedies(&failure));
        tally.meet(Some(failure.clone()));
        let error = failure.document()["error"].clone();
        let answer = tally.answer(|customers| json!({ "customers": customers, "error": error }));
        alarms.push(run_failed(began_at, &failure));
        let now = site.host.now();
        remember(folder, began_at, now, &sums, answer.exit, alarms);
        // Of no alarm it is known that it is over, and the metrics stay: nothing is wrong with the repository.
        telling::tell_failure(receivers, folder, &site.config, now, &failure);
        return Ok(answer);
    }
    course.begins("telling who is to know");
    overview.end(&site);
    let outside = tally.tell_outside(invocation, overview.outside(), &site.zone());
    let mut answer =
        tally.answer(|customers| json!({ "customers": customers, "outside": outside }));
    let now = site.host.now();
    remember(folder, began_at, now, &sums, answer.exit, alarms);
    let text = metrics::text(&overview, folder.last_run().as_ref());
    publish(&site.config, &text);
    tracing::info!(
        "telling {}",
        figures::count(receivers.notifiers.len(), "receiver", "receivers")
    );
    telling::tell_all(receivers, &site, &overview, &answer);
    // Under cron (-q) a run that did everything has nothing to say.
    if invocation.general.quiet && answer.exit == Exit::Done {
        answer.text.clear();
    }
    Ok(answer)
}

/// Starts a run beside this one every so often, until this one is over. One that is late is told of by that one:
/// neither systemd's timer nor cron's lock lets another one begin meanwhile, and whatever this one is stuck in holds
/// up no other process.
fn start_others(every: Duration, another: impl Fn() -> Command, is_over: &Receiver<()>) {
    let mut other: Option<Child> = None;
    while is_over.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
        let is_running = other
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)));
        if !is_running {
            other = another()
                .spawn()
                .inspect_err(|error| tracing::error!("nobody looks at this run: {error}"))
                .ok();
        }
    }
}

/// By this very program, also when its file was replaced by an upgrade meanwhile.
fn another_run(invocation: &Invocation) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg("--config").arg(&invocation.general.config);
    command.args(["--quiet", "run"]);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// What a run does beside another one: nothing, unless that one is late. Then what must go goes, as by
/// `vmkeep prune`, which needs no run to end, and who is to know is told what is missing by now.
fn beside_another(invocation: &Invocation, receivers: &Receivers, site: &mut Site) -> Failure {
    let Some(other) = late_run(site, site.host.now()) else {
        return Failure::new(Exit::Busy, "another run of this host is under way")
            .hint("nothing is wrong: it does what is due; vmkeep status shows how far it is");
    };
    let since = figures::minute(other.began_at, &site.zone());
    let failure = Failure::new(
        Exit::Busy,
        format!(
            "another run of this host is under way since {since} and has not ended: it is at {}",
            other.at
        ),
    )
    .hint("restore points are safe; until it ends nothing else is backed up, and only what is due is pruned")
    .hint(
        "vmkeep status shows how far it is; if that stays so, end it (systemctl stop vmkeep.service, or kill \
         it), then: vmkeep run",
    );
    let _pace = site.step_back(invocation);
    let site: &Site = site;
    // A prune goes on in a bucket that is unfit.
    let request = PruneRequest {
        copies_elsewhere: site.store.may_be_copied_elsewhere(),
        ..site.prune_request(false)
    };
    let mut met = Vec::new();
    for config in &site.config.customers {
        let alarms = prune_beside(invocation, site, config, request);
        met.extend(alarms.into_iter().map(|alarm| Concern {
            customer: Some(config.name.clone()),
            alarm,
        }));
    }
    if go_on(invocation).is_err() {
        return failure;
    }
    let mut overview = Overview::of(site, site.host.now());
    overview.concerns.extend(met);
    let last_run = site.host.folder().last_run();
    publish(&site.config, &metrics::text(&overview, last_run.as_ref()));
    telling::tell_alarms(receivers, site, &overview);
    telling::ping(receivers, Moment::Fail, &failure.text());
    failure
}

/// What is due of a customer is pruned; what is to be told of that.
fn prune_beside(
    invocation: &Invocation,
    site: &Site,
    config: &config::Customer,
    request: PruneRequest,
) -> Vec<Alarm> {
    // That one cannot be opened the overview tells.
    let Ok(open) = site.customer(config) else {
        return Vec::new();
    };
    let now = site.host.now();
    if !open.customer.with_state(|state| is_prune_due(state, now)) {
        return Vec::new();
    }
    if let Err(failure) = site.probe(&open.customer) {
        let text = format!("the last prune failed: {}", failure.message);
        return vec![Alarm::of_customer(AlarmKind::PruneFailed, text)];
    }
    let watching = Watching::new(invocation);
    let pruned = prune_in_run(
        &open.customer,
        &site.host,
        request,
        &watching,
        &invocation.stop,
    );
    if let Ok(pruned) = &pruned {
        log_pruned(&config.name, pruned);
    }
    site.store.keep_copies_of(&open.customer);
    alarms_of_prune(&pruned)
}

/// What was stopped, and is no failure of anything.
fn is_interrupted(error: &JobError) -> bool {
    error.kind == JobErrorKind::Interrupted
}

fn is_cut_short(done: &CustomerRun) -> bool {
    let of_vms = done.vms.iter().filter_map(|vm| match &vm.outcome {
        VmOutcome::Failed(error) => Some(error),
        _ => None,
    });
    let pruned = done.pruned.as_ref().err();
    let verified = done.verified.as_ref().err();
    of_vms.chain(pruned).chain(verified).any(is_interrupted)
}

/// Beside what it met of the customers.
fn run_failed(began_at: Timestamp, failure: &Failure) -> RunAlarm {
    let text = format!("the last run ended early: {}", failure.message);
    let alarm = Alarm::of_customer(AlarmKind::RunFailed, text);
    RunAlarm::new(began_at, None, &alarm)
}

/// What the run before met of customers that this one did not see to its end still stands.
fn carry_over(
    alarms: &mut Vec<RunAlarm>,
    folder: &StateFolder,
    config: &Config,
    settled: &BTreeSet<CustomerName>,
) {
    let Some(before) = folder.last_run() else {
        return;
    };
    for alarm in before.alarms {
        let mut customers = config.customers.iter().map(|customer| &customer.name);
        let is_open = customers.any(|name| {
            alarm.customer.as_deref() == Some(name.as_str()) && !settled.contains(name)
        });
        if is_open && !alarms.iter().any(|one| one.is_again(&alarm)) {
            alarms.push(alarm);
        }
    }
}

/// What only the run itself knows to be wrong.
fn alarms_of(done: &CustomerRun) -> Vec<Alarm> {
    let mut alarms = Vec::new();
    for vm in &done.vms {
        let what = match &vm.outcome {
            VmOutcome::Failed(error) if is_interrupted(error) => continue,
            VmOutcome::Failed(error) => error.to_string(),
            VmOutcome::Left => "its window ended before its turn".to_string(),
            VmOutcome::NotDue | VmOutcome::BackedUp(_) => continue,
        };
        let text = format!("{}: the last backup failed: {what}", vm.vm);
        alarms.push(Alarm::of_vm(AlarmKind::BackupFailed, &vm.vm, text));
    }
    alarms.extend(alarms_of_prune(&done.pruned));
    let damage = done.verified.iter().flat_map(|verified| &verified.damage);
    alarms.extend(damage.map(|text| Alarm::of_customer(AlarmKind::Damage, &**text)));
    let incomplete = match &done.verified {
        Ok(verified) => verified.incomplete(),
        Err(error) => Some(error.clone()),
    };
    if let Some(error) = incomplete.filter(|error| !is_interrupted(error)) {
        let text = format!("the last verification failed: {error}");
        alarms.push(Alarm::of_customer(AlarmKind::VerificationFailed, text));
    }
    alarms
}

/// What the ledger tells by itself needs no memory, which would tell it after it is healed.
fn is_noted(alarm: &Alarm, done: &CustomerRun) -> bool {
    let mut noted = done.verified.iter().flat_map(|verified| &verified.noted);
    alarm.kind == AlarmKind::Damage && noted.any(|text| *text == alarm.text)
}

fn alarms_of_prune(pruned: &PruneOfRun) -> Vec<Alarm> {
    let mut alarms = Vec::new();
    if let Err(error) = pruned
        && !matches!(
            error.kind,
            JobErrorKind::Clock(_) | JobErrorKind::Interrupted
        )
    {
        let text = format!("the last prune failed: {error}");
        alarms.push(Alarm::of_customer(AlarmKind::PruneFailed, text));
    }
    if let Ok(pruned) = pruned {
        let damage = pruned.damage.as_ref().map(ToString::to_string);
        let withheld = (!pruned.reclaimed.withheld.is_empty())
            .then(|| "a condemned pack holds what is nowhere else; it was kept".to_string());
        let refused = [&pruned.reclaimed.refused, &pruned.swept.refused];
        for refused in refused.into_iter().flatten() {
            let text = format!("the last prune could not delete everything: {refused}");
            alarms.push(Alarm::of_customer(AlarmKind::PruneFailed, text));
        }
        let unreadable = pruned.unreadable.iter().cloned();
        let texts = damage.into_iter().chain(unreadable).chain(withheld);
        alarms.extend(texts.map(|text| Alarm::of_customer(AlarmKind::Damage, text)));
        if let Some(first) = pruned.swept.unexplained.first() {
            let text = format!(
                "{} in the store that the ledger does not explain, and until that is settled nothing is \
                 certified (vmkeep prune names all), such as {first}",
                figures::count(pruned.swept.unexplained.len(), "object", "objects")
            );
            alarms.push(Alarm::of_customer(AlarmKind::Unexplained, text));
        }
    }
    alarms
}

#[derive(Default)]
struct Sums {
    read_bytes: u64,
    stored_bytes: u64,
    backed_up: u64,
    failed: u64,
}

impl Sums {
    fn add(&mut self, done: &CustomerRun) {
        for vm in &done.vms {
            match &vm.outcome {
                VmOutcome::NotDue => {}
                VmOutcome::Failed(error) if is_interrupted(error) => {}
                VmOutcome::BackedUp(point) => {
                    self.backed_up += 1;
                    self.read_bytes += point.read_bytes;
                    self.stored_bytes += point.stored_bytes;
                }
                VmOutcome::Failed(_) | VmOutcome::Left => self.failed += 1,
            }
        }
    }
}

fn remember(
    folder: &StateFolder,
    began_at: Timestamp,
    ended_at: Timestamp,
    sums: &Sums,
    exit: Exit,
    alarms: Vec<RunAlarm>,
) {
    let before = folder.last_run().and_then(|run| run.succeeded_at);
    let run = LastRun {
        began_at,
        ended_at,
        exit_code: exit.code(),
        succeeded_at: match exit {
            Exit::Done => Some(ended_at),
            _ => before,
        },
        read_bytes: sums.read_bytes,
        stored_bytes: sums.stored_bytes,
        backed_up: sums.backed_up,
        failed: sums.failed,
        alarms,
    };
    if let Err(error) = folder.remember_run(run) {
        tracing::warn!("how this run went was not remembered: {error}");
    }
}

/// Metrics that cannot be written take nothing from the backups: their age tells.
fn publish(config: &Config, text: &str) {
    let Some(file) = &config.run.metrics_file else {
        return;
    };
    if let Err(error) = metrics::write_file(file, text) {
        tracing::error!("{}: {error}", file.display());
    }
}

fn interrupted() -> Failure {
    Failure::new(Exit::Interrupted, "interrupted").hint("the state is clean; run it again")
}

/// What has not begun when the run is to stop does not begin any more.
fn go_on(invocation: &Invocation) -> Result<(), JobError> {
    match invocation.stop.load(Ordering::Relaxed) {
        true => Err(stopped()),
        false => Ok(()),
    }
}

fn stopped() -> JobError {
    JobError::new(JobErrorKind::Interrupted, "interrupted")
}

type PruneOfRun = Result<Pruned, JobError>;

fn prune_of(
    invocation: &Invocation,
    site: &Site,
    course: &Course<'_>,
    open: &OpenCustomer<'_>,
) -> PruneOfRun {
    go_on(invocation)?;
    course.begins(format!("{}: prune", open.config.name));
    let watching = Watching::new(invocation);
    let pruned = prune_in_run(
        &open.customer,
        &site.host,
        site.prune_request(false),
        &watching,
        &invocation.stop,
    )?;
    log_pruned(&open.config.name, &pruned);
    Ok(pruned)
}

fn verify_of(
    invocation: &Invocation,
    site: &Site,
    pace: &Pace,
    course: &Course<'_>,
    open: &OpenCustomer<'_>,
) -> Result<Verified, JobError> {
    go_on(invocation)?;
    course.begins(format!("{}: verification", open.config.name));
    let watching = Watching::new(invocation).at_pace(pace);
    let threads = site.config.host.threads;
    verify_in_run(
        &open.customer,
        &site.host,
        threads,
        &watching,
        &invocation.stop,
    )
}

/// All backups of the night, over all customers. A customer is pruned when the last of its VMs is done, and does
/// not wait for those of others.
fn back_up(
    invocation: &Invocation,
    site: &Site,
    pace: &Pace,
    course: &Course<'_>,
    turns: &[Turn<'_>],
    pruned: &[OnceLock<PruneOfRun>],
) -> Vec<(usize, VmRun)> {
    let now = site.host.now();
    let works = plan(
        turns.iter().map(|turn| &turn.open),
        now,
        site.config.run.spread,
    );
    course.are_due(works.iter().filter(|work| work.is_due()).count());
    if let Some(rate) = spread_rate(&works) {
        pace.keep_to(rate);
    }
    let at_once = match site.file.writers() {
        // Its writers take turns anyway.
        Writers::One => 1,
        Writers::Many => site.config.run.vms_at_once,
    };
    let mut settings = site.backup_settings();
    settings.threads = (settings.threads / at_once).max(1);
    let outcome_of = |work: &Work, outcome| VmRun {
        vm: work.vm.clone(),
        reason: work.due.reason.to_string(),
        outcome,
    };
    let of_customer = |at: usize| works.iter().filter(|work| work.customer == at).count();
    let left: Vec<AtomicUsize> = (0..turns.len())
        .map(|at| AtomicUsize::new(of_customer(at)))
        .collect();
    let attempt = |work: &Work| {
        let turn = turns.get(work.customer)?;
        let config = turn.open.config.vms.iter().find(|vm| vm.name == work.vm)?;
        let name = format!("{}/{}", turn.open.config.name, work.vm);
        if work.is_due() {
            tracing::info!("{name}: begun: {}", due_word(work.due.what));
            course.begins(&*name);
        }
        tracing::debug!("{name}: {}", work.due.reason);
        let watching = Watching::new(invocation).at_pace(pace);
        let (customer, stop) = (&turn.open.customer, &invocation.stop);
        let backed_up = match site.task(&turn.open, config) {
            Ok(task) => {
                let due = work.due;
                run_vm(customer, &site.host, &task, due, &settings, &watching, stop)
            }
            Err(error) => Err(error.into()),
        };
        drop(watching);
        let failed = |error| outcome_of(work, VmOutcome::Failed(error));
        let done = backed_up.unwrap_or_else(failed);
        match &done.outcome {
            VmOutcome::BackedUp(point) => log_backed_up(&name, point),
            VmOutcome::Failed(error) => tracing::info!("{name}: not backed up: {error}"),
            VmOutcome::NotDue | VmOutcome::Left => {}
        }
        Some(done)
    };
    let run = |work: &Work| {
        let done = attempt(work)?;
        let turn = turns.get(work.customer)?;
        if work.is_due() {
            course.vm_done();
        }
        let is_last = left
            .get(work.customer)
            .is_some_and(|left| left.fetch_sub(1, Ordering::SeqCst) == 1);
        if is_last && let Some(pruned) = pruned.get(work.customer) {
            let _first = pruned.set(prune_of(invocation, site, course, &turn.open));
        }
        Some(done)
    };
    let lost = |work: &Work| {
        let text = format!(
            "{}: vmkeep broke down at it; what it printed is of use to its developers",
            work.vm
        );
        let error = JobError::new(JobErrorKind::State, text);
        Some(outcome_of(work, VmOutcome::Failed(error)))
    };
    let (now, stop) = (&SystemClock::wall, &invocation.stop);
    let mut done = carry_out(&works, at_once, now, stop, run, lost);
    if have_made_room(pruned) {
        // Each has another attempt, and no more.
        let places = (0..works.len()).filter(|at| {
            let done = done.get(*at).and_then(Option::as_ref);
            done.and_then(Option::as_ref).is_some_and(lacked_room)
        });
        let places: Vec<usize> = places.collect();
        let again = places.iter().filter_map(|at| works.get(*at).cloned());
        let again: Vec<Work> = again.collect();
        let second = carry_out(&again, at_once, now, stop, attempt, lost);
        for (at, second) in places.into_iter().zip(second) {
            if let (Some(place), Some(second)) = (done.get_mut(at), second) {
                *place = Some(second);
            }
        }
    }
    let is_stopped = invocation.stop.load(Ordering::Relaxed);
    let done = works.iter().zip(done).map(|(work, done)| {
        let done = done.flatten();
        let not_begun = || {
            let outcome = match (work.is_due(), is_stopped) {
                (false, _) => VmOutcome::NotDue,
                (true, true) => VmOutcome::Failed(stopped()),
                (true, false) => VmOutcome::Left,
            };
            outcome_of(work, outcome)
        };
        (work.customer, done.unwrap_or_else(not_begun))
    });
    done.collect()
}

fn have_made_room(pruned: &[OnceLock<PruneOfRun>]) -> bool {
    let mut pruned = pruned.iter().filter_map(OnceLock::get).flatten();
    pruned.any(|pruned| pruned.reclaimed.freed_bytes > 0)
}

fn lacked_room(run: &VmRun) -> bool {
    let full = RepositoryErrorKind::Storage(StorageErrorKind::Full);
    matches!(&run.outcome, VmOutcome::Failed(error) if error.kind == JobErrorKind::Repository(full))
}

fn due_word(what: What) -> &'static str {
    match what {
        What::Nothing => "nothing",
        What::Incremental => "incremental",
        What::Full => "full",
    }
}

/// What each VM is to get tonight, in the order in which it gets it.
fn plan<'a>(
    customers: impl Iterator<Item = &'a OpenCustomer<'a>>,
    now: Timestamp,
    spread: bool,
) -> Vec<Work> {
    let mut works = Vec::new();
    for (at, open) in customers.enumerate() {
        let vms: Vec<VmName> = open.config.vms.iter().map(|vm| vm.name.clone()).collect();
        open.customer
            .with_state(|state| works.extend(look_ahead(at, state, &vms, now)));
    }
    arrange(&mut works, now, spread);
    works
}

/// Every VM, the prune and the alarms of one customer, and the worst of it.
fn report(
    invocation: &Invocation,
    site: &Site,
    open: &OpenCustomer<'_>,
    done: &CustomerRun,
    concerns: &[Concern],
) -> (String, Value, Option<Failure>) {
    let customer = &open.config.name;
    let mut text = String::new();
    let mut worst = None;
    let fail = |failure: Failure, worst: &mut Option<Failure>| {
        invocation.terminal.tell(&failure);
        *worst = worse(worst.take(), Some(failure));
    };
    let policies = &done.begun.policies;
    if *policies == Policies::Applied {
        let _ = writeln!(text, "{customer}: the configured policy is in force now");
    }
    if let Some(failure) = policy_that_waits(customer, policies) {
        let _ = writeln!(text, "{}", failure.message);
        text.push_str(&remedies(&failure));
        fail(failure, &mut worst);
    }
    // Nothing that this host fails at: it works by the ledger.
    if *policies == Policies::NotOurs {
        let _ = writeln!(text, "{customer}: {POLICY_NOT_OURS}");
    }
    if let Some(host) = &done.begun.unentered {
        let _ = writeln!(
            text,
            "{customer}: the ledger has this host under another name or clock, which only a host with the \
             role admin changes\n  hint: there: {}",
            admit_command(host)
        );
    }
    let vms: Vec<Value> = done
        .vms
        .iter()
        .map(|vm| {
            let name = format!("{customer}/{}", vm.vm);
            match &vm.outcome {
                VmOutcome::NotDue => {
                    let _ = writeln!(text, "{name}: nothing due, {}", vm.reason);
                    json!({"vm": vm.vm.as_str(), "outcome": "not-due", "reason": vm.reason})
                }
                VmOutcome::BackedUp(backed_up) => {
                    text.push_str(&backed_up_line(&name, backed_up));
                    let mut document = backed_up_document(customer, &vm.vm, backed_up);
                    document["outcome"] = "backed-up".into();
                    document["reason"] = vm.reason.clone().into();
                    document
                }
                VmOutcome::Left => {
                    let message = format!("{name}: left for the next run: its window has ended");
                    let _ = writeln!(text, "{message}");
                    let failure = Failure::new(Exit::SomeFailed, message)
                        .hint("a run outside of the window does what was missed: vmkeep run");
                    text.push_str(&remedies(&failure));
                    fail(failure, &mut worst);
                    json!({"vm": vm.vm.as_str(), "outcome": "left", "reason": vm.reason})
                }
                VmOutcome::Failed(error) if is_interrupted(error) => {
                    let _ = writeln!(text, "{name}: interrupted: left for the next run");
                    json!({"vm": vm.vm.as_str(), "outcome": "interrupted", "reason": vm.reason})
                }
                VmOutcome::Failed(error) => {
                    let cause = Failure::from(error.clone());
                    let _ = writeln!(text, "{name}: FAILED: {}", cause.message);
                    let failure = Failure {
                        exit: Exit::SomeFailed,
                        message: format!("{name}: {}", cause.message),
                        hints: cause.hints.clone(),
                    };
                    text.push_str(&remedies(&failure));
                    fail(failure, &mut worst);
                    json!({
                        "vm": vm.vm.as_str(),
                        "outcome": "failed",
                        "reason": vm.reason,
                        "error": cause.document()["error"],
                    })
                }
            }
        })
        .collect();
    let prune = match &done.pruned {
        Ok(pruned) => {
            text.push_str(&pruned_text(
                customer,
                pruned,
                &site.store.storage.location(),
            ));
            if let Some(failure) = verdict(pruned) {
                text.push_str(&remedies(&failure));
                fail(failure, &mut worst);
            }
            pruned_document(customer, pruned)
        }
        Err(error) => {
            let failure = Failure::from(error.clone());
            let _ = writeln!(text, "{customer}: prune: {}", failure.message);
            let document = json!({ "error": failure.document()["error"] });
            if !is_interrupted(error) {
                text.push_str(&remedies(&failure));
                fail(failure, &mut worst);
            }
            document
        }
    };
    let verification = match &done.verified {
        Ok(verified) => {
            let incomplete = verified.incomplete();
            let is_sound = verified.damage.is_empty() && verified.certificates.is_empty();
            if verified.packs_read > 0 || !is_sound || incomplete.is_some() {
                text.push_str(&verified_text(customer, verified));
            }
            if let Some(error) = incomplete {
                let failure = Failure::from(error);
                text.push_str(&remedies(&failure));
                fail(failure, &mut worst);
            }
            if let Some(first) = verified.damage.first() {
                let failure = Failure::new(Exit::DamageFound, first.clone())
                    .hint("vmkeep verify --read-data shows all of it");
                text.push_str(&remedies(&failure));
                fail(failure, &mut worst);
            }
            verified_document(customer, verified)
        }
        Err(error) => {
            let failure = Failure::from(error.clone());
            let _ = writeln!(text, "{customer}: verification: {}", failure.message);
            let document = json!({ "error": failure.document()["error"] });
            if !is_interrupted(error) {
                text.push_str(&remedies(&failure));
                fail(failure, &mut worst);
            }
            document
        }
    };
    let zone = open.zone();
    let has_told_policy = !matches!(policies, Policies::Same | Policies::Applied);
    for concern in concerns {
        if has_told_policy && concern.alarm.kind == AlarmKind::PolicyWaits {
            continue;
        }
        let what = figures::local_times(&concern.alarm.text, &zone);
        let _ = writeln!(text, "{customer}: {what}");
        // A hole in the window or a suspect night stays one for two weeks: that is for `status` to
        // repeat.
        let kind = concern.alarm.kind;
        if matches!(kind, AlarmKind::OverMaximum | AlarmKind::Distrusted) {
            let failure = Failure::new(Exit::PromiseBroken, format!("{customer}: {what}"));
            let failure = match kind {
                AlarmKind::Distrusted => failure
                    .hint("vmkeep points marks the restore points that may lack some of them")
                    .hint("find out who writes to the disk behind the hypervisor's back"),
                _ => failure,
            };
            text.push_str(&remedies(&failure));
            fail(failure, &mut worst);
        }
    }
    let mut document = json!({
        "customer": customer.as_str(),
        "aborted_sessions": done.begun.aborted_sessions,
        "host_differs": done.begun.unentered.is_some(),
        "vms": vms,
        "prune": prune,
        "prune_plan": done
            .pruned
            .iter()
            .flat_map(|pruned| plan_documents(&pruned.decisions))
            .collect::<Vec<_>>(),
        "verification": verification,
        "alarms": concerns.iter().map(|one| &one.alarm.text).collect::<Vec<_>>(),
    });
    add_policy(&mut document, policies);
    (text, document, worst)
}

const POLICY_NOT_OURS: &str = "the configured policy is not the one in force, which only a host with the \
role admin changes; this host works by the one in force";

/// Why the configured policy is not in force, where that is for this host to mend, and what to do about it.
fn policy_that_waits(customer: &CustomerName, policies: &Policies) -> Option<Failure> {
    let message = format!("{customer}: {}", why_policy_waits(policies)?);
    match policies {
        Policies::Same | Policies::Applied | Policies::NotOurs => None,
        Policies::NeedsConfirmation { .. } | Policies::Overruled { .. } => {
            let command = confirm_command(customer);
            let failure = Failure::new(Exit::Failed, message);
            Some(failure.hint(format!("if that is meant: {command}")))
        }
        Policies::ClockRefused { .. } => Some(Failure::new(Exit::ClockNotTrusted, message)),
    }
}

/// The same for programs.
fn add_policy(document: &mut Value, policies: &Policies) {
    let (word, nights, refused) = match policies {
        Policies::Same => ("same", None, None),
        Policies::Applied => ("applied", None, None),
        Policies::NotOurs => ("not-ours", None, None),
        Policies::NeedsConfirmation { nights } => ("needs-confirmation", Some(nights), None),
        Policies::Overruled { .. } => ("overruled", None, None),
        Policies::ClockRefused { reason } => ("clock-refused", None, Some(reason.to_string())),
    };
    let by = match policies {
        Policies::Overruled { by } => Some(by),
        _ => None,
    };
    let nights = nights.map(|nights| {
        let nights = nights
            .iter()
            .map(|(vm, nights)| (vm.to_string(), json!(nights)));
        nights.collect::<serde_json::Map<_, _>>()
    });
    document["policy"] = word.into();
    document["policy_nights"] = json!(nights);
    document["policy_refused"] = json!(refused);
    document["policy_overruled_by"] = json!(by);
}

/// What to do about a failure, below the line that tells it: a mail or a ping has no stderr.
fn remedies(failure: &Failure) -> String {
    let hints = failure.hints.iter();
    hints.map(|hint| format!("  hint: {hint}\n")).collect()
}

/// The night in its order, with the reasons.
fn dry_run(invocation: &Invocation, site: &Site) -> Result<Answer, Failure> {
    let now = site.host.now();
    let mut tally = Tally::default();
    let (customers, unopened) = site.customers(|_| true)?;
    let mut vms: Vec<Vec<Value>> = customers.iter().map(|_| Vec::new()).collect();
    for work in plan(customers.iter(), now, site.config.run.spread) {
        let (Some(open), Some(vms)) = (customers.get(work.customer), vms.get_mut(work.customer))
        else {
            continue;
        };
        let what = due_word(work.due.what);
        let when = work.starts_at.map_or(String::new(), |at| {
            format!(", from {}", figures::minute(at, &open.zone()))
        });
        let _ = writeln!(
            tally.text,
            "{}/{}: {what}: {}{when}",
            open.config.name, work.vm, work.due.reason
        );
        vms.push(json!({
            "vm": work.vm.as_str(),
            "due": what,
            "reason": work.due.reason.to_string(),
            "starts_at": work.starts_at.map(|at| at.to_string()),
        }));
    }
    for (open, vms) in customers.iter().zip(vms) {
        let (state, policies) = open
            .customer
            .with_state(|state| foresee_policy(state, &site.host, &open.config.terms, false))?;
        let customer = &open.config.name;
        if policies == Policies::Applied {
            let _ = writeln!(
                tally.text,
                "{customer}: the configured policy would be in force"
            );
        }
        if policies == Policies::NotOurs {
            let _ = writeln!(tally.text, "{customer}: {POLICY_NOT_OURS}");
        }
        if let Some(failure) = policy_that_waits(customer, &policies) {
            let _ = writeln!(tally.text, "{}", failure.message);
            tally.text.push_str(&remedies(&failure));
        }
        let clock = why_not_delete(&state, &site.host).map(|reason| reason.to_string());
        let refusal = why_not_prune(&open.customer, &site.host).or(clock);
        let mut removed = foresee_prune(&state, now, site.prune_request(false));
        removed.retain(|decision| {
            refusal.is_none() && matches!(decision.action, Action::Expire | Action::Erase)
        });
        // One at its last chance is both.
        let points: BTreeSet<_> = removed.iter().map(|decision| decision.point).collect();
        let prune = match &refusal {
            Some(reason) => format!("nothing would be pruned: {reason}"),
            None => format!(
                "prune would expire or erase {}",
                figures::count(points.len(), "point", "points")
            ),
        };
        let _ = writeln!(tally.text, "{customer}: {prune}");
        let mut document = json!({
            "customer": customer.as_str(),
            "vms": vms,
            "prune": plan_documents(&removed),
            "prune_plan": plan_documents(&removed),
            "prune_refusal": refusal,
        });
        add_policy(&mut document, &policies);
        tally.documents.push(document);
    }
    tally.all_failed(invocation, unopened)?;
    Ok(tally.answer(|customers| json!({ "dry_run": true, "customers": customers })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_run_that_goes_on_has_another_one_started_beside_it_until_it_is_over() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("started");
        let another = || {
            let mut touch = Command::new("touch");
            touch.arg(&file);
            touch
        };
        let (start, every) = (Instant::now(), Duration::from_millis(20));
        std::thread::scope(|scope| {
            let (_until_it_ends, is_over) = mpsc::channel();
            scope.spawn(move || start_others(every, another, &is_over));
            while !file.exists() {
                assert!(start.elapsed() < Duration::from_secs(60), "none started");
                std::thread::sleep(every);
            }
        });
    }

    #[test]
    fn a_run_whose_prunes_freed_nothing_has_no_other_attempt() {
        let pruned = |freed_bytes| {
            let mut pruned = Pruned::default();
            pruned.reclaimed.freed_bytes = freed_bytes;
            OnceLock::from(Ok(pruned))
        };
        let failed = OnceLock::from(Err(stopped()));
        assert!(!have_made_room(&[OnceLock::new(), pruned(0), failed]));
        assert!(have_made_room(&[pruned(0), pruned(1)]));
        let run = |kind| VmRun {
            vm: VmName::new("web01").expect("a name"),
            reason: String::new(),
            outcome: VmOutcome::Failed(JobError::new(kind, "a test")),
        };
        let storage = |kind| JobErrorKind::Repository(RepositoryErrorKind::Storage(kind));
        assert!(lacked_room(&run(storage(StorageErrorKind::Full))));
        assert!(!lacked_room(&run(storage(StorageErrorKind::Denied))));
        assert!(!lacked_room(&run(JobErrorKind::Capture)));
    }
}
