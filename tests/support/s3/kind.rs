//! The servers that the tests know, and what each of them can. Known, not asked: a server that loses
//! something between two releases shall fail the tests.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Debian's own, unless `VMKEEP_S3_SERVER` names another one; `scripts/servers` installs those.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Debian's Ceph, 16 or 18.
    Radosgw,
    /// Ceph 20. All buckets of the tests keep versions there.
    Ceph20,
    Garage,
}

impl Kind {
    pub fn chosen() -> Self {
        match std::env::var("VMKEEP_S3_SERVER").as_deref() {
            Err(_) | Ok("radosgw") => Kind::Radosgw,
            Ok("ceph-20") => Kind::Ceph20,
            Ok("garage") => Kind::Garage,
            Ok(other) => panic!("VMKEEP_S3_SERVER={other}: radosgw, ceph-20 or garage"),
        }
    }

    /// Whether a put over an object is refused if it asks to be (`If-None-Match: *`), in a bucket that
    /// keeps no versions.
    pub fn has_conditions(self) -> bool {
        match self {
            Kind::Radosgw | Kind::Ceph20 => true,
            Kind::Garage => false,
        }
    }

    /// Whether the same holds in a bucket that keeps versions.
    pub fn keeps_versions_with_conditions(self) -> bool {
        match self {
            Kind::Ceph20 => true,
            Kind::Radosgw | Kind::Garage => false,
        }
    }

    pub fn has_versions(self) -> bool {
        match self {
            Kind::Radosgw | Kind::Ceph20 => true,
            Kind::Garage => false,
        }
    }

    /// Object Lock.
    pub fn has_lock(self) -> bool {
        match self {
            Kind::Radosgw | Kind::Ceph20 => true,
            Kind::Garage => false,
        }
    }

    /// The program that answers requests.
    pub(super) fn gateway(self) -> &'static str {
        match self {
            Kind::Radosgw | Kind::Ceph20 => "radosgw",
            Kind::Garage => "garage",
        }
    }

    /// The script beside this file that starts one.
    pub(super) fn script(self) -> &'static str {
        match self {
            Kind::Radosgw | Kind::Ceph20 => "radosgw",
            Kind::Garage => "garage",
        }
    }

    /// What the script needs of what `scripts/servers` installed.
    pub(super) fn installed(self) -> Option<OsString> {
        let place = match self {
            Kind::Radosgw => return None,
            Kind::Ceph20 => servers().join("ceph-20"),
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
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let told =
        std::env::var_os("VMKEEP_SERVERS").map_or_else(|| "target/servers".into(), PathBuf::from);
    own.join(told)
}
