//! One batch from its first look to its last row.

use crate::batches::input::{Lines, RawLine, validate};
use crate::batches::line::{self, Line, LineResult, Problem, Row, Tokens};
use crate::batches::results::{Results, Written};
use crate::clock::now;
use crate::http::error::ApiError;
use crate::http::inside::{Inside, Sent};
use crate::http::{App, Caller};
use crate::upstream::LocalModel;
use bytes::Bytes;
use hyper::StatusCode;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tidemill_store::{Batch, BatchOutcome, BatchState, Batches as Rows, FileRecord, StoreError, Viewer};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};
use uuid::Uuid;

/// Most lines that run at once, over all batches; fewer where the engines run fewer.
const MAX_RUNNING: usize = 256;
/// Lines at once where all models are other servers'.
const REMOTE_AT_ONCE: usize = 8;
/// KiB of lines that run at once, over all batches: a line of 10 MB takes its share of it.
const RUNNING_KIB: u32 = 64 * 1024;
/// What is read ahead of a batch's input.
const PORTION: (usize, usize) = (64, 1 << 20);
/// Inputs that are looked through at once.
const LOOKS: usize = 2;
/// A batch looks this often whether it was cancelled or has expired, and says how far it is.
const TICK: Duration = Duration::from_secs(1);
/// The key is looked up again every so many ticks.
const KEY_TICKS: u64 = 8;
/// After the disk or the database failed, a batch waits so long before it goes on from what is on the disk.
const PAUSE: Duration = Duration::from_secs(5);

/// What runs batches.
pub(super) struct Runner {
    rows: Rows,
    app: App,
    inside: Inside,
    slots: Arc<Semaphore>,
    room: Arc<Semaphore>,
    looks: Semaphore,
    leaving: watch::Receiver<bool>,
}

/// A line's place among those that run, and room for its bytes.
type Permits = (OwnedSemaphorePermit, OwnedSemaphorePermit);

/// A fault that passes: the batch goes on later.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("its files: {0}")]
    Disk(#[from] io::Error),
    #[error("its row: {0}")]
    Store(#[from] StoreError),
}

/// Why no more lines are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// All have.
    Done,
    /// The time is over.
    Expired,
    /// Somebody asked.
    Cancelled,
    /// The key does not work any more.
    KeyGone,
    /// Somebody has removed the input from the disk.
    InputGone,
    /// The server is leaving; the batch goes on at its next start.
    Leaving,
}

impl Runner {
    /// For models that are loaded.
    pub(super) fn new(rows: Rows, app: App, leaving: watch::Receiver<bool>) -> Self {
        // No more than run at once, so that none of them wait in the queue; and never the half of it that others need.
        let fits = |model: &Arc<LocalModel>| {
            let limits = model.engine().limits();
            limits.max_seqs.min(limits.max_waiting / 2)
        };
        let slots = app.registry.local().map(fits).min().unwrap_or(REMOTE_AT_ONCE).clamp(1, MAX_RUNNING);
        let inside = Inside::new(app.clone());
        let (slots, room) = (Arc::new(Semaphore::new(slots)), Arc::new(Semaphore::new(RUNNING_KIB as usize)));
        Self { rows, app, inside, slots, room, looks: Semaphore::new(LOOKS), leaving }
    }

    /// Runs a batch to its end, or until the server leaves.
    pub(super) async fn run(&self, id: Uuid) {
        while let Err(trouble) = self.attempt(id).await {
            tracing::warn!(batch = %id, error = %trouble, "a batch stands still because of a fault; it goes on in some seconds");
            let mut leaving = self.leaving.clone();
            tokio::select! {
                _ = leaving.wait_for(|leaving| *leaving) => return,
                () = sleep(PAUSE) => {}
            }
        }
    }

    async fn attempt(&self, id: Uuid) -> Result<(), Trouble> {
        let Some(mut batch) = self.rows.find(id, &Viewer::Anyone).await? else { return Ok(()) };
        if batch.state == BatchState::Validating {
            self.look_through(&batch).await?;
            let Some(again) = self.rows.find(id, &Viewer::Anyone).await? else { return Ok(()) };
            batch = again;
        }
        if batch.state.ended() {
            return Ok(());
        }
        let files = &self.app.files;
        let mut results = Results::open(files.path(batch.draft.output_file), files.path(batch.draft.error_file)).await?;
        let stop = match batch.state {
            BatchState::Cancelling => Stop::Cancelled,
            BatchState::Finalizing => Stop::Done,
            _ => self.run_lines(&batch, &mut results).await?,
        };
        if stop == Stop::Leaving {
            return Ok(());
        }
        self.end(&batch, results, stop).await
    }

    /// Lets it begin, or fails it with all that is wrong with the input.
    async fn look_through(&self, batch: &Batch) -> Result<(), Trouble> {
        let Ok(_turn) = self.looks.acquire().await else { return Ok(()) };
        let (path, longest) = (self.app.files.path(batch.draft.input_file), self.app.body.bytes);
        let endpoint = batch.draft.endpoint.clone();
        let look = move || validate(&mut Lines::open(&path, longest)?, &endpoint);
        let found = match tokio::task::spawn_blocking(look).await.map_err(io::Error::other)? {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(vec![input_gone()]),
            found => found?,
        };
        match found {
            Ok(valid) => self.rows.begin(batch.draft.id, valid.total as u64, valid.model.as_deref(), now()).await?,
            Err(problems) => {
                self.rows.fail(batch.draft.id, &listed(&problems), now()).await?;
            }
        }
        Ok(())
    }

    /// Runs the lines that have no row yet.
    async fn run_lines(&self, batch: &Batch, results: &mut Results) -> Result<Stop, Trouble> {
        let Some(mut caller) = self.caller(batch).await? else { return Ok(Stop::KeyGone) };
        let Some(mut lines) = self.lines(batch)? else { return Ok(Stop::InputGone) };
        let mut ahead: VecDeque<RawLine> = VecDeque::new();
        let (mut exhausted, mut interrupted) = (false, false);
        // Dropped with whatever still runs in it, which cancels that in the engine.
        let mut running: JoinSet<(Option<Written>, Permits)> = JoinSet::new();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ticks = 0_u64;
        loop {
            let leaving = interrupted || *self.leaving.borrow() || self.app.drain.is_draining();
            if ahead.is_empty() && !exhausted && !leaving {
                let portion;
                (lines, portion) = read_on(lines, results).await?;
                exhausted = portion.is_empty();
                ahead.extend(portion);
            }
            if running.is_empty() && (leaving || (exhausted && ahead.is_empty())) {
                return Ok(if exhausted && ahead.is_empty() && !interrupted { Stop::Done } else { Stop::Leaving });
            }
            tokio::select! {
                Some(ended) = running.join_next(), if !running.is_empty() => {
                    let mut ended = Some(ended);
                    // Given back when the rows are on the disk: a kill never costs more answers than there are places.
                    let mut places = Vec::new();
                    while let Some(one) = ended {
                        // A task that broke off leaves its line undone, to be run by the next attempt.
                        let (written, permits) = one.map_err(io::Error::other)?;
                        places.push(permits);
                        match written {
                            Some(written) => results.push(&written),
                            None => interrupted = true,
                        }
                        ended = running.try_join_next();
                    }
                    results.write().await?;
                }
                _ = tick.tick() => {
                    let progress = results.tally.progress(batch.progress.total);
                    match self.rows.report(batch.draft.id, progress, &results.tally.tokens.to_json()).await {
                        Ok(Some(BatchState::InProgress)) => {}
                        Ok(_) => return Ok(Stop::Cancelled),
                        // Answers go on while the database is away, as they do for everyone.
                        Err(error) => tracing::warn!(batch = %batch.draft.id, %error, "cannot write down how far a batch is"),
                    }
                    if now() >= batch.draft.expires {
                        return Ok(Stop::Expired);
                    }
                    ticks += 1;
                    if ticks.is_multiple_of(KEY_TICKS) {
                        match self.caller(batch).await {
                            Ok(Some(again)) => caller = again,
                            Ok(None) => return Ok(Stop::KeyGone),
                            Err(error) => tracing::warn!(batch = %batch.draft.id, %error, "cannot look up the key of a batch"),
                        }
                    }
                }
                permits = self.permits(ahead.front()), if !ahead.is_empty() && !leaving => {
                    if let (Some(permits), Some(line)) = (permits, ahead.pop_front()) {
                        let work = Work { inside: self.inside.clone(), caller: caller.clone() };
                        let (batch, endpoint) = (batch.draft.id, batch.draft.endpoint.clone());
                        running.spawn(async move { (work.answer(batch, &endpoint, line).await, permits) });
                    }
                }
            }
        }
    }

    /// The lines of the input; `None` when it is not there any more.
    fn lines(&self, batch: &Batch) -> io::Result<Option<Lines>> {
        match Lines::open(&self.app.files.path(batch.draft.input_file), self.app.body.bytes) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            lines => lines.map(Some),
        }
    }

    /// Who the batch's requests come from; `None` when the key does not work any more.
    async fn caller(&self, batch: &Batch) -> Result<Option<Caller>, Trouble> {
        Ok(Caller::of_key(&self.app.store, batch.draft.key_id.as_deref()).await?)
    }

    /// A place and room for a line.
    async fn permits(&self, line: Option<&RawLine>) -> Option<Permits> {
        let bytes = line.and_then(|line| line.text.as_ref()).map_or(0, Vec::len);
        let kib = u32::try_from(bytes / 1024).unwrap_or(u32::MAX).clamp(1, RUNNING_KIB);
        let slot = self.slots.clone().acquire_owned().await.ok()?;
        let room = self.room.clone().acquire_many_owned(kib).await.ok()?;
        Some((slot, room))
    }

    /// Gives the lines that never ran their rows, and shows the files.
    async fn end(&self, batch: &Batch, mut results: Results, stop: Stop) -> Result<(), Trouble> {
        let id = batch.draft.id;
        let (state, code, message) = match stop {
            Stop::Expired => {
                let message = "This request could not be executed before the completion window expired.";
                (BatchState::Expired, "batch_expired", message)
            }
            Stop::KeyGone => {
                (BatchState::Cancelled, "batch_cancelled", "The API key that made this batch does not work any more.")
            }
            Stop::Cancelled => {
                (BatchState::Cancelled, "batch_cancelled", "The batch was cancelled before this request was executed.")
            }
            Stop::InputGone => (BatchState::Failed, "", ""),
            Stop::Done | Stop::Leaving => (BatchState::Completed, "", ""),
        };
        if state == BatchState::Completed {
            self.rows.finalize(id, now()).await?;
        } else if batch.progress.total > 0
            && let Some(mut lines) = self.lines(batch)?
        {
            loop {
                let portion;
                (lines, portion) = read_on(lines, &results).await?;
                if portion.is_empty() {
                    break;
                }
                for RawLine { number, text } in portion {
                    let parsed = Line::parse(&text.unwrap_or_default(), &batch.draft.endpoint);
                    let custom_id = parsed.map_or_else(|_| String::new(), |line| line.custom_id);
                    let text = line::never_ran(&line::row_id(id, number), &custom_id, code, message);
                    let row = Row { line: number, result: LineResult::NeverRan, tokens: Tokens::default() };
                    results.push(&Written { row, text });
                }
                results.write().await?;
            }
        }
        let now = now();
        let (output_bytes, error_bytes) = results.bytes();
        let file = |id: Uuid, bytes: u64, what: &str| {
            (bytes > 0).then(|| FileRecord {
                id,
                created: now,
                key_id: batch.draft.key_id.clone(),
                filename: format!("batch_{}_{what}.jsonl", batch.draft.id),
                purpose: "batch_output".to_owned(),
                bytes,
                expires: batch.draft.keep_seconds.map(|seconds| now + seconds * 1_000_000),
                place: batch.draft.place.clone(),
            })
        };
        let outcome = BatchOutcome {
            state,
            progress: results.tally.progress(batch.progress.total),
            usage: results.tally.tokens.to_json(),
            output: file(batch.draft.output_file, output_bytes, "output"),
            errors: file(batch.draft.error_file, error_bytes, "error"),
            problems: (stop == Stop::InputGone).then(|| listed(&[input_gone()])),
        };
        results.close().await?;
        self.rows.end(id, &outcome, now).await?;
        tracing::info!(batch = %id, state = state.as_str(), completed = outcome.progress.completed, failed = outcome.progress.failed, "batch ended");
        Ok(())
    }
}

fn input_gone() -> Problem {
    Problem::new("input_file_missing", "The input file is not there any more; upload it again.")
}

/// Problems in the form of the API.
fn listed(problems: &[Problem]) -> Value {
    let data: Vec<Value> = problems.iter().map(Problem::to_json).collect();
    json!({ "object": "list", "data": data })
}

/// The next lines that have no row, read where waiting for the disk holds up nobody.
async fn read_on(mut lines: Lines, results: &Results) -> io::Result<(Lines, Vec<RawLine>)> {
    let done = results.tally.done.clone();
    let read = move || {
        let portion = lines.some(PORTION.0, PORTION.1, |number| !done.contains(number))?;
        Ok((lines, portion))
    };
    tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?
}

/// What one line needs to be answered.
struct Work {
    inside: Inside,
    caller: Caller,
}

impl Work {
    /// The row of a line; `None` when the server left before there was one.
    async fn answer(&self, batch: Uuid, endpoint: &str, line: RawLine) -> Option<Written> {
        let RawLine { number, text } = line;
        let id = line::row_id(batch, number);
        let (custom_id, status, request_id, body) = match Line::parse(&text.unwrap_or_default(), endpoint) {
            Ok(line) => {
                let body = Bytes::from(line.body.to_string());
                let Sent { status, request_id, body } = self.inside.send(&self.caller, endpoint, &id, body).await?;
                (line.custom_id, status, request_id, body)
            }
            // The input was looked through; it would have to change meanwhile.
            Err(problem) => {
                let error = ApiError::bad_request(problem.message);
                (String::new(), StatusCode::BAD_REQUEST, id.clone(), error.to_json())
            }
        };
        let tokens = Tokens::of(&body);
        let result =
            if status.is_client_error() || status.is_server_error() { LineResult::Failed } else { LineResult::Completed };
        let text = line::answered(&id, &custom_id, status.as_u16(), &request_id, &body);
        Some(Written { row: Row { line: number, result, tokens }, text })
    }
}
