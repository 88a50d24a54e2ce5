//! The rules of the ledger that a test can switch off, one by one, to see that each is needed.
//!
//! In the shipped program there is no switch: [`stands`] is the constant `true`.

/// Named as in the counter-examples of `tests/explore`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// Nobody relies on what no entry has adopted, whatever a listing shows.
    Born,
    /// The base of an incremental is live when it commits.
    LiveBase,
    /// A reclaim that lost its slot to anything but a `begin` or an audit entry plans again.
    PlanAgain,
    /// Whoever deletes a condemned pack has found each live tag of it elsewhere.
    MarkBeforeDeleting,
    /// An uncertain creation is decided by filling the slot; absence proves nothing.
    FillTheSlot,
    /// Nothing of a session is removed before its `abort` stands.
    AbortFirst,
    /// A committer relies on no condemned pack.
    NothingCondemned,
    /// Nothing is adopted before the store has acknowledged all of it.
    Acknowledged,
    /// Every entry is checked again after each lost slot.
    CheckAgain,
    /// A condemnation needs its session open.
    OpenSession,
    /// Whoever removes something has listed it before reading the ledger to its end.
    ListFirst,
    /// A `begin` names the point that it may commit.
    BeginNamesPoint,
    /// Late writes of aborted sessions, condemned packs and erased points go at every sweep.
    LateWritesGo,
    /// What a closed session did not adopt goes.
    UnadoptedGoes,
    /// Where one host writes, a turn that may follow on something under way begins with a seal.
    SealFirst,
}

#[cfg(not(test))]
pub const fn stands(_: Rule) -> bool {
    true
}

#[cfg(test)]
pub use switch::{Off, stands};

#[cfg(test)]
mod switch {
    use super::Rule;
    use std::cell::RefCell;

    thread_local! {
        static OFF: RefCell<Vec<Rule>> = const { RefCell::new(Vec::new()) };
    }

    /// As long as this lives, its thread goes without some rules.
    pub struct Off(());

    impl Off {
        pub fn these(rules: &[Rule]) -> Self {
            OFF.with_borrow_mut(|off| *off = rules.to_vec());
            Off(())
        }
    }

    impl Drop for Off {
        fn drop(&mut self) {
            OFF.with_borrow_mut(Vec::clear);
        }
    }

    pub fn stands(rule: Rule) -> bool {
        OFF.with_borrow(|off| !off.contains(&rule))
    }
}
