//! Floor 0: the nouns. No I/O, no clock, no serde; nothing here can fail except parsing a name.

mod bucket;
mod clock;
mod extent;
mod id;
mod name;
mod piece;
mod point;
mod receiver;
mod writers;

pub use bucket::{BucketFacts, LifecycleRule, LockMode, Versioning};
pub use clock::{BootMark, Clock, ClockReading};
pub use extent::Extent;
pub use id::{
    CustomerUid, EntryHash, HexError, HostId, Id, InstallationId, ObjectHash, PackName, PointId,
    RepositoryId, SegmentName, SessionId, Tag,
};
pub use name::{CustomerName, DiskName, NameError, ObjectName, VmName};
pub use piece::{MAX_HEIGHT, PieceKind, TreeShape};
pub use point::{PointKind, PointState};
pub use receiver::{ReceiverUrl, is_loopback};
pub use writers::Writers;

/// Nodes of a disk's hash tree have at most this many children.
pub const FAN_OUT: usize = 256;
/// Default chunk size: the granularity of QEMU's dirty bitmaps.
pub const DEFAULT_CHUNK_BYTES: u32 = 64 * 1024;
pub const MIN_CHUNK_BYTES: u32 = 64 * 1024;
pub const MAX_CHUNK_BYTES: u32 = 1024 * 1024;
/// Largest disk: four node heights of 64 KiB chunks hold 256 TiB; this bound keeps the
/// in-memory row of lowest nodes under 200 MB.
pub const MAX_DISK_BYTES: u64 = 64 << 40;
