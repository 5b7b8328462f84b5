//! Configurations from GGUF metadata.

use super::yarn::{BETAS, Yarn};
use super::{ExpertConfig, Family, Gemma, ModelConfig, RopeScaling, SUPPORTED_FAMILIES, refused};
use crate::gguf::{Gguf, Pairs};
use crate::load_error::LoadError;

const ARCHITECTURE: &str = "general.architecture";

impl ModelConfig {
    /// Reads the metadata, and from the tensors (`shape` says which there are) what the metadata leaves to them: vocabulary,
    /// biases, head norms, tied embeddings, frequencies.
    pub(crate) fn from_gguf<'a>(
        gguf: &Gguf,
        shape: impl Fn(&str) -> Option<&'a [usize]>,
        rope_factors: Option<Vec<f32>>,
    ) -> Result<Self, LoadError> {
        let architecture = gguf.text(ARCHITECTURE)?.ok_or_else(|| gguf.missing(ARCHITECTURE))?;
        let key = |name: &str| format!("{architecture}.{name}");
        let need = |name: &str| gguf.integer(&key(name))?.ok_or_else(|| gguf.missing(&key(name)));
        let count = gguf.integer(&key("expert_count"))?.filter(|&count| count > 0);
        let family = match architecture {
            // llama.cpp has no architecture of its own for it.
            "llama" if count.is_some() => Family::Mixtral,
            "llama" => Family::Llama,
            "mistral" => Family::Mistral,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            "qwen2moe" => Family::Qwen2Moe,
            "qwen3moe" => Family::Qwen3Moe,
            "dbrx" => Family::Dbrx,
            "gemma2" => Family::Gemma2,
            "gemma3" => Family::Gemma3,
            "mpt" => Family::Mpt,
            _ => {
                let found = format!("\"{architecture}\"");
                return Err(LoadError::unsupported(gguf.path(), ARCHITECTURE, found, SUPPORTED_FAMILIES));
            }
        };
        refused::in_gguf(gguf, family, architecture)?;
        let experts = match (family, count) {
            (
                Family::Llama | Family::Mistral | Family::Qwen2 | Family::Qwen3 | Family::Gemma2 | Family::Gemma3 | Family::Mpt,
                None,
            ) => None,
            (Family::Mistral | Family::Qwen2 | Family::Qwen3 | Family::Gemma2 | Family::Gemma3 | Family::Mpt, Some(_)) => {
                return Err(LoadError::unsupported(gguf.path(), key("expert_count"), "a mixture of experts", SUPPORTED_FAMILIES));
            }
            (_, count) => Some(ExpertConfig {
                count: count.ok_or_else(|| gguf.missing(&key("expert_count")))?,
                each: need("expert_used_count")?,
                // As llama.cpp does, whose files say nothing of it.
                normalised: family != Family::Qwen2Moe,
                shared: match family {
                    Family::Qwen2Moe => Some(need("expert_shared_feed_forward_length")?),
                    _ => None,
                },
            }),
        };
        let hidden = need("embedding_length")?;
        let heads = need("attention.head_count")?;
        if heads == 0 {
            return Err(LoadError::invalid(gguf.path(), key("attention.head_count"), "is 0"));
        }
        let head_dim = gguf.integer(&key("attention.key_length"))?.unwrap_or(hidden / heads);
        for name in ["attention.value_length", "rope.dimension_count"] {
            if let Some(other) = gguf.integer(&key(name))?.filter(|&other| other != head_dim) {
                let instead = format!("it must be the head dimension {head_dim}");
                return Err(LoadError::unsupported(gguf.path(), key(name), other.to_string(), instead));
            }
        }
        let vocabulary = match shape("token_embd.weight") {
            Some(shape) => shape.first().copied().unwrap_or(0),
            None => need("vocab_size")?,
        };
        let has = |name: &str| shape(name).is_some();
        let is_mpt = family == Family::Mpt;
        let layer_norm = family == Family::Dbrx || is_mpt;
        if is_mpt {
            without(gguf, &has)?;
        }
        let eps = key(if layer_norm { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" });
        let eps = gguf.number(&eps)?.ok_or_else(|| gguf.missing(&eps))?;
        let config = ModelConfig {
            family,
            hidden,
            intermediate: match family {
                Family::Qwen2Moe | Family::Qwen3Moe => need("expert_feed_forward_length")?,
                _ => need("feed_forward_length")?,
            },
            experts,
            layers: need("block_count")?,
            heads,
            kv_heads: gguf.integer(&key("attention.head_count_kv"))?.unwrap_or(heads),
            head_dim,
            vocabulary,
            max_positions: positions(gguf, architecture, need("context_length")?)?,
            rms_eps: eps as f32,
            layer_norm,
            // 0 is none, as for llama.cpp.
            clip_qkv: gguf.number(&key("attention.clamp_kqv"))?.filter(|&limit| limit != 0.0).map(|limit| limit as f32),
            alibi: if is_mpt { Some(alibi(gguf)?) } else { None },
            softmax_scale: None,
            gated: !is_mpt,
            rope_theta: gguf.number(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            rope_scaling: match (scaling(gguf, architecture)?, rope_factors) {
                (RopeScaling::None, Some(factors)) => RopeScaling::Factors(factors),
                (scaling, None) => scaling,
                (_, Some(_)) => {
                    let instead = "one of rope.scaling and rope_freqs.weight is";
                    let kind = key("rope.scaling.type");
                    return Err(LoadError::unsupported(gguf.path(), kind, "scaling beside rope_freqs.weight", instead));
                }
            },
            sliding_window: window(gguf, architecture, family)?,
            tied_embeddings: !has("output.weight"),
            qkv_bias: has("blk.0.attn_q.bias"),
            output_bias: has("blk.0.attn_output.bias"),
            mlp_bias: has("blk.0.ffn_down.bias"),
            qk_norm: has("blk.0.attn_q_norm.weight"),
            gemma: None,
        };
        let gemma = match family {
            Family::Gemma2 | Family::Gemma3 => Some(Gemma::of_gguf(gguf, architecture, family, &config)?),
            _ => None,
        };
        let config = ModelConfig { gemma, ..config };
        config.check(gguf.path())?;
        Ok(config)
    }
}

impl ModelConfig {
    /// What llama.cpp calls the architecture. A Mistral model is a llama with a window.
    pub(crate) fn gguf_architecture(&self) -> &'static str {
        match self.family {
            Family::Llama | Family::Mistral | Family::Mixtral => "llama",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Qwen2Moe => "qwen2moe",
            Family::Qwen3Moe => "qwen3moe",
            Family::Dbrx => "dbrx",
            Family::Gemma2 => "gemma2",
            Family::Gemma3 => "gemma3",
            Family::Mpt => "mpt",
        }
    }

    /// The metadata that [`ModelConfig::from_gguf`] reads; [`ModelConfig::rope_factors`] are a tensor.
    pub(crate) fn to_gguf(&self, pairs: Pairs) -> Pairs {
        let architecture = self.gguf_architecture();
        let key = |name: &str| format!("{architecture}.{name}");
        let sizes = [
            ("block_count", self.layers),
            ("context_length", self.max_positions),
            ("embedding_length", self.hidden),
            ("feed_forward_length", self.intermediate),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
            ("attention.key_length", self.head_dim),
            ("attention.value_length", self.head_dim),
            ("rope.dimension_count", self.head_dim),
            ("vocab_size", self.vocabulary),
        ];
        let window = self.sliding_window.map(|window| ("attention.sliding_window", window));
        let mut pairs = pairs.text(ARCHITECTURE, architecture);
        for (name, size) in sizes.into_iter().chain(window) {
            // No size comes near the end of 32 bits: `check` has seen to it.
            pairs = pairs.u32(&key(name), u32::try_from(size).unwrap_or(u32::MAX));
        }
        pairs =
            pairs.f32(&key("attention.layer_norm_rms_epsilon"), self.rms_eps).f32(&key("rope.freq_base"), self.rope_theta as f32);
        match self.rope_scaling {
            RopeScaling::Linear { factor } => {
                pairs = pairs.text(&key("rope.scaling.type"), "linear").f32(&key("rope.scaling.factor"), factor as f32);
            }
            RopeScaling::Yarn(Yarn { factor, attention, beta_fast, beta_slow, original_positions, .. }) => {
                let original = u32::try_from(original_positions).unwrap_or(u32::MAX);
                pairs = pairs.text(&key("rope.scaling.type"), "yarn").f32(&key("rope.scaling.factor"), factor as f32);
                pairs = pairs.u32(&key("rope.scaling.original_context_length"), original);
                // What comes to what llama.cpp multiplies by itself.
                let beyond = (attention / Yarn::attention(factor, None)) as f32;
                for (name, value, default) in [
                    ("attn_factor", beyond, 1.0),
                    ("yarn_beta_fast", beta_fast as f32, BETAS.0 as f32),
                    ("yarn_beta_slow", beta_slow as f32, BETAS.1 as f32),
                ] {
                    if value != default {
                        pairs = pairs.f32(&key(&format!("rope.scaling.{name}")), value);
                    }
                }
            }
            _ => {}
        }
        pairs
    }

    /// `rope_freqs.weight` of a GGUF file: what each frequency is divided by, where that is not the same for all.
    pub(crate) fn rope_factors(&self) -> Option<Vec<f32>> {
        match &self.rope_scaling {
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Yarn(_) => None,
            RopeScaling::Factors(factors) => Some(factors.clone()),
            scaling @ RopeScaling::Llama3 { .. } => {
                let half = self.head_dim / 2;
                let plain = (0..half).map(|i| self.rope_theta.powf(-(i as f64) / half as f64));
                Some(
                    plain
                        .enumerate()
                        .map(|(i, frequency)| (frequency / scaling.stretch(i, frequency, half, self.rope_theta)) as f32)
                        .collect(),
                )
            }
        }
    }
}

/// The largest exponent of an MPT file's ALiBi.
fn alibi(gguf: &Gguf) -> Result<f64, LoadError> {
    const KEY: &str = "mpt.attention.max_alibi_bias";
    // 0 is a model that learns a vector for each position.
    gguf.number(KEY)?
        .filter(|&most| most != 0.0)
        .ok_or_else(|| LoadError::unsupported(gguf.path(), KEY, "no bias", "positions are told by ALiBi"))
}

/// Refuses tensors that some MPT files have and that nothing here computes with.
fn without(gguf: &Gguf, has: &impl Fn(&str) -> bool) -> Result<(), LoadError> {
    let names = [
        "position_embd.weight",
        "output_norm.bias",
        "blk.0.attn_norm.bias",
        "blk.0.attn_qkv.bias",
        "blk.0.attn_q_norm.weight",
        "blk.0.ffn_norm.bias",
        "blk.0.ffn_up.bias",
        "blk.0.ffn_act.scales",
    ];
    match names.into_iter().find(|name| has(name)) {
        None => Ok(()),
        Some(name) => Err(LoadError::unsupported(gguf.path(), name, "a tensor of this name", "models without it are")),
    }
}

/// The window of all layers. Families with a window on some layers only say nothing more of it in GGUF.
fn window(gguf: &Gguf, architecture: &str, family: Family) -> Result<Option<usize>, LoadError> {
    let key = format!("{architecture}.attention.sliding_window");
    let context = gguf.integer(&format!("{architecture}.context_length"))?.unwrap_or(usize::MAX);
    let window = gguf.integer(&key)?.filter(|&window| window > 0);
    match family {
        Family::Llama | Family::Mistral | Family::Mixtral => Ok(window),
        // llama.cpp's, where an old file says nothing of it.
        Family::Gemma2 => Ok(window.or(Some(4096))),
        Family::Gemma3 => Ok(window),
        _ => match window.filter(|&window| window < context) {
            None => Ok(None),
            Some(window) => {
                let found = format!("a window of {window} on layers that the file does not name");
                Err(LoadError::unsupported(gguf.path(), key, found, "full attention is"))
            }
        },
    }
}

/// Positions of a model whose file says so many: see [`super::json::Rope::positions`].
fn positions(gguf: &Gguf, architecture: &str, context: usize) -> Result<usize, LoadError> {
    let original = gguf.integer(&format!("{architecture}.rope.scaling.original_context_length"))?;
    match (scaling(gguf, architecture)?, original) {
        (RopeScaling::Yarn(yarn), Some(_)) => Ok(context.max(yarn.positions())),
        _ => Ok(context),
    }
}

fn scaling(gguf: &Gguf, architecture: &str) -> Result<RopeScaling, LoadError> {
    let kind = format!("{architecture}.rope.scaling.type");
    let factor = format!("{architecture}.rope.scaling.factor");
    // Its name in files from before there was another kind.
    let given = match gguf.number(&factor)? {
        None => gguf.number(&format!("{architecture}.rope.scale_linear"))?,
        given => given,
    };
    let number = |name: &str| gguf.number(&format!("{architecture}.rope.scaling.{name}"));
    let attn_factor = number("attn_factor")?.unwrap_or(1.0);
    let named = gguf.text(&kind)?;
    if attn_factor != 1.0 && named != Some("yarn") {
        let key = format!("{architecture}.rope.scaling.attn_factor");
        return Err(LoadError::unsupported(
            gguf.path(),
            key,
            attn_factor.to_string(),
            "only beside rope.scaling.type yarn it is",
        ));
    }
    match named {
        Some("none") => Ok(RopeScaling::None),
        Some("yarn") => {
            let above_0 = |name: &str, value: f64| match value.is_finite() && value > 0.0 {
                true => Ok(value),
                false => {
                    let key = format!("{architecture}.rope.scaling.{name}");
                    Err(LoadError::invalid(gguf.path(), key, format!("is {value}, but must be above 0")))
                }
            };
            if let Some(other) = number("yarn_ext_factor")?.filter(|&other| other != 1.0) {
                let key = format!("{architecture}.rope.scaling.yarn_ext_factor");
                return Err(LoadError::unsupported(gguf.path(), key, other.to_string(), "1 is"));
            }
            let factor = above_0("factor", given.ok_or_else(|| gguf.missing(&factor))?)?;
            // llama.cpp's converter writes the publisher's own under this name, and the second of its two weights under the other.
            let attention = match number("yarn_attn_factor")? {
                Some(own) => own,
                None => Yarn::attention(factor, number("yarn_log_multiplier")?.filter(|&all| all != 0.0).map(|all| (1.0, all))),
            };
            let key = format!("{architecture}.rope.scaling.original_context_length");
            let original = match gguf.integer(&key)? {
                Some(original) => original,
                None => gguf.integer(&format!("{architecture}.context_length"))?.unwrap_or(0),
            };
            above_0("original_context_length", original as f64)?;
            Ok(RopeScaling::Yarn(Yarn {
                factor,
                attention: above_0("attn_factor", attention * attn_factor)?,
                beta_fast: above_0("yarn_beta_fast", number("yarn_beta_fast")?.unwrap_or(BETAS.0))?,
                beta_slow: above_0("yarn_beta_slow", number("yarn_beta_slow")?.unwrap_or(BETAS.1))?,
                truncate: true,
                original_positions: original,
            }))
        }
        // As llama.cpp reads it: a factor without a kind is a linear one.
        None if given.is_none_or(|value| value == 0.0 || value == 1.0) => Ok(RopeScaling::None),
        None | Some("linear") => {
            let value = given.ok_or_else(|| gguf.missing(&factor))?;
            if !(value.is_finite() && value > 0.0) {
                return Err(LoadError::invalid(gguf.path(), factor, format!("is {value}, but must be above 0")));
            }
            Ok(RopeScaling::Linear { factor: value })
        }
        Some(other) => Err(LoadError::unsupported(
            gguf.path(),
            kind,
            format!("\"{other}\""),
            "supported are none, linear, yarn and rope_freqs",
        )),
    }
}
