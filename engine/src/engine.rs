//! The handle that the rest of the program holds.

use crate::adapter::Adapter;
use crate::adapters::{AdapterLease, AdapterRefused, Description, check_name, split_generation};
use crate::backend::{Backend, Needs, Opening};
use crate::block_pool::{BLOCK_SIZE, SharedPool};
use crate::chat_template::ChatTemplate;
use crate::client;
use crate::core::{Command, Core, Flow, Loading, Status, Submission, lock};
use crate::embedding::{EmbedRequest, Embedding, Pooled};
use crate::generation_defaults::GenerationDefaults;
use crate::grammar::{Compiler, Constraint, Grammar, GrammarError};
use crate::memory::{self, Free};
use crate::model::{Decoder, Model, TensorParallel, shard};
use crate::model_config::ModelConfig;
use crate::model_files::{Frontend, ModelFiles};
use crate::options::{EngineOptions, StartError};
use crate::pooling::Pooling;
use crate::request::{Event, Request, SubmitError};
use crate::scheduler::{Scheduler, SchedulerLimits};
use crate::stats::{Metrics, Stats};
use crate::swap_space::SwapSpace;
use crate::tokenizer::Tokenizer;
use crate::validate::validate;
use flume::{Receiver, Sender, TrySendError};
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tidemill_kernels::{KernelError, Limits};

/// How long a stopping engine may take for the step that is in flight.
const LAST_STEP: Duration = Duration::from_secs(30);

/// A running engine. Cloning is cheap; the engine stops when the last handle is dropped.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

struct Inner {
    options: EngineOptions,
    limits: EngineLimits,
    memory: MemoryReport,
    frontend: Frontend,
    compiler: Compiler,
    description: String,
    width: usize,
    /// What adapters must fit.
    adaptable: Option<ModelConfig>,
    commands: Sender<Command>,
    status: Arc<Status>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
    seed: u64,
    seeds: AtomicU64,
}

/// A loaded model with what must be known to serve it.
pub struct ServedModel {
    /// Computes steps.
    pub model: Box<dyn Model>,
    /// Tokenizer, chat template, defaults.
    pub frontend: Frontend,
    /// Positions that the model supports.
    pub context: usize,
    /// For people: family, parameters, size.
    pub description: String,
}

/// What holds for every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineLimits {
    /// Most tokens of prompt and output together.
    pub max_model_len: usize,
    /// Most sequences at once, and so the largest `n`.
    pub max_seqs: usize,
    /// Tokens per step.
    pub max_batch_tokens: usize,
    /// Waiting requests.
    pub max_waiting: usize,
    /// Token ids are below this.
    pub vocabulary: usize,
}

/// Where the memory went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryReport {
    /// Packed weights, bytes.
    pub weights: usize,
    /// KV cache, bytes.
    pub kv: usize,
    /// KV blocks.
    pub kv_blocks: usize,
    /// Tokens per block.
    pub block_size: usize,
    /// Activations and scratch, bytes.
    pub activations: usize,
    /// Of the machine's memory, for the blocks of preempted sequences, bytes.
    pub swap: usize,
    /// Device, instruction path, weight format.
    pub backend: String,
}

/// Whether the engine can serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    /// Takes requests.
    Ready,
    /// Takes requests, but the last step failed for want of memory, not long ago; the next that goes well makes it ready.
    Short(String),
    /// Finishes what it has.
    Draining,
    /// Gone, and why.
    Stopped(String),
}

impl Engine {
    /// Loads the model for the device of `options` and starts the engine's thread. `progress` hears (bytes packed, bytes in all). Install the
    /// metrics recorder before.
    pub fn start(options: EngineOptions, progress: &mut dyn FnMut(u64, u64)) -> Result<Engine, StartError> {
        options.check()?;
        let files = ModelFiles::open(&options.model)?;
        let context = files.config().max_positions;
        let limits = Limits {
            max_tokens: options.max_batch_tokens,
            max_samples: options.max_seqs,
            max_positions: options.max_model_len.unwrap_or(context).min(context),
        };
        let format = options.weight_format;
        let opening = Opening {
            device: &options.device,
            tensor_parallel: options.tensor_parallel,
            threads: options.threads,
            limits,
            cache: options.kernel_cache.as_deref(),
            left: options.left,
            needs: Needs {
                weights: files.packed_bytes(format)?,
                degrees: shard::degrees_of(&files)?,
                routes: files.config().experts.is_some(),
            },
            attention: options.attention_backend,
            activations: options.activations,
        };
        let model: Box<dyn Model> = match opening.open()? {
            Backend::One(ops) => Box::new(Decoder::load(&files, ops, format, progress)?),
            Backend::Several { ranks, abort } => Box::new(TensorParallel::load(&files, ranks, abort, format, progress)?),
        };
        let description = files.describe();
        Self::with_model(ServedModel { model, frontend: files.into_frontend(), context, description }, options)
    }

    /// Starts over a model that is already loaded. Its buffers must hold `max_batch_tokens` tokens and `max_seqs` samples.
    pub fn with_model(served: ServedModel, options: EngineOptions) -> Result<Engine, StartError> {
        options.check()?;
        let ServedModel { mut model, frontend, context, description } = served;
        let block_bytes = model.kv_block_bytes(BLOCK_SIZE, options.kv_dtype);
        let free = model.spare_memory()?.map_or_else(|| Free::Machine(memory::free_memory()), Free::Card);
        let kv = memory::plan(&options, context, block_bytes, free)?;
        model.alloc_kv(kv.blocks, BLOCK_SIZE, options.kv_dtype)?;
        let swap = match free {
            Free::Card(_) => reserve_swap(model.as_mut(), &options, block_bytes, kv.blocks)?,
            Free::Machine(_) => 0,
        };
        let limits = EngineLimits {
            max_model_len: kv.max_model_len,
            max_seqs: options.max_seqs,
            max_batch_tokens: options.max_batch_tokens,
            max_waiting: options.max_waiting,
            vocabulary: model.vocabulary(),
        };
        let (width, adaptable) = (model.width(), model.adaptable().cloned());
        let held = model.memory();
        let memory = MemoryReport {
            weights: held.weights,
            kv: kv.blocks * block_bytes,
            kv_blocks: kv.blocks,
            block_size: BLOCK_SIZE,
            activations: held.activations,
            swap: swap * block_bytes,
            backend: model.describe(),
        };
        // Submissions are bounded by `max_waiting`; the rest is for wake-ups.
        let (commands, inbox) = flume::bounded(options.max_waiting.saturating_add(64));
        let status = Arc::new(Status::new(options.max_seqs, options.max_adapters));
        let scheduling = SchedulerLimits {
            max_seqs: options.max_seqs,
            max_batch_tokens: options.max_batch_tokens,
            max_samples: options.max_seqs,
            prefix_caching: options.prefix_caching,
            end_of_turn: frontend.end_of_turn.clone(),
            max_model_len: kv.max_model_len,
        };
        let compiler = Compiler::new(frontend.tokenizer.clone(), frontend.end_of_turn.clone(), limits.vocabulary);
        let (alive, ended) = flume::bounded::<()>(1);
        let (tokenizer, end_of_turn) = (frontend.tokenizer.clone(), frontend.end_of_turn.clone());
        let (name, shared) = (options.served_name.clone(), Arc::clone(&status));
        let run = move || {
            // Block tables hold the pool without locks, so it is made on the thread that keeps it.
            let scheduler = Scheduler::new(scheduling, SharedPool::new(kv.blocks)).swapping(SwapSpace::new(swap));
            let (max_model_len, metrics, flow) = (kv.max_model_len, Metrics::new(&name), Flow::default());
            Core { model, tokenizer, end_of_turn, max_model_len, inbox, status: shared, metrics, scheduler, flow }.run();
            drop(alive);
        };
        std::thread::Builder::new().name("tidemill-engine".into()).spawn(run).map_err(StartError::Thread)?;
        // The standard library's hasher is seeded by the system: enough for seeds nobody asked to repeat.
        let seed = options.seed.unwrap_or_else(|| RandomState::new().hash_one(0u64));
        let seeds = AtomicU64::new(0);
        let inner = Inner {
            options,
            limits,
            memory,
            frontend,
            compiler,
            description,
            width,
            adaptable,
            commands,
            status,
            ended,
            seed,
            seeds,
        };
        Ok(Engine { inner: Arc::new(inner) })
    }

    /// Takes a request. Dropping the receiver cancels it within one step. A receiver that disconnects before `Done` or `Failed`
    /// means that the engine is gone.
    pub fn submit(&self, request: Request) -> Result<Receiver<Event>, SubmitError> {
        self.send(request, None)
    }

    /// Takes a text whose vector is wanted. Dropping what it returns cancels it within one step.
    pub fn embed(&self, request: EmbedRequest) -> Result<Embedding, SubmitError> {
        let pooling = self
            .pooling()
            .as_ref()
            .map_err(|why| SubmitError::Invalid { param: "model", message: format!("this model gives no embeddings: {why}") })?;
        let (pooled, vector) = Pooled::new(pooling.mode);
        let events = self.send(request.into_request(pooling.mode), Some(pooled))?;
        Ok(Embedding::new(events, vector))
    }

    fn send(&self, request: Request, pooled: Option<Pooled>) -> Result<Receiver<Event>, SubmitError> {
        let inner = &*self.inner;
        validate(&request, &inner.limits)?;
        match self.health() {
            Health::Ready | Health::Short(_) => {}
            Health::Draining => return Err(SubmitError::Draining),
            Health::Stopped(reason) => return Err(SubmitError::Stopped(reason)),
        }
        self.check_deadline(&request)?;
        let limit = inner.limits.max_waiting;
        let one_more = |waiting| (waiting < limit).then_some(waiting + 1);
        if let Err(waiting) = inner.status.waiting.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more) {
            return Err(SubmitError::QueueFull { waiting, limit, retry_after_s: self.retry_after(waiting) });
        }
        let seed = request.sampling.seed.unwrap_or_else(|| self.draw_seed());
        let (events, receiver) = flume::bounded(client::capacity(request.sampling.n));
        let request = Arc::new(request);
        // Before the engine's thread can say that it runs.
        lock(&inner.status.backlog).wait(&request);
        let submission = Submission { request: Arc::clone(&request), seed, events, arrived: Instant::now(), pooled };
        match inner.commands.try_send(Command::Submit(submission)) {
            // An engine that stopped meanwhile emptied its inbox before this request came; nobody would ever answer.
            Ok(()) => match self.health() {
                Health::Stopped(reason) => Err(SubmitError::Stopped(reason)),
                Health::Ready | Health::Short(_) | Health::Draining => Ok(receiver),
            },
            Err(error) => {
                inner.status.waiting.fetch_sub(1, Ordering::AcqRel);
                lock(&inner.status.backlog).stop_waiting(&request);
                Err(match error {
                    TrySendError::Full(_) => {
                        SubmitError::QueueFull { waiting: limit, limit, retry_after_s: self.retry_after(limit) }
                    }
                    TrySendError::Disconnected(_) => SubmitError::Stopped("its thread has ended".into()),
                })
            }
        }
    }

    /// Loads the adapter in `folder` under a name, while serving: as a new generation where the name is taken, in the place of the one
    /// not asked for the longest where all are. A name that ends in `@` and a generation (16 hexadecimal digits) takes no other.
    /// Equal contents under the name that they have are left as they are. Blocks for the reading and one step: call it from a thread
    /// that may. `created` is in seconds since 1970.
    pub fn load_adapter(&self, name: &str, folder: &Path, pinned: bool, created: u64) -> Result<AdapterLease, AdapterRefused> {
        check_name(split_generation(name).0)?;
        if !self.takes_adapters() {
            return Err(AdapterRefused::Off);
        }
        self.publish_adapter(name, Adapter::read(folder)?, pinned, created)
    }

    /// The same with an adapter that is in memory, as a trainer has it.
    pub fn publish_adapter(
        &self,
        name: &str,
        adapter: Adapter,
        pinned: bool,
        created: u64,
    ) -> Result<AdapterLease, AdapterRefused> {
        let inner = &*self.inner;
        let (plain, promised) = split_generation(name);
        check_name(plain)?;
        let Some(model) = inner.adaptable.as_ref().filter(|_| self.takes_adapters()) else {
            return Err(AdapterRefused::Off);
        };
        let (rank, limit) = (adapter.max_rank(), inner.options.max_adapter_rank);
        if rank > limit {
            return Err(AdapterRefused::Rank { rank, limit });
        }
        adapter.check(model)?;
        let found = adapter.generation();
        if promised.is_some_and(|promised| promised != found) {
            return Err(AdapterRefused::Generation { name: name.to_owned(), found });
        }
        let (base, bytes) = (adapter.base.clone(), adapter.bytes());
        let description = Description { name: name.to_owned(), digest: adapter.digest(), base, rank, bytes, created, pinned };
        {
            let table = lock(&inner.status.adapters);
            if let Some(there) = table.same(&description) {
                table.pin(name, pinned)?;
                return Ok(there);
            }
        }
        let (outcome, answer) = flume::bounded(1);
        let loading = Box::new(Loading { adapter, description, outcome });
        inner.commands.send(Command::Load(loading)).map_err(|_| AdapterRefused::Stopped)?;
        // An engine that stopped meanwhile emptied its inbox before this came; nobody would ever answer.
        if matches!(self.health(), Health::Stopped(_)) {
            return Err(AdapterRefused::Stopped);
        }
        answer.recv().map_err(|_| AdapterRefused::Stopped)?
    }

    fn takes_adapters(&self) -> bool {
        self.inner.adaptable.is_some() && self.inner.options.max_adapters > 0
    }

    /// Takes an adapter away: nobody can ask for it any more, and who has it goes on.
    pub fn unload_adapter(&self, name: &str) -> Result<(), AdapterRefused> {
        lock(&self.inner.status.adapters).unload(name)?;
        self.wake();
        Ok(())
    }

    /// Keeps an adapter when another needs room, or no longer.
    pub fn pin_adapter(&self, name: &str, pinned: bool) -> Result<(), AdapterRefused> {
        lock(&self.inner.status.adapters).pin(name, pinned)
    }

    /// The sizes that adapters must fit, where the model takes any.
    pub fn adaptable(&self) -> Option<&ModelConfig> {
        self.inner.adaptable.as_ref()
    }

    /// The adapter of this name, to be given to requests.
    pub fn adapter(&self, name: &str) -> Option<AdapterLease> {
        lock(&self.inner.status.adapters).find(name)
    }

    /// All adapters that can be asked for, in the order in which they were loaded.
    pub fn adapters(&self) -> Vec<AdapterLease> {
        lock(&self.inner.status.adapters).list()
    }

    /// Fails when the first token could not come before the deadline.
    fn check_deadline(&self, request: &Request) -> Result<(), SubmitError> {
        let Some(deadline) = request.deadline else { return Ok(()) };
        let left = deadline.saturating_duration_since(Instant::now());
        let expected = lock(&self.inner.status.backlog).estimate(request);
        if expected <= left && !left.is_zero() {
            return Ok(());
        }
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let retry_after_s = expected.saturating_sub(left).as_secs().saturating_add(1).min(60) as u32;
        Err(SubmitError::TooLate { expected_ms: ms(expected), left_ms: ms(left), retry_after_s })
    }

    /// Compiles a constraint for this model's vocabulary. Takes milliseconds of computing, bounded: call it from a thread that may
    /// block, and keep the result for the requests that ask for the same.
    pub fn compile(&self, constraint: &Constraint) -> Result<Arc<Grammar>, GrammarError> {
        self.inner.compiler.compile(constraint)
    }

    /// What requests must keep to.
    pub fn limits(&self) -> EngineLimits {
        self.inner.limits
    }

    /// The options it was started with.
    pub fn options(&self) -> &EngineOptions {
        &self.inner.options
    }

    /// Where the memory went.
    pub fn memory(&self) -> &MemoryReport {
        &self.inner.memory
    }

    /// Text to tokens and back.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.inner.frontend.tokenizer
    }

    /// Messages to text; base models have none.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.inner.frontend.chat_template.as_ref()
    }

    /// The publisher's sampling defaults.
    pub fn generation_defaults(&self) -> &GenerationDefaults {
        &self.inner.frontend.generation_defaults
    }

    /// Every token that ends a turn.
    pub fn end_of_turn(&self) -> &[u32] {
        &self.inner.frontend.end_of_turn
    }

    /// How vectors of texts are made, or why they cannot be.
    pub fn pooling(&self) -> &Result<Pooling, String> {
        &self.inner.frontend.pooling
    }

    /// Numbers of a text's vector.
    pub fn width(&self) -> usize {
        self.inner.width
    }

    /// For people: family, parameters, size.
    pub fn description(&self) -> &str {
        &self.inner.description
    }

    /// Counts as of the last step.
    pub fn stats(&self) -> Stats {
        self.inner.status.stats()
    }

    /// Whether it can serve.
    pub fn health(&self) -> Health {
        self.inner.status.health(Instant::now())
    }

    /// Whether it takes requests and has no want of memory.
    pub fn is_ready(&self) -> bool {
        self.health() == Health::Ready
    }

    /// Takes nothing new, finishes what it has, cancels what is left after `deadline`, and stops. Blocks: call it from a thread
    /// that may. Returns whether everything finished by itself.
    pub fn drain(&self, deadline: Duration) -> bool {
        let inner = &*self.inner;
        inner.status.draining.store(true, Ordering::Release);
        self.wake();
        if inner.ended.recv_timeout(deadline) == Err(flume::RecvTimeoutError::Disconnected) {
            return true;
        }
        self.cancel_all();
        // Only the end of the thread matters here: it comes after the step in flight.
        inner.ended.recv_timeout(LAST_STEP).ok();
        false
    }

    /// Ends all requests with [`crate::FinishReason::Cancelled`].
    pub fn cancel_all(&self) {
        self.inner.status.cancel_all.store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        // A full channel means that the thread is awake, a closed one that it is gone.
        self.inner.commands.try_send(Command::Wake).ok();
    }

    /// A seed for a request that brings none; [`Engine::submit`] draws one itself when it must. Drawn by the caller, it can be recorded.
    pub fn draw_seed(&self) -> u64 {
        crate::batch::stream_seed(self.inner.seed, self.inner.seeds.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// When a place in the queue may be free, from the pace at which requests finish.
    fn retry_after(&self, waiting: usize) -> u32 {
        let interval = self.inner.status.finish_interval_us.load(Ordering::Relaxed);
        let seconds = interval.saturating_mul(waiting as u64) / 4 / 1_000_000;
        seconds.clamp(1, 60) as u32
    }
}

/// Reserves places for blocks of preempted sequences; returns how many. Where nobody asked for any, the engine does without when there is
/// no memory for them.
fn reserve_swap(model: &mut dyn Model, options: &EngineOptions, block_bytes: usize, blocks: usize) -> Result<usize, StartError> {
    let places = memory::swap_places(options, block_bytes, blocks, memory::free_memory());
    if places == 0 {
        return Ok(0);
    }
    match (model.alloc_swap(places), options.swap_memory) {
        (Ok(()), _) => Ok(places),
        (Err(KernelError::Memory { bytes, .. }), Some(_)) => {
            let message = format!("asks for {bytes} bytes that the system does not lock for the card; make it smaller, or 0");
            Err(StartError::Option { option: "--swap-memory", message })
        }
        (Err(KernelError::Memory { bytes, .. }), None) => {
            tracing::warn!(bytes, "no memory to keep preempted sequences in: they are computed again");
            Ok(0)
        }
        (Err(error), _) => Err(error.into()),
    }
}

#[cfg(test)]
mod grammar_tests;
#[cfg(test)]
mod tests;
