//! Pages in the binary. They are static and open; what they show they fetch with the visitor's key.
//!
//! The annotators' page and the labeling queues draw what they get from the API. Operators' pages are one shell, whose part in the middle
//! is written here: a function of values ([`overview`], [`rollouts`], …), which the shell fetches as a document. Nothing is loaded from elsewhere, and the policy says
//! so to the browser: no inline script or style, no foreign host, no framing, and no HTML from strings (`require-trusted-types-for`), so that
//! text of a model cannot become markup. In parts the same is seen to by [`html`], which takes text as text.

pub mod adapters;
pub mod datasets;
pub mod html;
pub mod loops;
pub mod overview;
pub mod part;
pub mod playground;
pub mod rollouts;
pub mod sequence;
pub mod trainings;

use crate::console::html::{all, tag};
use crate::http::App;
use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use hyper::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use part::Part;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";

const SHELL: &str = include_str!("shell.html");

const PAGES: [(&str, &str); 14] = [
    ("/console", SHELL),
    ("/console/rollouts", SHELL),
    ("/console/rollouts/{rollout}", SHELL),
    ("/console/loops", SHELL),
    ("/console/loops/{name}", SHELL),
    ("/console/datasets", SHELL),
    ("/console/datasets/{reference}", SHELL),
    ("/console/trainings", SHELL),
    ("/console/trainings/{id}", SHELL),
    ("/console/adapters", SHELL),
    ("/console/adapters/{id}", SHELL),
    ("/console/playground", SHELL),
    ("/console/label", include_str!("label.html")),
    ("/console/queues", SHELL),
];

/// The operators' pages: where, the letter that goes there after G, and the name.
const PLACES: [(&str, &str, &str); 8] = [
    ("/console", "O", "Overview"),
    ("/console/rollouts", "R", "Rollouts"),
    ("/console/loops", "L", "Loops"),
    ("/console/datasets", "D", "Datasets"),
    ("/console/trainings", "T", "Training"),
    ("/console/adapters", "A", "Adapters"),
    ("/console/playground", "P", "Playground"),
    ("/console/queues", "Q", "Labeling"),
];

const FILES: [(&str, &str, &str); 10] = [
    ("/console/console.css", STYLE, include_str!("console.css")),
    ("/console/console.js", SCRIPT, include_str!("console.js")),
    ("/console/places.js", SCRIPT, include_str!("places.js")),
    ("/console/playground.js", SCRIPT, include_str!("playground.js")),
    ("/console/label.js", SCRIPT, include_str!("label.js")),
    ("/console/queues.js", SCRIPT, include_str!("queues.js")),
    ("/console/markdown.js", SCRIPT, include_str!("markdown.js")),
    ("/console/diff.js", SCRIPT, include_str!("diff.js")),
    ("/console/session.js", SCRIPT, include_str!("session.js")),
    ("/console/outbox.js", SCRIPT, include_str!("outbox.js")),
];

/// The pages' routes.
pub fn routes() -> Router<App> {
    let pages = PAGES.map(|(path, text)| (path, HTML, page(text)));
    let files = FILES.map(|(path, kind, text)| (path, kind, Bytes::from_static(text.as_bytes())));
    let all = pages.into_iter().chain(files);
    all.fold(Router::new(), |router, (path, kind, text)| router.route(path, get(move || async move { file(kind, text) })))
}

/// Paths and content types of all pages and files.
pub fn files() -> impl Iterator<Item = (&'static str, &'static str)> {
    PAGES.into_iter().map(|(path, _)| (path, HTML)).chain(FILES.into_iter().map(|(path, kind, _)| (path, kind)))
}

/// A part as it is sent.
pub fn sent(part: &Part) -> Response {
    let mut response = file(HTML, part.document().into());
    // It is about this moment, and for this key.
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// A page with what it shares with others: the head, the door where one signs in, who is there, the way between pages, and the list of keys.
fn page(text: &str) -> Bytes {
    let (before, after) = include_str!("help.html").split_once("<!-- keys -->\n").unwrap_or_default();
    let shared = [
        ("<!-- head -->\n", include_str!("head.html").to_owned()),
        ("<!-- door -->\n", include_str!("door.html").to_owned()),
        ("<!-- session -->\n", include_str!("session.html").to_owned()),
        ("<!-- places -->\n", places()),
        ("<!-- help -->\n", before.to_owned()),
        ("<!-- keys of places -->\n", keys_of_places()),
        ("<!-- /help -->\n", after.to_owned()),
    ];
    shared.into_iter().fold(text.to_owned(), |page, (place, part)| page.replace(place, &part)).into()
}

/// The links at the top of the operators' pages.
fn places() -> String {
    let link =
        |(path, key, name): (&str, &str, &str)| tag("a").attr("href", path).attr("data-key", key.to_lowercase()).with(name);
    let brand = tag("a").class("brand").attr("href", "/console");
    let brand = brand.with(tag("span").class("wave").attr("aria-hidden", "true")).with("Tidemill");
    let links = tag("nav").class("places").attr("id", "places").attr("aria-label", "Console").flag("hidden", true);
    all([brand, links.with_all(PLACES.map(link))]).as_str().to_owned() + "\n"
}

/// The keys that go to them.
fn keys_of_places() -> String {
    let key = |(_, key, name): (&str, &str, &str)| {
        let keys = tag("dt").with(tag("kbd").with("G")).with(" ").with(tag("kbd").with(key));
        tag("div").with(keys).with(tag("dd").with(name))
    };
    all(PLACES.map(key)).as_str().to_owned() + "\n"
}

fn file(kind: &'static str, text: Bytes) -> Response {
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
        let pages = PAGES.map(|(path, text)| (path, String::from_utf8(page(text).to_vec()).unwrap()));
        for (path, text) in &pages {
            assert!(text.starts_with("<!doctype html>") && text.ends_with("</html>\n"), "{path} is whole");
            for id in ["door-field", "who", "notice", "leave", "help"] {
                assert_eq!(text.matches(&format!(" id=\"{id}\"")).count(), 1, "{path} has one {id}");
            }
            assert!(!text.contains("<!-- "), "{path} has all that it shares");
            assert!(text.len() < 6_000, "{path} is small: {}", text.len());
        }
        let files = FILES.map(|(path, _, text)| (path, text.to_owned()));
        for (path, text) in pages.into_iter().chain(files) {
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
