//! Key files and signatures against the public tools `age` and `minisign`: a customer must be able
//! to open and to verify without this program.

#![forbid(unsafe_code)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;
use vmkeep::codec::HostIdentity;
use vmkeep::codec::age::{self, AgeError, AgeIdentity, AgeRecipient, MAX_PLAINTEXT_BYTES};
use vmkeep::codec::minisign::{self, MinisignError};

/// Runs a tool with bytes on its standard input.
fn run(tool: &str, arguments: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(tool)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| {
            panic!("cannot run {tool} ({error}); these tests need it: apt-get install age minisign")
        });
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || {
        // A tool that refuses early closes its input.
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

#[track_caller]
fn succeeds(tool: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let output = run(tool, arguments, input);
    assert!(
        output.status.success(),
        "{tool} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

fn write(folder: &TempDir, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, content).unwrap();
    path
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn keygen() -> String {
    String::from_utf8(succeeds("age-keygen", &[], b"")).unwrap()
}

fn host() -> HostIdentity {
    HostIdentity::generate().ok().unwrap()
}

/// Lengths around what could go wrong: nothing, a key, one byte less than a chunk, a chunk.
const LENGTHS: [usize; 5] = [0, 1, 32, MAX_PLAINTEXT_BYTES - 1, MAX_PLAINTEXT_BYTES];

fn plaintext(length: usize) -> Vec<u8> {
    (0..length)
        .map(|place| (place * 7 + place / 251) as u8)
        .collect()
}

#[test]
fn age_opens_our_key_files_for_each_of_several_recipients() {
    let folder = TempDir::new().unwrap();
    let host = host();
    let ours = AgeIdentity::generate().ok().unwrap();
    let mut files = vec![
        host.to_file_text("today").to_string(),
        ours.to_file_text(&[]).to_string(),
    ];
    files.extend([(); 3].map(|()| keygen()));
    let recipients: Vec<AgeRecipient> = files
        .iter()
        .map(|file| AgeIdentity::from_file_text(file).ok().unwrap().recipient())
        .collect();
    assert_eq!(recipients[0], host.recipient());
    for length in LENGTHS {
        let sealed = age::encrypt(&recipients, &plaintext(length)).unwrap();
        for (number, file) in files.iter().enumerate() {
            let identity = write(&folder, &format!("identity{number}"), file);
            let opened = succeeds("age", &["-d", "-i", text(&identity)], &sealed);
            assert!(opened == plaintext(length), "{length} bytes, {number}");
        }
        let stranger = write(&folder, "stranger", keygen());
        let refused = run("age", &["-d", "-i", text(&stranger)], &sealed);
        assert!(!refused.status.success());
    }
}

#[test]
fn we_open_what_age_seals() {
    let host = host();
    let ours = AgeIdentity::generate().ok().unwrap();
    let theirs = AgeIdentity::from_file_text(&keygen()).ok().unwrap();
    let recipients = [host.recipient(), ours.recipient(), theirs.recipient()]
        .map(|recipient| recipient.to_string());
    let [one, two, three] = &recipients;
    for length in LENGTHS {
        let sealed = succeeds(
            "age",
            &["-r", one, "-r", two, "-r", three],
            &plaintext(length),
        );
        for opened in [
            host.decrypt(&sealed),
            age::decrypt(&ours, &sealed),
            age::decrypt(&theirs, &sealed),
        ] {
            assert!(*opened.unwrap() == plaintext(length), "{length} bytes");
        }
        let stranger = AgeIdentity::generate().ok().unwrap();
        assert_eq!(
            age::decrypt(&stranger, &sealed).err(),
            Some(AgeError::WrongKey)
        );
    }
    let long = succeeds("age", &["-r", one], &plaintext(MAX_PLAINTEXT_BYTES + 1));
    assert_eq!(host.decrypt(&long).err(), Some(AgeError::TooLarge));
}

#[test]
fn age_keygen_reads_our_identity_files_as_we_do() {
    let folder = TempDir::new().unwrap();
    let host = host();
    let ours = AgeIdentity::generate().ok().unwrap();
    for (file, recipient) in [
        (host.to_file_text("today"), host.recipient()),
        (ours.to_file_text(&["a", "b\nc"]), ours.recipient()),
    ] {
        let path = write(&folder, "identity", file.as_bytes());
        let stated = String::from_utf8(succeeds("age-keygen", &["-y", text(&path)], b"")).unwrap();
        assert_eq!(stated, format!("{recipient}\n"));
    }
}

#[test]
fn we_read_the_identity_files_of_age_keygen_as_it_does() {
    for file in [(); 3].map(|()| keygen()) {
        let identity = AgeIdentity::from_file_text(&file).ok().unwrap();
        let public = format!("# public key: {}\n", identity.recipient());
        assert!(file.contains(&public), "{public}");
        assert!(HostIdentity::from_file_text(&file).is_ok());
    }
}

#[test]
fn age_and_we_agree_that_a_changed_key_file_is_not_to_be_opened() {
    let folder = TempDir::new().unwrap();
    let host = host();
    let identity = write(&folder, "identity", host.to_file_text("today").as_bytes());
    let sealed = age::encrypt(&[host.recipient()], b"key").unwrap();
    for place in (0..sealed.len()).step_by(11) {
        let mut flipped = sealed.clone();
        flipped[place] ^= 1;
        assert!(host.decrypt(&flipped).is_err());
        assert!(
            !run("age", &["-d", "-i", text(&identity)], &flipped)
                .status
                .success(),
            "byte {place}"
        );
    }
}

struct Signed {
    folder: TempDir,
    content: PathBuf,
    host: HostIdentity,
}

impl Signed {
    fn new(content: &[u8], comment: &str) -> Self {
        let folder = TempDir::new().unwrap();
        let host = host();
        let path = write(&folder, "content", content);
        let signature = minisign::sign(&host, content, comment).unwrap();
        write(&folder, "content.minisig", signature);
        Signed {
            folder,
            content: path,
            host,
        }
    }

    fn minisign(&self) -> Output {
        let key = minisign::public_key_line(&self.host.host_id());
        run("minisign", &["-Vm", text(&self.content), "-P", &key], b"")
    }
}

#[test]
fn minisign_verifies_our_signatures_and_shows_the_trusted_comment() {
    let longest = "x".repeat(900);
    for content in [&b""[..], b"content", &plaintext(1 << 20)] {
        for comment in ["vmkeep proof 2026-01-01T00:00:00Z", "", &longest] {
            let signed = Signed::new(content, comment);
            let output = signed.minisign();
            let shown = String::from_utf8(output.stdout).unwrap();
            assert!(output.status.success(), "{shown}");
            assert!(
                shown.contains(&format!("Trusted comment: {comment}\n")),
                "{shown}"
            );
            let key = minisign::public_key_file(&signed.host.host_id());
            let key = write(&signed.folder, "host.pub", key);
            succeeds(
                "minisign",
                &["-Vm", text(&signed.content), "-p", text(&key)],
                b"",
            );
        }
    }
}

#[test]
fn minisign_and_we_reject_changed_content() {
    let content = b"the content of a proof";
    let signed = Signed::new(content, "comment");
    assert!(signed.minisign().status.success());
    let signature = std::fs::read_to_string(signed.folder.path().join("content.minisig")).unwrap();
    let host = signed.host.host_id();
    assert!(minisign::verify(&host, content, &signature).is_ok());
    for place in 0..content.len() {
        let mut flipped = content.to_vec();
        flipped[place] ^= 1;
        write(&signed.folder, "content", &flipped);
        assert!(!signed.minisign().status.success(), "byte {place}");
        assert_eq!(
            minisign::verify(&host, &flipped, &signature),
            Err(MinisignError::Content)
        );
    }
}

#[test]
fn minisign_and_we_reject_a_changed_signature_file() {
    let content = b"the content of a proof";
    let signed = Signed::new(content, "comment");
    let path = signed.folder.path().join("content.minisig");
    let signature = std::fs::read_to_string(&path).unwrap();
    let protected = signature.find('\n').unwrap();
    for place in (protected..signature.len() - 1).step_by(7) {
        let mut flipped = signature.clone().into_bytes();
        flipped[place] ^= 1;
        std::fs::write(&path, &flipped).unwrap();
        assert!(!signed.minisign().status.success(), "byte {place}");
        let flipped = String::from_utf8(flipped).unwrap();
        assert!(minisign::verify(&signed.host.host_id(), content, &flipped).is_err());
    }
}

#[test]
fn minisign_rejects_our_signature_under_another_hosts_key() {
    let signed = Signed::new(b"content", "comment");
    let other = minisign::public_key_line(&host().host_id());
    let output = run(
        "minisign",
        &["-Vm", text(&signed.content), "-P", &other],
        b"",
    );
    assert!(!output.status.success());
}
