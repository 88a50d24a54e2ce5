use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// What becomes of a command to the guest agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Pass,
    /// The agent never hears of it.
    Lost,
    /// The agent does it, and nobody hears of that.
    Unanswered,
}

type Decide = Box<dyn FnMut(&str) -> Fate + Send>;

/// Stands between vmkeep and a guest agent.
pub struct AgentProxy {
    pub socket: PathBuf,
    decide: Arc<Mutex<Decide>>,
}

impl AgentProxy {
    pub fn start(socket: PathBuf, agent: &Path) -> AgentProxy {
        let listener = UnixListener::bind(&socket).unwrap();
        let decide: Arc<Mutex<Decide>> = Arc::new(Mutex::new(Box::new(|_| Fate::Pass)));
        let (decides, agent) = (decide.clone(), agent.to_owned());
        std::thread::spawn(move || {
            // One client after the other, as QEMU's socket has it.
            for client in listener.incoming() {
                let Ok(client) = client else { break };
                if let Ok(agent) = UnixStream::connect(&agent) {
                    serve(client, agent, &decides);
                }
            }
        });
        AgentProxy { socket, decide }
    }

    /// Asked for every command by its name.
    pub fn set(&self, decide: impl FnMut(&str) -> Fate + Send + 'static) {
        *self.decide.lock().unwrap() = Box::new(decide);
    }

    pub fn pass(&self) {
        self.set(|_| Fate::Pass);
    }
}

fn serve(client: UnixStream, agent: UnixStream, decide: &Mutex<Decide>) {
    let (mut to_client, mut from_agent) = (client.try_clone().unwrap(), agent.try_clone().unwrap());
    let mute = Arc::new(AtomicBool::new(false));
    let muted = mute.clone();
    let back = std::thread::spawn(move || {
        let mut part = [0; 4096];
        while let Ok(read) = from_agent.read(&mut part) {
            if read == 0 {
                break;
            }
            if !muted.load(Ordering::Acquire) && to_client.write_all(&part[..read]).is_err() {
                break;
            }
        }
        let _ = to_client.shutdown(std::net::Shutdown::Both);
    });
    let mut to_agent = agent;
    let mut lines = BufReader::new(client);
    let mut line = Vec::new();
    while lines
        .read_until(b'\n', &mut line)
        .is_ok_and(|read| read > 0)
    {
        let fate = match command_of(&line) {
            Some(name) => (decide.lock().unwrap())(&name),
            None => Fate::Pass,
        };
        // Until the next command: the client has one on its way only.
        mute.store(fate == Fate::Unanswered, Ordering::Release);
        if fate != Fate::Lost && to_agent.write_all(&line).is_err() {
            break;
        }
        line.clear();
    }
    let _ = to_agent.shutdown(std::net::Shutdown::Both);
    back.join().unwrap();
}

/// The name of a command, before which delimiters may stand.
fn command_of(line: &[u8]) -> Option<String> {
    let start = line.iter().position(|byte| *byte == b'{')?;
    let command: serde_json::Value = serde_json::from_slice(&line[start..]).ok()?;
    Some(command["execute"].as_str()?.to_owned())
}
