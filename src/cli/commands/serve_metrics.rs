use crate::cli::answer::Answer;
use crate::cli::args::ServeMetricsArgs;
use crate::cli::exit::{Exit, Failure};
use crate::cli::invocation::Invocation;
use crate::cli::metrics;
use crate::cli::overview::Overview;
use crate::cli::site::Site;
use serde_json::json;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A scrape opens every customer; who asks more often gets the same again.
const HOLDS: Duration = Duration::from_secs(30);
/// A client that sends or takes nothing for so long is let go.
const PATIENCE: Duration = Duration::from_secs(5);
const MAX_REQUEST_BYTES: u64 = 8 << 10;
/// How soon a stop is noticed.
const NOTICE: Duration = Duration::from_millis(100);
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// One request a connection, one connection after the other: all there is to it, so no library of a web server.
pub fn run(invocation: &Invocation, args: &ServeMetricsArgs) -> Result<Answer, Failure> {
    // A mistake in the configuration is said at once.
    invocation.config()?;
    let refused = |error: io::Error| {
        Failure::new(Exit::Failed, format!("{}: {error}", args.listen))
            .hint("is something else listening there? another place: --listen ADDRESS:PORT")
    };
    let listener = TcpListener::bind(args.listen).map_err(refused)?;
    listener.set_nonblocking(true).map_err(refused)?;
    let at = listener.local_addr().map_err(refused)?;
    tracing::info!("metrics at http://{at}/metrics");
    invocation
        .terminal
        .notice(&format!("metrics at http://{at}/metrics\n"));
    let mut kept: Option<(Instant, String)> = None;
    while !invocation.stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((client, _)) => {
                let mut text = || {
                    let fresh = kept.as_ref().filter(|(at, _)| at.elapsed() < HOLDS);
                    match fresh {
                        Some((_, text)) => text.clone(),
                        None => {
                            let text = scrape(invocation);
                            kept = Some((Instant::now(), text.clone()));
                            text
                        }
                    }
                };
                if let Err(error) = answer(client, &mut text) {
                    tracing::debug!("a scrape ended early: {error}");
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(NOTICE),
            Err(error) => {
                tracing::warn!("a scrape was not taken: {error}");
                std::thread::sleep(NOTICE);
            }
        }
    }
    Ok(Answer::done("", json!({ "served": at.to_string() })))
}

fn scrape(invocation: &Invocation) -> String {
    match Site::open(invocation) {
        Ok(site) => {
            let overview = Overview::of(&site, site.host.now());
            metrics::text(&overview, site.host.folder().last_run().as_ref())
        }
        Err(failure) => metrics::text_of_failure(&failure),
    }
}

fn answer(client: TcpStream, text: &mut dyn FnMut() -> String) -> io::Result<()> {
    client.set_nonblocking(false)?;
    client.set_read_timeout(Some(PATIENCE))?;
    client.set_write_timeout(Some(PATIENCE))?;
    let mut head = BufReader::new((&client).take(MAX_REQUEST_BYTES));
    let mut first = String::new();
    head.read_line(&mut first)?;
    loop {
        let mut line = String::new();
        if head.read_line(&mut line)? == 0 || line.trim_end().is_empty() {
            break;
        }
    }
    let mut words = first.split_whitespace();
    let (status, content_type, body) = match (words.next(), words.next()) {
        (Some("GET" | "HEAD"), Some("/metrics")) => ("200 OK", CONTENT_TYPE, text()),
        (Some("GET" | "HEAD"), _) => (
            "404 Not Found",
            "text/plain",
            "the metrics are at /metrics\n".to_string(),
        ),
        _ => ("405 Method Not Allowed", "text/plain", String::new()),
    };
    let body_sent = if first.starts_with("HEAD") { "" } else { &body };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    (&client).write_all(head.as_bytes())?;
    (&client).write_all(body_sent.as_bytes())
}
