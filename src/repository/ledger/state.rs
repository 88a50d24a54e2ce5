//! What the entries of a ledger add up to: a pure function of the entries, in order.

use super::super::LedgerClock;
use super::super::rule::{Rule, stands};
use super::audit::Hidden;
use super::checkpoint::{self, KindText, StateText};
use crate::format::entry::{
    Attestation, Body, CertificateRef, ClockEvent, CommitBody, DiskBody, Entry, HostBody, KeyBody,
    PackMark, Purpose, ReclaimedBody, Role, VerifyMethod,
};
use crate::format::repository_file::FORMAT_VERSION;
use crate::format::text;
use crate::model::{
    CustomerUid, DiskName, EntryHash, HostId, InstallationId, ObjectHash, PackName, PointId,
    PointKind, PointState, RepositoryId, SegmentName, SessionId, Tag, VmName, Writers,
};
use crate::policy::{
    PointFacts, Policy, PolicyTerms, PromisedWindows, after_policy_change, expiry, silence_before,
};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

/// A session that has begun and is neither adopted nor aborted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenSession {
    #[serde(with = "text")]
    pub host: HostId,
    pub purpose: Purpose,
    pub begun_at: Timestamp,
    pub seq: u64,
    #[serde(with = "text::option")]
    pub vm: Option<VmName>,
    #[serde(with = "text::option")]
    pub point: Option<PointId>,
    /// When the point it may commit would expire, and must be gone.
    pub expires_at: Option<Timestamp>,
    pub deadline: Option<Timestamp>,
    /// The ledger's clock before this session began.
    pub witnessed_before: Option<Timestamp>,
    pub attestation: Attestation,
}

impl OpenSession {
    /// The time from which the expiry of its point counts: a lone clock is not believed, but the
    /// last time that two sources agreed on before it.
    pub fn counted_from(&self) -> Timestamp {
        match (self.attestation, self.witnessed_before) {
            (Attestation::Alone, Some(before)) => before,
            _ => self.begun_at,
        }
    }
}

/// How a session dates its point.
#[derive(Debug, Clone, Copy)]
struct Dating {
    /// See [`OpenSession::counted_from`].
    counted_from: Timestamp,
    begin_seq: u64,
    begun_at: Timestamp,
    /// Its `begin` had no witness, and with it the point's `taken_at`.
    alone: bool,
}

/// A committed restore point of which at least a byte may still be in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    #[serde(with = "text")]
    pub vm: VmName,
    #[serde(with = "KindText")]
    pub kind: PointKind,
    #[serde(with = "text")]
    pub session: SessionId,
    #[serde(with = "text::option")]
    pub base: Option<PointId>,
    pub taken_at: Timestamp,
    /// See [`OpenSession::counted_from`].
    counted_from: Timestamp,
    /// Of its session, as that of the host and the time of its `begin`.
    begin_seq: u64,
    #[serde(with = "text")]
    host: HostId,
    begun_at: Timestamp,
    /// The entry by which an operator vouched for the clock that dated it.
    vouched_at: Option<u64>,
    pub expires_at: Timestamp,
    pub deadline: Timestamp,
    pub disks: Vec<DiskBody>,
    pub stored_bytes: u64,
    #[serde(with = "text")]
    pub record_hash: ObjectHash,
    pub seq: u64,
    #[serde(with = "StateText")]
    pub state: PointState,
    /// The first witnessed time at or after the latest `expire`.
    pub expired_at: Option<Timestamp>,
    pub erase_seq: Option<u64>,
    /// The time of that entry.
    pub erased_at: Option<Timestamp>,
    /// The clock of its session had no witness.
    pub clock_alone: bool,
    /// The first witnessed time after the commit, for a point whose clock was alone.
    pub witnessed_since: Option<Timestamp>,
    pub consistency: String,
    pub notes: Vec<String>,
    /// Its commit broke a rule: a root until its time is over, but never listed or restored.
    pub void: bool,
    /// The entry of the full that it is or stands on.
    pub full_seq: u64,
    /// An audit found that tracking hid changes which it may lack.
    pub suspect: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condemned {
    pub seq: u64,
    pub deleted: bool,
}

/// A reclaim's session whose packs no mark has seen yet. It copied what was live when it began, so
/// they may hold bytes of every point that was erased since.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Copied {
    begun: u64,
    adopted: u64,
}

/// When and how a pack was last read in full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    pub at: Timestamp,
    pub method: VerifyMethod,
}

/// Everything that decisions rest on, after some number of entries.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The number of the last entry applied; 0 before genesis.
    pub seq: u64,
    #[serde(with = "text::option")]
    pub hash: Option<EntryHash>,
    #[serde(with = "text::option")]
    pub uid: Option<CustomerUid>,
    #[serde(with = "text::option")]
    pub repository: Option<RepositoryId>,
    pub customer_name: String,
    #[serde(with = "text")]
    pub writers: Writers,
    /// Where one host writes: which of its installations did last.
    #[serde(with = "text::option")]
    pub installation: Option<InstallationId>,
    #[serde(with = "checkpoint::keys")]
    pub hosts: BTreeMap<HostId, HostBody>,
    pub terms: Option<PolicyTerms>,
    /// Who wrote them.
    #[serde(with = "text::option")]
    pub terms_by: Option<HostId>,
    /// What each host wrote last.
    #[serde(with = "checkpoint::keys")]
    written_terms: BTreeMap<HostId, PolicyTerms>,
    #[serde(skip)]
    pub policy: Option<Policy>,
    pub keys: Vec<KeyBody>,
    #[serde(with = "checkpoint::keys")]
    pub open: BTreeMap<SessionId, OpenSession>,
    #[serde(with = "text::list")]
    pub aborted: BTreeSet<SessionId>,
    /// When the packs of a session were adopted.
    #[serde(with = "checkpoint::keys")]
    pub born: BTreeMap<SessionId, Timestamp>,
    #[serde(with = "checkpoint::keys")]
    pub points: BTreeMap<PointId, Point>,
    #[serde(with = "checkpoint::pairs")]
    pub newest: BTreeMap<VmName, PointId>,
    /// When each VM's first point was taken since it last had none, however long that point is gone: the earliest time
    /// of any, because a wrong clock may have taken the first.
    #[serde(with = "checkpoint::keys")]
    pub first_taken: BTreeMap<VmName, Timestamp>,
    /// The restore windows of its policies.
    pub promised: PromisedWindows,
    /// The disks whose tracking hid changes, as the last audit of each found.
    #[serde(with = "checkpoint::nested")]
    pub distrusted: BTreeMap<VmName, BTreeMap<DiskName, Hidden>>,
    #[serde(with = "checkpoint::keys")]
    pub segments: BTreeMap<SegmentName, Timestamp>,
    #[serde(with = "checkpoint::keys")]
    pub condemned: BTreeMap<PackName, Condemned>,
    #[serde(with = "checkpoint::keys")]
    pub marks: BTreeMap<PackName, PackMark>,
    #[serde(with = "checkpoint::keys")]
    copied: BTreeMap<SessionId, Copied>,
    /// The last mark saw the ledger up to here: later erasures have left no mark yet.
    pub marked_at: u64,
    #[serde(with = "checkpoint::keys")]
    pub verified: BTreeMap<PackName, Verified>,
    #[serde(with = "checkpoint::pairs")]
    pub damaged: BTreeSet<(PackName, Tag)>,
    witnessed: BTreeMap<u64, Timestamp>,
    pub last_witnessed: Option<Timestamp>,
    /// How long no time had been witnessed at entries after which that was never as long again: behind any
    /// entry the first of them is the longest. Kept for each point it would be touched at each entry.
    silences: BTreeMap<u64, SignedDuration>,
    /// A point waits for the next witnessed time.
    lacks_witness: bool,
    pub certificates: Vec<CertificateRef>,
    /// The last entry that named a certificate; erasures after it are in none yet.
    pub certified_at: u64,
    /// Packs deleted since then.
    #[serde(with = "text::list")]
    pub uncertified_packs: Vec<PackName>,
    /// Entries that broke a rule, and which.
    pub voids: Vec<(u64, String)>,
    /// The first entry that this version does not understand: it may no longer write.
    pub unknown: Option<(u64, String)>,
}

/// Adds to a sorted list without repetition.
fn join(list: &mut Vec<u64>, more: impl Iterator<Item = u64>) {
    list.extend(more);
    list.sort_unstable();
    list.dedup();
}

fn refuse<T>(reason: impl Into<String>) -> Result<T, String> {
    Err(reason.into())
}

impl State {
    /// Whether `entry` may stand as the next one. Looks at nothing but the entries before.
    pub fn check(&self, entry: &Entry) -> Result<(), String> {
        if let Body::Genesis(body) = &entry.body {
            if self.seq != 0 {
                return refuse("a second genesis");
            }
            return match body.host.host == entry.host {
                true => Ok(()),
                false => refuse("genesis is not signed by the host it names"),
            };
        }
        let Some(host) = self.hosts.get(&entry.host) else {
            return refuse(format!("host {} is not admitted", entry.host));
        };
        let need = |roles: &[Role]| match roles.iter().any(|role| host.roles.contains(role)) {
            true => Ok(()),
            false => refuse(format!(
                "host {} has no role for a {} entry",
                host.name,
                entry.body.kind()
            )),
        };
        match &entry.body {
            Body::Genesis(_) | Body::Unknown { .. } | Body::Checkpoint(_) => Ok(()),
            Body::Host(body) if self.writers == Writers::One && body.host != entry.host => {
                refuse("one host writes this repository, and no other can be let in")
            }
            Body::Host(_) | Body::Key(_) => need(&[Role::Admin]),
            Body::Seal(_) if self.writers == Writers::Many => {
                refuse("several hosts may write this repository")
            }
            Body::Seal(_) => Ok(()),
            Body::Policy(body) => {
                need(&[Role::Admin])?;
                parse_terms(&body.terms).map(|_| ())
            }
            Body::Begin(body) => {
                need(match body.purpose {
                    Purpose::Backup => &[Role::Backup],
                    Purpose::Reclaim | Purpose::Merge | Purpose::Prove => &[Role::Prune],
                })?;
                if self.open.contains_key(&body.session)
                    || self.aborted.contains(&body.session)
                    || self.born.contains_key(&body.session)
                {
                    return refuse("the session has begun before");
                }
                match (body.purpose, &body.vm, &body.point) {
                    (Purpose::Backup, Some(_), Some(point)) => {
                        let taken = self.points.contains_key(point)
                            || self.open.values().any(|open| open.point == Some(*point));
                        match taken {
                            true => refuse("the point id is taken"),
                            false => Ok(()),
                        }
                    }
                    (Purpose::Backup, ..) => refuse("a backup session names no VM and point"),
                    (_, None, None) => Ok(()),
                    _ => refuse("only a backup session names a point"),
                }
            }
            Body::Commit(body) => {
                need(&[Role::Backup])?;
                self.check_commit(entry, body)
            }
            Body::Abort(body) => {
                need(&[Role::Backup, Role::Prune])?;
                match self.open.contains_key(&body.session) {
                    true => Ok(()),
                    false => refuse("the session is not open"),
                }
            }
            Body::Expire(body) => {
                need(&[Role::Prune])?;
                self.check_points(
                    body.points.iter().map(|row| row.point),
                    "not live",
                    |point| point.state == PointState::Live,
                )
            }
            Body::Undo(body) => {
                need(&[Role::Prune])?;
                self.check_points(
                    body.points.iter().map(|row| row.point),
                    "not expired, or its time is over",
                    |point| point.state == PointState::Expired && entry.time < point.expires_at,
                )
            }
            Body::Erase(body) => {
                need(&[Role::Prune])?;
                self.check_points(
                    body.points.iter().map(|row| row.point),
                    "not expired",
                    |point| point.state == PointState::Expired,
                )
            }
            Body::Merge(body) => {
                need(&[Role::Prune])?;
                self.check_session(entry, &body.session, Purpose::Merge)?;
                if let Some(name) = body
                    .replaced
                    .iter()
                    .find(|name| !self.segments.contains_key(*name))
                {
                    return refuse(format!("segment {name} is not current"));
                }
                match body.dropped.iter().all(|pack| self.may_forget(pack)) {
                    true => self.check_segments(&body.session, &body.segments),
                    false => refuse(
                        "forgets a pack that is not known to be deleted, or that an open session \
                         may rely on",
                    ),
                }
            }
            Body::Condemn(body) => {
                need(&[Role::Prune])?;
                if stands(Rule::OpenSession) {
                    self.check_session(entry, &body.session, Purpose::Reclaim)?;
                }
                match body.packs.iter().any(|pack| pack.session == body.session) {
                    true => refuse("condemns its own packs"),
                    false => self.check_segments(&body.session, &body.segments),
                }
            }
            Body::Reclaimed(body) => {
                need(&[Role::Prune])?;
                match (&body.session, &body.certificate) {
                    (Some(session), _) => {
                        self.check_session(entry, session, Purpose::Prove)?;
                    }
                    (None, Some(_)) => return refuse("names a certificate without its session"),
                    (None, None) => {}
                }
                if let Some(pack) = body
                    .deleted
                    .iter()
                    .find(|pack| !self.condemned.contains_key(*pack))
                {
                    return refuse(format!("pack {pack} was not condemned"));
                }
                self.check_points(body.destroyed.iter().copied(), "not erased", |point| {
                    point.state == PointState::Erased
                })
            }
            Body::Restore(_) => need(&[Role::Restore, Role::Admin]),
            Body::Verify(_) => need(&[Role::Backup, Role::Restore, Role::Prune]),
            Body::Clock(body) => match body.event {
                ClockEvent::Refused => Ok(()),
                ClockEvent::Trusted => need(&[Role::Prune, Role::Admin]),
                ClockEvent::Void => need(&[Role::Admin]),
            },
        }
    }

    fn check_points(
        &self,
        points: impl Iterator<Item = PointId>,
        not: &str,
        holds: impl Fn(&Point) -> bool,
    ) -> Result<(), String> {
        let mut seen = BTreeSet::new();
        for id in points {
            match self.points.get(&id) {
                Some(point) if holds(point) && seen.insert(id) => {}
                Some(_) => return refuse(format!("point {id} is {not}")),
                None => return refuse(format!("there is no point {id}")),
            }
        }
        Ok(())
    }

    fn check_session(
        &self,
        entry: &Entry,
        session: &SessionId,
        purpose: Purpose,
    ) -> Result<&OpenSession, String> {
        match self.open.get(session) {
            Some(open) if open.purpose != purpose => refuse("the session has another purpose"),
            Some(open) if open.host != entry.host => refuse("the session is another host's"),
            Some(open) => Ok(open),
            None => refuse(format!("session {session} is not open")),
        }
    }

    fn check_segments(&self, session: &SessionId, segments: &[SegmentName]) -> Result<(), String> {
        match segments
            .iter()
            .all(|segment| segment.session == *session && !self.segments.contains_key(segment))
        {
            true => Ok(()),
            false => refuse("names a segment of another session"),
        }
    }

    fn check_commit(&self, entry: &Entry, body: &CommitBody) -> Result<(), String> {
        let open = self.check_session(entry, &body.session, Purpose::Backup)?;
        if open.point != Some(body.point) || open.vm.as_ref() != Some(&body.vm) {
            return refuse("commits another point than its session began");
        }
        if let Some(base) = body.base {
            if self.newest.get(&body.vm) != Some(&base) {
                return refuse(format!("base {base} is not the VM's newest point"));
            }
            let base_is = self.points.get(&base).map(|point| point.state);
            if base_is != Some(PointState::Live) && stands(Rule::LiveBase) {
                return refuse(format!("base {base} is expired or erased"));
            }
        }
        if body.taken_at < open.begun_at || body.taken_at > entry.time {
            return refuse("taken_at is outside of its session");
        }
        if body.expires_at > body.deadline {
            return refuse("expires after its deadline");
        }
        self.check_segments(&body.session, &body.segments)
    }

    /// Takes the next entry in. Returns why it is void, if it is.
    pub fn apply(&mut self, entry: &Entry, hash: EntryHash) -> Result<(), String> {
        let verdict = self.check(entry);
        self.seq = entry.seq;
        self.hash = Some(hash);
        match &verdict {
            Ok(()) => self.take_in(entry),
            Err(reason) => {
                self.voids.push((entry.seq, reason.clone()));
                if let Body::Commit(body) = &entry.body {
                    self.adopt_void_commit(entry, body);
                }
            }
        }
        verdict
    }

    fn take_in(&mut self, entry: &Entry) {
        if entry.attestation == Attestation::Witnessed {
            self.end_silence(entry.seq, silence_before(entry.time, self.last_witnessed));
            self.witnessed.insert(entry.seq, entry.time);
            self.last_witnessed = self.last_witnessed.max(Some(entry.time));
            if std::mem::take(&mut self.lacks_witness) {
                for point in self.points.values_mut() {
                    if point.clock_alone && point.witnessed_since.is_none() {
                        point.witnessed_since = Some(entry.time);
                    }
                    if point.state == PointState::Expired && point.expired_at.is_none() {
                        point.expired_at = Some(entry.time);
                    }
                }
            }
        }
        match &entry.body {
            Body::Genesis(body) => {
                if body.format > FORMAT_VERSION {
                    let what = format!("repository format {}", body.format);
                    self.unknown = Some((entry.seq, what));
                }
                self.uid = Some(entry.customer);
                self.repository = Some(body.repository);
                self.customer_name = body.customer_name.clone();
                self.writers = body.writers;
                self.hosts.insert(body.host.host, body.host.clone());
            }
            Body::Host(body) => {
                self.hosts.insert(body.host, body.clone());
            }
            Body::Policy(body) => {
                if let Ok((terms, policy)) = parse_terms(&body.terms) {
                    self.terms_by = Some(entry.host);
                    self.written_terms.insert(entry.host, terms.clone());
                    self.set_policy(terms, policy, entry.time);
                }
            }
            Body::Key(body) => self.keys.push(body.clone()),
            Body::Seal(body) => self.installation = Some(body.installation),
            Body::Begin(body) => {
                let open = OpenSession {
                    host: entry.host,
                    purpose: body.purpose,
                    begun_at: entry.time,
                    seq: entry.seq,
                    vm: body.vm.clone(),
                    point: body.point,
                    expires_at: body.expires_at,
                    deadline: body.deadline,
                    witnessed_before: self.last_witnessed,
                    attestation: entry.attestation,
                };
                self.open.insert(body.session, open);
            }
            Body::Commit(body) => {
                let dating = self.dating(body);
                let has_others = self
                    .roots()
                    .any(|(_, point)| point.vm == body.vm && !point.void);
                self.adopt(&body.session, &body.segments, self.seen_at(entry));
                self.take_in_audit(body);
                let point = Point {
                    full_seq: self.full_below(body, entry.seq),
                    suspect: body.point_kind == PointKind::Incremental
                        && self.is_distrusted(&body.vm),
                    ..Point::new(entry, body, dating, false)
                };
                self.add_point(body.point, point);
                self.newest.insert(body.vm.clone(), body.point);
                // Nor is a clock believed that was behind.
                let taken = body.taken_at.max(dating.counted_from);
                let first = self.first_taken.entry(body.vm.clone()).or_insert(taken);
                // A name that is used anew owes no night before.
                *first = match has_others {
                    true => taken.min(*first),
                    false => taken,
                };
            }
            Body::Abort(body) => {
                self.open.remove(&body.session);
                self.aborted.insert(body.session);
            }
            Body::Expire(body) => {
                for row in &body.points {
                    if let Some(point) = self.points.get_mut(&row.point) {
                        point.state = PointState::Expired;
                        point.expired_at =
                            (entry.attestation == Attestation::Witnessed).then_some(entry.time);
                    }
                }
                self.lacks_witness |= entry.attestation != Attestation::Witnessed;
            }
            Body::Undo(body) => {
                for row in &body.points {
                    if let Some(point) = self.points.get_mut(&row.point) {
                        point.state = PointState::Live;
                        point.expired_at = None;
                    }
                }
            }
            Body::Erase(body) => {
                for row in &body.points {
                    if let Some(point) = self.points.get_mut(&row.point) {
                        point.state = PointState::Erased;
                        point.erase_seq = Some(entry.seq);
                        point.erased_at = Some(entry.time);
                    }
                }
            }
            Body::Merge(body) => {
                for name in &body.replaced {
                    self.segments.remove(name);
                }
                self.adopt(&body.session, &body.segments, self.seen_at(entry));
                for pack in &body.dropped {
                    self.condemned.remove(pack);
                }
            }
            Body::Condemn(body) => {
                if let Some(open) = self.open.get(&body.session) {
                    let copied = Copied {
                        begun: open.seq,
                        adopted: entry.seq,
                    };
                    self.copied.insert(body.session, copied);
                }
                self.adopt(&body.session, &body.segments, self.seen_at(entry));
                for pack in &body.packs {
                    let row = Condemned {
                        seq: entry.seq,
                        deleted: false,
                    };
                    self.condemned.insert(*pack, row);
                }
            }
            Body::Reclaimed(body) => {
                if let Some(session) = &body.session {
                    // It adopts nothing but the certificate.
                    self.open.remove(session);
                    self.aborted.insert(*session);
                }
                for pack in &body.deleted {
                    if let Some(row) = self.condemned.get_mut(pack) {
                        row.deleted = true;
                    }
                    self.verified.remove(pack);
                    self.damaged.retain(|(name, _)| name != pack);
                }
                self.take_in_marks(body);
                for point in &body.destroyed {
                    self.points.remove(point);
                }
                self.uncertified_packs.extend(&body.deleted);
                if let Some(certificate) = &body.certificate {
                    self.certificates.push(certificate.clone());
                    self.certified_at = entry.seq;
                    self.uncertified_packs.clear();
                }
            }
            Body::Verify(body) => {
                let (at, method) = (self.seen_at(entry), body.method);
                for pack in &body.packs {
                    self.verified.insert(*pack, Verified { at, method });
                }
                let frames = body.damaged.iter().map(|frame| (frame.pack, frame.tag));
                self.damaged.extend(frames);
            }
            Body::Clock(body) => match (body.event, body.seq) {
                (ClockEvent::Void, Some(seq)) => {
                    self.witnessed.remove(&seq);
                    self.last_witnessed = self.witnessed.values().max().copied();
                    self.date_points_anew(self.seen_at(entry));
                }
                (ClockEvent::Trusted, Some(since)) => self.believe_times(entry, since),
                _ => {}
            },
            Body::Restore(_) | Body::Checkpoint(_) => {}
            Body::Unknown { kind, why } => {
                if self.unknown.is_none() {
                    self.unknown = Some((entry.seq, format!("{kind}: {why}")));
                }
            }
        }
    }

    /// An operator vouches for a host's clock, and its uptime for what that clock said since it wrote the
    /// entry `since`: the restore points that it began from there on count from their own time.
    fn believe_times(&mut self, entry: &Entry, since: u64) {
        for point in self.points.values_mut() {
            let vouched = point.clock_alone
                && point.host == entry.host
                && point.begin_seq >= since
                && point.begun_at <= entry.time;
            if !vouched {
                continue;
            }
            (point.clock_alone, point.vouched_at) = (false, Some(entry.seq));
            point.counted_from = point.begun_at;
            if let Some(policy) = &self.policy {
                let fresh = expiry(policy, point.taken_at);
                point.expires_at = point.expires_at.max(fresh.expires_at);
                point.deadline = point.deadline.max(fresh.deadline);
            }
            // It went by a time that was not its own.
            if point.state == PointState::Expired && entry.time < point.expires_at {
                (point.state, point.expired_at) = (PointState::Live, None);
            }
        }
    }

    /// A time that was not true has counted for none of them. What was kept the longer for it goes as
    /// after a policy that shortens.
    fn date_points_anew(&mut self, at: Timestamp) {
        for (id, point) in &mut self.points {
            let stands = |seq: &u64| self.witnessed.contains_key(seq);
            let vouched = point.vouched_at.as_ref().is_some_and(stands);
            let told = stands(&point.begin_seq) && stands(&point.seq);
            point.clock_alone = !vouched && !told;
            if point.clock_alone {
                let before = self.witnessed.range(..=point.begin_seq);
                let before = before.map(|(_, at)| *at).max();
                point.counted_from = before.unwrap_or(point.begun_at);
                if let Some(policy) = &self.policy {
                    let facts = PointFacts {
                        taken_at: point.counted_from,
                        ..point.facts(id)
                    };
                    let fresh = after_policy_change(&facts, policy, at);
                    (point.expires_at, point.deadline) = (fresh.expires_at, fresh.deadline);
                }
            }
            if point.clock_alone {
                let mut after = self.witnessed.range(point.seq..);
                point.witnessed_since = after.next().map(|(_, at)| *at);
                self.lacks_witness |= point.witnessed_since.is_none();
            }
        }
        self.silences.clear();
        let mut last = None;
        for (seq, at) in self.witnessed.clone() {
            self.end_silence(seq, silence_before(at, last));
            last = last.max(Some(at));
        }
        self.shorten_marks();
    }

    /// That no time had been witnessed for so long when the entry `seq`, the last until now, was.
    fn end_silence(&mut self, seq: u64, silence: SignedDuration) {
        while let Some(last) = self.silences.last_entry()
            && *last.get() <= silence
        {
            last.remove();
        }
        self.silences.insert(seq, silence);
    }

    /// The longest time from one witnessed time to the next after an entry.
    fn silence_after(&self, seq: u64) -> SignedDuration {
        let mut after = self
            .silences
            .range((Bound::Excluded(seq), Bound::Unbounded));
        let longest = after.next().map(|(_, silence)| *silence);
        longest.unwrap_or_default().max(SignedDuration::ZERO)
    }

    fn add_point(&mut self, id: PointId, point: Point) {
        self.lacks_witness |= point.clock_alone && point.witnessed_since.is_none();
        self.points.insert(id, point);
    }

    /// What retention decides by, of each point.
    pub fn facts(&self) -> impl Iterator<Item = PointFacts> {
        let of_point = |(id, point): (&PointId, &Point)| PointFacts {
            silence: self.silence_after(point.seq),
            ..point.facts(id)
        };
        self.points.iter().map(of_point)
    }

    /// What the ledger says of time to a host that is about to write.
    pub fn clock_of(&self, host: &HostId) -> LedgerClock {
        LedgerClock {
            last_witnessed: self.last_witnessed,
            declared: self.hosts.get(host).map(|row| row.clock),
        }
    }

    /// The time of an entry, if the ledger's clock goes by it.
    pub fn witnessed_at(&self, seq: u64) -> Option<Timestamp> {
        self.witnessed.get(&seq).copied()
    }

    /// What the session that commits knew of the time when it began.
    fn dating(&self, body: &CommitBody) -> Dating {
        let open = self.open.get(&body.session);
        Dating {
            counted_from: open.map_or(body.taken_at, OpenSession::counted_from),
            begin_seq: open.map_or(self.seq, |open| open.seq),
            begun_at: open.map_or(body.taken_at, |open| open.begun_at),
            alone: open.is_some_and(|open| open.attestation == Attestation::Alone),
        }
    }

    /// When something was seen, at the latest that anybody can vouch for. A lone clock may be years ahead: what it
    /// dated would pass for freshly read until then.
    fn seen_at(&self, entry: &Entry) -> Timestamp {
        match (entry.attestation, self.last_witnessed) {
            (Attestation::Alone, Some(witnessed)) => witnessed.min(entry.time),
            _ => entry.time,
        }
    }

    fn adopt(&mut self, session: &SessionId, segments: &[SegmentName], at: Timestamp) {
        self.open.remove(session);
        self.born.insert(*session, at);
        self.segments
            .extend(segments.iter().map(|segment| (*segment, at)));
    }

    /// What is dead where. A pack's row stays until a row without dead bytes or the pack's deletion
    /// takes it away, so a large pass can be several entries, of which only the last moves
    /// `marked_at`. Everything here errs on one side: a pack with dead bytes may hold bytes of any
    /// erasure since, because frames also come back to life, so that their sum proves nothing.
    fn take_in_marks(&mut self, body: &ReclaimedBody) {
        let current = body.marked_at >= self.marked_at;
        for row in &body.marks {
            match self.marks.get_mut(&row.pack) {
                None if row.dead_bytes > 0 => {
                    self.marks.insert(row.pack, row.clone());
                }
                None => {}
                // A slower pass must not take back what a later one found.
                Some(_) if row.dead_bytes == 0 && current => {
                    self.marks.remove(&row.pack);
                }
                Some(known) => {
                    if current {
                        known.dead_bytes = row.dead_bytes;
                    }
                    known.earliest_deadline = known.earliest_deadline.min(row.earliest_deadline);
                    join(&mut known.erases, row.erases.iter().copied());
                }
            }
        }
        for pack in &body.deleted {
            self.marks.remove(pack);
        }
        let since = self.unmarked_erasures_until(body.marked_at);
        if let Some(earliest) = since.values().min() {
            for known in self.marks.values_mut() {
                known.earliest_deadline = known.earliest_deadline.min(*earliest);
                join(&mut known.erases, since.keys().copied());
            }
        }
        self.marked_at = self.marked_at.max(body.marked_at);
        let marked_at = self.marked_at;
        self.copied.retain(|_, copied| copied.adopted > marked_at);
    }

    /// As a `policy` entry of the time `at` does.
    pub fn set_policy(&mut self, terms: PolicyTerms, policy: Policy, at: Timestamp) {
        for (id, point) in &mut self.points {
            // What a lone clock said is no reason to erase it at once.
            let facts = PointFacts {
                taken_at: point.counted_from,
                ..point.facts(id)
            };
            let now = after_policy_change(&facts, &policy, at);
            point.expires_at = now.expires_at;
            point.deadline = now.deadline;
        }
        self.shorten_marks();
        let nights = policy.effective().restore_window_days;
        self.promised.promise(at, nights);
        self.terms = Some(terms);
        self.policy = Some(policy);
    }

    /// Which other host has replaced these terms since this one wrote them.
    pub fn overruled_by(&self, host: &HostId, terms: &PolicyTerms) -> Option<HostId> {
        let by = self.terms_by.filter(|by| by != host)?;
        (self.written_terms.get(host) == Some(terms)).then_some(by)
    }

    /// What erased points may have left goes by their deadlines when those become earlier.
    fn shorten_marks(&mut self) {
        let mut earliest: BTreeMap<u64, Timestamp> = BTreeMap::new();
        for point in self.points.values() {
            if let Some(seq) = point.erase_seq {
                let deadline = earliest.entry(seq).or_insert(point.deadline);
                *deadline = point.deadline.min(*deadline);
            }
        }
        for mark in self.marks.values_mut() {
            let of_points = mark.erases.iter().filter_map(|seq| earliest.get(seq));
            let of_points = of_points.copied().min();
            mark.earliest_deadline = of_points.map_or(mark.earliest_deadline, |deadline| {
                deadline.min(mark.earliest_deadline)
            });
        }
    }

    /// A commit that breaks a rule is still a root until its time is over: two versions that
    /// disagree on a rule must not make one of them condemn what the other one lists. Only after
    /// its session's abort is it nothing, because the objects were rightly removed.
    fn adopt_void_commit(&mut self, entry: &Entry, body: &CommitBody) {
        // Nor is it of anybody but the admitted host whose session it is: a stranger with access to
        // the store could close a living session and name segments that do not exist.
        let own = self
            .open
            .get(&body.session)
            .is_some_and(|open| open.host == entry.host);
        if !own || self.points.contains_key(&body.point) {
            return;
        }
        let dating = self.dating(body);
        self.adopt(&body.session, &body.segments, self.seen_at(entry));
        self.add_point(body.point, Point::new(entry, body, dating, true));
    }

    /// The hosts that made the points that are left, or are making some, and when each began with it.
    pub fn backed_up_by(&self) -> impl Iterator<Item = (&HostId, Timestamp)> {
        let points = self.points.values();
        let points = points.map(|point| (&point.host, point.begun_at));
        let open = self.open.values();
        points.chain(open.map(|open| (&open.host, open.begun_at)))
    }

    /// Points whose record must be there: live, or expired and not yet erased.
    pub fn roots(&self) -> impl Iterator<Item = (&PointId, &Point)> {
        self.points
            .iter()
            .filter(|(_, point)| point.state != PointState::Erased)
    }

    /// Points that commands list and restore.
    pub fn live(&self) -> impl Iterator<Item = (&PointId, &Point)> {
        self.points
            .iter()
            .filter(|(_, point)| point.state == PointState::Live && !point.void)
    }

    /// The newest committed point of a VM, if it can be built upon.
    pub fn base_of(&self, vm: &VmName) -> Option<(PointId, &Point)> {
        let id = *self.newest.get(vm)?;
        let point = self.points.get(&id)?;
        (point.state == PointState::Live).then_some((id, point))
    }

    /// Whether a condemned pack may be forgotten: it is deleted, and every open session began after
    /// it was condemned, so none has an index in which it was sound. Forgotten too early, it would
    /// pass for a born pack that nobody has condemned, and be committed upon.
    pub fn may_forget(&self, pack: &PackName) -> bool {
        let oldest = self.open.values().map(|open| open.seq).min();
        self.condemned
            .get(pack)
            .is_some_and(|row| row.deleted && oldest.is_none_or(|oldest| row.seq < oldest))
    }

    /// Whether nothing may rely on this pack any more.
    pub fn is_condemned(&self, pack: &PackName) -> bool {
        self.condemned.contains_key(pack)
    }

    /// When this pack was last known to be whole: its birth or a later verification.
    pub fn verified_at(&self, pack: &PackName) -> Option<Timestamp> {
        let born = self.born.get(&pack.session).copied();
        let verified = self.verified.get(pack).map(|row| row.at);
        born.max(verified)
    }

    /// Since when a session has been running, at the latest, as far as can be known: its host's
    /// clock may be wrong by years, in either direction.
    pub fn running_since(&self, open: &OpenSession) -> Timestamp {
        let after = self.witnessed.range(open.seq..).next().map(|(_, at)| *at);
        let began = match open.witnessed_before {
            Some(before) => open.begun_at.max(before),
            None => open.begun_at,
        };
        after.map_or(began, |after| began.min(after))
    }

    /// `erase` entries whose points left no mark yet, with the earliest deadline of each.
    pub fn unmarked_erasures(&self) -> BTreeMap<u64, Timestamp> {
        self.unmarked_erasures_until(u64::MAX)
    }

    /// Of those, the ones that a mark of the ledger up to `marked_at` has seen.
    pub fn unmarked_erasures_until(&self, marked_at: u64) -> BTreeMap<u64, Timestamp> {
        self.erasures_between(self.marked_at, marked_at)
    }

    /// `erase` entries up to `marked_at` whose bytes a reclaim's session may have copied, although
    /// an earlier mark has seen the entries: it is not known to have seen the copies.
    pub fn copied_erasures_until(
        &self,
        session: &SessionId,
        marked_at: u64,
    ) -> BTreeMap<u64, Timestamp> {
        match self.copied.get(session) {
            Some(copied) => self.erasures_between(copied.begun, marked_at),
            None => BTreeMap::new(),
        }
    }

    /// Whether reclaims up to `marked_at` copied what no mark has seen yet.
    pub fn has_unmarked_copies(&self, marked_at: u64) -> bool {
        self.copied
            .values()
            .any(|copied| copied.adopted <= marked_at)
    }

    fn erasures_between(&self, after: u64, until: u64) -> BTreeMap<u64, Timestamp> {
        let mut erasures: BTreeMap<u64, Timestamp> = BTreeMap::new();
        for point in self.points.values() {
            let between = |seq: &u64| *seq > after && *seq <= until;
            if let Some(seq) = point.erase_seq.filter(between) {
                let deadline = erasures.entry(seq).or_insert(point.deadline);
                *deadline = (*deadline).min(point.deadline);
            }
        }
        erasures
    }

    /// Erased points of which nothing is left, neither bytes nor tags.
    pub fn destroyed(&self) -> Vec<PointId> {
        // The tags of a condemned pack stand in the index until it is forgotten, and a merge under
        // way may have written them once more.
        let merging = |open: &OpenSession| open.purpose == Purpose::Merge;
        match self.condemned.is_empty() && !self.open.values().any(merging) {
            true => self.without_bytes(),
            false => Vec::new(),
        }
    }

    /// Erased points of which no byte is left, as far as the last mark and what came after it say.
    pub fn without_bytes(&self) -> Vec<PointId> {
        if self.condemned.values().any(|row| !row.deleted) {
            return Vec::new();
        }
        let left: BTreeSet<u64> = self
            .marks
            .values()
            .flat_map(|mark| mark.erases.iter().copied())
            .collect();
        // Whoever began to copy before the erasure may have copied what it erased.
        let reclaiming = self
            .open
            .values()
            .filter(|open| open.purpose == Purpose::Reclaim)
            .map(|open| open.seq);
        let copied = self.copied.values().map(|copied| copied.begun);
        let oldest_copy = reclaiming.chain(copied).min();
        let gone = |seq: u64| {
            seq <= self.marked_at
                && !left.contains(&seq)
                && oldest_copy.is_none_or(|begun| seq < begun)
        };
        self.points
            .iter()
            .filter(|(_, point)| point.state == PointState::Erased)
            .filter(|(_, point)| point.erase_seq.is_some_and(gone))
            .map(|(id, _)| *id)
            .collect()
    }
}

impl Point {
    /// What a policy dates it by; the ledger knows what [`State::facts`] has beside that.
    fn facts(&self, id: &PointId) -> PointFacts {
        PointFacts {
            point: *id,
            vm: self.vm.clone(),
            kind: self.kind,
            taken_at: self.taken_at,
            expires_at: self.expires_at,
            deadline: self.deadline,
            state: self.state,
            expired_at: self.expired_at,
            clock_alone: self.clock_alone,
            witnessed_since: self.witnessed_since,
            silence: SignedDuration::ZERO,
            suspect: self.suspect,
            void: self.void,
            held: false,
        }
    }

    fn new(entry: &Entry, body: &CommitBody, dating: Dating, void: bool) -> Self {
        let commit_alone = entry.attestation == Attestation::Alone;
        Point {
            vm: body.vm.clone(),
            kind: body.point_kind,
            session: body.session,
            base: body.base,
            taken_at: body.taken_at,
            counted_from: dating.counted_from,
            begin_seq: dating.begin_seq,
            host: entry.host,
            begun_at: dating.begun_at,
            vouched_at: None,
            expires_at: body.expires_at,
            deadline: body.deadline,
            disks: body.disks.clone(),
            stored_bytes: body.stored_bytes,
            record_hash: body.record_hash,
            seq: entry.seq,
            state: PointState::Live,
            expired_at: None,
            erase_seq: None,
            erased_at: None,
            // A clock may be set right between the two: then `taken_at` is still the wrong one's.
            clock_alone: commit_alone || dating.alone,
            witnessed_since: (dating.alone && !commit_alone).then_some(entry.time),
            consistency: body.consistency.clone(),
            notes: body.notes.clone(),
            void,
            full_seq: entry.seq,
            suspect: false,
        }
    }
}

fn parse_terms(terms: &BTreeMap<String, String>) -> Result<(PolicyTerms, Policy), String> {
    let fields = terms
        .iter()
        .map(|(key, value)| (key.clone(), serde_json::Value::from(value.as_str())))
        .collect();
    let terms: PolicyTerms = serde_json::from_value(serde_json::Value::Object(fields))
        .map_err(|error| error.to_string())?;
    let policy = Policy::parse(&terms).map_err(|error| error.to_string())?;
    Ok((terms, policy))
}
