//! A server's stream as chunks.

use crate::upstream::remote::client::cause;
use crate::upstream::remote::retry::Failure;
use crate::upstream::remote::sse_reader::SseReader;
use hyper::body::{Body, Incoming};
use serde_json::Value;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

/// What comes next.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    /// A chunk of the answer: an object.
    Chunk(Value),
    /// An error in the place of a chunk.
    Error(Value),
    /// That was all, and the server says so.
    Done,
    /// That was all, and the server does not say so.
    End,
}

/// A stream. Dropping it closes it at the server.
pub struct ChunkStream {
    body: Incoming,
    reader: SseReader,
    over: bool,
}

impl ChunkStream {
    /// Of a response whose status was a success.
    pub fn new(body: Incoming) -> Self {
        Self { body, reader: SseReader::default(), over: false }
    }

    /// The next part. After [`Said::Done`], [`Said::End`] and a failure nothing comes any more.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Result<Said, Failure>> {
        loop {
            if let Some(data) = self.reader.next() {
                return Poll::Ready(read(&data));
            }
            if self.over {
                return Poll::Ready(self.reader.finish().map_or(Ok(Said::End), |data| read(&data)));
            }
            match ready!(Pin::new(&mut self.body).poll_frame(context)) {
                None => self.over = true,
                Some(Err(error)) => return Poll::Ready(Err(Failure::Broken(cause(&error)))),
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.reader.push(data).map_err(|_| Failure::Broken("an event is too long".into()))?;
                    }
                }
            }
        }
    }
}

/// One event's data.
fn read(data: &[u8]) -> Result<Said, Failure> {
    if data.trim_ascii() == b"[DONE]" {
        return Ok(Said::Done);
    }
    match serde_json::from_slice(data) {
        Ok(chunk @ Value::Object(_)) => {
            let failed = chunk.get("error").is_some_and(|error| !error.is_null());
            Ok(if failed { Said::Error(chunk) } else { Said::Chunk(chunk) })
        }
        _ => Err(Failure::Broken("it sent what is no JSON object".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_a_chunk_an_error_an_end_or_nonsense() {
        assert_eq!(read(b" [DONE]"), Ok(Said::Done));
        assert!(matches!(read(b"{\"choices\":[],\"error\":null}"), Ok(Said::Chunk(_))));
        assert!(matches!(read(b"{\"error\":{\"message\":\"x\"}}"), Ok(Said::Error(_))));
        for nonsense in [&b"{\"choi"[..], b"[]", b"", b"\xff"] {
            assert!(matches!(read(nonsense), Err(Failure::Broken(_))));
        }
    }
}
