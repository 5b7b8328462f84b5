//! Who is asking, and whether they may.

use crate::http::error::ApiError;
use crate::telemetry::Trail;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::Route;
use hyper::StatusCode;
use hyper::header::{AUTHORIZATION, HeaderValue, WWW_AUTHENTICATE};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tidemill_store::{ApiKey, Scope, Store, StoreError};
use tower::{Layer, Service};

/// Paths that need no key: probes, the API's description, and the console's pages, whose data does need one.
const OPEN: [&str; 6] = ["/health", "/ready", "/version", "/metrics", "/openapi.json", "/console"];

/// Tells callers apart. Cloning is cheap.
#[derive(Clone)]
pub struct Auth {
    store: Store,
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

    /// Whether the caller may do this.
    pub fn allows(&self, scope: Scope) -> bool {
        self.key.as_ref().map_or(self.open, |key| key.allows(scope))
    }

    /// The key's id, as records hold it.
    pub fn key_id(&self) -> Option<String> {
        self.key.as_ref().map(|key| key.id.to_string())
    }

    /// The key's name, which for annotators is theirs.
    pub fn name(&self) -> Option<&str> {
        self.key.as_ref().map(|key| key.name.as_str())
    }
}

impl Auth {
    /// Over a store. `closed`: demand a key from the first request on, as on an address that others reach.
    pub fn new(store: Store, closed: bool) -> Self {
        Self { store, closed: Arc::new(AtomicBool::new(closed)) }
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

    async fn caller(&self, authorization: Option<HeaderValue>) -> Result<Caller, ApiError> {
        if !self.closed().await? {
            return Ok(Caller { key: None, open: true });
        }
        let header = authorization.as_ref().map(HeaderValue::as_bytes).unwrap_or_default();
        let secret = match header.split_at_checked(7) {
            Some((scheme, secret)) if scheme.eq_ignore_ascii_case(b"bearer ") => {
                std::str::from_utf8(secret).unwrap_or_default().trim()
            }
            _ => "",
        };
        if secret.is_empty() {
            let message =
                "You did not provide an API key. Send it as `Authorization: Bearer KEY`; `tidemill key create` makes one.";
            return Err(unauthorized(message));
        }
        match self.store.find_key(secret).await.map_err(|error| unchecked(&error))? {
            Some(key) => Ok(Caller { key: Some(Arc::new(key)), open: false }),
            None => Err(unauthorized("Incorrect API key provided: it is unknown or revoked. `tidemill key create` makes one.")),
        }
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
pub async fn authenticate(State(auth): State<Auth>, mut request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let open = OPEN.iter().any(|open| path.strip_prefix(open).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')));
    let authorization = request.headers().get(AUTHORIZATION).cloned();
    let caller = if open { Ok(Caller { key: None, open: false }) } else { auth.caller(authorization).await };
    match caller {
        Ok(caller) => {
            if let Some(trail) = request.extensions().get::<Trail>() {
                trail.key(caller.key_id());
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

/// A layer for `route_layer`: answers 403 to callers whose key lacks the scope.
pub fn require(
    scope: Scope,
) -> impl Layer<
    Route,
    Service: Service<Request, Response: IntoResponse, Error: Into<Infallible>, Future: Send> + Clone + Send + Sync + 'static,
> + Clone
+ Send
+ Sync
+ 'static {
    from_fn_with_state(scope, check)
}

async fn check(State(scope): State<Scope>, request: Request, next: Next) -> Response {
    if request.extensions().get::<Caller>().is_some_and(|caller| caller.allows(scope)) {
        return next.run(request).await;
    }
    let message = format!(
        "This API key lacks the scope `{0}`. Use one that has it; `tidemill key create --name NAME --scope {0}` makes one.",
        scope.as_str()
    );
    ApiError::client(StatusCode::FORBIDDEN, Some("insufficient_permissions"), message).into_response()
}
