//! A unix socket with a deadline: what all peers of a capture are spoken to through.
//!
//! Reads and writes share one limit, so a peer that sends a byte a minute cannot stretch an
//! answer, as it could with a time-out of each system call.

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

#[derive(Debug)]
pub(super) struct TimedStream {
    stream: UnixStream,
    deadline: Instant,
}

impl TimedStream {
    /// `connect` waits without limit where the server's queue is full; this one asks again.
    pub(super) fn connect(socket: &Path, limit: Duration) -> io::Result<Self> {
        let deadline = Instant::now() + limit;
        let address = SocketAddrUnix::new(socket)?;
        let socket = net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        loop {
            match net::connect(&socket, &address) {
                Ok(()) => break,
                Err(Errno::AGAIN) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(false)?;
        Ok(TimedStream { stream, deadline })
    }

    /// Sets the time by which the next reads and writes must have ended.
    pub(super) fn until(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_server_whose_queue_is_full_is_left_in_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        net::listen(&listener, 0).unwrap();
        let limit = Duration::from_millis(200);
        let waiting: Vec<_> = (0..8)
            .map_while(|_| TimedStream::connect(&path, limit).ok())
            .collect();
        assert!(waiting.len() < 8, "the queue never filled");
        let started = Instant::now();
        let error = TimedStream::connect(&path, limit).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_peer_that_trickles_does_not_stretch_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let trickle = std::thread::spawn(move || {
            let (mut peer, _) = listener.accept().unwrap();
            let mut sent = 0;
            while peer.write_all(b"x").is_ok() {
                sent += 1;
                std::thread::sleep(Duration::from_millis(20));
            }
            sent
        });
        let limit = Duration::from_millis(300);
        let mut stream = TimedStream::connect(&path, limit).unwrap();
        stream.until(Instant::now() + limit);
        let error = stream.read_exact(&mut [0; 4096]).unwrap_err();
        assert!(matches!(
            error.kind(),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
        ));
        drop(stream);
        let sent = trickle.join().unwrap();
        assert!((1..4096).contains(&sent), "{sent}");
    }
}
