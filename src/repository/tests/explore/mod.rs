//! The real ledger code as an exhaustive small model: every schedule of two or three processes
//! within a number of preemptions and faults. With a rule switched off its counter-example is
//! found; with all rules on there is none in the same bounds.
//!
//! What has no switch, because the code has no other way: survivors of a reclaim are always copied,
//! never left to another pack's copy; a name holds its session and random bytes; a session uploads
//! only through its `Begun`.

mod explorer;
mod processes;
mod store;

use super::super::rule::Rule;
use super::super::testing::*;
use explorer::{Explored, Process, Scenario};
use processes::*;

/// More schedules than any scenario has within its bounds.
const MOST: u64 = 60_000;

/// A VM whose point shares a pack with a dead frame.
fn scenario(processes: Vec<(bool, Process)>) -> Scenario {
    let mut world = World::new();
    let customer = world.open();
    let dying = world.backup(&customer, "web", &image(&[1, 2, 3]), true);
    let subject = world.backup(&customer, "web", &image(&[1, 2]), false);
    world.erase(&customer, dying);
    world.model.remove(&dying);
    let snapshot = world.memory.snapshot();
    Scenario {
        world,
        snapshot,
        subject,
        processes,
        off: &[],
        overwrites: false,
        fine: false,
        preemptions: 1,
        faults: 0,
    }
}

impl Scenario {
    fn preempted(self, preemptions: u32) -> Self {
        Scenario {
            preemptions,
            ..self
        }
    }

    fn faulty(self) -> Self {
        Scenario { faults: 1, ..self }
    }

    fn holds(&self) -> Explored {
        let found = self.explore(MOST);
        assert_eq!(found.counter_example, None, "{} schedules", found.schedules);
        assert!(found.complete, "more than {MOST} schedules");
        println!("all rules: {} schedules", found.schedules);
        found
    }

    /// Without `rules` the promise `broken` breaks; with all of them nothing does.
    fn needs(mut self, rules: &'static [Rule], broken: &[&str]) {
        self.holds();
        self.off = rules;
        self.breaks(broken);
    }

    fn breaks(&self, broken: &[&str]) {
        let found = self.explore(MOST);
        let example = found.counter_example.unwrap_or_else(|| {
            panic!(
                "nothing breaks without {:?}, in {} schedules",
                self.off, found.schedules
            )
        });
        println!(
            "without {:?}, schedule {}: {example}",
            self.off, found.schedules
        );
        assert!(
            broken.iter().any(|text| example.contains(text)),
            "another promise broke: {example}"
        );
    }
}

const LOST: &[&str] = &["is lost", "an undo needs is lost"];
const VOID: &[&str] = &["void entries"];
const LEFT: &[&str] = &["left behind", "unexplained"];

#[test]
fn without_born_a_full_relies_on_what_a_dead_session_uploaded() {
    scenario(vec![(false, full_of_new), (true, full_of_the_same)])
        .faulty()
        .needs(&[Rule::Born], LOST);
}

#[test]
fn without_a_live_base_an_incremental_commits_on_what_a_prune_took() {
    scenario(vec![(false, incremental), (true, erase_and_reclaim)]).needs(&[Rule::LiveBase], LOST);
}

#[test]
fn without_planning_again_a_commit_between_mark_and_condemn_is_lost() {
    scenario(vec![(false, full_that_shares), (true, erase_and_reclaim)])
        .preempted(2)
        .needs(&[Rule::PlanAgain, Rule::MarkBeforeDeleting], LOST);
}

#[test]
fn without_a_mark_before_deleting_another_ones_wrong_condemnation_destroys() {
    scenario(vec![(false, condemn_wrongly), (true, prune)])
        .needs(&[Rule::MarkBeforeDeleting], LOST);
}

#[test]
fn without_filling_the_slot_a_commit_lands_after_its_objects_were_removed() {
    scenario(vec![(false, full_of_new)])
        .faulty()
        .needs(&[Rule::FillTheSlot, Rule::AbortFirst], LOST);
}

#[test]
fn without_filling_the_slot_a_condemnation_lands_after_its_survivors_were_removed() {
    scenario(vec![(false, prune)]).faulty().needs(
        &[
            Rule::FillTheSlot,
            Rule::AbortFirst,
            Rule::MarkBeforeDeleting,
        ],
        LOST,
    );
}

#[test]
fn without_the_abort_first_a_cleaner_empties_a_session_that_commits() {
    scenario(vec![(false, full_of_new), (true, abort_all)]).needs(&[Rule::AbortFirst], LOST);
}

#[test]
fn without_asking_for_condemned_packs_a_full_commits_on_one() {
    scenario(vec![(false, full_that_shares), (true, erase_and_reclaim)])
        .needs(&[Rule::NothingCondemned], LOST);
}

#[test]
fn without_acknowledged_uploads_a_commit_stands_on_what_is_in_flight() {
    scenario(vec![(false, full_of_new)])
        .faulty()
        .needs(&[Rule::Acknowledged], LOST);
}

#[test]
fn without_acknowledged_uploads_a_condemnation_loses_its_survivors() {
    scenario(vec![(false, prune)]).faulty().needs(
        &[Rule::Acknowledged],
        &["lost", "damage", "NotFound", "no such object"],
    );
}

#[test]
fn without_acknowledged_uploads_a_merge_loses_its_segment() {
    scenario(vec![(false, reclaim_and_merge)]).faulty().needs(
        &[Rule::Acknowledged],
        &["lost", "damage", "NotFound", "no such object"],
    );
}

#[test]
fn without_checking_again_a_commit_follows_its_sessions_abort() {
    scenario(vec![(false, full_of_new), (true, abort_all)]).needs(&[Rule::CheckAgain], VOID);
}

#[test]
fn without_checking_again_a_commit_follows_its_bases_expiry() {
    scenario(vec![(false, incremental), (true, expire)]).needs(&[Rule::CheckAgain], VOID);
}

#[test]
fn without_checking_again_an_abort_follows_the_commit() {
    scenario(vec![(true, abort_all), (false, full_of_new)])
        .preempted(2)
        .needs(&[Rule::CheckAgain], VOID);
}

#[test]
fn without_checking_again_an_erasure_follows_the_undo() {
    scenario(vec![(false, expire_and_erase), (true, undo)]).needs(&[Rule::CheckAgain], VOID);
}

#[test]
fn without_an_open_session_a_condemnation_follows_its_abort() {
    scenario(vec![(false, prune), (true, abort_all)])
        .needs(&[Rule::OpenSession], &["void entries", "is lost"]);
}

#[test]
fn without_listing_first_a_sweep_removes_what_was_committed_meanwhile() {
    scenario(vec![(true, sweep_only), (false, full_of_new)]).needs(&[Rule::ListFirst], LOST);
}

#[test]
fn without_the_point_in_the_begin_a_sweep_removes_the_record_of_a_commit() {
    scenario(vec![(false, full_of_new), (true, sweep_only)]).needs(&[Rule::BeginNamesPoint], LOST);
}

#[test]
fn without_removing_late_writes_those_of_an_aborted_session_stay() {
    scenario(vec![(false, give_up)])
        .faulty()
        .needs(&[Rule::LateWritesGo], LEFT);
}

#[test]
fn without_removing_late_writes_the_record_of_an_erased_point_comes_back() {
    scenario(vec![(false, full_and_erase)])
        .faulty()
        .needs(&[Rule::LateWritesGo], LEFT);
}

#[test]
fn without_removing_what_is_not_adopted_it_stays_under_a_closed_session() {
    scenario(vec![(false, full_and_a_stray)]).needs(&[Rule::UnadoptedGoes], LEFT);
}

#[test]
fn a_store_that_replaces_what_is_there_loses_an_entry() {
    let mut scenario = scenario(vec![(false, full_of_new), (true, full_of_the_same)]);
    scenario.holds();
    scenario.overwrites = true;
    scenario.breaks(&[
        "damage",
        "chain",
        "acknowledged",
        "forked",
        "twice",
        "is lost",
        "follow",
    ]);
}

#[test]
fn a_record_deleted_before_its_erase_entry_is_missing_after_an_undo() {
    scenario(vec![(false, expire_and_erase), (true, undo)]).holds();
    scenario(vec![(false, record_first), (true, undo)]).breaks(LOST);
}

#[test]
fn all_rules_hold_for_a_writer_an_eraser_and_a_cleaner() {
    scenario(vec![
        (false, incremental),
        (true, erase_and_reclaim),
        (false, abort_all),
    ])
    .holds();
}

#[test]
fn all_rules_hold_for_two_reclaimers_with_a_fault() {
    scenario(vec![(false, prune), (true, prune)])
        .faulty()
        .holds();
}

#[test]
fn all_rules_hold_for_a_writer_and_an_eraser_with_a_fault() {
    scenario(vec![(false, full_that_shares), (true, erase_and_reclaim)])
        .faulty()
        .holds();
}

#[test]
fn all_rules_hold_for_a_merge_beside_a_writer_and_for_a_reader_beside_a_prune() {
    scenario(vec![(false, reclaim_and_merge), (true, full_that_shares)]).holds();
    let mut reader = scenario(vec![(false, read), (true, prune)]);
    reader.fine = true;
    reader.holds();
}
