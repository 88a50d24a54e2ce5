use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use zeroize::Zeroizing;

/// Where a message or a ping is sent. It is a secret, for whoever knows it can send there too: only its
/// host is ever shown.
#[derive(Clone, PartialEq, Eq)]
pub struct ReceiverUrl {
    text: Zeroizing<String>,
    /// Host, and port where it is said.
    place: String,
    encrypted: bool,
}

const MAX_BYTES: usize = 2048;

impl ReceiverUrl {
    /// `https://…`; plain http to this machine itself, or where it is allowed. The reason of a refusal
    /// does not show the text.
    pub fn parse(text: &str, http_allowed: bool) -> Result<Self, &'static str> {
        let plain = text.len() <= MAX_BYTES && text.bytes().all(|byte| byte.is_ascii_graphic());
        // Those that clients read as something else.
        if !plain || text.contains(['\\', '#']) {
            return Err("an address has no spaces and no other than ASCII characters");
        }
        let (rest, encrypted) = match (text.strip_prefix("https://"), text.strip_prefix("http://"))
        {
            (Some(rest), _) => (rest, true),
            (None, Some(rest)) => (rest, false),
            (None, None) => return Err("such as \"https://hooks.example.com/vmkeep\""),
        };
        let end = rest.find(['/', '?']).unwrap_or(rest.len());
        let place = rest.get(..end).unwrap_or_default();
        if place.contains('@') {
            return Err("a user name does not stand in the address: use an Authorization header");
        }
        let Some(host) = host_of(place) else {
            return Err("a host and perhaps a port, such as \"https://hooks.example.com:8443/x\"");
        };
        if !encrypted && !http_allowed && !is_loopback(host) {
            return Err(
                "http sends the messages and this address in the clear; if that is meant: \
                 allow_http = true",
            );
        }
        Ok(ReceiverUrl {
            text: Zeroizing::new(text.to_string()),
            place: place.to_string(),
            encrypted,
        })
    }

    /// All of it, for the request.
    pub fn secret_text(&self) -> &str {
        &self.text
    }

    /// Host, and port where it is said.
    pub fn place(&self) -> &str {
        &self.place
    }

    pub fn is_encrypted(&self) -> bool {
        self.encrypted
    }
}

/// Without its port.
fn host_of(place: &str) -> Option<&str> {
    let (host, port) = match place.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']')?;
            address.parse::<Ipv6Addr>().ok()?;
            (address, port)
        }
        None => {
            let end = place.find(':').unwrap_or(place.len());
            let (host, port) = place.split_at(end);
            let is_name = host
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
            if host.is_empty() || !is_name {
                return None;
            }
            (host, port)
        }
    };
    let is_port = match port.strip_prefix(':') {
        Some(port) => port.parse::<u16>().is_ok_and(|port| port > 0),
        None => port.is_empty(),
    };
    is_port.then_some(host)
}

/// Whether what is sent there stays on this machine.
pub fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<Ipv4Addr>().is_ok_and(|one| one.is_loopback())
        || host.parse::<Ipv6Addr>().is_ok_and(|one| one.is_loopback())
}

impl fmt::Display for ReceiverUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.place)
    }
}

impl fmt::Debug for ReceiverUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReceiverUrl({}, …)", self.place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_host_of_an_address_is_shown() {
        let url = ReceiverUrl::parse("https://hooks.example.com:8443/T0/s3cret?k=s3cret", false);
        let url = url.unwrap();
        assert_eq!(url.to_string(), "hooks.example.com:8443");
        assert!(!format!("{url:?}").contains("s3cret"));
        assert!(url.secret_text().ends_with("/T0/s3cret?k=s3cret"));
    }

    #[test]
    fn http_is_for_this_machine_or_where_it_is_allowed() {
        for here in [
            "http://localhost/x",
            "http://127.0.0.1:8080",
            "http://[::1]:80/",
        ] {
            let url = ReceiverUrl::parse(here, false).expect(here);
            assert!(!url.is_encrypted());
        }
        for elsewhere in [
            "http://example.com/x",
            "http://127.0.0.1.example.com/",
            "http://localhost.example.com/",
            "http://0x7f.1/",
            "http://10.0.0.1/",
        ] {
            let why = ReceiverUrl::parse(elsewhere, false).expect_err(elsewhere);
            assert!(why.contains("allow_http = true"), "{elsewhere}: {why}");
            ReceiverUrl::parse(elsewhere, true).expect(elsewhere);
        }
    }

    #[test]
    fn what_clients_read_in_different_ways_is_refused() {
        for text in [
            "",
            "hooks.example.com/x",
            "ftp://example.com/",
            "https://",
            "https:///x",
            "https://user:s3cret@example.com/",
            "https://localhost\\@example.com/",
            "https://example.com/#x",
            "https://example.com/a b",
            "https://example.com/\r\nX: y",
            "https://exämple.com/",
            "https://example.com:0/",
            "https://example.com:x/",
            "https://example.com:99999/",
            "https://[::1/",
            "https://[::1]x/",
        ] {
            let why = ReceiverUrl::parse(text, true).expect_err(text);
            assert!(!why.contains("s3cret"));
        }
        ReceiverUrl::parse(&format!("https://a.example/{}", "x".repeat(3000)), false)
            .expect_err("too long");
    }
}
