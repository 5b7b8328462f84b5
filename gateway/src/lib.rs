//! The front door of Tidemill: command line, configuration, HTTP in OpenAI's and Anthropic's shapes, telemetry.
//!
//! A request is parsed and checked field by field ([`openai`], [`anthropic`]), turned into tokens and handed to the engine ([`upstream`]), and its
//! events are written back as server-sent events or as one JSON object ([`http`]). [`config`] merges flags, environment and file;
//! [`cli`] is what a person types.
//!
//! Invariants: every rejection happens before the 200, in the error shape, with `x-request-id`; a client that leaves drops its event
//! receiver, which frees its sequences; nothing here computes on tokio's threads beyond parsing and short prompts; no text of a
//! prompt or answer is logged unless `log_content` asks for it.

pub mod adapters;
pub mod anthropic;
pub mod api_client;
pub mod batches;
pub mod chat;
pub mod cli;
pub mod clock;
pub mod config;
pub mod console;
pub mod datasets;
pub mod engine_bench;
pub mod feedback;
pub mod fine_tuning;
pub mod flywheel;
pub mod graders;
pub mod http;
pub mod interchange;
pub mod keys;
pub mod labeling;
pub mod limits;
pub mod openai;
pub mod openapi;
pub mod pull;
pub mod recording;
pub mod responses;
pub mod rollout;
pub mod telemetry;
pub mod upstream;
