//! The file of a job: where each disk can be read, and what its bitmap counts from.
//!
//! ```json
//! { "disks": { "drive-scsi0": { "socket": "/run/…/101.nbd", "export": "drive-scsi0",
//!       "mode": "reuse", "bitmap": "…", "since": "…", "generation": "…", "discard": true } },
//!   "definition": { "name": "101.conf", "text": "…" },
//!   "consistency": "filesystem" }
//! ```
//!
//! Its bytes are not trusted: bounded, every key known, every value checked before it is used.

use crate::hypervisor::{CaptureError, CaptureErrorKind, Consistency};
use crate::model::DiskName;
use rustix::fs::OFlags;
use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

const MAX_FILE_BYTES: u64 = 1 << 20;
const MAX_DISKS: usize = 256;
/// The longest path that a unix socket can have.
const MAX_SOCKET_BYTES: usize = 107;
/// The longest name of a bitmap that QEMU knows.
const MAX_NAME_BYTES: usize = 1023;
const MAX_GENERATION_BYTES: usize = 128;
/// What is shown of a complaint, which may quote the file.
const MAX_SHOWN: usize = 300;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Job {
    /// At least one; sorted by name, each once.
    pub disks: Vec<JobDisk>,
    /// File name and content.
    pub definition: Option<(String, Vec<u8>)>,
    pub consistency: Consistency,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct JobDisk {
    pub name: DiskName,
    pub socket: PathBuf,
    pub export: String,
    pub tracking: Tracking,
    /// What was read may be discarded: the export is a fleecing image.
    pub discard: bool,
}

/// What the peer does about changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Tracking {
    Nothing,
    /// A bitmap that counts from this instant on. Without a generation nobody can build on it.
    New {
        bitmap: String,
        generation: Option<String>,
    },
    /// A bitmap that has counted from the capture `since` to this instant, and counts on.
    Reuse {
        bitmap: String,
        since: String,
        generation: Option<String>,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawJob {
    disks: RawDisks,
    definition: Option<RawDefinition>,
    consistency: Option<RawConsistency>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDisk {
    socket: PathBuf,
    export: String,
    mode: RawMode,
    bitmap: Option<String>,
    since: Option<String>,
    generation: Option<String>,
    #[serde(default)]
    discard: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDefinition {
    name: String,
    text: String,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum RawMode {
    None,
    New,
    Reuse,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum RawConsistency {
    Image,
    Crash,
    Filesystem,
}

/// In the order of the file: a map would hide a disk that is named twice.
struct RawDisks(Vec<(String, RawDisk)>);

impl<'de> Deserialize<'de> for RawDisks {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Disks;
        impl<'de> Visitor<'de> for Disks {
            type Value = RawDisks;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("disks by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawDisks, A::Error> {
                let mut disks: Vec<(String, RawDisk)> = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if disks.len() >= MAX_DISKS {
                        return Err(de::Error::custom("more disks than any VM has"));
                    }
                    if disks.iter().any(|(known, _)| *known == name) {
                        return Err(de::Error::custom(format!("disk {name:?} is there twice")));
                    }
                    let disk = map
                        .next_value()
                        .map_err(|error| de::Error::custom(format!("disk {name:?}: {error}")))?;
                    disks.push((name, disk));
                }
                Ok(RawDisks(disks))
            }
        }
        deserializer.deserialize_map(Disks)
    }
}

/// Reads the job that is handed in now.
pub(super) fn read(file: &Path) -> Result<Job, CaptureError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => CaptureError::new(
            CaptureErrorKind::Missing,
            file.display(),
            "no job is handed in: the program that makes the disks of this VM readable (on Proxmox \
             VE: the backup provider) writes this file, then starts vmkeep backup, and removes it \
             afterwards. Start the backup there",
        ),
        _ => CaptureError::new(CaptureErrorKind::Io, file.display(), error),
    };
    let invalid =
        |detail: String| CaptureError::new(CaptureErrorKind::Invalid, file.display(), detail);
    let opened = OpenOptions::new()
        .read(true)
        // A pipe that nobody writes to would be waited for.
        .custom_flags(OFlags::NONBLOCK.bits() as i32)
        .open(file)
        .map_err(failed)?;
    if !opened.metadata().map_err(failed)?.is_file() {
        return Err(invalid("is not a file".to_string()));
    }
    let mut bytes = Vec::new();
    opened
        .take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    parse(&bytes).map_err(|detail| invalid(format!("not a job that can be used: {detail}")))
}

pub(super) fn parse(bytes: &[u8]) -> Result<Job, String> {
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(format!("it has more than {MAX_FILE_BYTES} bytes"));
    }
    let complaint = |error: serde_json::Error| shown(&error.to_string());
    // First whether it is whole: what is found in a part of it may be anything.
    serde_json::from_slice::<IgnoredAny>(bytes).map_err(|error| match error.is_eof() {
        true => format!(
            "{}; write it under another name, then rename it to this one",
            complaint(error)
        ),
        false => complaint(error),
    })?;
    let raw: RawJob = serde_json::from_slice(bytes).map_err(complaint)?;
    let mut disks = raw
        .disks
        .0
        .into_iter()
        .map(|(name, raw)| {
            disk(&name, raw).map_err(|detail| shown(&format!("disk {name:?}: {detail}")))
        })
        .collect::<Result<Vec<JobDisk>, String>>()?;
    disks.sort_by(|one, other| one.name.cmp(&other.name));
    for (at, disk) in disks.iter().enumerate() {
        let same = |other: &&JobDisk| other.socket == disk.socket && other.export == disk.export;
        if let Some(other) = disks.iter().take(at).find(same) {
            return Err(format!(
                "{} and {} are the same export",
                other.name, disk.name
            ));
        }
    }
    if disks.is_empty() {
        return Err("it has no disks".to_string());
    }
    Ok(Job {
        disks,
        definition: raw.definition.map(definition).transpose()?,
        consistency: match raw.consistency {
            Some(RawConsistency::Image) => Consistency::Image,
            Some(RawConsistency::Filesystem) => Consistency::Filesystem,
            Some(RawConsistency::Crash) | None => Consistency::Crash,
        },
    })
}

fn disk(name: &str, raw: RawDisk) -> Result<JobDisk, String> {
    let socket = &raw.socket;
    if !socket.is_absolute() || socket.components().any(|part| part == Component::ParentDir) {
        return Err(format!("socket {socket:?} is not an absolute path"));
    }
    let length = socket.as_os_str().len();
    if length > MAX_SOCKET_BYTES || raw.socket.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(format!(
            "socket is no path of a socket, which has at most {MAX_SOCKET_BYTES} bytes"
        ));
    }
    text("export", &raw.export, MAX_NAME_BYTES)?;
    for (key, value, limit) in [
        ("bitmap", &raw.bitmap, MAX_NAME_BYTES),
        ("since", &raw.since, MAX_GENERATION_BYTES),
        ("generation", &raw.generation, MAX_GENERATION_BYTES),
    ] {
        if let Some(value) = value {
            text(key, value, limit)?;
        }
    }
    let RawDisk {
        bitmap,
        since,
        generation,
        ..
    } = raw;
    let tracking = match (raw.mode, bitmap, since) {
        (RawMode::None, None, None) if generation.is_none() => Tracking::Nothing,
        (RawMode::None, ..) => {
            return Err("mode \"none\" goes without bitmap, since and generation".to_string());
        }
        (RawMode::New, Some(bitmap), None) => Tracking::New { bitmap, generation },
        (RawMode::New, _, Some(_)) => {
            return Err("since goes with mode \"reuse\": a new bitmap counts from now".to_string());
        }
        (RawMode::Reuse, Some(bitmap), Some(since)) => {
            // Both points would carry the same name, and the next job could mean either.
            if generation.as_ref() == Some(&since) {
                return Err("generation names this capture: it must differ from since".to_string());
            }
            Tracking::Reuse {
                bitmap,
                since,
                generation,
            }
        }
        (RawMode::Reuse, Some(_), None) => {
            return Err(
                "mode \"reuse\" needs since: the generation from which the bitmap counts; where \
                 that is not known, mode \"new\""
                    .to_string(),
            );
        }
        (RawMode::New | RawMode::Reuse, None, _) => return Err("bitmap is missing".to_string()),
    };
    Ok(JobDisk {
        name: DiskName::new(name).map_err(|error| error.to_string())?,
        socket: raw.socket,
        export: raw.export,
        tracking,
        discard: raw.discard,
    })
}

fn definition(raw: RawDefinition) -> Result<(String, Vec<u8>), String> {
    let RawDefinition { name, text } = raw;
    let is_plain = !name.is_empty()
        && name.len() <= 128
        && !name.starts_with(['.', '-'])
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
    match is_plain {
        true => Ok((name, text.into_bytes())),
        false => Err("definition: its name is not a plain file name".to_string()),
    }
}

fn text(key: &str, value: &str, limit: usize) -> Result<(), String> {
    match value {
        "" => Err(format!("{key} is empty")),
        _ if value.len() > limit => Err(format!("{key} has more than {limit} bytes")),
        _ if value.chars().any(char::is_control) => Err(format!("{key} has control characters")),
        _ => Ok(()),
    }
}

fn shown(complaint: &str) -> String {
    complaint
        .chars()
        .filter(|letter| !letter.is_control())
        .take(MAX_SHOWN)
        .collect()
}
