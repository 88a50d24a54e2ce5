//! One connection to a server, one request in flight.

use super::handshake::{Export, negotiate};
use super::reply::{self, StatusExtent};
use super::{Endpoint, NbdError, wire};
use crate::model::Extent;
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A socket whose reads and writes share one limit: a peer that sends a byte a minute cannot
/// stretch a request, as it could with a time-out of each system call.
struct TimedStream {
    stream: UnixStream,
    limit: Duration,
    deadline: Instant,
}

impl TimedStream {
    fn new(stream: UnixStream, limit: Duration) -> Self {
        TimedStream {
            stream,
            limit,
            deadline: Instant::now() + limit,
        }
    }

    fn restart(&mut self) {
        self.deadline = Instant::now() + self.limit;
    }

    fn remaining(&self) -> io::Result<Duration> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match left.is_zero() {
            true => Err(io::ErrorKind::TimedOut.into()),
            false => Ok(left),
        }
    }
}

impl Read for TimedStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.remaining()?))?;
        self.stream.read(buffer)
    }
}

impl Write for TimedStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.remaining()?))?;
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// `connect` waits without limit where the server's queue is full; this one asks again.
fn connect(endpoint: &Endpoint) -> Result<UnixStream, NbdError> {
    let deadline = Instant::now() + endpoint.timeout;
    let address = SocketAddrUnix::new(&endpoint.socket).map_err(io::Error::from)?;
    let socket = net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(io::Error::from)?;
    loop {
        match net::connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

pub(super) struct Connection {
    stream: TimedStream,
    export: Export,
    cookie: u64,
}

impl Connection {
    pub(super) fn open(endpoint: &Endpoint) -> Result<Self, NbdError> {
        Self::over(connect(endpoint)?, endpoint)
    }

    pub(super) fn over(stream: UnixStream, endpoint: &Endpoint) -> Result<Self, NbdError> {
        let mut stream = TimedStream::new(stream, endpoint.timeout);
        let export = negotiate(&mut stream, &endpoint.export, &endpoint.contexts)?;
        Ok(Connection {
            stream,
            export,
            cookie: 0,
        })
    }

    pub(super) fn export(&self) -> &Export {
        &self.export
    }

    fn send(
        &mut self,
        kind: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> Result<u64, NbdError> {
        self.stream.restart();
        // A fresh cookie for every request, so that a late or repeated reply never fits.
        self.cookie = self.cookie.wrapping_add(1);
        let request = wire::request(kind, self.cookie, offset, length);
        self.stream.write_all(&request)?;
        self.stream.write_all(payload)?;
        Ok(self.cookie)
    }

    pub(super) fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), NbdError> {
        let cookie = self.send(wire::COMMAND_READ, offset, length_of(buffer.len())?, &[])?;
        reply::receive_data(&mut self.stream, cookie, offset, buffer)
    }

    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), NbdError> {
        let cookie = self.send(wire::COMMAND_WRITE, offset, length_of(data.len())?, data)?;
        reply::receive_done(&mut self.stream, cookie)
    }

    /// A command of an extent, or of nothing, that returns nothing.
    pub(super) fn command(&mut self, kind: u16, offset: u64, length: u32) -> Result<(), NbdError> {
        let cookie = self.send(kind, offset, length, &[])?;
        reply::receive_done(&mut self.stream, cookie)
    }

    pub(super) fn status(
        &mut self,
        context: &str,
        offset: u64,
        length: u32,
    ) -> Result<Vec<StatusExtent>, NbdError> {
        let wanted = self
            .export
            .contexts
            .iter()
            .find(|(name, _)| name == context)
            .map(|(_, number)| *number)
            .ok_or_else(|| NbdError::NoContext(context.to_string()))?;
        let cookie = self.send(wire::COMMAND_BLOCK_STATUS, offset, length, &[])?;
        let numbers: Vec<u32> = self.export.contexts.iter().map(|(_, id)| *id).collect();
        let requested = Extent::new(offset, u64::from(length));
        reply::receive_status(&mut self.stream, cookie, requested, &numbers, wanted)
    }

    /// Says goodbye. The server sends no answer to it.
    pub(super) fn disconnect(mut self) -> Result<(), NbdError> {
        self.send(wire::COMMAND_DISCONNECT, 0, 0, &[]).map(|_| ())
    }
}

fn length_of(length: usize) -> Result<u32, NbdError> {
    u32::try_from(length).map_err(|_| NbdError::Request("a request is too long".to_string()))
}
