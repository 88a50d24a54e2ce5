//! What to do with each pack: pure.

use super::super::index::PackNumber;
use crate::model::PackName;
use jiff::{SignedDuration, Timestamp};

/// Prunes run once a night, at any time of a window of up to a day: what the next one may reach
/// only after its deadline is done now.
const NEXT_PRUNE_ENDS_WITHIN: SignedDuration = SignedDuration::from_hours(50);

/// What decides over a pack. `dead_bytes` counts frames only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackFacts {
    pub number: PackNumber,
    pub name: PackName,
    pub size_bytes: u64,
    pub frame_bytes: u64,
    pub live_bytes: u64,
    pub live_frames: u64,
    pub earliest_deadline: Option<Timestamp>,
    pub born_at: Option<Timestamp>,
    /// Condemned before, and still holding something that is live nowhere else.
    pub rescue: bool,
}

impl PackFacts {
    pub fn dead_bytes(&self) -> u64 {
        self.frame_bytes.saturating_sub(self.live_bytes)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackAction {
    Keep,
    /// Nothing in it is live: it goes whole.
    Remove,
    /// Its live frames are written into new packs, then it goes.
    Rewrite,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PackReason {
    NothingDead,
    NothingLive,
    HalfDead,
    DeadlineNear { deadline: Timestamp },
    CanWait { deadline: Option<Timestamp> },
    Rescue,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackDecision {
    pub facts: PackFacts,
    pub action: PackAction,
    pub reason: PackReason,
}

/// What to do with each pack. `budget`: the policy's erase budget.
///
/// A pack is rewritten when half of it is dead, or when the earliest deadline in it is nearer than
/// a quarter of the budget (and never less than the next prune away); then it loses all its dead
/// frames, so each live byte moves about once a budget.
pub fn plan(packs: &[PackFacts], now: Timestamp, budget: SignedDuration) -> Vec<PackDecision> {
    let margin = (budget / 4).max(NEXT_PRUNE_ENDS_WITHIN);
    packs
        .iter()
        .map(|facts| {
            let dead = facts.dead_bytes();
            let near = facts
                .earliest_deadline
                .filter(|deadline| deadline.duration_since(now) <= margin);
            let (action, reason) = match () {
                () if facts.rescue => (PackAction::Rewrite, PackReason::Rescue),
                () if facts.live_frames == 0 => (PackAction::Remove, PackReason::NothingLive),
                () if dead == 0 => (PackAction::Keep, PackReason::NothingDead),
                () if dead >= facts.live_bytes => (PackAction::Rewrite, PackReason::HalfDead),
                () => match near {
                    Some(deadline) => (PackAction::Rewrite, PackReason::DeadlineNear { deadline }),
                    None => {
                        let deadline = facts.earliest_deadline;
                        (PackAction::Keep, PackReason::CanWait { deadline })
                    }
                },
            };
            PackDecision {
                facts: *facts,
                action,
                reason,
            }
        })
        .collect()
}

/// The packs of the next session: all that go whole before any that is rewritten, because what
/// they free serves the rewriting on a full store; then at most `most_bytes` of packs to rewrite.
/// Old with old: what has lived long tends to live on, and young packs tend to die whole.
pub(super) fn next_batch(decisions: &[PackDecision], most_bytes: u64) -> Vec<PackDecision> {
    let chosen = |action: PackAction| {
        let mut chosen: Vec<PackDecision> = decisions
            .iter()
            .filter(|decision| decision.action == action)
            .copied()
            .collect();
        chosen.sort_by_key(|decision| (decision.facts.born_at, decision.facts.name));
        chosen
    };
    let mut whole = chosen(PackAction::Remove);
    if !whole.is_empty() {
        whole.truncate(MAX_CONDEMNED);
        return whole;
    }
    let mut sum = 0u64;
    let mut rewrite = chosen(PackAction::Rewrite);
    let fits = rewrite
        .iter()
        .take_while(|decision| {
            let first = sum == 0;
            sum = sum.saturating_add(decision.facts.size_bytes);
            first || sum <= most_bytes
        })
        .count();
    rewrite.truncate(fits.min(MAX_CONDEMNED));
    rewrite
}

/// A condemnation names at most so many packs; a larger one is several sessions.
const MAX_CONDEMNED: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ObjectHash, SessionId};

    const DAY: SignedDuration = SignedDuration::from_hours(24);

    fn now() -> Timestamp {
        "2026-11-21T03:00:00Z".parse().unwrap()
    }

    fn facts(frame_bytes: u64, live_bytes: u64, deadline_in: SignedDuration) -> PackFacts {
        PackFacts {
            number: 0,
            name: PackName {
                session: SessionId::from_bytes([0; 16]),
                hash: ObjectHash::from_bytes([0; 32]),
            },
            size_bytes: frame_bytes,
            frame_bytes,
            live_bytes,
            live_frames: live_bytes / 10,
            earliest_deadline: Some(now() + deadline_in),
            born_at: None,
            rescue: false,
        }
    }

    fn decide(facts: PackFacts, budget: SignedDuration) -> PackAction {
        plan(&[facts], now(), budget)[0].action
    }

    #[test]
    fn a_pack_is_rewritten_for_half_its_bytes_or_for_its_deadline_and_else_waits() {
        let decide = |frame, live, days| decide(facts(frame, live, DAY * days), DAY * 20);
        assert_eq!(decide(1000, 0, 20), PackAction::Remove);
        assert_eq!(decide(1000, 1000, 20), PackAction::Keep);
        assert_eq!(decide(1000, 500, 20), PackAction::Rewrite);
        assert_eq!(decide(1000, 990, 20), PackAction::Keep);
        assert_eq!(decide(1000, 990, 6), PackAction::Keep);
        assert_eq!(decide(1000, 990, 5), PackAction::Rewrite);
        assert_eq!(decide(1000, 990, -1), PackAction::Rewrite);
        assert_eq!(decide(1000, 1000, -1), PackAction::Keep);
    }

    #[test]
    fn what_is_to_be_rescued_is_rewritten_although_nothing_in_it_is_dead() {
        let rescued = PackFacts {
            rescue: true,
            ..facts(1000, 1000, DAY * 20)
        };
        assert_eq!(decide(rescued, DAY * 20), PackAction::Rewrite);
    }

    #[test]
    fn what_the_next_night_may_reach_too_late_is_rewritten_tonight_even_on_a_budget_of_one_day() {
        // Tonight's prune runs at once, the next one may end 34 hours from now.
        for hours in [1, 24, 25, 34, 47] {
            let facts = facts(1000, 990, SignedDuration::from_hours(hours));
            assert_eq!(decide(facts, DAY), PackAction::Rewrite, "{hours} h");
        }
    }

    #[test]
    fn a_batch_takes_what_goes_whole_first_and_then_old_packs_up_to_its_limit() {
        let pack = |number: u8, live: u64, born: i64| {
            let mut facts = facts(1000, live, -DAY);
            facts.name.hash = ObjectHash::from_bytes([number; 32]);
            facts.born_at = Some(now() - DAY * born as i32);
            facts
        };
        let packs = [
            pack(9, 400, 1),
            pack(1, 0, 1),
            pack(2, 400, 3),
            pack(3, 400, 2),
        ];
        let decisions = plan(&packs, now(), DAY * 20);
        let numbers = |batch: Vec<PackDecision>| -> Vec<u8> {
            let hash = |decision: &PackDecision| decision.facts.name.hash.as_bytes()[0];
            batch.iter().map(hash).collect()
        };
        assert_eq!(numbers(next_batch(&decisions, 2000)), [1]);
        let rest: Vec<PackDecision> = decisions
            .into_iter()
            .filter(|decision| decision.action == PackAction::Rewrite)
            .collect();
        assert_eq!(numbers(next_batch(&rest, 2000)), [2, 3]);
        // One that is larger than the limit must go all the same.
        assert_eq!(numbers(next_batch(&rest, 10)), [2]);
    }
}
