//! (being written)

pub mod age;
pub mod identity;
pub mod minisign;
