//! Pages in the binary. They are static and open; what they show they fetch with the visitor's key.
//!
//! Nothing is loaded from elsewhere, and the policy says so to the browser: no inline script or style, no foreign host, no framing,
//! and no HTML from strings (`require-trusted-types-for`), so that text of a model cannot become markup.

use crate::http::App;
use axum::Router;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";

const FILES: [(&str, &str, &str); 9] = [
    ("/console/label", HTML, include_str!("label.html")),
    ("/console/queues", HTML, include_str!("queues.html")),
    ("/console/console.css", STYLE, include_str!("console.css")),
    ("/console/label.js", SCRIPT, include_str!("label.js")),
    ("/console/queues.js", SCRIPT, include_str!("queues.js")),
    ("/console/markdown.js", SCRIPT, include_str!("markdown.js")),
    ("/console/diff.js", SCRIPT, include_str!("diff.js")),
    ("/console/session.js", SCRIPT, include_str!("session.js")),
    ("/console/outbox.js", SCRIPT, include_str!("outbox.js")),
];

/// The pages' routes.
pub fn routes() -> Router<App> {
    let pages = FILES
        .into_iter()
        .fold(Router::new(), |router, (path, kind, text)| router.route(path, get(move || async move { file(kind, text) })));
    pages.route("/console", get(|| async { Redirect::temporary("/console/label") }))
}

/// Paths and content types of all files.
pub fn files() -> impl Iterator<Item = (&'static str, &'static str)> {
    FILES.into_iter().map(|(path, kind, _)| (path, kind))
}

fn file(kind: &'static str, text: &'static str) -> Response {
    let headers: [(HeaderName, HeaderValue); 5] = [
        (CONTENT_TYPE, HeaderValue::from_static(kind)),
        (CONTENT_SECURITY_POLICY, HeaderValue::from_static(POLICY)),
        (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        // The binary is replaced as a whole; a page of the old one must not meet a script of the new one.
        (CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    (headers, text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_load_nothing_from_elsewhere_and_never_write_html() {
        for (path, _, text) in FILES {
            for forbidden in [
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
                "src=\"http",
                "href=\"http",
                "@import",
            ] {
                assert!(!text.contains(forbidden), "{path} has {forbidden}");
            }
            assert!(!text.contains(" style=\"") && !text.contains(" onclick="), "{path} has inline style or script");
        }
    }
}
