//! Decoder models, written once against [`tidemill_kernels::Ops`].

pub mod decoder;
mod experts;
pub(crate) mod shard;
pub mod tensor_parallel;
pub(crate) mod weight_names;

use tidemill_kernels::{KernelError, KvDtype, MemoryUse, StepBatch, StepOutput};

pub use decoder::Decoder;
pub use tensor_parallel::TensorParallel;

use crate::adapter::Adapter;
use crate::model_config::ModelConfig;

/// A model that computes steps. The scheduler knows nothing else about it.
pub trait Model: Send {
    /// Size of the vocabulary that can be sampled.
    fn vocabulary(&self) -> usize;
    /// Bytes that one KV block takes over all layers.
    fn kv_block_bytes(&self, block_size: usize, dtype: KvDtype) -> usize;
    /// Reserves the cache; called once, before the first step.
    fn alloc_kv(&mut self, blocks: usize, block_size: usize, dtype: KvDtype) -> Result<(), KernelError>;
    /// Computes one step: writes keys and values of all rows, samples the rows asked for.
    fn forward(&mut self, batch: &StepBatch, out: &mut StepOutput) -> Result<(), KernelError>;
    /// The same, and the hidden states `[tokens, width]` of all rows behind the last norm. A model that has none to give says so.
    fn forward_hidden(&mut self, _batch: &StepBatch, _out: &mut StepOutput) -> Result<Vec<f32>, KernelError> {
        Err(KernelError::Unsupported("this model gives no hidden states".to_owned()))
    }
    /// Whether a step may be submitted before the one before it was collected; two at most are under way.
    fn runs_ahead(&self) -> bool {
        false
    }
    /// Sets a step going, where steps run ahead. After an error there is nothing to collect of it.
    fn submit(&mut self, _batch: &StepBatch) -> Result<(), KernelError> {
        Err(KernelError::Unsupported("steps of this model do not run ahead".to_owned()))
    }
    /// Waits for the oldest step that was submitted, and hands over what it sampled.
    fn collect(&mut self, _out: &mut StepOutput) -> Result<(), KernelError> {
        Err(KernelError::Unsupported("steps of this model do not run ahead".to_owned()))
    }
    /// Numbers of one hidden state; 0 when it gives none.
    fn width(&self) -> usize {
        0
    }
    /// What adapters must fit; `None` when the model takes none.
    fn adaptable(&self) -> Option<&ModelConfig> {
        None
    }
    /// Puts an adapter that fits into a slot, between steps.
    fn load_adapter(&mut self, _slot: u32, _adapter: &Adapter) -> Result<(), KernelError> {
        Err(KernelError::Unsupported("this model takes no adapters".to_owned()))
    }
    /// Empties a slot that no row of a later step uses.
    fn unload_adapter(&mut self, _slot: u32) {}
    /// Bytes that the cache may take of a card's memory; `None` when the machine's is used.
    fn spare_memory(&self) -> Result<Option<usize>, KernelError> {
        Ok(None)
    }
    /// Reserves places for so many blocks of the cache in the machine's memory; once, behind `alloc_kv`.
    fn alloc_swap(&mut self, _places: usize) -> Result<(), KernelError> {
        Err(KernelError::Unsupported("this model's blocks are not swapped".to_owned()))
    }
    /// Memory held, for the start-up lines.
    fn memory(&self) -> MemoryUse;
    /// Device, instruction path, weight format: for the start-up lines.
    fn describe(&self) -> String;
}

#[cfg(test)]
mod tests;
