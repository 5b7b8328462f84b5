//! Sockets: accepting within a limit, serving, and leaving in good order.

use crate::http::app::App;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// A request's head must be complete within this time: connections that send nothing cost nothing for long.
const HEADER_TIME: Duration = Duration::from_secs(30);
/// Most bytes of a request's head; hyper answers 431 beyond.
const HEADER_BYTES: usize = 64 * 1024;
/// After the last answer, connections get this long to take it from their buffers.
const FLUSH_TIME: Duration = Duration::from_secs(2);

/// Serves connections until told to leave.
pub struct Server {
    listener: TcpListener,
    router: Router,
    permits: Arc<Semaphore>,
    max_connections: usize,
    leave: watch::Sender<bool>,
}

impl Server {
    /// Over a bound socket, with at most `max_connections` at once; more wait in the system's queue.
    pub fn new(listener: TcpListener, app: App, max_connections: usize) -> Self {
        let permits = Arc::new(Semaphore::new(max_connections));
        let (leave, _) = watch::channel(false);
        Self { listener, router: super::router(app), permits, max_connections, leave }
    }

    /// Accepts and serves until `leave` resolves. Then no connection is accepted, idle ones are closed, and those that are still
    /// sending the last bytes of an answer get a moment to do so.
    pub async fn run(self, leave: impl Future<Output = ()>) {
        tokio::pin!(leave);
        loop {
            let permit = tokio::select! {
                permit = Arc::clone(&self.permits).acquire_owned() => permit,
                () = &mut leave => break,
            };
            let Ok(permit) = permit else { break };
            tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => self.serve(stream, permit),
                    Err(error) => {
                        // Out of file descriptors, mostly: taking a breath beats spinning.
                        tracing::warn!(%error, "cannot accept a connection");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                },
                () = &mut leave => break,
            }
        }
        drop(self.listener);
        self.leave.send_replace(true);
        let everyone = u32::try_from(self.max_connections).unwrap_or(u32::MAX);
        if tokio::time::timeout(FLUSH_TIME, self.permits.acquire_many(everyone)).await.is_err() {
            tracing::warn!("some connections did not take their last bytes in time");
        }
    }

    fn serve(&self, stream: TcpStream, permit: OwnedSemaphorePermit) {
        // Each event of a stream is a small write that must not wait for the next.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
        let service = TowerToHyperService::new(self.router.clone());
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIME)
            .max_buf_size(HEADER_BYTES)
            .serve_connection(TokioIo::new(stream), service);
        let mut leave = self.leave.subscribe();
        tokio::spawn(async move {
            let _permit = permit;
            tokio::pin!(connection);
            let told = async { leave.wait_for(|left| *left).await.is_ok() };
            let result = tokio::select! {
                result = connection.as_mut() => result,
                _ = told => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = result {
                // A client that went away, or sent what is not HTTP.
                tracing::debug!(%error, "connection ended");
            }
        });
    }
}
