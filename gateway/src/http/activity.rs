//! What happens on one connection: requests under way, and answers that nobody takes.
//!
//! An answer that waits for the engine is polled again when the engine has more. One whose last piece was handed over and that is not asked
//! for the next has a client that does not read: what there is room for between here and there is full. After a time that is the same as a
//! client that has left, and the answer is dropped, which frees its place in the engine and within the limits.

use axum::body::Body;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// What happens on a connection. Cloning is cheap.
#[derive(Clone)]
pub struct Activity(Arc<Shared>);

struct Shared {
    under_way: AtomicUsize,
    last: Mutex<Instant>,
    answers: Mutex<Vec<Weak<Mutex<Answer>>>>,
}

/// A request under way, until its answer's last byte was handed over or dropped.
pub struct Busy(Activity);

/// An answer on its way.
struct Answer {
    /// Gone once nobody took it.
    rest: Option<(Body, Busy)>,
    /// When the last piece was handed over, while the next one is not asked for.
    untaken_since: Option<Instant>,
}

/// A body that keeps its request under way.
pub struct BusyBody(Arc<Mutex<Answer>>);

/// The client did not take its answer.
#[derive(Debug, thiserror::Error)]
#[error("the client did not read its answer in time")]
pub struct NotTaken;

impl Default for Activity {
    fn default() -> Self {
        Self(Arc::new(Shared { under_way: AtomicUsize::new(0), last: Mutex::new(Instant::now()), answers: Mutex::default() }))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each holds one value that is replaced whole; a body that panicked is dropped by whoever polled it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Activity {
    /// A request has come.
    pub fn begin(&self) -> Busy {
        self.0.under_way.fetch_add(1, Ordering::AcqRel);
        Busy(self.clone())
    }

    /// How long no request has been under way.
    pub fn quiet(&self) -> Duration {
        if self.0.under_way.load(Ordering::Acquire) > 0 {
            return Duration::ZERO;
        }
        lock(&self.0.last).elapsed()
    }

    /// Drops the answers that have not been taken for `limit`, and says how many those were.
    pub fn drop_untaken(&self, limit: Duration) -> usize {
        let mut untaken = Vec::new();
        lock(&self.0.answers).retain(|answer| {
            let Some(answer) = answer.upgrade() else { return false };
            let mut answer = lock(&answer);
            if answer.untaken_since.is_some_and(|since| since.elapsed() >= limit) {
                untaken.extend(answer.rest.take());
            }
            answer.rest.is_some()
        });
        untaken.len()
    }
}

impl Busy {
    /// The answer to the request.
    pub fn answering(self, body: Body) -> BusyBody {
        let answers = self.0.clone();
        let answer = Arc::new(Mutex::new(Answer { rest: Some((body, self)), untaken_since: None }));
        let mut answers = lock(&answers.0.answers);
        answers.retain(|answer| answer.strong_count() > 0);
        answers.push(Arc::downgrade(&answer));
        BusyBody(answer)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let Activity(shared) = &self.0;
        *lock(&shared.last) = Instant::now();
        shared.under_way.fetch_sub(1, Ordering::AcqRel);
    }
}

impl http_body::Body for BusyBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut answer = lock(&self.0);
        let Some((body, _)) = &mut answer.rest else { return Poll::Ready(Some(Err(axum::Error::new(NotTaken)))) };
        let polled = Pin::new(body).poll_frame(context);
        answer.untaken_since = matches!(polled, Poll::Ready(Some(Ok(_)))).then(Instant::now);
        polled
    }

    fn is_end_stream(&self) -> bool {
        lock(&self.0).rest.as_ref().is_some_and(|(body, _)| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        lock(&self.0).rest.as_ref().map_or_else(SizeHint::default, |(body, _)| body.size_hint())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body::Body as _;
    use std::task::Waker;

    /// Hands over `pieces`, and then waits for ever.
    struct Pieces(usize);

    impl http_body::Body for Pieces {
        type Data = Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            let Some(rest) = self.0.checked_sub(1) else { return Poll::Pending };
            self.0 = rest;
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"piece")))))
        }
    }

    fn poll(body: &mut BusyBody) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(body).poll_frame(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn an_answer_that_is_not_taken_is_dropped_and_one_that_waits_for_its_next_piece_is_not() {
        let activity = Activity::default();
        let mut waiting = activity.begin().answering(Body::new(Pieces(1)));
        let mut stuck = activity.begin().answering(Body::new(Pieces(2)));
        // Nobody has asked for anything yet.
        assert_eq!(activity.drop_untaken(Duration::ZERO), 0);
        for body in [&mut waiting, &mut stuck] {
            assert!(matches!(poll(body), Poll::Ready(Some(Ok(_)))));
        }
        assert!(poll(&mut waiting).is_pending());
        assert_eq!(activity.drop_untaken(Duration::from_secs(3600)), 0);
        assert_eq!(activity.drop_untaken(Duration::ZERO), 1);
        assert!(poll(&mut waiting).is_pending());
        assert!(matches!(poll(&mut stuck), Poll::Ready(Some(Err(_)))));
        assert_eq!(activity.quiet(), Duration::ZERO, "one is still under way");
        drop(waiting);
        assert!(activity.drop_untaken(Duration::ZERO) == 0 && lock(&activity.0.answers).is_empty());
        assert_eq!(activity.0.under_way.load(Ordering::Acquire), 0);
    }
}
