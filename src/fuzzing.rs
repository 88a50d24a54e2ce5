//! The fuzz targets: every parser of bytes from outside, by name. Built for tests, which replay the
//! corpus, and for `scripts/fuzz`; never into the program.
//!
//! A target fails by a panic, and checks more than that there is none: what is accepted can be
//! written again and says the same, nothing opens under an id that is not its own, texts of peers
//! are fit to be printed. Each stands beside what it tests, in a module `hostile_bytes`.

use crate::format::hostile_bytes as format;
use crate::hypervisor::hostile_bytes as hypervisor;
use crate::repository::hostile_bytes as repository;
use crate::{codec::hostile_bytes as codec, config::hostile_bytes as config};

pub struct FuzzTarget {
    /// Also that of its folder in `tests/fuzz/corpus`.
    pub name: &'static str,
    pub run: fn(&[u8]),
}

const fn target(name: &'static str, run: fn(&[u8])) -> FuzzTarget {
    FuzzTarget { name, run }
}

pub const FUZZ_TARGETS: &[FuzzTarget] = &[
    target("nbd_handshake", hypervisor::nbd_handshake),
    target("nbd_replies", hypervisor::nbd_replies),
    target("qmp_lines", hypervisor::qmp_lines),
    target("qmp_machine", hypervisor::qmp_machine),
    target("guest_agent", hypervisor::guest_agent),
    target("domain_xml", hypervisor::domain_xml),
    target("qcow2_header", hypervisor::qcow2_header),
    target("frame", format::frame),
    target("sealed_piece", codec::sealed_piece),
    target("pack", format::pack),
    target("segment", format::segment),
    target("node", codec::node),
    target("record", codec::record),
    target("entry", format::entry),
    target("checkpoint", repository::checkpoint),
    target("config", config::config),
    target("key_file", codec::key_file),
    target("customer_key", codec::customer_key),
    target("repository_file", format::repository_file),
    target("certificate", format::certificate),
    target("signature", codec::signature),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::fs;
    use std::path::{Path, PathBuf};

    fn corpus() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus")
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(folder);
        let entries = entries.unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    #[test]
    fn no_input_of_the_corpus_breaks_its_target() {
        for target in FUZZ_TARGETS {
            let files = files(&corpus().join(target.name));
            assert!(files.len() >= 3, "{} has hardly any corpus", target.name);
            for file in files {
                // Shown by the test runner where the target panics.
                println!("{}", file.display());
                (target.run)(&fs::read(&file).unwrap());
            }
        }
    }

    #[test]
    fn every_folder_of_the_corpus_has_a_target_and_all_is_small() {
        let known: BTreeSet<&str> = FUZZ_TARGETS.iter().map(|target| target.name).collect();
        assert_eq!(known.len(), FUZZ_TARGETS.len(), "two targets of one name");
        let mut bytes = 0;
        for folder in files(&corpus()) {
            let name = folder.file_name().unwrap().to_str().unwrap().to_string();
            assert!(known.contains(&*name), "{name} has no target");
            bytes += files(&folder)
                .iter()
                .map(|file| fs::metadata(file).unwrap().len())
                .sum::<u64>();
        }
        assert!(bytes < 300 << 10, "{bytes} bytes");
    }
}
