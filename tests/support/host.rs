use super::program;
use jiff::Timestamp;
use serde_json::Value;
use std::fmt::Write;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use tempfile::TempDir;

/// Debian's `faketime` is a wrapper around this library. It is preloaded without the wrapper, so
/// that a `kill -9` hits vmkeep and not its parent.
const FAKETIME: &str = "/usr/$LIB/faketime/libfaketime.so.1";

/// faketime names what it shares with children by the number of the process, and ends a process
/// whose name is taken: by what a process of that number left behind when it was killed. The shell
/// has the number that vmkeep will have, and makes way.
const UNDER_FAKETIME: &str = r#"
for left in /dev/shm/faketime_shm_$$ /dev/shm/sem.faketime_sem_$$; do
    if [ -e "$left" ]; then rm -f "$left"; fi
done
export LD_PRELOAD="$PRELOAD"
unset PRELOAD
exec "$@"
"#;

/// `2031-02-10T23:17:00Z` and the like.
#[track_caller]
pub fn time(text: &str) -> Timestamp {
    text.parse()
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// Runs a tool to its end; its standard output.
#[track_caller]
pub fn tool(name: &str, arguments: &[&str]) -> String {
    let output = Command::new(name)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("cannot run {name} ({error}); scripts/test installs it"));
    assert!(
        output.status.success(),
        "{name} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

pub fn path_text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are text")
}

/// A customer of the configuration: name, own keys (lines of TOML), VMs with their disks.
#[derive(Debug, Clone)]
pub struct Customer {
    pub name: &'static str,
    pub own: &'static str,
    pub vms: Vec<(&'static str, Vec<&'static str>)>,
}

#[derive(Debug, Clone)]
pub struct HostOptions {
    pub name: &'static str,
    pub clock: &'static str,
    pub policy: &'static str,
    pub customers: Vec<Customer>,
    pub store: Option<PathBuf>,
    pub reserve: &'static str,
    /// `[repository]`, where it is not the folder.
    pub bucket: Option<String>,
}

impl Default for HostOptions {
    fn default() -> Self {
        HostOptions {
            name: "host1",
            clock: "trusted",
            policy: "timezone = \"UTC\"\nwindow = \"22:00-06:00\"",
            customers: vec![Customer {
                name: "acme",
                own: "",
                vms: vec![("web01", vec!["vda"])],
            }],
            store: None,
            reserve: "1 MiB",
            bucket: None,
        }
    }
}

/// A folder with everything of one host: configuration, images, state, and the store.
pub struct Host {
    folder: TempDir,
    store: PathBuf,
    config: PathBuf,
}

/// A command that has ended.
pub struct Ran {
    pub line: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// A command that has been started.
pub struct Running {
    line: String,
    child: Child,
}

impl Host {
    pub fn new(options: &HostOptions) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("vmkeep-test.")
            .tempdir()
            .unwrap();
        let store = options
            .store
            .clone()
            .unwrap_or_else(|| folder.path().join("store"));
        let config = folder.path().join("vmkeep.toml");
        fs::create_dir(folder.path().join("images")).unwrap();
        let host = Host {
            folder,
            store,
            config,
        };
        host.configure(options);
        host
    }

    /// Writes the configuration that the options describe.
    pub fn configure(&self, options: &HostOptions) {
        let repository = options.bucket.clone().unwrap_or_else(|| {
            let store = path_text(&self.store);
            let reserve = options.reserve;
            format!("[repository]\nurl = \"{store}\"\nreserve = \"{reserve}\"\n")
        });
        let mut text = format!(
            "[host]\nname = \"{}\"\nclock = \"{}\"\nstate_dir = \"{}\"\n\n\
             {repository}\n[policy]\n{}\n",
            options.name,
            options.clock,
            path_text(&self.state()),
            options.policy,
        );
        for customer in &options.customers {
            let Customer { name, own, vms } = customer;
            let _ = write!(text, "\n[[customer]]\nid = \"{name}\"\n{own}\n");
            for (vm, disks) in vms {
                let disks: Vec<String> = disks
                    .iter()
                    .map(|disk| format!("{disk} = \"{}\"", path_text(&self.image(vm, disk))))
                    .collect();
                let _ = write!(
                    text,
                    "\n[[customer.vm]]\nname = \"{vm}\"\ndisks = {{ {} }}\n",
                    disks.join(", ")
                );
            }
        }
        self.write_config(&text);
    }

    pub fn write_config(&self, text: &str) {
        fs::write(&self.config, text).unwrap();
    }

    pub fn config_text(&self) -> String {
        fs::read_to_string(&self.config).unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn store(&self) -> &Path {
        &self.store
    }

    pub fn state(&self) -> PathBuf {
        self.path("state")
    }

    pub fn image(&self, vm: &str, disk: &str) -> PathBuf {
        self.path("images").join(format!("{vm}-{disk}.raw"))
    }

    pub fn customer_folder(&self, customer: &str) -> PathBuf {
        self.store.join("customers").join(customer)
    }

    /// The age identity of the host, wherever in its state it lies.
    pub fn identity_file(&self) -> PathBuf {
        let mut found = files_below(&self.state());
        found.retain(|path| {
            fs::read(path)
                .is_ok_and(|bytes| bytes.windows(15).any(|window| window == b"AGE-SECRET-KEY-"))
        });
        assert_eq!(found.len(), 1, "one identity file expected: {found:?}");
        found.remove(0)
    }

    /// The program under test at a time of the wall clock; file times and the monotonic clock
    /// stay real.
    pub fn command(&self, arguments: &[&str], at: Timestamp) -> Command {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", UNDER_FAKETIME, "sh", path_text(&program())])
            .args(arguments)
            .current_dir(self.folder.path())
            .env_clear()
            .env("PATH", self.search_path())
            .env("VMKEEP_CONFIG", &self.config)
            .env("TZ", "UTC")
            .env("PRELOAD", FAKETIME)
            .env("FAKETIME", at.strftime("@%Y-%m-%d %H:%M:%S").to_string())
            .env("NO_FAKE_STAT", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// A program in the folder `tools` takes the place of the one that vmkeep would find.
    fn search_path(&self) -> std::ffi::OsString {
        let mut path = self.path("tools").into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        path
    }

    pub fn start(&self, arguments: &[&str], at: Timestamp) -> Running {
        Running {
            line: format!("[{at}] vmkeep {}", arguments.join(" ")),
            child: self.command(arguments, at).spawn().unwrap(),
        }
    }

    pub fn vmkeep(&self, arguments: &[&str], at: Timestamp) -> Ran {
        self.start(arguments, at).ended()
    }

    /// The document that a command prints with `--json`; it must exit with 0.
    #[track_caller]
    pub fn json(&self, arguments: &[&str], at: Timestamp) -> Value {
        let arguments = [&["--json"], arguments].concat();
        self.vmkeep(&arguments, at).exits(0).document()
    }

    /// The restore points that are listed.
    #[track_caller]
    pub fn points(&self, at: Timestamp) -> Vec<Value> {
        match self.json(&["points"], at) {
            Value::Array(points) => points,
            other => panic!("points --json is an array: {other}"),
        }
    }

    /// A host that may not read the repository yet is told by `init` what another one has to run; that command.
    #[track_caller]
    pub fn admission(&self, at: Timestamp) -> Vec<String> {
        let ran = self.vmkeep(&["init", "--yes"], at);
        ran.exits(12).one_error();
        let mut lines = ran.stderr.lines();
        let line = lines.find_map(|line| line.split_once("vmkeep key admit "));
        let words = line.expect("the command is printed").1.split(' ');
        let words = ["key", "admit"].into_iter().chain(words);
        words.map(str::to_string).collect()
    }

    /// Restores a VM into a new folder, whose path is returned.
    #[track_caller]
    pub fn restore(&self, vm: &str, when: &str, at: Timestamp) -> TempDir {
        let target = tempfile::Builder::new()
            .prefix("restored.")
            .tempdir_in(self.folder.path())
            .unwrap();
        let to = path_text(target.path());
        self.vmkeep(&["restore", vm, "--at", when, "--to", to], at)
            .exits(0);
        target
    }
}

impl Running {
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Also one that has ended and was not waited for takes it.
    pub fn signal(&self, signal: &str) {
        tool("kill", &[signal, &self.id().to_string()]);
    }

    /// `kill -9`. What was printed so far is lost with it.
    pub fn kill(mut self) -> Ran {
        self.child.kill().unwrap();
        self.ended()
    }

    pub fn ended(self) -> Ran {
        let Output {
            status,
            stdout,
            stderr,
        } = self.child.wait_with_output().unwrap();
        Ran {
            line: self.line,
            status,
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        }
    }
}

impl Ran {
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    pub fn was_killed(&self) -> bool {
        self.status.signal() == Some(9)
    }

    #[track_caller]
    pub fn exits(&self, code: i32) -> &Self {
        self.exits_with_one_of(&[code])
    }

    #[track_caller]
    pub fn exits_with_one_of(&self, codes: &[i32]) -> &Self {
        assert!(
            self.code().is_some_and(|code| codes.contains(&code)),
            "exit code {codes:?} expected, {} found\n{self}",
            self.status
        );
        self
    }

    /// Something on stderr or stdout says this.
    #[track_caller]
    pub fn says(&self, part: &str) -> &Self {
        assert!(
            self.stderr.contains(part) || self.stdout.contains(part),
            "{part:?} is not said\n{self}"
        );
        self
    }

    /// The text of the one error, in a few lines, without a trace of the program's inside.
    #[track_caller]
    pub fn one_error(&self) -> &Self {
        let errors = self.stderr.matches("vmkeep: error: ").count();
        assert_eq!(errors, 1, "one error expected\n{self}");
        assert!(
            !self.stderr.contains("panicked") && !self.stderr.contains("RUST_BACKTRACE"),
            "a panic is no error message\n{self}"
        );
        self
    }

    #[track_caller]
    pub fn document(&self) -> Value {
        serde_json::from_str(&self.stdout)
            .unwrap_or_else(|error| panic!("one JSON document expected ({error})\n{self}"))
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "$ {}\n-- stdout\n{}-- stderr\n{}-- {}",
            self.line, self.stdout, self.stderr, self.status
        )
    }
}

/// Every file below a folder, in order.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        for entry in entries {
            let path = entry.unwrap().path();
            match path.is_dir() && !path.is_symlink() {
                true => folders.push(path),
                false => files.push(path),
            }
        }
    }
    files.sort();
    files
}
