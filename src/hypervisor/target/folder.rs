//! The folder in which disks are restored.

use super::partial::is_partial;
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// Makes the folder and all above it that is missing, each durably: the name of a restored disk is
/// worth as much as that of its folder.
pub fn create_folder(folder: &Path) -> Result<(), CaptureError> {
    make(folder).map_err(|error| CaptureError::new(CaptureErrorKind::Io, folder.display(), error))
}

fn make(folder: &Path) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let above = match folder.parent() {
        Some(above) if !above.as_os_str().is_empty() => above,
        _ => Path::new("."),
    };
    make(above)?;
    match fs::create_dir(folder) {
        // Somebody else made it meanwhile.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => {}
        made => made?,
    }
    File::open(above)?.sync_all()
}

/// What restores that were killed have left in the folder: parts of disks, hidden. One that is under
/// way there looks the same, so nobody but the admin can say what may go.
pub fn partial_files(folder: &Path) -> Vec<PathBuf> {
    // What cannot be listed is met when the disks are created.
    let entries = folder.read_dir().into_iter().flatten().flatten();
    let is_left = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(is_partial)
    };
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_left).collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::target::RawTarget;

    #[test]
    fn what_a_killed_restore_leaves_is_found_again_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let killed = RawTarget::create(folder.path(), "vda.raw", 1 << 16).expect("a target");
        for name in [
            ".vda.raw.partial-0123",
            "vda.raw.partial-0123456789abcdef",
            ".partial-x",
        ] {
            fs::write(folder.path().join(name), "of somebody else").expect("a file");
        }
        // A killed process drops nothing.
        std::mem::forget(killed);
        let found = partial_files(folder.path());
        let [left] = found.as_slice() else {
            panic!("{found:?}");
        };
        let name = left
            .file_name()
            .and_then(|name| name.to_str())
            .expect("a name");
        assert!(name.starts_with(".vda.raw.partial-"), "{name}");
        assert_eq!(
            partial_files(&folder.path().join("missing")),
            [""; 0].map(PathBuf::from)
        );
    }

    #[test]
    fn a_folder_is_made_with_all_above_it_and_a_file_in_its_way_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let deep = folder.path().join("a/b/c");
        create_folder(&deep).expect("made");
        create_folder(&deep).expect("there");
        assert!(deep.is_dir());
        let file = folder.path().join("file");
        fs::write(&file, "").expect("a file");
        for in_the_way in [file.clone(), file.join("below")] {
            let error = create_folder(&in_the_way).expect_err("a file");
            assert_eq!(error.kind, CaptureErrorKind::Io);
            assert!(error.name.contains("file"), "{error}");
        }
    }
}
