//! One connection: HTTP/1.1 or HTTP/2, plain or over TLS, closed when nothing happens on it.

use crate::http::server::Bounds;
use crate::http::tls::Tls;
use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use hyper::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tower::ServiceExt;

/// Most bytes of a request's head; hyper answers 431 beyond.
const HEADER_BYTES: usize = 64 * 1024;
/// Requests that one HTTP/2 connection may have under way.
const STREAMS: u32 = 256;
/// HTTP/2 connections are asked this often whether someone is still there.
const PING_EVERY: Duration = Duration::from_secs(20);

/// How connections are spoken to.
#[derive(Clone)]
pub struct Speaker {
    router: Router,
    tls: Option<Tls>,
    bounds: Bounds,
    http: Arc<auto::Builder<TokioExecutor>>,
}

impl Speaker {
    /// With `tls`, nothing is answered in plain text.
    pub fn new(router: Router, bounds: Bounds, tls: Option<Tls>) -> Self {
        let mut http = auto::Builder::new(TokioExecutor::new());
        http.http1().timer(TokioTimer::new()).header_read_timeout(bounds.idle).max_buf_size(HEADER_BYTES);
        http.http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS)
            .max_header_list_size(HEADER_BYTES as u32)
            .keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_EVERY);
        Self { router, tls, bounds, http: Arc::new(http) }
    }

    /// Serves the connection to its end. Once `leave` is true, requests under way are still answered and no more are taken.
    pub async fn serve(self, stream: TcpStream, leave: watch::Receiver<bool>) {
        // Each event of a stream is a small write that must not wait for the next.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
        match &self.tls {
            None => self.speak(stream, leave).await,
            Some(tls) => match tokio::time::timeout(self.bounds.handshake, tls.acceptor().accept(stream)).await {
                Ok(Ok(stream)) => self.speak(stream, leave).await,
                Ok(Err(error)) => tracing::debug!(%error, "TLS handshake failed"),
                Err(_) => tracing::debug!("TLS handshake took too long"),
            },
        }
    }

    async fn speak<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(&self, stream: S, mut leave: watch::Receiver<bool>) {
        let activity = Activity::new();
        let service = service_fn(|request: Request<Incoming>| {
            let busy = activity.begin();
            let answer = self.router.clone().oneshot(request.map(Body::new));
            async move { answer.await.map(|response| response.map(|body| Body::new(BusyBody { body, _busy: busy }))) }
        });
        let mut connection = pin!(self.http.serve_connection(TokioIo::new(stream), service));
        let mut look = tokio::time::interval((self.bounds.idle / 4).max(Duration::from_millis(1)));
        let mut told = pin!(async { leave.wait_for(|left| *left).await.is_ok() });
        let mut closing = false;
        let result = loop {
            tokio::select! {
                result = connection.as_mut() => break result,
                _ = told.as_mut(), if !closing => {
                    connection.as_mut().graceful_shutdown();
                    closing = true;
                }
                _ = look.tick() => {
                    let quiet = activity.quiet();
                    if quiet > 2 * self.bounds.idle {
                        // It was told to close and does not.
                        return;
                    }
                    if quiet > self.bounds.idle {
                        connection.as_mut().graceful_shutdown();
                        closing = true;
                    }
                }
            }
        };
        if let Err(error) = result {
            // A client that went away, or sent what is not HTTP.
            tracing::debug!(%error, "connection ended");
        }
    }
}

/// What happens on a connection.
#[derive(Clone)]
struct Activity(Arc<Requests>);

struct Requests {
    under_way: AtomicUsize,
    last: Mutex<Instant>,
}

/// A request under way, until its answer's last byte was handed over or dropped.
struct Busy(Activity);

impl Activity {
    fn new() -> Self {
        Self(Arc::new(Requests { under_way: AtomicUsize::new(0), last: Mutex::new(Instant::now()) }))
    }

    fn begin(&self) -> Busy {
        self.0.under_way.fetch_add(1, Ordering::AcqRel);
        Busy(self.clone())
    }

    /// How long no request has been under way.
    fn quiet(&self) -> Duration {
        if self.0.under_way.load(Ordering::Acquire) > 0 {
            return Duration::ZERO;
        }
        self.0.last.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let Requests { under_way, last } = &*self.0.0;
        *last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        under_way.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A body that keeps its request under way.
struct BusyBody {
    body: Body,
    _busy: Busy,
}

impl http_body::Body for BusyBody {
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
