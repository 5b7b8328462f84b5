//! What answers a request: an engine in this process.

mod adapter_names;
mod events;
mod grammars;
mod local;
mod registry;

pub use adapter_names::{AdapterNames, Named};
pub use events::Events;
pub use local::LocalModel;
pub use registry::{LoadState, OnDemand, Registry};

use std::sync::Arc;

/// Something that serves one model.
#[derive(Clone)]
pub enum Upstream {
    /// The engine in this process.
    Local(Arc<LocalModel>),
}
