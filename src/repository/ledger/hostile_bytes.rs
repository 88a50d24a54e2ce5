//! Fuzz target of what a host keeps of a ledger: behind its hash, for what a faulty program wrote.

use super::State;

pub fn checkpoint(bytes: &[u8]) {
    let Some(state) = State::from_checkpoint(bytes) else {
        return;
    };
    let written = state.to_checkpoint().expect("what was read can be written");
    assert!(State::from_checkpoint(&written).as_ref() == Some(&state));
    // What is asked of a state holds for any.
    assert_eq!(state.facts().count(), state.points.len());
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::testing::{World, image};
    use std::fs;
    use std::path::Path;

    fn states() -> Vec<(&'static str, State)> {
        let mut world = World::new();
        let customer = world.open();
        let state = || State::clone(&customer.state());
        let mut states = vec![("empty", state())];
        let first = world.backup(&customer, "web", &image(&[1, 2, 3]), true);
        world.backup(&customer, "db", &image(&[4]), true);
        world.backup(&customer, "web", &image(&[1, 5, 3]), false);
        states.push(("points", state()));
        world.erase(&customer, first);
        states.push(("erased", state()));
        world.prune(&customer).unwrap();
        states.push(("reclaimed", state()));
        states
    }

    /// A corpus of what no version reads any more teaches a fuzzer nothing. After a change of the state:
    /// `VMKEEP_WRITE_CORPUS=1`.
    #[test]
    fn the_corpus_of_checkpoints_is_of_this_version() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus/checkpoint");
        for (name, state) in states() {
            let file = folder.join(name);
            if std::env::var_os("VMKEEP_WRITE_CORPUS").is_some() {
                fs::write(&file, state.to_checkpoint().unwrap()).unwrap();
            }
            let kept = fs::read(&file).unwrap();
            assert!(State::from_checkpoint(&kept).is_some(), "{name}");
        }
    }
}
