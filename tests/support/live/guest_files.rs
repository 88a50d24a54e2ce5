use super::super::project;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

/// What a guest boots from.
#[derive(Debug, Clone)]
pub struct GuestFiles {
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

impl GuestFiles {
    /// What `scripts/guest` has made. It is not made here: that needs the network.
    pub fn made() -> &'static GuestFiles {
        static MADE: OnceLock<GuestFiles> = OnceLock::new();
        MADE.get_or_init(|| {
            let project = project();
            let folder = project.join("target/guest");
            let asked = Command::new(project.join("scripts/guest"))
                .arg("--is-fresh")
                .arg(&folder)
                .output()
                .unwrap_or_else(|error| panic!("cannot run scripts/guest: {error}"));
            assert!(
                asked.status.success(),
                "there is no fresh test guest; \"scripts/test tools guest\" makes it\n{}",
                String::from_utf8_lossy(&asked.stderr)
            );
            GuestFiles {
                kernel: folder.join("kernel"),
                initramfs: folder.join("initramfs"),
            }
        })
    }

    /// The kernel command line; `own` is what `guest/init` understands.
    pub fn command_line(own: &str) -> String {
        // no_timer_check: on a starved machine the kernel takes its timer for broken and panics.
        format!("console=ttyS0 quiet panic=0 mitigations=off nokaslr no_timer_check {own}")
    }
}
