//! The step loop, on a thread of its own.

use crate::adapter::Adapter;
use crate::adapters::{AdapterLease, AdapterRefused, AdapterTable, Description};
use crate::backlog::Backlog;
use crate::client::Client;
use crate::embedding::Pooled;
use crate::engine::Health;
use crate::model::Model;
use crate::request::{Event, FinishReason, Request};
use crate::scheduler::{Outcome, Scheduler, record};
use crate::sequence::RequestKey;
use crate::stats::{Metrics, Stats};
use crate::tokenizer::Tokenizer;
use flume::{Receiver, RecvError, RecvTimeoutError, Sender, TryRecvError};
use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tidemill_kernels::{KernelError, NO_ADAPTER, StepBatch, StepOutput};

/// How often to look whether slow clients have caught up, when there is nothing else to do.
const PAUSED_POLL: Duration = Duration::from_millis(2);

/// How long an engine that ran short of memory says that it is not ready, when no step has gone well since. Not for ever: to whom
/// nobody sends requests, no step goes well.
const SHORT: Duration = Duration::from_secs(10);

/// What reaches the loop.
pub(crate) enum Command {
    Submit(Submission),
    /// An adapter that fits the model.
    Load(Box<Loading>),
    /// A flag of [`Status`] changed.
    Wake,
}

pub(crate) struct Submission {
    pub(crate) request: Arc<Request>,
    pub(crate) seed: u64,
    pub(crate) events: Sender<Event>,
    pub(crate) arrived: Instant,
    /// Set for a text whose vector is wanted.
    pub(crate) pooled: Option<Pooled>,
}

pub(crate) struct Loading {
    pub(crate) adapter: Adapter,
    pub(crate) description: Description,
    pub(crate) outcome: Sender<Result<AdapterLease, AdapterRefused>>,
}

/// What the loop and the handles share.
pub(crate) struct Status {
    /// Requests that were submitted and did not run yet.
    pub(crate) waiting: AtomicUsize,
    pub(crate) draining: AtomicBool,
    pub(crate) cancel_all: AtomicBool,
    /// Mean time between two finished requests, in microseconds; 0 when unknown.
    pub(crate) finish_interval_us: AtomicU64,
    pub(crate) backlog: Mutex<Backlog>,
    pub(crate) adapters: Mutex<AdapterTable>,
    stats: Mutex<Stats>,
    stopped: Mutex<Option<String>>,
    /// When a step failed for want of memory, and what was said; `None` after one that went well.
    short: Mutex<Option<(Instant, String)>>,
}

impl Status {
    /// Of an engine that runs `slots` sequences at once and serves up to `adapters` adapters.
    pub(crate) fn new(slots: usize, adapters: usize) -> Self {
        Self {
            waiting: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            cancel_all: AtomicBool::new(false),
            finish_interval_us: AtomicU64::new(0),
            backlog: Mutex::new(Backlog::new(slots)),
            adapters: Mutex::new(AdapterTable::new(adapters)),
            stats: Mutex::default(),
            stopped: Mutex::default(),
            short: Mutex::default(),
        }
    }

    pub(crate) fn stats(&self) -> Stats {
        *lock(&self.stats)
    }

    pub(crate) fn health(&self, now: Instant) -> Health {
        match &*lock(&self.stopped) {
            Some(reason) => Health::Stopped(reason.clone()),
            None if self.draining.load(Ordering::Acquire) => Health::Draining,
            None => match &*lock(&self.short) {
                Some((since, why)) if now.saturating_duration_since(*since) < SHORT => Health::Short(why.clone()),
                _ => Health::Ready,
            },
        }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The values are replaced whole or are counts, so one that a panic left behind is sound.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) struct Core {
    pub(crate) model: Box<dyn Model>,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) end_of_turn: Vec<u32>,
    pub(crate) max_model_len: usize,
    pub(crate) inbox: Receiver<Command>,
    pub(crate) status: Arc<Status>,
    pub(crate) metrics: Metrics,
    pub(crate) scheduler: Scheduler,
    pub(crate) flow: Flow,
}

/// A step that is under way.
struct Flight {
    tokens: usize,
    prompt_tokens: usize,
    begun: Instant,
    /// It was submitted, and is collected; another is computed when it is waited for.
    submitted: bool,
}

/// What changes from step to step.
#[derive(Default)]
pub(crate) struct Flow {
    /// Oldest first; two at most.
    flights: VecDeque<Flight>,
    last_end: Option<Instant>,
    clients: HashMap<RequestKey, Client>,
    /// Texts whose vectors are wanted; each has a client, too.
    pooled: HashMap<RequestKey, Pooled>,
    arrivals: u64,
    batch: StepBatch,
    out: StepOutput,
    outcomes: Vec<Outcome>,
    stats: Stats,
    last_finish: Option<Instant>,
    /// The last step had nothing to compute, because all clients are slow.
    stalled: bool,
    scratch: Vec<RequestKey>,
}

impl Core {
    /// Runs until the handles are gone, the engine is drained or its device is lost. A panic ends all requests and the engine, not
    /// the process.
    pub(crate) fn run(mut self) {
        let reason = match catch_unwind(AssertUnwindSafe(|| self.steps())) {
            Ok(Ok(())) => "it was shut down".to_owned(),
            Ok(Err(lost)) => {
                tracing::error!(%lost, "the engine's device is lost; restart the server");
                lost.to_string()
            }
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("unknown cause");
                // The text may quote somebody's prompt: it is for the log, and not for whoever asks next.
                tracing::error!(panic = text, "the engine's thread panicked");
                "an internal error, which the server's log shows".to_owned()
            }
        };
        *lock(&self.status.stopped) = Some(reason.clone());
        let message = format!("the engine has stopped: {reason}");
        for client in self.flow.clients.values_mut() {
            client.fail(message.clone());
        }
        for command in self.inbox.try_iter() {
            if let Command::Submit(submission) = command {
                // A client that already left needs no word.
                submission.events.try_send(Event::Failed(message.clone())).ok();
            }
        }
    }

    /// The error is that of a device with which nothing can be done any more.
    ///
    /// Where steps run ahead, one is planned and submitted while the one before it is computed; then that one's tokens go to the clients
    /// while the next is computed. Elsewhere a step is planned, computed and told of before the next.
    fn steps(&mut self) -> Result<(), KernelError> {
        while self.take_arrivals()? {
            self.tend_clients();
            let begun = self.may_begin() && self.begin_step()?;
            if !(begun && self.may_begin()) {
                self.end_step()?;
            }
        }
        self.end_all()
    }

    /// Whether a step may be planned now.
    fn may_begin(&self) -> bool {
        let all_run = self.flow.flights.iter().all(|flight| flight.submitted);
        self.flow.flights.is_empty() || (all_run && self.model.runs_ahead() && self.scheduler.may_plan_ahead())
    }

    /// Plans a step and sets it going; `false` when there is nothing to do.
    fn begin_step(&mut self) -> Result<bool, KernelError> {
        let begun = Instant::now();
        let tokens = self.scheduler.schedule(&mut self.flow.batch);
        self.flow.stalled = tokens == 0 && self.flow.flights.is_empty();
        if tokens == 0 {
            if self.flow.stalled {
                self.publish(0);
            }
            return Ok(false);
        }
        self.name_adapters();
        let prompt_tokens = tokens.saturating_sub(self.flow.batch.samples.len());
        self.note_admitted(begun);
        let planned = Instant::now();
        self.flow.stats.overhead += planned - begun;
        // Hidden states are read before the next step overwrites them.
        let submitted = self.model.runs_ahead() && !self.wants_hidden();
        let outcome = if submitted { self.model.submit(&self.flow.batch) } else { Ok(()) };
        self.flow.stats.model_time += planned.elapsed();
        if outcome.is_err() || !submitted {
            // Whoever was in the step before hears of that first.
            self.end_all()?;
        }
        if let Err(error) = outcome {
            self.fail_step(error, Instant::now())?;
            return Ok(false);
        }
        self.flow.flights.push_back(Flight { tokens, prompt_tokens, begun, submitted });
        Ok(true)
    }

    /// Waits for the oldest step under way and tells the clients what it led to.
    fn end_step(&mut self) -> Result<(), KernelError> {
        let Some(flight) = self.flow.flights.pop_front() else { return Ok(()) };
        let waited = Instant::now();
        let computed = if flight.submitted { self.model.collect(&mut self.flow.out) } else { self.compute() };
        let now = Instant::now();
        match computed {
            Ok(()) => {
                *lock(&self.status.short) = None;
                self.note_refused();
                match self.scheduler.apply(&mut self.flow.out, &mut self.flow.outcomes) {
                    Ok(()) => self.emit(now),
                    Err(error) => self.fail_requests(&error.to_string()),
                }
            }
            Err(error) => self.fail_step(error, now)?,
        }
        // A step that was begun while another ran had to wait for that one.
        let since = self.flow.last_end.replace(now).map_or(flight.begun, |last| last.max(flight.begun));
        lock(&self.status.backlog).step(flight.prompt_tokens, now - since);
        self.flow.stats.model_time += now - waited;
        self.flow.stats.overhead += now.elapsed();
        self.publish(flight.tokens);
        Ok(())
    }

    /// Counts what a card did not take as a whole, and says so once: each kind of step is refused for itself.
    fn note_refused(&mut self) {
        let Some(why) = self.flow.out.refused_capture.take() else { return };
        let refused = &mut self.flow.stats.refused_captures;
        *refused += 1;
        if *refused == 1 {
            tracing::warn!(
                why,
                "the card does not take a step as a whole (CUDA graph); such steps are launched operation by operation, which is slower"
            );
        }
    }

    /// Waits for all steps under way.
    fn end_all(&mut self) -> Result<(), KernelError> {
        while !self.flow.flights.is_empty() {
            self.end_step()?;
        }
        Ok(())
    }

    /// Takes what arrived; waits when there is nothing to do. `false` ends the loop.
    fn take_arrivals(&mut self) -> Result<bool, KernelError> {
        loop {
            if self.status.cancel_all.swap(false, Ordering::AcqRel) {
                self.cancel_all();
            }
            self.free_adapters()?;
            let idle = self.scheduler.requests() == 0 && self.flow.flights.is_empty();
            let draining = self.status.draining.load(Ordering::Acquire);
            match self.next_command(idle && !draining) {
                Ok(Command::Submit(submission)) => self.accept(submission),
                Ok(Command::Load(loading)) => self.load_adapter(*loading)?,
                Ok(Command::Wake) => {}
                // What was submitted before the draining began has been taken by now.
                Err(TryRecvError::Empty) => return Ok(!(idle && draining)),
                Err(TryRecvError::Disconnected) => {
                    self.cancel_all();
                    return Ok(false);
                }
            }
            self.flow.stalled = false;
        }
    }

    fn next_command(&self, idle: bool) -> Result<Command, TryRecvError> {
        if idle {
            self.inbox.recv().map_err(|RecvError::Disconnected| TryRecvError::Disconnected)
        } else if self.flow.stalled {
            self.inbox.recv_timeout(PAUSED_POLL).map_err(|error| match error {
                RecvTimeoutError::Timeout => TryRecvError::Empty,
                RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
            })
        } else {
            self.inbox.try_recv()
        }
    }

    /// Takes back the places of adapters that nobody uses any more.
    fn free_adapters(&mut self) -> Result<(), KernelError> {
        let freed = lock(&self.status.adapters).freed();
        if !freed.is_empty() {
            // Who has ended may be in a step too many.
            self.end_all()?;
        }
        freed.into_iter().for_each(|slot| self.model.unload_adapter(slot));
        Ok(())
    }

    /// Between two steps. What the adapter replaces stays as long as a request uses it.
    fn load_adapter(&mut self, loading: Loading) -> Result<(), KernelError> {
        let Loading { adapter, description, outcome } = loading;
        self.end_all()?;
        // Nobody wakes an engine that waits for work when the last one lets go of an adapter.
        self.free_adapters()?;
        let revived = lock(&self.status.adapters).revive(&description);
        if let Some(done) = revived.transpose() {
            outcome.try_send(done).ok();
            return Ok(());
        }
        let placed = lock(&self.status.adapters).place(&description);
        let loaded = placed.and_then(|slot| {
            self.model.load_adapter(slot, &adapter)?;
            // Somebody may have pinned the one that was to give way.
            let put = lock(&self.status.adapters).put(slot, description);
            if put.is_err() {
                self.model.unload_adapter(slot);
            }
            put
        });
        // Who asked may have left; the adapter is there all the same.
        outcome.try_send(loaded).ok();
        Ok(())
    }

    /// Tells the backend which adapter each row of the step uses.
    fn name_adapters(&mut self) {
        let Flow { batch, clients, .. } = &mut self.flow;
        let slot = |key: &RequestKey| clients.get(key).and_then(|client| client.request.adapter.as_ref()).map(AdapterLease::slot);
        if self.scheduler.in_step().all(|key| slot(&key).is_none()) {
            return;
        }
        for (key, span) in self.scheduler.in_step().zip(&batch.sequences) {
            let rows = batch.adapters.len() + span.rows as usize;
            batch.adapters.resize(rows, slot(&key).unwrap_or(NO_ADAPTER));
        }
    }

    fn accept(&mut self, submission: Submission) {
        let Submission { request, seed, events, arrived, pooled } = submission;
        let key = RequestKey(self.flow.arrivals);
        self.flow.arrivals += 1;
        let client = Client::new(Arc::clone(&request), events, arrived, &self.tokenizer, self.max_model_len);
        self.flow.clients.insert(key, client);
        self.flow.pooled.extend(pooled.map(|pooled| (key, pooled)));
        self.scheduler.add(key, request, seed);
    }

    /// Forgets the clients that left, pauses those that do not keep up, resumes those that do again.
    fn tend_clients(&mut self) {
        let mut left = std::mem::take(&mut self.flow.scratch);
        let now = Instant::now();
        for (key, client) in &mut self.flow.clients {
            if client.has_left() || client.request.deadline.is_some_and(|deadline| deadline <= now) {
                left.push(*key);
            } else if client.is_behind() != client.paused {
                client.paused = !client.paused;
                self.scheduler.set_paused(*key, client.request.priority, client.paused);
            }
        }
        for key in left.drain(..) {
            if let Some(client) = self.flow.clients.get_mut(&key) {
                // Who has left does not hear it.
                client.expire();
                self.scheduler.cancel(key, client.request.priority);
                self.metrics.finished_choice(FinishReason::Cancelled);
            }
            self.forget(key);
        }
        self.flow.scratch = left;
    }

    fn note_admitted(&mut self, now: Instant) {
        for key in self.scheduler.admitted() {
            if let Some(client) = self.flow.clients.get_mut(key) {
                client.admitted = Some(now);
                self.status.waiting.fetch_sub(1, Ordering::AcqRel);
                lock(&self.status.backlog).run(&client.request);
                self.metrics.queued(now.saturating_duration_since(client.arrived));
            }
        }
    }

    /// Whether the step that was planned last has a text whose vector is wanted.
    fn wants_hidden(&self) -> bool {
        let pooled = &self.flow.pooled;
        !pooled.is_empty() && self.scheduler.in_step().any(|key| pooled.contains_key(&key))
    }

    /// Runs the model over the batch. Hidden states are asked for only in steps that have a text whose vector is wanted.
    fn compute(&mut self) -> Result<(), KernelError> {
        let hidden = self.wants_hidden();
        let Flow { batch, out, pooled, .. } = &mut self.flow;
        if !hidden {
            return self.model.forward(batch, out);
        }
        let (hidden, width) = (self.model.forward_hidden(batch, out)?, self.model.width());
        for (key, span) in self.scheduler.in_step().zip(&batch.sequences) {
            if let Some(pooled) = pooled.get_mut(&key) {
                let (first, rows) = (span.first_row as usize, span.rows as usize);
                let states = hidden.get(first * width..(first + rows) * width).unwrap_or_default();
                pooled.take((span.context_len - span.rows) as usize, states, width);
            }
        }
        Ok(())
    }

    /// Tells the clients what the step led to.
    fn emit(&mut self, now: Instant) {
        for outcome in std::mem::take(&mut self.flow.outcomes) {
            match outcome {
                Outcome::Prompt { request, cached_tokens, logprobs } => {
                    if let Some(client) = self.flow.clients.get_mut(&request) {
                        let prompt_tokens = client.usage().prompt_tokens;
                        self.flow.stats.prompt_tokens += prompt_tokens as u64;
                        lock(&self.status.backlog).prompt(prompt_tokens, cached_tokens);
                        if let Some(pooled) = self.flow.pooled.get(&request) {
                            pooled.send();
                        }
                        client.prompt(cached_tokens, logprobs);
                    }
                }
                Outcome::Token { id, sampled } => {
                    let Some(client) = self.flow.clients.get_mut(&id.request) else { continue };
                    // The engine always generates; of a text whose vector is wanted, nobody sees the one token.
                    self.flow.stats.generation_tokens += u64::from(!self.flow.pooled.contains_key(&id.request));
                    if client.token(id.choice as usize, record(sampled), &self.end_of_turn, now, &self.metrics) {
                        self.scheduler.finish(id);
                        if client.is_finished() {
                            client.done(now, &self.metrics);
                            self.forget(id.request);
                        }
                    }
                }
                Outcome::Complete { id } => {
                    let Some(client) = self.flow.clients.get_mut(&id.request) else { continue };
                    client.complete(id.choice as usize, &self.metrics);
                    self.scheduler.finish(id);
                    if client.is_finished() {
                        client.done(now, &self.metrics);
                        self.forget(id.request);
                    }
                }
                Outcome::Stuck { id, message } => self.fail(id.request, message),
            }
        }
    }

    /// The oldest step under way failed. The error is that of a device with which nothing can be done any more.
    fn fail_step(&mut self, error: KernelError, now: Instant) -> Result<(), KernelError> {
        match &error {
            // After a failed launch or copy, a driver answers every further call with the same failure.
            KernelError::Device(_) => return Err(error),
            KernelError::Memory { .. } => *lock(&self.status.short) = Some((now, error.to_string())),
            _ => {}
        }
        self.fail_requests(&error.to_string());
        Ok(())
    }

    /// The requests of the oldest step under way end, the others go on.
    fn fail_requests(&mut self, error: &str) {
        tracing::error!(error, "a step failed");
        for key in self.scheduler.fail() {
            self.fail(key, format!("the model failed: {error}"));
        }
    }

    /// Ends a request with all its choices.
    fn fail(&mut self, key: RequestKey, message: String) {
        let Some(client) = self.flow.clients.get_mut(&key) else { return };
        client.fail(message);
        self.scheduler.cancel(key, client.request.priority);
        self.metrics.failed();
        self.forget(key);
    }

    /// Ends everything that was submitted so far.
    fn cancel_all(&mut self) {
        for command in self.inbox.clone().try_iter() {
            if let Command::Submit(submission) = command {
                self.accept(submission);
            }
        }
        let keys: Vec<RequestKey> = self.flow.clients.keys().copied().collect();
        for key in keys {
            let Some(client) = self.flow.clients.get_mut(&key) else { continue };
            client.cancel(&self.metrics);
            client.done(Instant::now(), &self.metrics);
            self.scheduler.cancel(key, client.request.priority);
            self.forget(key);
        }
        self.publish(0);
    }

    fn forget(&mut self, key: RequestKey) {
        self.flow.pooled.remove(&key);
        let Some(client) = self.flow.clients.remove(&key) else { return };
        let now = Instant::now();
        match client.admitted {
            Some(admitted) => {
                lock(&self.status.backlog).end(&client.request, now.saturating_duration_since(admitted), client.is_finished());
            }
            None => {
                self.status.waiting.fetch_sub(1, Ordering::AcqRel);
                lock(&self.status.backlog).stop_waiting(&client.request);
            }
        }
        self.flow.stats.finished += 1;
        if let Some(last) = self.flow.last_finish.replace(now) {
            let interval = (now - last).as_micros().min(60_000_000) as u64;
            let mean = self.status.finish_interval_us.load(Ordering::Relaxed);
            self.status.finish_interval_us.store(if mean == 0 { interval } else { (7 * mean + interval) / 8 }, Ordering::Relaxed);
        }
    }

    fn publish(&mut self, step_tokens: usize) {
        let counts = self.scheduler.counts();
        let stats = &mut self.flow.stats;
        let pool = self.scheduler.pool().borrow();
        (stats.blocks_total, stats.blocks_used, stats.blocks_cached) = (pool.total(), pool.used(), pool.cached());
        debug_assert_eq!(pool.check(), Ok(()));
        drop(pool);
        (stats.running, stats.waiting) = (self.scheduler.running(), self.scheduler.waiting());
        (stats.preemptions, stats.restored) = (counts.preemptions, counts.restored);
        (stats.prefix_queries, stats.prefix_hits) = (counts.prefix_queries, counts.prefix_hits);
        stats.steps += u64::from(step_tokens > 0);
        *lock(&self.status.stats) = *stats;
        self.metrics.publish(stats, step_tokens);
    }
}
