//! What Prometheus is told: the same numbers for the node exporter's text file and for `serve-metrics`.
//!
//! Names, units and types by <https://prometheus.io/docs/practices/naming/>; instants are seconds since the epoch.
//! Names and labels stay; new ones may be added.

use super::alarms::severity_word;
use super::exit::Failure;
use super::overview::Overview;
use crate::jobs::{AlarmKind, LastRun, Severity};
use crate::policy::NightState;
use jiff::Timestamp;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::AtomicU64;

type Labels = Vec<(&'static str, String)>;
type Value = Gauge<f64, AtomicU64>;

/// Numbers of one kind, by what they are of.
struct Numbers<'r> {
    registry: &'r mut Registry,
}

impl Numbers<'_> {
    fn family(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<Unit>,
        rows: impl IntoIterator<Item = (Labels, f64)>,
    ) {
        let family = Family::<Labels, Value>::default();
        for (labels, value) in rows {
            family.get_or_create(&labels).set(value);
        }
        match unit {
            Some(unit) => self.registry.register_with_unit(name, help, unit, family),
            None => self.registry.register(name, help, family),
        }
    }

    fn one(&mut self, name: &str, help: &str, unit: Option<Unit>, value: f64) {
        let number = Value::default();
        number.set(value);
        match unit {
            Some(unit) => self.registry.register_with_unit(name, help, unit, number),
            None => self.registry.register(name, help, number),
        }
    }
}

fn instant(at: Timestamp) -> f64 {
    at.as_second() as f64
}

/// What can be said when nothing could be opened.
pub fn text_of_failure(failure: &Failure) -> String {
    let mut registry = Registry::with_prefix("vmkeep");
    let mut numbers = Numbers {
        registry: &mut registry,
    };
    numbers.one("up", UP, None, 0.0);
    let help = "With which exit code a command would end";
    let code = f64::from(failure.exit.code());
    numbers.one("error_exit_code", help, None, code);
    written(&registry)
}

const UP: &str = "Whether the repository could be opened";

pub fn text(overview: &Overview, last_run: Option<&LastRun>) -> String {
    let mut registry = Registry::with_prefix("vmkeep");
    let mut numbers = Numbers {
        registry: &mut registry,
    };
    numbers.one("up", UP, None, 1.0);
    numbers.family(
        "build_info",
        "The version that says all this",
        None,
        [(
            vec![("version", env!("CARGO_PKG_VERSION").to_string())],
            1.0,
        )],
    );
    of_vms(&mut numbers, overview);
    of_alarms(&mut numbers, overview);
    if let Some(free) = overview.free_bytes() {
        let help = "What can still be written into the store";
        numbers.one("store_free", help, Some(Unit::Bytes), free as f64);
    }
    if let Some(run) = last_run {
        of_run(&mut numbers, run);
    }
    written(&registry)
}

fn written(registry: &Registry) -> String {
    let mut text = String::new();
    // A string takes everything.
    let _ = encode(&mut text, registry);
    text
}

fn of_vms(numbers: &mut Numbers<'_>, overview: &Overview) {
    let rows = |value: &dyn Fn(&crate::jobs::VmStatus) -> Option<f64>| -> Vec<(Labels, f64)> {
        let rows = overview.rows.iter();
        rows.filter_map(|row| {
            let labels = vec![
                ("customer", row.customer.to_string()),
                ("vm", row.status.vm.to_string()),
            ];
            Some((labels, value(&row.status)?))
        })
        .collect()
    };
    numbers.family(
        "vm_configured",
        "Whether the VM is in the configuration; otherwise only its points are left",
        None,
        rows(&|vm| Some(f64::from(u8::from(vm.configured)))),
    );
    numbers.family(
        "vm_last_point_timestamp",
        "When the newest restore point was taken",
        Some(Unit::Seconds),
        rows(&|vm| vm.last.map(|(at, _)| instant(at))),
    );
    numbers.family(
        "vm_next_expiry_timestamp",
        "When the next restore point expires",
        Some(Unit::Seconds),
        rows(&|vm| vm.next_expiry.map(instant)),
    );
    numbers.family(
        "vm_points",
        "Restore points that can be restored",
        None,
        rows(&|vm| Some(vm.points as f64)),
    );
    numbers.family(
        "vm_stored",
        "What the restore points of the VM added to the store",
        Some(Unit::Bytes),
        rows(&|vm| Some(vm.stored_bytes as f64)),
    );
    let states = [
        ("covered", NightState::Covered),
        ("suspect", NightState::Suspect),
        ("missing", NightState::Missing),
    ];
    let nights = overview.rows.iter().flat_map(|row| {
        states.iter().filter_map(|(word, state)| {
            let nights = row.nights()?.iter();
            let count = nights.filter(|night| night.state == *state).count();
            let labels = vec![
                ("customer", row.customer.to_string()),
                ("vm", row.status.vm.to_string()),
                ("state", (*word).to_string()),
            ];
            Some((labels, count as f64))
        })
    });
    numbers.family(
        "vm_nights",
        "Nights of the restore window by whether there is a restore point",
        None,
        nights.collect::<Vec<_>>(),
    );
}

fn of_alarms(numbers: &mut Numbers<'_>, overview: &Overview) {
    // Also those that do not sound, so that an alert on them does not depend on a metric that comes and goes.
    let counts = AlarmKind::ALL.map(|kind| {
        let of_kind = overview
            .concerns
            .iter()
            .filter(|one| one.alarm.kind == kind);
        let labels = vec![
            ("alarm", kind.word().to_string()),
            ("severity", severity_word(kind.severity()).to_string()),
        ];
        (labels, of_kind.count() as f64)
    });
    numbers.family(
        "alarms",
        "Alarms that sound, by what they are about",
        None,
        counts,
    );
    let broken = overview.concerns.iter();
    let broken = broken.filter(|one| one.alarm.kind.severity() > Severity::Warning);
    let help = "Promises that are broken, or may be";
    numbers.one("promises_broken", help, None, broken.count() as f64);
    let help = "Customers of the configuration that cannot be opened";
    let unreachable = overview.unreachable.len() as f64;
    numbers.one("customers_unreachable", help, None, unreachable);
}

fn of_run(numbers: &mut Numbers<'_>, run: &LastRun) {
    let seconds = Some(Unit::Seconds);
    numbers.one(
        "run_last_end_timestamp",
        "When the last run of this host ended",
        seconds.clone(),
        instant(run.ended_at),
    );
    if let Some(at) = run.succeeded_at {
        numbers.one(
            "run_last_success_timestamp",
            "When a run of this host last did all that was due",
            seconds.clone(),
            instant(at),
        );
    }
    let duration = run.ended_at.duration_since(run.began_at).as_secs();
    numbers.one(
        "run_last_duration",
        "How long the last run took",
        seconds,
        duration as f64,
    );
    numbers.one(
        "run_last_exit_code",
        "How the last run ended: 0 for well",
        None,
        f64::from(run.exit_code),
    );
    let outcomes = [("backed-up", run.backed_up), ("failed", run.failed)];
    numbers.family(
        "run_last_vms",
        "VMs of the last run by what became of them",
        None,
        outcomes.map(|(word, count)| (vec![("outcome", word.to_string())], count as f64)),
    );
    let help = "What the last run read of disks";
    numbers.one(
        "run_last_read",
        help,
        Some(Unit::Bytes),
        run.read_bytes as f64,
    );
    let help = "What the last run added to the store";
    numbers.one(
        "run_last_stored",
        help,
        Some(Unit::Bytes),
        run.stored_bytes as f64,
    );
}

/// Beside the file first: the node exporter never sees half of it.
pub fn write_file(file: &Path, text: &str) -> io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("/"));
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let temporary = folder.join(format!(".{name}.{}", std::process::id()));
    let written = (|| {
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(true);
        let mut out = options.open(&temporary)?;
        // The exporter is not root, and a service's UMask may be for its secrets.
        out.set_permissions(fs::Permissions::from_mode(0o644))?;
        out.write_all(text.as_bytes())?;
        fs::rename(&temporary, file)
    })();
    if written.is_err() {
        let _gone = fs::remove_file(&temporary);
    }
    written
}
