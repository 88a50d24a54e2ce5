//! What the audits of fulls say of points and of tracking. Derived from valid commits alone, and
//! without a part in what is valid.

use super::state::{Point, State};
use crate::format::entry::{AuditBody, CommitBody};
use crate::model::{DiskName, PointKind, VmName};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Changes that the tracking of a disk hid, as the last audit found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hidden {
    pub bytes: u64,
    /// When the full was taken that found it.
    pub found_at: Timestamp,
}

impl State {
    /// Whether the last audit of the VM differed: what tracking says is not enough for an
    /// incremental.
    pub fn is_distrusted(&self, vm: &VmName) -> bool {
        self.distrusted.contains_key(vm)
    }

    /// The entry of the full that a point of this commit, of entry `seq`, stands on.
    pub(super) fn full_below(&self, body: &CommitBody, seq: u64) -> u64 {
        let base = body.base.or_else(|| self.newest.get(&body.vm).copied());
        match (
            body.point_kind,
            base.and_then(|base| self.points.get(&base)),
        ) {
            (PointKind::Incremental, Some(base)) => base.full_seq,
            _ => seq,
        }
    }

    /// Takes in what a full says of tracking. Called before its point becomes the VM's newest.
    pub(super) fn take_in_audit(&mut self, body: &CommitBody) {
        if body.point_kind != PointKind::Full {
            return;
        }
        let mut disks = self.distrusted.remove(&body.vm).unwrap_or_default();
        if let Some(audit) = &body.audit {
            // Of the nights between an older point and the newest one a clean audit says nothing.
            let counts = self.newest.get(&body.vm) == Some(&audit.against);
            for disk in &audit.disks {
                match disk.differing_bytes {
                    0 if counts => {
                        disks.remove(&disk.name);
                    }
                    0 => {}
                    bytes => {
                        let found_at = body.taken_at;
                        disks.insert(disk.name.clone(), Hidden { bytes, found_at });
                    }
                }
            }
            self.suspect_week(&body.vm, audit);
        }
        let there = |name: &DiskName| body.disks.iter().any(|disk| disk.name == *name);
        disks.retain(|name, _| there(name));
        if !disks.is_empty() {
            self.distrusted.insert(body.vm.clone(), disks);
        }
    }

    /// What differs was hidden after the full that `against` stands on, which holds what was read:
    /// any incremental on that full may lack it, and no other point.
    fn suspect_week(&mut self, vm: &VmName, audit: &AuditBody) {
        if audit.disks.iter().all(|disk| disk.differing_bytes == 0) {
            return;
        }
        let Some(full_seq) = self.points.get(&audit.against).map(|point| point.full_seq) else {
            return;
        };
        let lacks = |point: &Point| {
            point.vm == *vm
                && point.kind == PointKind::Incremental
                && point.full_seq == full_seq
                && !point.void
        };
        for point in self.points.values_mut().filter(|point| lacks(point)) {
            point.suspect = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::entry::{
        Attestation, AuditedDisk, BeginBody, Body, ClockDeclaration, DiskBody, Entry, GenesisBody,
        HostBody, Purpose, Role, packs_hash,
    };
    use crate::model::{
        CustomerUid, EntryHash, HostId, ObjectHash, PointId, RepositoryId, SessionId, Writers,
    };

    /// A ledger of commits and nothing else.
    struct Book {
        state: State,
        seq: u64,
        /// The next commit breaks a rule.
        spoiled: bool,
    }

    const HOST: HostId = HostId::from_bytes([1; 32]);

    fn name(name: &str) -> DiskName {
        DiskName::new(name).unwrap()
    }

    fn vm() -> VmName {
        VmName::new("web01").unwrap()
    }

    fn point(number: u8) -> PointId {
        PointId::from_bytes([number; 16])
    }

    impl Book {
        fn new() -> Self {
            let mut book = Book {
                state: State::default(),
                seq: 0,
                spoiled: false,
            };
            let host = HostBody {
                host: HOST,
                name: "host".to_string(),
                recipient: String::new(),
                roles: vec![Role::Backup],
                clock: ClockDeclaration::Trusted,
            };
            let genesis = GenesisBody {
                format: 1,
                repository: RepositoryId::from_bytes([2; 16]),
                customer_name: "acme".to_string(),
                host,
                writers: Writers::Many,
            };
            book.enter(Body::Genesis(genesis)).unwrap();
            book
        }

        fn enter(&mut self, body: Body) -> Result<(), String> {
            self.seq += 1;
            let entry = Entry {
                seq: self.seq,
                prev: EntryHash::from_bytes([0; 32]),
                customer: CustomerUid::from_bytes([3; 16]),
                time: Timestamp::from_second(1_800_000_000 + self.seq as i64).unwrap(),
                attestation: Attestation::Witnessed,
                host: HOST,
                body,
            };
            self.state.apply(&entry, EntryHash::from_bytes([0; 32]))
        }

        /// A full (`base`: none) or an incremental, of the disks vda and vdb unless said otherwise.
        fn commit(
            &mut self,
            number: u8,
            base: Option<u8>,
            audit: Option<(u8, &[(&str, u64)])>,
        ) -> Result<(), String> {
            self.commit_with(number, base, audit, &["vda", "vdb"])
        }

        fn commit_with(
            &mut self,
            number: u8,
            base: Option<u8>,
            audit: Option<(u8, &[(&str, u64)])>,
            disks: &[&str],
        ) -> Result<(), String> {
            let session = SessionId::from_bytes([number; 16]);
            self.enter(Body::Begin(BeginBody {
                session,
                purpose: Purpose::Backup,
                vm: Some(vm()),
                point: Some(point(number)),
                expires_at: None,
                deadline: None,
            }))
            .unwrap();
            let taken_at = self.state.open[&session].begun_at;
            let spoiled = std::mem::take(&mut self.spoiled);
            self.enter(Body::Commit(CommitBody {
                session,
                vm: vm(),
                point: point(number),
                record_hash: ObjectHash::from_bytes([0; 32]),
                point_kind: match base {
                    None => PointKind::Full,
                    Some(_) => PointKind::Incremental,
                },
                base: base.map(point),
                taken_at,
                expires_at: taken_at,
                deadline: match spoiled {
                    true => taken_at - jiff::SignedDuration::from_secs(1),
                    false => taken_at,
                },
                disks: disks
                    .iter()
                    .map(|disk| DiskBody {
                        name: name(disk),
                        size_bytes: 0,
                    })
                    .collect(),
                stored_bytes: 0,
                pack_count: 0,
                packs_hash: packs_hash([]),
                segments: Vec::new(),
                consistency: "crash".to_string(),
                notes: Vec::new(),
                audit: audit.map(|(against, disks)| AuditBody {
                    against: point(against),
                    disks: disks
                        .iter()
                        .map(|(disk, bytes)| AuditedDisk {
                            name: name(disk),
                            differing_bytes: *bytes,
                        })
                        .collect(),
                }),
            }))
        }

        fn suspects(&self) -> Vec<u8> {
            let points = self.state.points.iter();
            points
                .filter(|(_, point)| point.suspect)
                .map(|(id, _)| id.as_bytes()[0])
                .collect()
        }
    }

    #[test]
    fn the_incrementals_of_the_week_are_suspect_and_no_others() {
        let mut book = Book::new();
        book.commit(1, None, None).unwrap();
        book.commit(2, Some(1), None).unwrap();
        book.commit(3, None, Some((2, &[("vda", 0), ("vdb", 0)])))
            .unwrap();
        book.commit(4, Some(3), None).unwrap();
        book.commit(5, Some(4), None).unwrap();
        assert_eq!(book.suspects(), [0_u8; 0]);
        book.commit(6, None, Some((5, &[("vda", 0), ("vdb", 7)])))
            .unwrap();
        assert_eq!(book.suspects(), [4, 5]);
        assert!(book.state.is_distrusted(&vm()));
        // An incremental that comes all the same may lack what is hidden next.
        book.commit(7, Some(6), None).unwrap();
        assert_eq!(book.suspects(), [4, 5, 7]);
        book.commit(8, None, Some((7, &[("vdb", 0)]))).unwrap();
        assert!(!book.state.is_distrusted(&vm()));
        assert_eq!(book.suspects(), [4, 5, 7]);
        book.commit(9, Some(8), None).unwrap();
        assert_eq!(book.suspects(), [4, 5, 7]);
        assert_eq!(book.state.voids, []);
    }

    #[test]
    fn each_disk_needs_a_clean_audit_of_its_own() {
        let mut book = Book::new();
        book.commit(1, None, None).unwrap();
        book.commit(2, None, Some((1, &[("vda", 1), ("vdb", 1)])))
            .unwrap();
        book.commit(3, None, Some((2, &[("vda", 0)]))).unwrap();
        assert!(book.state.is_distrusted(&vm()));
        book.commit(4, None, None).unwrap();
        assert!(book.state.is_distrusted(&vm()));
        // A disk that is not there any more hides nothing.
        book.commit_with(5, None, None, &["vda"]).unwrap();
        assert!(!book.state.is_distrusted(&vm()));
    }

    #[test]
    fn a_clean_audit_against_an_older_point_clears_nothing() {
        let mut book = Book::new();
        book.commit(1, None, None).unwrap();
        book.commit(2, None, Some((1, &[("vda", 1)]))).unwrap();
        book.commit(3, None, Some((1, &[("vda", 0)]))).unwrap();
        assert!(book.state.is_distrusted(&vm()));
        book.commit(4, None, Some((3, &[("vda", 0)]))).unwrap();
        assert!(!book.state.is_distrusted(&vm()));
    }

    #[test]
    fn the_audit_of_a_void_commit_and_of_an_incremental_mean_nothing() {
        let mut book = Book::new();
        book.commit(1, None, None).unwrap();
        book.commit(2, Some(1), Some((1, &[("vda", 1)]))).unwrap();
        assert!(!book.state.is_distrusted(&vm()));
        book.spoiled = true;
        book.commit(3, None, Some((2, &[("vda", 1)]))).unwrap_err();
        assert!(!book.state.is_distrusted(&vm()));
        assert_eq!(book.suspects(), [0_u8; 0]);
        // Nor is a point that nobody knows.
        book.commit(4, None, Some((99, &[("vda", 1)]))).unwrap();
        assert!(book.state.is_distrusted(&vm()));
        assert_eq!(book.suspects(), [0_u8; 0]);
    }
}
