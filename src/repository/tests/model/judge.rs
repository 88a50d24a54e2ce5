//! What must hold after each step, and when nothing moves any more.

use super::super::super::testing::*;
use super::super::super::*;
use super::reference::DAY;
use super::sequence::Sequence;
use crate::format::names::ObjectRole;
use crate::format::pack;
use crate::model::{PieceKind, PointId, PointState, Tag};
use crate::storage::Storage;
use jiff::Timestamp;
use std::collections::BTreeSet;

impl Sequence {
    /// The ledger says what the reference says; what is live restores, what is not does not.
    pub(super) fn check(&mut self) {
        let customer = self.world.open();
        let state = customer.state();
        assert!(state.voids.is_empty(), "{:?}", state.voids);
        self.reference.agrees_with(&state);
        let points: Vec<PointId> = self.reference.nights.keys().copied().collect();
        if points.is_empty() {
            return;
        }
        let one = points[self.pick(points.len())];
        self.restores_or_not(&customer, &one);
        if self.pick(4) == 0 && !self.damaged {
            no_false_certificate(&self.world, &customer);
        }
    }

    fn restores_or_not(&self, customer: &Customer, point: &PointId) {
        let night = &self.reference.nights[point];
        let live = night.fate == PointState::Live;
        match restore(customer, point) {
            Ok(found) => {
                assert!(live, "{point} is {:?} and restores", night.fate);
                assert!(found == night.bytes, "{point} restores to other bytes");
            }
            Err(error) => {
                assert!(!live || !night.sound, "{point} does not restore: {error}");
                assert!(error.is_damage() || !live, "{point}: {error}");
            }
        }
    }

    fn all_restore(&self, customer: &Customer) {
        customer.refresh().unwrap();
        for point in self.reference.nights.keys() {
            self.restores_or_not(customer, point);
        }
    }

    /// A prune may have been cut short, so what it decided is looked up; it may have decided only
    /// what the promises allow.
    pub(super) fn learn_what_a_prune_did(&mut self, now: Timestamp) {
        let customer = self.world.open();
        let state = customer.state();
        for (point, night) in &mut self.reference.nights {
            let found = match state.points.get(point) {
                Some(row) => row.state,
                None => PointState::Erased,
            };
            if found == night.fate {
                continue;
            }
            assert!(found > night.fate, "a prune brought {point} back");
            let (age, left) = (
                now.duration_since(night.taken_at),
                night.deadline.duration_since(now),
            );
            // The next night's prune may be too late: it ends within two days and a half.
            let last_chance = left < DAY * 5 / 2;
            if night.fate == PointState::Live {
                let over = age >= DAY * self.lengths.window || left <= DAY * self.lengths.budget;
                assert!(
                    over || last_chance,
                    "{point} was inside its window: {age}, {left}"
                );
            }
            night.fate = found;
        }
    }

    /// P3: after a prune nothing is listed past its expiry, and no byte is left past a deadline.
    pub(super) fn nothing_is_over_its_time(&self, now: Timestamp) {
        let customer = self.world.open();
        let state = customer.state();
        for (point, row) in &state.points {
            assert!(
                row.state != PointState::Live || row.expires_at > now,
                "{point} is listed past its expiry"
            );
            assert!(
                row.state == PointState::Erased || row.deadline > now,
                "{point} is kept past its deadline"
            );
            if row.state == PointState::Erased {
                let record = self.world.memory.size_bytes(&customer.names().point(point));
                assert!(
                    record.is_err(),
                    "the record of {point} is there after a prune"
                );
            }
        }
        let tags_of = |bytes: &[u8]| -> BTreeSet<Tag> {
            let keys = customer.keys();
            let tag = |plain: &[u8]| keys.tag(&keys.id(PieceKind::Chunk, plain));
            bytes.chunks(CHUNK).map(tag).collect()
        };
        let over: BTreeSet<Tag> = self
            .reference
            .nights
            .values()
            .filter(|night| night.fate == PointState::Erased && night.deadline <= now)
            .flat_map(|night| tags_of(&night.bytes))
            .collect();
        if over.is_empty() {
            return;
        }
        let others: BTreeSet<Tag> = self
            .reference
            .nights
            .values()
            .filter(|night| night.fate != PointState::Erased || night.deadline > now)
            .flat_map(|night| tags_of(&night.bytes))
            .collect();
        for name in self.world.packs() {
            // What a session uploads just now is not what the point left.
            let role = customer.names().role(&name);
            if let ObjectRole::Pack(pack) = role
                && state.open.contains_key(&pack.session)
            {
                continue;
            }
            let bytes = self.world.memory.read(&name, u64::MAX).unwrap();
            for entry in pack::directory_of(&bytes).unwrap() {
                assert!(
                    !over.contains(&entry.tag) || others.contains(&entry.tag),
                    "a byte is in the store past its deadline, in {name}"
                );
            }
        }
    }

    /// Everyone has ended. Nothing is left but what the ledger explains.
    pub(super) fn end(&mut self) {
        let honest = crate::format::entry::Attestation::Witnessed;
        for host in [&self.world.host, &self.world.second] {
            host.set_clock(jiff::SignedDuration::ZERO, honest);
        }
        let now = self.world.now();
        // Whose process is gone is known to each host itself.
        self.world.open().abort_dead_sessions(now).unwrap();
        let customer = self.world.open_second();
        customer.abort_dead_sessions(now).unwrap();
        if self.damaged {
            return self.end_after_damage(&customer);
        }
        self.world.quiesce(&customer);
        self.all_restore(&customer);
        self.all_restore(&self.world.open());
    }

    /// What the sources still have is whole again after a full; what nobody has is given up by
    /// force only, and then everything is explained again.
    fn end_after_damage(&mut self, customer: &Customer) {
        self.verify();
        self.full_of_each();
        self.all_restore(&self.world.open());
        for _ in 0..4 {
            let done = reclaim::reclaim(customer, self.world.now(), DAY * 4000, true).unwrap();
            customer.note_reclaimed(&done).unwrap();
            sweep(customer, false).unwrap();
        }
        let swept = sweep(customer, false).unwrap();
        assert_eq!(swept.unexplained, Vec::<String>::new());
        assert_eq!(swept.removed, []);
        self.all_restore(customer);
    }
}
