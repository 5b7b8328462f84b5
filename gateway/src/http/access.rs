//! Which key may use which route: the one place that says so.

use crate::http::auth::{Caller, lacking};
use axum::extract::{MatchedPath, Request};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::Method;
use tidemill_store::Scope;

/// Paths that need no key: probes, the API's description, and the console's pages, whose data does need one.
const OPEN: [&str; 6] = ["/health", "/ready", "/version", "/metrics", "/openapi.json", "/console"];

const CHAT: &[Scope] = &[Scope::Chat];
const FEEDBACK: &[Scope] = &[Scope::Feedback];
const LABEL: &[Scope] = &[Scope::Label];
const TRAIN: &[Scope] = &[Scope::Train];
const LOOK: &[Scope] = &[Scope::Look];
const ADMIN: &[Scope] = &[Scope::Admin];
/// Files are for batches and for fine-tuning.
const FILES: &[Scope] = &[Scope::Chat, Scope::Train];
/// Annotators and operators, each of whom is shown what they may know.
const LABELING: &[Scope] = &[Scope::Label, Scope::Train];
const TRAIN_OR_LOOK: &[Scope] = &[Scope::Train, Scope::Look];
/// Whatever scopes the key has.
const ANY: &[Scope] = &[];

/// A route and those below it, what a key needs to read there, and what to act; one of the scopes is enough. The first that fits counts.
const RULES: &[(&str, &[Scope], &[Scope])] = &[
    ("/v1/chat/completions", CHAT, CHAT),
    ("/v1/responses", CHAT, CHAT),
    ("/v1/completions", CHAT, CHAT),
    ("/v1/embeddings", CHAT, CHAT),
    ("/v1/moderations", CHAT, CHAT),
    ("/v1/messages", CHAT, CHAT),
    ("/v1/batches", CHAT, CHAT),
    ("/tokenize", CHAT, CHAT),
    ("/detokenize", CHAT, CHAT),
    ("/v1/files", FILES, FILES),
    ("/v1/models", ANY, TRAIN),
    ("/v1/feedback", FEEDBACK, FEEDBACK),
    ("/v1/labeling/queues/{queue}/next", LABEL, LABEL),
    ("/v1/labeling/queues/{queue}/undo", LABEL, LABEL),
    ("/v1/labeling/assignments", LABEL, LABEL),
    ("/v1/labeling/me", LABELING, LABELING),
    // What comes back from other tools speaks in the name of raters and sets gold verdicts: no annotator's key may.
    ("/v1/labeling/queues/{queue}/label-studio/import", FEEDBACK, FEEDBACK),
    ("/v1/labeling/queues/{queue}/label-studio/webhook", FEEDBACK, FEEDBACK),
    ("/v1/labeling/queues/{queue}/argilla/import", FEEDBACK, FEEDBACK),
    ("/v1/labeling/queues/{queue}", TRAIN, TRAIN),
    ("/v1/labeling/queues", LABELING, TRAIN),
    ("/v1/datasets", TRAIN_OR_LOOK, TRAIN),
    ("/v1/fine_tuning/jobs", TRAIN_OR_LOOK, TRAIN),
    ("/v1/fine_tuning/alpha", TRAIN, TRAIN),
    ("/v1/adapters", TRAIN_OR_LOOK, ADMIN),
    ("/v1/adapter_aliases", TRAIN_OR_LOOK, ADMIN),
    ("/v1/rollouts", LOOK, ADMIN),
    ("/v1/loops", LOOK, ADMIN),
    ("/v1/audit", LOOK, ADMIN),
    ("/v1/lineage", LOOK, ADMIN),
    ("/v1/console", LOOK, ADMIN),
];

/// Whether a path needs no key.
pub fn is_open(path: &str) -> bool {
    OPEN.iter().any(|open| is_under(path, open))
}

/// The scopes of which a key needs one for a route, as the router names it; none: every key may. What no rule names is the
/// administrator's.
pub fn scopes(method: &Method, route: &str) -> &'static [Scope] {
    if is_open(route) {
        return ANY;
    }
    let rule = RULES.iter().find(|(under, ..)| is_under(route, under));
    rule.map_or(ADMIN, |(_, read, act)| if method.is_safe() { read } else { act })
}

fn is_under(path: &str, under: &str) -> bool {
    path.strip_prefix(under).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Middleware behind authentication, over all routes: answers 403 to callers whose key lacks the scope.
pub async fn permit(request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or("", MatchedPath::as_str);
    let needed = scopes(request.method(), route);
    let caller = request.extensions().get::<Caller>();
    if needed.is_empty() || caller.is_some_and(|caller| needed.iter().any(|scope| caller.allows(*scope))) {
        return next.run(request).await;
    }
    lacking(needed).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_narrower_rule_counts_and_a_prefix_is_whole_parts() {
        let get = |route| scopes(&Method::GET, route);
        assert_eq!(get("/v1/labeling/queues/{queue}/next"), LABEL);
        assert_eq!(get("/v1/labeling/queues/{queue}/tasks"), TRAIN);
        assert_eq!(scopes(&Method::POST, "/v1/labeling/queues"), TRAIN);
        assert_eq!(get("/v1/modelsx"), ADMIN, "what no rule names");
        assert_eq!(get("/v1/models/{*id}"), ANY);
        assert!(is_open("/console/label") && is_open("/health") && !is_open("/healthy"));
        for (index, (under, ..)) in RULES.iter().enumerate() {
            let hidden = RULES[..index].iter().find(|(earlier, ..)| is_under(under, earlier));
            assert!(hidden.is_none(), "{under} is never asked, behind {hidden:?}");
        }
    }

    #[test]
    fn who_looks_acts_on_nothing() {
        for (under, read, act) in RULES {
            assert!(!act.contains(&Scope::Look), "{under}");
            let governed = [
                "/v1/rollouts",
                "/v1/loops",
                "/v1/audit",
                "/v1/lineage",
                "/v1/console",
                "/v1/adapters",
                "/v1/adapter_aliases",
                "/v1/datasets",
                "/v1/fine_tuning/jobs",
            ];
            assert_eq!(read.contains(&Scope::Look), governed.contains(under), "{under}");
        }
    }
}
