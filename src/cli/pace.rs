//! How fast a run may read disks and send to the store, which can depend on the time of day.

use super::clock::SystemClock;
use crate::config::{Limits, Run};
use crate::jobs::SpreadRate;
use jiff::tz::TimeZone;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How soon whoever waits notices that it is to stop.
const NOTICE: Duration = Duration::from_millis(200);

pub struct Pace {
    run: Run,
    zone: TimeZone,
    stop: Arc<AtomicBool>,
    read: Meter,
    upload: Meter,
    night: OnceLock<SpreadRate>,
}

impl Pace {
    pub fn new(run: &Run, zone: TimeZone, stop: Arc<AtomicBool>) -> Self {
        Pace {
            run: run.clone(),
            zone,
            stop,
            read: Meter::default(),
            upload: Meter::default(),
            night: OnceLock::new(),
        }
    }

    /// Whether anything sent to the store ever has to wait.
    pub fn limits_uploads(&self) -> bool {
        let hours = self.run.at_hours.iter().map(|(_, limits)| limits);
        [&self.run.limits]
            .into_iter()
            .chain(hours)
            .any(|limits| limits.upload.is_some())
    }

    pub fn may_read(&self, bytes: u64) {
        let rate = || match (self.limits().read, self.night_rate()) {
            (Some(limit), Some(night)) => Some(limit.min(night)),
            (limit, night) => limit.or(night),
        };
        self.read.wait(bytes, rate, &self.stop);
    }

    pub fn may_send(&self, bytes: u64) {
        let rate = || self.limits().upload;
        self.upload.wait(bytes, rate, &self.stop);
    }

    /// Of a night that is spread. Only the first counts.
    pub fn keep_to(&self, rate: SpreadRate) {
        let _first = self.night.set(rate);
    }

    fn night_rate(&self) -> Option<u64> {
        let night = self.night.get()?;
        (SystemClock::wall() < night.until).then_some(night.bytes_per_second)
    }

    /// What holds now.
    fn limits(&self) -> Limits {
        if self.run.at_hours.is_empty() {
            return self.run.limits;
        }
        let time = SystemClock::wall().to_zoned(self.zone.clone()).time();
        let mut hours = self.run.at_hours.iter();
        hours
            .find(|(hours, _)| hours.contain(time))
            .map_or(self.run.limits, |(_, limits)| *limits)
    }
}

/// When the next may go.
#[derive(Default)]
struct Meter {
    free_at: Mutex<Option<Instant>>,
}

impl Meter {
    fn wait(&self, bytes: u64, rate: impl Fn() -> Option<u64>, stop: &AtomicBool) {
        let Some(rate) = rate() else {
            return;
        };
        let starts_at = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let starts_at = free_at.map_or(now, |free_at| free_at.max(now));
            *free_at = starts_at.checked_add(taking(bytes, rate));
            starts_at
        };
        while !stop.load(Ordering::Relaxed) {
            let left = starts_at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(NOTICE));
        }
    }
}

/// How long so many bytes take.
fn taking(bytes: u64, per_second: u64) -> Duration {
    let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(per_second.max(1));
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_take_their_time() {
        assert_eq!(taking(1 << 20, 1 << 20), Duration::from_secs(1));
        assert_eq!(taking(256 << 10, 64 << 20), Duration::from_nanos(3_906_250));
        assert!(taking(u64::MAX, 0) > Duration::from_secs(1 << 30));
    }

    #[test]
    fn the_first_goes_at_once_and_the_next_after_what_it_took() {
        let meter = Meter::default();
        let stop = AtomicBool::new(false);
        let start = Instant::now();
        meter.wait(1 << 20, || Some(20 << 20), &stop);
        let first = start.elapsed();
        meter.wait(1 << 20, || Some(20 << 20), &stop);
        assert!(first < Duration::from_millis(50), "{first:?}");
        assert!(start.elapsed() >= Duration::from_millis(50));
    }

    #[test]
    fn whoever_is_to_stop_waits_no_more() {
        let meter = Meter::default();
        let stop = AtomicBool::new(true);
        meter.wait(1 << 40, || Some(1), &stop);
        let start = Instant::now();
        meter.wait(1, || Some(1), &stop);
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}
