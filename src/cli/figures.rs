//! Sizes, durations and times as people read them.

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// "512 B", "1.5 GiB", "64 MiB": three digits and the largest unit that leaves at least one.
pub fn bytes(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut tenths = u128::from(bytes) * 10 / 1024;
    let mut unit = "KiB";
    for next in units.into_iter().skip(1) {
        if tenths < 10 * 1024 {
            break;
        }
        tenths /= 1024;
        unit = next;
    }
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{whole} {unit}"),
        (whole, tenth) if whole < 100 => format!("{whole}.{tenth} {unit}"),
        (whole, _) => format!("{whole} {unit}"),
    }
}

/// "45 s", "2 min 5 s", "3 h 20 min", "12 days 4 h".
pub fn seconds(seconds: u64) -> String {
    let two = |large: u64, large_unit: &str, small: u64, small_unit: &str| match small {
        0 => format!("{large} {large_unit}"),
        small => format!("{large} {large_unit} {small} {small_unit}"),
    };
    let days = seconds / 86400;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => two(seconds / 60, "min", seconds % 60, "s"),
        3600..86400 => two(seconds / 3600, "h", seconds % 3600 / 60, "min"),
        _ => {
            let unit = if days == 1 { "day" } else { "days" };
            two(days, unit, seconds % 86400 / 3600, "h")
        }
    }
}

/// "2026-11-07 03:12", in the zone given.
pub fn minute(time: Timestamp, zone: &TimeZone) -> String {
    time.to_zoned(zone.clone())
        .strftime("%Y-%m-%d %H:%M")
        .to_string()
}

/// "2026-11-07", in the zone given.
pub fn day(time: Timestamp, zone: &TimeZone) -> String {
    time.to_zoned(zone.clone()).strftime("%Y-%m-%d").to_string()
}

/// "2026-11-07 03:12:05 CET", in the zone given.
pub fn second(time: Timestamp, zone: &TimeZone) -> String {
    time.to_zoned(zone.clone())
        .strftime("%Y-%m-%d %H:%M:%S %Z")
        .to_string()
}

/// The same text with each instant in it, such as 2026-11-07T02:12:05Z, in the zone given.
pub fn local_times(text: &str, zone: &TimeZone) -> String {
    let words = text.split_inclusive(char::is_whitespace);
    let words = words.map(|word| {
        let bare = word.trim_matches(|c: char| !c.is_ascii_alphanumeric());
        match bare.parse::<Timestamp>() {
            Ok(time) => word.replace(bare, &minute(time, zone)),
            Err(_) => word.to_string(),
        }
    });
    words.collect()
}

/// "1 VM", "2 VMs".
pub fn count(number: usize, one: &str, many: &str) -> String {
    match number {
        1 => format!("1 {one}"),
        number => format!("{number} {many}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits_and_a_unit() {
        for (number, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (64 << 20, "64 MiB"),
            ((8 << 30) + (1 << 29), "8.5 GiB"),
            (1023 << 20, "1023 MiB"),
            (250 * 1024 + 512, "250 KiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(bytes(number), text);
        }
    }

    #[test]
    fn durations_have_two_units_at_most() {
        for (number, text) in [
            (0, "0 s"),
            (59, "59 s"),
            (125, "2 min 5 s"),
            (3600, "1 h"),
            (12000, "3 h 20 min"),
            (86400, "1 day"),
            (12 * 86400 + 4 * 3600 + 59, "12 days 4 h"),
        ] {
            assert_eq!(seconds(number), text);
        }
    }

    #[test]
    fn times_are_shown_in_the_zone_of_the_policy() {
        let zone = TimeZone::get("Europe/Amsterdam").expect("a bundled zone");
        let time: Timestamp = "2026-11-07T02:12:05Z".parse().expect("a time");
        assert_eq!(minute(time, &zone), "2026-11-07 03:12");
        assert_eq!(second(time, &zone), "2026-11-07 03:12:05 CET");
    }

    #[test]
    fn instants_within_a_text_are_shown_in_the_zone_of_the_policy_too() {
        let zone = TimeZone::get("Europe/Amsterdam").expect("a bundled zone");
        let text = "expired at 2026-11-07T02:12:05Z; waits (since 2026-11-08T23:30:00.5Z)\nweek 2026-W45, 2026-11-09";
        assert_eq!(
            local_times(text, &zone),
            "expired at 2026-11-07 03:12; waits (since 2026-11-09 00:30)\nweek 2026-W45, 2026-11-09"
        );
    }
}
