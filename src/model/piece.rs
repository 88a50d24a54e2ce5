use super::{FAN_OUT, MAX_CHUNK_BYTES};

/// Highest node of a tree. 256^6 chunks of 64 KiB are far beyond any disk.
pub const MAX_HEIGHT: u8 = 6;

/// What a frame holds: a chunk of a disk, or a node of its hash tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PieceKind {
    Chunk,
    /// `height` 1 has chunks as children; at most [`MAX_HEIGHT`].
    Node {
        height: u8,
    },
}

impl PieceKind {
    /// The number that stands for the kind in frames and associated data.
    pub const fn code(self) -> u8 {
        match self {
            PieceKind::Chunk => 0,
            PieceKind::Node { height } => height,
        }
    }

    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(PieceKind::Chunk),
            1..=MAX_HEIGHT => Some(PieceKind::Node { height: code }),
            _ => None,
        }
    }

    /// Most plain bytes a piece of this kind can have; checked before anything is allocated.
    pub const fn max_plain_bytes(self) -> usize {
        match self {
            PieceKind::Chunk => MAX_CHUNK_BYTES as usize,
            PieceKind::Node { .. } => FAN_OUT * 32,
        }
    }
}

/// The shape of a disk's hash tree: follows from size and chunk size alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TreeShape {
    pub size_bytes: u64,
    pub chunk_bytes: u32,
}

impl TreeShape {
    pub const fn chunk_count(&self) -> u64 {
        self.size_bytes.div_ceil(self.chunk_bytes as u64)
    }

    /// Height of the root: the smallest h ≥ 1 with `chunk_count` ≤ 256^h.
    pub const fn height(&self) -> u8 {
        let mut height = 1;
        let mut reach = FAN_OUT as u64;
        while reach < self.chunk_count() && height < MAX_HEIGHT {
            height += 1;
            reach = reach.saturating_mul(FAN_OUT as u64);
        }
        height
    }

    /// How many nodes stand at `height` (1: the lowest).
    pub const fn nodes_at(&self, height: u8) -> u64 {
        let mut count = self.chunk_count();
        let mut step = 0;
        while step < height {
            count = count.div_ceil(FAN_OUT as u64);
            step += 1;
        }
        count
    }

    /// How many children the `index`-th node at `height` has.
    pub const fn children_of(&self, height: u8, index: u64) -> usize {
        let below = if height <= 1 {
            self.chunk_count()
        } else {
            self.nodes_at(height - 1)
        };
        let first = index.saturating_mul(FAN_OUT as u64);
        let left = below.saturating_sub(first);
        if left < FAN_OUT as u64 {
            left as usize
        } else {
            FAN_OUT
        }
    }

    /// Plain bytes of the `index`-th chunk: the last one is not padded.
    pub const fn chunk_length(&self, index: u64) -> usize {
        let start = index.saturating_mul(self.chunk_bytes as u64);
        let left = self.size_bytes.saturating_sub(start);
        if left < self.chunk_bytes as u64 {
            left as usize
        } else {
            self.chunk_bytes as usize
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shape_follows_from_size_and_chunk_size() {
        let chunk = 64 * 1024;
        let shape = |chunks: u64, extra: u64| TreeShape {
            size_bytes: chunks * u64::from(chunk) + extra,
            chunk_bytes: chunk,
        };
        assert_eq!(shape(0, 1).height(), 1);
        assert_eq!(shape(256, 0).height(), 1);
        assert_eq!(shape(256, 1).height(), 2);
        assert_eq!(shape(65536, 0).height(), 2);
        assert_eq!(shape(65536, 1).height(), 3);
        assert_eq!(shape(257, 0).nodes_at(1), 2);
        assert_eq!(shape(257, 0).children_of(1, 1), 1);
        assert_eq!(shape(257, 0).children_of(2, 0), 2);
        assert_eq!(shape(1, 5).chunk_length(1), 5);
        assert_eq!(shape(1, 5).chunk_length(0), 65536);
    }
}
