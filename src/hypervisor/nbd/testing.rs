//! A small honest NBD server, for tests of those who are its clients.

use super::wire::{self, Fields};
use super::{BASE_ALLOCATION, STATUS_DIRTY};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What an export says of itself, by name.
pub(in crate::hypervisor) type SizeOf = Arc<dyn Fn(&str) -> Option<u64> + Send + Sync>;

/// What its bitmaps say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::hypervisor) enum Dirty {
    #[default]
    Nothing,
    EveryOtherSector,
}

/// Ends when it is dropped.
pub(in crate::hypervisor) struct TestServer {
    stop: Arc<AtomicBool>,
}

impl TestServer {
    pub(in crate::hypervisor) fn start(
        listener: UnixListener,
        size_of: SizeOf,
        dirty: Dirty,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let server = TestServer { stop: stop.clone() };
        listener.set_nonblocking(true).unwrap();
        std::thread::spawn(move || {
            while !stop.load(Ordering::Acquire) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        stream.set_nonblocking(false).unwrap();
                        let size_of = size_of.clone();
                        // A client may hang up at any point; that is not the server's failure.
                        std::thread::spawn(move || drop(serve(stream, &size_of, dirty)));
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        server
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

/// The bytes of every export.
pub(in crate::hypervisor) fn content(offset: u64, length: usize) -> Vec<u8> {
    (offset..offset + length as u64)
        .map(|at| (at / 512 % 251) as u8)
        .collect()
}

pub(super) fn option_reply(option: u32, kind: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = wire::OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

pub(super) fn read_option(stream: &mut UnixStream) -> io::Result<(u32, Vec<u8>)> {
    let mut header = [0; 16];
    stream.read_exact(&mut header)?;
    let mut fields = Fields::new(&header[8..]);
    let (kind, length) = (fields.u32().unwrap(), fields.u32().unwrap());
    let mut payload = vec![0; length as usize];
    stream.read_exact(&mut payload)?;
    Ok((kind, payload))
}

pub(super) fn greeting() -> Vec<u8> {
    [
        &wire::SERVER_MAGIC.to_be_bytes()[..],
        &wire::OPTION_MAGIC.to_be_bytes(),
        &3u16.to_be_bytes(),
    ]
    .concat()
}

pub(super) fn chunk(done: bool, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = wire::STRUCTURED_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&u16::from(done).to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn strings(payload: &[u8]) -> Vec<String> {
    let mut fields = Fields::new(payload);
    let take = |fields: &mut Fields| {
        let length = fields.u32().unwrap() as usize;
        let rest = std::mem::replace(fields, Fields::new(&[])).rest();
        let (text, rest) = rest.split_at(length);
        *fields = Fields::new(rest);
        String::from_utf8(text.to_vec()).unwrap()
    };
    let mut found = vec![take(&mut fields)];
    for _ in 0..fields.u32().unwrap() {
        found.push(take(&mut fields));
    }
    found
}

fn serve(mut stream: UnixStream, size_of: &SizeOf, dirty: Dirty) -> io::Result<()> {
    stream.write_all(&greeting())?;
    stream.read_exact(&mut [0; 4])?;
    let mut contexts = Vec::new();
    let size = loop {
        let (option, payload) = read_option(&mut stream)?;
        let ack = option_reply(option, wire::REPLY_ACK, &[]);
        match option {
            wire::OPTION_SET_META_CONTEXT => {
                contexts = strings(&payload).split_off(1);
                for (number, name) in (1u32..).zip(&contexts) {
                    let context = [&number.to_be_bytes()[..], name.as_bytes()].concat();
                    stream.write_all(&option_reply(option, wire::REPLY_META_CONTEXT, &context))?;
                }
                stream.write_all(&ack)?;
            }
            wire::OPTION_GO => {
                let length = u32::from_be_bytes(payload[..4].try_into().unwrap()) as usize;
                let name = String::from_utf8_lossy(&payload[4..4 + length]).into_owned();
                let Some(size) = size_of(&name) else {
                    let unknown = wire::REPLY_ERROR_BIT | 6;
                    stream.write_all(&option_reply(option, unknown, &[]))?;
                    continue;
                };
                let flags = 1 | wire::EXPORT_TRIM | wire::EXPORT_MULTI_CONN;
                let export = [&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
                stream.write_all(&option_reply(option, wire::REPLY_INFO, &export))?;
                stream.write_all(&ack)?;
                break size;
            }
            _ => stream.write_all(&ack)?,
        }
    };
    loop {
        let mut request = [0; 28];
        stream.read_exact(&mut request)?;
        let mut fields = Fields::new(&request[6..]);
        let kind = fields.u16().unwrap();
        let (cookie, offset) = (fields.u64().unwrap(), fields.u64().unwrap());
        let length = fields.u32().unwrap();
        match kind {
            wire::COMMAND_READ => {
                assert!(offset + u64::from(length) <= size);
                let bytes = content(offset, length as usize);
                let payload = [&offset.to_be_bytes()[..], &bytes].concat();
                stream.write_all(&chunk(true, wire::CHUNK_DATA, cookie, &payload))?;
            }
            wire::COMMAND_BLOCK_STATUS => {
                for (number, name) in (1u32..).zip(&contexts) {
                    let piece = match dirty {
                        Dirty::EveryOtherSector if name != BASE_ALLOCATION => 512,
                        _ => length,
                    };
                    let mut payload = number.to_be_bytes().to_vec();
                    for at in 0..length / piece {
                        payload.extend_from_slice(&piece.to_be_bytes());
                        // The first is allocated and not zero, or clean.
                        payload.extend_from_slice(&(at % 2 * STATUS_DIRTY).to_be_bytes());
                    }
                    let done = number as usize == contexts.len();
                    stream.write_all(&chunk(done, wire::CHUNK_STATUS, cookie, &payload))?;
                }
            }
            // It keeps the bytes, as it may.
            wire::COMMAND_TRIM => {
                stream.write_all(&chunk(true, wire::CHUNK_NONE, cookie, &[]))?;
            }
            _ => return Ok(()),
        }
    }
}
