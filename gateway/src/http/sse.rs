//! Server-sent events: what the engine has ready goes out in one write, silence is filled with comments, and a client that leaves
//! drops the body, which cancels its sequences.

use crate::http::drain::InFlight;
use crate::http::error::ApiError;
use crate::openai::collected::Flow;
use crate::upstream::Events;
use axum::body::Body;
use axum::response::Response;
use bytes::{BufMut, Bytes, BytesMut};
use http_body::Frame;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName, HeaderValue};
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tidemill_engine::Event;
use tokio::time::{Instant, Sleep, sleep};

/// A comment goes out after this much silence: it keeps proxies from closing the connection.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// More than this is handed on before further events are taken, so that a backlog does not become one huge buffer.
pub const FRAME_TARGET: usize = 32 * 1024;

/// Writes a request's events as `data:` lines.
pub trait EventEncoder: Send + Unpin + 'static {
    /// Appends whatever `event` of prompt `prompt` makes, including the final `[DONE]`. An error becomes the stream's last event.
    fn encode(&mut self, prompt: usize, event: Event, out: &mut BytesMut) -> Result<Flow, ApiError>;

    /// After [`Flow::End`]: appends what may be told only now, such as that the answer is stored.
    fn poll_last(&mut self, _context: &mut Context<'_>, _out: &mut BytesMut) -> Poll<Result<(), ApiError>> {
        Poll::Ready(Ok(()))
    }
}

/// What a stream is filled from.
pub trait Source: Send + Unpin + 'static {
    /// Appends what is ready, and not much more than [`FRAME_TARGET`] of it. Ready when everything has been said; an error becomes the
    /// stream's last event.
    fn poll_fill(&mut self, context: &mut Context<'_>, out: &mut BytesMut) -> Poll<Result<(), ApiError>>;
}

/// Events of the engine as an encoder writes them.
struct Encoded<E> {
    events: Events,
    encoder: E,
    /// No more events are of use.
    ending: bool,
}

struct SseBody<S> {
    source: S,
    heartbeat: Pin<Box<Sleep>>,
    over: bool,
    _in_flight: InFlight,
}

/// The streaming response to what the engine was asked.
pub fn response<E: EventEncoder>(events: Events, encoder: E, in_flight: InFlight) -> Response {
    of(Encoded { events, encoder, ending: false }, in_flight)
}

/// The streaming response out of any source.
pub fn of(source: impl Source, in_flight: InFlight) -> Response {
    let body = SseBody { source, heartbeat: Box::pin(sleep(HEARTBEAT)), over: false, _in_flight: in_flight };
    let mut response = Response::new(Body::new(body));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
    response
}

impl<E: EventEncoder> Source for Encoded<E> {
    fn poll_fill(&mut self, context: &mut Context<'_>, out: &mut BytesMut) -> Poll<Result<(), ApiError>> {
        while !self.ending && out.len() < FRAME_TARGET {
            let Poll::Ready(next) = self.events.poll_next(context) else { return Poll::Pending };
            let flow = match next {
                Some((prompt, event)) => self.encoder.encode(prompt, event, out)?,
                None => Flow::End,
            };
            self.ending = flow == Flow::End;
        }
        if self.ending { self.encoder.poll_last(context, out) } else { Poll::Pending }
    }
}

impl<S: Source> http_body::Body for SseBody<S> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        if this.over {
            return Poll::Ready(None);
        }
        let mut out = BytesMut::new();
        if let Poll::Ready(end) = this.source.poll_fill(context, &mut out) {
            this.over = true;
            if let Err(error) = end {
                out.put_slice(b"data: ");
                error.write_json(&mut out);
                out.put_slice(b"\n\n");
            }
        }
        if !out.is_empty() {
            this.heartbeat.as_mut().reset(Instant::now() + HEARTBEAT);
            return Poll::Ready(Some(Ok(Frame::data(out.freeze()))));
        }
        if this.over {
            return Poll::Ready(None);
        }
        if this.heartbeat.as_mut().poll(context).is_ready() {
            this.heartbeat.as_mut().reset(Instant::now() + HEARTBEAT);
            // Registers the new deadline; it lies in the future.
            let _ = this.heartbeat.as_mut().poll(context);
            return Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b": ping\n\n")))));
        }
        Poll::Pending
    }
}
