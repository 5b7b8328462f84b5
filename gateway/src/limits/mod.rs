//! How much a key may use, and a model may be used.
//!
//! Every request passes the gates of its subjects before it runs: its key, its model, and its key's use of its model. [`bucket`] and
//! [`gate`] decide, as values with time as an argument; [`Limiter`] holds the gates of all subjects; a [`Meter`] counts one request
//! while it runs and lets go of its place when it is dropped, however the request ends; the [`Ledger`] adds up each day's cost, durably
//! and together with the other servers on the same database.

pub mod bucket;
pub mod gate;
pub mod headers;
mod ledger;
mod limiter;
mod meter;
mod price;
mod shed;

pub use ledger::{Ledger, today};
pub use limiter::{Limiter, Subject};
pub use meter::Meter;
pub use price::{Price, Prices};
pub use shed::shed;
