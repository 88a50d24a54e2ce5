//! Something between vmkeep and a server that goes wrong on purpose, by plan and by number.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

/// What happens to one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mishap {
    /// The proxy answers so and forwards nothing.
    Status(u16),
    /// The same, as a server whose clock differs refuses a request.
    Skewed,
    /// Nothing is forwarded, and the connection ends.
    LostBefore,
    /// The server does it, and the connection ends before its answer.
    LostAfter,
    /// The connection ends, and the server is asked only together with the same request's repetition.
    Late,
    /// The server's answer, without the second half of its body.
    Truncated,
    /// To a request that lists: the server's answer ends after the first entry, and says that this is all of
    /// it. To others, and where nothing is listed: nothing.
    CutShort,
    /// One bit in the middle of the answer's body.
    Flipped,
    /// What the same request was answered the first time.
    Stale,
    /// To a request that deletes many: the server does it, but of the lines of its answer one in three says
    /// that it failed, and one in three is missing. To others: nothing.
    HalfTold,
    /// To a request that deletes many: nothing is forwarded, and an answer that is otherwise good says of one line
    /// in two that it failed, and of the others nothing. To others: nothing.
    Undone,
}

/// A request as it passed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passed {
    pub method: String,
    /// Path and query, as sent.
    pub target: String,
    pub body_bytes: usize,
    /// Of the answer's body; 0 until it is there.
    pub answer_bytes: usize,
}

impl Passed {
    /// `DeleteObjects`.
    pub fn deletes_many(&self) -> bool {
        passed_deletes_many(&self.method, &self.target)
    }
}

fn passed_deletes_many(method: &str, target: &str) -> bool {
    let query = target.split_once('?').map(|(_, query)| query);
    let is_delete = |part: &str| part.split('=').next() == Some("delete");
    method == "POST" && query.is_some_and(|query| query.split('&').any(is_delete))
}

/// From one request on nothing reaches the server, but that one if it is to, and nothing is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standstill {
    /// The number of the request, from 0.
    pub at: usize,
    /// Whether the server does it.
    pub applied: bool,
}

#[derive(Default)]
struct Book {
    passed: Vec<Passed>,
    /// By the number of the request, from 0.
    plan: HashMap<usize, Mishap>,
    happened: Vec<(usize, Mishap)>,
    standstill: Option<Standstill>,
    /// What was to be done before it has been done.
    stands_still: bool,
    /// What stood still is passed on.
    goes_on: bool,
    first_answers: HashMap<(String, String), Vec<u8>>,
    /// Requests on their way, by method and target.
    late: HashMap<(String, String), Vec<u8>>,
}

/// Lives as long as the program.
#[derive(Clone)]
pub struct Proxy {
    pub endpoint: String,
    book: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    book: Mutex<Book>,
    /// It stands still, or no more.
    turned: Condvar,
}

/// What stands between the tags.
fn parts(text: &str, tag: &str) -> Vec<String> {
    let (start, end) = (format!("<{tag}>"), format!("</{tag}>"));
    let parts = text.split(&start).skip(1);
    parts
        .map(|part| part.split(&end).next().unwrap_or_default().to_string())
        .collect()
}

/// An answer to a request that deletes many, of these lines: those of which `is_told` says so were deleted, and
/// of the rest one in two failed.
fn half_told(lines: &[String], is_told: impl Fn(usize) -> bool) -> String {
    let mut answer = String::from("<DeleteResult>");
    let mut rest = 0;
    for (at, line) in lines.iter().enumerate() {
        if is_told(at) {
            answer.push_str(&format!("<Deleted>{line}</Deleted>"));
            continue;
        }
        rest += 1;
        if rest % 2 == 1 {
            answer.push_str("<Error>");
            for tag in ["Key", "VersionId"] {
                for value in parts(line, tag) {
                    answer.push_str(&format!("<{tag}>{value}</{tag}>"));
                }
            }
            answer.push_str("<Code>InternalError</Code><Message>on purpose</Message></Error>");
        }
    }
    answer + "</DeleteResult>"
}

/// What a proxy does to all requests alike.
#[derive(Clone, Default)]
struct Habits {
    /// Held by a conditional request until it is answered.
    turn: Option<Arc<Mutex<()>>>,
    /// No answer tells of a lock.
    hides_locks: bool,
}

impl Proxy {
    /// Before `endpoint`, which is `http://host:port`.
    pub fn before(endpoint: &str) -> Self {
        Proxy::start(endpoint, Habits::default())
    }

    /// One that lets conditional requests pass one at a time.
    pub fn in_turn(endpoint: &str) -> Self {
        let turn = Some(Arc::default());
        let habits = Habits {
            turn,
            ..Habits::default()
        };
        Proxy::start(endpoint, habits)
    }

    /// One that makes a server that locks look like one that takes a lock and does nothing.
    pub fn hiding_locks(endpoint: &str) -> Self {
        let habits = Habits {
            hides_locks: true,
            ..Habits::default()
        };
        Proxy::start(endpoint, habits)
    }

    fn start(endpoint: &str, habits: Habits) -> Self {
        let server = endpoint.strip_prefix("http://").unwrap().to_string();
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let proxy = Proxy {
            endpoint: format!("http://{}", listener.local_addr().unwrap()),
            book: Arc::default(),
        };
        let book = proxy.book.clone();
        thread::spawn(move || {
            for client in listener.incoming() {
                let (book, server, habits) = (book.clone(), server.clone(), habits.clone());
                thread::spawn(move || {
                    // A connection that ends, ends.
                    let _ = serve(client?, &server, &book, &habits);
                    io::Result::Ok(())
                });
            }
        });
        proxy
    }

    /// Forgets what passed; requests count from 0 again.
    pub fn start_over(&self, plan: impl IntoIterator<Item = (usize, Mishap)>) {
        let mut book = self.book.book.lock().unwrap();
        book.passed.clear();
        book.happened.clear();
        book.plan = plan.into_iter().collect();
        book.standstill = None;
        book.stands_still = false;
        book.goes_on = false;
        self.book.turned.notify_all();
    }

    /// The same; from a request on, everything stands still until this starts over again.
    pub fn start_over_until(&self, standstill: Standstill) {
        self.start_over([]);
        self.book.book.lock().unwrap().standstill = Some(standstill);
    }

    /// What stands still is passed on, and all that comes.
    pub fn go_on(&self) {
        let mut book = self.book.book.lock().unwrap();
        book.standstill = None;
        book.goes_on = true;
        self.book.turned.notify_all();
    }

    /// Waits a moment for the standstill to be reached; whether it is.
    pub fn stands_still(&self) -> bool {
        let moment = Duration::from_millis(20);
        let book = self.book.book.lock().unwrap();
        let moving = |book: &mut Book| !book.stands_still;
        let (book, _) = self
            .book
            .turned
            .wait_timeout_while(book, moment, moving)
            .unwrap();
        book.stands_still
    }

    pub fn passed(&self) -> Vec<Passed> {
        self.book.book.lock().unwrap().passed.clone()
    }

    /// What of the plan has come to pass.
    pub fn happened(&self) -> Vec<(usize, Mishap)> {
        self.book.book.lock().unwrap().happened.clone()
    }
}

/// A request or an answer: its first line, its other lines, its body.
struct Message {
    first: String,
    lines: Vec<String>,
    body: Vec<u8>,
}

impl Message {
    fn set_body(&mut self, body: String) {
        let is_length = |line: &String| line.to_ascii_lowercase().starts_with("content-length:");
        self.lines.retain(|line| !is_length(line));
        self.lines.push(format!("Content-Length: {}", body.len()));
        self.body = body.into_bytes();
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.lines.iter().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    fn head(&self, left_out: &str) -> Vec<u8> {
        let mut head = format!("{}\r\n", self.first);
        for line in &self.lines {
            let key = line.split(':').next().unwrap_or_default();
            if !key.eq_ignore_ascii_case(left_out) {
                head.push_str(line);
                head.push_str("\r\n");
            }
        }
        head.push_str("\r\n");
        head.into_bytes()
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn read_head(from: &mut impl BufRead) -> io::Result<Option<Message>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if from.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let line = line.trim_end().to_string();
        match (line.is_empty(), lines.is_empty()) {
            (true, true) => {}
            (true, false) => break,
            (false, _) => lines.push(line),
        }
    }
    let first = lines.remove(0);
    Ok(Some(Message {
        first,
        lines,
        body: Vec::new(),
    }))
}

fn read_body(from: &mut impl BufRead, message: &mut Message) -> io::Result<()> {
    let chunked = message
        .header("transfer-encoding")
        .is_some_and(|coding| coding.eq_ignore_ascii_case("chunked"));
    if chunked {
        loop {
            let mut size = String::new();
            from.read_line(&mut size)?;
            let size = usize::from_str_radix(size.trim(), 16).map_err(|_| broken("a chunk"))?;
            let start = message.body.len();
            message.body.resize(start + size, 0);
            from.read_exact(&mut message.body[start..])?;
            from.read_line(&mut String::new())?;
            if size == 0 {
                break;
            }
        }
        // From here on it has a length.
        message
            .lines
            .retain(|line| !line.to_ascii_lowercase().starts_with("transfer-encoding:"));
        message
            .lines
            .push(format!("Content-Length: {}", message.body.len()));
        return Ok(());
    }
    let length = message
        .header("content-length")
        .map_or(Ok(0), |length| length.parse::<usize>())
        .map_err(|_| broken("a length"))?;
    message.body.resize(length, 0);
    from.read_exact(&mut message.body)
}

impl Shared {
    /// Holds a request until all goes on; whether it does. Where it starts over, the connection ends.
    fn hold(&self, has_reached_it: bool) -> bool {
        let mut book = self.book.lock().unwrap();
        if has_reached_it {
            book.stands_still = true;
            self.turned.notify_all();
        }
        let lasts = |book: &mut Book| book.standstill.is_some();
        self.turned.wait_while(book, lasts).unwrap().goes_on
    }
}

fn serve(client: TcpStream, server: &str, shared: &Shared, habits: &Habits) -> io::Result<()> {
    client.set_nodelay(true)?;
    let mut to_client = client.try_clone()?;
    let mut from_client = BufReader::new(client);
    let to_server = TcpStream::connect(server)?;
    to_server.set_nodelay(true)?;
    let mut from_server = BufReader::new(to_server.try_clone()?);
    let mut to_server = to_server;
    while let Some(mut request) = read_head(&mut from_client)? {
        if request.header("expect").is_some() {
            to_client.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        read_body(&mut from_client, &mut request)?;
        let mut words = request.first.split(' ');
        let method = words.next().unwrap_or_default().to_string();
        let target = words.next().unwrap_or_default().to_string();
        let (number, mishap, standstill) = {
            let mut book = shared.book.lock().unwrap();
            let number = book.passed.len();
            book.passed.push(Passed {
                method: method.clone(),
                target: target.clone(),
                body_bytes: request.body.len(),
                answer_bytes: 0,
            });
            let mishap = book.plan.get(&number).copied();
            book.happened.extend(mishap.map(|mishap| (number, mishap)));
            (
                number,
                mishap,
                book.standstill.filter(|still| number >= still.at),
            )
        };
        let deletes_many = passed_deletes_many(&method, &target);
        let is_last = standstill.is_some_and(|still| number == still.at && still.applied);
        if let (Some(still), false) = (standstill, is_last)
            && !shared.hold(number == still.at)
        {
            return Ok(());
        }
        match mishap {
            Some(Mishap::LostBefore) => return Ok(()),
            Some(Mishap::Status(_) | Mishap::Skewed) => {
                let (status, code) = match mishap {
                    Some(Mishap::Status(status)) => (status, "Mishap"),
                    _ => (403, "RequestTimeTooSkewed"),
                };
                let body =
                    format!("<Error><Code>{code}</Code><Message>on purpose</Message></Error>");
                let length = match method.as_str() {
                    "HEAD" => 0,
                    _ => body.len(),
                };
                let head = format!(
                    "HTTP/1.1 {status} Mishap\r\nContent-Type: application/xml\r\n\
                     Content-Length: {length}\r\n\r\n"
                );
                to_client.write_all(head.as_bytes())?;
                to_client.write_all(&body.as_bytes()[..length])?;
                continue;
            }
            Some(Mishap::Undone) if deletes_many => {
                let lines = parts(&request.text(), "Object");
                let mut answer = Message {
                    first: "HTTP/1.1 200 OK".to_string(),
                    lines: vec!["Content-Type: application/xml".to_string()],
                    body: Vec::new(),
                };
                answer.set_body(half_told(&lines, |_| false));
                to_client.write_all(&answer.head(""))?;
                to_client.write_all(&answer.body)?;
                continue;
            }
            Some(Mishap::Late) => {
                let whole = [request.head("expect"), request.body].concat();
                let mut book = shared.book.lock().unwrap();
                book.late.insert((method, target), whole);
                return Ok(());
            }
            _ => {}
        }
        let late = {
            let mut book = shared.book.lock().unwrap();
            book.late.remove(&(method.clone(), target.clone()))
        };
        let late = late.map(|whole| {
            let server = server.to_string();
            thread::spawn(move || {
                let mut to_server = TcpStream::connect(server)?;
                to_server.write_all(&whole)?;
                read_head(&mut BufReader::new(to_server))
            })
        });
        let is_conditional = request.header("if-none-match").is_some();
        let turn = habits.turn.as_ref().filter(|_| is_conditional);
        let turn = turn.map(|turn| turn.lock().unwrap());
        to_server.write_all(&request.head("expect"))?;
        to_server.write_all(&request.body)?;
        let mut answer = loop {
            let answer =
                read_head(&mut from_server)?.ok_or_else(|| broken("the server hung up"))?;
            if !answer.first.starts_with("HTTP/1.1 100") {
                break answer;
            }
        };
        let status = answer.first.split(' ').nth(1).unwrap_or_default();
        if method != "HEAD" && !matches!(status, "204" | "304") {
            read_body(&mut from_server, &mut answer)?;
        }
        if let Some(passed) = shared.book.lock().unwrap().passed.get_mut(number) {
            passed.answer_bytes = answer.body.len();
        }
        drop(turn);
        if let Some(late) = late {
            late.join().unwrap()?;
        }
        if is_last && !shared.hold(true) {
            return Ok(());
        }
        if habits.hides_locks {
            let tells = |line: &String| line.to_ascii_lowercase().starts_with("x-amz-object-lock-");
            answer.lines.retain(|line| !tells(line));
        }
        if mishap == Some(Mishap::HalfTold) && deletes_many {
            let lines = parts(&answer.text(), "Deleted");
            answer.set_body(half_told(&lines, |at| at % 3 == 0));
        }
        if mishap == Some(Mishap::CutShort) {
            let text = answer.text();
            let ends = ["</Contents>", "</Version>", "</DeleteMarker>", "</Upload>"];
            let ends = ends
                .iter()
                .filter_map(|end| Some(text.find(end)? + end.len()));
            if let Some(first) = ends.min() {
                answer.set_body(text[..first].to_string());
            }
        }
        let whole = [answer.head(""), answer.body.clone()].concat();
        let first = shared
            .book
            .lock()
            .unwrap()
            .first_answers
            .entry((method, target))
            .or_insert_with(|| whole.clone())
            .clone();
        let middle = answer.body.len() / 2;
        match mishap {
            Some(Mishap::LostAfter) => return Ok(()),
            Some(Mishap::Truncated) => {
                to_client.write_all(&answer.head(""))?;
                to_client.write_all(&answer.body[..middle])?;
                return Ok(());
            }
            Some(Mishap::Flipped) => {
                if let Some(byte) = answer.body.get_mut(middle) {
                    *byte ^= 0x10;
                }
                to_client.write_all(&answer.head(""))?;
                to_client.write_all(&answer.body)?;
            }
            Some(Mishap::Stale) => to_client.write_all(&first)?,
            _ => to_client.write_all(&whole)?,
        }
    }
    Ok(())
}
