//! Receivers of notifications that keep what they get: one that speaks HTTP and one that speaks SMTP,
//! in the clear or by TLS.

use super::host::{path_text, tool};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::Value;
use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use tempfile::TempDir;

/// A certificate of 127.0.0.1 that signs itself.
pub struct Certificate {
    folder: TempDir,
    config: Arc<ServerConfig>,
}

impl Certificate {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let (settings, key, file) = (path("openssl.cnf"), path("key.pem"), path("ca.pem"));
        let text = "[req]\ndistinguished_name = name\nx509_extensions = extensions\nprompt = no\n\
            [name]\nCN = sink\n\
            [extensions]\nbasicConstraints = critical, CA:FALSE\n\
            subjectAltName = IP:127.0.0.1, DNS:localhost\n";
        fs::write(&settings, text).unwrap();
        let arguments =
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 36500";
        let mut arguments: Vec<&str> = arguments.split(' ').collect();
        arguments.extend(["-config", path_text(&settings), "-keyout", path_text(&key)]);
        arguments.extend(["-out", path_text(&file)]);
        tool("openssl", &arguments);
        let chain = vec![CertificateDer::from_pem_file(&file).unwrap()];
        let key = PrivateKeyDer::from_pem_file(&key).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        Certificate {
            folder,
            config: Arc::new(config),
        }
    }

    /// For `ca_file`.
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }
}

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

fn encrypted(stream: TcpStream, config: &Arc<ServerConfig>) -> Box<dyn Stream> {
    let connection = ServerConnection::new(config.clone()).unwrap();
    Box::new(StreamOwned::new(connection, stream))
}

/// Takes connections until it is dropped, each in a thread of its own.
struct Server {
    port: u16,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(serve: impl Fn(TcpStream) -> io::Result<()> + Clone + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let serve = serve.clone();
                // Who hangs up has seen enough.
                thread::spawn(move || serve(stream).ok());
            }
        });
        Server {
            port,
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// Names in small letters.
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Request {
    #[track_caller]
    pub fn document(&self) -> Value {
        serde_json::from_slice(&self.body).expect("a JSON document")
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

#[derive(Debug, Clone)]
struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
}

#[derive(Default)]
struct HttpState {
    requests: Mutex<Vec<Request>>,
    replies: Mutex<VecDeque<Reply>>,
    silent: AtomicBool,
}

/// Answers 200 unless it is told otherwise.
pub struct HttpSink {
    pub url: String,
    state: Arc<HttpState>,
    _server: Server,
}

impl HttpSink {
    pub fn start() -> Self {
        HttpSink::with(None)
    }

    pub fn with_tls(certificate: &Certificate) -> Self {
        HttpSink::with(Some(certificate.config.clone()))
    }

    fn with(tls: Option<Arc<ServerConfig>>) -> Self {
        let state = Arc::new(HttpState::default());
        let served = state.clone();
        let scheme = match tls {
            Some(_) => "https",
            None => "http",
        };
        let server = Server::start(move |stream| {
            let stream: Box<dyn Stream> = match &tls {
                Some(config) => encrypted(stream, config),
                None => Box::new(stream),
            };
            serve_http(stream, &served)
        });
        HttpSink {
            url: format!("{scheme}://127.0.0.1:{}", server.port),
            state,
            _server: server,
        }
    }

    pub fn received(&self) -> Vec<Request> {
        self.state.requests.lock().unwrap().clone()
    }

    /// The next requests are answered with these, one after the other; those after them with 200.
    pub fn answer_with(&self, statuses: &[u16]) {
        for status in statuses {
            self.answer_with_headers(*status, &[]);
        }
    }

    pub fn answer_with_headers(&self, status: u16, headers: &[(&'static str, &str)]) {
        let headers = headers
            .iter()
            .map(|(name, value)| (*name, value.to_string()));
        self.state.replies.lock().unwrap().push_back(Reply {
            status,
            headers: headers.collect(),
        });
    }

    /// From now on requests are taken and never answered.
    pub fn fall_silent(&self) {
        self.state.silent.store(true, Ordering::SeqCst);
    }
}

fn serve_http(stream: Box<dyn Stream>, state: &HttpState) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let Some(request) = read_request(&mut stream)? else {
            return Ok(());
        };
        state.requests.lock().unwrap().push(request);
        if state.silent.load(Ordering::SeqCst) {
            // Until the other side gives up.
            io::copy(&mut stream, &mut io::sink())?;
            return Ok(());
        }
        let reply = state.replies.lock().unwrap().pop_front();
        let reply = reply.unwrap_or(Reply {
            status: 200,
            headers: Vec::new(),
        });
        let mut text = format!("HTTP/1.1 {} Said\r\ncontent-length: 2\r\n", reply.status);
        for (name, value) in &reply.headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text.push_str("\r\nok");
        stream.get_mut().write_all(text.as_bytes())?;
        stream.get_mut().flush()?;
    }
}

fn read_request(stream: &mut impl BufRead) -> io::Result<Option<Request>> {
    let Some(first) = read_line(stream)? else {
        return Ok(None);
    };
    let mut words = first.split(' ');
    let mut word = || words.next().unwrap_or_default().to_string();
    let (method, path) = (word(), word());
    let mut headers = BTreeMap::new();
    while let Some(line) = read_line(stream)?.filter(|line| !line.is_empty()) {
        if let Some((name, value)) = line.split_once(':') {
            headers.insert(name.to_ascii_lowercase(), value.trim().to_string());
        }
    }
    let length = headers.get("content-length");
    let length: usize = length.map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok(Some(Request {
        method,
        path,
        headers,
        body,
    }))
}

/// Without its end; `None` where there is no more.
fn read_line(stream: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = String::new();
    match stream.read_line(&mut line)? {
        0 => Ok(None),
        _ => Ok(Some(line.trim_end_matches(['\r', '\n']).to_string())),
    }
}

#[derive(Debug, Clone)]
pub struct Mail {
    pub from: String,
    pub to: Vec<String>,
    /// As it was sent, with doubled dots undone.
    pub data: String,
    pub encrypted: bool,
    /// What was said after `AUTH PLAIN`.
    pub signed_in: Option<String>,
}

impl Mail {
    /// The lines of the head, those that are folded in one.
    pub fn headers(&self) -> Vec<String> {
        let head = self.data.split("\r\n\r\n").next().unwrap_or_default();
        let head = head.replace("\r\n ", " ").replace("\r\n\t", " ");
        head.split("\r\n").map(str::to_string).collect()
    }

    #[track_caller]
    pub fn header(&self, name: &str) -> String {
        let start = format!("{name}: ");
        let found: Vec<String> = self
            .headers()
            .iter()
            .filter_map(|line| line.strip_prefix(&start).map(str::to_string))
            .collect();
        assert_eq!(found.len(), 1, "{name} once in\n{}", self.data);
        found.into_iter().next().unwrap()
    }

    pub fn body(&self) -> &str {
        self.data.split_once("\r\n\r\n").map_or("", |parts| parts.1)
    }
}

/// How a mail server is set up.
#[derive(Clone, Default)]
pub struct MailOptions {
    pub tls: Option<Arc<ServerConfig>>,
    pub wrapped: bool,
    /// What has to follow `AUTH PLAIN`.
    pub sign_in: Option<&'static str>,
    /// These recipients are refused.
    pub unknown: &'static [&'static str],
    /// These recipients are put off the first time.
    pub greylisted: &'static [&'static str],
}

impl MailOptions {
    pub fn starttls(certificate: &Certificate) -> Self {
        MailOptions {
            tls: Some(certificate.config.clone()),
            ..MailOptions::default()
        }
    }

    pub fn wrapped(certificate: &Certificate) -> Self {
        MailOptions {
            wrapped: true,
            ..MailOptions::starttls(certificate)
        }
    }
}

#[derive(Default)]
struct MailState {
    mails: Mutex<Vec<Mail>>,
    /// Answers to the next mails, instead of taking them.
    replies: Mutex<VecDeque<&'static str>>,
    /// Commands, in the order in which they came.
    commands: Mutex<Vec<String>>,
}

/// Takes every mail unless it is told otherwise.
pub struct MailSink {
    pub port: u16,
    state: Arc<MailState>,
    _server: Server,
}

impl MailSink {
    /// In the clear, without TLS.
    pub fn start() -> Self {
        MailSink::with(MailOptions::default())
    }

    pub fn with(options: MailOptions) -> Self {
        let state = Arc::new(MailState::default());
        let served = state.clone();
        let server = Server::start(move |stream| serve_mail(stream, &options, &served));
        MailSink {
            port: server.port,
            state,
            _server: server,
        }
    }

    pub fn received(&self) -> Vec<Mail> {
        self.state.mails.lock().unwrap().clone()
    }

    pub fn commands(&self) -> Vec<String> {
        self.state.commands.lock().unwrap().clone()
    }

    /// The next mails are answered with these lines, such as `451 later`, and not taken.
    pub fn answer_with(&self, replies: &[&'static str]) {
        self.state.replies.lock().unwrap().extend(replies);
    }
}

/// One connection. Its commands are those that clients send who do not pipeline.
fn serve_mail(stream: TcpStream, options: &MailOptions, state: &MailState) -> io::Result<()> {
    let mut encrypted_now = options.wrapped;
    let raw = stream.try_clone()?;
    let mut stream: BufReader<Box<dyn Stream>> = match (&options.tls, options.wrapped) {
        (Some(config), true) => BufReader::new(encrypted(stream, config)),
        _ => BufReader::new(Box::new(stream)),
    };
    let mut signed_in = None;
    let mut from = String::new();
    let mut to = Vec::new();
    say(&mut stream, "220 sink ESMTP")?;
    while let Some(line) = read_line(&mut stream)? {
        state.commands.lock().unwrap().push(line.clone());
        let upper = line.to_ascii_uppercase();
        let reply = if upper.starts_with("EHLO ") {
            let mut lines = "250-sink\r\n250-8BITMIME\r\n".to_string();
            if options.tls.is_some() && !encrypted_now {
                lines.push_str("250-STARTTLS\r\n");
            }
            if options.sign_in.is_some() {
                lines.push_str("250-AUTH PLAIN\r\n");
            }
            format!("{lines}250 HELP")
        } else if let (true, Some(config)) = (upper == "STARTTLS", &options.tls) {
            say(&mut stream, "220 go on")?;
            stream = BufReader::new(encrypted(raw.try_clone()?, config));
            encrypted_now = true;
            continue;
        } else if let Some(given) = line.strip_prefix("AUTH PLAIN ") {
            match options.sign_in == Some(given) {
                true => {
                    signed_in = Some(given.to_string());
                    "235 welcome".to_string()
                }
                // Not every server is silent about what it was told.
                false => format!("535 5.7.8 wrong: {given}"),
            }
        } else if let Some(address) = line.strip_prefix("MAIL FROM:") {
            from = address_of(address);
            to.clear();
            match options.sign_in.is_some() && signed_in.is_none() {
                true => "530 sign in first".to_string(),
                false => "250 yes".to_string(),
            }
        } else if let Some(address) = line.strip_prefix("RCPT TO:") {
            let address = address_of(address);
            let commands = state.commands.lock().unwrap();
            let is_first = commands.iter().filter(|one| **one == line).count() == 1;
            if options.unknown.contains(&address.as_str()) {
                "550 5.1.1 nobody here by that name".to_string()
            } else if is_first && options.greylisted.contains(&address.as_str()) {
                "450 4.7.1 greylisted".to_string()
            } else {
                to.push(address);
                "250 yes".to_string()
            }
        } else if upper == "DATA" {
            say(&mut stream, "354 go on")?;
            let data = read_data(&mut stream)?;
            match state.replies.lock().unwrap().pop_front() {
                Some(reply) => reply.to_string(),
                None => {
                    state.mails.lock().unwrap().push(Mail {
                        from: from.clone(),
                        to: to.clone(),
                        data,
                        encrypted: encrypted_now,
                        signed_in: signed_in.clone(),
                    });
                    "250 taken".to_string()
                }
            }
        } else if upper == "QUIT" {
            return say(&mut stream, "221 bye");
        } else {
            "502 what?".to_string()
        };
        say(&mut stream, &reply)?;
    }
    Ok(())
}

fn say(stream: &mut BufReader<Box<dyn Stream>>, line: &str) -> io::Result<()> {
    let stream = stream.get_mut();
    stream.write_all(format!("{line}\r\n").as_bytes())?;
    stream.flush()
}

/// Of `<a@example.com> BODY=8BITMIME`.
fn address_of(text: &str) -> String {
    let text = text.trim().trim_start_matches('<');
    text.split('>').next().unwrap_or_default().to_string()
}

/// Up to the line with a dot alone.
fn read_data(stream: &mut impl BufRead) -> io::Result<String> {
    let mut data = String::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if line == ".\r\n" {
            return Ok(data);
        }
        data.push_str(line.strip_prefix('.').unwrap_or(&line));
    }
}
