//! The front door: routes, limits, error shape, streaming, shutdown.

mod answer;
pub mod app;
pub mod auth;
pub mod chat;
mod completions;
mod connection;
pub mod cors;
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
mod router;
pub mod server;
pub mod sse;
pub mod tls;
mod tokens;

pub use app::App;
pub use auth::{Auth, Caller, require};
pub use router::router;
