//! A file on its way in: a `multipart/form-data` body, written to the disk as it comes.

use crate::http::error::ApiError;
use crate::http::feedback::unavailable;
use crate::http::limits::{DISCARD, FileLimits};
use axum::extract::Request;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE};
use hyper::{HeaderMap, StatusCode};
use multer::{Field, Multipart};
use std::time::Duration;
use tidemill_store::{Files, Incoming};
use tokio::sync::Semaphore;
use uuid::Uuid;

/// Each part of a body must follow the one before within this time.
const SILENCE: Duration = Duration::from_secs(30);
/// Most time from the first byte to the last.
const WHOLE: Duration = Duration::from_secs(3600);
/// Files that may come in at once; more are told to come again.
static UPLOADS: Semaphore = Semaphore::const_new(8);
/// Longest value of a field that is not the file.
const MAX_VALUE: usize = 1024;
/// Longest name of a file, in characters.
const MAX_NAME: usize = 512;
/// Room that names, boundaries and other fields take beside the file.
const ENVELOPE: u64 = 64 * 1024;
/// What an upload may be for. OpenAI's other purposes belong to parts of its API that this server does not have.
const PURPOSES: [&str; 3] = ["batch", "fine-tune", "user_data"];

/// A form whose every field was checked; the file is on the disk, but not a file of ours yet.
pub struct Upload {
    /// The content.
    pub content: Incoming,
    /// As the client calls it, without what a file's name cannot have.
    pub filename: String,
    /// One of [`PURPOSES`].
    pub purpose: &'static str,
    /// How long the file is kept, in seconds, where the client says so.
    pub keep_seconds: Option<i64>,
}

impl Upload {
    /// Reads the form. The file becomes the content `id` of `files`.
    pub async fn receive(request: Request, files: &Files, limits: FileLimits, id: Uuid) -> Result<Self, ApiError> {
        let Ok(_slot) = UPLOADS.try_acquire() else {
            let message = "The server is receiving as many files as it can; send the request again.";
            return Err(ApiError::unavailable(Some("uploads_full"), message, 2));
        };
        let (boundary, declared) = envelope(request.headers())?;
        let used = files.used().await.map_err(unavailable)?;
        let room = limits.total.saturating_sub(used);
        let mut form =
            Form { files, id, limits, room, multipart: Multipart::new(request.into_body().into_data_stream(), boundary) };
        if declared.is_some_and(|length| length > form.most().saturating_add(ENVELOPE)) {
            let error = form.too_large();
            form.discard(None).await;
            return Err(error);
        }
        match tokio::time::timeout(WHOLE, form.read()).await {
            Ok(result) => result,
            Err(_) => Err(late()),
        }
    }
}

/// The form's boundary and the body's length, where it is declared.
fn envelope(headers: &HeaderMap) -> Result<(String, Option<u64>), ApiError> {
    let header = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let boundary = multer::parse_boundary(header(CONTENT_TYPE).unwrap_or_default()).map_err(|_| {
        ApiError::bad_request("The request body must be a form: send 'purpose' and 'file' as multipart/form-data.")
    })?;
    Ok((boundary, header(CONTENT_LENGTH).and_then(|text| text.parse().ok())))
}

struct Form<'a> {
    files: &'a Files,
    id: Uuid,
    limits: FileLimits,
    room: u64,
    multipart: Multipart<'static>,
}

impl Form<'_> {
    async fn read(&mut self) -> Result<Upload, ApiError> {
        let (mut content, mut purpose, mut anchor, mut seconds) = (None, None, None, None);
        while let Some(field) = in_time(self.multipart.next_field()).await? {
            let name = field.name().unwrap_or_default().to_owned();
            match name.as_str() {
                "file" if content.is_none() => content = Some(self.file(field).await?),
                "purpose" => purpose = Some(value(field, &name).await?),
                "expires_after[anchor]" => anchor = Some(value(field, &name).await?),
                "expires_after[seconds]" => seconds = Some(value(field, &name).await?),
                "file" => return Err(ApiError::invalid("file", "invalid_value", "Invalid 'file': only one file can be sent.")),
                other => {
                    let shown: String = other.chars().take(100).collect();
                    let message = format!("Unknown parameter: '{shown}'.");
                    return Err(ApiError::invalid(shown, "unknown_parameter", message));
                }
            }
        }
        let missing = |name: &'static str| {
            ApiError::invalid(name, "missing_required_parameter", format!("Missing required parameter: '{name}'."))
        };
        let purpose = purpose.ok_or_else(|| missing("purpose"))?;
        let (content, filename) = content.ok_or_else(|| missing("file"))?;
        Ok(Upload {
            content,
            filename,
            purpose: known_purpose(&purpose)?,
            keep_seconds: keep(anchor.as_deref(), seconds.as_deref())?,
        })
    }

    async fn file(&mut self, mut field: Field<'static>) -> Result<(Incoming, String), ApiError> {
        let filename = clean_name(field.file_name().unwrap_or("file"))?;
        let mut content = self.files.receive(self.id).await.map_err(unavailable)?;
        while let Some(data) = in_time(field.chunk()).await? {
            if content.bytes() + data.len() as u64 > self.most() {
                let error = self.too_large();
                self.discard(Some(field)).await;
                return Err(error);
            }
            content.write(&data).await.map_err(unavailable)?;
        }
        Ok((content, filename))
    }

    fn most(&self) -> u64 {
        self.limits.file.min(self.room)
    }

    fn too_large(&self) -> ApiError {
        let (code, message) = if self.room < self.limits.file {
            let message =
                format!("This server keeps at most {} bytes of files, and they are taken: delete some.", self.limits.total);
            ("files_full", message)
        } else {
            ("file_too_large", format!("The file is larger than {} bytes, the most that this server takes.", self.limits.file))
        };
        ApiError { param: Some("file".into()), ..ApiError::client(StatusCode::PAYLOAD_TOO_LARGE, Some(code), message) }
    }

    /// Reads on for a while, so that the client gets to read the answer instead of a reset.
    async fn discard(&mut self, field: Option<Field<'static>>) {
        let mut discarded = 0;
        let mut next = field;
        loop {
            if next.is_none() {
                next = in_time(self.multipart.next_field()).await.ok().flatten();
            }
            let Some(field) = &mut next else { return };
            match in_time(field.chunk()).await {
                Ok(Some(data)) => discarded += data.len(),
                Ok(None) => next = None,
                Err(_) => return,
            }
            if discarded > DISCARD {
                return;
            }
        }
    }
}

fn late() -> ApiError {
    ApiError::client(StatusCode::REQUEST_TIMEOUT, Some("request_timeout"), "The request body did not arrive in time.")
}

async fn in_time<T>(read: impl Future<Output = Result<T, multer::Error>>) -> Result<T, ApiError> {
    match tokio::time::timeout(SILENCE, read).await {
        Ok(Ok(read)) => Ok(read),
        Ok(Err(error)) => Err(ApiError::bad_request(format!("The form in the request body could not be read: {error}."))),
        Err(_) => Err(late()),
    }
}

async fn value(mut field: Field<'static>, name: &str) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(data) = in_time(field.chunk()).await? {
        bytes.extend_from_slice(&data);
        if bytes.len() > MAX_VALUE {
            let message = format!("Invalid '{name}': string too long. Expected at most {MAX_VALUE} bytes.");
            return Err(ApiError::invalid(name.to_owned(), "string_above_max_length", message));
        }
    }
    String::from_utf8(bytes)
        .map_err(|_| ApiError::invalid(name.to_owned(), "invalid_type", format!("Invalid '{name}': it is not UTF-8.")))
}

fn known_purpose(text: &str) -> Result<&'static str, ApiError> {
    PURPOSES.iter().find(|purpose| **purpose == text).copied().ok_or_else(|| {
        let shown: String = text.chars().take(100).collect();
        let message = format!("Invalid value: '{shown}'. Supported values are: '{}'.", PURPOSES.join("', '"));
        ApiError::invalid("purpose", "invalid_value", message)
    })
}

/// A name is shown and sent back in lists: it has no control characters and a bounded length.
fn clean_name(name: &str) -> Result<String, ApiError> {
    if name.chars().count() > MAX_NAME || name.chars().any(char::is_control) {
        let message = format!("Invalid 'file': its name must have at most {MAX_NAME} characters and no control characters.");
        return Err(ApiError::invalid("file", "invalid_value", message));
    }
    Ok(name.to_owned())
}

/// Least and most time that something may be kept when a client says how long, in seconds.
pub const KEEP: std::ops::RangeInclusive<i64> = 3600..=2_592_000;

fn keep(anchor: Option<&str>, seconds: Option<&str>) -> Result<Option<i64>, ApiError> {
    let (anchor, seconds) = match (anchor, seconds) {
        (None, None) => return Ok(None),
        (Some(anchor), Some(seconds)) => (anchor, seconds),
        (anchor, _) => {
            let param = if anchor.is_none() { "expires_after[anchor]" } else { "expires_after[seconds]" };
            return Err(ApiError::invalid(
                param,
                "missing_required_parameter",
                format!("Missing required parameter: '{param}'."),
            ));
        }
    };
    if anchor != "created_at" {
        let message = "Invalid 'expires_after[anchor]': the only supported value is 'created_at'.";
        return Err(ApiError::invalid("expires_after[anchor]", "invalid_value", message));
    }
    seconds.trim().parse().ok().filter(|seconds| KEEP.contains(seconds)).map(Some).ok_or_else(|| {
        let message = format!("Invalid 'expires_after[seconds]': expected an integer from {} to {}.", KEEP.start(), KEEP.end());
        ApiError::invalid("expires_after[seconds]", "invalid_value", message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expiry_needs_both_parts_and_stays_within_bounds() {
        assert_eq!(keep(None, None).unwrap(), None);
        assert_eq!(keep(Some("created_at"), Some("3600")).unwrap(), Some(3600));
        for (anchor, seconds, param) in [
            (Some("created_at"), None, "expires_after[seconds]"),
            (None, Some("3600"), "expires_after[anchor]"),
            (Some("now"), Some("3600"), "expires_after[anchor]"),
            (Some("created_at"), Some("3599"), "expires_after[seconds]"),
            (Some("created_at"), Some("2592001"), "expires_after[seconds]"),
            (Some("created_at"), Some("soon"), "expires_after[seconds]"),
        ] {
            assert_eq!(keep(anchor, seconds).unwrap_err().param.as_deref(), Some(param));
        }
    }

    #[test]
    fn names_and_purposes_are_checked() {
        assert_eq!(clean_name("naïve 🦀.jsonl").unwrap(), "naïve 🦀.jsonl");
        assert!(clean_name("a\nb").is_err() && clean_name(&"x".repeat(513)).is_err());
        assert_eq!(known_purpose("batch").unwrap(), "batch");
        assert!(known_purpose("vision").unwrap_err().message.contains("'fine-tune'"));
    }
}
