//! The servers that the tests know, and what each of them does. Known, not asked: a server that does
//! otherwise in its next release shall fail the tests.

use super::super::project;
use std::ffi::OsString;
use std::path::PathBuf;
use vmkeep::model::Writers;

/// Debian's own, unless `VMKEEP_S3_SERVER` names another one; `scripts/servers` installs those.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Debian's Ceph, 16 or 18.
    Radosgw,
    Ceph20,
    /// The same with versions in all buckets, behind a proxy that lets conditional requests pass one at
    /// a time: then it does what AWS promises.
    Ceph20Versions,
    Garage,
}

/// What becomes of a put that asks for the name to be free (`If-None-Match: *`) if it is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    Kept,
    /// Refused, unless it races with others: then several win.
    LostInRaces,
    Ignored,
}

impl Kind {
    pub fn chosen() -> Self {
        match std::env::var("VMKEEP_S3_SERVER").as_deref() {
            Err(_) | Ok("radosgw") => Kind::Radosgw,
            Ok("ceph-20") => Kind::Ceph20,
            Ok("ceph-20-versions") => Kind::Ceph20Versions,
            Ok("garage") => Kind::Garage,
            Ok(other) => {
                panic!("VMKEEP_S3_SERVER={other}: radosgw, ceph-20, ceph-20-versions or garage")
            }
        }
    }

    /// Where no versions are kept.
    pub fn condition(self) -> Condition {
        match self {
            Kind::Radosgw | Kind::Ceph20 | Kind::Ceph20Versions => Condition::Kept,
            Kind::Garage => Condition::Ignored,
        }
    }

    /// In a bucket that keeps versions; `None` if none can.
    pub fn condition_with_versions(self) -> Option<Condition> {
        match self {
            Kind::Radosgw => Some(Condition::Ignored),
            // Seen with 20.2.4: of two racers both win nearly always.
            Kind::Ceph20 => Some(Condition::LostInRaces),
            Kind::Ceph20Versions => Some(Condition::Kept),
            Kind::Garage => None,
        }
    }

    /// Who can write a repository in a bucket as the tests make it.
    pub fn writers(self) -> Writers {
        match self.condition() {
            Condition::Kept => Writers::Many,
            Condition::LostInRaces | Condition::Ignored => Writers::One,
        }
    }

    pub fn has_versions(self) -> bool {
        self.condition_with_versions().is_some()
    }

    /// Object Lock.
    pub fn has_lock(self) -> bool {
        self.has_versions()
    }

    /// Whether of many that are deleted together each needs the right to it. Seen with Ceph 16: there the request
    /// needs the right to the whole bucket.
    pub fn asks_for_the_right_to_each(self) -> bool {
        self != Kind::Radosgw
    }

    /// Whether the buckets of the tests keep versions unless a test wants another one.
    pub(super) fn buckets_keep_versions(self) -> bool {
        self == Kind::Ceph20Versions
    }

    /// Whether conditional requests pass one at a time.
    pub(super) fn is_behind_a_proxy(self) -> bool {
        self == Kind::Ceph20Versions
    }

    /// The program that answers requests; the script beside this file that starts it has its name.
    pub(super) fn gateway(self) -> &'static str {
        match self {
            Kind::Radosgw | Kind::Ceph20 | Kind::Ceph20Versions => "radosgw",
            Kind::Garage => "garage",
        }
    }

    /// What the script needs of what `scripts/servers` installed.
    pub(super) fn installed(self) -> Option<OsString> {
        let place = match self {
            Kind::Radosgw => return None,
            Kind::Ceph20 | Kind::Ceph20Versions => servers().join("ceph-20"),
            Kind::Garage => servers().join("garage/bin/garage"),
        };
        assert!(
            place.exists(),
            "{} is missing: scripts/servers installs it",
            place.display()
        );
        Some(place.into())
    }
}

fn servers() -> PathBuf {
    let told = std::env::var_os("VMKEEP_SERVERS");
    let told = told.map_or_else(|| "target/servers".into(), PathBuf::from);
    project().join(told)
}
