//! `tidemill serve`

use crate::adapters::AdapterKeeper;
use crate::batches::Batches;
use crate::cli::banner;
use crate::cli::shutdown::{Ended, leave_in_good_order};
use crate::clock;
use crate::config::{Config, ConfigError, Layer, ModelSpec, Origin};
use crate::datasets::DatasetJobs;
use crate::fine_tuning::{FineTuning, FineTuningOptions};
use crate::flywheel::{FlywheelOptions, Flywheels, planned_rollout};
use crate::http::drain::Drain;
use crate::http::limits::BodyLimits;
use crate::http::responses::background::Background;
use crate::http::server::Server;
use crate::http::tls::{Tls, TlsError};
use crate::http::{App, Auth};
use crate::limits::Limiter;
use crate::rollout::assignment::Holdout;
use crate::rollout::keeper::{Keeper, KeeperRules, declared};
use crate::rollout::scorer::Scorer;
use crate::telemetry::{self, Observer, TelemetryError};
use crate::upstream::remote::RemoteError;
use crate::upstream::{LocalModel, Registry, RemoteModel, Upstream};
use metrics_exporter_prometheus::PrometheusHandle;
use std::net::{IpAddr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tidemill_engine::{AdapterRefused, Engine, StartError};
use tidemill_store::{DataDir, Files, Retention, Store, StoreOptions};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// All of these can be set in `tidemill.toml` (with underscores) and in the environment (`TIDEMILL_MAX_SEQS`), too; a flag goes
/// before the environment, the environment before the file.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// Model to serve, several times for several: a path, the name of a pulled model, or NAME=PATH [default: the pulled default model]
    #[arg(long, value_name = "[NAME=]PATH")]
    model: Vec<String>,
    /// Address to listen on [default: 127.0.0.1]
    #[arg(long, value_name = "ADDRESS")]
    host: Option<String>,
    /// Port to listen on [default: 8080]
    #[arg(long, value_name = "PORT")]
    port: Option<String>,
    /// Directory for models and records [default: ./data]
    #[arg(long, value_name = "DIR")]
    data: Option<String>,
    /// Threads that compute [default: one per core]
    #[arg(long, value_name = "N")]
    threads: Option<String>,
    /// Memory for keys and values, such as 2GiB [default: from free memory]
    #[arg(long, value_name = "SIZE")]
    kv_memory: Option<String>,
    /// Memory of the machine for the keys and values of preempted answers of a card; 0 keeps none [default: 4GiB, at most a quarter of what is
    /// free]
    #[arg(long, value_name = "SIZE")]
    swap_memory: Option<String>,
    /// Sequences that run at once [default: 64]
    #[arg(long, value_name = "N")]
    max_seqs: Option<String>,
    /// Most tokens of prompt and output together [default: the model's own]
    #[arg(long, value_name = "N")]
    max_model_len: Option<String>,
    /// Requests that may wait; more are refused with 503 [default: 1024]
    #[arg(long, value_name = "N")]
    max_waiting: Option<String>,
    /// Tokens that one step computes [default: 512]
    #[arg(long, value_name = "N")]
    max_batch_tokens: Option<String>,
    /// Form of the weights in memory: auto, f32, bf16, int8, fp8 (on cards) [default: auto]
    #[arg(long, value_name = "FORMAT")]
    weights: Option<String>,
    /// What activations are where `--weights fp8` are multiplied: bf16, fp8 (of many rows, on cards that can) [default: bf16]
    #[arg(long, value_name = "FORMAT")]
    activations: Option<String>,
    /// Form of keys and values: bf16, f32, fp8 (on cards) [default: bf16]
    #[arg(long, value_name = "FORMAT")]
    kv_dtype: Option<String>,
    /// How a card computes the attention of prompts: auto (what it does faster), mma, wgmma [default: auto]
    #[arg(long, value_name = "NAME")]
    attention_backend: Option<String>,
    /// Reuse what was computed for equal beginnings of prompts: true, false [default: true]
    #[arg(long, value_name = "BOOL")]
    prefix_caching: Option<String>,
    /// Adapters that can be asked for at once; 0 takes none [default: 16]
    #[arg(long, value_name = "N")]
    max_loras: Option<String>,
    /// Largest rank of an adapter [default: 64]
    #[arg(long, value_name = "N")]
    max_lora_rank: Option<String>,
    /// Adapter to load at start, several times for several: a folder that PEFT wrote, of the first model or as MODEL:NAME=PATH
    #[arg(long, value_name = "NAME=PATH")]
    lora_modules: Vec<String>,
    /// Model that another server answers, several times for several: its name here, its name there, the server's address, and the
    /// variable that holds the key
    #[arg(long, value_name = "NAME=[MODEL@]URL[#VARIABLE]")]
    upstream: Vec<String>,
    /// Seed for requests that bring none [default: another one on every start]
    #[arg(long, value_name = "N")]
    seed: Option<String>,
    /// Where to compute: cpu, cuda (as many cards as the model needs), cuda:N or cuda:N,N with the numbers of cards, auto [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Cards that compute each model together [default: one where the model fits it well, else the fewest that hold it]
    #[arg(long, value_name = "N")]
    tensor_parallel: Option<String>,
    /// Time that running answers get after SIGTERM [default: 30s]
    #[arg(long, value_name = "TIME")]
    drain_timeout: Option<String>,
    /// Largest request body [default: 10MiB]
    #[arg(long, value_name = "SIZE")]
    max_body: Option<String>,
    /// Time that a request's body may take [default: 30s]
    #[arg(long, value_name = "TIME")]
    body_timeout: Option<String>,
    /// Connections at once; more wait [default: 4096]
    #[arg(long, value_name = "N")]
    max_connections: Option<String>,
    /// Connections without a request are closed after this time [default: 75s]
    #[arg(long, value_name = "TIME")]
    idle_timeout: Option<String>,
    /// An answer that its client leaves unread for this time is dropped [default: 120s]
    #[arg(long, value_name = "TIME")]
    write_timeout: Option<String>,
    /// Certificate chain for TLS, a PEM file; read again when it changes [default: no TLS]
    #[arg(long, value_name = "FILE")]
    tls_certificate: Option<String>,
    /// Private key of the certificate, a PEM file
    #[arg(long, value_name = "FILE")]
    tls_key: Option<String>,
    /// Web pages that may call from a browser, such as https://app.example.com, separated by commas; * is every page [default: none]
    #[arg(long, value_name = "ORIGINS")]
    cors_origins: Option<String>,
    /// Largest file that can be uploaded [default: 200MiB]
    #[arg(long, value_name = "SIZE")]
    max_file: Option<String>,
    /// Room for all files together [default: 16GiB]
    #[arg(long, value_name = "SIZE")]
    max_files: Option<String>,
    /// How long a key that was seen is believed while the database is away [default: 1h]
    #[arg(long, value_name = "TIME")]
    auth_grace: Option<String>,
    /// How models write tool calls: auto, hermes, llama3_json, mistral, ... [default: auto, by the chat template]
    #[arg(long, value_name = "FAMILY")]
    tool_parser: Option<String>,
    /// How models mark their reasoning: auto, none, think, magistral, ... [default: auto, by the chat template]
    #[arg(long, value_name = "FAMILY")]
    reasoning_parser: Option<String>,
    /// Where records are kept: postgres://USER:PASSWORD@HOST/NAME [default: SQLite in the data directory]
    #[arg(long, value_name = "URL")]
    database: Option<String>,
    /// Folder or URL that holds the datasets' tables [default: datasets in the data directory]
    #[arg(long, value_name = "PLACE")]
    datasets: Option<String>,
    /// Fine-tuning jobs that train at once; 0 takes them and leaves them waiting [default: 1]
    #[arg(long, value_name = "N")]
    training_jobs: Option<String>,
    /// Fine-tuning jobs of one key that may run, wait or be paused; more are refused [default: 16]
    #[arg(long, value_name = "N")]
    training_jobs_per_key: Option<String>,
    /// Threads of a fine-tuning job, beside those that serve [default: half of the cores]
    #[arg(long, value_name = "N")]
    training_threads: Option<String>,
    /// How urgent a fine-tuning job is: idle (what nobody else wants) or low (a small share whatever happens) [default: idle]
    #[arg(long, value_name = "PRIORITY")]
    training_priority: Option<String>,
    /// How much of each answer is recorded: full, metadata, off [default: full]
    #[arg(long, value_name = "LEVEL")]
    record: Option<String>,
    /// Share of the answers that is recorded [default: 1]
    #[arg(long, value_name = "0..1")]
    record_share: Option<String>,
    /// Most bytes of records that wait on disk while the database is away [default: 1GiB]
    #[arg(long, value_name = "SIZE")]
    spill_size: Option<String>,
    /// Remove recorded answers older than this, such as 90d [default: never]
    #[arg(long, value_name = "TIME")]
    retention_age: Option<String>,
    /// Remove the oldest recorded answers beyond this size [default: no limit]
    #[arg(long, value_name = "SIZE")]
    retention_size: Option<String>,
    /// Log filter, such as info,tidemill=debug [default: info]
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
    /// Log lines for people or for machines: text, json [default: text]
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
    /// Write prompts and answers to the log: true, false [default: false]
    #[arg(long, value_name = "BOOL")]
    log_content: Option<String>,
    /// Send traces over OTLP/HTTP to this collector, such as http://localhost:4318 [default: none]
    #[arg(long, value_name = "URL")]
    otlp_endpoint: Option<String>,
    /// Share of the traces begun here that is sent [default: 1]
    #[arg(long, value_name = "0..1")]
    trace_share: Option<String>,
    /// File with the secret by which testers without an admin key choose a rollout's variant [default: none]
    #[arg(long, value_name = "FILE")]
    tester_secret_file: Option<String>,
    /// Share of the users that takes part in no rollout, such as 2026=0.05; another name is another share [default: none]
    #[arg(long, value_name = "NAME=0..1")]
    holdout: Option<String>,
    /// Promote rollouts only with another API key than started them [default: false]
    #[arg(long, value_name = "true|false", num_args = 0..=1, default_missing_value = "true")]
    four_eyes: Option<String>,
    /// Configuration file [default: tidemill.toml where there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ServeArgs {
    fn to_layer(&self) -> Layer {
        let mut layer = Layer::default();
        for model in &self.model {
            layer.push("model", model.clone(), Origin::Flag("model"));
        }
        for module in &self.lora_modules {
            layer.push("lora_modules", module.clone(), Origin::Flag("lora_modules"));
        }
        for upstream in &self.upstream {
            layer.push("upstream", upstream.clone(), Origin::Flag("upstream"));
        }
        let flags = [
            ("host", &self.host),
            ("port", &self.port),
            ("data", &self.data),
            ("threads", &self.threads),
            ("kv_memory", &self.kv_memory),
            ("swap_memory", &self.swap_memory),
            ("max_seqs", &self.max_seqs),
            ("max_model_len", &self.max_model_len),
            ("max_waiting", &self.max_waiting),
            ("max_batch_tokens", &self.max_batch_tokens),
            ("weights", &self.weights),
            ("activations", &self.activations),
            ("kv_dtype", &self.kv_dtype),
            ("attention_backend", &self.attention_backend),
            ("prefix_caching", &self.prefix_caching),
            ("max_loras", &self.max_loras),
            ("max_lora_rank", &self.max_lora_rank),
            ("seed", &self.seed),
            ("device", &self.device),
            ("tensor_parallel", &self.tensor_parallel),
            ("drain_timeout", &self.drain_timeout),
            ("max_body", &self.max_body),
            ("body_timeout", &self.body_timeout),
            ("max_connections", &self.max_connections),
            ("idle_timeout", &self.idle_timeout),
            ("write_timeout", &self.write_timeout),
            ("tls_certificate", &self.tls_certificate),
            ("tls_key", &self.tls_key),
            ("cors_origins", &self.cors_origins),
            ("max_file", &self.max_file),
            ("max_files", &self.max_files),
            ("auth_grace", &self.auth_grace),
            ("tool_parser", &self.tool_parser),
            ("reasoning_parser", &self.reasoning_parser),
            ("database", &self.database),
            ("datasets", &self.datasets),
            ("training_jobs", &self.training_jobs),
            ("training_jobs_per_key", &self.training_jobs_per_key),
            ("training_threads", &self.training_threads),
            ("training_priority", &self.training_priority),
            ("record", &self.record),
            ("record_share", &self.record_share),
            ("spill_size", &self.spill_size),
            ("retention_age", &self.retention_age),
            ("retention_size", &self.retention_size),
            ("log", &self.log),
            ("log_format", &self.log_format),
            ("log_content", &self.log_content),
            ("otlp_endpoint", &self.otlp_endpoint),
            ("trace_share", &self.trace_share),
            ("tester_secret_file", &self.tester_secret_file),
            ("holdout", &self.holdout),
            ("four_eyes", &self.four_eyes),
        ];
        for (key, text) in flags {
            layer.flag(key, text.as_ref());
        }
        layer
    }
}

/// Why the server did not start or stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The configuration is wrong.
    #[error("{0}")]
    Config(#[from] ConfigError),
    /// Logs or metrics could not be set up.
    #[error("{0}")]
    Telemetry(#[from] TelemetryError),
    /// The data directory is taken or unwritable.
    #[error("{0}")]
    Store(#[from] tidemill_store::StoreError),
    /// Others could reach it, and nobody would be asked who they are.
    #[error(
        "there is no API key yet, so this server may only listen on this machine, not on {0}; make a key with `tidemill key create --name NAME --scope chat,feedback`, or leave out --host"
    )]
    NoKey(IpAddr),
    /// The certificate cannot be used.
    #[error("{0}")]
    Tls(#[from] TlsError),
    /// The system gives no threads.
    #[error("cannot start threads: {0}")]
    Threads(std::io::Error),
    /// The system does not say which program this is, and fine-tuning jobs are run by it.
    #[error("cannot tell where this program lies: {0}; see that /proc is there")]
    Program(std::io::Error),
    /// The testers' secret cannot be read.
    #[error("cannot read the testers' secret from {}: {source}; see --tester-secret-file", path.display())]
    Secret {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The address is taken or not ours.
    #[error("cannot listen on {address}: {source}; choose another --port or --host")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// A model cannot be loaded.
    #[error("cannot load the model `{name}`: {source}")]
    Load {
        /// Which.
        name: String,
        /// Why not, and the next step.
        source: StartError,
    },
    /// An adapter cannot be loaded.
    #[error("cannot load the adapter `{name}`: {source}")]
    Adapter {
        /// As it was given.
        name: String,
        /// Why not, and the next step.
        source: Box<AdapterRefused>,
    },
    /// A remote model cannot be asked.
    #[error("{0}")]
    Remote(#[from] RemoteError),
    /// A fault of ours while loading.
    #[error("loading broke off because of an internal error, reported above; please tell us which model it was")]
    Loader,
}

/// Starts the server and returns when it has left in good order.
pub fn run(args: &ServeArgs) -> Result<(), ServeError> {
    let config = Config::load(args.to_layer(), args.config.as_deref(), utf8_environment())?;
    telemetry::init_logs(&config.log, config.log_format)?;
    let metrics = telemetry::init_metrics()?;
    let spans = match &config.otlp_endpoint {
        Some(endpoint) => telemetry::exporting(endpoint, config.trace_share).map_err(TelemetryError::from)?,
        None => telemetry::silent(),
    };
    let observer = Observer::new(spans, config.log_content);
    let models = config.resolve_models()?;
    let _lock = DataDir::new(&config.data).lock()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(network_threads())
        .thread_name("tidemill-net")
        .enable_all()
        .build()
        .map_err(ServeError::Threads)?;
    let result = runtime.block_on(async {
        let app = open(&config, &models, metrics, observer.clone()).await?;
        let (store, datasets, batches) = (app.store.clone(), app.datasets.clone(), app.batches.clone());
        let fine_tuning = app.fine_tuning.clone();
        let limits = Arc::clone(&app.limits);
        tokio::spawn(batches.clone().run(app.clone(), config.retention_age));
        let loops = app.loops.clone();
        tokio::spawn(fine_tuning.clone().run(app.clone()));
        tokio::spawn(loops.clone().run(app.clone()));
        let rollouts = app.rollouts.clone();
        let result = serve(config, models, app).await;
        loops.close().await;
        rollouts.close().await;
        batches.close().await;
        fine_tuning.close().await;
        datasets.close().await;
        if let Err(error) = limits.ledger().flush().await {
            tracing::error!(%error, "what keys have used in the last moment is lost");
        }
        // Last of all: answers that were cut off on the way out are records, too.
        store.close().await;
        result
    });
    observer.close();
    // Work that nobody waits for any more must not hold up the exit.
    runtime.shutdown_background();
    result
}

/// Opens the store and puts together what handlers see.
async fn open(config: &Config, models: &[ModelSpec], metrics: PrometheusHandle, observer: Observer) -> Result<App, ServeError> {
    let data = DataDir::new(&config.data);
    let retention = Retention { max_age: config.retention_age, max_bytes: config.retention_size };
    let defaults = StoreOptions::new(data);
    let options = StoreOptions { url: config.database.clone(), spill_bytes: config.spill_size, retention, ..defaults };
    let store = Store::open(options).await?;
    let has_key = store.any_key().await?;
    if !has_key && !config.host.is_loopback() {
        return Err(ServeError::NoKey(config.host));
    }
    let files = Files::open(&store, &DataDir::new(&config.data)).await?;
    let remotes = RemoteModel::all(&config.remotes, clock::seconds())?;
    let registry = Arc::new(Registry::new(models.iter().map(|model| model.name.clone())).with_remotes(remotes));
    let adapters = AdapterKeeper::new(&store, &DataDir::new(&config.data), Arc::clone(&registry));
    let feedback_metrics = Arc::new(config.metrics.clone());
    let holdouts = config.holdout.iter().map(|(name, share)| Holdout::new(name, *share)).collect();
    let rules = KeeperRules { holdouts, four_eyes: config.four_eyes, recording: config.recording.clone() };
    let rollouts = Keeper::with_rules(&store, Arc::clone(&registry), adapters.clone(), Arc::clone(&feedback_metrics), rules);
    // Before the first request: what was promoted is what the names serve.
    rollouts.follow().await?;
    Ok(App {
        adapters,
        registry,
        drain: Drain::default(),
        origins: config.origins.clone(),
        body: BodyLimits { bytes: config.max_body, time: config.body_timeout },
        observer,
        metrics: Some(metrics),
        auth: Auth::with_grace(store.clone(), has_key, config.auth_grace),
        limits: Arc::new(Limiter::new(store.clone(), config.model_limits.clone(), config.prices.clone())),
        datasets: DatasetJobs::new(store.clone(), &config.datasets_root()),
        files,
        file_limits: config.file_limits,
        batches: Batches::new(&store),
        loops: Flywheels::new(&store, flywheel_options(config, models)?),
        fine_tuning: FineTuning::new(&store, fine_tuning_options(config, models)?),
        store,
        background: Background::default(),
        recording: Arc::new(config.recording.clone()),
        feedback_metrics,
        rollouts,
        tester_secret: tester_secret(config)?,
    })
}

/// What testers send; a file without any text lets nobody in.
fn tester_secret(config: &Config) -> Result<Option<Arc<str>>, ServeError> {
    let Some(path) = &config.tester_secret_file else { return Ok(None) };
    let text = std::fs::read_to_string(path).map_err(|source| ServeError::Secret { path: path.clone(), source })?;
    Ok(Some(text.trim()).filter(|secret| !secret.is_empty()).map(Arc::from))
}

/// How jobs train: by this very program, beside a server that needs the other half of the cores.
fn fine_tuning_options(config: &Config, models: &[ModelSpec]) -> Result<FineTuningOptions, ServeError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(FineTuningOptions {
        root: DataDir::new(&config.data).root().join("fine_tuning"),
        program: std::env::current_exe().map_err(ServeError::Program)?,
        jobs: config.training_jobs,
        jobs_per_key: config.training_jobs_per_key,
        threads: config.training_threads.unwrap_or((cores / 2).max(1)),
        priority: config.training_priority,
        models: models.iter().map(|model| (model.name.clone(), model.path.clone())).collect(),
    })
}

/// What loops do, with the means of the fine-tuning jobs. What they name must be there before anybody waits for it.
fn flywheel_options(config: &Config, models: &[ModelSpec]) -> Result<FlywheelOptions, ServeError> {
    for (name, policy) in &config.loops {
        let wrong = |field: &str, message: String| {
            ServeError::Config(ConfigError::Value { place: format!("`loop.{name}.{field}`"), message })
        };
        if !models.iter().any(|model| model.name == policy.base) {
            let served: Vec<&str> = models.iter().map(|model| model.name.as_str()).collect();
            let message = format!("`{}` is no model that is served here; name one of {}", policy.base, served.join(", "));
            return Err(wrong("base", message));
        }
        if let Some(text) = &policy.measuring.text
            && let Err(error) = std::fs::metadata(text)
        {
            return Err(wrong("evaluate.text", format!("cannot read `{text}`: {error}; name a file of ordinary text")));
        }
        let rollout = planned_rollout(policy, name).map_err(|error| wrong("rollout", error.message))?;
        if let Err(error) = declared(&rollout, &config.metrics) {
            return Err(wrong("rollout.metrics", error.to_string()));
        }
    }
    let FineTuningOptions { program, threads, priority, models, .. } = fine_tuning_options(config, models)?;
    Ok(FlywheelOptions {
        policies: config.loops.clone(),
        root: config.data.join("loops"),
        program,
        threads,
        priority,
        models,
        data: config.data.clone(),
        database: config.database.clone(),
        datasets: config.datasets_root(),
    })
}

/// Variables that are text; others cannot be ours.
pub(super) fn utf8_environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
}

/// Few: they parse, render and copy; the cores belong to the engine.
fn network_threads() -> usize {
    match std::thread::available_parallelism().map_or(1, usize::from) {
        0..=4 => 1,
        5..=16 => 2,
        _ => 4,
    }
}

async fn serve(config: Config, models: Vec<ModelSpec>, app: App) -> Result<(), ServeError> {
    let tls = config.tls.as_ref().map(|(certificate, key)| Tls::open(certificate, key)).transpose()?;
    let address = SocketAddr::new(config.host, config.port);
    let listen = |source| ServeError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    tracing::info!(%address, models = models.len(), "listening; loading models");
    let (failed, failure) = oneshot::channel();
    if let Some(tls) = &tls {
        tokio::spawn(tls.clone().keep_fresh());
    }
    let server = Server::new(listener, app.clone(), config.connections, tls);
    let drain_timeout = config.drain_timeout;
    let loader = {
        let (app, runtime) = (app.clone(), tokio::runtime::Handle::current());
        move || {
            let loaded = catch_unwind(AssertUnwindSafe(|| load_all(&config, &models, &app, address, &runtime)));
            if let Err(error) = loaded.unwrap_or(Err(ServeError::Loader)) {
                // The receiver is gone only when the server is leaving anyway.
                let _ = failed.send(error);
            }
        }
    };
    if let Some(metrics) = app.metrics.clone() {
        tokio::spawn(fold_metrics(metrics));
    }
    tokio::spawn(Arc::clone(app.limits.ledger()).keep_writing());
    tokio::spawn(crate::labeling::filler::keep_filling(app.clone()));
    tokio::spawn(app.adapters.clone().keep_following());
    tokio::spawn(app.rollouts.clone().keep_following());
    tokio::spawn(app.rollouts.clone().keep_leading());
    let scorer = Scorer::new(&app.store, Arc::clone(&app.registry), app.rollouts.clone(), app.drain.clone());
    tokio::spawn(scorer.keep_scoring());
    std::thread::Builder::new().name("tidemill-load".into()).spawn(loader).map_err(ServeError::Threads)?;
    let (ended, result) = oneshot::channel();
    let leave = async {
        let _ = ended.send(leave_in_good_order(&app, failure, drain_timeout).await);
    };
    server.run(leave).await;
    match result.await {
        Ok(Ended::LoadFailed(error)) => Err(error),
        Ok(Ended::Signal) | Err(_) => Ok(()),
    }
}

/// Histograms keep every sample until they are folded into buckets; without this, only a scrape would do it.
async fn fold_metrics(metrics: PrometheusHandle) {
    let mut every = tokio::time::interval(Duration::from_secs(5));
    loop {
        every.tick().await;
        metrics.run_upkeep();
    }
}

/// The adapter's name on the model `model`, if that is where it belongs: `MODEL:NAME`, and without a model the first.
fn own_adapter<'a>(name: &'a str, model: &str, models: &[ModelSpec]) -> Option<&'a str> {
    let of = |base: &str| name.strip_prefix(base).and_then(|rest| rest.strip_prefix(':'));
    match models.iter().find_map(|other| Some((&other.name, of(&other.name)?))) {
        Some((base, adapter)) => (base == model).then_some(adapter),
        None => models.first().is_some_and(|first| first.name == model).then_some(name),
    }
}

fn load_all(
    config: &Config,
    models: &[ModelSpec],
    app: &App,
    address: SocketAddr,
    runtime: &tokio::runtime::Handle,
) -> Result<(), ServeError> {
    for model in models {
        let start = Instant::now();
        let engine = Engine::start(config.engine_options(model, models.len()), &mut |_, _| {})
            .map_err(|source| ServeError::Load { name: model.name.clone(), source })?;
        let created = clock::seconds();
        for module in &config.lora_modules {
            let Some(adapter) = own_adapter(&module.name, &model.name, models) else { continue };
            // Who names it at start wants it to stay.
            engine
                .load_adapter(adapter, &module.path, true, created)
                .map_err(|source| ServeError::Adapter { name: module.name.clone(), source: Box::new(source) })?;
        }
        let loaded = LocalModel::new(engine, created).reading_as(config.parsers.of(&model.name));
        // The base is served all the same, and its adapters as soon as the store answers.
        if let Err(error) = runtime.block_on(app.adapters.prepare(&loaded)) {
            tracing::warn!(%error, "cannot see which adapters are to be served");
        }
        banner::loaded(&loaded, &model.path, start.elapsed());
        app.registry.loaded(&model.name, Upstream::Local(Arc::new(loaded)));
    }
    if let Some((first, _)) = app.registry.states().next() {
        banner::ready(first, address, app.auth.has_keys(), config.tls.is_some());
    }
    Ok(())
}
