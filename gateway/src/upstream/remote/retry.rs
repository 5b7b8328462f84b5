//! What follows when a server gave no answer: another try, another model, or an error. Pure.

use crate::http::deadline;
use crate::http::error::ApiError;
use crate::upstream::remote::secret::without;
use hyper::StatusCode;
use std::borrow::Cow;
use std::time::Duration;

/// Before the second try; each further one waits twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// No pause is longer, whoever asks for it: a client waits.
const LONGEST_PAUSE: Duration = Duration::from_secs(4);
/// Characters of a server's message that are passed on.
const MOST_TEXT: usize = 2000;

/// Why a server gave no answer, or only a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// There is no connection.
    Connect(String),
    /// The first token did not come in time.
    SlowStart(Duration),
    /// The answer did not end in time.
    SlowEnd(Duration),
    /// The connection broke, or what came was no answer.
    Broken(String),
    /// An answer with an error.
    Status(Refused),
    /// The client's own deadline has passed.
    Deadline,
}

/// An error as a server says it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    /// HTTP status.
    pub status: u16,
    /// `error.message`.
    pub message: Option<String>,
    /// `error.param`.
    pub param: Option<String>,
    /// `error.code`.
    pub code: Option<String>,
    /// `Retry-After`.
    pub retry_after: Option<Duration>,
}

impl Refused {
    /// Of a status, the header and the body.
    pub fn read(status: u16, retry_after: Option<&str>, body: &[u8]) -> Self {
        let json: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
        Self { status, retry_after: retry_after.and_then(seconds), ..Self::of(&json) }
    }

    /// Of a body or a chunk with an `error`. vLLM's older form has the message at the top.
    pub fn of(json: &serde_json::Value) -> Self {
        let error = json.get("error").filter(|error| error.is_object()).unwrap_or(json);
        let text = |key: &str| error.get(key)?.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        let plain = || json.get("error")?.as_str().map(str::to_owned);
        Self { status: 0, message: text("message").or_else(plain), param: text("param"), code: text("code"), retry_after: None }
    }

    /// What may be passed on of it: without the key, whatever the server says, and not without end. In this order, so that no part of a key
    /// is left at the end.
    pub fn passable(mut self, key: Option<&str>) -> Self {
        for text in [&mut self.message, &mut self.param, &mut self.code].into_iter().flatten() {
            let discreet = key.map(|key| without(text, key));
            *text = discreet.as_ref().unwrap_or(text).chars().take(MOST_TEXT).collect();
        }
        self
    }
}

/// Whole or broken seconds; a date is as good as nothing.
fn seconds(text: &str) -> Option<Duration> {
    let seconds: f64 = text.trim().parse().ok()?;
    Duration::try_from_secs_f64(seconds).ok()
}

/// What is to be done after a failure before the first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Ask again after this time.
    Retry(Duration),
    /// Ask another model, or say what is wrong.
    GiveUp,
    /// No other model would do better: the request itself is wrong.
    Tell,
}

impl Failure {
    /// For the metric.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Connect(_) => "connect",
            Self::SlowStart(_) => "first_token_timeout",
            Self::SlowEnd(_) => "timeout",
            Self::Broken(_) => "broken",
            Self::Deadline => "deadline",
            Self::Status(Refused { status: 429, .. }) => "rate_limited",
            Self::Status(Refused { status: 401 | 403, .. }) => "key_refused",
            Self::Status(Refused { status: 400..=499, .. }) => "request_refused",
            Self::Status(_) => "server_error",
        }
    }

    /// The server is at fault, not the request and not the client's patience.
    pub fn blames_server(&self) -> bool {
        match self {
            Self::Deadline => false,
            Self::Status(refused) => !matches!(refused.status, 400 | 404 | 405 | 409 | 410 | 411 | 413..=417 | 422),
            _ => true,
        }
    }

    /// The request itself is wrong, and the server's words tell the client how.
    fn blames_request(&self) -> bool {
        matches!(self, Self::Status(Refused { status: 400 | 413 | 422, .. }))
    }

    /// Whether the same may help a moment later.
    fn may_pass(&self) -> bool {
        match self {
            Self::Connect(_) | Self::SlowStart(_) | Self::Broken(_) => true,
            Self::SlowEnd(_) | Self::Deadline => false,
            Self::Status(refused) => matches!(refused.status, 408 | 409 | 429 | 500..),
        }
    }

    /// What to do after the attempt with this number, from 0, of one that may be repeated `retries` times. `jitter` is drawn from 0 to
    /// below 1; `elsewhere`: another server is there that has not been asked.
    pub fn next(&self, attempt: u32, retries: u32, jitter: f64, elsewhere: bool) -> Next {
        if self.blames_request() {
            return Next::Tell;
        }
        if *self == Self::Deadline {
            return Next::Tell;
        }
        // A key that one server refuses may be another's; time that is over is over everywhere.
        if attempt >= retries || matches!(self, Self::SlowEnd(_)) || !(self.may_pass() || elsewhere) {
            return Next::GiveUp;
        }
        if elsewhere {
            return Next::Retry(Duration::ZERO);
        }
        let asked = match self {
            Self::Status(refused) => refused.retry_after.unwrap_or_default(),
            _ => Duration::ZERO,
        };
        if asked > LONGEST_PAUSE {
            return Next::GiveUp;
        }
        // Half is fixed and half is drawn, so that those who failed together do not come back together.
        let pause = FIRST_PAUSE.saturating_mul(1 << attempt.min(8)).min(LONGEST_PAUSE);
        Next::Retry(asked.max(pause.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0)))
    }

    /// What the client of the model `model` is told. Whatever a server says of keys is not passed on.
    pub fn tell(&self, model: &str) -> ApiError {
        let gateway = |status: StatusCode, code: &'static str, message: String| ApiError {
            kind: "upstream_error",
            ..ApiError::client(status, Some(code), message)
        };
        match self {
            Self::Deadline => deadline::expired(),
            Self::Connect(why) => {
                let message =
                    format!("The server that answers `{model}` cannot be reached ({why}). Send the request again later.");
                gateway(StatusCode::BAD_GATEWAY, "upstream_unreachable", message)
            }
            Self::SlowStart(time) => {
                let message =
                    format!("The server that answers `{model}` sent no first token within {time:?}. Send the request again.");
                gateway(StatusCode::GATEWAY_TIMEOUT, "upstream_timeout", message)
            }
            Self::SlowEnd(time) => {
                let message = format!("The server that answers `{model}` did not end its answer within {time:?}.");
                gateway(StatusCode::GATEWAY_TIMEOUT, "upstream_timeout", message)
            }
            Self::Broken(why) => {
                let message =
                    format!("The answer of the server that answers `{model}` broke off: {why}. Send the request again.");
                gateway(StatusCode::BAD_GATEWAY, "upstream_broken", message)
            }
            Self::Status(refused) => refused.tell(model),
        }
    }
}

impl Refused {
    fn tell(&self, model: &str) -> ApiError {
        let Self { status, message, param, code, retry_after } = self;
        let said = message.as_deref().unwrap_or("it gave no reason");
        let error = |status: StatusCode, kind, code: Option<Cow<'static, str>>, message: String| ApiError {
            kind,
            code,
            ..ApiError::client(status, None, message)
        };
        match status {
            400 | 413 | 422 => {
                let status = StatusCode::from_u16(*status).unwrap_or(StatusCode::BAD_REQUEST);
                let code = code.clone().map(Cow::Owned);
                let told = error(
                    status,
                    "invalid_request_error",
                    code,
                    format!("The server that answers `{model}` refused the request: {said}"),
                );
                ApiError { param: param.clone(), ..told }
            }
            429 => {
                let wait =
                    retry_after.map_or(1, |wait| u32::try_from(wait.as_millis().div_ceil(1000)).unwrap_or(u32::MAX).max(1));
                let message = format!("The server that answers `{model}` is at its rate limit. Please try again in {wait} s.");
                let code = Some(Cow::Borrowed("upstream_rate_limited"));
                ApiError { retry_after: Some(wait), ..error(StatusCode::TOO_MANY_REQUESTS, "requests", code, message) }
            }
            401 | 403 => {
                let message =
                    format!("The server that answers `{model}` refuses this gateway's key; its operator must set another one.");
                error(StatusCode::BAD_GATEWAY, "upstream_error", Some(Cow::Borrowed("upstream_key_refused")), message)
            }
            // An error in the middle of a stream has no status.
            0 => {
                let message = format!("The server that answers `{model}` reported an error: {said}");
                error(StatusCode::BAD_GATEWAY, "upstream_error", Some(Cow::Borrowed("upstream_error")), message)
            }
            other => {
                let message =
                    format!("The server that answers `{model}` answered {other}: {said}. Send the request again later.");
                error(StatusCode::BAD_GATEWAY, "upstream_error", Some(Cow::Borrowed("upstream_error")), message)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(status: u16) -> Failure {
        Failure::Status(Refused { status, ..Refused::default() })
    }

    #[test]
    fn pauses_grow_and_half_of_them_is_drawn() {
        let broken = Failure::Broken("x".into());
        let pause = |attempt, jitter| match broken.next(attempt, 99, jitter, false) {
            Next::Retry(pause) => pause.as_millis(),
            other => panic!("{other:?}"),
        };
        assert_eq!([pause(0, 0.0), pause(0, 1.0), pause(1, 1.0), pause(2, 0.0)], [125, 250, 500, 500]);
        assert_eq!(pause(60, 1.0), LONGEST_PAUSE.as_millis());
        assert_eq!(broken.next(0, 2, 0.5, true), Next::Retry(Duration::ZERO), "another server needs no pause");
        assert_eq!(broken.next(2, 2, 0.5, true), Next::GiveUp);
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        for (failure, again) in [
            (status(500), true),
            (status(503), true),
            (status(429), true),
            (status(408), true),
            (status(401), false),
            (status(404), false),
            (Failure::Connect("x".into()), true),
            (Failure::SlowStart(Duration::ZERO), true),
            (Failure::SlowEnd(Duration::ZERO), false),
        ] {
            assert_eq!(matches!(failure.next(0, 2, 0.0, false), Next::Retry(_)), again, "{failure:?}");
        }
        assert_eq!(status(401).next(0, 2, 0.0, true), Next::Retry(Duration::ZERO), "another server has another key");
        for wrong in [status(400), status(422), Failure::Deadline] {
            assert_eq!(wrong.next(0, 2, 0.0, true), Next::Tell, "{wrong:?}");
        }
    }

    #[test]
    fn a_pause_that_a_server_asks_for_is_kept_or_not_waited_for() {
        let asks = |seconds: &str| Failure::Status(Refused::read(429, Some(seconds), b""));
        assert_eq!(asks("2").next(0, 2, 0.0, false), Next::Retry(Duration::from_secs(2)));
        assert_eq!(asks("20").next(0, 2, 0.0, false), Next::GiveUp);
        assert_eq!(asks("20").tell("m").retry_after, Some(20));
        assert_eq!(asks("Wed, 21 Oct 2026 07:28:00 GMT").tell("m").retry_after, Some(1));
        for nonsense in ["-1", "nan", "1e300"] {
            assert_eq!(Refused::read(429, Some(nonsense), b"").retry_after, None);
        }
    }

    #[test]
    fn errors_are_read_in_the_forms_that_servers_have() {
        let body = br#"{"error":{"message":"no","type":"t","param":"messages","code":"bad"}}"#;
        let refused = Refused::read(400, None, body);
        assert_eq!(
            (refused.message.as_deref(), refused.param.as_deref(), refused.code.as_deref()),
            (Some("no"), Some("messages"), Some("bad"))
        );
        assert_eq!(Refused::read(400, None, br#"{"object":"error","message":"old"}"#).message.as_deref(), Some("old"));
        assert_eq!(Refused::read(400, None, br#"{"error":"plain"}"#).message.as_deref(), Some("plain"));
        assert_eq!(Refused::read(502, None, b"<html>").message, None);
        let long = format!(r#"{{"error":{{"message":"{}"}}}}"#, "é".repeat(9000));
        assert_eq!(Refused::read(400, None, long.as_bytes()).passable(None).message.unwrap().chars().count(), MOST_TEXT);
    }

    #[test]
    fn no_part_of_a_key_is_passed_on_not_even_where_a_long_message_is_cut() {
        let message = format!("{}sk-123456789 is wrong, and so is sk-123456789", "x".repeat(MOST_TEXT - 5));
        let body = serde_json::json!({"error": {"message": message, "param": "sk-123456789"}});
        let told = Refused::of(&body).passable(Some("sk-123456789"));
        assert_eq!(
            (told.message.unwrap().chars().skip(MOST_TEXT - 6).collect::<String>(), told.param.as_deref()),
            ("x… is ".into(), Some("…"))
        );
    }

    #[test]
    fn each_failure_has_its_status() {
        let codes = |failure: Failure| {
            let error = failure.tell("m");
            assert!(error.message.contains("`m`"), "{}", error.message);
            (error.status.as_u16(), error.code.unwrap_or_default().into_owned())
        };
        assert_eq!(codes(status(500)), (502, "upstream_error".into()));
        assert_eq!(codes(status(404)), (502, "upstream_error".into()));
        assert_eq!(codes(status(429)), (429, "upstream_rate_limited".into()));
        assert_eq!(codes(Failure::SlowStart(Duration::from_secs(1))), (504, "upstream_timeout".into()));
        assert_eq!(codes(Failure::Connect("refused".into())), (502, "upstream_unreachable".into()));
        let secret = Refused::read(401, None, br#"{"error":{"message":"Incorrect API key provided: sk-secret"}}"#);
        assert_eq!(codes(Failure::Status(secret.clone())), (502, "upstream_key_refused".into()));
        assert!(!Failure::Status(secret).tell("m").message.contains("sk-secret"));
    }

    #[test]
    fn a_wrong_request_is_no_fault_of_the_server() {
        assert!(!status(400).blames_server() && !status(404).blames_server() && !Failure::Deadline.blames_server());
        assert!(status(500).blames_server() && status(429).blames_server() && status(401).blames_server());
    }
}
