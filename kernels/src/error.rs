//! What can go wrong in a kernel call.

fn short_of(what: &str, bytes: usize) -> String {
    match bytes {
        0 => format!("the card has no memory left ({what})"),
        bytes => format!("cannot reserve {bytes} bytes for {what}"),
    }
}

/// Errors of the kernels crate.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Operands do not fit together.
    #[error("shape mismatch in {op}: {detail}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// What was expected and what came.
        detail: String,
    },
    /// A weight cannot be packed.
    #[error("cannot pack weight: {0}")]
    Weight(String),
    /// The step does not fit the planned buffers.
    #[error("step too large: {0}")]
    Limit(String),
    /// Memory could not be reserved.
    #[error("{}; lower --kv-memory or --max-model-len", short_of(what, *bytes))]
    Memory {
        /// What it was for.
        what: &'static str,
        /// How much; 0 where only a card's driver knows.
        bytes: usize,
    },
    /// A card or its driver failed.
    #[error("the GPU failed: {0}")]
    Device(String),
    /// The machine or build lacks something.
    #[error("{0}")]
    Unsupported(String),
    /// Reading a file failed.
    #[error("{0}")]
    Io(#[from] std::io::Error),
}
