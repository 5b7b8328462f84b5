//! Which web pages may call this server from a browser.

use axum::http::{HeaderName, HeaderValue, Method};
use std::time::Duration;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

/// What a page's script may read beside the body.
const EXPOSED: [&str; 10] = [
    "x-request-id",
    "openai-processing-ms",
    "retry-after",
    "x-should-retry",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
];
/// Browsers keep an answer to a preflight no longer than this.
const PREFLIGHT_AGE: Duration = Duration::from_secs(2 * 60 * 60);

/// The origins whose pages may call, such as `https://app.example.com`; `*` is every page. Empty is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origins(Vec<HeaderValue>);

impl Origins {
    /// Reads a list, separated by commas. The error says what is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let origins = text.split(',').map(str::trim).filter(|origin| !origin.is_empty()).map(origin);
        let origins = origins.collect::<Result<Vec<_>, _>>()?;
        if origins.len() > 1 && origins.iter().any(|origin| origin == "*") {
            return Err("`*` is every origin; name no other beside it".to_owned());
        }
        Ok(Self(origins))
    }

    /// Whether pages of this origin may call.
    pub fn name(&self, origin: Option<&HeaderValue>) -> bool {
        origin.is_some_and(|origin| self.0.iter().any(|own| own == "*" || own == origin))
    }

    /// Answers preflights and marks answers; `None` without origins. Keys travel in a header, never in a cookie, so that a page can
    /// only do what it has a key for.
    pub fn layer(&self) -> Option<CorsLayer> {
        let allowed = match &self.0[..] {
            [] => return None,
            [every] if every == "*" => AllowOrigin::any(),
            some => AllowOrigin::list(some.iter().cloned()),
        };
        let methods = [Method::GET, Method::POST, Method::PATCH, Method::DELETE];
        let layer = CorsLayer::new()
            .allow_origin(allowed)
            .allow_methods(methods)
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers(EXPOSED.map(HeaderName::from_static))
            .max_age(PREFLIGHT_AGE);
        Some(layer)
    }
}

/// Scheme, host and port, as browsers send them.
fn origin(text: &str) -> Result<HeaderValue, String> {
    let wrong = || format!("`{text}` is not an origin; write it like https://app.example.com, or `*` for every page");
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let plain = host.is_some_and(|host| !host.is_empty() && !host.contains(['/', '*', '@', ' ', '?', '#']));
    if text != "*" && !plain {
        return Err(wrong());
    }
    HeaderValue::from_str(&text.to_ascii_lowercase()).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_what_browsers_send() {
        let two = Origins::parse("https://App.example.com, http://localhost:3000").unwrap();
        assert_eq!(two.0, ["https://app.example.com", "http://localhost:3000"]);
        assert!(Origins::parse("*").unwrap().layer().is_some());
        assert!(Origins::parse("").unwrap().layer().is_none());
        for bad in ["app.example.com", "https://", "https://a.com/", "https://*.a.com", "*, https://a.com", "null"] {
            assert!(Origins::parse(bad).is_err(), "{bad}");
        }
    }
}
