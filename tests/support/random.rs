/// Numbers that follow from a seed (SplitMix64): a failure comes back with the same seed.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Prints the seed: the output of a failed test shows it.
    pub fn new(seed: u64) -> Self {
        println!("seed {seed:#x}");
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to `end`, without it.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// True `percent` times of a hundred.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// From 0 to 1.
    pub fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        match from.len() {
            0 => None,
            length => from.get(self.below(length as u64) as usize),
        }
    }

    /// Bytes that do not compress.
    pub fn noise(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        blake3::Hasher::new()
            .update(&self.next().to_le_bytes())
            .finalize_xof()
            .fill(&mut bytes);
        bytes
    }

    /// Bytes that compress like a log file.
    pub fn prose(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 64);
        while bytes.len() < length {
            let line = format!(
                "request {:>8} from host {:>3}: done\n",
                self.next() % 100_000_000,
                self.next() % 256
            );
            bytes.extend_from_slice(line.as_bytes());
        }
        bytes.truncate(length);
        bytes
    }
}
