//! Bytes that follow from a seed, for one thread of a test: a run can be repeated exactly.

use std::cell::RefCell;

thread_local! {
    static STREAM: RefCell<Option<blake3::OutputReader>> = const { RefCell::new(None) };
}

/// As long as this lives, its thread draws from the seed.
pub struct Seeded(());

impl Seeded {
    pub fn with(seed: u64, process: u64) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes());
        hasher.update(&process.to_le_bytes());
        STREAM.with_borrow_mut(|stream| *stream = Some(hasher.finalize_xof()));
        Seeded(())
    }
}

impl Drop for Seeded {
    fn drop(&mut self) {
        STREAM.with_borrow_mut(|stream| *stream = None);
    }
}

/// Whether this thread draws from a seed.
pub fn is_on() -> bool {
    STREAM.with_borrow(Option::is_some)
}

pub(super) fn fill(bytes: &mut [u8]) -> bool {
    STREAM.with_borrow_mut(|stream| match stream {
        Some(stream) => {
            stream.fill(bytes);
            true
        }
        None => false,
    })
}
