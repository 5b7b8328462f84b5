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
mod messages;
mod models;
mod observe;
mod probes;
pub mod query;
mod router;
pub mod server;
pub mod sse;
mod tokens;

pub use app::App;
pub use auth::{Auth, Caller, require};
pub use router::router;
