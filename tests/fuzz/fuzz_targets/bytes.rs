#![no_main]

use std::sync::LazyLock;
use vmkeep::fuzzing::FUZZ_TARGETS;

static RUN: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let wanted = std::env::var("VMKEEP_FUZZ_TARGET").unwrap_or_default();
    match FUZZ_TARGETS.iter().find(|target| target.name == wanted) {
        Some(target) => target.run,
        None => {
            let names: Vec<&str> = FUZZ_TARGETS.iter().map(|target| target.name).collect();
            eprintln!("VMKEEP_FUZZ_TARGET is to be one of: {}", names.join(" "));
            std::process::exit(2);
        }
    }
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| RUN(bytes));
