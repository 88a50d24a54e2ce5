//! Numbers and layouts of the protocol, and parsers over byte slices. No I/O.

use super::NbdError;

pub(super) const SERVER_MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(super) const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

pub(super) const FIXED_NEWSTYLE: u16 = 1;
pub(super) const NO_ZEROES: u16 = 2;

pub(super) const OPTION_GO: u32 = 7;
pub(super) const OPTION_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPTION_SET_META_CONTEXT: u32 = 10;

pub(super) const REPLY_ACK: u32 = 1;
pub(super) const REPLY_INFO: u32 = 3;
pub(super) const REPLY_META_CONTEXT: u32 = 4;
/// Option replies with this bit are errors.
pub(super) const REPLY_ERROR_BIT: u32 = 1 << 31;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

pub(super) const EXPORT_READ_ONLY: u16 = 1 << 1;
pub(super) const EXPORT_FLUSH: u16 = 1 << 2;
pub(super) const EXPORT_TRIM: u16 = 1 << 5;
pub(super) const EXPORT_WRITE_ZEROES: u16 = 1 << 6;
pub(super) const EXPORT_MULTI_CONN: u16 = 1 << 8;

pub(super) const COMMAND_READ: u16 = 0;
pub(super) const COMMAND_WRITE: u16 = 1;
pub(super) const COMMAND_DISCONNECT: u16 = 2;
pub(super) const COMMAND_FLUSH: u16 = 3;
pub(super) const COMMAND_TRIM: u16 = 4;
pub(super) const COMMAND_WRITE_ZEROES: u16 = 6;
pub(super) const COMMAND_BLOCK_STATUS: u16 = 7;

pub(super) const CHUNK_DONE: u16 = 1;
pub(super) const CHUNK_NONE: u16 = 0;
pub(super) const CHUNK_DATA: u16 = 1;
pub(super) const CHUNK_HOLE: u16 = 2;
pub(super) const CHUNK_STATUS: u16 = 5;
/// Chunks with this bit are errors, known to us or not.
pub(super) const CHUNK_ERROR_BIT: u16 = 1 << 15;

/// Largest option reply and error chunk that is read; the protocol's strings have 4096 bytes.
pub(super) const MAX_OPTION_REPLY: u32 = 16 * 1024;
pub(super) const MAX_ERROR_CHUNK: u32 = 8 * 1024;
/// QEMU never sends more than 1 MiB of extents in a status chunk.
pub(super) const MAX_STATUS_CHUNK: u32 = 4 + (1 << 20);

/// Reads big-endian fields from the front of a slice.
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Fields(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], NbdError> {
        let (front, rest) = self
            .0
            .split_first_chunk::<N>()
            .ok_or_else(|| NbdError::protocol("a message is shorter than its fields"))?;
        self.0 = rest;
        Ok(*front)
    }

    pub(super) fn u16(&mut self) -> Result<u16, NbdError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, NbdError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, NbdError> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn rest(self) -> &'a [u8] {
        self.0
    }

    pub(super) fn finished(&self) -> bool {
        self.0.is_empty()
    }
}

/// A server's text for a message or log: bounded, one line.
pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .chars()
        .take(200)
        .map(|letter| match letter.is_control() {
            true => ' ',
            false => letter,
        })
        .collect()
}

pub(super) fn request(kind: u16, cookie: u64, offset: u64, length: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    let fields: [&[u8]; 6] = [
        &REQUEST_MAGIC.to_be_bytes(),
        &0u16.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ];
    for (slot, byte) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
        *slot = *byte;
    }
    bytes
}

pub(super) fn option(kind: u32, data: &[u8]) -> Result<Vec<u8>, NbdError> {
    let length = u32::try_from(data.len())
        .map_err(|_| NbdError::Request("an NBD option is too long".to_string()))?;
    let mut bytes = Vec::with_capacity(16 + data.len());
    bytes.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(data);
    Ok(bytes)
}

/// A name or query of an option: its length, then its bytes.
pub(super) fn put_string(bytes: &mut Vec<u8>, string: &str) -> Result<(), NbdError> {
    // The protocol's own bound for strings.
    let length = u32::try_from(string.len())
        .ok()
        .filter(|length| *length <= 4096)
        .ok_or_else(|| NbdError::Request("an NBD name is longer than 4096 bytes".to_string()))?;
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(string.as_bytes());
    Ok(())
}

/// The front of an answer to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OptionReply {
    pub kind: u32,
    pub length: u32,
}

pub(super) fn option_reply(bytes: &[u8; 20], option: u32) -> Result<OptionReply, NbdError> {
    let mut fields = Fields::new(bytes);
    if fields.u64()? != OPTION_REPLY_MAGIC {
        return Err(NbdError::protocol("wrong magic in an option reply"));
    }
    if fields.u32()? != option {
        return Err(NbdError::protocol("a reply to another option"));
    }
    let reply = OptionReply {
        kind: fields.u32()?,
        length: fields.u32()?,
    };
    match reply.length <= MAX_OPTION_REPLY {
        true => Ok(reply),
        false => Err(NbdError::protocol("an option reply is too long")),
    }
}

/// What an export is, as told by `NBD_OPT_GO`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ExportInfo {
    pub size: u64,
    pub flags: u16,
}

/// The server's constraints on offsets and lengths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlockSizes {
    pub minimum: u32,
    pub maximum: u32,
}

impl Default for BlockSizes {
    /// What a server promises that says nothing.
    fn default() -> Self {
        BlockSizes {
            minimum: 512,
            maximum: 32 << 20,
        }
    }
}

pub(super) fn block_sizes(mut fields: Fields) -> Result<BlockSizes, NbdError> {
    let (minimum, preferred, maximum) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let sound = fields.finished()
        && minimum.is_power_of_two()
        && minimum <= 64 * 1024
        && preferred.is_power_of_two()
        && preferred >= minimum.max(512)
        && maximum >= preferred
        && (maximum == u32::MAX || maximum.is_multiple_of(minimum));
    match sound {
        true => Ok(BlockSizes { minimum, maximum }),
        false => Err(NbdError::protocol("impossible block size constraints")),
    }
}

/// The front of an answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReplyHeader {
    Simple {
        errno: u32,
        cookie: u64,
    },
    Chunk {
        done: bool,
        kind: u16,
        cookie: u64,
        length: u32,
    },
}

/// How many bytes follow the magic of a reply.
pub(super) fn reply_header_rest(magic: u32) -> Result<usize, NbdError> {
    match magic {
        SIMPLE_REPLY_MAGIC => Ok(12),
        STRUCTURED_REPLY_MAGIC => Ok(16),
        _ => Err(NbdError::protocol("wrong magic in a reply")),
    }
}

pub(super) fn reply_header(magic: u32, rest: &[u8]) -> Result<ReplyHeader, NbdError> {
    let mut fields = Fields::new(rest);
    match magic {
        SIMPLE_REPLY_MAGIC => Ok(ReplyHeader::Simple {
            errno: fields.u32()?,
            cookie: fields.u64()?,
        }),
        STRUCTURED_REPLY_MAGIC => {
            let flags = fields.u16()?;
            if flags & !CHUNK_DONE != 0 {
                return Err(NbdError::protocol("unknown flags in a reply"));
            }
            Ok(ReplyHeader::Chunk {
                done: flags & CHUNK_DONE != 0,
                kind: fields.u16()?,
                cookie: fields.u64()?,
                length: fields.u32()?,
            })
        }
        _ => Err(NbdError::protocol("wrong magic in a reply")),
    }
}

/// An error chunk's payload. An "error" of number 0 stays an error.
pub(super) fn error_chunk(payload: &[u8]) -> Result<NbdError, NbdError> {
    let mut fields = Fields::new(payload);
    let errno = fields.u32()?;
    let length = usize::from(fields.u16()?);
    let message = fields
        .rest()
        .get(..length)
        .ok_or_else(|| NbdError::protocol("an error message is longer than its chunk"))?;
    Ok(NbdError::Server {
        errno,
        message: text(message),
    })
}
