//! Tokens in, tokens out.
//!
//! The engine owns model files, tokenizer, chat template, scheduler, KV blocks and the step loop. It runs on its own OS thread and
//! knows no HTTP. [`request::Request`]s go in through one channel; each comes back as a bounded stream of [`request::Event`]s.
//!
//! Invariants: `free + used = total` KV blocks after every step; a dropped receiver frees its sequences within one step; a streamed
//! token never changes; a slow client never stalls the batch.

pub mod adapter;
pub mod adapters;
mod backend;
pub mod backlog;
pub mod batch;
pub mod block_pool;
pub mod block_table;
pub mod chat_template;
pub mod choice;
mod client;
mod core;
pub mod detokenizer;
pub mod embedding;
pub mod engine;
pub mod fairness;
pub mod generation_defaults;
mod gguf;
pub mod grammar;
pub mod load_error;
pub mod memory;
pub mod merge;
pub mod model;
pub mod model_config;
pub mod model_files;
pub mod options;
pub mod pooling;
pub mod prefix_cache;
#[cfg(test)]
mod recall_model;
pub mod request;
mod safetensors_file;
pub mod scheduler;
pub mod sequence;
pub mod stats;
pub mod stop;
pub mod swap_space;
mod tensor_file;
pub mod tokenizer;
pub mod validate;

pub use adapter::{Adapter, AdapterError, LoraConfig, Pair, Projection};
pub use adapters::{AdapterLease, AdapterRefused};
pub use backend::Device;
pub use chat_template::{ChatInput, ChatTemplate, TemplateError};
pub use detokenizer::Detokenizer;
pub use embedding::{EmbedError, EmbedRequest, Embedding};
pub use engine::{Engine, EngineLimits, Health, MemoryReport, ServedModel};
pub use generation_defaults::GenerationDefaults;
pub use grammar::{Constraint, ConstraintKey, Grammar, GrammarError, for_lark};
pub use load_error::LoadError;
pub use merge::{Container, MergeError, MergeOptions, Merged, merge, write_model};
pub use model::weight_names::{Part, Weight};
pub use model::{Decoder, TensorParallel};
pub use model_config::{ExpertConfig, Family, Gemma, ModelConfig, RopeScaling, Yarn};
pub use model_files::{ExpertPart, FileMatrix, Frontend, Mixture, MixtureMatrix, ModelFiles};
pub use options::{CardShare, EngineOptions, StartError};
pub use pooling::{Cut, Pooling, PoolingMode};
pub use request::{
    AdapterGeneration, Event, FinishReason, Request, RequestId, SamplingParams, StopCause, SubmitError, Tenant, TokenRecord,
    Usage,
};
pub use stats::Stats;
pub use tokenizer::{EncodeError, SpecialTokens, Tokenizer};
