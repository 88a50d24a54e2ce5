use super::eventually;
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

/// The terminal that libvirt gives a domain for its serial line.
pub struct Terminal {
    file: File,
    said: Arc<Mutex<String>>,
}

impl Terminal {
    /// Before the guest says anything: what nobody listens to is lost.
    #[track_caller]
    pub fn open(path: &Path) -> Terminal {
        // It must not become the terminal of this process.
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(path, flags, Mode::empty()).unwrap());
        let said = Arc::new(Mutex::new(String::new()));
        let (mut from, into) = (file.try_clone().unwrap(), Arc::clone(&said));
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // Its QEMU takes the terminal along.
            while let Ok(length @ 1..) = from.read(&mut buffer) {
                let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                into.lock().unwrap().push_str(&text);
            }
        });
        Terminal { file, said }
    }

    pub fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    #[track_caller]
    pub fn wait_for(&self, what: &str) {
        eventually(what, || self.said().contains(what));
    }

    pub fn send(&self, line: &str) {
        (&self.file)
            .write_all(format!("{line}\n").as_bytes())
            .unwrap();
    }
}
