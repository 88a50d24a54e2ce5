use super::Random;
use rustix::fs::FallocateFlags;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

pub const CHUNK: usize = 64 * 1024;
pub const BLOCK: usize = 4096;

/// What a disk held at one moment, as hashes that do not come from the program under test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    pub size: u64,
    pub whole: blake3::Hash,
    /// Of every 64 KiB; the last one as short as it is.
    pub chunks: Vec<blake3::Hash>,
}

impl Picture {
    pub fn of(content: &[u8]) -> Self {
        Picture {
            size: content.len() as u64,
            whole: blake3::hash(content),
            chunks: content.chunks(CHUNK).map(blake3::hash).collect(),
        }
    }

    pub fn of_file(path: &Path) -> Self {
        let content = std::fs::read(path)
            .unwrap_or_else(|error| panic!("{} cannot be read: {error}", path.display()));
        Self::of(&content)
    }
}

/// One raw image and what must be in it.
pub struct Guest {
    pub path: PathBuf,
    content: Vec<u8>,
    /// Chunks that were overwritten, some of which come back one night.
    memories: Vec<Vec<u8>>,
}

impl Guest {
    /// A new image of `size` bytes: a third holes, a third prose, a third noise.
    pub fn new(path: PathBuf, size: u64, random: &mut Random) -> Self {
        let file = File::create_new(&path).unwrap();
        file.set_len(size).unwrap();
        let mut guest = Guest {
            path,
            content: vec![0; size as usize],
            memories: Vec::new(),
        };
        let mut at = 0;
        while at < guest.content.len() {
            let length = (1 + random.below(6) as usize) * CHUNK;
            let length = length.min(guest.content.len() - at);
            match random.below(3) {
                0 => {}
                1 => {
                    let bytes = random.prose(length);
                    guest.put(&file, at, &bytes);
                }
                _ => {
                    let bytes = random.noise(length);
                    guest.put(&file, at, &bytes);
                }
            }
            at += length;
        }
        guest
    }

    /// A new image with exactly this content.
    pub fn with_content(path: PathBuf, content: &[u8]) -> Self {
        std::fs::write(&path, content).unwrap();
        Guest {
            path,
            content: content.to_vec(),
            memories: Vec::new(),
        }
    }

    pub fn content(&self) -> &[u8] {
        &self.content
    }

    pub fn picture(&self) -> Picture {
        Picture::of(&self.content)
    }

    fn open(&self) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.path)
            .unwrap_or_else(|error| panic!("{} cannot be opened: {error}", self.path.display()))
    }

    fn put(&mut self, file: &File, at: usize, bytes: &[u8]) {
        file.write_all_at(bytes, at as u64).unwrap();
        self.content[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        let file = self.open();
        self.put(&file, at, bytes);
    }

    /// Gives a range back to the file system: zeros again.
    pub fn trim(&mut self, at: usize, length: usize) {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(self.open(), punch, at as u64, length as u64).unwrap();
        self.content[at..at + length].fill(0);
    }

    pub fn resize(&mut self, size: u64) {
        self.open().set_len(size).unwrap();
        self.content.resize(size as usize, 0);
    }

    /// A day's work: up to `most` random blocks of 4 KiB get noise, prose, zeros, a hole, or
    /// what once stood in their chunk.
    pub fn work(&mut self, most: u64, random: &mut Random) {
        let file = self.open();
        for _ in 0..1 + random.below(most) {
            let blocks = (self.content.len() / BLOCK) as u64;
            let at = random.below(blocks) as usize * BLOCK;
            let chunk = at / CHUNK * CHUNK;
            let chunk_end = (chunk + CHUNK).min(self.content.len());
            if self.memories.len() < 64 && random.chance(40) {
                self.memories.push(self.content[chunk..chunk_end].to_vec());
            }
            match random.below(10) {
                0 => self.put(&file, at, &[0; BLOCK]),
                1 => self.trim(at, BLOCK),
                2 => {
                    let memory = random.pick(&self.memories).cloned().unwrap_or_default();
                    let length = memory.len().min(chunk_end - chunk);
                    self.put(&file, chunk, &memory[..length]);
                }
                3..=5 => {
                    let bytes = random.prose(BLOCK);
                    self.put(&file, at, &bytes);
                }
                _ => {
                    let bytes = random.noise(BLOCK);
                    self.put(&file, at, &bytes);
                }
            }
        }
    }

    /// The image leaves its place, as with a disk that was not mounted; `back` brings it back.
    pub fn away(&self) {
        std::fs::rename(&self.path, self.path.with_extension("away")).unwrap();
    }

    pub fn back(&self) {
        std::fs::rename(self.path.with_extension("away"), &self.path).unwrap();
    }
}
