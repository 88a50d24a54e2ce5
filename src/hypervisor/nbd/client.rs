//! A pool of connections to one export, used by several threads at once.

use super::connection::Connection;
use super::handshake::Export;
use super::reply::StatusExtent;
use super::{Endpoint, NbdError, wire};
use crate::model::Extent;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Longest piece of a read or write: bounds how long one request can take.
const MAX_TRANSFER: u32 = 8 << 20;
/// Longest range of a status request; QEMU walks its tables for it.
const MAX_STATUS_RANGE: u32 = 1 << 30;
/// Most pieces that a status is kept in (some 200 MiB): half a TiB of which every other 64 KiB are dirty, for which
/// 16 GiB of small scattered writes do.
const MAX_STATUS_PIECES: usize = if cfg!(test) { 1 << 10 } else { 1 << 23 };
/// Longest range zeroed at once: where the storage cannot, the server writes each byte.
const MAX_ZEROES: u32 = 64 << 20;

struct Pool {
    idle: Vec<Connection>,
    /// Idle ones, and those that a thread holds or is opening.
    open: usize,
}

/// A client of one export. `read_at`, `write_at` and the others can be called from several
/// threads; each takes a connection of its own.
pub struct NbdClient {
    endpoint: Endpoint,
    export: Export,
    connections: usize,
    pool: Mutex<Pool>,
    returned: Condvar,
}

impl NbdClient {
    /// Opens the first connection; the others follow when they are needed.
    pub fn connect(endpoint: Endpoint) -> Result<Self, NbdError> {
        let first = Connection::open(&endpoint)?;
        let export = first.export().clone();
        let read_only = export.allows(wire::EXPORT_READ_ONLY);
        // Without MULTI_CONN a flush on one connection says nothing of the writes on others.
        let connections = match read_only || export.allows(wire::EXPORT_MULTI_CONN) {
            true => endpoint.connections.max(1),
            false => 1,
        };
        Ok(NbdClient {
            endpoint,
            export,
            connections,
            pool: Mutex::new(Pool {
                idle: vec![first],
                open: 1,
            }),
            returned: Condvar::new(),
        })
    }

    pub fn size_bytes(&self) -> u64 {
        self.export.size
    }

    pub fn is_read_only(&self) -> bool {
        self.export.allows(wire::EXPORT_READ_ONLY)
    }

    /// What the server reads and writes whole.
    pub fn block_bytes(&self) -> u32 {
        self.export.blocks.minimum
    }

    pub fn can_trim(&self) -> bool {
        !self.is_read_only() && self.export.allows(wire::EXPORT_TRIM)
    }

    /// Fills the buffer with the export's bytes, or fails.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), NbdError> {
        let wanted = self.within(offset, buffer.len())?;
        if wanted.length == 0 {
            return Ok(());
        }
        let aligned = self.aligned_outwards(wanted);
        if aligned == wanted {
            return self.with_connection(|connection| self.read_pieces(connection, offset, buffer));
        }
        let out_of_range = || NbdError::Request("a read is too long".to_string());
        let length = usize::try_from(aligned.length).map_err(|_| out_of_range())?;
        let front = usize::try_from(wanted.offset - aligned.offset).map_err(|_| out_of_range())?;
        let mut around = vec![0; length];
        self.with_connection(|connection| {
            self.read_pieces(connection, aligned.offset, &mut around)
        })?;
        let inner = around
            .get(front..)
            .and_then(|rest| rest.get(..buffer.len()))
            .ok_or_else(out_of_range)?;
        buffer.copy_from_slice(inner);
        Ok(())
    }

    fn read_pieces(
        &self,
        connection: &mut Connection,
        mut offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), NbdError> {
        for piece in buffer.chunks_mut(self.transfer_bytes()) {
            connection.read(offset, piece)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), NbdError> {
        let wanted = self.writable(offset, data.len() as u64)?;
        if wanted.length == 0 {
            return Ok(());
        }
        self.with_connection(|connection| {
            let mut offset = offset;
            for piece in data.chunks(self.transfer_bytes()) {
                connection.write(offset, piece)?;
                offset += piece.len() as u64;
            }
            Ok(())
        })
    }

    /// Makes the range read as zero; the server may deallocate it.
    pub fn write_zeroes(&self, range: Extent) -> Result<(), NbdError> {
        self.need(wire::EXPORT_WRITE_ZEROES, "write zeroes")?;
        self.ranged(wire::COMMAND_WRITE_ZEROES, range)
    }

    /// Tells the server that the range is no longer needed; it may read as anything then.
    pub fn trim(&self, range: Extent) -> Result<(), NbdError> {
        self.need(wire::EXPORT_TRIM, "trim")?;
        self.ranged(wire::COMMAND_TRIM, range)
    }

    fn ranged(&self, kind: u16, range: Extent) -> Result<(), NbdError> {
        let range = self.writable(range.offset, range.length)?;
        self.with_connection(|connection| {
            for (offset, length) in self.pieces(range, MAX_ZEROES) {
                connection.command(kind, offset, length)?;
            }
            Ok(())
        })
    }

    /// Brings everything that was acknowledged before to stable storage.
    pub fn flush(&self) -> Result<(), NbdError> {
        self.need(wire::EXPORT_FLUSH, "flush")?;
        self.with_connection(Connection::flush)
    }

    /// The flags of `range` in a metadata context: sorted, without gaps, neighbours differ.
    pub fn status(&self, context: &str, range: Extent) -> Result<Vec<StatusExtent>, NbdError> {
        let outside = || NbdError::Request("a range outside of the export".to_string());
        let end = range.offset.checked_add(range.length).ok_or_else(outside)?;
        if end > self.export.size {
            return Err(outside());
        }
        let mut found: Vec<StatusExtent> = Vec::new();
        if range.length == 0 {
            return Ok(found);
        }
        let around = self.aligned_outwards(range);
        // A server that answers in crumbs keeps us busy for ever: all answers together may take
        // what the requests could have taken that an honest one needs.
        let requests = around.length.div_ceil(u64::from(MAX_STATUS_RANGE));
        let requests = u32::try_from(requests).unwrap_or(u32::MAX);
        let limit = self.endpoint.timeout.saturating_mul(requests);
        let started = Instant::now();
        self.with_connection(|connection| {
            let mut offset = around.offset;
            while offset < around.end() {
                if started.elapsed() >= limit {
                    return Err(NbdError::TimedOut);
                }
                let rest = Extent::new(offset, around.end() - offset);
                let Some((_, length)) = self.pieces(rest, MAX_STATUS_RANGE).next() else {
                    break;
                };
                for status in connection.status(context, offset, length)? {
                    offset = status.extent.end();
                    let Some(extent) = status.extent.intersection(&range) else {
                        continue;
                    };
                    let is_full = found.len() >= MAX_STATUS_PIECES;
                    match found.last_mut().filter(|last| last.flags == status.flags) {
                        Some(last) => last.extent.length += extent.length,
                        None if is_full => return Err(NbdError::TooManyPieces),
                        None => found.push(StatusExtent {
                            extent,
                            flags: status.flags,
                        }),
                    }
                }
                let minimum = u64::from(self.export.blocks.minimum);
                if !offset.is_multiple_of(minimum) {
                    return Err(NbdError::protocol("a status extent is not of whole blocks"));
                }
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// Says goodbye on every connection. Requests must have ended.
    pub fn disconnect(self) -> Result<(), NbdError> {
        let idle = std::mem::take(&mut self.lock().idle);
        idle.into_iter().try_for_each(Connection::disconnect)
    }

    fn lock(&self) -> MutexGuard<'_, Pool> {
        // Nothing panics while it is held, and its content is valid after every statement.
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn within(&self, offset: u64, length: usize) -> Result<Extent, NbdError> {
        offset
            .checked_add(length as u64)
            .filter(|end| *end <= self.export.size)
            .map(|end| Extent::new(offset, end - offset))
            .ok_or_else(|| NbdError::Request("a range outside of the export".to_string()))
    }

    fn writable(&self, offset: u64, length: u64) -> Result<Extent, NbdError> {
        let request = |detail: &str| Err(NbdError::Request(detail.to_string()));
        if self.is_read_only() {
            return request("the export is read-only");
        }
        let minimum = u64::from(self.export.blocks.minimum);
        match offset.checked_add(length) {
            Some(end) if end <= self.export.size => {
                if !offset.is_multiple_of(minimum) || !length.is_multiple_of(minimum) {
                    return request("a write is not of whole blocks");
                }
                Ok(Extent::new(offset, length))
            }
            _ => request("a range outside of the export"),
        }
    }

    fn need(&self, flag: u16, what: &str) -> Result<(), NbdError> {
        match self.export.allows(flag) {
            true => Ok(()),
            false => Err(NbdError::Refused(format!("it cannot {what}"))),
        }
    }

    /// The smallest range of whole blocks around `range`, which lies in the export.
    fn aligned_outwards(&self, range: Extent) -> Extent {
        let minimum = u64::from(self.export.blocks.minimum);
        let start = range.offset / minimum * minimum;
        // The export's size is a multiple of its blocks, so this stays inside.
        let end = range.end().div_ceil(minimum) * minimum;
        Extent::new(start, end - start)
    }

    fn transfer_bytes(&self) -> usize {
        // At least one block: `maximum` is a multiple of `minimum`, or without limit.
        self.export.blocks.maximum.min(MAX_TRANSFER) as usize
    }

    /// `range` in pieces of at most `limit`, a multiple of every possible block size.
    fn pieces(&self, range: Extent, limit: u32) -> impl Iterator<Item = (u64, u32)> + use<> {
        let step = u64::from(limit);
        let count = range.length.div_ceil(step);
        (0..count).map(move |number| {
            let offset = range.offset + number * step;
            let length = step.min(range.end() - offset);
            (offset, u32::try_from(length).unwrap_or(limit))
        })
    }

    /// Runs `work` on a connection that no other thread uses. After an error the connection is
    /// closed: what it would say next belongs to nobody knows what.
    fn with_connection<T>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, NbdError>,
    ) -> Result<T, NbdError> {
        let mut place = Place::take(self)?;
        let mut connection = match place.connection.take() {
            Some(connection) => connection,
            None => self.open_another()?,
        };
        let result = work(&mut connection)?;
        place.connection = Some(connection);
        Ok(result)
    }

    fn open_another(&self) -> Result<Connection, NbdError> {
        let connection = Connection::open(&self.endpoint)?;
        if connection.export().size != self.export.size
            || connection.export().flags != self.export.flags
            || connection.export().blocks != self.export.blocks
        {
            return Err(NbdError::protocol(
                "the export is another one on a second connection",
            ));
        }
        Ok(connection)
    }
}

/// A thread's place in the pool. Given back when dropped, with or without its connection.
struct Place<'a> {
    client: &'a NbdClient,
    connection: Option<Connection>,
}

impl<'a> Place<'a> {
    fn take(client: &'a NbdClient) -> Result<Self, NbdError> {
        // Whoever holds a connection is bounded by its own limit, piece by piece; a long status
        // or read has many pieces, so this waits for several of them.
        let deadline = Instant::now() + client.endpoint.timeout * 4;
        let mut pool = client.lock();
        loop {
            if let Some(connection) = pool.idle.pop() {
                return Ok(Place {
                    client,
                    connection: Some(connection),
                });
            }
            if pool.open < client.connections {
                pool.open += 1;
                return Ok(Place {
                    client,
                    connection: None,
                });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(NbdError::TimedOut);
            }
            pool = client
                .returned
                .wait_timeout(pool, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut pool = self.client.lock();
        match self.connection.take() {
            Some(connection) => pool.idle.push(connection),
            None => pool.open = pool.open.saturating_sub(1),
        }
        drop(pool);
        self.client.returned.notify_one();
    }
}
