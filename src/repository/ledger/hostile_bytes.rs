//! Fuzz target of what a host keeps of a ledger: behind its hash, for what a faulty program wrote.

use super::State;

pub fn checkpoint(bytes: &[u8]) {
    let Some(state) = State::from_checkpoint(bytes) else {
        return;
    };
    let written = state.to_checkpoint().expect("what was read can be written");
    assert!(State::from_checkpoint(&written).as_ref() == Some(&state));
    // What is asked of a state holds for any.
    for (id, point) in &state.points {
        point.facts(id);
    }
    for pack in state.condemned.keys() {
        state.may_forget(pack);
        state.verified_at(pack);
    }
    for (session, open) in &state.open {
        state.running_since(open);
        state.copied_erasures_until(session, u64::MAX);
    }
    state.destroyed();
    state.unmarked_erasures();
    state.has_unmarked_copies(u64::MAX);
}
