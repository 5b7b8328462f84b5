//! One connection: HTTP/1.1 or HTTP/2, plain or over TLS, closed when nothing happens on it.

use crate::http::activity::Activity;
use crate::http::server::Bounds;
use crate::http::tls::Tls;
use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Version};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
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

/// What the server tells its connections.
#[derive(Clone)]
pub struct Told {
    /// Once true, requests under way are still answered and no more are taken.
    pub leave: watch::Receiver<bool>,
    /// While true, others wait for a place.
    pub full: watch::Receiver<bool>,
}

/// Resolves once others wait for a place and no request has been under way here for `bound`.
async fn superfluous(full: &mut watch::Receiver<bool>, activity: &Activity, bound: Duration) {
    loop {
        if full.wait_for(|full| *full).await.is_err() {
            return std::future::pending().await;
        }
        match bound.checked_sub(activity.quiet()) {
            None => return,
            Some(left) => tokio::time::sleep(left.max(Duration::from_millis(1))).await,
        }
    }
}

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

    /// Serves the connection to its end.
    pub async fn serve(self, stream: TcpStream, told: Told) {
        // Each event of a stream is a small write that must not wait for the next.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
        match &self.tls {
            None => self.speak(stream, told).await,
            Some(tls) => match tokio::time::timeout(self.bounds.handshake, tls.acceptor().accept(stream)).await {
                Ok(Ok(stream)) => self.speak(stream, told).await,
                Ok(Err(error)) => tracing::debug!(%error, "TLS handshake failed"),
                Err(_) => tracing::debug!("TLS handshake took too long"),
            },
        }
    }

    async fn speak<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(&self, stream: S, told: Told) {
        let Told { mut leave, mut full } = told;
        let (activity, several) = (Activity::default(), AtomicBool::new(false));
        let service = service_fn(|request: Request<Incoming>| {
            let busy = activity.begin();
            several.fetch_or(request.version() == Version::HTTP_2, Ordering::Relaxed);
            let answer = self.router.clone().oneshot(request.map(Body::new));
            async move { answer.await.map(|response| response.map(|body| Body::new(busy.answering(body)))) }
        });
        let mut connection = pin!(self.http.serve_connection(TokioIo::new(stream), service));
        let mut look = tokio::time::interval((self.bounds.idle.min(self.bounds.write) / 4).max(Duration::from_millis(1)));
        let mut told = pin!(async { leave.wait_for(|left| *left).await.is_ok() });
        let mut closing = false;
        let result = loop {
            tokio::select! {
                result = connection.as_mut() => break result,
                _ = told.as_mut(), if !closing => {
                    connection.as_mut().graceful_shutdown();
                    closing = true;
                }
                () = superfluous(&mut full, &activity, self.bounds.crowded) => return,
                _ = look.tick() => {
                    let untaken = activity.drop_untaken(self.bounds.write);
                    if untaken > 0 {
                        metrics::counter!("tidemill:http_untaken_answers_total").increment(untaken as u64);
                        tracing::debug!(untaken, "a client does not read its answers; they were dropped");
                        if !several.load(Ordering::Relaxed) {
                            // The answer's end would never get through.
                            return;
                        }
                    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use bytes::Bytes;
    use futures_util::StreamExt;
    use metrics_exporter_prometheus::PrometheusBuilder;
    use std::convert::Infallible;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn a_client_that_stops_reading_is_cut_off_and_counted() {
        let recorder = PrometheusBuilder::new().build_recorder();
        let _here = metrics::set_default_local_recorder(&recorder);
        let (held, dropped) = tokio::sync::oneshot::channel::<()>();
        let held = Arc::new(std::sync::Mutex::new(Some(held)));
        let endless = move || {
            let held = held.lock().unwrap().take();
            let piece = move |_| {
                let _held = &held;
                Ok::<_, Infallible>(Bytes::from_static(&[b'x'; 1024]))
            };
            async move { Body::from_stream(futures_util::stream::repeat(()).map(piece)) }
        };
        let router = Router::new().route("/", get(endless));
        let bounds = Bounds { write: Duration::from_millis(200), ..Bounds::default() };
        let ((_leaving, leave), (_filling, full)) = (watch::channel(false), watch::channel(false));
        let (mut client, server) = tokio::io::duplex(4096);
        let speaker = Speaker::new(router, bounds, None);
        let serving = tokio::spawn(async move { speaker.speak(server, Told { leave, full }).await });
        client.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        client.read_exact(&mut [0; 12]).await.unwrap();
        // The client is there and reads no more.
        let patience = Duration::from_secs(20);
        assert!(tokio::time::timeout(patience, dropped).await.unwrap().is_err(), "the answer was dropped");
        tokio::time::timeout(patience, serving).await.unwrap().unwrap();
        assert!(recorder.handle().render().contains("tidemill:http_untaken_answers_total 1"));
    }
}
