//! From a fresh connection to an export that is ready for requests.

use super::NbdError;
use super::reply::receive_payload;
use super::wire::{self, BlockSizes, ExportInfo, Fields, OptionReply};
use crate::model::MAX_DISK_BYTES;
use std::io::{Read, Write};

/// A server may send several replies to one option; more than this is a stall.
const MAX_REPLIES: usize = 64;

/// An export as it was negotiated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Export {
    pub size: u64,
    pub flags: u16,
    pub blocks: BlockSizes,
    /// (name, number on this connection), in the order they were asked for.
    pub contexts: Vec<(String, u32)>,
}

impl Export {
    pub(super) fn allows(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

pub(super) fn negotiate(
    stream: &mut (impl Read + Write),
    export: &str,
    contexts: &[String],
) -> Result<Export, NbdError> {
    greet(stream)?;
    structured_replies(stream)?;
    let contexts = match contexts.is_empty() {
        true => Vec::new(),
        false => meta_contexts(stream, export, contexts)?,
    };
    let (info, blocks) = go(stream, export)?;
    if info.size == 0 || info.size > MAX_DISK_BYTES {
        return Err(NbdError::Refused(format!(
            "an export of {} bytes (1 to {MAX_DISK_BYTES} are possible)",
            info.size
        )));
    }
    if !info.size.is_multiple_of(u64::from(blocks.minimum)) {
        return Err(NbdError::protocol(
            "the size of the export is not a multiple of its blocks",
        ));
    }
    Ok(Export {
        size: info.size,
        flags: info.flags,
        blocks,
        contexts,
    })
}

fn greet(stream: &mut (impl Read + Write)) -> Result<(), NbdError> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    let mut fields = Fields::new(&greeting);
    if fields.u64()? != wire::SERVER_MAGIC || fields.u64()? != wire::OPTION_MAGIC {
        return Err(NbdError::protocol("the peer is not an NBD server"));
    }
    let flags = fields.u16()?;
    if flags & wire::FIXED_NEWSTYLE == 0 {
        return Err(NbdError::Refused(
            "it speaks an old dialect (no fixed newstyle)".to_string(),
        ));
    }
    let ours = u32::from(flags & (wire::FIXED_NEWSTYLE | wire::NO_ZEROES));
    stream.write_all(&ours.to_be_bytes())?;
    Ok(())
}

fn receive_option_reply(
    stream: &mut impl Read,
    option: u32,
) -> Result<(OptionReply, Vec<u8>), NbdError> {
    let mut header = [0; 20];
    stream.read_exact(&mut header)?;
    let reply = wire::option_reply(&header, option)?;
    let payload = receive_payload(stream, reply.length, wire::MAX_OPTION_REPLY)?;
    if reply.kind & wire::REPLY_ERROR_BIT == 0 {
        return Ok((reply, payload));
    }
    let what = match option {
        wire::OPTION_GO => "the export",
        wire::OPTION_STRUCTURED_REPLY => "structured replies",
        _ => "metadata contexts",
    };
    let number = reply.kind & !wire::REPLY_ERROR_BIT;
    Err(NbdError::Refused(format!(
        "{what} (error {number}) {}",
        wire::text(&payload)
    )))
}

fn structured_replies(stream: &mut (impl Read + Write)) -> Result<(), NbdError> {
    stream.write_all(&wire::option(wire::OPTION_STRUCTURED_REPLY, &[])?)?;
    match receive_option_reply(stream, wire::OPTION_STRUCTURED_REPLY)? {
        (
            OptionReply {
                kind: wire::REPLY_ACK,
                length: 0,
            },
            _,
        ) => Ok(()),
        _ => Err(NbdError::protocol("an unexpected option reply")),
    }
}

fn meta_contexts(
    stream: &mut (impl Read + Write),
    export: &str,
    wanted: &[String],
) -> Result<Vec<(String, u32)>, NbdError> {
    let mut data = Vec::new();
    wire::put_string(&mut data, export)?;
    let count = u32::try_from(wanted.len())
        .map_err(|_| NbdError::Request("too many metadata contexts".to_string()))?;
    data.extend_from_slice(&count.to_be_bytes());
    for name in wanted {
        wire::put_string(&mut data, name)?;
    }
    stream.write_all(&wire::option(wire::OPTION_SET_META_CONTEXT, &data)?)?;
    let mut offered: Vec<(String, u32)> = Vec::new();
    for _ in 0..MAX_REPLIES {
        let (reply, payload) = receive_option_reply(stream, wire::OPTION_SET_META_CONTEXT)?;
        match reply.kind {
            wire::REPLY_META_CONTEXT => {
                let mut fields = Fields::new(&payload);
                let number = fields.u32()?;
                let name = String::from_utf8(fields.rest().to_vec())
                    .map_err(|_| NbdError::protocol("the name of a context is not UTF-8"))?;
                let known = |(theirs, id): &(String, u32)| *theirs == name || *id == number;
                if !wanted.contains(&name) || offered.iter().any(known) {
                    return Err(NbdError::protocol("a context that was not asked for"));
                }
                offered.push((name, number));
            }
            wire::REPLY_ACK if payload.is_empty() => {
                return wanted
                    .iter()
                    .map(|name| {
                        offered
                            .iter()
                            .find(|(theirs, _)| theirs == name)
                            .cloned()
                            .ok_or_else(|| NbdError::NoContext(name.clone()))
                    })
                    .collect();
            }
            _ => return Err(NbdError::protocol("an unexpected option reply")),
        }
    }
    Err(NbdError::protocol("too many option replies"))
}

fn go(
    stream: &mut (impl Read + Write),
    export: &str,
) -> Result<(ExportInfo, BlockSizes), NbdError> {
    let mut data = Vec::new();
    wire::put_string(&mut data, export)?;
    data.extend_from_slice(&1u16.to_be_bytes());
    data.extend_from_slice(&wire::INFO_BLOCK_SIZE.to_be_bytes());
    stream.write_all(&wire::option(wire::OPTION_GO, &data)?)?;
    let mut info = None;
    let mut blocks = None;
    for _ in 0..MAX_REPLIES {
        let (reply, payload) = receive_option_reply(stream, wire::OPTION_GO)?;
        match reply.kind {
            wire::REPLY_INFO => {
                let mut fields = Fields::new(&payload);
                match fields.u16()? {
                    wire::INFO_EXPORT => {
                        let export = ExportInfo {
                            size: fields.u64()?,
                            flags: fields.u16()?,
                        };
                        if info.replace(export).is_some() {
                            return Err(NbdError::protocol("an export described twice"));
                        }
                    }
                    wire::INFO_BLOCK_SIZE => blocks = Some(wire::block_sizes(fields)?),
                    // Descriptions and names that nobody asked for are allowed, and ignored.
                    _ => {}
                }
            }
            wire::REPLY_ACK if payload.is_empty() => {
                let info =
                    info.ok_or_else(|| NbdError::protocol("an export without a description"))?;
                return Ok((info, blocks.unwrap_or_default()));
            }
            _ => return Err(NbdError::protocol("an unexpected option reply")),
        }
    }
    Err(NbdError::protocol("too many option replies"))
}
