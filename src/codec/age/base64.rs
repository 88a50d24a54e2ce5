//! Standard base64 (RFC 4648, section 4), canonical only: what decodes is what would be encoded,
//! so nothing signed or sealed has a second spelling. For public bytes: not constant in time.

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::codec) enum Padding {
    /// age: none, and refused.
    None,
    /// minisign: `=` up to a multiple of four, and required.
    Equals,
}

pub(in crate::codec) fn encode(bytes: &[u8], padding: Padding) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let bits = group
            .iter()
            .chain(std::iter::repeat(&0))
            .take(3)
            .fold(0u32, |bits, byte| bits << 8 | u32::from(*byte));
        for place in 0..4 {
            if place <= group.len() {
                let value = bits >> (18 - 6 * place) & 63;
                text.push(char::from(ALPHABET[value as usize]));
            } else if padding == Padding::Equals {
                text.push('=');
            }
        }
    }
    text
}

/// `None` for anything that [`encode`] would not have written.
pub(in crate::codec) fn decode(text: &[u8], padding: Padding) -> Option<Vec<u8>> {
    let digits = match padding {
        Padding::None => text,
        Padding::Equals if !text.len().is_multiple_of(4) => return None,
        Padding::Equals => match text {
            [digits @ .., b'=', b'='] | [digits @ .., b'='] => digits,
            digits => digits,
        },
    };
    if padding == Padding::Equals && digits.len().next_multiple_of(4) != text.len() {
        return None;
    }
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3 + 2);
    for group in digits.chunks(4) {
        let bits = group
            .iter()
            .try_fold(0u32, |bits, digit| Some(bits << 6 | value(*digit)?))?
            << (6 * (4 - group.len()));
        let [_, first, second, third] = bits.to_be_bytes();
        // The bits beyond the last whole byte must be zero: canonical.
        match (group.len(), first, second, third) {
            (4, first, second, third) => bytes.extend([first, second, third]),
            (3, first, second, 0) => bytes.extend([first, second]),
            (2, first, 0, 0) => bytes.push(first),
            _ => return None,
        }
    }
    Some(bytes)
}

fn value(digit: u8) -> Option<u32> {
    let value = match digit {
        b'A'..=b'Z' => digit - b'A',
        b'a'..=b'z' => digit - b'a' + 26,
        b'0'..=b'9' => digit - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    };
    Some(u32::from(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vectors_of_rfc_4648_encode_and_decode() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            let bare = text.trim_end_matches('=');
            assert_eq!(encode(bytes.as_bytes(), Padding::Equals), text);
            assert_eq!(encode(bytes.as_bytes(), Padding::None), bare);
            assert_eq!(
                decode(text.as_bytes(), Padding::Equals).as_deref(),
                Some(bytes.as_bytes())
            );
            assert_eq!(
                decode(bare.as_bytes(), Padding::None).as_deref(),
                Some(bytes.as_bytes())
            );
            if bare != text {
                assert_eq!(decode(text.as_bytes(), Padding::None), None);
                assert_eq!(decode(bare.as_bytes(), Padding::Equals), None);
            }
        }
    }

    #[test]
    fn every_byte_value_survives() {
        let bytes: Vec<u8> = (0..=255).collect();
        for padding in [Padding::None, Padding::Equals] {
            let text = encode(&bytes, padding);
            assert_eq!(decode(text.as_bytes(), padding), Some(bytes.clone()));
        }
    }

    #[test]
    fn a_second_spelling_is_refused() {
        for text in ["Zh", "Zm9", "Z", "Zm9vY", "Zg==", "Zm 9", "Zm9v\n", "Zm-_"] {
            assert_eq!(decode(text.as_bytes(), Padding::None), None, "{text:?}");
        }
        for text in [
            "Zh==", "Zm9=", "Zg=", "Zg", "Zg===", "=", "====", "Zm9v====", "Zg==Zg==",
        ] {
            assert_eq!(decode(text.as_bytes(), Padding::Equals), None, "{text:?}");
        }
    }
}
