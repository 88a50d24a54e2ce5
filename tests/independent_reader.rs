//! The second reader, in Python, against the golden repository: what it restores from store and
//! identity is what this program restores, and it is no less suspicious.
//!
//! `scripts/test tools` installs its packages.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The interpreter that has the packages.
fn python() -> PathBuf {
    let python = root().join("target/independent-reader/bin/python");
    assert!(
        python.exists(),
        "the independent reader is not installed: scripts/test tools"
    );
    python
}

fn read(python: &Path, store: &Path, identity: &str) -> Output {
    Command::new(python)
        .arg(root().join("tests/independent_reader.py"))
        .arg(store)
        .arg(root().join(format!("tests/golden/v1/identities/{identity}.txt")))
        .arg("acme")
        .output()
        .expect("the interpreter starts")
}

fn expected() -> Value {
    let text = std::fs::read(root().join("tests/golden/v1/expected.json")).unwrap();
    serde_json::from_slice::<Value>(&text).unwrap()["points"].clone()
}

#[test]
fn the_independent_reader_restores_every_point_of_the_golden_repository() {
    let python = python();
    for identity in ["host", "escrow"] {
        let output = read(&python, &root().join("tests/golden/v1/store"), identity);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["points"], expected());
        assert_eq!(report["void"], Value::Array(vec![]));
        assert_eq!(report["unknown"], Value::Array(vec![]));
    }
}

#[test]
fn the_independent_reader_refuses_a_changed_store() {
    let python = python();
    let folder = tempfile::tempdir().unwrap();
    let golden = root().join("tests/golden/v1/store");
    let mut files = Vec::new();
    let mut folders = vec![golden.clone()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => files.push(path.strip_prefix(&golden).unwrap().to_path_buf()),
            }
        }
    }
    files.sort();
    for file in &files {
        let to = folder.path().join(file);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(golden.join(file), to).unwrap();
    }
    assert!(read(&python, folder.path(), "host").status.success());
    // Every third object, somewhere in it; of the repository file only some bytes matter.
    let changed = files.iter().filter(|file| !file.ends_with("vmkeep.json"));
    for (number, file) in changed.step_by(3).enumerate() {
        let path = folder.path().join(file);
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        let at = (number * 7919) % bad.len();
        bad[at] ^= 0x04;
        std::fs::write(&path, &bad).unwrap();
        let output = read(&python, folder.path(), "host");
        assert!(!output.status.success(), "{} byte {at}", file.display());
        std::fs::write(&path, &good).unwrap();
    }
}
