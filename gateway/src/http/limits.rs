//! Reading a request's body within bounds of size and time.

use crate::http::error::ApiError;
use axum::body::Body;
use axum::extract::Request;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::StatusCode;
use hyper::header::CONTENT_LENGTH;
use serde_json::Value;
use std::time::Duration;
use tokio::sync::Semaphore;

/// Bodies above this are parsed and tokenised away from the threads that move bytes.
pub const LONG_WORK: usize = 64 * 1024;
/// What a client may still send after its body was found too large, so that it gets to read the answer instead of a reset.
pub const DISCARD: usize = 64 * 1024 * 1024;

/// Bounds on a request's body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BodyLimits {
    /// Most bytes.
    pub bytes: usize,
    /// Most time from the first byte to the last.
    pub time: Duration,
}

/// Bounds on files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileLimits {
    /// Most bytes of one file.
    pub file: u64,
    /// Most bytes of all files in the data directory. What batches write counts, but is not refused.
    pub total: u64,
}

impl Default for FileLimits {
    fn default() -> Self {
        Self { file: 200 << 20, total: 16 << 30 }
    }
}

impl Default for BodyLimits {
    fn default() -> Self {
        Self { bytes: 10 * 1024 * 1024, time: Duration::from_secs(30) }
    }
}

impl BodyLimits {
    /// The whole body.
    pub async fn read(&self, request: Request) -> Result<Bytes, ApiError> {
        let declared = request.headers().get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
        let mut body = request.into_body();
        let read = async {
            if declared.is_some_and(|length| length > self.bytes) {
                return self.refuse(&mut body).await;
            }
            let mut all = BytesMut::with_capacity(declared.unwrap_or(0));
            while let Some(frame) = body.frame().await {
                let frame =
                    frame.map_err(|error| ApiError::bad_request(format!("The request body could not be read: {error}")))?;
                let Ok(data) = frame.into_data() else { continue };
                if all.len() + data.len() > self.bytes {
                    return self.refuse(&mut body).await;
                }
                all.extend_from_slice(&data);
            }
            Ok(all.freeze())
        };
        tokio::time::timeout(self.time, read).await.unwrap_or_else(|_| {
            let message = format!("The request body did not arrive within {} s.", self.time.as_secs());
            Err(ApiError::client(StatusCode::REQUEST_TIMEOUT, Some("request_timeout"), message))
        })
    }

    /// The whole body as JSON, which `take` makes something of; a long one where it is not in the way.
    pub async fn parsed<T: Send + 'static>(
        &self,
        request: Request,
        take: impl FnOnce(Value) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let body = self.read(request).await?;
        off_path(body.len() > LONG_WORK, move || take(parse_json(&body)?)).await?
    }

    /// The whole body as JSON.
    pub async fn json(&self, request: Request) -> Result<Value, ApiError> {
        self.parsed(request, Ok).await
    }

    async fn refuse(&self, body: &mut Body) -> Result<Bytes, ApiError> {
        let mut discarded = 0;
        while let Some(Ok(frame)) = body.frame().await {
            discarded += frame.into_data().map_or(0, |data| data.len());
            if discarded > DISCARD {
                break;
            }
        }
        let message = format!("The request body is larger than {} bytes, the most that this server takes.", self.bytes);
        Err(ApiError::client(StatusCode::PAYLOAD_TOO_LARGE, Some("request_too_large"), message))
    }
}

/// Parses a body. Nesting deeper than 128 levels is refused by the parser.
pub fn parse_json(body: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(body)
        .map_err(|error| ApiError::bad_request(format!("We could not parse the JSON body of your request: {error}.")))
}

/// Long work runs two at a time: the cores belong to the engine, and a parsed body takes many times its bytes. More wait their turn.
static LONG_WORKERS: Semaphore = Semaphore::const_new(2);

/// Runs `work` on this thread when it is short, and where it may take its time when it is long.
pub async fn off_path<T: Send + 'static>(long: bool, work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    if !long {
        return Ok(work());
    }
    let busy = || ApiError::fault("The request could not be prepared because of an internal error.");
    let _turn = LONG_WORKERS.acquire().await.map_err(|_| busy())?;
    let span = tracing::Span::current();
    let done = tokio::task::spawn_blocking(move || span.in_scope(work)).await;
    done.map_err(|_| busy())
}

/// The same for long work that waits in between, such as reading a table: it decompresses and decodes as the bytes come.
pub async fn off_path_waiting<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Result<T, ApiError> {
    let runtime = tokio::runtime::Handle::current();
    off_path(true, move || runtime.block_on(work)).await
}
