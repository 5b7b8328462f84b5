//! Copies of requests for a shadow's treatment, which nobody gets to see and nobody is to feel.
//!
//! A copy is asked when the person's own answer has been sent, when no engine here has anything else to do, behind everybody in line, on
//! nobody's account, and not for longer than a few of its kind at once. As soon as anybody else asks an engine for anything, it is called
//! off. Whatever becomes of it is a record of the treatment's arm: one that was called off counts as an exposure and as nothing else.

use crate::http::app::App;
use crate::http::assigned::is_the_variants;
use crate::http::drain::InFlight;
use crate::http::error::ApiError;
use crate::http::generate::{Asked, enter};
use crate::http::limits::off_path;
use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use metrics::counter;
use serde_json::Value;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio::time::{Instant, sleep, timeout};

/// How long a copy waits for the engines to have nothing to do.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long its answer may take.
const LONGEST: Duration = Duration::from_secs(120);
/// How often a copy looks whether it is in the way.
const LOOK: Duration = Duration::from_millis(10);

/// A copy that may be made.
pub struct ShadowCopy {
    /// The treatment, and what its answer counts for.
    pub asked: Asked,
    /// As the treatment is to be asked.
    pub body: Value,
    /// Its place among the copies.
    pub place: OwnedSemaphorePermit,
}

/// Why there is no answer to a copy.
enum Off {
    /// It is the treatment's.
    Failed,
    /// It was in the way, or too late.
    Called,
    /// The same, once another server had been asked: that is recorded already.
    Recorded,
}

impl ShadowCopy {
    /// There is no answer that it could follow.
    pub fn is_not_made(&self) {
        if let Some(assigned) = &self.asked.assigned {
            assigned.called_off(&self.asked);
        }
    }

    /// Asks the treatment once the response has been sent.
    pub fn after<T, F>(
        self,
        response: Response,
        prepare: impl Fn(Asked, Value) -> Result<T, ApiError> + Send + 'static,
        run: impl Fn(T, InFlight) -> F + Send + Sync + 'static,
    ) -> Response
    where
        T: Send + 'static,
        F: Future<Output = Result<Response, ApiError>> + Send + 'static,
    {
        response.map(|body| {
            // The task begins here, so that a body that is dropped where there is no runtime any more starts nothing.
            let (sent, is_sent) = oneshot::channel::<()>();
            tokio::spawn(async move {
                // Sent, or broken off: the person has left either way.
                let _ = is_sent.await;
                self.make(prepare, run).await;
            });
            Body::new(Watched { body, _sent: sent })
        })
    }

    async fn make<T, F>(
        self,
        prepare: impl Fn(Asked, Value) -> Result<T, ApiError> + Send + 'static,
        run: impl Fn(T, InFlight) -> F + Send + Sync + 'static,
    ) where
        T: Send + 'static,
        F: Future<Output = Result<Response, ApiError>> + Send + 'static,
    {
        let Self { asked, body, place: _place } = self;
        let (app, assigned) = (asked.app.clone(), asked.assigned.clone());
        let told = asked.clone();
        let outcome = answer(&app, asked, body, prepare, run).await;
        let word = match &outcome {
            Ok(()) => "answered",
            Err(Off::Failed) => "failed",
            Err(Off::Called | Off::Recorded) => "called_off",
        };
        counter!("tidemill:shadow_copies_total", "outcome" => word).increment(1);
        match (outcome, assigned) {
            (Err(Off::Failed), Some(assigned)) => assigned.failed(&told),
            (Err(Off::Called), Some(assigned)) => assigned.called_off(&told),
            _ => {}
        }
    }
}

async fn answer<T, F>(
    app: &App,
    asked: Asked,
    body: Value,
    prepare: impl Fn(Asked, Value) -> Result<T, ApiError> + Send + 'static,
    run: impl Fn(T, InFlight) -> F + Send + Sync + 'static,
) -> Result<(), Off>
where
    T: Send + 'static,
    F: Future<Output = Result<Response, ApiError>> + Send + 'static,
{
    let is_ours = asked.assigned.as_ref().is_none_or(|assigned| app.registry.remote(&assigned.variant.model).is_none());
    let mirrors = app.rollouts.mirrors();
    let end = Instant::now() + PATIENCE;
    while is_ours && mirrors.are_in_the_way(&app.registry) {
        if Instant::now() >= end || app.drain.is_draining() {
            return Err(Off::Called);
        }
        sleep(LOOK).await;
    }
    // A server that has no place for a copy, or is left alone, was not asked.
    let was_asked = |error: &ApiError| error.code.as_deref() != Some("upstream_unavailable");
    let why = |error: ApiError| if is_the_variants(&error) && was_asked(&error) { Off::Failed } else { Off::Called };
    let in_flight = enter(app).map_err(why)?;
    let prepared = off_path(true, move || prepare(asked, body)).await.map_err(why)?.map_err(why)?;
    let _running = is_ours.then(|| mirrors.begin());
    let whole = async {
        let response = run(prepared, in_flight).await.map_err(why)?;
        response.into_body().collect().await.map(drop).map_err(|_| Off::Failed)
    };
    tokio::select! {
        done = timeout(LONGEST, whole) => done.unwrap_or(Err(called_off(is_ours))),
        () = disturbed(app, is_ours) => Err(called_off(is_ours)),
    }
}

/// A request to another server writes its record also when it is dropped.
fn called_off(is_ours: bool) -> Off {
    if is_ours { Off::Called } else { Off::Recorded }
}

/// Resolves when the server leaves or, for a copy at an engine here, somebody else wants one.
async fn disturbed(app: &App, is_ours: bool) {
    let mirrors = app.rollouts.mirrors();
    while !(app.drain.is_draining() || (is_ours && mirrors.are_in_the_way(&app.registry))) {
        sleep(LOOK).await;
    }
}

/// A body that tells when it is over.
struct Watched {
    body: Body,
    _sent: oneshot::Sender<()>,
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
