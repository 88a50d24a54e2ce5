//! (specification to come)

pub mod certificate;
pub mod entry;
pub mod names;
pub mod pack;
pub mod repository_file;
pub mod segment;
mod text;
pub mod wire;

pub use wire::FormatError;
