//! Whether each object in the store is explained by the ledger, and removing what is not.

use super::RepositoryError;
use super::customer::Customer;
use super::index::Index;
use super::ledger::{Point, State};
use super::rule::{Rule, stands};
use super::sealed::LOAD_ATTEMPTS;
use crate::format::entry::Purpose;
use crate::format::names::ObjectRole;
use crate::model::{ObjectName, PackName, PointState, Writers};
use crate::storage::{
    Leftover, Listed, MAX_PROBE_BYTES, StorageError, StorageErrorKind, gone_or_locked,
};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Of what no prune removes.
const MOVE_IT_AWAY: &str = "move it away, as no prune removes it";

/// What the ledger says of one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Explained {
    /// It belongs here.
    Yes,
    /// A condemned pack that is not deleted yet: leaves only after its live tags were found
    /// elsewhere.
    Condemned,
    /// Nothing can ever commit it; the reason.
    No(&'static str),
    /// What a host that deletes nothing has left of a probe of its store. It goes, and nobody need hear
    /// of it.
    Spent,
}

/// What a sweep found.
#[derive(Debug, Clone, Default)]
pub struct Swept {
    /// Objects listed, of this customer; without spent probes.
    pub listed: u64,
    pub removed: Vec<(Listed, &'static str)>,
    pub leftovers_removed: Vec<Leftover>,
    /// What is in the store beside all customers, no listing shows it, and it was not removed: a
    /// living writer's temporary file, or what somebody put there. Whose it is cannot be told.
    pub leftovers: Vec<Leftover>,
    /// What is over and stays until its lock has ended.
    pub locked: Vec<Locked>,
    /// What is left and could not be explained or removed, each with what to do about it.
    pub unexplained: Vec<String>,
    /// Records that are gone and were perhaps not overwritten, and why.
    pub only_deleted: Vec<StorageError>,
    /// Records that must go and that the store refuses to remove, the first with its reason; all
    /// others were done.
    pub refused: Option<StorageError>,
}

impl Swept {
    fn note(
        &mut self,
        object: Listed,
        reason: &'static str,
        removed: Option<StorageError>,
        is_record: bool,
    ) {
        match removed {
            None => self.removed.push((object, reason)),
            Some(locked) => self.locked.push(Locked {
                object,
                reason,
                lock: locked.detail,
                is_record,
            }),
        }
    }
}

/// What became of a record that must go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordFate {
    Destroyed,
    /// Gone, but perhaps not overwritten, and why.
    OnlyDeleted(StorageError),
    /// It stays until its lock has ended.
    Locked(StorageError),
    /// It is still there, and why.
    Refused(StorageError),
}

impl Customer {
    /// Destroys a record. One that cannot be overwritten is deleted all the same: it is the key to all that only it
    /// reached, and under its name everybody finds it.
    ///
    /// One that is refused keeps no other from going. A full store is an error, which a reserve may help, and so is
    /// a store that is out of reach as a whole: then the ledger cannot be read either.
    pub fn destroy_record(&self, name: &ObjectName) -> Result<RecordFate, RepositoryError> {
        let refused = match gone_or_locked(self.storage().destroy(name)) {
            Ok(None) => return Ok(RecordFate::Destroyed),
            Ok(Some(locked)) => return Ok(RecordFate::Locked(locked)),
            Err(error) if error.kind == StorageErrorKind::Full => return Err(error.into()),
            Err(error) => error,
        };
        match gone_or_locked(self.storage().delete(name)) {
            Ok(None) => Ok(RecordFate::OnlyDeleted(refused)),
            Ok(Some(locked)) => Ok(RecordFate::Locked(locked)),
            Err(error) if error.kind == StorageErrorKind::Full => Err(error.into()),
            Err(_) => {
                self.refresh()?;
                Ok(RecordFate::Refused(refused))
            }
        }
    }
}

/// An object that the store lets nobody delete yet.
#[derive(Debug, Clone)]
pub struct Locked {
    pub object: Listed,
    /// Why it goes.
    pub reason: &'static str,
    /// Until when it stays.
    pub lock: String,
    /// It is the record of a point, which must not be there.
    pub is_record: bool,
}

/// Judges an object by the state of a ledger that was read to its end *after* the listing.
pub fn explain(role: &ObjectRole, state: &State, packs: &BTreeSet<PackName>) -> Explained {
    let yes_if = |holds: bool, otherwise| match holds {
        true => Explained::Yes,
        false => Explained::No(otherwise),
    };
    if leaves_it_be(role, state) {
        return Explained::Yes;
    }
    match role {
        ObjectRole::Ledger(seq) if state.writers == Writers::Many => explain_entry(*seq, state),
        // Also one that does not count: it says what a process wanted that died.
        ObjectRole::Rival(seq, _) if state.writers == Writers::One => explain_entry(*seq, state),
        ObjectRole::Ledger(_) | ObjectRole::Rival(..) => {
            Explained::No("an entry of another kind of ledger")
        }
        ObjectRole::Key(object) => yes_if(
            state.keys.iter().any(|row| row.object == *object)
                // A customer being made: its key is named in a moment.
                || state.keys.is_empty(),
            "a key file the ledger does not name",
        ),
        ObjectRole::Pack(pack) if state.open.contains_key(&pack.session) => Explained::Yes,
        ObjectRole::Pack(pack) => match state.condemned.get(pack) {
            Some(row) if !row.deleted => Explained::Condemned,
            Some(_) => Explained::No("a condemned pack that came back"),
            None => yes_if(packs.contains(pack), "a pack no session adopted"),
        },
        ObjectRole::Segment(segment) => yes_if(
            state.open.contains_key(&segment.session) || state.segments.contains_key(segment),
            "an index segment that is not current",
        ),
        ObjectRole::Point(point) => {
            let pending = stands(Rule::BeginNamesPoint)
                && state.open.values().any(|open| open.point == Some(*point));
            match state.points.get(point) {
                Some(row) if row.state != PointState::Erased => Explained::Yes,
                Some(_) => Explained::No("the record of an erased point"),
                None => yes_if(pending, "a point record no commit names"),
            }
        }
        ObjectRole::Certificate(file) => {
            let id = file
                .strip_suffix(".json")
                .or_else(|| file.strip_suffix(".json.minisig"));
            // One being written is named in a moment, by the entry that closes its session.
            let pending = || {
                state
                    .open
                    .values()
                    .any(|open| open.purpose == Purpose::Prove)
            };
            yes_if(
                id.is_some_and(|id| state.certificates.iter().any(|row| row.id == id)) || pending(),
                "a certificate the ledger does not name",
            )
        }
        // It carries nothing, and may be under way: removing it would make its store look unsound.
        ObjectRole::Probe => Explained::Yes,
        ObjectRole::SpentProbe => Explained::Spent,
        ObjectRole::Foreign => Explained::No("not an object of vmkeep"),
    }
}

fn explain_entry(seq: u64, state: &State) -> Explained {
    match (1..=state.seq).contains(&seq) {
        true => Explained::Yes,
        false => Explained::No("a ledger entry beyond the end"),
    }
}

/// What goes at every sweep, unless a rule is switched off.
fn leaves_it_be(role: &ObjectRole, state: &State) -> bool {
    let session = match role {
        ObjectRole::Pack(pack) => &pack.session,
        ObjectRole::Segment(segment) => &segment.session,
        ObjectRole::Point(point) => {
            let erased = |row: &Point| row.state == PointState::Erased;
            return !stands(Rule::LateWritesGo) && state.points.get(point).is_some_and(erased);
        }
        _ => return false,
    };
    (!stands(Rule::LateWritesGo) && state.aborted.contains(session))
        || (!stands(Rule::UnadoptedGoes) && state.born.contains_key(session))
}

/// Lists the customer's prefix, reads the ledger to its end, and removes what is not explained.
///
/// The order matters: what was listed before the ledger was read and is under no session of it
/// was uploaded without a `begin`, and can never be committed.
///
/// `remove_foreign`: also what vmkeep cannot have written. Unasked, such objects are only reported:
/// somebody put them there.
pub fn sweep(customer: &Customer, remove_foreign: bool) -> Result<Swept, RepositoryError> {
    let storage = customer.storage();
    let mut early = None;
    if !stands(Rule::ListFirst) {
        early = Some(customer.index_and_state()?);
    }
    customer.refresh()?;
    customer.settle()?;
    let prefix = customer.names().prefix();
    let leftovers_removed = storage.sweep_leftovers(prefix)?;
    let survey = storage.survey(prefix)?;
    let (index, state) = match early {
        None => settled_index_and_state(customer)?,
        Some(early) => early,
    };
    // What a later version wrote may explain what this one cannot.
    customer.may_write()?;
    let packs = born_packs(&index);
    let mut swept = Swept {
        listed: survey.objects.len() as u64,
        leftovers_removed,
        ..Swept::default()
    };
    let own = format!("{prefix}/");
    let mut spent = Vec::new();
    let mut over = Vec::new();
    for leftover in survey.leftovers {
        match leftover.place.starts_with(&own) {
            true => swept.unexplained.push(format!(
                "{} (cannot be an object): {MOVE_IT_AWAY}",
                leftover.place
            )),
            false => swept.leftovers.push(leftover),
        }
    }
    for object in survey.objects {
        let role = match customer.names().role(&object.name) {
            // Under a name that is never looked at anything could lie.
            ObjectRole::Probe | ObjectRole::SpentProbe if object.size_bytes > MAX_PROBE_BYTES => {
                ObjectRole::Foreign
            }
            ObjectRole::Rival(..) if state.writers == Writers::Many => ObjectRole::Foreign,
            role => role,
        };
        match explain(&role, &state, &packs) {
            Explained::Yes => {}
            Explained::Spent => {
                spent.push(object.name);
                swept.listed -= 1;
            }
            Explained::Condemned => match storage.locked_until(&object.name)? {
                Some(until) => swept.locked.push(Locked {
                    object,
                    reason: "condemned",
                    lock: format!("until {until}"),
                    is_record: false,
                }),
                None => swept
                    .unexplained
                    .push(format!("{} (condemned, not deleted yet)", object.name)),
            },
            Explained::No(reason) => match role {
                ObjectRole::Ledger(_) | ObjectRole::Rival(..) => swept.unexplained.push(format!(
                    "{} ({reason}): it is evidence; look what it is, then {MOVE_IT_AWAY}",
                    object.name
                )),
                // Its maker's entry may name it at any later moment, and no session says whether one is
                // still at it: removed, it would lock out whom it is for.
                ObjectRole::Key(_) => swept.unexplained.push(format!(
                    "{} ({reason}): if no init or key admit is under way, {MOVE_IT_AWAY}",
                    object.name
                )),
                ObjectRole::Foreign if !remove_foreign => swept.unexplained.push(format!(
                    "{} ({reason}): vmkeep prune --confirm --customer {} removes it",
                    object.name,
                    customer.name()
                )),
                ObjectRole::Point(_) => match customer.destroy_record(&object.name)? {
                    RecordFate::Destroyed => swept.note(object, reason, None, true),
                    RecordFate::OnlyDeleted(error) => {
                        swept.note(object, reason, None, true);
                        swept.only_deleted.push(error);
                    }
                    RecordFate::Locked(error) => swept.note(object, reason, Some(error), true),
                    RecordFate::Refused(error) => {
                        swept.refused.get_or_insert(error);
                    }
                },
                _ => over.push((object, reason)),
            },
        }
    }
    let names: Vec<ObjectName> = over.iter().map(|(object, _)| object.name.clone()).collect();
    let deleted = storage.delete_all(&names);
    for ((object, reason), deleted) in over.into_iter().zip(deleted) {
        swept.note(object, reason, gone_or_locked(deleted)?, false);
    }
    for deleted in storage.delete_all(&spent) {
        gone_or_locked(deleted)?;
    }
    Ok(swept)
}

/// As of an end that counts: what is not explained there is removed.
fn settled_index_and_state(
    customer: &Customer,
) -> Result<(Arc<Index>, Arc<State>), RepositoryError> {
    for _ in 0..LOAD_ATTEMPTS {
        let readings = customer.readings();
        let told = customer.index_and_state()?;
        customer.settle()?;
        if customer.readings() == readings {
            return Ok(told);
        }
    }
    Err(customer.index_changes_too_fast())
}

fn born_packs(index: &Index) -> BTreeSet<PackName> {
    index.packs().iter().map(|info| info.row.name).collect()
}
