//! A file that gets its name when it is complete.

use crate::hypervisor::runtime_folder::random_suffix;
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

pub(super) struct Partial {
    /// The open folder: all names are relative to it, wherever it is moved to.
    folder: File,
    /// For messages: the final path.
    path: PathBuf,
    final_name: String,
    partial_name: String,
    file: File,
    named: bool,
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
            partial_name,
            file: File::from(file),
            named: false,
        })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn name(&self) -> String {
        self.path.display().to_string()
    }

    pub(super) fn io(&self, error: io::Error) -> CaptureError {
        CaptureError::new(CaptureErrorKind::Io, self.path.display(), error)
    }

    /// File to stable storage, then its name, then the folder.
    pub(super) fn finish(mut self) -> Result<(), CaptureError> {
        self.file.sync_all().map_err(|error| self.io(error))?;
        let renamed = rustix::fs::renameat_with(
            &self.folder,
            &self.partial_name,
            &self.folder,
            &self.final_name,
            RenameFlags::NOREPLACE,
        );
        match renamed {
            Ok(()) => self.named = true,
            Err(Errno::EXIST) => return Err(exists(&self.path)),
            // File systems without this kind of rename have links, which do not replace either.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => self.link()?,
            Err(error) => return Err(self.io(error.into())),
        }
        self.folder.sync_all().map_err(|error| self.io(error))
    }

    fn link(&mut self) -> Result<(), CaptureError> {
        match rustix::fs::linkat(
            &self.folder,
            &self.partial_name,
            &self.folder,
            &self.final_name,
            AtFlags::empty(),
        ) {
            // The partial name goes when this is dropped.
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => Err(exists(&self.path)),
            Err(error) => Err(self.io(error.into())),
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.named {
            // Nothing more can be done about a file that does not go; its name says what it is.
            let _ = rustix::fs::unlinkat(&self.folder, &self.partial_name, AtFlags::empty());
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
