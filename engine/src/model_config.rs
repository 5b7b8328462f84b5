//! What kind of decoder a model is.

mod dbrx;
mod gemma;
mod gguf;
mod json;
mod mpt;
mod refused;
mod yarn;

use std::path::Path;

use tidemill_kernels::MAX_EXPERTS;

use crate::load_error::LoadError;

pub use gemma::Gemma;
pub use yarn::Yarn;

/// Of any size. No model comes near; products are bounded by the files, as every tensor's shape is compared with its bytes.
const LARGEST: usize = 1 << 24;

const SUPPORTED_FAMILIES: &str =
    "supported are Llama, Mistral, Mixtral, DBRX, Qwen2, Qwen2-MoE, Qwen3, Qwen3-MoE, MPT, Gemma 2 and Gemma 3 models";

/// Families of decoders that share one description (`model/decoder.rs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// Llama 1 to 3.x, SmolLM2.
    Llama,
    /// Mistral: a sliding window.
    Mistral,
    /// Qwen2 and 2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: norms on the heads of q and k.
    Qwen3,
    /// Mixtral: experts.
    Mixtral,
    /// Qwen1.5-MoE and Qwen2-MoE: Qwen2 with experts, one of them every token's.
    Qwen2Moe,
    /// Qwen3-MoE: Qwen3 with experts.
    Qwen3Moe,
    /// DBRX: experts, layer norms, limits of q, k and v.
    Dbrx,
    /// Gemma 2: see [`Gemma`].
    Gemma2,
    /// Gemma 3, the text part: see [`Gemma`].
    Gemma3,
    /// MPT: ALiBi in the place of rotary positions, layer norms, a feed-forward part without a gate.
    Mpt,
}

/// Sizes and switches of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Family.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the feed-forward part, or of one expert's.
    pub intermediate: usize,
    /// Experts in the place of one feed-forward part.
    pub experts: Option<ExpertConfig>,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements per head; even.
    pub head_dim: usize,
    /// Rows of the embedding table.
    pub vocabulary: usize,
    /// Positions the model was made for.
    pub max_positions: usize,
    /// Added to the mean square in norms.
    pub rms_eps: f32,
    /// Norms of the residual stream subtract the mean first.
    pub layer_norm: bool,
    /// No number of q, k and v is farther from 0 than this.
    pub clip_qkv: Option<f32>,
    /// ALiBi's largest exponent: biases on scores tell positions (see [`ModelConfig::alibi_slopes`]), and nothing is rotated.
    pub alibi: Option<f64>,
    /// What scores are multiplied by, where it is not `1 / sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
    /// The feed-forward part is `down(silu(gate(x)) * up(x))`; without a gate, `down(gelu(up(x)))`.
    pub gated: bool,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// A query sees the last this many positions only; in layers with a window, where not all have one ([`ModelConfig::window`]).
    pub sliding_window: Option<usize>,
    /// The output matrix is the embedding table.
    pub tied_embeddings: bool,
    /// Bias on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the attention output.
    pub output_bias: bool,
    /// Biases in the feed-forward part.
    pub mlp_bias: bool,
    /// RMS norms on the heads of q and k.
    pub qk_norm: bool,
    /// What Gemma models have of their own.
    pub gemma: Option<Gemma>,
}

/// A mixture of experts: each token goes through some of many feed-forward parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertConfig {
    /// Experts of a layer.
    pub count: usize,
    /// Experts that a token goes to.
    pub each: usize,
    /// The weights of a token's experts add up to 1; else they are their shares among all.
    pub normalised: bool,
    /// Width of one more part that every token goes through, behind a gate.
    pub shared: Option<usize>,
}

/// Rotary frequencies for contexts longer than in pre-training.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As pre-trained.
    None,
    /// Positions divided by the factor (Chen et al. 2023).
    Linear {
        /// Divides positions.
        factor: f64,
    },
    /// Llama 3.1's: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// Divides low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// Positions in pre-training.
        original_positions: usize,
    },
    /// YaRN.
    Yarn(Yarn),
    /// A divisor for each frequency, as GGUF files carry it.
    Factors(Vec<f32>),
}

impl ModelConfig {
    /// Refuses sizes that contradict each other, before anything is reserved.
    fn check(&self, path: &Path) -> Result<(), LoadError> {
        let invalid = |field: &str, detail: String| Err(LoadError::invalid(path, field, detail));
        let sizes = [
            ("hidden_size", self.hidden),
            ("intermediate_size", self.intermediate),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocabulary),
            ("max_position_embeddings", self.max_positions),
        ];
        for (name, size) in sizes {
            if size == 0 || size > LARGEST {
                return invalid(name, format!("is {size}, but must lie between 1 and {LARGEST}"));
            }
        }
        if let Some(ExpertConfig { count, each, shared, .. }) = self.experts {
            if count == 0 || count > MAX_EXPERTS {
                return invalid("num_experts", format!("is {count}, but must lie between 1 and {MAX_EXPERTS}"));
            }
            if each == 0 || each > count {
                return invalid("num_experts_per_tok", format!("is {each}, but there are {count} experts"));
            }
            if let Some(width) = shared.filter(|&width| width == 0 || width > LARGEST) {
                return invalid("shared_expert_intermediate_size", format!("is {width}, but must lie between 1 and {LARGEST}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let detail = format!("{} is not a multiple of num_key_value_heads, {}", self.heads, self.kv_heads);
            return invalid("num_attention_heads", detail);
        }
        if !self.head_dim.is_multiple_of(2) {
            return invalid("head_dim", format!("{} is odd, so it cannot be rotated", self.head_dim));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return invalid("rope_theta", format!("is {}", self.rope_theta));
        }
        if matches!(self.rope_scaling, RopeScaling::Yarn(_)) && self.rope_theta <= 1.0 {
            return invalid(
                "rope_theta",
                format!("is {}, but must be above 1 with yarn, whose bounds are logarithms to it", self.rope_theta),
            );
        }
        if !(self.rms_eps.is_finite() && self.rms_eps >= 0.0) {
            return invalid("rms_norm_eps", format!("is {}", self.rms_eps));
        }
        if let Some(limit) = self.clip_qkv.filter(|limit| !(limit.is_finite() && *limit > 0.0)) {
            return invalid("clip_qkv", format!("is {limit}; leave it out for no limit"));
        }
        if let Some(most) = self.alibi.filter(|most| !(*most > 0.0 && *most <= 64.0)) {
            return invalid("alibi_bias_max", format!("is {most}, but must lie above 0 and not above 64"));
        }
        if let Some(scale) = self.softmax_scale.filter(|scale| !(scale.is_finite() && *scale > 0.0)) {
            return invalid("softmax_scale", format!("is {scale}; leave it out for 1 / sqrt(head_dim)"));
        }
        if self.sliding_window == Some(0) {
            return invalid("sliding_window", "is 0; leave it out for full attention".to_owned());
        }
        if let Some(gemma) = &self.gemma {
            gemma.check(self, path)?;
        }
        if let RopeScaling::Factors(factors) = &self.rope_scaling {
            let usable = factors.iter().all(|factor| factor.is_finite() && *factor > 0.0);
            if factors.len() != self.head_dim / 2 || !usable {
                return invalid("rope_freqs.weight", format!("must be {} positive numbers", self.head_dim / 2));
            }
        }
        Ok(())
    }

    /// Whether a layer is one of those with a window in a model whose other layers have none.
    pub fn is_local(&self, layer: usize) -> bool {
        self.gemma.as_ref().is_some_and(|gemma| gemma.full_attention.get(layer) == Some(&false))
    }

    /// How many positions queries of a layer see; `None` is all.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.sliding_window.filter(|_| self.gemma.is_none() || self.is_local(layer))
    }

    /// What scores of attention are multiplied with.
    pub fn attention_scale(&self) -> f32 {
        match &self.gemma {
            Some(gemma) => (1.0 / gemma.query_scalar.sqrt()) as f32,
            None => self.softmax_scale.unwrap_or(1.0 / (self.head_dim as f32).sqrt()),
        }
    }

    /// `[head_dim / 2]` rotary frequencies of layers with a window, where they are others than [`ModelConfig::inverse_frequencies`].
    pub fn local_inverse_frequencies(&self) -> Option<Vec<f32>> {
        let theta = self.gemma.as_ref()?.local_rope_theta?;
        let half = self.head_dim / 2;
        Some((0..half).map(|i| theta.powf(-(i as f64) / half as f64) as f32).collect())
    }

    /// ALiBi's slopes `[heads]` (Press et al. 2022): of 2^n heads, head i has `2^(-most (i + 1) / 2^n)`. Heads beyond the last power of two have
    /// every other slope of twice as many heads, from the first on; as transformers' `build_mpt_alibi_tensor` and llama.cpp.
    pub fn alibi_slopes(&self) -> Option<Vec<f32>> {
        let most = self.alibi?;
        // The largest power of two that is not above the number of heads.
        let whole = (self.heads + 1).next_power_of_two() / 2;
        let exponent = |head: usize| match head.checked_sub(whole) {
            None => (head + 1) as f64 / whole as f64,
            Some(beyond) => (2 * beyond + 1) as f64 / (2 * whole) as f64,
        };
        Some((0..self.heads).map(|head| (-most * exponent(head)).exp2() as f32).collect())
    }

    /// `[head_dim / 2]` rotary frequencies in radians per position, stretched as [`RopeScaling`] says; none where ALiBi tells positions.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let half = if self.alibi.is_some() { 0 } else { self.head_dim / 2 };
        let plain = (0..half).map(|i| self.rope_theta.powf(-(i as f64) / half as f64));
        let stretched = plain.enumerate().map(|(i, frequency)| self.rope_scaling.stretch(i, frequency, half, self.rope_theta));
        stretched.map(|frequency| frequency as f32).collect()
    }

    /// What cosines and sines of [`ModelConfig::inverse_frequencies`] are multiplied with.
    pub fn rope_magnitude(&self) -> f32 {
        match self.rope_scaling {
            RopeScaling::Yarn(yarn) => yarn.attention as f32,
            _ => 1.0,
        }
    }
}

impl RopeScaling {
    /// Llama3: `transformers`' `_compute_llama3_parameters`.
    fn stretch(&self, index: usize, frequency: f64, half: usize, theta: f64) -> f64 {
        match self {
            RopeScaling::Yarn(yarn) => yarn.stretch(index, frequency, half, theta),
            RopeScaling::None => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Factors(factors) => frequency / factors.get(index).copied().map_or(1.0, f64::from),
            &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                let turns = original_positions as f64 * frequency / std::f64::consts::TAU;
                if turns < low_freq_factor {
                    frequency / factor
                } else if turns > high_freq_factor {
                    frequency
                } else {
                    let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - kept) * frequency / factor + kept * frequency
                }
            }
        }
    }
}
