//! What a night meets that a guest must not feel: a store that stalls, a freezer that is gone or
//! stuck.

#![forbid(unsafe_code)]

use vmkeep_test_support as support;

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::live::{Fate, LIMIT, Scene, SceneOptions, until};
use support::{path_text, tool};
use tempfile::TempDir;

/// A file system of its own for the store, which can be made to stand still.
struct StallingStore {
    folder: TempDir,
}

impl StallingStore {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        fs::File::create(&image)
            .unwrap()
            .set_len(256 << 20)
            .unwrap();
        tool("mkfs.ext4", &["-q", "-F", path_text(&image)]);
        let store = StallingStore { folder };
        let at = store.at();
        fs::create_dir(&at).unwrap();
        tool("mount", &["-o", "loop", path_text(&image), path_text(&at)]);
        store
    }

    fn at(&self) -> PathBuf {
        self.folder.path().join("mounted")
    }

    fn stall(at: &str) {
        tool("fsfreeze", &["-f", at]);
    }

    fn go_on(&self) {
        tool("fsfreeze", &["-u", path_text(&self.at())]);
    }
}

impl Drop for StallingStore {
    fn drop(&mut self) {
        let at = self.at();
        for (name, option) in [("fsfreeze", "-u"), ("umount", "-l")] {
            // Not frozen any more where the test has passed.
            let _ = std::process::Command::new(name)
                .args([option, path_text(&at)])
                .output();
        }
    }
}

/// A minute of it shows nothing that these seconds do not.
fn stall_seconds() -> u64 {
    std::env::var("VMKEEP_TEST_STALL_SECONDS").map_or(8, |text| text.parse().unwrap())
}

#[test]
fn a_store_that_stalls_is_not_felt_by_the_guest_and_the_backup_goes_on_after_it() {
    let store = StallingStore::new();
    let mut scene = Scene::new(&SceneOptions {
        store: Some(store.at().join("store")),
        ..SceneOptions::default()
    });
    let full = scene.backup(&[]);
    scene.assert_exact(&full);
    let quiet = scene.vm.latency(200);

    for arguments in [&[][..], &["--full"]] {
        scene.next_night();
        scene.vm.wait_for_progress(20);
        // From the moment on in which the guest runs again.
        let stalled: Arc<Mutex<Option<Instant>>> = Arc::default();
        let (begins, at) = (stalled.clone(), store.at());
        let mut running = scene.start_night(arguments, move |command| {
            let mut begun = begins.lock().unwrap();
            if command["execute"] == "nbd-server-start" && begun.is_none() {
                StallingStore::stall(path_text(&at));
                *begun = Some(Instant::now());
            }
        });
        let begun = until("the stall", LIMIT, || *stalled.lock().unwrap());
        let seconds = stall_seconds();
        let (mut slowest, mut records) = (0, 0);
        while begun.elapsed() < Duration::from_secs(seconds) {
            let before = scene.vm.seq();
            let latency = scene.vm.latency(100);
            slowest = slowest.max(latency.max_us);
            records += scene.vm.wait_for_progress(10) - before;
        }
        assert!(running.is_running(), "nothing can be committed");
        println!(
            "stalled for {seconds} s: {records} records, slowest write {slowest} us; \
             quiet: {quiet:?}"
        );
        // One that waited for the store would have taken all of the time.
        assert!(slowest < seconds * 1_000_000 / 2, "{slowest} us");
        store.go_on();
        let night = scene.end_night(running, 0);
        scene.assert_exact(&night);
        scene.assert_clean();
    }

    scene.next_night();
    scene.vm.wait_for_progress(20);
    let night = scene.backup(&[]);
    night.assert_tracked();
    scene.assert_exact(&night);
    scene.assert_every_point_exact();
}

/// Whoever is to die, once it is known.
type Victim = Arc<Mutex<Option<u32>>>;

fn signal(signal: &str, victim: &Victim) {
    let process = until("the process", LIMIT, || *victim.lock().unwrap());
    tool("kill", &[signal, &process.to_string()]);
}

/// When the guest was frozen and let go, as the guest agent was told.
#[derive(Default)]
struct Frozen {
    from: Option<Instant>,
    to: Option<Instant>,
}

#[test]
fn a_guest_whose_freezer_is_gone_or_stuck_is_thawed_within_the_limit() {
    let mut scene = Scene::new(&SceneOptions {
        own: "guest_agent = \"AGENT\"\nfsfreeze = \"require\"",
        host_keys: "freeze_limit = \"3s\"",
        agent: true,
        ..SceneOptions::default()
    });
    let full = scene.backup(&[]);
    scene.assert_exact(&full);
    let limit = Duration::from_secs(3);

    // (signal, whether it comes while the guest is being frozen or while it is being paused)
    for (how, on_freeze) in [
        ("-KILL", true),
        ("-KILL", false),
        ("-STOP", true),
        ("-STOP", false),
    ] {
        println!("{how}, on freeze: {on_freeze}");
        scene.next_night();
        scene.vm.wait_for_progress(20);
        let victim: Victim = Arc::default();
        let frozen: Arc<Mutex<Frozen>> = Arc::default();
        let (seen, one) = (frozen.clone(), victim.clone());
        let agent = scene.agent.as_ref().unwrap();
        agent.set(move |name| {
            let mut frozen = seen.lock().unwrap();
            match name {
                "guest-fsfreeze-freeze" => {
                    frozen.from = Some(Instant::now());
                    if on_freeze {
                        signal(how, &one);
                    }
                }
                "guest-fsfreeze-thaw" => {
                    frozen.to.get_or_insert(Instant::now());
                }
                _ => {}
            }
            Fate::Pass
        });
        let other = victim.clone();
        let mut done = false;
        scene.watch(move |command| {
            if command["execute"] == "stop" && !on_freeze && !done {
                done = true;
                signal(how, &other);
            }
            command
        });
        let running = scene.start_backup(&[]);
        *victim.lock().unwrap() = Some(running.id());
        let length = until("the thaw", LIMIT, || {
            let frozen = frozen.lock().unwrap();
            Some(frozen.to? - frozen.from?)
        });
        // A machine that is starved by other tests may be late itself.
        assert!(length < limit + Duration::from_secs(5), "{length:?}");
        until("the guest to run", LIMIT, || {
            (scene.vm.status() == "running").then_some(())
        });
        scene.vm.wait_for_progress(20);
        match (how, on_freeze) {
            // It was frozen only, so it may go on, and finds that the instant came too late.
            ("-STOP", true) => {
                signal("-CONT", &victim);
                running
                    .ended()
                    .exits(1)
                    .says("had to be let go before the instant");
            }
            // Whoever stands still with a paused guest is killed for it.
            _ => assert!(running.ended().was_killed()),
        }
        scene.agent.as_ref().unwrap().pass();
        scene.proxy.pass();
        let night = scene.backup(&[]);
        night.assert_tracked();
        assert_eq!(
            scene.host.points(scene.now).last().unwrap()["consistency"],
            "filesystem"
        );
        scene.assert_exact(&night);
        scene.assert_clean();
    }
}
