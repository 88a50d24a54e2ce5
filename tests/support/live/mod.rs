//! Real guests in real QEMU: a Linux that writes numbered records to its disks without pause, so
//! that an image of them shows which instant it was taken at. `scripts/guest` makes the guest.

mod agent_proxy;
mod check;
mod console;
mod guest_files;
mod image;
mod monitor;
mod nbd_proxy;
mod proxmox;
mod proxy;
mod qemu;
mod scene;
mod shim;
mod spawn;
mod vm;
mod wait;

pub use agent_proxy::{AgentProxy, Fate};
pub use check::{Checked, assert_one_instant, check_image, one_instant, record};
pub use console::{Console, Latency};
pub use guest_files::GuestFiles;
pub use image::{Format, Image};
pub use monitor::{Qmp, ask_agent};
pub use nbd_proxy::NbdProxy;
pub use proxmox::{Drives, EFI_DISK_BYTES, order_in_guest, proxmox_disks, proxmox_flash};
pub use proxy::{Hook, Proxy};
pub use qemu::{DiskSpec, VmOptions};
pub use scene::{DISK, Night, Scene, SceneOptions, add_monitor, until};
pub use shim::{BitmapMode, Shim};
pub use spawn::{command_that_dies_with_us, spawn};
pub use vm::Vm;
pub use wait::{LIMIT, READY_LIMIT, wait_until};
