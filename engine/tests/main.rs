//! The engine on real files and tiny models; one program, since what emulates a card takes long to compile.

mod adapters;
mod ahead;
mod embeddings;
mod experts;
mod gemma;
mod merge;
mod mpt;
mod parity;
mod same_tokens;
mod tensor_parallel;
mod tensor_parallel_ahead;

#[path = "../../kernels/tests/support/emulation.rs"]
#[allow(
    dead_code,
    unsafe_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "the kernels' own, whose crate may"
)]
mod emulation;
#[path = "../../kernels/tests/support/faulty.rs"]
#[allow(dead_code, clippy::unwrap_used, reason = "the kernels' own")]
mod faulty;
#[path = "throughput/model.rs"]
#[allow(dead_code, reason = "shared with the measurement of speed")]
mod llama;
#[allow(clippy::unwrap_used, reason = "a test stops at the first error; the lint knows test functions only")]
mod stepping;
