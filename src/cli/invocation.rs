use super::args::General;
use super::clock::SystemClock;
use super::exit::Failure;
use super::terminal::Terminal;
use crate::config::{self, Config};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// What a command has at hand besides its own arguments.
pub struct Invocation {
    pub general: General,
    pub terminal: Terminal,
    pub clock: Arc<SystemClock>,
    /// Raised by SIGINT and SIGTERM: end cleanly, soon.
    pub stop: Arc<AtomicBool>,
}

impl Invocation {
    pub fn config(&self) -> Result<Config, Failure> {
        Ok(config::load(&self.general.config)?)
    }
}
