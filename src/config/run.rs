//! `[run]`: how much of the machine a night may take.

use super::customer::check_path;
use super::problem::Problem;
use super::section::Section;
use crate::policy::parse_hours;
use jiff::civil::Time;
use std::path::PathBuf;

const MAX_VMS_AT_ONCE: i64 = 64;
/// Slower than this no night ends.
const MIN_BYTES_PER_SECOND: u64 = 64 << 10;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    pub vms_at_once: usize,
    /// The VMs of a night begin one after the other over its whole window.
    pub spread: bool,
    /// Outside of the hours below.
    pub limits: Limits,
    /// The first whose hours it is holds.
    pub at_hours: Vec<(Hours, Limits)>,
    pub io_priority: Option<IoPriority>,
    /// Written after each run, for the node exporter of Prometheus.
    pub metrics_file: Option<PathBuf>,
}

impl Default for Run {
    fn default() -> Self {
        Run {
            vms_at_once: 1,
            spread: false,
            limits: Limits::default(),
            at_hours: Vec::new(),
            io_priority: None,
            metrics_file: None,
        }
    }
}

/// Bytes a second; `None`: as fast as it goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// From the disks of VMs.
    pub read: Option<u64>,
    /// Into the store.
    pub upload: Option<u64>,
}

/// A part of each day in the policy's time zone; over midnight where it ends before it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hours {
    pub from: Time,
    pub to: Time,
}

impl Hours {
    pub fn contain(&self, time: Time) -> bool {
        match self.from < self.to {
            true => self.from <= time && time < self.to,
            false => self.from <= time || time < self.to,
        }
    }
}

/// Of reading disks, beside whatever else the machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoPriority {
    /// Behind everybody else of the same class.
    Low,
    /// Only when nobody else reads or writes.
    Idle,
}

impl IoPriority {
    pub fn as_str(self) -> &'static str {
        match self {
            IoPriority::Low => "low",
            IoPriority::Idle => "idle",
        }
    }
}

pub(super) fn read_run(mut section: Section<'_>, problems: &mut Vec<Problem>) -> Option<Run> {
    let found = problems.len();
    let mut run = Run::default();
    match section.integer("vms_at_once", problems) {
        None => {}
        Some(number @ 1..=MAX_VMS_AT_ONCE) => {
            run.vms_at_once = usize::try_from(number).unwrap_or(1);
        }
        Some(_) => {
            problems.push(section.problem("vms_at_once", format!("1 to {MAX_VMS_AT_ONCE}")));
        }
    }
    run.spread = section.boolean("spread", problems).unwrap_or(false);
    run.limits = read_limits(&mut section, problems);
    for mut part in section.tables("limit", problems) {
        let hours = part.required("hours", problems).unwrap_or("00:00-23:59");
        let limits = read_limits(&mut part, problems);
        match parse_hours(hours) {
            Some((from, to)) => run.at_hours.push((Hours { from, to }, limits)),
            None => problems.push(part.problem("hours", "local times, such as \"06:00-22:00\"")),
        }
        part.finish(&[], problems);
    }
    let priorities = [IoPriority::Low, IoPriority::Idle].map(|one| (one.as_str(), one));
    run.io_priority = section.one_of("io_priority", priorities, problems);
    run.metrics_file = section.text("metrics_file", problems).map(PathBuf::from);
    if let Some(file) = &run.metrics_file {
        check_path(&section, "metrics_file", file, problems);
        if file.extension().is_none_or(|extension| extension != "prom") {
            problems.push(section.problem(
                "metrics_file",
                "the node exporter reads only files whose names end in .prom",
            ));
        }
    }
    section.finish(
        &[
            ("window", "belongs in [policy]"),
            ("full_day", "belongs in [policy]"),
            ("threads", "belongs in [host]"),
        ],
        problems,
    );
    (problems.len() == found).then_some(run)
}

fn read_limits(section: &mut Section<'_>, problems: &mut Vec<Problem>) -> Limits {
    let mut limit = |key| {
        let limit = section.bytes(key, problems)?;
        if limit < MIN_BYTES_PER_SECOND {
            problems.push(section.problem(key, "at least \"64 KiB\" (a second)"));
        }
        Some(limit)
    };
    Limits {
        read: limit("read_limit"),
        upload: limit("upload_limit"),
    }
}
