use super::http::{HttpSettings, Poster};
use super::{Moment, NotifyError};
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue};

/// More is not kept by those who watch.
const MAX_BODY_BYTES: usize = 10_000;

/// A watcher that sounds when nothing is heard any more: what no program can say of itself. As
/// Healthchecks has it: a POST to the address when a job succeeded, to `/start` and `/fail` below it
/// when one began or failed.
pub struct Ping {
    poster: Poster,
}

impl Ping {
    pub fn new(settings: HttpSettings) -> Result<Self, NotifyError> {
        Ok(Ping {
            poster: Poster::new(settings)?,
        })
    }

    pub fn name(&self) -> String {
        self.poster.settings.name.clone()
    }

    /// Of a text that is too long, its end, where the outcome stands.
    pub fn ping(&self, moment: Moment, text: &str) -> Result<(), NotifyError> {
        let url = url_of(self.poster.settings.url.secret_text(), moment);
        let mut headers = HeaderMap::new();
        let plain = HeaderValue::from_static("text/plain; charset=utf-8");
        headers.insert(CONTENT_TYPE, plain);
        self.poster.post(&url, &headers, end_of(text).as_bytes())
    }
}

fn url_of(url: &str, moment: Moment) -> String {
    let below = match moment {
        Moment::Success => return url.to_string(),
        Moment::Start => "/start",
        Moment::Fail => "/fail",
    };
    let (path, query) = url.split_at(url.find('?').unwrap_or(url.len()));
    format!("{}{below}{query}", path.trim_end_matches('/'))
}

fn end_of(text: &str) -> &str {
    let mut start = text.len().saturating_sub(MAX_BODY_BYTES);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text.get(start..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_told_below_the_address_and_before_its_query() {
        let url = "https://hc-ping.com/5c0e";
        let moments = [Moment::Start, Moment::Success, Moment::Fail];
        assert_eq!(
            moments.map(|moment| url_of(url, moment)),
            [
                "https://hc-ping.com/5c0e/start",
                "https://hc-ping.com/5c0e",
                "https://hc-ping.com/5c0e/fail",
            ]
        );
        assert_eq!(
            url_of("https://hc.example/ping/k/vmkeep/?create=1", Moment::Fail),
            "https://hc.example/ping/k/vmkeep/fail?create=1"
        );
    }

    #[test]
    fn of_a_long_text_the_end_is_sent() {
        assert_eq!(end_of("short"), "short");
        let long = format!("{}end", "ä".repeat(MAX_BODY_BYTES));
        let sent = end_of(&long);
        assert!(sent.len() <= MAX_BODY_BYTES && sent.ends_with("end"));
    }
}
