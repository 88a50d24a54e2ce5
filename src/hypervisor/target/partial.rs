//! A file that gets its name when it is complete.

use crate::hypervisor::runtime_folder::{is_random_suffix, random_suffix};
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags, Stat};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Between the name that a file is to have and what makes its present one unique.
const MARK: &str = ".partial-";

/// Whether a file of this name is a partial one, by its name alone.
pub(super) fn is_partial(name: &str) -> bool {
    let Some((file_name, suffix)) = name.rsplit_once(MARK) else {
        return false;
    };
    file_name.starts_with('.') && file_name.len() > 1 && is_random_suffix(suffix)
}

pub(super) struct Partial {
    /// The open folder: all names are relative to it, wherever it is moved to.
    folder: File,
    /// For messages: the final path.
    path: PathBuf,
    final_name: String,
    partial_name: String,
    file: Arc<File>,
    /// What stands under the final name since it was given, as its folder tells: over some networks not what the
    /// open file says of itself.
    named: Option<Identity>,
    is_kept: bool,
}

impl Partial {
    /// Creates an empty hidden file in `folder`, for `file_name`, which must be free.
    pub(super) fn create(folder: &Path, file_name: &str) -> Result<Self, CaptureError> {
        let path = folder.join(file_name);
        let failed =
            |error: io::Error| CaptureError::new(CaptureErrorKind::Io, path.display(), error);
        if file_name.is_empty() || matches!(file_name, "." | "..") || file_name.contains('/') {
            return Err(CaptureError::new(
                CaptureErrorKind::Invalid,
                path.display(),
                "not the name of a file",
            ));
        }
        let opened = rustix::fs::open(
            folder,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        );
        let directory = match opened {
            Ok(directory) => File::from(directory),
            Err(Errno::NOENT) => {
                return Err(CaptureError::new(
                    CaptureErrorKind::Missing,
                    folder.display(),
                    "the folder is not there",
                ));
            }
            Err(error) => return Err(failed(error.into())),
        };
        // A folder that cannot be synced and a name that is taken are told now rather than after hours; that the
        // name stays free is seen to at the end.
        directory.sync_all().map_err(failed)?;
        match rustix::fs::statat(&directory, file_name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            Ok(_) => return Err(exists(&path)),
            Err(error) => return Err(failed(error.into())),
        }
        let suffix = random_suffix().map_err(failed)?;
        let partial_name = format!(".{file_name}{MARK}{suffix}");
        let file = rustix::fs::openat(
            &directory,
            &partial_name,
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            // A customer's disk is nobody else's to read.
            Mode::RUSR | Mode::WUSR,
        )
        .map_err(|error| failed(error.into()))?;
        Ok(Partial {
            folder: directory,
            path,
            final_name: file_name.to_string(),
            partial_name,
            file: Arc::new(File::from(file)),
            named: None,
            is_kept: false,
        })
    }

    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    pub(super) fn name(&self) -> String {
        self.path.display().to_string()
    }

    pub(super) fn io(&self, error: io::Error) -> CaptureError {
        CaptureError::new(CaptureErrorKind::Io, self.path.display(), error)
    }

    pub(super) fn sync(&self) -> Result<(), CaptureError> {
        self.file.sync_all().map_err(|error| self.io(error))
    }

    /// The name, if it is free. The file must be on stable storage.
    pub(super) fn give_name(&mut self) -> Result<(), CaptureError> {
        let (folder, flags) = (&self.folder, RenameFlags::NOREPLACE);
        let (from, to) = (&self.partial_name, &self.final_name);
        match rustix::fs::renameat_with(folder, from, folder, to, flags) {
            // File systems without this kind of rename have links, which do not replace either.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => self.link(),
            told => self.look_whether_named(told),
        }
    }

    /// The partial name stays until this is dropped.
    fn link(&mut self) -> Result<(), CaptureError> {
        let (folder, none) = (&self.folder, AtFlags::empty());
        let told = rustix::fs::linkat(folder, &self.partial_name, folder, &self.final_name, none);
        self.look_whether_named(told)
    }

    /// What a call that failed has done all the same counts: a network file system repeats one whose reply was
    /// lost, and then finds what it made itself.
    fn look_whether_named(&mut self, told: rustix::io::Result<()>) -> Result<(), CaptureError> {
        let found = self.found_under_final_name();
        let own = rustix::fs::fstat(&self.file).ok().as_ref().map(identity);
        match told {
            Err(error) if found.is_none() || found != own => Err(match error {
                Errno::EXIST => exists(&self.path),
                error => self.io(error.into()),
            }),
            _ => {
                self.named = found.or(own);
                Ok(())
            }
        }
    }

    fn found_under_final_name(&self) -> Option<Identity> {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        let found = rustix::fs::statat(&self.folder, &self.final_name, flags);
        found.ok().as_ref().map(identity)
    }

    /// After this a name that was given survives a power cut.
    pub(super) fn sync_folder(&self) -> Result<(), CaptureError> {
        self.folder.sync_all().map_err(|error| self.io(error))
    }

    pub(super) fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let unlink = |name| rustix::fs::unlinkat(&self.folder, name, AtFlags::empty());
        // Nothing more can be done about a file that does not go; this name says what it is.
        let _ = unlink(&self.partial_name);
        // Somebody may have put another file where this one was.
        if !self.is_kept && self.named.is_some() && self.found_under_final_name() == self.named {
            let _ = unlink(&self.final_name);
            let _ = self.folder.sync_all();
        }
    }
}

/// File system and number of a file.
type Identity = (u64, u64);

fn identity(stat: &Stat) -> Identity {
    (stat.st_dev, stat.st_ino)
}

fn exists(path: &Path) -> CaptureError {
    CaptureError::new(
        CaptureErrorKind::Invalid,
        path.display(),
        "already exists and is not replaced; choose another folder or remove it",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn partial() -> (tempfile::TempDir, Partial) {
        let folder = tempfile::tempdir().expect("a folder");
        let partial = Partial::create(folder.path(), "vda").expect("a file");
        (folder, partial)
    }

    fn names(folder: &tempfile::TempDir) -> Vec<String> {
        let entries = fs::read_dir(folder.path()).expect("the folder");
        let name = |entry: io::Result<fs::DirEntry>| entry.expect("an entry").file_name();
        let names = entries.map(|entry| name(entry).into_string().expect("text"));
        names.collect()
    }

    #[test]
    fn a_name_is_taken_back_unless_it_is_kept_however_it_was_given() {
        for give in [Partial::give_name, Partial::link] {
            let (folder, mut dropped) = partial();
            give(&mut dropped).expect("named");
            assert!(names(&folder).contains(&"vda".to_string()));
            drop(dropped);
            assert_eq!(names(&folder), [""; 0]);
            let (folder, mut kept) = partial();
            give(&mut kept).expect("named");
            kept.keep();
            assert_eq!(names(&folder), ["vda"]);
        }
    }

    #[test]
    fn a_name_whose_reply_was_lost_is_ours_and_another_file_is_not() {
        let (folder, mut partial) = partial();
        partial.link().expect("named");
        partial.named = None;
        partial.link().expect("named before");
        drop(partial);
        assert_eq!(names(&folder), [""; 0]);
        let mut late = Partial::create(folder.path(), "vda").expect("a file");
        fs::write(folder.path().join("vda"), "precious").expect("a file");
        for give in [Partial::give_name, Partial::link] {
            let error = give(&mut late).expect_err("taken");
            assert_eq!(error.kind, CaptureErrorKind::Invalid);
        }
        drop(late);
        assert_eq!(names(&folder), ["vda"]);
    }

    #[test]
    fn what_somebody_puts_in_the_place_of_a_named_file_stays() {
        let (folder, mut partial) = partial();
        partial.give_name().expect("named");
        let path = folder.path().join("vda");
        fs::remove_file(&path).expect("removed");
        fs::write(&path, "precious").expect("a file");
        drop(partial);
        assert_eq!(fs::read(&path).expect("the file"), b"precious");
    }
}
