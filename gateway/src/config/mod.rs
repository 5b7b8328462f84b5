//! One typed configuration out of flags, environment, file and defaults, in this order of precedence.

mod file;
mod layer;
mod loops;
pub mod model_spec;
mod parsers;
mod tables;
mod upstreams;
pub mod value;

use layer::Setting;
pub use layer::{Layer, Origin};
pub use model_spec::{DEFAULT_MODEL, LoraModule, ModelSpec, models_dir};
pub use parsers::ParserConfig;

use crate::feedback::Metrics;
use crate::fine_tuning::{TrainingDevice, TrainingPriority};
use crate::http::auth::DEFAULT_GRACE;
use crate::http::cors::Origins;
use crate::http::limits::{BodyLimits, FileLimits};
use crate::http::server::Bounds;
use crate::limits::Prices;
use crate::openai::parse::ParserChoice;
use crate::recording::{Level, Recording};
use crate::upstream::remote::Remotes;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tidemill_engine::{Device, EngineOptions};
use tidemill_kernels::cuda::device::Prefill;
use tidemill_kernels::{Activations, KvDtype, WeightFormat};
use tidemill_rlhf::flywheel::Policy;
use tidemill_rlhf::workplace::one_card;
use tidemill_store::Limits;

/// Where the configuration is looked for when nobody names a file.
pub const DEFAULT_FILE: &str = "tidemill.toml";

/// Every setting, by its name in the file. The flag is the same with dashes, the variable the same in capitals after `TIDEMILL_`.
pub const KEYS: &[&str] = &[
    "model",
    "host",
    "port",
    "data",
    "threads",
    "kv_memory",
    "swap_memory",
    "max_seqs",
    "max_model_len",
    "max_waiting",
    "max_batch_tokens",
    "weights",
    "activations",
    "kv_dtype",
    "attention_backend",
    "prefix_caching",
    "max_loras",
    "max_lora_rank",
    "lora_modules",
    "upstream",
    "seed",
    "device",
    "tensor_parallel",
    "drain_timeout",
    "max_body",
    "body_timeout",
    "max_connections",
    "idle_timeout",
    "write_timeout",
    "tls_certificate",
    "tls_key",
    "cors_origins",
    "max_file",
    "max_files",
    "auth_grace",
    "tool_parser",
    "reasoning_parser",
    "database",
    "datasets",
    "training_jobs",
    "training_jobs_per_key",
    "training_threads",
    "training_device",
    "training_memory",
    "training_priority",
    "record",
    "record_share",
    "spill_size",
    "retention_age",
    "retention_size",
    "log",
    "log_format",
    "log_content",
    "otlp_endpoint",
    "trace_share",
    "tester_secret_file",
    "holdout",
    "four_eyes",
];

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{}:{line}: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// First line is 1.
        line: usize,
        /// What the parser said.
        message: String,
    },
    /// A key that means nothing.
    #[error("{place}: unknown key `{key}`{hint}")]
    UnknownKey {
        /// File and line.
        place: String,
        /// As written.
        key: String,
        /// A similar key, or the list of all.
        hint: String,
    },
    /// A value that does not fit its key.
    #[error("{place}: {message}")]
    Value {
        /// File, line and key; or the variable; or the flag.
        place: String,
        /// What is wrong and what would be right.
        message: String,
    },
    /// No model to serve.
    #[error("{0}")]
    Model(String),
    /// The data directory is damaged.
    #[error("{0}")]
    Store(#[from] tidemill_store::StoreError),
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object per line.
    Json,
}

/// Everything `tidemill serve` needs to know.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// As given: `NAME=PATH`, a path, or the name of a pulled model; empty means the default model, or none where others are remote.
    pub models: Vec<(String, Origin)>,
    /// Address to listen on.
    pub host: IpAddr,
    /// Port to listen on.
    pub port: u16,
    /// The server's own directory.
    pub data: PathBuf,
    /// Compute threads.
    pub threads: Option<usize>,
    /// Bytes for the KV cache.
    pub kv_memory: Option<usize>,
    /// Bytes of the machine's memory for preempted sequences of a card.
    pub swap_memory: Option<usize>,
    /// Sequences at once.
    pub max_seqs: usize,
    /// Tokens of prompt and output together.
    pub max_model_len: Option<usize>,
    /// Requests in the queue.
    pub max_waiting: usize,
    /// Tokens per step.
    pub max_batch_tokens: usize,
    /// Packing of weights.
    pub weights: WeightFormat,
    /// What activations are where weights of 8-bit floats are multiplied.
    pub activations: Activations,
    /// Storage of keys and values.
    pub kv_dtype: KvDtype,
    /// How a card computes attention of prompts.
    pub attention_backend: Option<Prefill>,
    /// Reuse of computed prefixes.
    pub prefix_caching: bool,
    /// Adapters at once.
    pub max_loras: usize,
    /// Largest rank of an adapter.
    pub max_lora_rank: usize,
    /// Adapters to load at start.
    pub lora_modules: Vec<LoraModule>,
    /// Models that other servers answer.
    pub remotes: Remotes,
    /// Seed of requests that bring none.
    pub seed: Option<u64>,
    /// Where to compute.
    pub device: Device,
    /// Cards that compute a model together.
    pub tensor_parallel: Option<usize>,
    /// Time for running answers after SIGTERM.
    pub drain_timeout: Duration,
    /// Most bytes of a request's body.
    pub max_body: usize,
    /// Most time from the first byte of a request's body to the last.
    pub body_timeout: Duration,
    /// Bounds on connections.
    pub connections: Bounds,
    /// Certificate chain and private key, where TLS is spoken.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Web pages that may call.
    pub origins: Origins,
    /// Bounds on files that clients upload.
    pub file_limits: FileLimits,
    /// How long a key that was seen is believed while the database is away.
    pub auth_grace: Duration,
    /// What each model may be used, over all callers.
    pub model_limits: BTreeMap<String, Limits>,
    /// What tokens cost, by model.
    pub prices: Prices,
    /// How models write tool calls and reasoning.
    pub parsers: ParserConfig,
    /// A Postgres URL; `None` is SQLite in the data directory.
    pub database: Option<String>,
    /// Folder or URL of the datasets' tables; `None` is a folder in the data directory.
    pub datasets: Option<String>,
    /// Fine-tuning jobs that train at once.
    pub training_jobs: usize,
    /// Jobs of one key that may run, wait or be paused.
    pub training_jobs_per_key: usize,
    /// Threads of each; `None` is half of the cores.
    pub training_threads: Option<usize>,
    /// Where each computes, and the evaluations of loops.
    pub training_device: TrainingDevice,
    /// How urgent each is.
    pub training_priority: TrainingPriority,
    /// Which answers are recorded, and how much of them.
    pub recording: Recording,
    /// Most bytes of records that wait on disk while the database is away.
    pub spill_size: u64,
    /// Records older than this are removed.
    pub retention_age: Option<Duration>,
    /// The oldest records are removed beyond this many bytes.
    pub retention_size: Option<u64>,
    /// Metrics that feedback may name.
    pub metrics: Metrics,
    /// Log filter, such as `info,tidemill=debug`.
    pub log: String,
    /// How log lines look.
    pub log_format: LogFormat,
    /// Prompts and answers are written to the log.
    pub log_content: bool,
    /// Where spans are sent.
    pub otlp_endpoint: Option<String>,
    /// Share of the traces begun here that is sent.
    pub trace_share: f64,
    /// Loops from feedback to adapters.
    pub loops: BTreeMap<String, Policy>,
    /// Holds what lets testers choose a variant.
    pub tester_secret_file: Option<PathBuf>,
    /// Share of the units that take part in no rollout, and the name that salts who they are.
    pub holdout: Option<(String, f64)>,
    /// Whether rollouts are promoted only with another key than started them.
    pub four_eyes: bool,
}

impl Config {
    /// Where the datasets' tables are.
    pub fn datasets_root(&self) -> String {
        self.datasets.clone().unwrap_or_else(|| self.data.join("datasets").to_string_lossy().into_owned())
    }

    /// Merges the flags with the environment, the file (named by the `config` flag or `TIDEMILL_CONFIG`, or `tidemill.toml` where
    /// there is one) and the defaults.
    pub fn load(flags: Layer, file: Option<&Path>, env: impl IntoIterator<Item = (String, String)>) -> Result<Self, ConfigError> {
        let (env, named_by_env) = layer::from_env(env);
        let named = file.map(Path::to_owned).or(named_by_env);
        let default = || Some(PathBuf::from(DEFAULT_FILE)).filter(|path| path.exists());
        let file = match named.or_else(default) {
            Some(path) => file::read(&path)?,
            None => Layer::default(),
        };
        Self::resolve(&[flags, env, file])
    }

    /// The first layer that has a key decides.
    fn resolve(layers: &[Layer]) -> Result<Self, ConfigError> {
        let get = |key: &'static str| layers.iter().find_map(|layer| layer.get(key));
        let count = |key, least| get(key).map(|s| s.parse(|text| value::count(text, least))).transpose();
        let base = EngineOptions::new("");
        let files = FileLimits::default();
        let device: Device = get("device").map_or(Ok(base.device), |s| s.parse(str::parse))?;
        Ok(Self {
            models: layers.iter().map(|layer| layer.list("model")).find(|m| !m.is_empty()).unwrap_or_default(),
            host: get("host").map_or(Ok(IpAddr::from([127, 0, 0, 1])), |s| s.parse(value::host))?,
            port: get("port").map_or(Ok(8080), |s| s.parse(value::port))?,
            data: get("data").map_or_else(|| PathBuf::from("./data"), |s| PathBuf::from(&s.text)),
            threads: count("threads", 1)?,
            kv_memory: get("kv_memory").map(|s| s.parse(value::size)).transpose()?,
            swap_memory: get("swap_memory").map(|s| s.parse(value::size_or_none)).transpose()?,
            max_seqs: count("max_seqs", 1)?.unwrap_or(base.max_seqs),
            max_model_len: count("max_model_len", 2)?,
            max_waiting: count("max_waiting", 1)?.unwrap_or(base.max_waiting),
            max_batch_tokens: count("max_batch_tokens", 1)?.unwrap_or(base.max_batch_tokens),
            weights: get("weights").map_or(Ok(WeightFormat::Auto), |s| {
                s.parse(|text| {
                    value::choice(
                        text,
                        &[
                            ("auto", WeightFormat::Auto),
                            ("f32", WeightFormat::F32),
                            ("bf16", WeightFormat::Bf16),
                            ("int8", WeightFormat::Int8),
                            ("fp8", WeightFormat::Fp8),
                        ],
                    )
                })
            })?,
            activations: get("activations").map_or(Ok(Activations::Bf16), |s| {
                s.parse(|text| value::choice(text, &[("bf16", Activations::Bf16), ("fp8", Activations::Fp8)]))
            })?,
            kv_dtype: get("kv_dtype").map_or(Ok(KvDtype::Bf16), |s| {
                s.parse(|text| value::choice(text, &[("bf16", KvDtype::Bf16), ("f32", KvDtype::F32), ("fp8", KvDtype::Fp8)]))
            })?,
            attention_backend: get("attention_backend").map_or(Ok(None), |s| {
                s.parse(|text| {
                    value::choice(text, &[("auto", None), ("mma", Some(Prefill::Mma)), ("wgmma", Some(Prefill::Wgmma))])
                })
            })?,
            prefix_caching: get("prefix_caching").map_or(Ok(true), |s| s.parse(value::switch))?,
            max_loras: count("max_loras", 0)?.unwrap_or(base.max_adapters),
            max_lora_rank: count("max_lora_rank", 1)?.unwrap_or(base.max_adapter_rank),
            lora_modules: model_spec::lora_modules(
                &layers.iter().map(|layer| layer.list("lora_modules")).find(|list| !list.is_empty()).unwrap_or_default(),
            )?,
            remotes: upstreams::remotes(layers)?,
            seed: get("seed").map(|s| s.parse(value::seed)).transpose()?,
            device: device.clone(),
            tensor_parallel: count("tensor_parallel", 1)?,
            drain_timeout: get("drain_timeout").map_or(Ok(Duration::from_secs(30)), |s| s.parse(value::duration))?,
            max_body: get("max_body").map_or(Ok(10 << 20), |s| s.parse(value::size))?,
            body_timeout: get("body_timeout").map_or(Ok(BodyLimits::default().time), |s| s.parse(value::some_time))?,
            connections: Bounds {
                connections: count("max_connections", 1)?.unwrap_or(Bounds::default().connections),
                idle: get("idle_timeout").map_or(Ok(Bounds::default().idle), |s| s.parse(value::some_time))?,
                write: get("write_timeout").map_or(Ok(Bounds::default().write), |s| s.parse(value::some_time))?,
                ..Bounds::default()
            },
            tls: tls(get("tls_certificate"), get("tls_key"))?,
            origins: get("cors_origins").map_or(Ok(Origins::default()), |s| s.parse(Origins::parse))?,
            file_limits: FileLimits {
                file: get("max_file").map(|s| s.parse(value::size)).transpose()?.map_or(files.file, |bytes| bytes as u64),
                total: get("max_files").map(|s| s.parse(value::size)).transpose()?.map_or(files.total, |bytes| bytes as u64),
            },
            auth_grace: get("auth_grace").map_or(Ok(DEFAULT_GRACE), |s| s.parse(value::duration))?,
            model_limits: tables::limits(layers)?,
            prices: tables::prices(layers)?,
            parsers: ParserConfig {
                default: ParserChoice {
                    calls: get("tool_parser").map_or(Ok(None), |s| s.parse(parsers::tool_parser))?,
                    reasoning: get("reasoning_parser").map_or(Ok(None), |s| s.parse(parsers::reasoning_parser))?,
                },
                models: parsers::tables(layers)?,
            },
            database: get("database").map(|s| s.text.clone()),
            datasets: get("datasets").map(|s| s.text.clone()),
            training_jobs: count("training_jobs", 0)?.unwrap_or(1),
            training_jobs_per_key: count("training_jobs_per_key", 1)?.unwrap_or(16),
            training_threads: count("training_threads", 1)?,
            training_device: training_device(get("training_device"), get("training_memory"), &device)?,
            training_priority: get("training_priority").map_or(Ok(TrainingPriority::default()), |s| {
                s.parse(|text| value::choice(text, &[("idle", TrainingPriority::Idle), ("low", TrainingPriority::Low)]))
            })?,
            recording: Recording {
                level: get("record").map_or(Ok(Level::Full), |s| s.parse(tables::level))?,
                share: get("record_share").map_or(Ok(1.0), |s| s.parse(value::share))?,
                routes: tables::recording(layers)?,
            },
            spill_size: get("spill_size").map_or(Ok(1 << 30), |s| s.parse(value::size))? as u64,
            retention_age: get("retention_age").map(|s| s.parse(value::age)).transpose()?,
            retention_size: get("retention_size").map(|s| s.parse(value::size)).transpose()?.map(|bytes| bytes as u64),
            metrics: tables::metrics(layers)?,
            log: get("log").map_or_else(|| "info".to_owned(), |s| s.text.clone()),
            log_format: get("log_format").map_or(Ok(LogFormat::Text), |s| {
                s.parse(|text| value::choice(text, &[("text", LogFormat::Text), ("json", LogFormat::Json)]))
            })?,
            log_content: get("log_content").map_or(Ok(false), |s| s.parse(value::switch))?,
            otlp_endpoint: get("otlp_endpoint").map(|s| s.parse(value::web_address)).transpose()?,
            trace_share: get("trace_share").map_or(Ok(1.0), |s| s.parse(value::share))?,
            loops: loops::policies(layers)?,
            tester_secret_file: get("tester_secret_file").map(|s| PathBuf::from(&s.text)),
            holdout: get("holdout").map(|s| s.parse(value::named_share)).transpose()?,
            four_eyes: get("four_eyes").map_or(Ok(false), |s| s.parse(value::switch))?,
        })
    }

    /// The models to load, found on disk: the default one where nobody names any, here or elsewhere.
    pub fn resolve_models(&self) -> Result<Vec<ModelSpec>, ConfigError> {
        if self.models.is_empty() && !self.remotes.models.is_empty() {
            return Ok(Vec::new());
        }
        let models = model_spec::resolve_all(&self.models, &self.data)?;
        upstreams::check_names(&self.remotes, models.iter().map(|model| &model.name))?;
        Ok(models)
    }

    /// What the engine of one of `models` models is started with.
    pub fn engine_options(&self, model: &ModelSpec, models: usize) -> EngineOptions {
        EngineOptions {
            served_name: model.name.clone(),
            device: self.device.clone(),
            tensor_parallel: self.tensor_parallel,
            kernel_cache: Some(kernel_cache(&self.data)),
            threads: self.threads,
            kv_memory: self.kv_memory,
            left: self.training_device.share(),
            kv_share: models,
            swap_memory: self.swap_memory,
            max_seqs: self.max_seqs,
            max_model_len: self.max_model_len,
            max_batch_tokens: self.max_batch_tokens,
            max_waiting: self.max_waiting,
            weight_format: self.weights,
            activations: self.activations,
            kv_dtype: self.kv_dtype,
            attention_backend: self.attention_backend,
            prefix_caching: self.prefix_caching,
            max_adapters: self.max_loras,
            max_adapter_rank: self.max_lora_rank,
            seed: self.seed,
            ..EngineOptions::new(&model.path)
        }
    }
}

/// Where kernels that were compiled for a card are kept.
pub fn kernel_cache(data: &Path) -> PathBuf {
    data.join("cache").join("kernels")
}

/// Where trainings compute; a card that serving may use, too, is shared by what is said of its memory.
fn training_device(device: Option<&Setting>, memory: Option<&Setting>, serving: &Device) -> Result<TrainingDevice, ConfigError> {
    let wrong = |setting: &Setting, message: String| Err(ConfigError::Value { place: setting.origin.to_string(), message });
    let bytes = memory.map(|setting| setting.parse(value::size)).transpose()?;
    let named = device.map_or(Ok(Device::Cpu), |setting| setting.parse(str::parse))?;
    let card = match (one_card(&named), device) {
        (Ok(card), _) => card,
        (Err(fix), Some(setting)) => return wrong(setting, fix),
        (Err(_), None) => None,
    };
    let Some(card) = card else {
        return match memory {
            Some(setting) => wrong(setting, "is a part of a card's memory; name the card with `training_device`".to_owned()),
            None => Ok(TrainingDevice::default()),
        };
    };
    if let (true, None, Some(setting)) = (serving.may_be(card), bytes, device) {
        let message = format!(
            "serving may have that card, too (`device` is {serving}); say with `training_memory`, such as 40GiB, how much of it trainings get, \
             or name another card here or there, as cuda:N"
        );
        return wrong(setting, message);
    }
    Ok(TrainingDevice { device: named, memory: bytes })
}

/// Both or neither.
fn tls(certificate: Option<&Setting>, key: Option<&Setting>) -> Result<Option<(PathBuf, PathBuf)>, ConfigError> {
    let alone = |setting: &Setting, other: &str| ConfigError::Value {
        place: setting.origin.to_string(),
        message: format!("needs `{other}` beside it"),
    };
    match (certificate, key) {
        (None, None) => Ok(None),
        (Some(certificate), Some(key)) => Ok(Some((PathBuf::from(&certificate.text), PathBuf::from(&key.text)))),
        (Some(certificate), None) => Err(alone(certificate, "tls_key")),
        (None, Some(key)) => Err(alone(key, "tls_certificate")),
    }
}

#[cfg(test)]
mod tests;
