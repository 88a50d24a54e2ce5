use std::fs;
use std::path::PathBuf;
use std::process::Child;
use std::sync::Mutex;
use std::time::Duration;

use serde_json::{Value, json};

use super::console::{Console, Latency};
use super::monitor::{Qmp, ask_agent};
use super::qemu::{Paths, VmOptions, start_qemu};
use super::wait::{LIMIT, READY_LIMIT, wait_until};

/// A running (or ended) QEMU, which is killed when this is dropped.
#[derive(Debug)]
pub struct Vm {
    pub options: VmOptions,
    child: Mutex<Child>,
    own_monitor: Mutex<Qmp>,
    console: Console,
    /// Where in the console's log the last boot begins.
    boot: Mutex<usize>,
}

impl Vm {
    /// Starts QEMU. The guest boots meanwhile: see `wait_ready`.
    #[track_caller]
    pub fn start(options: VmOptions) -> Vm {
        fs::create_dir_all(&options.folder).unwrap();
        let paths = Paths(&options);
        let log = paths.with("console");
        let start = fs::metadata(&log).map_or(0, |log| log.len() as usize);
        let mut starting = Starting(Some(start_qemu(&options)));
        let qemu = starting.0.as_mut().unwrap();
        let alive = || {
            if let Some(status) = qemu.try_wait().unwrap() {
                panic!("QEMU: {status}\n{}", paths.errors());
            }
            paths.with("mon").exists().then_some(())
        };
        wait_until("QEMU's sockets", LIMIT, alive, || paths.errors());
        let own_monitor = Qmp::connect(&paths.with("mon"));
        let console = Console::connect(&paths.with("serial"), &log, start);
        Vm {
            child: Mutex::new(starting.0.take().unwrap()),
            own_monitor: Mutex::new(own_monitor),
            console,
            boot: Mutex::new(start),
            options,
        }
    }

    /// Starts QEMU again, with the same options, after it has ended.
    #[track_caller]
    pub fn restart(&mut self) {
        assert!(!self.is_running(), "{} is still running", self.options.name);
        *self = Vm::start(self.options.clone());
    }

    /// The QMP socket for the program under test.
    pub fn qmp_socket(&self) -> PathBuf {
        Paths(&self.options).with("qmp")
    }

    /// The QMP socket that this harness holds for itself.
    pub fn monitor_socket(&self) -> PathBuf {
        Paths(&self.options).with("mon")
    }

    pub fn agent_socket(&self) -> PathBuf {
        Paths(&self.options).with("agent")
    }

    pub fn console(&self) -> &Console {
        &self.console
    }

    pub fn process_id(&self) -> u32 {
        self.child.lock().unwrap().id()
    }

    pub fn is_running(&self) -> bool {
        self.child.lock().unwrap().try_wait().unwrap().is_none()
    }

    #[track_caller]
    pub fn wait_ready(&self) {
        let boot = *self.boot.lock().unwrap();
        let line = self.wait_log_for("READY", boot, READY_LIMIT);
        assert!(line.starts_with("READY"), "{line}");
    }

    /// The first line after the mark that begins with the words.
    #[track_caller]
    pub fn wait_log(&self, begins_with: &str, mark: usize) -> String {
        self.wait_log_for(begins_with, mark, LIMIT)
    }

    #[track_caller]
    fn wait_log_for(&self, begins_with: &str, mark: usize, limit: Duration) -> String {
        let found = wait_until(
            begins_with,
            limit,
            || {
                let running = self.is_running();
                let said = self.console.said_since(mark);
                let found = said.lines().find(|line| line.starts_with(begins_with));
                match found {
                    Some(line) => Some(Ok(line.to_owned())),
                    None if !running => Some(Err("QEMU has ended")),
                    None if said.contains("Kernel panic") => Some(Err("the guest has died")),
                    None => None,
                }
            },
            || self.tail(),
        );
        found.unwrap_or_else(|error| panic!("{begins_with}: {error}\n{}", self.tail()))
    }

    fn tail(&self) -> String {
        format!("{}\n{}", self.console.tail(), Paths(&self.options).errors())
    }

    #[track_caller]
    pub fn send(&self, line: &str) {
        self.console.send(line);
    }

    /// The last record that the guest has told of; 0 for none.
    pub fn seq(&self) -> u64 {
        self.console.last_told().unwrap_or(0)
    }

    #[track_caller]
    pub fn wait_for_progress(&self, records: u64) -> u64 {
        self.console.wait_for_progress(records)
    }

    #[track_caller]
    pub fn latency(&self, count: u64) -> Latency {
        let mark = self.console.begin_latency(count);
        self.console.latency_since(mark)
    }

    /// The guest ends its work, leaves its disks and powers off.
    #[track_caller]
    pub fn quit(&self) {
        let mark = self.console.mark();
        self.send("quit");
        self.wait_log("BYE", mark);
        self.wait_end();
    }

    /// Waits for the end of QEMU.
    #[track_caller]
    pub fn wait_end(&self) {
        let ended = || (!self.is_running()).then_some(());
        wait_until("the end of QEMU", LIMIT, ended, || self.tail());
    }

    /// The guest leaves its disks and boots again; QEMU lives on.
    #[track_caller]
    pub fn reboot(&self) {
        *self.boot.lock().unwrap() = self.console.mark();
        self.send("reboot");
        self.wait_ready();
    }

    /// The power fails.
    pub fn kill9(&self) {
        let mut child = self.child.lock().unwrap();
        let _ = child.kill();
        child.wait().unwrap();
    }

    /// The answer of this test's own monitor to a whole command.
    #[track_caller]
    pub fn qmp(&self, command: &Value) -> Value {
        self.try_qmp(command)
            .unwrap_or_else(|error| panic!("{command}: {error}\n{}", self.tail()))
    }

    #[track_caller]
    pub fn try_qmp(&self, command: &Value) -> Result<Value, String> {
        self.own_monitor.lock().unwrap().execute(command)
    }

    #[track_caller]
    pub fn wait_event(&self, name: &str) -> Value {
        self.own_monitor.lock().unwrap().wait_event(name, LIMIT)
    }

    /// All virtual CPUs stand still when this returns, and no request is on its way.
    #[track_caller]
    pub fn stop(&self) {
        self.qmp(&json!({ "execute": "stop" }));
    }

    #[track_caller]
    pub fn cont(&self) {
        self.qmp(&json!({ "execute": "cont" }));
    }

    /// `running`, `paused`, `io-error`, …
    #[track_caller]
    pub fn status(&self) -> String {
        let status = self.qmp(&json!({ "execute": "query-status" }));
        status["status"].as_str().unwrap().to_owned()
    }

    /// The guest agent's answer to a command without arguments. None: none within the limit.
    pub fn agent(&self, command: &str, limit: Duration) -> Option<Result<Value, String>> {
        ask_agent(&self.agent_socket(), &json!({ "execute": command }), limit)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Ok(child) = self.child.get_mut() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Kills a QEMU that is not a `Vm` yet, when waiting for it fails.
struct Starting(Option<Child>);

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
