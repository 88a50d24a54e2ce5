use std::fmt;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::hmac::{self, HMAC_SHA256};
use ring::rand::{SecureRandom, SystemRandom};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use super::base64::{self, Padding};
use super::key::{AgeIdentity, AgeRecipient};

const FORMAT: &[u8] = b"age-encryption.org/";
const VERSION_LINE: &[u8] = b"age-encryption.org/v1";
const X25519_INFO: &[u8] = b"age-encryption.org/v1/X25519";
const MAX_HEADER_BYTES: usize = 64 * 1024;
/// Columns of a stanza's body; a shorter line ends it.
const BODY_COLUMNS: usize = 64;
const FILE_KEY_BYTES: usize = 16;
const PAYLOAD_NONCE_BYTES: usize = 16;
const TAG_BYTES: usize = 16;
/// Chunk number 0, and the last one.
const ONLY_CHUNK: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const WRAP_NONCE: [u8; 12] = [0; 12];

/// One chunk of an age payload.
pub const MAX_PLAINTEXT_BYTES: usize = 64 * 1024;
/// Recipients when writing, stanzas of any type when reading.
pub const MAX_STANZAS: usize = 64;
/// No key file is longer: a reader need not fetch more than this and one byte.
pub const MAX_FILE_BYTES: usize =
    MAX_HEADER_BYTES + PAYLOAD_NONCE_BYTES + MAX_PLAINTEXT_BYTES + TAG_BYTES;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgeError {
    /// Not a binary age file at all.
    NotAge,
    /// An age file, but not as the format demands.
    Malformed(&'static str),
    /// Whole as far as can be said, but sealed for others.
    WrongKey,
    /// The key is right, the file was changed or cut.
    Corrupt,
    /// More than [`MAX_PLAINTEXT_BYTES`].
    TooLarge,
    /// Nobody could open it.
    NoRecipients,
    /// More than [`MAX_STANZAS`].
    TooManyRecipients,
    /// The operating system gives no random bytes.
    Random,
    /// The cryptographic library refused what it always accepts.
    Refused,
}

impl fmt::Display for AgeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AgeError::NotAge => f.write_str("not an age file (ASCII armour is not read)"),
            AgeError::Malformed(what) => write!(f, "malformed age file: {what}"),
            AgeError::WrongKey => f.write_str("the age file is sealed for other identities"),
            AgeError::Corrupt => f.write_str("the age file was changed or cut"),
            AgeError::TooLarge => write!(
                f,
                "more than {MAX_PLAINTEXT_BYTES} bytes of content for an age file"
            ),
            AgeError::NoRecipients => f.write_str("no recipient: nobody could open the age file"),
            AgeError::TooManyRecipients => {
                write!(f, "more than {MAX_STANZAS} recipients for an age file")
            }
            AgeError::Random => f.write_str("the operating system gives no random bytes"),
            AgeError::Refused => f.write_str("the cryptographic library refused a key"),
        }
    }
}

impl std::error::Error for AgeError {}

/// Seals the plaintext for all recipients: any one of them opens it.
pub fn encrypt(recipients: &[AgeRecipient], plaintext: &[u8]) -> Result<Vec<u8>, AgeError> {
    if recipients.is_empty() {
        return Err(AgeError::NoRecipients);
    }
    if recipients.len() > MAX_STANZAS {
        return Err(AgeError::TooManyRecipients);
    }
    if plaintext.len() > MAX_PLAINTEXT_BYTES {
        return Err(AgeError::TooLarge);
    }
    let random = SystemRandom::new();
    let file_key: Zeroizing<[u8; FILE_KEY_BYTES]> = random_bytes(&random)?;
    let mut header = Vec::with_capacity(256 + 128 * recipients.len());
    header.extend_from_slice(VERSION_LINE);
    header.push(b'\n');
    for recipient in recipients {
        let (share, body) = wrap(&random, recipient, &file_key)?;
        header.extend_from_slice(b"-> X25519 ");
        header.extend_from_slice(base64::encode(&share, Padding::None).as_bytes());
        header.push(b'\n');
        header.extend_from_slice(base64::encode(&body, Padding::None).as_bytes());
        header.push(b'\n');
    }
    header.extend_from_slice(b"---");
    let mac = hmac::sign(&header_key(&file_key), &header);
    header.push(b' ');
    header.extend_from_slice(base64::encode(mac.as_ref(), Padding::None).as_bytes());
    header.push(b'\n');

    let nonce: Zeroizing<[u8; PAYLOAD_NONCE_BYTES]> = random_bytes(&random)?;
    // Sized beforehand: growing would leave copies of the plaintext behind.
    let mut file = Vec::with_capacity(header.len() + nonce.len() + plaintext.len() + TAG_BYTES);
    file.extend_from_slice(&header);
    file.extend_from_slice(nonce.as_slice());
    let content_at = file.len();
    file.extend_from_slice(plaintext);
    let content = file.get_mut(content_at..).ok_or(AgeError::Refused)?;
    let tag = aead_key(&payload_key(&file_key, nonce.as_slice()))?
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(ONLY_CHUNK),
            Aad::empty(),
            content,
        )
        .map_err(|_| AgeError::Refused)?;
    file.extend_from_slice(tag.as_ref());
    Ok(file)
}

/// Opens a file that was sealed for `identity`, among others.
pub fn decrypt(identity: &AgeIdentity, file: &[u8]) -> Result<Zeroizing<Vec<u8>>, AgeError> {
    let header = Header::parse(file)?;
    if header.payload.len() > PAYLOAD_NONCE_BYTES + MAX_PLAINTEXT_BYTES + TAG_BYTES {
        return Err(AgeError::TooLarge);
    }
    let file_key = header.file_key(identity)?;
    hmac::verify(&header_key(&file_key), header.authenticated, &header.mac)
        .map_err(|_| AgeError::Corrupt)?;
    let (nonce, content) = header
        .payload
        .split_at_checked(PAYLOAD_NONCE_BYTES)
        .ok_or(AgeError::Corrupt)?;
    let mut content = Zeroizing::new(content.to_vec());
    let length = aead_key(&payload_key(&file_key, nonce))?
        .open_in_place(
            Nonce::assume_unique_for_key(ONLY_CHUNK),
            Aad::empty(),
            content.as_mut_slice(),
        )
        .map_err(|_| AgeError::Corrupt)?
        .len();
    content.truncate(length);
    Ok(content)
}

/// Wraps the file key for one recipient: the ephemeral share and the sealed key.
fn wrap(
    random: &SystemRandom,
    recipient: &AgeRecipient,
    file_key: &[u8; FILE_KEY_BYTES],
) -> Result<([u8; 32], Vec<u8>), AgeError> {
    let bytes: Zeroizing<[u8; 32]> = random_bytes(random)?;
    let ephemeral = StaticSecret::from(*bytes);
    let share = PublicKey::from(&ephemeral).to_bytes();
    let shared = ephemeral.diffie_hellman(&PublicKey::from(*recipient.as_bytes()));
    if !shared.was_contributory() {
        return Err(AgeError::Refused);
    }
    let key = wrap_key(shared.as_bytes(), &share, recipient);
    // Sized beforehand: growing would leave a copy of the file key behind.
    let mut body = Vec::with_capacity(FILE_KEY_BYTES + TAG_BYTES);
    body.extend_from_slice(file_key);
    aead_key(&key)?
        .seal_in_place_append_tag(
            Nonce::assume_unique_for_key(WRAP_NONCE),
            Aad::empty(),
            &mut body,
        )
        .map_err(|_| AgeError::Refused)?;
    Ok((share, body))
}

/// A stanza for an X25519 identity; stanzas of other types are not kept.
struct X25519Stanza {
    share: [u8; 32],
    body: [u8; FILE_KEY_BYTES + TAG_BYTES],
}

struct Header<'a> {
    stanzas: Vec<X25519Stanza>,
    /// From the start to `---`.
    authenticated: &'a [u8],
    mac: [u8; 32],
    payload: &'a [u8],
}

impl<'a> Header<'a> {
    fn parse(file: &'a [u8]) -> Result<Self, AgeError> {
        if !file.starts_with(FORMAT) {
            return Err(AgeError::NotAge);
        }
        let mut lines = Lines { file, at: 0 };
        if lines.next()? != VERSION_LINE {
            return Err(AgeError::Malformed("a version other than v1"));
        }
        let mut stanzas = Vec::new();
        let mut count = 0;
        let mut passphrase = false;
        loop {
            let line_at = lines.at;
            let line = lines.next()?;
            if let Some(arguments) = line.strip_prefix(b"-> ") {
                count += 1;
                if count > MAX_STANZAS {
                    return Err(AgeError::Malformed("too many stanzas"));
                }
                let kind = parse_stanza(arguments, &mut lines)?;
                match kind {
                    Stanza::X25519(stanza) => stanzas.push(stanza),
                    Stanza::Passphrase => passphrase = true,
                    Stanza::Other => {}
                }
            } else if let Some(mac) = line.strip_prefix(b"--- ") {
                if count == 0 {
                    return Err(AgeError::Malformed("no stanza"));
                }
                // Who knows the passphrase could otherwise pose as a holder of the keys.
                if passphrase && count > 1 {
                    return Err(AgeError::Malformed("a passphrase beside other stanzas"));
                }
                let mac = base64_array(mac).ok_or(AgeError::Malformed("the MAC"))?;
                let (authenticated, _) = file
                    .split_at_checked(line_at + b"---".len())
                    .ok_or(AgeError::Malformed("the MAC"))?;
                return Ok(Header {
                    stanzas,
                    authenticated,
                    mac,
                    payload: lines.rest(),
                });
            } else {
                return Err(AgeError::Malformed("neither a stanza nor the MAC"));
            }
        }
    }

    /// The file key, from the first stanza that this identity opens.
    fn file_key(
        &self,
        identity: &AgeIdentity,
    ) -> Result<Zeroizing<[u8; FILE_KEY_BYTES]>, AgeError> {
        for stanza in &self.stanzas {
            let shared = identity
                .secret()
                .diffie_hellman(&PublicKey::from(stanza.share));
            if !shared.was_contributory() {
                return Err(AgeError::Malformed("a share of low order"));
            }
            let key = wrap_key(shared.as_bytes(), &stanza.share, &identity.recipient());
            let mut body = Zeroizing::new(stanza.body);
            let opened = aead_key(&key)?.open_in_place(
                Nonce::assume_unique_for_key(WRAP_NONCE),
                Aad::empty(),
                body.as_mut_slice(),
            );
            if let Ok(opened) = opened {
                let mut file_key = Zeroizing::new([0; FILE_KEY_BYTES]);
                if opened.len() != file_key.len() {
                    return Err(AgeError::Malformed("the length of the file key"));
                }
                file_key.copy_from_slice(opened);
                return Ok(file_key);
            }
        }
        Err(AgeError::WrongKey)
    }
}

enum Stanza {
    X25519(X25519Stanza),
    Passphrase,
    Other,
}

fn parse_stanza(arguments: &[u8], lines: &mut Lines<'_>) -> Result<Stanza, AgeError> {
    let mut split = arguments.split(|byte| *byte == b' ');
    if !split
        .clone()
        .all(|argument| !argument.is_empty() && argument.iter().all(u8::is_ascii_graphic))
    {
        return Err(AgeError::Malformed("an argument of a stanza"));
    }
    let mut body = Vec::new();
    loop {
        let line = lines.next()?;
        if line.len() > BODY_COLUMNS {
            return Err(AgeError::Malformed("a long line in the body of a stanza"));
        }
        let decoded = base64::decode(line, Padding::None)
            .ok_or(AgeError::Malformed("the body of a stanza"))?;
        body.extend_from_slice(&decoded);
        if line.len() < BODY_COLUMNS {
            break;
        }
    }
    match split.next() {
        Some(b"X25519") => match (split.next(), split.next()) {
            (Some(share), None) => Ok(Stanza::X25519(X25519Stanza {
                share: base64_array(share).ok_or(AgeError::Malformed("an X25519 share"))?,
                body: body
                    .try_into()
                    .map_err(|_| AgeError::Malformed("the body of an X25519 stanza"))?,
            })),
            _ => Err(AgeError::Malformed("the arguments of an X25519 stanza")),
        },
        Some(b"scrypt") => Ok(Stanza::Passphrase),
        _ => Ok(Stanza::Other),
    }
}

/// The lines of a header, each of which must end, within the limit.
struct Lines<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Lines<'a> {
    fn rest(&self) -> &'a [u8] {
        self.file.get(self.at..).unwrap_or_default()
    }

    fn next(&mut self) -> Result<&'a [u8], AgeError> {
        let left = MAX_HEADER_BYTES.saturating_sub(self.at);
        let mut lines = self.rest().splitn(2, |byte| *byte == b'\n');
        match (lines.next(), lines.next()) {
            (Some(line), Some(_)) if line.len() < left => {
                self.at += line.len() + 1;
                Ok(line)
            }
            (Some(line), _) if line.len() >= left => {
                Err(AgeError::Malformed("the header is too long"))
            }
            _ => Err(AgeError::Malformed("the header is cut")),
        }
    }
}

fn base64_array<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    base64::decode(text, Padding::None)?.try_into().ok()
}

fn random_bytes<const N: usize>(random: &SystemRandom) -> Result<Zeroizing<[u8; N]>, AgeError> {
    let mut bytes = Zeroizing::new([0; N]);
    random
        .fill(bytes.as_mut_slice())
        .map_err(|_| AgeError::Random)?;
    Ok(bytes)
}

fn aead_key(key: &[u8; 32]) -> Result<LessSafeKey, AgeError> {
    UnboundKey::new(&CHACHA20_POLY1305, key)
        .map(LessSafeKey::new)
        .map_err(|_| AgeError::Refused)
}

fn wrap_key(shared: &[u8; 32], share: &[u8; 32], recipient: &AgeRecipient) -> Zeroizing<[u8; 32]> {
    let mut salt = [0; 64];
    for (byte, value) in salt
        .iter_mut()
        .zip(share.iter().chain(recipient.as_bytes()))
    {
        *byte = *value;
    }
    hkdf(shared, &salt, X25519_INFO)
}

fn header_key(file_key: &[u8; FILE_KEY_BYTES]) -> hmac::Key {
    hmac::Key::new(HMAC_SHA256, hkdf(file_key, &[], b"header").as_slice())
}

fn payload_key(file_key: &[u8; FILE_KEY_BYTES], nonce: &[u8]) -> Zeroizing<[u8; 32]> {
    hkdf(file_key, nonce, b"payload")
}

/// HKDF-SHA-256 (RFC 5869) of 32 bytes: one block of output, so two HMACs and no error.
fn hkdf(secret: &[u8], salt: &[u8], info: &[u8]) -> Zeroizing<[u8; 32]> {
    let extracted = hmac::sign(&hmac::Key::new(HMAC_SHA256, salt), secret);
    let mut expand = hmac::Context::with_key(&hmac::Key::new(HMAC_SHA256, extracted.as_ref()));
    expand.update(info);
    expand.update(&[1]);
    let mut key = Zeroizing::new([0; 32]);
    for (byte, value) in key.iter_mut().zip(expand.sign().as_ref()) {
        *byte = *value;
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> AgeIdentity {
        AgeIdentity::generate().ok().unwrap()
    }

    fn header_end(file: &[u8]) -> usize {
        let mac = file.windows(5).position(|five| five == b"\n--- ").unwrap() + 1;
        mac + file[mac..].iter().position(|byte| *byte == b'\n').unwrap() + 1
    }

    /// The file with its header replaced and sealed again by somebody who has the file key.
    fn with_header(
        identity: &AgeIdentity,
        file: &[u8],
        change: impl Fn(&str) -> String,
    ) -> Vec<u8> {
        let header = Header::parse(file).ok().unwrap();
        let file_key = header.file_key(identity).ok().unwrap();
        let text = std::str::from_utf8(header.authenticated).unwrap();
        let mut changed = change(text).into_bytes();
        let mac = hmac::sign(&header_key(&file_key), &changed);
        changed.extend_from_slice(b" ");
        changed.extend_from_slice(base64::encode(mac.as_ref(), Padding::None).as_bytes());
        changed.push(b'\n');
        changed.extend_from_slice(header.payload);
        changed
    }

    fn opened(identity: &AgeIdentity, file: &[u8]) -> Result<Vec<u8>, AgeError> {
        decrypt(identity, file).map(|plaintext| plaintext.to_vec())
    }

    #[test]
    fn hkdf_gives_the_first_block_of_rfc_5869_cases_1_and_3() {
        let info: Vec<u8> = (0xf0..=0xf9).collect();
        let salt: Vec<u8> = (0..=0x0c).collect();
        let hex = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
        assert_eq!(
            hex(hkdf(&[0x0b; 22], &salt, &info).as_slice()),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
        );
        assert_eq!(
            hex(hkdf(&[0x0b; 22], &[], &[]).as_slice()),
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
        );
    }

    #[test]
    fn a_fixed_file_of_the_public_tool_opens() {
        // age 1.1.1, for the identity in the example of the specification.
        let file = "YWdlLWVuY3J5cHRpb24ub3JnL3YxCi0+IFgyNTUxOSBlbGpreXhLVnJyWUMvY1VOT3RBempNWEQ0M0dOYkRs\
             TkVjeTFVWHo0cVhnCjBlOTFnKzN0di9aS2JlbjhISmN2YnhIL2pvVU9zUmh2YWJoaDROdC9NZHMKLS0tIDRJ\
             TEdqaFJLa0JTcjlja2owRldIMDdRNWorZFRsbWNvaXlscUpqZUZTV1EKJc7httMzFUPlhSzmwWMrWEt9w/yv\
             HP6OH/JWpGuzClorPKpoSXxa8iLNf8FA/4//P9cJbeZSJ7u2t4ZTSaY=";
        let identity = AgeIdentity::from_file_text(
            "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX",
        )
        .ok()
        .unwrap();
        let file = base64::decode(file.as_bytes(), Padding::Equals).unwrap();
        assert_eq!(
            opened(&identity, &file),
            Ok(b"sealed by the public age 1.1.1".to_vec())
        );
    }

    #[test]
    fn what_is_sealed_for_several_opens_for_each_and_for_nobody_else() {
        let identities = [identity(), identity(), identity()];
        let recipients: Vec<_> = identities.iter().map(AgeIdentity::recipient).collect();
        for length in [0, 1, 1000, MAX_PLAINTEXT_BYTES] {
            let plaintext = vec![7; length];
            let file = encrypt(&recipients, &plaintext).unwrap();
            assert!(file.len() <= MAX_FILE_BYTES);
            for identity in &identities {
                assert_eq!(opened(identity, &file), Ok(plaintext.clone()));
            }
            assert_eq!(opened(&identity(), &file), Err(AgeError::WrongKey));
        }
    }

    #[test]
    fn the_same_content_never_gives_the_same_file() {
        let recipient = identity().recipient();
        let [one, two] = [(); 2].map(|()| encrypt(&[recipient], b"same").unwrap());
        assert_ne!(one, two);
        assert_eq!(one.len(), two.len());
    }

    #[test]
    fn limits_hold_when_sealing() {
        let recipient = identity().recipient();
        assert_eq!(encrypt(&[], b"x"), Err(AgeError::NoRecipients));
        assert_eq!(
            encrypt(&[recipient; MAX_STANZAS + 1], b"x"),
            Err(AgeError::TooManyRecipients)
        );
        assert_eq!(
            encrypt(&[recipient], &vec![0; MAX_PLAINTEXT_BYTES + 1]),
            Err(AgeError::TooLarge)
        );
        assert!(encrypt(&[recipient; MAX_STANZAS], b"x").is_ok());
    }

    #[test]
    fn every_truncation_fails() {
        let [one, two] = [identity(), identity()];
        let file = encrypt(&[one.recipient(), two.recipient()], b"key").unwrap();
        for length in 0..file.len() {
            assert!(opened(&one, &file[..length]).is_err(), "{length} bytes");
            assert!(opened(&two, &file[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn every_flipped_bit_fails() {
        let [one, two] = [identity(), identity()];
        let file = encrypt(&[one.recipient(), two.recipient()], b"key").unwrap();
        for place in 0..file.len() {
            for bit in 0..8 {
                let mut flipped = file.clone();
                flipped[place] ^= 1 << bit;
                assert!(opened(&one, &flipped).is_err(), "byte {place}, bit {bit}");
                assert!(opened(&two, &flipped).is_err(), "byte {place}, bit {bit}");
            }
        }
    }

    #[test]
    fn every_inserted_removed_and_appended_byte_fails() {
        let identity = identity();
        let file = encrypt(&[identity.recipient()], b"key").unwrap();
        for place in 0..=file.len() {
            for byte in [b'\n', b' ', b'A', 0] {
                let mut changed = file.clone();
                changed.insert(place, byte);
                assert!(opened(&identity, &changed).is_err(), "{byte} at {place}");
            }
            if place < file.len() {
                let mut changed = file.clone();
                changed.remove(place);
                assert!(opened(&identity, &changed).is_err(), "without {place}");
            }
        }
    }

    #[test]
    fn a_flipped_payload_is_corrupt_and_not_a_wrong_key() {
        let identity = identity();
        let file = encrypt(&[identity.recipient()], b"key").unwrap();
        for place in header_end(&file)..file.len() {
            let mut flipped = file.clone();
            flipped[place] ^= 1;
            assert_eq!(opened(&identity, &flipped), Err(AgeError::Corrupt));
        }
        assert_eq!(
            opened(&identity, &file[..header_end(&file)]),
            Err(AgeError::Corrupt)
        );
    }

    #[test]
    fn a_payload_of_more_than_one_chunk_is_too_large() {
        let identity = identity();
        let mut file = encrypt(&[identity.recipient()], &[0; MAX_PLAINTEXT_BYTES]).unwrap();
        file.push(0);
        assert_eq!(opened(&identity, &file), Err(AgeError::TooLarge));
    }

    #[test]
    fn stanzas_of_other_types_are_skipped() {
        let identity = identity();
        let file = encrypt(&[identity.recipient()], b"key").unwrap();
        let long = "A".repeat(64);
        let added = with_header(&identity, &file, |header| {
            header.replacen(
                "-> X25519",
                &format!(
                    "-> example.com/hardware one two\n{long}\n{long}\nAAAA\n-> x25519\n\n-> X25519",
                ),
                1,
            )
        });
        assert_eq!(opened(&identity, &added), Ok(b"key".to_vec()));
    }

    #[test]
    fn a_header_against_the_format_is_refused_even_with_a_right_mac() {
        let identity = identity();
        let file = encrypt(&[identity.recipient()], b"key").unwrap();
        type Change = fn(&str) -> String;
        let changes: [(&str, Change); 12] = [
            ("another version", |h| h.replacen("/v1", "/v2", 1)),
            ("Windows line ends", |h| h.replace('\n', "\r\n")),
            ("padding", |h| h.replacen("\n---", "=\n---", 1)),
            ("a third argument", |h| {
                h.replacen("X25519 ", "X25519 x ", 1)
            }),
            ("two spaces", |h| h.replacen("X25519 ", "X25519  ", 1)),
            ("an empty line", |h| h.replacen("\n---", "\n\n---", 1)),
            ("an empty stanza", |h| {
                h.replacen("\n---", "\n-> \n\n---", 1)
            }),
            ("control characters", |h| {
                h.replacen("\n---", "\n-> a\tb\n\n---", 1)
            }),
            ("an X25519 stanza without a share", |h| {
                h.replacen("\n---", "\n-> X25519\n\n---", 1)
            }),
            ("a short body", |h| {
                let share = "A".repeat(43);
                h.replacen("\n---", &format!("\n-> X25519 {share}\nAAAA\n---"), 1)
            }),
            ("a passphrase beside", |h| {
                h.replacen("\n---", "\n-> scrypt AAAA 18\nAAAA\n---", 1)
            }),
            ("too many stanzas", |h| {
                h.replacen("\n---", &format!("{}\n---", "\n-> x\n".repeat(64)), 1)
            }),
        ];
        for (what, change) in changes {
            let changed = with_header(&identity, &file, change);
            assert!(
                matches!(opened(&identity, &changed), Err(AgeError::Malformed(_))),
                "{what}: {:?}",
                opened(&identity, &changed)
            );
        }
    }

    #[test]
    fn a_share_of_low_order_is_refused() {
        let identity = identity();
        let file = encrypt(&[identity.recipient()], b"key").unwrap();
        for lowest in [0, 1] {
            let mut share = [0; 32];
            share[0] = lowest;
            let stanza = format!(
                "-> X25519 {}\n{}\n-> X25519",
                base64::encode(&share, Padding::None),
                base64::encode(&[0; 32], Padding::None)
            );
            let changed = with_header(&identity, &file, |header| {
                header.replacen("-> X25519", &stanza, 1)
            });
            assert_eq!(
                opened(&identity, &changed),
                Err(AgeError::Malformed("a share of low order"))
            );
        }
    }

    #[test]
    fn a_header_without_stanzas_or_without_end_is_refused() {
        let identity = identity();
        let mac = base64::encode(&[0; 32], Padding::None);
        let none = format!("age-encryption.org/v1\n--- {mac}\n");
        assert_eq!(
            opened(&identity, none.as_bytes()),
            Err(AgeError::Malformed("no stanza"))
        );
        let line = "A".repeat(64) + "\n";
        let endless = format!("age-encryption.org/v1\n-> x\n{}", line.repeat(2000));
        assert_eq!(
            opened(&identity, endless.as_bytes()),
            Err(AgeError::Malformed("the header is too long"))
        );
        let one_line = format!("age-encryption.org/v1\n-> {}", "x".repeat(1 << 20));
        assert_eq!(
            opened(&identity, one_line.as_bytes()),
            Err(AgeError::Malformed("the header is too long"))
        );
    }

    #[test]
    fn another_file_is_not_age() {
        let identity = identity();
        for file in [
            &b""[..],
            b"age",
            b"-----BEGIN AGE ENCRYPTED FILE-----\n",
            &[0xff; 300],
        ] {
            assert_eq!(opened(&identity, file), Err(AgeError::NotAge));
        }
    }
}
