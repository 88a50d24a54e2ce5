//! Answers to requests, read from any stream: accepted only if they answer exactly what was asked.

use super::NbdError;
use super::wire::{self, ReplyHeader};
use crate::model::Extent;
use std::collections::BTreeMap;
use std::io::Read;
use std::ops::Range;

/// Part of an export and its flags in one metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusExtent {
    pub extent: Extent,
    pub flags: u32,
}

/// One chunk of a structured reply, checked to belong to the request.
struct Chunk {
    done: bool,
    kind: u16,
    length: u32,
}

enum Answer {
    /// A simple reply without error; never carries data here.
    Plain,
    Chunk(Chunk),
}

/// The next header that answers `cookie`. Errors of the server become errors here.
fn receive_header(stream: &mut impl Read, cookie: u64) -> Result<Answer, NbdError> {
    let mut magic = [0; 4];
    stream.read_exact(&mut magic)?;
    let magic = u32::from_be_bytes(magic);
    let mut rest = [0; 16];
    let rest = rest
        .get_mut(..wire::reply_header_rest(magic)?)
        .ok_or_else(|| NbdError::protocol("a reply header is too long"))?;
    stream.read_exact(rest)?;
    match wire::reply_header(magic, rest)? {
        ReplyHeader::Simple { cookie: theirs, .. } | ReplyHeader::Chunk { cookie: theirs, .. }
            if theirs != cookie =>
        {
            Err(NbdError::protocol("a reply to another request"))
        }
        ReplyHeader::Simple { errno: 0, .. } => Ok(Answer::Plain),
        ReplyHeader::Simple { errno, .. } => Err(NbdError::Server {
            errno,
            message: String::new(),
        }),
        ReplyHeader::Chunk { kind, length, .. } if kind & wire::CHUNK_ERROR_BIT != 0 => {
            let payload = receive_payload(stream, length, wire::MAX_ERROR_CHUNK)?;
            Err(wire::error_chunk(&payload)?)
        }
        ReplyHeader::Chunk {
            done, kind, length, ..
        } => Ok(Answer::Chunk(Chunk { done, kind, length })),
    }
}

pub(super) fn receive_payload(
    stream: &mut impl Read,
    length: u32,
    limit: u32,
) -> Result<Vec<u8>, NbdError> {
    if length > limit {
        return Err(NbdError::protocol("a message is longer than allowed"));
    }
    let mut payload = vec![0; length as usize];
    stream.read_exact(&mut payload)?;
    Ok(payload)
}

/// The answer to a request that returns nothing.
pub(super) fn receive_done(stream: &mut impl Read, cookie: u64) -> Result<(), NbdError> {
    match receive_header(stream, cookie)? {
        Answer::Plain
        | Answer::Chunk(Chunk {
            done: true,
            kind: wire::CHUNK_NONE,
            length: 0,
        }) => Ok(()),
        Answer::Chunk(_) => Err(NbdError::protocol("an unexpected chunk")),
    }
}

/// What has been answered of a read: which parts of the buffer hold the export's bytes.
struct Coverage {
    requested: Extent,
    /// Disjoint, not adjacent, sorted: start -> end.
    parts: BTreeMap<u64, u64>,
    /// A server that answers in crumbs keeps us busy for ever.
    chunks_left: u64,
}

impl Coverage {
    fn of(requested: Extent) -> Self {
        Coverage {
            requested,
            parts: BTreeMap::new(),
            chunks_left: requested.length / 512 + 16,
        }
    }

    /// Takes a chunk in; its place in the buffer.
    fn add(&mut self, offset: u64, length: u64) -> Result<Range<usize>, NbdError> {
        let end = offset.checked_add(length);
        let Some(end) = end.filter(|end| {
            length > 0 && offset >= self.requested.offset && *end <= self.requested.end()
        }) else {
            return Err(NbdError::protocol("a chunk outside of the request"));
        };
        self.chunks_left = self
            .chunks_left
            .checked_sub(1)
            .ok_or_else(|| NbdError::protocol("too many chunks"))?;
        let before = self
            .parts
            .range(..=offset)
            .next_back()
            .map(|(start, end)| (*start, *end));
        let after = self
            .parts
            .range(offset..)
            .next()
            .map(|(start, end)| (*start, *end));
        if before.is_some_and(|(_, before_end)| before_end > offset)
            || after.is_some_and(|(after_start, _)| after_start < end)
        {
            return Err(NbdError::protocol("a chunk overlaps another"));
        }
        let start = match before {
            Some((start, before_end)) if before_end == offset => start,
            _ => offset,
        };
        let joined_end = match after {
            Some((after_start, after_end)) if after_start == end => {
                self.parts.remove(&after_start);
                after_end
            }
            _ => end,
        };
        self.parts.insert(start, joined_end);
        let at = |position: u64| usize::try_from(position - self.requested.offset);
        match (at(offset), at(end)) {
            (Ok(start), Ok(end)) => Ok(start..end),
            _ => Err(NbdError::protocol("a chunk outside of the request")),
        }
    }

    fn complete(&self) -> Result<(), NbdError> {
        match self.parts.get(&self.requested.offset) {
            Some(end) if *end == self.requested.end() => Ok(()),
            _ => Err(NbdError::protocol("a read was answered in part only")),
        }
    }
}

/// The answer to a read. The buffer holds the export's bytes only if this returns Ok.
pub(super) fn receive_data(
    stream: &mut impl Read,
    cookie: u64,
    offset: u64,
    buffer: &mut [u8],
) -> Result<(), NbdError> {
    let mut coverage = Coverage::of(Extent::new(offset, buffer.len() as u64));
    loop {
        let Answer::Chunk(chunk) = receive_header(stream, cookie)? else {
            return Err(NbdError::protocol("a read was answered without data"));
        };
        match chunk.kind {
            wire::CHUNK_NONE if chunk.length == 0 && chunk.done => {}
            wire::CHUNK_DATA if chunk.length > 8 => {
                let mut start = [0; 8];
                stream.read_exact(&mut start)?;
                let place = coverage.add(u64::from_be_bytes(start), u64::from(chunk.length) - 8)?;
                stream.read_exact(part(buffer, place)?)?;
            }
            wire::CHUNK_HOLE if chunk.length == 12 => {
                let payload = receive_payload(stream, chunk.length, 12)?;
                let mut fields = wire::Fields::new(&payload);
                let place = coverage.add(fields.u64()?, u64::from(fields.u32()?))?;
                part(buffer, place)?.fill(0);
            }
            _ => return Err(NbdError::protocol("an unexpected chunk")),
        }
        if chunk.done {
            return coverage.complete();
        }
    }
}

fn part(buffer: &mut [u8], place: Range<usize>) -> Result<&mut [u8], NbdError> {
    buffer
        .get_mut(place)
        .ok_or_else(|| NbdError::protocol("a chunk outside of the request"))
}

/// The answer to a status request, for the context `wanted`: extents from `requested.offset` on,
/// without gaps, at least one, cut at the end of the request.
pub(super) fn receive_status(
    stream: &mut impl Read,
    cookie: u64,
    requested: Extent,
    contexts: &[u32],
    wanted: u32,
) -> Result<Vec<StatusExtent>, NbdError> {
    let mut seen: Vec<u32> = Vec::new();
    let mut answer = None;
    loop {
        let Answer::Chunk(chunk) = receive_header(stream, cookie)? else {
            return Err(NbdError::protocol("a status was answered without extents"));
        };
        match chunk.kind {
            wire::CHUNK_NONE if chunk.length == 0 && chunk.done => {}
            wire::CHUNK_STATUS => {
                let payload = receive_payload(stream, chunk.length, wire::MAX_STATUS_CHUNK)?;
                let (context, extents) = status_chunk(&payload, requested)?;
                if !contexts.contains(&context) || seen.contains(&context) {
                    return Err(NbdError::protocol("a status of another context"));
                }
                seen.push(context);
                if context == wanted {
                    answer = Some(extents);
                }
            }
            _ => return Err(NbdError::protocol("an unexpected chunk")),
        }
        if chunk.done {
            return answer.ok_or_else(|| NbdError::protocol("a status lacks a context"));
        }
    }
}

fn status_chunk(payload: &[u8], requested: Extent) -> Result<(u32, Vec<StatusExtent>), NbdError> {
    let mut fields = wire::Fields::new(payload);
    let context = fields.u32()?;
    let mut extents: Vec<StatusExtent> = Vec::new();
    let mut offset = requested.offset;
    while !fields.finished() {
        let (length, flags) = (u64::from(fields.u32()?), fields.u32()?);
        if length == 0 || offset >= requested.end() {
            return Err(NbdError::protocol("a status extent is empty or outside"));
        }
        // Only the last extent may reach beyond the request.
        let cut = length.min(requested.end() - offset);
        match extents.last_mut().filter(|last| last.flags == flags) {
            Some(last) => last.extent.length += cut,
            None => extents.push(StatusExtent {
                extent: Extent::new(offset, cut),
                flags,
            }),
        }
        offset = offset.saturating_add(length);
    }
    match extents.is_empty() {
        true => Err(NbdError::protocol("a status without extents")),
        false => Ok((context, extents)),
    }
}
