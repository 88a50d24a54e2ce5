use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use serde_json::Value;

// Of the NBD protocol, as far as it has to be understood to stand in the middle.
const OPTION_GO: u32 = 7;
const OPTION_SET_META_CONTEXT: u32 = 10;
const REPLY_ACK: u32 = 1;
const REPLY_META_CONTEXT: u32 = 4;
const REPLY_IS_ERROR: u32 = 1 << 31;
const READ: u16 = 0;
const BLOCK_STATUS: u16 = 7;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const STATUS_CHUNK: u16 = 5;
const DIRTY: u32 = 1;
const DIRTY_CONTEXT: &str = "qemu:dirty-bitmap:";

/// Stands between vmkeep and the NBD server of a QEMU, and passes all on until it is told to lie
/// or to wait.
#[derive(Clone)]
pub struct NbdProxy {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Which bytes of which export are told as unchanged, whatever the bitmap says.
    hidden: Mutex<Vec<(String, u64, u64)>>,
    hidden_bytes: AtomicU64,
    connections: AtomicU64,
    is_held: Mutex<bool>,
    waiting: AtomicU64,
    let_go: Condvar,
}

impl NbdProxy {
    pub fn new() -> NbdProxy {
        NbdProxy {
            shared: Arc::default(),
        }
    }

    /// Lets QEMU's server, when it is told where to listen, listen behind this.
    pub fn redirect(&self, mut command: Value) -> Value {
        if command["execute"] == "nbd-server-start" {
            let address = &mut command["arguments"]["addr"]["data"]["path"];
            let front = PathBuf::from(address.as_str().unwrap());
            let behind = front.with_file_name("q");
            *address = behind.to_str().unwrap().into();
            // Ordered twice where the first was refused.
            let _ = std::fs::remove_file(&front);
            let listener = UnixListener::bind(&front).unwrap();
            let shared = self.shared.clone();
            thread::spawn(move || {
                for client in listener.incoming() {
                    let Ok(client) = client else { break };
                    let Ok(server) = UnixStream::connect(&behind) else {
                        break;
                    };
                    shared.connections.fetch_add(1, Ordering::Relaxed);
                    let shared = shared.clone();
                    // An end of either side is the end of both.
                    thread::spawn(move || drop(serve(client, server, &shared)));
                }
            });
        }
        command
    }

    /// From now on, changes in this range are not told.
    pub fn hide(&self, export: &str, offset: u64, length: u64) {
        let mut hidden = self.shared.hidden.lock().unwrap();
        hidden.push((export.to_owned(), offset, length));
    }

    /// Tells the truth again; how many changed bytes were not told so far.
    pub fn be_honest(&self) -> u64 {
        self.shared.hidden.lock().unwrap().clear();
        self.shared.hidden_bytes.swap(0, Ordering::Relaxed)
    }

    /// Connections that went through this.
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// No read is passed on until `let_go`.
    pub fn hold(&self) {
        self.shared.waiting.store(0, Ordering::Relaxed);
        *self.shared.is_held.lock().unwrap() = true;
    }

    /// Whether a read was held back since `hold`.
    pub fn is_waited_for(&self) -> bool {
        self.shared.waiting.load(Ordering::Relaxed) > 0
    }

    pub fn let_go(&self) {
        *self.shared.is_held.lock().unwrap() = false;
        self.shared.let_go.notify_all();
    }
}

impl Shared {
    fn wait(&self) {
        let held = self.is_held.lock().unwrap();
        self.waiting.fetch_add(u64::from(*held), Ordering::Relaxed);
        drop(self.let_go.wait_while(held, |held| *held).unwrap());
    }

    /// What is told of extents that begin at `offset`.
    fn told(&self, export: &str, offset: u64, extents: &[(u32, u32)]) -> Vec<(u32, u32)> {
        let hidden = self.hidden.lock().unwrap();
        let mut told = Vec::new();
        let mut at = offset;
        for (length, flags) in extents {
            let end = at + u64::from(*length);
            // Cut where the hidden ranges begin and end.
            let mut cuts = vec![at, end];
            for (name, start, length) in hidden.iter() {
                if name == export {
                    cuts.extend([*start, start + length].map(|cut| cut.clamp(at, end)));
                }
            }
            cuts.sort_unstable();
            cuts.dedup();
            for pair in cuts.windows(2) {
                let (from, to) = (pair[0], pair[1]);
                let hides = hidden.iter().any(|(name, start, length)| {
                    name == export && *start <= from && to <= start + length
                });
                let mut flags = *flags;
                if hides && flags & DIRTY != 0 {
                    flags &= !DIRTY;
                    self.hidden_bytes.fetch_add(to - from, Ordering::Relaxed);
                }
                told.push(((to - from) as u32, flags));
            }
            at = end;
        }
        told
    }
}

fn serve(client: UnixStream, server: UnixStream, shared: &Arc<Shared>) -> io::Result<()> {
    let Some((export, contexts)) = handshake(&client, &server)? else {
        return Ok(());
    };
    let asked: Arc<Mutex<HashMap<u64, (u16, u64)>>> = Arc::default();
    let requests = {
        let (asked, shared, mut client, mut server) = (
            asked.clone(),
            shared.clone(),
            client.try_clone()?,
            server.try_clone()?,
        );
        thread::spawn(move || {
            let mut request = [0; 28];
            // The client only reads, so no request has more than this.
            while client.read_exact(&mut request).is_ok() {
                let cookie = u64::from_be_bytes(request[8..16].try_into().unwrap());
                let offset = u64::from_be_bytes(request[16..24].try_into().unwrap());
                let kind = u16::from_be_bytes(request[6..8].try_into().unwrap());
                asked.lock().unwrap().insert(cookie, (kind, offset));
                // Held before QEMU has it: with an answer that nobody takes, QEMU cannot pause its
                // disks, and waits for us in the middle of a migration.
                if kind == READ {
                    shared.wait();
                }
                if server.write_all(&request).is_err() {
                    break;
                }
            }
            let _ = server.shutdown(std::net::Shutdown::Both);
        })
    };
    let ended = replies(&client, &server, &export, &contexts, &asked, shared);
    let _ = client.shutdown(std::net::Shutdown::Both);
    let _ = server.shutdown(std::net::Shutdown::Both);
    requests.join().unwrap();
    ended
}

/// Passes the handshake on; the export and the numbers of the contexts of changes.
fn handshake(
    mut client: &UnixStream,
    mut server: &UnixStream,
) -> io::Result<Option<(String, Vec<u32>)>> {
    let mut greeting = [0; 18];
    pass(server, client, &mut greeting)?;
    pass(client, server, &mut [0; 4])?;
    let mut contexts = Vec::new();
    loop {
        let mut option = [0; 16];
        pass(client, server, &mut option)?;
        let kind = u32::from_be_bytes(option[8..12].try_into().unwrap());
        let mut data = vec![0; u32::from_be_bytes(option[12..16].try_into().unwrap()) as usize];
        client.read_exact(&mut data)?;
        server.write_all(&data)?;
        loop {
            let mut reply = [0; 20];
            pass(server, client, &mut reply)?;
            let said = u32::from_be_bytes(reply[12..16].try_into().unwrap());
            let mut rest = vec![0; u32::from_be_bytes(reply[16..20].try_into().unwrap()) as usize];
            pass(server, client, &mut rest)?;
            if kind == OPTION_SET_META_CONTEXT && said == REPLY_META_CONTEXT {
                let name = String::from_utf8_lossy(&rest[4..]).into_owned();
                if name.starts_with(DIRTY_CONTEXT) {
                    contexts.push(u32::from_be_bytes(rest[..4].try_into().unwrap()));
                }
            }
            if kind == OPTION_GO && said == REPLY_ACK {
                let length = u32::from_be_bytes(data[..4].try_into().unwrap()) as usize;
                let export = String::from_utf8_lossy(&data[4..4 + length]).into_owned();
                return Ok(Some((export, contexts)));
            }
            if said == REPLY_ACK || said & REPLY_IS_ERROR != 0 {
                break;
            }
        }
    }
}

fn replies(
    mut client: &UnixStream,
    mut server: &UnixStream,
    export: &str,
    contexts: &[u32],
    asked: &Mutex<HashMap<u64, (u16, u64)>>,
    shared: &Shared,
) -> io::Result<()> {
    loop {
        let mut head = vec![0; 16];
        server.read_exact(&mut head)?;
        let magic = u32::from_be_bytes(head[..4].try_into().unwrap());
        let cookie = u64::from_be_bytes(head[8..16].try_into().unwrap());
        let (kind, offset) = *asked.lock().unwrap().get(&cookie).unwrap_or(&(READ, 0));
        // Structured replies were negotiated, so a simple one carries no data.
        if magic == SIMPLE_REPLY {
            client.write_all(&head)?;
            continue;
        }
        let mut length = [0; 4];
        server.read_exact(&mut length)?;
        let mut body = vec![0; u32::from_be_bytes(length) as usize];
        server.read_exact(&mut body)?;
        let chunk = u16::from_be_bytes(head[6..8].try_into().unwrap());
        if kind == BLOCK_STATUS && chunk == STATUS_CHUNK {
            let context = u32::from_be_bytes(body[..4].try_into().unwrap());
            if contexts.contains(&context) {
                let word = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
                let extents: Vec<(u32, u32)> = body[4..]
                    .chunks(8)
                    .map(|pair| (word(&pair[..4]), word(&pair[4..])))
                    .collect();
                body.truncate(4);
                for (length, flags) in shared.told(export, offset, &extents) {
                    body.extend(length.to_be_bytes());
                    body.extend(flags.to_be_bytes());
                }
            }
        }
        head.extend((body.len() as u32).to_be_bytes());
        head.extend(body);
        client.write_all(&head)?;
    }
}

fn pass(mut from: &UnixStream, mut to: &UnixStream, bytes: &mut [u8]) -> io::Result<()> {
    from.read_exact(bytes)?;
    to.write_all(bytes)
}
