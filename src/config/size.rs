/// Reads "64 MiB", "1GiB", "65536 B" or "65536". Decimal units are refused: "16 MB" is
/// meant as 16 MiB as often as not.
pub(super) fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let unit_at = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let unit_bytes: u64 = match unit.trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        other => {
            return Err(match other.to_ascii_lowercase().as_str() {
                "k" | "kb" | "kib" => format!("{text:?} is not a size; write \"{number} KiB\""),
                "m" | "mb" | "mib" => format!("{text:?} is not a size; write \"{number} MiB\""),
                "g" | "gb" | "gib" => format!("{text:?} is not a size; write \"{number} GiB\""),
                "t" | "tb" | "tib" => format!("{text:?} is not a size; write \"{number} TiB\""),
                _ => format!("{text:?} is not a size such as \"64 MiB\""),
            });
        }
    };
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(unit_bytes))
        .ok_or_else(|| format!("{text:?} is not a size such as \"64 MiB\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_binary_units() {
        for (text, bytes) in [
            ("64 MiB", 64 << 20),
            ("1GiB", 1 << 30),
            (" 65536 ", 65536),
            ("512 B", 512),
            ("2 TiB", 2 << 40),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused_with_a_proposal() {
        assert_eq!(
            parse_bytes("16 MB"),
            Err("\"16 MB\" is not a size; write \"16 MiB\"".into())
        );
        for text in [
            "",
            "MiB",
            "-1",
            "1.5 GiB",
            "99999999999 TiB",
            "ten",
            "1 EiB",
        ] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
