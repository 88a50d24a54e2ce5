//! Freezing the guest's file systems for the instant, and thawing them on every way out.
//!
//! Three things thaw: we do, after the instant and on every error; a guard, a process of its own
//! that waits for our death or for the limit; and the next `recover`, which finds our word in the
//! folder that we left. A thaw too many is harmless.

use super::domain::Domain;
use super::refused;
use super::virsh::{Process, Reply, Virsh};
use crate::hypervisor::guard::GuardCommand;
use crate::hypervisor::runtime_folder::RuntimeFolder;
use crate::hypervisor::{CaptureError, CaptureErrorKind};
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Time for one thaw.
const THAW_LIMIT: Duration = Duration::from_secs(10);
const THAW_ATTEMPTS: u32 = 5;
/// Time between two attempts.
const THAW_PAUSE: Duration = Duration::from_millis(500);
/// Time for a guard to end after it was told that all is well.
const GUARD_LIMIT: Duration = Duration::from_secs(2);
/// What a guard is told when its work has been done.
const THAWED: &[u8] = b"thawed\n";

/// Waits until the other end of `input` is closed or `limit` has passed, and thaws the domain
/// unless it was told that this has been done.
pub fn thaw_when_orphaned(
    mut input: impl Read + Send + 'static,
    virsh_program: PathBuf,
    uri: Option<String>,
    domain: &str,
    limit: Duration,
) -> Result<(), CaptureError> {
    let virsh = Process {
        program: virsh_program,
        uri,
    };
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut said = Vec::new();
        // A broken pipe is an end as well.
        let _ = input.by_ref().take(64).read_to_end(&mut said);
        let _ = sender.send(said);
    });
    match receiver.recv_timeout(limit) {
        Ok(said) if said == THAWED => Ok(()),
        _ => thaw(&virsh, domain, domain).map(drop),
    }
}

/// Thaws; tries again where the agent or libvirt is busy. `false`: nothing was frozen.
pub(super) fn thaw(virsh: &dyn Virsh, name: &str, uuid: &str) -> Result<bool, CaptureError> {
    let mut last = None;
    for attempt in 0..THAW_ATTEMPTS {
        if attempt > 0 {
            std::thread::sleep(THAW_PAUSE);
        }
        match virsh.run(&["domfsthaw", uuid], THAW_LIMIT) {
            Ok(reply) if reply.success => return Ok(!is_of_none(&reply)),
            // A VM that has stopped is not frozen, and gets no point of this instant.
            Ok(reply) if reply.stderr.contains("domain is not running") => return Ok(true),
            Ok(reply) => last = Some(refused(name, "thaw its file systems", &reply)),
            Err(error) => last = Some(error),
        }
    }
    let detail = last.map_or_else(String::new, |error| error.to_string());
    Err(CaptureError::new(
        CaptureErrorKind::Tool,
        name,
        format!(
            "the guest may still be frozen, and nothing can be written in it: {detail}; \
             run `virsh domfsthaw {name}`"
        ),
    ))
}

/// A guest that is frozen. Dropping it thaws.
pub(super) struct Frozen<'a> {
    virsh: &'a dyn Virsh,
    domain: &'a Domain,
    folder: &'a RuntimeFolder,
    guard: Option<Child>,
    since: Instant,
    limit: Duration,
    thawed: bool,
}

impl<'a> Frozen<'a> {
    pub(super) fn freeze(
        virsh: &'a dyn Virsh,
        domain: &'a Domain,
        folder: &'a RuntimeFolder,
        guard: Option<&GuardCommand>,
        limit: Duration,
    ) -> Result<Self, CaptureError> {
        let mut frozen = Frozen {
            virsh,
            domain,
            folder,
            guard: guard.map(spawn).transpose()?,
            since: Instant::now(),
            limit,
            thawed: false,
        };
        if let Err(error) = folder.note_frozen() {
            frozen.release();
            return Err(error);
        }
        let reply = virsh.run(&["domfsfreeze", &domain.uuid], limit);
        match reply {
            // The agent holds itself for frozen all the same, and refuses much else.
            Ok(reply) if reply.success && is_of_none(&reply) => {
                let why = CaptureError::new(
                    CaptureErrorKind::Tool,
                    &domain.name,
                    "its guest agent froze no file system",
                );
                frozen.thaw().and(Err(why))
            }
            Ok(reply) if reply.success => Ok(frozen),
            // No agent, so nothing was frozen and a thaw would only wait for it.
            Ok(reply) if is_without_agent(&reply) => {
                frozen.release();
                Err(refused(&domain.name, "freeze its file systems", &reply))
            }
            // Some of them may be frozen.
            Ok(reply) => {
                let why = refused(&domain.name, "freeze its file systems", &reply);
                frozen.thaw().and(Err(why))
            }
            Err(error) => frozen.thaw().and(Err(error)),
        }
    }

    /// How much longer the guest may be frozen.
    pub(super) fn left(&self) -> Duration {
        self.limit.saturating_sub(self.since.elapsed())
    }

    /// `false`: it had thawed itself before.
    pub(super) fn thaw(mut self) -> Result<bool, CaptureError> {
        self.thawed = true;
        let result = thaw(self.virsh, &self.domain.name, &self.domain.uuid);
        match &result {
            Ok(_) => self.release(),
            // The guard hears our end of the pipe close, and tries on its own.
            Err(_) => drop(self.guard.take().map(abandon)),
        }
        result
    }

    fn release(&mut self) {
        self.thawed = true;
        self.folder.note_thawed();
        if let Some(guard) = self.guard.take() {
            dismiss(guard);
        }
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        if self.thawed {
            return;
        }
        if thaw(self.virsh, &self.domain.name, &self.domain.uuid).is_ok() {
            self.release();
        }
    }
}

/// `Froze 2 filesystem(s)`, `Thawed 0 filesystem(s)`. What says no number is of some.
fn is_of_none(reply: &Reply) -> bool {
    let mut words = reply.stdout.split_whitespace();
    matches!(words.next(), Some("Froze" | "Thawed")) && words.next() == Some("0")
}

fn is_without_agent(reply: &Reply) -> bool {
    ["agent is not connected", "agent is not configured"]
        .iter()
        .any(|said| reply.stderr.contains(said))
}

fn spawn(guard: &GuardCommand) -> Result<Child, CaptureError> {
    Command::new(&guard.program)
        .args(&guard.arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // It must outlive Ctrl-C.
        .process_group(0)
        .spawn()
        .map_err(|error| {
            CaptureError::new(
                CaptureErrorKind::Tool,
                guard.program.display(),
                format!("the guard of a frozen guest: {error}"),
            )
        })
}

/// Tells the guard that all is well, and sees it end.
fn dismiss(mut guard: Child) {
    if let Some(mut input) = guard.stdin.take() {
        let _ = input.write_all(THAWED);
    }
    let deadline = Instant::now() + GUARD_LIMIT;
    while Instant::now() < deadline {
        if !matches!(guard.try_wait(), Ok(None)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let _ = guard.kill();
    let _ = guard.wait();
}

/// Leaves the guard to its work.
fn abandon(mut guard: Child) {
    drop(guard.stdin.take());
    std::thread::spawn(move || guard.wait());
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Say, Script, XML, domain};
    use super::super::{LibvirtSettings, LibvirtSource, folder_kind};
    use super::*;
    use crate::hypervisor::nbd::testing::{Dirty, TestServer};
    use crate::hypervisor::{Consistency, Freeze, Hypervisor, Outcome, Reading, runtime_folder};
    use std::fs;
    use std::os::unix::net::UnixListener;
    use std::sync::{Arc, Mutex};

    /// A libvirt that serves what it is asked to back up.
    struct Serving {
        script: Script,
        server: Mutex<Option<TestServer>>,
    }

    impl Virsh for Serving {
        fn run(&self, arguments: &[&str], limit: Duration) -> Result<Reply, CaptureError> {
            if let ["backup-begin", _, backup, ..] = arguments {
                let xml = fs::read_to_string(backup).unwrap();
                let (_, socket) = xml.split_once("socket='").unwrap();
                let (socket, _) = socket.split_once('\'').unwrap();
                let listener = UnixListener::bind(socket).unwrap();
                let server =
                    TestServer::start(listener, Arc::new(|_| Some(1 << 20)), Dirty::default());
                *self.server.lock().unwrap() = Some(server);
            }
            self.script.run(arguments, limit)
        }
    }

    const DISABLED: &str = "error: guest agent command failed: it has been disabled";

    #[test]
    fn a_guest_that_cannot_be_thawed_is_captured_night_after_night() {
        for freeze in [Say::No(DISABLED), Say::Yes("Froze 1 filesystem(s)")] {
            captured(freeze);
        }
    }

    fn settings_in(folder: &tempfile::TempDir) -> LibvirtSettings {
        LibvirtSettings {
            domain: "db".to_string(),
            uri: None,
            owner: "ab".to_string(),
            scratch_dir: folder.path().join("s"),
            scratch_reserve_bytes: 0,
            runtime_dir: folder.path().join("r"),
            freeze: Freeze::Try,
            freeze_limit: Duration::from_secs(10),
            guard: None,
            virsh: "/nonexistent/virsh".into(),
            now: "2031-02-10T23:00:00Z".parse().unwrap(),
        }
    }

    fn without_job(times: usize) -> Vec<(&'static str, Say)> {
        let none = "error: no domain backup job present";
        vec![("backup-dumpxml", Say::No(none)); times]
    }

    #[test]
    fn a_guest_is_taken_for_frozen_only_where_something_was_frozen_up_to_the_thaw() {
        for (freeze, thaw, expected) in [
            ("Froze 2 filesystem(s)\n", "Thawed 2 filesystem(s)\n", None),
            ("Froze 2 filesystem(s)\n", "", None),
            (
                "Froze 2 filesystem(s)\n",
                "Thawed 0 filesystem(s)\n",
                Some("thawed itself"),
            ),
            (
                "Froze 0 filesystem(s)\n",
                "Thawed 0 filesystem(s)\n",
                Some("froze no file system"),
            ),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let answers = vec![
                ("dumpxml", Say::Yes(XML)),
                ("dumpxml", Say::Yes(XML)),
                ("checkpoint-list", Say::Yes("")),
                ("domfsfreeze", Say::Yes(freeze)),
                ("backup-begin", Say::Yes("")),
                ("domfsthaw", Say::Yes(thaw)),
                ("domstate", Say::Yes("running (booted)\n")),
                ("checkpoint-list", Say::Yes("")),
            ];
            let source = LibvirtSource {
                settings: settings_in(&folder),
                virsh: Arc::new(Serving {
                    script: Script::new([answers, without_job(4)].concat()),
                    server: Mutex::default(),
                }),
            };
            let capture = source.open(&[], Reading::Everything).unwrap();
            let (consistency, notes) = (capture.consistency(), capture.notes());
            match expected {
                None => assert_eq!(consistency, Consistency::Filesystem, "{notes:?}"),
                Some(why) => {
                    assert_eq!(consistency, Consistency::Crash, "{notes:?}");
                    assert!(notes.iter().any(|note| note.contains(why)), "{notes:?}");
                }
            }
            capture.close(Outcome::Committed).unwrap();
        }
    }

    fn captured(freeze: Say) {
        let folder = tempfile::tempdir().unwrap();
        let settings = settings_in(&folder);
        let runtime_dir = settings.runtime_dir.clone();
        let kind = folder_kind(&settings.owner);
        // Two nights left their word.
        for _ in 0..2 {
            let left = RuntimeFolder::create(&runtime_dir, &kind, None).unwrap();
            left.note_frozen().unwrap();
        }
        let thaws = vec![("domfsthaw", Say::No(DISABLED)); 10];
        let answers = vec![
            ("dumpxml", Say::Yes(XML)),
            ("dumpxml", Say::Yes(XML)),
            ("dumpxml", Say::Yes(XML)),
            ("checkpoint-list", Say::Yes("")),
            ("domfsfreeze", freeze),
            ("backup-begin", Say::Yes("")),
            ("domstate", Say::Yes("running (booted)\n")),
            ("checkpoint-list", Say::Yes("")),
        ];
        let source = LibvirtSource {
            settings,
            virsh: Arc::new(Serving {
                script: Script::new([answers, thaws, without_job(4)].concat()),
                server: Mutex::default(),
            }),
        };
        let is_told = |notes: &[String]| {
            let told = |note: &String| note.contains("may still be frozen");
            assert!(notes.len() == 1 && told(&notes[0]), "{notes:?}");
        };

        is_told(&source.recover().unwrap());
        let capture = source.open(&[], Reading::Everything).unwrap();
        is_told(capture.notes());
        capture.close(Outcome::Committed).unwrap();

        // One word of the nights before, and the one of this night.
        let left = runtime_folder::dead(&runtime_dir, &kind).unwrap();
        assert_eq!(left.len(), 2);
        assert!(left.iter().all(RuntimeFolder::is_frozen));
    }

    #[test]
    fn a_guest_that_was_not_asked_to_freeze_leaves_no_word() {
        let parent = tempfile::tempdir().unwrap();
        let folder = RuntimeFolder::create(parent.path(), "lv-ab", None).unwrap();
        let guard = GuardCommand {
            program: "/nonexistent/guard".into(),
            arguments: Vec::new(),
        };
        let limit = Duration::from_secs(10);
        let script = Script::new(Vec::new());
        assert!(Frozen::freeze(&script, &domain(), &folder, Some(&guard), limit).is_err());
        assert!(!folder.is_frozen());
    }
}
