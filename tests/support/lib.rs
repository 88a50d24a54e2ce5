//! What the tests of the whole program share: a host with its configuration and a faked clock,
//! guests that write to their disks, real ones in QEMU (`live`) and below libvirtd, and a scanner of the store that
//! knows nothing of `repository`.

#![allow(
    clippy::new_without_default,
    clippy::should_implement_trait,
    reason = "for these tests only"
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

use std::path::{Path, PathBuf};

/// The folder of the project.
pub fn project() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).expect("it is tests/support")
}

/// The program under test, which cargo builds before any test of it, into the folder above the test's own.
pub fn program() -> PathBuf {
    let test = std::env::current_exe().expect("a running test");
    let built = test.ancestors().nth(2).expect("it is in deps");
    built.join("vmkeep")
}
