//! The front door: routes, limits, error shape, streaming, shutdown.

mod answer;
pub mod app;
pub mod auth;
mod batches;
mod call_rules;
pub mod chat;
mod completions;
mod datasets;
pub mod deadline;
pub mod drain;
mod embeddings;
pub mod error;
pub mod feedback;
mod files;
pub mod generate;
mod interchange;
mod keys;
pub mod labeling;
pub mod limits;
mod messages;
mod models;
mod observe;
mod probes;
pub mod query;
pub mod responses;
mod router;
pub mod server;
pub mod sse;
mod stored_chats;
pub mod tier;
mod tokens;
mod upload;

pub use app::App;
pub use auth::{Auth, Caller, require};
pub use router::router;
