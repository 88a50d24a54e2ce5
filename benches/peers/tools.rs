//! Each tool's way to do each task, with the settings that its documentation gives first; chunks of
//! fixed size where the tool has them and says that they suit images.

use super::{Cost, measured, run};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

pub trait Tool {
    fn name(&self) -> String;
    fn init(&self, store: &Path, images: &[(&str, PathBuf)]);
    /// `full`: everything is read, whatever is known of the file.
    fn backup(&self, store: &Path, image: &Path, full: bool) -> Cost;
    /// The newest backup of the image; where its file then lies.
    fn restore(&self, store: &Path, image: &Path, to: &Path) -> (Cost, PathBuf);
    fn verify(&self, store: &Path) -> Option<Cost>;
    /// Drops the oldest three, and gives their space back.
    fn prune(&self, store: &Path) -> Option<Cost>;
    /// Where what is stored lies.
    fn stored(&self, store: &Path) -> PathBuf {
        store.join("store")
    }
}

/// The tools that are here, and how to get the others.
pub fn tools() -> (Vec<Box<dyn Tool>>, Vec<&'static str>) {
    let mut tools: Vec<Box<dyn Tool>> = vec![Box::new(Vmkeep)];
    let mut missing = Vec::new();
    match version("restic", "version") {
        Some(version) => tools.push(Box::new(Restic(version))),
        None => missing.push("restic: apt-get install restic"),
    }
    match version("borg", "--version") {
        Some(version) => {
            tools.push(Box::new(Borg {
                version: version.clone(),
                fixed: false,
            }));
            tools.push(Box::new(Borg {
                version,
                fixed: true,
            }));
        }
        None => missing.push("borg: apt-get install borgbackup"),
    }
    match version("rustic", "--version") {
        Some(version) => {
            tools.push(Box::new(Rustic {
                version: version.clone(),
                fixed: false,
            }));
            tools.push(Box::new(Rustic {
                version,
                fixed: true,
            }));
        }
        None => missing.push("rustic: cargo install --locked rustic-rs"),
    }
    match version("bupstash", "--version") {
        Some(version) => tools.push(Box::new(Bupstash(version))),
        None => {
            missing.push("bupstash: apt-get install libsodium-dev; cargo install --locked bupstash")
        }
    }
    (tools, missing)
}

fn version(name: &str, argument: &str) -> Option<String> {
    let output = Command::new(name).arg(argument).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = text.lines().next()?.to_string();
    let words: Vec<&str> = line.split_whitespace().take(2).collect();
    Some(words.join(" "))
}

fn text(path: &Path) -> String {
    path.to_str()
        .expect("paths of benches are text")
        .to_string()
}

struct Vmkeep;

impl Vmkeep {
    fn command(&self, store: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmkeep"));
        command
            .arg("--config")
            .arg(store.join("vmkeep.toml"))
            .args(arguments);
        command
    }

    fn vm(image: &Path) -> String {
        image.file_stem().unwrap().to_str().unwrap().to_string()
    }

    fn later(command: &mut Command, days: u32) {
        command
            .env("LD_PRELOAD", "/usr/$LIB/faketime/libfaketime.so.1")
            .env("FAKETIME", format!("+{days}d"))
            .env("NO_FAKE_STAT", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    }
}

impl Tool for Vmkeep {
    fn name(&self) -> String {
        format!("vmkeep {}", env!("CARGO_PKG_VERSION"))
    }

    fn init(&self, store: &Path, images: &[(&str, PathBuf)]) {
        fs::create_dir_all(store).unwrap();
        let mut config = format!(
            "[host]\nclock = \"trusted\"\nstate_dir = \"{0}/state\"\n[repository]\nurl = \
             \"{0}/store\"\nreserve = \"1 MiB\"\n[policy]\ntimezone = \"UTC\"\n[[customer]]\nid = \
             \"acme\"\n",
            store.display()
        );
        for (vm, image) in images {
            config.push_str(&format!(
                "[[customer.vm]]\nname = \"{vm}\"\ndisks = {{ vda = \"{}\" }}\n",
                image.display()
            ));
        }
        fs::write(store.join("vmkeep.toml"), config).unwrap();
        run(&mut self.command(store, &["init", "--yes"]));
    }

    fn backup(&self, store: &Path, image: &Path, full: bool) -> Cost {
        let vm = Self::vm(image);
        let mut arguments = vec!["backup", &vm];
        if full {
            arguments.push("--full");
        }
        measured(&mut self.command(store, &arguments))
    }

    fn restore(&self, store: &Path, image: &Path, to: &Path) -> (Cost, PathBuf) {
        let vm = Self::vm(image);
        let line = ["restore", &vm, "--at", "latest", "--to", &text(to)];
        let cost = measured(&mut self.command(store, &line));
        (cost, to.join("vda.raw"))
    }

    fn verify(&self, store: &Path) -> Option<Cost> {
        Some(measured(
            &mut self.command(store, &["verify", "--read-data"]),
        ))
    }

    /// 40 days later all but the week's full have left; the second one, a day later, erases them.
    fn prune(&self, store: &Path) -> Option<Cost> {
        let mut expire = self.command(store, &["prune", "--confirm", "--trust-clock"]);
        Self::later(&mut expire, 30);
        let mut erase = self.command(store, &["prune", "--confirm", "--trust-clock"]);
        Self::later(&mut erase, 32);
        let (first, second) = (measured(&mut expire), measured(&mut erase));
        Some(Cost {
            seconds: first.seconds + second.seconds,
            peak_kib: first.peak_kib.max(second.peak_kib),
        })
    }
}

struct Restic(String);

impl Restic {
    fn command(&self, store: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new("restic");
        command
            .env("RESTIC_PASSWORD", "bench")
            .env("RESTIC_CACHE_DIR", store.join("cache"))
            .arg("-q")
            .arg("-r")
            .arg(store.join("store"))
            .args(arguments);
        command
    }
}

impl Tool for Restic {
    fn name(&self) -> String {
        self.0.clone()
    }

    fn init(&self, store: &Path, _: &[(&str, PathBuf)]) {
        fs::create_dir_all(store).unwrap();
        run(&mut self.command(store, &["init"]));
    }

    fn backup(&self, store: &Path, image: &Path, full: bool) -> Cost {
        let image = text(image);
        let mut arguments = vec!["backup", &image];
        if full {
            arguments.push("--force");
        }
        measured(&mut self.command(store, &arguments))
    }

    fn restore(&self, store: &Path, image: &Path, to: &Path) -> (Cost, PathBuf) {
        let line = [
            "restore",
            "latest",
            "--path",
            &text(image),
            "--target",
            &text(to),
        ];
        let cost = measured(&mut self.command(store, &line));
        (cost, to.join(image.strip_prefix("/").unwrap()))
    }

    fn verify(&self, store: &Path) -> Option<Cost> {
        Some(measured(
            &mut self.command(store, &["check", "--read-data"]),
        ))
    }

    fn prune(&self, store: &Path) -> Option<Cost> {
        let line = ["forget", "--keep-last", "5", "--prune"];
        Some(measured(&mut self.command(store, &line)))
    }
}

struct Rustic {
    version: String,
    fixed: bool,
}

impl Rustic {
    fn command(&self, store: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new("rustic");
        command
            .env("RUSTIC_PASSWORD", "bench")
            .env("RUSTIC_CACHE_DIR", store.join("cache"))
            .env("RUSTIC_NO_PROGRESS", "true")
            .env("RUSTIC_LOG_LEVEL", "error")
            .arg("-r")
            .arg(store.join("store"))
            .args(arguments);
        command
    }
}

impl Tool for Rustic {
    fn name(&self) -> String {
        match self.fixed {
            true => format!("{} fixed 256 KiB", self.version),
            false => self.version.clone(),
        }
    }

    fn init(&self, store: &Path, _: &[(&str, PathBuf)]) {
        fs::create_dir_all(store).unwrap();
        let mut line = vec!["init"];
        if self.fixed {
            line.extend(["--set-chunker", "fixed_size", "--set-chunk-size", "256KiB"]);
        }
        run(&mut self.command(store, &line));
    }

    fn backup(&self, store: &Path, image: &Path, full: bool) -> Cost {
        let image = text(image);
        let mut arguments = vec!["backup", &image];
        if full {
            arguments.push("--force");
        }
        measured(&mut self.command(store, &arguments))
    }

    fn restore(&self, store: &Path, image: &Path, to: &Path) -> (Cost, PathBuf) {
        let target = to.join(image.file_name().unwrap());
        fs::create_dir_all(to).unwrap();
        let image = text(image);
        let source = format!("latest:{image}");
        // Else the latest of all images.
        let line = ["restore", "--filter-paths", &image, &source];
        let cost = measured(self.command(store, &line).arg(&target));
        (cost, target)
    }

    fn verify(&self, store: &Path) -> Option<Cost> {
        Some(measured(
            &mut self.command(store, &["check", "--read-data"]),
        ))
    }

    fn prune(&self, store: &Path) -> Option<Cost> {
        let line = ["forget", "--keep-last", "5", "--prune", "--instant-delete"];
        Some(measured(&mut self.command(store, &line)))
    }
}

struct Borg {
    version: String,
    fixed: bool,
}

impl Borg {
    fn command(&self, store: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new("borg");
        command
            .env("BORG_PASSPHRASE", "bench")
            .env("BORG_REPO", store.join("store"))
            .env("BORG_BASE_DIR", store.join("base"))
            .args(arguments);
        command
    }
}

impl Tool for Borg {
    fn name(&self) -> String {
        match self.fixed {
            true => format!("{} fixed 4 MiB", self.version),
            false => self.version.clone(),
        }
    }

    fn init(&self, store: &Path, _: &[(&str, PathBuf)]) {
        fs::create_dir_all(store).unwrap();
        run(&mut self.command(store, &["init", "-e", "repokey-blake2"]));
    }

    fn backup(&self, store: &Path, image: &Path, full: bool) -> Cost {
        let mut arguments = vec!["create", "--compression", "zstd,1"];
        if self.fixed {
            arguments.extend(["--chunker-params", "fixed,4194304"]);
        }
        if full {
            arguments.push("--files-cache=disabled");
        }
        let archive = format!(
            "::{}-{{now:%Y%m%dT%H%M%S%f}}",
            image.file_stem().unwrap().to_str().unwrap()
        );
        let image = text(image);
        arguments.extend([archive.as_str(), &image]);
        measured(&mut self.command(store, &arguments))
    }

    fn restore(&self, store: &Path, image: &Path, to: &Path) -> (Cost, PathBuf) {
        let glob = format!("{}-*", image.file_stem().unwrap().to_str().unwrap());
        let line = ["list", "--last", "1", "--short", "--glob-archives", &glob];
        let archive = format!("::{}", run(&mut self.command(store, &line)).trim());
        fs::create_dir_all(to).unwrap();
        let mut command = self.command(store, &["extract", "--sparse", &archive]);
        let cost = measured(command.current_dir(to));
        (cost, to.join(image.strip_prefix("/").unwrap()))
    }

    fn verify(&self, store: &Path) -> Option<Cost> {
        Some(measured(
            &mut self.command(store, &["check", "--verify-data"]),
        ))
    }

    fn prune(&self, store: &Path) -> Option<Cost> {
        let line = ["prune", "--glob-archives", "web01-*", "--keep-last", "5"];
        let first = measured(&mut self.command(store, &line));
        let second = measured(&mut self.command(store, &["compact"]));
        Some(Cost {
            seconds: first.seconds + second.seconds,
            peak_kib: first.peak_kib.max(second.peak_kib),
        })
    }
}

struct Bupstash(String);

impl Bupstash {
    fn command(&self, store: &Path, arguments: &[&str]) -> Command {
        let mut command = Command::new("bupstash");
        command
            .env("BUPSTASH_REPOSITORY", store.join("store"))
            .env("BUPSTASH_KEY", store.join("key"))
            .env("BUPSTASH_SEND_LOG", store.join("log"))
            .env("BUPSTASH_QUERY_CACHE", store.join("queries"))
            .env("HOME", store)
            .args(arguments);
        command
    }
}

impl Tool for Bupstash {
    fn name(&self) -> String {
        self.0.clone()
    }

    fn init(&self, store: &Path, _: &[(&str, PathBuf)]) {
        fs::create_dir_all(store).unwrap();
        run(&mut self.command(store, &["new-key", "-o", &text(&store.join("key"))]));
        run(&mut self.command(store, &["init"]));
    }

    fn backup(&self, store: &Path, image: &Path, _: bool) -> Cost {
        let name = format!("name={}", image.file_stem().unwrap().to_str().unwrap());
        measured(&mut self.command(store, &["put", "-q", &name, &text(image)]))
    }

    fn restore(&self, store: &Path, image: &Path, to: &Path) -> (Cost, PathBuf) {
        let name = image.file_stem().unwrap().to_str().unwrap();
        fs::create_dir_all(to).unwrap();
        let listed = run(&mut self.command(
            store,
            &["list", "-q", "--format", "jsonl1", &format!("name={name}")],
        ));
        let last = listed.lines().last().unwrap_or_default();
        let id = last
            .split("\"id\":\"")
            .nth(1)
            .and_then(|rest| rest.split('"').next())
            .unwrap_or_else(|| panic!("no id in {last:?}"));
        let target = to.join("image");
        let mut command = Command::new("sh");
        let own = self.command(store, &[]);
        for (key, value) in own.get_envs() {
            if let Some(value) = value {
                command.env(key, value);
            }
        }
        command
            .arg("-c")
            .arg(format!(
                "bupstash get -q id={id} | dd conv=sparse bs=1M status=none of=\"$0\""
            ))
            .arg(&target);
        (measured(&mut command), target)
    }

    fn verify(&self, _: &Path) -> Option<Cost> {
        None
    }

    fn prune(&self, _: &Path) -> Option<Cost> {
        None
    }
}
