//! The front door: routes, limits, error shape, streaming, shutdown.

mod answer;
pub mod app;
pub mod auth;
mod call_rules;
pub mod chat;
mod completions;
mod datasets;
pub mod drain;
pub mod error;
pub mod feedback;
pub mod generate;
mod interchange;
pub mod labeling;
pub mod limits;
mod models;
mod observe;
mod probes;
pub mod query;
pub mod responses;
mod router;
pub mod server;
pub mod sse;
mod stored_chats;
mod tokens;

pub use app::App;
pub use auth::{Auth, Caller, require};
pub use router::router;
