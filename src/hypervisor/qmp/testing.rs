//! A QEMU in memory, behind real sockets: it does what it is told, as far as a capture needs it,
//! unless a test has it do something else.

use crate::hypervisor::nbd::testing::{Dirty, SizeOf, TestServer};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

pub(in crate::hypervisor) const DISK_BYTES: u64 = 1 << 20;

/// What becomes of one command.
pub(in crate::hypervisor) enum Act {
    Obey,
    /// Does it, and answers with another value.
    Return(Value),
    /// Does it, and says this instead of its answer (with the id put in for `ID`).
    Say(Vec<u8>),
    /// Does not do it, and says this.
    Refuse(&'static str),
    HangUp,
    ObeyAndHangUp,
    /// Does not do it, and says nothing until the client has gone.
    Silence,
    /// Does it, and answers byte by byte.
    Trickle(Duration),
    Late(Duration),
}

/// One command as it came, and the honest answer if it had been obeyed.
pub(in crate::hypervisor) struct Asked<'a> {
    /// Commands before it, of all connections.
    pub number: usize,
    pub name: &'a str,
    pub arguments: &'a Value,
    /// What the honest answer to a question would be; `Null` for orders.
    pub honest: &'a Value,
}

pub(in crate::hypervisor) type Mischief = Box<dyn FnMut(&Asked) -> Act + Send>;

#[derive(Debug, Clone)]
pub(in crate::hypervisor) struct Bitmap {
    pub name: String,
    pub recording: bool,
    pub granularity: u64,
}

#[derive(Debug, Clone)]
pub(in crate::hypervisor) struct Node {
    pub driver: String,
    pub child: Option<String>,
    /// Named by nobody else: goes with the node above it.
    pub inline: bool,
    pub size: u64,
    pub bitmaps: Vec<Bitmap>,
}

#[derive(Default)]
pub(in crate::hypervisor) struct State {
    pub status: String,
    /// (id, node)
    pub devices: Vec<(String, String)>,
    pub nodes: BTreeMap<String, Node>,
    pub exports: BTreeMap<String, String>,
    pub jobs: BTreeMap<String, String>,
    pub iothreads: bool,
    pub commands: Vec<String>,
    pub dirty: Dirty,
    server: Option<TestServer>,
}

struct Inside {
    state: Mutex<State>,
    mischief: Mutex<Mischief>,
    stop: AtomicBool,
}

pub(in crate::hypervisor) struct FakeQemu {
    folder: tempfile::TempDir,
    inside: Arc<Inside>,
    thread: Option<JoinHandle<()>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeQemu {
    /// With the disks `vd0` and `vd1` on `d0` and `d1`.
    pub(in crate::hypervisor) fn start() -> Self {
        let mut state = State {
            status: "running".to_string(),
            ..State::default()
        };
        for number in 0..2 {
            let node = format!("d{number}");
            state.devices.push((format!("vd{number}"), node.clone()));
            state.nodes.insert(
                node,
                Node {
                    driver: "qcow2".to_string(),
                    child: None,
                    inline: false,
                    size: DISK_BYTES,
                    bitmaps: Vec::new(),
                },
            );
        }
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("qmp")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let inside = Arc::new(Inside {
            state: Mutex::new(state),
            mischief: Mutex::new(Box::new(|_| Act::Obey)),
            stop: AtomicBool::new(false),
        });
        let thread = {
            let inside = inside.clone();
            std::thread::spawn(move || {
                while !inside.stop.load(Ordering::Acquire) {
                    match listener.accept() {
                        Ok((stream, _)) => {
                            stream.set_nonblocking(false).unwrap();
                            let _ = inside.serve(stream);
                        }
                        Err(_) => std::thread::sleep(Duration::from_millis(2)),
                    }
                }
            })
        };
        FakeQemu {
            folder,
            inside,
            thread: Some(thread),
        }
    }

    pub(in crate::hypervisor) fn monitor(&self) -> PathBuf {
        self.folder.path().join("qmp")
    }

    pub(in crate::hypervisor) fn folder(&self) -> PathBuf {
        self.folder.path().to_path_buf()
    }

    pub(in crate::hypervisor) fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.inside.state)
    }

    pub(in crate::hypervisor) fn does(&self, mischief: impl FnMut(&Asked) -> Act + Send + 'static) {
        *locked(&self.inside.mischief) = Box::new(mischief);
    }

    pub(in crate::hypervisor) fn obeys(&self) {
        self.does(|_| Act::Obey);
    }
}

impl Drop for FakeQemu {
    fn drop(&mut self) {
        self.inside.stop.store(true, Ordering::Release);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Inside {
    fn serve(self: &Arc<Self>, mut stream: UnixStream) -> std::io::Result<()> {
        stream.write_all(b"{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n")?;
        let lines = BufReader::new(stream.try_clone()?).lines();
        for line in lines {
            let message: Value = serde_json::from_str(&line?).unwrap();
            let name = message["execute"].as_str().unwrap().to_string();
            let id = message["id"].clone();
            let (number, honest) = {
                let mut state = locked(&self.state);
                state.commands.push(name.clone());
                let honest = match &*name {
                    "qom-get" => property(&message["arguments"]),
                    name => state.answer(name),
                };
                (state.commands.len() - 1, honest)
            };
            let act = locked(&self.mischief)(&Asked {
                number,
                name: &name,
                arguments: &message["arguments"],
                honest: &honest,
            });
            let obey = || {
                let arguments = &message["arguments"];
                let done = locked(&self.state).obey(&name, arguments, self);
                match done {
                    Ok(()) => json!({"return": honest, "id": id}),
                    Err(why) => {
                        json!({"error": {"class": "GenericError", "desc": why}, "id": id})
                    }
                }
            };
            let reply = match act {
                Act::Obey => obey(),
                Act::Return(value) => {
                    obey();
                    json!({"return": value, "id": id})
                }
                Act::Say(bytes) => {
                    obey();
                    let text = String::from_utf8_lossy(&bytes).replace("ID", &id.to_string());
                    stream.write_all(text.as_bytes())?;
                    continue;
                }
                Act::Refuse(why) => json!({"error": {"desc": why}, "id": id}),
                Act::HangUp => return Ok(()),
                Act::ObeyAndHangUp => {
                    obey();
                    return Ok(());
                }
                Act::Silence => {
                    stream.read_to_end(&mut Vec::new())?;
                    return Ok(());
                }
                Act::Trickle(pause) => {
                    for byte in format!("{}\n", obey()).bytes() {
                        stream.write_all(&[byte])?;
                        std::thread::sleep(pause);
                    }
                    continue;
                }
                Act::Late(pause) => {
                    std::thread::sleep(pause);
                    obey()
                }
            };
            stream.write_all(format!("{reply}\n").as_bytes())?;
        }
        Ok(())
    }
}

/// Of all devices.
fn property(asked: &Value) -> Value {
    match asked["property"].as_str() {
        Some("type") => json!("virtio-blk-device"),
        Some("share-rw") => json!(false),
        other => panic!("{other:?} is no property"),
    }
}

fn text(value: &Value, key: &str) -> String {
    value[key].as_str().unwrap_or_default().to_string()
}

impl State {
    /// Answers to questions.
    pub(in crate::hypervisor) fn answer(&self, command: &str) -> Value {
        match command {
            "query-status" => json!({"status": self.status, "running": self.status == "running"}),
            "query-block" => self
                .devices
                .iter()
                .map(|(id, node)| {
                    json!({
                        "device": "", "removable": false,
                        "qdev": format!("/machine/peripheral/{id}/virtio-backend"),
                        "inserted": {"node-name": node},
                    })
                })
                .collect(),
            "query-named-block-nodes" => self
                .nodes
                .iter()
                .map(|(name, node)| {
                    let bitmaps: Vec<Value> = node
                        .bitmaps
                        .iter()
                        .map(|bitmap| {
                            json!({
                                "name": bitmap.name, "recording": bitmap.recording, "busy": false,
                                "persistent": true, "count": 0, "granularity": bitmap.granularity,
                            })
                        })
                        .collect();
                    json!({
                        "node-name": name, "drv": node.driver, "ro": false,
                        "file": format!("/srv/{name}"), "write_threshold": 1 << 20,
                        "image": {
                            "virtual-size": node.size,
                            "format-specific": {"type": "qcow2", "data": {"compat": "1.1"}},
                        },
                        "dirty-bitmaps": bitmaps,
                    })
                })
                .collect(),
            "query-block-exports" => self.exports.keys().map(|id| json!({"id": id})).collect(),
            "query-jobs" => {
                let rows = self.jobs.iter();
                rows.map(|(id, status)| json!({"id": id, "status": status}))
                    .collect()
            }
            "query-iothreads" => match self.iothreads {
                true => json!([{"id": "io0"}]),
                false => json!([]),
            },
            "query-name" => json!({"name": "web01"}),
            "query-uuid" => json!({"UUID": "00000000-0000-0000-0000-000000000001"}),
            "query-version" => json!({"package": "", "qemu": {"major": 10}}),
            "x-debug-query-block-graph" => {
                let number = |name: &String| self.nodes.keys().position(|other| other == name);
                let nodes: Vec<Value> = self
                    .nodes
                    .keys()
                    .map(|name| json!({"id": number(name), "name": name, "type": "block-driver"}))
                    .collect();
                let edges: Vec<Value> = self
                    .nodes
                    .iter()
                    .filter_map(|(name, node)| {
                        let child = node.child.as_ref()?;
                        Some(json!({
                            "parent": number(name), "child": number(child), "name": "file",
                        }))
                    })
                    .collect();
                json!({"nodes": nodes, "edges": edges})
            }
            _ => json!({}),
        }
    }

    fn obey(
        &mut self,
        command: &str,
        arguments: &Value,
        inside: &Arc<Inside>,
    ) -> Result<(), String> {
        match command {
            "stop" => self.status = "paused".to_string(),
            "cont" => self.status = "running".to_string(),
            "blockdev-add" => self.add(arguments, false).map(drop)?,
            "blockdev-del" => self.remove(&text(arguments, "node-name"))?,
            "qom-set" => {
                let (path, value) = (text(arguments, "path"), text(arguments, "value"));
                if !self.nodes.contains_key(&value) {
                    return Err(format!("no node {value}"));
                }
                let device = self.devices.iter_mut().find(|(id, _)| path.contains(&**id));
                device.ok_or("no such device")?.1 = value;
            }
            "transaction" => self.transaction(arguments)?,
            "nbd-server-start" => {
                if self.server.is_some() {
                    return Err("NBD server already running".to_string());
                }
                let path = arguments["addr"]["data"]["path"].as_str().unwrap();
                let listener = UnixListener::bind(path).map_err(|error| error.to_string())?;
                let inside = inside.clone();
                let size_of: SizeOf = Arc::new(move |_| {
                    let state = locked(&inside.state);
                    state.nodes.get("d0").map(|node| node.size)
                });
                self.server = Some(TestServer::start(listener, size_of, self.dirty));
            }
            "nbd-server-stop" => {
                self.exports.clear();
                self.server.take().ok_or("NBD server not running")?;
            }
            "block-export-add" => {
                let node = text(arguments, "node-name");
                if !self.nodes.contains_key(&node) {
                    return Err(format!("no node {node}"));
                }
                self.exports.insert(text(arguments, "id"), node);
            }
            "block-export-del" => drop(self.exports.remove(&text(arguments, "id"))),
            "job-cancel" => {
                let status = self.jobs.get_mut(&text(arguments, "id"));
                *status.ok_or("no such job")? = "concluded".to_string();
            }
            "block-dirty-bitmap-remove" => self.action(command, arguments)?,
            "job-dismiss" => drop(self.jobs.remove(&text(arguments, "id"))),
            _ => {}
        }
        Ok(())
    }

    fn add(&mut self, options: &Value, inline: bool) -> Result<String, String> {
        let name = text(options, "node-name");
        let name = match name.is_empty() {
            true => format!("#block{}", self.nodes.len()),
            false => name,
        };
        if self.nodes.contains_key(&name) {
            return Err(format!("duplicate node {name}"));
        }
        let child = match &options["file"] {
            Value::String(child) => Some(child.clone()),
            Value::Null => None,
            nested => Some(self.add(nested, true)?),
        };
        let node = Node {
            driver: text(options, "driver"),
            child,
            inline,
            size: DISK_BYTES,
            bitmaps: Vec::new(),
        };
        self.nodes.insert(name.clone(), node);
        Ok(name)
    }

    fn remove(&mut self, name: &str) -> Result<(), String> {
        let used = self.devices.iter().any(|(_, node)| node == name)
            || self.exports.values().any(|node| node == name)
            || self
                .jobs
                .keys()
                .any(|job| job.ends_with(&name[name.len() - 1..]))
            || self
                .nodes
                .values()
                .any(|node| node.child.as_deref() == Some(name));
        if used {
            return Err(format!("node {name} is in use"));
        }
        let node = self.nodes.remove(name).ok_or("no such node")?;
        match node.child {
            Some(child) if self.nodes.get(&child).is_some_and(|node| node.inline) => {
                self.remove(&child)
            }
            _ => Ok(()),
        }
    }

    /// All of it or nothing.
    fn transaction(&mut self, arguments: &Value) -> Result<(), String> {
        let (nodes, jobs) = (self.nodes.clone(), self.jobs.clone());
        for action in arguments["actions"].as_array().unwrap() {
            if let Err(why) = self.action(&text(action, "type"), &action["data"]) {
                (self.nodes, self.jobs) = (nodes, jobs);
                return Err(why);
            }
        }
        Ok(())
    }

    fn action(&mut self, kind: &str, data: &Value) -> Result<(), String> {
        if kind == "blockdev-backup" {
            self.jobs
                .insert(text(data, "job-id"), "running".to_string());
            return Ok(());
        }
        let bitmaps = &mut self
            .nodes
            .get_mut(&text(data, "node"))
            .ok_or("no such node")?
            .bitmaps;
        let key = match kind {
            "block-dirty-bitmap-merge" => text(data, "target"),
            _ => text(data, "name"),
        };
        let at = bitmaps.iter().position(|bitmap| bitmap.name == key);
        match (kind, at) {
            ("block-dirty-bitmap-add", None) => bitmaps.push(Bitmap {
                name: key,
                recording: !data["disabled"].as_bool().unwrap_or(false),
                granularity: data["granularity"].as_u64().unwrap(),
            }),
            ("block-dirty-bitmap-disable", Some(at)) => bitmaps[at].recording = false,
            ("block-dirty-bitmap-enable", Some(at)) => bitmaps[at].recording = true,
            ("block-dirty-bitmap-remove", Some(at)) => drop(bitmaps.remove(at)),
            ("block-dirty-bitmap-merge", Some(_)) => {}
            _ => return Err(format!("{kind}: {key}")),
        }
        Ok(())
    }

    /// Whatever of vmkeep is in it, bitmaps apart.
    pub(in crate::hypervisor) fn leftovers(&self) -> Vec<String> {
        let devices = self.devices.iter().map(|(_, node)| node);
        let all = self.nodes.keys().chain(self.exports.keys());
        all.chain(self.jobs.keys())
            .chain(devices)
            .filter(|name| name.starts_with("vmkeep-"))
            .cloned()
            .collect()
    }

    pub(in crate::hypervisor) fn all_bitmaps(&self) -> usize {
        self.nodes.values().map(|node| node.bitmaps.len()).sum()
    }
}
