use std::fs::File;
use std::path::{Path, PathBuf};

use super::super::host::{path_text, tool};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Raw,
    Qcow2,
}

impl Format {
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

/// A disk image on this machine.
#[derive(Debug, Clone)]
pub struct Image {
    pub path: PathBuf,
    pub format: Format,
}

impl Image {
    /// A new disk with an empty file system on all of it, as the guest wants it.
    pub fn ext4(path: impl Into<PathBuf>, size: u64, format: Format) -> Image {
        let path = path.into();
        let raw = match format {
            Format::Raw => path.clone(),
            Format::Qcow2 => path.with_extension("making"),
        };
        File::create(&raw).unwrap().set_len(size).unwrap();
        // Small file systems get smaller blocks by default, which would tear a record apart.
        tool("mkfs.ext4", &["-q", "-F", "-b", "4096", path_text(&raw)]);
        if format == Format::Qcow2 {
            convert(&raw, Format::Raw, &path, Format::Qcow2, false);
            std::fs::remove_file(&raw).unwrap();
        }
        Image { path, format }
    }

    /// A new disk with nothing on it.
    pub fn empty(path: impl Into<PathBuf>, size: u64, format: Format) -> Image {
        let path = path.into();
        let name = ["create", "-q", "-f", format.name(), path_text(&path)];
        tool("qemu-img", &[&name[..], &[&size.to_string()]].concat());
        Image { path, format }
    }

    /// A raw copy of an image that no VM uses.
    pub fn raw_copy(&self, to: &Path) -> PathBuf {
        self.copy_as_raw(to, false)
    }

    /// A raw copy of an image whose VM stands still: QEMU's lock on it is passed over, so nobody
    /// else may see to it that nothing is written meanwhile.
    pub fn raw_copy_while_stopped(&self, to: &Path) -> PathBuf {
        self.copy_as_raw(to, true)
    }

    fn copy_as_raw(&self, to: &Path, in_use: bool) -> PathBuf {
        match self.format {
            Format::Raw => {
                let (from, to) = (path_text(&self.path), path_text(to));
                tool("cp", &["--sparse=always", "--reflink=auto", from, to]);
            }
            Format::Qcow2 => convert(&self.path, Format::Qcow2, to, Format::Raw, in_use),
        }
        to.to_owned()
    }
}

fn convert(from: &Path, from_format: Format, to: &Path, to_format: Format, in_use: bool) {
    let mut arguments = vec!["convert", "-f", from_format.name(), "-O", to_format.name()];
    if in_use {
        arguments.push("-U");
    }
    arguments.extend([path_text(from), path_text(to)]);
    tool("qemu-img", &arguments);
}
