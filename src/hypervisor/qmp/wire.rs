//! Messages of the QEMU Machine Protocol: one JSON object a line. No I/O.

use super::QmpError;
use serde_json::Value;

/// Longest line that is read. The longest honest ones are answers to `query-named-block-nodes`:
/// some 2 KiB a node.
pub(super) const MAX_LINE_BYTES: usize = 8 << 20;
/// Most values in a line: once built, a value takes up to a hundred times its bytes.
const MAX_VALUES: usize = 1 << 17;

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Message {
    Greeting,
    Return {
        id: Option<u64>,
        value: Value,
    },
    Error {
        id: Option<u64>,
        detail: String,
    },
    /// Something happened in the VM; whoever wants to know asks for the state.
    Event {
        name: String,
    },
}

/// A command as it is sent, with its final line feed.
pub(super) fn command(name: &str, id: u64, arguments: &Value) -> String {
    let mut message = serde_json::json!({ "execute": name, "id": id });
    if !arguments.is_null() {
        message["arguments"] = arguments.clone();
    }
    format!("{message}\n")
}

/// Reads one line. Its text may be anything; at most [`MAX_LINE_BYTES`] are passed.
pub(super) fn parse(line: &[u8]) -> Result<Message, QmpError> {
    let broken = |detail: &str| QmpError::Protocol(detail.to_string());
    // Each value but the first has one of these before it.
    let values = line
        .iter()
        .filter(|byte| matches!(byte, b',' | b'[' | b'{'));
    if values.count() > MAX_VALUES {
        return Err(broken("a line of too many values"));
    }
    let mut message: Value =
        serde_json::from_slice(line).map_err(|_| broken("a line that is not JSON"))?;
    let Some(fields) = message.as_object_mut() else {
        return Err(broken("a message that is not an object"));
    };
    let id = match fields.get("id") {
        None => None,
        Some(id) => Some(
            id.as_u64()
                .ok_or_else(|| broken("an answer to a command that was never sent"))?,
        ),
    };
    if let Some(value) = fields.remove("return") {
        return Ok(Message::Return { id, value });
    }
    if let Some(error) = fields.get("error") {
        return Ok(Message::Error {
            id,
            detail: text(error, "desc"),
        });
    }
    if fields.contains_key("event") {
        return Ok(Message::Event {
            name: text(&message, "event"),
        });
    }
    match fields.contains_key("QMP") {
        true => Ok(Message::Greeting),
        false => Err(broken("a message of an unknown kind")),
    }
}

/// A text of the peer, fit to be printed.
fn text(value: &Value, key: &str) -> String {
    value
        .get(key)
        .and_then(Value::as_str)
        .unwrap_or_default()
        .chars()
        .filter(|letter| !letter.is_control())
        .take(400)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn the_four_kinds_of_messages_are_told_apart() {
        let cases = [
            (r#"{"QMP":{"version":{}}}"#, Message::Greeting),
            (
                r#"{"return":{"a":1},"id":7}"#,
                Message::Return {
                    id: Some(7),
                    value: json!({"a":1}),
                },
            ),
            (
                r#"{"error":{"class":"GenericError","desc":"no\nway"},"id":2}"#,
                Message::Error {
                    id: Some(2),
                    detail: "noway".to_string(),
                },
            ),
            (
                r#"{"event":"STOP","timestamp":{"seconds":1}}"#,
                Message::Event {
                    name: "STOP".to_string(),
                },
            ),
        ];
        for (line, expected) in cases {
            assert_eq!(parse(line.as_bytes()).unwrap(), expected, "{line}");
        }
        for bad in [
            "",
            "[]",
            "7",
            "{}",
            r#"{"return":1,"id":"x"}"#,
            "{\"return\":",
        ] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_line_whose_values_would_fill_the_memory_is_refused_before_they_are_built() {
        for part in ["{\"\":0},", "[],", "0,"] {
            let line = format!("{{\"return\":[{}0]}}", part.repeat(MAX_LINE_BYTES / 10));
            let Err(QmpError::Protocol(detail)) = parse(line.as_bytes()) else {
                panic!("{part} was built");
            };
            assert!(detail.contains("too many values"), "{part}: {detail}");
        }
    }

    proptest! {
        #[test]
        fn no_line_makes_the_parser_panic(line in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&line);
        }
    }
}
