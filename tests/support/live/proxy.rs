use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::Value;

/// Sees every command before QEMU does; what it returns is sent on.
pub type Hook = Box<dyn FnMut(Value) -> Value + Send>;

/// Stands between vmkeep and a QEMU monitor.
pub struct Proxy {
    pub socket: PathBuf,
    hook: Arc<Mutex<Hook>>,
    monitor: Arc<Mutex<PathBuf>>,
}

impl Proxy {
    pub fn start(socket: PathBuf, monitor: &Path) -> Proxy {
        let listener = UnixListener::bind(&socket).unwrap();
        let hook: Arc<Mutex<Hook>> = Arc::new(Mutex::new(Box::new(|command| command)));
        let monitor = Arc::new(Mutex::new(monitor.to_owned()));
        let (hooked, asked) = (hook.clone(), monitor.clone());
        std::thread::spawn(move || {
            // One client after the other, as a monitor has it. The monitor is connected anew for
            // each, for QEMU may be another one by then.
            for client in listener.incoming() {
                let Ok(client) = client else { break };
                let monitor = asked.lock().unwrap().clone();
                if let Ok(qemu) = UnixStream::connect(monitor) {
                    serve(client, qemu, &hooked);
                }
            }
        });
        Proxy {
            socket,
            hook,
            monitor,
        }
    }

    /// The next client finds another QEMU.
    pub fn point_at(&self, monitor: &Path) {
        *self.monitor.lock().unwrap() = monitor.to_owned();
    }

    pub fn set(&self, hook: impl FnMut(Value) -> Value + Send + 'static) {
        *self.hook.lock().unwrap() = Box::new(hook);
    }

    pub fn pass(&self) {
        self.set(|command| command);
    }
}

fn serve(client: UnixStream, qemu: UnixStream, hook: &Mutex<Hook>) {
    let (mut to_client, mut from_qemu) = (client.try_clone().unwrap(), qemu.try_clone().unwrap());
    let back = std::thread::spawn(move || {
        let mut part = [0; 1 << 16];
        while let Ok(read) = from_qemu.read(&mut part) {
            if read == 0 || to_client.write_all(&part[..read]).is_err() {
                break;
            }
        }
        let _ = to_client.shutdown(std::net::Shutdown::Both);
    });
    let mut to_qemu = qemu;
    for line in BufReader::new(client).lines() {
        let Ok(line) = line else { break };
        let command = serde_json::from_str(&line).unwrap();
        let command = (hook.lock().unwrap())(command);
        if to_qemu
            .write_all(format!("{command}\n").as_bytes())
            .is_err()
        {
            break;
        }
    }
    let _ = to_qemu.shutdown(std::net::Shutdown::Both);
    back.join().unwrap();
}
