//! Fuzz target of a domain's XML.

use super::domain::Domain;
use std::collections::BTreeSet;

pub fn domain_xml(bytes: &[u8]) {
    let Ok(xml) = std::str::from_utf8(bytes) else {
        return;
    };
    match Domain::parse("web01", xml) {
        Ok(domain) => {
            assert!(domain.name == "web01" || domain.uuid.eq_ignore_ascii_case("web01"));
            let names: BTreeSet<_> = domain.disks.iter().map(|disk| &disk.name).collect();
            assert_eq!(names.len(), domain.disks.len());
            for disk in &domain.disks {
                assert!(disk.chain().all(|source| !source.identity().is_empty()));
            }
        }
        Err(error) => {
            let shown = error.to_string();
            assert!(shown.len() < 4096, "{} bytes", shown.len());
            assert!(!shown.chars().any(char::is_control), "{shown:?}");
        }
    }
}
