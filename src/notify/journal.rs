//! journald's native protocol, by hand: a datagram of fields, or the descriptor of a sealed memory file
//! where they do not fit. The crates for it bring a second set of system calls (`nix`) and more, for what
//! is a page here. <https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>

use super::{Message, Notifier, NotifyError, NotifyErrorKind, Severity};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::fs::File;
use std::io::{self, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where journald listens.
pub const JOURNAL_SOCKET: &str = "/run/systemd/journal/socket";
/// A queue that stays full for so long is not waited for any more.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, Clone)]
pub struct JournalSettings {
    pub socket: PathBuf,
}

/// Fields in the journal, for `journalctl VMKEEP_VM=web01` and for what collects them:
/// `VMKEEP_EVENT`, `VMKEEP_SEVERITY`, `VMKEEP_ALARM`, `VMKEEP_CUSTOMER`, `VMKEEP_VM`, `VMKEEP_HOST`,
/// `VMKEEP_AT`, `VMKEEP_TEXT`, `VMKEEP_REPORT` (JSON), beside `MESSAGE` and `PRIORITY`.
pub struct Journal {
    settings: JournalSettings,
}

impl Journal {
    pub fn new(settings: JournalSettings) -> Self {
        Journal { settings }
    }

    /// Whether somebody listens there.
    pub fn is_there(&self) -> bool {
        self.settings.socket.exists()
    }
}

impl Notifier for Journal {
    fn name(&self) -> String {
        "journald".to_string()
    }

    fn send(&self, messages: &[Message]) -> Result<(), NotifyError> {
        for message in messages {
            send(&self.settings.socket, &entry(message)).map_err(|error| {
                let kind = match error.kind() {
                    io::ErrorKind::NotFound => NotifyErrorKind::Misconfigured,
                    _ => NotifyErrorKind::Transient,
                };
                let socket = self.settings.socket.display();
                NotifyError::new(kind, &self.name(), format!("{socket}: {error}"))
            })?;
        }
        Ok(())
    }
}

fn entry(message: &Message) -> Vec<u8> {
    let priority = match message.severity {
        Severity::Info => "6",
        Severity::Warning => "4",
        Severity::Critical => "2",
    };
    let at = message.at.to_string();
    let report = message.document.as_ref().map(|report| report.to_string());
    let fields = [
        ("MESSAGE", Some(message.subject.as_str())),
        ("PRIORITY", Some(priority)),
        ("SYSLOG_IDENTIFIER", Some("vmkeep")),
        ("VMKEEP_EVENT", Some(message.event.as_str())),
        ("VMKEEP_SEVERITY", Some(message.severity.as_str())),
        ("VMKEEP_ALARM", message.key.as_deref()),
        ("VMKEEP_CUSTOMER", message.customer.as_deref()),
        ("VMKEEP_VM", message.vm.as_deref()),
        ("VMKEEP_HOST", Some(message.host.as_str())),
        ("VMKEEP_AT", Some(at.as_str())),
        ("VMKEEP_TEXT", Some(message.text.as_str())),
        ("VMKEEP_REPORT", report.as_deref()),
    ];
    let mut entry = Vec::new();
    for (name, value) in fields {
        if let Some(value) = value {
            put(&mut entry, name, value);
        }
    }
    entry
}

/// A value with a line end would begin a field of its own: it goes with its length.
fn put(entry: &mut Vec<u8>, name: &str, value: &str) {
    entry.extend_from_slice(name.as_bytes());
    match value.contains('\n') {
        false => entry.push(b'='),
        true => {
            entry.push(b'\n');
            entry.extend_from_slice(&(value.len() as u64).to_le_bytes());
        }
    }
    entry.extend_from_slice(value.as_bytes());
    entry.push(b'\n');
}

fn send(path: &Path, entry: &[u8]) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.connect(path)?;
    match socket.send(entry) {
        Ok(_) => Ok(()),
        Err(error) if is_too_large(&error) => send_file(&socket, entry),
        Err(error) => Err(error),
    }
}

fn is_too_large(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::MSGSIZE | Errno::NOBUFS)
    )
}

fn send_file(socket: &UnixDatagram, entry: &[u8]) -> io::Result<()> {
    let file: OwnedFd = memfd_create(
        "vmkeep-journal",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
    let mut file = File::from(file);
    file.write_all(entry)?;
    // What may still change under its reader, journald does not take.
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    fcntl_add_seals(&file, seals)?;
    let descriptors = [file.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("no space for a descriptor"));
    }
    sendmsg(
        socket,
        &[IoSlice::new(&[])],
        &mut control,
        SendFlags::empty(),
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::message;
    use super::*;
    use crate::notify::Event;
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    use std::io::{IoSliceMut, Read, Seek};

    /// A journald that takes what comes.
    struct Listener {
        folder: tempfile::TempDir,
        socket: UnixDatagram,
    }

    impl Listener {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let socket = UnixDatagram::bind(folder.path().join("socket")).expect("a socket");
            let patience = Some(Duration::from_secs(10));
            socket.set_read_timeout(patience).expect("a timeout");
            Listener { folder, socket }
        }

        fn journal(&self) -> Journal {
            Journal::new(JournalSettings {
                socket: self.folder.path().join("socket"),
            })
        }

        /// The entry, and whether it came as a file.
        fn entry(&self) -> (Vec<u8>, bool) {
            let mut bytes = vec![0; 1 << 20];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let received = recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut control,
                RecvFlags::empty(),
            )
            .expect("a datagram");
            let mut content = None;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    for descriptor in descriptors {
                        let mut file = File::from(descriptor);
                        let mut bytes = Vec::new();
                        file.rewind().expect("a file");
                        file.read_to_end(&mut bytes).expect("a file");
                        file.set_len(0).expect_err("it is sealed");
                        content = Some(bytes);
                    }
                }
            }
            match content {
                Some(content) => (content, true),
                None => (bytes[..received.bytes].to_vec(), false),
            }
        }
    }

    #[test]
    fn every_message_is_an_entry_with_its_fields() {
        let listener = Listener::new();
        let mut first = message(Event::Raised, Severity::Critical, "a hole");
        first.text = "one\nVMKEEP_VM=forged".to_string();
        let mut second = message(Event::Report, Severity::Info, "all done");
        (second.key, second.customer, second.vm) = (None, None, None);
        listener.journal().send(&[first, second]).expect("sent");
        let (entry, as_file) = listener.entry();
        let mut expected = b"MESSAGE=a hole\nPRIORITY=2\nSYSLOG_IDENTIFIER=vmkeep\n\
            VMKEEP_EVENT=raised\nVMKEEP_SEVERITY=critical\nVMKEEP_ALARM=hole acme/web01\n\
            VMKEEP_CUSTOMER=acme\nVMKEEP_VM=web01\nVMKEEP_HOST=host1\n\
            VMKEEP_AT=2031-02-10T23:00:00Z\nVMKEEP_TEXT\n"
            .to_vec();
        expected.extend_from_slice(&[20, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend_from_slice(b"one\nVMKEEP_VM=forged\n");
        assert_eq!((entry, as_file), (expected, false));
        let (entry, _) = listener.entry();
        let entry = String::from_utf8_lossy(&entry);
        assert!(entry.contains("PRIORITY=6\n") && !entry.contains("VMKEEP_ALARM"));
    }

    #[test]
    fn what_is_too_large_for_a_datagram_comes_as_a_sealed_file() {
        let listener = Listener::new();
        let mut large = message(Event::Report, Severity::Info, "all done");
        large.document = Some(serde_json::Value::String("x".repeat(4 << 20)));
        listener.journal().send(&[large.clone()]).expect("sent");
        let (content, as_file) = listener.entry();
        assert!(as_file);
        assert!(content == entry(&large), "another entry came");
    }

    #[test]
    fn an_absent_journal_is_said() {
        let listener = Listener::new();
        let journal = listener.journal();
        assert!(journal.is_there());
        std::fs::remove_file(&journal.settings.socket).expect("removed");
        assert!(!journal.is_there());
        let hole = message(Event::Raised, Severity::Critical, "a hole");
        let error = journal.send(&[hole]).expect_err("nobody is there");
        assert_eq!(error.kind, NotifyErrorKind::Misconfigured);
    }
}
