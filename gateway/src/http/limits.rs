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
use tokio::sync::{Semaphore, SemaphorePermit};

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

/// KiB of bodies that are being read or parsed at once, over all requests. One body may be 10 MB and a connection have hundreds under way:
/// without an end to their sum, whoever has a key could fill the memory.
const ROOM_KIB: u32 = 512 * 1024;
static ROOM: Semaphore = Semaphore::const_new(ROOM_KIB as usize);

/// Room in memory that a body takes.
struct Room<'a> {
    room: &'a Semaphore,
    permit: Option<SemaphorePermit<'a>>,
}

impl Room<'_> {
    /// Takes what is missing for so many bytes; nobody waits for it, since those who have some would wait for each other.
    fn grow(&mut self, bytes: usize) -> Result<(), ApiError> {
        let wanted = u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX).min(ROOM_KIB);
        let held = self.permit.as_ref().map_or(0, |permit| permit.num_permits() as u32);
        if wanted <= held {
            return Ok(());
        }
        let message = "The server has no room for another request body right now; send the request again.";
        let full = |_| ApiError::unavailable(Some("bodies_full"), message, 1);
        let more = self.room.try_acquire_many(wanted - held).map_err(full)?;
        match &mut self.permit {
            Some(permit) => permit.merge(more),
            None => self.permit = Some(more),
        }
        Ok(())
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
        Ok(self.read_within(&ROOM, request).await?.0)
    }

    /// The same, with its room in memory, which is free again when the second is dropped.
    async fn read_within<'a>(&self, room: &'a Semaphore, request: Request) -> Result<(Bytes, Room<'a>), ApiError> {
        let declared = request.headers().get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
        let mut body = request.into_body();
        let read = async {
            if declared.is_some_and(|length| length > self.bytes) {
                return self.refuse(&mut body).await;
            }
            let mut held = Room { room, permit: None };
            let mut all = BytesMut::with_capacity(declared.unwrap_or(0).min(LONG_WORK));
            while let Some(frame) = body.frame().await {
                let frame =
                    frame.map_err(|error| ApiError::bad_request(format!("The request body could not be read: {error}")))?;
                let Ok(data) = frame.into_data() else { continue };
                if all.len() + data.len() > self.bytes {
                    return self.refuse(&mut body).await;
                }
                held.grow(all.len() + data.len())?;
                all.extend_from_slice(&data);
            }
            Ok((all.freeze(), held))
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
        let (body, _held) = self.read_within(&ROOM, request).await?;
        off_path(body.len() > LONG_WORK, move || take(parse_json(&body)?)).await?
    }

    /// The whole body as JSON.
    pub async fn json(&self, request: Request) -> Result<Value, ApiError> {
        self.parsed(request, Ok).await
    }

    async fn refuse<T>(&self, body: &mut Body) -> Result<T, ApiError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bodies_share_a_room_that_is_free_again_when_they_are_done_with() {
        let (room, limits) = (Semaphore::new(8), BodyLimits::default());
        let read = async |bytes: usize| limits.read_within(&room, Request::new(Body::from(vec![b'x'; bytes]))).await;
        let (body, first) = read(5000).await.unwrap();
        assert_eq!((body.len(), room.available_permits()), (5000, 3));
        let error = read(4000).await.err().unwrap();
        assert_eq!((error.status, error.code.as_deref()), (StatusCode::SERVICE_UNAVAILABLE, Some("bodies_full")));
        assert_eq!(room.available_permits(), 3, "who is refused holds nothing");
        drop(first);
        let _second = read(4000).await.unwrap();
        assert_eq!(room.available_permits(), 4);
    }
}
