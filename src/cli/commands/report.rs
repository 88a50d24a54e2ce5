//! Lines and documents that several commands share.

use crate::cli::alarms::confirm_command;
use crate::cli::exit::Failure;
use crate::cli::figures;
use crate::format::entry::AuditBody;
use crate::jobs::{BackedUp, Pruned, Verified};
use crate::model::{CustomerName, VmName};
use crate::policy::{Action, Decision};
use serde_json::{Value, json};
use std::fmt::Write;

pub fn backed_up_line(name: &str, done: &BackedUp) -> String {
    let mut text = format!(
        "{name}: {} {}, {} read, {} stored, {}\n",
        done.kind,
        short(&done.point.to_string()),
        figures::bytes(done.read_bytes),
        figures::bytes(done.stored_bytes),
        figures::seconds(done.seconds)
    );
    for note in &done.notes {
        let _ = writeln!(text, "  {note}");
    }
    text
}

/// What was done, and why so, for the log.
pub fn log_backed_up(name: &str, done: &BackedUp) {
    let line = backed_up_line(name, done);
    tracing::info!("{}", line.lines().next().unwrap_or_default());
    for note in &done.notes {
        tracing::debug!("{name}: {note}");
    }
}

pub fn backed_up_document(customer: &CustomerName, vm: &VmName, done: &BackedUp) -> Value {
    json!({
        "customer": customer.as_str(),
        "vm": vm.as_str(),
        "id": done.point.to_string(),
        "kind": done.kind.to_string(),
        "taken_at": done.taken_at.to_string(),
        "expires_at": done.expires_at.to_string(),
        "deadline": done.deadline.to_string(),
        "read_bytes": done.read_bytes,
        "stored_bytes": done.stored_bytes,
        "disks_bytes": done.disks_bytes,
        "seconds": done.seconds,
        "notes": done.notes,
        "audit": done.audit.as_ref().map(audit_document),
    })
}

/// Whether a full found that the tracking of changes had hidden some.
pub fn is_alarming(done: &BackedUp) -> bool {
    done.audit.as_ref().is_some_and(differs)
}

fn differs(audit: &AuditBody) -> bool {
    audit.disks.iter().any(|disk| disk.differing_bytes > 0)
}

/// What a full found of the tracking of changes.
fn audit_document(audit: &AuditBody) -> Value {
    json!({
        "result": match differs(audit) {
            true => "differs",
            false => "clean",
        },
        "against": audit.against.to_string(),
        "disks": audit.disks.iter().map(|disk| json!({
            "name": disk.name.as_str(),
            "differing_bytes": disk.differing_bytes,
        })).collect::<Vec<_>>(),
    })
}

pub fn pruned_text(customer: &CustomerName, pruned: &Pruned, location: &str) -> String {
    let idle = pruned.expired.is_empty()
        && pruned.erased.is_empty()
        && pruned.reclaimed.removed.is_empty();
    let mut text = match idle {
        true => format!("{customer}: nothing to prune\n"),
        false => format!(
            "{customer}: {} expired, {} erased, {} freed, {} rewritten\n",
            figures::count(pruned.expired.len(), "point", "points"),
            pruned.erased.len(),
            figures::bytes(pruned.reclaimed.freed_bytes),
            figures::bytes(pruned.reclaimed.rewritten_bytes),
        ),
    };
    if pruned.aborted_sessions > 0 {
        let _ = writeln!(
            text,
            "  {} of processes that are gone: ended and cleaned up",
            figures::count(pruned.aborted_sessions, "session", "sessions")
        );
    }
    for (object, reason) in &pruned.swept.removed {
        let _ = writeln!(text, "  removed {} ({reason})", object.name);
    }
    for leftover in &pruned.swept.leftovers_removed {
        let _ = writeln!(text, "  removed {} (left by a dead writer)", leftover.place);
    }
    if let Some(certificate) = &pruned.certificate {
        let _ = writeln!(
            text,
            "  certificate {} ({} erased, {} destroyed without a trace); check it with:\n  \
             minisign -V -P {} \\\n    -m {location}/{}",
            certificate.id,
            certificate.erased,
            certificate.destroyed,
            certificate.public_key,
            certificate.object,
        );
    }
    for note in &pruned.notes {
        let _ = writeln!(text, "  {note}");
    }
    if let Some(damage) = &pruned.damage {
        let _ = writeln!(
            text,
            "  damage: {damage}\n  nothing was reclaimed, so that nothing more is lost; \
             vmkeep backup --full heals,\n  {} goes on without what cannot be read",
            confirm_command(customer)
        );
    }
    for damage in &pruned.unreadable {
        let _ = writeln!(text, "  damage: {damage}");
    }
    if !pruned.unreadable.is_empty() {
        let _ = writeln!(
            text,
            "  what was due was reclaimed all the same; vmkeep backup --full heals what the source still has"
        );
    }
    if let Some(refused) = &pruned.swept.refused {
        let _ = writeln!(
            text,
            "  a record that must go could not be removed: {refused}"
        );
    }
    text
}

/// What was done, and why each point went, for the log.
pub fn log_pruned(customer: &CustomerName, pruned: &Pruned) {
    for decision in pruned.decisions.iter().filter(|one| goes(one)) {
        tracing::debug!(
            "{customer}/{} of {}: {}: {}",
            decision.vm,
            decision.taken_at,
            action_word(decision.action),
            decision.reason
        );
    }
    tracing::info!(
        "{customer}: {} expired, {} erased, {} freed",
        figures::count(pruned.expired.len(), "point", "points"),
        pruned.erased.len(),
        figures::bytes(pruned.reclaimed.freed_bytes)
    );
}

/// Of a plan what does not stay as it is.
pub fn plan_documents(decisions: &[Decision]) -> Vec<Value> {
    let going = decisions.iter().filter(|one| goes(one));
    going.map(decision_document).collect()
}

fn goes(decision: &Decision) -> bool {
    matches!(decision.action, Action::Expire | Action::Erase)
}

pub fn pruned_document(customer: &CustomerName, pruned: &Pruned) -> Value {
    json!({
        "customer": customer.as_str(),
        "points": pruned.decisions.iter().map(decision_document).collect::<Vec<_>>(),
        "expired": pruned.expired.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "erased": pruned.erased.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "aborted_sessions": pruned.aborted_sessions,
        "freed_bytes": pruned.reclaimed.freed_bytes,
        "rewritten_bytes": pruned.reclaimed.rewritten_bytes,
        "dead_bytes": pruned.reclaimed.marks.iter().map(|mark| mark.dead_bytes).sum::<u64>(),
        "removed": pruned.swept.removed.iter().map(|(object, reason)| json!({
            "name": object.name.as_str(), "reason": reason,
        })).collect::<Vec<_>>(),
        "unexplained": pruned.swept.unexplained,
        "leftovers": pruned.swept.leftovers.iter().map(|leftover| leftover.place.as_str())
            .collect::<Vec<_>>(),
        "certificate": pruned.certificate.as_ref().map(|certificate| json!({
            "id": certificate.id,
            "object": certificate.object.as_str(),
            "signature": certificate.signature.as_str(),
            "minisign_public_key": certificate.public_key,
            "erased": certificate.erased,
            "destroyed": certificate.destroyed,
        })),
        "damage": pruned.damage.as_ref().map(ToString::to_string)
            .or_else(|| pruned.unreadable.first().cloned()),
        "unreadable": pruned.unreadable,
        "refused": pruned.swept.refused.as_ref().map(ToString::to_string),
        "notes": pruned.notes,
    })
}

pub fn decision_document(decision: &Decision) -> Value {
    json!({
        "id": decision.point.to_string(),
        "vm": decision.vm.as_str(),
        "taken_at": decision.taken_at.to_string(),
        "action": action_word(decision.action),
        "reason": decision.reason.to_string(),
    })
}

pub fn action_word(action: Action) -> &'static str {
    match action {
        Action::Keep => "keep",
        Action::Expire => "expire",
        Action::AwaitErase { .. } => "wait",
        Action::Erase => "erase",
    }
}

pub fn verified_text(customer: &CustomerName, verified: &Verified) -> String {
    let mut text = format!(
        "{customer}: {} ledger entries, {}, {}; {} read ({})\n",
        verified.entries,
        figures::count(verified.points, "point", "points"),
        figures::count(verified.packs, "pack", "packs"),
        figures::count(verified.packs_read, "pack", "packs"),
        figures::bytes(verified.read_bytes),
    );
    for note in verified.notes.iter().chain(&verified.certificates) {
        let _ = writeln!(text, "  {note}");
    }
    for damage in &verified.damage {
        let _ = writeln!(text, "  damage: {damage}");
    }
    for unread in &verified.unread {
        let _ = writeln!(text, "  unread: {unread}");
    }
    if let Some(failure) = &verified.failure {
        let _ = writeln!(text, "  {failure}");
    }
    text
}

pub fn verified_document(customer: &CustomerName, verified: &Verified) -> Value {
    json!({
        "customer": customer.as_str(),
        "ledger_entries": verified.entries,
        "points": verified.points,
        "packs": verified.packs,
        "packs_read": verified.packs_read,
        "read_bytes": verified.read_bytes,
        "damage": verified.damage,
        "unread": verified.unread,
        "notes": verified.notes.iter().chain(&verified.certificates).collect::<Vec<_>>(),
        "error": verified.incomplete().map(|error| Failure::from(error).document()["error"].clone()),
    })
}

/// Enough of an id to name it.
pub fn short(id: &str) -> String {
    id.chars().take(8).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::commands::prune::verdict;
    use crate::cli::exit::Exit;
    use crate::model::PointId;
    use crate::policy::Reason;
    use crate::storage::{StorageError, StorageErrorKind};
    use jiff::Timestamp;

    #[test]
    fn what_a_prune_went_on_over_or_could_not_remove_is_told_and_no_success() {
        let customer = CustomerName::new("acme").expect("a name");
        let mut pruned = Pruned::default();
        assert!(verdict(&pruned).is_none());
        let denied = StorageError::new(StorageErrorKind::Denied, "points/one", "a test");
        pruned.swept.refused = Some(denied);
        let failure = verdict(&pruned).expect("a failure");
        assert!(
            failure.message.contains("points/one"),
            "{}",
            failure.message
        );
        assert!(pruned_text(&customer, &pruned, "here").contains("points/one"));
        let document = pruned_document(&customer, &pruned);
        assert!(
            document["refused"]
                .as_str()
                .expect("a text")
                .contains("points/one")
        );
        for point in ["restore point aa", "restore point bb"] {
            pruned.unreadable.push(format!("{point} (web): damaged"));
            let failure = verdict(&pruned).expect("a failure");
            assert_eq!(failure.exit, Exit::DamageFound);
            assert!(failure.message.contains("point aa"), "{}", failure.message);
            assert!(pruned_text(&customer, &pruned, "here").contains(point));
        }
        let document = pruned_document(&customer, &pruned);
        assert_eq!(document["unreadable"].as_array().map(Vec::len), Some(2));
        assert_eq!(document["damage"], "restore point aa (web): damaged");
    }

    #[test]
    fn a_decision_says_of_which_point_it_is() {
        let decision = Decision {
            point: PointId::from_bytes([0xab; PointId::BYTES]),
            vm: VmName::new("web01").expect("a name"),
            taken_at: Timestamp::UNIX_EPOCH,
            action: Action::Keep,
            reason: Reason::ClockWasAlone,
        };
        let document = decision_document(&decision);
        assert_eq!(document["id"], "ab".repeat(PointId::BYTES));
        assert_eq!(document["vm"], "web01");
        assert_eq!(document["taken_at"], "1970-01-01T00:00:00Z");
        assert_eq!(document["action"], "keep");
    }
}
