//! A server in this process: the real router and engine over a model that recites a script.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking; the lint knows test functions only"
)]

use axum::Router;
use axum::body::Body;
use http_body_util::BodyExt;
use hyper::{HeaderMap, Request, StatusCode};
use serde_json::{Map, Value, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tempfile::TempDir;
use tidemill::adapters::AdapterKeeper;
use tidemill::batches::Batches;
use tidemill::clock::now;
use tidemill::datasets::DatasetJobs;
use tidemill::feedback::Metrics;
use tidemill::fine_tuning::{FineTuning, FineTuningOptions, TrainingDevice, TrainingPriority};
use tidemill::flywheel::{FlywheelOptions, Flywheels};
use tidemill::http::cors::Origins;
use tidemill::http::drain::Drain;
use tidemill::http::limits::{BodyLimits, FileLimits};
use tidemill::http::responses::background::Background;
use tidemill::http::{App, Auth, router};
use tidemill::limits::{Limiter, Prices};
use tidemill::recording::Recording;
use tidemill::rollout::keeper::{Keeper, KeeperRules};
use tidemill::telemetry::Observer;
use tidemill::upstream::remote::Remotes;
use tidemill::upstream::{LocalModel, Registry, RemoteModel, Upstream};
use tidemill_engine::model::Model;
use tidemill_engine::model_files::Frontend;
use tidemill_engine::{ChatTemplate, Engine, EngineOptions, GenerationDefaults, ServedModel, Tokenizer};
use tidemill_kernels::{KernelError, KvDtype, MemoryUse, Sampled, StepBatch, StepOutput};
use tidemill_store::records::{Choice, Feedback, Inference, Kind, Status, TargetKind};
use tidemill_store::{DataDir, Files, Limits, Scope, Store, StoreOptions};
use tokio::runtime::{Builder, Runtime};
use tower::ServiceExt;
use uuid::Uuid;

/// Name of the model.
pub const MODEL: &str = "org/parrot";
/// Ends a turn.
pub const END: u32 = 257;
const VOCABULARY: usize = 259;
const TEMPLATE: &str = "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}\
    <|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Recites `script` as output, whatever the prompt; every token's log-probability is −(1 + index)/8.
pub struct Parrot {
    script: Vec<u32>,
    pace: Duration,
}

impl Model for Parrot {
    fn vocabulary(&self) -> usize {
        VOCABULARY
    }

    fn kv_block_bytes(&self, block_size: usize, _dtype: KvDtype) -> usize {
        block_size
    }

    fn alloc_kv(&mut self, _blocks: usize, _block_size: usize, _dtype: KvDtype) -> Result<(), KernelError> {
        Ok(())
    }

    fn forward(&mut self, batch: &StepBatch, out: &mut StepOutput) -> Result<(), KernelError> {
        std::thread::sleep(self.pace);
        // The parrot chokes on a zero byte.
        if batch.tokens.contains(&0) {
            return Err(KernelError::Unsupported("the parrot choked".into()));
        }
        let sample = |row: &tidemill_kernels::SampleRow| {
            let index = row.counter as usize;
            let token = row.score.unwrap_or_else(|| self.script.get(index).copied().unwrap_or(END));
            let logprob = -(1.0 + index as f32) / 8.0;
            let top = (0..row.top_n.unwrap_or(0)).map(|i| (u32::from(b'a') + i, -0.5 - i as f32)).collect::<Vec<_>>();
            Sampled { token, logprob, processed_logprob: logprob, rank: 1, top: top.clone(), processed_top: top }
        };
        out.samples = batch.samples.iter().map(sample).collect();
        Ok(())
    }

    /// A token's hidden state is its number and 1.
    fn forward_hidden(&mut self, batch: &StepBatch, out: &mut StepOutput) -> Result<Vec<f32>, KernelError> {
        self.forward(batch, out)?;
        Ok(batch.tokens.iter().flat_map(|token| [*token as f32, 1.0]).collect())
    }

    fn width(&self) -> usize {
        2
    }

    fn memory(&self) -> MemoryUse {
        MemoryUse::default()
    }

    fn describe(&self) -> String {
        "parrot".into()
    }
}

/// GPT-2's byte alphabet and three control tokens; every byte is a token.
pub fn byte_tokenizer() -> Tokenizer {
    let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
    let mut next = 256;
    let mut vocabulary = Map::new();
    for byte in 0..256u32 {
        let symbol = if printable(byte) {
            byte
        } else {
            next += 1;
            next - 1
        };
        vocabulary.insert(char::from_u32(symbol).unwrap().to_string(), byte.into());
    }
    let control = |id: u32, text: &str| json!({"id": id, "content": text, "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [control(256, "<|im_start|>"), control(END, "<|im_end|>"), control(258, "<|endoftext|>")],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    Tokenizer::from_json(&path, &Value::Null).unwrap()
}

/// How the server under test differs from the usual one.
pub struct Setup {
    pub script: Vec<u32>,
    pub pace: Duration,
    pub max_waiting: usize,
    pub max_seqs: usize,
    pub max_batch_tokens: usize,
    pub template: Option<&'static str>,
    pub recording: Recording,
    pub metrics: Metrics,
    pub limits: BTreeMap<String, Limits>,
    pub prices: Prices,
    pub remotes: Remotes,
    pub fine_tuning: Option<FineTuningOptions>,
    pub loops: Option<FlywheelOptions>,
}

/// Jobs are taken and wait.
pub fn no_training() -> FineTuningOptions {
    let models = BTreeMap::from([(MODEL.to_owned(), "parrot".into())]);
    FineTuningOptions {
        root: folder().into(),
        program: "false".into(),
        jobs: 0,
        jobs_per_key: 16,
        threads: 1,
        device: TrainingDevice::default(),
        priority: TrainingPriority::Low,
        data: folder().into(),
        models,
    }
}

/// No loops.
pub fn no_loops() -> FlywheelOptions {
    FlywheelOptions {
        policies: BTreeMap::new(),
        root: folder().into(),
        program: "false".into(),
        threads: 1,
        device: TrainingDevice::default(),
        priority: TrainingPriority::Low,
        models: BTreeMap::from([(MODEL.to_owned(), "parrot".into())]),
        data: folder().into(),
        database: None,
        datasets: folder(),
    }
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            script: says("Hi 🌊!"),
            pace: Duration::ZERO,
            max_waiting: 64,
            max_seqs: 16,
            max_batch_tokens: 512,
            template: Some(TEMPLATE),
            recording: Recording::default(),
            metrics: Metrics::new(),
            limits: BTreeMap::new(),
            prices: Prices::new(),
            remotes: Remotes::default(),
            fine_tuning: None,
            loops: None,
        }
    }
}

/// Runs what a store does in the background, beyond the end of single tests.
static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap());

thread_local! {
    /// Directories of this thread's test, removed when it ends.
    static FOLDERS: RefCell<Vec<TempDir>> = const { RefCell::new(Vec::new()) };
}

/// An empty store in a directory of its own.
pub fn store() -> Store {
    store_with(|_| {})
}

/// The same with other options.
pub fn store_with(change: impl FnOnce(&mut StoreOptions)) -> Store {
    let folder = tempfile::tempdir().unwrap();
    let mut options = StoreOptions::new(DataDir::new(folder.path()));
    change(&mut options);
    FOLDERS.with_borrow_mut(|folders| folders.push(folder));
    wait(Store::open(options)).unwrap()
}

/// A test runs inside a runtime already, and may not wait for another one on the same thread.
fn wait<T: Send>(work: impl Future<Output = T> + Send) -> T {
    std::thread::scope(|scope| scope.spawn(|| RUNTIME.block_on(work)).join()).unwrap()
}

/// An empty directory of this thread's test.
fn folder() -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_string_lossy().into_owned();
    FOLDERS.with_borrow_mut(|folders| folders.push(folder));
    path
}

/// What is counted by the day begins anew at midnight (UTC): shortly before, this waits until it has passed.
pub async fn not_at_midnight() {
    const DAY: i64 = 86_400_000_000;
    let left = Duration::from_micros((DAY - now() % DAY).unsigned_abs());
    if left < Duration::from_secs(60) {
        tokio::time::sleep(left + Duration::from_millis(100)).await;
    }
}

/// The tokens of a text, and the end of the turn.
pub fn says(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).chain([END]).collect()
}

impl Setup {
    pub fn script(script: Vec<u32>) -> Self {
        Self { script, ..Self::default() }
    }

    /// An answer of `tokens` tokens, each taking `ms`.
    pub fn slow(tokens: usize, ms: u64) -> Self {
        Self { script: vec![u32::from(b'x'); tokens], pace: Duration::from_millis(ms), ..Self::default() }
    }

    pub fn app(self) -> App {
        let options = EngineOptions {
            served_name: MODEL.into(),
            kv_memory: Some(1 << 20),
            max_seqs: self.max_seqs,
            max_batch_tokens: self.max_batch_tokens,
            max_waiting: self.max_waiting,
            max_model_len: Some(512),
            ..EngineOptions::new("parrot")
        };
        let served = ServedModel {
            model: Box::new(Parrot { script: self.script, pace: self.pace }),
            frontend: Frontend {
                tokenizer: byte_tokenizer(),
                chat_template: self.template.map(|source| ChatTemplate::new(source, None, Map::new()).unwrap()),
                generation_defaults: GenerationDefaults::default(),
                end_of_turn: vec![END],
                pooling: Ok(tidemill_engine::Pooling::default()),
            },
            context: 512,
            description: "parrot".into(),
        };
        let engine = Engine::with_model(served, options).unwrap();
        let remotes = RemoteModel::all(&self.remotes, 7).unwrap();
        let registry = Registry::new([MODEL.to_owned()]).with_remotes(remotes);
        assert!(registry.loaded(MODEL, Upstream::Local(Arc::new(LocalModel::new(engine, 7)))));
        let (store, registry) = (store(), Arc::new(registry));
        let adapters = AdapterKeeper::new(&store, &DataDir::new(folder()), Arc::clone(&registry));
        let feedback_metrics = Arc::new(self.metrics);
        let rules = KeeperRules { recording: self.recording.clone(), ..KeeperRules::default() };
        App {
            rollouts: Keeper::with_rules(&store, Arc::clone(&registry), adapters.clone(), Arc::clone(&feedback_metrics), rules),
            tester_secret: Some("let me in".into()),
            adapters,
            registry,
            drain: Drain::default(),
            origins: Origins::default(),
            body: BodyLimits::default(),
            observer: Observer::default(),
            metrics: None,
            auth: Auth::new(store.clone(), false),
            limits: Arc::new(Limiter::new(store.clone(), self.limits, self.prices)),
            datasets: DatasetJobs::new(store.clone(), &folder()),
            files: wait(Files::open(&store, &DataDir::new(folder()))).unwrap(),
            file_limits: FileLimits { file: 1 << 20, total: 3 << 20 },
            batches: Batches::new(&store),
            fine_tuning: FineTuning::new(&store, self.fine_tuning.unwrap_or_else(no_training)),
            loops: Flywheels::new(&store, self.loops.unwrap_or_else(no_loops)),
            store,
            background: Background::default(),
            recording: Arc::new(self.recording),
            feedback_metrics,
        }
    }

    pub fn router(self) -> Router {
        router(self.app())
    }
}

/// A whole response.
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("not JSON: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The payloads of the `data:` lines; fails on any other line but comments and empty ones.
    pub fn data(&self) -> Vec<String> {
        let text = std::str::from_utf8(&self.body).unwrap();
        assert!(text.is_empty() || text.ends_with("\n\n"), "{text}");
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with(": "));
        lines.map(|line| line.strip_prefix("data: ").unwrap_or_else(|| panic!("{line}")).to_owned()).collect()
    }

    /// The chunks before `[DONE]`, which must be last.
    pub fn chunks(&self) -> Vec<Value> {
        let mut data = self.data();
        assert_eq!(data.pop().as_deref(), Some("[DONE]"));
        data.iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The data of a stream of named events; each is named as its data says.
    pub fn events(&self) -> Vec<Value> {
        let text = std::str::from_utf8(&self.body).unwrap();
        let blocks = text.split_terminator("\n\n").filter(|block| !block.starts_with(": "));
        let event = |block: &str| {
            let (name, data) = block.split_once('\n').unwrap_or_else(|| panic!("{block}"));
            let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
            assert_eq!(name.strip_prefix("event: "), data["type"].as_str());
            data
        };
        blocks.map(event).collect()
    }

    /// `(status, param, code)` of an error; fails when it does not have the shape.
    pub fn error(&self) -> (u16, Option<String>, Option<String>) {
        let json = self.json();
        let error = json["error"].as_object().unwrap();
        assert_eq!(error.keys().collect::<Vec<_>>(), ["message", "type", "param", "code"]);
        assert!(error["message"].as_str().is_some_and(|m| !m.is_empty()));
        assert!(self.headers.contains_key("x-request-id"));
        let text = |key: &str| error[key].as_str().map(str::to_owned);
        (self.status.as_u16(), text("param"), text("code"))
    }
}

pub async fn send(router: &Router, request: Request<Body>) -> Reply {
    let response = router.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes().to_vec();
    Reply { status: parts.status, headers: parts.headers, body }
}

pub async fn post_bytes(router: &Router, path: &str, body: impl Into<Body>) -> Reply {
    send(router, Request::post(path).header("content-type", "application/json").body(body.into()).unwrap()).await
}

pub async fn post(router: &Router, path: &str, body: Value) -> Reply {
    post_bytes(router, path, body.to_string()).await
}

pub async fn get(router: &Router, path: &str) -> Reply {
    send(router, Request::get(path).body(Body::empty()).unwrap()).await
}

/// A request with a key, if any, and a JSON body.
pub async fn ask(router: &Router, method: &str, path: &str, key: Option<&str>, body: Value) -> Reply {
    let mut request = Request::builder().method(method).uri(path);
    if let Some(key) = key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    send(router, request.body(Body::from(body.to_string())).unwrap()).await
}

/// A server with two keys, of which the other may do everything: what the first one stores is its own all the same.
pub struct TwoKeys {
    pub router: Router,
    pub mine: String,
    pub other: String,
}

impl TwoKeys {
    pub async fn new() -> Self {
        let mut app = Setup::default().app();
        let (_, mine) = app.store.create_key("mine", &[Scope::Chat]).await.unwrap();
        let (_, other) = app.store.create_key("other", &[Scope::Admin]).await.unwrap();
        app.auth = Auth::new(app.store.clone(), true);
        Self { router: router(app), mine, other }
    }

    pub async fn ask_mine(&self, method: &str, path: &str, body: Value) -> Reply {
        ask(&self.router, method, path, Some(&self.mine), body).await
    }

    pub async fn ask_other(&self, method: &str, path: &str, body: Value) -> Reply {
        ask(&self.router, method, path, Some(&self.other), body).await
    }

    /// To the other key, none of these is there.
    pub async fn hides(&self, requests: &[(&str, &str, Value)]) {
        for (method, path, body) in requests {
            assert_eq!(self.ask_other(method, path, body.clone()).await.error().0, 404, "{method} {path}");
        }
    }
}

/// A recorded answer of `user` with these choices.
pub fn answered(store: &Store, user: &str, prompt: &str, texts: &[&str], mean_logprob: f64) -> Inference {
    let id = store.issue_id();
    let choice = |(at, text): (usize, &&str)| Choice {
        id: if at == 0 { id } else { store.issue_id() },
        finish_reason: Some("stop".into()),
        output_text: Some((*text).to_owned()),
        message: None,
        output_ids: vec![1],
        logprobs: vec![-1.0],
        raw_logprobs: vec![-1.0],
        mean_logprob: Some(mean_logprob),
        tokens: 1,
    };
    Inference {
        id,
        created: now(),
        endpoint: "chat".into(),
        model: MODEL.into(),
        adapter: 0,
        variant: None,
        conversation: None,
        key_id: None,
        user_key: Some(user.into()),
        status: Status::Ok,
        compare: texts.len() > 1,
        prompt_tokens: 1,
        cached_tokens: 0,
        output_tokens: 1,
        first_token_us: None,
        duration_us: 1,
        config_hash: "c".into(),
        metadata: Map::new(),
        params: None,
        messages: Some(json!([{"role": "user", "content": prompt}])),
        prompt_text: None,
        prompt_ids: vec![1],
        exposure: None,
        choices: texts.iter().enumerate().map(choice).collect(),
    }
}

/// What `author` says about an answer.
pub fn judged(store: &Store, target: Uuid, author: Option<&str>, kind: Kind, value: Value) -> Feedback {
    Feedback {
        id: store.issue_id(),
        created: now(),
        updated: now(),
        revision: 1,
        withdrawn: false,
        target: target.to_string(),
        targets: vec![target.to_string()],
        target_kind: TargetKind::Completion,
        kind,
        metric: None,
        number: value.as_bool().map(|up| f64::from(u8::from(up))),
        value,
        author: author.map(str::to_owned),
        source: Some("api".into()),
        latency_ms: None,
        tags: vec![],
        key_id: None,
        idempotency_key: None,
        task_id: None,
    }
}

/// A chat request with `extra` fields.
pub fn chat(extra: Value) -> Value {
    merged(json!({"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}), extra)
}

/// A completion request with `extra` fields.
pub fn completion(extra: Value) -> Value {
    merged(json!({"model": MODEL, "prompt": "abc"}), extra)
}

/// `base` with the fields of `extra`.
pub fn merged(mut base: Value, extra: Value) -> Value {
    let object = base.as_object_mut().unwrap();
    for (key, value) in extra.as_object().unwrap() {
        object.insert(key.clone(), value.clone());
    }
    base
}
