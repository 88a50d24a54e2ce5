//! What the configuration only points to: secrets and certificates.

use super::exit::{Exit, Failure};
use crate::config::SecretSource;
use crate::tool;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;
use zeroize::Zeroizing;

/// A secret key has some 40 characters, a signed address some hundreds.
const MAX_SECRET_BYTES: u64 = 4096;
const MAX_CERTIFICATES_BYTES: u64 = 1 << 20;
/// A command that asks a server over a slow line has an answer by then; one that hangs holds up no backup.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// Reads a secret from where the configuration says it is. `key`: as its keys are called but for their
/// last word, such as `notify.mail.password_`.
pub fn read(key: &str, source: &SecretSource) -> Result<Zeroizing<String>, Failure> {
    let (what, bytes) = match source {
        SecretSource::File(file) => {
            let key = format!("{key}file");
            let failed = |error: io::Error| unreadable(&key, file, &error);
            let opened = File::open(file).map_err(failed)?;
            refuse_a_strangers(&key, file, &opened)?;
            let bytes = read_capped(opened, MAX_SECRET_BYTES).map_err(failed)?;
            (file.display().to_string(), bytes)
        }
        // Handed over by systemd, which keeps it from others in its own way.
        SecretSource::Credential(name) => {
            let key = format!("{key}credential");
            let folder = std::env::var_os("CREDENTIALS_DIRECTORY").ok_or_else(|| {
                Failure::new(
                    Exit::Usage,
                    format!("{key} = {name:?}: systemd handed no credentials"),
                )
                .hint(format!(
                    "in the unit: LoadCredential={name}:/path/of/the/secret"
                ))
                .hint("from a shell: systemd-run --pipe -p LoadCredential=… vmkeep …")
            })?;
            let file = Path::new(&folder).join(name);
            let bytes = File::open(&file).and_then(|opened| read_capped(opened, MAX_SECRET_BYTES));
            let bytes = bytes.map_err(|error| unreadable(&key, &file, &error))?;
            (file.display().to_string(), bytes)
        }
        SecretSource::Command(words) => {
            let program = words.first().cloned().unwrap_or_default();
            let key = format!("{key}command");
            (
                format!("what {program} prints"),
                told_by(&key, words, COMMAND_LIMIT)?,
            )
        }
    };
    let not_a_secret = |why: &str| {
        let key = key.trim_end_matches(['_', '.']);
        Failure::new(Exit::Usage, format!("{key}: {what} {why}"))
    };
    let text = std::str::from_utf8(&bytes).map_err(|_| not_a_secret("is not text"))?;
    let text = text.trim();
    match text.is_empty() || text.chars().any(char::is_control) {
        true => Err(not_a_secret("is not one line of text")),
        false => Ok(Zeroizing::new(text.to_string())),
    }
}

/// Certificates that are trusted instead of the system's.
pub fn read_certificates(key: &str, file: &Path) -> Result<Vec<u8>, Failure> {
    File::open(file)
        .and_then(|opened| read_capped(opened, MAX_CERTIFICATES_BYTES))
        .map(|bytes| bytes.to_vec())
        .map_err(|error| unreadable(key, file, &error))
}

/// What others on this machine can read is no secret, and what somebody else owns he can read and change
/// whatever its mode says.
fn refuse_a_strangers(key: &str, file: &Path, opened: &File) -> Result<(), Failure> {
    let facts = opened
        .metadata()
        .map_err(|error| unreadable(key, file, &error))?;
    let own = rustix::process::geteuid().as_raw();
    if facts.uid() != own && facts.uid() != 0 {
        let owner = facts.uid();
        let failure = Failure::new(
            Exit::Usage,
            format!(
                "{key}: {}: belongs to another user (uid {owner}, and vmkeep runs as {own})",
                file.display()
            ),
        );
        // To give it to root would lock out the user that vmkeep may run as.
        let failure = match own {
            0 => failure.hint(format!(
                "if it is uid {owner} that vmkeep runs as here: sudo -u '#{owner}' vmkeep …"
            )),
            _ => failure,
        };
        return Err(failure
            .hint(format!("if it is yours: chown {own} {}", file.display()))
            .hint("if somebody may have read it, make a new one"));
    }
    match facts.mode() & 0o077 {
        0 => Ok(()),
        _ => Err(Failure::new(
            Exit::Usage,
            format!(
                "{key}: {}: others on this machine can read it (mode {:03o})",
                file.display(),
                facts.mode() & 0o777
            ),
        )
        .hint(format!("chmod 0600 {}", file.display()))
        .hint("if somebody may have read it, make a new one")),
    }
}

fn told_by(key: &str, words: &[String], limit: Duration) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let Some((program, arguments)) = words.split_first() else {
        return Err(Failure::new(Exit::Usage, format!("{key} names no program")));
    };
    // Without its arguments: one of them may be the secret.
    let failed = |what: String| Failure::new(Exit::Usage, format!("{key}: {program}: {what}"));
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // What vmkeep says is kept in journals and mailed, and this may be the secret.
        .stderr(Stdio::null());
    let told = tool::run(&mut command, limit, MAX_SECRET_BYTES);
    let output = told.map_err(|error| {
        failed(error.to_string())
            .hint("it is to print the secret, ask nobody anything, and end: try it with </dev/null")
    })?;
    let bytes = Zeroizing::new(output.stdout);
    match output.status.success() {
        true => Ok(bytes),
        false => Err(failed(output.status.to_string()).hint(
            "what it says of that is not shown here, for it may be the secret: run it by hand",
        )),
    }
}

fn read_capped(file: File, max_bytes: u64) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(max_bytes.saturating_add(1))
        .read_to_end(&mut bytes)?;
    match bytes.len() as u64 > max_bytes {
        true => Err(io::Error::other(format!("larger than {max_bytes} bytes"))),
        false => Ok(bytes),
    }
}

fn unreadable(key: &str, file: &Path, error: &io::Error) -> Failure {
    let file = file.display().to_string();
    Failure::new(Exit::Usage, format!("{key} = {file:?}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_secret_file_is_for_its_owner_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("secret");
        fs::write(&file, "s3cret\n").expect("a file");
        let source = SecretSource::File(file.clone());
        for (mode, is_secret) in [
            (0o600, true),
            (0o400, true),
            (0o640, false),
            (0o604, false),
            (0o620, false),
        ] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).expect("a mode");
            match read("notify.mail.password_", &source) {
                Ok(secret) => assert!(is_secret && *secret == "s3cret", "{mode:o}"),
                Err(failure) => {
                    assert!(!is_secret, "{mode:o}");
                    assert!(failure.message.starts_with("notify.mail.password_file: "));
                    let chmod = format!("chmod 0600 {}", file.display());
                    assert_eq!(failure.hints.first(), Some(&chmod));
                }
            }
        }
    }

    #[test]
    fn a_secret_file_of_another_user_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("secret");
        fs::write(&file, "s3cret\n").expect("a file");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("a mode");
        if !rustix::process::geteuid().is_root() {
            // Only root can give files away.
            return;
        }
        std::os::unix::fs::chown(&file, Some(4711), None).expect("an owner");
        let source = SecretSource::File(file.clone());
        let Err(failure) = read("notify.mail.password_", &source) else {
            panic!("a secret that uid 4711 can read");
        };
        assert!(failure.message.contains("uid 4711"), "{}", failure.message);
        let as_its_owner = failure.hints.first().map(String::as_str);
        assert!(as_its_owner.is_some_and(|hint| hint.contains("sudo -u '#4711' vmkeep")));
    }

    #[test]
    fn what_a_command_says_besides_the_secret_goes_nowhere() {
        let words = ["sh", "-c", "readlink /proc/self/fd/2"].map(str::to_string);
        let told = read("x.url_", &SecretSource::Command(words.into())).ok();
        assert_eq!(told.as_deref().map(String::as_str), Some("/dev/null"));
        let words = ["sh", "-c", "echo s3cret >&2; exit 3"].map(str::to_string);
        let Err(failure) = read("x.url_", &SecretSource::Command(words.into())) else {
            panic!("it has failed");
        };
        assert_eq!(failure.message, "x.url_command: sh: exit status: 3");
        assert!(
            failure
                .hints
                .iter()
                .any(|hint| hint.contains("run it by hand"))
        );
    }

    #[test]
    fn a_secret_is_one_line() {
        for (words, expected) in [
            (vec!["printf", "  s3cret\\n"], Ok("s3cret")),
            (vec!["printf", ""], Err("is not one line")),
            (vec!["printf", "a\\nb"], Err("is not one line")),
            (vec!["printf", "\\377"], Err("is not text")),
            (vec!["false", "s3cret"], Err("exit status: 1")),
        ] {
            let words = words.iter().map(|word| word.to_string()).collect();
            let told = read("x.url_", &SecretSource::Command(words));
            match (told, expected) {
                (Ok(secret), Ok(expected)) => assert_eq!(secret.as_str(), expected),
                (Err(failure), Err(part)) => {
                    assert!(failure.message.contains(part), "{}", failure.message);
                    assert!(!failure.message.contains("s3cret"));
                }
                (told, expected) => panic!("{:?} instead of {expected:?}", told.is_ok()),
            }
        }
    }

    #[test]
    fn a_command_that_hangs_or_is_held_open_by_what_it_started_is_given_up() {
        for (script, limit, says) in [
            ("sleep infinity", 200, "did not end within 0.2 s"),
            (
                "echo s3cret; sleep infinity & sleep infinity",
                200,
                "did not end within 0.2 s",
            ),
            (
                "echo s3cret; sleep infinity &",
                20_000,
                "something holds its output open",
            ),
        ] {
            let words = ["sh", "-c", script].map(str::to_string);
            let told = told_by("x.url_command", &words, Duration::from_millis(limit));
            let failure = told.expect_err(script);
            assert_eq!(failure.message, format!("x.url_command: sh: {says}"));
            assert!(!failure.hints.is_empty());
        }
    }
}
