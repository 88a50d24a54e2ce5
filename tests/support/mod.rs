//! What the tests of the whole program share: a host with its configuration and a faked clock,
//! guests that write to their disks, real ones in QEMU (`live`) and below libvirtd, and a scanner of the store that
//! knows nothing of `repository`.

#![allow(
    dead_code,
    unused_imports,
    reason = "each test crate uses its own part of this module"
)]

mod books;
mod guest;
mod host;
pub mod libvirt;
pub mod live;
mod random;
pub mod s3;
mod scanner;
mod sinks;

pub use books::{Books, Known, id_of};
pub use guest::{Guest, Picture};
pub use host::{Customer, Host, HostOptions, Ran, Running, files_below, path_text, time, tool};
pub use random::Random;
pub use scanner::{Fragments, Scan, Scanner, WalkedDisk, WalkedPoint};
pub use sinks::{Certificate, HttpSink, Mail, MailOptions, MailSink, Request};
