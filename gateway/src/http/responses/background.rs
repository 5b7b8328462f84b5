//! Responses that are made while nobody waits for them.
//!
//! Their number is bounded. Each is a row in the store from its first moment; its server promises again and again to be there, and once
//! that promise is broken, whoever reads the row finds it failed. A response that was cancelled or deleted, here or through another
//! server on the same database, is dropped, which frees its place in the engine.

use crate::clock::{now, seconds};
use crate::http::chat::ChatRun;
use crate::http::drain::InFlight;
use crate::http::error::ApiError;
use crate::http::feedback::unavailable;
use crate::http::responses::{in_our_words, whole};
use crate::responses::{Ending, Output, Template};
use serde_json::Value;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tidemill_store::{Store, StoredResponse};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use uuid::Uuid;

/// Most responses under way in the background; more are refused.
const LIMIT: usize = 128;
/// How often a server says that it is still there.
const PULSE: Duration = Duration::from_secs(10);
/// How long it is believed after that.
const BELIEF: Duration = Duration::from_secs(45);
/// How often an end is written again while the database is away. After that the row tells of a server that has gone.
const TRIES: u32 = 30;

/// The responses that this server makes in the background. Cloning is cheap.
#[derive(Clone)]
pub struct Background {
    running: Arc<Mutex<HashMap<Uuid, Arc<Notify>>>>,
    places: Arc<Semaphore>,
}

impl Default for Background {
    fn default() -> Self {
        Self { running: Arc::default(), places: Arc::new(Semaphore::new(LIMIT)) }
    }
}

/// A response that is ready to be made.
pub struct Work {
    /// For the engine.
    pub run: ChatRun,
    /// What it becomes.
    pub output: Output,
    /// How that is shown.
    pub template: Template,
}

impl Background {
    /// Stores the response, begins to make it, and says how it looks now.
    pub async fn begin(&self, store: &Store, work: Work, row: StoredResponse, in_flight: InFlight) -> Result<Value, ApiError> {
        let place = self.places.clone().try_acquire_owned().map_err(|_| {
            let message =
                format!("{LIMIT} responses are being made in the background, the most that this server takes; try again later.");
            ApiError::unavailable(Some("background_full"), message, 10)
        })?;
        let body = work.template.in_progress();
        let row = StoredResponse { body: body.clone(), alive_until: Some(belief()), ..row };
        let Work { run, output, template } = work;
        let format = run.format.clone();
        let keep_records = output.has_logprobs();
        // First the engine, which may refuse; then the row. Whatever follows is the task's.
        let events = run.start().await.map_err(in_our_words)?;
        store.save_response(&row).await.map_err(unavailable)?;
        let stop = Arc::new(Notify::new());
        self.lock().insert(row.id, stop.clone());
        let (this, store) = (self.clone(), store.clone());
        tokio::spawn(async move {
            let _held: (OwnedSemaphorePermit, InFlight) = (place, in_flight);
            let making = whole(events, format, keep_records, output, &template);
            tokio::select! {
                made = making => {
                    let (ending, body) = made.unwrap_or_else(|error| {
                        let ending = Ending::Failed(error.message);
                        let body = template.ended(&ending, Vec::new(), None, seconds());
                        (ending, body)
                    });
                    finish(&store, row.id, &ending, &body).await;
                }
                () = stop.notified() => {}
                () = pulse(&store, row.id) => {}
            }
            this.lock().remove(&row.id);
        });
        Ok(body)
    }

    /// Stops making a response, if it is made here.
    pub fn stop(&self, id: Uuid) {
        if let Some(stop) = self.lock().get(&id) {
            stop.notify_one();
        }
    }

    /// How many are under way.
    pub fn running(&self) -> usize {
        self.lock().len()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Uuid, Arc<Notify>>> {
        // The map is whole even if somebody panicked beside it.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says again and again that this server is there; returns when nobody waits for the response any more.
async fn pulse(store: &Store, id: Uuid) {
    loop {
        tokio::time::sleep(PULSE).await;
        match store.keep_alive(&[id], belief()).await {
            Ok(over) if over.contains(&id) => return,
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "a response in the background cannot say that it is under way"),
        }
    }
}

async fn finish(store: &Store, id: Uuid, ending: &Ending, body: &Value) {
    for _ in 0..TRIES {
        match store.end_response(id, ending.status(), body).await {
            Ok(_) => return,
            Err(error) => tracing::warn!(%error, "a response that was made in the background cannot be stored; trying again"),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    tracing::error!(%id, "a response that was made in the background is lost: the database is away");
}

/// Until when this server is believed to be there, in microseconds since 1970.
fn belief() -> i64 {
    now().saturating_add(i64::try_from(BELIEF.as_micros()).unwrap_or(i64::MAX))
}
