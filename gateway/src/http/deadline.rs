//! Until when an answer is of use, as the client or a proxy before it says.

use crate::http::error::ApiError;
use hyper::StatusCode;
use hyper::header::HeaderMap;
use std::time::{Duration, Instant};

/// Ours, and the one that Envoy sends to what is behind it. Both are whole milliseconds from the arrival of the request.
const HEADERS: [&str; 2] = ["x-request-timeout-ms", "x-envoy-expected-rq-timeout-ms"];
/// Nobody waits longer than a week; more is how some say never.
const LONGEST: u64 = 7 * 24 * 3_600_000;

/// The sooner of those that are sent. What is no number, or zero, is no deadline.
pub fn of(headers: &HeaderMap, arrived: Instant) -> Option<Instant> {
    let ms = |name: &&'static str| headers.get(*name)?.to_str().ok()?.trim().parse::<u64>().ok();
    let sent = HEADERS.iter().filter_map(ms).filter(|ms| *ms > 0).min();
    sent.filter(|ms| *ms <= LONGEST).and_then(|ms| arrived.checked_add(Duration::from_millis(ms)))
}

/// The time is over.
pub fn expired() -> ApiError {
    let message = "The deadline that the request came with has passed before the answer was complete.";
    ApiError {
        kind: "timeout_error",
        no_retry: true,
        ..ApiError::client(StatusCode::GATEWAY_TIMEOUT, Some("deadline_exceeded"), message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;

    #[test]
    fn the_sooner_deadline_counts_and_nonsense_is_none() {
        let now = Instant::now();
        let of = |sent: &[(&'static str, &'static str)]| {
            let headers = sent.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value))).collect();
            super::of(&headers, now).map(|deadline| (deadline - now).as_millis())
        };
        assert_eq!(of(&[("x-request-timeout-ms", "1500")]), Some(1500));
        assert_eq!(of(&[("x-request-timeout-ms", "1500"), ("x-envoy-expected-rq-timeout-ms", "900")]), Some(900));
        assert_eq!(of(&[("x-request-timeout-ms", "0"), ("x-envoy-expected-rq-timeout-ms", "7")]), Some(7));
        for none in ["", "soon", "-1", "0", "1.5", "99999999999999999999", "999999999999"] {
            assert_eq!(of(&[("x-request-timeout-ms", none)]), None, "{none}");
        }
    }
}
