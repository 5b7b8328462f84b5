//! Sockets: accepting within a limit, serving, and leaving in good order.

use crate::http::app::App;
use crate::http::connection::Speaker;
use crate::http::tls::Tls;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// After the last answer, connections get this long to take it from their buffers.
const FLUSH_TIME: Duration = Duration::from_secs(2);

/// Serves connections until told to leave.
pub struct Server {
    listener: TcpListener,
    speaker: Speaker,
    permits: Arc<Semaphore>,
    max_connections: usize,
    leave: watch::Sender<bool>,
}

impl Server {
    /// Over a bound socket, with at most `max_connections` at once; more wait in the system's queue.
    pub fn new(listener: TcpListener, app: App, max_connections: usize, tls: Option<Tls>) -> Self {
        let permits = Arc::new(Semaphore::new(max_connections));
        let (leave, _) = watch::channel(false);
        let speaker = Speaker::new(super::router(app), tls);
        Self { listener, speaker, permits, max_connections, leave }
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
        let (speaker, leave) = (self.speaker.clone(), self.leave.subscribe());
        tokio::spawn(async move {
            speaker.serve(stream, leave).await;
            drop(permit);
        });
    }
}
