//! A file that gets its name when it is complete.

use crate::hypervisor::runtime_folder::random_suffix;
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(super) struct Partial {
    /// The open folder: all names are relative to it, wherever it is moved to.
    folder: File,
    /// For messages: the final path.
    path: PathBuf,
    final_name: String,
    /// Under which it stands now, and until it is kept is removed.
    name_now: String,
    file: Arc<File>,
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
        // Told now rather than after hours; that it stays free is seen to at the end.
        match rustix::fs::statat(&directory, file_name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            Ok(_) => return Err(exists(&path)),
            Err(error) => return Err(failed(error.into())),
        }
        let suffix = random_suffix().map_err(failed)?;
        let partial_name = format!(".{file_name}.partial-{suffix}");
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
            name_now: partial_name,
            file: Arc::new(File::from(file)),
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

    /// The name, which must be free, then the folder to stable storage; the file must be there already.
    pub(super) fn give_name(&mut self) -> Result<(), CaptureError> {
        let renamed = rustix::fs::renameat_with(
            &self.folder,
            &self.name_now,
            &self.folder,
            &self.final_name,
            RenameFlags::NOREPLACE,
        );
        let named = match renamed {
            // File systems without this kind of rename have links, which do not replace either.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => self.link(),
            told => told,
        };
        match named {
            Ok(()) => self.name_now.clone_from(&self.final_name),
            Err(Errno::EXIST) => return Err(exists(&self.path)),
            Err(error) => return Err(self.io(error.into())),
        }
        self.folder.sync_all().map_err(|error| self.io(error))
    }

    fn link(&self) -> rustix::io::Result<()> {
        let (folder, none) = (&self.folder, AtFlags::empty());
        rustix::fs::linkat(folder, &self.name_now, folder, &self.final_name, none)?;
        // One that does not go says by its name what it is.
        let _ = rustix::fs::unlinkat(folder, &self.name_now, none);
        Ok(())
    }

    pub(super) fn keep(mut self) {
        self.is_kept = true;
    }

    /// Somebody may have put another file under the name that this one was given.
    fn stands_under(&self, name: &str) -> bool {
        let found = rustix::fs::statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW);
        let own = rustix::fs::fstat(&self.file);
        matches!((found, own), (Ok(found), Ok(own))
            if (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.is_kept && self.stands_under(&self.name_now) {
            // Nothing more can be done about a file that does not go.
            let _ = rustix::fs::unlinkat(&self.folder, &self.name_now, AtFlags::empty());
        }
    }
}

fn exists(path: &Path) -> CaptureError {
    CaptureError::new(
        CaptureErrorKind::Invalid,
        path.display(),
        "already exists and is not replaced; choose another folder or remove it",
    )
}
