//! Asks a store whether "create if absent" is true there, instead of believing its documentation.
//!
//! Several servers and network file systems accept the condition and ignore it, or let several of
//! many racing writers win. The ledger's order of entries rests on exactly one winner.
//!
//! Who may delete probes with new objects and removes them. Who may not ([`probe_without_deleting`])
//! must ask just as often and leaves little: one object for good, `probe/standing`, which the first such
//! host creates and which each later one tries to create again, with other bytes. Nothing rests on it,
//! so that a server which ignores the condition harms nothing (it would, were an object in use tried
//! with), and no other host's deletion can make a sound store look unsound in between. It is too old
//! to tell the store's time; where the store has a clock, a second object, `probe/spent/…`, is made for
//! that. It is spent as soon as it was looked at, so whoever sweeps may delete it at any moment: there are
//! never more than such hosts have opened the store since the last sweep.

use super::{Storage, StorageError, StorageErrorKind, random_hex};
use crate::model::ObjectName;
use jiff::Timestamp;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// What a store was seen to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Probe {
    /// Every race had one winner and nothing was overwritten.
    Sound,
    /// The store must not be shared by several writers.
    Unsound { what: String },
}

/// A writer whose reply is lost asks again this often before the probe gives up.
const ATTEMPTS: u32 = 8;
/// Probe objects are this small; anything larger under their name is not ours.
pub const MAX_PROBE_BYTES: u64 = 1024;

/// Creates one object twice, then lets `writers` threads race for a name, `rounds` times, all below
/// `<prefix>/probe/`. Removes what it created. `rounds` of 0 leaves the sequential part only.
pub fn probe(
    store: &dyn Storage,
    prefix: &str,
    rounds: u32,
    writers: u32,
) -> Result<Probe, StorageError> {
    Ok(probe_and_time(store, prefix, rounds, writers)?.0)
}

/// As [`probe`], with the time that the store gave its first object: its own time, just now, if it has a
/// clock of its own.
pub fn probe_and_time(
    store: &dyn Storage,
    prefix: &str,
    rounds: u32,
    writers: u32,
) -> Result<(Probe, Option<Timestamp>), StorageError> {
    let mut time = None;
    let verdict = with_probe_object(store, prefix, |name| {
        let verdict = twice(store, name)?;
        time = store.created_at(name)?;
        Ok(verdict)
    })?;
    if verdict != Probe::Sound {
        return Ok((verdict, time));
    }
    for _ in 0..rounds {
        let verdict = with_probe_object(store, prefix, |name| race(store, name, writers))?;
        if let Probe::Unsound { .. } = verdict {
            return Ok((verdict, time));
        }
    }
    Ok((Probe::Sound, time))
}

/// The store's own time, just now, of an object that it creates for that. Shows also that this host may
/// write and delete there.
pub fn time_of(store: &dyn Storage, prefix: &str) -> Result<Option<Timestamp>, StorageError> {
    let mut time = None;
    with_probe_object(store, prefix, |name| {
        store.create(name, b"")?;
        time = store.created_at(name)?;
        Ok(Probe::Sound)
    })?;
    Ok(time)
}

/// As [`probe_and_time`] in sequence only, for a host that deletes nothing.
pub fn probe_without_deleting(
    store: &dyn Storage,
    prefix: &str,
) -> Result<(Probe, Option<Timestamp>), StorageError> {
    let standing = probe_name(prefix, "standing")?;
    let verdict = again(store, &standing)?;
    // Asked of any object, this tells whether the store has a clock of its own.
    if verdict != Probe::Sound || store.created_at(&standing)?.is_none() {
        return Ok((verdict, None));
    }
    let spent = probe_name(prefix, &format!("spent/{}", random_hex()?))?;
    won(store, &spent, random_hex()?.as_bytes())?;
    match store.created_at(&spent) {
        Ok(time) => Ok((verdict, time)),
        // Swept already.
        Err(error) if error.kind == StorageErrorKind::NotFound => Ok((verdict, None)),
        Err(error) => Err(error),
    }
}

fn probe_name(prefix: &str, own: &str) -> Result<ObjectName, StorageError> {
    let name = match prefix {
        "" => format!("probe/{own}"),
        prefix => format!("{prefix}/probe/{own}"),
    };
    ObjectName::new(&name)
        .map_err(|error| StorageError::new(StorageErrorKind::Unsupported, prefix, error))
}

/// Runs one trial and removes its object, whatever the trial said. A crash in between leaves one
/// small object below `probe/` that says nothing of anybody; it stays.
fn with_probe_object(
    store: &dyn Storage,
    prefix: &str,
    trial: impl FnOnce(&ObjectName) -> Result<Probe, StorageError>,
) -> Result<Probe, StorageError> {
    let name = probe_name(prefix, &random_hex()?)?;
    let verdict = trial(&name);
    let cleaned = store.delete(&name);
    match verdict {
        Ok(Probe::Sound) => cleaned.map(|()| Probe::Sound),
        told => told,
    }
}

fn twice(store: &dyn Storage, name: &ObjectName) -> Result<Probe, StorageError> {
    let first = random_hex()?;
    if !won(store, name, first.as_bytes())? {
        return unsound("a name nobody ever used was reported as taken");
    }
    refused(store, name, first.as_bytes())
}

/// As `twice`, where the first time may be long ago.
fn again(store: &dyn Storage, name: &ObjectName) -> Result<Probe, StorageError> {
    let stands = match store.read(name, MAX_PROBE_BYTES) {
        Err(error) if error.kind == StorageErrorKind::NotFound => {
            // Whoever is first: the bytes that stand are those to be kept.
            won(store, name, random_hex()?.as_bytes())?;
            store.read(name, MAX_PROBE_BYTES)?
        }
        read => read?,
    };
    refused(store, name, &stands)
}

/// Whether a creation under a name that is taken is refused, and changes nothing.
fn refused(store: &dyn Storage, name: &ObjectName, stands: &[u8]) -> Result<Probe, StorageError> {
    match won(store, name, random_hex()?.as_bytes()) {
        Ok(false) => {}
        Ok(true) => {
            return unsound("an existing object was overwritten: the condition is ignored");
        }
        // A store that noticed it by itself.
        Err(error) if error.kind == StorageErrorKind::Unsupported => return unsound(&error.detail),
        Err(error) => return Err(error),
    }
    match store.read(name, MAX_PROBE_BYTES)? == stands {
        true => Ok(Probe::Sound),
        false => unsound("a refused creation changed the object"),
    }
}

fn race(store: &dyn Storage, name: &ObjectName, writers: u32) -> Result<Probe, StorageError> {
    let contents = (0..writers)
        .map(|_| random_hex())
        .collect::<Result<Vec<_>, _>>()?;
    // Not a barrier: if a thread cannot be started, those that were must still come to an end.
    let start = AtomicBool::new(false);
    let outcomes: Vec<Result<bool, StorageError>> = thread::scope(|scope| {
        let racers: Vec<_> = contents
            .iter()
            .map(|content| {
                thread::Builder::new().spawn_scoped(scope, || {
                    while !start.load(Ordering::Acquire) {
                        thread::yield_now();
                    }
                    won(store, name, content.as_bytes())
                })
            })
            .collect();
        start.store(true, Ordering::Release);
        let lost = |detail: String| {
            let kind = StorageErrorKind::Unsupported;
            Err(StorageError::new(kind, name, detail))
        };
        racers
            .into_iter()
            .map(|racer| match racer {
                Ok(racer) => racer
                    .join()
                    .unwrap_or_else(|_| lost("a writer of the probe died".to_string())),
                Err(error) => lost(format!("a writer of the probe did not start: {error}")),
            })
            .collect()
    });
    let mut winners = Vec::new();
    for (content, outcome) in contents.iter().zip(outcomes) {
        match outcome {
            Ok(true) => winners.push(content),
            Ok(false) => {}
            Err(error) if error.kind == StorageErrorKind::Unsupported => {
                return unsound(&error.detail);
            }
            Err(error) => return Err(error),
        }
    }
    let stands = store.read(name, MAX_PROBE_BYTES)?;
    match winners.as_slice() {
        [winner] if winner.as_bytes() == stands => Ok(Probe::Sound),
        [_] => unsound("the winner of a race was told so, and another's bytes stand"),
        several => unsound(&format!(
            "{} of {writers} racing writers were told that they had won",
            several.len()
        )),
    }
}

/// Whether this writer's bytes stand, as the store tells it. A lost reply is decided as the ledger
/// decides it: the same bytes again, then a comparison.
fn won(store: &dyn Storage, name: &ObjectName, content: &[u8]) -> Result<bool, StorageError> {
    let mut uncertain = None;
    for _ in 0..ATTEMPTS {
        match store.create(name, content) {
            Ok(()) => return Ok(true),
            Err(error) if error.kind == StorageErrorKind::AlreadyExists => {
                return match uncertain {
                    None => Ok(false),
                    Some(_) => Ok(store.read(name, MAX_PROBE_BYTES)? == content),
                };
            }
            Err(error) if error.kind == StorageErrorKind::Transient => uncertain = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(uncertain.unwrap_or_else(|| {
        StorageError::new(StorageErrorKind::Transient, name, "no attempt was made")
    }))
}

fn unsound(what: &str) -> Result<Probe, StorageError> {
    Ok(Probe::Unsound {
        what: what.to_string(),
    })
}
