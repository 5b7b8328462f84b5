//! Another server's stream on its way to the client, chunk by chunk.

use crate::http::drain::Drain;
use crate::http::error::ApiError;
use crate::http::remote::account::Account;
use crate::http::sse::{FRAME_TARGET, Source};
use crate::openai::collected::cancelled;
use crate::openai::wire::put;
use crate::upstream::remote::chunk::Rewriter;
use crate::upstream::remote::retry::Failure;
use crate::upstream::remote::stream::{ChunkStream, Said};
use bytes::{BufMut, BytesMut};
use serde_json::Value;
use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};
use tidemill_store::records::Status;
use tokio::time::{Instant, Sleep, sleep_until};

/// A stream that has begun.
pub struct Passing {
    chunks: ChunkStream,
    /// Chunks that came before the first token, and that one.
    held: VecDeque<Value>,
    rewriter: Rewriter,
    account: Account,
    limit: Pin<Box<Sleep>>,
    too_late: Failure,
    cut_off: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl Passing {
    /// Passes on what comes until `limit`; what does not end by then fails as `too_late` says.
    pub fn new(
        (chunks, held): (ChunkStream, VecDeque<Value>),
        rewriter: Rewriter,
        account: Account,
        (limit, too_late): (Instant, Failure),
        drain: &Drain,
    ) -> Self {
        let cut_off = Box::pin(drain.is_cut_off());
        Self { chunks, held, rewriter, account, limit: Box::pin(sleep_until(limit)), too_late, cut_off }
    }

    fn fail(&mut self, failure: &Failure) -> Poll<Result<(), ApiError>> {
        self.account.failed(failure);
        Poll::Ready(Err(failure.tell(&self.rewriter.model)))
    }

    fn pass(&mut self, mut chunk: Value, out: &mut BytesMut) {
        self.account.take(&chunk, true);
        if self.rewriter.rewrite(&mut chunk) {
            out.put_slice(b"data: ");
            put(out, &chunk);
            out.put_slice(b"\n\n");
        }
    }
}

impl Source for Passing {
    fn poll_fill(&mut self, context: &mut Context<'_>, out: &mut BytesMut) -> Poll<Result<(), ApiError>> {
        while out.len() < FRAME_TARGET {
            let said = match self.held.pop_front() {
                Some(chunk) => Ok(Said::Chunk(chunk)),
                None => match self.chunks.poll_next(context) {
                    Poll::Ready(said) => said,
                    Poll::Pending => {
                        if self.limit.as_mut().poll(context).is_ready() {
                            let failure = self.too_late.clone();
                            return self.fail(&failure);
                        }
                        if self.cut_off.as_mut().poll(context).is_ready() {
                            self.account.settle(Status::Cancelled);
                            return Poll::Ready(Err(cancelled()));
                        }
                        return Poll::Pending;
                    }
                },
            };
            match said {
                Ok(Said::Chunk(chunk)) => self.pass(chunk, out),
                Ok(Said::Error(error)) => {
                    let failure = self.account.reported(&error);
                    return self.fail(&failure);
                }
                Ok(Said::End) if !self.account.is_whole() => {
                    return self.fail(&Failure::Broken("it ended in the middle".into()));
                }
                Ok(Said::Done | Said::End) => {
                    self.account.settle(Status::Ok);
                    out.put_slice(b"data: [DONE]\n\n");
                    return Poll::Ready(Ok(()));
                }
                Err(failure) => return self.fail(&failure),
            }
        }
        Poll::Pending
    }
}
