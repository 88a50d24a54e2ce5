//! A client for NBD servers on this host (QEMU, `qemu-nbd`, `qemu-storage-daemon`): fixed newstyle
//! handshake, structured replies, metadata contexts, one request in flight per connection and a
//! pool of connections for parallel work.
//!
//! The peer is not trusted. Lengths are bounded before anything is allocated, a reply is accepted
//! only if it answers exactly what was asked, every byte of a read must have been sent or declared
//! a hole by the server, and every wait has a limit. After any error its connection is closed:
//! a stream that was misunderstood once cannot be understood again.
//!
//! # What a lying server can and cannot do
//!
//! Refused, as an error of that disk: an export without bytes, of more than a disk may have or not
//! of whole blocks, and one that differs on a second connection; answers to another request, under
//! another context, twice, too short, too long, overlapping or with a gap; anything not understood.
//! Refused in time: handshakes and answers that trickle (one limit spans all bytes of a request
//! with its answer), that flood, and a status in crumbs (one limit spans all its answers, another
//! one all its pieces). A request is never sent again on a connection that failed.
//!
//! Not to be seen from here: other bytes than the disk's, zeroes or a hole over data (a hole is
//! skipped only where `base:allocation` has its flag ZERO), and a bitmap that hides a change. For
//! this server *is* the disk, as far as this client can know. A bitmap that lied is found by the
//! audit of the next full, which reads what the bitmap left out; a server that lies to all reads
//! alike is found by nobody but the guest.

mod client;
mod connection;
mod handshake;
#[cfg(test)]
mod hostile;
#[cfg(any(test, fuzzing))]
pub(super) mod hostile_bytes;
mod reply;
#[cfg(test)]
pub(super) mod testing;
mod wire;

pub use client::NbdClient;
pub use reply::StatusExtent;

use super::{CaptureError, CaptureErrorKind};
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// The metadata context that every server offers; its flags are `STATUS_HOLE` and `STATUS_ZERO`.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// `base:allocation`: nothing is allocated there. Says nothing of what is read.
pub const STATUS_HOLE: u32 = 1;
/// `base:allocation`: the extent reads as zero.
pub const STATUS_ZERO: u32 = 2;
/// `qemu:dirty-bitmap:…`: the extent was written to.
pub const STATUS_DIRTY: u32 = 1;

/// Longest time one request may take, reply included.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
pub const DEFAULT_CONNECTIONS: usize = 8;

/// Where a server listens and what is wanted of it.
#[derive(Debug, Clone)]
pub struct Endpoint {
    pub socket: PathBuf,
    pub export: String,
    /// Metadata contexts to negotiate; all are required. A status reply carries all of them, so
    /// one that the server answers with an error spoils the others: ask for what is needed only.
    pub contexts: Vec<String>,
    /// Longest time for the handshake, and for one request with its reply.
    pub timeout: Duration,
    /// The same for a flush, which may have much to write.
    pub flush_timeout: Duration,
    /// Most connections open at once.
    pub connections: usize,
}

impl Endpoint {
    pub fn new(socket: impl Into<PathBuf>, export: impl Into<String>) -> Self {
        Endpoint {
            socket: socket.into(),
            export: export.into(),
            contexts: Vec::new(),
            timeout: DEFAULT_TIMEOUT,
            flush_timeout: DEFAULT_TIMEOUT,
            connections: DEFAULT_CONNECTIONS,
        }
    }

    pub fn with_context(mut self, context: impl Into<String>) -> Self {
        self.contexts.push(context.into());
        self
    }
}

#[derive(Debug)]
pub enum NbdError {
    /// The socket failed.
    Io(io::Error),
    TimedOut,
    /// The peer hung up where more was due.
    Closed,
    /// The peer broke the protocol; nothing it sends is believed any more.
    Protocol(String),
    /// The server does not have what was asked for (export, structured replies).
    Refused(String),
    /// The server does not offer this metadata context.
    NoContext(String),
    /// The server answered a request with an error.
    Server {
        errno: u32,
        message: String,
    },
    /// The status has more pieces than are kept in memory.
    TooManyPieces,
    /// The request itself is impossible: outside of the export, read-only, unaligned.
    Request(String),
}

impl NbdError {
    fn protocol(detail: impl Into<String>) -> Self {
        NbdError::Protocol(detail.into())
    }

    pub fn into_capture(self, name: impl fmt::Display) -> CaptureError {
        let kind = match self {
            NbdError::Refused(_) | NbdError::NoContext(_) => CaptureErrorKind::Tool,
            NbdError::Request(_) => CaptureErrorKind::Invalid,
            _ => CaptureErrorKind::Io,
        };
        CaptureError::new(kind, name, self)
    }
}

impl From<io::Error> for NbdError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset => NbdError::Closed,
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => NbdError::TimedOut,
            _ => NbdError::Io(error),
        }
    }
}

impl fmt::Display for NbdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NbdError::Io(error) => write!(f, "NBD connection: {error}"),
            NbdError::TimedOut => f.write_str("the NBD server did not answer in time"),
            NbdError::Closed => f.write_str("the NBD server closed the connection"),
            NbdError::Protocol(detail) => write!(f, "the NBD server broke the protocol: {detail}"),
            NbdError::Refused(detail) => write!(f, "the NBD server refused: {detail}"),
            NbdError::NoContext(name) => {
                write!(f, "the NBD server does not offer the context {name:?}")
            }
            NbdError::Server { errno, message } => {
                let known = match errno {
                    1 => "operation not permitted",
                    5 => "I/O error",
                    12 => "out of memory",
                    22 => "invalid argument",
                    28 => "no space left",
                    75 => "too large",
                    95 => "not supported",
                    108 => "the server is shutting down",
                    _ => "error",
                };
                write!(f, "the NBD server answered: {known} ({errno})")?;
                if !message.is_empty() {
                    write!(f, ": {message}")?;
                }
                Ok(())
            }
            NbdError::TooManyPieces => f.write_str("the status has too many pieces"),
            NbdError::Request(detail) => f.write_str(detail),
        }
    }
}

impl std::error::Error for NbdError {}
