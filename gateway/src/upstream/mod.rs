//! What answers a request: an engine in this process, or another server.

mod adapter_names;
mod events;
mod grammars;
mod local;
mod registry;
pub mod remote;

pub use adapter_names::{AdapterNames, Named};
pub use events::Events;
pub use local::LocalModel;
pub use registry::{LoadState, Names, OnDemand, Registry};
pub use remote::RemoteModel;

use local::fingerprint;
use std::sync::Arc;

/// Something that serves one model.
#[derive(Clone)]
pub enum Upstream {
    /// The engine in this process.
    Local(Arc<LocalModel>),
    /// Servers elsewhere.
    Remote(Arc<RemoteModel>),
}
