//! Knowing when the last answer has been sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, watch};

/// Counts the requests that are being answered; once draining, no new one is let in.
#[derive(Clone, Debug, Default)]
pub struct Drain {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    draining: AtomicBool,
    in_flight: AtomicUsize,
    idle: Notify,
    cut_off: watch::Sender<bool>,
}

/// Held while a request is being answered.
#[derive(Debug)]
pub struct InFlight {
    shared: Arc<Shared>,
}

impl Drain {
    /// Lets a request in, unless the server is on its way out.
    pub fn enter(&self) -> Option<InFlight> {
        // Counted first, looked at second: `wait` cannot miss a request that saw the door open.
        self.shared.in_flight.fetch_add(1, Ordering::SeqCst);
        let guard = InFlight { shared: Arc::clone(&self.shared) };
        (!self.is_draining()).then_some(guard)
    }

    /// Closes the door.
    pub fn start(&self) {
        self.shared.draining.store(true, Ordering::SeqCst);
    }

    /// Whether the door is closed.
    pub fn is_draining(&self) -> bool {
        self.shared.draining.load(Ordering::SeqCst)
    }

    /// Ends what is still being answered by other servers; engines have a word of their own for that.
    pub fn cut_off(&self) {
        self.shared.cut_off.send_replace(true);
    }

    /// Resolves when what is being answered is to end.
    pub fn is_cut_off(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut told = self.shared.cut_off.subscribe();
        // The sender lives as long as the server does; without it nothing is told any more.
        async move {
            if told.wait_for(|cut_off| *cut_off).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Requests being answered.
    pub fn in_flight(&self) -> usize {
        self.shared.in_flight.load(Ordering::SeqCst)
    }

    /// Waits until nothing is being answered; `false` when `limit` passed first.
    pub async fn wait(&self, limit: Duration) -> bool {
        let idle = async {
            loop {
                let notified = self.shared.idle.notified();
                tokio::pin!(notified);
                notified.as_mut().enable();
                if self.in_flight() == 0 {
                    return;
                }
                notified.await;
            }
        };
        tokio::time::timeout(limit, idle).await.is_ok()
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.shared.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.shared.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn draining_waits_for_the_last_answer_and_lets_nobody_in() {
        let drain = Drain::default();
        let guard = drain.enter().unwrap();
        drain.start();
        assert!(drain.enter().is_none());
        assert!(!drain.wait(Duration::from_millis(20)).await);
        let waiting = tokio::spawn({
            let drain = drain.clone();
            async move { drain.wait(Duration::from_secs(5)).await }
        });
        tokio::task::yield_now().await;
        drop(guard);
        assert!(waiting.await.unwrap());
    }
}
