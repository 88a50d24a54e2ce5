use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// The first SIGINT or SIGTERM raises the flag, and the jobs end cleanly; a second one ends the
/// process at once, like a crash: the next run cleans up, but for a restore's hidden partial file.
pub fn stop_flag() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        flag::register_conditional_shutdown(
            signal,
            i32::from(super::exit::Exit::Interrupted.code()),
            Arc::clone(&stop),
        )?;
        flag::register(signal, Arc::clone(&stop))?;
    }
    Ok(stop)
}
