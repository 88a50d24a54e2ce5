//! What a server or the way to it said, as a decision.

use crate::storage::{StorageError, StorageErrorKind};
use aws_sdk_s3::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use std::error::Error;
use std::fmt;

/// What others say is not repeated at length.
const SHOWN_CHARS: usize = 300;

pub(super) fn unsupported(name: impl fmt::Display, detail: impl fmt::Display) -> StorageError {
    StorageError::new(StorageErrorKind::Unsupported, name, detail)
}

pub(super) fn transient(name: impl fmt::Display, detail: impl fmt::Display) -> StorageError {
    StorageError::new(StorageErrorKind::Transient, name, detail)
}

/// The decision about a request that failed.
pub(super) fn told<E>(name: impl fmt::Display, error: &SdkError<E, HttpResponse>) -> StorageError
where
    E: ProvideErrorMetadata + Error + 'static,
{
    let (kind, detail) = match error {
        SdkError::ServiceError(service) => {
            let status = service.raw().status().as_u16();
            let code = error.code().unwrap_or_default();
            let message = error.message().unwrap_or_default();
            let hint = hint(status, code);
            (
                kind_of(status, code),
                format!("the server says {status} {code} {message}{hint}"),
            )
        }
        // Never sent: no credentials, an endpoint that is none.
        SdkError::ConstructionFailure(_) => (
            StorageErrorKind::Unsupported,
            DisplayErrorContext(error).to_string(),
        ),
        SdkError::DispatchFailure(failure) if failure.is_user() => (
            StorageErrorKind::Unsupported,
            DisplayErrorContext(error).to_string(),
        ),
        _ => (
            StorageErrorKind::Transient,
            DisplayErrorContext(error).to_string(),
        ),
    };
    StorageError::new(kind, name, shown(&detail))
}

/// Whether a request was refused for the time that it was signed with.
pub(super) fn is_skewed<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> bool {
    match error.code() {
        Some("RequestTimeTooSkewed") => true,
        // Garage has no code for it.
        Some("InvalidRequest") => error
            .message()
            .is_some_and(|message| message.contains("Date is too old")),
        _ => false,
    }
}

/// Whether the condition of a request was not met.
pub(super) fn is_condition_not_met<E>(error: &SdkError<E, HttpResponse>) -> bool {
    error
        .raw_response()
        .is_some_and(|response| response.status().as_u16() == 412)
}

pub(super) fn taken(name: impl fmt::Display) -> StorageError {
    StorageError::new(StorageErrorKind::AlreadyExists, name, "the name is taken")
}

/// <https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html>; the code counts where servers
/// differ in the status.
fn kind_of(status: u16, code: &str) -> StorageErrorKind {
    match (status, code) {
        (_, "QuotaExceeded" | "InsufficientStorage") | (507, _) => StorageErrorKind::Full,
        (_, "NoSuchBucket") => StorageErrorKind::Unsupported,
        // A conditional request met another one under way.
        (409, _) => StorageErrorKind::Transient,
        (_, "RequestTimeout" | "SlowDown" | "InternalError" | "IncompleteBody") => {
            StorageErrorKind::Transient
        }
        (404, _) => StorageErrorKind::NotFound,
        // To a request that sets no condition; where one is set, this is asked before.
        (412, _) => StorageErrorKind::Transient,
        // A range that begins beyond the end.
        (416, _) => StorageErrorKind::Corrupt,
        (401 | 403, _) => StorageErrorKind::Denied,
        (408 | 429, _) => StorageErrorKind::Transient,
        (501, _) => StorageErrorKind::Unsupported,
        (500..=599, _) => StorageErrorKind::Transient,
        _ => StorageErrorKind::Unsupported,
    }
}

fn hint(status: u16, code: &str) -> &'static str {
    match (status, code) {
        (_, "RequestTimeTooSkewed") => {
            " (this host's clock and the server's differ: set it by NTP)"
        }
        (_, "SignatureDoesNotMatch") => " (is the secret key the one of this access key?)",
        (_, "NoSuchBucket") => " (make the bucket first, and look at [repository] url)",
        (301, _) | (_, "PermanentRedirect" | "AuthorizationHeaderMalformed") => {
            " (is [repository.s3] region the bucket's?)"
        }
        _ => "",
    }
}

/// One line without control characters, cut short.
pub(super) fn shown(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(SHOWN_CHARS)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_s3::error::ErrorMetadata;
    use aws_sdk_s3::primitives::SdkBody;
    use aws_smithy_runtime_api::http::StatusCode;

    #[test]
    fn what_may_pass_is_transient_and_nothing_else_is() {
        for (status, code) in [
            (500, "InternalError"),
            (503, "SlowDown"),
            (503, ""),
            (502, "Bad Gateway"),
            (504, ""),
            (429, "TooManyRequests"),
            (408, ""),
            (400, "RequestTimeout"),
            (409, "ConditionalRequestConflict"),
            (409, "ConcurrentModification"),
        ] {
            assert_eq!(kind_of(status, code), StorageErrorKind::Transient, "{code}");
        }
        for (status, code, kind) in [
            (404, "NoSuchKey", StorageErrorKind::NotFound),
            (404, "", StorageErrorKind::NotFound),
            (404, "NoSuchBucket", StorageErrorKind::Unsupported),
            (412, "PreconditionFailed", StorageErrorKind::Transient),
            (416, "InvalidRange", StorageErrorKind::Corrupt),
            (403, "AccessDenied", StorageErrorKind::Denied),
            (403, "RequestTimeTooSkewed", StorageErrorKind::Denied),
            (403, "QuotaExceeded", StorageErrorKind::Full),
            (507, "", StorageErrorKind::Full),
            (501, "NotImplemented", StorageErrorKind::Unsupported),
            (400, "InvalidArgument", StorageErrorKind::Unsupported),
            (200, "", StorageErrorKind::Unsupported),
        ] {
            assert_eq!(kind_of(status, code), kind, "{status} {code}");
        }
    }

    #[test]
    fn each_server_says_in_its_own_words_that_a_time_is_too_far_from_its_own() {
        let refused = |code: &str, message: &str| {
            let error = ErrorMetadata::builder().code(code).message(message).build();
            let status = StatusCode::try_from(400).unwrap();
            let response = HttpResponse::new(status, SdkBody::empty());
            is_skewed(&SdkError::service_error(error, response))
        };
        assert!(refused("RequestTimeTooSkewed", ""));
        assert!(refused("InvalidRequest", "Bad request: Date is too old"));
        assert!(!refused("InvalidRequest", "Bad request"));
        assert!(!refused("AccessDenied", "Date is too old"));
    }

    #[test]
    fn a_servers_words_are_one_short_printable_line() {
        let hostile = format!("a\n\x1b[31m{}", "x".repeat(10_000));
        let told = shown(&hostile);
        assert!(told.len() <= SHOWN_CHARS && !told.chars().any(char::is_control));
    }
}
