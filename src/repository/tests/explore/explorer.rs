//! Every schedule of a few processes, within a number of preemptions and faults: depth first, each
//! run from the beginning.

use super::super::super::rule::{Off, Rule};
use super::super::super::testing::*;
use super::super::super::*;
use super::store::{Fate, Stage, Taking};
use crate::codec::seeded::Seeded;
use crate::model::{PointId, PointState};
use crate::storage::{Snapshot, Storage};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// What processes tell: what they wrote, and what was acknowledged.
#[derive(Debug, Default)]
pub struct Told {
    pub bytes: BTreeMap<PointId, Vec<u8>>,
    pub acknowledged: Vec<PointId>,
    pub wrong: Vec<String>,
}

pub type Process = fn(&World, &Customer, &Mutex<Told>, PointId);

pub struct Scenario {
    pub world: World,
    pub snapshot: Snapshot,
    /// The point that processes are about.
    pub subject: PointId,
    /// `true`: on the second host.
    pub processes: Vec<(bool, Process)>,
    pub off: &'static [Rule],
    pub overwrites: bool,
    pub fine: bool,
    pub preemptions: u32,
    pub faults: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    Go(usize, Fate),
    /// A creation in flight lands.
    Lands(usize),
    /// The end: what is still in flight lands before the last prune, after it, or never.
    End(Landing),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Landing {
    Never,
    Before,
    After,
}

struct Decision {
    options: Vec<Choice>,
    taken: usize,
}

/// What exploring found.
#[derive(Debug)]
pub struct Explored {
    pub schedules: u64,
    pub counter_example: Option<String>,
    /// Nothing within the bounds is left.
    pub complete: bool,
}

impl Scenario {
    pub fn explore(&self, most: u64) -> Explored {
        let mut decisions: Vec<Decision> = Vec::new();
        let mut schedules = 0;
        loop {
            schedules += 1;
            let mut trace = Vec::new();
            if let Err(what) = self.run(&mut decisions, &mut trace) {
                let lines: String = trace.iter().map(|line| format!("\n    {line}")).collect();
                return Explored {
                    schedules,
                    counter_example: Some(format!("{what}{lines}")),
                    complete: false,
                };
            }
            while decisions
                .last()
                .is_some_and(|last| last.taken + 1 >= last.options.len())
            {
                decisions.pop();
            }
            match decisions.last_mut() {
                Some(last) => last.taken += 1,
                None => {
                    return Explored {
                        schedules,
                        counter_example: None,
                        complete: true,
                    };
                }
            }
            if schedules >= most {
                return Explored {
                    schedules,
                    counter_example: None,
                    complete: false,
                };
            }
        }
    }

    fn rewind(&self) {
        self.world.rewind(&self.snapshot);
    }

    /// One schedule: as `decisions` say, then always the first option, which is noted.
    fn run(&self, decisions: &mut Vec<Decision>, trace: &mut Vec<String>) -> Result<(), String> {
        self.rewind();
        let stage = Stage::new(
            self.world.memory.clone(),
            self.processes.len(),
            self.overwrites,
            self.fine,
        );
        let told: Mutex<Told> = Mutex::default();
        let landing = std::thread::scope(|scope| {
            for (number, (second, process)) in self.processes.iter().enumerate() {
                let (stage, told) = (stage.clone(), &told);
                scope.spawn(move || {
                    let _random = Seeded::with(7, number as u64);
                    let _off = Off::these(self.off);
                    let on = Arc::new(AtomicBool::new(false));
                    let store: Arc<dyn Storage> = Arc::new(Taking {
                        stage: stage.clone(),
                        process: number,
                        on: on.clone(),
                    });
                    let host = match second {
                        true => &self.world.second,
                        false => &self.world.host,
                    };
                    let run = AssertUnwindSafe(|| {
                        let customer = self.world.open_on(store, host).unwrap();
                        on.store(true, Ordering::SeqCst);
                        process(&self.world, &customer, told, self.subject);
                        on.store(false, Ordering::SeqCst);
                    });
                    if let Err(panic) = catch_unwind(run) {
                        let text = panic_text(panic.as_ref());
                        lock(told).wrong.push(format!("process {number}: {text}"));
                    }
                    stage.finish(number);
                });
            }
            self.direct(&stage, decisions, trace)
        });
        let told = told.into_inner().unwrap_or_else(PoisonError::into_inner);
        let judged = catch_unwind(AssertUnwindSafe(|| self.judge(&stage, &told, landing)));
        judged.map_err(|panic| panic_text(panic.as_ref()))
    }

    fn direct(
        &self,
        stage: &Stage,
        decisions: &mut Vec<Decision>,
        trace: &mut Vec<String>,
    ) -> Landing {
        let (mut depth, mut current) = (0, 0);
        let (mut preemptions, mut faults) = (0, 0);
        let mut landed: Vec<usize> = Vec::new();
        loop {
            stage.settle();
            let standing = stage.standing();
            let here = standing.get(current).and_then(Option::as_ref);
            if here.is_some_and(|step| step.local) {
                stage.go(current, Fate::Works);
                continue;
            }
            let late = stage.late();
            let mut options = Vec::new();
            if let Some(step) = here {
                options.push(Choice::Go(current, Fate::Works));
                if faults < self.faults {
                    options.push(Choice::Go(current, Fate::Dies));
                    if step.writes {
                        options.push(Choice::Go(current, Fate::DiesAfter));
                        options.push(Choice::Go(current, Fate::ReplyLost));
                    }
                    if step.creates {
                        options.push(Choice::Go(current, Fate::InFlight));
                    }
                }
            }
            if here.is_none() || preemptions < self.preemptions {
                let others = (0..standing.len()).filter(|other| *other != current);
                let able = others.filter(|other| standing[*other].is_some());
                options.extend(able.map(|other| Choice::Go(other, Fate::Works)));
                let flying = (0..late.len()).filter(|at| !landed.contains(at));
                options.extend(flying.map(Choice::Lands));
            }
            let all_ended = standing.iter().all(Option::is_none);
            if all_ended {
                options = vec![Choice::End(Landing::Never)];
                if landed.len() < late.len() {
                    options.push(Choice::End(Landing::Before));
                    options.push(Choice::End(Landing::After));
                }
            }
            if depth == decisions.len() {
                decisions.push(Decision { options, taken: 0 });
            }
            let choice = decisions[depth].options[decisions[depth].taken];
            depth += 1;
            match choice {
                Choice::Go(process, fate) => {
                    let step = standing[process].as_ref();
                    let text = step.map_or_else(String::new, |step| step.text.clone());
                    trace.push(format!("{process}: {text} ({fate:?})"));
                    preemptions += u32::from(process != current && here.is_some());
                    faults += u32::from(fate != Fate::Works);
                    current = process;
                    stage.go(process, fate);
                }
                Choice::Lands(at) => {
                    preemptions += u32::from(here.is_some());
                    landed.push(at);
                    trace.push(format!("lands: {}", late[at].0));
                    self.land(&late[at]);
                }
                Choice::End(landing) => {
                    trace.push(format!("what is in flight lands: {landing:?}"));
                    return landing;
                }
            }
        }
    }

    fn land(&self, (name, data): &(crate::model::ObjectName, Vec<u8>)) {
        match self.overwrites {
            true => self.world.memory.plant(name, data),
            false => drop(self.world.memory.create(name, data)),
        }
    }

    /// Everyone else has ended or is dead. What is acknowledged and live restores; prunes, by the
    /// rules of the scenario, leave nothing that is not explained by all rules.
    fn judge(&self, stage: &Stage, told: &Told, landing: Landing) {
        let late = stage.late();
        let land_all = |when: Landing| {
            if landing == when {
                late.iter().for_each(|object| self.land(object));
            }
        };
        assert!(told.wrong.is_empty(), "{:?}", told.wrong);
        assert_eq!(stage.used_twice(), None, "a name was used twice");
        land_all(Landing::Before);
        self.all_is_there(told);
        for last in [false, true] {
            // Without aborts no session ever ends; everything else is as in the scenario.
            let rules = self.off.iter().copied();
            let rules: Vec<Rule> = rules.filter(|rule| *rule != Rule::AbortFirst).collect();
            let _off = Off::these(&rules);
            self.last_prune();
            if !last {
                land_all(Landing::After);
            }
        }
        self.all_is_there(told);
        let customer = self.world.open_second();
        let swept = sweep(&customer, false).unwrap();
        assert!(
            swept.unexplained.is_empty(),
            "unexplained: {:?}",
            swept.unexplained
        );
        assert!(swept.removed.is_empty(), "left behind: {:?}", swept.removed);
        self.world.nothing_dead_is_left(&customer);
    }

    fn all_is_there(&self, told: &Told) {
        // A commit that only this rule refuses is not void for those who go without it.
        let base = self.off.iter().copied();
        let base: Vec<Rule> = base.filter(|rule| *rule == Rule::LiveBase).collect();
        let _off = Off::these(&base);
        let customer = self.world.open_second();
        let state = customer.state();
        assert!(state.voids.is_empty(), "void entries: {:?}", state.voids);
        for point in &told.acknowledged {
            let known = state.points.contains_key(point);
            assert!(known, "{point} was acknowledged and is not in the ledger");
        }
        for (point, row) in &state.points {
            if row.state == PointState::Live {
                let found = restore(&customer, point);
                let found = found.unwrap_or_else(|error| panic!("{point} is lost: {error}"));
                let bytes = told.bytes.get(point).or(self.world.model.get(point));
                assert!(bytes == Some(&found), "{point} restores to other bytes");
            }
        }
        // Points that are expired, and can be brought back.
        if let Err(error) = reclaim::mark_now(&customer, false) {
            panic!("something that an undo needs is lost: {error}");
        }
    }

    fn last_prune(&self) {
        let now = self.world.now();
        self.world.open().abort_dead_sessions(now).unwrap();
        let customer = self.world.open_second();
        customer.abort_dead_sessions(now).unwrap();
        for point in customer
            .state()
            .points
            .iter()
            .filter_map(|(point, row)| (row.state == PointState::Erased).then_some(*point))
        {
            if super::super::super::rule::stands(Rule::LateWritesGo) {
                self.world
                    .memory
                    .delete(&customer.names().point(&point))
                    .unwrap();
            }
        }
        for _ in 0..2 {
            let done = reclaim::reclaim(&customer, now, DAY * 4000, false).unwrap();
            assert_eq!(
                done.withheld,
                [],
                "condemned, and still needed: exit 6 for ever"
            );
            customer.note_reclaimed(&done).unwrap();
            sweep(&customer, false).unwrap();
        }
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
