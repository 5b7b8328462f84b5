//! The flags of `tidemill serve` as settings.

use crate::config::{Layer, Origin};
use std::path::PathBuf;

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
    /// Where fine-tuning jobs and the evaluations of loops compute: cpu, cuda, cuda:N with the number of a card [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    training_device: Option<String>,
    /// Memory of that card that is theirs and that serving leaves free, such as 40GiB; needed where serving may have the card, too
    #[arg(long, value_name = "SIZE")]
    training_memory: Option<String>,
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
    pub config: Option<PathBuf>,
}

impl ServeArgs {
    /// What was given, as one source of settings.
    pub fn to_layer(&self) -> Layer {
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
            ("training_device", &self.training_device),
            ("training_memory", &self.training_memory),
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
