//! Around every endpoint that generates: who is over a limit is told before the body is read, and every answer says what is left.

use crate::http::App;
use crate::http::auth::Caller;
use crate::limits::headers::RateSlot;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

/// Middleware.
pub async fn shed(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let slot = RateSlot::default();
    let caller = Caller::of(&request);
    let key = caller.key.as_deref();
    app.limits.refresh(key).await;
    if let Some(key) = key {
        let (checked, levels) = app.limits.glance(key);
        slot.set(levels);
        if let Err(error) = checked {
            let mut response = error.into_response();
            levels.write(response.headers_mut());
            return response;
        }
    }
    request.extensions_mut().insert(slot.clone());
    let mut response = next.run(request).await;
    slot.get().write(response.headers_mut());
    response
}
