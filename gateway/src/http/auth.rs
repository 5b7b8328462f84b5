//! Who is asking, and whether they may.

use crate::clock::now;
use crate::http::access::is_open;
use crate::http::cors::Origins;
use crate::http::error::ApiError;
use crate::keys::{KeyRing, Known};
use crate::telemetry::Trail;
use crate::upstream::{LocalModel, Registry};
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use hyper::header::{AUTHORIZATION, HOST, HeaderName, HeaderValue, ORIGIN, WWW_AUTHENTICATE};
use hyper::{HeaderMap, Method, StatusCode};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tidemill_engine::Tenant;
use tidemill_store::{Actor, ApiKey, Scope, Store, StoreError, Tier, Viewer};

const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// How long a key that was seen is believed while the database is away, unless the configuration says otherwise.
pub const DEFAULT_GRACE: Duration = Duration::from_secs(3600);

/// Tells callers apart. Cloning is cheap.
#[derive(Clone)]
pub struct Auth {
    store: Store,
    ring: Arc<KeyRing>,
    /// Set for good by the first key: revoking the last one must not open a server that was closed.
    closed: Arc<AtomicBool>,
}

/// Who sent a request; an extension of every request that a handler sees.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The key that was sent; `None` on a server without keys.
    pub key: Option<Arc<ApiKey>>,
    /// There are no keys: whoever reaches the server may do everything.
    open: bool,
}

impl Caller {
    /// The caller of a request that passed [`authenticate`].
    pub fn of(request: &Request) -> Self {
        request.extensions().get::<Self>().cloned().unwrap_or(Self { key: None, open: false })
    }

    /// Whoever holds `key`, or anyone on a server without keys: for work that goes on after the request that began it.
    pub fn later(key: Option<Arc<ApiKey>>) -> Self {
        Self { open: key.is_none(), key }
    }

    /// The caller of a key's id, or of a server without keys, for the same; `None` when the key does not work any more.
    pub async fn of_key(store: &Store, id: Option<&str>) -> Result<Option<Self>, StoreError> {
        let Some(id) = id else { return Ok(Some(Self::later(None))) };
        let key = store.key(id).await?.filter(|key| !key.has_expired(now()));
        Ok(key.map(|key| Self::later(Some(Arc::new(key)))))
    }

    /// Whose files and batches the caller sees: all of them without keys and with an `admin` key, else those of the key.
    pub fn viewer(&self) -> Viewer {
        match &self.key {
            Some(key) if !key.allows(Scope::Admin) => Viewer::Key(key.id.to_string()),
            _ => Viewer::Anyone,
        }
    }

    /// Whether the caller may do this.
    pub fn allows(&self, scope: Scope) -> bool {
        self.key.as_ref().map_or(self.open, |key| key.allows(scope))
    }

    /// The key's id, as records hold it.
    pub fn key_id(&self) -> Option<String> {
        self.key.as_ref().map(|key| key.id.to_string())
    }

    /// Who shares a full engine with others: the key, or everybody who has none.
    pub fn tenant(&self) -> Tenant {
        // A key's id ends in bits that are as good as random, and begins with the time: all of it, folded.
        let fold = |key: &Arc<ApiKey>| {
            let (high, low) = key.id.as_u64_pair();
            Tenant { id: high.rotate_left(32) ^ low, weight: key.terms.weight }
        };
        self.key.as_ref().map_or_else(Tenant::default, fold)
    }

    /// The tier that a request gets that asks for `asked`, `None` being whatever the caller has. Nobody gets a more urgent one than
    /// the key has.
    pub fn tier(&self, asked: Option<Tier>) -> Tier {
        match &self.key {
            Some(key) => asked.unwrap_or(key.terms.tier).max(key.terms.tier),
            None => asked.unwrap_or_default(),
        }
    }

    /// Whose work the caller may look at: everybody's with the scope `look`, else as [`Self::viewer`].
    pub fn onlooker(&self) -> Viewer {
        if self.allows(Scope::Look) { Viewer::Anyone } else { self.viewer() }
    }

    /// Whether the caller may put its requests ahead of other callers'.
    pub fn may_hurry(&self) -> bool {
        self.allows(Scope::Admin)
    }

    /// The model of this name, or the first, if the caller may use it.
    pub fn model(&self, registry: &Registry, name: Option<&str>) -> Result<Arc<LocalModel>, ApiError> {
        // First of all: what exists here is not everybody's business.
        name.map_or(Ok(()), |name| self.check_model(name))?;
        let model = registry.find_local(name)?;
        self.check_model(model.name())?;
        Ok(model)
    }

    /// Fails on a model that is not among the key's.
    pub fn check_model(&self, model: &str) -> Result<(), ApiError> {
        if self.key.as_ref().is_none_or(|key| key.terms.allows_model(model)) {
            return Ok(());
        }
        let shown: String = model.chars().take(200).collect();
        let message = format!("This API key may not use the model `{shown}`. GET /v1/models lists those that it may use.");
        Err(ApiError {
            param: Some("model".into()),
            ..ApiError::client(StatusCode::FORBIDDEN, Some("model_not_allowed"), message)
        })
    }

    /// What the audit calls the caller.
    pub fn actor(&self) -> Actor {
        self.key.as_ref().map_or_else(|| "open server".into(), |key| Actor::of_key(key))
    }

    /// The key's name, which for annotators is theirs.
    pub fn name(&self) -> Option<&str> {
        self.key.as_ref().map(|key| key.name.as_str())
    }
}

impl Auth {
    /// Over a store. `closed`: demand a key from the first request on, as on an address that others reach.
    pub fn new(store: Store, closed: bool) -> Self {
        Self::with_grace(store, closed, DEFAULT_GRACE)
    }

    /// The same; `grace` is how long a key that was seen is believed while the database is away.
    pub fn with_grace(store: Store, closed: bool, grace: Duration) -> Self {
        Self { ring: Arc::new(KeyRing::new(store.clone(), grace)), store, closed: Arc::new(AtomicBool::new(closed)) }
    }

    /// Whether a key was needed when it was last looked at.
    pub fn has_keys(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Whether a key is needed. The store remembers keys for some seconds, so that neither question costs a query each time.
    async fn closed(&self) -> Result<bool, ApiError> {
        if self.closed.load(Ordering::Acquire) {
            return Ok(true);
        }
        let any = self.store.any_key().await.map_err(|error| unchecked(&error))?;
        if any {
            self.closed.store(true, Ordering::Release);
        }
        Ok(any)
    }

    async fn caller(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        if !self.closed().await? {
            return Ok(Caller { key: None, open: true });
        }
        let secret = secret(headers);
        if secret.is_empty() {
            let message =
                "You did not provide an API key. Send it as `Authorization: Bearer KEY`; `tidemill key create` makes one.";
            return Err(unauthorized(message));
        }
        match self.ring.find(secret, now()).await.map_err(|error| unchecked(&error))? {
            Known::Key(key) => Ok(Caller { key: Some(key), open: false }),
            Known::Expired => {
                Err(unauthorized("This API key has expired. `tidemill key rotate` or `tidemill key create` makes one."))
            }
            Known::Nobody => {
                let message = "Incorrect API key provided: it is unknown, revoked or expired. `tidemill key create` makes one.";
                Err(unauthorized(message))
            }
        }
    }
}

/// The key in `Authorization: Bearer KEY`, or in `x-api-key`, where Anthropic's clients put it; empty when there is none.
fn secret(headers: &HeaderMap) -> &str {
    let bearer = headers.get(AUTHORIZATION).and_then(|header| header.to_str().ok()?.split_at_checked(7));
    match bearer {
        Some((scheme, secret)) if scheme.eq_ignore_ascii_case("bearer ") => secret.trim(),
        _ => headers.get(API_KEY).and_then(|header| header.to_str().ok()).unwrap_or_default().trim(),
    }
}

fn unchecked(error: &StoreError) -> ApiError {
    tracing::error!(%error, "cannot look up a key");
    ApiError::unavailable(Some("keys_unavailable"), "The server cannot check API keys right now; send the request again.", 2)
}

fn unauthorized(message: &str) -> ApiError {
    ApiError::client(StatusCode::UNAUTHORIZED, Some("invalid_api_key"), message)
}

/// Middleware over all routes: lets a request through with its [`Caller`], or answers 401.
pub async fn authenticate(State((auth, origins)): State<(Auth, Origins)>, mut request: Request, next: Next) -> Response {
    // A request of this process, such as a batch's, brings its caller along; nothing that comes over a socket can.
    if let Some(caller) = request.extensions().get::<Caller>() {
        if let Some(trail) = request.extensions().get::<Trail>() {
            trail.key(caller.key_id());
        }
        return next.run(request).await;
    }
    let caller =
        if is_open(request.uri().path()) { Ok(Caller { key: None, open: false }) } else { auth.caller(request.headers()).await };
    match caller {
        Ok(caller) => {
            if let Some(trail) = request.extensions().get::<Trail>() {
                trail.key(caller.key_id());
            }
            let welcome = origins.name(request.headers().get(ORIGIN));
            let refused = foreign(
                request.method(),
                request.uri().authority().map(|authority| authority.as_str()),
                request.headers(),
                welcome,
            );
            if let Some(error) = refused.filter(|_| caller.open) {
                return error.into_response();
            }
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => {
            let unauthorized = error.status == StatusCode::UNAUTHORIZED;
            let mut response = error.into_response();
            if unauthorized {
                response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            response
        }
    }
}

/// 403 for a key without the scope.
pub fn forbidden(scope: Scope) -> ApiError {
    lacking(&[scope])
}

/// 403 for a key that has none of these scopes.
pub fn lacking(scopes: &[Scope]) -> ApiError {
    let words: Vec<String> = scopes.iter().map(|scope| format!("`{}`", scope.as_str())).collect();
    let message = format!(
        "This API key lacks the scope {}. Use one that has it; `tidemill key create --name NAME --scope {}` makes one.",
        words.join(" or "),
        scopes.last().map_or("admin", |scope| scope.as_str())
    );
    ApiError::client(StatusCode::FORBIDDEN, Some("insufficient_permissions"), message)
}

/// Why a server without keys refuses a request: a page of some website has the visitor's browser send it. Such a page reaches whatever
/// listens on the visitor's machine, either across origins, or under a name of its own that it had resolve to this machine. An API key
/// keeps both out; here only the headers do that a page cannot set.
///
/// `authority` is the host, with its port, that HTTP/2 names instead of the header. `welcome`: the configuration names the page's origin.
fn foreign(method: &Method, authority: Option<&str>, headers: &HeaderMap, welcome: bool) -> Option<ApiError> {
    let text = |name| headers.get(name).map(|value: &HeaderValue| value.to_str().unwrap_or("?"));
    let address = text(HOST).or(authority);
    if let Some(host) = address.map(host_of).filter(|host| !names_this_network(host)) {
        let shown: String = host.chars().take(100).collect();
        let message = format!(
            "This server has no API keys, so it answers only under an address or a local name, not as '{shown}'; `tidemill key create` makes a key."
        );
        return Some(ApiError::client(StatusCode::FORBIDDEN, Some("foreign_host"), message));
    }
    let across = match (text(SEC_FETCH_SITE), text(ORIGIN)) {
        // Also of another port of this machine: browsers call that the same site.
        (Some(site), _) => !matches!(site, "same-origin" | "none"),
        (None, Some(origin)) => {
            let own = origin.split_once("://").map(|(_, own)| own);
            !own.zip(address).is_some_and(|(own, address)| own.eq_ignore_ascii_case(address))
        }
        (None, None) => false,
    };
    // What is only read, a page of another origin does not get to see.
    let message = "This server has no API keys, so pages of other origins may not use it; name theirs with --cors-origins, or make a key with \
                   `tidemill key create`.";
    (across && !welcome && !method.is_safe()).then(|| ApiError::client(StatusCode::FORBIDDEN, Some("foreign_origin"), message))
}

/// `name` of `name:port`, and `::1` of `[::1]:port`.
fn host_of(authority: &str) -> &str {
    match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    }
}

/// An address, or a name that the public DNS does not answer: no website can have it.
fn names_this_network(host: &str) -> bool {
    let local = |end: &str| host.len() > end.len() && host.to_ascii_lowercase().ends_with(end);
    host.parse::<IpAddr>().is_ok() || !host.contains('.') || [".localhost", ".local", ".internal"].into_iter().any(local)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(method: Method, headers: &[(HeaderName, &'static str)]) -> Option<String> {
        let headers = headers.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value))).collect();
        foreign(&method, None, &headers, false).and_then(|error| error.code).map(|code| code.into_owned())
    }

    #[test]
    fn without_keys_a_server_answers_under_local_names_only() {
        for host in
            ["127.0.0.1:8080", "[::1]:8080", "192.168.1.4", "localhost:80", "LOCALHOST", "gateway", "host.docker.internal:1"]
        {
            assert_eq!(refused(Method::GET, &[(HOST, host)]), None, "{host}");
        }
        for host in ["evil.example:8080", "127.0.0.1.nip.io", "localhost.evil.example", ".internal.example", "a.b"] {
            assert_eq!(refused(Method::GET, &[(HOST, host)]).as_deref(), Some("foreign_host"), "{host}");
        }
        assert_eq!(refused(Method::POST, &[]), None);
    }

    #[test]
    fn what_http_2_names_in_place_of_a_host_is_an_origins_with_its_port() {
        let headers = HeaderMap::from_iter([(ORIGIN, HeaderValue::from_static("http://localhost:8443"))]);
        for (authority, across) in [("localhost:8443", false), ("localhost", true), ("localhost:8080", true)] {
            assert_eq!(foreign(&Method::POST, Some(authority), &headers, false).is_some(), across, "{authority}");
        }
    }

    #[test]
    fn without_keys_pages_of_other_origins_change_nothing() {
        let host = (HOST, "localhost:8080");
        for (header, across) in [
            ((SEC_FETCH_SITE, "cross-site"), true),
            ((SEC_FETCH_SITE, "same-origin"), false),
            ((SEC_FETCH_SITE, "same-site"), true),
            ((SEC_FETCH_SITE, "none"), false),
            ((ORIGIN, "https://evil.example"), true),
            ((ORIGIN, "http://localhost.evil.example:8080"), true),
            ((ORIGIN, "null"), true),
            ((ORIGIN, "http://localhost:3000"), true),
            ((ORIGIN, "http://localhost"), true),
            ((ORIGIN, "http://LOCALHOST:8080"), false),
        ] {
            let expected = across.then_some("foreign_origin");
            assert_eq!(refused(Method::POST, &[host.clone(), header.clone()]).as_deref(), expected, "{header:?}");
            assert_eq!(refused(Method::GET, &[host.clone(), header.clone()]), None, "{header:?}");
        }
    }

    #[test]
    fn a_key_comes_as_a_bearer_or_by_itself() {
        let headers = |pairs: &[(HeaderName, &'static str)]| -> HeaderMap {
            pairs.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value))).collect()
        };
        for (pairs, expected) in [
            (&[(AUTHORIZATION, "Bearer a ")][..], "a"),
            (&[(AUTHORIZATION, "bearer a"), (API_KEY, "b")], "a"),
            (&[(API_KEY, "b")], "b"),
            (&[(AUTHORIZATION, "Basic a"), (API_KEY, "b")], "b"),
            (&[(AUTHORIZATION, "Basic a")], ""),
            (&[], ""),
        ] {
            assert_eq!(secret(&headers(pairs)), expected);
        }
    }
}
