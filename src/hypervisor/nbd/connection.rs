//! One connection to a server, one request in flight.

use super::handshake::{Export, negotiate};
use super::reply::{self, StatusExtent};
use super::{Endpoint, NbdError, wire};
use crate::hypervisor::timed_stream::TimedStream;
use crate::model::Extent;
use std::io::Write;
use std::time::{Duration, Instant};

pub(super) struct Connection {
    stream: TimedStream,
    /// Of one request with its reply.
    limit: Duration,
    flush_limit: Duration,
    export: Export,
    cookie: u64,
}

impl Connection {
    pub(super) fn open(endpoint: &Endpoint) -> Result<Self, NbdError> {
        let mut stream = TimedStream::connect(&endpoint.socket, endpoint.timeout)?;
        stream.until(Instant::now() + endpoint.timeout);
        let export = negotiate(&mut stream, &endpoint.export, &endpoint.contexts)?;
        Ok(Connection {
            stream,
            limit: endpoint.timeout,
            flush_limit: endpoint.flush_timeout,
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
        self.stream.until(Instant::now() + self.limit);
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

    /// A command of an extent that returns nothing.
    pub(super) fn command(&mut self, kind: u16, offset: u64, length: u32) -> Result<(), NbdError> {
        let cookie = self.send(kind, offset, length, &[])?;
        reply::receive_done(&mut self.stream, cookie)
    }

    pub(super) fn flush(&mut self) -> Result<(), NbdError> {
        let cookie = self.send(wire::COMMAND_FLUSH, 0, 0, &[])?;
        self.stream.until(Instant::now() + self.flush_limit);
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
