//! Dataset rows to what the model computes: tokens through the chat template ([`Encoder`]), weights that bound a person's share
//! ([`weights`]), the order of rows over epochs ([`Plan`]), and packed batches ([`pack`]).

mod encode;
mod pack;
mod plan;
mod sample;
#[cfg(test)]
mod tests;
mod weight;

pub use encode::{Dropped, EncodeOptions, Encoded, Encoder, Teaches};
pub use pack::{Item, Layout, Micro, Span, batches, pack};
pub use plan::Plan;
pub use sample::{Completion, Sample, Truncation};
pub use weight::{Caps, Weights, weights};
