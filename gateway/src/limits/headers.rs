//! `x-ratelimit-*`, as OpenAI's clients read them.

use crate::limits::gate::Level;
use hyper::HeaderMap;
use hyper::header::{HeaderName, HeaderValue};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What the tightest limits of a request are after it was let in, or refused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLevels {
    /// Of requests.
    pub requests: Option<Level>,
    /// Of tokens.
    pub tokens: Option<Level>,
}

impl RateLevels {
    /// Writes the headers of the limits that there are.
    pub fn write(&self, headers: &mut HeaderMap) {
        let names = [
            (self.requests, ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"]),
            (self.tokens, ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"]),
        ];
        for (level, [limit, remaining, reset]) in names {
            let Some(level) = level else { continue };
            headers.insert(HeaderName::from_static(limit), HeaderValue::from(level.limit));
            headers.insert(HeaderName::from_static(remaining), HeaderValue::from(level.remaining));
            if let Ok(text) = HeaderValue::try_from(spelt(level.reset)) {
                headers.insert(HeaderName::from_static(reset), text);
            }
        }
    }
}

/// A time as OpenAI spells it: `6m0s`, `1.5s`, `20ms`.
fn spelt(time: Duration) -> String {
    let ms = time.as_millis();
    match (ms / 60_000, ms % 60_000) {
        (0, ms) if ms < 1000 => format!("{ms}ms"),
        (0, ms) => format!("{}s", ms as f64 / 1000.0),
        (minutes, ms) => format!("{minutes}m{}s", ms / 1000),
    }
}

/// Where a request's levels are left for the response: an extension of every request that generates.
#[derive(Clone, Debug, Default)]
pub struct RateSlot(Arc<Mutex<RateLevels>>);

impl RateSlot {
    /// The levels are known.
    pub fn set(&self, levels: RateLevels) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = levels;
    }

    /// What is known.
    pub fn get(&self) -> RateLevels {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_spelt_as_clients_expect() {
        for (ms, text) in
            [(0, "0ms"), (20, "20ms"), (1000, "1s"), (1500, "1.5s"), (59_999, "59.999s"), (360_000, "6m0s"), (95_400, "1m35s")]
        {
            assert_eq!(spelt(Duration::from_millis(ms)), text);
        }
    }

    #[test]
    fn only_limits_that_there_are_have_headers() {
        let mut headers = HeaderMap::new();
        let requests = Some(Level { limit: 3, remaining: 2, reset: Duration::from_secs(20) });
        RateLevels { requests, tokens: None }.write(&mut headers);
        assert_eq!(headers.len(), 3);
        assert_eq!(headers["x-ratelimit-remaining-requests"], "2");
        assert_eq!(headers["x-ratelimit-reset-requests"], "20s");
    }
}
