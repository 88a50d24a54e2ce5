//! Whether the host's time is believed: nothing is deleted on the word of one clock.
//!
//! A time is *witnessed* when two sources agree with the wall clock within five minutes, else *alone*. Only witnessed
//! times move the base that the next judgement measures from, so a clock that runs wild can be at most 48 hours
//! past the last time that two sources agreed on and still delete; thinning waits two days longer for that reason.
//! Expiry cannot wait where the maximum is short, so a lone clock that more sources contradict than confirm deletes nothing.
//! Two sources of one machine that stood still (paused, suspended) lag together; see `PointFacts::silence`.
//!
//! *Absent:* reading any clock, and the ledger. The caller brings the reading, the store's time and the last
//! witnessed time (after `clock` entries have voided what an administrator declared wrong).

use std::fmt;

use jiff::{SignedDuration, Timestamp};

use crate::model::ClockReading;

/// Two clocks that differ by no more than this agree.
const AGREEMENT_SECONDS: i64 = 5 * 60;
/// How far past the last witnessed time a lone clock may still delete.
const LONGEST_JUMP_SECONDS: i64 = 48 * 60 * 60;

/// What this host noted when it last wrote a witnessed entry: the wall clock and the uptime of that moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalMark {
    /// The kernel's random id of that boot; elapsed time across boots is unknown.
    pub boot_id: String,
    pub since_boot_seconds: u64,
    pub wall: Timestamp,
}

/// How the host's clock is declared in the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostClock {
    /// Two sources must agree.
    Verified,
    /// The operator declares that the clock is disciplined by something that is not visible here.
    Trusted,
}

/// What an entry says of its own time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attestation {
    Witnessed,
    Alone,
}

impl fmt::Display for Attestation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Attestation::Witnessed => "witnessed",
            Attestation::Alone => "alone",
        })
    }
}

/// Whether this run may expire, erase and reclaim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Deletion {
    Allowed,
    Refused { reason: ClockRefusal },
}

/// Why a clock may not delete. Its `Display` says what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClockRefusal {
    /// The clock went back, or the last witnessed time was wrong.
    BeforeLastWitnessed {
        wall: Timestamp,
        last_witnessed: Timestamp,
    },
    /// More than 48 hours passed, says this clock, and nothing else says so.
    JumpedAhead {
        wall: Timestamp,
        last_witnessed: Timestamp,
    },
    /// The repository has no witnessed time to measure from.
    NothingWitnessed { wall: Timestamp },
    /// More sources tell another time than agree with this one.
    Contradicted {
        wall: Timestamp,
        source: &'static str,
        minutes: u64,
    },
}

impl fmt::Display for ClockRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClockRefusal::BeforeLastWitnessed {
                wall,
                last_witnessed,
            } => write!(
                f,
                "the clock says {wall}, which is before {last_witnessed}, a time that was already witnessed; \
                 set the clock right and run again; if the clock is right, vmkeep ledger void takes the wrong \
                 time out of the reckoning (vmkeep ledger show has its number), and \
                 vmkeep prune --trust-clock accepts the clock once"
            ),
            ClockRefusal::JumpedAhead {
                wall,
                last_witnessed,
            } => write!(
                f,
                "the clock says {wall}, which is {} hours past {last_witnessed}, the last witnessed time, \
                 and no second source agrees; look at the clock, and if it is right say so once: \
                 vmkeep prune --trust-clock; until then new restore points count, and leave, as if taken at \
                 that time; after a reboot NTP alone is one source, and is enough only where \
                 [host] clock = \"trusted\" says so",
                wall.as_second().saturating_sub(last_witnessed.as_second()) / 3600
            ),
            ClockRefusal::Contradicted {
                wall,
                source,
                minutes,
            } => write!(
                f,
                "the clock says {wall}, which differs by {minutes} minutes from what another source \
                 ({source}) says, and too few agree \
                 with it; let the host's clock be synchronised (NTP) and run again, \
                 or check it by hand and use vmkeep prune --trust-clock once"
            ),
            ClockRefusal::NothingWitnessed { wall } => write!(
                f,
                "the clock says {wall}, and no time was ever witnessed here to compare it with; \
                 let the host's clock be synchronised (NTP) and run again, \
                 or check it by hand and use vmkeep prune --trust-clock once"
            ),
        }
    }
}

/// What is thought of one reading of the clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    /// How an entry of this moment is marked.
    pub attestation: Attestation,
    pub deletion: Deletion,
    /// Who agreed with the wall clock: of `kernel`, `store`, `boot`, `trusted`, `operator`.
    pub sources: Vec<&'static str>,
}

/// Judges a reading.
///
/// - `local`: what this host noted at a witnessed entry (see [`next_mark`]).
/// - `store_time`: the store's own time on an object created just now; `None` where the store is a directory
///   of this host, which has no clock of its own.
/// - `last_witnessed`: the latest witnessed time of the ledger.
/// - `operator_override`: `--trust-clock`, or the operator's confirmation at `init`. It counts as witnessed and may
///   even go back before the last witnessed time; the caller records it in a `clock` entry.
pub fn judge(
    reading: &ClockReading,
    local: Option<&LocalMark>,
    store_time: Option<Timestamp>,
    mode: HostClock,
    last_witnessed: Option<Timestamp>,
    operator_override: bool,
) -> Judgement {
    let wall = reading.wall;
    let mut sources = Vec::new();
    if reading.synchronised {
        sources.push("kernel");
    }
    let mut contradictions = Vec::new();
    let others = [
        ("store", store_time.map(Timestamp::as_second)),
        ("boot", by_uptime(reading, local)),
    ];
    for (source, says) in others {
        match says {
            Some(says) if agree(says, wall.as_second()) => sources.push(source),
            Some(says) => contradictions.push((source, says)),
            None => {}
        }
    }
    let two_agree = sources.len() >= 2;
    let contradicted = contradictions
        .first()
        .filter(|_| contradictions.len() > sources.len());
    let jump = last_witnessed.map(|last| wall.as_second().saturating_sub(last.as_second()));

    if operator_override {
        sources.push("operator");
        return Judgement {
            attestation: Attestation::Witnessed,
            deletion: Deletion::Allowed,
            sources,
        };
    }
    // Other processes and hosts write entries too; five minutes back is no jump.
    if let (Some(jump), Some(last_witnessed)) = (jump, last_witnessed)
        && jump < -AGREEMENT_SECONDS
    {
        // Not even as witnessed: the ledger's clock never goes back without an operator.
        return Judgement {
            attestation: Attestation::Alone,
            deletion: Deletion::Refused {
                reason: ClockRefusal::BeforeLastWitnessed {
                    wall,
                    last_witnessed,
                },
            },
            sources,
        };
    }
    let near = jump.is_some_and(|jump| jump <= LONGEST_JUMP_SECONDS);
    let trusted = mode == HostClock::Trusted && near;
    if trusted {
        sources.push("trusted");
    }
    let attestation = match two_agree || trusted {
        true => Attestation::Witnessed,
        false => Attestation::Alone,
    };
    let deletion = match (attestation, near, last_witnessed) {
        (Attestation::Witnessed, _, _) => Deletion::Allowed,
        (Attestation::Alone, true, _) => match contradicted {
            None => Deletion::Allowed,
            Some((source, says)) => Deletion::Refused {
                reason: ClockRefusal::Contradicted {
                    wall,
                    source,
                    minutes: wall.as_second().abs_diff(*says) / 60,
                },
            },
        },
        (Attestation::Alone, false, Some(last_witnessed)) => Deletion::Refused {
            reason: ClockRefusal::JumpedAhead {
                wall,
                last_witnessed,
            },
        },
        (Attestation::Alone, false, None) => Deletion::Refused {
            reason: ClockRefusal::NothingWitnessed { wall },
        },
    };
    Judgement {
        attestation,
        deletion,
        sources,
    }
}

/// The mark to note after an entry with this judgement stands; `None` keeps what was noted before (or nothing).
///
/// A time that was witnessed with the help of the old mark does not replace it: the five minutes of agreement would
/// otherwise add up, entry by entry, to any distance.
pub fn next_mark(reading: &ClockReading, judgement: &Judgement) -> Option<LocalMark> {
    let boot = reading.boot.as_ref()?;
    let independent = judgement
        .sources
        .iter()
        .filter(|source| **source != "boot")
        .count();
    let enough = independent >= 2
        || judgement.sources.contains(&"operator")
        || judgement.sources.contains(&"trusted");
    (judgement.attestation == Attestation::Witnessed && enough).then(|| LocalMark {
        boot_id: boot.boot_id.clone(),
        since_boot_seconds: boot.since_boot_seconds,
        wall: reading.wall,
    })
}

/// Whether the clock went on since `mark` as the uptime did: whoever knows that it is right at one of the two
/// moments knows that it was at the other.
pub fn goes_on(reading: &ClockReading, mark: &LocalMark) -> bool {
    by_uptime(reading, Some(mark)).is_some_and(|says| agree(says, reading.wall.as_second()))
}

/// How long no time had been witnessed when `at` was. Negative by what clocks that agree may differ.
pub fn silence_before(at: Timestamp, last_witnessed: Option<Timestamp>) -> SignedDuration {
    last_witnessed.map_or(SignedDuration::ZERO, |last| at.duration_since(last))
}

fn agree(one: i64, other: i64) -> bool {
    one.abs_diff(other) <= AGREEMENT_SECONDS.unsigned_abs()
}

/// What the time should be, by the uptime since the mark, in Unix seconds.
fn by_uptime(reading: &ClockReading, local: Option<&LocalMark>) -> Option<i64> {
    let (boot, mark) = (reading.boot.as_ref()?, local?);
    if boot.boot_id != mark.boot_id {
        return None;
    }
    let elapsed = boot
        .since_boot_seconds
        .checked_sub(mark.since_boot_seconds)?;
    mark.wall
        .as_second()
        .checked_add(i64::try_from(elapsed).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::BootMark;
    use proptest::prelude::*;

    const HOUR: i64 = 3600;
    /// 2026-11-21T22:00:00Z.
    const BASE: i64 = 1_795_298_400;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("within the calendar")
    }

    fn reading(wall: i64, synchronised: bool, uptime: u64) -> ClockReading {
        ClockReading {
            wall: at(wall),
            synchronised,
            boot: Some(BootMark {
                boot_id: "b".into(),
                since_boot_seconds: uptime,
            }),
        }
    }

    fn mark(wall: i64, uptime: u64) -> LocalMark {
        LocalMark {
            boot_id: "b".into(),
            since_boot_seconds: uptime,
            wall: at(wall),
        }
    }

    fn refused(judgement: &Judgement) -> bool {
        matches!(judgement.deletion, Deletion::Refused { .. })
    }

    #[test]
    fn any_two_sources_witness_and_one_does_not() {
        let now = BASE + 100 * HOUR;
        let uptime = 360_000 + 1000;
        let mark = mark(BASE, 1000);
        for kernel in [false, true] {
            for store in [None, Some(at(now + 299)), Some(at(now + 301))] {
                for local in [None, Some(&mark)] {
                    let judgement = judge(
                        &reading(now, kernel, uptime),
                        local,
                        store,
                        HostClock::Verified,
                        Some(at(BASE)),
                        false,
                    );
                    let agreeing = usize::from(kernel)
                        + usize::from(store == Some(at(now + 299)))
                        + usize::from(local.is_some());
                    assert_eq!(judgement.sources.len(), agreeing);
                    assert_eq!(
                        judgement.attestation == Attestation::Witnessed,
                        agreeing >= 2
                    );
                    assert_eq!(refused(&judgement), agreeing < 2);
                }
            }
        }
    }

    #[test]
    fn a_mark_is_noted_on_two_sources_or_on_one_that_a_person_answers_for() {
        let marked = |sources: &[&'static str], attestation| {
            let judgement = Judgement {
                attestation,
                deletion: Deletion::Allowed,
                sources: sources.to_vec(),
            };
            next_mark(&reading(BASE, false, 7), &judgement).is_some()
        };
        for sources in [
            vec!["kernel", "store"],
            vec!["operator"],
            vec!["trusted"],
            vec!["boot", "operator"],
        ] {
            assert!(marked(&sources, Attestation::Witnessed), "{sources:?}");
            assert!(!marked(&sources, Attestation::Alone), "{sources:?}");
        }
        for sources in [vec![], vec!["kernel"], vec!["kernel", "boot"]] {
            assert!(!marked(&sources, Attestation::Witnessed), "{sources:?}");
        }
        let told = [Attestation::Witnessed, Attestation::Alone].map(|told| told.to_string());
        assert_eq!(told, ["witnessed", "alone"]);
    }

    #[test]
    fn uptime_of_another_boot_says_nothing() {
        let mut other = mark(BASE, 0);
        other.boot_id = "another".into();
        let reading = reading(BASE + HOUR, true, 3600);
        let judgement = judge(
            &reading,
            Some(&other),
            None,
            HostClock::Verified,
            Some(at(BASE)),
            false,
        );
        assert_eq!(judgement.sources, ["kernel"]);
        assert_eq!(judgement.attestation, Attestation::Alone);
        assert_eq!(judgement.deletion, Deletion::Allowed);
    }

    #[test]
    fn a_lone_clock_deletes_up_to_48_hours_past_the_last_witnessed_time() {
        for (jump, allowed) in [
            (-301, false),
            (-300, true),
            (0, true),
            (48 * HOUR, true),
            (48 * HOUR + 1, false),
            (10 * 8766 * HOUR, false),
        ] {
            let judgement = judge(
                &reading(BASE + jump, true, 0),
                None,
                None,
                HostClock::Verified,
                Some(at(BASE)),
                false,
            );
            assert_eq!(judgement.attestation, Attestation::Alone);
            assert_eq!(!refused(&judgement), allowed, "{jump}");
        }
    }

    #[test]
    fn a_lone_clock_that_the_store_or_the_uptime_contradicts_deletes_nothing_however_near() {
        let noted = mark(BASE, 0);
        let with = |kernel: bool, ahead: i64, store: Option<i64>, local: Option<&LocalMark>| {
            let reading = reading(BASE + 23 * HOUR + ahead, kernel, 23 * 3600);
            let store = store.map(at);
            judge(
                &reading,
                local,
                store,
                HostClock::Verified,
                Some(at(BASE)),
                false,
            )
        };
        let by = |ahead, store, local| with(false, ahead, store, local);
        let truth = Some(BASE + 23 * HOUR);
        for ahead in [301, 24 * HOUR, -12 * HOUR] {
            assert!(!refused(&by(ahead, None, None)));
            for (store, local) in [(truth, None), (None, Some(&noted)), (truth, Some(&noted))] {
                assert!(refused(&by(ahead, store, local)), "{ahead}");
            }
        }
        assert!(!refused(&by(300, truth, None)));
        // A machine that stood still has the kernel's word against its uptime.
        assert!(!refused(&with(true, HOUR, None, Some(&noted))));
        assert!(refused(&with(true, HOUR, truth, Some(&noted))));
        let Deletion::Refused { reason } = by(24 * HOUR, truth, None).deletion else {
            panic!("allowed");
        };
        assert!(
            reason
                .to_string()
                .contains("differs by 1440 minutes from what another source (store) says")
        );
    }

    #[test]
    fn before_the_last_witnessed_time_only_an_operator_deletes() {
        let early = reading(BASE - 24 * HOUR, true, 0);
        let store = Some(at(BASE - 24 * HOUR));
        for mode in [HostClock::Verified, HostClock::Trusted] {
            let judgement = judge(&early, None, store, mode, Some(at(BASE)), false);
            assert_eq!(judgement.attestation, Attestation::Alone);
            let Deletion::Refused { reason } = judgement.deletion else {
                panic!("allowed");
            };
            assert!(reason.to_string().contains("--trust-clock"));
            let judgement = judge(&early, None, store, mode, Some(at(BASE)), true);
            assert_eq!(judgement.attestation, Attestation::Witnessed);
            assert_eq!(judgement.deletion, Deletion::Allowed);
            assert_eq!(judgement.sources, ["kernel", "store", "operator"]);
        }
    }

    #[test]
    fn a_trusted_clock_is_witnessed_within_48_hours_and_then_needs_two_sources() {
        let trusted = |jump: i64, store: Option<Timestamp>| {
            judge(
                &reading(BASE + jump, true, 0),
                None,
                store,
                HostClock::Trusted,
                Some(at(BASE)),
                false,
            )
        };
        assert_eq!(trusted(HOUR, None).sources, ["kernel", "trusted"]);
        assert_eq!(trusted(48 * HOUR, None).attestation, Attestation::Witnessed);
        assert!(refused(&trusted(49 * HOUR, None)));
        let week = 7 * 24 * HOUR;
        let judgement = trusted(week, Some(at(BASE + week)));
        assert_eq!(judgement.attestation, Attestation::Witnessed);
        assert_eq!(judgement.sources, ["kernel", "store"]);
    }

    #[test]
    fn a_repository_without_a_witnessed_time_needs_two_sources_or_its_operator() {
        let first = reading(BASE, true, 0);
        for mode in [HostClock::Verified, HostClock::Trusted] {
            let alone = judge(&first, None, None, mode, None, false);
            assert_eq!(alone.attestation, Attestation::Alone);
            assert!(refused(&alone));
            let confirmed = judge(&first, None, None, mode, None, true);
            assert_eq!(confirmed.attestation, Attestation::Witnessed);
            let both = judge(&first, None, Some(at(BASE)), mode, None, false);
            assert_eq!(both.attestation, Attestation::Witnessed);
        }
    }

    #[test]
    fn agreement_with_the_mark_does_not_move_the_mark() {
        let old = mark(BASE, 0);
        let later = reading(BASE + HOUR + 290, true, 3600);
        let judgement = judge(
            &later,
            Some(&old),
            None,
            HostClock::Verified,
            Some(at(BASE)),
            false,
        );
        assert_eq!(judgement.attestation, Attestation::Witnessed);
        assert_eq!(next_mark(&later, &judgement), None);
        let judgement = judge(
            &later,
            Some(&old),
            Some(later.wall),
            HostClock::Verified,
            Some(at(BASE)),
            false,
        );
        assert_eq!(
            next_mark(&later, &judgement),
            Some(mark(BASE + HOUR + 290, 3600))
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        /// A host whose wall clock drifts by anything, run after run, with no source but one: whatever it does,
        /// it never deletes beyond 48 hours past the last witnessed time, because that time does not move.
        #[test]
        fn a_clock_that_is_alone_never_moves_the_base(
            drifts in proptest::collection::vec(-50 * HOUR..50 * HOUR, 1..60),
            kernel in any::<bool>(),
        ) {
            let mut witnessed = BASE;
            let mut wall = BASE;
            for (night, drift) in (1_i64..).zip(drifts) {
                wall += drift + 24 * HOUR;
                // The store is honest, and its time is the true one.
                let truth = at(BASE + night * 24 * HOUR);
                let store = (!kernel).then_some(truth);
                let judgement = judge(
                    &reading(wall, kernel, 0), None, store, HostClock::Verified, Some(at(witnessed)), false,
                );
                prop_assert_eq!(judgement.attestation, Attestation::Alone);
                if judgement.attestation == Attestation::Witnessed {
                    witnessed = wall;
                }
                let jump = wall - BASE;
                let contradicted = store.is_some_and(|store| !agree(store.as_second(), wall));
                prop_assert_eq!(
                    judgement.deletion == Deletion::Allowed,
                    (-300..=48 * HOUR).contains(&jump) && !contradicted
                );
            }
        }

        /// One source of three lies, at will; the others and the uptime are honest. The believed time is then
        /// within five minutes of the truth (ten where the mark itself was five off), or nothing is deleted beyond
        /// 48 hours past a true time.
        #[test]
        fn one_lying_clock_never_deletes_beyond_48_hours(
            nights in proptest::collection::vec(
                (any::<bool>(), any::<bool>(), -20 * 8766 * HOUR..20 * 8766 * HOUR, any::<bool>(), any::<bool>()),
                1..60,
            ),
        ) {
            let mut witnessed = BASE;
            let mut noted = mark(BASE, 0);
            for (night, (with_store, wrong, by, synchronised, store_lies)) in (1_i64..).zip(nights) {
                let elapsed = night * 24 * HOUR;
                let truth = BASE + elapsed;
                // Either the wall clock is wrong (then its kernel may still claim to be synchronised), or the store's.
                let wall = if wrong && !store_lies { truth + by } else { truth };
                let store = with_store.then(|| at(if wrong && store_lies { truth + by } else { truth }));
                let uptime = u64::try_from(elapsed).expect("positive");
                let reading = reading(wall, synchronised, uptime);
                let judgement = judge(
                    &reading, Some(&noted), store, HostClock::Verified, Some(at(witnessed)), false,
                );
                if judgement.attestation == Attestation::Witnessed {
                    prop_assert!((wall - truth).abs() <= 600);
                    witnessed = witnessed.max(wall);
                    if let Some(next) = next_mark(&reading, &judgement) {
                        noted = next;
                    }
                }
                if judgement.deletion == Deletion::Allowed {
                    prop_assert!(wall <= truth + 48 * HOUR + 600);
                    prop_assert!(wall >= witnessed - 300);
                }
            }
        }

        /// Whatever is read, the same reading is judged the same way, and nothing panics at the ends of time.
        #[test]
        fn the_ends_of_time_are_judged_too(
            wall in prop_oneof![Just(Timestamp::MIN), Just(Timestamp::MAX), Just(at(BASE))],
            store in prop_oneof![Just(None), Just(Some(Timestamp::MIN)), Just(Some(Timestamp::MAX))],
            last in prop_oneof![Just(None), Just(Some(Timestamp::MIN)), Just(Some(Timestamp::MAX))],
            uptime in prop_oneof![Just(0_u64), Just(u64::MAX)],
            override_ in any::<bool>(),
        ) {
            let reading = ClockReading {
                wall,
                synchronised: true,
                boot: Some(BootMark { boot_id: "b".into(), since_boot_seconds: uptime }),
            };
            let noted = LocalMark { boot_id: "b".into(), since_boot_seconds: 0, wall };
            let judgement = judge(&reading, Some(&noted), store, HostClock::Trusted, last, override_);
            if let Deletion::Refused { reason } = &judgement.deletion {
                prop_assert!(reason.to_string().contains("--trust-clock"));
            }
            if override_ {
                prop_assert_eq!(judgement.deletion, Deletion::Allowed);
            }
        }
    }
}
