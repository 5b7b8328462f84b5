//! How an engine is set up.

use crate::backend::Device;
use std::path::PathBuf;
use tidemill_kernels::cuda::device::Prefill;
use tidemill_kernels::{Activations, KvDtype, WeightFormat};

/// A part of a card's memory that is somebody else's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CardShare {
    /// The card's number.
    pub card: usize,
    /// How much of it.
    pub bytes: usize,
}

/// What [`crate::Engine::start`] needs to know. [`EngineOptions::new`] has the defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineOptions {
    /// A GGUF file or a directory with safetensors and `config.json`.
    pub model: PathBuf,
    /// Name that clients use; label `model_name` of the metrics.
    pub served_name: String,
    /// Where to compute.
    pub device: Device,
    /// Cards that compute the model together; `None` is as many as `device` names, or as the model needs.
    pub tensor_parallel: Option<usize>,
    /// Folder that keeps the kernels compiled for a card; `None` compiles them on every start.
    pub kernel_cache: Option<PathBuf>,
    /// Threads that compute; `None` is one per core that this process may use.
    pub threads: Option<usize>,
    /// Bytes for the KV cache; `None` sizes it from free memory, the card's where one computes.
    pub kv_memory: Option<usize>,
    /// What a KV cache that is sized from a card's free memory leaves there, such as a training's share.
    pub left: Option<CardShare>,
    /// Engines that share the machine: where `kv_memory` is `None`, this one takes its part of the free memory only, ≥ 1.
    pub kv_share: usize,
    /// Bytes of the machine's memory for the blocks of preempted sequences, where the cache lies in a card's; 0 keeps none. `None` is 4 GiB, or
    /// a quarter of the free memory where that is less.
    pub swap_memory: Option<usize>,
    /// Most sequences that run at once (each choice of a request is one), ≥ 1.
    pub max_seqs: usize,
    /// Most tokens of prompt and output together; `None` is the model's own, or less when the KV cache cannot hold it.
    pub max_model_len: Option<usize>,
    /// Most tokens a step computes, ≥ `max_seqs`.
    pub max_batch_tokens: usize,
    /// Most requests that wait; more are refused with [`crate::SubmitError::QueueFull`].
    pub max_waiting: usize,
    /// Packing of the weights.
    pub weight_format: WeightFormat,
    /// What activations are where weights of 8-bit floats are multiplied.
    pub activations: Activations,
    /// Storage of keys and values.
    pub kv_dtype: KvDtype,
    /// How a card computes the attention of prompts; `None` is what it does faster, where it knows two ways.
    pub attention_backend: Option<Prefill>,
    /// Reuse of computed blocks between requests with equal prefixes.
    pub prefix_caching: bool,
    /// Most adapters that can be asked for at once; 0 takes none.
    pub max_adapters: usize,
    /// Largest rank of an adapter.
    pub max_adapter_rank: usize,
    /// Seeds the requests that bring no seed of their own; `None` is different on every start.
    pub seed: Option<u64>,
}

impl EngineOptions {
    /// Defaults for the model at `model`, served under its file name.
    pub fn new(model: impl Into<PathBuf>) -> Self {
        let model = model.into();
        let served_name = model.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_else(|| "model".into());
        Self {
            model,
            served_name,
            device: Device::Cpu,
            tensor_parallel: None,
            kernel_cache: None,
            threads: None,
            kv_memory: None,
            left: None,
            kv_share: 1,
            swap_memory: None,
            max_seqs: 64,
            max_model_len: None,
            max_batch_tokens: 512,
            max_waiting: 1024,
            weight_format: WeightFormat::Auto,
            activations: Activations::Bf16,
            kv_dtype: KvDtype::Bf16,
            attention_backend: None,
            prefix_caching: true,
            max_adapters: 16,
            max_adapter_rank: 64,
            seed: None,
        }
    }

    /// Says which option is out of range, by its command-line name.
    pub fn check(&self) -> Result<(), StartError> {
        let bad = |option: &'static str, message: String| Err(StartError::Option { option, message });
        if self.max_seqs == 0 || self.max_seqs > 65_536 {
            return bad("--max-seqs", format!("must be 1 to 65536, not {}", self.max_seqs));
        }
        if self.max_batch_tokens < self.max_seqs {
            let (tokens, seqs) = (self.max_batch_tokens, self.max_seqs);
            return bad("--max-batch-tokens", format!("must be at least --max-seqs ({seqs}), not {tokens}"));
        }
        if self.max_batch_tokens > 1 << 20 {
            return bad("--max-batch-tokens", format!("must be at most {}, not {}", 1 << 20, self.max_batch_tokens));
        }
        if self.max_waiting == 0 {
            return bad("--max-waiting", "must be at least 1".into());
        }
        if self.max_model_len == Some(0) || self.max_model_len == Some(1) {
            return bad("--max-model-len", "must be at least 2: one prompt token and one generated".into());
        }
        if self.max_adapters > 4096 {
            return bad("--max-loras", format!("must be at most 4096, not {}", self.max_adapters));
        }
        if self.max_adapter_rank == 0 {
            return bad("--max-lora-rank", "must be at least 1".into());
        }
        if self.device == Device::Cpu && self.swap_memory.is_some_and(|bytes| bytes > 0) {
            let message =
                "is for keys and values in a card's memory; the processor's are in the machine's already, so leave it out";
            return bad("--swap-memory", message.into());
        }
        if self.attention_backend == Some(Prefill::Wgmma) && self.kv_dtype != KvDtype::Bf16 {
            return bad("--attention-backend", "wgmma reads keys and values in bf16: leave --kv-dtype at bf16".into());
        }
        if self.device == Device::Cpu && self.attention_backend.is_some() {
            let message = "chooses among the ways of a card; with --device cpu there is one, so leave it out";
            return bad("--attention-backend", message.into());
        }
        if self.activations == Activations::Fp8 {
            if self.device == Device::Cpu {
                return bad("--activations", "fp8 is for cards; use bf16 with --device cpu".into());
            }
            if self.weight_format != WeightFormat::Fp8 {
                return bad("--activations", "fp8 multiplies with weights of 8-bit floats: add --weights fp8".into());
            }
        }
        if self.threads == Some(0) {
            return bad("--threads", "must be at least 1".into());
        }
        if let Some(cards) = self.tensor_parallel.filter(|cards| *cards != 1) {
            if cards == 0 {
                return bad("--tensor-parallel", "must be at least 1".into());
            }
            if self.device == Device::Cpu {
                return bad("--tensor-parallel", format!("must be 1 with --device cpu, not {cards}: it is for several cards"));
            }
        }
        Ok(())
    }
}

/// Why an engine did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An option is out of range.
    #[error("{option} {message}")]
    Option {
        /// Command-line name.
        option: &'static str,
        /// What would be right.
        message: String,
    },
    /// The model's files are not right.
    #[error(transparent)]
    Model(#[from] crate::load_error::LoadError),
    /// The backend refused.
    #[error("{0}")]
    Backend(#[from] tidemill_kernels::KernelError),
    /// The KV cache does not fit.
    #[error(
        "{available} bytes for the KV cache hold {blocks} blocks of {block_bytes} bytes, too few for one sequence; raise --kv-memory or free memory{}",
        share(left)
    )]
    KvMemory {
        /// Bytes that could be used.
        available: usize,
        /// Blocks that fit.
        blocks: usize,
        /// Bytes per block.
        block_bytes: usize,
        /// Blocks of one sequence of full length.
        needed: usize,
        /// What of a card's memory was left to somebody else.
        left: Option<CardShare>,
    },
    /// The system gave no thread.
    #[error("cannot start the engine's thread: {0}")]
    Thread(std::io::Error),
}

/// What more can be done where a card is shared.
fn share(left: &Option<CardShare>) -> String {
    let Some(CardShare { card, bytes }) = left else { return String::new() };
    format!(", or lower --training-memory, which leaves {bytes} bytes of card {card} to trainings")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_pass_and_each_bad_option_is_named() {
        let good = EngineOptions::new("/models/tiny.gguf");
        assert!(good.check().is_ok());
        assert_eq!(good.served_name, "tiny");
        type Spoil = fn(&mut EngineOptions);
        let cases: [(&str, Spoil); 13] = [
            ("--max-seqs", |o| o.max_seqs = 0),
            ("--max-batch-tokens", |o| o.max_batch_tokens = o.max_seqs - 1),
            ("--max-loras", |o| o.max_adapters = 4097),
            ("--max-lora-rank", |o| o.max_adapter_rank = 0),
            ("--max-waiting", |o| o.max_waiting = 0),
            ("--max-model-len", |o| o.max_model_len = Some(1)),
            ("--swap-memory", |o| o.swap_memory = Some(1 << 30)),
            ("--attention-backend", |o| o.attention_backend = Some(Prefill::Mma)),
            ("--activations fp8 is for cards", |o| {
                (o.activations, o.weight_format) = (Activations::Fp8, WeightFormat::Fp8);
            }),
            ("--activations fp8 multiplies", |o| (o.activations, o.device) = (Activations::Fp8, Device::Auto)),
            ("--threads", |o| o.threads = Some(0)),
            ("--tensor-parallel", |o| o.tensor_parallel = Some(2)),
            ("--tensor-parallel", |o| (o.device, o.tensor_parallel) = (Device::Auto, Some(0))),
        ];
        for (name, spoil) in cases {
            let mut options = good.clone();
            spoil(&mut options);
            assert!(options.check().unwrap_err().to_string().starts_with(name), "{name}");
        }
    }
}
