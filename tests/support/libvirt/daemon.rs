use super::eventually;
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use tempfile::TempDir;

/// A libvirtd that sees folders of its own where the host has its configuration and state, and
/// whose processes, QEMUs and all, die with this program however that ends.
pub struct Daemon {
    folder: TempDir,
    /// Says that somebody lives in the folder. What is `static` is never dropped.
    _lock: File,
}

const PREFIX: &str = "vmkeep-libvirt-";

/// The open folder, if nobody else holds its lock.
fn lock(folder: &Path) -> Option<File> {
    let file = File::open(folder).ok()?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
    Some(file)
}

/// Removes the folders of test programs that have ended.
fn remove_dead(parent: &Path) {
    for entry in fs::read_dir(parent).unwrap().flatten() {
        let ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        // A moment old: somebody may be about to lock it.
        let old = entry
            .metadata()
            .and_then(|metadata| metadata.modified())
            .is_ok_and(|time| time.elapsed().is_ok_and(|age| age.as_secs() > 60));
        if ours && old && lock(&entry.path()).is_some() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

impl Daemon {
    /// The one of this test binary.
    pub fn shared() -> &'static Daemon {
        static DAEMON: OnceLock<Daemon> = OnceLock::new();
        DAEMON.get_or_init(Daemon::start)
    }

    fn start() -> Daemon {
        remove_dead(&std::env::temp_dir());
        let folder = tempfile::Builder::new().prefix(PREFIX).tempdir().unwrap();
        let lock = lock(folder.path()).expect("a new folder");
        // QEMU runs as another user, as it does on real hosts.
        let passable = |path: &Path| {
            fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
        };
        passable(folder.path());
        for name in ["etc", "run", "lib", "log", "cache", "vms"] {
            fs::create_dir(folder.path().join(name)).unwrap();
            passable(&folder.path().join(name));
        }
        let at = folder.path().to_str().unwrap();
        fs::write(
            folder.path().join("etc/qemu.conf"),
            "user = \"libvirt-qemu\"\ngroup = \"kvm\"\nsecurity_driver = \"none\"\n\
             namespaces = []\ncgroup_controllers = []\nstdio_handler = \"file\"\n",
        )
        .unwrap();
        fs::write(
            folder.path().join("etc/libvirtd.conf"),
            format!(
                "unix_sock_dir = \"{at}/run\"\nauth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\n"
            ),
        )
        .unwrap();
        // Where root may use KVM and QEMU's user may not, libvirt never believes what it knows of
        // a QEMU and asks it again, a dozen of times for one command. So nobody may: the file in
        // its place is no device, and closed to all but root.
        fs::write(folder.path().join("no-kvm"), "").unwrap();
        fs::set_permissions(folder.path().join("no-kvm"), Permissions::from_mode(0o600)).unwrap();
        let script = format!(
            "set -e
             test ! -e /dev/kvm || mount --bind {at}/no-kvm /dev/kvm
             for d in etc:/etc run:/run lib:/var/lib log:/var/log cache:/var/cache; do
                 mkdir -p ${{d#*:}}/libvirt
                 mount --bind {at}/${{d%%:*}} ${{d#*:}}/libvirt
             done
             libvirtd -f {at}/etc/libvirtd.conf -p {at}/run/libvirtd.pid > {at}/log/out 2>&1 &
             wait"
        );
        // The kernel takes the end of the thread that started a process for its parent's.
        thread::spawn(move || {
            let status = Command::new("setpriv")
                .args(["--pdeathsig", "KILL", "--", "unshare", "--mount"])
                .args(["--propagation", "private", "--pid", "--fork"])
                .args(["--kill-child=KILL", "--mount-proc", "sh", "-c", &script])
                .stdin(Stdio::null())
                .status();
            panic!("libvirtd ended: {status:?}");
        });
        let daemon = Daemon {
            folder,
            _lock: lock,
        };
        eventually(
            "libvirtd answers (apt-get install libvirt-daemon-system)",
            || daemon.ask(&["list"]).is_ok(),
        );
        daemon
    }

    pub fn uri(&self) -> String {
        let socket = self.folder.path().join("run/libvirt-sock");
        format!("qemu:///system?socket={}", socket.display())
    }

    /// A folder that QEMU's user may pass through.
    pub fn folder(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join("vms").join(name);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// What virsh says, or what it has against it.
    pub fn ask(&self, arguments: &[&str]) -> Result<String, String> {
        let output = Command::new("virsh")
            .args(["-q", "-c", &self.uri()])
            .args(arguments)
            .env("LC_ALL", "C")
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_string();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(text(&output.stderr)),
        }
    }

    #[track_caller]
    pub fn virsh(&self, arguments: &[&str]) -> String {
        self.ask(arguments)
            .unwrap_or_else(|error| panic!("virsh {arguments:?}: {error}"))
    }
}
