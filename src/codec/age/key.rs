use std::fmt;
use std::str::FromStr;

use bech32::primitives::decode::CheckedHrpstring;
use bech32::primitives::iter::{ByteIterExt, Fe32IterExt};
use bech32::{Bech32, Hrp};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{Zeroize, Zeroizing};

use super::AgeError;

const RECIPIENT_HRP: Hrp = Hrp::parse_unchecked("age");
const SECRET_HRP: Hrp = Hrp::parse_unchecked("age-secret-key-");
/// `age1` or `AGE-SECRET-KEY-1`, then 52 digits for 32 bytes and 6 of checksum.
const RECIPIENT_TEXT_BYTES: usize = 62;
const SECRET_TEXT_BYTES: usize = 74;
/// An identity file is a few lines; more is another file.
const MAX_IDENTITY_FILE_BYTES: usize = 64 * 1024;

/// A text that is not a key. Never repeats the text: it may be a secret in the wrong place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyTextError {
    /// Not `age1…` with a right checksum.
    NotARecipient,
    /// A recipient that would let everybody read, or nobody.
    UnusableRecipient,
    /// Not `AGE-SECRET-KEY-1…` with a right checksum; the line is counted from 1.
    NotAnIdentity {
        line: usize,
    },
    NoIdentity,
    /// Which of them is meant is not guessed.
    SeveralIdentities,
    TooLong,
}

impl fmt::Display for KeyTextError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KeyTextError::NotARecipient => {
                f.write_str("not an age recipient: age1 and 58 lower-case characters expected")
            }
            KeyTextError::UnusableRecipient => {
                f.write_str("an age recipient that no identity can have")
            }
            KeyTextError::NotAnIdentity { line } => write!(
                f,
                "line {line} is neither a # comment nor an age identity (AGE-SECRET-KEY-1 and 58 upper-case characters)"
            ),
            KeyTextError::NoIdentity => {
                f.write_str("no age identity: a line with AGE-SECRET-KEY-1… expected")
            }
            KeyTextError::SeveralIdentities => {
                f.write_str("more than one age identity where exactly one is expected")
            }
            KeyTextError::TooLong => f.write_str("too long for an identity file"),
        }
    }
}

impl std::error::Error for KeyTextError {}

/// The public half of an identity: whom a key file is sealed for. Ordered by its bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AgeRecipient([u8; 32]);

impl AgeRecipient {
    /// Refuses points of low order, for which the "shared secret" is known to everybody, and
    /// spellings of a point that its owner would not use and could therefore not open.
    pub fn from_bytes(bytes: [u8; 32]) -> Result<Self, KeyTextError> {
        // Clamped secrets are multiples of 8, so any of them takes a low-order point to zero.
        let probe = StaticSecret::from([1; 32]).diffie_hellman(&PublicKey::from(bytes));
        if is_reduced(&bytes) && probe.was_contributory() {
            Ok(AgeRecipient(bytes))
        } else {
            Err(KeyTextError::UnusableRecipient)
        }
    }

    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Below 2^255 - 19, so that there is one spelling of each point.
fn is_reduced(bytes: &[u8; 32]) -> bool {
    let [lowest, middle @ .., highest] = bytes;
    match highest {
        0x80.. => false,
        0x7f => *lowest < 0xed || middle.iter().any(|byte| *byte != 0xff),
        _ => true,
    }
}

impl fmt::Display for AgeRecipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&bech32_text(RECIPIENT_HRP, &self.0))
    }
}

impl fmt::Debug for AgeRecipient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for AgeRecipient {
    type Err = KeyTextError;

    fn from_str(text: &str) -> Result<Self, KeyTextError> {
        let bytes = bech32_bytes(RECIPIENT_HRP, RECIPIENT_TEXT_BYTES, text)
            .ok_or(KeyTextError::NotARecipient)?;
        // One spelling: no upper case, no stray bits after the last byte.
        if *bech32_text(RECIPIENT_HRP, &bytes) != *text {
            return Err(KeyTextError::NotARecipient);
        }
        AgeRecipient::from_bytes(*bytes)
    }
}

/// An X25519 secret. Wiped when dropped; without `Debug`, `Display` and `Clone`.
pub struct AgeIdentity {
    secret: StaticSecret,
    recipient: AgeRecipient,
}

impl AgeIdentity {
    pub fn generate() -> Result<Self, AgeError> {
        let bytes = Zeroizing::new(crate::codec::random_bytes());
        Ok(Self::from_secret_bytes(&bytes))
    }

    fn from_secret_bytes(bytes: &[u8; 32]) -> Self {
        let secret = StaticSecret::from(*bytes);
        // A product of the base point: never of low order, always reduced.
        let recipient = AgeRecipient(PublicKey::from(&secret).to_bytes());
        AgeIdentity { secret, recipient }
    }

    /// Reads what `age-keygen` writes: `#` comments, empty lines, and exactly one identity.
    pub fn from_file_text(text: &str) -> Result<Self, KeyTextError> {
        if text.len() > MAX_IDENTITY_FILE_BYTES {
            return Err(KeyTextError::TooLong);
        }
        let mut found = None;
        for (index, line) in text.lines().enumerate() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let identity = Self::from_secret_text(line)
                .ok_or(KeyTextError::NotAnIdentity { line: index + 1 })?;
            if found.replace(identity).is_some() {
                return Err(KeyTextError::SeveralIdentities);
            }
        }
        found.ok_or(KeyTextError::NoIdentity)
    }

    fn from_secret_text(text: &str) -> Option<Self> {
        let bytes = bech32_bytes(SECRET_HRP, SECRET_TEXT_BYTES, text)?;
        let identity = Self::from_secret_bytes(&bytes);
        // One spelling, upper case, as the public tools demand.
        (*identity.secret_text() == *text).then_some(identity)
    }

    /// `AGE-SECRET-KEY-1…`
    pub fn secret_text(&self) -> Zeroizing<String> {
        let mut text = bech32_text(SECRET_HRP, self.secret.as_bytes());
        text.make_ascii_uppercase();
        text
    }

    /// An identity file: every line of the comments after a `#`, the recipient as `age-keygen`
    /// states it, the secret.
    pub fn to_file_text(&self, comments: &[&str]) -> Zeroizing<String> {
        let mut lines: Vec<String> = comments
            .iter()
            .flat_map(|comment| comment.lines())
            .map(|line| line.replace(char::is_control, " "))
            .collect();
        lines.push(format!("public key: {}", self.recipient));
        // Sized beforehand: growing would leave copies of the secret behind.
        let length: usize = lines.iter().map(|line| line.len() + 3).sum();
        let mut text = Zeroizing::new(String::with_capacity(length + SECRET_TEXT_BYTES + 1));
        for line in lines {
            text.push('#');
            if !line.is_empty() {
                text.push(' ');
            }
            text.push_str(&line);
            text.push('\n');
        }
        text.push_str(&self.secret_text());
        text.push('\n');
        text
    }

    pub fn recipient(&self) -> AgeRecipient {
        self.recipient
    }

    pub(super) fn secret(&self) -> &StaticSecret {
        &self.secret
    }

    /// The 32 bytes as they stand in the identity file (not clamped).
    pub(in crate::codec) fn secret_bytes(&self) -> &[u8; 32] {
        self.secret.as_bytes()
    }
}

fn bech32_text(hrp: Hrp, bytes: &[u8; 32]) -> Zeroizing<String> {
    let mut text = Zeroizing::new(String::with_capacity(SECRET_TEXT_BYTES));
    text.extend(
        bytes
            .iter()
            .copied()
            .bytes_to_fes()
            .with_checksum::<Bech32>(&hrp)
            .chars(),
    );
    text
}

/// Checks length, HRP and checksum; whether it is the only spelling is for the caller.
fn bech32_bytes(hrp: Hrp, text_bytes: usize, text: &str) -> Option<Zeroizing<[u8; 32]>> {
    if text.len() != text_bytes {
        return None;
    }
    let checked = CheckedHrpstring::new::<Bech32>(text).ok()?;
    let mut decoded = checked.byte_iter();
    if checked.hrp() != hrp {
        return None;
    }
    let mut bytes = Zeroizing::new([0; 32]);
    for byte in bytes.iter_mut() {
        *byte = decoded.next()?;
    }
    match decoded.next() {
        None => Some(bytes),
        Some(mut extra) => {
            extra.zeroize();
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The example of the specification.
    const SECRET: &str =
        "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX";
    const RECIPIENT: &str = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj";

    #[test]
    fn the_example_of_the_specification_is_read_and_written() {
        let identity = AgeIdentity::from_file_text(SECRET).ok().unwrap();
        assert_eq!(identity.recipient().to_string(), RECIPIENT);
        assert_eq!(format!("{:?}", identity.recipient()), RECIPIENT);
        assert_eq!(*identity.secret_text(), SECRET);
        assert_eq!(RECIPIENT.parse(), Ok(identity.recipient()));
    }

    #[test]
    fn an_identity_file_survives_being_written_and_read() {
        let identity = AgeIdentity::generate().ok().unwrap();
        let text = identity.to_file_text(&["created: today", "two\nlines\r\nand\rmore", ""]);
        let again = AgeIdentity::from_file_text(&text).ok().unwrap();
        assert_eq!(again.recipient(), identity.recipient());
        assert_eq!(again.secret_bytes(), identity.secret_bytes());
        assert!(
            text.starts_with("# created: today\n# two\n# lines\n# and more\n# public key: age1")
        );
    }

    #[test]
    fn two_generated_identities_differ() {
        let [one, two] = [(); 2].map(|()| AgeIdentity::generate().ok().unwrap().recipient());
        assert_ne!(one, two);
    }

    #[test]
    fn an_identity_file_needs_exactly_one_identity() {
        let error = |text: &str| AgeIdentity::from_file_text(text).err();
        assert_eq!(error(""), Some(KeyTextError::NoIdentity));
        assert_eq!(
            error("# only a comment\n\n"),
            Some(KeyTextError::NoIdentity)
        );
        assert_eq!(
            error(&format!("{SECRET}\n{SECRET}\n")),
            Some(KeyTextError::SeveralIdentities)
        );
        assert_eq!(
            error(&format!("# a comment\n{RECIPIENT}\n")),
            Some(KeyTextError::NotAnIdentity { line: 2 })
        );
        assert_eq!(
            error(&"#\n".repeat(MAX_IDENTITY_FILE_BYTES)),
            Some(KeyTextError::TooLong)
        );
        assert_eq!(error(&format!("# windows\r\n\r\n{SECRET}\r\n")), None);
    }

    #[test]
    fn an_error_never_repeats_the_secret() {
        let broken = SECRET.replace("EGAEX", "EGAEZ");
        let error = AgeIdentity::from_file_text(&broken).err().unwrap();
        assert!(!error.to_string().contains("GFPYY"), "{error}");
        assert!(!format!("{error:?}").contains("GFPYY"), "{error:?}");
    }

    #[test]
    fn a_key_has_one_spelling() {
        for text in [
            SECRET.to_lowercase(),
            format!("{SECRET} "),
            format!(" {SECRET}"),
            SECRET.replacen("GFPYY", "gfpyy", 1),
        ] {
            assert_eq!(
                AgeIdentity::from_file_text(&text).err(),
                Some(KeyTextError::NotAnIdentity { line: 1 }),
                "{text:?}"
            );
        }
        for text in [
            RECIPIENT.to_uppercase(),
            format!("{RECIPIENT}\n"),
            String::new(),
            "age1".to_string(),
            SECRET.to_string(),
        ] {
            assert_eq!(
                text.parse::<AgeRecipient>(),
                Err(KeyTextError::NotARecipient),
                "{text:?}"
            );
        }
    }

    #[test]
    fn a_key_with_stray_bits_after_its_last_byte_is_refused() {
        let stray = |hrp: Hrp, bytes: &[u8; 32]| -> String {
            let mut digits: Vec<bech32::Fe32> = bytes.iter().copied().bytes_to_fes().collect();
            let last = digits.pop().unwrap().to_u8() | 1;
            digits.push(bech32::Fe32::try_from(last).unwrap());
            digits
                .into_iter()
                .with_checksum::<Bech32>(&hrp)
                .chars()
                .collect()
        };
        let identity = AgeIdentity::from_file_text(SECRET).ok().unwrap();
        let recipient = stray(RECIPIENT_HRP, identity.recipient().as_bytes());
        assert!(CheckedHrpstring::new::<Bech32>(&recipient).is_ok());
        assert_eq!(
            recipient.parse::<AgeRecipient>(),
            Err(KeyTextError::NotARecipient)
        );
        let secret = stray(SECRET_HRP, identity.secret_bytes()).to_uppercase();
        assert!(AgeIdentity::from_file_text(&secret).is_err());
    }

    #[test]
    fn every_changed_character_of_a_key_is_noticed() {
        for (text, from) in [(RECIPIENT, 0), (SECRET, 0)] {
            for place in from..text.len() {
                for replacement in ["q", "Q", "p", "P", "1", "b", " "] {
                    let mut changed = text.to_string();
                    changed.replace_range(place..=place, replacement);
                    if changed != text {
                        assert!(changed.parse::<AgeRecipient>().is_err(), "{changed}");
                        assert!(AgeIdentity::from_file_text(&changed).is_err(), "{changed}");
                    }
                }
            }
        }
    }

    #[test]
    fn recipients_that_everybody_or_nobody_can_open_are_refused() {
        let mut unusable = vec![[0; 32]];
        let mut one = [0; 32];
        one[0] = 1;
        unusable.push(one);
        // p - 1 (low order), p and p + 1 (zero and one again), 2^255 - 1, and a point with the
        // ignored top bit set.
        for lowest in [0xec, 0xed, 0xee, 0xff] {
            let mut bytes = [0xff; 32];
            bytes[0] = lowest;
            bytes[31] = 0x7f;
            unusable.push(bytes);
        }
        let mut top_bit = *RECIPIENT.parse::<AgeRecipient>().unwrap().as_bytes();
        top_bit[31] |= 0x80;
        unusable.push(top_bit);
        for bytes in unusable {
            assert_eq!(
                AgeRecipient::from_bytes(bytes),
                Err(KeyTextError::UnusableRecipient),
                "{bytes:02x?}"
            );
            assert_eq!(
                bech32_text(RECIPIENT_HRP, &bytes).parse::<AgeRecipient>(),
                Err(KeyTextError::UnusableRecipient)
            );
        }
    }
}
