use super::prune::{verdict, worse};
use super::report::{
    backed_up_document, backed_up_line, pruned_document, pruned_text, verified_document,
    verified_text,
};
use super::tally::Tally;
use crate::cli::alarms::Concern;
use crate::cli::answer::Answer;
use crate::cli::args::RunArgs;
use crate::cli::clock::SystemClock;
use crate::cli::exit::{Exit, Failure};
use crate::cli::figures;
use crate::cli::invocation::Invocation;
use crate::cli::metrics;
use crate::cli::notify::{Receivers, receivers};
use crate::cli::overview::Overview;
use crate::cli::pace::Pace;
use crate::cli::priority;
use crate::cli::site::{OpenCustomer, Site, Watching};
use crate::cli::telling;
use crate::config::Config;
use crate::jobs::{
    Alarm, AlarmKind, BegunRun, CustomerRun, JobError, JobErrorKind, LastRun, Policies, Pruned,
    StateFolder, VmOutcome, VmRun, Work, arrange, begin_run, carry_out, foresee_policy, look_ahead,
    plan_prune, prune_in_run, run_vm, spread_rate, verify_in_run, why_not_prune,
};
use crate::model::{CustomerName, VmName, Writers};
use crate::notify::Moment;
use crate::policy::{Action, Deletion, What};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

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
    let ended = night(invocation, &receivers);
    let (moment, text) = match &ended {
        Ok(answer) if answer.exit == Exit::Done => (Moment::Success, answer.text.clone()),
        Ok(answer) => (Moment::Fail, answer.text.clone()),
        // The other run tells how it ends.
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
    if let Ok(folder) = StateFolder::create(&config.host.state_dir) {
        telling::tell_failure(receivers, &folder, config, now, failure);
        remember(&folder, began_at, now, &Sums::default(), failure.exit);
    }
    // Where it was stopped, nothing is known to be wrong with the repository.
    if failure.exit != Exit::Interrupted {
        publish(config, &metrics::text_of_failure(failure));
    }
}

fn night(invocation: &Invocation, receivers: &Receivers) -> Result<Answer, Failure> {
    let mut site = Site::open(invocation)?;
    let began_at = site.host.now();
    let Some(_lock) = site.host.folder().lock("run")? else {
        return Err(
            Failure::new(Exit::Busy, "another run of this host is under way")
                .hint("nothing is wrong: it does what is due; vmkeep status shows how far it is"),
        );
    };
    telling::ping(receivers, Moment::Start, "");
    site.store.refuse_unfit(&site.config)?;
    let settings = site.config.run.clone();
    priority::lower(settings.io_priority);
    let zone = zone_of(&site.config);
    let pace = Arc::new(Pace::new(&settings, zone, invocation.stop.clone()));
    site.brake_uploads(&pace);

    let mut tally = Tally::default();
    let mut overview = Overview::default();
    let mut sums = Sums::default();
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
    let done = back_up(invocation, &site, &pace, &turns, &pruned)?;
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
            let pruned = pruned.unwrap_or_else(|| prune_of(invocation, &site, &turn.open));
            // What went just now goes here as well.
            site.store.keep_copies_of(&turn.open.customer);
            pruned
        })
        .collect();
    for (turn, pruned) in turns.into_iter().zip(pruned) {
        let watching = Watching::new(invocation).at_pace(&pace);
        let threads = site.config.host.threads;
        let customer = &turn.open.customer;
        let verified = verify_in_run(customer, &site.host, threads, &watching, &invocation.stop);
        drop(watching);
        for result in [pruned.as_ref().err(), verified.as_ref().err()] {
            if result.is_some_and(|error| error.kind == JobErrorKind::Interrupted) {
                return Err(interrupted());
            }
        }
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
        overview.add(&site, &turn.open, of_run, site.host.now());
        // What the run itself met is reported where it was met.
        let concerns = overview.concerns.get(before..).unwrap_or_default();
        let concerns = concerns
            .get(..concerns.len().saturating_sub(after))
            .unwrap_or_default();
        let (part, document, failure) = report(invocation, &site, &turn.open, &done, concerns);
        tally.add(&part, document, failure);
        sums.add(&done);
    }
    overview.end(&site);
    let mut answer = tally.answer(|customers| json!({ "customers": customers }));
    let folder = site.host.folder();
    remember(folder, began_at, site.host.now(), &sums, answer.exit);
    let text = metrics::text(&overview, folder.last_run().as_ref());
    publish(&site.config, &text);
    telling::tell_all(receivers, &site, &overview, &answer);
    // Under cron (-q) a run that did everything has nothing to say.
    if invocation.general.quiet && answer.exit == Exit::Done {
        answer.text.clear();
    }
    Ok(answer)
}

/// What only the run itself knows to be wrong.
fn alarms_of(done: &CustomerRun) -> Vec<Alarm> {
    let mut alarms = Vec::new();
    for vm in &done.vms {
        let what = match &vm.outcome {
            VmOutcome::Failed(error) => error.to_string(),
            VmOutcome::Left => "its window ended before its turn".to_string(),
            VmOutcome::NotDue | VmOutcome::BackedUp(_) => continue,
        };
        let text = format!("{}: the last backup failed: {what}", vm.vm);
        alarms.push(Alarm::of_vm(AlarmKind::BackupFailed, &vm.vm, text));
    }
    if let Err(error) = &done.pruned
        && !matches!(error.kind, JobErrorKind::Clock(_))
    {
        let text = format!("the last prune failed: {error}");
        alarms.push(Alarm::of_customer(AlarmKind::PruneFailed, text));
    }
    if let Ok(pruned) = &done.pruned {
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
                "{} in the store that the ledger does not explain, such as {first}; nothing is \
                 certified until prune --confirm removes them or somebody moves them away",
                figures::count(pruned.swept.unexplained.len(), "object", "objects")
            );
            alarms.push(Alarm::of_customer(AlarmKind::Unexplained, text));
        }
    }
    let damage = done.verified.iter().flat_map(|verified| &verified.damage);
    alarms.extend(damage.map(|text| Alarm::of_customer(AlarmKind::Damage, &**text)));
    if let Err(error) = &done.verified {
        let text = format!("the last verification failed: {error}");
        alarms.push(Alarm::of_customer(AlarmKind::VerificationFailed, text));
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
    };
    if let Err(error) = folder.remember_run(&run) {
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

/// The zone of the general policy: limits by the time of day are the host's, not a customer's.
fn zone_of(config: &Config) -> TimeZone {
    TimeZone::get(&config.terms.timezone).unwrap_or(TimeZone::UTC)
}

type PruneOfRun = Result<Pruned, JobError>;

fn prune_of(invocation: &Invocation, site: &Site, open: &OpenCustomer<'_>) -> PruneOfRun {
    let watching = Watching::new(invocation);
    prune_in_run(
        &open.customer,
        &site.host,
        site.prune_request(false),
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
    turns: &[Turn<'_>],
    pruned: &[OnceLock<PruneOfRun>],
) -> Result<Vec<(usize, VmRun)>, Failure> {
    let now = site.host.now();
    let works = plan(
        turns.iter().map(|turn| &turn.open),
        now,
        site.config.run.spread,
    );
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
    let run = |work: &Work| {
        let turn = turns.get(work.customer)?;
        let config = turn.open.config.vms.iter().find(|vm| vm.name == work.vm)?;
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
        let is_last = left
            .get(work.customer)
            .is_some_and(|left| left.fetch_sub(1, Ordering::SeqCst) == 1);
        if is_last && let Some(pruned) = pruned.get(work.customer) {
            let _first = pruned.set(prune_of(invocation, site, &turn.open));
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
    let done = carry_out(
        &works,
        at_once,
        &SystemClock::wall,
        &invocation.stop,
        run,
        lost,
    );
    if invocation.stop.load(Ordering::Relaxed) {
        return Err(interrupted());
    }
    let done = works.iter().zip(done).map(|(work, done)| {
        let done = done.flatten();
        let left = || outcome_of(work, VmOutcome::Left);
        (work.customer, done.unwrap_or_else(left))
    });
    Ok(done.collect())
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
            text.push_str(&remedies(&failure));
            let document = json!({ "error": failure.document()["error"] });
            fail(failure, &mut worst);
            document
        }
    };
    let verification = match &done.verified {
        Ok(verified) => {
            if verified.packs_read > 0 || !verified.damage.is_empty() {
                text.push_str(&verified_text(customer, verified));
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
            text.push_str(&remedies(&failure));
            let document = json!({ "error": failure.document()["error"] });
            fail(failure, &mut worst);
            document
        }
    };
    for concern in concerns {
        let what = &concern.alarm.text;
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
        "vms": vms,
        "prune": prune,
        "verification": verification,
        "alarms": concerns.iter().map(|one| &one.alarm.text).collect::<Vec<_>>(),
    });
    add_policy(&mut document, policies);
    (text, document, worst)
}

/// Why the configured policy is not in force, and what to do about it.
fn policy_that_waits(customer: &CustomerName, policies: &Policies) -> Option<Failure> {
    match policies {
        Policies::Same | Policies::Applied => None,
        Policies::NeedsConfirmation { nights } => {
            let lost: Vec<String> = nights
                .iter()
                .map(|(vm, nights)| format!("{vm}: {nights}"))
                .collect();
            let message = format!(
                "{customer}: the configured policy is shorter and would expire several nights at \
                 once ({}); the old one holds until somebody confirms",
                lost.join(", ")
            );
            let failure = Failure::new(Exit::Failed, message);
            Some(failure.hint("if that is meant: vmkeep prune --confirm"))
        }
        Policies::ClockRefused { reason } => {
            let message =
                format!("{customer}: the configured policy waits, and the old one holds: {reason}");
            Some(Failure::new(Exit::ClockNotTrusted, message))
        }
    }
}

/// The same for programs.
fn add_policy(document: &mut Value, policies: &Policies) {
    let (word, nights, refused) = match policies {
        Policies::Same => ("same", None, None),
        Policies::Applied => ("applied", None, None),
        Policies::NeedsConfirmation { nights } => ("needs-confirmation", Some(nights), None),
        Policies::ClockRefused { reason } => ("clock-refused", None, Some(reason.to_string())),
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
        let what = match work.due.what {
            What::Nothing => "nothing",
            What::Incremental => "incremental",
            What::Full => "full",
        };
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
        if let Some(failure) = policy_that_waits(customer, &policies) {
            let _ = writeln!(tally.text, "{}", failure.message);
            tally.text.push_str(&remedies(&failure));
        }
        let clock = match site.host.judgement(state.last_witnessed).deletion {
            Deletion::Allowed => None,
            Deletion::Refused { reason } => Some(reason.to_string()),
        };
        let refusal = why_not_prune(&open.customer, &site.host).or(clock);
        let mut removed = plan_prune(&state, now, site.prune_request(false));
        removed.retain(|decision| {
            refusal.is_none() && matches!(decision.action, Action::Expire | Action::Erase)
        });
        let prune = match &refusal {
            Some(reason) => format!("nothing would be pruned: {reason}"),
            None => format!(
                "prune would expire or erase {}",
                figures::count(removed.len(), "point", "points")
            ),
        };
        let _ = writeln!(tally.text, "{customer}: {prune}");
        let mut document = json!({
            "customer": customer.as_str(),
            "vms": vms,
            "prune": removed.iter().map(super::report::decision_document).collect::<Vec<_>>(),
            "prune_refusal": refusal,
        });
        add_policy(&mut document, &policies);
        tally.documents.push(document);
    }
    tally.all_failed(invocation, unopened)?;
    Ok(tally.answer(|customers| json!({ "dry_run": true, "customers": customers })))
}
