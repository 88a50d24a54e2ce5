//! What makes an entry void, rule by rule: as somebody would write it who keeps to none.

use super::{State, is_checkpoint_due};
use crate::format::entry::{
    AbortBody, Attestation, BeginBody, Body, CertificateRef, ClockDeclaration, CommitBody,
    CondemnBody, DamagedFrame, Entry, GenesisBody, HostBody, MergeBody, PackMark, PointReason,
    PointsBody, Purpose, ReclaimedBody, Role, VerifyBody, VerifyMethod, packs_hash,
};
use crate::format::repository_file::FORMAT_VERSION;
use crate::model::{
    CustomerUid, EntryHash, HostId, ObjectHash, PackName, PointId, PointKind, PointState,
    RepositoryId, SegmentName, SessionId, Tag, VmName, Writers,
};
use jiff::{SignedDuration, Timestamp};
use std::collections::BTreeMap;

const HOST: HostId = HostId::from_bytes([1; 32]);
const OTHER: HostId = HostId::from_bytes([2; 32]);
const SECOND: SignedDuration = SignedDuration::from_secs(1);

fn start() -> Timestamp {
    Timestamp::from_second(1_800_000_000).unwrap()
}

fn session(number: u8) -> SessionId {
    SessionId::from_bytes([number; 16])
}

fn point(number: u8) -> PointId {
    PointId::from_bytes([number; 16])
}

fn pack(of: u8, number: u8) -> PackName {
    let hash = ObjectHash::from_bytes([number; 32]);
    PackName {
        session: session(of),
        hash,
    }
}

fn segment(of: u8, number: u8) -> SegmentName {
    let hash = ObjectHash::from_bytes([number; 32]);
    SegmentName {
        session: session(of),
        hash,
    }
}

fn host(host: HostId) -> HostBody {
    HostBody {
        host,
        name: "host".to_string(),
        recipient: String::new(),
        roles: vec![Role::Backup, Role::Restore, Role::Prune, Role::Admin],
        clock: ClockDeclaration::Trusted,
    }
}

fn genesis(by: HostId) -> Body {
    Body::Genesis(GenesisBody {
        format: 1,
        repository: RepositoryId::from_bytes([2; 16]),
        customer_name: "acme".to_string(),
        host: host(by),
        writers: Writers::Many,
    })
}

fn begin(number: u8, purpose: Purpose, names: Option<(&str, u8)>) -> Body {
    Body::Begin(BeginBody {
        session: session(number),
        purpose,
        vm: names.map(|(vm, _)| VmName::new(vm).unwrap()),
        point: names.map(|(_, number)| point(number)),
        expires_at: None,
        deadline: None,
    })
}

fn points(numbers: &[u8]) -> PointsBody {
    let row = |number: &u8| PointReason {
        point: point(*number),
        reason: String::new(),
    };
    PointsBody {
        points: numbers.iter().map(row).collect(),
    }
}

fn merge(number: u8, segments: Vec<SegmentName>, replaced: Vec<SegmentName>) -> MergeBody {
    MergeBody {
        session: session(number),
        segments,
        replaced,
        dropped: Vec::new(),
    }
}

fn condemn(number: u8, packs: Vec<PackName>, segments: Vec<SegmentName>) -> Body {
    Body::Condemn(CondemnBody {
        session: session(number),
        packs,
        segments,
    })
}

fn reclaimed() -> ReclaimedBody {
    ReclaimedBody {
        session: None,
        marked_at: 0,
        deleted: Vec::new(),
        marks: Vec::new(),
        certificate: None,
        destroyed: Vec::new(),
    }
}

/// A ledger of two hosts that may do everything; an entry a second.
struct Book {
    state: State,
    by: HostId,
}

impl Book {
    fn new() -> Self {
        let state = State::default();
        let mut book = Book { state, by: HOST };
        book.enter(genesis(HOST)).unwrap();
        book.enter(Body::Host(host(OTHER))).unwrap();
        book
    }

    /// The time of the next entry.
    fn now(&self) -> Timestamp {
        start() + SECOND * i32::try_from(self.state.seq).unwrap()
    }

    fn next(&self, body: Body) -> Entry {
        Entry {
            seq: self.state.seq + 1,
            prev: EntryHash::from_bytes([0; 32]),
            customer: CustomerUid::from_bytes([3; 16]),
            time: self.now(),
            attestation: Attestation::Witnessed,
            host: self.by,
            body,
        }
    }

    fn enter(&mut self, body: Body) -> Result<(), String> {
        let entry = self.next(body);
        self.state.apply(&entry, EntryHash::from_bytes([0; 32]))
    }

    fn enter_all(&mut self, bodies: impl IntoIterator<Item = Body>) {
        for body in bodies {
            self.enter(body).unwrap();
        }
    }

    fn allows(&self, body: Body) -> bool {
        self.state.check(&self.next(body)).is_ok()
    }

    /// The commit of an open session that keeps to all rules: its point expires in a minute.
    fn commit(&self, number: u8) -> CommitBody {
        let open = &self.state.open[&session(number)];
        CommitBody {
            session: session(number),
            vm: open.vm.clone().unwrap(),
            point: open.point.unwrap(),
            record_hash: ObjectHash::from_bytes([0; 32]),
            point_kind: PointKind::Full,
            base: None,
            taken_at: open.begun_at,
            expires_at: self.now() + SECOND * 60,
            deadline: self.now() + SECOND * 120,
            disks: Vec::new(),
            stored_bytes: 0,
            pack_count: 0,
            packs_hash: packs_hash([]),
            segments: vec![segment(number, 1)],
            consistency: "crash".to_string(),
            notes: Vec::new(),
            audit: None,
        }
    }

    /// A point of that number, of the session of that number.
    fn back_up(&mut self, number: u8) {
        let names = Some(("web01", number));
        self.enter(begin(number, Purpose::Backup, names)).unwrap();
        let commit = self.commit(number);
        self.enter(Body::Commit(commit)).unwrap();
    }

    fn erase(&mut self, number: u8) {
        self.enter(Body::Expire(points(&[number]))).unwrap();
        self.enter(Body::Erase(points(&[number]))).unwrap();
    }

    /// The number of the last entry.
    fn end(&self) -> u64 {
        self.state.seq
    }

    /// Says that a mark has seen the ledger up to there, and what it found.
    fn mark(&mut self, marked_at: u64, marks: &[PackMark]) {
        let body = ReclaimedBody {
            marked_at,
            marks: marks.to_vec(),
            ..reclaimed()
        };
        self.enter(Body::Reclaimed(body)).unwrap();
    }

    fn state_of(&self, number: u8) -> PointState {
        self.state.points[&point(number)].state
    }
}

#[test]
fn a_genesis_is_the_first_entry_and_of_the_host_that_it_names() {
    assert!(!Book::new().allows(genesis(HOST)));
    let empty = Book {
        state: State::default(),
        by: OTHER,
    };
    assert!(!empty.allows(genesis(HOST)));
    assert!(empty.allows(genesis(OTHER)));
}

#[test]
fn a_repository_of_a_later_format_is_read_and_not_written() {
    let mut book = Book {
        state: State::default(),
        by: HOST,
    };
    let Body::Genesis(mut body) = genesis(HOST) else {
        unreachable!()
    };
    body.format = FORMAT_VERSION + 1;
    book.enter(Body::Genesis(body)).unwrap();
    assert!(book.state.unknown.is_some());
    assert!(Book::new().state.unknown.is_none());
}

#[test]
fn a_session_begins_once_whatever_became_of_it() {
    let mut book = Book::new();
    let again = |number| begin(number, Purpose::Reclaim, None);
    book.back_up(1);
    book.enter_all([again(2), again(3)]);
    book.enter(Body::Abort(AbortBody {
        session: session(3),
        reason: String::new(),
    }))
    .unwrap();
    let begins = [1, 2, 3, 4].map(|number| book.allows(again(number)));
    assert_eq!(begins, [false, false, false, true]);
}

#[test]
fn a_backup_names_a_point_of_its_own_and_nothing_else_names_one() {
    let mut book = Book::new();
    book.back_up(1);
    book.enter(begin(2, Purpose::Backup, Some(("web01", 2))))
        .unwrap();
    let backup = |number| begin(9, Purpose::Backup, Some(("web01", number)));
    let begins = [1, 2, 3].map(|number| book.allows(backup(number)));
    assert_eq!(begins, [false, false, true]);
    assert!(!book.allows(begin(9, Purpose::Backup, None)));
    assert!(!book.allows(begin(9, Purpose::Merge, Some(("web01", 3)))));
    assert!(book.allows(begin(9, Purpose::Merge, None)));
}

#[test]
fn a_point_goes_from_live_to_expired_to_erased_and_skips_nothing() {
    let mut book = Book::new();
    book.back_up(1);
    let allowed = |book: &Book| {
        let bodies = [Body::Expire, Body::Undo, Body::Erase];
        let destroyed = vec![point(1)];
        let gone = Body::Reclaimed(ReclaimedBody {
            destroyed,
            ..reclaimed()
        });
        let [expire, undo, erase] = bodies.map(|body| book.allows(body(points(&[1]))));
        [expire, undo, erase, book.allows(gone)]
    };
    assert_eq!(allowed(&book), [true, false, false, false]);
    book.enter(Body::Expire(points(&[1]))).unwrap();
    assert_eq!(allowed(&book), [false, true, true, false]);
    book.enter(Body::Erase(points(&[1]))).unwrap();
    assert_eq!(allowed(&book), [false, false, false, true]);
}

#[test]
fn an_undo_comes_before_the_point_expires() {
    let mut book = Book::new();
    book.back_up(1);
    book.enter(Body::Expire(points(&[1]))).unwrap();
    let mut entry = book.next(Body::Undo(points(&[1])));
    let expires_at = book.state.points[&point(1)].expires_at;
    for (time, allowed) in [(expires_at - SECOND, true), (expires_at, false)] {
        entry.time = time;
        assert_eq!(book.state.check(&entry).is_ok(), allowed);
    }
}

#[test]
fn the_wait_after_an_expiry_by_a_lone_clock_begins_with_the_next_witnessed_entry() {
    let mut book = Book::new();
    book.back_up(1);
    book.back_up(2);
    let mut entry = book.next(Body::Expire(points(&[1])));
    entry.attestation = Attestation::Alone;
    let hash = EntryHash::from_bytes([0; 32]);
    book.state.apply(&entry, hash).unwrap();
    let expired_at = |book: &Book| [1, 2].map(|of| book.state.points[&point(of)].expired_at);
    assert_eq!(expired_at(&book), [None, None]);
    let witnessed = book.now();
    book.mark(1, &[]);
    assert_eq!(expired_at(&book), [Some(witnessed), None]);
    book.mark(1, &[]);
    assert_eq!(expired_at(&book), [Some(witnessed), None]);
}

#[test]
fn an_entry_names_a_point_once_and_none_that_nobody_knows() {
    let mut book = Book::new();
    book.back_up(1);
    book.back_up(2);
    assert!(!book.allows(Body::Expire(points(&[1, 2, 1]))));
    assert!(!book.allows(Body::Expire(points(&[1, 3]))));
    assert!(book.allows(Body::Expire(points(&[1, 2]))));
}

#[test]
fn only_the_host_of_a_session_of_that_purpose_uses_it_while_it_is_open() {
    let mut book = Book::new();
    book.enter_all([
        begin(1, Purpose::Merge, None),
        begin(2, Purpose::Reclaim, None),
    ]);
    let merging = |number| Body::Merge(merge(number, Vec::new(), Vec::new()));
    assert!(book.allows(merging(1)));
    assert!(!book.allows(merging(2)));
    assert!(!book.allows(merging(3)));
    book.by = OTHER;
    assert!(!book.allows(merging(1)));
}

#[test]
fn a_merge_replaces_current_segments_by_new_ones_of_its_own() {
    let mut book = Book::new();
    book.back_up(1);
    book.enter(begin(2, Purpose::Merge, None)).unwrap();
    let own = vec![segment(2, 1)];
    let merging = |new: &[SegmentName], old| Body::Merge(merge(2, new.to_vec(), vec![old]));
    assert!(!book.allows(merging(&own, segment(1, 2))));
    assert!(!book.allows(merging(&[segment(1, 2)], segment(1, 1))));
    assert!(book.allows(merging(&own, segment(1, 1))));
}

#[test]
fn a_pack_is_forgotten_once_it_is_deleted_and_nobody_runs_who_may_rely_on_it() {
    let mut book = Book::new();
    book.back_up(1);
    book.enter_all([
        begin(2, Purpose::Reclaim, None),
        begin(3, Purpose::Merge, None),
        condemn(2, vec![pack(1, 1)], Vec::new()),
    ]);
    let forget = |number| {
        let mut body = merge(number, Vec::new(), Vec::new());
        body.dropped = vec![pack(1, 1)];
        Body::Merge(body)
    };
    let deleted = ReclaimedBody {
        deleted: vec![pack(1, 1)],
        ..reclaimed()
    };
    book.enter(Body::Reclaimed(deleted)).unwrap();
    // This merge began before the pack was condemned.
    assert!(!book.allows(forget(3)));
    book.enter(Body::Merge(merge(3, Vec::new(), Vec::new())))
        .unwrap();
    book.enter(begin(4, Purpose::Merge, None)).unwrap();
    assert!(book.allows(forget(4)));
    // One that nobody condemned.
    let mut body = merge(4, Vec::new(), Vec::new());
    body.dropped = vec![pack(1, 2)];
    assert!(!book.allows(Body::Merge(body)));
}

#[test]
fn a_reclaim_condemns_no_pack_of_its_own_and_only_what_is_condemned_is_deleted() {
    let mut book = Book::new();
    book.back_up(1);
    book.enter(begin(2, Purpose::Reclaim, None)).unwrap();
    assert!(!book.allows(condemn(2, vec![pack(1, 1), pack(2, 1)], Vec::new())));
    assert!(!book.allows(condemn(2, vec![pack(1, 1)], vec![segment(1, 2)])));
    let deleted = Body::Reclaimed(ReclaimedBody {
        deleted: vec![pack(1, 1)],
        ..reclaimed()
    });
    assert!(!book.allows(deleted.clone()));
    book.enter(condemn(2, vec![pack(1, 1)], vec![segment(2, 1)]))
        .unwrap();
    assert!(book.allows(deleted));
}

#[test]
fn what_was_found_of_a_pack_is_forgotten_when_it_is_deleted_and_of_no_other() {
    let mut book = Book::new();
    book.back_up(1);
    let packs = vec![pack(1, 1), pack(1, 2)];
    let tag = Tag::from_bytes([5; 16]);
    let damaged = packs.iter().map(|pack| DamagedFrame { pack: *pack, tag });
    let verify = VerifyBody {
        method: VerifyMethod::Opened,
        packs: packs.clone(),
        damaged: damaged.collect(),
    };
    book.enter_all([
        Body::Verify(verify),
        begin(2, Purpose::Reclaim, None),
        condemn(2, packs.clone(), Vec::new()),
        Body::Reclaimed(ReclaimedBody {
            deleted: vec![packs[0]],
            ..reclaimed()
        }),
    ]);
    assert_eq!(Vec::from_iter(&book.state.damaged), [&(packs[1], tag)]);
    assert_eq!(Vec::from_iter(book.state.verified.keys()), [&packs[1]]);
}

#[test]
fn a_pack_was_whole_when_it_was_born_and_when_it_was_last_read() {
    let mut book = Book::new();
    book.back_up(1);
    let verified_at = |book: &Book| book.state.verified_at(&pack(1, 1));
    let born = book.state.born[&session(1)];
    assert_eq!(verified_at(&book), Some(born));
    assert_eq!(book.state.verified_at(&pack(2, 1)), None);
    let read = book.now();
    book.enter(Body::Verify(VerifyBody {
        method: VerifyMethod::Checksum,
        packs: vec![pack(1, 1)],
        damaged: Vec::new(),
    }))
    .unwrap();
    assert_eq!(verified_at(&book), Some(read));
}

#[test]
fn what_a_lone_clock_dates_was_seen_when_a_time_was_last_witnessed() {
    let year = SECOND * (365 * 24 * 3600);
    for wrong_by in [year, -year] {
        let mut book = Book::new();
        book.back_up(1);
        let by_a_lone_clock = |book: &mut Book, body: Body| {
            let mut entry = book.next(body);
            entry.time += wrong_by;
            entry.attestation = Attestation::Alone;
            let hash = EntryHash::from_bytes([0; 32]);
            book.state.apply(&entry, hash).unwrap();
            entry.time
        };
        let names = Some(("web01", 2));
        let witnessed = book.state.last_witnessed.unwrap();
        by_a_lone_clock(&mut book, begin(2, Purpose::Backup, names));
        let commit = book.commit(2);
        let dated = by_a_lone_clock(&mut book, Body::Commit(commit));
        let believed = witnessed.min(dated);
        assert_eq!(book.state.born[&session(2)], believed);
        let read = Body::Verify(VerifyBody {
            method: VerifyMethod::Checksum,
            packs: vec![pack(1, 1)],
            damaged: Vec::new(),
        });
        let dated = by_a_lone_clock(&mut book, read);
        let verified = book.state.verified[&pack(1, 1)].at;
        assert_eq!(verified, witnessed.min(dated));
        // A time that is witnessed again counts.
        let right = book.now();
        book.enter(Body::Verify(VerifyBody {
            method: VerifyMethod::Checksum,
            packs: vec![pack(1, 1)],
            damaged: Vec::new(),
        }))
        .unwrap();
        assert_eq!(book.state.verified_at(&pack(1, 1)), Some(right));
    }
}

#[test]
fn a_certificate_needs_a_session_to_prove_in() {
    let mut book = Book::new();
    book.enter_all([
        begin(1, Purpose::Prove, None),
        begin(2, Purpose::Reclaim, None),
    ]);
    let certified = |by: Option<u8>| {
        let hash = ObjectHash::from_bytes([0; 32]);
        Body::Reclaimed(ReclaimedBody {
            session: by.map(session),
            certificate: Some(CertificateRef {
                id: String::new(),
                hash,
                signature_hash: hash,
            }),
            ..reclaimed()
        })
    };
    let allowed = [None, Some(2), Some(1)].map(|by| book.allows(certified(by)));
    assert_eq!(allowed, [false, false, true]);
}

/// Whether the commit of session 2 stands when it breaks this rule, and one when it does not.
fn stands_when(spoil: impl Fn(&Book, &mut CommitBody)) -> bool {
    let mut book = Book::new();
    book.back_up(1);
    book.enter(begin(2, Purpose::Backup, Some(("web01", 2))))
        .unwrap();
    let mut commit = book.commit(2);
    commit.base = Some(point(1));
    assert!(book.allows(Body::Commit(commit.clone())));
    spoil(&book, &mut commit);
    book.allows(Body::Commit(commit))
}

#[test]
fn a_commit_is_of_the_point_and_the_vm_that_its_session_began() {
    assert!(!stands_when(|_, commit| commit.point = point(3)));
    assert!(!stands_when(
        |_, commit| commit.vm = VmName::new("db").unwrap()
    ));
    assert!(!stands_when(|_, commit| commit.base = Some(point(3))));
    assert!(!stands_when(|_, commit| commit
        .segments
        .push(segment(1, 2))));
}

#[test]
fn a_point_is_taken_inside_of_its_session_and_expires_before_its_deadline() {
    let at = |book: &Book, seconds: i32| book.state.open[&session(2)].begun_at + SECOND * seconds;
    let taken = |seconds| stands_when(|book, commit| commit.taken_at = at(book, seconds));
    assert_eq!([-1, 0, 1, 2].map(taken), [false, true, true, false]);
    let expires =
        |seconds| stands_when(|_, commit| commit.expires_at = commit.deadline + SECOND * seconds);
    assert_eq!([-1, 0, 1].map(expires), [true, true, false]);
}

#[test]
fn the_base_of_a_commit_is_live() {
    let mut book = Book::new();
    book.back_up(1);
    book.enter_all([
        begin(2, Purpose::Backup, Some(("web01", 2))),
        Body::Expire(points(&[1])),
    ]);
    let mut commit = book.commit(2);
    commit.base = Some(point(1));
    assert!(!book.allows(Body::Commit(commit)));
}

/// Enters a commit that breaks a rule, by `host`; whether its point is a root all the same.
fn is_root_when_void(host: HostId, spoil: impl Fn(&mut CommitBody)) -> bool {
    let mut book = Book::new();
    book.back_up(1);
    book.enter(begin(2, Purpose::Backup, Some(("web01", 2))))
        .unwrap();
    let mut commit = book.commit(2);
    commit.expires_at = commit.deadline + SECOND;
    spoil(&mut commit);
    let (before, named) = (book.state.points.clone(), commit.point);
    book.by = host;
    book.enter(Body::Commit(commit)).unwrap_err();
    assert_eq!(book.state.points.get(&point(1)), before.get(&point(1)));
    assert_eq!(book.state.live().count(), 1);
    let roots: Vec<_> = book.state.roots().map(|(id, _)| *id).collect();
    roots.contains(&named) && named != point(1)
}

#[test]
fn a_void_commit_is_a_root_if_it_is_of_its_sessions_host_and_takes_no_point_of_another() {
    assert!(is_root_when_void(HOST, |_| {}));
    assert!(!is_root_when_void(OTHER, |_| {}));
    assert!(!is_root_when_void(HOST, |commit| commit.point = point(1)));
    assert!(!is_root_when_void(HOST, |commit| commit.session = session(9)));
}

#[test]
fn an_erased_point_is_no_root_and_no_base() {
    let mut book = Book::new();
    book.back_up(1);
    book.back_up(2);
    let roots = |book: &Book| book.state.roots().count();
    let vm = VmName::new("web01").unwrap();
    assert_eq!(book.state.base_of(&vm).map(|(id, _)| id), Some(point(2)));
    book.enter(Body::Expire(points(&[2]))).unwrap();
    assert_eq!((roots(&book), book.state_of(2)), (2, PointState::Expired));
    assert!(book.state.base_of(&vm).is_none());
    book.enter(Body::Erase(points(&[2]))).unwrap();
    assert_eq!(roots(&book), 1);
    book.erase(1);
    assert_eq!(roots(&book), 0);
}

#[test]
fn the_first_point_of_a_vm_counts_until_the_vm_has_none_and_gets_another() {
    let mut book = Book::new();
    let vm = VmName::new("web01").unwrap();
    let first = |book: &Book| book.state.first_taken[&vm];
    let taken = |book: &Book, number| book.state.points[&point(number)].taken_at;
    book.back_up(1);
    book.back_up(2);
    book.erase(1);
    book.back_up(3);
    assert_eq!(first(&book), taken(&book, 1));
    book.erase(2);
    book.erase(3);
    // Until then its nights stay owed.
    assert_eq!(first(&book), taken(&book, 1));
    book.back_up(4);
    assert_eq!(first(&book), taken(&book, 4));
}

/// What a mark says of a pack whose dead bytes are of these erasures.
fn row(dead_bytes: u64, erases: &[u64]) -> PackMark {
    PackMark {
        pack: pack(1, 1),
        dead_bytes,
        earliest_deadline: start() + SECOND * 10_000,
        erases: erases.to_vec(),
    }
}

#[test]
fn an_erasure_is_unmarked_until_a_mark_has_seen_its_entry() {
    let mut book = Book::new();
    book.back_up(1);
    book.back_up(2);
    book.enter(Body::Expire(points(&[1, 2]))).unwrap();
    book.enter(Body::Erase(points(&[1, 2]))).unwrap();
    let erased = book.end();
    // Of the points of one entry the earliest deadline counts.
    let expected = BTreeMap::from([(erased, book.state.points[&point(1)].deadline)]);
    let unmarked = |book: &Book| book.state.unmarked_erasures();
    book.mark(erased - 1, &[]);
    assert_eq!(unmarked(&book), expected);
    let until = |seq| book.state.unmarked_erasures_until(seq);
    assert_eq!(until(erased), expected);
    assert!(until(erased - 1).is_empty());
    book.mark(erased, &[]);
    assert!(unmarked(&book).is_empty());
}

#[test]
fn a_pack_without_dead_bytes_has_no_row() {
    let mut book = Book::new();
    book.mark(book.end(), &[row(0, &[])]);
    assert!(book.state.marks.is_empty());
    book.mark(book.end(), &[row(5, &[2])]);
    assert_eq!(book.state.marks[&pack(1, 1)], row(5, &[2]));
    book.mark(book.end(), &[row(0, &[])]);
    assert!(book.state.marks.is_empty());
}

#[test]
fn what_was_erased_is_gone_when_a_mark_says_so_of_every_pack() {
    let mut book = Book::new();
    book.back_up(1);
    book.back_up(2);
    book.erase(1);
    let erased = book.end();
    let gone = |book: &Book| book.state.without_bytes();
    book.mark(erased - 1, &[]);
    assert_eq!(gone(&book), []);
    book.mark(erased, &[row(5, &[erased])]);
    assert_eq!(gone(&book), []);
    book.mark(erased, &[row(0, &[])]);
    assert_eq!(gone(&book), [point(1)]);
    assert_eq!(book.state.destroyed(), [point(1)]);
    // A merge under way may write its tags once more; a backup does not.
    book.enter(begin(3, Purpose::Backup, Some(("web01", 3))))
        .unwrap();
    assert_eq!(book.state.destroyed(), [point(1)]);
    book.enter(begin(4, Purpose::Merge, None)).unwrap();
    assert_eq!(book.state.destroyed(), []);
    assert_eq!(gone(&book), [point(1)]);
}

#[test]
fn what_a_reclaim_may_have_copied_is_not_gone_until_a_mark_has_seen_the_copy() {
    let mut book = Book::new();
    book.back_up(1);
    book.back_up(2);
    book.erase(1);
    let before = book.end();
    book.enter(begin(3, Purpose::Reclaim, None)).unwrap();
    book.erase(2);
    let after = book.end();
    book.mark(after, &[]);
    let gone = |book: &Book| book.state.without_bytes();
    assert_eq!(gone(&book), [point(1)]);
    book.enter(condemn(3, vec![pack(1, 1)], Vec::new()))
        .unwrap();
    let copied = book.end();
    let unseen = [copied - 1, copied].map(|seq| book.state.has_unmarked_copies(seq));
    assert_eq!(unseen, [false, true]);
    let of = |number, until| {
        let erasures = book.state.copied_erasures_until(&session(number), until);
        erasures.into_keys().collect::<Vec<u64>>()
    };
    assert_eq!(of(3, copied), [after]);
    assert!(of(3, before).is_empty());
    assert!(of(2, copied).is_empty());
    // Of what is condemned and not yet deleted nothing is gone.
    assert_eq!(gone(&book), []);
    let deleted = ReclaimedBody {
        marked_at: copied - 1,
        deleted: vec![pack(1, 1)],
        ..reclaimed()
    };
    book.enter(Body::Reclaimed(deleted)).unwrap();
    assert_eq!(gone(&book), [point(1)]);
    book.mark(copied, &[]);
    assert!(!book.state.has_unmarked_copies(u64::MAX));
    assert_eq!(gone(&book), [point(1), point(2)]);
    // Its tags are in the index until it is forgotten.
    assert_eq!(book.state.destroyed(), []);
}

#[test]
fn a_checkpoint_reads_back_as_the_state_that_it_was_made_of() {
    let mut book = Book::new();
    book.back_up(1);
    book.back_up(2);
    book.erase(1);
    let abort = AbortBody {
        session: session(4),
        reason: String::new(),
    };
    let verify = VerifyBody {
        method: VerifyMethod::Opened,
        packs: vec![pack(1, 1)],
        damaged: vec![DamagedFrame {
            pack: pack(1, 1),
            tag: Tag::from_bytes([5; 16]),
        }],
    };
    book.enter_all([
        begin(3, Purpose::Reclaim, None),
        begin(4, Purpose::Prove, None),
        Body::Abort(abort),
        Body::Verify(verify),
        condemn(3, vec![pack(1, 1)], vec![segment(3, 1)]),
        begin(5, Purpose::Backup, Some(("db", 5))),
    ]);
    book.mark(3, &[row(7, &[3, 5])]);
    book.enter(genesis(HOST)).unwrap_err();
    let state = &book.state;
    assert!(!state.damaged.is_empty() && !state.aborted.is_empty() && !state.voids.is_empty());
    let kept = state.to_checkpoint().unwrap();
    assert!(State::from_checkpoint(&kept).as_ref() == Some(state));
}

#[test]
fn a_longer_ledger_is_written_down_less_often_and_never_leaves_many_entries_to_read() {
    let due_after = |kept: u64| (0..).find(|more| is_checkpoint_due(kept, kept + more));
    assert_eq!(due_after(0), Some(10));
    assert_eq!(due_after(12_800), Some(110));
    assert_eq!(due_after(10_000_000), Some(200));
    assert!(!is_checkpoint_due(20, 10));
}
