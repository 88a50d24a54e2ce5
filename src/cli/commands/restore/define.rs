//! The new domain of libvirt that a restore makes.

use super::{format_of, is_of_libvirt, path_of};
use crate::cli::args::{ImageFormat, RestoreArgs};
use crate::cli::exit::{Exit, Failure};
use crate::cli::site::{Site, VIRSH};
use crate::hypervisor::CaptureError;
use crate::hypervisor::image;
use crate::hypervisor::libvirt::{DEFINITION, Domains, NewDomain, RestoredDisk, Wish, new_domain};
use crate::hypervisor::target::SyncedTarget;
use crate::model::DiskName;
use crate::repository::PointReader;
use serde_json::{Value, json};
use std::path::{self, Path, PathBuf};

/// The definition of the new domain, beside the restored disks.
const FILE: &str = "define.xml";

/// A domain that will be defined once its disks are restored.
pub(super) struct Definition {
    new: NewDomain,
    file: PathBuf,
    domains: Domains,
    uri: Option<String>,
    hindrance: Option<String>,
}

/// One that is defined.
pub(super) struct Defined {
    name: String,
    uuid: String,
    file: PathBuf,
    start: String,
}

impl Definition {
    pub(super) fn plan(
        site: &Site,
        args: &RestoreArgs,
        point: &PointReader,
        names: &[DiskName],
    ) -> Result<Option<Self>, Failure> {
        let Some(name) = &args.define else {
            return Ok(None);
        };
        let refused = |message: String| {
            Failure::new(Exit::Usage, message).hint("nothing was restored or defined")
        };
        let content = match &point.definition {
            Some((_, content)) if is_of_libvirt(point) => content,
            found => {
                let what = match found {
                    Some((found, _)) => format!("a definition of QEMU ({found})"),
                    None => "no definition".to_string(),
                };
                return Err(refused(format!(
                    "--define: the restore point has {what}, not that of a libvirt domain, because \
                     its VM was not backed up through libvirt"
                ))
                .hint(
                    "restore without --define; then make a domain of the disks: virt-install \
                     --import --disk DIR/vda.raw …",
                ));
            }
        };
        if super::is_device(&args.to) {
            return Err(refused(format!(
                "--define needs a folder; {} is a device",
                args.to.display()
            )));
        }
        let folder = absolute(&args.to).map_err(refused)?;
        let file = folder.join(FILE);
        for file in [&file, &folder.join(DEFINITION)] {
            if file.symlink_metadata().is_ok() {
                return Err(refused(format!(
                    "{} already exists and is not replaced; choose another folder",
                    file.display()
                )));
            }
        }
        let restored = names
            .iter()
            .map(|name| {
                Ok(RestoredDisk {
                    name: name.clone(),
                    path: absolute(&path_of(args, point, name))?.display().to_string(),
                    format: match format_of(args, point, name) {
                        ImageFormat::Raw => image::ImageFormat::Raw,
                        ImageFormat::Qcow2 => image::ImageFormat::Qcow2,
                    },
                })
            })
            .collect::<Result<Vec<RestoredDisk>, String>>()
            .map_err(refused)?;
        let failed =
            |error: CaptureError| Failure::from(error).hint("nothing was restored or defined");
        let wish = Wish {
            name,
            keep_identity: args.keep_identity,
            restored: &restored,
        };
        let new = new_domain(content, &wish).map_err(failed)?;
        let uri = site.config.host.libvirt_uri.clone();
        let domains = Domains::new(uri.clone(), VIRSH.into()).map_err(failed)?;
        domains.check_free(&new).map_err(failed)?;
        // The folder itself is made later.
        let there = folder.ancestors().find(|folder| folder.exists());
        let hindrance = there.and_then(|folder| domains.hindrance(folder));
        Ok(Some(Definition {
            new,
            file,
            domains,
            uri,
            hindrance,
        }))
    }

    /// What an administrator should know of the new domain.
    pub(super) fn notes(&self) -> Vec<String> {
        let notes = self.new.notes.iter().chain(&self.hindrance);
        notes.cloned().collect()
    }

    /// The disks are restored and checked, and stay whatever becomes of this.
    pub(super) fn define(self) -> Result<Defined, Failure> {
        let virsh = match &self.uri {
            Some(uri) => format!("virsh -c '{uri}'"),
            None => "virsh".to_string(),
        };
        let failed = |detail: String| {
            Failure::new(
                Exit::Failed,
                format!(
                    "the disks are restored and checked, but the domain {} is not defined: {detail}",
                    self.new.name
                ),
            )
        };
        let written = SyncedTarget::beside(&self.file, self.new.xml.as_bytes());
        written
            .and_then(|written| SyncedTarget::give_names(vec![written]))
            .map_err(|error| {
                failed(error.to_string()).hint(
                    "its definition would have been written there; see domain.xml for the old one",
                )
            })?;
        let uuid = self
            .domains
            .define(&self.new, &self.file)
            .map_err(|error| {
                failed(error.to_string())
                .hint("nothing has to be restored again")
                .hint(format!(
                    "see to what is said above, in that file if need be, then: {virsh} define '{}'",
                    self.file.display()
                ))
            })?;
        Ok(Defined {
            start: format!("{virsh} start '{}'", self.new.name),
            name: self.new.name.to_string(),
            uuid,
            file: self.file,
        })
    }
}

/// A path that libvirt can be told.
fn absolute(path: &Path) -> Result<PathBuf, String> {
    let absolute = path::absolute(path).map_err(|error| format!("{}: {error}", path.display()))?;
    match absolute.to_str() {
        Some(text) if !text.chars().any(char::is_control) => Ok(absolute),
        _ => Err(format!(
            "--define: {:?} is a path that libvirt cannot be told; choose a plain one",
            path.display()
        )),
    }
}

impl Defined {
    pub(super) fn text(&self) -> String {
        format!(
            "  domain: {} ({}), defined; to start it: {}\n",
            self.name, self.uuid, self.start
        )
    }

    pub(super) fn document(&self) -> Value {
        json!({
            "name": self.name,
            "uuid": self.uuid,
            "xml": self.file,
        })
    }
}
