//! Sockets: accepting within a limit, serving, and leaving in good order.

use crate::http::app::App;
use crate::http::connection::{Speaker, Told};
use crate::http::tls::Tls;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// After the last answer, connections get this long to take it from their buffers.
const FLUSH_TIME: Duration = Duration::from_secs(2);

/// Bounds on connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Most at once; more wait in the system's queue.
    pub connections: usize,
    /// A request's head must be complete within this time, and a connection without requests is closed after it: connections that
    /// send nothing cost nothing for long.
    pub idle: Duration,
    /// A TLS handshake takes two round trips; it must be over after this time.
    pub handshake: Duration,
    /// An answer of which a client has taken nothing for this time is dropped.
    pub write: Duration,
    /// While others wait for a place, a connection is closed after this time without a request.
    pub crowded: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        // Load balancers keep connections for 60 s: who closes first decides which request meets a closed door.
        let (idle, handshake) = (Duration::from_secs(75), Duration::from_secs(10));
        // What is full takes a while to be empty enough for more, over a slow line.
        Self { connections: 4096, idle, handshake, write: Duration::from_secs(120), crowded: Duration::from_secs(5) }
    }
}

/// Serves connections until told to leave.
pub struct Server {
    listener: TcpListener,
    speaker: Speaker,
    permits: Arc<Semaphore>,
    connections: usize,
    leave: watch::Sender<bool>,
    full: watch::Sender<bool>,
}

impl Server {
    /// Over a bound socket.
    pub fn new(listener: TcpListener, app: App, bounds: Bounds, tls: Option<Tls>) -> Self {
        let permits = Arc::new(Semaphore::new(bounds.connections));
        let ((leave, _), (full, _)) = (watch::channel(false), watch::channel(false));
        let speaker = Speaker::new(super::router(app), bounds, tls);
        Self { listener, speaker, permits, connections: bounds.connections, leave, full }
    }

    /// Accepts and serves until `leave` resolves. Then no connection is accepted, idle ones are closed, and those that are still
    /// sending the last bytes of an answer get a moment to do so.
    pub async fn run(self, leave: impl Future<Output = ()>) {
        tokio::pin!(leave);
        loop {
            let is_full = |now: bool| self.full.send_if_modified(|full| std::mem::replace(full, now) != now);
            is_full(self.permits.available_permits() == 0);
            let permit = tokio::select! {
                permit = Arc::clone(&self.permits).acquire_owned() => permit,
                () = &mut leave => break,
            };
            is_full(false);
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
        let everyone = u32::try_from(self.connections).unwrap_or(u32::MAX);
        if tokio::time::timeout(FLUSH_TIME, self.permits.acquire_many(everyone)).await.is_err() {
            tracing::warn!("some connections did not take their last bytes in time");
        }
    }

    fn serve(&self, stream: TcpStream, permit: OwnedSemaphorePermit) {
        let (speaker, told) = (self.speaker.clone(), Told { leave: self.leave.subscribe(), full: self.full.subscribe() });
        tokio::spawn(async move {
            speaker.serve(stream, told).await;
            drop(permit);
        });
    }
}
