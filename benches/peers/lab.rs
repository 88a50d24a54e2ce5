//! The images: real file systems with real files, and nights that change them as hosts do.

use super::{MIB, run, seconds};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Nights after the first one.
pub const NIGHTS: usize = 7;

pub struct Lab {
    pub folder: PathBuf,
    /// Bytes of files in each image.
    pub data_bytes: u64,
    pub disk_bytes: u64,
}

/// What the tools see, under one path for all nights.
pub const WEB01: &str = "web01.raw";
pub const WEB02: &str = "web02.raw";
pub const DB01: &str = "db01.raw";

/// Bytes of noise, the same in every run.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}

/// Lines as servers log them.
fn log_lines(seed: u64, length: usize) -> Vec<u8> {
    let mut text = Vec::with_capacity(length + 128);
    let mut number = seed << 20;
    while text.len() < length {
        number += 1;
        let hash = blake3::hash(&number.to_le_bytes());
        let [a, b, c, d, ..] = *hash.as_bytes();
        let _ = writeln!(
            text,
            "2031-02-{:02} 10.{a}.{b}.{c} \"GET /shop/item/{number} HTTP/1.1\" 200 {d}{a} \"{}\"",
            seed % 28 + 1,
            &hash.to_hex()[..12]
        );
    }
    text
}

/// Copies files below `from` until `limit` bytes are there.
fn copy_files(from: &Path, to: &Path, limit: &mut u64) {
    let mut entries: Vec<_> = fs::read_dir(from)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    entries.sort();
    for path in entries {
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            continue;
        };
        let target = to.join(path.file_name().unwrap());
        if metadata.is_dir() {
            fs::create_dir_all(&target).unwrap();
            copy_files(&path, &target, limit);
        } else if metadata.is_file() && metadata.len() <= *limit {
            *limit -= metadata.len();
            fs::copy(&path, &target).unwrap();
        }
    }
}

/// Reads a file, or all files of a folder, so that they are in the page cache.
pub fn warm(path: &Path) {
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            warm(&entry.unwrap().path());
        }
    } else {
        let mut buffer = vec![0; 1 << 20];
        let mut file = File::open(path).unwrap();
        while file.read(&mut buffer).unwrap() > 0 {}
    }
}

pub fn copy_sparse(from: &Path, to: &Path) {
    run(Command::new("cp")
        .args(["--sparse=always"])
        .arg(from)
        .arg(to));
}

impl Lab {
    /// Makes `web01` and its nights, `web02` (the same base, other packages) and `db01` (tables).
    pub fn new(base: &Path, mib: u64) -> Self {
        let folder = base.join(format!("vmkeep-bench.{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let lab = Lab {
            folder,
            data_bytes: mib * MIB,
            disk_bytes: 2 * mib * MIB,
        };
        let tree = lab.folder.join("tree");
        let base_part = |left: &mut u64| {
            fs::create_dir_all(tree.join("lib")).unwrap();
            copy_files(Path::new("/usr/lib"), &tree.join("lib"), left);
        };
        let mut left = mib * MIB * 3 / 4;
        base_part(&mut left);
        fs::create_dir_all(tree.join("var")).unwrap();
        fs::write(
            tree.join("var/access.log"),
            log_lines(0, (mib * MIB / 16) as usize),
        )
        .unwrap();
        lab.table(&tree, mib * MIB / 8);
        lab.format(&tree, "web01.night0");
        // The same base; what differs is other software.
        fs::remove_dir_all(tree.join("var")).unwrap();
        let mut left = mib * MIB / 4;
        fs::create_dir_all(tree.join("share")).unwrap();
        copy_files(Path::new("/usr/share"), &tree.join("share"), &mut left);
        lab.format(&tree, WEB02);
        fs::remove_dir_all(&tree).unwrap();
        fs::create_dir_all(&tree).unwrap();
        lab.table(&tree, mib * MIB / 2);
        let mut left = mib * MIB / 8;
        fs::create_dir_all(tree.join("bin")).unwrap();
        copy_files(Path::new("/usr/bin"), &tree.join("bin"), &mut left);
        lab.format(&tree, DB01);
        fs::remove_dir_all(&tree).unwrap();
        for night in 1..=NIGHTS {
            lab.change(night, mib);
        }
        lab
    }

    /// A table of rows, half of which compresses.
    fn table(&self, tree: &Path, bytes: u64) {
        fs::create_dir_all(tree.join("var")).unwrap();
        let mut file = File::create(tree.join("var/table")).unwrap();
        for page in 0..bytes / 8192 {
            file.write_all(&page_of(page, 0)).unwrap();
        }
    }

    fn format(&self, tree: &Path, image: &str) {
        let path = self.folder.join(image);
        File::create(&path)
            .unwrap()
            .set_len(self.disk_bytes)
            .unwrap();
        run(Command::new("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-d"])
            .arg(tree)
            .arg(&path));
    }

    /// A night's changes, made inside the mounted file system: a log that grows, random pages of a
    /// table, a package that is replaced, uploads.
    fn change(&self, night: usize, mib: u64) {
        let image = self.night(night);
        copy_sparse(&self.night(night - 1), &image);
        let mount = self.folder.join("mount");
        fs::create_dir_all(&mount).unwrap();
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(&mount));
        let seed = night as u64;
        let mut log = OpenOptions::new()
            .append(true)
            .open(mount.join("var/access.log"))
            .unwrap();
        log.write_all(&log_lines(seed, (mib * MIB / 200) as usize))
            .unwrap();
        let table = OpenOptions::new()
            .write(true)
            .open(mount.join("var/table"))
            .unwrap();
        let pages = mib * MIB / 8 / 8192;
        for number in 0..pages / 40 {
            let page =
                u64::from_le_bytes(noise(seed << 32 | number, 8).try_into().unwrap()) % pages;
            table
                .write_all_at(&page_of(page, seed), page * 8192)
                .unwrap();
        }
        let uploads = mount.join("uploads");
        fs::create_dir_all(&uploads).unwrap();
        for number in 0..mib / 256 {
            let name = uploads.join(format!("{night}-{number}.jpg"));
            fs::write(name, noise(seed << 40 | number, MIB as usize)).unwrap();
        }
        // An upgrade: a folder written anew under its name, a little different.
        let mut left = mib * MIB / 100;
        let from = if night.is_multiple_of(2) {
            "/usr/sbin"
        } else {
            "/usr/lib/gcc"
        };
        fs::create_dir_all(mount.join("opt")).unwrap();
        copy_files(Path::new(from), &mount.join("opt"), &mut left);
        drop((log, table));
        run(Command::new("umount").arg(&mount));
    }

    pub fn night(&self, night: usize) -> PathBuf {
        self.folder.join(format!("web01.night{night}"))
    }

    pub fn image(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// `web01` becomes what it was that night; in the page cache for all tools alike.
    pub fn put(&self, night: usize) {
        copy_sparse(&self.night(night), &self.image(WEB01));
        warm(&self.image(WEB01));
    }

    /// Seconds for each step of a first full of `web01`, alone, on all cores; and of a restore.
    pub fn bounds(&self) -> Bounds {
        self.put(0);
        let bytes = fs::read(self.image(WEB01)).unwrap();
        let data: Vec<&[u8]> = bytes
            .chunks(64 << 10)
            .filter(|chunk| chunk.iter().any(|byte| *byte != 0))
            .collect();
        let threads = std::thread::available_parallelism().unwrap().get();
        let parts: Vec<&[&[u8]]> = data.chunks(data.len().div_ceil(threads)).collect();
        fn on_all<I: Sync, O: Send>(parts: &[I], work: impl Fn(&I) -> O + Sync) -> (f64, Vec<O>) {
            let mut outcomes = Vec::new();
            let took = seconds(|| {
                outcomes = std::thread::scope(|scope| {
                    let threads: Vec<_> = parts
                        .iter()
                        .map(|part| scope.spawn(|| work(part)))
                        .collect();
                    threads
                        .into_iter()
                        .map(|thread| thread.join().unwrap())
                        .collect()
                });
            });
            (took, outcomes)
        }
        let (hash, _) = on_all(&parts, |part| {
            for chunk in *part {
                std::hint::black_box(blake3::hash(chunk));
            }
        });
        let (compress, compressed) = on_all(&parts, |part| {
            let mut compressor = zstd::bulk::Compressor::new(1).unwrap();
            part.iter()
                .map(|chunk| compressor.compress(chunk).unwrap())
                .collect::<Vec<Vec<u8>>>()
        });
        let (decompress, _) = on_all(&compressed, |part| {
            let mut decompressor = zstd::bulk::Decompressor::new().unwrap();
            let mut plain = vec![0; 64 << 10];
            for chunk in part {
                std::hint::black_box(
                    decompressor
                        .decompress_to_buffer(chunk, &mut plain)
                        .unwrap(),
                );
            }
        });
        let key = ring::aead::UnboundKey::new(&ring::aead::AES_256_GCM, &[7; 32]).unwrap();
        let key = ring::aead::LessSafeKey::new(key);
        let (cipher, _) = on_all(&compressed, |part| {
            for chunk in part {
                let mut chunk = chunk.clone();
                let nonce = ring::aead::Nonce::assume_unique_for_key([0; 12]);
                let aad = ring::aead::Aad::empty();
                let _tag = std::hint::black_box(
                    key.seal_in_place_separate_tag(nonce, aad, &mut chunk)
                        .unwrap(),
                );
            }
        });
        let target = self.folder.join("bound");
        let written: Vec<u8> = compressed.concat().concat();
        let write = seconds(|| {
            let mut file = File::create(&target).unwrap();
            file.write_all(&written).unwrap();
            file.sync_all().unwrap();
        });
        fs::remove_file(&target).unwrap();
        let file = File::open(self.image(WEB01)).unwrap();
        let ranges: Vec<u64> = (0..threads as u64).collect();
        let read_bytes = data.len() as u64 * 65536;
        let (read, _) = on_all(&ranges, |part| {
            let mut buffer = vec![0; 1 << 20];
            let share = read_bytes / threads as u64;
            let mut at = *part * share;
            while at + buffer.len() as u64 <= (*part + 1) * share {
                file.read_exact_at(&mut buffer, at).unwrap();
                at += buffer.len() as u64;
            }
        });
        let write_plain = seconds(|| {
            copy_sparse(&self.image(WEB01), &target);
            File::open(&target).unwrap().sync_all().unwrap();
        });
        fs::remove_file(&target).unwrap();
        Bounds {
            data_bytes: read_bytes,
            read,
            hash,
            compress,
            cipher,
            write,
            decompress,
            write_plain,
        }
    }
}

/// Seconds.
pub struct Bounds {
    pub data_bytes: u64,
    pub read: f64,
    pub hash: f64,
    pub compress: f64,
    pub cipher: f64,
    pub write: f64,
    pub decompress: f64,
    pub write_plain: f64,
}

fn page_of(page: u64, version: u64) -> Vec<u8> {
    let mut bytes = noise(page << 8 | version, 8192);
    // Rows repeat their shape: every second 32 bytes are the same in all pages.
    for piece in bytes.chunks_mut(64) {
        piece[..32].copy_from_slice(b"row:customer=0000;state=open;   ");
    }
    bytes
}
