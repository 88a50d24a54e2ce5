//! The architecture, held as data: which room may import which, and what may be done only where.
//! A breach fails with its file, line and rule.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// A room is a folder of `src`; imports point down only.
struct Room {
    name: &'static str,
    floor: u8,
    may_import: &'static [&'static str],
}

const ROOMS: &[Room] = &[
    Room {
        name: "model",
        floor: 0,
        may_import: &[],
    },
    // Two folders of one room: layouts, and the layouts that carry ids.
    Room {
        name: "codec",
        floor: 1,
        may_import: &["model", "format"],
    },
    Room {
        name: "format",
        floor: 1,
        may_import: &["model"],
    },
    Room {
        name: "policy",
        floor: 1,
        may_import: &["model"],
    },
    Room {
        name: "tool",
        floor: 1,
        may_import: &[],
    },
    Room {
        name: "storage",
        floor: 2,
        may_import: &["model"],
    },
    Room {
        name: "hypervisor",
        floor: 2,
        may_import: &["model", "tool"],
    },
    Room {
        name: "notify",
        floor: 2,
        may_import: &["model"],
    },
    Room {
        name: "repository",
        floor: 3,
        may_import: &["model", "codec", "format", "policy", "storage"],
    },
    Room {
        name: "jobs",
        floor: 4,
        may_import: &[
            "model",
            "codec",
            "format",
            "policy",
            "storage",
            "hypervisor",
            "notify",
            "repository",
        ],
    },
    Room {
        name: "config",
        floor: 5,
        may_import: &["model", "policy"],
    },
    Room {
        name: "cli",
        floor: 5,
        may_import: &[
            "model",
            "codec",
            "format",
            "policy",
            "storage",
            "tool",
            "hypervisor",
            "notify",
            "repository",
            "jobs",
            "config",
        ],
    },
];

/// Words that may stand only in some places, and why.
struct Reserved {
    words: &'static [&'static str],
    /// Beginnings of paths below `src`.
    only_in: &'static [&'static str],
    why: &'static str,
}

const RESERVED: &[Reserved] = &[
    Reserved {
        words: &[
            "println!",
            "eprintln!",
            "print!(",
            "eprint!(",
            "dbg!(",
            "io::stdout",
            "io::stderr",
        ],
        only_in: &["cli/"],
        why: "only cli prints",
    },
    Reserved {
        words: &["process::exit", "ExitCode"],
        only_in: &["cli/", "main.rs"],
        why: "only cli exits",
    },
    Reserved {
        words: &["SystemTime::now", "Timestamp::now", "Zoned::now"],
        only_in: &["cli/clock.rs"],
        why: "only the top reads the clock",
    },
    Reserved {
        words: &["secret_bytes", "from_secret_bytes"],
        // age identities have secrets of their own.
        only_in: &["model/id.rs", "codec/", "repository/"],
        why: "an id is a key: codec and repository alone see it",
    },
    Reserved {
        words: &[
            "to_le_bytes",
            "from_le_bytes",
            "to_be_bytes",
            "from_be_bytes",
        ],
        only_in: &[
            "format/",
            // The layouts that carry ids, minisign's and age's.
            "codec/",
            // The wire of NBD, and qcow2's header.
            "hypervisor/nbd/",
            "hypervisor/image/header.rs",
            // Lengths of journald's fields.
            "notify/journal.rs",
            // A hash spread over weekdays; a random file name.
            "policy/schedule.rs",
            "jobs/certificate.rs",
        ],
        why: "nothing outside of format knows a byte offset",
    },
    Reserved {
        words: &["tokio", "async fn", ".await"],
        only_in: &["storage/s3/", "notify/"],
        why: "traits are synchronous; a runtime lives where the network is",
    },
    Reserved {
        words: &["todo!", "unimplemented!"],
        only_in: &[],
        why: "a stub called done is a defect",
    },
    Reserved {
        words: &["unsafe {", "unsafe fn", "unsafe impl"],
        only_in: &[],
        why: "no unsafe code of our own",
    },
    Reserved {
        words: &[
            "Directory::open",
            "Directory::init",
            "ImageSource::new",
            "RawTarget::create",
            "Qcow2Target::create",
            "DeviceTarget::open",
            "LibvirtSource::new",
        ],
        // A domain that is shut off is read as the images it consists of.
        only_in: &["cli/", "hypervisor/libvirt/offline.rs"],
        why: "only the top picks a concrete store, hypervisor or target",
    },
];

/// Folder and file names that say nothing of a noun.
const EMPTY_NAMES: &[&str] = &[
    "util", "utils", "common", "manager", "helper", "helpers", "misc",
];

#[derive(Debug, PartialEq, Eq)]
struct Breach {
    file: String,
    line: usize,
    rule: String,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "src/{}:{}: {}", self.file, self.line, self.rule)
    }
}

/// Code that is compiled for tests only.
fn is_test_file(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    path.contains("/tests/")
        || matches!(
            name,
            "tests.rs" | "testing.rs" | "simulation.rs" | "trajectories.rs" | "hostile.rs"
        )
}

/// The lines of a file outside of its test module and its comments, numbered from 1.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let lines: Vec<&str> = text.lines().collect();
    let end = lines
        .windows(2)
        .position(|pair| {
            pair[0].trim() == "#[cfg(test)]"
                && pair[1].trim_start().starts_with("mod ")
                && pair[1].trim_end().ends_with('{')
        })
        .unwrap_or(lines.len());
    lines
        .into_iter()
        .take(end)
        .enumerate()
        .map(|(at, line)| (at + 1, line))
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
}

fn check(path: &str, text: &str) -> Vec<Breach> {
    let mut breaches = Vec::new();
    let mut breach = |line, rule: String| {
        breaches.push(Breach {
            file: path.to_string(),
            line,
            rule,
        });
    };
    for part in path.trim_end_matches(".rs").split('/') {
        if EMPTY_NAMES.contains(&part) {
            breach(1, format!("\"{part}\" names no noun"));
        }
    }
    if text.contains("#[ignore") {
        breach(1, "no test is ignored".to_string());
    }
    if is_test_file(path) {
        return breaches;
    }
    let room = ROOMS
        .iter()
        .find(|room| path.split('/').next() == Some(room.name));
    for (number, line) in code_lines(text) {
        if let Some(room) = room {
            for imported in imports(line) {
                let known = ROOMS.iter().find(|other| other.name == imported);
                let allowed = imported == room.name || room.may_import.contains(&imported);
                if let Some(known) = known
                    && !allowed
                {
                    breach(
                        number,
                        format!(
                            "{} (floor {}) may not import {} (floor {})",
                            room.name, room.floor, known.name, known.floor
                        ),
                    );
                }
            }
        }
        for rule in RESERVED {
            let elsewhere = !rule.only_in.iter().any(|place| path.starts_with(place));
            if let Some(word) = rule.words.iter().find(|word| line.contains(**word))
                && elsewhere
            {
                breach(number, format!("{word}: {}", rule.why));
            }
        }
    }
    if path == "model/id.rs" {
        breaches.extend(check_secret_id(path, text));
    }
    breaches
}

/// The rooms that a line names by `crate::room`.
fn imports(line: &str) -> Vec<&str> {
    line.split("crate::")
        .skip(1)
        .map(|rest| {
            let end = rest
                .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                .unwrap_or(rest.len());
            &rest[..end]
        })
        .collect()
}

/// The secret id can be compared and copied, and nothing else.
fn check_secret_id(path: &str, text: &str) -> Vec<Breach> {
    let mut breaches = Vec::new();
    let lines: Vec<&str> = text.lines().collect();
    for (at, line) in lines.iter().enumerate() {
        let derived = lines.get(at.wrapping_sub(1)).copied().unwrap_or_default();
        let leaks = ["Debug", "Display", "Serialize", "Hash", "Ord"]
            .iter()
            .any(|word| derived.contains(word));
        let by_hand = line.contains(" for Id ") || line.contains(" for Id{");
        if (line.starts_with("pub struct Id(") && leaks) || by_hand {
            breaches.push(Breach {
                file: path.to_string(),
                line: at + 1,
                rule: "an id has no Debug, Display or serde".to_string(),
            });
        }
    }
    breaches
}

fn sources(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("src is readable") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

#[test]
fn imports_point_down_and_what_is_reserved_stays_in_its_place() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 50, "the sources are not there");
    let mut breaches = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).expect("a source");
        let path = file.strip_prefix(&root).expect("below src");
        breaches.extend(check(&path.to_string_lossy(), &text));
    }
    let shown: Vec<String> = breaches.iter().map(ToString::to_string).collect();
    assert!(shown.is_empty(), "\n{}", shown.join("\n"));
}

#[test]
fn every_folder_of_the_sources_is_a_room() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for entry in fs::read_dir(root).expect("src is readable") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            let name = path.file_name().and_then(|name| name.to_str());
            assert!(
                ROOMS.iter().any(|room| Some(room.name) == name),
                "src/{} is on no floor",
                name.unwrap_or_default()
            );
        }
    }
}

#[test]
fn the_table_of_floors_points_down() {
    for room in ROOMS {
        for imported in room.may_import {
            let below = ROOMS.iter().find(|other| other.name == *imported);
            let below = below.expect("a room");
            let same_room = (room.name, *imported) == ("codec", "format");
            let top = (room.name, *imported) == ("cli", "config");
            assert!(
                below.floor < room.floor || same_room || top,
                "{}",
                room.name
            );
        }
    }
}

#[test]
fn each_rule_can_fail() {
    let bad = [
        ("storage/x.rs", "use crate::codec::Keys;"),
        ("storage/x.rs", "let x = crate::hypervisor::nbd::Y;"),
        ("policy/x.rs", "use crate::storage::Storage;"),
        ("notify/x.rs", "use crate::jobs::Alarm;"),
        ("repository/x.rs", "use crate::jobs::prune;"),
        ("config/x.rs", "use crate::cli::Exit;"),
        ("jobs/x.rs", "    println!(\"\");"),
        ("jobs/x.rs", "std::process::exit(1);"),
        ("jobs/x.rs", "let now = Timestamp::now();"),
        ("jobs/x.rs", "id.secret_bytes()"),
        ("repository/x.rs", "n.to_le_bytes()"),
        ("repository/x.rs", "async fn x() {}"),
        ("cli/x.rs", "todo!()"),
        ("cli/x.rs", "unsafe { x() }"),
        ("jobs/x.rs", "Directory::open(path)"),
        ("jobs/util.rs", ""),
        ("jobs/x.rs", "#[ignore]"),
        ("model/id.rs", "#[derive(Debug)]\npub struct Id([u8; 32]);"),
        ("model/id.rs", "impl fmt::Display for Id {"),
    ];
    for (path, text) in bad {
        assert_eq!(check(path, text).len(), 1, "{path}: {text}");
    }
    let good = [
        ("storage/x.rs", "use crate::model::ObjectName;"),
        ("storage/x.rs", "// use crate::codec::Keys;"),
        (
            "storage/x.rs",
            "#[cfg(test)]\nmod tests {\n    use crate::codec::Keys;\n}",
        ),
        ("cli/x.rs", "println!(\"\")"),
    ];
    for (path, text) in good {
        assert_eq!(check(path, text), [], "{path}: {text}");
    }
}
