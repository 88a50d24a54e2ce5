//! vmkeep: the backup agent and retention enforcer for VM hosts.

pub mod cli;
pub mod codec;
pub mod config;
pub mod format;
pub mod hypervisor;
pub mod jobs;
pub mod model;
pub mod policy;
pub mod repository;
pub mod storage;
