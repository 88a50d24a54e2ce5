use super::days;
use crate::config::{Config, VmSource};
use serde_json::{Value, json};
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

/// Something that a sound configuration may well not mean. It stops nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// One word for programs.
    pub kind: &'static str,
    /// `None`: it is of the whole configuration.
    pub customer: Option<String>,
    pub message: String,
}

impl Warning {
    pub fn document(&self) -> Value {
        json!({
            "kind": self.kind,
            "customer": self.customer,
            "message": self.message,
        })
    }
}

/// In the order of the configuration.
pub fn warnings_of(config: &Config) -> Vec<Warning> {
    let mut warnings = Vec::new();
    for customer in &config.customers {
        let name = &customer.name;
        let mut warn = |kind, message| {
            warnings.push(Warning {
                kind,
                customer: Some(name.to_string()),
                message,
            });
        };
        let effective = customer.policy.effective();
        if effective.shrunk {
            warn(
                "window",
                format!(
                    "{name}: the restore window is {} instead of {}, because nothing may be kept longer than {}",
                    days(effective.restore_window_days),
                    days(effective.configured_restore_window_days),
                    effective.max_retention
                ),
            );
        }
        if config.repository.escrow.is_empty() && customer.escrow.is_empty() {
            warn(
                "escrow",
                format!(
                    "{name}: no escrow recipient; the loss of this host is the loss of every backup. age-keygen makes a key to keep elsewhere; its public half goes into [repository] escrow"
                ),
            );
        }
        if customer.vms.is_empty() {
            warn("vms", format!("{name}: no VM; nothing is backed up"));
        }
        for vm in &customer.vms {
            let VmSource::Images(disks) = &vm.source else {
                continue;
            };
            for disk in disks {
                if let Some(what) = no_disk(&disk.path) {
                    let path = disk.path.display();
                    let message = format!("{name}/{} {}: {path} {what}", vm.name, disk.name);
                    warn("disk", message);
                }
            }
        }
    }
    warnings
}

/// Why no disk can be read there now; its content is not looked at.
fn no_disk(path: &Path) -> Option<String> {
    match fs::metadata(path) {
        Ok(found) => {
            let kind = found.file_type();
            let what = if kind.is_file() || kind.is_block_device() {
                return None;
            } else if kind.is_dir() {
                "is a directory"
            } else {
                "is neither a file nor a block device"
            };
            Some(what.to_string())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Some("does not exist now".to_string())
        }
        Err(error) => Some(format!("cannot be looked at: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_and_devices_are_disks() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("vda.raw");
        fs::write(&file, b"").expect("a file");
        assert_eq!(no_disk(&file), None);
        assert_eq!(no_disk(folder.path()).as_deref(), Some("is a directory"));
        assert_eq!(
            no_disk(Path::new("/dev/null")).as_deref(),
            Some("is neither a file nor a block device")
        );
        assert_eq!(
            no_disk(&folder.path().join("gone")).as_deref(),
            Some("does not exist now")
        );
    }
}
