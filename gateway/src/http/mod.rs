//! The front door: routes, limits, error shape, streaming, shutdown.

pub mod app;
pub mod drain;
pub mod error;
mod generate;
pub mod limits;
mod models;
mod observe;
mod probes;
mod router;
pub mod server;
pub mod sse;
mod tokens;

pub use app::App;
pub use router::router;
